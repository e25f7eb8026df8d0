//! Claims in Redis: who is working on a message id right now, and which ids
//! are known to be done. The only file that knows Redis.
//!
//! A hint, never the truth: every answer may be missing, and losing all of
//! Redis costs speed alone. A key is
//! `PREFIX:LEDGER_ID:CONSUMER:MESSAGE_ID`; its value is `c:TOKEN` while
//! somebody works on the id and `d:FINGERPRINT` once it is in the ledger.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use redis::{
    Client, Connection, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisError, Value,
};

use crate::backoff::Backoff;
use crate::config::checked;
use crate::message::{Fingerprint, MessageId, hex};
use crate::random;

/// First and longest wait before a Redis that failed is asked again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

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
    /// Does not connect yet.
    ///
    /// # Errors
    ///
    /// When the URL cannot be read, or there is no randomness.
    pub fn new(
        redis: &checked::Redis,
        claim: &checked::Claim,
        consumer: &str,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            link: Link::new(redis, consumer)?,
            config: claim.clone(),
            prefix: redis.key_prefix.clone(),
            consumer: consumer.to_owned(),
            ledger_id: "".into(),
            stem: String::new(),
            tokens: Tokens::new()?,
            shelf: Shelf::default(),
        })
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
    /// not asked because it failed a moment ago.
    pub fn claim(&mut self, ids: &[&MessageId]) -> Option<(Token, Vec<Claim>)> {
        let token = self.tokens.next();
        let keys: Vec<String> = ids.iter().map(|id| self.key(id)).collect();
        let mut pipeline = redis::Pipeline::with_capacity(keys.len());
        let (value, lease) = (token.value(), milliseconds(self.config.lease));
        for key in &keys {
            let set = pipeline.cmd("SET").arg(key).arg(&value);
            set.arg("NX").arg("GET").arg("PX").arg(lease);
        }
        // Counted from before the request: the lease runs from some time
        // after this, never from before it.
        let asked = Instant::now();
        let answers: Vec<Option<Vec<u8>>> = self.link.query(&pipeline)?;
        let claims: Vec<Claim> = answers.iter().map(|a| read(a.as_deref())).collect();
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
        let mut pipeline = redis::Pipeline::with_capacity(done.len());
        let ttl = milliseconds(self.config.done_ttl);
        for (id, print) in done {
            let mark = ["d:", &hex(&print.0)].concat();
            let set = pipeline.cmd("SET").arg(self.key(id)).arg(mark);
            set.arg("PX").arg(ttl).ignore();
        }
        self.link.query::<Value>(&pipeline);
    }

    /// Gives claims back that are still the ones made with `token`.
    pub fn release(&mut self, token: &Token, ids: &[&MessageId]) {
        if ids.is_empty() {
            return;
        }
        let mut pipeline = redis::Pipeline::with_capacity(ids.len());
        for id in ids {
            pipeline
                .cmd("EVAL")
                .arg(RELEASE)
                .arg(1)
                .arg(self.key(id))
                .arg(token.value())
                .ignore();
        }
        self.link.query::<Value>(&pipeline);
    }

    /// Ends the renewal of what was claimed with `token`.
    pub fn finish(&mut self, token: &Token) {
        lock(&self.shelf).retain(|held| held.token != *token);
    }

    fn key(&self, id: &MessageId) -> String {
        [self.stem.as_str(), id.as_str()].concat()
    }
}

/// The thread that renews the claims of a consumer's workers.
#[derive(Debug)]
pub struct Renewer {
    thread: JoinHandle<()>,
}

impl Renewer {
    /// Renews what `claims` hold until `stop` is disconnected.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started, or the URL cannot be read.
    pub fn start(
        redis: &checked::Redis,
        claim: &checked::Claim,
        consumer: &str,
        claims: &[Claims],
        stop: Receiver<()>,
    ) -> anyhow::Result<Self> {
        let mut link = Link::new(redis, consumer)?;
        let shelves: Vec<Shelf> = claims.iter().map(|c| Arc::clone(&c.shelf)).collect();
        let claim = claim.clone();
        let consumer = consumer.to_owned();
        let tick = (claim.renew_every / 4).max(Duration::from_millis(10));
        let thread = std::thread::Builder::new()
            .name(format!("{consumer}-renew"))
            .spawn(move || {
                while stop.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
                    for held in due(&shelves, claim.renew_every) {
                        renew(&mut link, &held, claim.lease, &consumer);
                    }
                }
            })?;
        Ok(Self { thread })
    }

    /// Waits for the thread, whose `stop` must be disconnected by now. It may
    /// take as long as one reply of Redis.
    pub fn join(self) {
        if self.thread.join().is_err() {
            log::error!("the claim renewal thread panicked");
        }
    }
}

/// Takes what is to be renewed now, and sets when it is to be renewed next.
fn due(shelves: &[Shelf], renew_every: Duration) -> Vec<Held> {
    let now = Instant::now();
    let mut due = Vec::new();
    for shelf in shelves {
        for held in lock(shelf).iter_mut().filter(|held| held.renew_at <= now) {
            held.renew_at = now + renew_every;
            due.push(held.clone());
        }
    }
    due
}

fn renew(link: &mut Link, held: &Held, lease: Duration, consumer: &str) {
    let mut pipeline = redis::Pipeline::with_capacity(held.keys.len());
    for key in &held.keys {
        pipeline
            .cmd("EVAL")
            .arg(RENEW)
            .arg(1)
            .arg(key)
            .arg(held.token.value())
            .arg(milliseconds(lease));
    }
    let Some(renewed) = link.query::<Vec<i64>>(&pipeline) else {
        return;
    };
    let lost = renewed.iter().filter(|answer| **answer == 0).count();
    if lost > 0 {
        // Not an error: a batch that ended meanwhile has marked its ids done.
        log::debug!(consumer = consumer, claims = lost; "claims were gone when they were to be renewed");
    }
}

/// A connection that comes back by itself, and is left alone for a while
/// after it failed.
struct Link {
    client: Client,
    connect_timeout: Duration,
    timeout: Duration,
    consumer: String,
    connection: Option<Connection>,
    failures: u32,
    retry_at: Option<Instant>,
}

impl Link {
    fn new(redis: &checked::Redis, consumer: &str) -> anyhow::Result<Self> {
        Ok(Self {
            client: client(redis)?,
            connect_timeout: redis.connect_timeout,
            timeout: redis.timeout,
            consumer: consumer.to_owned(),
            connection: None,
            failures: 0,
            retry_at: None,
        })
    }

    /// The answers, or `None` when Redis is to be gone without.
    fn query<T: redis::FromRedisValue>(&mut self, pipeline: &redis::Pipeline) -> Option<T> {
        if self.retry_at.is_some_and(|at| Instant::now() < at) {
            return None;
        }
        match self.try_query(pipeline) {
            Ok(answers) => {
                if self.failures > 0 {
                    log::info!(consumer = self.consumer.as_str(); "Redis is back: claims are used again");
                }
                self.failures = 0;
                self.retry_at = None;
                Some(answers)
            }
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    fn try_query<T: redis::FromRedisValue>(
        &mut self,
        pipeline: &redis::Pipeline,
    ) -> Result<T, RedisError> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let connection = self
                    .client
                    .get_connection_with_timeout(self.connect_timeout)?;
                connection.set_read_timeout(Some(self.timeout))?;
                connection.set_write_timeout(Some(self.timeout))?;
                none.insert(connection)
            }
        };
        pipeline.query(connection)
    }

    fn fail(&mut self, error: &RedisError) {
        // A reply that comes late would be taken for the next one's.
        self.connection = None;
        if self.failures == 0 {
            log::warn!(consumer = self.consumer.as_str(); "Redis does not answer, going on with the ledger alone: {error}");
        }
        let backoff = Backoff::new(RETRY.0, RETRY.1);
        self.retry_at = Some(Instant::now() + backoff.delay(self.failures, random::draw()));
        self.failures = self.failures.saturating_add(1);
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

/// Connects and asks for what the daemon depends on.
///
/// # Errors
///
/// When the server cannot be reached or does not let the daemon in.
pub fn inspect(redis: &checked::Redis) -> anyhow::Result<ServerInfo> {
    let mut connection = client(redis)?.get_connection_with_timeout(redis.connect_timeout)?;
    connection.set_read_timeout(Some(redis.timeout))?;
    let info: redis::InfoDict = redis::cmd("INFO").arg("server").query(&mut connection)?;
    let memory: redis::InfoDict = redis::cmd("INFO").arg("memory").query(&mut connection)?;
    let probe = format!("{}:check", redis.key_prefix);
    let _: Option<String> = redis::cmd("SET")
        .arg(&probe)
        .arg("c:check")
        .arg("NX")
        .arg("GET")
        .arg("PX")
        .arg(1_000)
        .query(&mut connection)?;
    let _: i64 = redis::cmd("EVAL")
        .arg(RELEASE)
        .arg(1)
        .arg(&probe)
        .arg("c:check")
        .query(&mut connection)?;
    Ok(ServerInfo {
        version: info.get("redis_version").unwrap_or_default(),
        eviction: memory.get("maxmemory_policy"),
    })
}

fn client(redis: &checked::Redis) -> anyhow::Result<Client> {
    // redis's own error may quote the URL, and with it the password.
    let info: ConnectionInfo = redis
        .url
        .expose()
        .into_connection_info()
        .map_err(|_| anyhow::anyhow!("failed to read the Redis URL: see `ackonce check`"))?;
    let info = match info.addr() {
        ConnectionAddr::Unix(_) => info,
        _ => {
            let tcp = info.tcp_settings().clone().set_nodelay(true);
            info.set_tcp_settings(tcp)
        }
    };
    Ok(Client::open(info)?)
}

fn read(value: Option<&[u8]>) -> Claim {
    let Some(value) = value else {
        return Claim::Won;
    };
    match value.strip_prefix(b"d:").and_then(unhex) {
        Some(print) => Claim::Done(print),
        // Whatever else stands there is not ours, and not a mark.
        None => Claim::Held,
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
        assert_eq!(read(None), Claim::Won);
        assert_eq!(read(Some(mark.as_bytes())), Claim::Done(print));
        for other in ["c:token", "d:", "d:a5", "", "done", &mark[1..], &mark[..65]] {
            assert_eq!(read(Some(other.as_bytes())), Claim::Held, "{other:?}");
        }
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
