//! One consumer: its pool, and one broker connection after the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded, select};

use super::streak::{self, Streak};
use super::{Fatal, backoff};
use crate::broker::connection::Dial;
use crate::broker::consumer::{End, Feed};
use crate::broker::session::{OpenError, Session};
use crate::broker::signed::Signer;
use crate::broker::topology::TopologyError;
use crate::config::checked;
use crate::handler::rust::Makers;
use crate::ledger;
use crate::message::{Epoch, Settled};
use crate::observe::Signs;
use crate::observe::metrics::Server;
use crate::pool::Pool;
use crate::postgres;
use crate::random;
use crate::stop::Stop;

/// Workers that ran for so long before one panicked: the next wait starts small.
const STABLE: Duration = Duration::from_secs(30);

/// Longest wait without a sign of life.
const BEAT: Duration = Duration::from_secs(1);

/// What the end of one connection means.
enum Next {
    /// The connection is lost: open another one.
    Reconnect,
    /// A worker panicked: start the workers anew.
    Restart,
    /// The daemon stops, and what was in flight is settled.
    Stopped,
    /// The daemon stops without a connection to settle anything on.
    Unconnected,
}

/// One consumer of the daemon.
pub(super) struct Runner {
    pub(super) config: checked::Config,
    pub(super) consumer: Arc<checked::Consumer>,
    pub(super) makers: Makers,
    pub(super) host: String,
    pub(super) stop: Stop,
    pub(super) signs: Signs,
}

/// What is known from one connection to the next.
struct Memory {
    epoch: Epoch,
    /// Whether the topology was once as configured.
    declared: bool,
    streak: Streak,
}

impl Runner {
    /// Runs until the stop, or until it cannot go on.
    pub(super) fn run(self) -> Result<(), Fatal> {
        let mut memory = Memory {
            epoch: Epoch::default(),
            declared: false,
            streak: Streak::new(self.config.broker.urls.len()),
        };
        // The schema was seen to before.
        self.signs.meter.is_up(Server::Postgres, true);
        let Some(signer) = self.signer() else {
            return Ok(());
        };
        let mut restarts = 0;
        loop {
            let since = Instant::now();
            let mut pool = Pool::start(
                &self.config,
                &self.consumer,
                &self.makers,
                &self.host,
                &self.signs,
            )?;
            let next = self.serve(&mut pool, &signer, &mut memory);
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
                Next::Stopped | Next::Unconnected | Next::Reconnect => return Ok(()),
            }
        }
    }

    /// What signs the daemon's headers, with the ledger's secret. `None` when it
    /// is time to stop.
    fn signer(&self) -> Option<Signer> {
        let mut told = None;
        for tries in 0.. {
            let secret = postgres::Session::open(&self.config.postgres, &self.consumer.name)
                .and_then(|mut session| ledger::secret(&mut session));
            let error = match secret {
                Ok(secret) => return Some(Signer::new(secret.seal(), &self.consumer.name)),
                Err(error) => error,
            };
            if told.as_ref() != Some(&error) {
                log::warn!(
                    consumer = self.consumer.name.as_str();
                    "failed to read the ledger's secret, and goes on trying: {error}"
                );
            }
            let delay = backoff(&self.config).delay(tries, random::draw());
            let pulse = &self.signs.pulse;
            pulse.connecting(&format!("PostgreSQL: {error}"));
            pulse.beat(delay);
            if self.stop.wait(delay) {
                return None;
            }
            told = Some(error);
        }
        None
    }

    /// One connection after the other, with the same workers.
    fn serve(&self, pool: &mut Pool, signer: &Signer, memory: &mut Memory) -> Result<Next, Fatal> {
        loop {
            memory.epoch.0 += 1;
            match self.connect_and_consume(pool, signer, memory)? {
                Next::Reconnect => {
                    let delay = backoff(&self.config).delay(memory.streak.rounds(), random::draw());
                    if let Some(end) = self.wait_discarding(&pool.outbox, delay) {
                        return Ok(end);
                    }
                }
                end => return Ok(end),
            }
        }
    }

    fn connect_and_consume(
        &self,
        pool: &mut Pool,
        signer: &Signer,
        memory: &mut Memory,
    ) -> Result<Next, Fatal> {
        let session = match self.open(&pool.outbox, memory) {
            Ok(Ok(session)) => session,
            Ok(Err(error)) => return self.not_opened(&error, memory),
            Err(next) => {
                if matches!(next, Next::Reconnect) {
                    memory.streak.no_server("no thread to connect on");
                }
                return Ok(next);
            }
        };
        let is_first = !std::mem::replace(&mut memory.declared, true);
        let server = session.server();
        let since = Instant::now();
        let feed = Feed {
            broker: &self.config.broker,
            backoff: backoff(&self.config),
            consumer: &self.consumer,
            signer,
            epoch: memory.epoch,
            inbox: &mut pool.inbox,
            stopper: &mut pool.stopper,
            unstarted: &pool.unstarted,
            outbox: &pool.outbox,
            panicked: &pool.panicked,
            gate: &pool.gate,
            stop: &self.stop,
            signs: &self.signs,
            shutdown_timeout: self.config.daemon.shutdown_timeout,
        };
        self.signs.meter.is_up(Server::Broker, true);
        if !is_first {
            self.signs.meter.reconnected(Server::Broker);
        }
        let (end, settled) = session.consume(feed);
        self.signs.meter.consuming(false);
        self.signs.meter.in_flight(0);
        self.signs.pulse.flow(0, true);
        memory.streak.stood(since.elapsed(), settled);
        Ok(match end {
            End::Stopped { unfinished: 0 } => Next::Stopped,
            End::Stopped { unfinished } => {
                log::warn!(
                    consumer = self.consumer.name.as_str(), deliveries = unfinished;
                    "shutdown_timeout ran out: what is still in work goes back to the queue"
                );
                Next::Stopped
            }
            End::Panicked => {
                self.signs.meter.panicked();
                self.signs.pulse.connecting("a worker panicked");
                Next::Restart
            }
            End::Unfit(error) if is_first => return Err(Fatal::Config(error.to_string())),
            End::Unfit(error) => {
                let why = error.to_string();
                let alike = memory.streak.failed(server, &why);
                self.tell_lost(&why, alike, memory);
                Next::Reconnect
            }
            End::Lost(cause) => {
                let why = cause.to_string();
                let alike = memory.streak.failed(server, &why);
                self.tell_lost(&why, alike, memory);
                Next::Reconnect
            }
        })
    }

    /// Whether to try again, where there is no connection to consume from.
    fn not_opened(&self, error: &OpenError, memory: &mut Memory) -> Result<Next, Fatal> {
        let why = error.to_string();
        let alike = match error {
            // What changes under a running daemon may change back.
            OpenError::Topology { error, .. } if !memory.declared && error.is_config() => {
                return Err(Fatal::Config(why));
            }
            OpenError::Topology {
                error: TopologyError::Denied { .. },
                ..
            } if !memory.declared => return Err(Fatal::Denied(why)),
            OpenError::Topology { server, .. } | OpenError::Link { server, .. } => {
                memory.streak.failed(*server, &why)
            }
            OpenError::Connect(_) => memory.streak.no_server(&why),
        };
        self.tell_lost(&why, alike, memory);
        Ok(Next::Reconnect)
    }

    /// One line for each kind of trouble, and then ever more rarely.
    fn tell_lost(&self, why: &str, alike: Option<u32>, memory: &Memory) {
        let why = why.replace("\n  hint: ", "; hint: ");
        self.signs.meter.is_up(Server::Broker, false);
        self.signs.pulse.connecting(&why);
        let name = self.consumer.name.as_str();
        let epoch = memory.epoch.0;
        match alike {
            None => log::debug!(consumer = name, epoch = epoch; "lost the broker: {why}"),
            Some(alike) if streak::is_pattern(alike) => log::warn!(
                consumer = name, epoch = epoch, in_a_row = alike;
                "lost the broker: {why} (the last {alike} tries ended like this, and nothing was \
                 settled between them: the waits grow up to reconnect_max)"
            ),
            Some(_) => log::warn!(consumer = name, epoch = epoch; "lost the broker: {why}"),
        }
    }

    /// A new connection that is ready to consume from, or what there is to do
    /// without one. Made on a thread of its own, which is left behind when it
    /// is time to stop: it may hang, and the process ends without it.
    fn open(
        &self,
        outbox: &Receiver<Vec<Settled>>,
        memory: &Memory,
    ) -> Result<Result<Session, OpenError>, Next> {
        let (done, opened) = bounded(1);
        let broker = self.config.broker.clone();
        let consumer = Arc::clone(&self.consumer);
        let stop = self.stop.clone();
        let (first, proves) = (memory.streak.first(), !memory.declared);
        let spawned = std::thread::Builder::new()
            .name(format!("{}-connect", self.consumer.name))
            .spawn(move || {
                let purpose = format!("{} consumer", consumer.name);
                let dial = Dial {
                    broker: &broker,
                    purpose: &purpose,
                    first,
                    stop: Some(&stop),
                };
                // When nobody waits any more, the session ends with the message.
                done.send(Session::open(dial, &consumer, proves)).ok();
            });
        if let Err(error) = spawned {
            log::warn!(consumer = self.consumer.name.as_str(); "failed to start a thread: {error}");
            return Err(Next::Reconnect);
        }
        loop {
            select! {
                recv(opened) -> session => return session.map_err(|_| {
                    log::error!(
                        consumer = self.consumer.name.as_str();
                        "the connecting thread panicked"
                    );
                    Next::Reconnect
                }),
                recv(outbox) -> settled => match settled {
                    Ok(settled) => settled.iter().for_each(|one| self.discard(one)),
                    // The last worker is gone, and only a panic ends one now.
                    Err(_) => return Err(Next::Restart),
                },
                recv(self.stop.as_receiver()) -> _ => return Err(Next::Unconnected),
                default(BEAT) => self.signs.pulse.beat(BEAT),
            }
        }
    }

    /// Waits without a connection. Says what to do when that is not to be
    /// waited for.
    fn wait_discarding(&self, outbox: &Receiver<Vec<Settled>>, delay: Duration) -> Option<Next> {
        let deadline = Instant::now() + delay;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.stop.is_set() {
                return Some(Next::Unconnected);
            }
            if left.is_zero() {
                return None;
            }
            select! {
                recv(outbox) -> settled => match settled {
                    Ok(settled) => settled.iter().for_each(|one| self.discard(one)),
                    Err(_) => return Some(Next::Restart),
                },
                recv(self.stop.as_receiver()) -> _ => return Some(Next::Unconnected),
                default(left.min(BEAT)) => self.signs.pulse.beat(BEAT),
            }
        }
    }

    /// A settlement whose connection is gone: the broker gives the message out
    /// again, and the ledger knows what became of it.
    fn discard(&self, settled: &Settled) {
        self.signs.meter.lost_with(settled.settlement);
        log::debug!(
            consumer = self.consumer.name.as_str(), epoch = settled.ticket.epoch.0,
            tag = settled.ticket.tag;
            "dropped a settlement of a lost connection"
        );
    }
}
