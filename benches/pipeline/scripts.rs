//! What the handler's SQL costs when it runs message after message: a plain
//! INSERT, a counter, upserts of one key and of many, and an INSERT with a
//! millisecond of network between the daemon and PostgreSQL.

use anyhow::{Context, Result};

use crate::Plan;
use crate::drain::drain;
use crate::far::Far;
use crate::messages::{Load, Shape};
use crate::report::Report;
use crate::stage::{QueueType, Stage};
use crate::subject::{Kind, Script};
use crate::throughput::BODY_BYTES;

const TABLES: &str = "CREATE TABLE counter (id int PRIMARY KEY, n bigint NOT NULL); \
     CREATE TABLE seen (key text PRIMARY KEY, n bigint NOT NULL)";
const CLEAN: &str = "TRUNCATE counter, seen; \
     INSERT INTO counter SELECT id, 0 FROM generate_series(0, 999) AS id; VACUUM counter, seen";

const UPSERTS: &str = "SELECT coalesce(sum(n), 0)::bigint FROM seen";

const COUNTED: &str = "SELECT sum(n)::bigint FROM counter";

/// Two rows of twenty for each message, in any order: batches deadlock.
const TRANSFERS: Script = Script {
    sql: "UPDATE counter SET n = n + 1 FROM message \
          WHERE counter.id = mod(abs(hashtext(message_id)), 20); \
          UPDATE counter SET n = n + 1 FROM message \
          WHERE counter.id = mod(abs(hashtext(message_id || 'to')), 20)",
    applied: "SELECT (sum(n) / 2)::bigint FROM counter",
};

const TEN_COUNTERS: Script = Script {
    sql: "UPDATE counter SET n = n + 1 FROM message \
          WHERE counter.id = mod(abs(hashtext(message_id)), 10)",
    applied: COUNTED,
};

/// Each script, with how many workers run it.
const SCRIPTS: [(&str, Script, usize); 9] = [
    ("insert", Script::INSERT, 4),
    ("insert-1ms", Script::INSERT, 4),
    (
        "counter",
        Script {
            sql: "UPDATE counter SET n = n + 1 FROM message \
                  WHERE counter.id = mod(abs(hashtext(message_id)), 1000)",
            applied: COUNTED,
        },
        4,
    ),
    ("ten-counters-1w", TEN_COUNTERS, 1),
    ("ten-counters-4w", TEN_COUNTERS, 4),
    ("transfers-1w", TRANSFERS, 1),
    ("transfers-4w", TRANSFERS, 4),
    (
        "upsert-distinct",
        Script {
            sql: "INSERT INTO seen (key, n) SELECT message_id, 1 FROM message \
                  ON CONFLICT (key) DO UPDATE SET n = seen.n + 1",
            applied: UPSERTS,
        },
        4,
    ),
    (
        "upsert-one-key",
        Script {
            sql: "INSERT INTO seen (key, n) SELECT body->>'currency', 1 FROM message \
                  ON CONFLICT (key) DO UPDATE SET n = seen.n + 1",
            applied: UPSERTS,
        },
        4,
    ),
];

/// Measures every script, in turns.
pub fn run(stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
    let (mut database, url) = stage.database("scripts")?;
    database.execute(TABLES)?;
    for round in 0..plan.rounds {
        for (name, script, workers) in SCRIPTS {
            let key = format!("scripts/{name}");
            plan.say(round, &key);
            stage.clean(&mut database)?;
            for statement in CLEAN.split("; ") {
                database.execute(statement)?;
            }
            let load = Load::new(Shape {
                count: plan.messages,
                duplicates_percent: 0,
                body_bytes: BODY_BYTES,
            })?;
            let is_far = name.ends_with("-1ms");
            let far = is_far.then(|| Far::before(&url)).transpose()?;
            let url = far.as_ref().map_or(url.as_str(), Far::url);
            let mut settings = stage.settings(url, QueueType::Quorum);
            settings.script = script;
            let drained = drain(
                stage,
                &mut database,
                &Kind::Daemon { workers },
                &settings,
                &load,
            )
            .with_context(|| format!("failed to measure {key}"))?;
            report.add(&key, "messages/s", drained.per_second);
        }
    }
    Ok(())
}
