//! What messages that fail for good cost their neighbours: throughput with one
//! in ten thousand beside throughput without.

use anyhow::{Context, Result};
use toml::Value;

use crate::Plan;
use crate::drain::drain;
use crate::messages::{Load, Shape};
use crate::report::Report;
use crate::stage::{QueueType, Stage};
use crate::subject::Kind;
use crate::throughput::BODY_BYTES;

/// Of so many messages one fails.
const ONE_IN: usize = 10_000;

const KIND: Kind = Kind::Daemon { workers: 4 };

/// Measures both, in turns.
pub fn run(stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
    let (mut database, url) = stage.database("poison")?;
    for round in 0..plan.rounds {
        for poisoned in [false, true] {
            let key = match poisoned {
                false => "poison/none",
                true => "poison/one-in-10000",
            };
            plan.say(round, key);
            stage.clean(&mut database)?;
            let mut load = Load::new(Shape {
                count: plan.messages,
                duplicates_percent: 0,
                body_bytes: BODY_BYTES,
            })?;
            database.execute("ALTER TABLE effect DROP CONSTRAINT IF EXISTS no_poison")?;
            if poisoned {
                let ids = load.doom_each(ONE_IN).join("', '");
                database.execute(&format!(
                    "ALTER TABLE effect ADD CONSTRAINT no_poison \
                     CHECK (message_id NOT IN ('{ids}'))"
                ))?;
            }
            let mut settings = stage.settings(&url, QueueType::Quorum);
            let backoff = Value::Array(vec!["100ms".into()]);
            settings.extra = vec![
                ("consumer.retry.max_attempts", 3.into()),
                ("consumer.retry.backoff", backoff),
            ];
            let drained = drain(stage, &mut database, &KIND, &settings, &load)
                .with_context(|| format!("failed to measure {key}"))?;
            report.add(key, "messages/s", drained.per_second);
        }
    }
    Ok(())
}
