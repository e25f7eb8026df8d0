//! What the work itself costs: the same claims, ledger rows and effects as the
//! daemon's, in batches of what waits, by one thread, with no safety whatever.
//! A failure ends it, a message without an id too.

use amiquip::{ConsumerOptions, Delivery};
use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use sqlx::{Connection as _, PgConnection};
use tokio::runtime::Builder;

use super::{Arguments, Stop};
use crate::amqp;
use crate::stage::CONSUMER;

/// Messages in one transaction at most: the daemon's default.
const BATCH_MAX: usize = 256;

/// How long a claim is held, and how long Redis remembers what is done, in
/// milliseconds: the daemon's defaults.
const LEASE_MS: u32 = 5_000;
const DONE_MS: u32 = 86_400_000;

const RECORD: &str = "INSERT INTO ackonce.ledger (consumer_id, message_id, fingerprint) \
     SELECT $1, m.id, m.print FROM unnest($2::text[], $3::bytea[]) AS m (id, print) \
     ON CONFLICT DO NOTHING RETURNING message_id";
const APPLY: &str = "INSERT INTO effect (message_id, body) \
     SELECT m.id, m.body::jsonb FROM unnest($1::text[], $2::text[]) AS m (id, body)";

pub(super) fn run(arguments: &Arguments, stop: &Stop) -> Result<()> {
    let mut connection = amqp::connect(&arguments.amqp)?;
    let channel = connection.open_channel(None)?;
    channel.qos(0, arguments.prefetch, false)?;
    let consumer = channel.basic_consume(arguments.queue.as_str(), ConsumerOptions::default())?;
    let mut worker = Worker::new(arguments)?;
    while let Some(first) = super::next(consumer.receiver(), stop)? {
        let mut batch = vec![first];
        for message in consumer.receiver().try_iter().take(BATCH_MAX - 1) {
            batch.push(super::delivery(message)?);
        }
        worker.handle(&batch)?;
        if let Some(last) = batch.pop() {
            last.ack_multiple(&channel)?;
        }
    }
    super::cancel(consumer)?;
    connection.close()?;
    Ok(())
}

struct Worker {
    runtime: tokio::runtime::Runtime,
    session: PgConnection,
    redis: redis::Connection,
    consumer_id: i16,
    key_prefix: String,
}

/// One message of a batch.
struct Entry<'a> {
    id: &'a str,
    body: &'a str,
    fingerprint: Vec<u8>,
}

impl Worker {
    fn new(arguments: &Arguments) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let mut session = runtime.block_on(PgConnection::connect(&arguments.postgres))?;
        let consumer_id = runtime.block_on(
            sqlx::query_scalar("SELECT id FROM ackonce.consumer WHERE name = $1")
                .bind(CONSUMER)
                .fetch_one(&mut session),
        )?;
        Ok(Self {
            runtime,
            session,
            redis: redis::Client::open(arguments.redis.as_str())?.get_connection()?,
            consumer_id,
            key_prefix: arguments.key_prefix.clone(),
        })
    }

    fn handle(&mut self, batch: &[Delivery]) -> Result<()> {
        let mut entries = batch.iter().map(entry).collect::<Result<Vec<_>>>()?;
        let claimed: Vec<bool> = self.set(&entries, "claimed", LEASE_MS, true)?;
        let mut claimed = claimed.into_iter();
        entries.retain(|_| claimed.next() == Some(true));
        entries.sort_unstable_by_key(|entry| entry.id);
        entries.dedup_by_key(|entry| entry.id);
        if entries.is_empty() {
            return Ok(());
        }
        self.record_and_apply(&entries)?;
        let _: Vec<bool> = self.set(&entries, "done", DONE_MS, false)?;
        Ok(())
    }

    /// Sets every key with one pipeline. Says which were set.
    fn set(
        &mut self,
        entries: &[Entry<'_>],
        value: &str,
        milliseconds: u32,
        if_absent: bool,
    ) -> Result<Vec<bool>> {
        let mut pipeline = redis::pipe();
        for entry in entries {
            let command = pipeline
                .cmd("SET")
                .arg(format!("{}:{}", self.key_prefix, entry.id))
                .arg((value, "PX", milliseconds));
            if if_absent {
                command.arg("NX");
            }
        }
        Ok(pipeline.query(&mut self.redis)?)
    }

    fn record_and_apply(&mut self, entries: &[Entry<'_>]) -> Result<()> {
        let ids: Vec<&str> = entries.iter().map(|entry| entry.id).collect();
        let prints: Vec<&[u8]> = entries.iter().map(|e| e.fingerprint.as_slice()).collect();
        let (session, consumer_id) = (&mut self.session, self.consumer_id);
        self.runtime.block_on(async {
            let mut transaction = session.begin().await?;
            let fresh: Vec<String> = sqlx::query_scalar(RECORD)
                .bind(consumer_id)
                .bind(&ids)
                .bind(&prints)
                .fetch_all(&mut *transaction)
                .await?;
            let fresh: std::collections::HashSet<&str> = fresh.iter().map(String::as_str).collect();
            let (ids, bodies): (Vec<&str>, Vec<&str>) = entries
                .iter()
                .filter(|entry| fresh.contains(entry.id))
                .map(|entry| (entry.id, entry.body))
                .unzip();
            sqlx::query(APPLY)
                .bind(&ids)
                .bind(&bodies)
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await?;
            Ok(())
        })
    }
}

fn entry(delivery: &Delivery) -> Result<Entry<'_>> {
    let id = delivery.properties.message_id().as_deref();
    Ok(Entry {
        id: id.context("a message has no id")?,
        body: std::str::from_utf8(&delivery.body)?,
        fingerprint: Sha256::digest(&delivery.body).to_vec(),
    })
}
