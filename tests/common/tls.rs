//! RabbitMQ with TLS: a listener of its own for one test, on the broker that
//! all of them share.

use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use url::Url;

use super::servers::free_port;
use super::world::server;
use super::{Authority, Leaf};

/// A port on which the broker speaks AMQP over TLS. Dropping it closes it.
#[derive(Debug)]
pub struct TlsListener {
    port: u16,
}

impl TlsListener {
    /// Opens one that shows `leaf`, and lets nobody in without a certificate of
    /// `clients`, if they are given.
    pub fn open(leaf: &Leaf, clients: Option<&Authority>) -> Self {
        Self::open_on(free_port(), leaf, clients, "")
    }

    /// As [`Self::open`], and speaks TLS 1.2 alone.
    pub fn open_tls_1_2(leaf: &Leaf, clients: Option<&Authority>) -> Self {
        Self::open_on(free_port(), leaf, clients, ", {versions, ['tlsv1.2']}")
    }

    /// Closes it and opens it anew on the same port, as [`Self::open`] has it.
    #[must_use]
    pub fn reopen(self, leaf: &Leaf, clients: Option<&Authority>) -> Self {
        let port = self.port;
        drop(self);
        Self::open_on(port, leaf, clients, "")
    }

    fn open_on(port: u16, leaf: &Leaf, clients: Option<&Authority>, more: &str) -> Self {
        let key = PrivateKeyDer::from_pem_file(leaf.key()).expect("a key");
        let clients = clients.map_or_else(String::new, |authority| {
            format!(
                ", {{cacerts, [{}]}}, {{verify, verify_peer}}, {{fail_if_no_peer_cert, true}}",
                certificate(&authority.file())
            )
        });
        // Certificates as bytes: a broker in a chroot sees no file of ours.
        ctl(&format!(
            "{{ok, _}} = application:ensure_all_started(ssl), \
             Options = [{{cert, {}}}, {{key, {{'PrivateKeyInfo', {}}}}}{clients}{more}], \
             Listener = {{\"127.0.0.1\", {port}, auto}}, \
             case erlang:function_exported(rabbit_networking, start_ssl_listener, 3) of \
             true -> rabbit_networking:start_ssl_listener(Listener, Options, 1); \
             false -> rabbit_networking:start_ssl_listener(Listener, Options, 1, 1) end.",
            certificate(&leaf.cert()),
            erlang(key.secret_der()),
        ));
        Self { port }
    }

    /// `url`, by way of this port of `host`.
    pub fn url(&self, url: &str, host: &str) -> String {
        let mut url = Url::parse(url).expect("a URL");
        url.set_host(Some(host)).expect("a host");
        url.set_port(Some(self.port)).expect("a port");
        url.as_str().replacen("amqp://", "amqps://", 1)
    }
}

impl Drop for TlsListener {
    fn drop(&mut self) {
        let port = self.port;
        let listener = format!("{{\"127.0.0.1\", {port}, auto}}");
        let close = format!("rabbit_networking:stop_tcp_listener({listener}).");
        let closed = std::panic::catch_unwind(|| ctl(&close));
        if closed.is_err() {
            eprintln!("failed to close the listener on port {}", self.port);
        }
    }
}

fn certificate(path: &Path) -> String {
    erlang(&CertificateDer::from_pem_file(path).expect("a certificate"))
}

/// Bytes, in Erlang.
fn erlang(bytes: &[u8]) -> String {
    format!("base64:decode(\"{}\")", BASE64_STANDARD.encode(bytes))
}

/// Has the broker evaluate `expression`.
fn ctl(expression: &str) {
    let program = PathBuf::from(server("ACKONCE_SERVICES_DIR")).join("rabbitmqctl");
    let output = Command::new(program)
        .args(["eval", expression])
        .output()
        .expect("rabbitmqctl starts");
    assert!(output.status.success(), "rabbitmqctl eval: {output:?}");
}
