//! `ackonce publish`: messages from the command line or a file, each one
//! confirmed by the broker, or named with what became of it.
//!
//! Memory is bounded: a file is read line by line, and no more is read while
//! too much is unconfirmed. Nothing is skipped: the first line that cannot be
//! published ends the run, by number, after the lines before it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Args;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::pace::Pace;
use super::terminal::{Input, interruptible};
use super::{ConfigArgument, Exit, desk};
use crate::broker::outgoing::BODY_MAX_BYTES;
use crate::broker::publisher::{Fate, Limits, Outgoing, PublishError, Publisher, Seq};
use crate::config::checked::Broker;
use crate::config::without_bom;
use crate::dead_letter::file::brief;
use crate::stop::Stop;

/// Longest line, in bytes: the longest body as base64, and room for the rest.
pub(super) const LINE_MAX_BYTES: usize = BODY_MAX_BYTES / 3 * 4 + 1024 * 1024;

/// Longest wait for the confirms of what was sent, once the input has ended.
const CONFIRM_WITHIN: Duration = Duration::from_secs(60);

/// Longest wait for the broker's goodbye, and for confirms once it is time to
/// stop.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

/// AMQP's reply code for what the user may not do.
const ACCESS_REFUSED: u16 = 403;

/// How often a wait for confirms looks whether it is time to stop.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Arguments of `ackonce publish`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Lines of FILE are JSON objects: {\"message_id\": \"…\", \"body\": any JSON, \"headers\": {…}, \
\"exchange\": \"…\", \"routing_key\": \"…\", \"content_type\": \"…\", \"timestamp\": seconds}. \
A body that is a string is published as that text, any other as the JSON it is, byte for byte; \
\"body_base64\" in its place is published decoded. What a line does not say, the arguments say.

Ctrl-C publishes no more, waits for confirms for up to five seconds and says what became of each; \
twice, it ends at once.

Exit status: 0 all confirmed, 1 done in part, 2 bad arguments, 69 the broker cannot be reached or \
the connection was lost, 77 denied, 78 bad configuration, 130 interrupted.")]
pub struct Arguments {
    #[command(flatten)]
    config: ConfigArgument,
    #[command(flatten)]
    message: MessageArguments,
}

/// What is published, and where to.
#[derive(Debug, Clone, Args, Default)]
pub struct MessageArguments {
    /// Queue to publish to, through the default exchange
    #[arg(short, long, value_name = "QUEUE", conflicts_with_all = ["exchange", "routing_key"])]
    pub queue: Option<String>,
    /// Exchange to publish to
    #[arg(short, long, value_name = "EXCHANGE")]
    pub exchange: Option<String>,
    /// Routing key
    #[arg(short = 'k', long, value_name = "KEY")]
    pub routing_key: Option<String>,
    /// Publish each line of FILE, `-` for standard input
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["body", "message_id"])]
    pub file: Option<PathBuf>,
    /// Publish one message with this body; without it and --file, the body is
    /// read from standard input
    #[arg(short, long, value_name = "TEXT")]
    pub body: Option<String>,
    /// The message's id
    #[arg(short, long, value_name = "ID")]
    pub message_id: Option<String>,
    /// Content type
    #[arg(short = 't', long, value_name = "TYPE")]
    pub content_type: Option<String>,
    /// Header, as text; may be repeated
    #[arg(short = 'H', long = "header", value_name = "NAME=VALUE", value_parser = header)]
    pub headers: Vec<(String, String)>,
    /// At most this many messages a second
    #[arg(long, value_name = "N")]
    pub rate: Option<NonZeroU32>,
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("a header is NAME=VALUE".to_owned()),
    }
}

/// Publishes to the configured broker.
///
/// # Errors
///
/// The exit status.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let config = arguments.config.load()?;
    let message = arguments.message.clone();
    interruptible(move |stop| {
        let stdin = Input::open(stop)?;
        let said = &mut io::stderr();
        Ok(publish(&message, &config.broker, stdin, stop, said))
    })
}

/// Publishes what `arguments` say, which may be to read it from `stdin`, until
/// it is time to stop. Messages that were not confirmed, a summary and errors go
/// to `report`.
pub fn publish(
    arguments: &MessageArguments,
    broker: &Broker,
    stdin: impl BufRead,
    stop: &Stop,
    report: &mut impl Write,
) -> Exit {
    let source = match Source::open(arguments, stdin) {
        Ok(source) => source,
        Err(error) => {
            say(report, &format!("ackonce: {error}"));
            return match stop.is_set() {
                true => Exit::Partial,
                false => Exit::Usage,
            };
        }
    };
    match Publisher::open(broker, "publish", Limits::default()) {
        Ok(publisher) => all_of(source, publisher, arguments, stop, report),
        Err(error) => {
            say(report, &format!("ackonce: {error}"));
            desk::connect(&error)
        }
    }
}

/// What is said to a closed terminal is lost, and no reason to stop publishing.
fn say(report: &mut impl Write, text: &str) {
    writeln!(report, "{text}").ok();
}

/// Where messages come from.
enum Source<R> {
    One(Option<Box<Outgoing>>),
    Lines {
        input: Box<dyn BufRead>,
        number: u64,
    },
    Stdin {
        input: R,
        number: u64,
    },
}

impl<R: BufRead> Source<R> {
    fn open(arguments: &MessageArguments, mut stdin: R) -> Result<Self, String> {
        match &arguments.file {
            Some(path) if path.as_os_str() == "-" => Ok(Self::Stdin {
                input: stdin,
                number: 0,
            }),
            Some(path) => {
                let file = File::open(path)
                    .map_err(|error| format!("failed to open {}: {error}", path.display()))?;
                Ok(Self::Lines {
                    input: Box::new(BufReader::new(file)),
                    number: 0,
                })
            }
            None => {
                let body = match &arguments.body {
                    Some(text) => text.clone().into_bytes(),
                    None => whole(&mut stdin)?,
                };
                let mut message = with_defaults(Outgoing::default(), None, None, arguments)?;
                message.body = body;
                message.message_id.clone_from(&arguments.message_id);
                Ok(Self::One(Some(Box::new(message))))
            }
        }
    }

    /// The next message and where it comes from, `None` at the end.
    fn next(&mut self, arguments: &MessageArguments) -> Option<Result<(String, Outgoing), String>> {
        let (input, number): (&mut dyn BufRead, _) = match self {
            Self::One(message) => {
                return message
                    .take()
                    .map(|message| Ok(("the message".to_owned(), *message)));
            }
            Self::Lines { input, number } => (input.as_mut(), number),
            Self::Stdin { input, number } => (input, number),
        };
        *number += 1;
        let origin = format!("line {number}");
        match line(input).and_then(|text| text.map(|text| parse(&text, arguments)).transpose()) {
            Ok(None) => None,
            Ok(Some(message)) => Some(Ok((origin, message))),
            Err(error) => Some(Err(format!("{origin}: {error}"))),
        }
    }
}

fn whole(input: &mut impl Read) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    // One byte over the limit is enough to have it refused.
    input
        .take(BODY_MAX_BYTES as u64 + 1)
        .read_to_end(&mut body)
        .map_err(|error| format!("failed to read the body from standard input: {error}"))?;
    Ok(body)
}

/// One line without its end, `None` at the end of the input.
pub(super) fn line(input: &mut dyn BufRead) -> Result<Option<Vec<u8>>, String> {
    let mut text = Vec::new();
    let read = input
        .take(LINE_MAX_BYTES as u64 + 1)
        .read_until(b'\n', &mut text)
        .map_err(|error| format!("failed to read it: {error}"))?;
    if read == 0 {
        return Ok(None);
    }
    if text.last() == Some(&b'\n') {
        text.pop();
    } else if read > LINE_MAX_BYTES {
        return Err(format!("it is longer than {LINE_MAX_BYTES} bytes"));
    }
    // Files that were put together have such a mark within them, too.
    Ok(Some(without_bom(&text).to_vec()))
}

/// One line of a file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    message_id: Option<String>,
    #[serde(default, deserialize_with = "present")]
    body: Option<Box<RawValue>>,
    body_base64: Option<String>,
    headers: Option<Map<String, Value>>,
    exchange: Option<String>,
    routing_key: Option<String>,
    content_type: Option<String>,
    timestamp: Option<u64>,
}

/// `null` is a body, unlike no body at all.
fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Box<RawValue>>, D::Error> {
    Box::<RawValue>::deserialize(from).map(Some)
}

fn parse(text: &[u8], arguments: &MessageArguments) -> Result<Outgoing, String> {
    read(text, arguments).map_err(|problem| brief(&problem))
}

fn read(text: &[u8], arguments: &MessageArguments) -> Result<Outgoing, String> {
    let line: Line = serde_json::from_slice(text).map_err(|error| match error.classify() {
        serde_json::error::Category::Eof if text.trim_ascii().is_empty() => {
            "it is empty; every line must be a JSON object".to_owned()
        }
        // serde_json counts lines too, and always finds this to be its first.
        _ => error.to_string().replace("at line 1 column", "at column"),
    })?;
    let body = match (line.body, line.body_base64) {
        (Some(body), None) => body_of(&body)?,
        (None, Some(encoded)) => BASE64
            .decode(encoded)
            .map_err(|error| format!("body_base64 is not base64: {error}"))?,
        (Some(_), Some(_)) => return Err("it has both body and body_base64".to_owned()),
        (None, None) => return Err("it has neither body nor body_base64".to_owned()),
    };
    let message = Outgoing {
        body,
        message_id: line.message_id,
        content_type: line.content_type,
        timestamp: line.timestamp,
        headers: line.headers.unwrap_or_default(),
        ..Outgoing::default()
    };
    with_defaults(message, line.exchange, line.routing_key, arguments)
}

/// A string's text; anything else as it stands, since reading and writing it
/// again could change numbers.
fn body_of(json: &RawValue) -> Result<Vec<u8>, String> {
    if json.get().starts_with('"') {
        let text: String = serde_json::from_str(json.get()).map_err(|error| error.to_string())?;
        return Ok(text.into_bytes());
    }
    Ok(json.get().as_bytes().to_vec())
}

/// Fills in from the arguments what the message does not say.
fn with_defaults(
    mut message: Outgoing,
    exchange: Option<String>,
    routing_key: Option<String>,
    arguments: &MessageArguments,
) -> Result<Outgoing, String> {
    if exchange.is_none() && routing_key.is_none() {
        match arguments {
            MessageArguments {
                queue: Some(queue), ..
            } => message.routing_key.clone_from(queue),
            MessageArguments {
                exchange: None,
                routing_key: None,
                ..
            } => {
                return Err(
                    "no destination; give --queue, or --exchange and --routing-key, or \
                     \"exchange\" and \"routing_key\" in the line"
                        .to_owned(),
                );
            }
            MessageArguments {
                exchange,
                routing_key,
                ..
            } => {
                message.exchange = exchange.clone().unwrap_or_default();
                message.routing_key = routing_key.clone().unwrap_or_default();
            }
        }
    } else {
        let or = |own: Option<String>, other: &Option<String>| {
            own.or_else(|| other.clone()).unwrap_or_default()
        };
        message.exchange = or(exchange, &arguments.exchange);
        message.routing_key = or(routing_key, &arguments.routing_key);
    }
    if message.content_type.is_none() {
        message.content_type.clone_from(&arguments.content_type);
    }
    for (name, value) in &arguments.headers {
        if !message.headers.contains_key(name) {
            message
                .headers
                .insert(name.clone(), Value::String(value.clone()));
        }
    }
    Ok(message)
}

/// Publishes everything, waits for the confirms and says what came of it.
fn all_of(
    mut source: Source<impl BufRead>,
    mut publisher: Publisher,
    arguments: &MessageArguments,
    stop: &Stop,
    report: &mut impl Write,
) -> Exit {
    let mut tally = Tally::default();
    let fed = feed(
        &mut source,
        &mut publisher,
        arguments,
        stop,
        (&mut tally, report),
    );
    let fates = confirms(&mut publisher, stop);
    tally.note(fates, report);
    let lost = publisher
        .lost()
        .map(|cause| (cause.to_owned(), publisher.reply()));
    if let Some((cause, _)) = &lost {
        say(
            report,
            &format!("ackonce: lost the connection to the broker: {cause}"),
        );
    }
    let fates = publisher.close(CLOSE_WITHIN);
    tally.note(fates, report);
    if let Err(reason) = &fed {
        say(report, &format!("ackonce: stopped at {reason}"));
    }
    say(report, &tally.summary());
    match (lost, fed) {
        (Some((_, Some(ACCESS_REFUSED))), _) => Exit::Denied,
        // What else closes a channel is one of the messages.
        (Some((_, None)), _) => Exit::Unreachable,
        (_, Err(_)) if tally.published == 0 && !stop.is_set() => Exit::Usage,
        (_, Ok(())) if tally.confirmed == tally.published => Exit::Success,
        _ => Exit::Partial,
    }
}

/// Waits for what is unconfirmed.
fn confirms(publisher: &mut Publisher, stop: &Stop) -> Vec<(Seq, Fate)> {
    let began = Instant::now();
    let mut fates = publisher.poll();
    while publisher.unconfirmed() > 0
        && began.elapsed() < CONFIRM_WITHIN
        && !stop.left_of(CLOSE_WITHIN).is_zero()
    {
        fates.extend(publisher.wait_all(LOOK_EVERY));
    }
    fates
}

/// Publishes up to the first message that cannot be.
fn feed(
    source: &mut Source<impl BufRead>,
    publisher: &mut Publisher,
    arguments: &MessageArguments,
    stop: &Stop,
    (tally, report): (&mut Tally, &mut impl Write),
) -> Result<(), String> {
    let mut pace = Pace::new(arguments.rate, Instant::now());
    while let Some(next) = source.next(arguments) {
        let (origin, message) = next?;
        if pace.keep(stop) {
            return Err(format!("{origin}: interrupted"));
        }
        match publisher.publish(&message) {
            Ok(seq) => tally.enter(seq, origin, message.message_id),
            Err(error) => {
                if matches!(error, PublishError::Lost { .. }) {
                    tally.enter_unknown();
                }
                return Err(format!("{origin}: {error}"));
            }
        }
        tally.note(publisher.poll(), report);
    }
    Ok(())
}

/// What was published and what became of it.
#[derive(Default)]
struct Tally {
    /// Where each message without a fate comes from, and its id.
    origins: HashMap<Seq, (String, Option<String>)>,
    published: u64,
    confirmed: u64,
    returned: u64,
    nacked: u64,
    unknown: u64,
}

impl Tally {
    fn enter(&mut self, seq: Seq, origin: String, id: Option<String>) {
        self.published += 1;
        self.origins.insert(seq, (origin, id));
    }

    /// A message whose publishing met the end of the connection.
    fn enter_unknown(&mut self) {
        self.published += 1;
        self.unknown += 1;
    }

    fn note(&mut self, fates: Vec<(Seq, Fate)>, report: &mut impl Write) {
        for (seq, fate) in fates {
            let (origin, id) = self.origins.remove(&seq).unwrap_or_default();
            let what = match fate {
                Fate::Confirmed => {
                    self.confirmed += 1;
                    continue;
                }
                Fate::Returned { code, text } => {
                    self.returned += 1;
                    format!("returned by the broker: {text} (reply {code}): no queue takes it")
                }
                Fate::Nacked => {
                    self.nacked += 1;
                    "refused by a queue: is it full?".to_owned()
                }
                Fate::Unknown => {
                    self.unknown += 1;
                    "not confirmed: it may have arrived or not".to_owned()
                }
            };
            let id = id
                .map(|id| format!(" (message id {id:?})"))
                .unwrap_or_default();
            say(report, &format!("ackonce: {origin}{id}: {what}"));
        }
    }

    fn summary(&self) -> String {
        format!(
            "published {}, confirmed {}, returned {}, nacked {}, unknown {}",
            self.published, self.confirmed, self.returned, self.nacked, self.unknown,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to_queue() -> MessageArguments {
        MessageArguments {
            queue: Some("q".to_owned()),
            ..MessageArguments::default()
        }
    }

    fn parsed(text: &str) -> Outgoing {
        parse(text.as_bytes(), &to_queue()).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn a_body_is_published_byte_for_byte() {
        assert_eq!(parsed(r#"{"body": "a\u00e9\n"}"#).body, "aé\n".as_bytes());
        assert_eq!(
            parsed(r#"{"body": {"b": 1.0, "a": 12345678901234567890123}}"#).body,
            br#"{"b": 1.0, "a": 12345678901234567890123}"#
        );
        assert_eq!(parsed(r#"{"body": null}"#).body, b"null");
        assert_eq!(parsed(r#"{"body_base64": "AP8="}"#).body, [0, 255]);
    }

    #[test]
    fn what_a_line_does_not_say_the_arguments_say() {
        let arguments = MessageArguments {
            exchange: Some("e".to_owned()),
            routing_key: Some("k".to_owned()),
            content_type: Some("text/plain".to_owned()),
            headers: vec![
                ("a".to_owned(), "1".to_owned()),
                ("b".to_owned(), "2".to_owned()),
            ],
            ..MessageArguments::default()
        };
        let line = br#"{"body": 1, "routing_key": "own", "headers": {"a": 9}, "timestamp": 7}"#;
        let message = parse(line, &arguments).unwrap();
        assert_eq!(
            (message.exchange.as_str(), message.routing_key.as_str()),
            ("e", "own")
        );
        assert_eq!(message.content_type.as_deref(), Some("text/plain"));
        assert_eq!(message.timestamp, Some(7));
        assert_eq!(
            Value::from(message.headers),
            serde_json::json!({ "a": 9, "b": "2" })
        );
        assert_eq!(parsed(r#"{"body": 1}"#).routing_key, "q");
    }

    #[test]
    fn a_line_that_cannot_be_published_is_refused_with_its_reason() {
        for (text, reason) in [
            ("", "empty"),
            ("{", "EOF"),
            (r#"["a"]"#, "expected"),
            (r#"{"body": 1} {"body": 2}"#, "trailing"),
            (r#"{"message_id": "a"}"#, "neither body nor body_base64"),
            (
                r#"{"body": 1, "body_base64": ""}"#,
                "both body and body_base64",
            ),
            (r#"{"body_base64": "?"}"#, "not base64"),
            (r#"{"body": 1, "bodi": 2}"#, "unknown field `bodi`"),
            (
                r#"{"body": 1, "\u001b[2J": 2}"#,
                "unknown field `\\u{1b}[2J`",
            ),
            (r#"{"body": 1, "body": 2}"#, "duplicate field"),
            (r#"{"body": 1, "message_id": 5}"#, "expected a string"),
            (r#"{"body": 1, "timestamp": -5}"#, "invalid value"),
        ] {
            let error = parse(text.as_bytes(), &to_queue()).expect_err(text);
            assert!(error.contains(reason), "{text}: {error}");
        }
        let nowhere = parse(br#"{"body": 1}"#, &MessageArguments::default()).unwrap_err();
        assert!(nowhere.contains("--queue"), "{nowhere}");
    }

    #[test]
    fn a_header_argument_is_name_and_value() {
        assert_eq!(header("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(header("a="), Ok(("a".to_owned(), String::new())));
        assert!(header("a").is_err());
        assert!(header("=a").is_err());
    }
}
