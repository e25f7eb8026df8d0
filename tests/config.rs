//! The configuration as its users meet it: what is shipped works, and every
//! mistake is named with its place and the way out.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use ackonce::config::checked::{BindingArgument, Handler, Identity, QueueType};
use ackonce::config::{self, Config, ConfigError, Problem, defaults, keys, to_toml};
use proptest::prelude::*;
use tempfile::TempDir;

const SHIPPED: &str = include_str!("../config.toml");

/// A configuration with nothing but what must be there.
const SMALLEST: &str = r#"[broker]
url = "amqp://h"

[redis]
url = "redis://h"

[postgres]
url = "postgres://h/d"

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
        config.broker.url.expose(),
        "amqp://guest:guest@127.0.0.1:5672/%2f"
    );
    assert_eq!(config.broker.ca_file, None);
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
    assert_eq!(consumer.claim.lease, defaults::LEASE.default);
    assert_eq!(consumer.claim.renew_every, defaults::RENEW_EVERY.default);
    assert_eq!(consumer.claim.done_ttl, defaults::DONE_TTL.default);
    assert_eq!(
        consumer.claim.recheck_every,
        defaults::RECHECK_EVERY.default
    );
    let topology = &consumer.topology;
    assert_eq!(topology.queue, consumer.name);
    assert_eq!(topology.queue_type, defaults::QUEUE_TYPE);
    assert_eq!(
        topology.delivery_limit,
        Some(defaults::DELIVERY_LIMIT.default)
    );
    assert_eq!(topology.dead_letter_exchange, "orders.dlx");
    assert_eq!(topology.dead_letter_queue, "orders.dead");
    let Handler::Sql(handler) = &consumer.handler;
    assert!(handler.text.contains("INSERT INTO orders"));
    assert!(handler.origin.ends_with("sql/examples/orders.sql"));
}

#[test]
fn leaving_everything_out_is_the_same_as_the_shipped_values() {
    let shipped = parse(SHIPPED).unwrap_or_else(|error| panic!("{error}"));
    let mut smallest = parse(SMALLEST).unwrap_or_else(|error| panic!("{error}"));
    smallest.broker.url = shipped.broker.url.clone();
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
[consumer.topology]
queue = "quoted \" ' $${{"
queue_type = "classic"
binding = [
  {{ exchange = "amq.headers", exchange_type = "headers", arguments = {{ x-match = "any", "a b" = 0x10, c = true, d = "$${{" }} }},
  {{ exchange = "t", exchange_type = "topic", routing_key = "#" }},
]
"##
    )
    .replace("amqp://h", "amqps://u:p%2f$${A}@h/v")
    .replace("[broker]", &format!("[broker]\nca_file = '{}'", ca_file.display()));
    let off = SMALLEST.replace("[redis]", "[redis]\nenabled = false");
    for text in [SHIPPED, SMALLEST, &full, &off] {
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
    let config = parse(&SMALLEST.replace("amqp://h", "amqp://u:hunter2@h")).unwrap();
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
fn variables_come_from_the_environment_everywhere() {
    let text = below(
        "[consumer.topology]",
        "[[consumer.topology.binding]]\nexchange = \"${X}\"\nexchange_type = \"${T:-headers}\"\n\
         arguments = { a = \"${X}\" }",
    )
    .replace("amqp://h", "amqp://${X}:${Y}@h")
    .replace("[daemon]", "[daemon]\nshutdown_timeout = \"${Y}s\"");
    let env = |name: &str| match name {
        "X" => Some("x".to_owned()),
        "Y" => Some("7".to_owned()),
        _ => None,
    };
    let config = config::parse(&text, shipped_path(), &env).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(config.broker.url.expose(), "amqp://x:7@h");
    assert_eq!(config.daemon.shutdown_timeout, Duration::from_secs(7));
    let binding = &config.consumers[0].topology.bindings[0];
    assert_eq!(binding.exchange, "x");
    assert_eq!(binding.arguments[0].1, BindingArgument::Text("x".into()));
}

#[test]
fn a_url_can_come_from_a_file_beside_the_configuration() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ackonce.toml");
    let text = SMALLEST.replace("url = \"amqp://h\"", "url_file = \"${DIR:-secrets}/amqp\"");
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

    std::fs::write(&secret, "amqp://u:hunter2@h/v\r\n").unwrap();
    assert_eq!(load().unwrap().broker.url.expose(), "amqp://u:hunter2@h/v");
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
    let Handler::Sql(handler) = &config.consumers[0].handler;
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

/// One mistake below one header of [`SMALLEST`].
struct Mistake {
    header: &'static str,
    lines: &'static str,
    at: (usize, usize),
    message: &'static str,
    hint: &'static str,
}

macro_rules! mistakes {
    ($($header:literal + $lines:literal => $line:literal : $column:literal $message:literal / $hint:literal)*) => {
        [$(Mistake { header: $header, lines: $lines, at: ($line, $column), message: $message, hint: $hint }),*]
    };
}

fn check_each(mistakes: &[Mistake]) {
    let mut wrong = String::new();
    for mistake in mistakes {
        let found = problems(&below(mistake.header, mistake.lines));
        let fits = |problem: &Problem| {
            problem.message.contains(mistake.message)
                && problem.hint.contains(mistake.hint)
                && line_and_column(problem) == mistake.at
        };
        if found.len() != 1 || !fits(&found[0]) {
            let _ = writeln!(wrong, "{:?} gave {found:#?}", mistake.lines);
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

#[test]
fn a_mistake_in_a_servers_section_is_named_with_its_place_and_a_hint() {
    check_each(&mistakes! {
        "[broker]" + "hartbeat = \"10s\"" => 2:1 "unknown key `hartbeat` in [broker]" / "did you mean `heartbeat`?"
        "[broker]" + "prefetch = 1" => 2:1 "unknown key `prefetch`" / "belongs to [[consumer]]"
        "[broker]" + "zzz = 1" => 2:1 "unknown key `zzz`" / "[broker] has: url, url_file"
        "[daemon]" + "[posgres]" => 11:2 "unknown section `posgres` at the top level" / "did you mean `postgres`?"
        "[broker]" + "heartbeat = 10" => 2:13 "`heartbeat` has no unit: 10" / "add a unit: heartbeat = \"10s\""
        "[broker]" + "heartbeat = \"10\"" => 2:13 "`heartbeat` has no unit: `10`" / "add a unit"
        "[broker]" + "heartbeat = true" => 2:13 "`heartbeat` must be a duration in quotes, found a boolean" / "heartbeat = \"10s\""
        "[broker]" + "heartbeat = \"16s\"" => 2:13 "`heartbeat` is out of range: 16s" / "allowed: 5s to 15s"
        "[broker]" + "heartbeat = \"5s500ms\"" => 2:13 "`heartbeat` must be whole seconds" / "\"10s\""
        "[broker]" + "connect_timeout = \"0s\"" => 2:19 "`connect_timeout` is out of range: 0ms" / "100ms to 5m"
        "[broker]" + "connect_timeout = \"-1s\"" => 2:19 "`connect_timeout` is negative" / "10s"
        "[broker]" + "connect_timeout = \"99999999999999999999s\"" => 2:19 "is too large a duration" / "10s"
        "[broker]" + "connect_timeout = \"${T}\"" => 2:20 "needs the environment variable `T`" / "${T:-default}"
        "[broker]" + "connect_timeout = \"1${T:-s\"" => 2:21 "has a `${` without its `}`" / "$${"
        "[broker]" + "connect_timeout = \"${T T}\"" => 2:20 "does not hold a variable's name" / "${NAME}"
        "[broker]" + "url_file = \"x\"" => 2:12 "both `url` and `url_file` in [broker]" / "keep one"
        "[broker]" + "ca_file = \"none.pem\"" => 2:11 "`ca_file` cannot be read from" / "folder"
        "[broker]" + "ca_file = \"config.toml\"" => 2:11 "`ca_file` holds no certificate" / "PEM"
        "[redis]" + "enabled = \"yes\"" => 5:11 "`enabled` must be true or false, found a string" / "without quotes"
        "[redis]" + "key_prefix = \"a b\"" => 5:14 "`key_prefix` cannot begin a Redis key" / "1 to 64"
        "[redis]" + "key_prefix = \"\"" => 5:14 "`key_prefix` cannot begin a Redis key" / "1 to 64"
        "[redis]" + "timeout = 0.5" => 5:11 "found a number with a fraction" / "timeout = \"500ms\""
        "[postgres]" + "auto_migrate = 1" => 8:16 "`auto_migrate` must be true or false, found an integer" / "auto_migrate = true"
        "[postgres]" + "idle_in_transaction_timeout = \"14s\"" => 8:31 "is shorter than `statement_timeout` (15s)" / "at least"
        "[postgres]" + "statement_timeout = \"25s\"" => 8:21 "is shorter than `statement_timeout` (25s)" / "at least"
        "[daemon]" + "reconnect_min = \"20s\"" => 11:17 "`reconnect_min` (20s) is longer than `reconnect_max` (10s)" / "longest"
        "[daemon]" + "reconnect_max = \"20ms\"" => 11:17 "is longer than `reconnect_max` (20ms)" / "longest"
        "[daemon]" + "shutdown_timeout = 2026-01-01" => 11:20 "found a date" / "\"25s\""
    });
}

#[test]
fn a_mistake_in_a_consumer_is_named_with_its_place_and_a_hint() {
    check_each(&mistakes! {
        "[[consumer]]" + "prefech = 100" => 13:1 "unknown key `prefech` in [[consumer]]" / "did you mean `prefetch`?"
        "[[consumer]]" + "workers = 0" => 13:11 "`workers` is out of range: 0" / "allowed: 1 to 256"
        "[[consumer]]" + "workers = -1" => 13:11 "`workers` is out of range: -1" / "allowed: 1 to 256"
        "[[consumer]]" + "workers = \"4\"" => 13:11 "`workers` must be an integer, found a string" / "workers = 4"
        "[[consumer]]" + "workers = [4]" => 13:11 "`workers` must be an integer, found an array" / "1 to 256"
        "[[consumer]]" + "prefetch = 65536" => 13:12 "`prefetch` is out of range: 65536" / "1 to 65535"
        "[[consumer]]" + "prefetch = 255" => 13:12 "`prefetch` (255) is below `batch_max` (256)" / "raise `prefetch`"
        "[[consumer]]" + "batch_max = 2000" => 13:13 "`prefetch` (1024) is below `batch_max` (2000)" / "lower `batch_max`"
        "[[consumer]]" + "batch_max = 99999999999999999999" => 13:13 "`batch_max` is out of range" / "1 to 4096"
        "[[consumer]]" + "max_body = \"32mb\"" => 13:12 "`max_body` is not a size: `32mb`" / "\"32MiB\""
        "[[consumer]]" + "max_body = 0" => 13:12 "`max_body` is out of range: 0B" / "1B to 512MiB"
        "[[consumer]]" + "max_body = -1" => 13:12 "`max_body` is out of range: -1" / "32MiB"
        "[[consumer]]" + "max_body = false" => 13:12 "`max_body` must be a size, found a boolean" / "32MiB"
        "[[consumer]]" + "identity = \"mesage-id\"" => 13:12 "`identity` cannot be `mesage-id`" / "did you mean `message-id`?"
        "[[consumer]]" + "identity = \"header:\"" => 13:12 "`identity` names no usable header" / "1 to 128 bytes"
        "[[consumer]]" + "identity = \"json:id\"" => 13:12 "does not begin with `/`" / "json:/order/id"
        "[[consumer]]" + "identity = \"json:/a~b\"" => 13:12 "lone `~`" / "~0"
        "[[consumer]]" + "identity = 1" => 13:12 "`identity` must be a string, found an integer" / "in quotes"
        "[consumer.claim]" + "renew_every = \"16s\"" => 16:15 "`renew_every` (16s) is more than half of `lease` (30s)" / "a lease shorter than its renewal"
        "[consumer.claim]" + "lease = \"15s\"\nrenew_every = \"1s\"" => 16:9 "`lease` (15s) is not longer than `statement_timeout` in [postgres] (15s)" / "outlive"
        "[consumer.claim]" + "done_ttl = \"29s\"" => 16:12 "`done_ttl` (29s) is shorter than `lease` (30s)" / "at least"
        "[consumer.topology]" + "queue = \"\"" => 18:9 "`queue` is empty" / "1 to 255 bytes"
        "[consumer.topology]" + "queue = \"amq.q\"" => 18:9 "`queue` cannot be `amq.q`" / "the broker's own"
        "[consumer.topology]" + "queue = \"a\\u0007\"" => 18:9 "`queue` has a control character" / "1 to 255 bytes"
        "[consumer.topology]" + "queue_type = \"quorom\"" => 18:14 "`queue_type` cannot be `quorom`" / "did you mean `quorum`?"
        "[consumer.topology]" + "queue_type = \"stream\"" => 18:14 "`queue_type` cannot be `stream`" / "allowed: quorum, classic"
        "[consumer.topology]" + "queue_type = \"classic\"\ndelivery_limit = 5" => 19:18 "`delivery_limit` is given for a classic queue" / "quorum"
        "[consumer.topology]" + "dead_letter_queue = \"orders\"" => 18:21 "`dead_letter_queue` is the work queue `orders`" / "another name"
        "[consumer.topology]" + "dead_letter_exchange = \"amq.fanout\"" => 18:24 "`dead_letter_exchange` cannot be `amq.fanout`" / "the broker's own"
        "[consumer.topology]" + "binding = 1" => 18:11 "`binding` must be a list of sections, found an integer" / "[[consumer.topology.binding]]"
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange = \"e\"" => 18:1 "missing key `exchange_type`" / "topic"
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange_type = \"fanout\"" => 18:1 "missing key `exchange`" / "feeds the queue"
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange = \"e\"\nexchange_type = \"topic\"" => 18:1 "missing key `routing_key`" / "\"#\""
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange = \"e\"\nexchange_type = \"topics\"" => 20:17 "`exchange_type` cannot be `topics`" / "did you mean `topic`?"
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange = \"amq.topic\"\nexchange_type = \"fanout\"" => 20:17 "not that of `amq.topic`" / "\"topic\""
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange = \"amq.x\"\nexchange_type = \"fanout\"" => 19:12 "`exchange` cannot be `amq.x`" / "amq.direct"
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange = \"orders.dlx\"\nexchange_type = \"fanout\"" => 19:12 "own dead-letter exchange" / "for ever"
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange = \"e\"\nexchange_type = \"fanout\"\narguments = { a = 1 }" => 21:13 "only a headers exchange" / "leave them out"
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange = \"e\"\nexchange_type = \"headers\"\narguments = { a = 1.5 }" => 21:19 "`a` must be a string, an integer or a boolean" / "header"
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange = \"e\"\nexchange_type = \"headers\"\narguments = { x-match = \"some\" }" => 21:25 "`x-match`" / "all, any"
        "[consumer.topology]" + "[[consumer.topology.binding]]\nexchange = \"e\"\nexchange_type = \"headers\"\narguments = { a = \"${N}\" }" => 21:20 "needs the environment variable `N`" / "set N"
        "[consumer.handler]" + "file = \"a.sql\"" => 22:7 "both `file` and `sql`" / "keep one"
    });
}

#[test]
fn what_is_missing_is_named_where_it_belongs() {
    for (gone, message, hint, at) in [
        (
            "url = \"amqp://h\"\n",
            "missing key `url` in [broker]",
            "url_file",
            (1, 1),
        ),
        (
            "[redis]\nurl = \"redis://h\"\n",
            "missing section [redis]",
            "enabled = false",
            (19, 17),
        ),
        (
            "name = \"orders\"\n",
            "missing key `name` in [[consumer]]",
            "add name",
            (12, 1),
        ),
        (
            "type = \"sql\"\n",
            "missing key `type` in [consumer.handler]",
            "type = \"sql\"",
            (19, 1),
        ),
        (
            "sql = \"SELECT 1\"\n",
            "missing key `file` in [consumer.handler]",
            "`sql`",
            (19, 1),
        ),
        (
            "[consumer.handler]\ntype = \"sql\"\nsql = \"SELECT 1\"\n",
            "missing section [consumer.handler]",
            "type = \"sql\"",
            (12, 1),
        ),
    ] {
        let found = problems(&SMALLEST.replace(gone, ""));
        assert_eq!(found.len(), 1, "{gone}: {found:#?}");
        assert!(found[0].message.starts_with(message), "{found:#?}");
        assert!(found[0].hint.contains(hint), "{found:#?}");
        assert_eq!(line_and_column(&found[0]), at, "{found:#?}");
    }
    let nothing = problems("");
    assert_eq!(nothing.len(), 4, "{nothing:#?}");
    assert!(
        nothing
            .iter()
            .all(|problem| line_and_column(problem) == (1, 1))
    );

    let single = problems(&SMALLEST.replace("[[consumer]]", "[consumer]"));
    assert!(
        single[0].hint.contains("[[consumer]] with two brackets"),
        "{single:#?}"
    );
    let wrong_type = problems(&SMALLEST.replace("type = \"sql\"", "type = \"http\""));
    assert_eq!(wrong_type[0].message, "`type` cannot be `http`");
    assert_eq!(wrong_type[0].hint, "allowed: sql");
    let empty = problems(&SMALLEST.replace("SELECT 1", " "));
    assert_eq!(empty[0].message, "`sql` holds no statement");
    let name = problems(&SMALLEST.replace("name = \"orders\"", "name = \"or ders\""));
    assert_eq!(name[0].message, "`name` cannot be `or ders`");
    let no_tls = problems(
        &below("[broker]", "ca_file = \"ca.pem\"").replace("ca.pem", &{
            let folder = TempDir::new().unwrap().keep();
            std::fs::write(folder.join("ca.pem"), "-----BEGIN CERTIFICATE-----").unwrap();
            folder.join("ca.pem").display().to_string()
        }),
    );
    assert!(
        no_tls[0].message.contains("does not ask for TLS"),
        "{no_tls:#?}"
    );
}

#[test]
fn consumers_that_cannot_share_a_broker_are_refused() {
    let second = |name: &str, topology: &str| {
        format!(
            "{SMALLEST}\n[[consumer]]\nname = \"{name}\"\nhandler = {{ type = \"sql\", sql = \
             \"SELECT 1\" }}\n[consumer.topology]\n{topology}"
        )
    };
    for (name, topology, message) in [
        (
            "orders",
            "queue = \"b\"",
            "`name` `orders` is taken by line 13",
        ),
        (
            "b",
            "queue = \"orders\"\ndead_letter_exchange = \"x\"",
            "queue `orders` is already consumed by",
        ),
        (
            "b",
            "queue = \"orders.dead\"",
            "queue `orders.dead` is both a work queue and",
        ),
        (
            "b",
            "dead_letter_queue = \"orders\"",
            "queue `orders` is both a work queue and",
        ),
        (
            "b",
            "queue_type = \"classic\"\ndead_letter_queue = \"orders.dead\"",
            "queue `orders.dead` is a dead-letter queue of another queue_type",
        ),
        (
            "b",
            "dead_letter_exchange = \"orders.dlx\"",
            "exchange `orders.dlx` feeds another",
        ),
        (
            "b",
            "binding = [{ exchange = \"orders.dlx\", exchange_type = \"headers\" }]",
            "exchange `orders.dlx` is headers here and fanout",
        ),
    ] {
        let found = problems(&second(name, topology));
        assert_eq!(found.len(), 1, "{topology}: {found:#?}");
        assert!(found[0].message.starts_with(message), "{found:#?}");
    }
    for topology in [
        "dead_letter_queue = \"orders.dead\"",
        "dead_letter_queue = \"orders.dead\"\ndead_letter_exchange = \"orders.dlx\"",
    ] {
        parse(&second("b", topology)).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_name_that_leaves_no_room_for_what_is_derived_from_it_is_refused() {
    let found = problems(&below(
        "[consumer.topology]",
        &format!("queue = \"{}\"", "q".repeat(252)),
    ));
    assert_eq!(found.len(), 2, "{found:#?}");
    assert!(found[0].message.contains("is too long"), "{found:#?}");
    assert!(
        found[0].hint.contains("set `dead_letter_exchange`"),
        "{found:#?}"
    );
    let found = problems(&below(
        "[consumer.topology]",
        &format!("queue = \"{}\"", "q".repeat(256)),
    ));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].message, "`queue` is too long: 256 bytes");
}

#[test]
fn ten_mistakes_are_ten_problems_in_the_order_of_the_file() {
    let text = r#"[broker]
url = "http://h"
heartbeat = 10
colour = "red"

[redis]
url = "redis://h"
timeout = "soon"

[postgres]
url = "postgres://h/d"
auto_migrate = "yes"

[demon]

[[consumer]]
name = ""
workers = 0
identity = "${NOPE}"

[consumer.handler]
type = "sql"
sql = "SELECT 1"
file = "orders.sql"
"#;
    let error = parse(text).unwrap_err();
    let lines: Vec<usize> = error
        .problems()
        .iter()
        .map(|p| line_and_column(p).0)
        .collect();
    assert_eq!(lines, [2, 3, 4, 8, 12, 14, 17, 18, 19, 23], "{error}");
    let printed = error.to_string();
    assert_eq!(printed.matches("error: ").count(), 10, "{printed}");
    assert_eq!(printed.matches("= hint: ").count(), 10, "{printed}");
    assert!(
        printed.ends_with("10 problems in ".to_owned().as_str())
            || printed.contains("\n10 problems in ")
    );
}

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
fn a_key_nested_without_end_is_refused_before_it_overflows_the_stack() {
    let found = problems(&format!("{}x = 1", "a.".repeat(100_000)));
    assert!(found[0].message.contains("dots"), "{found:#?}");

    let deepest_line = format!("{}x", "a.".repeat(100));
    let tables = format!("{deepest_line} = {{\n").repeat(78);
    let deepest = format!("[{deepest_line}]\n{tables}a = 1\n{}", "}\n".repeat(78));
    assert!(problems(&deepest)[0].message.contains("unknown"));
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
