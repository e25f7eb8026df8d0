//! TLS under amiquip: the handshake, with a deadline, and a stream that keeps
//! the promises amiquip's edge-triggered loop builds on.
//!
//! amiquip forgets bytes that `write` took, and asks to be woken for writing
//! only while it has bytes itself. A TLS stream that took plaintext and kept
//! part of its ciphertext would therefore stall until some later write. So
//! [`TlsStream::write`] follows OpenSSL's rule: plaintext counts as written
//! when the socket took all of its ciphertext, and until then `write` says
//! `WouldBlock` and expects the same bytes again.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use mio::{Evented, Poll, PollOpt, Ready, Token};
use rustls::ClientConnection;
use rustls::pki_types::ServerName;

use super::address::Address;
use super::error::{ConnectError, Stage, TlsProblem};
use super::transport::DeadlineStream;
use crate::config::checked::Broker;
use crate::trust::{self, SetupError};

/// A handshake that ended, over the socket it was made on.
pub(super) fn connect(
    broker: &Broker,
    address: &Address,
    socket: &TcpStream,
    deadline: Instant,
) -> Result<ClientConnection, ConnectError> {
    let mut tls = client(broker, address)?;
    let mut stream = DeadlineStream::new(socket, deadline);
    shake_hands(&mut tls, &mut stream).map_err(|failure| match failure {
        Failure::Io(error) if error.kind() == io::ErrorKind::TimedOut => ConnectError::TimedOut {
            address: address.to_string(),
            stage: Stage::Tls,
            within: broker.connect_timeout,
        },
        Failure::Io(error) => ConnectError::Tls {
            address: address.to_string(),
            problem: TlsProblem::Other,
            detail: error.to_string(),
        },
        Failure::Tls(error) => ConnectError::Tls {
            address: address.to_string(),
            problem: TlsProblem::of(&error),
            detail: error.to_string(),
        },
    })?;
    Ok(tls)
}

enum Failure {
    Io(io::Error),
    Tls(rustls::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn shake_hands(tls: &mut ClientConnection, stream: &mut DeadlineStream<'_>) -> Result<(), Failure> {
    while tls.is_handshaking() {
        if let Err(error) = flush(tls, stream) {
            let said = trust::has_hung_up(&error).then(|| trust::last_word(tls, stream));
            return Err(said.flatten().map_or(Failure::Io(error), Failure::Tls));
        }
        // A peer that said goodbye leaves nothing to read.
        if !tls.wants_read() || tls.read_tls(stream)? == 0 {
            return Err(Failure::Io(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the server closed the connection",
            )));
        }
        if let Err(error) = tls.process_new_packets() {
            // The alert tells the server's log why; whether it arrives does
            // not change what is wrong.
            if let Err(unsent) = flush(tls, stream) {
                log::debug!("failed to send a TLS alert: {unsent}");
            }
            return Err(Failure::Tls(error));
        }
    }
    Ok(flush(tls, stream)?)
}

fn client(broker: &Broker, address: &Address) -> Result<ClientConnection, ConnectError> {
    let failed = |error: rustls::Error| ConnectError::Tls {
        address: address.to_string(),
        problem: TlsProblem::Other,
        detail: error.to_string(),
    };
    let config = trust::client(&broker.tls).map_err(|error| match error {
        SetupError::Files(error) => ConnectError::Trust(error),
        SetupError::Library(error) => failed(error),
    })?;
    let name = ServerName::try_from(address.host.clone()).map_err(|error| ConnectError::Tls {
        address: address.to_string(),
        problem: TlsProblem::WrongHost,
        detail: error.to_string(),
    })?;
    ClientConnection::new(Arc::new(config), name).map_err(failed)
}

/// Writes all ciphertext there is; `WouldBlock` when the socket is full.
fn flush<W: Write>(tls: &mut ClientConnection, socket: &mut W) -> io::Result<()> {
    while tls.wants_write() {
        match tls.write_tls(socket) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// TLS over a non-blocking socket `S`, its handshake done.
pub struct TlsStream<S> {
    tls: ClientConnection,
    socket: S,
    /// How many bytes of plaintext are encrypted and not reported as written,
    /// because the socket did not take all of their ciphertext.
    unreported: usize,
}

impl<S> TlsStream<S> {
    pub(super) fn new(tls: ClientConnection, socket: S) -> Self {
        Self {
            tls,
            socket,
            unreported: 0,
        }
    }
}

impl<S: Read> Read for TlsStream<S> {
    /// `WouldBlock` only when nothing decrypted is left and the socket itself
    /// would block, as an edge-triggered reader needs it.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            match self.tls.reader().read(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            match self.tls.read_tls(&mut self.socket) {
                Ok(_) => {
                    self.tls
                        .process_new_packets()
                        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl<S: Read + Write> Write for TlsStream<S> {
    /// After `WouldBlock` the next call must begin with the same bytes.
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        self.encrypt(buf).map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                self.last_words().unwrap_or(error)
            }
            _ => error,
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        flush(&mut self.tls, &mut self.socket)
    }
}

impl<S: Read + Write> TlsStream<S> {
    fn encrypt(&mut self, buf: &[u8]) -> io::Result<usize> {
        flush(&mut self.tls, &mut self.socket)?;
        if self.unreported == 0 {
            self.unreported = self.tls.writer().write(buf)?;
            flush(&mut self.tls, &mut self.socket)?;
        }
        if self.unreported > buf.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a write that would block was not repeated with the same bytes",
            ));
        }
        Ok(std::mem::take(&mut self.unreported))
    }

    /// Why the peer hung up, if it said so: with TLS 1.3 it refuses a client
    /// certificate when the client has long begun to write.
    fn last_words(&mut self) -> Option<io::Error> {
        while let Ok(1..) = self.tls.read_tls(&mut self.socket) {
            if let Err(error) = self.tls.process_new_packets() {
                return Some(io::Error::new(io::ErrorKind::InvalidData, error));
            }
        }
        None
    }
}

impl<S: Evented> Evented for TlsStream<S> {
    fn register(&self, poll: &Poll, token: Token, want: Ready, opts: PollOpt) -> io::Result<()> {
        self.socket.register(poll, token, want, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, want: Ready, opts: PollOpt) -> io::Result<()> {
        self.socket.reregister(poll, token, want, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        self.socket.deregister(poll)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::process::Command;

    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls::{ClientConfig, RootCertStore, ServerConfig, ServerConnection};

    use super::*;

    /// A socket that takes and gives a few bytes, then would block.
    #[derive(Default)]
    struct Choking {
        inbound: VecDeque<u8>,
        outbound: Vec<u8>,
        /// Bytes taken or given before the next `WouldBlock`.
        appetite: usize,
    }

    impl Read for Choking {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let count = self.appetite.min(buf.len()).min(self.inbound.len());
            if count == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.appetite -= count;
            self.inbound.read(&mut buf[..count])
        }
    }

    impl Write for Choking {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let count = self.appetite.min(buf.len());
            if count == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.appetite -= count;
            self.outbound.extend_from_slice(&buf[..count]);
            Ok(count)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A client stream and a server, past their handshake.
    fn pair() -> (TlsStream<Choking>, ServerConnection) {
        let folder = tempfile::tempdir().unwrap();
        let made = Command::new("openssl")
            .args(["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt"])
            .args([
                "ec_paramgen_curve:prime256v1",
                "-subj",
                "/CN=broker",
                "-addext",
            ])
            .args([
                "subjectAltName=DNS:broker",
                "-addext",
                "basicConstraints=critical,CA:FALSE",
            ])
            .args(["-keyout", "key.pem", "-out", "cert.pem"])
            .current_dir(folder.path())
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let certificate = CertificateDer::from_pem_file(folder.path().join("cert.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(folder.path().join("key.pem")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)
            .unwrap();
        let mut server = ServerConnection::new(Arc::new(config)).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate).unwrap();
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("broker").unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        while client.is_handshaking() || server.is_handshaking() {
            let mut wire = Vec::new();
            flush(&mut client, &mut wire).unwrap();
            receive(&mut server, &wire);
            let mut wire = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut wire).unwrap();
            }
            let mut wire = wire.as_slice();
            while !wire.is_empty() {
                client.read_tls(&mut wire).unwrap();
                client.process_new_packets().unwrap();
            }
        }
        (TlsStream::new(client, Choking::default()), server)
    }

    /// What the server reads from `wire`.
    fn receive(server: &mut ServerConnection, mut wire: &[u8]) -> Vec<u8> {
        let mut plaintext = Vec::new();
        while !wire.is_empty() {
            server.read_tls(&mut wire).unwrap();
            server.process_new_packets().unwrap();
            let mut part = [0; 65_536];
            while let Ok(count @ 1..) = server.reader().read(&mut part) {
                plaintext.extend_from_slice(&part[..count]);
            }
        }
        plaintext
    }

    #[test]
    fn bytes_that_write_took_are_on_the_wire_to_the_last_one() {
        let (mut stream, mut server) = pair();
        let sent: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8).collect();
        let mut arrived = Vec::new();
        let mut taken = 0;
        let mut blocked = 0;
        while taken < sent.len() {
            stream.socket.appetite = 1 + (taken * 7 + blocked * 977) % 9_000;
            match stream.write(&sent[taken..]) {
                Ok(count) => {
                    assert!(count > 0, "amiquip would spin");
                    taken += count;
                }
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    blocked += 1;
                }
            }
            let wire = std::mem::take(&mut stream.socket.outbound);
            arrived.extend(receive(&mut server, &wire));
            assert!(
                arrived.len() >= taken,
                "{taken} taken, {} arrived",
                arrived.len()
            );
        }
        assert!(blocked > 10, "the socket never choked");
        assert!(arrived == sent);
    }

    #[test]
    fn a_read_blocks_only_when_nothing_decrypted_is_left() {
        let (mut stream, mut server) = pair();
        let sent: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
        let mut rest = sent.as_slice();
        let mut got = Vec::new();
        while got.len() < sent.len() {
            if !rest.is_empty() {
                let count = server.writer().write(rest).unwrap();
                rest = &rest[count..];
            }
            while server.wants_write() {
                server.write_tls(&mut stream.socket.inbound).unwrap();
            }
            stream.socket.appetite = 1 + got.len() % 20_000;
            let mut part = [0; 777];
            let error = loop {
                match stream.read(&mut part) {
                    Ok(count) => got.extend_from_slice(&part[..count]),
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            assert!(
                stream.tls.reader().read(&mut part).is_err(),
                "plaintext was left behind"
            );
            assert!(stream.socket.appetite == 0 || stream.socket.inbound.is_empty());
        }
        assert!(got == sent);
    }
}
