//! A transaction of several messages has failed: which of them is at fault, or
//! what else is to be done about it. One that failed is left out and the others
//! run again; what is nobody's fault, a lost race or too little time for all, is
//! no reason to look for one.

use std::time::{Duration, Instant};

use super::Worker;
use super::apply::{Stage, Tried};
use super::contention::Turn;
use super::item::Item;
use crate::failure::{self, Class, Failure};
use crate::handler::QUERY_CANCELED;
use crate::lifecycle::Event;
use crate::observe::metrics::RerunCause;
use crate::postgres::Error;
use crate::random;

/// Messages of a batch that are left out one by one: from then on each of them
/// is looked at, once, for all that fail.
const LEFT_OUT_MAX: u32 = 2;

/// Races that a batch loses in a row before its transactions are made smaller.
const RACES_MAX: u32 = 6;

/// Races that a message loses alone before they are its own failure.
pub(super) const RACES_ALONE_MAX: u32 = 20;

/// Longest wait after a lost race, in microseconds, so that the winner is done.
const RACE_WAIT_US: u64 = 20_000;

/// SQLSTATE `lock_not_available`: `lock_timeout`, or NOWAIT.
const LOCKED: &str = "55P03";

/// Whether another transaction was in the way, and no message is at fault.
pub(super) fn is_in_the_way(failure: &Failure) -> bool {
    is_race(failure) || failure.code.as_deref() == Some(LOCKED)
}

/// Whether another transaction won a race.
pub(super) fn is_race(failure: &Failure) -> bool {
    failure.code.as_deref().is_some_and(failure::is_race)
}

impl Worker {
    /// Of several `items`, rolled back, the one at place `at` met `failure`
    /// after `took`, as far as that is known.
    pub(super) fn tell_apart(
        &mut self,
        items: &mut Vec<Item>,
        at: Option<usize>,
        took: Option<Duration>,
        failure: Failure,
    ) -> Tried {
        if is_in_the_way(&failure) {
            return self.collide(items, &failure);
        }
        if failure.code.as_deref() == Some(QUERY_CANCELED) && !is_slow_itself(items, took) {
            let before = at.unwrap_or(items.len() / 2);
            self.shared.signs.meter.reran(RerunCause::Timeout);
            let most = (before / 2).max(1);
            self.shared.contention.shrink(most, Instant::now());
            return self.run_smaller(items, most);
        }
        self.shared.signs.meter.reran(RerunCause::Fault);
        match at.filter(|at| *at < items.len() && self.left_out < LEFT_OUT_MAX) {
            Some(at) => {
                self.left_out += 1;
                self.leave_out(items, vec![(at, failure)]);
                Tried::Again
            }
            None => self.search(items),
        }
    }

    /// Runs `items` again in transactions of no more than `most`.
    pub(super) fn run_smaller(&mut self, items: &mut [Item], most: usize) -> Tried {
        for item in items {
            item.on(Event::BatchFailed);
        }
        Tried::Smaller(most)
    }

    /// Looks at each of `items`, in their order, for all that fail.
    fn search(&mut self, items: &mut Vec<Item>) -> Tried {
        for item in items.iter_mut() {
            item.on(Event::BatchFailed);
        }
        let opened = self.begin(items).and_then(|()| self.record(items));
        if let Err(error) = opened {
            return self.undo(items, error, Stage::Ledger);
        }
        let most = self.room_before_pause();
        let found = self.with_handler(items, |handler, session, work| {
            handler.faults(session, work, most)
        });
        let mut faults = match found {
            Ok(faults) => faults,
            Err(error) => return self.undo(items, error, Stage::Handler),
        };
        for (_, failure) in &mut faults {
            self.classify(failure);
        }
        let of_the_world = |(_, failure): &(usize, Failure)| failure.class == Class::Systemic;
        if let Some((_, failure)) = faults.extract_if(.., |fault| of_the_world(fault)).next() {
            return self.undo(items, Error::Refused(failure), Stage::Handler);
        }
        self.ledger.rollback();
        if faults.is_empty() {
            // It takes several of them to fail.
            let half = items.len().div_ceil(2);
            return self.run_smaller(items, half);
        }
        self.leave_out(items, faults);
        match items.is_empty() {
            true => Tried::Through,
            false => Tried::Again,
        }
    }

    /// How many more messages may fail before the consumer pauses: what would
    /// fail after that is left to another time.
    fn room_before_pause(&self) -> usize {
        match self.shared.consumer.retry.breaker as usize {
            0 => usize::MAX,
            breaker => breaker.saturating_sub(self.failed.len()).max(1),
        }
    }

    /// Takes out what failed, in the order of its places, and has the others run
    /// again.
    fn leave_out(&mut self, items: &mut Vec<Item>, faults: Vec<(usize, Failure)>) {
        let mut faults = faults.into_iter().peekable();
        for (place, mut item) in std::mem::take(items).into_iter().enumerate() {
            match faults.next_if(|(at, _)| *at == place) {
                Some((_, failure)) => {
                    let mut alone = vec![item];
                    self.blame(&mut alone, failure);
                    items.append(&mut alone);
                }
                None => {
                    item.on(Event::BatchFailed);
                    items.push(item);
                }
            }
        }
    }

    /// The transaction lost a race: it is run again as it was.
    pub(super) fn collide(&mut self, items: &mut [Item], failure: &Failure) -> Tried {
        self.races += 1;
        self.shared.signs.meter.reran(RerunCause::Race);
        let turn = self.shared.contention.collided(Instant::now());
        self.say_turn(turn, failure.code.as_deref());
        let wait = Duration::from_micros(random::draw() % RACE_WAIT_US);
        if self.races.is_multiple_of(RACES_MAX) && items.len() > 1 {
            let half = items.len().div_ceil(2);
            self.shared.contention.shrink(half, Instant::now());
            return self.run_smaller(items, half);
        }
        for item in items.iter_mut() {
            item.races += 1;
            item.on(Event::BatchFailed);
        }
        // A stop does not wait for it either.
        let _stopping = self.shared.stop.wait(wait);
        Tried::Again
    }

    /// Whether one transaction is to be open at a time.
    pub(super) fn is_single_file(&self) -> bool {
        let (is_single, turn) = self.shared.contention.is_single_file(Instant::now());
        self.say_turn(turn, None);
        is_single
    }

    fn say_turn(&self, turn: Option<Turn>, code: Option<&str>) {
        let consumer = self.shared.consumer.name.as_str();
        let Some(turn) = turn else { return };
        self.shared.signs.meter.single_file(turn != Turn::Parallel);
        match turn {
            Turn::SingleFile(length) => log::warn!(
                consumer = consumer, code = code.unwrap_or_default();
                "transactions collide: one at a time for {} s; see \"Hot rows\" in \
                 docs/failures.md",
                length.as_secs()
            ),
            Turn::Parallel => log::info!(
                consumer = consumer;
                "transactions have not collided for a while: side by side again"
            ),
        }
    }
}

/// Whether the message that was cut short took most of the transaction's time.
fn is_slow_itself(items: &[Item], took: Option<Duration>) -> bool {
    let all = items.iter().find_map(|item| item.duration);
    took.zip(all).is_some_and(|(took, all)| took * 2 >= all)
}
