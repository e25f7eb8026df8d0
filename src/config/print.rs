//! A checked configuration as TOML text that [`super::parse`] reads back as
//! the same. Every key is written, also those at their default.

use std::path::Path;
use std::time::Duration;

use super::checked::{
    Binding, BindingArgument, CommandHandler, CommandMode, Config, Consumer, Handler, HttpHandler,
    Identity, Secret, Tls, Topology,
};
use super::handler::INLINE;
use super::source::REDACTED;
use super::{duration, interpolate, keys, size};
use crate::failure::Class;

/// The configuration as it will be used. With `show_secrets`, reading it back
/// gives the same configuration; otherwise each URL is `"<redacted>"`.
#[must_use]
pub fn to_toml(config: &Config, show_secrets: bool) -> String {
    let mut out = Writer {
        text: String::new(),
        show_secrets,
    };
    out.servers(config);
    for consumer in &config.consumers {
        out.consumer(consumer);
    }
    out.text
}

struct Writer {
    text: String,
    show_secrets: bool,
}

impl Writer {
    fn servers(&mut self, config: &Config) {
        self.header("[broker]");
        self.secrets("url", &config.broker.urls);
        self.tls(&config.broker.tls);
        self.plain("allow_plaintext", config.broker.allow_plaintext);
        self.duration("heartbeat", config.broker.heartbeat);
        self.duration("connect_timeout", config.broker.connect_timeout);

        self.header("[redis]");
        self.plain("enabled", config.redis.is_some());
        if let Some(redis) = &config.redis {
            self.secret("url", &redis.url);
            self.tls(&redis.tls);
            self.plain("allow_plaintext", redis.allow_plaintext);
            self.string("key_prefix", &redis.key_prefix);
            self.duration("connect_timeout", redis.connect_timeout);
            self.duration("timeout", redis.timeout);
        }

        let postgres = &config.postgres;
        self.header("[postgres]");
        self.secret("url", &postgres.url);
        self.tls(&postgres.tls);
        self.plain("allow_plaintext", postgres.allow_plaintext);
        self.duration("connect_timeout", postgres.connect_timeout);
        self.duration("statement_timeout", postgres.statement_timeout);
        self.duration("lock_timeout", postgres.lock_timeout);
        self.duration(
            "idle_in_transaction_timeout",
            postgres.idle_in_transaction_timeout,
        );
        self.plain("auto_migrate", postgres.auto_migrate);

        self.header("[ledger]");
        self.duration("retention", config.ledger.retention);
        self.duration("prune_every", config.ledger.prune_every);
        self.plain("prune_batch", config.ledger.prune_batch);

        self.header("[daemon]");
        self.duration("shutdown_timeout", config.daemon.shutdown_timeout);
        self.duration("reconnect_min", config.daemon.reconnect_min);
        self.duration("reconnect_max", config.daemon.reconnect_max);

        self.header("[admin]");
        self.plain("enabled", config.admin.is_some());
        if let Some(admin) = &config.admin {
            self.string("listen", &admin.listen.to_string());
            self.duration("stall_after", admin.stall_after);
        }

        self.header("[log]");
        self.string("format", config.log_format.as_str());
    }

    fn tls(&mut self, tls: &Tls) {
        if let Some(path) = &tls.ca_file {
            self.path(keys::CA_FILE, path);
        }
        if let Some(client) = &tls.client {
            self.path(keys::CERT_FILE, &client.cert_file);
            self.path(keys::KEY_FILE, &client.key_file);
        }
    }

    fn consumer(&mut self, consumer: &Consumer) {
        self.header("[[consumer]]");
        self.string("name", &consumer.name);
        self.plain("workers", consumer.workers);
        self.plain("prefetch", consumer.prefetch);
        self.plain("batch_max", consumer.batch_max);
        self.string("max_body", &size::format(consumer.max_body as u64));
        let identity = match &consumer.identity {
            Identity::MessageId => "message-id".to_owned(),
            Identity::Header(name) => format!("header:{name}"),
            Identity::Json(pointer) => format!("json:{pointer}"),
            Identity::Body => "body".to_owned(),
        };
        self.string("identity", &identity);
        self.plain("confirm_duplicates", consumer.confirm_duplicates);
        self.plain("max_deaths", consumer.max_deaths);

        let retry = &consumer.retry;
        self.header("[consumer.retry]");
        self.plain("max_attempts", retry.max_attempts);
        self.list(
            "backoff",
            retry.backoff.iter().copied().map(duration::format),
        );
        self.plain("jitter_percent", retry.jitter_percent);
        self.plain("breaker", retry.breaker);

        self.header("[consumer.failures]");
        for class in [Class::Transient, Class::Permanent, Class::Systemic] {
            let codes = consumer.failures.0.iter();
            let codes = codes.filter(|(_, own)| *own == class);
            self.list(class.as_str(), codes.map(|(code, _)| code.clone()));
        }

        self.header("[consumer.claim]");
        self.duration("lease", consumer.claim.lease);
        self.duration("renew_every", consumer.claim.renew_every);
        self.duration("done_ttl", consumer.claim.done_ttl);
        self.duration("recheck_every", consumer.claim.recheck_every);

        self.topology(&consumer.topology);

        self.header("[consumer.handler]");
        self.string("effect", consumer.handler.effect().as_str());
        match &consumer.handler {
            Handler::Sql(handler) => {
                self.string("type", "sql");
                if handler.origin == INLINE {
                    self.string("sql", &handler.text);
                } else {
                    self.string("file", &handler.origin);
                }
                self.string("batch", handler.batch.as_str());
            }
            Handler::Http(handler) => self.http(handler),
            Handler::Rust(_) => self.string("type", "rust"),
            Handler::Command(handler) => self.command(handler),
        }
    }

    fn command(&mut self, handler: &CommandHandler) {
        self.string("type", "command");
        self.string("mode", handler.mode.as_str());
        let program = handler.program.display().to_string();
        let argv = std::iter::once(program).chain(handler.arguments.iter().cloned());
        self.list("argv", argv);
        self.path("working_directory", &handler.working_directory);
        self.secret_table("env", &handler.env);
        let names = handler.pass_env.iter().map(|(name, _)| name.clone());
        self.list("pass_env", names);
        self.duration("timeout", handler.timeout);
        self.duration("kill_after", handler.kill_after);
        if handler.mode == CommandMode::Stream {
            self.duration("start_timeout", handler.start_timeout);
        }
    }

    fn http(&mut self, handler: &HttpHandler) {
        self.string("type", "http");
        self.string("method", handler.method.as_str());
        self.secret("url", &handler.url);
        self.tls(&handler.tls);
        if let Some(content_type) = &handler.content_type {
            self.string("content_type", content_type);
        }
        if !handler.headers.is_empty() {
            self.secret_table("headers", &handler.headers);
        }
        self.list("forward_headers", handler.forward_headers.iter().cloned());
        self.string("key_header", &handler.key_header);
        self.string("key_format", handler.key_format.as_str());
        let secrets = handler.signing_secrets.iter();
        let secrets: Vec<String> = secrets.map(|s| self.shown(s).to_owned()).collect();
        self.list("signing_secrets", secrets.into_iter());
        self.duration("connect_timeout", handler.connect_timeout);
        self.duration("timeout", handler.timeout);
    }

    fn topology(&mut self, topology: &Topology) {
        self.header("[consumer.topology]");
        self.string("mode", topology.mode.as_str());
        self.string("queue", &topology.queue);
        self.string("queue_type", topology.queue_type.as_str());
        if let Some(limit) = topology.delivery_limit {
            self.plain("delivery_limit", limit);
        }
        self.string("dead_letters", topology.dead_letters.as_str());
        self.string("dead_letter_exchange", &topology.dead_letter_exchange);
        self.string("dead_letter_queue", &topology.dead_letter_queue);
        for binding in &topology.bindings {
            self.binding(binding);
        }
    }

    fn binding(&mut self, binding: &Binding) {
        self.header("[[consumer.topology.binding]]");
        self.string("exchange", &binding.exchange);
        self.string("exchange_type", binding.exchange_type.as_str());
        self.string("routing_key", &binding.routing_key);
        if binding.arguments.is_empty() {
            return;
        }
        let arguments: Vec<String> = binding
            .arguments
            .iter()
            .map(|(name, value)| {
                let value = match value {
                    BindingArgument::Text(text) => quoted(&interpolate::escape(text)),
                    BindingArgument::Integer(number) => number.to_string(),
                    BindingArgument::Boolean(value) => value.to_string(),
                };
                format!("{} = {value}", quoted(name))
            })
            .collect();
        self.plain("arguments", format_args!("{{ {} }}", arguments.join(", ")));
    }

    fn header(&mut self, title: &str) {
        if !self.text.is_empty() {
            self.text.push('\n');
        }
        self.text.push_str(title);
        self.text.push('\n');
    }

    fn plain(&mut self, key: &str, value: impl std::fmt::Display) {
        self.text += &format!("{key} = {value}\n");
    }

    fn string(&mut self, key: &str, value: &str) {
        self.plain(key, quoted(&interpolate::escape(value)));
    }

    fn list(&mut self, key: &str, values: impl Iterator<Item = String>) {
        let values: Vec<String> = values
            .map(|value| quoted(&interpolate::escape(&value)))
            .collect();
        self.plain(key, format_args!("[{}]", values.join(", ")));
    }

    fn path(&mut self, key: &str, value: &Path) {
        self.string(key, &value.display().to_string());
    }

    fn duration(&mut self, key: &str, value: Duration) {
        self.string(key, &duration::format(value));
    }

    fn secret(&mut self, key: &str, value: &Secret) {
        self.string(key, self.shown(value));
    }

    /// A table of secrets.
    fn secret_table(&mut self, key: &str, entries: &[(String, Secret)]) {
        let entries: Vec<String> = entries
            .iter()
            .map(|(name, value)| {
                let value = quoted(&interpolate::escape(self.shown(value)));
                format!("{} = {value}", quoted(name))
            })
            .collect();
        self.plain(key, format_args!("{{ {} }}", entries.join(", ")));
    }

    /// One as a string, several as a list.
    fn secrets(&mut self, key: &str, values: &[Secret]) {
        match values {
            [one] => self.secret(key, one),
            several => {
                let shown: Vec<_> = several.iter().map(|s| self.shown(s).to_owned()).collect();
                self.list(key, shown.into_iter());
            }
        }
    }

    fn shown<'s>(&self, value: &'s Secret) -> &'s str {
        match self.show_secrets {
            true => value.expose(),
            false => REDACTED,
        }
    }
}

/// `text` as a TOML string on one line.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            control if control.is_control() => {
                out += &format!("\\u{:04X}", u32::from(control));
            }
            other => out.push(other),
        }
    }
    out.push('"');
    out
}
