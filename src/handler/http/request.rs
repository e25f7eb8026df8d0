//! What of a message stands in the head of its request. Pure: nothing that a
//! publisher wrote gets there without having been looked at.

use serde_json::Value;
use ureq::http::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};

use crate::config::checked::KeyFormat;
use crate::config::defaults::HTTP_VALUE_MAX;
use crate::message::Message;

/// Content type of a message that has none.
const UNTYPED: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// Header that a receiver of W3C Trace Context reads.
const TRACEPARENT: &str = "traceparent";

/// Puts the message's content type into `headers`.
pub(super) fn add_content_type(headers: &mut HeaderMap, message: &Message) {
    let own = message.content_type.as_deref().and_then(visible_ascii);
    headers.insert(CONTENT_TYPE, own.unwrap_or(UNTYPED));
}

/// Puts the message's content encoding into `headers`, by which its receiver
/// reads the body, and its other properties as `ackonce-…`. What HTTP has no
/// form for is left out.
pub(super) fn add_properties(headers: &mut HeaderMap, message: &Message) {
    for (name, text) in message.about.named() {
        let header = match name {
            "content_encoding" => Ok(CONTENT_ENCODING),
            _ => format!("ackonce-{}", name.replace('_', "-")).parse::<HeaderName>(),
        };
        let value = match name {
            "content_encoding" => visible_ascii(&text),
            _ => field_value(&Value::String(text)).ok(),
        };
        if let (Ok(header), Some(value)) = (header, value) {
            headers.insert(header, value);
        }
    }
}

/// Puts `names` of the message's headers into `headers`: texts, numbers, true
/// and false; what is not there or has no value is left out.
///
/// # Errors
///
/// The name of the first that HTTP cannot carry, and why.
pub(super) fn add_forwarded(
    headers: &mut HeaderMap,
    names: &[(HeaderName, String)],
    message: &Message,
) -> Result<(), String> {
    for (header, name) in names {
        let value = match message.headers.get(name) {
            None | Some(Value::Null) => continue,
            Some(value) => {
                field_value(value).map_err(|why| format!("header {name:?} of the message {why}"))?
            }
        };
        headers.insert(header, value);
    }
    Ok(())
}

fn field_value(value: &Value) -> Result<HeaderValue, &'static str> {
    let text = match value {
        Value::String(text) => text.trim_matches([' ', '\t']).to_owned(),
        Value::Number(number) => number.to_string(),
        Value::Bool(flag) => flag.to_string(),
        _ => return Err("is a table or a list, which HTTP has no form for"),
    };
    if text.len() > HTTP_VALUE_MAX {
        return Err("is longer than HTTP servers take");
    }
    // The library takes neither line breaks nor other control characters.
    // Bytes beyond ASCII are opaque to HTTP.
    HeaderValue::from_bytes(text.as_bytes())
        .map_err(|_| "has a control character, which HTTP has no form for")
}

/// Puts the message's `traceparent` into `headers`, if it is one.
pub(super) fn add_traceparent(headers: &mut HeaderMap, message: &Message) {
    let text = message.headers.get(TRACEPARENT).and_then(Value::as_str);
    if let Some(text) = text.filter(|text| is_traceparent(text))
        && let Some(value) = visible_ascii(text)
    {
        headers.insert(TRACEPARENT, value);
    }
}

/// `VERSION-TRACE-PARENT-FLAGS` in lower-case hexadecimal digits, as W3C Trace
/// Context has it. A later version may have more behind that.
fn is_traceparent(text: &str) -> bool {
    let hex = |part: &str, length: usize| {
        part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let some = |part: &str| part.bytes().any(|byte| byte != b'0');
    let parts: Vec<&str> = text.splitn(5, '-').collect();
    let [version, trace, parent, flags, rest @ ..] = parts.as_slice() else {
        return false;
    };
    let form = hex(version, 2) && hex(trace, 32) && hex(parent, 16) && hex(flags, 2);
    let whole = match *version {
        "00" => rest.is_empty(),
        "ff" => false,
        _ => text.len() <= 255,
    };
    form && whole && some(trace) && some(parent)
}

/// The value of the header with the idempotency key, which is visible ASCII
/// without `"` and `\`.
pub(super) fn key_value(key: &str, format: KeyFormat) -> String {
    match format {
        KeyFormat::Plain => key.to_owned(),
        KeyFormat::Quoted => format!("\"{key}\""),
    }
}

fn visible_ascii(text: &str) -> Option<HeaderValue> {
    let text = text.trim_matches(' ');
    let visible = text
        .bytes()
        .all(|byte| byte == b' ' || byte.is_ascii_graphic());
    (visible && !text.is_empty())
        .then(|| HeaderValue::from_str(text).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn message(headers: Value) -> Message {
        let Value::Object(headers) = headers else {
            panic!("a table of headers");
        };
        Message {
            headers,
            ..Message::default()
        }
    }

    fn forwarded(value: Value) -> Result<Option<HeaderValue>, String> {
        let name = HeaderName::from_static("x-a");
        let mut headers = HeaderMap::new();
        let names = [(name.clone(), "X-A".to_owned())];
        add_forwarded(&mut headers, &names, &message(json!({ "X-A": value })))?;
        Ok(headers.remove(name))
    }

    #[test]
    fn a_header_is_carried_as_it_is_or_refused() {
        for (value, sent) in [
            (json!("a b"), "a b"),
            (json!(" a\t"), "a"),
            (json!("Müller, 100%"), "Müller, 100%"),
            (json!(-5), "-5"),
            (json!(1.5), "1.5"),
            (json!(true), "true"),
            (json!(""), ""),
        ] {
            let found = forwarded(value.clone()).unwrap().unwrap();
            assert_eq!(found.as_bytes(), sent.as_bytes(), "{value}");
        }
        assert_eq!(forwarded(json!(null)), Ok(None));
        for value in [
            json!("a\r\nb: c"),
            json!("a\nb"),
            json!("a\rb"),
            json!("a\u{0}b"),
            json!("a\u{7f}b"),
            json!(["a"]),
            json!({ "a": 1 }),
            json!("x".repeat(HTTP_VALUE_MAX + 1)),
        ] {
            let refused = forwarded(value.clone()).unwrap_err();
            assert!(refused.contains("\"X-A\""), "{refused}");
        }
    }

    #[test]
    fn a_content_type_is_the_messages_own_or_none() {
        for (own, sent) in [
            (None, "application/octet-stream"),
            (Some("application/json"), "application/json"),
            (
                Some("text/plain; charset=utf-8"),
                "text/plain; charset=utf-8",
            ),
            (Some(""), "application/octet-stream"),
            (Some("a\r\nb: c"), "application/octet-stream"),
            (Some("t\u{fc}xt"), "application/octet-stream"),
        ] {
            let mut headers = HeaderMap::new();
            let message = Message {
                content_type: own.map(str::to_owned),
                ..Message::default()
            };
            add_content_type(&mut headers, &message);
            assert_eq!(headers[CONTENT_TYPE], sent, "{own:?}");
        }
    }

    #[test]
    fn a_traceparent_is_passed_on_only_if_it_is_one() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert!(is_traceparent(good));
        assert!(is_traceparent(&good.replacen("00", "cc", 1)));
        assert!(is_traceparent(&format!(
            "{}-more",
            good.replacen("00", "cc", 1)
        )));
        for bad in [
            "",
            "00",
            &good.to_uppercase(),
            &good.replacen("00", "ff", 1),
            &format!("{good}-more"),
            &format!("{good} "),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        ] {
            assert!(!is_traceparent(bad), "{bad:?}");
        }
        let mut headers = HeaderMap::new();
        add_traceparent(&mut headers, &message(json!({ "traceparent": good })));
        assert_eq!(headers[TRACEPARENT], good);
        for odd in [json!(5), json!("00-\r\n"), json!(null)] {
            let mut headers = HeaderMap::new();
            add_traceparent(&mut headers, &message(json!({ "traceparent": odd })));
            assert!(headers.is_empty());
        }
    }

    proptest! {
        #[test]
        fn no_header_of_a_message_ends_its_line(text in any::<String>()) {
            if let Ok(Some(value)) = forwarded(json!(text)) {
                prop_assert!(value.as_bytes().iter().all(|b| !matches!(b, b'\r' | b'\n' | 0)));
                prop_assert_eq!(value.as_bytes(), text.trim_matches([' ', '\t']).as_bytes());
            }
        }
    }
}
