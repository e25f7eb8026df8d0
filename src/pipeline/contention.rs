//! What the batches of one consumer have learned of one another: that they
//! meet on the same rows, and how many messages a transaction has time for.
//!
//! A consumer that applies one message in a transaction never deadlocks over
//! single rows, batches do. While they collide, one transaction is open at a
//! time, in all daemons of the consumer.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// So many lost races within [`WINDOW`] are no accident.
const RACES: u32 = 2;
const WINDOW: Duration = Duration::from_secs(30);

/// How long batches go single-file at first, and at most. Each time they
/// collide soon after they were let go, twice as long as the last.
const SINGLE_FILE_MIN: Duration = Duration::from_secs(30);
const SINGLE_FILE_MAX: Duration = Duration::from_secs(600);

/// How long a smaller batch is remembered.
const SMALLER_FOR: Duration = Duration::from_secs(60);

/// What changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// From here on one batch at a time, for so long at the least.
    SingleFile(Duration),
    /// From here on side by side again.
    Parallel,
}

/// Shared by the workers of one consumer.
#[derive(Debug, Default)]
pub struct Contention {
    state: Mutex<State>,
    lane: Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Lost races since the first of them.
    races: (u32, Option<Instant>),
    /// When the last single file began, or was met by a race again, and how
    /// long one lasts.
    since: Option<Instant>,
    lasts: Duration,
    is_single: bool,
    smaller: Option<(usize, Instant)>,
}

impl Contention {
    /// A transaction lost a race.
    pub fn collided(&self, now: Instant) -> Option<Turn> {
        let mut state = self.state();
        if state.is_single {
            state.since = Some(now);
            return None;
        }
        let is_old = |at: Instant| now.duration_since(at) > WINDOW;
        if state.races.1.is_none_or(is_old) {
            state.races = (0, Some(now));
        }
        state.races.0 += 1;
        if state.races.0 < RACES {
            return None;
        }
        let ended = state.since.map(|since| since + state.lasts);
        let is_soon = ended.is_some_and(|ended| now.duration_since(ended) < state.lasts);
        state.lasts = match is_soon {
            true => (state.lasts * 2).min(SINGLE_FILE_MAX),
            false => SINGLE_FILE_MIN,
        };
        state.since = Some(now);
        state.is_single = true;
        state.races = (0, None);
        Some(Turn::SingleFile(state.lasts))
    }

    /// Whether one batch is to be applied at a time, and whether that has just
    /// ended.
    pub fn is_single_file(&self, now: Instant) -> (bool, Option<Turn>) {
        let mut state = self.state();
        if !state.is_single {
            return (false, None);
        }
        let over = state
            .since
            .is_none_or(|since| now.duration_since(since) >= state.lasts);
        state.is_single = !over;
        (!over, over.then_some(Turn::Parallel))
    }

    /// Waits for one's turn in the single file of this daemon.
    pub fn lane(&self) -> MutexGuard<'_, ()> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A transaction of more than `messages` had too little time.
    pub fn shrink(&self, messages: usize, now: Instant) {
        self.state().smaller = Some((messages.max(1), now));
    }

    /// The most messages in a transaction, of `most` at other times. What is
    /// remembered is given up bit by bit.
    pub fn batch_max(&self, most: usize, now: Instant) -> usize {
        let mut state = self.state();
        let Some((messages, since)) = state.smaller else {
            return most;
        };
        if now.duration_since(since) < SMALLER_FOR {
            return messages.min(most);
        }
        let larger = messages.saturating_mul(2);
        state.smaller = (larger < most).then_some((larger, now));
        larger.min(most)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn one_race_is_an_accident_and_two_make_a_single_file_that_ends() {
        let (contention, begin) = (Contention::default(), Instant::now());
        assert_eq!(contention.collided(begin), None);
        assert_eq!(contention.collided(begin + 31 * SECOND), None, "long ago");
        assert_eq!(contention.is_single_file(begin), (false, None));
        let turn = contention.collided(begin + 32 * SECOND);
        assert_eq!(turn, Some(Turn::SingleFile(SINGLE_FILE_MIN)));
        let at = |seconds: u32| begin + (32 + seconds) * SECOND;
        assert_eq!(contention.is_single_file(at(29)), (true, None));
        assert_eq!(
            contention.is_single_file(at(30)),
            (false, Some(Turn::Parallel))
        );
        assert_eq!(contention.is_single_file(at(31)), (false, None));
    }

    #[test]
    fn a_file_that_collides_again_soon_lasts_twice_as_long_up_to_a_bound() {
        let contention = Contention::default();
        let mut now = Instant::now();
        let mut lasts = Vec::new();
        for _ in 0..7 {
            contention.collided(now);
            let Some(Turn::SingleFile(length)) = contention.collided(now) else {
                panic!("no single file");
            };
            lasts.push(length.as_secs());
            now += length;
            assert!(!contention.is_single_file(now).0);
            now += SECOND;
        }
        assert_eq!(lasts, [30, 60, 120, 240, 480, 600, 600]);
        now += 2 * SINGLE_FILE_MAX;
        contention.collided(now);
        let turn = contention.collided(now);
        assert_eq!(turn, Some(Turn::SingleFile(SINGLE_FILE_MIN)));
    }

    #[test]
    fn a_race_within_the_file_makes_it_last() {
        let (contention, begin) = (Contention::default(), Instant::now());
        contention.collided(begin);
        contention.collided(begin);
        assert_eq!(contention.collided(begin + 20 * SECOND), None);
        assert!(contention.is_single_file(begin + 40 * SECOND).0);
        assert!(!contention.is_single_file(begin + 50 * SECOND).0);
    }

    #[test]
    fn a_smaller_batch_is_remembered_and_grows_again() {
        let (contention, begin) = (Contention::default(), Instant::now());
        assert_eq!(contention.batch_max(256, begin), 256);
        contention.shrink(50, begin);
        assert_eq!(contention.batch_max(256, begin + 59 * SECOND), 50);
        assert_eq!(contention.batch_max(256, begin + 60 * SECOND), 100);
        assert_eq!(contention.batch_max(256, begin + 61 * SECOND), 100);
        assert_eq!(contention.batch_max(256, begin + 120 * SECOND), 200);
        assert_eq!(contention.batch_max(256, begin + 180 * SECOND), 256);
        contention.shrink(0, begin + 181 * SECOND);
        assert_eq!(contention.batch_max(256, begin + 181 * SECOND), 1);
    }
}
