//! Messages that may have killed a worker. What comes back `redelivered` was
//! in somebody's hands when a connection, a worker or a process ended. Before
//! such a message is run, a mark in the ledger says so, and the commit of its
//! effect takes the mark away: a mark that another worker left behind is a
//! death. Who has one is run alone, and who has too many is quarantined; what
//! was only near it goes on.

use std::collections::{HashMap, VecDeque};

use super::Worker;
use super::item::Item;
use crate::failure::{Class, Failure};
use crate::ledger::Applied;
use crate::lifecycle::Event;
use crate::message::MessageId;
use crate::postgres::Error;

impl Worker {
    /// Looks at the redelivered among `items`. False when some of them have to
    /// be run alone and are not.
    pub(super) fn examine(&mut self, items: &mut Vec<Item>) -> Result<bool, Error> {
        let unexamined = |item: &Item| item.delivery.message.redelivered && !item.examined;
        if items.iter().any(unexamined) {
            self.look_for_marks(items)?;
        }
        Ok(items.len() < 2 || !items.iter().any(|item| item.alone))
    }

    fn look_for_marks(&mut self, items: &mut Vec<Item>) -> Result<(), Error> {
        let ids: Vec<&str> = items
            .iter()
            .filter(|item| item.delivery.message.redelivered && !item.examined)
            .filter_map(|item| item.id.as_ref().map(MessageId::as_str))
            .collect();
        let deaths = self.ledger.suspects(&ids)?;
        // A mark is first made when the message has come back once.
        let deaths_of = |id: &str| match deaths.get(id) {
            Some(seen) if *seen > 0 => seen.saturating_add(1),
            _ => 0,
        };
        let most = self.shared.consumer.max_deaths;
        let doomed: Vec<&str> = ids.into_iter().filter(|id| deaths_of(id) >= most).collect();
        // All is asked before anything is decided: what an error interrupts is
        // tried again.
        let found = match doomed.is_empty() {
            true => HashMap::new(),
            false => self.ledger.find(&doomed)?,
        };
        for mut item in std::mem::take(items) {
            let id = item.id.as_ref().map_or("", MessageId::as_str);
            let seen = deaths_of(id);
            item.examined = true;
            item.alone |= seen > 0;
            if seen < most {
                items.push(item);
                continue;
            }
            let known = found.get(id).copied();
            self.quarantine(item, seen, known);
        }
        Ok(())
    }

    /// Dead-letters what its workers died of, unless it took effect after all.
    fn quarantine(&mut self, mut item: Item, deaths: u32, known: Option<Applied>) {
        item.marked = true;
        if let Some(row) = known {
            let body = item.found(row);
            return self.advance(item, Event::Found(body));
        }
        item.failure = Some(Failure {
            class: Class::Permanent,
            code: None,
            text: format!("its worker died {deaths} times while it was in work"),
            retry_after: None,
        });
        self.advance(item, Event::Quarantined);
    }

    /// Marks the redelivered among `items`, before they are run.
    pub(super) fn mark_suspects(&mut self, items: &mut [Item]) -> Result<(), Error> {
        let suspects = |item: &&Item| item.delivery.message.redelivered && !item.marked;
        let ids: Vec<&str> = items
            .iter()
            .filter(suspects)
            .filter_map(|item| item.id.as_ref().map(MessageId::as_str))
            .collect();
        if ids.is_empty() {
            return Ok(());
        }
        self.ledger.mark(&ids)?;
        for item in items {
            item.marked |= item.delivery.message.redelivered;
        }
        Ok(())
    }

    /// Takes the marks off what only waits: a process that is ended meanwhile
    /// has not died of it. Where that fails, a mark can make its message run
    /// alone, later.
    pub(super) fn rest_suspects(&mut self, groups: &mut VecDeque<Vec<Item>>) {
        let mut marked: Vec<&mut Item> = groups
            .iter_mut()
            .flatten()
            .filter(|item| item.marked)
            .collect();
        let ids: Vec<&str> = marked
            .iter()
            .filter_map(|item| item.id.as_ref().map(MessageId::as_str))
            .collect();
        if ids.is_empty() {
            return;
        }
        match self.ledger.rest(&ids) {
            Ok(()) => marked.iter_mut().for_each(|item| item.marked = false),
            Err(error) => {
                log::debug!(consumer = self.shared.consumer.name.as_str(); "marks stay: {error}");
            }
        }
    }

    /// Takes the marks away, in the transaction of the effects.
    pub(super) fn unmark_suspects(&mut self, items: &[Item]) -> Result<(), Error> {
        let ids: Vec<&str> = items
            .iter()
            .filter(|item| item.marked)
            .filter_map(|item| item.id.as_ref().map(MessageId::as_str))
            .collect();
        match ids.is_empty() {
            true => Ok(()),
            false => self.ledger.unmark(&ids),
        }
    }
}
