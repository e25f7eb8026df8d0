//! The failure journal: one row for every failed attempt, and for everything
//! that was dead-lettered without one.

use std::time::Duration;

use sqlx::PgConnection;

use crate::failure::Failure;
use crate::message::{DeadReason, Fingerprint, MessageId};

/// Longest error text the journal keeps, in characters.
const ERROR_TEXT_MAX: usize = 2_000;

/// Longest of every other text, in characters. AMQP ends its short strings at
/// 255 bytes, so nothing is cut that a broker delivered.
const TEXT_MAX: usize = 255;

/// Longest duration the journal keeps: some thirty years.
const INTERVAL_MAX: Duration = Duration::from_secs(1_000_000_000);

/// One row for the failure journal.
#[derive(Debug, Clone)]
pub struct JournalEntry<'a> {
    /// The id, where there is a usable one.
    pub message_id: Option<&'a MessageId>,
    /// SHA-256 of the body.
    pub fingerprint: Fingerprint,
    /// Why it is dead-lettered; `None` when it is to be tried again.
    pub reason: Option<DeadReason>,
    /// How long it waits before that.
    pub retry_in: Option<Duration>,
    /// What went wrong.
    pub failure: &'a Failure,
    /// Tries of the handler so far, this one included; 0 when it never ran.
    pub attempt: u32,
    /// Which worker ran it, where that is not the one that writes.
    pub worker: Option<usize>,
    /// How long this one took; `None` when the handler did not run.
    pub duration: Option<Duration>,
    /// Where it was published to.
    pub exchange: &'a str,
    /// With which routing key.
    pub routing_key: &'a str,
}

/// What the rows of one call have in common.
pub(super) struct Writer<'a> {
    pub consumer_id: i16,
    pub handler: &'a str,
    pub host: &'a str,
    pub worker: i32,
}

pub(super) async fn write(
    connection: &mut PgConnection,
    writer: &Writer<'_>,
    entries: &[JournalEntry<'_>],
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "INSERT INTO ackonce.failure (consumer_id, handler, host, worker, attempt, message_id, \
         fingerprint, reason, class, code, error, exchange, routing_key, retry_in, duration) \
         SELECT $1, $2, $3, coalesce(e.worker, $4), e.attempt, e.message_id, e.fingerprint, e.reason, e.class, \
         e.code, e.error, e.exchange, e.routing_key, pg_catalog.make_interval(secs => e.retry_in), \
         pg_catalog.make_interval(secs => e.duration) \
         FROM unnest($5::pg_catalog.int4[], $6::pg_catalog.text[], $7::pg_catalog.bytea[], $8::pg_catalog.text[], $9::pg_catalog.text[], $10::pg_catalog.text[], \
         $11::pg_catalog.text[], $12::pg_catalog.text[], $13::pg_catalog.text[], $14::pg_catalog.float8[], $15::pg_catalog.float8[], $16::pg_catalog.int4[]) \
         AS e (attempt, message_id, fingerprint, reason, class, code, error, exchange, \
         routing_key, retry_in, duration, worker)",
    )
    .bind(writer.consumer_id)
    .bind(writer.handler)
    .bind(writer.host)
    .bind(writer.worker)
    .bind(column(entries, |e| {
        i32::try_from(e.attempt).unwrap_or(i32::MAX)
    }))
    .bind(column(entries, |e| e.message_id.map(MessageId::as_str)))
    .bind(column(entries, |e| &e.fingerprint.0[..]))
    .bind(column(entries, |e| e.reason.map(DeadReason::as_str)))
    .bind(column(entries, |e| e.failure.class.as_str()))
    .bind(column(entries, |e| {
        e.failure
            .code
            .as_deref()
            .map(|code| storable(code, TEXT_MAX))
    }))
    .bind(column(entries, |e| {
        storable(&e.failure.text, ERROR_TEXT_MAX)
    }))
    .bind(column(entries, |e| storable(e.exchange, TEXT_MAX)))
    .bind(column(entries, |e| storable(e.routing_key, TEXT_MAX)))
    .bind(column(entries, |e| e.retry_in.map(seconds)))
    .bind(column(entries, |e| e.duration.map(seconds)))
    .bind(column(entries, |e| {
        e.worker.map(|n| i32::try_from(n).unwrap_or(i32::MAX))
    }))
    .execute(connection)
    .await?;
    Ok(())
}

fn column<'a, T>(
    entries: &'a [JournalEntry<'_>],
    pick: impl Fn(&'a JournalEntry<'_>) -> T,
) -> Vec<T> {
    entries.iter().map(pick).collect()
}

/// `duration`, if it is one that an interval can hold.
fn seconds(duration: Duration) -> f64 {
    duration.min(INTERVAL_MAX).as_secs_f64()
}

/// `text` as PostgreSQL can hold it: without NUL characters, which handlers and
/// receivers may put into their errors, and no longer than `max` characters.
fn storable(text: &str, max: usize) -> String {
    let replaced = text.chars().take(max).map(|c| match c {
        '\0' => char::REPLACEMENT_CHARACTER,
        c => c,
    });
    replaced.collect()
}
