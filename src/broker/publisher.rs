//! Publishing with confirms: on a connection of its own, every message
//! persistent and `mandatory`, every message with a [`Fate`].
//!
//! `Ok` from [`Publisher::publish`] means sent or about to be; only
//! [`Fate::Confirmed`] means that the broker has the message. A publisher that
//! lost its connection stays lost: opening another one, and publishing what
//! became [`Fate::Unknown`] again, is the caller's decision.

use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, Channel, Confirm, Publish, Return};
use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError};
use thiserror::Error;

use super::confirms::{Book, Stray};
pub use super::confirms::{Fate, Seq};
use super::connection::{Dial, Link};
use super::error::{ConnectError, LinkError, Stage};
use super::outgoing::{self, Likener};
pub use super::outgoing::{Outgoing, Unfit};
use super::properties::Properties;
use super::topology;
use crate::config::checked::Broker;

/// How long a dead connection has to say what it died of.
const CAUSE_WITHIN: Duration = Duration::from_secs(2);

/// AMQP's reply code for a message that breaks a rule of the broker's.
const PRECONDITION_FAILED: u16 = 406;

/// AMQP's reply codes for what the broker cannot make sense of: it closes the
/// connection over them.
const NONSENSE: std::ops::RangeInclusive<u16> = 501..=506;

/// AMQP's reply code for an exchange that the user may not publish to.
const ACCESS_REFUSED: u16 = 403;

/// AMQP's reply code for an exchange that does not exist.
const NOT_FOUND: u16 = 404;

/// What a publisher may have in flight, and how long it waits.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most unconfirmed messages, at least 1.
    pub messages: usize,
    /// Most bytes of unconfirmed messages; a single larger message goes alone.
    /// Keep it well under amiquip's write buffer of 16 MiB: then a publisher
    /// that the broker blocks waits for room, not inside amiquip.
    pub bytes: usize,
    /// Longest wait for room, and longest time for handing one message over.
    pub wait: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            messages: 1_024,
            bytes: 4 * 1024 * 1024,
            wait: Duration::from_secs(30),
        }
    }
}

/// Why a message was not published.
#[derive(Debug, Error)]
pub enum PublishError {
    /// It breaks a limit of AMQP; nothing was sent.
    #[error("failed to publish a message: {0}")]
    Unfit(#[from] Unfit),
    /// Too much was unconfirmed for too long; nothing was sent, and the
    /// connection still stands.
    #[error(
        "failed to publish to {address}: no confirm within {within:?} with {unconfirmed} messages \
         unconfirmed{}", alarm_text(alarm.as_deref())
    )]
    NoRoom {
        /// Whereto, without password.
        address: String,
        /// How long it waited.
        within: Duration,
        /// How many messages were unconfirmed.
        unconfirmed: usize,
        /// The broker's words when a memory or disk alarm blocks publishers.
        alarm: Option<String>,
    },
    /// The connection or channel is gone. This message may have arrived or
    /// not, if it was the first to find out.
    #[error("failed to publish to {address}: {cause}")]
    Lost {
        /// Whereto, without password.
        address: String,
        /// The broker's or the socket's words.
        cause: String,
    },
}

fn alarm_text(alarm: Option<&str>) -> String {
    match alarm {
        Some(reason) => format!("; the broker blocks publishers: {reason}"),
        None => String::new(),
    }
}

/// Publishes with confirms.
pub struct Publisher {
    /// `None` once the connection is lost.
    live: Option<Live>,
    /// Why it is lost.
    cause: String,
    /// With which reply code the broker closed the channel, if it did.
    reply: Option<u16>,
    address: String,
    server: usize,
    user: String,
    book: Book,
    likener: Likener,
    limits: Limits,
}

struct Live {
    link: Link,
    channel: Channel,
    confirms: Receiver<Confirm>,
    returns: Receiver<Return>,
}

impl Publisher {
    /// Connects, within `broker.connect_timeout` for the connection and again
    /// for the channel. `purpose` is shown on RabbitMQ's management pages.
    ///
    /// # Errors
    ///
    /// [`ConnectError`], by the step that failed.
    pub fn open(broker: &Broker, purpose: &str, limits: Limits) -> Result<Self, ConnectError> {
        Self::dial(Dial::new(broker, purpose), limits)
    }

    /// Like [`Publisher::open`], with a say in which URL comes first.
    ///
    /// # Errors
    ///
    /// [`ConnectError`], by the step that failed.
    pub(super) fn dial(dial: Dial<'_>, limits: Limits) -> Result<Self, ConnectError> {
        let link = dial.open()?;
        let (address, server) = (link.address().to_string(), link.server());
        let user = link.address().user.clone();
        let live = Live::start(link, dial.broker.connect_timeout)?;
        Ok(Self {
            live: Some(live),
            cause: String::new(),
            reply: None,
            address,
            server,
            user,
            book: Book::default(),
            likener: Likener::default(),
            limits,
        })
    }

    /// Who publishes: the broker takes no other `user_id`.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Whether there is an exchange of this name: a publish to one that is not
    /// there ends the channel, and with it all that is unconfirmed.
    ///
    /// # Errors
    ///
    /// [`PublishError::Lost`] when that cannot be found out.
    pub fn has_exchange(&mut self, name: &str) -> Result<bool, PublishError> {
        // Longer names end the connection.
        if name.is_empty() || name.len() > outgoing::SHORT_STRING_MAX_BYTES {
            return Ok(name.is_empty());
        }
        let found = match &mut self.live {
            Some(live) => topology::has_exchange(&mut live.link, name, self.limits.wait),
            None => return Err(self.lost_error()),
        };
        found.map_err(|error| PublishError::Lost {
            address: self.address.clone(),
            cause: error.to_string(),
        })
    }

    /// Hands `message` to the broker, after waiting for room if too much is
    /// unconfirmed. Its fate comes out of [`Publisher::poll`] and its
    /// companions under the number returned here; take them regularly, they
    /// are kept until then.
    ///
    /// # Errors
    ///
    /// [`PublishError`]; the message then has no number and no fate.
    pub fn publish(&mut self, message: &Outgoing) -> Result<Seq, PublishError> {
        let (properties, property_bytes) = outgoing::encode(message, self.properties_max()?)?;
        let route = (message.exchange.as_str(), message.routing_key.as_str());
        self.send(route, &message.body, properties, property_bytes)
    }

    /// Like [`Publisher::publish`], with properties as a delivery had them:
    /// any AMQP type comes out as it went in. `route` is exchange and routing
    /// key. The message becomes persistent.
    pub(super) fn publish_copy(
        &mut self,
        route: (&str, &str),
        body: &[u8],
        properties: AmqpProperties,
    ) -> Result<Seq, PublishError> {
        let most = self.properties_max()?;
        let (properties, property_bytes) = outgoing::persist(route, properties, most)?;
        self.send(route, body, properties, property_bytes)
    }

    /// Like [`Publisher::publish`], with properties of every AMQP type. `route`
    /// is exchange and routing key. The message becomes persistent.
    ///
    /// # Errors
    ///
    /// As [`Publisher::publish`].
    pub fn publish_whole(
        &mut self,
        route: (&str, &str),
        body: &[u8],
        properties: &Properties,
    ) -> Result<Seq, PublishError> {
        self.publish_copy(route, body, properties.to_amqp())
    }

    fn properties_max(&self) -> Result<usize, PublishError> {
        match &self.live {
            Some(live) => Ok(outgoing::properties_max(live.link.frame_max())),
            None => Err(self.lost_error()),
        }
    }

    fn send(
        &mut self,
        (exchange, routing_key): (&str, &str),
        body: &[u8],
        properties: AmqpProperties,
        property_bytes: usize,
    ) -> Result<Seq, PublishError> {
        let bytes = property_bytes + body.len();
        self.make_room(bytes)?;
        let likeness = self.likener.of(exchange, routing_key, body, &properties);
        let Some(live) = &self.live else {
            return Err(self.lost_error());
        };
        let seq = self.book.enter(likeness, bytes);
        let watch = live.link.watch(self.limits.wait);
        let sent = live.channel.basic_publish(
            exchange,
            Publish {
                body,
                routing_key: routing_key.to_owned(),
                mandatory: true,
                immediate: false,
                properties,
            },
        );
        drop(watch);
        if sent.is_err() {
            self.book.withdraw(seq);
            self.lose(None);
            return Err(self.lost_error());
        }
        Ok(seq)
    }

    /// The fates that are known, without waiting; each message once.
    pub fn poll(&mut self) -> Vec<(Seq, Fate)> {
        self.collect();
        self.book.take_settled()
    }

    /// Like [`Publisher::poll`], but waits for the first fate, at most `within`
    /// and only while something is unconfirmed.
    pub fn wait(&mut self, within: Duration) -> Vec<(Seq, Fate)> {
        self.collect_until(Instant::now() + within, Book::has_settled);
        self.book.take_settled()
    }

    /// Like [`Publisher::poll`], but waits until nothing is unconfirmed, at
    /// most `within`. What is still unconfirmed then stays so.
    pub fn wait_all(&mut self, within: Duration) -> Vec<(Seq, Fate)> {
        self.collect_until(Instant::now() + within, |_| false);
        self.book.take_settled()
    }

    /// How many messages have no fate yet.
    #[must_use]
    pub fn unconfirmed(&self) -> usize {
        self.book.unconfirmed()
    }

    /// Why the connection is lost, if it is known to be.
    #[must_use]
    pub fn lost(&self) -> Option<&str> {
        self.live.is_none().then_some(self.cause.as_str())
    }

    /// Which of the broker's URLs it leads or led to, counted from 0.
    pub(super) fn server(&self) -> usize {
        self.server
    }

    /// With which reply code the broker closed the channel, or the connection
    /// over what it could not read, if it is lost by that: one of the messages that were unconfirmed then is at fault.
    #[must_use]
    pub fn reply(&self) -> Option<u16> {
        self.reply
    }

    /// True when it is lost because the broker will not have a message such as
    /// one of those that were unconfirmed then (406: longer than its
    /// `max_message_size`, or with a property it objects to; 501 and the like:
    /// it cannot be read).
    #[must_use]
    pub fn refused(&self) -> bool {
        let is_refusal = |code: u16| code == PRECONDITION_FAILED || NONSENSE.contains(&code);
        self.reply.is_some_and(is_refusal)
    }

    /// True when it is lost because the exchange of one of the messages that
    /// were unconfirmed then does not exist.
    pub(super) fn went_astray(&self) -> bool {
        self.reply == Some(NOT_FOUND)
    }

    /// True when it is lost because the user may not publish to the exchange of
    /// one of the messages that were unconfirmed then.
    #[must_use]
    pub fn was_denied(&self) -> bool {
        self.reply == Some(ACCESS_REFUSED)
    }

    /// Waits for what is unconfirmed, at most `within`, and closes the
    /// connection, again at most `within`. Every message that was published
    /// and not yet reported has its fate in the result.
    pub fn close(mut self, within: Duration) -> Vec<(Seq, Fate)> {
        self.collect_until(Instant::now() + within, |_| false);
        if let Some(live) = self.live.take() {
            // What arrives after this point is not looked at any more, so it
            // may as well not have come.
            self.book.lost();
            if let Err(error) = live.link.close_with(live.channel, within) {
                log::warn!("{error}");
            }
        }
        self.book.take_settled()
    }

    fn make_room(&mut self, bytes: usize) -> Result<(), PublishError> {
        let limits = self.limits;
        let has_room = |book: &Book| {
            book.unconfirmed() == 0
                || (book.unconfirmed() < limits.messages
                    && book.unconfirmed_bytes() + bytes <= limits.bytes)
        };
        self.collect();
        self.collect_until(Instant::now() + limits.wait, has_room);
        if has_room(&self.book) {
            return Ok(());
        }
        let alarm = self.live.as_mut().and_then(|live| live.link.blocked());
        Err(PublishError::NoRoom {
            address: self.address.clone(),
            within: limits.wait,
            unconfirmed: self.book.unconfirmed(),
            alarm: alarm.map(str::to_owned),
        })
    }

    /// Takes in the confirms that are there.
    fn collect(&mut self) {
        self.collect_until(Instant::now(), |_| false);
    }

    /// Takes in confirms until `enough`, nothing is unconfirmed, the deadline,
    /// or the end of the connection.
    fn collect_until(&mut self, deadline: Instant, enough: impl Fn(&Book) -> bool) {
        while let Some(live) = &self.live
            && self.book.unconfirmed() > 0
            && !enough(&self.book)
        {
            match live.confirms.recv_deadline(deadline) {
                Ok(confirm) => {
                    if let Err(stray) = live.enter(confirm, &mut self.book, &self.likener) {
                        self.lose(Some(stray));
                    }
                }
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => self.lose(None),
            }
        }
    }

    /// Gives the connection up, and with it every message that is unconfirmed
    /// once all that had arrived is taken in.
    fn lose(&mut self, stray: Option<Stray>) {
        let Some(live) = self.live.take() else {
            return;
        };
        let stray = stray.or_else(|| live.drain(&mut self.book, &self.likener).err());
        self.book.lost();
        self.cause = match stray {
            Some(stray) => {
                live.link.abandon(live.channel);
                stray.to_string()
            }
            None => {
                let (cause, reply) = live.cause_of_death(self.limits.wait);
                self.reply = reply;
                cause
            }
        };
    }

    fn lost_error(&self) -> PublishError {
        PublishError::Lost {
            address: self.address.clone(),
            cause: self.cause.clone(),
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        if let Some(live) = self.live.take() {
            live.link.abandon(live.channel);
        }
    }
}

impl Live {
    fn start(mut link: Link, within: Duration) -> Result<Self, ConnectError> {
        let address = link.address().to_string();
        let timed_out = |address| ConnectError::TimedOut {
            address,
            stage: Stage::Channel,
            within,
        };
        let channel = link.open_channel(within).map_err(|error| match error {
            LinkError::TimedOut { address, .. } => timed_out(address),
            LinkError::Lost { address, cause } => ConnectError::Protocol {
                address,
                detail: cause.to_string(),
            },
        })?;
        let watch = link.watch(within);
        let listening = channel.enable_publisher_confirms().and_then(|()| {
            let confirms = channel.listen_for_publisher_confirms()?;
            Ok((confirms, channel.listen_for_returns()?))
        });
        drop(watch);
        match listening {
            Ok((confirms, returns)) => Ok(Self {
                link,
                channel,
                confirms,
                returns,
            }),
            Err(error) => {
                let fired = link.timed_out();
                link.abandon(channel);
                Err(if fired {
                    timed_out(address)
                } else {
                    ConnectError::from_login(address, &error)
                })
            }
        }
    }

    /// The broker sends a return before the confirm of the same message, and
    /// amiquip hands them over in that order, through two channels: so all
    /// returns that are there are entered first. The other way round, a
    /// message that was returned would be called confirmed.
    fn enter(&self, confirm: Confirm, book: &mut Book, likener: &Likener) -> Result<(), Stray> {
        self.enter_returns(book, likener)?;
        match confirm {
            Confirm::Ack(payload) => book.confirmed(payload.delivery_tag, payload.multiple, true),
            Confirm::Nack(payload) => book.confirmed(payload.delivery_tag, payload.multiple, false),
        }
    }

    fn enter_returns(&self, book: &mut Book, likener: &Likener) -> Result<(), Stray> {
        for returned in self.returns.try_iter() {
            let likeness = likener.of(
                &returned.exchange,
                &returned.routing_key,
                &returned.content,
                &returned.properties,
            );
            book.returned(likeness, returned.reply_code, &returned.reply_text)?;
        }
        Ok(())
    }

    /// Enters all that had arrived.
    fn drain(&self, book: &mut Book, likener: &Likener) -> Result<(), Stray> {
        loop {
            match self.confirms.try_recv() {
                Ok(confirm) => self.enter(confirm, book, likener)?,
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => {
                    return self.enter_returns(book, likener);
                }
            }
        }
    }

    /// A dead channel knows why the broker closed it, a dead connection the
    /// rest. With the reply code where a message is at fault.
    fn cause_of_death(self, waited: Duration) -> (String, Option<u16>) {
        let Self { link, channel, .. } = self;
        if link.timed_out() {
            link.abandon(channel);
            let cause = format!("the broker did not take a message within {waited:?}");
            return (cause, None);
        }
        let watch = link.watch(CAUSE_WITHIN);
        let said = channel.close();
        drop(watch);
        if let Err(
            error @ (amiquip::Error::ServerClosedChannel { .. }
            | amiquip::Error::ServerClosedConnection { .. }),
        ) = said
        {
            link.abandon(());
            let reply = match &error {
                amiquip::Error::ServerClosedChannel { code, .. } => Some(*code),
                amiquip::Error::ServerClosedConnection { code, .. } if NONSENSE.contains(code) => {
                    Some(*code)
                }
                _ => None,
            };
            return (error.to_string(), reply);
        }
        let cause = match link.close(CAUSE_WITHIN) {
            Ok(()) => "the channel was closed".to_owned(),
            Err(LinkError::Lost { cause, .. }) => cause.to_string(),
            Err(error) => error.to_string(),
        };
        (cause, None)
    }
}
