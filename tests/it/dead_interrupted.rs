//! The dead-letter desk, interrupted: no letter is lost, and none is gone that
//! was not written down.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::common::{
    Config, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered, numbered_ids, run_ackonce,
};
use amiquip::{AmqpValue, FieldTable, QueueDeclareOptions};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LETTERS: usize = 10_000;

fn config(world: &World, kind: &str) -> Config {
    let orders = crate::common::Consumer::orders().set("topology.queue_type", kind);
    world.config().consumer(orders)
}

/// A desk in the middle of its work.
struct Desk {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Desk {
    fn start(world: &World, config: &Config, arguments: &[&str]) -> Self {
        let path = world.write("config.toml", &config.text());
        let mut child = Command::new(env!("CARGO_BIN_EXE_ackonce"))
            .arg("dead")
            .args(arguments)
            .arg("--config")
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stderr }
    }

    /// Waits for a line that has `part`: it stands in the middle then.
    fn wait_for(&mut self, part: &str) {
        let mut line = String::new();
        while self.stderr.read_line(&mut line).unwrap() > 0 {
            if line.contains(part) {
                return;
            }
            line.clear();
        }
        panic!("it ended before it said {part:?}");
    }

    fn end(mut self, signal: Signal) -> ExitStatus {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
        // It may have more to say than a pipe holds.
        std::io::copy(&mut self.stderr, &mut std::io::sink()).unwrap();
        self.child.wait().unwrap()
    }
}

fn ids(world: &World) -> Vec<String> {
    let letters = world.broker.take(ORDERS_DEAD);
    letters
        .iter()
        .map(|letter| letter.id().unwrap().to_owned())
        .collect()
}

fn wait_until_back(world: &World) {
    eventually("all letters are back", || {
        world.broker.ready(ORDERS_DEAD) as usize == LETTERS
    });
}

#[test]
fn a_list_that_is_stopped_leaves_all_letters_in_their_order() {
    for kind in ["quorum", "classic"] {
        let world = World::new();
        let config = config(&world, kind);
        world.prepare(&config);
        world.broker.send(ORDERS_DEAD, numbered("letter", LETTERS));
        let mut desk = Desk::start(&world, &config, &["list", ORDERS]);
        desk.wait_for("of 10000 letters read");
        assert_eq!(desk.end(Signal::SIGINT).code(), Some(1));
        assert_eq!(world.broker.ready(ORDERS_DEAD) as usize, LETTERS);
        assert_eq!(ids(&world), numbered_ids("letter", LETTERS), "{kind}");
    }
}

#[test]
fn a_list_that_is_killed_loses_no_letter() {
    for kind in ["quorum", "classic"] {
        let world = World::new();
        let config = config(&world, kind);
        world.prepare(&config);
        world.broker.send(ORDERS_DEAD, numbered("letter", LETTERS));
        for _ in 0..2 {
            let mut desk = Desk::start(&world, &config, &["list", ORDERS]);
            desk.wait_for("of 10000 letters read");
            assert_eq!(desk.end(Signal::SIGKILL).code(), None);
            wait_until_back(&world);
        }
        let left: BTreeSet<String> = ids(&world).into_iter().collect();
        assert_eq!(
            left,
            numbered_ids("letter", LETTERS).into_iter().collect(),
            "{kind}"
        );
    }
}

#[test]
fn a_list_whose_connection_is_closed_says_so_and_loses_no_letter() {
    // So many that it cannot be through before it is stopped.
    const MANY: usize = 5 * LETTERS;
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    world.broker.send(ORDERS_DEAD, numbered("letter", MANY));
    let mut desk = Desk::start(&world, &config, &["list", ORDERS]);
    desk.wait_for("letters read");
    desk.stop_still();
    // The management API may not know of it yet.
    eventually("its connection is closed", || {
        let its = world.management.connection_of(world.name(), "dead list");
        its.is_some_and(|name| world.management.close_connection(&name))
    });
    assert_eq!(desk.go_on_to_the_end().code(), Some(69));
    eventually("all letters are back", || {
        world.broker.ready(ORDERS_DEAD) as usize == MANY
    });
}

impl Desk {
    fn stop_still(&self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGSTOP).unwrap();
    }

    fn go_on_to_the_end(self) -> ExitStatus {
        self.end(Signal::SIGCONT)
    }
}

#[test]
fn a_drop_that_is_killed_has_written_down_all_that_is_gone_and_can_go_on() {
    for kind in ["quorum", "classic"] {
        let world = World::new();
        let config = config(&world, kind);
        world.prepare(&config);
        world.broker.send(ORDERS_DEAD, numbered("letter", LETTERS));
        let first = world.path("first.ndjson");
        let drop = |file: &std::path::Path| -> Vec<String> {
            let file = file.to_str().unwrap().to_owned();
            [
                "drop",
                ORDERS,
                "--all",
                "--because",
                "test",
                "--yes",
                "--export",
            ]
            .map(str::to_owned)
            .into_iter()
            .chain([file])
            .collect()
        };
        let arguments = drop(&first);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut desk = Desk::start(&world, &config, &arguments);
        desk.wait_for("of 10000 letters read");
        assert_eq!(desk.end(Signal::SIGKILL).code(), None);
        let written = |path: &std::path::Path| -> BTreeSet<String> {
            let text = std::fs::read_to_string(path).unwrap();
            let lines = text.lines().filter_map(|line| {
                let letter: serde_json::Value = serde_json::from_str(line).ok()?;
                Some(letter["id"].as_str().unwrap().to_owned())
            });
            lines.collect()
        };
        let gone = written(&first);
        assert!(!gone.is_empty() && gone.len() < LETTERS, "{}", gone.len());
        let noted: BTreeSet<String> = world
            .db
            .texts("select message_id from ackonce.desk_letter")
            .into_iter()
            .collect();
        assert!(noted.is_subset(&gone));

        // What the first one held comes back when its connection is gone, and
        // only the broker knows when that is.
        let config_path = world.write("config.toml", &config.text());
        let mut both = gone;
        let mut round = 0;
        eventually("all are dropped", || {
            round += 1;
            let path = world.path(&format!("more-{round}.ndjson"));
            let arguments = drop(&path);
            let mut all: Vec<&str> = vec!["dead"];
            all.extend(arguments.iter().map(String::as_str));
            all.extend(["--config", config_path.to_str().unwrap()]);
            let output = run_ackonce(&all);
            assert_eq!(output.status.code(), Some(0), "{output:?}");
            if path.exists() {
                both.extend(written(&path));
            }
            both.len() == LETTERS && world.broker.is_empty(ORDERS_DEAD)
        });
        let expected: BTreeSet<String> = numbered_ids("letter", LETTERS).into_iter().collect();
        assert_eq!(both, expected, "{kind}");
    }
}

/// Has the letter in the dead-letter queue come back so many times.
fn return_often(world: &World, times: usize) {
    let channel = world.broker.channel();
    for _ in 0..times {
        eventually("it is back", || world.broker.ready(ORDERS_DEAD) == 1);
        let got = channel.basic_get(ORDERS_DEAD, false).unwrap().unwrap();
        got.delivery.reject(&channel, true).unwrap();
    }
    eventually("it is back", || world.broker.ready(ORDERS_DEAD) == 1);
}

fn list(world: &World, config: &Config, more: &[&str]) -> std::process::Output {
    let path = world.write("config.toml", &config.text());
    let arguments = ["dead", "list", ORDERS, "--config", path.to_str().unwrap()];
    run_ackonce(&[&arguments[..], more].concat())
}

fn broker_has_a_limit_of_its_own(world: &World) -> bool {
    let overview = world.management.get("/api/overview");
    let version = overview["rabbitmq_version"].as_str().unwrap();
    version.split('.').next().unwrap().parse::<u32>().unwrap() >= 4
}

#[test]
fn a_dead_letter_queue_of_the_daemons_keeps_what_comes_back_any_number_of_times() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    world.broker.send(ORDERS_DEAD, [Msg::new("often")]);
    return_often(&world, 30);
    let output = list(&world, &config, &[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(ids(&world), ["often"]);
}

#[test]
fn a_letter_that_one_more_look_could_cost_is_not_looked_at() {
    let world = World::new();
    let config = config(&world, "quorum");
    // As an older version made it: without a word about limits.
    let kind = AmqpValue::LongString("quorum".to_owned());
    let options = QueueDeclareOptions {
        durable: true,
        arguments: FieldTable::from([("x-queue-type".to_owned(), kind)]),
        ..QueueDeclareOptions::default()
    };
    world
        .broker
        .channel()
        .queue_declare(ORDERS_DEAD, options)
        .unwrap();
    world.prepare(&config);
    world.broker.send(ORDERS_DEAD, [Msg::new("often")]);
    return_often(&world, 16);
    let output = list(&world, &config, &[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match broker_has_a_limit_of_its_own(&world) {
        true => {
            assert_eq!(output.status.code(), Some(78), "{said}");
            assert!(said.contains("set_policy") && said.contains("--despite-delivery-limit"));
            let output = list(&world, &config, &["--despite-delivery-limit"]);
            assert_eq!(output.status.code(), Some(0), "{output:?}");
        }
        false => assert_eq!(output.status.code(), Some(0), "{said}"),
    }
    assert_eq!(ids(&world), ["often"]);
}

/// Runs `ackonce dead ARGUMENTS` on a terminal, answers its question, and
/// returns its status and all that it showed.
fn on_a_terminal(
    world: &World,
    config: &Config,
    arguments: &[&str],
    answer: &str,
) -> (i32, String) {
    let path = world.write("config.toml", &config.text());
    let pty = nix::pty::openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut child = Command::new(env!("CARGO_BIN_EXE_ackonce"))
        .arg("dead")
        .args(arguments)
        .arg("--config")
        .arg(path)
        .env("TERM", "xterm")
        .stdin(end())
        .stdout(end())
        .stderr(end())
        .spawn()
        .unwrap();
    drop(pty.slave);
    let mut terminal = std::fs::File::from(pty.master);
    std::io::Write::write_all(&mut terminal, answer.as_bytes()).unwrap();
    let mut shown = Vec::new();
    // A terminal whose other side is closed ends in an error.
    std::io::Read::read_to_end(&mut terminal, &mut shown).ok();
    let status = child.wait().unwrap().code().unwrap();
    (status, String::from_utf8_lossy(&shown).into_owned())
}

#[test]
fn on_a_terminal_it_asks_and_shows_a_bar() {
    let world = World::new();
    let config = config(&world, "quorum");
    world.prepare(&config);
    world.broker.send(ORDERS_DEAD, numbered("letter", LETTERS));
    let drop = [
        "drop",
        ORDERS,
        "--id",
        "letter-7",
        "--no-export",
        "--because",
        "test",
    ];
    for answer in ["n\n", "\n", "perhaps\n"] {
        let (status, shown) = on_a_terminal(&world, &config, &drop, answer);
        assert_eq!(status, 1, "{shown}");
        assert!(
            shown.contains("drop these 1 letters from queue orders.dead? [y/N]"),
            "{shown}"
        );
        assert!(shown.contains("nothing was done"), "{shown}");
        assert_eq!(world.broker.ready(ORDERS_DEAD) as usize, LETTERS);
    }
    let (status, shown) = on_a_terminal(&world, &config, &drop, "y\n");
    assert_eq!(status, 0, "{shown}");
    assert!(
        shown.contains("letters read") && shown.contains('█'),
        "{shown}"
    );
    assert!(
        !shown.contains("ackonce: 3408 of"),
        "no plain lines beside the bar: {shown}"
    );
    assert_eq!(world.broker.ready(ORDERS_DEAD) as usize, LETTERS - 1);
}
