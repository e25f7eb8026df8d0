//! RabbitMQ: the only folder that names AMQP types.

pub mod address;
pub mod confirms;
pub mod connection;
pub mod error;
pub mod guard;
pub mod outgoing;
pub mod publisher;
pub mod tls;
pub mod transport;
pub mod watchdog;
