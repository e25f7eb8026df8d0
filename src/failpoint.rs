//! Named places at which a test can kill or freeze the daemon. Without the
//! feature `failpoints` they compile to nothing.
//!
//! `ACKONCE_FAILPOINT=NAME[:N[:pause]]`: at the N-th hit of NAME (the first,
//! unless told otherwise) the process kills itself with SIGKILL; or, with
//! `pause`, the thread makes the file `$ACKONCE_FAILPOINT_FILE.hit` and waits
//! until the file `$ACKONCE_FAILPOINT_FILE` exists.
//!
//! `ACKONCE_POISON=TEXT`: the process kills itself before the handler is run
//! with a body that holds TEXT. `ACKONCE_POISON_PANIC=TEXT`: the worker panics.
//!
//! `ACKONCE_MUTANT=NAME`: the daemon breaks one rule of the protocol, so that
//! `tests/chaos` can prove that it would notice.

/// The steps of the pipeline after which the process can be made to die.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Deliveries were taken from the broker thread.
    Received,
    /// Redis has answered the claims.
    Claimed,
    /// The rows stand in the ledger, uncommitted.
    Recorded,
    /// The effects stand beside them, uncommitted.
    Applied,
    /// COMMIT has returned.
    Committed,
    /// The claims of a keyed handler stand in the ledger, committed.
    Leased,
    /// A keyed handler has succeeded, and nobody knows yet.
    Called,
    /// The claims have become ledger rows, committed.
    Done,
    /// Redis has been told that the ids are done.
    Marked,
    /// The broker connection has been told.
    Settled,
    /// Reasons stand in the failure journal, nothing rejected yet.
    Journaled,
    /// A replay has taken letters and looked none up.
    ReplayTaken,
    /// A replay has handed a letter to the broker.
    ReplaySent,
    /// A replayed letter is confirmed, and not acknowledged.
    ReplayConfirmed,
    /// A replayed letter is acknowledged.
    ReplayAcked,
    /// A claim is seized so that its ledger row can be forgotten.
    ForceSeized,
    /// The ledger row is forgotten, the claim still held.
    ForceForgotten,
}

/// A rule of the protocol that a test has the daemon break. Those of
/// `tests/model.rs`, by the same names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// `held-claim`: a held claim treated as a duplicate.
    HeldClaim,
    /// `without-ledger`: working without the ledger.
    WithoutLedger,
    /// `early-ack`: an ack before the commit.
    EarlyAck,
    /// `effect-outside`: an effect outside the ledger's transaction.
    EffectOutside,
    /// `stale-ack`: a stale ack on a new connection.
    StaleAck,
    /// `early-mark`: a done mark before the commit.
    EarlyMark,
    /// `trusted-commit`: an unanswered commit taken for committed.
    TrustedCommit,
}

/// Whether a test has the daemon break this rule: never, without the feature.
#[cfg(not(feature = "failpoints"))]
#[inline]
#[must_use]
pub const fn mutant(_: Mutant) -> bool {
    false
}

/// Dies or waits here if a test asked for it.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn hit(_: Step) {}

/// Dies here if a test asked for it and the body holds its poison.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn meet(_: &[u8]) {}

#[cfg(feature = "failpoints")]
pub use armed::{hit, meet, mutant};

#[cfg(feature = "failpoints")]
mod armed {
    use std::path::Path;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::{Mutant, Step};

    struct Failpoint {
        name: String,
        at: u64,
        pause: bool,
        hits: AtomicU64,
    }

    /// Dies or waits here if a test asked for it.
    pub fn hit(step: Step) {
        static FAILPOINT: OnceLock<Option<Failpoint>> = OnceLock::new();
        let Some(failpoint) = FAILPOINT.get_or_init(from_environment) else {
            return;
        };
        if !failpoint.name.eq_ignore_ascii_case(&format!("{step:?}")) {
            return;
        }
        if failpoint.hits.fetch_add(1, Ordering::SeqCst) + 1 != failpoint.at {
            return;
        }
        if failpoint.pause {
            pause();
        } else {
            die();
        }
    }

    /// Dies here if a test asked for it and the body holds its poison.
    pub fn meet(body: &[u8]) {
        static POISON: OnceLock<[Option<String>; 2]> = OnceLock::new();
        let [deadly, frightening] = POISON.get_or_init(|| {
            ["ACKONCE_POISON", "ACKONCE_POISON_PANIC"].map(|name| std::env::var(name).ok())
        });
        let holds = |poison: &Option<String>| {
            poison.as_ref().is_some_and(|poison| {
                body.windows(poison.len().max(1))
                    .any(|window| window == poison.as_bytes())
            })
        };
        if holds(deadly) {
            die();
        }
        assert!(!holds(frightening), "a test asked for a panic");
    }

    /// Whether a test has the daemon break this rule.
    ///
    /// # Panics
    ///
    /// When the test names a mutant that there is not: a run of it would prove
    /// nothing.
    #[must_use]
    pub fn mutant(mutant: Mutant) -> bool {
        static CHOSEN: OnceLock<Option<Mutant>> = OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| {
            let name = std::env::var("ACKONCE_MUTANT").ok()?;
            let known = match name.as_str() {
                "held-claim" => Mutant::HeldClaim,
                "without-ledger" => Mutant::WithoutLedger,
                "early-ack" => Mutant::EarlyAck,
                "effect-outside" => Mutant::EffectOutside,
                "stale-ack" => Mutant::StaleAck,
                "early-mark" => Mutant::EarlyMark,
                "trusted-commit" => Mutant::TrustedCommit,
                _ => panic!("no mutant is called {name:?}"),
            };
            Some(known)
        });
        *chosen == Some(mutant)
    }

    fn die() {
        nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL).ok();
    }

    fn from_environment() -> Option<Failpoint> {
        let text = std::env::var("ACKONCE_FAILPOINT").ok()?;
        let mut parts = text.split(':');
        Some(Failpoint {
            name: parts.next()?.to_owned(),
            at: parts.next().and_then(|n| n.parse().ok()).unwrap_or(1),
            pause: parts.next() == Some("pause"),
            hits: AtomicU64::new(0),
        })
    }

    fn pause() {
        let Ok(file) = std::env::var("ACKONCE_FAILPOINT_FILE") else {
            return;
        };
        std::fs::write(format!("{file}.hit"), b"").ok();
        while !Path::new(&file).exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
