//! Durations as they are typed: `500ms`, `10s`, `1m30s`, `24h`, `7d`.

use std::time::Duration;

use super::error::{Complaint, shown};

/// Largest first; the milliseconds in each.
const UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

const EXAMPLES: &str = "write it like \"500ms\", \"10s\", \"1m30s\", \"24h\" or \"7d\"";

/// Reads whole numbers with units, the larger unit first, each unit once.
pub(super) fn parse(text: &str) -> Result<Duration, Complaint> {
    let complain = |what: &str| Complaint::new(format!("{what}: {}", shown(text)), EXAMPLES);
    if text.is_empty() {
        return Err(Complaint::new("is empty", EXAMPLES));
    }
    if text.starts_with('-') {
        return Err(complain("is negative"));
    }
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Complaint::new(
            format!("has no unit: {}", shown(text)),
            format!("add a unit: ms, s, m, h or d; {EXAMPLES}"),
        ));
    }
    let mut rest = text;
    let mut total: u64 = 0;
    let mut smaller = UNITS.as_slice();
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        if digits == 0 {
            return Err(complain("is not a duration"));
        }
        let (number, after) = rest.split_at(digits);
        let letters = after.len()
            - after
                .trim_start_matches(|c: char| c.is_ascii_lowercase())
                .len();
        let (unit, after) = after.split_at(letters);
        let Some(index) = smaller.iter().position(|(name, _)| *name == unit) else {
            return Err(complain("is not a duration"));
        };
        let milliseconds = number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(smaller[index].1))
            .and_then(|part| total.checked_add(part));
        let Some(milliseconds) = milliseconds else {
            return Err(complain("is too large a duration"));
        };
        total = milliseconds;
        smaller = &smaller[index + 1..];
        rest = after;
    }
    Ok(Duration::from_millis(total))
}

/// As the configuration reads it, for what is typed elsewhere.
///
/// # Errors
///
/// What is wrong with `text`, and the way out.
pub fn read(text: &str) -> Result<Duration, String> {
    parse(text).map_err(|Complaint { message, hint }| format!("{message}; {hint}"))
}

/// The shortest text that the configuration reads as `duration`, to the millisecond.
#[must_use]
pub fn format(duration: Duration) -> String {
    let mut rest = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let mut out = String::new();
    for (unit, milliseconds) in UNITS {
        let count = rest / milliseconds;
        rest %= milliseconds;
        if count > 0 {
            out.push_str(&format!("{count}{unit}"));
        }
    }
    if out.is_empty() {
        out.push_str("0ms");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_unit_is_read() {
        for (text, milliseconds) in [
            ("0ms", 0),
            ("500ms", 500),
            ("10s", 10_000),
            ("1m30s", 90_000),
            ("24h", 86_400_000),
            ("1d2h3m4s5ms", 93_784_005),
            ("007s", 7_000),
        ] {
            assert_eq!(
                parse(text),
                Ok(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_no_duration_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "is empty"),
            ("30", "has no unit"),
            ("-5s", "is negative"),
            ("5 s", "is not a duration"),
            ("1.5s", "is not a duration"),
            ("30s1m", "is not a duration"),
            ("1s1s", "is not a duration"),
            ("5S", "is not a duration"),
            ("5us", "is not a duration"),
            ("ms", "is not a duration"),
            ("5s3", "is not a duration"),
            ("99999999999999999999s", "is too large"),
            ("300000000000d", "is too large"),
        ] {
            let complaint = parse(text).unwrap_err();
            assert!(
                complaint.message.starts_with(reason),
                "{text}: {complaint:?}"
            );
            assert!(complaint.hint.contains("1m30s"), "{text}: {complaint:?}");
        }
    }

    proptest! {
        #[test]
        fn a_printed_duration_reads_back_the_same(milliseconds: u64) {
            let duration = Duration::from_millis(milliseconds);
            prop_assert_eq!(parse(&format(duration)), Ok(duration));
        }

        #[test]
        fn reading_a_duration_never_panics(text in "\\PC*|([0-9]{0,21}(ms|s|m|h|d)){0,6}") {
            let _ = parse(&text);
        }
    }
}
