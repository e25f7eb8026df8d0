//! `[consumer.topology]` and its bindings.

use toml::de::DeValue;

use super::checked::{
    Binding, BindingArgument, DeadLetters, ExchangeType, QueueType, Retry, Topology, TopologyMode,
    retry_queue,
};
use super::error::{Complaint, shown};
use super::names::Names;
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
    retry: Option<&Retry>,
    names: &mut Names,
) -> Option<Topology> {
    let section = consumer.section("topology", &keys::TOPOLOGY);
    let mode = section
        .text("mode")
        .then(|text| keys::one_of(&text, &TopologyMode::ALL, TopologyMode::as_str))
        .or(defaults::TOPOLOGY_MODE);
    let typed_queue = section.text("queue").then(check_declared_name);
    let queue = match name {
        Some(name) => Some(typed_queue.or(name.value.clone())).filter(Field::is_sound),
        None => typed_queue.optional(),
    };
    let queue_type = section
        .text("queue_type")
        .then(|text| keys::one_of(&text, &QueueType::ALL, QueueType::as_str))
        .or(defaults::QUEUE_TYPE);
    let delivery_limit = delivery_limit(&section, mode.value, queue_type.value);
    let dead_letters = dead_letters(&section, mode.value, queue_type.value);
    let or_derived = |key, suffix| typed_or_derived(&section, queue.as_ref(), key, suffix);
    let exchange = or_derived(
        "dead_letter_exchange",
        defaults::DEAD_LETTER_EXCHANGE_SUFFIX,
    );
    let dead = or_derived("dead_letter_queue", defaults::DEAD_LETTER_QUEUE_SUFFIX);
    let sections = section.sections("binding", &keys::BINDING);
    let bindings: Vec<_> = sections.iter().map(binding).collect();
    if mode.value == TopologyMode::None && !sections.is_empty() {
        section.reader.report(
            section.span_of("binding"),
            "bindings are given, but mode = \"none\" makes none",
            "leave them out, or set mode = \"declare\" or \"verify\"",
        );
    }

    let (queue, exchange, dead) = (queue?, exchange?, dead?);
    if let Some(retry) = retry {
        enter_retry_queues(&section, &queue, retry, names);
    }
    names.enter_queues(&section, &queue, &dead);
    if mode.value != TopologyMode::None {
        names.enter_dead_letter_exchange(&section, &exchange, &dead);
        for (section, binding) in sections.iter().zip(&bindings) {
            if let Some(binding) = binding {
                names.enter_binding(section, binding, &exchange);
            }
        }
    }
    Some(Topology {
        mode: mode.value,
        dead_letters: dead_letters.value,
        queue: queue.value,
        queue_type: queue_type.value,
        delivery_limit,
        dead_letter_exchange: exchange.value,
        dead_letter_queue: dead.value,
        bindings: bindings.into_iter().collect::<Option<Vec<_>>>()?,
    })
}

/// The name that `key` gives, or else the queue's with `suffix` behind it.
fn typed_or_derived(
    section: &Section<'_>,
    queue: Option<&Field<String>>,
    key: &'static str,
    suffix: &str,
) -> Option<Field<String>> {
    let typed = section.text(key).then(check_declared_name);
    let Some(queue) = queue else {
        return typed.optional();
    };
    let derived = typed.or(format!("{}{suffix}", queue.value));
    if derived.is_sound() && derived.value.len() > defaults::AMQP_NAME_MAX {
        let hint = format!("give a shorter `queue`, or set `{key}`");
        let message = format!("`{key}`, {suffix} after the queue's name, is too long");
        section.reader.report(queue.span, message, hint);
    }
    Some(derived).filter(Field::is_sound)
}

/// `None` where the daemon makes no queue that has one.
fn delivery_limit(section: &Section<'_>, mode: TopologyMode, queue_type: QueueType) -> Option<u32> {
    let limit = section.integer("delivery_limit", &defaults::DELIVERY_LIMIT);
    let (message, hint) = match (mode, queue_type) {
        (TopologyMode::Declare | TopologyMode::Verify, QueueType::Quorum) => {
            return Some(limit.value);
        }
        (_, QueueType::Classic) => (
            "`delivery_limit` is given for a classic queue",
            "only quorum queues count deliveries: leave it out, or set queue_type = \"quorum\"",
        ),
        (TopologyMode::None, QueueType::Quorum) => (
            "`delivery_limit` is given, but mode = \"none\" leaves the queue as it is",
            "leave it out, or set mode = \"declare\" or \"verify\"",
        ),
    };
    if section.has("delivery_limit") {
        section.reader.report(limit.span, message, hint);
    }
    None
}

fn dead_letters(
    section: &Section<'_>,
    mode: TopologyMode,
    queue_type: QueueType,
) -> Field<DeadLetters> {
    let dead_letters = section
        .text("dead_letters")
        .then(|text| keys::one_of(&text, &DeadLetters::ALL, DeadLetters::as_str))
        .or(defaults::dead_letters(mode, queue_type));
    if mode == TopologyMode::None && dead_letters.value == DeadLetters::Reject {
        section.reader.report(
            dead_letters.span,
            "`dead_letters` cannot be `reject` with mode = \"none\"",
            "it cannot be proved that a rejected message has somewhere to go: set \
             dead_letters = \"publish\", or mode = \"verify\"",
        );
    }
    dead_letters
}

fn enter_retry_queues(
    section: &Section<'_>,
    queue: &Field<String>,
    retry: &Retry,
    names: &mut Names,
) {
    let queues: Vec<String> = retry
        .delays()
        .into_iter()
        .map(|delay| retry_queue(&queue.value, delay))
        .collect();
    let longest = queues.iter().max_by_key(|name| name.len());
    if let Some(longest) = longest.filter(|name| name.len() > defaults::AMQP_NAME_MAX) {
        let suffix = &longest[queue.value.len()..];
        let room = defaults::AMQP_NAME_MAX - suffix.len();
        section.reader.report(
            queue.span,
            format!(
                "the name of a retry queue, {} after the queue's name, is too long",
                shown(suffix)
            ),
            format!("give a `queue` of at most {room} bytes"),
        );
        return;
    }
    for name in queues {
        names.enter_retry_queue(section, name, queue.span);
    }
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
        .then(|text| keys::one_of(&text, &ExchangeType::ALL, ExchangeType::as_str))
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
            format!("set exchange_type = \"{}\"", own.as_str()),
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
