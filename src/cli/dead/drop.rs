//! `ackonce dead drop`: letters taken out of the queue for good.

use std::collections::HashMap;
use std::path::PathBuf;

use clap::{ArgGroup, Args};

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
}

fn help() -> String {
    format!(
        "Who dropped which letters when, and why, is written to ackonce.desk_action and \
         ackonce.desk_letter in PostgreSQL, and the letters to FILE, before the broker is told. \
         Interrupted, it leaves a letter in the queue or in both, and run again it goes on. \
         What is asked is asked about the letters that are there at that moment: those that die \
         while you think are not dropped.\n\n{}\n\n{}\n\n{}",
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
        let survey = survey(desk, filter, stop)?;
        if arguments.dry_run || survey.seen.meant == 0 {
            output(&survey.text);
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
    let mut dropped = 0;
    let place = (&config, &consumer, arguments);
    let result = carry_out(place, (filter, only), stop, &mut dropped);
    output(&format!("dropped {dropped} letters\n"));
    result
}

/// What would be dropped.
struct Survey {
    seen: Seen,
    text: String,
    letters: HashMap<Fingerprint, u64>,
}

fn survey(desk: Desk<'_>, filter: &Filter, stop: &Stop) -> Result<Survey, Exit> {
    let mut tally = Tally::new(By::Reason);
    let mut letters = HashMap::new();
    let seen = look(desk, filter, stop, |letter| {
        tally.add(letter);
        *letters.entry(letter.fingerprint).or_default() += 1;
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
type Wanted<'a> = (&'a Filter, Option<HashMap<Fingerprint, u64>>);

fn carry_out(
    (config, consumer, arguments): Place<'_>,
    (filter, mut only): Wanted<'_>,
    stop: &Stop,
    dropped: &mut u64,
) -> Result<Exit, Exit> {
    let mut desk = arguments.desk.open(config, consumer, "dead drop")?;
    let mut out = arguments.export.as_deref().map(Out::create).transpose()?;
    let action = begin(&mut desk, consumer, arguments)?;
    let mut seen = Seen::default();
    let mut progress = Progress::new("letters read", desk.depth());
    let walked = walk(&mut desk, stop, &mut progress, |desk, letters| {
        let mut chosen = Vec::new();
        for (letter, ticket) in letters {
            if seen.count(filter, &letter) && is_known(only.as_mut(), letter.fingerprint) {
                chosen.push((letter, ticket));
            }
        }
        *dropped += drop_chunk(desk, action, consumer, out.as_mut(), chosen)?;
        Ok(())
    });
    progress.finish();
    seen.warn();
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
    let file = arguments
        .export
        .as_ref()
        .map(|path| path.display().to_string());
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

/// Whether it is one of those that were asked about.
fn is_known(only: Option<&mut HashMap<Fingerprint, u64>>, fingerprint: Fingerprint) -> bool {
    let Some(only) = only else {
        return true;
    };
    match only.get_mut(&fingerprint) {
        Some(left) if *left > 0 => {
            *left -= 1;
            true
        }
        _ => false,
    }
}

/// File, journal, broker, in this order.
fn drop_chunk(
    desk: &mut Desk<'_>,
    action: ActionId,
    consumer: &Consumer,
    out: Option<&mut Out>,
    letters: Vec<(Letter, Ticket)>,
) -> Result<u64, Exit> {
    if letters.is_empty() {
        return Ok(0);
    }
    if let Some(out) = out {
        for (letter, _) in &letters {
            out.write(&file::line(letter, consumer))?;
        }
        out.sync()?;
    }
    let keys: Vec<Key<'_>> = letters.iter().map(|(letter, _)| letter.key()).collect();
    desk.note(action, &keys).map_err(trouble)?;
    let count = letters.len() as u64;
    for (_, ticket) in letters {
        desk.ack(ticket).map_err(trouble)?;
    }
    desk.settle().map_err(trouble)?;
    Ok(count)
}
