//! Hundreds of hostile messages, each of which fails at first, so that the
//! daemon makes a copy of it: every one is applied or dead-lettered with a
//! reason, and nothing goes anywhere else.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;

use crate::common::raw::{self, Properties, RawClient, flag};
use crate::common::{Consumer, ORDERS, ORDERS_DEAD, World, eventually};
use sha2::{Digest, Sha256};

const EXCHANGE: &str = "events";
/// A queue that no message is for.
const ELSEWHERE: &str = "elsewhere";

/// Effects are known by the hash of the payload, and fail with SQLSTATE 23503
/// as long as the table `ready` is empty. Everything else is stored as well.
const STORE: &str = "insert into effect (message_id, note, body) \
     select message_id, once_ready(encode(sha256(payload), 'hex')), \
     jsonb_build_array(body, headers, exchange, routing_key, attempt, redelivered) from message";

/// One hostile message; its body is unlike that of any other.
struct Case {
    key: Vec<u8>,
    properties: Properties,
    body: Vec<u8>,
}

/// The hostile messages in the making.
#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    fn id(&self) -> Vec<u8> {
        format!("id-{}", self.0.len()).into_bytes()
    }

    fn push(&mut self, key: &[u8], properties: Properties, body: &[u8]) {
        let number = format!("{} ", self.0.len());
        self.0.push(Case {
            key: key.to_vec(),
            properties,
            body: [number.as_bytes(), body].concat(),
        });
    }

    fn with(&mut self, change: impl FnOnce(Properties) -> Properties) {
        let properties = change(Properties::new(&self.id()));
        self.push(b"key", properties, b"{}");
    }

    fn header(&mut self, field: Vec<u8>) {
        self.with(|properties| properties.headers(&[field]));
    }
}

fn string_field(name: &[u8], text: &[u8]) -> Vec<u8> {
    raw::field(name, b'S', &raw::long(text))
}

/// SQL, and texts that no decent client sends.
const TEXTS: [&[u8]; 11] = [
    b"'; drop table effect; --",
    b"\"; delete from ackonce.ledger; --",
    b"$$); drop schema ackonce cascade; --",
    b"') on conflict do nothing; commit; --",
    b"{\"a\": \"\\u0000\"}",
    b"%s%n%x \\' \\\\ ${HOME} {0}",
    b"a\0b",
    b"\xFF\xFE\xFD",
    b"caf\xC3",
    b"\xED\xA0\x80",
    &[0x80; 250],
];

/// Each of [`TEXTS`] in every place that takes one.
fn add_texts(cases: &mut Cases) {
    for text in TEXTS {
        for (_, flag) in raw::SHORT_STRINGS {
            cases.with(|properties| properties.short(flag, text));
        }
        cases.header(string_field(b"text", text));
        cases.header(string_field(text, b"text"));
        let numbered = [format!("{} ", cases.0.len()).as_bytes(), text].concat();
        cases.push(b"key", Properties::new(&numbered), b"{}");
        let properties = Properties::new(&cases.id());
        cases.push(text, properties, text);
    }
}

/// Headers of every type: any, and the ones by which daemon and broker know
/// what became of a message.
fn add_headers(cases: &mut Cases) {
    let forged = [
        "any",
        "ackonce-attempts",
        "ackonce-exchange",
        "ackonce-routing-key",
        "ackonce-reason",
        "ackonce-user-id",
        "ackonce-cc",
        "x-delivery-count",
        "x-first-death-reason",
    ];
    for name in forged {
        for (_, field) in raw::every_type(name.as_bytes()) {
            cases.header(field);
        }
    }
    for count in [i64::MIN, -1, 1, 4, 5, i64::from(u32::MAX), i64::MAX] {
        let attempts = raw::field(b"ackonce-attempts", b'l', &count.to_be_bytes());
        cases.header(attempts);
    }
    cases.header(raw::nested_tables(b"deep", 4_000));
    cases.header(raw::nested_arrays(b"deep", 4_000));
    // A copy of this has no room for the daemon's own headers.
    cases.header(string_field(b"long", &[b'x'; 120_000]));
    let fields: Vec<_> = (0..3_000)
        .map(|number| raw::field(format!("field-{number}").as_bytes(), b'V', &[]))
        .collect();
    cases.with(|properties| properties.headers(&fields));
}

/// What the broker acts upon: deaths, further addresses, times and ranks.
fn add_broker_matters(cases: &mut Cases, user: &str) {
    let death = [
        string_field(b"queue", ORDERS.as_bytes()),
        string_field(b"reason", b"expired"),
        string_field(b"exchange", b""),
        raw::field(b"count", b'l', &i64::MAX.to_be_bytes()),
        raw::field(b"time", b'T', &[0xFF; 8]),
        raw::field(b"routing-keys", b'A', &raw::long(b"")),
    ]
    .concat();
    let table = [&b"F"[..], &raw::long(&death)].concat();
    for deaths in [table.clone(), table.repeat(50), Vec::new()] {
        cases.header(raw::field(b"x-death", b'A', &raw::long(&deaths)));
    }
    let elsewhere = [&b"S"[..], &raw::long(ELSEWHERE.as_bytes())].concat();
    for name in [&b"CC"[..], b"BCC"] {
        let copies = raw::long(&elsewhere.repeat(3));
        cases.header(raw::field(name, b'A', &copies));
        cases.with(|properties| {
            let fields = [
                raw::field(name, b'A', &copies),
                string_field(b"ackonce-exchange", b""),
                string_field(b"ackonce-routing-key", ELSEWHERE.as_bytes()),
            ];
            properties.headers(&fields)
        });
    }
    cases.header(raw::field(b"ackonce-cc", b'A', &raw::long(&elsewhere)));
    cases.with(|properties| properties.short(flag::USER_ID, user.as_bytes()));
    cases.with(|properties| properties.short(flag::EXPIRATION, b"600000"));
    for rank in [0, 9, 255] {
        cases.with(|properties| properties.bytes(flag::PRIORITY, vec![rank]));
    }
    for time in [0, 1_700_000_000_000, u64::MAX] {
        let time = time.to_be_bytes().to_vec();
        cases.with(|properties| properties.bytes(flag::TIMESTAMP, time));
    }
    for content_type in ["application/json", "text/html", "image/png", ""] {
        cases.with(|properties| {
            properties
                .short(flag::CONTENT_TYPE, content_type.as_bytes())
                .short(flag::CONTENT_ENCODING, b"gzip")
        });
    }
}

fn add_ids_and_bodies(cases: &mut Cases) {
    cases.push(b"key", Properties::anonymous(), b"{}");
    for id in [&b""[..], b" ", b"\n", &[b'i'; 255], "ü ☂".as_bytes()] {
        cases.push(b"key", Properties::new(id), b"{}");
    }
    let bodies: [&[u8]; 6] = [
        b"",
        b"\0",
        b"{\"a\": \"\\u0000\"}",
        &[0xFF; 100_000],
        &[b'['; 20_000],
        b"'); drop table effect; --",
    ];
    for body in bodies {
        let properties = Properties::new(&cases.id());
        cases.push(b"key", properties, body);
    }
}

fn all_cases(user: &str) -> Vec<Case> {
    let mut cases = Cases::default();
    add_texts(&mut cases);
    add_headers(&mut cases);
    add_broker_matters(&mut cases, user);
    add_ids_and_bodies(&mut cases);
    cases.0
}

/// As PostgreSQL prints it.
fn hash(body: &[u8]) -> String {
    let hash = Sha256::digest(body);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn survives_retries(queue_type: &str) {
    let world = World::new();
    world.db.execute(
        "create table ready (yes bool); \
         create function once_ready(hash text) returns text language plpgsql as $$ begin \
         if not exists (select from ready) then \
         raise exception 'not yet' using errcode = '23503'; end if; return hash; end $$",
    );
    world.broker.declare(ELSEWHERE);
    let orders = Consumer::orders()
        .sql(STORE)
        .bind(EXCHANGE, "topic", "#")
        .set("topology.queue_type", queue_type)
        .set("retry.breaker", 0)
        .max_attempts(1_000)
        .backoff(&["300ms"]);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    let mut client = RawClient::connect(world.amqp_url());
    let cases = all_cases(world.management.user());
    assert!(cases.len() >= 200, "{}", cases.len());
    for case in &cases {
        client.publish(EXCHANGE, &case.key, &case.properties, &case.body);
    }
    let tried = "select count(distinct fingerprint) from ackonce.failure";
    eventually("each has failed once", || {
        daemon.assert_alive();
        world.db.count(tried) == cases.len() as i64
    });
    world.db.execute("insert into ready values (true)");
    let mut dead = BTreeSet::new();
    let sent: BTreeSet<String> = cases.iter().map(|case| hash(&case.body)).collect();
    let applied = || -> BTreeSet<String> {
        let notes = world.db.texts("select note from effect");
        notes.into_iter().collect()
    };
    eventually("each comes to an end", || {
        daemon.assert_alive();
        while let Some(letter) = client.get(ORDERS_DEAD) {
            assert!(dead.insert(hash(&letter.body)), "dead-lettered once");
        }
        applied().len() + dead.len() >= sent.len()
    });
    world.drain_with(daemon, &config, ORDERS);
    let applied = applied();
    assert!(applied.is_disjoint(&dead), "applied or dead, not both");
    assert_eq!(&applied | &dead, sent);
    assert_eq!(world.db.effect_count(), applied.len() as i64, "each once");
    let with_reason = world.db.texts(
        "select distinct encode(fingerprint, 'hex') from ackonce.failure where reason is not null",
    );
    let with_reason: BTreeSet<String> = with_reason.into_iter().collect();
    assert_eq!(with_reason, dead, "a reason for each dead letter");
    assert!(applied.len() > 200, "{} were applied", applied.len());
    for queue in [ELSEWHERE, ORDERS_DEAD, "orders.retry.300ms"] {
        assert!(world.broker.is_empty(queue), "{queue} holds a message");
    }
    assert_eq!(world.db.ledger(ORDERS).len(), applied.len());
}

#[test]
fn hundreds_of_hostile_messages_that_fail_at_first_are_survived_on_a_quorum_queue() {
    survives_retries("quorum");
}

#[test]
fn hundreds_of_hostile_messages_that_fail_at_first_are_survived_on_a_classic_queue() {
    survives_retries("classic");
}
