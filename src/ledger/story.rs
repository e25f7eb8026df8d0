//! Everything that ledger, journal, crash marks and claims know of one message id.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row};

use crate::message::MessageId;
use crate::postgres::{Error, Session};

/// Most journal rows that are read, the newest first.
pub const ATTEMPTS_MAX: usize = 1_000;

/// What is known of one message id.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Story {
    /// Its ledger rows: one a consumer.
    pub applied: Vec<Applied>,
    /// Its journal rows, in the order they were written.
    pub attempts: Vec<Attempt>,
    /// Whether there are older journal rows than the [`ATTEMPTS_MAX`] read.
    pub cut: bool,
    /// Its crash marks: one a consumer.
    pub marks: Vec<Mark>,
    /// Who is at it: one a consumer, of those with a keyed handler.
    pub claims: Vec<Claim>,
    /// What operators did to its dead letters, the newest [`ATTEMPTS_MAX`] in
    /// the order in which it was written down.
    pub deeds: Vec<Deed>,
}

/// A moment by the server's clock.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    /// Since 1970, for sorting.
    pub microseconds: i64,
    /// In UTC, such as `2026-05-04T03:02:01.123Z`.
    pub text: String,
}

/// A ledger row.
#[derive(Debug, Clone, PartialEq)]
pub struct Applied {
    /// The consumer's name.
    pub consumer: String,
    /// Start of the transaction that applied it.
    pub at: Moment,
    /// SHA-256 of the body, in hex.
    pub fingerprint: String,
}

/// A journal row.
#[derive(Debug, Clone, PartialEq)]
pub struct Attempt {
    /// The consumer's name.
    pub consumer: String,
    /// When it was written.
    pub at: Moment,
    /// SHA-256 of the body, in hex.
    pub fingerprint: String,
    /// Tries of the handler so far; 0 when it never ran.
    pub attempt: i32,
    /// Why it was dead-lettered; `None` when it was to be tried again.
    pub reason: Option<String>,
    /// How long it waits for that, in seconds.
    pub retry_in: Option<f64>,
    /// Until when.
    pub retry_at: Option<Moment>,
    /// Whether that is still to come.
    pub waits: bool,
    /// `transient`, `permanent` or `systemic`.
    pub class: String,
    /// SQLSTATE, HTTP status or exit status.
    pub code: Option<String>,
    /// The error for humans.
    pub error: String,
    /// Kind of handler.
    pub handler: String,
    /// Host and process id of the daemon.
    pub host: String,
    /// Which worker of the consumer.
    pub worker: Option<i32>,
    /// How long the attempt took, in seconds.
    pub duration: Option<f64>,
    /// Exchange the message was published to.
    pub exchange: String,
    /// Routing key it was published with.
    pub routing_key: String,
}

/// A crash mark.
#[derive(Debug, Clone, PartialEq)]
pub struct Mark {
    /// The consumer's name.
    pub consumer: String,
    /// When it was last made.
    pub at: Moment,
    /// Runs before that one that never ended.
    pub deaths: i32,
}

/// A claim of a keyed handler.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// The consumer's name.
    pub consumer: String,
    /// When it was made.
    pub at: Moment,
    /// Until when it holds, if it is not renewed.
    pub until: Moment,
    /// Whether that is over.
    pub over: bool,
    /// Host and process id of the daemon.
    pub holder: String,
    /// SHA-256 of the body, in hex.
    pub fingerprint: String,
}

/// What an operator was about to do to a dead letter.
#[derive(Debug, Clone, PartialEq)]
pub struct Deed {
    /// The consumer's name.
    pub consumer: String,
    /// When it was written down.
    pub at: Moment,
    /// SHA-256 of the letter's body, in hex.
    pub fingerprint: String,
    /// `drop`, `import`, `replay` or `force-reprocess`.
    pub action: String,
    /// Who.
    pub operator: String,
    /// Why.
    pub because: Option<String>,
    /// Nothing came of it: the letter stayed in the dead-letter queue.
    pub was_left: bool,
}

/// Reads the story of `id`, with all consumers or with one, as it stands at
/// one moment.
///
/// # Errors
///
/// When the server refuses or cannot be asked.
pub fn read(session: &mut Session, id: &MessageId, consumer: Option<&str>) -> Result<Story, Error> {
    session.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")?;
    let story = session.run(async |connection| {
        let mut attempts = attempts(connection, id, consumer).await?;
        let cut = attempts.len() > ATTEMPTS_MAX;
        attempts.truncate(ATTEMPTS_MAX);
        attempts.reverse();
        Ok(Story {
            applied: applied(connection, id, consumer).await?,
            attempts,
            cut,
            marks: marks(connection, id, consumer).await?,
            claims: claims(connection, id, consumer).await?,
            deeds: deeds(connection, id, consumer).await?,
        })
    })?;
    session.execute("COMMIT")?;
    Ok(story)
}

// A moment is read as two columns. `$2` is the consumer's name, or null for
// all; the lateral look-up by id makes the index of (consumer_id, message_id)
// serve, one descent a consumer.

async fn applied(
    connection: &mut PgConnection,
    id: &MessageId,
    consumer: Option<&str>,
) -> Result<Vec<Applied>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT name, (extract(epoch FROM applied_at) * 1000000.0)::pg_catalog.int8, \
         pg_catalog.to_char(applied_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), \
         pg_catalog.encode(fingerprint, 'hex') FROM ackonce.consumer, LATERAL (SELECT * FROM ackonce.ledger \
         WHERE consumer_id = consumer.id AND message_id = $1) AS row \
         WHERE $2 IS NULL OR name = $2 ORDER BY name",
    )
    .bind(id.as_str())
    .bind(consumer)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Applied {
                consumer: row.try_get(0)?,
                at: moment(row, 1)?,
                fingerprint: row.try_get(3)?,
            })
        })
        .collect()
}

async fn attempts(
    connection: &mut PgConnection,
    id: &MessageId,
    consumer: Option<&str>,
) -> Result<Vec<Attempt>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT name, (extract(epoch FROM failed_at) * 1000000.0)::pg_catalog.int8, \
         pg_catalog.to_char(failed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), \
         (extract(epoch FROM failed_at + retry_in) * 1000000.0)::pg_catalog.int8, \
         pg_catalog.to_char((failed_at + retry_in) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), \
         coalesce(failed_at + retry_in > pg_catalog.now(), false), pg_catalog.encode(fingerprint, 'hex'), attempt, \
         reason, extract(epoch FROM retry_in)::pg_catalog.float8, class, code, error, handler, host, worker, \
         extract(epoch FROM duration)::pg_catalog.float8, exchange, routing_key \
         FROM ackonce.consumer, LATERAL (SELECT * FROM ackonce.failure \
         WHERE consumer_id = consumer.id AND message_id = $1) AS row \
         WHERE $2 IS NULL OR name = $2 ORDER BY row.id DESC LIMIT $3",
    )
    .bind(id.as_str())
    .bind(consumer)
    .bind(i64::try_from(ATTEMPTS_MAX + 1).unwrap_or(i64::MAX))
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let retry: Option<i64> = row.try_get(3)?;
            Ok(Attempt {
                consumer: row.try_get(0)?,
                at: moment(row, 1)?,
                retry_at: retry.map(|_| moment(row, 3)).transpose()?,
                waits: row.try_get(5)?,
                fingerprint: row.try_get(6)?,
                attempt: row.try_get(7)?,
                reason: row.try_get(8)?,
                retry_in: row.try_get(9)?,
                class: row.try_get(10)?,
                code: row.try_get(11)?,
                error: row.try_get(12)?,
                handler: row.try_get(13)?,
                host: row.try_get(14)?,
                worker: row.try_get(15)?,
                duration: row.try_get(16)?,
                exchange: row.try_get(17)?,
                routing_key: row.try_get(18)?,
            })
        })
        .collect()
}

async fn marks(
    connection: &mut PgConnection,
    id: &MessageId,
    consumer: Option<&str>,
) -> Result<Vec<Mark>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT name, (extract(epoch FROM marked_at) * 1000000.0)::pg_catalog.int8, \
         pg_catalog.to_char(marked_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), deaths \
         FROM ackonce.consumer, LATERAL (SELECT * FROM ackonce.suspect \
         WHERE consumer_id = consumer.id AND message_id = $1) AS row \
         WHERE $2 IS NULL OR name = $2 ORDER BY name",
    )
    .bind(id.as_str())
    .bind(consumer)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Mark {
                consumer: row.try_get(0)?,
                at: moment(row, 1)?,
                deaths: row.try_get(3)?,
            })
        })
        .collect()
}

async fn claims(
    connection: &mut PgConnection,
    id: &MessageId,
    consumer: Option<&str>,
) -> Result<Vec<Claim>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT name, (extract(epoch FROM claimed_at) * 1000000.0)::pg_catalog.int8, \
         pg_catalog.to_char(claimed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), \
         (extract(epoch FROM lease_until) * 1000000.0)::pg_catalog.int8, \
         pg_catalog.to_char(lease_until AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), \
         lease_until < pg_catalog.now(), holder, pg_catalog.encode(fingerprint, 'hex') \
         FROM ackonce.consumer, LATERAL (SELECT * FROM ackonce.claim \
         WHERE consumer_id = consumer.id AND message_id = $1) AS row \
         WHERE $2 IS NULL OR name = $2 ORDER BY name",
    )
    .bind(id.as_str())
    .bind(consumer)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Claim {
                consumer: row.try_get(0)?,
                at: moment(row, 1)?,
                until: moment(row, 3)?,
                over: row.try_get(5)?,
                holder: row.try_get(6)?,
                fingerprint: row.try_get(7)?,
            })
        })
        .collect()
}

async fn deeds(
    connection: &mut PgConnection,
    id: &MessageId,
    consumer: Option<&str>,
) -> Result<Vec<Deed>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT name, (extract(epoch FROM acted_at) * 1000000.0)::pg_catalog.int8, \
         pg_catalog.to_char(acted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"'), \
         pg_catalog.encode(fingerprint, 'hex'), action, operator, because, outcome = 'left' \
         FROM ackonce.consumer, LATERAL (SELECT * FROM ackonce.desk_letter \
         WHERE consumer_id = consumer.id AND message_id = $1) AS row \
         JOIN ackonce.desk_action ON desk_action.id = row.action_id \
         WHERE $2 IS NULL OR name = $2 \
         ORDER BY acted_at DESC, action_id DESC, outcome NULLS LAST LIMIT $3",
    )
    .bind(id.as_str())
    .bind(consumer)
    .bind(i64::try_from(ATTEMPTS_MAX).unwrap_or(i64::MAX))
    .fetch_all(connection)
    .await?;
    let newest_first = rows.iter().rev();
    newest_first
        .map(|row| {
            Ok(Deed {
                consumer: row.try_get(0)?,
                at: moment(row, 1)?,
                fingerprint: row.try_get(3)?,
                action: row.try_get(4)?,
                operator: row.try_get(5)?,
                because: row.try_get(6)?,
                was_left: row.try_get::<Option<bool>, _>(7)?.unwrap_or(false),
            })
        })
        .collect()
}

fn moment(row: &PgRow, column: usize) -> Result<Moment, sqlx::Error> {
    Ok(Moment {
        microseconds: row.try_get(column)?,
        text: row.try_get(column + 1)?,
    })
}
