//! The way of a batch through one worker: take, identify, claim, record,
//! apply, commit, mark, settle.
//!
//! What each outcome means is [`crate::lifecycle`]'s to say; this file does
//! the I/O it asks for, for a whole batch at once. A batch is only an
//! optimisation: one that fails is rolled back and halved until the message at
//! fault stands alone.
//!
//! A handler whose effect is outside the database is led by a [`Foreman`]
//! instead, with the same steps around it.

mod apart;
mod apply;
mod contention;
mod crew;
mod item;
mod keyed;
mod leases;
mod suspects;
mod verdict;

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use crate::backoff::Backoff;
use crate::claim::{Claim, Claims, Token};
use crate::config::checked;
use crate::failpoint::{self, Mutant, Step};
use crate::failure::{Class, Failure};
use crate::flights::Flights;
use crate::gate::Gate;
use crate::handler::Transactional;
use crate::handler::rust::Makers;
use crate::ledger::Ledger;
use crate::lifecycle::Event;
use crate::message::{Delivery, MessageId, Settled};
use crate::observe::Signs;
use crate::random;
use crate::stop::Stop;

pub use contention::Contention;
pub use item::Item;
use item::usable_id;
pub use keyed::Foreman;
use verdict::Verdict;

/// Most body bytes in one transaction; a single larger message stands alone.
const BATCH_BYTES_MAX: usize = 16 << 20;

/// How long a batch that is less than half full may grow while other workers
/// are busy: so many steps of so long.
const GROWING_MAX: u32 = 20;
const GROWING_STEP: Duration = Duration::from_micros(250);

/// What a worker shares with the rest of its consumer.
#[derive(Clone)]
pub struct Shared {
    /// Deliveries from the broker thread.
    pub inbox: Receiver<Delivery>,
    /// Settlements to the broker thread, those of a batch together.
    pub outbox: Sender<Vec<Settled>>,
    /// Held by the worker whose turn it is to take a batch.
    pub turn: Turn,
    /// Workers that are busy with a batch.
    pub busy: Arc<AtomicUsize>,
    /// Ids in flight in this consumer.
    pub flights: Arc<Flights<Item>>,
    /// Whether the consumer takes messages.
    pub gate: Arc<Gate>,
    /// Held for writing while a message is run that may kill its worker, and
    /// for reading while any other is: then a death is that one's alone.
    pub suspects: Arc<RwLock<()>>,
    /// What its batches have learned of one another.
    pub contention: Arc<Contention>,
    /// Whether to finish what is begun and begin nothing more.
    pub stop: Stop,
    /// The consumer's configuration.
    pub consumer: Arc<checked::Consumer>,
    /// The handlers that the program brings along.
    pub makers: Makers,
    /// Waits between tries when a server is away.
    pub backoff: Backoff,
    /// How long a stop waits for what is in work.
    pub shutdown_timeout: Duration,
    /// What is counted and shown.
    pub signs: Signs,
}

/// Who runs the handler.
pub enum Hands {
    /// The worker itself, in the ledger's transaction.
    Own(Box<dyn Transactional>),
    /// Threads of their own, by the foreman's order. The handler's type.
    Crew(&'static str),
}

impl Hands {
    /// The handler's type.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Own(handler) => handler.kind(),
            Self::Crew(kind) => kind,
        }
    }
}

/// Lets one worker at a time wait for deliveries, so that those that come
/// together stay together and wake nobody else.
#[derive(Clone)]
pub struct Turn {
    pass: Sender<()>,
    wait: Receiver<()>,
}

impl Default for Turn {
    /// Nobody's.
    fn default() -> Self {
        let (pass, wait) = crossbeam_channel::bounded(1);
        pass.try_send(()).ok();
        Self { pass, wait }
    }
}

/// Passes the turn on when it is dropped.
struct Held<'a>(&'a Turn);

impl Turn {
    /// Waits for the turn. `None` when it did not come `within`.
    fn take(&self, within: Duration) -> Option<Held<'_>> {
        self.wait.recv_timeout(within).ok().map(|()| Held(self))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.pass.try_send(()).ok();
    }
}

/// One worker thread's own things.
pub struct Worker {
    shared: Shared,
    ledger: Ledger,
    claims: Option<Claims>,
    hands: Hands,
    /// Ids claimed elsewhere, each with the time to look again.
    parked: Vec<(Instant, Item)>,
    /// How many of them are shown.
    parked_shown: usize,
    /// Deliveries whose owner gave up: theirs is the next turn.
    heirs: VecDeque<Item>,
    /// Deliveries for the next transaction of the current batch.
    again: Vec<Item>,
    /// Deliveries of the current batch whose attempt failed, and may succeed
    /// later.
    failed: Vec<Item>,
    /// Claims of the current batch.
    tokens: Vec<Token>,
    /// The session was replaced, and nothing has succeeded since.
    reconnected: bool,
    /// Messages of the current batch that failed and were left out, one at a
    /// time.
    left_out: u32,
    /// Races that transactions of the current batch have lost.
    races: u32,
    /// Attempts of the current batch failed, as all do at the moment.
    in_vain: bool,
    /// Batches tried in vain since the gate was closed.
    trials: u32,
    /// What the current batch has decided and not yet told.
    verdict: Verdict,
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Also after a panic.
        self.shared.signs.meter.parked_changed(self.parked_shown, 0);
    }
}

impl Worker {
    /// A worker that has not begun.
    #[must_use]
    pub fn new(shared: Shared, ledger: Ledger, claims: Option<Claims>, hands: Hands) -> Self {
        Self {
            shared,
            ledger,
            claims,
            hands,
            parked: Vec::new(),
            parked_shown: 0,
            heirs: VecDeque::new(),
            again: Vec::new(),
            failed: Vec::new(),
            tokens: Vec::new(),
            reconnected: false,
            left_out: 0,
            races: 0,
            in_vain: false,
            trials: 0,
            verdict: Verdict::default(),
        }
    }

    /// Works until the broker thread has closed the inbox.
    pub fn run(mut self) {
        while let Some(deliveries) = self.take() {
            self.shared.busy.fetch_add(1, Ordering::Relaxed);
            let fresh = self.identify(deliveries);
            let due = self.look_again();
            let heirs = std::mem::take(&mut self.heirs);
            let claiming: Vec<Item> = fresh.into_iter().chain(due).chain(heirs).collect();
            let recording = self.claim(claiming);
            self.apply(recording);
            self.tell();
            for token in self.tokens.drain(..) {
                if let Some(claims) = &mut self.claims {
                    claims.finish(&token);
                }
            }
            self.shared.busy.fetch_sub(1, Ordering::Relaxed);
            if !self.shared.gate.is_closed() {
                self.trials = 0;
            } else if std::mem::take(&mut self.in_vain) {
                // Nothing that is tried now succeeds: no haste. What need not
                // be tried, duplicates for one, is another matter.
                let delay = self.shared.backoff.delay(self.trials, random::draw());
                self.trials = self.trials.saturating_add(1);
                let _stopping = self.shared.stop.wait(delay);
            }
            if self.shared.stop.is_set() {
                self.hand_back();
            }
        }
        self.hand_back();
    }

    fn show_parked(&mut self) {
        let meter = &self.shared.signs.meter;
        meter.parked_changed(self.parked_shown, self.parked.len());
        self.parked_shown = self.parked.len();
    }

    /// 1. Takes what is waiting, up to a full batch, and never waits to fill
    ///    it: only while others are at work is a small batch left to grow, for
    ///    a moment. Empty when only parked deliveries are due.
    fn take(&mut self) -> Option<Vec<Delivery>> {
        let mut batch = Vec::new();
        if self.heirs.is_empty() {
            let due = self.next_due().unwrap_or(Duration::from_secs(3600));
            let deadline = Instant::now() + due;
            let turn = self.shared.turn.clone();
            let Some(_turn) = turn.take(due) else {
                return Some(batch);
            };
            match self.shared.inbox.recv_deadline(deadline) {
                Ok(delivery) => batch.push(delivery),
                Err(RecvTimeoutError::Timeout) => return Some(batch),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
            self.let_it_grow();
            self.fill(&mut batch);
        } else {
            self.fill(&mut batch);
        }
        if !batch.is_empty() {
            self.shared.signs.meter.took(batch.len());
            failpoint::hit(Step::Received);
        }
        Some(batch)
    }

    /// A transaction costs about as much for one message as for ten, and on a
    /// busy machine small ones take the time away from the broker. While other
    /// workers have something to do, nobody is served sooner by another one.
    fn let_it_grow(&self) {
        let enough = self.shared.consumer.batch_max / 2;
        for _ in 0..GROWING_MAX {
            let waiting = self.shared.inbox.len();
            let alone = self.shared.busy.load(Ordering::Relaxed) == 0;
            if alone || waiting >= enough || self.shared.stop.is_set() {
                return;
            }
            std::thread::sleep(GROWING_STEP);
        }
    }

    fn fill(&self, batch: &mut Vec<Delivery>) {
        let most = match self.shared.gate.is_closed() {
            true => 1,
            false => {
                let most = self.shared.consumer.batch_max;
                self.shared.contention.batch_max(most, Instant::now())
            }
        };
        let mut bytes: usize = batch.iter().map(|d| d.message.body.len()).sum();
        while batch.len() < most && bytes < BATCH_BYTES_MAX {
            let Ok(delivery) = self.shared.inbox.try_recv() else {
                break;
            };
            bytes += delivery.message.body.len();
            batch.push(delivery);
        }
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
                        retry_after: None,
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
        let held = match self.hands {
            Hands::Own(_) => HashSet::new(),
            Hands::Crew(_) => self.ledger.held(&ids).unwrap_or_default(),
        };
        let recheck_at = now + self.shared.consumer.claim.recheck_every;
        let mut undecided = Vec::new();
        for (_, mut item) in due {
            let id = item.id.as_ref().map_or("", MessageId::as_str);
            let known = found.get(id);
            match known.map(|row| item.compare(row.fingerprint)) {
                Some(body) => self.advance(item, Event::Found(body)),
                None if held.contains(id) => self.parked.push((recheck_at, item)),
                None => {
                    item.on(Event::LookAgain);
                    undecided.push(item);
                }
            }
        }
        undecided
    }

    /// One more message to try while others wait for the world, if there is one.
    fn take_probe(&mut self) -> Vec<Item> {
        let delivery = self.shared.inbox.try_recv().ok();
        let fresh = self.identify(delivery.into_iter().collect());
        self.claim(fresh)
    }

    /// 3. Claims the ids in Redis, and goes on without where Redis is away.
    fn claim(&mut self, mut items: Vec<Item>) -> Vec<Item> {
        if items.is_empty() {
            return items;
        }
        let answer = self.ask_redis(&items);
        failpoint::hit(Step::Claimed);
        let Some((token, answers)) = answer else {
            for item in &mut items {
                item.on(Event::ClaimUnavailable);
            }
            return items;
        };
        let mut recording = Vec::with_capacity(items.len());
        for (mut item, answer) in items.into_iter().zip(answers) {
            match answer {
                Claim::Won => {
                    item.token = Some(token.clone());
                    item.on(Event::ClaimWon);
                    recording.push(item);
                }
                Claim::Unknown => {
                    item.on(Event::ClaimUnavailable);
                    recording.push(item);
                }
                Claim::Held if item.since.elapsed() > self.claim_lasts() => {
                    item.on(Event::ClaimUnavailable);
                    recording.push(item);
                }
                Claim::Done if self.must_confirm(&item) => {
                    item.on(Event::ClaimUnavailable);
                    recording.push(item);
                }
                Claim::Done => self.advance(item, Event::MarkedDone),
                Claim::Held if failpoint::mutant(Mutant::HeldClaim) => {
                    self.advance(item, Event::MarkedDone);
                }
                Claim::Held => self.advance(item, Event::ClaimHeld),
            }
        }
        self.tokens.push(token);
        recording
    }

    /// Whether Redis is not believed when it calls a message done. The row that
    /// a replayed one's mark speaks of may have been forgotten by an operator.
    fn must_confirm(&self, item: &Item) -> bool {
        self.shared.consumer.confirm_duplicates || item.delivery.message.replayed
    }

    /// How long a claim in Redis is waited for: what looks alive for longer may
    /// be nobody's, and where it is somebody's the ledger knows.
    fn claim_lasts(&self) -> Duration {
        self.shared.consumer.claim.lease * 2
    }

    fn ask_redis(&mut self, items: &[Item]) -> Option<(Token, Vec<Claim>)> {
        let claims = self.claims.as_mut()?;
        // Without a ledger there is no telling whose marks to believe.
        claims.set_ledger(self.ledger.marks().ok()?);
        let wanted: Vec<_> = items
            .iter()
            .filter_map(|item| Some((item.id.as_ref()?, item.fingerprint)))
            .collect();
        claims.claim(&wanted)
    }
}
