//! Consuming one queue over one connection: deliveries go to the workers,
//! settlements come back, and only this loop tells the broker.
//!
//! It never waits for a worker. What it cannot hand over at once it keeps,
//! and takes no more from the broker until it could; the prefetch bounds all
//! of it. Reconnecting is the caller's business.

mod flow;

use std::time::Duration;

use amiquip::{Channel, Consumer, ConsumerOptions};
use crossbeam_channel::{Receiver, Sender};

use super::cause::{Cause, Happening};
use super::connection::Link;
use super::signed::Signer;
use super::topology::TopologyError;
use crate::backoff::Backoff;
use crate::config::checked;
use crate::gate::Gate;
use crate::message::{Delivery, Epoch, Settled};
use crate::observe::Signs;
use crate::stop::{Stop, Stopper};
use flow::{Flow, Turn};

/// Longest wait for the broker's answer to one call.
const CALL_WITHIN: Duration = Duration::from_secs(10);

/// Deliveries that a paused consumer holds: with them its workers find out
/// that the world is mended.
pub(super) const PAUSED_PREFETCH: u16 = 8;

/// How long the gate has to be closed before the consumer gives back what it
/// holds. A broker before RabbitMQ 4.3 counts each return towards the delivery
/// limit of a quorum queue.
const PAUSE_AFTER: Duration = Duration::from_secs(1);

/// The channels between this loop and the workers.
pub struct Feed<'a> {
    /// Where copies are published to.
    pub broker: &'a checked::Broker,
    /// The consumer's configuration.
    pub consumer: &'a checked::Consumer,
    /// What signs the daemon's headers of its messages.
    pub signer: &'a Signer,
    /// Waits between tries of publishing.
    pub backoff: Backoff,
    /// Which connection this is.
    pub epoch: Epoch,
    /// To the workers; closed when the daemon stops.
    pub inbox: &'a mut Option<Sender<Delivery>>,
    /// Dropped when the daemon stops: the workers begin nothing more.
    pub stopper: &'a mut Option<Stopper>,
    /// What no worker has taken yet.
    pub unstarted: &'a Receiver<Delivery>,
    /// From the workers; disconnected when all of them have ended.
    pub outbox: &'a Receiver<Vec<Settled>>,
    /// A worker panicked.
    pub panicked: &'a Receiver<()>,
    /// Closed while the workers see the world broken.
    pub gate: &'a Gate,
    /// Time to stop.
    pub stop: &'a Stop,
    /// What is counted and shown.
    pub signs: &'a Signs,
    /// How long a stop waits for the workers.
    pub shutdown_timeout: Duration,
}

/// Why consuming ended.
#[derive(Debug)]
pub enum End {
    /// Stopped: everything in flight was settled, or time ran out with so many
    /// deliveries still in the hands of workers.
    Stopped {
        /// Deliveries that go back to the queue with the connection.
        unfinished: usize,
    },
    /// The connection, channel or consumer is gone.
    Lost(Cause),
    /// A worker panicked: its deliveries go back with the connection.
    Panicked,
    /// The queues are seen not to be of use only now that messages come.
    Unfit(TopologyError),
}

/// Consumes until something ends it, and leaves the link to be closed. Also
/// says how many deliveries the broker was told about. `unproved` are the retry
/// queues of which it is not known that they lead back.
#[must_use]
pub fn run(
    link: &Link,
    channel: &Channel,
    mut feed: Feed<'_>,
    unproved: Vec<String>,
) -> (End, u64) {
    match Flow::new(link, channel, &feed, unproved) {
        Ok(mut flow) => (consume(&mut flow, link, channel, &mut feed), flow.settled()),
        Err(error) => {
            let text = format!("failed to start the courier: {error}");
            (End::Lost(Cause::new(Happening::Other, text)), 0)
        }
    }
}

fn consume<'a>(
    flow: &mut Flow<'a>,
    link: &'a Link,
    channel: &'a Channel,
    feed: &mut Feed<'_>,
) -> End {
    // A connection that is made in the middle of a pause begins with it.
    let mut paused = feed.gate.closed_for() >= Some(PAUSE_AFTER);
    let mut consumer = match subscribe(link, channel, feed, paused) {
        Ok(consumer) => consumer,
        Err(cause) => return End::Lost(cause),
    };
    loop {
        feed.signs.meter.consuming(true);
        feed.signs.pulse.consuming();
        let turn = flow.consume(consumer.receiver(), feed, paused);
        if matches!(turn, Turn::Stop) {
            // Whatever becomes of the rest: nothing more is begun.
            *feed.stopper = None;
        }
        if let Turn::End(end) = turn {
            let _watch = link.watch(CALL_WITHIN);
            // Its drop asks the broker to cancel it.
            drop(consumer);
            return end;
        }
        // The next subscription comes before the end of this one: a queue that
        // goes with its last consumer would be deleted between them.
        let next = match turn {
            Turn::Pause | Turn::Resume => {
                paused = matches!(turn, Turn::Pause);
                match subscribe(link, channel, feed, paused) {
                    Ok(next) => Some(next),
                    Err(cause) => return End::Lost(cause),
                }
            }
            Turn::Stop | Turn::End(_) => None,
        };
        // Dropping a consumer that still gets deliveries can kill the
        // connection: it is cancelled and drained first.
        let watch = link.watch(CALL_WITHIN);
        if let Err(error) = consumer.cancel() {
            return flow.lost("failed to cancel the consumer", &error);
        }
        drop(watch);
        let Some(next) = next else {
            return flow.drain(consumer.receiver(), feed);
        };
        let turned = match paused {
            true => flow.give_back(consumer.receiver(), feed),
            false => flow.keep(consumer.receiver(), feed),
        };
        if let Err(end) = turned {
            return end;
        }
        consumer = next;
    }
}

/// Sets the prefetch, which counts for consumers that begin after it, and
/// begins one: the other way round the broker would send the whole queue.
fn subscribe<'a>(
    link: &Link,
    channel: &'a Channel,
    feed: &Feed<'_>,
    paused: bool,
) -> Result<Consumer<'a>, Cause> {
    let prefetch = match paused {
        true => PAUSED_PREFETCH.min(feed.consumer.prefetch),
        false => feed.consumer.prefetch,
    };
    let _watch = link.watch(CALL_WITHIN);
    let failed = |action: &str, error: &amiquip::Error| match link.timed_out() {
        true => Cause::new(Happening::Silent, format!("{action}: no answer in time")),
        false => Cause::of(error).while_it(action),
    };
    channel
        .qos(0, prefetch, false)
        .map_err(|error| failed("failed to set the prefetch", &error))?;
    let queue = &feed.consumer.topology.queue;
    let consumer = channel
        .basic_consume(queue, ConsumerOptions::default())
        .map_err(|error| failed(&format!("failed to consume from queue {queue}"), &error))?;
    log::info!(
        consumer = feed.consumer.name.as_str(), queue = queue.as_str(),
        workers = feed.consumer.workers, prefetch = prefetch,
        epoch = feed.epoch.0, broker:% = link.address();
        "consuming"
    );
    Ok(consumer)
}
