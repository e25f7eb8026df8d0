//! The replay itself: takes letters, looks them up, publishes, waits for the
//! confirm, acknowledges.

use std::collections::{HashMap, VecDeque};
use std::hash::RandomState;
use std::time::{Duration, Instant};

use super::fates::Fates;
use super::force::Forgot;
use super::hold::take_one;
use super::sending::Out;
use super::way::Way;
use super::{Action, Cut, Event, Hindrance, Line, Order, Report};
use crate::broker::desk::Ticket;
use crate::broker::publisher::{Publisher, Seq};
use crate::broker::signed::Signer;
use crate::config::checked::Config;
use crate::dead_letter::desk::Desk;
use crate::dead_letter::filter::Filter;
use crate::dead_letter::letter::Letter;
use crate::dead_letter::lookout::{Judged, Lookout};
use crate::dead_letter::pace::Pace;
use crate::failpoint::{self, Step};
use crate::ledger::desk::{ActionId, Key};
use crate::message::{MessageId, hex};
use crate::stop::Stop;

/// Letters that are looked up at once.
const LOOKED_UP: u64 = 256;

/// How long a goodbye may take.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// What is shown on RabbitMQ's management pages.
pub(super) const PURPOSE: &str = "replay";

/// A replay under way.
pub(super) struct Engine<'a> {
    pub(super) order: &'a Order,
    pub(super) config: &'a Config,
    pub(super) filter: &'a Filter,
    pub(super) queue: &'a str,
    pub(super) stop: &'a Stop,
    pub(super) tell: &'a mut dyn FnMut(Event<'_>),
    /// `None` only while it is opened anew.
    pub(super) desk: Option<Desk<'a>>,
    pub(super) lookout: Lookout<'a>,
    pub(super) action: ActionId,
    pub(super) run: String,
    pub(super) signer: Signer,
    pub(super) publisher: Option<Publisher>,
    pub(super) pace: Pace,
    /// Letters that were taken and not looked up.
    pub(super) pending: VecDeque<(Letter, Ticket)>,
    pub(super) out: HashMap<Seq, Out>,
    pub(super) exchanges: HashMap<String, bool>,
    /// Letters of the frozen depth that were not read yet.
    pub(super) unread: u64,
    /// A letter was dealt with for the first time, or was not asked for, since
    /// the queue was opened anew.
    pub(super) fresh: bool,
    /// Letters that were read and are still in the queue, by what is alike in
    /// them, with how many are; and those of them that come once more, since
    /// the queue was opened anew.
    pub(super) held: HashMap<u64, u32>,
    pub(super) again: HashMap<u64, u32>,
    pub(super) likeness: RandomState,
    pub(super) fates: Fates,
    pub(super) report: Report,
}

/// What a replay needs.
pub struct Tools<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The open desk, with nothing taken from it.
    pub desk: Desk<'a>,
    /// Looks up where letters stand.
    pub lookout: Lookout<'a>,
    /// The action, written down.
    pub action: ActionId,
    /// Which letters.
    pub filter: &'a Filter,
    /// The consumer's work queue.
    pub queue: &'a str,
    /// Ends it before its end.
    pub stop: &'a Stop,
}

/// Replays what `order` asks for, and gives the rest back. `run` is random, and
/// tells this replay from every other. Always with a report; and with what
/// ended it before its end.
pub fn run<'a>(
    order: &'a Order,
    tools: Tools<'a>,
    run: String,
    tell: &'a mut dyn FnMut(Event<'_>),
) -> (Report, Option<Cut>) {
    let report = Report {
        depth: tools.desk.depth(),
        ..Report::default()
    };
    let signer = tools.desk.signer().clone();
    let mut engine = Engine {
        order,
        config: tools.config,
        filter: tools.filter,
        queue: tools.queue,
        stop: tools.stop,
        tell,
        desk: Some(tools.desk),
        lookout: tools.lookout,
        action: tools.action,
        run,
        signer,
        publisher: None,
        pace: Pace::new(order.rate, Instant::now()),
        pending: VecDeque::new(),
        out: HashMap::new(),
        exchanges: HashMap::new(),
        unread: report.depth,
        fresh: false,
        held: HashMap::new(),
        again: HashMap::new(),
        likeness: RandomState::new(),
        fates: Fates::new(order.canary),
        report,
    };
    let result = engine.go();
    engine.end(result)
}

impl<'a> Engine<'a> {
    fn go(&mut self) -> Result<(), Cut> {
        self.begin_watching()?;
        while let Some(slice) = self.next_slice()? {
            failpoint::hit(Step::ReplayTaken);
            let letters: Vec<&Letter> = slice.iter().map(|(letter, _)| letter).collect();
            let (lookout, desk) = (&mut self.lookout, &mut self.desk);
            let desk = desk.as_mut().ok_or_else(no_desk)?;
            let judged = lookout.judge(desk.session(), &letters)?;
            self.note(&letters, &judged)?;
            for ((letter, ticket), judged) in slice.into_iter().zip(judged) {
                self.deal(letter, ticket, judged)?;
            }
            if self.fates.is_due(self.published()) {
                self.weigh()?;
            }
        }
        self.drain()?;
        self.weigh_the_rest()
    }

    pub(super) fn desk(&mut self) -> Result<&mut Desk<'a>, Cut> {
        self.desk.as_mut().ok_or_else(no_desk)
    }

    /// Letters that were published, as far as nothing else is known.
    fn published(&self) -> u64 {
        self.report.replayed + self.out.len() as u64
    }

    /// The letters that are looked up next; `None` when there are no more.
    fn next_slice(&mut self) -> Result<Option<Vec<(Letter, Ticket)>>, Cut> {
        if self.stop.is_set() {
            return Err(Cut::Stopped);
        }
        let mut most = self
            .pace
            .chunk(LOOKED_UP)
            .min(self.fates.room(self.published()));
        if let Some(limit) = self.order.limit {
            most = most.min(limit.saturating_sub(self.published()));
        }
        if self.order.force {
            // What one did, the next one's look-up has to see.
            most = most.min(1);
        }
        if most == 0 || !self.hold_some()? {
            return Ok(None);
        }
        self.fresh = true;
        let most = usize::try_from(most)
            .unwrap_or(usize::MAX)
            .min(self.pending.len());
        Ok(Some(self.pending.drain(..most).collect()))
    }

    /// Writes down which letters are about to be published or acknowledged.
    fn note(&mut self, letters: &[&Letter], judged: &[Judged]) -> Result<(), Cut> {
        let topology = self.desk()?.topology();
        let acted = letters.iter().zip(judged).filter(|(letter, judged)| {
            match self.order.way_of(judged.verdict.standing) {
                Way::Acknowledge => true,
                Way::Replay => self.order.bar(letter, topology).is_none(),
                // Written down when it is forgotten.
                Way::Reprocess | Way::Leave => false,
            }
        });
        let keys: Vec<Key<'_>> = acted.map(|(letter, _)| letter.key()).collect();
        if keys.is_empty() {
            return Ok(());
        }
        let action = self.action;
        Ok(self.desk()?.note(action, &keys)?)
    }

    fn deal(&mut self, letter: Letter, ticket: Ticket, judged: Judged) -> Result<(), Cut> {
        if self.stop.is_set() {
            return Err(Cut::Stopped);
        }
        let way = self.order.way_of(judged.verdict.standing);
        let topology = self.desk()?.topology();
        if way.publishes()
            && let Some(why) = self.order.bar(&letter, topology)
        {
            self.hinder(&judged, Hindrance::NoOrigin, why);
            return Ok(());
        }
        match way {
            Way::Leave => {
                self.leave(&judged);
                Ok(())
            }
            Way::Acknowledge => self.acknowledge(&letter, ticket, &judged, "it was applied before"),
            Way::Replay => self.publish(letter, ticket, judged),
            Way::Reprocess => match self.forget(&letter, &judged)? {
                Forgot::Yes => self.publish(letter, ticket, judged),
                Forgot::AtWork => Ok(()),
                Forgot::AppliedSince => {
                    let why = "it was forced before, and applied since";
                    self.acknowledge(&letter, ticket, &judged, why)
                }
            },
        }
    }

    pub(super) fn leave(&mut self, judged: &Judged) {
        *self.report.left.entry(judged.verdict.standing).or_default() += 1;
        self.line(judged, Action::Left, None, judged.verdict.why.clone());
    }

    fn acknowledge(
        &mut self,
        letter: &Letter,
        ticket: Ticket,
        judged: &Judged,
        why: &str,
    ) -> Result<(), Cut> {
        self.ack(ticket, self.likeness_of(letter))?;
        self.report.acknowledged += 1;
        self.line(judged, Action::Acknowledged, None, why.to_owned());
        Ok(())
    }

    pub(super) fn hinder(&mut self, judged: &Judged, hindrance: Hindrance, why: String) {
        *self.report.hindered.entry(hindrance).or_default() += 1;
        let id = judged.id.as_ref().map(MessageId::as_str);
        let letter = (id, judged.fingerprint);
        let action = self.action;
        let noted = self.desk().map(|desk| desk.note_left(action, letter));
        // `why` says then that it is not known where it is.
        if !matches!(noted, Ok(Ok(()))) {
            log::debug!("failed to write down that a dead letter stayed");
        }
        self.line(judged, Action::Left, Some(hindrance), why);
    }

    pub(super) fn line(
        &mut self,
        judged: &Judged,
        action: Action,
        hindrance: Option<Hindrance>,
        why: String,
    ) {
        let line = Line {
            id: judged.id.as_ref().map(ToString::to_string),
            fingerprint: hex(&judged.fingerprint.0),
            standing: judged.verdict.standing,
            action,
            hindrance,
            why,
        };
        (self.tell)(Event::Letter(&line));
    }

    pub(super) fn ack(&mut self, ticket: Ticket, alike: u64) -> Result<(), Cut> {
        self.desk()?.ack(ticket)?;
        take_one(&mut self.held, alike);
        Ok(())
    }

    /// Takes in what is still to come, gives back what is left, and says what
    /// came of it all.
    fn end(mut self, result: Result<(), Cut>) -> (Report, Option<Cut>) {
        let mut cut = result.err();
        if let Err(error) = self.drain_shortly() {
            cut = cut.or(Some(error));
        }
        if let Some(publisher) = self.publisher.take() {
            self.report.unconfirmed += self.out.len() as u64;
            publisher.close(CLOSE_WITHIN);
        }
        self.pending.clear();
        self.out.clear();
        if let Some(mut desk) = self.desk.take() {
            let written = desk.end(self.action);
            let given = desk.give_back();
            if let Err(trouble) = given.and(written) {
                cut = cut.or(Some(trouble.into()));
            }
        }
        self.report.canary = self.fates.outcome();
        self.report.cut_short = cut.as_ref().map(ToString::to_string);
        (self.report, cut)
    }
}

pub(super) fn no_desk() -> Cut {
    Cut::Lost {
        cause: "the dead-letter queue is closed".to_owned(),
    }
}
