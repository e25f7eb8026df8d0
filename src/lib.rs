//! ackonce consumes RabbitMQ queues and lets each message take effect once,
//! however often it is delivered.
//!
//! # The way of a message
//!
//! A broker thread per consumer ([`broker::consumer`]) takes deliveries from
//! RabbitMQ and puts them into a bounded channel. A worker thread takes what is
//! waiting there as one batch and leads it through [`pipeline`]: it finds each
//! message's id and fingerprint ([`identity`]), claims the ids in Redis with
//! one pipeline ([`claim`]), opens a transaction and inserts the ledger rows
//! ([`ledger`]), runs the user's [`handler`] on the fresh ones inside that
//! transaction, commits, marks the ids done in Redis, and sends the settlements
//! back. Only the broker thread acks, rejects or requeues, and only for the
//! connection that the delivery came over.
//!
//! What an outcome means, [`lifecycle`] alone decides: a pure function from
//! state and event to state and actions, which `tests/model.rs` walks through
//! every interleaving of two workers, crashes, lost replies, reconnects and a
//! forgetful Redis.
//!
//! # The house, from the bottom up
//!
//! | floor | rooms | they must not |
//! |---|---|---|
//! | data and rules | [`message`], [`lifecycle`], [`failure`], [`identity`], [`backoff`], [`config::checked`], [`broker::window`] | do I/O |
//! | tools | [`stop`], [`random`], [`failpoint`], [`flights`], [`gate`], [`postgres`], [`trust`] | know what a message means |
//! | adapters | [`broker`], [`claim`], [`ledger`], [`handler`] | know one another |
//! | work | [`pipeline`], [`pool`], [`inspect`], [`prune`], [`why`], [`dead_letter`] | name AMQP or Redis types |
//! | process | [`daemon`], [`observe`] | exit |
//! | command line | [`cli`], `main.rs` | have logic of their own |
//!
//! Imports run downward only. [`config`] alone reads files and the
//! environment; [`broker`] alone names AMQP types; [`claim`] alone knows Redis;
//! `main.rs` alone ends the process. `tests/house.rs` holds all of this.

pub mod backoff;
pub mod broker;
pub mod claim;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod dead_letter;
pub mod failpoint;
pub mod failure;
pub mod flights;
pub mod gate;
pub mod handler;
pub mod identity;
pub mod inspect;
pub mod ledger;
pub mod lifecycle;
pub mod message;
pub mod observe;
pub mod pipeline;
pub mod pool;
pub mod postgres;
pub mod prune;
pub mod random;
pub mod stop;
pub mod trust;
pub mod why;
