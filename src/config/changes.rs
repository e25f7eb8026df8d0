//! What differs between two configurations, in words that may be logged.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use toml::{Table, Value};

use super::checked::Config;
use super::print::to_toml;

/// Longest value that is shown, in characters.
const SHOWN_MAX: usize = 60;

/// One text for each key that differs, such as `consumer.orders.workers: 4 is
/// now 8`, in the order of the keys. Without secrets: of those it is only said
/// that they changed.
#[must_use]
pub fn changes(old: &Config, new: &Config) -> Vec<String> {
    let [old_names, new_names] = [old, new].map(names);
    let [old, new] = [old, new].map(Keys::of);
    let mut changes = Vec::new();
    for name in new_names.iter().filter(|name| !old_names.contains(name)) {
        changes.push(format!("consumer.{name}: added"));
    }
    for name in old_names.iter().filter(|name| !new_names.contains(name)) {
        changes.push(format!("consumer.{name}: removed"));
    }
    let stays = |key: &Key| match &key.consumer {
        Some(name) => old_names.contains(name) && new_names.contains(name),
        None => true,
    };
    let keys: BTreeSet<&Key> = old.real.keys().chain(new.real.keys()).collect();
    for key in keys {
        if stays(key) && old.real.get(key) != new.real.get(key) {
            changes.push(match (old.shown(key), new.shown(key)) {
                (Some(old), Some(new)) if old != new => format!("{key}: {old} is now {new}"),
                (None, Some(new)) => format!("{key}: now {new}"),
                (Some(old), None) => format!("{key}: no longer {old}"),
                _ => format!("{key}: changed"),
            });
        }
    }
    changes
}

fn names(config: &Config) -> Vec<String> {
    let consumers = config.consumers.iter();
    consumers.map(|consumer| consumer.name.clone()).collect()
}

/// Where a value stands. A consumer's name may hold dots too.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    consumer: Option<String>,
    path: String,
}

impl Key {
    fn below(&self, key: &str) -> Self {
        Self {
            consumer: self.consumer.clone(),
            path: match self.path.as_str() {
                "" => key.to_owned(),
                path => format!("{path}.{key}"),
            },
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.consumer {
            write!(f, "consumer.{name}.")?;
        }
        f.write_str(&self.path)
    }
}

/// The values of a configuration.
struct Keys {
    real: BTreeMap<Key, Value>,
    /// Without secrets.
    public: BTreeMap<Key, Value>,
}

impl Keys {
    fn of(config: &Config) -> Self {
        let [real, public] = [true, false].map(|show_secrets| {
            let mut keys = BTreeMap::new();
            // It was printed by us: what cannot be read back shows no change.
            let table: Table = to_toml(config, show_secrets).parse().unwrap_or_default();
            flatten(&Key::default(), Value::Table(table), &mut keys);
            keys
        });
        Self { real, public }
    }

    /// What may be shown of a value: `None` when there is none. A long one says
    /// no more than that it is there.
    fn shown(&self, key: &Key) -> Option<String> {
        let text = self.public.get(key)?.to_string();
        let is_short = text.chars().count() <= SHOWN_MAX && !text.contains('\n');
        Some(if is_short { text } else { "(long)".to_owned() })
    }
}

fn flatten(at: &Key, value: Value, keys: &mut BTreeMap<Key, Value>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                flatten(&at.below(&key), value, keys);
            }
        }
        Value::Array(consumers) if at.consumer.is_none() && at.path == "consumer" => {
            for consumer in consumers {
                let name = consumer.get("name").and_then(Value::as_str);
                let at = Key {
                    consumer: Some(name.unwrap_or_default().to_owned()),
                    path: String::new(),
                };
                flatten(&at, consumer, keys);
            }
        }
        value => {
            keys.insert(at.clone(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(secret: &str, consumers: &[(&str, u8)]) -> Config {
        let mut text = format!(
            "[broker]\nurl = 'amqp://u:{secret}@localhost'\n[redis]\nenabled = false\n\
             [postgres]\nurl = 'postgres://localhost/db'\n"
        );
        for (name, workers) in consumers {
            text += &format!(
                "[[consumer]]\nname = '{name}'\nworkers = {workers}\n[consumer.topology]\n\
                 queue = '{name}'\n[consumer.handler]\ntype = 'sql'\nsql = 'SELECT 1 FROM message'\n"
            );
        }
        super::super::parse(&text, Path::new("config.toml"), &|_| None).unwrap()
    }

    #[test]
    fn nothing_has_changed_in_the_same() {
        let same = config("a", &[("orders", 4)]);
        assert_eq!(changes(&same, &same), Vec::<String>::new());
    }

    #[test]
    fn a_changed_key_shows_both_values_and_a_secret_none() {
        let old = config("canary-a", &[("orders", 4)]);
        let new = config("canary-b", &[("orders", 8)]);
        let changes = changes(&old, &new);
        assert_eq!(
            changes,
            ["broker.url: changed", "consumer.orders.workers: 4 is now 8"]
        );
    }

    #[test]
    fn a_consumer_that_comes_or_goes_is_one_change() {
        let old = config("a", &[("orders", 4), ("or", 4)]);
        let new = config("a", &[("orders", 4), ("orders.new", 4)]);
        let changes = changes(&old, &new);
        assert_eq!(
            changes,
            ["consumer.orders.new: added", "consumer.or: removed"]
        );
    }
}
