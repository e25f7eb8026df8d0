//! The harness itself, on real servers: a test that can't fail proves nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use crate::common::raw::{self, Properties, RawClient, flag};
use crate::common::{Cut, Database, Msg, Proxy, World, eventually, numbered};

#[test]
fn a_world_publishes_counts_and_takes() {
    let world = World::new();
    world.broker.declare("plain");
    world.broker.send("plain", numbered("m", 5_000));
    assert_eq!(world.broker.ready("plain"), 5_000);
    assert!(!world.broker.is_empty("plain"));
    assert_eq!(world.broker.take("plain").len(), 5_000);
    assert!(world.broker.is_empty("plain"));
}

#[test]
#[should_panic(expected = "no queue takes")]
fn a_publish_that_reaches_no_queue_is_noticed() {
    World::new().broker.send("nowhere", [Msg::new("lost")]);
}

#[test]
fn an_effect_applied_twice_shows() {
    let world = World::new();
    for id in ["a", "b", "b"] {
        let insert = format!("insert into effect (message_id) values ('{id}')");
        world.db.execute(&insert);
    }
    assert_eq!(world.db.applied_twice(), ["b"]);
    assert_eq!(world.db.effects()["a"], 1);
}

#[test]
fn a_flush_forgets_this_worlds_keys_alone() {
    let (world, other) = (World::new(), World::new());
    let (key, foreign) = (format!("{}:k", world.name()), format!("{}:k", other.name()));
    world.redis.set(&key, "c:1", 60_000);
    other.redis.set(&foreign, "c:2", 60_000);
    assert_eq!(world.redis.claims(), [key]);
    assert_eq!(world.redis.flush(), 1);
    assert_eq!(other.redis.get(&foreign).as_deref(), Some("c:2"));
}

#[test]
fn the_raw_client_sends_and_reads_any_bytes() {
    let world = World::new();
    world.broker.declare("plain");
    let mut client = RawClient::connect(world.amqp_url());
    let properties = Properties::new(b"\xFF\xFE").short(flag::CONTENT_TYPE, b"\xC3\x28");
    let body = vec![b'x'; 300_000];
    client.publish("", b"plain", &properties, &body);
    for header in [
        raw::nested_arrays(b"deep", 26_000),
        raw::nested_tables(b"deep", 4_000),
    ] {
        let properties = Properties::new(b"deep").headers(&[header]);
        client.publish("", b"plain", &properties, b"");
    }
    let got = client.get("plain").unwrap();
    assert_eq!(got.body, body);
    assert!(got.properties.windows(2).any(|bytes| bytes == b"\xFF\xFE"));
    assert_eq!(client.get("plain").unwrap().properties.len(), 130_017);
    assert!(client.get("plain").is_some());
    assert!(client.get("plain").is_none());
}

#[test]
fn a_connection_is_closed_through_the_management_api() {
    let world = World::new();
    let mut found = Vec::new();
    eventually("the connection is listed", || {
        found = world.management.connections(world.name());
        !found.is_empty()
    });
    assert!(world.management.close_connection(&found[0]));
    eventually("the connection is gone", || {
        world.management.connections(world.name()).is_empty()
    });
}

#[test]
fn a_commit_is_cut_before_it_is_sent_or_before_its_reply() {
    let world = World::new();
    for (cut, committed) in [(Cut::BeforeCommit, 0), (Cut::BeforeReply, 1)] {
        let proxy = Proxy::before(world.postgres_url(), 5432);
        proxy.cut_commits(cut, 1, 0);
        let through = std::panic::AssertUnwindSafe(Database::connect(proxy.url()));
        let outcome = std::panic::catch_unwind(|| {
            through.execute("begin");
            through.execute("insert into effect (message_id) values ('one')");
            through.execute("commit");
        });
        assert!(outcome.is_err(), "the client does not hear of its commit");
        assert_eq!(proxy.cuts(), 1);
        assert_eq!(world.db.effect_count(), committed, "{cut:?}");
    }
}
