//! `ackonce replay`: dead letters published again, each confirmed before it
//! leaves the dead-letter queue.
//!
//! A letter is in one of three places at any moment: in the dead-letter queue,
//! in both queues, or where it was sent. So nothing that ends a replay, be it a
//! signal, a lost server or a power cut, loses one; and one that is in both
//! queues has the same id there, so the consumer applies it once, and the next
//! replay finds it in the ledger and only acknowledges it.

mod engine;
mod fates;
mod force;
mod hold;
mod sending;
mod way;

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use thiserror::Error;

pub use engine::{Tools, run};
pub use way::{Way, origins};

use super::canary::{Canary, Outcome, Trouble};
use super::desk;
use super::letter::PRINT_PREFIX;
use super::pace::Rate;
use super::plan::Standing;
use super::republish::Destination;
use crate::broker::error::ConnectError;
use crate::broker::publisher::PublishError;
use crate::postgres;

/// What is to be replayed, and how.
#[derive(Debug, Clone)]
pub struct Order {
    /// Whereto.
    pub destination: Destination,
    /// Most letters that are published.
    pub limit: Option<u64>,
    /// How fast.
    pub rate: Option<Rate>,
    /// In steps.
    pub canary: Option<Canary>,
    /// Those of which the ledger cannot tell whether they were applied, too.
    pub beyond_retention: bool,
    /// Even those that were applied; the letters are then asked for by id.
    pub force: bool,
    /// With [`Destination::Origin`], also to exchanges that are none of the
    /// consumer's bindings.
    pub any_origin: bool,
    /// As [`crate::broker::desk::Desk::open`] has it.
    pub despite_limit: bool,
    /// Letters are given back and taken anew after this time, because the broker
    /// closes a channel that holds one for too long.
    pub hold: Duration,
}

/// What became of one letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// It was published, confirmed, and has left the dead-letter queue.
    Replayed,
    /// It was applied before: it has left the dead-letter queue.
    Acknowledged,
    /// It is where it was.
    Left,
}

/// Why a letter was left, beside where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hindrance {
    /// No queue takes what is sent there.
    Unroutable,
    /// The queue it was routed to refused it.
    Refused,
    /// AMQP or the broker has no room for it.
    Unfit,
    /// It should go where it came from, and that is not known, is none of the
    /// consumer's bindings, or is the dead-letter queue.
    NoOrigin,
}

impl Hindrance {
    /// The name, as shown and as in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unroutable => "unroutable",
            Self::Refused => "refused",
            Self::Unfit => "unfit",
            Self::NoOrigin => "no-origin",
        }
    }
}

/// One letter and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// Its id, if it has a usable one.
    pub id: Option<String>,
    /// SHA-256 of its body, in hex.
    pub fingerprint: String,
    /// Where it stood.
    pub standing: Standing,
    /// What became of it.
    pub action: Action,
    /// What hindered it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hindrance: Option<Hindrance>,
    /// Why, for humans.
    pub why: String,
}

/// What a replay did.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Report {
    /// Letters in the queue when it began.
    pub depth: u64,
    /// Letters that were looked at and asked for.
    pub matched: u64,
    /// Published, confirmed, and gone from the dead-letter queue.
    pub replayed: u64,
    /// Applied before, and gone from the dead-letter queue.
    pub acknowledged: u64,
    /// Ids whose ledger row was forgotten.
    pub forgotten: u64,
    /// Published without an answer: they may be in both queues.
    pub unconfirmed: u64,
    /// Left for where they stand.
    pub left: BTreeMap<Standing, u64>,
    /// Left for what hindered them.
    pub hindered: BTreeMap<Hindrance, u64>,
    /// What the canary found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canary: Option<Outcome>,
    /// Why it ended before its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut_short: Option<String>,
}

impl Report {
    /// Letters that were asked for and are still where they were.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.values().sum::<u64>() + self.hindered.values().sum::<u64>()
    }
}

impl Line {
    /// What to call it.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.id {
            Some(id) => id.clone(),
            None => format!("{PRINT_PREFIX}{:.16}", self.fingerprint),
        }
    }
}

/// Told while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
    /// A letter is dealt with.
    Letter(&'a Line),
    /// A step of the canary is over.
    Step(&'a Outcome),
}

/// Why a replay ended before its end.
#[derive(Debug, Error)]
pub enum Cut {
    /// It was told to stop.
    #[error("stopped before the end: run it again to go on")]
    Stopped,
    /// Too little of what was replayed was applied.
    #[error("{}", canary_text(outcome, *abort_at, troubles))]
    Canary {
        /// What was found.
        outcome: Outcome,
        /// What would have been tolerated, in percent.
        abort_at: u8,
        /// The commonest errors.
        troubles: Vec<(Trouble, u64)>,
    },
    /// The dead-letter queue, or the database that holds ledger and lock.
    #[error(transparent)]
    Desk(#[from] desk::Trouble),
    /// There is no connection to publish on.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A letter could not be handed to the broker.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The connection that publishes is gone.
    #[error("lost the connection to the broker: {cause}")]
    Lost {
        /// The broker's or the socket's words.
        cause: String,
    },
    /// The user may not publish there.
    #[error(
        "the broker does not let the user of [broker] publish there: {cause}\n  hint: permit it to \
         write to that exchange, or send the letters elsewhere; what was not sent is where it was"
    )]
    Denied {
        /// The broker's words, with exchange and user.
        cause: String,
    },
    /// The broker confirms nothing.
    #[error(
        "the broker confirmed nothing within {within:?}\n  hint: is there an alarm on it, or is \
         the queue without a leader?"
    )]
    Unconfirmed {
        /// How long it was waited for.
        within: Duration,
    },
    /// Redis, where a mark has to be taken away.
    #[error(
        "Redis does not answer, and what it says of {id} has to go: {cause}\n  hint: run it again \
         when Redis is back"
    )]
    Claims {
        /// Of which id.
        id: String,
        /// Redis's words.
        cause: String,
    },
}

impl From<postgres::Error> for Cut {
    fn from(error: postgres::Error) -> Self {
        Self::Desk(error.into())
    }
}

fn canary_text(outcome: &Outcome, abort_at: u8, troubles: &[(Trouble, u64)]) -> String {
    let mut text = format!(
        "stopped: of {} replayed, {} are not applied ({} dead-lettered again, {} waiting for \
         another attempt, {} without a trace), and --abort-at allows {abort_at} %",
        outcome.replayed,
        outcome.not_applied(),
        outcome.dead_again,
        outcome.waiting,
        outcome.unknown
    );
    for (trouble, count) in troubles {
        let words = [trouble.reason.as_deref(), trouble.code.as_deref()];
        let mut words: Vec<&str> = words.into_iter().flatten().collect();
        words.push(&trouble.error);
        text.push_str(&format!("\n  {count} x {}", words.join(": ")));
    }
    if outcome.unknown == outcome.not_applied() {
        text.push_str("\n  hint: nothing is known of them: does the consumer's daemon run?");
    }
    text
}
