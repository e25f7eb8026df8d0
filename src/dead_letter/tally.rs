//! Letters by what they have in common. Bounded: of what differs everywhere,
//! only so many groups are kept. Pure.

use std::collections::HashMap;

use serde::Serialize;

use super::letter::Letter;
use super::time;

/// Most groups; letters of further ones are counted together.
pub const GROUPS_MAX: usize = 10_000;

/// Longest name of a group, in characters.
const NAME_MAX: usize = 300;

/// What letters are grouped by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// Why they are dead.
    Reason,
    /// Code and first line of the error.
    Error,
    /// Routing key they were first published with.
    RoutingKey,
}

impl By {
    /// As typed and printed.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reason => "reason",
            Self::Error => "error",
            Self::RoutingKey => "routing-key",
        }
    }

    fn name_of(self, letter: &Letter) -> String {
        let name = match (self, letter.code()) {
            (Self::Reason, _) => letter.reason().to_owned(),
            (Self::RoutingKey, _) => letter.routing_key().to_owned(),
            (Self::Error, Some(code)) => format!("{code} {}", letter.error_line()),
            (Self::Error, None) => letter.error_line().to_owned(),
        };
        name.chars().take(NAME_MAX).collect()
    }
}

/// Letters that have something in common.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Group {
    /// How many.
    pub letters: u64,
    /// Length of their bodies together.
    pub bytes: u64,
    #[serde(serialize_with = "moment")]
    oldest: Option<i64>,
    #[serde(serialize_with = "moment")]
    newest: Option<i64>,
}

fn moment<S: serde::Serializer>(at: &Option<i64>, out: S) -> Result<S::Ok, S::Error> {
    at.map(time::format).serialize(out)
}

impl Group {
    /// When the first of them died, as far as it is known.
    #[must_use]
    pub fn oldest(&self) -> Option<String> {
        self.oldest.map(time::format)
    }

    /// When the last of them died, as far as it is known.
    #[must_use]
    pub fn newest(&self) -> Option<String> {
        self.newest.map(time::format)
    }

    fn add(&mut self, letter: &Letter) {
        self.letters += 1;
        self.bytes += letter.size() as u64;
        if let Some(at) = letter.died_at() {
            self.oldest = Some(self.oldest.map_or(at, |oldest| oldest.min(at)));
            self.newest = Some(self.newest.map_or(at, |newest| newest.max(at)));
        }
    }
}

/// Letters in groups.
#[derive(Debug)]
pub struct Tally {
    by: By,
    groups: HashMap<String, Group>,
    others: Group,
}

impl Tally {
    /// Empty.
    #[must_use]
    pub fn new(by: By) -> Self {
        Self {
            by,
            groups: HashMap::new(),
            others: Group::default(),
        }
    }

    /// Counts a letter.
    pub fn add(&mut self, letter: &Letter) {
        let name = self.by.name_of(letter);
        let full = self.groups.len() >= GROUPS_MAX;
        match self.groups.get_mut(&name) {
            Some(group) => group.add(letter),
            None if full => self.others.add(letter),
            None => self.groups.entry(name).or_default().add(letter),
        }
    }

    /// The groups, largest first, of equal ones by name. `None` stands for all
    /// that found no room in one of their own.
    #[must_use]
    pub fn groups(self) -> Vec<(Option<String>, Group)> {
        let mut groups: Vec<(String, Group)> = self.groups.into_iter().collect();
        groups.sort_by(|(a, one), (b, other)| other.letters.cmp(&one.letters).then(a.cmp(b)));
        let named = groups.into_iter().map(|(name, group)| (Some(name), group));
        let others = (self.others.letters > 0).then_some((None, self.others));
        named.chain(others).collect()
    }
}
