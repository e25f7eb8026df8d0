//! One message's story, told: a timeline for each consumer and what it comes
//! to, as text or as JSON.

use std::fmt::Write;

use serde::Serialize;

use crate::config::format_duration;
use crate::ledger::story::{ATTEMPTS_MAX, Applied, Attempt, Claim, Deed, Mark, Moment, Story};

/// Longest error in a line of the timeline, in characters.
const ERROR_MAX: usize = 160;

/// The whole answer.
#[derive(Debug, Serialize)]
pub struct Answer<'a> {
    message_id: &'a str,
    known: bool,
    truncated: bool,
    consumers: Vec<Chapter<'a>>,
}

/// What happened with one consumer.
#[derive(Debug, Serialize)]
struct Chapter<'a> {
    consumer: &'a str,
    #[serde(flatten)]
    end: End<'a>,
    events: Vec<Event<'a>>,
}

/// Where the message stands.
#[derive(Debug, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
enum End<'a> {
    /// In the ledger.
    Applied {
        at: &'a str,
        /// Another message with its id was dead-lettered.
        conflict: bool,
    },
    /// In the dead-letter queue, as far as the journal knows.
    DeadLettered { at: &'a str, reason: &'a str },
    /// In a retry queue.
    Waiting { until: Option<&'a str> },
    /// Its wait is over, and nothing is known since.
    Due { since: Option<&'a str> },
    /// An operator was about to put it back, and nothing is known since.
    Sent { at: &'a str },
    /// Marked and not yet at an end.
    InWork { since: &'a str, deaths: i32 },
    /// Taken out of the dead-letter queue for good.
    Dropped { at: &'a str, operator: &'a str },
    /// A daemon's keyed handler is at it, or was when the daemon ended.
    Claimed {
        since: &'a str,
        until: &'a str,
        /// The lease has run out: the next to get the message takes it over.
        over: bool,
        host: &'a str,
    },
}

#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event<'a> {
    Failed(Failed<'a>),
    Applied {
        at: &'a str,
        fingerprint: &'a str,
    },
    /// It came back unsettled, and was marked before it ran.
    Marked {
        at: &'a str,
        deaths: i32,
    },
    /// An operator did something to the dead letter.
    Desk {
        at: &'a str,
        action: &'a str,
        operator: &'a str,
        because: Option<&'a str>,
        /// Nothing came of it: the message stayed in the dead-letter queue.
        left: bool,
        fingerprint: &'a str,
    },
    /// A daemon took it for its keyed handler.
    Claimed {
        at: &'a str,
        host: &'a str,
        fingerprint: &'a str,
    },
}

#[derive(Debug, Serialize)]
struct Failed<'a> {
    at: &'a str,
    attempt: i32,
    class: &'a str,
    code: Option<&'a str>,
    error: &'a str,
    reason: Option<&'a str>,
    /// The row before it says the same of the same message.
    repeated: bool,
    retry_in_ms: Option<f64>,
    retry_at: Option<&'a str>,
    duration_ms: Option<f64>,
    handler: &'a str,
    host: &'a str,
    worker: Option<i32>,
    exchange: &'a str,
    routing_key: &'a str,
    fingerprint: &'a str,
}

impl<'a> Answer<'a> {
    /// Puts the story of `message_id` in order.
    #[must_use]
    pub fn new(message_id: &'a str, story: &'a Story) -> Self {
        let applied = story.applied.iter().map(|row| row.consumer.as_str());
        let failed = story.attempts.iter().map(|row| row.consumer.as_str());
        let marked = story.marks.iter().map(|row| row.consumer.as_str());
        let claimed = story.claims.iter().map(|row| row.consumer.as_str());
        let handled = story.deeds.iter().map(|row| row.consumer.as_str());
        let names = applied
            .chain(failed)
            .chain(marked)
            .chain(claimed)
            .chain(handled);
        let mut names: Vec<&str> = names.collect();
        names.sort_unstable();
        names.dedup();
        let consumers: Vec<Chapter<'_>> = names
            .into_iter()
            .filter_map(|name| chapter(name, story))
            .collect();
        Self {
            message_id,
            known: !consumers.is_empty(),
            truncated: story.cut,
            consumers,
        }
    }

    /// Whether anything is known of the message.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// As one JSON object on one line.
    #[must_use]
    pub fn json(&self) -> String {
        // Strings and numbers alone: there is nothing that could fail.
        serde_json::to_string(self).map_or_else(|_| String::new(), |text| text + "\n")
    }

    /// For humans; with `verbose`, whole errors and where the message went.
    #[must_use]
    pub fn text(&self, verbose: bool) -> String {
        let mut out = String::new();
        for (index, chapter) in self.consumers.iter().enumerate() {
            if index > 0 {
                out.push('\n');
            }
            line(
                &mut out,
                &format!("consumer {}", printable(chapter.consumer)),
            );
            for event in &chapter.events {
                line(&mut out, &format!("  {}", event.line()));
                if let (Event::Failed(failed), true) = (event, verbose) {
                    failed.details(&mut out);
                }
            }
            line(&mut out, &format!("  = {}", chapter.end.line()));
        }
        if self.truncated {
            let text = format!("older attempts are left out: these are the newest {ATTEMPTS_MAX}");
            line(&mut out, &text);
        }
        out
    }
}

fn line(out: &mut String, text: &str) {
    out.push_str(text);
    out.push('\n');
}

fn chapter<'a>(consumer: &'a str, story: &'a Story) -> Option<Chapter<'a>> {
    let applied = story.applied.iter().find(|row| row.consumer == consumer);
    let mark = story.marks.iter().find(|row| row.consumer == consumer);
    let claim = story.claims.iter().find(|row| row.consumer == consumer);
    let attempts: Vec<&Attempt> = story
        .attempts
        .iter()
        .filter(|row| row.consumer == consumer)
        .collect();
    let mut events: Vec<(&Moment, Event<'_>)> = Vec::new();
    let mut before: Option<&Attempt> = None;
    for attempt in &attempts {
        let repeated = before.is_some_and(|before| is_repeated(before, attempt));
        events.push((&attempt.at, Event::Failed(failed(attempt, repeated))));
        before = Some(attempt);
    }
    events.extend(applied.map(|row| {
        let (at, fingerprint) = (row.at.text.as_str(), row.fingerprint.as_str());
        (&row.at, Event::Applied { at, fingerprint })
    }));
    events.extend(mark.map(|row| {
        let (at, deaths) = (row.at.text.as_str(), row.deaths);
        (&row.at, Event::Marked { at, deaths })
    }));
    events.extend(claim.map(|row| {
        let event = Event::Claimed {
            at: &row.at.text,
            host: &row.holder,
            fingerprint: &row.fingerprint,
        };
        (&row.at, event)
    }));
    let mut deeds = story.deeds.iter().filter(|row| row.consumer == consumer);
    events.extend(deeds.clone().map(|row| (&row.at, deed(row))));
    // The sort is stable: journal rows of one moment stay as written.
    events.sort_by_key(|(at, _)| at.microseconds);
    Some(Chapter {
        consumer,
        end: end(applied, &attempts, mark, claim, deeds.next_back())?,
        events: events.into_iter().map(|(_, event)| event).collect(),
    })
}

/// A crash between journal and broker leaves two rows for one dead letter; a
/// replay that fails likewise looks the same.
fn is_repeated(before: &Attempt, row: &Attempt) -> bool {
    row.reason.is_some()
        && (&row.reason, row.attempt, &row.fingerprint, &row.code)
            == (
                &before.reason,
                before.attempt,
                &before.fingerprint,
                &before.code,
            )
}

fn failed(row: &Attempt, repeated: bool) -> Failed<'_> {
    Failed {
        at: &row.at.text,
        attempt: row.attempt,
        class: &row.class,
        code: row.code.as_deref(),
        error: &row.error,
        reason: row.reason.as_deref(),
        repeated,
        retry_in_ms: row.retry_in.map(milliseconds),
        retry_at: row.retry_at.as_ref().map(|at| at.text.as_str()),
        duration_ms: row.duration.map(milliseconds),
        handler: &row.handler,
        host: &row.host,
        worker: row.worker,
        exchange: &row.exchange,
        routing_key: &row.routing_key,
        fingerprint: &row.fingerprint,
    }
}

/// To the microsecond, as the database keeps it.
fn milliseconds(seconds: f64) -> f64 {
    (seconds * 1e6).round() / 1e3
}

/// `None` when nothing is known.
fn end<'a>(
    applied: Option<&'a Applied>,
    attempts: &[&'a Attempt],
    mark: Option<&'a Mark>,
    claim: Option<&'a Claim>,
    deed: Option<&'a Deed>,
) -> Option<End<'a>> {
    let last = attempts.last();
    if let Some(row) = applied {
        let other =
            |attempt: &&Attempt| attempt.reason.is_some() && attempt.fingerprint != row.fingerprint;
        return Some(End::Applied {
            at: &row.at.text,
            conflict: attempts.iter().any(other),
        });
    }
    if let Some(row) = claim {
        return Some(End::Claimed {
            since: &row.at.text,
            until: &row.until.text,
            over: row.over,
            host: &row.holder,
        });
    }
    if let Some(deed) = deed.filter(|deed| is_last(deed, last.copied(), mark)) {
        let at = &deed.at.text;
        let reason = || last.and_then(|row| row.reason.as_deref());
        return Some(match deed.action.as_str() {
            _ if deed.was_left => End::DeadLettered {
                at: last.map_or(at.as_str(), |row| &row.at.text),
                reason: reason().unwrap_or("its reason is not known"),
            },
            "drop" => End::Dropped {
                at,
                operator: &deed.operator,
            },
            "import" => End::DeadLettered {
                at,
                reason: reason().unwrap_or("imported"),
            },
            _ => End::Sent { at },
        });
    }
    match (last, mark) {
        (last, Some(mark)) if last.is_none_or(|last| last.at < mark.at) => Some(End::InWork {
            since: &mark.at.text,
            deaths: mark.deaths,
        }),
        (Some(row), _) => {
            let retry_at = row.retry_at.as_ref().map(|at| at.text.as_str());
            Some(match &row.reason {
                Some(reason) => End::DeadLettered {
                    at: &row.at.text,
                    reason,
                },
                None if row.waits => End::Waiting { until: retry_at },
                None => End::Due { since: retry_at },
            })
        }
        (None, _) => None,
    }
}

/// Whether nothing else is known since, of this letter or of another with its
/// id.
fn is_last(deed: &Deed, last: Option<&Attempt>, mark: Option<&Mark>) -> bool {
    last.is_none_or(|row| row.at <= deed.at && row.fingerprint == deed.fingerprint)
        && mark.is_none_or(|row| row.at <= deed.at)
}

fn deed(row: &Deed) -> Event<'_> {
    Event::Desk {
        at: &row.at.text,
        action: &row.action,
        operator: &row.operator,
        because: row.because.as_deref(),
        left: row.was_left,
        fingerprint: &row.fingerprint,
    }
}

impl End<'_> {
    fn line(&self) -> String {
        match self {
            Self::Applied {
                at,
                conflict: false,
            } => format!("applied at {at}"),
            Self::Applied { at, conflict: true } => format!(
                "applied at {at}; another message with this id and another body was dead-lettered"
            ),
            Self::Dropped { at, operator } => {
                format!("dropped at {at} by {}", printable(operator))
            }
            Self::DeadLettered { at, reason } => {
                format!("dead-lettered at {at}: {}", printable(reason))
            }
            Self::Waiting { until } => format!(
                "waits for its next attempt until about {}",
                until.unwrap_or("a time that is not known")
            ),
            Self::Due { since } => format!(
                "was to be tried again{}, and nothing is known since: it is in the queue, or in \
                 work",
                since.map_or(String::new(), |since| format!(" at about {since}"))
            ),
            Self::Sent { at } => format!(
                "was to be put back at {at}, and nothing is known since: it is in the queue, or in \
                 work; or in the dead-letter queue, where the command was ended before it was sent"
            ),
            Self::InWork { since, deaths } => format!(
                "in work since {since}, or lost with its worker; it died with it {deaths} time(s) \
                 before"
            ),
            Self::Claimed {
                since,
                until,
                over: false,
                host,
            } => format!(
                "in work by {} since {since}, until {until} if it does not renew its claim",
                printable(host)
            ),
            Self::Claimed {
                until,
                over: true,
                host,
                ..
            } => format!(
                "was in work by {}, whose claim ended at {until}: whoever gets the message next \
                 takes it over",
                printable(host)
            ),
        }
    }
}

impl Event<'_> {
    fn line(&self) -> String {
        match self {
            Self::Failed(failed) => failed.line(),
            Self::Applied { at, .. } => format!("{at}  applied"),
            Self::Desk {
                at,
                action,
                operator,
                because,
                left,
                ..
            } => {
                let because =
                    because.map_or_else(String::new, |why| format!(": {}", printable(why)));
                let outcome = match left {
                    true => ": it could not be sent, and stayed in the dead-letter queue",
                    false => "",
                };
                format!(
                    "{at}  {} by {}{because}{outcome}",
                    printable(action),
                    printable(operator)
                )
            }
            Self::Marked { at, deaths } => format!(
                "{at}  came back unsettled and was marked; it died with its worker {deaths} \
                 time(s) before"
            ),
            Self::Claimed { at, host, .. } => {
                format!("{at}  claimed by {}", printable(host))
            }
        }
    }
}

impl Failed<'_> {
    fn line(&self) -> String {
        let mut text = match self.attempt {
            0 => format!("{}  refused: {}", self.at, self.class),
            n => format!("{}  attempt {n} failed: {}", self.at, self.class),
        };
        if let Some(code) = self.code {
            text.push_str(&format!(" {}", printable(code)));
        }
        let error = self.error.lines().next().unwrap_or_default();
        let mut short: String = error.chars().take(ERROR_MAX).collect();
        if short.len() < self.error.len() {
            short.push('…');
        }
        text.push_str(&format!(
            ", {} ({}",
            printable(&short),
            printable(self.handler)
        ));
        text.push_str(&format!(", {}", printable(self.host)));
        if let Some(worker) = self.worker {
            text.push_str(&format!(" worker {worker}"));
        }
        if let Some(duration) = self.duration_ms {
            text.push_str(&format!(", {duration} ms"));
        }
        text.push_str("); ");
        text.push_str(&self.what_followed());
        text
    }

    fn what_followed(&self) -> String {
        let again = match self.repeated {
            true => " once more (replayed, or the daemon ended before the broker knew)",
            false => "",
        };
        match (self.reason, self.retry_in_ms) {
            (Some(reason), _) => format!("dead-lettered{again}: {}", printable(reason)),
            (None, Some(wait)) => {
                let wait = std::time::Duration::from_secs_f64((wait / 1e3).max(0.0));
                format!("again in {}", format_duration(wait))
            }
            (None, None) => "again".to_owned(),
        }
    }

    fn details(&self, out: &mut String) {
        for (index, text) in self.error.lines().enumerate() {
            let label = if index == 0 { "error: " } else { "       " };
            line(out, &format!("      {label}{}", printable(text)));
        }
        let (exchange, key) = (printable(self.exchange), printable(self.routing_key));
        line(
            out,
            &format!("      exchange: \"{exchange}\", routing key: \"{key}\""),
        );
        line(out, &format!("      body's SHA-256: {}", self.fingerprint));
    }
}

/// `text` without what could move a terminal's cursor or turn its writing
/// round: such characters are shown by their number.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let turns = matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || turns {
            // A String takes whatever it is given.
            write!(out, "{}", c.escape_unicode()).ok();
        } else {
            out.push(c);
        }
    }
    out
}
