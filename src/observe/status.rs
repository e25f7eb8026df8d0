//! What a running daemon is doing, as `/status` says it and `ackonce status`
//! reads it.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::admin::Shown;
use super::health::Report;

/// A daemon and its consumers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Of the running program.
    pub version: String,
    /// Of its process.
    pub pid: u32,
    /// How long it has run, in whole seconds.
    pub uptime_seconds: u64,
    /// By name.
    pub consumers: Vec<Consumer>,
}

/// What one consumer is doing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Consumer {
    /// What it is doing, and whether it gets anywhere.
    #[serde(flatten)]
    pub report: Report,
    /// Deliveries whose id is claimed elsewhere.
    pub parked: u64,
    /// Deliveries settled since the start of the daemon, by outcome:
    /// `applied`, `duplicate`, `retried`, `dead-lettered`, `returned`, `lost`.
    pub messages: BTreeMap<String, u64>,
    /// Whether the last thing heard of each server was good: `rabbitmq`,
    /// `redis`, `postgresql`.
    pub servers: BTreeMap<String, bool>,
}

impl Status {
    /// Of this process, which began at `since`.
    #[must_use]
    pub fn of(shown: &Shown, since: Instant) -> Self {
        let consumer = |report: Report| {
            let values = |family, label| shown.metrics.values(family, &report.consumer, label);
            Consumer {
                parked: values("parked", "").into_values().sum(),
                messages: values("messages_total", "outcome"),
                servers: values("server_up", "server")
                    .into_iter()
                    .map(|(server, up)| (server, up > 0))
                    .collect(),
                report,
            }
        };
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_seconds: since.elapsed().as_secs(),
            consumers: shown.health.reports().into_iter().map(consumer).collect(),
        }
    }

    /// Whether every consumer consumes.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.consumers.iter().all(|c| c.report.is_ready())
    }
}
