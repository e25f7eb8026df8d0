//! Randomness for waits, where a bad draw costs a moment at most.

/// A random number. Where the system has none to give, the largest: the wait
/// drawn with it is the longest.
#[must_use]
pub fn draw() -> u64 {
    getrandom::u64().unwrap_or(u64::MAX)
}
