//! Whether the daemon is alive and ready, judged by what it gets done and not
//! by its existence.
//!
//! *Ready* is a daemon whose consumers are all subscribed and not paused.
//! *Alive* is one whose consumers' threads come round, and whose deliveries
//! are settled while there are any. A server that is away makes it unready,
//! not dead: a restart would mend nothing.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What a consumer is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Doing {
    Starting,
    Connecting(String),
    Consuming,
    Stopping,
}

/// One consumer's signs of life, written by its threads.
#[derive(Debug)]
pub struct Pulse {
    consumer: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    doing: Doing,
    /// Why it takes no messages, while it takes none.
    paused: Option<String>,
    /// When its broker thread last came round, and by when it will again.
    due: Instant,
    in_flight: usize,
    /// How many of them wait for the broker to take a copy.
    copies: usize,
    /// When a delivery was last settled, or there was none to settle.
    advanced: Instant,
    /// How long one message may take, as far as that is configured.
    takes: Duration,
}

impl Pulse {
    fn new(consumer: &str, now: Instant) -> Self {
        Self {
            consumer: consumer.to_owned(),
            state: Mutex::new(State {
                doing: Doing::Starting,
                paused: None,
                due: now + GRACE,
                in_flight: 0,
                copies: 0,
                advanced: now,
                takes: Duration::ZERO,
            }),
        }
    }

    /// Its thread came round, and will again `within` so long.
    pub fn beat(&self, within: Duration) {
        self.lock().due = Instant::now() + within + GRACE;
    }

    /// It has no connection, for this reason.
    pub fn connecting(&self, cause: &str) {
        self.lock().doing = Doing::Connecting(one_line(cause));
    }

    /// One message may take so long: with nothing settled for twice that time
    /// it need not be stuck.
    pub fn may_take(&self, longest: Duration) {
        self.lock().takes = longest;
    }

    /// It is subscribed.
    pub fn consuming(&self) {
        self.lock().doing = Doing::Consuming;
    }

    /// It stops.
    pub fn stopping(&self) {
        self.lock().doing = Doing::Stopping;
    }

    /// It takes no messages, for this reason.
    pub fn paused(&self, cause: &str) {
        self.lock().paused = Some(one_line(cause));
    }

    /// It takes messages again.
    pub fn resumed(&self) {
        let mut state = self.lock();
        state.paused = None;
        state.advanced = Instant::now();
    }

    /// So many deliveries are in flight, after `settled` more of them were
    /// settled.
    pub fn flow(&self, in_flight: usize, settled: bool) {
        let mut state = self.lock();
        if settled || state.in_flight == 0 {
            state.advanced = Instant::now();
        }
        state.in_flight = in_flight;
    }

    /// So many of those in flight wait for the broker to take a copy, which
    /// may be for as long as it has an alarm: no restart would mend that.
    pub fn copies(&self, waiting: usize) {
        self.lock().copies = waiting;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A server's words, so that they cannot pass for further lines: systemd takes
/// each line for a message of its own.
fn one_line(cause: &str) -> String {
    let plain = cause.chars().map(|c| if c.is_control() { ' ' } else { c });
    plain.take(CAUSE_MAX).collect()
}

/// Longest cause, in characters.
const CAUSE_MAX: usize = 500;

/// What a busy machine may add to every bound.
const GRACE: Duration = Duration::from_secs(30);

/// The pulses of all consumers.
#[derive(Debug)]
pub struct Health {
    pulses: Mutex<Vec<Arc<Pulse>>>,
    stall_after: Duration,
}

/// What is to be said of one consumer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Its name.
    pub consumer: String,
    /// `starting`, `connecting`, `consuming`, `paused` or `stopping`.
    pub state: String,
    /// Why it does not consume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// Deliveries handed over and not settled.
    pub in_flight: usize,
    /// Why it counts as dead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stalled: Option<String>,
}

impl Report {
    /// Whether it consumes.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.state == "consuming" && self.is_alive()
    }

    /// Whether it gets anywhere.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.stalled.is_none()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.consumer, self.state)?;
        for why in self.cause.iter().chain(&self.stalled) {
            write!(f, ": {why}")?;
        }
        Ok(())
    }
}

impl Health {
    /// Of no consumer yet. One that settles nothing for `stall_after`, though
    /// it has deliveries and no pause, counts as dead.
    #[must_use]
    pub fn new(stall_after: Duration) -> Self {
        Self {
            pulses: Mutex::default(),
            stall_after,
        }
    }

    /// The pulse of one more consumer, in place of an older one of that name.
    #[must_use]
    pub fn pulse(&self, consumer: &str) -> Arc<Pulse> {
        let pulse = Arc::new(Pulse::new(consumer, Instant::now()));
        let mut pulses = self.lock();
        match pulses.iter_mut().find(|old| old.consumer == consumer) {
            Some(old) => *old = Arc::clone(&pulse),
            None => pulses.push(Arc::clone(&pulse)),
        }
        pulse
    }

    /// A consumer that is no more is neither well nor ill.
    pub fn forget(&self, consumer: &str) {
        self.lock().retain(|pulse| pulse.consumer != consumer);
    }

    /// How each consumer is.
    #[must_use]
    pub fn reports(&self) -> Vec<Report> {
        let now = Instant::now();
        let pulses = self.lock();
        pulses
            .iter()
            .map(|pulse| report(pulse, self.stall_after, now))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Pulse>>> {
        self.pulses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn report(pulse: &Pulse, stall_after: Duration, now: Instant) -> Report {
    let state = pulse.lock();
    let (name, cause) = match (&state.doing, &state.paused) {
        (Doing::Starting, _) => ("starting", None),
        (Doing::Connecting(cause), _) => ("connecting", Some(cause.clone())),
        (Doing::Stopping, _) => ("stopping", None),
        (Doing::Consuming, Some(cause)) => ("paused", Some(cause.clone())),
        (Doing::Consuming, None) => ("consuming", None),
    };
    let idle = now.saturating_duration_since(state.advanced);
    let stall_after = stall_after.max(state.takes.saturating_mul(2));
    let stalled = if now > state.due {
        Some("its thread does not come round".to_owned())
    } else if name == "consuming" && state.in_flight > state.copies && idle > stall_after {
        Some(format!(
            "none of {} deliveries settled for {} s",
            state.in_flight,
            idle.as_secs()
        ))
    } else {
        None
    };
    Report {
        consumer: pulse.consumer.clone(),
        state: name.to_owned(),
        cause,
        in_flight: state.in_flight,
        stalled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(60);

    fn after(pulse: &Pulse, passed: Duration) -> Report {
        report(pulse, STALL, Instant::now() + passed)
    }

    #[test]
    fn what_has_not_connected_is_alive_and_not_ready() {
        let pulse = Pulse::new("orders", Instant::now());
        let new = after(&pulse, Duration::ZERO);
        assert!(new.is_alive() && !new.is_ready(), "{new}");
        pulse.connecting("refused");
        pulse.beat(STALL);
        let connecting = after(&pulse, STALL);
        assert!(connecting.is_alive() && !connecting.is_ready());
        assert_eq!(connecting.to_string(), "orders: connecting: refused");
    }

    #[test]
    fn what_a_server_says_stays_on_its_line() {
        let pulse = Pulse::new("orders", Instant::now());
        pulse.connecting(&format!("no\nREADY=1\r\u{1b}[m{}", "x".repeat(9_000)));
        let said = after(&pulse, Duration::ZERO).to_string();
        assert!(
            said.starts_with("orders: connecting: no READY=1  [mxxx"),
            "{said}"
        );
        assert!(said.len() < 600 && !said.contains(char::is_control));
    }

    #[test]
    fn an_idle_consumer_is_ready_for_as_long_as_its_thread_comes_round() {
        let pulse = Pulse::new("orders", Instant::now());
        pulse.consuming();
        pulse.beat(Duration::from_secs(3600));
        assert!(after(&pulse, 20 * STALL).is_ready());
        let late = after(&pulse, Duration::from_secs(3600) + 2 * GRACE);
        assert!(!late.is_alive() && !late.is_ready(), "{late}");
    }

    #[test]
    fn a_consumer_has_one_pulse_the_newest_until_it_is_forgotten() {
        let health = Health::new(STALL);
        let old = health.pulse("orders");
        let _other = health.pulse("bills");
        let new = health.pulse("orders");
        old.stopping();
        new.consuming();
        let states: Vec<String> = health.reports().iter().map(Report::to_string).collect();
        assert_eq!(states, ["orders: consuming", "bills: starting"]);
        health.forget("orders");
        let left: Vec<String> = health.reports().into_iter().map(|r| r.consumer).collect();
        assert_eq!(left, ["bills"]);
    }

    #[test]
    fn a_handler_that_may_take_longer_is_waited_for() {
        let pulse = Pulse::new("orders", Instant::now());
        pulse.consuming();
        pulse.beat(10 * STALL);
        pulse.flow(3, false);
        pulse.may_take(2 * STALL);
        assert!(after(&pulse, 3 * STALL).is_alive());
        assert!(!after(&pulse, 5 * STALL).is_alive());
    }

    #[test]
    fn a_consumer_that_settles_nothing_is_dead_unless_it_is_paused() {
        let pulse = Pulse::new("orders", Instant::now());
        pulse.consuming();
        pulse.beat(10 * STALL);
        pulse.flow(3, false);
        assert!(after(&pulse, STALL / 2).is_ready());
        assert!(!after(&pulse, 2 * STALL).is_alive());
        // The broker's doing, not its own.
        pulse.copies(3);
        assert!(after(&pulse, 2 * STALL).is_alive());
        pulse.copies(2);
        assert!(!after(&pulse, 2 * STALL).is_alive());
        pulse.paused("the table is gone");
        let paused = after(&pulse, 2 * STALL);
        assert!(paused.is_alive() && !paused.is_ready(), "{paused}");
    }
}
