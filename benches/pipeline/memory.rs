//! Resident memory of the daemon, and how soon it consumes.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::database::Database;
use crate::messages::{Load, Shape};
use crate::report::Report;
use crate::stage::{PATIENCE, QueueType, Stage};
use crate::subject::{Kind, Settings};
use crate::{Plan, drain};

const WORKERS: usize = 4;
const KIND: Kind = Kind::Daemon { workers: WORKERS };

/// How long the daemon idles before it is looked at.
const IDLE: Duration = Duration::from_secs(2);

/// What is held in flight: name, messages, bytes of a body.
const HELD: [(&str, u16, usize); 2] = [
    ("1000-of-1KB", 1_000, 1_000),
    ("100-of-1MB", 100, 1_000_000),
];

/// Start-up, idle, and with messages in flight, each round with new processes.
pub fn run(stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
    let (mut database, url) = stage.database("memory")?;
    for round in 0..plan.rounds {
        plan.say(round, "memory");
        stage.clean(&mut database)?;
        let settings = stage.settings(&url, QueueType::Classic);
        let subject = stage.start(&KIND, &settings)?;
        let startup = subject.started.elapsed();
        report.add(
            "startup/to-first-consume",
            "ms",
            startup.as_secs_f64() * 1e3,
        );
        std::thread::sleep(IDLE);
        report.add("memory/idle", "MiB", mebibytes(subject.memory("VmRSS")?));
        subject.stop()?;
        for (name, count, body_bytes) in HELD {
            stage.clean(&mut database)?;
            let mut settings = stage.settings(&url, QueueType::Classic);
            settings.prefetch = count;
            settings.extra = [
                "lock_timeout",
                "statement_timeout",
                "idle_in_transaction_timeout",
            ]
            .map(|key| (timeout_key(key), "5m".into()))
            .into();
            let load = Load::new(Shape {
                count: usize::from(count),
                duplicates_percent: 0,
                body_bytes,
            })?;
            let measured = held(stage, &mut database, &settings, &load)
                .with_context(|| format!("failed to measure memory with {name}"))?;
            for (when, bytes) in ["", "/peak", "/after"].iter().zip(measured) {
                report.add(&format!("memory/{name}{when}"), "MiB", mebibytes(bytes));
            }
        }
    }
    Ok(())
}

fn timeout_key(key: &str) -> &'static str {
    match key {
        "lock_timeout" => "postgres.lock_timeout",
        "statement_timeout" => "postgres.statement_timeout",
        _ => "postgres.idle_in_transaction_timeout",
    }
}

/// Resident bytes while every worker stands in its handler before a lock and
/// every message is with the daemon; the most there ever were, up to the end
/// of the work; and those that stay when it has nothing to do any more.
fn held(
    stage: &mut Stage,
    database: &mut Database,
    settings: &Settings,
    load: &Load,
) -> Result<[u64; 3]> {
    let mut holder = Database::connect(&settings.postgres)?;
    holder.execute("BEGIN")?;
    holder.execute("LOCK TABLE effect IN ACCESS EXCLUSIVE MODE")?;
    load.publish(&settings.amqp, &settings.queue)?;
    let mut subject = stage.start(&KIND, settings)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        let ready = stage.look(&settings.queue)?.ready;
        let waiting = database.number(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
             AND wait_event_type = 'Lock' AND pid <> pg_backend_pid()",
        )?;
        if ready == 0 && waiting == i64::try_from(WORKERS)? {
            break;
        }
        subject.ensure_alive()?;
        ensure!(
            Instant::now() < deadline,
            "{ready} messages wait and {waiting} workers stand before the lock\n{}",
            subject.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    // Handed over by the broker is not yet read by the daemon.
    subject.await_idle()?;
    let now = subject.memory("VmRSS")?;
    holder.execute("COMMIT")?;
    let applied = settings.script.applied;
    drain::await_count(database, &mut subject, applied, load.distinct())?;
    subject.await_idle()?;
    let peak = subject.memory("VmHWM")?;
    let after = subject.memory("VmRSS")?;
    drain::finish(stage, database, subject, settings, load.distinct())?;
    Ok([now, peak, after])
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
