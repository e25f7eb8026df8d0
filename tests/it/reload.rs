//! SIGHUP: the configuration is read again, and only what it changes restarts.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use crate::common::{
    Config, Consumer, Daemon, Msg, ORDERS, World, eventually, numbered, numbered_ids, run_ackonce,
};
use nix::sys::signal::Signal;

const PARCELS: &str = "parcels";

fn two_consumers(world: &World, workers: i64) -> Config {
    let orders = Consumer::orders().set("workers", workers);
    world
        .config()
        .consumer(orders)
        .consumer(Consumer::new(PARCELS))
}

fn wait_until_reloaded(daemon: &Daemon, times: usize) {
    eventually("the reload is through", || {
        daemon.assert_alive();
        daemon.count_logged(&["reloaded: "]) == times
    });
}

/// It says why, and goes on as it was.
fn assert_refused(world: &World, daemon: &Daemon, text: &str, why: &[&str]) {
    let times = daemon.count_logged(&["reload refused"]);
    daemon.reload(text);
    eventually("the reload is refused", || {
        daemon.assert_alive();
        daemon.count_logged(&["reload refused"]) > times
    });
    let log = daemon.log();
    let line = log
        .iter()
        .rev()
        .find(|line| line.contains("reload refused"));
    let line = line.unwrap();
    for part in why {
        assert!(line.contains(part), "{part}: {line}");
    }
    let id = format!("after-{times}");
    world.broker.send(ORDERS, [Msg::new(&id)]);
    eventually("the old one goes on", || {
        world.db.effects().contains_key(&id)
    });
    assert_eq!(daemon.times_consuming(ORDERS), 1);
}

#[test]
fn only_the_consumer_that_a_reload_changes_restarts_and_every_message_is_applied_once() {
    const SENT: usize = 3_000;
    let world = World::new();
    let daemon = world.run(&two_consumers(&world, 1));
    world.broker.send(ORDERS, numbered("o", SENT));
    world.broker.send(PARCELS, numbered("p", SENT));
    world.wait_for_effects(200);
    for (turn, workers) in [(1, 4), (2, 2), (3, 3)] {
        daemon.reload(&two_consumers(&world, workers).text());
        wait_until_reloaded(&daemon, turn);
        eventually("the changed one consumes again", || {
            daemon.times_consuming(ORDERS) == turn + 1
        });
    }
    assert!(daemon.logged(&["reloaded: consumer.orders.workers: 1 is now 4", "changes=1"]));
    assert!(daemon.logged(&["draining", "consumer=orders"]));
    world.wait_for_effects(2 * SENT as i64);
    assert_eq!(daemon.times_consuming(PARCELS), 1);
    daemon.stop();
    let ids = [numbered_ids("o", SENT), numbered_ids("p", SENT)].concat();
    world.assert_each_applied_once(&ids);
}

#[test]
fn a_configuration_that_ackonce_check_would_not_pass_is_refused_and_the_old_one_stays() {
    let world = World::new();
    let good = world.orders();
    let daemon = world.run(&good);

    assert_refused(&world, &daemon, "this is no TOML", &["not TOML"]);
    let unknown = good
        .clone()
        .set("broker.urll", "amqp://canary:secret@nowhere");
    assert_refused(&world, &daemon, &unknown.text(), &["urll"]);
    let no_server = good
        .clone()
        .set("postgres.url", "postgres://canary:secret@127.0.0.1:1/none");
    assert_refused(&world, &daemon, &no_server.text(), &["PostgreSQL"]);
    let other_type = Consumer::orders().set("topology.queue_type", "classic");
    let other_type = world.config().consumer(other_type);
    assert_refused(&world, &daemon, &other_type.text(), &["x-queue-type"]);
    let no_file = Consumer::orders().set("handler.file", "nowhere.sql");
    let no_file = world
        .config()
        .consumer(no_file)
        .text()
        .replace("sql = ", "# sql = ");
    assert_refused(&world, &daemon, &no_file, &["nowhere.sql"]);
    std::fs::remove_file(daemon.config_path()).unwrap();
    std::fs::create_dir(daemon.config_path()).unwrap();
    daemon.signal(Signal::SIGHUP);
    eventually("no file is refused too", || {
        daemon.count_logged(&["reload refused"]) == 6
    });
    assert!(!daemon.logged(&["secret"]), "a secret is in the log");
    daemon.stop();
}

#[test]
fn consumers_come_and_go_with_a_reload_and_their_metrics_with_them() {
    let world = World::new();
    let daemon = world.run(&world.orders());
    let with = world.orders().consumer(Consumer::new(PARCELS));
    daemon.reload(&with.text());
    eventually("the new one consumes", || {
        daemon.times_consuming(PARCELS) == 1
    });
    assert!(daemon.logged(&["reloaded: consumer.parcels: added"]));
    assert_eq!(daemon.times_consuming(ORDERS), 1);
    world.broker.send(PARCELS, [Msg::new("p")]);
    world.wait_for_effects(1);

    daemon.reload(&world.config().consumer(Consumer::new(PARCELS)).text());
    wait_until_reloaded(&daemon, 2);
    let address = daemon.admin();
    let status = |pattern: &str| {
        let output = run_ackonce(&["status", "--json", "--address", &address]);
        String::from_utf8_lossy(&output.stdout).contains(pattern)
    };
    eventually("the old one is forgotten", || {
        status(r#""consumer":"parcels""#) && !status(r#""consumer":"orders""#)
    });
    world.broker.send(ORDERS, [Msg::new("o")]);
    eventually("nobody consumes its queue", || {
        world.broker.ready(ORDERS) == 1
    });
    assert!(daemon.logged(&["reloaded: consumer.orders: removed"]));
    daemon.stop();
}

#[test]
fn a_reload_that_changes_nothing_restarts_nothing_and_a_server_restarts_all() {
    let world = World::new();
    let config = two_consumers(&world, 2);
    let daemon = world.run(&config);
    daemon.reload(&format!("# A comment.\n{}", config.text()));
    wait_until_reloaded(&daemon, 1);
    assert!(daemon.logged(&["reloaded: nothing has changed"]));
    for name in [ORDERS, PARCELS] {
        assert_eq!(daemon.times_consuming(name), 1);
    }
    let before = world.postgres_url().to_owned();
    let apart = if before.contains('?') { '&' } else { '?' };
    let url = format!("{before}{apart}application_name=canary");
    let config = config.set("postgres.url", url).set("log.format", "json");
    daemon.reload(&config.text());
    for name in [ORDERS, PARCELS] {
        eventually("both restart", || {
            daemon.count_logged(&["consuming", name]) == 2
        });
    }
    assert!(daemon.logged(&["postgres.url: changed", "log.format"]));
    assert!(!daemon.logged(&["application_name"]));
    let log = daemon.log();
    let last: serde_json::Value = serde_json::from_str(log.last().unwrap()).unwrap();
    assert_eq!(last["level"], "info");
    daemon.stop();
}

#[test]
fn many_reloads_at_once_are_few_and_a_stop_in_the_middle_of_one_is_heeded() {
    const SENT: usize = 500;
    let world = World::new();
    let slow = |workers: i64| {
        let orders = Consumer::orders()
            .sql(
                "insert into effect (message_id, body) select message_id, body from message; \
                 select pg_sleep(0.02)",
            )
            .set("batch_max", 10)
            .set("workers", workers);
        world.config().consumer(orders)
    };
    let mut daemon = world.run(&slow(1));
    world.broker.send(ORDERS, numbered("m", SENT));
    world.wait_for_effects(10);
    for turn in 0..40 {
        daemon.reload(&slow(1 + turn % 2).text());
    }
    eventually("a reload drains", || daemon.logged(&["draining"]));
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait();
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(daemon.count_logged(&["told to reload"]) < 40);
    assert!(
        world.db.effect_count() < SENT as i64,
        "it was in the middle"
    );
    world.drain(&slow(4), ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", SENT));
}
