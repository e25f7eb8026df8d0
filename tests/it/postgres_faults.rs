//! PostgreSQL goes wrong in every way there is: nothing is acknowledged that
//! is not committed, connections are replaced, and nothing is lost or applied
//! twice. Each test has a server of its own.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{
    Config, Consumer, Daemon, Database, Msg, ORDERS, ORDERS_DEAD, PostgresServer, Proxy, World,
    eventually, numbered, numbered_ids, run_ackonce,
};

/// Takes a moment for each message, so that a fault finds it at work.
const SLOWLY: &str = "insert into effect (message_id) \
    select message_id from (select message_id, pg_sleep(0.001) from message) as m";

fn small_batches() -> Consumer {
    Consumer::orders()
        .set("batch_max", 20)
        .max_attempts(1_000)
        .backoff(&["50ms"])
        .sql(SLOWLY)
}

/// Ends every session that the daemon has.
fn terminate(db: &Database) -> i64 {
    db.count(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity \
         where application_name like 'ackonce%'",
    )
}

/// Sends `count` messages and returns when `some` of them are applied and others
/// are not; sends as many again when it comes too late. The ids of all it sent.
fn catch_in_the_middle(world: &World, prefix: &str, count: usize, some: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for turn in 0..20 {
        let prefix = format!("{prefix}-{turn}");
        let before = world.db.effect_count();
        world.broker.send(ORDERS, numbered(&prefix, count));
        ids.extend(numbered_ids(&prefix, count));
        world.wait_for_effects(before + some as i64);
        if world.db.effect_count() < before + count as i64 {
            return ids;
        }
    }
    panic!("always too late");
}

fn survives_restarts(signal: Signal) {
    const ROUNDS: usize = 3;
    let mut server = PostgresServer::start(&[]);
    let mut world = World::with_postgres(&server.url());
    let config = world.config().consumer(small_batches());
    let daemon = world.run(&config);
    let mut ids = Vec::new();
    for round in 0..ROUNDS {
        ids.extend(catch_in_the_middle(&world, &format!("m{round}"), 400, 50));
        server.end(signal);
        server.start_again(&[]);
        world.db = Database::connect(world.postgres_url());
        world.wait_for_effects(ids.len() as i64);
    }
    assert!(!daemon.logged(&["lost the broker"]));
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_fast_restart_costs_no_message() {
    survives_restarts(Signal::SIGINT);
}

#[test]
fn an_immediate_restart_costs_no_message() {
    survives_restarts(Signal::SIGQUIT);
}

#[test]
fn a_crash_of_the_postmaster_costs_no_message() {
    survives_restarts(Signal::SIGKILL);
}

#[test]
fn a_failover_to_a_synchronous_standby_loses_nothing_and_repeats_nothing() {
    let mut primary = PostgresServer::start(&[]);
    let mut world = World::with_postgres(&primary.url());
    let standby = PostgresServer::standby_of(&primary);
    let proxy = Proxy::before(world.postgres_url(), 5432);
    let config = world
        .config()
        .set("postgres.url", proxy.url())
        .consumer(small_batches());
    // From now on a commit returns when the standby has it on its disk.
    world
        .db
        .execute("alter system set synchronous_standby_names = '*'");
    world.db.execute("select pg_reload_conf()");
    let synchronous = "select count(*) from pg_stat_replication where sync_state = 'sync'";
    eventually("the standby is synchronous", || {
        world.db.count(synchronous) == 1
    });
    let daemon = world.run(&config);
    let ids = catch_in_the_middle(&world, "m", 1_000, 300);
    primary.end(Signal::SIGKILL);
    // The way leads to the standby before it is promoted: it is read-only.
    proxy.lead_to(&standby.url(), 5432);
    proxy.go_down();
    proxy.come_up();
    daemon.wait_for_log(&["still waiting", "25006"]);
    world.db = Database::connect(&standby.same_database(world.postgres_url()));
    world.db.execute("select pg_promote()");
    world.wait_for_effects(ids.len() as i64);
    daemon.wait_for_log(&["resumed"]);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
    assert_eq!(world.db.failures(ORDERS), [], "no attempt was counted");
}

/// Has every commit wait for a standby that does not exist, as long as this
/// lives.
struct Unreplicated<'a>(&'a Database);

impl<'a> Unreplicated<'a> {
    fn new(db: &'a Database) -> Self {
        // Waits for nobody itself.
        db.execute("set synchronous_commit = local");
        Self::wait_for("nobody", db);
        Self(db)
    }

    fn wait_for(names: &str, db: &Database) {
        let alter = format!("alter system set synchronous_standby_names = '{names}'");
        db.execute(&alter);
        db.execute("select pg_reload_conf()");
        eventually("the server knows", || {
            db.texts("show synchronous_standby_names") == [names]
        });
    }
}

impl Drop for Unreplicated<'_> {
    fn drop(&mut self) {
        Self::wait_for("", self.0);
    }
}

#[test]
fn a_commit_that_waits_for_its_standby_is_not_acknowledged() {
    let server = PostgresServer::start(&[]);
    let world = World::with_postgres(&server.url());
    let config = world
        .config()
        .set("redis.enabled", false)
        .consumer(Consumer::orders().set("workers", 1));
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("first")]);
    world.wait_for_effects(1);
    let unreplicated = Unreplicated::new(&world.db);
    world.broker.send(ORDERS, numbered("m", 4));
    let waiting = "select count(*) from pg_stat_activity \
         where wait_event = 'SyncRep' and application_name = 'ackonce orders'";
    eventually("a commit waits for a standby", || {
        world.db.count(waiting) > 0
    });
    // Until the daemon takes the server for dead and asks again.
    daemon.wait_for_log(&["not answered", "no reply within"]);
    assert_eq!(world.db.effect_count(), 1, "nobody sees it yet");
    daemon.kill();
    eventually("every message is back in the queue", || {
        world.broker.ready(ORDERS) == 4
    });
    drop(unreplicated);
    eventually("what was to be committed is", || {
        world.db.effect_count() > 1
    });
    world.drain(&config, ORDERS);
    let mut ids = numbered_ids("m", 4);
    ids.push("first".to_owned());
    world.assert_each_applied_once(&ids);
}

#[test]
fn sessions_that_are_terminated_again_and_again_cost_no_message() {
    const MESSAGES: usize = 1_500;
    let server = PostgresServer::start(&[]);
    let world = World::with_postgres(&server.url());
    let config = world.config().consumer(small_batches());
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("m", MESSAGES));
    let mut ended = 0;
    for effects in (100..MESSAGES as i64).step_by(100) {
        world.wait_for_effects(effects);
        ended += terminate(&world.db);
    }
    assert!(ended >= 30, "only {ended} sessions were ended");
    world.wait_for_effects(MESSAGES as i64);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", MESSAGES));
    assert!(world.broker.is_empty(ORDERS_DEAD));
    assert_eq!(world.db.failures(ORDERS), [], "no attempt was counted");
}

#[test]
fn statements_that_are_cancelled_again_and_again_cost_no_message() {
    const MESSAGES: usize = 1_500;
    let server = PostgresServer::start(&[]);
    let world = World::with_postgres(&server.url());
    let config = world.config().consumer(small_batches());
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("m", MESSAGES));
    let cancel = "select count(pg_cancel_backend(pid)) from pg_stat_activity \
         where application_name like 'ackonce%' and state = 'active'";
    let mut cancelled = 0;
    eventually("everything is applied", || {
        cancelled += world.db.count(cancel);
        world.db.effect_count() == MESSAGES as i64
    });
    assert!(
        cancelled >= 10,
        "only {cancelled} statements were cancelled"
    );
    assert!(
        server
            .log()
            .contains("canceling statement due to user request")
    );
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", MESSAGES));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

/// The process that serves the session which holds the ledger's only
/// uncommitted rows.
fn backend_in_transaction(db: &Database) -> Pid {
    let mut pid = 0;
    eventually("a transaction is open", || {
        let pids = db.texts(
            "select pid::text from pg_stat_activity \
             where application_name like 'ackonce%' and state like 'idle in transaction%'",
        );
        pid = pids.first().map_or(0, |pid| pid.parse().unwrap());
        pid != 0
    });
    Pid::from_raw(pid)
}

#[test]
fn a_backend_that_is_frozen_before_its_commit_holds_up_its_own_messages_only() {
    let server = PostgresServer::start(&[]);
    let world = World::with_postgres(&server.url());
    let orders = Consumer::orders().set("workers", 2).set("batch_max", 1);
    let config = world
        .config()
        .set("postgres.idle_in_transaction_timeout", "60s")
        .consumer(orders);
    world.prepare(&config);
    let gate = world.gate();
    let daemon = world.daemon(&config).pauses_at("applied", 1, &gate).start();
    world.broker.send(ORDERS, [Msg::new("frozen")]);
    gate.wait_until_hit();
    let backend = backend_in_transaction(&world.db);
    kill(backend, Signal::SIGSTOP).unwrap();
    // Its COMMIT goes to a process that stands still.
    gate.open();
    world.broker.send(ORDERS, numbered("m", 50));
    world.wait_for_effects(50);
    daemon.wait_for_log(&["not answered", "no reply within"]);
    // Nobody knows whether it is committed, so it is neither applied again nor
    // acknowledged.
    daemon.wait_for_log(&["still waiting", "55P03"]);
    assert_eq!(world.db.effect_count(), 50);
    kill(backend, Signal::SIGCONT).unwrap();
    world.wait_for_effects(51);
    world.drain_with(daemon, &config, ORDERS);
    let mut ids = numbered_ids("m", 50);
    ids.push("frozen".to_owned());
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_message_whose_commit_is_refused_lets_its_neighbours_go_on() {
    let server = PostgresServer::start(&[]);
    let world = World::with_postgres(&server.url());
    // A code of the world's, at COMMIT, for one message.
    let check = "create or replace function check_late() returns trigger language plpgsql as \
         $$ begin if new.message_id = 'poison' then raise exception sqlstate 'XX000'; end if; \
         return null; end $$";
    world.db.execute(check);
    world.db.execute(
        "create constraint trigger late after insert on effect deferrable initially deferred \
         for each row execute function check_late()",
    );
    let config = world
        .config()
        .consumer(Consumer::orders().set("workers", 2));
    world.prepare(&config);
    let mut messages = numbered("m", 20);
    messages.insert(10, Msg::new("poison"));
    world.broker.send(ORDERS, messages);
    let daemon = world.run(&config);
    world.wait_for_effects(20);
    daemon.wait_for_log(&["XX000"]);
    assert!(!daemon.logged(&["not answered"]), "the server said no");
    assert!(world.broker.is_empty(ORDERS_DEAD));
    world.db.execute("drop trigger late on effect");
    world.wait_for_effects(21);
    world.drain_with(daemon, &config, ORDERS);
    let mut ids = numbered_ids("m", 20);
    ids.push("poison".to_owned());
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_server_that_commits_without_waiting_for_its_disk_is_made_to_wait() {
    let server = PostgresServer::start(&["synchronous_commit=off", "fsync=off"]);
    let world = World::with_postgres(&server.url());
    let orders = Consumer::orders().sql(
        "insert into effect (message_id, note) \
         select message_id, current_setting('synchronous_commit') from message",
    );
    let config = world.config().consumer(orders);
    let path = world.write("check.toml", &config.text());
    let checked = run_ackonce(&["check".as_ref(), "--config".as_ref(), path.as_os_str()]);
    let said = String::from_utf8_lossy(&checked.stdout).into_owned();
    assert!(said.contains("synchronous_commit is off"), "{said}");
    assert!(said.contains("fsync is off"), "{said}");
    let daemon = world.run(&config);
    daemon.wait_for_log(&["WARN", "synchronous_commit is off"]);
    daemon.wait_for_log(&["WARN", "fsync is off"]);
    world.broker.send(ORDERS, numbered("m", 3));
    world.wait_for_effects(3);
    let notes = world.db.texts("select distinct note from effect");
    assert_eq!(notes, ["on"]);
    daemon.stop();
}

#[test]
fn sessions_are_given_up_by_a_server_whose_worker_vanished() {
    let server = PostgresServer::start(&[]);
    let world = World::with_postgres(&server.url());
    let settings = "select string_agg(name || '=' || setting, ' ' order by name) from pg_settings \
         where name in ('tcp_user_timeout', 'tcp_keepalives_idle', 'tcp_keepalives_interval', \
         'tcp_keepalives_count', 'client_connection_check_interval', 'lock_timeout', \
         'idle_in_transaction_session_timeout')";
    let sql = format!(
        "insert into effect (message_id, note) select message_id, ({settings}) from message"
    );
    let config = world.config().consumer(Consumer::orders().sql(&sql));
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    assert_eq!(
        world.db.texts("select note from effect"),
        [
            "client_connection_check_interval=1000 idle_in_transaction_session_timeout=1000 \
             lock_timeout=500 tcp_keepalives_count=3 tcp_keepalives_idle=30 \
             tcp_keepalives_interval=10 tcp_user_timeout=1000"
        ]
    );
    daemon.stop();
}

#[test]
fn the_statement_of_a_daemon_that_was_killed_ends_before_its_time() {
    let server = PostgresServer::start(&[]);
    let world = World::with_postgres(&server.url());
    let orders = Consumer::orders().sql(
        "insert into effect (message_id) select message_id from message; select pg_sleep(3000)",
    );
    let mut config = world.config().consumer(orders);
    for timeout in ["statement", "idle_in_transaction"] {
        config = config.set(&format!("postgres.{timeout}_timeout"), "1h");
    }
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("m")]);
    let asleep = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'";
    eventually("it is at work", || world.db.count(asleep) == 1);
    daemon.kill();
    eventually("its session is gone", || world.db.count(asleep) == 0);
}

fn measure_recovery(world: &mut World, server: &mut PostgresServer, daemon: &Daemon) -> Duration {
    let effects = world.db.effect_count();
    server.end(Signal::SIGKILL);
    world
        .broker
        .send(ORDERS, [Msg::new(&format!("m-{effects}"))]);
    // Long enough for the waits to have grown.
    std::thread::sleep(Duration::from_secs(12));
    daemon.assert_alive();
    server.start_again(&[]);
    let since = Instant::now();
    world.db = Database::connect(world.postgres_url());
    world.wait_for_effects(effects + 1);
    since.elapsed()
}

#[test]
fn the_first_commit_comes_within_five_seconds_of_the_servers_return() {
    let mut server = PostgresServer::start(&[]);
    let mut world = World::with_postgres(&server.url());
    let config: Config = world
        .config()
        .set("postgres.statement_timeout", "15s")
        .set("postgres.lock_timeout", "5s")
        .set("postgres.idle_in_transaction_timeout", "20s")
        .set("daemon.reconnect_min", "100ms")
        .set("daemon.reconnect_max", "3s")
        .consumer(Consumer::orders());
    let daemon = world.run(&config);
    let waits: Vec<Duration> = (0..3)
        .map(|_| measure_recovery(&mut world, &mut server, &daemon))
        .collect();
    eprintln!("PostgreSQL back to first commit: {waits:?}");
    assert!(waits.iter().all(|wait| *wait < Duration::from_secs(5)));
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 3));
}
