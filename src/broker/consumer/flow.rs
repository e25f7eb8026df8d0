//! The deliveries of one connection: to the workers, and settled as they say.

mod looks;

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use amiquip::{Channel, ConsumerMessage};
use crossbeam_channel::{Receiver, TrySendError, never, select};

use super::{CALL_WITHIN, End, Feed, PAUSE_AFTER};
use crate::broker::cause::{Cause, Happening};
use crate::broker::connection::Link;
use crate::broker::convert;
use crate::broker::courier::{Copy, Courier, Delivered};
use crate::broker::guard::RepairLog;
use crate::broker::topology::{self, WaysBack};
use crate::broker::window::{Order, Window};
use crate::config::checked::{self, DeadLetters};
use crate::failpoint::{self, Mutant, Step};
use crate::lifecycle;
use crate::message::{DeadReason, Delivery, Epoch, Parcel, Purpose, Settled, Settlement, Ticket};
use crate::observe::metrics::Meter;
use looks::PROBES_WITHIN;

/// How long an ack out of turn is held back in the hope that the one before
/// it comes, so that one frame says both.
const HOLD_ACKS: Duration = Duration::from_millis(5);

/// How long a stop waits for the copies that are on their way.
const COURIER_WITHIN: Duration = Duration::from_millis(2_500);

/// Longest wait for something to happen: then it is shown that nothing has.
const BEAT: Duration = Duration::from_secs(1);

/// Deliveries taken in one go before settlements are looked at.
const BURST: usize = 256;

/// A settled delivery of the current connection, without its body.
type Shell = Box<amiquip::Delivery>;

/// Why a subscription ends.
pub(super) enum Turn {
    /// The gate has been closed for long enough.
    Pause,
    /// The gate is open again.
    Resume,
    /// The daemon stops.
    Stop,
    /// Consuming cannot go on.
    End(End),
}

/// The deliveries of one connection.
pub(super) struct Flow<'a> {
    link: &'a Link,
    channel: &'a Channel,
    epoch: Epoch,
    repairs: RepairLog,
    window: Window<Shell>,
    courier: Courier,
    /// Deliveries whose copy is with the courier.
    copying: HashSet<u64>,
    meter: Arc<Meter>,
    /// Whether the daemon publishes dead letters itself.
    publishes: bool,
    /// What [`Flow::settled`] said when it was last shown.
    shown: u64,
    /// Deliveries that found the inbox full.
    kept: VecDeque<Delivery>,
    /// When acks that are held back must go.
    acks_due: Option<Instant>,
    /// Orders that were handed to the connection.
    settled: u64,
    ways_back: Arc<WaysBack>,
    /// When it is looked whether a probe can still come.
    look_for_probes: Instant,
    /// Looks in a row that found no reason for a probe to stay away.
    looks: u32,
    /// Whether the queue is known to be no stream.
    is_no_stream: bool,
}

impl<'a> Flow<'a> {
    pub(super) fn new(
        link: &'a Link,
        channel: &'a Channel,
        feed: &Feed<'_>,
        unproved: Vec<String>,
    ) -> std::io::Result<Self> {
        let ways_back = Arc::new(WaysBack::new(unproved));
        let courier = Courier::start(
            feed.broker,
            link.server(),
            feed.consumer,
            feed.signer,
            feed.backoff,
            Arc::clone(&ways_back),
        )?;
        Ok(Self {
            link,
            channel,
            epoch: feed.epoch,
            repairs: link.repairs(),
            window: Window::default(),
            courier,
            copying: HashSet::new(),
            meter: Arc::clone(&feed.signs.meter),
            publishes: feed.consumer.topology.dead_letters == DeadLetters::Publish,
            shown: 0,
            kept: VecDeque::new(),
            acks_due: None,
            settled: 0,
            ways_back,
            look_for_probes: Instant::now() + PROBES_WITHIN,
            looks: 0,
            is_no_stream: false,
        })
    }

    /// How much the broker was told over this connection: more than nothing
    /// says that it was of use.
    pub(super) fn settled(&self) -> u64 {
        self.settled
    }

    /// The end of the connection, found out by a call.
    pub(super) fn lost(&self, action: &str, error: &amiquip::Error) -> End {
        End::Lost(match self.link.timed_out() {
            true => Cause::new(Happening::Silent, format!("{action}: no answer in time")),
            false => Cause::of(error).while_it(action),
        })
    }

    /// Hands deliveries over and tells the broker what became of them, until
    /// the subscription has to change.
    pub(super) fn consume(
        &mut self,
        deliveries: &Receiver<ConsumerMessage>,
        feed: &Feed<'_>,
        paused: bool,
    ) -> Turn {
        match self.flow(deliveries, feed, paused) {
            Ok(turn) => turn,
            Err(end) => Turn::End(end),
        }
    }

    fn flow(
        &mut self,
        deliveries: &Receiver<ConsumerMessage>,
        feed: &Feed<'_>,
        paused: bool,
    ) -> Result<Turn, End> {
        let nothing = never();
        let full = usize::from(feed.consumer.prefetch);
        loop {
            let closed_for = feed.gate.closed_for();
            match closed_for {
                Some(closed_for) if !paused && closed_for >= PAUSE_AFTER => return Ok(Turn::Pause),
                // A prefetch counts for its own consumer alone: what earlier
                // ones left behind must not add up from pause to pause.
                None if paused && self.window.outstanding() <= full => return Ok(Turn::Resume),
                _ => {}
            }
            let until_pause = closed_for
                .filter(|_| !paused)
                .map(|closed_for| PAUSE_AFTER.saturating_sub(closed_for));
            let from = match self.kept.is_empty() {
                true => deliveries,
                false => &nothing,
            };
            let wait = self.next_wake().min(until_pause.unwrap_or(Duration::MAX));
            feed.signs.pulse.beat(wait);
            select! {
                recv(from) -> message => self.take_burst(message.ok(), deliveries, feed)?,
                recv(feed.outbox) -> settled => match settled {
                    Ok(settled) => self.settle_burst(settled, feed.outbox)?,
                    Err(_) => return Err(End::Panicked),
                },
                recv(self.courier.fates()) -> fate => match fate {
                    Ok(fate) => self.delivered(fate)?,
                    Err(_) => return Err(no_courier()),
                },
                recv(feed.panicked) -> _ => return Err(End::Panicked),
                recv(feed.gate.changes()) -> _ => {}
                recv(feed.stop.as_receiver()) -> _ => return Ok(Turn::Stop),
                default(wait) => {}
            }
            self.offer_kept(feed);
            self.send_acks()?;
            self.look_for_probes(feed)?;
            self.show(feed);
        }
    }

    fn show(&mut self, feed: &Feed<'_>) {
        let outstanding = self.window.outstanding();
        let settled = self.settled();
        let advanced = settled != std::mem::replace(&mut self.shown, settled);
        self.meter.in_flight(outstanding);
        self.meter.copies(self.copying.len());
        feed.signs.pulse.copies(self.copying.len());
        feed.signs.pulse.flow(outstanding, advanced);
    }

    fn next_wake(&self) -> Duration {
        let acks = self
            .acks_due
            .map(|due| due.saturating_duration_since(Instant::now()));
        match (acks, self.kept.is_empty()) {
            (Some(acks), _) => acks,
            (None, false) => HOLD_ACKS,
            (None, true) => BEAT,
        }
    }

    fn take_burst(
        &mut self,
        first: Option<ConsumerMessage>,
        more: &Receiver<ConsumerMessage>,
        feed: &Feed<'_>,
    ) -> Result<(), End> {
        let mut next = first;
        if next.is_none() {
            return Err(gone());
        }
        for _ in 0..BURST {
            let Some(message) = next.take() else { break };
            if let Some(delivery) = self.receive(message, feed)? {
                self.offer(delivery, feed);
            }
            if !self.kept.is_empty() {
                break;
            }
            next = more.try_recv().ok();
        }
        // The last one was taken out of the channel: it must not be dropped.
        if let Some(message) = next
            && let Some(delivery) = self.receive(message, feed)?
        {
            self.offer(delivery, feed);
        }
        Ok(())
    }

    /// `None` for what is not for the workers.
    fn receive(
        &mut self,
        message: ConsumerMessage,
        feed: &Feed<'_>,
    ) -> Result<Option<Delivery>, End> {
        let lost = |cause: Cause| Err(End::Lost(cause));
        match message {
            ConsumerMessage::Delivery(mut delivery) => {
                let tag = delivery.delivery_tag();
                if topology::is_probe(&delivery) {
                    tell_of_circle(feed.consumer);
                    self.window.put(tag, Box::new(delivery));
                    self.conclude(tag, Settlement::Ack)?;
                    return Ok(None);
                }
                if self.ways_back.take(&delivery) {
                    self.window.put(tag, Box::new(delivery));
                    self.conclude(tag, Settlement::Ack)?;
                    return Ok(None);
                }
                self.refuse_stream(&delivery, feed)?;
                let repairs = self.repairs.take(self.channel.channel_id(), tag);
                let message = convert::hollow_out(&mut delivery, repairs, feed.signer);
                self.meter.received(message.redelivered);
                self.window.put(tag, Box::new(delivery));
                let epoch = self.epoch;
                Ok(Some(Delivery {
                    message,
                    ticket: Ticket { epoch, tag },
                }))
            }
            ConsumerMessage::ServerCancelled => {
                let text = "the broker cancelled the consumer";
                lost(Cause::new(Happening::Cancelled, text))
            }
            ConsumerMessage::ServerClosedChannel(error)
            | ConsumerMessage::ServerClosedConnection(error) => lost(Cause::of(&error)),
            ConsumerMessage::ClientCancelled
            | ConsumerMessage::ClientClosedChannel
            | ConsumerMessage::ClientClosedConnection => {
                let text = "the consumer was closed on this side";
                lost(Cause::new(Happening::Other, text))
            }
        }
    }

    fn offer(&mut self, delivery: Delivery, feed: &Feed<'_>) {
        let Some(inbox) = feed.inbox.as_ref() else {
            return;
        };
        match inbox.try_send(delivery) {
            Ok(()) => {}
            Err(TrySendError::Full(delivery) | TrySendError::Disconnected(delivery)) => {
                self.kept.push_back(delivery);
            }
        }
    }

    fn offer_kept(&mut self, feed: &Feed<'_>) {
        let Some(inbox) = feed.inbox.as_ref() else {
            return;
        };
        while let Some(delivery) = self.kept.pop_front() {
            if let Err(TrySendError::Full(delivery) | TrySendError::Disconnected(delivery)) =
                inbox.try_send(delivery)
            {
                self.kept.push_front(delivery);
                return;
            }
        }
    }

    fn settle_burst(
        &mut self,
        first: Vec<Settled>,
        more: &Receiver<Vec<Settled>>,
    ) -> Result<(), End> {
        for settled in first.into_iter().chain(more.try_iter().flatten()) {
            self.settle(settled)?;
        }
        Ok(())
    }

    fn settle(&mut self, settled: Settled) -> Result<(), End> {
        let admitted = lifecycle::admits(self.epoch, &settled.ticket);
        if !admitted && !failpoint::mutant(Mutant::StaleAck) {
            self.meter.lost_with(settled.settlement);
            return Ok(());
        }
        let tag = settled.ticket.tag;
        match (settled.settlement, settled.parcel) {
            (Settlement::Ack, _) => self.conclude(tag, Settlement::Ack),
            (Settlement::Retry, Some(parcel)) => self.copy(tag, *parcel),
            (Settlement::Reject, Some(parcel)) if self.publishes => self.copy(tag, *parcel),
            (Settlement::Reject, Some(parcel)) => match parcel.purpose {
                Purpose::DeadLetter(reason) => self.reject(tag, reason),
                Purpose::Retry(_) => self.give_one_back(tag),
            },
            // Without its body there is no copy, and without its reason no dead
            // letter: somebody may try it again.
            (Settlement::Requeue, _) | (Settlement::Retry | Settlement::Reject, None) => {
                self.give_one_back(tag)
            }
        }
    }

    fn give_one_back(&mut self, tag: u64) -> Result<(), End> {
        if self.window.get_mut(tag).is_some() {
            self.meter.returned();
        }
        self.conclude(tag, Settlement::Requeue)
    }

    /// Leaves it to the broker to make a dead letter of it.
    fn reject(&mut self, tag: u64, reason: DeadReason) -> Result<(), End> {
        if self.window.get_mut(tag).is_some() {
            self.meter.dead_lettered(reason);
        }
        self.conclude(tag, Settlement::Reject)
    }

    fn conclude(&mut self, tag: u64, settlement: Settlement) -> Result<(), End> {
        match self.window.settle(tag, settlement) {
            Some(order) => self.send(order),
            None => Ok(()),
        }
    }

    /// Has a copy sent; the delivery stays out until that is confirmed.
    fn copy(&mut self, tag: u64, parcel: Parcel) -> Result<(), End> {
        let Some(shell) = self.window.get_mut(tag) else {
            return Ok(());
        };
        self.copying.insert(tag);
        match self.courier.send(Copy::new(shell, parcel)) {
            true => Ok(()),
            false => Err(no_courier()),
        }
    }

    fn delivered(&mut self, (tag, fate): (u64, Delivered)) -> Result<(), End> {
        self.copying.remove(&tag);
        match fate {
            Delivered::Yes(purpose) => {
                match purpose {
                    Purpose::Retry(_) => self.meter.retried(),
                    Purpose::DeadLetter(reason) => self.meter.dead_lettered(reason),
                }
                self.conclude(tag, Settlement::Ack)
            }
            Delivered::No => self.give_one_back(tag),
            // Its headers leave no room for another try.
            Delivered::Unfit => self.reject(tag, DeadReason::Rejected),
        }
    }

    /// Acks in turn go at once; those out of turn after a moment, or when they
    /// are so many that the prefetch would run dry.
    fn send_acks(&mut self) -> Result<(), End> {
        if self.window.waiting() == 0 {
            self.acks_due = None;
            return Ok(());
        }
        if let Some(order) = self.window.in_turn() {
            self.send(order)?;
        }
        let out_of_turn = self.window.waiting();
        let now = Instant::now();
        if out_of_turn == 0 {
            self.acks_due = None;
        } else if out_of_turn * 2 > self.window.outstanding()
            || self.acks_due.is_some_and(|due| due <= now)
        {
            self.send_all_acks()?;
        } else {
            self.acks_due.get_or_insert(now + HOLD_ACKS);
        }
        failpoint::hit(Step::Settled);
        Ok(())
    }

    fn send_all_acks(&mut self) -> Result<(), End> {
        self.acks_due = None;
        for order in self.window.all() {
            self.send(order)?;
        }
        Ok(())
    }

    fn send(&mut self, order: Order<Shell>) -> Result<(), End> {
        let _watch = self.link.watch(CALL_WITHIN);
        self.settled += 1;
        match order {
            Order::AckUpTo(shell) => shell.ack_multiple(self.channel),
            Order::Ack(shell) => shell.ack(self.channel),
            Order::Reject(shell) => shell.reject(self.channel, false),
            Order::Requeue(shell) => shell.nack(self.channel, true),
        }
        .map_err(|error| self.lost("failed to settle a delivery", &error))
    }

    /// Gives back what no worker has taken; `deliveries` is cancelled.
    pub(super) fn give_back(
        &mut self,
        deliveries: &Receiver<ConsumerMessage>,
        feed: &Feed<'_>,
    ) -> Result<(), End> {
        self.keep(deliveries, feed)?;
        let kept = std::mem::take(&mut self.kept);
        for delivery in kept.into_iter().chain(feed.unstarted.try_iter()) {
            // Some may have come over a connection that is lost.
            self.settle(Settled {
                ticket: delivery.ticket,
                settlement: Settlement::Requeue,
                parcel: None,
            })?;
        }
        Ok(())
    }

    /// Keeps what comes before the end of a cancelled subscription.
    pub(super) fn keep(
        &mut self,
        deliveries: &Receiver<ConsumerMessage>,
        feed: &Feed<'_>,
    ) -> Result<(), End> {
        loop {
            match deliveries.recv_timeout(CALL_WITHIN) {
                Ok(ConsumerMessage::ClientCancelled) => return Ok(()),
                Ok(message) => {
                    let delivery = self.receive(message, feed)?;
                    self.kept.extend(delivery);
                }
                Err(_) => return Err(gone()),
            }
        }
    }

    /// The stop: gives back what nobody has begun, and waits for the rest.
    pub(super) fn drain(
        &mut self,
        deliveries: &Receiver<ConsumerMessage>,
        feed: &mut Feed<'_>,
    ) -> End {
        let deadline = Instant::now() + feed.stop.left_of(feed.shutdown_timeout);
        feed.signs.pulse.stopping();
        feed.signs.pulse.beat(feed.shutdown_timeout);
        // The workers end when their inbox is closed and empty, and with the
        // last of them the outbox.
        *feed.stopper = None;
        *feed.inbox = None;
        let drained = self
            .give_back(deliveries, feed)
            .and_then(|()| self.drain_workers(feed, deadline))
            .and_then(|()| self.drain_courier(deadline))
            .and_then(|()| self.send_all_acks());
        match drained {
            Ok(()) => End::Stopped {
                unfinished: self.window.outstanding(),
            },
            Err(end) => end,
        }
    }

    fn drain_workers(&mut self, feed: &Feed<'_>, deadline: Instant) -> Result<(), End> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            select! {
                recv(feed.outbox) -> settled => match settled {
                    Ok(settled) => self.settle_burst(settled, feed.outbox)?,
                    Err(_) => return Ok(()),
                },
                recv(self.courier.fates()) -> fate => match fate {
                    Ok(fate) => self.delivered(fate)?,
                    Err(_) => return Err(no_courier()),
                },
                default(left) => return Ok(()),
            }
            self.send_acks()?;
            self.show(feed);
        }
    }

    fn drain_courier(&mut self, deadline: Instant) -> Result<(), End> {
        self.courier.finish();
        // It may hang on a connection that is being made. What it does not
        // tell in time comes again.
        let deadline = deadline.min(Instant::now() + COURIER_WITHIN);
        while let Ok(fate) = self.courier.fates().recv_deadline(deadline) {
            self.delivered(fate)?;
        }
        Ok(())
    }
}

impl Drop for Flow<'_> {
    /// What is on its way here comes again with the connection gone.
    fn drop(&mut self) {
        self.meter.lost(self.kept.len() + self.copying.len());
        self.meter.copies(0);
    }
}

/// Nothing comes any more; why, only the close of the connection can tell.
fn gone() -> End {
    End::Lost(Cause::new(Happening::Cut, "the connection was lost"))
}

fn no_courier() -> End {
    End::Lost(Cause::new(Happening::Other, "the courier is gone"))
}

/// A probe that comes out of the work queue shows where dead letters go.
fn tell_of_circle(consumer: &checked::Consumer) {
    let topology = &consumer.topology;
    log::error!(
        consumer = consumer.name.as_str(), queue = topology.queue.as_str(),
        exchange = topology.dead_letter_exchange.as_str();
        "dead letters come straight back to the queue they left, again and again: unbind the queue \
         from its dead-letter exchange, or name another one in dead_letter_exchange"
    );
}
