//! The line to a receiver, under `ureq`: name, TCP and TLS, each within the
//! time there is, each told apart when it fails, and all of it given up as soon
//! as the result would not count any more.
//!
//! `ureq` would look a name up for every request, on a thread of its own, and
//! could not be interrupted. Here a name is looked up for a connection only,
//! and a wait is cut into short ones.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use socket2::{Domain, Protocol, Socket, Type};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};
use url::Host;

use crate::stop::Stop;
use crate::trust::{self, Renewed, has_hung_up};

/// How soon a wait notices that it is cancelled or late.
const TICK: Duration = Duration::from_millis(50);

/// What is sent together: head and body of a small request are one packet.
const TOGETHER_MAX: usize = 16 << 10;

/// Longest wait for what a receiver says to a connection without a request.
const FAREWELL: Duration = Duration::from_secs(1);

/// Room for the head of an answer, and for each piece of a request, in bytes.
const BUFFER: usize = 64 << 10;

/// Why there is no line.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoLine {
    /// The name has no address.
    #[error("failed to find the address of {0}")]
    Resolve(String),
    /// Nobody is there, or no way to them.
    #[error("failed to connect to {0}")]
    Connect(String),
    /// There is, but not whom we trust.
    #[error("failed to set up TLS with {0}")]
    Tls(String),
    /// The result would not count any more.
    #[error("given up")]
    Cancelled,
}

impl From<NoLine> for ureq::Error {
    fn from(error: NoLine) -> Self {
        Self::Other(Box::new(error))
    }
}

/// The wish to give the request in work up.
#[derive(Clone, Default)]
pub(super) struct Wish(Arc<Mutex<Option<Stop>>>);

impl Wish {
    /// From now on it is this one.
    pub(super) fn become_that_of(&self, stop: Option<&Stop>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = stop.cloned();
    }

    fn is_set(&self) -> bool {
        let stop = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stop.as_ref().is_some_and(Stop::is_set)
    }
}

impl std::fmt::Debug for Wish {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Wish")
    }
}

/// Makes lines to one receiver.
#[derive(Debug)]
pub(super) struct Dialler {
    /// Name or address.
    pub(super) host: Host<String>,
    /// Its port.
    pub(super) port: u16,
    /// For `https`: how, and whose certificate it must be.
    pub(super) tls: Option<(Renewed, ServerName<'static>)>,
    /// Longest wait for name, TCP and TLS together.
    pub(super) within: Duration,
    /// Ends every wait.
    pub(super) wish: Wish,
    /// A look-up that took too long and still goes on: there is one at most.
    pub(super) lookup: Mutex<Option<Receiver<io::Result<Vec<SocketAddr>>>>>,
}

/// Whoever dials looks the name up.
#[derive(Debug)]
pub(super) struct Unresolved;

impl Resolver for Unresolved {
    fn resolve(
        &self,
        _: &ureq::http::Uri,
        _: &ureq::config::Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        Ok(self.empty())
    }
}

impl Connector<()> for Dialler {
    type Out = Line;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _: Option<()>,
    ) -> Result<Option<Line>, ureq::Error> {
        let deadline = Instant::now() + self.within.min(*details.timeout.after);
        Ok(Some(self.dial(deadline)?))
    }
}

impl Dialler {
    /// Connects, and shakes hands where that is needed.
    pub(super) fn dial(&self, deadline: Instant) -> Result<Line, NoLine> {
        let candidates = self.resolve(deadline)?;
        let mut socket = Patient {
            tcp: self.reach(&candidates, deadline)?,
            until: Some(deadline),
            wish: self.wish.clone(),
        };
        let stream = match &self.tls {
            None => Stream::Plain(socket),
            Some((trust, name)) => {
                let config = trust
                    .client()
                    .map_err(|error| NoLine::Tls(format!("{self}: {error}")))?;
                let mut tls = ClientConnection::new(config, name.clone())
                    .map_err(|error| NoLine::Tls(format!("{self}: {error}")))?;
                while tls.is_handshaking() {
                    let Err(error) = tls.complete_io(&mut socket) else {
                        continue;
                    };
                    if has_hung_up(&error)
                        && let Some(why) = trust::last_word(&mut tls, &mut socket)
                    {
                        return Err(self.tls_refused(&why));
                    }
                    return Err(self.tls_failed(&error));
                }
                Stream::Tls(Box::new(StreamOwned::new(tls, socket)))
            }
        };
        Ok(Line {
            buffers: LazyBuffers::new(BUFFER, BUFFER),
            unsent: Vec::new(),
            deaf: None,
            stream,
        })
    }

    /// Connects, says goodbye before any request, and hears what the receiver
    /// says to that. In TLS 1.3 a client's certificate, or that it has none, is
    /// refused after the handshake only.
    pub(super) fn try_out(&self, deadline: Instant) -> Result<(), NoLine> {
        let mut line = self.dial(deadline)?;
        let Stream::Tls(tls) = &mut line.stream else {
            return Ok(());
        };
        tls.sock.until = Some(deadline.min(Instant::now() + FAREWELL));
        tls.conn.send_close_notify();
        // One that listens no more may have said why.
        tls.flush().ok();
        loop {
            match line.stream.hear(&mut [0; 1024]) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if rustls_error(&error).is_some() => {
                    return Err(self.tls_failed(&error));
                }
                // Closed without a word, or nothing said in time.
                Err(_) => return Ok(()),
            }
        }
    }

    fn tls_failed(&self, error: &io::Error) -> NoLine {
        if is_cancelled(error) {
            return NoLine::Cancelled;
        }
        if error.kind() == io::ErrorKind::TimedOut {
            return NoLine::Tls(format!("{self}: timed out; does this port speak TLS?"));
        }
        match rustls_error(error) {
            Some(error) => self.tls_refused(error),
            None => NoLine::Tls(format!("{self}: {error}")),
        }
    }

    fn tls_refused(&self, error: &rustls::Error) -> NoLine {
        NoLine::Tls(format!("{self}: {}", trust::explained(error)))
    }

    /// libc's resolver knows no deadline, so it runs on a thread of its own.
    /// When it takes too long, the next call waits on for the same one.
    fn resolve(&self, deadline: Instant) -> Result<Vec<SocketAddr>, NoLine> {
        let name = match &self.host {
            Host::Ipv4(ip) => return Ok(vec![(*ip, self.port).into()]),
            Host::Ipv6(ip) => return Ok(vec![(*ip, self.port).into()]),
            Host::Domain(name) => name,
        };
        let failed = |why: &dyn std::fmt::Display| NoLine::Resolve(format!("{name}: {why}"));
        let mut lookup = self.lookup.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = match lookup.take() {
            Some(answer) => answer,
            None => look_up(name, self.port).map_err(|error| failed(&error))?,
        };
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match answer.recv_timeout(left.min(TICK)) {
                Ok(Ok(found)) if found.is_empty() => return Err(failed(&"it has none")),
                Ok(Ok(found)) => return Ok(found),
                Ok(Err(error)) => return Err(failed(&error)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(failed(&"the resolver's thread failed"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let cancelled = self.wish.is_set();
            if cancelled || Instant::now() >= deadline {
                *lookup = Some(answer);
                return Err(if cancelled {
                    NoLine::Cancelled
                } else {
                    failed(&"timed out; is the DNS server reachable?")
                });
            }
        }
    }

    /// Tries each candidate in turn; one that does not answer leaves time for
    /// the others.
    fn reach(&self, candidates: &[SocketAddr], deadline: Instant) -> Result<TcpStream, NoLine> {
        let mut problems: Vec<String> = Vec::new();
        for (index, candidate) in candidates.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let share = left / u32::try_from(candidates.len() - index).unwrap_or(u32::MAX);
            match self.reach_one(*candidate, Instant::now() + share) {
                Ok(stream) => return Ok(stream),
                Err(error) if is_cancelled(&error) => return Err(NoLine::Cancelled),
                Err(error) => problems.push(format!("{candidate}: {error}")),
            }
        }
        Err(NoLine::Connect(format!("{self}: {}", problems.join("; "))))
    }

    fn reach_one(&self, candidate: SocketAddr, deadline: Instant) -> io::Result<TcpStream> {
        let socket = Socket::new(
            Domain::for_address(candidate),
            Type::STREAM,
            Some(Protocol::TCP),
        )?;
        socket.set_nonblocking(true)?;
        match socket.connect(&candidate.into()) {
            Err(error) if error.raw_os_error() == Some(Errno::EINPROGRESS as i32) => {
                self.wait_for(&socket, deadline)?;
            }
            result => result?,
        }
        socket.set_nonblocking(false)?;
        socket.set_tcp_nodelay(true)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))?;
        Ok(stream)
    }

    fn wait_for(&self, socket: &Socket, deadline: Instant) -> io::Result<()> {
        loop {
            check(&self.wish, Some(deadline))?;
            let left = deadline.saturating_duration_since(Instant::now());
            let tick = u16::try_from(left.min(TICK).as_millis()).unwrap_or(u16::MAX);
            let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut polled, PollTimeout::from(tick.max(1))) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return socket.take_error()?.map_or(Ok(()), Err),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl std::fmt::Display for Dialler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

fn look_up(name: &str, port: u16) -> io::Result<Receiver<io::Result<Vec<SocketAddr>>>> {
    let (done, answer) = bounded(1);
    let name = name.to_owned();
    std::thread::Builder::new()
        .name("ackonce-resolve".to_owned())
        .spawn(move || {
            let found = (name.as_str(), port).to_socket_addrs();
            // Nobody may listen any more.
            done.send(found.map(Iterator::collect)).ok();
        })?;
    Ok(answer)
}

fn check(wish: &Wish, until: Option<Instant>) -> io::Result<()> {
    if wish.is_set() {
        return Err(io::Error::other(NoLine::Cancelled));
    }
    if until.is_some_and(|until| Instant::now() >= until) {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "timed out"));
    }
    Ok(())
}

/// Whether this is the end that a [`Wish`] made.
pub(super) fn is_cancelled(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    matches!(inner, Some(NoLine::Cancelled))
}

/// What TLS said, where it was TLS.
pub(super) fn rustls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// A socket whose reads and writes wait until a deadline, or until they are
/// cancelled.
#[derive(Debug)]
struct Patient {
    tcp: TcpStream,
    until: Option<Instant>,
    wish: Wish,
}

impl Patient {
    fn patiently<T>(&self, mut act: impl FnMut(&TcpStream) -> io::Result<T>) -> io::Result<T> {
        loop {
            check(&self.wish, self.until)?;
            match act(&self.tcp) {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                done => return done,
            }
        }
    }
}

impl Read for Patient {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.patiently(|mut tcp| tcp.read(buf))
    }
}

impl Write for Patient {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.patiently(|mut tcp| tcp.write(buf))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
enum Stream {
    Plain(Patient),
    Tls(Box<StreamOwned<ClientConnection, Patient>>),
}

impl Stream {
    fn socket(&mut self) -> &mut Patient {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(tls) => &mut tls.sock,
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(buf),
            Self::Tls(tls) => tls.read(buf),
        }
    }

    /// As `read`, and sends nothing: TLS would first send what it still has,
    /// and to one that takes no more it never comes to reading then.
    fn hear(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let tls = match self {
            Self::Plain(socket) => return socket.read(buf),
            Self::Tls(tls) => &mut **tls,
        };
        loop {
            match tls.conn.reader().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            tls.conn.read_tls(&mut tls.sock)?;
            tls.conn
                .process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.write_all(bytes),
            Self::Tls(tls) => tls.write_all(bytes).and_then(|()| tls.flush()),
        }
    }
}

/// A connection, ready for requests.
#[derive(Debug)]
pub(super) struct Line {
    buffers: LazyBuffers,
    /// Taken, and not sent yet.
    unsent: Vec<u8>,
    /// Why the receiver takes no more. It may have answered before.
    deaf: Option<io::Error>,
    stream: Stream,
}

impl Line {
    fn send(stream: &mut Stream, deaf: &mut Option<io::Error>, bytes: &[u8]) -> io::Result<()> {
        if deaf.is_some() || bytes.is_empty() {
            return Ok(());
        }
        match stream.send(bytes) {
            Err(error) if has_hung_up(&error) => {
                *deaf = Some(error);
                Ok(())
            }
            done => done,
        }
    }

    fn send_unsent(&mut self) -> io::Result<()> {
        let sent = Self::send(&mut self.stream, &mut self.deaf, &self.unsent);
        self.unsent.clear();
        sent
    }

    fn wait_until(&mut self, timeout: NextTimeout) {
        self.stream.socket().until = Instant::now().checked_add(*timeout.after);
    }
}

impl Transport for Line {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.wait_until(timeout);
        if self.unsent.len() + amount > TOGETHER_MAX {
            self.send_unsent()?;
        }
        let output = &self.buffers.output()[..amount];
        if amount > TOGETHER_MAX {
            Self::send(&mut self.stream, &mut self.deaf, output)?;
        } else {
            self.unsent.extend_from_slice(output);
        }
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.wait_until(timeout);
        self.send_unsent()?;
        let room = self.buffers.input_append_buf();
        let read = match self.deaf {
            None => self.stream.read(room),
            Some(_) => self.stream.hear(room),
        };
        match (read, self.deaf.take()) {
            // It said why it takes no more.
            (Err(error), Some(_)) if rustls_error(&error).is_some() => Err(error.into()),
            (Ok(0) | Err(_), Some(error)) => Err(error.into()),
            (Err(error), None) => Err(error.into()),
            (Ok(count), deaf) => {
                self.deaf = deaf;
                self.buffers.input_appended(count);
                Ok(count > 0)
            }
        }
    }

    /// Whatever comes between two answers, be it the end or data, makes the
    /// line useless.
    fn is_open(&mut self) -> bool {
        if self.deaf.is_some() {
            return false;
        }
        let tcp = &self.stream.socket().tcp;
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(tcp.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
    }

    fn is_tls(&self) -> bool {
        matches!(self.stream, Stream::Tls(_))
    }
}
