//! `ackonce dead show`: everything about one letter.

use clap::Args;
use serde_json::json;

use crate::cli::desk::{self, DeskArguments, look};
use crate::cli::migrate::{open_current, report};
use crate::cli::terminal::interruptible;
use crate::cli::{Exit, output};
use crate::config::checked::Consumer;
use crate::dead_letter::file;
use crate::dead_letter::filter::Filter;
use crate::dead_letter::letter::Letter;
use crate::dead_letter::view;
use crate::ledger::story;
use crate::postgres::Session;
use crate::stop::Stop;
use crate::why::{Answer, printable};

/// Most letters of one name that are shown.
const LETTERS_MAX: usize = 100;

/// Most bytes of their bodies together that are kept until they are shown.
const BYTES_MAX: usize = 64 << 20;

/// Arguments of `ackonce dead show`.
#[derive(Debug, Clone, Args)]
#[command(after_help = help())]
pub(super) struct Arguments {
    #[command(flatten)]
    desk: DeskArguments,

    /// The letter's id; or sha256: and at least 8 digits of its body's SHA-256
    #[arg(value_name = "ID")]
    id: String,

    /// Show so many bytes of the body
    #[arg(long, value_name = "BYTES", default_value_t = 4_096)]
    body_max: usize,

    /// Print each letter as a line of JSON, as `dead export` does, with its
    /// timeline
    #[arg(long, conflicts_with = "body_max")]
    json: bool,
}

fn help() -> String {
    format!(
        "Several letters may have one id: all are shown, at most 100. A body that is JSON is \
         shown with its lines indented, other text as it is, the rest in hex. The timeline is \
         that of `ackonce why`. Put -- before an id that begins with a dash.\n\n{}\n\nExit \
         status: as of `dead list`; 1 when there is no such letter.",
        desk::HELP
    )
}

/// Shows it on standard output.
pub(super) fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let mut filter = Filter::default();
    filter.id(&arguments.id).map_err(|error| {
        eprintln!("ackonce: {error}");
        Exit::Usage
    })?;
    let arguments = arguments.clone();
    interruptible(move |stop| show(&arguments, &filter, stop))
}

fn show(arguments: &Arguments, filter: &Filter, stop: &Stop) -> Result<Exit, Exit> {
    let (config, consumer) = arguments.desk.load()?;
    let desk = arguments.desk.open(&config, &consumer, "dead show")?;
    let (mut letters, mut bytes) = (Vec::<Letter>::new(), 0);
    let seen = look(desk, filter, stop, |letter| {
        bytes += letter.size();
        if letters.is_empty() || (letters.len() < LETTERS_MAX && bytes <= BYTES_MAX) {
            letters.push(letter.clone());
        }
        Ok(())
    })?;
    if letters.is_empty() {
        eprintln!(
            "ackonce: none of the {} letters in queue {} has the id {}\n  hint: `ackonce why` \
             tells what became of a message",
            seen.read,
            consumer.topology.dead_letter_queue,
            printable(&arguments.id)
        );
        return Err(Exit::Partial);
    }
    // All that are shown have one name, and with it one timeline.
    let mut session = open_current(&config, "dead show")?;
    for (index, letter) in letters.iter().enumerate() {
        let last = index + 1 == letters.len();
        match arguments.json {
            true => print_json(letter, &consumer, &mut session)?,
            false => print(letter, &consumer, &mut session, arguments.body_max, last)?,
        }
    }
    if (letters.len() as u64) < seen.meant {
        eprintln!("ackonce: {} of {} letters shown", letters.len(), seen.meant);
    }
    Ok(Exit::Success)
}

fn print(
    letter: &Letter,
    consumer: &Consumer,
    session: &mut Session,
    body_max: usize,
    last: bool,
) -> Result<(), Exit> {
    output(&view::text(letter, body_max));
    let Some(id) = letter.id.as_ref().filter(|_| last) else {
        output("\n");
        return Ok(());
    };
    let story = story::read(session, id, Some(&consumer.name)).map_err(|e| report(&e))?;
    let answer = Answer::new(id.as_str(), &story);
    if answer.is_known() {
        output("\ntimeline\n");
        output(&answer.text(false));
    }
    Ok(())
}

fn print_json(letter: &Letter, consumer: &Consumer, session: &mut Session) -> Result<(), Exit> {
    let exported = file::line(letter, consumer);
    let mut timeline = serde_json::Value::Null;
    if let Some(id) = &letter.id {
        let story = story::read(session, id, Some(&consumer.name)).map_err(|e| report(&e))?;
        let told = Answer::new(id.as_str(), &story).json();
        timeline = serde_json::from_str(&told).unwrap_or_default();
    }
    let exported: serde_json::Value = serde_json::from_str(&exported).unwrap_or_default();
    output(&format!(
        "{}\n",
        json!({ "letter": exported, "timeline": timeline })
    ));
    Ok(())
}
