//! ackonce: an idempotent consumer worker for RabbitMQ.

pub mod broker;
pub mod cli;
pub mod config;
pub mod failure;
pub mod message;
