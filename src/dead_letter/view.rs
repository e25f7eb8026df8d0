//! Letters for the eye and for other programs. Pure.

use std::fmt::Write;

use serde_json::{Value, json};

use super::letter::Letter;
use crate::broker::properties::Field;
use crate::message::{MessageId, hex};
use crate::why::printable;

/// Bytes in a line of a dump.
const DUMP_WIDTH: usize = 16;

/// A letter in one object, without what it carries.
#[must_use]
pub fn summary(letter: &Letter) -> Value {
    json!({
        "position": letter.position,
        "id": letter.id.as_ref().map(MessageId::as_str),
        "fingerprint": hex(&letter.fingerprint.0),
        "died_at": letter.died_at_text(),
        "reason": letter.reason(),
        "class": letter.class(),
        "code": letter.code(),
        "attempts": letter.attempts(),
        "error": letter.error(),
        "size": letter.size(),
        "exchange": letter.exchange(),
        "routing_key": letter.routing_key(),
        "returns": letter.returns,
    })
}

/// Everything about a letter but its timeline: fields, properties, headers, and
/// `body_max` bytes of its body.
#[must_use]
pub fn text(letter: &Letter, body_max: usize) -> String {
    let mut out = String::new();
    let mut field = |name: &str, value: &str| {
        // A String takes whatever it is given.
        writeln!(out, "{name:<17} {}", printable(value)).ok();
    };
    field("letter", &letter.name());
    field("position", &letter.position.to_string());
    field(
        "died at",
        &letter
            .died_at_text()
            .unwrap_or_else(|| "not known".to_owned()),
    );
    field("reason", letter.reason());
    match &letter.verdict {
        Some(verdict) => {
            let code = verdict.code.as_deref();
            let class = code.map_or_else(
                || verdict.class.clone(),
                |code| format!("{}, {code}", verdict.class),
            );
            field("class", &class);
            field("handler", &verdict.handler);
            for (index, line) in verdict.error.lines().enumerate() {
                field(if index == 0 { "error" } else { "" }, line);
            }
        }
        None => field("class", "not in the failure journal"),
    }
    field("attempts", &letter.attempts().to_string());
    let (exchange, key) = letter.origin();
    let origin = match letter.knows_origin() {
        true => "",
        false => " (as it came here: where it was first published to is not known)",
    };
    field("exchange", &format!("{exchange:?}{origin}"));
    field("routing key", &format!("{key:?}"));
    if letter.returns > 0 {
        field(
            "came back",
            &format!("{} times to this queue", letter.returns),
        );
    }
    if letter.is_repaired() {
        field(
            "repaired",
            "it has bytes that AMQP does not allow; they are shown changed",
        );
    }
    properties(&mut out, letter);
    body(&mut out, &letter.message.body, body_max);
    out
}

fn properties(out: &mut String, letter: &Letter) {
    let Value::Object(properties) = letter.properties.to_json() else {
        return;
    };
    for (name, value) in properties.iter().filter(|(name, _)| *name != "headers") {
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        writeln!(out, "{name:<17} {}", printable(&text)).ok();
    }
    let Some(headers) = letter.properties.headers.as_ref().filter(|h| !h.is_empty()) else {
        return;
    };
    writeln!(out, "headers").ok();
    for (name, field) in headers {
        let value = match field {
            Field::Text(text) => text.clone(),
            other => other.plain().to_string(),
        };
        let kind = kind(field);
        writeln!(out, "  {}: {} ({kind})", printable(name), printable(&value)).ok();
    }
}

fn kind(field: &Field) -> &'static str {
    match field {
        Field::Void => "void",
        Field::Bool(_) => "bool",
        Field::Int8(_) => "int8",
        Field::Uint8(_) => "uint8",
        Field::Int16(_) => "int16",
        Field::Uint16(_) => "uint16",
        Field::Int32(_) => "int32",
        Field::Uint32(_) => "uint32",
        Field::Int64(_) => "int64",
        Field::Float(_) => "float",
        Field::Double(_) => "double",
        Field::Decimal { .. } => "decimal",
        Field::Text(_) => "text",
        Field::Bytes(_) => "bytes",
        Field::Timestamp(_) => "timestamp",
        Field::List(_) => "list",
        Field::Table(_) => "table",
    }
}

/// JSON with its lines indented, other text as it is, else a dump.
fn body(out: &mut String, body: &[u8], most: usize) {
    let pretty = serde_json::from_slice::<&serde_json::value::RawValue>(body).ok();
    let text = match pretty {
        Some(json) => Some(indented(json.get())),
        None => std::str::from_utf8(body)
            .ok()
            .filter(|text| {
                !text
                    .chars()
                    .any(|c| c.is_control() && !"\n\r\t".contains(c))
            })
            .map(str::to_owned),
    };
    writeln!(out, "body              {} bytes", body.len()).ok();
    let shown = match &text {
        Some(text) => {
            let end = (0..=most.min(text.len()))
                .rev()
                .find(|end| text.is_char_boundary(*end));
            let shown = &text[..end.unwrap_or(0)];
            for line in shown.lines() {
                writeln!(out, "  {}", printable(line)).ok();
            }
            shown.len() == text.len()
        }
        None => {
            dump(out, &body[..body.len().min(most)]);
            body.len() <= most
        }
    };
    if !shown {
        writeln!(
            out,
            "  … cut here: see --body-max, and `ackonce dead export`"
        )
        .ok();
    }
}

/// JSON as it stands, with line breaks: reading and writing it again could
/// change numbers, and members of one name.
fn indented(json: &str) -> String {
    let mut out = String::with_capacity(json.len() * 2);
    let (mut depth, mut in_text, mut escaped) = (0usize, false, false);
    let mut characters = json.chars().peekable();
    while let Some(c) = characters.next() {
        if in_text {
            out.push(c);
            in_text = escaped || c != '"';
            escaped = c == '\\' && !escaped;
            continue;
        }
        let break_line = |out: &mut String, depth: usize| {
            out.push('\n');
            // Deeper than this, a body would grow with the square.
            out.extend(std::iter::repeat_n(' ', 2 * depth.min(64)));
        };
        match c {
            ' ' | '\n' | '\r' | '\t' => {}
            '"' => {
                in_text = true;
                out.push(c);
            }
            '{' | '[' => {
                out.push(c);
                while characters.next_if(char::is_ascii_whitespace).is_some() {}
                if !matches!(characters.peek(), Some('}' | ']')) {
                    depth += 1;
                    break_line(&mut out, depth);
                } else if let Some(end) = characters.next() {
                    out.push(end);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                break_line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                break_line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            c => out.push(c),
        }
    }
    out
}

fn dump(out: &mut String, bytes: &[u8]) {
    for (index, line) in bytes.chunks(DUMP_WIDTH).enumerate() {
        let mut digits = String::new();
        for byte in line {
            write!(digits, "{byte:02x} ").ok();
        }
        let text: String = line
            .iter()
            .map(|&byte| match byte {
                b' '..=b'~' => char::from(byte),
                _ => '.',
            })
            .collect();
        writeln!(out, "  {:08x}  {digits:<48} {text}", index * DUMP_WIDTH).ok();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shown(bytes: &[u8], most: usize) -> String {
        let mut out = String::new();
        body(&mut out, bytes, most);
        out
    }

    #[test]
    fn json_is_indented_and_its_numbers_stay_as_they_are() {
        let text = shown(
            br#"{"a":1.0,"b":[ ],"c":{"d":"x\":{,"},"e":12345678901234567890123}"#,
            999,
        );
        assert_eq!(
            text,
            "body              63 bytes\n  {\n    \"a\": 1.0,\n    \"b\": [],\n    \"c\": {\n      \
             \"d\": \"x\\\":{,\"\n    },\n    \"e\": 12345678901234567890123\n  }\n"
        );
    }

    #[test]
    fn what_is_no_text_is_dumped_and_cut_with_a_word() {
        let text = shown(&[0, 1, b'A', 255], 3);
        assert!(text.contains("00000000  00 01 41"), "{text}");
        assert!(
            text.contains("..A\n") && text.contains("cut here"),
            "{text}"
        );
        assert!(shown("é\u{1b}[2J".as_bytes(), 99).contains("1b 5b 32 4a"));
        assert!(shown("ééé".as_bytes(), 3).contains("  é\n"));
    }

    proptest! {
        #[test]
        fn indenting_changes_nothing_but_white_space(text in "[\\[\\]{}:,\"a0 \\\\n]{0,60}") {
            if let Ok(value) = serde_json::from_str::<Value>(&text) {
                let again: Value = serde_json::from_str(&indented(&text)).unwrap();
                prop_assert_eq!(again, value);
            }
        }

        #[test]
        fn any_body_is_shown_within_its_bound(bytes: Vec<u8>, most in 0usize..200) {
            let text = shown(&bytes, most);
            prop_assert!(text.len() <= 200 + 10 * most + 10 * bytes.len());
        }
    }
}
