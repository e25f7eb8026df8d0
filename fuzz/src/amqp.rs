//! What a broker sends: its frames, and the messages in them.

use std::io::Read;
use std::sync::OnceLock;

use ackonce::broker::convert;
use ackonce::broker::guard::{Guard, NESTING_MAX};
use ackonce::broker::properties::Properties;
use ackonce::config::checked::{Consumer, Identity};
use ackonce::dead_letter::file::{self, Entry};
use ackonce::dead_letter::letter::{Death, Letter};
use ackonce::handler::Work;
use ackonce::handler::command::line;
use ackonce::identity;
use ackonce::message::{
    DeadReason, EXCHANGE_HEADER, Message, MessageId, ROUTING_KEY_HEADER, Repairs,
};
use amq_protocol::frame::AMQPFrame;
use amq_protocol::frame::parsing::parse_frame;
use amq_protocol::protocol::AMQPClass;
use amq_protocol::protocol::basic::{AMQPMethod, AMQPProperties};
use amq_protocol::types::{AMQPValue, FieldTable};
use serde_json::Value;

/// Kind, channel and length before the payload of a frame.
const HEAD: usize = 7;
const END: u8 = 0xCE;
/// Class, weight, body size before the flags of a content header.
const BEFORE_FLAGS: usize = 12;

const CHANNEL: u16 = 1;
const TAG: u64 = 7;

/// Any bytes in the place of a broker's: what the guard lets pass, amiquip can
/// read, and it makes no difference how the bytes were cut. The first byte says
/// how.
pub fn frames(data: &[u8]) {
    let Some((&most, bytes)) = data.split_first() else {
        return;
    };
    let (out, refused) = guarded(bytes);
    let pieces = Pieces {
        rest: bytes,
        most: usize::from(most).max(1),
    };
    assert_eq!(guarded(pieces), (out.clone(), refused.clone()));
    assert!(out.len() <= bytes.len(), "the guard made bytes up");
    assert!(!refused.is_some_and(|reason| super::has_control(&reason)));
    read_all(&out);
}

/// A property list, a routing key and a body, in sound frames: they arrive as a
/// message that has an id or a reason to have none, and all that becomes of
/// them can be read back. Four bytes say the lengths of key and body, and the
/// flags.
pub fn delivery(data: &[u8]) {
    let Some((&[key_length, body_length, high, low], rest)) = data.split_first_chunk() else {
        return;
    };
    let (key, rest) = rest.split_at(usize::from(key_length).min(rest.len()));
    let (body, list) = rest.split_at(usize::from(body_length).min(rest.len()));
    let bytes = sent(key, body, [high, low], list);
    let mut guard = Guard::new(&bytes[..], 0, 10);
    let log = guard.repair_log();
    let mut out = Vec::new();
    guard
        .read_to_end(&mut out)
        .expect("no message can have the guard refuse the stream");
    assert_eq!(out.len(), bytes.len(), "the guard changed a length");
    let (exchange, routing_key, properties) = delivered(read_all(&out));
    let repairs = log.take(CHANNEL, TAG);
    let is_touched = repairs != Repairs::default();
    assert!(out == bytes || is_touched, "a repair that is not told");
    let message = convert::message(
        &properties,
        (&exchange, &routing_key),
        false,
        body.to_vec(),
        repairs,
    );
    assert_eq!(message.body, body);
    assert_eq!(exchange, "events");
    let headers = Value::Object(message.headers.clone()).to_string();
    assert!(!headers.contains("\\u0000"), "a NUL for PostgreSQL");
    identified(&message);
    handed_over(&message);
    written_down(&message, Properties::from_amqp(&properties));
}

/// What comes out of the guard, and why it refused the rest.
fn guarded(stream: impl Read) -> (Vec<u8>, Option<String>) {
    let mut out = Vec::new();
    let end = Guard::new(stream, 0, 10).read_to_end(&mut out);
    (out, end.err().map(|error| error.to_string()))
}

/// Hands out `rest`, at most `most` bytes at a time.
struct Pieces<'a> {
    rest: &'a [u8],
    most: usize,
}

impl Read for Pieces<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let count = self.most.min(out.len()).min(self.rest.len());
        let (now, later) = self.rest.split_at(count);
        out[..count].copy_from_slice(now);
        self.rest = later;
        Ok(count)
    }
}

/// Reads every whole frame at the start of `bytes` as amiquip does.
fn read_all(bytes: &[u8]) -> Vec<AMQPFrame> {
    let mut frames = Vec::new();
    let mut rest = bytes;
    while let Some(&[_, _, _, a, b, c, d]) = rest.first_chunk::<HEAD>() {
        let length = HEAD + u32::from_be_bytes([a, b, c, d]) as usize + 1;
        let Some((frame, after)) = rest.split_at_checked(length) else {
            break;
        };
        frames.push(read_frame(frame));
        rest = after;
    }
    frames
}

fn read_frame(bytes: &[u8]) -> AMQPFrame {
    let (left, frame) = parse_frame(bytes).expect("a frame that amiquip can read");
    assert!(left.is_empty(), "bytes left over");
    if let AMQPFrame::Header(_, _, content) = &frame {
        let flags = HEAD + BEFORE_FLAGS;
        let flags = u16::from_be_bytes([bytes[flags], bytes[flags + 1]]);
        // The two lowest flags are of no property.
        assert_eq!(
            content.properties.bitmask(),
            flags & !3,
            "a property was passed over"
        );
        let depth = content.properties.headers().as_ref().map_or(0, depth);
        assert!(depth <= NESTING_MAX, "{depth} levels of headers");
    }
    frame
}

fn depth(table: &FieldTable) -> usize {
    1 + table.values().map(depth_of).max().unwrap_or(0)
}

fn depth_of(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::FieldTable(table) => depth(table),
        AMQPValue::FieldArray(items) => 1 + items.iter().map(depth_of).max().unwrap_or(0),
        _ => 0,
    }
}

fn sent(key: &[u8], body: &[u8], flags: [u8; 2], list: &[u8]) -> Vec<u8> {
    let mut method = vec![0, 60, 0, 60];
    short(b"consumer", &mut method);
    method.extend(TAG.to_be_bytes());
    method.push(0);
    short(b"events", &mut method);
    short(key, &mut method);
    let mut header = vec![0, 60, 0, 0];
    header.extend((body.len() as u64).to_be_bytes());
    header.extend(flags);
    header.extend(list);
    [frame(1, &method), frame(2, &header), frame(3, body)].concat()
}

fn short(text: &[u8], out: &mut Vec<u8>) {
    out.push(u8::try_from(text.len()).expect("at most 255 bytes"));
    out.extend(text);
}

fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend(CHANNEL.to_be_bytes());
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    out.push(END);
    out
}

/// Exchange, routing key and properties of the one message that was sent.
fn delivered(frames: Vec<AMQPFrame>) -> (String, String, AMQPProperties) {
    match <[AMQPFrame; 3]>::try_from(frames) {
        Ok(
            [
                AMQPFrame::Method(_, AMQPClass::Basic(AMQPMethod::Deliver(method))),
                AMQPFrame::Header(_, _, content),
                AMQPFrame::Body(..),
            ],
        ) => (method.exchange, method.routing_key, content.properties),
        other => panic!("not the three frames that were sent: {other:?}"),
    }
}

/// One id wherever it is looked for, and always the same, or a reason.
fn identified(message: &Message) {
    for identity in [
        Identity::MessageId,
        Identity::Header("id".to_owned()),
        Identity::Json("/id".to_owned()),
        Identity::Body,
    ] {
        let found = identity::identify(message, &identity);
        assert_eq!(found, identity::identify(message, &identity));
        let is_hit = match identity {
            Identity::MessageId => message.repairs.message_id,
            Identity::Header(_) => message.repairs.headers,
            Identity::Json(_) | Identity::Body => false,
        };
        assert_eq!(found == Err(DeadReason::BadHeader), is_hit);
        if let Ok(id) = found {
            assert!((1..=255).contains(&id.as_str().len()));
            assert!(!id.as_str().contains('\0'));
            let key = identity::idempotency_key("orders", &id);
            assert!(key.bytes().all(|byte| byte.is_ascii_graphic()), "{key:?}");
            assert!(key.len() <= 830);
        }
    }
}

fn message_id() -> MessageId {
    MessageId::new("id").expect("an id")
}

/// To a program: one line of ASCII, with all that it needs.
fn handed_over(message: &Message) {
    let work = Work {
        message_id: &message_id(),
        message,
        attempt: 1,
    };
    let line = line::request("orders", 1, 1.5, &work);
    assert_eq!(
        line.iter().position(|byte| *byte == b'\n'),
        Some(line.len() - 1)
    );
    assert!(line.is_ascii());
    let read: Value = serde_json::from_slice(&line).expect("a line of JSON");
    // Read as the line is: serde_json takes some fractions for their neighbour.
    let headers = Value::Object(message.headers.clone()).to_string();
    let headers: Value = serde_json::from_str(&headers).expect("headers as JSON");
    assert_eq!(read["headers"], headers);
    assert_eq!(read["routing_key"], Value::from(&*message.routing_key));
}

/// Into a file of dead letters, and out of it as it was.
fn written_down(message: &Message, properties: Properties) {
    let letter = Letter {
        position: 1,
        id: identity::identify(message, &Identity::MessageId).ok(),
        fingerprint: identity::fingerprint(&message.body),
        message: message.clone(),
        via_exchange: "dead".to_owned(),
        via_routing_key: "orders".to_owned(),
        returns: 0,
        verdict: None,
        death: Death::of(&properties, "orders"),
        properties,
    };
    let line = file::line(&letter, consumer());
    assert_eq!(line.find('\n'), Some(line.len() - 1), "one line");
    let entry = Entry::read(line.as_bytes()).unwrap_or_else(|error| panic!("{line}: {error}"));
    assert_eq!(entry.body, message.body);
    let mut back = entry.properties;
    if letter.properties.header(EXCHANGE_HEADER).is_none() {
        let had_headers = letter.properties.headers.is_some();
        back.remove_header(EXCHANGE_HEADER);
        if letter.properties.header(ROUTING_KEY_HEADER).is_none() {
            back.remove_header(ROUTING_KEY_HEADER);
        }
        back.headers = back
            .headers
            .filter(|headers| had_headers || !headers.is_empty());
    }
    // As JSON: a NaN is not equal to itself.
    let is_overwritten = letter.properties.header(EXCHANGE_HEADER).is_none()
        && letter.properties.header("x-death").is_none()
        && letter.properties.header(ROUTING_KEY_HEADER).is_some();
    assert!(is_overwritten || back.to_json() == letter.properties.to_json());
}

/// Whose dead letters are written.
fn consumer() -> &'static Consumer {
    static CONSUMER: OnceLock<Consumer> = OnceLock::new();
    CONSUMER.get_or_init(|| {
        let config = super::text::parse(super::text::BASE).expect("a sound configuration");
        config.consumers.into_iter().next().expect("a consumer")
    })
}
