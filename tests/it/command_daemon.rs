//! Commands in the daemon: what their ends mean for the message, and that they
//! take effect once, and leave nothing behind, whatever dies.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use crate::common::program::{passed_on, processes, running_with, write_program};
use crate::common::{
    Config, Consumer, Daemon, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered, numbered_ids,
    run_ackonce,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Both modes, by the same rules: a line in `calls` for each call, and a folder
/// in `effects` for each key. The body says what else to do.
const ONCE: &str = r#"#!/bin/sh
body=$(cat)
echo "$ACKONCE_MESSAGE_ID" >> "$OUT/calls"
case "$body" in
    exit*) [ -e "$OUT/mended" ] || exit "${body#exit }" ;;
    kill*) [ -e "$OUT/mended" ] || kill "${body#kill }" $$ ;;
    sleep) sleep 1000; sleep 1000 ;;
esac
mkdir "$OUT/effects/$ACKONCE_MESSAGE_ID" 2>/dev/null || echo "again $ACKONCE_MESSAGE_ID" >> "$OUT/again"
"#;

const STREAM: &str = r#"#!/usr/bin/env python3
import json, os, signal, sys, time
out = os.environ["OUT"]
def note(name, text):
    with open(out + "/" + name, "a") as file:
        file.write(text + "\n")
if os.path.exists(out + "/deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"ready":true}', flush=True)
for line in sys.stdin:
    m = json.loads(line)
    body, id = m["body"], m["message_id"]
    note("calls", id)
    answer = {"id": m["id"], "outcome": "done"}
    if not os.path.exists(out + "/mended"):
        if body.startswith("exit "):
            sys.exit(int(body[5:]))
        if body.startswith("kill "):
            os.kill(os.getpid(), int(body[5:]))
        if body.startswith("say "):
            answer["outcome"] = body[4:]
            answer["error"] = "as told"
    if body == "sleep":
        time.sleep(1000)
    if answer["outcome"] == "done":
        try:
            os.mkdir(out + "/effects/" + id)
        except FileExistsError:
            note("again", id)
    print(json.dumps(answer), flush=True)
while os.path.exists(out + "/deaf"):
    time.sleep(1)
"#;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Once,
    Stream,
}

struct Stage {
    world: World,
    mode: Mode,
}

impl Stage {
    fn new(mode: Mode) -> Self {
        let world = World::new();
        std::fs::create_dir(world.path("effects")).unwrap();
        let text = match mode {
            Mode::Once => ONCE,
            Mode::Stream => STREAM,
        };
        write_program(&world.path("program"), text);
        Self { world, mode }
    }

    fn consumer(&self) -> Consumer {
        let mode = format!("{:?}", self.mode).to_lowercase();
        Consumer::orders()
            .handler("command")
            .set("handler.mode", mode)
            .set(
                "handler.argv",
                vec![self.world.path("program").to_str().unwrap()],
            )
            .set("handler.env.OUT", self.world.folder().to_str().unwrap())
            .set("handler.kill_after", "300ms")
            .set("workers", 2)
            .max_attempts(2)
    }

    fn config(&self) -> Config {
        self.world.config().consumer(self.consumer())
    }

    fn send(&self, id: &str, body: &str) {
        self.world.broker.send(ORDERS, [Msg::new(id).body(body)]);
    }

    fn effects(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.world.path("effects")).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    fn calls(&self, id: &str) -> usize {
        let calls = std::fs::read_to_string(self.world.path("calls")).unwrap_or_default();
        calls.lines().filter(|line| *line == id).count()
    }

    fn mark(&self) -> String {
        format!("OUT={}", self.world.folder().display())
    }

    /// Waits until nothing runs that a handler started.
    fn wait_for_quiet(&self) {
        eventually("no program runs", || running_with(&self.mark()).is_empty());
    }

    /// Waits until the handler has answered for `ids`, and that is written down.
    fn wait_until_done(&self, ids: &[&str]) {
        eventually(&format!("{ids:?} are done"), || {
            let done = self.world.db.ledger(ORDERS);
            ids.iter().all(|id| done.iter().any(|other| other == id))
        });
    }

    fn wait_for_effect(&self, id: &str) {
        eventually(&format!("{id} takes effect"), || {
            self.effects().contains(id)
        });
    }
}

/// The journal's rows about `id`: class and code of each attempt.
fn attempts(world: &World, id: &str) -> Vec<String> {
    world.db.texts(&format!(
        "select class || ' ' || coalesce(code, '-') from ackonce.failure \
         where message_id = '{id}' order by id"
    ))
}

#[test]
fn how_a_program_ends_decides_what_becomes_of_the_message() {
    let stage = Stage::new(Mode::Once);
    let world = &stage.world;
    let consumer = stage.consumer().failures("permanent", &["4", "signal 11"]);
    let config = world.config().consumer(consumer);
    let daemon = world.run(&config);
    let ends = [
        ("exit 65", "permanent 65", 1),
        ("exit 75", "transient 75", 2),
        ("exit 3", "transient 3", 2),
        ("exit 44", "transient 44", 2),
        ("exit 4", "permanent 4", 1),
        ("kill -9", "transient signal 9", 2),
        ("kill -11", "permanent signal 11", 1),
    ];
    for (body, _, _) in ends {
        stage.send(&body.replace(' ', "_"), body);
    }
    stage.send("good", "x");
    world.broker.wait_for_dead(ORDERS_DEAD, ends.len());
    for (body, row, count) in ends {
        let id = body.replace(' ', "_");
        assert_eq!(attempts(world, &id), vec![row; count], "{body}");
        assert_eq!(stage.calls(&id), count, "{body}");
    }
    stage.wait_for_effect("good");
    daemon.stop();
    assert_eq!(stage.effects(), BTreeSet::from(["good".to_owned()]));
}

#[test]
fn what_a_stream_answers_decides_what_becomes_of_the_message() {
    let stage = Stage::new(Mode::Stream);
    let world = &stage.world;
    let daemon = world.run(&stage.config());
    let ends = [
        ("say reject", "permanent -", 1),
        ("say retry", "transient -", 2),
        ("say nonsense", "transient broken", 2),
        ("exit 65", "transient broken", 2),
        ("exit 0", "transient broken", 2),
        ("kill 9", "transient broken", 2),
    ];
    for (body, _, _) in ends {
        stage.send(&body.replace(' ', "_"), body);
        stage.send(&format!("after_{}", body.replace(' ', "_")), "x");
    }
    world.broker.wait_for_dead(ORDERS_DEAD, ends.len());
    for (body, row, count) in ends {
        let id = body.replace(' ', "_");
        assert_eq!(attempts(world, &id), vec![row; count], "{body}");
        stage.wait_for_effect(&format!("after_{id}"));
    }
    daemon.stop();
    assert_eq!(stage.effects().len(), ends.len());
    stage.wait_for_quiet();
}

#[test]
fn a_program_that_blames_the_world_pauses_the_consumer_and_costs_no_attempt() {
    for (mode, body) in [
        (Mode::Once, "exit 77"),
        (Mode::Once, "exit 78"),
        (Mode::Once, "exit 126"),
        (Mode::Once, "exit 127"),
        (Mode::Stream, "say pause"),
    ] {
        let stage = Stage::new(mode);
        let world = &stage.world;
        let daemon = world.run(&stage.config());
        stage.send("m", body);
        eventually("it is tried again and again", || stage.calls("m") >= 4);
        world.write("mended", "");
        stage.wait_for_effect("m");
        daemon.stop();
        assert!(attempts(world, "m").is_empty(), "{body}");
        assert!(world.broker.is_empty(ORDERS_DEAD), "{body}");
    }
}

#[test]
fn a_program_that_is_gone_pauses_the_consumer_until_it_is_back() {
    for mode in [Mode::Once, Mode::Stream] {
        let stage = Stage::new(mode);
        let world = &stage.world;
        let daemon = world.run(&stage.config());
        let program = world.path("program");
        let away = world.path("away");
        std::fs::rename(&program, &away).unwrap();
        world.broker.send(ORDERS, numbered("m", 20));
        daemon.wait_for_log(&["paused", "orders"]);
        std::fs::rename(&away, &program).unwrap();
        eventually("all take effect", || stage.effects().len() == 20);
        daemon.stop();
        assert!(world.db.failures(ORDERS).is_empty());
        assert!(world.broker.is_empty(ORDERS_DEAD));
    }
}

/// Where the receiver honours the key, that is exactly once.
#[test]
fn killed_at_any_step_each_message_takes_effect_once() {
    const SENT: usize = 12;
    for mode in [Mode::Once, Mode::Stream] {
        let stage = Stage::new(mode);
        let world = &stage.world;
        let config = stage.config();
        world.prepare(&config);
        let steps = [
            "received", "claimed", "leased", "called", "done", "marked", "settled",
        ];
        for step in steps {
            world.broker.send(ORDERS, numbered(step, SENT));
            world
                .daemon(&config)
                .dies_at(step, 2)
                .start()
                .wait_until_killed();
        }
        world.drain(&config, ORDERS);
        stage.wait_for_quiet();
        let all: BTreeSet<String> = steps
            .iter()
            .flat_map(|step| numbered_ids(step, SENT))
            .collect();
        assert_eq!(stage.effects(), all, "{mode:?}");
        assert_eq!(world.db.ledger(ORDERS).len(), all.len());
        assert!(world.broker.is_empty(ORDERS_DEAD));
    }
}

/// Whether something waits in the pipe that is a process's standard input.
fn has_unread_input(pid: Pid) -> bool {
    let pipe = std::fs::File::open(format!("/proc/{pid}/fd/0")).unwrap();
    let mut watched = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    poll(&mut watched, PollTimeout::ZERO).unwrap() == 1
}

#[test]
fn a_stream_program_that_is_killed_costs_its_message_one_attempt() {
    let stage = Stage::new(Mode::Stream);
    let world = &stage.world;
    let consumer = stage.consumer().set("workers", 1);
    let daemon = world.run(&world.config().consumer(consumer));
    stage.send("before", "x");
    stage.wait_until_done(&["before"]);
    for round in ["first", "second"] {
        let [program] = &running_with(&stage.mark())[..] else {
            panic!("one program");
        };
        let pid = Pid::from_raw(program.pid);
        // In its hands when it is killed, and in nobody's.
        if round == "first" {
            kill(pid, Signal::SIGSTOP).unwrap();
            stage.send("m", "x");
            eventually("it is handed over", || has_unread_input(pid));
        }
        kill(pid, Signal::SIGKILL).unwrap();
        eventually("it is gone", || {
            let others = running_with(&stage.mark());
            others.iter().all(|other| other.pid != program.pid)
        });
        stage.send(round, "x");
        stage.wait_until_done(&["m", round]);
    }
    daemon.stop();
    assert_eq!(attempts(world, "m"), ["transient broken"]);
    assert_eq!(world.db.failures(ORDERS).len(), 1, "and no other");
    stage.wait_for_quiet();
}

fn stops(mut daemon: Daemon, signals: usize) -> Option<i32> {
    for _ in 0..signals {
        daemon.signal(Signal::SIGTERM);
        daemon.wait_for_log(&["told to stop"]);
    }
    daemon.wait().code()
}

#[test]
fn a_stop_leaves_no_process_behind() {
    // A deaf one ignores the end of its input and SIGTERM.
    for deaf in [false, true] {
        for timeout in ["200ms", "20s"] {
            let stage = Stage::new(Mode::Stream);
            let world = &stage.world;
            if deaf {
                world.write("deaf", "");
            }
            let config = stage.config().set("daemon.shutdown_timeout", timeout);
            let daemon = world.run(&config);
            world.broker.send(ORDERS, numbered("m", 10));
            eventually("all take effect", || stage.effects().len() == 10);
            assert!(!running_with(&stage.mark()).is_empty());
            assert_eq!(stops(daemon, 1), Some(0));
            // An orphan would run for ever.
            stage.wait_for_quiet();
        }
    }
}

#[test]
fn a_program_that_outlasts_the_stop_is_ended_and_its_message_given_back() {
    for mode in [Mode::Once, Mode::Stream] {
        let stage = Stage::new(mode);
        let world = &stage.world;
        let config = stage.config().set("daemon.shutdown_timeout", "2s");
        let daemon = world.run(&config);
        stage.send("m", "sleep");
        eventually("it has begun", || stage.calls("m") == 1);
        assert_eq!(stops(daemon, 1), Some(0));
        stage.wait_for_quiet();
        eventually("it is back", || world.broker.ready(ORDERS) == 1);
        assert!(world.db.failures(ORDERS).is_empty());
        assert_eq!(world.db.count("select count(*) from ackonce.claim"), 0);
    }
}

#[test]
fn a_second_signal_ends_the_programs_too() {
    for mode in [Mode::Once, Mode::Stream] {
        let stage = Stage::new(mode);
        let daemon = stage.world.run(&stage.config());
        stage.send("m", "sleep");
        eventually("it has begun", || stage.calls("m") == 1);
        daemon.signal(Signal::SIGTERM);
        daemon.wait_for_log(&["told to stop:"]);
        assert_eq!(stops(daemon, 1), Some(130));
        stage.wait_for_quiet();
    }
}

/// Said on the page about handlers: nobody is left to end it.
#[test]
fn a_killed_daemon_leaves_a_program_to_itself_and_a_stream_its_end_of_input() {
    let stage = Stage::new(Mode::Stream);
    let daemon = stage.world.run(&stage.config());
    stage.send("m", "x");
    stage.wait_for_effect("m");
    daemon.kill();
    stage.wait_for_quiet();

    let stage = Stage::new(Mode::Once);
    let daemon = stage.world.run(&stage.config());
    stage.send("m", "sleep");
    eventually("it has begun", || stage.calls("m") == 1);
    daemon.kill();
    let left = running_with(&stage.mark());
    assert!(!left.is_empty());
    for process in left {
        kill(Pid::from_raw(process.pid), Signal::SIGKILL).ok();
    }
    stage.wait_for_quiet();
}

/// With all its connections, logs and pipes open.
#[test]
fn the_daemon_passes_no_file_descriptor_and_no_variable_of_its_own_on() {
    for mode in [Mode::Once, Mode::Stream] {
        let stage = Stage::new(mode);
        let world = &stage.world;
        let inherited: BTreeSet<i32> = passed_on("self").into_iter().collect();
        let daemon = world.run(&stage.config());
        stage.send("done", "x");
        stage.wait_for_effect("done");
        stage.send("m", "sleep");
        eventually("it has begun", || stage.calls("m") == 1);
        let own: BTreeSet<i32> = passed_on(&daemon.pid().to_string()).into_iter().collect();
        let allowed: BTreeSet<i32> = inherited
            .union(&BTreeSet::from([0, 1, 2]))
            .copied()
            .collect();
        assert!(own.is_subset(&allowed), "{own:?}, allowed {allowed:?}");
        let programs = running_with(&stage.mark());
        assert!(!programs.is_empty());
        for program in programs {
            let environ = std::fs::read(format!("/proc/{}/environ", program.pid)).unwrap();
            let environ = String::from_utf8_lossy(&environ).into_owned();
            for secret in [
                "ACKONCE_POSTGRES_URL",
                "ACKONCE_AMQP_URL",
                "RUST_LOG",
                "://",
            ] {
                assert!(!environ.contains(secret), "{environ:?}");
            }
        }
        let daemons = i32::try_from(daemon.pid()).unwrap();
        let zombies = processes();
        let zombies = zombies
            .iter()
            .filter(|p| p.parent == daemons && p.state == 'Z');
        assert_eq!(zombies.count(), 0);
        drop(daemon);
        for process in running_with(&stage.mark()) {
            kill(Pid::from_raw(process.pid), Signal::SIGKILL).ok();
        }
        stage.wait_for_quiet();
    }
}

#[test]
fn check_says_what_will_be_run_and_refuses_what_cannot() {
    let stage = Stage::new(Mode::Once);
    let world = &stage.world;
    world.prepare(&stage.config());
    let path = world.write("check.toml", &stage.config().text());
    let output = run_ackonce(&["check", "--config", path.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let program = world.path("program");
    let runs = format!(
        "for each message runs {:?} in \"/\"",
        program.to_str().unwrap()
    );
    assert!(text.contains(&runs), "{text}");
    std::fs::remove_file(&program).unwrap();
    let output = run_ackonce(&["check", "--offline", "--config", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("`argv` names a program that is not to be had"),
        "{text}"
    );
}
