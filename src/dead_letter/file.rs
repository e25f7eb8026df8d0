//! One letter as a line of a file, with all that it carries, and back. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::{Value, json};

use super::letter::Letter;
use crate::broker::properties::{Field, Properties};
use crate::config::checked::{Consumer, Identity};
use crate::identity;
use crate::message::{EXCHANGE_HEADER, Fingerprint, Message, MessageId, ROUTING_KEY_HEADER, hex};
use crate::why::printable;

/// How much of what is said of a line is shown, in characters: its beginning
/// says what is wrong, its end where.
const PROBLEM_START: usize = 700;
const PROBLEM_END: usize = 200;

/// `letter` of `consumer` as one line of JSON, with its end.
#[must_use]
pub fn line(letter: &Letter, consumer: &Consumer) -> String {
    let mut line = json!({
        "consumer": consumer.name,
        "position": letter.position,
        "id": letter.id.as_ref().map(MessageId::as_str),
        "fingerprint": hex(&letter.fingerprint.0),
        "died_at": letter.died_at_text(),
        "reason": letter.reason(),
        "class": letter.class(),
        "code": letter.code(),
        "error": letter.error(),
        "attempts": letter.attempts(),
        "exchange": letter.exchange(),
        "routing_key": letter.routing_key(),
        "repaired": letter.is_repaired(),
        "properties": letter.properties.to_json(),
    });
    let (name, body) = match std::str::from_utf8(&letter.message.body) {
        Ok(text) => ("body", text.to_owned()),
        Err(_) => ("body_base64", BASE64.encode(&letter.message.body)),
    };
    line[name] = Value::String(body);
    format!("{line}\n")
}

/// `problem` with a line of a file, which may quote all of the line, on one line
/// of bounded length and without characters that act on a terminal.
#[must_use]
pub fn brief(problem: &str) -> String {
    let shown = printable(problem);
    let count = shown.chars().count();
    if count <= PROBLEM_START + PROBLEM_END {
        return shown;
    }
    let start: String = shown.chars().take(PROBLEM_START).collect();
    let end: String = shown.chars().skip(count - PROBLEM_END).collect();
    format!("{start}…{end}")
}

/// A letter out of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// The consumer it was exported from, if the line says so.
    pub consumer: Option<String>,
    /// Everything it carries, and where it was first published to.
    pub properties: Properties,
    /// Its body.
    pub body: Vec<u8>,
    /// SHA-256 of the body.
    pub fingerprint: Fingerprint,
}

/// What is read of a line. The rest is for humans.
#[derive(Deserialize)]
struct Line {
    consumer: Option<String>,
    fingerprint: Option<String>,
    exchange: Option<String>,
    routing_key: Option<String>,
    properties: Value,
    body: Option<String>,
    body_base64: Option<String>,
}

impl Entry {
    /// Reads a line.
    ///
    /// # Errors
    ///
    /// What is wrong with it, and the way out: as [`brief`] makes it.
    pub fn read(line: &[u8]) -> Result<Self, String> {
        Self::parse(line).map_err(|problem| brief(&problem))
    }

    fn parse(line: &[u8]) -> Result<Self, String> {
        if line.trim_ascii().is_empty() {
            return Err("it is empty; every line must be a letter".to_owned());
        }
        // serde_json counts lines too, and always finds this to be its first.
        let line: Line = serde_json::from_slice(line)
            .map_err(|error| error.to_string().replace("at line 1 column", "at column"))?;
        let body = match (line.body, line.body_base64) {
            (Some(text), None) => text.into_bytes(),
            (None, Some(encoded)) => BASE64
                .decode(encoded)
                .map_err(|error| format!("body_base64 is not base64: {error}"))?,
            (Some(_), Some(_)) => return Err("it has both body and body_base64".to_owned()),
            (None, None) => return Err("it has neither body nor body_base64".to_owned()),
        };
        let fingerprint = identity::fingerprint(&body);
        if line
            .fingerprint
            .is_some_and(|said| said != hex(&fingerprint.0))
        {
            return Err(
                "its body is not the one that was exported: the fingerprint differs; if you \
                 changed it on purpose, take the member \"fingerprint\" out"
                    .to_owned(),
            );
        }
        let mut properties = Properties::from_json(&line.properties)?;
        if let (Some(exchange), Some(key)) = (line.exchange, line.routing_key) {
            remember_origin(&mut properties, exchange, key);
        }
        Ok(Self {
            consumer: line.consumer,
            properties,
            body,
            fingerprint,
        })
    }

    /// Its id for a consumer with this `identity`.
    #[must_use]
    pub fn id(&self, identity: &Identity) -> Option<MessageId> {
        let headers = self.properties.headers.iter().flatten();
        let message = Message {
            body: self.body.clone(),
            message_id: self.properties.message_id.clone(),
            headers: headers
                .map(|(name, field)| (name.clone(), field.plain()))
                .collect(),
            ..Message::default()
        };
        identity::identify(&message, identity).ok()
    }
}

/// Put straight into the dead-letter queue, a letter would forget where it came
/// from, unless the broker or the daemon wrote that into its headers already.
fn remember_origin(properties: &mut Properties, exchange: String, routing_key: String) {
    if properties.header("x-death").is_none() && properties.header(EXCHANGE_HEADER).is_none() {
        properties.set_header(EXCHANGE_HEADER, Field::Text(exchange));
        properties.set_header(ROUTING_KEY_HEADER, Field::Text(routing_key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_no_letter_is_refused_with_its_reason() {
        for (text, reason) in [
            ("", "empty"),
            ("{", "EOF"),
            (r#"{"body": "a"}"#, "missing field `properties`"),
            (r#"{"properties": {}}"#, "neither body nor body_base64"),
            (
                r#"{"properties": {}, "body": "a", "body_base64": ""}"#,
                "both",
            ),
            (r#"{"properties": {}, "body_base64": "?"}"#, "not base64"),
            (r#"{"properties": {}, "body": 1}"#, "expected a string"),
            (r#"{"properties": [], "body": "a"}"#, "must be an object"),
            (
                r#"{"properties": {"color": "red"}, "body": "a"}"#,
                "no property \"color\"",
            ),
            (
                r#"{"properties": {"priority": 256}, "body": "a"}"#,
                "0 to 255",
            ),
            (
                r#"{"properties": {"headers": {"n": 1.5}}, "body": "a"}"#,
                "header \"n\"",
            ),
            (
                r#"{"properties": {"headers": {"n": {"amqp": "int8", "value": 300}}}, "body": ""}"#,
                "type int8",
            ),
            (
                r#"{"properties": {"headers": {"n": {"amqp": "x", "value": 3}}}, "body": ""}"#,
                "AMQP has none",
            ),
            (
                r#"{"properties": {}, "body": "a", "fingerprint": "00"}"#,
                "on purpose",
            ),
        ] {
            let error = Entry::read(text.as_bytes()).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_said_of_a_line_does_not_repeat_all_of_it() {
        let line = format!("\"{}\"", "\u{7f}\u{202e}x".repeat(10_000));
        let error = Entry::read(line.as_bytes()).unwrap_err();
        assert!(error.starts_with("invalid type: string"), "{error}");
        assert!(error.contains("struct Line at column"), "{error}");
        assert!(error.chars().count() < 1_000, "{error}");
        assert!(!error.contains(['\u{7f}', '\u{202e}']), "{error}");
    }
}
