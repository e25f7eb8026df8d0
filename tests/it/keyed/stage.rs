//! A world whose messages are applied by a program: it writes down when it
//! begins and when it ends, and waits in between as long as the test wants.

use std::path::PathBuf;

use crate::common::{Config, Consumer, Daemon, Msg, ORDERS, World, eventually};

/// Writes `begin ID` and, if the body does not name another exit status,
/// `end ID`; waits in between while there is a file `hold-ID`. Each line is
/// one write, so that none is mixed with another.
const PROGRAM: &str = r#"#!/bin/sh
body=$(cat)
echo "begin $ACKONCE_MESSAGE_ID" >> "$FOLDER/calls"
while [ -e "$FOLDER/hold-$ACKONCE_MESSAGE_ID" ]; do sleep 0.02; done
case "$body" in "exit "*)
    if [ ! -e "$FOLDER/mended" ]; then echo "told to" >&2; exit "${body#exit }"; fi ;;
esac
echo "end $ACKONCE_MESSAGE_ID" >> "$FOLDER/calls"
"#;

/// The world, and the program in it.
pub struct Stage {
    pub world: World,
    program: PathBuf,
}

impl Stage {
    pub fn new() -> Self {
        let world = World::new();
        let program = world.write("program", PROGRAM);
        Self { world, program }
    }

    /// A consumer of the queue [`ORDERS`] that runs the program.
    pub fn consumer(&self) -> Consumer {
        let program = self.program.to_str().expect("a path");
        let folder = self.world.folder().to_str().expect("a path");
        Consumer::orders()
            .handler("command")
            .set("handler.argv", vec!["/bin/sh", program])
            .set("handler.env.FOLDER", folder)
            .set("claim.lease", "1s")
            .set("claim.renew_every", "100ms")
    }

    /// Its configuration, with the ledger alone.
    pub fn config(&self) -> Config {
        self.with(self.consumer())
    }

    /// As [`Self::config`], with another consumer.
    pub fn with(&self, consumer: Consumer) -> Config {
        self.world
            .config()
            .set("redis.enabled", false)
            .consumer(consumer)
    }

    /// Has the program wait with `id` until [`Self::let_go`].
    pub fn hold(&self, id: &str) {
        self.world.write(&format!("hold-{id}"), "");
    }

    pub fn let_go(&self, id: &str) {
        std::fs::remove_file(self.world.path(&format!("hold-{id}"))).expect("a hold");
    }

    /// From now on no body names an exit status.
    pub fn mend(&self) {
        self.world.write("mended", "");
    }

    pub fn send(&self, ids: &[&str]) {
        self.world
            .broker
            .send(ORDERS, ids.iter().map(|id| Msg::new(id)));
    }

    /// Sends a message at which the program ends with `status`.
    pub fn send_failing(&self, id: &str, status: u8) {
        let body = format!("exit {status}");
        self.world
            .broker
            .send(ORDERS, [Msg::new(id).body(body.as_str())]);
    }

    /// How often the program has begun with `id`.
    pub fn begun(&self, id: &str) -> usize {
        self.count(&format!("begin {id}"))
    }

    /// How often it has come to the end with `id`.
    pub fn ended(&self, id: &str) -> usize {
        self.count(&format!("end {id}"))
    }

    fn count(&self, wanted: &str) -> usize {
        let calls = std::fs::read_to_string(self.world.path("calls")).unwrap_or_default();
        calls.lines().filter(|line| *line == wanted).count()
    }

    pub fn wait_until_begun(&self, id: &str, times: usize) {
        eventually(&format!("{id} is begun {times} times"), || {
            self.begun(id) >= times
        });
    }

    /// Waits until the ledger has `ids` and nothing else.
    pub fn wait_until_done<S: AsRef<str>>(&self, ids: &[S]) {
        let mut wanted: Vec<&str> = ids.iter().map(AsRef::as_ref).collect();
        wanted.sort_unstable();
        eventually(&format!("{} messages are done", wanted.len()), || {
            self.world.db.ledger(ORDERS).len() >= wanted.len()
        });
        assert_eq!(self.world.db.ledger(ORDERS), wanted);
    }

    /// Panics unless each of `ids` was begun once, ended once and is done, and
    /// no claim is left.
    pub fn assert_each_called_once<S: AsRef<str>>(&self, ids: &[S]) {
        self.wait_until_done(ids);
        for id in ids {
            let id = id.as_ref();
            assert_eq!((self.begun(id), self.ended(id)), (1, 1), "calls of {id}");
        }
        assert_eq!(self.claims(), 0, "no claim is left");
    }

    /// Claims in the ledger.
    pub fn claims(&self) -> i64 {
        self.world.db.count("select count(*) from ackonce.claim")
    }

    /// Waits until the claim of `id` was held for longer than `leases` leases
    /// of a second.
    pub fn wait_until_renewed(&self, id: &str, leases: u32) {
        let query = format!(
            "select count(*) from ackonce.claim where message_id = '{id}' \
             and lease_until - claimed_at > interval '{leases} seconds'"
        );
        eventually("the claim is renewed", || self.world.db.count(&query) == 1);
    }

    /// Runs daemons until the queue is empty.
    pub fn drain_with(&self, daemon: Daemon, config: &Config) {
        self.world.drain_with(daemon, config, ORDERS);
    }
}
