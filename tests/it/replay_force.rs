//! Applying once more what was applied, knowingly: written down, and once.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use crate::common::letters::{judged, kill_messages, mend, wait_for_letters};
use crate::common::{Config, Ended, Msg, ORDERS, ORDERS_DEAD, Tool, World, eventually, numbered};

fn tool(world: &World, config: &Config, arguments: &[&str]) -> Tool {
    let all = [&["replay", ORDERS, "--yes", "--json"], arguments].concat();
    Tool::new(world, config, &all)
}

fn force(world: &World, config: &Config, ids: &[&str]) -> Tool {
    let mut arguments = vec!["--because", "the books say so"];
    for id in ids {
        arguments.extend(["--force-reprocess", id]);
    }
    tool(world, config, &arguments)
}

fn summary(ended: &Ended) -> serde_json::Value {
    ended.json().pop().expect("a summary")["summary"].clone()
}

/// Dead letters `m-0` to `m-2` whose messages were applied since: copies of
/// them came when the cause was mended.
fn applied_and_dead(world: &World, queue_type: &str, dead_letters: &str) -> Config {
    let config = judged(world, queue_type, dead_letters);
    kill_messages(world, &config, 3);
    mend(world);
    world.broker.send(ORDERS, numbered("m", 3));
    world.drain(&config, ORDERS);
    assert_eq!(world.db.effect_count(), 3);
    config
}

fn times_applied(world: &World, id: &str) -> i64 {
    world.db.effects().get(id).copied().unwrap_or(0)
}

fn is_forced_once_more(queue_type: &str, dead_letters: &str) {
    let world = World::new();
    let config = applied_and_dead(&world, queue_type, dead_letters);
    let key = world.claim_key(ORDERS, "m-1");
    assert!(
        world.redis.get(&key).unwrap().starts_with("d:"),
        "it has a mark"
    );
    let report = summary(&force(&world, &config, &["m-1"]).run().expect(0));
    assert_eq!(
        (&report["forgotten"], &report["replayed"]),
        (&1.into(), &1.into()),
        "{report}"
    );
    assert_eq!(world.redis.get(&key), None, "its mark is gone");
    assert_eq!(
        world.db.ledger(ORDERS),
        ["m-0", "m-2"],
        "so is its row, and no other"
    );
    world.drain(&config, ORDERS);
    for (id, times) in [("m-0", 1), ("m-1", 2), ("m-2", 1)] {
        assert_eq!(times_applied(&world, id), times, "{id}");
    }
    let written = world.db.texts(
        "select concat_ws('|', action, because, letters, message_id, operator <> '', filter) \
         from ackonce.desk_action a join ackonce.desk_letter l on l.action_id = a.id",
    );
    let filter = r#"--id "m-1""#;
    assert_eq!(
        written,
        [format!("force-reprocess|the books say so|1|m-1|t|{filter}")]
    );
    assert_eq!(world.broker.take(ORDERS_DEAD).len(), 2);
}

#[test]
fn a_rejected_letter_is_applied_once_more_and_who_and_why_is_written_down() {
    is_forced_once_more("quorum", "reject");
}

#[test]
fn a_published_letter_is_applied_once_more_as_well() {
    is_forced_once_more("classic", "publish");
}

#[test]
fn killed_at_any_step_and_run_again_it_applies_it_once_more_and_not_twice() {
    for step in [
        "ForceSeized",
        "ForceForgotten",
        "ReplaySent",
        "ReplayConfirmed",
    ] {
        let world = World::new();
        let config = applied_and_dead(&world, "quorum", "reject");
        let daemon = world.run(&config);
        force(&world, &config, &["m-1"])
            .dies_at(step, 1)
            .run()
            .expect_killed();
        if step == "ReplayConfirmed" {
            eventually("it is applied once more", || {
                times_applied(&world, "m-1") == 2
            });
        }
        // Letters come back when the broker has noticed, claims end with their
        // lease, and a worker may be at it.
        let mut last = None;
        eventually("run again, it goes on", || {
            let ended = force(&world, &config, &["m-1"]).run();
            let done = ended.code == Some(0);
            last = Some(ended);
            done
        });
        eventually("it is applied once more", || {
            times_applied(&world, "m-1") == 2
        });
        world.drain_with(daemon, &config, ORDERS);
        assert_eq!(times_applied(&world, "m-1"), 2, "{step}: {last:?}");
        assert_eq!(times_applied(&world, "m-0"), 1);
        assert_eq!(world.broker.take(ORDERS_DEAD).len(), 2);
    }
}

#[test]
fn one_that_is_in_work_is_not_touched() {
    let world = World::new();
    let config = applied_and_dead(&world, "quorum", "reject");
    let key = world.claim_key(ORDERS, "m-1");
    world.redis.set(&key, "c:somebody", 600_000);
    let report = summary(&force(&world, &config, &["m-1"]).run().expect(75));
    assert_eq!(report["left"]["in-progress"], 1, "{report}");
    assert_eq!(world.redis.get(&key).as_deref(), Some("c:somebody"));
    assert_eq!(world.db.ledger(ORDERS).len(), 3);
    assert_eq!(world.broker.take(ORDERS_DEAD).len(), 3);
}

#[test]
fn one_that_a_keyed_handler_is_at_is_in_progress_until_its_lease_ends() {
    let world = World::new();
    let config = applied_and_dead(&world, "quorum", "reject").set("redis.enabled", false);
    world.db.execute(
        "insert into ackonce.claim select now() + interval '1 hour', now(), 1, id, 'm-1', '', 'h' \
         from ackonce.consumer; delete from ackonce.ledger where message_id = 'm-1'",
    );
    let report = summary(&force(&world, &config, &["m-1"]).run().expect(75));
    assert_eq!(report["left"]["in-progress"], 1, "{report}");
    // Claimed between the look-up and the forgetting, it is left as well.
    world
        .db
        .execute("update ackonce.claim set message_id = 'm-2'");
    let gate = world.gate();
    let forcing = force(&world, &config, &["m-0"])
        .pauses_at("ForceSeized", 1, &gate)
        .start();
    gate.wait_until_hit();
    world
        .db
        .execute("update ackonce.claim set message_id = 'm-0'");
    gate.open();
    let report = summary(&forcing.wait().expect(75));
    assert_eq!(report["left"]["in-progress"], 1, "{report}");
    assert_eq!(world.db.ledger(ORDERS), ["m-0", "m-2"]);
    world
        .db
        .execute("update ackonce.claim set lease_until = now() - interval '1 hour'");
    force(&world, &config, &["m-0"]).run().expect(0);
    assert_eq!(world.db.ledger(ORDERS), ["m-2"]);
}

#[test]
fn without_redis_nothing_is_forgotten() {
    let world = World::new();
    let config = applied_and_dead(&world, "quorum", "reject");
    let away = config.clone().set("redis.url", "redis://127.0.0.1:1/0");
    force(&world, &away, &["m-1"])
        .run()
        .expect(69)
        .says(&["Redis", "m-1"]);
    assert_eq!(world.db.ledger(ORDERS).len(), 3);
    assert_eq!(world.broker.take(ORDERS_DEAD).len(), 3);
}

#[test]
fn where_redis_is_not_used_the_ledger_alone_forgets() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject").set("redis.enabled", false);
    kill_messages(&world, &config, 1);
    mend(&world);
    world.broker.send(ORDERS, numbered("m", 1));
    world.drain(&config, ORDERS);
    force(&world, &config, &["m-0"]).run().expect(0);
    world.drain(&config, ORDERS);
    assert_eq!(times_applied(&world, "m-0"), 2);
}

#[test]
fn a_mark_that_a_slow_worker_puts_back_does_not_swallow_the_message() {
    let world = World::new();
    let config = applied_and_dead(&world, "quorum", "reject");
    let key = world.claim_key(ORDERS, "m-1");
    let mark = world.redis.get(&key).unwrap();
    // Put back before the claim is let go, it is taken away with it.
    let gate = world.gate();
    let forcing = force(&world, &config, &["m-1"])
        .pauses_at("ForceForgotten", 1, &gate)
        .start();
    gate.wait_until_hit();
    world.redis.set(&key, &mark, 600_000);
    gate.open();
    forcing.wait().expect(0);
    assert_eq!(world.redis.get(&key), None);
    // Put back afterwards, it is not believed.
    world.redis.set(&key, &mark, 600_000);
    world.drain(&config, ORDERS);
    assert_eq!(times_applied(&world, "m-1"), 2);
}

#[test]
fn only_dead_letters_can_be_forced_and_a_file_may_name_them() {
    let world = World::new();
    let config = applied_and_dead(&world, "quorum", "reject");
    world.broker.send(ORDERS, [Msg::new("alive")]);
    world.drain(&config, ORDERS);
    force(&world, &config, &["alive"])
        .run()
        .expect(1)
        .says(&["no dead letter", "ackonce publish"]);
    assert_eq!(world.db.ledger(ORDERS), ["alive", "m-0", "m-1", "m-2"]);
    let file = world.write("ids", "m-0\nm-2\n");
    let arguments = [
        "--because",
        "x",
        "--force-reprocess-file",
        file.to_str().unwrap(),
    ];
    let report = summary(&tool(&world, &config, &arguments).run().expect(0));
    assert_eq!(report["forgotten"], 2, "{report}");
    world.drain(&config, ORDERS);
    assert_eq!(
        (
            times_applied(&world, "m-0"),
            times_applied(&world, "m-1"),
            times_applied(&world, "m-2")
        ),
        (2, 1, 2)
    );
}

#[test]
fn of_two_letters_with_one_id_the_second_is_not_applied_a_third_time() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("m-0")]);
    wait_for_letters(&world, 1);
    world.broker.send(ORDERS, [Msg::new("m-0")]);
    wait_for_letters(&world, 2);
    mend(&world);
    world.broker.send(ORDERS, [Msg::new("m-0")]);
    world.wait_for_effects(1);
    daemon.stop();
    force(&world, &config, &["m-0"]).run().expect(0);
    world.drain(&config, ORDERS);
    assert_eq!(times_applied(&world, "m-0"), 2);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}
