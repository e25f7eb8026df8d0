//! The connection to the broker is lost, in every way there is, and found
//! again: several URLs, half-open lines, frames that nobody can read.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::common::{
    Config, Consumer, Msg, ORDERS, ORDERS_DEAD, Wire, World, eventually, numbered, numbered_ids,
    run_ackonce, try_eventually, wire,
};

/// A port that does `act` with each connection.
fn listener(act: impl Fn(TcpStream) + Send + Clone + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let act = act.clone();
            std::thread::spawn(move || act(client));
        }
    });
    port
}

fn closed_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn with_urls(config: &Config, urls: &[&str]) -> Config {
    config.clone().set("broker.url", urls.to_vec())
}

#[test]
fn the_urls_are_tried_in_turn_past_those_that_refuse_say_nothing_or_trickle() {
    let world = World::new();
    let silent = listener(|client| {
        std::thread::park_timeout(Duration::from_secs(600));
        drop(client);
    });
    let trickling = listener(|mut client| {
        let mut bytes = [1, 0, 0, 0, 0, 2, 0]
            .into_iter()
            .chain(std::iter::repeat(0));
        while client.write_all(&[bytes.next().unwrap()]).is_ok() {
            std::thread::park_timeout(Duration::from_secs(1));
        }
    });
    let at = |port: u16| format!("amqp://u:hunter2@127.0.0.1:{port}/v");
    let (refused, silent, trickling) = (at(closed_port()), at(silent), at(trickling));
    let config = world.orders().set("broker.connect_timeout", "1s");
    let config = with_urls(&config, &[&refused, &silent, &trickling, world.amqp_url()]);
    world.broker.declare("elsewhere");
    let daemon = world.run(&config);
    assert!(!daemon.logged(&["lost the broker"]), "it was one round");
    world.broker.send(ORDERS, numbered("m", 10));
    world.wait_for_effects(10);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 10));

    // `check` tells of each, without a password.
    let path = world.write("check.toml", &config.text());
    let output = run_ackonce(&["check".as_ref(), "--config".as_ref(), path.as_os_str()]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
    assert_eq!(said.matches("warning  RabbitMQ:").count(), 3, "{said}");
    assert_eq!(
        said.matches("ok       RabbitMQ: version").count(),
        1,
        "{said}"
    );
}

#[test]
fn when_no_url_is_of_use_each_is_named_once_and_no_password() {
    let world = World::new();
    let (one, two) = (closed_port(), closed_port());
    let at = |port: u16| format!("amqp://u:hunter2@127.0.0.1:{port}/v");
    let config = with_urls(&world.orders(), &[&at(one), &at(two)]);
    let daemon = world.daemon(&config).start();
    daemon.wait_for_log(&[
        "none of the 2 URLs",
        &format!(":{one}/v"),
        &format!(":{two}/v"),
    ]);
    // The second try says the same; then it is told ever more rarely.
    eventually("it tries again and again", || {
        daemon.count_logged(&["lost the broker", "4 tries"]) == 1
    });
    assert!(!daemon.logged(&["hunter2"]));
    assert!(daemon.count_logged(&["lost the broker"]) <= 4);
    daemon.stop();
}

/// Fails the first attempt of each message whose id begins with `bad`.
fn make_fail_once(world: &World) {
    world.db.execute(
        "create function fail_once(id text, attempt int) returns text \
         language plpgsql as $$ begin if attempt = 1 and id like 'bad%' then \
         raise exception 'not yet' using errcode = '23503'; end if; return id; end $$",
    );
}

#[test]
fn when_one_url_is_gone_consuming_and_retries_go_on_over_the_next_and_back() {
    let world = World::new();
    make_fail_once(&world);
    let wires = [
        Wire::before(world.amqp_url()),
        Wire::before(world.amqp_url()),
    ];
    let orders = Consumer::orders()
        .sql("insert into effect (message_id) select fail_once(message_id, attempt) from message")
        .set("retry.breaker", 0)
        .backoff(&["100ms"]);
    let config = with_urls(
        &world.config().consumer(orders),
        &[wires[0].url(), wires[1].url()],
    );
    let daemon = world.run(&config);
    assert_eq!(wires[1].accepted(), 0, "the first one comes first");
    let mut ids = Vec::new();
    for turn in 0..4 {
        wires[(turn + 1) % 2].behave();
        wires[turn % 2].refuse(true);
        let before = daemon.times_consuming(ORDERS);
        eventually("it consumes over the other one", || {
            daemon.times_consuming(ORDERS) > before
        });
        let prefix = format!("bad-{turn}");
        world.broker.send(ORDERS, numbered(&prefix, 20));
        ids.extend(numbered_ids(&prefix, 20));
        world.wait_for_effects(ids.len() as i64);
    }
    assert!(
        wires.iter().all(|wire| wire.accepted() >= 4),
        "both were used"
    );
    wires[1].behave();
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_line_that_swallows_everything_is_found_out_by_its_heartbeats() {
    let world = World::new();
    let wire = Wire::before(world.amqp_url());
    let config = world
        .orders()
        .set("broker.url", wire.url())
        .set("broker.heartbeat", "5s");
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("before", 10));
    world.wait_for_effects(10);
    wire.swallow_now();
    world.broker.send(ORDERS, numbered("after", 10));
    eventually("it consumes over a new connection", || {
        daemon.times_consuming(ORDERS) == 2
    });
    daemon.wait_for_log(&["lost the broker", "missed heartbeats", "network swallows"]);
    // The broker finds the old connection dead in its own time.
    wire.cut();
    world.wait_for_effects(20);
    world.drain_with(daemon, &config, ORDERS);
    let ids = [numbered_ids("before", 10), numbered_ids("after", 10)].concat();
    world.assert_each_applied_once(&ids);
}

#[test]
fn a_call_that_gets_no_answer_is_given_up_and_tried_over_a_new_connection() {
    let world = World::new();
    world.prepare(&world.orders());
    std::thread::scope(|scope| {
        for method in [wire::OPEN, wire::QUEUE_DECLARE, wire::CONSUME] {
            let world = &world;
            scope.spawn(move || {
                let wire = Wire::before(world.amqp_url());
                wire.swallow_at(method);
                let config = world
                    .orders()
                    .set("broker.url", wire.url())
                    .set("broker.connect_timeout", "1s");
                let daemon = world.daemon(&config).start();
                wire.wait_for_swallowed(1);
                wire.behave();
                daemon.wait_until_consuming();
                assert!(daemon.logged(&["lost the broker"]), "{method:?}");
                daemon.stop();
            });
        }
    });
}

#[test]
fn frames_that_nobody_can_read_again_and_again_are_met_with_growing_waits_and_named() {
    let world = World::new();
    let wire = Wire::before(world.amqp_url());
    let config = world
        .orders()
        .set("broker.url", wire.url())
        .set("daemon.reconnect_min", "100ms")
        .set("daemon.reconnect_max", "2s");
    world.prepare(&config);
    world.broker.send(ORDERS, numbered("m", 20));
    wire.garble_deliveries(true);
    let before = wire.accepted();
    let since = Instant::now();
    let daemon = world.daemon(&config).start();
    daemon.wait_for_log(&[
        "method 60.61 is unknown",
        "the last 8 tries",
        "head of the queue",
    ]);
    let (tries, took) = (wire.accepted() - before, since.elapsed());
    assert!(wire.garbled() >= 8);
    // Told at the first, second, fourth and eighth.
    assert!(daemon.count_logged(&["lost the broker"]) <= 5);
    // Without the waits that grow there would be dozens a second.
    assert!(
        tries <= 8 + 2 * took.as_secs() as usize,
        "{tries} in {took:?}"
    );
    assert_eq!(world.db.effect_count(), 0);
    wire.behave();
    world.wait_for_effects(20);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 20));
}

#[test]
fn a_connection_that_is_cut_again_and_again_but_was_of_use_keeps_the_waits_short() {
    let world = World::new();
    let wire = Wire::before(world.amqp_url());
    // Were the waits to grow, the tenth would be of half an hour.
    let config = world
        .orders()
        .set("broker.url", wire.url())
        .set("daemon.reconnect_min", "100ms")
        .set("daemon.reconnect_max", "10m");
    let daemon = world.run(&config);
    let mut ids = Vec::new();
    for turn in 0..15 {
        let prefix = format!("m-{turn}");
        world.broker.send(ORDERS, numbered(&prefix, 5));
        ids.extend(numbered_ids(&prefix, 5));
        world.wait_for_effects(ids.len() as i64);
        eventually("the queue is settled", || {
            let path = format!("/api/queues/{}/{ORDERS}", world.name());
            let queue = world.management.get(&path);
            queue["messages"].as_u64() == Some(0)
        });
        let before = daemon.times_consuming(ORDERS);
        wire.cut();
        eventually("it consumes again", || {
            daemon.times_consuming(ORDERS) > before
        });
    }
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&ids);
}

#[test]
fn five_daemons_that_come_and_go_at_will_apply_each_message_once() {
    const SENT: usize = 6_000;
    let world = World::new();
    let orders = Consumer::orders().set("batch_max", 20).set("prefetch", 100);
    let config = world.config().consumer(orders);
    world.prepare(&config);
    let mut daemons: Vec<_> = (0..5).map(|_| world.run(&config)).collect();
    let sender = std::thread::scope(|scope| {
        scope.spawn(|| {
            for part in 0..SENT / 200 {
                world
                    .broker
                    .send(ORDERS, numbered(&format!("m{part}"), 200));
                // Every twentieth once more.
                let again = (0..10).map(|n| Msg::new(&format!("m{part}-{}", n * 20)));
                world.broker.send(ORDERS, again);
            }
        });
        let mut churned = 0;
        while world.db.effect_count() < SENT as i64 {
            let daemon = daemons.remove(0);
            match churned % 3 {
                0 => daemon.kill(),
                _ => daemon.stop(),
            }
            daemons.push(world.daemon(&config).start());
            churned += 1;
            // What a killed one held comes back once its lease has run out.
            let done = || world.db.effect_count() >= SENT as i64;
            try_eventually(Duration::from_millis(300), done);
        }
        churned
    });
    eprintln!("{sender} daemons were ended");
    assert!(sender >= 5, "only {sender} daemons were ended");
    let last = daemons.pop().unwrap();
    last.wait_until_consuming();
    daemons.into_iter().for_each(crate::common::Daemon::kill);
    world.drain_with(last, &config, ORDERS);
    let ids: Vec<_> = (0..SENT / 200)
        .flat_map(|part| numbered_ids(&format!("m{part}"), 200))
        .collect();
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}

#[test]
fn a_queue_that_was_deleted_is_made_again_and_dead_letters_have_somewhere_to_go_again() {
    let world = World::new();
    let orders = Consumer::orders()
        .sql(crate::common::RECORD_AMOUNT)
        .set("topology.dead_letters", "publish");
    let config = world.config().consumer(orders);
    let daemon = world.run(&config);
    let channel = world.broker.channel();
    // Everything around the work queue goes, under the daemon.
    for queue in [ORDERS_DEAD, "orders.retry.100ms"] {
        channel.queue_delete(queue, Default::default()).unwrap();
    }
    let bad = |id: &str| Msg::new(id).json(&serde_json::json!({ "amount": "no number" }));
    world.broker.send(ORDERS, [bad("bad-1")]);
    daemon.wait_for_log(&["copies of messages wait"]);
    // A quorum queue that is just being made breaks the connection of whoever
    // gets from it, so the statistics are asked first.
    eventually("the dead letter is in its queue", || {
        let path = format!("/api/queues/{}/{ORDERS_DEAD}", world.name());
        let queue = world.management.download(&path).unwrap_or_default();
        let queue: serde_json::Value = serde_json::from_slice(&queue).unwrap_or_default();
        queue["messages"].as_u64() == Some(1)
    });
    assert_eq!(
        world.broker.wait_for_dead(ORDERS_DEAD, 1)[0].id(),
        Some("bad-1")
    );
    // Without its exchange, the broker closes the channel.
    channel.exchange_delete("orders.dlx", false).unwrap();
    world.broker.send(ORDERS, [bad("bad-2")]);
    assert_eq!(
        world.broker.wait_for_dead(ORDERS_DEAD, 2)[1].id(),
        Some("bad-2")
    );
    assert_eq!(
        daemon.times_consuming(ORDERS),
        1,
        "its own connection stands"
    );
    channel.queue_delete(ORDERS, Default::default()).unwrap();
    daemon.wait_for_log(&[
        "lost the broker",
        "the broker cancelled the consumer",
        "was deleted",
    ]);
    eventually("it consumes again", || daemon.times_consuming(ORDERS) == 2);
    world.broker.send(ORDERS, [Msg::new("good")]);
    world.wait_for_effects(1);
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&["good"]);
}
