//! Lines that others write: answers of programs, and files of dead letters.

use ackonce::broker::properties::Properties;
use ackonce::config::checked::Identity;
use ackonce::config::defaults::RETRY_AFTER_MAX;
use ackonce::dead_letter::file::Entry;
use ackonce::handler::command::line;

/// Longest explanation of a line that is not understood, and longest error of
/// an answer, in characters.
const PROBLEM_CHARS: usize = 1_000;
const ERROR_CHARS: usize = 1_900;

/// A line of a program, as its first and as its answer to the message 7.
pub fn answers(data: &[u8]) {
    if let Err(problem) = line::greeting(data) {
        is_fit_to_show(&problem, PROBLEM_CHARS);
    }
    match line::answer(data, 7) {
        Ok(Ok(())) => {}
        Ok(Err(failure)) => {
            is_fit_to_show(&failure.text, ERROR_CHARS);
            assert!(!failure.text.is_empty());
            assert!(
                failure
                    .retry_after
                    .is_none_or(|wait| wait <= RETRY_AFTER_MAX)
            );
        }
        Err(problem) => is_fit_to_show(&problem, PROBLEM_CHARS),
    }
}

fn is_fit_to_show(text: &str, most: usize) {
    assert!(text.chars().count() <= most, "{text}");
    assert!(!super::has_control(text), "{text:?}");
}

/// A line of a file of dead letters: what is taken from it is written as it was
/// read.
pub fn letters(data: &[u8]) {
    let entry = match Entry::read(data) {
        Ok(entry) => entry,
        Err(problem) => return is_fit_to_show(&problem, PROBLEM_CHARS),
    };
    for identity in [
        Identity::MessageId,
        Identity::Header("id".to_owned()),
        Identity::Json("/id".to_owned()),
        Identity::Body,
    ] {
        assert_eq!(entry.id(&identity), entry.id(&identity));
    }
    let written = entry.properties.to_json();
    let read = Properties::from_json(&written).unwrap_or_else(|error| panic!("{error}"));
    // As JSON: a NaN is not equal to itself.
    assert_eq!(read.to_json(), written);
}
