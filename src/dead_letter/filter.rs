//! Which letters: what was asked for, and whether a letter is that. Pure.

use std::collections::HashSet;

use serde_json::Value;

use super::letter::{Letter, PRINT_PREFIX, REASONS};
use crate::message::{MessageId, hex};

/// Fewest digits of a fingerprint that may stand for it.
const PRINT_DIGITS_MIN: usize = 8;

/// Which letters are meant: all that everything given applies to. Of several
/// reasons, ids or routing keys, one must apply; of several headers or places
/// in the body, all.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter {
    reasons: Vec<String>,
    since: Option<i64>,
    until: Option<i64>,
    /// `None` when no id was asked for.
    names: Option<Names>,
    places: Vec<Place>,
    routing_keys: Vec<String>,
    headers: Vec<(String, String)>,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct Names {
    ids: HashSet<String>,
    /// Beginnings of fingerprints, in hex.
    prints: Vec<String>,
}

/// A place in a JSON body and what must stand there.
#[derive(Debug, Clone, PartialEq)]
struct Place {
    pointer: String,
    text: String,
    json: Option<Value>,
}

impl Filter {
    /// Whether nothing was asked for: then all letters are meant.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether letters were asked for by id alone.
    #[must_use]
    pub fn is_by_id_only(&self) -> bool {
        let others = Self {
            names: None,
            ..self.clone()
        };
        self.names.is_some() && others.is_empty()
    }

    /// Adds a reason.
    ///
    /// # Errors
    ///
    /// When there is none of that name.
    pub fn reason(&mut self, reason: &str) -> Result<(), String> {
        if !REASONS.contains(&reason) {
            return Err(format!(
                "no letter has the reason {reason:?}; there are {}",
                REASONS.join(", ")
            ));
        }
        self.reasons.push(reason.to_owned());
        Ok(())
    }

    /// Only letters that died at `moment` or later, in microseconds since 1970.
    pub fn since(&mut self, moment: i64) {
        self.since = Some(moment);
    }

    /// Only letters that died before `moment`.
    pub fn until(&mut self, moment: i64) {
        self.until = Some(moment);
    }

    /// Has ids asked for, even when none is added: then no letter is meant.
    pub fn by_id(&mut self) {
        self.names.get_or_insert_default();
    }

    /// Adds an id; or `sha256:` and at least 8 digits of a fingerprint, for
    /// letters that have no id.
    ///
    /// # Errors
    ///
    /// When no letter can have that name.
    pub fn id(&mut self, name: &str) -> Result<(), String> {
        let names = self.names.get_or_insert_default();
        if let Some(print) = name.strip_prefix(PRINT_PREFIX) {
            let digits = print.bytes().all(|byte| byte.is_ascii_hexdigit());
            if digits && (PRINT_DIGITS_MIN..=64).contains(&print.len()) {
                names.prints.push(print.to_ascii_lowercase());
            }
        }
        if MessageId::new(name).is_none() {
            return Err(format!(
                "{name:?} is no id: an id has 1 to 255 bytes, without NUL"
            ));
        }
        names.ids.insert(name.to_owned());
        Ok(())
    }

    /// How many ids were added.
    #[must_use]
    pub fn ids(&self) -> usize {
        self.names.as_ref().map_or(0, |names| names.ids.len())
    }

    /// Adds a place in the body: `/pointer=value`, the pointer as in RFC 6901.
    /// A value is equal as text, or as JSON.
    ///
    /// # Errors
    ///
    /// When it is not of that form.
    pub fn place(&mut self, text: &str) -> Result<(), String> {
        let (pointer, value) = text
            .split_once('=')
            .filter(|(pointer, _)| pointer.is_empty() || pointer.starts_with('/'))
            .ok_or_else(|| {
                format!("{text:?} is not /POINTER=VALUE, such as /customer/country=DE")
            })?;
        self.places.push(Place {
            pointer: pointer.to_owned(),
            text: value.to_owned(),
            json: serde_json::from_str(value).ok(),
        });
        Ok(())
    }

    /// Adds a routing key that letters were first published with: as a topic
    /// exchange has it, `*` is one word and `#` any number of words.
    pub fn routing_key(&mut self, pattern: &str) {
        self.routing_keys.push(pattern.to_owned());
    }

    /// Adds a header, `NAME=VALUE`, compared as text.
    ///
    /// # Errors
    ///
    /// When it is not of that form.
    pub fn header(&mut self, text: &str) -> Result<(), String> {
        match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => {
                self.headers.push((name.to_owned(), value.to_owned()));
                Ok(())
            }
            _ => Err(format!("{text:?} is not NAME=VALUE")),
        }
    }

    /// Whether `letter` is meant. One of which it is not known when it died is
    /// in no span of time.
    #[must_use]
    pub fn matches(&self, letter: &Letter) -> bool {
        let any = |wanted: &[String], is: &dyn Fn(&str) -> bool| {
            wanted.is_empty() || wanted.iter().any(|wanted| is(wanted))
        };
        any(&self.reasons, &|reason| reason == letter.reason())
            && self.spans(letter.died_at())
            && self.names.as_ref().is_none_or(|names| names.have(letter))
            && any(&self.routing_keys, &|pattern| {
                is_topic(pattern, letter.routing_key())
            })
            && self.headers.iter().all(|header| has_header(letter, header))
            && self.is_placed(letter)
    }

    /// Whether it depends on when a letter died.
    #[must_use]
    pub fn asks_for_time(&self) -> bool {
        self.since.is_some() || self.until.is_some()
    }

    fn spans(&self, died_at: Option<i64>) -> bool {
        let since = |since| died_at.is_some_and(|at| at >= since);
        let until = |until| died_at.is_some_and(|at| at < until);
        self.since.is_none_or(since) && self.until.is_none_or(until)
    }

    fn is_placed(&self, letter: &Letter) -> bool {
        if self.places.is_empty() {
            return true;
        }
        let Ok(body) = serde_json::from_slice::<Value>(&letter.message.body) else {
            return false;
        };
        self.places.iter().all(|place| place.holds(&body))
    }
}

impl Names {
    fn have(&self, letter: &Letter) -> bool {
        match &letter.id {
            Some(id) => self.ids.contains(id.as_str()),
            None => {
                let print = hex(&letter.fingerprint.0);
                self.prints.iter().any(|begin| print.starts_with(begin))
            }
        }
    }
}

impl Place {
    fn holds(&self, body: &Value) -> bool {
        let Some(found) = body.pointer(&self.pointer) else {
            return false;
        };
        found.as_str() == Some(&self.text) || self.json.as_ref() == Some(found)
    }
}

/// Among all it carries: headers of the broker and of the daemon count too.
fn has_header(letter: &Letter, (name, value): &(String, String)) -> bool {
    match letter.properties.header(name).map(|field| field.plain()) {
        None => false,
        Some(Value::String(text)) => text == *value,
        Some(other) => other.to_string() == *value,
    }
}

/// Whether `key` has the words of `pattern`, as in a topic exchange. Takes no
/// longer than the product of their lengths.
fn is_topic(pattern: &str, key: &str) -> bool {
    let pattern: Vec<&str> = pattern.split('.').collect();
    let words: Vec<&str> = match key {
        "" => Vec::new(),
        key => key.split('.').collect(),
    };
    if pattern == [""] {
        return words.is_empty();
    }
    // Which numbers of words the pattern read so far can stand for.
    let mut reached = vec![false; words.len() + 1];
    reached[0] = true;
    for part in pattern {
        let mut next = vec![false; words.len() + 1];
        for count in 0..=words.len() {
            next[count] = match part {
                "#" => reached[count] || (count > 0 && next[count - 1]),
                "*" => count > 0 && reached[count - 1],
                word => count > 0 && reached[count - 1] && words[count - 1] == word,
            };
        }
        reached = next;
    }
    reached[words.len()]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn routing_keys_match_as_in_a_topic_exchange() {
        for (pattern, key, matches) in [
            ("orders.new", "orders.new", true),
            ("orders.new", "orders.new.de", false),
            ("orders.*", "orders.new", true),
            ("orders.*", "orders", false),
            ("orders.#", "orders", true),
            ("orders.#", "orders.a.b", true),
            ("#.de", "orders.new.de", true),
            ("#.de", "de", true),
            ("#", "", true),
            ("*", "", false),
            ("", "", true),
            ("", "a", false),
            ("a.#.b.#.c", "a.x.b.c", true),
        ] {
            assert_eq!(is_topic(pattern, key), matches, "{pattern} {key}");
        }
    }

    proptest! {
        #[test]
        fn a_routing_key_without_wildcards_matches_itself_alone(
            key in "[a-c]{0,3}(\\.[a-c]{1,3}){0,3}", other in "[a-c]{0,3}(\\.[a-c]{1,3}){0,3}",
        ) {
            prop_assert_eq!(is_topic(&key, &other), key == other);
        }
    }

    #[test]
    fn what_makes_no_filter_is_refused_with_what_would() {
        let mut filter = Filter::default();
        assert!(
            filter
                .reason("rejcted")
                .unwrap_err()
                .contains("rejected, max-attempts")
        );
        assert!(
            filter
                .place("customer=7")
                .unwrap_err()
                .contains("/customer/country=DE")
        );
        assert!(
            filter
                .place("/customer")
                .unwrap_err()
                .contains("/POINTER=VALUE")
        );
        assert!(filter.header("name").unwrap_err().contains("NAME=VALUE"));
        assert!(filter.header("=value").is_err());
        assert!(filter.id("").is_err());
        assert!(filter.id(&"x".repeat(256)).unwrap_err().contains("255"));
    }
}
