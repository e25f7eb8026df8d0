//! Moves that the broker makes by itself: from a retry queue back to the work
//! queue. And queues of others that cannot take messages back at all.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::process::Command;

use amiquip::{AmqpValue, ExchangeDeclareOptions, ExchangeType, FieldTable, QueueDeclareOptions};
use serde_json::json;

use crate::common::{
    Config, Consumer, Msg, ORDERS, ORDERS_DEAD, RECORD_AMOUNT, Tool, World, eventually, numbered,
};
use crate::topology::stage::DLX;

const RETRY: &str = "orders.retry.100ms";

const BAD_CONFIG: i32 = 78;

/// A message that fails until its column takes any text.
fn bad(n: usize) -> Msg {
    Msg::new(&format!("b-{n}")).json(&json!({ "amount": "many" }))
}

/// One retry after 100 ms for what fails.
fn retrying(world: &World, mode: &str, queue_type: &str) -> Config {
    let orders = Consumer::orders()
        .set("topology.mode", mode)
        .set("topology.queue_type", queue_type)
        .failures("transient", &["22P02"])
        .max_attempts(2)
        .backoff(&["100ms"])
        .sql(RECORD_AMOUNT);
    world.config().consumer(orders)
}

fn declare(world: &World, queue: &str, arguments: &[(&str, AmqpValue)], auto_delete: bool) {
    let options = QueueDeclareOptions {
        durable: true,
        auto_delete,
        arguments: arguments
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect(),
        ..QueueDeclareOptions::default()
    };
    world
        .broker
        .channel()
        .queue_declare(queue, options)
        .unwrap();
}

fn text(text: &str) -> AmqpValue {
    AmqpValue::LongString(text.to_owned())
}

/// A work queue, a dead-letter exchange and its queue, made by others.
fn foreign_topology(world: &World) {
    world.broker.declare(ORDERS);
    dead_letters(world);
}

fn dead_letters(world: &World) {
    world.broker.declare(ORDERS_DEAD);
    let channel = world.broker.channel();
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
}

/// A user who may do everything but configure.
fn without_configure(world: &World, config: Config) -> Config {
    let user = format!("plain_{:016x}", crate::common::random());
    world.management.create_user(&user, "guest", world.name());
    let path = format!("/api/permissions/{}/{user}", world.name());
    let rights = json!({ "configure": "^$", "write": ".*", "read": ".*" });
    world.management.put(&path, &rights);
    let mut url = url::Url::parse(world.amqp_url()).unwrap();
    url.set_username(&user).unwrap();
    config.set("broker.url", String::from(url))
}

#[test]
fn a_retry_that_ends_while_the_classic_work_queue_is_full_comes_when_there_is_room() {
    let ctl = std::env::var("ACKONCE_RABBITMQCTL").unwrap();
    let soon = "application:set_env(rabbit, dead_letter_worker_publisher_confirm_timeout, 500).";
    assert!(
        Command::new(ctl)
            .args(["eval", soon])
            .status()
            .unwrap()
            .success()
    );
    let world = World::new();
    let config = retrying(&world, "declare", "classic");
    world.prepare(&config);
    let limit = json!({
        "pattern": "^orders$", "definition": { "max-length": 1 }, "apply-to": "queues",
    });
    world
        .management
        .put(&format!("/api/policies/{}/limit", world.name()), &limit);
    eventually("the work queue takes one message", || {
        let path = format!("/api/queues/{}/{ORDERS}", world.name());
        world.management.get(&path)["policy"] == "limit"
    });
    world.broker.send(ORDERS, [Msg::new("filler")]);
    world.broker.send(RETRY, [Msg::new("late")]);
    eventually("its time is over", || world.broker.ready(RETRY) == 0);
    let full = world.broker.take(ORDERS);
    assert_eq!(full[0].id(), Some("filler"));
    let back = world.broker.wait_for_dead(ORDERS, 1);
    assert_eq!(back[0].id(), Some("late"));
}

#[test]
fn retry_queues_of_an_earlier_version_keep_working_and_check_says_what_they_lose() {
    let world = World::new();
    let config = retrying(&world, "declare", "classic");
    let classic = [
        ("x-queue-type", text("classic")),
        ("x-dead-letter-exchange", text("")),
        ("x-dead-letter-routing-key", text(ORDERS)),
        ("x-message-ttl", AmqpValue::LongLongInt(100)),
    ];
    declare(&world, RETRY, &classic, false);
    declare(
        &world,
        ORDERS_DEAD,
        &[("x-queue-type", text("classic"))],
        false,
    );
    world.prepare(&config);
    let said = Tool::new(&world, &config, &["check"]).run().expect(0);
    said.says(&[
        "warning",
        RETRY,
        "is dropped",
        "delete it while it is empty",
    ]);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [bad(1)]);
    eventually("it is dead after its retry", || {
        world.broker.ready(ORDERS_DEAD) == 1
    });
    daemon.stop();
}

#[test]
fn retry_queues_that_lead_nowhere_stop_the_start_and_lose_no_message() {
    let world = World::new();
    foreign_topology(&world);
    world.broker.declare(RETRY);
    let config = retrying(&world, "none", "classic");
    let checked = Tool::new(&world, &config, &["check"]).run();
    assert!(!checked.out.contains("as configured"), "{}", checked.out);
    checked.says(&["not proved", RETRY]);
    world.broker.send(ORDERS, (0..50).map(bad));
    let mut daemon = world.daemon(&config).start();
    let status = daemon.wait();
    assert_eq!(status.code(), Some(BAD_CONFIG));
    assert!(daemon.logged(&[
        "failed to find a way back",
        RETRY,
        "x-dead-letter-routing-key"
    ]));
    eventually("all are there again", || world.broker.ready(ORDERS) == 50);
}

#[test]
fn a_retry_queue_that_leads_back_by_another_way_is_proved_by_its_probe() {
    for may_configure in [true, false] {
        let world = World::new();
        foreign_topology(&world);
        let channel = world.broker.channel();
        let durable = ExchangeDeclareOptions {
            durable: true,
            ..ExchangeDeclareOptions::default()
        };
        channel
            .exchange_declare(ExchangeType::Fanout, "back", durable)
            .unwrap();
        channel
            .queue_bind(ORDERS, "back", "", FieldTable::new())
            .unwrap();
        declare(
            &world,
            RETRY,
            &[("x-dead-letter-exchange", text("back"))],
            false,
        );
        let config = retrying(&world, "none", "classic");
        let config = match may_configure {
            true => config,
            false => without_configure(&world, config),
        };
        world.broker.send(ORDERS, (0..20).map(bad));
        let daemon = world.run(&config);
        eventually("each is dead after its retry", || {
            world.broker.ready(ORDERS_DEAD) == 20
        });
        let retried = "select count(*) from ackonce.failure where retry_in is not null";
        assert_eq!(world.db.count(retried), 20);
        world.close_connection("consumer");
        eventually("it consumes again", || daemon.times_consuming(ORDERS) == 2);
        world.broker.send(ORDERS, (20..30).map(bad));
        eventually("and again", || world.broker.ready(ORDERS_DEAD) == 30);
        daemon.stop();
        assert!(world.broker.is_empty(ORDERS), "no probe is left");
        assert!(world.broker.is_empty(RETRY));
    }
}

#[test]
fn a_stream_is_refused_by_check_by_a_start_and_at_its_first_message() {
    let world = World::new();
    dead_letters(&world);
    declare(&world, ORDERS, &[("x-queue-type", text("stream"))], false);
    let foreign = world.config().consumer(
        Consumer::orders()
            .set("topology.mode", "none")
            .max_attempts(1),
    );
    let said = Tool::new(&world, &foreign, &["check"])
        .run()
        .expect(BAD_CONFIG);
    said.says(&["queue orders", "it is a stream"]);
    let mut daemon = world.daemon(&foreign).start();
    assert_eq!(daemon.wait().code(), Some(BAD_CONFIG));

    let blind = without_configure(&world, foreign);
    Tool::new(&world, &blind, &["check"])
        .run()
        .expect(0)
        .says(&["not proved", "stream"]);
    let mut daemon = world.daemon(&blind).start();
    daemon.wait_until_consuming();
    world.broker.send(ORDERS, numbered("m", 3));
    assert_eq!(daemon.wait().code(), Some(BAD_CONFIG));
    assert!(daemon.logged(&["it is a stream"]));
    assert_eq!(world.db.effect_count(), 0);
}

#[test]
fn a_publisher_who_writes_a_streams_header_stops_nothing() {
    let world = World::new();
    let config = world.orders();
    let daemon = world.run(&config);
    let forged = |message: Msg| message.header("x-stream-offset", AmqpValue::LongLongInt(7));
    world
        .broker
        .send(ORDERS, numbered("m", 50).into_iter().map(forged));
    world.wait_for_effects(50);
    assert_eq!(daemon.times_consuming(ORDERS), 1);
    daemon.stop();
}

#[test]
fn a_queue_that_goes_with_its_last_consumer_is_refused_and_survives_a_pause_where_that_is_not_seen()
{
    let world = World::new();
    dead_letters(&world);
    declare(&world, ORDERS, &[], true);
    let foreign = world.config().consumer(
        Consumer::orders()
            .set("topology.mode", "none")
            .set("prefetch", 4)
            .set("batch_max", 4)
            .max_attempts(1),
    );
    let said = Tool::new(&world, &foreign, &["check"])
        .run()
        .expect(BAD_CONFIG);
    said.says(&["queue orders", "deleted with its last consumer"]);

    let blind = without_configure(&world, foreign);
    world.db.execute("alter table effect rename to gone");
    world.broker.send(ORDERS, numbered("m", 50));
    let daemon = world.run(&blind);
    daemon.wait_for_log(&["paused", "42P01"]);
    eventually("it has paused", || daemon.times_consuming(ORDERS) == 2);
    world.db.execute("alter table gone rename to effect");
    world.wait_for_effects(50);
    daemon.stop();
}
