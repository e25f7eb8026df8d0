//! What stands in Redis decides nothing: neither what somebody with access to
//! it wrote there, nor what a copy of the database, or the database before it
//! was set back, had a right to write.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ackonce::message::{Fingerprint, MessageId};
use nix::sys::signal::Signal;
use sha2::{Digest, Sha256};

use crate::common::{
    Config, Consumer, Database, Msg, ORDERS, ORDERS_DEAD, PostgresServer, Tool, World, eventually,
    numbered, numbered_ids,
};

const MINUTE_MS: u64 = 60_000;
const BODY: &str = r#"{"id":"m"}"#;

fn prepared() -> (World, Config) {
    let world = World::new();
    let config = world.orders();
    world.prepare(&config);
    (world, config)
}

fn print(body: &str) -> Fingerprint {
    Fingerprint(Sha256::digest(body).into())
}

fn in_seconds(seconds: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs() + seconds
}

/// The mark that this world's daemons would make.
fn mark(world: &World, id: &str, body: &str, expires: u64) -> String {
    let id = MessageId::new(id).unwrap();
    world.marks().mark(ORDERS, &id, print(body), expires)
}

/// Whether the message `m` takes effect where Redis says this of it.
fn is_applied_despite(value: &str) -> bool {
    let (world, config) = prepared();
    world
        .redis
        .set(&world.claim_key(ORDERS, "m"), value, MINUTE_MS);
    world.broker.send(ORDERS, [Msg::new("m").body(BODY)]);
    world.drain(&config, ORDERS);
    assert!(world.broker.is_empty(ORDERS_DEAD));
    world.db.effect_count() == 1
}

#[test]
fn a_mark_that_the_ledgers_secret_has_not_signed_makes_no_message_vanish() {
    let hash = Sha256::digest(BODY);
    let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(is_applied_despite(&format!("d:{hash}")));
    let expires = in_seconds(60);
    assert!(is_applied_despite(&format!("d:{expires:x}:{:032x}", 0)));
}

#[test]
fn a_mark_of_another_id_body_or_time_makes_no_message_vanish() {
    let (world, config) = prepared();
    let key = world.claim_key(ORDERS, "m");
    for wrong in [
        mark(&world, "n", BODY, in_seconds(60)),
        mark(&world, "m", "another", in_seconds(60)),
        mark(&world, "m", BODY, in_seconds(0) - 1),
    ] {
        world.redis.set(&key, &wrong, MINUTE_MS);
        world.broker.send(ORDERS, [Msg::new("m").body(BODY)]);
        world.drain(&config, ORDERS);
        assert_eq!(world.db.effect_count(), 1, "{wrong}");
        world
            .db
            .execute("delete from ackonce.ledger; delete from effect");
        assert!(world.broker.is_empty(ORDERS_DEAD));
    }
}

#[test]
fn a_mark_of_the_ledgers_own_counts_unless_duplicates_are_to_be_confirmed() {
    for (confirm, effects) in [(false, 0), (true, 1)] {
        let world = World::new();
        let orders = Consumer::orders().set("confirm_duplicates", confirm);
        let config = world.config().consumer(orders);
        world.prepare(&config);
        let key = world.claim_key(ORDERS, "m");
        let mark = mark(&world, "m", BODY, in_seconds(60));
        world.redis.set(&key, &mark, MINUTE_MS);
        world.broker.send(ORDERS, [Msg::new("m").body(BODY)]);
        world.drain(&config, ORDERS);
        assert_eq!(world.db.effect_count(), effects, "confirm: {confirm}");
    }
}

#[test]
fn what_a_copy_of_the_database_applied_is_applied_by_the_original_too() {
    const MESSAGES: usize = 60;
    let (world, config) = prepared();
    // Staging: the same ledger with the same secret, in another database of the
    // same server, beside the same Redis with the same prefix.
    let staging = format!("{}_staging", world.name());
    let admin = Database::connect(&std::env::var("ACKONCE_POSTGRES_URL").unwrap());
    eventually("nobody is in the original", || {
        admin.count(&format!(
            "select count(*) from pg_stat_activity where datname = '{}' \
             and application_name like 'ackonce %'",
            world.name()
        )) == 0
    });
    world.db.execute("select 1");
    admin.execute(&format!(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{}'",
        world.name()
    ));
    admin.execute(&format!(
        "create database {staging} template {}",
        world.name()
    ));
    let mut url = url::Url::parse(world.postgres_url()).unwrap();
    url.set_path(&staging);
    let copy = config.clone().set("postgres.url", url.as_str());
    world.broker.send(ORDERS, numbered("m", MESSAGES));
    world.drain(&copy, ORDERS);
    assert_eq!(Database::connect(url.as_str()).effect_count(), 60);
    assert!(!world.redis.keys().is_empty(), "staging made its marks");

    world.broker.send(ORDERS, numbered("m", MESSAGES));
    world.drain(&config, ORDERS);
    let effects = Database::connect(world.postgres_url()).effect_count();
    admin.execute(&format!("drop database {staging} with (force)"));
    assert_eq!(effects, 60);
}

#[test]
fn what_a_server_forgot_when_its_disk_was_set_back_is_applied_again() {
    let mut server = PostgresServer::start(&[]);
    let mut world = World::with_postgres(&server.url());
    let config = world.orders();
    world.prepare(&config);
    server.end(Signal::SIGINT);
    let snapshot = server.snapshot();
    server.start_again(&[]);
    world.db = Database::connect(world.postgres_url());
    world.broker.send(ORDERS, numbered("m", 60));
    world.drain(&config, ORDERS);
    assert_eq!(world.db.effect_count(), 60);
    let marks = world.redis.keys().len();
    assert!(marks >= 60, "there are marks: {marks}");

    server.end(Signal::SIGINT);
    server.restore(&snapshot);
    server.start_again(&[]);
    world.db = Database::connect(world.postgres_url());
    assert_eq!(world.db.effect_count(), 0, "it was set back");
    world.broker.send(ORDERS, numbered("m", 60));
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 60));
}

#[test]
fn a_worker_that_gets_nothing_but_duplicates_notices_that_its_server_was_set_back() {
    let mut server = PostgresServer::start(&[]);
    let mut world = World::with_postgres(&server.url());
    let config = world.orders();
    world.prepare(&config);
    server.end(Signal::SIGINT);
    let snapshot = server.snapshot();
    server.start_again(&[]);
    world.db = Database::connect(world.postgres_url());
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    server.end(Signal::SIGKILL);
    server.restore(&snapshot);
    server.start_again(&[]);
    world.db = Database::connect(world.postgres_url());
    assert_eq!(world.db.effect_count(), 0, "it was set back");
    // Longer than a worker may believe without asking.
    std::thread::sleep(ackonce::ledger::MARKS_FRESH + Duration::from_millis(100));
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&["m"]);
}

#[test]
fn what_was_pruned_before_its_time_is_applied_again_under_a_running_daemon() {
    let (world, config) = prepared();
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("m", 20));
    world.wait_for_effects(20);
    eventually("the messages are settled", || world.broker.is_empty(ORDERS));
    world
        .db
        .execute("update ackonce.ledger set applied_at = now() - interval '2 hours'");
    let prune = ["ledger", "prune", "--older-than", "1h", "--yes"];
    Tool::new(&world, &config, &prune).run().expect(0);
    assert_eq!(world.db.ledger(ORDERS).len(), 0, "they are pruned");
    world.db.execute("delete from effect");
    world.broker.send(ORDERS, numbered("m", 20));
    world.wait_for_effects(20);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 20));
}

#[test]
fn no_mark_outlives_the_row_that_it_speaks_of() {
    let world = World::new();
    let config = world.orders().set("ledger.retention", "1h");
    world.prepare(&config);
    let key = world.claim_key(ORDERS, "m");
    let expires = || {
        let mark = world.redis.get(&key).unwrap();
        let expires = mark.split(':').nth(1).unwrap();
        u64::from_str_radix(expires, 16).unwrap()
    };
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.drain(&config, ORDERS);
    assert!(world.redis.ttl_ms(&key) <= 60 * 60_000);
    assert!(expires() <= in_seconds(3_600));
    // One that is found in the ledger is marked for what its row has left.
    world.redis.flush();
    world
        .db
        .execute("update ackonce.ledger set applied_at = now() - interval '59 minutes'");
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.drain(&config, ORDERS);
    assert!((1..=60_000).contains(&world.redis.ttl_ms(&key)));
    assert!(expires() <= in_seconds(60));
    world.assert_each_applied_once(&["m"]);
}

#[test]
fn a_claim_that_no_worker_would_make_is_not_waited_for() {
    let world = World::new();
    // Waited for, they would be looked at again after a minute.
    let orders = Consumer::orders().set("claim.recheck_every", "1m");
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let key = |id| world.claim_key(ORDERS, id);
    let mut redis = redis::Client::open(world.redis_url())
        .unwrap()
        .get_connection()
        .unwrap();
    let () = redis::cmd("SET")
        .arg(key("for-ever"))
        .arg("c:foreign")
        .query(&mut redis)
        .unwrap();
    world.redis.set(&key("long"), "c:foreign", 10 * MINUTE_MS);
    let daemon = world.run(&config);
    world
        .broker
        .send(ORDERS, ["for-ever", "long"].map(Msg::new));
    world.wait_for_effects(2);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&["for-ever", "long"]);
}

#[test]
fn a_claim_that_somebody_keeps_alive_for_ever_delays_its_message_and_no_more() {
    let (world, config) = prepared();
    let key = world.claim_key(ORDERS, "m");
    world.redis.set(&key, "c:foreign", 1_000);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("m")]);
    eventually("it is applied", || {
        if world
            .redis
            .get(&key)
            .is_none_or(|value| value.starts_with("c:"))
        {
            world.redis.set(&key, "c:foreign", 1_000);
        }
        world.db.effect_count() == 1
    });
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&["m"]);
}
