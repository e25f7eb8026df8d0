//! Whether a dead letter has somewhere to go: a message to the dead-letter
//! exchange that expires the moment it gets there, and comes back when it gets
//! nowhere. AMQP has no other way to ask what an exchange is bound to.
//!
//! What was seen with it, on RabbitMQ 3.10 and 4.3, classic and quorum queues
//! alike: an empty queue drops it at once. In a queue that holds dead letters it
//! stands behind them, is counted, and is dropped when its turn comes, without
//! being handed out; a quorum queue since 4.0 lets its priority pass by and
//! drops it at once. Somebody who consumes the dead-letter queue at that moment
//! gets it: its header says what it is, and its body too.

use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, AmqpValue, Channel, Confirm, FieldTable, Publish};
use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::TopologyError;
use super::watched;
use crate::broker::connection::{Dial, Link};
use crate::broker::error::ConnectError;
use crate::config::checked::{Broker, Consumer, DeadLetters, QueueType, Topology, TopologyMode};

/// The header by which others can tell a probe; its value is the consumer's
/// name.
pub const HEADER: &str = "ackonce-probe";

const BODY: &[u8] = b"ackonce asks whether a dead letter has somewhere to go. \
    This is no dead letter: drop it.";

/// How often a probe that waits looks for an alarm.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The highest that a quorum queue tells from the others.
const PRIORITY: u8 = 9;

/// Whether a delivery is a probe, of whatever consumer. Where the dead-letter
/// exchange leads to a queue that is consumed from, a probe gets there too.
pub(in crate::broker) fn is_one(delivery: &amiquip::Delivery) -> bool {
    let headers = delivery.properties.headers().as_ref();
    delivery.body == BODY && headers.is_some_and(|headers| headers.contains_key(HEADER))
}

/// What became of a probe.
enum Answer {
    /// A queue took it.
    Taken,
    /// No queue is bound.
    Returned,
    /// The broker takes no messages: an alarm, in its words.
    Blocked(String),
}

/// Sends a probe and waits for what becomes of it, at most `within` after the
/// connection is there. `first` is the URL that the consumer is connected to.
///
/// On a connection of its own, because an alarm on the broker blocks those that
/// publish, and the consumer's must go on: what it consumes is what ends the
/// alarm. Then nothing is proved, and that is an error only where nothing else
/// keeps a dead letter that has nowhere to go.
pub(super) fn dead_letters(
    broker: &Broker,
    first: usize,
    consumer: &Consumer,
    within: Duration,
) -> Result<(), TopologyError> {
    let topology = &consumer.topology;
    let exchange = &topology.dead_letter_exchange;
    let action = format!("send a probe to exchange {exchange}");
    let purpose = format!("{} probe", consumer.name);
    let lost = |text| TopologyError::Lost {
        action: action.clone(),
        text,
    };
    let dial = Dial {
        first,
        ..Dial::new(broker, &purpose)
    };
    let mut link = dial
        .open()
        .map_err(|error: ConnectError| lost(error.to_string()))?;
    let channel = link
        .open_channel(within)
        .map_err(|error| lost(error.to_string()))?;
    let answer = send(&mut link, &channel, consumer, &action, within);
    // A blocked connection is not even read from; nobody waits for its end.
    link.abandon(channel);
    match answer? {
        Answer::Taken => Ok(()),
        Answer::Returned => Err(TopologyError::Nowhere {
            exchange: exchange.clone(),
            queue: topology.dead_letter_queue.clone(),
        }),
        Answer::Blocked(reason) if is_kept_anyway(topology) => {
            log::warn!(
                consumer = consumer.name.as_str(), exchange = exchange.as_str();
                "it is not proved that dead letters have somewhere to go, since the broker takes \
                 no messages at the moment; one that has not is kept: {reason}"
            );
            Ok(())
        }
        Answer::Blocked(reason) => Err(lost(format!(
            "the broker takes no messages at the moment: {reason}"
        ))),
    }
}

/// Whether a dead letter that has nowhere to go stays: the daemon acks what it
/// publishes only with a confirm. A quorum queue with at-least-once
/// dead-lettering, which was compared, holds on to what was rejected until it
/// can be routed: seen on RabbitMQ 3.10 and 4.3, whose dead-letter queue was
/// deleted under them; three minutes after it was bound again it had the
/// message. A classic queue drops it.
fn is_kept_anyway(topology: &Topology) -> bool {
    match (topology.dead_letters, topology.queue_type) {
        (DeadLetters::Publish, _) => true,
        (DeadLetters::Reject, QueueType::Quorum) => topology.mode != TopologyMode::None,
        (DeadLetters::Reject, QueueType::Classic) => false,
    }
}

fn send(
    link: &mut Link,
    channel: &Channel,
    consumer: &Consumer,
    action: &str,
    within: Duration,
) -> Result<Answer, TopologyError> {
    let topology = &consumer.topology;
    let (confirms, returns) = watched(link, action, within, || {
        channel.enable_publisher_confirms()?;
        let confirms = channel.listen_for_publisher_confirms()?;
        let returns = channel.listen_for_returns()?;
        let mut publish =
            Publish::with_properties(BODY, topology.queue.as_str(), properties(consumer));
        publish.mandatory = true;
        channel.basic_publish(&topology.dead_letter_exchange, publish)?;
        Ok((confirms, returns))
    })?;
    let Some(confirm) = wait(link, &confirms, action, within)? else {
        // Why the channel is gone, its next call tells.
        let asked = watched(link, action, within, || channel.qos(0, 1, false));
        return Err(asked.err().unwrap_or_else(|| TopologyError::Lost {
            action: action.to_owned(),
            text: "the broker gave no answer".to_owned(),
        }));
    };
    match confirm {
        Reply::Blocked(reason) => Ok(Answer::Blocked(reason)),
        // A message comes back before its confirm.
        Reply::Confirm(_) if returns.try_recv().is_ok() => Ok(Answer::Returned),
        Reply::Confirm(Confirm::Ack(_)) => Ok(Answer::Taken),
        // It led to a queue, and that is full or not up: so it would be for a
        // dead letter.
        Reply::Confirm(Confirm::Nack(_)) => Err(TopologyError::Lost {
            action: action.to_owned(),
            text: format!(
                "the queue behind it, {} as configured, refuses messages: it is full, or not up",
                topology.dead_letter_queue
            ),
        }),
    }
}

enum Reply {
    Confirm(Confirm),
    Blocked(String),
}

/// `None` when the channel is gone.
fn wait(
    link: &mut Link,
    confirms: &Receiver<Confirm>,
    action: &str,
    within: Duration,
) -> Result<Option<Reply>, TopologyError> {
    let deadline = Instant::now() + within;
    loop {
        match confirms.recv_timeout(LOOK_EVERY) {
            Ok(confirm) => return Ok(Some(Reply::Confirm(confirm))),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                if let Some(reason) = link.blocked() {
                    return Ok(Some(Reply::Blocked(reason.to_owned())));
                }
                if Instant::now() >= deadline {
                    return Err(TopologyError::timed_out(action, within));
                }
            }
        }
    }
}

/// Not persistent: nobody needs it after a restart.
fn properties(consumer: &Consumer) -> AmqpProperties {
    let name = AmqpValue::LongString(consumer.name.clone());
    AmqpProperties::default()
        .with_content_type("text/plain".to_owned())
        .with_expiration("0".to_owned())
        .with_priority(PRIORITY)
        .with_headers(FieldTable::from([(HEADER.to_owned(), name)]))
}
