//! What is sent: JSON bodies of one length, persistent, with UUIDs as ids.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use amiquip::{AmqpProperties, Channel, Confirm, Connection, Publish};
use anyhow::{Context, Result, bail, ensure};
use crossbeam_channel::Receiver;

use crate::amqp;
use crate::stage::PATIENCE;

/// Publishes that may wait for their confirm at a time.
const UNCONFIRMED_MAX: usize = 2_000;

/// Random numbers that need not be secret (SplitMix64).
pub struct Random(u64);

impl Random {
    pub fn seeded() -> Result<Self> {
        let mut seed = [0; 8];
        getrandom::fill(&mut seed).map_err(|e| anyhow::anyhow!("failed to draw a seed: {e}"))?;
        Ok(Self(u64::from_ne_bytes(seed)))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Below `bound`, which must not be 0; even enough for bounds far below 2^64.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// A UUID of version 4.
    fn uuid(&mut self) -> String {
        let (high, low) = (self.next(), self.next());
        format!(
            "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
            high >> 32,
            high >> 16 & 0xffff,
            high & 0xfff,
            0x8000 | low >> 48 & 0x3fff,
            low & 0xffff_ffff_ffff
        )
    }
}

/// What to make.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Messages, duplicates included.
    pub count: usize,
    /// Of a hundred messages, so many are duplicates of another one.
    pub duplicates_percent: usize,
    /// Length of a body.
    pub body_bytes: usize,
}

/// Messages in the order in which they are sent.
pub struct Load {
    ids: Vec<String>,
    order: Vec<usize>,
    body_bytes: usize,
    /// Of the ids, so many will not take effect.
    doomed: usize,
}

impl Load {
    /// With new ids. Duplicates lie anywhere behind or before what they repeat:
    /// the order is shuffled.
    pub fn new(shape: Shape) -> Result<Self> {
        let mut random = Random::seeded()?;
        let distinct = (shape.count * (100 - shape.duplicates_percent) / 100).max(1);
        let ids: Vec<String> = (0..distinct).map(|_| random.uuid()).collect();
        let mut order: Vec<usize> = (0..distinct).collect();
        order.resize_with(shape.count, || random.below(distinct));
        for last in (1..order.len()).rev() {
            order.swap(last, random.below(last + 1));
        }
        ensure!(
            shape.body_bytes >= body(&ids[0], 0).len(),
            "a body of {} bytes cannot hold its id",
            shape.body_bytes
        );
        Ok(Self {
            ids,
            order,
            body_bytes: shape.body_bytes,
            doomed: 0,
        })
    }

    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// How many of them are to take effect.
    pub fn distinct(&self) -> usize {
        self.ids.len() - self.doomed
    }

    /// The ids of the messages in the middle of each `one_in`, which are not to
    /// take effect.
    pub fn doom_each(&mut self, one_in: usize) -> Vec<&str> {
        let places = (one_in / 2..self.len()).step_by(one_in);
        self.doomed = places.clone().count();
        places.map(|place| self.id(place)).collect()
    }

    /// The id of the message in this place.
    pub fn id(&self, place: usize) -> &str {
        &self.ids[self.order[place]]
    }

    /// Publishes everything to `queue` and returns when the broker has
    /// confirmed it all.
    pub fn publish(&self, amqp: &str, queue: &str) -> Result<()> {
        let (connection, channel) = open(amqp)?;
        channel.enable_publisher_confirms()?;
        let confirms = channel.listen_for_publisher_confirms()?;
        let mut pending = BTreeSet::new();
        for place in 0..self.len() {
            self.send(&channel, queue, place)?;
            pending.insert(place as u64 + 1);
            while pending.len() >= UNCONFIRMED_MAX {
                confirm(&confirms, &mut pending)?;
            }
        }
        while !pending.is_empty() {
            confirm(&confirms, &mut pending)?;
        }
        connection.close()?;
        drop(channel);
        Ok(())
    }

    /// Publishes `per_second` messages a second to `queue`, each when it is
    /// due whatever became of those before it. Says when each was due, and how
    /// late the latest was handed over.
    pub fn publish_paced(
        &self,
        amqp: &str,
        queue: &str,
        per_second: u32,
    ) -> Result<(Vec<Instant>, Duration)> {
        let (connection, channel) = open(amqp)?;
        let begin = Instant::now();
        let mut latest = Duration::ZERO;
        let mut due = Vec::with_capacity(self.len());
        for place in 0..self.len() {
            let at = begin + Duration::from_secs_f64(place as f64 / f64::from(per_second));
            std::thread::sleep(at.saturating_duration_since(Instant::now()));
            latest = latest.max(at.elapsed());
            self.send(&channel, queue, place)?;
            due.push(at);
        }
        connection.close()?;
        drop(channel);
        Ok((due, latest))
    }

    fn send(&self, channel: &Channel, queue: &str, place: usize) -> Result<()> {
        let id = self.id(place);
        let properties = AmqpProperties::default()
            .with_delivery_mode(2)
            .with_message_id(id.to_owned());
        let body = body(id, self.body_bytes);
        let publish = Publish::with_properties(body.as_bytes(), queue, properties);
        channel
            .basic_publish("", publish)
            .with_context(|| format!("failed to publish to {queue}"))
    }
}

fn open(url: &str) -> Result<(Connection, Channel)> {
    let mut connection = amqp::connect(url)?;
    let channel = connection.open_channel(None)?;
    Ok((connection, channel))
}

fn confirm(confirms: &Receiver<Confirm>, pending: &mut BTreeSet<u64>) -> Result<()> {
    let confirm = confirms
        .recv_timeout(PATIENCE)
        .context("failed to hear the broker confirm a publish")?;
    match confirm {
        Confirm::Ack(payload) if payload.multiple => {
            *pending = pending.split_off(&(payload.delivery_tag + 1));
        }
        Confirm::Ack(payload) => {
            pending.remove(&payload.delivery_tag);
        }
        Confirm::Nack(payload) => bail!("the broker refused a publish: {payload:?}"),
    }
    Ok(())
}

/// An order, in at least `length` bytes of JSON.
fn body(id: &str, length: usize) -> String {
    let mut body = format!(r#"{{"id":"{id}","amount":4200,"currency":"EUR","note":""#);
    let filling = length.saturating_sub(body.len() + 2);
    body.extend(std::iter::repeat_n('x', filling));
    body.push_str("\"}");
    body
}
