//! Reading a consumer's dead-letter queue, each letter with what the journal
//! knows of it, and giving it back as it was.
//!
//! One desk a queue: what one holds, a second could not see, and it would
//! take the rest for all there is. An advisory lock in PostgreSQL holds that,
//! and ends with the session that took it.

use std::time::{Duration, Instant};

use thiserror::Error;

use super::letter::{Death, Letter};
use crate::broker::desk::{self, DeskError, Handed, Ticket};
use crate::broker::signed::Signer;
use crate::config::checked::{Config, Consumer, Topology};
use crate::identity;
use crate::ledger;
use crate::ledger::desk::{self as book, Action, ActionId, Key};
use crate::postgres::{Error, Session};
use crate::stop::Stop;

/// How long a desk that is taken is asked for, and how often.
const SEAT_WITHIN: Duration = Duration::from_secs(2);
const SEAT_EVERY: Duration = Duration::from_millis(50);

/// Why the desk cannot go on. What it held goes back to the queue.
#[derive(Debug, Error)]
pub enum Trouble {
    /// Somebody else sits at it.
    #[error(
        "somebody works on the dead letters in queue {queue}: {holder}\n  hint: what is in their \
         hands cannot be seen; try again when they are done"
    )]
    Busy {
        /// The dead-letter queue.
        queue: String,
        /// Who it is.
        holder: String,
    },
    /// The queue.
    #[error(transparent)]
    Queue(#[from] DeskError),
    /// The database.
    #[error(transparent)]
    Database(#[from] Error),
}

/// An open desk.
pub struct Desk<'a> {
    consumer: &'a Consumer,
    signer: Signer,
    retention: Duration,
    queue: desk::Desk,
    session: Session,
    read: u64,
}

impl<'a> Desk<'a> {
    /// Sits down at the desk of `consumer`, and freezes the depth of its queue.
    /// `session` is this desk's alone. With `despite_limit`, see
    /// [`desk::Desk::open`].
    ///
    /// # Errors
    ///
    /// [`Trouble::Busy`] when somebody else sits there, or what the servers
    /// said.
    pub fn open(
        config: &Config,
        consumer: &'a Consumer,
        mut session: Session,
        purpose: &str,
        despite_limit: bool,
    ) -> Result<Self, Trouble> {
        let queue = &consumer.topology.dead_letter_queue;
        let began = Instant::now();
        while let Some(holder) = book::sit_down(&mut session, queue)? {
            // The server may not yet have seen that the last one left.
            if began.elapsed() > SEAT_WITHIN {
                let queue = queue.clone();
                return Err(Trouble::Busy { queue, holder });
            }
            std::thread::sleep(SEAT_EVERY);
        }
        let purpose = format!("{} {purpose}", consumer.name);
        let seal = ledger::secret(&mut session)?.seal();
        let signer = Signer::new(seal, &consumer.name);
        let own = signer.clone();
        let queue = desk::Desk::open(&config.broker, queue, &purpose, despite_limit, own)?;
        Ok(Self {
            consumer,
            signer,
            retention: config.ledger.retention,
            queue,
            session,
            read: 0,
        })
    }

    /// What signs the daemon's headers of its consumer's messages.
    #[must_use]
    pub fn signer(&self) -> &Signer {
        &self.signer
    }

    /// The queues and exchanges of its consumer.
    #[must_use]
    pub fn topology(&self) -> &'a Topology {
        &self.consumer.topology
    }

    /// How many letters the queue had when it was opened.
    #[must_use]
    pub fn depth(&self) -> u64 {
        self.queue.depth()
    }

    /// Reads no more than `depth` letters, if that is fewer.
    pub fn no_deeper_than(&mut self, depth: u64) {
        self.queue.no_deeper_than(depth);
    }

    /// How many consumers others had on the queue when it was opened.
    #[must_use]
    pub fn others(&self) -> u32 {
        self.queue.others()
    }

    /// How many letters were read so far.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.read
    }

    /// How long the first letter has been held.
    #[must_use]
    pub fn held_for(&self) -> Duration {
        self.queue.held_for()
    }

    /// The next letters, oldest first, each with its ticket; some megabytes of
    /// them. Empty when all were read.
    ///
    /// # Errors
    ///
    /// [`Trouble`]; after it, only [`Desk::give_back`] makes sense.
    pub fn next(&mut self, stop: &Stop) -> Result<Vec<(Letter, Ticket)>, Trouble> {
        let mut letters: Vec<(Letter, Ticket)> = Vec::new();
        for handed in self.queue.take(stop)? {
            self.read += 1;
            letters.push(self.letter(handed));
        }
        let keys: Vec<Key<'_>> = letters.iter().map(|(letter, _)| letter.key()).collect();
        let verdicts = match keys.is_empty() {
            true => Vec::new(),
            false => book::verdicts(&mut self.session, &self.consumer.name, &keys)?,
        };
        for ((letter, _), verdict) in letters.iter_mut().zip(verdicts) {
            letter.verdict = verdict;
        }
        Ok(letters)
    }

    fn letter(&self, handed: Handed) -> (Letter, Ticket) {
        let Handed {
            ticket,
            message,
            exchange,
            routing_key,
            properties,
            returns,
        } = handed;
        let letter = Letter {
            position: self.read,
            id: identity::identify(&message, &self.consumer.identity).ok(),
            fingerprint: identity::fingerprint(&message.body),
            death: Death::of(&properties, &self.consumer.topology.queue),
            message,
            properties,
            via_exchange: exchange,
            via_routing_key: routing_key,
            returns,
            verdict: None,
        };
        (letter, ticket)
    }

    /// Acks a letter: it leaves the queue. Certain once [`Desk::settle`] or
    /// [`Desk::give_back`] returned.
    ///
    /// # Errors
    ///
    /// [`DeskError::Lost`]: the letter may be back in the queue.
    pub fn ack(&mut self, ticket: Ticket) -> Result<(), Trouble> {
        Ok(self.queue.ack(ticket)?)
    }

    /// Waits until the broker has seen every ack.
    ///
    /// # Errors
    ///
    /// [`DeskError::Lost`]: what was acked since the last time may be back in
    /// the queue.
    pub fn settle(&mut self) -> Result<(), Trouble> {
        Ok(self.queue.settle()?)
    }

    /// Gives back every letter that was not acked, in its order, and closes.
    ///
    /// # Errors
    ///
    /// [`DeskError::Lost`]: they come back all the same.
    pub fn give_back(self) -> Result<(), Trouble> {
        Ok(self.queue.give_back()?)
    }

    /// Gives back every letter that was not acked and opens the queue anew, with
    /// the depth it has by then: before the broker takes back what is held for
    /// too long. Nobody else can sit down in between.
    ///
    /// # Errors
    ///
    /// As [`Desk::open`] and [`Desk::give_back`].
    pub fn open_anew(
        self,
        config: &Config,
        purpose: &str,
        despite_limit: bool,
    ) -> Result<Self, Trouble> {
        self.queue.give_back()?;
        let name = &self.consumer.topology.dead_letter_queue;
        let purpose = format!("{} {purpose}", self.consumer.name);
        let signer = self.signer.clone();
        let queue = desk::Desk::open(&config.broker, name, &purpose, despite_limit, signer)?;
        let read = 0;
        Ok(Self {
            queue,
            read,
            ..self
        })
    }

    /// As [`Desk::give_back`], but nobody else can sit down until the session
    /// that is returned ends.
    ///
    /// # Errors
    ///
    /// [`DeskError::Lost`]: the letters come back all the same.
    pub fn stay_seated(self) -> Result<Session, Trouble> {
        self.queue.give_back()?;
        Ok(self.session)
    }

    /// Writes down that an action begins.
    ///
    /// # Errors
    ///
    /// When it is not known to be written down.
    pub fn begin(&mut self, action: &Action<'_>) -> Result<ActionId, Trouble> {
        Ok(book::begin(&mut self.session, action, self.retention)?)
    }

    /// Writes down which letters come next, before anything is done to them.
    /// Proves too that nobody else can sit here: the lock is the session's.
    ///
    /// # Errors
    ///
    /// When it is not known to be written down: then nothing may be done.
    pub fn note(&mut self, action: ActionId, letters: &[Key<'_>]) -> Result<(), Trouble> {
        Ok(book::note(&mut self.session, action, letters)?)
    }

    /// Writes down that a letter could not be sent, and stays.
    ///
    /// # Errors
    ///
    /// When it is not known to be written down.
    pub fn note_left(&mut self, action: ActionId, letter: Key<'_>) -> Result<(), Trouble> {
        Ok(book::note_left(&mut self.session, action, letter)?)
    }

    /// Writes down that an action has ended.
    ///
    /// # Errors
    ///
    /// When it is not written down.
    pub fn end(&mut self, action: ActionId) -> Result<(), Trouble> {
        Ok(book::end(&mut self.session, action)?)
    }

    /// The session, for look-ups of the caller's.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }
}

impl Letter {
    /// What identifies it in the journal.
    #[must_use]
    pub fn key(&self) -> Key<'_> {
        let id = self.id.as_ref().map(|id| id.as_str());
        (id, self.fingerprint)
    }
}
