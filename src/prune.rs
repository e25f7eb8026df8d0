//! Pruning: the thread that deletes what is older than the retention, and the
//! same by hand.
//!
//! One daemon at a time does it, whoever gets the server's advisory lock. A
//! round sweeps a part of each table, so small that the whole is gone through
//! in a twentieth of the retention: its cost is even, and the same whether
//! there is something to delete or not. No round waits for another, and none
//! disturbs a consumer: an error is told once and tried again in the next.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::config::{checked, format_duration};
use crate::ledger::prune::{Age, Counts, Place, Sweeper, Table, Uncovered};
use crate::observe::metrics::Metrics;
use crate::postgres::{Error, Session};
use crate::stop::Stop;

/// Pages that one statement looks at: half a MiB, and a few milliseconds.
const CHUNK_PAGES: u64 = 64;

/// Pages that a round goes through at the least: 8 MiB, some 75,000 ledger
/// rows, so that a small ledger is swept whole each time.
const ROUND_PAGES: u64 = 1_024;

/// In this part of the retention every page is looked at once: so much longer
/// than the retention can a row live.
const SWEEPS_PER_RETENTION: u64 = 20;

/// How many times as long as a statement took, nothing is done after it.
const REST_FACTOR: u32 = 4;

/// Longest such rest.
const REST_MAX: Duration = Duration::from_secs(1);

/// How often old dead letters are warned of.
const WARN_EVERY: Duration = Duration::from_secs(24 * 60 * 60);

/// What came of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// It is through. So many rows are deleted.
    Through(Counts),
    /// It was told to stop. So many rows are deleted.
    Stopped(Counts),
    /// Somebody else prunes.
    Busy,
    /// Somebody else did so a moment ago.
    Early,
}

/// Starts the daemon's pruning, which is counted in `metrics`. It ends with `stop`; nobody needs to wait for
/// it, since a batch that is cut off is a transaction that did not happen.
///
/// # Errors
///
/// When the thread cannot be started.
pub fn start(config: &checked::Config, metrics: &Arc<Metrics>, stop: &Stop) -> anyhow::Result<()> {
    let (postgres, ledger) = (config.postgres.clone(), config.ledger.clone());
    let metrics = Arc::clone(metrics);
    let stop = stop.clone();
    std::thread::Builder::new()
        .name("prune".to_owned())
        .spawn(move || {
            let mut told = Told::default();
            loop {
                let once = || daily_and_round(&postgres, &ledger, &metrics, &mut told, &stop);
                if catch_unwind(AssertUnwindSafe(once)).is_err() {
                    log::error!("pruning panicked");
                }
                if stop.wait(ledger.prune_every) {
                    return;
                }
            }
        })
        .map(drop)
        .context("failed to start the thread that prunes the ledger")
}

/// What the log has been told.
#[derive(Default)]
struct Told {
    error: Option<String>,
    warned: Option<Instant>,
}

fn daily_and_round(
    postgres: &checked::Postgres,
    ledger: &checked::Ledger,
    metrics: &Metrics,
    told: &mut Told,
    stop: &Stop,
) {
    let started = Instant::now();
    let result = Session::open(postgres, "prune").and_then(|session| {
        let mut sweeper = Sweeper::new(session);
        if told.warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            for uncovered in sweeper.uncovered(ledger.retention)? {
                log::warn!(consumer = uncovered.consumer.as_str(); "{}", warning(&uncovered, ledger.retention));
            }
            told.warned = Some(Instant::now());
        }
        round(&mut sweeper, ledger, stop)
    });
    if let Ok(Round::Through(counts) | Round::Stopped(counts)) = &result {
        metrics.pruned([
            counts.ledger,
            counts.journal,
            counts.suspects,
            counts.claims,
        ]);
    }
    match result {
        Ok(Round::Through(counts) | Round::Stopped(counts)) if counts.total() > 0 => log::info!(
            ledger = counts.ledger, journal = counts.journal, suspects = counts.suspects,
            claims = counts.claims,
            duration_ms = started.elapsed().as_millis() as u64;
            "pruned rows older than the retention"
        ),
        Ok(_) => {}
        Err(error) => {
            let kind = kind(&error);
            if told.error.as_ref() != Some(&kind) {
                log::warn!("failed to prune the ledger, and goes on trying: {error}");
            }
            told.error = Some(kind);
            return;
        }
    }
    if told.error.take().is_some() {
        log::info!("the ledger can be pruned again");
    }
}

/// What two errors must share for the second to be no news.
fn kind(error: &Error) -> String {
    match error {
        Error::Unreachable { .. } => "unreachable".to_owned(),
        Error::Lost(_) => "lost".to_owned(),
        Error::Refused(failure) => match &failure.code {
            Some(code) => code.clone(),
            None => failure.text.clone(),
        },
    }
}

/// One round of the daemon's pruning, if it is time for one and nobody else is
/// at it.
///
/// # Errors
///
/// When the server refuses or cannot be asked. What is deleted by then stays
/// deleted.
pub fn round(sweeper: &mut Sweeper, config: &checked::Ledger, stop: &Stop) -> Result<Round, Error> {
    if !sweeper.lock()? {
        return Ok(Round::Busy);
    }
    let places = sweeper.places()?;
    // Several daemons share one round: theirs come a moment apart, not to the
    // millisecond.
    let soon = config.prune_every / 10 * 9;
    let fresh = |place: &Place| place.rested.is_some_and(|rested| rested < soon);
    if places.iter().all(fresh) {
        sweeper.unlock()?;
        return Ok(Round::Early);
    }
    let age = Age::new(config.retention);
    let mut total = Counts::default();
    for place in places {
        let pages = slice(&place, config);
        let swept = sweep(
            sweeper,
            &place,
            pages.clone(),
            age,
            config.prune_batch,
            stop,
        )?;
        total += swept.counts;
        let next = if swept.next_page >= place.pages {
            0
        } else {
            swept.next_page
        };
        sweeper.rest(place.table, next)?;
        if swept.next_page < pages.end {
            sweeper.unlock()?;
            return Ok(Round::Stopped(total));
        }
    }
    sweeper.unlock()?;
    Ok(Round::Through(total))
}

/// The pages of one round.
fn slice(place: &Place, config: &checked::Ledger) -> Range<u64> {
    let start = if place.next_page < place.pages {
        place.next_page
    } else {
        0
    };
    let every = config.prune_every.as_secs_f64();
    let part = every / config.retention.as_secs_f64() * SWEEPS_PER_RETENTION as f64;
    let count = (place.pages as f64 * part).ceil() as u64;
    let end = start.saturating_add(count.max(ROUND_PAGES));
    start..end.min(place.pages)
}

struct Swept {
    counts: Counts,
    /// What comes after the last page that was gone through.
    next_page: u64,
}

fn sweep(
    sweeper: &mut Sweeper,
    place: &Place,
    pages: Range<u64>,
    age: Age,
    batch: usize,
    stop: &Stop,
) -> Result<Swept, Error> {
    let mut counts = Counts::default();
    let mut next_page = pages.start;
    while next_page < pages.end {
        let chunk = next_page..pages.end.min(next_page + CHUNK_PAGES);
        let started = Instant::now();
        let deleted = sweeper.delete(place.table, chunk.clone(), age, batch)?;
        counts += deleted;
        // A full batch is followed by another one from the same pages.
        if of(place.table, &deleted) < batch as u64 {
            next_page = chunk.end;
        }
        let rest = (started.elapsed() * REST_FACTOR).min(REST_MAX);
        if stop.wait(rest) {
            break;
        }
    }
    Ok(Swept { counts, next_page })
}

fn of(table: Table, counts: &Counts) -> u64 {
    match table {
        Table::Ledger => counts.ledger,
        Table::Journal => counts.journal,
        Table::Suspects => counts.suspects,
        Table::Claims => counts.claims,
    }
}

/// Deletes what is older than `older_than` in every table, from end to end.
///
/// # Errors
///
/// As [`round`].
pub fn delete(
    sweeper: &mut Sweeper,
    config: &checked::Ledger,
    older_than: Duration,
    stop: &Stop,
) -> Result<Round, Error> {
    if !sweeper.lock()? {
        return Ok(Round::Busy);
    }
    let age = Age::by_hand(older_than, config.retention);
    let mut total = Counts::default();
    for place in sweeper.places()? {
        let batch = config.prune_batch;
        let swept = sweep(sweeper, &place, 0..place.pages, age, batch, stop)?;
        total += swept.counts;
        if swept.next_page < place.pages {
            return Ok(Round::Stopped(total));
        }
    }
    sweeper.unlock()?;
    Ok(Round::Through(total))
}

/// Counts what [`delete`] would delete.
///
/// # Errors
///
/// When the server refuses or cannot be asked.
pub fn count(
    sweeper: &mut Sweeper,
    config: &checked::Ledger,
    older_than: Duration,
    stop: &Stop,
) -> Result<Round, Error> {
    let age = Age::by_hand(older_than, config.retention);
    let mut total = Counts::default();
    for place in sweeper.places()? {
        let mut next_page = 0;
        while next_page < place.pages {
            if stop.is_set() {
                return Ok(Round::Stopped(total));
            }
            let end = place.pages.min(next_page + ROUND_PAGES);
            total += sweeper.count(place.table, next_page..end, age)?;
            next_page = end;
        }
    }
    Ok(Round::Through(total))
}

/// What is to be known of dead letters that are older than the retention.
#[must_use]
pub fn warning(uncovered: &Uncovered, retention: Duration) -> String {
    format!(
        "{} dead letter(s), the oldest of {} UTC, are older than the ledger's retention of {} and \
         were never applied: should one be replayed, the ledger no longer knows of copies of it",
        uncovered.count,
        uncovered.oldest,
        format_duration(retention),
    )
}
