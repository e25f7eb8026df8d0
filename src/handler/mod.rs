//! What applies the effect of a message.
//!
//! A handler works inside the transaction that already holds the ledger rows
//! of its messages, and never ends that transaction itself.

pub mod sql;

use crate::config::checked;
use crate::message::{Message, MessageId};
use crate::postgres::{Error, Session};

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

/// Applies messages, through the session of the ledger's transaction.
pub trait Handler: Send {
    /// The kind, as in the configuration: for journal and logs.
    fn kind(&self) -> &'static str;

    /// Applies all of `batch`, or fails as a whole: on an error the caller
    /// rolls back, splits the batch and tries the parts.
    ///
    /// # Errors
    ///
    /// The database's own, with its class.
    fn apply(&mut self, session: &mut Session, batch: &[Work<'_>]) -> Result<(), Error>;
}

/// Makes a worker's own handler.
///
/// # Errors
///
/// When the configuration cannot be run, in words for its author.
pub fn build(config: &checked::Handler) -> Result<Box<dyn Handler>, sql::ScriptError> {
    match config {
        checked::Handler::Sql(config) => Ok(Box::new(sql::SqlHandler::new(config)?)),
    }
}
