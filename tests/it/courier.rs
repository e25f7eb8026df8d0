//! Copies of messages: what they carry, when the original goes, and what a
//! pause gives back.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::time::Duration;

use amiquip::{AmqpValue, ExchangeDeclareOptions, ExchangeType, FieldTable, QueueDeleteOptions};

use crate::common::{
    Consumer, Daemon, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered, numbered_ids,
    try_eventually,
};

/// The dead-letter exchange of [`ORDERS`].
const DLX: &str = "orders.dlx";

/// A handler that refuses every message for good.
const REFUSE: &str = "insert into effect (message_id, amount) \
    select message_id, 'no number'::text::int from message";

/// Fails with SQLSTATE `23503` while there is no row in `wanted`.
fn fails_while_unwanted(world: &World) -> Consumer {
    world.db.execute("create table wanted (id int primary key)");
    world
        .db
        .execute("alter table effect add column wanted int references wanted");
    Consumer::orders()
        .set("retry.breaker", 0)
        .max_attempts(1_000)
        .sql("insert into effect (message_id, wanted) select message_id, 1 from message")
}

fn publishes(consumer: Consumer) -> Consumer {
    consumer.set("topology.dead_letters", "publish")
}

fn text(value: &str) -> AmqpValue {
    AmqpValue::LongString(value.to_owned())
}

fn delete(world: &World, queue: &str) {
    let channel = world.broker.channel();
    let options = QueueDeleteOptions::default();
    channel.queue_delete(queue, options).unwrap();
}

/// Deliveries of `queue` that are not acknowledged, as the broker counts them.
fn unacked(world: &World, queue: &str) -> u64 {
    let path = format!("/api/queues/{}/{queue}", world.name());
    let queue = world.management.get(&path);
    queue["messages_unacknowledged"].as_u64().unwrap_or(0)
}

#[test]
fn a_pause_of_a_consumer_with_a_small_prefetch_gives_back_once_and_then_waits() {
    let world = World::new();
    let consumer = Consumer::orders()
        .set("prefetch", 4)
        .set("batch_max", 4)
        .set("workers", 1);
    let config = world.config().consumer(consumer);
    world.prepare(&config);
    world.db.execute("alter table effect rename to gone");
    world.broker.send(ORDERS, numbered("m", 20));
    let daemon = world.run(&config);
    daemon.wait_for_log(&["paused", "42P01"]);
    let spins = try_eventually(Duration::from_secs(4), || {
        daemon.times_consuming(ORDERS) > 3
    });
    assert!(!spins, "it must not consume anew again and again");
    world.db.execute("alter table gone rename to effect");
    world.wait_for_effects(20);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 20));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_forged_routing_key_that_no_copy_can_have_does_not_keep_its_dead_letter_waiting() {
    let world = World::new();
    let config = world
        .config()
        .consumer(publishes(Consumer::orders().sql(REFUSE)));
    let daemon = world.run(&config);
    let forged = Msg::new("forged").header("ackonce-routing-key", text(&"k".repeat(300)));
    world.broker.send(ORDERS, [forged, Msg::new("honest")]);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 2);
    let reason = |id: &str| {
        let one = dead.iter().find(|dead| dead.id() == Some(id)).unwrap();
        let headers = one.properties.headers().clone().unwrap_or_default();
        headers.get("ackonce-reason").cloned()
    };
    assert_eq!(reason("honest"), Some(text("rejected")));
    assert_eq!(reason("forged"), Some(text("rejected")));
    daemon.stop();
}

#[test]
fn a_retry_keeps_every_amqp_type_of_header_and_every_property() {
    use amiquip::AmqpProperties;
    let world = World::new();
    let consumer = fails_while_unwanted(&world).backoff(&["5s"]);
    let config = world.config().consumer(consumer);
    let daemon = world.run(&config);
    let inner = FieldTable::from([("deep".to_owned(), AmqpValue::ShortShortUInt(255))]);
    let headers = [
        ("flag", AmqpValue::Boolean(true)),
        ("i8", AmqpValue::ShortShortInt(-8)),
        ("u8", AmqpValue::ShortShortUInt(8)),
        ("i16", AmqpValue::ShortInt(-16)),
        ("u16", AmqpValue::ShortUInt(16)),
        ("i32", AmqpValue::LongInt(-32)),
        ("u32", AmqpValue::LongUInt(32)),
        ("i64", AmqpValue::LongLongInt(i64::MIN)),
        ("f32", AmqpValue::Float(0.5)),
        ("f64", AmqpValue::Double(-0.25)),
        ("time", AmqpValue::Timestamp(1_700_000_000)),
        ("text", text("ä")),
        ("bytes", AmqpValue::ByteArray(vec![0, 255])),
        (
            "list",
            AmqpValue::FieldArray(vec![AmqpValue::Void, text("x")]),
        ),
        ("table", AmqpValue::FieldTable(inner)),
        ("none", AmqpValue::Void),
    ];
    let published = headers
        .iter()
        .fold(Msg::new("m"), |message, (name, value)| {
            message.header(name, value.clone())
        });
    let published = published.properties(|p: AmqpProperties| {
        p.with_content_type("application/json".to_owned())
            .with_content_encoding("utf-8".to_owned())
            .with_priority(3)
            .with_correlation_id("c".to_owned())
            .with_reply_to("r".to_owned())
            .with_timestamp(1_700_000_000)
            .with_type_("t".to_owned())
            .with_app_id("a".to_owned())
            .with_cluster_id("k".to_owned())
    });
    world.broker.send(ORDERS, [published]);
    eventually("it waits", || world.broker.ready("orders.retry.5s") == 1);
    let waiting = &world.broker.take("orders.retry.5s")[0];
    let kept = waiting.properties.headers().as_ref().unwrap();
    for (name, value) in &headers {
        assert_eq!(kept.get(*name), Some(value), "{name}");
    }
    assert_eq!(
        kept.get("ackonce-attempts"),
        Some(&AmqpValue::LongLongInt(1))
    );
    // The others are origin and signature; the queue it waits in adds a count of its own.
    let of_the_broker = usize::from(kept.contains_key("x-delivery-count"));
    assert_eq!(kept.len(), headers.len() + 4 + of_the_broker, "{kept:?}");
    let p = &waiting.properties;
    assert_eq!(p.content_type().as_deref(), Some("application/json"));
    assert_eq!(p.content_encoding().as_deref(), Some("utf-8"));
    assert_eq!((*p.priority(), *p.delivery_mode()), (Some(3), Some(2)));
    assert_eq!(p.correlation_id().as_deref(), Some("c"));
    assert_eq!(p.reply_to().as_deref(), Some("r"));
    assert_eq!(*p.timestamp(), Some(1_700_000_000));
    assert_eq!(p.type_().as_deref(), Some("t"));
    assert_eq!(p.app_id().as_deref(), Some("a"));
    assert_eq!(p.cluster_id().as_deref(), Some("k"));
    daemon.stop();
}

#[test]
fn retries_whose_queue_is_deleted_are_neither_lost_nor_acked_before_it_is_back() {
    let world = World::new();
    let consumer = fails_while_unwanted(&world).backoff(&["300ms"]);
    let config = world.config().consumer(consumer);
    let daemon = world.run(&config);
    delete(&world, "orders.retry.300ms");
    world.broker.send(ORDERS, numbered("m", 300));
    daemon.wait_for_log(&["copies of messages wait", "orders.retry.300ms"]);
    eventually("it is declared again", || {
        let path = format!("/api/queues/{}?columns=name", world.name());
        let queues = world.management.get(&path).to_string();
        queues.contains("orders.retry.300ms")
    });
    world.db.execute("insert into wanted values (1)");
    world.wait_for_effects(300);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 300));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_missing_dead_letter_exchange_multiplies_no_retry() {
    let world = World::new();
    world.db.execute(
        "create function judge(id text) returns text language plpgsql as $$ begin \
         if id like 'dead%' then raise exception 'no' using errcode = '22000'; end if; \
         raise exception 'not yet' using errcode = '23503'; end $$",
    );
    let consumer = publishes(Consumer::orders())
        .set("retry.breaker", 0)
        .max_attempts(2)
        .backoff(&["1h"])
        .sql("insert into effect (message_id) select judge(message_id) from message");
    world.prepare(&world.config().consumer(consumer.clone()));
    // It would make the exchange again otherwise.
    let config = world
        .config()
        .consumer(consumer.set("topology.mode", "verify"));
    let daemon = world.run(&config);
    let channel = world.broker.channel();
    channel.exchange_delete(DLX, false).unwrap();
    world.broker.send(ORDERS, numbered("dead", 20));
    daemon.wait_for_log(&["copies of messages wait", "NOT_FOUND"]);
    for round in 1..=20 {
        world
            .broker
            .send(ORDERS, numbered(&format!("r{round}"), 10));
        eventually("they wait", || {
            world.broker.ready("orders.retry.1h") >= round * 10
        });
    }
    // The first dead letter has told that the exchange is gone: from then on
    // none takes a retry with it when the broker closes the channel.
    assert_eq!(world.broker.ready("orders.retry.1h"), 200, "copies");
    assert!(
        daemon.count_logged(&["copies of messages wait"]) < 40,
        "it is told ever more rarely"
    );
    eventually("only dead letters are held", || {
        unacked(&world, ORDERS) == 20
    });
    // Back again, it takes them all.
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    channel
        .exchange_declare(ExchangeType::Fanout, DLX, durable)
        .unwrap();
    channel
        .queue_bind(ORDERS_DEAD, DLX, "", FieldTable::new())
        .unwrap();
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 20);
    assert!(
        dead.iter()
            .all(|dead| dead.id().unwrap().starts_with("dead"))
    );
    stop_and_find_nothing(daemon, &world);
}

fn stop_and_find_nothing(daemon: Daemon, world: &World) {
    daemon.stop();
    assert!(world.broker.is_empty(ORDERS));
}
