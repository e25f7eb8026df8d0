//! Queues of a test's own, and men in the middle that cut or stall the line.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::thread;
use std::time::Duration;

use ackonce::broker::connection::{self, Link};
use ackonce::broker::publisher::{Limits, Outgoing, Publisher};
use ackonce::config::checked::{Broker, Secret, Tls};
use amiquip::{Channel, FieldTable, QueueDeclareOptions, QueueDeleteOptions};

/// Generous: a deadline of these tests is reached only when they fail.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn amqp_url() -> String {
    std::env::var("ACKONCE_AMQP_URL")
        .expect("ACKONCE_AMQP_URL is not set: run the tests with script/test")
}

pub fn broker_at(url: &str) -> Broker {
    Broker {
        urls: vec![Secret::new(url.to_owned())],
        tls: Tls::default(),
        allow_plaintext: false,
        heartbeat: Duration::from_secs(10),
        connect_timeout: Duration::from_secs(30),
    }
}

pub fn broker() -> Broker {
    broker_at(&amqp_url())
}

/// A queue of this test alone, gone when the test ends.
pub struct Queue {
    pub name: String,
    channel: Option<Channel>,
    link: Option<Link>,
}

impl Queue {
    pub fn with(arguments: FieldTable) -> Self {
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

    pub fn new() -> Self {
        Self::with(FieldTable::new())
    }

    pub fn channel(&self) -> &Channel {
        self.channel.as_ref().unwrap()
    }

    pub fn next(&self) -> Option<amiquip::Delivery> {
        let got = self.channel().basic_get(self.name.as_str(), true).unwrap();
        got.map(|got| got.delivery)
    }

    pub fn message(&self, body: impl Into<Vec<u8>>) -> Outgoing {
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

pub fn publisher() -> Publisher {
    Publisher::open(&broker(), "test", Limits::default()).unwrap()
}

pub fn nowhere(body: &str) -> Outgoing {
    Outgoing {
        routing_key: "publisher-test.no-such-queue".to_owned(),
        body: body.as_bytes().to_vec(),
        ..Outgoing::default()
    }
}

/// A man in the middle of one connection: forwards until told otherwise.
pub struct Line {
    /// The broker's URL, by way of this line.
    pub url: String,
    requests_held: Arc<AtomicBool>,
    replies_held: Arc<AtomicBool>,
    sockets: Receiver<(TcpStream, TcpStream)>,
}

impl Line {
    pub fn new() -> Self {
        let mut url = url::Url::parse(&amqp_url()).unwrap();
        let upstream = (
            url.host_str().unwrap().to_owned(),
            url.port().unwrap_or(5672),
        );
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        let requests_held = Arc::new(AtomicBool::new(false));
        let replies_held = Arc::new(AtomicBool::new(false));
        let held = (Arc::clone(&requests_held), Arc::clone(&replies_held));
        let (ready, sockets) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let (client, _) = listener.accept().unwrap();
            let server = TcpStream::connect((upstream.0.as_str(), upstream.1)).unwrap();
            let clone = |socket: &TcpStream| socket.try_clone().unwrap();
            ready.send((clone(&client), clone(&server))).unwrap();
            forward(clone(&server), clone(&client), held.1);
            forward(client, server, held.0);
        });
        Self {
            url: url.to_string(),
            requests_held,
            replies_held,
            sockets,
        }
    }

    /// From now on the broker's replies get no further.
    pub fn hold_replies(&self) {
        self.replies_held.store(true, Ordering::SeqCst);
    }

    /// From now on neither side is read any more.
    pub fn stall(&self) {
        self.requests_held.store(true, Ordering::SeqCst);
        self.hold_replies();
    }

    pub fn cut(self) {
        let (client, server) = self.sockets.recv().unwrap();
        client.shutdown(Shutdown::Both).ok();
        server.shutdown(Shutdown::Both).ok();
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, held: Arc<AtomicBool>) {
    thread::spawn(move || {
        let mut part = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut part) {
            while held.load(Ordering::SeqCst) {
                thread::park();
            }
            if to.write_all(&part[..count]).is_err() {
                break;
            }
        }
        // As a network would: the end of one side is the end of the other.
        to.shutdown(Shutdown::Both).ok();
    });
}

/// Something that accepts connections and then does `act`.
pub fn listener(act: impl Fn(TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming() {
            act(client.unwrap());
        }
    });
    port
}

pub fn hasty(url: &str) -> Broker {
    Broker {
        connect_timeout: Duration::from_millis(1_500),
        ..broker_at(url)
    }
}
