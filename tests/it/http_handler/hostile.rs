//! Messages made to escape into the request's line or head. What arrives is
//! compared to the byte.

use std::collections::BTreeMap;

use ackonce::message::{MESSAGE_ID_MAX_BYTES, Message, MessageId};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::{Rig, Work};
use crate::common::{Receiver, Request};
use ackonce::handler::Keyed;

/// Texts that mean something to one layer or another.
fn nasty() -> Vec<String> {
    let mut texts: Vec<String> = [
        "\r\nX-Evil: 1",
        "\nX-Evil: 1",
        "\rX-Evil: 1",
        "a\r\n\r\nGET /evil HTTP/1.1\r\nHost: evil\r\n\r\n",
        "a\u{0}b",
        "\u{7f}",
        "\u{1b}[2J",
        "\u{85}",
        "\u{2028}X-Evil: 1",
        "\u{10d}\u{10a}X-Evil: 1",
        "嘊嘍X-Evil: 1",
        "%0d%0aX-Evil:%201",
        "%",
        "%25",
        "%2E",
        "\"",
        "\\",
        "\\r\\nX-Evil: 1",
        "\"; X-Evil=1",
        "a,b",
        "a;b",
        " a",
        "a ",
        "\ta\t",
        "",
        " ",
        "ü",
        "\u{202e}lave",
        "\u{feff}",
        "\u{10ffff}",
        "../../etc/passwd",
        "?y=2#z",
        "http://evil/",
        "@evil",
        "${HOME}",
        "$(id)",
        "{{7*7}}",
        "' OR 1=1 --",
        "<script>",
        "chunked",
        "100-continue",
        "close",
    ]
    .map(str::to_owned)
    .to_vec();
    texts.push("x".repeat(255));
    texts.push("\r\n".repeat(100));
    texts.push("ü".repeat(127));
    texts.push("x".repeat(10_000));
    texts.extend((1..32_u8).map(|byte| format!("a{}b", char::from(byte))));
    texts
}

#[derive(Debug)]
struct Case {
    id: String,
    message: Message,
}

/// Each text in each place, one at a time and everywhere at once.
fn cases() -> Vec<Case> {
    let headers = |tenant: Value, trace: Value| {
        json!({ "x-tenant": tenant, "traceparent": trace, "X-Evil": "not asked for" })
            .as_object()
            .unwrap()
            .clone()
    };
    let message = |body: &str, content_type: &str, tenant: &str, trace: &str| Message {
        body: body.into(),
        content_type: Some(content_type.to_owned()),
        headers: headers(json!(tenant), json!(trace)),
        ..Message::default()
    };
    let mut cases = Vec::new();
    for text in nasty() {
        let text = text.as_str();
        let id: String = text.replace('\0', "").chars().take(60).collect();
        let id = if id.is_empty() {
            "empty".to_owned()
        } else {
            id
        };
        for (id, message) in [
            (id.as_str(), message("{}", "text/plain", "a", "")),
            ("m1", message(text, "text/plain", "a", "")),
            ("m1", message("{}", text, "a", "")),
            ("m1", message("{}", "text/plain", text, "")),
            ("m1", message("{}", "text/plain", "a", text)),
            (id.as_str(), message(text, text, text, text)),
        ] {
            cases.push(Case {
                id: id.to_owned(),
                message,
            });
        }
    }
    for odd in [
        json!(["a"]),
        json!({ "a": "b" }),
        json!(null),
        json!(-1.5),
        json!(false),
    ] {
        cases.push(Case {
            id: "m1".to_owned(),
            message: Message {
                headers: headers(odd.clone(), odd),
                ..Message::default()
            },
        });
    }
    cases
}

/// What must arrive, written apart from the handler; `None` if HTTP has no form
/// for it.
fn wanted(case: &Case) -> Option<BTreeMap<String, Vec<u8>>> {
    let visible = |text: &str| !text.is_empty() && text.chars().all(|c| matches!(c, ' '..='~'));
    let mut head: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let content_type = case.message.content_type.as_deref().unwrap_or_default();
    let content_type = content_type.trim_matches(' ');
    let content_type = if visible(content_type) {
        content_type
    } else {
        "application/octet-stream"
    };
    head.insert("content-type".to_owned(), content_type.into());
    let tenant = match &case.message.headers["x-tenant"] {
        Value::Null => None,
        Value::Array(_) | Value::Object(_) => return None,
        Value::String(text) => Some(text.trim_matches([' ', '\t']).to_owned()),
        other => Some(other.to_string()),
    };
    if let Some(tenant) = tenant {
        let acts = |c: char| c != '\t' && (c < ' ' || c == '\u{7f}');
        if tenant.len() > 4_096 || tenant.chars().any(acts) {
            return None;
        }
        head.insert("x-tenant".to_owned(), tenant.into_bytes());
    }
    let length = case.message.body.len().to_string();
    head.insert("content-length".to_owned(), length.into_bytes());
    Some(head)
}

fn check(case: &Case, request: &Request, host: &str) {
    assert_eq!(request.line, b"POST /orders?x=1 HTTP/1.1", "{case:?}");
    assert!(request.body == case.message.body, "{case:?}");
    let mut head: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for (name, value) in &request.headers {
        let name = String::from_utf8(name.clone()).unwrap().to_lowercase();
        assert!(head.insert(name, value.clone()).is_none(), "{request:?}");
    }
    let key = String::from_utf8(head.remove("idempotency-key").unwrap()).unwrap();
    assert!(key.bytes().all(|b| b.is_ascii_graphic()), "{key}");
    let id = key.strip_prefix("orders:").unwrap();
    assert_eq!(percent_decode_str(id).decode_utf8().unwrap(), case.id);
    let webhook_id = String::from_utf8(head.remove("webhook-id").unwrap()).unwrap();
    assert!(!webhook_id.contains('.'));
    let id = webhook_id.strip_prefix("orders:").unwrap();
    assert_eq!(percent_decode_str(id).decode_utf8().unwrap(), case.id);
    for volatile in ["webhook-timestamp", "webhook-signature"] {
        assert!(
            head.remove(volatile).is_some_and(|v| v.is_ascii()),
            "{volatile}"
        );
    }
    for (name, value) in [
        ("accept", "*/*"),
        ("accept-encoding", "identity"),
        ("ackonce-attempt", "3"),
        ("ackonce-timeout-ms", "20000"),
        ("host", host),
        ("user-agent", concat!("ackonce/", env!("CARGO_PKG_VERSION"))),
    ] {
        assert_eq!(head.remove(name).unwrap(), value.as_bytes(), "{name}");
    }
    assert_eq!(Some(head), wanted(case), "{case:?}");
}

#[test]
fn nothing_of_a_message_escapes_into_line_or_head() {
    let receiver = Receiver::willing();
    let secret = BASE64_STANDARD.encode([7; 24]);
    let mut rig = Rig::new(
        &receiver.url(),
        &format!("forward_headers = ['x-tenant']\nsigning_secrets = ['{secret}']"),
    );
    let host = receiver.address().to_string();
    let cases = cases();
    assert!(cases.len() >= 200, "{}", cases.len());
    let (mut sent, mut refused) = (0, 0);
    for case in &cases {
        let result = rig.send(&case.id, &case.message);
        match wanted(case) {
            Some(_) => {
                result.unwrap_or_else(|failure| panic!("{failure}: {case:?}"));
                sent += 1;
                let requests = receiver.requests();
                assert_eq!(requests.len(), sent, "{case:?}");
                check(case, &requests[sent - 1], &host);
            }
            None => {
                let failure = result.unwrap_err();
                assert_eq!(failure.code.as_deref(), Some("header"), "{failure}");
                assert!(!failure.text.chars().any(char::is_control), "{failure}");
                refused += 1;
            }
        }
    }
    assert!(sent > 100 && refused > 50, "{sent} sent, {refused} refused");
    assert_eq!(receiver.connections(), 1, "no request upset the next");
}

#[test]
fn two_ids_never_have_one_key() {
    let receiver = Receiver::willing();
    let mut rig = Rig::new(&receiver.url(), "");
    let mut ids: Vec<String> = nasty()
        .into_iter()
        .map(|text| text.replace('\0', ""))
        .filter(|text| (1..=MESSAGE_ID_MAX_BYTES).contains(&text.len()))
        .collect();
    ids.sort();
    ids.dedup();
    for id in &ids {
        let message = Message::default();
        let work = Work {
            message_id: &MessageId::new(id).unwrap(),
            message: &message,
            attempt: 1,
        };
        rig.handler.apply(&work, &rig.stop).unwrap();
    }
    assert_eq!(receiver.applied().len(), ids.len());
}
