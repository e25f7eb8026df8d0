//! Which deliveries of one connection are out, and the fewest acks that tell
//! the broker what became of them. Pure.

use std::collections::BTreeMap;

use crate::message::Settlement;

/// What is to be sent, holding the delivery to send it with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order<D> {
    /// Ack this delivery and every one before it.
    AckUpTo(D),
    /// Ack this delivery.
    Ack(D),
    /// Dead-letter this delivery.
    Reject(D),
    /// Give this delivery back.
    Requeue(D),
}

#[derive(Debug)]
struct Slot<D> {
    delivery: D,
    acked: bool,
}

/// The unacknowledged deliveries of one channel, by tag: never more than its
/// prefetch.
#[derive(Debug)]
pub struct Window<D> {
    slots: BTreeMap<u64, Slot<D>>,
    waiting: usize,
}

impl<D> Default for Window<D> {
    fn default() -> Self {
        Self {
            slots: BTreeMap::new(),
            waiting: 0,
        }
    }
}

impl<D> Window<D> {
    /// Notes a delivery.
    pub fn put(&mut self, tag: u64, delivery: D) {
        let acked = false;
        self.slots.insert(tag, Slot { delivery, acked });
    }

    /// Deliveries that the broker has not been told about.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.slots.len()
    }

    /// Acks that are held back in the hope of saying them with one.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// A delivery that the broker has not been told about, nor will be with the
    /// next acks.
    pub fn get_mut(&mut self, tag: u64) -> Option<&mut D> {
        let slot = self.slots.get_mut(&tag).filter(|slot| !slot.acked)?;
        Some(&mut slot.delivery)
    }

    /// Notes what became of a delivery. Acks are held back until
    /// [`Window::in_turn`] or [`Window::all`]; the rest is to be sent now. A
    /// tag that is not out, or was settled before, is left alone.
    #[must_use]
    pub fn settle(&mut self, tag: u64, settlement: Settlement) -> Option<Order<D>> {
        let slot = self.slots.get_mut(&tag).filter(|slot| !slot.acked)?;
        let order: fn(D) -> Order<D> = match settlement {
            Settlement::Ack => {
                slot.acked = true;
                self.waiting += 1;
                return None;
            }
            Settlement::Reject => Order::Reject,
            Settlement::Requeue => Order::Requeue,
            // Its copy comes first; then it is acked.
            Settlement::Retry => return None,
        };
        self.slots.remove(&tag).map(|slot| order(slot.delivery))
    }

    /// One ack for everything before the first delivery that is still out.
    #[must_use]
    pub fn in_turn(&mut self) -> Option<Order<D>> {
        let mut acked = 0;
        let mut last = None;
        while let Some(first) = self.slots.first_entry() {
            if !first.get().acked {
                break;
            }
            acked += 1;
            last = Some(first.remove().delivery);
        }
        self.waiting -= acked;
        match acked {
            1 => last.map(Order::Ack),
            _ => last.map(Order::AckUpTo),
        }
    }

    /// Every ack there is: one for those in turn, one each for the others.
    #[must_use]
    pub fn all(&mut self) -> Vec<Order<D>> {
        let mut orders: Vec<Order<D>> = self.in_turn().into_iter().collect();
        if self.waiting > 0 {
            let acked = self.slots.extract_if(.., |_, slot| slot.acked);
            orders.extend(acked.map(|(_, slot)| Order::Ack(slot.delivery)));
        }
        self.waiting = 0;
        orders
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use proptest::prelude::*;

    /// A broker's memory of what is unacknowledged.
    #[derive(Default)]
    struct Unacked {
        out: BTreeMap<u64, Option<Settlement>>,
    }

    impl Unacked {
        fn told(&mut self, tag: u64, settlement: Settlement) {
            let wanted = self.out.remove(&tag).expect("settled twice, or never out");
            assert_eq!(wanted, Some(settlement), "tag {tag}");
        }

        fn obey(&mut self, order: Order<u64>) {
            match order {
                Order::Ack(tag) => self.told(tag, Settlement::Ack),
                Order::Reject(tag) => self.told(tag, Settlement::Reject),
                Order::Requeue(tag) => self.told(tag, Settlement::Requeue),
                Order::AckUpTo(last) => {
                    assert!(self.out.contains_key(&last), "unknown delivery tag {last}");
                    let tags: Vec<u64> = self.out.range(..=last).map(|(tag, _)| *tag).collect();
                    for tag in tags {
                        self.told(tag, Settlement::Ack);
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn each_delivery_is_told_once_and_only_what_became_of_it(
            steps in proptest::collection::vec((0..5u8, any::<u16>()), 0..300)
        ) {
            let mut window = Window::default();
            let mut broker = Unacked::default();
            let mut next = 1;
            for (what, pick) in steps {
                let undecided: Vec<u64> =
                    broker.out.iter().filter(|(_, s)| s.is_none()).map(|(t, _)| *t).collect();
                match (what, undecided.get(usize::from(pick) % undecided.len().max(1))) {
                    (0..=1, _) | (_, None) => {
                        window.put(next, next);
                        broker.out.insert(next, None);
                        next += 1;
                    }
                    (2, _) => window.in_turn().into_iter().for_each(|o| broker.obey(o)),
                    (_, Some(tag)) => {
                        let settlement = match pick % 5 {
                            0 => Settlement::Reject,
                            1 => Settlement::Requeue,
                            _ => Settlement::Ack,
                        };
                        broker.out.insert(*tag, Some(settlement));
                        if let Some(order) = window.settle(*tag, settlement) {
                            broker.obey(order);
                        }
                        prop_assert!(window.settle(*tag, Settlement::Ack).is_none());
                    }
                }
                let held = broker.out.values().filter(|s| **s == Some(Settlement::Ack)).count();
                prop_assert_eq!(window.waiting(), held);
                prop_assert_eq!(window.outstanding(), broker.out.len());
            }
            window.all().into_iter().for_each(|o| broker.obey(o));
            prop_assert!(broker.out.values().all(Option::is_none));
            prop_assert_eq!(window.waiting(), 0);
        }
    }

    #[test]
    fn a_run_of_acks_is_one_order() {
        let mut window = Window::default();
        for tag in 1..=4 {
            window.put(tag, tag);
        }
        for tag in [3, 1, 2] {
            assert_eq!(window.settle(tag, Settlement::Ack), None);
        }
        assert_eq!(window.in_turn(), Some(Order::AckUpTo(3)));
        assert_eq!(window.in_turn(), None);
        assert_eq!(window.settle(9, Settlement::Ack), None);
        assert_eq!(window.outstanding(), 1);
    }
}
