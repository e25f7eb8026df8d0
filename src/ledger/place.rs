//! Which ledger this is, and at which place: told apart from every copy of it,
//! however that was made.

use sqlx::{AssertSqlSafe, Row};

use crate::postgres::{Error, Session};
use crate::random;
use crate::seal::{Marks, Secret};

/// What a restart, a promoted standby, a recovery to a point in time, a snapshot
/// and a restored dump do not share with where they come from: when the server
/// process was started.
const STARTED: &str = "pg_catalog.pg_postmaster_start_time()";

/// What another cluster never has.
const SYSTEM: &str = "pg_catalog.pg_control_system()";

/// What signs the marks of the ledger that `session` leads to.
///
/// Where the server does not say when it was started, nothing tells it from a
/// copy: then the marks of this session are believed by this session alone.
///
/// # Errors
///
/// When the server refuses or cannot be asked.
pub fn marks(session: &mut Session) -> Result<Marks, Error> {
    let nonce = format!("{:016x}{:016x}", random::draw(), random::draw());
    session.run(async |connection| {
        // Both are everybody's to call, unless that was revoked.
        let row = sqlx::query(
            "SELECT pg_catalog.has_function_privilege($1, 'execute'), \
             pg_catalog.has_function_privilege($2, 'execute')",
        )
        .bind(STARTED)
        .bind(SYSTEM)
        .fetch_one(&mut *connection)
        .await?;
        let asked = |column: usize, call: String| -> Result<String, sqlx::Error> {
            Ok(match row.try_get(column)? {
                true => call,
                false => "NULL::pg_catalog.text".to_owned(),
            })
        };
        let started = asked(
            0,
            format!("pg_catalog.date_part('epoch', {STARTED})::pg_catalog.text"),
        )?;
        let system = asked(
            1,
            format!("(SELECT system_identifier::pg_catalog.text FROM {SYSTEM})"),
        )?;
        let row = sqlx::query(AssertSqlSafe(format!(
            "SELECT secret.key, instance.ledger_id::pg_catalog.text, \
             (SELECT oid::pg_catalog.text FROM pg_catalog.pg_database \
             WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database()), \
             {started}, {system} FROM ackonce.secret, ackonce.instance"
        )))
        .persistent(true)
        .fetch_one(connection)
        .await?;
        let ledger_id: String = row.try_get(1)?;
        let database: String = row.try_get(2)?;
        let started: Option<String> = row.try_get(3)?;
        let system: Option<String> = row.try_get(4)?;
        let place = [
            database,
            started.unwrap_or(nonce),
            system.unwrap_or_default(),
        ];
        let place = place.each_ref().map(String::as_str);
        Ok(Secret::new(row.try_get(0)?).marks(&ledger_id, &place))
    })
}

/// The secret of the ledger.
///
/// # Errors
///
/// When the server refuses or cannot be asked.
pub fn secret(session: &mut Session) -> Result<Secret, Error> {
    session.run(async |connection| {
        let key = sqlx::query_scalar("SELECT key FROM ackonce.secret");
        Ok(Secret::new(key.fetch_one(connection).await?))
    })
}
