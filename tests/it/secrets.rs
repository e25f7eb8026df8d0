//! Passwords and bodies show nowhere: a canary of each is looked for in all
//! that the daemon says, however loud it is told to be.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use crate::common::program::write_program;
use crate::common::{
    Config, Consumer, Daemon, Msg, ORDERS, PostgresServer, RedisServer, World, eventually,
};
use amiquip::AmqpValue;
use nix::sys::signal::Signal;
use serde_json::json;
use url::Url;

const BINARY: &str = env!("CARGO_BIN_EXE_ackonce");

/// In every password; and in every body.
struct Canaries {
    password: String,
    body: String,
}

/// Servers that ask for a password.
struct Guarded {
    world: World,
    redis: RedisServer,
    /// Keeps the world's database.
    _postgres: PostgresServer,
    canaries: Canaries,
}

impl Guarded {
    fn new() -> Self {
        let canaries = Canaries {
            password: format!("canary{:016x}", crate::common::random()),
            body: format!("nightingale{:016x}", crate::common::random()),
        };
        let password = &canaries.password;
        let postgres = PostgresServer::start_with_passwords();
        let world = World::with_postgres(&postgres.url());
        world.db.execute(&format!(
            "create role worker superuser login password '{password}'; \
             alter table effect add constraint once unique (message_id, body)"
        ));
        let user = world.name();
        world.management.create_user(user, password, user);
        let mut redis = RedisServer::start();
        redis.change_password(password);
        Self {
            redis,
            _postgres: postgres,
            world,
            canaries,
        }
    }

    /// URLs of the three servers with `password`.
    fn urls(&self, password: &str) -> [(&'static str, String); 3] {
        let with = |url: &str, user: &str| {
            let mut url = Url::parse(url).unwrap();
            url.set_username(user).unwrap();
            url.set_password(Some(password)).unwrap();
            String::from(url)
        };
        let world = &self.world;
        [
            ("broker.url", with(world.amqp_url(), world.name())),
            ("redis.url", with(&self.redis.url(), "default")),
            ("postgres.url", with(world.postgres_url(), "worker")),
        ]
    }

    fn config(&self, password: &str) -> Config {
        let urls = self.urls(password);
        urls.into_iter()
            .fold(self.world.config(), |config, (key, url)| {
                config.set(key, url)
            })
    }

    /// Panics if one of the canaries sings in `text`.
    #[track_caller]
    fn silent(&self, place: &str, text: &str) {
        assert!(!text.trim().is_empty(), "{place} says nothing at all");
        for canary in [&self.canaries.password, &self.canaries.body] {
            let line = text.lines().find(|line| line.contains(canary.as_str()));
            assert!(line.is_none(), "{place}: {line:?}");
        }
    }

    /// `ackonce ARGUMENTS` as loud as it can be.
    fn tool(&self, config: &Config, arguments: &[&str]) -> String {
        let path = self.world.write("tool.toml", &config.text());
        let output = Command::new(BINARY)
            .args(arguments)
            .arg("--config")
            .arg(path)
            .env("RUST_LOG", "trace")
            .output()
            .unwrap();
        let streams = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&streams).into_owned()
    }

    fn daemon(&self, config: &Config) -> Daemon {
        let path = self.world.write("loud.toml", &config.text());
        let mut program = Command::new("/usr/bin/env");
        let password = format!("ACKONCE_CANARY={}", self.canaries.password);
        let loud = ["RUST_LOG=trace", &password, BINARY, "run", "--config"];
        program.args(loud).arg(path);
        self.world.daemon(config).program(program).start()
    }
}

/// What the admin address of `daemon` answers at `path`.
fn admin(daemon: &Daemon, path: &str) -> String {
    let mut stream = TcpStream::connect(daemon.admin()).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Every kind of end: applied, retried, refused with a detail that quotes the
/// row, without id, another body under a known id, too long, odd headers.
fn messages(canary: &str) -> Vec<Msg> {
    let with = |id: &str, what: &str| Msg::new(id).json(&json!({ "what": what, "note": canary }));
    vec![
        with("fine", ""),
        with("again", ""),
        with("zero", "zero"),
        with("taken", "taken"),
        with("null", "null"),
        Msg::anonymous().body(canary),
        with("fine", "another"),
        Msg::new("text").body(format!("no json {canary}")),
        Msg::new("long").body(canary.repeat(200)),
        with("odd", "").header("x-odd", AmqpValue::LongString(canary.to_owned())),
    ]
}

#[test]
fn no_password_and_no_body_shows_where_everything_works() {
    let stage = Guarded::new();
    let world = &stage.world;
    let canaries = &stage.canaries;
    let environ = world.path("environ");
    let program = world.path("apply");
    let text = format!(
        "#!/bin/sh\ntr '\\0' '\\n' </proc/self/environ >>{}\ncat >/dev/null\nexit 65\n",
        environ.display()
    );
    write_program(&program, &text);
    let orders = Consumer::orders()
        .set("max_body", 1_000)
        .max_attempts(2)
        .backoff(&["100ms"])
        // 22012, and 23505 and 23502 with a detail that quotes the row.
        .sql(
            "insert into effect (message_id, body, amount) select case body->>'what' \
             when 'null' then null else message_id end, body, \
             1 / (case body->>'what' when 'zero' then 0 else 1 end) from message; \
             insert into effect (message_id, body) select message_id, body from message \
             where body->>'what' = 'taken'",
        )
        .failures("permanent", &["23"]);
    let reloaded = Consumer::orders().set("max_body", 2_000);
    world
        .db
        .execute("alter table effect alter column message_id set not null");
    let mail = Consumer::new("mail")
        .handler("command")
        .set("handler.argv", vec![program.to_str().unwrap()]);
    let config = stage
        .config(&canaries.password)
        .consumer(orders)
        .consumer(mail);
    let daemon = stage.daemon(&config);
    daemon.wait_until_consuming();
    world.broker.send(ORDERS, messages(&canaries.body));
    world.broker.send("mail", messages(&canaries.body));
    eventually("all have come to rest", || {
        world.broker.ready("orders.dead") == 6 && world.broker.ready("mail.dead") == 10
    });
    assert!(world.db.effect_count() >= 1);

    for path in ["/metrics", "/livez", "/readyz", "/status"] {
        stage.silent(path, &admin(&daemon, path));
    }
    // The headers of its message are handed to it there.
    let environ = std::fs::read_to_string(environ).unwrap();
    let is_header = |line: &&str| line.starts_with("ACKONCE_HEADERS=");
    let others: Vec<&str> = environ.lines().filter(|line| !is_header(line)).collect();
    stage.silent("a command's environment", &others.join("\n"));
    let journal = world.db.texts("select failure::text from ackonce.failure");
    assert!(journal.len() >= 15, "{journal:#?}");
    stage.silent("the journal", &journal.join("\n"));
    let marks = world
        .db
        .texts("select to_jsonb(l)::text from ackonce.ledger l");
    stage.silent("the ledger", &marks.join("\n"));
    for arguments in [
        &["check"][..],
        &["check", "--print"],
        &["why", "zero"],
        &["dead", "list", ORDERS],
        &["replay", ORDERS, "--plan"],
        &["ledger", "prune", "--dry-run"],
    ] {
        stage.silent(&arguments.join(" "), &stage.tool(&config, arguments));
    }
    let address = daemon.admin();
    stage.silent(
        "status",
        &stage.tool(&config, &["status", "--address", &address]),
    );
    // A reload says what differs, and why it is refused.
    let wrong = format!("{}wrong", canaries.password);
    for (password, says) in [
        (&wrong, "reload refused"),
        (&canaries.password, "reloaded: "),
    ] {
        let changed = stage.config(password).consumer(reloaded.clone());
        world.write("loud.toml", &changed.text());
        daemon.signal(Signal::SIGHUP);
        daemon.wait_for_log(&[says]);
    }
    daemon.signal(Signal::SIGTERM);
    let mut daemon = daemon;
    daemon.wait();
    let log = daemon.log();
    assert!(
        log.iter().any(|line| line.contains("TRACE")),
        "it was not loud"
    );
    stage.silent("the log", &log.join("\n"));
}

#[test]
fn a_value_of_a_body_that_postgresql_quotes_is_in_the_journal_alone() {
    let stage = Guarded::new();
    let world = &stage.world;
    let orders = Consumer::orders().sql(
        "insert into effect (message_id, amount) \
         select message_id, (body->>'amount')::int from message",
    );
    let config = stage.config(&stage.canaries.password).consumer(orders);
    let mut daemon = stage.daemon(&config);
    daemon.wait_until_consuming();
    let amount = json!({ "amount": stage.canaries.body });
    world
        .broker
        .send(ORDERS, ["a", "b"].map(|id| Msg::new(id).json(&amount)));
    eventually("both are dead", || world.broker.ready("orders.dead") == 2);
    for path in ["/metrics", "/status"] {
        stage.silent(path, &admin(&daemon, path));
    }
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    stage.silent("the log", &daemon.log().join("\n"));
    // Whoever mends it has to know.
    let quoting = format!(
        "select count(*) from ackonce.failure where error like '%{}%'",
        stage.canaries.body
    );
    assert_eq!(world.db.count(&quoting), 2);
}

/// Each server by itself, with a URL that does not lead to it.
fn away(stage: &Guarded, wrong: &str) -> Vec<(String, Config)> {
    let (amqp, redis) = (stage.world.amqp_url(), stage.redis.url());
    let amqps = amqp.replace("amqp://guest:guest", &format!("amqps://u:{wrong}"));
    let rediss = format!("rediss://:{wrong}@{}", redis.split('@').nth(1).unwrap());
    let [broker, cache, database] = stage.urls(wrong);
    let verified = format!("{}?sslmode=verify-full", database.1);
    let nobody = |scheme: &str, user: &str| format!("{scheme}://{user}:{wrong}@127.0.0.1:1/0");
    let mut cases = Vec::new();
    for (what, urls) in [
        ("refused", [broker.1, cache.1, database.1]),
        (
            "unreachable",
            [
                nobody("amqp", "u"),
                nobody("redis", ""),
                nobody("postgres", "u"),
            ],
        ),
        ("plain text where TLS is meant", [amqps, rediss, verified]),
    ] {
        for (key, url) in ["broker.url", "redis.url", "postgres.url"]
            .into_iter()
            .zip(urls)
        {
            let config = stage.config(&stage.canaries.password).set(key, url);
            cases.push((format!("{key} {what}"), config));
        }
    }
    let mistaken = stage
        .config(wrong)
        .set("broker.url", format!("amqp://u:{wrong}@mq.example/a/b"))
        .set("redis.url", format!("redis://:{wrong}@redis.example/x"))
        .set(
            "postgres.url",
            format!("postgres://u:{wrong}@db.example/d?sslmode=no"),
        );
    cases.push(("a wrong configuration".to_owned(), mistaken));
    cases
}

#[test]
fn no_password_shows_where_servers_refuse_it_or_are_not_there() {
    let stage = Guarded::new();
    let world = &stage.world;
    let wrong = format!("{}wrong", stage.canaries.password);
    for (place, config) in away(&stage, &wrong) {
        let config = config.consumer(Consumer::orders());
        for arguments in [
            &["check"][..],
            &["migrate"],
            &["why", "m"],
            &["dead", "list", ORDERS],
        ] {
            let said = stage.tool(&config, arguments);
            stage.silent(&format!("{place}: {arguments:?}"), &said);
        }
        let mut daemon = stage.daemon(&config);
        if place.starts_with("redis.url") {
            // Without Redis it goes on, and says so when it would ask it.
            daemon.wait_until_consuming();
            world.broker.send(ORDERS, messages(&stage.canaries.body));
        }
        eventually(&format!("{place}: it says what is wrong"), || {
            let told = daemon.logged(&["WARN"]) || daemon.logged(&["ERROR"]);
            told || daemon.try_wait().is_some()
        });
        if daemon.try_wait().is_some() {
            // Ended, it may have said more than has been read by now.
            daemon.wait();
        }
        stage.silent(&format!("{place}: run"), &daemon.log().join("\n"));
    }
}

#[test]
fn help_shows_no_value_of_the_environment() {
    let canary = "hunter2canary";
    let mut commands = vec![vec![]];
    for words in [
        "run", "check", "migrate", "why", "replay", "ledger", "dead", "publish", "status",
    ] {
        commands.push(vec![words]);
    }
    commands.extend([vec!["dead", "list"], vec!["ledger", "prune"]]);
    for command in commands {
        let output = Command::new(BINARY)
            .args(&command)
            .arg("--help")
            .envs(
                [
                    "ACKONCE_AMQP_URL",
                    "ACKONCE_REDIS_URL",
                    "ACKONCE_POSTGRES_URL",
                ]
                .map(|name| (name, format!("amqp://u:{canary}@127.0.0.1/v"))),
            )
            .output()
            .unwrap();
        assert!(output.status.success(), "{command:?}");
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(!said.contains(canary), "{command:?}");
    }
}
