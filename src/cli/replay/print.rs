//! What a replay and its plan say.

use serde_json::json;

use super::NAMED_MAX;
use crate::cli::output;
use crate::cli::terminal::{Progress, Table};
use crate::config::checked::Consumer;
use crate::dead_letter::canary::Outcome;
use crate::dead_letter::plan::Standing;
use crate::dead_letter::replay::{self, Action, Event, Hindrance, Order, Report, Way};
use crate::dead_letter::survey::{Prospect, Survey};
use crate::why::printable;

/// Says what goes on.
pub(super) struct Teller {
    json: bool,
    progress: Progress,
    named: u64,
}

impl Teller {
    pub(super) fn new(json: bool, depth: u64) -> Self {
        Self {
            json,
            progress: Progress::new("letters dealt with", depth),
            named: 0,
        }
    }

    pub(super) fn tell(&mut self, event: &Event<'_>) {
        match event {
            Event::Letter(line) => {
                if self.json {
                    // Strings and numbers alone: there is nothing that could fail.
                    let text = serde_json::to_string(line).unwrap_or_default();
                    output(&format!("{text}\n"));
                } else if line.action == Action::Left {
                    self.name(line);
                }
                self.progress.add(1);
            }
            Event::Step(outcome) => self.progress.say(&step(outcome)),
        }
    }

    fn name(&mut self, line: &replay::Line) {
        self.named += 1;
        let named = match self.named {
            few if few <= NAMED_MAX => format!(
                "ackonce: left {}: {}",
                printable(&line.name()),
                printable(&line.why)
            ),
            one if one == NAMED_MAX + 1 => {
                "ackonce: others are left too: --json names them all".to_owned()
            }
            _ => return,
        };
        self.progress.say(&named);
    }

    pub(super) fn finish(self) {
        self.progress.finish();
    }
}

fn step(outcome: &Outcome) -> String {
    format!(
        "ackonce: of {} replayed, {} are applied, {} dead again, {} waiting, {} without a trace",
        outcome.replayed, outcome.applied, outcome.dead_again, outcome.waiting, outcome.unknown
    )
}

pub(super) fn survey_line(prospect: &Prospect<'_>) -> serde_json::Value {
    let judged = prospect.judged;
    let (would, why) = match &prospect.bar {
        Some(why) => (Way::Leave, why),
        None => (prospect.way, &judged.verdict.why),
    };
    let mut line = json!({
        "position": prospect.letter.position,
        "id": judged.id.as_ref().map(ToString::to_string),
        "fingerprint": crate::message::hex(&judged.fingerprint.0),
        "standing": judged.verdict.standing,
        "would": would,
        "why": why,
    });
    if prospect.bar.is_some() {
        line["hindrance"] = json!(Hindrance::NoOrigin);
    }
    line
}

pub(super) fn print_survey(consumer: &Consumer, order: &Order, survey: &Survey, json: bool) {
    let of = |standing| survey.count.of(standing);
    if json {
        let counts: serde_json::Map<_, _> = Standing::ALL
            .into_iter()
            .map(|standing| (standing.as_str().to_owned(), of(standing).into()))
            .collect();
        let summary = json!({ "summary": {
            "consumer": consumer.name, "queue": consumer.topology.dead_letter_queue,
            "depth": survey.depth, "matched": survey.count.total(), "standing": counts,
            "barred": survey.barred,
        }});
        output(&format!("{summary}\n"));
        return;
    }
    let mut table = Table::new(&["LETTERS", "STANDING", "WHAT A REPLAY DOES"]);
    for standing in Standing::ALL {
        table.row(&[
            &of(standing).to_string(),
            standing.as_str(),
            effect(order, standing),
        ]);
    }
    output(&table.text());
    if survey.barred > 0 {
        eprintln!(
            "ackonce: {} of them would be left: their origin is not known, is none of the consumer's \
             bindings, or is the dead-letter queue\n  hint: --to-queue sends them to queue {}",
            survey.barred, consumer.topology.queue
        );
    }
}

fn effect(order: &Order, standing: Standing) -> &'static str {
    match (order.way_of(standing), standing) {
        (Way::Replay, Standing::NeverApplied) => "replays it",
        (Way::Replay, Standing::BeyondRetention) => {
            "replays it, although nobody knows whether it took effect"
        }
        (Way::Replay, _) => "sends it where --to says",
        (Way::Acknowledge, _) => "takes it out of the queue: it took effect",
        (Way::Reprocess, Standing::BeyondRetention) => {
            "applies it, AGAIN if it took effect: nobody knows"
        }
        (Way::Reprocess, Standing::IdConflict) => {
            "applies it: forgets the other body that took effect under its id"
        }
        (Way::Reprocess, _) => "applies it AGAIN: forgets that it took effect",
        (Way::Leave, Standing::InProgress) => "leaves it: it is in work, or waits for a retry",
        (Way::Leave, Standing::BeyondRetention) => "leaves it, unless told --beyond-retention",
        (Way::Leave, Standing::IdConflict) => "leaves it: another body took effect under its id",
        (Way::Leave, Standing::NoId) if !order.force => "leaves it, unless told --to",
        (Way::Leave, _) => "leaves it: the consumer finds no usable id in it",
    }
}

pub(super) fn print_report(consumer: &Consumer, report: &Report, json: bool) {
    if json {
        let mut summary = json!(report);
        summary["consumer"] = json!(consumer.name);
        summary["queue"] = json!(consumer.topology.dead_letter_queue);
        output(&format!("{}\n", json!({ "summary": summary })));
        return;
    }
    let mut text = format!("replayed {}", report.replayed);
    for (count, what) in [
        (report.acknowledged, "taken out as applied before"),
        (report.forgotten, "forgotten first"),
        (report.left(), "left"),
        (report.unconfirmed, "without an answer"),
    ] {
        if count > 0 {
            text.push_str(&format!(", {what} {count}"));
        }
    }
    let standings = report
        .left
        .iter()
        .map(|(standing, n)| (standing.as_str(), n));
    let hindrances = report.hindered.iter().map(|(what, n)| (what.as_str(), n));
    let why: Vec<String> = standings
        .chain(hindrances)
        .map(|(what, count)| format!("{what} {count}"))
        .collect();
    if !why.is_empty() {
        text.push_str(&format!(" ({})", why.join(", ")));
    }
    output(&format!("{text}\n"));
}
