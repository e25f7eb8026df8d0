//! The replay itself: takes letters, looks them up, publishes, waits for the
//! confirm, acknowledges.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::fates::Fates;
use super::{Action, Cut, Event, Hindrance, Line, Order, Report};
use crate::broker::desk::Ticket;
use crate::broker::publisher::{Fate, Limits, PublishError, Publisher, Seq};
use crate::config::checked::Config;
use crate::dead_letter::desk::Desk;
use crate::dead_letter::filter::Filter;
use crate::dead_letter::letter::Letter;
use crate::dead_letter::lookout::{Judged, Lookout};
use crate::dead_letter::pace::Pace;
use crate::dead_letter::plan::Standing;
use crate::dead_letter::republish::{self, Destination, Origin, Outbound, Stamp};
use crate::failpoint::{self, Step};
use crate::ledger::desk::{ActionId, Key};
use crate::message::{REPLAY_HEADER, hex};
use crate::stop::Stop;

/// What may be unconfirmed, and how long the broker may block one message.
const LIMITS: Limits = Limits {
    messages: 256,
    bytes: 4 << 20,
    wait: Duration::from_secs(30),
};

/// Letters that are looked up at once.
const LOOKED_UP: u64 = 256;

/// Bodies of this size go alone: should the broker refuse one, and close the
/// channel over it, it is known which.
const ALONE_BYTES: usize = 256 * 1024;

/// Longest wait for confirms before something else is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long a replay waits for the confirms that are out, when it ends or has
/// to know before it goes on.
const CONFIRMS_WITHIN: Duration = Duration::from_secs(30);

/// How long a goodbye may take.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// Exchanges that are remembered to be there or not.
const EXCHANGES_MAX: usize = 1_000;

/// What is shown on RabbitMQ's management pages.
pub(super) const PURPOSE: &str = "replay";

/// A letter that was published and has no fate yet.
struct Out {
    ticket: Ticket,
    /// As it is known among those that are held.
    alike: u64,
    judged: Judged,
    /// Whereto, for humans.
    route: String,
}

/// A replay under way.
pub(super) struct Engine<'a> {
    pub(super) order: &'a Order,
    config: &'a Config,
    filter: &'a Filter,
    queue: &'a str,
    pub(super) stop: &'a Stop,
    pub(super) tell: &'a mut dyn FnMut(Event<'_>),
    /// `None` only while it is opened anew.
    desk: Option<Desk<'a>>,
    pub(super) lookout: Lookout<'a>,
    pub(super) action: ActionId,
    run: String,
    publisher: Option<Publisher>,
    pace: Pace,
    /// Letters that were taken and not looked up.
    pending: VecDeque<(Letter, Ticket)>,
    out: HashMap<Seq, Out>,
    exchanges: HashMap<String, bool>,
    /// Letters of the frozen depth that were not read yet.
    unread: u64,
    /// Letters that were read and are still in the queue, by what is alike in
    /// them, with how many are; and those of them that come once more, since
    /// the queue was opened anew.
    held: HashMap<u64, u32>,
    again: HashMap<u64, u32>,
    likeness: RandomState,
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
        publisher: None,
        pace: Pace::new(order.rate, Instant::now()),
        pending: VecDeque::new(),
        out: HashMap::new(),
        exchanges: HashMap::new(),
        unread: report.depth,
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
        if most == 0 || !self.refill()? {
            return Ok(None);
        }
        let most = usize::try_from(most)
            .unwrap_or(usize::MAX)
            .min(self.pending.len());
        Ok(Some(self.pending.drain(..most).collect()))
    }

    /// Takes letters until there is one that is asked for. False when there is
    /// none.
    fn refill(&mut self) -> Result<bool, Cut> {
        while self.pending.is_empty() {
            if self.unread == 0 {
                return Ok(false);
            }
            if self.desk()?.held_for() > self.order.hold {
                self.open_anew()?;
            }
            let stop = self.stop;
            let letters = self.desk()?.next(stop)?;
            if letters.is_empty() {
                return Ok(false);
            }
            for (letter, ticket) in letters {
                if self.is_new(&letter) && self.filter.matches(&letter) {
                    self.report.matched += 1;
                    self.pending.push_back((letter, ticket));
                }
            }
        }
        Ok(true)
    }

    /// Whether a letter was there at the start and was not read before.
    fn is_new(&mut self, letter: &Letter) -> bool {
        let run = letter.properties.header(REPLAY_HEADER);
        if run.and_then(|run| run.as_text()) == Some(&self.run) {
            // It was replayed a moment ago, and has come back.
            return false;
        }
        let alike = self.likeness_of(letter);
        *self.held.entry(alike).or_default() += 1;
        if take_one(&mut self.again, alike) || self.unread == 0 {
            return false;
        }
        self.unread -= 1;
        true
    }

    fn likeness_of(&self, letter: &Letter) -> u64 {
        self.likeness.hash_one((letter.fingerprint, &letter.id))
    }

    /// Gives back what is held, before the broker takes it. What was read and
    /// left comes again then, in some order, with what has arrived since.
    fn open_anew(&mut self) -> Result<(), Cut> {
        self.drain()?;
        let desk = self.desk.take().ok_or_else(no_desk)?;
        let despite = self.order.despite_limit;
        self.desk = Some(desk.open_anew(self.config, PURPOSE, despite)?);
        self.again = std::mem::take(&mut self.held);
        Ok(())
    }

    /// What is done with a letter that stands there.
    fn way_of(&self, standing: Standing) -> Way {
        let order = self.order;
        let elsewhere = matches!(order.destination, Destination::To { .. });
        match standing {
            Standing::NeverApplied => Way::Publish,
            Standing::AlreadyApplied if order.force => Way::Forget,
            Standing::AlreadyApplied => Way::Acknowledge,
            Standing::IdConflict if order.force => Way::Forget,
            Standing::IdConflict if elsewhere => Way::Publish,
            Standing::BeyondRetention if order.force => Way::Forget,
            Standing::BeyondRetention if order.beyond_retention => Way::Publish,
            Standing::NoId if elsewhere => Way::Publish,
            Standing::IdConflict
            | Standing::BeyondRetention
            | Standing::NoId
            | Standing::InProgress => Way::Leave,
        }
    }

    /// Writes down which letters are about to be published or acknowledged.
    fn note(&mut self, letters: &[&Letter], judged: &[Judged]) -> Result<(), Cut> {
        let acted = letters.iter().zip(judged).filter(|(_, judged)| {
            let way = self.way_of(judged.verdict.standing);
            matches!(way, Way::Publish | Way::Acknowledge)
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
        match self.way_of(judged.verdict.standing) {
            Way::Leave => {
                self.leave(&judged);
                Ok(())
            }
            Way::Acknowledge => self.acknowledge(&letter, ticket, &judged),
            Way::Publish => self.publish(letter, ticket, judged),
            Way::Forget => match self.forget(&letter, &judged)? {
                true => self.publish(letter, ticket, judged),
                false => Ok(()),
            },
        }
    }

    pub(super) fn leave(&mut self, judged: &Judged) {
        *self.report.left.entry(judged.verdict.standing).or_default() += 1;
        self.line(judged, Action::Left, None, judged.verdict.why.clone());
    }

    fn acknowledge(&mut self, letter: &Letter, ticket: Ticket, judged: &Judged) -> Result<(), Cut> {
        self.ack(ticket, self.likeness_of(letter))?;
        self.report.acknowledged += 1;
        let why = "it was applied before".to_owned();
        self.line(judged, Action::Acknowledged, None, why);
        Ok(())
    }

    fn hinder(&mut self, judged: &Judged, hindrance: Hindrance, why: String) {
        *self.report.hindered.entry(hindrance).or_default() += 1;
        self.line(judged, Action::Left, Some(hindrance), why);
    }

    fn line(&mut self, judged: &Judged, action: Action, hindrance: Option<Hindrance>, why: String) {
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

    fn ack(&mut self, ticket: Ticket, alike: u64) -> Result<(), Cut> {
        self.desk()?.ack(ticket)?;
        take_one(&mut self.held, alike);
        Ok(())
    }

    fn publish(&mut self, letter: Letter, ticket: Ticket, judged: Judged) -> Result<(), Cut> {
        let alone = letter.size() >= ALONE_BYTES;
        if alone {
            self.drain()?;
        }
        self.wait_for_turn()?;
        let outbound = self.outbound(&letter)?;
        let route = route_text(&outbound);
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
            at: now.map_or(0, |now| now.as_secs()),
            user: &user,
        };
        let (exchange, routing_key) = letter.origin();
        let origin = Origin {
            exchange,
            routing_key,
        };
        let to = &self.order.destination;
        Ok(republish::outbound(
            &letter.properties,
            origin,
            to,
            self.queue,
            stamp,
        ))
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

    /// Waits until the rate lets the next one go.
    fn wait_for_turn(&mut self) -> Result<(), Cut> {
        loop {
            let now = Instant::now();
            let wait = match self.pace.due(now) {
                Some(due) if due <= now => return Ok(()),
                Some(due) => due - now,
                None => LOOK_EVERY,
            };
            self.settle(Duration::ZERO)?;
            let wait = wait.min(LOOK_EVERY);
            match self.out.is_empty() {
                true => drop(self.stop.wait(wait)),
                false => self.settle(wait)?,
            }
            if self.stop.is_set() {
                return Err(Cut::Stopped);
            }
        }
    }

    /// Waits until nothing is unconfirmed.
    pub(super) fn drain(&mut self) -> Result<(), Cut> {
        let deadline = Instant::now() + CONFIRMS_WITHIN;
        while !self.out.is_empty() {
            if Instant::now() >= deadline {
                return Err(Cut::Unconfirmed {
                    within: CONFIRMS_WITHIN,
                });
            }
            self.settle(LOOK_EVERY)?;
        }
        Ok(())
    }

    /// Takes in what the broker says of what was published, waiting `within`
    /// for the first of it.
    fn settle(&mut self, within: Duration) -> Result<(), Cut> {
        let Some(publisher) = &mut self.publisher else {
            return Ok(());
        };
        let fates = publisher.wait(within);
        let lost = publisher.lost().map(str::to_owned);
        // Over one that is alone it is known which it was.
        let refused = publisher.refused() && self.out.len() == 1;
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
                (fate, _) => self.settle_one(out, &fate),
            };
            // The others have their fates all the same.
            result = result.and(settled);
        }
        if let Some(cause) = lost {
            self.publisher = None;
            if !refused {
                result = result.and(Err(Cut::Lost { cause }));
            }
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

    /// Takes in what is still to come, gives back what is left, and says what
    /// came of it all.
    fn end(mut self, result: Result<(), Cut>) -> (Report, Option<Cut>) {
        let mut cut = result.err();
        if let Err(error) = self.drain() {
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

/// What is done with a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Publish,
    Acknowledge,
    /// Forget its ledger row, then publish it.
    Forget,
    Leave,
}

/// What to do about a letter that no queue takes.
const HINT: &str = "; --to-queue sends it to the consumer's work queue";

fn route_text(outbound: &Outbound) -> String {
    match outbound.exchange.as_str() {
        "" => format!("queue {}", outbound.routing_key),
        exchange => format!(
            "exchange {exchange}, routing key {:?}",
            outbound.routing_key
        ),
    }
}

/// One fewer of them; whether there was one.
fn take_one(counts: &mut HashMap<u64, u32>, of: u64) -> bool {
    let Some(count) = counts.get_mut(&of) else {
        return false;
    };
    *count -= 1;
    if *count == 0 {
        counts.remove(&of);
    }
    true
}

fn no_desk() -> Cut {
    Cut::Lost {
        cause: "the dead-letter queue is closed".to_owned(),
    }
}
