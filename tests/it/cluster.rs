//! Three nodes, one of which goes: consumption continues on the others.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::BTreeSet;
use std::time::Instant;

use crate::common::{
    Broker, Consumer, Daemon, ORDERS, ORDERS_DEAD, PrivateBroker, World, eventually, numbered,
    numbered_ids,
};

const NODES: usize = 3;

/// The node that leads the queue, and how many of its replicas are up.
fn leader(world: &World, broker: &PrivateBroker) -> Option<(usize, usize)> {
    let queue = world
        .management
        .get(&format!("/api/queues/{}/{ORDERS}", world.name()));
    let leader = queue["leader"].as_str().or(queue["node"].as_str())?;
    let node = (0..NODES).find(|node| broker.name(*node) == leader)?;
    Some((node, queue["online"].as_array()?.len()))
}

/// The node that the daemon is connected to, as its log has it.
fn node_of(daemon: &Daemon, broker: &PrivateBroker) -> usize {
    let log = daemon.log();
    let line = log.iter().rev().find(|line| line.contains("consuming"));
    let line = line.expect("it consumes");
    let found = (0..NODES).find(|node| {
        let url = url::Url::parse(&broker.amqp_url(*node)).unwrap();
        line.contains(&format!(":{}/", url.port().unwrap()))
    });
    found.expect("a node of the cluster")
}

#[test]
fn a_cluster_that_loses_the_leader_and_then_the_daemons_own_node_loses_no_message() {
    const PART: usize = 1_000;
    let broker = PrivateBroker::start(NODES);
    let mut world = World::on(&broker);
    let urls: Vec<_> = (0..NODES)
        .map(|node| world.amqp_url_on(&broker, node))
        .collect();
    let orders = Consumer::orders().set("batch_max", 50).set("prefetch", 200);
    let config = world.config().consumer(orders);
    // The node that makes the queue leads it; the daemon begins with another.
    world.prepare(&config);
    let turned = [1, 2, 0].map(|node| urls[node].clone()).to_vec();
    let config = config.set("broker.url", turned);
    let daemon = world.run(&config);
    eventually("the queue has three replicas", || {
        leader(&world, &broker).is_some_and(|(_, online)| online == NODES)
    });
    let mut ids = Vec::new();
    let mut witness = 0;
    // First the node that leads the queue, then, when that one is back, the one
    // that the daemon is connected to.
    for turn in 0..2 {
        let connected = node_of(&daemon, &broker);
        let (leads, _) = leader(&world, &broker).unwrap();
        let victim = match turn {
            0 => leads,
            _ => connected,
        };
        assert!(turn > 0 || leads != connected, "two different faults");
        witness = (0..NODES).find(|node| *node != victim).unwrap();
        world.look_through(&broker, witness);
        let prefix = format!("m-{turn}");
        world
            .broker
            .send_until_taken(ORDERS, numbered(&prefix, PART));
        ids.extend(numbered_ids(&prefix, PART));
        world.wait_for_effects((ids.len() - PART + 100) as i64);
        let before = daemon.times_consuming(ORDERS);
        let since = Instant::now();
        broker.kill(victim);
        let late = format!("late-{turn}");
        world.broker.send_until_taken(ORDERS, numbered(&late, PART));
        ids.extend(numbered_ids(&late, PART));
        world.wait_for_effects(ids.len() as i64);
        eprintln!(
            "node {victim} killed (connected to {connected}, leader {leads}): all applied after {:?}",
            since.elapsed()
        );
        if victim == connected {
            assert!(daemon.times_consuming(ORDERS) > before, "over another node");
        }
        if turn == 0 {
            broker.revive();
            eventually("the node is back in the queue", || {
                leader(&world, &broker).is_some_and(|(_, online)| online == NODES)
            });
        }
    }
    // The dead-letter queue, which nobody used meanwhile, may have lost its leader too.
    let url = world.amqp_url_on(&broker, witness);
    for queue in [ORDERS, ORDERS_DEAD] {
        eventually("the queue has a leader", || {
            Broker::answers_for(&url, queue)
        });
    }
    world.drain_with(daemon, &config, ORDERS);
    let seen: BTreeSet<_> = ids.iter().collect();
    assert_eq!(seen.len(), 4 * PART);
    world.assert_each_applied_once(&ids);
    assert!(world.broker.is_empty(ORDERS_DEAD));
}
