//! One session with PostgreSQL, driven by the thread that owns it.
//!
//! Each worker has a current-thread runtime and a raw connection of its own:
//! about 1 µs a call, where a pool shared through a multi-threaded runtime
//! costs five. The ledger and the handlers use the same session, because their
//! rows must commit together. What the statements mean is not known here.

use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgDatabaseError, PgSeverity, PgSslMode};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use crate::config::checked::{self, SslMode};
use crate::failure::{Class, Failure, class_of_sqlstate};
use crate::trust;

/// How much longer than the server's own `statement_timeout` a reply is waited
/// for: past it the server or the network is taken for dead.
const REPLY_GRACE: Duration = Duration::from_secs(5);

/// Ends a transaction. What a handler has set for the session and not for its
/// transaction alone is put back before a statement of ours can meet it; a
/// transaction that is rolled back takes it along by itself.
const COMMIT: &str = "COMMIT; RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL";

/// Sessions that were opened by this process.
static SESSIONS: AtomicU64 = AtomicU64::new(0);

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The server said no; the session can go on (an open transaction cannot).
    #[error("{0}")]
    Refused(Failure),
    /// There is no session, and nothing was sent.
    #[error("failed to connect to PostgreSQL at {address}: {cause}")]
    Unreachable {
        /// Host and port.
        address: String,
        /// Why not.
        cause: String,
    },
    /// The session is gone, and whether its last statement took effect is unknown.
    #[error("lost the PostgreSQL session: {0}")]
    Lost(String),
}

impl Error {
    /// The failure for journal and log.
    #[must_use]
    pub fn into_failure(self) -> Failure {
        match self {
            Self::Refused(failure) => failure,
            Self::Unreachable { .. } | Self::Lost(_) => Failure {
                class: Class::Systemic,
                code: None,
                text: self.to_string(),
                retry_after: None,
            },
        }
    }
}

/// A server's error, in parts.
#[derive(Debug)]
pub struct Refusal {
    /// Its SQLSTATE.
    pub code: String,
    /// Its message.
    pub message: String,
    /// The table it names, or nothing.
    pub table: String,
    /// The column it names, or nothing.
    pub column: String,
    /// The constraint it names, or nothing.
    pub constraint: String,
}

impl Refusal {
    /// The failure, with its class, for journal and log. The error's detail is
    /// no part of it: it quotes the row, and with it the message's content.
    #[must_use]
    pub fn into_failure(self) -> Failure {
        let mut text = self.message;
        for (label, value) in [
            ("table", self.table),
            ("column", self.column),
            ("constraint", self.constraint),
        ] {
            if !value.is_empty() && !text.contains(&value) {
                text.push_str(&format!(", {label} {value}"));
            }
        }
        Failure {
            class: class_of_sqlstate(&self.code),
            code: Some(self.code),
            text,
            retry_after: None,
        }
    }
}

/// A connection and the runtime that drives it.
pub struct Session {
    id: u64,
    /// Ends a transaction and puts back what it may have set for the session.
    commit: String,
    connection: PgConnection,
    runtime: tokio::runtime::Runtime,
    reply_timeout: Duration,
    /// For a reply to what takes the server no time.
    prompt_timeout: Duration,
    /// Nothing more may be run on it.
    abandoned: bool,
}

impl Session {
    /// Connects, within the configuration's `connect_timeout`.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] when the server answered with an error (wrong
    /// password, no such database), [`Error::Unreachable`] when it did not answer.
    pub fn open(config: &checked::Postgres, purpose: &str) -> Result<Self, Error> {
        let options = connect_options(config, purpose)?;
        let unreachable = |cause: String| Error::Unreachable {
            address: address(&options),
            cause,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| unreachable(format!("no runtime: {e}")))?;
        let connecting = async {
            let mut connection = PgConnection::connect_with(&options).await?;
            let settings = settle(&mut connection).await?;
            Ok((connection, settings))
        };
        let connected = runtime
            .block_on(async { tokio::time::timeout(config.connect_timeout, connecting).await });
        let cause = match connected {
            Ok(Ok((connection, settings))) => {
                return Ok(Self {
                    id: SESSIONS.fetch_add(1, Ordering::Relaxed),
                    commit: format!("{COMMIT}; {}", settings.join("; ")),
                    connection,
                    runtime,
                    reply_timeout: config.statement_timeout + REPLY_GRACE,
                    prompt_timeout: config.connect_timeout,
                    abandoned: false,
                });
            }
            Ok(Err(error)) => match from_sqlx(&error) {
                refused @ (Error::Refused(_) | Error::Unreachable { .. }) => refused,
                Error::Lost(cause) => unreachable(cause),
            },
            Err(_) => {
                let within = config.connect_timeout;
                unreachable(format!("no answer within {within:?} (connect_timeout)"))
            }
        };
        // A name that is still being looked up is not waited for.
        runtime.shutdown_background();
        Err(cause)
    }

    /// Runs `call` to its end, or to the time when the server is taken for dead.
    ///
    /// # Errors
    ///
    /// After [`Error::Lost`] the session must be dropped.
    pub fn run<T>(
        &mut self,
        call: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Error> {
        self.run_within(self.reply_timeout, call)
    }

    // sqlx lets nobody set the options of its sockets, TCP's keepalive for one:
    // a server that vanished is found out by this clock alone.
    fn run_within<T>(
        &mut self,
        within: Duration,
        call: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, Error> {
        if self.abandoned {
            return Err(Error::Lost("it was given up".to_owned()));
        }
        let connection = &mut self.connection;
        self.runtime.block_on(async move {
            match tokio::time::timeout(within, call(connection)).await {
                Ok(result) => result.map_err(|e| from_sqlx(&e)),
                Err(_) => Err(Error::Lost(format!("no reply within {within:?}"))),
            }
        })
    }

    /// Which session of this process it is.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Sets something for as long as the session lasts.
    ///
    /// # Errors
    ///
    /// As [`Session::run`].
    pub fn set(&mut self, statement: &'static str) -> Result<(), Error> {
        self.execute(statement)?;
        self.commit.push_str("; ");
        self.commit.push_str(statement);
        Ok(())
    }

    /// Commits the open transaction, and puts the session's settings back.
    ///
    /// # Errors
    ///
    /// As [`Session::run`]; [`Error::Lost`] leaves open what became of it.
    pub fn commit(&mut self) -> Result<(), Error> {
        let text = self.commit.clone();
        self.run(async |connection| {
            sqlx::raw_sql(AssertSqlSafe(text))
                .execute(connection)
                .await?;
            Ok(())
        })
    }

    /// Gives the session up: from now on every call fails with
    /// [`Error::Lost`], so that whoever holds it drops it.
    pub fn abandon(&mut self) {
        self.abandoned = true;
    }

    /// Runs statements that take no parameters.
    ///
    /// # Errors
    ///
    /// As [`Session::run`].
    pub fn execute(&mut self, statements: &'static str) -> Result<(), Error> {
        self.run(async |connection| {
            sqlx::raw_sql(statements).execute(connection).await?;
            Ok(())
        })
    }

    /// As [`Session::execute`], for what needs nothing but the server's
    /// attention, such as BEGIN: it must answer as soon as it must let us in,
    /// so that a session whose server vanished long ago is not waited for.
    ///
    /// # Errors
    ///
    /// As [`Session::run`].
    pub fn execute_at_once(&mut self, statements: &'static str) -> Result<(), Error> {
        self.run_within(self.prompt_timeout, async |connection| {
            sqlx::raw_sql(statements).execute(connection).await?;
            Ok(())
        })
    }

    /// What the server's own settings put at risk, one sentence for each.
    ///
    /// # Errors
    ///
    /// As [`Session::run`].
    pub fn risks(&mut self) -> Result<Vec<&'static str>, Error> {
        let off: Vec<String> = self.run(async |connection| {
            // The session's own value is `settle`'s: the other is what it was.
            sqlx::query_scalar(
                "SELECT name FROM pg_catalog.pg_settings WHERE reset_val = 'off' \
                 AND name IN ('synchronous_commit', 'fsync', 'full_page_writes') ORDER BY name",
            )
            .fetch_all(connection)
            .await
        })?;
        Ok(RISKS
            .iter()
            .filter(|(name, _)| off.iter().any(|setting| setting == name))
            .map(|(_, risk)| *risk)
            .collect())
    }
}

/// Settings that must not be off, and what it means when they are.
const RISKS: [(&str, &str); 3] = [
    (
        "fsync",
        "fsync is off: a crash of the server's machine can lose or damage the ledger with messages \
         that are acknowledged; switch it on in postgresql.conf",
    ),
    (
        "full_page_writes",
        "full_page_writes is off: a crash of the server's machine can damage the ledger; switch \
         it on in postgresql.conf",
    ),
    (
        "synchronous_commit",
        "synchronous_commit is off: the daemon switches it on for its own sessions, since a crash \
         of the server could lose messages that are acknowledged; a handler must not switch it off",
    ),
];

/// What is set once a session is open, because not every server knows it or
/// lets it be set while connecting.
///
/// What is committed must outlive the server: other values than `off` are the
/// operator's to choose, they all wait for the disk. And the locks of a daemon
/// that was killed go within a second, and not when its statement ends.
const DURABLE: &str = "SET synchronous_commit = 'on'";
const WATCHED: &str = "SET client_connection_check_interval = '1s'";

/// What is built in comes first, whatever a search path says: nobody's operator
/// takes the place of one in our statements.
const BUILT_IN: &str = "SELECT pg_catalog.set_config('search_path', \
     pg_catalog.concat('pg_catalog, ', pg_catalog.current_setting('search_path')), false) \
     WHERE (pg_catalog.current_schemas(true))[1] OPERATOR(pg_catalog.<>) 'pg_catalog'";

/// Sets it, and returns what was set.
async fn settle(connection: &mut PgConnection) -> Result<Vec<&'static str>, sqlx::Error> {
    let mut settings = Vec::new();
    let moved = sqlx::raw_sql(BUILT_IN).execute(&mut *connection).await?;
    if moved.rows_affected() > 0 {
        settings.push(BUILT_IN);
    }
    let current = "SELECT pg_catalog.current_setting('synchronous_commit')";
    let current: String = sqlx::query_scalar(current)
        .fetch_one(&mut *connection)
        .await?;
    if current == "off" {
        sqlx::raw_sql(DURABLE).execute(&mut *connection).await?;
        settings.push(DURABLE);
    }
    match sqlx::raw_sql(WATCHED).execute(&mut *connection).await {
        Ok(_) => settings.push(WATCHED),
        // Not on every operating system.
        Err(sqlx::Error::Database(_)) => {}
        Err(error) => return Err(error),
    }
    Ok(settings)
}

fn connect_options(config: &checked::Postgres, purpose: &str) -> Result<PgConnectOptions, Error> {
    // sqlx's own error would print the URL, and with it the password.
    let options = PgConnectOptions::from_str(config.url.expose()).map_err(|_| {
        unusable("failed to read the PostgreSQL URL: see `ackonce check`".to_owned())
    })?;
    let milliseconds = |d: Duration| d.as_millis().to_string();
    Ok(with_tls(options, config)?
        .application_name(&format!("ackonce {purpose}"))
        .options([
            ("statement_timeout", milliseconds(config.statement_timeout)),
            ("lock_timeout", milliseconds(config.lock_timeout)),
            (
                "idle_in_transaction_session_timeout",
                milliseconds(config.idle_in_transaction_timeout),
            ),
            // The server gives a worker up that vanished without a word.
            ("tcp_keepalives_idle", "30".to_owned()),
            ("tcp_keepalives_interval", "10".to_owned()),
            ("tcp_keepalives_count", "3".to_owned()),
            (
                "tcp_user_timeout",
                milliseconds(config.idle_in_transaction_timeout),
            ),
        ])
        .log_statements(log::LevelFilter::Off)
        .log_slow_statements(log::LevelFilter::Off, Duration::ZERO))
}

/// What is configured cannot be used.
fn unusable(text: String) -> Error {
    Error::Refused(Failure {
        class: Class::Systemic,
        code: None,
        text,
        retry_after: None,
    })
}

/// What the configuration says about TLS, in the place of what the URL says.
fn with_tls(
    options: PgConnectOptions,
    config: &checked::Postgres,
) -> Result<PgConnectOptions, Error> {
    // In a certificate an IPv6 address stands without brackets.
    let host = options.get_host();
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let options = match bare.map(str::to_owned) {
        Some(host) => options.host(&host),
        None => options,
    };
    let options = options.ssl_mode(match config.ssl_mode {
        SslMode::Disable => PgSslMode::Disable,
        SslMode::Prefer => PgSslMode::Prefer,
        SslMode::Require => PgSslMode::Require,
        SslMode::VerifyCa => PgSslMode::VerifyCa,
        SslMode::VerifyFull => PgSslMode::VerifyFull,
    });
    if !matches!(config.ssl_mode, SslMode::VerifyCa | SslMode::VerifyFull) {
        return Ok(options);
    }
    let pem = trust::pem(&config.tls).map_err(|error| unusable(error.to_string()))?;
    // Nothing, and not what an environment variable of libpq's may name.
    let options = options.ssl_root_cert_from_pem(pem.authorities.unwrap_or_default());
    Ok(match pem.client {
        None => options,
        Some((certificate, key)) => options
            .ssl_client_cert_from_pem(certificate)
            .ssl_client_key_from_pem(key),
    })
}

fn address(options: &PgConnectOptions) -> String {
    format!("{}:{}", options.get_host(), options.get_port())
}

/// sqlx's words, or those of TLS with the way out.
fn explained(error: &sqlx::Error) -> String {
    match (trust::tls_error(error), error) {
        (Some(tls), _) => format!("TLS failed: {}", trust::explained(tls)),
        (None, sqlx::Error::Tls(cause)) => {
            format!("TLS failed: {cause}; is `ssl` on in the server's postgresql.conf?")
        }
        (None, error) => error.to_string(),
    }
}

fn from_sqlx(error: &sqlx::Error) -> Error {
    let sqlx::Error::Database(database) = error else {
        return Error::Lost(explained(error));
    };
    let Some(pg) = database.try_downcast_ref::<PgDatabaseError>() else {
        return Error::Lost(error.to_string());
    };
    let part = |part: Option<&str>| part.unwrap_or_default().to_owned();
    let failure = Refusal {
        code: pg.code().to_owned(),
        message: pg.message().to_owned(),
        table: part(pg.table()),
        column: part(pg.column()),
        constraint: part(pg.constraint()),
    }
    .into_failure();
    match pg.severity() {
        // Said while logging in, it is an answer; later, the session's end.
        PgSeverity::Fatal | PgSeverity::Panic
            if !pg.code().starts_with("28") && !pg.code().starts_with("3D") =>
        {
            Error::Lost(failure.to_string())
        }
        _ => Error::Refused(failure),
    }
}
