//! The way of a batch through one worker: take, identify, claim, record,
//! apply, commit, mark, settle.
//!
//! What each outcome means is [`crate::lifecycle`]'s to say; this file does
//! the I/O it asks for, for a whole batch at once. A batch is only an
//! optimisation: one that fails is rolled back and halved until the message at
//! fault stands alone.

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
use crate::handler::{Handler, Work};
use crate::identity;
use crate::ledger::{CommitError, JournalEntry, Ledger, Record};
use crate::lifecycle::{self, Action, Body, Event, State};
use crate::message::{DeadReason, Delivery, Fingerprint, MessageId, Settled, Settlement};
use crate::postgres::Error;
use crate::stop::Stop;

/// Most body bytes in one transaction; a single larger message stands alone.
const BATCH_BYTES_MAX: usize = 16 << 20;

/// Tries of the handler for one message whose failure may pass: with the
/// waits between them about two seconds for one that fails at once.
const ATTEMPTS_MAX: u32 = 5;

/// One delivery on its way.
#[derive(Debug)]
pub struct Item {
    delivery: Delivery,
    /// `None` when it has no usable id.
    id: Option<MessageId>,
    fingerprint: Fingerprint,
    state: State,
    attempt: u32,
    token: Option<Token>,
    failure: Option<Failure>,
}

impl Item {
    fn new(delivery: Delivery) -> Self {
        Self {
            fingerprint: identity::fingerprint(&delivery.message.body),
            delivery,
            id: None,
            state: State::Received,
            attempt: 1,
            token: None,
            failure: None,
        }
    }

    /// Moves on, and says what is to be done. A defect of this file, an event
    /// that cannot happen, gives the delivery back: it is never acked.
    fn on(&mut self, event: Event) -> &'static [Action] {
        match lifecycle::step(self.state, event) {
            Ok((state, actions)) => {
                self.state = state;
                actions
            }
            Err(illegal) => {
                log::error!("gave a delivery back: {illegal}");
                self.state = State::Settled(Settlement::Requeue);
                &[Action::Release, Action::Settle(Settlement::Requeue)]
            }
        }
    }

    fn compare(&self, fingerprint: Fingerprint) -> Body {
        if self.fingerprint == fingerprint {
            Body::Same
        } else {
            Body::Other
        }
    }

    fn failure(&self) -> Failure {
        self.failure.clone().unwrap_or(Failure {
            class: Class::Permanent,
            code: None,
            text: "another message with this id and another body is in the ledger".to_owned(),
        })
    }
}

/// What a worker shares with the rest of its consumer.
#[derive(Clone)]
pub struct Shared {
    /// Deliveries from the broker thread.
    pub inbox: Receiver<Delivery>,
    /// Settlements to the broker thread.
    pub outbox: Sender<Settled>,
    /// Ids in flight in this consumer.
    pub flights: Arc<Flights<Item>>,
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
    /// Deliveries whose ledger row was pruned while it was looked at.
    vanished: Vec<Item>,
    /// What the current batch has decided and not yet told.
    verdict: Verdict,
}

#[derive(Default)]
struct Verdict {
    done: Vec<(MessageId, Fingerprint)>,
    released: Vec<(Token, MessageId)>,
    settled: Vec<Settled>,
    dead: Vec<Item>,
}

/// How one try of a batch in one transaction ended.
enum Tried {
    /// Every item has been dealt with.
    Through,
    /// Somebody in the batch is at fault.
    Split,
    /// Nobody is: the same again, after a while.
    Wait(Failure),
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
            vanished: Vec::new(),
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
                    let entered = self.shared.flights.enter(&id, item, |joining| {
                        joining.on(Event::Collided);
                    });
                    if let Some(mut item) = entered {
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
        let (token, mut recording) = self.claim(claiming);
        recording.sort_unstable_by(|a, b| a.id.cmp(&b.id));
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

    /// 4 to 6. Applies `items`, which are sorted by id, in as few transactions
    ///    as the messages at fault allow.
    fn apply(&mut self, mut items: Vec<Item>) {
        let mut tries = 0;
        while !items.is_empty() {
            match self.attempt(&mut items) {
                Tried::Through => items.append(&mut self.vanished),
                Tried::Split => {
                    let rest = items.split_off(items.len() / 2);
                    self.apply(items);
                    items = rest;
                }
                Tried::Wait(failure) => {
                    tries += 1;
                    // What is decided must not wait for what is not.
                    self.tell();
                    if self.pause(tries, &failure) {
                        for item in items.drain(..) {
                            self.advance(item, Event::Stopping);
                        }
                    }
                }
            }
        }
    }

    /// One transaction. Items that are dealt with leave `items`.
    fn attempt(&mut self, items: &mut Vec<Item>) -> Tried {
        match self.record(items) {
            Ok(()) => {}
            Err(error) => return self.undo(items, error, false),
        }
        failpoint::hit(Step::Recorded);
        if items.is_empty() {
            self.ledger.rollback();
            return Tried::Through;
        }
        match self.run_handler(items) {
            Ok(()) => {}
            Err(error) => return self.undo(items, error, true),
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
            Err(CommitError::Refused(failure)) => self.undo(items, Error::Refused(failure), true),
            Err(CommitError::Unknown(cause)) => {
                for item in items.iter_mut() {
                    item.on(Event::CommitUnknown);
                }
                Tried::Wait(Error::Lost(cause).into_failure())
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
                Record::Vanished => self.vanished.push(item),
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
    fn undo(&mut self, items: &mut Vec<Item>, error: Error, handler_ran: bool) -> Tried {
        match &error {
            Error::Lost(_) => self.ledger.lost(),
            Error::Refused(_) => self.ledger.rollback(),
        }
        let failure = error.into_failure();
        let batch_at_fault =
            failure.class != Class::Systemic && (handler_ran || failure.class == Class::Permanent);
        if !batch_at_fault {
            for item in items.iter_mut() {
                item.on(Event::Failed(Class::Systemic));
            }
            return Tried::Wait(failure);
        }
        if items.len() > 1 {
            for item in items.iter_mut() {
                item.on(Event::BatchFailed);
            }
            return Tried::Split;
        }
        for mut item in std::mem::take(items) {
            item.failure = Some(failure.clone());
            match failure.class {
                Class::Permanent => self.advance(item, Event::Failed(Class::Permanent)),
                _ if item.attempt >= ATTEMPTS_MAX => {
                    item.on(Event::Failed(failure.class));
                    self.advance(item, Event::Exhausted);
                }
                class => {
                    item.on(Event::Failed(class));
                    item.attempt += 1;
                    items.push(item);
                    return Tried::Wait(failure);
                }
            }
        }
        Tried::Through
    }

    /// Waits before the next try. True when the daemon stops.
    fn pause(&self, tries: u32, failure: &Failure) -> bool {
        let consumer = self.shared.consumer.name.as_str();
        let delay = self
            .shared
            .backoff
            .delay(tries, getrandom::u64().unwrap_or(u64::MAX));
        if tries == 1 && failure.class == Class::Systemic {
            log::warn!(consumer = consumer, code = failure.code.as_deref().unwrap_or(""); "waiting: {failure}");
        }
        let stopping = self.shared.stop.wait(delay);
        if stopping {
            log::info!(consumer = consumer; "gives back what waits for {failure}");
        }
        stopping
    }

    /// Moves an item on and keeps what that decided.
    fn advance(&mut self, mut item: Item, event: Event) {
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
            State::Received
            | State::Joined
            | State::Recording
            | State::Recorded
            | State::Applied => {
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
        });
        let Some(id) = item.id else { return };
        if settlement == Settlement::Ack {
            for joined in self.shared.flights.leave(&id) {
                let body = joined.compare(item.fingerprint);
                self.advance(joined, Event::OwnerApplied(body));
            }
        } else if let Some(heir) = self.shared.flights.hand_over(&id) {
            let event = match self.shared.stop.is_set() {
                true => Event::Stopping,
                false => Event::OwnerGaveUp,
            };
            self.advance(heir, event);
        }
    }

    /// 7 and 8. Tells Redis, the journal and the broker, in that order: what
    ///    the broker has been told cannot be done again.
    fn tell(&mut self) {
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
                    tries += 1;
                    if self.pause(tries, &error.into_failure()) {
                        break Event::Stopping;
                    }
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
                    reason,
                    failure,
                    attempt: if reason == DeadReason::Rejected {
                        item.attempt
                    } else {
                        0
                    },
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
                reason = entry.reason.as_str(),
                code = entry.failure.code.as_deref().unwrap_or("");
                "dead-lettered"
            );
        }
        Ok(())
    }

    /// Gives back what waits, because the daemon stops.
    fn hand_back(&mut self) {
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

fn usable_id(item: &Item, consumer: &checked::Consumer) -> Result<MessageId, (DeadReason, String)> {
    let message = &item.delivery.message;
    if message.body.len() > consumer.max_body {
        let text = format!(
            "the body has {} bytes, max_body allows {}",
            message.body.len(),
            consumer.max_body
        );
        return Err((DeadReason::TooLarge, text));
    }
    identity::identify(message, &consumer.identity).map_err(|reason| {
        let text = match reason {
            DeadReason::BadHeader => "its id stands in bytes that are not valid AMQP",
            _ => "it has no usable id where `identity` looks for one",
        };
        (reason, text.to_owned())
    })
}
