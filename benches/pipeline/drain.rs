//! How fast a subject drains a full queue, as an outsider sees it.
//!
//! The queue is filled first. Then the subject starts, and the number of
//! messages that wait is asked of the broker every few milliseconds. A broker
//! hands over no more than the prefetch before something is acked, so once the
//! subject is at work the queue shrinks as fast as it acks, to within one
//! prefetch over the whole stretch. The stretch leaves out the beginning
//! (connecting, first statements) and the end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::database::Database;
use crate::messages::Load;
use crate::stage::{PATIENCE, Stage};
use crate::subject::{self, Kind, Settings, Subject};

/// Between two looks at the queue.
const LOOK_EVERY: Duration = Duration::from_millis(4);

/// Looks that the stretch must hold to be called measured.
const LOOKS_MIN: usize = 10;

/// What a drain was like.
#[derive(Debug, Clone, Copy)]
pub struct Drain {
    /// Messages acked a second.
    pub per_second: f64,
    /// Processor seconds of the subject for a million messages.
    pub cpu_per_million: f64,
    /// The same of the whole machine: subject, servers and observer.
    pub machine_cpu_per_million: f64,
}

struct Sample {
    at: Instant,
    ready: u32,
    cpu: Duration,
    machine_cpu: Duration,
}

/// Fills the queue, has a subject drain it, and checks that every message took
/// effect once and none came back.
pub fn drain(
    stage: &mut Stage,
    database: &mut Database,
    kind: &Kind,
    settings: &Settings,
    load: &Load,
) -> Result<Drain> {
    let effects = database.number(settings.script.applied)?;
    ensure!(
        effects == 0,
        "{effects} effects are there before {kind} ran"
    );
    load.publish(&settings.amqp, &settings.queue)?;
    let mut subject = Subject::spawn(kind, settings, stage.folder())?;
    let samples = watch(stage, &mut subject, &settings.queue, load.len())?;
    match kind {
        // A call that waits for its receiver uses no processor either.
        Kind::Caller { .. } => {
            let rows = "SELECT count(*) FROM ackonce.ledger";
            await_count(database, &mut subject, rows, load.distinct())?;
        }
        _ if kind.has_effects() => {
            let applied = settings.script.applied;
            await_count(database, &mut subject, applied, load.distinct())?;
        }
        _ => {}
    }
    finish(stage, database, subject, settings, load.distinct())?;
    stretch(&samples, load.len()).with_context(|| format!("failed to measure {kind}"))
}

/// Stops the subject and proves that it did its work, all of it, once:
/// `distinct` ids took effect.
pub fn finish(
    stage: &mut Stage,
    database: &mut Database,
    mut subject: Subject,
    settings: &Settings,
    distinct: usize,
) -> Result<()> {
    let kind = subject.kind();
    subject.await_idle()?;
    subject.stop()?;
    stage
        .await_drained(settings.queue_type)
        .with_context(|| format!("{kind} left messages behind"))?;
    if kind.has_effects() {
        let effects = database.number(settings.script.applied)?;
        let ids = database.number("SELECT count(*) FROM ackonce.ledger")?;
        let wanted = i64::try_from(distinct)?;
        ensure!(
            effects == wanted && ids == wanted,
            "{kind} made {effects} effects of {ids} ids where {wanted} were due"
        );
    }
    Ok(())
}

/// Looks at the queue until it is empty.
fn watch(
    stage: &mut Stage,
    subject: &mut Subject,
    queue: &str,
    count: usize,
) -> Result<Vec<Sample>> {
    let mut samples: Vec<Sample> = Vec::new();
    let mut progress = Instant::now();
    loop {
        let before = Instant::now();
        let ready = stage.look(queue)?.ready;
        let now = Instant::now();
        samples.push(Sample {
            at: before + (now - before) / 2,
            ready,
            cpu: subject.cpu()?,
            machine_cpu: subject::machine_cpu()?,
        });
        if ready == 0 {
            return Ok(samples);
        }
        let last = samples.len().checked_sub(2).map(|i| samples[i].ready);
        if last != Some(ready) {
            progress = now;
        }
        subject.ensure_alive()?;
        ensure!(
            progress.elapsed() < PATIENCE,
            "{ready} of {count} messages still wait after {PATIENCE:?} without progress\n{}",
            subject.log()
        );
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Waits until the one number of `query` is `count`.
pub fn await_count(
    database: &mut Database,
    subject: &mut Subject,
    query: &str,
    count: usize,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let count = i64::try_from(count)?;
    loop {
        let rows = database.number(query)?;
        if rows >= count {
            return Ok(());
        }
        subject.ensure_alive()?;
        ensure!(
            Instant::now() < deadline,
            "{query} says {rows} after {PATIENCE:?} where {count} are due\n{}",
            subject.log()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// From the first look at which a tenth is gone to the last one at which a
/// twentieth is left.
fn stretch(samples: &[Sample], count: usize) -> Result<Drain> {
    let (high, low) = (count * 9 / 10, count / 20);
    let inside: Vec<&Sample> = samples
        .iter()
        .filter(|s| (low..=high).contains(&(s.ready as usize)))
        .collect();
    ensure!(
        inside.len() >= LOOKS_MIN,
        "{count} messages were gone after {} looks: send more",
        inside.len()
    );
    let (first, last) = (inside[0], inside[inside.len() - 1]);
    let messages = f64::from(first.ready) - f64::from(last.ready);
    let per_million = |used: Duration| used.as_secs_f64() / messages * 1e6;
    Ok(Drain {
        per_second: messages / (last.at - first.at).as_secs_f64(),
        cpu_per_million: per_million(last.cpu - first.cpu),
        machine_cpu_per_million: per_million(last.machine_cpu - first.machine_cpu),
    })
}
