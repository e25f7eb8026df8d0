//! The way of a message whose handler works outside the database: claim in the
//! ledger, commit, call, complete.
//!
//! One thread, the foreman, does for the whole consumer what each worker does
//! for itself elsewhere: it takes deliveries, claims them, and completes what
//! the crew has called, as many as there are at that moment in one
//! transaction. The crew's threads only call. So a slow call holds up nobody
//! beside it, and a consumer has two sessions with the database, however many
//! workers it has.

mod told;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, TrySendError, never, select};

use super::apply::{GIVE_BACK_AFTER, PROBES_MAX, Stage};
use super::crew::{Answer, Crew, Outcome, Pace};
use super::item::Item;
use super::leases::Leases;
use super::{BATCH_BYTES_MAX, GROWING_MAX, GROWING_STEP, Hands, Shared, Worker};
use crate::claim::{Claims, Token};
use crate::failpoint::{self, Step};
use crate::failure::{Class, Failure};
use crate::handler::Keyed;
use crate::ledger::Ledger;
use crate::lifecycle::Event;
use crate::message::{Delivery, MessageId};
use crate::observe::metrics::LedgerStep;
use crate::random;

/// What the crew does in this time is claimed before it asks for it. A message
/// that takes longer is claimed when there is somebody to call it.
const AHEAD: Duration = Duration::from_millis(20);

/// Longest wait that a handler's failure can ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60 * 60);

/// Longest wait for something to happen.
const IDLE: Duration = Duration::from_secs(3600);

/// Tries in vain, and when the next one is due.
#[derive(Debug, Default)]
struct Rest {
    tries: u32,
    until: Option<Instant>,
}

impl Rest {
    fn is_over(&self) -> bool {
        self.until.is_none_or(|until| until <= Instant::now())
    }

    fn left(&self) -> Duration {
        let until = self
            .until
            .map(|at| at.saturating_duration_since(Instant::now()));
        until.unwrap_or_default()
    }

    fn begin(&mut self, wait: Duration) {
        self.until = Some(Instant::now() + wait);
        self.tries = self.tries.saturating_add(1);
    }
}

/// What a consumer with a keyed handler is run by.
pub struct Foreman {
    worker: Worker,
    crew: Crew,
    leases: Leases,
    /// How long a call takes.
    pace: Pace,
    /// How long completing and claiming takes, together.
    round: Pace,
    /// How many messages are with the crew.
    out: usize,
    /// Their claims in Redis.
    out_tokens: HashMap<Token, usize>,
    /// To be claimed in the ledger.
    unclaimed: Vec<Item>,
    /// Claimed; to be called again when the world may be mended.
    waiting: VecDeque<Item>,
    /// To be called with nothing beside them, claimed or not yet.
    alone: VecDeque<Item>,
    /// One of those is with the crew.
    alone_out: bool,
    /// Called; to be completed.
    called: Vec<Item>,
    /// The ledger could not be told.
    ledger_rest: Rest,
    /// The handler met a broken world.
    world_rest: Rest,
    /// The broker thread has closed the inbox.
    closed: bool,
}

impl Foreman {
    /// Starts the crew, one thread for each of `handlers`, and the threads that
    /// keep its claims. `ledgers` are the foreman's own and theirs.
    ///
    /// # Errors
    ///
    /// When a thread cannot be started.
    pub fn new(
        shared: Shared,
        ledgers: [Ledger; 2],
        claims: Option<Claims>,
        handlers: Vec<Box<dyn Keyed>>,
        panicked: &Sender<()>,
    ) -> anyhow::Result<Self> {
        let kind = handlers.first().map_or("", |handler| handler.kind());
        let [own, keeping] = ledgers.map(Ledger::by_index);
        let (stop, allowed) = (shared.stop.clone(), shared.shutdown_timeout);
        let signs = &shared.signs;
        let leases = Leases::start(&shared.consumer, stop, allowed, keeping, signs, panicked)?;
        // Every delivery of the current connection and of the one before it.
        let most = 2 * usize::from(shared.consumer.prefetch);
        let crew = Crew::start(&shared, handlers, most, panicked)?;
        Ok(Self {
            worker: Worker::new(shared, own, claims, Hands::Crew(kind)),
            crew,
            leases,
            pace: Pace::default(),
            round: Pace::default(),
            out: 0,
            out_tokens: HashMap::new(),
            unclaimed: Vec::new(),
            waiting: VecDeque::new(),
            alone: VecDeque::new(),
            alone_out: false,
            called: Vec::new(),
            ledger_rest: Rest::default(),
            world_rest: Rest::default(),
            closed: false,
        })
    }

    /// Works until the broker thread has closed the inbox and the crew has come
    /// to an end, or the time for that is over.
    pub fn run(mut self) {
        loop {
            let first = self.wait();
            let begun = Instant::now();
            self.collect();
            self.complete();
            self.conclude();
            self.worker.tell();
            let deliveries = self.fill(first);
            let fresh = self.worker.identify(deliveries);
            if self.is_ending() {
                for item in fresh {
                    self.worker.advance(item, Event::Stopping);
                }
                self.give_everything_back();
                let through = self.out == 0 && self.called.is_empty() && self.closed;
                if through || self.is_out_of_time() {
                    break;
                }
                continue;
            }
            let due = self.worker.look_again();
            let heirs = std::mem::take(&mut self.worker.heirs);
            let claiming = fresh.into_iter().chain(due).chain(heirs).collect();
            let claimed = self.worker.claim(claiming);
            self.unclaimed.extend(claimed);
            self.unclaimed.append(&mut self.worker.again);
            self.claim();
            self.try_waiting();
            self.try_alone();
            self.worker.tell();
            self.finish_tokens();
            self.round.saw(begun.elapsed());
        }
        for item in std::mem::take(&mut self.called) {
            log::warn!(
                consumer = self.worker.shared.consumer.name.as_str(),
                message_id = item.id.as_ref().map_or("", MessageId::as_str);
                "applied, and the ledger could not be told before the stop: it will be applied \
                 again with the same key"
            );
            self.worker.advance(item, Event::Stopping);
        }
        self.worker.hand_back();
    }

    fn is_ending(&self) -> bool {
        self.closed || self.worker.shared.stop.is_set()
    }

    fn is_out_of_time(&self) -> bool {
        let shared = &self.worker.shared;
        shared.stop.is_set() && shared.stop.left_of(shared.shutdown_timeout).is_zero()
    }

    /// Waits for the next thing to do, which may be a delivery.
    fn wait(&mut self) -> Option<Delivery> {
        let inbox = match self.room() > 0 && !self.closed {
            true => self.worker.shared.inbox.clone(),
            false => never(),
        };
        let ending = self.is_ending();
        let wait = self.next_due();
        let stop = self.worker.shared.stop.clone();
        let (mut delivery, mut answer) = (None, None);
        match ending {
            true => select! {
                recv(inbox) -> one => delivery = Some(one),
                recv(self.crew.answers) -> one => answer = one.ok(),
                default(wait) => {}
            },
            false => select! {
                recv(inbox) -> one => delivery = Some(one),
                recv(self.crew.answers) -> one => answer = one.ok(),
                recv(stop.as_receiver()) -> _ => {}
                default(wait) => {}
            },
        }
        self.closed |= matches!(delivery, Some(Err(_)));
        if let Some(answer) = answer {
            self.hear(answer);
        }
        self.let_them_gather();
        delivery?.ok()
    }

    /// A transaction costs about as much for one message as for ten: while the
    /// crew has enough to do until it gets more, what it has done may gather for
    /// a moment.
    fn let_them_gather(&self) {
        let enough = self.worker.shared.consumer.batch_max / 2;
        let meanwhile = self.pace.calls_in(self.round.average(), self.crew.size);
        let needed = self.crew.size + meanwhile;
        for _ in 0..GROWING_MAX {
            let busy = self.crew.uncalled.len() > needed;
            if !busy || self.crew.answers.len() >= enough || self.worker.shared.stop.is_set() {
                return;
            }
            std::thread::sleep(GROWING_STEP);
        }
    }

    /// As many deliveries as there is room for, now that it is known who of the
    /// crew is free, and `first` in any case.
    fn fill(&mut self, first: Option<Delivery>) -> Vec<Delivery> {
        let room = self.room();
        let mut batch: Vec<Delivery> = first.into_iter().collect();
        let mut bytes: usize = batch.iter().map(|d| d.message.body.len()).sum();
        while batch.len() < room && bytes < BATCH_BYTES_MAX {
            let Ok(delivery) = self.worker.shared.inbox.try_recv() else {
                break;
            };
            bytes += delivery.message.body.len();
            batch.push(delivery);
        }
        if !batch.is_empty() {
            self.worker.shared.signs.meter.took(batch.len());
            failpoint::hit(Step::Received);
        }
        batch
    }

    /// How many messages may be begun.
    fn room(&self) -> usize {
        let most = self.worker.shared.consumer.batch_max;
        if self.is_ending() {
            return most;
        }
        let behind = !self.unclaimed.is_empty() || !self.called.is_empty();
        if behind || !self.ledger_rest.is_over() || !self.alone.is_empty() || self.alone_out {
            return 0;
        }
        if self.worker.shared.gate.is_closed() {
            // One at a time, to find out whether the world is mended.
            let may = self.world_rest.is_over() && self.out == 0 && self.waiting.len() < PROBES_MAX;
            return usize::from(may);
        }
        let ahead = self.pace.calls_in(AHEAD, self.crew.size).min(most);
        // Who has answered is free, heard or not.
        let called = self.out.saturating_sub(self.crew.answers.len());
        let held = called + self.waiting.len();
        (self.crew.size + ahead).saturating_sub(held).min(most)
    }

    fn next_due(&self) -> Duration {
        let rested = self.ledger_rest.is_over() && self.world_rest.is_over();
        let now = !self.worker.heirs.is_empty()
            || !self.worker.again.is_empty()
            || (self.out == 0 && rested && !(self.alone.is_empty() && self.waiting.is_empty()));
        if now {
            return Duration::ZERO;
        }
        let parked = self.worker.next_due();
        let behind = !self.unclaimed.is_empty() || !self.called.is_empty();
        let ledger = (behind || !self.ledger_rest.is_over()).then(|| self.ledger_rest.left());
        let world = (!self.world_rest.is_over()).then(|| self.world_rest.left());
        let stop = &self.worker.shared.stop;
        let stopping = stop
            .is_set()
            .then(|| stop.left_of(self.worker.shared.shutdown_timeout));
        let due = [parked, ledger, world, stopping]
            .into_iter()
            .flatten()
            .min();
        due.unwrap_or(IDLE).min(IDLE)
    }

    /// Takes everything that the crew has come back with.
    fn collect(&mut self) {
        let answers: Vec<Answer> = self.crew.answers.try_iter().collect();
        for answer in answers {
            self.hear(answer);
        }
    }

    fn hear(&mut self, answer: Answer) {
        let mut item = *answer.item;
        self.is_back(&item);
        match answer.outcome {
            Outcome::NotCalled => self.lost(item),
            Outcome::Returned(result) => {
                let took = item.duration.unwrap_or_default();
                self.worker.shared.signs.meter.handled(took);
                self.pace.saw(took);
                match result {
                    Ok(()) => {
                        item.on(Event::Succeeded);
                        self.called.push(item);
                    }
                    Err(failure) => self.failed(item, failure),
                }
            }
        }
    }

    /// The claim is not ours any more, as far as is known: it is asked for
    /// again, under another owner.
    fn lost(&mut self, mut item: Item) {
        item.forget_lease();
        item.on(Event::LeaseLost);
        self.unclaimed.push(item);
    }

    fn failed(&mut self, mut item: Item, mut failure: Failure) {
        let code = failure.code.as_deref().unwrap_or("");
        if let Some(class) = self.worker.shared.consumer.failures.class_of(code) {
            failure.class = class;
        }
        let (kept, cancelled) = match &item.lease {
            Some(lease) => (lease.is_kept(), lease.cancelled.is_set()),
            None => (false, false),
        };
        if !kept {
            // Somebody else may be at it: this attempt does not count.
            return self.lost(item);
        }
        if cancelled {
            return self.worker.advance(item, Event::Stopping);
        }
        let stuck = std::slice::from_mut(&mut item);
        if failure.class == Class::Systemic && !self.worker.is_struck_out(stuck, Stage::Handler) {
            item.on(Event::Failed(Class::Systemic));
            self.worker.shared.signs.meter.failed(failure.class);
            if self.worker.shared.gate.successes() == item.sent_at {
                self.worker.close_gate(&failure);
            }
            self.waiting.push_back(item);
            return self.rest(&failure);
        }
        item.failure = Some(failure.clone());
        match failure.class {
            Class::Permanent => self.worker.advance(item, Event::Failed(Class::Permanent)),
            Class::Transient | Class::Systemic => self.worker.failed.push(item),
        }
    }

    /// Nothing is tried for a while, since the world is broken.
    fn rest(&mut self, failure: &Failure) {
        if !self.world_rest.is_over() {
            return;
        }
        self.worker.remind(self.world_rest.tries, failure);
        let backoff = self.worker.shared.backoff;
        let delay = backoff.delay(self.world_rest.tries, random::draw());
        let asked = failure.retry_after.unwrap_or_default();
        self.world_rest.begin(delay.max(asked.min(RETRY_AFTER_MAX)));
    }

    /// Decides about attempts that failed and may succeed later, and keeps only
    /// a few messages when the world seems broken.
    fn conclude(&mut self) {
        let mut groups = VecDeque::new();
        if let Some(trouble) = self.worker.conclude(&mut groups) {
            self.rest(&trouble.failure);
        }
        self.waiting.extend(groups.into_iter().flatten());
        let Some(closed_for) = self.worker.shared.gate.closed_for() else {
            return;
        };
        if self.out > 1 {
            self.recall();
        }
        if closed_for >= GIVE_BACK_AFTER {
            while self.waiting.len() > PROBES_MAX
                && let Some(item) = self.waiting.pop_back()
            {
                self.worker.advance(item, Event::Stopping);
            }
        }
        let mut marked: VecDeque<Vec<Item>> = self.waiting.drain(..).map(|i| vec![i]).collect();
        if self.ledger_rest.is_over() {
            self.worker.rest_suspects(&mut marked);
        }
        self.waiting.extend(marked.into_iter().flatten());
    }

    /// Takes back what nobody has called yet.
    fn recall(&mut self) {
        let uncalled: Vec<Box<Item>> = self.crew.uncalled.try_iter().collect();
        for item in uncalled {
            self.is_back(&item);
            self.waiting.push_back(*item);
        }
    }

    /// It is not with the crew any more.
    fn is_back(&mut self, item: &Item) {
        self.out = self.out.saturating_sub(1);
        self.alone_out &= !item.alone;
        if let Some(token) = &item.token
            && let Some(count) = self.out_tokens.get_mut(token)
        {
            *count -= 1;
            if *count == 0 {
                self.out_tokens.remove(token);
            }
        }
    }

    /// Gives the claimed `items` to the crew.
    fn call(&mut self, mut items: Vec<Item>) {
        if let Err(error) = self.worker.mark_suspects(&mut items) {
            let failure = self.forget(error, LedgerStep::Claim);
            self.waiting.extend(items);
            return self.rest_from_ledger(&failure);
        }
        for mut item in items {
            if item.alone && self.out > 0 {
                self.alone.push_back(item);
                continue;
            }
            if self.worker.shared.gate.is_closed() && self.out > 0 {
                self.waiting.push_back(item);
                continue;
            }
            item.sent_at = self.worker.shared.gate.successes();
            let (alone, token) = (item.alone, item.token.clone());
            match self.crew.calls.try_send(Box::new(item)) {
                Ok(()) => {
                    self.out += 1;
                    self.alone_out |= alone;
                    if let Some(token) = token {
                        *self.out_tokens.entry(token).or_default() += 1;
                    }
                }
                Err(TrySendError::Full(item) | TrySendError::Disconnected(item)) => {
                    self.waiting.push_back(*item);
                }
            }
        }
    }

    /// Calls again what met a broken world, when it is time: one at a time
    /// while the gate is closed.
    fn try_waiting(&mut self) {
        if self.waiting.is_empty() || !self.world_rest.is_over() || !self.ledger_rest.is_over() {
            return;
        }
        if !self.worker.shared.gate.is_closed() {
            let all = self.waiting.drain(..).collect();
            self.call(all);
        } else if self.out == 0
            && let Some(next) = self.waiting.pop_front()
        {
            self.call(vec![next]);
        }
    }

    /// Calls one of those that are called alone, when nothing else is.
    fn try_alone(&mut self) {
        if self.out > 0 || !self.ledger_rest.is_over() || !self.world_rest.is_over() {
            return;
        }
        let Some(item) = self.alone.pop_front() else {
            return;
        };
        match item.lease {
            Some(_) => self.call(vec![item]),
            None => {
                self.unclaimed.push(item);
                self.claim();
            }
        }
    }

    /// What is not called goes back, because the daemon stops.
    fn give_everything_back(&mut self) {
        self.recall();
        let unclaimed = std::mem::take(&mut self.unclaimed);
        let held = self.waiting.drain(..).chain(self.alone.drain(..));
        let again = std::mem::take(&mut self.worker.again);
        let all: Vec<Item> = held.chain(unclaimed).chain(again).collect();
        for item in all {
            self.worker.advance(item, Event::Stopping);
        }
        self.worker.hand_back();
    }

    /// Ends the renewal of claims in Redis that no message in hand has.
    fn finish_tokens(&mut self) {
        let worker = &mut self.worker;
        let held = self
            .unclaimed
            .iter()
            .chain(&self.waiting)
            .chain(&self.alone);
        let held: Vec<&Token> = held
            .chain(&self.called)
            .chain(&worker.again)
            .filter_map(|item| item.token.as_ref())
            .collect();
        let in_hand = |token: &Token| self.out_tokens.contains_key(token) || held.contains(&token);
        let tokens = std::mem::take(&mut worker.tokens);
        let (kept, finished) = tokens.into_iter().partition(in_hand);
        worker.tokens = kept;
        if let Some(claims) = &mut worker.claims {
            for token in Vec::into_iter(finished) {
                claims.finish(&token);
            }
        }
    }
}
