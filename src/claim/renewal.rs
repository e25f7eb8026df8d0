//! The thread of a consumer that renews its workers' claims, and asks for Redis
//! while it is away.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select};
use redis::{Pipeline, Value};

use super::link::Link;
use super::switches::Switches;
use super::{Claims, Held, RENEW, Shelf, lock, milliseconds};
use crate::config::checked;

/// How long a stop waits for the thread, which may be waiting for Redis.
const JOIN_WITHIN: Duration = Duration::from_millis(200);

/// The thread that renews the claims of a consumer's workers, and finds out
/// when a Redis that is away has come back: so no batch waits for that.
#[derive(Debug)]
pub struct Renewer {
    thread: JoinHandle<()>,
    /// Disconnected when it has ended.
    ended: Receiver<()>,
}

impl Renewer {
    /// Renews what `claims` hold until `stop` is disconnected.
    ///
    /// # Errors
    ///
    /// When the thread cannot be started, the URL cannot be read, or there are
    /// no claims.
    pub fn start(
        redis: &checked::Redis,
        claim: &checked::Claim,
        consumer: &str,
        claims: &[Claims],
        stop: Receiver<()>,
    ) -> anyhow::Result<Self> {
        let first = claims.first();
        let first = first.ok_or_else(|| anyhow::anyhow!("there are no claims to renew"))?;
        let (ending, ended) = bounded(0);
        let work = Work {
            link: Link::new(redis, first.switches())?,
            switches: Arc::clone(first.switches()),
            key_prefix: redis.key_prefix.clone(),
            shelves: claims.iter().map(|c| Arc::clone(&c.shelf)).collect(),
            claim: claim.clone(),
            consumer: consumer.to_owned(),
            _ending: ending,
        };
        let thread = std::thread::Builder::new()
            .name(format!("{consumer}-renew"))
            .spawn(move || work.run(&stop))?;
        Ok(Self { thread, ended })
    }

    /// Waits a moment for the thread, whose `stop` must be disconnected by
    /// now. One that waits for Redis is left to end by itself.
    pub fn join(self) {
        if self.ended.recv_timeout(JOIN_WITHIN) == Err(RecvTimeoutError::Timeout) {
            return;
        }
        if self.thread.join().is_err() {
            log::error!("the claim renewal thread panicked");
        }
    }
}

struct Work {
    link: Link,
    switches: Arc<Switches>,
    key_prefix: String,
    shelves: Vec<Shelf>,
    claim: checked::Claim,
    consumer: String,
    _ending: Sender<()>,
}

impl Work {
    fn run(mut self, stop: &Receiver<()>) {
        let tick = (self.claim.renew_every / 4).max(Duration::from_millis(10));
        loop {
            let probe_in = self.switches.probe_in();
            select! {
                recv(stop) -> _ => return,
                recv(self.switches.changes()) -> _ => continue,
                default(probe_in.unwrap_or(tick)) => {}
            }
            if probe_in.is_some() {
                match self.link.probe(&self.key_prefix) {
                    Ok(()) => self.switches.come_back(),
                    Err(cause) => self.switches.stay(&cause),
                }
                continue;
            }
            for held in due(&self.shelves, self.claim.renew_every) {
                self.renew(&held);
            }
        }
    }

    fn renew(&mut self, held: &Held) {
        let mut pipeline = Pipeline::with_capacity(held.keys.len());
        for key in &held.keys {
            pipeline
                .cmd("EVAL")
                .arg(RENEW)
                .arg(1)
                .arg(key)
                .arg(held.token.value())
                .arg(milliseconds(self.claim.lease));
        }
        let Some(renewed) = self.link.query(&pipeline) else {
            return;
        };
        let gone = |reply: &&Value| matches!(reply, Value::Int(0));
        let lost = renewed.iter().filter(gone).count();
        if lost > 0 {
            // Not an error: a batch that ended meanwhile has marked its ids done.
            log::debug!(consumer = self.consumer.as_str(), claims = lost; "claims were gone when they were to be renewed");
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
