//! The dead-letter desk: what is dead, why, and what is done about it.
//!
//! [`desk`] reads a consumer's dead-letter queue as it stands, joins each
//! letter with the failure journal, and leaves the queue as it was except for
//! what was acked. [`filter`] picks letters, [`tally`] groups them, [`view`]
//! shows them, [`file`] writes them into a line of a file and reads them back.
//! [`replay`] publishes them again: [`lookout`] finds out where each stands,
//! [`plan`] says what that comes to and [`survey`] tells it beforehand;
//! [`republish`] knows what each carries, [`pace`] how fast they go, [`canary`]
//! how far.

pub mod canary;
pub mod desk;
pub mod file;
pub mod filter;
pub mod letter;
pub mod lookout;
pub mod pace;
pub mod plan;
pub mod replay;
pub mod republish;
pub mod survey;
pub mod tally;
pub mod time;
pub mod view;
