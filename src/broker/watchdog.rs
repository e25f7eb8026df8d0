//! Ends calls that hang: amiquip has calls without a timeout, and shutting the
//! socket down is what makes every one of them return, within milliseconds.
//!
//! One thread per connection, which sleeps until a deadline it was given; a
//! call that is in time costs two uncontended locks and wakes nobody.
//!
//! Once the daemon is told to stop, a call is also ended when the broker has
//! said nothing at all for [`SILENCE`]: a frozen one must not hold up the stop,
//! and a slow one that still sends is waited for.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::stop::Stop;

/// How long a broker may say nothing during a call while the daemon stops.
const SILENCE: Duration = Duration::from_millis(600);

/// How often a call that lasts is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How often something came in: whether the other side is alive.
#[derive(Debug, Clone, Default)]
pub(super) struct Pulse(Arc<AtomicU64>);

impl Pulse {
    pub(super) fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn beats(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Shuts a socket down when a supervised call outlives its deadline.
pub(super) struct Watchdog {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    pulse: Pulse,
    stop: Option<Stop>,
}

struct State {
    deadline: Option<Instant>,
    /// When the deadline was given.
    since: Instant,
    /// When the thread wakes by itself; `None` while it sleeps until notified.
    wakes_at: Option<Instant>,
    fired: bool,
    over: bool,
}

/// Supervises from its making to its drop.
#[must_use = "supervision ends when this is dropped"]
pub(super) struct Watch<'a> {
    watchdog: &'a Watchdog,
}

impl Watchdog {
    /// Starts the thread; `socket` is a clone of the one to end, `pulse` beats
    /// when something comes in over it.
    pub(super) fn start(socket: TcpStream, pulse: Pulse, stop: Option<Stop>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                deadline: None,
                since: Instant::now(),
                wakes_at: None,
                fired: false,
                over: false,
            }),
            changed: Condvar::new(),
            pulse,
            stop,
        });
        let theirs = Arc::clone(&shared);
        thread::Builder::new()
            .name("ackonce-watch".to_owned())
            .spawn(move || theirs.run(&socket))?;
        Ok(Self { shared })
    }

    /// Supervises the calls made while the watch lives; they share `within`.
    /// One watch at a time: a second one replaces the first.
    pub(super) fn watch(&self, within: Duration) -> Watch<'_> {
        self.arm(within);
        Watch { watchdog: self }
    }

    /// Ends the socket after `within` unless the watchdog is dropped first.
    pub(super) fn arm(&self, within: Duration) {
        let since = Instant::now();
        let deadline = since + within;
        let mut state = self.shared.lock();
        state.deadline = Some(deadline);
        state.since = since;
        if state.wakes_at.is_none_or(|wakes_at| deadline < wakes_at) {
            self.shared.changed.notify_one();
        }
    }

    /// True once a deadline passed and the socket was shut down.
    pub(super) fn fired(&self) -> bool {
        self.shared.lock().fired
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.shared.lock().over = true;
        self.shared.changed.notify_one();
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.watchdog.shared.lock().deadline = None;
    }
}

impl Shared {
    /// A panic elsewhere cannot leave `State` half written: every change is one
    /// assignment.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, socket: &TcpStream) {
        let mut state = self.lock();
        let mut heard = (self.pulse.beats(), Instant::now());
        while !state.over {
            let now = Instant::now();
            let beats = self.pulse.beats();
            if beats != heard.0 {
                heard = (beats, now);
            }
            let silent_for = now.duration_since(heard.1.max(state.since));
            let over = |deadline| deadline <= now || (silent_for >= SILENCE && self.is_stopping());
            if state.deadline.is_some_and(over) {
                state.fired = true;
                state.deadline = None;
                if let Err(error) = socket.shutdown(Shutdown::Both) {
                    log::debug!("the socket to the broker was already closed: {error}");
                }
            }
            state.wakes_at = match self.stop {
                Some(_) => state.deadline.map(|it| it.min(now + LOOK_EVERY)),
                None => state.deadline,
            };
            state = match state.wakes_at {
                Some(wakes_at) => {
                    self.changed
                        .wait_timeout(state, wakes_at.saturating_duration_since(now))
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    fn is_stopping(&self) -> bool {
        self.stop.as_ref().is_some_and(Stop::is_set)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpListener;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (ours, listener.accept().unwrap().0)
    }

    fn watching(socket: &TcpStream, stop: Option<Stop>) -> (Watchdog, Pulse) {
        let pulse = Pulse::default();
        let socket = socket.try_clone().unwrap();
        (Watchdog::start(socket, pulse.clone(), stop).unwrap(), pulse)
    }

    #[test]
    fn a_read_that_hangs_is_ended_and_one_that_does_not_is_left_alone() {
        let (mut ours, _theirs) = pair();
        let (watchdog, _) = watching(&ours, None);
        for _ in 0..100 {
            drop(watchdog.watch(Duration::from_secs(600)));
        }
        assert!(!watchdog.fired());
        let watch = watchdog.watch(Duration::from_millis(20));
        assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
        drop(watch);
        assert!(watchdog.fired());
    }

    #[test]
    fn a_shorter_deadline_after_a_longer_one_is_kept() {
        let (mut ours, _theirs) = pair();
        let (watchdog, _) = watching(&ours, None);
        drop(watchdog.watch(Duration::from_secs(600)));
        let _watch = watchdog.watch(Duration::from_millis(20));
        assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
        assert!(watchdog.fired());
    }

    #[test]
    fn a_stop_ends_a_call_on_a_silent_peer_and_waits_for_one_that_still_sends() {
        let (mut ours, _theirs) = pair();
        let (stopper, stop) = crate::stop::pair();
        let (watchdog, pulse) = watching(&ours, Some(stop));
        let watch = watchdog.watch(Duration::from_secs(600));
        let beating = std::thread::spawn(move || {
            let end = Instant::now() + 4 * SILENCE;
            while Instant::now() < end {
                pulse.beat();
                std::thread::park_timeout(LOOK_EVERY);
            }
        });
        drop(stopper);
        beating.join().unwrap();
        assert!(!watchdog.fired(), "it still sends");
        assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
        drop(watch);
        assert!(watchdog.fired());
    }
}
