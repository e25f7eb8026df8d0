//! A connection that is ready to be consumed from: opened, the topology in
//! order, with a channel to work on.

use std::time::Duration;

use amiquip::Channel;
use thiserror::Error;

use super::cause::{Cause, Happening};
use super::connection::{Dial, Link};
use super::consumer::{self, End, Feed};
use super::error::{ConnectError, LinkError};
use super::topology::{self, TopologyError};
use crate::config::checked;

/// Longest wait for the broker's answer to one call before consuming.
const CALL_WITHIN: Duration = Duration::from_secs(10);

/// Longest wait for the broker's answer when the connection is closed.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// What one consumer works on. The link stands first: it has to be gone before
/// the channel is dropped, whose drop waits for the broker.
pub struct Session {
    link: Link,
    channel: Channel,
    /// Retry queues of which it is not known that they lead back.
    unproved: Vec<String>,
}

/// Why there is no session.
#[derive(Debug, Error)]
pub enum OpenError {
    /// No URL of the broker led to a connection.
    #[error("{0}")]
    Connect(ConnectError),
    /// What the consumer needs is not there.
    #[error("{error}")]
    Topology {
        /// Why.
        error: TopologyError,
        /// The URL it was seen through, counted from 0.
        server: usize,
    },
    /// The connection was lost before anything was consumed.
    #[error("{error}")]
    Link {
        /// Why.
        error: LinkError,
        /// The URL it led to, counted from 0.
        server: usize,
    },
}

impl Session {
    /// Connects and sees to the topology. `proves` has a probe sent where
    /// nothing else can show that dead letters have somewhere to go.
    ///
    /// # Errors
    ///
    /// [`OpenError`], by the step that failed.
    pub fn open(
        dial: Dial<'_>,
        consumer: &checked::Consumer,
        proves: bool,
    ) -> Result<Self, OpenError> {
        let mut link = dial.open().map_err(OpenError::Connect)?;
        let server = link.server();
        let prepared = topology::prepare(&mut link, dial.broker, consumer, proves, CALL_WITHIN);
        let unproved = match prepared {
            Ok(unproved) => unproved,
            Err(error) => {
                link.abandon(());
                return Err(OpenError::Topology { error, server });
            }
        };
        match link.open_channel(CALL_WITHIN) {
            Ok(channel) => Ok(Self {
                link,
                channel,
                unproved,
            }),
            Err(error) => Err(OpenError::Link { error, server }),
        }
    }

    /// Which of the broker's URLs it leads to, counted from 0.
    #[must_use]
    pub fn server(&self) -> usize {
        self.link.server()
    }

    /// Consumes until something ends it, and closes the connection. Also says
    /// how much the broker was told.
    #[must_use]
    pub fn consume(self, feed: Feed<'_>) -> (End, u64) {
        let Self {
            link,
            channel,
            unproved,
        } = self;
        let (end, settled) = consumer::run(&link, &channel, feed, unproved);
        let closed = link.close_with(channel, CLOSE_WITHIN);
        let end = match (end, closed) {
            // Why a connection died, only its close can tell.
            (End::Lost(cause), Err(error)) if !cause.is_telling() => End::Lost(match error {
                LinkError::Lost { cause, .. } => cause,
                LinkError::TimedOut { .. } => Cause::new(Happening::Silent, error.to_string()),
            }),
            (end, _) => end,
        };
        (end, settled)
    }
}
