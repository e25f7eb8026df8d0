//! Redis goes wrong in every way there is: the worker goes on with the ledger
//! alone, says so once, and comes back by itself. Nothing is lost, nothing is
//! applied twice.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::common::{
    Config, Consumer, Daemon, Msg, ORDERS, ORDERS_DEAD, Proxy, RedisServer, World, eventually,
    numbered, numbered_ids,
};

const LOST: &str = "Redis cannot be used";
const BACK: &str = "Redis is back";
/// Messages of each of the three parts of a test: before, while and after
/// Redis is away.
const PART: usize = 300;

/// A daemon whose claims are in a Redis of the test's own.
struct Stage {
    world: World,
    redis: RedisServer,
    config: Config,
    daemon: Daemon,
    sent: Vec<String>,
}

impl Stage {
    fn new() -> Self {
        Self::with(RedisServer::start(), |config, _| config)
    }

    fn with(redis: RedisServer, configure: impl FnOnce(Config, &RedisServer) -> Config) -> Self {
        let world = World::new();
        let config = world
            .config()
            .set("redis.url", redis.url())
            .set("redis.timeout", "1s")
            .consumer(Consumer::orders());
        let config = configure(config, &redis);
        let daemon = world.run(&config);
        Self {
            world,
            redis,
            config,
            daemon,
            sent: Vec::new(),
        }
    }

    /// Sends [`PART`] new messages and as many copies of older ones, and waits
    /// until the new ones are applied.
    fn apply(&mut self, part: &str) {
        let copies: Vec<String> = self.sent.iter().take(PART).cloned().collect();
        self.world.broker.send(ORDERS, numbered(part, PART));
        let copies = copies.iter().map(|id| Msg::new(id));
        self.world.broker.send(ORDERS, copies);
        self.sent.extend(numbered_ids(part, PART));
        self.world.wait_for_effects(self.sent.len() as i64);
    }

    fn lost(&self) -> usize {
        self.daemon.count_logged(&[LOST])
    }

    fn back(&self) -> usize {
        self.daemon.count_logged(&[BACK])
    }

    /// Waits until Redis has been left for `cause` and messages have gone
    /// through without it.
    fn is_without(&mut self, cause: &str) {
        self.apply("without");
        self.daemon.wait_for_log(&[LOST, cause]);
    }

    /// Panics unless it comes back, claims again, and said so once.
    fn comes_back(mut self) {
        eventually("it is back", || self.back() == self.lost());
        self.apply("after");
        eventually("there are marks again", || {
            self.redis.count_marks("*:after-*") == PART
        });
        assert_eq!((self.lost(), self.back()), (1, 1));
        self.ends_well();
    }

    fn ends_well(self) {
        let world = &self.world;
        world.drain_with(self.daemon, &self.config, ORDERS);
        world.assert_each_applied_once(&self.sent);
        assert!(world.broker.is_empty(ORDERS_DEAD));
    }
}

/// Breaks Redis by one command and mends it by another.
fn survives(breaking: &[&[&str]], cause: &str, mending: &[&[&str]]) {
    let mut stage = Stage::new();
    stage.apply("before");
    breaking.iter().for_each(|words| {
        stage.redis.run(words);
    });
    stage.is_without(cause);
    mending.iter().for_each(|words| {
        stage.redis.run(words);
    });
    stage.comes_back();
}

#[test]
fn redis_that_is_not_there_at_the_start_is_used_once_it_is() {
    let mut stage = Stage::with(RedisServer::absent(), |config, _| config);
    stage.is_without("refused");
    stage.redis.start_again(&[]);
    stage.comes_back();
}

#[test]
fn redis_that_is_killed_under_load_is_used_again_when_it_is_back() {
    let mut stage = Stage::new();
    stage.apply("before");
    stage.redis.kill();
    // Who was asking it at that moment says that it was cut off.
    stage.is_without("onnection re");
    stage.redis.start_again(&[]);
    stage.comes_back();
}

#[test]
fn redis_that_is_restarted_at_once_costs_no_switch() {
    // No worker that is kept from running for a moment gives Redis up.
    let patient = |config: Config, _: &RedisServer| config.set("redis.timeout", "5s");
    let mut stage = Stage::with(RedisServer::start(), patient);
    stage.apply("before");
    // Nobody is in the middle of asking when it is killed.
    eventually("all is marked", || {
        stage.redis.count_marks("*:before-*") == PART
    });
    stage.redis.kill();
    stage.redis.start_again(&[]);
    stage.apply("after");
    assert_eq!(stage.lost(), 0);
    assert!(stage.redis.count_keys("*:after-*") > 0);
    stage.ends_well();
}

#[test]
fn redis_that_is_frozen_costs_one_wait_and_not_one_for_each_message() {
    let world = World::new();
    let redis = RedisServer::start();
    let orders = Consumer::orders().set("workers", 1).set("batch_max", 256);
    // One wait for each message of a batch would be four minutes.
    let config = world
        .config()
        .set("redis.url", redis.url())
        .set("redis.timeout", "1s")
        .consumer(orders);
    world.prepare(&config);
    // While the only worker stands still, a whole batch gathers.
    let gate = world.gate();
    let daemon = world.daemon(&config).pauses_at("marked", 1, &gate).start();
    world.broker.send(ORDERS, numbered("before", PART));
    gate.wait_until_hit();
    world.broker.send(ORDERS, numbered("without", PART));
    eventually("they are taken", || world.broker.ready(ORDERS) == 0);
    redis.signal(Signal::SIGSTOP);
    gate.open();
    world.wait_for_effects(2 * PART as i64);
    daemon.wait_for_log(&[LOST, "no answer within 1s"]);
    assert_eq!(daemon.count_logged(&[LOST]), 1);
    redis.signal(Signal::SIGCONT);
    let sent = [numbered_ids("before", PART), numbered_ids("without", PART)].concat();
    let stage = Stage {
        world,
        redis,
        config,
        daemon,
        sent,
    };
    stage.comes_back();
}

#[test]
fn redis_that_is_too_slow_is_gone_without() {
    let redis = RedisServer::start();
    let proxy = Proxy::before(&redis.url(), 6379);
    let mut stage = Stage::with(redis, |config, _| config.set("redis.url", proxy.url()));
    stage.apply("before");
    proxy.delay(Duration::from_secs(2));
    stage.is_without("no answer within 1s");
    proxy.delay(Duration::ZERO);
    stage.comes_back();
}

#[test]
fn what_answers_garbage_in_the_place_of_redis_is_gone_without() {
    let redis = RedisServer::start();
    let proxy = Proxy::before(&redis.url(), 6379);
    let mut stage = Stage::with(redis, |config, _| config.set("redis.url", proxy.url()));
    stage.apply("before");
    proxy.talk_garbage(true);
    stage.is_without("does not speak Redis's protocol");
    proxy.talk_garbage(false);
    stage.comes_back();
}

#[test]
fn a_redis_that_became_a_replica_is_gone_without() {
    let replica: &[&[&str]] = &[&["REPLICAOF", "127.0.0.1", "1"]];
    survives(replica, "READONLY", &[&["REPLICAOF", "NO", "ONE"]]);
}

#[test]
fn a_replica_that_has_lost_its_master_is_gone_without() {
    survives(
        &[
            &["CONFIG", "SET", "replica-serve-stale-data", "no"],
            &["CONFIG", "SET", "replica-read-only", "no"],
            &["REPLICAOF", "127.0.0.1", "1"],
        ],
        "MASTERDOWN",
        &[&["REPLICAOF", "NO", "ONE"]],
    );
}

#[test]
fn a_redis_that_has_no_memory_left_is_gone_without() {
    survives(
        &[&["CONFIG", "SET", "maxmemory", "1"]],
        "OOM",
        &[&["CONFIG", "SET", "maxmemory", "0"]],
    );
}

#[test]
fn a_redis_that_is_busy_with_a_script_is_gone_without() {
    let mut stage = Stage::new();
    stage.apply("before");
    let redis = &stage.redis;
    redis.run(&["CONFIG", "SET", "busy-reply-threshold", "10"]);
    std::thread::scope(|scope| {
        scope.spawn(|| redis.command(&["EVAL", "while true do end", "0"]).is_ok());
        eventually("it is busy", || {
            let error = redis.command(&["PING"]).err();
            error.is_some_and(|e| e.to_string().contains("BUSY"))
        });
        stage_without(&stage.world, &mut stage.sent, &stage.daemon);
        redis.run(&["SCRIPT", "KILL"]);
    });
    stage.comes_back();
}

/// As [`Stage::is_without`] for BUSY, while the server is borrowed.
fn stage_without(world: &World, sent: &mut Vec<String>, daemon: &Daemon) {
    world.broker.send(ORDERS, numbered("without", PART));
    sent.extend(numbered_ids("without", PART));
    world.wait_for_effects(sent.len() as i64);
    daemon.wait_for_log(&[LOST, "BUSY"]);
}

#[test]
fn a_redis_that_pauses_its_clients_is_gone_without() {
    survives(&[&["CLIENT", "PAUSE", "3000", "ALL"]], "no answer", &[]);
}

#[test]
fn connections_that_are_killed_again_and_again_cost_no_switch() {
    let mut stage = Stage::new();
    for part in ["a", "b", "c", "d", "e"] {
        stage.redis.run(&["CLIENT", "KILL", "TYPE", "normal"]);
        stage.apply(part);
    }
    assert_eq!(stage.lost(), 0);
    assert_eq!(stage.redis.count_keys("*:e-*"), PART);
    stage.ends_well();
}

#[test]
fn a_password_that_redis_asks_for_all_at_once_is_named() {
    let mut stage = Stage::new();
    stage.apply("before");
    stage.redis.change_password("new");
    stage.is_without("NOAUTH");
    stage.redis.change_password("");
    stage.comes_back();
}

#[test]
fn a_password_that_was_changed_is_told_and_shown_to_nobody() {
    let mut redis = RedisServer::start();
    redis.change_password("sesame-1");
    let mut stage = Stage::with(redis, |config, _| config);
    stage.apply("before");
    stage.redis.change_password("sesame-2");
    stage.is_without("assword authentication failed");
    stage.redis.change_password("sesame-1");
    eventually("it is back", || stage.back() == 1);
    assert!(!stage.daemon.logged(&["sesame"]));
    stage.comes_back();
}

#[test]
fn a_redis_that_is_still_loading_is_gone_without() {
    let mut stage = Stage::new();
    stage.apply("before");
    stage.redis.run(&["DEBUG", "POPULATE", "20000"]);
    stage.redis.run(&["SAVE"]);
    stage.redis.kill();
    stage.redis.start_again(&[
        "--key-load-delay",
        "200",
        "--loading-process-events-interval-bytes",
        "1024",
    ]);
    stage.is_without("LOADING");
    stage.comes_back();
}

#[test]
fn a_redis_that_is_flushed_under_load_costs_no_switch() {
    let mut stage = Stage::new();
    for round in 0..10 {
        let part = format!("m{round}");
        stage.world.broker.send(ORDERS, numbered(&part, PART));
        let copies: Vec<Msg> = stage.sent.iter().map(|id| Msg::new(id)).collect();
        stage.world.broker.send(ORDERS, copies);
        stage.redis.run(&["FLUSHALL"]);
        stage.sent.extend(numbered_ids(&part, PART));
        stage.world.wait_for_effects(stage.sent.len() as i64);
    }
    assert_eq!(stage.lost(), 0);
    stage.ends_well();
}

#[test]
fn a_redis_that_evicts_what_it_was_told_costs_no_switch() {
    let mut stage = Stage::new();
    stage
        .redis
        .run(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
    let used = stage.redis.info("used_memory");
    let limit = (used + 200_000).to_string();
    stage.redis.run(&["CONFIG", "SET", "maxmemory", &limit]);
    for part in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        stage.apply(part);
    }
    assert!(stage.redis.info("evicted_keys") > 0);
    stage.ends_well();
}

#[test]
fn a_redis_that_fails_over_to_one_that_knows_nothing_costs_no_message() {
    let second = RedisServer::start();
    let first = RedisServer::start();
    let proxy = Proxy::before(&first.url(), 6379);
    let mut stage = Stage::with(first, |config, _| config.set("redis.url", proxy.url()));
    stage.apply("before");
    proxy.go_down();
    stage.is_without("");
    proxy.lead_to(&second.url(), 6379);
    proxy.come_up();
    stage.redis = second;
    stage.comes_back();
}

#[test]
fn each_consumer_tells_of_a_switch_once() {
    let redis = RedisServer::start();
    let mut stage = Stage::with(redis, |config, _| {
        config.consumer(Consumer::new("invoices").set("workers", 16))
    });
    stage.apply("before");
    stage.world.broker.send("invoices", numbered("i", 10));
    stage.world.wait_for_effects(PART as i64 + 10);
    stage.redis.kill();
    stage.world.broker.send("invoices", numbered("j", 500));
    stage.world.broker.send(ORDERS, numbered("k", 500));
    stage.world.wait_for_effects(PART as i64 + 1_010);
    for consumer in ["consumer=invoices", "consumer=orders"] {
        stage.daemon.wait_for_log(&[LOST, consumer]);
    }
    stage.redis.start_again(&[]);
    for consumer in ["consumer=invoices", "consumer=orders"] {
        stage.daemon.wait_for_log(&[BACK, consumer, "away_ms"]);
        assert_eq!(stage.daemon.count_logged(&[LOST, consumer]), 1);
        assert_eq!(stage.daemon.count_logged(&[BACK, consumer]), 1);
    }
    stage.daemon.stop();
}

#[test]
fn a_key_that_is_not_the_daemons_delays_nobody() {
    let world = World::new();
    let redis = RedisServer::start();
    let orders = Consumer::orders().set("workers", 1);
    let config = world
        .config()
        .set("redis.url", redis.url())
        .consumer(orders);
    world.prepare(&config);
    redis.run(&["LPUSH", &world.claim_key(ORDERS, "m-3"), "a list"]);
    redis.run(&["SET", &world.claim_key(ORDERS, "m-5"), "nonsense"]);
    redis.run(&["SET", &world.claim_key(ORDERS, "m-7"), "d:cut off"]);
    world.broker.send(ORDERS, numbered("m", 10));
    let daemon = world.run(&config);
    world.wait_for_effects(10);
    assert!(!daemon.logged(&[LOST]));
    world.drain_with(daemon, &config, ORDERS);
    world.assert_each_applied_once(&numbered_ids("m", 10));
    assert_eq!(redis.count_keys(&format!("{}:*", world.name())), 10);
}

#[test]
fn redis_is_used_again_within_five_seconds_of_its_return() {
    let redis = RedisServer::start();
    let mut stage = Stage::with(redis, |config, _| {
        config
            .set("redis.timeout", "500ms")
            .set("daemon.reconnect_min", "100ms")
            .set("daemon.reconnect_max", "3s")
    });
    let mut waits = Vec::new();
    for round in 1..=5 {
        stage.apply(&format!("m{round}"));
        stage.redis.kill();
        stage.apply(&format!("w{round}"));
        eventually("it is without", || stage.lost() == round);
        // Long enough for the waits to have grown.
        std::thread::sleep(Duration::from_secs(3));
        stage.redis.start_again(&[]);
        let since = Instant::now();
        eventually("it is back", || stage.back() == round);
        waits.push(since.elapsed());
    }
    eprintln!("Redis back to claims used: {waits:?}");
    assert!(waits.iter().all(|wait| *wait < Duration::from_secs(5)));
    stage.ends_well();
}
