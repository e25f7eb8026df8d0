//! `ackonce dead import`: exported letters back into the dead-letter queue.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use crate::broker::publisher::{Fate, Limits, Publisher, Seq};
use crate::broker::signed::Signer;
use crate::cli::desk::{self, DeskArguments, connect, trouble, walk};
use crate::cli::migrate::report;
use crate::cli::publish::line;
use crate::cli::terminal::{Progress, confirm, interruptible, operator};
use crate::cli::{Exit, output};
use crate::config::checked::{Config, Consumer};
use crate::dead_letter::desk::Desk;
use crate::dead_letter::file::Entry;
use crate::ledger;
use crate::ledger::desk::{self as book, Action, ActionId};
use crate::message::{Fingerprint, MessageId, hex};
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

/// What became of a letter, for machines.
const IMPORTED: &str = "imported";
const PASSED_OVER: &str = "passed-over";
const FAILED: &str = "failed";

/// Of what was sent and has no answer.
const UNCONFIRMED: &str = "not confirmed: it may have arrived or not";

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

    /// Print lines of JSON, the last one a summary
    #[arg(long)]
    json: bool,
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
         ackonce-routing-key say it.\n\n\
         --json prints one object for each line of the file, when its fate is known: line (its \
         number), id, fingerprint, action (imported, passed-over or failed), and why where it \
         failed; with --dry-run would (import or pass-over) in place of action; and at the end \
         {{\"summary\": {{consumer, queue, letters, new, passed_over, imported, failed}}}}, also \
         when it ended before its end: lines that it did not come to are not printed \
         then.\n\n{}\n\n{}",
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
    read(arguments, &consumer, |_, _| match stop.is_set() {
        true => Err(Exit::Partial),
        false => Ok(()),
    })?;
    let mut desk = arguments.desk.open(&config, &consumer, "dead import")?;
    let there = inventory(&mut desk, stop);
    // The letters go back before others come to stand beside them.
    let seat = desk.stay_seated().map_err(trouble);
    let (there, mut session) = (there?, seat?);
    let mut count = Count::default();
    each_by_standing(arguments, &consumer, there.clone(), |_, _, is_new| {
        count.letters += 1;
        count.new += u64::from(is_new);
    })?;
    if arguments.dry_run || count.new == 0 {
        say_standing(arguments, &consumer, there, count)?;
        return Ok(Exit::Success);
    }
    let queue = &consumer.topology.dead_letter_queue;
    confirm(
        &format!("put {} letters into queue {queue}?", count.new),
        arguments.yes,
    )?;
    let place = (&config, &consumer);
    publish(arguments, place, &mut session, (there, count), stop)
}

/// Letters of the file.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    letters: u64,
    /// Those that are not in the queue yet.
    new: u64,
}

/// What one letter is told by.
type Name = (Option<MessageId>, Fingerprint);

/// Reads the file, and says by number which line is wrong. `each` gets every
/// letter with the number of its line.
fn read(
    arguments: &Arguments,
    consumer: &Consumer,
    mut each: impl FnMut(u64, Entry) -> Result<(), Exit>,
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
        each(number, entry)?;
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

/// Says of each letter, with its line, whether it would be new to the queue.
fn each_by_standing(
    arguments: &Arguments,
    consumer: &Consumer,
    mut there: HashMap<Name, u64>,
    mut each: impl FnMut(u64, &Name, bool),
) -> Result<(), Exit> {
    read(arguments, consumer, |number, entry| {
        let name = name_of(&entry, consumer);
        let is_new = !is_there(&mut there, name.clone());
        each(number, &name, is_new);
        Ok(())
    })
}

/// What a dry run says, and one that finds nothing to import.
fn say_standing(
    arguments: &Arguments,
    consumer: &Consumer,
    there: HashMap<Name, u64>,
    count: Count,
) -> Result<(), Exit> {
    if !arguments.json {
        output(&format!(
            "{} letters to import, {} are in the queue\n",
            count.new,
            count.letters - count.new
        ));
        return Ok(());
    }
    each_by_standing(arguments, consumer, there, |line, name, is_new| {
        let (member, what) = match (arguments.dry_run, is_new) {
            (true, true) => ("would", "import"),
            (true, false) => ("would", "pass-over"),
            (false, _) => ("action", PASSED_OVER),
        };
        print_line(line, name, (member, what), None);
    })?;
    print_summary(consumer, count, (0, 0));
    Ok(())
}

fn print_line(
    line: u64,
    (id, fingerprint): &Name,
    (member, what): (&str, &str),
    why: Option<&str>,
) {
    let mut object = json!({
        "line": line,
        "id": id.as_ref().map(MessageId::as_str),
        "fingerprint": hex(&fingerprint.0),
    });
    object[member] = json!(what);
    if let Some(why) = why {
        object["why"] = json!(why);
    }
    output(&format!("{object}\n"));
}

fn print_summary(consumer: &Consumer, count: Count, (imported, failed): (u64, u64)) {
    let summary = json!({ "summary": {
        "consumer": consumer.name,
        "queue": consumer.topology.dead_letter_queue,
        "letters": count.letters,
        "new": count.new,
        "passed_over": count.letters - count.new,
        "imported": imported,
        "failed": failed,
    }});
    output(&format!("{summary}\n"));
}

fn publish(
    arguments: &Arguments,
    (config, consumer): (&Config, &Consumer),
    session: &mut Session,
    (mut there, count): (HashMap<Name, u64>, Count),
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
    let seal = ledger::secret(session).map_err(|e| report(&e))?.seal();
    let signer = Signer::new(seal, &consumer.name);
    let action = book::begin(session, &action, config.ledger.retention).map_err(|e| report(&e))?;
    let mut importer = Importer {
        queue: &consumer.topology.dead_letter_queue,
        user,
        signer,
        publisher,
        action,
        waiting: Vec::new(),
        bytes: 0,
        json: arguments.json,
        progress: Progress::new("letters imported", count.new),
        imported: 0,
        failed: 0,
    };
    let read = read(arguments, consumer, |line, entry| {
        let name = name_of(&entry, consumer);
        if stop.is_set() {
            return Err(Exit::Partial);
        }
        if is_there(&mut there, name.clone()) {
            if arguments.json {
                print_line(line, &name, ("action", PASSED_OVER), None);
            }
            return Ok(());
        }
        importer.put(session, Origin { line, name }, entry)
    });
    let sent = read.and_then(|()| importer.send(session));
    importer.progress.finish();
    importer.publisher.close(CLOSE_WITHIN);
    let (imported, failed) = (importer.imported, importer.failed);
    match arguments.json {
        true => print_summary(consumer, count, (imported, failed)),
        false => output(&format!("imported {imported} letters, {failed} not\n")),
    }
    book::end(session, action).map_err(|e| report(&e))?;
    sent?;
    match failed {
        0 => Ok(Exit::Success),
        _ => Err(Exit::Partial),
    }
}

/// A letter and where in the file it stands.
struct Origin {
    line: u64,
    name: Name,
}

struct Importer<'a> {
    queue: &'a str,
    user: String,
    signer: Signer,
    publisher: Publisher,
    action: ActionId,
    waiting: Vec<(Origin, Entry)>,
    bytes: usize,
    json: bool,
    progress: Progress,
    imported: u64,
    failed: u64,
}

impl Importer<'_> {
    fn put(&mut self, session: &mut Session, origin: Origin, entry: Entry) -> Result<(), Exit> {
        self.bytes += entry.body.len();
        self.waiting.push((origin, entry));
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
            .map(|(origin, _)| {
                let (id, print) = &origin.name;
                (id.as_ref().map(MessageId::as_str), *print)
            })
            .collect();
        book::note(session, self.action, &keys).map_err(|e| report(&e))?;
        let mut sent: HashMap<Seq, Origin> = HashMap::new();
        for (origin, entry) in letters {
            let mut properties = entry.properties.moved_aside(&self.user);
            self.signer.sign(&mut properties, &entry.body);
            let route = ("", self.queue);
            match self
                .publisher
                .publish_whole(route, &entry.body, &properties)
            {
                Ok(seq) => {
                    sent.insert(seq, origin);
                }
                Err(error) => self.not_imported(&origin, &error.to_string()),
            }
            let fates = self.publisher.poll();
            self.enter(fates, &mut sent);
        }
        let fates = self.publisher.wait_all(CONFIRM_WITHIN);
        self.enter(fates, &mut sent);
        let unknown = sent.len();
        let mut silent: Vec<Origin> = sent.into_values().collect();
        silent.sort_by_key(|origin| origin.line);
        for origin in silent {
            self.not_imported(&origin, UNCONFIRMED);
        }
        match self.publisher.lost() {
            Some(cause) => {
                eprintln!("ackonce: lost the connection to the broker: {cause}");
                Err(Exit::Unreachable)
            }
            None if unknown > 0 => {
                eprintln!(
                    "ackonce: the broker confirms no more: {unknown} letters may have arrived or \
                     not"
                );
                Err(Exit::Unreachable)
            }
            None => Ok(()),
        }
    }

    fn enter(&mut self, fates: Vec<(Seq, Fate)>, sent: &mut HashMap<Seq, Origin>) {
        for (seq, fate) in fates {
            let Some(origin) = sent.remove(&seq) else {
                continue;
            };
            match fate {
                Fate::Confirmed => {
                    self.imported += 1;
                    self.progress.add(1);
                    if self.json {
                        print_line(origin.line, &origin.name, ("action", IMPORTED), None);
                    }
                }
                Fate::Returned { text, .. } => {
                    let why = format!("returned: {text}: is the queue gone?");
                    self.not_imported(&origin, &why);
                }
                Fate::Nacked => self.not_imported(&origin, "refused: is the queue full?"),
                Fate::Unknown => self.not_imported(&origin, UNCONFIRMED),
            }
        }
    }

    fn not_imported(&mut self, origin: &Origin, why: &str) {
        self.failed += 1;
        if self.json {
            return print_line(origin.line, &origin.name, ("action", FAILED), Some(why));
        }
        let (id, _) = &origin.name;
        let name = id.as_ref().map_or("without an id", MessageId::as_str);
        let text = format!("ackonce: letter {name:?} in line {}: {why}", origin.line);
        self.progress.say(&text);
    }
}
