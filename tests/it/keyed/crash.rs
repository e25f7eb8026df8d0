//! SIGKILL at every step of a keyed handler's way: nothing is lost, and called
//! twice is only what was being called, or was not completed yet.

use std::collections::BTreeSet;

use crate::common::{Dead, Msg, ORDERS, ORDERS_DEAD};
use crate::keyed::stage::Stage;

const KILLS: usize = 6;
const GOOD: usize = 12;
const WORKERS: usize = 2;
/// What is claimed ahead of the workers, at most.
const AHEAD: usize = 2;

fn id(kind: &str, round: usize, number: usize) -> String {
    format!("{kind}-{round}-{number}")
}

/// Good messages, every other of them twice, and one that the program refuses.
fn publish_round(stage: &Stage, round: usize) {
    let good: Vec<String> = (0..GOOD).map(|number| id("good", round, number)).collect();
    let twice = good.iter().step_by(2);
    let messages = good.iter().chain(twice).map(|id| Msg::new(id));
    let bad = Msg::new(&id("bad", round, 0)).body("exit 65");
    stage.world.broker.send(ORDERS, messages.chain([bad]));
}

fn survives_kills_at(failpoint: &str, redis: bool) {
    let stage = Stage::new();
    let world = &stage.world;
    let consumer = stage
        .consumer()
        .set("workers", WORKERS as i64)
        .set("batch_max", AHEAD as i64)
        .set("max_deaths", 100)
        .set("claim.lease", "600ms")
        .set("claim.renew_every", "100ms");
    let config = stage.with(consumer).set("redis.enabled", redis);
    world.prepare(&config);
    for round in 0..KILLS {
        publish_round(&stage, round);
        let nth = 1 + u32::try_from(round % 2).unwrap();
        let mut daemon = world.daemon(&config).dies_at(failpoint, nth).start();
        daemon.wait_until_killed();
    }
    world.drain(&config, ORDERS);

    let all = |kind: &'static str, count| {
        (0..KILLS).flat_map(move |round| (0..count).map(move |n| id(kind, round, n)))
    };
    let good: Vec<String> = all("good", GOOD).collect();
    stage.wait_until_done(&good);
    let repeated: usize = good.iter().map(|id| stage.ended(id) - 1).sum();
    let most = match failpoint {
        // At the kill, a call is under way in each thread, or has just ended.
        "called" => KILLS * WORKERS,
        // The kill comes in the middle of anything: all that is claimed may
        // have been called.
        _ => KILLS * (WORKERS + AHEAD),
    };
    assert!(repeated <= most, "{repeated} calls more than messages");
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, KILLS);
    let dead: BTreeSet<&str> = dead.iter().filter_map(Dead::id).collect();
    let bad: Vec<String> = all("bad", 1).collect();
    assert_eq!(dead, bad.iter().map(String::as_str).collect());
    assert_eq!(stage.claims(), 0);
}

#[test]
fn nothing_is_lost_when_killed_after_receiving() {
    survives_kills_at("received", false);
}

#[test]
fn nothing_is_lost_when_killed_after_the_claim_in_redis() {
    survives_kills_at("claimed", true);
}

#[test]
fn nothing_is_lost_when_killed_after_the_claim_in_the_ledger() {
    survives_kills_at("leased", true);
}

#[test]
fn nothing_is_lost_when_killed_after_the_call() {
    survives_kills_at("called", false);
}

#[test]
fn nothing_is_lost_when_killed_after_the_call_with_redis() {
    survives_kills_at("called", true);
}

#[test]
fn nothing_is_lost_when_killed_after_completing() {
    survives_kills_at("done", true);
}

#[test]
fn nothing_is_lost_when_killed_after_marking() {
    survives_kills_at("marked", true);
}

#[test]
fn nothing_is_lost_when_killed_after_settling() {
    survives_kills_at("settled", false);
}

#[test]
fn nothing_is_lost_when_killed_after_journaling() {
    survives_kills_at("journaled", false);
}
