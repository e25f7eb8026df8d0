//! `[broker]`, `[redis]` and `[postgres]`: the three servers, and TLS with them.

use std::path::PathBuf;
use std::time::Duration;

use super::Secret;

/// `[broker]`: the RabbitMQ server, or the nodes of a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broker {
    /// `amqp://` or `amqps://` URLs of one broker or of the nodes of one
    /// cluster, tried in turn: 1 to 16, each once.
    pub urls: Vec<Secret>,
    /// TLS with them (`amqps` only).
    pub tls: Tls,
    /// Whether `amqp://` may lead to another machine.
    pub allow_plaintext: bool,
    /// Interval between heartbeats, 5 s to 15 s, whole seconds.
    pub heartbeat: Duration,
    /// Longest wait for resolving, connecting, TLS and login together.
    pub connect_timeout: Duration,
}

/// `[redis]`: the server that holds the claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redis {
    /// `redis://` or `rediss://` URL.
    pub url: Secret,
    /// TLS with it (`rediss` only).
    pub tls: Tls,
    /// Whether `redis://` may lead to another machine.
    pub allow_plaintext: bool,
    /// First part of every key.
    pub key_prefix: String,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for the reply to one pipeline.
    pub timeout: Duration,
}

/// `[postgres]`: the database that holds ledger and effects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Postgres {
    /// `postgres://` URL.
    pub url: Secret,
    /// TLS with it.
    pub tls: Tls,
    /// How much TLS there must be: what the URL asks for, or what is right for
    /// its host.
    pub ssl_mode: SslMode,
    /// Whether a mode that does not verify the server may lead to another
    /// machine.
    pub allow_plaintext: bool,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// `statement_timeout` of the daemon's sessions.
    pub statement_timeout: Duration,
    /// `lock_timeout` of the daemon's sessions.
    pub lock_timeout: Duration,
    /// `idle_in_transaction_session_timeout` of the daemon's sessions.
    pub idle_in_transaction_timeout: Duration,
    /// Let `run` apply migrations; otherwise it refuses an old schema.
    pub auto_migrate: bool,
}

/// TLS with a server: whom to trust, and who we are. The files are read again
/// for every connection, so that a renewed certificate is used without a
/// restart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tls {
    /// PEM file with the certificate authorities to trust instead of the
    /// system's; for PostgreSQL beside them.
    pub ca_file: Option<PathBuf>,
    /// Shown to a server that asks for it.
    pub client: Option<ClientCertificate>,
}

/// Who we are, for a server that wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// PEM file with the certificate, and those that lead to its authority.
    pub cert_file: PathBuf,
    /// PEM file with its key, not encrypted.
    pub key_file: PathBuf,
}

/// How much TLS a session with PostgreSQL needs, as libpq's `sslmode` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// None. `allow` means the same here.
    Disable,
    /// TLS where the server offers it; nobody is verified.
    Prefer,
    /// TLS; nobody is verified.
    Require,
    /// The certificate must come from a trusted authority.
    VerifyCa,
    /// And it must be for the URL's host.
    VerifyFull,
}

impl SslMode {
    /// As typed in a URL; `None` where there is no such word.
    pub(in crate::config) fn read(word: &str) -> Option<Self> {
        Some(match word {
            "disable" | "allow" => Self::Disable,
            "prefer" => Self::Prefer,
            "require" => Self::Require,
            "verify-ca" => Self::VerifyCa,
            "verify-full" => Self::VerifyFull,
            _ => return None,
        })
    }
}
