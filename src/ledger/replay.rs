//! What a replay asks ledger and journal: where dead letters stand before they
//! are replayed, and what became of them afterwards.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;

use super::Registration;
use super::desk::{self, ActionId, Key};
use crate::message::{Fingerprint, MessageId};
use crate::postgres::{Error, Session};

/// How much longer than it was meant to wait a message may be on its way back
/// from its retry queue.
const ON_ITS_WAY: Duration = Duration::from_secs(60);

/// Longest error text that is read, in characters.
const ERROR_MAX: i32 = 300;

/// One message that is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Its id.
    pub id: &'a MessageId,
    /// SHA-256 of its body.
    pub fingerprint: Fingerprint,
}

/// What is known of a dead letter before it is replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Known {
    /// Fingerprint of the ledger row with its id.
    pub applied: Option<Fingerprint>,
    /// A keyed handler is at it: the lease of its claim goes on.
    pub claimed: bool,
    /// A copy of it waits for a retry, or is on its way back from there.
    pub waits: bool,
    /// How long ago it was first dead-lettered, as far as the journal goes back.
    pub dead_for: Option<Duration>,
}

/// What is known of a message after it was replayed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Since {
    /// Fingerprint of the ledger row with its id.
    pub applied: Option<Fingerprint>,
    /// The last attempt that failed since.
    pub failure: Option<LastFailure>,
}

/// A failed attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastFailure {
    /// Why it was dead-lettered; `None` when another attempt is to come.
    pub reason: Option<String>,
    /// SQLSTATE, HTTP status or exit status.
    pub code: Option<String>,
    /// The error for humans, its first 300 characters.
    pub error: String,
}

/// Which ledger this is, and what `consumer` is called in it.
///
/// # Errors
///
/// When the server refuses or cannot be asked.
pub fn registration(session: &mut Session, consumer: &str) -> Result<Registration, Error> {
    super::register(session, consumer)
}

/// What came of forgetting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forgotten {
    /// Its ledger row is gone; or there was none.
    Yes,
    /// A keyed handler is at it. Nothing was done.
    AtWork,
    /// It was forgotten before, since the letter died, and was applied since:
    /// the letter was only not taken out then. Nothing was done.
    AppliedSince,
}

/// Forgets the ledger row of `letter`'s id, and writes down that `action` does;
/// both or neither. `died_at` is when the letter died, in microseconds since
/// 1970: a letter is forced once, however often the command has to be run.
///
/// # Errors
///
/// When it is not forgotten, or not known to be: then nothing may be published.
pub fn forget(
    session: &mut Session,
    action: ActionId,
    letter: Key<'_>,
    died_at: Option<i64>,
) -> Result<Forgotten, Error> {
    session.execute("BEGIN ISOLATION LEVEL READ COMMITTED")?;
    let result = session.run(async |connection| {
        let (at_work, applied_since): (bool, bool) = sqlx::query_as(
            "SELECT EXISTS (SELECT FROM ackonce.claim WHERE consumer_id = $1 \
             AND message_id = $2 AND lease_until > pg_catalog.now()), \
             EXISTS (SELECT FROM ackonce.desk_letter AS forced \
             JOIN ackonce.desk_action AS action ON action.id = forced.action_id \
             JOIN ackonce.ledger ON ledger.consumer_id = forced.consumer_id \
             AND ledger.message_id = forced.message_id \
             WHERE action.action = 'force-reprocess' AND forced.consumer_id = $1 \
             AND forced.message_id = $2 AND forced.fingerprint = $3 \
             AND ledger.fingerprint = $3 AND ledger.applied_at > forced.acted_at \
             AND ($4 IS NULL OR forced.acted_at > pg_catalog.to_timestamp($4::pg_catalog.numeric / 1000000.0)))",
        )
        .bind(action.consumer_id())
        .bind(letter.0)
        .bind(&letter.1.0[..])
        .bind(died_at)
        .fetch_one(&mut *connection)
        .await?;
        if at_work {
            return Ok(Forgotten::AtWork);
        }
        if applied_since {
            return Ok(Forgotten::AppliedSince);
        }
        desk::note_in(&mut *connection, action, &[letter]).await?;
        sqlx::query("DELETE FROM ackonce.ledger WHERE consumer_id = $1 AND message_id = $2")
            .bind(action.consumer_id())
            .bind(letter.0)
            .execute(connection)
            .await?;
        Ok(Forgotten::Yes)
    });
    match result {
        Ok(forgotten) => session.execute("COMMIT").map(|()| forgotten),
        Err(error) => {
            // A session that cannot roll back is lost, and rolls back with that.
            session.execute("ROLLBACK").ok();
            Err(error)
        }
    }
}

/// What is known of each of `asked`, in their order.
///
/// # Errors
///
/// When the server refuses or cannot be asked.
pub fn look_up(
    session: &mut Session,
    consumer_id: i16,
    asked: &[Asked<'_>],
) -> Result<Vec<Known>, Error> {
    let (ids, prints) = columns(asked);
    session.run(async |connection| {
        let rows = sqlx::query(
            "SELECT ledger.fingerprint, coalesce(last.waits, false), \
             extract(epoch FROM pg_catalog.now() - first.failed_at)::pg_catalog.float8, EXISTS (SELECT \
             FROM ackonce.claim WHERE consumer_id = $1 AND message_id = asked.message_id \
             AND lease_until > pg_catalog.clock_timestamp()) FROM unnest($2::pg_catalog.text[], $3::pg_catalog.bytea[]) WITH ORDINALITY \
             AS asked (message_id, fingerprint, place) \
             LEFT JOIN ackonce.ledger ON ledger.consumer_id = $1 \
             AND ledger.message_id = asked.message_id \
             LEFT JOIN LATERAL (SELECT reason IS NULL AND failed_at + retry_in \
             + pg_catalog.make_interval(secs => $4) > pg_catalog.now() AS waits FROM ackonce.failure \
             WHERE consumer_id = $1 AND message_id = asked.message_id \
             AND fingerprint = asked.fingerprint ORDER BY id DESC LIMIT 1) AS last ON true \
             LEFT JOIN LATERAL (SELECT pg_catalog.min(failed_at) AS failed_at FROM ackonce.failure \
             WHERE consumer_id = $1 AND message_id = asked.message_id \
             AND fingerprint = asked.fingerprint AND reason IS NOT NULL) AS first ON true \
             ORDER BY place",
        )
        .bind(consumer_id)
        .bind(ids)
        .bind(prints)
        .bind(ON_ITS_WAY.as_secs_f64())
        .fetch_all(connection)
        .await?;
        rows.iter()
            .map(|row| {
                let dead_for: Option<f64> = row.try_get(2)?;
                Ok(Known {
                    applied: fingerprint(row, 0)?,
                    claimed: row.try_get(3)?,
                    waits: row.try_get(1)?,
                    // A clock that was set back makes it young.
                    dead_for: dead_for.map(|s| Duration::try_from_secs_f64(s).unwrap_or_default()),
                })
            })
            .collect()
    })
}

/// Where the failure journal ends: what is written after this call lies behind.
///
/// # Errors
///
/// As [`look_up`].
pub fn end_of_journal(session: &mut Session) -> Result<i64, Error> {
    session.run(async |connection| {
        sqlx::query_scalar("SELECT coalesce(pg_catalog.max(id), 0) FROM ackonce.failure")
            .fetch_one(connection)
            .await
    })
}

/// What became of each of `asked`, in their order, since the failure journal
/// ended at `end`.
///
/// # Errors
///
/// As [`look_up`].
pub fn since(
    session: &mut Session,
    consumer_id: i16,
    end: i64,
    asked: &[Asked<'_>],
) -> Result<Vec<Since>, Error> {
    let (ids, prints) = columns(asked);
    session.run(async |connection| {
        let rows = sqlx::query(
            "SELECT ledger.fingerprint, last.id IS NOT NULL, last.reason, last.code, \
             coalesce(pg_catalog.left(last.error, $5), '') \
             FROM unnest($2::pg_catalog.text[], $3::pg_catalog.bytea[]) WITH ORDINALITY \
             AS asked (message_id, fingerprint, place) \
             LEFT JOIN ackonce.ledger ON ledger.consumer_id = $1 \
             AND ledger.message_id = asked.message_id \
             LEFT JOIN LATERAL (SELECT * FROM ackonce.failure \
             WHERE consumer_id = $1 AND message_id = asked.message_id \
             AND fingerprint = asked.fingerprint AND failure.id > $4 \
             ORDER BY failure.id DESC LIMIT 1) AS last ON true ORDER BY place",
        )
        .bind(consumer_id)
        .bind(ids)
        .bind(prints)
        .bind(end)
        .bind(ERROR_MAX)
        .fetch_all(connection)
        .await?;
        rows.iter()
            .map(|row| {
                let failed: bool = row.try_get(1)?;
                let failure = LastFailure {
                    reason: row.try_get(2)?,
                    code: row.try_get(3)?,
                    error: row.try_get(4)?,
                };
                Ok(Since {
                    applied: fingerprint(row, 0)?,
                    failure: failed.then_some(failure),
                })
            })
            .collect()
    })
}

fn columns<'a>(asked: &'a [Asked<'_>]) -> (Vec<&'a str>, Vec<&'a [u8]>) {
    let ids = asked.iter().map(|asked| asked.id.as_str());
    let prints = asked.iter().map(|asked| &asked.fingerprint.0[..]);
    (ids.collect(), prints.collect())
}

fn fingerprint(row: &PgRow, column: usize) -> Result<Option<Fingerprint>, sqlx::Error> {
    let print: Option<[u8; 32]> = row.try_get(column)?;
    Ok(print.map(Fingerprint))
}
