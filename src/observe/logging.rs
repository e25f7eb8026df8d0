//! The log: lines on standard error, each with its fields as `key=value`.

use log::LevelFilter;

/// Starts the log. `RUST_LOG` sets its level (`info` unless told otherwise),
/// except that amiquip stays at `error`: at `debug` it logs the password, and
/// what it warns of is reported here with its consequences.
pub fn start() {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(LevelFilter::Info);
    builder.filter_module("sqlx", LevelFilter::Warn);
    builder.parse_default_env();
    builder.filter_module("amiquip", LevelFilter::Error);
    // A second logger in the process is the caller's choice, not an error.
    builder.try_init().ok();
}
