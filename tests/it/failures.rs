//! What becomes of a message whose attempt fails: the right one is retried,
//! the right one is dead-lettered, and its neighbours go on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use crate::common::{
    Consumer, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered, numbered_ids,
};

/// Fails with SQLSTATE `23503` as long as `attempt` is not above the number
/// that the body asks for.
const FAIL_AT_FIRST: &str = "insert into effect (message_id) \
    select fail_until(message_id, attempt, (body->>'failures')::int) from message";

fn make_fail_until(world: &World) {
    world.db.execute(
        "create function fail_until(id text, attempt int, failures int) returns text \
         language plpgsql as $$ begin if attempt <= failures then \
         raise exception 'not yet' using errcode = '23503'; end if; return id; end $$",
    );
}

fn failing(id: &str, failures: u32) -> Msg {
    Msg::new(id).json(&serde_json::json!({ "failures": failures }))
}

fn rows_of(world: &World, id: &str) -> Vec<(i32, String)> {
    use sqlx::Row;
    let rows = world.db.rows(&format!(
        "select attempt, coalesce(reason, '') from ackonce.failure \
         where message_id = '{id}' order by id"
    ));
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[test]
fn one_poison_message_among_10_000_is_tried_max_attempts_times_and_harms_nobody() {
    let world = World::new();
    make_fail_until(&world);
    let orders = Consumer::orders().sql(FAIL_AT_FIRST).max_attempts(3);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let ids = numbered_ids("m", 9_999);
    let mut messages: Vec<Msg> = ids.iter().map(|id| failing(id, 0)).collect();
    messages.insert(5_000, failing("poison", u32::MAX >> 1));
    world.broker.send(ORDERS, messages);
    let daemon = world.run(&config);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    assert_eq!(dead[0].id(), Some("poison"));
    world.wait_for_effects(9_999);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
    let row = |attempt, reason: &str| (attempt, reason.to_owned());
    let rows = [row(1, ""), row(2, ""), row(3, "max-attempts")];
    assert_eq!(rows_of(&world, "poison"), rows);
    assert_eq!(world.db.failures(ORDERS).len(), 3, "nobody else failed");
}

#[test]
fn messages_that_fail_twice_are_applied_once_and_have_two_rows_in_the_journal() {
    let world = World::new();
    make_fail_until(&world);
    let orders = Consumer::orders()
        .sql(FAIL_AT_FIRST)
        .set("retry.breaker", 0)
        .backoff(&["50ms", "100ms"]);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    let ids = numbered_ids("m", 1_000);
    world
        .broker
        .send(ORDERS, ids.iter().map(|id| failing(id, 2)));
    world.wait_for_effects(1_000);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
    let count = |sql: &str| world.db.count(sql);
    assert_eq!(count("select count(*) from ackonce.failure"), 2_000);
    let each = "select count(*) from (select 1 from ackonce.failure where reason is null \
         group by message_id having array_agg(attempt order by id) = '{1,2}') as two";
    assert_eq!(count(each), 1_000);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_long_delay_does_not_hold_up_a_short_one() {
    let world = World::new();
    make_fail_until(&world);
    let orders = Consumer::orders()
        .sql(FAIL_AT_FIRST)
        .backoff(&["1s", "60s"]);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    world.broker.send(
        ORDERS,
        numbered_ids("long", 5).iter().map(|id| failing(id, 2)),
    );
    eventually("five wait for a minute", || {
        world.broker.ready("orders.retry.1m") == 5
    });
    world.broker.send(
        ORDERS,
        numbered_ids("short", 5).iter().map(|id| failing(id, 1)),
    );
    world.wait_for_effects(5);
    world.assert_each_applied_once(&numbered_ids("short", 5));
    assert_eq!(world.broker.ready("orders.retry.1m"), 5);
    daemon.stop();
}

#[test]
fn a_duplicate_of_a_message_that_waits_for_its_retry_is_applied_and_the_retry_is_not() {
    let world = World::new();
    world.db.execute("create table late (id int primary key)");
    world
        .db
        .execute("alter table effect add column late int references late");
    let orders = Consumer::orders()
        .backoff(&["2s"])
        .sql("insert into effect (message_id, late) select message_id, 1 from message");
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("one")]);
    eventually("it waits", || world.broker.ready("orders.retry.2s") == 1);
    assert!(world.redis.claims().is_empty(), "its claim is given back");
    world.db.execute("insert into late values (1)");
    world.broker.send(ORDERS, [Msg::new("one")]);
    world.wait_for_effects(1);
    assert_eq!(world.broker.ready("orders.retry.2s"), 1, "it still waits");
    eventually("it came back", || world.broker.is_empty("orders.retry.2s"));
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&["one"]);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_class_can_be_overridden_per_consumer() {
    let world = World::new();
    world.db.execute(
        "create function refuse(code text) returns text language plpgsql as \
         $$ begin raise exception 'no' using errcode = code; end $$",
    );
    let consumer = |name: &str| {
        Consumer::new(name)
            .max_attempts(2)
            .sql("select refuse(body->>'code') from message")
    };
    let stern = consumer("stern").failures("permanent", &["23503"]);
    let mild = consumer("mild").failures("transient", &["P0"]);
    let config = world.config().consumer(stern).consumer(mild);
    let daemon = world.run(&config);
    for (queue, code) in [("stern", "23503"), ("stern", "P0001"), ("mild", "P0001")] {
        let body = serde_json::json!({ "code": code });
        world.broker.send(queue, [Msg::new(code).json(&body)]);
    }
    world.broker.wait_for_dead("stern.dead", 2);
    world.broker.wait_for_dead("mild.dead", 1);
    assert_eq!(world.db.reasons("stern"), ["rejected", "rejected"]);
    assert_eq!(world.db.reasons("mild"), ["", "max-attempts"]);
    daemon.stop();
}

#[test]
fn a_transaction_that_loses_a_race_is_run_again_at_once_and_costs_no_attempt() {
    let world = World::new();
    world.db.execute("create sequence tries");
    world.db.execute(
        "create function race(id text) returns text language plpgsql as $$ begin \
         if nextval('tries') <= 3 then raise exception 'lost' using errcode = '40001'; end if; \
         return id; end $$",
    );
    let orders = Consumer::orders()
        .sql("insert into effect (message_id) select race(message_id) from message");
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("one")]);
    world.wait_for_effects(1);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&["one"]);
    assert!(world.db.failures(ORDERS).is_empty());
}

#[test]
fn the_only_attempt_of_a_message_without_retries_dead_letters_it() {
    let world = World::new();
    make_fail_until(&world);
    let orders = Consumer::orders().sql(FAIL_AT_FIRST).max_attempts(1);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    world
        .broker
        .send(ORDERS, [failing("bad", 9), failing("good", 0)]);
    world.broker.wait_for_dead(ORDERS_DEAD, 1);
    world.wait_for_effects(1);
    assert_eq!(rows_of(&world, "bad"), [(1, "max-attempts".to_owned())]);
    daemon.stop();
}

#[test]
fn what_a_retry_carries_is_what_was_published() {
    use amiquip::AmqpValue;
    let world = World::new();
    let orders = Consumer::orders().bind("shop", "topic", "order.*").sql(
        "insert into effect (message_id, body, note) select \
         message_id || repeat('x', 0 / (attempt - 1)), \
         headers, exchange || '|' || routing_key || '|' || attempt from message",
    );
    let config = world
        .config()
        .consumer(orders.failures("transient", &["22012"]));
    let daemon = world.run(&config);
    let message = Msg::new("one")
        .header("text", AmqpValue::LongString("a".to_owned()))
        .header("bytes", AmqpValue::ByteArray(vec![0, 255]))
        .header(
            "CC",
            AmqpValue::FieldArray(vec![AmqpValue::LongString("elsewhere".to_owned())]),
        )
        .properties(|p| p.with_user_id(world.management.user().to_owned()));
    world.broker.declare("elsewhere");
    world.broker.publish("shop", "order.paid", [message]);
    world.wait_for_effects(1);
    let noted = world.db.texts("select note from effect");
    assert_eq!(noted, ["shop|order.paid|2"]);
    let headers = world.db.texts("select body::text from effect");
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&headers[0]).unwrap(),
        serde_json::json!({ "text": "a", "bytes": "\\x00ff", "CC": ["elsewhere"] })
    );
    // In the default exchange, where retries are published, CC would name it.
    assert!(world.broker.is_empty("elsewhere"));
    daemon.stop();
}

#[test]
fn ten_thousand_messages_wait_while_their_table_is_gone_and_none_is_harmed() {
    let world = World::new();
    let config = world.orders();
    world.prepare(&config);
    world.broker.send(ORDERS, numbered("m", 10_000));
    let daemon = world.run(&config);
    world.wait_for_effects(500);
    world.db.execute("alter table effect rename to gone");
    daemon.wait_for_log(&["paused", "42P01"]);
    // All but a few are in the queue again, on the same connection.
    eventually("it holds few", || {
        let ready = i64::from(world.broker.ready(ORDERS));
        ready + 64 >= 10_000 - world.db.count("select count(*) from gone")
    });
    assert!(
        !daemon.logged(&["lost the broker"]),
        "it keeps its connection"
    );
    world.db.execute("alter table gone rename to effect");
    world.wait_for_effects(10_000);
    daemon.wait_for_log(&["resumed"]);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 10_000));
    assert!(world.broker.is_empty(ORDERS_DEAD));
    assert!(
        world.db.failures(ORDERS).is_empty(),
        "no attempt was counted"
    );
}

#[test]
fn many_failures_in_a_row_pause_the_consumer_and_are_not_counted() {
    let world = World::new();
    world.db.execute("create table wanted (id int primary key)");
    world
        .db
        .execute("alter table effect add column wanted int references wanted");
    let orders = Consumer::orders()
        .set("retry.breaker", 20)
        .max_attempts(2)
        // So long that nobody's second attempt comes before there is a pause.
        .backoff(&["3s"])
        .sql("insert into effect (message_id, wanted) select message_id, 1 from message");
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world.broker.send(ORDERS, numbered("m", 300));
    let daemon = world.run(&config);
    daemon.wait_for_log(&["paused", "23503"]);
    // Long enough for every message to use up its attempts, were they counted.
    eventually("it goes on trying", || {
        daemon.logged(&["still waiting", "tries=8"]) || {
            world.db.count("select count(*) from ackonce.failure") > 60
        }
    });
    world.db.execute("insert into wanted values (1)");
    world.wait_for_effects(300);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 300));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}
