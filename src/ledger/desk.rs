//! The dead-letter desk's part of the database: who sits at it, why letters are
//! dead, and what operators did to them.

use std::time::Duration;

use sqlx::{PgConnection, Row};

use super::prune::REASONS_KEPT;
use super::register;
use super::story::Moment;
use crate::message::Fingerprint;
use crate::postgres::{Error, Session};

/// First half of the advisory lock of whoever sits at a desk, "ackd"; the
/// second is the hash of the queue's name: consumers of two configurations may
/// have one queue. Held by the session, so that it
/// ends with its holder.
const LOCK: i32 = i32::from_be_bytes(*b"ackd");

/// Rows of old actions deleted when a new one begins, at most.
const PRUNED_AT_ONCE: i64 = 10_000;

/// What identifies a letter in the journal: its id, where it has a usable one,
/// and SHA-256 of its body.
pub type Key<'a> = (Option<&'a str>, Fingerprint);

/// Why a letter is dead, as the journal has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// When it was written.
    pub at: Moment,
    /// `rejected`, `max-attempts`, ….
    pub reason: String,
    /// `transient`, `permanent` or `systemic`.
    pub class: String,
    /// SQLSTATE, HTTP status or exit status.
    pub code: Option<String>,
    /// The error for humans, at most 2,000 characters.
    pub error: String,
    /// Tries of the handler; 0 when it never ran.
    pub attempt: i32,
    /// Kind of handler.
    pub handler: String,
    /// Exchange the message was published to.
    pub exchange: String,
    /// Routing key it was published with.
    pub routing_key: String,
}

/// Sits down at the desk of the dead-letter queue `queue`, until the session
/// ends. `None` when that worked, else who sits there.
///
/// # Errors
///
/// When the server cannot be asked.
pub fn sit_down(session: &mut Session, queue: &str) -> Result<Option<String>, Error> {
    session.run(async |connection| {
        let free: bool = sqlx::query_scalar("SELECT pg_catalog.pg_try_advisory_lock($1, pg_catalog.hashtext($2))")
            .bind(LOCK)
            .bind(queue)
            .fetch_one(&mut *connection)
            .await?;
        if free {
            return Ok(None);
        }
        // Whoever it was may have gone in between, or be another role's.
        let holder: Option<String> = sqlx::query_scalar(
            "SELECT pg_catalog.format('%s from %s, since %s', application_name, \
             coalesce(pg_catalog.host(client_addr), 'this host'), \
             pg_catalog.to_char(backend_start AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')) \
             FROM pg_catalog.pg_locks JOIN pg_catalog.pg_stat_activity USING (pid) WHERE locktype = 'advisory' \
             AND database = (SELECT oid FROM pg_database WHERE datname = pg_catalog.current_database()) \
             AND classid = $1::pg_catalog.int8::pg_catalog.oid AND objid = (pg_catalog.hashtext($2)::pg_catalog.int8 & 4294967295)::pg_catalog.oid \
             AND objsubid = 2 AND granted LIMIT 1",
        )
        .bind(i64::from(LOCK))
        .bind(queue)
        .fetch_optional(connection)
        .await?
        .flatten();
        Ok(Some(holder.unwrap_or_else(|| "somebody".to_owned())))
    })
}

/// Why each of `letters` is dead: its newest row with a reason, if there is one.
/// In the order of `letters`.
///
/// # Errors
///
/// When the server cannot be asked.
pub fn verdicts(
    session: &mut Session,
    consumer: &str,
    letters: &[Key<'_>],
) -> Result<Vec<Option<Verdict>>, Error> {
    let numbers: Vec<i32> = (0..).take(letters.len()).collect();
    let ids: Vec<Option<&str>> = letters.iter().map(|(id, _)| *id).collect();
    let prints: Vec<&[u8]> = letters.iter().map(|(_, print)| &print.0[..]).collect();
    let rows = session.run(async |connection| {
        // Both look-ups end in an index: by id, and by the body alone, since
        // what was refused unread has no id in the journal. `id + 0`, so that the newest is not sought from the end of
        // the whole table.
        sqlx::query(
            "SELECT letter.number, (extract(epoch FROM failed_at) * 1000000.0)::pg_catalog.int8, \
             pg_catalog.to_char(failed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), \
             reason, class, code, error, attempt, handler, exchange, routing_key \
             FROM unnest($2::pg_catalog.int4[], $3::pg_catalog.text[], $4::pg_catalog.bytea[]) \
             AS letter (number, message_id, fingerprint), \
             LATERAL (SELECT * FROM ((SELECT * FROM ackonce.failure AS row \
             WHERE row.consumer_id = (SELECT id FROM ackonce.consumer WHERE name = $1) \
             AND row.message_id = letter.message_id AND row.fingerprint = letter.fingerprint \
             AND row.reason IS NOT NULL ORDER BY row.id + 0 DESC LIMIT 1) UNION ALL \
             (SELECT * FROM ackonce.failure AS row WHERE row.consumer_id = (SELECT id FROM ackonce.consumer WHERE name = $1) \
             AND row.message_id IS NULL AND row.fingerprint = letter.fingerprint \
             AND row.reason IS NOT NULL ORDER BY row.id + 0 DESC LIMIT 1)) AS either \
             ORDER BY message_id IS NULL LIMIT 1) AS verdict",
        )
        .bind(consumer)
        .bind(&numbers)
        .bind(&ids)
        .bind(&prints)
        .fetch_all(connection)
        .await?
        .iter()
        .map(|row| {
            let number: i32 = row.try_get(0)?;
            let verdict = Verdict {
                at: Moment {
                    microseconds: row.try_get(1)?,
                    text: row.try_get(2)?,
                },
                reason: row.try_get(3)?,
                class: row.try_get(4)?,
                code: row.try_get(5)?,
                error: row.try_get(6)?,
                attempt: row.try_get(7)?,
                handler: row.try_get(8)?,
                exchange: row.try_get(9)?,
                routing_key: row.try_get(10)?,
            };
            Ok((number, verdict))
        })
        .collect::<Result<Vec<_>, sqlx::Error>>()
    })?;
    let mut verdicts = vec![None; letters.len()];
    for (number, verdict) in rows {
        let slot = usize::try_from(number).ok();
        if let Some(slot) = slot.and_then(|slot| verdicts.get_mut(slot)) {
            *slot = Some(verdict);
        }
    }
    Ok(verdicts)
}

/// What an operator is about to do.
#[derive(Debug, Clone)]
pub struct Action<'a> {
    /// The consumer's name.
    pub consumer: &'a str,
    /// `drop`, `import`, `replay` or `force-reprocess`.
    pub action: &'a str,
    /// Who.
    pub operator: &'a str,
    /// Why.
    pub because: Option<&'a str>,
    /// Which letters, as typed.
    pub filter: &'a str,
    /// The file they go to, or come from.
    pub file: Option<&'a str>,
}

/// An action that was written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActionId {
    id: i64,
    consumer_id: i16,
}

impl ActionId {
    /// `ackonce.consumer.id` of the consumer whose letters it is about.
    #[must_use]
    pub fn consumer_id(self) -> i16 {
        self.consumer_id
    }
}

/// Writes down that `action` begins, and deletes what is written about old
/// ones.
///
/// # Errors
///
/// When it is not written down, or not known to be.
pub fn begin(
    session: &mut Session,
    action: &Action<'_>,
    retention: Duration,
) -> Result<ActionId, Error> {
    let consumer_id = register(session, action.consumer)?.consumer_id;
    let kept = retention.saturating_mul(REASONS_KEPT).as_secs_f64();
    session.run(async |connection| {
        for statement in [
            "DELETE FROM ackonce.desk_letter WHERE ctid = ANY (ARRAY(SELECT ctid FROM \
             ackonce.desk_letter WHERE acted_at < pg_catalog.now() - pg_catalog.make_interval(secs => $1) LIMIT $2))",
            "DELETE FROM ackonce.desk_action WHERE ctid = ANY (ARRAY(SELECT ctid FROM \
             ackonce.desk_action WHERE began_at < pg_catalog.now() - pg_catalog.make_interval(secs => $1) LIMIT $2))",
        ] {
            sqlx::query(statement)
                .bind(kept)
                .bind(PRUNED_AT_ONCE)
                .execute(&mut *connection)
                .await?;
        }
        let id = sqlx::query_scalar(
            "INSERT INTO ackonce.desk_action (consumer_id, action, operator, because, filter, \
             file) VALUES ($1, $2, $3, $4, $5, $6) RETURNING id",
        )
        .bind(consumer_id)
        .bind(action.action)
        .bind(action.operator)
        .bind(action.because)
        .bind(action.filter)
        .bind(action.file)
        .fetch_one(connection)
        .await?;
        Ok(ActionId { id, consumer_id })
    })
}

/// Writes down which letters come next, before anything is done to them.
///
/// # Errors
///
/// When it is not written down, or not known to be: then nothing may be done to
/// them.
pub fn note(session: &mut Session, action: ActionId, letters: &[Key<'_>]) -> Result<(), Error> {
    session.run(async |connection| note_in(connection, action, letters).await)
}

/// As [`note`], in a transaction of the caller's.
pub(super) async fn note_in(
    connection: &mut PgConnection,
    action: ActionId,
    letters: &[Key<'_>],
) -> Result<(), sqlx::Error> {
    let ids: Vec<Option<&str>> = letters.iter().map(|(id, _)| *id).collect();
    let prints: Vec<&[u8]> = letters.iter().map(|(_, print)| &print.0[..]).collect();
    sqlx::query(
        "WITH letters AS (INSERT INTO ackonce.desk_letter (action_id, consumer_id, message_id, \
         fingerprint) SELECT $1, $2, letter.message_id, letter.fingerprint \
         FROM unnest($3::pg_catalog.text[], $4::pg_catalog.bytea[]) AS letter (message_id, fingerprint) RETURNING 1) \
         UPDATE ackonce.desk_action SET letters = desk_action.letters + (SELECT pg_catalog.count(*) FROM letters) \
         WHERE id = $1",
    )
    .bind(action.id)
    .bind(action.consumer_id)
    .bind(&ids)
    .bind(&prints)
    .execute(connection)
    .await
    .map(drop)
}

/// Writes down that nothing came of the action on `letter`: it is where it was.
///
/// # Errors
///
/// When it is not written down, or not known to be.
pub fn note_left(session: &mut Session, action: ActionId, letter: Key<'_>) -> Result<(), Error> {
    let (id, print) = letter;
    session.run(async |connection| {
        sqlx::query(
            "INSERT INTO ackonce.desk_letter (action_id, consumer_id, message_id, fingerprint, \
             outcome) VALUES ($1, $2, $3, $4, 'left')",
        )
        .bind(action.id)
        .bind(action.consumer_id)
        .bind(id)
        .bind(&print.0[..])
        .execute(connection)
        .await
        .map(drop)
    })
}

/// Writes down that the action has ended.
///
/// # Errors
///
/// When it is not written down.
pub fn end(session: &mut Session, action: ActionId) -> Result<(), Error> {
    session.run(async |connection| {
        sqlx::query("UPDATE ackonce.desk_action SET ended_at = pg_catalog.now() WHERE id = $1")
            .bind(action.id)
            .execute(connection)
            .await
            .map(drop)
    })
}
