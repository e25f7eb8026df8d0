//! What people type: configurations, SQL, moments and durations.

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use ackonce::broker::address::Address;
use ackonce::config::checked::{BatchMode, Config, SqlHandler as Script};
use ackonce::config::defaults::RETRY_AFTER_MAX;
use ackonce::config::{self, ConfigError, format_duration, read_duration, to_toml};
use ackonce::dead_letter::time;
use ackonce::handler::http::retry_after;
use ackonce::handler::sql::SqlHandler;

/// A configuration with little more than what must be there.
pub(super) const BASE: &str = r#"[broker]
allow_plaintext = true
url = "amqp://h"
[redis]
allow_plaintext = true
url = "redis://h"
[postgres]
allow_plaintext = true
url = "postgres://h/d"
[ledger]
retention = "7d"
[admin]
listen = "127.0.0.1:9478"
[[consumer]]
name = "orders"
max_body = "1MiB"
identity = "message-id"
[consumer.retry]
backoff = ["1s"]
[consumer.topology]
queue = "orders"
[consumer.handler]
type = "sql"
sql = "SELECT 1"
"#;

/// Shows nowhere.
const PASSWORD: &str = "hunter2";

/// A value of [`BASE`], what takes its place, `@` being the text, and what the
/// text begins with.
type Slot = (&'static str, &'static str, &'static str);

const SQL: &str = "type = \"sql\"\nsql = \"SELECT 1\"";
const SLOTS: [Slot; 22] = [
    ("url = \"amqp://h\"", "url = @", ""),
    ("url = \"amqp://h\"", "url = @", "amqp://u:hunter2"),
    ("url = \"redis://h\"", "url = @", ""),
    ("url = \"redis://h\"", "url = @", "redis://u:hunter2"),
    ("url = \"postgres://h/d\"", "url = @", ""),
    (
        "url = \"postgres://h/d\"",
        "url = @",
        "postgres://u:hunter2",
    ),
    ("\"7d\"", "@", ""),
    ("\"127.0.0.1:9478\"", "@", ""),
    ("name = \"orders\"", "name = @", ""),
    ("\"1MiB\"", "@", ""),
    ("\"message-id\"", "@", ""),
    ("\"1s\"", "@", ""),
    (
        "[consumer.topology]",
        "[consumer.failures]\ntransient = [@]\n[consumer.topology]",
        "",
    ),
    ("queue = \"orders\"", "queue = @", ""),
    ("queue = \"orders\"", "dead_letter_queue = @", ""),
    ("queue = \"orders\"", "binding = [{ exchange = @ }]", ""),
    (SQL, "type = \"sql\"\nsql = @", ""),
    (SQL, "type = \"http\"\nurl = @", "http"),
    (
        SQL,
        "type = \"http\"\nurl = \"http://h\"\nkey_header = @",
        "",
    ),
    (
        SQL,
        "type = \"http\"\nurl = \"http://h\"\nsigning_secrets = [@]",
        "whsec_",
    ),
    (
        SQL,
        "type = \"http\"\nurl = \"http://h\"\nheaders = { X-A = @ }",
        "",
    ),
    (SQL, "type = \"command\"\nargv = [\"/bin/true\", @]", ""),
];

/// Microseconds since 1970 whose years have four digits: others are reached by
/// durations alone.
const YEARS: RangeInclusive<i64> = -62_167_219_200_000_000..=253_402_300_799_999_999;

/// The configuration in `text`, as the checks read it.
///
/// # Errors
///
/// What is wrong with it.
pub fn parse(text: &str) -> Result<Config, ConfigError> {
    // No file is there.
    let origin = Path::new("/nonexistent/ackonce/config.toml");
    config::parse(text, origin, &|name| {
        (name == "SET").then(|| "x".to_owned())
    })
}

/// The text of a configuration.
pub fn config(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        reads_or_explains(text).ok();
    }
}

/// One value in a sound configuration; the first byte says which.
pub fn values(data: &[u8]) {
    let Some((&slot, text)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let (place, with, begin) = SLOTS[usize::from(slot) % SLOTS.len()];
    let value = quoted(&format!("{begin}{text}"));
    let text = BASE.replace(place, &with.replace('@', &value));
    let told = match reads_or_explains(&text) {
        Ok(config) => {
            for url in &config.broker.urls {
                Address::parse(url).expect("a broker's URL that was accepted");
            }
            format!("{config:?}{}", to_toml(&config, false))
        }
        Err(error) => format!("{error}{error:?}"),
    };
    assert!(
        !begin.contains(PASSWORD) || !told.contains(PASSWORD),
        "a password shows: {told}"
    );
}

/// `text` as a string of TOML.
fn quoted(text: &str) -> String {
    // TOML escapes what JSON does, and DEL.
    serde_json::Value::from(text)
        .to_string()
        .replace('\u{7f}', "\\u007f")
}

/// A configuration that is read can be printed and read again; one that is not
/// has problems with places in the text.
fn reads_or_explains(text: &str) -> Result<Config, ConfigError> {
    let read = parse(text);
    match &read {
        Ok(config) => {
            let printed = to_toml(config, true);
            let again = parse(&printed).unwrap_or_else(|error| panic!("{printed}\n{error}"));
            assert_eq!(&again, config);
        }
        Err(error) => {
            assert!(!error.problems().is_empty());
            assert!(!super::has_control(&error.to_string()), "{error}");
            for problem in error.problems() {
                assert!(!problem.hint.is_empty(), "{problem:?}");
                let place = problem.place.as_ref().expect("a place");
                let line = text.split('\n').nth(place.line - 1).expect("a line");
                assert!(place.column <= line.chars().count() + 1, "{problem:?}");
                let shown = place.excerpt.chars().count();
                assert!(place.caret_start <= shown, "{problem:?}");
            }
        }
    }
    read
}

/// A script for the `sql` handler: it is split, or the line at fault is named;
/// and statements before and behind it make no difference to that.
pub fn sql(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let split = |text: String| {
        SqlHandler::new(&Script {
            text,
            origin: "inline".to_owned(),
            batch: BatchMode::Each,
        })
    };
    match split(text.to_owned()) {
        Ok(_) => {
            let between = format!("SELECT 1;\n{text}\n;SELECT 2");
            split(between).expect("the same statement among others");
        }
        Err(error) => {
            let lines = text.split('\n').count() as u64;
            assert!((1..=lines).contains(&error.line), "{error}");
        }
    }
}

/// What is typed or sent as a time: a duration, a moment, `Retry-After` with the
/// receiver's `Date` on the next line.
pub fn times(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let now = 1_777_863_721;
    if let Ok(duration) = read_duration(text) {
        assert_eq!(read_duration(&format_duration(duration)), Ok(duration));
    }
    if let Ok(moment) = time::read(text, now * 1_000_000) {
        let text = time::format(moment);
        if YEARS.contains(&moment) {
            assert_eq!(time::read(&text, 0), Ok(moment - moment.rem_euclid(1_000)));
        }
    }
    let (value, date) = match text.split_once('\n') {
        Some((value, date)) => (value, Some(date)),
        None => (text, None),
    };
    let seconds = Duration::from_secs(now.unsigned_abs());
    if let Some(wait) = retry_after::wait(value, date, UNIX_EPOCH + seconds) {
        assert!(!wait.is_zero() && wait <= RETRY_AFTER_MAX);
    }
}
