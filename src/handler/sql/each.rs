//! The statements for one message after the other: a PL/pgSQL function with a
//! loop over the bound arrays. It keeps the plans of its statements, and a
//! batch costs one round trip whatever it holds.
//!
//! The function lives in the session's temporary schema: nobody else sees it,
//! it goes with the session, and the role needs no right but `TEMPORARY` on the
//! database. One row of `pg_proc` a session is what it costs the catalogue.
//!
//! An error ends the loop, rolls back what the batch did, and comes back with
//! the place of its message. `query_canceled` is caught by name:
//! `statement_timeout` covers the whole call, and which message it struck is
//! worth knowing.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Row};

use super::script::{Kind, Statement};
use super::{ARRAYS, Arrays, COLUMNS, select_list};
use crate::handler::Fault;
use crate::postgres::{Error, Refusal, Session};

/// The function's name, by which its own lines of an error's context are known.
const NAME: &str = "ackonce_handler";

/// What it returns: nothing but nulls when every message was applied.
const RESULT: &str = "ackonce_at int4, OUT ackonce_took float8, OUT ackonce_code text, \
     OUT ackonce_text text, OUT ackonce_table text, OUT ackonce_column text, \
     OUT ackonce_constraint text, OUT ackonce_context text";

/// The function of one script.
#[derive(Debug)]
pub(super) struct Function {
    definition: String,
    call: String,
    /// Where each statement begins: line of the function, line of the script.
    lines: Vec<(u64, u64)>,
}

impl Function {
    /// Of `statements`.
    pub(super) fn new(statements: &[Statement]) -> Self {
        let (body, lines) = body(statements);
        let parameters =
            "text[], bytea[], bool[], text[], text[], text[], float8[], bool[], int4[]";
        Self {
            definition: format!(
                "CREATE OR REPLACE FUNCTION pg_temp.{NAME}({parameters}, OUT {RESULT}) \
                 LANGUAGE plpgsql AS {}",
                dollar_quoted(&body)
            ),
            call: format!("SELECT * FROM pg_temp.{NAME}($1, $2, $3, $4, $5, $6, $7, $8, $9)"),
            lines,
        }
    }

    /// Makes it known to a session, outside of any transaction.
    ///
    /// # Errors
    ///
    /// What the server says, with the way out where it denies it.
    pub(super) fn create(&self, session: &mut Session) -> Result<(), Error> {
        let text = self.definition.as_str();
        let created = session
            .run(async |connection| sqlx::raw_sql(AssertSqlSafe(text)).execute(connection).await);
        created.map(drop).map_err(|error| match error {
            Error::Refused(mut failure) => {
                let hint = match failure.code.as_deref() {
                    Some("42501") => {
                        "; GRANT TEMPORARY ON DATABASE … TO the daemon's role, or set \
                         batch = \"set\" in [consumer.handler]"
                    }
                    _ => "",
                };
                let text = std::mem::take(&mut failure.text);
                failure.text = format!("failed to create the handler's function: {text}{hint}");
                Error::Refused(failure)
            }
            error => error,
        })
    }

    /// Runs the statements for each message of the batch.
    pub(super) fn apply(&self, session: &mut Session, batch: &Arrays<'_>) -> Result<(), Fault> {
        let struck = session.run(async |connection| {
            let query = batch.bind(sqlx::query(AssertSqlSafe(self.call.as_str())));
            let row = query.fetch_one(connection).await?;
            let Some(code) = row.try_get::<Option<String>, _>(2)? else {
                return Ok(None);
            };
            let (at, took) = (row.try_get::<i32, _>(0)?, row.try_get::<f64, _>(1)?);
            let refusal = Refusal {
                code,
                message: row.try_get(3)?,
                table: row.try_get(4)?,
                column: row.try_get(5)?,
                constraint: row.try_get(6)?,
            };
            Ok(Some((at, took, refusal, row.try_get::<String, _>(7)?)))
        })?;
        let Some((at, took, refusal, context)) = struck else {
            return Ok(());
        };
        let mut failure = refusal.into_failure();
        if let Some(line) = self.line_of(&context) {
            failure.text.push_str(&format!(", handler line {line}"));
        }
        Err(Fault {
            at: usize::try_from(at).ok(),
            took: Duration::try_from_secs_f64(took).ok(),
            error: Error::Refused(failure),
        })
    }

    /// The script's line of an error, by its context: the outermost line there
    /// is this function's own.
    fn line_of(&self, context: &str) -> Option<u64> {
        let own = context.lines().rfind(|line| line.contains(NAME))?;
        let (_, rest) = own.rsplit_once(") line ")?;
        let number: u64 = rest.split(' ').next()?.parse().ok()?;
        let begun = self.lines.iter().rfind(|(start, _)| *start <= number)?;
        Some(begun.1)
    }
}

/// The function's body, and where in it each statement begins.
fn body(statements: &[Statement]) -> (String, Vec<(u64, u64)>) {
    let columns = COLUMNS.map(|(name, _)| format!("ackonce_message.{name} AS {name}"));
    let relation = format!("message AS (SELECT {})", columns.join(", "));
    let mut body = format!(
        "\n#variable_conflict use_column\nDECLARE\nackonce_message record;\nackonce_row record;\n\
         ackonce_since timestamptz;\nBEGIN\nackonce_at := -1;\n\
         FOR ackonce_message IN SELECT {} FROM {ARRAYS} LOOP\n\
         ackonce_at := ackonce_at + 1;\nackonce_since := pg_catalog.clock_timestamp();\n",
        select_list()
    );
    let mut lines = Vec::with_capacity(statements.len());
    for statement in statements {
        let line = body.bytes().filter(|byte| *byte == b'\n').count() as u64 + 1;
        lines.push((line, statement.line));
        let text = statement.text(&relation);
        body.push_str(&match statement.kind {
            Kind::Utility => format!("EXECUTE {};\n", dollar_quoted(&text)),
            Kind::Query => format!("FOR ackonce_row IN {text} LOOP NULL; END LOOP;\n"),
            Kind::Write => format!("{text};\n"),
        });
    }
    body.push_str(
        "END LOOP;\n\
         EXCEPTION WHEN OTHERS OR query_canceled OR assert_failure THEN\n\
         GET STACKED DIAGNOSTICS ackonce_code = RETURNED_SQLSTATE, ackonce_text = MESSAGE_TEXT, \
         ackonce_table = TABLE_NAME, ackonce_column = COLUMN_NAME, \
         ackonce_constraint = CONSTRAINT_NAME, ackonce_context = PG_EXCEPTION_CONTEXT;\n\
         ackonce_took := extract(epoch FROM pg_catalog.clock_timestamp() - ackonce_since);\nEND\n",
    );
    (body, lines)
}

/// A text in dollar quotes that it does not contain.
fn dollar_quoted(text: &str) -> String {
    let tags = (0..).map(|n| format!("$ackonce{n}$"));
    let mut free = tags.skip_while(|tag| text.contains(tag.as_str()));
    let tag = free.next().unwrap_or_default();
    format!("{tag}{text}{tag}")
}

#[cfg(test)]
mod tests {
    use super::super::script::split;
    use super::*;

    #[test]
    fn a_text_is_quoted_by_what_it_does_not_contain() {
        assert_eq!(dollar_quoted("x"), "$ackonce0$x$ackonce0$");
        assert_eq!(
            dollar_quoted("$ackonce0$"),
            "$ackonce1$$ackonce0$$ackonce1$"
        );
    }

    #[test]
    fn a_line_of_the_function_is_found_in_the_script() {
        let statements = split("SELECT 1;\n\nINSERT INTO t\nVALUES (1);\nDO $$ $$", "x").unwrap();
        let function = Function::new(&statements);
        let starts: Vec<u64> = function.lines.iter().map(|(start, _)| *start).collect();
        let lines: Vec<u64> = function.lines.iter().map(|(_, line)| *line).collect();
        assert_eq!(lines, [1, 3, 5]);
        let context = |line: u64| {
            format!(
                "SQL statement \"x\"\nPL/pgSQL function other(text) line 1 at RAISE\n\
                 PL/pgSQL function pg_temp_3.{NAME}(text[]) line {line} at SQL statement"
            )
        };
        assert_eq!(function.line_of(&context(starts[0])), Some(1));
        assert_eq!(function.line_of(&context(starts[1] + 1)), Some(3));
        assert_eq!(function.line_of(&context(starts[2])), Some(5));
        assert_eq!(function.line_of("nothing of ours"), None);
    }
}
