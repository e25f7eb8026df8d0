//! The dead-letter desk: what is dead, why, and what is done about it.
//!
//! [`desk`] reads a consumer's dead-letter queue as it stands, joins each
//! letter with the failure journal, and leaves the queue as it was except for
//! what was acked. [`filter`] picks letters, [`tally`] groups them, [`view`]
//! shows them, [`file`] writes them into a line of a file and reads them back.

pub mod desk;
pub mod file;
pub mod filter;
pub mod letter;
pub mod tally;
pub mod time;
pub mod view;
