//! What is left when everything has healed, compared with the journal.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use crate::common::{Broker, Database, Management};
use crate::fleet::BINARY;
use crate::publisher::{Entry, Journal, Nature, id, number_of};
use crate::servers::{Server, wait_until};
use crate::stage::{DEAD, QUEUE, RETRIES, Stage};

/// How long the queues may take to drain once everything has healed.
const DRAIN_WITHIN: Duration = Duration::from_secs(180);

/// How long nothing must have moved until a queue is taken for empty.
const QUIET: Duration = Duration::from_secs(3);

/// How often a line says that the queues still drain.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// Where a message may be before it comes to rest.
const QUEUES: [&str; 3] = [QUEUE, RETRIES[0], RETRIES[1]];

/// How long a quorum queue may take to hand the next dead letter on.
const DEAD_WITHIN: Duration = Duration::from_secs(5);

/// Ids shown of each sort of violation.
const EXAMPLES: usize = 5;

/// What must be nothing.
#[derive(Debug, Default)]
pub struct Findings {
    /// Confirmed, and neither in effect nor dead-lettered.
    pub lost: Vec<String>,
    /// In effect more than once.
    pub doubled: Vec<String>,
    /// In effect or dead-lettered, and never attempted.
    pub unexpected: Vec<String>,
    /// A ledger row without its effect, or an effect without its row.
    pub orphans: Vec<String>,
    /// Poison that took effect.
    pub poison_applied: Vec<String>,
    /// Dead-lettered without a reason in the failure journal.
    pub without_reason: Vec<String>,
    /// Not poison, and dead-lettered as such.
    pub misjudged: Vec<String>,
    /// Queues that did not drain, with how much is in them.
    pub not_empty: Vec<String>,
    /// Daemons that ended neither by a stop nor by the nemesis.
    pub strange_ends: Vec<String>,
}

impl Findings {
    /// Each with its name.
    pub fn each(&self) -> [(&'static str, &[String]); 9] {
        [
            ("lost", &self.lost),
            ("doubled", &self.doubled),
            ("unexpected", &self.unexpected),
            ("orphans", &self.orphans),
            ("poison applied", &self.poison_applied),
            ("dead letters without a reason", &self.without_reason),
            ("dead-lettered though in order", &self.misjudged),
            ("queues not empty", &self.not_empty),
            ("daemons ended by themselves", &self.strange_ends),
        ]
    }

    pub fn are_none(&self) -> bool {
        self.each().iter().all(|(_, found)| found.is_empty())
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, found) in self.each() {
            write!(f, "{name}: {}", found.len())?;
            if !found.is_empty() {
                let examples: Vec<&str> = found.iter().take(EXAMPLES).map(String::as_str).collect();
                write!(f, " (such as {})", examples.join(", "))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

/// Counts of what is in order.
#[derive(Debug, Default)]
pub struct Sums {
    pub ids: usize,
    pub attempted: u64,
    pub confirmed_ids: usize,
    pub effects: usize,
    pub dead_ids: usize,
    /// In effect, and a copy of it dead-lettered too.
    pub both: usize,
    /// Dead letters by reason, as the failure journal has it.
    pub reasons: BTreeMap<String, usize>,
}

/// Waits until the queues are empty. What is left in them.
pub fn drain(stage: &Stage<'_>) -> Vec<String> {
    let broker = Broker::connect(&stage.url(Server::RabbitMq));
    let mut left = Vec::new();
    let mut seen = 0;
    let mut since = Instant::now();
    let mut said = Instant::now();
    wait_until(DRAIN_WITHIN, || {
        std::thread::sleep(Duration::from_millis(100));
        let ready = QUEUES.map(|queue| (queue, broker.ready(queue)));
        let full = ready.iter().filter(|(_, ready)| *ready > 0);
        left = full
            .map(|(queue, ready)| format!("{queue} ({ready})"))
            .collect();
        if said.elapsed() > SAY_EVERY && !left.is_empty() {
            said = Instant::now();
            stage.say(&format!("draining: {}", left.join(", ")));
        }
        if !left.is_empty() || moves(stage, &mut seen) {
            since = Instant::now();
        }
        if crate::interrupted() {
            return true;
        }
        // What nobody can take from a queue may be in work, or on its way. A
        // run that looks for a mutant need not be so sure.
        if since.elapsed() > QUIET && stage.plan.mutant.is_none() {
            left = held(stage);
        }
        since.elapsed() > QUIET && left.is_empty()
    });
    left
}

/// What the queues hold, messages in work included. The figures are up to 5 s
/// old.
fn held(stage: &Stage<'_>) -> Vec<String> {
    let management = Management::new(&stage.servers.management_url());
    let Some(queues) = management.try_get(&format!("/api/queues/{}", stage.name())) else {
        return vec!["the management API does not answer".to_owned()];
    };
    let queues = queues.as_array().into_iter().flatten();
    queues
        .filter(|queue| queue["name"] != DEAD && queue["messages"] != 0)
        .map(|queue| format!("{} ({} in work)", queue["name"], queue["messages"]))
        .collect()
}

/// Whether an ack, or a message, has come by since `seen`.
fn moves(stage: &Stage<'_>, seen: &mut u64) -> bool {
    let links = stage.links.iter();
    let counters = links.map(|links| links[Server::RabbitMq as usize].counters());
    let now = counters
        .map(|counters| counters.acks.load(SeqCst) + counters.deliveries.load(SeqCst))
        .sum();
    std::mem::replace(seen, now) != now
}

/// Compares. The daemons have stopped.
pub fn check(stage: &Stage<'_>, journal: &Journal, left: Vec<String>) -> (Findings, Sums) {
    let db = Database::connect(&stage.url(Server::Postgres));
    let effects = db.effects();
    let ledger: BTreeSet<String> = db.ledger(QUEUE).into_iter().collect();
    let failures = db.failures(QUEUE);
    let mut reasons: BTreeMap<&str, &str> = BTreeMap::new();
    for failure in failures.iter().filter(|failure| !failure.reason.is_empty()) {
        if let Some(id) = &failure.message_id {
            reasons.insert(id, &failure.reason);
        }
    }
    let dead = dead_letters(stage, journal, &effects);
    let mut findings = Findings {
        not_empty: left,
        ..Findings::default()
    };
    let broker = Broker::connect(&stage.url(Server::RabbitMq));
    for queue in QUEUES {
        if !broker.is_empty(queue) {
            findings.not_empty.push(queue.to_owned());
        }
    }
    for (daemon, status) in stage.fleet.strange_ends() {
        findings
            .strange_ends
            .push(format!("daemon {daemon}: {status}"));
    }
    let known = |id: &String| entry_of(journal, id);
    for (number, entry) in journal.iter().enumerate() {
        let id = id(number);
        if entry.confirmed > 0 && !effects.contains_key(&id) && !dead.contains_key(&id) {
            findings.lost.push(id);
        }
    }
    for (id, count) in &effects {
        match known(id) {
            None => findings.unexpected.push(id.clone()),
            Some(entry) if entry.nature == Nature::Poison => {
                findings.poison_applied.push(id.clone())
            }
            Some(_) => {}
        }
        if *count > 1 {
            findings.doubled.push(id.clone());
        }
        if !ledger.contains(id) {
            findings.orphans.push(id.clone());
        }
    }
    let without_effect = ledger.iter().filter(|id| !effects.contains_key(*id));
    findings.orphans.extend(without_effect.cloned());
    let mut sums = Sums {
        ids: journal.len(),
        attempted: journal.iter().map(|entry| u64::from(entry.attempted)).sum(),
        confirmed_ids: journal.iter().filter(|entry| entry.confirmed > 0).count(),
        effects: effects.len(),
        dead_ids: dead.len(),
        both: dead.keys().filter(|id| effects.contains_key(*id)).count(),
        reasons: BTreeMap::new(),
    };
    for id in dead.keys() {
        let entry = known(id);
        if entry.is_none() {
            findings.unexpected.push(id.clone());
        }
        match reasons.get(id.as_str()) {
            None => findings.without_reason.push(id.clone()),
            Some(reason) => {
                *sums.reasons.entry((*reason).to_owned()).or_default() += 1;
                let poison = entry.is_some_and(|entry| entry.nature == Nature::Poison);
                if *reason == "rejected" && !poison {
                    findings.misjudged.push(id.clone());
                }
            }
        }
    }
    (findings, sums)
}

fn entry_of<'a>(journal: &'a Journal, id: &str) -> Option<&'a Entry> {
    let entry = number_of(id).and_then(|number| journal.get(number));
    entry.filter(|entry| entry.attempted > 0)
}

/// How often each id came to rest in the dead-letter queue. Waits for those
/// that a quorum queue is still handing on.
fn dead_letters(
    stage: &Stage<'_>,
    journal: &Journal,
    effects: &BTreeMap<String, i64>,
) -> BTreeMap<String, u32> {
    let broker = Broker::connect(&stage.url(Server::RabbitMq));
    let mut dead: BTreeMap<String, u32> = BTreeMap::new();
    let wanted: Vec<String> = (0..)
        .zip(journal)
        .filter(|(_, entry)| entry.confirmed > 0)
        .map(|(number, _)| id(number))
        .filter(|id| !effects.contains_key(id))
        .collect();
    loop {
        let mut letters = Vec::new();
        let came = wait_until(DEAD_WITHIN, || {
            letters = broker.take(DEAD);
            !letters.is_empty() || wanted.iter().all(|id| dead.contains_key(id))
        });
        for letter in &letters {
            let id = letter.id().unwrap_or("(no id)").to_owned();
            *dead.entry(id).or_default() += 1;
        }
        if !came || letters.is_empty() {
            return dead;
        }
    }
}

/// What the daemon itself knows of the ids that were found.
pub fn explain(stage: &Stage<'_>, findings: &Findings) -> String {
    let mut text = String::new();
    let ids = findings.each().into_iter().flat_map(|(_, found)| found);
    let ids: BTreeSet<&String> = ids.filter(|id| number_of(id).is_some()).collect();
    for id in ids.into_iter().take(EXAMPLES) {
        let why = Command::new(BINARY)
            .args(["why", id, "--config"])
            .arg(stage.direct_config())
            .output()
            .expect("the binary under test starts");
        text += &format!(
            "$ ackonce why {id}\n{}",
            String::from_utf8_lossy(&why.stdout)
        );
        text += &String::from_utf8_lossy(&why.stderr);
    }
    text
}
