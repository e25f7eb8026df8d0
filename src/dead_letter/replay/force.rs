//! Forgetting that a message was applied, so that it is applied once more.
//!
//! In this order, which can be cut anywhere and begun anew: the claim in Redis
//! is seized, and a mark that says "done" goes with it; the ledger row goes, in
//! one transaction with the note of who had it forgotten; the claim is let go.
//! Cut after the first step, the claim ends with its lease and the row is still
//! there. Cut after the second, the message is one that was never applied. And
//! should a worker that was slow put a mark back: of a replayed message no mark
//! is believed, the ledger is asked.

use super::Cut;
use super::engine::Engine;
use crate::dead_letter::letter::Letter;
use crate::dead_letter::lookout::Judged;
use crate::dead_letter::plan::{Standing, Verdict};
use crate::failpoint::{self, Step};
use crate::ledger::replay;

impl Engine<'_> {
    /// Forgets the ledger row of `letter`'s id. False when a worker is at it,
    /// and the letter left.
    pub(super) fn forget(&mut self, letter: &Letter, judged: &Judged) -> Result<bool, Cut> {
        let Some(id) = &judged.id else {
            return Ok(true);
        };
        let unanswered = |error: anyhow::Error| Cut::Claims {
            id: id.to_string(),
            cause: error.to_string(),
        };
        let Some(seized) = self.lookout.seize(id).map_err(unanswered)? else {
            let at_work = Judged {
                verdict: Verdict {
                    standing: Standing::InProgress,
                    why: "a worker holds its id at the moment".to_owned(),
                },
                ..judged.clone()
            };
            self.leave(&at_work);
            return Ok(false);
        };
        failpoint::hit(Step::ForceSeized);
        let action = self.action;
        replay::forget(self.desk()?.session(), action, letter.key())?;
        failpoint::hit(Step::ForceForgotten);
        if let Some(seized) = &seized {
            self.lookout.let_go(seized).map_err(unanswered)?;
        }
        self.report.forgotten += 1;
        Ok(true)
    }
}
