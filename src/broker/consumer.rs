//! Consuming one queue over one connection: deliveries go to the workers,
//! settlements come back, and only this loop tells the broker.
//!
//! It never waits for a worker. What it cannot hand over at once it keeps,
//! and takes no more from the broker until it could; the prefetch bounds all
//! of it. Reconnecting is the caller's business.

use std::time::{Duration, Instant};

use amiquip::{Channel, ConsumerMessage, ConsumerOptions};
use crossbeam_channel::{Receiver, Sender, TrySendError, never, select};

use super::connection::Link;
use super::convert;
use super::guard::RepairLog;
use super::topology::{self, TopologyError};
use super::window::{Order, Window};
use crate::config::checked;
use crate::failpoint::{self, Step};
use crate::gate::Gate;
use crate::lifecycle;
use crate::message::{Delivery, Epoch, Settled, Settlement, Ticket};
use crate::stop::{Stop, Stopper};

/// Longest wait for the broker's answer to one call.
const CALL_WITHIN: Duration = Duration::from_secs(10);

/// How long an ack out of turn is held back in the hope that the one before
/// it comes, so that one frame says both.
const HOLD_ACKS: Duration = Duration::from_millis(5);

/// Deliveries taken in one go before settlements are looked at.
const BURST: usize = 256;

/// A settled delivery of the current connection, without its content.
type Shell = Box<amiquip::Delivery>;

/// The channels between this loop and the workers.
pub struct Feed<'a> {
    /// The consumer's configuration.
    pub consumer: &'a checked::Consumer,
    /// Which connection this is.
    pub epoch: Epoch,
    /// To the workers; closed when the daemon stops.
    pub inbox: &'a mut Option<Sender<Delivery>>,
    /// Dropped when the daemon stops: the workers begin nothing more.
    pub stopper: &'a mut Option<Stopper>,
    /// What no worker has taken yet.
    pub unstarted: &'a Receiver<Delivery>,
    /// From the workers; disconnected when all of them have ended.
    pub outbox: &'a Receiver<Settled>,
    /// A worker panicked.
    pub panicked: &'a Receiver<()>,
    /// Closed while the workers see the world broken.
    pub gate: &'a Gate,
    /// Time to stop.
    pub stop: &'a Stop,
    /// How long a stop waits for the workers.
    pub shutdown_timeout: Duration,
}

/// Why consuming ended.
#[derive(Debug)]
pub enum End {
    /// Stopped: everything in flight was settled, or time ran out with so many
    /// deliveries still in the hands of workers.
    Stopped {
        /// Deliveries that go back to the queue with the connection.
        unfinished: usize,
    },
    /// The connection, channel or consumer is gone.
    Lost(String),
    /// A worker panicked: its deliveries go back with the connection.
    Panicked,
}

/// Declares the topology, consumes until something ends it, and leaves the
/// link to be closed.
///
/// # Errors
///
/// [`TopologyError`] when the queue or what belongs to it is not as configured.
pub fn run(link: &Link, channel: &Channel, mut feed: Feed<'_>) -> Result<End, TopologyError> {
    topology::declare(link, channel, &feed.consumer.topology, CALL_WITHIN)?;
    let lost =
        |what: &str, error: amiquip::Error| Ok(End::Lost(format!("failed to {what}: {error}")));
    let watch = link.watch(CALL_WITHIN);
    // The prefetch comes first: without it the broker would send the whole queue.
    if let Err(error) = channel.qos(0, feed.consumer.prefetch, false) {
        return lost("set the prefetch", error);
    }
    let queue = &feed.consumer.topology.queue;
    let consuming = channel.basic_consume(queue, ConsumerOptions::default());
    drop(watch);
    let consumer = match consuming {
        Ok(consumer) => consumer,
        Err(error) => return lost(&format!("consume from queue {queue}"), error),
    };
    log::info!(
        consumer = feed.consumer.name.as_str(), queue = queue.as_str(),
        workers = feed.consumer.workers, prefetch = feed.consumer.prefetch,
        epoch = feed.epoch.0, broker:% = link.address();
        "consuming"
    );
    let mut flow = Flow {
        link,
        channel,
        epoch: feed.epoch,
        repairs: link.repairs(),
        window: Window::default(),
        kept: None,
        acks_due: None,
    };
    let end = flow.consume(consumer.receiver(), &feed);
    let watch = link.watch(CALL_WITHIN);
    if !matches!(end, End::Stopped { .. }) {
        // Its drop asks the broker to cancel it.
        drop(consumer);
        return Ok(end);
    }
    // Dropping a consumer that still gets deliveries can kill the connection:
    // it is cancelled and drained first.
    let cancelled = consumer.cancel();
    drop(watch);
    if let Err(error) = cancelled {
        return lost("cancel the consumer", error);
    }
    Ok(flow.drain(consumer.receiver(), &mut feed))
}

/// The deliveries of one connection.
struct Flow<'a> {
    link: &'a Link,
    channel: &'a Channel,
    epoch: Epoch,
    repairs: RepairLog,
    window: Window<Shell>,
    /// A delivery that found the inbox full.
    kept: Option<Delivery>,
    /// When acks that are held back must go.
    acks_due: Option<Instant>,
}

impl Flow<'_> {
    fn consume(&mut self, deliveries: &Receiver<ConsumerMessage>, feed: &Feed<'_>) -> End {
        let nothing = never();
        loop {
            let from = match self.kept {
                None => deliveries,
                Some(_) => &nothing,
            };
            let wait = self.next_wake();
            select! {
                recv(from) -> message => {
                    if let Err(end) = self.take_burst(message.ok(), deliveries, feed) {
                        return end;
                    }
                }
                recv(feed.outbox) -> settled => match settled {
                    Ok(settled) => {
                        if let Err(end) = self.settle_burst(settled, feed.outbox) {
                            return end;
                        }
                    }
                    Err(_) => return End::Panicked,
                },
                recv(feed.panicked) -> _ => return End::Panicked,
                recv(feed.stop.as_receiver()) -> _ => return End::Stopped { unfinished: 0 },
                default(wait) => {}
            }
            if let Err(end) = self.offer_kept(feed).and_then(|()| self.send_acks()) {
                return end;
            }
        }
    }

    fn next_wake(&self) -> Duration {
        let acks = self
            .acks_due
            .map(|due| due.saturating_duration_since(Instant::now()));
        match (acks, &self.kept) {
            (Some(acks), _) => acks,
            (None, Some(_)) => HOLD_ACKS,
            (None, None) => Duration::from_secs(3600),
        }
    }

    fn take_burst(
        &mut self,
        first: Option<ConsumerMessage>,
        more: &Receiver<ConsumerMessage>,
        feed: &Feed<'_>,
    ) -> Result<(), End> {
        let mut next = first;
        if next.is_none() {
            return Err(End::Lost("the connection was lost".to_owned()));
        }
        for _ in 0..BURST {
            let Some(message) = next.take() else { break };
            let delivery = self.receive(message)?;
            self.offer(delivery, feed);
            if self.kept.is_some() {
                break;
            }
            next = more.try_recv().ok();
        }
        // The last one was taken out of the channel: it must not be dropped.
        if let Some(message) = next {
            let delivery = self.receive(message)?;
            self.offer(delivery, feed);
        }
        Ok(())
    }

    fn receive(&mut self, message: ConsumerMessage) -> Result<Delivery, End> {
        let lost = |cause: String| Err(End::Lost(cause));
        match message {
            ConsumerMessage::Delivery(mut delivery) => {
                let tag = delivery.delivery_tag();
                let repairs = self.repairs.take(self.channel.channel_id(), tag);
                let message = convert::hollow_out(&mut delivery, repairs);
                self.window.put(tag, Box::new(delivery));
                let epoch = self.epoch;
                Ok(Delivery {
                    message,
                    ticket: Ticket { epoch, tag },
                })
            }
            ConsumerMessage::ServerCancelled => {
                lost("the broker cancelled the consumer: was its queue deleted?".to_owned())
            }
            ConsumerMessage::ServerClosedChannel(error)
            | ConsumerMessage::ServerClosedConnection(error) => lost(error.to_string()),
            ConsumerMessage::ClientCancelled
            | ConsumerMessage::ClientClosedChannel
            | ConsumerMessage::ClientClosedConnection => {
                lost("the consumer was closed on this side".to_owned())
            }
        }
    }

    fn offer(&mut self, delivery: Delivery, feed: &Feed<'_>) {
        let Some(inbox) = feed.inbox.as_ref() else {
            return;
        };
        match inbox.try_send(delivery) {
            Ok(()) => {}
            Err(TrySendError::Full(delivery) | TrySendError::Disconnected(delivery)) => {
                self.kept = Some(delivery);
            }
        }
    }

    fn offer_kept(&mut self, feed: &Feed<'_>) -> Result<(), End> {
        if let Some(delivery) = self.kept.take() {
            self.offer(delivery, feed);
        }
        Ok(())
    }

    fn settle_burst(&mut self, first: Settled, more: &Receiver<Settled>) -> Result<(), End> {
        self.settle(first)?;
        for settled in more.try_iter() {
            self.settle(settled)?;
        }
        Ok(())
    }

    fn settle(&mut self, settled: Settled) -> Result<(), End> {
        if !lifecycle::admits(self.epoch, &settled.ticket) {
            return Ok(());
        }
        match self.window.settle(settled.ticket.tag, settled.settlement) {
            Some(order) => self.send(order),
            None => Ok(()),
        }
    }

    /// Acks in turn go at once; those out of turn after a moment, or when they
    /// are so many that the prefetch would run dry.
    fn send_acks(&mut self) -> Result<(), End> {
        if self.window.waiting() == 0 {
            self.acks_due = None;
            return Ok(());
        }
        if let Some(order) = self.window.in_turn() {
            self.send(order)?;
        }
        let out_of_turn = self.window.waiting();
        let now = Instant::now();
        if out_of_turn == 0 {
            self.acks_due = None;
        } else if out_of_turn * 2 > self.window.outstanding()
            || self.acks_due.is_some_and(|due| due <= now)
        {
            self.send_all_acks()?;
        } else {
            self.acks_due.get_or_insert(now + HOLD_ACKS);
        }
        failpoint::hit(Step::Settled);
        Ok(())
    }

    fn send_all_acks(&mut self) -> Result<(), End> {
        self.acks_due = None;
        for order in self.window.all() {
            self.send(order)?;
        }
        Ok(())
    }

    fn send(&self, order: Order<Shell>) -> Result<(), End> {
        let _watch = self.link.watch(CALL_WITHIN);
        match order {
            Order::AckUpTo(shell) => shell.ack_multiple(self.channel),
            Order::Ack(shell) => shell.ack(self.channel),
            Order::Reject(shell) => shell.reject(self.channel, false),
            Order::Requeue(shell) => shell.nack(self.channel, true),
        }
        .map_err(|error| End::Lost(format!("failed to settle a delivery: {error}")))
    }

    /// The stop: gives back what nobody has begun, and waits for the rest.
    fn drain(&mut self, deliveries: &Receiver<ConsumerMessage>, feed: &mut Feed<'_>) -> End {
        let deadline = Instant::now() + feed.stop.left_of(feed.shutdown_timeout);
        // The workers end when their inbox is closed and empty, and with the
        // last of them the outbox.
        *feed.stopper = None;
        *feed.inbox = None;
        match self.give_back_unstarted(deliveries, feed, deadline) {
            Ok(()) => {}
            Err(end) => return end,
        }
        while let Ok(settled) = feed.outbox.recv_deadline(deadline) {
            let told = self
                .settle_burst(settled, feed.outbox)
                .and_then(|()| self.send_acks());
            if let Err(end) = told {
                return end;
            }
        }
        match self.send_all_acks() {
            Ok(()) => End::Stopped {
                unfinished: self.window.outstanding(),
            },
            Err(end) => end,
        }
    }

    fn give_back_unstarted(
        &mut self,
        deliveries: &Receiver<ConsumerMessage>,
        feed: &Feed<'_>,
        deadline: Instant,
    ) -> Result<(), End> {
        let mut unstarted: Vec<Delivery> = self.kept.take().into_iter().collect();
        unstarted.extend(feed.unstarted.try_iter());
        loop {
            match deliveries.recv_deadline(deadline) {
                Ok(ConsumerMessage::ClientCancelled) => break,
                Ok(message) => unstarted.push(self.receive(message)?),
                Err(_) => return Err(End::Lost("the connection was lost".to_owned())),
            }
        }
        for delivery in unstarted {
            self.settle(Settled {
                ticket: delivery.ticket,
                settlement: Settlement::Requeue,
                parcel: None,
            })?;
        }
        Ok(())
    }
}
