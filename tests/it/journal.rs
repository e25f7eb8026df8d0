//! The failure journal and the crash marks, as the workers write them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::HashMap;
use std::sync::Barrier;
use std::time::Duration;

use crate::common::World;
use ackonce::failure::{Class, Failure};
use ackonce::ledger::{JournalEntry, Ledger};
use ackonce::message::{DeadReason, Fingerprint, MessageId};

fn worker(world: &World, consumer: &str, owner: u64) -> Ledger {
    Ledger::new(world.postgres(), consumer, "host/1", 3, owner)
}

fn failure(class: Class, code: Option<&str>, text: &str) -> Failure {
    Failure {
        class,
        code: code.map(str::to_owned),
        text: text.to_owned(),
        retry_after: None,
    }
}

fn entry<'a>(id: Option<&'a MessageId>, failure: &'a Failure) -> JournalEntry<'a> {
    JournalEntry {
        message_id: id,
        fingerprint: Fingerprint([7; 32]),
        reason: None,
        retry_in: None,
        failure,
        attempt: 1,
        worker: None,
        duration: None,
        exchange: "",
        routing_key: "orders",
    }
}

#[test]
fn an_attempt_that_will_be_repeated_is_journalled_as_fully_as_a_dead_letter() {
    let world = World::migrated();
    let id = MessageId::new("m").unwrap();
    let later = failure(Class::Transient, Some("40P01"), "deadlock detected");
    let never = failure(Class::Permanent, None, "exit status 65");
    let entries = [
        JournalEntry {
            retry_in: Some(Duration::from_millis(1_500)),
            duration: Some(Duration::from_micros(12_300)),
            ..entry(Some(&id), &later)
        },
        JournalEntry {
            reason: Some(DeadReason::Rejected),
            attempt: 2,
            duration: Some(Duration::from_secs(2)),
            exchange: "events",
            ..entry(Some(&id), &never)
        },
        JournalEntry {
            reason: Some(DeadReason::MissingId),
            attempt: 0,
            ..entry(None, &never)
        },
    ];
    worker(&world, "orders", 1)
        .journal("command", &entries)
        .unwrap();
    let rows = world.db.texts(
        "select concat_ws('|', c.name, message_id, attempt, coalesce(reason, '-'), class, \
         coalesce(code, '-'), error, handler, host, worker, exchange, routing_key, \
         coalesce(extract(epoch from retry_in)::text, '-'), \
         coalesce(extract(epoch from duration)::text, '-'), encode(fingerprint, 'hex')) \
         from ackonce.failure f join ackonce.consumer c on c.id = consumer_id order by f.id",
    );
    let print = "07".repeat(32);
    assert_eq!(
        rows,
        [
            format!(
                "orders|m|1|-|transient|40P01|deadlock detected|command|host/1|3||orders|\
                 1.500000|0.012300|{print}"
            ),
            format!(
                "orders|m|2|rejected|permanent|-|exit status 65|command|host/1|3|events|orders|-|\
                 2.000000|{print}"
            ),
            format!(
                "orders|0|missing-id|permanent|-|exit status 65|command|host/1|3||orders|-|-|{print}"
            ),
        ]
    );
}

#[test]
fn texts_from_outside_are_cut_and_lose_what_postgresql_cannot_hold() {
    let world = World::migrated();
    let id = MessageId::new("m").unwrap();
    let long = format!("\0{}", "é".repeat(5_000));
    let bad = failure(Class::Transient, Some("5\0 3"), &long);
    let entries = [JournalEntry {
        exchange: "a\0b",
        routing_key: &long,
        duration: Some(Duration::MAX),
        retry_in: Some(Duration::ZERO),
        ..entry(Some(&id), &bad)
    }];
    let mut ledger = worker(&world, "orders", 1);
    // What no clock can measure is no reason to lose the rest.
    ledger.journal("http", &entries).unwrap();
    assert_eq!(
        world.db.texts(
            "select concat_ws('|', length(error), left(error, 2), length(routing_key), exchange, code, \
         extract(epoch from duration)::bigint) \
             from ackonce.failure"
        ),
        ["2000|\u{FFFD}é|255|a\u{FFFD}b|5\u{FFFD} 3|1000000000"]
    );
}

#[test]
fn a_run_that_ends_leaves_no_mark_and_one_that_dies_is_counted() {
    let world = World::migrated();
    let mut first = worker(&world, "orders", u64::MAX);
    assert!(first.suspects(&["a", "b"]).unwrap().is_empty());
    // The same id twice in a batch is one run.
    first.mark(&["b", "a", "b"]).unwrap();
    assert_eq!(
        first.suspects(&["a", "b"]).unwrap(),
        deaths(&[("a", 0), ("b", 0)])
    );
    // The same workers take it again: nobody has died.
    first.mark(&["a"]).unwrap();
    assert_eq!(first.suspects(&["a"]).unwrap(), deaths(&[("a", 0)]));
    first.unmark(&["b"]).unwrap();

    let mut second = worker(&world, "orders", 2);
    assert_eq!(second.suspects(&["a", "b"]).unwrap(), deaths(&[("a", 1)]));
    second.mark(&["a"]).unwrap();
    assert_eq!(second.suspects(&["a"]).unwrap(), deaths(&[("a", 1)]));
    let mut third = worker(&world, "orders", 3);
    third.mark(&["a"]).unwrap();
    assert_eq!(third.suspects(&["a"]).unwrap(), deaths(&[("a", 2)]));
    // Another consumer's message of that id is another message.
    assert!(
        worker(&world, "mail", 3)
            .suspects(&["a"])
            .unwrap()
            .is_empty()
    );
    third.unmark(&["a", "a", "unknown"]).unwrap();
    assert_eq!(world.db.count("select count(*) from ackonce.suspect"), 0);
}

fn deaths(marks: &[(&str, u32)]) -> HashMap<String, u32> {
    marks.iter().map(|(id, n)| ((*id).to_owned(), *n)).collect()
}

#[test]
fn a_mark_taken_off_in_a_transaction_that_fails_is_still_there() {
    let world = World::migrated();
    let mut ledger = worker(&world, "orders", 1);
    ledger.mark(&["a"]).unwrap();
    ledger.begin().unwrap();
    ledger.unmark(&["a"]).unwrap();
    ledger.rollback();
    assert_eq!(ledger.suspects(&["a"]).unwrap(), deaths(&[("a", 0)]));
    ledger.begin().unwrap();
    ledger.unmark(&["a"]).unwrap();
    ledger.commit().unwrap();
    assert!(ledger.suspects(&["a"]).unwrap().is_empty());
}

#[test]
fn workers_that_mark_the_same_messages_in_another_order_do_not_block_each_other() {
    let world = World::migrated();
    let ids: Vec<String> = (0..500).map(|n| format!("m{n:03}")).collect();
    let forward: Vec<&str> = ids.iter().map(String::as_str).collect();
    let backward: Vec<&str> = forward.iter().rev().copied().collect();
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        for (owner, order) in (0..4).zip([&forward, &backward].into_iter().cycle()) {
            let (world, start) = (&world, &start);
            scope.spawn(move || {
                let mut ledger = worker(world, "orders", owner);
                start.wait();
                for _ in 0..30 {
                    ledger.mark(order).unwrap();
                    ledger.unmark(order).unwrap();
                }
            });
        }
    });
    assert_eq!(world.db.count("select count(*) from ackonce.suspect"), 0);
}

#[test]
fn a_mark_that_is_nobodys_counts_no_death_and_forgets_none() {
    let world = World::migrated();
    let owner = |owner| worker(&world, "orders", owner);
    let (mut first, mut second, mut third) = (owner(1), owner(2), owner(3));
    first.mark(&["a", "b"]).unwrap();
    second.mark(&["a"]).unwrap();
    // b is the first one's, and stays so.
    second.rest(&["a", "b"]).unwrap();
    assert_eq!(third.suspects(&["a"]).unwrap(), deaths(&[("a", 1)]));
    assert_eq!(third.suspects(&["b"]).unwrap(), deaths(&[("b", 1)]));
    third.mark(&["a"]).unwrap();
    assert_eq!(third.suspects(&["a"]).unwrap(), deaths(&[("a", 1)]));
    first.rest(&["b"]).unwrap();
    assert!(third.suspects(&["b"]).unwrap().is_empty());
}
