//! What a consumer needs on the broker: work queue, exchanges and bindings,
//! dead-letter exchange and queue, one queue for each delay before a retry.
//! Made, compared or only looked for, as the configuration says; and the proof
//! that a dead letter has somewhere to go.
//!
//! Declaring what exists with the same arguments changes nothing; with others
//! it is an error of the broker's that names the argument.

mod error;
mod parts;
mod probe;

use std::time::Duration;

use amiquip::Channel;

use super::connection::Link;
use crate::config::checked::{Broker, Consumer, DeadLetters, TopologyMode};
pub use error::TopologyError;
use parts::Part;
pub use probe::HEADER as PROBE_HEADER;
pub(super) use probe::is_one as is_probe;

/// Everything that comes before consuming: makes what is needed, compares it or
/// looks for it, and then proves that a dead letter has somewhere to go. Each
/// call on the broker may take `within`. Leaves no channel open.
///
/// - `declare` makes everything. The binding of the dead-letter queue that the
///   broker has just confirmed is the proof.
/// - `verify` makes nothing. Queues and exchanges must exist and be as
///   configured. AMQP shows no bindings: those of the work queue stay
///   unproved, that of the dead-letter queue is proved by a probe, for which
///   another connection to `broker` is opened.
/// - `none` makes nothing and compares nothing. What is used must exist, and
///   the probe goes where the daemon will publish dead letters.
///
/// A probe stands behind the dead letters that are there and is counted among
/// them until its turn comes, so it is sent only when `proves`: once in the
/// life of a daemon.
///
/// # Errors
///
/// [`TopologyError`] for the first thing that is not as it must be.
pub fn prepare(
    link: &mut Link,
    broker: &Broker,
    consumer: &Consumer,
    proves: bool,
    within: Duration,
) -> Result<(), TopologyError> {
    match consumer.topology.mode {
        TopologyMode::Declare => declare_all(link, parts::all(consumer), within),
        TopologyMode::Verify => {
            for part in parts::all(consumer) {
                find(link, &part, within)?;
                compare(link, &part, within)?;
            }
            prove(link, broker, consumer, proves, within)
        }
        TopologyMode::None => {
            for part in parts::used(consumer) {
                find(link, &part, within)?;
            }
            prove(link, broker, consumer, proves, within)
        }
    }
}

fn prove(
    link: &Link,
    broker: &Broker,
    consumer: &Consumer,
    proves: bool,
    within: Duration,
) -> Result<(), TopologyError> {
    match proves {
        true => probe::dead_letters(broker, link.server(), consumer, within),
        false => Ok(()),
    }
}

/// Makes everything again, for when a queue, an exchange or a binding was
/// deleted under a running daemon. Makes nothing unless the mode is `declare`.
///
/// # Errors
///
/// [`TopologyError`] for the first thing that cannot be declared.
pub fn declare_again(
    link: &mut Link,
    consumer: &Consumer,
    within: Duration,
) -> Result<(), TopologyError> {
    match consumer.topology.mode {
        TopologyMode::Declare => declare_all(link, parts::all(consumer), within),
        TopologyMode::Verify | TopologyMode::None => Ok(()),
    }
}

/// What a look at the topology found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inspection {
    /// What does not exist yet, and will be made.
    pub missing: Vec<String>,
    /// What only a start of the daemon can tell.
    pub unproved: Option<String>,
}

/// Compares what exists with the configuration. Makes nothing and sends
/// nothing: where only a probe could prove that dead letters have somewhere to
/// go, it says that this is unproved.
///
/// # Errors
///
/// [`TopologyError`] for the first thing that exists with other properties, or
/// that must exist and does not.
pub fn inspect(
    link: &mut Link,
    consumer: &Consumer,
    within: Duration,
) -> Result<Inspection, TopologyError> {
    let topology = &consumer.topology;
    let mut found = Inspection::default();
    match topology.mode {
        TopologyMode::Declare => {
            for part in parts::all(consumer) {
                match find(link, &part, within) {
                    Ok(()) => compare(link, &part, within)?,
                    Err(TopologyError::Missing { .. }) => found.missing.push(part.label()),
                    Err(error) => return Err(error),
                }
            }
            return Ok(found);
        }
        TopologyMode::Verify => {
            for part in parts::all(consumer) {
                find(link, &part, within)?;
                compare(link, &part, within)?;
            }
        }
        TopologyMode::None => {
            for part in parts::used(consumer) {
                find(link, &part, within)?;
            }
        }
    }
    let sends = match topology.dead_letters {
        DeadLetters::Reject => "what the queue dead-letters",
        DeadLetters::Publish => "what the daemon publishes",
    };
    found.unproved = Some(format!(
        "that exchange {} leads {sends} to a queue, `ackonce run` proves when it starts: AMQP \
         shows no bindings, and the check sends no probe",
        topology.dead_letter_exchange
    ));
    Ok(found)
}

/// Whether the quorum queue `queue`, which must exist, is known to keep what
/// comes back any number of times: declared with the argument that says so. A
/// limit that a policy took off is not known. Asks on a channel of its own.
pub(super) fn is_unlimited(link: &mut Link, queue: &str, within: Duration) -> bool {
    let part = parts::unlimited(queue);
    let action = format!("compare {} with one without a delivery limit", part.label());
    alone(link, &action, within, |channel| part.declare(channel)).is_ok()
}

/// Whether there is an exchange of this name.
pub(super) fn has_exchange(
    link: &mut Link,
    name: &str,
    within: Duration,
) -> Result<bool, TopologyError> {
    let action = format!("find exchange {name}");
    let find = |channel: &Channel| channel.exchange_declare_passive(name).map(drop);
    match alone(link, &action, within, find) {
        Ok(()) => Ok(true),
        Err(TopologyError::Missing { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

fn declare_all<'a>(
    link: &mut Link,
    parts: impl IntoIterator<Item = Part<'a>>,
    within: Duration,
) -> Result<(), TopologyError> {
    let mut parts = parts.into_iter().peekable();
    if parts.peek().is_none() {
        return Ok(());
    }
    let channel = open(link, "declare the topology", within)?;
    let mut result = Ok(());
    for part in parts {
        let action = format!("declare {}", part.label());
        result = watched(link, &action, within, || part.declare(&channel));
        if result.is_err() {
            break;
        }
    }
    close(link, channel, within);
    result
}

fn find(link: &mut Link, part: &Part<'_>, within: Duration) -> Result<(), TopologyError> {
    let action = format!("find {}", part.label());
    alone(link, &action, within, |channel| part.find(channel))
}

/// Declares what exists: the broker compares it, and changes nothing.
fn compare(link: &mut Link, part: &Part<'_>, within: Duration) -> Result<(), TopologyError> {
    if !part.is_comparable() {
        return Ok(());
    }
    let action = format!("compare {} with the configuration", part.label());
    alone(link, &action, within, |channel| part.declare(channel))
}

/// Makes one call on a channel of its own, since an error closes the channel.
fn alone(
    link: &mut Link,
    action: &str,
    within: Duration,
    call: impl FnOnce(&Channel) -> amiquip::Result<()>,
) -> Result<(), TopologyError> {
    let channel = open(link, action, within)?;
    let result = watched(link, action, within, || call(&channel));
    close(link, channel, within);
    result
}

fn open(link: &mut Link, action: &str, within: Duration) -> Result<Channel, TopologyError> {
    link.open_channel(within)
        .map_err(|error| TopologyError::Lost {
            action: action.to_owned(),
            text: error.to_string(),
        })
}

fn watched<T>(
    link: &Link,
    action: &str,
    within: Duration,
    call: impl FnOnce() -> amiquip::Result<T>,
) -> Result<T, TopologyError> {
    let watch = link.watch(within);
    let result = call();
    drop(watch);
    result.map_err(|error| {
        if link.timed_out() {
            TopologyError::timed_out(action, within)
        } else {
            TopologyError::new(action, &error)
        }
    })
}

/// A channel that an error has closed takes no further answer to close.
fn close(link: &Link, channel: Channel, within: Duration) {
    let _watch = link.watch(within);
    if let Err(error) = channel.close() {
        log::debug!("a channel to the broker was closed already: {error}");
    }
}
