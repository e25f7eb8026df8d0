//! `ackonce dead list`: what is dead.

use clap::{Args, ValueEnum};
use serde_json::json;

use crate::cli::desk::{self, DeskArguments, Seen, look};
use crate::cli::filters::{self, FilterArguments};
use crate::cli::terminal::{Table, cut, interruptible};
use crate::cli::{Exit, output};
use crate::config::checked::Consumer;
use crate::dead_letter::filter::Filter;
use crate::dead_letter::letter::Letter;
use crate::dead_letter::tally::{By, Tally};
use crate::dead_letter::view;
use crate::stop::Stop;

/// Rows of a table, unless told otherwise.
const ROWS: u64 = 1_000;

/// Longest error in a row, in characters.
const ERROR_MAX: usize = 120;

/// Arguments of `ackonce dead list`.
#[derive(Debug, Clone, Args)]
#[command(after_help = help())]
pub(super) struct Arguments {
    #[command(flatten)]
    desk: DeskArguments,

    #[command(flatten)]
    filters: FilterArguments,

    /// Count letters in groups instead, at most 10,000 of them
    #[arg(long, value_name = "WHAT")]
    group_by: Option<GroupBy>,

    /// Print no more than so many; 1,000 unless told otherwise, all with --json
    #[arg(long, value_name = "N")]
    limit: Option<u64>,

    /// Print lines of JSON, the last one a summary
    #[arg(long)]
    json: bool,
}

fn help() -> String {
    format!(
        "{}\n\n{}\n\n--json prints one object a letter: position, id, fingerprint, died_at, \
         reason, class, code, attempts, error, size, exchange, routing_key, returns; with \
         --group-by one a group: group, name, letters, bytes, oldest, newest; and at the end \
         {{\"summary\": {{consumer, queue, depth, read, meant, printed}}}}. A name that is null \
         stands for all groups beyond 10,000.\n\n{}",
        filters::HELP,
        desk::HELP,
        desk::STATUS
    )
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum GroupBy {
    /// Why they are dead
    Reason,
    /// Code and first line of the error
    Error,
    /// Routing key they were first published with
    RoutingKey,
}

impl GroupBy {
    fn by(self) -> By {
        match self {
            Self::Reason => By::Reason,
            Self::Error => By::Error,
            Self::RoutingKey => By::RoutingKey,
        }
    }
}

/// Lists on standard output.
pub(super) fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let filter = arguments.filters.filter()?;
    let arguments = arguments.clone();
    interruptible(move |stop| list(&arguments, &filter, stop))
}

fn list(arguments: &Arguments, filter: &Filter, stop: &Stop) -> Result<Exit, Exit> {
    let (config, consumer) = arguments.desk.load()?;
    let desk = arguments.desk.open(&config, &consumer, "dead list")?;
    let limit = match (arguments.limit, arguments.json) {
        (Some(limit), _) => limit,
        (None, true) => u64::MAX,
        (None, false) => ROWS,
    };
    let (seen, printed) = match (arguments.group_by, arguments.json) {
        (Some(by), json) => {
            let mut tally = Tally::new(by.by());
            let seen = look(desk, filter, stop, |letter| {
                tally.add(letter);
                Ok(())
            })?;
            (seen, print_groups(by.by(), tally, json, limit))
        }
        (None, true) => {
            let mut printed = 0;
            let seen = look(desk, filter, stop, |letter| {
                if printed < limit {
                    printed += 1;
                    output(&format!("{}\n", view::summary(letter)));
                }
                Ok(())
            })?;
            (seen, printed)
        }
        (None, false) => {
            let mut table = Table::new(&[
                "ID",
                "DIED AT",
                "REASON",
                "CLASS",
                "TRIES",
                "SIZE",
                "ROUTING KEY",
                "ERROR",
            ]);
            let mut printed = 0;
            let seen = look(desk, filter, stop, |letter| {
                if printed < limit {
                    printed += 1;
                    row(&mut table, letter);
                }
                Ok(())
            })?;
            if printed > 0 {
                output(&table.text());
            }
            (seen, printed)
        }
    };
    match arguments.json {
        true => print_summary(&consumer, &seen, printed),
        false => say_summary(&consumer, &seen, printed, arguments.group_by.is_some()),
    }
    Ok(Exit::Success)
}

fn row(table: &mut Table, letter: &Letter) {
    let class = match (letter.class(), letter.code()) {
        (Some(class), Some(code)) => format!("{class} {code}"),
        (class, _) => class.unwrap_or("-").to_owned(),
    };
    table.row(&[
        &letter.name(),
        &letter.died_at_text().unwrap_or_else(|| "-".to_owned()),
        letter.reason(),
        &class,
        &letter.attempts().to_string(),
        &letter.size().to_string(),
        letter.routing_key(),
        &cut(letter.error_line(), ERROR_MAX),
    ]);
}

/// How many were printed.
fn print_groups(by: By, tally: Tally, json: bool, limit: u64) -> u64 {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let mut groups = tally.groups();
    groups.truncate(limit);
    let printed = groups.len() as u64;
    let heading = by.as_str().to_ascii_uppercase().replace('-', " ");
    let mut table = Table::new(&["LETTERS", "BYTES", "OLDEST", "NEWEST", &heading]);
    for (name, group) in groups {
        if json {
            let mut line = json!({ "group": by.as_str(), "name": name });
            if let (Some(line), Ok(serde_json::Value::Object(group))) =
                (line.as_object_mut(), serde_json::to_value(&group))
            {
                line.extend(group);
            }
            output(&format!("{line}\n"));
            continue;
        }
        let moment = |at: Option<String>| at.unwrap_or_else(|| "-".to_owned());
        table.row(&[
            &group.letters.to_string(),
            &group.bytes.to_string(),
            &moment(group.oldest()),
            &moment(group.newest()),
            &name.map_or_else(
                || "(all others)".to_owned(),
                |name| {
                    if name.is_empty() {
                        "(none)".to_owned()
                    } else {
                        name
                    }
                },
            ),
        ]);
    }
    if !json && printed > 0 {
        output(&table.text());
    }
    printed
}

fn print_summary(consumer: &Consumer, seen: &Seen, printed: u64) {
    let more = [("printed", json!(printed))];
    output(&format!("{}\n", seen.summary(consumer, more)));
}

fn say_summary(consumer: &Consumer, seen: &Seen, printed: u64, grouped: bool) {
    let queue = &consumer.topology.dead_letter_queue;
    let what = if grouped { "groups" } else { "letters" };
    eprintln!(
        "ackonce: {} of the {} letters in queue {queue} are meant; {printed} {what} shown",
        seen.meant, seen.read
    );
}
