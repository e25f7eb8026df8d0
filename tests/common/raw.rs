//! An AMQP 0-9-1 client that sends whatever bytes it is told to, valid or not,
//! and reads dead letters that no decent client could decode.

use std::io::{Read, Write};
use std::net::TcpStream;

use percent_encoding::percent_decode_str;
use url::Url;

const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const FRAME_END: u8 = 0xCE;

/// Property flags, as they stand in a content header.
pub mod flag {
    pub const CONTENT_TYPE: u16 = 1 << 15;
    pub const CONTENT_ENCODING: u16 = 1 << 14;
    pub const HEADERS: u16 = 1 << 13;
    pub const DELIVERY_MODE: u16 = 1 << 12;
    pub const PRIORITY: u16 = 1 << 11;
    pub const CORRELATION_ID: u16 = 1 << 10;
    pub const REPLY_TO: u16 = 1 << 9;
    pub const EXPIRATION: u16 = 1 << 8;
    pub const MESSAGE_ID: u16 = 1 << 7;
    pub const TIMESTAMP: u16 = 1 << 6;
    pub const TYPE: u16 = 1 << 5;
    pub const USER_ID: u16 = 1 << 4;
    pub const APP_ID: u16 = 1 << 3;
    pub const CLUSTER_ID: u16 = 1 << 2;
}

/// Every property that is a short string, `message_id` and those that the
/// broker itself reads (`expiration`, `user_id`) left out.
pub const SHORT_STRINGS: [(&str, u16); 7] = [
    ("content_type", flag::CONTENT_TYPE),
    ("content_encoding", flag::CONTENT_ENCODING),
    ("correlation_id", flag::CORRELATION_ID),
    ("reply_to", flag::REPLY_TO),
    ("type", flag::TYPE),
    ("app_id", flag::APP_ID),
    ("cluster_id", flag::CLUSTER_ID),
];

/// Properties in the making: each is added once, and encoded in the order of
/// the flags.
#[derive(Debug, Clone, Default)]
pub struct Properties {
    parts: std::collections::BTreeMap<std::cmp::Reverse<u16>, Vec<u8>>,
}

impl Properties {
    /// Persistent, with `id` as its message id.
    pub fn new(id: &[u8]) -> Self {
        Self::anonymous().short(flag::MESSAGE_ID, id)
    }

    /// Persistent, without an id.
    pub fn anonymous() -> Self {
        Self::default().bytes(flag::DELIVERY_MODE, vec![2])
    }

    /// A short string of any bytes.
    #[must_use]
    pub fn short(self, flag: u16, text: &[u8]) -> Self {
        self.bytes(flag, short_string(text))
    }

    /// A header table of `fields`, as encoded by [`field`].
    #[must_use]
    pub fn headers(self, fields: &[Vec<u8>]) -> Self {
        self.bytes(flag::HEADERS, long(&fields.concat()))
    }

    /// Any bytes at all.
    #[must_use]
    pub fn bytes(mut self, flag: u16, bytes: Vec<u8>) -> Self {
        self.parts.insert(std::cmp::Reverse(flag), bytes);
        self
    }

    fn encode(&self) -> Vec<u8> {
        let flags = self.parts.keys().fold(0, |flags, flag| flags | flag.0);
        let mut bytes = u16::to_be_bytes(flags).to_vec();
        bytes.extend(self.parts.values().flatten());
        bytes
    }
}

/// A field of a header table: name, type letter, and the value's bytes.
pub fn field(name: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = short_string(name);
    bytes.push(kind);
    bytes.extend(value);
    bytes
}

/// A short string: its length in one byte, and at most 255 bytes.
pub fn short_string(text: &[u8]) -> Vec<u8> {
    let mut bytes = vec![u8::try_from(text.len()).expect("at most 255 bytes")];
    bytes.extend(text);
    bytes
}

/// A long string, table or array: its length in four bytes, and its bytes.
pub fn long(content: &[u8]) -> Vec<u8> {
    let mut bytes = length(content.len()).to_vec();
    bytes.extend(content);
    bytes
}

/// A header whose value is `depth` arrays in each other.
pub fn nested_arrays(name: &[u8], depth: usize) -> Vec<u8> {
    nested(name, depth, b'A', 5, &[])
}

/// A header whose value is `depth` tables in each other, each but the last
/// with one field without a name.
pub fn nested_tables(name: &[u8], depth: usize) -> Vec<u8> {
    nested(name, depth, b'F', 6, &[0])
}

/// One field called `name` of every type there is in RabbitMQ's tables, and
/// some whose own name is the hazard.
pub fn every_type(name: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let field = |name: &[u8], kind: u8, value: &[u8]| field(name, kind, value);
    let string = |name: &[u8], text: &[u8]| field(name, b'S', &long(text));
    vec![
        ("boolean", field(name, b't', &[1])),
        ("i8", field(name, b'b', &[0x80])),
        ("u8", field(name, b'B', &[0xFF])),
        ("i16", field(name, b's', &i16::MIN.to_be_bytes())),
        ("u16", field(name, b'u', &u16::MAX.to_be_bytes())),
        ("i32", field(name, b'I', &i32::MIN.to_be_bytes())),
        ("u32", field(name, b'i', &u32::MAX.to_be_bytes())),
        ("i64", field(name, b'l', &i64::MIN.to_be_bytes())),
        ("f32", field(name, b'f', &1.5_f32.to_be_bytes())),
        ("f64", field(name, b'd', &f64::MAX.to_be_bytes())),
        ("decimal", field(name, b'D', &[255, 0xFF, 0xFF, 0xFF, 0xFF])),
        ("time", field(name, b'T', &u64::MAX.to_be_bytes())),
        ("void", field(name, b'V', &[])),
        ("bytes", field(name, b'x', &long(b"\xFF\0\xFE"))),
        ("empty bytes", field(name, b'x', &long(&[]))),
        ("string", string(name, b"text")),
        ("empty string", string(name, b"")),
        ("NUL in a string", string(name, b"a\0b")),
        ("no UTF-8 in a string", string(name, b"\xFF\xFE")),
        ("long string", string(name, &[b'x'; 100_000])),
        ("empty table", field(name, b'F', &long(&[]))),
        ("empty array", field(name, b'A', &long(&[]))),
        (
            "mixed array",
            field(name, b'A', &long(b"t\x01VS\0\0\0\x02\xFF\xFEF\0\0\0\0")),
        ),
        ("table", field(name, b'F', &long(&string(b"\0", b"\xFF")))),
        ("no name", string(b"", b"text")),
        ("NUL in a name", string(b"a\0b", b"text")),
        ("no UTF-8 in a name", field(b"\xFF\xFE", b't', &[0])),
        ("name of 255 bytes", field(&[0x80; 255], b't', &[0])),
        (
            "one name twice",
            [string(name, b"1"), string(name, b"2")].concat(),
        ),
    ]
}

fn nested(name: &[u8], depth: usize, kind: u8, level: usize, before: &[u8]) -> Vec<u8> {
    let mut value = length((depth - 1) * level).to_vec();
    for inner in (0..depth - 1).rev() {
        value.extend(before);
        value.push(kind);
        value.extend(length(inner * level));
    }
    field(name, kind, &value)
}

fn length(bytes: usize) -> [u8; 4] {
    u32::try_from(bytes).expect("a length").to_be_bytes()
}

/// A message as the bytes it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawMessage {
    /// Property flags and properties.
    pub properties: Vec<u8>,
    /// Body.
    pub body: Vec<u8>,
}

/// One connection with one channel, in confirm mode.
pub struct RawClient {
    stream: TcpStream,
    frame_max: usize,
}

impl RawClient {
    /// Logs in at `url`.
    pub fn connect(url: &str) -> Self {
        let url = Url::parse(url).expect("a URL");
        let text = |encoded: &str| percent_decode_str(encoded).collect::<Vec<u8>>();
        let address = (url.host_str().expect("a host"), url.port().unwrap_or(5672));
        let stream = TcpStream::connect(address).expect("RabbitMQ listens");
        stream.set_nodelay(true).expect("no delay");
        stream
            .set_read_timeout(Some(super::DEADLINE))
            .expect("a timeout");
        let mut client = Self {
            stream,
            frame_max: 0,
        };
        client.stream.write_all(b"AMQP\0\0\x09\x01").expect("hello");
        client.expect(10, 10);
        let login = [
            &[0][..],
            &text(url.username()),
            &[0],
            &text(url.password().unwrap_or_default()),
        ]
        .concat();
        let start_ok = [
            long(&[]),
            short_string(b"PLAIN"),
            long(&login),
            short_string(b"en_US"),
        ];
        client.method(0, 10, 11, &start_ok.concat());
        let tune = client.expect(10, 30);
        client.frame_max = u32::from_be_bytes(tune[2..6].try_into().expect("4 bytes")) as usize;
        let tune_ok = [&tune[..6], &[0, 0]].concat();
        client.method(0, 10, 31, &tune_ok);
        let vhost = text(url.path().trim_start_matches('/'));
        let open = [short_string(&vhost), vec![0, 0]].concat();
        client.method(0, 10, 40, &open);
        client.expect(10, 41);
        client.method(1, 20, 10, &[0]);
        client.expect(20, 11);
        client.method(1, 85, 10, &[0]);
        client.expect(85, 11);
        client
    }

    /// Publishes, and waits for the confirm: from here on the broker has it.
    pub fn publish(&mut self, exchange: &str, key: &[u8], properties: &Properties, body: &[u8]) {
        let exchange = short_string(exchange.as_bytes());
        let publish = [vec![0, 0], exchange, short_string(key), vec![0]].concat();
        self.method(1, 60, 40, &publish);
        let mut header = vec![0, 60, 0, 0];
        header.extend((body.len() as u64).to_be_bytes());
        header.extend(properties.encode());
        assert!(
            header.len() + 8 <= self.frame_max,
            "properties of {} bytes do not fit a frame",
            header.len()
        );
        self.frame(HEADER, 1, &header);
        for chunk in body.chunks(self.frame_max - 8) {
            self.frame(BODY, 1, chunk);
        }
        self.expect(60, 80);
    }

    /// Takes one message out of `queue`.
    pub fn get(&mut self, queue: &str) -> Option<RawMessage> {
        let get = [vec![0, 0], short_string(queue.as_bytes()), vec![1]].concat();
        self.method(1, 60, 70, &get);
        let (class, method, _) = self.next_method();
        if (class, method) == (60, 72) {
            return None;
        }
        assert_eq!((class, method), (60, 71), "basic.get-ok");
        let (kind, header) = self.next_frame();
        assert_eq!(kind, HEADER, "a content header");
        let size = u64::from_be_bytes(header[4..12].try_into().expect("8 bytes"));
        let mut body = Vec::new();
        while (body.len() as u64) < size {
            let (kind, chunk) = self.next_frame();
            assert_eq!(kind, BODY, "a body frame");
            body.extend(chunk);
        }
        Some(RawMessage {
            properties: header[12..].to_vec(),
            body,
        })
    }

    fn method(&mut self, channel: u16, class: u16, method: u16, arguments: &[u8]) {
        let mut payload = class.to_be_bytes().to_vec();
        payload.extend(method.to_be_bytes());
        payload.extend(arguments);
        self.frame(METHOD, channel, &payload);
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let mut frame = vec![kind];
        frame.extend(channel.to_be_bytes());
        frame.extend(long(payload));
        frame.push(FRAME_END);
        self.stream.write_all(&frame).expect("the broker reads");
    }

    fn expect(&mut self, class: u16, method: u16) -> Vec<u8> {
        let (got_class, got_method, arguments) = self.next_method();
        assert_eq!(
            (got_class, got_method),
            (class, method),
            "the broker said: {}",
            String::from_utf8_lossy(&arguments)
        );
        arguments
    }

    fn next_method(&mut self) -> (u16, u16, Vec<u8>) {
        let (kind, payload) = self.next_frame();
        assert_eq!(kind, METHOD, "a method frame");
        let class = u16::from_be_bytes([payload[0], payload[1]]);
        let method = u16::from_be_bytes([payload[2], payload[3]]);
        (class, method, payload[4..].to_vec())
    }

    fn next_frame(&mut self) -> (u8, Vec<u8>) {
        let mut start = [0; 7];
        self.stream.read_exact(&mut start).expect("a frame");
        let length = u32::from_be_bytes([start[3], start[4], start[5], start[6]]);
        let mut payload = vec![0; length as usize + 1];
        self.stream.read_exact(&mut payload).expect("a frame");
        assert_eq!(payload.pop(), Some(FRAME_END), "the end of a frame");
        (start[0], payload)
    }
}
