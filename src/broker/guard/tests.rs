//! The guard against frames as brokers write them, against hostile ones, and
//! against every way a stream can be cut.

mod hazards;
mod repairs;
mod stream;
mod wire;

use amq_protocol::frame::AMQPFrame;
use amq_protocol::frame::parsing::parse_frame;
use proptest::prelude::*;

use super::*;
use wire::{Entry, Props, Val, body, broken_text, deliver, entries, header, message, props};

/// Sends `bytes` through a guard in one piece; panics where they are refused.
fn guarded(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Guard::new(bytes, 0, 10)
        .read_to_end(&mut out)
        .expect("the frames are refused");
    out
}

/// Parses all frames the way amiquip does, on a stack of 256 KiB, and makes sure
/// that no property was silently passed over.
fn parsed(bytes: Vec<u8>) -> Vec<AMQPFrame> {
    std::thread::Builder::new()
        .stack_size(256 * 1024)
        .spawn(move || {
            let mut frames = Vec::new();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let length = FrameHead::read(rest).expect("a frame head").total();
                let (bytes, after) = rest.split_at(length);
                let (left, frame) = parse_frame(bytes).expect("a readable frame");
                assert!(left.is_empty(), "bytes left over: {left:?}");
                if let AMQPFrame::Header(_, _, content) = &frame {
                    let at = FRAME_HEAD + 12;
                    let flags = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
                    assert_eq!(content.properties.bitmask(), flags & !3);
                }
                frames.push(frame);
                rest = after;
            }
            frames
        })
        .expect("a thread")
        .join()
        .expect("frames that parse on a small stack")
}

/// The header table of the only content header among `frames`.
fn headers_of(frames: &[AMQPFrame]) -> &amq_protocol::types::FieldTable {
    frames
        .iter()
        .find_map(|frame| match frame {
            AMQPFrame::Header(_, _, content) => content.properties.headers().as_ref(),
            _ => None,
        })
        .expect("a header table")
}

fn table_bytes(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    wire::encode_entries(entries, &mut bytes);
    bytes
}

/// A header table whose content is `bytes`, whatever they are.
fn with_table(bytes: &[u8]) -> Vec<u8> {
    let props = Props::default().headers(bytes).message_id(b"id-1");
    [
        deliver(1, 7, b"", b"key"),
        header(1, 4, &props),
        body(1, b"body"),
    ]
    .concat()
}

proptest! {
    #[test]
    fn sound_frames_pass_byte_for_byte(messages in prop::collection::vec(message(), 1..5)) {
        let bytes = messages.concat();
        prop_assert_eq!(&guarded(&bytes), &bytes);
        parsed(bytes);
    }

    #[test]
    fn random_bytes_as_a_table_become_readable_and_spare_their_neighbours(
        table in prop::collection::vec(any::<u8>(), 0..400),
        before in message(),
        after in message(),
    ) {
        let hostile = with_table(&table);
        let out = guarded(&[&before[..], &hostile, &after].concat());
        prop_assert_eq!(&out[..before.len()], &before[..]);
        prop_assert_eq!(&out[before.len() + hostile.len()..], &after[..]);
        parsed(out);
    }

    #[test]
    fn random_bytes_as_properties_become_readable(
        flags in any::<u16>(),
        content in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let hostile = [
            deliver(1, 1, b"", b"key"),
            header(1, 0, &Props::raw(flags, &content)),
        ].concat();
        let out = guarded(&hostile);
        prop_assert_eq!(out.len(), hostile.len());
        parsed(out);
    }

    #[test]
    fn a_sound_message_with_bytes_overwritten_becomes_readable(
        fields in props(),
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut frame = header(1, 0, &fields);
        // Class, weight, body size and flags stay: the broker writes those.
        let fixed = FRAME_HEAD + 14;
        let span = frame.len() - fixed - 1;
        prop_assume!(span > 0);
        for (index, byte) in hits {
            frame[fixed + index.index(span)] = byte;
        }
        let hostile = [deliver(1, 1, b"", b"key"), frame].concat();
        let out = guarded(&hostile);
        prop_assert_eq!(out.len(), hostile.len());
        parsed(out);
    }

    #[test]
    fn text_that_is_not_utf8_becomes_readable_wherever_it_stands(
        exchange in broken_text(),
        key in broken_text(),
        type_ in broken_text(),
        header_key in broken_text(),
        header_text in broken_text(),
    ) {
        let entry = (header_key, Val::Text(header_text.clone()));
        let fields = Props::default()
            .headers(&table_bytes(&[entry]))
            .short(10, &type_);
        let hostile = [deliver(1, 1, &exchange, &key), header(1, 0, &fields)].concat();
        let out = guarded(&hostile);
        prop_assert_eq!(out.len(), hostile.len());
        let frames = parsed(out);
        let value = headers_of(&frames).values().next().expect("an entry");
        let kept = match value {
            amq_protocol::types::AMQPValue::ByteArray(bytes) => bytes.clone(),
            amq_protocol::types::AMQPValue::LongString(text) => text.clone().into_bytes(),
            other => panic!("text became {other:?}"),
        };
        prop_assert_eq!(kept, header_text);
    }

    #[test]
    fn a_table_that_breaks_off_keeps_the_entries_before(
        sound in entries(),
        tail in prop::collection::vec(any::<u8>(), 1..40),
    ) {
        // A key, then a type nobody knows.
        let mut table = table_bytes(&sound);
        table.extend([3, b'e', b'n', b'd', b'?']);
        table.extend(&tail);
        let frames = parsed(guarded(&with_table(&table)));
        let headers = headers_of(&frames);
        for (key, _) in &sound {
            let key = std::str::from_utf8(key).expect("a sound key");
            prop_assert!(headers.contains_key(key), "{key} is gone");
        }
        prop_assert!(headers.contains_key("end"));
    }

    #[test]
    fn mending_what_was_mended_changes_nothing(
        table in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let once = guarded(&with_table(&table));
        prop_assert_eq!(&guarded(&once), &once);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn nesting_of_any_depth_becomes_readable_and_spares_its_neighbours(
        depth in 1_usize..26_000,
        arrays in any::<bool>(),
    ) {
        let mut table = table_bytes(&[(b"before".to_vec(), Val::Text(b"1".to_vec()))]);
        table.extend([4, b'd', b'e', b'e', b'p']);
        table.extend(wire::nested(depth, arrays));
        table.extend(table_bytes(&[(b"after".to_vec(), Val::Text(b"2".to_vec()))]));
        let hostile = with_table(&table);
        let out = guarded(&hostile);
        prop_assert_eq!(out.len(), hostile.len());
        prop_assert_eq!(out == hostile, depth < NESTING_MAX);
        let frames = parsed(out);
        let keys: Vec<_> = headers_of(&frames).keys().map(String::as_str).collect();
        prop_assert_eq!(keys, ["after", "before", "deep"]);
    }
}

#[test]
fn every_length_of_an_unreadable_table_becomes_readable() {
    for length in 0..64 {
        for byte in [0, 1, 2, b'F', b'S', b'A', b'x', b'?', 0xFF] {
            let hostile = with_table(&vec![byte; length]);
            let out = guarded(&hostile);
            assert_eq!(out.len(), hostile.len());
            assert_eq!(guarded(&out), out);
            parsed(out);
        }
    }
}

#[test]
fn an_unreadable_value_of_any_length_keeps_its_key_and_its_container() {
    for length in 0..16 {
        for array in [false, true] {
            let mut inner = if array { vec![] } else { vec![1, b'k'] };
            inner.push(b'?');
            inner.extend(vec![0xFF; length]);
            let mut table = vec![2, b'i', b'n', if array { b'A' } else { b'F' }];
            table.extend((inner.len() as u32).to_be_bytes());
            table.extend(&inner);
            table.extend(table_bytes(&[(
                b"after".to_vec(),
                Val::Text(b"2".to_vec()),
            )]));
            let frames = parsed(guarded(&with_table(&table)));
            let headers = headers_of(&frames);
            assert_eq!(headers.len(), 2, "length {length}, array {array}");
            match &headers["in"] {
                amq_protocol::types::AMQPValue::FieldTable(inner) => {
                    assert!(inner.contains_key("k"), "length {length}");
                }
                amq_protocol::types::AMQPValue::FieldArray(inner) => {
                    assert!(!inner.is_empty(), "length {length}");
                }
                other => panic!("the container became {other:?}"),
            }
        }
    }
}
