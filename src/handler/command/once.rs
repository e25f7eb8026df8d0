//! `mode = "once"`: a process for each message.
//!
//! The body stands whole in memory before the program starts, in a file that
//! has no name, and that file is its standard input. So a program never sees
//! part of a body, whenever the daemon dies; none can block the daemon by not
//! reading; and what it does not read is nobody's concern.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek, write};

use super::group::{Group, in_words, verdict};
use super::words::Tail;
use super::{Program, cancelled, deadline, failure, line, published_at, set, wait, would_block};
use crate::config::format_duration;
use crate::failure::{ExitFailure, Failure};
use crate::handler::{Keyed, Work};
use crate::identity::idempotency_key;
use crate::stop::Stop;

/// How long what a program has started may still speak on standard error when
/// the program itself has ended.
const LINGER: Duration = Duration::from_millis(100);

/// Most bytes read from standard error in one turn.
const READ_MAX: usize = 64 << 10;

/// Starts a process for each message.
pub(super) struct Once {
    program: Program,
    /// One that SIGKILL did not end. There is never a second.
    stuck: Option<Group>,
}

/// Why an attempt's process is waited for no more.
enum Over {
    Ended,
    Timeout,
    Cancelled,
}

impl Once {
    pub(super) fn new(program: Program) -> Self {
        Self {
            program,
            stuck: None,
        }
    }

    fn command(&self, work: &Work<'_>) -> Command {
        let mut command = self.program.command();
        let message = work.message;
        let key = idempotency_key(&self.program.consumer, work.message_id);
        set(&mut command, "ACKONCE_MESSAGE_ID", work.message_id.as_str());
        set(&mut command, "ACKONCE_IDEMPOTENCY_KEY", key);
        set(&mut command, "ACKONCE_ATTEMPT", work.attempt.to_string());
        set(&mut command, "ACKONCE_EXCHANGE", &message.exchange);
        set(&mut command, "ACKONCE_ROUTING_KEY", &message.routing_key);
        set(
            &mut command,
            "ACKONCE_REDELIVERED",
            message.redelivered.to_string(),
        );
        set(&mut command, "ACKONCE_HEADERS", line::headers(message));
        set(
            &mut command,
            "ACKONCE_BODY_BYTES",
            message.body.len().to_string(),
        );
        let until = deadline(self.program.config.timeout);
        set(&mut command, "ACKONCE_DEADLINE", format!("{until:.3}"));
        if let Some(content_type) = &message.content_type {
            set(&mut command, "ACKONCE_CONTENT_TYPE", content_type);
        }
        for (name, value) in message.about.named() {
            let name = format!("ACKONCE_{}", name.to_ascii_uppercase());
            set(&mut command, &name, value);
        }
        if let Some(published_at) = published_at(work) {
            set(
                &mut command,
                "ACKONCE_PUBLISHED_AT",
                published_at.to_string(),
            );
        }
        command
    }

    fn run(&mut self, work: &Work<'_>, cancel: &Stop) -> Result<(), Failure> {
        let not_started = |error: &std::io::Error| self.program.not_started(error);
        let body = body_file(&work.message.body).map_err(|errno| not_started(&errno.into()))?;
        let mut command = self.command(work);
        command
            .stdin(Stdio::from(body))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let until = Instant::now() + self.program.config.timeout;
        let mut group = Group::start(command).map_err(|error| not_started(&error))?;
        let mut ear = Ear::new(group.child().stderr.take()).map_err(|error| not_started(&error))?;
        let over = ear.listen(&group, until, cancel);
        let grace = match over {
            Over::Cancelled => self.program.cancel_grace(),
            Over::Timeout | Over::Ended => self.program.config.kill_after,
        };
        let ended = match over {
            Over::Ended => {
                let linger = Instant::now() + LINGER;
                while ear.is_open() && Instant::now() < linger {
                    ear.hear(linger);
                }
                true
            }
            Over::Timeout | Over::Cancelled => group.end(grace, || ear.hear(Instant::now())),
        };
        if !ended {
            let text = self.stuck_text(&group);
            self.stuck = Some(group);
            return Err(failure(ExitFailure::Timeout, text));
        }
        let status = group.reap().map_err(|error| {
            let text = format!(
                "failed to learn how the program ended: {error}: was the daemon started with \
                 SIGCHLD ignored?"
            );
            failure(ExitFailure::Start, text)
        })?;
        let kind = match over {
            Over::Cancelled => return Err(cancelled()),
            Over::Timeout => Some(ExitFailure::Timeout),
            Over::Ended => verdict(status),
        };
        let what = match over {
            Over::Timeout => format!(
                "ended after its {}: {}",
                format_duration(self.program.config.timeout),
                in_words(status)
            ),
            _ => in_words(status),
        };
        match kind {
            None => Ok(()),
            Some(kind) => Err(failure(kind, ear.tail.explain(&what))),
        }
    }

    fn stuck_text(&self, group: &Group) -> String {
        format!(
            "process {} of {} did not end when it was killed: the kernel holds it",
            group.pid(),
            self.program.config.program.display()
        )
    }
}

impl Keyed for Once {
    fn kind(&self) -> &'static str {
        "command"
    }

    fn apply(&mut self, work: &Work<'_>, cancel: &Stop) -> Result<(), Failure> {
        if let Some(group) = &self.stuck {
            if !group.has_ended() {
                return Err(failure(ExitFailure::Start, self.stuck_text(group)));
            }
            self.stuck = None;
        }
        self.run(work, cancel)
    }
}

/// The body in a file of its own, at its beginning.
fn body_file(body: &[u8]) -> Result<OwnedFd, nix::Error> {
    let file = memfd_create("ackonce-body", MFdFlags::MFD_CLOEXEC)?;
    let mut rest = body;
    while !rest.is_empty() {
        let written = write(&file, rest)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    lseek(&file, 0, Whence::SeekSet)?;
    Ok(file)
}

/// Hears standard error, and keeps the last of it.
struct Ear {
    stderr: Option<ChildStderr>,
    tail: Tail,
}

impl Ear {
    fn new(stderr: Option<ChildStderr>) -> Result<Self, std::io::Error> {
        if let Some(stderr) = &stderr {
            super::set_nonblocking(stderr)?;
        }
        Ok(Self {
            stderr,
            tail: Tail::default(),
        })
    }

    fn is_open(&self) -> bool {
        self.stderr.is_some()
    }

    /// Hears until the process has ended, its time is over or nobody waits for
    /// it.
    fn listen(&mut self, group: &Group, until: Instant, cancel: &Stop) -> Over {
        loop {
            if !self.is_open() {
                // It has closed standard error, as a rule because it ends now.
                let tick = until.min(Instant::now() + super::TICK);
                if group.ends_by(tick, || {}) {
                    return Over::Ended;
                }
            } else if group.has_ended() {
                return Over::Ended;
            }
            if cancel.is_set() {
                return Over::Cancelled;
            }
            if Instant::now() >= until {
                return Over::Timeout;
            }
            self.hear(until);
        }
    }

    /// Takes what is said by `deadline`, and not more than one turn of it.
    fn hear(&mut self, deadline: Instant) {
        let Some(stderr) = &mut self.stderr else {
            return;
        };
        wait(
            &mut [PollFd::new(stderr.as_fd(), PollFlags::POLLIN)],
            deadline,
        );
        let mut bytes = [0; 4096];
        let mut taken = 0;
        while taken < READ_MAX {
            match stderr.read(&mut bytes) {
                Ok(0) => {
                    self.stderr = None;
                    return;
                }
                Ok(read) => {
                    taken += read;
                    self.tail.push(bytes.get(..read).unwrap_or_default());
                }
                Err(error) if would_block(&error) => return,
                Err(_) => {
                    self.stderr = None;
                    return;
                }
            }
        }
    }
}
