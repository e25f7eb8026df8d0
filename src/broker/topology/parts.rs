//! What a consumer needs on the broker, as the configuration has it: plain
//! data, and how it looks in AMQP.

use std::time::Duration;

use amiquip::{AmqpValue, Channel, ExchangeDeclareOptions, FieldTable, QueueDeclareOptions};

use crate::config::checked::{
    Binding, BindingArgument, Consumer, ExchangeType, QueueType, Topology,
};

/// What a queue can be declared with.
#[derive(Debug, Clone)]
pub(super) struct Form {
    arguments: FieldTable,
    /// What a queue of this form does not do, for humans.
    pub(super) weakness: Option<&'static str>,
}

impl Form {
    fn new(arguments: FieldTable) -> Self {
        Self {
            arguments,
            weakness: None,
        }
    }

    fn with(mut self, name: &str, value: AmqpValue) -> Self {
        self.arguments.insert(name.to_owned(), value);
        self
    }

    /// An active declaration: where the queue exists, the broker compares.
    pub(super) fn declare(&self, channel: &Channel, queue: &str) -> amiquip::Result<()> {
        let options = QueueDeclareOptions {
            durable: true,
            arguments: self.arguments.clone(),
            ..QueueDeclareOptions::default()
        };
        channel.queue_declare(queue, options).map(drop)
    }
}

/// One thing on the broker.
#[derive(Debug)]
pub(super) enum Part<'a> {
    /// A durable queue.
    Queue {
        /// Its name.
        name: String,
        /// What it is made with, and then what earlier versions of the daemon
        /// made it with: such a queue stays as it is. Never empty.
        forms: Vec<Form>,
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

    /// What earlier versions made it with.
    pub(super) fn earlier_forms(&self) -> &[Form] {
        match self {
            Self::Queue { forms, .. } => &forms[1..],
            Self::Exchange { .. } | Self::Binding { .. } => &[],
        }
    }

    /// Makes it. Where it exists as it should be, nothing changes.
    pub(super) fn declare(&self, channel: &Channel) -> amiquip::Result<()> {
        match self {
            Self::Queue { name, forms } => forms[0].declare(channel, name),
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
/// comes first, so that no message finds half of it. `major` is the broker's
/// version.
pub(super) fn all(consumer: &Consumer, major: Option<u32>) -> Vec<Part<'_>> {
    let topology = &consumer.topology;
    let mut parts = vec![
        dead_letter_exchange(topology),
        dead_letter_queue(topology, major),
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

/// Quorum queues that keep what comes back any number of times. Not to be made
/// before RabbitMQ 4.0, where -1 is a limit that drops what comes back once.
pub(super) fn unlimited() -> [Form; 2] {
    let unlimited = || {
        let form = Form::new(FieldTable::from([(
            "x-queue-type".to_owned(),
            text("quorum"),
        )]));
        form.with("x-delivery-limit", AmqpValue::LongLongInt(-1))
    };
    [unlimited().with("x-overflow", text(REFUSES)), unlimited()]
}

/// `x-overflow` of every queue here: a policy that limits its length later has
/// it refuse what comes, instead of dropping what it holds.
const REFUSES: &str = "reject-publish";

/// The dead-letter queue as it can be here: a quorum queue since RabbitMQ 4.0
/// drops what came back 20 times unless it is made without that limit, and
/// every look at dead letters has them come back.
fn dead_letter_queue(topology: &Topology, major: Option<u32>) -> Part<'_> {
    let has_limit = major.is_some_and(|major| major >= 4);
    let mut forms = match topology.queue_type {
        QueueType::Quorum if has_limit => unlimited().to_vec(),
        QueueType::Quorum | QueueType::Classic => Vec::new(),
    };
    let plain = Form::new(type_argument(topology.queue_type));
    forms.push(plain.clone().with("x-overflow", text(REFUSES)));
    forms.push(plain);
    Part::Queue {
        name: topology.dead_letter_queue.clone(),
        forms,
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
        forms: retry_forms(topology, delay),
    })
}

fn dead_letter_exchange(topology: &Topology) -> Part<'_> {
    Part::Exchange {
        name: &topology.dead_letter_exchange,
        kind: ExchangeType::Fanout,
    }
}

fn work_queue(topology: &Topology) -> Part<'_> {
    let mut arguments = type_argument(topology.queue_type);
    let exchange = text(&topology.dead_letter_exchange);
    arguments.insert("x-dead-letter-exchange".to_owned(), exchange);
    let bare = Form::new(arguments);
    let forms = match topology.queue_type {
        QueueType::Classic => vec![bare.clone().with("x-overflow", text(REFUSES)), bare],
        QueueType::Quorum => {
            let form = at_least_once(bare);
            vec![match topology.delivery_limit {
                Some(limit) => {
                    form.with("x-delivery-limit", AmqpValue::LongLongInt(i64::from(limit)))
                }
                None => form,
            }]
        }
    };
    Part::Queue {
        name: topology.queue.clone(),
        forms,
    }
}

/// Whatever expires there goes straight back to the work queue. A quorum queue
/// of whatever type the work queue is: it alone keeps a message until the work
/// queue has confirmed it.
///
/// What is sent there must have no `x-death` header: RabbitMQ 3.10 believes it,
/// whoever wrote it, and drops without a word what expires here and by that
/// header was in the work queue before and left it by its delivery limit, its
/// length limit or its age. 4.3 goes by what it saw itself.
fn retry_forms(topology: &Topology, delay: Duration) -> Vec<Form> {
    let ttl = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
    let of_type = |queue_type| {
        Form::new(type_argument(queue_type))
            .with("x-dead-letter-exchange", text(""))
            .with("x-dead-letter-routing-key", text(&topology.queue))
            .with("x-message-ttl", AmqpValue::LongLongInt(ttl))
    };
    let mut forms = vec![at_least_once(of_type(QueueType::Quorum))];
    if topology.queue_type == QueueType::Classic {
        forms.push(Form {
            weakness: Some(
                "it is a classic queue, as earlier versions made them: what comes to the end of \
                 its delay while the work queue refuses messages is dropped; delete it while it is \
                 empty, and the daemon makes one that keeps them",
            ),
            ..of_type(QueueType::Classic)
        });
    }
    forms
}

/// A message leaves a quorum queue for another one only when that one has
/// confirmed it; this needs reject-publish. While it can be routed nowhere or
/// is refused, the queue keeps it and tries again: seen on 3.10 and 4.3 with a
/// queue that was deleted and made again, and with one that was full for a
/// while, where the message came after at most the broker's three minutes.
/// Meanwhile the queue does not count it.
fn at_least_once(form: Form) -> Form {
    form.with("x-dead-letter-strategy", text("at-least-once"))
        .with("x-overflow", text(REFUSES))
}

fn type_argument(queue_type: QueueType) -> FieldTable {
    FieldTable::from([("x-queue-type".to_owned(), text(queue_type.as_str()))])
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
