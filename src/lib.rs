//! ackonce: an idempotent consumer worker for RabbitMQ.

pub mod broker;
pub mod config;
pub mod failure;
pub mod lifecycle;
pub mod message;
