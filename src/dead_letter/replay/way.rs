//! What is done with a letter: one answer, for the plan and for the replay.
//! Pure.

use std::collections::BTreeSet;

use serde::Serialize;

use super::Order;
use crate::config::checked::Topology;
use crate::dead_letter::letter::Letter;
use crate::dead_letter::plan::Standing;
use crate::dead_letter::republish::Destination;

/// What is done with a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// It is published, and leaves the dead-letter queue.
    Replay,
    /// It leaves the dead-letter queue.
    Acknowledge,
    /// Its ledger row is forgotten, then it is published.
    Reprocess,
    /// It stays where it is.
    Leave,
}

impl Way {
    /// Whether it is published.
    #[must_use]
    pub fn publishes(self) -> bool {
        matches!(self, Self::Replay | Self::Reprocess)
    }
}

impl Order {
    /// What is done with a letter that stands there.
    #[must_use]
    pub fn way_of(&self, standing: Standing) -> Way {
        let elsewhere = matches!(self.destination, Destination::To { .. });
        match standing {
            Standing::NeverApplied => Way::Replay,
            Standing::AlreadyApplied if self.force => Way::Reprocess,
            Standing::AlreadyApplied => Way::Acknowledge,
            Standing::IdConflict if self.force => Way::Reprocess,
            Standing::IdConflict if elsewhere => Way::Replay,
            Standing::BeyondRetention if self.force => Way::Reprocess,
            Standing::BeyondRetention if self.beyond_retention => Way::Replay,
            Standing::NoId if elsewhere => Way::Replay,
            Standing::IdConflict
            | Standing::BeyondRetention
            | Standing::NoId
            | Standing::InProgress => Way::Leave,
        }
    }

    /// Why `letter` cannot be sent where it should go, if its origin is asked
    /// for and is none. `topology` is the consumer's.
    #[must_use]
    pub fn bar(&self, letter: &Letter, topology: &Topology) -> Option<String> {
        if self.destination != Destination::Origin {
            return None;
        }
        if !letter.knows_origin() {
            return Some(format!(
                "nothing tells where it was first published to{HINT}"
            ));
        }
        let (exchange, routing_key) = letter.origin();
        if !self.any_origin && !feeds(topology, exchange, routing_key) {
            return Some(format!(
                "it says that it was first published to exchange {exchange:?} with routing key \
                 {routing_key:?}, and no binding of the consumer is one to that{HINT}, \
                 --any-origin to wherever it says"
            ));
        }
        let dead_queue = &topology.dead_letter_queue;
        let leads_back = exchange == topology.dead_letter_exchange
            || (exchange.is_empty() && routing_key == dead_queue);
        leads_back.then(|| {
            format!("it was first published to the dead-letter queue {dead_queue} itself{HINT}")
        })
    }
}

/// Whether what is published there can be what the consumer is configured to
/// get.
fn feeds(topology: &Topology, exchange: &str, routing_key: &str) -> bool {
    match exchange {
        "" => routing_key == topology.queue,
        _ => topology.bindings.iter().any(|b| b.exchange == exchange),
    }
}

/// Where letters can go that go to their origin, for humans.
#[must_use]
pub fn origins(topology: &Topology) -> String {
    let exchanges: BTreeSet<&str> = topology
        .bindings
        .iter()
        .map(|binding| binding.exchange.as_str())
        .collect();
    let mut all: Vec<String> = vec![format!("queue {}", topology.queue)];
    all.extend(exchanges.into_iter().map(|name| format!("exchange {name}")));
    all.join(", ")
}

/// What to do about a letter that cannot go where it should.
pub(super) const HINT: &str = "; --to-queue sends it to the consumer's work queue";

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn order() -> Order {
        Order {
            destination: Destination::Queue,
            limit: None,
            rate: None,
            canary: None,
            beyond_retention: false,
            force: false,
            any_origin: false,
            despite_limit: false,
            hold: Duration::ZERO,
        }
    }

    fn ways(order: &Order) -> [Way; 6] {
        Standing::ALL.map(|standing| order.way_of(standing))
    }

    #[test]
    fn what_is_done_depends_on_the_options() {
        use Way::{Acknowledge, Leave, Replay, Reprocess};
        // Never applied, applied, in progress, beyond retention, conflict, no id.
        let plain = [Replay, Acknowledge, Leave, Leave, Leave, Leave];
        assert_eq!(ways(&order()), plain);
        let origin = Order {
            destination: Destination::Origin,
            ..order()
        };
        assert_eq!(ways(&origin), plain);
        let old = Order {
            beyond_retention: true,
            ..order()
        };
        assert_eq!(
            ways(&old),
            [Replay, Acknowledge, Leave, Replay, Leave, Leave]
        );
        let elsewhere = Order {
            destination: Destination::To {
                exchange: String::new(),
                routing_key: "bench".to_owned(),
            },
            ..order()
        };
        assert_eq!(
            ways(&elsewhere),
            [Replay, Acknowledge, Leave, Leave, Replay, Replay]
        );
        let force = Order {
            force: true,
            ..order()
        };
        assert_eq!(
            ways(&force),
            [Replay, Reprocess, Leave, Reprocess, Reprocess, Leave]
        );
    }
}
