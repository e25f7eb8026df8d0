//! What the daemon needs on the broker: made, compared or looked for, and the
//! proof that a dead letter has somewhere to go.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

pub mod stage;

use std::time::{Duration, Instant};

use ackonce::broker::topology::{self, PROBE_HEADER, TopologyError};
use amiquip::{AmqpValue, ConsumerMessage, ConsumerOptions, ExchangeType};

use crate::common::{Consumer, DEADLINE, Msg, ORDERS, ORDERS_DEAD, eventually, run_ackonce};
use stage::{DLX, Stage, checked, foreign, orders};

const TYPES: [&str; 2] = ["quorum", "classic"];

fn missing(result: Result<(), TopologyError>) -> String {
    match result {
        Err(error @ TopologyError::Missing { .. }) => {
            assert!(error.is_config());
            error.to_string()
        }
        other => panic!("{other:?}"),
    }
}

fn assert_nowhere(result: Result<(), TopologyError>) {
    match result {
        Err(error @ TopologyError::Nowhere { .. }) => {
            assert!(error.is_config());
            let text = error.to_string();
            for part in [DLX, ORDERS_DEAD, "hint: bind", "mode = \"declare\""] {
                assert!(text.contains(part), "{part} is not in {text}");
            }
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn declaring_makes_one_queue_for_each_delay_that_can_occur_and_a_second_time_nothing() {
    for queue_type in TYPES {
        let mut stage = Stage::new();
        let steps = ["1m30s", "500ms", "1m30s", "2h"];
        let consumer = orders("declare", queue_type)
            .backoff(&steps)
            .max_attempts(4);
        let consumer = consumer.bind("events", "topic", "order.#");
        stage.prepare(consumer.clone()).unwrap();
        let made = [
            ORDERS,
            ORDERS_DEAD,
            "orders.retry.1m30s",
            "orders.retry.500ms",
        ];
        assert_eq!(stage.queues(), made);
        let before = stage.exchanges_and_bindings();
        stage.prepare(consumer).unwrap();
        assert_eq!(stage.queues(), made);
        assert_eq!(stage.exchanges_and_bindings(), before);
        assert!(stage.world.broker.is_empty(ORDERS_DEAD));
    }
}

#[test]
fn where_nothing_is_retried_no_retry_queue_is_made() {
    let mut stage = Stage::new();
    let consumer = Consumer::orders().max_attempts(1);
    stage.prepare(consumer).unwrap();
    assert_eq!(stage.queues(), [ORDERS, ORDERS_DEAD]);
}

#[test]
fn a_message_comes_back_from_its_retry_queue_after_the_delay_and_a_longer_one_holds_up_none() {
    for queue_type in TYPES {
        let mut stage = Stage::new();
        let consumer = orders("declare", queue_type).backoff(&["700ms", "1h"]);
        stage.prepare(consumer).unwrap();
        let broker = &stage.world.broker;
        broker.send("orders.retry.1h", [Msg::new("late")]);
        let since = Instant::now();
        broker.send("orders.retry.700ms", [Msg::new("soon")]);
        let back = broker.wait_for_dead(ORDERS, 1);
        assert!(since.elapsed() >= Duration::from_millis(700));
        assert_eq!(back[0].id(), Some("soon"));
        assert_eq!(back[0].death().as_deref(), Some("expired"));
        eventually("the other one waits", || {
            broker.ready("orders.retry.1h") == 1
        });
    }
}

#[test]
fn a_retry_queue_that_was_deleted_is_made_again_but_only_in_mode_declare() {
    let mut stage = Stage::new();
    let consumer = Consumer::orders();
    stage.prepare(consumer.clone()).unwrap();
    stage.delete("orders.retry.1s");
    for (mode, again) in [("verify", false), ("none", false), ("declare", true)] {
        let config = checked(&stage.world, consumer.clone().set("topology.mode", mode));
        let consumer = &config.consumers[0];
        topology::declare_again(&mut stage.link, consumer, DEADLINE).unwrap();
        let exists = stage.queues().contains(&"orders.retry.1s".to_owned());
        assert_eq!(exists, again, "{mode}");
    }
}

#[test]
fn verifying_makes_nothing_and_names_what_is_missing() {
    let mut stage = Stage::new();
    let nothing = stage.exchanges_and_bindings();
    let text = missing(stage.prepare(orders("verify", "quorum")));
    assert!(
        text.contains(DLX) && text.contains("mode = \"declare\""),
        "{text}"
    );
    assert_eq!(stage.queues(), [""; 0]);
    assert_eq!(stage.exchanges_and_bindings(), nothing);

    stage.prepare(Consumer::orders()).unwrap();
    for queue in ["orders.retry.1s", ORDERS, ORDERS_DEAD] {
        stage.delete(queue);
        let text = missing(stage.prepare(orders("verify", "quorum")));
        assert!(text.contains(&format!("queue {queue}:")), "{text}");
        assert!(!stage.queues().contains(&queue.to_owned()));
        stage.prepare(Consumer::orders()).unwrap();
    }
    let unfed = orders("verify", "quorum").bind("events", "fanout", "");
    let text = missing(stage.prepare(unfed));
    assert!(text.contains("exchange events"), "{text}");
}

#[test]
fn what_exists_with_another_argument_is_refused_with_its_name() {
    let mut stage = Stage::new();
    stage.prepare(Consumer::orders()).unwrap();
    for mode in ["declare", "verify"] {
        let limited = orders(mode, "quorum").set("topology.delivery_limit", 7);
        let classic = orders(mode, "classic");
        for (consumer, argument) in [(limited, "x-delivery-limit"), (classic, "x-queue-type")] {
            match stage.prepare(consumer).unwrap_err() {
                error @ TopologyError::Mismatch { .. } => {
                    assert!(error.is_config());
                    assert!(error.to_string().contains(argument), "{error}");
                }
                other => panic!("{other}"),
            }
        }
    }
}

#[test]
fn a_work_queue_that_dead_letters_nowhere_is_refused_and_the_way_out_is_named() {
    for queue_type in TYPES {
        for mode in ["declare", "verify"] {
            let mut stage = Stage::new();
            stage.prepare(orders("declare", queue_type)).unwrap();
            stage.delete(ORDERS);
            stage.declare_queue(ORDERS, &[("x-queue-type", queue_type)]);
            let error = stage.prepare(orders(mode, queue_type)).unwrap_err();
            assert!(matches!(error, TopologyError::Mismatch { .. }), "{error}");
            let text = error.to_string();
            for part in [
                "queue orders",
                "x-dead-letter-",
                "dead_letters = \"publish\"",
            ] {
                assert!(text.contains(part), "{part} is not in {text}");
            }
            // That way out is one.
            stage.prepare(foreign()).unwrap();
        }
    }
}

#[test]
fn a_dead_letter_exchange_that_leads_to_no_queue_is_refused_until_one_is_bound() {
    for queue_type in TYPES {
        for dead_letters in ["reject", "publish"] {
            let mut stage = Stage::new();
            stage.prepare(orders("declare", queue_type)).unwrap();
            stage.unbind();
            let verified = orders("verify", queue_type).set("topology.dead_letters", dead_letters);
            assert_nowhere(stage.prepare(verified.clone()));
            assert_nowhere(stage.prepare(foreign()));
            assert_eq!(stage.exchanges_and_bindings().1, stage.queues().len());
            stage.bind();
            stage.prepare(verified.clone()).unwrap();
            stage.unbind();
            // Declaring binds it.
            stage.prepare(orders("declare", queue_type)).unwrap();
            stage.prepare(verified).unwrap();
        }
    }
}

#[test]
fn of_a_foreign_topology_only_what_is_used_must_exist() {
    let mut stage = Stage::new();
    let never_again = || foreign().max_attempts(1);
    assert!(missing(stage.prepare(never_again())).contains(DLX));
    stage.declare_exchange(DLX, ExchangeType::Fanout, false);
    assert!(missing(stage.prepare(never_again())).contains("queue orders:"));
    stage.declare_queue(ORDERS, &[]);
    assert_nowhere(stage.prepare(never_again()));
    stage.declare_queue(ORDERS_DEAD, &[("x-overflow", "reject-publish")]);
    stage.bind();
    stage.prepare(never_again()).unwrap();
    let text = missing(stage.prepare(foreign()));
    assert!(text.contains("orders.retry.100ms"), "{text}");
    assert_eq!(stage.queues(), [ORDERS, ORDERS_DEAD]);
}

#[test]
fn an_exchange_that_takes_no_messages_from_clients_is_refused_as_denied() {
    let mut stage = Stage::new();
    stage.declare_queue(ORDERS, &[]);
    stage.declare_exchange(DLX, ExchangeType::Fanout, true);
    let error = stage.prepare(foreign().max_attempts(1)).unwrap_err();
    assert!(matches!(error, TopologyError::Denied { .. }), "{error}");
    assert!(!error.is_config());
    assert!(error.to_string().contains("internal"), "{error}");
}

#[test]
fn a_probe_neither_stays_in_the_dead_letter_queue_nor_harms_what_is_there() {
    for queue_type in TYPES {
        let mut stage = Stage::new();
        stage.prepare(orders("declare", queue_type)).unwrap();
        stage.prepare(orders("verify", queue_type)).unwrap();
        stage.prepare(foreign()).unwrap();
        let broker = &stage.world.broker;
        eventually("the probes have expired", || broker.ready(ORDERS_DEAD) == 0);

        broker.send(ORDERS_DEAD, crate::common::numbered("dead", 3));
        for _ in 0..3 {
            stage.prepare(orders("verify", queue_type)).unwrap();
        }
        let broker = &stage.world.broker;
        let there = broker.take(ORDERS_DEAD);
        let ids: Vec<_> = there.iter().filter_map(|dead| dead.id()).collect();
        assert_eq!(ids, crate::common::numbered_ids("dead", 3));
        assert_eq!(there.len(), 3, "no probe is handed out");
        eventually("the probes have expired", || broker.ready(ORDERS_DEAD) == 0);
    }
}

#[test]
fn who_consumes_the_dead_letter_queue_can_tell_a_probe() {
    for queue_type in TYPES {
        let mut stage = Stage::new();
        stage.prepare(orders("declare", queue_type)).unwrap();
        let channel = stage.world.broker.channel();
        let options = ConsumerOptions::default();
        let consumer = channel.basic_consume(ORDERS_DEAD, options).unwrap();
        stage.prepare(orders("verify", queue_type)).unwrap();
        match consumer.receiver().recv_timeout(DEADLINE).unwrap() {
            ConsumerMessage::Delivery(delivery) => {
                let headers = delivery.properties.headers().as_ref().unwrap();
                let name = AmqpValue::LongString(ORDERS.to_owned());
                assert_eq!(headers.get(PROBE_HEADER), Some(&name));
                assert!(delivery.body.ends_with(b"drop it."));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_look_makes_nothing_and_sends_nothing() {
    let mut stage = Stage::new();
    let nothing = stage.exchanges_and_bindings();
    let found = stage.inspect(Consumer::orders()).unwrap();
    let expected = [
        "exchange orders.dlx",
        "queue orders.dead",
        "queue orders",
        "queue orders.retry.100ms",
        "queue orders.retry.1s",
    ];
    assert_eq!(found.missing, expected);
    assert_eq!(found.unproved, [""; 0]);
    assert!(stage.inspect(orders("verify", "quorum")).is_err());
    assert!(stage.inspect(foreign()).is_err());
    assert_eq!(stage.queues(), [""; 0]);
    assert_eq!(stage.exchanges_and_bindings(), nothing);

    stage.prepare(Consumer::orders()).unwrap();
    stage.unbind();
    assert_eq!(stage.inspect(Consumer::orders()).unwrap().missing, [""; 0]);
    for consumer in [orders("verify", "quorum"), foreign()] {
        let unproved = stage.inspect(consumer).unwrap().unproved.concat();
        assert!(unproved.contains(DLX), "{unproved}");
    }
    stage.bind();
    assert!(stage.world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_daemon_whose_dead_letters_have_nowhere_to_go_refuses_to_start_and_says_why() {
    let mut stage = Stage::new();
    stage.prepare(Consumer::orders()).unwrap();
    stage.unbind();
    let config = stage.world.config().consumer(orders("verify", "quorum"));
    let path = stage.world.write("nowhere.toml", &config.text());
    let path = path.to_str().unwrap();
    assert!(run_ackonce(&["migrate", "--config", path]).status.success());
    let check = run_ackonce(&["check", "--config", path]);
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(
        said.contains("not proved: that exchange orders.dlx"),
        "{said}"
    );
    let mut daemon = stage.world.daemon(&config).start();
    assert_eq!(daemon.wait().code(), Some(78));
    assert!(daemon.logged(&["no queue takes what exchange orders.dlx"]));
}
