//! What a program says on standard error: its last words, made harmless, and
//! its lines in the log. Nothing here trusts it to be short, or text.

use std::collections::VecDeque;
use std::time::Instant;

/// Bytes of standard error that are kept: the last ones.
const KEPT_BYTES: usize = 8 << 10;

/// Longest text made of them, in characters: it has to fit into the journal's
/// 2,000 beside what else a failure says.
const KEPT_CHARS: usize = 1_400;

/// Longest line in a log, and longest first line of a failure, in characters.
const LINE_CHARS: usize = 400;

/// Lines that a program may log at once, and for each second after that.
const BURST_LINES: f64 = 100.0;
const LINES_PER_SECOND: f64 = 10.0;

/// The last bytes of what is written to it.
#[derive(Default)]
pub(super) struct Tail {
    bytes: VecDeque<u8>,
    cut: bool,
}

impl Tail {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let skip = bytes.len().saturating_sub(KEPT_BYTES);
        let bytes = &bytes[skip..];
        let over = (self.bytes.len() + bytes.len()).saturating_sub(KEPT_BYTES);
        self.bytes.drain(..over);
        self.bytes.extend(bytes);
        self.cut |= skip + over > 0;
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// `what` happened, and what was said last: the last line at once, since
    /// that is where most programs name the reason, and the rest below it.
    pub(super) fn explain(&self, what: &str) -> String {
        let bytes: Vec<u8> = self.bytes.iter().copied().collect();
        let said = harmless(&bytes);
        let lines: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
        match lines.as_slice() {
            [] => format!("{what}, and nothing on standard error"),
            [line] if !self.cut => format!("{what}: {}", shortened(line)),
            [.., last] => {
                let mut text = format!("{what}: {}\n", shortened(last));
                let rest = lines.join("\n");
                let count = rest.chars().count();
                let skip = count.saturating_sub(KEPT_CHARS);
                if self.cut || skip > 0 {
                    text.push('…');
                }
                let kept: String = rest.chars().skip(skip).collect();
                text.push_str(kept.trim_start());
                text
            }
        }
    }
}

/// `bytes` as text of lines without control characters: those are escaped.
pub(super) fn harmless(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '\n' => out.push('\n'),
            // The end of a line, alone as by progress bars or before a `\n`.
            '\r' => {
                if characters.peek() != Some(&'\n') {
                    out.push('\n');
                }
            }
            '\t' => out.push(' '),
            // These reorder or hide what stands around them.
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                out.extend(character.escape_unicode());
            }
            control if control.is_control() => {
                out.extend(control.escape_default());
            }
            other => out.push(other),
        }
    }
    out
}

/// At most [`LINE_CHARS`] of `line`.
pub(super) fn shortened(line: &str) -> String {
    match line.char_indices().nth(LINE_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

/// Takes bytes, gives whole lines, and no more of them than a log can bear.
pub(super) struct Lines {
    begun: Vec<u8>,
    /// The rest of a line that was too long is skipped.
    skipping: bool,
    tokens: f64,
    counted: Instant,
    left_out: u64,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            begun: Vec::new(),
            skipping: false,
            tokens: BURST_LINES,
            counted: Instant::now(),
            left_out: 0,
        }
    }
}

impl Lines {
    /// Takes `bytes`, and hands each line that is whole now to `log`.
    pub(super) fn push(&mut self, bytes: &[u8], mut log: impl FnMut(&str)) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let ended = piece.ends_with(b"\n");
            if !self.skipping {
                // Four bytes at most make a character, and what is cut off is
                // told by one character more.
                let room = (4 * (LINE_CHARS + 1)).saturating_sub(self.begun.len());
                self.begun.extend(piece.iter().take(room));
                self.skipping = self.begun.len() >= 4 * (LINE_CHARS + 1);
            }
            if ended {
                self.end_line(&mut log);
            }
        }
    }

    /// The program says no more.
    pub(super) fn end(&mut self, mut log: impl FnMut(&str)) {
        if !self.begun.is_empty() {
            self.end_line(&mut log);
        }
        if self.left_out > 0 {
            log(&format!("({} lines were left out)", self.left_out));
            self.left_out = 0;
        }
    }

    fn end_line(&mut self, log: &mut impl FnMut(&str)) {
        let line = std::mem::take(&mut self.begun);
        self.skipping = false;
        let since = self.counted.elapsed().as_secs_f64();
        self.counted = Instant::now();
        self.tokens = (self.tokens + since * LINES_PER_SECOND).min(BURST_LINES);
        if self.tokens < 1.0 {
            self.left_out += 1;
            return;
        }
        self.tokens -= 1.0;
        if self.left_out > 0 {
            log(&format!("({} lines were left out)", self.left_out));
            self.left_out = 0;
        }
        let text = harmless(&line);
        for line in text.lines().filter(|line| !line.is_empty()) {
            log(&shortened(line));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn explained(pieces: &[&[u8]]) -> String {
        let mut tail = Tail::default();
        for piece in pieces {
            tail.push(piece);
        }
        tail.explain("exit status 1")
    }

    #[test]
    fn the_last_line_comes_first_and_all_that_is_kept_below_it() {
        assert_eq!(
            explained(&[]),
            "exit status 1, and nothing on standard error"
        );
        assert_eq!(
            explained(&[b"\n\r\n"]),
            "exit status 1, and nothing on standard error"
        );
        assert_eq!(explained(&[b"no ", b"disk\n"]), "exit status 1: no disk");
        assert_eq!(
            explained(&[b"Traceback:\n\n  x\r\nValueError\n"]),
            "exit status 1: ValueError\nTraceback:\n  x\nValueError"
        );
    }

    #[test]
    fn what_is_kept_is_the_end_and_is_said_to_be_cut() {
        let text = explained(&[&b"x".repeat(10_000), b"\nlast\n"]);
        assert!(text.starts_with("exit status 1: last\n…xxx"), "{text}");
        assert!(text.ends_with("xxx\nlast"), "{text}");
        let text = explained(&[&b"y\n".repeat(100_000)]);
        assert!(text.starts_with("exit status 1: y\n…y\n"), "{text}");
    }

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        let text = harmless(b"a\x1b[2Jb\x07\x00\tc\xff\xc2\x9b\xe2\x80\xaed\rprogress\r\n");
        assert_eq!(
            text,
            "a\\u{1b}[2Jb\\u{7}\\u{0} c\u{fffd}\\u{9b}\\u{202e}d\nprogress\n"
        );
    }

    #[test]
    fn lines_beyond_what_a_log_can_bear_are_counted() {
        let mut lines = Lines::default();
        let mut logged = Vec::new();
        lines.push(&b"z\n".repeat(5_000), |line| logged.push(line.to_owned()));
        lines.push(&b"w".repeat(5_000), |line| logged.push(line.to_owned()));
        lines.end(|line| logged.push(line.to_owned()));
        assert_eq!(logged[0], "z");
        // A slow machine may earn a few more while it counts.
        assert!((100..400).contains(&logged.len()), "{}", logged.len());
        let last = logged.last().unwrap();
        assert!(last.ends_with(" lines were left out)"), "{last}");
    }

    #[test]
    fn a_long_line_is_cut_and_the_next_one_is_whole() {
        let mut lines = Lines::default();
        let mut logged = Vec::new();
        for piece in [
            &b"v".repeat(1_000)[..],
            &b"v".repeat(9_000),
            b"\nnext\nhalf",
        ] {
            lines.push(piece, |line| logged.push(line.to_owned()));
        }
        lines.end(|line| logged.push(line.to_owned()));
        let cut = format!("{}…", "v".repeat(LINE_CHARS));
        assert_eq!(logged, [cut.as_str(), "next", "half"]);
    }

    proptest! {
        #[test]
        fn whatever_is_said_a_failure_stays_short_and_harmless(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..4_000), 0..8),
        ) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let text = explained(&pieces);
            prop_assert!(text.chars().count() <= 2_000);
            prop_assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
        }
    }
}
