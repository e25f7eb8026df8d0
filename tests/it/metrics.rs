//! `/metrics` after a history that is known to the message: each event is
//! counted once, where it is known, in both kinds of handlers.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod page;
mod reload;
mod workers;

use crate::common::raw::{Properties, RawClient};
use crate::common::{
    Admin, Answer, Consumer, Cut, Msg, ORDERS, ORDERS_DEAD, Proxy, RECORD_AMOUNT, Receiver,
    RedisServer, World, eventually, numbered,
};

/// Nothing is lost sight of: each delivery is in flight or has an outcome.
fn assert_balanced(admin: &Admin) {
    let mut last = (0.0, 0.0);
    let balanced = crate::common::try_eventually(crate::common::DEADLINE, || {
        let series = admin.metrics();
        let outcomes = series.value("messages_total") + series.value("in_flight");
        last = (series.value("deliveries_total"), outcomes);
        last.0 == last.1
    });
    let all = admin.text();
    assert!(
        balanced,
        "deliveries and what became of them: {last:?}\n{all}"
    );
}

/// Its rows refuse the amount 13 until that is mended: a failure that may pass.
const NO_13: &str = "alter table effect add constraint no_13 check (amount is distinct from 13)";

fn amount(id: &str, amount: impl Into<serde_json::Value>) -> Msg {
    Msg::new(id).json(&serde_json::json!({ "amount": amount.into() }))
}

/// Publishes a message whose id is not UTF-8.
fn send_bad_header(world: &World) {
    let mut raw = RawClient::connect(world.amqp_url());
    raw.publish("", ORDERS.as_bytes(), &Properties::new(b"\xff\xfe"), b"{}");
}

#[test]
fn a_transactional_history_is_counted_to_the_message() {
    let world = World::new();
    let consumer = Consumer::orders()
        .sql(RECORD_AMOUNT)
        .max_attempts(2)
        .set("max_body", "1KiB");
    let (daemon, admin) = world.watch(&world.config().consumer(consumer));
    world.db.execute(NO_13);
    let fresh = || (0..10).map(|number| amount(&format!("m-{number}"), number));
    world.broker.send(ORDERS, fresh());
    admin.wait_for(&[("messages_total applied", 10.0)]);
    // The marks follow the acks of nobody: they are there by now.
    world.broker.send(ORDERS, fresh().take(3));
    admin.wait_for(&[("duplicates_total redis", 3.0)]);
    world.redis.flush();
    world.broker.send(ORDERS, fresh().take(2));
    admin.wait_for(&[("duplicates_total ledger", 2.0)]);
    world.broker.send(
        ORDERS,
        [
            amount("m-0", 77),
            Msg::anonymous(),
            amount("too-large", "x".repeat(2_000)),
            amount("rejected", "no number"),
            amount("exhausted", 13),
        ],
    );
    send_bad_header(&world);
    let expected = [
        ("deliveries_total", 22.0),
        ("redeliveries_total", 0.0),
        ("messages_total applied", 10.0),
        ("messages_total duplicate", 5.0),
        ("messages_total retried", 1.0),
        ("messages_total dead-lettered", 6.0),
        ("messages_total returned", 0.0),
        ("messages_total lost", 0.0),
        ("duplicates_total redis", 3.0),
        ("duplicates_total ledger", 2.0),
        ("duplicates_total flight", 0.0),
        ("dead_letters_total id-conflict", 1.0),
        ("dead_letters_total missing-id", 1.0),
        ("dead_letters_total too-large", 1.0),
        ("dead_letters_total rejected", 1.0),
        ("dead_letters_total max-attempts", 1.0),
        ("dead_letters_total bad-header", 1.0),
        ("dead_letters_total crash-loop", 0.0),
        ("failed_attempts_total permanent", 1.0),
        ("failed_attempts_total transient", 2.0),
        ("failed_attempts_total systemic", 0.0),
        ("ledger_errors_total", 0.0),
        ("ledger_waits_total", 0.0),
        ("settle_duration_seconds_count", 22.0),
        ("message_age_seconds_count", 0.0),
        ("in_flight", 0.0),
        ("parked", 0.0),
        ("copies_waiting", 0.0),
        ("reconnects_total", 0.0),
        ("pauses_total", 0.0),
        ("worker_panics_total", 0.0),
        ("consuming", 1.0),
        ("server_up rabbitmq", 1.0),
        ("server_up redis", 1.0),
        ("server_up postgresql", 1.0),
    ];
    admin.wait_for(&expected);
    world.broker.wait_for_dead(ORDERS_DEAD, 6);
    admin.wait_for(&expected);
    assert_eq!(admin.metrics().value("batch_messages_sum"), 22.0);
    assert_balanced(&admin);
    daemon.stop();
}

#[test]
fn a_keyed_history_is_counted_to_the_message() {
    let world = World::new();
    let receiver = Receiver::new(|request| match request.key().as_str() {
        "orders:rejected" => Answer::status(422),
        "orders:exhausted" => Answer::status(503),
        _ => Answer::status(200),
    });
    let consumer = Consumer::orders()
        .handler("http")
        .set("handler.url", receiver.url())
        .max_attempts(2);
    let (daemon, admin) = world.watch(&world.config().consumer(consumer));
    world.broker.send(ORDERS, numbered("m", 10));
    admin.wait_for(&[("messages_total applied", 10.0)]);
    world.broker.send(ORDERS, numbered("m", 3));
    admin.wait_for(&[("duplicates_total redis", 3.0)]);
    world.redis.flush();
    world.broker.send(ORDERS, numbered("m", 2));
    admin.wait_for(&[("duplicates_total ledger", 2.0)]);
    let other = Msg::new("m-0").body("{}");
    let failing = ["rejected", "exhausted"].map(Msg::new);
    world.broker.send(ORDERS, [other, Msg::anonymous()]);
    world.broker.send(ORDERS, failing);
    let expected = [
        ("deliveries_total", 20.0),
        ("messages_total applied", 10.0),
        ("messages_total duplicate", 5.0),
        ("messages_total retried", 1.0),
        ("messages_total dead-lettered", 4.0),
        ("duplicates_total redis", 3.0),
        ("duplicates_total ledger", 2.0),
        ("dead_letters_total id-conflict", 1.0),
        ("dead_letters_total missing-id", 1.0),
        ("dead_letters_total rejected", 1.0),
        ("dead_letters_total max-attempts", 1.0),
        ("failed_attempts_total permanent", 1.0),
        ("failed_attempts_total transient", 2.0),
        ("failed_attempts_total systemic", 0.0),
        ("handler_duration_seconds_count", 13.0),
        ("settle_duration_seconds_count", 20.0),
        ("batch_messages_sum", 20.0),
        ("ledger_errors_total", 0.0),
        ("claims_lost_total", 0.0),
        ("in_flight", 0.0),
        ("copies_waiting", 0.0),
        ("server_up postgresql", 1.0),
        ("consumer_info http keyed orders", 1.0),
    ];
    admin.wait_for(&expected);
    assert_balanced(&admin);
    daemon.stop();
}

#[test]
fn a_duplicate_of_what_is_in_work_is_found_in_flight() {
    let world = World::new();
    let config = world
        .config()
        .consumer(Consumer::orders().set("workers", 1));
    let (daemon, admin, gate) = world.watch_paused_at(&config, "recorded");
    world.broker.send(ORDERS, [Msg::new("first")]);
    gate.wait_until_hit();
    world
        .broker
        .send(ORDERS, [Msg::new("twin"), Msg::new("twin")]);
    admin.wait_for(&[("in_flight", 3.0)]);
    gate.open();
    admin.wait_for(&[
        ("messages_total applied", 2.0),
        ("messages_total duplicate", 1.0),
        ("duplicates_total flight", 1.0),
        ("duplicates_total", 1.0),
        ("in_flight", 0.0),
    ]);
    daemon.stop();
}

#[test]
fn a_delivery_that_waits_for_a_claim_is_parked_and_counted_once() {
    let world = World::new();
    let orders = Consumer::orders().set("claim.lease", "15m");
    let (daemon, admin) = world.watch(&world.config().consumer(orders));
    let key = world.claim_key(ORDERS, "held");
    world.redis.set(&key, "c:somebody", 60_000);
    world.broker.send(ORDERS, [Msg::new("held")]);
    // It is looked at again every 50 ms meanwhile.
    admin.wait_for(&[("parked", 1.0), ("ledger_waits_total", 1.0)]);
    world.broker.send(ORDERS, numbered("m", 20));
    admin.wait_for(&[("messages_total applied", 20.0), ("in_flight", 1.0)]);
    world.redis.flush();
    admin.wait_for(&[
        ("messages_total applied", 21.0),
        ("ledger_waits_total", 1.0),
        ("parked", 0.0),
        ("in_flight", 0.0),
    ]);
    daemon.stop();
}

#[test]
fn a_pause_shows_its_cause_and_ends_with_it() {
    let world = World::new();
    let (daemon, admin) = world.watch(&world.orders());
    world.db.execute("alter table effect rename to gone");
    world.broker.send(ORDERS, numbered("m", 50));
    admin.wait_for(&[("paused systemic", 1.0), ("paused breaker", 0.0)]);
    // What it holds goes back, all but a few.
    eventually("the broker has most of them back", || {
        world.broker.ready(ORDERS) >= 20
    });
    assert!(admin.metrics().value("messages_total returned") >= 20.0);
    assert!(admin.metrics().value("failed_attempts_total systemic") >= 1.0);
    world.db.execute("alter table gone rename to effect");
    admin.wait_for(&[
        ("messages_total applied", 50.0),
        ("messages_total duplicate", 0.0),
        ("paused", 0.0),
        ("pauses_total systemic", 1.0),
        ("pauses_total breaker", 0.0),
        ("failed_attempts_total transient", 0.0),
        ("in_flight", 0.0),
    ]);
    assert_balanced(&admin);
    daemon.stop();
}

#[test]
fn the_breaker_is_a_cause_of_its_own() {
    let world = World::new();
    let consumer = Consumer::orders()
        .sql(RECORD_AMOUNT)
        .set("retry.breaker", 3);
    let (daemon, admin) = world.watch(&world.config().consumer(consumer));
    world.db.execute(NO_13);
    let failing = (0..9).map(|number| amount(&format!("m-{number}"), 13));
    world.broker.send(ORDERS, failing);
    admin.wait_for(&[("pauses_total breaker", 1.0), ("paused breaker", 1.0)]);
    world.db.execute("alter table effect drop constraint no_13");
    admin.wait_for(&[
        ("messages_total applied", 9.0),
        ("pauses_total breaker", 1.0),
        ("pauses_total systemic", 0.0),
        ("paused", 0.0),
    ]);
    assert_balanced(&admin);
    daemon.stop();
}

#[test]
fn what_was_applied_before_its_connection_was_lost_is_applied_once_and_then_a_duplicate() {
    let world = World::new();
    let config = world.orders();
    let (daemon, admin, gate) = world.watch_paused_at(&config, "committed");
    world.broker.send(ORDERS, [Msg::new("one")]);
    gate.wait_until_hit();
    world.close_connection("orders consumer");
    admin.wait_for(&[
        ("reconnects_total rabbitmq", 1.0),
        ("server_up rabbitmq", 1.0),
        ("consuming", 1.0),
        ("deliveries_total", 2.0),
        ("redeliveries_total", 1.0),
    ]);
    gate.open();
    admin.wait_for(&[
        ("messages_total applied", 1.0),
        ("messages_total duplicate", 1.0),
        ("messages_total lost", 0.0),
        ("reconnects_total", 1.0),
        ("in_flight", 0.0),
    ]);
    assert_balanced(&admin);
    daemon.stop();
    world.assert_each_applied_once(&["one"]);
}

#[test]
fn a_dead_letter_that_the_broker_was_not_told_of_is_lost_and_counted_when_it_is() {
    let world = World::new();
    let config = world
        .config()
        .consumer(Consumer::orders().sql(RECORD_AMOUNT));
    let (daemon, admin, gate) = world.watch_paused_at(&config, "journaled");
    world.broker.send(ORDERS, [amount("bad", "no number")]);
    gate.wait_until_hit();
    world.close_connection("orders consumer");
    admin.wait_for(&[("deliveries_total", 2.0)]);
    gate.open();
    world.broker.wait_for_dead(ORDERS_DEAD, 1);
    admin.wait_for(&[
        ("messages_total lost", 1.0),
        ("messages_total dead-lettered", 1.0),
        ("dead_letters_total rejected", 1.0),
        ("dead_letters_total", 1.0),
        ("in_flight", 0.0),
    ]);
    assert_balanced(&admin);
    daemon.stop();
}

#[test]
fn a_dead_letter_that_the_daemon_publishes_counts_when_the_broker_has_it() {
    let world = World::new();
    let consumer = Consumer::orders()
        .sql(RECORD_AMOUNT)
        .max_attempts(2)
        .set("topology.dead_letters", "publish");
    let (daemon, admin) = world.watch(&world.config().consumer(consumer));
    world.db.execute(NO_13);
    world
        .broker
        .send(ORDERS, [amount("bad", "no number"), amount("slow", 13)]);
    world.broker.wait_for_dead(ORDERS_DEAD, 2);
    admin.wait_for(&[
        ("deliveries_total", 3.0),
        ("messages_total retried", 1.0),
        ("messages_total dead-lettered", 2.0),
        ("dead_letters_total rejected", 1.0),
        ("dead_letters_total max-attempts", 1.0),
        ("copies_waiting", 0.0),
        ("in_flight", 0.0),
    ]);
    assert_balanced(&admin);
    daemon.stop();
}

#[test]
fn a_commit_that_went_unanswered_is_applied_and_no_duplicate() {
    let world = World::new();
    let proxy = Proxy::before(world.postgres_url(), 5432);
    let config = world.orders().set("postgres.url", proxy.url());
    let (daemon, admin) = world.watch(&config);
    world.broker.send(ORDERS, [Msg::new("before")]);
    admin.wait_for(&[("messages_total applied", 1.0)]);
    proxy.cut_commits(Cut::BeforeReply, 1, 0);
    world.broker.send(ORDERS, [Msg::new("cut")]);
    proxy.wait_for_cuts(1);
    admin.wait_for(&[
        ("messages_total applied", 2.0),
        ("messages_total duplicate", 0.0),
        ("duplicates_total", 0.0),
        ("ledger_errors_total commit", 1.0),
        ("ledger_errors_total", 1.0),
        ("failed_attempts_total", 0.0),
        ("server_up postgresql", 1.0),
    ]);
    daemon.stop();
    world.assert_each_applied_once(&["before", "cut"]);
}

#[test]
fn postgresql_that_goes_away_and_comes_back_is_shown() {
    for keyed in [false, true] {
        let world = World::new();
        let receiver = Receiver::willing();
        let proxy = Proxy::before(world.postgres_url(), 5432);
        let consumer = match keyed {
            true => Consumer::orders()
                .handler("http")
                .set("handler.url", receiver.url()),
            false => Consumer::orders(),
        };
        let config = world.config().consumer(consumer);
        let (daemon, admin) = world.watch(&config.set("postgres.url", proxy.url()));
        world.broker.send(ORDERS, [Msg::new("before")]);
        admin.wait_for(&[("messages_total applied", 1.0)]);
        proxy.go_down();
        world.broker.send(ORDERS, [Msg::new("during")]);
        admin.wait_for(&[("server_up postgresql", 0.0), ("paused systemic", 1.0)]);
        let step = if keyed { "claim" } else { "record" };
        let errors = admin
            .metrics()
            .value(&format!("ledger_errors_total {step}"));
        assert!(errors >= 1.0, "{errors}");
        proxy.come_up();
        admin.wait_for(&[
            ("messages_total applied", 2.0),
            ("server_up postgresql", 1.0),
            ("paused", 0.0),
        ]);
        assert!(admin.metrics().value("reconnects_total postgresql") >= 1.0);
        daemon.stop();
    }
}

#[test]
fn redis_that_goes_away_and_comes_back_is_shown() {
    let world = World::new();
    let mut redis = RedisServer::start();
    let (daemon, admin) = world.watch(&world.orders().set("redis.url", redis.url()));
    admin.wait_for(&[("server_up redis", 1.0)]);
    redis.kill();
    world.broker.send(ORDERS, [Msg::new("without")]);
    admin.wait_for(&[("messages_total applied", 1.0), ("server_up redis", 0.0)]);
    redis.start_again(&[]);
    admin.wait_for(&[("server_up redis", 1.0), ("reconnects_total redis", 1.0)]);
    daemon.stop();
}

#[test]
fn what_a_stop_gives_back_is_counted_as_returned() {
    let world = World::new();
    let config = world.config().consumer(
        Consumer::orders()
            .set("workers", 1)
            .set("batch_max", 1)
            .set("prefetch", 20),
    );
    let config = config.set("daemon.shutdown_timeout", "60s");
    let (daemon, admin, gate) = world.watch_paused_at(&config, "recorded");
    world.broker.send(ORDERS, numbered("m", 10));
    gate.wait_until_hit();
    admin.wait_for(&[("in_flight", 10.0)]);
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    admin.wait_for(&[
        ("messages_total returned", 9.0),
        ("messages_total", 9.0),
        ("deliveries_total", 10.0),
    ]);
    gate.open();
    daemon.wait_until_stopped();
    assert_eq!(world.broker.take(ORDERS).len(), 9);
}

#[test]
fn rows_that_are_pruned_are_counted() {
    let world = World::new();
    let config = world
        .orders()
        .set("ledger.retention", "1h")
        .set("ledger.prune_every", "1s");
    let (daemon, admin) = world.watch(&config);
    world.broker.send(ORDERS, [Msg::new("new")]);
    admin.wait_for(&[("messages_total applied", 1.0)]);
    let rows = |count: u32, into: &str, values: &str| {
        world.db.execute(&format!(
            "insert into ackonce.{into} select {values} \
             from ackonce.consumer c, generate_series(1, {count}) n, \
             lateral (select now() - interval '1 day' as at, 'old-' || n as id, \
             sha256('x'::bytea) as print) old where c.name = 'orders'"
        ));
    };
    rows(
        7,
        "ledger (consumer_id, message_id, fingerprint, applied_at)",
        "c.id, old.id, print, at",
    );
    rows(
        5,
        "failure (failed_at, consumer_id, attempt, message_id, fingerprint, class, error, \
         handler, host, exchange, routing_key)",
        "at, c.id, 1, old.id, print, 'transient', 'no', 'sql', 'h/1', '', 'orders'",
    );
    rows(
        3,
        "suspect (marked_at, consumer_id, message_id, owner, deaths)",
        "at, c.id, old.id, 1, 0",
    );
    rows(
        2,
        "claim (lease_until, claimed_at, owner, consumer_id, message_id, fingerprint, holder)",
        "at, at, 1, c.id, 'claimed-' || n, print, 'h/1'",
    );
    admin.wait_for(&[
        ("rows_pruned_total ledger", 7.0),
        ("rows_pruned_total failure", 5.0),
        ("rows_pruned_total suspect", 3.0),
        ("rows_pruned_total claim", 2.0),
    ]);
    daemon.stop();
}
