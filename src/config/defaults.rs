//! Every default, and the bounds of everything that has bounds: the one place
//! for both. The shipped `config.toml` is tested against it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use super::checked::{CommandMode, DeadLetters, Identity, LogFormat, QueueType, TopologyMode};

/// What a number or a duration is when nothing is said, and the least and most
/// it may be.
#[derive(Debug, Clone, Copy)]
pub struct Setting<T> {
    /// When nothing is said.
    pub default: T,
    /// Least.
    pub min: T,
    /// Most.
    pub max: T,
}

const fn setting<T>(default: T, min: T, max: T) -> Setting<T> {
    Setting { default, min, max }
}

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

/// `[broker] heartbeat`; two missed ones end a connection.
pub const HEARTBEAT: Setting<Duration> = setting(ms(10 * SECOND), ms(5 * SECOND), ms(15 * SECOND));
/// `[broker] connect_timeout`
pub const BROKER_CONNECT_TIMEOUT: Setting<Duration> =
    setting(ms(10 * SECOND), ms(100), ms(5 * MINUTE));

/// `[redis] enabled`
pub const REDIS_ENABLED: bool = true;
/// `[redis] key_prefix`
pub const REDIS_KEY_PREFIX: &str = "ackonce";
/// Longest `[redis] key_prefix`, in visible ASCII characters.
pub const REDIS_KEY_PREFIX_MAX: usize = 64;
/// `[redis] connect_timeout`
pub const REDIS_CONNECT_TIMEOUT: Setting<Duration> = setting(ms(SECOND), ms(10), ms(MINUTE));
/// `[redis] timeout`
pub const REDIS_TIMEOUT: Setting<Duration> = setting(ms(500), ms(10), ms(MINUTE));

/// `[postgres] connect_timeout`
pub const POSTGRES_CONNECT_TIMEOUT: Setting<Duration> =
    setting(ms(5 * SECOND), ms(100), ms(5 * MINUTE));
/// `[postgres] statement_timeout`
pub const STATEMENT_TIMEOUT: Setting<Duration> = setting(ms(15 * SECOND), ms(100), ms(HOUR));
/// `[postgres] lock_timeout`
pub const LOCK_TIMEOUT: Setting<Duration> = setting(ms(5 * SECOND), ms(10), ms(HOUR));
/// `[postgres] idle_in_transaction_timeout`
pub const IDLE_IN_TRANSACTION_TIMEOUT: Setting<Duration> =
    setting(ms(20 * SECOND), ms(100), ms(HOUR));
/// `[postgres] auto_migrate`
pub const AUTO_MIGRATE: bool = true;

/// `[ledger] retention`
pub const RETENTION: Setting<Duration> = setting(ms(30 * DAY), ms(MINUTE), ms(3650 * DAY));
/// `[ledger] prune_every`
pub const PRUNE_EVERY: Setting<Duration> = setting(ms(MINUTE), ms(100), ms(DAY));
/// `[ledger] prune_batch`, rows.
pub const PRUNE_BATCH: Setting<usize> = setting(1_000, 1, 100_000);

/// `[daemon] shutdown_timeout`
pub const SHUTDOWN_TIMEOUT: Setting<Duration> = setting(ms(25 * SECOND), ms(100), ms(HOUR));
/// `[daemon] reconnect_min`
pub const RECONNECT_MIN: Setting<Duration> = setting(ms(100), ms(10), ms(MINUTE));
/// `[daemon] reconnect_max`
pub const RECONNECT_MAX: Setting<Duration> = setting(ms(3 * SECOND), ms(10), ms(10 * MINUTE));

/// Most servers that `[broker] url` names.
pub const BROKER_URLS_MAX: usize = 16;

/// `[admin] enabled`
pub const ADMIN_ENABLED: bool = true;
/// `[admin] listen`
pub const ADMIN_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9478);
/// `[admin] stall_after`
pub const STALL_AFTER: Setting<Duration> = setting(ms(5 * MINUTE), ms(SECOND), ms(DAY));
/// `[log] format`
pub const LOG_FORMAT: LogFormat = LogFormat::Text;

/// Longest `[[consumer]] name`, in characters.
pub const CONSUMER_NAME_MAX: usize = 64;
/// `[[consumer]] workers`, threads.
pub const WORKERS: Setting<usize> = setting(4, 1, 256);
/// `[[consumer]] prefetch`, deliveries.
pub const PREFETCH: Setting<u16> = setting(1024, 1, 65_535);
/// `[[consumer]] batch_max`, messages.
pub const BATCH_MAX: Setting<usize> = setting(256, 1, 4096);
/// `[[consumer]] max_body`, bytes. RabbitMQ itself takes no more than 512 MiB.
pub const MAX_BODY: Setting<usize> = setting(32 << 20, 1, 512 << 20);
/// `[[consumer]] identity`
pub const IDENTITY: Identity = Identity::MessageId;
/// Longest NAME in `header:NAME`, in bytes.
pub const HEADER_NAME_MAX: usize = 128;
/// `[[consumer]] confirm_duplicates`
pub const CONFIRM_DUPLICATES: bool = false;

/// `[[consumer]] max_deaths`
pub const MAX_DEATHS: Setting<u32> = setting(5, 3, 100);
/// `[consumer.retry] max_attempts`
pub const MAX_ATTEMPTS: Setting<u32> = setting(5, 1, 1_000);
/// `[consumer.retry] backoff`
pub const RETRY_BACKOFF: [Duration; 4] = [ms(SECOND), ms(10 * SECOND), ms(MINUTE), ms(10 * MINUTE)];
/// Each of `[consumer.retry] backoff`.
pub const RETRY_DELAY: Setting<Duration> = setting(ms(SECOND), ms(10), ms(7 * DAY));
/// Most steps in `[consumer.retry] backoff`.
pub const RETRY_STEPS_MAX: usize = 16;
/// `[consumer.retry] jitter_percent`
pub const RETRY_JITTER: Setting<u8> = setting(10, 0, 100);
/// `[consumer.retry] breaker`
pub const BREAKER: Setting<u32> = setting(100, 0, 1_000_000);

/// Most codes in each list of `[consumer.failures]`.
pub const FAILURE_CODES_MAX: usize = 256;

/// `[consumer.claim] lease`
pub const LEASE: Setting<Duration> = setting(ms(5 * SECOND), ms(200), ms(HOUR));
/// `[consumer.claim] renew_every`
pub const RENEW_EVERY: Setting<Duration> = setting(ms(SECOND), ms(50), ms(30 * MINUTE));
/// `[consumer.claim] done_ttl`
pub const DONE_TTL: Setting<Duration> = setting(ms(DAY), ms(SECOND), ms(365 * DAY));
/// `[consumer.claim] recheck_every`
pub const RECHECK_EVERY: Setting<Duration> = setting(ms(500), ms(10), ms(MINUTE));

/// `[consumer.topology] mode`
pub const TOPOLOGY_MODE: TopologyMode = TopologyMode::Declare;
/// `[consumer.topology] queue_type`
pub const QUEUE_TYPE: QueueType = QueueType::Quorum;
/// `[consumer.topology] delivery_limit` of a quorum queue, deliveries.
pub const DELIVERY_LIMIT: Setting<u32> = setting(1_000, 1, 1_000_000);
/// `[consumer.topology] dead_letters`: rejecting is left to the broker where it
/// can be proved not to lose the message. A classic queue moves a dead letter
/// at most once; about a queue that nobody compares nothing is known.
#[must_use]
pub fn dead_letters(mode: TopologyMode, queue_type: QueueType) -> DeadLetters {
    match (mode, queue_type) {
        (TopologyMode::Declare | TopologyMode::Verify, QueueType::Quorum) => DeadLetters::Reject,
        (TopologyMode::None, _) | (_, QueueType::Classic) => DeadLetters::Publish,
    }
}
/// Appended to the queue's name for `dead_letter_exchange`.
pub const DEAD_LETTER_EXCHANGE_SUFFIX: &str = ".dlx";
/// Appended to the queue's name for `dead_letter_queue`.
pub const DEAD_LETTER_QUEUE_SUFFIX: &str = ".dead";
/// Longest name of a queue or exchange and longest routing key, in bytes: an
/// AMQP short string.
pub const AMQP_NAME_MAX: usize = 255;

/// `[consumer.handler] mode` of a command.
pub const COMMAND_MODE: CommandMode = CommandMode::Once;
/// `[consumer.handler] working_directory` of a command.
pub const COMMAND_WORKING_DIRECTORY: &str = "/";
/// `[consumer.handler] timeout` of a command.
pub const COMMAND_TIMEOUT: Setting<Duration> = setting(ms(30 * SECOND), ms(10), ms(HOUR));
/// `[consumer.handler] kill_after`
pub const COMMAND_KILL_AFTER: Setting<Duration> = setting(ms(2 * SECOND), ms(0), ms(MINUTE));
/// `[consumer.handler] start_timeout`
pub const COMMAND_START_TIMEOUT: Setting<Duration> =
    setting(ms(30 * SECOND), ms(10), ms(10 * MINUTE));
/// `PATH` of a command, unless `env` or `pass_env` give another.
pub const COMMAND_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most elements of `[consumer.handler] argv`.
pub const COMMAND_ARGV_MAX: usize = 256;
/// Most bytes of `argv` and of the values of `env` and `pass_env` together: half
/// of what Linux takes at the least.
pub const COMMAND_TEXT_MAX: usize = 64 << 10;
/// Most variables in `env`, and most in `pass_env`.
pub const COMMAND_VARIABLES_MAX: usize = 256;
/// Longest name of a variable, in characters.
pub const COMMAND_VARIABLE_NAME_MAX: usize = 128;

/// `[consumer.handler] connect_timeout` of type `http`: name, TCP and TLS together.
pub const HTTP_CONNECT_TIMEOUT: Setting<Duration> = setting(ms(5 * SECOND), ms(10), ms(MINUTE));
/// `[consumer.handler] timeout` of type `http`: from the first byte sent to the
/// last one received, the connection included.
pub const HTTP_TIMEOUT: Setting<Duration> = setting(ms(20 * SECOND), ms(100), ms(HOUR));
/// `[consumer.handler] key_header`
pub const KEY_HEADER: &str = "Idempotency-Key";
/// Most fixed headers of an HTTP request.
pub const HTTP_HEADERS_MAX: usize = 32;
/// Most headers of a message that an HTTP request carries.
pub const HTTP_FORWARD_MAX: usize = 16;
/// Longest value of an HTTP header, in bytes.
pub const HTTP_VALUE_MAX: usize = 4 << 10;
/// Most bytes of an answer that are read.
pub const HTTP_ANSWER_MAX: usize = 64 << 10;
/// Longest wait that a receiver can ask for with `Retry-After`, and a program
/// with `retry_after_ms`.
pub const RETRY_AFTER_MAX: Duration = ms(HOUR);
/// Most secrets that sign an HTTP request.
pub const SIGNING_SECRETS_MAX: usize = 8;
/// Begins a signing secret; may be left out.
pub const SIGNING_SECRET_PREFIX: &str = "whsec_";
/// Bytes of a signing secret, as Standard Webhooks has it.
pub const SIGNING_SECRET_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// Longest configuration file, in bytes.
pub const CONFIG_FILE_MAX: usize = 1 << 20;
/// Longest file of a handler, in bytes.
pub const HANDLER_FILE_MAX: usize = 1 << 20;
/// Longest file that holds a URL, in bytes.
pub const URL_FILE_MAX: usize = 16 << 10;
/// `allow_plaintext` of `[broker]`, `[redis]` and `[postgres]`
pub const ALLOW_PLAINTEXT: bool = false;
/// Longest file of certificates, and of a key, in bytes.
pub const CA_FILE_MAX: usize = 4 << 20;
