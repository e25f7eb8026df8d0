//! Which published message came to which end: sequence numbers, confirms and
//! returns. Pure bookkeeping, no I/O and no AMQP types.
//!
//! # How a return finds its message
//!
//! The broker confirms by sequence number but returns an unroutable message by
//! value, before it confirms it. A mark of our own in the message would name
//! it, and would also reach the consumers of every message that is not
//! returned. So a return is matched by what was published: exchange, routing
//! key, properties and body, as two hashes. Of several equal messages the
//! oldest one is taken, which may be the wrong one of them when the route
//! appeared or went in between; as they are equal in every byte, it makes no
//! difference to anybody which of them is published again.
//!
//! A server-side plugin may add a header or a timestamp to what it returns;
//! then the looser hash (exchange, routing key, message id, body) decides. A
//! return that fits no message at all means that one of the unconfirmed was
//! not delivered and nobody knows which: the caller then gives all of them up
//! as [`Fate::Unknown`] rather than call one of them confirmed.

use std::collections::BTreeMap;

use thiserror::Error;

/// Number of a published message, counted per publisher from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seq(pub u64);

/// The end of a published message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// Every queue it was routed to has it.
    Confirmed,
    /// It was routed to no queue.
    Returned {
        /// AMQP reply code; 312 is `NO_ROUTE`.
        code: u16,
        /// The broker's words.
        text: String,
    },
    /// A queue refused it (full, with `x-overflow = reject-publish`), or the
    /// broker failed to store it.
    Nacked,
    /// The connection was lost before it was confirmed: it may have arrived or
    /// not.
    Unknown,
}

/// What a message is recognised by when it is returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Likeness {
    /// Everything that was published.
    pub exact: u64,
    /// Exchange, routing key, message id and body.
    pub loose: u64,
}

/// A confirm or return that fits nothing that was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Stray {
    /// A confirm for a number that was not given out.
    #[error("the broker confirmed message {0}, which was not published")]
    Confirm(u64),
    /// A return that equals no unconfirmed message.
    #[error("the broker returned a message that was not published, or was changed on its way")]
    Return,
}

/// The unconfirmed messages of one channel.
#[derive(Debug, Default)]
pub struct Book {
    last: u64,
    unconfirmed: BTreeMap<u64, Entry>,
    bytes: usize,
    settled: Vec<(Seq, Fate)>,
}

#[derive(Debug)]
struct Entry {
    likeness: Likeness,
    bytes: usize,
    returned: Option<(u16, String)>,
}

impl Book {
    /// Enters a message that is about to be published. The broker counts the
    /// same way, so every message entered must be sent or withdrawn.
    pub fn enter(&mut self, likeness: Likeness, bytes: usize) -> Seq {
        self.last += 1;
        self.bytes += bytes;
        let entry = Entry {
            likeness,
            bytes,
            returned: None,
        };
        self.unconfirmed.insert(self.last, entry);
        Seq(self.last)
    }

    /// Takes back a message that has no fate of its own because publishing it
    /// failed. Nothing can be published after that: the count is off.
    pub fn withdraw(&mut self, seq: Seq) {
        if let Some(entry) = self.unconfirmed.remove(&seq.0) {
            self.bytes -= entry.bytes;
        }
    }

    /// Notes that the broker returned a message. Its fate is settled by the
    /// confirm that follows.
    ///
    /// # Errors
    ///
    /// [`Stray::Return`] when no unconfirmed message is like it.
    pub fn returned(&mut self, likeness: Likeness, code: u16, text: &str) -> Result<(), Stray> {
        let exact = |entry: &Entry| entry.likeness == likeness;
        let loose = |entry: &Entry| entry.likeness.loose == likeness.loose;
        let seq = self
            .oldest_unreturned(exact)
            .or_else(|| self.oldest_unreturned(loose))
            .ok_or(Stray::Return)?;
        if let Some(entry) = self.unconfirmed.get_mut(&seq) {
            entry.returned = Some((code, text.to_owned()));
        }
        Ok(())
    }

    fn oldest_unreturned(&self, like: impl Fn(&Entry) -> bool) -> Option<u64> {
        self.unconfirmed
            .iter()
            .find(|(_, entry)| entry.returned.is_none() && like(entry))
            .map(|(seq, _)| *seq)
    }

    /// Settles message `seq`, or with `multiple` all up to it; 0 with
    /// `multiple` is all there are. `positive` is an ack, otherwise a nack.
    ///
    /// Returns that the broker sent before this confirm must be noted before.
    /// Confirming what is settled changes nothing.
    ///
    /// # Errors
    ///
    /// [`Stray::Confirm`] when `seq` was not given out.
    pub fn confirmed(&mut self, seq: u64, multiple: bool, positive: bool) -> Result<(), Stray> {
        if seq > self.last || (seq == 0 && !multiple) {
            return Err(Stray::Confirm(seq));
        }
        if !multiple {
            if let Some(entry) = self.unconfirmed.remove(&seq) {
                self.settle(seq, entry, positive);
            }
            return Ok(());
        }
        let up_to = if seq == 0 { self.last } else { seq };
        while let Some(first) = self.unconfirmed.first_entry() {
            if *first.key() > up_to {
                break;
            }
            let (seq, entry) = first.remove_entry();
            self.settle(seq, entry, positive);
        }
        Ok(())
    }

    fn settle(&mut self, seq: u64, entry: Entry, positive: bool) {
        self.bytes -= entry.bytes;
        let fate = match entry.returned {
            Some((code, text)) => Fate::Returned { code, text },
            None if positive => Fate::Confirmed,
            None => Fate::Nacked,
        };
        self.settled.push((Seq(seq), fate));
    }

    /// The connection is gone: what is unconfirmed stays so. What was returned
    /// is known not to have arrived.
    pub fn lost(&mut self) {
        self.bytes = 0;
        for (seq, entry) in std::mem::take(&mut self.unconfirmed) {
            let fate = match entry.returned {
                Some((code, text)) => Fate::Returned { code, text },
                None => Fate::Unknown,
            };
            self.settled.push((Seq(seq), fate));
        }
    }

    /// The fates settled since the last call, each message once.
    pub fn take_settled(&mut self) -> Vec<(Seq, Fate)> {
        std::mem::take(&mut self.settled)
    }

    /// True when [`Book::take_settled`] would return something.
    #[must_use]
    pub fn has_settled(&self) -> bool {
        !self.settled.is_empty()
    }

    /// How many messages are unconfirmed.
    #[must_use]
    pub fn unconfirmed(&self) -> usize {
        self.unconfirmed.len()
    }

    /// How many bytes they were said to have.
    #[must_use]
    pub fn unconfirmed_bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn like(content: u64) -> Likeness {
        Likeness {
            exact: content,
            loose: content / 10,
        }
    }

    fn book_of(contents: &[u64]) -> Book {
        let mut book = Book::default();
        for content in contents {
            book.enter(like(*content), 1);
        }
        book
    }

    fn no_route() -> Fate {
        Fate::Returned {
            code: 312,
            text: "NO_ROUTE".to_owned(),
        }
    }

    #[test]
    fn a_return_is_the_fate_of_its_message_and_of_no_other() {
        let mut book = book_of(&[10, 20, 30]);
        book.returned(like(20), 312, "NO_ROUTE").unwrap();
        book.confirmed(3, true, true).unwrap();
        assert_eq!(
            book.take_settled(),
            [
                (Seq(1), Fate::Confirmed),
                (Seq(2), no_route()),
                (Seq(3), Fate::Confirmed)
            ]
        );
    }

    #[test]
    fn of_equal_messages_as_many_are_returned_as_the_broker_returned() {
        let mut book = book_of(&[10, 10, 10]);
        book.returned(like(10), 312, "NO_ROUTE").unwrap();
        book.returned(like(10), 312, "NO_ROUTE").unwrap();
        book.confirmed(0, true, true).unwrap();
        let fates = book.take_settled();
        assert_eq!(
            fates.iter().filter(|(_, fate)| *fate == no_route()).count(),
            2
        );
    }

    #[test]
    fn a_return_that_a_plugin_changed_is_matched_by_id_and_body() {
        let mut book = book_of(&[11, 21, 22]);
        book.returned(like(29), 312, "NO_ROUTE").unwrap();
        book.confirmed(0, true, true).unwrap();
        assert_eq!(book.take_settled()[1], (Seq(2), no_route()));
        assert_eq!(
            book_of(&[10]).returned(like(70), 312, ""),
            Err(Stray::Return)
        );
    }

    #[test]
    fn a_confirm_of_what_was_not_published_is_an_error() {
        let mut book = book_of(&[1, 2]);
        assert_eq!(book.confirmed(3, true, true), Err(Stray::Confirm(3)));
        assert_eq!(book.confirmed(3, false, true), Err(Stray::Confirm(3)));
        assert_eq!(book.confirmed(0, false, true), Err(Stray::Confirm(0)));
        assert_eq!(book.unconfirmed(), 2);
    }

    #[test]
    fn what_is_unconfirmed_when_the_connection_goes_is_unknown() {
        let mut book = book_of(&[10, 20, 30]);
        book.returned(like(30), 312, "NO_ROUTE").unwrap();
        book.confirmed(1, false, true).unwrap();
        book.lost();
        assert_eq!(
            book.take_settled(),
            [
                (Seq(1), Fate::Confirmed),
                (Seq(2), Fate::Unknown),
                (Seq(3), no_route())
            ]
        );
        assert_eq!((book.unconfirmed(), book.unconfirmed_bytes()), (0, 0));
    }

    #[derive(Debug, Clone, Copy)]
    enum Event {
        Publish {
            content: u64,
        },
        Return {
            content: u64,
        },
        Confirm {
            share: f64,
            multiple: bool,
            positive: bool,
        },
        Lost,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            8 => (0..40_u64).prop_map(|content| Event::Publish { content }),
            2 => (0..40_u64).prop_map(|content| Event::Return { content }),
            6 => (0.0..1.05_f64, any::<bool>(), any::<bool>()).prop_map(
                |(share, multiple, positive)| Event::Confirm { share, multiple, positive }
            ),
            1 => Just(Event::Lost),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Against a model that remembers, per message, the first confirm that
        /// covered it.
        #[test]
        fn every_message_has_exactly_one_fate_and_a_nack_is_never_a_confirm(
            events in proptest::collection::vec(event(), 0..200),
        ) {
            let mut book = Book::default();
            let mut published = 0;
            let mut verdicts: HashMap<u64, bool> = HashMap::new();
            let mut returns = 0;
            let mut gone = 0;
            for event in events {
                match event {
                    Event::Publish { content } => {
                        published += 1;
                        prop_assert_eq!(book.enter(like(content), 3), Seq(published));
                    }
                    Event::Return { content } => {
                        if book.returned(like(content), 312, "NO_ROUTE").is_ok() {
                            returns += 1;
                        }
                    }
                    Event::Confirm { share, multiple, positive } => {
                        let seq = (share * published as f64) as u64;
                        if book.confirmed(seq, multiple, positive).is_err() {
                            continue;
                        }
                        let up_to = if seq == 0 { published } else { seq };
                        let from = if multiple { 1 } else { up_to };
                        for seq in from..=up_to {
                            if seq > gone {
                                verdicts.entry(seq).or_insert(positive);
                            }
                        }
                    }
                    Event::Lost => {
                        book.lost();
                        gone = published;
                    }
                }
            }
            book.lost();
            let fates = book.take_settled();
            prop_assert_eq!(book.unconfirmed(), 0);
            prop_assert_eq!(book.unconfirmed_bytes(), 0);
            prop_assert_eq!(fates.len() as u64, published);
            let mut seen = HashMap::new();
            for (Seq(seq), fate) in fates {
                let expected = matches!(
                    (&fate, verdicts.get(&seq)),
                    (Fate::Returned { .. }, _)
                        | (Fate::Confirmed, Some(true))
                        | (Fate::Nacked, Some(false))
                        | (Fate::Unknown, None)
                );
                prop_assert!(expected, "message {seq} ended as {fate:?}");
                prop_assert!(seen.insert(seq, fate).is_none(), "message {seq} has two fates");
            }
            let returned = seen.values().filter(|fate| matches!(fate, Fate::Returned { .. }));
            prop_assert_eq!(returned.count(), returns);
        }
    }
}
