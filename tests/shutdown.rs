//! Stopping: what is in flight is finished, the rest goes back to the queue,
//! and nothing that hangs can hold the stop up for ever.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;

use common::{
    Consumer, DEADLINE, Msg, ORDERS, World, eventually, numbered, numbered_ids, try_eventually,
};
use nix::sys::signal::Signal;

/// Sends `signal` while messages flow from a queue of `queue_type`.
fn stops_in_mid_flow_on(signal: Signal, queue_type: &str) {
    const SENT: usize = 20_000;
    let world = World::new();
    // A batch takes a while, so that the stop comes in the middle.
    let orders = Consumer::orders()
        .sql(
            "insert into effect (message_id, body) select message_id, body from message; \
             select pg_sleep(0.05)",
        )
        .set("topology.queue_type", queue_type)
        .set("batch_max", 50)
        .set("prefetch", 500);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world.broker.send(ORDERS, numbered("m", SENT));
    let mut daemon = world.run(&config);
    world.wait_for_effects(500);
    daemon.signal(signal);
    let status = daemon.wait();
    assert_eq!(status.code(), Some(0), "{status}");

    let applied = world.db.effect_count();
    assert!(applied < SENT as i64, "the flow had not ended");
    assert!(world.db.applied_twice().is_empty());
    assert_eq!(world.db.ledger(ORDERS).len() as i64, applied);
    let claims = world.redis.claims();
    assert!(claims.is_empty(), "claims are left behind: {claims:?}");
    assert!(!world.broker.is_empty(ORDERS));
    let mut waiting = 0;
    let adds_up = try_eventually(DEADLINE, || {
        waiting = i64::from(world.broker.ready(ORDERS));
        match queue_type {
            "classic" => applied + waiting == SENT as i64,
            // Under load a quorum queue's channel holds acks back, and loses
            // them when it closes: those messages come once more.
            _ => applied + waiting >= SENT as i64,
        }
    });
    assert!(
        adds_up,
        "{applied} applied and {waiting} waiting are not {SENT}"
    );
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", SENT));
}

#[test]
fn sigterm_finishes_what_is_in_flight_and_gives_back_the_rest() {
    stops_in_mid_flow_on(Signal::SIGTERM, "quorum");
}

#[test]
fn sigint_finishes_what_is_in_flight_and_gives_back_the_rest() {
    stops_in_mid_flow_on(Signal::SIGINT, "quorum");
}

#[test]
fn a_stop_leaves_nothing_applied_in_a_classic_queue() {
    stops_in_mid_flow_on(Signal::SIGTERM, "classic");
}

#[test]
fn a_stop_without_any_message_ends_with_zero() {
    let world = World::new();
    let daemon = world.run(&world.orders());
    daemon.stop();
}

#[test]
fn a_second_signal_ends_at_once_although_a_worker_hangs() {
    let world = World::new();
    let config = world.orders().set(
        "daemon.shutdown_timeout",
        format!("{}s", 10 * DEADLINE.as_secs()),
    );
    let gate = world.gate();
    let mut daemon = world.daemon(&config).pauses_at("applied", 1, &gate).start();
    daemon.wait_until_consuming();
    world.broker.send(ORDERS, [Msg::new("m")]);
    gate.wait_until_hit();
    // Repeated, because two signals at once may arrive as one.
    let mut status = None;
    eventually("a second signal ends it", || {
        daemon.signal(Signal::SIGTERM);
        status = daemon.try_wait();
        status.is_some()
    });
    assert_eq!(status.unwrap().code(), Some(130));
    world.redis.flush();
    world.drain(&world.orders(), ORDERS);
    world.assert_each_applied_once(&["m"]);
}

#[test]
fn a_worker_that_hangs_does_not_hold_up_a_stop_beyond_its_timeout() {
    let world = World::new();
    let config = world
        .config()
        .set("daemon.shutdown_timeout", "500ms")
        .consumer(Consumer::orders().set("workers", 1));
    let gate = world.gate();
    let mut daemon = world
        .daemon(&config)
        .pauses_at("recorded", 1, &gate)
        .start();
    daemon.wait_until_consuming();
    world.broker.send(ORDERS, numbered("m", 20));
    gate.wait_until_hit();
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait();
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(daemon.logged(&["WARN"]), "it says that something was left");
    assert_eq!(world.db.effect_count(), 0, "the worker hung all the time");
    world.redis.flush();
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 20));
}

#[test]
fn a_handler_that_hangs_does_not_hold_up_a_stop_beyond_its_timeout() {
    let world = World::new();
    world.db.execute("create table pause (seconds float)");
    world.db.execute("insert into pause values (600)");
    let orders = Consumer::orders()
        .sql(
            "insert into effect (message_id) select message_id from message; \
             select pg_sleep(seconds) from pause",
        )
        .set("claim.lease", "20m")
        .set("claim.renew_every", "1s");
    let config = world
        .config()
        .set("postgres.statement_timeout", "15m")
        .set("postgres.idle_in_transaction_timeout", "15m")
        .set("daemon.shutdown_timeout", "500ms")
        .consumer(orders);
    let mut daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("m")]);
    let sleeping = "select count(*) from pg_stat_activity where datname = current_database() \
                    and wait_event = 'PgSleep'";
    eventually("the handler hangs", || world.db.count(sleeping) == 1);
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait();
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(daemon.logged(&["WARN"]), "it says that something was left");
    world.db.execute("delete from pause");
    world.db.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity \
         where datname = current_database() and wait_event = 'PgSleep'",
    );
    world.redis.flush();
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&["m"]);
}
