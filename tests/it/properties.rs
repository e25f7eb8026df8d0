//! The properties of a message, as its handler gets them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use crate::common::program::write_program;
use crate::common::{Answer, Consumer, Msg, ORDERS, Receiver, World, eventually};

/// With every property that a handler is told, and a body that says how it is
/// encoded. `expiration` and `user_id` are those of a first delivery.
fn telling(id: &str) -> Msg {
    Msg::new(id).properties(|properties| {
        properties
            .with_content_encoding("gzip".to_owned())
            .with_type_("order.new".to_owned())
            .with_correlation_id("c-1".to_owned())
            .with_reply_to("answers".to_owned())
            .with_app_id("shop".to_owned())
            .with_user_id("guest".to_owned())
            .with_priority(7)
            .with_expiration("600000".to_owned())
    })
}

const TOLD: [(&str, &str); 7] = [
    ("type", "order.new"),
    ("correlation-id", "c-1"),
    ("reply-to", "answers"),
    ("app-id", "shop"),
    ("user-id", "guest"),
    ("priority", "7"),
    ("expiration", "600000"),
];

#[test]
fn an_http_receiver_gets_each_property_as_a_header() {
    let world = World::new();
    let receiver = Receiver::new(|_| Answer::status(200));
    let orders = Consumer::orders()
        .handler("http")
        .set("handler.url", receiver.url());
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world.broker.send(ORDERS, [telling("m-1")]);
    let daemon = world.run(&config);
    eventually("it is there", || receiver.requests().len() == 1);
    daemon.stop();
    let request = &receiver.requests()[0];
    assert_eq!(request.header("content-encoding").as_deref(), Some("gzip"));
    for (name, value) in TOLD {
        let header = format!("ackonce-{name}");
        assert_eq!(request.header(&header).as_deref(), Some(value), "{name}");
    }
}

#[test]
fn a_command_gets_each_property_as_a_variable() {
    let world = World::new();
    let program = world.path("apply");
    let told = world.path("told");
    let script = format!(
        "#!/bin/sh\nenv > {0}.new && mv {0}.new {0}\n",
        told.display()
    );
    write_program(&program, &script);
    let orders = Consumer::orders()
        .handler("command")
        .set("handler.argv", vec![program.to_str().unwrap()]);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world.broker.send(ORDERS, [telling("m-1")]);
    let daemon = world.run(&config);
    eventually("it has run", || told.exists());
    daemon.stop();
    let told = std::fs::read_to_string(told).unwrap();
    let encoding = ("content-encoding", "gzip");
    for (name, value) in TOLD.into_iter().chain([encoding]) {
        let name = name.replace('-', "_").to_ascii_uppercase();
        let line = format!("ACKONCE_{name}={value}");
        assert!(told.lines().any(|told| told == line), "{line}");
    }
}

#[test]
fn a_receiver_with_too_much_to_do_costs_a_message_no_attempt() {
    let world = World::new();
    let mut times = 0;
    let receiver = Receiver::new(move |_| {
        times += 1;
        Answer::status(if times <= 5 { 429 } else { 200 })
    });
    let orders = Consumer::orders()
        .handler("http")
        .set("handler.url", receiver.url())
        .max_attempts(2)
        .backoff(&["100ms"]);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world.broker.send(ORDERS, [Msg::new("m-1")]);
    let daemon = world.run(&config);
    eventually("it is applied", || world.db.ledger(ORDERS) == ["m-1"]);
    daemon.stop();
    assert_eq!(receiver.requests().len(), 6);
}
