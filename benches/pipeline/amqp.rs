//! Connections to the broker, as amiquip makes them but for one option: what
//! is written is sent at once, as the daemon has it too. Without it the kernel
//! holds small frames back for up to 40 ms.

use std::net::ToSocketAddrs;

use amiquip::{Auth, Connection, ConnectionOptions, ConnectionTuning};
use anyhow::{Context, Result};
use mio::net::TcpStream;
use percent_encoding::percent_decode_str;
use url::Url;

/// Connects to the broker that `url` names.
pub fn connect(url: &str) -> Result<Connection> {
    let url = Url::parse(url).context("failed to read the broker's URL")?;
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let host = url.host_str().context("the broker's URL has no host")?;
    let address = (host, url.port().unwrap_or(5672))
        .to_socket_addrs()
        .with_context(|| format!("failed to look {host} up"))?
        .next()
        .with_context(|| format!("{host} has no address"))?;
    let stream = TcpStream::connect(&address)
        .with_context(|| format!("failed to connect to RabbitMQ at {address}"))?;
    stream.set_nodelay(true)?;
    let auth = Auth::Plain {
        username: decoded(url.username()),
        password: decoded(url.password().unwrap_or_default()),
    };
    let vhost = decoded(url.path().trim_start_matches('/'));
    let options = ConnectionOptions::default().auth(auth).virtual_host(vhost);
    Connection::insecure_open_stream(stream, options, ConnectionTuning::default())
        .with_context(|| format!("failed to log in to RabbitMQ at {address}"))
}
