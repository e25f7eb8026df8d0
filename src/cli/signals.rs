//! The signals of a process, as channels.
//!
//! `ctrlc` takes SIGINT. Its feature `termination` would take SIGTERM and SIGHUP
//! too, and call the same function for all three without saying which it was;
//! a daemon that reloads on SIGHUP has to know. So those two are read by
//! `signal-hook`, which names them, on a thread of its own.

use std::io;

use crossbeam_channel::{Receiver, Sender, bounded};
use signal_hook::consts::{SIGHUP, SIGTERM};
use signal_hook::iterator::Signals;

/// A second wish to stop is heard, a third is not needed.
const STOPS_MAX: usize = 2;

/// SIGINT, SIGTERM and SIGHUP: all of them mean a stop, as to any command.
///
/// # Errors
///
/// When the signals cannot be taken, or there is no thread to be had. Once in a
/// process.
pub fn stops() -> io::Result<Receiver<()>> {
    let (stop, stops) = bounded(STOPS_MAX);
    listen(stop.clone(), stop)?;
    Ok(stops)
}

/// SIGINT and SIGTERM in the first channel, SIGHUP in the second: as many as
/// come before the first of them is looked at are one.
///
/// # Errors
///
/// As [`stops`].
pub fn stops_and_reloads() -> io::Result<(Receiver<()>, Receiver<()>)> {
    let (stop, stops) = bounded(STOPS_MAX);
    let (reload, reloads) = bounded(1);
    listen(stop, reload)?;
    Ok((stops, reloads))
}

fn listen(stop: Sender<()>, hangup: Sender<()>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGHUP])?;
    let terminate = stop.clone();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                let wish = match signal {
                    SIGHUP => &hangup,
                    _ => &terminate,
                };
                wish.try_send(()).ok();
            }
        })?;
    ctrlc::set_handler(move || {
        stop.try_send(()).ok();
    })
    .map_err(io::Error::other)
}
