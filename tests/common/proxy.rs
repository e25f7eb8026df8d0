//! A TCP proxy on loopback that can refuse, cut, lose a reply to COMMIT, delay,
//! swallow, talk nonsense, and lead elsewhere.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use url::Url;

use super::eventually;

/// Where the connection is cut when the client commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The server never sees the COMMIT: nothing is committed.
    BeforeCommit,
    /// The server has committed and answered, the client never hears of it.
    BeforeReply,
}

#[derive(Debug, Default)]
struct State {
    cut: Mutex<Option<Cut>>,
    /// COMMITs let through before the next one that is cut.
    spare: AtomicUsize,
    /// Cuts still to be made.
    left: AtomicUsize,
    made: AtomicUsize,
    refused: AtomicUsize,
    down: AtomicBool,
    closing: AtomicBool,
    open: Mutex<Vec<TcpStream>>,
    target: Mutex<(String, u16)>,
    /// Milliseconds by which each packet is late.
    delay: AtomicU64,
    garbage: AtomicBool,
    /// Connections up to this one, counted from 1, forward nothing any more.
    stranded: AtomicUsize,
    accepted: AtomicUsize,
}

/// What is answered instead of the server's reply.
const GARBAGE: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";

/// A proxy before one server.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    url: String,
    state: Arc<State>,
}

impl Proxy {
    /// Before the server that `url` names; `default_port` is for a URL that
    /// names none.
    pub fn before(url: &str, default_port: u16) -> Self {
        let mut url = Url::parse(url).expect("a URL");
        let target = target_of(&url, default_port);
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        url.set_host(Some("127.0.0.1")).expect("a host");
        url.set_port(Some(address.port())).expect("a port");
        let state = Arc::new(State::default());
        *state.target.lock().expect("the target") = target;
        let shared = Arc::clone(&state);
        std::thread::spawn(move || accept(&listener, &shared));
        Self {
            address,
            url: url.into(),
            state,
        }
    }

    /// The server's URL, through the proxy.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Cuts the connection at `count` COMMITs, letting `spare` others through
    /// before each.
    pub fn cut_commits(&self, cut: Cut, count: usize, spare: usize) {
        *self.state.cut.lock().expect("the cut") = Some(cut);
        self.state.spare.store(spare, SeqCst);
        self.state.made.store(0, SeqCst);
        self.state.left.store(count, SeqCst);
    }

    /// Cuts made since [`Self::cut_commits`].
    pub fn cuts(&self) -> usize {
        self.state.made.load(SeqCst)
    }

    /// Waits until all the cuts are made.
    pub fn wait_for_cuts(&self, count: usize) {
        eventually(&format!("{count} commits are cut"), || self.cuts() >= count);
    }

    /// Cuts every connection and refuses new ones.
    pub fn go_down(&self) {
        self.state.down.store(true, SeqCst);
        self.state.cut_all();
    }

    /// Waits until it has refused `count` connections.
    pub fn wait_for_refusals(&self, count: usize) {
        eventually(&format!("{count} connections are refused"), || {
            self.state.refused.load(SeqCst) >= count
        });
    }

    /// Takes connections again.
    pub fn come_up(&self) {
        self.state.down.store(false, SeqCst);
    }

    /// Leads new connections to the server that `url` names.
    pub fn lead_to(&self, url: &str, default_port: u16) {
        let url = Url::parse(url).expect("a URL");
        *self.state.target.lock().expect("the target") = target_of(&url, default_port);
    }

    /// Delivers each packet, both ways, so much later than it came.
    pub fn delay(&self, by: Duration) {
        let by = u64::try_from(by.as_millis()).expect("a short delay");
        self.state.delay.store(by, SeqCst);
    }

    /// Whether to answer in HTTP instead of forwarding the server's replies.
    pub fn talk_garbage(&self, garbage: bool) {
        self.state.garbage.store(garbage, SeqCst);
    }

    /// Has the other side vanish for every connection there is: nothing is
    /// forwarded any more, not even an end, and none of them is closed. New
    /// ones are as ever.
    pub fn strand(&self) {
        let accepted = self.state.accepted.load(SeqCst);
        self.state.stranded.store(accepted, SeqCst);
    }
}

fn target_of(url: &Url, default_port: u16) -> (String, u16) {
    let host = url.host_str().expect("a host").to_owned();
    (host, url.port().unwrap_or(default_port))
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.state.closing.store(true, SeqCst);
        self.state.cut_all();
        // Wakes the thread that accepts.
        drop(TcpStream::connect_timeout(
            &self.address,
            Duration::from_secs(1),
        ));
    }
}

impl State {
    fn cut_all(&self) {
        for stream in self.open.lock().expect("the connections").drain(..) {
            close(&stream);
        }
    }

    /// Waits as long as a packet of connection `number` is late. Never ends
    /// before the proxy does for one that is stranded.
    fn hold(&self, number: usize) {
        let delay = self.delay.load(SeqCst);
        if delay > 0 {
            std::thread::sleep(Duration::from_millis(delay));
        }
        while number <= self.stranded.load(SeqCst) && !self.closing.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether this COMMIT is to be cut.
    fn claims_commit(&self, spared: &AtomicUsize) -> Option<Cut> {
        if self.left.load(SeqCst) == 0 {
            return None;
        }
        if spared.fetch_add(1, SeqCst) < self.spare.load(SeqCst) {
            return None;
        }
        let take = |left: usize| left.checked_sub(1);
        self.left.fetch_update(SeqCst, SeqCst, take).ok()?;
        spared.store(0, SeqCst);
        *self.cut.lock().expect("the cut")
    }
}

fn accept(listener: &TcpListener, state: &Arc<State>) {
    let spared = Arc::new(AtomicUsize::new(0));
    for client in listener.incoming().map_while(Result::ok) {
        if state.closing.load(SeqCst) {
            return;
        }
        if state.down.load(SeqCst) {
            state.refused.fetch_add(1, SeqCst);
            close(&client);
            continue;
        }
        let target = state.target.lock().expect("the target").clone();
        let Ok(server) = TcpStream::connect((target.0.as_str(), target.1)) else {
            close(&client);
            continue;
        };
        forward_both_ways(client, server, state, &spared);
    }
}

fn forward_both_ways(
    client: TcpStream,
    server: TcpStream,
    state: &Arc<State>,
    spared: &Arc<AtomicUsize>,
) {
    for stream in [&client, &server] {
        stream.set_nodelay(true).expect("no delay");
        let handle = stream.try_clone().expect("a handle");
        state.open.lock().expect("the connections").push(handle);
    }
    let (reader, writer) = (server.try_clone(), client.try_clone());
    let (reader, writer) = (reader.expect("a handle"), writer.expect("a handle"));
    // Set before a COMMIT is forwarded: from then on replies are swallowed.
    let swallow = Arc::new(AtomicBool::new(false));
    let number = state.accepted.fetch_add(1, SeqCst) + 1;
    let (state, spared) = (Arc::clone(state), Arc::clone(spared));
    let swallowing = Arc::clone(&swallow);
    let shared = Arc::clone(&state);
    std::thread::spawn(move || {
        replies(reader, writer, &swallowing, &shared, number);
    });
    std::thread::spawn(move || {
        requests(client, server, &swallow, &state, &spared, number);
    });
}

fn requests(
    mut client: TcpStream,
    mut server: TcpStream,
    swallow: &AtomicBool,
    state: &State,
    spared: &AtomicUsize,
    number: usize,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = client.read(&mut buffer) {
        state.hold(number);
        let bytes = &buffer[..count];
        let cut = has_commit(b'Q', bytes).then(|| state.claims_commit(spared));
        match cut.flatten() {
            Some(Cut::BeforeCommit) => {
                state.made.fetch_add(1, SeqCst);
                break;
            }
            Some(Cut::BeforeReply) => swallow.store(true, SeqCst),
            None => {}
        }
        if server.write_all(bytes).is_err() {
            break;
        }
    }
    state.hold(number);
    close(&client);
    close(&server);
}

fn replies(
    mut server: TcpStream,
    mut client: TcpStream,
    swallow: &AtomicBool,
    state: &State,
    number: usize,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = server.read(&mut buffer) {
        state.hold(number);
        if state.garbage.load(SeqCst) {
            drop(client.write_all(GARBAGE));
            break;
        }
        if swallow.load(SeqCst) {
            if has_commit(b'C', &buffer[..count]) {
                state.made.fetch_add(1, SeqCst);
            }
            break;
        }
        if client.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    state.hold(number);
    close(&client);
    close(&server);
}

/// Whether `bytes` hold a message of `kind` whose text begins with COMMIT: `Q`,
/// the query, or `C`, that it is complete. One packet on loopback holds it whole.
fn has_commit(kind: u8, bytes: &[u8]) -> bool {
    bytes.windows(11).any(|window| {
        window[0] == kind && window[1..3] == [0, 0] && window[5..].eq_ignore_ascii_case(b"COMMIT")
    })
}

fn close(stream: &TcpStream) {
    // Fails when the other side was first.
    drop(stream.shutdown(Shutdown::Both));
}
