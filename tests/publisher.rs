//! Connections and the publisher, against the RabbitMQ server that
//! `ACKONCE_AMQP_URL` names, and against listeners that are no such thing.

#[path = "publisher/tls_proxy.rs"]
mod tls_proxy;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ackonce::broker::connection::{self, Link};
use ackonce::broker::error::{ConnectError, LinkError, Stage, TlsProblem};
use ackonce::broker::outgoing::{HEADERS_MAX, PROPERTIES_MAX_BYTES};
use ackonce::broker::publisher::{Fate, Limits, Outgoing, PublishError, Publisher, Seq};
use ackonce::cli::Exit;
use ackonce::cli::publish::{MessageArguments, publish};
use ackonce::config::checked::{Broker, Secret};
use amiquip::{AmqpValue, Channel, FieldTable, QueueDeclareOptions, QueueDeleteOptions};
use serde_json::{Map, json};
use tls_proxy::{Authority, TlsProxy};

/// Generous: a deadline of these tests is reached only when they fail.
const PATIENCE: Duration = Duration::from_secs(60);

fn amqp_url() -> String {
    std::env::var("ACKONCE_AMQP_URL")
        .expect("ACKONCE_AMQP_URL is not set: run the tests with script/test")
}

fn broker_at(url: &str) -> Broker {
    Broker {
        url: Secret::new(url.to_owned()),
        ca_file: None,
        heartbeat: Duration::from_secs(10),
        connect_timeout: Duration::from_secs(30),
    }
}

fn broker() -> Broker {
    broker_at(&amqp_url())
}

/// A queue of this test alone, gone when the test ends.
struct Queue {
    name: String,
    channel: Option<Channel>,
    link: Option<Link>,
}

impl Queue {
    fn with(arguments: FieldTable) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("publisher-test.{}.{number}", std::process::id());
        let mut link = connection::open(&broker(), "test").unwrap();
        let channel = link.open_channel(PATIENCE).unwrap();
        let options = QueueDeclareOptions {
            durable: true,
            arguments,
            ..QueueDeclareOptions::default()
        };
        channel.queue_declare(name.as_str(), options).unwrap();
        Self {
            name,
            channel: Some(channel),
            link: Some(link),
        }
    }

    fn new() -> Self {
        Self::with(FieldTable::new())
    }

    fn channel(&self) -> &Channel {
        self.channel.as_ref().unwrap()
    }

    fn next(&self) -> Option<amiquip::Delivery> {
        let got = self.channel().basic_get(self.name.as_str(), true).unwrap();
        got.map(|got| got.delivery)
    }

    fn message(&self, body: impl Into<Vec<u8>>) -> Outgoing {
        Outgoing {
            routing_key: self.name.clone(),
            body: body.into(),
            ..Outgoing::default()
        }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let channel = self.channel.take().unwrap();
        channel
            .queue_delete(self.name.as_str(), QueueDeleteOptions::default())
            .ok();
        self.link.take().unwrap().close_with(channel, PATIENCE).ok();
    }
}

fn publisher() -> Publisher {
    Publisher::open(&broker(), "test", Limits::default()).unwrap()
}

fn nowhere(body: &str) -> Outgoing {
    Outgoing {
        routing_key: "publisher-test.no-such-queue".to_owned(),
        body: body.as_bytes().to_vec(),
        ..Outgoing::default()
    }
}

#[test]
fn a_confirmed_message_is_in_the_queue_as_it_was_published() {
    let queue = Queue::new();
    let mut publisher = publisher();
    let headers = json!({
        "text": "ä", "yes": true, "none": null, "integer": -5, "big": i64::MAX, "half": 0.5,
        "list": [1, "two", { "three": 3 }], "table": { "inner": {} },
    });
    let message = Outgoing {
        message_id: Some("m-1".to_owned()),
        content_type: Some("application/json".to_owned()),
        timestamp: Some(1_700_000_000),
        headers: headers.as_object().unwrap().clone(),
        ..queue.message("{}")
    };
    let seq = publisher.publish(&message).unwrap();
    assert_eq!(publisher.wait_all(PATIENCE), [(seq, Fate::Confirmed)]);
    assert_eq!(publisher.close(PATIENCE), []);

    let delivery = queue.next().unwrap();
    assert_eq!(delivery.body, b"{}");
    assert_eq!(delivery.properties.message_id().as_deref(), Some("m-1"));
    assert_eq!(
        delivery.properties.content_type().as_deref(),
        Some("application/json")
    );
    assert_eq!(*delivery.properties.timestamp(), Some(1_700_000_000));
    assert_eq!(
        *delivery.properties.delivery_mode(),
        Some(2),
        "it must be persistent"
    );
    let table = delivery.properties.headers().as_ref().unwrap();
    assert_eq!(
        table.len(),
        8,
        "no header of our own may leak into a message: {table:?}"
    );
    assert_eq!(table["big"], AmqpValue::LongLongInt(i64::MAX));
    assert_eq!(table["half"], AmqpValue::Double(0.5));
    assert_eq!(table["none"], AmqpValue::Void);
    let AmqpValue::FieldArray(list) = &table["list"] else {
        panic!("{table:?}");
    };
    assert_eq!(list[1], AmqpValue::LongString("two".to_owned()));
}

#[test]
fn thousands_of_messages_are_each_confirmed_once_and_arrive_in_order() {
    const COUNT: u64 = 5_000;
    let queue = Queue::new();
    let mut publisher = publisher();
    let mut fates = Vec::new();
    for number in 0..COUNT {
        publisher
            .publish(&queue.message(number.to_string()))
            .unwrap();
        fates.extend(publisher.poll());
    }
    fates.extend(publisher.wait_all(PATIENCE));
    assert_eq!(fates.len() as u64, COUNT);
    assert!(fates.iter().all(|(_, fate)| *fate == Fate::Confirmed));
    let seqs: HashSet<Seq> = fates.iter().map(|(seq, _)| *seq).collect();
    assert_eq!(seqs.len() as u64, COUNT);
    for number in 0..COUNT {
        assert_eq!(queue.next().unwrap().body, number.to_string().into_bytes());
    }
}

#[test]
fn an_unroutable_message_is_returned_and_its_neighbours_are_confirmed() {
    let queue = Queue::new();
    let mut publisher = publisher();
    let mut lost = HashSet::new();
    let mut fates = Vec::new();
    for number in 0..500 {
        // Every third goes nowhere, some of those with equal bodies.
        if number % 3 == 0 {
            let body = format!("{}", number % 7);
            lost.insert(publisher.publish(&nowhere(&body)).unwrap());
        } else {
            publisher
                .publish(&queue.message(number.to_string()))
                .unwrap();
        }
        fates.extend(publisher.poll());
    }
    fates.extend(publisher.wait_all(PATIENCE));
    assert_eq!(fates.len(), 500);
    for (seq, fate) in fates {
        if lost.contains(&seq) {
            assert!(
                matches!(fate, Fate::Returned { code: 312, .. }),
                "{seq:?}: {fate:?}"
            );
        } else {
            assert_eq!(fate, Fate::Confirmed, "{seq:?}");
        }
    }
}

#[test]
fn a_full_queue_that_rejects_gives_nacks_and_no_confirm() {
    let queue = Queue::with(FieldTable::from([
        ("x-max-length".to_owned(), AmqpValue::LongInt(1)),
        (
            "x-overflow".to_owned(),
            AmqpValue::LongString("reject-publish".to_owned()),
        ),
    ]));
    let mut publisher = publisher();
    let first = publisher.publish(&queue.message("first")).unwrap();
    assert_eq!(publisher.wait_all(PATIENCE), [(first, Fate::Confirmed)]);
    for number in 0..20 {
        publisher
            .publish(&queue.message(number.to_string()))
            .unwrap();
    }
    let fates = publisher.wait_all(PATIENCE);
    assert_eq!(fates.len(), 20);
    assert!(
        fates.iter().all(|(_, fate)| *fate == Fate::Nacked),
        "{fates:?}"
    );
}

#[test]
fn a_missing_exchange_loses_the_publisher_with_the_brokers_words_and_no_confirm() {
    let mut publisher = publisher();
    let message = Outgoing {
        exchange: "publisher-test.no-such-exchange".to_owned(),
        ..nowhere("x")
    };
    let seq = publisher.publish(&message).unwrap();
    assert_eq!(publisher.wait_all(PATIENCE), [(seq, Fate::Unknown)]);
    let cause = publisher.lost().unwrap().to_owned();
    assert!(
        cause.contains("404") && cause.contains("no-such-exchange"),
        "{cause}"
    );
    let error = publisher.publish(&message).unwrap_err();
    assert!(matches!(error, PublishError::Lost { .. }), "{error}");
    assert_eq!(publisher.close(PATIENCE), []);
}

/// A man in the middle who cuts the line when told, and forwards until then.
fn cuttable() -> (String, impl FnOnce()) {
    let url = amqp_url();
    let target = url::Url::parse(&url).unwrap();
    let upstream = (
        target.host_str().unwrap().to_owned(),
        target.port().unwrap_or(5672),
    );
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut own = target.clone();
    own.set_host(Some("127.0.0.1")).unwrap();
    own.set_port(Some(listener.local_addr().unwrap().port()))
        .unwrap();
    let (ready, sockets) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        let server = TcpStream::connect((upstream.0.as_str(), upstream.1)).unwrap();
        ready
            .send((client.try_clone().unwrap(), server.try_clone().unwrap()))
            .unwrap();
        let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
        thread::spawn(move || std::io::copy(&mut from, &mut to).ok());
        let (mut from, mut to) = (client, server);
        std::io::copy(&mut from, &mut to).ok();
    });
    let cut = move || {
        let (client, server): (TcpStream, TcpStream) = sockets.recv().unwrap();
        client.shutdown(std::net::Shutdown::Both).ok();
        server.shutdown(std::net::Shutdown::Both).ok();
    };
    (own.to_string(), cut)
}

#[test]
fn a_line_that_is_cut_leaves_the_unconfirmed_unknown_and_only_what_arrived_confirmed() {
    let queue = Queue::new();
    let (url, cut) = cuttable();
    let limits = Limits {
        messages: 100_000,
        bytes: 8 * 1024 * 1024,
        ..Limits::default()
    };
    let mut publisher = Publisher::open(&broker_at(&url), "test", limits).unwrap();
    let mut cut = Some(cut);
    let mut fates = Vec::new();
    let mut accepted = 0;
    for number in 0..20_000 {
        match publisher.publish(&queue.message(number.to_string())) {
            Ok(_) => accepted += 1,
            Err(PublishError::Lost { .. }) => break,
            Err(error) => panic!("{error}"),
        }
        fates.extend(publisher.poll());
        if fates.len() > 100
            && let Some(cut) = cut.take()
        {
            cut();
        }
    }
    assert!(cut.is_none(), "the line was never cut");
    fates.extend(publisher.wait_all(PATIENCE));
    let cause = publisher.lost().unwrap().to_owned();
    assert!(!cause.is_empty());
    assert_eq!(fates.len(), accepted);
    let unknown = fates
        .iter()
        .filter(|(_, fate)| *fate == Fate::Unknown)
        .count();
    assert!(unknown > 0, "nothing was in flight when the line was cut");

    let mut arrived = HashSet::new();
    let deadline = Instant::now() + PATIENCE;
    let confirmed: HashSet<u64> = fates
        .iter()
        .filter(|(_, fate)| *fate == Fate::Confirmed)
        .map(|(seq, _)| seq.0 - 1)
        .collect();
    while !confirmed.is_subset(&arrived) {
        assert!(
            Instant::now() < deadline,
            "a confirmed message did not arrive"
        );
        while let Some(delivery) = queue.next() {
            arrived.insert(
                String::from_utf8(delivery.body)
                    .unwrap()
                    .parse::<u64>()
                    .unwrap(),
            );
        }
    }
}

#[test]
fn a_broker_that_stops_answering_costs_the_publisher_its_limit_of_time_and_no_confirm() {
    let queue = Queue::new();
    let (url, stall) = stallable();
    let limits = Limits {
        messages: 10,
        wait: Duration::from_millis(300),
        ..Limits::default()
    };
    let mut publisher = Publisher::open(&broker_at(&url), "test", limits).unwrap();
    stall();
    let error = loop {
        if let Err(error) = publisher.publish(&queue.message("x")) {
            break error;
        }
    };
    assert!(
        matches!(
            error,
            PublishError::NoRoom {
                unconfirmed: 10,
                ..
            }
        ),
        "{error}"
    );
    let fates = publisher.close(Duration::from_millis(300));
    assert_eq!(fates.len(), 10);
    assert!(
        fates.iter().all(|(_, fate)| *fate == Fate::Unknown),
        "{fates:?}"
    );
}

#[test]
fn a_body_that_the_broker_does_not_read_ends_at_the_limit_instead_of_hanging() {
    let queue = Queue::new();
    let (url, stall) = stallable();
    let limits = Limits {
        wait: Duration::from_millis(500),
        ..Limits::default()
    };
    let mut publisher = Publisher::open(&broker_at(&url), "test", limits).unwrap();
    stall();
    let error = publisher
        .publish(&queue.message(vec![0; 64 * 1024 * 1024]))
        .unwrap_err();
    assert!(matches!(&error, PublishError::Lost { .. }), "{error}");
    assert!(error.to_string().contains("500ms"), "{error}");
}

/// Forwards until told to stall: then neither side is read any more.
fn stallable() -> (String, impl FnOnce()) {
    let target = url::Url::parse(&amqp_url()).unwrap();
    let upstream = (
        target.host_str().unwrap().to_owned(),
        target.port().unwrap_or(5672),
    );
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut own = target.clone();
    own.set_host(Some("127.0.0.1")).unwrap();
    own.set_port(Some(listener.local_addr().unwrap().port()))
        .unwrap();
    let stalled = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let theirs = std::sync::Arc::clone(&stalled);
    thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        let server = TcpStream::connect((upstream.0.as_str(), upstream.1)).unwrap();
        let forward = |mut from: TcpStream, mut to: TcpStream| {
            let stalled = std::sync::Arc::clone(&theirs);
            thread::spawn(move || {
                let mut part = [0; 4096];
                while let Ok(count @ 1..) = from.read(&mut part) {
                    while stalled.load(Ordering::SeqCst) {
                        thread::park();
                    }
                    if to.write_all(&part[..count]).is_err() {
                        return;
                    }
                }
            });
        };
        forward(server.try_clone().unwrap(), client.try_clone().unwrap());
        forward(client, server);
    });
    (own.to_string(), move || {
        stalled.store(true, Ordering::SeqCst)
    })
}

#[test]
fn what_would_close_the_connection_is_refused_and_what_just_fits_is_not() {
    let queue = Queue::new();
    let mut publisher = publisher();
    // Flags, delivery mode, table length, name, type and string length.
    let around = 2 + 1 + 4 + (1 + 1) + 1 + 4;
    let filled = |length: usize| Outgoing {
        headers: Map::from_iter([("h".to_owned(), json!("x".repeat(length)))]),
        ..queue.message("x")
    };
    let most = PROPERTIES_MAX_BYTES - around;
    let error = publisher.publish(&filled(most + 1)).unwrap_err();
    assert!(matches!(error, PublishError::Unfit(_)), "{error}");
    let long_id = Outgoing {
        message_id: Some("x".repeat(256)),
        ..queue.message("x")
    };
    let error = publisher.publish(&long_id).unwrap_err();
    assert!(
        error.to_string().contains("message id has 256 bytes"),
        "{error}"
    );

    let fits = publisher.publish(&filled(most)).unwrap();
    let many = Outgoing {
        headers: (0..HEADERS_MAX)
            .map(|i| (i.to_string(), json!(i)))
            .collect(),
        ..queue.message("x")
    };
    let many = publisher.publish(&many).unwrap();
    let mut fates = publisher.wait_all(PATIENCE);
    fates.sort_by_key(|(seq, _)| *seq);
    assert_eq!(fates, [(fits, Fate::Confirmed), (many, Fate::Confirmed)]);
}

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

fn open_error(broker: &Broker) -> ConnectError {
    match connection::open(broker, "test") {
        Ok(_) => panic!("it connected"),
        Err(error) => error,
    }
}

/// Something that accepts connections and then does `act`.
fn listener(act: impl Fn(TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming() {
            act(client.unwrap());
        }
    });
    port
}

fn hasty(url: &str) -> Broker {
    Broker {
        connect_timeout: Duration::from_millis(1_500),
        ..broker_at(url)
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
    let (url, cut) = cuttable();
    let mut link = connection::open(&broker_at(&url), "test").unwrap();
    let channel = link.open_channel(PATIENCE).unwrap();
    cut();
    let error = link.close_with(channel, PATIENCE).unwrap_err();
    assert!(matches!(error, LinkError::Lost { .. }), "{error}");
}

#[test]
fn closing_or_opening_a_channel_on_a_stalled_link_ends_at_its_deadline() {
    let (url, stall) = stallable();
    let mut link = connection::open(&broker_at(&url), "test").unwrap();
    let channel = link.open_channel(PATIENCE).unwrap();
    stall();
    let error = link.open_channel(Duration::from_millis(200)).err().unwrap();
    assert!(matches!(error, LinkError::TimedOut { .. }), "{error}");
    link.close_with(channel, PATIENCE).unwrap_err();

    let (url, stall) = stallable();
    let link = connection::open(&broker_at(&url), "test").unwrap();
    stall();
    let error = link.close(Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error, LinkError::TimedOut { .. }), "{error}");
}

#[test]
fn large_bodies_pass_through_tls_unharmed_both_ways() {
    let authority = Authority::new("ours");
    let proxy = TlsProxy::start(&amqp_url(), &authority, "DNS:localhost,IP:127.0.0.1");
    for host in ["localhost", "127.0.0.1"] {
        let broker = Broker {
            ca_file: Some(authority.file()),
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
            ca_file: Some(ca_file),
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
        ca_file: Some(authority.file()),
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
            ca_file: Some(ca_file),
            ..broker_at(&plain)
        };
        let error = open_error(&broker);
        assert!(matches!(error, ConnectError::Authorities { .. }), "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
}

fn run(arguments: &MessageArguments, broker: &Broker, input: &str) -> (Exit, String) {
    let mut report = Vec::new();
    let exit = publish(arguments, broker, input.as_bytes(), &mut report);
    (exit, String::from_utf8(report).unwrap())
}

fn lines_to(queue: &Queue) -> MessageArguments {
    MessageArguments {
        queue: Some(queue.name.clone()),
        file: Some(PathBuf::from("-")),
        ..MessageArguments::default()
    }
}

#[test]
fn the_command_publishes_one_message_from_its_arguments_or_its_input() {
    let queue = Queue::new();
    let arguments = MessageArguments {
        queue: Some(queue.name.clone()),
        body: Some("hello".to_owned()),
        message_id: Some("m-1".to_owned()),
        headers: vec![("a".to_owned(), "b".to_owned())],
        ..MessageArguments::default()
    };
    let (exit, report) = run(&arguments, &broker(), "");
    assert_eq!(exit, Exit::Success, "{report}");
    assert_eq!(
        report,
        "published 1, confirmed 1, returned 0, nacked 0, unknown 0\n"
    );
    let delivery = queue.next().unwrap();
    assert_eq!(delivery.body, b"hello");
    assert_eq!(delivery.properties.message_id().as_deref(), Some("m-1"));

    let arguments = MessageArguments {
        body: None,
        ..arguments
    };
    let (exit, report) = run(&arguments, &broker(), "from\ninput\n");
    assert_eq!(exit, Exit::Success, "{report}");
    assert_eq!(queue.next().unwrap().body, b"from\ninput\n");
}

#[test]
fn the_command_publishes_every_line_and_names_those_that_did_not_arrive() {
    let queue = Queue::new();
    let input: String = (1..=3_000)
        .map(|number| match number {
            1_500 => r#"{"body": 1, "routing_key": "publisher-test.no-such-queue", "message_id": "lost"}"#
                .to_owned()
                + "\n",
            _ => format!("{{\"body\": {{\"n\": {number}}}}}\n"),
        })
        .collect();
    let (exit, report) = run(&lines_to(&queue), &broker(), &input);
    assert_eq!(exit, Exit::Partial, "{report}");
    assert!(
        report.contains("line 1500 (message id \"lost\"): returned"),
        "{report}"
    );
    assert!(
        report.ends_with("published 3000, confirmed 2999, returned 1, nacked 0, unknown 0\n"),
        "{report}"
    );
    assert_eq!(queue.next().unwrap().body, br#"{"n": 1}"#);
}

#[test]
fn the_command_stops_at_a_bad_line_and_says_which() {
    let queue = Queue::new();
    let (exit, report) = run(
        &lines_to(&queue),
        &broker(),
        "{\"body\": 1}\n\n{\"body\": 3}\n",
    );
    assert_eq!(exit, Exit::Partial, "{report}");
    assert!(
        report.contains("stopped at line 2: it is empty"),
        "{report}"
    );
    assert!(report.contains("published 1, confirmed 1"), "{report}");

    let long = format!("{{\"body\": 1, \"message_id\": \"{}\"}}\n", "x".repeat(256));
    let (exit, report) = run(&lines_to(&queue), &broker(), &long);
    assert_eq!(exit, Exit::Usage, "{report}");
    assert!(
        report.contains("line 1") && report.contains("message id has 256"),
        "{report}"
    );
}

#[test]
fn the_command_says_so_when_there_is_no_broker() {
    let queue = Queue::new();
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let gone = broker_at(&format!("amqp://127.0.0.1:{free}/"));
    let (exit, report) = run(&lines_to(&queue), &gone, "{\"body\": 1}\n");
    assert_eq!(exit, Exit::Unreachable, "{report}");
    assert!(report.contains("connection refused"), "{report}");
}
