//! The text of a configuration file: offsets to lines and columns, and lines
//! as they may be shown. Decides what of a line is secret; knows no keys
//! beyond the words that give a secret away.

use std::cell::RefCell;
use std::ops::Range;

/// Bytes of the text, from `start` up to but not including `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Span {
    pub(super) start: usize,
    pub(super) end: usize,
}

impl From<Range<usize>> for Span {
    fn from(range: Range<usize>) -> Self {
        Self {
            start: range.start,
            end: range.end,
        }
    }
}

/// A point in a configuration file and the line it is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Line, counted from 1.
    pub line: usize,
    /// Column in characters, counted from 1, in the file as it is.
    pub column: usize,
    /// The line as it may be shown: secrets taken out, long lines cut.
    pub excerpt: String,
    /// Characters of `excerpt` left of the caret.
    pub caret_start: usize,
    /// Width of the caret in characters, at least 1.
    pub caret_width: usize,
}

/// Stands for what is not shown.
pub(super) const REDACTED: &str = "<redacted>";

/// A key that contains one of these holds a secret, unless it ends in `_file`.
const SECRET_WORDS: [&str; 7] = ["url", "pass", "secret", "token", "credential", "dsn", "env"];

/// Longest excerpt, in characters.
const EXCERPT_MAX_CHARS: usize = 120;

/// The text, and which parts of it must not be shown.
pub(super) struct Source<'a> {
    pub(super) text: &'a str,
    secrets: RefCell<Vec<Span>>,
}

impl<'a> Source<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self {
            text,
            secrets: RefCell::new(secret_spans(text)),
        }
    }

    /// Keeps `span` out of every excerpt.
    pub(super) fn hide(&self, span: Span) {
        self.secrets.borrow_mut().push(span);
    }

    /// The line of `offset`, counted from 1.
    pub(super) fn line_number(&self, offset: usize) -> usize {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        before.iter().filter(|byte| **byte == b'\n').count() + 1
    }

    /// Where `span` begins, with its line.
    pub(super) fn place(&self, span: Span) -> Place {
        let start = self.text.floor_char_boundary(span.start);
        let end = self.text.floor_char_boundary(span.end).max(start);
        let line_start = self.text[..start].rfind('\n').map_or(0, |at| at + 1);
        let line_end = self.text[start..]
            .find('\n')
            .map_or(self.text.len(), |at| start + at);
        let column = self.text[line_start..start].chars().count() + 1;

        let hidden = self.hidden_from(line_start, line_end);
        let visible_end = hidden.unwrap_or(line_end);
        let mut line: Vec<char> = self.text[line_start..visible_end].chars().collect();
        while hidden.is_none() && line.last().is_some_and(|c| *c == '\r') {
            line.pop();
        }
        if hidden.is_some() {
            line.extend(REDACTED.chars());
        }
        for character in &mut line {
            if character.is_control() {
                *character = ' ';
            }
        }
        let (caret_start, caret_width) = if start < visible_end || hidden.is_none() {
            let shown_end = end.min(visible_end).max(start);
            (column - 1, self.text[start..shown_end].chars().count())
        } else {
            let caret = self.text[line_start..visible_end].chars().count();
            (caret, REDACTED.len())
        };
        let (excerpt, caret_start) = cut(&line, caret_start);
        let room = excerpt.chars().count().saturating_sub(caret_start);
        Place {
            line: self.line_number(start),
            column,
            excerpt,
            caret_start,
            caret_width: caret_width.min(room).max(1),
        }
    }

    /// From which byte on the line must not be shown: the rest of a line with
    /// a secret in it is secret too, because a syntax error may have moved the
    /// secret's end.
    fn hidden_from(&self, line_start: usize, line_end: usize) -> Option<usize> {
        let secrets = self.secrets.borrow();
        secrets
            .iter()
            .filter(|secret| secret.start <= line_end && secret.end > line_start)
            .map(|secret| secret.start.max(line_start))
            .min()
    }
}

/// At most [`EXCERPT_MAX_CHARS`] of `line` around `caret`, and where the caret
/// is in that.
fn cut(line: &[char], caret: usize) -> (String, usize) {
    if line.len() <= EXCERPT_MAX_CHARS {
        return (line.iter().collect(), caret.min(line.len()));
    }
    let caret = caret.min(line.len());
    let start = caret.saturating_sub(EXCERPT_MAX_CHARS / 2);
    let end = (start + EXCERPT_MAX_CHARS).min(line.len());
    let mut excerpt: String = line[start..end].iter().collect();
    let mut caret = caret - start;
    if start > 0 {
        excerpt.insert(0, '…');
        caret += 1;
    }
    if end < line.len() {
        excerpt.push('…');
    }
    (excerpt, caret)
}

/// Secrets found by looking at the text alone, so that they stay hidden even
/// where the text is not TOML.
fn secret_spans(text: &str) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut open_quote: Option<&str> = None;
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        let hidden = match open_quote {
            Some(_) => Some(0),
            None => secret_start(line),
        };
        if let Some(start) = hidden {
            let secret = &line[start..];
            spans.push(Span::from(offset + start..offset + line.len()));
            open_quote = match open_quote {
                Some("]") if secret.trim_end().ends_with(']') => None,
                Some("]") => Some("]"),
                Some(quote) if secret.contains(quote) => None,
                Some(quote) => Some(quote),
                // A list of secrets, over several lines.
                None if secret.trim_end() == "[" => Some("]"),
                None => ["\"\"\"", "'''"]
                    .into_iter()
                    .find(|quote| secret.matches(quote).count() == 1),
            };
        }
        offset += line.len();
    }
    spans
}

/// Where the secret part of `line` begins: after the `=` or `:` of a key with
/// a telling name, or after `://`.
fn secret_start(line: &str) -> Option<usize> {
    let after_scheme = line.find("://").map(|at| at + 3);
    let after_key = line
        .match_indices(['=', ':'])
        .find(|(at, _)| is_secret_key(last_word(&line[..*at])))
        .map(|(at, _)| at + 1)
        .map(|at| at + line[at..].len() - line[at..].trim_start_matches([' ', '\t']).len());
    match (after_scheme, after_key) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

fn last_word(text: &str) -> &str {
    let text = text.trim_end();
    text.rsplit([' ', '\t', '{', ',', '['])
        .next()
        .unwrap_or(text)
}

fn is_secret_key(key: &str) -> bool {
    let key = key.trim_matches(['"', '\'']).to_ascii_lowercase();
    !key.ends_with("_file") && SECRET_WORDS.iter().any(|word| key.contains(word))
}
