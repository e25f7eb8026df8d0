//! Waiting for a condition: the only place that sleeps.

use std::time::{Duration, Instant};

/// How long a condition may take to come true. Generous, because a test that
/// passes never waits it out and a loaded machine is slow.
pub const DEADLINE: Duration = Duration::from_secs(90);

const POLL: Duration = Duration::from_millis(15);

/// Polls `condition` until it holds.
///
/// # Panics
///
/// With `what` when it does not hold within [`DEADLINE`].
pub fn eventually(what: &str, condition: impl FnMut() -> bool) {
    assert!(
        try_eventually(DEADLINE, condition),
        "still not so after {DEADLINE:?}: {what}"
    );
}

/// Polls `condition` until it holds or `deadline` has passed; whether it held.
pub fn try_eventually(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + deadline;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(POLL);
    }
}
