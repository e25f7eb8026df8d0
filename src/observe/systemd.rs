//! What systemd is told, where it asks: that every consumer consumes, what they
//! are doing, and that they get somewhere. Where `$NOTIFY_SOCKET` is not set,
//! nothing of this happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sd_notify::NotifyState;

use super::health::{Health, Report};
use crate::config;
use crate::stop::Stop;

/// How often the state is looked at.
const EVERY: Duration = Duration::from_secs(1);

/// What is asked for, again and again, while the servers are waited for.
const EXTENSION: Duration = Duration::from_secs(60);

/// How a reload came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// The new configuration is in force.
    Done,
    /// The old one still is.
    Refused,
}

/// The way to systemd. Says nothing where nobody listens.
pub struct Systemd {
    is_listening: bool,
    told: Arc<Told>,
}

/// What the daemon and the thread that informs systemd have told it.
#[derive(Default)]
struct Told {
    /// That the daemon is ready.
    is_ready: AtomicBool,
    /// A status other than the usual one.
    is_unusual: AtomicBool,
    /// That the last reload was refused.
    is_refused: AtomicBool,
}

impl Systemd {
    /// Keeps systemd informed of `health`, on a thread of its own, until `stop`.
    #[must_use]
    pub fn start(health: &Arc<Health>, stop: &Stop) -> Self {
        let told = Arc::new(Told::default());
        let is_listening = config::is_notify_service();
        if is_listening {
            let (health, stop, told) = (Arc::clone(health), stop.clone(), Arc::clone(&told));
            let spawned = std::thread::Builder::new()
                .name("systemd".to_owned())
                .spawn(move || inform(&health, &stop, &told));
            if let Err(error) = spawned {
                log::error!("systemd is not told anything: failed to start a thread: {error}");
            }
        }
        Self { is_listening, told }
    }

    /// A reload begins. Before the daemon is ready for the first time it is a
    /// part of the start.
    pub fn reloading(&self) {
        if self.told.is_ready.load(Ordering::Relaxed) {
            match NotifyState::monotonic_usec_now() {
                Ok(now) => self.tell(&[NotifyState::Reloading, now]),
                Err(error) => log::debug!("no time to tell systemd: {error}"),
            }
        }
    }

    /// A reload has come to its end. Its status gives way to the usual one, which
    /// keeps a refusal in mind, within a second.
    pub fn reloaded(&self, end: Reload) {
        let status = match end {
            Reload::Done => "reloaded",
            Reload::Refused => "reload refused, see the log",
        };
        let is_refused = end == Reload::Refused;
        self.told.is_refused.store(is_refused, Ordering::Relaxed);
        if self.told.is_ready.load(Ordering::Relaxed) {
            self.tell(&[NotifyState::Ready, NotifyState::Status(status)]);
            // Only now: the usual one must not come before it.
            self.told.is_unusual.store(true, Ordering::Release);
        }
    }

    /// The daemon stops, and may take so long.
    pub fn stopping(&self, within: Duration) {
        let extended = extend(within.saturating_add(EXTENSION));
        self.tell(&[NotifyState::Stopping, extended]);
    }

    fn tell(&self, states: &[NotifyState<'_>]) {
        if self.is_listening {
            tell(states);
        }
    }
}

fn inform(health: &Health, stop: &Stop, told: &Told) {
    let mut last = String::new();
    loop {
        let is_unusual = told.is_unusual.swap(false, Ordering::Acquire);
        let reports = health.reports();
        let mut status = status(&reports);
        if told.is_refused.load(Ordering::Relaxed) {
            status.push_str("; the last reload was refused, see the log");
        }
        let mut states = Vec::new();
        if reports.iter().all(Report::is_alive) {
            states.push(NotifyState::Watchdog);
            if !told.is_ready.load(Ordering::Relaxed) {
                states.push(extend(EXTENSION));
            }
        }
        if !reports.is_empty()
            && reports.iter().all(Report::is_ready)
            && !told.is_ready.swap(true, Ordering::Relaxed)
        {
            states.push(NotifyState::Ready);
        }
        if is_unusual || status != last {
            states.push(NotifyState::Status(&status));
        }
        tell(&states);
        last = status;
        if stop.wait(EVERY) {
            return;
        }
    }
}

fn extend(by: Duration) -> NotifyState<'static> {
    NotifyState::ExtendTimeoutUsec(u32::try_from(by.as_micros()).unwrap_or(u32::MAX))
}

fn tell(states: &[NotifyState<'_>]) {
    if !states.is_empty()
        && let Err(error) = sd_notify::notify(states)
    {
        log::debug!("failed to tell systemd: {error}");
    }
}

/// One line: who is not well, or that all are.
fn status(reports: &[Report]) -> String {
    if reports.is_empty() {
        return "waiting for PostgreSQL".to_owned();
    }
    let in_flight: usize = reports.iter().map(|report| report.in_flight).sum();
    let ready = reports.iter().filter(|report| report.is_ready()).count();
    let mut line = format!("{ready} of {} consumers consume", reports.len());
    if in_flight > 0 {
        line += &format!(", deliveries in flight: {in_flight}");
    }
    for report in reports.iter().filter(|report| !report.is_ready()) {
        line += &format!("; {report}");
    }
    line
}
