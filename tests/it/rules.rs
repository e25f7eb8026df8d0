//! The rules of the design: each test fails when its rule is broken.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use crate::common::{
    Config, Consumer, Cut, Msg, ORDERS, ORDERS_DEAD, Proxy, RECORD_AMOUNT, World, eventually,
    numbered, numbered_ids,
};
use serde_json::json;

const MINUTE_MS: u64 = 60_000;

/// One worker that takes one message after the other, so that steps come in a
/// known order.
fn one_by_one(world: &World) -> Config {
    let orders = Consumer::orders()
        .set("workers", 1)
        .set("batch_max", 1)
        .set("prefetch", 1);
    world.config().consumer(orders)
}

/// One worker.
fn one_worker(world: &World) -> Config {
    world
        .config()
        .consumer(Consumer::orders().set("workers", 1))
}

/// One worker whose lease allows for claims as long as this file's.
fn patient(world: &World) -> Config {
    let orders = Consumer::orders()
        .set("workers", 1)
        .set("claim.lease", "15m");
    world.config().consumer(orders)
}

// Rule 1: ack only what is known to be committed.

/// Kills a daemon at `failpoint` with one message, and returns how many
/// effects were left by then.
fn effects_when_killed_at(failpoint: &str) -> i64 {
    let world = World::new();
    let config = one_worker(&world);
    world.prepare(&config);
    world.broker.send(ORDERS, [Msg::new("m")]);
    let mut daemon = world.daemon(&config).dies_at(failpoint, 1).start();
    daemon.wait_until_killed();
    let effects = world.db.effect_count();
    assert_eq!(
        i64::try_from(world.db.ledger(ORDERS).len()).unwrap(),
        effects
    );
    eventually("the message is back in the queue", || {
        world.broker.ready(ORDERS) == 1
    });
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&["m"]);
    assert!(world.broker.is_empty(ORDERS_DEAD));
    effects
}

#[test]
fn a_message_redelivered_after_its_commit_is_not_applied_again() {
    assert_eq!(effects_when_killed_at("committed"), 1);
    assert_eq!(effects_when_killed_at("marked"), 1);
}

#[test]
fn a_message_whose_worker_died_before_the_commit_is_applied_later() {
    assert_eq!(effects_when_killed_at("claimed"), 0);
    assert_eq!(effects_when_killed_at("recorded"), 0);
    assert_eq!(effects_when_killed_at("applied"), 0);
}

// Rule 2: the ledger is the truth, Redis is a hint.

#[test]
fn a_message_is_not_applied_again_when_redis_has_forgotten_everything() {
    let world = World::new();
    let config = world.orders();
    world.prepare(&config);
    for _ in 0..3 {
        world.broker.send(ORDERS, numbered("m", 50));
        world.drain(&config, ORDERS);
        assert!(world.redis.flush() >= 50, "there was something to forget");
    }
    world.assert_each_applied_once(&numbered_ids("m", 50));
}

#[test]
fn a_claim_held_by_another_parks_the_message_and_never_acks_it() {
    let world = World::new();
    let config = patient(&world);
    world.prepare(&config);
    let key = world.claim_key(ORDERS, "held");
    world.redis.set(&key, "c:foreign", 10 * MINUTE_MS);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("held")]);
    eventually("it is delivered", || world.broker.ready(ORDERS) == 0);
    for number in 0..20 {
        world
            .broker
            .send(ORDERS, [Msg::new(&format!("m-{number}"))]);
        world.wait_for_effects(number + 1);
    }
    world.assert_each_applied_once(&numbered_ids("m", 20));
    daemon.stop();
    assert!(
        !world.broker.is_empty(ORDERS),
        "it was given back, not acked"
    );
    let claim = world.redis.get(&key);
    assert_eq!(
        claim.as_deref(),
        Some("c:foreign"),
        "the claim is another's"
    );
    assert!(world.redis.ttl_ms(&key) > 60_000, "and its lease too");

    let daemon = world.run(&config);
    eventually("it is delivered", || world.broker.ready(ORDERS) == 0);
    world.redis.set(&key, "c:foreign", 1);
    world.wait_for_effects(21);
    world.drain_with(daemon, &config, ORDERS);
    let mut ids = numbered_ids("m", 20);
    ids.push("held".into());
    world.assert_each_applied_once(&ids);
}

// Rule 3: ledger row and effect commit together.

#[test]
fn a_handler_that_fails_after_its_insert_leaves_neither_row_nor_effect() {
    let world = World::new();
    let orders = Consumer::orders().sql(
        "insert into effect (message_id) select message_id from message; \
         select 1 / (body->>'amount')::int from message",
    );
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let amount = |id: &str, amount: i32| Msg::new(id).json(&json!({ "amount": amount }));
    let messages = [amount("a", 1), amount("bad", 0), amount("b", 2)];
    world.broker.send(ORDERS, messages);
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&["a", "b"]);
    assert_eq!(world.db.ledger(ORDERS), ["a", "b"]);
    let failures = world.db.failures(ORDERS);
    assert_eq!(failures.len(), 1);
    assert_eq!(failures[0].code.as_deref(), Some("22012"));
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    assert_eq!(dead[0].id(), Some("bad"));
}

#[test]
fn workers_that_record_the_same_ids_in_any_order_do_not_deadlock() {
    let world = World::new();
    let orders = Consumer::orders().set("batch_max", 64).set("workers", 8);
    let config = world.config().consumer(orders).set("redis.enabled", false);
    world.prepare(&config);
    let ids = numbered_ids("m", 1_000);
    let there = ids.iter().map(|id| Msg::new(id));
    let back = ids.iter().rev().map(|id| Msg::new(id));
    let copies: Vec<Msg> = there.chain(back).collect();
    world.broker.send(ORDERS, copies.iter().cloned());
    world.broker.send(ORDERS, copies);
    let other = world.run(&config);
    let daemon = world.run(&config);
    world.wait_for_effects(1_000);
    other.stop();
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
    let deadlocks = "select deadlocks from pg_stat_database where datname = current_database()";
    assert_eq!(world.db.count(deadlocks), 0);
}

#[test]
fn a_worker_paused_in_its_transaction_neither_blocks_its_successor_nor_applies_twice() {
    let world = World::new();
    let config = one_by_one(&world).set("redis.enabled", false);
    world.prepare(&config);
    let gate = world.gate();
    let paused = world.daemon(&config).pauses_at("applied", 1, &gate).start();
    world.broker.send(ORDERS, [Msg::new("m")]);
    gate.wait_until_hit();
    let successor = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    gate.open();
    world.drain_with(paused, &config, ORDERS);
    successor.stop();
    assert!(world.broker.is_empty(ORDERS));
    world.assert_each_applied_once(&["m"]);
}

#[test]
fn a_worker_that_outlives_its_lease_does_not_apply_twice() {
    let world = World::new();
    let config = one_by_one(&world);
    world.prepare(&config);
    let gate = world.gate();
    let paused = world.daemon(&config).pauses_at("claimed", 1, &gate).start();
    world.broker.send(ORDERS, [Msg::new("m")]);
    gate.wait_until_hit();
    assert_eq!(world.redis.flush(), 1, "its claim is lost");
    let successor = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    gate.open();
    world.drain_with(paused, &config, ORDERS);
    successor.stop();
    assert!(world.broker.is_empty(ORDERS));
    world.assert_each_applied_once(&["m"]);
}

// Rule 4: a commit whose reply never came is looked up.

fn survives_cuts(cut: Cut) {
    const CUTS: usize = 5;
    let world = World::new();
    world.prepare(&one_worker(&world));
    let proxy = Proxy::before(world.postgres_url(), 5432);
    let orders = Consumer::orders().set("batch_max", 10).set("workers", 2);
    let config = world
        .config()
        .set("postgres.url", proxy.url())
        .consumer(orders);
    let daemon = world.run(&config);
    proxy.cut_commits(cut, CUTS, 2);
    world.broker.send(ORDERS, numbered("m", 300));
    proxy.wait_for_cuts(CUTS);
    world.wait_for_effects(300);
    world.drain_with(daemon, &config, ORDERS);
    assert_eq!(proxy.cuts(), CUTS);
    world.assert_each_applied_once(&numbered_ids("m", 300));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_commit_whose_reply_is_lost_is_not_applied_again() {
    survives_cuts(Cut::BeforeReply);
}

#[test]
fn a_commit_that_never_arrived_is_applied_later() {
    survives_cuts(Cut::BeforeCommit);
}

// Rule 5: a claim is released and renewed only with its own token.

/// Has a message rejected whose claim another took while its worker stood
/// still, if `takeover`. What is in Redis then.
fn claim_after_a_rejection(takeover: bool) -> Option<String> {
    let world = World::new();
    let orders = Consumer::orders().set("workers", 1).sql(RECORD_AMOUNT);
    let config = world.config().consumer(orders);
    let gate = world.gate();
    let daemon = world.daemon(&config).pauses_at("claimed", 1, &gate).start();
    daemon.wait_until_consuming();
    let poison = Msg::new("m").json(&json!({"amount": "poison"}));
    world.broker.send(ORDERS, [poison]);
    gate.wait_until_hit();
    let key = world.claim_key(ORDERS, "m");
    let claim = world.redis.get(&key).unwrap();
    assert!(claim.starts_with("c:"), "the worker's claim: {claim}");
    if takeover {
        world.redis.set(&key, "c:foreign", MINUTE_MS);
    }
    gate.open();
    world.broker.wait_for_dead(ORDERS_DEAD, 1);
    daemon.stop();
    world.redis.get(&key)
}

#[test]
fn a_claim_is_released_only_by_who_made_it() {
    assert_eq!(claim_after_a_rejection(false), None);
    let foreign = claim_after_a_rejection(true);
    assert_eq!(foreign.as_deref(), Some("c:foreign"));
}

#[test]
fn a_claim_is_renewed_only_by_who_made_it() {
    let world = World::new();
    let config = one_worker(&world);
    let gate = world.gate();
    let daemon = world.daemon(&config).pauses_at("claimed", 1, &gate).start();
    daemon.wait_until_consuming();
    world.broker.send(ORDERS, [Msg::new("m")]);
    gate.wait_until_hit();
    let key = world.claim_key(ORDERS, "m");
    let (mut last, mut renewals) = (world.redis.ttl_ms(&key), 0);
    eventually("its own claim is renewed", || {
        let ttl = world.redis.ttl_ms(&key);
        assert!(ttl > 0, "the claim is kept");
        renewals += i32::from(ttl > last);
        last = ttl;
        renewals >= 3
    });
    world.redis.set(&key, "c:foreign", MINUTE_MS);
    eventually("three renewals were due", || {
        let ttl = world.redis.ttl_ms(&key);
        assert!(
            ttl > 50_000,
            "the lease of another's claim is left alone: {ttl} ms"
        );
        ttl < 58_000
    });
    gate.open();
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&["m"]);
}

// Rule 6: a settlement carries its connection's epoch.

#[test]
fn a_settlement_of_a_lost_connection_does_not_ack_another_message() {
    let world = World::new();
    let config = patient(&world);
    world.prepare(&config);
    let harness = connections(&world, 1);
    let gate = world.gate();
    let daemon = world
        .daemon(&config)
        .pauses_at("committed", 3, &gate)
        .start();
    daemon.wait_until_consuming();
    for (effects, id) in (1..).zip(["a", "b", "frozen"]) {
        world.broker.send(ORDERS, [Msg::new(id)]);
        world.wait_for_effects(effects);
    }
    gate.wait_until_hit();

    let mut closed = 0;
    for connection in connections(&world, harness.len() + 1) {
        if !harness.contains(&connection) {
            closed += usize::from(world.management.close_connection(&connection));
        }
    }
    assert!(closed > 0, "a connection was closed");
    eventually("the daemon has reconnected", || {
        daemon.times_consuming(ORDERS) == 2
    });
    // `frozen` held tag 3 and comes again as tag 1; now `held` gets tag 3,
    // and another's claim keeps it from being settled.
    let key = world.claim_key(ORDERS, "held");
    world.redis.set(&key, "c:foreign", 10 * MINUTE_MS);
    world.broker.send(ORDERS, [Msg::new("x"), Msg::new("held")]);
    eventually("they are delivered", || world.broker.ready(ORDERS) == 0);
    gate.open();
    world.wait_for_effects(4);
    // The only worker applies this after it gave up the stale settlement, and
    // an ack of this arrives after that one.
    world.broker.send(ORDERS, [Msg::new("marker")]);
    world.wait_for_effects(5);
    daemon.kill();
    world.redis.flush();
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&["a", "b", "frozen", "x", "held", "marker"]);
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

// Rule 9: the same id with another body is not a duplicate.

#[test]
fn another_body_under_an_applied_id_is_never_acked_as_a_duplicate() {
    let world = World::new();
    let config = world.orders();
    world.prepare(&config);
    world.broker.send(ORDERS, [Msg::new("m").body("one")]);
    world.drain(&config, ORDERS);
    for (count, body) in (1..).zip(["two", "three"]) {
        world.broker.send(ORDERS, [Msg::new("m").body(body)]);
        world.drain(&config, ORDERS);
        let dead = world.broker.wait_for_dead(ORDERS_DEAD, count);
        assert_eq!(dead[count - 1].body, body.as_bytes());
        assert_eq!(world.db.reasons(ORDERS), vec!["id-conflict"; count]);
        // With a mark in Redis or without, the ledger tells.
        assert_eq!(world.redis.flush(), 2 - count);
    }
    world.broker.send(ORDERS, [Msg::new("m").body("one")]);
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&["m"]);
    assert_eq!(world.broker.dead(ORDERS_DEAD).len(), 2);
}

// Rule 10, as far as one broken statement goes.

#[test]
fn a_missing_table_costs_no_message() {
    let world = World::new();
    let orders = Consumer::orders().sql(
        "insert into effect (message_id) select message_id from message; \
         insert into later (message_id) select message_id from message",
    );
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("m", 20));
    daemon.wait_for_log(&["42P01"]);
    assert_eq!(world.db.effect_count(), 0);
    assert!(world.broker.is_empty(ORDERS_DEAD));
    world.db.execute("create table later (message_id text)");
    world.wait_for_effects(20);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 20));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}
