//! What can go wrong with a connection, in words an operator can act on, and
//! as types a caller can branch on. No message shows a password.

use std::io;
use std::time::Duration;

use thiserror::Error;

use super::address::AddressError;
use super::cause::Cause;
pub use crate::trust::TlsProblem;
use crate::trust::{self, Untrusting};

/// What a connection was waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The host name's addresses.
    Resolve,
    /// The TCP connection.
    Connect,
    /// The TLS handshake.
    Tls,
    /// AMQP: protocol header, login, tuning, opening the vhost.
    Login,
    /// The channel to work on.
    Channel,
}

impl Stage {
    fn describe(self) -> &'static str {
        match self {
            Self::Resolve => "resolving the host name (is the DNS server reachable?)",
            Self::Connect => "connecting (is a firewall dropping packets?)",
            Self::Tls => "the TLS handshake (does this port speak TLS?)",
            Self::Login => {
                "the login (is this the AMQP port? RabbitMQ also holds a wrong password for \
                 3 s before it closes)"
            }
            Self::Channel => "opening a channel",
        }
    }
}

/// Why there is no connection to the broker.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The configured URL cannot be used.
    #[error("failed to read the broker's URL: {0}")]
    Address(#[from] AddressError),
    /// The host name has no address.
    #[error("failed to resolve the host name of {address}: {source}")]
    Resolve {
        /// Whereto, without password.
        address: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// Nobody listens on the port.
    #[error("failed to connect to {address}: connection refused ({detail}); is RabbitMQ running?")]
    Refused {
        /// Whereto, without password.
        address: String,
        /// Each address tried, with its error.
        detail: String,
    },
    /// No way to the host.
    #[error("failed to connect to {address}: {detail}")]
    Unreachable {
        /// Whereto, without password.
        address: String,
        /// Each address tried, with its error.
        detail: String,
    },
    /// `connect_timeout` ran out.
    #[error("failed to connect to {address} within {within:?}: timed out in {}", stage.describe())]
    TimedOut {
        /// Whereto, without password.
        address: String,
        /// What it was waiting for.
        stage: Stage,
        /// The whole time it had.
        within: Duration,
    },
    /// The authorities to trust, or the client certificate, could not be loaded.
    #[error(transparent)]
    Trust(#[from] Untrusting),
    /// The TLS handshake failed.
    #[error(
        "failed to set up TLS with {address}: {detail}; {}",
        problem.hint().unwrap_or("see the broker's log")
    )]
    Tls {
        /// Whereto, without password.
        address: String,
        /// Which kind.
        problem: TlsProblem,
        /// What TLS said.
        detail: String,
    },
    /// The broker closed the connection when it had seen the login. It does so
    /// too when it stops, or when the login took longer than it allows, so
    /// this is worth another try.
    #[error(
        "failed to log in to {address}: the broker closed the connection during the login; check \
         user name and password, and the broker's log (a broker that stops or is overloaded looks \
         the same, so this is tried again)"
    )]
    LoginRefused {
        /// Whereto, without password.
        address: String,
    },
    /// The vhost does not exist, or the user may not use it, or is over a limit.
    #[error(
        "failed to open the vhost of {address}: {text} (reply {code}); {}",
        vhost_hint(text)
    )]
    Vhost {
        /// Whereto, without password.
        address: String,
        /// AMQP reply code.
        code: u16,
        /// The broker's words.
        text: String,
    },
    /// The broker closed the connection for another reason.
    #[error("failed to connect to {address}: the broker closed: {text} (reply {code})")]
    Closed {
        /// Whereto, without password.
        address: String,
        /// AMQP reply code.
        code: u16,
        /// The broker's words.
        text: String,
    },
    /// What answered does not behave like an AMQP 0-9-1 broker.
    #[error(
        "failed to connect to {address}: {detail}; is this RabbitMQ's AMQP port, and is a TLS port \
         addressed with amqps://?"
    )]
    Protocol {
        /// Whereto, without password.
        address: String,
        /// What happened.
        detail: String,
    },
    /// Each of several URLs failed.
    #[error("none of the {} URLs of the broker is of use: {}", .0.len(), joined(.0))]
    All(Vec<ConnectError>),
    /// This host has no threads, sockets or memory left.
    #[error("failed to prepare a connection to {address}: {detail}")]
    Local {
        /// Whereto, without password.
        address: String,
        /// What is missing.
        detail: String,
    },
}

/// How the broker ends what it says about a limit.
pub const LIMIT_REACHED: &str = "is reached";

/// By the broker's words: the reply code is the same for all of them.
fn vhost_hint(text: &str) -> &'static str {
    match () {
        () if text.contains(LIMIT_REACHED) => {
            "close connections that nobody needs, or raise the limit (rabbitmqctl \
             set_vhost_limits, set_user_limits); this is tried again"
        }
        () if text.contains("is down") => {
            "it does not run on this node: see the broker's log (rabbitmqctl restart_vhost)"
        }
        () if text.contains("not found") => {
            "make it, and give the user configure, write and read permission on it"
        }
        () => "give the user configure, write and read permission on it",
    }
}

fn joined(errors: &[ConnectError]) -> String {
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

impl ConnectError {
    /// The error for what amiquip said during the login.
    pub(super) fn from_login(address: String, error: &amiquip::Error) -> Self {
        match error {
            amiquip::Error::InvalidCredentials => Self::LoginRefused { address },
            // NOT_ALLOWED and ACCESS_REFUSED, which RabbitMQ uses for a vhost
            // that is missing, closed to the user, or full.
            amiquip::Error::ServerClosedConnection { code, message }
                if matches!(*code, 530 | 403) =>
            {
                Self::Vhost {
                    address,
                    code: *code,
                    text: message.clone(),
                }
            }
            amiquip::Error::ServerClosedConnection { code, message } => Self::Closed {
                address,
                code: *code,
                text: message.clone(),
            },
            // With TLS 1.3 a server refuses a client certificate, or misses
            // it, when the client has long begun to talk.
            other => match trust::tls_error(other) {
                Some(tls) => Self::Tls {
                    address,
                    problem: TlsProblem::of(tls),
                    detail: tls.to_string(),
                },
                None => Self::Protocol {
                    address,
                    detail: other.to_string(),
                },
            },
        }
    }

    /// The error for what failed on this host.
    pub(super) fn local(address: &super::address::Address, error: &io::Error) -> Self {
        Self::Local {
            address: address.to_string(),
            detail: error.to_string(),
        }
    }
}

/// Why a connection that stood is no longer of use.
#[derive(Debug, Error)]
pub enum LinkError {
    /// A call was not answered; the connection was ended.
    #[error("failed to {what} on {address} within {within:?}: the broker does not answer")]
    TimedOut {
        /// Whereto, without password.
        address: String,
        /// The call, as a verb: `open a channel`.
        what: &'static str,
        /// How long it waited.
        within: Duration,
    },
    /// The connection or channel is gone.
    #[error("lost the connection to {address}: {cause}")]
    Lost {
        /// Whereto, without password.
        address: String,
        /// The broker's or the socket's words, and what they mean.
        cause: Cause,
    },
}
