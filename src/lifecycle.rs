//! The protocol of one delivery, as a pure function: `(state, event)` to
//! `(state, actions)`. The pipeline does what the actions say and reports back
//! what happened; it settles nothing that this file did not tell it to settle.
//! `tests/model.rs` walks every interleaving of it.
//!
//! ```text
//!  Received ──► Claiming ──► Recording ──► Recorded ──► Applied ──► Settled(Ack)
//!     │  │       │  ▲  │       │  ▲          │  ▲          │  │         ▲
//!     │  │       ▼  │  │       │  └──────────┴──┼──────────┘  │ no      │ row
//!     │  │      Parked │       │   rolled back  │             │ reply   │ found
//!     │  └► Joined ──► │       ▼                └── InDoubt ◄─┘         │
//!     │         │      └──► Settled(Ack): found        └────────────────┘
//!     ▼         ▼           in the ledger, or marked done
//!  Journaling(reason) ──► Settled(Reject)        Settled(Requeue): on a stop
//!  Deferring ──► Settled(Retry)                  or a pause
//! ```
//!
//! A failed attempt that may succeed later leads from Recorded or Applied to
//! Deferring, any other end of a message to Journaling.
//!
//! A keyed handler shares no transaction with the ledger. There the claim
//! itself stands in the ledger, committed before the handler runs, and only
//! its owner can turn it into the row:
//!
//! ```text
//!  Recording ──► Leased ──► Called ──► Settled(Ack)
//!   │  ▲  │        │          │  ▲
//!   │  │  ▼        │          └──┘ no reply
//!   │  │ Parked    ▼          │
//!   │  └───────────┴──────────┘ the claim is another's, or nobody's
//!   └──► as above
//! ```
//!
//! Batches, leases, splitting and waiting are the pipeline's: they choose which
//! event comes next, never what it means.

use crate::failure::Class;
use crate::message::{DeadReason, Epoch, Settlement, Ticket};

/// Where a delivery stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// Handed over by the broker; nothing known yet.
    Received,
    /// Another delivery of the same id is being worked on in this process.
    Joined,
    /// Redis is asked whether the id is free, held or done.
    Claiming,
    /// The id is held by somebody else: to be looked at again.
    Parked,
    /// The ledger is asked: no open transaction holds this delivery's row.
    Recording,
    /// Its row stands in the ledger, in our open transaction.
    Recorded,
    /// Its effect stands beside the row, in the same open transaction.
    Applied,
    /// COMMIT was sent and not answered: the ledger is asked what became of
    /// it. Until it answers, the delivery is neither applied nor rejected.
    InDoubt,
    /// Its claim stands in the ledger, committed and ours: a keyed handler may
    /// run.
    Leased,
    /// The keyed handler has succeeded: the claim is to become a ledger row.
    Called,
    /// It is to be dead-lettered as soon as the reason is in the journal.
    Journaling(DeadReason),
    /// It is to be tried again later, as soon as the failed attempt is in the
    /// journal.
    Deferring,
    /// The broker has been told; nothing may happen any more.
    Settled(Settlement),
}

/// How a body compares with the one that the ledger, or the worker of the
/// same id, has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Body {
    /// Same fingerprint: a duplicate.
    Same,
    /// Another fingerprint: another message under the same id.
    Other,
}

/// What happened to a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// Its id is usable and nobody else in this process works on it.
    Identified,
    /// Its id is being worked on in this process.
    Collided,
    /// It cannot be worked on at all.
    Unusable(DeadReason),
    /// The claim is ours.
    ClaimWon,
    /// The claim belongs to somebody else.
    ClaimHeld,
    /// Redis did not answer, is switched off, or is not to be trusted alone.
    ClaimUnavailable,
    /// Redis carries this ledger's mark that the id is applied with this body.
    /// Any other mark is none: the ledger decides.
    MarkedDone,
    /// A parked delivery is due.
    LookAgain,
    /// The delivery it joined was found applied, or is applied and committed.
    OwnerApplied(Body),
    /// The delivery it joined came to another end.
    OwnerGaveUp,
    /// Its ledger row is new, in our open transaction.
    Inserted,
    /// The ledger has a committed row for its id.
    Found(Body),
    /// Its claim stands in the ledger, committed and ours.
    LeaseWon,
    /// The ledger has another's claim on its id, whose lease goes on.
    LeaseHeld,
    /// Its claim in the ledger is not ours any more, or its lease has run out.
    LeaseLost,
    /// The handler succeeded.
    Succeeded,
    /// The attempt failed, with this delivery alone in the transaction.
    Failed(Class),
    /// The attempt failed, with this delivery alone in the transaction, and it
    /// was the last one it had.
    Exhausted,
    /// The attempt failed for somebody in the batch; who, is not known yet. Or
    /// the transaction lost a race with another one.
    BatchFailed,
    /// COMMIT returned: the ledger has its row.
    Committed,
    /// COMMIT was sent and its reply never came.
    CommitUnknown,
    /// Its worker died too often while it was in work.
    Quarantined,
    /// The reason, or the failed attempt, stands in the failure journal.
    Journaled,
    /// It could not be written.
    JournalFailed,
    /// The daemon stops, the consumer pauses, or the delivery's connection is
    /// gone.
    Stopping,
}

/// What is to be done next, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Ask Redis for the claim.
    Claim,
    /// Put aside and look again later.
    Park,
    /// Insert into the ledger, in a transaction; for a keyed handler claim it
    /// there, and commit.
    Record,
    /// Run the handler, in that transaction.
    Apply,
    /// Commit that transaction.
    Commit,
    /// Run the keyed handler.
    Call,
    /// Turn our claim into a ledger row, in one transaction, if it is still
    /// ours.
    Complete,
    /// Roll that transaction back.
    Rollback,
    /// Write the reason into the failure journal, and give back our claim in the
    /// ledger in the same transaction; only if it is still ours.
    Journal(DeadReason),
    /// Write the failed attempt into the failure journal, likewise.
    JournalAttempt,
    /// Tell Redis that the id is applied.
    MarkDone,
    /// Give the claim in Redis back, if it is still ours.
    Release,
    /// Give the claim in the ledger back, if there is one and it is still ours.
    Surrender,
    /// Tell the broker.
    Settle(Settlement),
}

/// An event that cannot happen in a state: a defect of the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("illegal transition: {event:?} in state {state:?}")]
pub struct Illegal {
    /// Where the delivery stood.
    pub state: State,
    /// What was reported.
    pub event: Event,
}

/// The next state, and what is to be done.
pub type Step = (State, &'static [Action]);

/// The protocol.
///
/// # Errors
///
/// [`Illegal`] when `event` cannot happen in `state`.
pub fn step(state: State, event: Event) -> Result<Step, Illegal> {
    match state {
        State::Received => received(event),
        State::Joined => joined(event),
        State::Claiming => claiming(event),
        State::Parked => parked(event),
        State::Recording => recording(event),
        State::Recorded => recorded(event),
        State::Applied => applied(event),
        State::InDoubt => in_doubt(event),
        State::Leased => leased(event),
        State::Called => called(event),
        State::Journaling(reason) => journaling(reason, event),
        State::Deferring => deferring(event),
        State::Settled(_) => None,
    }
    .ok_or(Illegal { state, event })
}

/// Whether a settlement may be sent on the connection of `epoch`. After a
/// reconnect the same tag is another message, which a stale ack would delete.
#[must_use]
pub fn admits(epoch: Epoch, ticket: &Ticket) -> bool {
    ticket.epoch == epoch
}

/// The events that cannot happen in a state, named one by one: a new event does
/// not compile until every state has an answer to it.
macro_rules! never {
    ($($event:ident)*) => { $(Event::$event { .. })|* };
}

fn received(event: Event) -> Option<Step> {
    match event {
        Event::Identified => Some((State::Claiming, &[Action::Claim])),
        Event::Collided => Some((State::Joined, &[])),
        Event::Unusable(reason) => Some(dead(reason)),
        Event::Stopping => Some(requeued()),
        never![
            LeaseWon LeaseHeld LeaseLost
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone LookAgain
            OwnerApplied OwnerGaveUp
            Inserted Found Succeeded Failed Exhausted BatchFailed Quarantined
            Committed CommitUnknown
            Journaled JournalFailed
        ] => None,
    }
}

fn joined(event: Event) -> Option<Step> {
    match event {
        Event::OwnerApplied(Body::Same) => Some(acked()),
        Event::OwnerApplied(Body::Other) => Some(dead(DeadReason::IdConflict)),
        Event::OwnerGaveUp => Some((State::Claiming, &[Action::Claim])),
        Event::Stopping => Some(requeued()),
        never![
            LeaseWon LeaseHeld LeaseLost
            Identified Collided Unusable
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone LookAgain
            Inserted Found Succeeded Failed Exhausted BatchFailed Quarantined
            Committed CommitUnknown
            Journaled JournalFailed
        ] => None,
    }
}

fn claiming(event: Event) -> Option<Step> {
    match event {
        Event::ClaimWon | Event::ClaimUnavailable => Some((State::Recording, &[Action::Record])),
        Event::ClaimHeld => Some((State::Parked, &[Action::Park])),
        Event::MarkedDone => Some(acked()),
        Event::Stopping => Some(released()),
        never![
            LeaseWon LeaseHeld LeaseLost
            Identified Collided Unusable
            LookAgain
            OwnerApplied OwnerGaveUp
            Inserted Found Succeeded Failed Exhausted BatchFailed Quarantined
            Committed CommitUnknown
            Journaled JournalFailed
        ] => None,
    }
}

fn parked(event: Event) -> Option<Step> {
    match event {
        Event::LookAgain => Some((State::Claiming, &[Action::Claim])),
        // Only a committed row is looked for here: the claim is not ours, so
        // there is nothing to give back.
        Event::Found(Body::Same) => Some(acked()),
        Event::Found(Body::Other) => Some(dead(DeadReason::IdConflict)),
        Event::Stopping => Some(requeued()),
        never![
            LeaseWon LeaseHeld LeaseLost
            Identified Collided Unusable
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone
            OwnerApplied OwnerGaveUp
            Inserted Succeeded Failed Exhausted BatchFailed Quarantined
            Committed CommitUnknown
            Journaled JournalFailed
        ] => None,
    }
}

fn recording(event: Event) -> Option<Step> {
    match event {
        Event::Inserted => Some((State::Recorded, &[Action::Apply])),
        Event::Found(Body::Same) => Some(marked()),
        Event::Found(Body::Other) => Some(dead(DeadReason::IdConflict)),
        Event::Failed(Class::Permanent) => Some(refused()),
        // The handler has not run: what may pass is waited for. That a claim's
        // COMMIT went unanswered is no more: it is asked for again.
        Event::Failed(Class::Transient | Class::Systemic) | Event::BatchFailed => Some(again()),
        Event::LeaseWon => Some((State::Leased, &[Action::Call])),
        Event::LeaseHeld => Some((State::Parked, &[Action::Release, Action::Park])),
        Event::Quarantined => Some(dead(DeadReason::CrashLoop)),
        Event::Stopping => Some(released()),
        never![
            LeaseLost
            Identified Collided Unusable
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone LookAgain
            OwnerApplied OwnerGaveUp
            Succeeded Exhausted
            Committed CommitUnknown
            Journaled JournalFailed
        ] => None,
    }
}

fn recorded(event: Event) -> Option<Step> {
    match event {
        Event::Succeeded => Some((State::Applied, &[Action::Commit])),
        Event::Failed(Class::Permanent) => Some(refused()),
        Event::Failed(Class::Transient) => Some(deferred()),
        Event::Exhausted => Some(used_up()),
        Event::Failed(Class::Systemic) | Event::BatchFailed => Some(again()),
        never![
            LeaseWon LeaseHeld LeaseLost
            Identified Collided Unusable
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone LookAgain
            OwnerApplied OwnerGaveUp
            Inserted Found Quarantined
            Committed CommitUnknown
            Journaled JournalFailed
            Stopping
        ] => None,
    }
}

fn applied(event: Event) -> Option<Step> {
    match event {
        // The mark and the ack follow the reply to COMMIT. Were either sent
        // earlier, a crash in between would lose the message.
        Event::Committed => Some(marked()),
        // Nothing is rolled back: COMMIT is out of our hands.
        Event::CommitUnknown => Some((State::InDoubt, &[Action::Record])),
        Event::Failed(Class::Permanent) => Some(refused()),
        Event::Failed(Class::Transient) => Some(deferred()),
        Event::Exhausted => Some(used_up()),
        Event::Failed(Class::Systemic) | Event::BatchFailed => Some(again()),
        never![
            LeaseWon LeaseHeld LeaseLost
            Identified Collided Unusable
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone LookAgain
            OwnerApplied OwnerGaveUp
            Inserted Found Succeeded Quarantined
            Journaled JournalFailed
            Stopping
        ] => None,
    }
}

fn in_doubt(event: Event) -> Option<Step> {
    match event {
        // The insert waits for the old transaction if that is still open. So a
        // new row proves that the old one was rolled back.
        Event::Inserted => Some((State::Recorded, &[Action::Apply])),
        Event::Found(Body::Same) => Some(marked()),
        Event::Found(Body::Other) => Some(dead(DeadReason::IdConflict)),
        // The ledger has not answered, whatever the class: rejected now, the
        // message could be applied and dead-lettered both.
        Event::Failed(Class::Permanent | Class::Transient | Class::Systemic)
        | Event::BatchFailed => Some((State::InDoubt, &[Action::Rollback, Action::Record])),
        Event::Stopping => Some(released()),
        never![
            LeaseWon LeaseHeld LeaseLost
            Identified Collided Unusable
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone LookAgain
            OwnerApplied OwnerGaveUp
            Succeeded Exhausted Quarantined
            Committed CommitUnknown
            Journaled JournalFailed
        ] => None,
    }
}

fn leased(event: Event) -> Option<Step> {
    match event {
        Event::Succeeded => Some((State::Called, &[Action::Complete])),
        Event::Failed(Class::Permanent) => Some((
            State::Journaling(DeadReason::Rejected),
            &[Action::Journal(DeadReason::Rejected)],
        )),
        Event::Failed(Class::Transient) => Some((State::Deferring, &[Action::JournalAttempt])),
        Event::Exhausted => Some((
            State::Journaling(DeadReason::MaxAttempts),
            &[Action::Journal(DeadReason::MaxAttempts)],
        )),
        Event::Failed(Class::Systemic) => Some((State::Leased, &[Action::Call])),
        // Somebody else may be at it: what our handler says does not count.
        Event::LeaseLost => Some((State::Recording, &[Action::Record])),
        Event::Stopping => Some(released()),
        never![
            LeaseWon LeaseHeld
            Identified Collided Unusable
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone LookAgain
            OwnerApplied OwnerGaveUp
            Inserted Found BatchFailed Quarantined
            Committed CommitUnknown
            Journaled JournalFailed
        ] => None,
    }
}

fn called(event: Event) -> Option<Step> {
    match event {
        // The mark and the ack follow the reply to COMMIT.
        Event::Committed | Event::Found(Body::Same) => Some(marked()),
        Event::Found(Body::Other) => Some(dead(DeadReason::IdConflict)),
        // The effect has happened, so nothing else can come of the message:
        // the ledger is told until it answers.
        Event::CommitUnknown
        | Event::Failed(Class::Permanent | Class::Transient | Class::Systemic) => {
            Some((State::Called, &[Action::Complete]))
        }
        // The ledger has neither our claim nor a row.
        Event::LeaseLost => Some((State::Recording, &[Action::Record])),
        // The claim stays: whoever gets the message runs it again, and that
        // must not be before the lease ends.
        Event::Stopping => Some((
            State::Settled(Settlement::Requeue),
            &[Action::Release, Action::Settle(Settlement::Requeue)],
        )),
        never![
            LeaseWon LeaseHeld
            Identified Collided Unusable
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone LookAgain
            OwnerApplied OwnerGaveUp
            Inserted Succeeded Exhausted BatchFailed Quarantined
            Journaled JournalFailed
        ] => None,
    }
}

fn journaling(reason: DeadReason, event: Event) -> Option<Step> {
    match event {
        Event::Journaled => Some((
            State::Settled(Settlement::Reject),
            &[Action::Release, Action::Settle(Settlement::Reject)],
        )),
        Event::JournalFailed => Some(dead(reason)),
        // A failed attempt counts only for who has the claim.
        Event::LeaseLost if matches!(reason, DeadReason::Rejected | DeadReason::MaxAttempts) => {
            Some((State::Recording, &[Action::Record]))
        }
        Event::LeaseLost => None,
        Event::Stopping => Some(released()),
        never![
            LeaseWon LeaseHeld
            Identified Collided Unusable
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone LookAgain
            OwnerApplied OwnerGaveUp
            Inserted Found Succeeded Failed Exhausted BatchFailed Quarantined
            Committed CommitUnknown
        ] => None,
    }
}

fn deferring(event: Event) -> Option<Step> {
    match event {
        // The claim is given back first: whoever gets the copy must not wait
        // for a lease.
        Event::Journaled => Some((
            State::Settled(Settlement::Retry),
            &[Action::Release, Action::Settle(Settlement::Retry)],
        )),
        Event::JournalFailed => Some((State::Deferring, &[Action::JournalAttempt])),
        Event::LeaseLost => Some((State::Recording, &[Action::Record])),
        Event::Stopping => Some(released()),
        never![
            LeaseWon LeaseHeld
            Identified Collided Unusable
            ClaimWon ClaimHeld ClaimUnavailable MarkedDone LookAgain
            OwnerApplied OwnerGaveUp
            Inserted Found Succeeded Failed Exhausted BatchFailed Quarantined
            Committed CommitUnknown
        ] => None,
    }
}

/// A duplicate: Redis has its mark already, or its owner writes it.
fn acked() -> Step {
    (
        State::Settled(Settlement::Ack),
        &[Action::Settle(Settlement::Ack)],
    )
}

/// The ledger has it, committed: Redis may know.
fn marked() -> Step {
    (
        State::Settled(Settlement::Ack),
        &[Action::MarkDone, Action::Settle(Settlement::Ack)],
    )
}

/// Given back to the queue, with no claim to give back.
fn requeued() -> Step {
    (
        State::Settled(Settlement::Requeue),
        &[Action::Settle(Settlement::Requeue)],
    )
}

/// Given back to the queue, and the claims to whoever asks next.
fn released() -> Step {
    (
        State::Settled(Settlement::Requeue),
        &[
            Action::Release,
            Action::Surrender,
            Action::Settle(Settlement::Requeue),
        ],
    )
}

fn again() -> Step {
    (State::Recording, &[Action::Rollback, Action::Record])
}

fn refused() -> Step {
    (
        State::Journaling(DeadReason::Rejected),
        &[Action::Rollback, Action::Journal(DeadReason::Rejected)],
    )
}

fn used_up() -> Step {
    (
        State::Journaling(DeadReason::MaxAttempts),
        &[Action::Rollback, Action::Journal(DeadReason::MaxAttempts)],
    )
}

fn deferred() -> Step {
    (
        State::Deferring,
        &[Action::Rollback, Action::JournalAttempt],
    )
}

fn dead(reason: DeadReason) -> Step {
    let actions: &'static [Action] = match reason {
        DeadReason::Rejected => &[Action::Journal(DeadReason::Rejected)],
        DeadReason::MaxAttempts => &[Action::Journal(DeadReason::MaxAttempts)],
        DeadReason::CrashLoop => &[Action::Journal(DeadReason::CrashLoop)],
        DeadReason::MissingId => &[Action::Journal(DeadReason::MissingId)],
        DeadReason::IdConflict => &[Action::Journal(DeadReason::IdConflict)],
        DeadReason::TooLarge => &[Action::Journal(DeadReason::TooLarge)],
        DeadReason::BadHeader => &[Action::Journal(DeadReason::BadHeader)],
    };
    (State::Journaling(reason), actions)
}

#[cfg(test)]
mod tests;
