//! Configuration files, built by dotted path.

use toml::{Table, Value};

/// A configuration of the daemon.
#[derive(Debug, Clone)]
pub struct Config {
    table: Table,
}

impl Config {
    /// One that says nothing but where its metrics are: several daemons run
    /// at a time.
    pub fn new() -> Self {
        Self {
            table: Table::new(),
        }
        .set("admin.listen", "127.0.0.1:0")
    }

    /// Sets `path`, such as `redis.enabled`.
    #[must_use]
    pub fn set(mut self, path: &str, value: impl Into<Value>) -> Self {
        set(&mut self.table, path, value.into());
        self
    }

    /// Adds a `[[consumer]]`.
    #[must_use]
    pub fn consumer(mut self, consumer: Consumer) -> Self {
        let consumers = self
            .table
            .entry("consumer")
            .or_insert_with(|| Value::Array(Vec::new()));
        consumers
            .as_array_mut()
            .expect("consumer is an array")
            .push(Value::Table(consumer.table));
        self
    }

    /// Names of its consumers.
    pub fn consumer_names(&self) -> Vec<String> {
        let consumers = self.table.get("consumer").and_then(Value::as_array);
        consumers
            .into_iter()
            .flatten()
            .filter_map(|consumer| consumer.get("name")?.as_str().map(str::to_owned))
            .collect()
    }

    /// As a file.
    pub fn text(&self) -> String {
        toml::to_string(&self.table).expect("a table prints as TOML")
    }
}

/// A `[[consumer]]` with its sections.
#[derive(Debug, Clone)]
pub struct Consumer {
    table: Table,
}

impl Consumer {
    /// A consumer whose queue is called like itself, with short leases and
    /// retries, and the handler [`super::RECORD_EFFECT`].
    pub fn new(name: &str) -> Self {
        Self {
            table: Table::new(),
        }
        .set("name", name)
        .set("topology.queue", name)
        .set("claim.lease", "2s")
        .set("claim.renew_every", "500ms")
        .set("claim.done_ttl", "1h")
        .set("claim.recheck_every", "50ms")
        .backoff(&["100ms", "1s"])
        .sql(super::RECORD_EFFECT)
    }

    /// The consumer of the queue [`super::ORDERS`].
    pub fn orders() -> Self {
        Self::new(super::ORDERS)
    }

    /// Sets `path`, such as `claim.lease`.
    #[must_use]
    pub fn set(mut self, path: &str, value: impl Into<Value>) -> Self {
        set(&mut self.table, path, value.into());
        self
    }

    /// Handler `text`.
    #[must_use]
    pub fn sql(self, text: &str) -> Self {
        self.set("handler.type", "sql").set("handler.sql", text)
    }

    /// A handler of type `kind`, in place of the one there is.
    #[must_use]
    pub fn handler(mut self, kind: &str) -> Self {
        self.table.remove("handler");
        self.set("handler.type", kind)
    }

    /// Attempts before a message is dead-lettered.
    #[must_use]
    pub fn max_attempts(self, attempts: u32) -> Self {
        self.set("retry.max_attempts", attempts)
    }

    /// The delays between attempts, exactly: without jitter.
    #[must_use]
    pub fn backoff(self, delays: &[&str]) -> Self {
        self.set("retry.backoff", delays.to_vec())
            .set("retry.jitter_percent", 0)
    }

    /// The class, such as `permanent`, of failures with one of `codes`.
    #[must_use]
    pub fn failures(self, class: &str, codes: &[&str]) -> Self {
        self.set(&format!("failures.{class}"), codes.to_vec())
    }

    /// Feeds the queue from `exchange` too.
    #[must_use]
    pub fn bind(mut self, exchange: &str, exchange_type: &str, routing_key: &str) -> Self {
        let mut binding = Table::new();
        set(&mut binding, "exchange", exchange.into());
        set(&mut binding, "exchange_type", exchange_type.into());
        set(&mut binding, "routing_key", routing_key.into());
        let topology = self.table.entry("topology");
        topology
            .or_insert_with(|| Value::Table(Table::new()))
            .as_table_mut()
            .expect("topology is a table")
            .entry("binding")
            .or_insert_with(|| Value::Array(Vec::new()))
            .as_array_mut()
            .expect("binding is an array")
            .push(Value::Table(binding));
        self
    }
}

fn set(table: &mut Table, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            table.insert(path.to_owned(), value);
        }
        Some((section, rest)) => {
            let section = table
                .entry(section)
                .or_insert_with(|| Value::Table(Table::new()));
            set(
                section.as_table_mut().expect("a section of that name"),
                rest,
                value,
            );
        }
    }
}
