//! The house rules of `src/lib.rs`, held by a test rather than by a reviewer.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a broken stage is a failed test"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Longest file, in lines, and longest function.
const FILE_MAX: usize = 620;
const FUNCTION_MAX: usize = 80;

/// Floors from the bottom up. A room imports from lower floors only, or from
/// the rooms of its own floor that are named behind it.
const FLOORS: &[&[(&str, &[&str])]] = &[
    &[
        ("message", &[]),
        ("failure", &[]),
        ("backoff", &[]),
        ("stop", &[]),
        ("random", &[]),
        ("failpoint", &[]),
        ("config", &["message", "failure"]),
        ("gate", &[]),
        ("lifecycle", &["message", "failure"]),
        ("identity", &["message", "config"]),
        ("seal", &["message"]),
        ("flights", &["message"]),
        ("observe", &["config", "message", "failure", "stop"]),
    ],
    &[("postgres", &["trust"]), ("trust", &[])],
    &[
        ("broker", &[]),
        ("claim", &[]),
        ("ledger", &[]),
        ("handler", &[]),
    ],
    &[
        ("pipeline", &[]),
        ("inspect", &["prune"]),
        ("pool", &["pipeline"]),
        ("prune", &[]),
        ("why", &[]),
        ("dead_letter", &["why"]),
    ],
    &[("daemon", &[])],
    &[("cli", &[])],
    &[("worker", &[])],
];

struct Source {
    room: String,
    path: PathBuf,
    /// Without the unit tests at its end.
    code: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let relative = path.strip_prefix(&root).unwrap();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs")
                && !relative.components().any(|c| c.as_os_str() == "tests")
            {
                let room = relative.iter().next().unwrap().to_str().unwrap();
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod ").next().unwrap().to_owned();
                found.push(Source {
                    room: room.trim_end_matches(".rs").to_owned(),
                    path: relative.to_owned(),
                    code,
                });
            }
        }
    }
    assert!(found.len() > 20, "the sources were not found");
    found
}

fn lines_without_comments(code: &str) -> impl Iterator<Item = &str> {
    code.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
}

#[test]
fn imports_run_downward() {
    let mut floor_of = BTreeMap::new();
    for (floor, rooms) in FLOORS.iter().enumerate() {
        for (room, beside) in *rooms {
            floor_of.insert(*room, (floor, *beside));
        }
    }
    let mut wrong = Vec::new();
    for source in sources() {
        if ["lib", "main"].contains(&source.room.as_str()) {
            continue;
        }
        let (floor, beside) = floor_of
            .get(source.room.as_str())
            .unwrap_or_else(|| panic!("{} stands on no floor of tests/it/house.rs", source.room));
        for line in lines_without_comments(&source.code) {
            for imported in line.split("crate::").skip(1) {
                let imported: String = imported
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                let Some((other, _)) = floor_of.get(imported.as_str()) else {
                    continue;
                };
                if imported != source.room && other >= floor && !beside.contains(&imported.as_str())
                {
                    wrong.push(format!("{}: {}", source.path.display(), line.trim()));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "upward or sideways imports:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn each_outside_world_is_known_in_one_place() {
    let rules: &[(&str, &[&str])] = &[
        ("amiquip::", &["broker"]),
        ("redis::", &["claim"]),
        // The log names modules of other crates, as text.
        (
            "sqlx::",
            &[
                "postgres", "ledger", "handler", "inspect", "observe", "worker",
            ],
        ),
        ("std::fs", &["config", "broker", "cli", "failpoint"]),
        ("std::env", &["config", "failpoint"]),
        ("process::exit", &[]),
        ("ExitCode", &["cli", "main", "worker"]),
    ];
    let mut wrong = Vec::new();
    for source in sources() {
        for line in lines_without_comments(&source.code) {
            for (name, rooms) in rules {
                if line.contains(name) && !rooms.contains(&source.room.as_str()) {
                    wrong.push(format!("{}: {}", source.path.display(), line.trim()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "out of place:\n{}", wrong.join("\n"));
}

#[test]
fn files_and_functions_stay_readable() {
    let mut wrong = Vec::new();
    for source in sources() {
        let lines: Vec<&str> = source.code.lines().collect();
        if lines.len() > FILE_MAX {
            wrong.push(format!("{}: {} lines", source.path.display(), lines.len()));
        }
        for (start, line) in lines.iter().enumerate() {
            let indent = line.len() - line.trim_start().len();
            let head = line.trim_start();
            let is_function = [
                "fn ",
                "pub fn ",
                "pub(super) fn ",
                "pub(crate) fn ",
                "async fn ",
            ]
            .iter()
            .any(|prefix| head.starts_with(prefix));
            if !is_function || head.ends_with(';') || head.ends_with("{}") {
                continue;
            }
            let end = format!("{}}}", " ".repeat(indent));
            let length = lines[start..].iter().position(|l| *l == end).unwrap_or(0);
            if length > FUNCTION_MAX {
                wrong.push(format!(
                    "{}:{}: {length} lines",
                    source.path.display(),
                    start + 1
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "too long:\n{}", wrong.join("\n"));
}

/// A file of the repository.
fn file(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

fn manifest(path: &str) -> toml::Table {
    file(path).parse().unwrap()
}

/// Rust code of any sort: sources, tests, benchmarks, examples, fuzz targets.
fn all_code() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [
        "src",
        "tests",
        "benches",
        "examples",
        "fuzz/src",
        "fuzz/fuzz_targets",
    ];
    let mut folders: Vec<PathBuf> = folders.iter().map(|folder| root.join(folder)).collect();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path, text));
            }
        }
    }
    found
}

#[test]
fn no_code_of_ours_is_unsafe() {
    let manifest = manifest("Cargo.toml");
    let lints = manifest["lints"]["rust"].as_table().unwrap();
    let forbidden: Vec<&String> = lints
        .iter()
        .filter(|(_, level)| level.as_str() == Some("forbid"))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(forbidden, [&["unsafe", "code"].join("_")]);
    // Pieced together, so that this file has none of it.
    let words = [["unsafe", "code"].join("_"), ["unsafe", "{"].join(" ")];
    let exceptions: Vec<PathBuf> = all_code()
        .into_iter()
        .filter(|(_, text)| words.iter().any(|word| text.contains(word)))
        .map(|(path, _)| path)
        .collect();
    assert_eq!(exceptions, Vec::<PathBuf>::new());
}

#[test]
fn the_oldest_compiler_that_is_promised_is_the_one_that_is_used() {
    let manifest = manifest("Cargo.toml");
    let promised = manifest["package"]["rust-version"]
        .as_str()
        .unwrap()
        .to_owned();
    let toolchain: toml::Table = file("rust-toolchain.toml").parse().unwrap();
    let used = toolchain["toolchain"]["channel"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(used, format!("{promised}.0"));
}

/// The runner says nothing of a name that no test has.
#[test]
fn each_test_that_script_check_names_is_there() {
    let config = manifest(".config/nextest.toml");
    let filter = config["profile"]["check"]["default-filter"]
        .as_str()
        .unwrap();
    let names: Vec<&str> = filter
        .split("test(=")
        .skip(1)
        .map(|rest| rest.split(')').next().unwrap())
        .collect();
    assert!(names.len() >= 12, "{names:?}");
    let code = all_code();
    let is_there = |name: &&str| {
        let (module, function) = name.rsplit_once("::").unwrap();
        let file = format!("tests/it/{}.rs", module.replace("::", "/"));
        let test = format!("#[test]\nfn {function}(");
        code.iter()
            .any(|(path, text)| path.ends_with(&file) && text.contains(&test))
    };
    let missing: Vec<_> = names.into_iter().filter(|name| !is_there(name)).collect();
    assert_eq!(missing, Vec::<&str>::new());
}
