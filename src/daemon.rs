//! The daemon: schema, consumers, reconnecting, and the stop.
//!
//! One thread per consumer owns its broker connection. It never blocks where
//! it could not be stopped: opening a connection is left to a thread of its
//! own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use crossbeam_channel::{Receiver, bounded, select};

use crate::backoff::Backoff;
use crate::broker::connection::{self, Link};
use crate::broker::consumer::{self, End, Feed};
use crate::broker::topology::{self, TopologyError};
use crate::config::checked;
use crate::handler::{self, rust::Makers};
use crate::ledger::{self, Schema};
use crate::message::{Epoch, Settled};
use crate::pool::Pool;
use crate::postgres::{self, Session};
use crate::prune;
use crate::random;
use crate::stop::Stop;

/// Longest wait for the broker's answer when a connection is closed.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// Longest wait for a new connection's first channel.
const CHANNEL_WITHIN: Duration = Duration::from_secs(10);

/// A connection that lived this long was a good one: the next wait starts small.
const STABLE: Duration = Duration::from_secs(30);

/// Why the daemon cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The configuration, the schema or the topology is not what it must be.
    #[error("{0}")]
    Config(String),
    /// A right is missing.
    #[error("{0}")]
    Denied(String),
    /// The system does not give what a process needs.
    #[error("{0:#}")]
    System(#[from] anyhow::Error),
}

/// Runs every consumer until `stop`, or until one cannot go on; `makers` are the
/// program's own handlers.
///
/// # Errors
///
/// [`Fatal`], after the other consumers have been stopped too.
pub fn run(config: &checked::Config, makers: &Makers, stop: &Stop) -> Result<(), Fatal> {
    let host = host();
    for consumer in &config.consumers {
        let handler = handler::build(consumer, makers).map_err(|e| Fatal::Config(e.to_string()))?;
        log::info!(
            consumer = consumer.name.as_str(), handler = handler.kind(), effect:% = handler.effect();
            "handles messages"
        );
    }
    if !prepare_schema(config, stop)? {
        return Ok(());
    }
    // One consumer that cannot go on stops the others.
    let (stop_all, all_stopping) = crate::stop::pair();
    prune::start(config, &all_stopping)?;
    let (ended, ends) = bounded(config.consumers.len());
    let mut threads = Vec::new();
    for consumer in &config.consumers {
        let runner = Runner {
            config: config.clone(),
            consumer: Arc::new(consumer.clone()),
            makers: makers.clone(),
            host: host.clone(),
            stop: all_stopping.clone(),
        };
        let ended = ended.clone();
        let thread = std::thread::Builder::new()
            .name(consumer.name.clone())
            .spawn(move || {
                let end = catch_unwind(AssertUnwindSafe(|| runner.run()));
                let end = end.unwrap_or_else(|_| Err(anyhow!("a consumer thread panicked").into()));
                ended.send(end).ok();
            })
            .context("failed to start a consumer thread")?;
        threads.push(thread);
    }
    drop(ended);
    let first = select! {
        recv(ends) -> end => end.ok(),
        recv(stop.as_receiver()) -> _ => None,
    };
    log::info!("stopping");
    drop(stop_all);
    let result = first.into_iter().chain(&ends).fold(Ok(()), Result::and);
    threads.into_iter().for_each(join);
    log::info!("stopped");
    result
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        log::error!("a consumer thread panicked");
    }
}

/// Host name and process id: who wrote a line of the failure journal.
fn host() -> String {
    let name = nix::unistd::gethostname()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    format!("{name}/{}", std::process::id())
}

/// Waits for PostgreSQL and sees to the schema. False when it is time to stop.
fn prepare_schema(config: &checked::Config, stop: &Stop) -> Result<bool, Fatal> {
    let backoff = backoff(config);
    let mut tries = 0;
    let mut told = None;
    loop {
        match try_schema(config) {
            Ok(Schema::Current) => return Ok(true),
            Ok(Schema::Behind(count)) => {
                return Err(Fatal::Config(format!(
                    "the schema ackonce lacks {count} migration(s) of this version\n  hint: run \
                     `ackonce migrate` with a role that may create tables, or set auto_migrate"
                )));
            }
            Err(error) => {
                if told.as_ref() != Some(&error) {
                    log::warn!("waiting for PostgreSQL: {error}");
                }
                if stop.wait(backoff.delay(tries, random::draw())) {
                    return Ok(false);
                }
                tries += 1;
                told = Some(error);
            }
        }
    }
}

fn try_schema(config: &checked::Config) -> Result<Schema, postgres::Error> {
    let mut session = Session::open(&config.postgres, "schema")?;
    let schema = ledger::schema(&mut session)?;
    if schema == Schema::Current || !config.postgres.auto_migrate {
        return Ok(schema);
    }
    ledger::migrate(&mut session)?;
    log::info!("migrated the schema ackonce");
    Ok(Schema::Current)
}

fn backoff(config: &checked::Config) -> Backoff {
    Backoff::new(config.daemon.reconnect_min, config.daemon.reconnect_max)
}

/// What the end of one connection means.
enum Next {
    /// The connection is lost: open another one.
    Reconnect(String),
    /// A worker panicked: start the workers anew.
    Restart,
    /// The daemon stops, and what was in flight is settled.
    Stopped,
    /// The daemon stops without a connection to settle anything on.
    Unconnected,
}

/// One consumer: its pool, and one broker connection after the other.
struct Runner {
    config: checked::Config,
    consumer: Arc<checked::Consumer>,
    makers: Makers,
    host: String,
    stop: Stop,
}

impl Runner {
    fn run(self) -> Result<(), Fatal> {
        let mut epoch = Epoch::default();
        let mut restarts = 0;
        let mut declared = false;
        loop {
            let since = Instant::now();
            let mut pool = Pool::start(&self.config, &self.consumer, &self.makers, &self.host)?;
            let next = self.serve(&mut pool, &mut epoch, &mut declared);
            pool.stop(match next {
                // The stop has waited for the workers, or there is one to
                // come back for.
                Ok(Next::Stopped | Next::Restart) => Duration::ZERO,
                _ => self.stop.left_of(self.config.daemon.shutdown_timeout),
            });
            match next? {
                Next::Restart => {
                    if since.elapsed() > STABLE {
                        restarts = 0;
                    }
                    if self
                        .stop
                        .wait(backoff(&self.config).delay(restarts, random::draw()))
                    {
                        return Ok(());
                    }
                    restarts += 1;
                }
                Next::Stopped | Next::Unconnected | Next::Reconnect(_) => return Ok(()),
            }
        }
    }

    /// One connection after the other, with the same workers.
    fn serve(
        &self,
        pool: &mut Pool,
        epoch: &mut Epoch,
        declared: &mut bool,
    ) -> Result<Next, Fatal> {
        let mut tries = 0;
        loop {
            epoch.0 += 1;
            let since = Instant::now();
            match self.connect_and_consume(pool, *epoch, declared)? {
                Next::Reconnect(cause) => {
                    if since.elapsed() > STABLE {
                        tries = 0;
                    }
                    let delay = backoff(&self.config).delay(tries, random::draw());
                    tries += 1;
                    log::warn!(
                        consumer = self.consumer.name.as_str(), epoch = epoch.0,
                        retry_in_ms = delay.as_millis() as u64;
                        "lost the broker: {cause}"
                    );
                    if let Some(end) = self.wait_discarding(&pool.outbox, delay) {
                        return Ok(end);
                    }
                }
                end => return Ok(end),
            }
        }
    }

    /// `declared` says whether the topology was once as configured.
    fn connect_and_consume(
        &self,
        pool: &mut Pool,
        epoch: Epoch,
        declared: &mut bool,
    ) -> Result<Next, Fatal> {
        let mut link = match self.open(&pool.outbox) {
            Ok(link) => link,
            Err(next) => return Ok(next),
        };
        if let Err(error) = topology::prepare(
            &mut link,
            &self.config.broker,
            &self.consumer,
            !*declared,
            CHANNEL_WITHIN,
        ) {
            link.abandon(());
            return match &error {
                // What changes under a running daemon may change back.
                _ if *declared => Ok(Next::Reconnect(error.to_string())),
                error if error.is_config() => Err(Fatal::Config(error.to_string())),
                TopologyError::Denied { .. } => Err(Fatal::Denied(error.to_string())),
                _ => Ok(Next::Reconnect(error.to_string())),
            };
        }
        *declared = true;
        let channel = match link.open_channel(CHANNEL_WITHIN) {
            Ok(channel) => channel,
            Err(error) => return Ok(Next::Reconnect(error.to_string())),
        };
        let feed = Feed {
            broker: &self.config.broker,
            backoff: backoff(&self.config),
            consumer: &self.consumer,
            epoch,
            inbox: &mut pool.inbox,
            stopper: &mut pool.stopper,
            unstarted: &pool.unstarted,
            outbox: &pool.outbox,
            panicked: &pool.panicked,
            gate: &pool.gate,
            stop: &self.stop,
            shutdown_timeout: self.config.daemon.shutdown_timeout,
        };
        let end = consumer::run(&link, &channel, feed);
        let closed = link.close_with(channel, CLOSE_WITHIN);
        Ok(match end {
            End::Stopped { unfinished: 0 } => Next::Stopped,
            End::Stopped { unfinished } => {
                log::warn!(
                    consumer = self.consumer.name.as_str(), deliveries = unfinished;
                    "shutdown_timeout ran out: what is still in work goes back to the queue"
                );
                Next::Stopped
            }
            End::Panicked => Next::Restart,
            // Why a connection died, only its close can tell.
            End::Lost(what) => Next::Reconnect(match closed {
                Ok(()) => what,
                Err(cause) => format!("{what}: {cause}"),
            }),
        })
    }

    /// A new connection, or what there is to do without one.
    fn open(&self, outbox: &Receiver<Vec<Settled>>) -> Result<Link, Next> {
        let (done, opened) = bounded(1);
        let broker = self.config.broker.clone();
        let purpose = format!("{} consumer", self.consumer.name);
        std::thread::Builder::new()
            .name(format!("{}-connect", self.consumer.name))
            .spawn(move || {
                // When nobody waits any more, the link ends with the message.
                done.send(connection::open(&broker, &purpose)).ok();
            })
            .map_err(|error| Next::Reconnect(format!("failed to start a thread: {error}")))?;
        loop {
            select! {
                recv(opened) -> link => return match link {
                    Ok(Ok(link)) => Ok(link),
                    Ok(Err(error)) => Err(Next::Reconnect(error.to_string())),
                    Err(_) => Err(Next::Reconnect("the connecting thread panicked".to_owned())),
                },
                recv(outbox) -> settled => match settled {
                    Ok(settled) => settled.iter().for_each(|one| self.discard(one)),
                    // The last worker is gone, and only a panic ends one now.
                    Err(_) => return Err(Next::Restart),
                },
                recv(self.stop.as_receiver()) -> _ => return Err(Next::Unconnected),
            }
        }
    }

    /// Waits without a connection. Says what to do when that is not to be
    /// waited for.
    fn wait_discarding(&self, outbox: &Receiver<Vec<Settled>>, delay: Duration) -> Option<Next> {
        let deadline = Instant::now() + delay;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            select! {
                recv(outbox) -> settled => match settled {
                    Ok(settled) => settled.iter().for_each(|one| self.discard(one)),
                    Err(_) => return Some(Next::Restart),
                },
                recv(self.stop.as_receiver()) -> _ => return Some(Next::Unconnected),
                default(left) => {}
            }
        }
    }

    /// A settlement whose connection is gone: the broker gives the message out
    /// again, and the ledger knows what became of it.
    fn discard(&self, settled: &Settled) {
        log::debug!(
            consumer = self.consumer.name.as_str(), epoch = settled.ticket.epoch.0,
            tag = settled.ticket.tag;
            "dropped a settlement of a lost connection"
        );
    }
}
