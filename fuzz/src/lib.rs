//! What is done with bytes from outside, and what must hold whatever they are:
//! a check for each of them, which panics where it does not. libFuzzer drives
//! them from `fuzz_targets`, and `tests/it/fuzz_seeds.rs` with what is known.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a panic is how a check says no"
)]

mod amqp;
mod lines;
mod text;

pub use amqp::{delivery, frames};
pub use lines::{answers, letters};
pub use text::{config, parse, sql, times, values};

/// A check of some bytes.
pub type Check = fn(&[u8]);

/// All there are, by the names of their programs and of the folders of their
/// seeds.
pub const CHECKS: [(&str, Check); 8] = [
    ("frames", frames),
    ("delivery", delivery),
    ("config", config),
    ("values", values),
    ("sql", sql),
    ("answers", answers),
    ("letters", letters),
    ("times", times),
];

/// Control characters that no text for people may have.
fn has_control(text: &str) -> bool {
    text.chars().any(|c| c.is_control() && c != '\n')
}
