//! A process with a group of its own, which is ended as a whole and leaves no
//! zombie behind.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::TICK;
use crate::failure::ExitFailure;

/// How long a killed process may take to be gone. Only one that the kernel
/// itself holds, as on a dead network file system, takes longer.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// The first of the waits for an exit, each twice as long as the one before.
const SHORTEST_WAIT: Duration = Duration::from_micros(50);

/// Leaders of the groups that are not reaped.
static LIVING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn living() -> MutexGuard<'static, BTreeSet<i32>> {
    LIVING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills every group there is.
pub(super) fn kill_all() {
    // While an id stands there, it is nobody else's.
    for pid in living().iter() {
        killpg(Pid::from_raw(*pid), Signal::SIGKILL).ok();
    }
}

/// A process that leads its own group. Dropping it kills the group.
pub(super) struct Group {
    child: Child,
    pid: Pid,
    status: Option<ExitStatus>,
}

impl Group {
    /// Starts `command`, which must ask for a process group of its own.
    pub(super) fn start(mut command: Command) -> io::Result<Self> {
        let child = command.spawn()?;
        let pid = Pid::from_raw(child.id().cast_signed());
        living().insert(pid.as_raw());
        Ok(Self {
            child,
            pid,
            status: None,
        })
    }

    /// Its pipes.
    pub(super) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its process id, which is its group's too.
    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether its leader has ended. It stays a zombie, so that the id of the
    /// group is nobody else's, until [`Group::reap`].
    pub(super) fn has_ended(&self) -> bool {
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        // An error is a signal that has no name, or a process that was reaped.
        !matches!(waitid(Id::Pid(self.pid), look), Ok(WaitStatus::StillAlive))
    }

    /// Waits for its end, at most until `deadline`, looking ever less often;
    /// `meanwhile` has to take no time.
    pub(super) fn ends_by(&self, deadline: Instant, mut meanwhile: impl FnMut()) -> bool {
        let mut wait = SHORTEST_WAIT;
        loop {
            meanwhile();
            if self.has_ended() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            std::thread::sleep(wait.min(left));
            wait = (wait * 2).min(TICK);
        }
    }

    /// Has all of the group end: by SIGTERM, and after `grace` by SIGKILL.
    /// False when its leader is still there.
    pub(super) fn end(&mut self, grace: Duration, mut meanwhile: impl FnMut()) -> bool {
        if !grace.is_zero() {
            self.signal(Signal::SIGTERM);
            if self.ends_by(Instant::now() + grace, &mut meanwhile) {
                return true;
            }
        }
        self.signal(Signal::SIGKILL);
        self.ends_by(Instant::now() + GONE_WITHIN, meanwhile)
    }

    /// Kills what the leader, which has ended, has left behind in its group,
    /// and asks how it ended.
    pub(super) fn reap(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        self.signal(Signal::SIGKILL);
        let mut living = living();
        let status = self.child.try_wait()?.ok_or(io::ErrorKind::WouldBlock)?;
        living.remove(&self.pid.as_raw());
        self.status = Some(status);
        Ok(status)
    }

    fn signal(&self, signal: Signal) {
        // Once reaped, the id may be somebody else's.
        if self.status.is_none() {
            killpg(self.pid, signal).ok();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.status.is_some() {
            return;
        }
        self.signal(Signal::SIGKILL);
        if !self.ends_by(Instant::now() + GONE_WITHIN, || {}) || self.reap().is_err() {
            living().remove(&self.pid.as_raw());
            log::error!(pid = self.pid.as_raw(); "a handler's process could not be ended");
        }
    }
}

/// What a program says by how it ended; `None` is success.
pub(super) fn verdict(status: ExitStatus) -> Option<ExitFailure> {
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(code), _) => Some(ExitFailure::Status(u8::try_from(code).unwrap_or(u8::MAX))),
        (None, Some(signal)) => Some(ExitFailure::Signal(signal)),
        (None, None) => Some(ExitFailure::Broken),
    }
}

/// How a program ended, in words.
pub(super) fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => match Signal::try_from(signal) {
            Ok(name) => format!("killed by {name}"),
            Err(_) => format!("killed by signal {signal}"),
        },
        (None, None) => "an end without a status".to_owned(),
    }
}
