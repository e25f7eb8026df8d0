//! The dead-letter desk: what it lists and picks, and that the queue stays as
//! it was.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;
use std::process::Output;

use crate::common::{
    Config, Consumer, Dead, Msg, ORDERS, ORDERS_DEAD, RECORD_AMOUNT, World, numbered_ids,
    run_ackonce,
};
use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use serde_json::{Value, json};

const KINDS: [&str; 2] = ["quorum", "classic"];

fn config(world: &World, kind: &str) -> Config {
    let orders = Consumer::orders()
        .set("topology.queue_type", kind)
        .set("max_body", "2KiB")
        .bind("events", "topic", "orders.#")
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

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn assert_status(output: &Output, status: i32) {
    let said = text(&[output.stdout.as_slice(), output.stderr.as_slice()].concat());
    assert_eq!(output.status.code(), Some(status), "{said}");
}

fn said(output: &Output, status: i32) -> String {
    assert_status(output, status);
    text(&output.stdout)
}

/// The lines of JSON that it prints, without the summary, and the summary.
fn json_lines(output: &Output) -> (Vec<Value>, Value) {
    let mut lines: Vec<Value> = said(output, 0)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let summary = lines.pop().unwrap()["summary"].take();
    (lines, summary)
}

fn list(world: &World, config: &Config, filters: &[&str]) -> (Vec<Value>, Value) {
    let mut arguments = vec!["list", ORDERS, "--json"];
    arguments.extend(filters);
    json_lines(&desk(world, config, &arguments))
}

fn ids(lines: &[Value]) -> BTreeSet<String> {
    let ids = lines.iter().map(|line| line["id"].as_str());
    ids.map(|id| id.unwrap_or("none").to_owned()).collect()
}

/// Letters with everything a message can carry, put straight into the queue.
fn assorted(count: usize) -> Vec<Msg> {
    let letter = |number: usize| {
        let nested = FieldTable::from([
            ("deep".to_owned(), AmqpValue::Double(0.1 + number as f64)),
            ("none".to_owned(), AmqpValue::Void),
        ]);
        Msg::new(&format!("letter-{number}"))
            .body(vec![(number % 251) as u8; number % 300])
            .header("number", AmqpValue::LongInt(number as i32))
            .header("bytes", AmqpValue::ByteArray(vec![0, 255, number as u8]))
            .header("at", AmqpValue::Timestamp(1_700_000_000 + number as u64))
            .header("table", AmqpValue::FieldTable(nested))
            .header(
                "list",
                AmqpValue::FieldArray(vec![AmqpValue::Boolean(true), AmqpValue::ShortInt(-3)]),
            )
            .properties(|properties| {
                properties
                    .with_content_type("application/x-test".to_owned())
                    .with_correlation_id(format!("c-{number}"))
                    .with_priority(0)
                    .with_type_("kind".to_owned())
                    .with_app_id("app".to_owned())
                    .with_reply_to("back".to_owned())
                    .with_timestamp(1_600_000_000 + number as u64)
            })
    };
    (0..count).map(letter).collect()
}

/// What a consumer of the queue gets, in its order, without the queue's own
/// count of how often it handed a message out.
fn contents(dead: Vec<Dead>) -> Vec<(Vec<u8>, AmqpProperties)> {
    let letters = dead.into_iter().map(|letter| {
        let mut headers = letter.properties.headers().clone().unwrap_or_default();
        headers
            .retain(|name, _| !["x-delivery-count", "x-acquired-count"].contains(&name.as_str()));
        (letter.body, letter.properties.with_headers(headers))
    });
    letters.collect()
}

#[test]
fn looking_leaves_the_queue_as_it_was_byte_for_byte() {
    for kind in KINDS {
        let world = World::new();
        let config = config(&world, kind);
        world.prepare(&config);
        world.broker.send(ORDERS_DEAD, assorted(700));
        // What the queue hands out to somebody who takes it all.
        let (before, _) = list(&world, &config, &[]);
        let first = before
            .iter()
            .map(|line| line["id"].as_str().unwrap().to_owned());
        let sent = numbered_ids("letter", 700);
        assert!(first.eq(sent.iter().cloned()), "{kind}: {before:?}");

        for arguments in [
            &["list", ORDERS][..],
            &["list", ORDERS, "--group-by", "reason"],
            &["list", ORDERS, "--limit", "3", "--reason", "rejected"],
            &["show", ORDERS, "letter-17"],
            &["export", ORDERS],
        ] {
            assert_status(&desk(&world, &config, arguments), 0);
        }
        let after = contents(world.broker.take(ORDERS_DEAD));
        let control = "control";
        world.broker.declare(control);
        world.broker.send(control, assorted(700));
        let expected = contents(world.broker.take(control));
        assert_eq!(after.len(), expected.len());
        for (after, expected) in after.iter().zip(&expected) {
            assert_eq!(after, expected, "{kind}");
        }
    }
}

/// 250 letters of each of four reasons, in the way of real ones. Returns the
/// configuration that made them.
fn four_reasons(world: &World, kind: &str) -> Config {
    let config = config(world, kind);
    world.prepare(&config);
    let number = |number: usize| json!({ "amount": number });
    let good = |number_: usize| {
        Msg::new(&format!("conflict-{number_}")).json(&json!({ "amount": number_ }))
    };
    world.broker.send(ORDERS, (0..250).map(good));
    let daemon = world.run(&config);
    world.wait_for_effects(250);
    let wait_for = |count| {
        crate::common::eventually("the dead letters", || {
            world.broker.ready(ORDERS_DEAD) == count
        });
    };
    world.broker.send(
        ORDERS,
        (0..250).map(|n| Msg::new(&format!("conflict-{n}")).json(&number(n + 1_000))),
    );
    wait_for(250);
    world.broker.publish(
        "events",
        "orders.new.de",
        (0..250).map(|n| {
            let country = if n % 2 == 0 { "DE" } else { "FR" };
            let body = json!({ "amount": "many", "customer": { "country": country }, "n": n });
            Msg::new(&format!("rejected-{n}"))
                .json(&body)
                .header("tenant", AmqpValue::LongInt(n % 5))
        }),
    );
    wait_for(500);
    world.broker.send(
        ORDERS,
        (0..250).map(|n| Msg::anonymous().json(&json!({ "amount": n, "anonymous": true }))),
    );
    wait_for(750);
    world.broker.send(
        ORDERS,
        (0..250).map(|n| Msg::new(&format!("large-{n}")).body(vec![b'x'; 4_000 + n])),
    );
    wait_for(1_000);
    daemon.stop();
    config
}

#[test]
fn each_filter_picks_exactly_its_own() {
    for kind in KINDS {
        let world = World::new();
        let config = four_reasons(&world, kind);
        let rejected: Vec<String> = numbered_ids("rejected", 250);
        let set = |ids: &[String]| ids.iter().cloned().collect::<BTreeSet<String>>();
        let by = |filters: &[&str]| list(&world, &config, filters).0;
        let all = by(&[]);

        for (reason, prefix) in [
            ("rejected", "rejected"),
            ("id-conflict", "conflict"),
            ("too-large", "large"),
        ] {
            let found = by(&["--reason", reason]);
            assert_eq!(found.len(), 250, "{kind} {reason}");
            assert_eq!(
                ids(&found),
                set(&numbered_ids(prefix, 250)),
                "{kind} {reason}"
            );
        }
        let anonymous = by(&["--reason", "missing-id"]);
        assert_eq!(anonymous.len(), 250);
        assert!(anonymous.iter().all(|line| line["id"].is_null()));
        assert_eq!(
            by(&["--reason", "rejected", "--reason", "missing-id"]).len(),
            500
        );

        let french: Vec<String> = rejected.iter().skip(1).step_by(2).cloned().collect();
        let found = by(&["--where", "/customer/country=FR"]);
        assert_eq!(ids(&found), set(&french));
        let found = by(&["--where", "/customer/country=FR", "--where", "/n=7"]);
        assert_eq!(ids(&found), set(&["rejected-7".to_owned()]));
        assert_eq!(by(&["--where", "/anonymous=true"]).len(), 250);

        assert_eq!(
            ids(&by(&["--routing-key", "orders.new.de"])),
            set(&rejected)
        );
        assert_eq!(ids(&by(&["--routing-key", "orders.*.de"])), set(&rejected));
        assert_eq!(by(&["--routing-key", "orders"]).len(), 750);
        let tenant: Vec<String> = rejected.iter().skip(2).step_by(5).cloned().collect();
        assert_eq!(ids(&by(&["--header", "tenant=2"])), set(&tenant));

        let two = ["rejected-3".to_owned(), "large-9".to_owned()];
        assert_eq!(
            ids(&by(&["--id", "rejected-3", "--id", "large-9"])),
            set(&two)
        );
        let file = world.write("ids.txt", "rejected-3\nlarge-9\n\nnever-was\n");
        let file = file.to_str().unwrap();
        assert_eq!(ids(&by(&["--ids-file", file])), set(&two));
        let name = format!(
            "sha256:{}",
            &anonymous[5]["fingerprint"].as_str().unwrap()[..16]
        );
        let found = by(&["--id", &name]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0]["fingerprint"], anonymous[5]["fingerprint"]);

        let middle = by(&["--reason", "rejected"])[100]["died_at"]
            .as_str()
            .unwrap()
            .to_owned();
        let before = by(&["--until", &middle]).len();
        assert_eq!(before + by(&["--since", &middle]).len(), 1_000);
        assert!(before > 0);
        assert_eq!(by(&["--since", "1h"]).len(), 1_000);
        assert_eq!(by(&["--until", "1h"]).len(), 0);
        assert_eq!(
            by(&["--reason", "rejected", "--routing-key", "orders"]).len(),
            0
        );

        // Workers die letters in an order of their own: that is the queue's.
        let prints = |lines: &[Value]| -> Vec<Value> {
            let prints = lines.iter().map(|line| line["fingerprint"].clone());
            prints.collect()
        };
        assert_eq!(
            prints(&by(&[])),
            prints(&all),
            "{kind}: after all these looks"
        );
    }
}

#[test]
fn groups_count_what_letters_have_in_common() {
    let world = World::new();
    let config = four_reasons(&world, "quorum");
    let (groups, summary) = list(&world, &config, &["--group-by", "reason"]);
    let counts: BTreeSet<(String, u64)> = groups
        .iter()
        .map(|group| {
            let name = group["name"].as_str().unwrap().to_owned();
            (name, group["letters"].as_u64().unwrap())
        })
        .collect();
    let expected = ["id-conflict", "missing-id", "rejected", "too-large"];
    assert_eq!(counts, expected.map(|name| (name.to_owned(), 250)).into());
    assert_eq!(summary["depth"], 1_000);
    assert_eq!(
        (&summary["read"], &summary["meant"]),
        (&json!(1_000), &json!(1_000))
    );

    let (groups, _) = list(&world, &config, &["--group-by", "routing-key"]);
    let sizes: Vec<_> = groups.iter().map(|g| (&g["name"], &g["letters"])).collect();
    assert_eq!(
        sizes,
        [
            (&json!("orders"), &json!(750)),
            (&json!("orders.new.de"), &json!(250))
        ]
    );

    let table = said(
        &desk(&world, &config, &["list", ORDERS, "--group-by", "error"]),
        0,
    );
    assert!(table.starts_with("LETTERS"), "{table}");
    assert!(
        table.contains("22P02 invalid input syntax for type integer"),
        "{table}"
    );
}

#[test]
fn a_letter_shows_what_it_carries_and_its_timeline() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    let body = json!({ "amount": "many", "customer": "Zoë" });
    let headers = |message: Msg| message.header("tenant", AmqpValue::LongInt(7));
    world.broker.publish(
        "events",
        "orders.new",
        [
            headers(Msg::new("bad").json(&body)),
            headers(Msg::new("bad").json(&json!({"amount": "x"}))),
        ],
    );
    world.drain(&config, ORDERS);
    crate::common::eventually("two letters", || world.broker.ready(ORDERS_DEAD) == 2);

    let shown = said(&desk(&world, &config, &["show", ORDERS, "bad"]), 0);
    for part in [
        "letter            bad",
        "reason            rejected",
        "permanent, 22P02",
        "exchange          \"events\"",
        "routing key       \"orders.new\"",
        "tenant: 7 (int32)",
        "\"customer\": \"Zoë\"",
        "\"amount\": \"x\"",
        "timeline",
        "attempt 1 failed",
    ] {
        assert!(shown.contains(part), "{part:?} is not in:\n{shown}");
    }
    assert_eq!(shown.matches("timeline").count(), 1, "{shown}");
    let cut = said(
        &desk(&world, &config, &["show", ORDERS, "bad", "--body-max", "5"]),
        0,
    );
    assert!(cut.contains("cut here") && !cut.contains("Zoë"), "{cut}");

    let lines = said(
        &desk(&world, &config, &["show", ORDERS, "bad", "--json"]),
        0,
    );
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(first["letter"]["body"], body.to_string());
    assert_eq!(first["timeline"]["consumers"][0]["state"], "dead-lettered");

    let nothing = desk(&world, &config, &["show", ORDERS, "never-was"]);
    assert_status(&nothing, 1);
    assert!(text(&nothing.stderr).contains("ackonce why"));
    assert_eq!(world.broker.ready(ORDERS_DEAD), 2);
}

#[test]
fn a_letter_of_which_the_journal_knows_nothing_is_told_by_its_headers() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    world.broker.send(ORDERS_DEAD, [Msg::new("strange")]);
    let orders = Msg::new("limit").json(&json!({ "amount": "x" }));
    world.broker.send(ORDERS, [orders]);
    world.drain(&config, ORDERS);
    crate::common::eventually("two letters", || world.broker.ready(ORDERS_DEAD) == 2);
    world.db.execute("delete from ackonce.failure");

    let (lines, _) = list(&world, &config, &[]);
    assert_eq!(lines[0]["reason"], "unknown");
    assert!(lines[0]["died_at"].is_null());
    assert_eq!(lines[1]["reason"], "rejected");
    assert_eq!(lines[1]["routing_key"], ORDERS);
    assert!(lines[1]["died_at"].is_string(), "{}", lines[1]);
    let output = desk(
        &world,
        &config,
        &["list", ORDERS, "--json", "--since", "1h"],
    );
    let (lines, _) = json_lines(&output);
    assert_eq!(ids(&lines), BTreeSet::from(["limit".to_owned()]));
    assert!(text(&output.stderr).contains("not known when they died"));
}

#[test]
fn what_was_asked_wrongly_is_refused_with_the_way_out() {
    let world = World::new();
    let config = config(&world, "quorum");
    let hints = |arguments: &[&str], status: i32, parts: &[&str]| {
        let output = desk(&world, &config, arguments);
        assert_status(&output, status);
        let said = text(&output.stderr);
        for part in parts {
            assert!(said.contains(part), "{part:?} is not in:\n{said}");
        }
    };
    hints(&["list", "nobody"], 2, &["no consumer nobody", "orders"]);
    hints(
        &["list", ORDERS, "--reason", "rejcted"],
        2,
        &["--reason", "max-attempts"],
    );
    hints(
        &["list", ORDERS, "--since", "yesterday"],
        2,
        &["--since", "2026-05-04"],
    );
    hints(
        &["list", ORDERS, "--where", "a=b"],
        2,
        &["--where", "/customer/country=DE"],
    );
    hints(
        &["list", ORDERS, "--ids-file", "/no/such/file"],
        2,
        &["--ids-file", "/no/such/file"],
    );
    hints(&["list", ORDERS], 78, &["ackonce migrate"]);
    world.prepare(&config);
    world.management.delete_queue(world.name(), ORDERS_DEAD);
    hints(&["list", ORDERS], 78, &[ORDERS_DEAD, "dead_letter_queue"]);
}

/// The most that the process had resident, in bytes, and what it printed.
fn run_watched(arguments: &[&str]) -> (u64, Output) {
    let child = std::process::Command::new(env!("CARGO_BIN_EXE_ackonce"))
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let watch = std::thread::spawn(move || {
        let mut most = 0;
        // The process is a zombie, without such a line, before it is waited for.
        while let Ok(text) = std::fs::read_to_string(&status) {
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let Some(line) = line else { break };
            let kib = line.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            most = most.max(kib * 1024);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        most
    });
    let output = child.wait_with_output().unwrap();
    (watch.join().unwrap(), output)
}

#[test]
fn a_hundred_thousand_letters_are_grouped_in_bounded_memory_with_progress() {
    const LETTERS: usize = 100_000;
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    let pad = "x".repeat(1_000);
    let letter = |n: usize| Msg::new(&format!("letter-{n}")).body(format!("letter-{n}-{pad}"));
    world.broker.send(ORDERS_DEAD, (0..LETTERS).map(letter));
    world.db.execute(&format!(
        "insert into ackonce.consumer (name) values ('orders') on conflict do nothing; \
         insert into ackonce.failure (consumer_id, attempt, message_id, fingerprint, reason, \
         class, error, handler, host, exchange, routing_key) \
         select consumer.id, 1, 'letter-' || n, \
         sha256(convert_to('letter-' || n || '-{pad}', 'UTF8')), \
         (array['rejected', 'max-attempts', 'crash-loop', 'too-large'])[n % 4 + 1], \
         'permanent', 'broken', 'sql', 'host', '', 'orders' \
         from generate_series(0, {} - 1) as n, ackonce.consumer",
        LETTERS
    ));
    crate::common::eventually("the letters", || {
        world.broker.ready(ORDERS_DEAD) as usize == LETTERS
    });
    let path = world.write("config.toml", &config.text());
    let path = path.to_str().unwrap();
    let arguments = [
        "dead",
        "list",
        ORDERS,
        "--group-by",
        "reason",
        "--json",
        "--config",
        path,
    ];
    let (resident, output) = run_watched(&arguments);
    let (groups, summary) = json_lines(&output);
    assert_eq!(groups.len(), 4);
    for group in &groups {
        assert_eq!(group["letters"], LETTERS / 4, "{group}");
    }
    assert_eq!(summary["read"], LETTERS);
    let progress = text(&output.stderr);
    assert!(
        progress.matches("of 100000 letters read").count() >= 10,
        "{progress}"
    );
    // The letters alone are 100 MB.
    println!("resident at most: {} KiB", resident / 1024);
    assert!(
        resident > 0 && resident < 64 << 20,
        "{resident} bytes resident"
    );
    crate::common::eventually("all are back", || {
        world.broker.ready(ORDERS_DEAD) as usize == LETTERS
    });
    let first = world
        .broker
        .channel()
        .basic_get(ORDERS_DEAD, true)
        .unwrap()
        .unwrap();
    assert_eq!(
        first.delivery.properties.message_id().as_deref(),
        Some("letter-0")
    );
}
