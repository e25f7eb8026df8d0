//! Looking through a queue without disturbing it: letters are taken unacked,
//! chunk by chunk, up to the depth the queue had at the start, and at the end
//! those that nobody acked go back to where they were.
//!
//! What was tried, on RabbitMQ 3.10 and 4.3. A classic queue puts what comes
//! back where it was. A quorum queue puts it behind what it has handed out to
//! nobody, in the order in which it comes back; so the order stays when all of
//! the queue is taken, and returned in the order in which it came. Therefore a
//! desk
//!
//! - consumes: what `basic.get` took comes back shuffled, since each get is a
//!   consumer of its own;
//! - has no consumer when it returns: a live one would get it all again;
//! - reads to the end once it has begun, even if it is told to stop;
//! - returns one chunk with `basic.nack`, and the next when that is back: the
//!   broker makes no promise across consumers, and each chunk had its own. Of a
//!   consumer that is merely gone it thinks that its messages killed it, counts
//!   that on every version, and returns those of many in no order.
//!
//! Killed in the middle, it leaves every letter in the queue, some in another
//! order. What arrives while it reads comes to stand before what it returns.
//!
//! Quorum queues count what comes back. Up to 4.2 `basic.nack` counts too, and
//! since 4.0 a queue without a limit of its own drops a message that came back
//! more than 20 times: a desk stops well before that, unless the queue is known
//! to have no limit. (`x-delivery-limit` -1 is no limit since 4.0; 3.10 takes
//! it for a limit and drops what comes back once.)

mod error;
mod ticket;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use amiquip::{AmqpValue, Channel, Consumer, ConsumerMessage, ConsumerOptions};
use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::connection::{self, Link};
use super::convert;
use super::guard::RepairLog;
use super::properties::Properties;
use super::signed::Signer;
use super::topology::{self, PROBE_HEADER};
use crate::config::checked;
use crate::message::Message;
use crate::stop::Stop;

pub use error::DeskError;
use ticket::Left;
pub use ticket::Ticket;

/// Longest wait for the broker's answer to one call.
const CALL_WITHIN: Duration = Duration::from_secs(10);

/// Longest wait for the next letter before the queue is asked whether there is
/// one.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long a queue may have letters and hand none out.
const STALLED_AFTER: Duration = Duration::from_secs(15);

/// Longest wait until a chunk that was returned is ready again.
const RETURN_WITHIN: Duration = Duration::from_secs(5);

/// How long a goodbye may take.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// Letters of the first chunk, before their size is known.
const CHUNK_FIRST: u16 = 4;

/// Most letters of a chunk. AMQP counts what a subscription may take, and the
/// broker sends it at once: where large letters follow small ones, this alone is
/// the bound.
const CHUNK_MAX: u16 = 128;

/// Bytes a chunk aims at, from the largest of the letters before it.
const CHUNK_BYTES: usize = 8 << 20;

/// Times that a letter of a quorum queue may have come back before a desk
/// refuses: the brokers' own limit since 4.0 is 20.
const RETURNS_MAX: i64 = 15;

/// How long letters can be held: RabbitMQ closes a channel that holds one
/// unacked for 30 minutes (`consumer_timeout`).
pub const HOLD_MAX: Duration = Duration::from_secs(20 * 60);

/// One letter, as the queue handed it out.
pub struct Handed {
    /// What acks it.
    pub ticket: Ticket,
    /// As a consumer would see it.
    pub message: Message,
    /// Exchange that put it into the queue.
    pub exchange: String,
    /// Routing key it came with.
    pub routing_key: String,
    /// Everything it carries, with its types.
    pub properties: Properties,
    /// How often it came back to the queue, where the queue counts that.
    pub returns: i64,
}

/// What one subscription took.
struct Chunk {
    /// The last delivery, which returns those before it too; `None` once it is
    /// acked: then the last of those that were left does.
    end: Option<Box<amiquip::Delivery>>,
    left: Left,
    /// How many are neither acked nor returned.
    held: u32,
}

/// An open queue with what was taken from it.
pub struct Desk {
    number: u64,
    queue: String,
    /// `None` once it is closed.
    open: Option<(Link, Channel)>,
    repairs: RepairLog,
    depth: u64,
    others: u32,
    taken: u64,
    /// Nothing more is to be had.
    through: bool,
    /// Letters of the next chunk.
    chunk: u16,
    /// Bytes of the largest letter so far; each chunk of smaller ones halves it.
    largest: usize,
    /// What was taken, in the order in which it came.
    chunks: Vec<Chunk>,
    since: Option<Instant>,
    /// Whether returns are known to do no harm.
    unlimited: bool,
    signer: Signer,
}

impl Desk {
    /// Opens `queue` and freezes its depth. `purpose` is shown on RabbitMQ's
    /// management pages. With `despite_limit`, a letter may have come back any
    /// number of times. Of the daemon's own headers, those are handed out that
    /// `signer` has signed.
    ///
    /// # Errors
    ///
    /// [`DeskError`] when there is no connection or no such queue.
    pub fn open(
        broker: &checked::Broker,
        queue: &str,
        purpose: &str,
        despite_limit: bool,
        signer: Signer,
    ) -> Result<Self, DeskError> {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let mut link = connection::open(broker, purpose)?;
        let channel = link
            .open_channel(CALL_WITHIN)
            .map_err(|error| DeskError::Lost {
                queue: queue.to_owned(),
                cause: error.to_string(),
            })?;
        let repairs = link.repairs();
        let mut desk = Self {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            queue: queue.to_owned(),
            open: Some((link, channel)),
            repairs,
            depth: 0,
            others: 0,
            taken: 0,
            through: false,
            chunk: CHUNK_FIRST,
            largest: 1,
            chunks: Vec::new(),
            since: None,
            unlimited: despite_limit,
            signer,
        };
        let (ready, consumers) = desk.count()?;
        desk.depth = u64::from(ready);
        desk.others = consumers;
        Ok(desk)
    }

    /// How many letters were ready when it was opened. Those that somebody
    /// else held at that moment are not among them.
    #[must_use]
    pub fn depth(&self) -> u64 {
        self.depth
    }

    /// Takes no more than `depth` letters, if that is fewer.
    pub fn no_deeper_than(&mut self, depth: u64) {
        self.depth = self.depth.min(depth);
    }

    /// How many consumers others had on the queue when it was opened: what they
    /// hold cannot be seen here.
    #[must_use]
    pub fn others(&self) -> u32 {
        self.others
    }

    /// How long the letter that was taken first has been held.
    #[must_use]
    pub fn held_for(&self) -> Duration {
        self.since.map(|since| since.elapsed()).unwrap_or_default()
    }

    /// Takes the next letters, oldest first: at most 128, and as many as fit into
    /// 8 MiB if they are no larger than those before them. Empty when the frozen depth is
    /// reached or the queue has no more.
    ///
    /// # Errors
    ///
    /// [`DeskError`]; after it, only [`Desk::give_back`] makes sense.
    pub fn take(&mut self, stop: &Stop) -> Result<Vec<Handed>, DeskError> {
        let left = self.depth.saturating_sub(self.taken);
        if self.through || left == 0 {
            return Ok(Vec::new());
        }
        if stop.is_set() {
            return Err(DeskError::Stopped);
        }
        let held = self.held_for();
        if held > HOLD_MAX {
            let queue = self.queue.clone();
            return Err(DeskError::Held { queue, held });
        }
        let deliveries = self.take_chunk(self.chunk)?;
        let mut letters = Vec::with_capacity(deliveries.len());
        for delivery in deliveries {
            letters.extend(self.hand_over(delivery)?);
        }
        // A chunk may have been nothing but probes.
        match letters.is_empty() {
            true => self.take(stop),
            false => Ok(letters),
        }
    }

    /// Acks a letter: it leaves the queue. The broker has it when
    /// [`Desk::settle`] or [`Desk::give_back`] returned.
    ///
    /// # Errors
    ///
    /// [`DeskError::Lost`]: the letter may be back in the queue.
    pub fn ack(&mut self, ticket: Ticket) -> Result<(), DeskError> {
        if ticket.desk != self.number {
            return Err(self.lost("the letter was handed out by another desk"));
        }
        let number = ticket.chunk;
        let Some(shell) = ticket.redeem() else {
            return Ok(());
        };
        let tag = shell.delivery_tag();
        let (link, channel) = self.parts()?;
        let watch = link.watch(CALL_WITHIN);
        let acked = shell.ack(channel);
        drop(watch);
        acked.map_err(|error| self.lost(error))?;
        if let Some(chunk) = self.chunks.get_mut(number) {
            chunk.held = chunk.held.saturating_sub(1);
            chunk.end.take_if(|end| end.delivery_tag() == tag);
        }
        Ok(())
    }

    /// Waits until the broker has seen every ack.
    ///
    /// # Errors
    ///
    /// [`DeskError::Lost`]: what was acked since the last time may be back in
    /// the queue.
    pub fn settle(&mut self) -> Result<(), DeskError> {
        // An answer on the same channel comes after what was sent before.
        self.count().map(drop)
    }

    /// Returns every letter that was not acked, in the order in which they
    /// came, and closes. Reads on to the frozen depth first, if it was not
    /// reached, so that the order stays.
    ///
    /// # Errors
    ///
    /// [`DeskError::Lost`]: they come back all the same, at the latest when the
    /// broker notices that the connection is gone.
    pub fn give_back(mut self) -> Result<(), DeskError> {
        let read = self.read_on();
        let returned = read.and(self.return_all());
        let Some((link, channel)) = self.open.take() else {
            return returned;
        };
        match (returned, link.close_with(channel, CLOSE_WITHIN)) {
            (Ok(()), Err(error)) => Err(self.lost(error)),
            (returned, _) => returned,
        }
    }

    fn read_on(&mut self) -> Result<(), DeskError> {
        if self.taken == 0 {
            return Ok(());
        }
        while !self.through && self.taken < self.depth {
            match self.take_chunk(self.chunk) {
                Ok(_) => {}
                // Then the rest stays where it is.
                Err(DeskError::Stalled { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn return_all(&mut self) -> Result<(), DeskError> {
        for chunk in std::mem::take(&mut self.chunks) {
            let end = chunk.end.or_else(|| chunk.left.take());
            let Some(end) = end.filter(|_| chunk.held > 0) else {
                continue;
            };
            let (ready, _) = self.count()?;
            let (link, channel) = self.parts()?;
            let watch = link.watch(CALL_WITHIN);
            let returned = end.nack_multiple(channel, true);
            drop(watch);
            returned.map_err(|error| self.lost(error))?;
            self.wait_for_ready(ready.saturating_add(chunk.held))?;
        }
        self.settle()
    }

    /// Waits until `expected` letters are ready. Not for ever: they may have an
    /// end of their own, or others may take them.
    fn wait_for_ready(&self, expected: u32) -> Result<(), DeskError> {
        let began = Instant::now();
        let mut pause = Duration::from_millis(1);
        while self.count()?.0 < expected && began.elapsed() < RETURN_WITHIN {
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
    }

    fn parts(&self) -> Result<(&Link, &Channel), DeskError> {
        match &self.open {
            Some((link, channel)) => Ok((link, channel)),
            None => Err(self.lost("the desk is closed")),
        }
    }

    fn lost(&self, cause: impl ToString) -> DeskError {
        DeskError::Lost {
            queue: self.queue.clone(),
            cause: cause.to_string(),
        }
    }

    /// How many letters are ready, and how many consumers there are.
    fn count(&self) -> Result<(u32, u32), DeskError> {
        let (link, channel) = self.parts()?;
        let watch = link.watch(CALL_WITHIN);
        let declared = channel.queue_declare_passive(self.queue.as_str());
        drop(watch);
        let queue = self.queue.clone();
        match declared {
            Ok(declared) => Ok((
                declared.declared_message_count().unwrap_or_default(),
                declared.declared_consumer_count().unwrap_or_default(),
            )),
            Err(amiquip::Error::ServerClosedChannel { code, message, .. }) => {
                let text = message;
                Err(match code {
                    404 => DeskError::Missing { queue, text },
                    403 => DeskError::Denied { queue, text },
                    _ => DeskError::Lost { queue, cause: text },
                })
            }
            Err(error) => Err(self.lost(error)),
        }
    }

    /// At most `most` letters, fewer at the end.
    fn take_chunk(&mut self, most: u16) -> Result<Vec<amiquip::Delivery>, DeskError> {
        let left = self.depth.saturating_sub(self.taken);
        let want = u16::try_from(left).unwrap_or(u16::MAX).min(most);
        let deliveries = self.consume(want)?;
        self.since = self.since.or(Some(Instant::now()));
        self.taken += deliveries.len() as u64;
        self.through = deliveries.len() < usize::from(want);
        let sizes = deliveries.iter().map(|delivery| delivery.body.len());
        let largest = sizes.max().unwrap_or_default();
        (self.chunk, self.largest) = next_chunk(self.chunk, self.largest, largest);
        if let Some(last) = deliveries.last() {
            let mut end = last.clone();
            empty(&mut end);
            self.chunks.push(Chunk {
                end: Some(Box::new(end)),
                left: Left::default(),
                held: u32::try_from(deliveries.len()).unwrap_or(u32::MAX),
            });
        }
        Ok(deliveries)
    }

    /// One subscription that can take no more than `want`.
    fn consume(&self, want: u16) -> Result<Vec<amiquip::Delivery>, DeskError> {
        let (link, channel) = self.parts()?;
        let watch = link.watch(CALL_WITHIN);
        let subscribed = channel
            .qos(0, want, false)
            .and_then(|()| channel.basic_consume(&self.queue, ConsumerOptions::default()));
        drop(watch);
        let consumer = subscribed.map_err(|error| self.lost(error))?;
        let mut taken = Vec::with_capacity(usize::from(want));
        let received = self.receive(&consumer, usize::from(want), &mut taken);
        // Cancelled and drained before it is dropped: a drop under way can end
        // the connection.
        let watch = link.watch(CALL_WITHIN);
        let cancelled = consumer.cancel();
        drop(watch);
        cancelled.map_err(|error| self.lost(error))?;
        self.drain(consumer.receiver(), &mut taken)?;
        received.map(|()| taken)
    }

    fn receive(
        &self,
        consumer: &Consumer<'_>,
        want: usize,
        taken: &mut Vec<amiquip::Delivery>,
    ) -> Result<(), DeskError> {
        let mut idle_since = Instant::now();
        while taken.len() < want {
            match consumer.receiver().recv_timeout(LOOK_EVERY) {
                Ok(message) => {
                    if !self.enter(message, taken)? {
                        return Err(self.lost("the consumer was closed on this side"));
                    }
                    idle_since = Instant::now();
                }
                Err(RecvTimeoutError::Timeout) => {
                    let (ready, _) = self.count()?;
                    if ready == 0 && consumer.receiver().is_empty() {
                        return Ok(());
                    }
                    if idle_since.elapsed() > STALLED_AFTER {
                        let queue = self.queue.clone();
                        return Err(DeskError::Stalled { queue, ready });
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.lost("the connection was lost"));
                }
            }
        }
        Ok(())
    }

    /// Takes in what comes before the end of a cancelled subscription.
    fn drain(
        &self,
        deliveries: &Receiver<ConsumerMessage>,
        taken: &mut Vec<amiquip::Delivery>,
    ) -> Result<(), DeskError> {
        loop {
            match deliveries.recv_timeout(CALL_WITHIN) {
                Ok(message) => {
                    if !self.enter(message, taken)? {
                        return Ok(());
                    }
                }
                Err(_) => return Err(self.lost("the connection was lost")),
            }
        }
    }

    /// False at the end of a subscription that was cancelled here.
    fn enter(
        &self,
        message: ConsumerMessage,
        taken: &mut Vec<amiquip::Delivery>,
    ) -> Result<bool, DeskError> {
        match message {
            ConsumerMessage::Delivery(delivery) => {
                taken.push(delivery);
                Ok(true)
            }
            ConsumerMessage::ClientCancelled => Ok(false),
            ConsumerMessage::ServerCancelled => {
                Err(self.lost("the broker cancelled the consumer: was the queue deleted?"))
            }
            ConsumerMessage::ServerClosedChannel(error)
            | ConsumerMessage::ServerClosedConnection(error) => Err(self.lost(error)),
            ConsumerMessage::ClientClosedChannel | ConsumerMessage::ClientClosedConnection => {
                Err(self.lost("the connection was closed on this side"))
            }
        }
    }

    /// `None` for a probe of a daemon's, which is no letter and stays.
    fn hand_over(&mut self, mut delivery: amiquip::Delivery) -> Result<Option<Handed>, DeskError> {
        let tag = delivery.delivery_tag();
        let channel = self.parts()?.1.channel_id();
        let repairs = self.repairs.take(channel, tag);
        let chunk = self.chunks.len().saturating_sub(1);
        let left = self.chunks.last().map(|chunk| chunk.left.clone());
        let left = left.unwrap_or_default();
        let headers = delivery.properties.headers().as_ref();
        let header = |name: &str| headers.and_then(|headers| headers.get(name));
        if header(PROBE_HEADER).is_some() {
            empty(&mut delivery);
            left.leave(Box::new(delivery));
            return Ok(None);
        }
        let returns = header("x-delivery-count").map_or(0, |value| match value {
            AmqpValue::LongLongInt(count) => *count,
            _ => 0,
        });
        if returns >= RETURNS_MAX && !self.unlimited {
            self.prove_unlimited(returns)?;
        }
        let message = convert::hollow_out(&mut delivery, repairs, &self.signer);
        let mut properties = Properties::from_amqp(&delivery.properties);
        // The queue's notes about its handing out, not the message's.
        for name in ["x-delivery-count", "x-acquired-count"] {
            properties.remove_header(name);
        }
        let exchange = std::mem::take(&mut delivery.exchange);
        let routing_key = std::mem::take(&mut delivery.routing_key);
        empty(&mut delivery);
        Ok(Some(Handed {
            ticket: Ticket::new(self.number, chunk, Box::new(delivery), &left),
            message,
            exchange,
            routing_key,
            properties,
            returns,
        }))
    }

    /// An old broker has no limit of its own, and a queue that was declared
    /// without one has none.
    fn prove_unlimited(&mut self, returns: i64) -> Result<(), DeskError> {
        let queue = self.queue.clone();
        let Some((link, _)) = &mut self.open else {
            return Err(self.lost("the desk is closed"));
        };
        let old = link.server_major().is_some_and(|major| major < 4);
        if old || topology::is_unlimited(link, &queue, CALL_WITHIN) {
            self.unlimited = true;
            return Ok(());
        }
        Err(DeskError::NearLimit { queue, returns })
    }
}

/// Letters of the chunk after one of `chunk`, and the bytes that it goes by, when
/// the largest letter so far had `before`, and the largest of that chunk
/// `largest` bytes.
fn next_chunk(chunk: u16, before: usize, largest: usize) -> (u16, usize) {
    let largest = largest.max(before / 2).max(1);
    let fitting = u16::try_from(CHUNK_BYTES / largest).unwrap_or(CHUNK_MAX);
    let next = chunk.saturating_mul(2).min(fitting);
    (next.clamp(1, CHUNK_MAX), largest)
}

fn empty(shell: &mut amiquip::Delivery) {
    shell.body = Vec::new();
    shell.exchange = String::new();
    shell.routing_key = String::new();
    shell.properties = amiquip::AmqpProperties::default();
}

impl Drop for Desk {
    /// A desk that is not given back: its letters return with the connection.
    fn drop(&mut self) {
        if let Some((link, channel)) = self.open.take() {
            link.abandon(channel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_grow_with_small_letters_and_shrink_at_a_large_one() {
        let (mut chunk, mut largest) = (CHUNK_FIRST, 1);
        let mut after = |bytes: usize| {
            (chunk, largest) = next_chunk(chunk, largest, bytes);
            chunk
        };
        let grown: Vec<u16> = [1_000; 6].map(&mut after).to_vec();
        assert_eq!(grown, [8, 16, 32, 64, 128, 128]);
        assert_eq!(after(3 << 20), 2);
        // Small ones again are not trusted at once.
        let grown: Vec<u16> = [0; 7].map(&mut after).to_vec();
        assert_eq!(grown, [4, 8, 16, 32, 64, 128, 128]);
        assert_eq!(after(CHUNK_BYTES + 1), 1);
        assert_eq!(after(0), 2);
    }
}
