//! What applies the effect of a message.
//!
//! A handler is of one of two kinds, and the kind is its promise. One that is
//! [`Transactional`] works inside the transaction that already holds the ledger
//! rows of its messages: its effect and their rows commit together. One that is
//! [`Keyed`] works on something that cannot share that transaction, and hands
//! the message's id on as an idempotency key.

pub mod command;
pub mod http;
mod json;
pub mod rust;
pub mod sql;

use std::time::Duration;

use crate::config::checked;
use crate::failure::Failure;
use crate::message::{Message, MessageId};
use crate::postgres::{Error, Session};
use crate::stop::Stop;

pub use crate::config::checked::Effect;

/// One fresh message for a handler.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    /// Its idempotency key.
    pub message_id: &'a MessageId,
    /// What was delivered.
    pub message: &'a Message,
    /// Which try this is, from 1.
    pub attempt: u32,
}

/// A worker's own handler, of either kind.
pub enum Handler {
    /// Its effect commits with the ledger rows.
    Transactional(Box<dyn Transactional>),
    /// Its effect is somewhere else.
    Keyed(Box<dyn Keyed>),
}

impl Handler {
    /// The type, as in the configuration: for journal and logs.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Transactional(handler) => handler.kind(),
            Self::Keyed(handler) => handler.kind(),
        }
    }

    /// What it can promise.
    #[must_use]
    pub fn effect(&self) -> Effect {
        match self {
            Self::Transactional(_) => Effect::Transactional,
            Self::Keyed(_) => Effect::Keyed,
        }
    }
}

/// SQLSTATE `query_canceled`: most often, `statement_timeout`.
pub const QUERY_CANCELED: &str = "57014";

/// Applies messages through the session of the ledger's transaction, which it
/// never ends itself.
pub trait Transactional: Send {
    /// The type, as in the configuration: for journal and logs.
    fn kind(&self) -> &'static str;

    /// Gets ready on a session that it may not have seen, outside of any
    /// transaction.
    ///
    /// # Errors
    ///
    /// The database's own: nothing can be applied.
    fn ready(&mut self, session: &mut Session) -> Result<(), Error>;

    /// Applies all of `batch`, which is in the order of the queue, or fails as
    /// a whole: on an error the caller rolls back.
    ///
    /// # Errors
    ///
    /// The database's own, with its class, and the message that met it where
    /// that is known.
    fn apply(&mut self, session: &mut Session, batch: &[Work<'_>]) -> Result<(), Fault>;

    /// Applies each of `batch` inside a savepoint, with its deferred
    /// constraints, and says which fail and why, up to `most` of them. The
    /// caller rolls back.
    ///
    /// # Errors
    ///
    /// When the session is gone.
    fn faults(
        &mut self,
        session: &mut Session,
        batch: &[Work<'_>],
        most: usize,
    ) -> Result<Vec<(usize, Failure)>, Error> {
        let mut faults = Vec::new();
        for (place, work) in batch.iter().enumerate() {
            session.execute("SAVEPOINT ackonce_message")?;
            let applied = self.apply(session, std::slice::from_ref(work));
            // Put back by the savepoint: what is deferred stays deferred.
            let checked = applied.map_err(|fault| fault.error).and_then(|()| {
                session.execute("SAVEPOINT ackonce_check; SET CONSTRAINTS ALL IMMEDIATE")
            });
            match checked {
                Ok(()) => session.execute(
                    "ROLLBACK TO SAVEPOINT ackonce_check; RELEASE SAVEPOINT ackonce_message",
                )?,
                Err(Error::Refused(failure)) => {
                    let was_canceled = failure.code.as_deref() == Some(QUERY_CANCELED);
                    faults.push((place, failure));
                    let undone = session.execute("ROLLBACK TO SAVEPOINT ackonce_message");
                    // A handler that panicked has given the session up; and one
                    // `statement_timeout` is enough for a transaction.
                    if undone.is_err() || was_canceled || faults.len() >= most {
                        return Ok(faults);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(faults)
    }
}

/// Why a batch was not applied.
#[derive(Debug)]
pub struct Fault {
    /// The message that met it, by its place in the batch.
    pub at: Option<usize>,
    /// For how long that message had been in work.
    pub took: Option<Duration>,
    /// What it met.
    pub error: Error,
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self {
            at: None,
            took: None,
            error,
        }
    }
}

/// Applies messages somewhere outside the ledger's database.
pub trait Keyed: Send {
    /// The type, as in the configuration: for journal and logs.
    fn kind(&self) -> &'static str;

    /// Applies one message, under `work.message_id` as the idempotency key, and
    /// returns within a bound of its own. `cancelled` is set when the result
    /// will not count any more, since the claim is lost, and when the daemon
    /// cannot wait for it any longer: whoever can, then ends what it has begun.
    ///
    /// # Errors
    ///
    /// Why it was not applied, or is not known to be.
    fn apply(&mut self, work: &Work<'_>, cancelled: &Stop) -> Result<(), Failure>;
}

/// Why there can be no handler, in words for the author of the configuration.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The statements cannot be run.
    #[error(transparent)]
    Script(#[from] sql::ScriptError),
    /// No request can be made.
    #[error(transparent)]
    Http(#[from] http::SetupError),
    /// The program has no such handler.
    #[error(transparent)]
    Rust(#[from] rust::Misfit),
}

/// Makes a worker's own handler; `makers` are those of the program.
///
/// # Errors
///
/// When the configuration cannot be run, in words for its author.
pub fn build(consumer: &checked::Consumer, makers: &rust::Makers) -> Result<Handler, BuildError> {
    Ok(match &consumer.handler {
        checked::Handler::Rust(effect) => makers.make(consumer, *effect)?,
        checked::Handler::Sql(config) => {
            Handler::Transactional(Box::new(sql::SqlHandler::new(config)?))
        }
        checked::Handler::Command(config) => Handler::Keyed(command::build(consumer, config)),
        checked::Handler::Http(config) => {
            Handler::Keyed(Box::new(http::HttpHandler::new(config, &consumer.name)?))
        }
    })
}
