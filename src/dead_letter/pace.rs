//! How fast dead letters are replayed: never more than so many in any second.

use std::collections::VecDeque;
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// Most messages of one rate: that many times are kept.
const COUNT_MAX: u32 = 100_000;

/// At most so many messages in any span of so long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// How many, at most 100,000.
    pub count: NonZeroU32,
    /// A second, a minute or an hour.
    pub per: Duration,
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (count, unit) = text.split_once('/').unwrap_or((text, "s"));
        let per = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3_600,
            _ => return Err("a rate is a number with /s, /m or /h, such as 100/s".to_owned()),
        };
        let count = count
            .parse::<NonZeroU32>()
            .ok()
            .filter(|count| count.get() <= COUNT_MAX)
            .ok_or(format!(
                "a rate is a number from 1 to {COUNT_MAX}, such as 100/s"
            ))?;
        let per = Duration::from_secs(per);
        Ok(Self { count, per })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.per.as_secs() {
            1 => "s",
            60 => "m",
            _ => "h",
        };
        write!(f, "{}/{unit}", self.count)
    }
}

/// Keeps a rate.
///
/// A message arrives between its publish and its confirm. So one is let go
/// only while fewer than the rate's count are unconfirmed or were confirmed
/// within the rate's span: then no span of that length sees more arrive,
/// whatever was delayed on the way. Besides that they go evenly, so that the
/// first of a span do not come all at once.
#[derive(Debug)]
pub struct Pace {
    rate: Option<Rate>,
    next: Instant,
    unconfirmed: usize,
    confirmed: VecDeque<Instant>,
}

impl Pace {
    /// Without a `rate` there is no limit.
    #[must_use]
    pub fn new(rate: Option<Rate>, now: Instant) -> Self {
        Self {
            rate,
            next: now,
            unconfirmed: 0,
            confirmed: VecDeque::new(),
        }
    }

    /// When the next message may go, at the earliest; `None` when a confirm has
    /// to come first.
    #[must_use]
    pub fn due(&mut self, now: Instant) -> Option<Instant> {
        let Some(rate) = self.rate else {
            return Some(now);
        };
        let is_past = |at: &Instant| *at + rate.per <= now;
        while self.confirmed.front().is_some_and(is_past) {
            self.confirmed.pop_front();
        }
        let count = usize::try_from(rate.count.get()).unwrap_or(usize::MAX);
        let taken = self.unconfirmed + self.confirmed.len();
        if taken < count {
            return Some(self.next.max(now));
        }
        // So many have to grow old first, and this is the last of them.
        let last = self.confirmed.get(taken - count)?;
        Some((*last + rate.per).max(self.next))
    }

    /// One was let go.
    pub fn sent(&mut self, now: Instant) {
        let Some(rate) = self.rate else { return };
        self.unconfirmed += 1;
        // What is late does not make the others hurry.
        self.next = self.next.max(now) + rate.per / rate.count.get();
    }

    /// What became of one is known.
    pub fn settled(&mut self, now: Instant) {
        if self.rate.is_some() {
            self.unconfirmed = self.unconfirmed.saturating_sub(1);
            self.confirmed.push_back(now);
        }
    }

    /// How many letters to look up at once, at most `most`: those of about a
    /// second, so that what was looked up is not stale when its turn comes.
    #[must_use]
    pub fn chunk(&self, most: u64) -> u64 {
        let Some(rate) = self.rate else { return most };
        let a_second = u64::from(rate.count.get()) / rate.per.as_secs().max(1);
        a_second.clamp(1, most.max(1))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_rate_is_a_number_and_a_unit() {
        for (text, count, per) in [
            ("100", 100, 1),
            ("100/s", 100, 1),
            ("30/m", 30, 60),
            ("1/h", 1, 3_600),
        ] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!(
                (rate.count.get(), rate.per.as_secs()),
                (count, per),
                "{text}"
            );
        }
        for text in [
            "",
            "0",
            "0/s",
            "-1",
            "1.5/s",
            "100/d",
            "100/",
            "/s",
            "100 /s",
            "100001",
            "99999999999",
        ] {
            assert!(text.parse::<Rate>().is_err(), "{text:?}");
        }
    }

    proptest! {
        /// A simulated broker takes each message some time after it was sent
        /// and confirms it some time after that.
        #[test]
        fn no_span_sees_more_arrive_than_the_rate_allows(
            count in 1u32..20,
            delays in prop::collection::vec((0u64..700, 0u64..700), 1..120),
        ) {
            let start = Instant::now();
            let rate = Rate { count: NonZeroU32::new(count).unwrap(), per: Duration::from_secs(1) };
            let mut pace = Pace::new(Some(rate), start);
            let mut now = start;
            let mut arrivals: Vec<Instant> = Vec::new();
            let mut confirms: Vec<Instant> = Vec::new();
            for (arrives, confirmed) in delays {
                loop {
                    confirms.sort_unstable();
                    while confirms.first().is_some_and(|at| *at <= now) {
                        pace.settled(confirms.remove(0));
                    }
                    match pace.due(now) {
                        Some(due) if due <= now => break,
                        Some(due) => now = confirms.first().map_or(due, |c| due.min(*c)),
                        None => now = confirms[0],
                    }
                }
                pace.sent(now);
                let arrival = now + Duration::from_millis(arrives);
                arrivals.push(arrival);
                confirms.push(arrival + Duration::from_millis(confirmed));
            }
            for from in &arrivals {
                let within = arrivals.iter().filter(|at| *at >= from && **at < *from + rate.per);
                prop_assert!(within.count() <= count as usize);
            }
        }
    }
}
