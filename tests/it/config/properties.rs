//! Whatever the text, it is read or explained; nothing panics.

use std::collections::BTreeMap;

use ackonce::config::checked::{Config, DeadLetters, TopologyMode};
use ackonce::config::{defaults, to_toml};
use ackonce::failure::Class;
use proptest::prelude::*;

use super::{SHIPPED, SMALLEST, parse};

fn shipped_mutant() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        Just("\"".to_owned()),
        Just("[".to_owned()),
        Just("]]\n".to_owned()),
        Just("{".to_owned()),
        Just("= ".to_owned()),
        Just("${".to_owned()),
        Just("\"\"\"".to_owned()),
        Just("a.b.c".to_owned()),
        Just("[consumer]\n".to_owned()),
        Just("[[broker]]\n".to_owned()),
        "\\PC{0,3}",
    ];
    let edit = (0..SHIPPED.len(), 0..40usize, pieces);
    proptest::collection::vec(edit, 1..6).prop_map(|edits| {
        let mut text = SHIPPED.to_owned();
        for (at, length, piece) in edits {
            let start = text.floor_char_boundary(at.min(text.len()));
            let end = text.floor_char_boundary((start + length).min(text.len()));
            text.replace_range(start..end, &piece);
        }
        text
    })
}

/// Mostly sound values of the keys about failures, in any combination.
fn failure_keys() -> impl Strategy<Value = String> {
    let delay = prop_oneof![
        "[1-9]{1,3}(ms|s|m|h|d)",
        Just("1s".to_owned()),
        Just("7d".to_owned()),
        "\\PC{0,4}",
    ];
    let delays = prop::collection::vec(delay, 0..5);
    let code = prop_oneof!["[0-9A-Z]{5}", "[0-9A-Z]{2}", "2[23]", "[0-9a-z]{0,6}"];
    let codes = prop::collection::vec(code, 0..4);
    (delays, 0..7_u32, [codes.clone(), codes.clone(), codes]).prop_map(
        |(delays, attempts, [transient, permanent, systemic])| {
            format!(
                "[consumer.retry]\nmax_attempts = {attempts}\nbackoff = {delays:?}\n\
                 [consumer.failures]\ntransient = {transient:?}\npermanent = {permanent:?}\n\
                 systemic = {systemic:?}\n"
            )
        },
    )
}

/// A few consumers whose queues have names from a small pool.
fn neighbours() -> impl Strategy<Value = String> {
    let name = || prop::option::of("[ab](\\.(dead|retry\\.(1s|10s|90s|1m30s)))?");
    let mode = prop::sample::select(vec!["", "declare", "verify", "none"]);
    let dead_letters = prop::sample::select(vec!["", "reject", "publish"]);
    let queue_type = prop::sample::select(vec!["", "quorum", "classic"]);
    let backoff = prop::sample::subsequence(vec!["1s", "10s", "90s"], 1..3);
    let one = (name(), name(), mode, dead_letters, queue_type, backoff);
    prop::collection::vec(one, 1..4).prop_map(|consumers| {
        let mut text = SMALLEST
            .split("[[consumer]]")
            .next()
            .unwrap_or("")
            .to_owned();
        for (index, (queue, dead, mode, dead_letters, queue_type, backoff)) in
            consumers.into_iter().enumerate()
        {
            text.push_str(&format!(
                "[[consumer]]\nname = \"c{index}\"\nretry = {{ backoff = {backoff:?} }}\n\
                 handler = {{ type = \"sql\", sql = \"SELECT 1\" }}\n[consumer.topology]\n"
            ));
            for (key, value) in [
                ("queue", queue.unwrap_or_default().as_str()),
                ("dead_letter_queue", dead.unwrap_or_default().as_str()),
                ("mode", mode),
                ("dead_letters", dead_letters),
                ("queue_type", queue_type),
            ] {
                if !value.is_empty() {
                    text.push_str(&format!("{key} = \"{value}\"\n"));
                }
            }
        }
        text
    })
}

/// What holds for every configuration that is accepted.
fn is_safe_to_run(config: &Config) {
    let mut roles = BTreeMap::new();
    for consumer in &config.consumers {
        let (retry, topology) = (&consumer.retry, &consumer.topology);
        assert!(retry.longest_wait() <= config.ledger.retention);
        for (code, _) in &consumer.failures.0 {
            let named = consumer.failures.0.iter().filter(|(own, _)| own == code);
            assert_eq!(named.count(), 1, "{code}");
        }
        let of_others = topology.mode == TopologyMode::None;
        assert!(!of_others || topology.dead_letters == DeadLetters::Publish);

        let work = roles.insert(topology.queue.clone(), "work");
        assert_eq!(work, None, "two roles of {}", topology.queue);
        for delay in retry.delays() {
            let queue = topology.retry_queue(delay);
            assert!(queue.len() <= defaults::AMQP_NAME_MAX);
            let other = roles.insert(queue, "retry");
            assert_eq!(other, None, "two roles of a retry queue");
        }
        let dead = roles.insert(topology.dead_letter_queue.clone(), "dead");
        assert_eq!(dead, None, "two roles of a dead-letter queue");
    }
}

fn reads_or_explains(text: &str) {
    match parse(text) {
        Ok(config) => {
            let printed = to_toml(&config, true);
            let again = parse(&printed).unwrap_or_else(|error| panic!("{printed}\n{error}"));
            assert_eq!(again, config);
            is_safe_to_run(&config);
        }
        Err(error) => {
            assert!(!error.problems().is_empty());
            let _ = error.to_string();
            for problem in error.problems() {
                assert!(!problem.hint.is_empty(), "{problem:?}");
                let place = problem.place.as_ref().expect("a place");
                let line = text
                    .split('\n')
                    .nth(place.line - 1)
                    .expect("a line of the text");
                assert!(place.column <= line.chars().count() + 1, "{problem:?}");
                assert!(
                    place.caret_start <= place.excerpt.chars().count(),
                    "{problem:?}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_mutated_configuration_is_read_or_explained(text in shipped_mutant()) {
        reads_or_explains(&text);
    }

    #[test]
    fn retries_and_classes_are_read_or_explained(lines in failure_keys()) {
        reads_or_explains(&SMALLEST.replace("[consumer.topology]\n", &format!("{lines}[consumer.topology]\n")));
    }

    #[test]
    fn consumers_are_given_queues_of_their_own_or_refused(text in neighbours()) {
        reads_or_explains(&text);
    }

    #[test]
    fn a_class_is_given_as_it_was_typed(
        codes in prop::collection::btree_map("[0-9A-Z]{5}", 0..3_usize, 0..8),
    ) {
        let classes = [Class::Transient, Class::Permanent, Class::Systemic];
        let mut lines = "[consumer.failures]\n".to_owned();
        for (index, class) in classes.iter().enumerate() {
            let of_class = codes.iter().filter(|(_, own)| **own == index);
            let of_class: Vec<&String> = of_class.map(|(code, _)| code).collect();
            lines.push_str(&format!("{class} = {of_class:?}\n"));
        }
        let text = SMALLEST.replace("[consumer.claim]\n", &lines);
        let config = parse(&text).unwrap_or_else(|error| panic!("{error}"));
        let failures = &config.consumers[0].failures;
        for (code, index) in &codes {
            prop_assert_eq!(failures.class_of(code), Some(classes[*index]));
        }
        prop_assert_eq!(failures.0.len(), codes.len());
    }

    #[test]
    fn arbitrary_text_is_read_or_explained(text in "(\\PC|\n|\r|\t|\u{feff}|\0){0,200}") {
        reads_or_explains(&text);
    }

    #[test]
    fn toml_like_text_is_read_or_explained(
        text in "((\\[|\\[\\[)?(broker|redis|consumer|a)(\\.b)?(\\]|\\]\\])?|=|\"|'| |\n|1|\\$\\{|\\}|\\{|,|true|\"\"\"){0,40}",
    ) {
        reads_or_explains(&text);
    }
}
