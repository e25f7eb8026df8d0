//! The ledger: the PostgreSQL table of what has been applied, and the journal
//! of what could not be. The truth of the house; Redis is only a hint.
//!
//! A [`Ledger`] belongs to one worker thread. It connects when it is needed
//! and again after it lost its session; it never retries by itself.

pub mod desk;
mod journal;
mod keyed;
mod place;
pub mod prune;
pub mod replay;
mod schema;
pub mod story;
mod suspect;

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use sqlx::{PgConnection, Row};

use crate::config::checked;
use crate::failpoint::{self, Mutant};
use crate::failure::Failure;
use crate::message::{Fingerprint, MessageId};
use crate::postgres::{Error, Session};
use crate::seal::Marks;

pub use journal::JournalEntry;
pub use keyed::{Held, Hold, Owner, Renewal, Wanted};
pub use place::{marks, secret};
pub use schema::{Schema, forget_marks, migrate, renew_id, schema};

/// First half of the advisory lock of transactions that go single-file, "acks";
/// the second is the consumer's number.
const SINGLE_FILE: i32 = i32::from_be_bytes(*b"acks");

/// Which ledger this is, and what the consumer is called in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// Names and signs what is written to Redis about this ledger.
    pub marks: Marks,
    /// `ackonce.consumer.id`.
    pub consumer_id: i16,
}

/// A committed row of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// SHA-256 of the body that was applied.
    pub fingerprint: Fingerprint,
    /// How long ago that was.
    pub age: Duration,
}

/// How long a worker believes marks in Redis without asking its server whether
/// it still is the one that they were made at.
pub const MARKS_FRESH: Duration = Duration::from_secs(1);

/// What the ledger says about one message of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Its row is new, in the open transaction.
    Inserted,
    /// A committed row has its id.
    Found(Applied),
    /// Its row was there for the insert and gone for the look-up: pruned in
    /// between. To be tried again.
    Vanished,
}

/// Why a commit did not return.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommitError {
    /// The server refused it and rolled back.
    Refused(Failure),
    /// Whether it took effect is unknown: look it up.
    Unknown(String),
}

/// One worker's way to the ledger.
pub struct Ledger {
    config: checked::Postgres,
    consumer: String,
    host: String,
    worker: i32,
    owner: i64,
    by_index: bool,
    open: Option<(Session, Registration)>,
    /// When the server last said which ledger it has.
    asked_at: Instant,
}

impl Ledger {
    /// Does not connect yet. `host` and `worker` say in the journal who wrote
    /// a row. `owner` says in the crash marks whose run a mark is: random, one
    /// for all workers that live and die together.
    #[must_use]
    pub fn new(
        config: checked::Postgres,
        consumer: &str,
        host: &str,
        worker: usize,
        owner: u64,
    ) -> Self {
        Self {
            config,
            consumer: consumer.to_owned(),
            host: host.to_owned(),
            worker: i32::try_from(worker).unwrap_or(i32::MAX),
            owner: owner.cast_signed(),
            by_index: false,
            open: None,
            asked_at: Instant::now(),
        }
    }

    /// For claims, whose table is empty at one moment and full of dead rows at
    /// the next: a plan made for the first would read all of the second.
    #[must_use]
    pub fn by_index(self) -> Self {
        Self {
            by_index: true,
            ..self
        }
    }

    /// Connects if there is no session, and tells which ledger it is.
    ///
    /// # Errors
    ///
    /// When the server cannot be reached or does not let the daemon in.
    pub fn connect(&mut self) -> Result<&Registration, Error> {
        if self.open.is_none() {
            self.asked_at = Instant::now();
            let mut session = Session::open(&self.config, &self.consumer)?;
            let registration = register(&mut session, &self.consumer)?;
            if self.by_index {
                session.set("SET enable_seqscan = off")?;
            }
            self.open = Some((session, registration));
        }
        match &self.open {
            Some((_, registration)) => Ok(registration),
            None => Err(no_session()),
        }
    }

    /// What marks in Redis are believed by. Not from memory for longer than
    /// [`MARKS_FRESH`]: a consumer that gets nothing but duplicates would
    /// otherwise never notice that its server is gone, or has lost rows.
    ///
    /// # Errors
    ///
    /// As [`Ledger::connect`].
    pub fn marks(&mut self) -> Result<&Marks, Error> {
        if self.asked_at.elapsed() > MARKS_FRESH && self.open.is_some() {
            self.asked_at = Instant::now();
            let marks = self.forgetting(|session, _| place::marks(session))?;
            if let Some((_, registration)) = &mut self.open {
                registration.marks = marks;
            }
        }
        Ok(&self.connect()?.marks)
    }

    /// The session with the open transaction, for the handler.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn session(&mut self) -> Result<&mut Session, Error> {
        match &mut self.open {
            Some((session, _)) => Ok(session),
            None => Err(no_session()),
        }
    }

    /// Opens a transaction, connecting if need be.
    ///
    /// # Errors
    ///
    /// As [`Ledger::connect`]; after an error there is no open transaction.
    pub fn begin(&mut self) -> Result<(), Error> {
        self.connect()?;
        self.forgetting(|session, _| {
            // READ COMMITTED, whatever the database's default: the look-up in
            // `record` must see rows that were committed after BEGIN.
            session.execute_at_once("BEGIN ISOLATION LEVEL READ COMMITTED")
        })
    }

    /// As [`Ledger::begin`], and waits until no other transaction of this
    /// consumer is open that began so: in this daemon and in others.
    ///
    /// # Errors
    ///
    /// As [`Ledger::begin`]; [`Error::Refused`] leaves a broken transaction:
    /// roll back.
    pub fn begin_alone(&mut self) -> Result<(), Error> {
        self.begin()?;
        self.forgetting(|session, registration| {
            let consumer_id = i32::from(registration.consumer_id);
            session.run(async |connection| {
                sqlx::query("SELECT pg_catalog.pg_advisory_xact_lock($1, $2)")
                    .bind(SINGLE_FILE)
                    .bind(consumer_id)
                    .execute(connection)
                    .await
                    .map(drop)
            })
        })
    }

    /// Inserts rows for `entries`, which must be sorted by id and without
    /// repetition, and says for each whether it is new. Waits for open
    /// transactions that hold one of the ids.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] leaves a broken transaction: roll back.
    pub fn record(&mut self, entries: &[(&MessageId, Fingerprint)]) -> Result<Vec<Record>, Error> {
        debug_assert!(entries.is_sorted_by(|a, b| a.0 < b.0));
        let ids: Vec<&str> = entries.iter().map(|(id, _)| id.as_str()).collect();
        let prints: Vec<&[u8]> = entries.iter().map(|(_, print)| &print.0[..]).collect();
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            let inserted = session
                .run(async |connection| insert(connection, consumer_id, &ids, &prints).await)?;
            if failpoint::mutant(Mutant::EffectOutside) {
                session.execute("COMMIT; BEGIN")?;
            }
            if failpoint::mutant(Mutant::WithoutLedger) {
                return Ok(vec![Record::Inserted; entries.len()]);
            }
            if inserted.len() == entries.len() {
                return Ok(vec![Record::Inserted; entries.len()]);
            }
            let absent: Vec<&str> = ids
                .iter()
                .copied()
                .filter(|id| !inserted.contains(*id))
                .collect();
            let found =
                session.run(async |connection| look_up(connection, consumer_id, &absent).await)?;
            Ok(ids
                .iter()
                .map(|id| match (inserted.contains(*id), found.get(*id)) {
                    (true, _) => Record::Inserted,
                    (false, Some(row)) => Record::Found(*row),
                    (false, None) => Record::Vanished,
                })
                .collect())
        })
    }

    /// The committed row of each of `ids` that is in the ledger.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn find(&mut self, ids: &[&str]) -> Result<HashMap<String, Applied>, Error> {
        self.connect()?;
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            session.run(async |connection| look_up(connection, consumer_id, ids).await)
        })
    }

    /// Commits the open transaction.
    ///
    /// # Errors
    ///
    /// [`CommitError::Unknown`] whenever the reply did not come: the row may
    /// be there.
    pub fn commit(&mut self) -> Result<(), CommitError> {
        match self.forgetting(|session, _| session.commit()) {
            Ok(()) => Ok(()),
            Err(Error::Lost(_)) if failpoint::mutant(Mutant::TrustedCommit) => Ok(()),
            // A deferred constraint, a trigger, a serialization check or a
            // cancellation: the server has rolled back. What fails once it is
            // past that costs it the session, at least.
            Err(Error::Refused(failure)) => Err(CommitError::Refused(failure)),
            Err(error) => Err(CommitError::Unknown(error.to_string())),
        }
    }

    /// Rolls the open transaction back. A session that cannot even do that is
    /// dropped, which makes the server roll back.
    pub fn rollback(&mut self) {
        if let Err(error) = self.forgetting(|session, _| session.execute("ROLLBACK")) {
            log::debug!(consumer = self.consumer.as_str(); "dropped a session that could not roll back: {error}");
            self.open = None;
        }
    }

    /// Writes failed attempts into the failure journal, in a statement of its
    /// own.
    ///
    /// # Errors
    ///
    /// When they are not written.
    pub fn journal(&mut self, handler: &str, entries: &[JournalEntry<'_>]) -> Result<(), Error> {
        self.connect()?;
        let (host, worker) = (self.host.clone(), self.worker);
        self.forgetting(|session, registration| {
            let writer = journal::Writer {
                consumer_id: registration.consumer_id,
                handler,
                host: &host,
                worker,
            };
            session.run(async |connection| journal::write(connection, &writer, entries).await)
        })
    }

    /// For each of `ids` that bears a crash mark: how many runs of it never
    /// ended. A mark of this owner is a run that goes on, and counts no death.
    ///
    /// # Errors
    ///
    /// When the server cannot be asked.
    pub fn suspects(&mut self, ids: &[&str]) -> Result<HashMap<String, u32>, Error> {
        self.connect()?;
        let owner = self.owner;
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            session.run(async |connection| suspect::find(connection, consumer_id, owner, ids).await)
        })
    }

    /// Puts this owner's crash mark on `ids`, before they run. A mark of
    /// another owner's is taken over and counts one more death.
    ///
    /// # Errors
    ///
    /// When they are not marked, or not known to be.
    pub fn mark(&mut self, ids: &[&str]) -> Result<(), Error> {
        self.connect()?;
        let owner = self.owner;
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            session.run(async |connection| suspect::mark(connection, consumer_id, owner, ids).await)
        })
    }

    /// Makes this owner's crash marks on `ids` nobody's: their run has ended
    /// without a result, and without a death. What they counted stays.
    ///
    /// # Errors
    ///
    /// When they still bear them, or that is not known.
    pub fn rest(&mut self, ids: &[&str]) -> Result<(), Error> {
        self.connect()?;
        let owner = self.owner;
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            session.run(async |connection| suspect::rest(connection, consumer_id, owner, ids).await)
        })
    }

    /// Takes the crash marks off `ids`, after they have run: in the open
    /// transaction, if there is one.
    ///
    /// # Errors
    ///
    /// When they still bear them, or that is not known.
    pub fn unmark(&mut self, ids: &[&str]) -> Result<(), Error> {
        self.connect()?;
        self.forgetting(|session, registration| {
            let consumer_id = registration.consumer_id;
            session.run(async |connection| suspect::unmark(connection, consumer_id, ids).await)
        })
    }

    /// Runs `call`, and forgets the session if it was lost.
    fn forgetting<T>(
        &mut self,
        call: impl FnOnce(&mut Session, &Registration) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (session, registration) = self.open.as_mut().ok_or_else(no_session)?;
        let result = call(session, registration);
        if matches!(result, Err(Error::Lost(_))) {
            self.open = None;
        }
        result
    }

    /// Forgets the session: a handler lost it.
    pub fn lost(&mut self) {
        self.open = None;
    }
}

fn no_session() -> Error {
    Error::Lost("there is no session".to_owned())
}

async fn insert(
    connection: &mut PgConnection,
    consumer_id: i16,
    ids: &[&str],
    prints: &[&[u8]],
) -> Result<HashSet<String>, sqlx::Error> {
    // The rows arrive sorted and unnest keeps their order, so that two
    // batches which share ids lock them in the same order.
    let rows = sqlx::query(
        "INSERT INTO ackonce.ledger (consumer_id, message_id, fingerprint) \
         SELECT $1, batch.message_id, batch.fingerprint \
         FROM unnest($2::pg_catalog.text[], $3::pg_catalog.bytea[]) AS batch (message_id, fingerprint) \
         ON CONFLICT DO NOTHING RETURNING message_id",
    )
    .bind(consumer_id)
    .bind(ids)
    .bind(prints)
    .fetch_all(connection)
    .await?;
    rows.iter().map(|row| row.try_get(0)).collect()
}

async fn look_up(
    connection: &mut PgConnection,
    consumer_id: i16,
    ids: &[&str],
) -> Result<HashMap<String, Applied>, sqlx::Error> {
    // One look into the index for each id, whatever the statistics say: of a
    // young ledger they say that it is empty, and then all rows of the consumer
    // would be read.
    let rows = sqlx::query(
        "SELECT known.message_id, known.fingerprint, \
         extract(epoch FROM pg_catalog.clock_timestamp() - known.applied_at)::pg_catalog.float8 \
         FROM pg_catalog.unnest($2::pg_catalog.text[]) AS wanted (message_id) \
         CROSS JOIN LATERAL (SELECT message_id, fingerprint, applied_at FROM ackonce.ledger \
         WHERE consumer_id = $1 AND message_id = wanted.message_id LIMIT 1) AS known",
    )
    .bind(consumer_id)
    .bind(ids)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let age: f64 = row.try_get(2)?;
            let applied = Applied {
                fingerprint: Fingerprint(row.try_get(1)?),
                // A clock that was set back makes it young.
                age: Duration::try_from_secs_f64(age).unwrap_or_default(),
            };
            Ok((row.try_get(0)?, applied))
        })
        .collect()
}

fn register(session: &mut Session, consumer: &str) -> Result<Registration, Error> {
    let marks = place::marks(session)?;
    session.run(async |connection| {
        // Looked for before it is inserted: an insert that conflicts would
        // still use up one of 32,767 identity values.
        let find = "SELECT id FROM ackonce.consumer WHERE name = $1";
        let known: Option<i16> = sqlx::query_scalar(find)
            .bind(consumer)
            .fetch_optional(&mut *connection)
            .await?;
        let consumer_id = match known {
            Some(id) => id,
            None => {
                sqlx::query(
                    "INSERT INTO ackonce.consumer (name) VALUES ($1) ON CONFLICT DO NOTHING",
                )
                .bind(consumer)
                .execute(&mut *connection)
                .await?;
                sqlx::query_scalar(find)
                    .bind(consumer)
                    .fetch_one(&mut *connection)
                    .await?
            }
        };
        Ok(Registration { marks, consumer_id })
    })
}
