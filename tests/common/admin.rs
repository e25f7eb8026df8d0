//! The admin address of a running daemon, as Prometheus and a probe see it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::{DEADLINE, Daemon};

/// An answer in HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Its status; 0 when the other side closed without a word.
    pub status: u16,
    /// Its head in lower case, the status line included.
    pub head: String,
    /// What follows the head.
    pub body: String,
}

/// The admin address of one daemon.
#[derive(Debug, Clone, Copy)]
pub struct Admin {
    address: SocketAddr,
}

impl Admin {
    /// Waits until `daemon` says where it listens.
    pub fn of(daemon: &Daemon) -> Self {
        Self {
            address: daemon.admin().parse().expect("an address"),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A connection.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("the admin address");
        stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        stream
    }

    /// Asks for `path`.
    pub fn get(&self, path: &str) -> Reply {
        self.say(&request("GET", path))
    }

    /// Sends `bytes` over a connection of its own and reads to the end.
    pub fn say(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect();
        // A server that has heard enough may close before it is all sent.
        drop(stream.write_all(bytes));
        read_reply(&mut stream)
    }

    /// Everything at `/metrics`.
    pub fn text(&self) -> String {
        let reply = self.get("/metrics");
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.body
    }

    /// Every series at `/metrics`.
    pub fn metrics(&self) -> Series {
        Series::read(&self.text())
    }

    /// Waits until each of `expected`, as [`Series::value`] takes them, has
    /// that value, all at once.
    pub fn wait_for(&self, expected: &[(&str, f64)]) {
        let mut differing = Vec::new();
        let agreed = super::try_eventually(DEADLINE, || {
            let series = self.metrics();
            differing = expected
                .iter()
                .map(|(name, wanted)| (*name, *wanted, series.value(name)))
                .filter(|(_, wanted, got)| wanted != got)
                .map(|(name, wanted, got)| format!("{name}: {got}, and {wanted} was expected"))
                .collect();
            differing.is_empty()
        });
        let all = self.text();
        assert!(agreed, "{}\n\n{all}", differing.join("\n"));
    }
}

/// A whole request.
pub fn request(method: &str, path: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nHost: ackonce\r\nConnection: close\r\n\r\n").into_bytes()
}

/// Reads to the end of the connection.
pub fn read_reply(stream: &mut TcpStream) -> Reply {
    let mut bytes = Vec::new();
    // A reset after the answer is an end too.
    drop(stream.read_to_end(&mut bytes));
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
    Reply {
        status: status.unwrap_or(0),
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

/// Series with their values.
#[derive(Debug, Clone, PartialEq)]
pub struct Series(BTreeMap<String, f64>);

impl Series {
    fn read(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let series = lines.map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("a series and its value");
            (name.to_owned(), value.parse().expect("a number"))
        });
        Self(series.collect())
    }

    /// The names with their labels.
    pub fn names(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }

    /// The sum of the series that `wanted` describes: a name, with
    /// `ackonce_` left away, and label values behind it, as in
    /// `messages_total applied`.
    pub fn value(&self, wanted: &str) -> f64 {
        let mut words = wanted.split(' ');
        let name = words.next().expect("a name");
        let labels: Vec<String> = words.map(|value| format!("=\"{value}\"")).collect();
        let fits = |series: &str| {
            let (family, rest) = series.split_once('{').unwrap_or((series, ""));
            family.strip_prefix("ackonce_").unwrap_or(family) == name
                && labels.iter().all(|label| rest.contains(label.as_str()))
        };
        let found: Vec<f64> = self
            .0
            .iter()
            .filter(|(series, _)| fits(series))
            .map(|(_, value)| *value)
            .collect();
        assert!(!found.is_empty(), "no series {wanted:?} in {self:?}");
        found.iter().sum()
    }
}
