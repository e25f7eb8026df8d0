//! The properties of a message with all their AMQP types, as plain data and as
//! JSON: what goes into a file comes out of it as it was.
//!
//! In JSON a text is a string, a truth value a boolean, a 64-bit integer a
//! number, a table an object, a list an array, nothing `null`. Every other type
//! is an object of two members, `{"amqp": TYPE, "value": …}`, and so is a table
//! that has an entry called `amqp` itself.

use std::collections::BTreeMap;

use amiquip::{AmqpProperties, AmqpValue, FieldTable};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};

use super::convert;
use crate::message::{CC_HEADER, USER_ID_HEADER};

/// A value in a header table.
#[derive(Debug, Clone, PartialEq)]
pub enum Field {
    /// Nothing.
    Void,
    /// A truth value.
    Bool(bool),
    /// 8 bits with a sign.
    Int8(i8),
    /// 8 bits.
    Uint8(u8),
    /// 16 bits with a sign.
    Int16(i16),
    /// 16 bits.
    Uint16(u16),
    /// 32 bits with a sign.
    Int32(i32),
    /// 32 bits.
    Uint32(u32),
    /// 64 bits with a sign.
    Int64(i64),
    /// A fraction of 32 bits.
    Float(f32),
    /// A fraction of 64 bits.
    Double(f64),
    /// `value` divided by ten `scale` times.
    Decimal {
        /// Digits behind the point.
        scale: u8,
        /// All digits, with their sign.
        value: i32,
    },
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// Seconds since 1970, negative before.
    Timestamp(i64),
    /// A list.
    List(Vec<Field>),
    /// A table.
    Table(Fields),
}

/// A header table.
pub type Fields = BTreeMap<String, Field>;

/// The member that names a type in JSON.
const TYPE: &str = "amqp";

/// The member beside it.
const VALUE: &str = "value";

/// What a message carries beside its body.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Properties {
    /// MIME type of the body.
    pub content_type: Option<String>,
    /// Its encoding, such as `gzip`.
    pub content_encoding: Option<String>,
    /// The header table.
    pub headers: Option<Fields>,
    /// 1 in memory, 2 on disk.
    pub delivery_mode: Option<u8>,
    /// 0 to 9, or more.
    pub priority: Option<u8>,
    /// What it answers.
    pub correlation_id: Option<String>,
    /// Where an answer goes.
    pub reply_to: Option<String>,
    /// Milliseconds it lives in a queue, as text.
    pub expiration: Option<String>,
    /// Its id.
    pub message_id: Option<String>,
    /// Seconds since 1970, negative before.
    pub timestamp: Option<i64>,
    /// Its kind.
    pub type_: Option<String>,
    /// Who published it, as the broker has verified.
    pub user_id: Option<String>,
    /// Which program.
    pub app_id: Option<String>,
    /// Which cluster.
    pub cluster_id: Option<String>,
}

impl Properties {
    /// The header `name`.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&Field> {
        self.headers.as_ref()?.get(name)
    }

    /// Sets the header `name`.
    pub fn set_header(&mut self, name: &str, value: Field) {
        let headers = self.headers.get_or_insert_with(Fields::new);
        headers.insert(name.to_owned(), value);
    }

    /// Takes the header `name` out.
    pub fn remove_header(&mut self, name: &str) -> Option<Field> {
        self.headers.as_mut()?.remove(name)
    }

    /// Without what brokers wrote about its way: `x-death` and the like.
    #[must_use]
    pub fn without_journey(mut self) -> Self {
        for name in convert::OF_THE_BROKER {
            self.remove_header(name);
        }
        self
    }

    /// Moves aside what the broker would act on if it were published again, as
    /// the daemon does in its copies: the header `CC`, by which it would come to
    /// other queues once more, and a `user_id` that is not `user`, which the
    /// broker refuses.
    #[must_use]
    pub fn moved_aside(mut self, user: &str) -> Self {
        if let Some(cc) = self.remove_header("CC") {
            self.set_header(CC_HEADER, cc);
        }
        if self.user_id.as_deref().is_some_and(|id| id != user)
            && let Some(id) = self.user_id.take()
        {
            self.set_header(USER_ID_HEADER, Field::Text(id));
        }
        self
    }

    /// As JSON: an object with the properties that are set.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                object.insert(name.to_owned(), value);
            }
        };
        for (name, text) in self.texts() {
            put(name, text.clone().map(Value::String));
        }
        put("headers", self.headers.as_ref().map(table_to_json));
        put("delivery_mode", self.delivery_mode.map(Value::from));
        put("priority", self.priority.map(Value::from));
        put("timestamp", self.timestamp.map(Value::from));
        Value::Object(object)
    }

    /// Reads what [`Properties::to_json`] wrote.
    ///
    /// # Errors
    ///
    /// What cannot be read, by its name.
    pub fn from_json(value: &Value) -> Result<Self, String> {
        let Value::Object(object) = value else {
            return Err("properties must be an object".to_owned());
        };
        let mut properties = Self::default();
        for (name, value) in object {
            match name.as_str() {
                "headers" => properties.headers = Some(table_from_json(name, value)?),
                "delivery_mode" => properties.delivery_mode = Some(small(name, value)?),
                "priority" => properties.priority = Some(small(name, value)?),
                "timestamp" => {
                    let seconds = value.as_i64();
                    properties.timestamp =
                        Some(seconds.ok_or_else(|| wrong(name, "a number of seconds"))?);
                }
                _ => {
                    let slot = properties
                        .text_mut(name)
                        .ok_or_else(|| format!("there is no property {name:?}"))?;
                    let text = value.as_str().ok_or_else(|| wrong(name, "a string"))?;
                    *slot = Some(text.to_owned());
                }
            }
        }
        Ok(properties)
    }

    fn texts(&self) -> [(&'static str, &Option<String>); 10] {
        [
            ("content_type", &self.content_type),
            ("content_encoding", &self.content_encoding),
            ("correlation_id", &self.correlation_id),
            ("reply_to", &self.reply_to),
            ("expiration", &self.expiration),
            ("message_id", &self.message_id),
            ("type", &self.type_),
            ("user_id", &self.user_id),
            ("app_id", &self.app_id),
            ("cluster_id", &self.cluster_id),
        ]
    }

    fn text_mut(&mut self, name: &str) -> Option<&mut Option<String>> {
        Some(match name {
            "content_type" => &mut self.content_type,
            "content_encoding" => &mut self.content_encoding,
            "correlation_id" => &mut self.correlation_id,
            "reply_to" => &mut self.reply_to,
            "expiration" => &mut self.expiration,
            "message_id" => &mut self.message_id,
            "type" => &mut self.type_,
            "user_id" => &mut self.user_id,
            "app_id" => &mut self.app_id,
            "cluster_id" => &mut self.cluster_id,
            _ => return None,
        })
    }

    /// As the AMQP library has them.
    #[must_use]
    pub fn from_amqp(properties: &AmqpProperties) -> Self {
        Self {
            content_type: properties.content_type().clone(),
            content_encoding: properties.content_encoding().clone(),
            headers: properties.headers().as_ref().map(fields),
            delivery_mode: *properties.delivery_mode(),
            priority: *properties.priority(),
            correlation_id: properties.correlation_id().clone(),
            reply_to: properties.reply_to().clone(),
            expiration: properties.expiration().clone(),
            message_id: properties.message_id().clone(),
            timestamp: properties.timestamp().map(u64::cast_signed),
            type_: properties.type_().clone(),
            user_id: properties.user_id().clone(),
            app_id: properties.app_id().clone(),
            cluster_id: properties.cluster_id().clone(),
        }
    }

    pub(super) fn to_amqp(&self) -> AmqpProperties {
        let mut out = AmqpProperties::default();
        macro_rules! set {
            ($($field:ident $with:ident),*) => {
                $(if let Some(value) = self.$field.clone() {
                    out = out.$with(value);
                })*
            };
        }
        set!(
            content_type with_content_type,
            content_encoding with_content_encoding,
            delivery_mode with_delivery_mode,
            priority with_priority,
            correlation_id with_correlation_id,
            reply_to with_reply_to,
            expiration with_expiration,
            message_id with_message_id,
            type_ with_type_,
            user_id with_user_id,
            app_id with_app_id,
            cluster_id with_cluster_id
        );
        if let Some(seconds) = self.timestamp {
            out = out.with_timestamp(seconds.cast_unsigned());
        }
        match &self.headers {
            Some(headers) => out.with_headers(table(headers)),
            None => out,
        }
    }
}

impl Field {
    /// Its text, if it is one.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// As the daemon shows headers to handlers and to humans: plain JSON, whose
    /// types are fewer.
    #[must_use]
    pub fn plain(&self) -> Value {
        convert::json(&amqp(self))
    }

    /// As JSON that [`Field::from_json`] reads as it was.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let typed = |name: &str, value: Value| json!({ TYPE: name, VALUE: value });
        match self {
            Self::Void => Value::Null,
            Self::Bool(value) => Value::Bool(*value),
            Self::Int64(value) => Value::from(*value),
            Self::Text(text) => Value::String(text.clone()),
            Self::List(items) => items.iter().map(Self::to_json).collect(),
            Self::Table(table) if table.contains_key(TYPE) => typed("table", table_to_json(table)),
            Self::Table(table) => table_to_json(table),
            Self::Int8(value) => typed("int8", Value::from(*value)),
            Self::Uint8(value) => typed("uint8", Value::from(*value)),
            Self::Int16(value) => typed("int16", Value::from(*value)),
            Self::Uint16(value) => typed("uint16", Value::from(*value)),
            Self::Int32(value) => typed("int32", Value::from(*value)),
            Self::Uint32(value) => typed("uint32", Value::from(*value)),
            Self::Timestamp(value) => typed("timestamp", Value::from(*value)),
            // As text: the shortest that is read as the same bits again.
            Self::Float(value) => typed("float", Value::String(value.to_string())),
            Self::Double(value) => typed("double", Value::String(value.to_string())),
            Self::Decimal { scale, value } => typed("decimal", json!([scale, value])),
            Self::Bytes(bytes) => typed("bytes", Value::String(BASE64.encode(bytes))),
        }
    }

    /// Reads what [`Field::to_json`] wrote; `name` is for errors.
    ///
    /// # Errors
    ///
    /// What cannot be read.
    pub fn from_json(name: &str, value: &Value) -> Result<Self, String> {
        Ok(match value {
            Value::Null => Self::Void,
            Value::Bool(value) => Self::Bool(*value),
            Value::String(text) => Self::Text(text.clone()),
            Value::Number(number) => Self::Int64(number.as_i64().ok_or_else(|| {
                wrong(
                    name,
                    "an integer of 64 bits with a sign, or an object that names its type",
                )
            })?),
            Value::Array(items) => {
                let items = items.iter().map(|item| Self::from_json(name, item));
                Self::List(items.collect::<Result<_, _>>()?)
            }
            Value::Object(object) if object.contains_key(TYPE) => Self::typed(name, object)?,
            Value::Object(_) => Self::Table(table_from_json(name, value)?),
        })
    }

    fn typed(name: &str, object: &Map<String, Value>) -> Result<Self, String> {
        let (Some(Value::String(kind)), Some(value), 2) =
            (object.get(TYPE), object.get(VALUE), object.len())
        else {
            return Err(wrong(name, "an object of \"amqp\" and \"value\""));
        };
        let unfit = || wrong(name, &format!("a value of type {kind}"));
        let text = || value.as_str().ok_or_else(unfit);
        Ok(match kind.as_str() {
            "int8" => Self::Int8(integer(value).ok_or_else(unfit)?),
            "uint8" => Self::Uint8(integer(value).ok_or_else(unfit)?),
            "int16" => Self::Int16(integer(value).ok_or_else(unfit)?),
            "uint16" => Self::Uint16(integer(value).ok_or_else(unfit)?),
            "int32" => Self::Int32(integer(value).ok_or_else(unfit)?),
            "uint32" => Self::Uint32(integer(value).ok_or_else(unfit)?),
            "timestamp" => Self::Timestamp(value.as_i64().ok_or_else(unfit)?),
            "float" => Self::Float(text()?.parse().map_err(|_| unfit())?),
            "double" => Self::Double(text()?.parse().map_err(|_| unfit())?),
            "bytes" => Self::Bytes(BASE64.decode(text()?).map_err(|_| unfit())?),
            "table" => Self::Table(table_from_json(name, value)?),
            "decimal" => match value.as_array().map(Vec::as_slice) {
                Some([scale, digits]) => Self::Decimal {
                    scale: integer(scale).ok_or_else(unfit)?,
                    value: integer(digits).ok_or_else(unfit)?,
                },
                _ => return Err(unfit()),
            },
            _ => {
                return Err(format!(
                    "{name} has a value of type {kind:?}, and AMQP has none of that name"
                ));
            }
        })
    }
}

fn integer<T: TryFrom<i64>>(value: &Value) -> Option<T> {
    T::try_from(value.as_i64()?).ok()
}

fn small(name: &str, value: &Value) -> Result<u8, String> {
    integer(value).ok_or_else(|| wrong(name, "a number from 0 to 255"))
}

fn wrong(name: &str, expected: &str) -> String {
    format!("{name} is not {expected}")
}

fn table_to_json(table: &Fields) -> Value {
    let entries = table.iter();
    Value::Object(
        entries
            .map(|(name, field)| (name.clone(), field.to_json()))
            .collect(),
    )
}

fn table_from_json(name: &str, value: &Value) -> Result<Fields, String> {
    let object = value
        .as_object()
        .ok_or_else(|| wrong(name, "an object of names and values"))?;
    let entries = object.iter();
    entries
        .map(|(name, value)| {
            let field = Field::from_json(&format!("header {name:?}"), value)?;
            Ok((name.clone(), field))
        })
        .collect()
}

/// Recursion ends at the guard's limit: deeper tables never reach amiquip.
fn fields(table: &FieldTable) -> Fields {
    let entries = table.iter();
    entries
        .map(|(name, value)| (name.clone(), field(value)))
        .collect()
}

pub(super) fn field(value: &AmqpValue) -> Field {
    match value {
        AmqpValue::Void => Field::Void,
        AmqpValue::Boolean(value) => Field::Bool(*value),
        AmqpValue::ShortShortInt(value) => Field::Int8(*value),
        AmqpValue::ShortShortUInt(value) => Field::Uint8(*value),
        AmqpValue::ShortInt(value) => Field::Int16(*value),
        AmqpValue::ShortUInt(value) => Field::Uint16(*value),
        AmqpValue::LongInt(value) => Field::Int32(*value),
        AmqpValue::LongUInt(value) => Field::Uint32(*value),
        AmqpValue::LongLongInt(value) => Field::Int64(*value),
        AmqpValue::Float(value) => Field::Float(*value),
        AmqpValue::Double(value) => Field::Double(*value),
        AmqpValue::DecimalValue(decimal) => Field::Decimal {
            scale: decimal.scale,
            value: decimal.value.cast_signed(),
        },
        AmqpValue::LongString(text) => Field::Text(text.clone()),
        AmqpValue::ByteArray(bytes) => Field::Bytes(bytes.clone()),
        AmqpValue::Timestamp(seconds) => Field::Timestamp(seconds.cast_signed()),
        AmqpValue::FieldArray(items) => Field::List(items.iter().map(field).collect()),
        AmqpValue::FieldTable(table) => Field::Table(fields(table)),
    }
}

fn table(fields: &Fields) -> FieldTable {
    let entries = fields.iter();
    entries
        .map(|(name, value)| (name.clone(), amqp(value)))
        .collect()
}

fn amqp(value: &Field) -> AmqpValue {
    match value {
        Field::Void => AmqpValue::Void,
        Field::Bool(value) => AmqpValue::Boolean(*value),
        Field::Int8(value) => AmqpValue::ShortShortInt(*value),
        Field::Uint8(value) => AmqpValue::ShortShortUInt(*value),
        Field::Int16(value) => AmqpValue::ShortInt(*value),
        Field::Uint16(value) => AmqpValue::ShortUInt(*value),
        Field::Int32(value) => AmqpValue::LongInt(*value),
        Field::Uint32(value) => AmqpValue::LongUInt(*value),
        Field::Int64(value) => AmqpValue::LongLongInt(*value),
        Field::Float(value) => AmqpValue::Float(*value),
        Field::Double(value) => AmqpValue::Double(*value),
        // amiquip does not name the type: it is made by what the type can read.
        Field::Decimal { scale, value } => {
            serde_json::from_value(json!({ "scale": scale, "value": value.cast_unsigned() }))
                .map_or(AmqpValue::Void, AmqpValue::DecimalValue)
        }
        Field::Text(text) => AmqpValue::LongString(text.clone()),
        Field::Bytes(bytes) => AmqpValue::ByteArray(bytes.clone()),
        Field::Timestamp(seconds) => AmqpValue::Timestamp(seconds.cast_unsigned()),
        Field::List(items) => AmqpValue::FieldArray(items.iter().map(amqp).collect()),
        Field::Table(fields) => AmqpValue::FieldTable(table(fields)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn field() -> impl Strategy<Value = Field> {
        let leaf = prop_oneof![
            Just(Field::Void),
            any::<bool>().prop_map(Field::Bool),
            any::<i8>().prop_map(Field::Int8),
            any::<u8>().prop_map(Field::Uint8),
            any::<i16>().prop_map(Field::Int16),
            any::<u16>().prop_map(Field::Uint16),
            any::<i32>().prop_map(Field::Int32),
            any::<u32>().prop_map(Field::Uint32),
            any::<i64>().prop_map(Field::Int64),
            any::<f32>().prop_map(Field::Float),
            any::<f64>().prop_map(Field::Double),
            Just(Field::Double(f64::NEG_INFINITY)),
            any::<(u8, i32)>().prop_map(|(scale, value)| Field::Decimal { scale, value }),
            any::<String>().prop_map(Field::Text),
            any::<Vec<u8>>().prop_map(Field::Bytes),
            any::<i64>().prop_map(Field::Timestamp),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let name = prop_oneof![Just("amqp".to_owned()), Just("value".to_owned()), ".{0,4}"];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Field::List),
                prop::collection::btree_map(name, inner, 0..4).prop_map(Field::Table),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_as_json_reads_back_as_it_was(field in field()) {
            let text = field.to_json().to_string();
            let value: Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(Field::from_json("n", &value), Ok(field));
        }

        #[test]
        fn what_goes_through_amqp_comes_back_as_it_was(
            headers in prop::collection::btree_map(".{0,8}", field(), 0..4),
            message_id: Option<String>,
            timestamp: Option<i64>,
            priority: Option<u8>,
        ) {
            let properties = Properties {
                headers: Some(headers),
                user_id: message_id.clone(),
                type_: message_id.clone(),
                message_id,
                timestamp,
                priority,
                ..Properties::default()
            };
            prop_assert_eq!(&Properties::from_amqp(&properties.to_amqp()), &properties);
            let text = properties.to_json().to_string();
            let value: Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(Properties::from_json(&value), Ok(properties));
        }

        #[test]
        fn no_json_at_all_makes_reading_it_panic(text in "[\\[\\]{}:,\"a-e0-9 .]{0,60}") {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                Properties::from_json(&value).ok();
                Field::from_json("n", &value).ok();
            }
        }
    }

    #[test]
    fn what_the_broker_would_act_on_is_moved_aside() {
        let list = Field::List(vec![Field::Text("elsewhere".to_owned())]);
        let mut properties = Properties {
            user_id: Some("alice".to_owned()),
            ..Properties::default()
        };
        properties.set_header("CC", list.clone());
        let moved = properties.clone().moved_aside("bob");
        assert_eq!(moved.user_id, None);
        assert_eq!(moved.header("CC"), None);
        assert_eq!(moved.header(CC_HEADER), Some(&list));
        let user = Field::Text("alice".to_owned());
        assert_eq!(moved.header(USER_ID_HEADER), Some(&user));
        assert_eq!(
            properties.moved_aside("alice").user_id.as_deref(),
            Some("alice")
        );
    }
}
