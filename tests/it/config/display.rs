//! How problems look, what of a line is shown, and what is not TOML at all.

use std::path::Path;

use ackonce::config;

use super::{SMALLEST, below, line_and_column, no_env, parse, problems};

#[test]
fn a_problem_is_shown_with_its_line_and_a_caret() {
    let error = config::parse(
        &below("[[consumer]]", "\tprefech = 100 # é"),
        Path::new("etc/ackonce.toml"),
        &no_env,
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "error: unknown key `prefech` in [[consumer]]
  --> etc/ackonce.toml:13:2
   |
13 |  prefech = 100 # é
   |  ^^^^^^^
   = hint: did you mean `prefetch`?

1 problem in etc/ackonce.toml"
    );
}

#[test]
fn a_long_line_is_cut_around_the_caret() {
    let line = format!("arr = [{} 1.5]", "\"ä\", ".repeat(200));
    let found = problems(&below("[daemon]", &line));
    let place = found[0].place.as_ref().unwrap();
    assert!(place.excerpt.chars().count() <= 122, "{place:?}");
    assert_eq!(place.excerpt.chars().nth(place.caret_start), Some('a'));
}

#[test]
fn what_is_not_toml_is_named_with_its_place() {
    for (text, at, message) in [
        ("[broker\nurl = 1", (1, 8), "not TOML: unclosed table"),
        ("[broker]\nurl amqp", (2, 5), "not TOML: "),
        ("[redis]\ntimeout = 500ms", (2, 11), "not TOML: "),
        (
            "[redis]\nenabled = true\nenabled = true",
            (3, 1),
            "not TOML: duplicate key",
        ),
    ] {
        let found = problems(text);
        assert_eq!(found.len(), 1, "{text}: {found:#?}");
        assert!(found[0].message.starts_with(message), "{found:#?}");
        assert_eq!(line_and_column(&found[0]), at, "{found:#?}");
    }
    let two = problems("a = = 1\nb = 2\nc = \"x\n");
    assert_eq!(two.len(), 2, "{two:#?}");
}

#[test]
fn tables_nested_without_end_do_not_overflow_the_stack() {
    let found = problems(&format!("{}x = 1", "a.".repeat(100_000)));
    assert!(found[0].message.starts_with("not TOML"), "{found:#?}");
    let found = problems(&format!("x = {}", "[".repeat(100_000)));
    assert!(found[0].message.starts_with("not TOML"), "{found:#?}");

    let key = format!("{}x", "a.".repeat(70));
    let tables = format!("{key} = {{\n").repeat(78);
    let deepest = format!("[{key}]\n{tables}a = 1\n{}", "}\n".repeat(78));
    let found = problems(&deepest);
    assert!(found[0].message.contains("unknown"), "{:?}", found[0]);
}

/// However the line is broken, the secret on it is not shown.
#[test]
fn a_secret_never_shows_in_an_error() {
    for line in [
        "url = \"http://u:hunter2@h\"",
        "url = \"amqp://u:hunter2@h:port\"",
        "url = \"amqp://u:hunter2@h/a/b\"",
        "url = \"amqp://u:1?hunter2@h\"",
        "url = \"amqp://u:${NOPE}hunter2@h\"",
        "url = \"amqp://u:${hunter2@h\"",
        "url = \"amqp://u:${hunter2 }@h\"",
        "url = \"hunter2\"",
        "url = [\"hunter2\"]",
        "url = [\"amqp://h\", \"amqp://u:hunter2@h:port\"]",
        "url = [\"amqp://u:hunter2@h\", \"amqp://u:hunter2@h\"]",
        "url = [\n  \"amqp://u:hunter2@h\",\n  5,\n]",
        "url = [\n  \"amqp://h\",\n  \"u:hunter2@h\" x\n]",
        "url = [\n  u:hunter2@h\n]",
        "url = hunter2",
        "url = amqp://u:hunter2@h",
        "url = \"amqp://u:hunter2@h",
        "url = \"amqp://u:\\qhunter2@h\"",
        "url = \"\"\"\\\n  hunter2\"\"\"",
        "url = \"\"\"\nhunter2",
        "url: \"amqp://u:hunter2@h\"",
        "\"u\\u0072l\" = \"hunter2\"",
        "ulr = \"amqp://u:hunter2@h\"",
        "url2 = \"hunter2\"",
        "password = \"hunter2\"",
        "url_file = \"x\"\nurl = \"hunter2\"",
        "url = \"hunter2\"\nurl = \"hunter2\"",
        "options = { heartbeat = 1, url = \"hunter2\" }",
        "heartbeat = 10 # was amqp://u:hunter2@h",
    ] {
        for section in ["broker", "redis", "postgres"] {
            let text = SMALLEST.replace("url = ", "# ").replace(
                &format!("[{section}]"),
                &format!("[{section}]\n{line}\nheartbeet = 1"),
            );
            let error = parse(&text).unwrap_err();
            let printed = format!("{error}\n{error:?}");
            assert!(!printed.contains("hunter2"), "{line}\n{printed}");
        }
    }
}
