//! A replay in steps: a few dead letters first, then ten times as many, then
//! the rest, each step only while what was replayed is applied. Pure.

use std::collections::HashMap;
use std::time::Duration;

use serde::Serialize;

/// How a replay in steps is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Canary {
    /// Letters of the first step.
    pub first: u64,
    /// Largest share of the replayed that may not be applied, in percent.
    pub abort_at: u8,
    /// Longest wait for the fate of a step.
    pub wait: Duration,
}

impl Canary {
    /// How many letters have been replayed when step `step`, counted from 0, is
    /// over; `None` for the last one, which takes all.
    #[must_use]
    pub fn ends_at(&self, step: u32) -> Option<u64> {
        match step {
            0 => Some(self.first),
            1 => Some(self.first.saturating_mul(11)),
            _ => None,
        }
    }

    /// Whether so many of `replayed` letters may go without being applied.
    #[must_use]
    pub fn tolerates(&self, not_applied: u64, replayed: u64) -> bool {
        let share = u128::from(not_applied) * 100;
        share <= u128::from(self.abort_at) * u128::from(replayed)
    }
}

/// What ledger and journal say of a letter that was replayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is in the ledger.
    Applied,
    /// It came to rest in the dead-letter queue again.
    DeadAgain(Trouble),
    /// An attempt failed, and another one is to come.
    Waiting(Trouble),
    /// Nothing is known of it yet.
    Unknown,
}

impl Fate {
    /// Whether it will not change any more.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Applied | Self::DeadAgain(_))
    }
}

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Trouble {
    /// Why it was dead-lettered; `None` when another attempt is to come.
    pub reason: Option<String>,
    /// SQLSTATE, HTTP status or exit status.
    pub code: Option<String>,
    /// First line of the error.
    pub error: String,
}

/// What became of the letters of one step, and of those before it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Outcome {
    /// Letters replayed so far.
    pub replayed: u64,
    /// Of these, in the ledger.
    pub applied: u64,
    /// Dead-lettered again.
    pub dead_again: u64,
    /// Waiting for another attempt when the wait was over.
    pub waiting: u64,
    /// Without a trace when the wait was over.
    pub unknown: u64,
}

impl Outcome {
    /// Counts `fates` in.
    pub fn add<'a>(&mut self, fates: impl IntoIterator<Item = &'a Fate>) {
        for fate in fates {
            self.replayed += 1;
            match fate {
                Fate::Applied => self.applied += 1,
                Fate::DeadAgain(_) => self.dead_again += 1,
                Fate::Waiting(_) => self.waiting += 1,
                Fate::Unknown => self.unknown += 1,
            }
        }
    }

    /// Letters that were replayed and are not applied.
    #[must_use]
    pub fn not_applied(&self) -> u64 {
        self.replayed - self.applied
    }
}

/// The `most` troubles that are met most often, with how often.
#[must_use]
pub fn commonest<'a>(
    fates: impl IntoIterator<Item = &'a Fate>,
    most: usize,
) -> Vec<(Trouble, u64)> {
    let mut counts: HashMap<&Trouble, u64> = HashMap::new();
    for fate in fates {
        if let Fate::DeadAgain(trouble) | Fate::Waiting(trouble) = fate {
            *counts.entry(trouble).or_default() += 1;
        }
    }
    let mut sorted: Vec<(&Trouble, u64)> = counts.into_iter().collect();
    sorted.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)));
    sorted.truncate(most);
    let owned = |(trouble, count): (&Trouble, u64)| (trouble.clone(), count);
    sorted.into_iter().map(owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn canary(first: u64, abort_at: u8) -> Canary {
        Canary {
            first,
            abort_at,
            wait: Duration::ZERO,
        }
    }

    fn dead(error: &str) -> Fate {
        Fate::DeadAgain(Trouble {
            reason: Some("rejected".to_owned()),
            code: None,
            error: error.to_owned(),
        })
    }

    #[test]
    fn the_steps_are_the_first_ten_times_as_many_and_all() {
        let canary = canary(5, 10);
        assert_eq!(canary.ends_at(0), Some(5));
        assert_eq!(canary.ends_at(1), Some(55));
        assert_eq!(canary.ends_at(2), None);
    }

    #[test]
    fn a_share_is_tolerated_up_to_the_percentage_and_no_further() {
        assert!(canary(10, 10).tolerates(1, 10));
        assert!(!canary(10, 10).tolerates(2, 10));
        assert!(canary(10, 0).tolerates(0, 10));
        assert!(!canary(10, 0).tolerates(1, u64::MAX));
        assert!(canary(10, 100).tolerates(10, 10));
        assert!(canary(10, 0).tolerates(0, 0), "nothing was replayed");
    }

    #[test]
    fn the_commonest_troubles_come_first() {
        let fates = [
            dead("a"),
            dead("b"),
            dead("b"),
            Fate::Applied,
            Fate::Unknown,
            dead("c"),
        ];
        let found = commonest(&fates, 2);
        let shown: Vec<_> = found.iter().map(|(t, n)| (t.error.as_str(), *n)).collect();
        assert_eq!(shown, [("b", 2), ("a", 1)]);
        let mut outcome = Outcome::default();
        outcome.add(&fates);
        assert_eq!(
            (outcome.replayed, outcome.applied, outcome.not_applied()),
            (6, 1, 5)
        );
    }
}
