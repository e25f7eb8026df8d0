//! Programs with handlers of their own, on real servers. The program is this
//! test binary again: it runs the test `program`, which is ignored otherwise.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

#[path = "../../examples/keyed.rs"]
mod keyed;
#[path = "../../examples/transactional.rs"]
mod transactional;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use ackonce::worker::{Daemon, Handler, Message, Outcome, Transaction, sqlx};

use crate::common::{
    Config, Consumer, Dead, Msg, ORDERS, ORDERS_DEAD, World, eventually, numbered_ids, run_ackonce,
};

/// Number of a lock that a handler takes before it panics.
const LOCK: u32 = 4711;

/// Does what the body says.
struct Behave {
    /// What a panic would leave behind.
    soiled: bool,
}

impl Behave {
    fn one(&mut self, message: &Message<'_>, tx: &mut Transaction<'_>) -> Result<(), Outcome> {
        assert!(!self.soiled, "a handler that panicked is used again");
        let id = message.id();
        let insert = "INSERT INTO effect (message_id) VALUES ($1)";
        let mut write =
            || tx.run(async |connection| sqlx::query(insert).bind(id).execute(connection).await);
        write()?;
        let body = std::str::from_utf8(message.body()).unwrap_or_default();
        match body {
            "retry once" if message.attempt() == 1 => Err(Outcome::Retry {
                text: "not yet".to_owned(),
                after: Some(Duration::from_millis(300)),
            }),
            "reject" => Err(Outcome::reject("never")),
            "pause" => {
                let open = "SELECT count(*) FROM gate";
                let open: i64 = tx
                    .run(async |connection| sqlx::query_scalar(open).fetch_one(connection).await)?;
                match open {
                    0 => Err(Outcome::pause("the gate is closed")),
                    _ => Ok(()),
                }
            }
            "panic" => {
                self.soiled = true;
                // It lasts as long as the session does.
                let lock = format!("SELECT pg_try_advisory_lock({LOCK})");
                tx.run(async |c| sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(c).await)?;
                panic!("as the body says");
            }
            "panic in a statement" => {
                self.soiled = true;
                tx.run(async |connection| {
                    let statement = sqlx::query("SELECT pg_sleep(0.2)").execute(connection);
                    // Begun, and left behind with its answer on the way.
                    tokio::time::timeout(Duration::from_millis(20), statement)
                        .await
                        .expect("as the body says")?;
                    Ok(())
                })?;
                Ok(())
            }
            "bad data" => {
                tx.run(async |c| sqlx::query("SELECT 'x'::int").execute(c).await)?;
                Ok(())
            }
            "swallow" => {
                tx.run(async |c| sqlx::query("SELECT 1/0").execute(c).await)
                    .ok();
                Ok(())
            }
            "swallow inside" => {
                tx.run(async |c| {
                    sqlx::query("SELECT 1/0").execute(c).await.ok();
                    Ok(())
                })?;
                Ok(())
            }
            "savepoint" => {
                tx.run(async |c| {
                    sqlx::query("SAVEPOINT a").execute(&mut *c).await?;
                    sqlx::query("SELECT 1/0")
                        .execute(&mut *c)
                        .await
                        .unwrap_err();
                    sqlx::query("ROLLBACK TO SAVEPOINT a")
                        .execute(&mut *c)
                        .await
                })?;
                Ok(())
            }
            "commit" => {
                tx.run(async |c| sqlx::query("COMMIT").execute(c).await)?;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Handler for Behave {
    fn apply(&mut self, message: &Message<'_>, tx: &mut Transaction<'_>) -> Result<(), Outcome> {
        self.one(message, tx)
    }
}

/// Not a test: the program that the tests run.
#[test]
#[ignore = "the program that the other tests run"]
fn program() {
    let path = std::env::var("PROGRAM_CONFIG").expect("a configuration");
    let kind = std::env::var("PROGRAM").expect("which one");
    let daemon = || Daemon::from_config(&path);
    let ended = match kind.as_str() {
        "transactional" => transactional::run(&path),
        "keyed" => keyed::run(&path, Path::new(&std::env::var("PROGRAM_FOLDER").unwrap())),
        "behave" => daemon().map(|d| d.handler(ORDERS, || Behave { soiled: false }).run()),
        "without" => daemon().map(Daemon::run),
        "unused" => daemon().map(|d| d.handler("other", || Behave { soiled: false }).run()),
        other => panic!("{other}"),
    };
    let code = ended.unwrap_or_else(|error| error.exit_code());
    // The status has no other way out of a test.
    let status = (0..=255_u8).find(|n| format!("{:?}", ExitCode::from(*n)) == format!("{code:?}"));
    std::process::exit(i32::from(status.unwrap_or(255)));
}

fn program_command(kind: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["rust_api::program", "--exact", "--ignored", "--nocapture"])
        .env("PROGRAM", kind)
        .env("PROGRAM_FOLDER", folder);
    command
}

fn config(world: &World, effect: &str) -> Config {
    let consumer = Consumer::orders()
        .handler("rust")
        .set("handler.effect", effect)
        .set("max_deaths", 100)
        .set("claim.lease", "1200ms")
        .set("claim.renew_every", "300ms");
    world.config().consumer(consumer)
}

/// The queues and the schema, made by a program that ends at once.
fn prepare(world: &World, config: &Config, kind: &str) {
    let folder = world.folder();
    let daemon = world
        .daemon(config)
        .program(program_command(kind, folder))
        .start();
    daemon.wait_until_consuming();
    daemon.stop();
}

fn start(world: &World, config: &Config, kind: &str) -> crate::common::Daemon {
    let command = program_command(kind, world.folder());
    let daemon = world.daemon(config).program(command).start();
    daemon.wait_until_consuming();
    daemon
}

#[test]
fn what_a_handler_says_becomes_of_its_message() {
    let world = World::new();
    world.db.execute("create table gate (open int)");
    let config = world.config().consumer(
        Consumer::orders()
            .handler("rust")
            .max_attempts(3)
            .backoff(&["50ms", "1s"]),
    );
    prepare(&world, &config, "behave");
    let good = ["ok", "retry once", "savepoint"];
    let bad = [
        ("reject", "permanent", "rejected", "never"),
        (
            "bad data",
            "permanent",
            "rejected",
            "invalid input syntax for type integer",
        ),
        ("panic", "transient", "max-attempts", "the handler panicked"),
        (
            "panic in a statement",
            "transient",
            "max-attempts",
            "the handler panicked",
        ),
        ("swallow", "permanent", "rejected", "division by zero"),
        (
            "swallow inside",
            "transient",
            "max-attempts",
            "went on after a statement",
        ),
    ];
    let filler = numbered_ids("filler", 40);
    let kinds = good.iter().chain(bad.iter().map(|(kind, ..)| kind));
    let messages = kinds.map(|kind| Msg::new(kind).body(*kind));
    let fillers = filler.iter().map(|id| Msg::new(id).body("ok"));
    world.broker.send(ORDERS, messages.chain(fillers));
    let daemon = start(&world, &config, "behave");
    let dead = world.broker.wait_for_dead(ORDERS_DEAD, bad.len());
    world.wait_for_effects((good.len() + filler.len()) as i64);
    eventually("the sessions of panics are thrown away", || {
        let held = format!("select count(*) from pg_locks where objid = {LOCK}");
        world.db.count(&held) == 0
    });
    daemon.stop();
    let applied: Vec<&str> = good
        .iter()
        .copied()
        .chain(filler.iter().map(String::as_str))
        .collect();
    world.assert_each_applied_once(&applied);
    assert_eq!(world.db.ledger(ORDERS).len(), applied.len());
    let dead: BTreeSet<&str> = dead.iter().filter_map(Dead::id).collect();
    assert_eq!(dead, bad.iter().map(|(kind, ..)| *kind).collect());
    let failures = world.db.failures(ORDERS);
    for (kind, class, reason, text) in bad {
        let rows: Vec<_> = failures
            .iter()
            .filter(|f| f.message_id.as_deref() == Some(kind))
            .collect();
        let attempts = if reason == "max-attempts" { 3 } else { 1 };
        assert_eq!(rows.len(), attempts, "{kind}: {rows:?}");
        let last = rows.last().unwrap();
        assert_eq!(
            (last.class.as_str(), last.reason.as_str()),
            (class, reason),
            "{kind}"
        );
        assert!(last.error.contains(text), "{kind}: {}", last.error);
    }
    let waits = "select retry_in::text from ackonce.failure where message_id = 'retry once'";
    assert_eq!(
        world.db.texts(waits),
        ["00:00:01"],
        "the first step that is long enough"
    );
}

#[test]
fn a_pause_costs_no_attempt_and_ends_by_itself() {
    let world = World::new();
    world.db.execute("create table gate (open int)");
    let consumer = Consumer::orders().handler("rust").max_attempts(1);
    let config = world.config().consumer(consumer);
    prepare(&world, &config, "behave");
    let ids = numbered_ids("m", 20);
    world
        .broker
        .send(ORDERS, ids.iter().map(|id| Msg::new(id).body("pause")));
    let daemon = start(&world, &config, "behave");
    daemon.wait_for_log(&["paused: ", "the gate is closed"]);
    world.db.execute("insert into gate values (1)");
    world.wait_for_effects(ids.len() as i64);
    daemon.stop();
    world.assert_each_applied_once(&ids);
    assert_eq!(world.db.failures(ORDERS), []);
}

#[test]
fn a_handler_that_ends_the_transaction_is_found_out() {
    let world = World::new();
    let config = config(&world, "transactional");
    prepare(&world, &config, "behave");
    world.broker.send(ORDERS, [Msg::new("a").body("commit")]);
    let daemon = start(&world, &config, "behave");
    daemon.wait_for_log(&["has ended the ledger's transaction"]);
    // What it committed has its ledger row, so it is not applied again.
    eventually("the queue is empty", || {
        world.broker.is_empty(ORDERS) || daemon.logged(&["resumed"])
    });
    daemon.stop();
    assert_eq!(world.db.effect_count(), 1);
    assert_eq!(world.db.ledger(ORDERS), ["a"]);
}

/// Kills programs at each of `failpoints`, then lets one finish.
fn kill_at(world: &World, config: &Config, kind: &str, failpoints: &[&str]) -> Vec<String> {
    prepare(world, config, kind);
    let mut ids = Vec::new();
    for (round, failpoint) in failpoints.iter().enumerate() {
        let fresh = numbered_ids(&format!("m-{round}"), 20);
        world
            .broker
            .send(ORDERS, fresh.iter().chain(&fresh).map(|id| Msg::new(id)));
        ids.extend(fresh);
        let command = program_command(kind, world.folder());
        let builder = world.daemon(config).program(command);
        builder.dies_at(failpoint, 1).start().wait_until_killed();
    }
    let daemon = start(world, config, kind);
    eventually("the ledger has all", || {
        world.db.ledger(ORDERS).len() == ids.len()
    });
    daemon.stop();
    ids
}

#[test]
fn exactly_once_through_the_transaction_when_killed_at_every_step() {
    let world = World::new();
    let config = config(&world, "transactional");
    let steps = [
        "received",
        "claimed",
        "recorded",
        "applied",
        "committed",
        "marked",
        "settled",
    ];
    let ids = kill_at(&world, &config, "transactional", &steps);
    world.assert_each_applied_once(&ids);
}

#[test]
fn exactly_once_with_the_key_when_killed_at_every_step() {
    let world = World::new();
    let config = config(&world, "keyed");
    let steps = [
        "received", "claimed", "leased", "called", "done", "marked", "settled",
    ];
    let ids = kill_at(&world, &config, "keyed", &steps);
    let keys = std::fs::read_dir(world.folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("orders:"));
    let wanted: BTreeSet<String> = ids.iter().map(|id| format!("orders:{id}")).collect();
    assert_eq!(keys.collect::<BTreeSet<String>>(), wanted);
}

#[test]
fn a_program_and_a_configuration_that_do_not_fit_are_named() {
    let world = World::new();
    let of_rust = config(&world, "transactional");
    let of_sql = world.orders();
    for (config, kind, says) in [
        (&of_rust, "without", "brings no handler for it"),
        (&of_rust, "keyed", "set effect = \"keyed\""),
        (&of_rust, "unused", "a handler for consumer `other`"),
        (
            &of_sql,
            "transactional",
            "no consumer of that name with type = \"rust\"",
        ),
    ] {
        let command = program_command(kind, world.folder());
        let mut daemon = world.daemon(config).program(command).start();
        assert_eq!(daemon.wait().code(), Some(78), "{kind}: {:?}", daemon.log());
        assert!(daemon.logged(&[says]), "{kind}: {:?}", daemon.log());
    }
    let path = world.write("rust.toml", &of_rust.text());
    for command in ["run", "check"] {
        let output = run_ackonce(&[command, "--config", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(78), "{output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(
            text.contains("this program brings no handler for it"),
            "{text}"
        );
    }
}
