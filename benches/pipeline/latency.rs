//! From publish to ack at an offered load, open loop: a message counts from
//! when it was due, so a subject that falls behind cannot slow the load down
//! to its own pace.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::drain;
use crate::messages::{Load, Shape};
use crate::report::Report;
use crate::stage::{QueueType, Stage};
use crate::subject::Kind;
use crate::tap::Tap;
use crate::throughput::BODY_BYTES;
use crate::{Plan, stats};

const SUBJECTS: [Kind; 2] = [
    Kind::Daemon { workers: 4 },
    Kind::Reference { fused: false },
];

/// Messages a second.
pub const LOADS: [u32; 3] = [100, 1_000, 5_000];

/// Sent before the clock runs, for connections and prepared statements.
const WARM_UP: Shape = Shape {
    count: 500,
    duplicates_percent: 0,
    body_bytes: BODY_BYTES,
};
const WARM_UP_PER_SECOND: u32 = 1_000;

const QUANTILES: [(f64, &str); 3] = [(0.5, "p50"), (0.99, "p99"), (0.999, "p99.9")];

/// Measures every load, subject and type of queue, in turns.
pub fn run(stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
    let (mut database, url) = stage.database("latency")?;
    for round in 0..plan.rounds {
        for queue_type in QueueType::BOTH {
            for per_second in LOADS {
                for kind in SUBJECTS {
                    plan.say(
                        round,
                        &format!("latency {queue_type:?} {kind} {per_second}/s"),
                    );
                    stage.clean(&mut database)?;
                    let settings = stage.settings(&url, queue_type);
                    let count = plan.latency_seconds * per_second;
                    let load = Load::new(Shape {
                        count: usize::try_from(count)?,
                        ..WARM_UP
                    })?;
                    let run = Run {
                        kind,
                        per_second,
                        load,
                    };
                    let key = format!("latency/{}/{kind}/{per_second}", queue_type.name());
                    let (latencies, lateness) = run
                        .measure(stage, &mut database, settings)
                        .with_context(|| format!("failed to measure {key}"))?;
                    for (quantile, name) in QUANTILES {
                        let value = stats::quantile(&latencies, quantile);
                        report.add(&format!("{key}/{name}"), "ms", value.as_secs_f64() * 1e3);
                    }
                    let lateness = lateness.as_secs_f64() * 1e3;
                    report.add(&format!("{key}/publisher-lateness-max"), "ms", lateness);
                }
            }
        }
    }
    Ok(())
}

struct Run {
    kind: Kind,
    per_second: u32,
    load: Load,
}

impl Run {
    /// Every message's latency, sorted, and how late the publisher was at worst.
    fn measure(
        &self,
        stage: &mut Stage,
        database: &mut crate::database::Database,
        mut settings: crate::subject::Settings,
    ) -> Result<(Vec<Duration>, Duration)> {
        let amqp = settings.amqp.clone();
        let tap = Tap::before(&amqp)?;
        tap.url().clone_into(&mut settings.amqp);
        let mut subject = stage.start(&self.kind, &settings)?;
        let warm_up = Load::new(WARM_UP)?;
        warm_up.publish_paced(&amqp, &settings.queue, WARM_UP_PER_SECOND)?;
        drain::await_count(
            database,
            &mut subject,
            settings.script.applied,
            warm_up.distinct(),
        )?;
        let (due, lateness) = self
            .load
            .publish_paced(&amqp, &settings.queue, self.per_second)?;
        let distinct = warm_up.distinct() + self.load.distinct();
        drain::await_count(database, &mut subject, settings.script.applied, distinct)?;
        // Its stop sends the last acks, and the tap has seen them by then.
        drain::finish(stage, database, subject, &settings, distinct)?;
        let acks = tap.acks()?;
        let mut latencies = (0..self.load.len())
            .map(|place| {
                let acked: Option<&Instant> = acks.get(self.load.id(place));
                let acked = acked.context("the tap saw no ack of a message")?;
                Ok(acked.saturating_duration_since(due[place]))
            })
            .collect::<Result<Vec<_>>>()?;
        ensure!(!latencies.is_empty(), "no message was sent");
        latencies.sort_unstable();
        Ok((latencies, lateness))
    }
}
