//! TLS in front of a plain broker.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use rustls::ServerConnection;
use url::Url;

use crate::common::Authority;

/// Accepts TLS and forwards to a plain broker, until the test process ends.
pub struct TlsProxy {
    upstream: Url,
    port: u16,
}

impl TlsProxy {
    pub fn start(upstream: &str, authority: &Authority, names: &str) -> Self {
        Self::start_with(upstream, authority, names, 1)
    }

    pub fn start_with(upstream: &str, authority: &Authority, names: &str, days: i32) -> Self {
        let upstream = Url::parse(upstream).unwrap();
        let target = (
            upstream.host_str().unwrap().to_owned(),
            upstream.port().unwrap_or(5672),
        );
        let config = Arc::new(authority.issue(names, days));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for client in listener.incoming() {
                let server = TcpStream::connect((target.0.as_str(), target.1)).unwrap();
                let tls = ServerConnection::new(Arc::clone(&config)).unwrap();
                forward(client.unwrap(), server, tls);
            }
        });
        Self { upstream, port }
    }

    /// The upstream's URL, by way of this proxy.
    pub fn url(&self, host: &str) -> String {
        let mut url = self.upstream.clone();
        url.set_host(Some(host)).unwrap();
        url.set_port(Some(self.port)).unwrap();
        url.to_string().replacen("amqp://", "amqps://", 1)
    }
}

fn forward(client: TcpStream, server: TcpStream, mut tls: ServerConnection) {
    tls.set_buffer_limit(None);
    let tls = Arc::new(Mutex::new(tls));
    let (theirs, mut to, mut from) = (
        Arc::clone(&tls),
        client.try_clone().unwrap(),
        server.try_clone().unwrap(),
    );
    thread::spawn(move || {
        let mut part = [0; 65_536];
        while let Ok(count @ 1..) = from.read(&mut part) {
            let mut tls = theirs.lock().unwrap();
            tls.writer().write_all(&part[..count]).unwrap();
            if send(&mut tls, &mut to).is_err() {
                break;
            }
        }
        to.shutdown(std::net::Shutdown::Both).ok();
    });
    thread::spawn(move || {
        let (mut from, mut to) = (client, server);
        let mut part = [0; 65_536];
        while let Ok(count @ 1..) = from.read(&mut part) {
            let mut tls = tls.lock().unwrap();
            let mut wire = &part[..count];
            let mut plaintext = Vec::new();
            let mut failed = false;
            while !wire.is_empty() && !failed {
                tls.read_tls(&mut wire).unwrap();
                failed = tls.process_new_packets().is_err();
                let mut decrypted = [0; 65_536];
                while let Ok(count @ 1..) = tls.reader().read(&mut decrypted) {
                    plaintext.extend_from_slice(&decrypted[..count]);
                }
            }
            if send(&mut tls, &mut from).is_err() || failed {
                break;
            }
            drop(tls);
            if to.write_all(&plaintext).is_err() {
                break;
            }
        }
        to.shutdown(std::net::Shutdown::Both).ok();
        from.shutdown(std::net::Shutdown::Both).ok();
    });
}

fn send(tls: &mut ServerConnection, to: &mut TcpStream) -> std::io::Result<()> {
    let mut wire = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut wire)?;
    }
    to.write_all(&wire)
}
