//! The vhost over AMQP: publishing with confirms, counting, collecting dead
//! letters.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::Duration;

use amiquip::{
    AmqpProperties, AmqpValue, Channel, Confirm, Connection, ConsumerMessage, ConsumerOptions,
    Delivery, FieldTable, Publish, QueueDeclareOptions,
};
use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::eventually;

/// So many messages are taken one by one.
const SOME: usize = 100;

/// Publishes that may wait for their confirm at a time.
const UNCONFIRMED_MAX: usize = 2_000;

/// A message to publish: persistent, with its id as the `message_id` property.
#[derive(Debug, Clone)]
pub struct Msg {
    body: Vec<u8>,
    headers: FieldTable,
    properties: AmqpProperties,
}

impl Msg {
    /// With `id` and the JSON body `{"id": id}`.
    pub fn new(id: &str) -> Self {
        let mut message = Self::anonymous().json(&serde_json::json!({ "id": id }));
        message.properties = message.properties.with_message_id(id.to_owned());
        message
    }

    /// Without an id and with an empty body.
    pub fn anonymous() -> Self {
        Self {
            body: Vec::new(),
            headers: FieldTable::new(),
            properties: AmqpProperties::default().with_delivery_mode(2),
        }
    }

    /// With another body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// With another body, in JSON.
    #[must_use]
    pub fn json(self, body: &serde_json::Value) -> Self {
        self.body(body.to_string())
    }

    /// With one more header.
    #[must_use]
    pub fn header(mut self, name: &str, value: AmqpValue) -> Self {
        self.headers.insert(name.to_owned(), value);
        self
    }

    /// With its properties changed.
    #[must_use]
    pub fn properties(mut self, change: impl FnOnce(AmqpProperties) -> AmqpProperties) -> Self {
        self.properties = change(self.properties);
        self
    }
}

/// `count` messages with the ids `PREFIX-0`, `PREFIX-1`, ….
pub fn numbered(prefix: &str, count: usize) -> Vec<Msg> {
    let ids = numbered_ids(prefix, count);
    ids.iter().map(|id| Msg::new(id)).collect()
}

/// The ids of [`numbered`].
pub fn numbered_ids(prefix: &str, count: usize) -> Vec<String> {
    (0..count)
        .map(|number| format!("{prefix}-{number}"))
        .collect()
}

/// A message that came to rest in a dead-letter queue.
#[derive(Debug, Clone)]
pub struct Dead {
    /// As published.
    pub body: Vec<u8>,
    /// As published, and what the broker added to the headers.
    pub properties: AmqpProperties,
}

impl From<Delivery> for Dead {
    fn from(delivery: Delivery) -> Self {
        Self {
            body: delivery.body,
            properties: delivery.properties,
        }
    }
}

impl Dead {
    /// The `message_id` property.
    pub fn id(&self) -> Option<&str> {
        self.properties.message_id().as_deref()
    }

    /// Why the broker says it is here: `rejected`, `delivery_limit`, ….
    pub fn death(&self) -> Option<String> {
        let headers = self.properties.headers().as_ref()?;
        match headers.get("x-first-death-reason")? {
            AmqpValue::LongString(reason) => Some(reason.clone()),
            _ => None,
        }
    }
}

/// A connection to the vhost.
pub struct Broker {
    connection: Mutex<Connection>,
    dead: Mutex<BTreeMap<String, Vec<Dead>>>,
}

impl Broker {
    /// Connects.
    pub fn connect(url: &str) -> Self {
        let connection = Connection::insecure_open(url)
            .unwrap_or_else(|e| panic!("failed to connect to RabbitMQ: {e}; run script/test"));
        Self {
            connection: Mutex::new(connection),
            dead: Mutex::default(),
        }
    }

    /// A channel of its own.
    pub fn channel(&self) -> Channel {
        let mut connection = self.connection.lock().expect("the connection");
        connection.open_channel(None).expect("a channel")
    }

    /// Publishes straight into `queue`. Returns when the broker has confirmed
    /// every message.
    pub fn send(&self, queue: &str, messages: impl IntoIterator<Item = Msg>) {
        self.publish("", queue, messages);
    }

    /// As [`Self::send`], and again what the broker refuses, as it does while a
    /// queue has no leader: some may arrive twice.
    pub fn send_until_taken(&self, queue: &str, messages: impl IntoIterator<Item = Msg>) {
        let mut left: Vec<Msg> = messages.into_iter().collect();
        eventually(&format!("queue {queue} takes all messages"), || {
            let refused = self.publish_once("", queue, left.iter().cloned());
            let number = |tag: u64| usize::try_from(tag).expect("a small number") - 1;
            left = refused
                .into_iter()
                .map(|tag| left[number(tag)].clone())
                .collect();
            left.is_empty()
        });
    }

    /// Publishes to `exchange`. Returns when the broker has confirmed every
    /// message.
    pub fn publish(
        &self,
        exchange: &str,
        routing_key: &str,
        messages: impl IntoIterator<Item = Msg>,
    ) {
        let refused = self.publish_once(exchange, routing_key, messages);
        assert!(refused.is_empty(), "the broker refused {refused:?}");
    }

    /// The numbers, from 1 on, of the messages that the broker refused.
    fn publish_once(
        &self,
        exchange: &str,
        routing_key: &str,
        messages: impl IntoIterator<Item = Msg>,
    ) -> BTreeSet<u64> {
        let channel = self.channel();
        channel.enable_publisher_confirms().expect("confirms");
        let confirms = channel.listen_for_publisher_confirms().expect("confirms");
        let returns = channel.listen_for_returns().expect("returns");
        let (mut pending, mut refused) = (BTreeSet::new(), BTreeSet::new());
        for (tag, message) in (1..).zip(messages) {
            let properties = message.properties.with_headers(message.headers);
            let mut publish = Publish::with_properties(&message.body, routing_key, properties);
            publish.mandatory = true;
            channel.basic_publish(exchange, publish).expect("a publish");
            pending.insert(tag);
            while pending.len() >= UNCONFIRMED_MAX {
                confirm_one(&confirms, &mut pending, &mut refused);
            }
        }
        while !pending.is_empty() {
            confirm_one(&confirms, &mut pending, &mut refused);
        }
        assert!(
            returns.try_recv().is_err(),
            "no queue takes what is published to exchange {exchange:?} with {routing_key:?}"
        );
        channel.close().expect("the channel closes");
        refused
    }

    /// Messages that wait in `queue`, without those handed to a consumer.
    pub fn ready(&self, queue: &str) -> u32 {
        let channel = self.channel();
        let declared = channel.queue_declare_passive(queue);
        let count = declared.expect("the queue").declared_message_count();
        count.expect("a count")
    }

    /// Whether nothing waits in `queue`. After a daemon's clean stop that
    /// means that it has settled everything: unlike a count, a `basic.get`
    /// comes after what the closed channel gave back.
    pub fn is_empty(&self, queue: &str) -> bool {
        let channel = self.channel();
        let got = channel.basic_get(queue, false).expect("basic.get");
        got.is_none()
    }

    /// Whether the broker at `url` can say what is in `queue`, which it cannot
    /// while the queue has no leader: then it closes the connection.
    pub fn answers_for(url: &str, queue: &str) -> bool {
        let asked = || -> Result<(), amiquip::Error> {
            let mut connection = Connection::insecure_open(url)?;
            connection.open_channel(None)?.basic_get(queue, false)?;
            connection.close()
        };
        asked().is_ok()
    }

    /// Removes what waits in `queue`, and returns it.
    pub fn take(&self, queue: &str) -> Vec<Dead> {
        let mut taken = Vec::new();
        let many = self.ready(queue) as usize;
        if many > SOME {
            self.consume(queue, many, &mut taken);
        }
        let channel = self.channel();
        while let Some(got) = channel.basic_get(queue, true).expect("basic.get") {
            taken.push(Dead::from(got.delivery));
        }
        taken
    }

    /// Takes `count` messages at once, unless somebody else has them: one
    /// `basic.get` after the other takes minutes for thousands.
    fn consume(&self, queue: &str, count: usize, taken: &mut Vec<Dead>) {
        let channel = self.channel();
        let options = ConsumerOptions {
            no_ack: true,
            ..ConsumerOptions::default()
        };
        let consumer = channel.basic_consume(queue, options).expect("a consumer");
        let messages = consumer.receiver();
        loop {
            match messages.recv_timeout(Duration::from_secs(5)) {
                Ok(ConsumerMessage::Delivery(delivery)) => taken.push(Dead::from(delivery)),
                Ok(ConsumerMessage::ClientCancelled) => return,
                Err(RecvTimeoutError::Timeout) => consumer.cancel().expect("it is cancelled"),
                other => panic!("the broker ended the consumer: {other:?}"),
            }
            if taken.len() >= count {
                // What is on its way comes before the answer. A second time does nothing.
                consumer.cancel().expect("it is cancelled");
            }
        }
    }

    /// All that came to rest in the dead-letter queue `queue` so far. Takes it
    /// out and remembers it.
    pub fn dead(&self, queue: &str) -> Vec<Dead> {
        let mut dead = self.dead.lock().expect("the dead letters");
        let dead = dead.entry(queue.to_owned()).or_default();
        dead.extend(self.take(queue));
        dead.clone()
    }

    /// Waits until `count` dead letters came to rest in `queue`: a quorum
    /// queue hands them on in its own time.
    pub fn wait_for_dead(&self, queue: &str, count: usize) -> Vec<Dead> {
        eventually(&format!("{count} dead letters in {queue}"), || {
            self.dead(queue).len() >= count
        });
        self.dead(queue)
    }

    /// Declares a durable classic queue.
    pub fn declare(&self, queue: &str) {
        let options = QueueDeclareOptions {
            durable: true,
            ..QueueDeclareOptions::default()
        };
        let channel = self.channel();
        channel.queue_declare(queue, options).expect("the queue");
    }
}

fn confirm_one(
    confirms: &Receiver<Confirm>,
    pending: &mut BTreeSet<u64>,
    refused: &mut BTreeSet<u64>,
) {
    let confirm = confirms
        .recv_timeout(super::DEADLINE)
        .expect("the broker confirms");
    let (payload, taken) = match confirm {
        Confirm::Ack(payload) => (payload, true),
        Confirm::Nack(payload) => (payload, false),
    };
    let rest = pending.split_off(&(payload.delivery_tag + 1));
    let mut told = std::mem::replace(pending, rest);
    if !payload.multiple {
        let alone = told.take(&payload.delivery_tag);
        pending.append(&mut told);
        told.extend(alone);
    }
    if !taken {
        refused.append(&mut told);
    }
}
