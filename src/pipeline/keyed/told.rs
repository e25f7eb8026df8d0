//! What the foreman tells the ledger: claims before the handler is called, and
//! what has become of them. One transaction for as many messages as there are.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Foreman, Rest};
use crate::failpoint::{self, Step};
use crate::failure::{Class, Failure};
use crate::ledger::{CommitError, Hold, Owner, Wanted};
use crate::lifecycle::Event;
use crate::message::MessageId;
use crate::observe::metrics::{LedgerStep, Server};
use crate::pipeline::apply::{GIVE_BACK_AFTER, PROBES_MAX, split};
use crate::pipeline::item::Item;
use crate::postgres::Error;
use crate::random;

impl Foreman {
    /// Claims what is to be claimed in the ledger, and has it called.
    pub(super) fn claim(&mut self) {
        if !self.ledger_rest.is_over() {
            return;
        }
        let mut groups = VecDeque::from([std::mem::take(&mut self.unclaimed)]);
        while let Some(mut items) = groups.pop_front() {
            if items.is_empty() {
                continue;
            }
            let Err(error) = self.try_claim(&mut items) else {
                self.call(items);
                continue;
            };
            let failure = self.forget(error, LedgerStep::Claim);
            // All that the ledger is given of a message is its id.
            if failure.is_data_exception() {
                match items.len() {
                    1 => self.refuse(items, &failure),
                    _ => {
                        let half = items.len().div_ceil(2);
                        split(items, half, &mut groups);
                    }
                }
                continue;
            }
            for item in &mut items {
                item.on(Event::Failed(Class::Systemic));
            }
            self.unclaimed.extend(items);
            self.unclaimed.extend(groups.into_iter().flatten());
            return self.rest_from_ledger(&failure);
        }
    }

    fn refuse(&mut self, items: Vec<Item>, failure: &Failure) {
        for mut item in items {
            item.failure = Some(failure.clone());
            self.worker.advance(item, Event::Failed(Class::Permanent));
        }
    }

    /// One transaction. The items that are ours stay in `items`.
    fn try_claim(&mut self, items: &mut Vec<Item>) -> Result<(), Error> {
        items.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        let together = self.worker.examine(items)?;
        if !together || self.out > 0 {
            let (alone, rest) = std::mem::take(items).into_iter().partition(|i| i.alone);
            self.alone.extend(Vec::into_iter(alone));
            *items = rest;
        }
        if items.is_empty() {
            return Ok(());
        }
        let batch = Owner::new(random::draw());
        for item in items.iter_mut() {
            item.fence.get_or_insert(batch);
        }
        let asked = Instant::now();
        self.worker.ledger.begin()?;
        let wanted: Vec<Wanted<'_>> = items
            .iter()
            .filter_map(|item| {
                Some(Wanted {
                    id: item.id.as_ref()?,
                    fingerprint: item.fingerprint,
                    owner: item.fence?,
                })
            })
            .collect();
        let lease = self.worker.shared.consumer.claim.lease;
        let holds = self.worker.ledger.claim(&wanted, lease)?;
        self.worker.ledger.commit().map_err(uncommitted)?;
        failpoint::hit(Step::Leased);
        self.worker.shared.signs.meter.is_up(Server::Postgres, true);
        self.ledger_rest = Rest::default();
        for (mut item, hold) in std::mem::take(items).into_iter().zip(holds) {
            match (hold, &item.id, item.fence) {
                (Hold::Ours, Some(id), Some(owner)) => {
                    item.lease = Some(self.leases.keep(id, owner, asked));
                    item.on(Event::LeaseWon);
                    items.push(item);
                }
                (Hold::Found(row), ..) => {
                    item.forget_lease();
                    let body = item.found(row);
                    self.worker.advance(item, Event::Found(body));
                }
                _ => {
                    item.forget_lease();
                    self.worker.advance(item, Event::LeaseHeld);
                }
            }
        }
        Ok(())
    }

    /// Completes what was called. Until the ledger has answered, it is held:
    /// given back, it would be called again.
    pub(super) fn complete(&mut self) {
        if self.called.is_empty() || !self.ledger_rest.is_over() {
            return;
        }
        if let Err(error) = self.try_complete() {
            let failure = self.forget(error, LedgerStep::Complete);
            for item in &mut self.called {
                item.on(Event::CommitUnknown);
            }
            self.rest_from_ledger(&failure);
        }
    }

    fn try_complete(&mut self) -> Result<(), Error> {
        self.called.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        let held: Vec<(&MessageId, Owner)> = self
            .called
            .iter()
            .filter_map(|item| Some((item.id.as_ref()?, item.fence?)))
            .collect();
        self.worker.ledger.begin()?;
        let done = self.worker.ledger.complete(&held)?;
        self.worker.unmark_suspects(&self.called)?;
        self.worker.ledger.commit().map_err(uncommitted)?;
        failpoint::hit(Step::Done);
        self.ledger_rest = Rest::default();
        if !done.is_empty() {
            self.world_rest = Rest::default();
            self.worker.open_gate();
        }
        let is_done = |item: &Item| {
            item.id
                .as_ref()
                .is_some_and(|id| done.contains(id.as_str()))
        };
        let (ours, late): (Vec<Item>, Vec<Item>) = std::mem::take(&mut self.called)
            .into_iter()
            .partition(is_done);
        self.called = late;
        for mut item in ours {
            item.marked = false;
            item.forget_lease();
            self.worker.advance(item, Event::Committed);
        }
        self.look_up_late()
    }

    /// What was called under a claim that is not ours any more: applied by
    /// somebody else, or by ourselves under a COMMIT that went unanswered; or
    /// to be claimed again.
    fn look_up_late(&mut self) -> Result<(), Error> {
        if self.called.is_empty() {
            return Ok(());
        }
        let ids: Vec<&str> = self
            .called
            .iter()
            .filter_map(|item| item.id.as_ref().map(MessageId::as_str))
            .collect();
        let found = self.worker.ledger.find(&ids)?;
        for mut item in std::mem::take(&mut self.called) {
            let id = item.id.as_ref().map_or("", MessageId::as_str);
            log::warn!(
                consumer = self.worker.shared.consumer.name.as_str(), message_id = id,
                in_ledger = found.contains_key(id);
                "a handler came back when its claim was not ours any more: what it says does not \
                 count"
            );
            if let Some(row) = found.get(id).copied() {
                let body = item.found(row);
                item.forget_lease();
                self.worker.advance(item, Event::Found(body));
                continue;
            }
            self.lost(item);
        }
        Ok(())
    }

    /// Gives up a transaction, and the session if that is what is wrong.
    pub(super) fn forget(&mut self, error: Error, step: LedgerStep) -> Failure {
        let lost = !matches!(error, Error::Refused(_));
        let failure = error.into_failure();
        let meter = &self.worker.shared.signs.meter;
        if !failure.is_data_exception() {
            meter.ledger_failed(step);
        }
        if lost {
            meter.is_up(Server::Postgres, false);
        }
        match lost || failure.class == Class::Systemic {
            true => self.worker.ledger.lost(),
            false => self.worker.ledger.rollback(),
        }
        failure
    }

    /// Nothing is asked of the ledger for a while, except at the first time: it
    /// may be the session that is wrong, and no more.
    pub(super) fn rest_from_ledger(&mut self, failure: &Failure) {
        let tries = self.ledger_rest.tries;
        if tries == 0 {
            self.worker.say_replaced(failure);
            return self.ledger_rest.begin(Duration::ZERO);
        }
        if failure.class == Class::Systemic {
            self.worker.close_gate(failure);
        }
        self.worker.remind(tries - 1, failure);
        let backoff = self.worker.shared.backoff;
        let delay = backoff.delay(tries - 1, random::draw());
        self.ledger_rest.begin(delay);
        if self.worker.shared.gate.closed_for() >= Some(GIVE_BACK_AFTER) {
            let most = PROBES_MAX.min(self.unclaimed.len());
            for item in self.unclaimed.split_off(most) {
                self.worker.advance(item, Event::Stopping);
            }
        }
    }
}

/// A commit that did not return is a transaction to be tried again: what it
/// did, the next one finds.
fn uncommitted(error: CommitError) -> Error {
    match error {
        CommitError::Refused(failure) => Error::Refused(failure),
        CommitError::Unknown(cause) => Error::Lost(cause),
    }
}
