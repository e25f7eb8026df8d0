//! `[broker]`, `[redis]`, `[postgres]`, `[ledger]` and `[daemon]`.

use std::time::Duration;

use super::checked::{Broker, Daemon, Ledger, Postgres, Redis, Secret};
use super::error::Complaint;
use super::reader::{Field, Section, compare};
use super::tls::{self, Terms};
use super::{defaults, duration, files, keys, urls};

/// `None` where something is wrong, which is reported.
pub(super) fn broker(root: &Section<'_>) -> Option<Broker> {
    let section = root.section("broker", &keys::BROKER);
    let allow_plaintext = section.boolean("allow_plaintext", defaults::ALLOW_PLAINTEXT);
    let urls = broker_urls(&section, allow_plaintext.value);
    let is_tls = |urls: &Vec<Secret>| urls.iter().any(|url| urls::is_tls(url.expose()));
    let plain = urls.as_ref().is_some_and(|urls| !is_tls(urls));
    let tls = tls::read(&section, plain.then(|| tls::without("amqps")));
    let heartbeat = section.duration("heartbeat", &defaults::HEARTBEAT);
    if heartbeat.value.subsec_millis() != 0 {
        section.reader.report(
            heartbeat.span,
            format!(
                "`heartbeat` must be whole seconds, found {}",
                duration::format(heartbeat.value)
            ),
            "AMQP counts heartbeats in seconds: \"10s\"",
        );
    }
    let connect_timeout = section.duration("connect_timeout", &defaults::BROKER_CONNECT_TIMEOUT);
    Some(Broker {
        urls: urls?,
        tls,
        allow_plaintext: allow_plaintext.value,
        heartbeat: heartbeat.value,
        connect_timeout: connect_timeout.value,
    })
}

/// `None` where something is wrong, which is reported; `Some(None)` when
/// Redis is switched off.
pub(super) fn redis(root: &Section<'_>) -> Option<Option<Redis>> {
    let section = root.section("redis", &keys::REDIS);
    let enabled = section.boolean("enabled", defaults::REDIS_ENABLED);
    if !enabled.value {
        return Some(None);
    }
    let allow_plaintext = section.boolean("allow_plaintext", defaults::ALLOW_PLAINTEXT);
    let url = url(&section, |text| {
        urls::check_redis(text)?;
        match allow_plaintext.value {
            true => Ok(()),
            false => tls::refuse_plaintext(text, "rediss", "[redis]"),
        }
    });
    let plain = url
        .as_ref()
        .is_some_and(|(url, ())| !urls::is_rediss(url.expose()));
    let tls = tls::read(&section, plain.then(|| tls::without("rediss")));
    let key_prefix = section
        .text("key_prefix")
        .then(check_key_prefix)
        .or(defaults::REDIS_KEY_PREFIX.to_owned());
    let connect_timeout = section.duration("connect_timeout", &defaults::REDIS_CONNECT_TIMEOUT);
    let timeout = section.duration("timeout", &defaults::REDIS_TIMEOUT);
    let (url, ()) = url?;
    Some(Some(Redis {
        url,
        tls,
        allow_plaintext: allow_plaintext.value,
        key_prefix: key_prefix.value,
        connect_timeout: connect_timeout.value,
        timeout: timeout.value,
    }))
}

fn check_key_prefix(prefix: String) -> Result<String, Complaint> {
    let most = defaults::REDIS_KEY_PREFIX_MAX;
    let visible = prefix.bytes().all(|byte| byte.is_ascii_graphic());
    if visible && (1..=most).contains(&prefix.len()) {
        return Ok(prefix);
    }
    Err(Complaint::new(
        "cannot begin a Redis key",
        format!("allowed: 1 to {most} visible ASCII characters, no spaces"),
    ))
}

pub(super) fn postgres(root: &Section<'_>) -> Option<Postgres> {
    let section = root.section("postgres", &keys::POSTGRES);
    let allow_plaintext = section.boolean("allow_plaintext", defaults::ALLOW_PLAINTEXT);
    let terms = Terms::of(&section, allow_plaintext.value);
    let url = url(&section, |text| {
        urls::check_postgres(text)?;
        tls::ssl_mode(text, terms)
    });
    let useless = url.as_ref().and_then(|(_, mode)| tls::useless_with(*mode));
    let tls = tls::read(&section, useless);
    let connect_timeout = section.duration("connect_timeout", &defaults::POSTGRES_CONNECT_TIMEOUT);
    let statement_timeout = section.duration("statement_timeout", &defaults::STATEMENT_TIMEOUT);
    let lock_timeout = section.duration("lock_timeout", &defaults::LOCK_TIMEOUT);
    let idle = section.duration(
        "idle_in_transaction_timeout",
        &defaults::IDLE_IN_TRANSACTION_TIMEOUT,
    );
    compare(
        section.reader,
        (&idle, &statement_timeout),
        |idle, statement| idle >= statement,
        |idle, statement| {
            Complaint::new(
                format!(
                    "({}) is shorter than `statement_timeout` ({})",
                    duration::format(idle),
                    duration::format(statement)
                ),
                "give a transaction at least the time of its statements",
            )
        },
    );
    let auto_migrate = section.boolean("auto_migrate", defaults::AUTO_MIGRATE);
    url.map(|(url, ssl_mode)| Postgres {
        url,
        tls,
        ssl_mode,
        allow_plaintext: allow_plaintext.value,
        connect_timeout: connect_timeout.value,
        statement_timeout: statement_timeout.value,
        lock_timeout: lock_timeout.value,
        idle_in_transaction_timeout: idle.value,
        auto_migrate: auto_migrate.value,
    })
}

/// Also gives the retention as it was typed, to be compared with what the
/// consumers ask for.
pub(super) fn ledger(root: &Section<'_>) -> (Ledger, Field<Duration>) {
    let section = root.section("ledger", &keys::LEDGER);
    let retention = section.duration("retention", &defaults::RETENTION);
    let prune_every = section.duration("prune_every", &defaults::PRUNE_EVERY);
    let prune_batch = section.integer("prune_batch", &defaults::PRUNE_BATCH);
    let ledger = Ledger {
        retention: retention.value,
        prune_every: prune_every.value,
        prune_batch: prune_batch.value,
    };
    (ledger, retention)
}

pub(super) fn daemon(root: &Section<'_>) -> Daemon {
    let section = root.section("daemon", &keys::DAEMON);
    let shutdown_timeout = section.duration("shutdown_timeout", &defaults::SHUTDOWN_TIMEOUT);
    let least = section.duration("reconnect_min", &defaults::RECONNECT_MIN);
    let most = section.duration("reconnect_max", &defaults::RECONNECT_MAX);
    compare(
        section.reader,
        (&least, &most),
        |least, most| least <= most,
        |least, most| {
            Complaint::new(
                format!(
                    "({}) is longer than `reconnect_max` ({})",
                    duration::format(least),
                    duration::format(most)
                ),
                "the first wait cannot be longer than the longest",
            )
        },
    );
    Daemon {
        shutdown_timeout: shutdown_timeout.value,
        reconnect_min: least.value,
        reconnect_max: most.value,
    }
}

/// The URL from `url` or from the file that `url_file` names, and what `check`
/// found in it.
pub(super) fn url<T>(
    section: &Section<'_>,
    check: impl Fn(&str) -> Result<T, Complaint>,
) -> Option<(Secret, T)> {
    if !keeps_to_one_source(section) {
        return None;
    }
    let accept = |text: String| {
        let found = check(&text)?;
        Ok((Secret::new(text), found))
    };
    let found = if section.has("url_file") {
        let read = |path: String| read_url_file(section, &path);
        section.text("url_file").then(read).then(accept)
    } else {
        section.text("url").then(accept)
    };
    let hint = if section.keys.title == keys::REDIS.title {
        "add `url`, or `url_file` with the path of a file that holds it; without Redis: \
         enabled = false"
    } else {
        MISSING_URL
    };
    found.required(hint).map(|field| field.value)
}

const MISSING_URL: &str = "add `url`, or `url_file` with the path of a file that holds it";

/// The URLs from `url`, which may be a list, or from the file that `url_file`
/// names, one a line.
fn broker_urls(section: &Section<'_>, allow_plaintext: bool) -> Option<Vec<Secret>> {
    if !keeps_to_one_source(section) {
        return None;
    }
    let one = |text: &str| {
        urls::check_amqp(text)?;
        if !allow_plaintext {
            tls::refuse_plaintext(text, "amqps", "[broker]")?;
        }
        Ok(Secret::new(text.to_owned()))
    };
    let all = |urls: Vec<Secret>| urls::check_list(&urls).map(|()| urls);
    let found = if section.has("url_file") {
        let read = |path: String| read_url_file(section, &path);
        let lines = |text: String| {
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            lines.map(one).collect()
        };
        section.text("url_file").then(read).then(lines).then(all)
    } else if section.has_list("url") {
        let list = section.list("url", "[\"amqp://HOST-1\", \"amqp://HOST-2\"]", one);
        let values = |list: Vec<(Secret, _)>| Ok(list.into_iter().map(|(url, _)| url).collect());
        list.then(values).then(all)
    } else {
        section
            .text("url")
            .then(|text| one(&text).map(|url| vec![url]))
    };
    found.required(MISSING_URL).map(|field| field.value)
}

/// Hides what `url` holds, and reports when `url_file` is there too.
fn keeps_to_one_source(section: &Section<'_>) -> bool {
    if !section.has("url") {
        return true;
    }
    section.reader.source.hide(section.span_of("url"));
    if section.has("url_file") {
        section.reader.report(
            section.span_of("url_file"),
            format!("both `url` and `url_file` in {}", section.keys.title),
            "keep one of them",
        );
    }
    !section.has("url_file")
}

fn read_url_file(section: &Section<'_>, path: &str) -> Result<String, Complaint> {
    let path = files::resolve(section.reader.folder, path);
    let text = files::read_text(&path, defaults::URL_FILE_MAX)
        .map_err(|unreadable| unreadable.complaint(&path))?;
    let url = text.trim_end_matches(['\r', '\n']);
    if url.is_empty() {
        return Err(Complaint::new(
            format!("names an empty file: {}", path.display()),
            "write the URL into it, and nothing else",
        ));
    }
    Ok(url.to_owned())
}
