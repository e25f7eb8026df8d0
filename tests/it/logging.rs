//! A standard error that takes nothing costs lines, and neither messages nor
//! the stop.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::fs::{File, OpenOptions};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Child, Command, Stdio};

use crate::common::admin::{read_reply, request};
use crate::common::{ORDERS, World, eventually, numbered, numbered_ids, random};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

const BINARY: &str = env!("CARGO_BIN_EXE_ackonce");

/// A daemon with a standard error of the test's choice.
struct Mute {
    world: World,
    child: Child,
    address: String,
}

impl Mute {
    fn start(stderr: impl Into<Stdio>) -> Self {
        let world = World::new();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
        let address = port.unwrap().to_string();
        let config = world.orders().set("admin.listen", address.as_str());
        let config = world.write("mute.toml", &config.text());
        let child = Command::new(BINARY)
            .args(["run", "--config"])
            .arg(config)
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        Self {
            world,
            child,
            address,
        }
    }

    /// Sends `count` messages, once there is a queue to take them.
    fn applies(&self, count: usize) {
        eventually("the daemon is ready", || self.page("/readyz").0 == 200);
        self.world.broker.send(ORDERS, numbered("m", count));
        self.world.wait_for_effects(i64::try_from(count).unwrap());
        self.world
            .assert_each_applied_once(&numbered_ids("m", count));
    }

    fn page(&self, path: &str) -> (u16, String) {
        let Ok(mut stream) = std::net::TcpStream::connect(&self.address) else {
            return (0, String::new());
        };
        stream.write_all(&request("GET", path)).unwrap();
        let reply = read_reply(&mut stream);
        (reply.status, reply.body)
    }

    fn dropped(&self) -> u64 {
        let (_, text) = self.page("/metrics");
        let name = "ackonce_log_lines_dropped_total ";
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.expect("the metric").parse().unwrap()
    }

    /// Ends it by one SIGTERM.
    fn stops(mut self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
        let mut ended = None;
        eventually("the daemon stops", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        assert_eq!(ended.unwrap().code(), Some(0));
    }
}

impl Drop for Mute {
    fn drop(&mut self) {
        // Both fail when it has ended, which is as good.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A pipe with no room for another byte.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let set = |flags| fcntl(&writer, FcntlArg::F_SETFL(flags)).unwrap();
    set(OFlag::O_NONBLOCK);
    while (&writer).write(b"\n").is_ok() {}
    set(OFlag::empty());
    writer.flush().unwrap();
    (reader, writer)
}

#[test]
fn a_full_pipe_that_nobody_reads_holds_up_no_message_and_no_stop() {
    let (_reader, writer) = full_pipe();
    let daemon = Mute::start(writer);
    daemon.applies(100);
    daemon.stops();
}

#[test]
fn lines_that_were_dropped_are_counted_and_told_once_somebody_reads() {
    let path = std::env::temp_dir().join(format!("ackonce-log-{:016x}", random()));
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    // A writer cannot open it without a reader, who then goes away.
    let mut first = OpenOptions::new();
    let first = first.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let first = first.open(&path).unwrap();
    let writer = OpenOptions::new().write(true).open(&path).unwrap();
    drop(first);
    let daemon = Mute::start(writer);
    daemon.applies(10);
    assert!(daemon.dropped() > 0);
    let mut reader = File::open(&path).unwrap();
    daemon.stops();
    let mut log = String::new();
    reader.read_to_string(&mut log).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(log.contains("lines of the log were dropped"), "{log}");
}

#[test]
fn a_closed_pipe_and_a_full_disk_cost_lines_alone() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let full_disk = OpenOptions::new().write(true).open("/dev/full").unwrap();
    for stderr in [Stdio::from(writer), Stdio::from(full_disk)] {
        let daemon = Mute::start(stderr);
        daemon.applies(100);
        assert!(daemon.dropped() > 0);
        daemon.stops();
    }
}
