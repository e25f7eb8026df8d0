//! What the daemon shows of itself.

pub mod admin;
pub mod health;
pub mod logging;
pub mod metrics;
pub mod status;
pub mod systemd;

use std::sync::Arc;

use health::Pulse;
use metrics::Meter;

/// Where one consumer's threads write what they do.
#[derive(Clone)]
pub struct Signs {
    /// What they count.
    pub meter: Arc<Meter>,
    /// What they are doing.
    pub pulse: Arc<Pulse>,
}
