//! What differs between two configurations, in words that may be logged.

use std::collections::BTreeMap;

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
    let stays = |path: &str| match path.strip_prefix("consumer.") {
        Some(rest) => {
            let of = |name: &&String| {
                let after = rest.strip_prefix(name.as_str());
                after.is_some_and(|after| after.starts_with('.'))
            };
            old_names
                .iter()
                .any(|name| of(&name) && new_names.contains(name))
        }
        None => true,
    };
    let mut paths: Vec<&String> = old.real.keys().chain(new.real.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    for path in paths {
        if stays(path) && old.real.get(path) != new.real.get(path) {
            changes.push(match (old.shown(path), new.shown(path)) {
                (Some(old), Some(new)) if old != new => format!("{path}: {old} is now {new}"),
                (None, Some(new)) => format!("{path}: now {new}"),
                (Some(old), None) => format!("{path}: no longer {old}"),
                _ => format!("{path}: changed"),
            });
        }
    }
    changes
}

fn names(config: &Config) -> Vec<String> {
    let consumers = config.consumers.iter();
    consumers.map(|consumer| consumer.name.clone()).collect()
}

/// The values of a configuration by dotted path.
struct Keys {
    real: BTreeMap<String, Value>,
    /// Without secrets.
    public: BTreeMap<String, Value>,
}

impl Keys {
    fn of(config: &Config) -> Self {
        let [real, public] = [true, false].map(|show_secrets| {
            let mut keys = BTreeMap::new();
            // It was printed by us: what cannot be read back shows no change.
            let table: Table = to_toml(config, show_secrets).parse().unwrap_or_default();
            flatten("", Value::Table(table), &mut keys);
            keys
        });
        Self { real, public }
    }

    /// What may be shown of a value: `None` when there is none. A long one says
    /// no more than that it is there.
    fn shown(&self, path: &str) -> Option<String> {
        let text = self.public.get(path)?.to_string();
        let is_short = text.chars().count() <= SHOWN_MAX && !text.contains('\n');
        Some(if is_short { text } else { "(long)".to_owned() })
    }
}

fn flatten(path: &str, value: Value, keys: &mut BTreeMap<String, Value>) {
    let below = |key: &str| match path {
        "" => key.to_owned(),
        _ => format!("{path}.{key}"),
    };
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                flatten(&below(&key), value, keys);
            }
        }
        Value::Array(consumers) if path == "consumer" => {
            for consumer in consumers {
                let name = consumer.get("name").and_then(Value::as_str);
                let name = below(name.unwrap_or_default());
                flatten(&name, consumer, keys);
            }
        }
        value => {
            keys.insert(path.to_owned(), value);
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
