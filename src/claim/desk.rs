//! What the dead-letter desk asks Redis: who works on an id right now; and how
//! a mark is made to go together with the ledger row that it speaks of.

use std::time::Duration;

use redis::{Connection, Script, Value};

use super::link::{Way, describe};
use super::{Claim, Tokens, key, milliseconds, read, stem};
use crate::config::checked;
use crate::message::MessageId;
use crate::seal::Marks;

/// Puts our claim on a key, in the place of a mark or of nothing. 0 when
/// somebody else holds it.
const SEIZE: &str = "local found = redis.call('get', KEYS[1]) \
     if found and string.sub(found, 1, 2) ~= 'd:' then return 0 end \
     redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2]) return 1";

/// Takes our claim away, and a mark that somebody made in its place meanwhile.
const LET_GO: &str = "local found = redis.call('get', KEYS[1]) \
     if found and (found == ARGV[1] or string.sub(found, 1, 2) == 'd:') \
     then return redis.call('del', KEYS[1]) else return 0 end";

/// A connection of its own, for one consumer. It is not replaced when it is
/// lost: the caller says what to do then.
pub struct Inspector {
    connection: Connection,
    stem: String,
    lease: Duration,
    tokens: Tokens,
}

/// A claim that was seized, to be let go.
#[must_use = "it holds workers up until it is let go or its lease runs out"]
#[derive(Debug)]
pub struct Seized {
    key: String,
    value: String,
}

impl Inspector {
    /// Connects. Its keys are those of the ledger with these `marks`.
    ///
    /// # Errors
    ///
    /// When Redis cannot be reached or does not let us in.
    pub fn open(
        redis: &checked::Redis,
        consumer: &checked::Consumer,
        marks: &Marks,
    ) -> anyhow::Result<Self> {
        let connection = Way::new(redis)?
            .connect(redis.timeout)
            .map_err(|error| anyhow::anyhow!(describe(&error, redis.timeout)))?;
        Ok(Self {
            connection,
            stem: stem(&redis.key_prefix, marks, &consumer.name),
            lease: consumer.claim.lease,
            tokens: Tokens::new()?,
        })
    }

    /// For each of `ids`: whether somebody holds the claim on it.
    ///
    /// # Errors
    ///
    /// When Redis does not answer; then the connection must be dropped.
    pub fn held(&mut self, ids: &[&MessageId]) -> anyhow::Result<Vec<bool>> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut command = redis::cmd("MGET");
        for id in ids {
            command.arg(key(&self.stem, id));
        }
        let values: Vec<Value> = command.query(&mut self.connection)?;
        let held = |value: &Value| read(value, "", |_| false) == Claim::Held;
        Ok(values.iter().map(held).collect())
    }

    /// Claims `id`, and takes a mark away that says it is done: for the length
    /// of a lease no worker begins with it, and none believes the mark. `None`
    /// when somebody works on it.
    ///
    /// # Errors
    ///
    /// As [`Self::held`].
    pub fn seize(&mut self, id: &MessageId) -> anyhow::Result<Option<Seized>> {
        let seized = Seized {
            key: key(&self.stem, id),
            value: self.tokens.next().value(),
        };
        let won: i64 = Script::new(SEIZE)
            .key(&seized.key)
            .arg(&seized.value)
            .arg(milliseconds(self.lease))
            .invoke(&mut self.connection)?;
        Ok((won == 1).then_some(seized))
    }

    /// Gives back what was seized, and takes away a mark that a worker made
    /// meanwhile: it speaks of a row that is gone.
    ///
    /// # Errors
    ///
    /// As [`Self::held`]; the claim ends with its lease then, but a mark stays.
    pub fn let_go(&mut self, seized: &Seized) -> anyhow::Result<()> {
        let _gone: i64 = Script::new(LET_GO)
            .key(&seized.key)
            .arg(&seized.value)
            .invoke(&mut self.connection)?;
        Ok(())
    }
}
