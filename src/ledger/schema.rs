//! The schema `ackonce`: its migrations, and the ledger's random id.

use std::collections::HashSet;

use sqlx::migrate::{Migrate, MigrateError, Migrator};

use crate::failure::{Class, Failure};
use crate::postgres::{Error, Session};

/// Table in which the applied migrations are kept.
const MIGRATIONS_TABLE: &str = "ackonce.migration";

fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("./sql");
    migrator.create_schema("ackonce");
    migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
    migrator
}

/// What the schema lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Schema {
    /// Every migration of this program is applied.
    Current,
    /// So many are not.
    Behind(usize),
}

/// Looks whether the schema is the one this program needs, without rights to
/// change it.
///
/// # Errors
///
/// When the server cannot be asked.
pub fn schema(session: &mut Session) -> Result<Schema, Error> {
    session.run(async |connection| {
        let exists: bool = sqlx::query_scalar("SELECT pg_catalog.to_regclass($1) IS NOT NULL")
            .bind(MIGRATIONS_TABLE)
            .fetch_one(&mut *connection)
            .await?;
        let applied: HashSet<i64> = if exists {
            sqlx::query_scalar("SELECT version FROM ackonce.migration WHERE success")
                .fetch_all(&mut *connection)
                .await?
                .into_iter()
                .collect()
        } else {
            HashSet::new()
        };
        let missing = migrator()
            .iter()
            .filter(|m| !applied.contains(&m.version))
            .count();
        Ok(match missing {
            0 => Schema::Current,
            count => Schema::Behind(count),
        })
    })
}

/// Applies the migrations that are missing. Several daemons may do so at the
/// same time: the server's advisory lock lets one do the work.
///
/// # Errors
///
/// When one fails, or an applied one is not what this program has under its number.
pub fn migrate(session: &mut Session) -> Result<(), Error> {
    // The statements name their schema; what they do not is built in.
    session.execute("SET search_path = pg_catalog")?;
    session
        .run(async |connection| {
            Ok(match migrator().run_direct(None, connection, false).await {
                Ok(()) => Ok(()),
                Err(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) => {
                    return Err(error);
                }
                Err(other) => {
                    connection.unlock().await.ok();
                    Err(other.to_string())
                }
            })
        })?
        .map_err(|text| {
            Error::Refused(Failure {
                class: Class::Systemic,
                code: None,
                text: format!("failed to migrate the schema ackonce: {text}"),
                retry_after: None,
            })
        })
}

/// Gives the ledger a new random id under its daemons, which notice within
/// [`super::MARKS_FRESH`]: a mark in Redis that was made before counts no more.
///
/// # Errors
///
/// When the server refuses or cannot be asked.
pub fn forget_marks(session: &mut Session) -> Result<(), Error> {
    session.run(async |connection| {
        let renew = "UPDATE ackonce.instance SET ledger_id = pg_catalog.gen_random_uuid()";
        sqlx::query(renew).execute(connection).await.map(drop)
    })
}

/// Gives the ledger a new random id, and with it every claim a new key. `None`
/// while others of ours are connected: a daemon that runs goes on with the id
/// that it knows.
///
/// # Errors
///
/// When the server refuses or cannot be asked.
pub fn renew_id(session: &mut Session) -> Result<Option<String>, Error> {
    session.run(async |connection| {
        sqlx::query_scalar(
            "UPDATE ackonce.instance SET ledger_id = pg_catalog.gen_random_uuid(), created_at = pg_catalog.now() \
             WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_stat_activity \
             WHERE datname = pg_catalog.current_database() AND pid <> pg_catalog.pg_backend_pid() \
             AND application_name LIKE 'ackonce %') RETURNING ledger_id::pg_catalog.text",
        )
        .fetch_optional(connection)
        .await
    })
}
