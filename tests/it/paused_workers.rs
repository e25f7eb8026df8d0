//! A worker that was stopped, or cut off, for longer than its lease: another
//! takes over while it stands still, and when it goes on it changes nothing.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use nix::sys::signal::Signal;

use crate::common::{
    Config, Consumer, Daemon, Gate, Msg, ORDERS, ORDERS_DEAD, Proxy, World, eventually, numbered,
    numbered_ids,
};

/// One worker that takes one message after the other, so that steps come in a
/// known order.
fn one_by_one() -> Consumer {
    Consumer::orders()
        .set("workers", 1)
        .set("batch_max", 1)
        .set("prefetch", 1)
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

/// Closes the connections that are not among `others`, so that the broker
/// gives out again what they hold.
fn close_connections(world: &World, others: &[String]) {
    let mut closed = 0;
    for connection in connections(world, others.len() + 1) {
        if !others.contains(&connection) {
            closed += usize::from(world.management.close_connection(&connection));
        }
    }
    assert!(closed > 0, "a connection was closed");
}

/// A daemon that stands at `step` with one message, and the connections that
/// are not its own.
fn at_step(world: &World, config: &Config, step: &str) -> (Daemon, Gate, Vec<String>) {
    world.prepare(config);
    let others = connections(world, 1);
    let gate = world.gate();
    let daemon = world.daemon(config).pauses_at(step, 1, &gate).start();
    daemon.wait_until_consuming();
    world.broker.send(ORDERS, [Msg::new("m")]);
    gate.wait_until_hit();
    (daemon, gate, others)
}

/// Lets `daemon` go on, and panics unless it works as ever and has left one
/// effect for each message.
fn goes_on(world: &World, config: &Config, daemon: Daemon, successor: Daemon) {
    // The successor may have gone through its failpoint in another order.
    world.broker.send(ORDERS, numbered("later", 20));
    world.wait_for_effects(21);
    successor.stop();
    world.drain_with(daemon, config, ORDERS);
    let mut ids = numbered_ids("later", 20);
    ids.push("m".to_owned());
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

/// Stops a daemon's whole process at `step`, until another has taken its
/// message over; `applied` says whether it had committed by then.
fn frozen_at(step: &str, applied: bool) {
    let world = World::new();
    let config = world.config().consumer(one_by_one());
    let (frozen, gate, others) = at_step(&world, &config, step);
    frozen.signal(Signal::SIGSTOP);
    assert_eq!(world.db.effect_count(), i64::from(applied));
    close_connections(&world, &others);
    let successor = world.run(&config);
    // While the other stands still: its lease, its locks and its transaction
    // have ended by themselves.
    world.wait_for_effects(1);
    eventually("it is settled", || {
        let path = format!("/api/queues/{}/{ORDERS}", world.name());
        let queue = world.management.get(&path);
        queue["messages_ready"] == 0 && queue["messages_unacknowledged"] == 0
    });
    gate.open();
    frozen.signal(Signal::SIGCONT);
    eventually("it consumes again", || frozen.times_consuming(ORDERS) >= 2);
    goes_on(&world, &config, frozen, successor);
}

#[test]
fn a_worker_frozen_with_a_message_it_received_applies_nothing_twice() {
    frozen_at("received", false);
}

#[test]
fn a_worker_frozen_with_its_claim_applies_nothing_twice() {
    frozen_at("claimed", false);
}

#[test]
fn a_worker_frozen_with_its_ledger_row_open_applies_nothing_twice() {
    frozen_at("recorded", false);
}

#[test]
fn a_worker_frozen_before_its_commit_applies_nothing_twice() {
    frozen_at("applied", false);
}

#[test]
fn a_worker_frozen_after_its_commit_applies_nothing_twice() {
    frozen_at("committed", true);
}

#[test]
fn a_worker_frozen_after_its_mark_applies_nothing_twice() {
    frozen_at("marked", true);
}

#[test]
fn a_worker_frozen_after_its_settlement_applies_nothing_twice() {
    frozen_at("settled", true);
}

#[test]
fn a_worker_whose_way_to_the_database_vanishes_blocks_nobody_and_applies_nothing_twice() {
    let world = World::new();
    let proxy = Proxy::before(world.postgres_url(), 5432);
    // It would renew its claim, and the other wait for it.
    let direct = world
        .config()
        .set("redis.enabled", false)
        .consumer(one_by_one());
    let config = direct.clone().set("postgres.url", proxy.url());
    let (cut_off, gate, _) = at_step(&world, &config, "applied");
    // Nothing goes through any more, and neither side is told.
    proxy.strand();
    let successor = world.run(&direct);
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    // It commits into the void, and hears nothing.
    gate.open();
    cut_off.wait_for_log(&["not answered", "no reply within"]);
    goes_on(&world, &config, cut_off, successor);
}

#[test]
fn a_session_that_was_idle_while_its_server_vanished_is_replaced_before_it_is_used() {
    let world = World::new();
    let proxy = Proxy::before(world.postgres_url(), 5432);
    let config = world
        .config()
        .set("postgres.url", proxy.url())
        .set("postgres.connect_timeout", "1s")
        .set("postgres.statement_timeout", "10m")
        .set("postgres.idle_in_transaction_timeout", "10m")
        .consumer(one_by_one());
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    proxy.strand();
    // The first statement of a batch is not given the ten minutes of the others.
    world.broker.send(ORDERS, numbered("later", 20));
    world.wait_for_effects(21);
    daemon.wait_for_log(&["replaced a database session", "no reply within 1s"]);
    world.drain_with(daemon, &config, ORDERS);
    let mut ids = numbered_ids("later", 20);
    ids.push("m".to_owned());
    world.assert_each_applied_once(&ids);
}
