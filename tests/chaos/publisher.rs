//! Publishes with confirms and keeps the journal: which ids were attempted, and
//! which of them the broker has confirmed. One message in fifteen is published
//! more than once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ackonce::broker::publisher::{Fate, Limits, Outgoing, Publisher, Seq};
use ackonce::config::checked;

use crate::plan::Dice;

/// How the daemon's handler takes a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nature {
    /// At once.
    Plain,
    /// Never: it is to be dead-lettered.
    Poison,
    /// After so many attempts that fail.
    Flaky(u8),
}

/// What the publisher knows of one id.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub nature: Nature,
    /// Times it was handed to the broker.
    pub attempted: u32,
    /// Times the broker confirmed it.
    pub confirmed: u32,
}

/// By number of the id.
pub type Journal = Vec<Entry>;

/// The id with this number.
pub fn id(number: usize) -> String {
    format!("m-{number}")
}

/// The number of an id.
pub fn number_of(id: &str) -> Option<usize> {
    id.strip_prefix("m-")?.parse().ok()
}

/// Counts for the eye.
#[derive(Debug, Default)]
pub struct Progress {
    pub ids: AtomicU64,
    pub published: AtomicU64,
    pub confirmed: AtomicU64,
    pub unknown: AtomicU64,
    pub connections: AtomicU64,
}

/// What to publish, where and how fast.
#[derive(Debug, Clone)]
pub struct Order {
    pub url: String,
    pub queue: String,
    /// New ids a second.
    pub rate: u32,
    /// New ids.
    pub most: usize,
    pub seed: u64,
}

/// The publisher, on a thread of its own. Dropping this leaves it alone: a panic
/// somewhere else must not wait for it.
pub struct Publishing {
    thread: JoinHandle<Journal>,
    stop: Arc<AtomicBool>,
    pub progress: Arc<Progress>,
}

impl Publishing {
    pub fn start(order: Order) -> Self {
        let stop = Arc::new(AtomicBool::default());
        let progress = Arc::new(Progress::default());
        let mut desk = Desk {
            dice: Dice::new(order.seed, 1),
            order,
            progress: Arc::clone(&progress),
            journal: Journal::new(),
            unconfirmed: BTreeMap::new(),
            later: VecDeque::new(),
            publisher: None,
        };
        let told = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("publisher".to_owned())
            .spawn(move || {
                desk.work(&told);
                desk.close();
                desk.journal
            })
            .expect("a thread");
        Self {
            thread,
            stop,
            progress,
        }
    }

    /// Whether its thread has ended, which it does on a panic.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// The journal, once what was published is confirmed or lost.
    pub fn stop(self) -> Journal {
        self.stop.store(true, SeqCst);
        self.thread.join().expect("the publisher")
    }
}

struct Desk {
    order: Order,
    dice: Dice,
    progress: Arc<Progress>,
    journal: Journal,
    unconfirmed: BTreeMap<Seq, usize>,
    /// Duplicates to come, each with its time.
    later: VecDeque<(Instant, usize)>,
    publisher: Option<Publisher>,
}

impl Desk {
    fn work(&mut self, stop: &AtomicBool) {
        let pause = Duration::from_secs(1) / self.order.rate;
        let mut due = Instant::now();
        while !stop.load(SeqCst) {
            let wait = due.saturating_duration_since(Instant::now());
            std::thread::sleep(wait.min(Duration::from_millis(20)));
            self.take_fates();
            if self.publisher.is_none() {
                self.connect();
                due = Instant::now();
                continue;
            }
            while self
                .later
                .front()
                .is_some_and(|(at, _)| *at <= Instant::now())
            {
                if let Some((_, number)) = self.later.pop_front() {
                    self.publish(number);
                }
            }
            if due <= Instant::now() && self.journal.len() < self.order.most {
                due += pause;
                self.publish_new();
            }
        }
    }

    fn publish_new(&mut self) {
        let nature = match self.dice.below(100) {
            0..2 => Nature::Poison,
            2..6 => Nature::Flaky(1 + self.dice.below(2) as u8),
            _ => Nature::Plain,
        };
        let number = self.journal.len();
        self.journal.push(Entry {
            nature,
            attempted: 0,
            confirmed: 0,
        });
        self.progress.ids.fetch_add(1, SeqCst);
        self.publish(number);
        match self.dice.below(100) {
            // At once: both are taken into one batch, or by two daemons.
            0..4 => self.publish(number),
            4..7 => {
                let at = Instant::now() + self.dice.millis(50, 5_000);
                self.later.push_back((at, number));
            }
            _ => {}
        }
    }

    fn publish(&mut self, number: usize) {
        let Some(publisher) = &mut self.publisher else {
            return;
        };
        let id = id(number);
        let body = match self.journal[number].nature {
            Nature::Plain => serde_json::json!({ "id": id, "amount": 1, "fails": 0 }),
            Nature::Flaky(fails) => serde_json::json!({ "id": id, "amount": 1, "fails": fails }),
            Nature::Poison => serde_json::json!({ "id": id, "amount": "poison", "fails": 0 }),
        };
        // Before the attempt: it may have arrived even if it fails.
        self.journal[number].attempted += 1;
        let message = Outgoing {
            routing_key: self.order.queue.clone(),
            body: body.to_string().into_bytes(),
            message_id: Some(id),
            content_type: Some("application/json".to_owned()),
            ..Outgoing::default()
        };
        if let Ok(seq) = publisher.publish(&message) {
            self.unconfirmed.insert(seq, number);
            self.progress.published.fetch_add(1, SeqCst);
        }
    }

    fn take_fates(&mut self) {
        let Some(publisher) = &mut self.publisher else {
            return;
        };
        let fates = publisher.poll();
        if publisher.lost().is_some() {
            self.publisher = None;
        }
        self.enter(fates);
    }

    fn enter(&mut self, fates: Vec<(Seq, Fate)>) {
        for (seq, fate) in fates {
            let number = self
                .unconfirmed
                .remove(&seq)
                .expect("a fate has its message");
            match fate {
                Fate::Confirmed => {
                    self.journal[number].confirmed += 1;
                    self.progress.confirmed.fetch_add(1, SeqCst);
                }
                // Nobody knows: it is published again, as every client would.
                Fate::Unknown => {
                    self.progress.unknown.fetch_add(1, SeqCst);
                    let at = Instant::now() + self.dice.millis(0, 300);
                    self.later.push_front((at, number));
                }
                Fate::Nacked => {}
                Fate::Returned { code, text } => panic!("the queue is gone: {code} {text}"),
            }
        }
    }

    fn connect(&mut self) {
        let broker = checked::Broker {
            urls: vec![checked::Secret::new(self.order.url.clone())],
            tls: checked::Tls::default(),
            allow_plaintext: false,
            heartbeat: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(3),
        };
        let limits = Limits {
            wait: Duration::from_secs(3),
            ..Limits::default()
        };
        let Ok(publisher) = Publisher::open(&broker, "chaos", limits) else {
            std::thread::sleep(self.dice.millis(50, 200));
            return;
        };
        self.publisher = Some(publisher);
        self.unconfirmed.clear();
        // Some that were confirmed long ago come once more.
        if self.progress.connections.fetch_add(1, SeqCst) > 0 && !self.journal.is_empty() {
            for _ in 0..5 {
                let number = self.dice.below(self.journal.len() as u64) as usize;
                self.publish(number);
            }
        }
    }

    fn close(&mut self) {
        if let Some(publisher) = self.publisher.take() {
            let fates = publisher.close(Duration::from_secs(20));
            self.enter(fates);
        }
    }
}
