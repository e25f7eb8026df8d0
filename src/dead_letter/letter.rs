//! One dead letter: what the queue and the journal know of it together.

use crate::broker::properties::{Field, Properties};
use crate::ledger::desk::Verdict;
use crate::message::{Fingerprint, Message, MessageId, REASON_HEADER, hex};

use super::time;

/// What a letter's name begins with when it has no usable id: its fingerprint
/// follows, in hex.
pub const PRINT_PREFIX: &str = "sha256:";

/// Digits of a fingerprint that make a name, when one is made here.
const PRINT_DIGITS: usize = 16;

/// The reason of a letter of which nothing is known.
pub const UNKNOWN: &str = "unknown";

/// Every reason a letter can have: those of [`crate::message::DeadReason`],
/// those of the broker, and [`UNKNOWN`].
pub const REASONS: [&str; 12] = [
    "rejected",
    "max-attempts",
    "crash-loop",
    "missing-id",
    "id-conflict",
    "too-large",
    "bad-header",
    "expired",
    "maxlen",
    "delivery-limit",
    "maxlen-bytes",
    UNKNOWN,
];

/// A dead letter.
#[derive(Debug, Clone, PartialEq)]
pub struct Letter {
    /// Its place in the queue when it was read, from 1, the oldest first.
    pub position: u64,
    /// Its idempotency key; `None` when it has no usable one.
    pub id: Option<MessageId>,
    /// SHA-256 of its body.
    pub fingerprint: Fingerprint,
    /// As a consumer sees it: without what daemon and broker added.
    pub message: Message,
    /// Everything it carries.
    pub properties: Properties,
    /// Exchange that put it into the dead-letter queue.
    pub via_exchange: String,
    /// Routing key with which it did.
    pub via_routing_key: String,
    /// How often it came back to the dead-letter queue, where that is counted.
    pub returns: i64,
    /// What the journal says about its death.
    pub verdict: Option<Verdict>,
    /// What the broker says about its death.
    pub death: Option<Death>,
}

/// An entry of the header `x-death`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// `rejected`, `expired`, `maxlen` or `delivery_limit`.
    pub reason: String,
    /// Exchange it was published to.
    pub exchange: String,
    /// Routing key it was published with.
    pub routing_key: String,
    /// When, in seconds since 1970.
    pub at: Option<u64>,
}

impl Death {
    /// The entry about `queue`, else the newest. The broker writes them newest
    /// first; on brokers before 4.0 anybody may have written anything.
    #[must_use]
    pub fn of(properties: &Properties, queue: &str) -> Option<Self> {
        let Some(Field::List(deaths)) = properties.header("x-death") else {
            return None;
        };
        let table = |field: &Field| match field {
            Field::Table(table) => Some(table.clone()),
            _ => None,
        };
        let mut tables = deaths.iter().filter_map(table);
        let first = tables.next()?;
        let is_ours = |table: &crate::broker::properties::Fields| {
            table.get("queue").and_then(Field::as_text) == Some(queue)
        };
        let table = match is_ours(&first) {
            true => first,
            false => tables.find(is_ours).unwrap_or(first),
        };
        let text = |name: &str| table.get(name).and_then(Field::as_text).unwrap_or_default();
        let key = match table.get("routing-keys") {
            Some(Field::List(keys)) => keys.first().and_then(Field::as_text),
            _ => None,
        };
        Some(Self {
            reason: text("reason").to_owned(),
            exchange: text("exchange").to_owned(),
            routing_key: key.unwrap_or_default().to_owned(),
            at: match table.get("time") {
                Some(Field::Timestamp(seconds)) => u64::try_from(*seconds).ok(),
                _ => None,
            },
        })
    }
}

impl Letter {
    /// What to call it: its id, or `sha256:` and the beginning of its
    /// fingerprint.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.id {
            Some(id) => id.to_string(),
            None => {
                let print = hex(&self.fingerprint.0);
                format!("{PRINT_PREFIX}{}", &print[..PRINT_DIGITS])
            }
        }
    }

    /// Why it is dead: in the journal's words, else the daemon's in its header,
    /// else the broker's.
    #[must_use]
    pub fn reason(&self) -> &str {
        if let Some(verdict) = &self.verdict {
            return &verdict.reason;
        }
        let header = self.properties.header(REASON_HEADER);
        if let Some(reason) = header.and_then(Field::as_text) {
            return reason;
        }
        match self.death.as_ref().map(|death| death.reason.as_str()) {
            Some("delivery_limit") => "delivery-limit",
            Some("maxlen_bytes") => "maxlen-bytes",
            Some("") | None => UNKNOWN,
            Some(reason) => reason,
        }
    }

    /// `transient`, `permanent` or `systemic`, if the journal knows.
    #[must_use]
    pub fn class(&self) -> Option<&str> {
        Some(&self.verdict.as_ref()?.class)
    }

    /// SQLSTATE, HTTP status or exit status, if the journal knows one.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        self.verdict.as_ref()?.code.as_deref()
    }

    /// The error, if the journal knows it.
    #[must_use]
    pub fn error(&self) -> Option<&str> {
        Some(&self.verdict.as_ref()?.error)
    }

    /// The first line of the error; empty when there is none.
    #[must_use]
    pub fn error_line(&self) -> &str {
        let error = self.error().unwrap_or_default();
        error.lines().next().unwrap_or_default()
    }

    /// Tries of the handler.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        let journal = self.verdict.as_ref().map(|verdict| verdict.attempt);
        let journal = journal.and_then(|count| u32::try_from(count).ok());
        journal.unwrap_or(self.message.attempts)
    }

    /// When it died, in microseconds since 1970: by the journal, else by the
    /// broker to the second, else unknown.
    #[must_use]
    pub fn died_at(&self) -> Option<i64> {
        if let Some(verdict) = &self.verdict {
            return Some(verdict.at.microseconds);
        }
        let seconds = self.death.as_ref()?.at?;
        i64::try_from(seconds).ok()?.checked_mul(1_000_000)
    }

    /// [`Letter::died_at`] in UTC, such as `2026-05-04T03:02:01.123Z`.
    #[must_use]
    pub fn died_at_text(&self) -> Option<String> {
        self.died_at().map(time::format)
    }

    /// Exchange it was first published to: as the daemon wrote into its
    /// headers, as the journal or the broker has it, else what it came by.
    #[must_use]
    pub fn exchange(&self) -> &str {
        self.origin().0
    }

    /// Routing key it was first published with, likewise.
    #[must_use]
    pub fn routing_key(&self) -> &str {
        self.origin().1
    }

    /// Exchange and routing key together, from one source.
    #[must_use]
    pub fn origin(&self) -> (&str, &str) {
        let marked = self.properties.header(crate::message::EXCHANGE_HEADER);
        match (&self.verdict, &self.death) {
            _ if marked.is_some() => (&self.message.exchange, &self.message.routing_key),
            (Some(verdict), _) => (&verdict.exchange, &verdict.routing_key),
            (None, Some(death)) => (&death.exchange, &death.routing_key),
            (None, None) => (&self.via_exchange, &self.via_routing_key),
        }
    }

    /// Whether [`Letter::origin`] is known, and not just how it came here.
    #[must_use]
    pub fn knows_origin(&self) -> bool {
        let marked = self.properties.header(crate::message::EXCHANGE_HEADER);
        marked.is_some() || self.verdict.is_some() || self.death.is_some()
    }

    /// Length of its body, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.message.body.len()
    }

    /// Whether the guard had to repair any of it, so that what is here is not
    /// what is in the queue.
    #[must_use]
    pub fn is_repaired(&self) -> bool {
        self.message.repairs != crate::message::Repairs::default()
    }
}
