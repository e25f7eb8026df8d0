//! The command line: exit statuses and what is said with them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::process::Output;

use crate::common::{Consumer, Msg, ORDERS, Proxy, World, eventually, run_ackonce, said};

const OK: i32 = 0;
const UNAVAILABLE: i32 = 69;
const NO_PERMISSION: i32 = 77;
const BAD_CONFIG: i32 = 78;

fn assert_status(output: &Output, status: i32) {
    assert_eq!(output.status.code(), Some(status), "{}", said(output));
}

fn assert_says(output: &Output, parts: &[&str]) {
    let said = said(output);
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
}

#[test]
fn version_and_help_are_there() {
    let version = run_ackonce(&["--version"]);
    assert_status(&version, OK);
    assert_says(&version, &["ackonce", env!("CARGO_PKG_VERSION")]);
    let help = run_ackonce(&["--help"]);
    assert_status(&help, OK);
    assert_says(&help, &["run", "check", "migrate"]);
    for subcommand in ["run", "check", "migrate"] {
        let help = run_ackonce(&[subcommand, "--help"]);
        assert_status(&help, OK);
        assert_says(&help, &["--config"]);
    }
}

#[test]
fn a_wrong_command_line_is_refused() {
    let output = run_ackonce(&["fly"]);
    assert!(!output.status.success());
    assert_says(&output, &["fly"]);
}

#[test]
fn every_problem_of_a_config_is_named_at_once() {
    let world = World::new();
    let orders = Consumer::orders()
        .set("colour", "red")
        .set("workers", 0)
        .set("batch_max", 100)
        .set("prefetch", 10)
        .set("claim.lease", "a while")
        .set("handler.type", "sql")
        .set("identity", "guess");
    let config = world
        .config()
        .set("postgres.lock_timeout", 5)
        .consumer(orders);
    for arguments in [
        &["check", "--offline"][..],
        &["check"],
        &["run"],
        &["migrate"],
    ] {
        let output = world.ackonce(&config, arguments);
        assert_status(&output, BAD_CONFIG);
        assert_says(
            &output,
            &[
                "colour",
                "workers",
                "lease",
                "identity",
                "lock_timeout",
                "config.toml",
            ],
        );
    }
}

#[test]
fn a_config_that_is_missing_or_not_toml_is_refused() {
    let world = World::new();
    let missing = world.path("missing.toml");
    let output = run_ackonce(&["check", "--config", missing.to_str().unwrap()]);
    assert_status(&output, BAD_CONFIG);
    assert_says(&output, &["missing.toml"]);
    let broken = world.write("broken.toml", "[broker\n");
    let output = run_ackonce(&["run", "--config", broken.to_str().unwrap()]);
    assert_status(&output, BAD_CONFIG);
    assert_says(&output, &["broken.toml"]);
}

#[test]
fn a_missing_handler_file_is_named() {
    let world = World::new();
    let orders = Consumer::orders().set("handler.file", "no-such-file.sql");
    let mut text = world.config().consumer(orders).text();
    text = text
        .lines()
        .filter(|line| !line.starts_with("sql ="))
        .map(|line| format!("{line}\n"))
        .collect();
    let path = world.write("config.toml", &text);
    let output = run_ackonce(&["check", "--offline", "--config", path.to_str().unwrap()]);
    assert_status(&output, BAD_CONFIG);
    assert_says(&output, &["no-such-file.sql"]);
}

#[test]
fn a_handler_file_is_found_beside_its_config() {
    let world = World::new();
    world.write("orders.sql", crate::common::RECORD_EFFECT);
    let text = world.orders().text();
    let text: String = text
        .lines()
        .map(|line| match line.starts_with("sql =") {
            true => "file = \"orders.sql\"\n".to_owned(),
            false => format!("{line}\n"),
        })
        .collect();
    let path = world.write("config.toml", &text);
    let output = run_ackonce(&["check", "--offline", "--config", path.to_str().unwrap()]);
    assert_status(&output, OK);
}

#[test]
fn check_passes_offline_and_online() {
    let world = World::new();
    let config = world.orders();
    assert_status(&world.ackonce(&config, &["check", "--offline"]), OK);
    // Before and after the first run.
    assert_status(&world.ackonce(&config, &["check"]), OK);
    world.prepare(&config);
    assert_status(&world.ackonce(&config, &["check"]), OK);
}

#[test]
fn check_tells_a_server_that_is_out_of_reach() {
    let world = World::new();
    for (key, url) in [
        ("broker.url", world.amqp_url()),
        ("redis.url", world.redis_url()),
        ("postgres.url", world.postgres_url()),
    ] {
        let proxy = Proxy::before(url, 0);
        proxy.go_down();
        let config = world.orders().set(key, proxy.url());
        let output = world.ackonce(&config, &["check"]);
        assert_status(&output, UNAVAILABLE);
        assert_status(&world.ackonce(&config, &["check", "--offline"]), OK);
    }
}

#[test]
fn check_tells_a_login_that_is_denied_and_keeps_the_password_to_itself() {
    let world = World::new();
    let mut url = url::Url::parse(world.amqp_url()).unwrap();
    url.set_password(Some("s3cr3t-and-wrong")).unwrap();
    let config = world.orders().set("broker.url", url.as_str());
    let output = world.ackonce(&config, &["check"]);
    assert_status(&output, NO_PERMISSION);
    assert!(!said(&output).contains("s3cr3t"), "{}", said(&output));

    let mut url = url::Url::parse(world.postgres_url()).unwrap();
    url.set_username("nobody_of_that_name").unwrap();
    let config = world.orders().set("postgres.url", url.as_str());
    assert_status(&world.ackonce(&config, &["check"]), NO_PERMISSION);
}

#[test]
fn migrate_can_run_twice() {
    let world = World::new();
    let config = world.orders();
    assert_status(&world.ackonce(&config, &["migrate"]), OK);
    let ledger_id = world.db.ledger_id();
    assert_status(&world.ackonce(&config, &["migrate"]), OK);
    assert_eq!(world.db.ledger_id(), ledger_id);
}

#[test]
fn run_refuses_an_old_schema_and_says_what_to_do() {
    let world = World::new();
    let config = world.orders().set("postgres.auto_migrate", false);
    let output = world.ackonce(&config, &["run"]);
    assert_status(&output, BAD_CONFIG);
    assert_says(&output, &["ackonce migrate"]);
    assert_status(&world.ackonce(&config, &["migrate"]), OK);
    world.prepare(&config);
}

#[test]
fn four_daemons_migrate_an_empty_database_together() {
    let world = World::new();
    let config = world.orders();
    let daemons: Vec<_> = (0..4).map(|_| world.daemon(&config).start()).collect();
    for daemon in &daemons {
        daemon.wait_until_consuming();
    }
    for daemon in daemons {
        daemon.stop();
    }
    assert_eq!(world.db.count("select count(*) from ackonce.instance"), 1);
}

#[test]
fn run_waits_for_servers_that_are_not_there_yet() {
    let world = World::new();
    for (key, url) in [
        ("broker.url", world.amqp_url()),
        ("postgres.url", world.postgres_url()),
    ] {
        let proxy = Proxy::before(url, 0);
        proxy.go_down();
        let config = world.orders().set(key, proxy.url());
        let mut daemon = world.daemon(&config).start();
        proxy.wait_for_refusals(2);
        daemon.assert_running();
        assert_eq!(daemon.times_consuming(ORDERS), 0);
        proxy.come_up();
        daemon.wait_until_consuming();
        world.broker.send(ORDERS, [Msg::new(key)]);
        world.drain_with(daemon, &config, ORDERS);
    }
    world.assert_each_applied_once(&["broker.url", "postgres.url"]);
}

#[test]
fn the_ledgers_id_is_renewed_only_while_no_daemon_is_connected() {
    let world = World::new();
    let config = world.orders();
    let daemon = world.run(&config);
    // A worker without a session reads the id when it has one.
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    let before = world.db.ledger_id();
    let refused = world.ackonce(&config, &["ledger", "renew-id"]);
    assert_status(&refused, 75);
    assert_says(&refused, &["is connected", "stop every daemon"]);
    assert_eq!(world.db.ledger_id(), before);
    daemon.stop();
    eventually("its sessions are closed", || {
        world
            .ackonce(&config, &["ledger", "renew-id"])
            .status
            .success()
    });
    assert_ne!(world.db.ledger_id(), before);
}
