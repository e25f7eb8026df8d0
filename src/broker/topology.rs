//! What a consumer needs on the broker, declared: work queue, exchanges and
//! bindings, dead-letter exchange and queue. Declaring what exists with the
//! same arguments changes nothing; with others it is an error of the broker's
//! that names the argument.

use std::time::Duration;

use amiquip::{AmqpValue, Channel, ExchangeDeclareOptions, FieldTable, QueueDeclareOptions};

use super::connection::Link;
use crate::config::checked::{Binding, BindingArgument, ExchangeType, QueueType, Topology};

/// Why the topology is not there.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// Something of that name exists with other properties.
    #[error(
        "failed to declare {what}: {text}\n  hint: change the configuration to match what exists, \
         or delete what exists if it is empty and unused"
    )]
    Mismatch {
        /// Kind and name of what was declared.
        what: String,
        /// The broker's words.
        text: String,
    },
    /// The user lacks a right.
    #[error(
        "failed to declare {what}: {text}\n  hint: the daemon's user needs configure, write and \
         read permission on it"
    )]
    Denied {
        /// Kind and name of what was declared.
        what: String,
        /// The broker's words.
        text: String,
    },
    /// The connection or the channel is gone.
    #[error("failed to declare {what}: {text}")]
    Lost {
        /// Kind and name of what was declared.
        what: String,
        /// What went wrong.
        text: String,
    },
}

impl TopologyError {
    fn new(what: &str, error: &amiquip::Error) -> Self {
        let what = what.to_owned();
        match error {
            amiquip::Error::ServerClosedChannel { code, message, .. } => {
                let text = message.clone();
                match code {
                    406 => Self::Mismatch { what, text },
                    403 => Self::Denied { what, text },
                    _ => Self::Lost { what, text },
                }
            }
            amiquip::Error::ServerClosedConnection { message, .. } => Self::Lost {
                what,
                text: message.clone(),
            },
            other => Self::Lost {
                what,
                text: other.to_string(),
            },
        }
    }
}

/// Declares everything, within `within` for each call.
///
/// # Errors
///
/// [`TopologyError`] for the first thing that cannot be declared; the channel
/// is closed then.
pub fn declare(
    link: &Link,
    channel: &Channel,
    topology: &Topology,
    within: Duration,
) -> Result<(), TopologyError> {
    let watched = |what: String, call: &dyn Fn() -> amiquip::Result<()>| {
        let _watch = link.watch(within);
        call().map_err(|error| TopologyError::new(&what, &error))
    };
    let durable = ExchangeDeclareOptions {
        durable: true,
        ..ExchangeDeclareOptions::default()
    };
    let dlx = &topology.dead_letter_exchange;
    watched(format!("dead-letter exchange {dlx}"), &|| {
        channel
            .exchange_declare(amiquip::ExchangeType::Fanout, dlx, durable.clone())
            .map(drop)
    })?;
    let dead = &topology.dead_letter_queue;
    watched(format!("dead-letter queue {dead}"), &|| {
        channel
            .queue_declare(dead, queue(dead_letter_arguments(topology)))
            .map(drop)
    })?;
    watched(format!("binding of {dead} to {dlx}"), &|| {
        channel.queue_bind(dead, dlx, "", FieldTable::new())
    })?;
    let work = &topology.queue;
    watched(format!("queue {work}"), &|| {
        channel
            .queue_declare(work, queue(work_arguments(topology)))
            .map(drop)
    })?;
    for binding in &topology.bindings {
        let exchange = &binding.exchange;
        watched(format!("exchange {exchange}"), &|| {
            let kind = exchange_type(binding.exchange_type);
            channel
                .exchange_declare(kind, exchange, durable.clone())
                .map(drop)
        })?;
        watched(format!("binding of {work} to {exchange}"), &|| {
            channel.queue_bind(
                work,
                exchange,
                &binding.routing_key,
                binding_arguments(binding),
            )
        })?;
    }
    Ok(())
}

/// What of the topology does not exist yet. What exists is compared with the
/// configuration, and nothing is made.
///
/// # Errors
///
/// [`TopologyError`] for the first thing that exists with other properties.
pub fn inspect(
    link: &mut Link,
    topology: &Topology,
    within: Duration,
) -> Result<Vec<String>, TopologyError> {
    let mut missing = Vec::new();
    let queues = [
        (&topology.dead_letter_queue, dead_letter_arguments(topology)),
        (&topology.queue, work_arguments(topology)),
    ];
    for (name, arguments) in queues {
        let what = format!("queue {name}");
        let exists = attempt(link, within, &what, |channel| {
            channel.queue_declare_passive(name).map(drop)
        })?;
        match exists {
            false => missing.push(what),
            true => {
                attempt(link, within, &what, |channel| {
                    channel.queue_declare(name, queue(arguments)).map(drop)
                })?;
            }
        }
    }
    let bound = topology
        .bindings
        .iter()
        .map(|b| (&b.exchange, b.exchange_type));
    let dead = [(&topology.dead_letter_exchange, ExchangeType::Fanout)];
    for (name, kind) in dead.into_iter().chain(bound) {
        let what = format!("exchange {name}");
        let exists = attempt(link, within, &what, |channel| {
            channel.exchange_declare_passive(name).map(drop)
        })?;
        match exists {
            false => missing.push(what),
            true => {
                attempt(link, within, &what, |channel| {
                    let options = ExchangeDeclareOptions {
                        durable: true,
                        ..ExchangeDeclareOptions::default()
                    };
                    channel
                        .exchange_declare(exchange_type(kind), name, options)
                        .map(drop)
                })?;
            }
        }
    }
    Ok(missing)
}

/// Makes one call on a channel of its own, since an error closes the channel.
/// False when the broker knows no such thing.
fn attempt(
    link: &mut Link,
    within: Duration,
    what: &str,
    call: impl FnOnce(&Channel) -> amiquip::Result<()>,
) -> Result<bool, TopologyError> {
    let channel = link
        .open_channel(within)
        .map_err(|error| TopologyError::Lost {
            what: what.to_owned(),
            text: error.to_string(),
        })?;
    let _watch = link.watch(within);
    let result = match call(&channel) {
        Ok(()) => Ok(true),
        Err(amiquip::Error::ServerClosedChannel { code: 404, .. }) => Ok(false),
        Err(error) => Err(TopologyError::new(what, &error)),
    };
    drop(channel);
    result
}

fn queue(arguments: FieldTable) -> QueueDeclareOptions {
    QueueDeclareOptions {
        durable: true,
        arguments,
        ..QueueDeclareOptions::default()
    }
}

fn text(value: &str) -> AmqpValue {
    AmqpValue::LongString(value.to_owned())
}

fn work_arguments(topology: &Topology) -> FieldTable {
    let mut arguments = dead_letter_arguments(topology);
    arguments.insert(
        "x-dead-letter-exchange".to_owned(),
        text(&topology.dead_letter_exchange),
    );
    if topology.queue_type == QueueType::Quorum {
        // A dead letter leaves the work queue only when the dead-letter queue
        // has confirmed it; that needs reject-publish.
        arguments.insert("x-dead-letter-strategy".to_owned(), text("at-least-once"));
        arguments.insert("x-overflow".to_owned(), text("reject-publish"));
        if let Some(limit) = topology.delivery_limit {
            arguments.insert(
                "x-delivery-limit".to_owned(),
                AmqpValue::LongLongInt(i64::from(limit)),
            );
        }
    }
    arguments
}

fn dead_letter_arguments(topology: &Topology) -> FieldTable {
    let kind = match topology.queue_type {
        QueueType::Quorum => "quorum",
        QueueType::Classic => "classic",
    };
    FieldTable::from([("x-queue-type".to_owned(), text(kind))])
}

fn exchange_type(kind: ExchangeType) -> amiquip::ExchangeType {
    match kind {
        ExchangeType::Direct => amiquip::ExchangeType::Direct,
        ExchangeType::Fanout => amiquip::ExchangeType::Fanout,
        ExchangeType::Topic => amiquip::ExchangeType::Topic,
        ExchangeType::Headers => amiquip::ExchangeType::Headers,
    }
}

fn binding_arguments(binding: &Binding) -> FieldTable {
    binding
        .arguments
        .iter()
        .map(|(name, value)| {
            let value = match value {
                BindingArgument::Text(value) => text(value),
                BindingArgument::Integer(value) => AmqpValue::LongLongInt(*value),
                BindingArgument::Boolean(value) => AmqpValue::Boolean(*value),
            };
            (name.clone(), value)
        })
        .collect()
}

pub fn prepare(
    link: &mut Link,
    consumer: &crate::config::checked::Consumer,
    within: Duration,
) -> Result<(), TopologyError> {
    let channel = link.open_channel(within).map_err(|e| TopologyError::Lost {
        what: "channel".to_owned(),
        text: e.to_string(),
    })?;
    declare(link, &channel, &consumer.topology, within)?;
    retries(&channel, consumer)
}
fn retries(
    channel: &Channel,
    consumer: &crate::config::checked::Consumer,
) -> Result<(), TopologyError> {
    for delay in consumer.retry.delays() {
        let mut arguments = dead_letter_arguments(&consumer.topology);
        arguments.insert(
            "x-message-ttl".to_owned(),
            AmqpValue::LongLongInt(delay.as_millis() as i64),
        );
        arguments.insert("x-dead-letter-exchange".to_owned(), text(""));
        arguments.insert(
            "x-dead-letter-routing-key".to_owned(),
            text(&consumer.topology.queue),
        );
        channel
            .queue_declare(consumer.topology.retry_queue(delay), queue(arguments))
            .map_err(|e| TopologyError::new("retry queue", &e))?;
    }
    Ok(())
}
pub fn declare_retry_queues(
    link: &mut Link,
    consumer: &crate::config::checked::Consumer,
    within: Duration,
) -> Result<(), TopologyError> {
    let channel = link.open_channel(within).map_err(|e| TopologyError::Lost {
        what: "channel".to_owned(),
        text: e.to_string(),
    })?;
    retries(&channel, consumer)
}
impl TopologyError {
    pub fn is_config(&self) -> bool {
        matches!(self, Self::Mismatch { .. })
    }
}
