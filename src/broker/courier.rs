//! Copies of messages, for retries and for dead letters that the daemon
//! publishes itself: on a thread and a connection of their own, confirmed and
//! mandatory, because an alarm on the broker blocks connections that publish.
//!
//! A courier belongs to one connection of a consumer. The original stays
//! unacknowledged until its copy is confirmed, so that the prefetch bounds
//! what a courier holds, and nothing is lost with it.

mod copy;
mod lanes;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};

pub(super) use copy::Copy;
use copy::LaneName;
use lanes::Lanes;

use super::connection::Dial;
use super::consumer::PAUSED_PREFETCH;
use super::publisher::{Fate, Limits, PublishError, Publisher, Seq};
use super::signed::Signer;
use super::topology::{self, WaysBack};
use crate::backoff::Backoff;
use crate::config::checked;
use crate::message::Purpose;
use crate::random;

/// What may be unconfirmed, and how long the broker may block one message.
const LIMITS: Limits = Limits {
    messages: 256,
    bytes: 4 << 20,
    wait: Duration::from_secs(2),
};

/// Longest wait for confirms before new copies are looked for.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Between two probes to a retry queue of which it is not known that it leads
/// back: of several daemons each gets only its share of its own.
const PROBE_EVERY: Duration = Duration::from_secs(2);

/// How long a courier that ends waits for the confirms that are out.
const LAST_CONFIRMS_WITHIN: Duration = Duration::from_secs(2);

/// Longest wait for the broker's answer to one call.
const CALL_WITHIN: Duration = Duration::from_secs(10);

/// What became of the copy of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivered {
    /// The broker has it, for this: the original can go.
    Yes(Purpose),
    /// It was not sent, or nobody knows: the original stays.
    No,
    /// It cannot be sent: its headers leave no room for the daemon's own.
    Unfit,
}

/// The broker thread's side.
pub(super) struct Courier {
    copies: Option<Sender<Copy>>,
    fates: Receiver<(u64, Delivered)>,
}

impl Courier {
    /// Starts the thread; it connects when it has something to send, to the
    /// URL number `first` before the others.
    pub(super) fn start(
        broker: &checked::Broker,
        first: usize,
        consumer: &checked::Consumer,
        signer: &Signer,
        backoff: Backoff,
        ways_back: Arc<WaysBack>,
    ) -> std::io::Result<Self> {
        // What is out at a pause is at most what one subscription and its
        // follower may have, and a few.
        let most = 2 * usize::from(consumer.prefetch) + usize::from(PAUSED_PREFETCH);
        let (copies, orders) = bounded(most);
        let (tell, fates) = bounded(most);
        let mut clerk = Clerk {
            broker: broker.clone(),
            first,
            signer: signer.clone(),
            consumer: Arc::new(consumer.clone()),
            backoff,
            lanes: Lanes::new(backoff),
            ways_back,
            probes: HashMap::new(),
            next_probes: Instant::now(),
            orders,
            tell,
            publisher: None,
            waiting: VecDeque::new(),
            sent: HashMap::new(),
            failures: 0,
            not_before: Instant::now(),
            ending: false,
        };
        std::thread::Builder::new()
            .name(format!("{}-courier", consumer.name))
            .spawn(move || clerk.run())?;
        Ok(Self {
            copies: Some(copies),
            fates,
        })
    }

    /// Gives it a copy to send. False when the courier is no more.
    pub(super) fn send(&self, copy: Copy) -> bool {
        // There is room for every delivery that can be out.
        let copies = self.copies.as_ref();
        copies.is_some_and(|copies| copies.try_send(copy).is_ok())
    }

    /// Fates by delivery tag, for a `select!`; disconnected when the courier
    /// has ended.
    pub(super) fn fates(&self) -> &Receiver<(u64, Delivered)> {
        &self.fates
    }

    /// Has it end: what is not sent comes back at once, the rest with its
    /// confirm or after a moment.
    pub(super) fn finish(&mut self) {
        self.copies = None;
    }
}

/// The courier's own side.
struct Clerk {
    broker: checked::Broker,
    /// The URL to begin with: the consumer's at first, the next one when a
    /// connection was lost.
    first: usize,
    consumer: Arc<checked::Consumer>,
    signer: Signer,
    backoff: Backoff,
    lanes: Lanes,
    ways_back: Arc<WaysBack>,
    /// Probes to retry queues, by queue.
    probes: HashMap<Seq, String>,
    /// When probes go to the retry queues that are unproved.
    next_probes: Instant,
    orders: Receiver<Copy>,
    tell: Sender<(u64, Delivered)>,
    publisher: Option<Publisher>,
    waiting: VecDeque<Copy>,
    sent: HashMap<Seq, Copy>,
    /// Times in a row that nothing could be sent, and when to try again.
    failures: u32,
    not_before: Instant,
    ending: bool,
}

/// The broker thread has gone: so does its courier.
struct Gone;

impl Clerk {
    fn run(&mut self) {
        while !self.ending {
            if self.take_orders().and_then(|()| self.work()).is_err() {
                return;
            }
        }
        self.end();
    }

    /// Takes what there is to send; waits for it when there is nothing to do.
    fn take_orders(&mut self) -> Result<(), Gone> {
        if self.waiting.is_empty() && self.sent.is_empty() && !self.is_proving() {
            match self.orders.recv() {
                Ok(copy) => self.waiting.push_back(copy),
                Err(_) => self.ending = true,
            }
        }
        loop {
            match self.orders.try_recv() {
                Ok(copy) => self.waiting.push_back(copy),
                Err(TryRecvError::Empty) => return Ok(()),
                Err(TryRecvError::Disconnected) => {
                    self.ending = true;
                    return Ok(());
                }
            }
        }
    }

    fn work(&mut self) -> Result<(), Gone> {
        if !self.ending {
            self.send_probes();
            self.send_due()?;
        }
        let lost = |publisher: &Publisher| publisher.lost().is_some();
        let listening = !self.sent.is_empty()
            || !self.probes.is_empty()
            || self.publisher.as_ref().is_some_and(lost);
        if !listening && !self.ending {
            // Nothing to listen for: a new order, or the end, or time passes.
            match self.orders.recv_timeout(self.until_due()) {
                Ok(copy) => self.waiting.push_back(copy),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.ending = true,
            }
            return Ok(());
        }
        self.listen(LOOK_EVERY)
    }

    fn until_due(&self) -> Duration {
        if self.is_proving() {
            return LOOK_EVERY;
        }
        let due = |copy: &Copy| self.trouble(copy).unwrap_or(self.not_before);
        // Without anything that waits, the next round waits for an order.
        let first = self.waiting.iter().map(due).min();
        first.map_or(Duration::ZERO, |due| {
            let due = due.max(self.not_before);
            due.saturating_duration_since(Instant::now())
        })
    }

    fn is_proving(&self) -> bool {
        self.ways_back.unproved().next().is_some()
    }

    /// Sends a probe to each retry queue that is unproved. What becomes of
    /// them only their way back tells.
    fn send_probes(&mut self) {
        let now = Instant::now();
        if !self.is_proving() || now < self.next_probes || now < self.not_before {
            return;
        }
        self.next_probes = now + PROBE_EVERY;
        if !self.connect() {
            return;
        }
        for probe in self.ways_back.probes(&self.consumer) {
            let Some(publisher) = &mut self.publisher else {
                return;
            };
            let route = ("", probe.queue.as_str());
            match publisher.publish_copy(route, probe.body, probe.properties) {
                Ok(seq) => drop(self.probes.insert(seq, probe.queue)),
                Err(error) => return self.fail(&error.to_string()),
            }
        }
    }

    /// Where a retry of step `wanted` waits: in its own queue, or else in the one
    /// with the longest delay below it that is known to lead back.
    fn proved_step(&self, wanted: usize) -> Option<usize> {
        let consumer = &self.consumer;
        let delay = |step: usize| consumer.retry.backoff.get(step).copied();
        let is_proved = |step: &usize| {
            delay(*step).is_some_and(|delay| {
                self.ways_back
                    .is_proved(&consumer.topology.retry_queue(delay))
            })
        };
        if is_proved(&wanted) {
            return Some(wanted);
        }
        (0..consumer.retry.backoff.len())
            .filter(|step| delay(*step) <= delay(wanted) && is_proved(step))
            .max_by_key(|step| delay(*step))
    }

    /// When a copy that could not be sent is tried again.
    fn trouble(&self, copy: &Copy) -> Option<Instant> {
        copy.due().or_else(|| self.lanes.trouble(copy.lane()))
    }

    /// Sends what is due. A lane in trouble does not hold up the others.
    ///
    /// The broker closes the channel over some messages, and takes every
    /// unconfirmed one with it: those would be sent twice, and again each time.
    /// So a copy in a lane that is in trouble goes alone.
    fn send_due(&mut self) -> Result<(), Gone> {
        let now = Instant::now();
        for _ in 0..self.waiting.len() {
            let alone = self.sent.values().any(|copy| self.trouble(copy).is_some());
            if alone || self.not_before > now {
                break;
            }
            let Some(mut copy) = self.waiting.pop_front() else {
                break;
            };
            if let LaneName::Retry(step) = copy.lane() {
                match self.proved_step(step) {
                    Some(step) => copy.wait_in(step),
                    None => {
                        self.waiting.push_back(copy);
                        continue;
                    }
                }
            }
            match self.trouble(&copy) {
                Some(due) if due > now => self.waiting.push_back(copy),
                Some(_) if !self.sent.is_empty() => {
                    self.waiting.push_front(copy);
                    break;
                }
                _ => {
                    if !self.send(copy)? {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// Sees to it that there is a publisher. False when there is none.
    fn connect(&mut self) -> bool {
        if self.publisher.is_some() {
            return true;
        }
        let purpose = format!("{} publisher", self.consumer.name);
        match Publisher::dial(self.dial(&purpose), LIMITS) {
            Ok(publisher) => {
                self.publisher = Some(publisher);
                true
            }
            Err(error) => {
                self.fail(&error.to_string());
                false
            }
        }
    }

    /// Sends one copy. False when no other can be sent now.
    fn send(&mut self, copy: Copy) -> Result<bool, Gone> {
        if !self.connect() {
            self.waiting.push_front(copy);
            return Ok(false);
        }
        let Some(publisher) = &mut self.publisher else {
            self.waiting.push_front(copy);
            return Ok(false);
        };
        let parts = copy.outgoing(&self.consumer, &self.signer, random::draw());
        let route = (parts.exchange.as_str(), parts.routing_key.as_str());
        match publisher.publish_copy(route, copy.body(), parts.properties) {
            Ok(seq) => {
                self.sent.insert(seq, copy);
                Ok(true)
            }
            Err(PublishError::Unfit(unfit)) => {
                self.strip(copy, &unfit.to_string())?;
                Ok(true)
            }
            Err(error @ PublishError::NoRoom { .. }) => {
                self.waiting.push_front(copy);
                self.fail(&error.to_string());
                Ok(false)
            }
            // What it was, the next look at the fates of the others tells.
            Err(PublishError::Lost { .. }) => {
                self.waiting.push_front(copy);
                Ok(false)
            }
        }
    }

    /// A copy that cannot be sent, or that the broker will not have, is tried
    /// without what the daemon adds: as a dead letter, since a retry needs it.
    fn strip(&mut self, copy: Copy, why: &str) -> Result<(), Gone> {
        if copy.is_lightest() {
            let mut copy = copy;
            let tries = copy.wait_for_itself(self.backoff, random::draw());
            self.waiting.push_back(copy);
            if tries.is_power_of_two() {
                self.tell_that_copies_wait(tries, why);
            }
            return Ok(());
        }
        log::warn!(
            consumer = self.consumer.name.as_str();
            "a copy cannot be sent with all its headers: {why}"
        );
        match copy.lighter(&self.consumer) {
            Ok(lighter) => self.waiting.push_back(lighter),
            Err(tag) => self.report(tag, Delivered::Unfit)?,
        }
        Ok(())
    }

    /// Takes in confirms, and what was lost with its connection.
    fn listen(&mut self, within: Duration) -> Result<(), Gone> {
        let Some(publisher) = &mut self.publisher else {
            return Ok(());
        };
        let fates = publisher.wait(within);
        let lost = publisher.lost().map(str::to_owned);
        let refused = publisher.refused();
        let went_astray = publisher.went_astray();
        let server = publisher.server();
        // One that was alone tells what it was lost for.
        let alone = self.sent.len() == 1;
        let mut troubles: HashMap<LaneName, String> = HashMap::new();
        let mut unroutable = went_astray;
        for (seq, fate) in fates {
            if let Some(queue) = self.probes.remove(&seq) {
                match fate {
                    Fate::Confirmed => self.ways_back.probed(&queue),
                    Fate::Returned { .. } => unroutable = true,
                    Fate::Nacked | Fate::Unknown => {}
                }
                continue;
            }
            let Some(copy) = self.sent.remove(&seq) else {
                continue;
            };
            let to = || copy.destination(&self.consumer);
            let trouble = match fate {
                Fate::Confirmed => {
                    self.failures = 0;
                    self.lanes.succeeded(copy.lane());
                    self.report(copy.tag(), Delivered::Yes(copy.purpose()))?;
                    continue;
                }
                Fate::Returned { text, .. } => {
                    unroutable = true;
                    format!("{} takes no message: {text}", to())
                }
                Fate::Nacked => format!("{} refused a message: is it full?", to()),
                Fate::Unknown => {
                    let cause = lost.as_deref().unwrap_or("the connection was lost");
                    if refused && alone {
                        self.strip(copy, cause)?;
                        continue;
                    }
                    format!("{}: {cause}", to())
                }
            };
            troubles.entry(copy.lane()).or_insert(trouble);
            self.waiting.push_back(copy);
        }
        if let Some(cause) = lost {
            self.publisher = None;
            // A channel that the broker closed says nothing against its node.
            self.first = server + usize::from(!refused && !went_astray);
            if troubles.is_empty() {
                self.fail(&cause);
            } else if !alone {
                self.wait_to_connect();
            }
        }
        for (lane, trouble) in troubles {
            self.lane_failed(lane, &trouble);
        }
        if unroutable && !self.ending {
            self.declare_again();
        }
        Ok(())
    }

    fn lane_failed(&mut self, lane: LaneName, cause: &str) {
        let told = self.lanes.failed(lane, Instant::now(), random::draw());
        if let Some(tries) = told {
            self.tell_that_copies_wait(tries, cause);
        }
    }

    fn dial<'d>(&'d self, purpose: &'d str) -> Dial<'d> {
        Dial {
            first: self.first,
            ..Dial::new(&self.broker, purpose)
        }
    }

    /// A queue, an exchange or a binding may have been deleted under the
    /// daemon.
    fn declare_again(&self) {
        let purpose = format!("{} topology", self.consumer.name);
        let declared = self
            .dial(&purpose)
            .open()
            .map_err(|error| error.to_string())
            .and_then(|mut link| {
                topology::declare_again(&mut link, &self.consumer, CALL_WITHIN)
                    .map_err(|error| error.to_string())
            });
        if let Err(error) = declared {
            log::debug!(consumer = self.consumer.name.as_str(); "failed to declare again: {error}");
        }
    }

    /// Nothing can be sent at all for now. Says it at first, and then ever more
    /// rarely.
    fn fail(&mut self, cause: &str) {
        self.wait_to_connect();
        if self.failures.is_power_of_two() {
            self.tell_that_copies_wait(self.failures, cause);
        }
    }

    fn wait_to_connect(&mut self) {
        let delay = self.backoff.delay(self.failures, random::draw());
        self.not_before = Instant::now() + delay;
        self.failures = self.failures.saturating_add(1);
    }

    fn tell_that_copies_wait(&self, tries: u32, cause: &str) {
        log::warn!(
            consumer = self.consumer.name.as_str(), tries = tries,
            waiting = self.waiting.len();
            "copies of messages wait, their originals unacknowledged: {cause}"
        );
    }

    fn report(&self, tag: u64, fate: Delivered) -> Result<(), Gone> {
        self.tell.send((tag, fate)).map_err(|_| Gone)
    }

    /// What is not sent stays where it is; what is sent has a moment to be
    /// confirmed.
    fn end(&mut self) {
        let deadline = Instant::now() + LAST_CONFIRMS_WITHIN;
        loop {
            for copy in std::mem::take(&mut self.waiting) {
                if self.report(copy.tag(), Delivered::No).is_err() {
                    return;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if self.sent.is_empty() || left.is_zero() || self.listen(left).is_err() {
                break;
            }
        }
        for copy in std::mem::take(&mut self.sent).into_values() {
            if self.report(copy.tag(), Delivered::No).is_err() {
                return;
            }
        }
    }
}
