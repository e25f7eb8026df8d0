//! What is wrong with the world costs no message anything: the consumer
//! pauses, gives back nearly all it holds, and goes on by itself.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use crate::common::{
    Config, Consumer, Daemon, Database, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered,
    numbered_ids,
};
use url::Url;

const MESSAGES: usize = 2_000;
/// More than a paused consumer holds: its prefetch of 8, and 4 for each of its
/// 4 workers.
const HELD_MAX: i64 = 24;
/// The role that the daemon logs in with, where a test changes what it may do.
const ROLE_PASSWORD: &str = "before the rotation";

/// A daemon that some of [`MESSAGES`] have gone through.
struct Stage {
    world: World,
    config: Config,
    daemon: Daemon,
    /// The daemon's own connections to the broker, as they were before.
    connections: Vec<String>,
}

impl Stage {
    fn new(configure: impl FnOnce(&World, Config) -> Config) -> Self {
        Self::with_handler(configure, crate::common::RECORD_EFFECT)
    }

    fn with_handler(configure: impl FnOnce(&World, Config) -> Config, sql: &str) -> Self {
        let world = World::new();
        let config = world.config().consumer(Consumer::orders().sql(sql));
        world.prepare(&config);
        let config = configure(&world, config);
        let of_harness = connections(&world, 1);
        let daemon = world.run(&config);
        let mut connections = connections(&world, of_harness.len() + 1);
        connections.retain(|name| !of_harness.contains(name));
        world.broker.send(ORDERS, numbered("early", 10));
        world.wait_for_effects(10);
        Self {
            world,
            config,
            daemon,
            connections,
        }
    }

    /// Sends the rest, and waits until the consumer has paused for `code` and
    /// has given back what it holds.
    fn pauses(&self, code: &str) {
        self.world.broker.send(ORDERS, numbered("m", MESSAGES));
        self.daemon.wait_for_log(&["paused", code]);
        let all = MESSAGES as i64;
        eventually("it gives back all but a few", || {
            i64::from(self.world.broker.ready(ORDERS)) >= all - HELD_MAX
        });
        assert!(self.world.broker.is_empty(ORDERS_DEAD));
    }

    /// Panics unless everything is applied by the same daemon over the same
    /// connection, and nothing was blamed on a message.
    fn recovers(self) {
        let world = &self.world;
        world.wait_for_effects(10 + MESSAGES as i64);
        self.daemon.wait_for_log(&["resumed"]);
        assert!(!self.daemon.logged(&["lost the broker"]));
        let now = connections(world, 1);
        assert!(
            self.connections.iter().all(|name| now.contains(name)),
            "it kept its connections {:?}, now there are {now:?}",
            self.connections
        );
        world.drain_with(self.daemon, &self.config, ORDERS);
        let mut ids = numbered_ids("m", MESSAGES);
        ids.extend(numbered_ids("early", 10));
        world.assert_each_applied_once(&ids);
        assert!(world.broker.is_empty(ORDERS_DEAD));
        assert_eq!(world.db.failures(ORDERS), [], "no attempt was counted");
    }
}

/// The vhost's connections, once there are `count` or more.
fn connections(world: &World, count: usize) -> Vec<String> {
    let mut found = Vec::new();
    eventually("the connections are listed", || {
        found = world.management.connections(world.name());
        found.len() >= count
    });
    found
}

fn as_it_is(_: &World, config: Config) -> Config {
    config
}

/// Ends the daemon's sessions.
fn terminate_sessions(admin: &Database, world: &World) {
    admin.execute(&format!(
        "select pg_terminate_backend(pid) from pg_stat_activity \
         where datname = '{}' and application_name like 'ackonce%'",
        world.name()
    ));
}

/// A session that changes roles and databases, in another database.
fn admin(world: &World) -> Database {
    let mut url = Url::parse(world.postgres_url()).unwrap();
    url.set_path("template1");
    Database::connect(url.as_str())
}

/// Has the daemon log in with a role of its own, named like the world.
fn with_own_role(world: &World, config: Config) -> Config {
    let name = world.name();
    world.db.execute(&format!(
        "create role {name} login password '{ROLE_PASSWORD}'; \
         grant usage on schema public, ackonce to {name}; \
         grant all on all tables in schema public, ackonce to {name}; \
         grant all on all sequences in schema public, ackonce to {name}"
    ));
    let mut url = Url::parse(world.postgres_url()).unwrap();
    url.set_username(name).unwrap();
    url.set_password(Some(ROLE_PASSWORD)).unwrap();
    config
        .set("postgres.url", url.as_str())
        .set("postgres.auto_migrate", false)
}

#[test]
fn a_dropped_table_harms_no_message() {
    let stage = Stage::new(as_it_is);
    stage
        .world
        .db
        .execute("create table copy as table effect; drop table effect");
    stage.pauses("42P01");
    stage.world.db.execute("alter table copy rename to effect");
    stage.recovers();
}

#[test]
fn a_dropped_ledger_table_harms_no_message() {
    let stage = Stage::new(as_it_is);
    let db = &stage.world.db;
    db.execute("alter table ackonce.ledger rename to elsewhere");
    stage.pauses("42P01");
    db.execute("alter table ackonce.elsewhere rename to ledger");
    stage.recovers();
}

#[test]
fn a_role_that_may_not_log_in_any_more_harms_no_message() {
    let stage = Stage::new(with_own_role);
    let admin = admin(&stage.world);
    let name = stage.world.name().to_owned();
    admin.execute(&format!("alter role {name} nologin"));
    terminate_sessions(&admin, &stage.world);
    stage.pauses("28000");
    admin.execute(&format!("alter role {name} login"));
    stage.recovers();
    admin.execute(&format!("drop role {name}"));
}

/// Has PostgreSQL ask `role` for its password, which it does of nobody else.
fn ask_for_password(admin: &Database, role: &str) {
    let file = admin.texts("select current_setting('hba_file')").remove(0);
    // COPY empties the file before it runs its query.
    admin.execute(&format!(
        "create temporary table hba as select 1 as nr, 'host all {role} 127.0.0.1/32 scram-sha-256' \
         as line union all select 2, * from regexp_split_to_table(pg_read_file('{file}'), E'\\n') \
         as line where line ~ '^[a-z]'; \
         copy (select line from hba order by nr) to '{file}'; select pg_reload_conf()"
    ));
}

#[test]
fn a_password_that_was_changed_harms_no_message() {
    let with_password = |world: &World, config: Config| {
        ask_for_password(&world.db, world.name());
        with_own_role(world, config)
    };
    let stage = Stage::new(with_password);
    let admin = admin(&stage.world);
    let name = stage.world.name().to_owned();
    admin.execute(&format!("alter role {name} password 'after it'"));
    terminate_sessions(&admin, &stage.world);
    stage.pauses("28P01");
    admin.execute(&format!("alter role {name} password '{ROLE_PASSWORD}'"));
    stage.recovers();
    admin.execute(&format!("drop role {name}"));
}

#[test]
fn a_right_that_is_taken_away_harms_no_message() {
    let stage = Stage::new(with_own_role);
    let name = stage.world.name().to_owned();
    let db = &stage.world.db;
    db.execute(&format!("revoke insert on effect from {name}"));
    stage.pauses("42501");
    db.execute(&format!("grant insert on effect to {name}"));
    let admin = admin(&stage.world);
    stage.recovers();
    admin.execute(&format!("drop role {name}"));
}

#[test]
fn a_database_that_is_read_only_harms_no_message() {
    let stage = Stage::new(as_it_is);
    let admin = admin(&stage.world);
    let alter = format!(
        "alter database {} set default_transaction_read_only",
        stage.world.name()
    );
    admin.execute(&format!("{alter} = on"));
    terminate_sessions(&admin, &stage.world);
    stage.pauses("25006");
    admin.execute(&format!("{alter} = off"));
    stage.recovers();
}

#[test]
fn a_database_that_takes_no_connections_harms_no_message() {
    let stage = Stage::new(with_own_role);
    let admin = admin(&stage.world);
    let alter = format!("alter database {}", stage.world.name());
    admin.execute(&format!("{alter} connection limit 0"));
    terminate_sessions(&admin, &stage.world);
    stage.pauses("53300");
    admin.execute(&format!("{alter} connection limit -1"));
    admin.execute(&format!("{alter} allow_connections false"));
    terminate_sessions(&admin, &stage.world);
    stage.daemon.wait_for_log(&["still waiting", "55000"]);
    admin.execute(&format!("{alter} allow_connections true"));
    let name = stage.world.name().to_owned();
    stage.recovers();
    admin.execute(&format!("drop role {name}"));
}

#[test]
fn a_full_disk_harms_no_message() {
    let raise = |world: &World, config: Config| {
        world.db.execute(
            "create table disk (full_up bool); insert into disk values (false); \
             create function store(id text) returns text language plpgsql as $$ begin \
             if (select full_up from disk) then \
             raise exception 'could not extend file: No space left on device' \
             using errcode = '53100'; end if; return id; end $$",
        );
        config
    };
    let stage = Stage::with_handler(
        raise,
        "insert into effect (message_id) select store(message_id) from message",
    );
    let db = &stage.world.db;
    db.execute("update disk set full_up = true");
    stage.pauses("53100");
    db.execute("update disk set full_up = false");
    stage.recovers();
}

/// Refuses with SQLSTATE `23503` what the body wants refused, and everything
/// while the table `wanted` is empty.
const REFUSING: &str = "insert into effect (message_id, note) \
    select message_id, refuse((body->>'refuse')::bool) from message";

fn world_that_refuses(breaker: u32, max_attempts: u32) -> (World, Config) {
    let world = World::new();
    world.db.execute(
        "create table wanted (id int); insert into wanted values (1); \
         create function refuse(it bool) returns text language plpgsql as $$ begin \
         if it or not exists (select from wanted) then \
         raise exception 'no' using errcode = '23503'; end if; return ''; end $$",
    );
    let orders = Consumer::orders()
        .sql(REFUSING)
        .set("retry.breaker", breaker)
        .max_attempts(max_attempts)
        .backoff(&["50ms"]);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    (world, config)
}

fn refused(id: &str, refuse: bool) -> Msg {
    Msg::new(id).json(&serde_json::json!({ "refuse": refuse }))
}

#[test]
fn the_breaker_opens_after_so_many_failures_in_a_row_and_not_before() {
    const BREAKER: usize = 30;
    let (world, config) = world_that_refuses(BREAKER as u32, 3);
    let daemon = world.run(&config);
    world.db.execute("delete from wanted");
    // One less than it takes, in three attempts each: all are dead-lettered.
    let few = numbered_ids("few", BREAKER / 3 - 1);
    world
        .broker
        .send(ORDERS, few.iter().map(|id| refused(id, false)));
    world.broker.wait_for_dead(ORDERS_DEAD, few.len());
    assert!(!daemon.logged(&["paused"]));
    let counted = few.len() * 3;
    assert_eq!(world.db.failures(ORDERS).len(), counted);
    // The ones that follow reach the limit across messages.
    let many = numbered_ids("many", 200);
    world
        .broker
        .send(ORDERS, many.iter().map(|id| refused(id, false)));
    daemon.wait_for_log(&["paused", "23503"]);
    world.db.execute("insert into wanted values (1)");
    world.wait_for_effects(200);
    daemon.wait_for_log(&["resumed"]);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&many);
    assert_eq!(world.broker.dead(ORDERS_DEAD).len(), few.len());
}

#[test]
fn one_poison_message_in_good_traffic_never_opens_the_breaker() {
    let (world, config) = world_that_refuses(12, 20);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [refused("poison", true)]);
    let mut sent = 0;
    eventually("the poison comes to rest", || {
        let id = format!("m-{sent}");
        world.broker.send(ORDERS, [refused(&id, false)]);
        sent += 1;
        world.wait_for_effects(sent);
        !world.broker.dead(ORDERS_DEAD).is_empty()
    });
    assert!(!daemon.logged(&["paused"]));
    assert_eq!(world.db.failures(ORDERS).len(), 20);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", sent as usize));
}
