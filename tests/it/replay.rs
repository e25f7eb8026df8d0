//! Replaying dead letters: each is applied once, whatever ends a replay, and
//! none is lost.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;
use std::time::Duration;

use amiquip::{AmqpProperties, AmqpValue, ExchangeDeclareOptions, ExchangeType, FieldTable};
use nix::sys::signal::Signal;

use crate::common::letters::{header, judged, kill_messages, mend, wait_for_letters};
use crate::common::{
    Config, Consumer, Ended, Msg, ORDERS, ORDERS_DEAD, Proxy, Tool, World, eventually, numbered,
    numbered_ids, random,
};

fn replay(world: &World, config: &Config, arguments: &[&str]) -> Ended {
    tool(world, config, arguments).run()
}

fn tool(world: &World, config: &Config, arguments: &[&str]) -> Tool {
    let all = [&["replay", ORDERS], arguments].concat();
    Tool::new(world, config, &all)
}

/// The summary of a replay with `--json`.
fn summary(ended: &Ended) -> serde_json::Value {
    ended.json().pop().expect("a summary")["summary"].clone()
}

/// Letters that are ready.
fn letters_left(world: &World) -> usize {
    world.broker.ready(ORDERS_DEAD) as usize
}

/// Waits until the letters of a replay that was killed are back, with a daemon
/// at work: what is not there has been published, and so is applied.
fn wait_for_the_rest(world: &World, count: i64) {
    eventually("the letters are back", || {
        let applied = world
            .db
            .count("select count(distinct message_id) from effect");
        letters_left(world) as i64 >= count - applied
    });
}

/// Replays until there is nothing left to do, with a daemon at work: what was
/// confirmed and not acknowledged may come back late.
fn replay_to_the_end(world: &World, config: &Config, count: i64) {
    eventually("nothing is left to do", || {
        let report = summary(&replay(world, config, &["--yes", "--json"]).expect(0));
        report["depth"] == 0 && world.db.effect_count() >= count
    });
}

/// A thousand letters, the cause mended, all replayed; then once more.
fn a_thousand(queue_type: &str, dead_letters: &str) {
    let world = World::new();
    let config = judged(&world, queue_type, dead_letters);
    kill_messages(&world, &config, 1_000);
    mend(&world);
    let daemon = world.run(&config);
    let first = replay(&world, &config, &["--yes", "--json"]).expect(0);
    let report = summary(&first);
    assert_eq!(report["depth"], 1_000, "{report}");
    assert_eq!(report["replayed"], 1_000, "{report}");
    assert_eq!(first.json().len(), 1_001, "a line for each and the summary");
    world.wait_for_effects(1_000);
    // A quorum queue may show again what was acknowledged last: that is only
    // acknowledged once more.
    replay_to_the_end(&world, &config, 1_000);
    daemon.stop();
    assert!(world.broker.is_empty(ORDERS) && world.broker.is_empty(ORDERS_DEAD));
    world.assert_each_applied_once(&numbered_ids("m", 1_000));
}

#[test]
fn a_thousand_rejected_letters_of_a_quorum_queue_are_each_applied_once() {
    a_thousand("quorum", "reject");
}

#[test]
fn a_thousand_published_letters_of_a_classic_queue_are_each_applied_once() {
    a_thousand("classic", "publish");
}

#[test]
fn published_letters_of_a_quorum_queue_are_each_applied_once() {
    let world = World::new();
    let config = judged(&world, "quorum", "publish");
    kill_messages(&world, &config, 50);
    mend(&world);
    replay(&world, &config, &["--yes"]).expect(0);
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 50));
}

/// Twenty replays of a thousand letters, each killed somewhere, and one that is
/// left alone: with a daemon at work all the while.
fn killed_twenty_times(queue_type: &str, dead_letters: &str) {
    let world = World::new();
    let config = judged(&world, queue_type, dead_letters);
    kill_messages(&world, &config, 1_000);
    mend(&world);
    let daemon = world.run(&config);
    let steps = [
        "ReplayTaken",
        "ReplaySent",
        "ReplayConfirmed",
        "ReplayAcked",
    ];
    for round in 0..20 {
        // Anywhere among the next hundred letters; of those taken, any chunk.
        let hit = match steps[round % 4] {
            "ReplayTaken" => 1 + round / 8,
            _ => 1 + random() as usize % 60,
        };
        tool(&world, &config, &["--yes"])
            .dies_at(steps[round % 4], hit)
            .run()
            .expect_killed();
        wait_for_the_rest(&world, 1_000);
        let left = letters_left(&world);
        assert!(left > 0, "killed before its end in round {round}");
    }
    let last = replay(&world, &config, &["--yes", "--json"]).expect(0);
    let report = summary(&last);
    assert!(report["replayed"].as_u64() > Some(0), "{report}");
    replay_to_the_end(&world, &config, 1_000);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 1_000));
}

#[test]
fn a_replay_of_a_quorum_queue_killed_twenty_times_loses_none_and_applies_none_twice() {
    killed_twenty_times("quorum", "reject");
}

#[test]
fn a_replay_of_a_classic_queue_killed_twenty_times_loses_none_and_applies_none_twice() {
    killed_twenty_times("classic", "publish");
}

#[test]
fn what_is_in_both_queues_after_a_crash_is_only_acknowledged_by_the_next_replay() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 10);
    mend(&world);
    tool(&world, &config, &["--yes"])
        .dies_at("ReplayConfirmed", 1)
        .run()
        .expect_killed();
    // Not one was acknowledged.
    wait_for_letters(&world, 10);
    assert!(
        world.broker.ready(ORDERS) >= 1,
        "one was published at least"
    );
    world.drain(&config, ORDERS);
    let applied = world.db.effect_count();
    assert!((1..=10).contains(&applied));
    let report = summary(&replay(&world, &config, &["--yes", "--json"]).expect(0));
    assert_eq!(report["acknowledged"], applied, "{report}");
    assert_eq!(report["replayed"], 10 - applied, "{report}");
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 10));
}

#[test]
fn what_fails_again_is_not_taken_again_by_the_same_replay() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 300);
    // The cause is not mended: with a daemon at work all of them come back.
    let daemon = world.run(&config);
    let report =
        summary(&replay(&world, &config, &["--yes", "--json", "--rate", "200/s"]).expect(0));
    assert_eq!(report["depth"], 300, "{report}");
    assert_eq!(report["replayed"], 300, "{report}");
    wait_for_letters(&world, 300);
    daemon.stop();
    let letters = world.broker.dead(ORDERS_DEAD);
    let replays: BTreeSet<_> = letters
        .iter()
        .map(|l| header(l, "ackonce-replays"))
        .collect();
    assert_eq!(replays, BTreeSet::from([Some("1".to_owned())]), "each once");
    assert_eq!(world.db.effect_count(), 0);
}

#[test]
fn a_replayed_message_has_all_its_attempts_again_and_its_handler_sees_what_it_saw_at_first() {
    let world = World::new();
    world.db.execute(
        "create table seen (message_id text, exchange text, routing_key text, headers jsonb, \
         attempt int)",
    );
    world.db.execute(
        "create sequence tries; create function tried() returns text language plpgsql as $$ begin \
         if nextval('tries') <= 5 then raise exception 'not yet' using errcode = '23503'; end if; \
         return ''; end $$",
    );
    for (queue_type, dead_letters) in [("quorum", "reject"), ("classic", "publish")] {
        world
            .db
            .execute("truncate seen; alter sequence tries restart");
        let name = format!("c-{queue_type}");
        let consumer = Consumer::new(&name)
            .set("topology.queue_type", queue_type)
            .set("topology.dead_letters", dead_letters)
            .max_attempts(3)
            .backoff(&["10ms"])
            .bind("shop", "topic", "order.*")
            .sql(
                "insert into seen select message_id || tried(), exchange, routing_key, headers, \
                 attempt from message",
            );
        let config = world.config().consumer(consumer);
        let daemon = world.run(&config);
        let message = Msg::new("one")
            .header("mine", AmqpValue::ShortInt(7))
            .header(
                "CC",
                AmqpValue::FieldArray(vec![AmqpValue::LongString("order.cc".into())]),
            )
            .properties(|p: AmqpProperties| {
                p.with_type_("t".to_owned())
                    .with_user_id("guest".to_owned())
            });
        world.broker.publish("shop", "order.new", [message]);
        let dead = format!("{name}.dead");
        eventually("it is dead", || world.broker.ready(&dead) == 1);
        Tool::new(&world, &config, &["replay", &name, "--yes"])
            .run()
            .expect(0);
        eventually("it is applied", || {
            world.db.count("select count(*) from seen") == 1
        });
        daemon.stop();
        let row = world.db.texts(
            "select concat_ws('|', message_id, exchange, routing_key, attempt, headers) from seen",
        );
        // Three attempts, dead; two more that fail, and the third succeeds.
        let headers = r#"{"CC": ["order.cc"], "mine": 7}"#;
        assert_eq!(
            row,
            [format!("one|shop|order.new|3|{headers}")],
            "{queue_type}"
        );
        assert!(world.broker.is_empty(&dead));
    }
}

#[test]
fn a_letter_keeps_its_properties_and_loses_what_daemon_and_broker_wrote_on_it() {
    let world = World::new();
    let config = judged(&world, "quorum", "publish");
    let daemon = world.run(&config);
    let message = Msg::new("m-1")
        .header("u8", AmqpValue::ShortShortUInt(8))
        .header("list", AmqpValue::FieldArray(vec![AmqpValue::Void]))
        .properties(|p: AmqpProperties| {
            p.with_content_type("application/json".to_owned())
                .with_priority(3)
                .with_correlation_id("c".to_owned())
                .with_timestamp(1_900_000_000)
        });
    world.broker.send(ORDERS, [message]);
    wait_for_letters(&world, 1);
    daemon.stop();
    for (time, count) in [("first", "1"), ("second", "2")] {
        replay(&world, &config, &["--yes"]).expect(0);
        let sent = world.broker.take(ORDERS).remove(0);
        assert_eq!(
            header(&sent, "ackonce-replays").as_deref(),
            Some(count),
            "{time}"
        );
        let names = sent.properties.headers().clone().unwrap().into_keys();
        // The queue's own, since the test has taken it out.
        let names: BTreeSet<String> = names.filter(|name| name != "x-delivery-count").collect();
        let expected = [
            "ackonce-exchange",
            "ackonce-replay",
            "ackonce-replayed-at",
            "ackonce-replays",
            "ackonce-routing-key",
            "ackonce-signature",
            "list",
            "u8",
        ];
        assert_eq!(names, expected.map(str::to_owned).into());
        let p = &sent.properties;
        assert_eq!(p.content_type().as_deref(), Some("application/json"));
        assert_eq!((*p.priority(), *p.delivery_mode()), (Some(3), Some(2)));
        assert_eq!(p.correlation_id().as_deref(), Some("c"));
        assert_eq!(*p.timestamp(), Some(1_900_000_000));
        assert_eq!(sent.body, br#"{"id":"m-1"}"#);
        if time == "first" {
            let again = Msg::new("m-1").properties(|_| sent.properties.clone());
            let again = sent
                .properties
                .headers()
                .clone()
                .unwrap()
                .into_iter()
                .fold(again, |message, (name, value)| message.header(&name, value));
            let daemon = world.run(&config);
            world.broker.send(ORDERS, [again]);
            wait_for_letters(&world, 1);
            daemon.stop();
        }
    }
}

#[test]
fn a_second_replay_of_the_same_consumer_is_refused_until_the_first_has_ended() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 5);
    mend(&world);
    let gate = world.gate();
    let first = tool(&world, &config, &["--yes"])
        .pauses_at("ReplaySent", 1, &gate)
        .start();
    gate.wait_until_hit();
    replay(&world, &config, &["--yes"])
        .expect(75)
        .says(&["orders"]);
    gate.open();
    first.wait().expect(0);
    replay(&world, &config, &["--yes"]).expect(0);
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 5));
}

#[test]
fn an_interrupted_replay_leaves_the_rest_and_the_next_one_goes_on() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 200);
    mend(&world);
    let mut slow = tool(&world, &config, &["--yes", "--json", "--rate", "20/s"]).start();
    eventually("some are replayed", || {
        assert!(slow.is_running());
        world.broker.ready(ORDERS) > 3
    });
    slow.signal(Signal::SIGINT);
    let report = summary(&slow.wait().expect(1));
    let done = report["replayed"].as_u64().unwrap();
    assert!((4..200).contains(&done), "{report}");
    assert_eq!(report["unconfirmed"], 0, "{report}");
    assert_eq!(letters_left(&world) as u64, 200 - done);
    assert_eq!(u64::from(world.broker.ready(ORDERS)), done);
    replay(&world, &config, &["--yes"]).expect(0);
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 200));
}

#[test]
fn a_broker_that_goes_away_midway_costs_nothing() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 300);
    mend(&world);
    let proxy = Proxy::before(world.amqp_url(), 5672);
    let through = config.clone().set("broker.url", proxy.url());
    let daemon = world.run(&config);
    for _ in 0..3 {
        let before = letters_left(&world);
        let mut slow = tool(&world, &through, &["--yes", "--rate", "100/s"]).start();
        eventually("it is under way", || {
            assert!(slow.is_running());
            (world.broker.ready(ORDERS_DEAD) as usize) < before && world.db.effect_count() > 0
        });
        std::thread::sleep(Duration::from_millis(300));
        proxy.go_down();
        slow.wait().expect(69);
        proxy.come_up();
        wait_for_the_rest(&world, 300);
        assert!(letters_left(&world) > 0);
    }
    replay_to_the_end(&world, &config, 300);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 300));
}

#[test]
fn a_letter_whose_origin_is_gone_stays_and_another_way_is_named() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    let consumer_bound = config.clone();
    kill_messages(&world, &consumer_bound, 2);
    mend(&world);
    let channel = world.broker.channel();
    let durable = || ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    channel
        .exchange_declare(ExchangeType::Fanout, "shop", durable())
        .unwrap();
    channel
        .queue_bind(ORDERS, "shop", "", FieldTable::new())
        .unwrap();
    world.db.execute("insert into cause values ('again')");
    let daemon = world.run(&config);
    world.broker.publish("shop", "k", numbered("mx", 2));
    wait_for_letters(&world, 4);
    daemon.stop();
    mend(&world);
    channel.exchange_delete("shop", false).unwrap();
    let gone = replay(
        &world,
        &config,
        &["--yes", "--json", "--to-origin", "--any-origin"],
    )
    .expect(1);
    let report = summary(&gone);
    assert_eq!(
        report["replayed"], 2,
        "{report}: those of the default exchange"
    );
    assert_eq!(report["hindered"]["unroutable"], 2, "{report}");
    gone.says(&["shop", "--to-queue"]);
    assert_eq!(letters_left(&world), 2);
    // It is there again, and leads nowhere.
    channel
        .exchange_declare(ExchangeType::Fanout, "shop", durable())
        .unwrap();
    let nowhere = replay(
        &world,
        &config,
        &["--yes", "--json", "--to-origin", "--any-origin"],
    )
    .expect(1);
    assert_eq!(summary(&nowhere)["hindered"]["unroutable"], 2);
    assert_eq!(letters_left(&world), 2);
    replay(&world, &config, &["--yes", "--to-queue"]).expect(0);
    world.drain(&config, ORDERS);
    let ids = [numbered_ids("m", 2), numbered_ids("mx", 2)].concat();
    world.assert_each_applied_once(&ids);
}

#[test]
fn by_default_no_other_queue_gets_a_message_again() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    world.prepare(&config);
    let channel = world.broker.channel();
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    channel
        .exchange_declare(ExchangeType::Fanout, "shop", durable)
        .unwrap();
    world.broker.declare("audit");
    for queue in [ORDERS, "audit"] {
        channel
            .queue_bind(queue, "shop", "", FieldTable::new())
            .unwrap();
    }
    let daemon = world.run(&config);
    world.broker.publish("shop", "k", numbered("m", 3));
    wait_for_letters(&world, 3);
    assert_eq!(world.broker.take("audit").len(), 3);
    mend(&world);
    replay(&world, &config, &["--yes", "--limit", "2"]).expect(0);
    world.wait_for_effects(2);
    assert_eq!(world.broker.ready("audit"), 0);
    replay(&world, &config, &["--yes", "--to-origin", "--any-origin"])
        .expect(0)
        .says(&["other queues"]);
    world.wait_for_effects(3);
    assert_eq!(world.broker.take("audit").len(), 1, "it was asked for");
    daemon.stop();
    world.assert_each_applied_once(&numbered_ids("m", 3));
}

#[test]
fn letters_without_a_usable_id_go_only_where_they_are_sent_by_hand() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    let daemon = world.run(&config);
    world
        .broker
        .send(ORDERS, [Msg::anonymous().body("x"), Msg::new("m-0")]);
    wait_for_letters(&world, 2);
    daemon.stop();
    mend(&world);
    let left = replay(&world, &config, &["--yes", "--json"]).expect(1);
    let report = summary(&left);
    assert_eq!(
        (&report["replayed"], &report["left"]["no-id"]),
        (&1.into(), &1.into()),
        "{report}"
    );
    assert_eq!(letters_left(&world), 1);
    world.broker.declare("bench");
    replay(&world, &config, &["--yes", "--to", "/bench"]).expect(0);
    assert_eq!(world.broker.take("bench")[0].body, b"x");
    assert_eq!(letters_left(&world), 0);
}

#[test]
fn a_full_work_queue_refuses_and_the_letter_stays() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 3);
    world.broker.declare("small");
    let channel = world.broker.channel();
    let arguments = FieldTable::from([
        ("x-max-length".to_owned(), AmqpValue::LongLongInt(1)),
        (
            "x-overflow".to_owned(),
            AmqpValue::LongString("reject-publish".to_owned()),
        ),
    ]);
    let options = amiquip::QueueDeclareOptions {
        durable: true,
        arguments,
        ..amiquip::QueueDeclareOptions::default()
    };
    channel.queue_declare("tiny", options).unwrap();
    let ended = replay(&world, &config, &["--yes", "--json", "--to", "/tiny"]).expect(1);
    let report = summary(&ended);
    let refused = report["hindered"]["refused"].as_u64().unwrap();
    let replayed = report["replayed"].as_u64().unwrap();
    assert!(refused >= 1 && refused + replayed == 3, "{report}");
    assert_eq!(letters_left(&world) as u64, refused);
    assert_eq!(u64::from(world.broker.ready("tiny")), replayed);
}

#[test]
fn nothing_moves_without_a_yes_or_with_arguments_that_contradict() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 2);
    replay(&world, &config, &[]).expect(2).says(&["--yes"]);
    for nonsense in [
        &["--yes", "--rate", "0/s"][..],
        &["--yes", "--to", "nowhere"],
        &["--yes", "--to", "a/b", "--to-queue"],
        &["--yes", "--canary", "0"],
        &["--yes", "--abort-at", "5"],
        &["--yes", "--canary", "1", "--abort-at", "101"],
        &["--yes", "--canary", "1", "--to", "a/b"],
        &["--yes", "--limit", "0"],
        &["--yes", "--because", "x"],
        &["--yes", "--force-reprocess", "m-0"],
        &[
            "--yes",
            "--force-reprocess",
            "m-0",
            "--because",
            "x",
            "--limit",
            "1",
        ],
        &["--yes", "--force-reprocess", "m-0", "--because", " "],
    ] {
        replay(&world, &config, nonsense).expect(2);
    }
    let unknown = Tool::new(&world, &config, &["replay", "nobody", "--yes"]).run();
    unknown.expect(2).says(&["nobody", "orders"]);
    assert_eq!(letters_left(&world), 2);
}
