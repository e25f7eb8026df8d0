//! A message that kills its worker is quarantined after as many deaths as the
//! configuration allows, and what was only near it is applied.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;

use common::{
    Config, Consumer, Daemon, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered, numbered_ids,
};

/// What a body holds that kills or frightens its worker.
const POISON: &str = "deadly nightshade";
const NEIGHBOURS: usize = 300;
/// More deaths than any test allows: a loop that does not end is a failure.
const DEATHS_MAX: u32 = 40;

fn orders(max_deaths: u32) -> Consumer {
    Consumer::orders()
        .set("max_deaths", max_deaths)
        // A dead worker's claims hold its messages up for so long.
        .set("claim.lease", "400ms")
        .set("claim.renew_every", "100ms")
}

fn poison(id: &str) -> Msg {
    Msg::new(id).body(format!("{id}: {POISON}"))
}

/// [`NEIGHBOURS`] messages with `poisons` spread among them.
fn send_among_neighbours(world: &World, poisons: &[String]) {
    let mut messages = numbered("m", NEIGHBOURS);
    for (number, id) in poisons.iter().enumerate() {
        let at = (2 * number + 1) * NEIGHBOURS / (2 * poisons.len());
        messages.insert(at + number, poison(id));
    }
    world.broker.send(ORDERS, messages);
}

/// How many messages have come to an end: applied, or in the journal for good.
fn ended(world: &World) -> usize {
    let applied = world.db.effects().len();
    let dead = world.db.reasons(ORDERS);
    applied + dead.iter().filter(|reason| !reason.is_empty()).count()
}

/// Starts daemons, `at_once` at a time, and each that dies anew, until `count`
/// messages have come to an end. The last daemons, and how many died.
fn restart_until_ended(
    world: &World,
    config: &Config,
    at_once: usize,
    count: usize,
) -> (Vec<Daemon>, u32) {
    let start = || world.daemon(config).dies_of(POISON).start();
    let mut daemons: Vec<Daemon> = (0..at_once).map(|_| start()).collect();
    let mut deaths = 0;
    eventually("every message comes to an end", || {
        for daemon in &mut daemons {
            if daemon.try_wait().is_some() {
                daemon.wait_until_killed();
                deaths += 1;
                assert!(deaths < DEATHS_MAX, "died {deaths} times");
                *daemon = start();
            }
        }
        ended(world) >= count
    });
    for daemon in &mut daemons {
        daemon.assert_running();
    }
    (daemons, deaths)
}

/// Settles what is left, and looks at it: `poisons` are quarantined, each with
/// its one row in the journal, and the neighbours are applied.
fn assert_only_quarantined(
    world: &World,
    config: &Config,
    daemons: Vec<Daemon>,
    poisons: &[String],
) {
    for daemon in daemons {
        daemon.stop();
    }
    world.drain(config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", NEIGHBOURS));
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, poisons.len());
    let mut ids: Vec<&str> = dead.iter().filter_map(|dead| dead.id()).collect();
    ids.sort_unstable();
    assert_eq!(ids, poisons, "they came to rest, and they alone");
    let failures = world.db.failures(ORDERS);
    let mut journal: Vec<(&str, &str)> = failures
        .iter()
        .map(|f| (f.message_id.as_deref().unwrap_or(""), f.reason.as_str()))
        .collect();
    journal.sort_unstable();
    let expected: Vec<(&str, &str)> = poisons
        .iter()
        .map(|id| (id.as_str(), "crash-loop"))
        .collect();
    assert_eq!(journal, expected, "nobody else failed");
    assert_eq!(marks(world), Vec::<String>::new(), "no mark is left");
}

/// Ids that bear a crash mark.
fn marks(world: &World) -> Vec<String> {
    world
        .db
        .texts("select message_id || ' ' || deaths from ackonce.suspect order by 1")
}

/// Has `count` poisons kill daemons, `at_once` at a time. How many died.
fn deaths_of(queue_type: &str, max_deaths: u32, count: usize, at_once: usize) -> u32 {
    let world = World::new();
    let orders = orders(max_deaths).set("topology.queue_type", queue_type);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let poisons = numbered_ids("poison", count);
    send_among_neighbours(&world, &poisons);
    let (daemons, deaths) = restart_until_ended(&world, &config, at_once, NEIGHBOURS + count);
    assert_only_quarantined(&world, &config, daemons, &poisons);
    deaths
}

#[test]
fn a_message_that_kills_its_process_is_quarantined_after_max_deaths_on_a_quorum_queue() {
    assert_eq!(deaths_of("quorum", 3, 1, 1), 3);
    assert_eq!(deaths_of("quorum", 4, 1, 1), 4);
}

#[test]
fn a_message_that_kills_its_process_is_quarantined_after_max_deaths_on_a_classic_queue() {
    assert_eq!(deaths_of("classic", 3, 1, 1), 3);
    assert_eq!(deaths_of("classic", 4, 1, 1), 4);
}

#[test]
fn a_message_that_kills_two_daemons_in_turn_is_quarantined_after_max_deaths() {
    assert_eq!(deaths_of("quorum", 3, 1, 2), 3);
    assert_eq!(deaths_of("classic", 4, 1, 2), 4);
}

#[test]
fn several_messages_that_kill_their_process_harm_no_neighbour() {
    let deaths = deaths_of("quorum", 3, 5, 1);
    assert!((3..=15).contains(&deaths), "{deaths} deaths");
}

#[test]
fn a_message_whose_worker_panics_is_quarantined_and_the_process_stays() {
    for (queue_type, max_deaths) in [("quorum", 3), ("classic", 4)] {
        let world = World::new();
        let orders = orders(max_deaths).set("topology.queue_type", queue_type);
        let config = world.config().consumer(orders);
        world.prepare(&config);
        let poisons = numbered_ids("poison", 1);
        send_among_neighbours(&world, &poisons);
        let mut daemon = world.daemon(&config).panics_of(POISON).start();
        eventually("every message comes to an end", || {
            daemon.assert_running();
            ended(&world) > NEIGHBOURS
        });
        let panics = daemon.count_logged(&["a worker panicked"]);
        assert_eq!(panics, max_deaths as usize, "{queue_type}");
        assert_only_quarantined(&world, &config, vec![daemon], &poisons);
    }
}
