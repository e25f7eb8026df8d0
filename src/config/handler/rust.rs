//! `type = "rust"`.

use crate::config::checked::Effect;
use crate::config::keys;
use crate::config::reader::Section;

/// What it knows: all else is in the program.
pub(super) const KEYS: &[&str] = &[];

/// The promise, which no other type leaves open.
pub(super) fn handler(section: &Section<'_>) -> Effect {
    section
        .text("effect")
        .then(|text| keys::one_of(&text, &Effect::ALL, Effect::as_str))
        .or(Effect::Transactional)
        .value
}
