//! `ackonce dead drop`: letters taken out of the queue for good.

use std::collections::HashMap;
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use serde_json::json;

use super::export::Out;
use crate::broker::desk::Ticket;
use crate::cli::desk::{self, DeskArguments, Seen, look, trouble, walk};
use crate::cli::filters::{self, FilterArguments};
use crate::cli::terminal::{Progress, Table, confirm, interruptible, operator};
use crate::cli::{Exit, output};
use crate::config::checked::{Config, Consumer};
use crate::dead_letter::desk::Desk;
use crate::dead_letter::file;
use crate::dead_letter::filter::Filter;
use crate::dead_letter::letter::Letter;
use crate::dead_letter::tally::{By, Tally};
use crate::dead_letter::view;
use crate::ledger::desk::{Action, ActionId, Key};
use crate::message::Fingerprint;
use crate::stop::Stop;

/// Arguments of `ackonce dead drop`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = help(),
    group(ArgGroup::new("copy").args(["export", "no_export", "dry_run"]).required(true))
)]
pub(super) struct Arguments {
    #[command(flatten)]
    desk: DeskArguments,

    #[command(flatten)]
    filters: FilterArguments,

    /// Drop all letters: without it, say which
    #[arg(long)]
    all: bool,

    /// Write each letter to FILE before it is dropped; FILE must not exist
    #[arg(long, value_name = "FILE")]
    export: Option<PathBuf>,

    /// Keep no copy of what is dropped
    #[arg(long)]
    no_export: bool,

    /// Why, for the journal
    #[arg(long, value_name = "TEXT", required_unless_present = "dry_run")]
    because: Option<String>,

    /// Only count what would be dropped
    #[arg(long)]
    dry_run: bool,

    /// Do not ask
    #[arg(long)]
    yes: bool,

    /// Print lines of JSON, the last one a summary
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// The file that the letters go to, as it was named.
    fn file(&self) -> Option<String> {
        let path = self.export.as_ref();
        path.map(|path| path.display().to_string())
    }
}

fn help() -> String {
    format!(
        "Who dropped which letters when, and why, is written to ackonce.desk_action and \
         ackonce.desk_letter in PostgreSQL, and the letters to FILE, before the broker is told. \
         Interrupted, it leaves a letter in the queue or in both, and run again it goes on. \
         What is asked is asked about the letters that are there at that moment: those that die \
         while you think are not dropped.\n\n\
         --json prints one object for each letter that left the queue, as `dead list` does, with \
         {{\"action\": \"dropped\"}}; with --dry-run for each that would, with \
         {{\"would\": \"drop\"}}; and at the end {{\"summary\": {{consumer, queue, depth, read, \
         meant, dropped, file}}}}, also when it ended before its end.\n\n{}\n\n{}\n\n{}",
        filters::HELP,
        desk::HELP,
        desk::STATUS
    )
}

/// Drops them.
pub(super) fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let filter = arguments.filters.filter()?;
    if filter.is_empty() != arguments.all {
        let wrong = match arguments.all {
            true => "ackonce: --all and a filter were given\n  hint: give one of them",
            false => {
                "ackonce: it is not said which letters\n  hint: give a filter, such as --reason, \
                 or --all"
            }
        };
        eprintln!("{wrong}");
        return Err(Exit::Usage);
    }
    let arguments = arguments.clone();
    interruptible(move |stop| drop_letters(&arguments, &filter, stop))
}

fn drop_letters(arguments: &Arguments, filter: &Filter, stop: &Stop) -> Result<Exit, Exit> {
    let (config, consumer) = arguments.desk.load()?;
    let mut only = None;
    if arguments.dry_run || !arguments.yes {
        let desk = arguments.desk.open(&config, &consumer, "dead drop")?;
        let survey = survey(desk, filter, stop, arguments.dry_run && arguments.json)?;
        if arguments.dry_run || survey.seen.meant == 0 {
            match arguments.json {
                true => print_summary(&consumer, arguments, &survey.seen, 0),
                false => output(&survey.text),
            }
            eprintln!(
                "ackonce: {} of {} letters are meant",
                survey.seen.meant, survey.seen.read
            );
            return Ok(Exit::Success);
        }
        eprint!("{}", survey.text);
        let count = survey.seen.meant;
        let queue = &consumer.topology.dead_letter_queue;
        confirm(
            &format!("drop these {count} letters from queue {queue}?"),
            false,
        )?;
        only = Some(survey.letters);
    }
    carry_out((&config, &consumer, arguments), (filter, only), stop)
}

/// The letters that were asked about, and how many there were of each. Two that
/// differ in their id are two, though their bodies be the same.
#[derive(Default)]
struct Known(HashMap<(Option<String>, Fingerprint), u64>);

impl Known {
    fn add(&mut self, (id, fingerprint): Key<'_>) {
        let letter = (id.map(str::to_owned), fingerprint);
        *self.0.entry(letter).or_default() += 1;
    }

    /// Whether it is one of them; as many times as there were of it.
    fn take(&mut self, (id, fingerprint): Key<'_>) -> bool {
        let letter = (id.map(str::to_owned), fingerprint);
        let left = self.0.get_mut(&letter).filter(|left| **left > 0);
        left.map(|left| *left -= 1).is_some()
    }
}

/// What would be dropped.
struct Survey {
    seen: Seen,
    text: String,
    letters: Known,
}

/// With `lines` it says of each letter what would be done.
fn survey(desk: Desk<'_>, filter: &Filter, stop: &Stop, lines: bool) -> Result<Survey, Exit> {
    let mut tally = Tally::new(By::Reason);
    let mut letters = Known::default();
    let seen = look(desk, filter, stop, |letter| {
        if lines {
            print_line(letter, "would", "drop");
        }
        tally.add(letter);
        letters.add(letter.key());
        Ok(())
    })?;
    let mut table = Table::new(&["LETTERS", "REASON"]);
    for (name, group) in tally.groups() {
        table.row(&[&group.letters.to_string(), &name.unwrap_or_default()]);
    }
    Ok(Survey {
        seen,
        text: table.text(),
        letters,
    })
}

type Place<'a> = (&'a Config, &'a Consumer, &'a Arguments);
type Wanted<'a> = (&'a Filter, Option<Known>);

fn carry_out(
    (config, consumer, arguments): Place<'_>,
    (filter, mut only): Wanted<'_>,
    stop: &Stop,
) -> Result<Exit, Exit> {
    let mut desk = arguments.desk.open(config, consumer, "dead drop")?;
    let mut out = arguments.export.as_deref().map(Out::create).transpose()?;
    let action = begin(&mut desk, consumer, arguments)?;
    let mut seen = Seen {
        depth: desk.depth(),
        ..Seen::default()
    };
    let mut dropped = 0;
    let mut progress = Progress::new("letters read", desk.depth());
    let walked = walk(&mut desk, stop, &mut progress, |desk, letters| {
        let mut chosen = Vec::new();
        for (letter, ticket) in letters {
            let is_known = |only: &mut Known| only.take(letter.key());
            if seen.count(filter, &letter) && only.as_mut().is_none_or(is_known) {
                chosen.push((letter, ticket));
            }
        }
        let gone = drop_chunk(desk, action, consumer, out.as_mut(), chosen)?;
        dropped += gone.len() as u64;
        if arguments.json {
            gone.iter().for_each(|l| print_line(l, "action", "dropped"));
        }
        Ok(())
    });
    progress.finish();
    seen.warn();
    match arguments.json {
        true => print_summary(consumer, arguments, &seen, dropped),
        false => output(&format!("dropped {dropped} letters\n")),
    }
    let ended = desk.end(action).map_err(trouble);
    let given_back = desk.give_back().map_err(trouble);
    // One that has lines in it may be all there is of a letter.
    if let Some(out) = out.filter(Out::is_empty) {
        out.remove();
    }
    walked.and(ended).and(given_back).map(|()| Exit::Success)
}

fn begin(
    desk: &mut Desk<'_>,
    consumer: &Consumer,
    arguments: &Arguments,
) -> Result<ActionId, Exit> {
    let file = arguments.file();
    let action = Action {
        consumer: &consumer.name,
        action: "drop",
        operator: &operator(),
        because: arguments.because.as_deref(),
        filter: &arguments.filters.typed(),
        file: file.as_deref(),
    };
    desk.begin(&action).map_err(trouble)
}

/// File, journal, broker, in this order. Returns what has left the queue.
fn drop_chunk(
    desk: &mut Desk<'_>,
    action: ActionId,
    consumer: &Consumer,
    out: Option<&mut Out>,
    letters: Vec<(Letter, Ticket)>,
) -> Result<Vec<Letter>, Exit> {
    if letters.is_empty() {
        return Ok(Vec::new());
    }
    let (letters, tickets): (Vec<Letter>, Vec<Ticket>) = letters.into_iter().unzip();
    if let Some(out) = out {
        for letter in &letters {
            out.write(&file::line(letter, consumer))?;
        }
        out.sync()?;
    }
    let keys: Vec<Key<'_>> = letters.iter().map(Letter::key).collect();
    desk.note(action, &keys).map_err(trouble)?;
    for ticket in tickets {
        desk.ack(ticket).map_err(trouble)?;
    }
    desk.settle().map_err(trouble)?;
    Ok(letters)
}

fn print_line(letter: &Letter, member: &str, what: &str) {
    let mut line = view::summary(letter);
    line[member] = json!(what);
    output(&format!("{line}\n"));
}

fn print_summary(consumer: &Consumer, arguments: &Arguments, seen: &Seen, dropped: u64) {
    let more = [
        ("dropped", json!(dropped)),
        ("file", json!(arguments.file())),
    ];
    output(&format!("{}\n", seen.summary(consumer, more)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_with_the_body_of_another_was_not_asked_about() {
        let (same, other) = (Fingerprint([1; 32]), Fingerprint([2; 32]));
        let mut known = Known::default();
        known.add((Some("a"), same));
        known.add((Some("twin"), same));
        known.add((Some("twin"), same));
        known.add((None, same));
        assert!(!known.take((Some("b"), same)));
        assert!(!known.take((Some("a"), other)));
        assert!(known.take((Some("a"), same)));
        assert!(!known.take((Some("a"), same)));
        assert!(known.take((None, same)));
        assert!(!known.take((None, same)));
        let twins = (0..3).filter(|_| known.take((Some("twin"), same)));
        assert_eq!(twins.count(), 2);
    }
}
