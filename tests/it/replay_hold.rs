//! What a replay holds for long is given back before the broker takes it, and
//! no letter is lost or taken twice over it. The command as a library call,
//! which can be told how long is long.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::time::Duration;

use ackonce::dead_letter::desk::Desk;
use ackonce::dead_letter::filter::Filter;
use ackonce::dead_letter::lookout::Lookout;
use ackonce::dead_letter::replay::{Cut, Event, Order, Report, Tools, run};
use ackonce::dead_letter::republish::Destination;
use ackonce::ledger::desk::Action as Entry;
use ackonce::postgres::Session;
use ackonce::stop::Stop;

use crate::common::letters::{header, judged, kill_messages, mend, wait_for_letters};
use crate::common::{Config, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered_ids};

/// Opens its queue anew after each chunk.
fn replay_opening_anew(world: &World, config: &Config) -> Report {
    let order = order(Duration::ZERO, None);
    let (_stopper, stop) = ackonce::stop::pair();
    let (report, cut) = replay(world, config, &order, &stop);
    assert!(cut.is_none(), "{cut:?}");
    report
}

/// To the work queue, with what is held for longer than `hold` given back.
fn order(hold: Duration, rate: Option<&str>) -> Order {
    Order {
        destination: Destination::Queue,
        limit: None,
        rate: rate.map(|rate| rate.parse().unwrap()),
        canary: None,
        beyond_retention: false,
        force: false,
        any_origin: false,
        despite_limit: false,
        hold,
    }
}

fn replay(world: &World, config: &Config, order: &Order, stop: &Stop) -> (Report, Option<Cut>) {
    let path = world.write("library.toml", &config.text());
    let config = ackonce::config::load(&path).unwrap();
    let consumer = &config.consumers[0];
    let session = Session::open(&config.postgres, "replay").unwrap();
    let mut desk = Desk::open(&config, consumer, session, "replay", false).unwrap();
    let known = ackonce::ledger::replay::registration(desk.session(), ORDERS).unwrap();
    let entry = Entry {
        consumer: ORDERS,
        action: "replay",
        operator: "a test",
        because: None,
        filter: "--all",
        file: None,
    };
    let action = desk.begin(&entry).unwrap();
    let tools = Tools {
        config: &config,
        desk,
        lookout: Lookout::new(&config, consumer, &known),
        action,
        filter: &Filter::default(),
        queue: ORDERS,
        stop,
    };
    let mut tell = |_: Event<'_>| {};
    run(order, tools, "a run".to_owned(), &mut tell)
}

fn opens_anew(queue_type: &str, dead_letters: &str) {
    let world = World::new();
    let config = judged(&world, queue_type, dead_letters);
    let daemon = world.run(&config);
    for some in 0..30 {
        let nameless = Msg::anonymous().body(format!("nameless {some}"));
        let named = (0..9).map(|n| Msg::new(&format!("m-{}", some * 9 + n)));
        world.broker.send(ORDERS, named.chain([nameless]));
    }
    wait_for_letters(&world, 300);
    // The daemon goes on refusing: what is replayed comes back meanwhile.
    let report = replay_opening_anew(&world, &config);
    assert_eq!((report.replayed, report.left()), (270, 30), "{report:?}");
    assert_eq!(report.matched, 300, "none was looked at twice");
    wait_for_letters(&world, 300);
    daemon.stop();
    let letters = world.broker.dead(ORDERS_DEAD);
    let replays = letters.iter().filter_map(|l| header(l, "ackonce-replays"));
    assert_eq!(
        replays.filter(|count| count == "1").count(),
        270,
        "each once"
    );
}

#[test]
fn what_is_held_for_long_is_given_back_and_no_letter_is_taken_twice() {
    opens_anew("quorum", "reject");
}

#[test]
fn what_is_held_for_long_is_given_back_to_a_classic_queue_as_well() {
    opens_anew("classic", "publish");
}

/// A turn that is an hour away: nothing is held until then.
#[test]
fn a_letter_whose_turn_is_far_off_waits_in_its_queue() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 40);
    let (stopper, stop) = ackonce::stop::pair();
    let slow = order(Duration::from_millis(100), Some("1/h"));
    let (report, cut) = std::thread::scope(|scope| {
        let replay = scope.spawn(|| replay(&world, &config, &slow, &stop));
        eventually("one is replayed and the rest is back", || {
            world.broker.ready(ORDERS) == 1 && world.broker.ready(ORDERS_DEAD) == 39
        });
        drop(stopper);
        replay.join().unwrap()
    });
    assert!(matches!(cut, Some(Cut::Stopped)), "{cut:?}");
    assert_eq!((report.replayed, report.matched), (1, 1), "{report:?}");
    assert_eq!(world.broker.ready(ORDERS_DEAD), 39);
}

/// Slices of a rate, each a part of the chunk that was taken.
#[test]
fn a_chunk_that_outlasts_the_hold_is_given_back_in_the_middle_and_no_letter_is_taken_twice() {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 40);
    mend(&world);
    let (_stopper, stop) = ackonce::stop::pair();
    let slow = order(Duration::ZERO, Some("10/s"));
    let (report, cut) = replay(&world, &config, &slow, &stop);
    assert!(cut.is_none(), "{cut:?}");
    assert_eq!((report.replayed, report.matched), (40, 40), "{report:?}");
    assert!(world.broker.is_empty(ORDERS_DEAD));
    assert_eq!(world.broker.ready(ORDERS), 40);
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 40));
}
