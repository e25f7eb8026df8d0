//! The rights on the page about security: enough for everything the daemon and
//! its tools do, and none too many.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;

use crate::common::program::write_program;
use crate::common::{
    Config, Consumer, Daemon, Database, Ended, Msg, ORDERS, ORDERS_DEAD, RECORD_AMOUNT,
    RECORD_EFFECT, Tool, World, eventually, numbered,
};
use serde_json::json;
use url::Url;

const PAGE: &str = include_str!("../../docs/security.md");

const NO_PERMISSION: i32 = 77;

/// The blocks of the page in `language`.
fn blocks(language: &str) -> Vec<&'static str> {
    let fence = format!("```{language}\n");
    let mut found = Vec::new();
    for rest in PAGE.split(fence.as_str()).skip(1) {
        found.push(rest.split("```").next().unwrap());
    }
    assert!(!found.is_empty(), "the page has no {language}");
    found
}

/// A world, and a user of each server that may do what the page says. The users
/// go after the world, in which they have rights.
struct Stage {
    world: World,
    guests: Guests,
}

struct Guests {
    name: String,
    management: crate::common::Management,
    redis: redis::Client,
    admin: Database,
}

impl Drop for Guests {
    fn drop(&mut self) {
        let name = &self.name;
        let removed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            self.management.delete(&format!("/api/users/{name}"));
            self.acl(&["DELUSER", name]);
            for role in ["daemon", "migrator"] {
                self.admin.execute(&format!("drop role {name}_{role}"));
            }
        }));
        if removed.is_err() {
            eprintln!("failed to remove the users called {name}");
        }
    }
}

impl Guests {
    fn acl(&self, words: &[&str]) {
        let mut connection = self.redis.get_connection().unwrap();
        let mut command = redis::cmd("ACL");
        for word in words {
            command.arg(word);
        }
        let _: redis::Value = command.query(&mut connection).unwrap();
    }
}

/// The three patterns of the `n`th block about RabbitMQ: configure, write, read.
fn patterns(n: usize) -> [&'static str; 3] {
    let quoted: Vec<&str> = blocks("sh")[n].split('\'').skip(1).step_by(2).collect();
    quoted.try_into().unwrap()
}

/// What the page gives a user of Redis, one word each.
fn redis_rights() -> Vec<&'static str> {
    let line = PAGE.lines().find(|line| line.starts_with("ACL SETUSER "));
    line.unwrap().split(' ').skip(3).collect()
}

impl Stage {
    /// With the schema, and everything granted that the page grants.
    fn new() -> Self {
        let world = World::new();
        let name = format!("guest_{:016x}", crate::common::random());
        let stage = Self {
            guests: Guests {
                management: world.management.clone(),
                redis: redis::Client::open(world.redis_url()).unwrap(),
                admin: Database::connect(&std::env::var("ACKONCE_POSTGRES_URL").unwrap()),
                name,
            },
            world,
        };
        let (name, vhost) = (&stage.guests.name, stage.world.name());
        stage.world.management.create_user(name, "guest", vhost);
        stage.permit(patterns(0));
        stage.let_redis(&redis_rights());
        let [roles, daemon, tools, handler] = blocks("sql").try_into().unwrap();
        stage.world.db.execute(&stage.here(roles));
        let migrator = stage.config("migrator");
        stage.tool(&migrator, &["migrate"]).expect(0);
        let owner = Database::connect(&stage.role_url("migrator"));
        owner.execute(&stage.here(daemon));
        owner.execute(&stage.here(tools));
        stage.world.db.execute(&stage.here(handler));
        stage
    }

    /// SQL of the page with the names of this stage.
    fn here(&self, sql: &str) -> String {
        let name = &self.guests.name;
        sql.replace("ackonce_daemon", &format!("{name}_daemon"))
            .replace("ackonce_migrator", &format!("{name}_migrator"))
            .replace("DATABASE shop", &format!("DATABASE {}", self.world.name()))
            .replace("ON orders ", "ON effect ")
    }

    fn permit(&self, [configure, write, read]: [&str; 3]) {
        let (vhost, name) = (self.world.name(), &self.guests.name);
        let rights = json!({ "configure": configure, "write": write, "read": read });
        let path = format!("/api/permissions/{vhost}/{name}");
        self.world.management.put(&path, &rights);
    }

    fn let_redis(&self, rights: &[&str]) {
        let keys = format!("~{}:*", self.world.name());
        let mut words = vec!["SETUSER", self.guests.name.as_str(), "reset"];
        for right in rights {
            words.push(match *right {
                ">CHANGE-ME" => ">guest",
                "~ackonce:*" => &keys,
                other => other,
            });
        }
        self.guests.acl(&words);
    }

    fn role_url(&self, role: &str) -> String {
        let mut url = Url::parse(self.world.postgres_url()).unwrap();
        let user = format!("{}_{role}", self.guests.name);
        url.set_username(&user).unwrap();
        url.into()
    }

    fn as_guest(&self, url: &str) -> String {
        let mut url = Url::parse(url).unwrap();
        url.set_username(&self.guests.name).unwrap();
        url.set_password(Some("guest")).unwrap();
        url.into()
    }

    /// Everything with the guests' rights, and the consumer of the page.
    fn config(&self, role: &str) -> Config {
        self.of(role, self.consumer().sql(RECORD_AMOUNT))
    }

    fn of(&self, role: &str, consumer: Consumer) -> Config {
        self.world
            .config()
            .set("broker.url", self.as_guest(self.world.amqp_url()))
            .set("redis.url", self.as_guest(self.world.redis_url()))
            .set("postgres.url", self.role_url(role))
            .set("postgres.auto_migrate", false)
            .consumer(consumer)
    }

    fn consumer(&self) -> Consumer {
        Consumer::orders()
            .bind("shop", "topic", "order.*")
            .failures("transient", &["22P02"])
            .max_attempts(2)
            .backoff(&["100ms"])
    }

    fn tool(&self, config: &Config, arguments: &[&str]) -> Ended {
        Tool::new(&self.world, config, arguments).run()
    }

    /// What the daemon's role was granted: table and right, of the blocks for
    /// the daemon and, with `tools`, for its tools.
    fn grants(&self, tools: bool) -> Vec<(String, String)> {
        let blocks = blocks("sql");
        let text = if tools { blocks[2] } else { blocks[1] };
        let mut found = Vec::new();
        for line in text.lines() {
            let line = line.strip_prefix("GRANT ").unwrap();
            let (rights, rest) = line.split_once(" ON ").unwrap();
            let (tables, _) = rest.split_once(" TO ").unwrap();
            for table in tables.split(", ") {
                for right in rights.split(", ") {
                    found.push((table.to_owned(), right.to_owned()));
                }
            }
        }
        found
    }

    fn revoke(&self, table: &str, right: &str) {
        let role = format!("{}_daemon", self.guests.name);
        let sql = format!("revoke {right} on {table} from {role}");
        self.world.db.execute(&sql);
    }

    fn grant(&self, table: &str, right: &str) {
        let role = format!("{}_daemon", self.guests.name);
        let sql = format!("grant {right} on {table} to {role}");
        self.world.db.execute(&sql);
    }
}

fn bad(id: &str) -> Msg {
    Msg::new(id).json(&json!({ "amount": "many" }))
}

fn letters(world: &World, count: u32) {
    eventually("the letters are there", || {
        world.broker.ready(ORDERS_DEAD) == count
    });
}

/// Applies, retries and dead-letters with `config`; then looks at the letters,
/// replays, forces, drops and prunes with `mended`, which takes every message.
fn does_everything(stage: &Stage, config: &Config, mended: &Config, exchange: &str, key: &str) {
    let world = &stage.world;
    let daemon = world.run(config);
    world.broker.publish(exchange, key, numbered("m", 20));
    world
        .broker
        .publish(exchange, key, ["b-1", "b-2", "b-3"].map(bad));
    world.wait_for_effects(20);
    letters(world, 3);
    daemon.stop();
    assert_eq!(
        world
            .db
            .count("select count(*) from ackonce.failure where retry_in is not null"),
        3,
        "each was retried"
    );

    let run = |arguments: &[&str]| stage.tool(mended, arguments).expect(0);
    run(&["check"]).says(&["PostgreSQL rights: ledger and journal"]);
    run(&["why", "b-1"]).says(&["max-attempts"]);
    run(&["dead", "list", ORDERS]).says(&["b-1", "b-2", "b-3"]);
    run(&["dead", "show", ORDERS, "b-1"]).says(&["many"]);

    let daemon = world.run(mended);
    world.broker.publish(exchange, key, [bad("b-1")]);
    world.wait_for_effects(21);
    let because = ["--because", "test", "--yes"];
    let with = |arguments: &[&'static str]| [arguments, &because[..]].concat();
    run(&with(&["replay", ORDERS, "--force-reprocess", "b-1"]));
    world.wait_for_effects(22);
    run(&with(&[
        "dead",
        "drop",
        ORDERS,
        "--id",
        "b-3",
        "--no-export",
    ]));
    run(&["replay", ORDERS, "--yes"]);
    world.wait_for_effects(23);
    daemon.stop();
    assert!(world.broker.is_empty(ORDERS_DEAD));
    run(&["why", "b-1"]).says(&["force-reprocess"]);
    let applied = BTreeMap::from([("b-1".to_owned(), 2), ("b-2".to_owned(), 1)]);
    let effects = world.db.effects();
    let others: BTreeMap<_, _> = effects
        .into_iter()
        .filter(|(id, _)| id.starts_with('b'))
        .collect();
    assert_eq!(others, applied);

    world
        .db
        .execute("update ackonce.ledger set applied_at = now() - interval '1 day'");
    let rows = world.db.ledger(ORDERS).len();
    let early = ["ledger", "prune", "--older-than", "1h", "--yes"];
    stage.tool(mended, &early).expect(NO_PERMISSION);
    assert_eq!(world.db.ledger(ORDERS).len(), rows, "nothing is deleted");
    stage.tool(&stage.config("migrator"), &early).expect(0);
    assert_eq!(world.db.ledger(ORDERS), [] as [&str; 0]);
}

#[test]
fn with_the_rights_on_the_page_the_daemon_and_its_tools_do_everything() {
    let stage = Stage::new();
    let config = stage.config("daemon");
    stage.tool(&config, &["check"]).expect(0);
    let mended = stage.of("daemon", stage.consumer().sql(RECORD_EFFECT));
    does_everything(&stage, &config, &mended, "shop", "order.new");

    // A handler with the key, which claims in the ledger.
    let program = stage.world.path("apply");
    write_program(&program, "#!/bin/sh\nexit 0\n");
    let keyed = Consumer::orders()
        .handler("command")
        .bind("shop", "topic", "order.*")
        .max_attempts(2)
        .backoff(&["100ms"])
        .set("handler.argv", vec![program.to_str().unwrap()]);
    let daemon = stage.world.run(&stage.of("daemon", keyed));
    stage
        .world
        .broker
        .publish("shop", "order.new", numbered("k", 5));
    eventually("they are in the ledger", || {
        stage.world.db.ledger(ORDERS).len() == 5
    });
    assert!(!daemon.logged(&["Redis cannot be used"]));
    assert!(!daemon.logged(&["paused"]));
    daemon.stop();

    // What exists is only looked at.
    let verify = stage
        .consumer()
        .sql(RECORD_EFFECT)
        .set("topology.mode", "verify");
    stage.world.run(&stage.of("daemon", verify)).stop();
}

#[test]
fn where_others_make_the_queues_the_daemon_needs_to_configure_nothing() {
    let stage = Stage::new();
    stage.world.prepare(&stage.config("daemon"));
    stage.permit(patterns(1));
    let foreign = |sql| {
        let consumer = Consumer::orders()
            .failures("transient", &["22P02"])
            .max_attempts(2)
            .backoff(&["100ms"])
            .set("topology.mode", "none")
            .sql(sql);
        stage.of("daemon", consumer)
    };
    let (config, mended) = (foreign(RECORD_AMOUNT), foreign(RECORD_EFFECT));
    does_everything(&stage, &config, &mended, "", ORDERS);
}

#[test]
fn a_missing_right_in_postgres_is_named_and_each_on_the_page_is_needed() {
    let stage = Stage::new();
    let config = stage.config("daemon");
    for (table, right) in stage.grants(false) {
        let on = match right.as_str() {
            "USAGE" => table.clone(),
            _ => format!("table {table}"),
        };
        stage.revoke(&on, &right);
        let missing = match table.as_str() {
            "SCHEMA ackonce" => "permission denied for schema ackonce".to_owned(),
            "ackonce.migration" => "permission denied for table migration".to_owned(),
            _ => format!("missing: {table} ({right})"),
        };
        stage
            .tool(&config, &["check"])
            .expect(NO_PERMISSION)
            .says(&[&missing]);
        stage.grant(&on, &right);
    }
    stage.tool(&config, &["check"]).expect(0);
}

#[test]
fn a_role_that_may_make_nothing_temporary_is_told_what_to_grant() {
    let stage = Stage::new();
    let database = format!("database {}", stage.world.name());
    let revoke = format!("revoke temporary on {database} from public");
    stage.world.db.execute(&revoke);
    let config = stage.config("daemon");
    let check = stage.tool(&config, &["check"]).expect(NO_PERMISSION);
    check.says(&["GRANT TEMPORARY ON DATABASE", "batch = \"set\""]);
    stage.grant(&database, "temporary");
    stage.tool(&config, &["check"]).expect(0);
}

#[test]
fn a_right_that_goes_while_the_daemon_runs_pauses_it_and_costs_no_message() {
    let stage = Stage::new();
    let world = &stage.world;
    let daemon = world.run(&stage.config("daemon"));
    world.broker.send(ORDERS, numbered("a", 5));
    world.wait_for_effects(5);
    stage.revoke("effect", "insert");
    world.broker.send(ORDERS, numbered("b", 5));
    daemon.wait_for_log(&["paused", "permission denied for table effect"]);
    stage.grant("effect", "insert");
    world.wait_for_effects(10);
    stage.revoke("ackonce.ledger", "insert");
    world.broker.send(ORDERS, numbered("c", 5));
    daemon.wait_for_log(&["paused", "permission denied for table ledger"]);
    stage.grant("ackonce.ledger", "insert");
    world.wait_for_effects(15);
    daemon.stop();
    assert!(world.broker.is_empty(ORDERS_DEAD), "no attempt was counted");
    assert_eq!(world.db.applied_twice(), [] as [&str; 0]);
}

#[test]
fn a_missing_right_in_redis_is_named_and_the_daemon_goes_on_without_it() {
    let stage = Stage::new();
    let config = stage.config("daemon");
    let needed = redis_rights();
    let without = |gone: &str| -> Vec<&str> {
        assert!(needed.contains(&gone), "{gone} is not on the page");
        needed
            .iter()
            .copied()
            .filter(|right| *right != gone)
            .collect()
    };
    for (right, says) in [
        ("+set", "NOPERM"),
        ("+eval", "NOPERM"),
        ("+info", "NOPERM"),
        ("~ackonce:*", "NOPERM"),
        // In a script, and in other words.
        ("+get", "can't run this command"),
        ("+del", "can't run this command"),
        ("+pexpire", "can't run this command"),
    ] {
        stage.let_redis(&without(right));
        stage
            .tool(&config, &["check"])
            .expect(NO_PERMISSION)
            .says(&[says]);
    }
    stage.let_redis(&without("+set"));
    let daemon = stage.world.run(&config);
    stage.world.broker.send(ORDERS, numbered("m", 5));
    stage.world.wait_for_effects(5);
    daemon.wait_for_log(&["Redis cannot be used", "NOPERM"]);
    daemon.stop();
    for right in ["+mget", "+evalsha", "+script|load", "+info"] {
        assert!(needed.contains(&right), "{right} is not on the page");
    }
    let known = [
        "on",
        "resetkeys",
        "resetchannels",
        "-@all",
        ">CHANGE-ME",
        "~ackonce:*",
    ];
    let commands = needed.iter().filter(|right| !known.contains(right)).count();
    assert_eq!(commands, 9, "a right that is tested nowhere");
}

/// Starts, and is refused with `says`.
fn is_denied(daemon: &mut Daemon, says: &[&str]) {
    let status = daemon.wait();
    assert_eq!(status.code(), Some(NO_PERMISSION), "{status}");
    assert!(daemon.logged(says), "{says:?}");
}

#[test]
fn a_missing_right_in_rabbitmq_ends_the_start_with_77_and_its_name() {
    let stage = Stage::new();
    let config = stage.config("daemon");
    let [configure, write, read] = patterns(0);
    for (rights, says) in [
        (["^$", write, read], "access to"),
        ([configure, "^$", read], "access to"),
        ([configure, "^orders.*$", read], "amq.default"),
        ([configure, write, "^orders.*$"], "exchange 'shop'"),
        ([configure, write, "^shop$"], "access to"),
    ] {
        stage.permit(rights);
        let mut daemon = stage.world.daemon(&config).start();
        is_denied(&mut daemon, &["refused for user", says]);
    }
    // What a daemon needs that declares nothing is missed when it is used.
    stage.permit(patterns(0));
    stage.world.prepare(&config);
    let [nothing, write, read] = patterns(1);
    let foreign = Consumer::orders().set("topology.mode", "none");
    let config = stage.of("daemon", foreign.backoff(&["100ms"]));
    for (rights, says) in [
        ([nothing, write, "^$"], "queue 'orders'"),
        ([nothing, "^amq.default$", read], "exchange 'orders.dlx'"),
    ] {
        stage.permit(rights);
        let daemon = stage.world.daemon(&config).start();
        daemon.wait_for_log(&["refused for user", says]);
    }
}
