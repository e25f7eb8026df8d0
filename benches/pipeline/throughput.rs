//! Messages a second: the bare client, the per-message reference and the
//! daemon, on the same messages and the same type of queue, in turns.

use anyhow::{Context, Result};

use crate::Plan;
use crate::drain::drain;
use crate::messages::{Load, Shape};
use crate::report::Report;
use crate::stage::{QueueType, Stage};
use crate::subject::Kind;

/// Length of a body.
pub const BODY_BYTES: usize = 200;

/// Of the messages that the others drain, the reference drains every so
/// manieth: it takes that much longer, and its pace does not depend on how
/// many there are.
const REFERENCE_SHARE: usize = 4;

/// Each subject, with the percentages of duplicates at which it is measured.
const SUBJECTS: [(Kind, &[usize]); 7] = [
    (Kind::Bare { coalesced: false }, &[0]),
    (Kind::Bare { coalesced: true }, &[0]),
    (Kind::Floor, &[0]),
    (Kind::Reference { fused: false }, &[0, 10, 90]),
    (Kind::Reference { fused: true }, &[0]),
    (Kind::Daemon { workers: 1 }, &[0, 10, 90]),
    (Kind::Daemon { workers: 4 }, &[0, 10, 90]),
];

/// Measures every subject, in turns.
pub fn run(stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
    let (mut database, url) = stage.database("throughput")?;
    for round in 0..plan.rounds {
        for queue_type in QueueType::BOTH {
            for (kind, percentages) in SUBJECTS {
                for percent in percentages {
                    let key = format!("throughput/{}/{kind}/{percent}%", queue_type.name());
                    plan.say(round, &key);
                    stage.clean(&mut database)?;
                    let load = Load::new(Shape {
                        count: count(plan, kind),
                        duplicates_percent: *percent,
                        body_bytes: BODY_BYTES,
                    })?;
                    let settings = stage.settings(&url, queue_type);
                    let drained = drain(stage, &mut database, &kind, &settings, &load)
                        .with_context(|| format!("failed to measure {key}"))?;
                    report.add(&key, "messages/s", drained.per_second);
                    for (name, seconds) in [
                        ("cpu", drained.cpu_per_million),
                        ("cpu-of-the-machine", drained.machine_cpu_per_million),
                    ] {
                        let key = key.replacen("throughput", name, 1);
                        report.add(&key, "s/million", seconds);
                    }
                }
            }
        }
    }
    Ok(())
}

fn count(plan: &Plan, kind: Kind) -> usize {
    match kind {
        Kind::Reference { .. } => plan.messages / REFERENCE_SHARE,
        Kind::Bare { .. } | Kind::Floor | Kind::Daemon { .. } | Kind::Caller { .. } => {
            plan.messages
        }
    }
}
