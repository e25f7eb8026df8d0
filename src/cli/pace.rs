//! How fast `ackonce publish` goes.
//!
//! It spaces out what is sent, and makes up for a sleep that took too long, so
//! that a high rate is reached. A replay promises more, of what arrives, and has
//! [`crate::dead_letter::pace`], which follows the confirms.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use crate::stop::Stop;

/// Lateness that is made up for: what a sleep takes too long.
const CATCH_UP: Duration = Duration::from_millis(1);

/// Lets at most so many messages pass in a second, evenly.
pub(super) struct Pace {
    rate: Option<NonZeroU32>,
    next: Instant,
}

impl Pace {
    /// Without a `rate` there is no limit.
    pub(super) fn new(rate: Option<NonZeroU32>, now: Instant) -> Self {
        Self { rate, next: now }
    }

    /// Waits for the next one's turn; true when it is time to stop.
    pub(super) fn keep(&mut self, stop: &Stop) -> bool {
        let now = Instant::now();
        let due = self.turn(now);
        stop.wait(due.saturating_duration_since(now))
    }

    /// When the next one may go. What came late does not make the others hurry.
    fn turn(&mut self, now: Instant) -> Instant {
        let Some(rate) = self.rate else { return now };
        let turn = self.next.max(now.checked_sub(CATCH_UP).unwrap_or(now));
        self.next = turn + Duration::from_secs(1) / rate.get();
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_late_does_not_make_the_others_hurry() {
        let start = Instant::now();
        let tenth = Duration::from_millis(100);
        let mut pace = Pace::new(NonZeroU32::new(10), start);
        let turns = [0; 3].map(|_| pace.turn(start));
        assert_eq!(turns, [start, start + tenth, start + 2 * tenth]);
        let late = start + 50 * tenth;
        let turns = [0; 2].map(|_| pace.turn(late));
        assert_eq!(turns, [late - CATCH_UP, late - CATCH_UP + tenth]);
        assert_eq!(Pace::new(None, start).turn(late), late);
    }
}
