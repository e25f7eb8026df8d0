//! Stopping: what is in flight is finished, the rest goes back to the queue,
//! and nothing that hangs can hold the stop up for ever.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use crate::common::{
    Consumer, DEADLINE, Daemon, Msg, ORDERS, Wire, World, eventually, numbered, numbered_ids,
    try_eventually, wire,
};
use nix::sys::signal::Signal;

/// Longest that a stop may take when nothing is in work. The daemon's own bound
/// is under a second; the shortest of the deadlines that a stop could run into
/// is 5 s.
const STOP_WITHIN: Duration = Duration::from_secs(4);

fn assert_stops_at_once(mut daemon: Daemon, when: &str) {
    let since = Instant::now();
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait();
    let took = since.elapsed();
    assert_eq!(status.code(), Some(0), "{when}: {status}");
    assert!(took < STOP_WITHIN, "{when}: the stop took {took:?}");
    eprintln!("{when}: stopped in {took:?}");
}

/// Sends `signal` while messages flow from a queue of `queue_type`.
fn stops_in_mid_flow_on(signal: Signal, queue_type: &str) {
    const SENT: usize = 20_000;
    let world = World::new();
    // Each message takes a while, so that the stop comes in the middle.
    let orders = Consumer::orders()
        .sql(
            "insert into effect (message_id, body) select message_id, body from message; \
             select pg_sleep(0.001)",
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

#[test]
fn a_broker_that_stops_answering_before_it_is_consumed_from_holds_up_no_stop() {
    let world = World::new();
    world.prepare(&world.orders());
    for method in [
        wire::START_OK,
        wire::TUNE_OK,
        wire::OPEN,
        wire::CHANNEL_OPEN,
        wire::QUEUE_DECLARE,
        wire::QOS,
        wire::CONSUME,
    ] {
        let wire = Wire::before(world.amqp_url());
        wire.swallow_at(method);
        let config = world.orders().set("broker.url", wire.url());
        let daemon = world.daemon(&config).start();
        wire.wait_for_swallowed(1);
        assert_stops_at_once(daemon, &format!("silent from {method:?} on"));
    }
}

#[test]
fn a_broker_that_stops_answering_during_the_stop_does_not_hold_it_up() {
    let world = World::new();
    for method in [wire::CANCEL, wire::CLOSE] {
        let wire = Wire::before(world.amqp_url());
        let daemon = world.run(&world.orders().set("broker.url", wire.url()));
        wire.swallow_at(method);
        assert_stops_at_once(daemon, &format!("silent from {method:?} on"));
        assert_eq!(wire.swallowed(), 1, "{method:?}");
    }
}

#[test]
fn a_broker_that_goes_silent_while_messages_flow_holds_up_no_stop_and_loses_none() {
    const SENT: usize = 5_000;
    let world = World::new();
    let wire = Wire::before(world.amqp_url());
    let orders = Consumer::orders().set("batch_max", 50).set("prefetch", 200);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world.broker.send(ORDERS, numbered("m", SENT));
    let daemon = world.run(&config.clone().set("broker.url", wire.url()));
    world.wait_for_effects(300);
    wire.swallow_now();
    assert_stops_at_once(daemon, "silent in mid-flow");
    let applied = world.db.effect_count();
    assert!(applied < SENT as i64, "the flow had not ended");
    wire.cut();
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", SENT));
}

#[test]
fn a_broker_that_goes_silent_during_the_drain_costs_no_more_than_the_drain() {
    let world = World::new();
    let wire = Wire::before(world.amqp_url());
    let config = world.orders().set("broker.url", wire.url());
    let gate = world.gate();
    let mut daemon = world.daemon(&config).pauses_at("applied", 1, &gate).start();
    daemon.wait_until_consuming();
    world.broker.send(ORDERS, [Msg::new("m")]);
    gate.wait_until_hit();
    daemon.signal(Signal::SIGTERM);
    daemon.wait_for_log(&["told to stop"]);
    wire.swallow_now();
    let since = Instant::now();
    gate.open();
    let status = daemon.wait();
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(since.elapsed() < STOP_WITHIN, "{:?}", since.elapsed());
    assert_eq!(world.db.effect_count(), 1, "what was in work is finished");
    wire.cut();
    world.redis.flush();
    world.drain(&world.orders(), ORDERS);
    world.assert_each_applied_once(&["m"]);
}

/// Something that takes connections and hands them over: whoever connects
/// waits. Also returns its port.
fn mute() -> (u16, Receiver<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (taken, clients) = channel();
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            if taken.send(client).is_err() {
                return;
            }
        }
    });
    (port, clients)
}

#[test]
fn a_server_that_takes_connections_and_says_nothing_or_little_holds_up_no_stop() {
    let world = World::new();
    world.prepare(&world.orders());
    for path in ["broker.url", "postgres.url"] {
        let (port, clients) = mute();
        let url = match path {
            "broker.url" => format!("amqp://guest:guest@127.0.0.1:{port}/"),
            _ => format!("postgres://ackonce@127.0.0.1:{port}/ackonce"),
        };
        let daemon = world.daemon(&world.orders().set(path, url)).start();
        let mut client = clients.recv_timeout(DEADLINE).unwrap();
        assert_stops_at_once(daemon, &format!("a {path} that says nothing"));
        drop(client.flush());
    }
    let (port, clients) = mute();
    let url = format!("amqp://guest:guest@127.0.0.1:{port}/");
    let daemon = world.daemon(&world.orders().set("broker.url", url)).start();
    let mut client = clients.recv_timeout(DEADLINE).unwrap();
    // The head of a frame of 512 bytes, and then a byte now and then.
    client.write_all(&[1, 0, 0, 0, 0, 2, 0]).unwrap();
    std::thread::spawn(move || {
        while client.write_all(&[0]).is_ok() {
            std::thread::park_timeout(Duration::from_millis(300));
        }
    });
    assert_stops_at_once(daemon, "a broker that trickles");
}
