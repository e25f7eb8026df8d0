//! Letters that leave the dead-letter queue for a file, come back from it, or
//! leave it for good.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::fs::OpenOptions;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

use crate::common::raw::{self, RawClient};
use crate::common::{
    Config, Consumer, Dead, Msg, ORDERS, ORDERS_DEAD, RECORD_AMOUNT, World, run_ackonce,
};
use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use serde_json::{Value, json};

fn config(world: &World, kind: &str) -> Config {
    let orders = Consumer::orders()
        .set("topology.queue_type", kind)
        .sql(RECORD_AMOUNT);
    world.config().consumer(orders)
}

fn desk(world: &World, config: &Config, arguments: &[&str]) -> Output {
    let path = world.write("config.toml", &config.text());
    let mut all = vec!["dead"];
    all.extend(arguments);
    all.extend(["--config", path.to_str().unwrap()]);
    run_ackonce(&all)
}

fn everything(output: &Output) -> String {
    let all = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&all).into_owned()
}

fn said(output: &Output, status: i32) -> String {
    let said = everything(output);
    assert_eq!(output.status.code(), Some(status), "{said}");
    said
}

fn contents(dead: Vec<Dead>) -> Vec<(Vec<u8>, AmqpProperties)> {
    let letters = dead.into_iter().map(|letter| {
        let mut headers = letter.properties.headers().clone().unwrap_or_default();
        headers
            .retain(|name, _| !["x-delivery-count", "x-acquired-count"].contains(&name.as_str()));
        (letter.body, letter.properties.with_headers(headers))
    });
    letters.collect()
}

/// Letters that the daemon made, with properties, headers of many types, and
/// half of them with bodies that are no text.
fn dead_letters(world: &World, config: &Config, count: usize) {
    world.prepare(config);
    let table = FieldTable::from([
        (
            "amqp".to_owned(),
            AmqpValue::LongString("not a type".to_owned()),
        ),
        ("value".to_owned(), AmqpValue::Void),
    ]);
    let letter = |n: usize| {
        let n = n as i32;
        let letter = match n % 2 {
            0 => Msg::new(&format!("bad-{n}")).json(&json!({ "amount": "ä\n", "n": n })),
            _ => Msg::anonymous().body([&b"\xff\0"[..], &n.to_be_bytes()].concat()),
        };
        letter
            .header("i8", AmqpValue::ShortShortInt(-5))
            .header("i16", AmqpValue::ShortInt(-300))
            .header("i32", AmqpValue::LongInt(i32::MIN + n))
            .header("u32", AmqpValue::LongUInt(u32::MAX))
            .header("i64", AmqpValue::LongLongInt(i64::MAX))
            .header("float", AmqpValue::Float(0.1))
            .header("double", AmqpValue::Double(1e-300 / 3.0))
            .header("bytes", AmqpValue::ByteArray(vec![0, 255]))
            .header("time", AmqpValue::Timestamp(u64::from(u32::MAX) + 1))
            .header("void", AmqpValue::Void)
            .header("yes", AmqpValue::Boolean(true))
            .header("nul", AmqpValue::LongString("a\0b\u{1F600}".to_owned()))
            .header("table", AmqpValue::FieldTable(table.clone()))
            .header(
                "list",
                AmqpValue::FieldArray(vec![AmqpValue::ShortInt(1), AmqpValue::Void]),
            )
            .properties(|properties| {
                properties
                    .with_content_type("text/odd".to_owned())
                    .with_content_encoding("none".to_owned())
                    .with_correlation_id("c".to_owned())
                    .with_reply_to("r".to_owned())
                    .with_priority(3)
                    .with_timestamp(1_700_000_000)
                    .with_type_("t".to_owned())
                    .with_app_id("a".to_owned())
            })
    };
    world.broker.send(ORDERS, (0..count).map(letter));
    let daemon = world.run(config);
    crate::common::eventually("the dead letters", || {
        world.broker.ready(ORDERS_DEAD) as usize == count
    });
    daemon.stop();
}

#[test]
fn what_is_exported_and_imported_is_what_it_was() {
    for kind in ["quorum", "classic"] {
        let world = World::new();
        let config = config(&world, kind);
        dead_letters(&world, &config, 40);
        let path = world.path("letters.ndjson");
        let file = path.to_str().unwrap();
        said(
            &desk(&world, &config, &["export", ORDERS, "--output", file]),
            0,
        );
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let before = contents(world.broker.take(ORDERS_DEAD));
        assert_eq!(before.len(), 40);

        let output = said(
            &desk(&world, &config, &["import", ORDERS, file, "--yes"]),
            0,
        );
        assert!(output.contains("imported 40 letters, 0 not"), "{output}");
        let again = said(
            &desk(&world, &config, &["import", ORDERS, file, "--yes"]),
            0,
        );
        assert!(
            again.contains("0 letters to import, 40 are in the queue"),
            "{again}"
        );
        let after = contents(world.broker.take(ORDERS_DEAD));
        assert_eq!(after.len(), 40, "{kind}");
        for (after, before) in after.iter().zip(&before) {
            assert_eq!(after, before, "{kind}");
        }
    }
}

#[test]
fn an_export_that_cannot_be_written_is_none() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    let letter = |n: usize| Msg::new(&format!("id-{n}")).body("x".repeat(2_000));
    world.broker.send(ORDERS_DEAD, (0..200).map(letter));
    crate::common::eventually("the letters", || world.broker.ready(ORDERS_DEAD) == 200);
    let path = world.write("config.toml", &config.text());
    let export = |to: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ackonce"));
        command.args(["dead", "export", ORDERS, "--config"]);
        command.arg(&path).stdout(to).stderr(Stdio::piped());
        said(&command.output().unwrap(), 71)
    };
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let (reader, closed) = std::io::pipe().unwrap();
    drop(reader);
    for (to, why) in [
        (full.into(), "No space left"),
        (closed.into(), "Broken pipe"),
    ] {
        let said = export(to);
        assert!(
            said.contains("failed to write to standard output"),
            "{said}"
        );
        assert!(said.contains(why), "{said}");
        assert!(!said.contains("exported"), "{said}");
    }
    assert_eq!(world.broker.ready(ORDERS_DEAD), 200);
}

#[test]
fn an_import_goes_on_where_it_ended_and_knows_twins() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    let twins = [
        Msg::new("a"),
        Msg::new("a"),
        Msg::new("b"),
        Msg::anonymous(),
    ];
    world.broker.send(ORDERS_DEAD, twins);
    let path = world.path("letters.ndjson");
    let file = path.to_str().unwrap();
    said(
        &desk(&world, &config, &["export", ORDERS, "--output", file]),
        0,
    );
    world.broker.take(ORDERS_DEAD);
    world
        .broker
        .send(ORDERS_DEAD, [Msg::new("a"), Msg::new("c")]);

    let output = said(
        &desk(&world, &config, &["import", ORDERS, file, "--yes"]),
        0,
    );
    assert!(output.contains("imported 3 letters, 0 not"), "{output}");
    let mut ids: Vec<_> = world
        .broker
        .take(ORDERS_DEAD)
        .iter()
        .map(|l| l.id().map(str::to_owned))
        .collect();
    ids.sort();
    let expected = [None, Some("a"), Some("a"), Some("b"), Some("c")];
    assert_eq!(ids, expected.map(|id| id.map(str::to_owned)));
}

#[test]
fn a_file_with_one_bad_line_is_not_imported_at_all() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    world
        .broker
        .send(ORDERS_DEAD, [Msg::new("a"), Msg::new("b")]);
    let output = desk(&world, &config, &["export", ORDERS]);
    let lines = String::from_utf8(output.stdout).unwrap();
    world.broker.take(ORDERS_DEAD);
    let cut = &lines[..lines.len() - 20];
    let edited = lines.replace("\\\"id\\\":\\\"b\\\"", "\\\"id\\\":\\\"x\\\"");
    assert_ne!(edited, lines);
    let foreign = lines.replace("\"consumer\":\"orders\"", "\"consumer\":\"others\"");
    for (text, parts) in [
        (cut.to_owned(), ["line 2: ", "EOF"]),
        (edited, ["line 2: ", "on purpose"]),
        (foreign, ["line 1: ", "--any-consumer"]),
        (lines.clone() + "\n", ["line 3: ", "empty"]),
    ] {
        let path = world.write("bad.ndjson", &text);
        let output = said(
            &desk(
                &world,
                &config,
                &["import", ORDERS, path.to_str().unwrap(), "--yes"],
            ),
            2,
        );
        for part in parts {
            assert!(output.contains(part), "{part:?} is not in:\n{output}");
        }
        assert!(world.broker.is_empty(ORDERS_DEAD));
    }
    let output = desk(
        &world,
        &config,
        &["import", ORDERS, "/no/such/file", "--yes"],
    );
    assert!(said(&output, 2).contains("/no/such/file"));
}

#[test]
fn no_file_is_written_over() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    world.broker.send(ORDERS_DEAD, [Msg::new("a")]);
    let path = world.write("precious.txt", "precious");
    let file = path.to_str().unwrap();
    for arguments in [
        &["export", ORDERS, "--output", file][..],
        &[
            "drop",
            ORDERS,
            "--all",
            "--export",
            file,
            "--because",
            "test",
            "--yes",
        ],
    ] {
        let output = desk(&world, &config, arguments);
        assert!(said(&output, 2).contains("no file is written over"));
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), "precious");
    assert_eq!(world.broker.ready(ORDERS_DEAD), 1);
}

#[test]
fn a_letter_with_broken_bytes_is_exported_with_a_word_about_it() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    let mut raw = RawClient::connect(world.amqp_url());
    let broken = raw::Properties::new(b"broken").headers(&[raw::field(
        b"bad",
        b'S',
        &raw::long(b"\xff\xfe"),
    )]);
    raw.publish("", ORDERS_DEAD.as_bytes(), &broken, b"body");
    crate::common::eventually("the letter", || world.broker.ready(ORDERS_DEAD) == 1);
    let output = desk(&world, &config, &["export", ORDERS]);
    let letter: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(letter["repaired"], true);
    assert_eq!(letter["id"], "broken");
}

#[test]
fn dropping_takes_what_is_meant_and_nothing_else_and_is_written_down() {
    for kind in ["quorum", "classic"] {
        let world = World::new();
        let config = config(&world, kind);
        world.prepare(&config);
        let letter = |n: usize| {
            let tenant = AmqpValue::LongInt((n % 3) as i32);
            Msg::new(&format!("letter-{n}")).header("tenant", tenant)
        };
        world.broker.send(ORDERS_DEAD, (0..3_000).map(letter));
        let path = world.path("dropped.ndjson");
        let file = path.to_str().unwrap();
        let drop = [
            "drop",
            ORDERS,
            "--header",
            "tenant=1",
            "--export",
            file,
            "--because",
            "a bad tenant",
        ];
        let unasked = said(&desk(&world, &config, &drop), 2);
        assert!(
            unasked.contains("drop these 1000 letters") && unasked.contains("--yes"),
            "{unasked}"
        );
        assert_eq!(world.broker.ready(ORDERS_DEAD), 3_000);
        assert!(!path.exists());

        let output = said(&desk(&world, &config, &[&drop[..], &["--yes"]].concat()), 0);
        assert!(output.contains("dropped 1000 letters"), "{output}");
        let left: Vec<String> = world
            .broker
            .take(ORDERS_DEAD)
            .iter()
            .map(|l| l.id().unwrap().to_owned())
            .collect();
        let expected: Vec<String> = (0..3_000)
            .filter(|n| n % 3 != 1)
            .map(|n| format!("letter-{n}"))
            .collect();
        assert_eq!(left, expected, "{kind}: what is left, in its order");
        let lines = std::fs::read_to_string(&path).unwrap();
        assert_eq!(lines.lines().count(), 1_000);
        let written = world.db.texts(
            "select concat_ws('|', name, action, because, filter, letters, file, ended_at is not null) \
             from ackonce.desk_action join ackonce.consumer on consumer_id = consumer.id",
        );
        assert_eq!(
            written,
            [format!(
                "orders|drop|a bad tenant|--header \"tenant=1\"|1000|{file}|t"
            )]
        );
        let letters = world
            .db
            .count("select count(distinct message_id) from ackonce.desk_letter");
        assert_eq!(letters, 1_000);
    }
}

#[test]
fn dropping_asks_for_a_choice_a_copy_and_a_reason() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    world.broker.send(ORDERS_DEAD, [Msg::new("a")]);
    for (arguments, part) in [
        (&["--no-export", "--because", "x", "--yes"][..], "--all"),
        (&["--all", "--because", "x", "--yes"], "--export"),
        (&["--all", "--no-export", "--yes"], "--because"),
        (
            &[
                "--all",
                "--id",
                "a",
                "--no-export",
                "--because",
                "x",
                "--yes",
            ],
            "--all and a filter",
        ),
    ] {
        let output = desk(&world, &config, &[&["drop", ORDERS], arguments].concat());
        assert!(
            said(&output, 2).contains(part),
            "{part}: {}",
            everything(&output)
        );
    }
    let output = desk(&world, &config, &["drop", ORDERS, "--all", "--dry-run"]);
    assert!(said(&output, 0).contains("1 of 1 letters are meant"));
    let written = world.db.count("select count(*) from ackonce.desk_action");
    assert_eq!((world.broker.ready(ORDERS_DEAD), written), (1, 0));
}

#[test]
fn a_second_desk_is_refused_and_told_who_sits_there() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    world.broker.send(ORDERS_DEAD, [Msg::new("a")]);
    let lock = "select pg_advisory_lock(x'61636b64'::int, hashtext('orders.dead'))";
    world
        .db
        .execute(&format!("set application_name = 'a test'; {lock}"));
    for arguments in [
        &["list", ORDERS][..],
        &[
            "drop",
            ORDERS,
            "--all",
            "--no-export",
            "--because",
            "x",
            "--yes",
        ],
    ] {
        let output = said(&desk(&world, &config, arguments), 75);
        assert!(output.contains("a test"), "{output}");
    }
    // A second configuration may name the same queue.
    let other = Consumer::new("others")
        .set("topology.dead_letter_queue", ORDERS_DEAD)
        .sql(RECORD_AMOUNT);
    let other = world.config().consumer(other);
    let output = said(&desk(&world, &other, &["list", "others"]), 75);
    assert!(output.contains(ORDERS_DEAD), "{output}");
    world.db.execute("select pg_advisory_unlock_all()");
    said(&desk(&world, &config, &["list", ORDERS]), 0);
}

#[test]
fn what_is_dropped_without_an_id_is_told_by_its_body() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    let letters = [json!({ "n": 1 }), json!({ "n": 2 })];
    world.broker.send(
        ORDERS_DEAD,
        letters.iter().map(|body| Msg::anonymous().json(body)),
    );
    let output = desk(
        &world,
        &config,
        &["list", ORDERS, "--json", "--where", "/n=2"],
    );
    let line: Value =
        serde_json::from_slice(output.stdout.split(|b| *b == b'\n').next().unwrap()).unwrap();
    let name = format!("sha256:{}", &line["fingerprint"].as_str().unwrap()[..12]);
    let drop = [
        "drop",
        ORDERS,
        "--id",
        &name,
        "--no-export",
        "--because",
        "x",
        "--yes",
    ];
    said(&desk(&world, &config, &drop), 0);
    let left = world.broker.take(ORDERS_DEAD);
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].body, letters[0].to_string().into_bytes());
}
