//! Metrics in the form of Prometheus. Every series of a consumer exists from
//! its start, and no label has values that a message could choose.
//!
//! A [`Meter`] is what one consumer counts on; [`Metrics::text`] is what
//! Prometheus reads. `docs/metrics.md` describes each of them.

mod families;
mod labels;
mod meter;
mod process;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::proto::MetricFamily;
use prometheus::{Error, IntCounterVec, IntGaugeVec, Registry, TextEncoder};

use crate::failure::Class;
use crate::message::DeadReason;
use families::{Counters, CountersBy, Families, Gauges, GaugesBy, Histograms};
pub use labels::{FoundIn, LedgerStep, PauseCause, RerunCause, Server};
use labels::{Label, Outcome, PrunedTable};
pub use meter::{Meter, Settling};
use process::Process;

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

/// The families of all consumers, and the daemon's own.
pub struct Metrics {
    registry: Registry,
    messages: Messages,
    servers: Servers,
    timings: Timings,
    info: IntGaugeVec,
    /// What [`Metrics::describe`] said last of each consumer.
    described: Mutex<HashMap<String, [String; 3]>>,
    pruned: IntCounterVec,
    process: Process,
}

/// How many messages came, and what became of them.
struct Messages {
    received: Counters,
    redelivered: Counters,
    outcomes: CountersBy<6>,
    duplicates: CountersBy<3>,
    failures: CountersBy<{ Class::ALL.len() }>,
    dead_letters: CountersBy<{ DeadReason::ALL.len() }>,
    in_flight: Gauges,
    parked: Gauges,
    copies: Gauges,
}

/// How the consumer stands with its servers and its workers.
struct Servers {
    ledger_errors: CountersBy<6>,
    ledger_waits: Counters,
    claims_lost: Counters,
    reconnects: CountersBy<3>,
    reruns: CountersBy<3>,
    pauses: CountersBy<2>,
    panics: Counters,
    consuming: Gauges,
    single_file: Gauges,
    paused: GaugesBy<2>,
    up: GaugesBy<3>,
}

struct Timings {
    batch: Histograms,
    handling: Histograms,
    settling: Histograms,
    age: Histograms,
}

impl Messages {
    fn register(families: &Families<'_>) -> Result<Self, Error> {
        Ok(Self {
            received: families.counter(
                "deliveries_total",
                "Messages the broker handed over, each time it did.",
            )?,
            redelivered: families.counter(
                "redeliveries_total",
                "Those of them that had been handed over before.",
            )?,
            outcomes: families.counter_by::<_, Outcome>(
                "outcome",
                "messages_total",
                "Deliveries, by what became of them.",
            )?,
            duplicates: families.counter_by::<_, FoundIn>(
                "found_in",
                "duplicates_total",
                "Duplicates, by where they were recognised.",
            )?,
            failures: families.counter_by::<_, Class>(
                "class",
                "failed_attempts_total",
                "Attempts of the handler that failed, by failure class.",
            )?,
            dead_letters: families.counter_by::<_, DeadReason>(
                "reason",
                "dead_letters_total",
                "Messages dead-lettered, by reason.",
            )?,
            in_flight: families.gauge(
                "in_flight",
                "Deliveries that are handed over and not settled.",
            )?,
            parked: families.gauge(
                "parked",
                "Deliveries whose id is claimed elsewhere, to be looked at again.",
            )?,
            copies: families.gauge(
                "copies_waiting",
                "Deliveries whose copy, a retry or a dead letter, the broker has not confirmed.",
            )?,
        })
    }
}

impl Servers {
    fn register(families: &Families<'_>) -> Result<Self, Error> {
        Ok(Self {
            ledger_errors: families.counter_by::<_, LedgerStep>(
                "step",
                "ledger_errors_total",
                "Times the ledger did not do what it was asked for, by what that was.",
            )?,
            ledger_waits: families.counter(
                "ledger_waits_total",
                "Deliveries that waited because another worker held their id.",
            )?,
            claims_lost: families.counter(
                "claims_lost_total",
                "Claims in the ledger that ran out while their handler still worked.",
            )?,
            reconnects: families.counter_by::<_, Server>(
                "server",
                "reconnects_total",
                "Connections that had to be made anew, by server.",
            )?,
            reruns: families.counter_by::<_, RerunCause>(
                "cause",
                "batch_reruns_total",
                "Transactions of several messages that were run again, by cause.",
            )?,
            pauses: families.counter_by::<_, PauseCause>(
                "cause",
                "pauses_total",
                "Times the consumer stopped taking messages, by cause.",
            )?,
            panics: families.counter(
                "worker_panics_total",
                "Times a worker panicked and all of the consumer's were started anew.",
            )?,
            single_file: families.gauge(
                "single_file",
                "1 while transactions collide and one is open at a time.",
            )?,
            consuming: families.gauge(
                "consuming",
                "1 while the consumer is subscribed to its queue.",
            )?,
            paused: families.gauge_by::<_, PauseCause>(
                "cause",
                "paused",
                "1 while the consumer takes only as much as it needs to find out that the world is mended.",
            )?,
            up: families.gauge_by::<_, Server>(
                "server",
                "server_up",
                "1 while the last thing heard of the server was good.",
            )?,
        })
    }
}

impl Timings {
    fn register(families: &Families<'_>) -> Result<Self, Error> {
        Ok(Self {
            batch: families.histogram("batch_messages", "Messages taken as one batch.", BATCHES)?,
            handling: families.histogram(
                "handler_duration_seconds",
                "Time one run of the handler took, for its whole batch.",
                SECONDS,
            )?,
            settling: families.histogram(
                "settle_duration_seconds",
                "Time from a delivery to the decision about it.",
                SECONDS,
            )?,
            age: families.histogram(
                "message_age_seconds",
                "Time from publishing to ack, by the timestamp property, which has whole seconds.",
                AGES,
            )?,
        })
    }
}

impl Metrics {
    /// Families without a consumer, what is known of this build, and the
    /// process's own series.
    ///
    /// # Errors
    ///
    /// Never: names are literals, and `tests/it/metrics.rs` reads them all.
    pub fn new() -> Result<Self, Error> {
        let registry = Registry::new();
        let families = Families(&registry);
        let build = families.gauge_vec(
            "build_info",
            "Always 1: which ackonce this is.",
            &["version"],
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let pruned = families.counter_vec(
            "rows_pruned_total",
            "Rows older than the retention that this daemon deleted, by table.",
            &["table"],
        )?;
        for table in PrunedTable::names() {
            pruned.with_label_values(&[table]);
        }
        Ok(Self {
            messages: Messages::register(&families)?,
            servers: Servers::register(&families)?,
            timings: Timings::register(&families)?,
            info: families.gauge_vec(
                "consumer_info",
                "Always 1: the consumer's queue, its handler, and what its effect is.",
                &["consumer", "queue", "handler", "effect"],
            )?,
            described: Mutex::default(),
            pruned,
            process: Process::register(&registry)?,
            registry,
        })
    }

    /// What `consumer` counts on, with all of its series; those that are new
    /// begin at zero.
    #[must_use]
    pub fn meter(&self, consumer: &str) -> Arc<Meter> {
        let Self {
            messages,
            servers,
            timings,
            ..
        } = self;
        Arc::new(Meter {
            received: messages.received.of(consumer),
            redelivered: messages.redelivered.of(consumer),
            outcomes: messages.outcomes.of(consumer),
            duplicates: messages.duplicates.of(consumer),
            failures: messages.failures.of(consumer),
            dead_letters: messages.dead_letters.of(consumer),
            in_flight: messages.in_flight.of(consumer),
            parked: messages.parked.of(consumer),
            copies: messages.copies.of(consumer),
            ledger_errors: servers.ledger_errors.of(consumer),
            ledger_waits: servers.ledger_waits.of(consumer),
            claims_lost: servers.claims_lost.of(consumer),
            reconnects: servers.reconnects.of(consumer),
            reruns: servers.reruns.of(consumer),
            pauses: servers.pauses.of(consumer),
            panics: servers.panics.of(consumer),
            consuming: servers.consuming.of(consumer),
            single_file: servers.single_file.of(consumer),
            paused: servers.paused.of(consumer),
            up: servers.up.of(consumer),
            batch: timings.batch.of(consumer),
            handling: timings.handling.of(consumer),
            settling: timings.settling.of(consumer),
            age: timings.age.of(consumer),
        })
    }

    /// Shows what `consumer` runs, in place of what was said of it before:
    /// its queue, the type of its handler, and what the effect of that is.
    pub fn describe(&self, consumer: &str, [queue, handler, effect]: [&str; 3]) {
        self.undescribe(consumer);
        self.info
            .with_label_values(&[consumer, queue, handler, effect])
            .set(1);
        let said = [queue, handler, effect].map(str::to_owned);
        self.described().insert(consumer.to_owned(), said);
    }

    fn undescribe(&self, consumer: &str) {
        if let Some([queue, handler, effect]) = self.described().remove(consumer) {
            let labels = [consumer, &queue, &handler, &effect];
            // One that is not there is as good as one that is removed.
            self.info.remove_label_values(&labels).ok();
        }
    }

    fn described(&self) -> std::sync::MutexGuard<'_, HashMap<String, [String; 3]>> {
        self.described
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// So many rows of the ledger, the failure journal, the crash marks and
    /// the claims are deleted.
    pub fn pruned(&self, [ledger, failures, suspects, claims]: [u64; 4]) {
        let rows = [ledger, failures, suspects, claims];
        for (table, rows) in PrunedTable::names().into_iter().zip(rows) {
            self.pruned.with_label_values(&[table]).inc_by(rows);
        }
    }

    /// Removes every series of a consumer that is no more. What its last
    /// threads still count is seen by nobody; another consumer of that name
    /// begins at zero.
    pub fn forget(&self, consumer: &str) {
        let Messages {
            received,
            redelivered,
            outcomes,
            duplicates,
            failures,
            dead_letters,
            in_flight,
            parked,
            copies,
        } = &self.messages;
        let Servers {
            ledger_errors,
            ledger_waits,
            claims_lost,
            reconnects,
            reruns,
            pauses,
            panics,
            consuming,
            single_file,
            paused,
            up,
        } = &self.servers;
        let Timings {
            batch,
            handling,
            settling,
            age,
        } = &self.timings;
        for counters in [received, redelivered, ledger_waits, claims_lost, panics] {
            counters.forget(consumer);
        }
        for gauges in [in_flight, parked, copies, consuming, single_file] {
            gauges.forget(consumer);
        }
        for histograms in [batch, handling, settling, age] {
            histograms.forget(consumer);
        }
        outcomes.forget(consumer);
        duplicates.forget(consumer);
        failures.forget(consumer);
        dead_letters.forget(consumer);
        ledger_errors.forget(consumer);
        reconnects.forget(consumer);
        reruns.forget(consumer);
        pauses.forget(consumer);
        paused.forget(consumer);
        up.forget(consumer);
        self.undescribe(consumer);
    }

    /// `consumer` does without `server`: there is nothing to be said of it.
    pub fn without(&self, consumer: &str, server: Server) {
        self.servers.up.remove(consumer, server.name());
        self.servers.reconnects.remove(consumer, server.name());
    }

    /// The values that a family of counters or gauges has for `consumer`, by
    /// the value of its other label; by nothing if it has none.
    #[must_use]
    pub fn values(&self, family: &str, consumer: &str, label: &str) -> BTreeMap<String, u64> {
        let families = self.registry.gather();
        let family = families.iter().find(|f| f.name() == families::full(family));
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
        self.process.look();
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it was a count"
)]
fn whole(value: f64) -> u64 {
    value.max(0.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without the process's own, which change from one moment to the next.
    fn series(metrics: &Metrics) -> Vec<String> {
        let text = metrics.text().unwrap();
        let ours = text.lines().filter(|line| line.starts_with("ackonce_"));
        ours.map(str::to_owned).collect()
    }

    #[test]
    fn a_consumer_that_is_forgotten_leaves_no_series_behind() {
        let metrics = Metrics::new().unwrap();
        let before = series(&metrics);
        let kept = metrics.meter("bills");
        metrics.describe("bills", ["q", "sql", "transactional"]);
        let alone = series(&metrics);
        let meter = metrics.meter("orders");
        metrics.describe("orders", ["q", "http", "keyed"]);
        meter.received(false);
        meter.took(3);
        metrics.forget("orders");
        assert_eq!(series(&metrics), alone);
        // Its last threads may still count.
        meter.received(false);
        drop(kept);
        metrics.forget("bills");
        assert_eq!(series(&metrics), before);
        let _again = metrics.meter("bills");
        metrics.describe("bills", ["q", "sql", "transactional"]);
        assert_eq!(series(&metrics), alone);
    }

    #[test]
    fn a_handler_that_changes_takes_the_place_of_the_old_one() {
        let metrics = Metrics::new().unwrap();
        metrics.describe("orders", ["q", "sql", "transactional"]);
        metrics.describe("orders", ["q", "http", "keyed"]);
        let said = series(&metrics);
        let said: Vec<_> = said.iter().filter(|l| l.contains("_info{c")).collect();
        let expected =
            r#"ackonce_consumer_info{consumer="orders",effect="keyed",handler="http",queue="q"} 1"#;
        assert_eq!(said, [expected]);
    }

    #[test]
    fn a_server_that_is_not_used_is_neither_up_nor_down() {
        let metrics = Metrics::new().unwrap();
        let _meter = metrics.meter("orders");
        metrics.without("orders", Server::Redis);
        assert!(
            !series(&metrics)
                .iter()
                .any(|line| line.contains(r#"server="redis""#))
        );
        assert_eq!(metrics.values("server_up", "orders", "server").len(), 2);
    }
}
