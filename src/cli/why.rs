//! `ackonce why`: what became of one message.

use clap::Args;

use super::migrate::{open_current, report};
use super::{ConfigArgument, Exit, output};
use crate::ledger::story;
use crate::message::MessageId;
use crate::why::{Answer, printable};

/// Arguments of `ackonce why`.
#[derive(Debug, Args)]
#[command(after_help = "\
Times are the database's, in UTC. Each line gives the first line of an error; --verbose and --json \
give all of it. At most the newest 1,000 attempts are shown. Put -- before an id that begins with \
a dash.

--json prints one object: message_id, known, truncated, consumers. Each of consumers has consumer, \
state (applied with at, conflict; dead-lettered with at, reason; waiting with until; due with since; \
sent with at; in-work with since, deaths; claimed with since, until, over, host; dropped with at, operator) and \
events. Each event has event and at; applied also fingerprint; marked also deaths; claimed also \
host, fingerprint; desk, which is what an operator did to the dead letter, also action, operator, \
because, left, fingerprint; failed also attempt, class, code, error, reason, repeated, retry_in_ms, \
retry_at, duration_ms, handler, host, worker, exchange, routing_key, fingerprint.

Exit status: 0 something is known, 1 nothing is known of that id, 2 bad arguments, 69 PostgreSQL \
cannot be reached, 77 denied, 78 bad configuration or schema.")]
pub struct Arguments {
    /// The message's id: what the consumer's `identity` finds in it
    #[arg(value_name = "MESSAGE_ID", value_parser = message_id)]
    message_id: MessageId,

    /// Only what happened with this consumer
    #[arg(long, value_name = "NAME")]
    consumer: Option<String>,

    /// Print JSON
    #[arg(long, conflicts_with = "verbose")]
    json: bool,

    /// Print whole errors, and where the message was published to
    #[arg(short, long)]
    verbose: bool,

    #[command(flatten)]
    config: ConfigArgument,
}

fn message_id(text: &str) -> Result<MessageId, String> {
    MessageId::new(text).ok_or_else(|| "an id has 1 to 255 bytes".to_owned())
}

/// Tells the message's story on standard output.
///
/// # Errors
///
/// The exit status.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let config = arguments.config.load()?;
    let mut session = open_current(&config, "why")?;
    let id = &arguments.message_id;
    let consumer = arguments.consumer.as_deref();
    let story = story::read(&mut session, id, consumer).map_err(|e| report(&e))?;
    let answer = Answer::new(id.as_str(), &story);
    match arguments.json {
        true => output(&answer.json()),
        false => output(&answer.text(arguments.verbose)),
    }
    if answer.is_known() {
        return Ok(Exit::Success);
    }
    let with = consumer.map_or(String::new(), |name| {
        format!(" with consumer {}", printable(name))
    });
    eprintln!(
        "ackonce: nothing is known of message {}{with}\n  hint: it was never taken from its queue, \
         is being tried for the first time, waits while its consumer is paused, or is older than \
         the retention; or the consumer finds its id elsewhere (identity)",
        printable(id.as_str())
    );
    Err(Exit::Partial)
}
