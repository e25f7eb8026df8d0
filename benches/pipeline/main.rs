//! The benchmark: the daemon's real binary beside the bare client and beside
//! the usual way, on the same servers, queues and messages. Run it with
//! `script/bench`; docs/performance.md says how it measures.

mod amqp;
mod consumers;
mod database;
mod drain;
mod far;
mod growth;
mod http;
mod latency;
mod memory;
mod messages;
mod poison;
mod report;
mod scripts;
mod stage;
mod stats;
mod subject;
mod tap;
mod throughput;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};

use crate::report::Report;
use crate::stage::{Servers, Stage};

#[derive(Debug, Parser)]
#[command(
    name = "script/bench",
    about = "Measures the daemon on servers of its own"
)]
struct Arguments {
    /// Fewer messages and shorter loads: for a look, not for a figure
    #[arg(long)]
    quick: bool,
    /// Write everything that was measured, each round of it, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure this part only; may be given several times
    #[arg(long, value_name = "PART")]
    only: Vec<Part>,
    /// Rounds, each of which measures everything once
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Messages that a subject drains
    #[arg(long, value_parser = clap::value_parser!(u32).range(1000..))]
    messages: Option<u32>,
    /// What cargo says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// This program as one of the consumers that the daemon is measured against
    #[command(hide = true)]
    Subject(consumers::Arguments),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Throughput,
    Latency,
    Growth,
    Memory,
    Pruning,
    Poison,
    Scripts,
    Http,
}

/// How much is measured.
pub struct Plan {
    started: Instant,
    /// Rounds, each of which measures everything once.
    pub rounds: u32,
    /// Messages that a subject drains.
    pub messages: usize,
    /// How long each load is offered.
    pub latency_seconds: u32,
    /// Sizes of the ledgers.
    pub ledger_rows: Vec<u64>,
    /// Rows that are too old, for pruning.
    pub expired_rows: u64,
}

impl Plan {
    fn new(arguments: &Arguments) -> Result<Self> {
        let started = Instant::now();
        let mut plan = match arguments.quick {
            true => Self {
                started,
                rounds: 1,
                messages: 20_000,
                latency_seconds: 2,
                ledger_rows: vec![0, 1_000_000],
                expired_rows: 100_000,
            },
            false => Self {
                started,
                rounds: 3,
                messages: 60_000,
                latency_seconds: 8,
                ledger_rows: vec![0, 1_000_000, 10_000_000],
                expired_rows: 1_000_000,
            },
        };
        if let Some(rounds) = arguments.rounds {
            plan.rounds = rounds;
        }
        if let Some(messages) = arguments.messages {
            plan.messages = usize::try_from(messages)?;
        }
        Ok(plan)
    }

    /// Tells on standard error what is being measured.
    pub fn say(&self, round: u32, what: &str) {
        let (round, rounds) = (round + 1, self.rounds);
        let seconds = self.started.elapsed().as_secs();
        eprintln!("{seconds:>4} s  round {round} of {rounds}  {what}");
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.command {
        Some(Command::Subject(subject)) => consumers::run(subject),
        None => bench(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    let plan = Plan::new(arguments)?;
    let mut stage = Stage::new(Servers::from_env()?)?;
    let mut report = Report::default();
    describe(&mut report, &mut stage, &plan)?;
    let mut failed = 0;
    for part in Part::value_variants() {
        if !arguments.only.is_empty() && !arguments.only.contains(part) {
            continue;
        }
        let (stage, report) = (&mut stage, &mut report);
        let result = match part {
            Part::Throughput => throughput::run(stage, &plan, report),
            Part::Latency => latency::run(stage, &plan, report),
            Part::Growth => growth::run(stage, &plan, report),
            Part::Memory => memory::run(stage, &plan, report),
            Part::Pruning => growth::pruning(stage, &plan, report),
            Part::Poison => poison::run(stage, &plan, report),
            Part::Scripts => scripts::run(stage, &plan, report),
            Part::Http => http::run(stage, &plan, report),
        };
        // What the others measured is worth having all the same.
        if let Err(error) = result {
            failed += 1;
            report.remark(format!("FAILED: {error:#}"));
        }
    }
    print!("{}", report.table()?);
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report.json())?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    ensure!(failed == 0, "{failed} parts were not measured to their end");
    Ok(())
}

/// Says on what the figures were made: without it they mean nothing.
fn describe(report: &mut Report, stage: &mut Stage, plan: &Plan) -> Result<()> {
    let cores = std::thread::available_parallelism()?.get();
    report.about("cores", cores.to_string());
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == "model name").then(|| value.trim().to_owned())
    });
    report.about("processor", model.unwrap_or("unknown".to_owned()));
    for (name, version) in stage.versions()? {
        report.about(name, version);
    }
    if let Ok(storage) = std::env::var("ACKONCE_BENCH_STORAGE") {
        report.about("storage", storage);
    }
    report.about("rounds", plan.rounds.to_string());
    report.about("messages", plan.messages.to_string());
    Ok(())
}
