//! `[consumer.handler]`: one part for each type.

mod command;
mod http;
mod sql;

use super::checked::{Effect, Handler};
use super::error::{Complaint, shown};
use super::keys;
use super::reader::Section;
use super::retry::{Codes, check_sqlstate};
use crate::failure::Fit;

pub(super) use sql::INLINE;

/// One type of handler.
struct Type {
    name: &'static str,
    /// The keys that it knows beside `type`.
    keys: &'static [&'static str],
    /// The codes that it fails with.
    codes: Codes,
    read: fn(&Section<'_>) -> Option<Handler>,
}

/// The types there are.
static TYPES: [Type; 3] = [
    Type {
        name: "sql",
        keys: sql::KEYS,
        codes: Codes {
            example: "[\"23505\", \"P0\"]",
            check: check_sqlstate,
            fit: Fit::Beginning,
        },
        read: |section| sql::handler(section).map(Handler::Sql),
    },
    Type {
        name: "command",
        keys: command::KEYS,
        codes: Codes {
            example: "[\"65\", \"signal 9\"]",
            check: command::check_code,
            fit: Fit::Words,
        },
        read: |section| command::handler(section).map(Handler::Command),
    },
    Type {
        name: "http",
        keys: http::KEYS,
        codes: Codes {
            example: "[\"409\", \"5\"]",
            check: http::check_code,
            fit: Fit::Beginning,
        },
        read: |section| Some(Handler::Http(Box::new(http::handler(section)?))),
    },
];

/// Of a handler whose type cannot be told, which is reported.
static ANY_CODES: Codes = Codes {
    example: "[\"…\"]",
    check: |code| Ok(code.to_owned()),
    fit: Fit::Beginning,
};

/// The handler, `None` where something is wrong, which is reported; and what it
/// fails with.
pub(super) fn handler(consumer: &Section<'_>) -> (Option<Handler>, &'static Codes) {
    let section = consumer.section("handler", &keys::HANDLER);
    let names: Vec<&str> = TYPES.iter().map(|kind| kind.name).collect();
    let kind = section
        .text("type")
        .then(|name| {
            let kind = TYPES.iter().find(|kind| kind.name == name);
            kind.ok_or_else(|| unknown_type(&name, &names))
        })
        .required(
            "add type = \"sql\", and `file` or `sql` with the statements, or another type with its \
             own keys",
        );
    let Some(kind) = kind.map(|field| field.value) else {
        return (None, &ANY_CODES);
    };
    refuse_foreign_keys(&section, kind);
    let handler = (kind.read)(&section);
    if let Some(handler) = &handler {
        check_effect(&section, kind, handler.effect());
    }
    (handler, &kind.codes)
}

/// The type alone says what the effect can promise. Who writes it down wants to
/// hear when that changes.
fn check_effect(section: &Section<'_>, kind: &Type, effect: Effect) {
    section
        .text("effect")
        .then(|text| {
            let wanted = keys::one_of(&text, &Effect::ALL, Effect::as_str)?;
            match wanted == effect {
                true => Ok(()),
                false => Err(Complaint::new(
                    format!("cannot be {} with type {}", shown(&text), shown(kind.name)),
                    format!("it is \"{effect}\": {}", effect.promise()),
                )),
            }
        })
        .optional();
}

fn unknown_type(kind: &str, names: &[&str]) -> Complaint {
    let hint = match keys::nearest(kind, names) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("allowed: {}", names.join(", ")),
    };
    Complaint::new(format!("cannot be {}", shown(kind)), hint)
}

/// A key of another type would be read by nobody.
fn refuse_foreign_keys(section: &Section<'_>, kind: &Type) {
    for key in keys::HANDLER.keys.iter().copied() {
        if !section.has(key) || ["type", "effect"].contains(&key) || kind.keys.contains(&key) {
            continue;
        }
        let owners: Vec<&str> = TYPES
            .iter()
            .filter(|other| other.keys.contains(&key))
            .map(|other| other.name)
            .collect();
        section.reader.report(
            section.span_of(key),
            format!(
                "`{key}` does not belong to a handler of type {}",
                shown(kind.name)
            ),
            format!(
                "it belongs to type {}: remove it, or change `type`",
                owners.join(" or ")
            ),
        );
    }
}
