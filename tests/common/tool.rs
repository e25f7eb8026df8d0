//! A subcommand of the binary under test that takes its time: started,
//! watched, signalled, killed.

use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Config, Gate, World, daemon};

/// `ackonce ARGUMENTS --config FILE`, to be started.
#[derive(Debug)]
pub struct Tool {
    command: Command,
}

/// One that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

/// What it said, and how it ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit status; `None` when a signal ended it.
    pub code: Option<i32>,
    /// The signal.
    pub signal: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Tool {
    /// With a configuration of `world`.
    pub fn new(world: &World, config: &Config, arguments: &[&str]) -> Self {
        let path = world.write("tool.toml", &config.text());
        let mut command = daemon::command();
        command.args(arguments).arg("--config").arg(path);
        Self { command }
    }

    /// Kills itself at the `nth` time it comes to the failpoint `name`.
    #[must_use]
    pub fn dies_at(mut self, name: &str, nth: usize) -> Self {
        self.command
            .env("ACKONCE_FAILPOINT", format!("{name}:{nth}"));
        self
    }

    /// Pauses at the `nth` time it comes to the failpoint `name`, until `gate`
    /// is open.
    #[must_use]
    pub fn pauses_at(mut self, name: &str, nth: usize, gate: &Gate) -> Self {
        self.command
            .env("ACKONCE_FAILPOINT", format!("{name}:{nth}:pause"))
            .env("ACKONCE_FAILPOINT_FILE", gate.path());
        self
    }

    /// Starts it.
    pub fn start(mut self) -> Running {
        let mut child = self
            .command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary under test starts");
        let stdout = child.stdout.take().map(read);
        let stderr = child.stderr.take().map(read);
        Running {
            child,
            stdout,
            stderr,
        }
    }

    /// Runs it to its end.
    pub fn run(self) -> Ended {
        self.start().wait()
    }
}

fn read(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        from.read_to_end(&mut all).expect("a pipe");
        all
    })
}

impl Running {
    /// Sends `signal`.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        kill(pid, signal).expect("it takes a signal");
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ended {
        let ended = super::try_eventually(super::DEADLINE, || !self.is_running());
        if !ended {
            self.child.kill().ok();
        }
        let status = self.child.wait().expect("wait");
        let text = |reader: Option<JoinHandle<Vec<u8>>>| {
            let bytes = reader.map(|reader| reader.join().expect("the reader"));
            String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
        };
        let end = Ended {
            code: status.code(),
            signal: status.signal(),
            out: text(self.stdout.take()),
            err: text(self.stderr.take()),
        };
        assert!(ended, "it did not end by itself: {end:?}");
        end
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has ended, which is as good.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Ended {
    /// Panics, with what it said, unless it ended with exit status `code`.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            Some(code),
            "signal {:?}\n--- stdout ---\n{}\n--- stderr ---\n{}",
            self.signal,
            self.out,
            self.err
        );
        self
    }

    /// Panics unless its failpoint has killed it.
    #[track_caller]
    pub fn expect_killed(self) -> Self {
        assert_eq!(
            self.signal,
            Some(Signal::SIGKILL as i32),
            "exit status {:?}\n--- stdout ---\n{}\n--- stderr ---\n{}",
            self.code,
            self.out,
            self.err
        );
        self
    }

    /// Panics unless its standard error or output has all of `parts`.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            assert!(
                self.out.contains(part) || self.err.contains(part),
                "{part:?} is not in\n--- stdout ---\n{}\n--- stderr ---\n{}",
                self.out,
                self.err
            );
        }
        self
    }

    /// The lines of its standard output, as JSON.
    pub fn json(&self) -> Vec<serde_json::Value> {
        let parse = |line: &str| {
            serde_json::from_str(line).unwrap_or_else(|e| panic!("not JSON: {line}: {e}"))
        };
        self.out.lines().map(parse).collect()
    }
}
