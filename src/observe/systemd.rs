//! What systemd is told, where it asks: that every consumer consumes, what they
//! are doing, and that they get somewhere. Where `$NOTIFY_SOCKET` is not set,
//! nothing of this happens.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;

use super::health::{Health, Report};
use crate::config;
use crate::stop::Stop;

/// How often the state is looked at.
const EVERY: Duration = Duration::from_secs(1);

/// What is asked for, again and again, while the servers are waited for.
const EXTENSION: Duration = Duration::from_secs(60);

/// Keeps systemd informed until the stop.
pub fn start(health: &Arc<Health>, stop: &Stop) {
    if !config::is_notify_service() {
        return;
    }
    let (health, stop) = (Arc::clone(health), stop.clone());
    let spawned = std::thread::Builder::new()
        .name("systemd".to_owned())
        .spawn(move || inform(&health, &stop));
    if let Err(error) = spawned {
        log::error!("systemd is not told anything: failed to start a thread: {error}");
    }
}

fn inform(health: &Health, stop: &Stop) {
    let mut is_ready = false;
    let mut last = String::new();
    loop {
        let reports = health.reports();
        let status = status(&reports);
        let mut states = Vec::new();
        if reports.iter().all(Report::is_alive) {
            states.push(NotifyState::Watchdog);
            if !is_ready {
                states.push(extend(EXTENSION));
            }
        }
        if !is_ready && reports.iter().all(Report::is_ready) {
            is_ready = true;
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

/// The daemon stops, and may take so long.
pub fn stopping(within: Duration) {
    tell(&[NotifyState::Stopping, extend(within + EXTENSION)]);
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
