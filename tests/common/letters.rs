//! Dead letters in numbers: a cause that kills messages, and that can be mended.

use amiquip::AmqpValue;

use super::{Config, Consumer, Dead, ORDERS, ORDERS_DEAD, World, eventually, numbered};

/// A handler that refuses every message while there is a row in `cause`, with
/// SQLSTATE 22000.
pub const REFUSE_WHILE_CAUSE: &str = "insert into effect (message_id, body) \
     select judge(message_id), body from message";

/// The consumer of [`ORDERS`] with [`REFUSE_WHILE_CAUSE`], in the ways a dead
/// letter can go: `("quorum", "reject")`, `("classic", "publish")`.
pub fn judged(world: &World, queue_type: &str, dead_letters: &str) -> Config {
    world.db.execute(
        "create table cause (text text); insert into cause values ('not today'); \
         create function judge(id text) returns text language plpgsql as $$ declare why text; \
         begin select text into why from cause where id like 'm%' limit 1; if found then \
         raise exception '%', why using errcode = '22000'; end if; return id; end $$",
    );
    let consumer = Consumer::orders()
        .set("topology.queue_type", queue_type)
        .set("topology.dead_letters", dead_letters)
        .sql(REFUSE_WHILE_CAUSE);
    world.config().consumer(consumer)
}

/// Mends the cause.
pub fn mend(world: &World) {
    world.db.execute("delete from cause");
}

/// Has a daemon refuse `count` messages called `m-0`, `m-1`, …, and ends it.
/// They rest in [`ORDERS_DEAD`] then.
pub fn kill_messages(world: &World, config: &Config, count: usize) {
    let daemon = world.run(config);
    world.broker.send(ORDERS, numbered("m", count));
    wait_for_letters(world, count);
    daemon.stop();
    assert!(world.broker.is_empty(ORDERS));
}

/// Waits until `count` letters are ready in [`ORDERS_DEAD`].
pub fn wait_for_letters(world: &World, count: usize) {
    eventually(&format!("{count} dead letters"), || {
        world.broker.ready(ORDERS_DEAD) as usize == count
    });
}

/// The header `name` of a letter, if it is a number or text.
pub fn header(letter: &Dead, name: &str) -> Option<String> {
    match letter.properties.headers().as_ref()?.get(name)? {
        AmqpValue::LongLongInt(number) => Some(number.to_string()),
        AmqpValue::LongString(text) => Some(text.clone()),
        AmqpValue::Timestamp(seconds) => Some(seconds.to_string()),
        other => Some(format!("{other:?}")),
    }
}
