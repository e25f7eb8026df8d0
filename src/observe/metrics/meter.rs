//! What one consumer counts on.

use std::time::{Duration, SystemTime};

use prometheus::{Histogram, IntCounter, IntGauge};

use super::labels::{FoundIn, LedgerStep, Outcome, PauseCause, RerunCause, Server};
use crate::failure::Class;
use crate::message::{DeadReason, Settlement};

/// A delivery about which a worker has decided.
#[derive(Debug, Clone, Copy)]
pub struct Settling {
    /// What the broker is to be told.
    pub settlement: Settlement,
    /// Tells two kinds of ack apart.
    pub is_duplicate: bool,
    /// Since it was delivered.
    pub took: Duration,
    /// By the message itself.
    pub published_at: Option<SystemTime>,
}

/// What one consumer counts on, shared by its threads. Nothing here waits.
///
/// What is in the ledger is counted when that is known, whether or not the
/// broker can still be told. What is not applied is counted when the broker has
/// been told: before that, it may come to nothing.
#[derive(Debug)]
pub struct Meter {
    pub(super) received: IntCounter,
    pub(super) redelivered: IntCounter,
    pub(super) outcomes: [IntCounter; 6],
    pub(super) duplicates: [IntCounter; 3],
    pub(super) failures: [IntCounter; Class::ALL.len()],
    pub(super) dead_letters: [IntCounter; DeadReason::ALL.len()],
    pub(super) ledger_errors: [IntCounter; 6],
    pub(super) ledger_waits: IntCounter,
    pub(super) claims_lost: IntCounter,
    pub(super) reconnects: [IntCounter; 3],
    pub(super) reruns: [IntCounter; 3],
    pub(super) pauses: [IntCounter; 2],
    pub(super) panics: IntCounter,
    pub(super) in_flight: IntGauge,
    pub(super) parked: IntGauge,
    pub(super) copies: IntGauge,
    pub(super) consuming: IntGauge,
    pub(super) single_file: IntGauge,
    pub(super) paused: [IntGauge; 2],
    pub(super) up: [IntGauge; 3],
    pub(super) batch: Histogram,
    pub(super) handling: Histogram,
    pub(super) settling: Histogram,
    pub(super) age: Histogram,
}

impl Meter {
    /// The broker handed a message over.
    pub fn received(&self, redelivered: bool) {
        self.received.inc();
        self.redelivered.inc_by(u64::from(redelivered));
    }

    /// So many messages were taken as a batch.
    pub fn took(&self, messages: usize) {
        self.batch.observe(count(messages));
    }

    /// The handler ran once, for as long.
    pub fn handled(&self, duration: Duration) {
        self.handling.observe(duration.as_secs_f64());
    }

    /// A delivery is a duplicate.
    pub fn duplicate(&self, found_in: FoundIn) {
        self.duplicates[found_in as usize].inc();
    }

    /// An attempt failed.
    pub fn failed(&self, class: Class) {
        self.failures[class as usize].inc();
    }

    /// The ledger did not do what it was asked for.
    pub fn ledger_failed(&self, step: LedgerStep) {
        self.ledger_errors[step as usize].inc();
    }

    /// A delivery has to wait for another worker's.
    pub fn waits(&self) {
        self.ledger_waits.inc();
    }

    /// Claims of work at hand have run out.
    pub fn lost_claims(&self, claims: u64) {
        self.claims_lost.inc_by(claims);
    }

    /// A worker has decided about a delivery. Counts it if it is applied.
    pub fn decided(&self, settling: &Settling) {
        self.settling.observe(settling.took.as_secs_f64());
        if settling.settlement != Settlement::Ack {
            return;
        }
        self.count(match settling.is_duplicate {
            true => Outcome::Duplicate,
            false => Outcome::Applied,
        });
        // A clock that is behind the publisher's makes no age.
        if let Some(age) = settling.published_at.and_then(|at| at.elapsed().ok()) {
            self.age.observe(age.as_secs_f64());
        }
    }

    /// The broker has the copy that comes back later.
    pub fn retried(&self) {
        self.count(Outcome::Retried);
    }

    /// The broker has the dead letter, or makes it.
    pub fn dead_lettered(&self, reason: DeadReason) {
        self.count(Outcome::DeadLettered);
        self.dead_letters[reason as usize].inc();
    }

    /// A delivery went back to the queue.
    pub fn returned(&self) {
        self.count(Outcome::Returned);
    }

    /// So many deliveries that were not applied lost their connection before
    /// the broker was told.
    pub fn lost(&self, deliveries: usize) {
        let deliveries = u64::try_from(deliveries).unwrap_or(u64::MAX);
        self.outcomes[Outcome::Lost as usize].inc_by(deliveries);
    }

    /// As [`Meter::lost`], for one about which a worker had decided: what is
    /// applied was counted then.
    pub fn lost_with(&self, settlement: Settlement) {
        if settlement != Settlement::Ack {
            self.lost(1);
        }
    }

    fn count(&self, outcome: Outcome) {
        self.outcomes[outcome as usize].inc();
    }

    /// A connection to `server` had to be made anew.
    pub fn reconnected(&self, server: Server) {
        self.reconnects[server as usize].inc();
    }

    /// What was last heard of `server`.
    pub fn is_up(&self, server: Server, up: bool) {
        self.up[server as usize].set(i64::from(up));
    }

    /// A transaction of several messages is run again.
    pub fn reran(&self, cause: RerunCause) {
        self.reruns[cause as usize].inc();
    }

    /// Whether one transaction is open at a time.
    pub fn single_file(&self, is_single: bool) {
        self.single_file.set(i64::from(is_single));
    }

    /// The consumer pauses.
    pub fn paused(&self, cause: PauseCause) {
        self.pauses[cause as usize].inc();
        self.paused[cause as usize].set(1);
    }

    /// The consumer takes messages again.
    pub fn resumed(&self) {
        self.paused.iter().for_each(|gauge| gauge.set(0));
    }

    /// A worker panicked.
    pub fn panicked(&self) {
        self.panics.inc();
    }

    /// Whether the consumer is subscribed.
    pub fn consuming(&self, is: bool) {
        self.consuming.set(i64::from(is));
    }

    /// So many deliveries are handed over and not settled.
    pub fn in_flight(&self, deliveries: usize) {
        self.in_flight.set(gauge(deliveries));
    }

    /// So many of them wait for the broker to confirm a copy.
    pub fn copies(&self, waiting: usize) {
        self.copies.set(gauge(waiting));
    }

    /// One worker's parked deliveries were so many, and are so many now.
    pub fn parked_changed(&self, before: usize, now: usize) {
        self.parked.add(gauge(now) - gauge(before));
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "a batch has at most 4,096")]
fn count(messages: usize) -> f64 {
    messages as f64
}
