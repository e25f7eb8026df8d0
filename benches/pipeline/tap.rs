//! A tap in the line between a subject and the broker: it passes every byte
//! on and notes when each message was acked. The subject knows nothing of it,
//! and every subject has the same.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use url::Url;

use crate::wire::{Frames, Told};

/// What was seen on the line, in the order of one direction.
#[derive(Debug)]
struct Seen {
    connection: u64,
    at: Instant,
    told: Told,
}

#[derive(Default)]
struct Line {
    seen: Mutex<Vec<Seen>>,
    connections: AtomicU64,
    closing: AtomicBool,
}

/// A listening tap. Dropping it ends the listening, not what is connected.
pub struct Tap {
    address: SocketAddr,
    url: String,
    line: Arc<Line>,
}

impl Tap {
    /// Before the broker that `amqp` names.
    pub fn before(amqp: &str) -> Result<Self> {
        let mut url = Url::parse(amqp).context("failed to read the broker's URL")?;
        let host = url.host_str().context("the broker's URL has no host")?;
        let target = (host.to_owned(), url.port().unwrap_or(5672));
        let listener = TcpListener::bind("127.0.0.1:0").context("failed to listen")?;
        let address = listener.local_addr()?;
        url.set_ip_host(address.ip())
            .and_then(|()| url.set_port(Some(address.port())))
            .map_err(|()| anyhow::anyhow!("the broker's URL takes no address"))?;
        let line = Arc::new(Line::default());
        let shared = Arc::clone(&line);
        std::thread::spawn(move || accept(&listener, &target, &shared));
        Ok(Self {
            address,
            url: url.into(),
            line,
        })
    }

    /// The broker's URL, through the tap.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// When each message was acked, by its id.
    pub fn acks(&self) -> Result<HashMap<String, Instant>> {
        let mut seen = self
            .line
            .seen
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut out: HashMap<(u64, u16), BTreeMap<u64, String>> = HashMap::new();
        let mut acked = HashMap::new();
        // The two directions write independently: what came out is known
        // before what became of it is asked.
        let (delivered, settled): (Vec<Seen>, Vec<Seen>) = seen
            .drain(..)
            .partition(|s| matches!(s.told, Told::Delivered { .. }));
        for seen in delivered {
            if let Told::Delivered { channel, tag, id } = seen.told {
                let tags = out.entry((seen.connection, channel)).or_default();
                tags.insert(tag, id);
            }
        }
        for seen in settled {
            let (channel, tag, multiple) = match seen.told {
                Told::Acked {
                    channel,
                    tag,
                    multiple,
                } => (channel, tag, multiple),
                Told::Refused { tag, .. } => bail!("delivery {tag} was refused, not acked"),
                Told::Delivered { .. } => continue,
            };
            let tags = out.entry((seen.connection, channel)).or_default();
            let first = if multiple { 0 } else { tag };
            for (_, id) in tags.extract_if(first..=tag, |_, _| true) {
                let before = acked.insert(id, seen.at);
                ensure!(before.is_none(), "a message was acked twice");
            }
        }
        Ok(acked)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.line.closing.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        drop(TcpStream::connect_timeout(
            &self.address,
            Duration::from_secs(1),
        ));
    }
}

fn accept(listener: &TcpListener, target: &(String, u16), line: &Arc<Line>) {
    for client in listener.incoming().map_while(Result::ok) {
        if line.closing.load(Ordering::Relaxed) {
            return;
        }
        // A subject whose connection is not passed on says so itself.
        if let Err(error) = pass_on(&client, target, line) {
            eprintln!("failed to tap a connection: {error}");
            drop(client.shutdown(Shutdown::Both));
        }
    }
}

fn pass_on(client: &TcpStream, target: &(String, u16), line: &Arc<Line>) -> std::io::Result<()> {
    let server = TcpStream::connect((target.0.as_str(), target.1))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let connection = line.connections.fetch_add(1, Ordering::Relaxed);
    for (from, to, frames) in [
        (client, &server, Frames::from_client()),
        (&server, client, Frames::from_server()),
    ] {
        let (from, to) = (from.try_clone()?, to.try_clone()?);
        let line = Arc::clone(line);
        std::thread::spawn(move || copy(from, to, frames, connection, &line));
    }
    Ok(())
}

fn copy(mut from: TcpStream, mut to: TcpStream, mut frames: Frames, connection: u64, line: &Line) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let at = Instant::now();
        let bytes = &buffer[..count];
        // First passed on, then looked at: looking delays nobody.
        if to.write_all(bytes).is_err() {
            break;
        }
        let told = frames.read(bytes);
        if !told.is_empty() {
            let mut seen = line.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.extend(told.into_iter().map(|told| Seen {
                connection,
                at,
                told,
            }));
        }
    }
    // Both fail when the other side was first.
    drop(from.shutdown(Shutdown::Both));
    drop(to.shutdown(Shutdown::Both));
}
