//! The wish to stop, shared by every thread: set once, never taken back.

use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};

/// Nothing is ever sent: the channel only closes.
enum Never {}

/// Dropping it makes every [`Stop`] of its pair stop.
pub struct Stopper(#[expect(dead_code, reason = "held for its Drop")] Sender<Never>);

/// The receiving side. A clone is the same wish.
#[derive(Clone)]
pub struct Stop(Receiver<Never>);

/// A wish that is not yet uttered.
#[must_use]
pub fn pair() -> (Stopper, Stop) {
    let (sender, receiver) = bounded(0);
    (Stopper(sender), Stop(receiver))
}

impl Stop {
    /// Whether it is time to stop.
    #[must_use]
    pub fn is_set(&self) -> bool {
        matches!(self.0.try_recv(), Err(TryRecvError::Disconnected))
    }

    /// Waits, at most for `duration`. True when it is time to stop.
    #[must_use]
    pub fn wait(&self, duration: Duration) -> bool {
        matches!(
            self.0.recv_timeout(duration),
            Err(RecvTimeoutError::Disconnected)
        )
    }

    /// Waits until it is time to stop.
    pub fn wait_forever(&self) {
        while self.0.recv().is_ok() {}
    }

    /// Runs `act` once it is time to stop, as one arm of a `select!`.
    #[must_use]
    pub fn as_receiver(&self) -> &Receiver<impl Sized + use<>> {
        &self.0
    }
}
