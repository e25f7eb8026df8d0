//! One run's own things on the servers: vhost, database, links, daemons.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::{Config, Consumer, Database, Management};
use crate::fleet::Fleet;
use crate::link::Link;
use crate::plan::Plan;
use crate::servers::{Server, Servers};

/// The consumer, and its queue.
pub const QUEUE: &str = "work";
/// Where its dead letters go.
pub const DEAD: &str = "work.dead";
/// Its retry queues.
pub const RETRIES: [&str; 2] = ["work.retry.100ms", "work.retry.300ms"];

/// Writes an effect. A poisoned amount is an error of class 22, permanent; an
/// attempt that comes too early violates the table's check, transient.
const HANDLER: &str = "insert into effect (message_id, amount, fails, attempt) \
     select message_id, (body->>'amount')::int, (body->>'fails')::int, attempt from message";

/// How long a server that is back may take until a daemon is seen to work.
const RECOVERY_WITHIN: Duration = Duration::from_secs(20);

/// A fault, and how often it was tried and seen to happen.
pub type Tally = BTreeMap<&'static str, (u64, u64)>;

/// How long the fastest and the slowest daemon took after a server was back.
#[derive(Debug, Clone, Copy)]
pub struct Recovery {
    pub server: Server,
    pub first: Duration,
    pub last: Duration,
}

/// Everything that one run has.
pub struct Stage<'a> {
    pub servers: &'a Servers,
    pub plan: Plan,
    /// Of each daemon, by [`Server::ALL`].
    pub links: Vec<[Link; 3]>,
    /// The publisher's.
    pub publisher_link: Link,
    pub fleet: Fleet,
    pub tally: Mutex<Tally>,
    pub recoveries: Mutex<Vec<Recovery>>,
    /// The faults on the wires rest while a recovery is measured.
    pub quiet: AtomicBool,
    /// The nemesis ends.
    pub over: AtomicBool,
    pub begun: Instant,
    pub broker_version: String,
    name: String,
    folder: PathBuf,
    _temporary: TempDir,
}

impl<'a> Stage<'a> {
    /// Makes vhost and database, starts the daemons, and waits until the first
    /// of them consumes.
    pub fn set(servers: &'a Servers, plan: Plan, name: &str) -> Self {
        let management = Management::new(&servers.management_url());
        management.create_vhost(name);
        let overview = management.get("/api/overview");
        let version = overview["rabbitmq_version"].as_str().unwrap_or("unknown");
        let direct = |server| Servers::url(server, servers.address(server), name);
        let admin = Servers::url(
            Server::Postgres,
            servers.address(Server::Postgres),
            "ackonce",
        );
        Database::connect(&admin).execute(&format!("create database {name} template template0"));
        Database::connect(&direct(Server::Postgres)).execute(
            "create table effect (message_id text, amount int, fails int, attempt int, \
             constraint too_early check (attempt > fails))",
        );
        let temporary = TempDir::new().expect("a folder");
        let folder = match &plan.logs {
            Some(folder) => folder.join(name),
            None => temporary.path().to_owned(),
        };
        std::fs::create_dir_all(&folder).expect("a folder for configurations and logs");
        let to_each = || Server::ALL.map(|server| Link::to(servers.address(server)));
        let links: Vec<[Link; 3]> = (0..plan.daemons).map(|_| to_each()).collect();
        let mut configs = Vec::new();
        for (number, links) in links.iter().enumerate() {
            let at = |server: Server| Servers::url(server, links[server as usize].address(), name);
            let path = folder.join(format!("daemon-{number}.toml"));
            std::fs::write(&path, config(&at).text()).expect("a configuration");
            configs.push(path);
        }
        let path = folder.join("direct.toml");
        std::fs::write(&path, config(&direct).text()).expect("a configuration");
        let stage = Self {
            servers,
            fleet: Fleet::start(configs, plan.mutant.clone()),
            publisher_link: Link::to(servers.address(Server::RabbitMq)),
            links,
            plan,
            tally: Mutex::default(),
            recoveries: Mutex::default(),
            quiet: AtomicBool::default(),
            over: AtomicBool::default(),
            begun: Instant::now(),
            broker_version: version.to_owned(),
            name: name.to_owned(),
            folder,
            _temporary: temporary,
        };
        crate::common::eventually("a daemon consumes", || {
            (0..stage.fleet.len())
                .all(|daemon| stage.fleet.log_since(daemon, 0).contains("consuming"))
        });
        if let Some(disk) = servers.disk() {
            let db = Database::connect(&stage.url(Server::Postgres));
            crate::disk::move_ledger(disk, &db);
        }
        stage
    }

    /// Name of the vhost and of the database.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// URL of a server, past the links.
    pub fn url(&self, server: Server) -> String {
        Servers::url(server, self.servers.address(server), &self.name)
    }

    /// URL of the broker for the publisher.
    pub fn publisher_url(&self) -> String {
        Servers::url(Server::RabbitMq, self.publisher_link.address(), &self.name)
    }

    /// A configuration that leads past the links.
    pub fn direct_config(&self) -> PathBuf {
        self.folder.join("direct.toml")
    }

    /// Notes that a fault was tried, and how often it was seen to happen.
    pub fn note(&self, fault: &'static str, happened: u64) {
        let mut tally = self.tally.lock().expect("the tally");
        let (tried, seen) = tally.entry(fault).or_default();
        *tried += 1;
        *seen += happened;
    }

    /// Faults seen so far.
    pub fn seen(&self) -> u64 {
        let tally = self.tally.lock().expect("the tally");
        tally.values().map(|(_, seen)| seen).sum()
    }

    /// Prints a line of progress.
    pub fn say(&self, line: &str) {
        println!("{:>7.1} s  {line}", self.begun.elapsed().as_secs_f32());
    }

    pub fn link(&self, daemon: usize, server: Server) -> &Link {
        &self.links[daemon][server as usize]
    }

    /// How often a daemon was seen to get on with the help of this server.
    fn progress(&self, daemon: usize, server: Server) -> u64 {
        use std::sync::atomic::Ordering::SeqCst;
        let counters = self.link(daemon, server).counters();
        match server {
            Server::RabbitMq => counters.acks.load(SeqCst),
            Server::Redis => counters.replies.load(SeqCst),
            Server::Postgres => counters.commits.load(SeqCst),
        }
    }

    /// Measures how long after `back` the daemons get on again: the first ack,
    /// the first commit, the first answer of Redis.
    pub fn measure_recovery(&self, server: Server, back: Instant) {
        let all = 0..self.fleet.len();
        let before: Vec<u64> = all
            .clone()
            .map(|daemon| self.progress(daemon, server))
            .collect();
        let mut took: Vec<Option<Duration>> = vec![None; before.len()];
        crate::servers::wait_until(RECOVERY_WITHIN, || {
            for daemon in all.clone() {
                if took[daemon].is_none() && self.progress(daemon, server) > before[daemon] {
                    took[daemon] = Some(back.elapsed());
                }
            }
            took.iter().all(Option::is_some) || crate::interrupted()
        });
        let took: Vec<Duration> = took.iter().map(|t| t.unwrap_or(RECOVERY_WITHIN)).collect();
        let first = took.iter().min().copied().unwrap_or_default();
        let last = took.iter().max().copied().unwrap_or_default();
        self.recoveries
            .lock()
            .expect("the recoveries")
            .push(Recovery {
                server,
                first,
                last,
            });
        self.say(&format!(
            "{} is back: first progress after {first:.2?}, all daemons after {last:.2?}",
            server.name()
        ));
    }
}

/// Short leases and timeouts, so that two minutes hold many of them; the waits
/// between tries of a lost server are the defaults.
fn config(at: &dyn Fn(Server) -> String) -> Config {
    let consumer = Consumer::new(QUEUE)
        .sql(HANDLER)
        .backoff(&["100ms", "300ms"])
        .max_attempts(6)
        .set("workers", 2)
        .set("prefetch", 256)
        .set("batch_max", 64)
        .set("claim.lease", "2s")
        .set("claim.recheck_every", "100ms");
    Config::new()
        .set("broker.url", at(Server::RabbitMq))
        .set("broker.heartbeat", "5s")
        .set("broker.connect_timeout", "3s")
        .set("redis.url", at(Server::Redis))
        .set("postgres.url", at(Server::Postgres))
        .set("postgres.connect_timeout", "3s")
        .set("postgres.statement_timeout", "3s")
        .set("postgres.lock_timeout", "1s")
        .set("postgres.idle_in_transaction_timeout", "3s")
        .set("postgres.auto_migrate", true)
        .consumer(consumer)
}
