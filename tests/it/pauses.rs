//! What a pause costs: nothing, however small the prefetch, however it ends,
//! and whatever is in the queue. And what must not hold the others up.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use crate::common::raw::{self, Properties, RawClient};
use crate::common::{
    Config, Consumer, Daemon, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered, numbered_ids,
};

fn lose_table(world: &World) {
    world.db.execute("alter table effect rename to gone");
}

fn restore_table(world: &World) {
    world.db.execute("alter table gone rename to effect");
}

fn assert_none_harmed(world: &World, daemon: Daemon, config: &Config, count: usize) {
    world.wait_for_effects(i64::try_from(count).unwrap());
    world.drain_with(daemon, config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", count));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_consumer_with_a_small_prefetch_pauses_once_and_harms_no_message() {
    let world = World::new();
    let orders = Consumer::orders()
        .set("prefetch", 4)
        .set("batch_max", 4)
        .set("topology.delivery_limit", 5);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    lose_table(&world);
    world.broker.send(ORDERS, numbered("m", 50));
    let daemon = world.run(&config);
    daemon.wait_for_log(&["paused", "42P01"]);
    eventually("it holds few and goes on trying", || {
        daemon.count_logged(&["still waiting"]) >= 12
    });
    assert_eq!(daemon.times_consuming(ORDERS), 2, "one pause");
    restore_table(&world);
    assert_none_harmed(&world, daemon, &config, 50);
}

#[test]
fn what_waits_for_the_world_is_not_blamed_when_its_daemon_is_killed() {
    let world = World::new();
    let orders = Consumer::orders().set("max_deaths", 4);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    lose_table(&world);
    world.broker.send(ORDERS, numbered("m", 3));
    for round in 0..6 {
        let daemon = world.run(&config);
        daemon.wait_for_log(&["paused", "42P01"]);
        // Between two tries: what it is just trying is marked.
        daemon.freeze_when("nothing is marked", || {
            world.db.count("select count(*) from ackonce.suspect") == 0
        });
        println!("killed for the {}th time", round + 1);
        daemon.kill();
    }
    restore_table(&world);
    assert_none_harmed(&world, world.run(&config), &config, 3);
}

#[test]
fn attempts_that_all_time_out_pause_the_consumer_after_as_many_as_the_breaker_allows() {
    let world = World::new();
    world.db.execute("create table slow (seconds float8)");
    world.db.execute("insert into slow values (60)");
    let orders = Consumer::orders()
        .set("retry.breaker", 3)
        .set("workers", 1)
        .sql(
            "insert into effect (message_id) select message_id from message, slow \
             where pg_sleep(seconds) is not null",
        );
    let config = world
        .config()
        .consumer(orders)
        .set("postgres.statement_timeout", "200ms");
    world.prepare(&config);
    world.broker.send(ORDERS, numbered("m", 100));
    let daemon = world.run(&config);
    daemon.wait_for_log(&["paused", "57014"]);
    let tried = world
        .db
        .count("select count(distinct message_id) from ackonce.failure");
    assert!(tried <= 8, "{tried} were tried before the pause");
    world.db.execute("update slow set seconds = 0");
    assert_none_harmed(&world, daemon, &config, 100);
}

#[test]
fn a_pause_harms_no_message_that_has_one_attempt() {
    let world = World::new();
    world.db.execute("create table wanted (id int primary key)");
    world
        .db
        .execute("alter table effect add column wanted int references wanted");
    let orders = Consumer::orders()
        .set("retry.breaker", 5)
        .set("topology.delivery_limit", 5)
        .max_attempts(1)
        .sql("insert into effect (message_id, wanted) select message_id, 1 from message");
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world.broker.send(ORDERS, numbered("m", 100));
    let daemon = world.run(&config);
    daemon.wait_for_log(&["paused", "23503"]);
    eventually("it goes on trying", || {
        daemon.count_logged(&["still waiting"]) >= 16
    });
    world.db.execute("insert into wanted values (1)");
    // What failed before the pause had used its attempt up.
    eventually("the others are applied", || {
        let dead = world.broker.dead(ORDERS_DEAD).len();
        world.db.effects().len() + dead == 100
    });
    assert!(world.broker.dead(ORDERS_DEAD).len() < 30);
    assert!(
        world
            .broker
            .dead(ORDERS_DEAD)
            .iter()
            .all(|dead| dead.death().as_deref() == Some("rejected"))
    );
    daemon.stop();
}

/// Fails at the first attempt, and has so many headers that its copy would
/// take minutes to encode.
fn send_with_many_headers(world: &World) {
    let fields: Vec<Vec<u8>> = (0..15_000)
        .map(|n| raw::field(format!("{n:x}").as_bytes(), b'V', &[]))
        .collect();
    let properties = Properties::new(b"heavy").headers(&fields);
    RawClient::connect(world.amqp_url()).publish("", ORDERS.as_bytes(), &properties, b"{}");
}

fn assert_many_headers_hold_nobody_up(orders: Consumer) {
    let world = World::new();
    let orders = orders.failures("transient", &["22"]).sql(
        "insert into effect (message_id) select message_id from message \
         where 1 / (attempt - 1) > 0",
    );
    let config = world.config().consumer(orders);
    world.prepare(&config);
    send_with_many_headers(&world);
    world.broker.send(ORDERS, [Msg::new("light")]);
    let daemon = world.run(&config);
    world.wait_for_effects(1);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    assert_eq!(dead[0].id(), Some("heavy"));
    assert_eq!(dead[0].body, b"{}");
    assert!(!daemon.logged(&["copies of messages wait"]));
    daemon.stop();
    world.assert_each_applied_once(&["light"]);
}

#[test]
fn a_message_with_too_many_headers_for_a_copy_is_rejected_and_holds_nobody_up() {
    assert_many_headers_hold_nobody_up(Consumer::orders().max_attempts(2));
}

#[test]
fn a_dead_letter_with_too_many_headers_is_published_without_them() {
    assert_many_headers_hold_nobody_up(
        Consumer::orders()
            .max_attempts(2)
            .set("topology.queue_type", "classic"),
    );
}

/// Runs daemons, each until it dies of the message `bad`, until one does not.
fn dies_until_it_is_quarantined(queue_type: &str) {
    let world = World::new();
    let orders = Consumer::orders().set("topology.queue_type", queue_type);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let mut messages = numbered("m", 300);
    messages.insert(100, Msg::new("bad").body("poison pill"));
    world.broker.send(ORDERS, messages);
    for deaths in 1..=5 {
        let mut daemon = world.daemon(&config).dies_of("poison pill").start();
        daemon.wait_until_killed();
        println!("died {deaths} times");
    }
    let daemon = world.daemon(&config).dies_of("poison pill").start();
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    assert_eq!(dead[0].id(), Some("bad"));
    assert_eq!(world.db.reasons(ORDERS), ["crash-loop"]);
    world.wait_for_effects(300);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 300));
    assert_eq!(world.db.count("select count(*) from ackonce.suspect"), 0);
}

#[test]
fn what_kills_its_worker_is_quarantined_on_a_quorum_queue() {
    dies_until_it_is_quarantined("quorum");
}

#[test]
fn what_kills_its_worker_is_quarantined_on_a_classic_queue() {
    dies_until_it_is_quarantined("classic");
}
