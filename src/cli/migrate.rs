//! `ackonce migrate`: the schema, brought up to this version.

use clap::Args;

use super::{ConfigArgument, Exit, output};
use crate::ledger;
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
