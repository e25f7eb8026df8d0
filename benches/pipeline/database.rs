//! A session on one database.

use anyhow::{Context, Result};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};
use tokio::runtime::{Builder, Runtime};

pub struct Database {
    runtime: Runtime,
    session: PgConnection,
}

impl Database {
    pub fn connect(url: &str) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let session = runtime
            .block_on(PgConnection::connect(url))
            .context("failed to connect to PostgreSQL")?;
        Ok(Self { runtime, session })
    }

    /// Runs statements without a result.
    pub fn execute(&mut self, sql: &str) -> Result<()> {
        self.runtime
            .block_on(sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut self.session))
            .with_context(|| format!("failed to run {sql:?}"))?;
        Ok(())
    }

    /// The one number of a query.
    pub fn number(&mut self, sql: &str) -> Result<i64> {
        Ok(self.row(sql)?.try_get(0)?)
    }

    /// The one text of a query.
    pub fn text(&mut self, sql: &str) -> Result<String> {
        Ok(self.row(sql)?.try_get(0)?)
    }

    fn row(&mut self, sql: &str) -> Result<PgRow> {
        self.runtime
            .block_on(sqlx::raw_sql(AssertSqlSafe(sql)).fetch_one(&mut self.session))
            .with_context(|| format!("failed to run {sql:?}"))
    }
}
