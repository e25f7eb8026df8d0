//! From amiquip's delivery to the house's own message.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use serde_json::{Map, Number, Value};

use super::signed::Signer;
use crate::message::{
    ATTEMPTS_HEADER, About, CC_HEADER, EXCHANGE_HEADER, Message, OWN_HEADERS, REPLAYS_HEADER,
    ROUTING_KEY_HEADER, Repairs, SIGNATURE_HEADER, USER_ID_HEADER, hex,
};

/// Headers that the broker wrote about the journey of a message. In a copy
/// they would be a forgery, and where a broker believes them it drops a message
/// that seems to go in circles.
pub(super) const OF_THE_BROKER: [&str; 9] = [
    "x-death",
    "x-first-death-exchange",
    "x-first-death-queue",
    "x-first-death-reason",
    "x-last-death-exchange",
    "x-last-death-queue",
    "x-last-death-reason",
    "x-delivery-count",
    "x-acquired-count",
];

/// Takes the body out of a delivery and leaves the shell: what is needed to
/// settle it, or to make a copy of it. Of the daemon's own headers it has those
/// alone that `signer` has signed.
pub(super) fn hollow_out(
    delivery: &mut amiquip::Delivery,
    repairs: Repairs,
    signer: &Signer,
) -> Message {
    signer.believe(&mut delivery.properties, &delivery.body);
    let body = std::mem::take(&mut delivery.body);
    message(
        &delivery.properties,
        (&delivery.exchange, &delivery.routing_key),
        delivery.redelivered,
        body,
        repairs,
    )
}

/// The message that `body` is, published with `properties` to an exchange with
/// a routing key. Believes the daemon's own headers.
#[must_use]
pub fn message(
    properties: &AmqpProperties,
    (exchange, routing_key): (&str, &str),
    redelivered: bool,
    body: Vec<u8>,
    repairs: Repairs,
) -> Message {
    let header = |name: &str| properties.headers().as_ref()?.get(name);
    let text = |name: &str| match header(name)? {
        AmqpValue::LongString(text) => Some(clean(text)),
        _ => None,
    };
    Message {
        attempts: header(ATTEMPTS_HEADER).map_or(0, count),
        exchange: text(EXCHANGE_HEADER).unwrap_or_else(|| clean(exchange)),
        routing_key: text(ROUTING_KEY_HEADER).unwrap_or_else(|| clean(routing_key)),
        redelivered,
        replayed: header(REPLAYS_HEADER).is_some(),
        body,
        message_id: properties.message_id().clone(),
        content_type: properties.content_type().clone(),
        about: about(properties),
        published_at: properties.timestamp().and_then(time),
        headers: properties
            .headers()
            .as_ref()
            .map(headers)
            .unwrap_or_default(),
        repairs,
    }
}

fn about(properties: &AmqpProperties) -> About {
    let text = |text: &Option<String>| text.as_deref().map(clean);
    About {
        content_encoding: text(properties.content_encoding()),
        kind: text(properties.type_()),
        correlation_id: text(properties.correlation_id()),
        reply_to: text(properties.reply_to()),
        app_id: text(properties.app_id()),
        // The broker lets nobody publish a copy in the name of another.
        user_id: text(properties.user_id()).or_else(|| {
            match properties.headers().as_ref()?.get(USER_ID_HEADER)? {
                AmqpValue::LongString(user) => Some(clean(user)),
                _ => None,
            }
        }),
        expiration: text(properties.expiration()),
        priority: *properties.priority(),
    }
}

/// A number of attempts: whatever a publisher writes there, it is a count.
fn count(value: &AmqpValue) -> u32 {
    let count = match value {
        AmqpValue::ShortShortInt(count) => i64::from(*count),
        AmqpValue::ShortShortUInt(count) => i64::from(*count),
        AmqpValue::ShortInt(count) => i64::from(*count),
        AmqpValue::ShortUInt(count) => i64::from(*count),
        AmqpValue::LongInt(count) => i64::from(*count),
        AmqpValue::LongUInt(count) => i64::from(*count),
        AmqpValue::LongLongInt(count) => *count,
        _ => 0,
    };
    u32::try_from(count.max(0)).unwrap_or(u32::MAX)
}

/// The headers as they were published: without what the daemon added to its
/// copies, and with what it moved aside.
fn headers(table: &FieldTable) -> Map<String, Value> {
    let mut headers = object(table);
    let cc = headers.remove(CC_HEADER);
    for own in OWN_HEADERS {
        headers.remove(own);
    }
    headers.remove(SIGNATURE_HEADER);
    // A copy comes without what the broker wrote about the original: this is
    // about its way through a retry queue.
    if table.contains_key(ATTEMPTS_HEADER) {
        headers.retain(|name, _| !OF_THE_BROKER.contains(&name.as_str()));
    }
    if let Some(cc) = cc {
        headers.insert("CC".to_owned(), cc);
    }
    headers
}

fn object(table: &FieldTable) -> Map<String, Value> {
    table
        .iter()
        .map(|(name, value)| (clean(name), json(value)))
        .collect()
}

/// Recursion ends at the guard's limit: deeper tables never reach amiquip.
pub(super) fn json(value: &AmqpValue) -> Value {
    match value {
        AmqpValue::Boolean(value) => Value::Bool(*value),
        AmqpValue::ShortShortInt(value) => Value::from(*value),
        AmqpValue::ShortShortUInt(value) => Value::from(*value),
        AmqpValue::ShortInt(value) => Value::from(*value),
        AmqpValue::ShortUInt(value) => Value::from(*value),
        AmqpValue::LongInt(value) => Value::from(*value),
        AmqpValue::LongUInt(value) => Value::from(*value),
        AmqpValue::LongLongInt(value) => Value::from(*value),
        AmqpValue::Float(value) => real(f64::from(*value)),
        AmqpValue::Double(value) => real(*value),
        AmqpValue::DecimalValue(value) => decimal(value.scale, value.value.cast_signed()),
        AmqpValue::LongString(value) => Value::String(clean(value)),
        AmqpValue::FieldArray(values) => values.iter().map(json).collect(),
        // The library reads these without their sign.
        AmqpValue::Timestamp(seconds) => Value::from(seconds.cast_signed()),
        AmqpValue::FieldTable(table) => Value::Object(object(table)),
        AmqpValue::ByteArray(bytes) => Value::String(format!("\\x{}", hex(bytes))),
        AmqpValue::Void => Value::Null,
    }
}

/// JSON has no NaN and no infinities.
fn real(value: f64) -> Value {
    Number::from_f64(value).map_or_else(|| Value::String(value.to_string()), Value::Number)
}

/// The double that is nearest to it.
fn decimal(scale: u8, value: i32) -> Value {
    let text = format!("{value}e-{scale}");
    text.parse().map_or(Value::String(text), real)
}

/// The time of a `timestamp` property. Some publishers send milliseconds; that
/// is a far future, not an error.
fn time(seconds: u64) -> Option<SystemTime> {
    let seconds = seconds.cast_signed();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    match seconds >= 0 {
        true => UNIX_EPOCH.checked_add(distance),
        false => UNIX_EPOCH.checked_sub(distance),
    }
}

/// PostgreSQL cannot hold NUL in text or in JSON.
fn clean(text: &str) -> String {
    text.replace('\0', "\u{FFFD}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_value_becomes_json() {
        let table = FieldTable::from([
            ("flag".to_owned(), AmqpValue::Boolean(true)),
            ("small".to_owned(), AmqpValue::ShortShortInt(-1)),
            ("large".to_owned(), AmqpValue::LongLongInt(i64::MIN)),
            ("nan".to_owned(), AmqpValue::Double(f64::NAN)),
            (
                "text\0".to_owned(),
                AmqpValue::LongString("a\0b".to_owned()),
            ),
            ("bytes".to_owned(), AmqpValue::ByteArray(vec![0, 255])),
            (
                "list".to_owned(),
                AmqpValue::FieldArray(vec![AmqpValue::Void]),
            ),
            ("time".to_owned(), AmqpValue::Timestamp(1)),
            (
                "before 1970".to_owned(),
                AmqpValue::Timestamp((-1_i64).cast_unsigned()),
            ),
        ]);
        let expected = serde_json::json!({
            "flag": true, "small": -1, "large": i64::MIN, "nan": "NaN",
            "text\u{FFFD}": "a\u{FFFD}b", "bytes": "\\x00ff", "list": [null], "time": 1,
            "before 1970": -1,
        });
        assert_eq!(Value::Object(object(&table)), expected);
    }
}
