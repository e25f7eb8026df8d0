//! `mode = "stream"`: one process for each worker, for as long as the worker
//! works. It is handed a line for each message and answers with one, one after
//! the other. Whatever else it does ends it, and the next message starts
//! another.

use std::time::{Duration, Instant};

use super::line;
use super::{Program, cancelled, deadline, failure};
use crate::backoff::Backoff;
use crate::config::format_duration;
use crate::failure::{ExitFailure, Failure};
use crate::handler::{Keyed, Work};
use crate::random;
use crate::stop::Stop;

mod process;

use process::{Process, Trouble};

/// Waits before a process that ended is replaced, longer each time it ends
/// without having answered anything.
const RESTART_MIN: Duration = Duration::from_millis(100);
const RESTART_MAX: Duration = Duration::from_secs(10);

/// Keeps a process running and hands it one message at a time.
pub(super) struct Stream {
    program: Program,
    process: Option<Process>,
    /// Processes that ended since the last answer.
    ends: u32,
    /// No new one before this.
    not_before: Option<Instant>,
    /// Number of the message in hand, unique for this worker.
    id: u64,
    /// One that SIGKILL did not end. There is never a second.
    stuck: Option<Process>,
}

impl Stream {
    pub(super) fn new(program: Program) -> Self {
        Self {
            program,
            process: None,
            ends: 0,
            not_before: None,
            id: 0,
            stuck: None,
        }
    }

    /// A process that waits for a message; it is not yet known to anybody else.
    fn ready(&mut self, cancel: &Stop) -> Result<Process, Failure> {
        if let Some(mut process) = self.process.take() {
            match process.fault_while_idle() {
                None => return Ok(process),
                Some(problem) => {
                    log::warn!(
                        consumer = self.program.consumer.as_str(), pid = process.pid();
                        "the handler's program is started anew: {problem}"
                    );
                    self.give_up(process);
                }
            }
        }
        if let Some(process) = &self.stuck {
            if !process.has_ended() {
                let text = format!(
                    "process {} of {} did not end when it was killed: the kernel holds it",
                    process.pid(),
                    self.program.config.program.display()
                );
                return Err(failure(ExitFailure::Start, text));
            }
            self.stuck = None;
        }
        let wait = self
            .not_before
            .map(|at| at.saturating_duration_since(Instant::now()));
        if wait.is_some_and(|wait| cancel.wait(wait)) {
            return Err(cancelled());
        }
        self.start(cancel)
    }

    fn start(&mut self, cancel: &Stop) -> Result<Process, Failure> {
        let within = self.program.config.start_timeout;
        let begun = Instant::now();
        let mut process = match Process::start(&self.program) {
            Ok(process) => process,
            Err(error) => {
                self.back_off();
                return Err(self.program.not_started(&error));
            }
        };
        let until = begun + within;
        let greeted = process
            .read_line(until, cancel)
            .and_then(|line| line::greeting(&line).map_err(Trouble::Broken));
        let what = match greeted {
            Ok(()) => {
                log::info!(
                    consumer = self.program.consumer.as_str(), pid = process.pid(),
                    took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                    "the handler's program is ready"
                );
                return Ok(process);
            }
            Err(Trouble::Cancelled) => {
                self.end(process, self.program.cancel_grace());
                return Err(cancelled());
            }
            Err(Trouble::Timeout) => {
                format!("it was not ready after {}", format_duration(within))
            }
            Err(Trouble::Broken(problem)) => problem,
        };
        let text = self.post_mortem(process, &what);
        Err(failure(
            ExitFailure::Start,
            format!("the program did not get ready: {text}"),
        ))
    }

    /// Hands over one message and waits for what becomes of it.
    fn ask(&mut self, mut process: Process, work: &Work<'_>, cancel: &Stop) -> Result<(), Failure> {
        self.id = self.id.wrapping_add(1);
        let within = self.program.config.timeout;
        let until = Instant::now() + within;
        let line = line::request(&self.program.consumer, self.id, deadline(within), work);
        process.forget();
        let answered = process
            .exchange(line, until, cancel)
            .and_then(|line| line::answer(&line, self.id).map_err(Trouble::Broken));
        let (kind, what) = match answered {
            Ok(outcome) => {
                self.ends = 0;
                self.not_before = None;
                self.process = Some(process);
                return outcome;
            }
            Err(Trouble::Cancelled) => {
                self.end(process, self.program.cancel_grace());
                return Err(cancelled());
            }
            Err(Trouble::Timeout) => (
                ExitFailure::Timeout,
                format!("no answer after {}", format_duration(within)),
            ),
            Err(Trouble::Broken(problem)) => (ExitFailure::Broken, problem),
        };
        let text = self.post_mortem(process, &what);
        Err(failure(kind, text))
    }

    /// Ends a process that did `what`, and says how it ended and what it said
    /// last.
    fn post_mortem(&mut self, mut process: Process, what: &str) -> String {
        self.back_off();
        let (ended, how) = process.end(self.program.config.kill_after);
        let text = process.explain(&format!("{what} ({how})"));
        if !ended {
            self.stuck = Some(process);
        }
        text
    }

    /// Ends a process that is of no use any more.
    fn give_up(&mut self, process: Process) {
        self.back_off();
        self.end(process, self.program.config.kill_after);
    }

    fn end(&mut self, mut process: Process, grace: Duration) {
        let (ended, _) = process.end(grace);
        if !ended {
            self.stuck = Some(process);
        }
    }

    fn back_off(&mut self) {
        let delay = Backoff::new(RESTART_MIN, RESTART_MAX).delay(self.ends, random::draw());
        self.ends = self.ends.saturating_add(1);
        self.not_before = Some(Instant::now() + delay);
    }
}

impl Keyed for Stream {
    fn kind(&self) -> &'static str {
        "command"
    }

    fn apply(&mut self, work: &Work<'_>, cancel: &Stop) -> Result<(), Failure> {
        let process = self.ready(cancel)?;
        self.ask(process, work, cancel)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.dismiss(self.program.config.kill_after);
        }
    }
}
