//! The sending half of a replay: publishes letters, at the rate that is kept,
//! and acknowledges each when the broker has confirmed it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::engine::{Engine, PURPOSE, no_desk};
use super::way::HINT;
use super::{Action, Cut, Hindrance};
use crate::broker::desk::Ticket;
use crate::broker::publisher::{Fate, Limits, PublishError, Publisher};
use crate::dead_letter::letter::Letter;
use crate::dead_letter::lookout::Judged;
use crate::dead_letter::republish::{self, Origin, Outbound, Stamp};
use crate::failpoint::{self, Step};

/// What may be unconfirmed, and how long the broker may block one message.
const LIMITS: Limits = Limits {
    messages: 256,
    bytes: 4 << 20,
    wait: Duration::from_secs(30),
};

/// Bodies of this size go alone: should the broker refuse one, and close the
/// channel over it, it is known which.
const ALONE_BYTES: usize = 256 * 1024;

/// Longest wait for confirms before something else is looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long a replay waits for the confirms that are out when it has to know
/// before it goes on; and when it ends before its end.
const CONFIRMS_WITHIN: Duration = Duration::from_secs(30);
const LAST_CONFIRMS_WITHIN: Duration = Duration::from_secs(5);

/// Exchanges that are remembered to be there or not.
const EXCHANGES_MAX: usize = 1_000;

/// A letter that was published and has no fate yet.
pub(super) struct Out {
    ticket: Ticket,
    /// As it is known among those that are held.
    alike: u64,
    judged: Judged,
    /// Whereto, for humans.
    route: String,
}

impl Engine<'_> {
    pub(super) fn publish(
        &mut self,
        letter: Letter,
        ticket: Ticket,
        judged: Judged,
    ) -> Result<(), Cut> {
        let outbound = self.outbound(&letter)?;
        let route = route_text(&outbound);
        // The first one to an exchange goes alone too: it may be denied.
        let first = !self.exchanges.contains_key(&outbound.exchange);
        let alone = first || letter.size() >= ALONE_BYTES;
        if alone {
            self.drain()?;
        }
        self.wait_for_turn()?;
        if !self.has_exchange(&outbound.exchange)? {
            let why = format!("there is no exchange {}{HINT}", outbound.exchange);
            self.hinder(&judged, Hindrance::Unroutable, why);
            return Ok(());
        }
        let to = (outbound.exchange.as_str(), outbound.routing_key.as_str());
        let body = &letter.message.body;
        let publisher = self.publisher()?;
        match publisher.publish_whole(to, body, &outbound.properties) {
            Ok(seq) => {
                self.pace.sent(Instant::now());
                let out = Out {
                    alike: self.likeness_of(&letter),
                    ticket,
                    judged,
                    route,
                };
                self.out.insert(seq, out);
                failpoint::hit(Step::ReplaySent);
            }
            Err(PublishError::Unfit(unfit)) => {
                self.hinder(&judged, Hindrance::Unfit, unfit.to_string());
            }
            Err(PublishError::Lost { cause, .. }) if publisher.was_denied() => {
                return Err(Cut::Denied { cause });
            }
            Err(error @ (PublishError::NoRoom { .. } | PublishError::Lost { .. })) => {
                return Err(error.into());
            }
        }
        match alone {
            true => self.drain(),
            false => self.settle(Duration::ZERO),
        }
    }

    fn outbound(&mut self, letter: &Letter) -> Result<Outbound, Cut> {
        let user = self.publisher()?.user().to_owned();
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let stamp = Stamp {
            run: &self.run,
            at: now.map_or(0, |now| now.as_secs().cast_signed()),
            user: &user,
        };
        let (exchange, routing_key) = letter.origin();
        let origin = Origin {
            exchange,
            routing_key,
        };
        let to = &self.order.destination;
        let mut outbound = republish::outbound(&letter.properties, origin, to, self.queue, stamp);
        self.signer
            .sign(&mut outbound.properties, &letter.message.body);
        Ok(outbound)
    }

    fn publisher(&mut self) -> Result<&mut Publisher, Cut> {
        if self.publisher.is_none() {
            let purpose = format!("{} {PURPOSE} publisher", self.queue);
            let publisher = Publisher::open(&self.config.broker, &purpose, LIMITS)?;
            self.publisher = Some(publisher);
        }
        match &mut self.publisher {
            Some(publisher) => Ok(publisher),
            None => Err(no_desk()),
        }
    }

    fn has_exchange(&mut self, name: &str) -> Result<bool, Cut> {
        if let Some(known) = self.exchanges.get(name) {
            return Ok(*known);
        }
        let there = self.publisher()?.has_exchange(name)?;
        if self.exchanges.len() >= EXCHANGES_MAX {
            self.exchanges.clear();
        }
        self.exchanges.insert(name.to_owned(), there);
        Ok(there)
    }

    /// Waits until nothing is unconfirmed.
    pub(super) fn drain(&mut self) -> Result<(), Cut> {
        let deadline = Instant::now() + CONFIRMS_WITHIN;
        while !self.out.is_empty() {
            if self.stop.is_set() {
                return Err(Cut::Stopped);
            }
            if Instant::now() >= deadline {
                let within = CONFIRMS_WITHIN;
                return Err(Cut::Unconfirmed { within });
            }
            self.settle(LOOK_EVERY)?;
        }
        Ok(())
    }

    /// As [`Self::drain`], for the end: a moment, and whatever comes of it.
    pub(super) fn drain_shortly(&mut self) -> Result<(), Cut> {
        let deadline = Instant::now() + LAST_CONFIRMS_WITHIN;
        while !self.out.is_empty() && Instant::now() < deadline {
            self.settle(LOOK_EVERY)?;
        }
        Ok(())
    }

    /// Takes in what the broker says of what was published, waiting `within`
    /// for the first of it.
    pub(super) fn settle(&mut self, within: Duration) -> Result<(), Cut> {
        let Some(publisher) = &mut self.publisher else {
            return Ok(());
        };
        let fates = publisher.wait(within);
        let lost = publisher.lost().map(str::to_owned);
        // Over one that is alone it is known which it was.
        let alone = self.out.len() == 1;
        let refused = publisher.refused() && alone;
        let denied = publisher.was_denied();
        let mut result = Ok(());
        for (seq, fate) in fates {
            let Some(out) = self.out.remove(&seq) else {
                continue;
            };
            self.pace.settled(Instant::now());
            let settled = match (fate, &lost) {
                (Fate::Unknown, Some(cause)) if refused => {
                    let cause = cause.clone();
                    self.hinder(&out.judged, Hindrance::Unfit, cause);
                    Ok(())
                }
                // It went nowhere.
                (Fate::Unknown, Some(_)) if denied && alone => Ok(()),
                (fate, _) => self.settle_one(out, &fate),
            };
            // The others have their fates all the same.
            result = result.and(settled);
        }
        if let Some(cause) = lost {
            self.publisher = None;
            result = result.and(match (refused, denied) {
                (true, _) => Ok(()),
                (_, true) => Err(Cut::Denied { cause }),
                _ => Err(Cut::Lost { cause }),
            });
        }
        result
    }

    fn settle_one(&mut self, out: Out, fate: &Fate) -> Result<(), Cut> {
        match fate {
            Fate::Confirmed => {
                failpoint::hit(Step::ReplayConfirmed);
                if let Err(cut) = self.ack(out.ticket, out.alike) {
                    self.report.unconfirmed += 1;
                    return Err(cut);
                }
                failpoint::hit(Step::ReplayAcked);
                self.report.replayed += 1;
                self.fates.watch(&out.judged);
                self.line(&out.judged, Action::Replayed, None, out.route);
            }
            Fate::Returned { text, .. } => {
                let why = format!("no queue takes what is sent to {}: {text}{HINT}", out.route);
                self.hinder(&out.judged, Hindrance::Unroutable, why);
            }
            Fate::Nacked => {
                let why = format!("refused by the queue behind {}: is it full?", out.route);
                self.hinder(&out.judged, Hindrance::Refused, why);
            }
            Fate::Unknown => self.report.unconfirmed += 1,
        }
        Ok(())
    }
}

fn route_text(outbound: &Outbound) -> String {
    match outbound.exchange.as_str() {
        "" => format!("queue {}", outbound.routing_key),
        exchange => format!(
            "exchange {exchange}, routing key {:?}",
            outbound.routing_key
        ),
    }
}
