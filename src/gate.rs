//! Whether a consumer takes messages: open, or closed because the world is
//! broken. The workers close and open it, and the broker thread obeys.

use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};

/// Shared by the workers of one consumer and its broker thread.
pub struct Gate {
    closed: AtomicBool,
    tell: Sender<()>,
    changes: Receiver<()>,
}

impl Default for Gate {
    /// Open.
    fn default() -> Self {
        let (tell, changes) = bounded(1);
        Self {
            closed: AtomicBool::new(false),
            tell,
            changes,
        }
    }
}

impl Gate {
    /// Closes it. True for the one caller who did.
    pub fn close(&self) -> bool {
        self.turn(true)
    }

    /// Opens it. True for the one caller who did.
    pub fn open(&self) -> bool {
        self.turn(false)
    }

    fn turn(&self, closed: bool) -> bool {
        let turned = self.closed.swap(closed, Ordering::SeqCst) != closed;
        if turned {
            // One message is enough: who takes it looks at the gate itself.
            self.tell.try_send(()).ok();
        }
        turned
    }

    /// Whether the consumer takes only as much as it needs to find out that
    /// the world is mended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Something comes when it may have turned, for a `select!`.
    #[must_use]
    pub fn changes(&self) -> &Receiver<()> {
        &self.changes
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
        assert!(gate.open());
        assert!(!gate.open());
        assert!(gate.changes().try_recv().is_ok());
    }
}
