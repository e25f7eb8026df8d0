//! Ends calls that hang: amiquip has calls without a timeout, and shutting the
//! socket down is what makes every one of them return, within milliseconds.
//!
//! One thread per connection, which sleeps until a deadline it was given; a
//! call that is in time costs two uncontended locks and wakes nobody.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Shuts a socket down when a supervised call outlives its deadline.
pub(super) struct Watchdog {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    deadline: Option<Instant>,
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
    /// Starts the thread; `socket` is a clone of the one to end.
    pub(super) fn start(socket: TcpStream) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                deadline: None,
                wakes_at: None,
                fired: false,
                over: false,
            }),
            changed: Condvar::new(),
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
        let deadline = Instant::now() + within;
        let mut state = self.shared.lock();
        state.deadline = Some(deadline);
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
        while !state.over {
            let now = Instant::now();
            if state.deadline.is_some_and(|deadline| deadline <= now) {
                state.fired = true;
                state.deadline = None;
                if let Err(error) = socket.shutdown(Shutdown::Both) {
                    log::debug!("the socket to the broker was already closed: {error}");
                }
            }
            state.wakes_at = state.deadline;
            state = match state.deadline {
                Some(deadline) => {
                    self.changed
                        .wait_timeout(state, deadline - now)
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

    #[test]
    fn a_read_that_hangs_is_ended_and_one_that_does_not_is_left_alone() {
        let (mut ours, _theirs) = pair();
        let watchdog = Watchdog::start(ours.try_clone().unwrap()).unwrap();
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
        let watchdog = Watchdog::start(ours.try_clone().unwrap()).unwrap();
        drop(watchdog.watch(Duration::from_secs(600)));
        let _watch = watchdog.watch(Duration::from_millis(20));
        assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
        assert!(watchdog.fired());
    }
}
