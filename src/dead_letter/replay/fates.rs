//! The canary's part of a replay: what was replayed is watched, and the next
//! step is taken only when enough of it was applied.

use std::time::{Duration, Instant};

use super::engine::Engine;
use super::{Cut, Event};
use crate::dead_letter::canary::{self, Canary, Fate, Outcome, Trouble};
use crate::dead_letter::lookout::Judged;
use crate::ledger::replay::{self, Asked, Since};
use crate::message::{Fingerprint, MessageId};

/// How often ledger and journal are asked.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// Messages that are asked for at once.
const ASKED_AT_ONCE: usize = 500;

/// Errors that are named when a canary dies.
const TROUBLES_MAX: usize = 3;

/// A letter that was replayed, and what became of it.
struct Watched {
    id: MessageId,
    fingerprint: Fingerprint,
    fate: Fate,
}

/// What was replayed in the steps so far.
pub(super) struct Fates {
    canary: Option<Canary>,
    step: u32,
    watched: Vec<Watched>,
    /// Where the journal ended when the replay began.
    journal: i64,
    weighed: Option<Outcome>,
}

impl Fates {
    pub(super) fn new(canary: Option<Canary>) -> Self {
        Self {
            canary,
            step: 0,
            watched: Vec::new(),
            journal: 0,
            weighed: None,
        }
    }

    fn end_of_step(&self) -> Option<u64> {
        self.canary?.ends_at(self.step)
    }

    /// How many letters the step at hand has room for, when so many are
    /// published.
    pub(super) fn room(&self, published: u64) -> u64 {
        let end = self.end_of_step();
        end.map_or(u64::MAX, |end| end.saturating_sub(published).max(1))
    }

    /// Whether the step at hand is full.
    pub(super) fn is_due(&self, published: u64) -> bool {
        self.end_of_step().is_some_and(|end| published >= end)
    }

    pub(super) fn watch(&mut self, judged: &Judged) {
        if self.end_of_step().is_none() {
            return;
        }
        if let Some(id) = &judged.id {
            self.watched.push(Watched {
                id: id.clone(),
                fingerprint: judged.fingerprint,
                fate: Fate::Unknown,
            });
        }
    }

    /// What the last weighing found.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        self.weighed.clone()
    }

    fn count(&self) -> Outcome {
        let mut outcome = Outcome::default();
        outcome.add(self.watched.iter().map(|watched| &watched.fate));
        outcome
    }
}

impl Engine<'_> {
    pub(super) fn begin_watching(&mut self) -> Result<(), Cut> {
        if self.fates.canary.is_some() {
            let journal = replay::end_of_journal(self.desk()?.session())?;
            self.fates.journal = journal;
        }
        Ok(())
    }

    /// Ends a step that is full: waits for the fate of what was replayed, and
    /// says whether to go on.
    pub(super) fn weigh(&mut self) -> Result<(), Cut> {
        self.drain()?;
        // Some may not have found their way: then others take their place.
        if self.fates.is_due(self.report.replayed) {
            self.weigh_all()?;
            self.fates.step += 1;
        }
        Ok(())
    }

    /// The queue has no more: what the last step replayed is weighed as well.
    pub(super) fn weigh_the_rest(&mut self) -> Result<(), Cut> {
        let weighed = self.fates.weighed.as_ref().map_or(0, |done| done.replayed);
        match self.fates.watched.len() as u64 > weighed {
            true => self.weigh_all(),
            false => Ok(()),
        }
    }

    fn weigh_all(&mut self) -> Result<(), Cut> {
        let Some(canary) = self.fates.canary else {
            return Ok(());
        };
        let deadline = Instant::now() + canary.wait;
        let outcome = loop {
            self.look_at_fates()?;
            let outcome = self.fates.count();
            let final_all = outcome.waiting + outcome.unknown == 0;
            let hopeless = !canary.tolerates(outcome.dead_again, outcome.replayed);
            let over = Instant::now() >= deadline;
            if final_all || hopeless || over {
                break outcome;
            }
            if self.stop.wait(ASK_EVERY) {
                return Err(Cut::Stopped);
            }
        };
        (self.tell)(Event::Step(&outcome));
        self.fates.weighed = Some(outcome.clone());
        if canary.tolerates(outcome.not_applied(), outcome.replayed) {
            return Ok(());
        }
        let fates = self.fates.watched.iter().map(|watched| &watched.fate);
        Err(Cut::Canary {
            outcome,
            abort_at: canary.abort_at,
            troubles: canary::commonest(fates, TROUBLES_MAX),
        })
    }

    fn look_at_fates(&mut self) -> Result<(), Cut> {
        let journal = self.fates.journal;
        let open = |watched: &&mut Watched| !watched.fate.is_final();
        let mut watched = std::mem::take(&mut self.fates.watched);
        let mut undecided: Vec<&mut Watched> = watched.iter_mut().filter(open).collect();
        let mut result = Ok(());
        for some in undecided.chunks_mut(ASKED_AT_ONCE) {
            let asked: Vec<Asked<'_>> = some
                .iter()
                .map(|watched| Asked {
                    id: &watched.id,
                    fingerprint: watched.fingerprint,
                })
                .collect();
            let consumer_id = self.action.consumer_id();
            let found = self.desk().and_then(|desk| {
                let found = replay::since(desk.session(), consumer_id, journal, &asked);
                found.map_err(Cut::from)
            });
            match found {
                Ok(found) => {
                    for (watched, since) in some.iter_mut().zip(found) {
                        watched.fate = fate(since, watched.fingerprint);
                    }
                }
                Err(cut) => {
                    result = Err(cut);
                    break;
                }
            }
        }
        self.fates.watched = watched;
        result
    }
}

fn fate(since: Since, fingerprint: Fingerprint) -> Fate {
    if since.applied == Some(fingerprint) {
        return Fate::Applied;
    }
    let Some(failure) = since.failure else {
        return Fate::Unknown;
    };
    let dead = failure.reason.is_some();
    let trouble = Trouble {
        reason: failure.reason,
        code: failure.code,
        error: failure.error.lines().next().unwrap_or_default().to_owned(),
    };
    match dead {
        true => Fate::DeadAgain(trouble),
        false => Fate::Waiting(trouble),
    }
}
