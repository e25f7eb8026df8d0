//! What a consumer needs on the broker, as the configuration has it: plain
//! data, and how it looks in AMQP.

use std::time::Duration;

use amiquip::{AmqpValue, Channel, ExchangeDeclareOptions, FieldTable, QueueDeclareOptions};

use crate::config::checked::{
    Binding, BindingArgument, Consumer, ExchangeType, QueueType, Topology,
};

/// One thing on the broker.
#[derive(Debug)]
pub(super) enum Part<'a> {
    /// A durable queue.
    Queue {
        /// Its name.
        name: String,
        /// What it is declared with.
        arguments: FieldTable,
    },
    /// A durable exchange.
    Exchange {
        /// Its name.
        name: &'a str,
        /// Its type.
        kind: ExchangeType,
    },
    /// A binding of a queue to an exchange.
    Binding {
        /// The queue.
        queue: &'a str,
        /// The exchange.
        exchange: &'a str,
        /// Routing key.
        key: &'a str,
        /// Arguments, for exchanges that look at headers.
        arguments: FieldTable,
    },
}

impl Part<'_> {
    /// Kind and name.
    pub(super) fn label(&self) -> String {
        match self {
            Self::Queue { name, .. } => format!("queue {name}"),
            Self::Exchange { name, .. } => format!("exchange {name}"),
            Self::Binding {
                queue, exchange, ..
            } => format!("binding of queue {queue} to exchange {exchange}"),
        }
    }

    /// Makes it. Where it exists as it should be, nothing changes.
    pub(super) fn declare(&self, channel: &Channel) -> amiquip::Result<()> {
        match self {
            Self::Queue { name, arguments } => {
                let options = QueueDeclareOptions {
                    durable: true,
                    arguments: arguments.clone(),
                    ..QueueDeclareOptions::default()
                };
                channel.queue_declare(name, options).map(drop)
            }
            Self::Exchange { name, kind } => {
                let options = ExchangeDeclareOptions {
                    durable: true,
                    ..ExchangeDeclareOptions::default()
                };
                let kind = exchange_type(*kind);
                channel.exchange_declare(kind, *name, options).map(drop)
            }
            Self::Binding {
                queue,
                exchange,
                key,
                arguments,
            } => channel.queue_bind(*queue, *exchange, *key, arguments.clone()),
        }
    }

    /// An error when it does not exist. Of a binding AMQP can tell nothing.
    pub(super) fn find(&self, channel: &Channel) -> amiquip::Result<()> {
        match self {
            Self::Queue { name, .. } => channel.queue_declare_passive(name).map(drop),
            Self::Exchange { name, .. } => channel.exchange_declare_passive(*name).map(drop),
            Self::Binding { .. } => Ok(()),
        }
    }

    /// Whether it can be compared with what exists.
    pub(super) fn is_comparable(&self) -> bool {
        match self {
            Self::Queue { .. } | Self::Exchange { .. } => true,
            Self::Binding { .. } => false,
        }
    }
}

/// Everything, in the order in which it can be made: what another refers to
/// comes first, so that no message finds half of it.
pub(super) fn all(consumer: &Consumer) -> Vec<Part<'_>> {
    let topology = &consumer.topology;
    let mut parts = vec![
        dead_letter_exchange(topology),
        Part::Queue {
            name: topology.dead_letter_queue.clone(),
            arguments: type_argument(topology),
        },
        Part::Binding {
            queue: &topology.dead_letter_queue,
            exchange: &topology.dead_letter_exchange,
            key: "",
            arguments: FieldTable::new(),
        },
        work_queue(topology),
    ];
    parts.extend(retry_queues(consumer));
    for binding in &topology.bindings {
        parts.push(Part::Exchange {
            name: &binding.exchange,
            kind: binding.exchange_type,
        });
        parts.push(Part::Binding {
            queue: &topology.queue,
            exchange: &binding.exchange,
            key: &binding.routing_key,
            arguments: binding_arguments(binding),
        });
    }
    parts
}

/// A quorum queue that keeps what comes back any number of times. Not to be
/// made before RabbitMQ 4.0, where -1 is a limit that drops what comes back
/// once.
pub(super) fn unlimited(queue: &str) -> Part<'static> {
    Part::Queue {
        name: queue.to_owned(),
        arguments: FieldTable::from([
            ("x-queue-type".to_owned(), text("quorum")),
            ("x-delivery-limit".to_owned(), AmqpValue::LongLongInt(-1)),
        ]),
    }
}

/// What a daemon that makes nothing and compares nothing cannot do without.
pub(super) fn used(consumer: &Consumer) -> Vec<Part<'_>> {
    let mut parts = vec![
        dead_letter_exchange(&consumer.topology),
        work_queue(&consumer.topology),
    ];
    parts.extend(retry_queues(consumer));
    parts
}

/// The queues in which messages wait for their retry: one for each delay that
/// can occur, none where nothing is retried.
pub(super) fn retry_queues(consumer: &Consumer) -> impl Iterator<Item = Part<'_>> {
    let topology = &consumer.topology;
    let delays = consumer.retry.delays().into_iter();
    delays.map(|delay| Part::Queue {
        name: topology.retry_queue(delay),
        arguments: retry_arguments(topology, delay),
    })
}

fn dead_letter_exchange(topology: &Topology) -> Part<'_> {
    Part::Exchange {
        name: &topology.dead_letter_exchange,
        kind: ExchangeType::Fanout,
    }
}

fn work_queue(topology: &Topology) -> Part<'_> {
    let mut arguments = type_argument(topology);
    insert_dead_lettering(&mut arguments, topology, &topology.dead_letter_exchange);
    if let (QueueType::Quorum, Some(limit)) = (topology.queue_type, topology.delivery_limit) {
        let limit = AmqpValue::LongLongInt(i64::from(limit));
        arguments.insert("x-delivery-limit".to_owned(), limit);
    }
    Part::Queue {
        name: topology.queue.clone(),
        arguments,
    }
}

/// Whatever expires there goes straight back to the work queue.
///
/// What is sent there must have no `x-death` header: RabbitMQ 3.10 believes it,
/// whoever wrote it, and drops without a word what expires here and by that
/// header was in the work queue before and left it by its delivery limit, its
/// length limit or its age. 4.3 goes by what it saw itself.
fn retry_arguments(topology: &Topology, delay: Duration) -> FieldTable {
    let mut arguments = type_argument(topology);
    insert_dead_lettering(&mut arguments, topology, "");
    arguments.insert(
        "x-dead-letter-routing-key".to_owned(),
        text(&topology.queue),
    );
    let ttl = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
    arguments.insert("x-message-ttl".to_owned(), AmqpValue::LongLongInt(ttl));
    arguments
}

fn insert_dead_lettering(arguments: &mut FieldTable, topology: &Topology, exchange: &str) {
    arguments.insert("x-dead-letter-exchange".to_owned(), text(exchange));
    if topology.queue_type == QueueType::Quorum {
        // A message leaves a quorum queue for another one only when that one
        // has confirmed it; this needs reject-publish. While it can be routed
        // nowhere, the queue keeps it and tries again: seen on 3.10 and 4.3
        // with a dead-letter queue that was deleted and made again, where the
        // message came after at most the broker's three minutes. Meanwhile
        // the work queue does not count it.
        arguments.insert("x-dead-letter-strategy".to_owned(), text("at-least-once"));
        arguments.insert("x-overflow".to_owned(), text("reject-publish"));
    }
}

fn type_argument(topology: &Topology) -> FieldTable {
    FieldTable::from([(
        "x-queue-type".to_owned(),
        text(topology.queue_type.as_str()),
    )])
}

fn text(value: &str) -> AmqpValue {
    AmqpValue::LongString(value.to_owned())
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
    let arguments = binding.arguments.iter();
    arguments
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
