//! The checks of the fuzz targets, without a fuzzer: on every seed, and on
//! seeds with a few bytes changed. What a fuzzer finds becomes a seed.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "../../fuzz/src/lib.rs"]
mod checks;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use checks::{CHECKS, Check};
use proptest::prelude::*;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// The names of what is in a folder of the fuzz crate.
fn names(folder: &str) -> BTreeSet<String> {
    std::fs::read_dir(fuzz().join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect()
}

/// Every seed of a target, with its path.
fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = fuzz().join("seeds").join(target);
    std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect()
}

fn check(name: &str) -> Check {
    let found = CHECKS.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("no check {name}")).1
}

#[test]
fn every_check_has_its_program_and_its_seeds() {
    let checks: BTreeSet<String> = CHECKS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names("fuzz_targets"), checks);
    assert_eq!(names("seeds"), checks);
    let manifest = std::fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    for name in &checks {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")));
        let program = fuzz().join("fuzz_targets").join(format!("{name}.rs"));
        let program = std::fs::read_to_string(program).unwrap();
        assert!(program.contains(&format!("ackonce_fuzz::{name}(data)")));
        assert!(seeds(name).len() >= 5, "{name}");
    }
}

#[test]
fn whatever_holds_for_any_bytes_holds_for_every_seed() {
    for (name, check) in CHECKS {
        for (path, seed) in seeds(name) {
            eprintln!("{}", path.display());
            check(&seed);
        }
    }
    checks::config(include_bytes!("../../config.toml"));
}

/// Else nothing would go further than the first mistake.
#[test]
fn the_seeds_named_as_configurations_are_sound() {
    let is_named = |path: &Path| path.extension().is_some_and(|end| end == "toml");
    let mut sound = 0;
    for (path, seed) in seeds("config").iter().filter(|(path, _)| is_named(path)) {
        let read = checks::parse(std::str::from_utf8(seed).unwrap());
        assert!(read.is_ok(), "{}: {read:?}", path.display());
        sound += 1;
    }
    assert!(sound >= 2, "{sound}");
}

/// Seeds of a target with bytes overwritten, taken out and put in.
fn mutants(target: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let seeds: Vec<Vec<u8>> = seeds(target).into_iter().map(|(_, seed)| seed).collect();
    let piece = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..4),
        prop::sample::select(vec!["\"", "'", "{", "[", "\\", "\n", "$", "0", "ä"])
            .prop_map(|text| text.as_bytes().to_vec()),
    ];
    let edit = (any::<prop::sample::Index>(), 0..4_usize, piece);
    let edits = prop::collection::vec(edit, 0..6);
    (prop::sample::select(seeds), edits).prop_map(|(mut bytes, edits)| {
        for (at, gone, piece) in edits {
            let from = at.index(bytes.len() + 1);
            let to = (from + gone).min(bytes.len());
            bytes.splice(from..to, piece);
        }
        bytes
    })
}

macro_rules! mutants_pass {
    ($($test:ident $target:literal,)*) => {
        proptest! {
            $(
                #[test]
                fn $test(bytes in mutants($target)) {
                    check($target)(&bytes);
                }
            )*
        }
    };
}

mutants_pass! {
    frames_with_bytes_changed_can_be_read_or_are_refused "frames",
    a_message_with_bytes_changed_arrives "delivery",
    a_configuration_with_bytes_changed_is_read_or_explained "config",
    a_value_with_bytes_changed_is_read_or_explained "values",
    a_script_with_bytes_changed_is_split_or_explained "sql",
    an_answer_with_bytes_changed_is_understood_or_explained "answers",
    a_letter_with_bytes_changed_is_taken_as_it_is_or_refused "letters",
    a_time_with_bytes_changed_is_read_or_refused "times",
}
