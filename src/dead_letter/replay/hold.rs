//! What a replay holds: letters that were taken and have not had their turn,
//! and those that were left. All of it is given back now and then, because the
//! broker closes a channel that holds a letter for too long.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

use super::Cut;
use super::engine::{Engine, PURPOSE, no_desk};
use super::sending::LOOK_EVERY;
use crate::dead_letter::letter::Letter;
use crate::message::REPLAY_HEADER;

impl Engine<'_> {
    /// Takes letters until there is one that is asked for, and waits until the
    /// rate lets it go. False when there is none.
    ///
    /// A turn can be as far away as the rate is low: what is held for too long
    /// by then is given back, and taken anew when the turn has come.
    pub(super) fn hold_some(&mut self) -> Result<bool, Cut> {
        loop {
            if self.is_overheld()? {
                self.start_over()?;
            }
            if !self.refill()? {
                return Ok(false);
            }
            while !self.has_turn()? {
                if self.is_overheld()? {
                    self.start_over()?;
                    break;
                }
                self.wait_a_little()?;
            }
            if !self.pending.is_empty() {
                return Ok(true);
            }
        }
    }

    fn is_overheld(&mut self) -> Result<bool, Cut> {
        // Without anything new since the last time it would go round.
        Ok(self.fresh && self.desk()?.held_for() > self.order.hold)
    }

    /// False when there is no letter left that is asked for.
    fn refill(&mut self) -> Result<bool, Cut> {
        while self.pending.is_empty() {
            if self.unread == 0 {
                return Ok(false);
            }
            if self.is_overheld()? {
                self.start_over()?;
            }
            let stop = self.stop;
            let letters = self.desk()?.next(stop)?;
            if letters.is_empty() {
                return Ok(false);
            }
            for (letter, ticket) in letters {
                if !self.is_new(&letter) {
                    continue;
                }
                match self.filter.matches(&letter) {
                    true => {
                        self.report.matched += 1;
                        self.pending.push_back((letter, ticket));
                    }
                    false => self.fresh = true,
                }
            }
        }
        Ok(true)
    }

    /// Whether a letter was there at the start and was not read before.
    fn is_new(&mut self, letter: &Letter) -> bool {
        let run = letter.properties.header(REPLAY_HEADER);
        if run.and_then(|run| run.as_text()) == Some(&self.run) {
            // It was replayed a moment ago, and has come back.
            return false;
        }
        let alike = self.likeness_of(letter);
        *self.held.entry(alike).or_default() += 1;
        if take_one(&mut self.again, alike) || self.unread == 0 {
            return false;
        }
        self.unread -= 1;
        true
    }

    pub(super) fn likeness_of(&self, letter: &Letter) -> u64 {
        self.likeness.hash_one((letter.fingerprint, &letter.id))
    }

    /// Opens the queue anew, and takes nothing from it before the next turn: what
    /// would be taken is not fresh, and so would be held however long that is.
    fn start_over(&mut self) -> Result<(), Cut> {
        self.open_anew()?;
        self.wait_for_turn()
    }

    /// Gives back what is held, before the broker takes it. What was read and
    /// left comes again then, in some order, with what has arrived since. What
    /// was read and had no turn counts as not read.
    fn open_anew(&mut self) -> Result<(), Cut> {
        self.drain()?;
        for (letter, _) in std::mem::take(&mut self.pending) {
            let alike = self.likeness_of(&letter);
            take_one(&mut self.held, alike);
            self.unread += 1;
            self.report.matched -= 1;
        }
        let desk = self.desk.take().ok_or_else(no_desk)?;
        let despite = self.order.despite_limit;
        self.desk = Some(desk.open_anew(self.config, PURPOSE, despite)?);
        for (alike, count) in std::mem::take(&mut self.held) {
            *self.again.entry(alike).or_default() += count;
        }
        self.fresh = false;
        Ok(())
    }

    /// Waits until the rate lets the next one go.
    pub(super) fn wait_for_turn(&mut self) -> Result<(), Cut> {
        while !self.has_turn()? {
            self.wait_a_little()?;
        }
        Ok(())
    }

    /// Whether the rate lets the next one go.
    fn has_turn(&mut self) -> Result<bool, Cut> {
        let now = Instant::now();
        if self.pace.due(now).is_some_and(|due| due <= now) {
            return Ok(true);
        }
        self.settle(Duration::ZERO)?;
        Ok(false)
    }

    /// Waits for the next turn, though not long.
    fn wait_a_little(&mut self) -> Result<(), Cut> {
        let now = Instant::now();
        let due = self.pace.due(now);
        let wait = due.map_or(LOOK_EVERY, |due| due.saturating_duration_since(now));
        let wait = wait.min(LOOK_EVERY);
        match self.out.is_empty() {
            true => drop(self.stop.wait(wait)),
            false => self.settle(wait)?,
        }
        match self.stop.is_set() {
            true => Err(Cut::Stopped),
            false => Ok(()),
        }
    }
}

/// One fewer of them; whether there was one.
pub(super) fn take_one(counts: &mut HashMap<u64, u32>, of: u64) -> bool {
    let Some(count) = counts.get_mut(&of) else {
        return false;
    };
    *count -= 1;
    if *count == 0 {
        counts.remove(&of);
    }
    true
}
