//! The replay itself: takes letters, looks them up, publishes, waits for the
//! confirm, acknowledges.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::fates::Watched;
use super::force;
use super::{Action, Cut, Event, Hindrance, Line, Order, Report};
use crate::broker::desk::{Desk, DeskError, Ticket};
use crate::broker::publisher::{Fate, Limits, PublishError, Publisher, Seq};
use crate::dead_letter::letter::Letter;
use crate::dead_letter::lookout::{Judged, Lookout, Suspect};
use crate::dead_letter::office::Office;
use crate::dead_letter::pace::Pace;
use crate::dead_letter::plan::{Standing, Verdict};
use crate::dead_letter::republish::{self, Origin, Stamp};
use crate::failpoint::{self, Step};
use crate::message::REPLAY_HEADER;
use crate::stop::Stop;

/// What may be unconfirmed, and how long the broker may block one message.
const LIMITS: Limits = Limits {
    messages: 256,
    bytes: 4 << 20,
    wait: Duration::from_secs(30),
};

/// Letters that are looked up at once.
const LOOKED_UP: usize = 256;

/// Bodies of this size go alone: should the broker refuse one, and close the
/// channel over it, it is known which.
const ALONE_BYTES: usize = 256 * 1024;

/// Longest wait for confirms before something else is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long a replay that ends waits for the confirms that are out.
const LAST_CONFIRMS_WITHIN: Duration = Duration::from_secs(10);

/// How long a goodbye may take.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// A letter that was published and has no fate yet.
struct Out {
    ticket: Ticket,
    judged: Judged,
}
