//! What was measured, as a table and as JSON, beside the targets.

use std::fmt::Write as _;

use anyhow::Result;
use serde_json::{Value, json};

use crate::stats::median;

/// Values of one measure, one for each round.
struct Measure {
    key: String,
    unit: &'static str,
    values: Vec<f64>,
}

/// Everything that was measured, in the order in which it was measured first;
/// what belongs together by the first word of its key stands together.
#[derive(Default)]
pub struct Report {
    measures: Vec<Measure>,
    remarks: Vec<String>,
    about: Vec<(&'static str, String)>,
}

/// What is to be reached, and what of it is known.
struct Target {
    name: &'static str,
    wanted: String,
    value: Option<f64>,
    reached: Option<bool>,
}

impl Report {
    /// Says something about the machine, the servers or the run.
    pub fn about(&mut self, name: &'static str, value: String) {
        self.about.push((name, value));
    }

    /// Adds one round's value of a measure.
    pub fn add(&mut self, key: &str, unit: &'static str, value: f64) {
        match self.measures.iter_mut().find(|m| m.key == key) {
            Some(measure) => measure.values.push(value),
            None => self.measures.push(Measure {
                key: key.to_owned(),
                unit,
                values: vec![value],
            }),
        }
    }

    /// Says something that stands below the tables.
    pub fn remark(&mut self, remark: String) {
        self.remarks.push(remark);
    }

    /// Takes back every measure whose key begins so, and says why.
    pub fn withdraw(&mut self, prefix: &str, why: &str) {
        self.measures.retain(|m| !m.key.starts_with(prefix));
        self.remark(format!("{prefix} was not measured: {why}"));
    }

    fn median(&self, key: &str) -> Option<f64> {
        let measure = self.measures.iter().find(|m| m.key == key)?;
        Some(median(&measure.values))
    }

    fn ratio(&self, key: &str, to: &str) -> Option<f64> {
        Some(self.median(key)? / self.median(to)?)
    }

    fn targets(&self) -> Vec<Target> {
        let at_least = |name, value: Option<f64>, bound: f64| Target {
            name,
            wanted: format!("at least {bound}"),
            value,
            reached: value.map(|value| value >= bound),
        };
        let at_most = |name, value: Option<f64>, bound: f64| Target {
            name,
            wanted: format!("at most {bound}"),
            value,
            reached: value.map(|value| value <= bound),
        };
        let throughput = |queue: &str, to: &str| {
            self.ratio(
                &format!("throughput/{queue}/daemon-4w/0%"),
                &format!("throughput/{queue}/{to}/0%"),
            )
        };
        let cpu = |queue: &str| {
            self.ratio(
                &format!("cpu-of-the-machine/{queue}/daemon-4w/0%"),
                &format!("cpu-of-the-machine/{queue}/floor/0%"),
            )
        };
        let script =
            |name: &str, to: &str| self.ratio(&format!("scripts/{name}"), &format!("scripts/{to}"));
        let p99 = |queue: &str| self.median(&format!("latency/{queue}/daemon-4w/1000/p99"));
        let p99_ratio = |queue: &str| {
            self.ratio(
                &format!("latency/{queue}/daemon-4w/1000/p99"),
                &format!("latency/{queue}/reference/1000/p99"),
            )
        };
        let wrk = |receiver: &str, at_a_time: u32| {
            self.ratio(
                &format!("http/{receiver}/daemon-{at_a_time}w"),
                &format!("http/{receiver}/wrk-{at_a_time}c"),
            )
        };
        vec![
            at_least(
                "of the ceiling, classic",
                throughput("classic", "bare-one-by-one"),
                0.9,
            ),
            at_least("of the floor, classic", throughput("classic", "floor"), 0.9),
            at_least("of the floor, quorum", throughput("quorum", "floor"), 0.9),
            at_most("cpu to the floor's, classic", cpu("classic"), 1.2),
            at_most("cpu to the floor's, quorum", cpu("quorum"), 1.2),
            at_least(
                "4 workers to 1, classic",
                throughput("classic", "daemon-1w"),
                1.0,
            ),
            at_least(
                "4 workers to 1, quorum",
                throughput("quorum", "daemon-1w"),
                1.0,
            ),
            at_least(
                "of none, one poison in 10,000",
                self.ratio("poison/one-in-10000", "poison/none"),
                0.95,
            ),
            at_least("counter to INSERT", script("counter", "insert"), 0.5),
            at_least(
                "INSERT with 1 ms to PostgreSQL",
                script("insert-1ms", "insert"),
                0.8,
            ),
            at_least(
                "ten counters, 4 workers to 1",
                script("ten-counters-4w", "ten-counters-1w"),
                0.5,
            ),
            at_least(
                "transfers, 4 workers to 1",
                script("transfers-4w", "transfers-1w"),
                0.5,
            ),
            at_least(
                "upserts of one key to distinct",
                script("upsert-one-key", "upsert-distinct"),
                0.67,
            ),
            at_least(
                "of the ceiling, quorum",
                throughput("quorum", "bare-one-by-one"),
                0.9,
            ),
            at_least(
                "times the reference, classic",
                throughput("classic", "reference"),
                6.0,
            ),
            at_least(
                "times the reference, quorum",
                throughput("quorum", "reference"),
                6.0,
            ),
            at_most("p99 at 1,000/s, classic, ms", p99("classic"), 10.0),
            at_most("p99 at 1,000/s, quorum, ms", p99("quorum"), 10.0),
            at_most("p99 to the reference's, classic", p99_ratio("classic"), 1.0),
            at_most("p99 to the reference's, quorum", p99_ratio("quorum"), 1.0),
            at_least(
                "of the empty ledger, 10 million rows",
                self.ratio("growth/10000000-rows", "growth/0-rows"),
                0.85,
            ),
            at_most(
                "MiB with 1,000 of 1 KB in flight",
                self.median("memory/1000-of-1KB"),
                64.0,
            ),
            at_most("MiB idle", self.median("memory/idle"), 20.0),
            at_least("of wrk's requests, 16 at a time", wrk("at-once", 16), 0.5),
            at_least("of wrk's requests, 64 at a time", wrk("at-once", 64), 0.5),
            at_least("… of 5 ms each, 16 at a time", wrk("5ms", 16), 0.5),
            at_least("… of 5 ms each, 64 at a time", wrk("5ms", 64), 0.5),
        ]
    }

    /// For humans.
    pub fn table(&self) -> Result<String> {
        let mut out = String::new();
        for (name, value) in &self.about {
            writeln!(out, "{name}: {value}")?;
        }
        writeln!(out)?;
        let width = self.measures.iter().map(|m| m.key.len()).max().unwrap_or(0);
        writeln!(
            out,
            "{:width$} {:>12} {:>12} {:>12}  unit",
            "measure", "median", "least", "most"
        )?;
        let mut measures: Vec<&Measure> = self.measures.iter().collect();
        let group = |m: &Measure| {
            let word = m.key.split('/').next().unwrap_or_default();
            self.measures
                .iter()
                .position(|m| m.key.starts_with(&format!("{word}/")))
        };
        measures.sort_by_key(|m| group(m));
        for measure in measures {
            let [middle, least, most] = measure.summary().map(number);
            writeln!(
                out,
                "{:width$} {middle:>12} {least:>12} {most:>12}  {}",
                measure.key, measure.unit
            )?;
        }
        writeln!(out)?;
        let targets = self.targets();
        let width = targets.iter().map(|t| t.name.len()).max().unwrap_or(0);
        writeln!(
            out,
            "{:width$} {:>14} {:>12}",
            "target", "wanted", "measured"
        )?;
        for target in &targets {
            let value = target.value.map_or("-".to_owned(), number);
            let verdict = match target.reached {
                Some(true) => "reached",
                Some(false) => "NOT REACHED",
                None => "not measured",
            };
            let (name, wanted) = (target.name, &target.wanted);
            writeln!(out, "{name:width$} {wanted:>14} {value:>12}  {verdict}")?;
        }
        for remark in &self.remarks {
            writeln!(out, "\n{remark}")?;
        }
        Ok(out)
    }

    /// For programs: every round's value.
    pub fn json(&self) -> Value {
        let about: serde_json::Map<String, Value> = self
            .about
            .iter()
            .map(|(name, value)| ((*name).to_owned(), json!(value)))
            .collect();
        let measures: Vec<Value> = self
            .measures
            .iter()
            .map(|m| {
                let [median, least, most] = m.summary();
                json!({
                    "measure": m.key, "unit": m.unit, "median": median, "least": least,
                    "most": most, "rounds": m.values,
                })
            })
            .collect();
        let targets: Vec<Value> = self
            .targets()
            .iter()
            .map(|t| {
                json!({
                    "target": t.name, "wanted": t.wanted, "measured": t.value,
                    "reached": t.reached,
                })
            })
            .collect();
        json!({
            "about": about, "measures": measures, "targets": targets, "remarks": self.remarks,
        })
    }
}

impl Measure {
    fn summary(&self) -> [f64; 3] {
        let least = self.values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self
            .values
            .iter()
            .copied()
            .fold(f64::NEG_INFINITY, f64::max);
        [median(&self.values), least, most]
    }
}

/// Whole from a hundred on, and with two decimals below.
fn number(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}
