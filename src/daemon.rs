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
use std::time::Instant;

use anyhow::Context;
use crossbeam_channel::{bounded, select};

use crate::backoff::Backoff;
use crate::config::{Config, checked, defaults};
use crate::handler::{self, rust::Makers};
use crate::ledger::{self, Schema};
use crate::observe::admin::{self, Shown};
use crate::observe::health::Health;
use crate::observe::metrics::Metrics;
use crate::observe::systemd::Systemd;
use crate::postgres::{self, Session};
use crate::random;
use crate::stop::Stop;
use fleet::Fleet;

pub use reload::Reloads;

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
    for consumer in &config.consumers {
        handler::build(consumer, makers).map_err(|e| Fatal::Config(e.to_string()))?;
    }
    let shown = observe(&config)?;
    let systemd = Systemd::start(&shown.health, stop);
    if !prepare_schema(&config, stop)? {
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
        let Some(tried) = try_schema_unless(config, stop)? else {
            return Ok(false);
        };
        match tried {
            Ok(Schema::Current) => return Ok(true),
            Ok(Schema::Behind(count)) => return Err(Fatal::Config(behind(count))),
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

/// On a thread of its own, which is left behind when it is time to stop:
/// PostgreSQL may hang. `None` then.
fn try_schema_unless(
    config: &checked::Config,
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
    select! {
        recv(tried) -> result => result.map(Some).context("the schema's thread panicked"),
        recv(stop.as_receiver()) -> _ => Ok(None),
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
