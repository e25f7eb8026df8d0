//! `ackonce ledger`: looking after the ledger by hand.

use clap::{Args, Subcommand};

use super::migrate::report;
use super::{ConfigArgument, Exit, output};
use crate::ledger;
use crate::postgres::Session;

/// Arguments of `ackonce ledger`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Give the ledger a new random id, so that marks in Redis that speak of
    /// rows it has lost count no more: to be run after a restore from a backup,
    /// before a daemon is started
    RenewId {
        #[command(flatten)]
        config: ConfigArgument,
    },
}

/// Does what was asked for.
///
/// # Errors
///
/// The exit status.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    match &arguments.command {
        Command::RenewId { config } => {
            let config = config.load()?;
            let mut session = Session::open(&config.postgres, "ledger").map_err(|e| report(&e))?;
            let id = ledger::renew_id(&mut session).map_err(|e| report(&e))?;
            output(&format!("the ledger's id is now {id}\n"));
            Ok(Exit::Success)
        }
    }
}
