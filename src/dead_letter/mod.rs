//! The dead-letter desk: what is dead, why, and what is done about it.
//!
//! [`desk`] reads a consumer's dead-letter queue as it stands, joins each
//! letter with the failure journal, and leaves the queue as it was except for
//! what was acked. [`filter`] picks letters.

pub mod desk;
pub mod filter;
pub mod letter;
pub mod time;
