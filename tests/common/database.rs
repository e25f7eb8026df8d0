//! A database of its own, and what the tests read in it.

use std::collections::BTreeMap;
use std::sync::Mutex;

use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use tokio::runtime::{Builder, Runtime};

/// A row of the failure journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Idempotency key, where there is one.
    pub message_id: Option<String>,
    /// `rejected`, `missing-id`, …; empty when it is tried again.
    pub reason: String,
    /// `transient`, `permanent` or `systemic`.
    pub class: String,
    /// SQLSTATE, where there is one.
    pub code: Option<String>,
    /// The text for humans.
    pub error: String,
}

/// A session on one database.
pub struct Database {
    runtime: Runtime,
    session: Mutex<PgConnection>,
}

impl Database {
    /// Connects.
    pub fn connect(url: &str) -> Self {
        Self::try_connect(url)
            .unwrap_or_else(|e| panic!("failed to connect to PostgreSQL: {e}; run script/test"))
    }

    /// Connects to a server that may not be there.
    pub fn try_connect(url: &str) -> Result<Self, sqlx::Error> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime for the harness");
        let session = runtime.block_on(PgConnection::connect(url))?;
        Ok(Self {
            runtime,
            session: Mutex::new(session),
        })
    }

    /// Runs statements without a result.
    pub fn execute(&self, sql: &str) {
        let mut session = self.session.lock().expect("the session");
        self.runtime
            .block_on(sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut *session))
            .unwrap_or_else(|e| panic!("failed to run {sql:?}: {e}"));
    }

    /// As [`Self::execute`], of what may fail.
    pub fn try_execute(&self, sql: &str) -> Result<(), sqlx::Error> {
        let mut session = self.session.lock().expect("the session");
        let run = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut *session);
        self.runtime.block_on(run).map(drop)
    }

    /// Rows of a query.
    pub fn rows(&self, sql: &str) -> Vec<PgRow> {
        let mut session = self.session.lock().expect("the session");
        self.runtime
            .block_on(sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).fetch_all(&mut *session))
            .unwrap_or_else(|e| panic!("failed to run {sql:?}: {e}"))
    }

    /// The one number of a query.
    pub fn count(&self, sql: &str) -> i64 {
        self.rows(sql)[0].get(0)
    }

    /// The first column of a query, as text.
    pub fn texts(&self, sql: &str) -> Vec<String> {
        self.rows(sql).iter().map(|row| row.get(0)).collect()
    }

    /// How often each id took effect.
    pub fn effects(&self) -> BTreeMap<String, i64> {
        self.rows("select message_id, count(*) from effect group by 1")
            .iter()
            .map(|row| (row.get(0), row.get(1)))
            .collect()
    }

    /// Number of effects, repeated ones included.
    pub fn effect_count(&self) -> i64 {
        self.count("select count(*) from effect")
    }

    /// Ids that took effect more than once.
    pub fn applied_twice(&self) -> Vec<String> {
        self.texts("select message_id from effect group by 1 having count(*) > 1")
    }

    /// Ids in the ledger of `consumer`, sorted.
    pub fn ledger(&self, consumer: &str) -> Vec<String> {
        self.texts(&format!(
            "select message_id from ackonce.ledger join ackonce.consumer on consumer_id = id \
             where name = '{consumer}' order by 1"
        ))
    }

    /// The failure journal of `consumer`, oldest first.
    pub fn failures(&self, consumer: &str) -> Vec<Failure> {
        self.rows(&format!(
            "select f.message_id, coalesce(f.reason, ''), f.class, f.code, f.error \
             from ackonce.failure f join ackonce.consumer c on f.consumer_id = c.id \
             where c.name = '{consumer}' order by f.id"
        ))
        .iter()
        .map(|row| Failure {
            message_id: row.get(0),
            reason: row.get(1),
            class: row.get(2),
            code: row.get(3),
            error: row.get(4),
        })
        .collect()
    }

    /// Reasons in the failure journal of `consumer`, oldest first.
    pub fn reasons(&self, consumer: &str) -> Vec<String> {
        let failures = self.failures(consumer);
        failures.into_iter().map(|failure| failure.reason).collect()
    }

    /// The id of the ledger in this database, as Redis keys carry it.
    pub fn ledger_id(&self) -> String {
        self.texts("select ledger_id::text from ackonce.instance")
            .remove(0)
    }
}
