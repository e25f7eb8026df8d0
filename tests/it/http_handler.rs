//! The `http` handler by itself, against receivers that behave, and that do not.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod hostile;
mod tls;

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ackonce::config;
use ackonce::config::checked;
use ackonce::failure::{Class, Failure};
use ackonce::handler::http::HttpHandler;
use ackonce::handler::{Keyed, Work};
use ackonce::message::{Message, MessageId};
use ackonce::stop::{self, Stop, Stopper};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, Mac};
use serde_json::json;
use sha2::Sha256;

use crate::common::{Answer, Receiver, eventually};

/// A handler with the keys `lines`, of a consumer called `orders`.
fn configured(lines: &str) -> checked::HttpHandler {
    let text = format!(
        "[broker]\nurl = 'amqp://localhost'\n[redis]\nenabled = false\n[postgres]\nurl = 'postgres://localhost/d'\n\
         [[consumer]]\nname = 'orders'\n[consumer.handler]\ntype = 'http'\n{lines}"
    );
    let config = config::parse(&text, Path::new("/x"), &|_| None);
    let mut config = config.unwrap_or_else(|error| panic!("{error}"));
    match config.consumers.remove(0).handler {
        checked::Handler::Http(handler) => *handler,
        other => panic!("{other:?}"),
    }
}

struct Rig {
    handler: HttpHandler,
    /// Dropping it cancels.
    stopper: Option<Stopper>,
    stop: Stop,
}

impl Rig {
    fn new(url: &str, lines: &str) -> Self {
        let handler = HttpHandler::new(&configured(&format!("url = '{url}'\n{lines}")), "orders");
        let (stopper, stop) = stop::pair();
        Self {
            handler: handler.unwrap_or_else(|error| panic!("{error}")),
            stopper: Some(stopper),
            stop,
        }
    }

    fn send(&mut self, id: &str, message: &Message) -> Result<(), Failure> {
        let work = Work {
            message_id: &MessageId::new(id).unwrap(),
            message,
            attempt: 3,
        };
        self.handler.apply(&work, &self.stop)
    }

    fn send_body(&mut self, body: &[u8]) -> Result<(), Failure> {
        let message = Message {
            body: body.to_vec(),
            ..Message::default()
        };
        self.send("m1", &message)
    }

    /// Code, class and text of the failure of one message.
    fn failure(&mut self) -> (String, Class, String) {
        let failure = self.send_body(b"{}").unwrap_err();
        let code = failure.code.clone().unwrap_or_default();
        (code, failure.class, failure.text)
    }
}

#[test]
fn a_request_says_what_the_message_is() {
    let receiver = Receiver::willing();
    let mut rig = Rig::new(
        &receiver.url(),
        "method = 'PUT'\nheaders = { X-Env = 'prod' }\nforward_headers = ['x-tenant', 'X-Count']\n\
         timeout = '7s'",
    );
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let message = Message {
        body: b"{\"a\":1}".to_vec(),
        content_type: Some("application/json".to_owned()),
        headers: json!({
            "x-tenant": "a b", "X-Count": 5, "x-other": "not asked for", "traceparent": trace,
        })
        .as_object()
        .unwrap()
        .clone(),
        ..Message::default()
    };
    rig.send("order-1", &message).unwrap();
    let requests = receiver.requests();
    let [request] = requests.as_slice() else {
        panic!("{requests:?}");
    };
    assert_eq!(request.line, b"PUT /orders?x=1 HTTP/1.1");
    assert_eq!(request.body, message.body);
    let mut headers: Vec<(String, String)> = request
        .headers
        .iter()
        .map(|(name, value)| {
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            (text(name).to_lowercase(), text(value))
        })
        .collect();
    headers.sort();
    let host = receiver.address().to_string();
    let agent = concat!("ackonce/", env!("CARGO_PKG_VERSION"));
    let wanted = [
        ("accept", "*/*"),
        ("accept-encoding", "identity"),
        ("ackonce-attempt", "3"),
        ("ackonce-timeout-ms", "7000"),
        ("content-length", "7"),
        ("content-type", "application/json"),
        ("host", &host),
        ("idempotency-key", "orders:order-1"),
        ("traceparent", trace),
        ("user-agent", agent),
        ("x-count", "5"),
        ("x-env", "prod"),
        ("x-tenant", "a b"),
    ];
    let wanted = wanted.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(headers, wanted);
}

#[test]
fn key_header_key_format_and_content_type_are_the_configurations() {
    let receiver = Receiver::willing();
    let mut rig = Rig::new(
        &receiver.url(),
        "key_header = 'X-Request-Id'\nkey_format = 'quoted'\ncontent_type = 'text/x'\n\
         headers = { User-Agent = 'us', Accept = 'text/y' }",
    );
    let message = Message {
        content_type: Some("application/json".to_owned()),
        ..Message::default()
    };
    rig.send("a \"b\\\" ü%", &message).unwrap();
    let request = &receiver.requests()[0];
    let key = request.header("x-request-id").unwrap();
    assert_eq!(key, "\"orders:a%20%22b%5C%22%20%C3%BC%25\"");
    assert_eq!(request.header("idempotency-key"), None);
    assert_eq!(request.header("content-type").unwrap(), "text/x");
    assert_eq!(request.header("user-agent").unwrap(), "us");
    assert_eq!(request.header("accept").unwrap(), "text/y");
    assert_eq!(request.header("content-length").unwrap(), "0");
}

#[test]
fn every_secret_signs_as_standard_webhooks_has_it() {
    let receiver = Receiver::willing();
    let keys = [[7_u8; 24], [9; 24]].map(|key| BASE64_STANDARD.encode(key));
    let mut rig = Rig::new(
        &receiver.url(),
        &format!("signing_secrets = ['whsec_{}', '{}']", keys[0], keys[1]),
    );
    let message = Message {
        body: "{\"ü\":1}\n".into(),
        ..Message::default()
    };
    rig.send("a.b", &message).unwrap();
    let request = &receiver.requests()[0];
    let id = request.header("webhook-id").unwrap();
    assert_eq!(id, "orders:a%2Eb");
    let time = request.header("webhook-timestamp").unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let age = now.as_secs().abs_diff(time.parse().unwrap());
    assert!(age < 300, "a receiver refuses what is older: {age} s");
    let signatures: Vec<String> = keys
        .iter()
        .map(|key| {
            let key = BASE64_STANDARD.decode(key).unwrap();
            let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
            mac.update(format!("{id}.{time}.").as_bytes());
            mac.update(&request.body);
            format!("v1,{}", BASE64_STANDARD.encode(mac.finalize().into_bytes()))
        })
        .collect();
    assert_eq!(
        request.header("webhook-signature").unwrap(),
        signatures.join(" ")
    );
}

#[test]
fn one_connection_carries_many_requests() {
    let receiver = Receiver::willing();
    let mut rig = Rig::new(&receiver.url(), "");
    for size in [0, 1, 10_000, 20_000, 3_000_000, 5] {
        let body: Vec<u8> = (0..size).map(|n: u32| (n % 251) as u8).collect();
        rig.send_body(&body).unwrap();
        assert!(receiver.requests().last().unwrap().body == body, "{size}");
    }
    assert_eq!(receiver.connections(), 1);
}

#[test]
fn a_connection_that_the_receiver_closed_is_replaced_at_no_cost() {
    let receiver = Receiver::new(|_| Answer::CloseAfter);
    let mut rig = Rig::new(&receiver.url(), "");
    for _ in 0..5 {
        rig.send_body(b"{}").unwrap();
        receiver.wait_until_idle();
    }
    assert_eq!((receiver.count(), receiver.connections()), (5, 5));
}

#[test]
fn every_status_has_the_class_of_the_table() {
    for (status, class) in [
        (200, None),
        (201, None),
        (202, None),
        (204, None),
        (299, None),
        (300, Some(Class::Permanent)),
        (301, Some(Class::Permanent)),
        (302, Some(Class::Permanent)),
        (303, Some(Class::Permanent)),
        (304, Some(Class::Permanent)),
        (307, Some(Class::Permanent)),
        (308, Some(Class::Permanent)),
        (400, Some(Class::Permanent)),
        (401, Some(Class::Systemic)),
        (403, Some(Class::Systemic)),
        (404, Some(Class::Permanent)),
        (408, Some(Class::Transient)),
        (409, Some(Class::Transient)),
        (422, Some(Class::Permanent)),
        (425, Some(Class::Transient)),
        (429, Some(Class::Transient)),
        (500, Some(Class::Transient)),
        (503, Some(Class::Transient)),
        (599, Some(Class::Transient)),
    ] {
        let receiver = Receiver::new(move |_| {
            let body = if [204, 304].contains(&status) {
                ""
            } else {
                "why"
            };
            Answer::Status(status, "location: /elsewhere\r\n", body.to_owned())
        });
        let mut rig = Rig::new(&receiver.url(), "");
        let failure = rig.send_body(b"{}").err();
        assert_eq!(
            failure.as_ref().map(|f| f.class),
            class,
            "{status}: {failure:?}"
        );
        if let Some(failure) = failure {
            assert_eq!(failure.code, Some(status.to_string()));
            let place = receiver.address().to_string();
            let why = if status == 304 { "" } else { " why" };
            let lines: Vec<&str> = failure.text.lines().collect();
            assert!(
                lines[0].starts_with(&format!("{place} answered {status}")),
                "{failure}"
            );
            assert_eq!(lines[1..], [format!("location: /elsewhere{why}")]);
        }
        assert_eq!(receiver.count(), 1, "a redirect is not followed");
    }
}

#[test]
fn what_a_receiver_says_is_kept_cut_and_harmless() {
    let receiver = Receiver::new(|_| {
        let body = format!("no\r\n\x1b[31msuch\0\u{202e} order {}", "y".repeat(300_000));
        Answer::Status(404, "", body)
    });
    let (code, _, text) = Rig::new(&receiver.url(), "").failure();
    assert_eq!(code, "404");
    assert!(
        text.contains("no \u{fffd}[31msuch\u{fffd}\u{fffd} order y"),
        "{text}"
    );
    assert_eq!(text.chars().count(), 2_000);
    assert_eq!(text.chars().filter(|c| c.is_control()).count(), 1, "{text}");
}

#[test]
fn a_success_with_a_long_body_is_a_success() {
    let receiver = Receiver::new(|_| Answer::Status(200, "", "y".repeat(300_000)));
    let mut rig = Rig::new(&receiver.url(), "");
    for _ in 0..3 {
        rig.send_body(b"{}").unwrap();
    }
    assert_eq!(receiver.count(), 3);
}

#[test]
fn a_receiver_can_ask_to_be_left_alone() {
    for (head, wait) in [
        ("retry-after: 7\r\n", Some(7)),
        ("retry-after: 100000\r\n", Some(3_600)),
        ("retry-after: soon\r\n", None),
        (
            "date: Sun, 06 Nov 1994 08:49:37 GMT\r\nretry-after: Sun, 06 Nov 1994 08:49:49 GMT\r\n",
            Some(12),
        ),
        ("", None),
    ] {
        for status in [429, 503] {
            let receiver = Receiver::new(move |_| Answer::Status(status, head, String::new()));
            let failure = Rig::new(&receiver.url(), "").send_body(b"{}").unwrap_err();
            assert_eq!(
                failure.retry_after,
                wait.map(Duration::from_secs),
                "{status} {head}"
            );
        }
    }
}

#[test]
fn an_answer_that_is_not_whole_is_none() {
    for (answer, code) in [
        (Answer::Drop, "broken"),
        (Answer::Half, "broken"),
        (Answer::Raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "broken"),
        (Answer::Raw(b"HTTP/1.1 200"), "broken"),
        (Answer::Raw(b"\0\0\0"), "broken"),
        (Answer::Silence, "timeout"),
    ] {
        let script = answer.clone();
        let receiver = Receiver::new(move |_| script.clone());
        let mut rig = Rig::new(
            &receiver.url(),
            "timeout = '300ms'\nconnect_timeout = '300ms'",
        );
        let (found, class, text) = rig.failure();
        assert_eq!(
            (found.as_str(), class),
            (code, Class::Transient),
            "{answer:?}: {text}"
        );
        let place = receiver.address().to_string();
        assert!(text.contains(&place), "{text}");
        assert_eq!(receiver.count(), 1);
    }
}

#[test]
fn an_answer_without_end_is_not_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let sender = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\n").unwrap();
        // A byte now and then, so that no single wait is long.
        while stream.write_all(b"x: y\r\n").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut rig = Rig::new(&url, "timeout = '400ms'\nconnect_timeout = '300ms'");
    let (code, class, _) = rig.failure();
    assert_eq!((code.as_str(), class), ("timeout", Class::Transient));
    drop(rig);
    sender.join().unwrap();
}

#[test]
fn a_refusal_is_heard_while_the_body_is_still_being_sent() {
    let receiver = Receiver::new(|_| Answer::Raw(b"HTTP/1.1 413 X\r\ncontent-length: 0\r\n\r\n"));
    receiver.stop_reading_bodies();
    let mut rig = Rig::new(&receiver.url(), "");
    let failure = rig.send_body(&vec![7; 20 << 20]).unwrap_err();
    assert_eq!(failure.code.as_deref(), Some("413"), "{failure}");
}

#[test]
fn nobody_there_is_not_the_messages_fault() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let (full, _clients) = full_listener();
    let place = |address: SocketAddr| format!("http://{address}/");
    for (url, code, says) in [
        (place(free), "connect", "refused"),
        (place(full.local_addr().unwrap()), "connect", "timed out"),
        (
            "http://no-such-host.invalid/".to_owned(),
            "resolve",
            "no-such-host.invalid",
        ),
    ] {
        let mut rig = Rig::new(&url, "connect_timeout = '300ms'");
        let (found, class, text) = rig.failure();
        assert_eq!((found.as_str(), class), (code, Class::Systemic), "{text}");
        assert!(text.contains(says), "{text}");
    }
}

/// A listener that takes no more connections, as behind a firewall.
fn full_listener() -> (TcpListener, Vec<TcpStream>) {
    use socket2::{Domain, Socket, Type};
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    socket.bind(&any.into()).unwrap();
    socket.listen(0).unwrap();
    let listener = TcpListener::from(socket);
    let address = listener.local_addr().unwrap();
    let mut clients = Vec::new();
    while let Ok(client) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        clients.push(client);
        assert!(clients.len() < 100, "the listener never fills up");
    }
    (listener, clients)
}

#[test]
fn a_wait_is_given_up_when_it_is_cancelled() {
    let receiver = Receiver::new(|_| Answer::Silence);
    let (full, _clients) = full_listener();
    for (url, begun) in [
        (receiver.url(), true),
        (format!("http://{}/", full.local_addr().unwrap()), false),
    ] {
        let mut rig = Rig::new(&url, "timeout = '1h'\nconnect_timeout = '1m'");
        let stopper = rig.stopper.take();
        let sender = std::thread::spawn(move || {
            let failure = rig.send_body(b"{}").unwrap_err();
            (failure, rig.send_body(b"{}").unwrap_err())
        });
        if begun {
            receiver.wait_for(1);
        }
        assert!(!sender.is_finished());
        drop(stopper);
        eventually("the wait ends", || sender.is_finished());
        let (failure, next) = sender.join().unwrap();
        assert!(
            failure.text.contains("could not be waited for"),
            "{failure}"
        );
        assert_eq!(failure, next, "nothing more is begun");
    }
    assert_eq!(receiver.count(), 1);
}

#[test]
fn a_probe_connects_and_sends_nothing() {
    let receiver = Receiver::willing();
    let place = HttpHandler::probe(&configured(&format!("url = '{}'", receiver.url()))).unwrap();
    assert_eq!(place, receiver.address().to_string());
    eventually("a connection", || receiver.connections() == 1);
    assert_eq!(receiver.count(), 0);
}
