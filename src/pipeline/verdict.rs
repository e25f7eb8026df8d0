//! The end of the pipeline: what a batch has decided, told to Redis, to the
//! failure journal and to the broker, in that order.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::Worker;
use super::item::Item;
use crate::claim::Token;
use crate::config::checked;
use crate::failpoint::{self, Mutant, Step};
use crate::failure::Failure;
use crate::ledger::{CommitError, JournalEntry, Owner};
use crate::lifecycle::{Action, Body, Event, State};
use crate::message::{
    DeadReason, Fingerprint, MessageId, Parcel, Purpose, Settled, Settlement, Ticket,
};
use crate::observe::metrics::{FoundIn, LedgerStep, Settling};
use crate::postgres::Error;

/// What is decided and not yet told.
#[derive(Default)]
pub(super) struct Verdict {
    /// Each with the age of its ledger row.
    done: Vec<(MessageId, Fingerprint, Duration)>,
    released: Vec<(Token, MessageId)>,
    /// Claims in the ledger that nobody needs any more.
    surrendered: Vec<(MessageId, Owner)>,
    settled: Vec<Settled>,
    /// Ids that nobody works on any more, with what became of the last one.
    left: Vec<(MessageId, Fingerprint, Settlement)>,
    /// To be written into the failure journal.
    failed: Vec<Item>,
    /// Ids whose mark has to go.
    unmarked: Vec<MessageId>,
}

impl Verdict {
    fn is_empty(&self) -> bool {
        self.done.is_empty()
            && self.released.is_empty()
            && self.surrendered.is_empty()
            && self.settled.is_empty()
            && self.left.is_empty()
            && self.failed.is_empty()
            && self.unmarked.is_empty()
    }
}

impl Worker {
    /// Moves an item on and keeps what that decided.
    pub(super) fn advance(&mut self, mut item: Item, event: Event) {
        self.count(&mut item, event);
        for action in item.on(event) {
            match action {
                Action::MarkDone => self
                    .verdict
                    .done
                    .extend(item.id.clone().map(|id| (id, item.fingerprint, item.age()))),
                Action::Release => {
                    if let (Some(token), Some(id)) = (&item.token, &item.id) {
                        self.verdict.released.push((token.clone(), id.clone()));
                    }
                }
                Action::Surrender => {
                    if let (Some(owner), Some(id)) = (item.fence, &item.id) {
                        self.verdict.surrendered.push((id.clone(), owner));
                    }
                }
                // Done by the step that reads the new state, for a whole batch.
                Action::Claim
                | Action::Park
                | Action::Record
                | Action::Apply
                | Action::Commit
                | Action::Call
                | Action::Complete
                | Action::Rollback
                | Action::Journal(_)
                | Action::JournalAttempt
                | Action::Settle(_) => {}
            }
        }
        match item.state {
            State::Settled(settlement) => self.settle(item, settlement),
            State::Journaling(_) | State::Deferring => self.verdict.failed.push(item),
            State::Parked => {
                // The ledger may know already; if not, there is time.
                let known_soon = std::mem::replace(&mut item.was_parked, true);
                let wait = match known_soon {
                    true => self.shared.consumer.claim.recheck_every,
                    false => Duration::ZERO,
                };
                self.parked.push((Instant::now() + wait, item));
            }
            State::Claiming => self.heirs.push_back(item),
            State::Recording | State::InDoubt => self.again.push(item),
            State::Received
            | State::Joined
            | State::Recorded
            | State::Applied
            | State::Leased
            | State::Called => {
                log::error!("gave a delivery back that stood in {:?}", item.state);
                self.settle(item, Settlement::Requeue);
            }
        }
    }

    /// Counts what an event says of a delivery.
    fn count(&self, item: &mut Item, event: Event) {
        let meter = &self.shared.signs.meter;
        let found_in = match event {
            Event::MarkedDone => FoundIn::Redis,
            // Its own row, by a COMMIT that went unanswered.
            Event::Found(Body::Same) if item.in_doubt => return,
            Event::Found(Body::Same) => FoundIn::Ledger,
            Event::OwnerApplied(Body::Same) => FoundIn::Flight,
            Event::ClaimHeld | Event::LeaseHeld if !item.was_parked => return meter.waits(),
            _ => return,
        };
        item.is_duplicate = true;
        meter.duplicate(found_in);
    }

    /// Keeps a settlement, to be told.
    fn settle(&mut self, mut item: Item, settlement: Settlement) {
        if item.marked {
            self.verdict.unmarked.extend(item.id.clone());
        }
        self.shared.signs.meter.decided(&Settling {
            settlement,
            is_duplicate: item.is_duplicate,
            took: item.since.elapsed(),
            published_at: item.delivery.message.published_at,
        });
        let parcel = self.parcel(&mut item, settlement);
        self.verdict.settled.push(Settled {
            ticket: item.delivery.ticket,
            settlement,
            parcel,
        });
        if let Some(id) = item.id.filter(|_| item.owner) {
            let left = (id, item.fingerprint, settlement);
            self.verdict.left.push(left);
        }
    }

    /// Passes on what became of a message to what had joined it.
    fn leave(&mut self, id: &MessageId, fingerprint: Fingerprint, settlement: Settlement) {
        if settlement == Settlement::Ack {
            for joined in self.shared.flights.leave(id) {
                let body = joined.compare(fingerprint);
                self.advance(joined, Event::OwnerApplied(body));
            }
        } else if self.shared.stop.is_set() {
            for joined in self.shared.flights.leave(id) {
                self.advance(joined, Event::Stopping);
            }
        } else if let Some(mut heir) = self.shared.flights.hand_over(id) {
            heir.owner = true;
            self.advance(heir, Event::OwnerGaveUp);
        }
    }

    /// What a copy needs, where one may have to be made.
    fn parcel(&self, item: &mut Item, settlement: Settlement) -> Option<Box<Parcel>> {
        let purpose = match settlement {
            Settlement::Retry => Purpose::Retry(self.step_of(item)),
            Settlement::Reject => Purpose::DeadLetter(item.reason?),
            Settlement::Ack | Settlement::Requeue => return None,
        };
        let attempts = match item.duration {
            Some(_) if item.counted => item.attempt(),
            _ => item.delivery.message.attempts,
        };
        let message = &mut item.delivery.message;
        Some(Box::new(Parcel {
            body: std::mem::take(&mut message.body),
            attempts,
            purpose,
            at_least: item
                .failure
                .as_ref()
                .and_then(|failure| failure.retry_after)
                .unwrap_or_default(),
        }))
    }

    /// The backoff step after the attempt at hand: the last one that has a
    /// queue goes on for all that follow.
    fn step_of(&self, item: &Item) -> usize {
        let retry = &self.shared.consumer.retry;
        let retries = retry.max_attempts.saturating_sub(1) as usize;
        let last = retry.backoff.len().min(retries).saturating_sub(1);
        let planned = (item.delivery.message.attempts as usize).min(last);
        let asked = item.failure.as_ref().and_then(|f| f.retry_after);
        asked.map_or(planned, |wait| step_not_before(retry, planned, last, wait))
    }

    /// 7 and 8. Tells Redis, the journal and the broker, in that order: what
    ///    the broker has been told cannot be done again.
    pub(super) fn tell(&mut self) {
        self.show_parked();
        loop {
            let verdict = std::mem::take(&mut self.verdict);
            if let Some(claims) = &mut self.claims {
                let done: Vec<_> = verdict
                    .done
                    .iter()
                    .map(|(id, print, age)| (id, *print, *age))
                    .collect();
                claims.mark_done(&done);
                for same in verdict.released.chunk_by(|a, b| a.0 == b.0) {
                    let ids: Vec<&MessageId> = same.iter().map(|(_, id)| id).collect();
                    claims.release(&same[0].0, &ids);
                }
            }
            failpoint::hit(Step::Marked);
            self.unmark(&verdict.unmarked);
            self.surrender(&verdict.surrendered);
            // Redis knows it by now: whoever comes next is told there.
            for (id, fingerprint, settlement) in verdict.left {
                self.leave(&id, fingerprint, settlement);
            }
            let settled = verdict.settled;
            if !settled.is_empty() && self.shared.outbox.send(settled).is_err() {
                log::debug!("nobody is left to settle: the broker gives the messages out again");
            }
            if !verdict.failed.is_empty() {
                self.write_down(verdict.failed);
            }
            if self.verdict.is_empty() {
                return;
            }
        }
    }

    /// What a mutant tells before the commit; without one, nothing.
    pub(super) fn tell_too_early(&mut self, items: &[Item]) {
        if failpoint::mutant(Mutant::EarlyAck) {
            let acks = items.iter().map(|item| Settled {
                ticket: Ticket {
                    epoch: item.epoch(),
                    tag: item.delivery.ticket.tag,
                },
                settlement: Settlement::Ack,
                parcel: None,
            });
            self.shared.outbox.send(acks.collect()).ok();
        }
        if failpoint::mutant(Mutant::EarlyMark)
            && let Some(claims) = &mut self.claims
        {
            let done: Vec<_> = items
                .iter()
                .filter_map(|item| Some((item.id.as_ref()?, item.fingerprint, item.age())))
                .collect();
            claims.mark_done(&done);
        }
    }

    /// A mark that stays can make its message run alone, later, and no more.
    fn unmark(&mut self, ids: &[MessageId]) {
        if ids.is_empty() {
            return;
        }
        let ids: Vec<&str> = ids.iter().map(MessageId::as_str).collect();
        if let Err(error) = self.ledger.unmark(&ids) {
            log::debug!(consumer = self.shared.consumer.name.as_str(); "marks stay: {error}");
        }
    }

    /// A claim that stays holds its message up until its lease ends, and no
    /// longer.
    fn surrender(&mut self, claims: &[(MessageId, Owner)]) {
        if claims.is_empty() {
            return;
        }
        let held: Vec<_> = claims.iter().map(|(id, owner)| (id, *owner)).collect();
        if let Err(error) = self.ledger.surrender(&held) {
            log::debug!(consumer = self.shared.consumer.name.as_str(); "claims stay: {error}");
        }
    }

    /// Writes failed attempts and the reasons of dead letters; then the broker
    /// may be told. An attempt whose claim in the ledger was not ours any more
    /// is not written, and does not count.
    fn write_down(&mut self, failed: Vec<Item>) {
        let mut tries = 0;
        let mut kept = HashSet::new();
        let event = loop {
            match self.write_journal(&failed) {
                Ok(surrendered) => {
                    kept = surrendered;
                    failpoint::hit(Step::Journaled);
                    break Event::Journaled;
                }
                Err(error) => {
                    self.shared.signs.meter.ledger_failed(LedgerStep::Journal);
                    let failure = error.into_failure();
                    if tries > 0 {
                        self.close_gate(&failure);
                    }
                    if self.pause(tries, &failure) {
                        break Event::Stopping;
                    }
                    tries += 1;
                }
            }
        };
        for mut item in failed {
            if let Some(failure) = item.failure.as_ref().filter(|_| item.duration.is_some()) {
                self.shared.signs.meter.failed(failure.class);
            }
            if let State::Journaling(reason) = item.state {
                item.reason = Some(reason);
            }
            if event == Event::Journaled && item.fence.is_some() {
                item.forget_lease();
                let id = item.id.as_ref().map_or("", MessageId::as_str);
                if !kept.contains(id) {
                    item.failure = None;
                    item.reason = None;
                    self.advance(item, Event::LeaseLost);
                    continue;
                }
            }
            self.advance(item, event);
        }
    }

    /// With the rows go the claims in the ledger, in the same transaction, and
    /// there are none for claims that were not ours any more. The ids of those
    /// that were. When a COMMIT goes unanswered and it was carried out all the
    /// same, the next try finds no claim: that attempt is made once more.
    fn write_journal(&mut self, failed: &[Item]) -> Result<HashSet<String>, Error> {
        let claims: Vec<(&MessageId, Owner)> = failed
            .iter()
            .filter_map(|item| Some((item.id.as_ref()?, item.fence?)))
            .collect();
        if claims.is_empty() {
            self.write_entries(failed.iter())?;
            return Ok(HashSet::new());
        }
        self.ledger.begin()?;
        let written = self.ledger.surrender(&claims).and_then(|kept| {
            let counts = |item: &&Item| {
                let id = item.id.as_ref().map_or("", MessageId::as_str);
                item.fence.is_none() || kept.contains(id)
            };
            self.write_entries(failed.iter().filter(counts))?;
            Ok(kept)
        });
        match written {
            Ok(kept) => match self.ledger.commit() {
                Ok(()) => Ok(kept),
                Err(CommitError::Refused(failure)) => Err(Error::Refused(failure)),
                Err(CommitError::Unknown(cause)) => Err(Error::Lost(cause)),
            },
            Err(error) => {
                self.ledger.rollback();
                Err(error)
            }
        }
    }

    fn write_entries<'i>(&mut self, failed: impl Iterator<Item = &'i Item>) -> Result<(), Error> {
        let failed: Vec<(&Item, Failure)> = failed.map(|item| (item, item.failure())).collect();
        let entries: Vec<JournalEntry<'_>> = failed
            .iter()
            .map(|(item, failure)| self.journal_entry(item, failure))
            .collect();
        if entries.is_empty() {
            return Ok(());
        }
        self.ledger.journal(self.hands.kind(), &entries)?;
        for entry in &entries {
            // The text may quote the message, so it stays in the journal.
            let (level, what) = match entry.reason {
                Some(_) => (log::Level::Warn, "dead-lettered"),
                None => (log::Level::Info, "to be retried"),
            };
            log::log!(
                level,
                consumer = self.shared.consumer.name.as_str(),
                message_id = entry.message_id.map_or("", MessageId::as_str),
                reason = entry.reason.map_or("", DeadReason::as_str),
                class = entry.failure.class.as_str(),
                code = entry.failure.code.as_deref().unwrap_or(""),
                attempt = entry.attempt;
                "{what}"
            );
        }
        Ok(())
    }

    fn journal_entry<'a>(&self, item: &'a Item, failure: &'a Failure) -> JournalEntry<'a> {
        let (reason, retry_in) = match item.state {
            State::Journaling(reason) => (Some(reason), None),
            _ => {
                let steps = &self.shared.consumer.retry.backoff;
                (None, steps.get(self.step_of(item)).copied())
            }
        };
        JournalEntry {
            message_id: item.id.as_ref(),
            fingerprint: item.fingerprint,
            reason,
            retry_in,
            failure,
            attempt: match item.duration {
                Some(_) => item.attempt(),
                None => item.delivery.message.attempts,
            },
            worker: item.worker,
            duration: item.duration,
            exchange: &item.delivery.message.exchange,
            routing_key: &item.delivery.message.routing_key,
        }
    }

    /// Gives back what waits, because the daemon stops.
    pub(super) fn hand_back(&mut self) {
        let parked = std::mem::take(&mut self.parked)
            .into_iter()
            .map(|(_, item)| item);
        let heirs: Vec<Item> = std::mem::take(&mut self.heirs).into();
        for item in parked.chain(heirs) {
            self.advance(item, Event::Stopping);
        }
        self.tell();
    }
}

/// The first of the steps from `planned` to `last` that is as long as `wait`,
/// which its jitter does not shorten then; the longest of them where none is.
fn step_not_before(retry: &checked::Retry, planned: usize, last: usize, wait: Duration) -> usize {
    let delay = |step: &usize| retry.backoff.get(*step).copied().unwrap_or_default();
    (planned..=last)
        .find(|step| delay(step) >= wait)
        .or_else(|| (planned..=last).max_by_key(delay))
        .unwrap_or(planned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_waits_at_least_as_long_as_was_asked_for() {
        let retry = |jitter_percent| checked::Retry {
            max_attempts: 5,
            backoff: [1, 10, 60, 30].map(Duration::from_secs).to_vec(),
            jitter_percent,
            breaker: 0,
        };
        let step = |planned, jitter, wait| {
            step_not_before(&retry(jitter), planned, 3, Duration::from_secs(wait))
        };
        assert_eq!(step(0, 0, 1), 0);
        assert_eq!(step(0, 10, 1), 0, "its jitter does not shorten it then");
        assert_eq!(step(0, 0, 11), 2);
        assert_eq!(step(1, 0, 1), 1, "never before its turn");
        assert_eq!(step(0, 0, 3_600), 2, "the longest there is");
        assert_eq!(step(3, 0, 3_600), 3);
    }
}
