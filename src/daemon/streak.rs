//! How often in a row a connection came to nothing: how long to wait before
//! the next one, where to begin, and what is worth a line in the log. Pure.

use std::time::Duration;

/// A connection that stood for so long was of use, whatever came over it.
const STABLE: Duration = Duration::from_secs(30);

/// So many ends of one kind in a row are a pattern.
const PATTERN: u32 = 3;

/// The failures since the last connection that was of use.
#[derive(Debug)]
pub(super) struct Streak {
    /// URLs that are tried in turn, at least 1.
    servers: usize,
    /// The URL to begin with.
    first: usize,
    /// URLs that failed, each time counted.
    failures: usize,
    /// Failures of the last kind, in a row.
    alike: u32,
    last: String,
}

impl Streak {
    /// None yet, with so many URLs to try.
    pub(super) fn new(servers: usize) -> Self {
        Self {
            servers: servers.max(1),
            first: 0,
            failures: 0,
            alike: 0,
            last: String::new(),
        }
    }

    /// The URL that the next connection begins with.
    pub(super) fn first(&self) -> usize {
        self.first
    }

    /// How often every URL was tried in vain: what the wait grows with.
    pub(super) fn rounds(&self) -> u32 {
        let rounds = self.failures.saturating_sub(1) / self.servers;
        u32::try_from(rounds).unwrap_or(u32::MAX)
    }

    /// A connection stood for `lived` and settled so many deliveries. One that
    /// died young and had settled nothing leaves the streak as it is: else
    /// whatever kills each of them at once would be met without a pause.
    pub(super) fn stood(&mut self, lived: Duration, settled: u64) {
        if settled > 0 || lived >= STABLE {
            self.failures = 0;
            self.alike = 0;
        }
    }

    /// Every URL failed.
    pub(super) fn no_server(&mut self, why: &str) -> Option<u32> {
        self.failures = self.failures.saturating_add(self.servers);
        self.tell(why)
    }

    /// What the URL number `server` led to came to nothing: the next one is
    /// tried. Returns, as [`Streak::no_server`] does, how many in a row ended
    /// alike when that is worth a line: at first, and then ever more rarely.
    pub(super) fn failed(&mut self, server: usize, why: &str) -> Option<u32> {
        self.failures = self.failures.saturating_add(1);
        self.first = (server + 1) % self.servers;
        self.tell(why)
    }

    /// Numbers in the text, such as ports and times, make no other kind of it.
    fn tell(&mut self, why: &str) -> Option<u32> {
        let kind: String = why.chars().filter(|it| !it.is_ascii_digit()).collect();
        if self.alike == 0 || kind != self.last {
            self.alike = 0;
            self.last = kind;
        }
        self.alike = self.alike.saturating_add(1);
        self.alike.is_power_of_two().then_some(self.alike)
    }
}

/// Whether `alike` ends in a row are a pattern, and worth saying so.
pub(super) fn is_pattern(alike: u32) -> bool {
    alike >= PATTERN
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(1);

    #[test]
    fn the_wait_grows_only_after_every_server_was_tried() {
        let mut streak = Streak::new(3);
        let mut rounds = Vec::new();
        let mut firsts = Vec::new();
        for _ in 0..7 {
            firsts.push(streak.first());
            streak.failed(streak.first(), "lost");
            rounds.push(streak.rounds());
        }
        assert_eq!(rounds, [0, 0, 0, 1, 1, 1, 2]);
        assert_eq!(firsts, [0, 1, 2, 0, 1, 2, 0]);
        let mut streak = Streak::new(3);
        let rounds: Vec<_> = (0..3)
            .map(|_| {
                streak.no_server("refused");
                streak.rounds()
            })
            .collect();
        assert_eq!(rounds, [0, 1, 2]);
    }

    #[test]
    fn only_a_connection_that_was_of_use_ends_the_streak() {
        let mut streak = Streak::new(1);
        for _ in 0..5 {
            streak.stood(SOON, 0);
            streak.failed(0, "malformed");
        }
        assert_eq!(streak.rounds(), 4);
        streak.stood(SOON, 1);
        streak.failed(0, "malformed");
        assert_eq!(streak.rounds(), 0);
        streak.failed(0, "malformed");
        streak.stood(STABLE, 0);
        streak.failed(0, "malformed");
        assert_eq!(streak.rounds(), 0);
    }

    #[test]
    fn ends_alike_are_told_ever_more_rarely_and_another_one_at_once() {
        let mut streak = Streak::new(1);
        let told: Vec<_> = (0..8)
            .map(|port| streak.no_server(&format!("refused on port {port}")))
            .collect();
        assert_eq!(
            told,
            [Some(1), Some(2), None, Some(4), None, None, None, Some(8)]
        );
        assert_eq!(streak.failed(0, "denied"), Some(1));
        assert_eq!(streak.rounds(), 8, "the wait goes on growing");
        streak.stood(SOON, 3);
        assert_eq!(streak.failed(0, "denied"), Some(1));
    }
}
