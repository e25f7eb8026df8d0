//! Redis as the tests see it: the keys under one prefix.

use std::sync::Mutex;

use redis::{Client, Commands, Connection};

/// A session on Redis.
pub struct Redis {
    session: Mutex<Connection>,
    prefix: String,
}

impl Redis {
    pub(super) fn connect(url: &str, prefix: &str) -> Self {
        let session = Client::open(url)
            .and_then(|client| client.get_connection())
            .unwrap_or_else(|e| panic!("failed to connect to Redis: {e}; run script/test"));
        Self {
            session: Mutex::new(session),
            prefix: prefix.to_owned(),
        }
    }

    /// All keys under the prefix.
    pub fn keys(&self) -> Vec<String> {
        let mut session = self.session.lock().expect("the session");
        let keys = session
            .scan_options::<String>(
                redis::ScanOptions::default()
                    .with_pattern(format!("{}:*", self.prefix))
                    .with_count(10_000),
            )
            .expect("SCAN");
        keys.map(|key| key.expect("a key")).collect()
    }

    /// Keys whose value is a claim.
    pub fn claims(&self) -> Vec<String> {
        let keys = self.keys();
        keys.into_iter()
            .filter(|key| self.get(key).is_some_and(|value| value.starts_with("c:")))
            .collect()
    }

    /// Forgets every key under the prefix, as a flush does, without taking
    /// other tests' keys along. How many there were.
    pub fn flush(&self) -> usize {
        let keys = self.keys();
        if !keys.is_empty() {
            let mut session = self.session.lock().expect("the session");
            let () = session.del(&keys).expect("DEL");
        }
        keys.len()
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<String> {
        let mut session = self.session.lock().expect("the session");
        session.get(key).expect("GET")
    }

    /// Sets `key`, for `ttl_ms` milliseconds.
    pub fn set(&self, key: &str, value: &str, ttl_ms: u64) {
        let mut session = self.session.lock().expect("the session");
        let () = session.pset_ex(key, value, ttl_ms).expect("PSETEX");
    }

    /// Milliseconds that `key` has left; negative when it is gone.
    pub fn ttl_ms(&self, key: &str) -> i64 {
        let mut session = self.session.lock().expect("the session");
        session.pttl(key).expect("PTTL")
    }
}
