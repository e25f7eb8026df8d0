//! Typed access to the TOML table that was typed in. Collects every problem
//! with its place instead of stopping at the first; knows nothing of what the
//! values are for.

use std::cell::RefCell;
use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::defaults::Setting;
use super::error::{Complaint, Problem, shown};
use super::keys::{self, Keys};
use super::source::{Source, Span};
use super::{duration, interpolate, size};

/// One configuration file being read.
pub(super) struct Reader<'r> {
    pub(super) source: Source<'r>,
    /// Relative paths start here.
    pub(super) folder: &'r Path,
    env: &'r dyn Fn(&str) -> Option<String>,
    findings: RefCell<Vec<(Span, String, String)>>,
}

impl<'r> Reader<'r> {
    pub(super) fn new(
        text: &'r str,
        folder: &'r Path,
        env: &'r dyn Fn(&str) -> Option<String>,
    ) -> Self {
        Self {
            source: Source::new(text),
            folder,
            env,
            findings: RefCell::default(),
        }
    }

    /// Notes one problem.
    pub(super) fn report(&self, span: Span, message: impl Into<String>, hint: impl Into<String>) {
        let finding = (span, message.into(), hint.into());
        self.findings.borrow_mut().push(finding);
    }

    /// The environment variable `name`, where it is set, and text.
    pub(super) fn variable(&self, name: &str) -> Option<String> {
        (self.env)(name)
    }

    pub(super) fn has_findings(&self) -> bool {
        !self.findings.borrow().is_empty()
    }

    /// What was reported, in the order of the file, each thing once.
    pub(super) fn into_problems(self) -> Vec<Problem> {
        let mut findings = self.findings.into_inner();
        findings.sort_by_key(|(span, ..)| span.start);
        findings.dedup();
        findings
            .into_iter()
            .map(|(span, message, hint)| Problem {
                place: Some(self.source.place(span)),
                message,
                hint,
            })
            .collect()
    }
}

/// One table of the file, or its absence.
#[derive(Clone, Copy)]
pub(super) struct Section<'r> {
    pub(super) reader: &'r Reader<'r>,
    pub(super) keys: &'static Keys,
    /// The header, or where the section ought to be.
    pub(super) span: Span,
    table: Option<&'r DeTable<'r>>,
}

impl<'r> Section<'r> {
    /// Opens the whole file.
    pub(super) fn root(reader: &'r Reader<'r>, table: &'r DeTable<'r>) -> Self {
        let end = reader.source.text.trim_end().len();
        let span = Span::from(end..end);
        Self::open(reader, &keys::ROOT, span, table)
    }

    fn open(
        reader: &'r Reader<'r>,
        keys: &'static Keys,
        span: Span,
        table: &'r DeTable<'r>,
    ) -> Self {
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            if !keys.keys.contains(&name) {
                let what = match value.get_ref() {
                    DeValue::Table(_) => "section",
                    DeValue::Array(array) if array.iter().any(|item| item.get_ref().is_table()) => {
                        "section"
                    }
                    _ => "key",
                };
                reader.report(
                    key.span().into(),
                    format!("unknown {what} {} {}", shown(name), keys.whereabouts()),
                    keys::hint(name, keys),
                );
            }
        }
        Self {
            reader,
            keys,
            span,
            table: Some(table),
        }
    }

    fn value(&self, key: &'static str) -> Option<&'r Spanned<DeValue<'r>>> {
        debug_assert!(
            self.keys.keys.contains(&key),
            "{key} in {}",
            self.keys.title
        );
        self.table?.get(key)
    }

    /// Whether `key` was typed.
    pub(super) fn has(&self, key: &'static str) -> bool {
        self.value(key).is_some()
    }

    /// Whether `key` holds a list.
    pub(super) fn has_list(&self, key: &'static str) -> bool {
        self.value(key).is_some_and(|it| it.get_ref().is_array())
    }

    /// Where the value of `key` is, or else the section.
    pub(super) fn span_of(&self, key: &'static str) -> Span {
        self.value(key)
            .map_or(self.span, |value| value.span().into())
    }

    /// The table `key`, absent or of the wrong type included: then it is empty.
    pub(super) fn section(&self, key: &'static str, keys: &'static Keys) -> Section<'r> {
        let absent = Section {
            reader: self.reader,
            keys,
            span: self.span,
            table: None,
        };
        let Some(value) = self.value(key) else {
            return absent;
        };
        let span = value.span().into();
        match value.get_ref() {
            DeValue::Table(table) => Self::open(self.reader, keys, span, table),
            DeValue::Array(_) => {
                self.reader.report(
                    span,
                    format!("`{key}` must be one section, found an array"),
                    format!("write {} once, with one bracket", keys.title),
                );
                Section { span, ..absent }
            }
            other => {
                self.wrong_type(key, span, "a section", other, "");
                Section { span, ..absent }
            }
        }
    }

    /// The tables of the array `key`.
    pub(super) fn sections(&self, key: &'static str, keys: &'static Keys) -> Vec<Section<'r>> {
        let Some(value) = self.value(key) else {
            return Vec::new();
        };
        let DeValue::Array(items) = value.get_ref() else {
            self.reader.report(
                value.span().into(),
                format!(
                    "`{key}` must be a list of sections, found {}",
                    found(value.get_ref())
                ),
                format!("write {} with two brackets, once for each", keys.title),
            );
            return Vec::new();
        };
        let mut sections = Vec::new();
        for item in items.iter() {
            match item.get_ref() {
                DeValue::Table(table) => {
                    sections.push(Self::open(self.reader, keys, item.span().into(), table));
                }
                other => self.wrong_type(key, item.span().into(), "a section", other, ""),
            }
        }
        sections
    }

    /// The keys and values of the table `key`, which may hold any key.
    pub(super) fn entries(
        &self,
        key: &'static str,
    ) -> Vec<(&'r str, Span, &'r Spanned<DeValue<'r>>)> {
        let Some(value) = self.value(key) else {
            return Vec::new();
        };
        let DeValue::Table(table) = value.get_ref() else {
            let hint = format!("write it like {key} = {{ name = \"value\" }}");
            self.wrong_type(key, value.span().into(), "a table", value.get_ref(), &hint);
            return Vec::new();
        };
        table
            .iter()
            .map(|(name, value)| (name.get_ref().as_ref(), name.span().into(), value))
            .collect()
    }

    /// A string, its variables expanded.
    pub(super) fn text(&self, key: &'static str) -> Found<'r, String> {
        self.find(key, |value, span| match value {
            DeValue::String(text) => self.expand(key, text, span),
            other => {
                let hint = match other {
                    DeValue::Array(_) | DeValue::Table(_) => "put one text in quotes".into(),
                    _ => format!("put it in quotes: {key} = \"…\""),
                };
                self.wrong_type(key, span, "a string", other, &hint);
                None
            }
        })
    }

    /// A list of strings, each turned into what it means; what is wrong with
    /// one is reported where it stands.
    pub(super) fn list<T>(
        &self,
        key: &'static str,
        example: &str,
        check: impl Fn(&str) -> Result<T, Complaint>,
    ) -> Found<'r, Vec<(T, Span)>> {
        let hint = format!("write it like {key} = {example}");
        let item = |value: &Spanned<DeValue<'_>>| {
            let span = value.span().into();
            let DeValue::String(text) = value.get_ref() else {
                self.wrong_type(key, span, "a list of strings", value.get_ref(), &hint);
                return None;
            };
            match check(&self.expand(key, text, span)?) {
                Ok(item) => Some((item, span)),
                Err(complaint) => {
                    let message = format!("`{key}` {}", complaint.message);
                    self.reader.report(span, message, complaint.hint);
                    None
                }
            }
        };
        self.find(key, |value, span| match value {
            DeValue::Array(items) => {
                // To the end, so that every wrong one is reported.
                let items: Vec<_> = items.iter().map(item).collect();
                items.into_iter().collect()
            }
            other => {
                self.wrong_type(key, span, "a list of strings", other, &hint);
                None
            }
        })
    }

    /// Expands the variables of one string value.
    pub(super) fn expand(&self, key: &str, text: &str, span: Span) -> Option<String> {
        let faults = match interpolate::expand(text, self.reader.env) {
            Ok(expanded) => return Some(expanded),
            Err(faults) => faults,
        };
        let typed = &self.reader.source.text[span.start..span.end];
        for fault in faults {
            // An escape sequence makes what was typed longer than its value;
            // then the value's beginning is the best place there is.
            let place = match typed.find(text) {
                Some(skip) => {
                    let start = span.start + skip + fault.offset;
                    let length = text[fault.offset..]
                        .find('}')
                        .map_or("${".len(), |at| at + 1);
                    Span::from(start..start + length)
                }
                None => span,
            };
            self.reader
                .report(place, format!("`{key}` {}", fault.message), fault.hint);
        }
        None
    }

    /// `true` or `false`.
    pub(super) fn boolean(&self, key: &'static str, default: bool) -> Field<bool> {
        self.find(key, |value, span| match value {
            DeValue::Boolean(value) => Some(*value),
            other => {
                let hint = format!("write {key} = true or {key} = false, without quotes");
                self.wrong_type(key, span, "true or false", other, &hint);
                None
            }
        })
        .or(default)
    }

    /// A whole number within its bounds.
    pub(super) fn integer<T>(&self, key: &'static str, setting: &Setting<T>) -> Field<T>
    where
        T: Copy + PartialOrd + Display + TryFrom<u64>,
    {
        let allowed = format!("allowed: {} to {}", setting.min, setting.max);
        self.find(key, |value, span| match value {
            DeValue::Integer(integer) => {
                let number = u64::from_str_radix(integer.as_str(), integer.radix())
                    .ok()
                    .and_then(|number| T::try_from(number).ok())
                    .filter(|number| *number >= setting.min && *number <= setting.max);
                if number.is_none() {
                    let message = format!("`{key}` is out of range: {integer}");
                    self.reader.report(span, message, allowed.clone());
                }
                number
            }
            DeValue::String(text) if text.parse::<u64>().is_ok() => {
                let hint = format!("leave out the quotes: {key} = {text}");
                self.wrong_type(key, span, "an integer", value, &hint);
                None
            }
            other => {
                self.wrong_type(key, span, "an integer", other, &allowed);
                None
            }
        })
        .or(setting.default)
    }

    /// A duration within its bounds.
    pub(super) fn duration(
        &self,
        key: &'static str,
        setting: &Setting<Duration>,
    ) -> Field<Duration> {
        let typed = self.find(key, |value, span| match value {
            DeValue::String(text) => self.expand(key, text, span),
            DeValue::Integer(number) => {
                self.reader.report(
                    span,
                    format!("`{key}` has no unit: {number}"),
                    format!("add a unit: {key} = \"{number}s\" (ms, s, m, h or d)"),
                );
                None
            }
            other => {
                let example = duration::format(setting.default);
                let hint = format!("write it like {key} = \"{example}\"");
                self.wrong_type(key, span, "a duration in quotes", other, &hint);
                None
            }
        });
        typed
            .then(|text| {
                let value = duration::parse(&text)?;
                in_range(value, setting, duration::format)
            })
            .or(setting.default)
    }

    /// A size in bytes within its bounds.
    pub(super) fn size(&self, key: &'static str, setting: &Setting<usize>) -> Field<usize> {
        let typed = self.find(key, |value, span| match value {
            DeValue::String(text) => self.expand(key, text, span),
            DeValue::Integer(number) => u64::from_str_radix(number.as_str(), number.radix())
                .ok()
                .map(size::format)
                .or_else(|| {
                    let hint = "write it like \"32MiB\" or as a number of bytes";
                    let message = format!("`{key}` is out of range: {number}");
                    self.reader.report(span, message, hint);
                    None
                }),
            other => {
                let hint = "write it like \"32MiB\" or as a number of bytes";
                self.wrong_type(key, span, "a size", other, hint);
                None
            }
        });
        typed
            .then(|text| {
                let bytes = usize::try_from(size::parse(&text)?).unwrap_or(usize::MAX);
                in_range(bytes, setting, |bytes| size::format(bytes as u64))
            })
            .or(setting.default)
    }

    fn find<T>(
        &self,
        key: &'static str,
        read: impl FnOnce(&'r DeValue<'r>, Span) -> Option<T>,
    ) -> Found<'r, T> {
        let (span, state) = match self.value(key) {
            None => (self.span, State::Absent),
            Some(value) => {
                let span = value.span().into();
                let read = read(value.get_ref(), span);
                (span, read.map_or(State::Broken, State::Given))
            }
        };
        Found {
            section: *self,
            key,
            span,
            state,
        }
    }

    /// Reports a value of another type than `expected`.
    pub(super) fn wrong_type(
        &self,
        key: &str,
        span: Span,
        expected: &str,
        value: &DeValue<'_>,
        hint: &str,
    ) {
        let hint = if hint.is_empty() {
            format!("write it as {}", self.keys.title)
        } else {
            hint.to_owned()
        };
        let message = format!("`{key}` must be {expected}, found {}", found(value));
        self.reader.report(span, message, hint);
    }
}

/// `value`, or why it is not within its bounds.
pub(super) fn in_range<T: PartialOrd + Copy>(
    value: T,
    setting: &Setting<T>,
    format: impl Fn(T) -> String,
) -> Result<T, Complaint> {
    if value >= setting.min && value <= setting.max {
        return Ok(value);
    }
    Err(Complaint::new(
        format!("is out of range: {}", format(value)),
        format!(
            "allowed: {} to {}",
            format(setting.min),
            format(setting.max)
        ),
    ))
}

fn found(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

enum State<T> {
    Absent,
    Broken,
    Given(T),
}

/// What stands at a key: nothing, something wrong that is reported already, or
/// a value.
pub(super) struct Found<'r, T> {
    section: Section<'r>,
    key: &'static str,
    span: Span,
    state: State<T>,
}

impl<'r, T> Found<'r, T> {
    /// Turns the value into what it means, or reports why not.
    pub(super) fn then<U>(self, check: impl FnOnce(T) -> Result<U, Complaint>) -> Found<'r, U> {
        let state = match self.state {
            State::Absent => State::Absent,
            State::Broken => State::Broken,
            State::Given(value) => match check(value) {
                Ok(value) => State::Given(value),
                Err(complaint) => {
                    let message = format!("`{}` {}", self.key, complaint.message);
                    self.section
                        .reader
                        .report(self.span, message, complaint.hint);
                    State::Broken
                }
            },
        };
        Found {
            section: self.section,
            key: self.key,
            span: self.span,
            state,
        }
    }

    /// The value, or `default` where there is none that can be used.
    pub(super) fn or(self, default: T) -> Field<T> {
        let (value, given, sound) = match self.state {
            State::Absent => (default, false, true),
            State::Broken => (default, true, false),
            State::Given(value) => (value, true, true),
        };
        Field {
            key: self.key,
            span: self.span,
            value,
            given,
            sound,
        }
    }

    /// The value; `None` where it is broken, and where it is absent, which is
    /// reported with `hint`.
    pub(super) fn required(self, hint: &str) -> Option<Field<T>> {
        let value = match self.state {
            State::Given(value) => value,
            State::Broken => return None,
            State::Absent => {
                self.section.report_missing(self.key, hint);
                return None;
            }
        };
        Some(Field {
            key: self.key,
            span: self.span,
            value,
            given: true,
            sound: true,
        })
    }

    /// The value, if there is one that can be used.
    pub(super) fn optional(self) -> Option<Field<T>> {
        match self.state {
            State::Absent | State::Broken => None,
            State::Given(_) => self.required(""),
        }
    }
}

impl Section<'_> {
    /// Reports that `key`, or the whole section with it, is missing.
    pub(super) fn report_missing(&self, key: &str, hint: &str) {
        let title = self.keys.title;
        let message = match self.table {
            Some(_) => format!("missing key `{key}` in {title}"),
            None => format!("missing section {title} with its key `{key}`"),
        };
        self.reader.report(self.span, message, hint);
    }
}

/// A value ready for use and for being compared with others.
#[derive(Debug, Clone)]
pub(super) struct Field<T> {
    pub(super) key: &'static str,
    pub(super) span: Span,
    pub(super) value: T,
    given: bool,
    sound: bool,
}

impl<T> Field<T> {
    /// Whether the value is the user's or the default, not a stand-in for one
    /// that was refused: only then is it worth comparing.
    pub(super) fn is_sound(&self) -> bool {
        self.sound
    }

    /// Where to point when this and `other` do not go together: at what was
    /// typed.
    pub(super) fn blame<U>(&self, other: &Field<U>) -> Span {
        if self.given || !other.given {
            self.span
        } else {
            other.span
        }
    }
}

/// Reports that two values do not go together, if both are worth comparing and
/// `fits` says no.
pub(super) fn compare<T: Copy, U: Copy>(
    reader: &Reader<'_>,
    (a, b): (&Field<T>, &Field<U>),
    fits: impl FnOnce(T, U) -> bool,
    complaint: impl FnOnce(T, U) -> Complaint,
) {
    if a.is_sound() && b.is_sound() && !fits(a.value, b.value) {
        let complaint = complaint(a.value, b.value);
        let message = format!("`{}` {}", a.key, complaint.message);
        reader.report(a.blame(b), message, complaint.hint);
    }
}
