//! Configuration: the text of `config.toml`, turned once into what is safe to
//! run ([`checked`]), or into everything that is wrong with it
//! ([`ConfigError`]). The only part of the house that reads files and
//! environment variables on the user's behalf. Connects to nothing: whether
//! the servers agree is for others to find out.

pub mod checked;
pub mod defaults;
pub mod keys;

mod changes;
mod consumer;
mod duration;
mod error;
mod files;
mod handler;
mod interpolate;
mod names;
mod observe;
mod print;
mod process;
mod reader;
mod retry;
mod servers;
mod size;
mod source;
mod tls;
mod topology;
mod urls;

use std::path::Path;

use toml::de::DeTable;

pub use changes::changes;
pub use checked::Config;
pub use duration::{format as format_duration, read as read_duration};
pub use error::{ConfigError, Problem};
pub use files::{Stamp, stamp, without_bom};
pub use print::to_toml;
pub use process::ProcessStatus;
pub use size::format as format_size;
pub use source::Place;

use files::Unreadable;
use reader::{Reader, Section};
use source::{Source, Span};

/// Reads the configuration at `path`; `${VAR}`s come from the environment of
/// the process.
///
/// # Errors
///
/// Everything that is wrong with it.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    let text = files::read_text(path, defaults::CONFIG_FILE_MAX)
        .map_err(|unreadable| unreadable_config(path, &unreadable))?;
    parse(&text, path, &|name| std::env::var(name).ok())
}

/// The key files of client certificates that everybody on this machine can
/// read, or write.
#[must_use]
pub fn exposed_keys(config: &Config) -> Vec<&Path> {
    let http = config.consumers.iter().filter_map(|c| match &c.handler {
        checked::Handler::Http(http) => Some(&http.tls),
        _ => None,
    });
    let servers = [&config.broker.tls, &config.postgres.tls];
    let redis = config.redis.iter().map(|redis| &redis.tls);
    let mut keys: Vec<&Path> = servers
        .into_iter()
        .chain(redis)
        .chain(http)
        .filter_map(|tls| Some(tls.client.as_ref()?.key_file.as_path()))
        .filter(|path| files::is_open_to_others(path))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    keys
}

/// Whether what is written to standard error goes to systemd's journal.
#[must_use]
pub fn logs_to_journal() -> bool {
    std::env::var("JOURNAL_STREAM").is_ok_and(|stream| files::stderr_is(&stream))
}

/// Whether whoever reads standard error wants no colours, terminal or not.
#[must_use]
pub fn wants_no_colour() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
        || std::env::var_os("TERM").is_some_and(|value| value == "dumb")
}

/// Whether systemd waits to be told how this process is.
#[must_use]
pub fn is_notify_service() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Reads the configuration `text` as if it stood in `origin`; relative paths
/// in it start at the folder of `origin`, and `env` knows the variables. Reads
/// the files that the configuration names, and nothing else.
///
/// # Errors
///
/// Everything that is wrong with it. Text that is not TOML is looked at no
/// further than that.
pub fn parse(
    text: &str,
    origin: &Path,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Config, ConfigError> {
    let folder = origin.parent().unwrap_or(Path::new(""));
    let reader = Reader::new(text, folder, env);
    let fail = |reader: Reader<'_>| Err(ConfigError::new(origin, reader.into_problems()));
    let (table, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        report_syntax(&reader, &errors);
        return fail(reader);
    }
    let config = read(&reader, table.get_ref());
    match config {
        Some(config) if !reader.has_findings() => Ok(config),
        _ => fail(reader),
    }
}

/// Every section in turn; `None` where a part could not be made, which is
/// reported.
fn read(reader: &Reader<'_>, table: &DeTable<'_>) -> Option<Config> {
    let root = Section::root(reader, table);
    let broker = servers::broker(&root);
    let redis = servers::redis(&root);
    let postgres = servers::postgres(&root);
    let (ledger, retention) = servers::ledger(&root);
    let daemon = servers::daemon(&root);
    let admin = observe::admin(&root);
    let log_format = observe::log_format(&root);
    let consumers = consumer::consumers(&root, &retention);
    Some(Config {
        broker: broker?,
        redis: redis?,
        postgres: postgres?,
        ledger,
        daemon,
        admin,
        log_format,
        consumers,
    })
}

/// One problem for each line: what follows on the same line is mostly a
/// consequence of it.
fn report_syntax(reader: &Reader<'_>, errors: &[toml::de::Error]) {
    let mut last_line = 0;
    for error in errors {
        let end = reader.source.text.len();
        let span = Span::from(error.span().unwrap_or(end..end));
        let line = reader.source.line_number(span.start);
        if line == last_line {
            continue;
        }
        last_line = line;
        let hint = if error.message().starts_with("duplicate key") {
            "keep one of them"
        } else {
            "strings need quotes, and each key its own line; the values are looked at once the \
             file is TOML"
        };
        reader.report(span, format!("not TOML: {}", error.message()), hint);
    }
}

fn unreadable_config(path: &Path, unreadable: &Unreadable) -> ConfigError {
    let (place, message, hint) = match unreadable {
        Unreadable::Io(cause) => (
            None,
            format!("failed to read the configuration: {cause}"),
            "name the file with --config",
        ),
        Unreadable::TooLong(limit) => (
            None,
            format!("failed to read the configuration: longer than {limit} bytes"),
            "name the right file with --config",
        ),
        Unreadable::NotUtf8(valid) => (
            Some(Source::new(valid).place(Span::from(valid.len()..valid.len()))),
            "failed to read the configuration: not UTF-8".to_owned(),
            "save the file as UTF-8",
        ),
    };
    let problem = Problem {
        place,
        message,
        hint: hint.to_owned(),
    };
    ConfigError::new(path, vec![problem])
}
