//! Claims in Redis: who is working on a message id right now, and which ids
//! are known to be done. The only file that knows Redis.
//!
//! A hint, never the truth: every answer may be missing, and losing all of
//! Redis costs speed alone. A key is
//! `PREFIX:LEDGER_ID:CONSUMER:MESSAGE_ID`; its value is `c:TOKEN` while
//! somebody works on the id and `d:FINGERPRINT` once it is in the ledger.
//!
//! A worker that Redis fails leaves it for the whole consumer ([`Switches`]).
//! From then on nobody asks but the consumer's [`Renewer`], which finds out
//! when it is back: an outage costs each worker one wait at most.

mod link;
mod renewal;
mod switches;

pub mod desk;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use redis::{Pipeline, Value};

use crate::config::checked;
use crate::message::{Fingerprint, MessageId, hex};
use crate::observe::metrics::Meter;
use link::{Link, NO_ANSWER};

pub use renewal::Renewer;
pub use switches::{Counts, Switches};

const RELEASE: &str = "if redis.call('get', KEYS[1]) == ARGV[1] \
     then return redis.call('del', KEYS[1]) else return 0 end";
const RENEW: &str = "if redis.call('get', KEYS[1]) == ARGV[1] \
     then return redis.call('pexpire', KEYS[1], ARGV[2]) else return 0 end";

/// What Redis says about one id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// It is ours now, for the length of the lease.
    Won,
    /// Somebody else works on it.
    Held,
    /// It is in the ledger, with this fingerprint.
    Done(Fingerprint),
    /// Redis cannot say, for this id: the ledger alone decides.
    Unknown,
}

/// Tells one claim from every other, so that it is released and renewed only
/// by who made it. Random per worker, counted per batch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Token(Arc<str>);

impl Token {
    fn value(&self) -> String {
        format!("c:{}", self.0)
    }
}

/// Makes the tokens of one worker.
#[derive(Debug)]
pub struct Tokens {
    owner: String,
    count: u64,
}

impl Tokens {
    /// Draws 128 random bits.
    ///
    /// # Errors
    ///
    /// When the system has no randomness to give.
    pub fn new() -> anyhow::Result<Self> {
        let mut bits = [0; 16];
        getrandom::fill(&mut bits)
            .map_err(|e| anyhow::anyhow!("failed to draw a random claim token: {e}"))?;
        Ok(Self {
            owner: hex(&bits),
            count: 0,
        })
    }

    fn next(&mut self) -> Token {
        self.count += 1;
        Token(format!("{}-{}", self.owner, self.count).into())
    }
}

/// The keys claimed for one batch.
#[derive(Debug, Clone)]
struct Held {
    token: Token,
    keys: Vec<String>,
    renew_at: Instant,
}

/// The claims a worker holds, where the [`Renewer`] finds them.
type Shelf = Arc<Mutex<Vec<Held>>>;

/// One worker's way to Redis.
pub struct Claims {
    link: Link,
    config: checked::Claim,
    prefix: String,
    consumer: String,
    ledger_id: Arc<str>,
    /// What every key begins with.
    stem: String,
    tokens: Tokens,
    shelf: Shelf,
}

impl Claims {
    /// Those of a consumer's `workers`, which share its [`Switches`]. Does not
    /// connect yet.
    ///
    /// # Errors
    ///
    /// When the URL cannot be read, or there is no randomness.
    pub fn for_workers(
        workers: usize,
        redis: &checked::Redis,
        claim: &checked::Claim,
        consumer: &str,
        meter: &Arc<Meter>,
    ) -> anyhow::Result<Vec<Self>> {
        let switches = Arc::new(Switches::new(consumer).shown_on(meter));
        (0..workers)
            .map(|_| Self::new(redis, claim, consumer, &switches))
            .collect()
    }

    fn new(
        redis: &checked::Redis,
        claim: &checked::Claim,
        consumer: &str,
        switches: &Arc<Switches>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            link: Link::new(redis, switches)?,
            config: claim.clone(),
            prefix: redis.key_prefix.clone(),
            consumer: consumer.to_owned(),
            ledger_id: "".into(),
            stem: String::new(),
            tokens: Tokens::new()?,
            shelf: Shelf::default(),
        })
    }

    /// When the consumer left Redis and came back.
    #[must_use]
    pub fn switches(&self) -> &Arc<Switches> {
        &self.link.switches
    }

    /// The ledger whose marks are believed: a mark of any other lies under
    /// another key.
    pub fn set_ledger(&mut self, ledger_id: &Arc<str>) {
        if self.ledger_id != *ledger_id {
            self.ledger_id = Arc::clone(ledger_id);
            self.stem = format!("{}:{ledger_id}:{}:", self.prefix, self.consumer);
        }
    }

    /// Claims `ids`, in one pipeline. `None` when Redis cannot be asked, or is
    /// not asked because it is away.
    pub fn claim(&mut self, ids: &[&MessageId]) -> Option<(Token, Vec<Claim>)> {
        let token = self.tokens.next();
        let keys: Vec<String> = ids.iter().map(|id| self.key(id)).collect();
        let mut pipeline = Pipeline::with_capacity(keys.len());
        let (value, lease) = (token.value(), milliseconds(self.config.lease));
        for key in &keys {
            let set = pipeline.cmd("SET").arg(key).arg(&value);
            set.arg("NX").arg("GET").arg("PX").arg(lease);
        }
        // Counted from before the request: the lease runs from some time
        // after this, never from before it.
        let asked = Instant::now();
        let answers = self.link.query(&pipeline)?;
        if answers.iter().any(|answer| !is_value(answer)) {
            self.link.give_up_now(NO_ANSWER);
        }
        let claims: Vec<Claim> = answers.iter().map(|a| read(a, &value)).collect();
        let won: Vec<String> = keys
            .into_iter()
            .zip(&claims)
            .filter(|(_, claim)| **claim == Claim::Won)
            .map(|(key, _)| key)
            .collect();
        if !won.is_empty() {
            lock(&self.shelf).push(Held {
                token: token.clone(),
                keys: won,
                renew_at: asked + self.config.renew_every,
            });
        }
        Some((token, claims))
    }

    /// Marks ids as done. To be called only for what the ledger has committed.
    pub fn mark_done(&mut self, done: &[(&MessageId, Fingerprint)]) {
        if done.is_empty() {
            return;
        }
        let mut pipeline = Pipeline::with_capacity(done.len());
        let ttl = milliseconds(self.config.done_ttl);
        for (id, print) in done {
            let mark = ["d:", &hex(&print.0)].concat();
            let set = pipeline.cmd("SET").arg(self.key(id)).arg(mark);
            set.arg("PX").arg(ttl);
        }
        self.link.query(&pipeline);
    }

    /// Gives claims back that are still the ones made with `token`.
    pub fn release(&mut self, token: &Token, ids: &[&MessageId]) {
        if ids.is_empty() {
            return;
        }
        let mut pipeline = Pipeline::with_capacity(ids.len());
        for id in ids {
            pipeline
                .cmd("EVAL")
                .arg(RELEASE)
                .arg(1)
                .arg(self.key(id))
                .arg(token.value());
        }
        self.link.query(&pipeline);
    }

    /// Ends the renewal of what was claimed with `token`.
    pub fn finish(&mut self, token: &Token) {
        lock(&self.shelf).retain(|held| held.token != *token);
    }

    fn key(&self, id: &MessageId) -> String {
        [self.stem.as_str(), id.as_str()].concat()
    }
}

/// What `ackonce check` asks Redis for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerInfo {
    /// `redis_version`.
    pub version: String,
    /// `maxmemory-policy`, where the server tells.
    pub eviction: Option<String>,
}

/// Connects and does what the daemon does.
///
/// # Errors
///
/// When the server cannot be reached or does not let the daemon in.
pub fn inspect(redis: &checked::Redis) -> anyhow::Result<ServerInfo> {
    let found = link::Way::new(redis)?
        .connect(redis.timeout)
        .and_then(|mut connection| examine(&mut connection, &redis.key_prefix));
    found.map_err(|error| anyhow::anyhow!(link::describe(&error, redis.timeout)))
}

fn examine(
    connection: &mut redis::Connection,
    key_prefix: &str,
) -> Result<ServerInfo, redis::RedisError> {
    let info: redis::InfoDict = redis::cmd("INFO").arg("server").query(connection)?;
    let memory: redis::InfoDict = redis::cmd("INFO").arg("memory").query(connection)?;
    let probe = link::probe_key(key_prefix);
    let _: Option<String> = redis::cmd("SET")
        .arg(&probe)
        .arg("c:check")
        .arg("NX")
        .arg("GET")
        .arg("PX")
        .arg(1_000)
        .query(connection)?;
    let _: i64 = redis::cmd("EVAL")
        .arg(RENEW)
        .arg(1)
        .arg(&probe)
        .arg("c:check")
        .arg(1_000)
        .query(connection)?;
    let _: i64 = redis::cmd("EVAL")
        .arg(RELEASE)
        .arg(1)
        .arg(&probe)
        .arg("c:check")
        .query(connection)?;
    Ok(ServerInfo {
        version: info.get("redis_version").unwrap_or_default(),
        eviction: memory.get("maxmemory_policy"),
    })
}

/// Whether `answer` can be one to SET with NX and GET.
fn is_value(answer: &Value) -> bool {
    matches!(
        answer,
        Value::Nil | Value::BulkString(_) | Value::ServerError(_)
    )
}

/// `mine` is the value that was to be set.
fn read(answer: &Value, mine: &str) -> Claim {
    let value = match answer {
        Value::Nil => return Claim::Won,
        Value::BulkString(value) => value.as_slice(),
        _ => return Claim::Unknown,
    };
    if value == mine.as_bytes() {
        // Asked for twice, because the connection was lost in between.
        return Claim::Won;
    }
    match value.strip_prefix(b"d:").and_then(unhex) {
        Some(print) => Claim::Done(print),
        None if value.starts_with(b"c:") => Claim::Held,
        // Not ours. What waited for it to go might wait for ever.
        None => Claim::Unknown,
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn lock(shelf: &Shelf) -> std::sync::MutexGuard<'_, Vec<Held>> {
    shelf.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unhex(text: &[u8]) -> Option<Fingerprint> {
    let mut print = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, pair) in print.iter_mut().zip(text.chunks_exact(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(Fingerprint(print))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_mark_is_a_mark() {
        let print = Fingerprint([0xA5; 32]);
        let mark = format!("d:{}", hex(&print.0));
        let read = |value: &str| read(&Value::BulkString(value.into()), "c:mine");
        assert_eq!(read(&mark), Claim::Done(print));
        for other in ["d:", "d:a5", "", "done", &mark[1..], &mark[..65]] {
            assert_eq!(read(other), Claim::Unknown, "{other:?}");
        }
    }

    #[test]
    fn what_stands_there_already_is_ours_or_anothers() {
        let read = |value: &Value| read(value, "c:mine");
        assert_eq!(read(&Value::Nil), Claim::Won);
        assert_eq!(read(&Value::BulkString(b"c:mine".into())), Claim::Won);
        assert_eq!(read(&Value::BulkString(b"c:mine2".into())), Claim::Held);
        assert_eq!(read(&Value::Okay), Claim::Unknown);
        assert!(!is_value(&Value::Okay));
    }

    #[test]
    fn no_two_batches_share_a_token() {
        let mut one = Tokens::new().unwrap();
        let mut other = Tokens::new().unwrap();
        let tokens = [one.next(), one.next(), other.next(), other.next()];
        for (i, a) in tokens.iter().enumerate() {
            assert!(tokens[i + 1..].iter().all(|b| a != b));
        }
    }
}
