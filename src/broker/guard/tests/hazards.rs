//! Proof that what the guard prevents does happen without it.

use std::process::Command;

use super::*;

const CHILD: &str = "ACKONCE_TEST_UNGUARDED_NESTING";

#[test]
fn without_the_guard_a_nested_table_kills_the_process() {
    let mut table = vec![4, b'd', b'e', b'e', b'p'];
    table.extend(wire::nested(20_000, false));
    let bytes = with_table(&table);
    if std::env::var_os(CHILD).is_some() {
        let thread = std::thread::Builder::new().stack_size(2 * 1024 * 1024);
        let unguarded = thread.spawn(move || {
            let (deliver, rest) = bytes.split_at(FrameHead::read(&bytes).expect("a head").total());
            parse_frame(deliver).expect("a readable frame");
            drop(parse_frame(rest));
        });
        drop(unguarded.expect("a thread").join());
        return;
    }
    parsed(guarded(&bytes));
    let this = "broker::guard::tests::hazards::without_the_guard_a_nested_table_kills_the_process";
    let child = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", this, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .expect("a child process");
    let said = String::from_utf8_lossy(&child.stderr);
    assert!(said.contains("overflowed its stack"), "{said}");
    assert!(!child.status.success());
}

#[test]
fn without_the_guard_text_that_is_not_utf8_is_an_unreadable_frame() {
    let bad = [b'k', 0xFF];
    let table = table_bytes(&[(b"k".to_vec(), Val::Text(b"v".to_vec()))]);
    for bytes in [
        deliver(1, 1, b"", &bad),
        header(1, 0, &Props::default().short(0, &bad).headers(&table)),
    ] {
        assert!(parse_frame(&bytes).is_err());
        parsed(guarded(&bytes));
    }
}

#[test]
fn without_the_guard_a_broken_property_hides_or_shifts_the_properties_after_it() {
    let broken = Props::default()
        .short(5, &[b'k', 0xFF])
        .message_id(b"id-1")
        .fixed(9, &7_u64.to_be_bytes());
    let bytes = header(1, 0, &broken);
    let properties = |bytes: &[u8]| match parse_frame(bytes) {
        Ok((_, AMQPFrame::Header(_, _, content))) => content.properties,
        other => panic!("not a readable header: {other:?}"),
    };
    let unguarded = properties(&bytes);
    assert_eq!(unguarded.message_id(), &None);
    assert!(unguarded.timestamp().is_some_and(|time| time != 7));
    let guarded = properties(&guarded(&bytes));
    assert_eq!(guarded.message_id().as_deref(), Some("id-1"));
    assert_eq!(guarded.timestamp(), &Some(7));
}

#[test]
fn without_the_guard_a_broken_header_hides_the_headers_after_it() {
    let table = table_bytes(&[
        (b"broken".to_vec(), Val::Text(vec![0xFF])),
        (b"id".to_vec(), Val::Text(b"1".to_vec())),
    ]);
    let bytes = with_table(&table);
    assert!(headers_of(&parsed(bytes.clone())).is_empty());
    assert_eq!(headers_of(&parsed(guarded(&bytes))).len(), 2);
}
