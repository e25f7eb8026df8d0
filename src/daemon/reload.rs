//! Looking at a new configuration before it takes the place of the old one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use anyhow::Context;
use crossbeam_channel::{Receiver, bounded};

use super::try_schema;
use crate::config::{Config, ConfigError};
use crate::handler::{self, rust::Makers};
use crate::inspect::{self, Severity};
use crate::ledger::Schema;

/// How the configuration is read.
type Load = dyn Fn() -> Result<Config, ConfigError> + Send + Sync;

/// Wishes to read the configuration again, and how that is done.
pub struct Reloads {
    pub(super) wishes: Receiver<()>,
    load: Arc<Load>,
}

impl Reloads {
    /// One reload for each of `wishes`, but one at a time.
    pub fn new(
        wishes: Receiver<()>,
        load: impl Fn() -> Result<Config, ConfigError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            wishes,
            load: Arc::new(load),
        }
    }
}

/// Reads the configuration anew and looks at everything that `ackonce check`
/// looks at, if it differs from `old` in more than [`super::Fleet`] would
/// notice. On a thread of its own: servers may be slow. Comes out with the new
/// configuration, or with what is wrong with it.
///
/// # Errors
///
/// When there is no thread to be had.
pub(super) fn check(
    reloads: &Reloads,
    old: &Config,
    makers: &Makers,
) -> anyhow::Result<Receiver<Result<Config, String>>> {
    let (done, checked) = bounded(1);
    let (load, old, makers) = (Arc::clone(&reloads.load), old.clone(), makers.clone());
    std::thread::Builder::new()
        .name("reload".to_owned())
        .spawn(move || {
            let look = || {
                let new = load().map_err(|error| error.to_string())?;
                look_at(&new, &old, &makers)?;
                Ok(new)
            };
            if let Ok(result) = catch_unwind(AssertUnwindSafe(look)) {
                // Nobody waits any more when the daemon stops.
                done.send(result).ok();
            }
        })
        .context("failed to start a thread")?;
    Ok(checked)
}

fn look_at(new: &Config, old: &Config, makers: &Makers) -> Result<(), String> {
    for consumer in &new.consumers {
        handler::build(consumer, makers).map_err(|error| error.to_string())?;
    }
    if have_common_ground(new, old) && new.consumers == old.consumers {
        return Ok(());
    }
    if new.postgres != old.postgres {
        match try_schema(new) {
            Ok(Schema::Current) => {}
            Ok(Schema::Behind(count)) => return Err(super::behind(count)),
            Err(error) => return Err(error.to_string()),
        }
    }
    let findings = inspect::servers(new);
    let bad = findings.iter().filter(|f| f.severity > Severity::Warning);
    let bad: Vec<String> = bad.map(|f| format!("{}: {}", f.subject, f.text)).collect();
    match bad.is_empty() {
        true => Ok(()),
        false => Err(bad.join("\n")),
    }
}

/// Whether everything that is not a single consumer's is the same.
pub(super) fn have_common_ground(a: &Config, b: &Config) -> bool {
    a.broker == b.broker
        && a.redis == b.redis
        && a.postgres == b.postgres
        && a.ledger == b.ledger
        && a.daemon == b.daemon
}
