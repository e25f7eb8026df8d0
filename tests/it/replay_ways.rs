//! Where a replay sends letters, where it cannot, and that the plan knows.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeMap;

use amiquip::{AmqpValue, ExchangeDeclareOptions, ExchangeType};
use serde_json::{Value, json};

use crate::common::letters::{judged, kill_messages, mend, wait_for_letters};
use crate::common::{Config, Ended, Msg, ORDERS, ORDERS_DEAD, Tool, World, numbered};

fn replay(world: &World, config: &Config, arguments: &[&str]) -> Ended {
    Tool::new(world, config, &[&["replay", ORDERS], arguments].concat()).run()
}

fn summary(ended: &Ended) -> Value {
    ended.json().pop().expect("a summary")["summary"].clone()
}

/// Of each id what a plan says would be done; of letters without an id, too.
fn would(world: &World, config: &Config, arguments: &[&str]) -> BTreeMap<String, String> {
    let all = [&["--plan", "--json"], arguments].concat();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let lines = replay(world, config, &all).expect(0).json();
    let letters = lines.iter().filter(|line| line.get("summary").is_none());
    letters
        .map(|line| (text(&line["id"]), text(&line["would"])))
        .collect()
}

/// A user of one test's own, removed at its end.
struct User<'w> {
    world: &'w World,
    name: String,
}

impl<'w> User<'w> {
    /// It may write to exchanges whose names match `writes`.
    fn new(world: &'w World, writes: &str) -> Self {
        let name = format!("user_{}", world.name());
        world.management.create_user(&name, "secret", world.name());
        let path = format!("/api/permissions/{}/{name}", world.name());
        let permitted = json!({ "configure": ".*", "write": writes, "read": ".*" });
        world.management.put(&path, &permitted);
        Self { world, name }
    }

    fn config(&self, config: &Config) -> Config {
        let mut url = url::Url::parse(self.world.amqp_url()).unwrap();
        url.set_username(&self.name).unwrap();
        url.set_password(Some("secret")).unwrap();
        config.clone().set("broker.url", url.as_str())
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        let path = format!("/api/users/{}", self.name);
        self.world.management.delete(&path);
    }
}

#[test]
fn an_exchange_that_the_user_may_not_write_to_is_named_and_the_letters_stay() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 3);
    let options = ExchangeDeclareOptions::default();
    let channel = world.broker.channel();
    channel
        .exchange_declare(ExchangeType::Fanout, "shop", options)
        .unwrap();
    let user = User::new(&world, "^orders.*$");
    let limited = user.config(&config);
    for (way, named) in [(&["--to", "shop/k"][..], "shop"), (&[], "amq.default")] {
        let arguments = [&["--yes", "--json"], way].concat();
        let ended = replay(&world, &limited, &arguments).expect(77);
        let report = summary(&ended);
        ended.says(&[named, &user.name, "permit"]);
        assert_eq!(
            (&report["replayed"], &report["unconfirmed"]),
            (&0.into(), &0.into()),
            "{report}"
        );
        wait_for_letters(&world, 3);
    }
}

#[test]
fn a_letter_without_an_origin_or_from_the_dead_letter_queue_itself_is_not_sent_to_it() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 1);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let young = |id: &str| Msg::new(id).properties(|p| p.with_timestamp(now.as_secs()));
    let text = |text: &str| AmqpValue::LongString(text.to_owned());
    let circle = young("circle")
        .header("ackonce-exchange", text(""))
        .header("ackonce-routing-key", text(ORDERS_DEAD));
    world.broker.send(ORDERS_DEAD, [young("by-hand"), circle]);
    wait_for_letters(&world, 3);
    let planned = would(&world, &config, &["--to-origin"]);
    for (id, expected) in [("m-0", "replay"), ("by-hand", "leave"), ("circle", "leave")] {
        assert_eq!(planned[id], expected, "{id}");
    }
    replay(&world, &config, &["--plan", "--to-origin"])
        .expect(0)
        .says(&["2 of them would be left", "--to-queue"]);
    let ended = replay(&world, &config, &["--yes", "--json", "--to-origin"]).expect(1);
    let report = summary(&ended);
    assert_eq!(report["replayed"], 1, "{report}");
    assert_eq!(report["hindered"]["no-origin"], 2, "{report}");
    assert_eq!(world.broker.ready(ORDERS_DEAD), 2);
    assert_eq!(world.broker.ready(ORDERS), 1);
    replay(&world, &config, &["--yes"]).expect(0);
    assert_eq!(world.broker.ready(ORDERS), 3);
}

#[test]
fn the_plan_heeds_the_options() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("m", 3));
    world.broker.send(ORDERS, [Msg::anonymous().body("x")]);
    wait_for_letters(&world, 4);
    daemon.stop();
    mend(&world);
    // One of them is applied since, in a copy.
    world.broker.send(ORDERS, [Msg::new("m-1")]);
    world.drain(&config, ORDERS);
    world.db.execute(
        "update ackonce.failure set failed_at = failed_at - interval '31 days' \
         where message_id = 'm-2'",
    );
    for (options, expected) in [
        (&[][..], ["leave", "replay", "acknowledge", "leave"]),
        (
            &["--beyond-retention"],
            ["leave", "replay", "acknowledge", "replay"],
        ),
        (
            &["--to", "/bench"],
            ["replay", "replay", "acknowledge", "leave"],
        ),
    ] {
        let planned = would(&world, &config, options);
        let found: Vec<_> = planned.values().map(String::as_str).collect();
        assert_eq!(found, expected, "{options:?}: {planned:?}");
    }
    let limited = ["--beyond-retention", "--limit", "1"];
    let planned = would(&world, &config, &limited);
    let runs = planned.values().filter(|would| *would == "replay");
    assert_eq!(runs.count(), 1, "{planned:?}");
    let force = ["--force-reprocess", "m-1", "--because", "x"];
    assert_eq!(would(&world, &config, &force)["m-1"], "reprocess");
    let table = replay(&world, &config, &[&["--plan"][..], &force].concat());
    let table = table.expect(0).out;
    let row = table.lines().find(|line| line.contains("already-applied"));
    assert!(row.unwrap().contains("AGAIN"), "{table}");
    replay(&world, &config, &["--plan", "--to", "/orders.dead"]).expect(2);
    // A plan moves nothing, whatever the options.
    assert_eq!(world.db.ledger(ORDERS), ["m-1"]);
    assert_eq!(world.broker.ready(ORDERS_DEAD), 4);
}
