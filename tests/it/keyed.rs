//! Keyed handlers: the claim in the ledger, its lease, and what becomes of it
//! when daemons and servers fail.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod crash;
pub mod stage;

use crate::common::{
    Consumer, Cut, Msg, ORDERS, ORDERS_DEAD, Proxy, RECORD_EFFECT, eventually, numbered,
    numbered_ids, run_ackonce,
};
use nix::sys::signal::Signal;
use stage::Stage;

#[test]
fn each_message_is_called_once_and_its_duplicates_are_acked() {
    for redis in [true, false] {
        let stage = Stage::new();
        let config = stage.config().set("redis.enabled", redis);
        let daemon = stage.world.run(&config);
        stage.world.broker.send(ORDERS, numbered("m", 50));
        stage.world.broker.send(ORDERS, numbered("m", 50));
        stage.wait_until_done(&numbered_ids("m", 50));
        stage.world.broker.send(ORDERS, numbered("m", 50));
        stage.drain_with(daemon, &config);
        stage.assert_each_called_once(&numbered_ids("m", 50));
        assert!(stage.world.broker.is_empty(ORDERS_DEAD));
    }
}

#[test]
fn two_daemons_call_a_message_once_though_it_takes_longer_than_the_lease() {
    for redis in [true, false] {
        let stage = Stage::new();
        let config = stage.config().set("redis.enabled", redis);
        let first = stage.world.run(&config);
        let second = stage.world.run(&config);
        stage.hold("m");
        stage.send(&["m", "m", "m", "m", "m", "m"]);
        stage.wait_until_begun("m", 1);
        stage.wait_until_renewed("m", 3);
        stage.send(&["other"]);
        stage.wait_until_done(&["other"]);
        assert_eq!(stage.begun("m"), 1);
        stage.let_go("m");
        stage.wait_until_done(&["m", "other"]);
        second.stop();
        stage.drain_with(first, &config);
        stage.assert_each_called_once(&["m", "other"]);
    }
}

/// With a message in its hands, a daemon gets no other: what is sent while it
/// stands still goes to the next.
fn one_by_one(stage: &Stage) -> Consumer {
    stage.consumer().set("prefetch", 1).set("batch_max", 1)
}

#[test]
fn a_daemon_that_outlives_its_lease_is_taken_over_from_and_can_complete_nothing() {
    let stage = Stage::new();
    let world = &stage.world;
    let config = stage.with(one_by_one(&stage));
    world.prepare(&config);
    let gate = world.gate();
    let late = world.daemon(&config).pauses_at("called", 1, &gate).start();
    late.wait_until_consuming();
    stage.send(&["m"]);
    gate.wait_until_hit();
    assert_eq!(stage.ended("m"), 1);
    late.signal(Signal::SIGSTOP);
    stage.hold("m");
    let successor = world.run(&config);
    stage.send(&["m"]);
    stage.wait_until_begun("m", 2);
    let owner = "select owner::text from ackonce.claim where message_id = 'm'";
    let successors = world.db.texts(owner);

    gate.open();
    late.signal(Signal::SIGCONT);
    late.wait_for_log(&[
        "a handler came back when its claim was not ours",
        "in_ledger=false",
    ]);
    assert!(world.db.ledger(ORDERS).is_empty(), "it completed nothing");
    assert_eq!(world.db.texts(owner), successors, "and took nothing");
    assert_eq!(stage.begun("m"), 2, "and does not call it beside the other");
    stage.let_go("m");
    stage.wait_until_done(&["m"]);
    stage.drain_with(late, &config);
    successor.stop();
    assert!(world.broker.is_empty(ORDERS));
    assert_eq!((stage.begun("m"), stage.claims()), (2, 0));
}

#[test]
fn a_failure_that_comes_after_the_lease_does_not_count() {
    let stage = Stage::new();
    let world = &stage.world;
    let config = stage.with(one_by_one(&stage).max_attempts(1));
    world.prepare(&config);
    stage.hold("m");
    let late = world.run(&config);
    stage.send_failing("m", 75);
    stage.wait_until_begun("m", 1);
    late.signal(Signal::SIGSTOP);
    let successor = world.run(&config);
    stage.send_failing("m", 75);
    stage.wait_until_begun("m", 2);
    late.signal(Signal::SIGCONT);
    late.wait_for_log(&["lost claims in the ledger", "claims=1"]);
    stage.mend();
    stage.let_go("m");
    stage.wait_until_done(&["m"]);
    stage.drain_with(late, &config);
    successor.stop();
    assert!(world.broker.is_empty(ORDERS_DEAD));
    assert_eq!(world.db.failures(ORDERS), []);
}

#[test]
fn a_slow_message_holds_up_nobody_beside_it() {
    let stage = Stage::new();
    let config = stage.with(stage.consumer().set("workers", 2));
    let daemon = stage.world.run(&config);
    stage.send(&["warm"]);
    stage.wait_until_done(&["warm"]);
    stage.hold("slow");
    stage.send(&["slow"]);
    stage.world.broker.send(ORDERS, numbered("m", 40));
    let mut ids = numbered_ids("m", 40);
    ids.push("warm".into());
    stage.wait_until_done(&ids);
    stage.let_go("slow");
    ids.push("slow".into());
    stage.wait_until_done(&ids);
    stage.drain_with(daemon, &config);
    stage.assert_each_called_once(&ids);
}

#[test]
fn another_body_under_a_claimed_id_waits_and_is_dead_lettered() {
    let stage = Stage::new();
    let world = &stage.world;
    let config = stage.config();
    let daemon = world.run(&config);
    let other = world.run(&config);
    stage.hold("m");
    world.broker.send(ORDERS, [Msg::new("m").body("one")]);
    stage.wait_until_begun("m", 1);
    for body in ["two", "three", "four"] {
        world.broker.send(ORDERS, [Msg::new("m").body(body)]);
    }
    stage.wait_until_renewed("m", 2);
    assert!(world.broker.is_empty(ORDERS_DEAD), "nothing is decided yet");
    stage.let_go("m");
    world.broker.wait_for_dead(ORDERS_DEAD, 3);
    assert_eq!(world.db.reasons(ORDERS), vec!["id-conflict"; 3]);
    other.stop();
    stage.drain_with(daemon, &config);
    stage.assert_each_called_once(&["m"]);
}

#[test]
fn a_failed_attempt_gives_its_claim_back_and_is_retried() {
    let stage = Stage::new();
    let config = stage.with(stage.consumer().max_attempts(3).backoff(&["100ms"]));
    let daemon = stage.world.run(&config);
    stage.send_failing("m", 75);
    stage.wait_until_begun("m", 2);
    stage.mend();
    stage.wait_until_done(&["m"]);
    stage.drain_with(daemon, &config);
    let failures = stage.world.db.failures(ORDERS);
    assert!((1..=2).contains(&failures.len()), "{failures:?}");
    assert!(
        failures
            .iter()
            .all(|f| f.class == "transient" && f.reason.is_empty())
    );
    assert!(failures.iter().all(|f| f.code.as_deref() == Some("75")));
    assert_eq!(stage.claims(), 0);
}

#[test]
fn what_is_refused_or_fails_too_often_is_dead_lettered_with_its_reason() {
    let stage = Stage::new();
    let config = stage.with(stage.consumer().max_attempts(2).backoff(&["50ms"]));
    let daemon = stage.world.run(&config);
    stage.send_failing("bad", 65);
    stage.send_failing("failing", 75);
    stage.send(&["good"]);
    stage.world.broker.wait_for_dead(ORDERS_DEAD, 2);
    stage.wait_until_done(&["good"]);
    stage.drain_with(daemon, &config);
    assert_eq!((stage.begun("bad"), stage.begun("failing")), (1, 2));
    let mut reasons = stage.world.db.reasons(ORDERS);
    reasons.sort();
    assert_eq!(reasons, ["", "max-attempts", "rejected"]);
    assert_eq!(stage.claims(), 0);
}

#[test]
fn a_broken_world_pauses_the_consumer_and_costs_no_attempt() {
    let stage = Stage::new();
    let config = stage.config();
    let daemon = stage.world.run(&config);
    let ids = numbered_ids("m", 30);
    for id in &ids {
        stage.send_failing(id, 78);
    }
    daemon.wait_for_log(&["paused", "told to", "code=78"]);
    eventually("what it holds is given back", || {
        stage.world.broker.ready(ORDERS) >= 18
    });
    stage.mend();
    stage.wait_until_done(&ids);
    daemon.wait_for_log(&["resumed"]);
    stage.drain_with(daemon, &config);
    assert_eq!(stage.world.db.failures(ORDERS), []);
    assert!(stage.world.broker.is_empty(ORDERS_DEAD));
    assert_eq!(stage.claims(), 0);
    assert!(ids.iter().all(|id| stage.ended(id) == 1));
}

#[test]
fn attempts_that_all_fail_trip_the_breaker_and_go_on_when_it_is_mended() {
    let stage = Stage::new();
    let consumer = stage.consumer().max_attempts(5).backoff(&["50ms"]);
    let config = stage.with(consumer.set("retry.breaker", 10));
    let daemon = stage.world.run(&config);
    let ids = numbered_ids("m", 30);
    for id in &ids {
        stage.send_failing(id, 75);
    }
    daemon.wait_for_log(&["paused"]);
    stage.mend();
    stage.wait_until_done(&ids);
    stage.drain_with(daemon, &config);
    assert!(stage.world.broker.is_empty(ORDERS_DEAD));
    assert_eq!(stage.claims(), 0);
}

#[test]
fn a_stop_waits_for_the_handler() {
    let stage = Stage::new();
    let config = stage.config();
    let daemon = stage.world.run(&config);
    stage.hold("m");
    stage.send(&["m"]);
    stage.wait_until_begun("m", 1);
    daemon.signal(Signal::SIGTERM);
    daemon.wait_for_log(&["stopping"]);
    stage.let_go("m");
    daemon.wait_until_stopped();
    stage.assert_each_called_once(&["m"]);
    assert!(stage.world.broker.is_empty(ORDERS));
}

#[test]
fn a_stop_that_can_wait_no_longer_cancels_the_handler_and_gives_the_claim_back() {
    let stage = Stage::new();
    let consumer = stage.consumer().set("claim.lease", "10m");
    let config = stage.with(consumer).set("daemon.shutdown_timeout", "2s");
    let daemon = stage.world.run(&config);
    stage.hold("m");
    stage.send(&["m"]);
    stage.wait_until_begun("m", 1);
    daemon.stop();
    assert_eq!(stage.claims(), 0, "nobody has to wait for the lease");
    assert_eq!(stage.world.db.failures(ORDERS), [], "it was no attempt");
    stage.let_go("m");
    stage.world.drain(&config, ORDERS);
    stage.wait_until_done(&["m"]);
    assert_eq!((stage.begun("m"), stage.ended("m")), (2, 1));
}

#[test]
fn a_database_that_is_away_during_the_call_costs_no_second_one() {
    let stage = Stage::new();
    let world = &stage.world;
    world.prepare(&stage.config());
    let proxy = Proxy::before(world.postgres_url(), 5432);
    // Long enough to outlive the outage.
    let consumer = stage.consumer().set("claim.lease", "10m");
    let config = stage.with(consumer).set("postgres.url", proxy.url());
    let daemon = world.run(&config);
    stage.hold("m");
    stage.send(&["m"]);
    stage.wait_until_begun("m", 1);
    proxy.go_down();
    stage.let_go("m");
    eventually("it has ended", || stage.ended("m") == 1);
    proxy.wait_for_refusals(3);
    assert!(world.db.ledger(ORDERS).is_empty());
    proxy.come_up();
    stage.wait_until_done(&["m"]);
    stage.drain_with(daemon, &config);
    stage.assert_each_called_once(&["m"]);
}

#[test]
fn a_claim_that_cannot_be_renewed_in_time_is_given_up_before_it_ends() {
    let stage = Stage::new();
    let world = &stage.world;
    world.prepare(&stage.config());
    let proxy = Proxy::before(world.postgres_url(), 5432);
    let config = stage.config().set("postgres.url", proxy.url());
    let cut_off = world.run(&config);
    stage.hold("m");
    stage.send(&["m"]);
    stage.wait_until_begun("m", 1);
    proxy.go_down();
    cut_off.wait_for_log(&["lost claims in the ledger", "no renewal came through"]);
    // Its program was ended with it: the one that holds on is the second.
    let successor = world.run(&stage.config());
    stage.send(&["m"]);
    stage.wait_until_begun("m", 2);
    stage.let_go("m");
    stage.wait_until_done(&["m"]);
    proxy.come_up();
    stage.drain_with(cut_off, &config);
    successor.stop();
    assert!(world.broker.is_empty(ORDERS));
    assert_eq!((stage.begun("m"), stage.ended("m")), (2, 1));
}

fn survives_cuts(cut: Cut) {
    const CUTS: usize = 6;
    let stage = Stage::new();
    let world = &stage.world;
    world.prepare(&stage.config());
    let proxy = Proxy::before(world.postgres_url(), 5432);
    let config = stage.config().set("postgres.url", proxy.url());
    let daemon = world.run(&config);
    proxy.cut_commits(cut, CUTS, 1);
    for id in numbered_ids("m", 30) {
        stage.send(&[&id]);
    }
    proxy.wait_for_cuts(CUTS);
    stage.wait_until_done(&numbered_ids("m", 30));
    stage.drain_with(daemon, &config);
    assert_eq!(proxy.cuts(), CUTS);
    stage.assert_each_called_once(&numbered_ids("m", 30));
}

#[test]
fn a_commit_whose_reply_is_lost_costs_no_second_call() {
    survives_cuts(Cut::BeforeReply);
}

#[test]
fn a_commit_that_never_arrives_costs_no_second_call() {
    survives_cuts(Cut::BeforeCommit);
}

#[test]
fn a_message_that_kills_its_daemon_is_quarantined_and_the_others_are_called() {
    let stage = Stage::new();
    let world = &stage.world;
    let consumer = stage
        .consumer()
        .set("max_deaths", 3)
        .set("claim.lease", "300ms");
    let config = stage.with(consumer);
    world.prepare(&config);
    world.broker.send(ORDERS, numbered("m", 5));
    world
        .broker
        .send(ORDERS, [Msg::new("deadly").body("poison")]);
    world.broker.send(ORDERS, numbered("n", 5));
    for _ in 0..3 {
        let mut daemon = world.daemon(&config).dies_of("poison").start();
        daemon.wait_until_killed();
    }
    let daemon = world.daemon(&config).dies_of("poison").start();
    world.broker.wait_for_dead(ORDERS_DEAD, 1);
    let mut ids = numbered_ids("m", 5);
    ids.extend(numbered_ids("n", 5));
    stage.wait_until_done(&ids);
    stage.drain_with(daemon, &config);
    assert_eq!(world.db.reasons(ORDERS), ["crash-loop"]);
    assert_eq!(world.db.count("select count(*) from ackonce.suspect"), 0);
}

#[test]
fn a_handler_that_panics_has_failed_and_no_more() {
    let stage = Stage::new();
    let config = stage.with(stage.consumer().max_attempts(2).backoff(&["50ms"]));
    let daemon = stage.world.daemon(&config).panics_of("poison").start();
    daemon.wait_until_consuming();
    stage
        .world
        .broker
        .send(ORDERS, [Msg::new("frightening").body("poison")]);
    stage.send(&["good"]);
    stage.world.broker.wait_for_dead(ORDERS_DEAD, 1);
    stage.wait_until_done(&["good"]);
    assert_eq!(daemon.times_consuming(ORDERS), 1, "no worker was lost");
    stage.drain_with(daemon, &config);
    assert_eq!(stage.world.db.reasons(ORDERS), ["", "max-attempts"]);
}

#[test]
fn handlers_of_both_kinds_run_in_one_daemon() {
    let stage = Stage::new();
    let world = &stage.world;
    let config = stage
        .config()
        .consumer(Consumer::new("bills").sql(RECORD_EFFECT));
    let daemon = world.run(&config);
    assert!(daemon.logged(&["consumer=orders", "effect=keyed"]));
    assert!(daemon.logged(&["consumer=bills", "effect=transactional"]));
    world.broker.send("bills", numbered("b", 100));
    world.broker.send(ORDERS, numbered("m", 20));
    world.wait_for_effects(100);
    stage.wait_until_done(&numbered_ids("m", 20));
    stage.drain_with(daemon, &config);
    world.drain(&config, "bills");
    world.assert_each_applied_once(&numbered_ids("b", 100));
    stage.assert_each_called_once(&numbered_ids("m", 20));
    let path = world.write("both.toml", &config.text());
    let checked = run_ackonce(&["check", "--config", path.to_str().unwrap()]);
    let text = String::from_utf8(checked.stdout).unwrap();
    assert!(text.contains("effect of orders: keyed"), "{text}");
    assert!(text.contains("effect of bills: transactional"), "{text}");
}

#[test]
fn why_tells_who_is_at_a_message_and_until_when() {
    let stage = Stage::new();
    let config = stage.config();
    let daemon = stage.world.run(&config);
    stage.hold("m");
    stage.send(&["m"]);
    stage.wait_until_begun("m", 1);
    let path = stage.world.write("why.toml", &config.text());
    let why = |more: &[&str]| {
        let mut arguments = vec!["why", "m", "--config", path.to_str().unwrap()];
        arguments.extend(more);
        let answer = run_ackonce(&arguments);
        assert_eq!(answer.status.code(), Some(0));
        String::from_utf8(answer.stdout).unwrap()
    };
    let holder = format!("/{}", daemon.pid());
    let text = why(&[]);
    assert!(
        text.contains("  = in work by ") && text.contains(&holder),
        "{text}"
    );
    let json: serde_json::Value = serde_json::from_str(&why(&["--json"])).unwrap();
    assert_eq!(json["consumers"][0]["state"], "claimed", "{json}");
    assert_eq!(json["consumers"][0]["over"], false, "{json}");
    daemon.kill();
    eventually("its lease ends", || {
        why(&[]).contains("whoever gets the message next takes it over")
    });
    stage.let_go("m");
    stage.world.drain(&config, ORDERS);
    stage.wait_until_done(&["m"]);
    assert!(why(&[]).contains("  = applied at "));
}

#[test]
fn claims_that_nobody_came_back_to_are_pruned_with_the_rest() {
    let stage = Stage::new();
    let config = stage.config();
    stage.world.prepare(&config);
    stage.send(&["m"]);
    stage.world.drain(&config, ORDERS);
    stage.world.db.execute(
        "insert into ackonce.claim \
         select now() - make_interval(days => age), now(), 1, 1, 'old ' || age, '', 'gone' \
         from unnest(array[28, 29, 31, 32]) as age",
    );
    let path = stage.world.write("prune.toml", &config.text());
    let pruned = run_ackonce(&["ledger", "prune", "--config", path.to_str().unwrap()]);
    let text = String::from_utf8(pruned.stdout).unwrap();
    assert!(text.contains("claims          2\n"), "{text}");
    let left = "select message_id from ackonce.claim order by 1";
    assert_eq!(
        stage.world.db.texts(left),
        ["old 28", "old 29"],
        "those older than 30 days are gone"
    );
}

/// Answers each message at once.
const FAST: &str = r#"#!/bin/sh
echo '{"ready":true}'
while read -r line; do
    id=${line#*\"id\":}
    echo "{\"id\":${id%%,*},\"outcome\":\"done\"}"
done
"#;

#[test]
fn what_comes_back_together_is_completed_together() {
    let stage = Stage::new();
    let world = &stage.world;
    let program = world.write("fast", FAST);
    let consumer = Consumer::orders()
        .handler("command")
        .set("handler.mode", "stream")
        .set("handler.argv", vec!["/bin/sh", program.to_str().unwrap()])
        .set("workers", 8);
    let config = stage.with(consumer);
    world.prepare(&config);
    world.broker.send(ORDERS, numbered("m", 3_000));
    let daemon = world.run(&config);
    stage.wait_until_done(&numbered_ids("m", 3_000));
    stage.drain_with(daemon, &config);
    // The time of a row is that of its transaction.
    let transactions = world
        .db
        .count("select count(distinct applied_at) from ackonce.ledger");
    println!("{transactions} transactions");
    assert!(transactions < 1_500, "{transactions} for 3,000 messages");
    assert_eq!(stage.claims(), 0);
}

#[test]
fn what_a_message_costs_the_ledger_does_not_grow_with_those_before_it() {
    const MESSAGES: usize = 2_000;
    let stage = Stage::new();
    let world = &stage.world;
    let consumer = stage.consumer().set("handler.argv", vec!["/bin/true"]);
    let config = stage.with(consumer.set("workers", 16));
    world.prepare(&config);
    // Rows that are gone stay in the way, and the planner is never told.
    for table in ["claim", "ledger"] {
        let sql = format!("alter table ackonce.{table} set (autovacuum_enabled = false)");
        world.db.execute(&sql);
    }
    world.broker.send(ORDERS, numbered("m", MESSAGES));
    world.drain(&config, ORDERS);
    assert_eq!(world.db.ledger(ORDERS).len(), MESSAGES);
    // Sessions leave their counts when they end.
    let read = "select sum(idx_tup_read)::int8 from pg_stat_user_indexes \
                where indexrelname in ('claim_pkey', 'ledger_pkey')";
    eventually("the sessions have counted", || {
        world.db.count(read) >= MESSAGES as i64
    });
    let read = world.db.count(read);
    assert!(read <= 10 * MESSAGES as i64, "{read} index entries read");
}
