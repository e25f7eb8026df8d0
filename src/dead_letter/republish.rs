//! A dead letter as it is published again: where it goes, and what it carries.
//! Pure.

use crate::broker::properties::{Field, Properties};
use crate::message::{
    ATTEMPTS_HEADER, CC_HEADER, EXCHANGE_HEADER, REASON_HEADER, REPLAY_HEADER, REPLAYED_AT_HEADER,
    REPLAYS_HEADER, ROUTING_KEY_HEADER,
};

/// Where dead letters are replayed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// The consumer's work queue, and no other.
    Queue,
    /// The exchange that each was first published to, with its routing key.
    Origin,
    /// This exchange, with this routing key.
    To {
        /// Exchange; empty for the default exchange.
        exchange: String,
        /// Routing key.
        routing_key: String,
    },
}

/// Where a message was first published to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin<'a> {
    /// Exchange; empty for the default exchange.
    pub exchange: &'a str,
    /// Routing key.
    pub routing_key: &'a str,
}

/// What a replay writes on each letter.
#[derive(Debug, Clone, Copy)]
pub struct Stamp<'a> {
    /// Which replay it is.
    pub run: &'a str,
    /// When, in seconds since 1970.
    pub at: i64,
    /// The user that publishes.
    pub user: &'a str,
}

/// A letter to be published.
#[derive(Debug, Clone, PartialEq)]
pub struct Outbound {
    /// Exchange; empty for the default exchange.
    pub exchange: String,
    /// Routing key.
    pub routing_key: String,
    /// Everything but the body.
    pub properties: Properties,
}

/// The letter with these `properties`, on its way to `destination` of the
/// consumer of `queue`.
///
/// It begins anew: without attempts, without the reason of its death, without
/// what the broker wrote about its way. Where it does not go back to its origin,
/// the origin is written on it, so that handlers see what they saw the first
/// time; and the queues that its `CC` named do not get it again.
#[must_use]
pub fn outbound(
    properties: &Properties,
    origin: Origin<'_>,
    destination: &Destination,
    queue: &str,
    stamp: Stamp<'_>,
) -> Outbound {
    let mut properties = properties.clone().without_journey().moved_aside(stamp.user);
    for header in [ATTEMPTS_HEADER, REASON_HEADER] {
        properties.remove_header(header);
    }
    let replays = properties.header(REPLAYS_HEADER).map_or(0, count);
    let replays = Field::Int64(replays.saturating_add(1));
    properties.set_header(REPLAYS_HEADER, replays);
    properties.set_header(REPLAYED_AT_HEADER, Field::Timestamp(stamp.at));
    properties.set_header(REPLAY_HEADER, Field::Text(stamp.run.to_owned()));
    let route = match destination {
        Destination::Queue => ("", queue),
        Destination::Origin => (origin.exchange, origin.routing_key),
        Destination::To {
            exchange,
            routing_key,
        } => (exchange.as_str(), routing_key.as_str()),
    };
    let written = [
        (EXCHANGE_HEADER, origin.exchange),
        (ROUTING_KEY_HEADER, origin.routing_key),
    ];
    for (header, value) in written {
        match destination {
            Destination::Origin => drop(properties.remove_header(header)),
            Destination::Queue | Destination::To { .. } => {
                properties.set_header(header, Field::Text(value.to_owned()));
            }
        }
    }
    // Through the default exchange it could name any queue of the broker's.
    if *destination == Destination::Origin
        && !origin.exchange.is_empty()
        && let Some(cc) = properties.remove_header(CC_HEADER)
    {
        properties.set_header("CC", cc);
    }
    Outbound {
        exchange: route.0.to_owned(),
        routing_key: route.1.to_owned(),
        properties,
    }
}

/// Whatever a publisher writes there, it is a count.
fn count(field: &Field) -> i64 {
    let count = match field {
        Field::Int8(count) => i64::from(*count),
        Field::Uint8(count) => i64::from(*count),
        Field::Int16(count) => i64::from(*count),
        Field::Uint16(count) => i64::from(*count),
        Field::Int32(count) => i64::from(*count),
        Field::Uint32(count) => i64::from(*count),
        Field::Int64(count) => *count,
        _ => 0,
    };
    count.max(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: Origin<'_> = Origin {
        exchange: "shop",
        routing_key: "order.new",
    };
    const STAMP: Stamp<'_> = Stamp {
        run: "r",
        at: 7,
        user: "guest",
    };

    fn text(text: &str) -> Field {
        Field::Text(text.to_owned())
    }

    fn dead() -> Properties {
        let mut properties = Properties {
            message_id: Some("m".to_owned()),
            user_id: Some("erika".to_owned()),
            ..Properties::default()
        };
        for (name, value) in [
            ("mine", Field::Uint8(1)),
            ("CC", Field::List(vec![text("other")])),
            ("x-death", Field::List(Vec::new())),
            ("x-first-death-queue", text("orders")),
            (ATTEMPTS_HEADER, Field::Int64(5)),
            (REASON_HEADER, text("max-attempts")),
        ] {
            properties.set_header(name, value);
        }
        properties
    }

    fn names(outbound: &Outbound) -> Vec<&str> {
        let headers = outbound.properties.headers.as_ref().unwrap();
        headers.keys().map(String::as_str).collect()
    }

    #[test]
    fn to_the_work_queue_it_begins_anew_and_remembers_its_origin() {
        let first = outbound(&dead(), ORIGIN, &Destination::Queue, "orders", STAMP);
        assert_eq!(
            (first.exchange.as_str(), first.routing_key.as_str()),
            ("", "orders")
        );
        assert_eq!(
            names(&first),
            [
                "ackonce-cc",
                "ackonce-exchange",
                "ackonce-replay",
                "ackonce-replayed-at",
                "ackonce-replays",
                "ackonce-routing-key",
                "ackonce-user-id",
                "mine",
            ]
        );
        let header = |name: &str| first.properties.header(name).cloned();
        assert_eq!(header(EXCHANGE_HEADER), Some(text("shop")));
        assert_eq!(header(ROUTING_KEY_HEADER), Some(text("order.new")));
        assert_eq!(header(REPLAYS_HEADER), Some(Field::Int64(1)));
        assert_eq!(header(REPLAYED_AT_HEADER), Some(Field::Timestamp(7)));
        assert_eq!(header("mine"), Some(Field::Uint8(1)));
        assert_eq!(first.properties.message_id.as_deref(), Some("m"));
        assert_eq!(first.properties.user_id, None);
        let again = outbound(
            &first.properties,
            ORIGIN,
            &Destination::Queue,
            "orders",
            STAMP,
        );
        assert_eq!(
            again.properties.header(REPLAYS_HEADER),
            Some(&Field::Int64(2))
        );
    }

    #[test]
    fn to_its_origin_it_is_as_it_was_first_published() {
        let copy = outbound(&dead(), ORIGIN, &Destination::Queue, "orders", STAMP).properties;
        for properties in [dead(), copy] {
            let sent = outbound(&properties, ORIGIN, &Destination::Origin, "orders", STAMP);
            assert_eq!(
                (sent.exchange.as_str(), sent.routing_key.as_str()),
                ("shop", "order.new")
            );
            let expected = [
                "CC",
                "ackonce-replay",
                "ackonce-replayed-at",
                "ackonce-replays",
                "ackonce-user-id",
                "mine",
            ];
            assert_eq!(names(&sent), expected);
        }
    }

    #[test]
    fn whatever_stands_in_its_count_of_replays_it_is_counted_on() {
        for (found, expected) in [
            (text("many"), 1),
            (Field::Int8(-4), 1),
            (Field::Uint8(4), 5),
            (Field::Int64(i64::MAX), i64::MAX),
        ] {
            let mut properties = dead();
            properties.set_header(REPLAYS_HEADER, found);
            let sent = outbound(&properties, ORIGIN, &Destination::Queue, "orders", STAMP);
            let counted = sent.properties.header(REPLAYS_HEADER);
            assert_eq!(counted, Some(&Field::Int64(expected)));
        }
    }
}
