//! One delivery and where it stands.

use std::time::{Duration, Instant};

use super::leases::Lease;
use crate::claim::Token;
use crate::config::checked;
use crate::failure::{Class, Failure};
use crate::identity;
use crate::ledger::{Applied, Owner};
use crate::lifecycle::{self, Action, Body, Event, State};
use crate::message::{DeadReason, Delivery, Epoch, Fingerprint, MessageId, Settlement};

/// One delivery on its way.
#[derive(Debug)]
pub struct Item {
    pub(super) delivery: Delivery,
    /// When it came.
    pub(super) since: Instant,
    /// It was found applied.
    pub(super) is_duplicate: bool,
    /// `None` when it has no usable id.
    pub(super) id: Option<MessageId>,
    /// Whether others that come with its id join it.
    pub(super) owner: bool,
    pub(super) fingerprint: Fingerprint,
    /// How old its ledger row was when it was found there.
    row_age: Duration,
    pub(super) state: State,
    /// The attempt at hand counts, if it fails.
    pub(super) counted: bool,
    pub(super) token: Option<Token>,
    pub(super) failure: Option<Failure>,
    /// Why it is dead-lettered.
    pub(super) reason: Option<DeadReason>,
    /// Whose its claim in the ledger is, or was to be; of a keyed handler.
    pub(super) fence: Option<Owner>,
    /// That claim, where it is known to be made.
    pub(super) lease: Option<Lease>,
    /// Which thread of the crew called the handler.
    pub(super) worker: Option<usize>,
    /// What had succeeded in the consumer when it was last sent to the crew.
    pub(super) sent_at: u64,
    /// How long the handler took the last time.
    pub(super) duration: Option<Duration>,
    /// Races its transaction has lost.
    pub(super) races: u32,
    /// What had succeeded in the consumer when the world last failed it.
    pub(super) failed_at: Option<u64>,
    /// How often the world has failed it alone.
    pub(super) strikes: u32,
    /// A COMMIT that may have recorded it went unanswered.
    pub(super) in_doubt: bool,
    /// It was looked at the moment it was parked.
    pub(super) was_parked: bool,
    /// The ledger was asked for a mark on it.
    pub(super) examined: bool,
    /// It may kill its worker: it is run alone.
    pub(super) alone: bool,
    /// The ledger has our mark on it.
    pub(super) marked: bool,
}

impl Item {
    pub(super) fn new(delivery: Delivery) -> Self {
        Self {
            fingerprint: identity::fingerprint(&delivery.message.body),
            delivery,
            since: Instant::now(),
            is_duplicate: false,
            id: None,
            owner: false,
            row_age: Duration::ZERO,
            state: State::Received,
            counted: true,
            token: None,
            failure: None,
            reason: None,
            fence: None,
            lease: None,
            worker: None,
            sent_at: 0,
            duration: None,
            races: 0,
            failed_at: None,
            strikes: 0,
            in_doubt: false,
            was_parked: false,
            examined: false,
            alone: false,
            marked: false,
        }
    }

    /// Moves on, and says what is to be done. A defect of this file, an event
    /// that cannot happen, gives the delivery back: it is never acked.
    pub(super) fn on(&mut self, event: Event) -> &'static [Action] {
        match event {
            Event::CommitUnknown => self.in_doubt = true,
            // Nothing was recorded by then.
            Event::Inserted | Event::LeaseWon => self.in_doubt = false,
            _ => {}
        }
        match lifecycle::step(self.state, event) {
            Ok((state, actions)) => {
                self.state = state;
                actions
            }
            Err(illegal) => {
                log::error!("gave a delivery back: {illegal}");
                self.state = State::Settled(Settlement::Requeue);
                &[
                    Action::Release,
                    Action::Surrender,
                    Action::Settle(Settlement::Requeue),
                ]
            }
        }
    }

    /// Ends the renewal of its claim in the ledger, which is not ours any more.
    pub(super) fn forget_lease(&mut self) {
        self.fence = None;
        self.lease = None;
    }

    /// Which attempt this is, from 1.
    pub(super) fn attempt(&self) -> u32 {
        self.delivery.message.attempts.saturating_add(1)
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.delivery.ticket.epoch
    }

    /// How its body compares with that of its ledger row.
    pub(super) fn found(&mut self, row: Applied) -> Body {
        self.row_age = row.age;
        self.compare(row.fingerprint)
    }

    /// How old its ledger row is, at the most.
    pub(super) fn age(&self) -> Duration {
        self.row_age + self.since.elapsed()
    }

    pub(super) fn compare(&self, fingerprint: Fingerprint) -> Body {
        if self.fingerprint == fingerprint {
            Body::Same
        } else {
            Body::Other
        }
    }

    pub(super) fn failure(&self) -> Failure {
        self.failure.clone().unwrap_or(Failure {
            class: Class::Permanent,
            code: None,
            text: "another message with this id and another body is in the ledger".to_owned(),
            retry_after: None,
        })
    }
}

/// The id by which a delivery can be worked on; or why it cannot be, for
/// journal and humans.
pub(super) fn usable_id(
    item: &Item,
    consumer: &checked::Consumer,
) -> Result<MessageId, (DeadReason, String)> {
    let message = &item.delivery.message;
    if message.body.len() > consumer.max_body {
        let text = format!(
            "the body has {} bytes, max_body allows {}",
            message.body.len(),
            consumer.max_body
        );
        return Err((DeadReason::TooLarge, text));
    }
    identity::identify(message, &consumer.identity).map_err(|reason| {
        let text = match reason {
            DeadReason::BadHeader => "its id stands in bytes that are not valid AMQP",
            _ => "it has no usable id where `identity` looks for one",
        };
        (reason, text.to_owned())
    })
}
