//! Handlers of type `rust`: the user's own code, in a program built with this
//! library. What a user sees of it is re-exported by [`crate::worker`].
//!
//! The user's code is not trusted to keep the rules: a panic is a failure of
//! the message, and a transaction that the code has broken or ended is found
//! out before anything is committed on its word.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value};
use sqlx::PgConnection;

use super::{Fault, Handler as Made, Keyed, Transactional, Work};
use crate::config::checked::{Consumer, Effect};
use crate::failure::{Class, Failure};
use crate::identity::idempotency_key;
use crate::postgres::{Error, Session};
use crate::stop::Stop;

/// A message, as its handler sees it.
#[derive(Debug, Clone, Copy)]
pub struct Message<'m> {
    work: &'m Work<'m>,
    consumer: &'m str,
}

impl<'m> Message<'m> {
    /// Its id, 1 to 255 bytes, unique within the consumer.
    #[must_use]
    pub fn id(&self) -> &'m str {
        self.work.message_id.as_str()
    }

    /// The idempotency key for a receiver outside: `CONSUMER:ID`, visible
    /// ASCII, at most 830 bytes. The same however often the message comes.
    #[must_use]
    pub fn key(&self) -> String {
        idempotency_key(self.consumer, self.work.message_id)
    }

    /// The body, as published.
    #[must_use]
    pub fn body(&self) -> &'m [u8] {
        &self.work.message.body
    }

    /// Which try this is, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.work.attempt
    }

    /// The headers as JSON. Byte arrays are `\x`-prefixed hex, times are
    /// seconds, NUL characters are U+FFFD.
    #[must_use]
    pub fn headers(&self) -> &'m Map<String, Value> {
        &self.work.message.headers
    }

    /// The `content_type` property.
    #[must_use]
    pub fn content_type(&self) -> Option<&'m str> {
        self.work.message.content_type.as_deref()
    }

    /// The `content_encoding` property, such as `gzip`: the body is as it was published.
    #[must_use]
    pub fn content_encoding(&self) -> Option<&'m str> {
        self.work.message.about.content_encoding.as_deref()
    }

    /// The `type` property.
    #[must_use]
    pub fn message_type(&self) -> Option<&'m str> {
        self.work.message.about.kind.as_deref()
    }

    /// The `correlation_id` property.
    #[must_use]
    pub fn correlation_id(&self) -> Option<&'m str> {
        self.work.message.about.correlation_id.as_deref()
    }

    /// The `reply_to` property.
    #[must_use]
    pub fn reply_to(&self) -> Option<&'m str> {
        self.work.message.about.reply_to.as_deref()
    }

    /// The `app_id` property.
    #[must_use]
    pub fn app_id(&self) -> Option<&'m str> {
        self.work.message.about.app_id.as_deref()
    }

    /// The `user_id` property, which the broker has verified.
    #[must_use]
    pub fn user_id(&self) -> Option<&'m str> {
        self.work.message.about.user_id.as_deref()
    }

    /// The `expiration` property, in milliseconds. `None` on a retry.
    #[must_use]
    pub fn expiration(&self) -> Option<&'m str> {
        self.work.message.about.expiration.as_deref()
    }

    /// The `priority` property.
    #[must_use]
    pub fn priority(&self) -> Option<u8> {
        self.work.message.about.priority
    }

    /// The exchange that it was first published to; empty for the default one.
    #[must_use]
    pub fn exchange(&self) -> &'m str {
        &self.work.message.exchange
    }

    /// The routing key that it was first published with.
    #[must_use]
    pub fn routing_key(&self) -> &'m str {
        &self.work.message.routing_key
    }

    /// The `timestamp` property, in whole seconds.
    #[must_use]
    pub fn published_at(&self) -> Option<SystemTime> {
        self.work.message.published_at
    }

    /// Whether it was handed over before and never settled.
    #[must_use]
    pub fn redelivered(&self) -> bool {
        self.work.message.redelivered
    }
}

/// Why a message was not applied, and what is to become of it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Outcome {
    /// It may succeed later: it waits for its next attempt.
    #[error("{text}")]
    Retry {
        /// For journal and operator; not the message's body.
        text: String,
        /// How long at the least, as far as the consumer's `backoff` has a step
        /// for it.
        after: Option<Duration>,
    },
    /// It will never succeed: it is dead-lettered now.
    #[error("{0}")]
    Reject(String),
    /// It is not the message's fault: the consumer pauses and probes. The text
    /// is logged, so it must not quote the message.
    #[error("{0}")]
    Pause(String),
    /// The database said no, or is gone: what becomes of the message, the table
    /// of SQLSTATEs says, and the configuration.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl Outcome {
    /// [`Outcome::Retry`] after the next step of the consumer's `backoff`.
    #[must_use]
    pub fn retry(text: impl Into<String>) -> Self {
        Self::Retry {
            text: text.into(),
            after: None,
        }
    }

    /// [`Outcome::Reject`]
    #[must_use]
    pub fn reject(text: impl Into<String>) -> Self {
        Self::Reject(text.into())
    }

    /// [`Outcome::Pause`]
    #[must_use]
    pub fn pause(text: impl Into<String>) -> Self {
        Self::Pause(text.into())
    }

    fn into_error(self) -> Error {
        let (class, text, retry_after) = match self {
            Self::Retry { text, after } => (Class::Transient, text, after),
            Self::Reject(text) => (Class::Permanent, text, None),
            Self::Pause(text) => (Class::Systemic, text, None),
            Self::Database(DatabaseError(error)) => return error,
        };
        Error::Refused(Failure {
            class,
            code: None,
            text,
            retry_after,
        })
    }
}

/// What the database answered instead of a result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DatabaseError(Error);

impl DatabaseError {
    /// The five-character SQLSTATE; `None` when the session is gone.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match &self.0 {
            Error::Refused(failure) => failure.code.as_deref(),
            Error::Unreachable { .. } | Error::Lost(_) => None,
        }
    }
}

/// The ledger's open transaction, in which the rows of the messages in hand
/// stand already. What is written through it commits with them, or not at all.
pub struct Transaction<'t> {
    session: &'t mut Session,
    failed: Option<Error>,
    /// The message in work, by its place in the batch, where the handler takes
    /// one after the other.
    at: Option<usize>,
}

impl Transaction<'_> {
    /// Runs `call` to its end on the worker's own connection. It must not end
    /// the transaction: no `COMMIT`, no `ROLLBACK`, no `begin()`; use
    /// `SAVEPOINT` for what may fail. Waits at most 5 s longer than
    /// `statement_timeout`.
    ///
    /// # Errors
    ///
    /// What the database says. Without a savepoint nothing more can be done in
    /// this transaction, and its messages are not applied.
    pub fn run<T>(
        &mut self,
        call: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, DatabaseError> {
        self.session.run(call).map_err(|error| {
            self.failed.get_or_insert_with(|| error.clone());
            DatabaseError(error)
        })
    }
}

/// Applies messages through the ledger's transaction: each takes effect exactly
/// once within the ledger's retention. One is made for each worker thread.
pub trait Handler: Send + 'static {
    /// Applies one message.
    ///
    /// # Errors
    ///
    /// What is to become of it. Everything written is rolled back.
    fn apply(
        &mut self,
        message: &Message<'_>,
        transaction: &mut Transaction<'_>,
    ) -> Result<(), Outcome>;

    /// Applies up to `batch_max` messages, which are in the order of the queue.
    /// Those who can do it in few statements write this one; it has to mean the
    /// same as one message after the other.
    ///
    /// # Errors
    ///
    /// All are rolled back. Each is then given alone, inside a savepoint, to
    /// find those at fault, and the others are applied together.
    fn apply_batch(
        &mut self,
        messages: &[Message<'_>],
        transaction: &mut Transaction<'_>,
    ) -> Result<(), Outcome> {
        for (place, message) in messages.iter().enumerate() {
            transaction.at = Some(place);
            self.apply(message, transaction)?;
        }
        Ok(())
    }
}

/// Set when the result of a call will not count any more.
pub struct Cancelled<'c>(&'c Stop);

impl Cancelled<'_> {
    /// Whether to end what was begun.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.is_set()
    }

    /// Waits, at most for `duration`. True when it is set.
    #[must_use]
    pub fn wait(&self, duration: Duration) -> bool {
        self.0.wait(duration)
    }
}

/// Applies messages somewhere outside the ledger's database: at least once, and
/// exactly once where the receiver honours [`Message::key`]. One is made for
/// each worker thread.
pub trait KeyedHandler: Send + 'static {
    /// Applies one message, and returns within a bound of its own. Whoever can,
    /// gives up when `cancelled` is set: the claim is lost, or the daemon can
    /// wait no longer.
    ///
    /// # Errors
    ///
    /// What is to become of the message.
    fn apply(&mut self, message: &Message<'_>, cancelled: &Cancelled<'_>) -> Result<(), Outcome>;
}

type Make<H> = Arc<dyn Fn() -> Box<H> + Send + Sync>;

/// Makes the handlers of one consumer.
#[derive(Clone)]
enum Maker {
    Transactional(Make<dyn Handler>),
    Keyed(Make<dyn KeyedHandler>),
}

impl Maker {
    fn effect(&self) -> Effect {
        match self {
            Self::Transactional(_) => Effect::Transactional,
            Self::Keyed(_) => Effect::Keyed,
        }
    }
}

/// The handlers that a program brings along, by consumer.
#[derive(Clone, Default)]
pub struct Makers(BTreeMap<String, Maker>);

/// Why a consumer and the program's handlers do not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// The program has no handler for it.
    #[error(
        "consumer `{0}` has type = \"rust\", and this program brings no handler for it: run the \
         program that was built with one, as docs/rust.md shows"
    )]
    Missing(String),
    /// The promise is not the one in the configuration.
    #[error(
        "consumer `{consumer}` has effect = \"{configured}\", and the program's handler is \
         {registered}: set effect = \"{registered}\" in its [consumer.handler], or register the \
         other kind"
    )]
    Effect {
        /// The consumer.
        consumer: String,
        /// What the configuration says.
        configured: Effect,
        /// What the handler is.
        registered: Effect,
    },
    /// There is no such consumer of type `rust`.
    #[error(
        "the program brings a handler for consumer `{0}`, and the configuration has no consumer of \
         that name with type = \"rust\""
    )]
    Unused(String),
}

impl Makers {
    /// Registers what makes the handlers of `consumer`; a second one replaces
    /// the first.
    pub fn add<H: Handler>(
        &mut self,
        consumer: &str,
        make: impl Fn() -> H + Send + Sync + 'static,
    ) {
        let make: Make<dyn Handler> = Arc::new(move || Box::new(make()));
        self.0
            .insert(consumer.to_owned(), Maker::Transactional(make));
    }

    /// As [`Makers::add`], for a keyed handler.
    pub fn add_keyed<H: KeyedHandler>(
        &mut self,
        consumer: &str,
        make: impl Fn() -> H + Send + Sync + 'static,
    ) {
        let make: Make<dyn KeyedHandler> = Arc::new(move || Box::new(make()));
        self.0.insert(consumer.to_owned(), Maker::Keyed(make));
    }

    /// The consumers that have one.
    pub fn consumers(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// A handler for one worker of `consumer`, which promises `effect`.
    ///
    /// # Errors
    ///
    /// [`Misfit`].
    pub(super) fn make(&self, consumer: &Consumer, effect: Effect) -> Result<Made, Misfit> {
        let name = consumer.name.as_str();
        let maker = self.0.get(name);
        let maker = maker.ok_or_else(|| Misfit::Missing(name.to_owned()))?;
        if maker.effect() != effect {
            return Err(Misfit::Effect {
                consumer: name.to_owned(),
                configured: effect,
                registered: maker.effect(),
            });
        }
        let consumer = name.to_owned();
        Ok(match maker {
            Maker::Transactional(make) => Made::Transactional(Box::new(InTransaction {
                handler: make(),
                make: Arc::clone(make),
                consumer,
            })),
            Maker::Keyed(make) => Made::Keyed(Box::new(WithKey {
                handler: make(),
                consumer,
            })),
        })
    }
}

struct InTransaction {
    handler: Box<dyn Handler>,
    make: Make<dyn Handler>,
    consumer: String,
}

impl Transactional for InTransaction {
    fn kind(&self) -> &'static str {
        "rust"
    }

    fn ready(&mut self, _: &mut Session) -> Result<(), Error> {
        Ok(())
    }

    fn apply(&mut self, session: &mut Session, batch: &[Work<'_>]) -> Result<(), Fault> {
        let messages: Vec<Message<'_>> = batch
            .iter()
            .map(|work| Message {
                work,
                consumer: &self.consumer,
            })
            .collect();
        let before = transaction_id(session)?;
        let mut transaction = Transaction {
            session,
            failed: None,
            at: None,
        };
        let handler = &mut self.handler;
        let call = AssertUnwindSafe(|| handler.apply_batch(&messages, &mut transaction));
        let result = catch_unwind(call);
        let Transaction {
            session,
            failed,
            at,
        } = transaction;
        let result = match result {
            Ok(Ok(())) => verify(session, before.as_deref(), failed),
            Ok(Err(outcome)) => Err(outcome.into_error()),
            Err(_) => {
                log::error!(consumer = self.consumer.as_str(); "a handler panicked");
                // Neither is to be trusted after that.
                session.abandon();
                self.handler = (self.make)();
                Err(Error::Refused(Failure {
                    class: Class::Transient,
                    code: None,
                    text: "the handler panicked".to_owned(),
                    retry_after: None,
                }))
            }
        };
        let took = None;
        result.map_err(|error| Fault { at, took, error })
    }
}

/// Whether the transaction that the ledger rows are in is still open and sound:
/// a COMMIT in one that has failed would roll back, and say nothing of it.
fn verify(session: &mut Session, before: Option<&str>, failed: Option<Error>) -> Result<(), Error> {
    match transaction_id(session) {
        Ok(now) if now.is_some() && now.as_deref() == before => Ok(()),
        Ok(_) => {
            session.abandon();
            Err(Error::Refused(Failure {
                class: Class::Systemic,
                code: None,
                text: "the handler has ended the ledger's transaction: it must not run COMMIT, \
                       ROLLBACK or begin() on the connection it is given"
                    .to_owned(),
                retry_after: None,
            }))
        }
        Err(Error::Refused(refused)) => Err(failed.unwrap_or(Error::Refused(Failure {
            class: Class::Transient,
            text: "the handler went on after a statement that had failed".to_owned(),
            ..refused
        }))),
        Err(error) => Err(error),
    }
}

/// The transaction's own number, which it has since it wrote the ledger rows.
fn transaction_id(session: &mut Session) -> Result<Option<String>, Error> {
    session.run(async |connection| {
        sqlx::query_scalar("SELECT pg_current_xact_id_if_assigned()::text")
            .fetch_one(connection)
            .await
    })
}

struct WithKey {
    handler: Box<dyn KeyedHandler>,
    consumer: String,
}

impl Keyed for WithKey {
    fn kind(&self) -> &'static str {
        "rust"
    }

    fn apply(&mut self, work: &Work<'_>, cancelled: &Stop) -> Result<(), Failure> {
        let message = Message {
            work,
            consumer: &self.consumer,
        };
        let result = self.handler.apply(&message, &Cancelled(cancelled));
        result.map_err(|outcome| outcome.into_error().into_failure())
    }
}
