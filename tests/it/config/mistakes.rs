//! Each mistake that can be made, with its place, message and hint.

use std::fmt::Write as _;

use ackonce::config::Problem;
use tempfile::TempDir;

use super::{SMALLEST, below, line_and_column, parse, problems};

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
        "[daemon]" + "reconnect_min = \"20s\"" => 11:17 "`reconnect_min` (20s) is longer than `reconnect_max` (3s)" / "longest"
        "[daemon]" + "reconnect_max = \"20ms\"" => 11:17 "is longer than `reconnect_max` (20ms)" / "longest"
        "[daemon]" + "[ledger]\nretention = \"30s\"" => 12:13 "`retention` is out of range: 30s" / "allowed: 1m to 3650d"
        "[daemon]" + "[ledger]\nretention = \"11m10s\"" => 12:13 "can wait 11m11s for its retries, and `retention` is 11m10s" / "would be applied again: raise `retention`"
        "[daemon]" + "[ledger]\nprune_every = \"99ms\"" => 12:15 "`prune_every` is out of range: 99ms" / "allowed: 100ms to 1d"
        "[daemon]" + "[ledger]\nprune_batch = 0" => 12:15 "`prune_batch` is out of range: 0" / "allowed: 1 to 100000"
        "[daemon]" + "[ledger]\nretain = \"1d\"" => 12:1 "unknown key `retain` in [ledger]" / "[ledger] has: retention"
        "[daemon]" + "[legder]" => 11:2 "unknown section `legder`" / "did you mean `ledger`?"
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
        "[[consumer]]" + "max_deaths = 2" => 13:14 "`max_deaths` is out of range: 2" / "allowed: 3 to 100"
        "[[consumer]]" + "max_attempts = 2" => 13:1 "unknown key `max_attempts` in [[consumer]]" / "belongs to [consumer.retry]"
        "[consumer.claim]" + "renew_every = \"3s\"" => 16:15 "`renew_every` (3s) is more than half of `lease` (5s)" / "a lease shorter than its renewal"
        "[consumer.claim]" + "done_ttl = \"4s\"" => 16:12 "`done_ttl` (4s) is shorter than `lease` (5s)" / "at least"
        "[consumer.topology]" + "queue = \"\"" => 18:9 "`queue` is empty" / "1 to 255 bytes"
        "[consumer.topology]" + "queue = \"amq.q\"" => 18:9 "`queue` cannot be `amq.q`" / "the broker's own"
        "[consumer.topology]" + "queue = \"a\\u0007\"" => 18:9 "`queue` has a control character" / "1 to 255 bytes"
        "[consumer.topology]" + "queue_type = \"quorom\"" => 18:14 "`queue_type` cannot be `quorom`" / "did you mean `quorum`?"
        "[consumer.topology]" + "queue_type = \"stream\"" => 18:14 "`queue_type` cannot be `stream`" / "allowed: quorum, classic"
        "[consumer.topology]" + "mode = \"declared\"" => 18:8 "`mode` cannot be `declared`" / "did you mean `declare`? allowed: declare, verify, none"
        "[consumer.topology]" + "mode = true" => 18:8 "`mode` must be a string, found a boolean" / "mode = \"…\""
        "[consumer.topology]" + "mode = \"none\"\ndelivery_limit = 5" => 19:18 "`delivery_limit` is given, but mode = \"none\"" / "leave it out"
        "[consumer.topology]" + "mode = \"none\"\nbinding = [{ exchange = \"e\", exchange_type = \"fanout\" }]" => 19:11 "bindings are given, but mode = \"none\" makes none" / "leave them out"
        "[consumer.topology]" + "mode = \"none\"\ndead_letters = \"reject\"" => 19:16 "`dead_letters` cannot be `reject` with mode = \"none\"" / "it cannot be proved that a rejected message has somewhere to go"
        "[consumer.topology]" + "dead_letters = \"drop\"" => 18:16 "`dead_letters` cannot be `drop`" / "allowed: reject, publish"
        "[consumer.topology]" + "dead_letter_queue = \"orders.retry.1s\"" => 18:21 "queue `orders.retry.1s` is also where messages wait for their retry: see line" / "choose another name"
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
fn a_mistake_about_failures_is_named_with_its_place_and_a_hint() {
    check_each(&mistakes! {
        "[consumer.claim]" + "[consumer.retry]\nmax_attempts = 0" => 17:16 "`max_attempts` is out of range: 0" / "allowed: 1 to 1000"
        "[consumer.claim]" + "[consumer.retry]\nattempts = 1" => 17:1 "unknown key `attempts` in [consumer.retry]" / "did you mean `max_attempts`?"
        "[consumer.claim]" + "[consumer.retry]\njitter_percent = 101" => 17:18 "`jitter_percent` is out of range: 101" / "allowed: 0 to 100"
        "[consumer.claim]" + "[consumer.retry]\njitter_percent = \"10\"" => 17:18 "`jitter_percent` must be an integer" / "jitter_percent = 10"
        "[consumer.claim]" + "[consumer.retry]\njitter_percent = 256" => 17:18 "`jitter_percent` is out of range: 256" / "allowed: 0 to 100"
        "[consumer.claim]" + "[consumer.retry]\nbreaker = -1" => 17:11 "`breaker` is out of range: -1" / "allowed: 0 to 1000000"
        "[consumer.claim]" + "[consumer.retry]\nbackoff = \"10s\"" => 17:11 "`backoff` must be a list of strings, found a string" / "backoff = [\"1s\", "
        "[consumer.claim]" + "[consumer.retry]\nbackoff = []" => 17:11 "`backoff` is empty" / "max_attempts = 1"
        "[consumer.claim]" + "[consumer.retry]\nbackoff = [\"1s\", 10]" => 17:18 "`backoff` must be a list of strings, found an integer" / "backoff = [\"1s\", "
        "[consumer.claim]" + "[consumer.retry]\nbackoff = [[\"1s\"]]" => 17:12 "`backoff` must be a list of strings, found an array" / "backoff = [\"1s\", "
        "[consumer.claim]" + "[consumer.retry]\nbackoff = [\"1s\", \"10\"]" => 17:18 "`backoff` has no unit: `10`" / "add a unit"
        "[consumer.claim]" + "[consumer.retry]\nbackoff = [\"9ms\"]" => 17:12 "`backoff` is out of range: 9ms" / "allowed: 10ms to 7d"
        "[consumer.claim]" + "[consumer.retry]\nbackoff = [\"8d\"]" => 17:12 "`backoff` is out of range: 8d" / "allowed: 10ms to 7d"
        "[consumer.claim]" + "[consumer.retry]\nbackoff = [\"${B}\"]" => 17:13 "`backoff` needs the environment variable `B`" / "set B"
        "[consumer.claim]" + "[consumer.retry]\nbackoff = [\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\",\"1s\"]" => 17:11 "`backoff` has too many steps: 17" / "allowed: 1 to 16"
        "[consumer.claim]" + "[consumer.retry]\nbackoff = [\"7d\"]\nmax_attempts = 6" => 17:11 "a message can wait 35d for its retries, and `retention` is 30d" / "lower `max_attempts` or `backoff`"
        "[consumer.claim]" + "[consumer.retry]\nbackoff = [\"7d\"]\nmax_attempts = 6\n[ledger]\nretention = \"34d\"" => 17:11 "a message can wait 35d for its retries" / "raise `retention`"
        "[consumer.claim]" + "[consumer.failures]\ntransient = \"23\"" => 17:13 "`transient` must be a list of strings, found a string" / "transient = [\"23505\""
        "[consumer.claim]" + "[consumer.failures]\ntransient = [23]" => 17:14 "`transient` must be a list of strings, found an integer" / "transient = [\"23505\""
        "[consumer.claim]" + "[consumer.failures]\npermanent = [\"p0001\"]" => 17:14 "`permanent` has no SQLSTATE: `p0001`" / "in capitals: `P0001`"
        "[consumer.claim]" + "[consumer.failures]\npermanent = [\"235\"]" => 17:14 "`permanent` has no SQLSTATE: `235`" / "\"23505\""
        "[consumer.claim]" + "[consumer.failures]\npermanent = [\"\"]" => 17:14 "`permanent` has no SQLSTATE: ``" / "the two of a class"
        "[consumer.claim]" + "[consumer.failures]\npermanent = [\"ÄÖ5\"]" => 17:14 "`permanent` has no SQLSTATE: `ÄÖ5`" / "the two of a class"
        "[consumer.claim]" + "[consumer.failures]\nsystemic = [\"23\\u00005\"]" => 17:13 "`systemic` has no SQLSTATE: `23\\05`" / "the two of a class"
        "[consumer.claim]" + "[consumer.failures]\ntransient = [\"23\", \"P0001\"]\nsystemic = [\"P0001\"]" => 18:13 "`systemic` has `P0001`, as has line 17" / "one class"
        "[consumer.claim]" + "[consumer.failures]\ntransient = [\"23\",\n\"23\"]" => 18:1 "`transient` has `23`, as has line 17" / "keep one"
        "[consumer.claim]" + "[consumer.failures]\nfatal = []" => 17:1 "unknown key `fatal` in [consumer.failures]" / "transient, permanent, systemic"
    });
    let codes: Vec<String> = (10_000..10_257).map(|code| format!("\"{code}\"")).collect();
    let found = problems(&below(
        "[consumer.claim]",
        &format!("[consumer.failures]\ntransient = [{}]", codes.join(", ")),
    ));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0].message, "`transient` has too many codes: 257");
}

#[test]
fn every_wrong_item_of_a_list_is_named() {
    let found = problems(&below(
        "[consumer.claim]",
        "[consumer.retry]\nbackoff = [1, \"2\", \"1s\", \"8d\"]",
    ));
    let columns: Vec<usize> = found.iter().map(|p| line_and_column(p).1).collect();
    assert_eq!(columns, [12, 15, 26], "{found:#?}");
}

#[test]
fn what_is_missing_is_named_where_it_belongs() {
    for (gone, message, hint, at) in [
        (
            "url = \"amqp://localhost\"\n",
            "missing key `url` in [broker]",
            "url_file",
            (1, 1),
        ),
        (
            "[redis]\nurl = \"redis://localhost\"\n",
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
    let wrong_type = problems(&SMALLEST.replace("type = \"sql\"", "type = \"ftp\""));
    assert_eq!(wrong_type[0].message, "`type` cannot be `ftp`");
    assert!(wrong_type[0].hint.starts_with("allowed: sql, "));
    let empty = problems(&SMALLEST.replace("SELECT 1", " "));
    assert_eq!(empty[0].message, "`sql` holds no statement");
    let name = problems(&SMALLEST.replace("name = \"orders\"", "name = \"or ders\""));
    assert_eq!(name[0].message, "`name` cannot be `or ders`");
    let folder = TempDir::new().unwrap();
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, "-----BEGIN CERTIFICATE-----").unwrap();
    let no_tls = problems(&below(
        "[broker]",
        &format!("ca_file = '{}'", ca_file.display()),
    ));
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
            "dead_letter_queue = \"orders.dead\"",
            "queue `orders.dead` is already the dead-letter queue of another consumer: see line",
        ),
        (
            "b",
            "dead_letter_queue = \"orders.dead\"\ndead_letter_exchange = \"orders.dlx\"",
            "queue `orders.dead` is already the dead-letter queue of another consumer: see line",
        ),
        (
            "b",
            "mode = \"none\"\nqueue_type = \"classic\"\ndead_letter_queue = \"orders.dead\"",
            "queue `orders.dead` is already the dead-letter queue of another consumer: see line",
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
        (
            "b",
            "queue = \"orders.retry.10m\"",
            "queue `orders.retry.10m` is also where messages wait for their retry: see line",
        ),
        (
            "b",
            "dead_letter_queue = \"orders.retry.10s\"",
            "queue `orders.retry.10s` is also where messages wait for their retry: see line",
        ),
        (
            "b",
            "mode = \"none\"\nqueue = \"orders\"",
            "queue `orders` is already consumed by",
        ),
    ] {
        let found = problems(&second(name, topology));
        assert_eq!(found.len(), 1, "{topology}: {found:#?}");
        assert!(found[0].message.starts_with(message), "{found:#?}");
    }
    for topology in [
        "queue = \"orders.retry.1h\"",
        // Of what others make, type and bindings are not known.
        "mode = \"none\"\ndead_letter_exchange = \"orders.dlx\"",
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
    assert_eq!(found.len(), 3, "{found:#?}");
    assert!(found[0].message.contains("is too long"), "{found:#?}");
    assert!(
        found[0].hint.contains("set `dead_letter_exchange`"),
        "{found:#?}"
    );
    let of_length = |length: usize| {
        below(
            "[consumer.topology]",
            &format!("queue = \"{}\"", "q".repeat(length)),
        )
    };
    let found = problems(&of_length(246));
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(
        found[0].message,
        "the name of a retry queue, `.retry.10m` after the queue's name, is too long"
    );
    assert_eq!(found[0].hint, "give a `queue` of at most 245 bytes");
    let longest = parse(&of_length(245)).unwrap_or_else(|error| panic!("{error}"));
    let consumer = &longest.consumers[0];
    let names = consumer.retry.delays().into_iter();
    let names = names.map(|delay| consumer.topology.retry_queue(delay).len());
    assert_eq!(names.max(), Some(255));
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
url = "redis://localhost"
timeout = "soon"

[postgres]
url = "postgres://localhost/d"
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
