//! `[consumer.topology]` and its bindings, and whether the consumers ask for
//! things that cannot all exist on one broker.

use std::collections::BTreeMap;

use toml::de::DeValue;

use super::checked::{
    Binding, BindingArgument, DeadLetters, ExchangeType, QueueType, Topology, TopologyMode,
};
use super::error::{Complaint, shown};
use super::reader::{Field, Section};
use super::source::Span;
use super::{defaults, keys};

/// The exchanges that every broker has; all else that begins with `amq.` is
/// the broker's own.
const BUILT_IN_EXCHANGES: [(&str, ExchangeType); 5] = [
    ("amq.direct", ExchangeType::Direct),
    ("amq.fanout", ExchangeType::Fanout),
    ("amq.topic", ExchangeType::Topic),
    ("amq.headers", ExchangeType::Headers),
    ("amq.match", ExchangeType::Headers),
];

/// `None` where something is wrong, which is reported.
pub(super) fn topology(
    consumer: &Section<'_>,
    name: Option<&Field<String>>,
    names: &mut Names,
) -> Option<Topology> {
    let section = consumer.section("topology", &keys::TOPOLOGY);
    let typed_queue = section.text("queue").then(check_declared_name);
    let queue = match name {
        Some(name) => Some(typed_queue.or(name.value.clone())).filter(Field::is_sound),
        None => typed_queue.optional(),
    };
    let queue_type = section
        .text("queue_type")
        .then(|text| one_of(&text, &QUEUE_TYPES))
        .or(defaults::QUEUE_TYPE);
    let delivery_limit = section.integer("delivery_limit", &defaults::DELIVERY_LIMIT);
    if queue_type.value == QueueType::Classic && section.has("delivery_limit") {
        section.reader.report(
            delivery_limit.span,
            "`delivery_limit` is given for a classic queue",
            "only quorum queues count deliveries: leave it out, or set queue_type = \"quorum\"",
        );
    }
    let or_derived = |key: &'static str, suffix: &str| {
        let typed = section.text(key).then(check_declared_name);
        let Some(queue) = &queue else {
            return typed.optional();
        };
        let derived = typed.or(format!("{}{suffix}", queue.value));
        if derived.is_sound() && derived.value.len() > defaults::AMQP_NAME_MAX {
            let hint = format!("give a shorter `queue`, or set `{key}`");
            let message = format!("`{key}`, {suffix} after the queue's name, is too long");
            section.reader.report(queue.span, message, hint);
        }
        Some(derived).filter(Field::is_sound)
    };
    let exchange = or_derived(
        "dead_letter_exchange",
        defaults::DEAD_LETTER_EXCHANGE_SUFFIX,
    );
    let dead = or_derived("dead_letter_queue", defaults::DEAD_LETTER_QUEUE_SUFFIX);
    let sections = section.sections("binding", &keys::BINDING);
    let bindings: Vec<_> = sections.iter().map(binding).collect();

    let (queue, exchange, dead) = (queue?, exchange?, dead?);
    names.enter_queues(&section, &queue, &dead, queue_type.value);
    names.enter_dead_letter_exchange(&section, &exchange, &dead);
    for (section, binding) in sections.iter().zip(&bindings) {
        if let Some(binding) = binding {
            names.enter_binding(section, binding, &exchange);
        }
    }
    Some(Topology {
        mode: TopologyMode::Declare,
        dead_letters: DeadLetters::Reject,
        queue: queue.value,
        queue_type: queue_type.value,
        delivery_limit: (queue_type.value == QueueType::Quorum).then_some(delivery_limit.value),
        dead_letter_exchange: exchange.value,
        dead_letter_queue: dead.value,
        bindings: bindings.into_iter().collect::<Option<Vec<_>>>()?,
    })
}

/// Names of queue types, as typed and printed.
pub(super) const QUEUE_TYPES: [(&str, QueueType); 2] = [
    ("quorum", QueueType::Quorum),
    ("classic", QueueType::Classic),
];

/// Names of exchange types, as typed and printed.
pub(super) const EXCHANGE_TYPES: [(&str, ExchangeType); 4] = [
    ("direct", ExchangeType::Direct),
    ("fanout", ExchangeType::Fanout),
    ("topic", ExchangeType::Topic),
    ("headers", ExchangeType::Headers),
];

fn one_of<T: Copy>(text: &str, choices: &[(&'static str, T)]) -> Result<T, Complaint> {
    if let Some((_, value)) = choices.iter().find(|(name, _)| *name == text) {
        return Ok(*value);
    }
    let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
    let hint = match keys::nearest(text, &names) {
        Some(near) => format!("did you mean `{near}`? allowed: {}", names.join(", ")),
        None => format!("allowed: {}", names.join(", ")),
    };
    Err(Complaint::new(format!("cannot be {}", shown(text)), hint))
}

fn check_name(name: String) -> Result<String, Complaint> {
    let most = defaults::AMQP_NAME_MAX;
    let hint = format!("allowed: 1 to {most} bytes without control characters");
    if name.is_empty() {
        return Err(Complaint::new("is empty", hint));
    }
    if name.len() > most {
        let message = format!("is too long: {} bytes", name.len());
        return Err(Complaint::new(message, hint));
    }
    if name.chars().any(char::is_control) {
        return Err(Complaint::new("has a control character in it", hint));
    }
    Ok(name)
}

fn check_declared_name(name: String) -> Result<String, Complaint> {
    if name.starts_with("amq.") {
        return Err(Complaint::new(
            format!("cannot be {}", shown(&name)),
            "names that begin with amq. are the broker's own: choose another",
        ));
    }
    check_name(name)
}

fn binding(section: &Section<'_>) -> Option<Binding> {
    let exchange = section
        .text("exchange")
        .then(check_name)
        .required("add exchange = \"…\", the exchange that feeds the queue");
    let exchange_type = section
        .text("exchange_type")
        .then(|text| one_of(&text, &EXCHANGE_TYPES))
        .required("add exchange_type: direct, fanout, topic or headers");
    if let (Some(exchange), Some(kind)) = (&exchange, &exchange_type) {
        check_built_in(section, exchange, kind.value);
    }
    let routing_key = section.text("routing_key").then(|key| {
        if key.len() <= defaults::AMQP_NAME_MAX {
            return Ok(key);
        }
        let most = defaults::AMQP_NAME_MAX;
        Err(Complaint::new(
            format!("is too long: {} bytes", key.len()),
            format!("allowed: up to {most} bytes"),
        ))
    });
    let kind = exchange_type.as_ref().map(|kind| kind.value);
    let routing_key = match kind {
        Some(ExchangeType::Direct | ExchangeType::Topic) => routing_key.required(
            "add routing_key = \"…\": direct and topic exchanges route by it (\"#\" takes all of \
             a topic exchange)",
        ),
        _ => Some(routing_key.or(String::new())).filter(Field::is_sound),
    };
    let arguments = arguments(section, kind);
    Some(Binding {
        exchange: exchange?.value,
        exchange_type: kind?,
        routing_key: routing_key?.value,
        arguments: arguments?,
    })
}

fn check_built_in(section: &Section<'_>, exchange: &Field<String>, kind: ExchangeType) {
    if !exchange.value.starts_with("amq.") {
        return;
    }
    let built_in = BUILT_IN_EXCHANGES
        .iter()
        .find(|(name, _)| *name == exchange.value);
    match built_in {
        Some((_, own)) if *own == kind => {}
        Some((name, own)) => section.reader.report(
            section.span_of("exchange_type"),
            format!("`exchange_type` is not that of {}", shown(name)),
            format!("set exchange_type = \"{}\"", exchange_type_name(*own)),
        ),
        None => section.reader.report(
            exchange.span,
            format!("`exchange` cannot be {}", shown(&exchange.value)),
            "names that begin with amq. are the broker's own: choose another, or one of \
             amq.direct, amq.fanout, amq.topic, amq.headers, amq.match",
        ),
    }
}

fn arguments(
    section: &Section<'_>,
    kind: Option<ExchangeType>,
) -> Option<Vec<(String, BindingArgument)>> {
    let entries = section.entries("arguments");
    if !entries.is_empty() && kind.is_some_and(|kind| kind != ExchangeType::Headers) {
        section.reader.report(
            section.span_of("arguments"),
            "`arguments` are given, but only a headers exchange looks at them",
            "leave them out, or set exchange_type = \"headers\"",
        );
    }
    let mut arguments = Vec::with_capacity(entries.len());
    let mut whole = true;
    for (name, name_span, value) in entries {
        if name.is_empty() || name.len() > defaults::AMQP_NAME_MAX {
            let most = defaults::AMQP_NAME_MAX;
            section.reader.report(
                name_span,
                format!("{} cannot name an argument", shown(name)),
                format!("allowed: 1 to {most} bytes"),
            );
        }
        match argument(section, name, value.span().into(), value.get_ref()) {
            Some(value) => arguments.push((name.to_owned(), value)),
            None => whole = false,
        }
    }
    whole.then_some(arguments)
}

fn argument(
    section: &Section<'_>,
    name: &str,
    span: Span,
    value: &DeValue<'_>,
) -> Option<BindingArgument> {
    const MATCHES: [&str; 4] = ["all", "any", "all-with-x", "any-with-x"];
    let expected = "a string, an integer or a boolean";
    let argument = match value {
        DeValue::String(text) => BindingArgument::Text(section.expand(name, text, span)?),
        DeValue::Boolean(value) => BindingArgument::Boolean(*value),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => BindingArgument::Integer(number),
            Err(_) => {
                section.reader.report(
                    span,
                    format!("{} is out of range", shown(name)),
                    "allowed: 64-bit integers",
                );
                return None;
            }
        },
        other => {
            let hint = "write a value that a message's header can have";
            section.wrong_type(name, span, expected, other, hint);
            return None;
        }
    };
    let known = |text: &String| MATCHES.contains(&text.as_str());
    if name == "x-match" && !matches!(&argument, BindingArgument::Text(text) if known(text)) {
        section.reader.report(
            span,
            "`x-match` says how many headers must match, and this does not",
            format!("allowed: {}", MATCHES.join(", ")),
        );
        return None;
    }
    Some(argument)
}

pub(super) fn exchange_type_name(kind: ExchangeType) -> &'static str {
    match kind {
        ExchangeType::Direct => "direct",
        ExchangeType::Fanout => "fanout",
        ExchangeType::Topic => "topic",
        ExchangeType::Headers => "headers",
    }
}

/// The queues and exchanges that the consumers read so far ask for.
#[derive(Default)]
pub(super) struct Names {
    queues: BTreeMap<String, (Role, Span)>,
    exchanges: BTreeMap<String, (ExchangeType, Span)>,
    dead_letter_queues: BTreeMap<String, (String, Span)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Work,
    DeadLetter(QueueType),
}

impl Names {
    fn enter_queues(
        &mut self,
        section: &Section<'_>,
        queue: &Field<String>,
        dead: &Field<String>,
        queue_type: QueueType,
    ) {
        if queue.value == dead.value {
            section.reader.report(
                dead.blame(queue),
                format!(
                    "`dead_letter_queue` is the work queue {}",
                    shown(&queue.value)
                ),
                "dead letters would be consumed again for ever: choose another name",
            );
            return;
        }
        let pairs = [(queue, Role::Work), (dead, Role::DeadLetter(queue_type))];
        for (field, role) in pairs {
            let Some((taken, first)) = self.queues.get(&field.value) else {
                self.queues.insert(field.value.clone(), (role, field.span));
                continue;
            };
            let complaint = match (*taken, role) {
                (Role::Work, Role::Work) => (
                    "already consumed by the consumer of",
                    "two consumers on one queue would \
                      share its messages at random: give each its own queue",
                ),
                (Role::DeadLetter(a), Role::DeadLetter(b)) if a == b => continue,
                (Role::DeadLetter(_), Role::DeadLetter(_)) => (
                    "a dead-letter queue of another queue_type on",
                    "one queue has one type: \
                      use the same queue_type, or give each its own dead_letter_queue",
                ),
                _ => (
                    "both a work queue and a dead-letter queue: see",
                    "a dead-letter queue is \
                       declared otherwise than a work queue: choose another name",
                ),
            };
            let line = section.reader.source.line_number(first.start);
            section.reader.report(
                field.span,
                format!(
                    "queue {} is {} line {line}",
                    shown(&field.value),
                    complaint.0
                ),
                complaint.1,
            );
        }
    }

    fn enter_dead_letter_exchange(
        &mut self,
        section: &Section<'_>,
        exchange: &Field<String>,
        dead: &Field<String>,
    ) {
        self.enter_exchange(
            section,
            (&exchange.value, exchange.span),
            ExchangeType::Fanout,
        );
        match self.dead_letter_queues.get(&exchange.value) {
            Some((queue, first)) if *queue != dead.value => {
                let line = section.reader.source.line_number(first.start);
                section.reader.report(
                    exchange.span,
                    format!(
                        "exchange {} feeds another dead-letter queue on line {line}",
                        shown(&exchange.value)
                    ),
                    "each dead letter would land in both queues: share the \
                     `dead_letter_queue` too, or give each its own `dead_letter_exchange`",
                );
            }
            _ => {
                let entry = (dead.value.clone(), exchange.span);
                self.dead_letter_queues
                    .insert(exchange.value.clone(), entry);
            }
        }
    }

    fn enter_binding(
        &mut self,
        section: &Section<'_>,
        binding: &Binding,
        dead_letter_exchange: &Field<String>,
    ) {
        let span = section.span_of("exchange");
        if binding.exchange == dead_letter_exchange.value {
            section.reader.report(
                span,
                "`exchange` is the consumer's own dead-letter exchange",
                "dead letters would be consumed again for ever: bind another exchange",
            );
            return;
        }
        self.enter_exchange(section, (&binding.exchange, span), binding.exchange_type);
    }

    fn enter_exchange(
        &mut self,
        section: &Section<'_>,
        (name, span): (&str, Span),
        kind: ExchangeType,
    ) {
        match self.exchanges.get(name) {
            Some((other, first)) if *other != kind => {
                let line = section.reader.source.line_number(first.start);
                section.reader.report(
                    span,
                    format!(
                        "exchange {} is {} here and {} on line {line}",
                        shown(name),
                        exchange_type_name(kind),
                        exchange_type_name(*other)
                    ),
                    "one exchange has one type (a dead-letter exchange is a fanout)",
                );
            }
            _ => {
                self.exchanges.insert(name.to_owned(), (kind, span));
            }
        }
    }
}
