//! What goes on while an alarm on the broker blocks those who publish. The alarm
//! is one for the whole broker: what is in here runs while no other test does.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod common;
#[path = "topology/stage.rs"]
mod stage;

use std::process::Command;

use common::{Consumer, DEADLINE, Msg, ORDERS, eventually};
use stage::{Stage, foreign, orders};

#[test]
fn an_alarm_on_the_broker_stops_nobody_whose_dead_letters_are_kept_anyway() {
    let mut stage = Stage::new();
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
    let alarm = Alarm::raise();
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

/// A memory alarm, as long as this lives. It ends by itself too, should the
/// test be killed.
struct Alarm;

const MEMORY: &str = "{resource_limit, memory, node()}";

impl Alarm {
    fn raise() -> Self {
        evaluate(&format!(
            "rabbit_alarm:set_alarm({{{MEMORY}, []}}), \
             timer:apply_after(60000, rabbit_alarm, clear_alarm, [{MEMORY}])."
        ));
        Self
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        evaluate(&format!("rabbit_alarm:clear_alarm({MEMORY})."));
    }
}

/// Runs Erlang code in the broker.
fn evaluate(code: &str) {
    let program = std::env::var("ACKONCE_RABBITMQCTL").expect("script/services env sets it");
    let output = Command::new(program).args(["eval", code]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
