//! The lines of `mode = "stream"`: one of JSON for each message, and the
//! program's own, which are believed only as far as they can be understood.
//! Pure.

use std::io;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::ser::Formatter;
use serde_json::{Map, Value};

use super::words::{harmless, shortened};
use crate::config::defaults::RETRY_AFTER_MAX;
use crate::config::without_bom;
use crate::failure::{Class, Failure};
use crate::handler::Work;
use crate::identity::idempotency_key;
use crate::message::Message;

/// Longest line of a program, in bytes, its end included.
pub const LINE_MAX: usize = 64 << 10;

/// Longest `error` of an answer, in characters: the journal keeps 2,000.
const ERROR_CHARS: usize = 1_900;

/// One message, as a program reads it.
#[derive(Serialize)]
struct Request<'a> {
    id: u64,
    consumer: &'a str,
    message_id: &'a str,
    key: &'a str,
    attempt: u32,
    redelivered: bool,
    exchange: &'a str,
    routing_key: &'a str,
    content_type: Option<&'a str>,
    content_encoding: Option<&'a str>,
    #[serde(rename = "type")]
    kind: Option<&'a str>,
    correlation_id: Option<&'a str>,
    reply_to: Option<&'a str>,
    app_id: Option<&'a str>,
    user_id: Option<&'a str>,
    expiration: Option<&'a str>,
    priority: Option<u8>,
    published_at: Option<i64>,
    deadline: f64,
    headers: &'a Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body_base64: Option<String>,
}

/// The line that hands over `work`, its end included; `id` is what the answer
/// has to repeat, and `deadline` when it is no longer waited for.
#[must_use]
pub fn request(consumer: &str, id: u64, deadline: f64, work: &Work<'_>) -> Vec<u8> {
    let message = work.message;
    let about = &message.about;
    let body = std::str::from_utf8(&message.body).ok();
    let request = Request {
        id,
        consumer,
        message_id: work.message_id.as_str(),
        key: &idempotency_key(consumer, work.message_id),
        attempt: work.attempt,
        redelivered: message.redelivered,
        exchange: &message.exchange,
        routing_key: &message.routing_key,
        content_type: message.content_type.as_deref(),
        content_encoding: about.content_encoding.as_deref(),
        kind: about.kind.as_deref(),
        correlation_id: about.correlation_id.as_deref(),
        reply_to: about.reply_to.as_deref(),
        app_id: about.app_id.as_deref(),
        user_id: about.user_id.as_deref(),
        expiration: about.expiration.as_deref(),
        priority: about.priority,
        published_at: super::published_at(work),
        deadline,
        headers: &message.headers,
        body,
        body_base64: body.is_none().then(|| STANDARD.encode(&message.body)),
    };
    let mut line = json(&request);
    line.push(b'\n');
    line
}

/// The headers as JSON text, for an environment variable.
pub(super) fn headers(message: &Message) -> String {
    String::from_utf8(json(&message.headers)).unwrap_or_default()
}

/// `value` in ASCII alone: no program's locale, and no reader of lines that
/// ends them at U+2028, can take it for anything else.
fn json(value: &impl Serialize) -> Vec<u8> {
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, Ascii);
    // Writing to a Vec cannot fail, and every key is a string.
    if value.serialize(&mut serializer).is_err() {
        out.clear();
    }
    out
}

/// Compact, and everything beyond ASCII escaped.
struct Ascii;

impl Formatter for Ascii {
    fn write_string_fragment<W>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()>
    where
        W: ?Sized + io::Write,
    {
        let mut rest = fragment;
        while let Some(at) = rest.find(|c: char| !c.is_ascii() || c == '\u{7f}') {
            let (plain, strange) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let Some(character) = strange.chars().next() else {
                break;
            };
            for unit in character.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            rest = &strange[character.len_utf8()..];
        }
        writer.write_all(rest.as_bytes())
    }
}

/// The first line of a program.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Greeting {
    ready: bool,
}

/// Whether `line` says that the program takes messages now.
///
/// # Errors
///
/// What is wrong with it.
pub fn greeting(line: &[u8]) -> Result<(), String> {
    match serde_json::from_slice::<Greeting>(without_bom(line)) {
        Ok(Greeting { ready: true }) => Ok(()),
        Ok(Greeting { ready: false }) => Err("it says that it is not ready".to_owned()),
        Err(_) => Err(format!(
            "its first line has to be {{\"ready\":true}}, and is {}",
            quoted(line)
        )),
    }
}

/// What a program says about one message.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    id: u64,
    outcome: Outcome,
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    retry_after_ms: Option<u64>,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Done,
    Retry,
    Reject,
    Pause,
}

/// What the answer `line` to the message `id` means.
///
/// # Errors
///
/// What is wrong with the line.
pub fn answer(line: &[u8], id: u64) -> Result<Result<(), Failure>, String> {
    let answer: Answer = serde_json::from_slice(line).map_err(|error| {
        // It may quote names and values of the program's, of any length.
        let error = harmless(error.to_string().as_bytes());
        let error = shortened(&error);
        format!("its answer is not understood, {error}: {}", quoted(line))
    })?;
    if answer.id != id {
        return Err(format!(
            "its answer is to message {}, and it has message {id}",
            answer.id
        ));
    }
    let class = match answer.outcome {
        Outcome::Done => return Ok(Ok(())),
        Outcome::Retry => Class::Transient,
        Outcome::Reject => Class::Permanent,
        Outcome::Pause => Class::Systemic,
    };
    let error = harmless(answer.error.unwrap_or_default().trim().as_bytes());
    let text: String = match error.is_empty() {
        true => "the program gave no reason".to_owned(),
        false => error.chars().take(ERROR_CHARS).collect(),
    };
    Ok(Err(Failure {
        class,
        code: None,
        text,
        retry_after: answer
            .retry_after_ms
            .map(|ms| Duration::from_millis(ms).min(RETRY_AFTER_MAX)),
    }))
}

/// The beginning of a line that a program wrote.
fn quoted(line: &[u8]) -> String {
    let line = line.get(..LINE_MAX).unwrap_or(line);
    format!("`{}`", shortened(harmless(line).trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::MessageId;
    use proptest::prelude::*;

    fn read(line: &[u8]) -> Value {
        serde_json::from_slice(line).unwrap()
    }

    fn failed(line: &str) -> Failure {
        answer(line.as_bytes(), 7).unwrap().unwrap_err()
    }

    #[test]
    fn an_outcome_says_what_the_failure_asks_for() {
        assert_eq!(answer(br#"{"id":7,"outcome":"done"}"#, 7), Ok(Ok(())));
        for (outcome, class) in [
            ("retry", Class::Transient),
            ("reject", Class::Permanent),
            ("pause", Class::Systemic),
        ] {
            let failure = failed(&format!(
                r#"{{"error":" no\u001b \u0000x","id":7,"retry_after_ms":1500,"outcome":"{outcome}"}}"#
            ));
            assert_eq!(failure.class, class);
            assert_eq!(failure.text, "no\\u{1b} \\u{0}x");
            assert_eq!(failure.retry_after, Some(Duration::from_millis(1_500)));
        }
        let failure = failed(r#"{"id":7,"outcome":"retry","retry_after_ms":18446744073709551615}"#);
        assert_eq!(failure.text, "the program gave no reason");
        assert_eq!(failure.retry_after, Some(RETRY_AFTER_MAX));
    }

    #[test]
    fn what_a_program_calls_things_is_shown_escaped_and_shortened() {
        let problem = answer(br#"{"id":7,"outcome":"done","\u001b[2J":1}"#, 7).unwrap_err();
        assert!(problem.contains("unknown field `\\u{1b}[2J`"), "{problem}");
        let long = format!(r#"{{"id":7,"outcome":"{}"}}"#, "x".repeat(5_000));
        let problem = answer(long.as_bytes(), 7).unwrap_err();
        assert!(problem.chars().count() < 1_000, "{problem}");
    }

    #[test]
    fn an_answer_that_can_be_taken_in_two_ways_is_not_taken() {
        for line in [
            "",
            "null",
            "[]",
            "done",
            r#"{"id":7}"#,
            r#"{"outcome":"done"}"#,
            r#"{"id":8,"outcome":"done"}"#,
            r#"{"id":"7","outcome":"done"}"#,
            r#"{"id":7,"outcome":"Done"}"#,
            r#"{"id":7,"outcome":"done","outcome":"retry"}"#,
            r#"{"id":7,"outcome":"done","retry_after":1}"#,
            r#"{"id":7,"outcome":"retry","retry_after_ms":-1}"#,
            r#"{"id":7,"outcome":"done"} {"id":7,"outcome":"done"}"#,
        ] {
            assert!(answer(line.as_bytes(), 7).is_err(), "{line}");
        }
        assert_eq!(greeting(b"{\"ready\": true}\r"), Ok(()));
        assert_eq!(greeting(b"\xEF\xBB\xBF{\"ready\": true}"), Ok(()));
        for line in [
            "",
            "ready",
            "{}",
            r#"{"ready":false}"#,
            r#"{"ready":true,"x":1}"#,
        ] {
            assert!(greeting(line.as_bytes()).is_err(), "{line}");
        }
    }

    proptest! {
        #[test]
        fn a_message_is_one_line_of_ascii_that_reads_back_the_same(
            body: Vec<u8>,
            text in "(\\PC|[\u{0}-\u{1f}]|[\u{7f}-\u{9f}]|\u{2028}|\u{2029}){0,40}",
            id: u64,
            name in "[^\u{0}]{1,60}",
        ) {
            let Some(message_id) = MessageId::new(&name) else {
                return Ok(());
            };
            let mut headers = Map::new();
            headers.insert(text.clone(), Value::String(text.clone()));
            let message = Message {
                body: body.clone(),
                exchange: text.clone(),
                routing_key: text.clone(),
                headers: headers.clone(),
                ..Message::default()
            };
            let work = Work { message_id: &message_id, message: &message, attempt: 3 };
            let line = request("orders", id, 1.5, &work);
            prop_assert!(line.iter().all(|byte| (b' '..0x7f).contains(byte) || *byte == b'\n'));
            prop_assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            prop_assert_eq!(line.last(), Some(&b'\n'));
            let back = read(&line);
            prop_assert_eq!(&back["id"], &Value::from(id));
            prop_assert_eq!(&back["message_id"], &Value::from(name));
            prop_assert_eq!(&back["routing_key"], &Value::from(text));
            prop_assert_eq!(&back["headers"], &Value::Object(headers));
            let got = match (back.get("body"), back.get("body_base64")) {
                (Some(Value::String(text)), None) => text.clone().into_bytes(),
                (None, Some(Value::String(text))) => STANDARD.decode(text).unwrap(),
                other => panic!("{other:?}"),
            };
            prop_assert_eq!(got, body);
        }

        #[test]
        fn whatever_a_program_writes_is_understood_or_explained(line: Vec<u8>, id: u64) {
            if let Err(problem) = answer(&line, id) {
                prop_assert!(problem.chars().count() < 1_000, "{problem}");
                prop_assert!(!problem.contains(|c: char| c.is_control() && c != '\n'));
            }
            greeting(&line).ok();
        }
    }
}
