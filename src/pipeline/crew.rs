//! The threads that run a keyed handler, one call each at a time. They know
//! nothing of ledger and broker: they take what is claimed and say what came
//! of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use crossbeam_channel::{Receiver, Sender, bounded};

use super::Shared;
use super::item::Item;
use crate::config::checked;
use crate::failpoint::{self, Step};
use crate::failure::{Class, Failure};
use crate::handler::rust::Makers;
use crate::handler::{self, Handler, Keyed, Work};
use crate::message::{MessageId, Settled};

/// What came of a call.
pub(super) enum Outcome {
    /// The handler was not called: the claim was lost before it could be.
    NotCalled,
    /// The handler returned.
    Returned(Result<(), Failure>),
}

pub(super) struct Answer {
    pub(super) item: Box<Item>,
    pub(super) outcome: Outcome,
}

/// The threads of one consumer.
pub(super) struct Crew {
    pub(super) calls: Sender<Box<Item>>,
    /// What no thread has taken yet.
    pub(super) uncalled: Receiver<Box<Item>>,
    pub(super) answers: Receiver<Answer>,
    /// How many threads there are.
    pub(super) size: usize,
    #[expect(
        dead_code,
        reason = "held so that `answers` waits when all threads have ended"
    )]
    answer: Sender<Answer>,
}

impl Crew {
    /// Starts a thread for each of `handlers`. `most` calls can be out at one
    /// time. Something is sent to `panicked` when a thread has ended before its
    /// time.
    ///
    /// # Errors
    ///
    /// When a thread cannot be started.
    pub(super) fn start(
        shared: &Shared,
        handlers: Vec<Box<dyn Keyed>>,
        most: usize,
        panicked: &Sender<()>,
    ) -> anyhow::Result<Self> {
        let consumer = &shared.consumer;
        let size = handlers.len();
        // Nobody waits for a place in either.
        let (calls, uncalled) = bounded(most);
        let (answer, answers) = bounded(most + size);
        for (number, handler) in (1..).zip(handlers) {
            let caller = Caller {
                number,
                handler,
                consumer: Arc::clone(consumer),
                makers: shared.makers.clone(),
                calls: uncalled.clone(),
                answers: answer.clone(),
                outbox: shared.outbox.clone(),
            };
            let (name, panicked) = (consumer.name.clone(), panicked.clone());
            std::thread::Builder::new()
                .name(format!("{}-{number}", consumer.name))
                .spawn(move || {
                    let run = catch_unwind(AssertUnwindSafe(|| caller.run()));
                    if !matches!(run, Ok(true)) {
                        log::error!(consumer = name.as_str(), worker = number; "a worker panicked");
                        panicked.try_send(()).ok();
                    }
                })
                .with_context(|| {
                    format!(
                        "failed to start worker {number} of consumer {}",
                        consumer.name
                    )
                })?;
        }
        Ok(Self {
            calls,
            uncalled,
            answers,
            size,
            answer,
        })
    }
}

struct Caller {
    number: usize,
    handler: Box<dyn Keyed>,
    consumer: Arc<checked::Consumer>,
    makers: Makers,
    calls: Receiver<Box<Item>>,
    answers: Sender<Answer>,
    #[expect(
        dead_code,
        reason = "held until the handler before it is dropped: a stop waits for this"
    )]
    outbox: Sender<Vec<Settled>>,
}

impl Caller {
    /// True when there is nothing more to call.
    fn run(mut self) -> bool {
        while let Ok(mut item) = self.calls.recv() {
            item.worker = Some(self.number);
            let begun = Instant::now();
            let outcome = match item.lease.as_ref().is_some_and(|lease| lease.is_kept()) {
                true => self.call(&item),
                false => Some(Outcome::NotCalled),
            };
            let Some(outcome) = outcome else {
                return false;
            };
            if let Outcome::Returned(result) = &outcome {
                item.duration = Some(begun.elapsed());
                if let (Ok(()), Some(lease)) = (result, &item.lease) {
                    lease.returned();
                    failpoint::hit(Step::Called);
                }
            }
            if self.answers.send(Answer { item, outcome }).is_err() {
                return true;
            }
        }
        true
    }

    /// `None` when the handler panicked and no other could be made: the item
    /// goes back to the broker with the connection.
    fn call(&mut self, item: &Item) -> Option<Outcome> {
        let (Some(message_id), Some(lease)) = (&item.id, &item.lease) else {
            return Some(Outcome::NotCalled);
        };
        let work = Work {
            message_id,
            message: &item.delivery.message,
            attempt: item.attempt(),
        };
        let call = || {
            failpoint::meet(&work.message.body);
            self.handler.apply(&work, &lease.cancelled)
        };
        if let Ok(result) = catch_unwind(AssertUnwindSafe(call)) {
            return Some(Outcome::Returned(result));
        }
        // What it left behind may be broken.
        let Ok(Handler::Keyed(handler)) = handler::build(&self.consumer, &self.makers) else {
            return None;
        };
        self.handler = handler;
        Some(Outcome::Returned(Err(panicked(message_id))))
    }
}

fn panicked(id: &MessageId) -> Failure {
    log::error!(message_id = id.as_str(); "a handler panicked");
    Failure {
        class: Class::Transient,
        code: None,
        text: "the handler panicked".to_owned(),
        retry_after: None,
    }
}

/// How long something takes, as far as that is known: rises at once, falls
/// slowly.
#[derive(Debug, Default)]
pub(super) struct Pace(Option<Duration>);

impl Pace {
    pub(super) fn saw(&mut self, duration: Duration) {
        self.0 = Some(match self.0 {
            None => duration,
            Some(pace) if duration > pace => (pace + duration) / 2,
            Some(pace) => (pace * 7 + duration) / 8,
        });
    }

    /// Zero as long as nothing is known.
    pub(super) fn average(&self) -> Duration {
        self.0.unwrap_or_default()
    }

    /// How many calls `size` threads make in `time`; 0 as long as nothing is
    /// known.
    pub(super) fn calls_in(&self, time: Duration, size: usize) -> usize {
        let Some(pace) = self.0 else {
            return 0;
        };
        let each = time.as_nanos() / pace.as_nanos().max(1);
        usize::try_from(each)
            .unwrap_or(usize::MAX)
            .saturating_mul(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_calls_are_not_claimed_ahead_and_fast_ones_are() {
        let ahead = |pace: &Pace| pace.calls_in(Duration::from_millis(20), 4);
        let mut pace = Pace::default();
        assert_eq!(ahead(&pace), 0, "nothing is known");
        pace.saw(Duration::from_millis(1));
        assert_eq!(ahead(&pace), 80);
        pace.saw(Duration::from_secs(1));
        assert_eq!(ahead(&pace), 0, "one slow call is enough");
        for _ in 0..100 {
            pace.saw(Duration::ZERO);
        }
        assert!(ahead(&pace) > 1_000);
    }
}
