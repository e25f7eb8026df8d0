//! The dead-letter desk: what is dead, why, and what is done about it.
//!
//! [`desk`] reads a consumer's dead-letter queue as it stands, joins each
//! letter with the failure journal, and leaves the queue as it was except for
//! what was acked. [`filter`] picks letters. [`replay`] publishes them again:
//! [`lookout`] finds out where each stands, [`plan`] says what that comes to,
//! [`survey`] tells it beforehand, [`republish`] knows what a letter carries, [`pace`] and [`canary`] how fast and how far.

pub mod canary;
pub mod desk;
pub mod filter;
pub mod letter;
pub mod lookout;
pub mod pace;
pub mod plan;
pub mod replay;
pub mod republish;
pub mod survey;
pub mod time;
