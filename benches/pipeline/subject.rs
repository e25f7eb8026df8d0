//! What is measured: a process that consumes one queue until it is told to
//! stop. The daemon is its real binary; the others are this program again.

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use toml::{Table, Value};

use crate::consumers;
use crate::stage::{self, CONSUMER, PATIENCE, QueueType};

/// Deliveries that each subject holds at most, in all.
pub const PREFETCH: u16 = 1024;

/// Threads of the per-message reference.
pub const REFERENCE_THREADS: u16 = 16;

/// Ticks a second in `/proc/PID/stat`: fixed for user space on Linux.
const TICKS_PER_SECOND: u32 = 100;

/// A subject is idle that in so long a time uses so little of the processor:
/// longer than the daemon's `recheck_every`, for which it may hold a duplicate
/// back, and one tick, which a heartbeat may cause.
const IDLE_FOR: Duration = Duration::from_millis(700);
const IDLE_CPU: Duration = Duration::from_millis(1_000 / TICKS_PER_SECOND as u64);

/// The kinds of subjects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// amiquip consuming and acking, nothing else; `coalesced` with one ack
    /// for all that was waiting.
    Bare { coalesced: bool },
    /// The daemon's claims, rows and effects in batches by one thread, without
    /// any safety.
    Floor,
    /// Claim, transaction and ack for each message by itself; `fused` with the
    /// effect and the ledger row in one statement, which only works where the
    /// effect is a single statement that can be rewritten for it.
    Reference { fused: bool },
    /// `ackonce run`.
    Daemon { workers: usize },
    /// The same with a handler that works outside the database.
    Caller { workers: usize },
}

impl Kind {
    /// Consumers that it has on its queue.
    pub fn consumers(&self) -> u32 {
        match self {
            Self::Bare { .. } | Self::Floor | Self::Daemon { .. } | Self::Caller { .. } => 1,
            Self::Reference { .. } => u32::from(REFERENCE_THREADS),
        }
    }

    /// Whether it writes to the effect table.
    pub fn has_effects(&self) -> bool {
        !matches!(self, Self::Bare { .. } | Self::Caller { .. })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bare { coalesced: false } => f.write_str("bare-one-by-one"),
            Self::Bare { coalesced: true } => f.write_str("bare-coalesced"),
            Self::Floor => f.write_str("floor"),
            Self::Reference { fused: false } => f.write_str("reference"),
            Self::Reference { fused: true } => f.write_str("reference-fused"),
            Self::Daemon { workers } => write!(f, "daemon-{workers}w"),
            Self::Caller { workers } => write!(f, "caller-{workers}w"),
        }
    }
}

/// What a subject is told.
#[derive(Debug, Clone)]
pub struct Settings {
    pub amqp: String,
    pub redis: String,
    pub postgres: String,
    pub queue: String,
    pub queue_type: QueueType,
    pub key_prefix: String,
    pub prefetch: u16,
    /// What the daemon's handler does, and how to see that it did.
    pub script: Script,
    /// More of the daemon's configuration, by dotted path.
    pub extra: Vec<(&'static str, Value)>,
}

/// A handler of the daemon.
#[derive(Debug, Clone, Copy)]
pub struct Script {
    pub sql: &'static str,
    /// How many messages took effect.
    pub applied: &'static str,
}

impl Script {
    /// One row for each message, in a table without a key: an effect applied
    /// twice shows.
    pub const INSERT: Self = Self {
        sql: "INSERT INTO effect (message_id, body) SELECT message_id, body FROM message",
        applied: "SELECT count(*) FROM effect",
    };
}

/// A running subject. Dropping it kills it.
pub struct Subject {
    kind: Kind,
    child: Child,
    /// Closed to have a subject of ours stop.
    stdin: Option<ChildStdin>,
    log: PathBuf,
    /// When the process was started.
    pub started: Instant,
}

impl Subject {
    pub fn spawn(kind: &Kind, settings: &Settings, folder: &Path) -> Result<Self> {
        let mut command = match kind {
            Kind::Daemon { workers } | Kind::Caller { workers } => {
                let config = folder.join("config.toml");
                std::fs::write(&config, configuration(settings, *workers)?)
                    .with_context(|| format!("failed to write {}", config.display()))?;
                let mut command = Command::new(stage::daemon_binary());
                command.arg("run").arg("--config").arg(config);
                command
            }
            Kind::Bare { .. } | Kind::Floor | Kind::Reference { .. } => {
                let mut command = Command::new(std::env::current_exe()?);
                command
                    .arg("subject")
                    .args(consumers::arguments(kind, settings));
                command
            }
        };
        let log = folder.join("subject.log");
        let stderr =
            File::create(&log).with_context(|| format!("failed to make {}", log.display()))?;
        let started = Instant::now();
        let mut child = command
            .env("RUST_LOG", "info")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("failed to start {kind}"))?;
        Ok(Self {
            kind: *kind,
            stdin: child.stdin.take(),
            child,
            log,
            started,
        })
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The end of what it wrote to standard error.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Fails when the process has ended.
    pub fn ensure_alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended by itself, {status}\n{}", self.kind, self.log()),
        }
    }

    /// Processor time it has used so far, user and system.
    pub fn cpu(&self) -> Result<Duration> {
        let stat = self.proc("stat")?;
        // The program's name stands in brackets and may hold spaces.
        let (_, fields) = stat.rsplit_once(") ").context("strange /proc/PID/stat")?;
        let ticks = |field: usize| -> Result<u32> {
            let text = fields.split(' ').nth(field).unwrap_or_default();
            text.parse().context("strange /proc/PID/stat")
        };
        Ok(Duration::from_secs(1) * (ticks(11)? + ticks(12)?) / TICKS_PER_SECOND)
    }

    /// Waits until it has hardly used the processor for a while: what it took
    /// from the queue is settled, or never will be. A stop before that would
    /// have it give back what it has not begun.
    pub fn await_idle(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = self.cpu()?;
            std::thread::sleep(IDLE_FOR);
            if self.cpu()? - before <= IDLE_CPU {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{} is still at work after {PATIENCE:?}",
                self.kind
            );
        }
    }

    /// A line of `/proc/PID/status` that counts KiB, such as `VmRSS`, in bytes.
    pub fn memory(&self, name: &str) -> Result<u64> {
        let status = self.proc("status")?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .with_context(|| format!("no {name} in /proc/PID/status"))?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib << 10)
    }

    fn proc(&self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", self.child.id());
        std::fs::read_to_string(&path).with_context(|| format!("failed to read {path}"))
    }

    /// Has it settle what it holds and end.
    pub fn stop(mut self) -> Result<()> {
        drop(self.stdin.take());
        if matches!(self.kind, Kind::Daemon { .. } | Kind::Caller { .. }) {
            let pid = Pid::from_raw(i32::try_from(self.child.id())?);
            kill(pid, Signal::SIGTERM).with_context(|| format!("failed to stop {}", self.kind))?;
        }
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(
                Instant::now() < deadline,
                "{} has not ended after {PATIENCE:?}",
                self.kind
            );
            std::thread::sleep(Duration::from_millis(2));
        };
        ensure!(
            status.success(),
            "{} ended with {status}\n{}",
            self.kind,
            self.log()
        );
        Ok(())
    }
}

/// Processor time that everything on this machine has used so far: what a
/// subject asks of the servers is part of its price.
pub fn machine_cpu() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/stat").context("failed to read /proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .map(str::parse)
        .collect::<Result<_, _>>()
        .context("strange /proc/stat")?;
    // user, nice, system; then idle and iowait; then irq and softirq.
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|i| ticks.get(*i)).sum();
    Ok(Duration::from_millis(
        busy * 1_000 / u64::from(TICKS_PER_SECOND),
    ))
}

impl Drop for Subject {
    fn drop(&mut self) {
        // Both fail when it has ended, which is as good.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The daemon's configuration: its defaults, but for what the run is about.
fn configuration(settings: &Settings, workers: usize) -> Result<String> {
    let mut consumer = Table::new();
    let workers = Value::Integer(i64::try_from(workers)?);
    set(&mut consumer, "name", CONSUMER.into());
    set(&mut consumer, "workers", workers);
    set(
        &mut consumer,
        "prefetch",
        i64::from(settings.prefetch).into(),
    );
    let batch_max = i64::from(settings.prefetch.min(256));
    set(&mut consumer, "batch_max", batch_max.into());
    set(
        &mut consumer,
        "topology.queue",
        settings.queue.as_str().into(),
    );
    let queue_type = settings.queue_type.name();
    set(&mut consumer, "topology.queue_type", queue_type.into());
    set(&mut consumer, "handler.type", "sql".into());
    set(&mut consumer, "handler.sql", settings.script.sql.into());
    let mut config = Table::new();
    set(&mut config, "broker.url", settings.amqp.as_str().into());
    set(&mut config, "admin.listen", "127.0.0.1:0".into());
    set(&mut config, "redis.url", settings.redis.as_str().into());
    set(
        &mut config,
        "redis.key_prefix",
        settings.key_prefix.as_str().into(),
    );
    set(
        &mut config,
        "postgres.url",
        settings.postgres.as_str().into(),
    );
    for (path, value) in &settings.extra {
        match path.strip_prefix("consumer.") {
            Some(path) => set(&mut consumer, path, value.clone()),
            None => set(&mut config, path, value.clone()),
        }
    }
    let consumers = Value::Array(vec![Value::Table(consumer)]);
    set(&mut config, "consumer", consumers);
    toml::to_string(&config).context("failed to write the daemon's configuration")
}

/// Sets `path`, such as `redis.url`. What stands in the way of it is replaced.
fn set(table: &mut Table, path: &str, value: Value) {
    let Some((section, rest)) = path.split_once('.') else {
        table.insert(path.to_owned(), value);
        return;
    };
    let entry = table
        .entry(section)
        .or_insert_with(|| Value::Table(Table::new()));
    match entry {
        Value::Table(section) => set(section, rest, value),
        other => {
            let mut section = Table::new();
            set(&mut section, rest, value);
            *other = Value::Table(section);
        }
    }
}
