//! Pruning: what is older than the retention goes, nothing else does, and
//! nobody is disturbed by it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::{ORDERS, World, eventually, numbered, numbered_ids, said};
use ackonce::config::checked;
use ackonce::ledger::prune::{Counts, Sweeper};
use ackonce::postgres::Session;
use ackonce::prune::{self, Round};
use ackonce::stop;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const HOUR: Duration = Duration::from_secs(3_600);

/// An hour's retention; a round whenever one is asked for.
fn hourly(batch: usize) -> checked::Ledger {
    checked::Ledger {
        retention: HOUR,
        prune_every: Duration::ZERO,
        prune_batch: batch,
    }
}

fn sweeper(world: &World) -> Sweeper {
    Sweeper::new(Session::open(&world.postgres(), "prune").unwrap())
}

fn round(world: &World, config: &checked::Ledger) -> Round {
    let (_stopper, stop) = stop::pair();
    let mut sweeper = sweeper(world);
    prune::round(&mut sweeper, config, &stop).unwrap()
}

/// Adds `count` ledger rows of `age`, called `prefix` and a number.
fn applied(world: &World, prefix: &str, count: u32, age: &str) {
    world.db.execute(&format!(
        "insert into ackonce.ledger (applied_at, consumer_id, message_id, fingerprint) \
         select now() - interval '{age}', 1, '{prefix}' || n, sha256(('{prefix}' || n)::bytea) \
         from generate_series(1, {count}) as n"
    ));
}

/// Adds a journal row of `age` for the message `id`, whose body is its id.
fn failed(world: &World, id: &str, reason: Option<&str>, age: &str) {
    let reason = reason.map_or("null".to_owned(), |reason| format!("'{reason}'"));
    world.db.execute(&format!(
        "insert into ackonce.failure (failed_at, consumer_id, attempt, message_id, fingerprint, \
         reason, class, error, handler, host, exchange, routing_key) values \
         (now() - interval '{age}', 1, 1, '{id}', sha256('{id}'), {reason}, 'transient', 'no', \
         'sql', 'h/1', '', 'orders')"
    ));
}

fn named(world: &World, consumer: &str) {
    world.db.execute(&format!(
        "insert into ackonce.consumer (name) values ('{consumer}')"
    ));
}

fn ids(world: &World, table: &str) -> Vec<String> {
    world.db.texts(&format!(
        "select message_id from ackonce.{table} order by message_id, 1"
    ))
}

#[test]
fn what_is_older_than_the_retention_goes_and_nothing_younger_does() {
    let world = World::migrated();
    world.db.execute(
        "insert into ackonce.ledger (applied_at, consumer_id, message_id, fingerprint) \
         select now() - n * interval '1 second', n % 3, n, sha256('m') \
         from generate_series(0, 7199) as n order by random(); \
         insert into ackonce.suspect (marked_at, consumer_id, message_id, owner, deaths) \
         select now() - interval '30 min' * n, 1, n, 1, 0 from generate_series(1, 4) as n;",
    );
    let Round::Through(counts) = round(&world, &hourly(100)) else {
        panic!("the round is not through");
    };
    // The rows grow older while the test runs, so the border is a soft one.
    let left = world.db.count("select count(*) from ackonce.ledger");
    assert_eq!(i64::try_from(counts.ledger).unwrap() + left, 7_200);
    assert_eq!(counts.journal, 0);
    assert!((3_500..=3_600).contains(&left), "{left} rows are left");
    let oldest = "select count(*) from ackonce.ledger where message_id::int >= 3600";
    assert_eq!(world.db.count(oldest), 0);
    let young = "select count(*) from ackonce.ledger where message_id::int < 3500";
    assert_eq!(world.db.count(young), 3_500);
    assert_eq!(ids(&world, "suspect"), ["1"]);
}

#[test]
fn a_dead_letters_reason_outlives_its_attempts_until_it_is_applied() {
    let world = World::migrated();
    let rejected = Some("rejected");
    failed(&world, "young attempt", None, "50 min");
    failed(&world, "old attempt", None, "70 min");
    failed(&world, "young reason", rejected, "50 min");
    failed(&world, "old reason", rejected, "9 hours");
    failed(&world, "ancient reason", rejected, "11 hours");
    failed(&world, "applied", rejected, "70 min");
    failed(&world, "applied and old", rejected, "70 min");
    failed(&world, "other", Some("id-conflict"), "70 min");
    for (id, age) in [("applied", "50 min"), ("applied and old", "65 min")] {
        world.db.execute(&format!(
            "insert into ackonce.ledger values (now() - interval '{age}', 1, '{id}', sha256('{id}'))"
        ));
    }
    // Another message with the same id was applied: this one was not.
    world.db.execute(
        "insert into ackonce.ledger values (now() - interval '65 min', 1, 'other', sha256('x'))",
    );
    let (_stopper, stop) = stop::pair();
    let mut sweeper = sweeper(&world);
    let counted = prune::count(&mut sweeper, &hourly(100), HOUR, &stop).unwrap();
    let expected = Round::Through(Counts {
        ledger: 2,
        journal: 3,
        suspects: 0,
        claims: 0,
    });
    assert_eq!(counted, expected);
    assert_eq!(round(&world, &hourly(100)), expected);
    assert_eq!(
        ids(&world, "failure"),
        [
            "applied",
            "old reason",
            "other",
            "young attempt",
            "young reason"
        ]
    );
    assert_eq!(ids(&world, "ledger"), ["applied"]);
}

#[test]
fn a_ledger_that_is_too_large_for_one_round_is_swept_in_several() {
    let world = World::migrated();
    // Some 1,300 pages, where a round takes 1,024.
    applied(&world, "young", 50_000, "1 min");
    applied(&world, "old", 70_000, "2 hours");
    let count = "select count(*) from ackonce.ledger";
    let config = checked::Ledger {
        retention: HOUR,
        prune_every: Duration::from_nanos(2),
        prune_batch: 10_000,
    };
    round(&world, &config);
    let left = world.db.count(count);
    assert!(50_000 < left && left < 120_000, "{left} rows are left");
    round(&world, &config);
    assert_eq!(world.db.count(count), 50_000);
    // And from the start again.
    applied(&world, "again", 10, "2 hours");
    world.db.execute("vacuum ackonce.ledger");
    round(&world, &config);
    round(&world, &config);
    assert_eq!(world.db.count(count), 50_000);
}

#[test]
fn one_at_a_time_prunes_and_its_end_lets_the_next_one() {
    let world = World::migrated();
    applied(&world, "m", 10, "2 hours");
    let mut other = sweeper(&world);
    assert!(other.lock().unwrap());
    assert_eq!(round(&world, &hourly(100)), Round::Busy);
    assert_eq!(world.db.count("select count(*) from ackonce.ledger"), 10);
    drop(other);
    eventually("the lock went with its session", || {
        round(&world, &hourly(100)) != Round::Busy
    });
    assert_eq!(world.db.count("select count(*) from ackonce.ledger"), 0);
}

#[test]
fn several_daemons_share_one_round() {
    let world = World::migrated();
    let config = checked::Ledger {
        prune_every: HOUR,
        ..hourly(100)
    };
    assert!(matches!(round(&world, &config), Round::Through(_)));
    assert_eq!(round(&world, &config), Round::Early);
    let an_hour_ago = "update ackonce.sweep set swept_at = swept_at - interval '1 hour'";
    world.db.execute(an_hour_ago);
    assert!(matches!(round(&world, &config), Round::Through(_)));
}

#[test]
fn a_round_that_is_told_to_stop_ends_after_one_batch_and_is_continued() {
    let world = World::migrated();
    applied(&world, "m", 1_000, "2 hours");
    let (stopper, stop) = stop::pair();
    drop(stopper);
    let mut sweeper = sweeper(&world);
    let stopped = prune::round(&mut sweeper, &hourly(10), &stop).unwrap();
    let ten = Counts {
        ledger: 10,
        ..Counts::default()
    };
    assert_eq!(stopped, Round::Stopped(ten));
    assert_eq!(world.db.count("select count(*) from ackonce.ledger"), 990);
    // The lock is free again, though the session lives.
    let Round::Through(rest) = round(&world, &hourly(1_000)) else {
        panic!("the round is not through");
    };
    assert_eq!(rest.ledger, 990);
}

#[test]
fn a_sweep_reads_its_own_pages_and_needs_no_index_of_times() {
    let world = World::migrated();
    applied(&world, "young", 20_000, "1 min");
    applied(&world, "old", 200, "2 hours");
    failed(&world, "attempt", None, "2 hours");
    world.db.execute("analyze ackonce.ledger");
    // A scan of a range of pages does not count as one of the whole table.
    let scans = "select seq_scan from pg_stat_user_tables where relname = 'ledger'";
    let session = "select count(*) from pg_stat_activity where datname = current_database() \
                   and application_name = 'ackonce prune'";
    let before = world.db.count(scans);
    let Round::Through(counts) = round(&world, &hourly(100)) else {
        panic!("the round is not through");
    };
    assert_eq!(counts.total(), 201);
    eventually("its session has ended, and counted what it did", || {
        world.db.count(session) == 0
    });
    assert_eq!(world.db.count(scans), before);
    let indexes = "select count(*) from pg_index where indrelid = 'ackonce.ledger'::regclass";
    assert_eq!(world.db.count(indexes), 1);
}

#[test]
fn a_daemon_prunes_while_it_consumes() {
    let world = World::new();
    let config = world.orders();
    world.prepare(&config);
    applied(&world, "old", 20_000, "31 days");
    applied(&world, "young", 100, "29 days");
    world
        .db
        .execute("update ackonce.sweep set swept_at = '-infinity'");
    world.broker.send(ORDERS, numbered("m", 2_000));
    let daemon = world.run(&config);
    eventually("the old rows are gone", || {
        world
            .db
            .count("select count(*) from ackonce.ledger where message_id like 'old%'")
            == 0
    });
    daemon.wait_for_log(&["pruned", "ledger=20000"]);
    world.wait_for_effects(2_000);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 2_000));
    let young = "select count(*) from ackonce.ledger where message_id like 'young%'";
    assert_eq!(world.db.count(young), 100);
}

#[test]
fn a_daemon_that_may_not_delete_says_so_and_consumes() {
    let world = World::new();
    world.prepare(&world.orders());
    applied(&world, "old", 1, "31 days");
    let role = format!("{}_reader", world.name());
    world.db.execute(&format!(
        "update ackonce.sweep set swept_at = '-infinity'; create role {role} login; \
         grant usage on schema ackonce to {role}; grant select, insert on effect to {role}; \
         grant select, insert, update on all tables in schema ackonce to {role};"
    ));
    let mut url = url::Url::parse(world.postgres_url()).unwrap();
    url.set_username(&role).unwrap();
    let config = world
        .orders()
        .set("postgres.url", url.as_str())
        .set("ledger.prune_every", "100ms");
    let daemon = world.run(&config);
    daemon.wait_for_log(&["failed to prune", "ledger"]);
    world.broker.send(ORDERS, numbered("m", 10));
    world.wait_for_effects(10);
    let check = world.ackonce(&config, &["check"]);
    assert_eq!(check.status.code(), Some(77), "{}", said(&check));
    assert!(said(&check).contains("ackonce.ledger (DELETE)"));
    world.db.execute(&format!(
        "grant delete on all tables in schema ackonce to {role}"
    ));
    daemon.wait_for_log(&["can be pruned again"]);
    assert_eq!(daemon.count_logged(&["failed to prune"]), 1);
    assert_eq!(world.db.ledger(ORDERS).len(), 10);
    daemon.stop();
    world
        .db
        .execute(&format!("drop owned by {role}; drop role {role}"));
}

#[test]
fn by_hand_it_counts_then_deletes_and_warns_of_old_dead_letters() {
    let world = World::migrated();
    named(&world, ORDERS);
    applied(&world, "old", 30, "31 days");
    applied(&world, "young", 5, "29 days");
    failed(&world, "attempt", None, "40 days");
    failed(&world, "dead", Some("rejected"), "40 days");
    // Journalled twice by a crash: one dead letter.
    failed(&world, "dead", Some("rejected"), "40 days");
    let rows = "select count(*) from ackonce.ledger";
    let config = world.orders();
    for (arguments, verb, left) in [
        (&["ledger", "prune", "--dry-run"][..], "would delete", 35),
        (&["ledger", "prune"], "deleted", 5),
    ] {
        let output = world.ackonce(&config, arguments);
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        let text = said(&output);
        for part in [
            verb,
            "ledger          30\n",
            "failure journal 1\n",
            "consumer orders: 1 dead letter(s)",
            "retention of 30d",
        ] {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        assert_eq!(world.db.count(rows), left);
    }
    let check = world.ackonce(&config, &["check"]);
    assert!(said(&check).contains("dead letters of orders: 1 dead letter(s)"));
    let daemon = world.run(&config);
    daemon.wait_for_log(&["1 dead letter(s)", "consumer=orders"]);
}

#[test]
fn by_hand_less_than_the_retention_needs_a_yes() {
    let world = World::migrated();
    applied(&world, "m", 5, "2 days");
    let rows = "select count(*) from ackonce.ledger";
    let config = world.orders();
    let prune = ["ledger", "prune", "--older-than", "1d"];
    let refused = world.ackonce(&config, &prune);
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(said(&refused).contains("--yes"));
    assert_eq!(world.db.count(rows), 5);
    let dry = world.ackonce(&config, &[&prune[..], &["--dry-run"]].concat());
    assert_eq!(dry.status.code(), Some(0), "{}", said(&dry));
    assert_eq!(world.db.count(rows), 5);
    let done = world.ackonce(&config, &[&prune[..], &["--yes"]].concat());
    assert_eq!(done.status.code(), Some(0), "{}", said(&done));
    assert_eq!(world.db.count(rows), 0);
    for nonsense in ["1 day", "-1d", "200000d", "99999999999999999999d", ""] {
        let output = world.ackonce(&config, &["ledger", "prune", "--older-than", nonsense]);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{nonsense:?}: {}",
            said(&output)
        );
    }
}

#[test]
fn by_hand_it_waits_for_nobody() {
    let world = World::migrated();
    let mut other = sweeper(&world);
    assert!(other.lock().unwrap());
    let output = world.ackonce(&world.orders(), &["ledger", "prune"]);
    assert_eq!(output.status.code(), Some(75), "{}", said(&output));
    // Counting needs nobody's leave.
    let output = world.ackonce(&world.orders(), &["ledger", "prune", "--dry-run"]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
}

#[test]
fn by_hand_it_can_be_interrupted_between_batches() {
    let world = World::migrated();
    applied(&world, "m", 60_000, "31 days");
    let path = world.write("config.toml", &world.orders().text());
    let child = Command::new(env!("CARGO_BIN_EXE_ackonce"))
        .args(["ledger", "prune", "--config"])
        .arg(path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let rows = "select count(*) from ackonce.ledger";
    eventually("the first rows are gone", || world.db.count(rows) < 60_000);
    kill(
        Pid::from_raw(i32::try_from(child.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let left = world.db.count(rows);
    assert!(left > 0, "nothing was left to interrupt");
    let deleted = format!("ledger          {}\n", 60_000 - left);
    assert!(said(&output).contains(&deleted), "{}", said(&output));
}
