//! The daemon's own headers, written by somebody else.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use amiquip::{AmqpValue, ExchangeDeclareOptions, ExchangeType, FieldTable};

use crate::common::{
    Config, Consumer, Msg, ORDERS, ORDERS_DEAD, RECORD_AMOUNT, Tool, World, eventually,
};

fn text(text: &str) -> AmqpValue {
    AmqpValue::LongString(text.to_owned())
}

/// A message that claims to be a copy of the daemon's.
fn forged(id: &str) -> Msg {
    Msg::new(id)
        .header("ackonce-exchange", text("payments"))
        .header("ackonce-routing-key", text("payment.refund"))
        .header("ackonce-attempts", AmqpValue::LongLongInt(4))
        .header("ackonce-replays", AmqpValue::LongLongInt(1))
        .header("ackonce-user-id", text("admin"))
        .header("ackonce-signature", text(&"0".repeat(32)))
}

#[test]
fn a_handler_sees_the_route_that_the_broker_saw_and_not_the_one_that_a_publisher_wrote() {
    let world = World::new();
    world
        .db
        .execute("create table seen (exchange text, routing_key text, headers jsonb)");
    let orders = Consumer::orders()
        .sql("insert into seen select exchange, routing_key, headers from message");
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world.broker.send(ORDERS, [forged("m")]);
    world.drain(&config, ORDERS);
    let seen = world.db.texts(
        "select concat_ws('|', exchange, routing_key, headers - 'x-delivery-count') from seen",
    );
    assert_eq!(seen, ["|orders|{}"]);
}

#[test]
fn forged_attempts_take_no_attempt_away() {
    let world = World::new();
    let orders = Consumer::orders()
        .sql(RECORD_AMOUNT)
        .failures("transient", &["22P02"])
        .max_attempts(3)
        .backoff(&["100ms"]);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    let poison = forged("m").json(&serde_json::json!({ "amount": "many" }));
    world.broker.send(ORDERS, [poison]);
    world.broker.wait_for_dead(ORDERS_DEAD, 1);
    daemon.stop();
    // The copies are the daemon's own, and counted on.
    let attempts = world
        .db
        .texts("select attempt || ' ' || routing_key from ackonce.failure order by id");
    assert_eq!(attempts, ["1 orders", "2 orders", "3 orders"]);
}

#[test]
fn duplicates_that_say_they_are_replays_cost_postgresql_nothing() {
    let world = World::new();
    let (daemon, admin) = world.watch(&world.orders());
    world.broker.send(ORDERS, [forged("m")]);
    admin.wait_for(&[("messages_total applied", 1.0), ("in_flight", 0.0)]);
    for number in 1..=5 {
        world.broker.send(ORDERS, [forged("m")]);
        admin.wait_for(&[("duplicates_total redis", f64::from(number))]);
    }
    daemon.stop();
    world.assert_each_applied_once(&["m"]);
}

/// A consumer bound to `shop`, beside an exchange and a queue of somebody else's.
fn beside_payments(world: &World) -> Config {
    let orders = Consumer::orders()
        .sql(RECORD_AMOUNT)
        .bind("shop", "topic", "order.*")
        .max_attempts(1);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let channel = world.broker.channel();
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    channel
        .exchange_declare(ExchangeType::Fanout, "payments", durable)
        .unwrap();
    world.broker.declare("refunds");
    channel
        .queue_bind("refunds", "payments", "", FieldTable::new())
        .unwrap();
    config
}

fn replay(world: &World, config: &Config, more: &[&str]) -> String {
    let arguments = [&["replay", ORDERS, "--yes", "--json"], more].concat();
    Tool::new(world, config, &arguments).run().out
}

#[test]
fn a_replay_to_the_origin_goes_nowhere_that_a_publisher_has_made_up() {
    let world = World::new();
    let config = beside_payments(&world);
    let daemon = world.run(&config);
    let poison = forged("m").json(&serde_json::json!({ "amount": "many" }));
    world.broker.send(ORDERS, [poison]);
    eventually("it is dead", || world.broker.ready(ORDERS_DEAD) == 1);
    daemon.stop();
    let said = replay(&world, &config, &["--to-origin"]);
    assert!(said.contains("\"replayed\":1"), "{said}");
    assert_eq!(world.broker.ready("refunds"), 0);
    assert_eq!(world.broker.ready(ORDERS), 1, "where it came from");
}

#[test]
fn a_replay_to_the_origin_goes_to_exchanges_of_the_bindings_alone_unless_told_otherwise() {
    let world = World::new();
    let config = beside_payments(&world);
    // As brokers before 4.0 let publishers write it.
    let death = FieldTable::from([
        ("queue".to_owned(), text(ORDERS)),
        ("reason".to_owned(), text("rejected")),
        ("exchange".to_owned(), text("payments")),
        (
            "routing-keys".to_owned(),
            AmqpValue::FieldArray(vec![text("payment.refund")]),
        ),
        ("count".to_owned(), AmqpValue::LongLongInt(1)),
        ("time".to_owned(), AmqpValue::Timestamp(now())),
    ]);
    let deaths = AmqpValue::FieldArray(vec![AmqpValue::FieldTable(death)]);
    world
        .broker
        .send(ORDERS_DEAD, [Msg::new("m").header("x-death", deaths)]);
    eventually("it is there", || world.broker.ready(ORDERS_DEAD) == 1);
    let said = replay(&world, &config, &["--to-origin", "--beyond-retention"]);
    assert!(said.contains("no-origin"), "{said}");
    assert_eq!(world.broker.ready("refunds"), 0);
    assert_eq!(world.broker.ready(ORDERS_DEAD), 1);
    replay(
        &world,
        &config,
        &["--to-origin", "--any-origin", "--beyond-retention"],
    );
    assert_eq!(world.broker.ready("refunds"), 1, "it was asked for");
}

fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap().as_secs()
}
