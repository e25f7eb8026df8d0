//! The `http` handler in the daemon, on real servers: what becomes of messages
//! whose receiver fails in every way, and exactly once where it honours the
//! idempotency key.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use amiquip::AmqpValue;
use percent_encoding::percent_decode_str;
use serde_json::Value;
use sqlx::Row;

use crate::common::{
    Answer, Config, Consumer, Dead, Msg, ORDERS, ORDERS_DEAD, Receiver, Request, World, eventually,
    numbered_ids, run_ackonce,
};

fn orders(receiver: &Receiver) -> Consumer {
    Consumer::orders()
        .handler("http")
        .set("handler.url", receiver.url())
        .set("handler.timeout", "800ms")
        .set("handler.connect_timeout", "500ms")
        .set("claim.lease", "1200ms")
        .set("claim.renew_every", "300ms")
}

fn id_of(request: &Request) -> String {
    let key = request.key();
    let id = key.strip_prefix("orders:").expect("the consumer's name");
    percent_decode_str(id).decode_utf8().unwrap().into_owned()
}

/// Each id once, in the order of its first request.
fn applied_ids(receiver: &Receiver) -> BTreeSet<String> {
    let keys = receiver.applied();
    keys.keys()
        .map(|key| key.strip_prefix("orders:").unwrap().to_owned())
        .collect()
}

/// Answers with what stands for an id in `script`, one after the other, then
/// with 200.
fn scripted(script: &[(&str, &[Answer])]) -> Receiver {
    let mut script: BTreeMap<String, Vec<Answer>> = script
        .iter()
        .map(|(id, answers)| ((*id).to_owned(), answers.iter().rev().cloned().collect()))
        .collect();
    Receiver::new(move |request| {
        let answers = script.get_mut(&id_of(request));
        let next = answers.and_then(Vec::pop);
        next.unwrap_or_else(|| Answer::status(200))
    })
}

#[test]
fn every_answer_leads_where_the_table_says() {
    let why = || "no such order\n\u{1b}[31m".to_owned();
    let receiver = scripted(&[
        ("drop", &[Answer::Drop]),
        ("half", &[Answer::Half]),
        ("garbage", &[Answer::Raw(b"SSH-2.0\r\n\r\n")]),
        ("silence", &[Answer::Silence]),
        (
            "500",
            &[Answer::Status(500, "", why()), Answer::status(503)],
        ),
        (
            "429",
            &[Answer::Status(429, "retry-after: 1\r\n", String::new())],
        ),
        ("404", &[Answer::Status(404, "", why())]),
        (
            "301",
            &[Answer::Status(
                301,
                "location: http://evil/\r\n",
                String::new(),
            )],
        ),
        (
            "503",
            &[const { Answer::Status(503, "", String::new()) }; 3],
        ),
    ]);
    let world = World::new();
    let consumer = orders(&receiver).backoff(&["100ms", "1s"]).max_attempts(3);
    let config = world.config().consumer(consumer);
    world.prepare(&config);
    let good = ["ok", "drop", "half", "garbage", "silence", "500", "429"];
    let bad = ["404", "301", "503"];
    world
        .broker
        .send(ORDERS, good.iter().chain(&bad).map(|id| Msg::new(id)));
    let daemon = world.run(&config);
    eventually("all are applied", || {
        applied_ids(&receiver).len() == good.len()
    });
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, bad.len());
    eventually("the ledger has them", || {
        world.db.ledger(ORDERS).len() == good.len()
    });
    daemon.stop();

    assert_eq!(applied_ids(&receiver), good.map(str::to_owned).into());
    let dead: BTreeSet<&str> = dead.iter().filter_map(Dead::id).collect();
    assert_eq!(dead, bad.into());
    let mut requests: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for request in receiver.requests() {
        let attempt = request.header("ackonce-attempt").unwrap();
        requests.entry(id_of(&request)).or_default().push(attempt);
    }
    for (id, attempts) in [
        ("ok", 1),
        ("drop", 2),
        ("500", 3),
        ("404", 1),
        ("301", 1),
        ("503", 3),
    ] {
        let numbers: Vec<String> = (1..=attempts).map(|n: u32| n.to_string()).collect();
        assert_eq!(requests[id], numbers, "{id}");
    }
    let failures = world.db.failures(ORDERS);
    let rows = |id: &str| -> Vec<(String, String, String)> {
        failures
            .iter()
            .filter(|f| f.message_id.as_deref() == Some(id))
            .map(|f| (f.code.clone().unwrap(), f.class.clone(), f.reason.clone()))
            .collect()
    };
    for (id, wanted) in [
        ("drop", &[("broken", "transient", "")][..]),
        ("half", &[("broken", "transient", "")]),
        ("garbage", &[("broken", "transient", "")]),
        ("silence", &[("timeout", "transient", "")]),
        ("500", &[("500", "transient", ""), ("503", "transient", "")]),
        ("429", &[("429", "transient", "")]),
        ("404", &[("404", "permanent", "rejected")]),
        ("301", &[("301", "permanent", "rejected")]),
        (
            "503",
            &[
                ("503", "transient", ""),
                ("503", "transient", ""),
                ("503", "transient", "max-attempts"),
            ],
        ),
    ] {
        let wanted: Vec<(String, String, String)> = wanted
            .iter()
            .map(|(code, class, reason)| ((*code).into(), (*class).into(), (*reason).into()))
            .collect();
        assert_eq!(rows(id), wanted, "{id}");
    }
    let text = |id: &str| {
        let row = failures
            .iter()
            .find(|f| f.message_id.as_deref() == Some(id));
        row.unwrap().error.clone()
    };
    assert!(
        text("404").ends_with("\nno such order \u{fffd}[31m"),
        "{}",
        text("404")
    );
    assert!(text("301").contains("http://evil/"), "{}", text("301"));
    let waits = "select retry_in::text from ackonce.failure where message_id = '429'";
    assert_eq!(
        world.db.texts(waits),
        ["00:00:01"],
        "Retry-After is honoured"
    );
}

#[test]
fn a_receiver_that_refuses_us_pauses_the_consumer_and_costs_no_attempt() {
    let closed = Arc::new(AtomicBool::new(true));
    let gate = Arc::clone(&closed);
    let mut receiver = Receiver::new(move |_| match gate.load(SeqCst) {
        true => Answer::Status(401, "", "who are you?".to_owned()),
        false => Answer::status(200),
    });
    let world = World::new();
    let config = world.config().consumer(orders(&receiver).max_attempts(1));
    world.prepare(&config);
    let ids = numbered_ids("m", 30);
    world.broker.send(ORDERS, ids.iter().map(|id| Msg::new(id)));
    let daemon = world.run(&config);
    daemon.wait_for_log(&["paused: ", "answered 401", "code=401"]);
    assert!(!daemon.logged(&["who are you"]), "it may quote a message");
    receiver.wait_for(5);
    closed.store(false, SeqCst);
    eventually("all are applied", || {
        applied_ids(&receiver).len() == ids.len()
    });

    receiver.go_down();
    let more = numbered_ids("n", 30);
    world
        .broker
        .send(ORDERS, more.iter().map(|id| Msg::new(id)));
    daemon.wait_for_log(&["failed to connect to", "refused"]);
    receiver.come_up();
    let all = ids.len() + more.len();
    eventually("all are applied", || applied_ids(&receiver).len() == all);
    eventually("the ledger has them", || {
        world.db.ledger(ORDERS).len() == all
    });
    daemon.stop();
    assert_eq!(
        world.db.failures(ORDERS),
        [],
        "nothing was the messages' fault"
    );
    assert!(world.broker.is_empty(ORDERS_DEAD));
    assert!(receiver.applied().values().all(|count| *count == 1));
}

#[test]
fn a_class_of_the_configuration_comes_before_the_table() {
    let receiver = scripted(&[
        ("422", &[Answer::status(422)]),
        ("500", &[Answer::status(500)]),
    ]);
    let world = World::new();
    let consumer = orders(&receiver)
        .failures("transient", &["422"])
        .failures("permanent", &["5"]);
    let config = world.config().consumer(consumer);
    world.prepare(&config);
    world.broker.send(ORDERS, ["422", "500"].map(Msg::new));
    let daemon = world.run(&config);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
    eventually("422 is applied", || applied_ids(&receiver).contains("422"));
    daemon.stop();
    assert_eq!(dead[0].id(), Some("500"));
}

const KILLS: u32 = 10;
const GOOD_PER_ROUND: u32 = 12;

/// Kills daemons at `failpoint`, then lets one finish. The receiver takes each
/// key once, and fails the first request of every third.
fn survives_kills_at(failpoint: &str, redis: bool) {
    let mut seen = BTreeSet::new();
    let receiver = Receiver::new(move |request| {
        let id = id_of(request);
        if id.starts_with("bad") {
            return Answer::status(422);
        }
        match seen.insert(id.clone()) && id.ends_with(['0', '3', '6', '9']) {
            true => Answer::Drop,
            false => Answer::status(200),
        }
    });
    let world = World::new();
    let consumer = orders(&receiver)
        .set("workers", 2)
        .set("batch_max", 8)
        .set("prefetch", 64)
        // These daemons die of the test, and not of any message.
        .set("max_deaths", 100)
        .max_attempts(50);
    let config = world
        .config()
        .set("redis.enabled", redis)
        .consumer(consumer);
    world.prepare(&config);
    let (mut good, mut bad) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..KILLS {
        let ids: Vec<String> = (0..GOOD_PER_ROUND)
            .map(|n| format!("good-{round}-{n}"))
            .collect();
        let poison = format!("bad-{round}");
        // Every other one twice.
        let twice = ids.iter().step_by(2);
        let sent = ids.iter().chain(twice).chain([&poison]);
        world.broker.send(ORDERS, sent.map(|id| Msg::new(id)));
        good.extend(ids);
        bad.insert(poison);
        let nth = 1 + round % 2;
        let mut daemon = world.daemon(&config).dies_at(failpoint, nth).start();
        daemon.wait_until_killed();
    }
    drain(&world, &config, good.len() + bad.len());

    // What a receiver that honours keys has applied: every message once.
    assert_eq!(applied_ids(&receiver), good);
    let ledger: BTreeSet<String> = world.db.ledger(ORDERS).into_iter().collect();
    assert_eq!(ledger, good);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, bad.len());
    let dead: BTreeSet<String> = dead
        .iter()
        .filter_map(Dead::id)
        .map(str::to_owned)
        .collect();
    assert_eq!(dead, bad);
    assert_each_request_is_its_messages_own(&receiver);
}

/// Runs a daemon until every message is in the ledger or dead.
fn drain(world: &World, config: &Config, count: usize) {
    let daemon = world.run(config);
    eventually("every message comes to rest", || {
        daemon.assert_alive();
        let dead = world.broker.ready(ORDERS_DEAD) as usize;
        world.db.ledger(ORDERS).len() + dead >= count
    });
    daemon.stop();
    world.drain(config, ORDERS);
}

fn assert_each_request_is_its_messages_own(receiver: &Receiver) {
    for request in receiver.requests() {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        assert_eq!(body["id"], id_of(&request).as_str());
    }
}

#[test]
fn exactly_once_with_keys_when_killed_after_receiving() {
    survives_kills_at("received", true);
}

#[test]
fn exactly_once_with_keys_when_killed_after_claiming_in_redis() {
    survives_kills_at("claimed", true);
}

#[test]
fn exactly_once_with_keys_when_killed_after_claiming_in_the_ledger() {
    survives_kills_at("leased", true);
}

#[test]
fn exactly_once_with_keys_when_killed_after_the_call() {
    survives_kills_at("called", true);
}

#[test]
fn exactly_once_with_keys_when_killed_after_the_call_without_redis() {
    survives_kills_at("called", false);
}

#[test]
fn exactly_once_with_keys_when_killed_after_completing() {
    survives_kills_at("done", true);
}

#[test]
fn exactly_once_with_keys_when_killed_after_marking() {
    survives_kills_at("marked", true);
}

#[test]
fn exactly_once_with_keys_when_killed_after_settling() {
    survives_kills_at("settled", true);
}

#[test]
fn exactly_once_with_keys_when_killed_after_journaling() {
    survives_kills_at("journaled", true);
}

#[test]
fn hostile_messages_from_the_broker_escape_nowhere() {
    let receiver = Receiver::willing();
    let world = World::new();
    let consumer = orders(&receiver).set("handler.forward_headers", vec!["x-tenant"]);
    let config = world.config().consumer(consumer);
    world.prepare(&config);
    let texts = (1..=250_u32).map(|n| {
        let evil = [
            "\r\nX-Evil: 1",
            "\n\n",
            "\"",
            "%0d%0a",
            "ü嘊",
            "\\",
            "\t",
            "{}",
        ];
        let byte = char::from_u32(n).unwrap();
        format!("{n}{}{byte}", evil[n as usize % evil.len()])
    });
    let texts: Vec<String> = texts.collect();
    let messages = texts.iter().map(|text| {
        Msg::new(text)
            .body(text.as_bytes())
            .header("x-tenant", AmqpValue::LongString(text.clone()))
            .header("X-Evil", AmqpValue::LongString("1".to_owned()))
            .properties(|p| p.with_content_type(text.clone()))
    });
    world.broker.send(ORDERS, messages);
    let daemon = world.run(&config);
    let acts = |text: &&String| {
        text.chars()
            .any(|c| c != '\t' && (c < ' ' || c == '\u{7f}'))
    };
    let refused: BTreeSet<String> = texts.iter().filter(acts).cloned().collect();
    let sent: BTreeSet<String> = texts.iter().filter(|t| !acts(t)).cloned().collect();
    assert!(refused.len() > 50 && sent.len() > 100);
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, refused.len());
    receiver.wait_for(sent.len());
    eventually("the ledger has them", || {
        world.db.ledger(ORDERS).len() == sent.len()
    });
    daemon.stop();
    let dead: BTreeSet<String> = dead
        .iter()
        .filter_map(Dead::id)
        .map(str::to_owned)
        .collect();
    assert_eq!(dead, refused);
    let mut arrived = BTreeSet::new();
    for request in receiver.requests() {
        let id = id_of(&request);
        assert_eq!(request.line, b"POST /orders?x=1 HTTP/1.1");
        assert_eq!(request.header("x-evil"), None);
        assert_eq!(request.body, id.as_bytes());
        let tenant = request.header("x-tenant").unwrap();
        assert_eq!(tenant, id.trim_matches(['\t', ' ']));
        arrived.insert(id);
    }
    assert_eq!(arrived, sent);
}

#[test]
fn check_tells_whether_the_receiver_can_be_reached() {
    let mut receiver = Receiver::willing();
    let world = World::new();
    let consumer = orders(&receiver).set("handler.headers.Authorization", "Bearer hunter2");
    let config = world.config().consumer(consumer);
    world.prepare(&config);
    let path = world.write("check.toml", &config.text());
    let check = |arguments: &[&str]| {
        let path = path.to_str().unwrap();
        let output = run_ackonce(&[&["check", "--config", path], arguments].concat());
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let (status, text) = check(&[]);
    let place = receiver.address();
    assert!(
        text.contains(&format!(
            "ok       handler of orders: {place} can be reached"
        )),
        "{text}"
    );
    assert_eq!(status, Some(0), "{text}");
    assert_eq!(receiver.count(), 0, "nothing was sent");
    let (_, printed) = check(&["--print"]);
    assert!(printed.contains("type = \"http\""), "{printed}");
    assert!(
        !printed.contains("hunter2") && !printed.contains("x=1"),
        "{printed}"
    );
    receiver.go_down();
    let (status, text) = check(&[]);
    assert!(
        text.contains("error    handler of orders: failed to connect to"),
        "{text}"
    );
    assert_eq!(status, Some(69), "{text}");
}

/// A program that is killed when the test ends.
struct Program(std::process::Child);

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The shipped receiver in Python, and its URL.
fn example_receiver(world: &World, secret: &str) -> (Program, String) {
    use std::io::{BufRead, BufReader};
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/examples/receivers/receiver.py"
    );
    let mut child = std::process::Command::new("python3")
        .args([path, "0"])
        .arg(world.path("receiver.db"))
        .env("SIGNING_SECRET", secret)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("python3");
    let mut port = String::new();
    let stdout = child.stdout.take().expect("a pipe");
    BufReader::new(stdout)
        .read_line(&mut port)
        .expect("its port");
    (Program(child), format!("http://127.0.0.1:{}/", port.trim()))
}

#[test]
fn the_shipped_receiver_applies_each_message_once_while_daemons_are_killed() {
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let world = World::new();
    let (_program, url) = example_receiver(&world, SECRET);
    let consumer = Consumer::orders()
        .handler("http")
        .set("handler.url", url.as_str())
        .set("handler.signing_secrets", vec![SECRET])
        .set("claim.lease", "1200ms")
        .set("claim.renew_every", "300ms")
        .set("max_deaths", 100)
        .max_attempts(50);
    let config = world.config().consumer(consumer);
    world.prepare(&config);
    let mut ids = Vec::new();
    for (round, failpoint) in ["leased", "called", "called", "done", "settled"]
        .iter()
        .enumerate()
    {
        let fresh = numbered_ids(&format!("m-{round}"), 20);
        world
            .broker
            .send(ORDERS, fresh.iter().chain(&fresh).map(|id| Msg::new(id)));
        ids.extend(fresh);
        let mut daemon = world
            .daemon(&config)
            .dies_at(failpoint, 1 + round as u32 % 3)
            .start();
        daemon.wait_until_killed();
    }
    drain(&world, &config, ids.len());
    let mut answer = ureq::get(&url).call().unwrap();
    let effects: BTreeMap<String, u64> =
        serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap();
    let wanted = ids.iter().map(|id| (format!("orders:{id}"), 1)).collect();
    assert_eq!(effects, wanted);
}

#[test]
fn the_shipped_statement_writes_effect_and_key_together_and_once() {
    let world = World::new();
    world
        .db
        .execute(include_str!("../../examples/receivers/upsert.sql"));
    let apply = |key: &str, amount: u32| {
        let body = format!("{{\"order_id\": 7, \"amount\": {amount}}}");
        let execute = format!("execute apply('{key}', convert_to('{body}', 'UTF8'))");
        let rows = world.db.rows(&execute);
        (rows[0].get::<i64, _>(0), rows[0].get::<bool, _>(1))
    };
    assert_eq!(apply("orders:a", 5), (1, true));
    assert_eq!(apply("orders:a", 5), (0, true));
    assert_eq!(apply("orders:a", 6), (0, false));
    assert_eq!(apply("orders:b", 5), (1, true));
    assert_eq!(
        world.db.texts("select amount::text from payment"),
        ["5", "5"]
    );
}
