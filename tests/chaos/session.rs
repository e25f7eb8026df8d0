//! Asking PostgreSQL while it may be away.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};

/// Longest wait for an answer.
const WITHIN: Duration = Duration::from_secs(3);

/// The first column of a query as text, over a session of its own; `None` when
/// the server does not answer.
pub fn try_rows(url: &str, query: &str) -> Option<Vec<String>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    let rows = runtime.block_on(async {
        tokio::time::timeout(WITHIN, async {
            let mut session = PgConnection::connect(url).await.ok()?;
            let query = sqlx::raw_sql(AssertSqlSafe(query.to_owned()));
            query.fetch_all(&mut session).await.ok()
        })
        .await
        .ok()?
    });
    runtime.shutdown_background();
    Some(rows?.iter().map(|row| row.get(0)).collect())
}
