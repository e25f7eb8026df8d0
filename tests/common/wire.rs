//! A TCP proxy before RabbitMQ that understands AMQP frames: it can swallow
//! everything from a given method on, as a half-open connection does, and
//! garble deliveries.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use url::Url;

use super::eventually;

/// Class and method id.
pub type Method = (u16, u16);

pub const START_OK: Method = (10, 11);
pub const TUNE_OK: Method = (10, 31);
pub const OPEN: Method = (10, 40);
pub const CLOSE: Method = (10, 50);
pub const CHANNEL_OPEN: Method = (20, 10);
pub const CHANNEL_CLOSE: Method = (20, 40);
pub const QUEUE_DECLARE: Method = (50, 10);
pub const QOS: Method = (60, 10);
pub const CONSUME: Method = (60, 20);
pub const CANCEL: Method = (60, 30);
pub const ACK: Method = (60, 80);
const DELIVER: Method = (60, 60);

#[derive(Debug, Default)]
struct State {
    swallow_at: Mutex<Option<Method>>,
    garble: AtomicBool,
    refuse: AtomicBool,
    closing: AtomicBool,
    swallowed: AtomicUsize,
    garbled: AtomicUsize,
    accepted: AtomicUsize,
    lines: Mutex<Vec<Arc<Line>>>,
}

/// One connection.
#[derive(Debug)]
struct Line {
    client: TcpStream,
    server: TcpStream,
    /// Nothing gets through any more, either way, and nobody is told.
    swallowing: AtomicBool,
}

/// A proxy before one broker.
#[derive(Debug)]
pub struct Wire {
    address: SocketAddr,
    url: String,
    state: Arc<State>,
}

impl Wire {
    /// Before the broker that `url` names.
    pub fn before(url: &str) -> Self {
        let mut url = Url::parse(url).expect("a URL");
        let host = url.host_str().expect("a host").to_owned();
        let target = (host, url.port().unwrap_or(5672));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        url.set_host(Some("127.0.0.1")).expect("a host");
        url.set_port(Some(address.port())).expect("a port");
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        std::thread::spawn(move || accept(&listener, &target, &shared));
        Self {
            address,
            url: url.into(),
            state,
        }
    }

    /// The broker's URL, by way of this.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A connection over which the client says `method` is dead from there on.
    pub fn swallow_at(&self, method: Method) {
        *self.state.swallow_at.lock().expect("the rule") = Some(method);
    }

    /// Every connection there is is dead from here on; new ones are not.
    pub fn swallow_now(&self) {
        for line in self.state.lines.lock().expect("the lines").iter() {
            line.swallowing.store(true, SeqCst);
        }
    }

    /// Makes every delivery a frame that no client knows, or leaves them alone
    /// again.
    pub fn garble_deliveries(&self, garble: bool) {
        self.state.garble.store(garble, SeqCst);
    }

    /// Cuts every connection.
    pub fn cut(&self) {
        for line in self.state.lines.lock().expect("the lines").drain(..) {
            line.close();
        }
    }

    /// Cuts every connection and takes no new one, or takes them again.
    pub fn refuse(&self, refuse: bool) {
        self.state.refuse.store(refuse, SeqCst);
        if refuse {
            self.cut();
        }
    }

    /// Swallows, garbles and refuses nothing from here on; what is dead stays
    /// dead.
    pub fn behave(&self) {
        *self.state.swallow_at.lock().expect("the rule") = None;
        self.garble_deliveries(false);
        self.refuse(false);
    }

    /// Connections that died at their method.
    pub fn swallowed(&self) -> usize {
        self.state.swallowed.load(SeqCst)
    }

    /// Waits until `count` connections died at their method.
    pub fn wait_for_swallowed(&self, count: usize) {
        eventually(&format!("{count} connections are swallowed"), || {
            self.swallowed() >= count
        });
    }

    /// Deliveries that were garbled.
    pub fn garbled(&self) -> usize {
        self.state.garbled.load(SeqCst)
    }

    /// Connections that were taken.
    pub fn accepted(&self) -> usize {
        self.state.accepted.load(SeqCst)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.state.closing.store(true, SeqCst);
        self.cut();
        // Wakes the thread that accepts.
        drop(TcpStream::connect_timeout(
            &self.address,
            Duration::from_secs(1),
        ));
    }
}

impl Line {
    fn close(&self) {
        // Fails when the other side was first.
        drop(self.client.shutdown(Shutdown::Both));
        drop(self.server.shutdown(Shutdown::Both));
    }
}

fn accept(listener: &TcpListener, target: &(String, u16), state: &Arc<State>) {
    for client in listener.incoming().map_while(Result::ok) {
        if state.closing.load(SeqCst) {
            return;
        }
        let server = TcpStream::connect((target.0.as_str(), target.1));
        let (false, Ok(server)) = (state.refuse.load(SeqCst), server) else {
            drop(client.shutdown(Shutdown::Both));
            continue;
        };
        state.accepted.fetch_add(1, SeqCst);
        for stream in [&client, &server] {
            stream.set_nodelay(true).expect("no delay");
        }
        let line = Arc::new(Line {
            client,
            server,
            swallowing: AtomicBool::new(false),
        });
        let lines = &state.lines;
        lines.lock().expect("the lines").push(Arc::clone(&line));
        let (theirs, shared) = (Arc::clone(&line), Arc::clone(state));
        std::thread::spawn(move || requests(&theirs, &shared));
        let shared = Arc::clone(state);
        std::thread::spawn(move || replies(&line, &shared));
    }
}

fn requests(line: &Line, state: &State) {
    let mut header = [0; 8];
    let (mut from, mut to) = (&line.client, &line.server);
    if from.read_exact(&mut header).is_ok() && to.write_all(&header).is_ok() {
        forward(from, to, line, |frame| {
            let rule = *state.swallow_at.lock().expect("the rule");
            if rule.is_some() && rule == method_of(frame) {
                line.swallowing.store(true, SeqCst);
                state.swallowed.fetch_add(1, SeqCst);
            }
        });
    }
    line.close();
}

fn replies(line: &Line, state: &State) {
    forward(&line.server, &line.client, line, |frame| {
        if state.garble.load(SeqCst) && method_of(frame) == Some(DELIVER) {
            frame[10] += 1;
            state.garbled.fetch_add(1, SeqCst);
        }
    });
    line.close();
}

/// Passes frame after frame, each through `look`, and what is swallowed not at
/// all. Ends with the stream.
fn forward(
    mut from: &TcpStream,
    mut to: &TcpStream,
    line: &Line,
    mut look: impl FnMut(&mut Vec<u8>),
) {
    let mut head = [0; 7];
    while from.read_exact(&mut head).is_ok() {
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut frame = head.to_vec();
        frame.resize(head.len() + size + 1, 0);
        if from.read_exact(&mut frame[head.len()..]).is_err() {
            return;
        }
        look(&mut frame);
        if !line.swallowing.load(SeqCst) && to.write_all(&frame).is_err() {
            return;
        }
    }
}

fn method_of(frame: &[u8]) -> Option<Method> {
    let of = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    match frame.first() {
        Some(1) => Some((of(7)?, of(9)?)),
        _ => None,
    }
}
