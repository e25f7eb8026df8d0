//! ackonce: an idempotent consumer worker for RabbitMQ.

pub mod backoff;
pub mod broker;
pub mod config;
pub mod failure;
pub mod identity;
pub mod lifecycle;
pub mod message;
