//! An HTTP receiver that answers as its test says, and remembers every request
//! to the byte.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::eventually;

/// What became of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Which connection it came over, from 1.
    pub connection: usize,
    /// `POST /path HTTP/1.1`, without its line break.
    pub line: Vec<u8>,
    /// Every other line of the head, at its first colon: the name as sent, and
    /// the value behind a space. A line without one has an empty name.
    pub headers: Vec<(Vec<u8>, Vec<u8>)>,
    /// The body.
    pub body: Vec<u8>,
}

impl Request {
    /// The value of the only header `name`, if there is one.
    pub fn header(&self, name: &str) -> Option<String> {
        let mut found = self
            .headers
            .iter()
            .filter(|(other, _)| other.eq_ignore_ascii_case(name.as_bytes()));
        let (_, value) = found.next()?;
        assert!(found.next().is_none(), "{name} came twice");
        Some(String::from_utf8_lossy(value).into_owned())
    }

    /// The idempotency key.
    pub fn key(&self) -> String {
        self.header("idempotency-key").expect("a key")
    }
}

/// What a receiver does with a request.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Answers with this status, these lines of head and this body.
    Status(u16, &'static str, String),
    /// Closes the connection when it has read the request, and says nothing.
    Drop,
    /// Closes the connection in the middle of a 200 with a body.
    Half,
    /// Answers with 200, then closes the connection without having said so.
    CloseAfter,
    /// Sends these bytes and closes.
    Raw(&'static [u8]),
    /// Says nothing until the other side gives up.
    Silence,
}

impl Answer {
    /// A status and nothing else.
    pub fn status(status: u16) -> Self {
        Self::Status(status, "", String::new())
    }
}

type Script = Box<dyn FnMut(&Request) -> Answer + Send>;

#[derive(Default)]
struct State {
    requests: Mutex<Vec<Request>>,
    applied: Mutex<BTreeMap<String, usize>>,
    connections: AtomicUsize,
    open: AtomicUsize,
    sockets: Mutex<Vec<TcpStream>>,
    deaf: AtomicBool,
    closing: AtomicBool,
}

/// A receiver on loopback. Dropping it closes its port.
pub struct Receiver {
    address: SocketAddr,
    state: Arc<State>,
    tls: Option<Arc<ServerConfig>>,
    script: Arc<Mutex<Script>>,
    acceptor: Option<JoinHandle<()>>,
}

impl Receiver {
    /// Answers each request as `script` says.
    pub fn new(script: impl FnMut(&Request) -> Answer + Send + 'static) -> Self {
        Self::start(None, Box::new(script))
    }

    /// As [`Self::new`], over TLS; with a configuration of
    /// [`Authority::issue_asking`](super::Authority::issue_asking), for those
    /// alone who show a certificate.
    pub fn with_tls(
        config: ServerConfig,
        script: impl FnMut(&Request) -> Answer + Send + 'static,
    ) -> Self {
        Self::start(Some(Arc::new(config)), Box::new(script))
    }

    /// Answers 200 to everything.
    pub fn willing() -> Self {
        Self::new(|_| Answer::status(200))
    }

    fn start(tls: Option<Arc<ServerConfig>>, script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let mut receiver = Self {
            address: listener.local_addr().expect("an address"),
            state: Arc::default(),
            tls,
            script: Arc::new(Mutex::new(script)),
            acceptor: None,
        };
        receiver.listen(listener);
        receiver
    }

    fn listen(&mut self, listener: TcpListener) {
        let (state, script) = (Arc::clone(&self.state), Arc::clone(&self.script));
        let tls = self.tls.clone();
        let acceptor = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if state.closing.load(SeqCst) {
                    return;
                }
                let socket = stream.try_clone().expect("a socket");
                state.sockets.lock().expect("sockets").push(socket);
                let (state, script, tls) = (Arc::clone(&state), Arc::clone(&script), tls.clone());
                std::thread::spawn(move || {
                    state.open.fetch_add(1, SeqCst);
                    let socket = stream.try_clone().expect("a socket");
                    // A client that goes away, or is not let in, is its own
                    // affair.
                    serve(stream, tls, &state, &script).ok();
                    socket.shutdown(Shutdown::Both).ok();
                    state.open.fetch_sub(1, SeqCst);
                });
            }
        });
        self.acceptor = Some(acceptor);
    }

    /// Closes its port and every connection.
    pub fn go_down(&mut self) {
        self.state.closing.store(true, SeqCst);
        // Wakes the acceptor, which then ends.
        drop(TcpStream::connect(self.address));
        if let Some(acceptor) = self.acceptor.take() {
            drop(acceptor.join());
        }
        for socket in self.state.sockets.lock().expect("sockets").drain(..) {
            // It may be closed already.
            socket.shutdown(Shutdown::Both).ok();
        }
    }

    /// Opens its port again.
    pub fn come_up(&mut self) {
        self.state.closing.store(false, SeqCst);
        let listener = TcpListener::bind(self.address).expect("the same port");
        self.listen(listener);
    }

    /// Its URL, with the path `/orders?x=1`.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}/orders?x=1", self.address)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on it reads heads alone, not the bodies that follow them.
    pub fn stop_reading_bodies(&self) {
        self.state.deaf.store(true, SeqCst);
    }

    /// Every request so far, in the order of their arrival.
    pub fn requests(&self) -> Vec<Request> {
        self.state.requests.lock().expect("requests").clone()
    }

    /// How many requests there were.
    pub fn count(&self) -> usize {
        self.state.requests.lock().expect("requests").len()
    }

    /// How many connections there were.
    pub fn connections(&self) -> usize {
        self.state.connections.load(SeqCst)
    }

    /// Waits until it has had `count` requests.
    pub fn wait_for(&self, count: usize) {
        eventually(&format!("{count} requests"), || self.count() >= count);
    }

    /// Waits until no connection is open.
    pub fn wait_until_idle(&self) {
        eventually("no connection is open", || {
            self.state.open.load(SeqCst) == 0
        });
    }

    /// Under each idempotency key, how many requests were answered with 2xx.
    pub fn applied(&self) -> BTreeMap<String, usize> {
        self.state.applied.lock().expect("keys").clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if self.acceptor.is_some() {
            self.go_down();
        }
    }
}

trait Line: Read + Write {}
impl<T: Read + Write> Line for T {}

fn serve(
    stream: TcpStream,
    tls: Option<Arc<ServerConfig>>,
    state: &State,
    script: &Mutex<Script>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let connection = state.connections.fetch_add(1, SeqCst) + 1;
    let line: Box<dyn Line> = match tls {
        None => Box::new(stream),
        Some(config) => {
            let server = ServerConnection::new(config).map_err(io::Error::other)?;
            Box::new(StreamOwned::new(server, stream))
        }
    };
    let mut line = BufReader::new(line);
    while let Some(request) = read_request(&mut line, connection, state.deaf.load(SeqCst))? {
        state
            .requests
            .lock()
            .expect("requests")
            .push(request.clone());
        let answer = (script.lock().expect("the script"))(&request);
        if matches!(answer, Answer::Status(200..=299, ..) | Answer::CloseAfter) {
            let mut applied = state.applied.lock().expect("keys");
            if let Some(key) = request.header("idempotency-key") {
                *applied.entry(key).or_default() += 1;
            }
        }
        if !give(&mut line, answer)? {
            break;
        }
    }
    Ok(())
}

/// Whether the connection goes on.
fn give(line: &mut BufReader<Box<dyn Line>>, answer: Answer) -> io::Result<bool> {
    let (text, goes_on) = match answer {
        Answer::Status(status, head, body) => {
            let length = body.len();
            let head = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n{head}\r\n");
            ((head + &body).into_bytes(), true)
        }
        Answer::CloseAfter => (
            b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_vec(),
            false,
        ),
        Answer::Half => {
            let half = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf";
            (half.to_vec(), false)
        }
        Answer::Raw(bytes) => (bytes.to_vec(), false),
        Answer::Drop => (Vec::new(), false),
        Answer::Silence => {
            io::copy(line, &mut io::sink())?;
            (Vec::new(), false)
        }
    };
    line.get_mut().write_all(&text)?;
    line.get_mut().flush()?;
    Ok(goes_on)
}

/// `None` at the end of the connection.
fn read_request(
    line: &mut impl BufRead,
    connection: usize,
    head_alone: bool,
) -> io::Result<Option<Request>> {
    let mut lines = Vec::new();
    loop {
        let mut text = Vec::new();
        if line.read_until(b'\n', &mut text)? == 0 {
            return Ok(None);
        }
        let text = text
            .strip_suffix(b"\r\n")
            .expect("every line ends in CR LF");
        if text.is_empty() {
            break;
        }
        lines.push(text.to_vec());
    }
    let mut lines = lines.into_iter();
    let first = lines.next().expect("a request line");
    let headers: Vec<(Vec<u8>, Vec<u8>)> = lines
        .map(|text| match text.windows(2).position(|two| two == b": ") {
            Some(at) => (text[..at].to_vec(), text[at + 2..].to_vec()),
            None => (Vec::new(), text),
        })
        .collect();
    let mut request = Request {
        connection,
        line: first,
        headers,
        body: Vec::new(),
    };
    let length = request.header("content-length").expect("a length");
    if !head_alone {
        request.body = vec![0; length.parse().expect("a number")];
        line.read_exact(&mut request.body)?;
    }
    Ok(Some(request))
}
