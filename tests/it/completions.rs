//! Completions and manual pages: sound, and about every command.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::run_ackonce;

fn printed(arguments: &[&str]) -> String {
    let output = run_ackonce(arguments);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What `program` says about `text` on its standard input; nothing where the
/// program is not there.
fn judged(program: &str, arguments: &[&str], text: &str) -> Option<String> {
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.ok()?;
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program}: {said}");
    Some(said)
}

#[test]
fn completions_are_sound_and_know_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = printed(&["completions", shell]);
        for word in ["dead", "export", "group-by", "ids-file", "completions"] {
            assert!(script.contains(word), "{shell} does not know {word}");
        }
        match shell {
            "bash" | "zsh" | "fish" => drop(judged(shell, &["-n"], &script)),
            _ => {}
        }
    }
    let unknown = run_ackonce(&["completions", "tcsh"]);
    assert_eq!(unknown.status.code(), Some(2));
}

#[test]
fn bash_completes_a_subcommand_and_its_options() {
    let script = printed(&["completions", "bash"]);
    let ask = "\nCOMP_WORDS=(ackonce dead li); COMP_CWORD=2; _ackonce ackonce li dead\n\
               [ \"${COMPREPLY[*]}\" = list ] || { echo \"${COMPREPLY[*]}\" >&2; exit 1; }\n";
    // Completion is a builtin of interactive shells; the function is not.
    judged("bash", &["--norc"], &(script + ask));
}

#[test]
fn every_command_that_is_shown_has_a_page_that_a_formatter_takes() {
    let folder = tempfile::tempdir().unwrap();
    printed(&["man", "--directory", folder.path().to_str().unwrap()]);
    let pages: BTreeSet<String> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for page in [
        "ackonce.1",
        "ackonce-run.1",
        "ackonce-dead.1",
        "ackonce-dead-list.1",
        "ackonce-dead-import.1",
        "ackonce-ledger-prune.1",
        "ackonce-publish.1",
    ] {
        assert!(pages.contains(page), "{page} is not in {pages:?}");
    }
    assert!(
        !pages.contains("ackonce-man.1"),
        "what is hidden has no page"
    );
    assert!(pages.iter().all(|page| !page.contains("help")), "{pages:?}");
    for page in &pages {
        let text = std::fs::read_to_string(folder.path().join(page)).unwrap();
        assert!(
            text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"),
            "{page}"
        );
        if let Some(said) = judged("groff", &["-man", "-Kutf8", "-ww", "-z", "-Tutf8"], &text) {
            assert_eq!(said, "", "{page}");
        }
        if let Some(said) = judged("mandoc", &["-Tlint", "-Wwarning"], &text) {
            assert_eq!(said, "", "{page}");
        }
    }
    let first = printed(&["man"]);
    assert!(
        first.contains("ackonce-dead(1)") || first.contains("ackonce\\-dead(1)"),
        "{first}"
    );
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let output = run_ackonce(&["man", "--directory", "/no/such/folder"]);
    assert_eq!(output.status.code(), Some(71));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("/no/such/folder"), "{said}");
    assert!(!Path::new("/no/such/folder").exists());
}
