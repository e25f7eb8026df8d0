//! What the guard repaired, delivery by delivery, until the consumer asks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::message::Repairs;

/// Repaired deliveries remembered per connection. AMQP's prefetch count is a
/// `u16`, so one consumer cannot have more deliveries that it has not asked for.
pub const REPAIRS_MAX: usize = 65_536;

/// The repairs of one connection's deliveries, shared between the guard and the
/// consumer. Asking costs one atomic load while nothing was ever repaired.
///
/// Beyond [`REPAIRS_MAX`] records the oldest is dropped, and from then on every
/// delivery of its channel up to its tag counts as repaired in all parts:
/// damage is reported twice rather than never.
#[derive(Debug, Clone, Default)]
pub struct RepairLog(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// `known.len() + dropped.len()`, so that an empty log needs no lock.
    length: AtomicUsize,
    records: Mutex<Records>,
}

#[derive(Debug, Default)]
struct Records {
    known: BTreeMap<(u16, u64), Repairs>,
    /// By channel, the highest tag whose record was dropped.
    dropped: BTreeMap<u16, u64>,
}

impl RepairLog {
    /// What was repaired in the delivery `tag` of `channel`, and forgets it.
    /// Ask once per delivery, before the channel is closed and its number
    /// opened again: the tags start anew there, and with them the records.
    #[must_use]
    pub fn take(&self, channel: u16, tag: u64) -> Repairs {
        if self.0.length.load(Ordering::Acquire) == 0 {
            return Repairs::default();
        }
        let mut records = self.lock();
        let repairs = match records.known.remove(&(channel, tag)) {
            Some(repairs) => repairs,
            None => {
                let lost = records.dropped.get(&channel).is_some_and(|&to| tag <= to);
                Repairs {
                    message_id: lost,
                    headers: lost,
                    other: lost,
                }
            }
        };
        self.count(&records);
        repairs
    }

    /// Remembers the repairs of a delivery, if there were any.
    pub(super) fn record(&self, channel: u16, tag: u64, repairs: Repairs) {
        if repairs == Repairs::default() {
            return;
        }
        let mut records = self.lock();
        records.known.insert((channel, tag), repairs);
        if records.known.len() > REPAIRS_MAX
            && let Some(((channel, tag), _)) = records.known.pop_first()
        {
            let to = records.dropped.entry(channel).or_default();
            *to = tag.max(*to);
        }
        self.count(&records);
    }

    /// Drops the records of a channel number that was opened anew.
    pub(super) fn forget(&self, channel: u16) {
        if self.0.length.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut records = self.lock();
        records.known.retain(|&(of, _), _| of != channel);
        records.dropped.remove(&channel);
        self.count(&records);
    }

    fn lock(&self) -> MutexGuard<'_, Records> {
        self.0
            .records
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, records: &Records) {
        let length = records.known.len() + records.dropped.len();
        self.0.length.store(length, Ordering::Release);
    }
}
