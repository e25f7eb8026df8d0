//! What is counted when a worker dies of a message, and when a handler outlives
//! its lease.

use nix::sys::signal::Signal;

use super::assert_balanced;
use crate::common::{Admin, Consumer, Msg, ORDERS, ORDERS_DEAD, World};
use crate::keyed::stage::Stage;

/// What a body holds that kills or frightens its worker.
const POISON: &str = "deadly nightshade";

/// A consumer that allows three deaths and soon gets over one.
fn orders() -> Consumer {
    Consumer::orders()
        .set("max_deaths", 3)
        .set("claim.lease", "400ms")
        .set("claim.renew_every", "100ms")
}

#[test]
fn each_panic_of_a_worker_is_counted_and_the_crash_loop_that_ends_them() {
    let world = World::new();
    let config = world.config().consumer(orders());
    world.prepare(&config);
    world.broker.send(ORDERS, [Msg::new("bad").body(POISON)]);
    let daemon = world.daemon(&config).panics_of(POISON).start();
    let admin = Admin::of(&daemon);
    world.broker.wait_for_dead(ORDERS_DEAD, 1);
    let expected = [
        ("worker_panics_total", 3.0),
        // What a worker held when it panicked has no outcome.
        ("deliveries_total", 4.0),
        ("redeliveries_total", 3.0),
        ("messages_total", 1.0),
        ("messages_total dead-lettered", 1.0),
        ("dead_letters_total", 1.0),
        ("dead_letters_total crash-loop", 1.0),
        ("failed_attempts_total", 0.0),
        ("in_flight", 0.0),
        ("parked", 0.0),
        ("consuming", 1.0),
    ];
    admin.wait_for(&expected);
    // The others are worked on as ever.
    world.broker.send(ORDERS, [Msg::new("good")]);
    admin.wait_for(&[
        ("messages_total applied", 1.0),
        ("worker_panics_total", 3.0),
        ("deliveries_total", 5.0),
    ]);
    daemon.stop();
}

#[test]
fn the_crash_loop_of_processes_is_counted_by_the_one_that_ends_it() {
    let world = World::new();
    let config = world.config().consumer(orders());
    world.prepare(&config);
    world.broker.send(ORDERS, [Msg::new("bad").body(POISON)]);
    for _ in 0..3 {
        let mut daemon = world.daemon(&config).dies_of(POISON).start();
        daemon.wait_until_killed();
    }
    let daemon = world.daemon(&config).dies_of(POISON).start();
    let admin = Admin::of(&daemon);
    world.broker.wait_for_dead(ORDERS_DEAD, 1);
    admin.wait_for(&[
        ("deliveries_total", 1.0),
        ("redeliveries_total", 1.0),
        ("messages_total dead-lettered", 1.0),
        ("dead_letters_total crash-loop", 1.0),
        ("dead_letters_total", 1.0),
        ("failed_attempts_total", 0.0),
        ("worker_panics_total", 0.0),
    ]);
    assert_balanced(&admin);
    daemon.stop();
}

#[test]
fn a_claim_that_is_taken_over_is_lost_once_and_its_late_handler_applies_nothing() {
    let stage = Stage::new();
    let world = &stage.world;
    // With a message in its hands, a daemon gets no other.
    let consumer = stage.consumer().set("prefetch", 1).set("batch_max", 1);
    let config = stage.with(consumer);
    world.prepare(&config);
    stage.hold("m");
    let (late, late_admin) = world.watch(&config);
    stage.send(&["m"]);
    stage.wait_until_begun("m", 1);
    assert_eq!(late_admin.metrics().value("claims_lost_total"), 0.0);
    late.signal(Signal::SIGSTOP);
    let (successor, admin) = world.watch(&config);
    stage.send(&["m"]);
    // It begins when the lease of the other has run out, not before.
    stage.wait_until_begun("m", 2);
    late.signal(Signal::SIGCONT);
    late_admin.wait_for(&[("claims_lost_total", 1.0), ("messages_total applied", 0.0)]);
    stage.let_go("m");
    admin.wait_for(&[
        ("messages_total applied", 1.0),
        ("claims_lost_total", 0.0),
        ("in_flight", 0.0),
    ]);
    late_admin.wait_for(&[
        ("claims_lost_total", 1.0),
        ("messages_total applied", 0.0),
        ("messages_total duplicate", 1.0),
        ("duplicates_total ledger", 1.0),
        ("failed_attempts_total", 0.0),
        ("in_flight", 0.0),
        ("parked", 0.0),
    ]);
    for (daemon, admin) in [(late, late_admin), (successor, admin)] {
        assert_balanced(&admin);
        daemon.stop();
    }
    assert_eq!(stage.begun("m"), 2);
}
