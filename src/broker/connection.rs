//! One connection to the broker: opened and closed within a deadline, and
//! never dropped where its drop could hang.
//!
//! What runs on it (channels, consumers, topology) is the caller's business,
//! and so is trying again.

use std::thread;
use std::time::{Duration, Instant};

use amiquip::{
    AmqpValue, Auth, Channel, Connection, ConnectionBlockedNotification, ConnectionOptions,
    ConnectionTuning, IoStream,
};
use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::address::Address;
use super::cause::{Cause, Happening};
use super::error::{ConnectError, LinkError, Stage};
use super::guard::{FRAME_MAX_DEFAULT, FrameMax, Guard, RepairLog};
use super::transport::{self, Transport};
use super::watchdog::{Watch, Watchdog};
use crate::config::checked::{Broker, Secret};
use crate::stop::Stop;

/// amiquip's channel ids overflow above this.
const CHANNEL_MAX: u16 = 2047;

/// How long a connection that is dropped without [`Link::close`] has to say
/// goodbye, in the background.
const ABANDON_WITHIN: Duration = Duration::from_secs(5);

/// How long a thread whose socket was shut down has to notice. Measured: under
/// 3 ms.
const GRACE: Duration = Duration::from_secs(2);

/// An open connection.
///
/// Calls on it and its channels can hang for as long as the broker does: hold
/// [`Link::watch`] around them.
pub struct Link {
    /// `None` only while it is being closed.
    open: Option<Open>,
    repairs: RepairLog,
    frame_max: FrameMax,
    address: Address,
    server: usize,
    blocked: Option<String>,
}

struct Open {
    connection: Connection,
    watchdog: Watchdog,
    alarms: Receiver<ConnectionBlockedNotification>,
}

/// Opens a connection to the first of the broker's URLs that is of use, each
/// within `broker.connect_timeout`.
///
/// `purpose` is what RabbitMQ's management pages show beside the program's
/// name and version: `orders consumer`.
///
/// # Errors
///
/// [`ConnectError`], by the step that failed.
pub fn open(broker: &Broker, purpose: &str) -> Result<Link, ConnectError> {
    Dial::new(broker, purpose).open()
}

/// How a connection is opened.
#[derive(Clone, Copy)]
pub struct Dial<'a> {
    /// Whereto, and how long each URL may take.
    pub broker: &'a Broker,
    /// What for, as [`open`] has it.
    pub purpose: &'a str,
    /// The URL to begin with, counted from 0; beyond the last one it goes on
    /// with the first.
    pub first: usize,
    /// Once this is set, no further URL is tried, and calls on the connection
    /// end as soon as the broker goes silent.
    pub stop: Option<&'a Stop>,
}

impl<'a> Dial<'a> {
    /// From the first URL on, whatever the daemon does.
    #[must_use]
    pub fn new(broker: &'a Broker, purpose: &'a str) -> Self {
        Self {
            broker,
            purpose,
            first: 0,
            stop: None,
        }
    }

    /// Tries each URL once, in turn, until one is of use.
    ///
    /// # Errors
    ///
    /// The [`ConnectError`] of the only URL, or those of all.
    pub fn open(self) -> Result<Link, ConnectError> {
        let urls = &self.broker.urls;
        let mut failures = Vec::new();
        for step in 0..urls.len() {
            let server = (self.first % urls.len() + step) % urls.len();
            match self.open_one(server, &urls[server]) {
                Ok(link) => return Ok(link),
                Err(error) => failures.push(error),
            }
            if self.stop.is_some_and(Stop::is_set) {
                break;
            }
        }
        Err(match failures.pop() {
            Some(only) if failures.is_empty() => only,
            last => ConnectError::All(failures.into_iter().chain(last).collect()),
        })
    }

    fn open_one(self, server: usize, url: &Secret) -> Result<Link, ConnectError> {
        let broker = self.broker;
        let deadline = Instant::now() + broker.connect_timeout;
        let address = Address::parse(url)?;
        let (transport, socket) = Transport::connect(broker, &address, deadline)?;
        let local = |error| ConnectError::local(&address, &error);
        let clone = socket.try_clone().map_err(local)?;
        // Between the socket and amiquip: what a message can do to its parser,
        // it must not do to the process.
        let guard = Guard::new(transport, FRAME_MAX_DEFAULT, heartbeat(broker));
        let watchdog = Watchdog::start(clone, guard.pulse(), self.stop.cloned()).map_err(local)?;
        let watch = watchdog.watch(deadline.saturating_duration_since(Instant::now()));
        let repairs = guard.repair_log();
        let frame_max = guard.frame_max();
        let mut connection = log_in(broker, &address, self.purpose, guard, &watchdog, deadline)?;
        let alarms = connection
            .listen_for_connection_blocked()
            .map_err(|error| ConnectError::from_login(address.to_string(), &error))?;
        drop(watch);
        transport::login_done(&socket).map_err(local)?;
        Ok(Link {
            open: Some(Open {
                connection,
                watchdog,
                alarms,
            }),
            repairs,
            frame_max,
            address,
            server,
            blocked: None,
        })
    }
}

/// amiquip's handshake, on a thread of its own: it waits without limit.
fn log_in(
    broker: &Broker,
    address: &Address,
    purpose: &str,
    stream: impl IoStream,
    watchdog: &Watchdog,
    deadline: Instant,
) -> Result<Connection, ConnectError> {
    let options = options(broker, address, purpose);
    let (done, answer) = crossbeam_channel::bounded(1);
    thread::Builder::new()
        .name("ackonce-login".to_owned())
        .spawn(move || {
            let tuning = ConnectionTuning::default();
            let result = Connection::insecure_open_stream(stream, options, tuning);
            // Nobody listens any more when the socket was shut down under it;
            // then the connection ends here.
            done.send(result).ok();
        })
        .map_err(|error| ConnectError::local(address, &error))?;
    let timed_out = || ConnectError::TimedOut {
        address: address.to_string(),
        stage: Stage::Login,
        within: broker.connect_timeout,
    };
    match answer.recv_deadline(deadline + GRACE) {
        // The watchdog may have fired between the login and here.
        _ if watchdog.fired() => Err(timed_out()),
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => Err(ConnectError::from_login(address.to_string(), &error)),
        Err(RecvTimeoutError::Timeout) => Err(timed_out()),
        Err(RecvTimeoutError::Disconnected) => Err(ConnectError::Protocol {
            address: address.to_string(),
            detail: "the AMQP library gave up on what the server sent".to_owned(),
        }),
    }
}

fn options(broker: &Broker, address: &Address, purpose: &str) -> ConnectionOptions<Auth> {
    ConnectionOptions::default()
        .auth(Auth::Plain {
            username: address.user.clone(),
            password: address.password.expose().to_owned(),
        })
        .virtual_host(address.vhost.clone())
        .heartbeat(heartbeat(broker))
        .channel_max(CHANNEL_MAX)
        .information(Some(format!(
            "{} {} {purpose}",
            env!("CARGO_PKG_NAME"),
            env!("CARGO_PKG_VERSION"),
        )))
}

fn heartbeat(broker: &Broker) -> u16 {
    u16::try_from(broker.heartbeat.as_secs()).unwrap_or(u16::MAX)
}

impl Link {
    /// What the guard had to repair in deliveries of this connection.
    #[must_use]
    pub fn repairs(&self) -> RepairLog {
        self.repairs.clone()
    }

    /// The longest frame that both sides take, in bytes.
    #[must_use]
    pub fn frame_max(&self) -> u32 {
        self.frame_max.get()
    }

    /// The broker's version, as it says itself; empty when it does not.
    #[must_use]
    pub fn server_version(&self) -> &str {
        self.server_property("version")
    }

    /// The name of the cluster that the broker belongs to, as it says itself;
    /// empty when it does not.
    #[must_use]
    pub fn cluster_name(&self) -> &str {
        self.server_property("cluster_name")
    }

    fn server_property(&self, name: &str) -> &str {
        let value = self
            .open
            .as_ref()
            .and_then(|open| open.connection.server_properties().get(name));
        match value {
            Some(AmqpValue::LongString(value)) => value,
            _ => "",
        }
    }

    /// Which of the broker's URLs it leads to, counted from 0.
    #[must_use]
    pub fn server(&self) -> usize {
        self.server
    }

    /// The first number of that version, if it has one.
    #[must_use]
    pub fn server_major(&self) -> Option<u32> {
        self.server_version().split('.').next()?.parse().ok()
    }

    /// Where it leads; `Display` shows it without the password.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Opens a channel. Close the link before the channel is dropped, or drop
    /// it under a [`Link::watch`]: its drop waits for the broker.
    ///
    /// # Errors
    ///
    /// [`LinkError`] when the broker refuses, is gone, or does not answer
    /// `within`; in the last case the connection was ended.
    pub fn open_channel(&mut self, within: Duration) -> Result<Channel, LinkError> {
        let address = self.address.to_string();
        let Some(open) = &mut self.open else {
            return Err(gone(address));
        };
        let _watch = open.watchdog.watch(within);
        open.connection.open_channel(None).map_err(|error| {
            if open.watchdog.fired() {
                LinkError::TimedOut {
                    address,
                    what: "open a channel",
                    within,
                }
            } else {
                LinkError::Lost {
                    address,
                    cause: Cause::of(&error),
                }
            }
        })
    }

    /// Ends the connection if the returned watch still lives after `within`,
    /// so that every call that hangs on it returns an error. One at a time.
    #[must_use = "supervision ends when this is dropped"]
    pub fn watch(&self, within: Duration) -> Option<impl Drop + '_> {
        self.open
            .as_ref()
            .map(|open| -> Watch<'_> { open.watchdog.watch(within) })
    }

    /// True once a watch ended the connection.
    #[must_use]
    pub fn timed_out(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.watchdog.fired())
    }

    /// Why the broker does not take messages at the moment: its words about a
    /// memory or disk alarm. It says so only to connections that publish.
    pub fn blocked(&mut self) -> Option<&str> {
        if let Some(open) = &self.open {
            for alarm in open.alarms.try_iter() {
                self.blocked = match alarm {
                    ConnectionBlockedNotification::Blocked(reason) => Some(reason),
                    ConnectionBlockedNotification::Unblocked => None,
                };
            }
        }
        self.blocked.as_deref()
    }

    /// Says goodbye and waits for the answer, at most `within`.
    ///
    /// # Errors
    ///
    /// [`LinkError::Lost`] with the cause of death when the connection was
    /// already gone, [`LinkError::TimedOut`] when the broker did not answer.
    pub fn close(self, within: Duration) -> Result<(), LinkError> {
        self.close_with((), within)
    }

    /// Like [`Link::close`]; `held` (channels) is dropped after the
    /// connection, when its drop cannot hang any more.
    ///
    /// # Errors
    ///
    /// As [`Link::close`].
    pub fn close_with<H: Send + 'static>(
        mut self,
        held: H,
        within: Duration,
    ) -> Result<(), LinkError> {
        let address = self.address.to_string();
        let Some(open) = self.open.take() else {
            return Err(gone(address));
        };
        let timed_out = |address| LinkError::TimedOut {
            address,
            what: "close the connection",
            within,
        };
        let (done, answer) = crossbeam_channel::bounded(1);
        end_elsewhere(open, held, within, move |result, fired| {
            done.send((result, fired)).ok();
        });
        match answer.recv_timeout(within + GRACE) {
            Ok((_, true)) | Err(RecvTimeoutError::Timeout) => Err(timed_out(address)),
            Ok((Ok(()), false)) => Ok(()),
            Ok((Err(error), false)) => Err(LinkError::Lost {
                address,
                cause: Cause::of(&error),
            }),
            Err(RecvTimeoutError::Disconnected) => Err(LinkError::Lost {
                address,
                cause: Cause::new(Happening::Other, "the AMQP library gave up"),
            }),
        }
    }

    /// Like [`Link::close_with`], in the background and without a result.
    pub fn abandon<H: Send + 'static>(mut self, held: H) {
        if let Some(open) = self.open.take() {
            end_elsewhere(open, held, ABANDON_WITHIN, |_, _| {});
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(open) = self.open.take() {
            end_elsewhere(open, (), ABANDON_WITHIN, |_, _| {});
        }
    }
}

/// Closes on a thread of its own. The watchdog is armed first and lives to the
/// end, so that even when no thread can be had, and everything is dropped right
/// here, it takes no longer than `within`.
fn end_elsewhere<H: Send + 'static>(
    open: Open,
    held: H,
    within: Duration,
    done: impl FnOnce(amiquip::Result<()>, bool) + Send + 'static,
) {
    open.watchdog.arm(within);
    let spawned = thread::Builder::new()
        .name("ackonce-close".to_owned())
        .spawn(move || {
            let Open {
                connection,
                watchdog,
                alarms,
            } = open;
            let result = connection.close();
            let fired = watchdog.fired();
            drop((held, alarms));
            drop(watchdog);
            done(result, fired);
        });
    if let Err(error) = spawned {
        log::warn!("failed to start a thread to close a connection: {error}");
    }
}

fn gone(address: String) -> LinkError {
    LinkError::Lost {
        address,
        cause: Cause::new(Happening::Other, "it is closed"),
    }
}
