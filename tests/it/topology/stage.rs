//! A topology on a vhost of its own, through the library that the daemon uses.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::Path;

use ackonce::broker::connection::{self, Link};
use ackonce::broker::topology::{self, Inspection, TopologyError};
use ackonce::config::{self, checked};
use amiquip::{
    AmqpValue, ExchangeDeclareOptions, ExchangeType, FieldTable, QueueDeclareOptions,
    QueueDeleteOptions,
};

use crate::common::{Consumer, DEADLINE, ORDERS_DEAD, PrivateBroker, World};

/// The dead-letter exchange of the queue `orders`.
pub const DLX: &str = "orders.dlx";

/// A vhost seen with the daemon's eyes.
pub struct Stage {
    pub world: World,
    pub link: Link,
}

impl Stage {
    pub fn new() -> Self {
        Self::in_world(World::new())
    }

    /// With its vhost on a broker of its own.
    pub fn on(broker: &PrivateBroker) -> Self {
        Self::in_world(World::on(broker))
    }

    fn in_world(world: World) -> Self {
        let broker = checked(&world, Consumer::orders()).broker;
        let link = connection::open(&broker, "test").unwrap();
        Self { world, link }
    }

    pub fn prepare(&mut self, consumer: Consumer) -> Result<(), TopologyError> {
        let config = checked(&self.world, consumer);
        topology::prepare(
            &mut self.link,
            &config.broker,
            &config.consumers[0],
            true,
            DEADLINE,
        )
        .map(drop)
    }

    pub fn inspect(&mut self, consumer: Consumer) -> Result<Inspection, TopologyError> {
        let config = checked(&self.world, consumer);
        topology::inspect(&mut self.link, &config.consumers[0], DEADLINE)
    }

    /// Names of all queues, sorted.
    pub fn queues(&self) -> Vec<String> {
        let path = format!("/api/queues/{}?columns=name", self.world.name());
        let queues = self.world.management.get(&path);
        let queues = queues.as_array().unwrap().iter();
        let mut names: Vec<_> = queues
            .map(|queue| queue["name"].as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    }

    /// How many exchanges and bindings there are.
    pub fn exchanges_and_bindings(&self) -> (usize, usize) {
        let count = |what: &str| {
            let path = format!("/api/{what}/{}", self.world.name());
            self.world.management.get(&path).as_array().unwrap().len()
        };
        (count("exchanges"), count("bindings"))
    }

    pub fn delete(&self, queue: &str) {
        let channel = self.world.broker.channel();
        let options = QueueDeleteOptions::default();
        channel.queue_delete(queue, options).unwrap();
    }

    pub fn bind(&self) {
        let channel = self.world.broker.channel();
        let bound = channel.queue_bind(ORDERS_DEAD, DLX, "", FieldTable::new());
        bound.unwrap();
    }

    pub fn unbind(&self) {
        let channel = self.world.broker.channel();
        let unbound = channel.queue_unbind(ORDERS_DEAD, DLX, "", FieldTable::new());
        unbound.unwrap();
    }

    pub fn declare_queue(&self, name: &str, arguments: &[(&str, &str)]) {
        let long = |text: &str| AmqpValue::LongString(text.to_owned());
        let arguments = arguments
            .iter()
            .map(|(name, value)| ((*name).to_owned(), long(value)));
        let options = QueueDeclareOptions {
            durable: true,
            arguments: arguments.collect(),
            ..QueueDeclareOptions::default()
        };
        let channel = self.world.broker.channel();
        channel.queue_declare(name, options).unwrap();
    }

    pub fn declare_exchange(&self, name: &str, kind: ExchangeType, internal: bool) {
        let options = ExchangeDeclareOptions {
            durable: true,
            internal,
            ..ExchangeDeclareOptions::default()
        };
        let channel = self.world.broker.channel();
        channel.exchange_declare(kind, name, options).unwrap();
    }
}

pub fn checked(world: &World, consumer: Consumer) -> checked::Config {
    let text = world.config().consumer(consumer).text();
    config::parse(&text, Path::new("test.toml"), &|_| None).unwrap()
}

pub fn orders(mode: &str, queue_type: &str) -> Consumer {
    Consumer::orders()
        .set("topology.mode", mode)
        .set("topology.queue_type", queue_type)
}

/// Of a queue that others make.
pub fn foreign() -> Consumer {
    Consumer::orders().set("topology.mode", "none")
}
