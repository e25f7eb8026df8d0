//! What commands say to whoever sits there: progress, questions, tables. Data
//! goes to standard output; all of this but the tables to standard error.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, select};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Exit, signals};
use crate::stop::{self, Stop};
use crate::why::printable;

/// How often progress is said in a plain line, at the least.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Of so many things, every tenth part done is worth a line too.
const WORTH_LINES: u64 = 10_000;

/// How often a wait for input looks whether it is time to stop, milliseconds.
const INPUT_TICK_MS: u8 = 100;

/// Widest column of a table, in characters.
const COLUMN_MAX: usize = 60;

/// How far something has come: a bar on a terminal, else a line every five
/// seconds, and of 10,000 things or more at every tenth part.
pub struct Progress {
    what: &'static str,
    bar: Option<ProgressBar>,
    done: u64,
    total: u64,
    said: Instant,
}

impl Progress {
    /// Of `total` things, called `what` in plain lines: `letters read`.
    #[must_use]
    pub fn new(what: &'static str, total: u64) -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let target = ProgressDrawTarget::stderr_with_hz(10);
            let style = ProgressStyle::with_template(
                "{wide_bar} {human_pos}/{human_len} {msg} {per_sec} {eta}",
            );
            let bar = ProgressBar::with_draw_target(Some(total), target).with_message(what);
            match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Self {
            what,
            bar,
            done: 0,
            total,
            said: Instant::now(),
        }
    }

    /// So many more are done.
    pub fn add(&mut self, count: u64) {
        let tenth = (self.total / 10).max(1);
        let before = self.done / tenth;
        self.done += count;
        if let Some(bar) = &self.bar {
            bar.set_position(self.done);
            return;
        }
        let worth = self.total >= WORTH_LINES && self.done / tenth > before;
        if worth || self.said.elapsed() >= PLAIN_EVERY {
            eprintln!("ackonce: {} of {} {}", self.done, self.total, self.what);
            self.said = Instant::now();
        }
    }

    /// Says a line on standard error without tearing the bar.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Whether to go on: `yes` was said on the command line, or is now by whoever
/// sits at the terminal.
///
/// # Errors
///
/// [`Exit::Usage`] where nobody can be asked, [`Exit::Partial`] when the answer
/// is no: nothing was done then.
pub fn confirm(question: &str, yes: bool) -> Result<(), Exit> {
    if yes {
        return Ok(());
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        eprintln!(
            "ackonce: {question}\n  hint: there is no terminal to ask at: look first, then add \
             --yes"
        );
        return Err(Exit::Usage);
    }
    eprint!("{question} [y/N] ");
    io::stderr().flush().ok();
    let mut answer = String::new();
    // A line longer than this is no answer.
    let read = io::Read::take(io::stdin().lock(), 64).read_line(&mut answer);
    if read.is_ok() && ["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) {
        return Ok(());
    }
    eprintln!("ackonce: nothing was done");
    Err(Exit::Partial)
}

/// Runs `work` on a thread of its own. The first SIGINT, SIGTERM or SIGHUP asks
/// it to stop, a second one does not wait for it.
///
/// # Errors
///
/// What `work` says; [`Exit::Interrupted`] at the second signal;
/// [`Exit::System`] when there are no signals or threads to be had.
pub fn interruptible(
    work: impl FnOnce(&Stop) -> Result<Exit, Exit> + Send + 'static,
) -> Result<Exit, Exit> {
    let system = |what: &str, error: &dyn std::fmt::Display| {
        eprintln!("ackonce: failed to {what}: {error}");
        Exit::System
    };
    let signals = signals::stops().map_err(|error| system("handle signals", &error))?;
    let (stopper, stop) = stop::pair();
    let (done, ended) = bounded(1);
    std::thread::Builder::new()
        .name("command".to_owned())
        .spawn(move || {
            done.send(work(&stop)).ok();
        })
        .map_err(|error| system("start a thread", &error))?;
    let mut stopper = Some(stopper);
    loop {
        select! {
            recv(ended) -> result => return result.unwrap_or(Err(Exit::System)),
            recv(signals) -> _ => match stopper.take() {
                Some(stopper) => {
                    eprintln!("ackonce: stopping; once more to leave at once");
                    drop(stopper);
                }
                None => return Err(Exit::Interrupted),
            },
        }
    }
}

/// Standard input, which cannot be read any more once it is time to stop.
pub struct Input {
    // Not `Stdin`, whose buffer `poll` would not know of.
    file: File,
    stop: Stop,
}

impl Input {
    /// For one reader.
    ///
    /// # Errors
    ///
    /// [`Exit::System`] when it is closed.
    pub fn open(stop: &Stop) -> Result<BufReader<Self>, Exit> {
        let owned = io::stdin().as_fd().try_clone_to_owned();
        let owned = owned.map_err(|error| {
            eprintln!("ackonce: failed to open standard input: {error}");
            Exit::System
        })?;
        let (file, stop) = (File::from(owned), stop.clone());
        Ok(BufReader::new(Self { file, stop }))
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.stop.is_set() {
            let mut polled = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
            match poll(&mut polled, PollTimeout::from(INPUT_TICK_MS)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return self.file.read(buffer),
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::Error::other("interrupted"))
    }
}

/// Columns side by side, with a heading. Cells lose what could move a cursor,
/// and what is wider than 60 characters.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With these headings.
    #[must_use]
    pub fn new(headings: &[&str]) -> Self {
        let heading = headings.iter().map(|&text| text.to_owned()).collect();
        Self {
            rows: vec![heading],
        }
    }

    /// Adds a row; the last cell may be of any width.
    pub fn row(&mut self, cells: &[&str]) {
        let last = cells.len().saturating_sub(1);
        let cells = cells.iter().enumerate().map(|(index, cell)| {
            let cell = printable(cell);
            match index == last {
                true => cell,
                false => cut(&cell, COLUMN_MAX),
            }
        });
        self.rows.push(cells.collect());
    }

    /// As lines.
    #[must_use]
    pub fn text(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                let pad = width.saturating_sub(cell.chars().count()) + 2;
                line.extend(std::iter::repeat_n(' ', pad));
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// The first `most` characters of `text`, the last an ellipsis where it is cut.
#[must_use]
pub fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(most.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// Who gives the order, for the journal: login name, host, process id.
#[must_use]
pub fn operator() -> String {
    let uid = nix::unistd::Uid::current();
    let name_of = |uid: nix::unistd::Uid| {
        let user = nix::unistd::User::from_uid(uid).ok().flatten();
        user.map_or_else(|| format!("uid {uid}"), |user| user.name)
    };
    let host = nix::unistd::gethostname().map_or_else(
        |_| "a host".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    );
    // Who logged in, where somebody became somebody else since.
    let login = std::fs::read_to_string("/proc/self/loginuid").ok();
    let login = login.and_then(|text| text.trim().parse::<u32>().ok());
    let login = login.filter(|login| *login != u32::MAX && *login != uid.as_raw());
    let name = match login {
        Some(login) => format!(
            "{} as {}",
            name_of(nix::unistd::Uid::from_raw(login)),
            name_of(uid)
        ),
        None => name_of(uid),
    };
    format!("{name} on {host}, process {}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_its_columns_under_each_other_and_moves_no_cursor() {
        let mut table = Table::new(&["ID", "ERROR"]);
        table.row(&["a", "b\x1b[2J"]);
        table.row(&[&"x".repeat(80), ""]);
        let text = table.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].find("ERROR"), Some(62));
        assert_eq!(lines[1].find("b\\u{1b}"), Some(62));
        assert_eq!(lines[2].chars().count(), 60);
        assert!(lines[2].ends_with('…'));
    }
}
