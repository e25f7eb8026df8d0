//! The byte stream under the guard: a TCP connection, with or without TLS.
//! Knows deadlines and sockets, nothing of AMQP.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use amiquip::IoStream;
use crossbeam_channel::RecvTimeoutError;
use mio::{Evented, Poll, PollOpt, Ready, Token};
use socket2::{SockRef, TcpKeepalive};

use super::address::{Address, Scheme};
use super::error::{ConnectError, Stage};
use super::tls::{self, TlsStream};
use crate::config::checked::Broker;

/// An address of several gets at least this much of the time that is left.
const ATTEMPT_MIN: Duration = Duration::from_secs(2);

/// A connected, non-blocking stream for amiquip.
pub enum Transport {
    /// Plain TCP.
    Plain(mio::net::TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<mio::net::TcpStream>>),
}

impl Transport {
    /// Connects to `address` until `deadline`: name, TCP and TLS.
    ///
    /// The second stream is a clone of the socket, for shutting it down.
    pub(super) fn connect(
        broker: &Broker,
        address: &Address,
        deadline: Instant,
    ) -> Result<(Self, TcpStream), ConnectError> {
        let candidates = resolve(broker, address, deadline)?;
        let socket = dial(broker, address, &candidates, deadline)?;
        let local = |error: io::Error| ConnectError::local(address, &error);
        tune(&socket, broker.heartbeat).map_err(local)?;
        let clone = socket.try_clone().map_err(local)?;
        let transport = match address.scheme {
            Scheme::Amqp => Self::Plain(mio::net::TcpStream::from_stream(socket).map_err(local)?),
            Scheme::Amqps => {
                let tls = tls::connect(broker, address, &socket, deadline)?;
                let socket = mio::net::TcpStream::from_stream(socket).map_err(local)?;
                Self::Tls(Box::new(TlsStream::new(tls, socket)))
            }
        };
        Ok((transport, clone))
    }
}

/// The host's addresses. libc's resolver knows no deadline, so it runs on a
/// thread of its own, which is left behind when it takes too long and ends by
/// itself when the resolver gives up.
fn resolve(
    broker: &Broker,
    address: &Address,
    deadline: Instant,
) -> Result<Vec<SocketAddr>, ConnectError> {
    if let Ok(ip) = address.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, address.port)]);
    }
    let (done, answer) = crossbeam_channel::bounded(1);
    let (host, port) = (address.host.clone(), address.port);
    thread::Builder::new()
        .name("ackonce-resolve".to_owned())
        .spawn(move || {
            let found = (host.as_str(), port)
                .to_socket_addrs()
                .map(Iterator::collect::<Vec<_>>);
            // Nobody listens any more when the deadline has passed.
            done.send(found).ok();
        })
        .map_err(|error| ConnectError::local(address, &error))?;
    let failed = |source| ConnectError::Resolve {
        address: address.to_string(),
        source,
    };
    match answer.recv_deadline(deadline) {
        Ok(Ok(found)) if found.is_empty() => {
            Err(failed(io::Error::other("the name has no address")))
        }
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(failed(error)),
        Err(RecvTimeoutError::Timeout) => Err(timed_out(broker, address, Stage::Resolve)),
        Err(RecvTimeoutError::Disconnected) => {
            Err(failed(io::Error::other("the resolver's thread failed")))
        }
    }
}

fn timed_out(broker: &Broker, address: &Address, stage: Stage) -> ConnectError {
    ConnectError::TimedOut {
        address: address.to_string(),
        stage,
        within: broker.connect_timeout,
    }
}

/// Tries each candidate in turn; one that does not answer leaves time for the
/// next.
fn dial(
    broker: &Broker,
    address: &Address,
    candidates: &[SocketAddr],
    deadline: Instant,
) -> Result<TcpStream, ConnectError> {
    let mut failures = Vec::new();
    for (position, candidate) in candidates.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        let share = left / u32::try_from(candidates.len() - position).unwrap_or(u32::MAX);
        match TcpStream::connect_timeout(candidate, share.max(ATTEMPT_MIN).min(left)) {
            Ok(socket) => return Ok(socket),
            Err(error) => failures.push((candidate, error)),
        }
    }
    let all = |kind| failures.iter().all(|(_, error)| error.kind() == kind);
    if all(io::ErrorKind::TimedOut) {
        return Err(timed_out(broker, address, Stage::Connect));
    }
    let detail = failures
        .iter()
        .map(|(candidate, error)| format!("{candidate}: {error}"))
        .collect::<Vec<_>>()
        .join(", ");
    let address = address.to_string();
    Err(if all(io::ErrorKind::ConnectionRefused) {
        ConnectError::Refused { address, detail }
    } else {
        ConnectError::Unreachable { address, detail }
    })
}

/// Small frames leave at once, and a peer that vanished without a word is
/// noticed even before heartbeats run.
///
/// `TCP_USER_TIMEOUT` also ends a connection whose peer is alive and does not
/// read, and RabbitMQ stops reading from publishers for as long as a memory or
/// disk alarm lasts. It is therefore set only for the time until the login is
/// done: see [`login_done`].
fn tune(socket: &TcpStream, heartbeat: Duration) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(heartbeat)
        .with_interval(heartbeat / 2);
    let socket = SockRef::from(socket);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(heartbeat * 2))
}

/// Hands the watch over peers that vanish to AMQP's heartbeats.
pub(super) fn login_done(socket: &TcpStream) -> io::Result<()> {
    SockRef::from(socket).set_tcp_user_timeout(None)
}

/// A blocking socket whose reads and writes share one deadline, so that a peer
/// that sends a byte now and then cannot draw it out.
pub(super) struct DeadlineStream<'a> {
    socket: &'a TcpStream,
    deadline: Instant,
}

impl<'a> DeadlineStream<'a> {
    pub(super) fn new(socket: &'a TcpStream, deadline: Instant) -> Self {
        Self { socket, deadline }
    }

    fn left(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(left)
    }
}

/// A socket timeout is reported as `WouldBlock`.
fn as_timeout(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock {
        return io::ErrorKind::TimedOut.into();
    }
    error
}

impl Read for DeadlineStream<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(Some(self.left()?))?;
        self.socket.read(buf).map_err(as_timeout)
    }
}

impl Write for DeadlineStream<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(Some(self.left()?))?;
        self.socket.write(buf).map_err(as_timeout)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// amiquip takes an interrupted call for a broken socket.
fn uninterrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

impl Read for Transport {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| match self {
            Self::Plain(socket) => socket.read(buf),
            Self::Tls(stream) => stream.read(buf),
        })
    }
}

impl Write for Transport {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        uninterrupted(|| match self {
            Self::Plain(socket) => socket.write(buf),
            Self::Tls(stream) => stream.write(buf),
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

impl Transport {
    fn evented(&self) -> &dyn Evented {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.as_ref(),
        }
    }
}

impl Evented for Transport {
    fn register(&self, poll: &Poll, token: Token, want: Ready, opts: PollOpt) -> io::Result<()> {
        self.evented().register(poll, token, want, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, want: Ready, opts: PollOpt) -> io::Result<()> {
        self.evented().reregister(poll, token, want, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        self.evented().deregister(poll)
    }
}

impl IoStream for Transport {}
