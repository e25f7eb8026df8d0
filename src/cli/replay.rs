//! `ackonce replay`: dead letters back to work.

mod print;

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use print::{Teller, print_report, print_survey, survey_line};

use super::desk::{self, DeskArguments, connect, trouble};
use super::filters::{self, FilterArguments};
use super::terminal::{Progress, confirm, interruptible, operator};
use super::{Exit, output};
use percent_encoding::percent_decode_str;

use crate::broker::publisher::PublishError;
use crate::config::checked::{Config, Consumer};
use crate::config::read_duration;
use crate::dead_letter::canary::Canary;
use crate::dead_letter::desk::Desk;
use crate::dead_letter::filter::Filter;
use crate::dead_letter::lookout::Lookout;
use crate::dead_letter::pace::Rate;
use crate::dead_letter::plan::Standing;
use crate::dead_letter::replay::{self, Cut, Event, Order, Report, Tools, origins};
use crate::dead_letter::republish::Destination;
use crate::dead_letter::survey;
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
    whither: Whither,

    #[command(flatten)]
    origin: OriginArguments,

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
struct Whither {
    /// To the consumer's work queue and no other; so it is unless told otherwise
    #[arg(long)]
    to_queue: bool,

    /// To the exchange each was first published to, with its routing key: other
    /// queues that are bound there get them again. Only to exchanges that the
    /// consumer has bindings to, and to its work queue
    #[arg(long)]
    to_origin: bool,

    /// To this exchange with this routing key, those without a usable id too;
    /// /QUEUE is a queue, and %2F stands for a slash in the exchange's name
    #[arg(long, value_name = "EXCHANGE/KEY", value_parser = destination)]
    to: Option<Destination>,
}

/// Where a replay to the origin may go.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Where to")]
struct OriginArguments {
    /// With --to-origin, also to exchanges that the consumer has no binding to:
    /// wherever a message says that it was published
    #[arg(long, requires = "to_origin")]
    any_origin: bool,
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
         the next replay takes it out. With --to and --to-origin, what was sent and not yet taken \
         out may be sent once more by the next replay, and others than this consumer may act on it \
         twice. Run it again to go on. No more letters are replayed than are there when it begins, \
         each once.\n\n\
         Before it moves, each letter is looked up: never-applied ones run; already-applied ones \
         are only taken out, unless forced; in-progress, beyond-retention, id-conflict and no-id \
         ones are left where they are, unless the options say otherwise. --plan heeds the same \
         options.\n\n{}\n\n{}\n\n\
         --json prints one object a letter: id, fingerprint, standing, why, and hindrance \
         (unroutable, refused, unfit or no-origin) if there is one; without --plan also action \
         (replayed, acknowledged or left); with --plan also position and would (replay, \
         acknowledge, reprocess or leave). At the end {{\"summary\": {{…}}}}.\n\n\
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
    let exchange = percent_decode_str(exchange)
        .decode_utf8()
        .map_err(|_| "%XX in the exchange's name have to be UTF-8")?;
    let fits = |text: &str| text.len() <= 255;
    if !fits(&exchange) || !fits(routing_key) {
        return Err("names have at most 255 bytes".to_owned());
    }
    Ok(Destination::To {
        exchange: exchange.into_owned(),
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
            destination: match &self.whither {
                Whither { to: Some(to), .. } => to.clone(),
                Whither {
                    to_origin: true, ..
                } => Destination::Origin,
                Whither { .. } => Destination::Queue,
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
            any_origin: self.origin.any_origin,
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
        let order = self.order();
        refuse_circles(&order.destination, &consumer)?;
        let (desk, mut lookout) = self.open(&config, &consumer)?;
        let mut progress = Progress::new("letters looked up", desk.depth());
        let found = survey::survey(desk, &mut lookout, filter, &order, stop, |prospect| {
            progress.add(1);
            if self.json {
                output(&format!("{}\n", survey_line(prospect)));
            }
        });
        progress.finish();
        let found = found.map_err(trouble)?;
        print_survey(&consumer, &order, &found, self.json);
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
                match order.any_origin {
                    true => "wherever they say that they came from".to_owned(),
                    false => format!(
                        "where they came from, which may be {}",
                        origins(&consumer.topology)
                    ),
                }
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
            let what = in_both(&self.order().destination);
            eprintln!("ackonce: {} letter(s) {what}", report.unconfirmed);
        }
        Err(status(cut))
    }
}

/// What is to be said of letters that were sent and may not have left the
/// dead-letter queue.
fn in_both(destination: &Destination) -> &'static str {
    match destination {
        Destination::Queue => {
            "may be in both queues: they are applied once, and the next replay takes them out"
        }
        Destination::Origin => {
            "may be in the dead-letter queue and where they came from: this consumer applies them \
             once; other queues that are bound there may get them twice, if they are replayed \
             before this consumer has applied them"
        }
        Destination::To { .. } => {
            "may be in the dead-letter queue and where --to leads: the next replay may send them \
             there once more, and whoever reads there may act on them twice"
        }
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
        Cut::Denied { .. } => Exit::Denied,
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
