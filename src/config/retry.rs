//! `[consumer.retry]` and `[consumer.failures]`: when a message is tried again,
//! and what the codes of its failures mean.

use std::collections::BTreeMap;
use std::time::Duration;

use super::checked::Retry;
use super::error::{Complaint, shown};
use super::reader::{Field, Section, in_range};
use super::{defaults, duration, keys};
use crate::failure::{Class, Fit, Overrides};

/// `None` where something is wrong, which is reported. All retries of a message
/// together fit into `retention`.
pub(super) fn retry(consumer: &Section<'_>, retention: &Field<Duration>) -> Option<Retry> {
    let section = consumer.section("retry", &keys::RETRY);
    let max_attempts = section.integer("max_attempts", &defaults::MAX_ATTEMPTS);
    let backoff = section
        .list("backoff", "[\"1s\", \"10s\", \"1m\"]", |text| {
            in_range(
                duration::parse(text)?,
                &defaults::RETRY_DELAY,
                duration::format,
            )
        })
        .then(|steps| check_steps(steps.into_iter().map(|(delay, _)| delay).collect()))
        .or(defaults::RETRY_BACKOFF.to_vec());
    let jitter_percent = section.integer("jitter_percent", &defaults::RETRY_JITTER);
    let breaker = section.integer("breaker", &defaults::BREAKER);
    let is_sound = max_attempts.is_sound() && backoff.is_sound();
    let span = if section.has("backoff") {
        backoff.span
    } else {
        retention.blame(&max_attempts)
    };
    let retry = Retry {
        max_attempts: max_attempts.value,
        backoff: backoff.value,
        jitter_percent: jitter_percent.value,
        breaker: breaker.value,
    };
    let longest = retry.longest_wait();
    if is_sound && retention.is_sound() && retention.value < longest {
        section.reader.report(
            span,
            format!(
                "a message can wait {} for its retries, and `retention` is {}",
                duration::format(longest),
                duration::format(retention.value)
            ),
            "a duplicate that waits for longer than its ledger row is kept would be applied \
             again: raise `retention` in [ledger], or lower `max_attempts` or `backoff`",
        );
    }
    is_sound.then_some(retry)
}

fn check_steps(steps: Vec<Duration>) -> Result<Vec<Duration>, Complaint> {
    let most = defaults::RETRY_STEPS_MAX;
    if steps.is_empty() {
        return Err(Complaint::new(
            "is empty",
            format!("allowed: 1 to {most} delays; to try nothing again: max_attempts = 1"),
        ));
    }
    if steps.len() > most {
        return Err(Complaint::new(
            format!("has too many steps: {}", steps.len()),
            format!("allowed: 1 to {most} delays; the last goes on for all that follow"),
        ));
    }
    Ok(steps)
}

/// The codes that the consumer's handler can fail with, and what they mean
/// here.
pub(super) fn failures(consumer: &Section<'_>, codes: &Codes) -> Overrides {
    let section = consumer.section("failures", &keys::FAILURES);
    let lists = [
        ("transient", Class::Transient),
        ("permanent", Class::Permanent),
        ("systemic", Class::Systemic),
    ];
    let mut overrides = Vec::new();
    let mut seen = BTreeMap::new();
    for (key, class) in lists {
        let listed = section
            .list(key, codes.example, codes.check)
            .then(check_count)
            .or(Vec::new());
        for (code, span) in listed.value {
            if let Some(first) = seen.insert(code.clone(), span) {
                let line = section.reader.source.line_number(first.start);
                section.reader.report(
                    span,
                    format!("`{key}` has {}, as has line {line}", shown(&code)),
                    "a code has one class: keep one of them",
                );
            }
            overrides.push((code, class));
        }
    }
    Overrides(overrides, codes.fit)
}

fn check_count<T>(codes: Vec<T>) -> Result<Vec<T>, Complaint> {
    let most = defaults::FAILURE_CODES_MAX;
    if codes.len() <= most {
        return Ok(codes);
    }
    Err(Complaint::new(
        format!("has too many codes: {}", codes.len()),
        format!("allowed: up to {most}; the beginning of a code stands for a whole class"),
    ))
}

/// The codes that the handlers of one type fail with.
pub(super) struct Codes {
    /// A list of some, as typed.
    pub(super) example: &'static str,
    /// Refuses what is no such code.
    pub(super) check: fn(&str) -> Result<String, Complaint>,
    /// What else each of them stands for.
    pub(super) fit: Fit,
}

/// A SQLSTATE, or the two characters of a class of them.
pub(super) fn check_sqlstate(code: &str) -> Result<String, Complaint> {
    let is_code = |code: &str| {
        matches!(code.len(), 2 | 5)
            && code
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit())
    };
    if is_code(code) {
        return Ok(code.to_owned());
    }
    let capitals = code.to_ascii_uppercase();
    let hint = if is_code(&capitals) {
        format!("write it in capitals: {}", shown(&capitals))
    } else {
        "write a SQLSTATE of five characters, as in \"23505\", or the two of a class, as in \
         \"23\""
            .to_owned()
    };
    Err(Complaint::new(
        format!("has no SQLSTATE: {}", shown(code)),
        hint,
    ))
}
