//! Deleting what is older than the retention, a few pages of a table at a time.
//!
//! No index on the times of a row is kept for this: it would cost every insert
//! and every row something. A table is swept page by page instead, which a
//! scan by `ctid` does without touching the other pages. Ages are measured by
//! the server's clock alone.

use std::ops::Range;
use std::time::Duration;

use sqlx::Row;

use crate::postgres::{Error, Session};

/// The advisory lock of whoever prunes: "ackonce" and a one. Held by the
/// session, so that it ends with its holder.
const LOCK: i64 = 0x61_63_6b_6f_6e_63_65_01;

/// How many times longer than everything else the journal keeps the reason of
/// a dead letter that was never applied.
pub const REASONS_KEPT: u32 = 10;

/// Dead letters that [`Sweeper::uncovered`] counts at most.
const UNCOVERED_MAX: i64 = 10_000;

/// A table that is pruned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// What was applied.
    Ledger,
    /// The failure journal.
    Journal,
    /// Crash marks.
    Suspects,
    /// Claims that nobody came back to.
    Claims,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ledger, Self::Journal, Self::Suspects, Self::Claims];

    /// Its name in the schema `ackonce`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ledger => "ledger",
            Self::Journal => "failure",
            Self::Suspects => "suspect",
            Self::Claims => "claim",
        }
    }
}

/// How old a row must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Age {
    retention: Duration,
    reasons: Duration,
}

impl Age {
    /// Rows older than `retention` go; reasons of dead letters that were never
    /// applied when they are [`REASONS_KEPT`] times as old.
    #[must_use]
    pub fn new(retention: Duration) -> Self {
        Self {
            retention,
            reasons: retention.saturating_mul(REASONS_KEPT),
        }
    }

    /// As [`Age::new`], but `older_than` in place of `retention` for all that
    /// no dead letter needs.
    #[must_use]
    pub fn by_hand(older_than: Duration, retention: Duration) -> Self {
        Self {
            retention: older_than,
            reasons: Self::new(older_than.max(retention)).reasons,
        }
    }
}

/// How many rows of each table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Of the ledger.
    pub ledger: u64,
    /// Of the failure journal.
    pub journal: u64,
    /// Crash marks.
    pub suspects: u64,
    /// Claims of keyed handlers.
    pub claims: u64,
}

impl Counts {
    /// Of all tables.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.ledger + self.journal + self.suspects + self.claims
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.ledger += other.ledger;
        self.journal += other.journal;
        self.suspects += other.suspects;
        self.claims += other.claims;
    }
}

/// Where the sweeping of a table stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The table.
    pub table: Table,
    /// Its size, in pages.
    pub pages: u64,
    /// Where the next round begins; may lie past the end.
    pub next_page: u64,
    /// How long ago the last round ended; `None` if there was none.
    pub rested: Option<Duration>,
}

/// Dead letters of a consumer that are older than the retention and were
/// never applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uncovered {
    /// The consumer's name.
    pub consumer: String,
    /// How many; counting ends at 10,000.
    pub count: u64,
    /// When the oldest one was dead-lettered, in UTC.
    pub oldest: String,
}

/// A session that prunes.
pub struct Sweeper {
    session: Session,
}

impl Sweeper {
    /// On a session of its own: what is locked is locked for its life.
    #[must_use]
    pub fn new(session: Session) -> Self {
        Self { session }
    }

    /// Whether nobody else prunes this ledger, until [`Self::unlock`] or the
    /// end of the session.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn lock(&mut self) -> Result<bool, Error> {
        self.session.run(async |connection| {
            sqlx::query_scalar("SELECT pg_catalog.pg_try_advisory_lock($1)")
                .bind(LOCK)
                .fetch_one(connection)
                .await
        })
    }

    /// Lets others prune.
    ///
    /// # Errors
    ///
    /// When the server cannot be told.
    pub fn unlock(&mut self) -> Result<(), Error> {
        self.session.run(async |connection| {
            sqlx::query("SELECT pg_catalog.pg_advisory_unlock($1)")
                .bind(LOCK)
                .execute(connection)
                .await
                .map(drop)
        })
    }

    /// Where each table stands.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn places(&mut self) -> Result<Vec<Place>, Error> {
        let rows = self.session.run(async |connection| {
            sqlx::query(
                "SELECT relation, coalesce(next_page, 0), \
                 pg_catalog.pg_relation_size('ackonce.' || relation) \
                 / pg_catalog.current_setting('block_size')::pg_catalog.int8, CASE WHEN swept_at > '-infinity' \
                 THEN extract(epoch FROM pg_catalog.now() - swept_at)::pg_catalog.float8 END \
                 FROM pg_catalog.unnest($1::pg_catalog.text[]) AS swept (relation) \
                 LEFT JOIN ackonce.sweep USING (relation)",
            )
            .bind(Table::ALL.map(Table::name))
            .fetch_all(connection)
            .await?
            .iter()
            .map(|row| {
                let (relation, next_page): (String, i64) = (row.try_get(0)?, row.try_get(1)?);
                let (pages, rested): (i64, Option<f64>) = (row.try_get(2)?, row.try_get(3)?);
                Ok((relation, next_page, pages, rested))
            })
            .collect::<Result<Vec<_>, sqlx::Error>>()
        })?;
        let place = |table: Table| {
            let row = rows.iter().find(|row| row.0 == table.name())?;
            Some(Place {
                table,
                pages: u64::try_from(row.2).unwrap_or(0),
                next_page: u64::try_from(row.1).unwrap_or(0),
                // A clock that was set back says nothing.
                rested: row.3.and_then(|s| Duration::try_from_secs_f64(s).ok()),
            })
        };
        Ok(Table::ALL.into_iter().filter_map(place).collect())
    }

    /// Keeps where the next round of `table` begins.
    ///
    /// # Errors
    ///
    /// When it is not kept.
    pub fn rest(&mut self, table: Table, next_page: u64) -> Result<(), Error> {
        self.session.run(async |connection| {
            sqlx::query(
                "INSERT INTO ackonce.sweep (relation, next_page, swept_at) \
                 VALUES ($1, $2, pg_catalog.now()) ON CONFLICT (relation) DO UPDATE \
                 SET next_page = excluded.next_page, swept_at = excluded.swept_at",
            )
            .bind(table.name())
            .bind(page(next_page))
            .execute(connection)
            .await
            .map(drop)
        })
    }

    /// Deletes at most `batch` old rows in `pages` of `table`, and with ledger
    /// rows the reasons why their messages were once dead-lettered. One
    /// transaction.
    ///
    /// # Errors
    ///
    /// When nothing is deleted, or it is not known.
    pub fn delete(
        &mut self,
        table: Table,
        pages: Range<u64>,
        age: Age,
        batch: usize,
    ) -> Result<Counts, Error> {
        let statement = match table {
            Table::Ledger => DELETE_FROM_LEDGER,
            Table::Journal => DELETE_FROM_JOURNAL,
            Table::Suspects => DELETE_FROM_SUSPECTS,
            Table::Claims => DELETE_FROM_CLAIMS,
        };
        let batch = i64::try_from(batch).unwrap_or(i64::MAX);
        self.session.run(async |connection| {
            let query = sqlx::query_as(statement)
                .bind(page(pages.start))
                .bind(page(pages.end))
                .bind(age.retention.as_secs_f64())
                .bind(batch);
            let query = match table {
                Table::Journal => query.bind(age.reasons.as_secs_f64()),
                Table::Ledger | Table::Suspects | Table::Claims => query,
            };
            query.fetch_one(connection).await.map(counts)
        })
    }

    /// How many rows in `pages` of `table` are old enough to be deleted.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn count(&mut self, table: Table, pages: Range<u64>, age: Age) -> Result<Counts, Error> {
        let statement = match table {
            Table::Ledger => COUNT_IN_LEDGER,
            Table::Journal => COUNT_IN_JOURNAL,
            Table::Suspects => COUNT_IN_SUSPECTS,
            Table::Claims => COUNT_IN_CLAIMS,
        };
        self.session.run(async |connection| {
            let query = sqlx::query_as(statement)
                .bind(page(pages.start))
                .bind(page(pages.end))
                .bind(age.retention.as_secs_f64());
            let query = match table {
                Table::Journal => query.bind(age.reasons.as_secs_f64()),
                Table::Ledger | Table::Suspects | Table::Claims => query,
            };
            query.fetch_one(connection).await.map(counts)
        })
    }

    /// The dead letters that are older than `retention` and were never
    /// applied, as far as the journal knows of them.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn uncovered(&mut self, retention: Duration) -> Result<Vec<Uncovered>, Error> {
        uncovered(&mut self.session, retention)
    }
}

/// As [`Sweeper::uncovered`], on any session.
///
/// # Errors
///
/// When the server cannot be asked.
pub fn uncovered(session: &mut Session, retention: Duration) -> Result<Vec<Uncovered>, Error> {
    session.run(async |connection| {
        sqlx::query(
            "SELECT name, pg_catalog.count(DISTINCT (message_id, fingerprint)), \
             pg_catalog.to_char(pg_catalog.min(failed_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS') \
             FROM (SELECT consumer_id, message_id, fingerprint, failed_at FROM ackonce.failure \
             WHERE reason IS NOT NULL AND failed_at < pg_catalog.now() - pg_catalog.make_interval(secs => $1) \
             AND NOT EXISTS (SELECT FROM ackonce.ledger \
             WHERE ledger.consumer_id = failure.consumer_id \
             AND ledger.message_id = failure.message_id \
             AND ledger.fingerprint = failure.fingerprint) \
             ORDER BY failed_at LIMIT $2) AS dead \
             JOIN ackonce.consumer ON consumer.id = consumer_id GROUP BY name ORDER BY name",
        )
        .bind(retention.as_secs_f64())
        .bind(UNCOVERED_MAX)
        .fetch_all(connection)
        .await?
        .iter()
        .map(|row| {
            let count: i64 = row.try_get(1)?;
            Ok(Uncovered {
                consumer: row.try_get(0)?,
                count: u64::try_from(count).unwrap_or(0),
                oldest: row.try_get(2)?,
            })
        })
        .collect()
    })
}

fn counts(row: (i64, i64, i64, i64)) -> Counts {
    let number = |count: i64| u64::try_from(count).unwrap_or(0);
    Counts {
        ledger: number(row.0),
        journal: number(row.1),
        suspects: number(row.2),
        claims: number(row.3),
    }
}

/// A page number as the server takes it: there are fewer than 2³².
fn page(number: u64) -> i64 {
    i64::from(u32::try_from(number).unwrap_or(u32::MAX))
}

/// Rows on the pages from `$1` up to `$2`, without the latter.
macro_rules! on_pages {
    () => {
        "ctid >= pg_catalog.concat('(', $1::pg_catalog.int8, ',0)')::pg_catalog.tid \
         AND ctid < pg_catalog.concat('(', $2::pg_catalog.int8, ',0)')::pg_catalog.tid"
    };
}

// In what follows, `$3` is the age in seconds, and `$5` that of reasons. A
// delete names the age twice: whatever a `ctid` may come to mean, no younger
// row goes.

/// With a ledger row go the reasons why its message was once dead-lettered:
/// without it they would pass for those of one that was never applied.
const DELETE_FROM_LEDGER: &str = concat!(
    "WITH gone AS (DELETE FROM ackonce.ledger WHERE ctid = ANY (ARRAY( \
     SELECT ctid FROM ackonce.ledger WHERE ",
    on_pages!(),
    " AND applied_at < pg_catalog.now() - pg_catalog.make_interval(secs => $3) LIMIT $4)) \
     AND applied_at < pg_catalog.now() - pg_catalog.make_interval(secs => $3) \
     RETURNING consumer_id, message_id, fingerprint), \
     reasons AS (DELETE FROM ackonce.failure USING gone \
     WHERE failure.consumer_id = gone.consumer_id AND failure.message_id = gone.message_id \
     AND failure.fingerprint = gone.fingerprint \
     AND failed_at < pg_catalog.now() - pg_catalog.make_interval(secs => $3) RETURNING 1) \
     SELECT (SELECT pg_catalog.count(*) FROM gone), (SELECT pg_catalog.count(*) FROM reasons), 0::pg_catalog.int8, 0::pg_catalog.int8"
);

const DELETE_FROM_JOURNAL: &str = concat!(
    "WITH gone AS (DELETE FROM ackonce.failure WHERE ctid = ANY (ARRAY( \
     SELECT ctid FROM ackonce.failure WHERE ",
    on_pages!(),
    " AND failed_at < pg_catalog.now() - pg_catalog.make_interval(secs => CASE WHEN reason IS NULL THEN $3 ELSE $5 END) \
     LIMIT $4)) AND failed_at < pg_catalog.now() - pg_catalog.make_interval(secs => $3) RETURNING 1) \
     SELECT 0::pg_catalog.int8, pg_catalog.count(*), 0::pg_catalog.int8, 0::pg_catalog.int8 FROM gone"
);

const DELETE_FROM_SUSPECTS: &str = concat!(
    "WITH gone AS (DELETE FROM ackonce.suspect WHERE ctid = ANY (ARRAY( \
     SELECT ctid FROM ackonce.suspect WHERE ",
    on_pages!(),
    " AND marked_at < pg_catalog.now() - pg_catalog.make_interval(secs => $3) LIMIT $4)) \
     AND marked_at < pg_catalog.now() - pg_catalog.make_interval(secs => $3) RETURNING 1) \
     SELECT 0::pg_catalog.int8, 0::pg_catalog.int8, pg_catalog.count(*), 0::pg_catalog.int8 FROM gone"
);

/// The claim of a daemon that ended is taken over with its message. One that
/// nobody has taken over speaks of a message that is in no queue any more.
const DELETE_FROM_CLAIMS: &str = concat!(
    "WITH gone AS (DELETE FROM ackonce.claim WHERE ctid = ANY (ARRAY( \
     SELECT ctid FROM ackonce.claim WHERE ",
    on_pages!(),
    " AND lease_until < pg_catalog.now() - pg_catalog.make_interval(secs => $3) LIMIT $4)) \
     AND lease_until < pg_catalog.now() - pg_catalog.make_interval(secs => $3) RETURNING 1) \
     SELECT 0::pg_catalog.int8, 0::pg_catalog.int8, 0::pg_catalog.int8, pg_catalog.count(*) FROM gone"
);

// And here `$4` is the age of reasons.

const COUNT_IN_LEDGER: &str = concat!(
    "SELECT pg_catalog.count(*), 0::pg_catalog.int8, 0::pg_catalog.int8, 0::pg_catalog.int8 FROM ackonce.ledger WHERE ",
    on_pages!(),
    " AND applied_at < now() - make_interval(secs => $3)"
);

const COUNT_IN_JOURNAL: &str = concat!(
    "SELECT 0::pg_catalog.int8, pg_catalog.count(*), 0::pg_catalog.int8, 0::pg_catalog.int8 FROM ackonce.failure WHERE ",
    on_pages!(),
    " AND (failed_at < pg_catalog.now() - pg_catalog.make_interval(secs => CASE WHEN reason IS NULL THEN $3 ELSE $4 END) \
     OR failed_at < pg_catalog.now() - pg_catalog.make_interval(secs => $3) AND EXISTS (SELECT FROM ackonce.ledger \
     WHERE ledger.consumer_id = failure.consumer_id AND ledger.message_id = failure.message_id \
     AND ledger.fingerprint = failure.fingerprint \
     AND applied_at < pg_catalog.now() - pg_catalog.make_interval(secs => $3)))"
);

const COUNT_IN_SUSPECTS: &str = concat!(
    "SELECT 0::pg_catalog.int8, 0::pg_catalog.int8, pg_catalog.count(*), 0::pg_catalog.int8 FROM ackonce.suspect WHERE ",
    on_pages!(),
    " AND marked_at < now() - make_interval(secs => $3)"
);

const COUNT_IN_CLAIMS: &str = concat!(
    "SELECT 0::pg_catalog.int8, 0::pg_catalog.int8, 0::pg_catalog.int8, pg_catalog.count(*) FROM ackonce.claim WHERE ",
    on_pages!(),
    " AND lease_until < now() - make_interval(secs => $3)"
);
