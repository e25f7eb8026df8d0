//! The end of the pipeline: what a batch has decided, told to Redis, to the
//! failure journal and to the broker, in that order.

use std::time::Instant;

use super::Worker;
use super::item::Item;
use crate::claim::Token;
use crate::failpoint::{self, Step};
use crate::failure::Failure;
use crate::ledger::JournalEntry;
use crate::lifecycle::{Action, Event, State};
use crate::message::{DeadReason, Fingerprint, MessageId, Settled, Settlement};
use crate::postgres::Error;

/// What is decided and not yet told.
#[derive(Default)]
pub(super) struct Verdict {
    done: Vec<(MessageId, Fingerprint)>,
    released: Vec<(Token, MessageId)>,
    settled: Vec<Settled>,
    dead: Vec<Item>,
}

impl Worker {
    /// Moves an item on and keeps what that decided.
    pub(super) fn advance(&mut self, mut item: Item, event: Event) {
        for action in item.on(event) {
            match action {
                Action::MarkDone => self
                    .verdict
                    .done
                    .extend(item.id.clone().map(|id| (id, item.fingerprint))),
                Action::Release => {
                    if let (Some(token), Some(id)) = (&item.token, &item.id) {
                        self.verdict.released.push((token.clone(), id.clone()));
                    }
                }
                // Done by the step that reads the new state, for a whole batch.
                Action::Claim
                | Action::Park
                | Action::Record
                | Action::Apply
                | Action::Commit
                | Action::Rollback
                | Action::Journal(_)
                | Action::Settle(_) => {}
            }
        }
        match item.state {
            State::Settled(settlement) => self.settle(item, settlement),
            State::Journaling(_) => self.verdict.dead.push(item),
            State::Parked => {
                let at = Instant::now() + self.shared.consumer.claim.recheck_every;
                self.parked.push((at, item));
            }
            State::Claiming => self.heirs.push_back(item),
            State::Recording | State::InDoubt => self.again.push(item),
            State::Received | State::Joined | State::Recorded | State::Applied => {
                log::error!("gave a delivery back that stood in {:?}", item.state);
                self.settle(item, Settlement::Requeue);
            }
        }
    }

    /// Keeps a settlement, and passes the outcome on to what had joined.
    fn settle(&mut self, item: Item, settlement: Settlement) {
        self.verdict.settled.push(Settled {
            ticket: item.delivery.ticket,
            settlement,
            parcel: None,
        });
        let Some(id) = item.id.filter(|_| item.owner) else {
            return;
        };
        if settlement == Settlement::Ack {
            for joined in self.shared.flights.leave(&id) {
                let body = joined.compare(item.fingerprint);
                self.advance(joined, Event::OwnerApplied(body));
            }
        } else if self.shared.stop.is_set() {
            for joined in self.shared.flights.leave(&id) {
                self.advance(joined, Event::Stopping);
            }
        } else if let Some(mut heir) = self.shared.flights.hand_over(&id) {
            heir.owner = true;
            self.advance(heir, Event::OwnerGaveUp);
        }
    }

    /// 7 and 8. Tells Redis, the journal and the broker, in that order: what
    ///    the broker has been told cannot be done again.
    pub(super) fn tell(&mut self) {
        loop {
            let verdict = std::mem::take(&mut self.verdict);
            if let Some(claims) = &mut self.claims {
                let done: Vec<_> = verdict
                    .done
                    .iter()
                    .map(|(id, print)| (id, *print))
                    .collect();
                claims.mark_done(&done);
                for same in verdict.released.chunk_by(|a, b| a.0 == b.0) {
                    let ids: Vec<&MessageId> = same.iter().map(|(_, id)| id).collect();
                    claims.release(&same[0].0, &ids);
                }
            }
            failpoint::hit(Step::Marked);
            for settled in verdict.settled {
                if self.shared.outbox.send(settled).is_err() {
                    log::debug!("nobody is left to settle: the broker gives the message out again");
                }
            }
            if verdict.dead.is_empty() {
                return;
            }
            self.bury(verdict.dead);
        }
    }

    /// Writes the reasons of dead letters, then has them rejected.
    fn bury(&mut self, dead: Vec<Item>) {
        let mut tries = 0;
        let event = loop {
            match self.write_journal(&dead) {
                Ok(()) => {
                    failpoint::hit(Step::Journaled);
                    break Event::Journaled;
                }
                Err(error) => {
                    if self.pause(tries, &error.into_failure()) {
                        break Event::Stopping;
                    }
                    tries += 1;
                }
            }
        };
        for item in dead {
            self.advance(item, event);
        }
    }

    fn write_journal(&mut self, dead: &[Item]) -> Result<(), Error> {
        let failures: Vec<Failure> = dead.iter().map(Item::failure).collect();
        let entries: Vec<JournalEntry<'_>> = dead
            .iter()
            .zip(&failures)
            .filter_map(|(item, failure)| {
                let State::Journaling(reason) = item.state else {
                    return None;
                };
                Some(JournalEntry {
                    message_id: item.id.as_ref(),
                    fingerprint: item.fingerprint,
                    reason: Some(reason),
                    retry_in: None,
                    failure,
                    attempt: if reason == DeadReason::Rejected {
                        item.attempt
                    } else {
                        0
                    },
                    duration: None,
                    exchange: &item.delivery.message.exchange,
                    routing_key: &item.delivery.message.routing_key,
                })
            })
            .collect();
        self.ledger.journal(self.handler.kind(), &entries)?;
        for entry in &entries {
            // The text may quote the message, so it stays in the journal.
            log::warn!(
                consumer = self.shared.consumer.name.as_str(),
                message_id = entry.message_id.map_or("", MessageId::as_str),
                reason = entry.reason.map_or("", DeadReason::as_str),
                code = entry.failure.code.as_deref().unwrap_or("");
                "dead-lettered"
            );
        }
        Ok(())
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
