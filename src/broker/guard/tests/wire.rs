//! A small encoder of frames, sound and unsound, and strategies for them.

use proptest::prelude::*;

/// A value of a field table.
#[derive(Debug, Clone)]
pub enum Val {
    Plain(u8, Vec<u8>),
    Text(Vec<u8>),
    Bytes(Vec<u8>),
    Table(Vec<Entry>),
    Array(Vec<Val>),
}

pub type Entry = (Vec<u8>, Val);

fn encode_long(tag: u8, content: &[u8], out: &mut Vec<u8>) {
    out.push(tag);
    out.extend((content.len() as u32).to_be_bytes());
    out.extend(content);
}

fn encode(value: &Val, out: &mut Vec<u8>) {
    match value {
        Val::Plain(tag, content) => {
            out.push(*tag);
            out.extend(content);
        }
        Val::Text(content) => encode_long(b'S', content, out),
        Val::Bytes(content) => encode_long(b'x', content, out),
        Val::Table(entries) => {
            let mut content = Vec::new();
            encode_entries(entries, &mut content);
            encode_long(b'F', &content, out);
        }
        Val::Array(values) => {
            let mut content = Vec::new();
            values.iter().for_each(|value| encode(value, &mut content));
            encode_long(b'A', &content, out);
        }
    }
}

pub fn encode_entries(entries: &[Entry], out: &mut Vec<u8>) {
    for (key, value) in entries {
        encode_short(key, out);
        encode(value, out);
    }
}

fn encode_short(text: &[u8], out: &mut Vec<u8>) {
    out.push(u8::try_from(text.len()).expect("at most 255 bytes"));
    out.extend(text);
}

/// A value of `depth` containers, one in the other, the innermost empty.
pub fn nested(depth: usize, arrays: bool) -> Vec<u8> {
    let tag = if arrays { b'A' } else { b'F' };
    let key: &[u8] = if arrays { &[] } else { &[0] };
    let level = key.len() + 5;
    let mut out = Vec::new();
    for inner in (0..depth).rev() {
        out.push(tag);
        out.extend(((inner * level) as u32).to_be_bytes());
        if inner > 0 {
            out.extend(key);
        }
    }
    out
}

pub fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![kind];
    out.extend(channel.to_be_bytes());
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    out.push(0xCE);
    out
}

pub fn method(channel: u16, class: u16, method: u16, arguments: &[u8]) -> Vec<u8> {
    let mut payload = class.to_be_bytes().to_vec();
    payload.extend(method.to_be_bytes());
    payload.extend(arguments);
    frame(1, channel, &payload)
}

pub fn deliver(channel: u16, tag: u64, exchange: &[u8], routing_key: &[u8]) -> Vec<u8> {
    let mut arguments = Vec::new();
    encode_short(b"consumer", &mut arguments);
    arguments.extend(tag.to_be_bytes());
    arguments.push(0);
    encode_short(exchange, &mut arguments);
    encode_short(routing_key, &mut arguments);
    method(channel, 60, 60, &arguments)
}

pub fn get_ok(channel: u16, tag: u64, routing_key: &[u8]) -> Vec<u8> {
    let mut arguments = tag.to_be_bytes().to_vec();
    arguments.push(1);
    encode_short(b"", &mut arguments);
    encode_short(routing_key, &mut arguments);
    arguments.extend([0; 4]);
    method(channel, 60, 71, &arguments)
}

pub fn returned(channel: u16, routing_key: &[u8]) -> Vec<u8> {
    let mut arguments = 312_u16.to_be_bytes().to_vec();
    encode_short(b"NO_ROUTE", &mut arguments);
    encode_short(b"", &mut arguments);
    encode_short(routing_key, &mut arguments);
    method(channel, 60, 50, &arguments)
}

pub fn short_argument(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode_short(text, &mut out);
    out
}

/// A property list; properties are added in the order of their numbers, which
/// count from content-type = 0 to cluster-id = 13.
#[derive(Debug, Clone, Default)]
pub struct Props {
    flags: u16,
    content: Vec<u8>,
}

impl Props {
    pub fn raw(flags: u16, content: &[u8]) -> Self {
        Self {
            flags,
            content: content.to_vec(),
        }
    }

    fn flagged(mut self, number: usize) -> Self {
        self.flags |= 0x8000 >> number;
        self
    }

    pub fn short(mut self, number: usize, text: &[u8]) -> Self {
        encode_short(text, &mut self.content);
        self.flagged(number)
    }

    pub fn message_id(self, text: &[u8]) -> Self {
        self.short(8, text)
    }

    pub fn headers(mut self, table: &[u8]) -> Self {
        self.content.extend((table.len() as u32).to_be_bytes());
        self.content.extend(table);
        self.flagged(2)
    }

    pub fn fixed(mut self, number: usize, content: &[u8]) -> Self {
        self.content.extend(content);
        self.flagged(number)
    }

    /// Any property, filled with `text` where it holds text.
    pub fn numbered(self, number: usize, text: &[u8]) -> Self {
        match number {
            2 => {
                let mut table = Vec::new();
                encode_entries(&[(b"k".to_vec(), Val::Text(text.to_vec()))], &mut table);
                self.headers(&table)
            }
            3 | 4 => self.fixed(number, &[1]),
            9 => self.fixed(number, &[0; 8]),
            _ => self.short(number, text),
        }
    }
}

pub fn header(channel: u16, body_size: u64, props: &Props) -> Vec<u8> {
    let mut payload = vec![0, 60, 0, 0];
    payload.extend(body_size.to_be_bytes());
    payload.extend(props.flags.to_be_bytes());
    payload.extend(&props.content);
    frame(2, channel, &payload)
}

pub fn body(channel: u16, content: &[u8]) -> Vec<u8> {
    frame(3, channel, content)
}

fn text() -> impl Strategy<Value = Vec<u8>> {
    "\\PC{0,20}".prop_map(String::into_bytes)
}

/// Up to 60 bytes, most of them not UTF-8.
pub fn broken_text() -> impl Strategy<Value = Vec<u8>> {
    let pieces = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..12),
        text().prop_map(|text| text.into_iter().take(11).collect()),
        Just(vec![0xF0, 0x9F, 0x98]),
    ];
    prop::collection::vec(pieces, 1..5).prop_map(|pieces| pieces.concat())
}

/// A number with any tag that both sides know.
fn number() -> impl Strategy<Value = Val> {
    let tags: Vec<(u8, usize)> = [
        (0, "V"),
        (1, "tbB"),
        (2, "suU"),
        (4, "Iif"),
        (5, "D"),
        (8, "lLdT"),
    ]
    .iter()
    .flat_map(|&(length, tags)| tags.bytes().map(move |tag| (tag, length)))
    .collect();
    prop::sample::select(tags).prop_flat_map(|(tag, length)| {
        prop::collection::vec(any::<u8>(), length).prop_map(move |content| Val::Plain(tag, content))
    })
}

fn value() -> impl Strategy<Value = Val> {
    let leaf = prop_oneof![
        3 => number(),
        2 => text().prop_map(Val::Text),
        1 => prop::collection::vec(any::<u8>(), 0..20).prop_map(Val::Bytes),
    ];
    leaf.prop_recursive(6, 40, 4, |inner| {
        prop_oneof![
            prop::collection::vec((text(), inner.clone()), 0..4).prop_map(Val::Table),
            prop::collection::vec(inner, 0..4).prop_map(Val::Array),
        ]
    })
}

pub fn entries() -> impl Strategy<Value = Vec<Entry>> {
    prop::collection::vec((text(), value()), 0..6)
}

/// A sound property list.
pub fn props() -> impl Strategy<Value = Props> {
    (any::<u16>(), text(), entries()).prop_map(|(chosen, text, entries)| {
        let mut table = Vec::new();
        encode_entries(&entries, &mut table);
        (0..14).filter(|number| chosen & (1 << number) != 0).fold(
            Props::default(),
            |props, number| match number {
                2 => props.headers(&table),
                _ => props.numbered(number, &text),
            },
        )
    })
}

/// The frames of one sound message: deliver, header and any number of bodies.
pub fn message() -> impl Strategy<Value = Vec<u8>> {
    let bodies = prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 0..4);
    let names = (1_u16..5, any::<u64>(), text(), text());
    (names, props(), bodies).prop_map(|((channel, tag, exchange, key), props, bodies)| {
        let length: usize = bodies.iter().map(Vec::len).sum();
        let mut out = deliver(channel, tag, &exchange, &key);
        out.extend(header(channel, length as u64, &props));
        for content in &bodies {
            out.extend(body(channel, content));
        }
        out.extend(frame(8, 0, &[]));
        out
    })
}
