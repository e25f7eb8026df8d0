//! The daemon: schema, consumers, reconnecting, and the stop.
//!
//! One thread per consumer owns its broker connection. It never blocks where
//! it could not be stopped: opening a connection is left to a thread of its
//! own.

mod fleet;
mod reload;
mod runner;
mod streak;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use crossbeam_channel::{bounded, select};

use crate::backoff::Backoff;
use crate::config::{Config, checked, defaults};
use crate::handler::{self, Handler, rust::Makers};
use crate::ledger::{self, Schema};
use crate::observe::Signs;
use crate::observe::admin::{self, Shown};
use crate::observe::health::Health;
use crate::observe::metrics::{Metrics, Server};
use crate::observe::systemd::Systemd;
use crate::postgres::{self, Session};
use crate::random;
use crate::stop::Stop;
use fleet::Fleet;

pub use reload::Reloads;

/// Longest wait for PostgreSQL without a sign of life.
const BEAT: Duration = Duration::from_secs(1);

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
/// program's own handlers. Goes over to a new configuration at each of
/// `reloads`.
///
/// # Errors
///
/// [`Fatal`], after the other consumers have been stopped too.
pub fn run(config: Config, makers: &Makers, stop: &Stop, reloads: &Reloads) -> Result<(), Fatal> {
    let mut handlers = Vec::new();
    for consumer in &config.consumers {
        let handler = handler::build(consumer, makers);
        handlers.push(handler.map_err(|e| Fatal::Config(e.to_string()))?);
    }
    let shown = observe(&config)?;
    let consumers = config.consumers.iter().zip(&handlers);
    let waiting: Vec<Signs> = consumers
        .map(|(consumer, handler)| show(&shown, &config, consumer, handler))
        .collect();
    drop(handlers);
    let systemd = Systemd::start(&shown.health, stop);
    if !prepare_schema(&config, &waiting, stop)? {
        return Ok(());
    }
    Fleet::new(config, makers, host(), shown, systemd).run(stop, reloads)
}

/// Metrics and health, shown at the admin address if there is one.
fn observe(config: &checked::Config) -> Result<Shown, Fatal> {
    let stall_after = config
        .admin
        .map_or(defaults::STALL_AFTER.default, |a| a.stall_after);
    let shown = Shown {
        metrics: Arc::new(Metrics::new().context("failed to make the metrics")?),
        health: Arc::new(Health::new(stall_after)),
        since: Instant::now(),
    };
    if let Some(admin) = config.admin {
        let address = admin::start(admin.listen, shown.clone()).map_err(|error| {
            Fatal::Config(format!(
                "failed to listen on the admin address {}: {error}\n  hint: give each daemon of a \
                 host its own `listen` in [admin], or enabled = false",
                admin.listen
            ))
        })?;
        log::info!(address:% = address; "serving metrics and health");
    }
    Ok(shown)
}

/// Shows a consumer, of which nothing is known yet but what it is to run.
fn show(
    shown: &Shown,
    config: &checked::Config,
    consumer: &checked::Consumer,
    handler: &Handler,
) -> Signs {
    let signs = shown.signs(&consumer.name);
    signs.pulse.may_take(consumer.handler.longest_call());
    if config.redis.is_none() {
        shown.metrics.without(&consumer.name, Server::Redis);
    }
    let queue = consumer.topology.queue.as_str();
    let facts = [queue, handler.kind(), handler.effect().as_str()];
    shown.metrics.describe(&consumer.name, facts);
    signs
}

/// Host name and process id: who wrote a line of the failure journal.
fn host() -> String {
    let name = nix::unistd::gethostname()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    format!("{name}/{}", std::process::id())
}

/// Waits for PostgreSQL and sees to the schema; meanwhile `waiting` shows that.
/// False when it is time to stop.
fn prepare_schema(config: &checked::Config, waiting: &[Signs], stop: &Stop) -> Result<bool, Fatal> {
    let backoff = backoff(config);
    let mut tries = 0;
    let mut told = None;
    loop {
        let Some(tried) = try_schema_unless(config, waiting, stop)? else {
            return Ok(false);
        };
        match tried {
            Ok(Schema::Current) => return Ok(true),
            Ok(Schema::Behind(count)) => return Err(Fatal::Config(behind(count))),
            Err(error) => {
                if told.as_ref() != Some(&error) {
                    log::warn!("waiting for PostgreSQL: {error}");
                }
                let delay = backoff.delay(tries, random::draw());
                for signs in waiting {
                    signs.pulse.connecting(&format!("PostgreSQL: {error}"));
                    signs.pulse.beat(delay);
                }
                if stop.wait(delay) {
                    return Ok(false);
                }
                tries += 1;
                told = Some(error);
            }
        }
    }
}

/// On a thread of its own, which is left behind when it is time to stop:
/// PostgreSQL may hang. `None` then.
fn try_schema_unless(
    config: &checked::Config,
    waiting: &[Signs],
    stop: &Stop,
) -> anyhow::Result<Option<Result<Schema, postgres::Error>>> {
    let (done, tried) = bounded(1);
    let config = config.clone();
    std::thread::Builder::new()
        .name("schema".to_owned())
        .spawn(move || {
            // When nobody waits any more, the process is about to end.
            done.send(try_schema(&config)).ok();
        })
        .context("failed to start a thread")?;
    loop {
        select! {
            recv(tried) -> result => {
                return result.map(Some).context("the schema's thread panicked");
            }
            recv(stop.as_receiver()) -> _ => return Ok(None),
            default(BEAT) => waiting.iter().for_each(|signs| signs.pulse.beat(BEAT)),
        }
    }
}

fn try_schema(config: &checked::Config) -> Result<Schema, postgres::Error> {
    let mut session = Session::open(&config.postgres, "schema")?;
    let schema = ledger::schema(&mut session)?;
    for risk in session.risks()? {
        log::warn!("{risk}");
    }
    if schema == Schema::Current || !config.postgres.auto_migrate {
        return Ok(schema);
    }
    ledger::migrate(&mut session)?;
    log::info!("migrated the schema ackonce");
    Ok(Schema::Current)
}

fn behind(count: usize) -> String {
    format!(
        "the schema ackonce lacks {count} migration(s) of this version\n  hint: run `ackonce \
         migrate` with a role that may create tables, or set auto_migrate"
    )
}

fn backoff(config: &checked::Config) -> Backoff {
    Backoff::new(config.daemon.reconnect_min, config.daemon.reconnect_max)
}
