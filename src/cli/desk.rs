//! What every command at the dead-letter desk needs: which consumer, an open
//! desk, and what to say when it goes wrong.

use clap::Args;
use serde_json::{Value, json};

use super::migrate::{open_current, report};
use super::terminal::Progress;
use super::{ConfigArgument, Exit};
use crate::broker::desk::{DeskError, Ticket};
use crate::broker::error::ConnectError;
use crate::config::Config;
use crate::config::checked::Consumer;
use crate::dead_letter::desk::{Desk, Trouble};
use crate::dead_letter::filter::Filter;
use crate::dead_letter::letter::Letter;
use crate::stop::Stop;
use crate::why::printable;

/// What the help of every command says of what it costs to look.
pub(super) const HELP: &str = "\
All letters that are ready when it begins are taken, unacked, and go back in their order at the \
end. RabbitMQ marks them as redelivered. Ctrl-C ends it after they went back; twice, at once: then \
letters of a quorum queue may come back in another order. One command at a time works on the dead \
letters of a consumer.";

/// What the help says of exit statuses.
pub(super) const STATUS: &str = "\
Exit status: 0 done, 1 done in part, 2 bad arguments, 69 a server cannot be reached, 75 somebody \
else works on these dead letters, 77 denied, 78 bad configuration, schema or queue, 130 \
interrupted.";

/// Whose dead letters.
#[derive(Debug, Clone, Args)]
pub struct DeskArguments {
    /// The consumer's name, as in the configuration
    #[arg(value_name = "CONSUMER")]
    pub consumer: String,

    /// Go on although letters of a quorum queue came back 15 times or more, when
    /// its delivery limit was taken off with a policy, which cannot be seen
    #[arg(long)]
    pub despite_delivery_limit: bool,

    /// Where the configuration is.
    #[command(flatten)]
    pub config: ConfigArgument,
}

impl DeskArguments {
    /// The configuration, with the consumer in it.
    pub(super) fn load(&self) -> Result<(Config, Consumer), Exit> {
        let config = self.config.load()?;
        let found = config.consumers.iter().find(|c| c.name == self.consumer);
        if let Some(consumer) = found.cloned() {
            return Ok((config, consumer));
        }
        let names: Vec<&str> = config.consumers.iter().map(|c| c.name.as_str()).collect();
        eprintln!(
            "ackonce: there is no consumer {}\n  hint: {} has {}",
            printable(&self.consumer),
            self.config.config.display(),
            names.join(", ")
        );
        Err(Exit::Usage)
    }

    /// Sits down. `purpose` is the command's name.
    pub(super) fn open<'a>(
        &self,
        config: &Config,
        consumer: &'a Consumer,
        purpose: &str,
    ) -> Result<Desk<'a>, Exit> {
        let session = open_current(config, purpose)?;
        let despite = self.despite_delivery_limit;
        let desk = Desk::open(config, consumer, session, purpose, despite).map_err(trouble)?;
        if desk.others() > 0 {
            let queue = &consumer.topology.dead_letter_queue;
            eprintln!(
                "ackonce: warning: queue {queue} has {} other consumer(s): what they hold cannot \
                 be seen here",
                desk.others()
            );
        }
        Ok(desk)
    }
}

/// Says what is wrong, and with which status to leave.
pub(super) fn trouble(trouble: Trouble) -> Exit {
    if let Trouble::Database(error) = &trouble {
        return report(error);
    }
    eprintln!("ackonce: {trouble}");
    match trouble {
        Trouble::Busy { .. } => Exit::TryAgain,
        Trouble::Database(_) => Exit::Unreachable,
        Trouble::Queue(error) => match error {
            DeskError::Connect(error) => connect(&error),
            DeskError::Lost { .. } => Exit::Unreachable,
            DeskError::Missing { .. } | DeskError::NearLimit { .. } => Exit::Config,
            DeskError::Denied { .. } => Exit::Denied,
            DeskError::Stalled { .. } | DeskError::Held { .. } => Exit::TryAgain,
            DeskError::Stopped => Exit::Partial,
        },
    }
}

/// The status for a connection that could not be made.
pub(super) fn connect(error: &ConnectError) -> Exit {
    match error {
        ConnectError::Address(_) | ConnectError::Trust(_) => Exit::Config,
        ConnectError::LoginRefused { .. } | ConnectError::Vhost { .. } => Exit::Denied,
        _ => Exit::Unreachable,
    }
}

/// What a look through the queue found.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Seen {
    /// Letters that were ready when it began.
    pub(super) depth: u64,
    /// Letters that were read.
    pub(super) read: u64,
    /// Letters that were meant.
    pub(super) meant: u64,
    /// Letters that were not meant for want of a known time of death.
    pub(super) timeless: u64,
}

impl Seen {
    /// Counts a letter; whether it is meant.
    pub(super) fn count(&mut self, filter: &Filter, letter: &Letter) -> bool {
        self.read += 1;
        let meant = filter.matches(letter);
        self.meant += u64::from(meant);
        self.timeless += u64::from(filter.asks_for_time() && letter.died_at().is_none());
        meant
    }

    /// The last line of JSON, with `more` beside what every look found.
    pub(super) fn summary<const N: usize>(
        &self,
        consumer: &Consumer,
        more: [(&str, Value); N],
    ) -> Value {
        let mut summary = json!({
            "consumer": consumer.name,
            "queue": consumer.topology.dead_letter_queue,
            "depth": self.depth,
            "read": self.read,
            "meant": self.meant,
        });
        for (member, value) in more {
            summary[member] = value;
        }
        json!({ "summary": summary })
    }

    /// Warns of what was left out.
    pub(super) fn warn(&self) {
        if self.timeless > 0 {
            eprintln!(
                "ackonce: warning: of {} letter(s) it is not known when they died: --since and \
                 --until leave them out",
                self.timeless
            );
        }
    }
}

/// Looks through the whole queue and leaves it as it was; `each` gets the
/// letters that are meant.
pub(super) fn look(
    mut desk: Desk<'_>,
    filter: &Filter,
    stop: &Stop,
    mut each: impl FnMut(&Letter) -> Result<(), Exit>,
) -> Result<Seen, Exit> {
    let mut seen = Seen {
        depth: desk.depth(),
        ..Seen::default()
    };
    let mut progress = Progress::new("letters read", desk.depth());
    let result = walk(&mut desk, stop, &mut progress, |_, letters| {
        for (letter, _) in letters {
            if seen.count(filter, &letter) {
                each(&letter)?;
            }
        }
        Ok(())
    });
    progress.finish();
    let given_back = desk.give_back().map_err(trouble);
    seen.warn();
    result.and(given_back).map(|()| seen)
}

/// Reads chunk by chunk to the end of the queue. The desk stays open.
pub(super) fn walk<'a>(
    desk: &mut Desk<'a>,
    stop: &Stop,
    progress: &mut Progress,
    mut each: impl FnMut(&mut Desk<'a>, Vec<(Letter, Ticket)>) -> Result<(), Exit>,
) -> Result<(), Exit> {
    loop {
        let letters = desk.next(stop).map_err(trouble)?;
        if letters.is_empty() {
            return Ok(());
        }
        let count = letters.len() as u64;
        each(desk, letters)?;
        progress.add(count);
    }
}
