//! Plain data that flows through the house: a message, its key, and what
//! becomes of it. No behaviour beyond construction and comparison, no I/O.

use std::fmt;
use std::time::{Duration, SystemTime};

/// Longest usable message id, in bytes. AMQP short strings end there, and the
/// ledger's index is sized for it.
pub const MESSAGE_ID_MAX_BYTES: usize = 255;

/// A usable idempotency key of one message: 1 to 255 bytes of UTF-8 without
/// NUL. Made only by [`crate::identity`]; unique per consumer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId(Box<str>);

impl MessageId {
    /// Accepts `text` if it can be a key: not empty, at most
    /// [`MESSAGE_ID_MAX_BYTES`], no NUL byte (PostgreSQL text cannot hold one).
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let usable = !text.is_empty() && text.len() <= MESSAGE_ID_MAX_BYTES && !text.contains('\0');
        usable.then(|| Self(text.into()))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// SHA-256 of a message's body: what tells a duplicate from another message
/// that carries the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

/// `bytes` as lower-case hexadecimal digits.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from(DIGITS[usize::from(digit)]));
        }
    }
    text
}

/// Header of a retried or dead-lettered copy: how many attempts were made at
/// the message so far.
pub const ATTEMPTS_HEADER: &str = "ackonce-attempts";

/// Header of a retried or dead-lettered copy: the exchange that the message was
/// first published to.
pub const EXCHANGE_HEADER: &str = "ackonce-exchange";

/// Header of a retried or dead-lettered copy: the routing key that the message
/// was first published with.
pub const ROUTING_KEY_HEADER: &str = "ackonce-routing-key";

/// Header of a dead letter that the daemon published itself: the [`DeadReason`].
pub const REASON_HEADER: &str = "ackonce-reason";

/// Header of a copy: the `user_id` property of the message, which the broker
/// lets nobody else publish.
pub const USER_ID_HEADER: &str = "ackonce-user-id";

/// Header of a copy: the header `CC` of the message, by which the broker would
/// route the copy to other queues again.
pub const CC_HEADER: &str = "ackonce-cc";

/// Header of a replayed dead letter: how often it was replayed.
pub const REPLAYS_HEADER: &str = "ackonce-replays";

/// Header of a replayed dead letter: when it was replayed last.
pub const REPLAYED_AT_HEADER: &str = "ackonce-replayed-at";

/// Header of a replayed dead letter: which replay it was, so that one that
/// comes back while that goes on is not taken again.
pub const REPLAY_HEADER: &str = "ackonce-replay";

/// Header of a copy: the signature of those of [`OWN_HEADERS`] that it has.
pub const SIGNATURE_HEADER: &str = "ackonce-signature";

/// The headers that the daemon writes into copies, and believes only where they
/// are signed: publishers can write them, too.
pub const OWN_HEADERS: [&str; 9] = [
    ATTEMPTS_HEADER,
    EXCHANGE_HEADER,
    ROUTING_KEY_HEADER,
    REASON_HEADER,
    USER_ID_HEADER,
    CC_HEADER,
    REPLAYS_HEADER,
    REPLAYED_AT_HEADER,
    REPLAY_HEADER,
];

/// Which connection a delivery came over. A delivery tag means nothing without
/// it: after a reconnect the same tag is another message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

/// What the broker wants back for one delivery. Not `Clone`: one delivery is
/// settled once.
#[derive(Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The connection the delivery came over.
    pub epoch: Epoch,
    /// The delivery tag, unique within the epoch.
    pub tag: u64,
}

/// What the broker is told about a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Settlement {
    /// The message is known to be applied: remove it from the queue.
    Ack,
    /// Dead-letter it: the reason is in the failure journal.
    Reject,
    /// Give it back to the queue: this worker did not apply it.
    Requeue,
    /// Have a copy come back after a delay: publish it to a retry queue, and
    /// remove this one once the broker has confirmed the copy.
    Retry,
}

/// A settled delivery on its way to the broker thread.
#[must_use = "a settlement that is dropped leaves its message unacknowledged"]
#[derive(Debug, PartialEq, Eq)]
pub struct Settled {
    /// Which delivery.
    pub ticket: Ticket,
    /// What the broker is told.
    pub settlement: Settlement,
    /// What a copy of the message needs; for [`Settlement::Retry`] and
    /// [`Settlement::Reject`].
    pub parcel: Option<Box<Parcel>>,
}

/// What the broker thread gave away with a delivery and needs back to make a
/// copy of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Parcel {
    /// The body, as published.
    pub body: Vec<u8>,
    /// Attempts made so far, for [`ATTEMPTS_HEADER`].
    pub attempts: u32,
    /// What the copy is for.
    pub purpose: Purpose,
    /// The least that a retry waits, whatever the jitter, as far as its step is
    /// that long.
    pub at_least: Duration,
}

/// What becomes of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// It waits in the retry queue of the consumer's backoff step of this
    /// number, counted from 0.
    Retry(usize),
    /// It is a dead letter.
    DeadLetter(DeadReason),
}

/// Why a message came to rest in the dead-letter queue. The `Display` form is
/// what the journal, the logs and the metrics show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeadReason {
    /// The handler or the database refused it for good.
    Rejected,
    /// Every attempt failed.
    MaxAttempts,
    /// It was in work when its worker died, again and again.
    CrashLoop,
    /// No usable message id where the consumer's `identity` looks for it.
    MissingId,
    /// An applied message has the same id and another body.
    IdConflict,
    /// The body is longer than the consumer's `max_body`.
    TooLarge,
    /// The guard had to repair the very bytes its identity stands in.
    BadHeader,
}

impl DeadReason {
    /// All there are, in the order of their declaration.
    pub const ALL: [Self; 7] = [
        Self::Rejected,
        Self::MaxAttempts,
        Self::CrashLoop,
        Self::MissingId,
        Self::IdConflict,
        Self::TooLarge,
        Self::BadHeader,
    ];

    /// The name in journal, logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::MaxAttempts => "max-attempts",
            Self::CrashLoop => "crash-loop",
            Self::MissingId => "missing-id",
            Self::IdConflict => "id-conflict",
            Self::TooLarge => "too-large",
            Self::BadHeader => "bad-header",
        }
    }
}

impl fmt::Display for DeadReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Which parts of a delivery the broker's guard had to repair before the AMQP
/// library could read them. All false for nearly every message there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Repairs {
    /// The `message_id` property.
    pub message_id: bool,
    /// Somewhere in the header table.
    pub headers: bool,
    /// Any other short string: routing key, exchange, content type, ….
    pub other: bool,
}

/// One message as the broker delivered it, free of AMQP types.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Message {
    /// Exchange it was first published to, before any retry; empty for the
    /// default exchange. NUL characters, which PostgreSQL cannot hold, have
    /// become U+FFFD.
    pub exchange: String,
    /// Routing key it was first published with, NUL characters likewise.
    pub routing_key: String,
    /// Attempts made at it before this delivery.
    pub attempts: u32,
    /// True when it was handed over before and never settled.
    pub redelivered: bool,
    /// True when it was replayed from the dead-letter queue, so that an
    /// operator may have had its ledger row forgotten.
    pub replayed: bool,
    /// The body, as published.
    pub body: Vec<u8>,
    /// The `message_id` property.
    pub message_id: Option<String>,
    /// The `content_type` property.
    pub content_type: Option<String>,
    /// The properties that say more about it.
    pub about: About,
    /// The `timestamp` property, which AMQP counts in whole seconds.
    pub published_at: Option<SystemTime>,
    /// The header table as JSON. Byte arrays become `\x`-prefixed hex, times
    /// become seconds, NUL characters become U+FFFD.
    pub headers: serde_json::Map<String, serde_json::Value>,
    /// What the guard had to repair.
    pub repairs: Repairs,
}

impl Message {
    /// The `timestamp` property in seconds since 1970, negative before.
    #[must_use]
    pub fn published_seconds(&self) -> Option<i64> {
        let at = self.published_at?;
        match at.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_secs()).ok(),
            Err(before) => i64::try_from(before.duration().as_secs())
                .ok()
                .map(|seconds| -seconds),
        }
    }
}

/// Properties of a message that the daemon itself has no use for. NUL
/// characters have become U+FFFD.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct About {
    /// How the body is encoded, such as `gzip`.
    pub content_encoding: Option<String>,
    /// The `type` property.
    pub kind: Option<String>,
    /// What it answers, or belongs to.
    pub correlation_id: Option<String>,
    /// Where an answer is to go.
    pub reply_to: Option<String>,
    /// Which program published it.
    pub app_id: Option<String>,
    /// Who published it, which the broker has verified.
    pub user_id: Option<String>,
    /// How long it may live in a queue, in milliseconds. `None` on a retry.
    pub expiration: Option<String>,
    /// 0 to 255.
    pub priority: Option<u8>,
}

impl About {
    /// Each property that is there, by its name in AMQP.
    #[must_use]
    pub fn named(&self) -> Vec<(&'static str, String)> {
        let texts = [
            ("content_encoding", &self.content_encoding),
            ("type", &self.kind),
            ("correlation_id", &self.correlation_id),
            ("reply_to", &self.reply_to),
            ("app_id", &self.app_id),
            ("user_id", &self.user_id),
            ("expiration", &self.expiration),
        ];
        let texts = texts.into_iter();
        let mut named: Vec<_> = texts
            .filter_map(|(name, text)| Some((name, text.clone()?)))
            .collect();
        named.extend(
            self.priority
                .map(|priority| ("priority", priority.to_string())),
        );
        named
    }
}

/// A message with the ticket that settles it.
#[derive(Debug)]
pub struct Delivery {
    /// What was delivered.
    pub message: Message,
    /// What settles it.
    pub ticket: Ticket,
}
