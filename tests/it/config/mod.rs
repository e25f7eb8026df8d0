//! The configuration as its users meet it: what is shipped works, and every
//! mistake is named with its place and the way out.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use ackonce::config::checked::{BindingArgument, DeadLetters, Handler, Identity, QueueType, Tls};
use ackonce::config::{self, Config, ConfigError, Problem, defaults, keys, to_toml};
use ackonce::failure::{Class, Overrides};
use tempfile::TempDir;

mod command;
mod display;
mod http;
mod mistakes;
mod properties;

const SHIPPED: &str = include_str!("../../../config.toml");
const FAILURES_PAGE: &str = include_str!("../../../docs/failures.md");

/// A configuration with nothing but what must be there.
const SMALLEST: &str = r#"[broker]
url = "amqp://localhost"

[redis]
url = "redis://localhost"

[postgres]
url = "postgres://localhost/d"

[daemon]

[[consumer]]
name = "orders"

[consumer.claim]

[consumer.topology]

[consumer.handler]
type = "sql"
sql = "SELECT 1"
"#;

fn shipped_path() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/config.toml"))
}

fn no_env(_: &str) -> Option<String> {
    None
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    config::parse(text, shipped_path(), &no_env)
}

fn problems(text: &str) -> Vec<Problem> {
    match parse(text) {
        Ok(_) => panic!("accepted:\n{text}"),
        Err(error) => error.problems().to_vec(),
    }
}

/// [`SMALLEST`] with `lines` below `header`.
fn below(header: &str, lines: &str) -> String {
    let header = format!("{header}\n");
    assert_eq!(SMALLEST.matches(&header).count(), 1, "{header}");
    SMALLEST.replace(&header, &format!("{header}{lines}\n"))
}

fn line_and_column(problem: &Problem) -> (usize, usize) {
    let place = problem.place.as_ref().expect("a place in the file");
    (place.line, place.column)
}

#[test]
fn the_shipped_configuration_loads_and_holds_every_default() {
    let config = parse(SHIPPED).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        config.broker.urls[0].expose(),
        "amqp://guest:guest@127.0.0.1:5672/%2f"
    );
    assert_eq!(config.broker.tls, Tls::default());
    assert_eq!(config.broker.allow_plaintext, defaults::ALLOW_PLAINTEXT);
    assert_eq!(config.broker.heartbeat, defaults::HEARTBEAT.default);
    assert_eq!(
        config.broker.connect_timeout,
        defaults::BROKER_CONNECT_TIMEOUT.default
    );
    assert_eq!(config.redis.is_some(), defaults::REDIS_ENABLED);
    let redis = config.redis.as_ref().unwrap();
    assert_eq!(redis.url.expose(), "redis://127.0.0.1:6379/0");
    assert_eq!(redis.key_prefix, defaults::REDIS_KEY_PREFIX);
    assert_eq!(
        redis.connect_timeout,
        defaults::REDIS_CONNECT_TIMEOUT.default
    );
    assert_eq!(redis.timeout, defaults::REDIS_TIMEOUT.default);
    let postgres = &config.postgres;
    assert_eq!(
        postgres.url.expose(),
        "postgres://ackonce@127.0.0.1:5432/ackonce"
    );
    assert_eq!(
        postgres.connect_timeout,
        defaults::POSTGRES_CONNECT_TIMEOUT.default
    );
    assert_eq!(
        postgres.statement_timeout,
        defaults::STATEMENT_TIMEOUT.default
    );
    assert_eq!(postgres.lock_timeout, defaults::LOCK_TIMEOUT.default);
    let idle = defaults::IDLE_IN_TRANSACTION_TIMEOUT.default;
    assert_eq!(postgres.idle_in_transaction_timeout, idle);
    assert_eq!(postgres.auto_migrate, defaults::AUTO_MIGRATE);
    assert_eq!(config.ledger.retention, defaults::RETENTION.default);
    assert_eq!(config.ledger.prune_every, defaults::PRUNE_EVERY.default);
    assert_eq!(config.ledger.prune_batch, defaults::PRUNE_BATCH.default);
    assert_eq!(
        config.daemon.shutdown_timeout,
        defaults::SHUTDOWN_TIMEOUT.default
    );
    assert_eq!(config.daemon.reconnect_min, defaults::RECONNECT_MIN.default);
    assert_eq!(config.daemon.reconnect_max, defaults::RECONNECT_MAX.default);

    let [consumer] = config.consumers.as_slice() else {
        panic!("one consumer, not {}", config.consumers.len());
    };
    assert_eq!(consumer.name, "orders");
    assert_eq!(consumer.workers, defaults::WORKERS.default);
    assert_eq!(consumer.prefetch, defaults::PREFETCH.default);
    assert_eq!(consumer.batch_max, defaults::BATCH_MAX.default);
    assert_eq!(consumer.max_body, defaults::MAX_BODY.default);
    assert_eq!(consumer.identity, defaults::IDENTITY);
    assert_eq!(consumer.confirm_duplicates, defaults::CONFIRM_DUPLICATES);
    assert_eq!(consumer.max_deaths, defaults::MAX_DEATHS.default);
    let retry = &consumer.retry;
    assert_eq!(retry.max_attempts, defaults::MAX_ATTEMPTS.default);
    assert_eq!(retry.backoff, defaults::RETRY_BACKOFF);
    assert_eq!(retry.jitter_percent, defaults::RETRY_JITTER.default);
    assert_eq!(retry.breaker, defaults::BREAKER.default);
    assert_eq!(consumer.failures, Overrides::default());
    assert_eq!(consumer.claim.lease, defaults::LEASE.default);
    assert_eq!(consumer.claim.renew_every, defaults::RENEW_EVERY.default);
    assert_eq!(consumer.claim.done_ttl, defaults::DONE_TTL.default);
    assert_eq!(
        consumer.claim.recheck_every,
        defaults::RECHECK_EVERY.default
    );
    let topology = &consumer.topology;
    assert_eq!(topology.mode, defaults::TOPOLOGY_MODE);
    assert_eq!(
        topology.dead_letters,
        defaults::dead_letters(defaults::TOPOLOGY_MODE, defaults::QUEUE_TYPE)
    );
    assert_eq!(topology.queue, consumer.name);
    assert_eq!(topology.queue_type, defaults::QUEUE_TYPE);
    assert_eq!(
        topology.delivery_limit,
        Some(defaults::DELIVERY_LIMIT.default)
    );
    assert_eq!(topology.dead_letter_exchange, "orders.dlx");
    assert_eq!(topology.dead_letter_queue, "orders.dead");
    let Handler::Sql(handler) = &consumer.handler else {
        panic!("a handler of type sql");
    };
    assert!(handler.text.contains("INSERT INTO orders"));
    assert!(handler.origin.ends_with("sql/examples/orders.sql"));
}

#[test]
fn leaving_everything_out_is_the_same_as_the_shipped_values() {
    let shipped = parse(SHIPPED).unwrap_or_else(|error| panic!("{error}"));
    let mut smallest = parse(SMALLEST).unwrap_or_else(|error| panic!("{error}"));
    smallest.broker.urls = shipped.broker.urls.clone();
    smallest.redis.as_mut().unwrap().url = shipped.redis.as_ref().unwrap().url.clone();
    smallest.postgres.url = shipped.postgres.url.clone();
    smallest.consumers[0].handler = shipped.consumers[0].handler.clone();
    smallest.consumers[0].topology.bindings = shipped.consumers[0].topology.bindings.clone();
    assert_eq!(smallest, shipped);
}

#[test]
fn the_shipped_configuration_mentions_every_key_in_its_section() {
    for section in &keys::ALL[1..] {
        let start = SHIPPED
            .lines()
            .position(|line| line.starts_with(section.title))
            .unwrap_or_else(|| panic!("{} is missing", section.title));
        let body: Vec<&str> = SHIPPED
            .lines()
            .skip(start + 1)
            .take_while(|line| !line.starts_with('['))
            .collect();
        for key in section.keys {
            let is_subsection = keys::ALL.iter().any(|other| {
                other
                    .title
                    .trim_matches(['[', ']'])
                    .ends_with(&format!(".{key}"))
            });
            let mentioned = body.iter().any(|line| {
                let line = line.trim_start_matches("# ");
                line.split_once(" = ").is_some_and(|(name, _)| name == *key)
            });
            assert!(mentioned || is_subsection, "{key} in {}", section.title);
        }
    }
}

#[test]
fn what_is_printed_reads_back_the_same() {
    let folder = TempDir::new().unwrap();
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, "-----BEGIN CERTIFICATE-----\n").unwrap();
    let full = format!(
        r##"{SMALLEST}
[[consumer]]
name = "b"
workers = 256
max_body = 100_001
identity = "json:/a~1b"
confirm_duplicates = true
claim = {{ lease = "1m30s", done_ttl = "90s" }}
handler = {{ type = "sql", sql = """
SELECT '$${{x}}', "a\b\\ \t é \u0007" -- $$ DO $$
""" }}
[consumer.retry]
max_attempts = 1000
backoff = ["10ms", "1h1m1s1ms", "10ms"]
jitter_percent = 0
breaker = 0
[consumer.failures]
systemic = ["P0", "22P02"]
transient = ["22", "P0001"]
[consumer.topology]
mode = "verify"
dead_letters = "reject"
queue = "quoted \" ' $${{"
queue_type = "classic"
binding = [
  {{ exchange = "amq.headers", exchange_type = "headers", arguments = {{ x-match = "any", "a b" = 0x10, c = true, d = "$${{" }} }},
  {{ exchange = "t", exchange_type = "topic", routing_key = "#" }},
]
"##
    )
    .replace("amqp://localhost", "amqps://u:p%2f$${A}@h/v")
    .replace("[daemon]", "[ledger]\nretention = \"90d\"\nprune_batch = 7\n[daemon]")
    .replace("[broker]", &format!("[broker]\nca_file = '{}'", ca_file.display()));
    let off = SMALLEST.replace("[redis]", "[redis]\nenabled = false");
    let theirs = below("[consumer.topology]", "mode = \"none\"");
    for text in [SHIPPED, SMALLEST, &full, &off, &theirs] {
        let config = parse(text).unwrap_or_else(|error| panic!("{error}"));
        let printed = to_toml(&config, true);
        let elsewhere = Path::new("/nowhere/at/all.toml");
        let again = config::parse(&printed, elsewhere, &no_env)
            .unwrap_or_else(|error| panic!("{printed}\n{error}"));
        assert_eq!(again, config, "{printed}");
    }
}

#[test]
fn secrets_are_printed_only_when_asked_for() {
    let config =
        parse(&SMALLEST.replace("amqp://localhost", "amqp://u:hunter2@localhost")).unwrap();
    let printed = to_toml(&config, false);
    assert_eq!(
        printed.matches("url = \"<redacted>\"").count(),
        3,
        "{printed}"
    );
    assert!(!printed.contains("hunter2"), "{printed}");
    assert!(!format!("{config:?}").contains("hunter2"));
}

#[test]
fn every_section_takes_the_values_it_documents() {
    let text = below(
        "[consumer.topology]",
        "queue = \"q\"\nqueue_type = \"classic\"\n[[consumer.topology.binding]]\nexchange = \"h\"\n\
         exchange_type = \"headers\"\narguments = { x-match = \"all\", tier = 2, vip = true }",
    )
    .replace(
        "name = \"orders\"",
        "name = \"orders\"\nidentity = \"header:x-id\"",
    );
    let config = parse(&text).unwrap_or_else(|error| panic!("{error}"));
    let consumer = &config.consumers[0];
    assert_eq!(consumer.identity, Identity::Header("x-id".into()));
    assert_eq!(consumer.topology.queue_type, QueueType::Classic);
    assert_eq!(consumer.topology.delivery_limit, None);
    assert_eq!(consumer.topology.dead_letter_queue, "q.dead");
    assert_eq!(
        consumer.topology.bindings[0].arguments,
        [
            ("tier".to_owned(), BindingArgument::Integer(2)),
            ("vip".to_owned(), BindingArgument::Boolean(true)),
            ("x-match".to_owned(), BindingArgument::Text("all".into())),
        ]
    );
}

#[test]
fn retries_and_failure_classes_take_the_values_they_document() {
    let text = below(
        "[[consumer]]",
        "max_deaths = 7\nretry = { max_attempts = 4, backoff = [\"${B:-1s}\", \"90s\", \"1000ms\", \"2h\"], \
         jitter_percent = 0, breaker = 0 }\nfailures = { transient = [\"22\"], permanent = \
         [\"22P02\", \"23505\"], systemic = [\"P0001\"] }",
    );
    let config = parse(&text).unwrap_or_else(|error| panic!("{error}"));
    let consumer = &config.consumers[0];
    assert_eq!(consumer.max_deaths, 7);
    assert_eq!(consumer.retry.max_attempts, 4);
    assert_eq!(consumer.retry.backoff.len(), 4);
    assert_eq!(consumer.retry.jitter_percent, 0);
    assert_eq!(consumer.retry.breaker, 0);
    let queues: Vec<String> = consumer
        .retry
        .delays()
        .into_iter()
        .map(|delay| consumer.topology.retry_queue(delay))
        .collect();
    // Equal delays share a queue; after the fourth attempt comes none.
    assert_eq!(queues, ["orders.retry.1s", "orders.retry.1m30s"]);
    assert_eq!(consumer.retry.longest_wait(), Duration::from_secs(92));
    for (code, class) in [
        ("22P02", Some(Class::Permanent)),
        ("22001", Some(Class::Transient)),
        ("23505", Some(Class::Permanent)),
        ("23503", None),
        ("P0001", Some(Class::Systemic)),
    ] {
        assert_eq!(consumer.failures.class_of(code), class, "{code}");
    }
}

#[test]
fn the_last_delay_goes_on_for_all_attempts_that_follow() {
    let text = below(
        "[[consumer]]",
        "retry = { max_attempts = 1000, backoff = [\"1s\", \"10s\"] }",
    );
    let config = parse(&text).unwrap_or_else(|error| panic!("{error}"));
    let retry = &config.consumers[0].retry;
    assert_eq!(retry.longest_wait(), Duration::from_secs(1 + 998 * 10));
    let once = parse(&below("[[consumer]]", "retry = { max_attempts = 1 }"));
    let once = once.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(once.consumers[0].retry.delays(), []);
    assert_eq!(once.consumers[0].retry.longest_wait(), Duration::ZERO);
}

#[test]
fn how_dead_letters_leave_follows_from_what_can_be_proved() {
    for (lines, dead_letters, delivery_limit) in [
        ("", DeadLetters::Reject, Some(1_000)),
        ("mode = \"verify\"", DeadLetters::Reject, Some(1_000)),
        ("queue_type = \"classic\"", DeadLetters::Publish, None),
        ("mode = \"none\"", DeadLetters::Publish, None),
        (
            "mode = \"none\"\nqueue_type = \"classic\"\ndead_letters = \"publish\"",
            DeadLetters::Publish,
            None,
        ),
        (
            "queue_type = \"classic\"\ndead_letters = \"reject\"",
            DeadLetters::Reject,
            None,
        ),
        (
            "dead_letters = \"publish\"",
            DeadLetters::Publish,
            Some(1_000),
        ),
    ] {
        let config = parse(&below("[consumer.topology]", lines));
        let config = config.unwrap_or_else(|error| panic!("{error}"));
        let topology = &config.consumers[0].topology;
        assert_eq!(topology.dead_letters, dead_letters, "{lines}");
        assert_eq!(topology.delivery_limit, delivery_limit, "{lines}");
        let printed = to_toml(&config, false);
        let line = format!("dead_letters = \"{}\"\n", dead_letters.as_str());
        assert!(printed.contains(&line), "{printed}");
    }
}

#[test]
fn the_examples_on_the_page_about_failures_can_be_typed() {
    let mut examples = 0;
    for example in FAILURES_PAGE.split("```toml\n").skip(1) {
        let (example, _) = example.split_once("```").expect("the end of the block");
        let config = parse(&below("[consumer.claim]", example));
        config.unwrap_or_else(|error| panic!("{error}"));
        examples += 1;
    }
    assert_eq!(examples, 2);
}

#[test]
fn redis_may_be_told_to_remember_longer_than_the_ledger() {
    let text = below("[daemon]", "[ledger]\nretention = \"1h\"");
    let config = parse(&text).unwrap_or_else(|error| panic!("{error}"));
    assert!(config.consumers[0].claim.done_ttl > config.ledger.retention);
}

#[test]
fn variables_come_from_the_environment_everywhere() {
    let text = below(
        "[consumer.topology]",
        "[[consumer.topology.binding]]\nexchange = \"${X}\"\nexchange_type = \"${T:-headers}\"\n\
         arguments = { a = \"${X}\" }",
    )
    .replace("amqp://localhost", "amqp://${X}:${Y}@localhost")
    .replace("[daemon]", "[daemon]\nshutdown_timeout = \"${Y}s\"");
    let env = |name: &str| match name {
        "X" => Some("x".to_owned()),
        "Y" => Some("7".to_owned()),
        _ => None,
    };
    let config = config::parse(&text, shipped_path(), &env).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(config.broker.urls[0].expose(), "amqp://x:7@localhost");
    assert_eq!(config.daemon.shutdown_timeout, Duration::from_secs(7));
    let binding = &config.consumers[0].topology.bindings[0];
    assert_eq!(binding.exchange, "x");
    assert_eq!(binding.arguments[0].1, BindingArgument::Text("x".into()));
}

#[test]
fn a_url_can_come_from_a_file_beside_the_configuration() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ackonce.toml");
    let text = SMALLEST.replace(
        "url = \"amqp://localhost\"",
        "url_file = \"${DIR:-secrets}/amqp\"",
    );
    std::fs::create_dir(folder.path().join("secrets")).unwrap();
    let secret = folder.path().join("secrets/amqp");
    std::fs::write(&path, text).unwrap();
    let load = || config::load(&path);

    let missing = load().unwrap_err();
    assert_eq!(missing.problems().len(), 1, "{missing}");
    assert_eq!(line_and_column(&missing.problems()[0]), (2, 12));
    let resolved = secret.display().to_string();
    assert!(
        missing.problems()[0].message.contains(&resolved),
        "{missing}"
    );

    std::fs::write(&secret, "\n").unwrap();
    assert!(
        load()
            .unwrap_err()
            .to_string()
            .contains("names an empty file")
    );
    std::fs::write(&secret, b"amqp://\xff").unwrap();
    assert!(
        load()
            .unwrap_err()
            .to_string()
            .contains("not UTF-8 at byte 8")
    );
    std::fs::write(&secret, "http://u:hunter2@h\n").unwrap();
    let wrong = load().unwrap_err().to_string();
    assert!(
        wrong.contains("`url_file` does not begin with amqp://"),
        "{wrong}"
    );
    assert!(!wrong.contains("hunter2"), "{wrong}");

    std::fs::write(&secret, "amqp://u:hunter2@localhost/v\r\n").unwrap();
    assert_eq!(
        load().unwrap().broker.urls[0].expose(),
        "amqp://u:hunter2@localhost/v"
    );
}

#[test]
fn a_broker_can_have_several_urls_each_checked_where_it_stands() {
    let with = |list: &str| {
        let env = |name: &str| (name == "PASS").then(|| "hunter2".to_owned());
        let text = SMALLEST.replace("url = \"amqp://localhost\"", &format!("url = {list}"));
        config::parse(&text, shipped_path(), &env)
    };
    let config = with("[\"amqps://u:${PASS}@one\", \"amqps://two/v\"]").unwrap();
    let urls: Vec<_> = config.broker.urls.iter().map(|url| url.expose()).collect();
    assert_eq!(urls, ["amqps://u:hunter2@one", "amqps://two/v"]);
    assert_eq!(parse(&config::to_toml(&config, true)).unwrap(), config);
    let shown = config::to_toml(&config, false);
    assert!(
        shown.contains("url = [\"<redacted>\", \"<redacted>\"]"),
        "{shown}"
    );
    let many: Vec<_> = (0..17).map(|n| format!("\"amqps://h{n}\"")).collect();
    for (list, column, message) in [
        ("[]", 7, "`url` is an empty list"),
        (
            &format!("[{}]", many.join(",")),
            7,
            "`url` names 17 servers",
        ),
        (
            "[\"amqps://h\", \"amqps://h\"]",
            7,
            "names one server twice, the second time as number 2",
        ),
        (
            "[\"amqps://h\", \"http://h\"]",
            21,
            "`url` does not begin with amqp://",
        ),
        (
            "[\"amqps://h\", 5]",
            21,
            "`url` must be a list of strings, found an integer",
        ),
        ("5", 7, "`url` must be a string"),
    ] {
        let error = with(list).unwrap_err();
        let found = &error.problems()[0];
        assert_eq!(line_and_column(found), (2, column), "{list}: {error}");
        assert!(found.message.contains(message), "{list}: {error}");
    }
}

#[test]
fn a_file_with_several_urls_has_one_a_line() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ackonce.toml");
    let text = SMALLEST.replace("url = \"amqp://localhost\"", "url_file = \"amqp\"");
    std::fs::write(&path, text).unwrap();
    let urls = folder.path().join("amqp");
    std::fs::write(&urls, "amqps://one\r\n\namqps://two/v\n").unwrap();
    let config = config::load(&path).unwrap_or_else(|error| panic!("{error}"));
    let found: Vec<_> = config.broker.urls.iter().map(|url| url.expose()).collect();
    assert_eq!(found, ["amqps://one", "amqps://two/v"]);
    std::fs::write(&urls, "amqps://one\nu:hunter2@two\n").unwrap();
    let error = config::load(&path).unwrap_err().to_string();
    assert!(
        error.contains("`url_file` does not begin with amqp://"),
        "{error}"
    );
    assert!(!error.contains("hunter2"), "{error}");
    std::fs::write(&urls, "\n \n").unwrap();
    let error = config::load(&path).unwrap_err().to_string();
    assert!(error.contains("`url_file` is an empty list"), "{error}");
}

#[test]
fn a_handler_file_is_read_from_the_configurations_folder() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ackonce.toml");
    std::fs::write(
        &path,
        SMALLEST.replace("sql = \"SELECT 1\"", "file = \"a.sql\""),
    )
    .unwrap();
    let sql = folder.path().join("a.sql");
    let fails_with = |reason: &str| {
        let error = config::load(&path).unwrap_err();
        let [problem] = error.problems() else {
            panic!("{error}");
        };
        assert_eq!(line_and_column(problem), (21, 8));
        assert!(
            problem.message.contains(&sql.display().to_string()),
            "{problem:?}"
        );
        assert!(problem.message.contains(reason), "{problem:?}");
    };
    fails_with("No such file");
    std::fs::write(&sql, " \n").unwrap();
    fails_with("holds no statement");
    std::fs::write(&sql, "SELECT '\0'").unwrap();
    fails_with("NUL");
    std::fs::write(&sql, b"SELECT '\xe9'").unwrap();
    fails_with("not UTF-8 at byte 9");
    std::fs::remove_file(&sql).unwrap();
    std::fs::create_dir(&sql).unwrap();
    fails_with("directory");
    std::fs::remove_dir(&sql).unwrap();
    std::fs::write(&sql, "SELECT '${X}'").unwrap();
    let config = config::load(&path).unwrap();
    let Handler::Sql(handler) = &config.consumers[0].handler else {
        panic!("a handler of type sql");
    };
    assert_eq!(handler.text, "SELECT '${X}'");
}

#[test]
fn a_file_that_cannot_be_read_is_a_problem_too() {
    let folder = TempDir::new().unwrap();
    let missing = config::load(&folder.path().join("none.toml")).unwrap_err();
    assert_eq!(missing.problems().len(), 1);
    assert!(missing.to_string().contains("none.toml"), "{missing}");
    assert!(missing.to_string().contains("--config"), "{missing}");

    let latin = folder.path().join("latin.toml");
    std::fs::write(&latin, b"[broker]\n# caf\xe9").unwrap();
    let latin = config::load(&latin).unwrap_err();
    assert_eq!(line_and_column(&latin.problems()[0]), (2, 6), "{latin}");

    let long = folder.path().join("long.toml");
    std::fs::write(&long, "#".repeat(defaults::CONFIG_FILE_MAX + 1)).unwrap();
    assert!(
        config::load(&long)
            .unwrap_err()
            .to_string()
            .contains("longer than")
    );
}
