//! What the daemon shows of itself.

pub mod admin;
pub mod health;
pub mod logging;
pub mod metrics;
