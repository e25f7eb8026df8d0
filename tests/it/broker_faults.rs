//! What operators and a broker in trouble do to a running daemon: each is
//! recognised, said in one line with what to do, and recovered from.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::process::Command;
use std::time::{Duration, Instant};

use amiquip::{AmqpValue, ConsumerOptions, FieldTable, QueueDeclareOptions};
use nix::sys::signal::Signal;

use crate::common::{
    Config, Consumer, Daemon, Msg, ORDERS, ORDERS_DEAD, PrivateBroker, World, eventually, numbered,
    numbered_ids,
};

/// Runs rabbitmqctl on the shared broker.
fn rabbitmqctl(arguments: &[&str]) {
    let program = std::env::var("ACKONCE_RABBITMQCTL").expect("run script/test");
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "rabbitmqctl {arguments:?}: {said}");
}

/// Waits until `daemon` consumes once more than `before`.
fn consumes_again(daemon: &Daemon, before: usize) {
    eventually("it consumes again", || {
        daemon.times_consuming(ORDERS) > before
    });
}

#[test]
fn connections_that_an_operator_closes_under_load_cost_nothing() {
    const SENT: usize = 10_000;
    let world = World::new();
    let orders = Consumer::orders().set("batch_max", 50).set("prefetch", 300);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    std::thread::scope(|scope| {
        // The test's own connection is closed too, so this one is through HTTP.
        world.broker.send(ORDERS, numbered("m", SENT));
        scope.spawn(|| {
            for turn in 0..3 {
                world.wait_for_effects(500 + turn * 2_000);
                let before = daemon.times_consuming(ORDERS);
                let reason = "maintenance";
                rabbitmqctl(&["close_all_connections", "--vhost", world.name(), reason]);
                consumes_again(&daemon, before);
            }
        });
    });
    daemon.wait_for_log(&[
        "lost the broker",
        "code=320",
        "maintenance",
        "an operator closed",
    ]);
    let mut world = world;
    world.look_again();
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", SENT));
}

/// A user of one test's own, and a configuration that logs in as it.
struct User<'w> {
    world: &'w World,
    name: String,
}

impl<'w> User<'w> {
    fn new(world: &'w World) -> Self {
        let name = format!("user_{}", world.name());
        world.management.create_user(&name, "first", world.name());
        Self { world, name }
    }

    fn config(&self) -> Config {
        let mut url = url::Url::parse(self.world.amqp_url()).unwrap();
        url.set_username(&self.name).unwrap();
        url.set_password(Some("first")).unwrap();
        self.world.orders().set("broker.url", url.as_str())
    }

    fn path(&self) -> String {
        format!("/api/users/{}", self.name)
    }

    /// Closes the daemon's connections.
    fn disconnect(&self) {
        let of_user = || {
            let connections = self.world.management.get("/api/connections");
            let all = connections.as_array().unwrap().clone();
            all.into_iter()
                .filter(|one| one["user"].as_str() == Some(&self.name))
                .filter_map(|one| one["name"].as_str().map(str::to_owned))
                .collect::<Vec<_>>()
        };
        // The management database learns of connections with a delay.
        eventually("its connections are known", || !of_user().is_empty());
        for connection in of_user() {
            self.world.management.close_connection(&connection);
        }
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        let gone = std::panic::AssertUnwindSafe(|| self.world.management.delete(&self.path()));
        drop(std::panic::catch_unwind(gone));
    }
}

#[test]
fn rights_that_are_withdrawn_are_named_and_the_daemon_goes_on_once_they_are_back() {
    let world = World::new();
    let user = User::new(&world);
    let config = user.config();
    let daemon = world.run(&config);
    let mut ids = Vec::new();
    let mut works = |what: &str| {
        world.broker.send(ORDERS, numbered(what, 10));
        ids.extend(numbered_ids(what, 10));
        world.wait_for_effects(ids.len() as i64);
    };
    works("before");

    let before = daemon.times_consuming(ORDERS);
    world.management.permit(&user.name, world.name(), "");
    user.disconnect();
    daemon.wait_for_log(&[
        "lost the broker",
        "refused for user",
        "configure, write and read",
    ]);
    world.management.permit(&user.name, world.name(), ".*");
    consumes_again(&daemon, before);
    works("permitted");

    let before = daemon.times_consuming(ORDERS);
    world
        .management
        .create_user(&user.name, "second", world.name());
    user.disconnect();
    daemon.wait_for_log(&[
        "lost the broker",
        "during the login",
        "user name and password",
    ]);
    world
        .management
        .create_user(&user.name, "first", world.name());
    consumes_again(&daemon, before);
    works("password");

    let before = daemon.times_consuming(ORDERS);
    world.management.delete(&user.path());
    daemon.wait_for_log(&["lost the broker", "the user was deleted"]);
    world
        .management
        .create_user(&user.name, "first", world.name());
    consumes_again(&daemon, before);
    works("made again");

    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn without_the_rights_it_needs_the_daemon_does_not_start() {
    let world = World::new();
    let user = User::new(&world);
    world.management.permit(&user.name, world.name(), "");
    let mut daemon = world.daemon(&user.config()).start();
    assert_eq!(daemon.wait().code(), Some(77));
    assert!(daemon.logged(&["refused for user"]));
}

#[test]
fn a_vhost_that_is_deleted_is_named_and_consumed_from_once_it_is_there_again() {
    let mut world = World::new();
    let config = world.orders();
    let daemon = world.run(&config);
    world.management.delete_vhost(world.name());
    daemon.wait_for_log(&["lost the broker", "vhost", "make it"]);
    let before = daemon.times_consuming(ORDERS);
    eventually("it is told that there is none", || {
        daemon.logged(&["failed to open the vhost"])
    });
    world.management.create_vhost(world.name());
    consumes_again(&daemon, before);
    world.look_again();
    world.broker.send(ORDERS, numbered("m", 10));
    world.wait_for_effects(10);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 10));
}

#[test]
fn a_queue_that_others_make_is_waited_for_when_it_was_deleted() {
    let world = World::new();
    world.prepare(&world.orders());
    let orders = Consumer::orders().set("topology.mode", "verify");
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    let channel = world.broker.channel();
    channel.queue_delete(ORDERS, Default::default()).unwrap();
    daemon.wait_for_log(&["lost the broker", "the broker cancelled the consumer"]);
    daemon.wait_for_log(&["lost the broker", "failed to find queue orders", "no queue"]);
    let before = daemon.times_consuming(ORDERS);
    world.prepare(&world.orders());
    consumes_again(&daemon, before);
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    daemon.stop();
}

#[test]
fn a_queue_that_another_consumer_has_to_itself_is_waited_for() {
    let world = World::new();
    // A quorum queue lets others in all the same.
    let orders = Consumer::orders().set("topology.queue_type", "classic");
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let channel = world.broker.channel();
    let options = ConsumerOptions {
        exclusive: true,
        ..ConsumerOptions::default()
    };
    let other = channel.basic_consume(ORDERS, options).unwrap();
    let daemon = world.daemon(&config).start();
    daemon.wait_for_log(&["lost the broker", "in exclusive use", "stop that one"]);
    assert_eq!(daemon.times_consuming(ORDERS), 0);
    other.cancel().unwrap();
    drop(other);
    daemon.wait_until_consuming();
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    daemon.stop();
}

#[test]
fn of_two_daemons_on_a_queue_for_one_the_second_takes_over_when_the_first_dies() {
    let world = World::new();
    world.prepare(&world.orders());
    let channel = world.broker.channel();
    channel.queue_delete(ORDERS, Default::default()).unwrap();
    let text = |text: &str| AmqpValue::LongString(text.to_owned());
    let options = QueueDeclareOptions {
        durable: true,
        arguments: FieldTable::from([
            ("x-queue-type".to_owned(), text("quorum")),
            (
                "x-single-active-consumer".to_owned(),
                AmqpValue::Boolean(true),
            ),
        ]),
        ..QueueDeclareOptions::default()
    };
    channel.queue_declare(ORDERS, options).unwrap();
    let orders = Consumer::orders().set("topology.mode", "none");
    let config = world.config().consumer(orders);
    let first = world.run(&config);
    let second = world.run(&config);
    world.broker.send(ORDERS, numbered("one", 500));
    world.wait_for_effects(500);
    first.kill();
    world.broker.send(ORDERS, numbered("two", 500));
    world.wait_for_effects(1_000);
    eventually("the queue is settled", || {
        let path = format!("/api/queues/{}/{ORDERS}", world.name());
        world.management.get(&path)["messages"].as_u64() == Some(0)
    });
    second.stop();
    world.assert_each_applied_once(&[numbered_ids("one", 500), numbered_ids("two", 500)].concat());
}

#[test]
fn a_dead_letter_exchange_that_leads_back_to_the_work_queue_is_told_and_no_probe_is_dead_lettered()
{
    let world = World::new();
    world.prepare(&world.orders());
    let channel = world.broker.channel();
    let bound = channel.queue_bind(ORDERS, "orders.dlx", "", FieldTable::new());
    bound.unwrap();
    let orders = Consumer::orders()
        .set("topology.mode", "none")
        .set("topology.dead_letters", "publish");
    let config = world.config().consumer(orders);
    let first = world.run(&config);
    // The probe of the second finds the first one consuming.
    let second = world.run(&config);
    eventually("one of them got the probe", || {
        let told = ["ERROR", "dead letters come straight back"];
        first.logged(&told) || second.logged(&told)
    });
    world.broker.send(ORDERS, [Msg::new("m")]);
    world.wait_for_effects(1);
    second.stop();
    world.drain_with(first, &config, ORDERS);
    assert_eq!(world.db.count("select count(*) from ackonce.failure"), 0);
}

#[test]
fn a_delivery_held_for_longer_than_the_broker_allows_closes_the_channel_and_is_applied_once() {
    let broker = PrivateBroker::start(1);
    broker.ctl(
        0,
        &[
            "eval",
            "application:set_env(rabbit, consumer_timeout, 2000), \
             application:set_env(rabbit, channel_tick_interval, 500), \
             application:set_env(rabbit, quorum_tick_interval, 500).",
        ],
    );
    let world = World::on(&broker);
    world.db.execute("create table pause (seconds float)");
    world.db.execute("insert into pause values (600)");
    let orders = Consumer::orders()
        .sql(
            "insert into effect (message_id) select message_id from message; \
             select pg_sleep(seconds) from pause",
        )
        .set("batch_max", 1)
        .set("workers", 2);
    let config = world
        .config()
        .set("postgres.statement_timeout", "15m")
        .set("postgres.idle_in_transaction_timeout", "15m")
        .consumer(orders);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("m", 20));
    // RabbitMQ 3.10 closes the channel, 4.3 cancels the consumer.
    daemon.wait_for_log(&["lost the broker", "held for longer", "consumer_timeout"]);
    world.db.execute("delete from pause");
    world.db.execute(
        "select pg_cancel_backend(pid) from pg_stat_activity \
         where datname = current_database() and wait_event = 'PgSleep'",
    );
    world.wait_for_effects(20);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 20));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

/// Longest that a stop may take while the broker is frozen: see
/// `tests/it/shutdown.rs`.
const STOP_WITHIN: Duration = Duration::from_secs(4);

fn assert_stops_at_once(mut daemon: Daemon, when: &str) {
    let since = Instant::now();
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait();
    let took = since.elapsed();
    assert_eq!(status.code(), Some(0), "{when}: {status}");
    assert!(took < STOP_WITHIN, "{when}: the stop took {took:?}");
    eprintln!("{when}: stopped in {took:?}");
}

#[test]
fn a_broker_that_freezes_is_found_out_without_heartbeats_of_its_own_and_holds_up_no_stop() {
    const SENT: usize = 10_000;
    let broker = PrivateBroker::start(1);
    broker.ctl(0, &["eval", "application:set_env(rabbit, heartbeat, 0)."]);
    let world = World::on(&broker);
    let orders = Consumer::orders().set("batch_max", 50).set("prefetch", 200);
    let config = world
        .config()
        .set("broker.heartbeat", "5s")
        .set("broker.connect_timeout", "2s")
        .consumer(orders);
    let found_out = world.run(&config);
    let idle = world.run(&config);
    broker.freeze(0);
    assert_stops_at_once(idle, "frozen while idle");
    let connecting = world.daemon(&config).start();
    connecting.wait_for_log(&["lost the broker", "timed out in the login"]);
    assert_stops_at_once(connecting, "frozen while connecting");
    found_out.wait_for_log(&["missed heartbeats", "frozen or overloaded"]);
    broker.thaw(0);
    consumes_again(&found_out, 1);

    world.broker.send(ORDERS, numbered("m", SENT));
    world.wait_for_effects(500);
    broker.freeze(0);
    assert_stops_at_once(found_out, "frozen under load");
    broker.thaw(0);
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", SENT));
}

#[test]
fn a_broker_that_is_killed_under_load_is_found_again_and_nothing_is_lost() {
    const SENT: usize = 10_000;
    let broker = PrivateBroker::start(1);
    let mut world = World::on(&broker);
    // With the waits that are the default.
    let config = Consumer::orders().set("batch_max", 50).set("prefetch", 200);
    let config = world
        .config()
        .set("daemon.reconnect_min", "100ms")
        .set("daemon.reconnect_max", "3s")
        .consumer(config);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("m", SENT));
    world.wait_for_effects(500);
    broker.kill(0);
    daemon.wait_for_log(&["lost the broker"]);
    let before = daemon.times_consuming(ORDERS);
    broker.revive();
    let since = Instant::now();
    consumes_again(&daemon, before);
    eprintln!("consuming {:?} after the broker answered", since.elapsed());
    world.look_through(&broker, 0);
    world.wait_for_effects(SENT as i64);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", SENT));
}
