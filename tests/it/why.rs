//! `ackonce why`: the story of one message, from ledger, journal and marks.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::process::Output;
use std::time::Duration;

use crate::common::{
    Config, Consumer, Msg, ORDERS, ORDERS_DEAD, Proxy, RECORD_AMOUNT, Tool, World, eventually,
    run_ackonce,
};
use ackonce::failure::{Class, Failure};
use ackonce::ledger::{JournalEntry, Ledger};
use ackonce::message::{DeadReason, Fingerprint, MessageId};
use serde_json::{Value, json};

fn why(world: &World, config: &Config, arguments: &[&str]) -> Output {
    let path = world.write("config.toml", &config.text());
    let mut all = vec!["why", "--config", path.to_str().unwrap()];
    all.extend(arguments);
    run_ackonce(&all)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What it prints, after having found something.
fn told(world: &World, arguments: &[&str]) -> String {
    let output = why(world, &world.orders(), arguments);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    text(&output.stdout)
}

fn told_json(world: &World, id: &str) -> Value {
    serde_json::from_str(&told(world, &["--json", "--", id])).unwrap()
}

struct Writer {
    ledger: Ledger,
    id: MessageId,
}

impl Writer {
    fn new(world: &World, consumer: &str, id: &str) -> Self {
        Self {
            ledger: Ledger::new(world.postgres(), consumer, "host/7", 2, 1),
            id: MessageId::new(id).unwrap(),
        }
    }

    fn fails(&mut self, attempt: u32, error: &str, retry_in: Option<Duration>) {
        self.journal(attempt, error, retry_in, None, Fingerprint([1; 32]));
    }

    fn dies(&mut self, attempt: u32, error: &str, reason: DeadReason) {
        self.journal(attempt, error, None, Some(reason), Fingerprint([1; 32]));
    }

    fn journal(
        &mut self,
        attempt: u32,
        error: &str,
        retry_in: Option<Duration>,
        reason: Option<DeadReason>,
        fingerprint: Fingerprint,
    ) {
        let failure = Failure {
            class: match reason {
                None => Class::Transient,
                Some(_) => Class::Permanent,
            },
            code: Some("40P01".to_owned()),
            text: error.to_owned(),
            retry_after: None,
        };
        let entry = JournalEntry {
            message_id: Some(&self.id),
            fingerprint,
            reason,
            retry_in,
            failure: &failure,
            attempt,
            worker: None,
            duration: (attempt > 0).then_some(Duration::from_micros(12_500)),
            exchange: "events",
            routing_key: "orders.new",
        };
        self.ledger.journal("sql", &[entry]).unwrap();
    }

    fn is_applied(&mut self) {
        self.ledger.begin().unwrap();
        let entry = (&self.id, Fingerprint([1; 32]));
        self.ledger.record(&[entry]).unwrap();
        self.ledger.commit().unwrap();
    }
}

/// Everything that stands in the database, so much earlier.
fn earlier(world: &World, interval: &str) {
    world.db.execute(&format!(
        "update ackonce.failure set failed_at = failed_at - interval '{interval}'; \
         update ackonce.ledger set applied_at = applied_at - interval '{interval}'; \
         update ackonce.suspect set marked_at = marked_at - interval '{interval}';"
    ));
}

/// Lines without the times at their beginning.
fn lines(text: &str) -> Vec<String> {
    text.lines()
        .map(|line| {
            let mut line = line.to_owned();
            while let Some(at) = line.find("20").filter(|at| line[*at..].contains('Z')) {
                let end = at + line[at..].find('Z').unwrap();
                line.replace_range(at..=end, "T");
            }
            line
        })
        .collect()
}

#[test]
fn a_message_that_failed_twice_and_was_applied_has_its_story_told_in_order() {
    let world = World::migrated();
    let mut orders = Writer::new(&world, ORDERS, "m");
    orders.fails(1, "deadlock detected", Some(Duration::from_secs(1)));
    earlier(&world, "12 s");
    orders.fails(2, "deadlock\nagain", Some(Duration::from_millis(9_500)));
    earlier(&world, "10 s");
    orders.is_applied();
    assert_eq!(
        lines(&told(&world, &["m"])),
        [
            "consumer orders",
            "  T  attempt 1 failed: transient 40P01, deadlock detected (sql, host/7 worker 2, \
             12.5 ms); again in 1s",
            "  T  attempt 2 failed: transient 40P01, deadlock… (sql, host/7 worker 2, 12.5 ms); \
             again in 9s500ms",
            "  T  applied",
            "  = applied at T",
        ]
    );
    let verbose = told(&world, &["m", "--verbose"]);
    for part in [
        "      error: deadlock\n             again\n",
        "exchange: \"events\", routing key: \"orders.new\"",
        &format!("SHA-256: {}", "01".repeat(32)),
    ] {
        assert!(verbose.contains(part), "{part:?} is not in:\n{verbose}");
    }
}

#[test]
fn a_replay_that_could_not_send_a_dead_letter_leaves_it_where_it_was_and_says_so() {
    let world = World::new();
    let config = world
        .config()
        .consumer(Consumer::orders().sql(RECORD_AMOUNT));
    world.prepare(&config);
    world
        .broker
        .send(ORDERS, [Msg::new("m").json(&json!({ "amount": "many" }))]);
    let daemon = world.run(&config);
    eventually("it is dead", || world.broker.ready(ORDERS_DEAD) == 1);
    daemon.stop();
    let ended = Tool::new(
        &world,
        &config,
        &["replay", ORDERS, "--to", "/gone", "--yes"],
    )
    .run();
    assert_ne!(ended.code, Some(0));
    let told = text(&why(&world, &config, &["m"]).stdout);
    assert!(
        told.contains("it could not be sent, and stayed in the dead-letter queue"),
        "{told}"
    );
    let end = told.lines().last().unwrap();
    assert!(
        end.starts_with("  = dead-lettered at ") && end.ends_with(": rejected"),
        "{end}"
    );

    // One that sends it, and no daemon to take it.
    let sent = Tool::new(&world, &config, &["replay", ORDERS, "--yes"]).run();
    sent.expect(0);
    let told = text(&why(&world, &config, &["m"]).stdout);
    let end = told.lines().last().unwrap();
    assert!(end.starts_with("  = was to be put back at "), "{end}");
}

#[test]
fn each_end_is_told_apart() {
    let world = World::migrated();
    let ends = |id: &str| lines(&told(&world, &[id])).pop().unwrap();
    let wait = Some(Duration::from_secs(60));
    Writer::new(&world, ORDERS, "waits").fails(1, "no", wait);
    assert_eq!(
        ends("waits"),
        "  = waits for its next attempt until about T"
    );
    earlier(&world, "2 min");
    assert_eq!(
        ends("waits"),
        "  = was to be tried again at about T, and nothing is known since: it is in the queue, \
         or in work"
    );
    let mut dead = Writer::new(&world, ORDERS, "dead");
    dead.fails(1, "no", wait);
    dead.dies(2, "never", DeadReason::MaxAttempts);
    assert_eq!(ends("dead"), "  = dead-lettered at T: max-attempts");
    // Replayed after a repair.
    dead.is_applied();
    assert_eq!(ends("dead"), "  = applied at T");

    let mut conflict = Writer::new(&world, ORDERS, "twin");
    conflict.is_applied();
    let (reason, other) = (Some(DeadReason::IdConflict), Fingerprint([2; 32]));
    conflict.journal(0, "another body", None, reason, other);
    let told = lines(&told(&world, &["twin"]));
    assert!(told[2].starts_with("  T  refused: permanent 40P01, another body (sql, host/7"));
    assert_eq!(
        told[3],
        "  = applied at T; another message with this id and another body was dead-lettered"
    );

    let mark = |owner: u64| {
        Ledger::new(world.postgres(), ORDERS, "host/1", 1, owner)
            .mark(&["killer"])
            .unwrap();
    };
    mark(1);
    mark(2);
    let in_work = "  = in work since T, or lost with its worker; it died with it 1 time(s) before";
    assert_eq!(ends("killer"), in_work);
    // A run that came to an end says more than the mark that it bore.
    Writer::new(&world, ORDERS, "killer").fails(1, "no", wait);
    assert_eq!(
        ends("killer"),
        "  = waits for its next attempt until about T"
    );
    mark(2);
    assert_eq!(ends("killer"), in_work);
    assert_eq!(
        told_json(&world, "killer")["consumers"][0]["state"],
        "in-work"
    );
}

#[test]
fn a_dead_letter_that_is_journalled_twice_is_told_as_that() {
    let world = World::migrated();
    let mut orders = Writer::new(&world, ORDERS, "m");
    orders.dies(1, "never", DeadReason::Rejected);
    orders.dies(1, "never", DeadReason::Rejected);
    let told = told(&world, &["m"]);
    assert_eq!(told.matches("dead-lettered: rejected").count(), 1, "{told}");
    assert_eq!(told.matches("dead-lettered once more").count(), 1, "{told}");
    let json = told_json(&world, "m");
    let repeated = |n: usize| json["consumers"][0]["events"][n]["repeated"].clone();
    assert_eq!((repeated(0), repeated(1)), (json!(false), json!(true)));
}

#[test]
fn every_consumer_of_the_ledger_tells_its_own_part_unless_one_is_asked_for() {
    let world = World::migrated();
    Writer::new(&world, "mail", "m").dies(1, "never", DeadReason::Rejected);
    Writer::new(&world, ORDERS, "m").is_applied();
    Writer::new(&world, "quiet", "other").is_applied();
    let all = told(&world, &["m"]);
    assert!(
        all.find("consumer mail") < all.find("\n\nconsumer orders"),
        "{all}"
    );
    assert!(!all.contains("quiet"), "{all}");
    let one = told(&world, &["m", "--consumer", ORDERS]);
    assert!(!one.contains("mail"), "{one}");
    let none = why(&world, &world.orders(), &["m", "--consumer", "quiet"]);
    assert_eq!(none.status.code(), Some(1));
    assert!(text(&none.stderr).contains("nothing is known of message m with consumer quiet"));
}

#[test]
fn json_has_every_field_under_a_stable_name() {
    let world = World::migrated();
    let mut orders = Writer::new(&world, ORDERS, "m");
    orders.fails(1, "dead\nlock", Some(Duration::from_secs(1)));
    orders.dies(2, "never", DeadReason::Rejected);
    let mut story = told_json(&world, "m");
    let time = |value: &mut Value| {
        let text = value.take();
        let text = text.as_str().unwrap();
        assert_eq!(text.len(), "2026-05-04T03:02:01.123Z".len(), "{text}");
    };
    let chapter = &mut story["consumers"][0];
    time(&mut chapter["at"]);
    for event in 0..2 {
        time(&mut chapter["events"][event]["at"]);
    }
    time(&mut chapter["events"][0]["retry_at"]);
    let common = json!({"at": null, "event": "failed", "code": "40P01", "repeated": false,
        "duration_ms": 12.5, "handler": "sql", "host": "host/7", "worker": 2,
        "exchange": "events", "routing_key": "orders.new", "fingerprint": "01".repeat(32),
        "retry_at": null});
    let event = |own: Value| {
        let mut event = common.clone();
        let (all, own) = (event.as_object_mut().unwrap(), own.as_object().unwrap());
        all.extend(own.clone());
        event
    };
    assert_eq!(
        story,
        json!({"message_id": "m", "known": true, "truncated": false, "consumers": [{
        "consumer": "orders", "state": "dead-lettered", "at": null, "reason": "rejected",
        "events": [
            event(json!({"attempt": 1, "class": "transient", "error": "dead\nlock",
                "reason": null, "retry_in_ms": 1000.0})),
            event(json!({"attempt": 2, "class": "permanent", "error": "never",
                "reason": "rejected", "retry_in_ms": null})),
        ]}]})
    );
}

#[test]
fn an_unknown_message_is_told_as_such() {
    let world = World::migrated();
    let output = why(&world, &world.orders(), &["nobody"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let said = text(&output.stderr);
    assert!(
        said.contains("nothing is known of message nobody"),
        "{said}"
    );
    assert!(said.contains("older than the retention"), "{said}");
    let output = why(&world, &world.orders(), &["nobody", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let nothing =
        json!({"message_id": "nobody", "known": false, "truncated": false, "consumers": []});
    assert_eq!(json, nothing);
}

#[test]
fn whatever_an_id_or_an_error_holds_the_terminal_is_safe() {
    let world = World::migrated();
    let longest = "é".repeat(127);
    for id in [
        "'; drop table ackonce.ledger; --",
        "\u{1b}[2Jclear",
        "tab\tand\nnewline",
        "%s %n",
        "-dash",
        "--json",
        " ",
        "\u{202e}turned",
        "😀",
        &longest,
    ] {
        let mut orders = Writer::new(&world, ORDERS, id);
        orders.dies(
            1,
            "\u{1b}[31mred\rback\u{202e}\nnext\u{7}",
            DeadReason::Rejected,
        );
        for arguments in [&["--", id][..], &["--verbose", "--", id]] {
            let told = told(&world, arguments);
            let unsafe_ones = |c: char| c.is_control() && c != '\n' || c == '\u{202e}';
            assert!(!told.contains(unsafe_ones), "{id:?}: {told:?}");
            assert!(told.contains("\\u{1b}[31mred\\u{d}back"), "{told}");
        }
        assert_eq!(told_json(&world, id)["message_id"], id);
        let unknown = format!("{}!", id.chars().take(100).collect::<String>());
        let output = why(&world, &world.orders(), &["--", &unknown]);
        assert_eq!(output.status.code(), Some(1));
        assert!(!text(&output.stderr).contains('\u{1b}'));
    }
}

#[test]
fn a_story_without_end_is_told_from_its_newest_thousand_attempts() {
    let world = World::migrated();
    Writer::new(&world, ORDERS, "m").fails(1, "first", None);
    world.db.execute(
        "insert into ackonce.failure (consumer_id, attempt, message_id, fingerprint, class, \
         error, handler, host, exchange, routing_key) select consumer_id, n, message_id, \
         fingerprint, class, 'later', handler, host, '', '' from ackonce.failure, \
         generate_series(2, 1001) as n",
    );
    let text = told(&world, &["m"]);
    assert!(!text.contains("first"));
    assert_eq!(text.matches("later").count(), 1_000);
    assert!(text.contains("attempt 1001 failed"));
    assert!(text.ends_with("older attempts are left out: these are the newest 1000\n"));
    assert_eq!(told_json(&world, "m")["truncated"], true);
}

#[test]
fn what_is_not_an_id_is_refused_and_servers_have_their_own_statuses() {
    let world = World::new();
    let config = world.orders();
    for arguments in [&[][..], &[""], &["m", "n"], &["m", "--json", "--verbose"]] {
        let output = why(&world, &config, arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
    let long = "x".repeat(256);
    assert_eq!(why(&world, &config, &[&long]).status.code(), Some(2));
    // No schema yet.
    let output = why(&world, &config, &["m"]);
    assert_eq!(output.status.code(), Some(78));
    assert!(text(&output.stderr).contains("ackonce migrate"));
    let proxy = Proxy::before(world.postgres_url(), 0);
    proxy.go_down();
    let away = config.clone().set("postgres.url", proxy.url());
    assert_eq!(why(&world, &away, &["m"]).status.code(), Some(69));
    let mut url = url::Url::parse(world.postgres_url()).unwrap();
    url.set_username("nobody_of_that_name").unwrap();
    let denied = config.clone().set("postgres.url", url.as_str());
    assert_eq!(why(&world, &denied, &["m"]).status.code(), Some(77));
    let broken = config.set("postgres.lock_timeout", 5);
    assert_eq!(why(&world, &broken, &["m"]).status.code(), Some(78));
}

#[test]
fn what_a_daemon_did_can_be_asked_for() {
    let world = World::new();
    let config = world
        .config()
        .consumer(Consumer::orders().sql(RECORD_AMOUNT));
    let daemon = world.run(&config);
    world
        .broker
        .send(ORDERS, [Msg::new("good").body("{\"amount\": 1}")]);
    world
        .broker
        .send(ORDERS, [Msg::new("bad").body("{\"amount\": \"x\"}")]);
    crate::common::eventually("the bad one is dead-lettered", || {
        world.broker.ready(ORDERS_DEAD) == 1
    });
    world.wait_for_effects(1);
    drop(daemon);
    assert!(told(&world, &["good"]).contains("= applied at 20"));
    let bad = told(&world, &["bad"]);
    assert!(bad.contains("permanent 22P02"), "{bad}");
    assert!(bad.contains(": rejected\n"), "{bad}");
    assert!(bad.contains("attempt 1 failed"), "{bad}");
}
