//! Whether a consumer takes messages: open, or closed because the world is
//! broken. The workers close and open it by what they see, and the broker
//! thread obeys.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

/// Shared by the workers of one consumer and its broker thread.
pub struct Gate {
    closed_at: Mutex<Option<Instant>>,
    /// Transactions that were committed with a message's effect.
    successes: AtomicU64,
    /// Failed attempts since the last of them.
    failures_in_row: AtomicU32,
    tell: Sender<()>,
    changes: Receiver<()>,
}

impl Default for Gate {
    /// Open, and nothing seen yet.
    fn default() -> Self {
        let (tell, changes) = bounded(1);
        Self {
            closed_at: Mutex::new(None),
            successes: AtomicU64::new(0),
            failures_in_row: AtomicU32::new(0),
            tell,
            changes,
        }
    }
}

impl Gate {
    /// Closes it. True for the one caller who did.
    pub fn close(&self) -> bool {
        let mut closed_at = self.lock();
        let turned = closed_at.is_none();
        if turned {
            *closed_at = Some(Instant::now());
            self.changed();
        }
        turned
    }

    /// Messages took effect: the world is well. Opens the gate, and returns
    /// for how long it was closed if it was.
    pub fn succeeded(&self) -> Option<Duration> {
        self.successes.fetch_add(1, Ordering::SeqCst);
        self.failures_in_row.store(0, Ordering::SeqCst);
        let closed_at = self.lock().take()?;
        self.changed();
        Some(closed_at.elapsed())
    }

    /// So many messages failed, each for itself. True when there have been
    /// `limit` or more without a success between them; never with a limit of 0.
    pub fn failed(&self, count: u32, limit: u32) -> bool {
        let before = self.failures_in_row.fetch_add(count, Ordering::SeqCst);
        limit > 0 && count > 0 && before.saturating_add(count) >= limit
    }

    /// What [`Gate::failed`] would say now, without a word to it.
    #[must_use]
    pub fn would_fail(&self, count: u32, limit: u32) -> bool {
        let before = self.failures_in_row.load(Ordering::SeqCst);
        limit > 0 && count > 0 && before.saturating_add(count) >= limit
    }

    /// How often [`Gate::succeeded`] was called: what has not grown says that
    /// nothing has succeeded since.
    #[must_use]
    pub fn successes(&self) -> u64 {
        self.successes.load(Ordering::SeqCst)
    }

    /// Whether the consumer takes only as much as it needs to find out that
    /// the world is mended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.lock().is_some()
    }

    /// For how long it has been closed; `None` while it is open.
    #[must_use]
    pub fn closed_for(&self) -> Option<Duration> {
        self.lock().map(|at| at.elapsed())
    }

    /// Something comes when it may have turned, for a `select!`.
    #[must_use]
    pub fn changes(&self) -> &Receiver<()> {
        &self.changes
    }

    /// One message is enough: who takes it looks at the gate itself.
    fn changed(&self) {
        self.tell.try_send(()).ok();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.closed_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_many_closes_it_and_the_change_is_told_once() {
        let gate = Gate::default();
        assert!(!gate.is_closed());
        assert!(gate.close());
        assert!(!gate.close());
        assert!(gate.is_closed());
        assert!(gate.changes().try_recv().is_ok());
        assert!(gate.changes().try_recv().is_err());
    }

    #[test]
    fn a_success_opens_it_and_says_for_how_long_it_was_closed() {
        let gate = Gate::default();
        assert_eq!(gate.succeeded(), None);
        gate.close();
        gate.changes().try_recv().ok();
        assert!(gate.succeeded().is_some());
        assert!(!gate.is_closed());
        assert!(gate.changes().try_recv().is_ok());
        assert_eq!(gate.successes(), 2);
    }

    #[test]
    fn only_failures_without_a_success_between_them_reach_the_limit() {
        let gate = Gate::default();
        assert!(!gate.failed(2, 3));
        gate.succeeded();
        assert!(!gate.failed(2, 3));
        assert!(gate.failed(1, 3));
        assert!(!gate.failed(0, 3));
        assert!(!gate.failed(1_000, 0), "no limit");
    }
}
