//! The process of a stream: its lines, its standard error, its end.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::handler::command::group::{Group, in_words};
use crate::handler::command::line::LINE_MAX;
use crate::handler::command::words::{Lines, Tail};
use crate::handler::command::{Program, set_nonblocking, wait, would_block};
use crate::stop::Stop;

/// How long a process that has closed its pipes may take to be gone by itself.
const LINGER: Duration = Duration::from_millis(100);

/// Most bytes of standard error that are read when nobody waits for more.
const LAST_WORDS_MAX: usize = 1 << 20;

/// Why there is no answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// Its time is over.
    Timeout,
    /// Nobody waits for it.
    Cancelled,
    /// It ended, or what it did has no meaning: what that was.
    Broken(String),
}

/// A running program.
pub(super) struct Process {
    group: Group,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    /// Read, and not yet a line.
    begun: Vec<u8>,
    listener: Listener,
}

impl Process {
    /// Starts `program`.
    pub(super) fn start(program: &Program) -> io::Result<Self> {
        let mut command = program.command();
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut group = Group::start(command)?;
        let child = group.child();
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let stderr = child.stderr.take();
        if let (Some(stdin), Some(stdout)) = (&stdin, &stdout) {
            set_nonblocking(stdin)?;
            set_nonblocking(stdout)?;
        }
        let listener = Listener::start(stderr, &program.consumer, group.pid().as_raw())?;
        Ok(Self {
            group,
            stdin,
            stdout,
            begun: Vec::new(),
            listener,
        })
    }

    pub(super) fn pid(&self) -> i32 {
        self.group.pid().as_raw()
    }

    pub(super) fn has_ended(&self) -> bool {
        self.group.has_ended()
    }

    /// What it did while there was nothing for it to do, which is to be nothing.
    pub(super) fn fault_while_idle(&mut self) -> Option<String> {
        match self.read() {
            Err(problem) => Some(problem),
            Ok(()) if !self.begun.is_empty() => {
                Some("it wrote without having been handed a message".to_owned())
            }
            Ok(()) if self.group.has_ended() => Some("it ended".to_owned()),
            Ok(()) => None,
        }
    }

    /// What it says from now on is about another message.
    pub(super) fn forget(&self) {
        self.listener.said().clear();
    }

    /// Writes `line`, and waits for the line that comes back.
    pub(super) fn exchange(
        &mut self,
        line: Vec<u8>,
        until: Instant,
        cancel: &Stop,
    ) -> Result<Vec<u8>, Trouble> {
        let mut unwritten = line.as_slice();
        loop {
            unwritten = self.write(unwritten).map_err(Trouble::Broken)?;
            if let Some(answer) = self.line()? {
                return match unwritten.is_empty() {
                    true => Ok(answer),
                    false => Err(Trouble::Broken(
                        "it answered before it had read the message".to_owned(),
                    )),
                };
            }
            self.wait(!unwritten.is_empty(), until, cancel)?;
        }
    }

    /// Waits for a line that nobody asked for.
    pub(super) fn read_line(&mut self, until: Instant, cancel: &Stop) -> Result<Vec<u8>, Trouble> {
        loop {
            if let Some(line) = self.line()? {
                return Ok(line);
            }
            self.wait(false, until, cancel)?;
        }
    }

    /// Until there may be something to read, or to write.
    fn wait(&mut self, writes: bool, until: Instant, cancel: &Stop) -> Result<(), Trouble> {
        // Whoever holds its pipes besides it cannot answer in its stead.
        if self.group.has_ended() {
            self.read().map_err(Trouble::Broken)?;
            return match self.begun.contains(&b'\n') {
                true => Ok(()),
                false => Err(Trouble::Broken("it ended without an answer".to_owned())),
            };
        }
        if cancel.is_set() {
            return Err(Trouble::Cancelled);
        }
        if Instant::now() >= until {
            return Err(Trouble::Timeout);
        }
        let mut fds = Vec::with_capacity(2);
        if let Some(stdout) = &self.stdout {
            fds.push(PollFd::new(stdout.as_fd(), PollFlags::POLLIN));
        }
        if let Some(stdin) = self.stdin.as_ref().filter(|_| writes) {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLOUT));
        }
        wait(&mut fds, until);
        Ok(())
    }

    /// The next whole line that it has written, without its end.
    fn line(&mut self) -> Result<Option<Vec<u8>>, Trouble> {
        self.read().map_err(Trouble::Broken)?;
        if let Some(end) = self.begun.iter().position(|byte| *byte == b'\n') {
            let rest = self.begun.split_off(end + 1);
            let mut line = std::mem::replace(&mut self.begun, rest);
            line.pop();
            return Ok(Some(line));
        }
        if self.begun.len() >= LINE_MAX {
            let problem = format!("it wrote a line of more than {LINE_MAX} bytes");
            return Err(Trouble::Broken(problem));
        }
        Ok(None)
    }

    /// Takes what it has written, up to the longest line there may be.
    fn read(&mut self) -> Result<(), String> {
        let Some(stdout) = &mut self.stdout else {
            return Err("it has closed standard output".to_owned());
        };
        let mut bytes = [0; 4096];
        while self.begun.len() < LINE_MAX {
            match stdout.read(&mut bytes) {
                // What it wrote before that counts.
                Ok(0) if self.begun.contains(&b'\n') => return Ok(()),
                Ok(0) => return Err("it closed standard output".to_owned()),
                Ok(read) => self
                    .begun
                    .extend_from_slice(bytes.get(..read).unwrap_or_default()),
                Err(error) if would_block(&error) => return Ok(()),
                Err(error) => return Err(format!("its standard output failed: {error}")),
            }
        }
        Ok(())
    }

    /// Writes as much of `bytes` as it takes now; what is left.
    fn write<'b>(&mut self, mut bytes: &'b [u8]) -> Result<&'b [u8], String> {
        let Some(stdin) = &mut self.stdin else {
            return Err("it has closed standard input".to_owned());
        };
        while !bytes.is_empty() {
            match stdin.write(bytes) {
                Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
                Err(error) if would_block(&error) => break,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Err("it closed standard input".to_owned());
                }
                Err(error) => return Err(format!("its standard input failed: {error}")),
            }
        }
        Ok(bytes)
    }

    /// Ends it now. Whether that worked, and how it ended.
    pub(super) fn end(&mut self, grace: Duration) -> (bool, String) {
        let by_itself = self.group.ends_by(Instant::now() + LINGER, || {});
        self.stdin = None;
        self.stdout = None;
        if !by_itself && !self.group.end(grace, || {}) {
            return (false, "it cannot be killed".to_owned());
        }
        let how = match self.group.reap() {
            Ok(status) => in_words(status),
            Err(error) => error.to_string(),
        };
        self.listener.stop();
        match by_itself {
            true => (true, how),
            false => (true, format!("then ended: {how}")),
        }
    }

    /// Tells it that there will be no more messages, and ends it if it does not
    /// go by itself.
    pub(super) fn dismiss(&mut self, grace: Duration) {
        self.stdin = None;
        if !self.group.ends_by(Instant::now() + grace, || {}) {
            log::info!(
                pid = self.pid();
                "the handler's program reads on at the end of its input: it is ended"
            );
        }
        self.end(grace);
    }

    /// What happened, with its last words.
    pub(super) fn explain(&self, what: &str) -> String {
        self.listener.said().explain(what)
    }
}

/// Reads standard error for as long as the process runs: into the log, and
/// keeps the last of it.
struct Listener {
    said: Arc<Mutex<Tail>>,
    /// Closing it ends the thread.
    leash: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    fn start(stderr: Option<ChildStderr>, consumer: &str, pid: i32) -> io::Result<Self> {
        let said = Arc::new(Mutex::new(Tail::default()));
        let Some(stderr) = stderr else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        set_nonblocking(&stderr)?;
        let (leashed, leash) = io::pipe()?;
        let heard = Arc::clone(&said);
        let consumer = consumer.to_owned();
        let thread = std::thread::Builder::new()
            .name(format!("{consumer}-stderr"))
            .spawn(move || {
                listen(stderr, &leashed, &heard, |line| {
                    log::info!(
                        consumer = consumer.as_str(), pid = pid;
                        "the handler's program says: {line}"
                    );
                });
            })?;
        Ok(Self {
            said,
            leash: Some(leash),
            thread: Some(thread),
        })
    }

    fn said(&self) -> std::sync::MutexGuard<'_, Tail> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it hear what was said so far, and no more.
    fn stop(&mut self) {
        self.leash = None;
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop();
    }
}

fn listen(mut stderr: ChildStderr, leash: &PipeReader, said: &Mutex<Tail>, log: impl Fn(&str)) {
    let mut lines = Lines::default();
    let mut bytes = [0; 4096];
    let mut left = usize::MAX;
    loop {
        let mut fds = [
            PollFd::new(stderr.as_fd(), PollFlags::POLLIN),
            PollFd::new(leash.as_fd(), PollFlags::empty()),
        ];
        if left == usize::MAX {
            poll(&mut fds, PollTimeout::NONE).ok();
            let is_let_go = fds[1].revents().is_some_and(|events| !events.is_empty());
            if is_let_go {
                left = LAST_WORDS_MAX;
            }
        }
        match stderr.read(&mut bytes) {
            Ok(0) => break,
            Ok(read) => {
                let heard = bytes.get(..read).unwrap_or_default();
                said.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(heard);
                lines.push(heard, &log);
                if left != usize::MAX {
                    left = left.saturating_sub(read);
                }
            }
            Err(error) if would_block(&error) && left == usize::MAX => {}
            Err(_) => break,
        }
        if left == 0 {
            break;
        }
    }
    lines.end(&log);
}
