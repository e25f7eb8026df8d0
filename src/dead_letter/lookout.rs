//! Looks up where dead letters stand: in the ledger, in the failure journal
//! and in Redis, a batch at a time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::letter::Letter;
use super::plan::{self, Facts, Verdict};
use crate::claim::desk::{Inspector, Seized};
use crate::config::checked;
use crate::identity;
use crate::ledger::Registration;
use crate::ledger::replay::{self, Asked, Known};
use crate::message::{DeadReason, Fingerprint, MessageId};
use crate::postgres::{Error, Session};

/// What was found out about one letter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    /// Its id, if it has a usable one.
    pub id: Option<MessageId>,
    /// SHA-256 of its body.
    pub fingerprint: Fingerprint,
    /// Where it stands.
    pub verdict: Verdict,
}

/// Looks letters of one consumer up.
pub struct Lookout<'a> {
    consumer: &'a checked::Consumer,
    consumer_id: i16,
    retention: Duration,
    uses_redis: bool,
    /// `None` when Redis is not used, or does not answer.
    claims: Option<Inspector>,
}

impl<'a> Lookout<'a> {
    /// For `consumer`, by what the ledger knows it. Without Redis it goes on,
    /// and says so: what is in work at the moment is then not told apart from
    /// what is not.
    #[must_use]
    pub fn new(
        config: &checked::Config,
        consumer: &'a checked::Consumer,
        known: &Registration,
    ) -> Self {
        let open = |redis| Inspector::open(redis, consumer, &known.marks);
        let claims = match config.redis.as_ref().map(open).transpose() {
            Ok(claims) => claims,
            Err(error) => {
                warn_of_redis(&error);
                None
            }
        };
        Self {
            consumer,
            consumer_id: known.consumer_id,
            retention: config.ledger.retention,
            uses_redis: config.redis.is_some(),
            claims,
        }
    }

    /// Where each of `letters` stands, in their order.
    ///
    /// # Errors
    ///
    /// When the ledger refuses or cannot be asked.
    pub fn judge(
        &mut self,
        session: &mut Session,
        letters: &[&Letter],
    ) -> Result<Vec<Judged>, Error> {
        let now = SystemTime::now();
        let usable = |letter: &Letter| usable_id(letter, self.consumer);
        let ids: Vec<Result<MessageId, DeadReason>> =
            letters.iter().map(|letter| usable(letter)).collect();
        let asked: Vec<Asked<'_>> = letters
            .iter()
            .zip(&ids)
            .filter_map(|(letter, id)| {
                Some(Asked {
                    id: id.as_ref().ok()?,
                    fingerprint: letter.fingerprint,
                })
            })
            .collect();
        let held = self.held(&asked);
        let known = replay::look_up(session, self.consumer_id, &asked)?;
        let mut answers = known.into_iter().zip(held);
        let judged = letters.iter().zip(&ids).map(|(letter, id)| {
            let (known, claimed) = match id {
                Ok(_) => answers.next().unwrap_or_default(),
                Err(_) => (Known::default(), false),
            };
            let facts = Facts {
                unusable: id.as_ref().err().copied(),
                fingerprint: letter.fingerprint,
                applied: known.applied,
                claimed: claimed || known.claimed,
                waits: known.waits,
                age: age(letter, &known, now),
            };
            Judged {
                id: id.as_ref().ok().cloned(),
                fingerprint: letter.fingerprint,
                verdict: plan::judge(&facts, self.retention),
            }
        });
        Ok(judged.collect())
    }

    /// For each whether its id is claimed; asked before the ledger, so that what
    /// is done in between is found there.
    fn held(&mut self, asked: &[Asked<'_>]) -> Vec<bool> {
        let ids: Vec<&MessageId> = asked.iter().map(|asked| asked.id).collect();
        let held = self.claims.as_mut().map(|claims| claims.held(&ids));
        match held {
            Some(Ok(held)) => held,
            Some(Err(error)) => {
                warn_of_redis(&error);
                self.claims = None;
                vec![false; ids.len()]
            }
            None => vec![false; ids.len()],
        }
    }

    /// Claims `id`, so that no worker begins with it and no mark that it is done
    /// is left. `None` when a worker is at it; the inner one when Redis is not
    /// used.
    ///
    /// # Errors
    ///
    /// When Redis is used and does not answer.
    pub fn seize(&mut self, id: &MessageId) -> anyhow::Result<Option<Option<Seized>>> {
        match &mut self.claims {
            Some(claims) => Ok(claims.seize(id)?.map(Some)),
            None if self.uses_redis => Err(anyhow::anyhow!("it did not answer before")),
            None => Ok(Some(None)),
        }
    }

    /// Gives back what was seized.
    ///
    /// # Errors
    ///
    /// When Redis does not answer.
    pub fn let_go(&mut self, seized: &Seized) -> anyhow::Result<()> {
        match &mut self.claims {
            Some(claims) => claims.let_go(seized),
            None => Ok(()),
        }
    }
}

fn warn_of_redis(error: &anyhow::Error) {
    log::warn!("Redis does not answer: what is in work at the moment is not seen: {error}");
}

/// The id by which the consumer would work on it; or the reason for which it
/// would dead-letter it again.
fn usable_id(letter: &Letter, consumer: &checked::Consumer) -> Result<MessageId, DeadReason> {
    match letter.size() > consumer.max_body {
        true => Err(DeadReason::TooLarge),
        false => identity::identify(&letter.message, &consumer.identity),
    }
}

/// The longest time that anything tells. A time that is still to come tells
/// nothing.
fn age(letter: &Letter, known: &Known, now: SystemTime) -> Option<Duration> {
    let died = letter.death.as_ref().and_then(|death| death.at);
    let died = died.and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
    let since = |at: Option<SystemTime>| now.duration_since(at?).ok();
    [
        known.dead_for,
        since(died),
        since(letter.message.published_at),
    ]
    .into_iter()
    .flatten()
    .max()
}
