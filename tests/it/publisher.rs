//! Connections and the publisher, against the RabbitMQ server that
//! `ACKONCE_AMQP_URL` names, and against listeners that are no such thing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod command;
mod connecting;
mod rig;
mod tls_proxy;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use ackonce::broker::outgoing::{HEADERS_MAX, properties_max};
use ackonce::broker::publisher::{Fate, Limits, Outgoing, PublishError, Publisher, Seq};
use amiquip::{AmqpValue, FieldTable};
use serde_json::{Map, json};

use rig::{Line, PATIENCE, Queue, broker_at, nowhere, publisher};

#[test]
fn a_confirmed_message_is_in_the_queue_as_it_was_published() {
    let queue = Queue::new();
    let mut publisher = publisher();
    let headers = json!({
        "text": "ä", "yes": true, "none": null, "integer": -5, "big": i64::MAX, "half": 0.5,
        "list": [1, "two", { "three": 3 }], "table": { "inner": {} },
    });
    let message = Outgoing {
        message_id: Some("m-1".to_owned()),
        content_type: Some("application/json".to_owned()),
        timestamp: Some(1_700_000_000),
        headers: headers.as_object().unwrap().clone(),
        ..queue.message("{}")
    };
    let seq = publisher.publish(&message).unwrap();
    assert_eq!(publisher.wait_all(PATIENCE), [(seq, Fate::Confirmed)]);
    assert_eq!(publisher.close(PATIENCE), []);

    let delivery = queue.next().unwrap();
    assert_eq!(delivery.body, b"{}");
    assert_eq!(delivery.properties.message_id().as_deref(), Some("m-1"));
    assert_eq!(
        delivery.properties.content_type().as_deref(),
        Some("application/json")
    );
    assert_eq!(*delivery.properties.timestamp(), Some(1_700_000_000));
    assert_eq!(
        *delivery.properties.delivery_mode(),
        Some(2),
        "it must be persistent"
    );
    let table = delivery.properties.headers().as_ref().unwrap();
    assert_eq!(
        table.len(),
        8,
        "no header of our own may leak into a message: {table:?}"
    );
    assert_eq!(table["big"], AmqpValue::LongLongInt(i64::MAX));
    assert_eq!(table["half"], AmqpValue::Double(0.5));
    assert_eq!(table["none"], AmqpValue::Void);
    let AmqpValue::FieldArray(list) = &table["list"] else {
        panic!("{table:?}");
    };
    assert_eq!(list[1], AmqpValue::LongString("two".to_owned()));
}

#[test]
fn thousands_of_messages_are_each_confirmed_once_and_arrive_in_order() {
    const COUNT: u64 = 5_000;
    let queue = Queue::new();
    let mut publisher = publisher();
    let mut fates = Vec::new();
    for number in 0..COUNT {
        publisher
            .publish(&queue.message(number.to_string()))
            .unwrap();
        fates.extend(publisher.poll());
    }
    fates.extend(publisher.wait_all(PATIENCE));
    assert_eq!(fates.len() as u64, COUNT);
    assert!(fates.iter().all(|(_, fate)| *fate == Fate::Confirmed));
    let seqs: HashSet<Seq> = fates.iter().map(|(seq, _)| *seq).collect();
    assert_eq!(seqs.len() as u64, COUNT);
    for number in 0..COUNT {
        assert_eq!(queue.next().unwrap().body, number.to_string().into_bytes());
    }
}

#[test]
fn an_unroutable_message_is_returned_and_its_neighbours_are_confirmed() {
    let queue = Queue::new();
    let mut publisher = publisher();
    let mut lost = HashSet::new();
    let mut fates = Vec::new();
    for number in 0..500 {
        // Every third goes nowhere, some of those with equal bodies.
        if number % 3 == 0 {
            let body = format!("{}", number % 7);
            lost.insert(publisher.publish(&nowhere(&body)).unwrap());
        } else {
            publisher
                .publish(&queue.message(number.to_string()))
                .unwrap();
        }
        fates.extend(publisher.poll());
    }
    fates.extend(publisher.wait_all(PATIENCE));
    assert_eq!(fates.len(), 500);
    for (seq, fate) in fates {
        if lost.contains(&seq) {
            assert!(
                matches!(fate, Fate::Returned { code: 312, .. }),
                "{seq:?}: {fate:?}"
            );
        } else {
            assert_eq!(fate, Fate::Confirmed, "{seq:?}");
        }
    }
}

#[test]
fn a_full_queue_that_rejects_gives_nacks_and_no_confirm() {
    let queue = Queue::with(FieldTable::from([
        ("x-max-length".to_owned(), AmqpValue::LongInt(1)),
        (
            "x-overflow".to_owned(),
            AmqpValue::LongString("reject-publish".to_owned()),
        ),
    ]));
    let mut publisher = publisher();
    let first = publisher.publish(&queue.message("first")).unwrap();
    assert_eq!(publisher.wait_all(PATIENCE), [(first, Fate::Confirmed)]);
    for number in 0..20 {
        publisher
            .publish(&queue.message(number.to_string()))
            .unwrap();
    }
    let fates = publisher.wait_all(PATIENCE);
    assert_eq!(fates.len(), 20);
    assert!(
        fates.iter().all(|(_, fate)| *fate == Fate::Nacked),
        "{fates:?}"
    );
}

#[test]
fn a_missing_exchange_loses_the_publisher_with_the_brokers_words_and_no_confirm() {
    let mut publisher = publisher();
    let message = Outgoing {
        exchange: "publisher-test.no-such-exchange".to_owned(),
        ..nowhere("x")
    };
    let seq = publisher.publish(&message).unwrap();
    assert_eq!(publisher.wait_all(PATIENCE), [(seq, Fate::Unknown)]);
    let cause = publisher.lost().unwrap().to_owned();
    assert!(
        cause.contains("404") && cause.contains("no-such-exchange"),
        "{cause}"
    );
    let error = publisher.publish(&message).unwrap_err();
    assert!(matches!(error, PublishError::Lost { .. }), "{error}");
    assert_eq!(publisher.close(PATIENCE), []);
}

#[test]
fn a_line_that_is_cut_leaves_the_unconfirmed_unknown_and_only_what_arrived_confirmed() {
    const COUNT: u64 = 2_000;
    let queue = Queue::new();
    let line = Line::new();
    let limits = Limits {
        messages: 100_000,
        ..Limits::default()
    };
    let mut publisher = Publisher::open(&broker_at(&line.url), "test", limits).unwrap();
    let mut fates = Vec::new();
    for number in 0..COUNT {
        // Some confirms are on their way by then, those after it never come.
        if number == COUNT / 2 {
            line.hold_replies();
        }
        publisher
            .publish(&queue.message(number.to_string()))
            .unwrap();
        fates.extend(publisher.poll());
    }
    line.cut();
    fates.extend(publisher.wait_all(PATIENCE));
    assert!(publisher.lost().is_some_and(|cause| !cause.is_empty()));
    assert_eq!(fates.len() as u64, COUNT);
    let unknown = fates
        .iter()
        .filter(|(_, fate)| *fate == Fate::Unknown)
        .count();
    assert!(unknown as u64 >= COUNT / 2, "{unknown} unknown");

    let mut arrived = HashSet::new();
    let deadline = Instant::now() + PATIENCE;
    let confirmed: HashSet<u64> = fates
        .iter()
        .filter(|(_, fate)| *fate == Fate::Confirmed)
        .map(|(seq, _)| seq.0 - 1)
        .collect();
    while !confirmed.is_subset(&arrived) {
        assert!(
            Instant::now() < deadline,
            "a confirmed message did not arrive"
        );
        while let Some(delivery) = queue.next() {
            arrived.insert(
                String::from_utf8(delivery.body)
                    .unwrap()
                    .parse::<u64>()
                    .unwrap(),
            );
        }
    }
}

#[test]
fn a_broker_that_stops_answering_costs_the_publisher_its_limit_of_time_and_no_confirm() {
    let queue = Queue::new();
    let line = Line::new();
    let limits = Limits {
        messages: 10,
        wait: Duration::from_millis(300),
        ..Limits::default()
    };
    let mut publisher = Publisher::open(&broker_at(&line.url), "test", limits).unwrap();
    line.stall();
    let error = loop {
        if let Err(error) = publisher.publish(&queue.message("x")) {
            break error;
        }
    };
    assert!(
        matches!(
            error,
            PublishError::NoRoom {
                unconfirmed: 10,
                ..
            }
        ),
        "{error}"
    );
    let fates = publisher.close(Duration::from_millis(300));
    assert_eq!(fates.len(), 10);
    assert!(
        fates.iter().all(|(_, fate)| *fate == Fate::Unknown),
        "{fates:?}"
    );
}

#[test]
fn a_body_that_the_broker_does_not_read_is_given_up_instead_of_hanging() {
    let queue = Queue::new();
    let line = Line::new();
    let limits = Limits {
        wait: Duration::from_millis(500),
        ..Limits::default()
    };
    let mut publisher = Publisher::open(&broker_at(&line.url), "test", limits).unwrap();
    line.stall();
    // amiquip's write buffer may take all of it, or make the call wait.
    match publisher.publish(&queue.message(vec![0; 64 * 1024 * 1024])) {
        Err(error) => {
            assert!(matches!(&error, PublishError::Lost { .. }), "{error}");
            assert!(error.to_string().contains("500ms"), "{error}");
        }
        Ok(seq) => {
            let fates = publisher.close(Duration::from_millis(500));
            assert_eq!(fates, [(seq, Fate::Unknown)]);
        }
    }
}

#[test]
fn what_would_close_the_connection_is_refused_and_what_just_fits_is_not() {
    let queue = Queue::new();
    let mut publisher = publisher();
    // Flags, delivery mode, table length, name, type and string length.
    let around = 2 + 1 + 4 + (1 + 1) + 1 + 4;
    let filled = |length: usize| Outgoing {
        headers: Map::from_iter([("h".to_owned(), json!("x".repeat(length)))]),
        ..queue.message("x")
    };
    let most = properties_max(131_072) - around;
    let error = publisher.publish(&filled(most + 1)).unwrap_err();
    assert!(matches!(error, PublishError::Unfit(_)), "{error}");
    let long_id = Outgoing {
        message_id: Some("x".repeat(256)),
        ..queue.message("x")
    };
    let error = publisher.publish(&long_id).unwrap_err();
    assert!(
        error.to_string().contains("message id has 256 bytes"),
        "{error}"
    );

    let fits = publisher.publish(&filled(most)).unwrap();
    let many = Outgoing {
        headers: (0..HEADERS_MAX)
            .map(|i| (i.to_string(), json!(i)))
            .collect(),
        ..queue.message("x")
    };
    let many = publisher.publish(&many).unwrap();
    let mut fates = publisher.wait_all(PATIENCE);
    fates.sort_by_key(|(seq, _)| *seq);
    assert_eq!(fates, [(fits, Fate::Confirmed), (many, Fate::Confirmed)]);
}
