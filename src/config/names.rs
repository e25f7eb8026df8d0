//! Whether the consumers ask for things that cannot all exist on one broker.

use std::collections::BTreeMap;

use super::checked::{Binding, ExchangeType};
use super::error::shown;
use super::reader::{Field, Section};
use super::source::Span;

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
    Retry,
    DeadLetter,
}

impl Names {
    /// The work queue and the dead-letter queue of one consumer.
    pub(super) fn enter_queues(
        &mut self,
        section: &Section<'_>,
        queue: &Field<String>,
        dead: &Field<String>,
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
        let taken = matches!(self.queues.get(&queue.value), Some((Role::Work, _)));
        self.enter_queue(section, &queue.value, queue.span, Role::Work);
        // With one work queue, which is reported, the names made of it are one too.
        if !taken {
            self.enter_queue(section, &dead.value, dead.span, Role::DeadLetter);
        }
    }

    /// A queue where messages wait for their retry, of the consumer at `span`.
    pub(super) fn enter_retry_queue(&mut self, section: &Section<'_>, name: String, span: Span) {
        self.enter_queue(section, &name, span, Role::Retry);
    }

    fn enter_queue(&mut self, section: &Section<'_>, name: &str, span: Span, role: Role) {
        let Some((taken, first)) = self.queues.get(name) else {
            self.queues.insert(name.to_owned(), (role, span));
            return;
        };
        let (what, hint) = match (*taken, role) {
            (Role::Work, Role::Work) => (
                "already consumed by the consumer of",
                "two consumers on one queue would share its messages at random: give each its \
                 own queue",
            ),
            // Their work queue is one and the same, and that is reported.
            (Role::Retry, Role::Retry) => return,
            // What is done to a letter depends on whose it is.
            (Role::DeadLetter, Role::DeadLetter) => (
                "already the dead-letter queue of another consumer: see",
                "it could not be told whose a dead letter is, and a replay of one consumer's \
                 would take the other's: give each its own dead_letter_queue",
            ),
            (Role::Work, Role::DeadLetter) | (Role::DeadLetter, Role::Work) => (
                "both a work queue and a dead-letter queue: see",
                "a dead-letter queue is declared otherwise than a work queue: choose another name",
            ),
            (Role::Retry, Role::Work | Role::DeadLetter)
            | (Role::Work | Role::DeadLetter, Role::Retry) => (
                "also where messages wait for their retry: see",
                "the queue's name and .retry. and a delay make the name of a retry queue: choose \
                 another name",
            ),
        };
        let line = section.reader.source.line_number(first.start);
        let message = format!("queue {} is {what} line {line}", shown(name));
        section.reader.report(span, message, hint);
    }

    /// The exchange that one consumer's dead letters go to.
    pub(super) fn enter_dead_letter_exchange(
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
                    "each dead letter would land in both queues: give each its own \
                     `dead_letter_exchange`",
                );
            }
            _ => {
                let entry = (dead.value.clone(), exchange.span);
                self.dead_letter_queues
                    .insert(exchange.value.clone(), entry);
            }
        }
    }

    /// An exchange that feeds a work queue.
    pub(super) fn enter_binding(
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
                        kind.as_str(),
                        other.as_str()
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
