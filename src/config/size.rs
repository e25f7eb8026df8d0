//! Sizes as they are typed: `32MiB`, `100KB`, or a bare number of bytes.

use super::error::{Complaint, shown};

/// The bytes in each unit, the largest first.
const UNITS: [(&str, u64); 7] = [
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("KB", 1_000),
    ("B", 1),
];

const EXAMPLES: &str = "write it like \"32MiB\", \"100KB\" or \"512B\", or as a number of bytes";

/// Reads one whole number with a unit, as bytes.
pub(super) fn parse(text: &str) -> Result<u64, Complaint> {
    let complain = |what: &str| Complaint::new(format!("{what}: {}", shown(text)), EXAMPLES);
    if text.is_empty() {
        return Err(Complaint::new("is empty", EXAMPLES));
    }
    if text.starts_with('-') {
        return Err(complain("is negative"));
    }
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let number = &text[..text.len() - unit.len()];
    if unit.is_empty() {
        return Err(Complaint::new(
            format!("has no unit: {}", shown(text)),
            format!("add a unit or leave out the quotes; {EXAMPLES}"),
        ));
    }
    let factor = UNITS.iter().find(|(name, _)| *name == unit);
    let (false, Some((_, factor))) = (number.is_empty(), factor) else {
        return Err(complain("is not a size"));
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(*factor))
        .ok_or_else(|| complain("is too large a size"))
}

/// `bytes` in the largest unit that needs no fraction.
#[must_use]
pub fn format(bytes: u64) -> String {
    let whole = UNITS
        .iter()
        .find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor));
    match whole {
        Some((unit, factor)) => format!("{}{unit}", bytes / factor),
        None => format!("{bytes}B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_unit_is_read_and_printed() {
        for (text, bytes) in [
            ("32MiB", 32 << 20),
            ("100KB", 100_000),
            ("1GiB", 1 << 30),
            ("3GB", 3_000_000_000),
            ("7MB", 7_000_000),
            ("5KiB", 5 << 10),
            ("0B", 0),
            ("17B", 17),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
            assert_eq!(format(bytes), text);
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "is empty"),
            ("100", "has no unit"),
            ("-1KB", "is negative"),
            ("1.5MiB", "is not a size"),
            ("MiB", "is not a size"),
            ("1 MiB", "is not a size"),
            ("1mb", "is not a size"),
            ("1TB", "is not a size"),
            ("99999999999999999999B", "is too large"),
            ("18446744073709551615GiB", "is too large"),
        ] {
            let complaint = parse(text).unwrap_err();
            assert!(
                complaint.message.starts_with(reason),
                "{text}: {complaint:?}"
            );
            assert!(complaint.hint.contains("32MiB"), "{text}: {complaint:?}");
        }
    }

    proptest! {
        #[test]
        fn a_printed_size_reads_back_the_same(bytes: u64) {
            prop_assert_eq!(parse(&format(bytes)), Ok(bytes));
        }

        #[test]
        fn reading_a_size_never_panics(text in "\\PC*|[0-9]{0,21}[KMGiB]{0,4}") {
            let _ = parse(&text);
        }
    }
}
