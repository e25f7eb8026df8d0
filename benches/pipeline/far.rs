//! A line to PostgreSQL with half a millisecond in each direction.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use url::Url;

/// How late each byte is: a round trip takes twice as long.
const LATE_BY: Duration = Duration::from_micros(500);

/// A listening proxy; it goes with the process.
pub struct Far {
    url: String,
}

impl Far {
    /// Before the server that `url` names.
    pub fn before(url: &str) -> Result<Self> {
        let mut url = Url::parse(url).context("failed to read PostgreSQL's URL")?;
        let host = url.host_str().context("PostgreSQL's URL has no host")?;
        let target = (host.to_owned(), url.port().unwrap_or(5432));
        let listener = TcpListener::bind("127.0.0.1:0").context("failed to listen")?;
        let address = listener.local_addr()?;
        url.set_ip_host(address.ip())
            .and_then(|()| url.set_port(Some(address.port())))
            .map_err(|()| anyhow::anyhow!("PostgreSQL's URL takes no address"))?;
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if let Err(error) = pass_on(&client, &target) {
                    eprintln!("failed to pass a connection on: {error}");
                    drop(client.shutdown(Shutdown::Both));
                }
            }
        });
        Ok(Self { url: url.into() })
    }

    /// The server's URL, through the proxy.
    pub fn url(&self) -> &str {
        &self.url
    }
}

fn pass_on(client: &TcpStream, target: &(String, u16)) -> std::io::Result<()> {
    let server = TcpStream::connect((target.0.as_str(), target.1))?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    for (mut from, mut to) in [
        (client.try_clone()?, server.try_clone()?),
        (server.try_clone()?, client.try_clone()?),
    ] {
        let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(1024);
        thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                let due = Instant::now() + LATE_BY;
                if sender.send((due, buffer[..count].to_vec())).is_err() {
                    break;
                }
            }
        });
        thread::spawn(move || {
            for (due, bytes) in receiver {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            // Fails when the other side was first.
            drop(to.shutdown(Shutdown::Write));
        });
    }
    Ok(())
}
