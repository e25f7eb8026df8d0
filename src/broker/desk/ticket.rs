//! Tickets: what acks a letter, or has it go back.

use std::sync::{Arc, Mutex, PoisonError};

/// A delivery without what it carried: enough to settle it.
type Shell = Box<amiquip::Delivery>;

/// What acks one letter, at the desk that handed it out. Dropping it leaves the
/// letter to go back to the queue; so drop it before the desk is given back.
#[must_use = "a letter whose ticket is dropped goes back to the queue"]
pub struct Ticket {
    pub(super) desk: u64,
    pub(super) chunk: usize,
    /// `None` once it is used.
    shell: Option<Shell>,
    left: Left,
}

/// Of the letters of a chunk whose tickets were dropped, the last one: a return
/// that names a letter which was acked ends the channel.
#[derive(Clone, Default)]
pub(super) struct Left(Arc<Mutex<Option<Shell>>>);

impl Left {
    /// Leaves the letter whose shell this is.
    pub(super) fn leave(&self, shell: Shell) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tag = |shell: &Shell| shell.delivery_tag();
        if last.as_ref().is_none_or(|last| tag(last) < tag(&shell)) {
            *last = Some(shell);
        }
    }

    pub(super) fn take(&self) -> Option<Shell> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.take()
    }
}

impl Ticket {
    pub(super) fn new(desk: u64, chunk: usize, shell: Shell, left: &Left) -> Self {
        Self {
            desk,
            chunk,
            shell: Some(shell),
            left: left.clone(),
        }
    }

    /// To ack it: then it is not left.
    pub(super) fn redeem(mut self) -> Option<Shell> {
        self.shell.take()
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(shell) = self.shell.take() {
            self.left.leave(shell);
        }
    }
}
