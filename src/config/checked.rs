//! What is safe to run: every value present, in range and of its own type.
//! Made only by [`super::load`]; nothing in the rest of the house reads
//! what the user typed.

mod batch;
mod servers;

use std::fmt;
use std::time::Duration;

use super::duration;
use crate::failure::Overrides;

pub use batch::BatchMode;
pub use servers::{Broker, ClientCertificate, Postgres, Redis, SslMode, Tls};

/// A string that never shows in logs, errors or `Debug` output.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Hides `value`.
    #[must_use]
    pub fn new(value: String) -> Self {
        Self(value)
    }

    /// The hidden value. The caller must not print it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// The whole configuration of one daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `[broker]`
    pub broker: Broker,
    /// `[redis]`; `None` when `enabled = false`: the ledger alone decides.
    pub redis: Option<Redis>,
    /// `[postgres]`
    pub postgres: Postgres,
    /// `[ledger]`
    pub ledger: Ledger,
    /// `[daemon]`
    pub daemon: Daemon,
    /// `[admin]`; `None` when `enabled = false`.
    pub admin: Option<Admin>,
    /// `[log] format`
    pub log_format: LogFormat,
    /// `[[consumer]]`, at least one, names unique.
    pub consumers: Vec<Consumer>,
}

/// `[ledger]`: how long it remembers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    /// How long a ledger row and a journal row are kept: the promise covers
    /// duplicates that are not older.
    pub retention: Duration,
    /// How often a daemon looks for rows that are older.
    pub prune_every: Duration,
    /// Most rows deleted in one transaction.
    pub prune_batch: usize,
}

/// `[admin]`: the address for metrics and health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admin {
    /// Where it listens; port 0 lets the system choose.
    pub listen: std::net::SocketAddr,
    /// A consumer that has deliveries, settles none for so long, and has not
    /// paused counts as dead.
    pub stall_after: Duration,
}

/// How lines of the log are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// All there are.
    pub(super) const ALL: [Self; 2] = [Self::Text, Self::Json];

    /// As typed and printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Json => "json",
        }
    }
}

/// `[daemon]`: the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// How long a stop waits for what is in flight.
    pub shutdown_timeout: Duration,
    /// First wait before a server that failed is tried again.
    pub reconnect_min: Duration,
    /// Longest wait before a server that failed is tried again.
    pub reconnect_max: Duration,
}

/// `[[consumer]]`: one queue and what is done with its messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Consumer {
    /// Names the consumer in ledger, claims, logs: 1 to 64 characters of
    /// `a-z A-Z 0-9 . _ -`.
    pub name: String,
    /// Worker threads, 1 to 256.
    pub workers: usize,
    /// Unacknowledged deliveries the broker may hand over, 1 to 65,535; at
    /// least `batch_max`.
    pub prefetch: u16,
    /// Most messages in one transaction, 1 to 4,096.
    pub batch_max: usize,
    /// Longest body, in bytes; longer ones are dead-lettered as `too-large`.
    pub max_body: usize,
    /// Where the message id is found.
    pub identity: Identity,
    /// Look a Redis `done` mark up in the ledger all the same.
    pub confirm_duplicates: bool,
    /// Deaths of its worker after which a message is dead-lettered as
    /// `crash-loop`; at least 3.
    pub max_deaths: u32,
    /// `[consumer.retry]`
    pub retry: Retry,
    /// `[consumer.failures]`
    pub failures: Overrides,
    /// `[consumer.claim]`
    pub claim: Claim,
    /// `[consumer.topology]`
    pub topology: Topology,
    /// `[consumer.handler]`
    pub handler: Handler,
}

/// Where a consumer finds a message's id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// `message-id`: the AMQP property.
    MessageId,
    /// `header:NAME`: a header whose value is a string or an integer.
    Header(String),
    /// `json:/POINTER`: RFC 6901 pointer to a string or integer in the body.
    Json(String),
    /// `body`: SHA-256 of the body, in hex.
    Body,
}

/// `[consumer.retry]`: what happens to a message whose attempt failed and may
/// succeed later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// Attempts before it is dead-lettered as `max-attempts`; 1 means that
    /// nothing is retried.
    pub max_attempts: u32,
    /// Delay after the first failed attempt, after the second, …; the last
    /// goes on for all that follow. Not empty, whole milliseconds. Each is a
    /// queue of its own on the broker.
    pub backoff: Vec<Duration>,
    /// How much shorter a delay may be, in percent, drawn for each message.
    pub jitter_percent: u8,
    /// Failed attempts in a row, across messages and without a success between
    /// them, after which the consumer pauses; 0 means never.
    pub breaker: u32,
}

impl Retry {
    /// The delays that can occur, each once, in the order in which they first
    /// do: those of steps that `max_attempts` leaves out are not among them.
    #[must_use]
    pub fn delays(&self) -> Vec<Duration> {
        let retries = usize::try_from(self.max_attempts.saturating_sub(1)).unwrap_or(usize::MAX);
        let mut delays: Vec<Duration> = Vec::new();
        for delay in self.backoff.iter().take(retries) {
            if !delays.contains(delay) {
                delays.push(*delay);
            }
        }
        delays
    }

    /// How long one message can wait for all its retries together.
    #[must_use]
    pub fn longest_wait(&self) -> Duration {
        let retries = self.max_attempts.saturating_sub(1);
        let steps = self.backoff.iter().take(retries as usize);
        let beyond = retries.saturating_sub(self.backoff.len() as u32);
        let last = self.backoff.last().copied().unwrap_or_default();
        steps
            .fold(Duration::ZERO, |sum, delay| sum.saturating_add(*delay))
            .saturating_add(last.saturating_mul(beyond))
    }
}

/// `[consumer.claim]`: the lease on a message id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// How long a claim holds without renewal.
    pub lease: Duration,
    /// How often a claim in use is renewed; at most half the lease.
    pub renew_every: Duration,
    /// How long Redis remembers that a message is applied.
    pub done_ttl: Duration,
    /// How soon a message whose id is claimed elsewhere is looked at again.
    pub recheck_every: Duration,
}

/// `[consumer.topology]`: what exists on the broker, or is made to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// What the daemon does about what it needs.
    pub mode: TopologyMode,
    /// How a dead letter leaves the work queue.
    pub dead_letters: DeadLetters,
    /// Work queue.
    pub queue: String,
    /// Queue type of work and dead-letter queue.
    pub queue_type: QueueType,
    /// `x-delivery-limit` of a quorum work queue: the broker dead-letters a
    /// message that came back more often. `None`: the queue is classic, or not
    /// of our making.
    pub delivery_limit: Option<u32>,
    /// Fanout exchange the work queue dead-letters to.
    pub dead_letter_exchange: String,
    /// Queue bound to it.
    pub dead_letter_queue: String,
    /// What feeds the work queue beside the default exchange.
    pub bindings: Vec<Binding>,
}

impl Topology {
    /// The queue in which messages wait `delay` for their retry. Its name holds
    /// the work queue's, so that no two consumers share it.
    #[must_use]
    pub fn retry_queue(&self, delay: Duration) -> String {
        retry_queue(&self.queue, delay)
    }
}

pub(super) fn retry_queue(queue: &str, delay: Duration) -> String {
    format!("{queue}.retry.{}", duration::format(delay))
}

/// What the daemon does about queues, exchanges and bindings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopologyMode {
    /// Make what is missing; what exists must be as configured.
    Declare,
    /// Make nothing; everything must exist as configured.
    Verify,
    /// Make nothing and compare nothing; queues must exist.
    None,
}

impl TopologyMode {
    /// All there are.
    pub(super) const ALL: [Self; 3] = [Self::Declare, Self::Verify, Self::None];

    /// As typed and printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Declare => "declare",
            Self::Verify => "verify",
            Self::None => "none",
        }
    }
}

/// How a dead letter gets from the work queue to the dead-letter queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeadLetters {
    /// The daemon rejects it, and the broker moves it.
    Reject,
    /// The daemon publishes it to the dead-letter exchange, and acks it once
    /// the broker has confirmed it.
    Publish,
}

impl DeadLetters {
    /// All there are.
    pub(super) const ALL: [Self; 2] = [Self::Reject, Self::Publish];

    /// As typed and printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reject => "reject",
            Self::Publish => "publish",
        }
    }
}

/// RabbitMQ queue types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueType {
    /// Replicated, with at-least-once dead-lettering: the default.
    Quorum,
    /// One node, at-most-once dead-lettering: a dead letter can be lost when
    /// the broker stops at the wrong moment.
    Classic,
}

impl QueueType {
    /// All there are.
    pub(super) const ALL: [Self; 2] = [Self::Quorum, Self::Classic];

    /// As typed and printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Quorum => "quorum",
            Self::Classic => "classic",
        }
    }
}

/// One `[[consumer.topology.binding]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Exchange, declared durable.
    pub exchange: String,
    /// `direct`, `fanout`, `topic` or `headers`.
    pub exchange_type: ExchangeType,
    /// Routing or binding key.
    pub routing_key: String,
    /// Binding arguments (for `headers` exchanges): strings, integers, booleans.
    pub arguments: Vec<(String, BindingArgument)>,
}

/// AMQP exchange types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExchangeType {
    /// Routing key equal to the binding's.
    Direct,
    /// Every bound queue.
    Fanout,
    /// Routing key matched against a pattern of words.
    Topic,
    /// Headers matched against the binding's arguments.
    Headers,
}

impl ExchangeType {
    /// All there are.
    pub(super) const ALL: [Self; 4] = [Self::Direct, Self::Fanout, Self::Topic, Self::Headers];

    /// As typed and printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Fanout => "fanout",
            Self::Topic => "topic",
            Self::Headers => "headers",
        }
    }
}

/// Value of a binding argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BindingArgument {
    /// Text.
    Text(String),
    /// Integer.
    Integer(i64),
    /// Boolean.
    Boolean(bool),
}

/// `[consumer.handler]`: what applies a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handler {
    /// `type = "sql"`: statements run in the ledger's transaction.
    Sql(SqlHandler),
    /// `type = "command"`: a program of the user's own.
    Command(CommandHandler),
    /// `type = "http"`: each message is a request to one URL.
    Http(Box<HttpHandler>),
    /// `type = "rust"`: code of a program built with the library, with what its
    /// effect can promise.
    Rust(Effect),
}

impl Handler {
    /// What its effect can promise: its type alone says so, but for `rust`.
    #[must_use]
    pub fn effect(&self) -> Effect {
        match self {
            Self::Sql(_) => Effect::Transactional,
            Self::Command(_) | Self::Http(_) => Effect::Keyed,
            Self::Rust(effect) => *effect,
        }
    }

    /// Longest time that one call of it may take by its own configuration;
    /// nothing where it has none.
    #[must_use]
    pub fn longest_call(&self) -> Duration {
        match self {
            Self::Sql(_) | Self::Rust(_) => Duration::ZERO,
            Self::Command(command) => command.timeout.saturating_add(command.start_timeout),
            Self::Http(http) => http.timeout,
        }
    }
}

/// What a handler's effect can promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Exactly once within the ledger's retention.
    Transactional,
    /// At least once, and exactly once where the receiver honours the key.
    Keyed,
}

impl Effect {
    /// All there are.
    pub(super) const ALL: [Self; 2] = [Self::Transactional, Self::Keyed];

    /// As typed and printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Transactional => "transactional",
            Self::Keyed => "keyed",
        }
    }

    /// The promise in words.
    #[must_use]
    pub fn promise(self) -> &'static str {
        match self {
            Self::Transactional => "exactly once within the retention",
            Self::Keyed => {
                "at least once, and exactly once where the receiver honours the idempotency key"
            }
        }
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `[consumer.handler]` with `type = "sql"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqlHandler {
    /// The statements, from `file` or `sql`.
    pub text: String,
    /// Where they came from, for error messages: a path or `inline`.
    pub origin: String,
    /// How they meet a batch.
    pub batch: BatchMode,
}

/// `[consumer.handler]` with `type = "command"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandHandler {
    /// How messages reach the program.
    pub mode: CommandMode,
    /// Its absolute path; it was there, and executable, when this was read.
    pub program: std::path::PathBuf,
    /// Its arguments, the same for every message.
    pub arguments: Vec<String>,
    /// Absolute path of the folder it is started in.
    pub working_directory: std::path::PathBuf,
    /// Variables of its environment, names unique.
    pub env: Vec<(String, Secret)>,
    /// Variables that it has from the daemon's environment, sorted, none of
    /// them in `env`; `None` where one is not set.
    pub pass_env: Vec<(String, Option<Secret>)>,
    /// Longest time for one message, after which the process group is ended.
    pub timeout: Duration,
    /// How long a process group that was told to end has for it.
    pub kill_after: Duration,
    /// Longest time to get ready, with [`CommandMode::Stream`].
    pub start_timeout: Duration,
}

/// How messages reach a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandMode {
    /// A process for each message, its body on standard input.
    Once,
    /// A process for each worker, a line of JSON for each message.
    Stream,
}

impl CommandMode {
    /// All there are.
    pub(super) const ALL: [Self; 2] = [Self::Once, Self::Stream];

    /// As typed and printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Once => "once",
            Self::Stream => "stream",
        }
    }
}

/// `[consumer.handler]` with `type = "http"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpHandler {
    /// The method of every request.
    pub method: HttpMethod,
    /// `http://` or `https://` URL, without user, password and fragment; secret,
    /// since its query may hold a token.
    pub url: Secret,
    /// TLS with the receiver (`https` only).
    pub tls: Tls,
    /// Content type of every request; `None`: the message's own.
    pub content_type: Option<String>,
    /// Headers of every request, sorted, each name once; a value is visible
    /// ASCII.
    pub headers: Vec<(String, Secret)>,
    /// Headers of the message that its request carries.
    pub forward_headers: Vec<String>,
    /// Name of the header with the idempotency key.
    pub key_header: String,
    /// How that header's value is written.
    pub key_format: KeyFormat,
    /// Secrets that sign each request, in base64, the newest first; none: no
    /// signature.
    pub signing_secrets: Vec<Secret>,
    /// Longest wait for name, TCP and TLS together.
    pub connect_timeout: Duration,
    /// Longest wait for the whole request, the connection and the answer's body
    /// included.
    pub timeout: Duration,
}

/// Methods that are meant to have an effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpMethod {
    /// `POST`
    Post,
    /// `PUT`
    Put,
    /// `PATCH`
    Patch,
}

impl HttpMethod {
    /// All there are.
    pub(super) const ALL: [Self; 3] = [Self::Post, Self::Put, Self::Patch];

    /// As typed, printed and sent.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
        }
    }
}

/// How the idempotency key is written into its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyFormat {
    /// As it is.
    Plain,
    /// In double quotes: a string of RFC 9651, as the IETF's draft of
    /// `Idempotency-Key` has it.
    Quoted,
}

impl KeyFormat {
    /// All there are.
    pub(super) const ALL: [Self; 2] = [Self::Plain, Self::Quoted];

    /// As typed and printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Quoted => "quoted",
        }
    }
}
