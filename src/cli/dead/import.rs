//! `ackonce dead import`: exported letters back into the dead-letter queue.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::broker::publisher::{Fate, Limits, Publisher, Seq};
use crate::cli::desk::{self, DeskArguments, connect, trouble, walk};
use crate::cli::migrate::report;
use crate::cli::publish::line;
use crate::cli::terminal::{Progress, confirm, interruptible, operator};
use crate::cli::{Exit, output};
use crate::config::checked::{Config, Consumer};
use crate::dead_letter::desk::Desk;
use crate::dead_letter::file::Entry;
use crate::ledger::desk::{self as book, Action, ActionId};
use crate::message::{Fingerprint, MessageId};
use crate::postgres::Session;
use crate::stop::Stop;

/// Letters written down and published at a time.
const BATCH: usize = 256;

/// Longest wait for the confirms of a batch.
const CONFIRM_WITHIN: Duration = Duration::from_secs(60);

/// Longest wait for the broker's goodbye.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// Most bytes of a batch.
const BATCH_BYTES: usize = 16 << 20;

/// Arguments of `ackonce dead import`.
#[derive(Debug, Clone, Args)]
#[command(after_help = help())]
pub(super) struct Arguments {
    #[command(flatten)]
    desk: DeskArguments,

    /// A file that `dead export` or `dead drop` wrote
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Take letters of another consumer too
    #[arg(long)]
    any_consumer: bool,

    /// Only say what would be imported
    #[arg(long)]
    dry_run: bool,

    /// Do not ask
    #[arg(long)]
    yes: bool,
}

fn help() -> String {
    format!(
        "All lines are read and checked before any letter is published; each letter is confirmed \
         by the broker. Letters that are in the queue already, id and body alike, are passed over, \
         as often as they are there: to import a file again, or after an interruption, does no \
         harm. A letter keeps its properties and headers with their types. It becomes persistent; \
         its header CC becomes ackonce-cc, and a user_id that is not the daemon's becomes the \
         header ackonce-user-id, since the broker would act on them. Where neither broker nor \
         daemon wrote into its headers where it was first published to, ackonce-exchange and \
         ackonce-routing-key say it.\n\n{}\n\n{}",
        desk::HELP,
        desk::STATUS
    )
}

/// Publishes them.
pub(super) fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let arguments = arguments.clone();
    interruptible(move |stop| import(&arguments, stop))
}

fn import(arguments: &Arguments, stop: &Stop) -> Result<Exit, Exit> {
    let (config, consumer) = arguments.desk.load()?;
    let mut letters = 0;
    read(arguments, &consumer, |_| {
        letters += 1;
        match stop.is_set() {
            true => Err(Exit::Partial),
            false => Ok(()),
        }
    })?;
    let mut desk = arguments.desk.open(&config, &consumer, "dead import")?;
    let there = inventory(&mut desk, stop);
    // The letters go back before others come to stand beside them.
    let seat = desk.stay_seated().map_err(trouble);
    let (there, mut session) = (there?, seat?);
    let new = count_new(arguments, &consumer, there.clone())?;
    if arguments.dry_run || new == 0 {
        let known = letters - new;
        output(&format!(
            "{new} letters to import, {known} are in the queue\n"
        ));
        return Ok(Exit::Success);
    }
    let queue = &consumer.topology.dead_letter_queue;
    confirm(
        &format!("put {new} letters into queue {queue}?"),
        arguments.yes,
    )?;
    let place = (&config, &consumer);
    publish(arguments, place, &mut session, (there, new), stop)
}

/// What one letter is told by.
type Name = (Option<MessageId>, Fingerprint);

/// Reads the file, and says by number which line is wrong.
fn read(
    arguments: &Arguments,
    consumer: &Consumer,
    mut each: impl FnMut(Entry) -> Result<(), Exit>,
) -> Result<(), Exit> {
    let path = arguments.file.display();
    let wrong = |text: String| {
        eprintln!("ackonce: {path}: {text}\n  hint: nothing of it was imported");
        Exit::Usage
    };
    let file = File::open(&arguments.file).map_err(|error| wrong(error.to_string()))?;
    let mut input: Box<dyn BufRead> = Box::new(BufReader::new(file));
    for number in 1u64.. {
        let at = |error: String| wrong(format!("line {number}: {error}"));
        let Some(text) = line(input.as_mut()).map_err(at)? else {
            break;
        };
        let entry = Entry::read(&text).map_err(at)?;
        if let Some(other) = entry
            .consumer
            .as_ref()
            .filter(|name| **name != consumer.name)
            && !arguments.any_consumer
        {
            return Err(at(format!(
                "it is a letter of consumer {other:?}, not of {:?}; say --any-consumer if that is \
                 meant",
                consumer.name
            )));
        }
        each(entry)?;
    }
    Ok(())
}

/// How often each letter is in the queue.
fn inventory(desk: &mut Desk<'_>, stop: &Stop) -> Result<HashMap<Name, u64>, Exit> {
    let mut there: HashMap<Name, u64> = HashMap::new();
    let mut progress = Progress::new("letters looked at", desk.depth());
    let walked = walk(desk, stop, &mut progress, |_, letters| {
        for (letter, _) in letters {
            *there.entry((letter.id, letter.fingerprint)).or_default() += 1;
        }
        Ok(())
    });
    progress.finish();
    walked.map(|()| there)
}

/// Whether one more of it is in the queue.
fn is_there(there: &mut HashMap<Name, u64>, name: Name) -> bool {
    match there.get_mut(&name) {
        Some(left) if *left > 0 => {
            *left -= 1;
            true
        }
        _ => false,
    }
}

fn name_of(entry: &Entry, consumer: &Consumer) -> Name {
    (entry.id(&consumer.identity), entry.fingerprint)
}

fn count_new(
    arguments: &Arguments,
    consumer: &Consumer,
    mut there: HashMap<Name, u64>,
) -> Result<u64, Exit> {
    let mut new = 0;
    read(arguments, consumer, |entry| {
        new += u64::from(!is_there(&mut there, name_of(&entry, consumer)));
        Ok(())
    })?;
    Ok(new)
}

fn publish(
    arguments: &Arguments,
    (config, consumer): (&Config, &Consumer),
    session: &mut Session,
    (mut there, new): (HashMap<Name, u64>, u64),
    stop: &Stop,
) -> Result<Exit, Exit> {
    let opened = Publisher::open(&config.broker, "dead import", Limits::default());
    let publisher = opened.map_err(|error| {
        eprintln!("ackonce: {error}");
        connect(&error)
    })?;
    let user = publisher.user().to_owned();
    let file = arguments.file.display().to_string();
    let action = Action {
        consumer: &consumer.name,
        action: "import",
        operator: &operator(),
        because: None,
        filter: "--all",
        file: Some(&file),
    };
    let action = book::begin(session, &action, config.ledger.retention).map_err(|e| report(&e))?;
    let mut importer = Importer {
        queue: &consumer.topology.dead_letter_queue,
        user,
        publisher,
        action,
        waiting: Vec::new(),
        bytes: 0,
        progress: Progress::new("letters imported", new),
        imported: 0,
        failed: 0,
    };
    let read = read(arguments, consumer, |entry| {
        let name = name_of(&entry, consumer);
        if is_there(&mut there, name.clone()) {
            return Ok(());
        }
        if stop.is_set() {
            return Err(Exit::Partial);
        }
        importer.put(session, name, entry)
    });
    let sent = read.and_then(|()| importer.send(session));
    importer.progress.finish();
    importer.publisher.close(CLOSE_WITHIN);
    let (imported, failed) = (importer.imported, importer.failed);
    output(&format!("imported {imported} letters, {failed} not\n"));
    book::end(session, action).map_err(|e| report(&e))?;
    sent?;
    match failed {
        0 => Ok(Exit::Success),
        _ => Err(Exit::Partial),
    }
}

struct Importer<'a> {
    queue: &'a str,
    user: String,
    publisher: Publisher,
    action: ActionId,
    waiting: Vec<(Name, Entry)>,
    bytes: usize,
    progress: Progress,
    imported: u64,
    failed: u64,
}

impl Importer<'_> {
    fn put(&mut self, session: &mut Session, name: Name, entry: Entry) -> Result<(), Exit> {
        self.bytes += entry.body.len();
        self.waiting.push((name, entry));
        match self.waiting.len() >= BATCH || self.bytes >= BATCH_BYTES {
            true => self.send(session),
            false => Ok(()),
        }
    }

    /// Journal, broker, confirms, in this order.
    fn send(&mut self, session: &mut Session) -> Result<(), Exit> {
        self.bytes = 0;
        let letters = std::mem::take(&mut self.waiting);
        let keys: Vec<_> = letters
            .iter()
            .map(|((id, print), _)| (id.as_ref().map(MessageId::as_str), *print))
            .collect();
        book::note(session, self.action, &keys).map_err(|e| report(&e))?;
        let mut sent: HashMap<Seq, String> = HashMap::new();
        for ((id, _), entry) in letters {
            let name = id.map_or_else(|| "without an id".to_owned(), |id| id.to_string());
            let properties = entry.properties.moved_aside(&self.user);
            let route = ("", self.queue);
            match self
                .publisher
                .publish_whole(route, &entry.body, &properties)
            {
                Ok(seq) => {
                    sent.insert(seq, name);
                }
                Err(error) => {
                    self.progress
                        .say(&format!("ackonce: letter {name:?}: {error}"));
                    self.failed += 1;
                }
            }
            let fates = self.publisher.poll();
            self.enter(fates, &mut sent);
        }
        let fates = self.publisher.wait_all(CONFIRM_WITHIN);
        self.enter(fates, &mut sent);
        // What has no fate by now may arrive or not.
        self.failed += sent.len() as u64;
        match self.publisher.lost() {
            Some(cause) => {
                eprintln!("ackonce: lost the connection to the broker: {cause}");
                Err(Exit::Unreachable)
            }
            None if !sent.is_empty() => {
                eprintln!(
                    "ackonce: the broker confirms no more: {} letters may have arrived or not",
                    sent.len()
                );
                Err(Exit::Unreachable)
            }
            None => Ok(()),
        }
    }

    fn enter(&mut self, fates: Vec<(Seq, Fate)>, sent: &mut HashMap<Seq, String>) {
        for (seq, fate) in fates {
            let name = sent.remove(&seq).unwrap_or_default();
            let what = match fate {
                Fate::Confirmed => {
                    self.imported += 1;
                    self.progress.add(1);
                    continue;
                }
                Fate::Returned { text, .. } => format!("returned: {text}: is the queue gone?"),
                Fate::Nacked => "refused: is the queue full?".to_owned(),
                Fate::Unknown => "not confirmed: it may have arrived or not".to_owned(),
            };
            self.failed += 1;
            self.progress
                .say(&format!("ackonce: letter {name:?}: {what}"));
        }
    }
}
