//! `ackonce run`: the daemon in the foreground.

use std::path::PathBuf;

use clap::Args;
use crossbeam_channel::{Receiver, bounded, select};

use super::{ConfigArgument, Exit, signals};
use crate::config::{self, Config};
use crate::daemon::{self, Fatal, Reloads};
use crate::handler::command;
use crate::handler::rust::Makers;
use crate::observe::logging;
use crate::stop::{self, Stopper};

/// Arguments of `ackonce run`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    config: ConfigArgument,
}

/// Runs until SIGTERM or SIGINT, or until the daemon cannot go on. A second
/// signal ends the process at once. SIGHUP has it read its configuration again.
///
/// # Errors
///
/// The exit status.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let config = arguments.config.load()?;
    logging::take_panics();
    run_daemon(config, arguments.config.config.clone(), Makers::default())
}

/// As [`run`], with the configuration at `path`, which is read already, and the
/// handlers of the program.
///
/// # Errors
///
/// The exit status.
pub fn run_daemon(config: Config, path: PathBuf, makers: Makers) -> Result<Exit, Exit> {
    logging::set_format(config.log_format);
    logging::detach().map_err(|error| {
        log::error!("failed to start a thread for the log: {error}");
        Exit::System
    })?;
    let ended = run_detached(config, path, makers);
    logging::flush();
    ended
}

fn run_detached(config: Config, path: PathBuf, makers: Makers) -> Result<Exit, Exit> {
    let (stops, wishes) = signals::stops_and_reloads().map_err(|error| {
        log::error!("failed to handle signals: {error}");
        Exit::System
    })?;
    let reloads = Reloads::new(wishes, move || config::load(&path));
    let (stopper, stop) = stop::pair();
    let (done, ended) = bounded(1);
    std::thread::Builder::new()
        .name("daemon".to_owned())
        .spawn(move || {
            done.send(daemon::run(config, &makers, &stop, &reloads))
                .ok();
        })
        .map_err(|error| {
            log::error!("failed to start a thread: {error}");
            Exit::System
        })?;
    let exit = until_the_end(stopper, &ended, &stops);
    // Whatever the handlers' programs still do, nobody waits for it.
    command::kill_all();
    exit
}

fn until_the_end(
    stopper: Stopper,
    ended: &Receiver<Result<(), Fatal>>,
    stops: &Receiver<()>,
) -> Result<Exit, Exit> {
    let mut stopper = Some(stopper);
    loop {
        select! {
            recv(ended) -> result => return match result {
                Ok(Ok(())) => Ok(Exit::Success),
                Ok(Err(fatal)) => Err(report(&fatal)),
                Err(_) => {
                    log::error!("the daemon panicked");
                    Err(Exit::System)
                }
            },
            recv(stops) -> _ => match stopper.take() {
                Some(stopper) => {
                    log::info!("told to stop: finishing what is in flight");
                    drop(stopper);
                }
                None => {
                    log::warn!("told to stop again: leaving at once");
                    return Err(Exit::Interrupted);
                }
            },
        }
    }
}

fn report(fatal: &Fatal) -> Exit {
    log::error!("{fatal}");
    match fatal {
        Fatal::Config(_) => Exit::Config,
        Fatal::Denied(_) => Exit::Denied,
        Fatal::System(_) => Exit::System,
    }
}
