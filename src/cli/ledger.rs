//! `ackonce ledger`: looking after the ledger by hand.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::migrate::{open_current, report};
use super::{ConfigArgument, Exit, output, terminal};
use crate::config::{Config, format_duration, read_duration};
use crate::ledger;
use crate::ledger::prune::Sweeper;
use crate::postgres::Session;
use crate::prune::{self, Round};
use crate::stop::Stop;

/// Longest `--older-than`: a hundred years.
const OLDER_THAN_MAX: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);

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
    /// or a failover that lost commits, while no daemon runs
    RenewId {
        #[command(flatten)]
        config: ConfigArgument,
    },
    /// Delete rows older than the retention now, as a daemon does in time: of
    /// the ledger, the failure journal, the crash marks and the claims of keyed handlers, in
    /// small batches
    Prune(PruneArguments),
}

/// Arguments of `ackonce ledger prune`.
#[derive(Debug, Args)]
#[command(
    after_help = "A duplicate of a message whose ledger row is deleted is a new message. \
What is deleted before the retention's end is forgotten in Redis too, which needs the role that \
owns the schema. The reason of a dead letter that was never applied is kept ten times as long as the rest. Ctrl-C \
stops between two batches.\n\nExit status: 0 done, 1 stopped before the end, 2 bad arguments, \
69 PostgreSQL cannot be reached, 75 somebody else prunes, 77 denied, 78 bad configuration."
)]
struct PruneArguments {
    #[command(flatten)]
    config: ConfigArgument,

    /// Only count the rows
    #[arg(long)]
    dry_run: bool,

    /// Delete rows older than this instead of `[ledger] retention`, such as
    /// 12h or 90d
    #[arg(long, value_name = "DURATION", value_parser = older_than)]
    older_than: Option<Duration>,

    /// Do so even where that is shorter than the retention, and ends the
    /// promise for the messages in between
    #[arg(long)]
    yes: bool,
}

fn older_than(text: &str) -> Result<Duration, String> {
    match read_duration(text)? {
        long if long > OLDER_THAN_MAX => Err("is longer than 100 years".to_owned()),
        duration => Ok(duration),
    }
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
            let Some(id) = id else {
                eprintln!(
                    "ackonce: a daemon or a command of ackonce is connected to this database, and \
                     would go on with the old id\n  hint: stop every daemon first, also on other \
                     hosts, and start them afterwards"
                );
                return Err(Exit::TryAgain);
            };
            output(&format!("the ledger's id is now {id}\n"));
            Ok(Exit::Success)
        }
        Command::Prune(arguments) => prune(arguments),
    }
}

fn prune(arguments: &PruneArguments) -> Result<Exit, Exit> {
    let config = arguments.config.load()?;
    let retention = config.ledger.retention;
    let older_than = arguments.older_than.unwrap_or(retention);
    if older_than < retention && !arguments.dry_run && !arguments.yes {
        eprintln!(
            "ackonce: {} is shorter than the retention of {}: duplicates of the messages in \
             between would be applied again\n  hint: look with --dry-run first, then add --yes",
            format_duration(older_than),
            format_duration(retention)
        );
        return Err(Exit::Usage);
    }
    let dry_run = arguments.dry_run;
    terminal::interruptible(move |stop| prune_until(stop, &config, older_than, dry_run))
}

/// Marks in Redis that speak of rows which go before their time count no more.
/// A worker may believe them for [`ledger::MARKS_FRESH`] after this.
fn forget_marks(config: &Config) -> Result<(), Exit> {
    let mut session = Session::open(&config.postgres, "prune").map_err(|e| report(&e))?;
    ledger::forget_marks(&mut session).map_err(|e| report(&e))
}

fn prune_until(
    stop: &Stop,
    config: &Config,
    older_than: Duration,
    dry_run: bool,
) -> Result<Exit, Exit> {
    let retention = config.ledger.retention;
    let mut sweeper = Sweeper::new(open_current(config, "prune")?);
    let uncovered = sweeper.uncovered(retention).map_err(|e| report(&e))?;
    for letters in &uncovered {
        let text = prune::warning(letters, retention);
        eprintln!("ackonce: warning: consumer {}: {text}", letters.consumer);
    }
    let act = match dry_run {
        true => prune::count,
        false => prune::delete,
    };
    let early = older_than < retention && !dry_run;
    // Before, so that nothing is deleted by who may not do this afterwards.
    if early {
        forget_marks(config)?;
    }
    let round = act(&mut sweeper, &config.ledger, older_than, stop).map_err(|e| report(&e))?;
    if early {
        forget_marks(config)?;
        std::thread::sleep(ledger::MARKS_FRESH);
    }
    let (counts, exit) = match round {
        Round::Through(counts) => (counts, Exit::Success),
        Round::Stopped(counts) => (counts, Exit::Partial),
        Round::Busy | Round::Early => {
            eprintln!("ackonce: somebody else prunes this ledger\n  hint: try again in a moment");
            return Err(Exit::TryAgain);
        }
    };
    let verb = match dry_run {
        true => "would delete",
        false => "deleted",
    };
    output(&format!(
        "{verb} what is older than {}:\nledger          {}\nfailure journal {}\ncrash marks     {}\nclaims          {}\n",
        format_duration(older_than),
        counts.ledger,
        counts.journal,
        counts.suspects,
        counts.claims
    ));
    if exit == Exit::Partial {
        eprintln!("ackonce: stopped before the end");
    }
    Ok(exit)
}
