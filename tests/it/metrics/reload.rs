//! The series of consumers that come and go with a reload.

use std::collections::BTreeSet;

use crate::common::{Admin, Consumer, Msg, ORDERS, World, eventually, numbered};

const PARCELS: &str = "parcels";

/// The series of one consumer, with its name left out.
fn series_of(admin: &Admin, consumer: &str) -> BTreeSet<String> {
    let label = format!("consumer=\"{consumer}\"");
    let queue = format!("queue=\"{consumer}\"");
    let series = admin.metrics();
    let names = series.names().into_iter();
    names
        .filter(|name| name.contains(&label))
        .map(|name| name.replace(&label, "consumer").replace(&queue, "queue"))
        .collect()
}

fn wait_until_gone(admin: &Admin, consumer: &str) {
    eventually(&format!("no series of {consumer} is left"), || {
        series_of(admin, consumer).is_empty()
    });
}

/// Every count of `consumer` is zero; what tells how it stands may not be.
fn assert_nothing_counted(admin: &Admin, consumer: &str) {
    let label = format!("consumer=\"{consumer}\"");
    for line in admin.text().lines().filter(|line| line.contains(&label)) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let family = name.split('{').next().unwrap();
        let counts = ["_total", "_count", "_sum", "_bucket"];
        if counts.iter().any(|end| family.ends_with(end)) {
            assert_eq!(value, "0", "{name}");
        }
    }
}

#[test]
fn series_come_at_zero_with_the_reload_that_adds_a_consumer_and_go_when_it_goes() {
    let world = World::new();
    let orders = world.orders();
    let both = world.orders().consumer(Consumer::new(PARCELS));
    let parcels = world.config().consumer(Consumer::new(PARCELS));
    let (daemon, admin) = world.watch(&orders);
    world.broker.send(ORDERS, numbered("o", 3));
    admin.wait_for(&[("messages_total applied orders", 3.0)]);
    let whole = series_of(&admin, ORDERS);
    assert!(whole.len() > 50 && series_of(&admin, PARCELS).is_empty());

    daemon.reload(&both.text());
    eventually("the added one consumes", || {
        daemon.times_consuming(PARCELS) == 1
    });
    // All of them are there before the first message, and nothing else changed.
    assert_eq!(series_of(&admin, PARCELS), whole);
    assert_nothing_counted(&admin, PARCELS);
    assert_eq!(series_of(&admin, ORDERS), whole);
    world
        .broker
        .send(PARCELS, [Msg::new("p-1"), Msg::new("p-2")]);
    admin.wait_for(&[
        ("messages_total applied parcels", 2.0),
        ("messages_total applied orders", 3.0),
        ("consuming", 2.0),
    ]);

    daemon.reload(&parcels.text());
    wait_until_gone(&admin, ORDERS);
    // The other was not touched.
    let kept = [
        ("messages_total applied", 2.0),
        ("messages_total applied parcels", 2.0),
        ("reconnects_total parcels", 0.0),
        ("consuming", 1.0),
    ];
    admin.wait_for(&kept);
    assert_eq!(series_of(&admin, PARCELS), whole);
    world.broker.send(PARCELS, [Msg::new("p-3")]);
    admin.wait_for(&[("messages_total applied", 3.0)]);
    assert!(series_of(&admin, ORDERS).is_empty(), "they stay away");

    // Who comes back begins anew.
    daemon.reload(&both.text());
    eventually("it consumes again", || daemon.times_consuming(ORDERS) == 2);
    assert_eq!(series_of(&admin, ORDERS), whole);
    assert_nothing_counted(&admin, ORDERS);
    daemon.stop();
}
