//! TLS: whom the handler trusts, and what it says when it does not.

use std::path::Path;

use ackonce::failure::Class;
use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};

use super::{HttpHandler, Rig, configured};
use crate::common::{Answer, Authority, Leaf, Proxy, Receiver};

fn rig(receiver: &Receiver, host: &str, ca_file: &Path) -> Rig {
    let url = receiver.url().replace("127.0.0.1", host);
    Rig::new(&url, &format!("ca_file = '{}'", ca_file.display()))
}

fn receiver(authority: &Authority, names: &str, days: i32) -> Receiver {
    Receiver::with_tls(authority.issue(names, days), |_| Answer::status(200))
}

#[test]
fn a_receiver_whose_authority_is_trusted_gets_requests_over_one_connection() {
    let authority = Authority::new("ours");
    let receiver = receiver(&authority, "DNS:localhost,IP:127.0.0.1", 1);
    for host in ["localhost", "127.0.0.1"] {
        let before = receiver.connections();
        let mut rig = rig(&receiver, host, &authority.file());
        for body in [&b"{}"[..], &[7; 500_000], b""] {
            rig.send_body(body).unwrap();
            assert!(receiver.requests().last().unwrap().body == body);
        }
        assert_eq!(receiver.connections(), before + 1, "{host}");
    }
}

#[test]
fn a_receiver_that_is_not_trusted_gets_nothing_and_is_not_the_messages_fault() {
    let ours = Authority::new("ours");
    let other = Authority::new("other");
    for (names, days, authority, says) in [
        (
            "IP:127.0.0.1",
            1,
            &other,
            "not signed by a trusted authority; set ca_file",
        ),
        ("DNS:elsewhere.example", 1, &ours, "for another host name"),
        ("IP:127.0.0.1", -1, &ours, "has expired"),
    ] {
        let receiver = receiver(&ours, names, days);
        let (code, class, text) = rig(&receiver, "127.0.0.1", &authority.file()).failure();
        assert_eq!((code.as_str(), class), ("tls", Class::Systemic), "{text}");
        assert!(text.contains(says), "{text}");
        assert!(text.contains(&receiver.address().to_string()), "{text}");
        assert_eq!(receiver.count(), 0);
    }
}

#[test]
fn the_systems_authorities_do_not_know_ours() {
    let ours = Authority::new("ours");
    let receiver = receiver(&ours, "IP:127.0.0.1", 1);
    let (code, class, _) = Rig::new(&receiver.url(), "").failure();
    assert_eq!((code.as_str(), class), ("tls", Class::Systemic));
}

#[test]
fn a_port_without_tls_is_named() {
    let ours = Authority::new("ours");
    let receiver = Receiver::willing();
    let url = receiver.url().replace("http://", "https://");
    // It reads the handshake as a line that does not end, and says nothing.
    let mut rig = Rig::new(
        &url,
        &format!(
            "ca_file = '{}'\nconnect_timeout = '300ms'",
            ours.file().display()
        ),
    );
    let (code, class, text) = rig.failure();
    assert_eq!((code.as_str(), class), ("tls", Class::Systemic), "{text}");
}

/// A receiver that lets nobody in without a certificate of `clients`.
fn asking(
    authority: &Authority,
    clients: &Authority,
    version: &'static SupportedProtocolVersion,
) -> Receiver {
    let config = authority.issue_asking("IP:127.0.0.1", clients, version);
    Receiver::with_tls(config, |_| Answer::status(200))
}

/// The keys of a handler that trusts `authority`, and shows `leaf`.
fn lines(authority: &Authority, leaf: Option<&Leaf>) -> String {
    let mut lines = format!("ca_file = '{}'", authority.file().display());
    if let Some(leaf) = leaf {
        lines.push_str(&format!(
            "\nclient_cert_file = '{}'\nclient_key_file = '{}'",
            leaf.cert().display(),
            leaf.key().display()
        ));
    }
    lines
}

#[test]
fn a_receiver_that_wants_a_client_certificate_gets_it_and_nothing_without_it() {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let friend = ours.issue_files("DNS:friend", 1);
    let late = ours.issue_files("DNS:friend", -1);
    let stranger = other.issue_files("DNS:friend", 1);
    for version in [&TLS12, &TLS13] {
        let receiver = asking(&ours, &ours, version);
        for leaf in [None, Some(&stranger), Some(&late)] {
            let lines = lines(&ours, leaf);
            // One that is sent with the handshake, and one during which the
            // receiver hangs up.
            for size in [2, 20 << 20] {
                let mut rig = Rig::new(&receiver.url(), &lines);
                let failure = rig.send_body(&vec![b'1'; size]).unwrap_err();
                let code = failure.code.as_deref();
                let seen = (code, failure.class);
                assert_eq!(seen, (Some("tls"), Class::Systemic), "{size}: {failure}");
                let place = receiver.address().to_string();
                for part in ["set client_cert_file and client_key_file", &place] {
                    assert!(failure.text.contains(part), "{size}: {failure}");
                }
            }
        }
        assert_eq!(receiver.count(), 0, "{version:?}");
        let mut rig = Rig::new(&receiver.url(), &lines(&ours, Some(&friend)));
        for body in [&b"{}"[..], &[7; 500_000], b""] {
            rig.send_body(body).unwrap();
        }
        assert_eq!(receiver.count(), 3, "{version:?}");
    }
}

#[test]
fn a_probe_hears_that_a_client_certificate_is_refused_and_sends_no_request() {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let friend = ours.issue_files("DNS:friend", 1);
    let stranger = other.issue_files("DNS:friend", 1);
    for version in [&TLS12, &TLS13] {
        let receiver = asking(&ours, &ours, version);
        let probe = |leaf| {
            let lines = format!("url = '{}'\n{}", receiver.url(), lines(&ours, leaf));
            HttpHandler::probe(&configured(&lines))
        };
        for leaf in [None, Some(&stranger)] {
            let failure = probe(leaf).unwrap_err();
            let seen = (failure.code.as_deref(), failure.class);
            assert_eq!(seen, (Some("tls"), Class::Systemic), "{failure}");
            assert!(failure.text.contains("client_cert_file"), "{failure}");
        }
        let place = probe(Some(&friend)).unwrap();
        assert_eq!(place, receiver.address().to_string());
        receiver.wait_until_idle();
        assert_eq!((receiver.connections(), receiver.count()), (3, 0));
    }
}

#[test]
fn files_that_are_renewed_are_used_from_the_next_connection_on() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let friend = old.issue_files("DNS:friend", 1);
    let before = asking(&old, &old, &TLS13);
    let after = asking(&new, &new, &TLS13);
    let proxy = Proxy::before(&before.url(), 443);
    let renewed = new.issue_files("DNS:friend", 1);
    let mut rig = Rig::new(proxy.url(), &lines(&old, Some(&friend)));
    rig.send_body(b"{}").unwrap();

    old.replace(&new);
    // A certificate and not yet its key: neither the old pair nor the new one.
    std::fs::copy(renewed.cert(), friend.cert()).unwrap();
    rig.send_body(b"{}").expect("the connection that there is");
    proxy.go_down();
    proxy.lead_to(&after.url(), 443);
    proxy.come_up();
    let (code, class, text) = rig.failure();
    assert_eq!((code.as_str(), class), ("tls", Class::Systemic), "{text}");
    assert!(text.contains("does it belong to the key in"), "{text}");

    std::fs::copy(renewed.key(), friend.key()).unwrap();
    rig.send_body(b"{}").unwrap();
    assert_eq!((before.count(), after.count()), (2, 1));
}

#[test]
fn a_refusal_is_heard_over_tls_too_while_the_body_is_still_being_sent() {
    let ours = Authority::new("ours");
    let receiver = Receiver::with_tls(ours.issue("IP:127.0.0.1", 1), |_| {
        Answer::Raw(b"HTTP/1.1 413 X\r\ncontent-length: 0\r\n\r\n")
    });
    receiver.stop_reading_bodies();
    let mut rig = Rig::new(&receiver.url(), &lines(&ours, None));
    let failure = rig.send_body(&vec![7; 20 << 20]).unwrap_err();
    assert_eq!(failure.code.as_deref(), Some("413"), "{failure}");
}
