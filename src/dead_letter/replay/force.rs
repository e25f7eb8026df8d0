//! Forgetting that a message was applied, so that it is applied once more.
//!
//! In this order, which can be cut anywhere and begun anew: the claim in Redis
//! is seized, and a mark that says "done" goes with it; the ledger row goes, in
//! one transaction with the note of who had it forgotten; the claim is let go.
//! Cut after the first step, the claim ends with its lease and the row is still
//! there. Cut after the second, the message is one that was never applied. Cut
//! later, it may be applied by the time the command is run again: what was
//! forgotten since the letter died, and applied since, is not forgotten once
//! more. And should a worker that was slow put a mark back: of a replayed
//! message no mark is believed, the ledger is asked.

use super::Cut;
use super::engine::Engine;
use crate::dead_letter::letter::Letter;
use crate::dead_letter::lookout::Judged;
use crate::dead_letter::plan::{Standing, Verdict};
use crate::failpoint::{self, Step};
use crate::ledger::replay::{self, Forgotten};

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forgot {
    /// To be published.
    Yes,
    /// A worker is at it: left.
    AtWork,
    /// Forced before, and applied since: to be acknowledged.
    AppliedSince,
}

impl Engine<'_> {
    /// Forgets the ledger row of `letter`'s id.
    pub(super) fn forget(&mut self, letter: &Letter, judged: &Judged) -> Result<Forgot, Cut> {
        let Some(id) = &judged.id else {
            return Ok(Forgot::AtWork);
        };
        let unanswered = |error: anyhow::Error| Cut::Claims {
            id: id.to_string(),
            cause: error.to_string(),
        };
        let Some(seized) = self.lookout.seize(id).map_err(unanswered)? else {
            self.leave_at_work(judged);
            return Ok(Forgot::AtWork);
        };
        failpoint::hit(Step::ForceSeized);
        let action = self.action;
        let session = self.desk()?.session();
        let forgotten = replay::forget(session, action, letter.key(), letter.died_at())?;
        failpoint::hit(Step::ForceForgotten);
        if let Some(seized) = &seized {
            self.lookout.let_go(seized).map_err(unanswered)?;
        }
        Ok(match forgotten {
            Forgotten::Yes => {
                self.report.forgotten += 1;
                Forgot::Yes
            }
            Forgotten::AtWork => {
                self.leave_at_work(judged);
                Forgot::AtWork
            }
            Forgotten::AppliedSince => Forgot::AppliedSince,
        })
    }

    fn leave_at_work(&mut self, judged: &Judged) {
        let verdict = Verdict {
            standing: Standing::InProgress,
            why: "a worker is at it at the moment".to_owned(),
        };
        let judged = Judged {
            verdict,
            ..judged.clone()
        };
        self.leave(&judged);
    }
}
