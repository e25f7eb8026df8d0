//! `[consumer.handler]`: one part for each type.

mod sql;

use super::checked::Handler;
use super::error::{Complaint, shown};
use super::keys;
use super::reader::Section;

pub(super) use sql::INLINE;

/// The types there are, each with the keys that it alone knows.
const TYPES: [(&str, &[&str]); 1] = [("sql", sql::KEYS)];

/// `None` where something is wrong, which is reported.
pub(super) fn handler(consumer: &Section<'_>) -> Option<Handler> {
    let section = consumer.section("handler", &keys::HANDLER);
    let names: Vec<&str> = TYPES.iter().map(|(name, _)| *name).collect();
    let kind = section
        .text("type")
        .then(|kind| match names.contains(&kind.as_str()) {
            true => Ok(kind),
            false => Err(unknown_type(&kind, &names)),
        })
        .required("add type = \"sql\", and `file` or `sql` with the statements")?;
    refuse_foreign_keys(&section, &kind.value);
    sql::handler(&section).map(Handler::Sql)
}

fn unknown_type(kind: &str, names: &[&str]) -> Complaint {
    let hint = match keys::nearest(kind, names) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("allowed: {}", names.join(", ")),
    };
    Complaint::new(format!("cannot be {}", shown(kind)), hint)
}

/// A key of another type would be read by nobody.
fn refuse_foreign_keys(section: &Section<'_>, kind: &str) {
    let known = |name: &str, key: &str| {
        TYPES
            .iter()
            .any(|(other, keys)| *other == name && keys.contains(&key))
    };
    for key in keys::HANDLER.keys.iter().copied() {
        let foreign = section.has(key) && key != "type" && !known(kind, key);
        let owners: Vec<&str> = TYPES
            .iter()
            .map(|(name, _)| *name)
            .filter(|name| known(name, key))
            .collect();
        if foreign {
            section.reader.report(
                section.span_of(key),
                format!(
                    "`{key}` does not belong to a handler of type {}",
                    shown(kind)
                ),
                format!(
                    "it belongs to type {}: remove it, or change `type`",
                    owners.join(", ")
                ),
            );
        }
    }
}
