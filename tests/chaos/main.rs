//! Everything is killed, frozen, cut off and slowed down, and when it has
//! healed nothing is lost and nothing was done twice. `docs/chaos.md` tells how
//! it works; `script/chaos` runs it with other parameters.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a broken stage is a failed test"
)]

mod checker;
#[path = "../common/mod.rs"]
mod common;
mod disk;
mod fleet;
mod link;
mod nemesis;
mod plan;
mod publisher;
mod report;
mod servers;
mod session;
mod stage;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use nemesis::{Kind, Lane};
use plan::Plan;
use publisher::{Order, Publishing};
use report::Outcome;
use servers::{Servers, wait_until};
use stage::{QUEUE, Stage, Tally};

/// How often a line says how far it is.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// A run has the machine to itself.
static TURN: Mutex<()> = Mutex::new(());

/// A run of all kinds that broke things for so long has to have seen some. It is
/// far less than a machine with time of its own sees, for there are others.
const LONG: Duration = Duration::from_secs(100);
const KINDS_AT_LEAST: usize = 10;
/// A kind that was tried so often has happened, or nobody looks for it in the
/// right place.
const TRIED_IN_VAIN: u64 = 10;
/// One of each.
const WANTED: [&[Kind]; 2] = [&[Kind::CommitCut, Kind::CommitKill], &[Kind::AckCut]];

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether somebody pressed Ctrl-C.
pub fn interrupted() -> bool {
    INTERRUPTED.load(SeqCst)
}

/// Servers of its own for a run that ends them on Ctrl-C too.
fn servers(kinds: &[Kind]) -> Servers {
    // Fails when another test of this process has set it.
    drop(ctrlc::set_handler(|| INTERRUPTED.store(true, SeqCst)));
    Servers::start(kinds.contains(&Kind::PostgresDiskFull))
}

#[test]
fn nothing_is_lost_and_nothing_doubled_whatever_breaks() {
    let _turn = TURN.lock();
    let plan = Plan::from_environment();
    let servers = servers(&plan.kinds);
    let outcome = run(&servers, plan.clone(), "chaos");
    println!("\n{}", outcome.report);
    if let Some(path) = &plan.report {
        std::fs::write(path, &outcome.report).expect("the report is written");
        println!("wrote {}", path.display());
    }
    assert!(
        outcome.findings.are_none(),
        "seed {}:\n{}\n{}",
        plan.seed,
        outcome.findings,
        outcome.explained
    );
    assert!(outcome.sums.confirmed_ids > 0, "nothing was published");
    assert!(outcome.seen > 0, "nothing was broken");
    if plan.kinds == Kind::ALL && outcome.broken_for >= LONG {
        let missing = missing(&outcome.tally);
        assert!(
            missing.is_empty(),
            "seed {}: too little was broken: {}; tried and seen: {:?}",
            plan.seed,
            missing.join(", "),
            outcome.tally
        );
    }
}

/// What a long run with all kinds must have seen, and has not.
fn missing(tally: &Tally) -> Vec<String> {
    // A fault that has variants is counted as `kind, variant`.
    let kind = |name: &&'static str| name.split_once(',').map_or(*name, |(kind, _)| kind);
    let seen = tally.iter().filter(|(_, (_, seen))| *seen > 0);
    let seen: BTreeSet<&str> = seen.map(|(name, _)| kind(name)).collect();
    let mut missing = Vec::new();
    if seen.len() < KINDS_AT_LEAST {
        let count = seen.len();
        missing.push(format!("{count} kinds of at least {KINDS_AT_LEAST}"));
    }
    for wanted in WANTED {
        if !wanted.iter().any(|kind| seen.contains(kind.name())) {
            let names: Vec<_> = wanted.iter().map(|kind| kind.name()).collect();
            missing.push(format!("no {}", names.join(" and no ")));
        }
    }
    for (name, (tried, seen)) in tally {
        if *tried >= TRIED_IN_VAIN && *seen == 0 {
            missing.push(format!("no {name}, tried {tried} times"));
        }
    }
    missing
}

/// Breaks things for as long as the plan says, heals them, and compares.
fn run(servers: &Servers, plan: Plan, name: &str) -> Outcome {
    let begun = Instant::now();
    let mut stage = Stage::set(servers, plan, name);
    stage.say(&format!(
        "seed {}, {} daemons, RabbitMQ {}, {} s",
        stage.plan.seed,
        stage.plan.daemons,
        stage.broker_version,
        stage.plan.length.as_secs()
    ));
    for (kind, why) in report::impossible(&stage) {
        stage.say(&format!("{} will not happen: {why}", kind.name()));
    }
    stage.plan.kinds.retain({
        let impossible: Vec<Kind> = report::impossible(&stage)
            .iter()
            .map(|(kind, _)| *kind)
            .collect();
        move |kind| !impossible.contains(kind)
    });
    let publishing = Publishing::start(Order {
        url: stage.publisher_url(),
        queue: QUEUE.to_owned(),
        rate: stage.plan.rate,
        most: stage.plan.messages,
        seed: stage.plan.seed,
    });
    let length = break_things(&stage, &publishing);
    assert!(!interrupted(), "interrupted");
    stage.say("everything heals");
    heal(&stage);
    let journal = publishing.stop();
    let left = checker::drain(&stage);
    assert!(!interrupted(), "interrupted");
    stage.say("comparing");
    let stopped = stage.fleet.stop();
    let (mut findings, sums) = checker::check(&stage, &journal, left);
    if !stopped {
        findings
            .strange_ends
            .push("a daemon that did not stop".to_owned());
    }
    let explained = checker::explain(&stage, &findings);
    let report = report::write(&stage, &findings, &sums, &explained, length);
    // Its lock is gone when the faults are counted.
    let tally = stage.tally.lock().expect("the tally").clone();
    Outcome {
        lasted: begun.elapsed(),
        broken_for: length,
        tally,
        seen: stage.seen(),
        findings,
        sums,
        explained,
        report,
    }
}

/// Lets the nemesis work, and tells how it goes. How long it did.
fn break_things(stage: &Stage<'_>, publishing: &Publishing) -> Duration {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let start = |lane| {
            std::thread::Builder::new()
                .name(format!("nemesis {lane:?}"))
                .spawn_scoped(scope, move || nemesis::work(stage, lane))
                .expect("a thread")
        };
        let lanes: Vec<_> = Lane::of(stage).into_iter().map(start).collect();
        let mut said = Instant::now();
        wait_until(stage.plan.length, || {
            if said.elapsed() > SAY_EVERY {
                said = Instant::now();
                tell(stage, publishing);
            }
            let ids = publishing.progress.ids.load(SeqCst) as usize;
            // A thread that ends before it is told to has panicked.
            let panicked = lanes.iter().any(|lane| lane.is_finished()) || publishing.has_ended();
            interrupted() || panicked || ids >= stage.plan.messages
        });
        stage.over.store(true, SeqCst);
    });
    begun.elapsed()
}

fn tell(stage: &Stage<'_>, publishing: &Publishing) {
    let progress = &publishing.progress;
    let links = stage.links.iter().map(|links| links[2].counters());
    let commits: u64 = links.map(|counters| counters.commits.load(SeqCst)).sum();
    stage.say(&format!(
        "{} faults; {} ids, {} publishes, {} confirmed, {} unknown; {commits} commits, {} lives",
        stage.seen(),
        progress.ids.load(SeqCst),
        progress.published.load(SeqCst),
        progress.confirmed.load(SeqCst),
        progress.unknown.load(SeqCst),
        stage.fleet.lives()
    ));
}

/// Every fault ends itself; this is for what one that was cut short has left.
fn heal(stage: &Stage<'_>) {
    assert!(stage.servers.up(), "the servers do not start again");
    stage.links.iter().flatten().for_each(link::Link::heal);
    stage.publisher_link.heal();
}

/// Each rule that is broken, with the faults that show it and what it has to be
/// found as.
const MUTANTS: &[(&str, &[Kind], &str)] = &[
    (
        "held-claim",
        &[Kind::DaemonKill, Kind::CommitKill],
        checker::LOST,
    ),
    ("without-ledger", &[Kind::CommitKill, Kind::Cut], "doubled"),
    ("early-ack", &[Kind::CommitKill], checker::LOST),
    (
        "effect-outside",
        &[Kind::CommitKill, Kind::CommitCut],
        "orphans",
    ),
    ("stale-ack", &[Kind::Flap], checker::LOST),
    ("early-mark", &[Kind::CommitKill], checker::LOST),
    ("trusted-commit", &[Kind::CommitCut], checker::LOST),
];

/// How long a run goes on that has to find a mutant, and how many there are
/// before it counts as unnoticed.
const MUTANT_SECONDS: u64 = 5;
const MUTANT_RUNS: u64 = 4;

#[test]
fn each_rule_that_is_broken_is_found() {
    let _turn = TURN.lock();
    let chosen = std::env::var("ACKONCE_CHAOS_MUTANT").unwrap_or_default();
    let servers = servers(&[]);
    for (mutant, kinds, found_as) in MUTANTS {
        if chosen.is_empty() || chosen == *mutant {
            assert!(
                is_found(&servers, mutant, kinds, found_as),
                "{mutant}: not found as {found_as}"
            );
        }
    }
}

fn is_found(servers: &Servers, mutant: &str, kinds: &[Kind], found_as: &str) -> bool {
    (0..MUTANT_RUNS).any(|turn| {
        let common = Plan::from_environment();
        let plan = Plan {
            seed: common.seed + turn,
            length: Duration::from_secs(MUTANT_SECONDS),
            rate: 300,
            kinds: kinds.to_vec(),
            rest: Duration::from_millis(200),
            mutant: Some(mutant.to_owned()),
            ..common
        };
        let name = format!("{}_{turn}", mutant.replace('-', "_"));
        let outcome = run(servers, plan, &name);
        let seconds = outcome.lasted.as_secs();
        println!(
            "{mutant}, {} faults, {seconds} s:\n{}",
            outcome.seen, outcome.findings
        );
        let findings = &outcome.findings;
        // Poison never has an effect: it cannot show that one was lost.
        let found = match found_as {
            checker::LOST => outcome.sums.lost_in_order > 0,
            name => !findings.of(name).is_empty(),
        };
        // Not empty, and not all is known yet; a daemon that ended by itself is
        // another defect than the one that is looked for.
        found && findings.not_empty.is_empty() && findings.strange_ends.is_empty()
    })
}
