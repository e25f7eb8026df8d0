//! SIGKILL at every step of the pipeline, again and again: nothing is lost and
//! nothing takes effect twice. The effect table has no unique constraint.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;

use crate::common::{Config, Consumer, Dead, Msg, ORDERS, ORDERS_DEAD, RECORD_AMOUNT, World};
use serde_json::json;

const KILLS: u32 = 20;
const GOOD_PER_ROUND: u32 = 24;
/// Every so many good messages, one that the handler refuses.
const BAD_EVERY: u32 = 8;

fn config(world: &World) -> Config {
    let orders = Consumer::orders()
        .sql(RECORD_AMOUNT)
        .set("workers", 2)
        .set("batch_max", 8)
        .set("prefetch", 64)
        // These daemons die of the test, and not of any message.
        .set("max_deaths", 100)
        .set("claim.lease", "1200ms")
        .set("claim.renew_every", "300ms");
    world.config().consumer(orders)
}

fn good_id(round: u32, number: u32) -> String {
    format!("good-{round}-{number}")
}

fn bad_id(round: u32, number: u32) -> String {
    format!("bad-{round}-{number}")
}

/// The messages of one round: good ones, every other of them twice, and bad
/// ones between them.
fn publish_round(world: &World, round: u32) {
    let good = |number: u32| {
        let id = good_id(round, number);
        Msg::new(&id).json(&json!({ "amount": number }))
    };
    let mut messages = Vec::new();
    for number in 0..GOOD_PER_ROUND {
        messages.push(good(number));
        if number % 2 == 0 {
            messages.push(good(number));
        }
        if number % BAD_EVERY == 0 {
            let id = bad_id(round, number);
            messages.push(Msg::new(&id).json(&json!({ "amount": "poison" })));
        }
    }
    world.broker.send(ORDERS, messages);
}

/// Kills daemons at `failpoint`, then lets one finish, and looks at what is
/// left.
fn survives_kills_at(failpoint: &str, config: impl FnOnce(&World) -> Config) {
    let world = World::new();
    let config = config(&world);
    world.prepare(&config);
    for round in 0..KILLS {
        publish_round(&world, round);
        let nth = 1 + round % 2;
        let mut daemon = world.daemon(&config).dies_at(failpoint, nth).start();
        daemon.wait_until_killed();
    }
    world.drain(&config, ORDERS);
    assert_none_lost_none_twice(&world);
}

fn assert_none_lost_none_twice(world: &World) {
    let rounds = || (0..KILLS).flat_map(|round| (0..GOOD_PER_ROUND).map(move |n| (round, n)));
    let good: Vec<String> = rounds().map(|(round, n)| good_id(round, n)).collect();
    world.assert_each_applied_once(&good);
    assert_eq!(world.db.ledger(ORDERS).len(), good.len());
    let bad: BTreeSet<String> = rounds()
        .filter(|(_, n)| n % BAD_EVERY == 0)
        .map(|(round, n)| bad_id(round, n))
        .collect();
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, bad.len());
    let ids: BTreeSet<String> = dead
        .iter()
        .filter_map(Dead::id)
        .map(str::to_owned)
        .collect();
    assert_eq!(ids, bad, "the bad ones came to rest, and they alone");
    let failures = world.db.failures(ORDERS);
    let journaled: BTreeSet<String> = failures.into_iter().filter_map(|f| f.message_id).collect();
    assert_eq!(journaled, bad, "each of them with its reason");
}

#[test]
fn nothing_is_lost_or_applied_twice_when_killed_after_receiving() {
    survives_kills_at("received", config);
}

#[test]
fn nothing_is_lost_or_applied_twice_when_killed_after_claiming() {
    survives_kills_at("claimed", config);
}

#[test]
fn nothing_is_lost_or_applied_twice_when_killed_after_recording() {
    survives_kills_at("recorded", config);
}

#[test]
fn nothing_is_lost_or_applied_twice_when_killed_after_applying() {
    survives_kills_at("applied", config);
}

#[test]
fn nothing_is_lost_or_applied_twice_when_killed_after_committing() {
    survives_kills_at("committed", config);
}

#[test]
fn nothing_is_lost_or_applied_twice_when_killed_after_marking() {
    survives_kills_at("marked", config);
}

#[test]
fn nothing_is_lost_or_applied_twice_when_killed_after_settling() {
    survives_kills_at("settled", config);
}

#[test]
fn nothing_is_lost_or_applied_twice_when_killed_after_journaling() {
    survives_kills_at("journaled", config);
}

#[test]
fn nothing_is_lost_or_applied_twice_when_killed_after_committing_without_redis() {
    survives_kills_at("committed", |world| {
        config(world).set("redis.enabled", false)
    });
}

#[test]
fn nothing_is_lost_or_applied_twice_when_one_of_two_daemons_is_killed() {
    let world = World::new();
    let config = config(&world);
    world.prepare(&config);
    let survivor = world.run(&config);
    for round in 0..KILLS {
        let failpoint = ["claimed", "applied", "committed", "settled"][round as usize % 4];
        let mut daemon = world.daemon(&config).dies_at(failpoint, 1).start();
        // What the last round left may kill it before this one is there.
        daemon.wait_until_consuming_or_killed();
        publish_round(&world, round);
        daemon.wait_until_killed();
    }
    world.drain_with(survivor, &config, ORDERS);
    assert_none_lost_none_twice(&world);
}
