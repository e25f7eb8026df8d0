//! Which bodies `jsonb` can hold, and hold within a bound.

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// Most elements of arrays and members of objects: each takes up to 120 bytes of
/// PostgreSQL's memory while the body becomes `jsonb`.
const ELEMENTS_MAX: usize = 1_000_000;

/// Most digits of one number, written out without its exponent: `jsonb` holds
/// numbers as they are written, so that `1e-16000` becomes 16,000 digits. The
/// smallest double has 324, and 17 that count.
const DIGITS_MAX: usize = 400;

/// Most digits of all numbers that have an exponent, written out.
const EXPANDED_MAX: usize = 4_000_000;

/// Whether `jsonb` can hold the body, and within a bound: JSON of at most 128
/// levels, [`ELEMENTS_MAX`] elements and [`DIGITS_MAX`] digits a number, without
/// the escape `\u0000`.
pub(super) fn is_storable_json(body: &[u8]) -> bool {
    is_bounded(body) && serde_json::from_slice::<Storable>(body).is_ok()
}

/// Whether there are no more elements and digits than the bounds allow. Of what
/// is no JSON it may say anything.
fn is_bounded(body: &[u8]) -> bool {
    let (mut elements, mut expanded) = (0_usize, 0_usize);
    let mut at = 0;
    while let Some(byte) = body.get(at) {
        at += 1;
        match byte {
            b'"' => at += string_length(&body[at..]),
            b',' | b'[' | b'{' => elements += 1,
            b'0'..=b'9' => {
                let rest = &body[at - 1..];
                let is_number =
                    |b: &u8| matches!(b, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-');
                let length = rest.iter().take_while(|b| is_number(b)).count();
                let (digits, exponent) = digits(&rest[..length]);
                if digits.saturating_add(exponent) > DIGITS_MAX {
                    return false;
                }
                expanded += if exponent > 0 { digits + exponent } else { 0 };
                at += length - 1;
            }
            _ => {}
        }
        if elements > ELEMENTS_MAX || expanded > EXPANDED_MAX {
            return false;
        }
    }
    true
}

/// Bytes up to and with the quote that ends a string.
fn string_length(bytes: &[u8]) -> usize {
    let mut is_escaped = false;
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    bytes.len()
}

/// The digits of a number, and how many its exponent adds.
fn digits(number: &[u8]) -> (usize, usize) {
    let mut parts = number.splitn(2, |b| matches!(b, b'e' | b'E'));
    let count = |part: &[u8]| part.iter().filter(|b| b.is_ascii_digit()).count();
    let digits = parts.next().map_or(0, count);
    let exponent = parts.next().map_or(0, |part| {
        let figures = part.iter().filter(|b| b.is_ascii_digit());
        figures.fold(0_usize, |sum, figure| {
            sum.saturating_mul(10)
                .saturating_add(usize::from(figure - b'0'))
        })
    });
    (digits, exponent)
}

/// Deserialises from any JSON that `jsonb` can hold, keeping nothing of it.
struct Storable;

impl<'de> Deserialize<'de> for Storable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StorableVisitor)
    }
}

struct StorableVisitor;

impl<'de> Visitor<'de> for StorableVisitor {
    type Value = Storable;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON without NUL characters")
    }

    fn visit_unit<E>(self) -> Result<Storable, E> {
        Ok(Storable)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Storable, E> {
        Ok(Storable)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Storable, E> {
        Ok(Storable)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Storable, E> {
        Ok(Storable)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Storable, E> {
        Ok(Storable)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Storable, E> {
        if text.contains('\0') {
            return Err(E::custom("NUL character"));
        }
        Ok(Storable)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Storable, A::Error> {
        while items.next_element::<Storable>()?.is_some() {}
        Ok(Storable)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Storable, A::Error> {
        while entries.next_entry::<Storable, Storable>()?.is_some() {}
        Ok(Storable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_body_is_json_only_if_jsonb_can_hold_it() {
        for body in [
            "{}",
            "null",
            " [1, -2.5e3, \"ü\", true]",
            "{\"a\":{\"a\":[]}}",
            "\"\\u00e9\"",
            "[1e308, 5e-324, 1.7976931348623157e308]",
            "\"1e-20000 \\\" [[[\"",
        ] {
            assert!(is_storable_json(body.as_bytes()), "{body}");
        }
        for body in [
            "",
            "{",
            "nul",
            "{\"a\":1}x",
            "\"\\u0000\"",
            "{\"\\u0000\":1}",
            "\"\\ud800\"",
            "1e999",
            "1e-20000",
            "[1e-16000, 1]",
            "-1E+00401",
        ] {
            assert!(!is_storable_json(body.as_bytes()), "{body}");
        }
        assert!(!is_storable_json(b"\"\xff\""));
        assert!(!is_storable_json("[".repeat(10_000).as_bytes()));
    }

    #[test]
    fn elements_and_digits_have_a_bound() {
        let list = |element: &str, count: usize| {
            let list = vec![element; count].join(",");
            is_storable_json(format!("[{list}]").as_bytes())
        };
        assert!(list("1", ELEMENTS_MAX - 1));
        assert!(!list("1", ELEMENTS_MAX + 1));
        assert!(list("1e99", 40_000));
        assert!(!list("1e99", 40_001));
        assert!(is_storable_json("1".repeat(300).as_bytes()));
        assert!(!is_storable_json(
            format!("0.{}1", "0".repeat(DIGITS_MAX)).as_bytes()
        ));
    }

    proptest! {
        #[test]
        fn bodies_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            is_storable_json(&body);
        }
    }
}
