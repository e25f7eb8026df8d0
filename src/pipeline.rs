//! The way of a batch through one worker: take, identify, claim, record,
//! apply, commit, mark, settle.
//!
//! What each outcome means is [`crate::lifecycle`]'s to say; this file does
//! the I/O it asks for, for a whole batch at once. A batch is only an
//! optimisation: one that fails is rolled back and halved until the message at
//! fault stands alone.

mod item;
mod verdict;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use crate::backoff::Backoff;
use crate::claim::{Claim, Claims, Token};
use crate::config::checked;
use crate::failpoint::{self, Step};
use crate::failure::{Class, Failure};
use crate::flights::Flights;
use crate::gate::Gate;
use crate::handler::{Handler, Work};
use crate::ledger::{CommitError, Ledger, Record};
use crate::lifecycle::Event;
use crate::message::{Delivery, Fingerprint, MessageId, Settled};
use crate::postgres::Error;
use crate::random;
use crate::stop::Stop;

pub use item::Item;
use item::usable_id;
use verdict::Verdict;

/// Most body bytes in one transaction; a single larger message stands alone.
const BATCH_BYTES_MAX: usize = 16 << 20;

/// Tries of the handler for one message whose failure may pass: with the
/// waits between them about two seconds for one that fails at once.
const ATTEMPTS_MAX: u32 = 5;

/// What a worker shares with the rest of its consumer.
#[derive(Clone)]
pub struct Shared {
    /// Deliveries from the broker thread.
    pub inbox: Receiver<Delivery>,
    /// Settlements to the broker thread.
    pub outbox: Sender<Settled>,
    /// Ids in flight in this consumer.
    pub flights: Arc<Flights<Item>>,
    /// Whether the consumer takes messages.
    pub gate: Arc<Gate>,
    /// Whether to finish what is begun and begin nothing more.
    pub stop: Stop,
    /// The consumer's configuration.
    pub consumer: Arc<checked::Consumer>,
    /// Waits between tries when a server is away.
    pub backoff: Backoff,
}

/// One worker thread's own things.
pub struct Worker {
    shared: Shared,
    ledger: Ledger,
    claims: Option<Claims>,
    handler: Box<dyn Handler>,
    /// Ids claimed elsewhere, each with the time to look again.
    parked: Vec<(Instant, Item)>,
    /// Deliveries whose owner gave up: theirs is the next turn.
    heirs: VecDeque<Item>,
    /// Deliveries for the next transaction of the current batch.
    again: Vec<Item>,
    /// What the current batch has decided and not yet told.
    verdict: Verdict,
}

/// How often a batch that fails for a fault of the world's is tried whole,
/// before its halves are tried each for itself.
const TRIES_TOGETHER: u32 = 3;

/// Where a try failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Before the handler: nothing of the message's content was looked at.
    Ledger,
    /// In the handler, or in the commit of what it did.
    Handler,
}

/// How one try of a batch in one transaction ended.
enum Tried {
    /// Every item has been dealt with.
    Through,
    /// Somebody in the batch is at fault.
    Split,
    /// Nobody is: the same again, after a while.
    Wait(Failure, Stage),
}

impl Worker {
    /// A worker that has not begun.
    #[must_use]
    pub fn new(
        shared: Shared,
        ledger: Ledger,
        claims: Option<Claims>,
        handler: Box<dyn Handler>,
    ) -> Self {
        Self {
            shared,
            ledger,
            claims,
            handler,
            parked: Vec::new(),
            heirs: VecDeque::new(),
            again: Vec::new(),
            verdict: Verdict::default(),
        }
    }

    /// Works until the broker thread has closed the inbox.
    pub fn run(mut self) {
        while let Some(deliveries) = self.take() {
            let fresh = self.identify(deliveries);
            let due = self.look_again();
            let heirs = std::mem::take(&mut self.heirs);
            let claiming: Vec<Item> = fresh.into_iter().chain(due).chain(heirs).collect();
            let token = self.process(claiming);
            self.tell();
            if let (Some(claims), Some(token)) = (&mut self.claims, &token) {
                claims.finish(token);
            }
            if self.shared.stop.is_set() {
                self.hand_back();
            }
        }
        self.hand_back();
    }

    /// 1. Takes what is waiting, up to a full batch, and never waits to fill
    ///    it. Empty when only parked deliveries are due.
    fn take(&mut self) -> Option<Vec<Delivery>> {
        let first = if self.heirs.is_empty() {
            let wait = self.next_due().unwrap_or(Duration::from_secs(3600));
            match self.shared.inbox.recv_timeout(wait) {
                Ok(delivery) => Some(delivery),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        } else {
            None
        };
        let mut bytes = 0;
        let mut batch = Vec::new();
        batch.extend(first.inspect(|d| bytes += d.message.body.len()));
        while batch.len() < self.shared.consumer.batch_max && bytes < BATCH_BYTES_MAX {
            let Ok(delivery) = self.shared.inbox.try_recv() else {
                break;
            };
            bytes += delivery.message.body.len();
            batch.push(delivery);
        }
        if !batch.is_empty() {
            failpoint::hit(Step::Received);
        }
        Some(batch)
    }

    fn next_due(&self) -> Option<Duration> {
        let due = self.parked.iter().map(|(at, _)| *at).min()?;
        Some(due.saturating_duration_since(Instant::now()))
    }

    /// 2. Finds ids and fingerprints. What another worker is busy with joins it.
    fn identify(&mut self, deliveries: Vec<Delivery>) -> Vec<Item> {
        let consumer = Arc::clone(&self.shared.consumer);
        let mut fresh = Vec::with_capacity(deliveries.len());
        for delivery in deliveries {
            let mut item = Item::new(delivery);
            if self.shared.stop.is_set() {
                self.advance(item, Event::Stopping);
                continue;
            }
            match usable_id(&item, &consumer) {
                Ok(id) => {
                    item.id = Some(id.clone());
                    // The broker thread would drop the older one's settlement.
                    let is_void = |old: &Item, new: &Item| old.epoch() < new.epoch();
                    let entered = self.shared.flights.enter(&id, item, is_void, |joining| {
                        joining.on(Event::Collided);
                    });
                    if let Some(mut item) = entered {
                        item.owner = true;
                        item.on(Event::Identified);
                        fresh.push(item);
                    }
                }
                Err((reason, text)) => {
                    item.failure = Some(Failure {
                        class: Class::Permanent,
                        code: None,
                        text,
                    });
                    self.advance(item, Event::Unusable(reason));
                }
            }
        }
        fresh
    }

    /// Parked deliveries that are due and that the ledger cannot decide.
    fn look_again(&mut self) -> Vec<Item> {
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.parked)
            .into_iter()
            .partition(|(at, _)| *at <= now);
        self.parked = later;
        let ids: Vec<&str> = due
            .iter()
            .filter_map(|(_, item)| item.id.as_ref().map(MessageId::as_str))
            .collect();
        let found = match ids.is_empty() {
            true => return Vec::new(),
            // Not known is as good as not found: Redis is asked next.
            false => self.ledger.find(&ids).unwrap_or_default(),
        };
        let mut undecided = Vec::new();
        for (_, mut item) in due {
            let known = item.id.as_ref().and_then(|id| found.get(id.as_str()));
            match known.map(|print| item.compare(*print)) {
                Some(body) => self.advance(item, Event::Found(body)),
                None => {
                    item.on(Event::LookAgain);
                    undecided.push(item);
                }
            }
        }
        undecided
    }

    fn process(&mut self, claiming: Vec<Item>) -> Option<Token> {
        let (token, recording) = self.claim(claiming);
        self.apply(recording);
        token
    }

    /// 3. Claims the ids in Redis, and goes on without where Redis is away.
    fn claim(&mut self, mut items: Vec<Item>) -> (Option<Token>, Vec<Item>) {
        if items.is_empty() {
            return (None, items);
        }
        let answer = self.ask_redis(&items);
        failpoint::hit(Step::Claimed);
        let Some((token, answers)) = answer else {
            for item in &mut items {
                item.on(Event::ClaimUnavailable);
            }
            return (None, items);
        };
        let mut recording = Vec::with_capacity(items.len());
        for (mut item, answer) in items.into_iter().zip(answers) {
            match answer {
                Claim::Won => {
                    item.token = Some(token.clone());
                    item.on(Event::ClaimWon);
                    recording.push(item);
                }
                Claim::Done(_) if self.shared.consumer.confirm_duplicates => {
                    item.on(Event::ClaimUnavailable);
                    recording.push(item);
                }
                Claim::Done(print) => {
                    let body = item.compare(print);
                    self.advance(item, Event::MarkedDone(body));
                }
                Claim::Held => self.advance(item, Event::ClaimHeld),
            }
        }
        (Some(token), recording)
    }

    fn ask_redis(&mut self, items: &[Item]) -> Option<(Token, Vec<Claim>)> {
        let claims = self.claims.as_mut()?;
        // Without a ledger there is no telling whose marks to believe.
        let registration = self.ledger.connect().ok()?;
        claims.set_ledger(&registration.ledger_id);
        let ids: Vec<&MessageId> = items.iter().filter_map(|item| item.id.as_ref()).collect();
        claims.claim(&ids)
    }

    /// 4 to 6. Applies `items` in as few transactions as the messages at fault
    ///    allow. What has to wait goes behind what need not.
    fn apply(&mut self, items: Vec<Item>) {
        let mut groups = VecDeque::from([items]);
        let mut tries = 0;
        while let Some(mut items) = groups.pop_front() {
            items.sort_unstable_by(|a, b| a.id.cmp(&b.id));
            let tried = self.attempt(&mut items);
            items.append(&mut self.again);
            match tried {
                Tried::Through if items.is_empty() => {}
                Tried::Through => groups.push_front(items),
                Tried::Split => {
                    let rest = items.split_off(items.len() / 2);
                    groups.push_front(rest);
                    groups.push_front(items);
                }
                Tried::Wait(failure, stage) => {
                    // What is decided must not wait for what is not.
                    self.tell();
                    if self.pause(tries, &failure) {
                        for item in items.into_iter().chain(groups.drain(..).flatten()) {
                            self.advance(item, Event::Stopping);
                        }
                        return;
                    }
                    // The world may be broken for one message alone.
                    if stage == Stage::Handler && tries >= TRIES_TOGETHER && items.len() > 1 {
                        groups.push_back(items.split_off(items.len() / 2));
                    }
                    groups.push_back(items);
                    tries += 1;
                }
            }
        }
    }

    /// One transaction. Items that are dealt with leave `items`.
    fn attempt(&mut self, items: &mut Vec<Item>) -> Tried {
        match self.record(items) {
            Ok(()) => {}
            Err(error) => return self.undo(items, error, Stage::Ledger),
        }
        failpoint::hit(Step::Recorded);
        if items.is_empty() {
            self.ledger.rollback();
            return Tried::Through;
        }
        match self.run_handler(items) {
            Ok(()) => {}
            Err(error) => return self.undo(items, error, Stage::Handler),
        }
        failpoint::hit(Step::Applied);
        match self.ledger.commit() {
            Ok(()) => {
                failpoint::hit(Step::Committed);
                for item in items.drain(..) {
                    self.advance(item, Event::Committed);
                }
                Tried::Through
            }
            Err(CommitError::Refused(failure)) => {
                self.undo(items, Error::Refused(failure), Stage::Handler)
            }
            Err(CommitError::Unknown(cause)) => {
                for item in items.iter_mut() {
                    item.on(Event::CommitUnknown);
                }
                Tried::Wait(Error::Lost(cause).into_failure(), Stage::Ledger)
            }
        }
    }

    /// 4. Inserts the ledger rows. Duplicates and conflicts leave `items`.
    fn record(&mut self, items: &mut Vec<Item>) -> Result<(), Error> {
        self.ledger.begin()?;
        let entries: Vec<(&MessageId, Fingerprint)> = items
            .iter()
            .filter_map(|item| Some((item.id.as_ref()?, item.fingerprint)))
            .collect();
        let records = self.ledger.record(&entries)?;
        for (mut item, record) in std::mem::take(items).into_iter().zip(records) {
            match record {
                Record::Inserted => {
                    item.on(Event::Inserted);
                    items.push(item);
                }
                Record::Found(print) => {
                    let body = item.compare(print);
                    self.advance(item, Event::Found(body));
                }
                Record::Vanished => self.again.push(item),
            }
        }
        Ok(())
    }

    /// 5. Runs the handler on the fresh messages.
    fn run_handler(&mut self, items: &mut [Item]) -> Result<(), Error> {
        let work: Vec<Work<'_>> = items
            .iter()
            .filter_map(|item| {
                Some(Work {
                    message_id: item.id.as_ref()?,
                    message: &item.delivery.message,
                    attempt: item.attempt,
                })
            })
            .collect();
        self.handler.apply(self.ledger.session()?, &work)?;
        for item in items {
            item.on(Event::Succeeded);
        }
        Ok(())
    }

    /// Rolls back and finds out what the error asks for.
    fn undo(&mut self, items: &mut Vec<Item>, error: Error, stage: Stage) -> Tried {
        let lost = !matches!(error, Error::Refused(_));
        let failure = error.into_failure();
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
        if !at_fault {
            for item in items.iter_mut() {
                item.on(Event::Failed(Class::Systemic));
            }
            return Tried::Wait(failure, stage);
        }
        if items.len() > 1 {
            for item in items.iter_mut() {
                item.on(Event::BatchFailed);
            }
            return Tried::Split;
        }
        for mut item in items.drain(..) {
            item.failure = Some(failure.clone());
            let exhausted = failure.class == Class::Transient && item.attempt >= ATTEMPTS_MAX;
            item.attempt += u32::from(failure.class == Class::Transient && !exhausted);
            if exhausted {
                item.on(Event::Failed(failure.class));
                self.advance(item, Event::Exhausted);
            } else {
                self.advance(item, Event::Failed(failure.class));
            }
        }
        match self.again.is_empty() {
            true => Tried::Through,
            false => Tried::Wait(failure, stage),
        }
    }

    /// Waits before the next try. True when the daemon stops.
    fn pause(&self, tries: u32, failure: &Failure) -> bool {
        let delay = self.shared.backoff.delay(tries, random::draw());
        // A wait that lasts is told again, ever more rarely.
        if tries == 0 || tries.is_power_of_two() {
            let text = match failure.class {
                Class::Systemic => failure.text.as_str(),
                // It is about a message, and may quote it.
                Class::Transient | Class::Permanent => "a failure that may pass",
            };
            log::warn!(
                consumer = self.shared.consumer.name.as_str(),
                code = failure.code.as_deref().unwrap_or(""),
                tries = tries + 1;
                "waiting: {text}"
            );
        }
        self.shared.stop.wait(delay)
    }
}
