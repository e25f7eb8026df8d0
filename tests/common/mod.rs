//! The harness: a [`World`] of its own for every test, on real servers, and
//! the daemon's real binary in it. It knows how to set a stage, break things
//! and look at what is left; what that should be, the tests say.
#![allow(
    dead_code,
    unused_imports,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "each test binary uses its own part, and a broken stage is a failed test"
)]

pub mod admin;
mod authority;
mod broker;
mod config;
mod daemon;
mod database;
pub mod letters;
mod library;
mod management;
mod private;
pub mod program;
mod proxy;
pub mod raw;
mod receiver;
mod redis;
mod servers;
mod tls;
mod tool;
mod wait;
pub mod wire;
mod world;

pub use admin::Admin;
pub use authority::{Authority, Leaf};
pub use broker::{Broker, Dead, Msg, numbered, numbered_ids};
pub use config::{Config, Consumer};
pub use daemon::{Daemon, Gate, run_ackonce, said};
pub use database::{Database, Failure};
pub use management::Management;
pub use private::PrivateBroker;
pub use proxy::{Cut, Proxy};
pub use receiver::{Answer, Receiver, Request};
pub use redis::Redis;
pub use servers::{PostgresServer, RedisServer};
pub use tls::TlsListener;
pub use tool::{Ended, Running, Tool};
pub use wait::{DEADLINE, eventually, try_eventually};
pub use wire::Wire;
pub use world::{World, random};

/// The consumer most tests run, and its queue.
pub const ORDERS: &str = "orders";
/// Where that consumer's dead letters go.
pub const ORDERS_DEAD: &str = "orders.dead";
/// Applies a message by inserting its id and body into the effect table, which
/// has no unique constraint: an effect applied twice shows as two rows.
pub const RECORD_EFFECT: &str =
    "insert into effect (message_id, body) select message_id, body from message";
/// As [`RECORD_EFFECT`], and refuses a message whose `amount` is no integer
/// with an error of class 22 that quotes it.
pub const RECORD_AMOUNT: &str = "insert into effect (message_id, body, amount) \
     select message_id, body, (body->>'amount')::int from message";
