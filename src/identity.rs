//! Which message a delivery is: its idempotency key, and the fingerprint that
//! tells a duplicate from another message under the same key. Pure.
//!
//! A key is never guessed: where the consumer's `identity` finds nothing
//! usable, the message is dead-lettered with the reason.

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::config::checked::Identity;
use crate::message::{DeadReason, Fingerprint, Message, MessageId, hex};

/// The key of `message`, looked up where `identity` says. The text `5` and the
/// integer `5` are one key.
///
/// # Errors
///
/// [`DeadReason::BadHeader`] when the guard repaired what the identity stands
/// in, be it the identity itself or, in the header table, a neighbour.
/// [`DeadReason::MissingId`] when there is nothing, or it is not a string or
/// integer of 1 to 255 bytes without NUL.
pub fn identify(message: &Message, identity: &Identity) -> Result<MessageId, DeadReason> {
    let found = match identity {
        Identity::MessageId if message.repairs.message_id => return Err(DeadReason::BadHeader),
        Identity::Header(_) if message.repairs.headers => return Err(DeadReason::BadHeader),
        Identity::MessageId => message.message_id.as_deref().and_then(MessageId::new),
        Identity::Header(name) => message.headers.get(name).and_then(header_id),
        Identity::Json(pointer) => body_id(&message.body, pointer),
        Identity::Body => MessageId::new(&hex(&fingerprint(&message.body).0)),
    };
    found.ok_or(DeadReason::MissingId)
}

/// What an id keeps in [`idempotency_key`]: visible ASCII, without what quotes,
/// separates or encodes.
const KEY_ENCODED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'%')
    .add(b',')
    .add(b';')
    .add(b'\\');

/// The key that a receiver outside is handed for a message: `CONSUMER:ID`, the
/// id percent-encoded (RFC 3986) where it has other than visible ASCII or one of
/// `" % , ; \`. Two messages have the same key only if consumer and id are the
/// same. At most 830 bytes; an id of letters, digits, `-`, `.`, `_` and the like
/// stands as it is.
#[must_use]
pub fn idempotency_key(consumer: &str, id: &MessageId) -> String {
    format!(
        "{consumer}:{}",
        utf8_percent_encode(id.as_str(), KEY_ENCODED)
    )
}

/// SHA-256 of a body of any length, the empty one included.
#[must_use]
pub fn fingerprint(body: &[u8]) -> Fingerprint {
    Fingerprint(Sha256::digest(body).into())
}

/// A header's value as [`Message::headers`] renders it. What was a byte array
/// or had a NUL in it has lost its identity there and is no key; a text that
/// merely looks like one of these is refused with them.
fn header_id(value: &Value) -> Option<MessageId> {
    let mangled = value
        .as_str()
        .is_some_and(|text| text.contains(char::REPLACEMENT_CHARACTER) || is_byte_array(text));
    if mangled { None } else { value_id(value) }
}

fn is_byte_array(text: &str) -> bool {
    text.strip_prefix("\\x").is_some_and(|digits| {
        digits.len() % 2 == 0 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
    })
}

/// What stands at `pointer` (RFC 6901) in a JSON body. Of two members with the
/// same name the last counts. A body nested deeper than serde_json's 127
/// levels is not JSON here.
fn body_id(body: &[u8], pointer: &str) -> Option<MessageId> {
    let document: Value = serde_json::from_slice(body).ok()?;
    document.pointer(pointer).and_then(value_id)
}

/// Strings as they are, integers in decimal. Whatever JSON reads as floating
/// point is refused: two different integers beyond 64 bits can read the same.
fn value_id(value: &Value) -> Option<MessageId> {
    match value {
        Value::String(text) => MessageId::new(text),
        Value::Number(number) if number.is_i64() || number.is_u64() => {
            MessageId::new(&number.to_string())
        }
        Value::Number(_) | Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Repairs;
    use proptest::prelude::*;
    use serde_json::json;

    fn message_id(id: Option<&str>) -> Result<String, DeadReason> {
        let message = Message {
            message_id: id.map(str::to_owned),
            ..Message::default()
        };
        identify(&message, &Identity::MessageId).map(|id| id.to_string())
    }

    fn header(value: Value) -> Result<String, DeadReason> {
        let message = Message {
            headers: [("order-id".to_owned(), value)].into_iter().collect(),
            ..Message::default()
        };
        let identity = Identity::Header("order-id".to_owned());
        identify(&message, &identity).map(|id| id.to_string())
    }

    fn pointed(body: &str, pointer: &str) -> Result<String, DeadReason> {
        let message = Message {
            body: body.as_bytes().to_vec(),
            ..Message::default()
        };
        let identity = Identity::Json(pointer.to_owned());
        identify(&message, &identity).map(|id| id.to_string())
    }

    const MISSING: Result<String, DeadReason> = Err(DeadReason::MissingId);

    #[test]
    fn a_message_id_is_its_property() {
        assert_eq!(message_id(Some("order-1")).as_deref(), Ok("order-1"));
        assert_eq!(message_id(Some(" ")).as_deref(), Ok(" "));
    }

    #[test]
    fn an_absent_empty_long_or_nul_message_id_is_missing() {
        for id in [None, Some(""), Some("a\0b"), Some(&"x".repeat(256))] {
            assert_eq!(message_id(id), MISSING, "{id:?}");
        }
        assert!(message_id(Some(&"x".repeat(255))).is_ok());
    }

    #[test]
    fn a_header_is_a_string_or_an_integer() {
        assert_eq!(header(json!("a-1")).as_deref(), Ok("a-1"));
        assert_eq!(header(json!(-7)).as_deref(), Ok("-7"));
        assert_eq!(header(json!("\\x")), MISSING, "an empty byte array");
        assert_eq!(header(json!("\\xC0ffee")), MISSING, "a byte array");
        assert_eq!(header(json!("\\xyz")).as_deref(), Ok("\\xyz"));
        assert_eq!(header(json!("a\u{fffd}b")), MISSING, "had a NUL in it");
        for value in [
            json!(null),
            json!(true),
            json!(1.5),
            json!([1]),
            json!({"a": 1}),
            json!(""),
            json!("x".repeat(256)),
        ] {
            assert_eq!(header(value.clone()), MISSING, "{value}");
        }
    }

    #[test]
    fn an_absent_header_is_missing() {
        let identity = Identity::Header("order-id".to_owned());
        let found = identify(&Message::default(), &identity);
        assert_eq!(found, Err(DeadReason::MissingId));
    }

    #[test]
    fn a_pointer_leads_to_a_string_or_an_integer_in_the_body() {
        let body = r#"{"a": [{"id": "x"}, 18446744073709551615], "b/c": -3, "d~e": "f"}"#;
        assert_eq!(pointed(body, "/a/0/id").as_deref(), Ok("x"));
        assert_eq!(pointed(body, "/a/1").as_deref(), Ok("18446744073709551615"));
        assert_eq!(pointed(body, "/b~1c").as_deref(), Ok("-3"));
        assert_eq!(pointed(body, "/d~0e").as_deref(), Ok("f"));
        assert_eq!(pointed("\"whole\"", "").as_deref(), Ok("whole"));
        for pointer in ["", "/", "/a", "/a/2", "/a/01", "/a/0/id/x", "a", "/A"] {
            assert_eq!(pointed(body, pointer), MISSING, "{pointer:?}");
        }
    }

    #[test]
    fn a_value_in_the_body_that_is_no_key_is_missing() {
        for value in [
            "null",
            "true",
            "1.0",
            "1e3",
            "18446744073709551616",
            "[]",
            "{}",
            "\"\"",
            "\"a\\u0000b\"",
        ] {
            let body = format!("{{\"id\": {value}}}");
            assert_eq!(pointed(&body, "/id"), MISSING, "{body}");
        }
    }

    #[test]
    fn a_body_that_is_not_json_has_no_id() {
        for body in [
            "",
            "order 1",
            "{\"id\": \"x\"",
            "{\"id\": \"x\"} y",
            "{'id': 'x'}",
        ] {
            assert_eq!(pointed(body, "/id"), MISSING, "{body}");
        }
    }

    #[test]
    fn a_body_nested_too_deeply_has_no_id() {
        let nested = |levels| {
            let (open, close) = ("[".repeat(levels), "]".repeat(levels));
            pointed(
                &format!("{{\"deep\": {open}{close}, \"id\": \"x\"}}"),
                "/id",
            )
        };
        assert_eq!(nested(126).as_deref(), Ok("x"));
        assert_eq!(nested(127), MISSING);
        assert_eq!(nested(1_000_000), MISSING);
    }

    #[test]
    fn of_two_members_with_one_name_the_last_counts() {
        assert_eq!(pointed(r#"{"id": 1, "id": 2}"#, "/id").as_deref(), Ok("2"));
        assert_eq!(pointed(r#"{"id": 1, "id": null}"#, "/id"), MISSING);
    }

    #[test]
    fn the_body_identity_is_the_hash_in_hex() {
        let found = identify(&Message::default(), &Identity::Body).map(|id| id.to_string());
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(found.as_deref(), Ok(empty));
    }

    #[test]
    fn only_a_repair_of_what_the_identity_stands_in_makes_a_bad_header() {
        let repaired = |repairs, identity| {
            let message = Message {
                message_id: Some("m".to_owned()),
                headers: [("h".to_owned(), json!("h"))].into_iter().collect(),
                body: b"{\"id\": \"j\"}".to_vec(),
                repairs,
                ..Message::default()
            };
            identify(&message, &identity).map(|_| ())
        };
        let header = || Identity::Header("h".to_owned());
        let json = || Identity::Json("/id".to_owned());
        let property = Repairs {
            message_id: true,
            ..Repairs::default()
        };
        let headers = Repairs {
            headers: true,
            ..Repairs::default()
        };
        let other = Repairs {
            other: true,
            ..Repairs::default()
        };
        const BAD: Result<(), DeadReason> = Err(DeadReason::BadHeader);

        assert_eq!(repaired(property, Identity::MessageId), BAD);
        assert_eq!(repaired(headers, header()), BAD);
        assert_eq!(repaired(headers, Identity::MessageId), Ok(()));
        assert_eq!(repaired(property, header()), Ok(()));
        for repairs in [property, headers, other] {
            assert_eq!(repaired(repairs, json()), Ok(()));
            assert_eq!(repaired(repairs, Identity::Body), Ok(()));
        }
        assert_eq!(repaired(other, Identity::MessageId), Ok(()));
        assert_eq!(repaired(other, header()), Ok(()));
    }

    #[test]
    fn a_repaired_identity_is_bad_even_where_nothing_is_left_of_it() {
        let repairs = Repairs {
            message_id: true,
            headers: true,
            other: true,
        };
        let message = Message {
            repairs,
            ..Message::default()
        };
        for identity in [Identity::MessageId, Identity::Header("h".to_owned())] {
            assert_eq!(identify(&message, &identity), Err(DeadReason::BadHeader));
        }
    }

    fn identities() -> impl Strategy<Value = Identity> {
        prop_oneof![
            Just(Identity::MessageId),
            ".{0,20}".prop_map(Identity::Header),
            "(/[a-c0-2~]{0,2}){0,3}|.{0,20}".prop_map(Identity::Json),
            Just(Identity::Body),
        ]
    }

    fn bodies() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            "[\\[\\]{}:,\"a-c0-2.e\\\\ -]{0,60}".prop_map(String::into_bytes),
            Just(b"{\"a\": {\"b\": [1, \"x\"]}, \"c\": 2}".to_vec()),
        ]
    }

    proptest! {
        #[test]
        fn any_body_and_any_identity_give_a_key_or_a_reason_and_always_the_same(
            body in bodies(),
            message_id: Option<String>,
            identity in identities(),
        ) {
            let message = Message { body, message_id, ..Message::default() };
            let found = identify(&message, &identity);
            prop_assert_eq!(&found, &identify(&message.clone(), &identity));
            if let Ok(id) = found {
                prop_assert!((1..=255).contains(&id.as_str().len()));
                prop_assert!(!id.as_str().contains('\0'));
            }
        }

        #[test]
        fn an_integer_has_one_spelling(number: i64, spaces in " {0,3}") {
            let text = number.to_string();
            prop_assert_eq!(header(json!(number)), Ok(text.clone()));
            let body = format!("{{\"id\":{spaces}{number}{spaces}}}");
            prop_assert_eq!(pointed(&body, "/id"), Ok(text));
        }

        #[test]
        fn any_string_in_the_body_is_found_however_it_is_escaped(text in "[^\0]{1,60}") {
            let plain = json!({"id": text}).to_string();
            let escaped: String =
                text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
            prop_assert_eq!(pointed(&plain, "/id"), Ok(text.clone()));
            prop_assert_eq!(pointed(&format!("{{\"id\":\"{escaped}\"}}"), "/id"), Ok(text));
        }

        #[test]
        fn bodies_that_differ_have_fingerprints_that_differ(one in bodies(), other in bodies()) {
            prop_assert_eq!(one == other, fingerprint(&one) == fingerprint(&other));
        }
    }
}
