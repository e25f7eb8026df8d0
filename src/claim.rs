//! Claims in Redis: who is working on a message id right now, and which ids
//! are known to be done. The only file that knows Redis.
//!
//! A hint, never the truth: every answer may be missing, and losing all of
//! Redis costs speed alone. A key is `PREFIX:NAME:CONSUMER:MESSAGE_ID`, with
//! the [`Marks`]' name; its value is `c:TOKEN` while somebody works on the id,
//! and a mark once it is in the ledger. What Redis says is not believed for its
//! own sake: a mark is signed with the ledger's secret, for this id and body, for
//! this server and for a time; whatever is no such mark has the ledger asked. A
//! claim is not waited for any longer than one can last that is not renewed.
//!
//! A worker that Redis fails leaves it for the whole consumer ([`Switches`]).
//! From then on nobody asks but the consumer's [`Renewer`], which finds out
//! when it is back: an outage costs each worker one wait at most.

mod link;
mod renewal;
mod switches;

pub mod desk;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use redis::{Pipeline, Value};

use crate::config::checked;
use crate::message::{Fingerprint, MessageId, hex};
use crate::observe::metrics::Meter;
use crate::seal::Marks;
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
    /// It is in the ledger, with this body.
    Done,
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
    retention: Duration,
    prefix: String,
    consumer: String,
    /// With what every key begins; nothing is asked before that is known.
    marks: Option<(Marks, String)>,
    tokens: Tokens,
    shelf: Shelf,
}

impl Claims {
    /// Those of a consumer's `workers`, which share its [`Switches`], with a
    /// ledger whose rows live for `retention`. Does not connect yet.
    ///
    /// # Errors
    ///
    /// When the URL cannot be read, or there is no randomness.
    pub fn for_workers(
        workers: usize,
        redis: &checked::Redis,
        consumer: &checked::Consumer,
        retention: Duration,
        meter: &Arc<Meter>,
    ) -> anyhow::Result<Vec<Self>> {
        let switches = Arc::new(Switches::new(&consumer.name).shown_on(meter));
        (0..workers)
            .map(|_| Self::new(redis, consumer, retention, &switches))
            .collect()
    }

    fn new(
        redis: &checked::Redis,
        consumer: &checked::Consumer,
        retention: Duration,
        switches: &Arc<Switches>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            link: Link::new(redis, switches)?,
            config: consumer.claim.clone(),
            retention,
            prefix: redis.key_prefix.clone(),
            consumer: consumer.name.clone(),
            marks: None,
            tokens: Tokens::new()?,
            shelf: Shelf::default(),
        })
    }

    /// When the consumer left Redis and came back.
    #[must_use]
    pub fn switches(&self) -> &Arc<Switches> {
        &self.link.switches
    }

    /// The ledger whose marks are made and believed: those of any other lie
    /// under other keys.
    pub fn set_ledger(&mut self, marks: &Marks) {
        if self.marks.as_ref().is_none_or(|(known, _)| known != marks) {
            let stem = stem(&self.prefix, marks, &self.consumer);
            self.marks = Some((marks.clone(), stem));
        }
    }

    /// Claims the ids of `wanted`, in one pipeline, and another one for those
    /// that somebody holds. `None` when Redis cannot be asked, or is not asked
    /// because it is away.
    pub fn claim(&mut self, wanted: &[(&MessageId, Fingerprint)]) -> Option<(Token, Vec<Claim>)> {
        let (marks, stem) = self.marks.as_ref()?;
        let token = self.tokens.next();
        let keys: Vec<String> = wanted.iter().map(|(id, _)| key(stem, id)).collect();
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
        let now = seconds(SystemTime::now());
        let is_mark = |value: &[u8], (id, print): &(&MessageId, Fingerprint)| {
            marks.is_mark(value, &self.consumer, id, *print, now)
        };
        let mut claims: Vec<Claim> = answers
            .iter()
            .zip(wanted)
            .map(|(answer, one)| read(answer, &value, |value| is_mark(value, one)))
            .collect();
        self.doubt_long_ones(&keys, &mut claims);
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

    /// A worker's claim ends within the lease, unless it is renewed. One that
    /// would last longer, or for ever, is none of a worker's: it is cut to the
    /// lease and not waited for.
    fn doubt_long_ones(&mut self, keys: &[String], claims: &mut [Claim]) {
        let held = |claims: &mut [Claim]| -> Vec<usize> {
            let numbered = claims.iter().enumerate();
            let held = numbered.filter(|(_, claim)| **claim == Claim::Held);
            held.map(|(number, _)| number).collect()
        };
        let held = held(claims);
        if held.is_empty() {
            return;
        }
        let mut pipeline = Pipeline::with_capacity(held.len());
        for number in &held {
            let expire = pipeline.cmd("PEXPIRE").arg(&keys[*number]);
            expire.arg(milliseconds(self.config.lease)).arg("LT");
        }
        let Some(cut) = self.link.query(&pipeline) else {
            return;
        };
        for (number, cut) in held.into_iter().zip(cut) {
            if cut != Value::Int(0) {
                claims[number] = Claim::Unknown;
            }
        }
    }

    /// Marks ids as done, each with its body and the age of its ledger row: no
    /// mark outlives that. To be called only for what the ledger has committed.
    pub fn mark_done(&mut self, done: &[(&MessageId, Fingerprint, Duration)]) {
        let Some((marks, stem)) = self.marks.as_ref().filter(|_| !done.is_empty()) else {
            return;
        };
        let mut pipeline = Pipeline::with_capacity(done.len());
        let now = SystemTime::now();
        for (id, print, age) in done {
            let ttl = self
                .config
                .done_ttl
                .min(self.retention.saturating_sub(*age));
            let expires = now.checked_add(ttl).map_or(0, seconds);
            let set = pipeline.cmd("SET").arg(key(stem, id));
            set.arg(marks.mark(&self.consumer, id, *print, expires));
            // Zero is refused, and one that is over is no mark.
            set.arg("PX").arg(milliseconds(ttl).max(1));
        }
        self.link.query(&pipeline);
    }

    /// Gives claims back that are still the ones made with `token`.
    pub fn release(&mut self, token: &Token, ids: &[&MessageId]) {
        let Some((_, stem)) = self.marks.as_ref().filter(|_| !ids.is_empty()) else {
            return;
        };
        let mut pipeline = Pipeline::with_capacity(ids.len());
        for id in ids {
            pipeline
                .cmd("EVAL")
                .arg(RELEASE)
                .arg(1)
                .arg(key(stem, id))
                .arg(token.value());
        }
        self.link.query(&pipeline);
    }

    /// Ends the renewal of what was claimed with `token`.
    pub fn finish(&mut self, token: &Token) {
        lock(&self.shelf).retain(|held| held.token != *token);
    }
}

/// What every key of a consumer begins with.
fn stem(prefix: &str, marks: &Marks, consumer: &str) -> String {
    format!("{prefix}:{}:{consumer}:", marks.name())
}

fn key(stem: &str, id: &MessageId) -> String {
    [stem, id.as_str()].concat()
}

/// Since 1970; 0 before.
fn seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
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
fn read(answer: &Value, mine: &str, is_mark: impl Fn(&[u8]) -> bool) -> Claim {
    let value = match answer {
        Value::Nil => return Claim::Won,
        Value::BulkString(value) => value.as_slice(),
        _ => return Claim::Unknown,
    };
    if value == mine.as_bytes() {
        // Asked for twice, because the connection was lost in between.
        return Claim::Won;
    }
    match value {
        value if value.starts_with(b"c:") => Claim::Held,
        value if is_mark(value) => Claim::Done,
        // Not ours. What waited for it to go might wait for ever.
        _ => Claim::Unknown,
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn lock(shelf: &Shelf) -> std::sync::MutexGuard<'_, Vec<Held>> {
    shelf.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_there_already_is_ours_or_anothers() {
        let read = |value: &Value| read(value, "c:mine", |value| value == b"d:ours");
        assert_eq!(read(&Value::BulkString(b"d:ours".into())), Claim::Done);
        assert_eq!(read(&Value::BulkString(b"d:other".into())), Claim::Unknown);
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
