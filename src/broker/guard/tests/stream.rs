//! How the stream is cut, where it is refused, and what `connection.tune` says.

use std::collections::VecDeque;

use super::wire::{body, deliver, frame, header, message, method, short_argument};
use super::*;

/// Hands out prepared pieces, each followed by `WouldBlock`, then ends.
#[derive(Debug, Default)]
struct Pieces {
    pieces: VecDeque<Vec<u8>>,
    blocked: usize,
    between: bool,
}

impl Pieces {
    fn cut(bytes: &[u8], lengths: &[usize]) -> Self {
        let mut pieces = VecDeque::new();
        let mut rest = bytes;
        for &length in lengths.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at(length.min(rest.len()));
            pieces.push_back(piece.to_vec());
            rest = after;
        }
        Self {
            pieces,
            ..Self::default()
        }
    }
}

impl Read for Pieces {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        assert!(!out.is_empty(), "the guard left itself no room");
        if std::mem::take(&mut self.between) {
            self.blocked += 1;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let Some(piece) = self.pieces.front_mut() else {
            return Ok(0);
        };
        let count = piece.len().min(out.len());
        out[..count].copy_from_slice(&piece[..count]);
        piece.drain(..count);
        if piece.is_empty() {
            self.pieces.pop_front();
            self.between = true;
        }
        Ok(count)
    }
}

/// What a reader gets that asks for `step` bytes at a time.
struct Got {
    bytes: Vec<u8>,
    /// Length of `bytes` at each `WouldBlock`.
    blocked_at: Vec<usize>,
    error: Option<io::Error>,
}

fn pump(guard: &mut Guard<Pieces>, step: usize) -> Got {
    let mut got = Got {
        bytes: Vec::new(),
        blocked_at: Vec::new(),
        error: None,
    };
    let mut out = vec![0; step];
    loop {
        match guard.read(&mut out) {
            Ok(0) => return got,
            Ok(count) => got.bytes.extend(&out[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                got.blocked_at.push(got.bytes.len());
                assert_eq!(
                    got.blocked_at.len(),
                    guard.inner.blocked,
                    "a WouldBlock that the inner stream did not give"
                );
            }
            Err(error) => {
                got.error = Some(error);
                return got;
            }
        }
    }
}

/// How much of `bytes` can be handed out: whole frames, and as much of a body
/// frame as is there.
fn available(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(head) = FrameHead::read(&bytes[at..]) {
        if at + head.total() > bytes.len() {
            return match head.kind {
                FrameKind::Body | FrameKind::Heartbeat => bytes.len(),
                _ => at,
            };
        }
        at += head.total();
    }
    at
}

proptest! {
    #[test]
    fn how_the_bytes_arrive_changes_nothing(
        messages in prop::collection::vec(message(), 1..4),
        broken in broken_text(),
        table in prop::collection::vec(any::<u8>(), 0..100),
        lengths in prop::collection::vec(1_usize..200, 1..10),
        step in 1_usize..300,
    ) {
        let mut bytes = messages.concat();
        bytes.extend(deliver(2, 1, &broken, &broken));
        bytes.extend(with_table(&table));
        let whole = guarded(&bytes);

        for lengths in [&lengths[..], &[1]] {
            let mut guard = Guard::new(Pieces::cut(&bytes, lengths), 0, 10);
            let got = pump(&mut guard, step);
            prop_assert!(got.error.is_none());
            prop_assert_eq!(&got.bytes, &whole);
            let mut arrived = 0;
            for (&length, &had) in lengths.iter().cycle().zip(&got.blocked_at) {
                arrived = bytes.len().min(arrived + length);
                prop_assert_eq!(had, available(&bytes[..arrived]));
            }
        }
    }
}

#[test]
fn frames_longer_than_what_is_read_at_once_pass_whole() {
    let long = vec![b'x'; READ_AHEAD + 40_000];
    let bytes = [
        deliver(1, 1, b"", b"key"),
        header(
            1,
            long.len() as u64,
            &Props::default().headers(&table_bytes(&[(b"long".to_vec(), Val::Text(long.clone()))])),
        ),
        body(1, &long),
    ]
    .concat();
    let mut guard = Guard::new(Pieces::cut(&bytes, &[bytes.len()]), 0, 10);
    assert_eq!(pump(&mut guard, 4096).bytes, bytes);
}

/// What comes out before the stream is refused, and why it is.
fn refused(bytes: &[u8]) -> (Vec<u8>, String) {
    let mut results = Vec::new();
    for lengths in [&[bytes.len()][..], &[1]] {
        let mut guard = Guard::new(Pieces::cut(bytes, lengths), 8192, 10);
        let got = pump(&mut guard, 4096);
        let error = got.error.expect("the stream is refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let again = guard.read(&mut [0; 9]).expect_err("it stays refused");
        assert_eq!(again.to_string(), error.to_string());
        results.push((got.bytes, error.to_string()));
    }
    assert_eq!(results[0], results[1], "refused differently when cut");
    results.swap_remove(0)
}

#[test]
fn a_frame_over_the_limit_is_refused_and_what_came_before_it_is_not() {
    let sound = deliver(1, 1, b"", b"key");
    for kind in [1, 3, 8] {
        let long = frame(kind, 1, &vec![0; 8192 - 7]);
        let (out, why) = refused(&[&sound[..], &long].concat());
        assert_eq!(out, sound);
        assert!(why.contains("8193 bytes on channel 1"), "{why}");
    }
    let fits = body(1, &[0; 8192 - 8]);
    assert_eq!(guarded(&fits), fits);
}

#[test]
fn a_content_header_may_be_longer_than_the_negotiated_limit_but_not_by_far() {
    let props = |length| Props::default().headers(&vec![0; length]);
    let grown = header(1, 0, &props(140_000));
    assert_eq!(guarded(&grown).len(), grown.len());
    let (_, why) = refused(&header(1, 0, &props(HEADER_FRAME_MAX as usize)));
    assert!(why.contains("over the limit of 1048576 bytes"), "{why}");
}

#[test]
fn a_wrong_frame_end_is_refused() {
    for mut bytes in [
        deliver(1, 1, b"", b"key"),
        header(1, 0, &Props::default()),
        body(1, b"body"),
    ] {
        *bytes.last_mut().expect("an end byte") = 0xCD;
        let (_, why) = refused(&bytes);
        assert!(why.contains("ends with 0xcd where 0xce belongs"), "{why}");
    }
}

#[test]
fn what_no_broker_sends_is_refused_by_name() {
    for (bytes, expected) in [
        (b"AMQP\0\0\x09\x01".to_vec(), "frame type 65 is unknown"),
        (method(1, 60, 40, &[0; 9]), "method 60.40 is unknown"),
        (frame(1, 1, &[0, 60, 0]), "too short for a method"),
        (method(1, 60, 60, &[200, b'a']), "60.60 are cut short"),
        (frame(2, 1, &[0; 13]), "content header is cut short"),
        (
            header(1, BODY_MAX + 1, &Props::default()),
            "2147483649 bytes of body",
        ),
    ] {
        let (_, why) = refused(&bytes);
        assert!(why.contains(expected), "{why}");
    }
}

#[test]
fn the_end_of_the_stream_passes_also_in_the_middle_of_a_frame() {
    let bytes = deliver(1, 1, b"", b"key");
    let mut guard = Guard::new(&bytes[..bytes.len() - 1], 0, 10);
    assert_eq!(guard.read(&mut [0; 64]).expect("an end"), 0);
    assert_eq!(guard.read(&mut [0; 64]).expect("an end"), 0);
}

/// The frame limit and heartbeat that come through.
fn tuned(offered: (u32, u16), wanted: (u32, u16)) -> (u32, u16) {
    let mut arguments = 2047_u16.to_be_bytes().to_vec();
    arguments.extend(offered.0.to_be_bytes());
    arguments.extend(offered.1.to_be_bytes());
    let mut out = Vec::new();
    let bytes = method(0, 10, 30, &arguments);
    Guard::new(&bytes[..], wanted.0, wanted.1)
        .read_to_end(&mut out)
        .expect("tune passes");
    use amq_protocol::protocol::{AMQPClass, connection};
    match parse_frame(&out).expect("a readable frame") {
        (_, AMQPFrame::Method(0, AMQPClass::Connection(connection::AMQPMethod::Tune(tune)))) => {
            assert_eq!(tune.channel_max, 2047);
            (tune.frame_max, tune.heartbeat)
        }
        other => panic!("tune became {other:?}"),
    }
}

#[test]
fn a_heartbeat_is_never_off_nor_longer_than_wanted_nor_too_short() {
    for (offered, wanted, effective) in [
        (0, 10, 10),
        (60, 10, 10),
        (10, 10, 10),
        (7, 10, 7),
        (1, 10, HEARTBEAT_MIN),
        (60, 0, HEARTBEAT_MIN),
        (0, 2, HEARTBEAT_MIN),
    ] {
        assert_eq!(
            tuned((131_072, offered), (0, wanted)).1,
            effective,
            "offered {offered}, wanted {wanted}"
        );
    }
}

#[test]
fn the_negotiated_frame_limit_is_never_over_our_own() {
    for (offered, wanted, effective) in [
        (0, 0, FRAME_MAX_DEFAULT),
        (131_072, 0, 131_072),
        (1_048_576, 131_072, 131_072),
        (8192, 131_072, 8192),
        (0, 100, FRAME_MAX_FLOOR),
    ] {
        assert_eq!(tuned((offered, 60), (wanted, 10)).0, effective);
    }
}

#[test]
fn every_method_a_server_sends_with_text_survives_text_that_is_not_utf8() {
    let bad = short_argument(&[b'a', 0xFF, b'b']);
    let code = [1, 56];
    for (class, id, arguments) in [
        (10, 41, bad.clone()),
        (10, 50, [&code[..], &bad, &[0; 4]].concat()),
        (10, 60, bad.clone()),
        (20, 11, vec![0, 0, 0, 1, 0xFF]),
        (20, 40, [&code[..], &bad, &[0; 4]].concat()),
        (50, 11, [&bad[..], &[0; 8]].concat()),
        (60, 21, bad.clone()),
        (60, 30, [&bad[..], &[1]].concat()),
        (60, 31, bad.clone()),
        (60, 50, [&code[..], &bad, &bad, &bad].concat()),
        (60, 60, [&bad[..], &[0; 9], &bad, &bad].concat()),
        (60, 71, [&[0; 9][..], &bad, &bad, &[0; 4]].concat()),
        (60, 72, bad.clone()),
        (10, 20, vec![0, 0, 0, 1, 0xFF]),
        (
            10,
            10,
            [&[0, 9, 0, 0, 0, 3][..], &[1, 0xFF, b'V'], &[0; 8]].concat(),
        ),
    ] {
        let bytes = method(1, class, id, &arguments);
        assert!(
            parse_frame(&bytes).is_err() || class == 10 && id == 10,
            "{class}.{id} was readable before"
        );
        let out = guarded(&bytes);
        assert_eq!(out.len(), bytes.len());
        assert!(out.contains(&b'?'), "{class}.{id}");
        parsed(out);
    }
}
