//! The plan of a replay: where each dead letter stands, and that a replay does
//! what it says.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::common::letters::wait_for_letters;
use crate::common::{
    Config, Consumer, Ended, Msg, ORDERS, ORDERS_DEAD, Tool, World, eventually, numbered,
};

/// Letters of each kind.
const EACH: usize = 10;

fn replay(world: &World, config: &Config, arguments: &[&str]) -> Ended {
    Tool::new(world, config, &[&["replay", ORDERS], arguments].concat()).run()
}

/// Ids begin with the name of their fate: a table says which fail, and how.
fn staged(world: &World, queue_type: &str, dead_letters: &str) -> Config {
    world.db.execute(
        "create table fate (pattern text, code text); \
         create function judge(id text) returns text language plpgsql as $$ declare found text; \
         begin select code into found from fate where id like pattern limit 1; if found is not \
         null then raise exception 'by fate' using errcode = found; end if; return id; end $$",
    );
    let consumer = Consumer::orders()
        .set("topology.queue_type", queue_type)
        .set("topology.dead_letters", dead_letters)
        .set("retry.breaker", 0)
        .backoff(&["1h"])
        .sql("insert into effect (message_id, body) select judge(message_id), body from message");
    world.config().consumer(consumer)
}

fn id(kind: &str, number: usize) -> String {
    format!("{kind}-{number}")
}

/// A dead-letter queue with ten letters of every standing, shuffled together.
fn letters_of_every_kind(world: &World, config: &Config) {
    let kinds = ["never", "already", "claimed", "waits", "old", "conflict"];
    world.db.execute(
        "insert into fate select kind || '-%', '22000' \
         from unnest(array['never', 'already', 'claimed', 'waits', 'old']) as kind",
    );
    let daemon = world.run(config);
    // Of the conflicting ones another body is applied first.
    let other = |number| Msg::new(&id("conflict", number)).body("\"another body\"");
    world.broker.send(ORDERS, (0..EACH).map(other));
    world.wait_for_effects(EACH as i64);
    for number in 0..EACH {
        let all = kinds.iter().map(|kind| Msg::new(&id(kind, number)));
        world.broker.send(ORDERS, all);
        world.broker.send(
            ORDERS,
            [Msg::anonymous().body(format!("nameless {number}"))],
        );
    }
    wait_for_letters(world, 7 * EACH);
    // Copies of some are applied meanwhile; copies of others wait for a retry.
    world.db.execute(
        "delete from fate where pattern = 'already-%'; \
         update fate set code = '23503' where pattern = 'waits-%'",
    );
    for kind in ["already", "waits"] {
        world.broker.send(ORDERS, numbered(kind, EACH));
    }
    world.wait_for_effects(2 * EACH as i64);
    eventually("copies wait", || {
        world.broker.ready("orders.retry.1h") as usize == EACH
    });
    daemon.stop();
    for number in 0..EACH {
        let key = world.claim_key(ORDERS, &id("claimed", number));
        world.redis.set(&key, "c:somebody", 600_000);
    }
    world.db.execute(
        "update ackonce.failure set failed_at = failed_at - interval '31 days' \
         where message_id like 'old-%'",
    );
}

fn standing_of(id: &str) -> &'static str {
    match id.split('-').next().unwrap() {
        "never" => "never-applied",
        "already" => "already-applied",
        "claimed" | "waits" => "in-progress",
        "old" => "beyond-retention",
        "conflict" => "id-conflict",
        other => panic!("{other}"),
    }
}

/// Of each line: its id, empty where there is none, and its standing.
fn standings(lines: &[Value]) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    lines
        .iter()
        .filter(|line| line.get("summary").is_none())
        .map(|line| (text(&line["id"]), text(&line["standing"])))
        .collect()
}

fn is_right(queue_type: &str, dead_letters: &str) {
    let world = World::new();
    let config = staged(&world, queue_type, dead_letters);
    letters_of_every_kind(&world, &config);
    let first = replay(&world, &config, &["--plan", "--json"])
        .expect(0)
        .json();
    let plan = standings(&first);
    assert_eq!(plan.len(), 7 * EACH);
    let wrong: Vec<_> = plan
        .iter()
        .filter(|(id, standing)| match id.as_str() {
            "" => standing != "no-id",
            id => standing != standing_of(id),
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
    let summary = &first.last().unwrap()["summary"];
    let counts = &summary["standing"];
    for (standing, count) in [
        ("never-applied", EACH),
        ("already-applied", EACH),
        ("in-progress", 2 * EACH),
        ("beyond-retention", EACH),
        ("id-conflict", EACH),
        ("no-id", EACH),
    ] {
        assert_eq!(counts[standing], count, "{summary}");
    }
    // A plan moves nothing: the next one finds the same in the same order.
    let again = replay(&world, &config, &["--dry-run", "--json"])
        .expect(0)
        .json();
    assert_eq!(standings(&again), plan);
    let table = replay(&world, &config, &["--plan"]).expect(0).out;
    let rows: BTreeMap<&str, &str> = table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let count = words.next()?;
            Some((words.next()?, count))
        })
        .collect();
    assert_eq!(rows["in-progress"], (2 * EACH).to_string(), "{table}");
    assert_eq!(rows["no-id"], EACH.to_string(), "{table}");
    does_what_it_says(&world, &config);
}

/// The replay does with each letter what the plan says.
fn does_what_it_says(world: &World, config: &Config) {
    let ended = replay(world, config, &["--yes", "--json"]).expect(1);
    for line in ended.json() {
        let Some(action) = line["action"].as_str() else {
            continue;
        };
        let expected = match line["standing"].as_str().unwrap() {
            "never-applied" => "replayed",
            "already-applied" => "acknowledged",
            _ => "left",
        };
        assert_eq!(action, expected, "{line}");
    }
    let queue = world.broker.take(ORDERS);
    let sent: BTreeSet<_> = queue.iter().map(|m| m.id().unwrap().to_owned()).collect();
    let never: BTreeSet<_> = (0..EACH).map(|number| id("never", number)).collect();
    assert_eq!(sent, never, "these and no others");
    assert_eq!(queue.len(), EACH);
    // Told so, it takes the old ones as well.
    let ended = replay(world, config, &["--yes", "--json", "--beyond-retention"]).expect(1);
    let summary = ended.json().pop().unwrap()["summary"].clone();
    assert_eq!(summary["replayed"], EACH, "{summary}");
    let old = world.broker.take(ORDERS);
    assert!(old.iter().all(|m| m.id().unwrap().starts_with("old-")));
    let rest = world.broker.take(ORDERS_DEAD);
    assert_eq!(
        rest.len(),
        4 * EACH,
        "in progress, conflicts, without an id"
    );
}

#[test]
fn the_plan_is_right_about_rejected_letters_of_a_quorum_queue() {
    is_right("quorum", "reject");
}

#[test]
fn the_plan_is_right_about_published_letters_of_a_classic_queue() {
    is_right("classic", "publish");
}

#[test]
fn filters_and_a_limit_pick_what_is_planned_and_replayed() {
    let world = World::new();
    let config = staged(&world, "quorum", "reject");
    letters_of_every_kind(&world, &config);
    let planned = |arguments: &[&str]| {
        let all = [&["--plan", "--json"], arguments].concat();
        standings(&replay(&world, &config, &all).expect(0).json())
    };
    let two = planned(&["--id", "never-3", "--id", "conflict-1"]);
    let pair = |id: &str, standing: &str| (id.to_owned(), standing.to_owned());
    let mut sorted = two.clone();
    sorted.sort();
    assert_eq!(
        sorted,
        [
            pair("conflict-1", "id-conflict"),
            pair("never-3", "never-applied")
        ]
    );
    assert_eq!(planned(&["--reason", "missing-id"]).len(), EACH);
    // Four workers refuse messages in an order of their own; the replay's is that
    // of the dead-letter queue.
    let planned_first: Vec<_> = planned(&["--limit", "3"])
        .into_iter()
        .filter(|(_, standing)| standing == "never-applied")
        .map(|(id, _)| id)
        .collect();
    assert_eq!(planned_first.len(), 3);
    let ended = replay(&world, &config, &["--yes", "--json", "--limit", "3"]);
    let summary = ended.json().pop().unwrap()["summary"].clone();
    assert_eq!(summary["replayed"], 3, "{summary}");
    let other = (0..EACH).map(|number| id("never", number));
    let other = other.rev().find(|id| !planned_first.contains(id)).unwrap();
    replay(&world, &config, &["--yes", "--id", &other]).expect(0);
    let sent: Vec<_> = world
        .broker
        .take(ORDERS)
        .iter()
        .map(|m| m.id().unwrap().to_owned())
        .collect();
    assert_eq!(sent, [planned_first, vec![other]].concat());
}

#[test]
fn without_redis_the_plan_is_made_all_the_same_and_says_what_it_cannot_see() {
    let world = World::new();
    let config = staged(&world, "quorum", "reject");
    letters_of_every_kind(&world, &config);
    let away = config.set("redis.url", "redis://127.0.0.1:1/0");
    let ended = replay(&world, &away, &["--plan", "--json"]).expect(0);
    let standing: BTreeMap<_, _> = standings(&ended.json()).into_iter().collect();
    assert_eq!(standing["claimed-0"], "never-applied");
    assert_eq!(standing["waits-0"], "in-progress");
    ended.says(&["Redis does not answer"]);
}

#[test]
fn a_letter_of_which_nothing_tells_the_age_is_not_taken_for_young() {
    let world = World::new();
    let config = staged(&world, "quorum", "reject");
    world.prepare(&config);
    let hour_old = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs()
        - 3_600;
    let stamped = |id: &str, at: u64| Msg::new(id).properties(|p| p.with_timestamp(at));
    world.broker.send(
        ORDERS_DEAD,
        [
            Msg::new("timeless"),
            stamped("young", hour_old),
            stamped("old", hour_old - 31 * 86_400),
            // Milliseconds, as some publishers write: a far future tells nothing.
            stamped("milliseconds", hour_old * 1_000),
        ],
    );
    let plan = standings(
        &replay(&world, &config, &["--plan", "--json"])
            .expect(0)
            .json(),
    );
    let found: BTreeMap<_, _> = plan.into_iter().collect();
    for (id, standing) in [
        ("timeless", "beyond-retention"),
        ("young", "never-applied"),
        ("old", "beyond-retention"),
        ("milliseconds", "beyond-retention"),
    ] {
        assert_eq!(found[id], standing, "{id}");
    }
}
