//! Where a dead letter stands: what would become of it if it were replayed.
//! Pure: what ledger, journal and claims say comes in, a verdict goes out.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::config::format_duration;
use crate::message::{DeadReason, Fingerprint};

/// What would become of a dead letter that is replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Nothing of it is in the ledger: it will run.
    NeverApplied,
    /// It is in the ledger, with this body: it need only be acknowledged.
    AlreadyApplied,
    /// Another copy of it is in work, or waits for a retry: left where it is.
    InProgress,
    /// It is older than the ledger remembers, so that the ledger cannot tell
    /// whether it was applied: left where it is, unless told otherwise.
    BeyondRetention,
    /// The ledger has its id with another body: it would be rejected again.
    IdConflict,
    /// The consumer finds no usable id in it: it would be rejected again.
    NoId,
}

impl Standing {
    /// All there are, in the order in which they are shown.
    pub const ALL: [Self; 6] = [
        Self::NeverApplied,
        Self::AlreadyApplied,
        Self::InProgress,
        Self::BeyondRetention,
        Self::IdConflict,
        Self::NoId,
    ];

    /// The name, as shown and as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NeverApplied => "never-applied",
            Self::AlreadyApplied => "already-applied",
            Self::InProgress => "in-progress",
            Self::BeyondRetention => "beyond-retention",
            Self::IdConflict => "id-conflict",
            Self::NoId => "no-id",
        }
    }
}

/// What is known of one dead letter.
#[derive(Debug, Clone, Copy)]
pub struct Facts {
    /// Why it has no usable id, if it has none.
    pub unusable: Option<DeadReason>,
    /// SHA-256 of its body.
    pub fingerprint: Fingerprint,
    /// Fingerprint of the ledger row with its id, if there is one.
    pub applied: Option<Fingerprint>,
    /// Somebody holds the claim on its id.
    pub claimed: bool,
    /// A copy of it waits for a retry.
    pub waits: bool,
    /// How long ago it was published or first dead-lettered, whichever is
    /// longer; `None` when nothing tells.
    pub age: Option<Duration>,
}

/// A standing and its grounds, for humans.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Where it stands.
    pub standing: Standing,
    /// Why.
    pub why: String,
}

/// Where a dead letter with these `facts` stands, with a ledger that remembers
/// for `retention`.
///
/// The ledger is asked first: what it has is known, whatever the age.
#[must_use]
pub fn judge(facts: &Facts, retention: Duration) -> Verdict {
    let (standing, why) = if let Some(reason) = facts.unusable {
        (
            Standing::NoId,
            format!("{reason}: it would be rejected again"),
        )
    } else if let Some(applied) = facts.applied {
        match applied == facts.fingerprint {
            true => (
                Standing::AlreadyApplied,
                "it is in the ledger: it need only be acknowledged".to_owned(),
            ),
            false => (
                Standing::IdConflict,
                "a message with this id and another body was applied: it would be rejected again"
                    .to_owned(),
            ),
        }
    } else if facts.claimed {
        let why = "a worker holds its id at the moment";
        (Standing::InProgress, why.to_owned())
    } else if facts.waits {
        let why = "a copy of it waits for its next attempt";
        (Standing::InProgress, why.to_owned())
    } else {
        by_age(facts.age, retention)
    };
    Verdict { standing, why }
}

fn by_age(age: Option<Duration>, retention: Duration) -> (Standing, String) {
    let remembers = format_duration(retention);
    match age {
        Some(age) if age <= retention => (
            Standing::NeverApplied,
            "it is not in the ledger: it will run".to_owned(),
        ),
        Some(age) => {
            let age = format_duration(Duration::from_secs(age.as_secs()));
            let why = format!(
                "it is {age} old and the ledger remembers {remembers}: whether it was applied \
                 cannot be told"
            );
            (Standing::BeyondRetention, why)
        }
        None => {
            let why = format!(
                "nothing tells its age, and the ledger remembers {remembers}: whether it was \
                 applied cannot be told"
            );
            (Standing::BeyondRetention, why)
        }
    }
}

/// How many dead letters stand where.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Count(BTreeMap<Standing, u64>);

impl Count {
    /// One more.
    pub fn add(&mut self, standing: Standing) {
        *self.0.entry(standing).or_default() += 1;
    }

    /// How many stand there.
    #[must_use]
    pub fn of(&self, standing: Standing) -> u64 {
        self.0.get(&standing).copied().unwrap_or(0)
    }

    /// How many there are.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    const OURS: Fingerprint = Fingerprint([1; 32]);
    const OTHER: Fingerprint = Fingerprint([2; 32]);

    fn fresh() -> Facts {
        Facts {
            unusable: None,
            fingerprint: OURS,
            applied: None,
            claimed: false,
            waits: false,
            age: Some(DAY),
        }
    }

    fn standing(facts: &Facts) -> Standing {
        judge(facts, 30 * DAY).standing
    }

    #[test]
    fn what_the_ledger_has_is_known_whatever_else_is_said() {
        for age in [None, Some(DAY), Some(300 * DAY)] {
            for (claimed, waits) in [(false, false), (true, false), (false, true)] {
                let applied = Facts {
                    applied: Some(OURS),
                    claimed,
                    waits,
                    age,
                    ..fresh()
                };
                assert_eq!(standing(&applied), Standing::AlreadyApplied);
                let other = Facts {
                    applied: Some(OTHER),
                    ..applied
                };
                assert_eq!(standing(&other), Standing::IdConflict);
            }
        }
    }

    #[test]
    fn without_a_usable_id_nothing_else_counts() {
        let facts = Facts {
            unusable: Some(DeadReason::MissingId),
            applied: Some(OURS),
            claimed: true,
            ..fresh()
        };
        assert_eq!(standing(&facts), Standing::NoId);
    }

    #[test]
    fn a_claim_and_a_waiting_copy_mean_that_it_is_in_progress() {
        assert_eq!(
            standing(&Facts {
                claimed: true,
                ..fresh()
            }),
            Standing::InProgress
        );
        assert_eq!(
            standing(&Facts {
                waits: true,
                ..fresh()
            }),
            Standing::InProgress
        );
    }

    #[test]
    fn the_ledger_speaks_for_no_more_than_its_retention() {
        assert_eq!(standing(&fresh()), Standing::NeverApplied);
        let aged = |age| standing(&Facts { age, ..fresh() });
        assert_eq!(aged(Some(30 * DAY)), Standing::NeverApplied);
        let older = 30 * DAY + Duration::from_secs(1);
        assert_eq!(aged(Some(older)), Standing::BeyondRetention);
        assert_eq!(aged(None), Standing::BeyondRetention);
    }
}
