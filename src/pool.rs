//! The worker threads of one consumer, and the thread that renews their claims.
//!
//! A panic ends one worker and is reported; its deliveries are lost to this
//! process, so the caller must give the whole pool up and start anew.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use crossbeam_channel::{Receiver, Sender, bounded};

use crate::backoff::Backoff;
use crate::claim::{Claims, Renewer};
use crate::config::checked;
use crate::flights::Flights;
use crate::gate::Gate;
use crate::handler::rust::Makers;
use crate::handler::{self, Handler};
use crate::ledger::Ledger;
use crate::message::{Delivery, Settled};
use crate::observe::Signs;
use crate::pipeline::{Foreman, Hands, Shared, Turn, Worker};
use crate::random;
use crate::stop::{self, Stopper};

/// The ends of the channels that the broker thread holds.
pub struct Pool {
    /// Deliveries to the workers; drop it to let them end.
    pub inbox: Option<Sender<Delivery>>,
    /// Drop it to have the workers finish what is begun and begin nothing more.
    pub stopper: Option<Stopper>,
    /// What no worker has taken yet.
    pub unstarted: Receiver<Delivery>,
    /// Settlements; disconnected when every worker has ended.
    pub outbox: Receiver<Vec<Settled>>,
    /// Something comes when a worker has panicked.
    pub panicked: Receiver<()>,
    /// Whether the consumer takes messages, as its workers see the world.
    pub gate: Arc<Gate>,
    renewal: Option<(Sender<()>, Renewer)>,
}

impl Pool {
    /// Starts the workers of `consumer`.
    ///
    /// # Errors
    ///
    /// When a thread cannot be started or a configured URL cannot be read.
    pub fn start(
        config: &checked::Config,
        consumer: &Arc<checked::Consumer>,
        makers: &Makers,
        host: &str,
        signs: &Signs,
    ) -> anyhow::Result<Self> {
        let (stopper, stop) = stop::pair();
        let prefetch = usize::from(consumer.prefetch);
        let (inbox, unstarted) = bounded(prefetch);
        // Every delivery of the current connection and of the one before it
        // can be settled without anybody waiting.
        let (settle, outbox) = bounded(prefetch * 2);
        let (panic, panicked) = bounded(consumer.workers);
        let shared = Shared {
            inbox: unstarted.clone(),
            outbox: settle,
            flights: Arc::new(Flights::default()),
            gate: Arc::new(Gate::default()),
            suspects: Arc::default(),
            contention: Arc::default(),
            turn: Turn::default(),
            busy: Arc::default(),
            stop,
            consumer: Arc::clone(consumer),
            makers: makers.clone(),
            backoff: Backoff::new(config.daemon.reconnect_min, config.daemon.reconnect_max),
            shutdown_timeout: config.daemon.shutdown_timeout,
            signs: signs.clone(),
        };
        // The gate of these workers is open, whatever the last one's was.
        signs.meter.resumed();
        signs.pulse.resumed();
        let claims = claims(config, consumer, signs)?;
        let renewal = renewal(config, consumer, &claims)?;
        let owner = random::draw();
        let ledger =
            |number| Ledger::new(config.postgres.clone(), &consumer.name, host, number, owner);
        start_threads(&shared, ledger, claims, &panic)?;
        Ok(Self {
            gate: shared.gate,
            inbox: Some(inbox),
            stopper: Some(stopper),
            unstarted,
            outbox,
            panicked,
            renewal,
        })
    }

    /// Ends the workers, waiting at most `within` for what they have begun,
    /// then the renewal of their claims. Settlements are dropped: the caller
    /// has taken what could still be told.
    pub fn stop(self, within: Duration) {
        drop((self.stopper, self.inbox));
        let deadline = Instant::now() + within;
        while self.outbox.recv_deadline(deadline).is_ok() {}
        if let Some((stop, renewer)) = self.renewal {
            drop(stop);
            renewer.join();
        }
    }
}

fn claims(
    config: &checked::Config,
    consumer: &checked::Consumer,
    signs: &Signs,
) -> anyhow::Result<Vec<Claims>> {
    let Some(redis) = &config.redis else {
        return Ok(Vec::new());
    };
    Claims::for_workers(
        consumer.workers,
        redis,
        consumer,
        config.ledger.retention,
        &signs.meter,
    )
}

fn renewal(
    config: &checked::Config,
    consumer: &checked::Consumer,
    claims: &[Claims],
) -> anyhow::Result<Option<(Sender<()>, Renewer)>> {
    let Some(redis) = &config.redis else {
        return Ok(None);
    };
    let (stop, stopped) = bounded(0);
    let renewer = Renewer::start(redis, &consumer.claim, &consumer.name, claims, stopped)?;
    Ok(Some((stop, renewer)))
}

/// A thread for each worker; for those whose handler is keyed, one foreman with
/// a crew in their place.
fn start_threads(
    shared: &Shared,
    ledger: impl Fn(usize) -> Ledger,
    claims: Vec<Claims>,
    panic: &Sender<()>,
) -> anyhow::Result<()> {
    let consumer = &shared.consumer;
    let mut claims = claims.into_iter();
    let mut keyed = Vec::new();
    for number in 1..=consumer.workers {
        let handler = match handler::build(consumer, &shared.makers)? {
            Handler::Transactional(handler) => handler,
            Handler::Keyed(handler) => {
                keyed.push(handler);
                continue;
            }
        };
        let hands = Hands::Own(handler);
        let worker = Worker::new(shared.clone(), ledger(number), claims.next(), hands);
        let number = number.to_string();
        spawn(&consumer.name, &number, || worker.run(), panic.clone())?;
    }
    if !keyed.is_empty() {
        let ledgers = [ledger(0), ledger(0)];
        let foreman = Foreman::new(shared.clone(), ledgers, claims.next(), keyed, panic)?;
        spawn(&consumer.name, "foreman", || foreman.run(), panic.clone())?;
    }
    Ok(())
}

fn spawn(
    consumer: &str,
    number: &str,
    run: impl FnOnce() + Send + 'static,
    panic: Sender<()>,
) -> anyhow::Result<()> {
    let (name, worker) = (consumer.to_owned(), number.to_owned());
    std::thread::Builder::new()
        .name(format!("{consumer}-{number}"))
        .spawn(move || {
            if catch_unwind(AssertUnwindSafe(run)).is_err() {
                log::error!(consumer = name.as_str(), worker = worker.as_str(); "a worker panicked");
                panic.try_send(()).ok();
            }
        })
        .map(drop)
        .with_context(|| format!("failed to start worker {number} of consumer {consumer}"))
}
