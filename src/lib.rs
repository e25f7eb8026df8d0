//! ackonce consumes RabbitMQ queues and lets each message take effect once,
//! however often it is delivered.
//!
//! The library is for a program with handlers of its own: [`worker`] is all of it
//! that is public. The rest of this page is about the house itself.
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
//! | data and rules | [`message`], [`lifecycle`], [`failure`], [`identity`], [`seal`], [`backoff`], [`config::checked`], [`broker::window`] | do I/O |
//! | tools | [`stop`], [`random`], [`failpoint`], [`flights`], [`gate`], [`postgres`], [`trust`] | know what a message means |
//! | adapters | [`broker`], [`claim`], [`ledger`], [`handler`] | know one another |
//! | work | [`pipeline`], [`pool`], [`inspect`], [`prune`], [`why`], [`dead_letter`] | name AMQP or Redis types |
//! | process | [`daemon`], [`observe`] | exit |
//! | command line | [`cli`], `main.rs` | have logic of their own |
//! | library | [`worker`] | show what is below it |
//!
//! Imports run downward only. [`config`] alone reads files and the
//! environment; [`broker`] alone names AMQP types; [`claim`] alone knows Redis;
//! `main.rs` alone ends the process. `tests/it/house.rs` holds all of this.

pub mod worker;

// For the tests of the house and for the program itself: no promise is made
// about any of these.
#[doc(hidden)]
pub mod backoff;
#[doc(hidden)]
pub mod broker;
#[doc(hidden)]
pub mod claim;
#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod config;
#[doc(hidden)]
pub mod daemon;
#[doc(hidden)]
pub mod dead_letter;
#[doc(hidden)]
pub mod failpoint;
#[doc(hidden)]
pub mod failure;
#[doc(hidden)]
pub mod flights;
#[doc(hidden)]
pub mod gate;
#[doc(hidden)]
pub mod handler;
#[doc(hidden)]
pub mod identity;
#[doc(hidden)]
pub mod inspect;
#[doc(hidden)]
pub mod ledger;
#[doc(hidden)]
pub mod lifecycle;
#[doc(hidden)]
pub mod message;
#[doc(hidden)]
pub mod observe;
#[doc(hidden)]
pub mod pipeline;
#[doc(hidden)]
pub mod pool;
#[doc(hidden)]
pub mod postgres;
#[doc(hidden)]
pub mod prune;
#[doc(hidden)]
pub mod random;
#[doc(hidden)]
pub mod seal;
#[doc(hidden)]
pub mod stop;
#[doc(hidden)]
pub mod trust;
#[doc(hidden)]
pub mod why;
