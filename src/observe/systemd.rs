//! What systemd is told, where it asks: that every consumer consumes, what they
//! are doing, and that they get somewhere. Where `$NOTIFY_SOCKET` is not set,
//! nothing of this happens.

use std::fmt::Write as _;
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

/// The way to systemd. Says nothing where nobody listens.
pub struct Systemd {
    is_listening: bool,
    /// It was told that the daemon is ready.
    is_ready: Arc<AtomicBool>,
}

impl Systemd {
    /// Keeps systemd informed of `health`, on a thread of its own, until `stop`.
    #[must_use]
    pub fn start(health: &Arc<Health>, stop: &Stop) -> Self {
        let is_ready = Arc::new(AtomicBool::new(false));
        let is_listening = config::is_notify_service();
        if is_listening {
            let (health, stop, is_ready) = (Arc::clone(health), stop.clone(), is_ready.clone());
            let spawned = std::thread::Builder::new()
                .name("systemd".to_owned())
                .spawn(move || inform(&health, &stop, &is_ready));
            if let Err(error) = spawned {
                log::error!("systemd is not told anything: failed to start a thread: {error}");
            }
        }
        Self {
            is_listening,
            is_ready,
        }
    }

    /// A reload begins. Before the daemon is ready for the first time it is a
    /// part of the start.
    pub fn reloading(&self) {
        if self.is_ready.load(Ordering::Relaxed) {
            match NotifyState::monotonic_usec_now() {
                Ok(now) => self.tell(&[NotifyState::Reloading, now]),
                Err(error) => log::debug!("no time to tell systemd: {error}"),
            }
        }
    }

    /// A reload has come to an end, of whatever kind.
    pub fn reloaded(&self, outcome: &str) {
        if self.is_ready.load(Ordering::Relaxed) {
            self.tell(&[NotifyState::Ready, NotifyState::Status(outcome)]);
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

fn inform(health: &Health, stop: &Stop, is_ready: &AtomicBool) {
    let mut last = String::new();
    loop {
        let reports = health.reports();
        let status = status(&reports);
        let mut states = Vec::new();
        if reports.iter().all(Report::is_alive) {
            states.push(NotifyState::Watchdog);
            if !is_ready.load(Ordering::Relaxed) {
                states.push(extend(EXTENSION));
            }
        }
        if !reports.is_empty()
            && reports.iter().all(Report::is_ready)
            && !is_ready.swap(true, Ordering::Relaxed)
        {
            states.push(NotifyState::Ready);
        }
        if status != last {
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
        let _ = write!(line, ", deliveries in flight: {in_flight}");
    }
    for report in reports.iter().filter(|report| !report.is_ready()) {
        let _ = write!(line, "; {report}");
    }
    line
}
