//! The `sql` handler: the user's statements, run once per batch over a
//! relation named `message`.
//!
//! Each statement gets the batch as bound arrays behind a common table
//! expression, `WITH message AS (…)`, put before its own text. Message content
//! is never part of a statement, and every statement stays prepared.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::tokenizer::{Location, Token, TokenWithSpan, Tokenizer};
use sqlx::{AssertSqlSafe, Executor, SqlSafeStr};

use super::{Transactional, Work};
use crate::config::checked;
use crate::message::Message;
use crate::postgres::{Error, Session};

/// First second of the year 1 and last one of the year 9999: times beyond are
/// not passed on.
const TIMESTAMPS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// The relation. `OFFSET 0` keeps the planner from parsing `body` again for
/// every place that mentions it.
const MESSAGE: &str = "message AS (SELECT m.message_id, \
     CASE WHEN m.is_json THEN convert_from(m.payload, 'UTF8')::jsonb END AS body, \
     m.payload, m.headers::jsonb AS headers, m.exchange, m.routing_key, \
     to_timestamp(m.published_at) AS published_at, m.redelivered, m.attempt \
     FROM unnest($1::text[], $2::bytea[], $3::bool[], $4::text[], $5::text[], $6::text[], \
     $7::float8[], $8::bool[], $9::int4[]) AS m (message_id, payload, is_json, headers, \
     exchange, routing_key, published_at, redelivered, attempt) OFFSET 0)";

/// Why a handler's text cannot be run at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failed to read the handler's SQL, {origin}, line {line}: {problem}")]
pub struct ScriptError {
    /// The file, or `inline`.
    pub origin: String,
    /// Line in the text, from 1.
    pub line: u64,
    /// What is wrong, and the way out.
    pub problem: String,
}

/// A statement as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Statement {
    text: String,
    reads_messages: bool,
    line: u64,
}

/// Runs the statements of one consumer.
#[derive(Debug)]
pub struct SqlHandler {
    statements: Vec<Statement>,
    origin: String,
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
            statements: split(&config.text, &config.origin)?,
            origin: config.origin.clone(),
        })
    }

    /// Lets the server parse and plan every statement, and run none.
    ///
    /// # Errors
    ///
    /// The line of the first statement that the server refuses, and why.
    pub fn prepare(&self, session: &mut Session) -> Result<(), Box<(ScriptError, Error)>> {
        for statement in &self.statements {
            let text = statement.text.clone();
            session
                .run(async |connection| {
                    connection
                        .prepare(AssertSqlSafe(text).into_sql_str())
                        .await?;
                    Ok(())
                })
                .map_err(|error| {
                    let script = ScriptError {
                        origin: self.origin.clone(),
                        line: statement.line,
                        problem: error.to_string(),
                    };
                    Box::new((script, error))
                })?;
        }
        Ok(())
    }
}

impl Transactional for SqlHandler {
    fn kind(&self) -> &'static str {
        "sql"
    }

    fn apply(&mut self, session: &mut Session, batch: &[Work<'_>]) -> Result<(), Error> {
        let columns = Columns::of(batch);
        for statement in &self.statements {
            session.run(async |connection| {
                // The text is the operator's own, from the configuration.
                let query = sqlx::query(AssertSqlSafe(statement.text.as_str()));
                let query = if statement.reads_messages {
                    columns.bind(query)
                } else {
                    query
                };
                query.execute(connection).await?;
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// The batch, one array for each column of the relation.
struct Columns<'a> {
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

impl<'a> Columns<'a> {
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

/// Whether `jsonb` can hold the body: JSON of at most 128 levels, without the
/// escape `\u0000`, its numbers within the range of a double.
fn is_storable_json(body: &[u8]) -> bool {
    serde_json::from_slice::<Storable>(body).is_ok()
}

/// Deserialises from any JSON that `jsonb` can hold, keeping nothing of it.
struct Storable;

impl<'de> Deserialize<'de> for Storable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StorableVisitor)
    }
}

struct StorableVisitor;

impl<'de> Visitor<'de> for StorableVisitor {
    type Value = Storable;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON without NUL characters")
    }

    fn visit_unit<E>(self) -> Result<Storable, E> {
        Ok(Storable)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Storable, E> {
        Ok(Storable)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Storable, E> {
        Ok(Storable)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Storable, E> {
        Ok(Storable)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Storable, E> {
        Ok(Storable)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Storable, E> {
        if text.contains('\0') {
            return Err(E::custom("NUL character"));
        }
        Ok(Storable)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Storable, A::Error> {
        while items.next_element::<Storable>()?.is_some() {}
        Ok(Storable)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Storable, A::Error> {
        while entries.next_entry::<Storable, Storable>()?.is_some() {}
        Ok(Storable)
    }
}

/// Splits a script at its semicolons. The tokens are PostgreSQL's (dollar
/// quotes, nested comments, escape strings), by way of `sqlparser`; whether
/// the statements are sound is for the server to say.
fn split(text: &str, origin: &str) -> Result<Vec<Statement>, ScriptError> {
    let error = |line: u64, problem: String| ScriptError {
        origin: origin.to_owned(),
        line,
        problem,
    };
    let tokens = Tokenizer::new(&PostgreSqlDialect {}, text)
        .tokenize_with_location()
        .map_err(|e| error(e.location.line, e.message))?;
    let mut cursor = Cursor::new(text);
    let mut statements = Vec::new();
    for group in tokens.split(|t| t.token == Token::SemiColon) {
        let significant: Vec<&TokenWithSpan> = group
            .iter()
            .filter(|t| !matches!(t.token, Token::Whitespace(_) | Token::EOF))
            .collect();
        let (Some(first), Some(last)) = (significant.first(), significant.last()) else {
            continue;
        };
        let line = first.span.start.line;
        if let Some(placeholder) = significant
            .iter()
            .find(|t| matches!(t.token, Token::Placeholder(_)))
        {
            return Err(error(
                placeholder.span.start.line,
                format!(
                    "{} is a parameter, and a handler has none: read the relation message",
                    placeholder.token
                ),
            ));
        }
        let starts: Vec<usize> = significant
            .iter()
            .take(WORDS)
            .map(|t| cursor.offset(t.span.start))
            .collect();
        let end = cursor.offset(last.span.end);
        let from: Vec<&str> = starts.iter().map(|start| &text[*start..end]).collect();
        statements
            .push(statement(&from, &significant, line).map_err(|problem| error(line, problem))?);
    }
    if statements.is_empty() {
        return Err(error(1, "there is no statement in it".to_owned()));
    }
    Ok(statements)
}

/// Tokens at the start of a statement that are looked at.
const WORDS: usize = 3;

/// Puts the relation before a statement that can read it. `from` is the
/// statement from its first token on, from its second, from its third, as far
/// as it has them.
fn statement(from: &[&str], tokens: &[&TokenWithSpan], line: u64) -> Result<Statement, String> {
    let word = |index: usize| match tokens.get(index).map(|t| &t.token) {
        Some(Token::Word(word)) if word.quote_style.is_none() => word.value.to_ascii_uppercase(),
        Some(token) => token.to_string(),
        None => String::new(),
    };
    let from = |index: usize| from.get(index).copied().unwrap_or_default();
    let source = from(0);
    let (text, reads_messages) = match word(0).as_str() {
        "WITH" if word(1) == "RECURSIVE" => {
            (format!("WITH RECURSIVE {MESSAGE}, {}", from(2)), true)
        }
        "WITH" => (format!("WITH {MESSAGE}, {}", from(1)), true),
        "SELECT" | "INSERT" | "UPDATE" | "DELETE" | "MERGE" | "VALUES" | "TABLE" | "(" => {
            (format!("WITH {MESSAGE} {source}"), true)
        }
        "CALL" | "DO" | "LOCK" | "NOTIFY" | "TRUNCATE" => (source.to_owned(), false),
        "SET" if word(1) == "LOCAL" => (source.to_owned(), false),
        other => {
            return Err(format!(
                "a handler cannot run {other}: it works inside the ledger's transaction, with \
                 SELECT, INSERT, UPDATE, DELETE, MERGE, VALUES, TABLE and WITH (which can read \
                 message), CALL, DO, LOCK, NOTIFY, TRUNCATE and SET LOCAL (which cannot)"
            ));
        }
    };
    Ok(Statement {
        text,
        reads_messages,
        line,
    })
}

/// Finds the byte offsets of places that the tokenizer counts in lines and
/// characters. It goes forward alone: the places of a script, in their order,
/// cost one walk through it.
struct Cursor<'a> {
    text: &'a str,
    rest: std::str::Chars<'a>,
    place: Location,
}

impl<'a> Cursor<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            rest: text.chars(),
            place: Location::new(1, 1),
        }
    }

    /// Goes on to `place`, or to the end if that comes first; stays where it is
    /// if `place` lies behind it.
    fn offset(&mut self, place: Location) -> usize {
        while self.place < place {
            match self.rest.next() {
                Some('\n') => self.place = Location::new(self.place.line + 1, 1),
                Some(_) => self.place.column += 1,
                None => break,
            }
        }
        self.text.len() - self.rest.as_str().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn texts(script: &str) -> Vec<String> {
        split(script, "inline")
            .unwrap()
            .into_iter()
            .map(|s| s.text.replace(MESSAGE, "message"))
            .collect()
    }

    fn problem(script: &str) -> (u64, String) {
        let error = split(script, "inline").unwrap_err();
        (error.line, error.problem)
    }

    #[test]
    fn the_relation_stands_before_what_can_read_it() {
        assert_eq!(texts("SELECT 1"), ["WITH message SELECT 1"]);
        assert_eq!(
            texts("with a as (select 1) table a"),
            ["WITH message, a as (select 1) table a"]
        );
        assert_eq!(
            texts("WITH  RECURSIVE a AS (SELECT 1) TABLE a;"),
            ["WITH RECURSIVE message, a AS (SELECT 1) TABLE a"]
        );
        assert_eq!(texts("DO $$ BEGIN END $$"), ["DO $$ BEGIN END $$"]);
        assert_eq!(
            texts("SET LOCAL work_mem = '1MB'"),
            ["SET LOCAL work_mem = '1MB'"]
        );
    }

    #[test]
    fn semicolons_split_only_between_statements() {
        let script = "-- one; two\nINSERT INTO t SELECT ';', $tag$;$tag$, \"a;b\", E'\\';' FROM message;\n\
                      /* ; /* ; */ */ DELETE FROM ü WHERE x = 'ä;ö' ;;\n;";
        assert_eq!(
            texts(script),
            [
                "WITH message INSERT INTO t SELECT ';', $tag$;$tag$, \"a;b\", E'\\';' FROM message",
                "WITH message DELETE FROM ü WHERE x = 'ä;ö'",
            ]
        );
    }

    #[test]
    fn places_are_found_in_one_walk_through_a_script() {
        let mut cursor = Cursor::new("ü;\nSELECT 'ä';\r\nx");
        for (line, column, offset, rest) in [
            (1, 2, 2, ";\nSELECT 'ä';\r\nx"),
            (2, 1, 4, "SELECT 'ä';\r\nx"),
            (2, 11, 15, ";\r\nx"),
            (2, 11, 15, ";\r\nx"),
            // Never back.
            (1, 1, 15, ";\r\nx"),
            (3, 2, 19, ""),
            (9, 9, 19, ""),
        ] {
            assert_eq!(cursor.offset(Location::new(line, column)), offset);
            assert_eq!(cursor.rest.as_str(), rest);
        }
    }

    #[test]
    fn what_would_end_the_transaction_is_refused_with_its_line() {
        for word in [
            "COMMIT",
            "begin",
            "ROLLBACK",
            "SAVEPOINT a",
            "SET x = 1",
            "COPY t FROM STDIN",
        ] {
            let (line, problem) = problem(&format!("SELECT 1;\n\n{word};"));
            assert_eq!(line, 3, "{word}");
            assert!(problem.contains("a handler cannot run"), "{problem}");
        }
    }

    #[test]
    fn parameters_and_empty_scripts_are_refused() {
        assert!(problem("SELECT\n$1").1.contains("relation message"));
        assert_eq!(problem("SELECT\n$1").0, 2);
        assert!(problem(" -- nothing\n ; ").1.contains("no statement"));
        assert!(split("SELECT 'open", "inline").is_err());
    }

    #[test]
    fn a_body_is_json_only_if_jsonb_can_hold_it() {
        for body in [
            "{}",
            "null",
            " [1, -2.5e3, \"ü\", true]",
            "{\"a\":{\"a\":[]}}",
            "\"\\u00e9\"",
        ] {
            assert!(is_storable_json(body.as_bytes()), "{body}");
        }
        for body in [
            "",
            "{",
            "nul",
            "{\"a\":1}x",
            "\"\\u0000\"",
            "{\"\\u0000\":1}",
            "\"\\ud800\"",
            "1e999",
        ] {
            assert!(!is_storable_json(body.as_bytes()), "{body}");
        }
        assert!(!is_storable_json(b"\"\xff\""));
        assert!(!is_storable_json("[".repeat(10_000).as_bytes()));
    }

    proptest! {
        #[test]
        fn splitting_never_panics(script in "[ ;a-zA-Z0-9$'\"\\-/*\nüE()]{0,80}") {
            split(&script, "inline").ok();
        }

        #[test]
        fn bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            is_storable_json(&body);
        }
    }
}
