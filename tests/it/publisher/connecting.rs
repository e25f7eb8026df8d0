//! Opening and closing connections, with TLS and without.

use std::io::Write;
use std::net::TcpListener;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use ackonce::broker::connection;
use ackonce::broker::error::{ConnectError, LinkError, Stage, TlsProblem};
use ackonce::broker::publisher::{Fate, Limits, Publisher};
use ackonce::config::checked::{Broker, Tls};

use super::rig::{Line, PATIENCE, Queue, amqp_url, broker_at, hasty, listener};
use super::tls_proxy::TlsProxy;
use crate::common::Authority;

#[test]
fn a_closed_port_is_a_refused_connection() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let error = open_error(&broker_at(&format!(
        "amqp://user:hunter2@127.0.0.1:{free}/v"
    )));
    assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains(&format!("amqp://user@127.0.0.1:{free}/v")),
        "{text}"
    );
    assert!(!format!("{error:?} {error}").contains("hunter2"), "{text}");
}

#[test]
fn a_host_without_address_is_named() {
    let error = open_error(&broker_at("amqp://no-such-host.invalid/"));
    assert!(matches!(error, ConnectError::Resolve { .. }), "{error}");
    assert!(
        error.to_string().contains("no-such-host.invalid"),
        "{error}"
    );
}

fn trusting(ca_file: PathBuf) -> Tls {
    Tls {
        ca_file: Some(ca_file),
        client: None,
    }
}

fn open_error(broker: &Broker) -> ConnectError {
    match connection::open(broker, "test") {
        Ok(_) => panic!("it connected"),
        Err(error) => error,
    }
}

#[test]
fn a_listener_that_says_nothing_ends_at_the_deadline() {
    let silent = || {
        let held = std::sync::Mutex::new(Vec::new());
        listener(move |client| held.lock().unwrap().push(client))
    };
    let error = open_error(&hasty(&format!("amqp://127.0.0.1:{}/", silent())));
    assert!(
        matches!(
            error,
            ConnectError::TimedOut {
                stage: Stage::Login,
                ..
            }
        ),
        "{error}"
    );
    let error = open_error(&hasty(&format!("amqps://127.0.0.1:{}/", silent())));
    assert!(
        matches!(
            error,
            ConnectError::TimedOut {
                stage: Stage::Tls,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_listener_that_dribbles_ends_at_the_deadline() {
    // The start of a frame that announces 512 bytes; of a TLS record alike.
    let dribbling = |start: &'static [u8]| {
        listener(move |mut client| {
            let mut bytes = start.iter().chain(std::iter::repeat(&0));
            while client.write_all(&[*bytes.next().unwrap()]).is_ok() {
                thread::park_timeout(Duration::from_millis(300));
            }
        })
    };
    let port = dribbling(&[1, 0, 0, 0, 0, 2, 0]);
    let error = open_error(&hasty(&format!("amqp://127.0.0.1:{port}/")));
    assert!(
        matches!(
            error,
            ConnectError::TimedOut {
                stage: Stage::Login,
                ..
            }
        ),
        "{error}"
    );
    let port = dribbling(&[22, 3, 3, 2, 0]);
    let error = open_error(&hasty(&format!("amqps://127.0.0.1:{port}/")));
    assert!(
        matches!(
            error,
            ConnectError::TimedOut {
                stage: Stage::Tls,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn what_is_no_broker_is_a_protocol_error() {
    let port = listener(|mut client| {
        client.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").ok();
    });
    let error = open_error(&broker_at(&format!("amqp://127.0.0.1:{port}/")));
    assert!(matches!(error, ConnectError::Protocol { .. }), "{error}");
}

#[test]
fn a_wrong_password_is_a_refused_login() {
    let mut url = url::Url::parse(&amqp_url()).unwrap();
    url.set_username("nobody").unwrap();
    url.set_password(Some("hunter2")).unwrap();
    let error = open_error(&broker_at(url.as_str()));
    assert!(
        matches!(error, ConnectError::LoginRefused { .. }),
        "{error}"
    );
    assert!(!format!("{error:?} {error}").contains("hunter2"), "{error}");
}

#[test]
fn a_missing_vhost_is_told_in_the_brokers_words() {
    let mut url = url::Url::parse(&amqp_url()).unwrap();
    url.set_path("/no-such-vhost");
    let error = open_error(&broker_at(url.as_str()));
    assert!(matches!(error, ConnectError::Vhost { .. }), "{error}");
    assert!(error.to_string().contains("no-such-vhost"), "{error}");
}

#[test]
fn closing_a_dead_link_tells_the_cause_of_death() {
    let line = Line::new();
    let mut link = connection::open(&broker_at(&line.url), "test").unwrap();
    let channel = link.open_channel(PATIENCE).unwrap();
    line.cut();
    let error = link.close_with(channel, PATIENCE).unwrap_err();
    assert!(matches!(error, LinkError::Lost { .. }), "{error}");
}

#[test]
fn closing_or_opening_a_channel_on_a_stalled_link_ends_at_its_deadline() {
    let line = Line::new();
    let mut link = connection::open(&broker_at(&line.url), "test").unwrap();
    let channel = link.open_channel(PATIENCE).unwrap();
    line.stall();
    let error = link.open_channel(Duration::from_millis(200)).err().unwrap();
    assert!(matches!(error, LinkError::TimedOut { .. }), "{error}");
    link.close_with(channel, PATIENCE).unwrap_err();

    let line = Line::new();
    let link = connection::open(&broker_at(&line.url), "test").unwrap();
    line.stall();
    let error = link.close(Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error, LinkError::TimedOut { .. }), "{error}");
}

#[test]
fn large_bodies_pass_through_tls_unharmed_both_ways() {
    let authority = Authority::new("ours");
    let proxy = TlsProxy::start(&amqp_url(), &authority, "DNS:localhost,IP:127.0.0.1");
    for host in ["localhost", "127.0.0.1"] {
        let broker = Broker {
            tls: trusting(authority.file()),
            ..broker_at(&proxy.url(host))
        };
        let queue = Queue::new();
        let mut publisher = Publisher::open(&broker, "test", Limits::default()).unwrap();
        let bodies: Vec<Vec<u8>> = [0, 1, 1 << 20, 20 << 20]
            .into_iter()
            .map(|length: u32| (0..length).map(|i| (i % 251) as u8).collect())
            .collect();
        for body in &bodies {
            publisher.publish(&queue.message(body.clone())).unwrap();
        }
        let fates = publisher.wait_all(PATIENCE);
        assert_eq!(fates.len(), bodies.len());
        assert!(
            fates.iter().all(|(_, fate)| *fate == Fate::Confirmed),
            "{fates:?}"
        );

        let mut link = connection::open(&broker, "test").unwrap();
        let channel = link.open_channel(PATIENCE).unwrap();
        for body in &bodies {
            let watch = link.watch(PATIENCE);
            let got = channel
                .basic_get(queue.name.as_str(), true)
                .unwrap()
                .unwrap();
            drop(watch);
            assert!(
                got.delivery.body == *body,
                "{} bytes came back changed",
                body.len()
            );
        }
        link.close_with(channel, PATIENCE).unwrap();
    }
}

#[test]
fn a_certificate_that_proves_nothing_is_refused_with_the_reason() {
    let ours = Authority::new("ours");
    let other = Authority::new("other");
    let problem = |names: &str, days: i32, authority: &Authority, ca_file: PathBuf| {
        let proxy = TlsProxy::start_with(&amqp_url(), authority, names, days);
        let broker = Broker {
            tls: trusting(ca_file),
            ..broker_at(&proxy.url("127.0.0.1"))
        };
        match open_error(&broker) {
            ConnectError::Tls { problem, .. } => problem,
            error => panic!("{error}"),
        }
    };
    let good = "IP:127.0.0.1";
    assert_eq!(
        problem(good, 1, &ours, other.file()),
        TlsProblem::UnknownIssuer
    );
    assert_eq!(
        problem("DNS:elsewhere", 1, &ours, ours.file()),
        TlsProblem::WrongHost
    );
    assert_eq!(
        problem("IP:127.0.0.2", 1, &ours, ours.file()),
        TlsProblem::WrongHost
    );
    assert_eq!(problem(good, -1, &ours, ours.file()), TlsProblem::Expired);
}

#[test]
fn tls_to_a_plain_port_and_a_ca_file_that_is_none_are_told_apart() {
    let authority = Authority::new("ours");
    let plain = amqp_url().replacen("amqp://", "amqps://", 1);
    let broker = Broker {
        tls: trusting(authority.file()),
        ..broker_at(&plain)
    };
    let error = open_error(&broker);
    assert!(
        matches!(
            error,
            ConnectError::Tls {
                problem: TlsProblem::NotTls,
                ..
            }
        ),
        "{error}"
    );

    for (ca_file, reason) in [
        (PathBuf::from("/no/such/ca.pem"), "No such file"),
        (
            PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"),
            "no certificate",
        ),
    ] {
        let broker = Broker {
            tls: trusting(ca_file),
            ..broker_at(&plain)
        };
        let error = open_error(&broker);
        assert!(matches!(error, ConnectError::Trust(_)), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}
