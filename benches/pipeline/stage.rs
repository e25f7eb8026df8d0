//! The stage of every run: the servers, queues that the daemon itself has
//! declared, a database, and a look at them from outside.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use amiquip::{AmqpValue, Channel, Connection};
use anyhow::{Context, Result, bail, ensure};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use redis::Commands;
use tempfile::TempDir;
use url::Url;

use crate::amqp;
use crate::database::Database;
use crate::messages::Random;
use crate::subject::{Kind, Script, Settings, Subject};

/// Name of the consumer in ledger and configuration.
pub const CONSUMER: &str = "bench";

/// How long a condition may take that costs the subject no work.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Makes the effect table. It has no key: an effect applied twice shows.
const EFFECT: &str = "CREATE TABLE effect (message_id text NOT NULL, body jsonb NOT NULL)";

/// The type of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueType {
    Classic,
    Quorum,
}

impl QueueType {
    pub const BOTH: [Self; 2] = [Self::Classic, Self::Quorum];

    pub fn name(self) -> &'static str {
        match self {
            Self::Classic => "classic",
            Self::Quorum => "quorum",
        }
    }
}

/// Where the servers are.
#[derive(Debug, Clone)]
pub struct Servers {
    pub amqp: String,
    pub redis: String,
    pub postgres: String,
}

impl Servers {
    /// Those that `script/services env` names.
    pub fn from_env() -> Result<Self> {
        let url = |name: &str| {
            std::env::var(name).with_context(|| format!("{name} is not set: run script/bench"))
        };
        Ok(Self {
            amqp: url("ACKONCE_AMQP_URL")?,
            redis: url("ACKONCE_REDIS_URL")?,
            postgres: url("ACKONCE_POSTGRES_URL")?,
        })
    }
}

/// A look at a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Messages that wait, without those handed to a consumer.
    pub ready: u32,
    pub consumers: u32,
}

/// Servers, one database with ledger and effect table, and one queue of each
/// type. Everything carries a name of its own, so that a run never meets what
/// others have on the same servers.
pub struct Stage {
    pub servers: Servers,
    name: String,
    folder: TempDir,
    channel: Channel,
    connection: Connection,
    redis: redis::Connection,
    runs: u32,
}

impl Stage {
    pub fn new(servers: Servers) -> Result<Self> {
        let mut connection = amqp::connect(&servers.amqp)?;
        let channel = connection.open_channel(None)?;
        let redis = redis::Client::open(servers.redis.as_str())
            .and_then(|client| client.get_connection())
            .context("failed to connect to Redis")?;
        let name = format!("ackonce_bench_{:016x}", Random::seeded()?.next());
        Ok(Self {
            folder: TempDir::new().context("failed to make a folder")?,
            servers,
            name,
            channel,
            connection,
            redis,
            runs: 0,
        })
    }

    /// A database with an empty ledger and an empty effect table, and both
    /// queues, made by the daemon's own migrations and declarations.
    pub fn database(&mut self, suffix: &str) -> Result<(Database, String)> {
        let name = format!("{}_{suffix}", self.name);
        let mut admin = Database::connect(&self.servers.postgres)?;
        admin.execute(&format!("CREATE DATABASE {name} TEMPLATE template0"))?;
        let url = with_path(&self.servers.postgres, &name)?;
        let mut database = Database::connect(&url)?;
        database.execute(EFFECT)?;
        for queue_type in QueueType::BOTH {
            let settings = self.settings(&url, queue_type);
            self.start(&Kind::Daemon { workers: 1 }, &settings)?
                .stop()?;
            self.await_no_consumer(queue_type)?;
        }
        // The daemon does it when its first message comes.
        database.execute(&format!(
            "INSERT INTO ackonce.consumer (name) VALUES ('{CONSUMER}') ON CONFLICT DO NOTHING"
        ))?;
        Ok((database, url))
    }

    /// The name of the queue of `queue_type`.
    pub fn queue(&self, queue_type: QueueType) -> String {
        format!("{}.{}", self.name, queue_type.name())
    }

    /// What a subject is told for its next run, with claims that no other run
    /// has seen.
    pub fn settings(&mut self, database_url: &str, queue_type: QueueType) -> Settings {
        self.runs += 1;
        Settings {
            amqp: self.servers.amqp.clone(),
            redis: self.servers.redis.clone(),
            postgres: database_url.to_owned(),
            queue: self.queue(queue_type),
            queue_type,
            key_prefix: format!("{}-{}", self.name, self.runs),
            prefetch: crate::subject::PREFETCH,
            script: Script::INSERT,
            extra: Vec::new(),
        }
    }

    /// Starts a subject and waits until it consumes.
    pub fn start(&mut self, kind: &Kind, settings: &Settings) -> Result<Subject> {
        let mut subject = Subject::spawn(kind, settings, self.folder())?;
        let deadline = Instant::now() + PATIENCE;
        while self.look(&settings.queue)?.consumers < kind.consumers() {
            subject.ensure_alive()?;
            ensure!(
                Instant::now() < deadline,
                "{kind} does not consume after {PATIENCE:?}\n{}",
                subject.log()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(subject)
    }

    /// How many messages wait in a queue and how many consumers it has.
    pub fn look(&mut self, queue: &str) -> Result<Look> {
        match self.channel.queue_declare_passive(queue) {
            Ok(declared) => Ok(Look {
                ready: declared.declared_message_count().unwrap_or_default(),
                consumers: declared.declared_consumer_count().unwrap_or_default(),
            }),
            // The subject has not declared it yet; the error took the channel.
            Err(amiquip::Error::ServerClosedChannel { code: 404, .. }) => {
                self.channel = self.connection.open_channel(None)?;
                Ok(Look {
                    ready: 0,
                    consumers: 0,
                })
            }
            Err(error) => Err(error).with_context(|| format!("failed to look at queue {queue}")),
        }
    }

    /// Waits until nobody consumes the queue any more, so that what was not
    /// acked is back in it, and checks that nothing is.
    pub fn await_drained(&mut self, queue_type: QueueType) -> Result<()> {
        self.await_no_consumer(queue_type)?;
        let queue = self.queue(queue_type);
        let left = self.look(&queue)?.ready;
        ensure!(left == 0, "{left} messages were not acked and came back");
        // A count may lag behind what came back; a get does not.
        let got = self.channel.basic_get(queue.as_str(), false)?;
        ensure!(got.is_none(), "a message was not acked and came back");
        Ok(())
    }

    fn await_no_consumer(&mut self, queue_type: QueueType) -> Result<()> {
        let queue = self.queue(queue_type);
        let deadline = Instant::now() + PATIENCE;
        while self.look(&queue)?.consumers > 0 {
            if Instant::now() > deadline {
                bail!("queue {queue} still has a consumer after {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Empties ledger and effect table of `database`, and removes every claim.
    pub fn clean(&mut self, database: &mut Database) -> Result<()> {
        database.execute("TRUNCATE effect, ackonce.ledger")?;
        self.forget_claims()
    }

    /// Removes every key of this stage's runs from Redis.
    pub fn forget_claims(&mut self) -> Result<()> {
        let keys: Vec<String> = self
            .redis
            .scan_match(format!("{}-*", self.name))?
            .collect::<redis::RedisResult<_>>()?;
        for chunk in keys.chunks(10_000) {
            let _: i64 = self.redis.unlink(chunk)?;
        }
        Ok(())
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Versions of the servers, by name.
    pub fn versions(&mut self) -> Result<Vec<(&'static str, String)>> {
        let rabbitmq = match self.connection.server_properties().get("version") {
            Some(AmqpValue::LongString(version)) => version.clone(),
            _ => "unknown".to_owned(),
        };
        let info: redis::InfoDict = redis::cmd("INFO").arg("server").query(&mut self.redis)?;
        let redis = info.get("redis_version").unwrap_or_default();
        let mut admin = Database::connect(&self.servers.postgres)?;
        Ok(vec![
            ("rabbitmq", rabbitmq),
            ("redis", redis),
            ("postgresql", admin.text("SHOW server_version")?),
            ("fsync", admin.text("SHOW fsync")?),
            ("synchronous_commit", admin.text("SHOW synchronous_commit")?),
            ("shared_buffers", admin.text("SHOW shared_buffers")?),
        ])
    }
}

/// The daemon under test, as this profile built it.
pub fn daemon_binary() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_ackonce"))
}

fn with_path(url: &str, path: &str) -> Result<String> {
    let mut url = Url::parse(url).context("failed to read a server's URL")?;
    url.set_path(&utf8_percent_encode(path, NON_ALPHANUMERIC).to_string());
    Ok(url.into())
}
