//! `dead drop` and `dead import` for machines: a line of JSON for each letter,
//! and a summary that adds up.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;

use amiquip::{AmqpValue, FieldTable, QueueDeclareOptions};
use serde_json::{Value, json};

use crate::common::{
    Config, Consumer, Ended, Msg, ORDERS, ORDERS_DEAD, RECORD_AMOUNT, Tool, World, eventually,
    numbered,
};

fn config(world: &World) -> Config {
    let orders = Consumer::orders().sql(RECORD_AMOUNT);
    world.config().consumer(orders)
}

fn dead(world: &World, config: &Config, arguments: &[&str]) -> Ended {
    let (command, rest) = arguments.split_first().unwrap();
    let all = [&["dead", command, ORDERS], rest].concat();
    Tool::new(world, config, &all).run()
}

/// Lines without the summary, and the summary.
fn lines(ended: &Ended) -> (Vec<Value>, Value) {
    let mut lines = ended.json();
    let summary = lines.pop().expect("a summary")["summary"].take();
    assert!(lines.iter().all(|line| line.get("summary").is_none()));
    (lines, summary)
}

/// The values of `member` in `lines`.
fn column(lines: &[Value], member: &str) -> Vec<Value> {
    lines.iter().map(|line| line[member].clone()).collect()
}

/// Letters `letter-0`, `letter-1`, …, every third of the tenant 1.
fn send_letters(world: &World, count: usize) {
    let letter = |n: usize| {
        let tenant = AmqpValue::LongInt((n % 3) as i32);
        Msg::new(&format!("letter-{n}")).header("tenant", tenant)
    };
    world.broker.send(ORDERS_DEAD, (0..count).map(letter));
}

#[test]
fn a_drop_prints_every_letter_that_is_gone_once_and_a_summary() {
    let world = World::new();
    let config = config(&world);
    world.prepare(&config);
    send_letters(&world, 900);
    let expected: Vec<Value> = (0..900)
        .filter(|n| n % 3 == 1)
        .map(|n| json!(format!("letter-{n}")))
        .collect();
    let path = world.path("dropped.ndjson");
    let file = path.to_str().unwrap();
    let tenant = ["drop", "--header", "tenant=1", "--json"];

    let dry = dead(&world, &config, &[&tenant[..], &["--dry-run"]].concat()).expect(0);
    let (would, summary) = lines(&dry);
    assert_eq!(column(&would, "id"), expected);
    assert!(would.iter().all(|line| line["would"] == "drop"));
    let looked = json!({
        "consumer": ORDERS, "queue": ORDERS_DEAD, "depth": 900, "read": 900, "meant": 300,
        "dropped": 0, "file": null,
    });
    assert_eq!(summary, looked);
    assert_eq!(world.broker.ready(ORDERS_DEAD), 900);

    // Who cannot be asked has not agreed, and a program sees no line of it.
    let because = [&tenant[..], &["--export", file, "--because", "a test"]].concat();
    let unasked = dead(&world, &config, &because).expect(2);
    assert_eq!(unasked.out, "");
    assert_eq!(world.broker.ready(ORDERS_DEAD), 900);

    let done = dead(&world, &config, &[&because[..], &["--yes"]].concat()).expect(0);
    let (gone, summary) = lines(&done);
    assert_eq!(column(&gone, "id"), expected);
    assert!(gone.iter().all(|line| line["action"] == "dropped"));
    assert!(gone.iter().all(|line| line["reason"] == "unknown"));
    let dropped = json!({
        "consumer": ORDERS, "queue": ORDERS_DEAD, "depth": 900, "read": 900, "meant": 300,
        "dropped": 300, "file": file,
    });
    assert_eq!(summary, dropped);
    let text = std::fs::read_to_string(&path).unwrap();
    let exported: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].take())
        .collect();
    assert_eq!(exported, expected);
    assert_eq!(world.broker.ready(ORDERS_DEAD), 600);

    let nothing = ["--no-export", "--because", "a test", "--yes"];
    let again = dead(&world, &config, &[&tenant[..], &nothing].concat()).expect(0);
    let (none, summary) = lines(&again);
    assert_eq!((none.len(), &summary["dropped"]), (0, &json!(0)));
}

#[test]
fn an_import_says_of_every_line_of_its_file_what_became_of_it() {
    let world = World::new();
    let config = config(&world);
    world.prepare(&config);
    let letters = ["a", "a", "b"].map(Msg::new).into_iter();
    world
        .broker
        .send(ORDERS_DEAD, letters.chain([Msg::anonymous()]));
    let path = world.path("letters.ndjson");
    let file = path.to_str().unwrap();
    dead(&world, &config, &["export", "--output", file]).expect(0);
    world.broker.take(ORDERS_DEAD);
    world.broker.send(ORDERS_DEAD, [Msg::new("a")]);
    let numbers: Vec<Value> = (1..=4).map(Value::from).collect();
    let ids = [json!("a"), json!("a"), json!("b"), Value::Null];

    let dry = dead(&world, &config, &["import", file, "--dry-run", "--json"]).expect(0);
    let (would, summary) = lines(&dry);
    assert_eq!(column(&would, "line"), numbers);
    assert_eq!(column(&would, "id"), ids);
    let fates = ["pass-over", "import", "import", "import"];
    assert_eq!(column(&would, "would"), fates);
    let counted = |imported: u64| {
        json!({
            "consumer": ORDERS, "queue": ORDERS_DEAD, "letters": 4, "new": 3, "passed_over": 1,
            "imported": imported, "failed": 0,
        })
    };
    assert_eq!(summary, counted(0));
    assert_eq!(world.broker.ready(ORDERS_DEAD), 1);

    let done = dead(&world, &config, &["import", file, "--yes", "--json"]).expect(0);
    let (mut fates, summary) = lines(&done);
    // They are told as the broker confirms them.
    fates.sort_by_key(|line| line["line"].as_u64());
    assert_eq!(column(&fates, "line"), numbers);
    assert_eq!(column(&fates, "id"), ids);
    let expected = ["passed-over", "imported", "imported", "imported"];
    assert_eq!(column(&fates, "action"), expected);
    assert!(fates.iter().all(|line| line["fingerprint"].is_string()));
    assert_eq!(summary, counted(3));
    assert_eq!(world.broker.ready(ORDERS_DEAD), 4);

    let again = dead(&world, &config, &["import", file, "--json"]).expect(0);
    let (fates, summary) = lines(&again);
    assert_eq!(column(&fates, "action"), ["passed-over"; 4]);
    assert_eq!(
        (&summary["new"], &summary["imported"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(world.broker.ready(ORDERS_DEAD), 4);
}

#[test]
fn an_import_into_a_full_queue_names_each_line_that_the_broker_refused() {
    let world = World::new();
    let config = config(&world);
    world.prepare(&config);
    world.broker.send(ORDERS_DEAD, numbered("m", 20));
    let path = world.path("letters.ndjson");
    let file = path.to_str().unwrap();
    dead(&world, &config, &["export", "--output", file]).expect(0);
    world.management.delete_queue(world.name(), ORDERS_DEAD);
    let text = |text: &str| AmqpValue::LongString(text.to_owned());
    let arguments = FieldTable::from([
        ("x-max-length".to_owned(), AmqpValue::LongInt(5)),
        ("x-overflow".to_owned(), text("reject-publish")),
    ]);
    let options = QueueDeclareOptions {
        durable: true,
        arguments,
        ..QueueDeclareOptions::default()
    };
    let channel = world.broker.channel();
    channel.queue_declare(ORDERS_DEAD, options).unwrap();

    let partly = dead(&world, &config, &["import", file, "--yes", "--json"]).expect(1);
    let (fates, summary) = lines(&partly);
    let numbers: BTreeSet<u64> = column(&fates, "line")
        .iter()
        .map(|line| line.as_u64().unwrap())
        .collect();
    assert_eq!((fates.len(), numbers), (20, (1..=20).collect()));
    let of = |action: &str| {
        let chosen = fates.iter().filter(move |line| line["action"] == action);
        chosen.cloned().collect::<Vec<Value>>()
    };
    let (imported, failed) = (of("imported"), of("failed"));
    assert_eq!(summary["imported"], imported.len());
    assert_eq!(summary["failed"], failed.len());
    assert_eq!(world.broker.ready(ORDERS_DEAD) as usize, imported.len());
    assert!(!failed.is_empty() && imported.len() + failed.len() == 20);
    for line in failed {
        let why = line["why"].as_str().unwrap();
        assert!(why.contains("is the queue full?"), "{line}");
    }
    assert!(imported.iter().all(|line| line.get("why").is_none()));
}

#[test]
fn one_that_ends_before_its_end_says_how_far_it_came() {
    let world = World::new();
    let config = config(&world);
    world.prepare(&config);
    send_letters(&world, 900);
    let path = world.path("letters.ndjson");
    let file = path.to_str().unwrap();
    dead(&world, &config, &["export", "--output", file]).expect(0);
    // Whoever has written 300 letters down can write no more.
    world.db.execute(
        "create function no_more() returns trigger language plpgsql as $$ begin \
         if (select count(*) from ackonce.desk_letter) > 300 then raise 'no more'; end if; \
         return null; end $$; \
         create trigger no_more after insert on ackonce.desk_letter \
         for each statement execute function no_more()",
    );
    let all = ["drop", "--all", "--no-export", "--because", "x", "--yes"];
    let cut = dead(&world, &config, &[&all[..], &["--json"]].concat()).says(&["no more"]);
    assert_ne!(cut.code, Some(0));
    let (gone, summary) = lines(&cut);
    assert!(!gone.is_empty() && gone.len() <= 300, "{summary}");
    assert_eq!(summary["dropped"], gone.len());
    let expected: Vec<Value> = (0..gone.len())
        .map(|n| json!(format!("letter-{n}")))
        .collect();
    assert_eq!(column(&gone, "id"), expected);
    eventually("the others are back", || {
        world.broker.ready(ORDERS_DEAD) as usize == 900 - gone.len()
    });

    world.broker.take(ORDERS_DEAD);
    world.db.execute("delete from ackonce.desk_letter");
    let cut = dead(&world, &config, &["import", file, "--yes", "--json"]).says(&["no more"]);
    assert_ne!(cut.code, Some(0));
    let (fates, summary) = lines(&cut);
    assert!(!fates.is_empty() && fates.len() <= 300, "{summary}");
    assert!(fates.iter().all(|line| line["action"] == "imported"));
    let counts = ["letters", "new", "imported", "failed"].map(|name| summary[name].clone());
    assert_eq!(
        counts,
        [json!(900), json!(900), json!(fates.len()), json!(0)]
    );
    assert_eq!(world.broker.ready(ORDERS_DEAD) as usize, fates.len());
}
