//! The same id with another body is another message: whatever their order and
//! timing, one of the two is applied and the other is dead-lettered as
//! `id-conflict`.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};

use crate::common::{Config, Consumer, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered_ids};
use sqlx::Row;

/// Notes the body that was applied, and fails with SQLSTATE `23503` as long as
/// `attempt` is not above the number that the body asks for.
const NOTE_BODY: &str = "insert into effect (message_id, note) \
    select fail_until(message_id, attempt, (body->>'failures')::int), body->>'text' from message";

/// Every step at which a worker can be frozen or killed.
const STEPS: [&str; 6] = [
    "received",
    "claimed",
    "recorded",
    "applied",
    "committed",
    "marked",
];

struct Stage {
    world: World,
    config: Config,
}

impl Stage {
    fn new(change: impl FnOnce(Consumer) -> Consumer) -> Self {
        Self::with(change, |config| config)
    }

    fn without_redis() -> Self {
        Self::with(|orders| orders, |config| config.set("redis.enabled", false))
    }

    fn with(
        change: impl FnOnce(Consumer) -> Consumer,
        configure: impl FnOnce(Config) -> Config,
    ) -> Self {
        let world = World::new();
        world.db.execute(
            "create function fail_until(id text, attempt int, failures int) returns text \
             language plpgsql as $$ begin if attempt <= failures then \
             raise exception 'not yet' using errcode = '23503'; end if; return id; end $$",
        );
        let orders = Consumer::orders()
            .sql(NOTE_BODY)
            .set("claim.lease", "400ms")
            .set("claim.renew_every", "100ms")
            .backoff(&["200ms"]);
        let config = configure(world.config().consumer(change(orders)));
        world.prepare(&config);
        Self { world, config }
    }

    fn send(&self, texts: &[&str]) {
        let messages: Vec<Msg> = texts.iter().map(|text| message("m", text, 0)).collect();
        self.world.broker.send(ORDERS, messages);
    }

    fn wait_until_taken(&self) {
        eventually("it is taken", || self.world.broker.ready(ORDERS) == 0);
    }

    /// Lets daemons finish, and panics unless one of `one` and `other` took
    /// effect and the other one came to rest. Which one took effect.
    fn finish(&self) -> String {
        self.world.drain(&self.config, ORDERS);
        self.world.assert_each_applied_once(&["m"]);
        let applied = self.world.db.texts("select note from effect").remove(0);
        let dead = self.world.broker.wait_for_dead(ORDERS_DEAD, 1);
        assert_eq!(dead.len(), 1);
        let other = ["one", "other"].into_iter().find(|text| *text != applied);
        assert_eq!(text_of(&dead[0].body), other.unwrap());
        let reasons: BTreeSet<String> = self.world.db.reasons(ORDERS).into_iter().collect();
        let last = reasons.iter().filter(|reason| !reason.is_empty());
        assert_eq!(last.collect::<Vec<_>>(), ["id-conflict"]);
        applied
    }
}

fn message(id: &str, text: &str, failures: u32) -> Msg {
    Msg::new(id).json(&serde_json::json!({ "text": text, "failures": failures }))
}

fn text_of(body: &[u8]) -> String {
    let body: serde_json::Value = serde_json::from_slice(body).unwrap();
    body["text"].as_str().unwrap().to_owned()
}

#[test]
fn another_body_in_the_same_batch_is_a_conflict() {
    let stage = Stage::new(|orders| orders.set("workers", 1));
    stage.send(&["one", "other"]);
    assert_eq!(stage.finish(), "one");
}

#[test]
fn another_body_after_the_claim_has_expired_is_a_conflict() {
    let stage = Stage::new(|orders| orders.set("claim.done_ttl", "1s"));
    stage.send(&["one"]);
    stage.world.drain(&stage.config, ORDERS);
    eventually("Redis has forgotten it", || {
        stage.world.redis.keys().is_empty()
    });
    stage.send(&["other"]);
    assert_eq!(stage.finish(), "one");
}

#[test]
fn another_body_after_redis_was_flushed_is_a_conflict() {
    let stage = Stage::new(|orders| orders);
    stage.send(&["one"]);
    stage.world.drain(&stage.config, ORDERS);
    assert_eq!(stage.world.redis.flush(), 1);
    stage.send(&["other"]);
    assert_eq!(stage.finish(), "one");
}

#[test]
fn another_body_without_redis_is_a_conflict() {
    let stage = Stage::without_redis();
    stage.send(&["one", "other"]);
    stage.finish();
    let stage = Stage::without_redis();
    stage.send(&["one"]);
    stage.world.drain(&stage.config, ORDERS);
    stage.send(&["other"]);
    assert_eq!(stage.finish(), "one");
}

#[test]
fn another_body_while_the_first_is_in_work_is_a_conflict() {
    for step in STEPS {
        eprintln!("{step}");
        let stage = Stage::new(|orders| orders.set("workers", 2));
        let gate = stage.world.gate();
        let daemon = stage.world.daemon(&stage.config);
        let daemon = daemon.pauses_at(step, 1, &gate).start();
        stage.send(&["one"]);
        gate.wait_until_hit();
        stage.send(&["other"]);
        stage.wait_until_taken();
        gate.open();
        daemon.stop();
        stage.finish();
    }
}

#[test]
fn another_body_while_the_first_is_in_work_and_redis_is_flushed_is_a_conflict() {
    for step in STEPS {
        eprintln!("{step}");
        let stage = Stage::new(|orders| orders.set("workers", 2));
        let gate = stage.world.gate();
        let daemon = stage.world.daemon(&stage.config);
        let daemon = daemon.pauses_at(step, 1, &gate).start();
        stage.send(&["one"]);
        gate.wait_until_hit();
        stage.world.redis.flush();
        stage.send(&["other"]);
        stage.wait_until_taken();
        stage.world.redis.flush();
        gate.open();
        daemon.stop();
        stage.finish();
    }
}

/// Has one daemon hold the first body at `step` while another one gets the
/// second body. It may see to it before the first goes on, or wait for it.
fn conflict_of_two_daemons(stage: &Stage, step: &str) {
    let gate = stage.world.gate();
    let first = stage.world.daemon(&stage.config);
    let first = first.pauses_at(step, 1, &gate).start();
    stage.send(&["one"]);
    gate.wait_until_hit();
    let second = stage.world.run(&stage.config);
    stage.send(&["other"]);
    stage.wait_until_taken();
    gate.open();
    let dead = || stage.world.broker.dead(ORDERS_DEAD).len();
    eventually("both have come to an end", || {
        stage.world.db.effect_count() > 0 && dead() > 0
    });
    first.stop();
    second.stop();
    stage.finish();
}

#[test]
fn another_body_at_another_daemon_is_a_conflict() {
    for step in STEPS {
        eprintln!("{step}");
        // The first daemon holds one message, and so cannot take the other.
        let single = |orders: Consumer| {
            let orders = orders.set("workers", 1).set("batch_max", 1);
            orders.set("prefetch", 1)
        };
        conflict_of_two_daemons(&Stage::new(single), step);
        let without_redis = |config: Config| config.set("redis.enabled", false);
        conflict_of_two_daemons(&Stage::with(single, without_redis), step);
    }
}

#[test]
fn another_body_while_the_first_waits_for_its_retry_is_applied_and_the_first_a_conflict() {
    let stage = Stage::new(|orders| orders.backoff(&["1s"]));
    let daemon = stage.world.run(&stage.config);
    let broker = &stage.world.broker;
    broker.send(ORDERS, [message("m", "one", 1)]);
    eventually("it waits", || broker.ready("orders.retry.1s") == 1);
    stage.send(&["other"]);
    stage.world.wait_for_effects(1);
    eventually("it came back", || !broker.dead(ORDERS_DEAD).is_empty());
    daemon.stop();
    assert_eq!(stage.finish(), "other");
}

#[test]
fn two_bodies_that_both_wait_for_their_retry_are_a_conflict() {
    let stage = Stage::new(|orders| orders);
    let daemon = stage.world.run(&stage.config);
    let broker = &stage.world.broker;
    broker.send(ORDERS, [message("m", "one", 2), message("m", "other", 1)]);
    eventually("both have come to an end", || {
        !broker.dead(ORDERS_DEAD).is_empty() && stage.world.db.effect_count() == 1
    });
    daemon.stop();
    stage.finish();
}

#[test]
fn another_body_after_a_crash_at_any_step_is_a_conflict_in_either_order() {
    for step in STEPS {
        for texts in [["one", "other"], ["other", "one"]] {
            eprintln!("{step} {texts:?}");
            let stage = Stage::new(|orders| orders.set("workers", 1));
            stage.send(&texts[..1]);
            let mut daemon = stage.world.daemon(&stage.config).dies_at(step, 1).start();
            daemon.wait_until_killed();
            // What the dead one held may come before or after this.
            stage.send(&texts[1..]);
            stage.finish();
        }
    }
}

#[test]
fn of_a_body_that_kills_and_one_that_does_not_one_is_applied() {
    let stage = Stage::new(|orders| orders.set("max_deaths", 3));
    let world = &stage.world;
    stage.send(&["one"]);
    for _ in 0..3 {
        let mut daemon = world.daemon(&stage.config).dies_of("one").start();
        daemon.wait_until_killed();
    }
    stage.send(&["other"]);
    let daemon = world.daemon(&stage.config).dies_of("one").start();
    world.wait_for_effects(1);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    assert_eq!(text_of(&dead[0].body), "one");
    daemon.stop();
    world.assert_each_applied_once(&["m"]);
    assert_eq!(world.db.texts("select note from effect"), ["other"]);
}

#[test]
fn of_many_bodies_under_many_ids_one_each_is_applied() {
    const IDS: usize = 200;
    const BODIES: [&str; 3] = ["one", "other", "third"];
    let stage = Stage::new(|orders| orders.set("workers", 4).set("batch_max", 7));
    let world = &stage.world;
    let ids = numbered_ids("m", IDS);
    // Every body twice, near its namesakes and far from them.
    let near = ids.iter().flat_map(|id| BODIES.map(|text| (id, text)));
    let far = BODIES
        .iter()
        .rev()
        .flat_map(|text| ids.iter().map(move |id| (id, *text)));
    let all: Vec<Msg> = near
        .chain(far)
        .map(|(id, text)| message(id, text, 0))
        .collect();
    let first = world.run(&stage.config);
    let second = world.run(&stage.config);
    world.broker.send(ORDERS, all);
    world.wait_for_effects(IDS as i64);
    world.broker.wait_for_dead(ORDERS_DEAD, 4 * IDS);
    second.stop();
    world.drain_with(first, &stage.config, ORDERS);
    world.assert_each_applied_once(&ids);
    let applied: BTreeMap<String, String> = world
        .db
        .rows("select message_id, note from effect")
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    let mut dead: Vec<(String, String)> = world
        .broker
        .dead(ORDERS_DEAD)
        .iter()
        .map(|dead| (dead.id().unwrap().to_owned(), text_of(&dead.body)))
        .collect();
    let mut expected: Vec<(String, String)> = ids
        .iter()
        .flat_map(|id| BODIES.map(|text| (id.clone(), text.to_owned())))
        .filter(|(id, text)| applied[id] != *text)
        .flat_map(|conflict| [conflict.clone(), conflict])
        .collect();
    dead.sort_unstable();
    expected.sort_unstable();
    assert_eq!(dead, expected, "twice each of the others, and no other");
}
