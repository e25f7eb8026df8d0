//! What a ledger that has grown costs: throughput, bytes, and pruning.

use anyhow::{Context, Result};
use toml::Value;

use crate::database::Database;
use crate::drain::{Drain, drain};
use crate::messages::{Load, Shape};
use crate::report::Report;
use crate::stage::{CONSUMER, QueueType, Stage};
use crate::subject::{Kind, Settings};
use crate::throughput::BODY_BYTES;
use crate::{Plan, stats};

const KIND: Kind = Kind::Daemon { workers: 4 };

/// Bytes of write-ahead log ever written. A row that goes to a page which the
/// last checkpoint has seen takes the whole page along.
const WAL: &str = "SELECT (pg_current_wal_lsn() - '0/0')::bigint";

struct Ledger {
    rows: u64,
    database: Database,
    url: String,
}

/// Throughput with ledgers of several sizes, in turns, each in a database of
/// its own; what each message writes; and the bytes of a row.
pub fn run(stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
    let mut ledgers = Vec::new();
    for rows in &plan.ledger_rows {
        plan.say(0, &format!("growth: a ledger of {rows} rows"));
        let (mut database, url) = stage.database(&format!("rows_{rows}"))?;
        fill(&mut database, *rows, "0 days")?;
        ledgers.push(Ledger {
            rows: *rows,
            database,
            url,
        });
    }
    for round in 0..plan.rounds {
        for ledger in &mut ledgers {
            let key = format!("growth/{}-rows", ledger.rows);
            plan.say(round, &key);
            stage.forget_claims()?;
            ledger.database.execute("TRUNCATE effect")?;
            if ledger.rows == 0 {
                ledger.database.execute("TRUNCATE ackonce.ledger")?;
            }
            let settings = stage.settings(&ledger.url, QueueType::Classic);
            let written = ledger.database.number(WAL)?;
            let drained = measure(stage, plan, &mut ledger.database, &settings)
                .with_context(|| format!("failed to measure {key}"))?;
            report.add(&key, "messages/s", drained.per_second);
            let written = ledger.database.number(WAL)? - written;
            let key = format!("{key}/wal-per-message");
            report.add(&key, "bytes", written as f64 / plan.messages as f64);
        }
    }
    for ledger in &mut ledgers {
        let bytes = ledger.database.number(
            "SELECT (pg_total_relation_size('ackonce.ledger') / count(*))::bigint \
             FROM ackonce.ledger",
        )?;
        let key = format!("growth/{}-rows/bytes-per-row", ledger.rows);
        report.add(&key, "bytes", bytes as f64);
    }
    Ok(())
}

/// Throughput with nothing to prune, and with pruning at work all the time, in
/// turns.
pub fn pruning(stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
    let (mut database, url) = stage.database("pruning")?;
    let mut pruned = Vec::new();
    for round in 0..plan.rounds {
        for prunes in [false, true] {
            let key = match prunes {
                false => "pruning/off",
                true => "pruning/on",
            };
            plan.say(round, key);
            stage.clean(&mut database)?;
            fill(&mut database, plan.expired_rows, "60 days")?;
            let mut settings = stage.settings(&url, QueueType::Classic);
            settings.extra = pruning_settings(prunes);
            let drained = measure(stage, plan, &mut database, &settings)
                .with_context(|| format!("failed to measure {key}"))?;
            report.add(key, "messages/s", drained.per_second);
            let left = database.number(
                "SELECT count(*) FROM ackonce.ledger WHERE applied_at < now() - interval '1 day'",
            )?;
            if prunes {
                pruned.push(plan.expired_rows as f64 - left as f64);
            }
        }
    }
    if stats::median(&pruned) > 0.0 {
        pruned
            .iter()
            .for_each(|rows| report.add("pruning/rows-deleted", "rows", *rows));
    } else {
        report.withdraw(
            "pruning/",
            "the daemon deleted no expired row while it worked",
        );
    }
    Ok(())
}

fn pruning_settings(prunes: bool) -> Vec<(&'static str, Value)> {
    match prunes {
        true => vec![
            ("ledger.retention", "30d".into()),
            ("ledger.prune_every", "100ms".into()),
            ("ledger.prune_batch", 1_000.into()),
        ],
        false => vec![("ledger.retention", "3650d".into())],
    }
}

fn measure(
    stage: &mut Stage,
    plan: &Plan,
    database: &mut Database,
    settings: &Settings,
) -> Result<Drain> {
    let load = Load::new(Shape {
        count: plan.messages,
        duplicates_percent: 0,
        body_bytes: BODY_BYTES,
    })?;
    drain(stage, database, &KIND, settings, &load)
}

/// Adds `rows` rows of that age to the ledger, index and statistics included.
/// The index is built after the rows, which takes a fraction of the time.
fn fill(database: &mut Database, rows: u64, age: &str) -> Result<()> {
    if rows == 0 {
        return Ok(());
    }
    for sql in [
        "ALTER TABLE ackonce.ledger DROP CONSTRAINT ledger_pkey",
        &format!(
            "INSERT INTO ackonce.ledger (applied_at, consumer_id, message_id, fingerprint) \
             SELECT now() - interval '{age}', c.id, gen_random_uuid()::text, \
             sha256(int8send(n)) FROM generate_series(1, {rows}) AS n, ackonce.consumer AS c \
             WHERE c.name = '{CONSUMER}'"
        ),
        "ALTER TABLE ackonce.ledger ADD CONSTRAINT ledger_pkey \
         PRIMARY KEY (consumer_id, message_id)",
        "VACUUM (ANALYZE) ackonce.ledger",
        // Its own work is not left to the first run.
        "CHECKPOINT",
    ] {
        database.execute(sql)?;
    }
    Ok(())
}
