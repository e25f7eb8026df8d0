//! What the repair log says of each delivery.

use super::wire::{get_ok, method, returned};
use super::*;
use crate::message::Repairs;

const BAD: &[u8] = &[b'a', 0xC3, 0x28];

const NONE: Repairs = Repairs {
    message_id: false,
    headers: false,
    other: false,
};
const ALL: Repairs = Repairs {
    message_id: true,
    headers: true,
    other: true,
};
const OTHER: Repairs = Repairs {
    other: true,
    ..NONE
};

/// The log of a guard that has read `frames`.
fn log_of(frames: &[Vec<u8>]) -> RepairLog {
    let bytes = frames.concat();
    let mut guard = Guard::new(&bytes[..], 0, 10);
    let log = guard.repair_log();
    guard
        .read_to_end(&mut Vec::new())
        .expect("the frames are refused");
    log
}

#[test]
fn the_log_names_the_property_that_was_hit_and_no_other() {
    for number in 0..14 {
        let expected = match number {
            2 => Repairs {
                headers: true,
                ..NONE
            },
            3 | 4 | 9 => NONE,
            8 => Repairs {
                message_id: true,
                ..NONE
            },
            _ => OTHER,
        };
        let props = (0..14).fold(Props::default(), |props, each| {
            props.numbered(each, if each == number { BAD } else { b"sound" })
        });
        let log = log_of(&[deliver(1, 5, b"", b"key"), header(1, 0, &props)]);
        assert_eq!(log.take(1, 4), NONE, "property {number}");
        assert_eq!(log.take(2, 5), NONE, "property {number}");
        assert_eq!(log.take(1, 5), expected, "property {number}");
        assert_eq!(log.take(1, 5), NONE, "asked twice for property {number}");
    }
}

#[test]
fn a_broken_exchange_or_routing_key_counts_as_other_for_deliver_and_get() {
    let sound = Props::default().message_id(b"id-1");
    for begin in [
        deliver(1, 5, BAD, b"key"),
        deliver(1, 5, b"", BAD),
        get_ok(1, 5, BAD),
    ] {
        let log = log_of(&[begin, header(1, 0, &sound)]);
        assert_eq!(log.take(1, 5), OTHER);
    }
}

#[test]
fn a_property_list_that_does_not_add_up_counts_as_repaired_in_all_parts() {
    // The length of the message id, the last property, runs past the frame.
    let props = Props::raw(0x8080, &[2, b'o', b'k', 200, b'i', b'd']);
    let bytes = [deliver(1, 5, b"", b"key"), header(1, 0, &props)];
    assert_eq!(log_of(&bytes).take(1, 5), ALL);
    let frames = parsed(guarded(&bytes.concat()));
    let AMQPFrame::Header(_, _, content) = &frames[1] else {
        panic!("not a header frame: {:?}", frames[1]);
    };
    assert_eq!(content.properties.content_type().as_deref(), Some("ok"));
    assert_eq!(content.properties.message_id(), &None);
}

#[test]
fn a_repaired_return_is_nobodys_delivery() {
    let bad = Props::default().message_id(BAD);
    let log = log_of(&[
        deliver(1, 5, b"", BAD),
        returned(1, BAD),
        header(1, 0, &bad),
        deliver(1, 6, b"", b"key"),
        header(1, 0, &Props::default()),
    ]);
    assert_eq!(log.take(1, 5), NONE);
    assert_eq!(log.take(1, 6), NONE);
}

#[test]
fn interleaved_channels_keep_their_repairs_apart() {
    let bad = Props::default().message_id(BAD);
    let log = log_of(&[
        deliver(1, 5, b"", b"key"),
        deliver(2, 5, b"", BAD),
        deliver(3, 5, b"", b"key"),
        header(3, 0, &Props::default()),
        header(1, 0, &bad),
        header(2, 0, &Props::default()),
    ]);
    let id = Repairs {
        message_id: true,
        ..NONE
    };
    assert_eq!(log.take(1, 5), id);
    assert_eq!(log.take(2, 5), OTHER);
    assert_eq!(log.take(3, 5), NONE);
}

#[test]
fn a_channel_opened_anew_starts_with_no_repairs() {
    let sound = Props::default();
    let log = log_of(&[
        deliver(1, 5, b"", BAD),
        header(1, 0, &sound),
        deliver(2, 5, b"", BAD),
        header(2, 0, &sound),
        deliver(1, 6, b"", BAD),
        method(1, 20, 11, &[0; 4]),
        deliver(1, 5, b"", b"key"),
        header(1, 0, &sound),
    ]);
    assert_eq!(log.take(1, 5), NONE);
    assert_eq!(log.take(1, 6), NONE);
    assert_eq!(log.take(2, 5), OTHER);
}

#[test]
fn a_full_log_never_calls_a_repaired_delivery_sound() {
    let log = RepairLog::default();
    let id = Repairs {
        message_id: true,
        ..NONE
    };
    let last = REPAIRS_MAX as u64 + 10;
    for tag in 1..=last {
        log.record(1, tag, id);
    }
    for tag in 1..=10 {
        assert_eq!(log.take(1, tag), ALL, "tag {tag}");
    }
    for tag in 11..=last {
        assert_eq!(log.take(1, tag), id, "tag {tag}");
    }
    assert_eq!(log.take(1, last + 1), NONE);
    assert_eq!(log.take(2, 1), NONE);
}
