//! A copy of a delivery, as it is published: what the message had, and what
//! the daemon says about it.

use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, AmqpValue, FieldTable};

use crate::backoff::Backoff;
use crate::broker::convert::OF_THE_BROKER;
use crate::broker::outgoing::SHORT_STRING_MAX_BYTES;
use crate::broker::signed::Signer;
use crate::config::checked::{self, DeadLetters};
use crate::message::{
    ATTEMPTS_HEADER, CC_HEADER, DeadReason, EXCHANGE_HEADER, Parcel, Purpose, REASON_HEADER,
    ROUTING_KEY_HEADER, USER_ID_HEADER,
};

/// One copy to be sent.
pub(in crate::broker) struct Copy {
    tag: u64,
    properties: AmqpProperties,
    exchange: String,
    routing_key: String,
    parcel: Parcel,
    carries: Carries,
    /// How often the broker refused it as light as it can be, and when it is
    /// tried again.
    refused: u32,
    due: Option<Instant>,
}

/// Which headers there is room for.
#[derive(Debug, Clone, std::marker::Copy, PartialEq, Eq)]
enum Carries {
    /// The message's and the daemon's.
    All,
    /// The message's alone.
    Its,
    /// The daemon's alone.
    Ours,
}

/// Where copies go.
#[derive(Debug, Clone, std::marker::Copy, PartialEq, Eq, Hash)]
pub(super) enum LaneName {
    /// To the retry queue of a step.
    Retry(usize),
    /// To the dead-letter exchange.
    DeadLetters,
}

/// A copy as the publisher takes it.
pub(super) struct Parts {
    pub(super) exchange: String,
    pub(super) routing_key: String,
    pub(super) properties: AmqpProperties,
}

impl Copy {
    /// Of the delivery whose shell this is; that keeps what settles it.
    pub(in crate::broker) fn new(shell: &mut amiquip::Delivery, parcel: Parcel) -> Self {
        Self {
            tag: shell.delivery_tag(),
            properties: std::mem::take(&mut shell.properties),
            exchange: std::mem::take(&mut shell.exchange),
            routing_key: std::mem::take(&mut shell.routing_key),
            parcel,
            carries: Carries::All,
            refused: 0,
            due: None,
        }
    }

    /// When it is tried again, where the broker will not have it.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// The broker will not have it, and nothing is left to take away. It waits
    /// for itself alone. Returns how often that was so.
    pub(super) fn wait_for_itself(&mut self, backoff: Backoff, random: u64) -> u32 {
        self.due = Some(Instant::now() + backoff.delay(self.refused, random));
        self.refused = self.refused.saturating_add(1);
        self.refused
    }

    pub(super) fn tag(&self) -> u64 {
        self.tag
    }

    /// What it is now, which a copy that had to be made lighter may not have
    /// been at first.
    pub(super) fn purpose(&self) -> Purpose {
        self.parcel.purpose
    }

    pub(super) fn body(&self) -> &[u8] {
        &self.parcel.body
    }

    pub(super) fn is_lightest(&self) -> bool {
        self.carries == Carries::Ours
    }

    /// Makes a retry wait in the queue of another step.
    pub(super) fn wait_in(&mut self, step: usize) {
        self.parcel.purpose = Purpose::Retry(step);
    }

    /// Which copies fail for the same reasons.
    pub(super) fn lane(&self) -> LaneName {
        match self.parcel.purpose {
            Purpose::Retry(step) => LaneName::Retry(step),
            Purpose::DeadLetter(_) => LaneName::DeadLetters,
        }
    }

    /// The same as a dead letter that carries fewer headers: first without the
    /// daemon's, then without its own. The tag alone where the broker makes the
    /// dead letters.
    pub(super) fn lighter(self, consumer: &checked::Consumer) -> Result<Self, u64> {
        let purpose = match (self.parcel.purpose, consumer.topology.dead_letters) {
            (Purpose::Retry(_), DeadLetters::Reject) => return Err(self.tag),
            (Purpose::Retry(_), DeadLetters::Publish) => Purpose::DeadLetter(DeadReason::Rejected),
            (purpose, _) => purpose,
        };
        let parcel = Parcel {
            purpose,
            ..self.parcel
        };
        Ok(Self {
            parcel,
            carries: match self.carries {
                Carries::All => Carries::Its,
                Carries::Its | Carries::Ours => Carries::Ours,
            },
            ..self
        })
    }

    /// Whereto, for humans.
    pub(super) fn destination(&self, consumer: &checked::Consumer) -> String {
        match self.parcel.purpose {
            Purpose::Retry(step) => match delay(consumer, step) {
                Some(delay) => format!("queue {}", consumer.topology.retry_queue(delay)),
                None => "no retry queue".to_owned(),
            },
            Purpose::DeadLetter(_) => {
                format!("exchange {}", consumer.topology.dead_letter_exchange)
            }
        }
    }

    /// As it is published. `random` draws the jitter.
    pub(super) fn outgoing(
        &self,
        consumer: &checked::Consumer,
        signer: &Signer,
        random: u64,
    ) -> Parts {
        // The broker would drop the message's own expiration on the way, too.
        let mut properties = without_expiration_and_user(&self.properties);
        if self.carries != Carries::Its {
            let mut headers = self.headers();
            let id = self.properties.message_id().as_deref();
            signer.sign_table(id, self.body(), &mut headers);
            properties = properties.with_headers(headers);
        }
        match self.parcel.purpose {
            Purpose::Retry(step) => {
                let delay = delay(consumer, step).unwrap_or_default();
                let queue = consumer.topology.retry_queue(delay);
                let expiration = shortened(delay, consumer.retry.jitter_percent, random)
                    .max(self.parcel.at_least.min(delay));
                Parts {
                    exchange: String::new(),
                    routing_key: queue,
                    // A queue of others may have no limit of its own.
                    properties: properties.with_expiration(expiration.as_millis().to_string()),
                }
            }
            Purpose::DeadLetter(_) => Parts {
                exchange: consumer.topology.dead_letter_exchange.clone(),
                routing_key: self.first_routing_key(),
                properties,
            },
        }
    }

    fn header(&self, name: &str) -> Option<&AmqpValue> {
        self.properties.headers().as_ref()?.get(name)
    }

    fn first_routing_key(&self) -> String {
        match self.header(ROUTING_KEY_HEADER) {
            // A publisher may have written anything there.
            Some(AmqpValue::LongString(key)) if key.len() <= SHORT_STRING_MAX_BYTES => key.clone(),
            _ => self.routing_key.clone(),
        }
    }

    fn headers(&self) -> FieldTable {
        let mut headers = match self.carries {
            Carries::Ours => FieldTable::new(),
            Carries::All | Carries::Its => self.properties.headers().clone().unwrap_or_default(),
        };
        headers.retain(|name, _| !OF_THE_BROKER.contains(&name.as_str()));
        let text = |text: &str| AmqpValue::LongString(text.to_owned());
        let attempts = i64::from(self.parcel.attempts);
        headers.insert(ATTEMPTS_HEADER.to_owned(), AmqpValue::LongLongInt(attempts));
        // A copy of a copy keeps what the first one said.
        let origin = [
            (EXCHANGE_HEADER, &self.exchange),
            (ROUTING_KEY_HEADER, &self.routing_key),
        ];
        for (name, value) in origin {
            headers
                .entry(name.to_owned())
                .or_insert_with(|| text(value));
        }
        // The broker would route the copy to these queues once more.
        if let Some(cc) = headers.remove("CC") {
            headers.insert(CC_HEADER.to_owned(), cc);
        }
        if let Some(user) = self.properties.user_id() {
            headers.insert(USER_ID_HEADER.to_owned(), text(user));
        }
        match self.parcel.purpose {
            Purpose::DeadLetter(reason) => {
                headers.insert(REASON_HEADER.to_owned(), text(reason.as_str()));
            }
            Purpose::Retry(_) => {
                headers.remove(REASON_HEADER);
            }
        }
        headers
    }
}

fn delay(consumer: &checked::Consumer, step: usize) -> Option<Duration> {
    consumer.retry.backoff.get(step).copied()
}

/// `delay` less up to `percent` of it, at least 1 ms.
///
/// A queue gives up expired messages at its head only. One that waits behind
/// another with less jitter is late by no more than the difference, and no
/// message waits longer than `delay`, which is the queue's own limit.
fn shortened(delay: Duration, percent: u8, random: u64) -> Duration {
    let most = delay.as_millis() * u128::from(percent.min(100)) / 100;
    let less = (most * u128::from(random)) >> 64;
    let left = delay.as_millis().saturating_sub(less).max(1);
    Duration::from_millis(u64::try_from(left).unwrap_or(u64::MAX))
}

/// amiquip's properties have no way to take one out.
fn without_expiration_and_user(properties: &AmqpProperties) -> AmqpProperties {
    let mut kept = AmqpProperties::default();
    macro_rules! keep {
        ($($get:ident $with:ident),*) => {
            $(if let Some(value) = properties.$get().clone() {
                kept = kept.$with(value);
            })*
        };
    }
    keep!(
        content_type with_content_type,
        content_encoding with_content_encoding,
        headers with_headers,
        priority with_priority,
        correlation_id with_correlation_id,
        reply_to with_reply_to,
        message_id with_message_id,
        timestamp with_timestamp,
        type_ with_type_,
        app_id with_app_id,
        cluster_id with_cluster_id
    );
    kept
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn jitter_only_shortens_and_by_no_more_than_its_share(
            ms in 10u64..=604_800_000, percent in 0u8..=100, random: u64,
        ) {
            let delay = Duration::from_millis(ms);
            let got = shortened(delay, percent, random);
            let least = delay.mul_f64(f64::from(100 - percent) / 100.0);
            prop_assert!(got <= delay);
            prop_assert!(got + Duration::from_millis(1) >= least);
            prop_assert!(got >= Duration::from_millis(1));
        }
    }
}
