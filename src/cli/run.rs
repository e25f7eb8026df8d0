//! `ackonce run`: the daemon in the foreground.

use clap::Args;
use crossbeam_channel::{Receiver, bounded, select};

use super::{ConfigArgument, Exit};
use crate::config::Config;
use crate::daemon::{self, Fatal};
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
/// signal ends the process at once.
///
/// # Errors
///
/// The exit status.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    run_daemon(arguments.config.load()?, Makers::default())
}

/// As [`run`], with the handlers of the program.
///
/// # Errors
///
/// The exit status.
pub fn run_daemon(config: Config, makers: Makers) -> Result<Exit, Exit> {
    logging::set_format(config.log_format);
    let (signal, signals) = bounded(2);
    ctrlc::set_handler(move || {
        signal.try_send(()).ok();
    })
    .map_err(|error| {
        log::error!("failed to handle signals: {error}");
        Exit::System
    })?;
    let (stopper, stop) = stop::pair();
    let (done, ended) = bounded(1);
    std::thread::Builder::new()
        .name("daemon".to_owned())
        .spawn(move || {
            done.send(daemon::run(&config, &makers, &stop)).ok();
        })
        .map_err(|error| {
            log::error!("failed to start a thread: {error}");
            Exit::System
        })?;
    let exit = until_the_end(stopper, &ended, &signals);
    // Whatever the handlers' programs still do, nobody waits for it.
    command::kill_all();
    exit
}

fn until_the_end(
    stopper: Stopper,
    ended: &Receiver<Result<(), Fatal>>,
    signals: &Receiver<()>,
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
            recv(signals) -> _ => match stopper.take() {
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
