//! What a run was and what came of it, in Markdown.

use std::fmt::Write;
use std::time::Duration;

use crate::checker::{Findings, Sums};
use crate::nemesis::Kind;
use crate::servers::Server;
use crate::stage::Stage;

/// How a run ended.
pub struct Outcome {
    pub findings: Findings,
    pub sums: Sums,
    /// From its begin to the end of the comparison.
    pub lasted: Duration,
    /// Faults that were seen to happen.
    pub seen: u64,
    /// What `ackonce why` says of ids that were found.
    pub explained: String,
    pub report: String,
}

/// The report of a run. `length` is the time from its begin to the last fault.
pub fn write(
    stage: &Stage<'_>,
    findings: &Findings,
    sums: &Sums,
    explained: &str,
    length: Duration,
) -> String {
    let mut text = String::new();
    // Writing into a string cannot fail.
    let _ = try_write(&mut text, stage, findings, sums, length);
    if !explained.is_empty() {
        text += &format!("\n```console\n{explained}```\n");
    }
    text
}

fn try_write(
    text: &mut String,
    stage: &Stage<'_>,
    findings: &Findings,
    sums: &Sums,
    length: Duration,
) -> std::fmt::Result {
    let plan = &stage.plan;
    let mutant = plan.mutant.as_deref().unwrap_or("none");
    writeln!(
        text,
        "Seed {}, {} s, {} daemons, {} new ids a second at most, RabbitMQ {}, mutant: {mutant}.\n",
        plan.seed,
        length.as_secs(),
        plan.daemons,
        plan.rate,
        stage.broker_version
    )?;
    writeln!(text, "| found | |\n|---|---|")?;
    for (name, found) in findings.each() {
        writeln!(text, "| {name} | {} |", found.len())?;
    }
    writeln!(text, "\n| messages | |\n|---|---|")?;
    writeln!(text, "| ids | {} |", sums.ids)?;
    writeln!(
        text,
        "| publishes, duplicates included | {} |",
        sums.attempted
    )?;
    writeln!(
        text,
        "| ids confirmed by the broker | {} |",
        sums.confirmed_ids
    )?;
    writeln!(text, "| ids in effect, once | {} |", sums.effects)?;
    writeln!(text, "| ids dead-lettered | {} |", sums.dead_ids)?;
    writeln!(text, "| of these in effect too | {} |", sums.both)?;
    for (reason, count) in &sums.reasons {
        writeln!(text, "| dead-lettered as `{reason}` | {count} |")?;
    }
    writeln!(text, "\n| fault | tried | happened |\n|---|---|---|")?;
    let tally = stage.tally.lock().expect("the tally");
    for (name, (tried, seen)) in tally.iter() {
        writeln!(text, "| {name} | {tried} | {seen} |")?;
    }
    let seen: u64 = tally.values().map(|(_, seen)| seen).sum();
    let tried: u64 = tally.values().map(|(tried, _)| tried).sum();
    writeln!(text, "| all | {tried} | {seen} |")?;
    write_recoveries(text, stage)?;
    write_lives(text, stage)
}

fn write_recoveries(text: &mut String, stage: &Stage<'_>) -> std::fmt::Result {
    let recoveries = stage.recoveries.lock().expect("the recoveries");
    if recoveries.is_empty() {
        return Ok(());
    }
    writeln!(
        text,
        "\n| server is back | times | first progress, median | at most | every daemon, median | at most |\n\
         |---|---|---|---|---|---|"
    )?;
    for server in Server::ALL {
        let of_it = recoveries
            .iter()
            .filter(|recovery| recovery.server == server);
        let (mut first, mut last): (Vec<_>, Vec<_>) = of_it
            .map(|recovery| (recovery.first, recovery.last))
            .unzip();
        if first.is_empty() {
            continue;
        }
        first.sort();
        last.sort();
        let middle = first.len() / 2;
        let end = first.len() - 1;
        writeln!(
            text,
            "| {} | {} | {:.2?} | {:.2?} | {:.2?} | {:.2?} |",
            server.name(),
            first.len(),
            first[middle],
            first[end],
            last[middle],
            last[end]
        )?;
    }
    Ok(())
}

fn write_lives(text: &mut String, stage: &Stage<'_>) -> std::fmt::Result {
    let mut lives = stage.fleet.past_lives();
    lives.sort_by_key(|life| std::cmp::Reverse(life.lasted));
    writeln!(
        text,
        "\n{} lives of daemons; the longest:\n",
        stage.fleet.lives()
    )?;
    writeln!(
        text,
        "| daemon | lived | resident after 20 s | at most since | at the end |\n|---|---|---|---|---|"
    )?;
    for life in lives.iter().take(3) {
        let [first, most, last] = life.memory_kib.map(|kib| kib as f64 / 1024.0);
        writeln!(
            text,
            "| {} | {} s | {first:.1} MiB | {most:.1} MiB | {last:.1} MiB |",
            life.daemon,
            life.lasted.as_secs()
        )?;
    }
    Ok(())
}

/// Kinds of the plan that cannot happen on this machine, each with the reason.
pub fn impossible(stage: &Stage<'_>) -> Vec<(Kind, &'static str)> {
    let mut impossible = Vec::new();
    if crate::fleet::faketime().is_none() {
        impossible.push((Kind::DaemonClock, "libfaketime is not installed"));
    }
    if stage.servers.disk().is_none() {
        let why = "a file system cannot be mounted, or PostgreSQL cannot reach it";
        impossible.push((Kind::PostgresDiskFull, why));
    }
    impossible.retain(|(kind, _)| stage.plan.kinds.contains(kind));
    impossible
}
