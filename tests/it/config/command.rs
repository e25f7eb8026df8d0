//! `[consumer.handler]` with `type = "command"`.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use ackonce::config::checked::{CommandHandler, CommandMode, Handler};
use ackonce::config::{self, ConfigError, defaults, to_toml};
use ackonce::failure::{Class, Fit};
use tempfile::TempDir;

use super::{SMALLEST, line_and_column, no_env, parse, shipped_path};

/// [`SMALLEST`] with a command that has `lines`; they begin at line 21.
fn with(lines: &str) -> String {
    let text = SMALLEST.replace(
        "type = \"sql\"\nsql = \"SELECT 1\"\n",
        &format!("type = \"command\"\n{lines}\n"),
    );
    assert_ne!(text, SMALLEST);
    text
}

fn command(text: &str) -> CommandHandler {
    command_of(parse(text))
}

fn command_of(config: Result<config::Config, ConfigError>) -> CommandHandler {
    let config = config.unwrap_or_else(|error| panic!("{error}"));
    match config.consumers.into_iter().next().expect("one").handler {
        Handler::Command(handler) => handler,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_command_needs_its_program_and_nothing_else() {
    let handler = command(&with("argv = [\"/bin/sh\"]"));
    assert_eq!(handler.mode, CommandMode::Once);
    assert_eq!(handler.program, std::path::Path::new("/bin/sh"));
    assert_eq!(handler.arguments, [""; 0]);
    assert_eq!(handler.working_directory, std::path::Path::new("/"));
    assert_eq!(handler.env, []);
    assert_eq!(handler.pass_env, []);
    assert_eq!(handler.timeout, defaults::COMMAND_TIMEOUT.default);
    assert_eq!(handler.kill_after, defaults::COMMAND_KILL_AFTER.default);
    assert_eq!(
        handler.start_timeout,
        defaults::COMMAND_START_TIMEOUT.default
    );
}

#[test]
fn a_command_takes_the_values_it_documents_and_prints_them() {
    let text = with(
        "mode = \"stream\"\nargv = [\"/bin/sh\", \"-c\", \"echo $${HOME} ${X}\", \"\", \"a\\nb\"]\n\
         working_directory = \"/tmp\"\nenv = { B = \"${X}\", A = \"$${Y}\\n\\\"\" }\n\
         pass_env = [\"X\", \"UNSET\"]\ntimeout = \"1h\"\nkill_after = \"0ms\"\nstart_timeout = \"10m\"",
    );
    let env = |name: &str| (name == "X").then(|| "hunter2".to_owned());
    let config = config::parse(&text, shipped_path(), &env);
    let config = config.unwrap_or_else(|error| panic!("{error}"));
    let handler = command_of(Ok(config.clone()));
    assert_eq!(handler.mode, CommandMode::Stream);
    assert_eq!(
        handler.arguments,
        ["-c", "echo ${HOME} hunter2", "", "a\nb"]
    );
    let exposed: Vec<(&str, &str)> = handler
        .env
        .iter()
        .map(|(name, value)| (name.as_str(), value.expose()))
        .collect();
    assert_eq!(exposed, [("A", "${Y}\n\""), ("B", "hunter2")]);
    let passed: Vec<(&str, Option<&str>)> = handler
        .pass_env
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_ref().map(|value| value.expose())))
        .collect();
    assert_eq!(passed, [("UNSET", None), ("X", Some("hunter2"))]);
    assert_eq!(handler.timeout, Duration::from_secs(3_600));
    assert_eq!(handler.kill_after, Duration::ZERO);
    assert_eq!(handler.start_timeout, Duration::from_secs(600));

    let printed = to_toml(&config, true);
    let again = config::parse(&printed, "/nowhere/a.toml".as_ref(), &env);
    assert_eq!(again.unwrap_or_else(|e| panic!("{printed}\n{e}")), config);
    let printed = to_toml(&config, false);
    let hidden = "env = { \"A\" = \"<redacted>\", \"B\" = \"<redacted>\" }\n";
    assert!(printed.contains(hidden), "{printed}");
}

#[test]
fn a_relative_program_is_beside_the_configuration_file() {
    let folder = TempDir::new().unwrap();
    let origin = folder.path().join("ackonce.toml");
    let program = folder.path().join("bin/apply");
    std::fs::create_dir(folder.path().join("bin")).unwrap();
    std::fs::write(&program, "#!/bin/sh\n").unwrap();
    let text = with("argv = [\"bin/apply\"]\nworking_directory = \"bin\"");
    let refused = config::parse(&text, &origin, &no_env).unwrap_err();
    assert!(refused.to_string().contains("may not execute"), "{refused}");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let handler = command_of(config::parse(&text, &origin, &no_env));
    assert_eq!(handler.program, program);
    assert_eq!(handler.working_directory, folder.path().join("bin"));
}

#[test]
fn a_mistake_about_a_command_is_named_with_its_place_and_a_hint() {
    let many = format!("argv = [\"/bin/sh\"{}]", ", \"x\"".repeat(256));
    let long = format!("argv = [\"/bin/sh\", \"{}\"]", "x".repeat(65_537));
    let names: Vec<String> = (0..257).map(|n| format!("\"A{n}\"")).collect();
    let passed = format!("argv = [\"/bin/sh\"]\npass_env = [{}]", names.join(", "));
    let mut wrong = String::new();
    for (lines, at, message, hint) in [
        (
            "",
            (19, 1),
            "missing key `argv` in [consumer.handler]",
            "the program's path",
        ),
        ("argv = []", (21, 8), "`argv` is empty", "first element"),
        (
            "argv = \"/bin/sh -c x\"",
            (21, 8),
            "must be a list of strings, found a string",
            "argv = [",
        ),
        (
            "argv = [\"sh\"]",
            (21, 8),
            "names `sh` without its path",
            "not searched for in PATH",
        ),
        (
            "argv = [\"sh -c x\"]",
            (21, 8),
            "names `sh -c x` without",
            "no shell takes the line apart",
        ),
        (
            "argv = [\"/bin/sh -c\"]",
            (21, 8),
            "/bin/sh -c: No such file",
            "elements of their own",
        ),
        (
            "argv = [\"/no/such\"]",
            (21, 8),
            "/no/such: No such file",
            "configuration file's folder",
        ),
        (
            "argv = [\"/no/\\u001b[2J\"]",
            (21, 8),
            "/no/\\u{1b}[2J: No such file",
            "configuration file's folder",
        ),
        (
            "argv = [\"/bin\"]",
            (21, 8),
            "which is not a file",
            "program itself",
        ),
        (
            "argv = [\"/etc/passwd\"]",
            (21, 8),
            "which this user may not execute",
            "chmod +x",
        ),
        (
            "argv = [\"/bin/sh\", 1]",
            (21, 20),
            "must be a list of strings, found an integer",
            "argv = [",
        ),
        (
            "argv = [\"/bin/sh\", \"a\\u0000\"]",
            (21, 20),
            "holds a NUL character",
            "remove it",
        ),
        (many.as_str(), (21, 8), "has 257 elements", "up to 256"),
        (
            long.as_str(),
            (21, 8),
            "have 65537 bytes together",
            "put it into a file",
        ),
        (
            "argv = [\"/bin/sh\"]\nmode = \"twice\"",
            (22, 8),
            "`mode` cannot be `twice`",
            "allowed: once, stream",
        ),
        (
            "argv = [\"/bin/sh\"]\nmode = \"streem\"",
            (22, 8),
            "`mode` cannot be `streem`",
            "did you mean `stream`?",
        ),
        (
            "argv = [\"/bin/sh\"]\nstart_timeout = \"1s\"",
            (22, 17),
            "belongs to mode = \"stream\"",
            "remove it",
        ),
        (
            "argv = [\"/bin/sh\"]\nworking_directory = \"/no/such\"",
            (22, 21),
            "cannot be /no/such: No such file",
            "name a folder",
        ),
        (
            "argv = [\"/bin/sh\"]\nworking_directory = \"/etc/passwd\"",
            (22, 21),
            "cannot be /etc/passwd: not a folder",
            "name a folder",
        ),
        (
            "argv = [\"/bin/sh\"]\nenv = \"A=B\"",
            (22, 7),
            "`env` must be a table",
            "env = { name = \"value\" }",
        ),
        (
            "argv = [\"/bin/sh\"]\nenv = { A = 1 }",
            (22, 13),
            "`A` must be a string",
            "put it in quotes",
        ),
        (
            "argv = [\"/bin/sh\"]\nenv = { A-B = \"\" }",
            (22, 9),
            "names no variable: `A-B`",
            "letters, digits and _",
        ),
        (
            "argv = [\"/bin/sh\"]\nenv = { ACKONCE_X = \"\" }",
            (22, 9),
            "`env` cannot hold `ACKONCE_X`",
            "choose another name",
        ),
        (
            "argv = [\"/bin/sh\"]\nenv = { A = \"\\u0000\" }",
            (22, 13),
            "`A` holds a NUL",
            "remove it",
        ),
        (
            "argv = [\"/bin/sh\"]\nenv = { A = \"${NOPE}\" }",
            (22, 14),
            "needs the environment variable `NOPE`",
            "${NOPE:-default}",
        ),
        (
            "argv = [\"/bin/sh\"]\npass_env = \"A\"",
            (22, 12),
            "must be a list of strings",
            "pass_env = [",
        ),
        (
            "argv = [\"/bin/sh\"]\npass_env = [\"ACKONCE_POSTGRES_URL\"]",
            (22, 13),
            "cannot hold `ACKONCE_POSTGRES_URL`",
            "URLs",
        ),
        (
            "argv = [\"/bin/sh\"]\npass_env = [\"A\", \"A\"]",
            (22, 18),
            "has `A`, which is given already",
            "once",
        ),
        (
            "argv = [\"/bin/sh\"]\npass_env = [\"A\"]\nenv = { A = \"\" }",
            (22, 13),
            "has `A`, which is given already",
            "once",
        ),
        (
            passed.as_str(),
            (22, 12),
            "`pass_env` has too many variables: 257",
            "up to 256",
        ),
        (
            "argv = [\"/bin/sh\"]\ntimeout = \"61m\"",
            (22, 11),
            "`timeout` is out of range",
            "10ms to 1h",
        ),
        (
            "argv = [\"/bin/sh\"]\nsql = \"SELECT 1\"",
            (22, 7),
            "`sql` does not belong to a handler of type `command`",
            "it belongs to type sql",
        ),
        (
            "argv = [\"/bin/sh\"]\nargs = [\"x\"]",
            (22, 1),
            "unknown key `args`",
            "did you mean `argv`?",
        ),
    ] {
        let found = match parse(&with(lines)) {
            Ok(_) => Vec::new(),
            Err(error) => error.problems().to_vec(),
        };
        let fits = found.len() == 1
            && found[0].message.contains(message)
            && found[0].hint.contains(hint)
            && line_and_column(&found[0]) == at;
        if !fits {
            let _ = writeln!(wrong, "{lines:.200} gave {found:#?}");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn the_classes_of_a_command_are_given_by_exit_status() {
    let classes = "failures = { permanent = [\"1\", \"signal 11\"], systemic = [\"12\", \"signal\"], \
                   transient = [\"65\", \"start\", \"timeout\", \"broken\"] }";
    let text = with("argv = [\"/bin/sh\"]").replace(
        "name = \"orders\"",
        &format!("name = \"orders\"\n{classes}"),
    );
    let config = parse(&text).unwrap_or_else(|error| panic!("{error}"));
    let failures = &config.consumers[0].failures;
    assert_eq!(failures.1, Fit::Words);
    for (code, class) in [
        ("1", Some(Class::Permanent)),
        ("12", Some(Class::Systemic)),
        ("126", None),
        ("65", Some(Class::Transient)),
        ("signal 11", Some(Class::Permanent)),
        ("signal 9", Some(Class::Systemic)),
    ] {
        assert_eq!(failures.class_of(code), class, "{code}");
    }
    for (code, hint) in [("23505", "from \"1\" to \"255\""), ("0", "signal 9")] {
        let text = text.replace("\"65\"", &format!("\"{code}\""));
        let found = parse(&text).unwrap_err();
        let problem = &found.problems()[0];
        assert_eq!(
            problem.message,
            format!("`transient` has no exit status: `{code}`")
        );
        assert!(problem.hint.contains(hint), "{problem:?}");
    }
}

#[test]
fn a_value_of_the_environment_never_shows_in_an_error() {
    for lines in [
        "env = { A = \"hunter2\", B = 1 }",
        "env = { A-B = \"hunter2\" }",
        "env = { A = \"${NOPE}hunter2\" }",
        "env = { A = \"hunter2\" \"",
        "env = { A = hunter2 }",
        "[consumer.handler.env]\nA = \"hunter2\"\nB-C = \"hunter2\"",
    ] {
        let error = parse(&with(&format!("argv = [\"/bin/sh\"]\n{lines}"))).unwrap_err();
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}
