//! RabbitMQ: the only folder that names AMQP types.

pub mod address;
pub mod cause;
pub mod confirms;
pub mod connection;
pub mod consumer;
pub mod convert;
mod courier;
pub mod desk;
pub mod error;
pub mod guard;
pub mod outgoing;
pub mod properties;
pub mod publisher;
pub mod session;
pub mod signed;
pub mod tls;
pub mod topology;
pub mod transport;
pub mod watchdog;
pub mod window;
