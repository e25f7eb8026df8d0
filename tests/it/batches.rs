//! A handler's SQL means for a batch what it means for one message after the
//! other, in the order of the queue: each script runs here through daemons with
//! batches of many sizes, and by itself, message by message, in a session of the
//! test's own.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod grammar;
mod scripts;

use std::fmt::Write as _;

use serde_json::json;

use crate::common::{Config, Consumer, Database, Msg, World, eventually};
use scripts::{SCRIPTS, Script};

/// Keys that the messages are about.
const KEYS: usize = 20;
/// Messages of a run; with one message a transaction, only the first of them.
const COUNT: usize = 600;
const COUNT_ALONE: usize = 150;
/// Sizes of a batch.
const SIZES: [usize; 3] = [256, 16, 1];
/// Of so many messages one cannot be applied, and one comes twice.
const POISON: usize = 97;
const TWICE: usize = 10;

/// One message: its key, a number, and its place.
fn body(place: usize) -> serde_json::Value {
    let amount = match place % POISON {
        50 => json!("x"),
        _ => json!(1 + place * 7 % 13),
    };
    json!({"k": place * 31 % KEYS, "n": amount, "i": place})
}

fn messages(count: usize) -> Vec<Msg> {
    let message = |place: usize| Msg::new(&format!("m-{place}")).json(&body(place));
    let mut messages = Vec::new();
    for place in 0..count {
        messages.push(message(place));
        if place % TWICE == 3 {
            messages.push(message(place - 3));
        }
    }
    messages
}

/// The script and its tables in a schema of their own.
fn in_schema(text: &str, schema: &str) -> String {
    text.replace("@.", &format!("{schema}."))
        .replace("{schema}", schema)
}

/// What the script leaves behind when each message runs by itself, after
/// `COUNT_ALONE` and after `COUNT` of them.
fn one_by_one(db: &Database, script: &Script, schema: &str) -> [String; 2] {
    db.execute(&format!(
        "create schema {schema}; create table {schema}.message (message_id text, body jsonb, \
         payload bytea, attempt int); {}",
        in_schema(script.tables, schema)
    ));
    let text = in_schema(script.sql, schema);
    let mut early = String::new();
    for place in 0..COUNT {
        if place == COUNT_ALONE {
            early = result(db, script, schema);
        }
        let body = body(place).to_string();
        // One implicit transaction.
        let run = format!(
            "set local search_path = {schema}, public; delete from {schema}.message; \
             insert into {schema}.message values ('m-{place}', '{body}', '{body}', 1); \
             set local search_path = public, {schema}; {text}"
        );
        // Poison fails, and is left out.
        db.try_execute(&run).ok();
    }
    [early, result(db, script, schema)]
}

fn result(db: &Database, script: &Script, schema: &str) -> String {
    let rows = db.texts(&in_schema(script.result, schema));
    let mut text = String::new();
    for row in rows {
        writeln!(text, "{row}").unwrap();
    }
    text
}

struct Run<'a> {
    script: &'a Script,
    name: String,
    count: usize,
}

/// The consumers of `scripts`, each with a queue and a schema of its own.
fn consumers<'a>(
    world: &World,
    scripts: &[&'a Script],
    workers: usize,
    sizes: &[usize],
) -> (Config, Vec<Run<'a>>) {
    let mut config = world
        .config()
        .set("postgres.statement_timeout", "20s")
        // A lock that does not come is an attempt, and here there is but one.
        .set("postgres.lock_timeout", "18s")
        .set("postgres.idle_in_transaction_timeout", "20s");
    // A claim that a dead process left in Redis has its message overtaken.
    config = config.set("redis.enabled", false);
    let mut runs = Vec::new();
    for script in scripts {
        for size in sizes {
            let name = format!("{}_{workers}_{size}", script.name);
            world.db.execute(&format!(
                "create schema {name}; {}",
                in_schema(script.tables, &name)
            ));
            let consumer = Consumer::new(&name)
                .set("workers", i64::try_from(workers).unwrap())
                .set("batch_max", i64::try_from(*size).unwrap())
                .set("topology.queue_type", "classic")
                .set("retry.max_attempts", 1)
                .set("retry.breaker", 0)
                .sql(&in_schema(script.sql, &name));
            config = config.consumer(consumer);
            let count = if *size == 1 { COUNT_ALONE } else { COUNT };
            runs.push(Run {
                script,
                name,
                count,
            });
        }
    }
    (config, runs)
}

/// Has daemons run every script, killed in between, and returns what is left.
fn results(world: &World, config: &Config, runs: &[Run<'_>]) {
    world.prepare(config);
    for run in runs {
        world.broker.send(&run.name, messages(run.count));
    }
    let ledger = |at_least: i64| world.db.count("select count(*) from ackonce.ledger") >= at_least;
    let daemon = world.run(config);
    eventually("a part is applied", || ledger(COUNT as i64));
    daemon.kill();
    let daemon = world.run(config);
    eventually("every queue is empty", || {
        runs.iter().all(|run| world.broker.ready(&run.name) == 0)
    });
    daemon.stop();
    for run in runs {
        world.drain(config, &run.name);
    }
    let poison = world
        .db
        .count("select count(*) from ackonce.failure where code = '22P02'");
    assert!(poison > 0, "the poison of this test killed nothing");
}

fn compare(scripts: &[&Script]) {
    let world = World::new();
    let (config, runs) = consumers(&world, scripts, 1, &SIZES);
    results(&world, &config, &runs);
    for script in scripts {
        let [early, late] = one_by_one(&world.db, script, &format!("{}_ref", script.name));
        for run in runs.iter().filter(|run| run.script.name == script.name) {
            let wanted = if run.count == COUNT { &late } else { &early };
            let found = result(&world.db, script, &run.name);
            assert_eq!(&found, wanted, "{}", run.name);
            assert!(!found.trim().is_empty(), "{} left nothing", run.name);
        }
    }
}

fn quarter(number: usize) -> Vec<&'static Script> {
    SCRIPTS.iter().skip(number).step_by(4).collect()
}

#[test]
fn there_are_thirty_scripts() {
    assert!(SCRIPTS.len() >= 30, "{}", SCRIPTS.len());
}

#[test]
fn a_batch_means_what_its_messages_mean_one_by_one_first_quarter() {
    compare(&quarter(0));
}

#[test]
fn a_batch_means_what_its_messages_mean_one_by_one_second_quarter() {
    compare(&quarter(1));
}

#[test]
fn a_batch_means_what_its_messages_mean_one_by_one_third_quarter() {
    compare(&quarter(2));
}

#[test]
fn a_batch_means_what_its_messages_mean_one_by_one_fourth_quarter() {
    compare(&quarter(3));
}

#[test]
fn four_workers_leave_what_some_order_would_leave() {
    let world = World::new();
    // Every order of these leaves the same.
    let scripts: Vec<&Script> = SCRIPTS.iter().filter(|script| script.commutes).collect();
    assert!(scripts.len() >= 5);
    let (config, runs) = consumers(&world, &scripts, 4, &[256]);
    results(&world, &config, &runs);
    for run in &runs {
        let [_, wanted] = one_by_one(&world.db, run.script, &format!("{}_ref", run.name));
        let found = result(&world.db, run.script, &run.name);
        assert_eq!(found, wanted, "{}", run.name);
    }
}

/// Two daemons with four workers each move money between twenty accounts, so
/// that nearly every pair of batches deadlocks.
#[test]
fn transfers_that_collide_conserve_money_and_cost_no_attempt() {
    let world = World::new();
    world.db.execute(
        "create table account (id int primary key, balance bigint not null); \
         insert into account select id, 1000 from generate_series(0, 19) as id",
    );
    let orders = Consumer::orders().set("workers", 4).set("batch_max", 32);
    let orders = orders.set("prefetch", 128).sql(
        "update account set balance = balance - (body->>'n')::int from message \
         where id = (body->>'k')::int; \
         update account set balance = balance + (body->>'n')::int from message \
         where id = ((body->>'k')::int * 7 + (body->>'i')::int) % 20",
    );
    let config = world
        .config()
        .set("postgres.statement_timeout", "10s")
        .set("postgres.idle_in_transaction_timeout", "10s")
        .set("postgres.lock_timeout", "8s")
        .consumer(orders);
    world.prepare(&config);
    let plain = (0..3_000).filter(|place| place % POISON != 50);
    let messages: Vec<Msg> = plain
        .map(|place| Msg::new(&format!("m-{place}")).json(&body(place)))
        .collect();
    let count = i64::try_from(messages.len()).unwrap();
    let other = world.run(&config);
    let daemon = world.run(&config);
    world.broker.send("orders", messages);
    eventually("all are applied", || {
        world.db.count("select count(*) from ackonce.ledger") == count
    });
    assert!(
        daemon.logged(&["transactions collide"]) || other.logged(&["transactions collide"]),
        "the fault of this test did not happen"
    );
    daemon.stop();
    other.stop();
    assert_eq!(
        world.db.count("select sum(balance)::bigint from account"),
        20_000
    );
    assert_eq!(world.db.count("select count(*) from ackonce.failure"), 0);
    assert!(world.broker.is_empty("orders.dead"));
}

/// A script that takes another role and leaves settings behind harms neither
/// the daemon's own statements nor the next batch.
#[test]
fn what_a_script_sets_does_not_reach_the_daemons_own_statements() {
    let world = World::new();
    let role = world.name().to_owned();
    world.db.execute(&format!(
        "create role {role}; grant insert on effect to {role}; \
         create function leave() returns void language plpgsql as $$ begin \
         perform set_config('role', '{role}', false); \
         perform set_config('search_path', 'pg_catalog', false); \
         perform set_config('row_security', 'off', false); end $$"
    ));
    let orders = Consumer::orders().sql(
        &format!(
            "set local role {role}; \
         insert into public.effect (message_id) select message_id from message; \
         reset_role"
        )
        .replace("reset_role", "select public.leave()"),
    );
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world
        .broker
        .send("orders", (0..300).map(|n| Msg::new(&format!("m-{n}"))));
    // What comes back redelivered bears a crash mark, which has to go.
    let daemon = world.run(&config);
    eventually("some are applied", || world.db.effect_count() >= 1);
    daemon.kill();
    let daemon = world.run(&config);
    world.wait_for_effects(300);
    assert!(!daemon.logged(&["replaced a database session"]));
    world.drain_with(daemon, &config, "orders");
    assert_eq!(world.db.effect_count(), 300);
    assert_eq!(world.db.count("select count(*) from ackonce.suspect"), 0);
    world
        .db
        .execute(&format!("drop owned by {role}; drop role {role}"));
}
