//! The command line: arguments in, exit status out. One file per subcommand,
//! none with logic of its own.

pub mod check;
pub mod completions;
pub mod dead;
mod desk;
pub mod filters;
pub mod ledger;
pub mod man;
pub mod migrate;
mod pace;
pub mod publish;
pub mod replay;
pub mod run;
mod signals;
pub mod status;
pub mod terminal;
pub mod why;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{self, Config};

/// Exit statuses, those above 63 as in sysexits.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 0: done.
    Success,
    /// 1: done in part.
    Partial,
    /// 2: the arguments make no sense.
    Usage,
    /// 69: a server cannot be reached.
    Unreachable,
    /// 71: the system does not give what a process needs.
    System,
    /// 75: somebody else is at it: try again later.
    TryAgain,
    /// 77: a server does not allow it.
    Denied,
    /// 78: the configuration, or what it describes, is not right.
    Config,
    /// 130: a second signal cut the stop short.
    Interrupted,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Success => 0,
            Exit::Partial => 1,
            Exit::Usage => 2,
            Exit::Unreachable => 69,
            Exit::System => 71,
            Exit::TryAgain => 75,
            Exit::Denied => 77,
            Exit::Config => 78,
            Exit::Interrupted => 130,
        })
    }
}

/// Applies RabbitMQ messages once: an idempotent consumer worker daemon.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, after_help = EXIT_STATUS)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_STATUS: &str = "Exit status: 0 done, 1 done in part, 2 bad arguments, 69 a server \
cannot be reached, 71 system error, 75 try again later, 77 a server denies it, 78 bad \
configuration, 130 interrupted.";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Consume every queue of the configuration until told to stop
    Run(run::Arguments),
    /// Tell what a running daemon is doing
    Status(status::Arguments),
    /// Look whether the configuration and the servers are what the daemon needs
    Check(check::Arguments),
    /// Bring the schema `ackonce` in PostgreSQL up to this version
    Migrate(migrate::Arguments),
    /// Look after the ledger
    Ledger(ledger::Arguments),
    /// Tell what became of one message
    Why(why::Arguments),
    /// Publish dead letters again, each confirmed before it leaves their queue
    Replay(replay::Arguments),
    /// Look at dead letters, and clear them away
    Dead(dead::Arguments),
    /// Publish messages, each confirmed by the broker: for tests and repairs
    Publish(publish::Arguments),
    /// Print completions for a shell
    Completions(completions::Arguments),
    /// Print the manual's pages
    #[command(hide = true)]
    Man(man::Arguments),
}

/// Where the configuration is.
#[derive(Debug, Clone, Args)]
pub struct ConfigArgument {
    /// Configuration file
    #[arg(
        short,
        long,
        value_name = "FILE",
        default_value = "/etc/ackonce/config.toml"
    )]
    pub config: PathBuf,
}

impl ConfigArgument {
    fn load(&self) -> Result<Config, Exit> {
        config::load(&self.config).map_err(|error| {
            eprintln!("{error}");
            Exit::Config
        })
    }
}

/// Writes data to standard output. A reader that has gone away, such as
/// `head`, is no error.
fn output(text: &str) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush())
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        log::error!("failed to write to standard output: {error}");
    }
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> Exit {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, and are no mistake.
            let exit = if error.use_stderr() {
                Exit::Usage
            } else {
                Exit::Success
            };
            error.print().ok();
            return exit;
        }
    };
    crate::observe::logging::start(config::logs_to_journal());
    let result = match cli.command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Migrate(arguments) => migrate::run(&arguments),
        Command::Ledger(arguments) => ledger::run(&arguments),
        Command::Why(arguments) => why::run(&arguments),
        Command::Replay(arguments) => replay::run(&arguments),
        Command::Dead(arguments) => dead::run(&arguments),
        Command::Publish(arguments) => publish::run(&arguments),
        Command::Completions(arguments) => completions::run(&arguments),
        Command::Man(arguments) => man::run(&arguments),
    };
    result.unwrap_or_else(|exit| exit)
}
