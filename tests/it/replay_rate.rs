//! How fast a replay goes: seen on its way to the broker, where a publish
//! passes before it is confirmed.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use url::Url;

use crate::common::letters::{judged, kill_messages};
use crate::common::{ORDERS, Tool, World};

/// Class and method of `basic.publish`.
const PUBLISH: [u8; 4] = [0, 60, 0, 40];

/// A proxy before the broker that notes when each publish passes.
struct Tap {
    url: String,
    passed: Arc<Mutex<Vec<Instant>>>,
}

impl Tap {
    fn before(url: &str) -> Self {
        let mut url = Url::parse(url).unwrap();
        let target = (
            url.host_str().unwrap().to_owned(),
            url.port().unwrap_or(5672),
        );
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port()))
            .unwrap();
        let passed = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&passed);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                let server = TcpStream::connect((target.0.as_str(), target.1)).unwrap();
                let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                std::thread::spawn(move || {
                    std::io::copy(&mut from, &mut to).ok();
                    to.shutdown(Shutdown::Both).ok();
                });
                let notes = Arc::clone(&notes);
                std::thread::spawn(move || forward(client, server, &notes));
            }
        });
        Self {
            url: url.into(),
            passed,
        }
    }
}

/// Frame by frame, after the protocol header.
fn forward(
    mut client: TcpStream,
    mut server: TcpStream,
    notes: &Mutex<Vec<Instant>>,
) -> Option<()> {
    let mut header = [0; 8];
    client.read_exact(&mut header).ok()?;
    server.write_all(&header).ok()?;
    loop {
        let mut head = [0; 7];
        let Ok(()) = client.read_exact(&mut head) else {
            server.shutdown(Shutdown::Both).ok();
            return None;
        };
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut rest = vec![0; size + 1];
        client.read_exact(&mut rest).ok()?;
        if head[0] == 1 && rest.starts_with(&PUBLISH) {
            notes.lock().unwrap().push(Instant::now());
        }
        server.write_all(&[&head[..], &rest].concat()).ok()?;
    }
}

/// Most of `times` in any span of so long, the end not counted.
fn most_within(times: &[Instant], span: Duration) -> usize {
    let from = |start: &Instant| {
        let within = times
            .iter()
            .filter(|at| *at >= start && **at < *start + span);
        within.count()
    };
    times.iter().map(from).max().unwrap_or(0)
}

/// When each of so many letters passed on its way to the broker.
fn replayed_at(rate: &str, letters: usize) -> Vec<Instant> {
    let world = World::new();
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, letters);
    let tap = Tap::before(world.amqp_url());
    let tapped = config.set("broker.url", tap.url.as_str());
    Tool::new(
        &world,
        &tapped,
        &["replay", ORDERS, "--yes", "--rate", rate],
    )
    .run()
    .expect(0);
    assert_eq!(world.broker.ready(ORDERS) as usize, letters);
    let times = tap.passed.lock().unwrap().clone();
    assert_eq!(times.len(), letters);
    times
}

#[test]
fn no_second_sees_more_than_the_rate_allows() {
    let times = replayed_at("100/s", 1_000);
    assert!(most_within(&times, Duration::from_secs(1)) <= 100);
}
