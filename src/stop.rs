//! The wish to stop, shared by every thread: set once, never taken back.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};

/// Nothing is ever sent: the channel only closes.
enum Never {}

/// Dropping it makes every [`Stop`] of its pair stop.
pub struct Stopper {
    since: Arc<OnceLock<Instant>>,
    #[expect(dead_code, reason = "held for its Drop, which follows ours")]
    wish: Sender<Never>,
}

impl Drop for Stopper {
    fn drop(&mut self) {
        self.since.get_or_init(Instant::now);
    }
}

/// The receiving side. A clone is the same wish.
#[derive(Clone)]
pub struct Stop {
    since: Arc<OnceLock<Instant>>,
    wish: Receiver<Never>,
}

/// A wish that is not yet uttered.
#[must_use]
pub fn pair() -> (Stopper, Stop) {
    let (sender, receiver) = bounded(0);
    let since = Arc::new(OnceLock::new());
    let stopper = Stopper {
        since: Arc::clone(&since),
        wish: sender,
    };
    let wish = receiver;
    (stopper, Stop { since, wish })
}

impl Stop {
    /// Whether it is time to stop.
    #[must_use]
    pub fn is_set(&self) -> bool {
        matches!(self.wish.try_recv(), Err(TryRecvError::Disconnected))
    }

    /// What is left of the time `allowed` from the moment of the wish: all of
    /// it before.
    #[must_use]
    pub fn left_of(&self, allowed: Duration) -> Duration {
        let passed = self.since.get().map(Instant::elapsed).unwrap_or_default();
        allowed.saturating_sub(passed)
    }

    /// Waits, at most for `duration`. True when it is time to stop.
    #[must_use]
    pub fn wait(&self, duration: Duration) -> bool {
        matches!(
            self.wish.recv_timeout(duration),
            Err(RecvTimeoutError::Disconnected)
        )
    }

    /// Runs `act` once it is time to stop, as one arm of a `select!`.
    #[must_use]
    pub fn as_receiver(&self) -> &Receiver<impl Sized + use<>> {
        &self.wish
    }
}
