//! TLS: whom the handler trusts, and what it says when it does not.

use std::path::PathBuf;

use ackonce::failure::Class;

use crate::Rig;
use crate::common::{Authority, Receiver};

fn rig(receiver: &Receiver, host: &str, ca_file: &PathBuf) -> Rig {
    let url = receiver.url().replace("127.0.0.1", host);
    Rig::new(&url, &format!("ca_file = '{}'", ca_file.display()))
}

fn receiver(authority: &Authority, names: &str, days: i32) -> Receiver {
    Receiver::with_tls(authority.issue(names, days), |_| crate::Answer::status(200))
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
    let receiver = Receiver::new(|_| crate::Answer::status(200));
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
