//! What is wrong with a configuration, all of it at once, for a person to
//! read. Says nothing about how the problems were found.

use std::fmt;
use std::path::{Path, PathBuf};

use super::source::Place;

/// Every problem of one configuration, in the order of the file. Never holds
/// a secret: the lines shown have their URLs and passwords taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    file: PathBuf,
    problems: Vec<Problem>,
}

/// One thing to mend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where in the file; `None` when the file itself could not be read.
    pub place: Option<Place>,
    /// What is wrong, in lower case, without a full stop.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

impl ConfigError {
    /// Control characters in what is said are escaped: it may repeat a path or
    /// what the system says of one.
    pub(super) fn new(file: &Path, mut problems: Vec<Problem>) -> Self {
        for problem in &mut problems {
            problem.message = escaped(&problem.message);
            problem.hint = escaped(&problem.hint);
        }
        Self {
            file: file.to_owned(),
            problems,
        }
    }

    /// The configuration file.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The problems, at least one, in the order of the file.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        for problem in &self.problems {
            writeln!(f, "error: {}", problem.message)?;
            let gutter = match &problem.place {
                Some(place) => write_place(f, &file, place)?,
                None => {
                    writeln!(f, "--> {file}")?;
                    0
                }
            };
            writeln!(f, "{:gutter$} = hint: {}\n", "", problem.hint)?;
        }
        match self.problems.len() {
            1 => write!(f, "1 problem in {file}"),
            count => write!(f, "{count} problems in {file}"),
        }
    }
}

/// Returns the width of the line's number.
fn write_place(
    f: &mut fmt::Formatter<'_>,
    file: &std::path::Display<'_>,
    place: &Place,
) -> Result<usize, fmt::Error> {
    let number = place.line.to_string();
    let gutter = " ".repeat(number.len());
    let indent = " ".repeat(place.caret_start);
    let carets = "^".repeat(place.caret_width);
    writeln!(f, "{gutter}--> {file}:{}:{}", place.line, place.column)?;
    writeln!(f, "{gutter} |")?;
    writeln!(f, "{number} | {}", place.excerpt)?;
    writeln!(f, "{gutter} | {indent}{carets}")?;
    Ok(number.len())
}

/// One rejection of a value, before it is known where the value stands. The
/// message continues a sentence that begins with the key's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Complaint {
    pub(super) message: String,
    pub(super) hint: String,
}

impl Complaint {
    pub(super) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: hint.into(),
        }
    }
}

/// Longest piece of a value that a message repeats, in characters.
const SHOWN_MAX_CHARS: usize = 60;

/// `text` in backquotes, on one line, control characters escaped, shortened.
pub(super) fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN_MAX_CHARS) {
        Some((end, _)) => format!("`{}…`", escaped(&text[..end])),
        None => format!("`{}`", escaped(text)),
    }
}

/// `text` on one line, control characters escaped.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            out.extend(character.escape_debug());
        } else {
            out.push(character);
        }
    }
    out
}
