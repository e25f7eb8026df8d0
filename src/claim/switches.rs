//! Whether a consumer uses Redis, or goes on with the ledger alone: one state
//! for its workers and the thread that renews their claims, so that a switch is
//! made, told and counted once, and one thread alone asks a Redis that is away.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::backoff::Backoff;
use crate::observe::metrics::{Meter, Server};
use crate::random;

/// First and longest wait before a Redis that is away is asked again.
const PROBE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// A Redis that was used for so long is well: the next wait starts small.
const STABLE: Duration = Duration::from_secs(10);

/// Longest cause that is logged, in characters.
const CAUSE_MAX: usize = 300;

/// What [`Switches::counts`] tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// How often the consumer went on with the ledger alone.
    pub lost: u64,
    /// How often it came back to Redis: `lost`, or one less while it is away.
    pub regained: u64,
    /// For how long it has been away now; `None` while Redis is used.
    pub away: Option<Duration>,
}

/// Leave to ask Redis, given by [`Switches::permit`]. A failure counts only
/// against the Redis that the permit was given for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Permit(u64);

#[derive(Debug, Default)]
struct State {
    lost: u64,
    regained: u64,
    away: Option<Away>,
    /// Probes since Redis was last well for [`STABLE`].
    probes: u32,
    regained_at: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Away {
    since: Instant,
    probe_at: Instant,
}

/// Shared by the workers of one consumer and the [`super::Renewer`].
#[derive(Debug)]
pub struct Switches {
    consumer: String,
    /// Where it is shown.
    meter: Option<Arc<Meter>>,
    state: Mutex<State>,
    tell: Sender<()>,
    changes: Receiver<()>,
}

impl Switches {
    pub(super) fn new(consumer: &str) -> Self {
        let (tell, changes) = bounded(1);
        Self {
            consumer: consumer.to_owned(),
            meter: None,
            state: Mutex::default(),
            tell,
            changes,
        }
    }

    /// Shows it on `meter` too.
    pub(super) fn shown_on(mut self, meter: &Arc<Meter>) -> Self {
        meter.is_up(Server::Redis, true);
        self.meter = Some(Arc::clone(meter));
        self
    }

    /// How often Redis was lost and regained so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let state = self.lock();
        Counts {
            lost: state.lost,
            regained: state.regained,
            away: state.away.map(|away| away.since.elapsed()),
        }
    }

    /// `None` while Redis is to be gone without.
    pub(super) fn permit(&self) -> Option<Permit> {
        let state = self.lock();
        state.away.is_none().then_some(Permit(state.lost))
    }

    /// Redis failed whoever holds `permit`: from now on nobody gets one. Says
    /// so, unless another has, or Redis went and came back in the meantime.
    pub(super) fn leave(&self, permit: Permit, cause: &str) {
        let mut state = self.lock();
        if state.away.is_some() || state.lost != permit.0 {
            return;
        }
        if state.regained_at.is_none_or(|at| at.elapsed() >= STABLE) {
            state.probes = 0;
        }
        let since = Instant::now();
        let probe_at = since + wait(state.probes);
        state.lost += 1;
        state.away = Some(Away { since, probe_at });
        drop(state);
        self.tell.try_send(()).ok();
        if let Some(meter) = &self.meter {
            meter.is_up(Server::Redis, false);
        }
        log::warn!(
            consumer = self.consumer.as_str();
            "Redis cannot be used, going on with the ledger alone: {}", printable(cause)
        );
    }

    /// How long to wait for the next probe; `None` while Redis is used.
    pub(super) fn probe_in(&self) -> Option<Duration> {
        let away = self.lock().away?;
        Some(away.probe_at.saturating_duration_since(Instant::now()))
    }

    /// A probe failed.
    pub(super) fn stay(&self, cause: &str) {
        let mut state = self.lock();
        state.probes = state.probes.saturating_add(1);
        let probe_at = Instant::now() + wait(state.probes);
        if let Some(away) = &mut state.away {
            away.probe_at = probe_at;
        }
        drop(state);
        log::debug!(consumer = self.consumer.as_str(); "still without Redis: {}", printable(cause));
    }

    /// A probe succeeded: permits are given again.
    pub(super) fn come_back(&self) {
        let mut state = self.lock();
        let Some(away) = state.away.take() else {
            return;
        };
        state.regained += 1;
        // One that comes and goes is asked less and less often.
        state.probes = state.probes.saturating_add(1);
        state.regained_at = Some(Instant::now());
        let times = state.lost;
        drop(state);
        if let Some(meter) = &self.meter {
            meter.is_up(Server::Redis, true);
            meter.reconnected(Server::Redis);
        }
        let away = away.since.elapsed().as_millis();
        log::info!(
            consumer = self.consumer.as_str(),
            away_ms = u64::try_from(away).unwrap_or(u64::MAX), times = times;
            "Redis is back: claims are used again"
        );
    }

    /// Something comes when Redis was lost, for a `select!`.
    pub(super) fn changes(&self) -> &Receiver<()> {
        &self.changes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait(probes: u32) -> Duration {
    Backoff::new(PROBE.0, PROBE.1).delay(probes, random::draw())
}

/// What came over the network is cut, and cannot move the cursor.
fn printable(cause: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    cause.chars().take(CAUSE_MAX).map(clean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_who_fail_together_make_one_switch() {
        let switches = Switches::new("c");
        let permits = [switches.permit().unwrap(), switches.permit().unwrap()];
        for permit in permits {
            switches.leave(permit, "gone");
        }
        assert_eq!(switches.permit(), None);
        assert_eq!(switches.counts().lost, 1);
        assert!(switches.changes().try_recv().is_ok());
        assert!(switches.changes().try_recv().is_err());
    }

    #[test]
    fn a_failure_from_before_the_return_does_not_undo_it() {
        let switches = Switches::new("c");
        let slow = switches.permit().unwrap();
        switches.leave(slow, "gone");
        switches.come_back();
        switches.leave(slow, "gone");
        let counts = switches.counts();
        assert_eq!((counts.lost, counts.regained, counts.away), (1, 1, None));
        switches.leave(switches.permit().unwrap(), "gone again");
        assert_eq!(switches.counts().lost, 2);
    }

    #[test]
    fn who_is_away_is_asked_again_within_two_seconds() {
        let switches = Switches::new("c");
        assert_eq!(switches.probe_in(), None);
        switches.leave(switches.permit().unwrap(), "gone");
        for _ in 0..40 {
            assert!(switches.probe_in().unwrap() <= PROBE.1);
            switches.stay("still gone");
        }
        assert!(switches.counts().away.is_some());
        switches.come_back();
        assert_eq!(switches.probe_in(), None);
    }

    #[test]
    fn a_cause_is_one_line_of_bounded_length() {
        let cause = printable(&"a\nb\x1b".repeat(1_000));
        assert_eq!(cause.chars().count(), CAUSE_MAX);
        assert!(!cause.contains(char::is_control));
    }
}
