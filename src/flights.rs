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
    /// with the owner there is, after `on_join`. Those that joined earlier and
    /// that `is_void` in the face of the new one are dropped, so that a message
    /// that is redelivered again and again is held once.
    pub fn enter(
        &self,
        id: &MessageId,
        mut item: T,
        is_void: impl Fn(&T, &T) -> bool,
        on_join: impl FnOnce(&mut T),
    ) -> Option<T> {
        let mut joined = self.lock();
        match joined.get_mut(id) {
            Some(others) => {
                on_join(&mut item);
                others.retain(|other| !is_void(other, &item));
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
        let enter = |n: i32| flights.enter(&id, n, |_, _| false, |n| *n += 10);
        assert_eq!(enter(1), Some(1));
        assert_eq!(enter(2), None);
        assert_eq!(enter(3), None);
        assert_eq!(flights.hand_over(&id), Some(12));
        assert_eq!(enter(4), None, "the new owner keeps the id");
        assert_eq!(flights.leave(&id), [13, 14]);
        assert_eq!(enter(5), Some(5));
        assert_eq!(flights.hand_over(&id), None);
        assert_eq!(enter(6), Some(6), "handing over to nobody ends the work");
    }

    #[test]
    fn what_a_newer_delivery_makes_void_is_dropped() {
        let flights = Flights::default();
        let id = MessageId::new("a").unwrap();
        let enter = |n: i32| flights.enter(&id, n, |old, new| old < new, |_| ());
        assert_eq!(enter(1), Some(1));
        for n in [2, 2, 3] {
            assert_eq!(enter(n), None);
        }
        assert_eq!(flights.leave(&id), [3]);
    }
}
