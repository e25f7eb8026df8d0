//! Steps 4 to 6: ledger rows, handler and commit, in as few transactions as
//! the messages at fault allow; and what a failure asks for.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::apart::{RACES_ALONE_MAX, is_in_the_way, is_race};
use super::item::Item;
use super::{Hands, Worker};
use crate::failpoint::{self, Step};
use crate::failure::{Class, Failure, class_of_sqlstate};
use crate::handler::{Fault, Transactional, Work};
use crate::ledger::{CommitError, Record};
use crate::lifecycle::Event;
use crate::message::{Fingerprint, MessageId};
use crate::observe::metrics::{LedgerStep, PauseCause, Server};
use crate::postgres::{Error, Session};
use crate::random;

/// After so many failures of the world's that one message alone met, while
/// others succeeded between them, they are taken for the message's own.
const STRIKES_MAX: u32 = 2;

/// How long the world may be broken before what is held is given back. A
/// broker before RabbitMQ 4.3 counts each return towards the delivery limit.
pub(super) const GIVE_BACK_AFTER: Duration = Duration::from_secs(1);

/// Messages that a worker keeps meanwhile, to find out that it is mended.
pub(super) const PROBES_MAX: usize = 4;

/// Where a try failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Before the handler: nothing of the message's content was looked at.
    Ledger,
    /// In the handler, or in the commit of what it did.
    Handler,
}

/// How one try of a batch in one transaction ended.
pub(super) enum Tried {
    /// Every item has been dealt with.
    Through,
    /// What is left again, at once.
    Again,
    /// What is left again, in transactions of no more than so many.
    Smaller(usize),
    /// Some of them may kill their worker: each of those for itself.
    Apart,
    /// Nobody is at fault: the same again, after a while.
    Wait(Trouble),
}

/// Why a try has to wait.
pub(super) struct Trouble {
    pub(super) failure: Failure,
    pub(super) stage: Stage,
}

/// Longest text of an error in the log, in characters, as in the journal.
const SHOWN_MAX: usize = 2_000;

impl Worker {
    /// Applies `items`. What has to wait goes behind what need not.
    pub(super) fn apply(&mut self, items: Vec<Item>) {
        let mut groups = VecDeque::from([items]);
        let mut tries = 0;
        self.reconnected = false;
        (self.left_out, self.races) = (0, 0);
        loop {
            let before = self.shared.gate.successes();
            let trouble = self.go_through(&mut groups);
            let trouble = trouble.or(self.conclude(&mut groups));
            if groups.is_empty() {
                return;
            }
            let Some(trouble) = trouble else {
                // Something is left without trouble only when the daemon stops.
                return self.give_back(&mut groups, 0);
            };
            // What is decided must not wait for what is not.
            self.tell();
            let alone = self.shared.gate.successes() == before;
            if alone && trouble.failure.class == Class::Systemic {
                self.close_gate(&trouble.failure);
            }
            // A server that does not answer now is not waited for once more.
            if trouble.failure.code.is_some() {
                self.rest_suspects(&mut groups);
            }
            if self.pause(tries, &trouble.failure) {
                return self.give_back(&mut groups, 0);
            }
            tries += 1;
            if self.shared.gate.closed_for() >= Some(GIVE_BACK_AFTER) {
                self.give_back(&mut groups, PROBES_MAX);
            }
            let held: usize = groups.iter().map(Vec::len).sum();
            if trouble.stage == Stage::Handler && held < PROBES_MAX {
                // The world may be broken for these alone: another will tell.
                groups.push_front(self.take_probe());
            }
        }
    }

    /// Tries every group, and leaves those that have to wait, with the reason.
    fn go_through(&mut self, groups: &mut VecDeque<Vec<Item>>) -> Option<Trouble> {
        let before = self.shared.gate.successes();
        let mut waiting = VecDeque::new();
        let mut trouble: Option<Trouble> = None;
        while let Some(mut items) = groups.pop_front() {
            let tried = self.attempt(&mut items);
            items.append(&mut self.again);
            match tried {
                Tried::Through if items.is_empty() && groups.is_empty() => {}
                // The others may take long.
                Tried::Through if items.is_empty() => self.tell(),
                Tried::Through | Tried::Again => groups.push_front(items),
                Tried::Smaller(most) => split(items, most, groups),
                Tried::Apart => {
                    let (alone, together) = items.into_iter().partition(|item| item.alone);
                    groups.extend(Vec::into_iter(alone).map(|item: Item| vec![item]));
                    groups.push_front(together);
                }
                Tried::Wait(new) => {
                    // When one message alone met it and no other fared better,
                    // looking for one that is at fault is in vain.
                    let broken = trouble.is_some() && self.shared.gate.successes() == before;
                    let systemic = new.failure.class == Class::Systemic;
                    let divisible = !systemic || (new.stage == Stage::Handler && !broken);
                    if divisible && items.len() > 1 {
                        let half = items.len().div_ceil(2);
                        split(items, half, groups);
                        continue;
                    }
                    waiting.push_back(items);
                    if systemic && new.stage == Stage::Ledger {
                        waiting.append(groups);
                    }
                    trouble = Some(new);
                }
            }
            if self.must_rest() {
                waiting.append(groups);
            }
        }
        // Next time another one goes first.
        waiting.rotate_left(usize::from(waiting.len() > 1));
        *groups = waiting;
        trouble
    }

    /// Whether to begin nothing more for now: each try may take as long as
    /// `statement_timeout`.
    fn must_rest(&self) -> bool {
        let failed = u32::try_from(self.failed.len()).unwrap_or(u32::MAX);
        let gate = &self.shared.gate;
        let broken =
            gate.is_closed() || gate.would_fail(failed, self.shared.consumer.retry.breaker);
        self.shared.stop.is_set() || (failed > 0 && broken)
    }

    /// One transaction. Items that are dealt with leave `items`.
    fn attempt(&mut self, items: &mut Vec<Item>) -> Tried {
        // What waited, or came from somewhere else, finds its place again.
        items.sort_by_key(|item| (item.epoch(), item.delivery.ticket.tag));
        match self.examine(items) {
            Ok(true) => {}
            Ok(false) => return Tried::Apart,
            Err(error) => return self.undo(items, error, Stage::Ledger),
        }
        match self.get_ready(items) {
            Ok(()) => {}
            Err(error @ Error::Refused(_)) => return self.undo(items, error, Stage::Handler),
            Err(error) => return self.undo(items, error, Stage::Ledger),
        }
        // Beside one that runs alone nobody runs: what it dies of is its own.
        let suspects = Arc::clone(&self.shared.suspects);
        let alone = items.iter().any(|item| item.alone);
        let _alone = alone.then(|| suspects.write());
        let _together = (!alone).then(|| suspects.read());
        let contention = Arc::clone(&self.shared.contention);
        let _lane = self.is_single_file().then(|| contention.lane());
        if let Err(error) = self.mark_suspects(items) {
            return self.undo(items, error, Stage::Ledger);
        }
        match self.begin(items) {
            Ok(()) => {}
            // Only in the single file does it wait for anybody.
            Err(Error::Refused(failure)) if is_in_the_way(&failure) => {
                self.ledger.rollback();
                return self.collide(items, &failure);
            }
            Err(error) => return self.undo(items, error, Stage::Ledger),
        }
        match self.record(items) {
            Ok(()) => {}
            Err(Error::Refused(failure)) if is_race(&failure) => {
                self.ledger.rollback();
                return self.collide(items, &failure);
            }
            Err(error) => return self.undo(items, error, Stage::Ledger),
        }
        failpoint::hit(Step::Recorded);
        if items.is_empty() {
            self.ledger.rollback();
            return Tried::Through;
        }
        let begun = Instant::now();
        let handled = self.run_handler(items);
        for item in items.iter_mut() {
            item.duration = Some(begun.elapsed());
        }
        self.shared.signs.meter.handled(begun.elapsed());
        if let Err(fault) = handled {
            return self.undo(items, fault, Stage::Handler);
        }
        failpoint::hit(Step::Applied);
        self.tell_too_early(items);
        self.commit(items)
    }

    /// 6. Commits. What is not known to be committed is looked up.
    fn commit(&mut self, items: &mut Vec<Item>) -> Tried {
        match self.ledger.commit() {
            Ok(()) => {
                failpoint::hit(Step::Committed);
                self.open_gate();
                for mut item in items.drain(..) {
                    item.marked = false;
                    self.advance(item, Event::Committed);
                }
                Tried::Through
            }
            Err(CommitError::Refused(failure)) => {
                self.undo(items, Error::Refused(failure), Stage::Handler)
            }
            Err(CommitError::Unknown(cause)) => {
                log::warn!(
                    consumer = self.shared.consumer.name.as_str(), messages = items.len();
                    "a commit was not answered, what it did is looked up: {cause}"
                );
                for item in items.iter_mut() {
                    item.on(Event::CommitUnknown);
                }
                self.shared.signs.meter.ledger_failed(LedgerStep::Commit);
                self.shared.signs.meter.is_up(Server::Postgres, false);
                self.wait_for(Error::Lost(cause).into_failure(), Stage::Ledger)
            }
        }
    }

    /// Has the handler see a session that is new to it.
    fn get_ready(&mut self, items: &[Item]) -> Result<(), Error> {
        if items.is_empty() {
            return Ok(());
        }
        self.ledger.connect()?;
        let session = self.ledger.session()?;
        match &mut self.hands {
            Hands::Own(handler) => handler.ready(session),
            Hands::Crew(_) => Ok(()),
        }
    }

    pub(super) fn begin(&mut self, items: &[Item]) -> Result<(), Error> {
        match self.is_single_file() {
            _ if items.is_empty() => Ok(()),
            true => self.ledger.begin_alone(),
            false => self.ledger.begin(),
        }
    }

    /// 4. Inserts the ledger rows. Duplicates and conflicts leave `items`, which
    ///    keep their order: the rows are sorted for their locks, and the
    ///    messages are not.
    pub(super) fn record(&mut self, items: &mut Vec<Item>) -> Result<(), Error> {
        if items.is_empty() {
            return Ok(());
        }
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.sort_unstable_by(|a, b| items[*a].id.cmp(&items[*b].id));
        let entries: Vec<(&MessageId, Fingerprint)> = order
            .iter()
            .filter_map(|place| Some((items[*place].id.as_ref()?, items[*place].fingerprint)))
            .collect();
        let mut records = order
            .iter()
            .zip(self.ledger.record(&entries)?)
            .collect::<Vec<_>>();
        records.sort_unstable_by_key(|(place, _)| **place);
        self.shared.signs.meter.is_up(Server::Postgres, true);
        for (mut item, (_, record)) in std::mem::take(items).into_iter().zip(records) {
            match record {
                Record::Inserted => {
                    item.on(Event::Inserted);
                    items.push(item);
                }
                Record::Found(row) => {
                    let body = item.found(row);
                    self.advance(item, Event::Found(body));
                }
                Record::Vanished => self.again.push(item),
            }
        }
        // Before the handler, whose role and settings hold until the commit.
        self.unmark_suspects(items)
    }

    /// 5. Runs the handler on the fresh messages.
    fn run_handler(&mut self, items: &mut [Item]) -> Result<(), Fault> {
        self.with_handler(items, |handler, session, work| handler.apply(session, work))?;
        for item in items {
            item.on(Event::Succeeded);
        }
        Ok(())
    }

    /// Gives the messages of `items` to a call of the handler.
    pub(super) fn with_handler<T, E: From<Error>>(
        &mut self,
        items: &[Item],
        call: impl FnOnce(&mut dyn Transactional, &mut Session, &[Work<'_>]) -> Result<T, E>,
    ) -> Result<T, E> {
        let work: Vec<Work<'_>> = items
            .iter()
            .filter_map(|item| {
                failpoint::meet(&item.delivery.message.body);
                Some(Work {
                    message_id: item.id.as_ref()?,
                    message: &item.delivery.message,
                    attempt: item.attempt(),
                })
            })
            .collect();
        let session = self.ledger.session()?;
        match &mut self.hands {
            Hands::Own(handler) => call(handler.as_mut(), session, &work),
            Hands::Crew(_) => Err(Error::Lost("not a transaction's".to_owned()).into()),
        }
    }

    /// Rolls back and finds out what the error asks for.
    pub(super) fn undo(
        &mut self,
        items: &mut Vec<Item>,
        fault: impl Into<Fault>,
        stage: Stage,
    ) -> Tried {
        let Fault { at, took, error } = fault.into();
        let lost = !matches!(error, Error::Refused(_));
        if lost {
            self.shared.signs.meter.is_up(Server::Postgres, false);
        }
        let mut failure = error.into_failure();
        if stage == Stage::Handler {
            self.classify(&mut failure);
        }
        // A session may itself be what is wrong, with plans that no longer fit.
        match lost || failure.class == Class::Systemic {
            true => self.ledger.lost(),
            false => self.ledger.rollback(),
        }
        let at_fault = match stage {
            Stage::Handler => failure.class != Class::Systemic,
            // All that the ledger is given of a message is its id.
            Stage::Ledger => failure.is_data_exception(),
        };
        if stage == Stage::Ledger && !at_fault {
            self.shared.signs.meter.ledger_failed(LedgerStep::Record);
        }
        let lost = |item: &Item| item.races < RACES_ALONE_MAX && is_race(&failure);
        if at_fault && (items.len() > 1 || items.iter().all(lost)) {
            let half = items.len().div_ceil(2);
            return match stage {
                Stage::Handler => self.tell_apart(items, at, took, failure),
                Stage::Ledger => self.run_smaller(items, half),
            };
        }
        if !at_fault && !self.is_struck_out(items, stage) {
            for item in items.iter_mut() {
                item.on(Event::Failed(Class::Systemic));
            }
            // It may be the session that is wrong, and no more.
            if !std::mem::replace(&mut self.reconnected, true) {
                self.say_replaced(&failure);
                return Tried::Again;
            }
            return self.wait_for(failure, stage);
        }
        self.blame(items, failure)
    }

    /// The class that the consumer's configuration gives a failure.
    pub(super) fn classify(&self, failure: &mut Failure) {
        let code = failure.code.as_deref().unwrap_or("");
        if let Some(class) = self.shared.consumer.failures.class_of(code) {
            failure.class = class;
        }
    }

    fn wait_for(&mut self, failure: Failure, stage: Stage) -> Tried {
        if stage == Stage::Handler {
            self.shared.signs.meter.failed(failure.class);
        }
        Tried::Wait(Trouble { failure, stage })
    }

    /// Whether what seems to be the world's fault is that of the one message
    /// in `items`: it met it again and again while others succeeded.
    pub(super) fn is_struck_out(&self, items: &mut [Item], stage: Stage) -> bool {
        let ([item], Stage::Handler) = (items, stage) else {
            return false;
        };
        let successes = self.shared.gate.successes();
        let others_succeeded = item.failed_at.is_some_and(|then| successes > then);
        item.strikes += u32::from(others_succeeded);
        item.failed_at = Some(successes);
        item.strikes >= STRIKES_MAX
    }

    /// The failure is that of the one message in `items`.
    pub(super) fn blame(&mut self, items: &mut Vec<Item>, failure: Failure) -> Tried {
        for mut item in std::mem::take(items) {
            item.failure = Some(failure.clone());
            match failure.class {
                Class::Permanent => self.advance(item, Event::Failed(Class::Permanent)),
                Class::Transient | Class::Systemic => self.failed.push(item),
            }
        }
        Tried::Through
    }

    /// Decides about the attempts that failed and may succeed later: they are
    /// counted, unless there were so many in a row that the world must be
    /// broken. Then `groups` have to wait, and what has no retry queue to wait
    /// in waits with them.
    pub(super) fn conclude(&mut self, groups: &mut VecDeque<Vec<Item>>) -> Option<Trouble> {
        let failed = std::mem::take(&mut self.failed);
        let last = failed.last()?.failure.clone()?;
        let retry = &self.shared.consumer.retry;
        let most = retry.max_attempts;
        let count = u32::try_from(failed.len()).unwrap_or(u32::MAX);
        let in_row = self.shared.gate.failed(count, retry.breaker);
        let broken = in_row || self.shared.gate.is_closed();
        if in_row {
            self.close_gate(&last);
        }
        for mut item in failed {
            let is_told_to_wait = item.failure.as_ref().is_some_and(Failure::asks_to_wait);
            item.counted = !broken && !is_told_to_wait;
            if item.counted && item.attempt() >= most {
                self.advance(item, Event::Exhausted);
            } else if most > 1 {
                self.advance(item, Event::Failed(Class::Transient));
            } else {
                item.on(Event::Failed(Class::Systemic));
                groups.push_back(vec![item]);
            }
        }
        self.in_vain |= broken;
        broken.then_some(Trouble {
            failure: last,
            stage: Stage::Handler,
        })
    }

    /// Gives back all but `keep` of what waits, and keeps each of those for
    /// itself.
    fn give_back(&mut self, groups: &mut VecDeque<Vec<Item>>, keep: usize) {
        let mut kept = VecDeque::new();
        for item in groups.drain(..).flatten() {
            match kept.len() < keep {
                true => kept.push_back(vec![item]),
                false => self.advance(item, Event::Stopping),
            }
        }
        *groups = kept;
        self.tell();
    }

    pub(super) fn open_gate(&mut self) {
        self.reconnected = false;
        self.trials = 0;
        self.shared.signs.meter.is_up(Server::Postgres, true);
        if let Some(closed_for) = self.shared.gate.succeeded() {
            self.shared.signs.meter.resumed();
            self.shared.signs.pulse.resumed();
            log::info!(
                consumer = self.shared.consumer.name.as_str(),
                paused_ms = u64::try_from(closed_for.as_millis()).unwrap_or(u64::MAX);
                "resumed"
            );
        }
    }

    pub(super) fn close_gate(&mut self, failure: &Failure) {
        if self.shared.gate.close() {
            let cause = match failure.class {
                Class::Systemic => PauseCause::World,
                Class::Transient | Class::Permanent => PauseCause::Breaker,
            };
            self.shared.signs.meter.paused(cause);
            self.shared.signs.pulse.paused(self.in_public(failure));
            log::warn!(
                consumer = self.shared.consumer.name.as_str(),
                code = failure.code.as_deref().unwrap_or(""),
                class = failure.class.as_str();
                "paused: {}", self.in_public(failure)
            );
        }
    }

    pub(super) fn say_replaced(&self, failure: &Failure) {
        self.shared.signs.meter.reconnected(Server::Postgres);
        log::info!(
            consumer = self.shared.consumer.name.as_str(),
            code = failure.code.as_deref().unwrap_or("");
            "replaced a database session: {}", self.in_public(failure)
        );
    }

    /// What the log may say: an error about a message may quote it.
    fn in_public<'a>(&self, failure: &'a Failure) -> &'a str {
        // A code that the configuration alone calls systemic may be about one.
        let code = failure.code.as_deref();
        let of_the_world = |code: &str| match &self.hands {
            Hands::Own(_) => class_of_sqlstate(code) == Class::Systemic,
            Hands::Crew(_) => self.shared.consumer.failures.class_of(code).is_none(),
        };
        match failure.class {
            Class::Systemic if code.is_none_or(of_the_world) => {
                let line = failure.text.lines().next().unwrap_or_default();
                let end = line.char_indices().nth(SHOWN_MAX).map(|(at, _)| at);
                end.map_or(line, |end| &line[..end])
            }
            _ => "attempts fail, see the failure journal",
        }
    }

    /// Waits before the next try. True when the daemon stops.
    pub(super) fn pause(&self, tries: u32, failure: &Failure) -> bool {
        let delay = self.shared.backoff.delay(tries, random::draw());
        self.remind(tries, failure);
        self.shared.stop.wait(delay)
    }

    /// A wait that lasts is told again, ever more rarely.
    pub(super) fn remind(&self, tries: u32, failure: &Failure) {
        if tries.is_power_of_two() {
            log::warn!(
                consumer = self.shared.consumer.name.as_str(),
                code = failure.code.as_deref().unwrap_or(""),
                tries = tries;
                "still waiting: {}", self.in_public(failure)
            );
        }
    }
}

/// Puts `items` before the other groups, in groups of no more than `most`.
pub(super) fn split(mut items: Vec<Item>, most: usize, groups: &mut VecDeque<Vec<Item>>) {
    let most = most.max(1);
    while !items.is_empty() {
        let rest = items.len() - 1 - (items.len() - 1) % most;
        groups.push_front(items.split_off(rest));
    }
}
