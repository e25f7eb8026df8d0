//! The `command` handler: a program of the user's own applies the message.
//!
//! Nothing of a message ever stands in the argument vector, in the name of a
//! variable or in a shell's line: it is data on standard input and in the
//! values of variables whose names are fixed. A program runs in a process
//! group of its own, which is ended as a whole.
//!
//! With [`CommandMode::Once`] there is a process for each message, with
//! [`CommandMode::Stream`] one for each worker, which is handed one line of JSON
//! for each message and answers with one. `docs/handlers.md` is the contract.

mod group;
pub mod line;
mod once;
mod stream;
mod words;

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollTimeout, poll};

use super::{Keyed, Work};
use crate::config::checked::{CommandHandler, CommandMode, Consumer};
use crate::config::defaults;
use crate::failure::{Class, ExitFailure, Failure};

/// How often a wait looks at what no file descriptor tells: an exit, and the
/// wish to cancel.
const TICK: Duration = Duration::from_millis(20);

/// Longest time that a group has to end by itself when its attempt is
/// cancelled: somebody else may be at the message by then.
const CANCEL_GRACE: Duration = Duration::from_millis(250);

/// What a handler of `consumer` with this configuration runs.
#[must_use]
pub fn build(consumer: &Consumer, config: &CommandHandler) -> Box<dyn Keyed> {
    let program = Program {
        consumer: consumer.name.clone(),
        config: config.clone(),
    };
    match config.mode {
        CommandMode::Once => Box::new(once::Once::new(program)),
        CommandMode::Stream => Box::new(stream::Stream::new(program)),
    }
}

/// Kills what still runs of all handlers of this process: for its very end,
/// which waits for nobody.
pub fn kill_all() {
    group::kill_all();
}

/// What will be run, in words for who checks the configuration.
#[must_use]
pub fn describe(config: &CommandHandler) -> String {
    let mut text = match config.mode {
        CommandMode::Once => "for each message runs ".to_owned(),
        CommandMode::Stream => "in each worker keeps running ".to_owned(),
    };
    text.push_str(&format!("{:?}", config.program));
    for argument in &config.arguments {
        text.push_str(&format!(" {argument:?}"));
    }
    text.push_str(&format!(" in {:?}", config.working_directory));
    text
}

/// The program, as one consumer runs it.
struct Program {
    consumer: String,
    config: CommandHandler,
}

impl Program {
    /// A process to be started, with a clean environment.
    fn command(&self) -> Command {
        let config = &self.config;
        let mut command = Command::new(&config.program);
        command
            .args(&config.arguments)
            .current_dir(&config.working_directory)
            .process_group(0)
            .env_clear()
            .env("PATH", defaults::COMMAND_PATH)
            .env("ACKONCE_CONSUMER", &self.consumer);
        for (name, value) in &config.pass_env {
            if let Some(value) = value {
                command.env(name, value.expose());
            }
        }
        for (name, value) in &config.env {
            command.env(name, value.expose());
        }
        command
    }

    /// How long a group whose attempt is cancelled has from SIGTERM to SIGKILL.
    fn cancel_grace(&self) -> Duration {
        self.config.kill_after.min(CANCEL_GRACE)
    }

    /// Why no process could be started.
    fn not_started(&self, error: &std::io::Error) -> Failure {
        let config = &self.config;
        if error.raw_os_error() == Some(Errno::E2BIG as i32) {
            return Failure {
                class: Class::Permanent,
                code: None,
                text: "the message's headers are longer than the environment of a process can \
                       hold: use mode = \"stream\""
                    .to_owned(),
                retry_after: None,
            };
        }
        let hint = match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOEXEC) => ": a script needs a first line such as #!/bin/sh",
            Some(Errno::ENOENT) => {
                ": the program, its interpreter or the working directory is not there"
            }
            _ => "",
        };
        let text = format!(
            "failed to start {} in {}: {error}{hint}",
            config.program.display(),
            config.working_directory.display()
        );
        failure(ExitFailure::Start, text)
    }
}

/// A failure of the class that its kind has in [`crate::failure::EXITS`].
fn failure(kind: ExitFailure, text: String) -> Failure {
    Failure {
        class: kind.class(),
        code: Some(kind.code()),
        text,
        retry_after: None,
    }
}

/// Nobody waits for the result any more.
fn cancelled() -> Failure {
    Failure {
        class: Class::Transient,
        code: None,
        text: "the attempt was cancelled, and its processes were ended".to_owned(),
        retry_after: None,
    }
}

/// Seconds of the Unix epoch, at the end of `within` from now.
fn deadline(within: Duration) -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let at = now.unwrap_or_default().saturating_add(within);
    // To the millisecond, which a double holds for longer than time is counted.
    (at.as_secs_f64() * 1_000.0).round() / 1_000.0
}

/// Seconds of the Unix epoch at which the message was published.
fn published_at(work: &Work<'_>) -> Option<i64> {
    work.message.published_seconds()
}

/// Sets a variable that a message fills. No value can hold a NUL byte.
fn set(command: &mut Command, name: &str, value: impl AsRef<str>) {
    let value = value.as_ref();
    match value.contains('\0') {
        true => command.env(name, value.replace('\0', "\u{fffd}")),
        false => command.env(name, OsStr::new(value)),
    };
}

fn set_nonblocking(fd: impl AsFd) -> Result<(), std::io::Error> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// Waits until one of `fds` is ready, at most until `deadline` and no longer
/// than [`TICK`]. A signal or an error ends it early, which costs a turn.
fn wait(fds: &mut [PollFd<'_>], deadline: Instant) {
    let left = deadline.saturating_duration_since(Instant::now()).min(TICK);
    // Rounded up: a wait of 0 ms would spin.
    let millis = u16::try_from(left.as_micros().div_ceil(1_000)).unwrap_or(u16::MAX);
    if let Err(error) = poll(fds, PollTimeout::from(millis))
        && error != Errno::EINTR
    {
        std::thread::sleep(left);
    }
}

/// Whether a read that failed may be tried again.
fn would_block(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
    )
}
