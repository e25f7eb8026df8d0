//! A message that kills its worker is quarantined after as many deaths as the
//! configuration allows, and what was only near it is applied.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use crate::common::{
    Config, Consumer, Daemon, Msg, ORDERS, ORDERS_DEAD, Proxy, RECORD_AMOUNT, RECORD_EFFECT, World,
    eventually, numbered, numbered_ids,
};
use sqlx::Row;

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

/// How many messages have come to an end: applied, or at rest.
fn ended(world: &World) -> usize {
    world.db.effects().len() + world.broker.dead(ORDERS_DEAD).len()
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
    // Who dies of another before the broker has it is written down twice.
    journal.dedup();
    let expected: Vec<(&str, &str)> = poisons
        .iter()
        .map(|id| (id.as_str(), "crash-loop"))
        .collect();
    assert_eq!(journal, expected, "nobody else failed");
    // Who dies between its commit and the end may leave one that counts none.
    let counting = marks(world).into_iter().filter(|(_, deaths)| *deaths > 0);
    assert_eq!(counting.collect::<Vec<_>>(), [], "no death is remembered");
}

/// Ids that bear a crash mark, each with the deaths that it counts.
fn marks(world: &World) -> Vec<(String, i32)> {
    let rows = world
        .db
        .rows("select message_id, deaths from ackonce.suspect order by 1");
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
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
    // Small batches and a slow handler: when one message kills the process,
    // others are in work beside it.
    const POISONS: u32 = 8;
    let world = World::new();
    let slow = format!("select pg_sleep(0.0025); {RECORD_EFFECT}");
    let orders = orders(3).set("batch_max", 4).sql(&slow);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let poisons = numbered_ids("poison", POISONS as usize);
    send_among_neighbours(&world, &poisons);
    let count = NEIGHBOURS + poisons.len();
    let (daemons, deaths) = restart_until_ended(&world, &config, 1, count);
    assert_only_quarantined(&world, &config, daemons, &poisons);
    assert!(deaths >= 3, "{deaths} deaths");
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

#[test]
fn a_marked_message_that_is_applied_leaves_no_mark() {
    for queue_type in ["quorum", "classic"] {
        let world = World::new();
        let orders = orders(3).set("topology.queue_type", queue_type);
        let config = world.config().consumer(orders);
        world.prepare(&config);
        world.broker.send(ORDERS, [Msg::new("one")]);
        for death in 1..=2 {
            let mut daemon = world.daemon(&config).dies_at("applied", 1).start();
            daemon.wait_until_killed();
            let known = vec![("one".to_owned(), 0); death - 1];
            assert_eq!(marks(&world), known, "{queue_type}: after {death}");
        }
        let daemon = world.run(&config);
        world.wait_for_effects(1);
        world.drain_with(daemon, &config, ORDERS);
        world.assert_each_applied_once(&["one"]);
        assert_eq!(marks(&world), [], "{queue_type}");
    }
}

#[test]
fn a_marked_message_that_fails_leaves_no_mark() {
    let world = World::new();
    // Without claims to wait for, the failpoint is hit with the message.
    let config = world.config().set("redis.enabled", false);
    let config = config.consumer(orders(3).sql(RECORD_AMOUNT));
    world.prepare(&config);
    let amount = serde_json::json!({ "amount": "none" });
    world.broker.send(ORDERS, [Msg::new("one").json(&amount)]);
    for _ in 1..=2 {
        let mut daemon = world.daemon(&config).dies_at("recorded", 1).start();
        daemon.wait_until_killed();
    }
    assert_eq!(marks(&world).len(), 1);
    let daemon = world.run(&config);
    world.broker.wait_for_dead(ORDERS_DEAD, 1);
    daemon.stop();
    assert_eq!(world.db.reasons(ORDERS), ["rejected"]);
    assert_eq!(marks(&world), []);
}

/// Far more than the three deaths that [`orders`] allows here.
const RETURNS: usize = 10;

/// Few enough for one daemon to try all of them during a pause.
const WAITING: usize = 4;

/// A world whose messages cannot be applied, through no fault of theirs.
fn broken_world(queue_type: &str) -> (World, Config) {
    let world = World::new();
    let orders = orders(3).set("topology.queue_type", queue_type);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world.db.execute("alter table effect rename to gone");
    world.broker.send(ORDERS, numbered("m", WAITING));
    (world, config)
}

/// Mends the world: everybody is applied and nobody was blamed.
fn assert_nobody_was_blamed(world: &World, config: &Config, daemon: Daemon) {
    world.db.execute("alter table gone rename to effect");
    world.wait_for_effects(WAITING as i64);
    world.drain_with(daemon, config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", WAITING));
    assert!(world.db.failures(ORDERS).is_empty(), "nobody was blamed");
    assert!(world.broker.is_empty(ORDERS_DEAD));
    assert_eq!(marks(world), []);
}

#[test]
fn a_message_that_comes_back_because_of_stops_is_not_quarantined() {
    for queue_type in ["quorum", "classic"] {
        let (world, config) = broken_world(queue_type);
        for _ in 0..RETURNS {
            let daemon = world.run(&config);
            daemon.wait_for_log(&["paused", "42P01"]);
            daemon.stop();
        }
        assert_nobody_was_blamed(&world, &config, world.run(&config));
    }
}

#[test]
fn a_message_that_comes_back_because_of_reconnects_is_not_quarantined() {
    let (world, config) = broken_world("quorum");
    let proxy = Proxy::before(world.amqp_url(), 5672);
    let config = config.set("broker.url", proxy.url());
    let daemon = world.run(&config);
    daemon.wait_for_log(&["paused", "42P01"]);
    for lost in 1..=RETURNS {
        proxy.go_down();
        eventually("it lost its connection", || {
            daemon.count_logged(&["lost the broker"]) >= lost
        });
        proxy.come_up();
        let before = daemon.times_consuming(ORDERS);
        eventually("it consumes again", || {
            daemon.times_consuming(ORDERS) > before
        });
    }
    assert_nobody_was_blamed(&world, &config, daemon);
}

#[test]
fn a_message_that_waits_in_a_pause_while_daemons_are_killed_is_not_quarantined() {
    for queue_type in ["quorum", "classic"] {
        let (world, config) = broken_world(queue_type);
        // Nobody waits for claims of the dead: all are tried.
        let config = config.set("redis.enabled", false);
        for _ in 0..RETURNS {
            let daemon = world.run(&config);
            daemon.wait_for_log(&["paused", "42P01"]);
            // Between two tries: what it is just trying is marked.
            daemon.freeze_when("all of them wait", || marks(&world).is_empty());
            daemon.kill();
        }
        assert_nobody_was_blamed(&world, &config, world.run(&config));
    }
}
