//! A replay in steps: it goes on only while what was replayed is applied.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use crate::common::letters::{header, judged, kill_messages, mend, wait_for_letters};
use crate::common::{Config, Ended, ORDERS, ORDERS_DEAD, Tool, World, numbered_ids};

fn replay(world: &World, config: &Config, arguments: &[&str]) -> Ended {
    let all = [&["replay", ORDERS, "--yes", "--json"], arguments].concat();
    Tool::new(world, config, &all).run()
}

fn summary(ended: &Ended) -> serde_json::Value {
    ended.json().pop().expect("a summary")["summary"].clone()
}

/// Letters in the dead-letter queue that were replayed before.
fn replayed_before(world: &World) -> usize {
    let letters = world.broker.take(ORDERS_DEAD);
    let replays = |letter: &&crate::common::Dead| header(letter, "ackonce-replays").is_some();
    letters.iter().filter(replays).count()
}

fn dies_of_a_cause_that_is_not_mended(queue_type: &str, dead_letters: &str) {
    let world = World::new();
    let config = judged(&world, queue_type, dead_letters);
    kill_messages(&world, &config, 200);
    let daemon = world.run(&config);
    let ended = replay(&world, &config, &["--canary", "5"]).expect(1);
    let report = summary(&ended);
    assert_eq!(report["replayed"], 5, "{report}");
    // It does not wait for the others once there is no hope.
    assert_eq!(report["canary"]["applied"], 0, "{report}");
    assert!(
        report["canary"]["dead_again"].as_u64() >= Some(1),
        "{report}"
    );
    ended.says(&[" x rejected: 22000: not today", "--abort-at allows 10 %"]);
    wait_for_letters(&world, 200);
    daemon.stop();
    assert_eq!(replayed_before(&world), 5, "the rest is untouched");
    assert_eq!(world.db.effect_count(), 0);
}

#[test]
fn a_canary_dies_of_a_cause_that_is_not_mended_and_the_rest_stays() {
    dies_of_a_cause_that_is_not_mended("quorum", "reject");
}

#[test]
fn a_canary_in_a_classic_queue_dies_of_it_as_well() {
    dies_of_a_cause_that_is_not_mended("classic", "publish");
}

#[test]
fn with_the_cause_mended_it_goes_on_by_steps_to_the_end() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 200);
    mend(&world);
    let daemon = world.run(&config);
    let ended = replay(&world, &config, &["--canary", "5"]).expect(0);
    let report = summary(&ended);
    assert_eq!(report["replayed"], 200, "{report}");
    assert_eq!(
        report["canary"]["applied"], 55,
        "two steps are weighed: {report}"
    );
    let ended = ended.says(&[
        "of 5 replayed, 5 are applied",
        "of 55 replayed, 55 are applied",
    ]);
    assert_eq!(ended.err.matches("are applied").count(), 2, "{}", ended.err);
    world.wait_for_effects(200);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 200));
}

/// Ids in the order in which they stand in the dead-letter queue.
fn order(world: &World, config: &Config) -> Vec<String> {
    let lines = replay(world, config, &["--plan"]).expect(0).json();
    let ids = lines.iter().filter_map(|line| line["id"].as_str());
    ids.map(str::to_owned).collect()
}

/// From now on only `ids` fail, and for good.
fn only_these_fail<'a>(world: &World, ids: impl IntoIterator<Item = &'a String>) {
    world.db.execute(
        "create table bad (id text); create or replace function judge(id text) returns text \
         language plpgsql as $$ begin if exists (select from bad where bad.id = judge.id) then \
         raise exception 'still not' using errcode = '22000'; end if; return id; end $$",
    );
    for id in ids {
        world
            .db
            .execute(&format!("insert into bad values ('{id}')"));
    }
}

#[test]
fn the_second_step_can_die_too() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 100);
    only_these_fail(&world, &order(&world, &config)[5..]);
    let daemon = world.run(&config);
    let ended = replay(&world, &config, &["--canary", "5"]).expect(1);
    let report = summary(&ended);
    assert_eq!(report["replayed"], 55, "{report}");
    assert_eq!(report["canary"]["applied"], 5, "{report}");
    ended.says(&["still not", "are not applied"]);
    wait_for_letters(&world, 95);
    daemon.stop();
    assert_eq!(replayed_before(&world), 50);
    assert_eq!(world.db.effect_count(), 5);
}

/// Replays 40 letters, of which every other one fails still.
fn half_fail(abort_at: &str, exit: i32, replayed: u64, dead: usize) {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 40);
    only_these_fail(&world, order(&world, &config).iter().step_by(2));
    let daemon = world.run(&config);
    let ended = replay(&world, &config, &["--canary", "10", "--abort-at", abort_at]).expect(exit);
    assert_eq!(summary(&ended)["replayed"], replayed);
    wait_for_letters(&world, dead);
    daemon.stop();
}

#[test]
fn half_may_fail_when_the_operator_says_so() {
    half_fail("50", 0, 40, 20);
}

#[test]
fn a_little_less_than_half_is_too_little() {
    half_fail("49", 1, 10, 35);
}

#[test]
fn what_leaves_no_trace_or_waits_for_a_retry_counts_as_not_applied() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 30);
    // Nobody consumes: nothing becomes known.
    let ended = replay(
        &world,
        &config,
        &["--canary", "3", "--canary-wait", "500ms"],
    )
    .expect(1);
    assert_eq!(summary(&ended)["canary"]["unknown"], 3);
    ended.says(&["3 without a trace", "does the consumer's daemon run?"]);
    // They fail in a way that may pass, and wait.
    world.db.execute(
        "create or replace function judge(id text) returns text language plpgsql as $$ begin \
         raise exception 'not yet' using errcode = '23503'; end $$",
    );
    let slow = config.set("daemon.shutdown_timeout", "5s");
    let daemon = world.run(&slow);
    let ended = replay(&world, &slow, &["--canary", "3", "--canary-wait", "300ms"]).expect(1);
    let report = summary(&ended);
    let open = report["canary"]["waiting"].as_u64().unwrap()
        + report["canary"]["unknown"].as_u64().unwrap();
    assert_eq!(open, 3, "{report}");
    assert_eq!(report["replayed"], 3, "{report}");
    daemon.stop();
}

#[test]
fn fewer_letters_than_a_step_are_weighed_as_well() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 3);
    let daemon = world.run(&config);
    let ended = replay(&world, &config, &["--canary", "50"]).expect(1);
    assert_eq!(summary(&ended)["canary"]["dead_again"], 3);
    wait_for_letters(&world, 3);
    mend(&world);
    let ended = replay(&world, &config, &["--canary", "50"]).expect(0);
    assert_eq!(summary(&ended)["canary"]["applied"], 3);
    daemon.stop();
    world.assert_each_applied_once(&numbered_ids("m", 3));
}
