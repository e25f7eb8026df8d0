//! The log: one line on standard error for each event, as text or as a JSON
//! object, each with its fields. No line holds a control character, so that
//! nothing a server says can look like another line.

mod queue;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{IsTerminal as _, Write as _};
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};

use env_logger::fmt::Formatter;
use env_logger::{Target, WriteStyle};
use log::kv::{Error, Key, Value, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::config::{self, checked::LogFormat};

/// Longest wait at the end of the daemon for its last lines to be written.
const FLUSH_WITHIN: std::time::Duration = std::time::Duration::from_millis(500);

static TO_JOURNAL: AtomicBool = AtomicBool::new(false);
static AS_JSON: AtomicBool = AtomicBool::new(false);

/// Starts the log, as text; for the journal if `to_journal`, which wants to be
/// told a line's priority and knows its time. `RUST_LOG` sets its level (`info`
/// unless told otherwise), save for what may quote a secret: that is held back
/// at every level.
pub fn start(to_journal: bool) {
    TO_JOURNAL.store(to_journal, Ordering::Relaxed);
    let mut builder = env_logger::Builder::new();
    builder.filter_level(LevelFilter::Info);
    builder.filter_module("sqlx", LevelFilter::Warn);
    builder.target(Target::Pipe(Box::new(queue::Lines)));
    builder.write_style(style());
    builder.parse_default_env();
    builder.format(write);
    let logger = builder.build();
    let level = logger.filter();
    // A second logger in the process is the caller's choice, not an error.
    if log::set_boxed_logger(Box::new(Capped(logger))).is_ok() {
        log::set_max_level(level);
    }
}

/// Colours for somebody who sees them.
fn style() -> WriteStyle {
    match std::io::stderr().is_terminal() && !config::wants_no_colour() {
        true => WriteStyle::Always,
        false => WriteStyle::Never,
    }
}

/// From now on nobody who logs waits for standard error: a thread writes, and
/// what finds no place in its queue is dropped, counted and told.
///
/// # Errors
///
/// When there is no thread to be had.
pub fn detach() -> std::io::Result<()> {
    queue::start()
}

/// Logs panics, in place of writing them to standard error, which can block.
/// For the program alone: another one may have a hook of its own.
pub fn take_panics() {
    std::panic::set_hook(Box::new(panicked));
}

/// Gives the last lines a moment to be written.
pub fn flush() {
    queue::flush(FLUSH_WITHIN);
}

/// Lines that were dropped since the start of the process.
#[must_use]
pub fn dropped() -> u64 {
    queue::dropped()
}

fn panicked(info: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let trace = Backtrace::capture();
    let trace = match trace.status() {
        BacktraceStatus::Captured => format!("\n{trace}"),
        _ => String::new(),
    };
    log::error!(
        "thread '{}' {info}{trace}",
        thread.name().unwrap_or("<unnamed>")
    );
}

/// Writes further lines as the configuration wants them.
pub fn set_format(format: LogFormat) {
    AS_JSON.store(format == LogFormat::Json, Ordering::Relaxed);
}

fn write(out: &mut Formatter, record: &Record<'_>) -> std::io::Result<()> {
    let to_journal = TO_JOURNAL.load(Ordering::Relaxed);
    if to_journal {
        write!(out, "<{}>", priority(record.level()))?;
    }
    if AS_JSON.load(Ordering::Relaxed) {
        let time = out.timestamp_millis().to_string();
        return writeln!(out, "{}", json(&time, record));
    }
    if !to_journal {
        let time = out.timestamp_millis();
        let level = record.level();
        let style = out.default_level_style(level);
        write!(out, "{time} {style}{level:<5}{style:#} ")?;
    }
    writeln!(out, "{}", text(record))
}

/// As in syslog.
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

fn text(record: &Record<'_>) -> String {
    let message = record.args().to_string();
    let mut line = format!("{}: {}", record.target(), one_line(&message));
    each_field(record, |key, value| {
        let value = value.to_string();
        let plain = !value.is_empty()
            && value
                .chars()
                .all(|c| !c.is_whitespace() && !c.is_control() && c != '"' && c != '=');
        let shown = match plain {
            true => value,
            false => serde_json::Value::from(value).to_string(),
        };
        line.extend([" ", key, "=", shown.as_str()]);
    });
    line
}

fn json(time: &str, record: &Record<'_>) -> String {
    let mut object = serde_json::Map::new();
    object.insert("time".to_owned(), time.into());
    object.insert(
        "level".to_owned(),
        record.level().as_str().to_ascii_lowercase().into(),
    );
    object.insert("target".to_owned(), record.target().into());
    object.insert("message".to_owned(), record.args().to_string().into());
    each_field(record, |key, value| {
        let number = value.to_u64().map(serde_json::Value::from);
        let number = number.or(value.to_i64().map(serde_json::Value::from));
        object.insert(
            key.to_owned(),
            number.unwrap_or_else(|| value.to_string().into()),
        );
    });
    serde_json::Value::Object(object).to_string()
}

/// Calls `show` with each field, and with one that says so where another
/// crate's fields cannot be read to their end.
fn each_field(record: &Record<'_>, show: impl FnMut(&str, &Value<'_>)) {
    let mut fields = Fields(show);
    if let Err(error) = record.key_values().visit(&mut fields) {
        (fields.0)("unreadable_fields", &Value::from_display(&error));
    }
}

/// Calls its function with each field.
struct Fields<F>(F);

impl<'kvs, F: FnMut(&str, &Value<'_>)> VisitSource<'kvs> for Fields<F> {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        (self.0)(key.as_str(), &value);
        Ok(())
    }
}

/// Line breaks, with the indentation after them, become a space; other control
/// characters are escaped.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    let mut after_break = false;
    for character in text.chars() {
        match character {
            '\n' | '\r' => after_break = true,
            ' ' | '\t' if after_break => {}
            _ => {
                if std::mem::take(&mut after_break) {
                    line.push(' ');
                }
                if character.is_control() {
                    line.extend(character.escape_default());
                } else {
                    line.push(character);
                }
            }
        }
    }
    line
}

/// A log that keeps other people's secrets whatever `RUST_LOG` says: amiquip
/// logs the password at `debug`, and what it warns of is reported here with its
/// consequences; sqlx passes on the notices of the user's own SQL, which may
/// quote a message; ureq logs URLs and headers at `debug`.
struct Capped<L>(L);

fn is_held_back(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    target.starts_with("amiquip") && metadata.level() > Level::Error
        || target.starts_with("sqlx::postgres::notice")
        || target.starts_with("ureq") && metadata.level() > log::Level::Warn
}

impl<L: Log> Log for Capped<L> {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        !is_held_back(metadata) && self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !is_held_back(record.metadata()) {
            self.0.log(record);
        }
    }

    fn flush(&self) {
        self.0.flush();
    }
}

#[cfg(test)]
mod tests {
    use log::{Level, Metadata, Record};

    use super::*;

    #[test]
    fn what_may_hold_a_secret_is_held_back_at_every_level() {
        for (target, level, held) in [
            ("amiquip::io_loop", Level::Debug, true),
            ("amiquip::io_loop", Level::Warn, true),
            ("amiquip::io_loop", Level::Error, false),
            ("sqlx::postgres::notice", Level::Error, true),
            ("sqlx::query", Level::Warn, false),
            ("ureq::run", Level::Debug, true),
            ("ureq_proto::client", Level::Trace, true),
            ("ackonce::daemon", Level::Trace, false),
        ] {
            let metadata = Metadata::builder().target(target).level(level).build();
            assert_eq!(is_held_back(&metadata), held, "{target} {level}");
        }
    }

    #[test]
    fn nothing_that_is_logged_can_look_like_another_line() {
        let fields = [("consumer", "or\nders"), ("code", "42P01"), ("empty", "")];
        let record = Record::builder()
            .args(format_args!("a\n  hint: b\x1b[31m\r\n<3>c"))
            .level(Level::Warn)
            .target("ackonce")
            .key_values(&fields)
            .build();
        let line = text(&record);
        assert_eq!(
            line,
            r#"ackonce: a hint: b\u{1b}[31m <3>c consumer="or\nders" code=42P01 empty="""#
        );
    }

    /// Breaks off after its first field.
    struct Broken;

    impl log::kv::Source for Broken {
        fn visit<'kvs>(&'kvs self, visitor: &mut dyn VisitSource<'kvs>) -> Result<(), Error> {
            visitor.visit_pair(Key::from("code"), Value::from(7))?;
            Err(Error::msg("out of order"))
        }
    }

    #[test]
    fn a_line_whose_fields_break_off_is_written_and_says_so() {
        let record = Record::builder()
            .args(format_args!("a"))
            .level(Level::Info)
            .target("other")
            .key_values(&Broken)
            .build();
        let line = text(&record);
        assert_eq!(line, r#"other: a code=7 unreadable_fields="out of order""#);
        let read: serde_json::Value = serde_json::from_str(&json("now", &record)).unwrap();
        assert_eq!(read["code"], 7);
        assert_eq!(read["unreadable_fields"], "out of order");
    }

    #[test]
    fn json_keeps_every_field_on_one_line() {
        let fields = [("deliveries", 3_u64)];
        let record = Record::builder()
            .args(format_args!("a\n\"b\""))
            .level(Level::Info)
            .target("ackonce")
            .key_values(&fields)
            .build();
        let line = json("now", &record);
        assert!(!line.contains('\n'), "{line}");
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(read["message"], "a\n\"b\"");
        assert_eq!(read["level"], "info");
        assert_eq!(read["deliveries"], 3);
    }
}
