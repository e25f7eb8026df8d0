//! What goes on while an alarm on the broker blocks those who publish, or its
//! limits change. Both are the whole broker's: these tests have one beside the
//! shared one, in turn.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::time::{Duration, Instant};

use amiquip::AmqpValue;
use nix::sys::signal::Signal;

use crate::common::letters::{judged, kill_messages, mend, wait_for_letters};
use crate::common::{
    Consumer, DEADLINE, Msg, ORDERS, ORDERS_DEAD, PrivateBroker, Tool, World, eventually, numbered,
    numbered_ids,
};
use crate::topology::stage::{Stage, foreign, orders};

#[test]
fn an_alarm_on_the_broker_stops_nobody_whose_dead_letters_are_kept_anyway() {
    let broker = PrivateBroker::in_turn();
    let mut stage = Stage::on(&broker);
    let classic = || {
        Consumer::new("c")
            .set("topology.mode", "verify")
            .set("topology.queue_type", "classic")
            .set("topology.dead_letters", "reject")
    };
    stage.prepare(Consumer::orders()).unwrap();
    stage
        .prepare(classic().set("topology.mode", "declare"))
        .unwrap();
    stage.world.broker.send(ORDERS, [Msg::new("one")]);
    let alarm = Alarm::raise(&broker);
    stage.prepare(orders("verify", "quorum")).unwrap();
    stage.prepare(foreign()).unwrap();
    let error = stage.prepare(classic()).unwrap_err();
    assert!(error.to_string().contains("takes no messages"), "{error}");
    assert!(!error.is_config(), "an alarm passes");
    // The consumer's own connection goes on.
    let channel = stage.link.open_channel(DEADLINE).unwrap();
    let got = channel.basic_get(ORDERS, true).unwrap().unwrap();
    assert_eq!(got.delivery.properties.message_id().as_deref(), Some("one"));
    drop(channel);
    drop(alarm);
    eventually("the alarm is over", || stage.prepare(classic()).is_ok());
}

/// An alarm, as long as this lives. It ends by itself too, should the test be
/// killed.
struct Alarm<'b> {
    broker: &'b PrivateBroker,
    end: &'static str,
}

impl Alarm<'_> {
    /// `raise` and `end` are Erlang expressions.
    fn raise_with<'b>(broker: &'b PrivateBroker, raise: &str, end: &'static str) -> Alarm<'b> {
        broker.evaluate(&format!(
            "{raise}, {{ok, Timer}} = timer:apply_after(60000, erlang, apply, \
             [fun() -> {end} end, []]), persistent_term:put(ackonce_alarm, Timer)."
        ));
        Alarm { broker, end }
    }

    fn raise(broker: &PrivateBroker) -> Alarm<'_> {
        Self::raise_with(
            broker,
            "rabbit_alarm:set_alarm({{resource_limit, memory, node()}, []})",
            "rabbit_alarm:clear_alarm({resource_limit, memory, node()})",
        )
    }

    /// As the broker raises it itself, when less than a petabyte is free. Where
    /// it cannot find out how much is free, in a chroot without /proc, the
    /// alarm is raised for it.
    fn raise_for_disk(broker: &PrivateBroker) -> Alarm<'_> {
        let alarm = Self::raise_with(
            broker,
            "case rabbit_disk_monitor:get_disk_free() of Free when is_number(Free) -> \
             rabbit_disk_monitor:set_disk_free_limit(1000000000000000); \
             _ -> rabbit_alarm:set_alarm({{resource_limit, disk, node()}, []}) end",
            "rabbit_disk_monitor:set_disk_free_limit(50000000), \
             rabbit_alarm:clear_alarm({resource_limit, disk, node()})",
        );
        let alarms = "[N || {{resource_limit, disk, N}, _} <- rabbit_alarm:get_alarms()].";
        eventually("the disk alarm is raised", || {
            broker.evaluate(alarms) != "[]"
        });
        alarm
    }
}

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        // Its timer would end the alarm of a later test.
        let cancel = "timer:cancel(persistent_term:get(ackonce_alarm))";
        self.broker.evaluate(&format!("{}, {cancel}.", self.end));
    }
}

/// A `max_message_size`, as long as this lives.
struct MessageSize<'b> {
    broker: &'b PrivateBroker,
    before: String,
}

impl<'b> MessageSize<'b> {
    fn limit(broker: &'b PrivateBroker, bytes: usize) -> Self {
        let before = "element(2, application:get_env(rabbit, max_message_size))";
        let before = format!("persistent_term:get(max_message_size, {before}).");
        let before = broker.evaluate(&before);
        let limit = Self { broker, before };
        limit.set(&bytes.to_string());
        limit
    }

    /// RabbitMQ 3.10 reads the one, 4.3 the other.
    fn set(&self, bytes: &str) {
        self.broker.evaluate(&format!(
            "application:set_env(rabbit, max_message_size, {bytes}), \
             persistent_term:put(max_message_size, {bytes})."
        ));
    }
}

impl Drop for MessageSize<'_> {
    fn drop(&mut self) {
        self.set(&self.before);
    }
}

#[test]
fn a_copy_that_the_broker_will_not_have_is_dead_lettered_and_its_neighbours_are_retried() {
    let broker = PrivateBroker::in_turn();
    for dead_letters in ["reject", "publish"] {
        let world = World::on(&broker);
        make_fail_once(&world);
        let orders = Consumer::orders()
            .sql(FAIL_ONCE)
            .set("retry.breaker", 0)
            .set("topology.dead_letters", dead_letters)
            .backoff(&["100ms"]);
        let config = world.config().consumer(orders);
        world.prepare(&config);
        let large = serde_json::json!({ "padding": "x".repeat(50_000) });
        world.broker.send(ORDERS, numbered("bad-small", 10));
        world
            .broker
            .send(ORDERS, [Msg::new("bad-large").json(&large)]);
        world.broker.send(ORDERS, numbered("bad-later", 10));
        let limit = MessageSize::limit(&broker, 10_000);
        let daemon = world.run(&config);
        world.wait_for_effects(20);
        if dead_letters == "publish" {
            // Nothing more can be taken from it. It waits until it is let in.
            eventually("it is held", || unacked(&world) == 1);
            drop(limit);
        }
        let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
        assert_eq!(dead[0].id(), Some("bad-large"));
        world.drain_with(daemon, &config, ORDERS);
        let ids = [numbered_ids("bad-small", 10), numbered_ids("bad-later", 10)].concat();
        world.assert_each_applied_once(&ids);
    }
}

/// What the broker offers to new connections, until this is dropped.
struct Offer<'b>(&'b PrivateBroker);

impl<'b> Offer<'b> {
    fn of(broker: &'b PrivateBroker, frame_max: u32, channel_max: u16, heartbeat: u16) -> Self {
        broker.evaluate(&format!(
            "application:set_env(rabbit, frame_max, {frame_max}), \
             application:set_env(rabbit, channel_max, {channel_max}), \
             application:set_env(rabbit, heartbeat, {heartbeat})."
        ));
        Self(broker)
    }
}

impl Drop for Offer<'_> {
    fn drop(&mut self) {
        std::mem::forget(Self::of(self.0, 131_072, 2_047, 60));
    }
}

#[test]
fn with_small_frames_few_channels_and_no_heartbeat_a_header_that_fills_a_frame_holds_up_nobody() {
    let broker = PrivateBroker::in_turn();
    for dead_letters in ["reject", "publish"] {
        let world = World::on(&broker);
        make_fail_once(&world);
        let orders = Consumer::orders()
            .sql(FAIL_ONCE)
            .set("retry.breaker", 0)
            .set("topology.dead_letters", dead_letters)
            .backoff(&["100ms"]);
        let config = world.config().consumer(orders);
        world.prepare(&config);
        let _offer = Offer::of(&broker, 8_192, 2, 0);
        // With the daemon's own headers a copy would not fit.
        let filling = AmqpValue::LongString("x".repeat(8_100));
        world.broker.send(ORDERS, numbered("bad-small", 10));
        let large = Msg::new("bad-large").header("h", filling);
        world.broker.send(ORDERS, [large]);
        world.broker.send(ORDERS, numbered("bad-later", 10));
        let daemon = world.run(&config);
        world.wait_for_effects(20);
        let dead = world.broker.wait_for_dead(ORDERS_DEAD, 1);
        assert_eq!(dead[0].id(), Some("bad-large"));
        assert!(!daemon.logged(&["copies of messages wait"]));
        assert!(!daemon.logged(&["lost the broker"]));
        world.drain_with(daemon, &config, ORDERS);
        let ids = [numbered_ids("bad-small", 10), numbered_ids("bad-later", 10)].concat();
        world.assert_each_applied_once(&ids);
    }
}

/// Fails with SQLSTATE `23503` the first time, and for good ids never.
const FAIL_ONCE: &str = "insert into effect (message_id) \
    select fail_once(message_id, attempt) from message";

fn make_fail_once(world: &World) {
    world.db.execute(
        "create function fail_once(id text, attempt int) returns text \
         language plpgsql as $$ begin if attempt = 1 and id like 'bad%' then \
         raise exception 'not yet' using errcode = '23503'; end if; return id; end $$",
    );
}

#[test]
fn during_a_memory_alarm_retries_wait_unacknowledged_and_all_else_goes_on() {
    retries_wait_while(Alarm::raise);
}

#[test]
fn during_a_disk_alarm_retries_wait_unacknowledged_and_all_else_goes_on() {
    retries_wait_while(Alarm::raise_for_disk);
}

fn retries_wait_while(raise: fn(&PrivateBroker) -> Alarm<'_>) {
    let broker = PrivateBroker::in_turn();
    let world = World::on(&broker);
    make_fail_once(&world);
    let orders = Consumer::orders()
        .sql(FAIL_ONCE)
        .set("retry.breaker", 0)
        .backoff(&["100ms"]);
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    world.broker.send(ORDERS, [Msg::new("bad-before")]);
    world.wait_for_effects(1);
    daemon.signal(Signal::SIGSTOP);
    let messages = numbered("bad", 20).into_iter().chain(numbered("good", 500));
    world.broker.send(ORDERS, messages);
    let alarm = raise(&broker);
    daemon.signal(Signal::SIGCONT);
    // Applied and acked, although the broker takes no message.
    world.wait_for_effects(501);
    eventually("what fails is held", || unacked(&world) == 20);
    assert_eq!(world.broker.ready("orders.retry.100ms"), 0);
    drop(alarm);
    world.wait_for_effects(521);
    world.drain_with(daemon, &config, ORDERS);
    let ids: Vec<String> = [numbered_ids("bad", 20), numbered_ids("good", 500)].concat();
    let ids: Vec<&str> = ids
        .iter()
        .map(String::as_str)
        .chain(["bad-before"])
        .collect();
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn during_an_alarm_dead_letters_that_the_daemon_publishes_wait_and_all_else_goes_on() {
    let broker = PrivateBroker::in_turn();
    for raise in [Alarm::raise, Alarm::raise_for_disk] {
        let world = World::on(&broker);
        let orders = Consumer::orders()
            .sql(crate::common::RECORD_AMOUNT)
            .set("topology.dead_letters", "publish");
        let config = world.config().consumer(orders);
        let daemon = world.run(&config);
        daemon.signal(Signal::SIGSTOP);
        let bad = |id: &String| Msg::new(id).json(&serde_json::json!({ "amount": "x" }));
        let ids = numbered_ids("bad", 20);
        world.broker.send(ORDERS, ids.iter().map(bad));
        world.broker.send(ORDERS, numbered("good", 500));
        let alarm = raise(&broker);
        daemon.signal(Signal::SIGCONT);
        world.wait_for_effects(500);
        eventually("dead letters are held", || unacked(&world) == 20);
        assert!(world.broker.is_empty(ORDERS_DEAD));
        drop(alarm);
        world.broker.wait_for_dead(ORDERS_DEAD, 20);
        world.drain_with(daemon, &config, ORDERS);
        world.assert_each_applied_once(&numbered_ids("good", 500));
        assert_eq!(world.broker.dead(ORDERS_DEAD).len(), 20, "each once");
    }
}

#[test]
fn a_stop_during_an_alarm_gives_back_what_waits_for_its_retry() {
    let broker = PrivateBroker::in_turn();
    let world = World::on(&broker);
    make_fail_once(&world);
    let orders = Consumer::orders()
        .sql(FAIL_ONCE)
        .set("retry.breaker", 0)
        .backoff(&["100ms"]);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    world.broker.send(ORDERS, numbered("bad", 20));
    let alarm = Alarm::raise(&broker);
    let daemon = world.run(&config);
    eventually("what fails is held", || {
        world.db.count("select count(*) from ackonce.failure") >= 20
    });
    let since = Instant::now();
    daemon.stop();
    assert!(
        since.elapsed() < Duration::from_secs(10),
        "it took too long"
    );
    eventually("they are back", || world.broker.ready(ORDERS) == 20);
    drop(alarm);
    // Their attempts were not counted: with the first of the next daemon they
    // fail once more, and are applied with the second.
    let daemon = world.run(&config);
    world.wait_for_effects(20);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("bad", 20));
    let firsts = "select count(*) from ackonce.failure where attempt = 1";
    assert_eq!(world.db.count(firsts), 40);
}

/// Deliveries of the work queue that are not acknowledged, as the broker
/// counts them.
fn unacked(world: &World) -> u64 {
    let path = format!("/api/queues/{}/{ORDERS}", world.name());
    let queue = world.management.get(&path);
    queue["messages_unacknowledged"].as_u64().unwrap_or(0)
}

#[test]
fn a_replay_that_an_alarm_holds_up_ends_by_itself_and_loses_no_letter() {
    let broker = PrivateBroker::in_turn();
    let world = World::on(&broker);
    let config = judged(&world, "quorum", "reject");
    kill_messages(&world, &config, 20);
    mend(&world);
    let alarm = Alarm::raise(&broker);
    let replay = || Tool::new(&world, &config, &["replay", ORDERS, "--yes"]);
    let held_up = replay().start();
    held_up.wait().expect(75).says(&["is there an alarm on it"]);
    wait_for_letters(&world, 20);
    drop(alarm);
    // What the broker had taken off the wire it may let through now.
    replay().run().expect(0);
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 20));
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_letter_that_the_broker_will_not_have_is_named_and_its_neighbours_are_replayed() {
    let broker = PrivateBroker::in_turn();
    let world = World::on(&broker);
    let config = judged(&world, "quorum", "reject");
    let daemon = world.run(&config);
    let long = |id: &str| Msg::new(id).body(format!("\"{}\"", "x".repeat(400_000)));
    let letters = [Msg::new("m-0"), long("m-long"), Msg::new("m-1")];
    world.broker.send(ORDERS, letters);
    wait_for_letters(&world, 3);
    daemon.stop();
    mend(&world);
    let limit = MessageSize::limit(&broker, 300_000);
    let replay = || Tool::new(&world, &config, &["replay", ORDERS, "--yes"]);
    let ended = replay().run().expect(1);
    ended.says(&["left m-long", "replayed 2", "unfit 1"]);
    wait_for_letters(&world, 1);
    drop(limit);
    replay().run().expect(0);
    world.drain(&config, ORDERS);
    world.assert_each_applied_once(&["m-0", "m-1", "m-long"]);
}
