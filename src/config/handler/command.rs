//! `type = "command"`.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};
use toml::de::DeValue;

use crate::config::checked::{CommandHandler, CommandMode, Secret};
use crate::config::error::{Complaint, shown};
use crate::config::reader::Section;
use crate::config::source::Span;
use crate::config::{defaults, files, keys};

/// What it knows.
pub(super) const KEYS: &[&str] = &[
    "argv",
    "mode",
    "working_directory",
    "env",
    "pass_env",
    "timeout",
    "kill_after",
    "start_timeout",
];

/// Variables that the daemon sets itself, and reads for its own servers.
const OWN_VARIABLES: &str = "ACKONCE_";

/// `None` where something is wrong, which is reported.
pub(super) fn handler(section: &Section<'_>) -> Option<CommandHandler> {
    let mode = section
        .text("mode")
        .then(|text| keys::one_of(&text, &CommandMode::ALL, CommandMode::as_str))
        .or(defaults::COMMAND_MODE);
    let argv = section
        .list("argv", "[\"/usr/local/bin/apply\", \"--fast\"]", |text| {
            check_argument(text)
        })
        .then(|arguments| {
            let arguments = arguments.into_iter().map(|(text, _)| text).collect();
            check_argv(section.reader.folder, arguments)
        })
        .required(
            "add argv = [\"/usr/local/bin/apply\"]: the program's path, then its arguments, one \
             by one",
        );
    let working_directory = section
        .text("working_directory")
        .then(|path| check_folder(section.reader.folder, &path))
        .or(PathBuf::from(defaults::COMMAND_WORKING_DIRECTORY));
    let env = env(section);
    let pass_env = pass_env(section, env.as_deref().unwrap_or_default());
    let timeout = section.duration("timeout", &defaults::COMMAND_TIMEOUT);
    let kill_after = section.duration("kill_after", &defaults::COMMAND_KILL_AFTER);
    let start_timeout = section.duration("start_timeout", &defaults::COMMAND_START_TIMEOUT);
    if mode.is_sound() && mode.value == CommandMode::Once && section.has("start_timeout") {
        section.reader.report(
            start_timeout.span,
            "`start_timeout` belongs to mode = \"stream\"",
            "with mode = \"once\" the start is part of `timeout`: remove it",
        );
    }
    let span = section.span_of("argv");
    let (program, arguments) = argv?.value;
    let (env, pass_env) = (env?, pass_env?);
    let texts = arguments.iter().map(String::len);
    let values = env.iter().map(|(_, value)| value);
    let values = values.chain(pass_env.iter().filter_map(|(_, value)| value.as_ref()));
    let bytes = texts.chain(values.map(|value| value.expose().len())).sum();
    check_size(section, span, bytes);
    Some(CommandHandler {
        mode: mode.value,
        program,
        arguments,
        working_directory: working_directory.value,
        env,
        pass_env,
        timeout: timeout.value,
        kill_after: kill_after.value,
        start_timeout: start_timeout.value,
    })
}

/// What is the same for every message must leave room for what is not: beyond
/// a limit of its own, the system starts nothing at all.
fn check_size(section: &Section<'_>, span: Span, bytes: usize) {
    let most = defaults::COMMAND_TEXT_MAX;
    if bytes > most {
        section.reader.report(
            span,
            format!("`argv`, `env` and `pass_env` have {bytes} bytes together"),
            format!("allowed: up to {most}: put it into a file that the program reads"),
        );
    }
}

fn check_argument(text: &str) -> Result<String, Complaint> {
    if text.contains('\0') {
        return Err(Complaint::new(
            "holds a NUL character",
            "no program can be given one: remove it",
        ));
    }
    Ok(text.to_owned())
}

/// The program's absolute path, and its arguments.
fn check_argv(folder: &Path, argv: Vec<String>) -> Result<(PathBuf, Vec<String>), Complaint> {
    let most = defaults::COMMAND_ARGV_MAX;
    if argv.len() > most {
        return Err(Complaint::new(
            format!("has {} elements", argv.len()),
            format!("allowed: up to {most}"),
        ));
    }
    let mut arguments = argv.into_iter();
    let Some(program) = arguments.next() else {
        return Err(Complaint::new(
            "is empty",
            "the first element is the program's path",
        ));
    };
    let program = check_program(folder, &program)?;
    Ok((program, arguments.collect()))
}

fn check_program(folder: &Path, program: &str) -> Result<PathBuf, Complaint> {
    if !program.contains('/') {
        let shape = match program.contains(char::is_whitespace) {
            true => "each argument is an element of its own, since no shell takes the line apart",
            false => "`command -v NAME` says where it is; ./NAME is beside the configuration file",
        };
        return Err(Complaint::new(
            format!("names {} without its path", shown(program)),
            format!("programs are not searched for in PATH: write the whole path; {shape}"),
        ));
    }
    let path = files::resolve(folder, program);
    let shown_path = path.display();
    let metadata = std::fs::metadata(&path).map_err(|cause| {
        Complaint::new(
            format!("names a program that is not to be had, {shown_path}: {cause}"),
            "relative paths start at the configuration file's folder; arguments are elements of \
             their own",
        )
    })?;
    if !metadata.is_file() {
        return Err(Complaint::new(
            format!("names {shown_path}, which is not a file"),
            "the first element is the program itself",
        ));
    }
    // Root may execute what has any such bit, and noexec file systems refuse
    // what has all of them.
    let marked = metadata.permissions().mode() & 0o111 != 0;
    if !marked || access(&path, AccessFlags::X_OK).is_err() {
        return Err(Complaint::new(
            format!("names {shown_path}, which this user may not execute"),
            "chmod +x it, or name the interpreter first: [\"/bin/sh\", \"script\"]",
        ));
    }
    Ok(path)
}

fn check_folder(folder: &Path, path: &str) -> Result<PathBuf, Complaint> {
    let path = files::resolve(folder, path);
    let problem = match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => return Ok(path),
        Ok(_) => "not a folder".to_owned(),
        Err(cause) => cause.to_string(),
    };
    Err(Complaint::new(
        format!("cannot be {}: {problem}", path.display()),
        "name a folder; relative paths start at the configuration file's",
    ))
}

fn env(section: &Section<'_>) -> Option<Vec<(String, Secret)>> {
    let entries = section.entries("env");
    if !is_few(section, "env", entries.len()) {
        return None;
    }
    let read = entries.into_iter().map(|(name, name_span, value)| {
        let span = value.span().into();
        section.reader.source.hide(span);
        if let Err(complaint) = check_name(name) {
            report(section, "env", name_span, complaint);
            return None;
        }
        let DeValue::String(text) = value.get_ref() else {
            let hint = format!("put it in quotes: env = {{ {name} = \"…\" }}");
            section.wrong_type(name, span, "a string", value.get_ref(), &hint);
            return None;
        };
        let text = section.expand(name, text, span)?;
        match check_value(&text) {
            Ok(()) => Some((name.to_owned(), Secret::new(text))),
            Err(complaint) => {
                report(section, name, span, complaint);
                None
            }
        }
    });
    // To the end, so that every wrong one is reported.
    let read: Vec<_> = read.collect();
    read.into_iter().collect()
}

/// Each with its value, where it is set.
fn pass_env(
    section: &Section<'_>,
    env: &[(String, Secret)],
) -> Option<Vec<(String, Option<Secret>)>> {
    let names = section
        .list("pass_env", "[\"LANG\", \"TZ\"]", |name| {
            check_name(name).map(|()| name.to_owned())
        })
        .or(Vec::new());
    if !is_few(section, "pass_env", names.value.len()) {
        return None;
    }
    let mut passed: BTreeMap<String, Option<Secret>> = BTreeMap::new();
    for (name, span) in names.value {
        if passed.contains_key(&name) || env.iter().any(|(own, _)| *own == name) {
            let message = format!("`pass_env` has {}, which is given already", shown(&name));
            let hint = "a variable has one value: name it once, in `env` or in `pass_env`";
            section.reader.report(span, message, hint);
            continue;
        }
        let value = section.reader.variable(&name);
        if let Some(Err(complaint)) = value.as_deref().map(check_value) {
            report(section, &name, span, complaint);
        }
        passed.insert(name, value.map(Secret::new));
    }
    Some(passed.into_iter().collect())
}

fn report(section: &Section<'_>, key: &str, span: Span, complaint: Complaint) {
    let message = format!("`{key}` {}", complaint.message);
    section.reader.report(span, message, complaint.hint);
}

fn is_few(section: &Section<'_>, key: &'static str, count: usize) -> bool {
    let most = defaults::COMMAND_VARIABLES_MAX;
    if count <= most {
        return true;
    }
    let message = format!("`{key}` has too many variables: {count}");
    let hint = format!("allowed: up to {most}: put them into a file");
    section.reader.report(section.span_of(key), message, hint);
    false
}

fn check_name(name: &str) -> Result<(), Complaint> {
    let mut bytes = name.bytes();
    let is_name = name.len() <= defaults::COMMAND_VARIABLE_NAME_MAX
        && bytes
            .next()
            .is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if !is_name {
        let most = defaults::COMMAND_VARIABLE_NAME_MAX;
        return Err(Complaint::new(
            format!("names no variable: {}", shown(name)),
            format!("allowed: 1 to {most} letters, digits and _, no digit first"),
        ));
    }
    if name.starts_with(OWN_VARIABLES) {
        return Err(Complaint::new(
            format!("cannot hold {}", shown(name)),
            "the daemon sets variables that begin with ACKONCE_ itself, and keeps its servers' \
             URLs in some: choose another name",
        ));
    }
    Ok(())
}

fn check_value(value: &str) -> Result<(), Complaint> {
    if value.contains('\0') {
        return Err(Complaint::new(
            "holds a NUL character",
            "no variable can hold one: remove it",
        ));
    }
    Ok(())
}

/// A code of [`crate::failure::EXITS`], as the configuration may name it.
pub(super) fn check_code(code: &str) -> Result<String, Complaint> {
    let words = ["signal", "timeout", "start", "broken"];
    let number = |text: &str, most: u16| {
        let number = text.parse::<u16>().ok()?;
        let plain = number.to_string() == text;
        (plain && (1..=most).contains(&number)).then_some(())
    };
    let of_signal = code.strip_prefix("signal ");
    let known = words.contains(&code)
        || number(code, 255).is_some()
        || of_signal.and_then(|text| number(text, 64)).is_some();
    if known {
        return Ok(code.to_owned());
    }
    Err(Complaint::new(
        format!("has no exit status: {}", shown(code)),
        "write an exit status from \"1\" to \"255\", \"signal\" or one such as \"signal 9\", \
         \"timeout\", \"start\" or \"broken\"",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_that_a_program_can_fail_with() {
        for code in [
            "1",
            "65",
            "255",
            "signal",
            "signal 9",
            "signal 64",
            "timeout",
            "start",
            "broken",
        ] {
            assert_eq!(check_code(code).as_deref(), Ok(code));
        }
        for code in [
            "",
            "0",
            "256",
            "-1",
            "+1",
            "01",
            "6 5",
            "Signal",
            "signal 0",
            "signal 65",
            "signal  9",
            "SIGKILL",
            "23505",
            "exit 1",
        ] {
            assert!(check_code(code).is_err(), "{code}");
        }
    }

    #[test]
    fn names_that_are_the_daemons_or_nobodys_are_refused() {
        for name in [
            "",
            "1A",
            "A-B",
            "A=B",
            "A\nB",
            "Ä",
            "ACKONCE_",
            "ACKONCE_POSTGRES_URL",
        ] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for name in ["A", "_", "LC_ALL", "ACKONCE", "a1"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
    }
}
