//! `/livez`, `/readyz` and what systemd is told, in each state the daemon can be
//! in; and the admin address under clients that behave badly.
#![cfg(feature = "failpoints")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::admin::{read_reply, request};
use crate::common::{
    Admin, Config, Consumer, Msg, ORDERS, PrivateBroker, Proxy, World, eventually, run_ackonce,
};

/// Waits until `/readyz` answers with `status` and a line that has all of
/// `parts`.
fn wait_until_ready_says(admin: &Admin, status: u16, parts: &[&str]) {
    wait_until(admin, "/readyz", status, parts);
}

fn wait_until(admin: &Admin, path: &str, status: u16, parts: &[&str]) {
    let mut last = None;
    let agreed = crate::common::try_eventually(crate::common::DEADLINE, || {
        let reply = admin.get(path);
        let said = reply.status == status && parts.iter().all(|part| reply.body.contains(part));
        last = Some(reply);
        said
    });
    assert!(agreed, "{path} is not {status} with {parts:?}: {last:?}");
}

fn assert_alive(admin: &Admin) {
    let reply = admin.get("/livez");
    assert_eq!(reply.status, 200, "{reply:?}");
}

#[test]
fn a_daemon_that_waits_for_postgresql_is_alive_not_ready_and_says_why() {
    let world = World::new();
    let proxy = Proxy::before(world.postgres_url(), 5432);
    proxy.go_down();
    let config = world.orders().set("postgres.url", proxy.url());
    let daemon = world.daemon(&config).start();
    let admin = Admin::of(&daemon);
    let why = ["failed orders: connecting: PostgreSQL: "];
    wait_until_ready_says(&admin, 503, &why);
    assert_alive(&admin);
    // Its series are there already.
    assert_eq!(admin.metrics().value("consuming"), 0.0);
    proxy.come_up();
    wait_until_ready_says(&admin, 200, &["ok orders: consuming"]);
    assert_eq!(admin.metrics().value("consuming"), 1.0);
    daemon.stop();
}

#[test]
fn a_daemon_without_its_broker_is_alive_and_ready_when_that_is_back() {
    let world = World::new();
    let proxy = Proxy::before(world.amqp_url(), 5672);
    proxy.go_down();
    let config = world.orders().set("broker.url", proxy.url());
    let daemon = world.daemon(&config).start();
    let admin = Admin::of(&daemon);
    proxy.wait_for_refusals(2);
    wait_until_ready_says(&admin, 503, &["failed orders: connecting: "]);
    assert_alive(&admin);
    proxy.come_up();
    wait_until_ready_says(&admin, 200, &["ok orders: consuming"]);
    proxy.go_down();
    wait_until_ready_says(&admin, 503, &["failed orders: connecting: "]);
    assert_alive(&admin);
    proxy.come_up();
    wait_until_ready_says(&admin, 200, &["ok orders: consuming"]);
    daemon.stop();
}

#[test]
fn one_consumer_that_is_not_ready_makes_the_daemon_unready_and_is_named() {
    let world = World::new();
    let config = world
        .orders()
        .consumer(Consumer::new("bills").sql("insert into bill select message_id from message"));
    world.db.execute("create table bill (id text)");
    let (daemon, admin) = world.watch(&config);
    wait_until_ready_says(
        &admin,
        200,
        &["ok orders: consuming", "ok bills: consuming"],
    );
    world.db.execute("drop table bill");
    world.broker.send("bills", [Msg::new("one")]);
    let lines = ["ok orders: consuming", "failed bills: paused: ", "bill"];
    wait_until_ready_says(&admin, 503, &lines);
    // It does what it can: nothing that a restart would mend.
    assert_alive(&admin);
    let status: serde_json::Value = serde_json::from_str(&admin.get("/status").body).unwrap();
    assert!(status.to_string().contains("paused"), "{status}");
    world.db.execute("create table bill (id text)");
    wait_until_ready_says(&admin, 200, &["ok bills: consuming"]);
    daemon.stop();
}

#[test]
fn a_broker_that_freezes_makes_it_unready_not_dead() {
    let broker = PrivateBroker::start(1);
    let world = World::on(&broker);
    let config = world.orders().set("broker.heartbeat", "5s");
    let (daemon, admin) = world.watch(&config);
    wait_until_ready_says(&admin, 200, &["ok orders: consuming"]);
    broker.freeze(0);
    wait_until_ready_says(&admin, 503, &["failed orders: connecting: "]);
    assert_alive(&admin);
    broker.thaw(0);
    wait_until_ready_says(&admin, 200, &["ok orders: consuming"]);
    daemon.stop();
}

/// A worker that is stuck is the daemon's own trouble, after a second.
fn impatient(world: &World) -> Config {
    world.orders().set("admin.stall_after", "1s")
}

#[test]
fn a_worker_that_is_stuck_makes_it_dead_until_it_goes_on() {
    let world = World::new();
    let config = impatient(&world);
    let (daemon, admin, gate) = world.watch_paused_at(&config, "recorded");
    wait_until_ready_says(&admin, 200, &["ok orders: consuming"]);
    world.broker.send(ORDERS, [Msg::new("stuck")]);
    gate.wait_until_hit();
    let why = "none of 1 deliveries settled for ";
    wait_until(&admin, "/livez", 503, &["failed orders: consuming: ", why]);
    wait_until_ready_says(&admin, 503, &[why]);
    gate.open();
    wait_until(&admin, "/livez", 200, &["ok orders: consuming"]);
    wait_until_ready_says(&admin, 200, &["ok orders: consuming"]);
    daemon.stop();
}

#[test]
fn a_client_that_asks_for_something_else_is_told_what_there_is() {
    let world = World::new();
    let (daemon, admin) = world.watch(&world.orders());
    assert!(admin.address().ip().is_loopback());
    let missing = admin.get("/");
    assert_eq!(missing.status, 404);
    assert!(
        missing
            .body
            .contains("/metrics, /livez, /readyz and /status")
    );
    assert_eq!(admin.get("/metrics/").status, 404);
    assert_eq!(admin.get("/../etc/passwd").status, 404);
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "BREW"] {
        let reply = admin.say(&request(method, "/metrics"));
        assert_eq!(reply.status, 405, "{method}: {reply:?}");
        assert!(reply.head.contains("allow: get, head"), "{reply:?}");
    }
    let whole = admin.get("/readyz");
    let head = admin.say(&request("HEAD", "/readyz"));
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    let length = format!("content-length: {}", whole.body.len());
    assert!(head.head.contains(&length), "{head:?}");
    let metrics = admin.get("/metrics?name=x");
    assert_eq!(metrics.status, 200);
    assert!(
        metrics
            .head
            .contains("content-type: text/plain; version=0.0.4"),
        "{metrics:?}"
    );
    assert!(
        metrics.head.contains("cache-control: no-store"),
        "{metrics:?}"
    );
    daemon.stop();
}

#[test]
fn clients_that_misbehave_are_dropped_and_disturb_nobody() {
    let world = World::new();
    let (daemon, admin) = world.watch(&world.orders());
    let huge = [
        b"GET /livez HTTP/1.1\r\nX: ".to_vec(),
        vec![b'a'; 200 << 10],
    ]
    .concat();
    let status = admin.say(&huge).status;
    assert!([0, 400, 431].contains(&status), "{status}");
    let many = "X: y\r\n".repeat(2_000);
    let status = admin
        .say(format!("GET /livez HTTP/1.1\r\n{many}\r\n").as_bytes())
        .status;
    assert!([0, 400, 431].contains(&status), "{status}");
    for garbage in [
        &b"\x16\x03\x01\x02\x00\x01\x00"[..],
        b"\0\0\0\0\r\n\r\n",
        b"GET\r\n\r\n",
    ] {
        let status = admin.say(&[garbage, b"\r\n\r\n"].concat()).status;
        assert!([0, 400].contains(&status), "{garbage:?}: {status}");
    }
    // Some say half a sentence and wait; each is hung up on.
    let mut silent: Vec<_> = (0..20).map(|_| admin.connect()).collect();
    for stream in &mut silent {
        stream.write_all(b"GET /livez HTTP/1.1\r\nHo").unwrap();
    }
    assert_alive(&admin);
    for stream in &mut silent {
        let mut rest = Vec::new();
        drop(stream.read_to_end(&mut rest));
    }
    assert_alive(&admin);
    daemon.stop();
}

#[test]
fn a_hundred_connections_at_a_time_are_all_answered() {
    let world = World::new();
    let (daemon, admin) = world.watch(&world.orders());
    let mut streams: Vec<_> = (0..100).map(|_| admin.connect()).collect();
    for stream in &mut streams {
        stream.write_all(&request("GET", "/metrics")).unwrap();
    }
    let served = streams.iter_mut().map(|stream| read_reply(stream).status);
    assert_eq!(served.filter(|status| *status == 200).count(), 100);
    daemon.stop();
}

#[test]
fn probes_are_answered_whoever_else_is_connected() {
    let world = World::new();
    let (daemon, admin) = world.watch(&world.orders());
    // More than there are places; none of them ever ends by itself.
    let slow: Vec<_> = (0..300)
        .map(|_| {
            let mut stream = admin.connect();
            stream
                .write_all(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
                .unwrap();
            stream
        })
        .collect();
    for _ in 0..3 {
        let mut probe = admin.connect();
        probe
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        probe.write_all(&request("GET", "/livez")).unwrap();
        assert_eq!(read_reply(&mut probe).status, 200);
    }
    drop(slow);
    daemon.stop();
}

#[test]
fn a_port_that_is_taken_is_an_error_with_the_way_out() {
    let world = World::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let config = world.orders().set("admin.listen", address.as_str());
    let mut daemon = world.daemon(&config).start();
    assert_eq!(daemon.wait().code(), Some(78));
    let log = daemon.log().join("\n");
    assert!(log.contains(&address) && log.contains("in use"), "{log}");
    assert!(
        log.contains("its own `listen` in [admin], or enabled = false"),
        "{log}"
    );
    // Without it there is nothing to be in each other's way.
    let config = config.set("admin.enabled", false);
    world.run(&config).stop();
}

#[test]
fn an_address_that_others_can_reach_is_warned_of() {
    let world = World::new();
    let config = world.orders().set("admin.listen", "0.0.0.0:0");
    let daemon = world.run(&config);
    assert!(daemon.logged(&["WARN", "can be reached from other hosts"]));
    daemon.stop();
    let path = world.write("open.toml", &config.text());
    let output = run_ackonce(&["check", "--config", &path.to_string_lossy()]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        said.contains("warning  admin address: 0.0.0.0:0: "),
        "{said}"
    );
    let daemon = world.run(&world.orders());
    assert!(!daemon.logged(&["can be reached from other hosts"]));
    daemon.stop();
}

/// What systemd would hear.
struct Systemd {
    socket: UnixDatagram,
    path: std::path::PathBuf,
    heard: Vec<String>,
}

impl Systemd {
    fn new(world: &World) -> Self {
        let path = world.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let tick = Some(Duration::from_millis(20));
        socket.set_read_timeout(tick).unwrap();
        Self {
            socket,
            path,
            heard: Vec::new(),
        }
    }

    /// Takes in what has come, a line each.
    fn listen(&mut self) {
        let mut buffer = [0; 8 << 10];
        while let Ok(count) = self.socket.recv(&mut buffer) {
            let said = String::from_utf8_lossy(&buffer[..count]).into_owned();
            self.heard.extend(said.lines().map(str::to_owned));
        }
    }

    fn count(&mut self, start: &str) -> usize {
        self.listen();
        self.heard
            .iter()
            .filter(|said| said.starts_with(start))
            .count()
    }

    /// Waits for a line that begins like this, among those since the last
    /// [`Systemd::forget`].
    fn wait_for(&mut self, start: &str) {
        eventually(&format!("systemd hears {start:?}"), || {
            self.count(start) > 0
        });
    }

    fn forget(&mut self) {
        self.listen();
        self.heard.clear();
    }

    /// Waits until the newest status is this one.
    fn wait_for_status(&mut self, status: &str) {
        eventually(&format!("the status is {status:?}"), || {
            self.listen();
            let mut newest = self.heard.iter().rev();
            let newest = newest.find_map(|said| said.strip_prefix("STATUS="));
            newest == Some(status)
        });
    }
}

#[test]
fn systemd_is_told_of_readiness_only_when_every_consumer_consumes() {
    let world = World::new();
    let broker = Proxy::before(world.amqp_url(), 5672);
    let postgres = Proxy::before(world.postgres_url(), 5432);
    broker.go_down();
    postgres.go_down();
    let config = world
        .orders()
        .set("broker.url", broker.url())
        .set("postgres.url", postgres.url())
        .set("daemon.shutdown_timeout", "7s");
    let mut systemd = Systemd::new(&world);
    let daemon = world
        .daemon(&config)
        .env("NOTIFY_SOCKET", &systemd.path)
        .start();
    systemd.wait_for("STATUS=0 of 1 consumers consume; orders: connecting: PostgreSQL: ");
    // It asks for time for as long as it waits.
    systemd.wait_for("EXTEND_TIMEOUT_USEC=60000000");
    systemd.wait_for("WATCHDOG=1");
    postgres.come_up();
    broker.wait_for_refusals(2);
    systemd.forget();
    systemd.wait_for("WATCHDOG=1");
    assert_eq!(systemd.count("READY=1"), 0, "{:?}", systemd.heard);
    broker.come_up();
    systemd.wait_for("READY=1");
    systemd.wait_for("STATUS=1 of 1 consumers consume");
    assert!(daemon.times_consuming(ORDERS) > 0);
    systemd.forget();
    systemd.wait_for("WATCHDOG=1");
    assert_eq!(systemd.count("EXTEND_TIMEOUT_USEC"), 0, "ready is ready");
    assert_eq!(systemd.count("READY=1"), 0, "said once");
    systemd.forget();
    daemon.signal(Signal::SIGTERM);
    systemd.wait_for("STOPPING=1");
    // As long as the drain may take, and a minute.
    systemd.wait_for("EXTEND_TIMEOUT_USEC=67000000");
    daemon.wait_until_stopped();
}

#[test]
fn the_watchdog_is_not_fed_by_a_worker_that_is_stuck() {
    let world = World::new();
    let config = impatient(&world);
    world.prepare(&config);
    let gate = world.gate();
    let mut systemd = Systemd::new(&world);
    let daemon = world
        .daemon(&config)
        .pauses_at("recorded", 1, &gate)
        .env("NOTIFY_SOCKET", &systemd.path)
        .start();
    systemd.wait_for("READY=1");
    systemd.wait_for("WATCHDOG=1");
    world.broker.send(ORDERS, [Msg::new("stuck")]);
    gate.wait_until_hit();
    systemd.wait_for("STATUS=0 of 1 consumers consume, deliveries in flight: 1; orders: consuming: none of 1 deliveries settled");
    systemd.forget();
    // The line changes each second, for it says how long.
    eventually("systemd hears three more lines", || {
        systemd.count("STATUS=") >= 3
    });
    assert_eq!(systemd.count("WATCHDOG=1"), 0, "{:?}", systemd.heard);
    gate.open();
    systemd.wait_for("STATUS=1 of 1 consumers consume");
    systemd.forget();
    systemd.wait_for("WATCHDOG=1");
    daemon.stop();
}

#[test]
fn after_a_reload_systemd_has_the_usual_status_again_and_a_refusal_stays_in_it() {
    let world = World::new();
    let config = world.orders();
    let mut systemd = Systemd::new(&world);
    let daemon = world
        .daemon(&config)
        .env("NOTIFY_SOCKET", &systemd.path)
        .start();
    let usual = "1 of 1 consumers consume";
    systemd.wait_for("READY=1");
    systemd.wait_for_status(usual);

    // Twice alike: the status of the first is not in the way of the second.
    for _ in 0..2 {
        systemd.forget();
        daemon.reload(&config.text());
        systemd.wait_for("RELOADING=1");
        systemd.wait_for("STATUS=reloaded");
        systemd.wait_for_status(usual);
        assert_eq!(systemd.count("READY=1"), 1, "{:?}", systemd.heard);
    }
    for _ in 0..2 {
        systemd.forget();
        daemon.reload("this is no TOML");
        systemd.wait_for("STATUS=reload refused, see the log");
        let remembered = format!("{usual}; the last reload was refused, see the log");
        systemd.wait_for_status(&remembered);
    }
    daemon.reload(&config.text());
    systemd.wait_for_status(usual);
    daemon.stop();
}
