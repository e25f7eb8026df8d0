//! `ackonce dead`: looking at dead letters, and clearing them away.

mod drop;
mod export;
mod import;
mod list;
mod show;

use clap::{Args, Subcommand};

use super::Exit;

/// Arguments of `ackonce dead`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List dead letters, one by one or in groups
    List(list::Arguments),
    /// Show everything about one
    Show(show::Arguments),
    /// Write dead letters with all they carry as lines of JSON
    Export(export::Arguments),
    /// Put exported letters back into the dead-letter queue
    Import(import::Arguments),
    /// Take dead letters out of the queue for good
    Drop(drop::Arguments),
}

/// Does what was asked for.
///
/// # Errors
///
/// The exit status.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    match &arguments.command {
        Command::List(arguments) => list::run(arguments),
        Command::Show(arguments) => show::run(arguments),
        Command::Export(arguments) => export::run(arguments),
        Command::Import(arguments) => import::run(arguments),
        Command::Drop(arguments) => drop::run(arguments),
    }
}
