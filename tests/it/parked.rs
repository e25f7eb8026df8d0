//! Deliveries whose claim another process holds: bounded, looked at again on
//! time, and given back on a stop.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::time::{Duration, Instant};

use crate::common::{Config, Consumer, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered_ids};

const MINUTE_MS: u64 = 60_000;
const FOREIGN: &str = "c:foreign";

/// Waits for claims as long as this file's.
fn patient() -> Consumer {
    Consumer::orders().set("claim.lease", "15m")
}

fn prepared(orders: Consumer) -> (World, Config) {
    let world = World::new();
    let config = world.config().consumer(orders);
    world.prepare(&config);
    (world, config)
}

/// Has another process hold the claim of each of `ids`.
fn claim_for_another(world: &World, ids: &[String], ttl_ms: u64) {
    for id in ids {
        let key = world.claim_key(ORDERS, id);
        world.redis.set(&key, FOREIGN, ttl_ms);
    }
}

fn send(world: &World, ids: &[String]) {
    world.broker.send(ORDERS, ids.iter().map(|id| Msg::new(id)));
}

#[test]
fn no_more_deliveries_are_parked_than_the_prefetch_allows() {
    let (world, config) = prepared(patient().set("prefetch", 10).set("batch_max", 10));
    let ids = numbered_ids("held", 50);
    claim_for_another(&world, &ids, 10 * MINUTE_MS);
    send(&world, &ids);
    let daemon = world.run(&config);
    eventually("ten are taken", || world.broker.ready(ORDERS) <= 40);
    // A few looks later it holds no more, and the stop gives all of them back.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(world.broker.ready(ORDERS), 40);
    daemon.stop();
    eventually("they are in the queue again", || {
        world.broker.ready(ORDERS) == 50
    });
    assert_eq!(world.db.effect_count(), 0);
    world.redis.flush();
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_parked_delivery_is_applied_soon_after_the_claim_is_gone() {
    let (world, config) = prepared(patient().set("claim.recheck_every", "200ms"));
    let ids = numbered_ids("held", 5);
    claim_for_another(&world, &ids, 10 * MINUTE_MS);
    let daemon = world.run(&config);
    send(&world, &ids);
    eventually("they are taken", || world.broker.ready(ORDERS) == 0);
    for id in &ids {
        assert_eq!(world.db.effect_count(), 0);
        let key = world.claim_key(ORDERS, id);
        assert_eq!(world.redis.get(&key).as_deref(), Some(FOREIGN));
    }
    world.redis.flush();
    let since = Instant::now();
    world.wait_for_effects(5);
    let waited = since.elapsed();
    assert!(waited < Duration::from_secs(5), "took {waited:?}");
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
}

#[test]
fn parked_deliveries_are_looked_at_while_others_flow() {
    let (world, config) = prepared(patient().set("workers", 1).set("batch_max", 1));
    let held = numbered_ids("held", 5);
    claim_for_another(&world, &held, 10 * MINUTE_MS);
    let daemon = world.run(&config);
    send(&world, &held);
    eventually("they are taken", || world.broker.ready(ORDERS) == 0);
    let others = numbered_ids("m", 1_000);
    send(&world, &others);
    for id in &held {
        world.redis.set(&world.claim_key(ORDERS, id), FOREIGN, 1);
    }
    // In time, and not only when nothing else is left.
    let mut before = 0;
    eventually("they are applied", || {
        before = world.db.effect_count();
        let effects = world.db.effects();
        held.iter().all(|id| effects.contains_key(id))
    });
    assert!(before < 1_000, "they were applied after all others");
    world.wait_for_effects(1_005);
    world.drain_with(daemon, &config, ORDERS);
    let all: Vec<String> = held.into_iter().chain(others).collect();
    world.assert_each_applied_once(&all);
}

#[test]
fn a_claim_of_a_killed_process_delays_its_message_by_no_more_than_the_lease() {
    let orders = Consumer::orders()
        .set("claim.lease", "3s")
        .set("claim.renew_every", "1s")
        .sql("insert into effect (message_id) select message_id from message");
    let (world, config) = prepared(orders);
    // The daemon stands still with its claims, waiting for this table.
    let blocker = crate::common::Database::connect(world.postgres_url());
    let mut config_slow = config.clone();
    for timeout in ["lock", "statement", "idle_in_transaction"] {
        config_slow = config_slow.set(&format!("postgres.{timeout}_timeout"), "60s");
    }
    let ids = numbered_ids("m", 20);
    blocker.execute("begin; lock table effect");
    let daemon = world.run(&config_slow);
    send(&world, &ids);
    // A worker stands still with what it took first; the rest waits unclaimed.
    eventually("some are claimed", || !world.redis.claims().is_empty());
    daemon.kill();
    let killed = Instant::now();
    blocker.execute("rollback");
    let daemon = world.run(&config);
    world.wait_for_effects(20);
    let delay = killed.elapsed();
    assert!(
        delay < Duration::from_secs(3) + Duration::from_secs(4),
        "the lease is 3 s, the delay was {delay:?}"
    );
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
}

#[test]
fn a_claim_delays_nothing_that_the_ledger_knows_already() {
    let orders = Consumer::orders().set("claim.recheck_every", "60s");
    let (world, config) = prepared(orders);
    let ids = numbered_ids("m", 20);
    send(&world, &ids);
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&ids);
    claim_for_another(&world, &ids, 10 * MINUTE_MS);
    let daemon = world.run(&config);
    send(&world, &ids);
    eventually("they are taken", || world.broker.ready(ORDERS) == 0);
    let since = Instant::now();
    let path = format!("/api/queues/{}/{ORDERS}", world.name());
    eventually("they are acked", || {
        let queue = world.management.get(&path);
        queue["messages_ready"] == 0 && queue["messages_unacknowledged"] == 0
    });
    let waited = since.elapsed();
    // The statistics are some seconds old.
    assert!(waited < Duration::from_secs(30), "took {waited:?}");
    daemon.kill();
    assert!(world.broker.is_empty(ORDERS), "they were acked");
    world.assert_each_applied_once(&ids);
}

#[test]
fn another_body_under_an_id_that_is_claimed_and_applied_is_a_conflict_at_once() {
    let orders = Consumer::orders().set("claim.recheck_every", "60s");
    let (world, config) = prepared(orders);
    let ids = numbered_ids("m", 1);
    send(&world, &ids);
    world.drain(&config, ORDERS);
    claim_for_another(&world, &ids, 10 * MINUTE_MS);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("m-0").body("other")]);
    let since = Instant::now();
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    assert!(since.elapsed() < Duration::from_secs(30));
    assert_eq!(dead[0].body, b"other");
    assert_eq!(world.db.reasons(ORDERS), ["id-conflict"]);
    daemon.stop();
    world.assert_each_applied_once(&ids);
}
