//! Metrics in the form of Prometheus. Every series exists from the start, and
//! no label has values that a message could choose.
//!
//! A [`Meter`] is what one consumer counts on; [`Metrics::text`] is what
//! Prometheus reads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prometheus::proto::MetricFamily;
use prometheus::{
    Error, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::failure::Class;
use crate::message::{DeadReason, Settlement};

/// Media type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// From a handler of half a millisecond to one that takes a minute.
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];

/// From a message that is settled at once to one that waited for a day.
const AGES: &[f64] = &[
    0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 21600.0, 86400.0,
];

const BATCHES: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0,
];

/// Where a duplicate was recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundIn {
    /// Redis had the mark of this ledger.
    Redis,
    /// The ledger had its row.
    Ledger,
    /// The first one was in work in this process.
    Flight,
}

impl FoundIn {
    const ALL: [Self; 3] = [Self::Redis, Self::Ledger, Self::Flight];

    fn as_str(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Ledger => "ledger",
            Self::Flight => "flight",
        }
    }
}

/// A server that the daemon needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// RabbitMQ.
    Broker,
    /// Redis.
    Redis,
    /// PostgreSQL.
    Postgres,
}

impl Server {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Broker, Self::Redis, Self::Postgres];

    /// The label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Broker => "rabbitmq",
            Self::Redis => "redis",
            Self::Postgres => "postgresql",
        }
    }
}

/// Why a consumer takes no messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseCause {
    /// The world is broken: a systemic failure.
    World,
    /// So many attempts in a row failed that it must be.
    Breaker,
}

impl PauseCause {
    const ALL: [Self; 2] = [Self::World, Self::Breaker];

    fn as_str(self) -> &'static str {
        match self {
            Self::World => "systemic",
            Self::Breaker => "breaker",
        }
    }
}

/// The families of all consumers.
pub struct Metrics {
    registry: Registry,
    received: IntCounterVec,
    redelivered: IntCounterVec,
    settled: IntCounterVec,
    duplicates: IntCounterVec,
    failures: IntCounterVec,
    dead_letters: IntCounterVec,
    conflicts: IntCounterVec,
    claims_lost: IntCounterVec,
    reconnects: IntCounterVec,
    pauses: IntCounterVec,
    panics: IntCounterVec,
    in_flight: IntGaugeVec,
    parked: IntGaugeVec,
    consuming: IntGaugeVec,
    paused: IntGaugeVec,
    server_up: IntGaugeVec,
    batch: HistogramVec,
    handling: HistogramVec,
    settling: HistogramVec,
    age: HistogramVec,
}

impl Metrics {
    /// Families without a consumer, and what is known of this build.
    ///
    /// # Errors
    ///
    /// Never: names are literals, and `tests/metrics.rs` reads them all.
    pub fn new() -> Result<Self, Error> {
        let registry = Registry::new();
        let families = Families(&registry);
        let build = families.gauge(
            "build_info",
            "Always 1: which ackonce this is.",
            &["version"],
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Self {
            received: families.counter(
                "deliveries_total",
                "Messages the broker handed over, each time it did.",
                &["consumer"],
            )?,
            redelivered: families.counter(
                "redeliveries_total",
                "Those of them that had been handed over before.",
                &["consumer"],
            )?,
            settled: families.counter(
                "messages_total",
                "Deliveries settled, by what became of them.",
                &["consumer", "outcome"],
            )?,
            duplicates: families.counter(
                "duplicates_total",
                "Duplicates, by where they were recognised.",
                &["consumer", "found_in"],
            )?,
            failures: families.counter(
                "failed_attempts_total",
                "Attempts of the handler that failed, by failure class.",
                &["consumer", "class"],
            )?,
            dead_letters: families.counter(
                "dead_letters_total",
                "Messages dead-lettered, by reason.",
                &["consumer", "reason"],
            )?,
            conflicts: families.counter(
                "ledger_waits_total",
                "Deliveries that waited because another worker held their id.",
                &["consumer"],
            )?,
            claims_lost: families.counter(
                "claims_lost_total",
                "Claims that ran out while their holder still worked.",
                &["consumer"],
            )?,
            reconnects: families.counter(
                "reconnects_total",
                "Connections that had to be made anew, by server.",
                &["consumer", "server"],
            )?,
            pauses: families.counter(
                "pauses_total",
                "Times the consumer stopped taking messages, by cause.",
                &["consumer", "cause"],
            )?,
            panics: families.counter(
                "worker_panics_total",
                "Workers that panicked.",
                &["consumer"],
            )?,
            in_flight: families.gauge(
                "in_flight",
                "Deliveries that are handed over and not settled.",
                &["consumer"],
            )?,
            parked: families.gauge(
                "parked",
                "Deliveries whose id is claimed elsewhere, to be looked at again.",
                &["consumer"],
            )?,
            consuming: families.gauge(
                "consuming",
                "1 while the consumer is subscribed to its queue.",
                &["consumer"],
            )?,
            paused: families.gauge(
                "paused",
                "1 while the consumer takes only as much as it needs to find out that the world is mended.",
                &["consumer", "cause"],
            )?,
            server_up: families.gauge(
                "server_up",
                "1 while the last thing heard of the server was good.",
                &["consumer", "server"],
            )?,
            batch: families.histogram(
                "batch_messages",
                "Messages taken as one batch.",
                BATCHES,
            )?,
            handling: families.histogram(
                "handler_duration_seconds",
                "Time one run of the handler took, for its whole batch.",
                SECONDS,
            )?,
            settling: families.histogram(
                "settle_duration_seconds",
                "Time from a delivery to its settlement.",
                SECONDS,
            )?,
            age: families.histogram(
                "message_age_seconds",
                "Time from publishing to ack, by the timestamp property, which has whole seconds.",
                AGES,
            )?,
            registry: registry.clone(),
        };
        Ok(metrics)
    }

    /// What `consumer` counts on, with all of its series at zero.
    #[must_use]
    pub fn meter(&self, consumer: &str) -> Arc<Meter> {
        let of = |family: &IntCounterVec| family.with_label_values(&[consumer]);
        let by = |family: &IntCounterVec, value: &str| family.with_label_values(&[consumer, value]);
        let gauge = |family: &IntGaugeVec| family.with_label_values(&[consumer]);
        let gauge_by = |family: &IntGaugeVec, value: &str| {
            let gauge = family.with_label_values(&[consumer, value]);
            gauge.set(0);
            gauge
        };
        let histogram = |family: &HistogramVec| family.with_label_values(&[consumer]);
        Arc::new(Meter {
            received: of(&self.received),
            redelivered: of(&self.redelivered),
            outcomes: Outcome::ALL.map(|outcome| by(&self.settled, outcome.as_str())),
            duplicates: FoundIn::ALL.map(|place| by(&self.duplicates, place.as_str())),
            failures: Class::ALL.map(|class| by(&self.failures, class.as_str())),
            dead_letters: DeadReason::ALL.map(|reason| by(&self.dead_letters, reason.as_str())),
            conflicts: of(&self.conflicts),
            claims_lost: of(&self.claims_lost),
            reconnects: Server::ALL.map(|server| by(&self.reconnects, server.as_str())),
            pauses: PauseCause::ALL.map(|cause| by(&self.pauses, cause.as_str())),
            panics: of(&self.panics),
            in_flight: gauge(&self.in_flight),
            parked: gauge(&self.parked),
            consuming: gauge(&self.consuming),
            paused: PauseCause::ALL.map(|cause| gauge_by(&self.paused, cause.as_str())),
            up: Server::ALL.map(|server| gauge_by(&self.server_up, server.as_str())),
            batch: histogram(&self.batch),
            handling: histogram(&self.handling),
            settling: histogram(&self.settling),
            age: histogram(&self.age),
        })
    }

    /// Removes every series of a consumer that is no more. What its last
    /// threads still count is seen by nobody; another consumer of that name
    /// begins at zero.
    pub fn forget(&self, consumer: &str) {
        let counters = [
            &self.received,
            &self.redelivered,
            &self.conflicts,
            &self.claims_lost,
            &self.panics,
        ];
        // A series that is not there is as good as one that is removed.
        for family in counters {
            family.remove_label_values(&[consumer]).ok();
        }
        for family in [&self.in_flight, &self.parked, &self.consuming] {
            family.remove_label_values(&[consumer]).ok();
        }
        for family in [&self.batch, &self.handling, &self.settling, &self.age] {
            family.remove_label_values(&[consumer]).ok();
        }
        let by = |family: &IntCounterVec, values: &[&str]| {
            for value in values {
                family.remove_label_values(&[consumer, value]).ok();
            }
        };
        by(&self.settled, &Outcome::ALL.map(Outcome::as_str));
        by(&self.duplicates, &FoundIn::ALL.map(FoundIn::as_str));
        by(&self.failures, &Class::ALL.map(Class::as_str));
        by(&self.dead_letters, &DeadReason::ALL.map(DeadReason::as_str));
        by(&self.reconnects, &Server::ALL.map(Server::as_str));
        by(&self.pauses, &PauseCause::ALL.map(PauseCause::as_str));
        for cause in PauseCause::ALL {
            let labels = [consumer, cause.as_str()];
            self.paused.remove_label_values(&labels).ok();
        }
        for server in Server::ALL {
            let labels = [consumer, server.as_str()];
            self.server_up.remove_label_values(&labels).ok();
        }
    }

    /// `consumer` does without `server`: there is nothing to be said of it.
    pub fn without(&self, consumer: &str, server: Server) {
        let labels = [consumer, server.as_str()];
        // Not there is as good as taken away.
        self.server_up.remove_label_values(&labels).ok();
        self.reconnects.remove_label_values(&labels).ok();
    }

    /// The values that a family of counters or gauges has for `consumer`, by
    /// the value of its other label; by nothing if it has none.
    #[must_use]
    pub fn values(&self, family: &str, consumer: &str, label: &str) -> BTreeMap<String, u64> {
        let families = self.registry.gather();
        let family = families.iter().find(|f| f.name() == full(family));
        let mut values = BTreeMap::new();
        for metric in family.map(MetricFamily::get_metric).unwrap_or_default() {
            let of = |name: &str| metric.get_label().iter().find(|pair| pair.name() == name);
            if of("consumer").is_some_and(|pair| pair.value() == consumer) {
                let key = of(label).map(|pair| pair.value().to_owned());
                let value = metric.get_counter().get_value() + metric.get_gauge().get_value();
                values.insert(key.unwrap_or_default(), whole(value));
            }
        }
        values
    }

    /// Everything, in the text format.
    ///
    /// # Errors
    ///
    /// When a family contradicts itself, which none does.
    pub fn text(&self) -> Result<String, Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// Makes families and registers them.
struct Families<'a>(&'a Registry);

impl Families<'_> {
    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        let family = IntCounterVec::new(Opts::new(full(name), help), labels)?;
        self.0.register(Box::new(family.clone()))?;
        Ok(family)
    }

    fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, Error> {
        let family = IntGaugeVec::new(Opts::new(full(name), help), labels)?;
        self.0.register(Box::new(family.clone()))?;
        Ok(family)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<HistogramVec, Error> {
        let options = HistogramOpts::new(full(name), help).buckets(buckets.to_vec());
        let family = HistogramVec::new(options, &["consumer"])?;
        self.0.register(Box::new(family.clone()))?;
        Ok(family)
    }
}

fn full(name: &str) -> String {
    format!("ackonce_{name}")
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it was a count"
)]
fn whole(value: f64) -> u64 {
    value.max(0.0) as u64
}

/// What became of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Applied,
    Duplicate,
    Retried,
    DeadLettered,
    Returned,
}

impl Outcome {
    const ALL: [Self; 5] = [
        Self::Applied,
        Self::Duplicate,
        Self::Retried,
        Self::DeadLettered,
        Self::Returned,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Duplicate => "duplicate",
            Self::Retried => "retried",
            Self::DeadLettered => "dead-lettered",
            Self::Returned => "returned",
        }
    }
}

/// A delivery that is settled, as far as it is counted.
#[derive(Debug, Clone, Copy)]
pub struct Settling {
    /// What the broker is told.
    pub settlement: Settlement,
    /// Tells two kinds of ack apart.
    pub is_duplicate: bool,
    /// Of a dead letter.
    pub reason: Option<DeadReason>,
    /// Since it was delivered.
    pub took: Duration,
    /// By the message itself.
    pub published_at: Option<SystemTime>,
}

/// What one consumer counts on, shared by its threads. Nothing here waits.
#[derive(Debug)]
pub struct Meter {
    received: IntCounter,
    redelivered: IntCounter,
    outcomes: [IntCounter; Outcome::ALL.len()],
    duplicates: [IntCounter; FoundIn::ALL.len()],
    failures: [IntCounter; Class::ALL.len()],
    dead_letters: [IntCounter; DeadReason::ALL.len()],
    conflicts: IntCounter,
    claims_lost: IntCounter,
    reconnects: [IntCounter; Server::ALL.len()],
    pauses: [IntCounter; PauseCause::ALL.len()],
    panics: IntCounter,
    in_flight: IntGauge,
    parked: IntGauge,
    consuming: IntGauge,
    paused: [IntGauge; PauseCause::ALL.len()],
    up: [IntGauge; Server::ALL.len()],
    batch: Histogram,
    handling: Histogram,
    settling: Histogram,
    age: Histogram,
}

impl Meter {
    /// The broker handed a message over.
    pub fn received(&self, redelivered: bool) {
        self.received.inc();
        self.redelivered.inc_by(u64::from(redelivered));
    }

    /// A worker took so many messages as a batch.
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

    /// A delivery has to wait for another worker's.
    pub fn parked(&self) {
        self.conflicts.inc();
    }

    /// Claims of work at hand have run out.
    pub fn lost_claims(&self, claims: u64) {
        self.claims_lost.inc_by(claims);
    }

    /// A delivery is settled.
    pub fn settled(&self, settling: &Settling) {
        let settlement = settling.settlement;
        let outcome = match settlement {
            Settlement::Ack if settling.is_duplicate => Outcome::Duplicate,
            Settlement::Ack => Outcome::Applied,
            Settlement::Retry => Outcome::Retried,
            Settlement::Reject => Outcome::DeadLettered,
            Settlement::Requeue => Outcome::Returned,
        };
        self.outcomes[outcome as usize].inc();
        if let Some(reason) = settling.reason.filter(|_| settlement == Settlement::Reject) {
            self.dead_letters[reason as usize].inc();
        }
        self.settling.observe(settling.took.as_secs_f64());
        // A clock that is behind the publisher's makes no age.
        if let Some(age) = settling.published_at.and_then(|at| at.elapsed().ok())
            && settlement == Settlement::Ack
        {
            self.age.observe(age.as_secs_f64());
        }
    }

    /// A connection to `server` had to be made anew.
    pub fn reconnected(&self, server: Server) {
        self.reconnects[server as usize].inc();
    }

    /// What was last heard of `server`.
    pub fn is_up(&self, server: Server, up: bool) {
        self.up[server as usize].set(i64::from(up));
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
        self.in_flight
            .set(i64::try_from(deliveries).unwrap_or(i64::MAX));
    }

    /// One worker's parked deliveries were so many, and are so many now.
    pub fn parked_changed(&self, before: usize, now: usize) {
        let [before, now] = [before, now].map(|count| i64::try_from(count).unwrap_or(i64::MAX));
        self.parked.add(now - before);
    }
}

#[expect(clippy::cast_precision_loss, reason = "a batch has at most 4,096")]
fn count(messages: usize) -> f64 {
    messages as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_that_is_forgotten_leaves_no_series_behind() {
        let metrics = Metrics::new().unwrap();
        let before = metrics.text().unwrap();
        let kept = metrics.meter("bills");
        let alone = metrics.text().unwrap();
        let meter = metrics.meter("orders");
        meter.received(false);
        meter.took(3);
        metrics.forget("orders");
        assert_eq!(metrics.text().unwrap(), alone);
        // Its last threads may still count.
        meter.received(false);
        drop(kept);
        metrics.forget("bills");
        assert_eq!(metrics.text().unwrap(), before);
        let _again = metrics.meter("bills");
        assert_eq!(metrics.text().unwrap(), alone);
    }
}
