//! Which ids this process is working on. A second delivery of such an id does
//! not start work of its own: it joins, and is settled when the first one is.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::message::MessageId;

/// Ids in flight in one consumer, each with the deliveries that joined. Bounded
/// by the consumer's prefetch, like everything that is unacknowledged.
#[derive(Debug)]
pub struct Flights<T> {
    joined: Mutex<HashMap<MessageId, Vec<T>>>,
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self {
            joined: Mutex::default(),
        }
    }
}

impl<T> Flights<T> {
    /// Makes the caller the owner of `id` and gives `item` back; or keeps it
    /// with the owner there is, after `on_join`.
    pub fn enter(&self, id: &MessageId, mut item: T, on_join: impl FnOnce(&mut T)) -> Option<T> {
        let mut joined = self.lock();
        match joined.get_mut(id) {
            Some(others) => {
                on_join(&mut item);
                others.push(item);
                None
            }
            None => {
                joined.insert(id.clone(), Vec::new());
                Some(item)
            }
        }
    }

    /// Ends the work on `id` and gives out what joined it.
    pub fn leave(&self, id: &MessageId) -> Vec<T> {
        self.lock().remove(id).unwrap_or_default()
    }

    /// Hands the work on `id` to the first that joined, the others staying
    /// with it; or ends it when there is none.
    pub fn hand_over(&self, id: &MessageId) -> Option<T> {
        let mut joined = self.lock();
        let others = joined.get_mut(id)?;
        if others.is_empty() {
            joined.remove(id);
            return None;
        }
        Some(others.remove(0))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<MessageId, Vec<T>>> {
        self.joined.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_at_a_time_and_nobody_is_forgotten() {
        let flights = Flights::default();
        let id = MessageId::new("a").unwrap();
        assert_eq!(flights.enter(&id, 1, |_| ()), Some(1));
        assert_eq!(flights.enter(&id, 2, |n| *n += 10), None);
        assert_eq!(flights.enter(&id, 3, |n| *n += 10), None);
        assert_eq!(flights.hand_over(&id), Some(12));
        assert_eq!(
            flights.enter(&id, 4, |_| ()),
            None,
            "the new owner keeps the id"
        );
        assert_eq!(flights.leave(&id), [13, 4]);
        assert_eq!(flights.enter(&id, 5, |_| ()), Some(5));
        assert_eq!(flights.hand_over(&id), None);
        assert_eq!(
            flights.enter(&id, 6, |_| ()),
            Some(6),
            "handing over to nobody ends the work"
        );
    }
}
