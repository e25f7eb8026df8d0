//! Messages that no decent client would send, and clients that are not ours:
//! the process and its connection stay up, neighbours are applied, and the
//! message itself is applied or dead-lettered with a reason.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;
use std::process::Command;

use crate::common::raw::{self, Properties, RawClient, flag};
use crate::common::{Config, Consumer, Daemon, Msg, ORDERS, ORDERS_DEAD, World, eventually};
use sha2::{Digest, Sha256};

const EXCHANGE: &str = "events";

/// Effects are known by the hash of the payload, because the id of a hostile
/// message may not be what was sent.
const RECORD_PAYLOAD: &str = "insert into effect (message_id, note) \
     select message_id, encode(sha256(payload), 'hex') from message; \
     insert into seen (headers) select headers from message";

/// What became of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Applied,
    Dead,
}

/// A daemon that hostile messages are sent to.
struct Stage {
    daemon: Daemon,
    config: Config,
    client: RawClient,
    world: World,
    sent: usize,
}

impl Stage {
    fn new() -> Self {
        let world = World::new();
        world.db.execute("create table seen (headers jsonb)");
        let orders = Consumer::orders()
            .sql(RECORD_PAYLOAD)
            .bind(EXCHANGE, "fanout", "")
            .set("claim.lease", "30s")
            .set("claim.renew_every", "5s");
        let config = world
            .config()
            .set("postgres.statement_timeout", "20s")
            .set("postgres.idle_in_transaction_timeout", "20s")
            .consumer(orders);
        Self {
            daemon: world.run(&config),
            client: RawClient::connect(world.amqp_url()),
            config,
            world,
            sent: 0,
        }
    }

    /// Sends one hostile message between two good ones. The good ones must be
    /// applied; returns what became of the other.
    fn send(&mut self, what: &str, properties: &Properties, body: &[u8]) -> Fate {
        self.send_with_key(what, b"key", properties, body)
    }

    fn send_with_key(
        &mut self,
        what: &str,
        key: &[u8],
        properties: &Properties,
        body: &[u8],
    ) -> Fate {
        self.sent += 1;
        let number = self.sent;
        let neighbours = ["before", "after"].map(|side| format!("{side}-{number}"));
        let [before, after] = &neighbours;
        let neighbour = |client: &mut RawClient, id: &str| {
            let properties = Properties::new(id.as_bytes());
            client.publish(EXCHANGE, b"", &properties, id.as_bytes());
        };
        neighbour(&mut self.client, before);
        self.client.publish(EXCHANGE, key, properties, body);
        neighbour(&mut self.client, after);
        let hash_sent = hash(body);
        let mut fate = None;
        eventually(&format!("{what}: all three come to an end"), || {
            self.daemon.assert_running();
            let hashes = self.world.db.texts("select note from effect");
            let has = |hash: &String| hashes.contains(hash);
            // A dead letter is taken out, and so seen once.
            fate = fate.or_else(|| self.fate(has(&hash_sent), body));
            fate.is_some() && neighbours.iter().all(|id| has(&hash(id.as_bytes())))
        });
        assert_eq!(
            self.daemon.times_consuming(ORDERS),
            1,
            "{what}: the connection was lost"
        );
        self.world.db.execute("truncate effect");
        fate.unwrap()
    }

    /// Looks for a message among the dead letters, which it takes out.
    fn fate(&mut self, applied: bool, body: &[u8]) -> Option<Fate> {
        let Some(dead) = self.client.get(ORDERS_DEAD) else {
            return applied.then_some(Fate::Applied);
        };
        assert!(
            dead.body == body,
            "only the hostile message may come to rest"
        );
        assert!(!applied, "applied or dead-lettered, not both");
        Some(Fate::Dead)
    }

    fn last_reason(&self) -> String {
        let reasons = self.world.db.reasons(ORDERS);
        reasons.last().expect("a reason in the journal").clone()
    }

    /// Ends the daemon, and panics unless everything was settled.
    fn finish(self) {
        self.daemon.stop();
        assert!(self.world.broker.is_empty(ORDERS));
        drop(self.config);
    }
}

/// As PostgreSQL prints it.
fn hash(body: &[u8]) -> String {
    let hash = Sha256::digest(body);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn body(what: &str) -> Vec<u8> {
    format!(r#"{{"hostile": "{what}"}}"#).into_bytes()
}

/// Has each case applied or dead-lettered with a reason.
fn survives(cases: impl IntoIterator<Item = (String, Properties)>) {
    let mut stage = Stage::new();
    let mut dead = 0;
    for (what, properties) in cases {
        if stage.send(&what, &properties, &body(&what)) == Fate::Dead {
            dead += 1;
        }
        assert_eq!(
            stage.world.db.reasons(ORDERS).len(),
            dead,
            "{what}: a reason"
        );
    }
    stage.finish();
}

#[test]
fn headers_nested_thousands_deep_are_survived() {
    let cases = [
        ("4,000 tables", raw::nested_tables(b"deep", 4_000)),
        ("20,000 tables", raw::nested_tables(b"deep", 20_000)),
        ("4,000 arrays", raw::nested_arrays(b"deep", 4_000)),
        ("26,000 arrays", raw::nested_arrays(b"deep", 26_000)),
    ];
    survives(cases.map(|(what, header)| {
        let properties = Properties::new(what.as_bytes()).headers(&[header]);
        (what.to_owned(), properties)
    }));
}

#[test]
fn a_message_is_applied_although_its_headers_are_nested_too_deep() {
    let mut stage = Stage::new();
    let header = raw::nested_tables(b"deep", 4_000);
    let properties = Properties::new(b"deep").headers(&[header]);
    assert_eq!(stage.send("deep", &properties, b"deep"), Fate::Applied);
    stage.finish();
}

#[test]
fn a_routing_key_that_is_not_utf8_is_survived() {
    let mut stage = Stage::new();
    let keys: [&[u8]; 4] = [b"\xFF", b"caf\xE9.order", b"\xC0\x80", &[0x80; 255]];
    for (number, key) in keys.into_iter().enumerate() {
        let what = format!("key-{number}");
        let properties = Properties::new(what.as_bytes());
        stage.send_with_key(&what, key, &properties, &body(&what));
    }
    let nul = Properties::new(b"nul");
    stage.send_with_key("nul", b"a\0b", &nul, &body("nul"));
    stage.finish();
}

#[test]
fn a_broken_string_in_any_property_is_survived() {
    let texts: [(&str, &[u8]); 4] = [
        ("no UTF-8", b"\xFF\xFE\xFD"),
        ("cut", b"caf\xC3"),
        ("NUL", b"a\0b"),
        ("255 bytes", &[0x80; 255]),
    ];
    let cases = raw::SHORT_STRINGS.iter().flat_map(|(name, flag)| {
        texts.iter().map(move |(text, bytes)| {
            let what = format!("{name}: {text}");
            let properties = Properties::new(what.as_bytes()).short(*flag, bytes);
            (what, properties)
        })
    });
    survives(cases);
}

#[test]
fn a_broken_string_in_a_property_leaves_the_ones_after_it_alone() {
    let mut stage = Stage::new();
    let properties = Properties::new(b"kept")
        .short(flag::CONTENT_TYPE, b"\xFF")
        .short(flag::CORRELATION_ID, b"\xFF")
        .headers(&[raw::field(b"tenant", b'S', &raw::long(b"north"))]);
    assert_eq!(stage.send("kept", &properties, b"kept"), Fate::Applied);
    let ledger = stage.world.db.ledger(ORDERS);
    assert!(ledger.contains(&"kept".to_owned()), "{ledger:?}");
    let tenants = stage
        .world
        .db
        .texts("select headers->>'tenant' from seen where headers ? 'tenant'");
    assert_eq!(tenants, ["north"]);
    stage.finish();
}

#[test]
fn an_id_that_is_not_utf8_is_dead_lettered() {
    let mut stage = Stage::new();
    for id in [b"\xFF\xFE".as_slice(), b"caf\xE9", &[0x80; 255]] {
        let fate = stage.send("id", &Properties::new(id), &body("id"));
        assert_eq!(fate, Fate::Dead);
        assert_eq!(stage.last_reason(), "bad-header");
    }
    stage.finish();
}

#[test]
fn an_id_that_is_missing_empty_or_has_a_nul_is_dead_lettered() {
    let mut stage = Stage::new();
    for (what, properties) in [
        ("no id", Properties::anonymous()),
        ("empty id", Properties::new(b"")),
        ("NUL in id", Properties::new(b"a\0b")),
    ] {
        assert_eq!(
            stage.send(what, &properties, &body(what)),
            Fate::Dead,
            "{what}"
        );
        assert_eq!(stage.last_reason(), "missing-id", "{what}");
    }
    stage.finish();
}

#[test]
fn an_id_of_255_bytes_is_applied() {
    let mut stage = Stage::new();
    let fate = stage.send("long id", &Properties::new(&[b'i'; 255]), b"long");
    assert_eq!(fate, Fate::Applied);
    stage.finish();
}

#[test]
fn a_header_of_any_type_is_survived() {
    survives(raw::every_type(b"f").into_iter().map(|(what, field)| {
        let properties = Properties::new(what.as_bytes()).headers(&[field]);
        (what.to_owned(), properties)
    }));
}

#[test]
fn a_table_of_all_types_and_of_thousands_of_fields_is_survived() {
    let all: Vec<_> = raw::every_type(b"f")
        .into_iter()
        .map(|(_, field)| field)
        .collect();
    let many: Vec<_> = (0..5_000)
        .map(|number| raw::field(format!("field-{number}").as_bytes(), b'V', &[]))
        .collect();
    let cases = [("all", all), ("many", many), ("none", Vec::new())];
    survives(cases.map(|(what, fields)| {
        let properties = Properties::new(what.as_bytes()).headers(&fields);
        (what.to_owned(), properties)
    }));
}

#[test]
fn bodies_from_nothing_to_16_megabytes_are_applied() {
    let mut stage = Stage::new();
    let json = format!(r#"["{}"]"#, "x".repeat((1 << 20) - 4)).into_bytes();
    let bodies: [(&str, Vec<u8>); 6] = [
        ("empty", Vec::new()),
        ("one NUL", vec![0]),
        ("NUL in JSON", br#"{"text": "a\u0000b"}"#.to_vec()),
        (
            "deep JSON",
            [vec![b'['; 50_000], vec![b']'; 50_000]].concat(),
        ),
        ("1 MB of JSON", json),
        ("16 MB of bytes", vec![0xFF; 16 << 20]),
    ];
    for (what, body) in bodies {
        let fate = stage.send(what, &Properties::new(what.as_bytes()), &body);
        assert_eq!(fate, Fate::Applied, "{what}");
    }
    stage.finish();
}

/// A Python with pika: script/test sees to it.
fn python() -> String {
    std::env::var("ACKONCE_PYTHON").unwrap_or_else(|_| "/usr/bin/python3".to_owned())
}

const PIKA: &str = r#"
import datetime, decimal, sys
import pika

connection = pika.BlockingConnection(pika.URLParameters(sys.argv[1]))
channel = connection.channel()
channel.confirm_delivery()

def publish(body, **properties):
    properties = pika.BasicProperties(delivery_mode=2, **properties)
    channel.basic_publish("", "orders", body, properties, mandatory=True)

publish(b'{"a": 1}', message_id="plain")
publish(b'{"a": 1}', message_id="plain")
publish(b'{"a": 1}')
publish(b"", message_id="empty")
publish(b"x" * (1 << 20), message_id="1 MB")
publish(b"x" * (16 << 20), message_id="16 MB", content_type="application/octet-stream")
publish("größe ☂".encode(), message_id="ü ☂")
publish(b"{}", message_id="odd", headers={
    "none": None, "yes": True, "int": -1, "long": 1 << 40, "text": "größe",
    "bytes": b"\xff\x00", "decimal": decimal.Decimal("1.25"),
    "time": datetime.datetime(2024, 1, 1), "list": [1, [2, {"three": [None]}]],
    "table": {"a": {"b": {"c": {}}}}, "": "no name", "x" * 200: "y" * 50000,
})
deep = {}
for _ in range(200):
    deep = {"d": deep}
publish(b"{}", message_id="deep", headers=deep, expiration="600000", priority=9,
        reply_to="a", correlation_id="b", type="c", user_id="USER", app_id="e",
        cluster_id="f", timestamp=1700000000, content_encoding="gzip")
connection.close()
"#;

#[test]
fn what_pika_publishes_is_applied_or_dead_lettered() {
    let stage = Stage::new();
    let world = &stage.world;
    let script = PIKA.replace("USER", world.management.user());
    let published = Command::new(python())
        .args(["-c", &script, world.amqp_url()])
        .output()
        .expect("Python runs");
    let stderr = String::from_utf8_lossy(&published.stderr);
    assert!(
        published.status.success(),
        "is python3-pika installed? {stderr}"
    );
    let ids = ["plain", "empty", "1 MB", "16 MB", "ü ☂", "odd", "deep"];
    world.wait_for_effects(i64::try_from(ids.len()).unwrap());
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    assert_eq!(dead[0].body, br#"{"a": 1}"#);
    assert_eq!(world.db.reasons(ORDERS), ["missing-id"]);
    world.assert_each_applied_once(&ids);
    assert_eq!(stage.daemon.times_consuming(ORDERS), 1);
    stage.finish();
}

#[test]
fn what_rabbitmqadmin_publishes_is_applied_or_dead_lettered() {
    let stage = Stage::new();
    let world = &stage.world;
    let tool = world.path("rabbitmqadmin");
    // RabbitMQ 4 no longer serves the tool; then the API is called as it would.
    let served = world.management.download("/cli/rabbitmqadmin");
    if let Some(script) = &served {
        std::fs::write(&tool, script).unwrap();
    }
    let publish = |payload: &str, properties: &str| {
        let management = &world.management;
        if served.is_none() {
            return management.publish(world.name(), ORDERS, payload, properties);
        }
        let output = Command::new(python())
            .arg(&tool)
            .args([
                "-H",
                management.host(),
                "-P",
                &management.port().to_string(),
            ])
            .args(["-u", management.user(), "-p", &management.password()])
            .args(["-V", world.name(), "publish", "routing_key=orders"])
            .arg(format!("payload={payload}"))
            .arg(format!("properties={properties}"))
            .output()
            .expect("Python runs");
        let said = String::from_utf8_lossy(&output.stdout);
        let failed = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("Message published"), "{said}{failed}");
    };
    publish(
        r#"{"a": 1}"#,
        r#"{"message_id": "with id", "delivery_mode": 2}"#,
    );
    publish(
        r#"{"a": 1}"#,
        r#"{"message_id": "with id", "delivery_mode": 2}"#,
    );
    publish("without", "{}");
    publish(
        "odd",
        r#"{"message_id": "odd", "headers": {"f": 1.5, "l": [1, "a", [true]],
            "t": {"u": {"v": -1}}, "": "", "big": 9007199254740993}}"#,
    );
    world.wait_for_effects(2);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    assert_eq!(dead[0].body, b"without");
    assert_eq!(world.db.reasons(ORDERS), ["missing-id"]);
    world.assert_each_applied_once(&["with id", "odd"]);
    let seen: BTreeMap<String, i64> = world.db.effects();
    assert_eq!(seen.len(), 2);
    assert_eq!(stage.daemon.times_consuming(ORDERS), 1);
    stage.finish();
}

#[test]
fn numbers_that_would_fill_the_servers_memory_are_applied_without_a_body() {
    let world = World::new();
    world
        .db
        .execute("create table seen (message_id text, body jsonb, bytes int)");
    let sql = "insert into seen select message_id, body, length(payload) from message; \
               insert into effect (message_id) select message_id from message";
    let config = world.config().consumer(Consumer::orders().sql(sql));
    let daemon = world.run(&config);
    // Each of its numbers has 16,000 digits as jsonb.
    let bomb = format!("[{}1]", "1e-16000,".repeat(2_000));
    let many = format!("[{}1]", "1,".repeat(1_000_001));
    let messages = [
        ("bomb", bomb),
        ("many", many),
        ("tiny", "{\"a\":1e-20000}".to_owned()),
        ("plain", "{\"a\":1e-300}".to_owned()),
    ];
    let mut sizes: Vec<String> = messages
        .iter()
        .map(|(id, body)| format!("{id}|{}|{}", *id != "plain", body.len()))
        .collect();
    world
        .broker
        .send(ORDERS, messages.map(|(id, body)| Msg::new(id).body(body)));
    world.wait_for_effects(4);
    world.drain_with(daemon, &config, ORDERS);
    let mut seen = world
        .db
        .texts("select concat_ws('|', message_id, (body is null)::text, bytes) from seen");
    seen.sort();
    sizes.sort();
    assert_eq!(seen, sizes);
}
