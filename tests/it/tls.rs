//! TLS with the three servers: each is verified, each can verify the daemon,
//! and none is reached in plain text across a network by accident.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

mod renewal;

use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use crate::common::{
    Authority, Config, Leaf, ORDERS, PostgresServer, RedisServer, TlsListener, World, numbered,
    numbered_ids, said,
};

const OK: i32 = 0;
const UNAVAILABLE: i32 = 69;
const NO_PERMISSION: i32 = 77;
const BAD_CONFIG: i32 = 78;

const HOST: &str = "127.0.0.1";
const GOOD_NAMES: &str = "IP:127.0.0.1,DNS:localhost";

#[derive(Debug, Clone, Copy)]
enum Link {
    Broker,
    Redis,
    Postgres,
}

impl Link {
    fn section(self) -> &'static str {
        match self {
            Self::Broker => "broker",
            Self::Redis => "redis",
            Self::Postgres => "postgres",
        }
    }

    /// What `check` calls it.
    fn subject(self) -> &'static str {
        match self {
            Self::Broker => "RabbitMQ",
            Self::Redis => "Redis",
            Self::Postgres => "PostgreSQL",
        }
    }
}

/// A server with TLS, to be kept for as long as it is needed.
enum Secured {
    Broker(TlsListener),
    Redis(RedisServer),
    Postgres(PostgresServer),
}

impl Secured {
    /// With a world that is in order but for its URL of `link`.
    fn start(link: Link, leaf: &Leaf, clients: Option<&Authority>) -> (Self, World) {
        match link {
            Link::Broker => (Self::Broker(TlsListener::open(leaf, clients)), World::new()),
            Link::Redis => (
                Self::Redis(RedisServer::start_tls(leaf, clients)),
                World::new(),
            ),
            Link::Postgres => {
                let postgres = PostgresServer::start_tls(leaf, clients);
                let world = World::with_postgres(&in_plain_text(&postgres));
                (Self::Postgres(postgres), world)
            }
        }
    }

    /// With other certificates at the same place from now on, and without the
    /// connections that the daemon had. `meanwhile` is done when these are gone.
    fn renew(
        self,
        world: &World,
        (leaf, clients): (&Leaf, &Authority),
        meanwhile: impl FnOnce(),
    ) -> Self {
        match self {
            Self::Broker(listener) => {
                let listener = listener.reopen(leaf, Some(clients));
                world.close_connection("orders consumer");
                meanwhile();
                Self::Broker(listener)
            }
            Self::Redis(mut redis) => {
                redis.kill();
                meanwhile();
                redis.start_again_tls(leaf, Some(clients));
                Self::Redis(redis)
            }
            Self::Postgres(postgres) => {
                postgres.renew_tls(leaf, clients);
                world.db.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity \
                     where application_name like 'ackonce %'",
                );
                // An idle session is missed when it is used.
                meanwhile();
                Self::Postgres(postgres)
            }
        }
    }

    fn url(&self, world: &World) -> String {
        match self {
            Self::Broker(listener) => listener.url(world.amqp_url(), HOST),
            Self::Redis(redis) => redis.tls_url(HOST),
            Self::Postgres(postgres) => {
                postgres.same_database(&world.postgres_url().replace(PLAIN_TEXT, ""))
            }
        }
    }
}

const PLAIN_TEXT: &str = "?sslmode=disable";

/// How the test itself looks into a database.
fn in_plain_text(postgres: &PostgresServer) -> String {
    postgres.url() + PLAIN_TEXT
}

#[track_caller]
fn assert_said(output: &Output, status: i32, parts: &[&str]) {
    let said = said(output);
    assert_eq!(output.status.code(), Some(status), "{said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in:\n{said}");
    }
}

/// The line of `check` about `link`, which must be an error and the only one.
#[track_caller]
fn only_error(output: &Output, link: Link) -> String {
    let said = said(output);
    let errors: Vec<&str> = said.lines().filter(|l| l.starts_with("error")).collect();
    let [error] = errors.as_slice() else {
        panic!("one error:\n{said}");
    };
    assert!(error.contains(link.subject()), "{said}");
    (*error).to_owned()
}

/// What is wrong with a server's certificate.
#[derive(Debug, Clone, Copy)]
enum Fault {
    Authority,
    Host,
    Expired,
}

/// A server with that fault is named by `check` with its fault, and is not
/// talked to.
fn is_refused(link: Link, fault: Fault) {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let (names, days, trusted, says) = match fault {
        Fault::Authority => (GOOD_NAMES, 1, &other, "not signed by a trusted authority"),
        Fault::Host => ("DNS:elsewhere.example", 1, &ours, "for another host name"),
        Fault::Expired => (GOOD_NAMES, -1, &ours, "has expired"),
    };
    let (server, world) = Secured::start(link, &ours.issue_files(names, days), None);
    let section = link.section();
    let config = world
        .orders()
        .set(&format!("{section}.url"), server.url(&world))
        .set(
            &format!("{section}.ca_file"),
            trusted.file().to_str().unwrap(),
        );
    let output = world.ackonce(&config, &["check"]);
    assert_said(&output, UNAVAILABLE, &[]);
    let error = only_error(&output, link);
    assert!(error.contains(says), "{error}");

    // The same server and what it lacks: nothing else is wrong with it.
    if let Fault::Authority = fault {
        let ours = ours.file();
        let config = config.set(&format!("{section}.ca_file"), ours.to_str().unwrap());
        assert_said(&world.ackonce(&config, &["check"]), OK, &[]);
    }
}

#[test]
fn a_broker_of_an_unknown_authority_is_refused() {
    is_refused(Link::Broker, Fault::Authority);
}

#[test]
fn a_broker_with_anothers_certificate_is_refused() {
    is_refused(Link::Broker, Fault::Host);
}

#[test]
fn a_broker_whose_certificate_has_expired_is_refused() {
    is_refused(Link::Broker, Fault::Expired);
}

#[test]
fn a_redis_of_an_unknown_authority_is_refused() {
    is_refused(Link::Redis, Fault::Authority);
}

#[test]
fn a_redis_with_anothers_certificate_is_refused() {
    is_refused(Link::Redis, Fault::Host);
}

#[test]
fn a_redis_whose_certificate_has_expired_is_refused() {
    is_refused(Link::Redis, Fault::Expired);
}

#[test]
fn a_postgres_of_an_unknown_authority_is_refused() {
    is_refused(Link::Postgres, Fault::Authority);
}

#[test]
fn a_postgres_with_anothers_certificate_is_refused() {
    is_refused(Link::Postgres, Fault::Host);
}

#[test]
fn a_postgres_whose_certificate_has_expired_is_refused() {
    is_refused(Link::Postgres, Fault::Expired);
}

/// A certificate of the daemon's, and the keys that name it.
fn shows(config: Config, link: Link, leaf: &Leaf) -> Config {
    let section = link.section();
    config
        .set(
            &format!("{section}.client_cert_file"),
            leaf.cert().to_str().unwrap(),
        )
        .set(
            &format!("{section}.client_key_file"),
            leaf.key().to_str().unwrap(),
        )
}

/// A server that wants a certificate says so, is not content with another
/// authority's, and lets ours in.
fn wants_a_client_certificate(link: Link, status: i32, says: &str) {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let leaf = ours.issue_files(GOOD_NAMES, 1);
    let (server, world) = Secured::start(link, &leaf, Some(&ours));
    let section = link.section();
    let config = world
        .orders()
        .set(&format!("{section}.url"), server.url(&world))
        .set(&format!("{section}.ca_file"), ours.file().to_str().unwrap());
    let without = world.ackonce(&config, &["check"]);
    assert_said(&without, status, &[]);
    let error = only_error(&without, link);
    assert!(error.contains(says), "{error}");

    let stranger = other.issue_files("DNS:stranger", 1);
    let output = world.ackonce(&shows(config.clone(), link, &stranger), &["check"]);
    assert!(output.status.code() != Some(OK), "{}", said(&output));
    only_error(&output, link);

    let friend = ours.issue_files("DNS:friend", 1);
    let output = world.ackonce(&shows(config, link, &friend), &["check"]);
    assert_said(&output, OK, &[]);
}

#[test]
fn a_broker_that_wants_a_client_certificate_gets_it() {
    wants_a_client_certificate(Link::Broker, UNAVAILABLE, "client_cert_file");
}

#[test]
fn a_broker_of_tls_1_2_that_hangs_up_for_want_of_a_client_certificate_is_heard() {
    let ours = Authority::new("ours");
    let leaf = ours.issue_files(GOOD_NAMES, 1);
    let listener = TlsListener::open_tls_1_2(&leaf, Some(&ours));
    let world = World::new();
    let config = world
        .orders()
        .set("broker.url", listener.url(world.amqp_url(), HOST))
        .set("broker.ca_file", ours.file().to_str().unwrap());
    // It may hang up before all is said to it, or after.
    for _ in 0..8 {
        let output = world.ackonce(&config, &["check"]);
        assert_said(&output, UNAVAILABLE, &["set client_cert_file"]);
        only_error(&output, Link::Broker);
    }
    let friend = ours.issue_files("DNS:friend", 1);
    let output = world.ackonce(&shows(config, Link::Broker, &friend), &["check"]);
    assert_said(&output, OK, &[]);
}

#[test]
fn a_redis_that_wants_a_client_certificate_gets_it() {
    wants_a_client_certificate(Link::Redis, UNAVAILABLE, "client_cert_file");
}

#[test]
fn a_postgres_that_wants_a_client_certificate_gets_it() {
    wants_a_client_certificate(
        Link::Postgres,
        NO_PERMISSION,
        "requires a valid client certificate",
    );
}

#[test]
fn a_daemon_works_over_tls_with_client_certificates_on_all_three_links() {
    let ours = Authority::new("ours");
    let leaf = ours.issue_files(GOOD_NAMES, 1);
    let postgres = PostgresServer::start_tls(&leaf, Some(&ours));
    let world = World::with_postgres(&in_plain_text(&postgres));
    let redis = RedisServer::start_tls(&leaf, Some(&ours));
    let broker = TlsListener::open(&leaf, Some(&ours));
    let database = world.postgres_url().replace(PLAIN_TEXT, "");
    let mut config = world
        .orders()
        .set("broker.url", broker.url(world.amqp_url(), HOST))
        .set("redis.url", redis.tls_url(HOST))
        .set("postgres.url", database);
    let friend = ours.issue_files("DNS:friend", 1);
    for link in [Link::Broker, Link::Redis, Link::Postgres] {
        let ca_file = format!("{}.ca_file", link.section());
        config = shows(config, link, &friend).set(&ca_file, ours.file().to_str().unwrap());
    }
    let daemon = world.run(&config);
    world.broker.send(ORDERS, numbered("m", 200));
    world.wait_for_effects(200);
    let sessions = world.db.texts(
        "select coalesce(client_dn, 'none') from pg_stat_ssl join pg_stat_activity using (pid) \
         where application_name like 'ackonce %'",
    );
    assert!(!sessions.is_empty());
    assert!(sessions.iter().all(|dn| dn == "/CN=server"), "{sessions:?}");
    assert!(!daemon.logged(&["Redis cannot be used"]));
    daemon.stop();
    world.assert_each_applied_once(&numbered_ids("m", 200));
}

#[test]
fn a_url_that_goes_to_another_machine_in_plain_text_is_refused_unless_it_is_allowed() {
    let world = World::new();
    let plain = world
        .orders()
        .set("broker.url", "amqp://u:hunter2@mq.example/v")
        .set("redis.url", "redis://:hunter2@redis.example/0")
        .set(
            "postgres.url",
            "postgres://u:hunter2@db.example/d?sslmode=prefer",
        );
    for command in ["run", "check", "migrate"] {
        let output = world.ackonce(&plain, &[command]);
        let three = [
            "set allow_plaintext = true in [broker]",
            "set allow_plaintext = true in [redis]",
            "set allow_plaintext = true in [postgres]",
            "3 problems in",
        ];
        assert_said(&output, BAD_CONFIG, &three);
        assert!(!said(&output).contains("hunter2"), "{}", said(&output));
    }
    let allowed = plain
        .set("broker.allow_plaintext", true)
        .set("redis.allow_plaintext", true)
        .set("postgres.allow_plaintext", true);
    let output = world.ackonce(&allowed, &["check", "--offline"]);
    assert_said(&output, OK, &[]);
}

#[test]
fn files_that_are_of_no_use_are_named_before_anything_starts() {
    let world = World::new();
    let authority = Authority::new("ours");
    let leaf = authority.issue_files(GOOD_NAMES, 1);
    let config = world
        .orders()
        .set("broker.url", "amqps://127.0.0.1:1/v")
        .set("broker.client_cert_file", leaf.cert().to_str().unwrap());
    let alone = world.ackonce(&config, &["check", "--offline"]);
    assert_said(
        &alone,
        BAD_CONFIG,
        &["`client_cert_file` is given without `client_key_file`"],
    );
    let swapped = config
        .clone()
        .set("broker.client_key_file", leaf.cert().to_str().unwrap());
    let output = world.ackonce(&swapped, &["check", "--offline"]);
    assert_said(
        &output,
        BAD_CONFIG,
        &["`client_key_file` holds no private key"],
    );

    let locked = world.write(
        "locked.pem",
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMA==\n-----END ENCRYPTED PRIVATE KEY-----\n",
    );
    let encrypted = config.set("broker.client_key_file", locked.to_str().unwrap());
    let output = world.ackonce(&encrypted, &["check", "--offline"]);
    assert_said(&output, BAD_CONFIG, &["needs a pass phrase"]);
}

/// What only the TLS library can tell is told when it connects.
fn needs_a_pair(link: Link) {
    let ours = Authority::new("ours");
    let leaf = ours.issue_files(GOOD_NAMES, 1);
    let (server, world) = Secured::start(link, &leaf, None);
    let section = link.section();
    let config = world
        .orders()
        .set(&format!("{section}.url"), server.url(&world))
        .set(&format!("{section}.ca_file"), ours.file().to_str().unwrap());
    let other = ours.issue_files(GOOD_NAMES, 1);
    let mixed = shows(config, link, &leaf).set(
        &format!("{section}.client_key_file"),
        other.key().to_str().unwrap(),
    );
    let output = world.ackonce(&mixed, &["check"]);
    assert_said(&output, BAD_CONFIG, &["does it belong to the key in"]);
    only_error(&output, link);
}

#[test]
fn a_certificate_with_anothers_key_is_named_whoever_it_is_for() {
    for link in [Link::Broker, Link::Redis, Link::Postgres] {
        needs_a_pair(link);
    }
}

#[test]
fn a_key_that_everybody_can_read_is_warned_of() {
    let world = World::new();
    let authority = Authority::new("ours");
    let leaf = authority.issue_files(GOOD_NAMES, 1);
    let config = world.orders().set("broker.url", "amqps://127.0.0.1:1/v");
    let config = shows(config, Link::Broker, &leaf);
    for (mode, warned) in [(0o644, true), (0o640, false), (0o600, false)] {
        let mode_of = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(leaf.key(), mode_of).unwrap();
        let output = world.ackonce(&config, &["check", "--offline"]);
        assert_said(&output, OK, &[]);
        let says = said(&output).contains("can be read by everybody");
        assert_eq!(says, warned, "{mode:o}: {}", said(&output));
    }
}
