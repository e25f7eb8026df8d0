//! From amiquip's delivery to the house's own message.

use std::time::{Duration, UNIX_EPOCH};

use amiquip::{AmqpValue, FieldTable};
use serde_json::{Map, Number, Value};

use crate::message::{Message, Repairs, hex};

/// Takes the content out of a delivery and leaves the hollow shell, which is
/// all that is needed to settle it.
pub(super) fn hollow_out(delivery: &mut amiquip::Delivery, repairs: Repairs) -> Message {
    let properties = std::mem::take(&mut delivery.properties);
    let exchange = std::mem::take(&mut delivery.exchange);
    let routing_key = std::mem::take(&mut delivery.routing_key);
    Message {
        attempts: 0,
        exchange: clean(&exchange),
        routing_key: clean(&routing_key),
        redelivered: delivery.redelivered,
        body: std::mem::take(&mut delivery.body),
        message_id: properties.message_id().clone(),
        // Some publishers send milliseconds; that is a far future, not an error.
        published_at: properties
            .timestamp()
            .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds))),
        headers: properties
            .headers()
            .as_ref()
            .map(object)
            .unwrap_or_default(),
        repairs,
    }
}

fn object(table: &FieldTable) -> Map<String, Value> {
    table
        .iter()
        .map(|(name, value)| (clean(name), json(value)))
        .collect()
}

/// Recursion ends at the guard's limit: deeper tables never reach amiquip.
fn json(value: &AmqpValue) -> Value {
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
        AmqpValue::DecimalValue(value) => decimal(value.scale, value.value),
        AmqpValue::LongString(value) => Value::String(clean(value)),
        AmqpValue::FieldArray(values) => values.iter().map(json).collect(),
        AmqpValue::Timestamp(seconds) => Value::from(*seconds),
        AmqpValue::FieldTable(table) => Value::Object(object(table)),
        AmqpValue::ByteArray(bytes) => Value::String(format!("\\x{}", hex(bytes))),
        AmqpValue::Void => Value::Null,
    }
}

/// JSON has no NaN and no infinities.
fn real(value: f64) -> Value {
    Number::from_f64(value).map_or_else(|| Value::String(value.to_string()), Value::Number)
}

fn decimal(scale: u8, value: u32) -> Value {
    real(f64::from(value) / 10f64.powi(i32::from(scale)))
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
        ]);
        let expected = serde_json::json!({
            "flag": true, "small": -1, "large": i64::MIN, "nan": "NaN",
            "text\u{FFFD}": "a\u{FFFD}b", "bytes": "\\x00ff", "list": [null], "time": 1,
        });
        assert_eq!(Value::Object(object(&table)), expected);
    }
}
