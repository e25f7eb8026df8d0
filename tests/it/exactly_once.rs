//! Every message takes effect once, however often it is delivered, and one
//! that can't ends in the dead-letter queue with a reason.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::time::Duration;

use crate::common::{
    Consumer, Dead, Msg, ORDERS, ORDERS_DEAD, Proxy, RECORD_AMOUNT, World, eventually, numbered,
    numbered_ids, try_eventually,
};
use amiquip::AmqpValue;
use serde_json::json;
use sha2::{Digest, Sha256};

fn applies_each_message_once(queue_type: &str) {
    let world = World::new();
    let orders = Consumer::orders().set("topology.queue_type", queue_type);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("m", 1_000));
    world.wait_for_effects(1_000);
    world.drain_with(daemon, &config, ORDERS);
    let ids = numbered_ids("m", 1_000);
    world.assert_each_applied_once(&ids);
    assert_eq!(world.db.ledger(ORDERS).len(), ids.len());
    assert!(world.broker.is_empty(ORDERS_DEAD));
    let path = format!("/api/queues/{}/{ORDERS}", world.name());
    let queue = world.management.get(&path);
    assert_eq!(queue["type"], queue_type, "the queue of this test");
}

#[test]
fn every_message_of_a_quorum_queue_is_applied_once() {
    applies_each_message_once("quorum");
}

#[test]
fn every_message_of_a_classic_queue_is_applied_once() {
    applies_each_message_once("classic");
}

#[test]
fn copies_of_a_message_are_applied_once() {
    let world = World::new();
    let config = world.orders();
    let daemon = world.run(&config);
    let copies = (0..20).flat_map(|_| numbered("m", 100));
    world.broker.send(ORDERS, copies);
    world.wait_for_effects(100);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 100));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

/// Has four daemons at a time apply `copies` of each of `keys` messages,
/// shuffled.
fn four_daemons_apply_once(keys: usize, copies: usize, redis: bool) {
    let world = World::new();
    let config = world.orders().set("redis.enabled", redis);
    world.prepare(&config);
    let mut order: Vec<usize> = (0..keys * copies).map(|number| number % keys).collect();
    shuffle(&mut order);
    let messages = order.iter().map(|key| Msg::new(&format!("m-{key}")));
    world.broker.send(ORDERS, messages);
    let daemons: Vec<_> = (0..4).map(|_| world.run(&config)).collect();
    let taken = try_eventually(Duration::from_secs(600), || world.broker.ready(ORDERS) == 0);
    assert!(taken, "they take it all within ten minutes");
    for daemon in daemons {
        daemon.stop();
    }
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", keys));
    assert_eq!(world.db.ledger(ORDERS).len(), keys);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn ten_thousand_keys_of_sixteen_copies_are_applied_once_by_four_daemons() {
    four_daemons_apply_once(10_000, 16, true);
}

#[test]
fn the_ledger_alone_keeps_four_daemons_from_applying_twice() {
    four_daemons_apply_once(2_000, 8, false);
}

/// Fisher and Yates, with a xorshift of a fixed seed.
fn shuffle(items: &mut [usize]) {
    let mut bits: u64 = 0x9E37_79B9_7F4A_7C15;
    for last in (1..items.len()).rev() {
        bits ^= bits << 13;
        bits ^= bits >> 7;
        bits ^= bits << 17;
        let other = usize::try_from(bits % (last as u64 + 1)).unwrap();
        items.swap(last, other);
    }
}

fn first() -> Msg {
    Msg::new("twin").json(&json!({"body": "first"}))
}

fn other() -> Msg {
    Msg::new("twin").json(&json!({"body": "other"}))
}

/// Panics unless the first body alone took effect and the other one came to
/// rest as a conflict.
fn assert_conflict(world: &World) {
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    assert_eq!(dead.len(), 1);
    assert_eq!(dead[0].id(), Some("twin"));
    assert_eq!(dead[0].body, br#"{"body":"other"}"#);
    let bodies = world
        .db
        .texts("select body->>'body' from effect where message_id = 'twin'");
    assert_eq!(bodies, ["first"]);
    let failures = world.db.failures(ORDERS);
    assert_eq!(failures.len(), 1);
    assert_eq!(failures[0].reason, "id-conflict");
    assert_eq!(failures[0].message_id.as_deref(), Some("twin"));
}

#[cfg(feature = "failpoints")]
#[test]
fn another_body_under_one_id_in_one_batch_is_dead_lettered() {
    let world = World::new();
    let orders = Consumer::orders().set("workers", 1);
    let config = world.config().consumer(orders);
    let gate = world.gate();
    let daemon = world
        .daemon(&config)
        .pauses_at("received", 1, &gate)
        .start();
    daemon.wait_until_consuming();
    // The only worker is held, so that the rest comes as one batch.
    world.broker.send(ORDERS, [Msg::new("decoy")]);
    gate.wait_until_hit();
    let batch = [Msg::new("before"), first(), other(), Msg::new("after")];
    world.broker.send(ORDERS, batch);
    eventually("the batch is prefetched", || {
        world.broker.ready(ORDERS) == 0
    });
    gate.open();
    world.wait_for_effects(4);
    world.drain_with(daemon, &config, ORDERS);
    assert_conflict(&world);
    world.assert_each_applied_once(&["decoy", "before", "twin", "after"]);
    let transactions = world
        .db
        .count("select count(distinct xmin::text) from effect where message_id <> 'decoy'");
    assert_eq!(
        transactions, 1,
        "the twins and their neighbours were a batch"
    );
}

#[test]
fn another_body_under_one_id_in_a_later_batch_is_dead_lettered() {
    let world = World::new();
    let config = world.orders();
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [first()]);
    world.wait_for_effects(1);
    world.broker.send(ORDERS, [other()]);
    assert_conflict(&world);
    world.drain_with(daemon, &config, ORDERS);
}

#[test]
fn another_body_under_one_id_is_dead_lettered_when_redis_forgot_the_first() {
    let world = World::new();
    let config = world.orders();
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [first()]);
    world.wait_for_effects(1);
    eventually("the mark is in Redis", || world.redis.flush() > 0);
    world.broker.send(ORDERS, [other()]);
    assert_conflict(&world);
    world.drain_with(daemon, &config, ORDERS);
}

#[test]
fn another_body_under_one_id_is_dead_lettered_without_redis() {
    let world = World::new();
    let config = world.orders().set("redis.enabled", false);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [first()]);
    world.wait_for_effects(1);
    world.broker.send(ORDERS, [other()]);
    assert_conflict(&world);
    world.drain_with(daemon, &config, ORDERS);
    assert!(world.redis.keys().is_empty(), "Redis was switched off");
}

fn amount(id: &str, amount: &serde_json::Value) -> Msg {
    Msg::new(id).json(&json!({ "amount": amount }))
}

#[test]
fn a_poison_message_is_dead_lettered_alone_with_the_databases_words() {
    let world = World::new();
    let orders = Consumer::orders().set("workers", 1).sql(RECORD_AMOUNT);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let poison = amount("poison", &json!("a lot"))
        .header("tenant", AmqpValue::LongString("north".into()))
        .header("retries", AmqpValue::LongInt(-7))
        .properties(|properties| {
            properties
                .with_content_type("application/json".into())
                .with_correlation_id("c-1".into())
                .with_type_("order.created".into())
                .with_timestamp(1_700_000_000)
                .with_priority(3)
        });
    let good = |number: usize| amount(&format!("m-{number}"), &json!(number));
    let messages = (0..25).map(good).chain([poison]).chain((25..50).map(good));
    world.broker.send(ORDERS, messages);
    world.drain(&config, ORDERS);

    world.assert_each_applied_once(&numbered_ids("m", 50));
    let transactions = world
        .db
        .count("select count(distinct xmin::text) from effect");
    assert!(transactions < 50, "neighbours were applied in batches");
    assert_eq!(world.db.ledger(ORDERS).len(), 50);
    let failures = world.db.failures(ORDERS);
    assert_eq!(failures.len(), 1);
    let failure = &failures[0];
    assert_eq!(failure.message_id.as_deref(), Some("poison"));
    assert_eq!(failure.reason, "rejected");
    assert_eq!(failure.class, "permanent");
    assert_eq!(failure.code.as_deref(), Some("22P02"));
    let words = r#"invalid input syntax for type integer: "a lot""#;
    assert!(failure.error.contains(words), "{}", failure.error);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    assert_eq!(dead.len(), 1);
    assert_intact(&dead[0]);
}

fn assert_intact(dead: &Dead) {
    assert_eq!(dead.body, br#"{"amount":"a lot"}"#);
    assert_eq!(dead.death().as_deref(), Some("rejected"));
    let properties = &dead.properties;
    assert_eq!(dead.id(), Some("poison"));
    assert_eq!(
        properties.content_type().as_deref(),
        Some("application/json")
    );
    assert_eq!(properties.correlation_id().as_deref(), Some("c-1"));
    assert_eq!(properties.type_().as_deref(), Some("order.created"));
    assert_eq!(*properties.timestamp(), Some(1_700_000_000));
    assert_eq!(*properties.priority(), Some(3));
    assert_eq!(*properties.delivery_mode(), Some(2));
    let headers = properties.headers().as_ref().unwrap();
    assert_eq!(headers["tenant"], AmqpValue::LongString("north".into()));
    assert_eq!(headers["retries"], AmqpValue::LongInt(-7));
}

#[test]
fn a_queue_full_of_poison_is_dead_lettered_one_by_one() {
    let world = World::new();
    let orders = Consumer::orders().sql(RECORD_AMOUNT);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    let poison = |number| amount(&format!("p-{number}"), &json!("poison"));
    world.broker.send(ORDERS, (0..100).map(poison));
    world.broker.send(ORDERS, [amount("good", &json!(1))]);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 100);
    world.wait_for_effects(1);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&["good"]);
    let mut ids: Vec<_> = dead.iter().filter_map(Dead::id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!((dead.len(), ids.len()), (100, 100));
    assert_eq!(world.db.reasons(ORDERS), vec!["rejected"; 100]);
}

/// Sends `messages` to a consumer with `identity`, each of them twice, and
/// returns the ids that took effect, sorted.
fn ids_by(identity: &str, messages: &[Msg]) -> Vec<String> {
    let world = World::new();
    let orders = Consumer::orders().set("identity", identity);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, messages.to_vec());
    world.broker.send(ORDERS, messages.to_vec());
    world.wait_for_effects(i64::try_from(messages.len()).unwrap());
    world.drain_with(daemon, &config, ORDERS);
    assert!(world.broker.is_empty(ORDERS_DEAD));
    let ids: Vec<String> = world.db.effects().into_keys().collect();
    world.assert_each_applied_once(&ids);
    ids
}

#[test]
fn the_id_is_taken_from_the_message_id_property() {
    let long = "x".repeat(255);
    let ids = ids_by(
        "message-id",
        &[Msg::new("a"), Msg::new("ü ☂"), Msg::new(&long)],
    );
    assert_eq!(ids, ["a", &long, "ü ☂"]);
}

#[test]
fn the_id_is_taken_from_a_header() {
    let with = |value| Msg::anonymous().header("order-id", value).body("{}");
    let text = with(AmqpValue::LongString("o-1".into()));
    let integer = with(AmqpValue::LongLongInt(-42));
    assert_eq!(ids_by("header:order-id", &[text, integer]), ["-42", "o-1"]);
}

#[test]
fn the_id_is_taken_from_the_json_body() {
    let body = |id| Msg::anonymous().json(&json!({"order": {"ids": [0, id]}}));
    let messages = [body(json!("o-1")), body(json!(9_007_199_254_740_993_u64))];
    let ids = ids_by("json:/order/ids/1", &messages);
    assert_eq!(ids, ["9007199254740993", "o-1"]);
}

#[test]
fn the_id_is_the_hash_of_the_body() {
    let bodies = ["one", "two"];
    let ids = ids_by("body", &bodies.map(|body| Msg::anonymous().body(body)));
    let mut hashes = bodies.map(|body| {
        let hash = Sha256::digest(body);
        hash.iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    });
    hashes.sort_unstable();
    assert_eq!(ids, hashes);
}

/// Sends `messages`, none of which has a usable id for `identity`.
fn assert_missing_id(identity: &str, messages: Vec<Msg>) {
    let world = World::new();
    let orders = Consumer::orders().set("identity", identity);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    let count = messages.len();
    world.broker.send(ORDERS, messages);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, count);
    world.drain_with(daemon, &config, ORDERS);
    assert_eq!(dead.len(), count);
    assert_eq!(world.db.reasons(ORDERS), vec!["missing-id"; count]);
    assert!(
        world
            .db
            .failures(ORDERS)
            .iter()
            .all(|failure| failure.message_id.is_none())
    );
    assert_eq!(world.db.effect_count(), 0);
}

#[test]
fn a_message_without_a_usable_message_id_property_is_dead_lettered() {
    assert_missing_id(
        "message-id",
        vec![Msg::anonymous(), Msg::new(""), Msg::new("a\0b")],
    );
}

#[test]
fn a_message_without_a_usable_header_is_dead_lettered() {
    let with = |value| Msg::new("ignored").header("order-id", value);
    let messages = vec![
        Msg::new("ignored"),
        with(AmqpValue::LongString(String::new())),
        with(AmqpValue::LongString("x".repeat(256))),
        with(AmqpValue::LongString("a\0b".into())),
        with(AmqpValue::Boolean(true)),
        with(AmqpValue::Void),
        with(AmqpValue::FieldArray(vec![AmqpValue::LongInt(1)])),
        with(AmqpValue::FieldTable(amiquip::FieldTable::new())),
    ];
    assert_missing_id("header:order-id", messages);
}

#[test]
fn a_message_without_a_usable_id_in_its_json_body_is_dead_lettered() {
    let bodies = [
        "",
        "not json",
        "[]",
        "{}",
        r#"{"id": null}"#,
        r#"{"id": ""}"#,
        r#"{"id": true}"#,
        r#"{"id": {"a": 1}}"#,
        r#"{"id": "a\u0000b"}"#,
    ];
    let long = format!(r#"{{"id": "{}"}}"#, "x".repeat(256));
    let messages = bodies.into_iter().chain([long.as_str()]);
    let messages = messages
        .map(|body| Msg::new("ignored").body(body))
        .collect();
    assert_missing_id("json:/id", messages);
}

#[test]
fn several_consumers_each_apply_the_same_ids_once() {
    let world = World::new();
    let noting = |name: &str| {
        Consumer::new(name).sql(&format!(
            "insert into effect (message_id, note) \
             select message_id || '@{name}', routing_key from message"
        ))
    };
    let config = world
        .config()
        .consumer(noting("orders"))
        .consumer(noting("invoices"));
    let daemon = world.run(&config);
    for queue in ["orders", "invoices"] {
        world.broker.send(queue, numbered("m", 100));
        world.broker.send(queue, numbered("m", 100));
    }
    world.wait_for_effects(200);
    daemon.stop();
    world.drain(&config, "orders");
    world.drain(&config, "invoices");
    let ids = numbered_ids("m", 100);
    let by = |name: &'static str| ids.iter().map(move |id| format!("{id}@{name}"));
    let all: Vec<String> = by("orders").chain(by("invoices")).collect();
    world.assert_each_applied_once(&all);
    let crossed = "select count(*) from effect where split_part(message_id, '@', 2) <> note";
    assert_eq!(world.db.count(crossed), 0);
    assert_eq!(world.db.ledger("orders").len(), 100);
    assert_eq!(world.db.ledger("invoices").len(), 100);
}

#[test]
fn a_handler_of_several_statements_takes_effect_as_one() {
    let world = World::new();
    world.db.execute("create table total (sum bigint)");
    world.db.execute("insert into total values (0)");
    let orders = Consumer::orders().sql(
        "insert into effect (message_id, amount) \
             select message_id, (body->>'amount')::int from message; \
         -- A semicolon; in a comment\n\
         update total set sum = sum + coalesce((select sum((body->>'amount')::int) from message), 0); \
         update effect set note = 'a;b' where message_id in (select message_id from message);",
    );
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let poison = amount("poison", &json!("x"));
    let good = (0..100).map(|number| amount(&format!("m-{number}"), &json!(number)));
    world.broker.send(ORDERS, good.chain([poison]));
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 100));
    assert_eq!(world.db.count("select sum from total"), 4_950);
    let noted = world
        .db
        .count("select count(*) from effect where note = 'a;b'");
    assert_eq!(noted, 100);
    assert_eq!(world.broker.wait_for_dead(ORDERS_DEAD, 1).len(), 1);
}

#[test]
fn a_handler_sees_what_was_published() {
    let world = World::new();
    world.db.execute(
        "create table seen (message_id text, body jsonb, payload bytea, headers jsonb, \
         exchange text, routing_key text, published_at timestamptz, redelivered boolean, \
         attempt int)",
    );
    let columns = "message_id, body, payload, headers, exchange, routing_key, published_at, \
                   redelivered, attempt";
    let sql = format!(
        "insert into seen ({columns}) select {columns} from message; \
         insert into effect (message_id) select message_id from message"
    );
    let orders = Consumer::orders()
        .sql(&sql)
        .bind("events", "topic", "order.*");
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    let drop_table = "'); drop table seen; --";
    let json = Msg::new(drop_table)
        .json(&json!({"text": drop_table}))
        .header("tenant", AmqpValue::LongString(drop_table.into()))
        .properties(|properties| properties.with_timestamp(1_700_000_000));
    let binary = Msg::new("binary").body(vec![0xFF, 0x00, 0x01]);
    world.broker.publish("events", "order.created", [json]);
    world.broker.send(ORDERS, [binary]);
    world.wait_for_effects(2);
    world.drain_with(daemon, &config, ORDERS);
    let seen = world.db.texts(
        "select concat_ws('|', message_id, body->>'text', headers->>'tenant', exchange, \
         routing_key, extract(epoch from published_at)::bigint, redelivered, attempt >= 0) \
         from seen where message_id <> 'binary'",
    );
    let wanted =
        format!("{drop_table}|{drop_table}|{drop_table}|events|order.created|1700000000|f|t");
    assert_eq!(seen, [wanted]);
    let seen = world.db.texts(
        "select concat_ws('|', body is null, encode(payload, 'hex'), routing_key, \
         published_at is null) from seen where message_id = 'binary'",
    );
    assert_eq!(seen, ["t|ff0001|orders|t"]);
}

#[test]
fn copies_are_applied_once_while_redis_is_unreachable() {
    let world = World::new();
    let proxy = Proxy::before(world.redis_url(), 6379);
    proxy.go_down();
    let config = world.orders().set("redis.url", proxy.url());
    let daemon = world.run(&config);
    let copies = (0..5).flat_map(|_| numbered("m", 200));
    world.broker.send(ORDERS, copies);
    world.wait_for_effects(200);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 200));
    assert!(world.redis.keys().is_empty(), "Redis was out of reach");
}

#[test]
fn copies_are_applied_once_while_redis_comes_and_goes() {
    let world = World::new();
    let proxy = Proxy::before(world.redis_url(), 6379);
    let config = world.orders().set("redis.url", proxy.url());
    let daemon = world.run(&config);
    let mut ids = Vec::new();
    for round in 0..6 {
        if round % 2 == 0 {
            proxy.come_up();
        } else {
            proxy.go_down();
        }
        let prefix = format!("round-{round}");
        let copies = (0..4).flat_map(|_| numbered(&prefix, 200));
        world.broker.send(ORDERS, copies);
        ids.extend(numbered_ids(&prefix, 200));
        world.wait_for_effects(i64::try_from(ids.len()).unwrap());
    }
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
    assert!(
        !world.redis.keys().is_empty(),
        "Redis was in reach for a while"
    );
}

#[test]
fn copies_are_applied_once_while_redis_is_flushed_again_and_again() {
    let world = World::new();
    let config = world.orders();
    let daemon = world.run(&config);
    let mut flushed = 0;
    let mut ids = Vec::new();
    for round in 0..10 {
        let prefix = format!("round-{round}");
        let copies = (0..4).flat_map(|_| numbered(&prefix, 100));
        world.broker.send(ORDERS, copies);
        ids.extend(numbered_ids(&prefix, 100));
        eventually("the round is applied", || {
            flushed += world.redis.flush();
            world.db.effect_count() >= i64::try_from(ids.len()).unwrap()
        });
    }
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
    assert!(flushed > 0, "something was flushed");
}

#[test]
fn a_body_over_the_limit_is_dead_lettered() {
    let world = World::new();
    let orders = Consumer::orders().set("max_body", 100);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    let large = Msg::new("large").body("x".repeat(101));
    let fits = Msg::new("fits").body("x".repeat(100));
    world.broker.send(ORDERS, [Msg::new("before"), large, fits]);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    world.wait_for_effects(2);
    world.drain_with(daemon, &config, ORDERS);
    assert_eq!(dead[0].body.len(), 101);
    assert_eq!(world.db.reasons(ORDERS), ["too-large"]);
    world.assert_each_applied_once(&["before", "fits"]);
}
