//! The daemon's process: started, watched, signalled, killed.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{DEADLINE, eventually, try_eventually};

const BINARY: &str = env!("CARGO_BIN_EXE_ackonce");

/// Runs `ackonce ARGUMENTS` to its end.
pub fn run_ackonce<S: AsRef<std::ffi::OsStr>>(arguments: &[S]) -> Output {
    command()
        .args(arguments)
        .output()
        .expect("the binary under test starts")
}

/// What was said, on either stream.
pub fn said(output: &Output) -> String {
    let streams = [output.stdout.as_slice(), output.stderr.as_slice()];
    String::from_utf8_lossy(&streams.concat()).into_owned()
}

pub(super) fn command() -> Command {
    let mut command = Command::new(BINARY);
    command
        .env_remove("ACKONCE_FAILPOINT")
        .env_remove("ACKONCE_FAILPOINT_FILE")
        .env_remove("ACKONCE_POISON")
        .env_remove("ACKONCE_POISON_PANIC")
        .env_remove("NOTIFY_SOCKET")
        .env("RUST_LOG", "info")
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null());
    command
}

/// Where a failpoint that pauses waits.
#[derive(Debug)]
pub struct Gate {
    path: PathBuf,
}

impl Gate {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The file whose being there opens it.
    pub(super) fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Waits until a worker stands before it.
    pub fn wait_until_hit(&self) {
        eventually("a worker is paused at the failpoint", || {
            self.path.with_added_extension("hit").exists()
        });
    }

    /// Lets the worker go on.
    pub fn open(&self) {
        std::fs::write(&self.path, "").expect("the gate's file");
    }
}

/// A daemon to be started.
#[derive(Debug)]
pub struct Builder {
    command: Command,
    config: PathBuf,
    consumers: Vec<String>,
}

impl Builder {
    pub(super) fn new(config: PathBuf, consumers: Vec<String>) -> Self {
        let mut command = command();
        command.arg("run").arg("--config").arg(&config);
        Self {
            command,
            config,
            consumers,
        }
    }

    /// Runs `program` in place of `ackonce`, with the configuration's path in
    /// `PROGRAM_CONFIG`.
    #[must_use]
    pub fn program(mut self, mut program: Command) -> Self {
        for (name, value) in command().get_envs() {
            match value {
                Some(value) => program.env(name, value),
                None => program.env_remove(name),
            };
        }
        program.env("PROGRAM_CONFIG", &self.config);
        program.stdin(Stdio::null());
        self.command = program;
        self
    }

    /// Kills itself at the `nth` time it comes to the failpoint `name`.
    #[must_use]
    pub fn dies_at(mut self, name: &str, nth: u32) -> Self {
        self.command
            .env("ACKONCE_FAILPOINT", format!("{name}:{nth}"));
        self
    }

    /// Pauses the worker that comes to the failpoint `name` the `nth` time
    /// until `gate` is open.
    #[must_use]
    pub fn pauses_at(mut self, name: &str, nth: u32, gate: &Gate) -> Self {
        self.command
            .env("ACKONCE_FAILPOINT", format!("{name}:{nth}:pause"))
            .env("ACKONCE_FAILPOINT_FILE", &gate.path);
        self
    }

    /// Kills itself before it runs the handler with a body that holds `text`.
    #[must_use]
    pub fn dies_of(mut self, text: &str) -> Self {
        self.command.env("ACKONCE_POISON", text);
        self
    }

    /// Its worker panics before it runs the handler with a body that holds
    /// `text`.
    #[must_use]
    pub fn panics_of(mut self, text: &str) -> Self {
        self.command.env("ACKONCE_POISON_PANIC", text);
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Starts it, without waiting for anything.
    pub fn start(mut self) -> Daemon {
        let mut child = self
            .command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary under test starts");
        let stderr = child.stderr.take().expect("a pipe");
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                lines.lock().expect("the log").push(line);
            }
        });
        Daemon {
            child,
            config: self.config,
            consumers: self.consumers,
            log,
            reader: Some(reader),
        }
    }
}

/// A running daemon. Dropping it kills it, and shows its log when the test
/// fails.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    config: PathBuf,
    consumers: Vec<String>,
    log: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its configuration's file.
    pub fn config_path(&self) -> &Path {
        &self.config
    }

    /// Where it serves metrics and health.
    pub fn admin(&self) -> String {
        let says = "serving metrics and health";
        self.wait_for_log(&[says]);
        let log = self.log();
        let line = log.iter().find(|line| line.contains(says));
        let mut words = line.expect("the line").split_whitespace();
        let address = words.find_map(|word| word.strip_prefix("address="));
        address.expect("an address").to_owned()
    }

    /// Has it read `text` as its configuration.
    pub fn reload(&self, text: &str) {
        std::fs::write(&self.config, text).expect("the configuration's file");
        self.signal(Signal::SIGHUP);
    }

    /// Its log so far.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().expect("the log").clone()
    }

    /// Whether a line of the log has all of `parts`.
    pub fn logged(&self, parts: &[&str]) -> bool {
        self.count_logged(parts) > 0
    }

    /// How many lines of the log have all of `parts`.
    pub fn count_logged(&self, parts: &[&str]) -> usize {
        let log = self.log.lock().expect("the log");
        log.iter()
            .filter(|line| parts.iter().all(|part| line.contains(part)))
            .count()
    }

    /// How often `consumer` began to consume: one more than its reconnects.
    pub fn times_consuming(&self, consumer: &str) -> usize {
        let log = self.log.lock().expect("the log");
        let name = format!("consumer={consumer}");
        log.iter()
            .filter(|line| line.contains("consuming"))
            .filter(|line| line.split_whitespace().any(|word| word == name))
            .count()
    }

    /// Waits until every consumer consumes.
    pub fn wait_until_consuming(&self) {
        for consumer in &self.consumers {
            eventually(&format!("consumer {consumer} consumes"), || {
                self.assert_alive();
                self.times_consuming(consumer) > 0
            });
        }
    }

    /// As [`Self::wait_until_consuming`], of one whose failpoint may kill it as
    /// soon as it consumes.
    pub fn wait_until_consuming_or_killed(&mut self) {
        let consumers = self.consumers.clone();
        eventually("it consumes, or is killed", || {
            let killed = self.try_wait().is_some();
            let consumes = |consumer: &String| self.times_consuming(consumer) > 0;
            killed || consumers.iter().all(consumes)
        });
    }

    /// Waits for a line of the log that has all of `parts`.
    pub fn wait_for_log(&self, parts: &[&str]) {
        eventually(&format!("the log says {parts:?}"), || self.logged(parts));
    }

    /// Panics when the process has ended, even when nobody waited for it yet.
    pub fn assert_alive(&self) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).expect("a pid"));
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let ended = state.is_empty() || state.contains(") Z ");
        assert!(!ended, "the daemon has ended");
    }

    /// Panics when the process has ended.
    pub fn assert_running(&mut self) {
        if let Some(status) = self.try_wait() {
            panic!("the daemon has ended: {status}");
        }
    }

    /// Sends `signal`.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).expect("a pid"));
        kill(pid, signal).expect("the daemon takes a signal");
    }

    /// Stops it where it stands, at a moment when `holds` and goes on to hold:
    /// what it has just sent still arrives. It is let go on between two tries,
    /// or it would never come to rest.
    pub fn freeze_when(&self, what: &str, holds: impl Fn() -> bool) {
        eventually(what, || {
            if !holds() {
                return false;
            }
            self.signal(Signal::SIGSTOP);
            std::thread::sleep(Duration::from_millis(30));
            let held = holds();
            if !held {
                self.signal(Signal::SIGCONT);
            }
            held
        });
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait")
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        let ended = try_eventually(DEADLINE, || {
            status = self.try_wait();
            status.is_some()
        });
        assert!(ended, "the daemon has not ended after {DEADLINE:?}");
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the log's reader");
        }
        status.expect("a status")
    }

    /// Waits until its failpoint has killed it, and panics when it ended in
    /// any other way: a fault that did not happen proves nothing.
    pub fn wait_until_killed(&mut self) {
        let status = self.wait();
        assert_eq!(
            status.signal(),
            Some(Signal::SIGKILL as i32),
            "the daemon was to be killed by its failpoint: {status}"
        );
    }

    /// Kills it.
    pub fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.wait_until_killed();
    }

    /// Stops it, and panics unless it ends with exit status 0.
    pub fn stop(self) {
        self.signal(Signal::SIGTERM);
        self.wait_until_stopped();
    }

    /// Waits until it has stopped, and panics unless its exit status is 0.
    pub fn wait_until_stopped(mut self) {
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "exit status of a stop: {status}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail when it has ended, which is as good.
        drop(self.child.kill());
        drop(self.child.wait());
        if let Some(reader) = self.reader.take() {
            drop(reader.join());
        }
        if std::thread::panicking() {
            eprintln!("--- log of the daemon with pid {} ---", self.pid());
            for line in self.log() {
                eprintln!("{line}");
            }
            eprintln!("--- end of log ---");
        }
    }
}
