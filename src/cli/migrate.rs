//! `ackonce migrate`: the schema, brought up to this version.

use clap::Args;

use super::{ConfigArgument, Exit, output};
use crate::config::Config;
use crate::ledger::{self, Schema};
use crate::postgres::{Error, Session};

/// Arguments of `ackonce migrate`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    config: ConfigArgument,
}

/// Applies the migrations that are missing. Safe to run twice, and while
/// daemons run.
///
/// # Errors
///
/// The exit status.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let config = arguments.config.load()?;
    let mut session = Session::open(&config.postgres, "migrate").map_err(|e| report(&e))?;
    ledger::migrate(&mut session).map_err(|e| report(&e))?;
    output("the schema ackonce is up to date\n");
    Ok(Exit::Success)
}

/// Connects to a ledger whose schema is the one this program needs, or says
/// why not.
pub(super) fn open_current(config: &Config, purpose: &str) -> Result<Session, Exit> {
    let mut session = Session::open(&config.postgres, purpose).map_err(|e| report(&e))?;
    match ledger::schema(&mut session).map_err(|e| report(&e))? {
        Schema::Current => Ok(session),
        Schema::Behind(count) => {
            eprintln!(
                "ackonce: the schema ackonce lacks {count} migration(s) of this version\n  hint: \
                 run `ackonce migrate`"
            );
            Err(Exit::Config)
        }
    }
}

/// Says what PostgreSQL said, and with which status to leave.
pub(super) fn report(error: &Error) -> Exit {
    eprintln!("ackonce: {error}");
    match error {
        Error::Lost(_) | Error::Unreachable { .. } => Exit::Unreachable,
        Error::Refused(failure) => match failure.code.as_deref() {
            // invalid authorization, insufficient privilege
            Some(code) if code.starts_with("28") || code == "42501" => Exit::Denied,
            Some(_) => Exit::Unreachable,
            None => Exit::Config,
        },
    }
}
