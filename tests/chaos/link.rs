//! One daemon's way to one server, and all that can be done to it: cut, slow,
//! lossy, or cut at a chosen message in the middle of the protocol. It counts
//! what really happened.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Waits for one message, and strikes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trap {
    /// The connection is cut before COMMIT is passed on.
    CommitUnsent,
    /// COMMIT is passed on, and the connection cut when it was answered.
    CommitUnanswered,
    /// The process is killed with its COMMIT not passed on.
    KillBeforeCommit(i32),
    /// The process is killed with its COMMIT answered and the answer kept back.
    KillAfterCommit(i32),
    /// The connection is cut before an ack is passed on.
    AckUnsent,
}

/// What has gone through, or not, so far.
#[derive(Debug, Default)]
pub struct Counters {
    /// `basic.ack` from the daemon to the broker.
    pub acks: AtomicU64,
    /// Answers to COMMIT.
    pub commits: AtomicU64,
    /// Reads from the broker that hold a `basic.deliver`.
    pub deliveries: AtomicU64,
    /// Reads from the server that hold no error of Redis, such as `-LOADING`.
    pub replies: AtomicU64,
    /// Connections that a client opened and the server took.
    pub opened: AtomicU64,
    /// Traps that struck.
    pub struck: AtomicU64,
    /// Reads that were passed on late.
    pub delayed: AtomicU64,
    /// Bytes that were not passed on.
    pub swallowed: AtomicU64,
}

#[derive(Debug)]
struct State {
    target: SocketAddr,
    trap: Mutex<Option<Trap>>,
    delay_ms: AtomicU64,
    swallows: AtomicBool,
    closing: AtomicBool,
    open: Mutex<BTreeMap<u64, [TcpStream; 2]>>,
    /// Processes that a trap has killed.
    killed: Mutex<BTreeSet<i32>>,
    counters: Counters,
}

/// A proxy. Dropping it cuts what goes through it.
#[derive(Debug)]
pub struct Link {
    address: SocketAddr,
    state: Arc<State>,
}

impl Link {
    /// To the server at `target`.
    pub fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(State {
            target,
            trap: Mutex::default(),
            delay_ms: AtomicU64::default(),
            swallows: AtomicBool::default(),
            closing: AtomicBool::default(),
            open: Mutex::default(),
            killed: Mutex::default(),
            counters: Counters::default(),
        });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || accept(&listener, &shared));
        Self { address, state }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn counters(&self) -> &Counters {
        &self.state.counters
    }

    /// Sets a trap for the next message that it is for.
    pub fn set(&self, trap: Trap) {
        *self.state.trap.lock().expect("the trap") = Some(trap);
    }

    /// Takes a trap away that has not struck.
    pub fn unset(&self) {
        *self.state.trap.lock().expect("the trap") = None;
    }

    /// Whether a trap has killed this process.
    pub fn has_killed(&self, pid: i32) -> bool {
        let killed = self.state.killed.lock().expect("the killed");
        killed.contains(&pid)
    }

    /// Cuts every connection. How many there were.
    pub fn cut(&self) -> u64 {
        let open = std::mem::take(&mut *self.state.open.lock().expect("the connections"));
        open.values().flatten().for_each(close);
        open.len() as u64
    }

    /// Passes everything on later by this much from now on.
    pub fn delay(&self, delay: Duration) {
        let delay = u64::try_from(delay.as_millis()).expect("a short delay");
        self.state.delay_ms.store(delay, SeqCst);
    }

    /// Whether to pass nothing on, and take all that comes.
    pub fn swallow(&self, swallows: bool) {
        self.state.swallows.store(swallows, SeqCst);
    }

    /// As new.
    pub fn heal(&self) {
        self.unset();
        self.delay(Duration::ZERO);
        self.swallow(false);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.state.closing.store(true, SeqCst);
        self.cut();
        // Wakes the thread that accepts.
        let within = Duration::from_secs(1);
        drop(TcpStream::connect_timeout(&self.address, within));
    }
}

impl State {
    /// Takes the trap if it is one of those that strike here.
    fn spring(&self, strikes: impl Fn(Trap) -> bool) -> Option<Trap> {
        let mut trap = self.trap.lock().expect("the trap");
        trap.take_if(|trap| strikes(*trap))
    }

    fn wait(&self) {
        let delay = self.delay_ms.load(SeqCst);
        if delay > 0 {
            self.counters.delayed.fetch_add(1, SeqCst);
            std::thread::sleep(Duration::from_millis(delay));
        }
    }

    fn swallow(&self, bytes: &[u8]) -> bool {
        let swallows = self.swallows.load(SeqCst);
        if swallows {
            let count = bytes.len() as u64;
            self.counters.swallowed.fetch_add(count, SeqCst);
        }
        swallows
    }

    fn struck(&self) {
        self.counters.struck.fetch_add(1, SeqCst);
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    for (number, client) in (0..).zip(listener.incoming().map_while(Result::ok)) {
        if state.closing.load(SeqCst) {
            return;
        }
        let within = Duration::from_secs(2);
        let Ok(server) = TcpStream::connect_timeout(&state.target, within) else {
            close(&client);
            continue;
        };
        // Fails when one side has gone already: then there is nothing to do.
        drop(pass_both_ways(number, client, server, state));
    }
}

fn pass_both_ways(
    number: u64,
    client: TcpStream,
    server: TcpStream,
    state: &Arc<State>,
) -> std::io::Result<()> {
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let ends = [client.try_clone()?, server.try_clone()?];
    let (reader, writer) = (server.try_clone()?, client.try_clone()?);
    state.counters.opened.fetch_add(1, SeqCst);
    let mut open = state.open.lock().expect("the connections");
    open.insert(number, ends);
    drop(open);
    // Set before a COMMIT is passed on whose answer is not to be.
    let trapped = Arc::new(Mutex::new(None));
    let (shared, trap) = (Arc::clone(state), Arc::clone(&trapped));
    std::thread::spawn(move || {
        replies(&reader, &writer, &trap, &shared);
        forget(number, [&reader, &writer], &shared);
    });
    let state = Arc::clone(state);
    std::thread::spawn(move || {
        requests(&client, &server, &trapped, &state);
        forget(number, [&client, &server], &state);
    });
    Ok(())
}

fn forget(number: u64, ends: [&TcpStream; 2], state: &State) {
    ends.into_iter().for_each(close);
    state.open.lock().expect("the connections").remove(&number);
}

fn requests(
    mut client: &TcpStream,
    mut server: &TcpStream,
    trapped: &Mutex<Option<Trap>>,
    state: &State,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = client.read(&mut buffer) {
        let bytes = &buffer[..count];
        state.wait();
        if state.swallow(bytes) {
            continue;
        }
        let mut upto = count;
        if is_commit(b'Q', bytes) {
            match state.spring(|trap| trap != Trap::AckUnsent) {
                Some(Trap::CommitUnsent) => return state.struck(),
                Some(Trap::KillBeforeCommit(pid)) => return strike(pid, state),
                trap => *trapped.lock().expect("the trap") = trap,
            }
        }
        let acks: Vec<usize> = methods(bytes, ACK).collect();
        if let Some(first) = acks.first()
            && state.spring(|trap| trap == Trap::AckUnsent).is_some()
        {
            upto = *first;
        }
        if server.write_all(&bytes[..upto]).is_err() {
            return;
        }
        if upto < count {
            return state.struck();
        }
        state.counters.acks.fetch_add(acks.len() as u64, SeqCst);
    }
}

fn replies(
    mut server: &TcpStream,
    mut client: &TcpStream,
    trapped: &Mutex<Option<Trap>>,
    state: &State,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = server.read(&mut buffer) {
        let bytes = &buffer[..count];
        let committed = is_commit(b'C', bytes);
        match *trapped.lock().expect("the trap") {
            Some(Trap::KillAfterCommit(pid)) if committed => return strike(pid, state),
            Some(_) if committed => return state.struck(),
            // The server refused it, or ended the session.
            Some(_) => return,
            None => {}
        }
        state.wait();
        if state.swallow(bytes) {
            continue;
        }
        if client.write_all(bytes).is_err() {
            return;
        }
        let answered = u64::from(!has_redis_error(bytes));
        state.counters.replies.fetch_add(answered, SeqCst);
        let delivered = u64::from(methods(bytes, DELIVER).next().is_some());
        state.counters.deliveries.fetch_add(delivered, SeqCst);
        state
            .counters
            .commits
            .fetch_add(u64::from(committed), SeqCst);
    }
}

/// Kills the process a moment after it sent its COMMIT: what it tells others at
/// the same time has gone out by then.
fn strike(pid: i32, state: &State) {
    std::thread::sleep(Duration::from_millis(10));
    if kill(Pid::from_raw(pid), Signal::SIGKILL).is_ok() {
        state.killed.lock().expect("the killed").insert(pid);
        state.struck();
    }
}

/// Whether `bytes` hold a message of PostgreSQL of `kind` whose text begins with
/// COMMIT: `Q`, the query, or `C`, that it is complete. One read on loopback
/// holds it whole.
fn is_commit(kind: u8, bytes: &[u8]) -> bool {
    positions(bytes, kind).any(|at| {
        let length_and_text = &bytes[at + 1..];
        length_and_text.starts_with(b"\0\0")
            && length_and_text
                .get(4..)
                .is_some_and(|text| text.starts_with(b"COMMIT"))
    })
}

/// Whether one of the replies of Redis in `bytes` is an error. No value of the
/// daemon's has a line break in it that could look like one.
fn has_redis_error(bytes: &[u8]) -> bool {
    bytes.starts_with(b"-") || bytes.windows(3).any(|three| three == b"\r\n-")
}

/// Class and method of AMQP's `basic.ack`.
const ACK: &[u8] = b"\0\x3c\0\x50";
/// Class and method of AMQP's `basic.deliver`.
const DELIVER: &[u8] = b"\0\x3c\0\x3c";

/// Where in `bytes` frames of AMQP begin that hold this method. One read on
/// loopback nearly always holds the beginning of a frame whole; a frame that is
/// torn there is not seen.
fn methods<'a>(bytes: &'a [u8], method: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    positions(bytes, 1).filter(move |at| {
        let payload = bytes.get(at + 7..).unwrap_or_default();
        payload.starts_with(method)
    })
}

fn positions(bytes: &[u8], wanted: u8) -> impl Iterator<Item = usize> {
    bytes
        .iter()
        .enumerate()
        .filter(move |(_, byte)| **byte == wanted)
        .map(|(at, _)| at)
}

fn close(stream: &TcpStream) {
    // Fails when the other side was first.
    drop(stream.shutdown(Shutdown::Both));
}
