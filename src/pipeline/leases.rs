//! The claims in the ledger that a consumer of this process has: renewed by
//! one thread while their handlers run, and watched by another, which does no
//! I/O and so is never late. A claim that is not renewed in time counts as
//! lost before the server would give it to anybody else, and its handler is
//! told to stop.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::Context;
use crossbeam_channel::Sender;

use crate::config::checked;
use crate::ledger::{Ledger, Owner};
use crate::message::MessageId;
use crate::observe::Signs;
use crate::observe::metrics::{LedgerStep, Meter};
use crate::stop::{self, Stop, Stopper};

/// How much of a lease may pass without a renewal before it counts as lost, in
/// tenths: the rest is for the handler to end.
const KEPT_TENTHS: u32 = 9;

/// How long before the end of `shutdown_timeout` the handlers that still run
/// are cancelled, so that what they leave behind can be told.
const CANCEL_AHEAD_MAX: Duration = Duration::from_secs(2);

/// Bounds of how often the watch looks: a twentieth of the lease, within these.
const TICK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(250));

/// The claims of one consumer of this process.
#[derive(Clone)]
pub(super) struct Leases(Arc<Shelf>);

struct Shelf {
    consumer: String,
    lease: Duration,
    renew_every: Duration,
    stop: Stop,
    shutdown_timeout: Duration,
    held: Mutex<HashMap<MessageId, Entry>>,
    lost: AtomicU64,
    meter: Arc<Meter>,
}

struct Entry {
    owner: Owner,
    /// When it counts as lost.
    until: Instant,
    renew_at: Instant,
    /// Its handler has returned: whatever becomes of the claim now, the ledger
    /// tells when it is to be completed.
    returned: bool,
    /// Dropped to cancel the handler.
    cancel: Option<Stopper>,
}

/// One claim that is renewed until this is dropped.
pub(super) struct Lease {
    pub(super) owner: Owner,
    /// Set when the handler is to end: the claim is lost, or the daemon can
    /// wait no longer.
    pub(super) cancelled: Stop,
    id: MessageId,
    shelf: Arc<Shelf>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lease({:?})", self.owner)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut held = self.shelf.lock();
        if held.get(&self.id).is_some_and(|e| e.owner == self.owner) {
            held.remove(&self.id);
        }
    }
}

impl Lease {
    /// Whether nobody else can have it now.
    pub(super) fn is_kept(&self) -> bool {
        let held = self.shelf.lock();
        held.get(&self.id)
            .is_some_and(|e| e.owner == self.owner && Instant::now() < e.until)
    }

    /// Its handler has returned.
    pub(super) fn returned(&self) {
        if let Some(entry) = self.shelf.lock().get_mut(&self.id)
            && entry.owner == self.owner
        {
            entry.returned = true;
        }
    }
}

impl Leases {
    /// Starts the two threads. They end when the last of the claims and of
    /// these is dropped; something is sent to `panicked` when one ends before.
    ///
    /// # Errors
    ///
    /// When a thread cannot be started.
    pub(super) fn start(
        consumer: &checked::Consumer,
        stop: Stop,
        shutdown_timeout: Duration,
        mut ledger: Ledger,
        signs: &Signs,
        panicked: &Sender<()>,
    ) -> anyhow::Result<Self> {
        let shelf = Arc::new(Shelf {
            consumer: consumer.name.clone(),
            lease: consumer.claim.lease,
            renew_every: consumer.claim.renew_every,
            stop,
            shutdown_timeout,
            held: Mutex::default(),
            lost: AtomicU64::new(0),
            meter: Arc::clone(&signs.meter),
        });
        let tick = (shelf.lease / 20).clamp(TICK.0, TICK.1);
        let watched = Arc::downgrade(&shelf);
        spawn(&consumer.name, "watch", panicked, move || {
            while let Some(shelf) = Weak::upgrade(&watched) {
                shelf.watch();
                drop(shelf);
                std::thread::sleep(tick);
            }
        })?;
        let renewed = Arc::downgrade(&shelf);
        let tick = (shelf.renew_every / 4).clamp(TICK.0, TICK.1);
        spawn(&consumer.name, "lease", panicked, move || {
            let mut told = false;
            while let Some(shelf) = Weak::upgrade(&renewed) {
                shelf.renew(&mut ledger, &mut told);
                drop(shelf);
                std::thread::sleep(tick);
            }
        })?;
        Ok(Self(shelf))
    }

    /// Keeps a claim that was asked for at `asked`: its lease runs from some
    /// time after that, never from before it.
    pub(super) fn keep(&self, id: &MessageId, owner: Owner, asked: Instant) -> Lease {
        let (stopper, cancelled) = stop::pair();
        let entry = Entry {
            owner,
            until: self.0.until(asked),
            renew_at: asked + self.0.renew_every,
            returned: false,
            cancel: Some(stopper),
        };
        self.0.lock().insert(id.clone(), entry);
        Lease {
            owner,
            cancelled,
            id: id.clone(),
            shelf: Arc::clone(&self.0),
        }
    }
}

impl Shelf {
    fn until(&self, asked: Instant) -> Instant {
        asked + self.lease / 10 * KEPT_TENTHS
    }

    /// Cancels what is lost, and everything when a stop has waited long enough.
    fn watch(&self) {
        let now = Instant::now();
        let out_of_time = self.stop.is_set() && {
            let ahead = (self.shutdown_timeout / 4).min(CANCEL_AHEAD_MAX);
            self.stop.left_of(self.shutdown_timeout) <= ahead
        };
        let mut lost = 0;
        self.lock().retain(|_, entry| {
            if out_of_time {
                entry.cancel = None;
            }
            let over = entry.until <= now;
            lost += u64::from(over && !entry.returned);
            !over || entry.returned
        });
        self.tell_lost(lost, "no renewal came through in time");
    }

    fn tell_lost(&self, count: u64, why: &str) {
        if count == 0 {
            return;
        }
        self.meter.lost_claims(count);
        let total = self.lost.fetch_add(count, Ordering::Relaxed) + count;
        log::warn!(
            consumer = self.consumer.as_str(), claims = count, total = total;
            "lost claims in the ledger, and cancelled their handlers: {why}"
        );
    }

    fn renew(&self, ledger: &mut Ledger, told: &mut bool) {
        let asked = Instant::now();
        let due: Vec<(MessageId, Owner)> = {
            let held = self.lock();
            let due = held.iter().filter(|(_, entry)| entry.renew_at <= asked);
            due.map(|(id, entry)| (id.clone(), entry.owner)).collect()
        };
        if due.is_empty() {
            return;
        }
        let claims: Vec<_> = due.iter().map(|(id, owner)| (id, *owner)).collect();
        let renewal = match ledger.renew(&claims, self.lease) {
            Ok(renewal) => renewal,
            Err(error) => {
                self.meter.ledger_failed(LedgerStep::Renew);
                if !std::mem::replace(told, true) {
                    log::warn!(consumer = self.consumer.as_str(); "claims in the ledger are not renewed at the moment: {error}");
                }
                return;
            }
        };
        *told = false;
        let mut held = self.lock();
        let mut lost = 0;
        for (id, owner) in due {
            let Some(entry) = held.get_mut(&id).filter(|entry| entry.owner == owner) else {
                continue;
            };
            if renewal.renewed.contains(id.as_str()) {
                entry.until = self.until(asked);
                entry.renew_at = asked + self.renew_every;
            } else if renewal.locked.contains(id.as_str()) {
                // Tried again at the next tick, for as long as it counts as kept.
            } else if entry.returned {
                // Completed a moment ago, or never to be: the ledger tells.
                entry.renew_at = asked + self.renew_every;
            } else {
                lost += 1;
                held.remove(&id);
            }
        }
        drop(held);
        self.tell_lost(lost, "somebody else has taken them over");
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<MessageId, Entry>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn spawn(
    consumer: &str,
    what: &'static str,
    panicked: &Sender<()>,
    run: impl FnOnce() + Send + 'static,
) -> anyhow::Result<()> {
    let (name, panicked) = (consumer.to_owned(), panicked.clone());
    std::thread::Builder::new()
        .name(format!("{consumer}-{what}"))
        .spawn(move || {
            if catch_unwind(AssertUnwindSafe(run)).is_err() {
                log::error!(consumer = name.as_str(); "the {what} thread panicked");
                panicked.try_send(()).ok();
            }
        })
        .map(drop)
        .with_context(|| format!("failed to start the {what} thread of consumer {consumer}"))
}
