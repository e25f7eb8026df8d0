//! RabbitMQ: the only folder that names AMQP types.

pub mod guard;
pub mod publisher;
