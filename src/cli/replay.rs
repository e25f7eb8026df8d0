//! `ackonce replay`: dead letters back to work.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::desk::{self, DeskArguments, connect, trouble};
use super::filters::{self, FilterArguments};
use super::terminal::{Progress, Table, confirm, interruptible, operator};
use super::{Exit, output};
use crate::broker::publisher::PublishError;
use crate::config::checked::{Config, Consumer};
use crate::config::read_duration;
use crate::dead_letter::canary::{Canary, Outcome};
use crate::dead_letter::desk::Desk;
use crate::dead_letter::filter::Filter;
use crate::dead_letter::lookout::Lookout;
use crate::dead_letter::pace::Rate;
use crate::dead_letter::plan::Standing;
use crate::dead_letter::replay::{self, Action, Cut, Event, Order, Report, Tools};
use crate::dead_letter::republish::Destination;
use crate::dead_letter::survey::{self, Survey};
use crate::ledger;
use crate::ledger::desk::Action as Entry;
use crate::random;
use crate::stop::Stop;
use crate::why::printable;

/// How long letters are held before they are given back and taken anew: well
/// under the time after which a desk refuses to go on.
const HOLD: Duration = Duration::from_secs(15 * 60);

/// Longest `--canary-wait`: while it waits, the queue holds what was taken.
const CANARY_WAIT_MAX: Duration = Duration::from_secs(10 * 60);

/// Largest first step of a canary: each letter of it is watched.
const CANARY_MAX: u64 = 10_000;

/// Letters that were left and are named, without --json.
const NAMED_MAX: u64 = 20;

/// Arguments of `ackonce replay`.
#[derive(Debug, Clone, Args)]
#[command(after_help = help())]
pub struct Arguments {
    #[command(flatten)]
    desk: DeskArguments,

    #[command(flatten)]
    filters: FilterArguments,

    #[command(flatten)]
    way: Way,

    #[command(flatten)]
    canary: CanaryArguments,

    #[command(flatten)]
    force: ForceArguments,

    /// Say where each letter stands and what would become of it, and move
    /// nothing
    #[arg(long, visible_alias = "dry-run")]
    plan: bool,

    /// Replay no more than so many
    #[arg(long, value_name = "N")]
    limit: Option<NonZeroU64>,

    /// No more than so many in any second, minute or hour: 100/s, 30/m, 5/h
    #[arg(long, value_name = "N/s")]
    rate: Option<Rate>,

    /// Also those that are older than the ledger remembers: it cannot tell
    /// whether they were applied
    #[arg(long)]
    beyond_retention: bool,

    /// Do not ask
    #[arg(long)]
    yes: bool,

    /// Print lines of JSON, the last one a summary
    #[arg(long)]
    json: bool,
}

/// Where letters go.
#[derive(Debug, Clone, Args)]
#[group(multiple = false)]
#[command(next_help_heading = "Where to")]
struct Way {
    /// To the consumer's work queue and no other; so it is unless told otherwise
    #[arg(long)]
    to_queue: bool,

    /// To the exchange each was first published to, with its routing key: other
    /// queues that are bound there get them again
    #[arg(long)]
    to_origin: bool,

    /// To this exchange with this routing key, those without a usable id too;
    /// /QUEUE is a queue
    #[arg(long, value_name = "EXCHANGE/KEY", value_parser = destination)]
    to: Option<Destination>,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "In steps")]
struct CanaryArguments {
    /// Replay N, then ten times as many, then the rest: each step only when
    /// enough of those before was applied
    #[arg(long, value_name = "N", conflicts_with = "to",
          value_parser = clap::value_parser!(u64).range(1..=CANARY_MAX))]
    canary: Option<u64>,

    /// Stop when more than this share of the replayed is not applied
    #[arg(long, value_name = "PERCENT", default_value_t = 10, requires = "canary",
          value_parser = clap::value_parser!(u8).range(0..=100))]
    abort_at: u8,

    /// Longest wait for what becomes of a step, such as 30s, up to 10m
    #[arg(long, value_name = "DURATION", default_value = "1m", requires = "canary",
          value_parser = canary_wait)]
    canary_wait: Duration,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Once more")]
struct ForceArguments {
    /// Apply this one again although it was applied: forget its ledger row and
    /// its mark in Redis, then replay it; may be repeated
    #[arg(long, value_name = "ID", requires = "because",
          conflicts_with_all = ["limit", "canary", "beyond_retention", "to", "reason", "since",
                                "until", "id", "ids_file", "places", "routing_key", "headers"])]
    force_reprocess: Vec<String>,

    /// As --force-reprocess, for each line of FILE; `-` for standard input
    #[arg(long, value_name = "FILE", requires = "because",
          conflicts_with_all = ["limit", "canary", "beyond_retention", "to", "reason", "since",
                                "until", "id", "ids_file", "places", "routing_key", "headers"])]
    force_reprocess_file: Option<PathBuf>,

    /// Why, for the journal
    #[arg(long, value_name = "TEXT", value_parser = because)]
    because: Option<String>,
}

impl ForceArguments {
    fn is_asked_for(&self) -> bool {
        !self.force_reprocess.is_empty() || self.force_reprocess_file.is_some()
    }

    /// Letters by id, as a filter.
    fn filters(&self) -> FilterArguments {
        FilterArguments {
            id: self.force_reprocess.clone(),
            ids_file: self.force_reprocess_file.clone(),
            ..FilterArguments::default()
        }
    }
}

fn help() -> String {
    format!(
        "A letter is published, confirmed, and only then taken out of the dead-letter queue. \
         Nothing that ends a replay loses one; what is in both queues by then is applied once, and \
         the next replay takes it out. Run it again to go on. Only the letters that are there when \
         it begins are replayed, each once.\n\n\
         Before it moves, each letter is looked up: never-applied ones run; already-applied ones \
         are only taken out; in-progress, beyond-retention, id-conflict and no-id ones are left \
         where they are.\n\n{}\n\n{}\n\n\
         --json prints one object a letter: id, fingerprint, standing, why; without --plan also \
         action (replayed, acknowledged or left) and hindrance (unroutable, refused or unfit); \
         with --plan also position. At the end {{\"summary\": {{…}}}}.\n\n\
         Exit status: 0 done, 1 something was left or it ended before its end, 2 bad arguments, 69 \
         a server cannot be reached, 75 somebody else works on these dead letters, or try again \
         later, 77 denied, 78 bad configuration, schema or queue, 130 interrupted.",
        filters::HELP,
        desk::HELP,
    )
}

fn destination(text: &str) -> Result<Destination, String> {
    let (exchange, routing_key) = text
        .split_once('/')
        .ok_or("it is EXCHANGE/KEY; a queue is /QUEUE")?;
    let fits = |text: &str| text.len() <= 255;
    if !fits(exchange) || !fits(routing_key) {
        return Err("names have at most 255 bytes".to_owned());
    }
    Ok(Destination::To {
        exchange: exchange.to_owned(),
        routing_key: routing_key.to_owned(),
    })
}

fn canary_wait(text: &str) -> Result<Duration, String> {
    match read_duration(text)? {
        long if long > CANARY_WAIT_MAX => Err("is longer than 10m".to_owned()),
        duration => Ok(duration),
    }
}

fn because(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("says nothing".to_owned()),
        text => Ok(text.to_owned()),
    }
}

/// Replays, or says what would be.
///
/// # Errors
///
/// The exit status.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let forced = arguments.force.is_asked_for();
    if arguments.force.because.is_some() && !forced {
        eprintln!("ackonce: --because goes with --force-reprocess");
        return Err(Exit::Usage);
    }
    let filters = match forced {
        true => arguments.force.filters(),
        false => arguments.filters.clone(),
    };
    let filter = filters.filter()?;
    let typed = filters.typed();
    let arguments = arguments.clone();
    interruptible(move |stop| match arguments.plan {
        true => arguments.survey(&filter, stop),
        false => arguments.replay(&filter, &typed, stop),
    })
}

impl Arguments {
    fn order(&self) -> Order {
        Order {
            destination: match &self.way {
                Way { to: Some(to), .. } => to.clone(),
                Way {
                    to_origin: true, ..
                } => Destination::Origin,
                Way { .. } => Destination::Queue,
            },
            limit: self.limit.map(NonZeroU64::get),
            rate: self.rate,
            canary: self.canary.canary.map(|first| Canary {
                first,
                abort_at: self.canary.abort_at,
                wait: self.canary.canary_wait,
            }),
            beyond_retention: self.beyond_retention,
            force: self.force.is_asked_for(),
            despite_limit: self.desk.despite_delivery_limit,
            hold: HOLD,
        }
    }

    /// An open desk, and who looks its letters up.
    fn open<'a>(
        &self,
        config: &'a Config,
        consumer: &'a Consumer,
    ) -> Result<(Desk<'a>, Lookout<'a>), Exit> {
        let mut desk = self.desk.open(config, consumer, "replay")?;
        let known = ledger::replay::registration(desk.session(), &consumer.name);
        let known = known.map_err(|error| trouble(error.into()))?;
        let lookout = Lookout::new(config, consumer, &known);
        Ok((desk, lookout))
    }

    fn survey(&self, filter: &Filter, stop: &Stop) -> Result<Exit, Exit> {
        let (config, consumer) = self.desk.load()?;
        let (desk, mut lookout) = self.open(&config, &consumer)?;
        let limit = self.limit.map(NonZeroU64::get);
        let mut progress = Progress::new("letters looked up", desk.depth());
        let found = survey::survey(desk, &mut lookout, filter, limit, stop, |letter, judged| {
            progress.add(1);
            if self.json {
                let line = json!({
                    "position": letter.position,
                    "id": judged.id.as_ref().map(ToString::to_string),
                    "fingerprint": crate::message::hex(&judged.fingerprint.0),
                    "standing": judged.verdict.standing,
                    "why": judged.verdict.why,
                });
                output(&format!("{line}\n"));
            }
        });
        progress.finish();
        let found = found.map_err(trouble)?;
        print_survey(&consumer, &found, self.json);
        Ok(Exit::Success)
    }

    fn replay(&self, filter: &Filter, typed: &str, stop: &Stop) -> Result<Exit, Exit> {
        let (config, consumer) = self.desk.load()?;
        let order = self.order();
        refuse_circles(&order.destination, &consumer)?;
        let (mut desk, lookout) = self.open(&config, &consumer)?;
        self.ask(&order, desk.depth(), &consumer, typed)?;
        let entry = Entry {
            consumer: &consumer.name,
            action: match order.force {
                true => "force-reprocess",
                false => "replay",
            },
            operator: &operator(),
            because: self.force.because.as_deref(),
            filter: typed,
            file: None,
        };
        let action = desk.begin(&entry).map_err(trouble)?;
        let mut teller = Teller::new(self.json, desk.depth());
        let tools = Tools {
            config: &config,
            desk,
            lookout,
            action,
            filter,
            queue: &consumer.topology.queue,
            stop,
        };
        let run = format!("{:016x}{:016x}", random::draw(), random::draw());
        let mut tell = |event: Event<'_>| teller.tell(&event);
        let (report, cut) = replay::run(&order, tools, run, &mut tell);
        teller.finish();
        print_report(&consumer, &report, self.json);
        self.exit(&report, cut)
    }

    fn ask(&self, order: &Order, depth: u64, consumer: &Consumer, typed: &str) -> Result<(), Exit> {
        let queue = &consumer.topology.queue;
        let to = match &order.destination {
            Destination::Queue => format!("queue {queue}"),
            Destination::Origin => {
                eprintln!(
                    "ackonce: warning: other queues that are bound where the letters came from get \
                     them again, and a queue that is no longer bound there gets none\n  hint: \
                     --to-queue sends them to queue {queue} alone"
                );
                "where they came from".to_owned()
            }
            Destination::To {
                exchange,
                routing_key,
            } if exchange.is_empty() => format!("queue {}", printable(routing_key)),
            Destination::To {
                exchange,
                routing_key,
            } => format!(
                "exchange {} with routing key {}",
                printable(exchange),
                printable(routing_key)
            ),
        };
        let dead = &consumer.topology.dead_letter_queue;
        let question = match order.force {
            true => format!(
                "forget that these were applied, and apply them AGAIN ({})?",
                printable(typed)
            ),
            false => format!(
                "replay the dead letters of queue {dead} ({depth} are there; {}) to {to}?",
                printable(typed)
            ),
        };
        match depth {
            0 => Ok(()),
            _ => confirm(&question, self.yes),
        }
    }

    fn exit(&self, report: &Report, cut: Option<Cut>) -> Result<Exit, Exit> {
        let Some(cut) = cut else {
            let in_work = report.left.get(&Standing::InProgress).copied().unwrap_or(0);
            if self.force.is_asked_for() && report.matched == 0 {
                eprintln!(
                    "ackonce: there is no dead letter of that id\n  hint: only what is in the \
                     dead-letter queue can be applied again: publish others with `ackonce publish`"
                );
                return Err(Exit::Partial);
            }
            return match report.left() {
                0 => Ok(Exit::Success),
                left if left == in_work => Err(Exit::TryAgain),
                _ => Err(Exit::Partial),
            };
        };
        if report.unconfirmed > 0 {
            eprintln!(
                "ackonce: {} letter(s) may be in both queues: they are applied once, and the next \
                 replay takes them out",
                report.unconfirmed
            );
        }
        Err(status(cut))
    }
}

/// Says what cut a replay short, and with which status to leave.
fn status(cut: Cut) -> Exit {
    if let Cut::Desk(cause) = cut {
        return trouble(cause);
    }
    eprintln!("ackonce: {cut}");
    match cut {
        Cut::Stopped | Cut::Canary { .. } => Exit::Partial,
        Cut::Connect(error) => connect(&error),
        Cut::Publish(PublishError::NoRoom { .. }) | Cut::Unconfirmed { .. } => Exit::TryAgain,
        Cut::Desk(_) | Cut::Publish(_) | Cut::Lost { .. } | Cut::Claims { .. } => Exit::Unreachable,
    }
}

/// Letters that are sent to where they are would go round for ever, replay
/// after replay.
fn refuse_circles(destination: &Destination, consumer: &Consumer) -> Result<(), Exit> {
    let topology = &consumer.topology;
    let (dead_queue, dead_exchange) = (&topology.dead_letter_queue, &topology.dead_letter_exchange);
    match destination {
        Destination::To {
            exchange,
            routing_key,
        } if exchange == dead_exchange || (exchange.is_empty() && routing_key == dead_queue) => {
            eprintln!("ackonce: --to leads to the dead-letter queue they are in");
            Err(Exit::Usage)
        }
        _ => Ok(()),
    }
}

/// Says what goes on.
struct Teller {
    json: bool,
    progress: Progress,
    named: u64,
}

impl Teller {
    fn new(json: bool, depth: u64) -> Self {
        Self {
            json,
            progress: Progress::new("letters dealt with", depth),
            named: 0,
        }
    }

    fn tell(&mut self, event: &Event<'_>) {
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

    fn finish(self) {
        self.progress.finish();
    }
}

fn step(outcome: &Outcome) -> String {
    format!(
        "ackonce: of {} replayed, {} are applied, {} dead again, {} waiting, {} without a trace",
        outcome.replayed, outcome.applied, outcome.dead_again, outcome.waiting, outcome.unknown
    )
}

fn print_survey(consumer: &Consumer, survey: &Survey, json: bool) {
    let of = |standing| survey.count.of(standing);
    if json {
        let counts: serde_json::Map<_, _> = Standing::ALL
            .into_iter()
            .map(|standing| (standing.as_str().to_owned(), of(standing).into()))
            .collect();
        let summary = json!({ "summary": {
            "consumer": consumer.name, "queue": consumer.topology.dead_letter_queue,
            "depth": survey.depth, "matched": survey.count.total(), "standing": counts,
        }});
        output(&format!("{summary}\n"));
        return;
    }
    let mut table = Table::new(&["LETTERS", "STANDING", "WHAT A REPLAY DOES"]);
    for standing in Standing::ALL {
        table.row(&[
            &of(standing).to_string(),
            standing.as_str(),
            effect(standing),
        ]);
    }
    output(&table.text());
}

fn effect(standing: Standing) -> &'static str {
    match standing {
        Standing::NeverApplied => "replays it",
        Standing::AlreadyApplied => "takes it out of the queue: it took effect",
        Standing::InProgress => "leaves it: it is in work, or waits for a retry",
        Standing::BeyondRetention => "leaves it, unless told --beyond-retention",
        Standing::IdConflict => "leaves it: another body took effect under its id",
        Standing::NoId => "leaves it, unless told --to",
    }
}

fn print_report(consumer: &Consumer, report: &Report, json: bool) {
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
