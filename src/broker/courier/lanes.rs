//! Which destinations of copies are in trouble, and when each is tried again.
//! Sends nothing.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::copy::LaneName;
use crate::backoff::Backoff;

/// Shortest time between two lines of the log about one lane.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// One for each destination: the retry queues, and the dead-letter exchange.
pub(super) struct Lanes {
    backoff: Backoff,
    lanes: HashMap<LaneName, Lane>,
}

struct Lane {
    /// In a row; none while it is in order.
    failures: u32,
    due: Instant,
    told: Option<Instant>,
}

impl Lanes {
    pub(super) fn new(backoff: Backoff) -> Self {
        Self {
            backoff,
            lanes: HashMap::new(),
        }
    }

    /// When the next copy can be tried there; `None` when it is in order.
    pub(super) fn trouble(&self, name: LaneName) -> Option<Instant> {
        let lane = self.lanes.get(&name)?;
        (lane.failures > 0).then_some(lane.due)
    }

    /// A copy arrived.
    pub(super) fn succeeded(&mut self, name: LaneName) {
        if let Some(lane) = self.lanes.get_mut(&name) {
            lane.failures = 0;
        }
    }

    /// Copies did not arrive, however many at once. Returns how often in a row
    /// when that is to be told: at first, and then ever more rarely.
    pub(super) fn failed(&mut self, name: LaneName, now: Instant, random: u64) -> Option<u32> {
        let lane = self.lanes.entry(name).or_insert(Lane {
            failures: 0,
            due: now,
            told: None,
        });
        lane.due = now + self.backoff.delay(lane.failures, random);
        lane.failures = lane.failures.saturating_add(1);
        let quiet = |told| now.duration_since(told) < TELL_EVERY;
        if !lane.failures.is_power_of_two() || lane.told.is_some_and(quiet) {
            return None;
        }
        lane.told = Some(now);
        Some(lane.failures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_waits_for_itself_and_is_told_ever_more_rarely() {
        let second = Duration::from_secs(1);
        let start = Instant::now();
        let mut lanes = Lanes::new(Backoff::new(second, second * 60));
        let dead = LaneName::DeadLetters;
        assert_eq!(lanes.failed(dead, start, u64::MAX), Some(1));
        assert!(lanes.trouble(dead).is_some_and(|due| due > start));
        assert_eq!(lanes.trouble(LaneName::Retry(0)), None);
        let later = start + TELL_EVERY;
        let told: Vec<_> = (0..7).map(|_| lanes.failed(dead, later, 0)).collect();
        assert_eq!(told, [Some(2), None, None, None, None, None, None]);
        lanes.succeeded(dead);
        assert_eq!(lanes.trouble(dead), None);
        assert_eq!(lanes.failed(dead, later, 0), None, "it has just been told");
        let much_later = later + TELL_EVERY;
        assert_eq!(lanes.failed(dead, much_later, 0), Some(2));
    }
}
