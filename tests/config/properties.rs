//! Whatever the text, it is read or explained; nothing panics.

use ackonce::config::to_toml;
use proptest::prelude::*;

use crate::{SHIPPED, parse};

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

fn reads_or_explains(text: &str) {
    match parse(text) {
        Ok(config) => {
            let printed = to_toml(&config, true);
            let again = parse(&printed).unwrap_or_else(|error| panic!("{printed}\n{error}"));
            assert_eq!(again, config);
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
