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
mod unsafe_queue;
mod way_back;

use std::time::Duration;

use amiquip::Channel;

use super::connection::Link;
use crate::config::checked::{Broker, Consumer, DeadLetters, TopologyMode};
pub use error::TopologyError;
use parts::Part;
pub use probe::HEADER as PROBE_HEADER;
pub(super) use probe::is_one as is_probe;
pub(super) use unsafe_queue::{STREAM_HEADER, stream as stream_error};
pub(super) use way_back::WaysBack;

/// Everything that comes before consuming: makes what is needed, compares it or
/// looks for it, and then proves that a dead letter has somewhere to go. Each
/// call on the broker may take `within`. Leaves no channel open. Returns the
/// retry queues of which it is not known that they lead back to the work queue.
///
/// - `declare` makes everything. The binding of the dead-letter queue that the
///   broker has just confirmed is the proof.
/// - `verify` makes nothing. Queues and exchanges must exist and be as
///   configured. AMQP shows no bindings: those of the work queue stay
///   unproved, that of the dead-letter queue is proved by a probe, for which
///   another connection to `broker` is opened.
/// - `none` makes nothing and holds nothing to the configuration. What is used
///   must exist, the work queue must be of a kind that can take messages back,
///   and the probe goes where the daemon will publish dead letters. A retry
///   queue that is as the daemon would make it leads back; of another one a
///   probe must tell, while messages are consumed.
///
/// A probe of dead letters stands behind those that are there and is counted
/// among them until its turn comes, so it is sent only when `proves`: once in
/// the life of a daemon.
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
) -> Result<Vec<String>, TopologyError> {
    match consumer.topology.mode {
        TopologyMode::Declare => {
            declare_again(link, consumer, within)?;
            Ok(Vec::new())
        }
        TopologyMode::Verify => {
            for part in parts::all(consumer, link.server_major()) {
                find(link, &part, within)?;
                let weakness = compare(link, &part, within)?;
                warn_of(consumer, &part, weakness);
            }
            prove(link, broker, consumer, proves, within)?;
            Ok(Vec::new())
        }
        TopologyMode::None => {
            for part in parts::used(consumer) {
                find(link, &part, within)?;
            }
            unsafe_queue::refuse(link, &consumer.topology.queue, within)?;
            prove(link, broker, consumer, proves, within)?;
            way_back::unproved(link, consumer, within)
        }
    }
}

fn warn_of(consumer: &Consumer, part: &Part<'_>, weakness: Option<&str>) {
    if let Some(weakness) = weakness {
        log::warn!(consumer = consumer.name.as_str(); "{}: {weakness}", part.label());
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
        TopologyMode::Declare => declare_all(link, consumer, within),
        TopologyMode::Verify | TopologyMode::None => Ok(()),
    }
}

/// What a look at the topology found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inspection {
    /// What does not exist yet, and will be made.
    pub missing: Vec<String>,
    /// What only a start of the daemon can tell.
    pub unproved: Vec<String>,
    /// What works and could lose a message.
    pub weak: Vec<String>,
}

/// Compares what exists with the configuration. Makes nothing and sends
/// nothing: where only a probe could prove that a message has somewhere to go,
/// it says that this is unproved.
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
    if topology.mode == TopologyMode::None {
        for part in parts::used(consumer) {
            find(link, &part, within)?;
        }
        if !unsafe_queue::refuse(link, &topology.queue, within)? {
            found.unproved.push(unsafe_queue::unseen(&topology.queue));
        }
        let unproved = way_back::unproved(link, consumer, within)?.into_iter();
        found.unproved.extend(unproved.map(|queue| {
            format!(
                "that what expires in queue {queue} comes back to queue {}, `ackonce run` proves \
                 when it starts, by a probe",
                topology.queue
            )
        }));
    } else {
        for part in parts::all(consumer, link.server_major()) {
            match find(link, &part, within) {
                Ok(()) => {
                    let weakness = compare(link, &part, within)?;
                    let weakness = weakness.map(|weakness| format!("{}: {weakness}", part.label()));
                    found.weak.extend(weakness);
                }
                Err(TopologyError::Missing { .. }) if topology.mode == TopologyMode::Declare => {
                    found.missing.push(part.label());
                }
                Err(error) => return Err(error),
            }
        }
    }
    if topology.mode != TopologyMode::Declare {
        found.unproved.push(unproved_dead_letters(consumer));
    }
    Ok(found)
}

fn unproved_dead_letters(consumer: &Consumer) -> String {
    let sends = match consumer.topology.dead_letters {
        DeadLetters::Reject => "what the queue dead-letters",
        DeadLetters::Publish => "what the daemon publishes",
    };
    format!(
        "that exchange {} leads {sends} to a queue, `ackonce run` proves when it starts: AMQP \
         shows no bindings, and the check sends no probe",
        consumer.topology.dead_letter_exchange
    )
}

/// Whether the quorum queue `queue`, which must exist, is known to keep what
/// comes back any number of times: declared with the argument that says so. A
/// limit that a policy took off is not known. Asks on a channel of its own.
pub(super) fn is_unlimited(link: &mut Link, queue: &str, within: Duration) -> bool {
    let action = format!("compare queue {queue} with one without a delivery limit");
    parts::unlimited().iter().any(|form| {
        alone(link, &action, within, |channel| {
            form.declare(channel, queue)
        })
        .is_ok()
    })
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

fn declare_all(
    link: &mut Link,
    consumer: &Consumer,
    within: Duration,
) -> Result<(), TopologyError> {
    let mut channel = open(link, "declare the topology", within)?;
    for part in parts::all(consumer, link.server_major()) {
        let action = format!("declare {}", part.label());
        let declared = watched(link, &action, within, || part.declare(&channel));
        let Err(error) = declared else { continue };
        // The error has closed the channel.
        close(link, channel, within);
        let weakness = as_earlier(link, &part, within, error)?;
        warn_of(consumer, &part, weakness);
        channel = open(link, "declare the topology", within)?;
    }
    close(link, channel, within);
    Ok(())
}

fn find(link: &mut Link, part: &Part<'_>, within: Duration) -> Result<(), TopologyError> {
    let action = format!("find {}", part.label());
    alone(link, &action, within, |channel| part.find(channel))
}

/// Declares what exists: the broker compares it, and changes nothing. Returns
/// what a queue that an earlier version made does not do.
fn compare(
    link: &mut Link,
    part: &Part<'_>,
    within: Duration,
) -> Result<Option<&'static str>, TopologyError> {
    if !part.is_comparable() {
        return Ok(None);
    }
    let action = format!("compare {} with the configuration", part.label());
    match alone(link, &action, within, |channel| part.declare(channel)) {
        Ok(()) => Ok(None),
        Err(error) => as_earlier(link, part, within, error),
    }
}

/// What does not match today's form may match an earlier one; `error` where it
/// does not.
fn as_earlier(
    link: &mut Link,
    part: &Part<'_>,
    within: Duration,
    error: TopologyError,
) -> Result<Option<&'static str>, TopologyError> {
    if let (Part::Queue { name, .. }, TopologyError::Mismatch { .. }) = (part, &error) {
        let action = format!("compare {} with earlier versions", part.label());
        for form in part.earlier_forms() {
            if alone(link, &action, within, |channel| form.declare(channel, name)).is_ok() {
                return Ok(form.weakness);
            }
        }
    }
    Err(error)
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
