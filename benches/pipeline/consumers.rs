//! The consumers that the daemon is measured against: the bare client, the
//! usual way of claim, transaction and ack for each message, and the floor.

mod bare;
mod floor;
mod reference;

use std::ffi::OsString;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use amiquip::ConsumerMessage;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use crossbeam_channel::{Receiver, RecvTimeoutError};

use crate::stage::PATIENCE;
use crate::subject::{Kind, Settings};

/// A subject that has been told to stop does so when nothing came for so long.
const QUIET: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    BareOneByOne,
    BareCoalesced,
    Floor,
    Reference,
    ReferenceFused,
}

/// Arguments of this program as a subject.
#[derive(Debug, Args)]
pub struct Arguments {
    name: Name,
    amqp: String,
    redis: String,
    postgres: String,
    queue: String,
    key_prefix: String,
    prefetch: u16,
}

/// The arguments with which [`run`] is what `kind` says.
pub fn arguments(kind: &Kind, settings: &Settings) -> Vec<OsString> {
    [
        &kind.to_string(),
        &settings.amqp,
        &settings.redis,
        &settings.postgres,
        &settings.queue,
        &settings.key_prefix,
        &settings.prefetch.to_string(),
    ]
    .map(OsString::from)
    .into()
}

/// Consumes until standard input is closed and everything is acked.
pub fn run(arguments: &Arguments) -> Result<()> {
    let stop = Stop::when_stdin_closes();
    match arguments.name {
        Name::BareOneByOne => bare::run(arguments, &stop, 1),
        Name::BareCoalesced => bare::run(arguments, &stop, 256),
        Name::Floor => floor::run(arguments, &stop),
        Name::Reference => reference::run(arguments, &stop, false),
        Name::ReferenceFused => reference::run(arguments, &stop, true),
    }
}

/// Whether to end.
#[derive(Clone)]
struct Stop(Arc<AtomicBool>);

impl Stop {
    fn when_stdin_closes() -> Self {
        let stop = Self(Arc::default());
        let set = stop.clone();
        std::thread::spawn(move || {
            // An error is an end too.
            drop(std::io::stdin().read_to_end(&mut Vec::new()));
            set.0.store(true, Ordering::Relaxed);
        });
        stop
    }
}

/// The next delivery; `None` when it is time to end.
fn next(deliveries: &Receiver<ConsumerMessage>, stop: &Stop) -> Result<Option<amiquip::Delivery>> {
    loop {
        match deliveries.recv_timeout(QUIET) {
            Ok(message) => return delivery(message).map(Some),
            Err(RecvTimeoutError::Timeout) if stop.0.load(Ordering::Relaxed) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {}
            Err(error) => return Err(error).context("the connection was lost"),
        }
    }
}

/// Cancels the consumer and waits until the broker says that it has: dropped
/// while something may still come, it could take the connection with it.
fn cancel(consumer: amiquip::Consumer<'_>) -> Result<()> {
    consumer.cancel()?;
    loop {
        match consumer.receiver().recv_timeout(PATIENCE)? {
            ConsumerMessage::ClientCancelled => return Ok(()),
            other => drop(delivery(other)?),
        }
    }
}

fn delivery(message: ConsumerMessage) -> Result<amiquip::Delivery> {
    match message {
        ConsumerMessage::Delivery(delivery) => Ok(delivery),
        other => bail!("the consumer ended: {other:?}"),
    }
}
