//! The daemon with handlers of your own: a program of a few lines that does all
//! that `ackonce run` does.
//!
//! ```no_run
//! use std::process::ExitCode;
//!
//! use ackonce::worker::{Daemon, Handler, Message, Outcome, StartError, Transaction, sqlx};
//!
//! struct Orders;
//!
//! impl Handler for Orders {
//!     fn apply(
//!         &mut self,
//!         message: &Message<'_>,
//!         transaction: &mut Transaction<'_>,
//!     ) -> Result<(), Outcome> {
//!         let order: i64 = std::str::from_utf8(message.body())
//!             .ok()
//!             .and_then(|text| text.trim().parse().ok())
//!             .ok_or_else(|| Outcome::reject("the body is no number"))?;
//!         transaction.run(async |connection| {
//!             sqlx::query("INSERT INTO orders (id) VALUES ($1)")
//!                 .bind(order)
//!                 .execute(connection)
//!                 .await
//!         })?;
//!         Ok(())
//!     }
//! }
//!
//! fn main() -> Result<ExitCode, StartError> {
//!     Ok(Daemon::from_config("/etc/ackonce/config.toml")?
//!         .handler("orders", || Orders)
//!         .run())
//! }
//! ```
//!
//! In the configuration the consumer has `type = "rust"`. A [`Handler`] writes
//! through the ledger's transaction, and its messages take effect exactly once.
//! A [`KeyedHandler`] works on something else (`effect = "keyed"`): at least
//! once, and exactly once where the receiver honours [`Message::key`].
//!
//! A handler that panics has failed that attempt, and a new one is made. Its
//! messages are tried again, as after [`Outcome::Retry`].

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::cli::Exit;
use crate::cli::run::run_daemon;
use crate::config::checked;
use crate::config::{self, Config};
use crate::handler::rust::{Makers, Misfit};
use crate::observe::logging;

pub use crate::handler::rust::{
    Cancelled, DatabaseError, Handler, KeyedHandler, Message, Outcome, Transaction,
};
/// Of the version that [`Transaction::run`] hands out a connection of.
pub use sqlx;

/// Why the configuration cannot be used: everything that is wrong with it.
/// `Debug` shows the same text, for `main` to return it.
#[derive(thiserror::Error)]
#[error("{0}")]
pub struct StartError(config::ConfigError);

impl std::fmt::Debug for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

impl StartError {
    /// The exit status of `ackonce run` for it: 78.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        Exit::Config.into()
    }
}

/// The daemon of one configuration, with the program's handlers.
#[must_use = "it runs when `run` is called"]
pub struct Daemon {
    config: Config,
    path: PathBuf,
    makers: Makers,
}

impl Daemon {
    /// Reads the configuration at `path`. Connects to nothing.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with it, each with its line.
    pub fn from_config(path: impl AsRef<Path>) -> Result<Self, StartError> {
        Ok(Self {
            config: config::load(path.as_ref()).map_err(StartError)?,
            path: path.as_ref().to_owned(),
            makers: Makers::default(),
        })
    }

    /// Has `make` make a handler for each worker of `consumer`, and another
    /// after a panic. `make` itself must not panic.
    pub fn handler<H: Handler>(
        mut self,
        consumer: &str,
        make: impl Fn() -> H + Send + Sync + 'static,
    ) -> Self {
        self.makers.add(consumer, make);
        self
    }

    /// As [`Daemon::handler`], for a handler that works outside the database.
    pub fn keyed_handler<H: KeyedHandler>(
        mut self,
        consumer: &str,
        make: impl Fn() -> H + Send + Sync + 'static,
    ) -> Self {
        self.makers.add_keyed(consumer, make);
        self
    }

    /// Runs as `ackonce run` does: until SIGTERM or SIGINT, or until it cannot
    /// go on; reads its configuration again on SIGHUP. Takes the process's signals, and logs to standard error unless
    /// the program has set a logger. The exit status is that of `ackonce run`:
    /// 0 after a stop, 78 when configuration and handlers do not fit.
    #[must_use]
    pub fn run(self) -> ExitCode {
        logging::start(config::logs_to_journal());
        if let Some(misfit) = self.unused() {
            log::error!("{misfit}");
            return Exit::Config.into();
        }
        run_daemon(self.config, self.path, self.makers)
            .unwrap_or_else(|exit| exit)
            .into()
    }

    fn unused(&self) -> Option<Misfit> {
        let wanted = |name: &str| {
            let of_that_name = self.config.consumers.iter().find(|c| c.name == name);
            of_that_name.is_some_and(|c| matches!(c.handler, checked::Handler::Rust(_)))
        };
        let unused = self.makers.consumers().find(|name| !wanted(name))?;
        Some(Misfit::Unused(unused.to_owned()))
    }
}
