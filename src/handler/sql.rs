//! The `sql` handler: the user's statements over a relation named `message`.
//!
//! They run for one message after the other, in the order of the queue, each
//! seeing the effects of those before it: a PL/pgSQL function in the session's
//! temporary schema does it with one round trip for a batch (`each`). With
//! `batch = "set"` each statement runs once over a relation of all messages.
//!
//! Message content is never part of a statement, and every statement stays
//! prepared.

mod each;
mod script;

use sqlx::{AssertSqlSafe, Executor, SqlSafeStr};

use super::json::is_storable_json;
use super::{Fault, Transactional, Work};
use crate::config::checked::{self, BatchMode};
use crate::message::Message;
use crate::postgres::{Error, Session};

pub use script::ScriptError;
use script::{Kind, Statement};

/// First second of the year 1 and last one of the year 9999: times beyond are
/// not passed on.
const TIMESTAMPS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// What is bound, one array for each: `unnest` of several arrays is
/// PostgreSQL's own, whatever the search path has.
const ARRAYS: &str = "unnest($1::text[], $2::bytea[], $3::bool[], $4::text[], $5::text[], \
     $6::text[], $7::float8[], $8::bool[], $9::int4[]) WITH ORDINALITY AS m (message_id, payload, \
     is_json, headers, exchange, routing_key, published_at, redelivered, attempt, position)";

/// The columns of the relation, as they are made from [`ARRAYS`].
const COLUMNS: [(&str, &str); 9] = [
    ("message_id", "m.message_id"),
    (
        "body",
        "CASE WHEN m.is_json THEN \
         pg_catalog.convert_from(m.payload, 'UTF8')::pg_catalog.jsonb END",
    ),
    ("payload", "m.payload"),
    ("headers", "m.headers::pg_catalog.jsonb"),
    ("exchange", "m.exchange"),
    ("routing_key", "m.routing_key"),
    ("published_at", "pg_catalog.to_timestamp(m.published_at)"),
    ("redelivered", "m.redelivered"),
    ("attempt", "m.attempt"),
];

/// The columns as a select list.
fn select_list() -> String {
    let columns = COLUMNS.map(|(name, value)| format!("{value} AS {name}"));
    columns.join(", ")
}

/// The relation of all messages. `OFFSET 0` keeps the planner from parsing
/// `body` again for every place that mentions it.
fn relation_of_all() -> String {
    let columns = select_list();
    format!("message AS (SELECT {columns}, m.position::int4 AS position FROM {ARRAYS} OFFSET 0)")
}

/// Runs the statements of one consumer.
#[derive(Debug)]
pub struct SqlHandler {
    statements: Vec<Statement>,
    origin: String,
    mode: BatchMode,
    /// The function that runs them for one message after the other, and the
    /// session in which it stands.
    function: Option<(u64, each::Function)>,
}

impl SqlHandler {
    /// Splits the text into statements and refuses those that cannot run
    /// inside the ledger's transaction.
    ///
    /// # Errors
    ///
    /// [`ScriptError`], with the line.
    pub fn new(config: &checked::SqlHandler) -> Result<Self, ScriptError> {
        Ok(Self {
            statements: script::split(&config.text, &config.origin)?,
            origin: config.origin.clone(),
            mode: config.batch,
            function: None,
        })
    }

    /// Lets the server parse and plan every statement, and run none.
    ///
    /// # Errors
    ///
    /// The line of the first statement that the server refuses, and why.
    pub fn check(&mut self, session: &mut Session) -> Result<(), Box<(ScriptError, Error)>> {
        for statement in &self.statements {
            self.parse(session, statement)
                .map_err(|error| self.refusal(statement.line, error))?;
        }
        let line = self.statements.first().map_or(1, |s| s.line);
        self.ready(session)
            .map_err(|error| self.refusal(line, error))
    }

    fn parse(&self, session: &mut Session, statement: &Statement) -> Result<(), Error> {
        let text = statement.text(&match self.mode {
            BatchMode::Set => relation_of_all(),
            // Without the column that only sets have.
            BatchMode::Each => {
                let columns = select_list();
                format!("message AS (SELECT {columns} FROM {ARRAYS} LIMIT 1)")
            }
        });
        match statement.kind {
            Kind::Utility => Ok(()),
            Kind::Query | Kind::Write => session.run(async |connection| {
                let text = AssertSqlSafe(text).into_sql_str();
                connection.prepare(text).await.map(drop)
            }),
        }
    }

    fn refusal(&self, line: u64, error: Error) -> Box<(ScriptError, Error)> {
        let script = ScriptError {
            origin: self.origin.clone(),
            line,
            problem: error.to_string(),
        };
        Box::new((script, error))
    }

    /// How many statements there are, and how they run.
    #[must_use]
    pub fn plan(&self) -> (usize, &'static str) {
        (self.statements.len(), self.mode.how())
    }

    fn apply_set(&self, session: &mut Session, batch: &[Work<'_>]) -> Result<(), Error> {
        let arrays = Arrays::of(batch);
        let relation = relation_of_all();
        for statement in &self.statements {
            let text = statement.text(&relation);
            session.run(async |connection| {
                // The text is the operator's own, from the configuration.
                let query = sqlx::query(AssertSqlSafe(text));
                let query = match statement.kind {
                    Kind::Utility => query,
                    Kind::Query | Kind::Write => arrays.bind(query),
                };
                query.execute(connection).await?;
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl Transactional for SqlHandler {
    fn kind(&self) -> &'static str {
        "sql"
    }

    fn ready(&mut self, session: &mut Session) -> Result<(), Error> {
        let is_there = |(known, _): &(u64, each::Function)| *known == session.id();
        if self.mode == BatchMode::Set || self.function.as_ref().is_some_and(is_there) {
            return Ok(());
        }
        let function = each::Function::new(&self.statements);
        function.create(session)?;
        self.function = Some((session.id(), function));
        Ok(())
    }

    fn apply(&mut self, session: &mut Session, batch: &[Work<'_>]) -> Result<(), Fault> {
        match &self.function {
            Some((_, function)) => function.apply(session, &Arrays::of(batch)),
            None => Ok(self.apply_set(session, batch)?),
        }
    }
}

/// The batch, one array for each of [`ARRAYS`].
struct Arrays<'a> {
    message_id: Vec<&'a str>,
    payload: Vec<&'a [u8]>,
    is_json: Vec<bool>,
    headers: Vec<String>,
    exchange: Vec<&'a str>,
    routing_key: Vec<&'a str>,
    published_at: Vec<Option<f64>>,
    redelivered: Vec<bool>,
    attempt: Vec<i32>,
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Postgres, sqlx::postgres::PgArguments>;

impl<'a> Arrays<'a> {
    fn of(batch: &[Work<'a>]) -> Self {
        let messages = || batch.iter().map(|work| work.message);
        Self {
            message_id: batch.iter().map(|work| work.message_id.as_str()).collect(),
            payload: messages().map(|m| m.body.as_slice()).collect(),
            is_json: messages().map(|m| is_storable_json(&m.body)).collect(),
            headers: messages()
                .map(|m| serde_json::Value::Object(m.headers.clone()).to_string())
                .collect(),
            exchange: messages().map(|m| m.exchange.as_str()).collect(),
            routing_key: messages().map(|m| m.routing_key.as_str()).collect(),
            published_at: messages().map(published_at).collect(),
            redelivered: messages().map(|m| m.redelivered).collect(),
            attempt: batch
                .iter()
                .map(|work| i32::try_from(work.attempt).unwrap_or(i32::MAX))
                .collect(),
        }
    }

    fn bind<'q>(&'q self, query: Query<'q>) -> Query<'q> {
        query
            .bind(&self.message_id)
            .bind(&self.payload)
            .bind(&self.is_json)
            .bind(&self.headers)
            .bind(&self.exchange)
            .bind(&self.routing_key)
            .bind(&self.published_at)
            .bind(&self.redelivered)
            .bind(&self.attempt)
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "whole seconds of ten thousand years are exact in a double"
)]
fn published_at(message: &Message) -> Option<f64> {
    let seconds = message.published_seconds()?;
    TIMESTAMPS.contains(&seconds).then_some(seconds as f64)
}
