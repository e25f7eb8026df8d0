//! The usual way: for each message a claim in Redis, a transaction and an ack.
//!
//! As well as that design allows: every thread has its own channel, its own
//! Redis connection and its own session with prepared statements, so that no
//! thread waits for another one, and PostgreSQL can flush the commits of
//! several with one write.

use std::thread::{self, ScopedJoinHandle};

use amiquip::{Channel, ConsumerOptions, Delivery};
use anyhow::{Context, Result, anyhow, ensure};
use sha2::{Digest, Sha256};
use sqlx::{Connection as _, PgConnection};
use tokio::runtime::{Builder, Runtime};

use super::{Arguments, Stop};
use crate::amqp;
use crate::stage::CONSUMER;
use crate::subject::REFERENCE_THREADS;

/// How long a claim is held, and how long Redis remembers what is done, in
/// milliseconds: the daemon's defaults.
const LEASE_MS: u32 = 5_000;
const DONE_MS: u32 = 86_400_000;

const RECORD: &str = "INSERT INTO ackonce.ledger (consumer_id, message_id, fingerprint) \
     VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
const APPLY: &str = "INSERT INTO effect (message_id, body) VALUES ($1, $2::text::jsonb)";
const RECORD_AND_APPLY: &str = "WITH fresh AS (INSERT INTO ackonce.ledger \
     (consumer_id, message_id, fingerprint) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING \
     RETURNING message_id) INSERT INTO effect (message_id, body) \
     SELECT message_id, $4::text::jsonb FROM fresh";

pub(super) fn run(arguments: &Arguments, stop: &Stop, fused: bool) -> Result<()> {
    let mut connection = amqp::connect(&arguments.amqp)?;
    let channels = (0..REFERENCE_THREADS)
        .map(|_| connection.open_channel(None))
        .collect::<amiquip::Result<Vec<Channel>>>()?;
    let channels = thread::scope(|scope| {
        let threads: Vec<_> = channels
            .into_iter()
            .map(|channel| {
                scope.spawn(move || Worker::new(arguments, fused)?.run(channel, arguments, stop))
            })
            .collect();
        let join = |thread: ScopedJoinHandle<'_, Result<Channel>>| {
            let panicked = |_| anyhow!("a thread of the reference panicked");
            thread.join().map_err(panicked)?
        };
        threads.into_iter().map(join).collect::<Result<Vec<_>>>()
    })?;
    connection.close()?;
    drop(channels);
    Ok(())
}

struct Worker {
    runtime: Runtime,
    session: PgConnection,
    redis: redis::Connection,
    consumer_id: i16,
    key_prefix: String,
    fused: bool,
}

impl Worker {
    fn new(arguments: &Arguments, fused: bool) -> Result<Self> {
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
            fused,
        })
    }

    /// Gives the channel back: it is dropped behind the connection.
    fn run(mut self, channel: Channel, arguments: &Arguments, stop: &Stop) -> Result<Channel> {
        channel.qos(0, arguments.prefetch / REFERENCE_THREADS, false)?;
        let consumer =
            channel.basic_consume(arguments.queue.as_str(), ConsumerOptions::default())?;
        while let Some(delivery) = super::next(consumer.receiver(), stop)? {
            self.handle(&delivery)?;
            delivery.ack(&channel)?;
        }
        super::cancel(consumer)?;
        Ok(channel)
    }

    fn handle(&mut self, delivery: &Delivery) -> Result<()> {
        let id = delivery.properties.message_id().as_deref();
        let id = id.context("a message has no id")?;
        let key = format!("{}:{id}", self.key_prefix);
        let held: Option<String> = redis::cmd("SET")
            .arg(&key)
            .arg("claimed")
            .arg(("NX", "GET", "PX", LEASE_MS))
            .query(&mut self.redis)?;
        if held.as_deref() == Some("done") {
            return Ok(());
        }
        // Claimed by another thread: its transaction decides, on the unique key.
        let fingerprint = Sha256::digest(&delivery.body);
        let body = std::str::from_utf8(&delivery.body)?;
        if self.fused {
            self.record_and_apply(id, &fingerprint, body)?;
        } else {
            self.transaction(id, &fingerprint, body)?;
        }
        let () = redis::cmd("SET")
            .arg(&key)
            .arg(("done", "PX", DONE_MS))
            .query(&mut self.redis)?;
        Ok(())
    }

    fn transaction(&mut self, id: &str, fingerprint: &[u8], body: &str) -> Result<()> {
        let (session, consumer_id) = (&mut self.session, self.consumer_id);
        self.runtime.block_on(async {
            let mut transaction = session.begin().await?;
            let recorded = sqlx::query(RECORD)
                .bind(consumer_id)
                .bind(id)
                .bind(fingerprint)
                .execute(&mut *transaction)
                .await?;
            if recorded.rows_affected() == 1 {
                let applied = sqlx::query(APPLY)
                    .bind(id)
                    .bind(body)
                    .execute(&mut *transaction)
                    .await?;
                ensure!(applied.rows_affected() == 1, "the effect of {id} is lost");
            }
            transaction.commit().await?;
            Ok(())
        })
    }

    fn record_and_apply(&mut self, id: &str, fingerprint: &[u8], body: &str) -> Result<()> {
        let query = sqlx::query(RECORD_AND_APPLY)
            .bind(self.consumer_id)
            .bind(id)
            .bind(fingerprint)
            .bind(body);
        self.runtime.block_on(query.execute(&mut self.session))?;
        Ok(())
    }
}
