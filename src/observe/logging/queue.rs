//! What stands between those who log and standard error: a bounded queue, and
//! the thread that writes.
//!
//! A pipe that nobody reads, a full disk or a journal that restarts then costs
//! lines, which are counted, and holds up no worker, no signal and no watchdog.

use std::io::{self, Write};
use std::os::fd::AsFd as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Most lines that wait.
const LINES_MAX: usize = 8_192;

/// Most bytes that wait.
const BYTES_MAX: usize = 4 << 20;

/// Between two looks at whether everything is written.
const FLUSH_STEP: Duration = Duration::from_millis(5);

/// Longest wait for a standard error that does not block, in milliseconds:
/// then it is tried again.
const POLL_MS: u16 = 1_000;

static LINES: OnceLock<Sender<Vec<u8>>> = OnceLock::new();
static WAITING: AtomicUsize = AtomicUsize::new(0);
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Lines that were dropped since the start of the process.
pub(super) fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Has a thread write all further lines. Once in a process; a second call
/// changes nothing.
///
/// # Errors
///
/// When there is no thread to be had.
pub(super) fn start() -> io::Result<()> {
    let (sender, lines) = bounded(LINES_MAX);
    if LINES.set(sender).is_err() {
        return Ok(());
    }
    std::thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write_all(&lines))
        .map(drop)
}

/// Waits until what was logged is written, `within` so long at most.
pub(super) fn flush(within: Duration) {
    let deadline = Instant::now() + within;
    while WAITING.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
        std::thread::sleep(FLUSH_STEP);
    }
}

/// Where the logger writes: one call for each line.
pub(super) struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match LINES.get() {
            // A command that somebody waits for, not the daemon.
            None => io::stderr().lock().write_all(line)?,
            Some(lines) => push(lines, line),
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn push(lines: &Sender<Vec<u8>>, line: &[u8]) {
    let waiting = WAITING.fetch_add(line.len(), Ordering::AcqRel) + line.len();
    if waiting > BYTES_MAX || lines.try_send(line.to_vec()).is_err() {
        WAITING.fetch_sub(line.len(), Ordering::AcqRel);
        DROPPED.fetch_add(1, Ordering::Relaxed);
    }
}

fn write_all(lines: &Receiver<Vec<u8>>) {
    let (mut told, mut is_torn) = (0, false);
    for line in lines {
        // Not through `Stderr`, whose lock a panicking thread would wait for.
        if write_line(&line, &mut is_torn).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        } else {
            told = tell(told);
        }
        WAITING.fetch_sub(line.len(), Ordering::AcqRel);
    }
}

/// Says what was dropped since `told`; what has been told then. A line that
/// finds no place is itself dropped, so that the next one tells.
fn tell(told: u64) -> u64 {
    let dropped = dropped();
    if dropped == told {
        return told;
    }
    log::warn!(
        lines = dropped - told, lines_total = dropped;
        "lines of the log were dropped: standard error took no more"
    );
    match self::dropped() == dropped {
        true => dropped,
        false => told,
    }
}

/// Writes a line whole; `is_torn` while the last one was cut short, which then
/// ends before this one begins.
fn write_line(line: &[u8], is_torn: &mut bool) -> io::Result<()> {
    if *is_torn {
        write_bytes(b"\n", &mut false)?;
        *is_torn = false;
    }
    write_bytes(line, is_torn)
}

fn write_bytes(mut bytes: &[u8], has_begun: &mut bool) -> io::Result<()> {
    let stderr = io::stderr();
    while !bytes.is_empty() {
        match nix::unistd::write(&stderr, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = &bytes[count..];
                *has_begun = !bytes.is_empty();
            }
            Err(nix::errno::Errno::EINTR) => {}
            // Somebody who shares it made it so.
            Err(nix::errno::Errno::EAGAIN) => {
                let mut wanted = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                poll(&mut wanted, PollTimeout::from(POLL_MS)).ok();
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
