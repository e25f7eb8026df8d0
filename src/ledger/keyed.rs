//! Claims of keyed handlers. Their effect shares no transaction with the
//! ledger, so a row of `ackonce.claim` is committed before the handler runs,
//! and becomes a ledger row after it, in one transaction and only while the
//! owner matches. Leases are measured by the server's clock alone.
//!
//! # Why two cannot both own an id, and none is run that is done
//!
//! In READ COMMITTED each statement sees what was committed before it began.
//! [`Ledger::claim`] inserts first and looks into the ledger afterwards, in the
//! same transaction; [`Ledger::complete`] deletes the claim and inserts the
//! ledger row. Say A claims an id that B completes. The primary key of
//! `ackonce.claim` orders them:
//!
//! - B has committed before A's insert: A's claim is new, and its look-up,
//!   which begins later, finds the row.
//! - B has deleted and not committed: A's insert meets the row, waits for B,
//!   and is then made anew. The look-up begins after that, and finds the row.
//!   If B rolls back, A meets B's claim, as below.
//! - B has not deleted yet: A meets B's claim and locks its row until A's end.
//!   If its lease goes on, A has nothing and B goes on after A. If it has run
//!   out, A is the owner from now on; B waits for A, then compares the owner
//!   once more, finds A's and completes nothing.
//!
//! So of two owners the earlier one completes before the later one claims, or
//! never; and nobody who claims an id after it was completed runs it. A claim
//! that finds the row is deleted in its own transaction: no claim is ever
//! committed beside a ledger row of its id. Every statement locks its rows in
//! the order of their ids, so that none waits for the other in a circle.
//! `tests/model.rs` walks the claims of two workers, with the mutants; there each
//! of these transactions is one step.

use std::collections::HashSet;
use std::time::Duration;

use sqlx::PgConnection;

use super::{Applied, Ledger, look_up};
use crate::message::{Fingerprint, MessageId};
use crate::postgres::Error;

/// Tells the claims of one batch from all others, of this daemon and of every
/// other: random.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(i64);

impl Owner {
    /// From 64 random bits.
    #[must_use]
    pub fn new(random: u64) -> Self {
        Self(random.cast_signed())
    }
}

/// What the ledger says about an id that is to be claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// The claim is ours, for the length of the lease.
    Ours,
    /// Somebody else's lease on it goes on.
    Held,
    /// It is in the ledger.
    Found(Applied),
}

/// An id that is to be claimed.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The id.
    pub id: &'a MessageId,
    /// SHA-256 of the body.
    pub fingerprint: Fingerprint,
    /// Whose the claim becomes. One that is its own already is made again,
    /// since its commit may have gone unanswered.
    pub owner: Owner,
}

/// What became of claims that were to be renewed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Renewal {
    /// Ids of those that were.
    pub renewed: HashSet<String>,
    /// Ids of those that are still their owner's and were not: somebody has
    /// their rows locked.
    pub locked: HashSet<String>,
}

/// A claim that was made.
pub type Held<'a> = (&'a MessageId, Owner);

impl Ledger {
    /// Claims `wanted`, which must be sorted by id and without repetition, in
    /// the open transaction: nothing may be run before that is committed.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] leaves a broken transaction: roll back.
    pub fn claim(&mut self, wanted: &[Wanted<'_>], lease: Duration) -> Result<Vec<Hold>, Error> {
        debug_assert!(wanted.is_sorted_by(|a, b| a.id < b.id));
        let ids: Vec<&str> = wanted.iter().map(|one| one.id.as_str()).collect();
        let holder = self.host.clone();
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            session.run(async |connection| {
                let ours = claim(&mut *connection, consumer_id, &holder, wanted, lease).await?;
                // A statement of its own: it has to see what was committed
                // while the one before it waited.
                let found = look_up(&mut *connection, consumer_id, &ids).await?;
                let done: Vec<Held<'_>> = wanted
                    .iter()
                    .filter(|one| found.contains_key(one.id.as_str()))
                    .filter(|one| ours.contains(one.id.as_str()))
                    .map(|one| (one.id, one.owner))
                    .collect();
                if !done.is_empty() {
                    surrender(&mut *connection, consumer_id, &done).await?;
                }
                let hold = |one: &Wanted<'_>| match found.get(one.id.as_str()) {
                    Some(row) => Hold::Found(*row),
                    None if ours.contains(one.id.as_str()) => Hold::Ours,
                    None => Hold::Held,
                };
                Ok(wanted.iter().map(hold).collect())
            })
        })
    }

    /// Turns the claims among `held` that are still their owner's into ledger
    /// rows, in the open transaction. The ids of those.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] leaves a broken transaction: roll back.
    pub fn complete(&mut self, held: &[Held<'_>]) -> Result<HashSet<String>, Error> {
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            session.run(async |connection| complete(connection, consumer_id, held).await)
        })
    }

    /// Deletes the claims among `held` that are still their owner's: in the
    /// open transaction, if there is one. The ids of those.
    ///
    /// # Errors
    ///
    /// When they are still there, or that is not known.
    pub fn surrender(&mut self, held: &[Held<'_>]) -> Result<HashSet<String>, Error> {
        self.connect()?;
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            session.run(async |connection| surrender(connection, consumer_id, held).await)
        })
    }

    /// Renews the claims among `held` that are still their owner's, also those
    /// whose lease has run out and that nobody has taken. Waits for no lock.
    ///
    /// # Errors
    ///
    /// When they are not renewed, or that is not known.
    pub fn renew(&mut self, held: &[Held<'_>], lease: Duration) -> Result<Renewal, Error> {
        self.connect()?;
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            session.run(async |connection| renew(connection, consumer_id, held, lease).await)
        })
    }

    /// Which of `ids` are claimed by somebody whose lease goes on.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn held(&mut self, ids: &[&str]) -> Result<HashSet<String>, Error> {
        self.connect()?;
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            session.run(async |connection| {
                let rows = sqlx::query_scalar(
                    "SELECT wanted.message_id FROM pg_catalog.unnest($2::pg_catalog.text[]) AS wanted (message_id) \
                     CROSS JOIN LATERAL (SELECT FROM ackonce.claim WHERE consumer_id = $1 \
                     AND message_id = wanted.message_id AND lease_until > pg_catalog.clock_timestamp() \
                     LIMIT 1) AS held",
                );
                let rows = rows.bind(consumer_id).bind(ids);
                Ok(rows.fetch_all(connection).await?.into_iter().collect())
            })
        })
    }
}

async fn claim(
    connection: &mut PgConnection,
    consumer_id: i16,
    holder: &str,
    wanted: &[Wanted<'_>],
    lease: Duration,
) -> Result<HashSet<String>, sqlx::Error> {
    let ids: Vec<&str> = wanted.iter().map(|one| one.id.as_str()).collect();
    let prints: Vec<&[u8]> = wanted.iter().map(|one| &one.fingerprint.0[..]).collect();
    let owners: Vec<i64> = wanted.iter().map(|one| one.owner.0).collect();
    let rows = sqlx::query_scalar(
        "INSERT INTO ackonce.claim AS known \
         (consumer_id, message_id, fingerprint, owner, holder, claimed_at, lease_until) \
         SELECT $1, batch.message_id, batch.fingerprint, batch.owner, $5, pg_catalog.clock_timestamp(), \
         pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => $6) \
         FROM unnest($2::pg_catalog.text[], $3::pg_catalog.bytea[], $4::pg_catalog.int8[]) \
         AS batch (message_id, fingerprint, owner) \
         ON CONFLICT (consumer_id, message_id) DO UPDATE SET fingerprint = excluded.fingerprint, \
         owner = excluded.owner, holder = excluded.holder, claimed_at = excluded.claimed_at, \
         lease_until = excluded.lease_until \
         WHERE known.lease_until < pg_catalog.clock_timestamp() OR known.owner = excluded.owner \
         RETURNING message_id",
    );
    let rows = rows.bind(consumer_id).bind(ids).bind(prints).bind(owners);
    let rows = rows.bind(holder).bind(lease.as_secs_f64());
    Ok(rows.fetch_all(connection).await?.into_iter().collect())
}

/// The ids of `$2`, each with its owner of `$3`, in the order in which their rows
/// are to be locked.
macro_rules! held {
    () => {
        "(SELECT $1::pg_catalog.int2 AS consumer_id, message_id, owner \
         FROM unnest($2::pg_catalog.text[], $3::pg_catalog.int8[]) AS given (message_id, owner) \
         ORDER BY message_id COLLATE \"C\") AS held"
    };
}

/// One look into the index for each id. The table is empty at one moment and
/// full of dead rows at the next, and a plan for the first would read all of the
/// second: `= ANY` leaves the planner neither a range of the index nor another
/// way to join.
macro_rules! one_by_one {
    ($given:literal) => {
        concat!(
            "claim.consumer_id = ANY (ARRAY[",
            $given,
            ".consumer_id]) AND claim.message_id = ANY (ARRAY[",
            $given,
            ".message_id])"
        )
    };
}

/// Deletes the claims that are still their owner's. One that is being renewed or
/// taken over is waited for, and its owner compared again.
macro_rules! delete {
    () => {
        concat!(
            "DELETE FROM ackonce.claim USING ",
            held!(),
            " WHERE ",
            one_by_one!("held"),
            " AND claim.owner = held.owner RETURNING claim.message_id"
        )
    };
}

const COMPLETE: &str = concat!(
    "WITH gone AS (",
    delete!(),
    ", claim.fingerprint) \
     INSERT INTO ackonce.ledger (consumer_id, message_id, fingerprint) \
     SELECT $1, message_id, fingerprint FROM gone ORDER BY message_id \
     ON CONFLICT DO NOTHING RETURNING message_id"
);

const SURRENDER: &str = delete!();

/// A row that somebody holds locked must not keep the others from being renewed.
const RENEW: &str = concat!(
    "WITH ours AS MATERIALIZED (SELECT held.consumer_id, held.message_id FROM ",
    held!(),
    " CROSS JOIN LATERAL (SELECT FROM ackonce.claim WHERE consumer_id = held.consumer_id \
     AND message_id = held.message_id AND owner = held.owner FOR UPDATE SKIP LOCKED) AS locked) \
     UPDATE ackonce.claim SET lease_until = pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => $4) \
     FROM ours WHERE ",
    one_by_one!("ours"),
    " RETURNING claim.message_id"
);

const STILL_OURS: &str = concat!(
    "SELECT held.message_id FROM ",
    held!(),
    " CROSS JOIN LATERAL (SELECT FROM ackonce.claim WHERE consumer_id = held.consumer_id \
     AND message_id = held.message_id AND owner = held.owner LIMIT 1) AS still_ours"
);

type Scalar<'q> = sqlx::query::QueryScalar<'q, sqlx::Postgres, String, sqlx::postgres::PgArguments>;

fn with_held(statement: &'static str, consumer_id: i16, held: &[Held<'_>]) -> Scalar<'static> {
    let ids: Vec<String> = held.iter().map(|(id, _)| id.as_str().to_owned()).collect();
    let owners: Vec<i64> = held.iter().map(|(_, owner)| owner.0).collect();
    let query = sqlx::query_scalar(statement);
    query.bind(consumer_id).bind(ids).bind(owners)
}

async fn complete(
    connection: &mut PgConnection,
    consumer_id: i16,
    held: &[Held<'_>],
) -> Result<HashSet<String>, sqlx::Error> {
    let rows = with_held(COMPLETE, consumer_id, held);
    Ok(rows.fetch_all(connection).await?.into_iter().collect())
}

async fn surrender(
    connection: &mut PgConnection,
    consumer_id: i16,
    held: &[Held<'_>],
) -> Result<HashSet<String>, sqlx::Error> {
    let rows = with_held(SURRENDER, consumer_id, held);
    Ok(rows.fetch_all(connection).await?.into_iter().collect())
}

async fn renew(
    connection: &mut PgConnection,
    consumer_id: i16,
    held: &[Held<'_>],
    lease: Duration,
) -> Result<Renewal, sqlx::Error> {
    let rows = with_held(RENEW, consumer_id, held).bind(lease.as_secs_f64());
    let renewed: HashSet<String> = rows
        .fetch_all(&mut *connection)
        .await?
        .into_iter()
        .collect();
    let others: Vec<Held<'_>> = held
        .iter()
        .copied()
        .filter(|(id, _)| !renewed.contains(id.as_str()))
        .collect();
    let locked = match others.is_empty() {
        true => HashSet::new(),
        false => {
            let rows = with_held(STILL_OURS, consumer_id, &others);
            rows.fetch_all(connection).await?.into_iter().collect()
        }
    };
    Ok(Renewal { renewed, locked })
}
