//! `[consumer.handler]` with `type = "http"`.

use std::path::Path;

use ackonce::config::checked::{Handler, HttpHandler, HttpMethod, KeyFormat};
use ackonce::config::{self, Config, Problem, defaults, to_toml};
use ackonce::failure::Class;
use tempfile::TempDir;

use super::{SMALLEST, no_env, parse, problems, shipped_path};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn with(lines: &str) -> String {
    SMALLEST.replace(
        "type = \"sql\"\nsql = \"SELECT 1\"\n",
        &format!("type = \"http\"\n{lines}\n"),
    )
}

fn http(config: &Config) -> &HttpHandler {
    let Handler::Http(handler) = &config.consumers[0].handler else {
        panic!("another handler");
    };
    handler
}

fn only_problem(lines: &str) -> Problem {
    let mut found = problems(&with(lines));
    assert_eq!(found.len(), 1, "{lines}: {found:#?}");
    found.remove(0)
}

#[test]
fn a_url_is_all_that_must_be_there() {
    let config = parse(&with("url = 'https://shop.example/orders?x=1'")).unwrap();
    let handler = http(&config);
    assert_eq!(handler.url.expose(), "https://shop.example/orders?x=1");
    assert_eq!(handler.method, HttpMethod::Post);
    assert_eq!(handler.content_type, None);
    assert!(handler.headers.is_empty() && handler.forward_headers.is_empty());
    assert_eq!(handler.key_header, defaults::KEY_HEADER);
    assert_eq!(handler.key_format, KeyFormat::Plain);
    assert!(handler.signing_secrets.is_empty());
    assert_eq!(
        handler.connect_timeout,
        defaults::HTTP_CONNECT_TIMEOUT.default
    );
    assert_eq!(handler.timeout, defaults::HTTP_TIMEOUT.default);
    let missing = only_problem("");
    assert_eq!(missing.message, "missing key `url` in [consumer.handler]");
}

#[test]
fn every_key_is_read_and_printed_and_secrets_are_not_shown() {
    let folder = TempDir::new().unwrap();
    let file = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    file(
        "headers",
        "# ours\n\nAuthorization: Bearer hunter2\r\nX-B:b\n",
    );
    file(
        "secrets",
        &format!("{SECRET}\n# the old one\n{}\n", &SECRET[6..]),
    );
    file("ca.pem", "-----BEGIN CERTIFICATE-----\n");
    file("url", "https://h/?token=hunter2\n");
    let text = with(
        "url_file = 'url'\nca_file = 'ca.pem'\nmethod = 'PATCH'\ncontent_type = 'text/plain'\n\
         headers = { X-A = 'hunter2 $${x}' }\nheaders_file = 'headers'\n\
         forward_headers = ['x-tenant', 'Y']\nkey_header = 'X-Request-Id'\nkey_format = 'quoted'\n\
         signing_secrets_file = 'secrets'\nconnect_timeout = '10ms'\ntimeout = '1h'",
    );
    let origin = folder.path().join("ackonce.toml");
    let config = config::parse(&text, &origin, &no_env).unwrap_or_else(|e| panic!("{e}"));
    let handler = http(&config);
    let headers: Vec<(&str, &str)> = handler
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.expose()))
        .collect();
    assert_eq!(
        headers,
        [
            ("Authorization", "Bearer hunter2"),
            ("X-A", "hunter2 ${x}"),
            ("X-B", "b")
        ]
    );
    assert_eq!(handler.signing_secrets.len(), 2);
    assert_eq!(handler.method, HttpMethod::Patch);
    assert_eq!(handler.key_format, KeyFormat::Quoted);

    let printed = to_toml(&config, true);
    let again = config::parse(&printed, Path::new("/elsewhere/x"), &no_env)
        .unwrap_or_else(|e| panic!("{printed}\n{e}"));
    assert_eq!(again, config, "{printed}");
    let printed = to_toml(&config, false);
    let shown = format!("{printed}{config:?}");
    for secret in ["hunter2", "MfKQ9r8", "token"] {
        assert!(!shown.contains(secret), "{shown}");
    }
    assert!(
        printed.contains("\"Authorization\" = \"<redacted>\""),
        "{printed}"
    );
}

#[test]
fn a_mistake_is_named_and_a_secret_is_not() {
    let url = "url = 'http://h/'\n";
    let many: Vec<String> = (0..17).map(|n| format!("'h{n}'")).collect();
    for (lines, message, hint) in [
        (
            "url = 'ftp://h'",
            "`url` does not begin with http:// or https://",
            "https://HOST",
        ),
        (
            "url = 'http://u:hunter2@h/'",
            "`url` has a user name or a password",
            "headers_file",
        ),
        (
            "url = 'http://h/#hunter2'",
            "`url` has a part after `#`",
            "%23",
        ),
        ("url = 'http://h/ hunter2'", "`url` has a space", ""),
        (
            "url = 'http://h/'\nurl_file = 'x'",
            "both `url` and `url_file`",
            "keep one",
        ),
        (
            "url = 'http://h/'\nmethod = 'GET'",
            "`method` cannot be `GET`",
            "POST, PUT and PATCH",
        ),
        (
            "url = 'http://h/'\nmethod = 'post'",
            "`method` cannot be `post`",
            "in capitals",
        ),
        (
            "url = 'http://h/'\nca_file = 'config.toml'",
            "`ca_file` holds no certificate",
            "PEM",
        ),
        (
            "url = 'http://h/'\ncontent_type = \"a\\nb\"",
            "`content_type` cannot be",
            "visible",
        ),
        (
            "url = 'http://h/'\nheaders = { Host = 'hunter2' }",
            "that the handler sets itself",
            "leave",
        ),
        (
            "url = 'http://h/'\nheaders = { 'a b' = 'hunter2' }",
            "no name of an HTTP header",
            "allowed",
        ),
        (
            "url = 'http://h/'\nheaders = { A = \"hunter2\\r\\nB: c\" }",
            "has a value for `A`",
            "visible",
        ),
        (
            "url = 'http://h/'\nheaders = { A = 'b', a = 'c' }",
            "there already: `a`",
            "capitals",
        ),
        (
            "url = 'http://h/'\nheaders = { A = 5 }",
            "must be texts",
            "headers = ",
        ),
        (
            "url = 'http://h/'\nheaders = 'hunter2'",
            "must be a table",
            "headers = ",
        ),
        (
            "url = 'http://h/'\nheaders_file = 'none'",
            "`headers_file` cannot be read",
            "",
        ),
        (
            "url = 'http://h/'\nheaders_file = 'config.toml'",
            "whose line ",
            "",
        ),
        (
            "url = 'http://h/'\nforward_headers = ['traceparent']",
            "sets itself",
            "",
        ),
        (
            "url = 'http://h/'\nforward_headers = ['idempotency-key']",
            "there already",
            "",
        ),
        (
            "url = 'http://h/'\nkey_header = 'x y'",
            "`key_header` has no name",
            "",
        ),
        (
            "url = 'http://h/'\nkey_format = 'quotd'",
            "`key_format` cannot be",
            "`quoted`",
        ),
        (
            "url = 'http://h/'\nsigning_secrets = ['hunter2']",
            "has no signing secret",
            "openssl rand",
        ),
        (
            "url = 'http://h/'\nsigning_secrets = []\nsigning_secrets_file = 'x'",
            "both",
            "keep one",
        ),
        (
            "url = 'http://h/'\ntimeout = '1s'",
            "`connect_timeout` (5s) is longer",
            "raise it",
        ),
        (
            "url = 'http://h/'\nfile = 'x.sql'",
            "`file` does not belong",
            "type sql",
        ),
    ] {
        let problem = only_problem(lines);
        assert!(problem.message.contains(message), "{lines}: {problem:#?}");
        assert!(problem.hint.contains(hint), "{lines}: {problem:#?}");
        let shown = format!("{problem:?}");
        assert!(!shown.contains("hunter2"), "{lines}: {shown}");
    }
    let ca_file = shipped_path().display();
    let both = problems(&with(&format!("{url}ca_file = '{ca_file}'")));
    assert!(
        both[0].message.contains("holds no certificate"),
        "{both:#?}"
    );
    let many = only_problem(&format!("{url}forward_headers = [{}]", many.join(", ")));
    assert!(many.message.contains("too many names: 17"), "{many:#?}");
}

#[test]
fn failures_of_a_handler_are_named_by_its_own_codes() {
    let failures = "[consumer.failures]\ntransient = ['409', 'tls']\npermanent = ['5']\n";
    let config = parse(&with(&format!("url = 'http://h/'\n{failures}"))).unwrap();
    for (code, class) in [
        ("409", Some(Class::Transient)),
        ("tls", Some(Class::Transient)),
        ("503", Some(Class::Permanent)),
        ("404", None),
    ] {
        assert_eq!(config.consumers[0].failures.class_of(code), class, "{code}");
    }
    let theirs = only_problem("url = 'http://h/'\n[consumer.failures]\ntransient = ['23505']\n");
    assert!(
        theirs.message.contains("no HTTP failure: `23505`"),
        "{theirs:#?}"
    );
    let ours = problems(&format!(
        "{SMALLEST}[consumer.failures]\ntransient = ['409']\n"
    ));
    assert!(ours[0].message.contains("no SQLSTATE"), "{ours:#?}");
}
