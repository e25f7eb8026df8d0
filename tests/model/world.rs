//! The world in which the protocol is walked: what broker, Redis, PostgreSQL
//! and the processes hold, and what becomes of it when one of them fails.

use ackonce::failure::Class;
use ackonce::lifecycle::{self, Action, Event, Illegal, State, Step};
use ackonce::message::{DeadReason, Epoch, Settlement, Ticket};

/// What is under test: the protocol, and what it takes for granted of the
/// ledger and of Redis.
#[derive(Clone, Copy)]
pub struct Protocol {
    pub step: fn(State, Event) -> Result<Step, Illegal>,
    pub admits: fn(Epoch, &Ticket) -> bool,
    /// An insert waits for, or finds, another row of the same key.
    pub ledger_is_unique: bool,
    /// The effect is written in the ledger row's transaction.
    pub effect_beside_row: bool,
    /// A release deletes the claim only if the token is its own.
    pub release_compares: bool,
    /// A message that is to be retried is removed once its copy is confirmed.
    pub copy_comes_first: bool,
    /// The handler works outside the ledger's transaction, under a claim that
    /// is committed before it runs.
    pub keyed: bool,
    /// Another's claim in the ledger is taken over only when its lease has run
    /// out.
    pub waits_for_lease: bool,
    /// A claim becomes a ledger row only if it is one's own.
    pub complete_compares: bool,
}

pub const REAL: Protocol = Protocol {
    step: lifecycle::step,
    admits: lifecycle::admits,
    ledger_is_unique: true,
    effect_beside_row: true,
    release_compares: true,
    copy_comes_first: true,
    keyed: false,
    waits_for_lease: true,
    complete_compares: true,
};

/// As [`REAL`], with a keyed handler.
pub const KEYED: Protocol = Protocol {
    keyed: true,
    ..REAL
};

/// A published message.
#[derive(Debug, Clone, Copy)]
pub struct Published {
    pub key: usize,
    pub body: u8,
    /// It has an id.
    pub usable: bool,
}

pub const KEYS: usize = 2;
pub const BODIES: usize = 2;
pub const PROCESSES: usize = 2;
/// Deliveries that one process has in hand, stale ones included.
pub const PREFETCH: usize = 2;

/// How often each thing may go wrong; a walk without bounds would not end.
/// Redis may be down, or forget, at any time and as often as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Faults {
    pub crashes: u8,
    pub disconnects: u8,
    /// Insert, handler or COMMIT fails, a message is quarantined, or PostgreSQL
    /// ends an idle transaction.
    pub failures: u8,
    /// COMMIT, or the copy for a retry, is sent and not answered.
    pub lost_replies: u8,
    pub stops: u8,
    /// A lease in the ledger runs out under somebody who lives: its process
    /// stood still, or did not reach the ledger. That of one who is gone runs
    /// out for nothing.
    pub lapses: u8,
}

/// Which delivery: its ticket and its claim's token in one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token {
    pub process: usize,
    pub epoch: u8,
    pub tag: u8,
}

/// Where the broker has a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    Queued,
    /// Handed to a process on its present connection, under a tag.
    Unacked(usize, u8),
    Acked,
    Dead,
    /// Removed, because a copy of it was confirmed into a retry queue.
    Copied,
}

/// What Redis has under a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Redis {
    Nothing,
    /// `None`: held by a delivery that is no more.
    Claim(Option<Token>),
    Done(u8),
}

/// A claim in the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Claim {
    /// `None`: of a delivery that is no more.
    pub owner: Option<Token>,
    /// Its lease has run out.
    pub lapsed: bool,
}

/// An open transaction that has inserted a ledger row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Transaction {
    pub key: usize,
    pub body: u8,
    pub effect: bool,
    pub commit_sent: bool,
}

/// One delivery in the hands of a process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Job {
    pub message: usize,
    pub token: Token,
    pub state: State,
    pub todo: &'static [Action],
    pub transaction: Option<Transaction>,
    /// COMMIT went unanswered, and the ledger has not been heard since.
    pub doubt: bool,
    /// Its keyed handler runs.
    pub calling: bool,
    /// It has, or may have, a claim in the ledger.
    pub claimed: bool,
    /// The lease of that claim has run out; whether it knows, is another matter.
    pub lapsed: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Process {
    pub epoch: u8,
    pub last_tag: u8,
    pub jobs: Vec<Job>,
    /// Message, delivery and verdict, on their way to the broker thread.
    pub settlements: Vec<(usize, Token, Settlement)>,
    /// Messages and deliveries of which a copy is with the publisher.
    pub parcels: Vec<(usize, Token)>,
    /// Deliveries whose copy the broker has confirmed.
    pub confirmed: Vec<Token>,
}

/// What only a moment shows, kept for the properties to see.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Slips {
    pub illegal_event: bool,
    pub stray_settlement: bool,
    pub stolen_claim: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    /// Where each message is, then each copy of one.
    pub places: Vec<Place>,
    /// Which message each of them is a copy of, itself at first.
    pub copies: Vec<usize>,
    /// The last reason, per message and copy.
    pub journal: Vec<Option<DeadReason>>,
    /// Whether the journal has a failed attempt, per message and copy.
    pub attempted: Vec<bool>,
    pub processes: [Process; PROCESSES],
    pub redis: [Redis; KEYS],
    /// Claims in the ledger, per key.
    pub claims: [Option<Claim>; KEYS],
    /// The body of the committed row, per key.
    pub ledger: [Option<u8>; KEYS],
    /// Committed effects, per key and body; of keyed handlers no more than two
    /// are counted.
    pub effects: [[u8; BODIES]; KEYS],
    /// Open transactions that no worker holds any more: the server ends them
    /// when it notices.
    pub orphans: Vec<Transaction>,
    pub faults: Faults,
    pub slips: Slips,
}

/// How an action goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Luck {
    Done,
    NotDone,
    /// No reply, though it is done or may yet come to be.
    Unanswered,
    Fails(Event),
}

/// Process, and position among its jobs.
pub type At = (usize, usize);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// The broker hands a message to a process.
    Deliver(usize, usize),
    /// A worker carries out the next action of a delivery.
    Carry(At, Luck),
    /// Something happens to a delivery that is not the reply to an action.
    Happen(At, Event),
    /// PostgreSQL ends a transaction that was idle for too long.
    EndIdle(At),
    /// The broker thread of a process takes the next settlement.
    Settle(usize),
    /// The publisher of a process has the next copy in a retry queue, where
    /// its delay is over at once.
    Publish(usize, Luck),
    /// The broker thread of a process hears of a confirmed copy.
    Confirm(usize),
    /// A lease runs out, a key is evicted, Redis is flushed or fails over.
    Forget(usize),
    /// A lease in the ledger runs out.
    Lapse(usize),
    /// The server ends a transaction that nobody holds any more.
    Commit(usize),
    Abort(usize),
    Crash(usize),
    Disconnect(usize),
}

pub const FAILURES: [Event; 5] = [
    Event::Failed(Class::Permanent),
    Event::Failed(Class::Transient),
    Event::Failed(Class::Systemic),
    Event::Exhausted,
    Event::BatchFailed,
];

/// A protocol, what is published, and how much may go wrong.
#[derive(Clone, Copy)]
pub struct Scenario {
    pub protocol: Protocol,
    pub messages: &'static [Published],
    pub faults: Faults,
    /// Names of what must be seen to happen.
    pub seen: &'static [&'static str],
}

/// Where a settlement brings a message.
pub fn resting(settlement: Settlement) -> Place {
    match settlement {
        Settlement::Ack => Place::Acked,
        Settlement::Reject => Place::Dead,
        Settlement::Requeue => Place::Queued,
        Settlement::Retry => Place::Copied,
    }
}

impl World {
    pub fn jobs(&self) -> impl Iterator<Item = &Job> {
        self.processes.iter().flat_map(|process| &process.jobs)
    }

    /// The messages that are settled so, or are about to be.
    pub fn decided(&self, settlement: Settlement) -> impl Iterator<Item = usize> {
        let rest = resting(settlement);
        let there = (0..self.places.len()).filter(move |at| self.places[*at] == rest);
        let sent = self
            .processes
            .iter()
            .flat_map(|process| &process.settlements);
        let sent = sent.filter(move |(_, _, told)| *told == settlement);
        let state = State::Settled(settlement);
        let deciding = self.jobs().filter(move |job| job.state == state);
        there
            .chain(sent.map(|(message, _, _)| *message))
            .chain(deciding.map(|job| job.message))
    }

    /// Whether the process still has the delivery that the broker waits for,
    /// or has settled it.
    pub fn is_in_hand(&self, process: usize, tag: u8) -> bool {
        let process = &self.processes[process];
        let this = |token: &Token| (token.epoch, token.tag) == (process.epoch, tag);
        let mut settlements = process.settlements.iter();
        process.jobs.iter().any(|job| this(&job.token))
            || settlements.any(|(_, token, _)| this(token))
            || process.parcels.iter().any(|(_, token)| this(token))
            || process.confirmed.iter().any(this)
    }

    pub fn commit_of(&mut self, (process, index): At, luck: Luck) -> Event {
        let job = &mut self.processes[process].jobs[index];
        let transaction = job.transaction.take();
        if luck == Luck::Unanswered {
            job.doubt = true;
            self.faults.lost_replies -= 1;
            self.abandon(transaction, true);
            return Event::CommitUnknown;
        }
        if let Some(transaction) = transaction {
            self.commit(transaction);
        }
        Event::Committed
    }

    pub fn commit(&mut self, transaction: Transaction) {
        let Transaction { key, body, .. } = transaction;
        self.ledger[key] = Some(body);
        self.effects[key][usize::from(body)] += u8::from(transaction.effect);
    }

    /// Leaves a transaction to the server, which may yet get its COMMIT.
    fn abandon(&mut self, transaction: Option<Transaction>, commit_sent: bool) {
        self.orphans.extend(transaction.map(|open| Transaction {
            commit_sent,
            ..open
        }));
        self.orphans.sort_unstable();
    }

    /// Drops the deliveries that are `gone`. Claims they have not given back
    /// stay until their lease runs out.
    pub fn dismiss(&mut self, process: usize, gone: impl Fn(&Job) -> bool) {
        let (redis, claims) = (&mut self.redis, &mut self.claims);
        self.processes[process].jobs.retain(|job| {
            let own = Redis::Claim(Some(job.token));
            for entry in redis.iter_mut().filter(|entry| gone(job) && **entry == own) {
                *entry = Redis::Claim(None);
            }
            for claim in claims.iter_mut().flatten() {
                if gone(job) && claim.owner == Some(job.token) {
                    claim.owner = None;
                }
            }
            !gone(job)
        });
    }

    pub fn deliver(&mut self, message: usize, number: usize) {
        let process = &mut self.processes[number];
        process.last_tag += 1;
        let token = Token {
            process: number,
            epoch: process.epoch,
            tag: process.last_tag,
        };
        self.places[message] = Place::Unacked(number, token.tag);
        process.jobs.push(Job {
            message,
            token,
            state: State::Received,
            todo: &[],
            transaction: None,
            doubt: false,
            calling: false,
            claimed: false,
            lapsed: false,
        });
    }

    /// The owner of the claim on `key`, if it lives.
    pub fn owner_of(&mut self, key: usize) -> Option<&mut Job> {
        let owner = self.claims[key]?.owner?;
        let jobs = self.processes.iter_mut().flat_map(|p| &mut p.jobs);
        jobs.into_iter().find(|job| job.token == owner)
    }

    pub fn lapse(&mut self, key: usize) {
        if let Some(job) = self.owner_of(key) {
            job.lapsed = true;
            self.faults.lapses -= 1;
        }
        if let Some(claim) = &mut self.claims[key] {
            claim.lapsed = true;
        }
    }

    /// The process dies with all it knows.
    pub fn crash(&mut self, process: usize) {
        for job in self.processes[process].jobs.clone() {
            let commit_sent = job.todo.first() == Some(&Action::Commit);
            self.abandon(job.transaction, commit_sent);
        }
        self.dismiss(process, |_| true);
        self.requeue_all(process);
        self.processes[process] = Process::default();
    }

    /// The connection is lost. The process keeps its work, and opens another
    /// connection, on which the tags start again.
    /// Its publisher ends with it.
    pub fn disconnect(&mut self, process: usize) {
        self.requeue_all(process);
        self.processes[process].parcels.clear();
        self.processes[process].confirmed.clear();
        self.processes[process].epoch += 1;
        self.processes[process].last_tag = 0;
    }

    /// A copy of `message` is in a retry queue, and soon in the work queue.
    pub fn copy(&mut self, message: usize) {
        self.places.push(Place::Queued);
        self.copies.push(self.copies[message]);
        self.journal.push(None);
        self.attempted.push(false);
    }

    /// The delivery under `token` is settled on the present connection.
    pub fn rest(&mut self, token: Token, place: Place) {
        let unacked = Place::Unacked(token.process, token.tag);
        match self.places.iter_mut().find(|place| **place == unacked) {
            None => self.slips.stray_settlement = true,
            Some(there) => *there = place,
        }
    }

    fn requeue_all(&mut self, process: usize) {
        for place in &mut self.places {
            if matches!(*place, Place::Unacked(holder, _) if holder == process) {
                *place = Place::Queued;
            }
        }
    }
}
