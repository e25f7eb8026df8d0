//! The log: lines on standard error, each with its fields as `key=value`.

use log::{LevelFilter, Log, Metadata, Record};

/// Starts the log. `RUST_LOG` sets its level (`info` unless told otherwise),
/// save for what may quote a secret: that is held back at every level.
pub fn start() {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(LevelFilter::Info);
    builder.filter_module("sqlx", LevelFilter::Warn);
    builder.parse_default_env();
    let logger = builder.build();
    let level = logger.filter();
    // A second logger in the process is the caller's choice, not an error.
    if log::set_boxed_logger(Box::new(Capped(logger))).is_ok() {
        log::set_max_level(level);
    }
}

/// A log that keeps other people's secrets whatever `RUST_LOG` says: amiquip
/// logs the password at `debug`, and what it warns of is reported here with its
/// consequences; sqlx passes on the notices of the user's own SQL, which may
/// quote a message; ureq logs URLs and headers at `debug`.
struct Capped<L>(L);

fn is_held_back(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    target.starts_with("amiquip") && metadata.level() > log::Level::Error
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
    use log::{Level, Metadata};

    use super::is_held_back;

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
}
