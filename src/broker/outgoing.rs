//! A message to be published: plain data, what it must keep to, and how it
//! looks in AMQP. Sends nothing.
//!
//! The limits are checked before anything is sent, because the broker answers
//! a breach by closing the connection, which takes every unconfirmed message
//! with it.

use std::hash::{BuildHasher, Hash, Hasher, RandomState};

use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use serde_json::{Map, Value};
use thiserror::Error;

use super::confirms::Likeness;

/// Longest exchange, routing key, message id, content type and header name, in
/// bytes: AMQP short strings.
pub const SHORT_STRING_MAX_BYTES: usize = 255;

/// Longest encoded properties, headers included, in bytes, where frames may be
/// as long as `frame_max`: they must fit into one, with 12 bytes of class and
/// body size before them, and 8 bytes around them.
#[must_use]
pub const fn properties_max(frame_max: u32) -> usize {
    (frame_max as usize).saturating_sub(8 + 12)
}

/// Most headers, those in nested tables and items of arrays counted.
pub const HEADERS_MAX: usize = 4_096;

/// Deepest nesting of headers; what the guard lets in again.
pub const HEADER_DEPTH_MAX: usize = 32;

/// Longest body, in bytes: RabbitMQ's default `max_message_size` up to 3.13.
/// Since 4.0 it is 16 MiB, and the broker says so when it is exceeded.
pub const BODY_MAX_BYTES: usize = 128 * 1024 * 1024;

/// `delivery_mode` of a message that is written to disk.
const PERSISTENT: u8 = 2;

/// A message to be published.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outgoing {
    /// Exchange; empty for the default exchange, which routes to the queue
    /// named by the routing key.
    pub exchange: String,
    /// Routing key.
    pub routing_key: String,
    /// Body.
    pub body: Vec<u8>,
    /// The `message_id` property.
    pub message_id: Option<String>,
    /// The `content_type` property.
    pub content_type: Option<String>,
    /// The `timestamp` property, in seconds since 1970.
    pub timestamp: Option<u64>,
    /// The header table. Integers become 64-bit, fractions doubles, objects
    /// tables.
    pub headers: Map<String, Value>,
}

/// Why a message cannot be sent at all. Nothing was sent.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Unfit {
    /// A short string is too long.
    #[error("its {what} has {bytes} bytes, and AMQP allows at most {SHORT_STRING_MAX_BYTES}")]
    TooLong {
        /// Which one.
        what: &'static str,
        /// How long it is.
        bytes: usize,
    },
    /// The name of a header is too long.
    #[error(
        "a header's name has {bytes} bytes, and AMQP allows at most {SHORT_STRING_MAX_BYTES}: \
         {name:.40}…"
    )]
    HeaderName {
        /// The name.
        name: String,
        /// How long it is.
        bytes: usize,
    },
    /// Too many headers.
    #[error("it has more than {HEADERS_MAX} headers, nested ones counted")]
    TooManyHeaders,
    /// Headers nested too deep.
    #[error("its headers are nested more than {HEADER_DEPTH_MAX} levels deep")]
    HeadersTooDeep,
    /// A header that AMQP has no type for.
    #[error("its header {name:?} is {number}, which does not fit into 64 bits with a sign")]
    HeaderNumber {
        /// The outermost header it stands in.
        name: String,
        /// The number.
        number: String,
    },
    /// Properties and headers do not fit into a frame.
    #[error(
        "its properties and headers take {bytes} bytes, and at most {most} fit into a frame of \
         this connection"
    )]
    PropertiesTooLarge {
        /// How many they take.
        bytes: usize,
        /// How many fit.
        most: usize,
    },
    /// The body is too long.
    #[error("its body has {bytes} bytes, and at most {BODY_MAX_BYTES} are allowed")]
    BodyTooLarge {
        /// How long it is.
        bytes: usize,
    },
}

/// Its properties as AMQP has them, and how many bytes they take: at most
/// `most`.
pub(super) fn encode(message: &Outgoing, most: usize) -> Result<(AmqpProperties, usize), Unfit> {
    short("exchange", &message.exchange)?;
    short("routing key", &message.routing_key)?;
    if message.body.len() > BODY_MAX_BYTES {
        return Err(Unfit::BodyTooLarge {
            bytes: message.body.len(),
        });
    }
    let mut properties = AmqpProperties::default().with_delivery_mode(PERSISTENT);
    // Property flags, and the delivery mode.
    let mut bytes = 2 + 1;
    if let Some(id) = &message.message_id {
        bytes += short("message id", id)?;
        properties = properties.with_message_id(id.clone());
    }
    if let Some(content_type) = &message.content_type {
        bytes += short("content type", content_type)?;
        properties = properties.with_content_type(content_type.clone());
    }
    if let Some(timestamp) = message.timestamp {
        bytes += 8;
        properties = properties.with_timestamp(timestamp);
    }
    if !message.headers.is_empty() {
        let mut tally = Tally::default();
        properties = properties.with_headers(tally.table(&message.headers, 1)?);
        bytes += tally.bytes;
    }
    if bytes > most {
        return Err(Unfit::PropertiesTooLarge { bytes, most });
    }
    Ok((properties, bytes))
}

/// Properties that came with a delivery, made persistent, and how many bytes
/// they take; checked against the same limits as [`encode`]'s. Its body has no
/// limit here: the broker took it once, and says so if it no longer would.
pub(super) fn persist(
    (exchange, routing_key): (&str, &str),
    properties: AmqpProperties,
    most: usize,
) -> Result<(AmqpProperties, usize), Unfit> {
    short("exchange", exchange)?;
    short("routing key", routing_key)?;
    let texts = [
        ("content type", properties.content_type()),
        ("content encoding", properties.content_encoding()),
        ("correlation id", properties.correlation_id()),
        ("reply-to", properties.reply_to()),
        ("expiration", properties.expiration()),
        ("message id", properties.message_id()),
        ("type", properties.type_()),
        ("user id", properties.user_id()),
        ("app id", properties.app_id()),
        ("cluster id", properties.cluster_id()),
    ];
    // Property flags, and the delivery mode.
    let mut bytes = 2 + 1;
    for (what, text) in texts {
        bytes += text.as_ref().map_or(Ok(0), |text| short(what, text))?;
    }
    bytes += usize::from(properties.priority().is_some());
    bytes += properties.timestamp().map_or(0, |_| 8);
    let headers = properties.headers().as_ref();
    // The time that amiquip takes to encode them grows with the square.
    if headers.map_or(0, count) > HEADERS_MAX {
        return Err(Unfit::TooManyHeaders);
    }
    bytes += headers.map_or(0, table_bytes);
    if bytes > most {
        return Err(Unfit::PropertiesTooLarge { bytes, most });
    }
    Ok((properties.with_delivery_mode(PERSISTENT), bytes))
}

/// How many values a table holds, nested ones counted.
fn count(table: &FieldTable) -> usize {
    table.values().map(count_in).sum()
}

fn count_in(value: &AmqpValue) -> usize {
    1 + match value {
        AmqpValue::FieldArray(values) => values.iter().map(count_in).sum(),
        AmqpValue::FieldTable(table) => count(table),
        _ => 0,
    }
}

/// What a table takes on the wire. It came through the guard, so that it is no
/// deeper than that lets in.
fn table_bytes(table: &FieldTable) -> usize {
    let entries = table
        .iter()
        .map(|(name, value)| 1 + name.len() + value_bytes(value));
    4 + entries.sum::<usize>()
}

fn value_bytes(value: &AmqpValue) -> usize {
    1 + match value {
        AmqpValue::Void => 0,
        AmqpValue::Boolean(_) | AmqpValue::ShortShortInt(_) | AmqpValue::ShortShortUInt(_) => 1,
        AmqpValue::ShortInt(_) | AmqpValue::ShortUInt(_) => 2,
        AmqpValue::LongInt(_) | AmqpValue::LongUInt(_) | AmqpValue::Float(_) => 4,
        AmqpValue::DecimalValue(_) => 5,
        AmqpValue::LongLongInt(_) | AmqpValue::Double(_) | AmqpValue::Timestamp(_) => 8,
        AmqpValue::LongString(text) => 4 + text.len(),
        AmqpValue::ByteArray(bytes) => 4 + bytes.len(),
        AmqpValue::FieldArray(values) => 4 + values.iter().map(value_bytes).sum::<usize>(),
        AmqpValue::FieldTable(table) => table_bytes(table),
    }
}

/// The bytes a short string takes, its length byte included.
fn short(what: &'static str, text: &str) -> Result<usize, Unfit> {
    if text.len() > SHORT_STRING_MAX_BYTES {
        return Err(Unfit::TooLong {
            what,
            bytes: text.len(),
        });
    }
    Ok(1 + text.len())
}

/// Counts while it converts, so that nothing over the limits is built.
#[derive(Default)]
struct Tally {
    bytes: usize,
    headers: usize,
    /// The outermost header at work, for errors.
    name: String,
}

impl Tally {
    fn table(&mut self, map: &Map<String, Value>, depth: usize) -> Result<FieldTable, Unfit> {
        self.bytes += 4;
        let mut table = FieldTable::new();
        for (name, value) in map {
            if name.len() > SHORT_STRING_MAX_BYTES {
                return Err(Unfit::HeaderName {
                    name: name.clone(),
                    bytes: name.len(),
                });
            }
            if depth == 1 {
                self.name.clone_from(name);
            }
            self.bytes += 1 + name.len();
            table.insert(name.clone(), self.value(value, depth)?);
        }
        Ok(table)
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<AmqpValue, Unfit> {
        if depth > HEADER_DEPTH_MAX {
            return Err(Unfit::HeadersTooDeep);
        }
        self.headers += 1;
        if self.headers > HEADERS_MAX {
            return Err(Unfit::TooManyHeaders);
        }
        self.bytes += 1;
        Ok(match value {
            Value::Null => AmqpValue::Void,
            Value::Bool(flag) => {
                self.bytes += 1;
                AmqpValue::Boolean(*flag)
            }
            Value::Number(number) => {
                self.bytes += 8;
                self.number(number)?
            }
            Value::String(text) => {
                self.bytes += 4 + text.len();
                AmqpValue::LongString(text.clone())
            }
            Value::Array(items) => {
                self.bytes += 4;
                let items = items.iter().map(|item| self.value(item, depth + 1));
                AmqpValue::FieldArray(items.collect::<Result<_, _>>()?)
            }
            Value::Object(map) => AmqpValue::FieldTable(self.table(map, depth + 1)?),
        })
    }

    fn number(&self, number: &serde_json::Number) -> Result<AmqpValue, Unfit> {
        if let Some(integer) = number.as_i64() {
            return Ok(AmqpValue::LongLongInt(integer));
        }
        match number.as_f64() {
            Some(fraction) if !number.is_u64() => Ok(AmqpValue::Double(fraction)),
            _ => Err(Unfit::HeaderNumber {
                name: self.name.clone(),
                number: number.to_string(),
            }),
        }
    }
}

/// Hashes messages for [`Likeness`], with keys of its own.
#[derive(Debug, Default)]
pub(super) struct Likener(RandomState);

impl Likener {
    /// Of a message as it is published, or as it was returned.
    pub(super) fn of(
        &self,
        exchange: &str,
        routing_key: &str,
        body: &[u8],
        properties: &AmqpProperties,
    ) -> Likeness {
        let mut hasher = self.0.build_hasher();
        (exchange, routing_key, properties.message_id(), body).hash(&mut hasher);
        let loose = hasher.finish();
        (properties.content_type(), properties.content_encoding()).hash(&mut hasher);
        (properties.delivery_mode(), properties.priority()).hash(&mut hasher);
        (properties.correlation_id(), properties.reply_to()).hash(&mut hasher);
        (properties.expiration(), properties.timestamp()).hash(&mut hasher);
        (properties.type_(), properties.user_id()).hash(&mut hasher);
        (properties.app_id(), properties.cluster_id()).hash(&mut hasher);
        if let Some(headers) = properties.headers() {
            hash_table(headers, &mut hasher);
        }
        Likeness {
            exact: hasher.finish(),
            loose,
        }
    }
}

fn hash_table(table: &FieldTable, hasher: &mut impl Hasher) {
    table.len().hash(hasher);
    for (name, value) in table {
        name.hash(hasher);
        hash_value(value, hasher);
    }
}

fn hash_value(value: &AmqpValue, hasher: &mut impl Hasher) {
    std::mem::discriminant(value).hash(hasher);
    match value {
        AmqpValue::Void => {}
        AmqpValue::Boolean(flag) => flag.hash(hasher),
        AmqpValue::ShortShortInt(integer) => integer.hash(hasher),
        AmqpValue::ShortShortUInt(integer) => integer.hash(hasher),
        AmqpValue::ShortInt(integer) => integer.hash(hasher),
        AmqpValue::ShortUInt(integer) => integer.hash(hasher),
        AmqpValue::LongInt(integer) => integer.hash(hasher),
        AmqpValue::LongUInt(integer) => integer.hash(hasher),
        AmqpValue::LongLongInt(integer) => integer.hash(hasher),
        AmqpValue::Float(fraction) => fraction.to_bits().hash(hasher),
        AmqpValue::Double(fraction) => fraction.to_bits().hash(hasher),
        AmqpValue::DecimalValue(decimal) => (decimal.scale, decimal.value).hash(hasher),
        AmqpValue::LongString(text) => text.hash(hasher),
        AmqpValue::ByteArray(bytes) => bytes.hash(hasher),
        AmqpValue::Timestamp(seconds) => seconds.hash(hasher),
        AmqpValue::FieldArray(items) => {
            items.len().hash(hasher);
            items.iter().for_each(|item| hash_value(item, hasher));
        }
        AmqpValue::FieldTable(table) => hash_table(table, hasher),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MOST: usize = properties_max(131_072);

    fn with_headers(headers: Value) -> Outgoing {
        let Value::Object(headers) = headers else {
            panic!("headers are an object");
        };
        Outgoing {
            headers,
            ..Outgoing::default()
        }
    }

    #[test]
    fn messages_that_differ_in_anything_at_all_are_not_alike() {
        let likener = Likener::default();
        let with = |value| {
            let table = FieldTable::from([("id".to_owned(), value)]);
            AmqpProperties::default().with_headers(table)
        };
        let pairs = [
            (with(AmqpValue::LongInt(1)), with(AmqpValue::LongInt(2))),
            (with(AmqpValue::ShortUInt(1)), with(AmqpValue::ShortUInt(2))),
            (with(AmqpValue::Timestamp(1)), with(AmqpValue::Timestamp(2))),
            (
                with(AmqpValue::ByteArray(vec![1])),
                with(AmqpValue::ByteArray(vec![2])),
            ),
            (
                AmqpProperties::default().with_correlation_id("a".to_owned()),
                AmqpProperties::default().with_correlation_id("b".to_owned()),
            ),
        ];
        for (one, other) in pairs {
            let of = |properties| likener.of("e", "k", b"body", properties).exact;
            assert_ne!(of(&one), of(&other), "{one:?}");
            assert_eq!(of(&one), of(&one.clone()));
        }
    }

    #[test]
    fn strings_over_255_bytes_are_refused_by_name() {
        let long = || "é".repeat(128);
        let cases = [
            (
                "exchange",
                Outgoing {
                    exchange: long(),
                    ..Outgoing::default()
                },
            ),
            (
                "routing key",
                Outgoing {
                    routing_key: long(),
                    ..Outgoing::default()
                },
            ),
            (
                "message id",
                Outgoing {
                    message_id: Some(long()),
                    ..Outgoing::default()
                },
            ),
            (
                "content type",
                Outgoing {
                    content_type: Some(long()),
                    ..Outgoing::default()
                },
            ),
        ];
        for (expected, message) in cases {
            let error = encode(&message, MOST).unwrap_err();
            assert_eq!(
                error,
                Unfit::TooLong {
                    what: expected,
                    bytes: 256
                }
            );
        }
        let error = encode(&with_headers(json!({ long(): 1 })), MOST).unwrap_err();
        assert!(
            matches!(error, Unfit::HeaderName { bytes: 256, .. }),
            "{error}"
        );
        let fits = Outgoing {
            message_id: Some("x".repeat(255)),
            ..Outgoing::default()
        };
        assert!(encode(&fits, MOST).is_ok());
    }

    #[test]
    fn headers_without_bound_are_refused() {
        let many: Map<_, _> = (0..=HEADERS_MAX)
            .map(|i| (i.to_string(), json!(i)))
            .collect();
        assert_eq!(
            encode(&with_headers(many.into()), MOST).unwrap_err(),
            Unfit::TooManyHeaders
        );

        let nested = |levels| (0..levels).fold(json!(1), |inner, _| json!([inner]));
        assert!(
            encode(
                &with_headers(json!({ "h": nested(HEADER_DEPTH_MAX - 1) })),
                MOST
            )
            .is_ok()
        );
        let error = encode(
            &with_headers(json!({ "h": nested(HEADER_DEPTH_MAX) })),
            MOST,
        )
        .unwrap_err();
        assert_eq!(error, Unfit::HeadersTooDeep);

        let error = encode(&with_headers(json!({ "big": { "n": u64::MAX } })), MOST).unwrap_err();
        assert_eq!(
            error,
            Unfit::HeaderNumber {
                name: "big".into(),
                number: u64::MAX.to_string()
            }
        );

        let error = encode(&with_headers(json!({ "h": "x".repeat(131_072) })), MOST).unwrap_err();
        assert!(matches!(error, Unfit::PropertiesTooLarge { .. }), "{error}");
    }

    #[test]
    fn the_likeness_tells_every_part_of_a_message_apart() {
        let likener = Likener::default();
        let base = || Outgoing {
            exchange: "e".into(),
            routing_key: "k".into(),
            body: b"b".to_vec(),
            message_id: Some("m".into()),
            content_type: Some("c".into()),
            timestamp: Some(1),
            headers: with_headers(json!({ "a": [1, true, null, 1.5, { "x": "y" }] })).headers,
        };
        let of = |message: &Outgoing| {
            let (properties, _) = encode(message, MOST).unwrap();
            likener.of(
                &message.exchange,
                &message.routing_key,
                &message.body,
                &properties,
            )
        };
        assert_eq!(of(&base()), of(&base()));
        let loosely_alike = [
            Outgoing {
                content_type: None,
                ..base()
            },
            Outgoing {
                timestamp: Some(2),
                ..base()
            },
            Outgoing {
                headers: Map::new(),
                ..base()
            },
            Outgoing {
                headers: with_headers(json!({ "a": [1, true, null, 1.5, { "x": "z" }] })).headers,
                ..base()
            },
        ];
        for other in loosely_alike {
            assert_ne!(of(&other).exact, of(&base()).exact, "{other:?}");
            assert_eq!(of(&other).loose, of(&base()).loose, "{other:?}");
        }
        let different = [
            Outgoing {
                exchange: "f".into(),
                ..base()
            },
            Outgoing {
                routing_key: "l".into(),
                ..base()
            },
            Outgoing {
                body: b"c".to_vec(),
                ..base()
            },
            Outgoing {
                message_id: None,
                ..base()
            },
            Outgoing {
                exchange: "ek".into(),
                routing_key: String::new(),
                ..base()
            },
        ];
        for other in different {
            assert_ne!(of(&other).loose, of(&base()).loose, "{other:?}");
        }
    }
}
