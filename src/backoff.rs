//! How long to wait before something that failed is tried again: attempt to
//! delay. Pure: the caller brings the randomness and does the waiting.

use std::time::Duration;

/// The shortest wait there is: a retry never spins.
const SHORTEST: Duration = Duration::from_millis(1);

/// Exponential backoff with full jitter: the longest wait doubles with each
/// attempt, and the wait is drawn evenly from everything up to it, so that
/// workers that failed together do not come back together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    min: Duration,
    max: Duration,
}

impl Backoff {
    /// Waits up to `min` before the first retry and never longer than `max`.
    /// Both are raised to at least 1 ms, and `max` to at least `min`.
    #[must_use]
    pub fn new(min: Duration, max: Duration) -> Self {
        let min = min.max(SHORTEST);
        Self {
            min,
            max: max.max(min),
        }
    }

    /// The wait before retry number `attempt`, counted from 0: 1 ms to
    /// `min` × 2^`attempt`, at most `max`. `random` picks the point in between
    /// and should be drawn evenly from all of `u64`.
    #[must_use]
    pub fn delay(&self, attempt: u32, random: u64) -> Duration {
        let factor = 2_u32.checked_pow(attempt).unwrap_or(u32::MAX);
        let ceiling = self.min.saturating_mul(factor).min(self.max);
        scale(ceiling, random).max(SHORTEST)
    }
}

/// `ceiling` × `random` / 2^64, rounded down: without a float's rounding, so
/// never above `ceiling`.
fn scale(ceiling: Duration, random: u64) -> Duration {
    let seconds = u128::from(ceiling.as_secs()) * u128::from(random);
    let nanos = u128::from(ceiling.subsec_nanos()) * u128::from(random);
    let fraction = (seconds & u128::from(u64::MAX)) * 1_000_000_000 + nanos;
    let whole = Duration::from_secs((seconds >> 64) as u64);
    whole.saturating_add(Duration::from_nanos((fraction >> 64) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIN: Duration = Duration::from_millis(500);
    const MAX: Duration = Duration::from_secs(30);

    #[test]
    fn the_longest_wait_doubles_until_it_is_the_maximum() {
        let backoff = Backoff::new(MIN, MAX);
        let longest = |attempt| backoff.delay(attempt, u64::MAX).as_secs_f64().round();
        let waits: Vec<f64> = (1..=8).map(longest).collect();
        assert_eq!(waits, [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]);
    }

    #[test]
    fn the_jitter_is_full() {
        let backoff = Backoff::new(MIN, MAX);
        assert_eq!(backoff.delay(0, 0), SHORTEST);
        assert_eq!(backoff.delay(0, u64::MAX / 2 + 1), MIN / 2);
    }

    proptest! {
        #[test]
        fn a_delay_is_within_its_bounds(
            min: Duration,
            max: Duration,
            attempt: u32,
            random: u64,
        ) {
            let delay = Backoff::new(min, max).delay(attempt, random);
            prop_assert!(delay >= SHORTEST);
            prop_assert!(delay <= max.max(min).max(SHORTEST));
        }

        #[test]
        fn a_later_attempt_or_a_larger_draw_never_waits_less(
            min: Duration,
            max: Duration,
            attempt in 0_u32..100,
            random: u64,
        ) {
            let backoff = Backoff::new(min, max);
            let delay = backoff.delay(attempt, random);
            prop_assert!(backoff.delay(attempt + 1, random) >= delay);
            prop_assert!(backoff.delay(attempt, random.saturating_add(1)) >= delay);
        }
    }
}
