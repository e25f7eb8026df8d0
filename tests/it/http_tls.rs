//! The `http` handler in the daemon, before a receiver that demands a client
//! certificate: what becomes of messages until the daemon has the right one.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;

use rustls::version::TLS13;

use crate::common::{
    Answer, Authority, Config, Consumer, Leaf, ORDERS, ORDERS_DEAD, Receiver, World, numbered,
    numbered_ids, said,
};

const MESSAGES: usize = 5;

/// A receiver that lets nobody in without a certificate of `ours`.
fn receiver(ours: &Authority) -> Receiver {
    let config = ours.issue_asking("IP:127.0.0.1", ours, &TLS13);
    Receiver::with_tls(config, |_| Answer::status(200))
}

/// A consumer that charges nobody twice: one failed attempt is a dead letter.
fn config(world: &World, receiver: &Receiver, ours: &Authority, leaf: Option<&Leaf>) -> Config {
    let path = |path: std::path::PathBuf| path.to_str().unwrap().to_owned();
    let mut consumer = Consumer::orders()
        .handler("http")
        .set("handler.url", receiver.url())
        .set("handler.ca_file", path(ours.file()))
        .max_attempts(1);
    if let Some(leaf) = leaf {
        consumer = consumer
            .set("handler.client_cert_file", path(leaf.cert()))
            .set("handler.client_key_file", path(leaf.key()));
    }
    world.config().consumer(consumer)
}

/// Nothing was charged to any message, and the receiver has seen none.
fn assert_nobody_was_blamed(world: &World, receiver: &Receiver) {
    assert_eq!(receiver.count(), 0);
    assert_eq!(world.db.failures(ORDERS), []);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

/// Each message was applied by one request.
fn once_each() -> BTreeMap<String, usize> {
    let ids = numbered_ids("m", MESSAGES).into_iter();
    ids.map(|id| (format!("{ORDERS}:{id}"), 1)).collect()
}

#[test]
fn without_the_certificate_that_its_receiver_wants_a_daemon_pauses_and_keeps_every_message() {
    let ours = Authority::new("ours");
    let receiver = receiver(&ours);
    let world = World::new();
    let without = config(&world, &receiver, &ours, None);
    let (daemon, admin) = world.watch(&without);
    world.broker.send(ORDERS, numbered("m", MESSAGES));
    let why = "set client_cert_file and client_key_file";
    daemon.wait_for_log(&["paused", "tls", why, &receiver.address().to_string()]);
    admin.wait_for(&[("paused systemic", 1.0), ("messages_total applied", 0.0)]);
    assert_eq!(
        admin.metrics().value("failed_attempts_total transient"),
        0.0
    );
    daemon.stop();
    assert_nobody_was_blamed(&world, &receiver);

    let friend = ours.issue_files("DNS:friend", 1);
    let with = config(&world, &receiver, &ours, Some(&friend));
    world.drain(&with, ORDERS);
    assert_eq!(receiver.applied(), once_each());
    assert_eq!(world.db.ledger(ORDERS), numbered_ids("m", MESSAGES));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_daemon_with_a_wrong_certificate_goes_on_by_itself_when_the_right_one_takes_its_place() {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let receiver = receiver(&ours);
    let world = World::new();
    let leaf = other.issue_files("DNS:friend", 1);
    let (daemon, admin) = world.watch(&config(&world, &receiver, &ours, Some(&leaf)));
    world.broker.send(ORDERS, numbered("m", MESSAGES));
    daemon.wait_for_log(&["paused", "tls", "client certificate that it trusts"]);
    assert_nobody_was_blamed(&world, &receiver);

    leaf.replace(&ours.issue_files("DNS:friend", 1));
    admin.wait_for(&[
        ("messages_total applied", MESSAGES as f64),
        ("messages_total dead-lettered", 0.0),
        ("failed_attempts_total transient", 0.0),
        ("failed_attempts_total permanent", 0.0),
        ("paused", 0.0),
    ]);
    assert_eq!(daemon.times_consuming(ORDERS), 1);
    daemon.stop();
    assert_eq!(receiver.applied(), once_each());
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn check_says_that_a_receiver_refuses_the_daemon_and_sends_it_nothing() {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let receiver = receiver(&ours);
    let world = World::new();
    let stranger = other.issue_files("DNS:friend", 1);
    let friend = ours.issue_files("DNS:friend", 1);
    let place = receiver.address();
    let check = |leaf| {
        let output = world.ackonce(&config(&world, &receiver, &ours, leaf), &["check"]);
        let said = said(&output);
        let lines = said
            .lines()
            .filter(|line| line.contains("handler of orders"));
        (output.status.code(), lines.collect::<Vec<_>>().join("\n"))
    };
    for leaf in [None, Some(&stranger)] {
        let (status, line) = check(leaf);
        assert_eq!(status, Some(69), "{line}");
        for part in [
            "error",
            &place.to_string(),
            "set client_cert_file and client_key_file",
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
    }
    let (status, line) = check(Some(&friend));
    assert_eq!(status, Some(0), "{line}");
    assert!(line.contains("can be reached"), "{line}");
    assert_eq!(receiver.count(), 0);
}
