//! Whether what expires in a retry queue comes back to the work queue. Where the
//! queue is not as the daemon would make it, or cannot be compared, a message
//! that expires at once has to come back: until it has, nothing that could be
//! lost is sent there.
//!
//! Several daemons may consume one queue, and each gets the others' probes too.
//! So a probe is sent again and again until one of the daemon's own has come.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, AmqpValue, FieldTable};

use super::parts::{self, Part};
use super::{Link, PROBE_HEADER, TopologyError, compare};
use crate::config::checked::Consumer;
use crate::random;

/// The header of a probe that names the retry queue.
const QUEUE_HEADER: &str = "ackonce-probe-queue";

/// The header of a probe that only who has sent it knows.
const NONCE_HEADER: &str = "ackonce-probe-nonce";

const BODY: &[u8] = b"ackonce asks whether what expires in a retry queue comes back. \
    This is no message: drop it.";

/// The retry queues that are not as the daemon would make them, or that the
/// user may not compare.
pub(super) fn unproved(
    link: &mut Link,
    consumer: &Consumer,
    within: Duration,
) -> Result<Vec<String>, TopologyError> {
    let mut unproved = Vec::new();
    for part in parts::retry_queues(consumer) {
        match (compare(link, &part, within), part) {
            (Ok(_), _) => {}
            (
                Err(TopologyError::Mismatch { .. } | TopologyError::Denied { .. }),
                Part::Queue { name, .. },
            ) => unproved.push(name),
            (Err(error), _) => return Err(error),
        }
    }
    Ok(unproved)
}

/// What is known of the retry queues that were unproved when the connection was
/// made; all others lead back.
pub(in crate::broker) struct WaysBack {
    queues: Vec<Retry>,
    nonce: String,
}

/// What is known of one retry queue.
struct Retry {
    name: String,
    /// When a probe was in it for the first time.
    probed: OnceLock<Instant>,
    proved: AtomicBool,
}

/// A message to be sent to a retry queue.
pub(in crate::broker) struct Probe {
    pub(in crate::broker) queue: String,
    pub(in crate::broker) properties: AmqpProperties,
    pub(in crate::broker) body: &'static [u8],
}

impl WaysBack {
    pub(in crate::broker) fn new(unproved: Vec<String>) -> Self {
        let retry = |name| Retry {
            name,
            probed: OnceLock::new(),
            proved: AtomicBool::new(false),
        };
        Self {
            queues: unproved.into_iter().map(retry).collect(),
            nonce: format!("{:016x}", random::draw()),
        }
    }

    fn find(&self, queue: &str) -> Option<&Retry> {
        self.queues.iter().find(|retry| retry.name == queue)
    }

    /// Whether what expires in `queue` is known to come back.
    pub(in crate::broker) fn is_proved(&self, queue: &str) -> bool {
        let retry = self.find(queue);
        retry.is_none_or(|retry| retry.proved.load(Ordering::Acquire))
    }

    /// The queues of which it is not known.
    pub(in crate::broker) fn unproved(&self) -> impl Iterator<Item = &str> {
        let unproved = |retry: &&Retry| !retry.proved.load(Ordering::Acquire);
        self.queues
            .iter()
            .filter(unproved)
            .map(|retry| retry.name.as_str())
    }

    /// The broker has confirmed a probe to `queue`.
    pub(in crate::broker) fn probed(&self, queue: &str) {
        if let Some(retry) = self.find(queue) {
            retry.probed.get_or_init(Instant::now);
        }
    }

    /// For how long the first probe to `queue` could have come back.
    pub(in crate::broker) fn probed_for(&self, queue: &str) -> Option<Duration> {
        Some(self.find(queue)?.probed.get()?.elapsed())
    }

    /// One probe for each queue that is unproved.
    pub(in crate::broker) fn probes(&self, consumer: &Consumer) -> Vec<Probe> {
        let text = |text: &str| AmqpValue::LongString(text.to_owned());
        let probe = |queue: &str| Probe {
            queue: queue.to_owned(),
            properties: AmqpProperties::default()
                .with_content_type("text/plain".to_owned())
                .with_expiration("0".to_owned())
                .with_headers(FieldTable::from([
                    (PROBE_HEADER.to_owned(), text(&consumer.name)),
                    (QUEUE_HEADER.to_owned(), text(queue)),
                    (NONCE_HEADER.to_owned(), text(&self.nonce)),
                ])),
            body: BODY,
        };
        self.unproved().map(probe).collect()
    }

    /// Whether a delivery is such a probe, of whatever daemon. One of our own
    /// proves its queue; of those of others nothing is believed.
    pub(in crate::broker) fn take(&self, delivery: &amiquip::Delivery) -> bool {
        let headers = delivery.properties.headers().as_ref();
        let header = |name: &str| match headers?.get(name)? {
            AmqpValue::LongString(text) => Some(text.as_str()),
            _ => None,
        };
        let (Some(queue), Some(nonce)) = (header(QUEUE_HEADER), header(NONCE_HEADER)) else {
            return false;
        };
        if delivery.body != BODY {
            return false;
        }
        if let Some(retry) = self.find(queue)
            && nonce == self.nonce
        {
            retry.proved.store(true, Ordering::Release);
        }
        true
    }
}
