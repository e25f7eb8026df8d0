//! Messages a second through the `http` handler, beside the requests a second
//! that `wrk` gets out of the same receiver, with as many connections, the same
//! body and the same headers.
//!
//! The receiver is this program: a thread for each connection, which reads a
//! request and answers 200, at once or after a few milliseconds, as one that
//! does something for its answer. It stands on the same processor as everything
//! else, for both alike.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use toml::{Table, Value};

use crate::Plan;
use crate::database::Database;
use crate::drain::drain;
use crate::messages::{Load, Shape};
use crate::report::Report;
use crate::stage::{QueueType, Stage};
use crate::subject::Kind;
use crate::throughput::BODY_BYTES;

/// Requests at a time.
const WORKERS: [usize; 2] = [16, 64];

/// How long the receiver takes for an answer, and how that is called.
const RECEIVERS: [(&str, Duration); 2] = [
    ("at-once", Duration::ZERO),
    ("5ms", Duration::from_millis(5)),
];

/// Most bytes of a request's head.
const HEAD_MAX: usize = 16 << 10;

/// Measures both, in turns.
pub fn run(stage: &mut Stage, plan: &Plan, report: &mut Report) -> Result<()> {
    let (mut database, url) = stage.database("http")?;
    for round in 0..plan.rounds {
        for (name, pause) in RECEIVERS {
            for workers in WORKERS {
                let receiver = Receiver::start(pause)?;
                let key = format!("http/{name}/daemon-{workers}w");
                plan.say(round, &key);
                stage.clean(&mut database)?;
                let per_second = daemon(stage, &mut database, &url, &receiver, workers, plan)
                    .with_context(|| format!("failed to measure {key}"))?;
                report.add(&key, "messages/s", per_second);
                let key = format!("http/{name}/wrk-{workers}c");
                plan.say(round, &key);
                let per_second = wrk(stage.folder(), &receiver, workers, plan)
                    .with_context(|| format!("failed to measure {key}"))?;
                report.add(&key, "requests/s", per_second);
            }
        }
    }
    Ok(())
}

/// Messages a second, each of which was one request.
fn daemon(
    stage: &mut Stage,
    database: &mut Database,
    url: &str,
    receiver: &Receiver,
    workers: usize,
    plan: &Plan,
) -> Result<f64> {
    let load = Load::new(Shape {
        count: plan.messages,
        duplicates_percent: 0,
        body_bytes: BODY_BYTES,
    })?;
    let mut settings = stage.settings(url, QueueType::Quorum);
    let mut handler = Table::new();
    handler.insert("type".to_owned(), "http".into());
    handler.insert("url".to_owned(), receiver.url().into());
    handler.insert("content_type".to_owned(), "application/json".into());
    settings.extra = vec![("consumer.handler", Value::Table(handler))];
    let kind = Kind::Caller { workers };
    let drained = drain(stage, database, &kind, &settings, &load)?;
    let requests = receiver.requests.load(SeqCst);
    ensure!(
        requests == load.distinct(),
        "{requests} requests for {} messages",
        load.distinct()
    );
    Ok(drained.per_second)
}

/// Requests a second, with the head and body of the first one that the daemon
/// has sent.
fn wrk(folder: &Path, receiver: &Receiver, connections: usize, plan: &Plan) -> Result<f64> {
    let sample = receiver.sample().context("the daemon sent nothing")?;
    let script = folder.join("wrk.lua");
    std::fs::write(&script, sample.lua()).context("failed to write wrk's script")?;
    let output = Command::new("wrk")
        .args(["--threads", "2", "--connections", &connections.to_string()])
        .args(["--duration", &format!("{}s", plan.latency_seconds)])
        .arg("--script")
        .arg(&script)
        .arg(receiver.url())
        .output()
        .context("failed to run wrk: script/bench installs it")?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "wrk: {output:?}");
    ensure!(
        !text.contains("Non-2xx"),
        "the receiver refused wrk: {text}"
    );
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"));
    let figure = line.with_context(|| format!("wrk said no rate: {text}"))?;
    figure.trim().parse().context("wrk's rate is no number")
}

/// The first request of a run.
#[derive(Debug, Clone)]
struct Sample {
    head: String,
    body: String,
}

impl Sample {
    /// A script by which wrk sends the same.
    fn lua(&self) -> String {
        let quoted = |text: &str| format!("[==[{text}]==]");
        let mut script = format!("wrk.method = \"POST\"\nwrk.body = {}\n", quoted(&self.body));
        for line in self.head.lines().skip(1) {
            let Some((name, value)) = line.split_once(": ") else {
                continue;
            };
            // wrk writes these itself.
            if !["host", "content-length"].contains(&name.to_ascii_lowercase().as_str()) {
                script += &format!("wrk.headers[{}] = {}\n", quoted(name), quoted(value));
            }
        }
        script
    }
}

struct Receiver {
    address: SocketAddr,
    requests: Arc<AtomicUsize>,
    sample: Arc<Mutex<Option<Sample>>>,
    closing: Arc<AtomicBool>,
}

impl Receiver {
    fn start(pause: Duration) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").context("no free port")?;
        let receiver = Self {
            address: listener.local_addr()?,
            requests: Arc::default(),
            sample: Arc::default(),
            closing: Arc::default(),
        };
        let (requests, sample) = (Arc::clone(&receiver.requests), Arc::clone(&receiver.sample));
        let closing = Arc::clone(&receiver.closing);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if closing.load(SeqCst) {
                    return;
                }
                let (requests, sample) = (Arc::clone(&requests), Arc::clone(&sample));
                std::thread::spawn(move || {
                    // The other side ends it.
                    serve(&stream, pause, &requests, &sample).ok();
                    stream.shutdown(Shutdown::Both).ok();
                });
            }
        });
        Ok(receiver)
    }

    fn url(&self) -> String {
        format!("http://{}/orders", self.address)
    }

    fn sample(&self) -> Option<Sample> {
        self.sample.lock().ok()?.clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.closing.store(true, SeqCst);
        // Wakes the thread that accepts.
        drop(TcpStream::connect(self.address));
    }
}

fn serve(
    mut stream: &TcpStream,
    pause: Duration,
    requests: &AtomicUsize,
    sample: &Mutex<Option<Sample>>,
) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer: Vec<u8> = Vec::with_capacity(HEAD_MAX);
    loop {
        let end = loop {
            if let Some(at) = buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break at + 4;
            }
            if buffer.len() > HEAD_MAX || read(stream, &mut buffer)? == 0 {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]);
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.parse().ok())?
        });
        let length: usize = length.unwrap_or(0);
        if requests.fetch_add(1, SeqCst) == 0 {
            let head = head.into_owned();
            while buffer.len() < end + length && read(stream, &mut buffer)? > 0 {}
            let body = String::from_utf8_lossy(&buffer[end..]).into_owned();
            if let Ok(mut sample) = sample.lock() {
                *sample = Some(Sample { head, body });
            }
        }
        while buffer.len() < end + length {
            if read(stream, &mut buffer)? == 0 {
                return Ok(());
            }
        }
        buffer.drain(..end + length);
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?;
    }
}

fn read(mut stream: &TcpStream, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut part = [0; 4_096];
    let count = stream.read(&mut part)?;
    buffer.extend_from_slice(&part[..count]);
    Ok(count)
}
