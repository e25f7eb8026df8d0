//! A world of its own for one test: vhost, database, key prefix, folder.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tempfile::TempDir;
use url::Url;

use super::{
    Admin, Broker, Config, Consumer, DEADLINE, Daemon, Database, Gate, Management, PrivateBroker,
    Redis,
};

/// Everything one test has to itself. Dropping it removes it all.
pub struct World {
    name: String,
    folder: TempDir,
    amqp_url: String,
    redis_url: String,
    postgres_url: String,
    admin: Database,
    /// The management API.
    pub management: Management,
    /// The vhost, over AMQP.
    pub broker: Broker,
    /// The database, with an empty table `effect`.
    pub db: Database,
    /// The keys under the prefix.
    pub redis: Redis,
}

impl World {
    /// Makes one on the servers that the environment names.
    pub fn new() -> Self {
        Self::with_postgres(&server("ACKONCE_POSTGRES_URL"))
    }

    /// As [`Self::new`], with its database on another server: for faults that
    /// are the whole server's.
    pub fn with_postgres(admin_url: &str) -> Self {
        Self::with(
            &server("ACKONCE_AMQP_URL"),
            &server("ACKONCE_MANAGEMENT_URL"),
            admin_url,
        )
    }

    /// Makes one with a vhost on the first node of a broker of its own.
    pub fn on(broker: &PrivateBroker) -> Self {
        let admin_url = server("ACKONCE_POSTGRES_URL");
        Self::with(&broker.amqp_url(0), &broker.management_url(0), &admin_url)
    }

    fn with(amqp_url: &str, management_url: &str, admin_url: &str) -> Self {
        let name = format!("ackonce_test_{:016x}", random());
        let management = Management::new(management_url);
        management.create_vhost(&name);
        let amqp_url = with_path(amqp_url, &name);
        let admin = Database::connect(admin_url);
        admin.execute(&format!("create database {name} template template0"));
        let postgres_url = with_path(admin_url, &name);
        let db = Database::connect(&postgres_url);
        db.execute("create table effect (message_id text, body jsonb, amount int, note text)");
        let redis_url = server("ACKONCE_REDIS_URL");
        Self {
            broker: Broker::connect(&amqp_url),
            redis: Redis::connect(&redis_url, &name),
            folder: TempDir::new().expect("a folder"),
            name,
            amqp_url,
            redis_url,
            postgres_url,
            admin,
            management,
            db,
        }
    }

    /// Name of its vhost, its database and its key prefix.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// URL of the vhost.
    pub fn amqp_url(&self) -> &str {
        &self.amqp_url
    }

    /// URL of the vhost on another node.
    pub fn amqp_url_on(&self, broker: &PrivateBroker, node: usize) -> String {
        with_path(&broker.amqp_url(node), &self.name)
    }

    /// Sees the vhost through a new connection.
    pub fn look_again(&mut self) {
        self.broker = Broker::connect(&self.amqp_url);
    }

    /// Sees the vhost through another node from here on.
    pub fn look_through(&mut self, broker: &PrivateBroker, node: usize) {
        self.management = Management::new(&broker.management_url(node));
        self.broker = Broker::connect(&self.amqp_url_on(broker, node));
    }

    /// URL of Redis.
    pub fn redis_url(&self) -> &str {
        &self.redis_url
    }

    /// URL of the database.
    pub fn postgres_url(&self) -> &str {
        &self.postgres_url
    }

    /// A file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file into the folder.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).expect("a file in the test's folder");
        path
    }

    /// A configuration for this world's servers, with short timeouts and no
    /// consumer yet.
    pub fn config(&self) -> Config {
        Config::new()
            .set("broker.url", self.amqp_url())
            .set("redis.url", self.redis_url())
            .set("redis.key_prefix", self.name())
            .set("postgres.url", self.postgres_url())
            .set("postgres.statement_timeout", "1s")
            .set("postgres.lock_timeout", "500ms")
            .set("postgres.idle_in_transaction_timeout", "1s")
            .set("postgres.auto_migrate", true)
            .set("daemon.reconnect_min", "20ms")
            .set("daemon.reconnect_max", "200ms")
    }

    /// [`Self::config`] with the consumer of the queue [`super::ORDERS`].
    pub fn orders(&self) -> Config {
        self.config().consumer(Consumer::orders())
    }

    /// Starts the daemon and waits until every consumer consumes.
    pub fn run(&self, config: &Config) -> Daemon {
        let daemon = self.daemon(config).start();
        daemon.wait_until_consuming();
        daemon
    }

    /// As [`Self::run`], with its admin address.
    pub fn watch(&self, config: &Config) -> (Daemon, Admin) {
        let daemon = self.run(config);
        let admin = Admin::of(&daemon);
        (daemon, admin)
    }

    /// A daemon whose queues and schema are there already, at its admin
    /// address: the first worker that comes to `step` waits there until the
    /// gate is open.
    pub fn watch_paused_at(&self, config: &Config, step: &str) -> (Daemon, Admin, Gate) {
        self.prepare(config);
        let gate = self.gate();
        let daemon = self.daemon(config).pauses_at(step, 1, &gate).start();
        let admin = Admin::of(&daemon);
        (daemon, admin, gate)
    }

    /// Closes the vhost's connection that says to be for `purpose`, once the
    /// broker's API knows of it.
    pub fn close_connection(&self, purpose: &str) {
        super::eventually("the broker closes the connection", || {
            let name = self.management.connection_of(&self.name, purpose);
            name.is_some_and(|name| self.management.close_connection(&name))
        });
    }

    /// Runs `ackonce ARGUMENTS --config` with `config`, to its end.
    pub fn ackonce(&self, config: &Config, arguments: &[&str]) -> std::process::Output {
        let path = self.write("config.toml", &config.text());
        let path = path.to_str().expect("a path in UTF-8");
        super::run_ackonce(&[arguments, &["--config", path]].concat())
    }

    /// A daemon to be started.
    pub fn daemon(&self, config: &Config) -> super::daemon::Builder {
        let path = self.write(&format!("config-{:08x}.toml", random()), &config.text());
        super::daemon::Builder::new(path, config.consumer_names())
    }

    /// Makes queues and schema by a run of the daemon that ends at once.
    pub fn prepare(&self, config: &Config) {
        self.run(config).stop();
    }

    /// Runs daemons until `queue` is empty with nobody holding anything back.
    /// A stop gives back what has not started, so it may take several.
    pub fn drain(&self, config: &Config, queue: &str) {
        self.drain_with(self.run(config), config, queue);
    }

    /// As [`Self::drain`], beginning with a daemon that runs already.
    pub fn drain_with(&self, mut daemon: Daemon, config: &Config, queue: &str) {
        let end = std::time::Instant::now() + DEADLINE;
        // A stop gives back what has not begun: with slow handlers that would be
        // nearly all of it each time, so later daemons are given time.
        let mut patience = Duration::ZERO;
        loop {
            super::eventually("the daemon takes what is in the queue", || {
                daemon.assert_running();
                self.broker.ready(queue) == 0
            });
            super::try_eventually(patience, || {
                daemon.assert_running();
                self.unacknowledged(queue) == 0
            });
            daemon.stop();
            if self.broker.is_empty(queue) {
                return;
            }
            assert!(
                std::time::Instant::now() < end,
                "{queue} still holds messages after {DEADLINE:?} of daemons"
            );
            patience = Duration::from_secs(15);
            daemon = self.run(config);
        }
    }

    /// Deliveries of `queue` that are not acknowledged, as the management API has
    /// it: a few seconds old.
    fn unacknowledged(&self, queue: &str) -> u64 {
        let path = format!("/api/queues/{}/{queue}", self.name);
        let queue = self.management.try_get(&path).unwrap_or_default();
        queue["messages_unacknowledged"].as_u64().unwrap_or(0)
    }

    /// Panics unless exactly `ids` took effect, each of them once.
    pub fn assert_each_applied_once<S: AsRef<str>>(&self, ids: &[S]) {
        let effects = self.db.effects();
        let wanted: BTreeSet<&str> = ids.iter().map(AsRef::as_ref).collect();
        let lost: Vec<_> = wanted
            .iter()
            .filter(|id| !effects.contains_key(**id))
            .collect();
        let twice: Vec<_> = effects.iter().filter(|(_, count)| **count > 1).collect();
        let strange: Vec<_> = effects
            .keys()
            .filter(|id| !wanted.contains(id.as_str()))
            .collect();
        assert!(
            lost.is_empty() && twice.is_empty() && strange.is_empty(),
            "lost: {lost:?}\napplied twice: {twice:?}\napplied and never sent: {strange:?}"
        );
    }

    /// Waits until `count` effects stand in the database.
    pub fn wait_for_effects(&self, count: i64) {
        super::eventually(&format!("{count} effects"), || {
            self.db.effect_count() >= count
        });
    }

    /// A gate for a failpoint that pauses.
    pub fn gate(&self) -> Gate {
        Gate::new(self.path(&format!("gate-{:08x}", random())))
    }

    /// The Redis key of one id of a consumer.
    pub fn claim_key(&self, consumer: &str, message_id: &str) -> String {
        let name = self.marks().name().to_owned();
        format!("{}:{name}:{consumer}:{message_id}", self.name)
    }

    /// What this world's daemons sign and name their marks with.
    pub fn marks(&self) -> ackonce::seal::Marks {
        let session = ackonce::postgres::Session::open(&self.postgres(), "test");
        ackonce::ledger::marks(&mut session.expect("PostgreSQL")).expect("the ledger")
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.management.delete_vhost(&self.name);
        // A clean-up that fails must not hide why the test did.
        let admin = std::panic::AssertUnwindSafe(&self.admin);
        let dropped = std::panic::catch_unwind(|| {
            admin.execute(&format!("drop database {} with (force)", self.name));
        });
        if dropped.is_err() {
            eprintln!("failed to remove database {}", self.name);
        }
        self.redis.flush();
    }
}

/// The URL in the environment variable `variable`.
pub fn server(variable: &str) -> String {
    std::env::var(variable)
        .unwrap_or_else(|_| panic!("{variable} is not set: run script/test, which sets it"))
}

/// 64 random bits.
pub fn random() -> u64 {
    let mut bits = [0; 8];
    getrandom::fill(&mut bits).expect("randomness");
    u64::from_ne_bytes(bits)
}

fn with_path(url: &str, name: &str) -> String {
    let mut url = Url::parse(url).expect("a server's URL");
    url.set_path(&utf8_percent_encode(name, NON_ALPHANUMERIC).to_string());
    url.into()
}
