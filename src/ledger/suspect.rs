//! Crash marks. A message that comes back unsettled is marked before it runs
//! and unmarked when it has: a mark that stands with another owner is a run
//! that ended with its process. Owner 0 is nobody: the message waits, and what
//! it counted before is kept.

use std::collections::{BTreeSet, HashMap};

use sqlx::{PgConnection, Row};

pub(super) async fn find(
    connection: &mut PgConnection,
    consumer_id: i16,
    owner: i64,
    ids: &[&str],
) -> Result<HashMap<String, u32>, sqlx::Error> {
    let rows = sqlx::query(
        "SELECT message_id, deaths + (owner NOT IN ($2, 0))::pg_catalog.int4 FROM ackonce.suspect \
         WHERE consumer_id = $1 AND message_id = ANY ($3)",
    )
    .bind(consumer_id)
    .bind(owner)
    .bind(ids)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let deaths: i32 = row.try_get(1)?;
            Ok((row.try_get(0)?, u32::try_from(deaths).unwrap_or(0)))
        })
        .collect()
}

pub(super) async fn mark(
    connection: &mut PgConnection,
    consumer_id: i16,
    owner: i64,
    ids: &[&str],
) -> Result<(), sqlx::Error> {
    // Sorted, as everywhere: two workers that mark the same ids lock them in
    // the same order. Once each: a statement cannot update a row twice.
    let sorted: Vec<&str> = BTreeSet::from_iter(ids.iter().copied())
        .into_iter()
        .collect();
    sqlx::query(
        "INSERT INTO ackonce.suspect AS known (consumer_id, message_id, deaths, owner) \
         SELECT $1, batch.message_id, 0, $2 FROM pg_catalog.unnest($3::pg_catalog.text[]) AS batch (message_id) \
         ON CONFLICT (consumer_id, message_id) DO UPDATE SET marked_at = pg_catalog.now(), \
         owner = excluded.owner, \
         deaths = known.deaths + (known.owner NOT IN (excluded.owner, 0))::pg_catalog.int4",
    )
    .bind(consumer_id)
    .bind(owner)
    .bind(sorted)
    .execute(connection)
    .await?;
    Ok(())
}

pub(super) async fn rest(
    connection: &mut PgConnection,
    consumer_id: i16,
    owner: i64,
    ids: &[&str],
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH ours AS MATERIALIZED (SELECT message_id, deaths FROM ackonce.suspect \
         WHERE consumer_id = $1 AND owner = $2 AND message_id = ANY ($3) \
         ORDER BY message_id FOR UPDATE), \
         gone AS (DELETE FROM ackonce.suspect WHERE consumer_id = $1 \
         AND message_id IN (SELECT message_id FROM ours WHERE deaths = 0)) \
         UPDATE ackonce.suspect SET owner = 0 WHERE consumer_id = $1 \
         AND message_id IN (SELECT message_id FROM ours WHERE deaths > 0)",
    )
    .bind(consumer_id)
    .bind(owner)
    .bind(ids)
    .execute(connection)
    .await?;
    Ok(())
}

pub(super) async fn unmark(
    connection: &mut PgConnection,
    consumer_id: i16,
    ids: &[&str],
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH marked AS MATERIALIZED (SELECT message_id FROM ackonce.suspect \
         WHERE consumer_id = $1 AND message_id = ANY ($2) ORDER BY message_id FOR UPDATE) \
         DELETE FROM ackonce.suspect WHERE consumer_id = $1 \
         AND message_id IN (SELECT message_id FROM marked)",
    )
    .bind(consumer_id)
    .bind(ids)
    .execute(connection)
    .await?;
    Ok(())
}
