//! What a run is to do: read from `ACKONCE_CHAOS_*`, which `script/chaos` sets.

use std::path::PathBuf;
use std::time::Duration;

use crate::nemesis::Kind;

/// Parameters of one run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Of everything that is drawn.
    pub seed: u64,
    /// How long the nemesis works.
    pub length: Duration,
    /// New ids that are published, at most.
    pub messages: usize,
    /// New ids a second.
    pub rate: u32,
    pub daemons: usize,
    pub kinds: Vec<Kind>,
    /// Longest rest between two faults of one kind of nemesis.
    pub rest: Duration,
    /// The rule of the protocol that the daemons break.
    pub mutant: Option<String>,
    /// Where the report goes, in Markdown.
    pub report: Option<PathBuf>,
    /// Where the daemons' logs are kept; nowhere by default.
    pub logs: Option<PathBuf>,
}

impl Plan {
    /// What the environment asks for, and the rest at its default.
    pub fn from_environment() -> Self {
        let kinds = match variable("KINDS") {
            None => Kind::ALL.to_vec(),
            Some(names) => names.split(',').map(kind).collect(),
        };
        let only_cuts = kinds.iter().all(|kind| kind.is_a_cut_in_the_middle());
        let seconds = number("SECONDS").or(number("MINUTES").map(|minutes| minutes * 60));
        Self {
            seed: number("SEED").unwrap_or(DEFAULT_SEED),
            length: Duration::from_secs(seconds.unwrap_or(120)),
            messages: number("MESSAGES").unwrap_or(10_000_000) as usize,
            rate: number("RATE").unwrap_or(200).clamp(1, 10_000) as u32,
            daemons: number("DAEMONS").unwrap_or(3).clamp(1, 16) as usize,
            kinds,
            // Nothing but cuts: as fast as the daemons come back.
            rest: Duration::from_millis(if only_cuts { 0 } else { 4_000 }),
            mutant: variable("MUTANT"),
            report: variable("REPORT").map(PathBuf::from),
            logs: variable("LOGS").map(PathBuf::from),
        }
    }
}

/// The seed of `script/test`. `script/chaos` draws one.
const DEFAULT_SEED: u64 = 20_260_504;

fn kind(name: &str) -> Kind {
    let names: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
    *Kind::ALL
        .iter()
        .find(|kind| kind.name() == name.trim())
        .unwrap_or_else(|| panic!("no kind of fault is called {name:?}; there are {names:?}"))
}

fn variable(name: &str) -> Option<String> {
    let value = std::env::var(format!("ACKONCE_CHAOS_{name}")).ok()?;
    (!value.is_empty()).then_some(value)
}

fn number(name: &str) -> Option<u64> {
    let value = variable(name)?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("ACKONCE_CHAOS_{name} is no whole number: {value:?}")),
    )
}

/// Random numbers that a seed decides (SplitMix64).
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// Its numbers are of this `seed` and `stream` alone.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut dice = Self(seed ^ stream.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        dice.next();
        dice
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    /// One of `0..bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// True in `percent` of all cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Milliseconds from `from` to `to`.
    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from + 1))
    }

    /// One of `items`.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }
}
