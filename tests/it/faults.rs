//! What is wrong with the world is not the message's fault: it waits, with one
//! worker, and the others go on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::process::Command;

use crate::common::{Consumer, Msg, ORDERS, ORDERS_DEAD, World, numbered, numbered_ids};

#[test]
fn a_table_that_changes_under_a_running_daemon_costs_no_message() {
    let world = World::new();
    // For sets each statement is a prepared one, which PostgreSQL refuses to
    // run once its result has other columns.
    let orders = Consumer::orders()
        .set("workers", 1)
        .set("handler.batch", "set")
        .sql("insert into effect (message_id) select message_id from message returning *");
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("before", 4));
    world.wait_for_effects(4);
    world.db.execute("alter table effect add column extra int");
    world.broker.send(ORDERS, numbered("after", 11));
    world.wait_for_effects(15);
    daemon.wait_for_log(&["0A000"]);
    world.drain_with(daemon, &config, ORDERS);
    world
        .assert_each_applied_once(&[numbered_ids("before", 4), numbered_ids("after", 11)].concat());
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_script_that_runs_for_each_message_sees_a_table_as_it_is() {
    let world = World::new();
    let orders = Consumer::orders()
        .set("workers", 1)
        .sql("insert into effect (message_id) select message_id from message returning *");
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("before", 4));
    world.wait_for_effects(4);
    world
        .db
        .execute("alter table effect add column extra int default 7");
    world.broker.send(ORDERS, numbered("after", 11));
    world.wait_for_effects(15);
    assert_eq!(
        world
            .db
            .count("select count(*) from effect where extra = 7"),
        15
    );
    world.drain_with(daemon, &config, ORDERS);
    assert_eq!(world.db.count("select count(*) from ackonce.failure"), 0);
}

#[test]
fn a_message_for_which_alone_the_world_is_broken_lets_its_neighbours_go_on() {
    let world = World::new();
    let break_for_poison = "create or replace function id_of(id text) returns text language plpgsql \
         as $$ begin if id = 'poison' then raise exception sqlstate 'XX000'; end if; \
         return id; end $$";
    world.db.execute(break_for_poison);
    let orders = Consumer::orders()
        .set("workers", 2)
        .sql("insert into effect (message_id) select id_of(message_id) from message");
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let mut messages = numbered("m", 20);
    messages.insert(10, Msg::new("poison"));
    world.broker.send(ORDERS, messages);
    let daemon = world.run(&config);
    world.wait_for_effects(20);
    daemon.wait_for_log(&["XX000"]);
    assert!(world.broker.is_empty(ORDERS_DEAD));
    world.db.execute(
        "create or replace function id_of(id text) returns text language sql as 'select id'",
    );
    world.wait_for_effects(21);
    world.drain_with(daemon, &config, ORDERS);
    let mut ids = numbered_ids("m", 20);
    ids.push("poison".to_owned());
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn no_password_is_logged_whatever_rust_log_says() {
    let world = World::new();
    let config = world.write("password.toml", &world.orders().text());
    for level in ["trace", "trace,amiquip=trace,amiquip::io_loop=trace"] {
        let output = Command::new(env!("CARGO_BIN_EXE_ackonce"))
            .args(["check", "--config"])
            .arg(&config)
            .env("RUST_LOG", level)
            .output()
            .unwrap();
        assert!(output.status.success());
        let said =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(
            said.contains("TRACE") || said.contains("DEBUG"),
            "nothing was logged"
        );
        // What amiquip sends as its SASL response: NUL, user, NUL, password.
        let response = format!("\\0{}\\0", world.management.user());
        assert!(!said.contains(&response) && !said.contains(&response.replace("\\0", "\0")));
    }
}
