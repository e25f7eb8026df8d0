//! The daemons: started, started again when they end, and watched.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::servers::wait_until;

pub const BINARY: &str = env!("CARGO_BIN_EXE_ackonce");

/// How long a daemon's memory is left to grow before it is noted as its start.
const WARM_UP: Duration = Duration::from_secs(20);

/// How long a stop may take: the configured 25 s, and some.
const STOP_WITHIN: Duration = Duration::from_secs(45);

/// One life of one daemon.
#[derive(Debug, Clone)]
pub struct Life {
    pub daemon: usize,
    pub lasted: Duration,
    /// Resident memory after the warm-up, at most since, and at the end, in
    /// KiB; zero when it did not live that long.
    pub memory_kib: [u64; 3],
}

/// One daemon, life after life.
#[derive(Debug)]
struct Slot {
    config: PathBuf,
    log: PathBuf,
    /// Zero while none runs.
    pid: AtomicI32,
    /// Seconds that the next life's clock is off.
    clock: AtomicI64,
    lives: AtomicU64,
    ends: Mutex<Vec<ExitStatus>>,
}

#[derive(Debug)]
struct Shared {
    slots: Vec<Slot>,
    mutant: Option<String>,
    /// Starts nothing any more.
    closing: AtomicBool,
    lives: Mutex<Vec<Life>>,
}

/// The daemons. Dropping this kills them.
#[derive(Debug)]
pub struct Fleet {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Fleet {
    /// One daemon for each configuration. Their logs go beside those.
    pub fn start(configs: Vec<PathBuf>, mutant: Option<String>) -> Self {
        let slot = |config: PathBuf| Slot {
            log: config.with_extension("log"),
            config,
            pid: AtomicI32::default(),
            clock: AtomicI64::default(),
            lives: AtomicU64::default(),
            ends: Mutex::default(),
        };
        let shared = Arc::new(Shared {
            slots: configs.into_iter().map(slot).collect(),
            mutant,
            closing: AtomicBool::default(),
            lives: Mutex::default(),
        });
        let supervised = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("fleet".to_owned())
            .spawn(move || supervise(&supervised))
            .expect("a thread");
        Self {
            shared,
            thread: Some(thread),
        }
    }

    pub fn len(&self) -> usize {
        self.shared.slots.len()
    }

    /// The process of this daemon, waiting for one if it is between two lives.
    pub fn pid(&self, daemon: usize) -> Option<i32> {
        let slot = &self.shared.slots[daemon];
        let runs = || slot.pid.load(SeqCst) != 0;
        wait_until(Duration::from_secs(5), runs).then(|| slot.pid.load(SeqCst))
    }

    /// Sends `signal`, and waits until the daemon has ended of it. Whether it
    /// has.
    pub fn end(&self, daemon: usize, signal: Signal) -> bool {
        let Some(pid) = self.pid(daemon) else {
            return false;
        };
        let before = self.ends_of(daemon);
        if kill(Pid::from_raw(pid), signal).is_err() {
            return false;
        }
        wait_until(STOP_WITHIN, || self.ends_of(daemon) > before)
            && self.last_end(daemon).is_some_and(|status| match signal {
                Signal::SIGTERM => status.code() == Some(0),
                signal => status.signal() == Some(signal as i32),
            })
    }

    /// Sets the clock of this daemon's next lives off by `seconds`.
    pub fn set_clock(&self, daemon: usize, seconds: i64) {
        self.shared.slots[daemon].clock.store(seconds, SeqCst);
    }

    pub fn ends_of(&self, daemon: usize) -> usize {
        let ends = &self.shared.slots[daemon].ends;
        ends.lock().expect("the ends").len()
    }

    fn last_end(&self, daemon: usize) -> Option<ExitStatus> {
        let ends = &self.shared.slots[daemon].ends;
        ends.lock().expect("the ends").last().copied()
    }

    /// Every end that is neither a clean stop nor the nemesis's SIGKILL.
    pub fn strange_ends(&self) -> Vec<(usize, ExitStatus)> {
        let mut strange = Vec::new();
        for (daemon, slot) in self.shared.slots.iter().enumerate() {
            let ends = slot.ends.lock().expect("the ends");
            let usual =
                |end: &ExitStatus| end.success() || end.signal() == Some(Signal::SIGKILL as i32);
            let unusual = ends.iter().filter(|end| !usual(end));
            strange.extend(unusual.map(|end| (daemon, *end)));
        }
        strange
    }

    /// Times that daemons were started.
    pub fn lives(&self) -> u64 {
        let slots = self.shared.slots.iter();
        slots.map(|slot| slot.lives.load(SeqCst)).sum()
    }

    /// How long the daemon's log is, in bytes, all lives together.
    pub fn log_length(&self, daemon: usize) -> u64 {
        let log = std::fs::metadata(&self.shared.slots[daemon].log);
        log.map_or(0, |log| log.len())
    }

    /// What the daemon has logged since its log had this length.
    pub fn log_since(&self, daemon: usize, length: u64) -> String {
        let mut text = Vec::new();
        if let Ok(mut log) = std::fs::File::open(&self.shared.slots[daemon].log)
            && log.seek(SeekFrom::Start(length)).is_ok()
        {
            drop(log.read_to_end(&mut text));
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Stops all of them. Whether each ended with status 0.
    pub fn stop(&mut self) -> bool {
        self.shared.closing.store(true, SeqCst);
        let stopped = (0..self.len()).map(|daemon| {
            self.shared.slots[daemon].pid.load(SeqCst) == 0 || self.end(daemon, Signal::SIGTERM)
        });
        let all = stopped.collect::<Vec<_>>().into_iter().all(|clean| clean);
        self.finish();
        all
    }

    /// Every life that has ended.
    pub fn past_lives(&self) -> Vec<Life> {
        self.shared.lives.lock().expect("the lives").clone()
    }

    fn finish(&mut self) {
        self.shared.closing.store(true, SeqCst);
        for slot in &self.shared.slots {
            let pid = slot.pid.load(SeqCst);
            if pid != 0 {
                kill(Pid::from_raw(pid), Signal::SIGKILL).ok();
            }
        }
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A daemon that runs.
struct Running {
    child: Child,
    since: Instant,
    memory_kib: [u64; 3],
    looked_at: Instant,
}

/// Starts what does not run and reaps what has ended, until it is to end and
/// nothing runs. All daemons are this thread's: should it end, so do they.
fn supervise(shared: &Shared) {
    let mut running: Vec<Option<Running>> = shared.slots.iter().map(|_| None).collect();
    loop {
        let closing = shared.closing.load(SeqCst);
        for (daemon, slot) in shared.slots.iter().enumerate() {
            match &mut running[daemon] {
                None if closing => {}
                None => running[daemon] = start(slot, shared.mutant.as_deref()),
                Some(life) => {
                    life.look();
                    if let Some(status) = life.child.try_wait().expect("wait") {
                        let life = life.end(daemon);
                        shared.lives.lock().expect("the lives").push(life);
                        running[daemon] = None;
                        slot.pid.store(0, SeqCst);
                        slot.ends.lock().expect("the ends").push(status);
                    }
                }
            }
        }
        if closing && running.iter().all(Option::is_none) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn start(slot: &Slot, mutant: Option<&str>) -> Option<Running> {
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(&slot.log)
        .expect("the daemon's log");
    // Should this process be killed, its daemons go with it.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", BINARY, "run", "--config"])
        .arg(&slot.config)
        .env("RUST_LOG", "info")
        .env("RUST_BACKTRACE", "1")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    if let Some(mutant) = mutant {
        command.env("ACKONCE_MUTANT", mutant);
    }
    let offset = slot.clock.load(SeqCst);
    if let (Some(library), true) = (faketime(), offset != 0) {
        command
            .env("LD_PRELOAD", library)
            .env("FAKETIME", format!("{offset:+}"))
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    }
    let child = command.spawn().expect("setpriv starts the daemon");
    slot.lives.fetch_add(1, SeqCst);
    slot.pid.store(child.id().cast_signed(), SeqCst);
    let now = Instant::now();
    Some(Running {
        child,
        since: now,
        memory_kib: [0; 3],
        looked_at: now,
    })
}

impl Running {
    /// Notes its memory, once a second.
    fn look(&mut self) {
        if self.looked_at.elapsed() < Duration::from_secs(1) || self.since.elapsed() < WARM_UP {
            return;
        }
        self.looked_at = Instant::now();
        let Some(now) = resident_kib(self.child.id()) else {
            return;
        };
        let [first, most, last] = &mut self.memory_kib;
        if *first == 0 {
            *first = now;
        }
        *most = now.max(*most);
        *last = now;
    }

    fn end(&self, daemon: usize) -> Life {
        Life {
            daemon,
            lasted: self.since.elapsed(),
            memory_kib: self.memory_kib,
        }
    }
}

fn resident_kib(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().split(' ').next()?.parse().ok()
}

/// Debian's library that sets a process's clock off, where it is installed.
pub fn faketime() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").ok()?;
    let library = |folder: std::fs::DirEntry| folder.path().join("faketime/libfaketimeMT.so.1");
    folders
        .filter_map(Result::ok)
        .map(library)
        .find(|library| library.exists())
}
