//! The values that labels can have: closed sets, none of which a message could
//! add to.

use crate::failure::Class;
use crate::message::DeadReason;

/// Where a duplicate was recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundIn {
    /// Redis had the mark of this ledger.
    Redis,
    /// The ledger had its row.
    Ledger,
    /// The first one was in work in this process.
    Flight,
}

/// A server that the daemon needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// RabbitMQ.
    Broker,
    /// Redis.
    Redis,
    /// PostgreSQL.
    Postgres,
}

/// Why a consumer takes no messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseCause {
    /// The world is broken: a systemic failure.
    World,
    /// So many attempts in a row failed that it must be.
    Breaker,
}

/// What the ledger was asked for when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LedgerStep {
    /// Inserting the rows of a batch.
    Record,
    /// A COMMIT that was not answered.
    Commit,
    /// Claiming for a keyed handler.
    Claim,
    /// Recording what a keyed handler has done.
    Complete,
    /// Writing the failure journal.
    Journal,
    /// Renewing the claims of a keyed handler.
    Renew,
}

/// What became of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Applied,
    Duplicate,
    Retried,
    DeadLettered,
    Returned,
    Lost,
}

/// Why a transaction that holds several messages is run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RerunCause {
    /// One of its messages failed, and is left out.
    Fault,
    /// Another transaction was in its way.
    Race,
    /// It took too long, and is made smaller.
    Timeout,
}

/// A table that is pruned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PrunedTable {
    Ledger,
    Failure,
    Suspect,
    Claim,
}

/// A closed set of values; `COUNT` of them, in the order of their declaration.
pub(super) trait Label<const COUNT: usize>: Copy {
    const ALL: [Self; COUNT];

    fn name(self) -> &'static str;

    fn names() -> [&'static str; COUNT] {
        Self::ALL.map(Self::name)
    }
}

macro_rules! labels {
    ($label:ident, $count:literal: $($value:ident $name:literal),+) => {
        impl Label<$count> for $label {
            const ALL: [Self; $count] = [$(Self::$value),+];

            fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $name),+
                }
            }
        }
    };
}

labels!(FoundIn, 3: Redis "redis", Ledger "ledger", Flight "flight");
labels!(Server, 3: Broker "rabbitmq", Redis "redis", Postgres "postgresql");
labels!(PauseCause, 2: World "systemic", Breaker "breaker");
labels!(RerunCause, 3: Fault "fault", Race "race", Timeout "timeout");
labels!(LedgerStep, 6: Record "record", Commit "commit", Claim "claim", Complete "complete",
    Journal "journal", Renew "renew");
labels!(Outcome, 6: Applied "applied", Duplicate "duplicate", Retried "retried",
    DeadLettered "dead-lettered", Returned "returned", Lost "lost");
labels!(PrunedTable, 4: Ledger "ledger", Failure "failure", Suspect "suspect", Claim "claim");

impl Label<{ Class::ALL.len() }> for Class {
    const ALL: [Self; Class::ALL.len()] = Class::ALL;

    fn name(self) -> &'static str {
        self.as_str()
    }
}

impl Label<{ DeadReason::ALL.len() }> for DeadReason {
    const ALL: [Self; DeadReason::ALL.len()] = DeadReason::ALL;

    fn name(self) -> &'static str {
        self.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A meter's arrays are read at the number of the value.
    fn assert_in_order<const COUNT: usize, L: Label<COUNT>>(number: fn(L) -> usize) {
        let numbers: Vec<usize> = L::ALL.into_iter().map(number).collect();
        assert_eq!(numbers, (0..COUNT).collect::<Vec<_>>());
    }

    #[test]
    fn every_value_stands_at_its_own_number() {
        assert_in_order(|it: FoundIn| it as usize);
        assert_in_order(|it: Server| it as usize);
        assert_in_order(|it: PauseCause| it as usize);
        assert_in_order(|it: RerunCause| it as usize);
        assert_in_order(|it: LedgerStep| it as usize);
        assert_in_order(|it: Outcome| it as usize);
        assert_in_order(|it: PrunedTable| it as usize);
        assert_in_order(|it: Class| it as usize);
        assert_in_order(|it: DeadReason| it as usize);
    }
}
