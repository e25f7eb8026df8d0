//! Every type of AMQP with its extremes, on its way through handler, retry,
//! export and import. The other end is pika.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::process::Command;

use crate::common::{Consumer, ORDERS, ORDERS_DEAD, Tool, World, eventually};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/amqp_types/values.py");

/// What the script says.
fn python(world: &World, what: &str, queue: &str) -> String {
    let python = std::env::var("ACKONCE_PYTHON").unwrap_or_else(|_| "/usr/bin/python3".to_owned());
    let mut command = Command::new(python);
    command.args([SCRIPT, what, world.amqp_url(), queue]);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_handler_sees_each_value_of_a_header_with_its_sign() {
    let world = World::new();
    world
        .db
        .execute("create table seen (message_id text, got jsonb, expected jsonb)");
    let orders = Consumer::orders()
        .sql("INSERT INTO seen SELECT message_id, headers -> 'v', body -> 'v' FROM message");
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let sent: i64 = python(&world, "publish", ORDERS).parse().unwrap();
    let daemon = world.run(&config);
    eventually("all are seen", || {
        world.db.count("select count(*) from seen") == sent
    });
    daemon.stop();
    let wrong = world.db.texts(
        "select message_id || ': ' || coalesce(got::text, '?') || ' and not ' || expected::text \
         from seen where got is distinct from expected",
    );
    assert_eq!(wrong, [""; 0]);
}

#[test]
fn what_is_retried_dead_lettered_exported_and_imported_keeps_each_value_as_it_was() {
    let world = World::new();
    let orders = Consumer::orders()
        .sql("SELECT 1 / 0 FROM message")
        .failures("transient", &["22012"])
        .set("retry.breaker", 0)
        .max_attempts(2)
        .backoff(&["100ms"]);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let sent: u32 = python(&world, "publish", ORDERS).parse().unwrap();
    let daemon = world.run(&config);
    eventually("all are dead", || world.broker.ready(ORDERS_DEAD) == sent);
    daemon.stop();
    let file = world.path("all.jsonl");
    let file = file.to_str().unwrap();
    let desk = |arguments: &[&str]| {
        Tool::new(&world, &config, arguments).run().expect(0);
    };
    desk(&["dead", "export", ORDERS, "--output", file]);
    assert_eq!(python(&world, "compare", ORDERS_DEAD), "alike");
    desk(&["dead", "import", ORDERS, file, "--yes"]);
    eventually("all are back", || world.broker.ready(ORDERS_DEAD) == sent);
    assert_eq!(python(&world, "compare", ORDERS_DEAD), "alike");
}
