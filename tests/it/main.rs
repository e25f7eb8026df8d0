//! Every integration test, a module for each subject, in one binary: the
//! dependency graph is linked once and the harness compiled once.
#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a broken stage is a failed test"
)]

#[path = "../common/mod.rs"]
mod common;

mod alarm;
mod amqp_types;
mod batches;
mod broker_faults;
mod cli;
mod cluster;
mod command_daemon;
mod command_examples;
mod command_handler;
mod command_stream;
mod completions;
mod config;
mod conflicts;
mod courier;
mod crash;
mod crash_loops;
mod dead;
mod dead_export;
mod dead_interrupted;
mod dead_json;
mod exactly_once;
mod failures;
mod faults;
mod fuzz_seeds;
mod harness;
mod health;
mod hostile;
mod hostile_headers;
mod hostile_redis;
mod hostile_retries;
mod hostile_sql;
mod house;
mod http_daemon;
mod http_handler;
mod http_tls;
mod journal;
mod keyed;
mod least_privilege;
mod logging;
mod metrics;
mod moves;
mod ops;
mod parked;
mod paused_workers;
mod pauses;
mod postgres_faults;
mod properties;
mod prune;
mod publisher;
mod reconnect;
mod redis_faults;
mod reload;
mod replay;
mod replay_canary;
mod replay_force;
mod replay_hold;
mod replay_plan;
mod replay_rate;
mod replay_ways;
mod rules;
mod rust_api;
mod secrets;
mod shutdown;
mod status;
mod systemic;
mod tls;
mod topology;
mod why;
