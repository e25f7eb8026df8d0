//! `ackonce status`: a running daemon, looked at.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::process::{Command, Output, Stdio};

use crate::common::{Consumer, Daemon, Msg, ORDERS, World, eventually, numbered, run_ackonce};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn status(daemon: &Daemon, options: &[&str]) -> Output {
    let address = daemon.admin();
    let arguments = [&["status", "--address", &address], options].concat();
    run_ackonce(&arguments)
}

fn json(daemon: &Daemon) -> Value {
    serde_json::from_slice(&status(daemon, &["--json"]).stdout).unwrap()
}

#[test]
fn a_daemon_at_work_is_shown_as_a_table_and_as_json() {
    let world = World::new();
    let daemon = world.run(&world.orders());
    let twice = numbered("m", 30).into_iter().chain(numbered("m", 10));
    let bad = Msg::anonymous();
    world.broker.send(ORDERS, twice.chain([bad]));
    eventually("all is counted", || {
        let messages = &json(&daemon)["consumers"][0]["messages"];
        [
            &messages["applied"],
            &messages["duplicate"],
            &messages["dead-lettered"],
        ] == [30, 10, 1]
    });
    let shown = json(&daemon);
    assert_eq!(shown["pid"], daemon.pid());
    assert_eq!(shown["version"], env!("CARGO_PKG_VERSION"));
    let consumer = &shown["consumers"][0];
    assert_eq!(consumer["consumer"], ORDERS);
    assert_eq!(consumer["state"], "consuming");
    for server in ["rabbitmq", "redis", "postgresql"] {
        assert_eq!(consumer["servers"][server], true, "{server}");
    }
    let table = status(&daemon, &[]);
    assert_eq!(table.status.code(), Some(0));
    let table = String::from_utf8(table.stdout).unwrap();
    let row = table.lines().find(|line| line.starts_with(ORDERS)).unwrap();
    let cells: Vec<&str> = row.split_whitespace().collect();
    assert_eq!(cells[1], "consuming");
    assert_eq!(&cells[4..8], ["30", "10", "0", "1"], "{table}");
    daemon.stop();
}

#[test]
fn a_consumer_that_does_not_consume_is_named_with_its_cause() {
    let world = World::new();
    let daemon = world.run(&world.orders());
    world.db.execute("ALTER TABLE effect RENAME TO gone");
    world.broker.send(ORDERS, [Msg::new("m")]);
    daemon.wait_for_log(&["paused"]);
    let paused = status(&daemon, &[]);
    assert_eq!(paused.status.code(), Some(1));
    let text = String::from_utf8(paused.stdout).unwrap();
    assert!(text.contains("paused"), "{text}");
    assert!(text.contains("effect"), "the cause: {text}");
    world.db.execute("ALTER TABLE gone RENAME TO effect");
    eventually("it consumes again", || {
        status(&daemon, &[]).status.code() == Some(0)
    });
    daemon.stop();
}

#[test]
fn without_a_daemon_or_an_address_it_says_so() {
    let world = World::new();
    let port_0 = world.write("port-0.toml", &world.orders().text());
    let off = world.orders().set("admin.enabled", false);
    let off = world.write("off.toml", &off.text());
    for (options, code, said) in [
        (
            vec!["--address", "127.0.0.1:1"],
            69,
            "no daemon answers at 127.0.0.1:1",
        ),
        (vec!["--config", port_0.to_str().unwrap()], 78, "--address"),
        (vec!["--config", off.to_str().unwrap()], 78, "switched off"),
        (vec!["--address", "nonsense"], 2, "nonsense"),
        (vec!["--watch=1ms"], 2, "200ms"),
    ] {
        let output = run_ackonce(&[vec!["status"], options].concat());
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn watching_goes_on_through_a_restart_until_it_is_told_to_stop() {
    let world = World::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap().to_string();
    drop(port);
    let config = world
        .config()
        .set("admin.listen", address.as_str())
        .consumer(Consumer::orders());
    let path = world.write("watched.toml", &config.text());
    let out = world.path("watched.ndjson");
    let watcher = Command::new(env!("CARGO_BIN_EXE_ackonce"))
        .args(["status", "--watch=200ms", "--json", "--config"])
        .arg(path)
        .stdout(std::fs::File::create(&out).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let seen = |pid: u32| {
        let text = std::fs::read_to_string(&out).unwrap();
        let mut lines = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.any(|line| line["pid"] == pid)
    };
    for _ in 0..2 {
        let daemon = world.run(&config);
        eventually("it is seen", || seen(daemon.pid()));
        daemon.stop();
    }
    kill(
        Pid::from_raw(i32::try_from(watcher.id()).unwrap()),
        Signal::SIGINT,
    )
    .unwrap();
    let ended = watcher.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(0));
}
