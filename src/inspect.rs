//! Looks at the three servers with the daemon's eyes, before the daemon needs
//! them: can it reach them, may it do what it does, is what exists as
//! configured. Changes nothing that a daemon's start would not.

use std::fmt;
use std::time::Duration;

use sqlx::Row;

use crate::broker::connection::{Dial, Link};
use crate::broker::topology::{self, TopologyError};
use crate::claim;
use crate::config::checked;
use crate::handler::command;
use crate::handler::http::HttpHandler;
use crate::handler::sql::SqlHandler;
use crate::ledger::{self, Schema};
use crate::observe::admin::OPEN_TO_OTHERS;
use crate::postgres::{Error, Session};
use crate::prune;
use crate::trust;

/// Oldest PostgreSQL that reads a range of pages by `ctid` alone, which pruning
/// needs, in libpq's form.
const POSTGRES_MIN: u32 = 140_000;

/// Oldest Redis with `SET … NX GET`.
const REDIS_MIN: u32 = 7;

/// Longest wait for the broker's answer to one call.
const CALL_WITHIN: Duration = Duration::from_secs(10);

/// How much a finding matters, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// As it should be.
    Good,
    /// It works, and something is worth knowing.
    Warning,
    /// Not as configured, or not fit for the daemon.
    Wrong,
    /// A right is missing.
    Denied,
    /// The server cannot be reached.
    Unreachable,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub subject: String,
    /// How much it matters.
    pub severity: Severity,
    /// What was found, and the way out.
    pub text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.severity {
            Severity::Good => "ok",
            Severity::Warning => "warning",
            Severity::Wrong | Severity::Denied | Severity::Unreachable => "error",
        };
        write!(f, "{mark:<8} {}: {}", self.subject, self.text)
    }
}

/// Looks at everything, and reports all it finds.
#[must_use]
pub fn servers(config: &checked::Config) -> Vec<Finding> {
    let mut findings = Findings::default();
    admin(config, &mut findings);
    postgres(config, &mut findings);
    redis(config, &mut findings);
    broker(config, &mut findings);
    receivers(config, &mut findings);
    findings.0
}

/// Looks at the address alone: a daemon that runs has it.
fn admin(config: &checked::Config, findings: &mut Findings) {
    if let Some(admin) = config
        .admin
        .filter(|admin| !admin.listen.ip().is_loopback())
    {
        let text = format!(
            "{}: {OPEN_TO_OTHERS}\n         hint: listen on a loopback address, or let a firewall \
             see to it",
            admin.listen
        );
        findings.add("admin address", Severity::Warning, text);
    }
}

/// Connects to the receivers, and sends them nothing; starts no program.
fn receivers(config: &checked::Config, findings: &mut Findings) {
    for consumer in &config.consumers {
        let effect = consumer.handler.effect();
        let subject = format!("effect of {}", consumer.name);
        let text = format!("{effect}: {}", effect.promise());
        findings.add(&subject, Severity::Good, text);
        let subject = format!("handler of {}", consumer.name);
        match &consumer.handler {
            checked::Handler::Sql(_) | checked::Handler::Rust(_) => {}
            checked::Handler::Http(http) => match HttpHandler::probe(http) {
                Ok(place) => {
                    findings.add(&subject, Severity::Good, format!("{place} can be reached"));
                }
                Err(failure) => findings.add(&subject, Severity::Unreachable, failure.text),
            },
            checked::Handler::Command(config) => {
                findings.add(&subject, Severity::Good, command::describe(config));
            }
        }
    }
}

#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, subject: &str, severity: Severity, text: impl Into<String>) {
        self.0.push(Finding {
            subject: subject.to_owned(),
            severity,
            text: text.into(),
        });
    }

    fn require(&mut self, subject: &str, good: bool, otherwise: Severity, text: &str, hint: &str) {
        match good {
            true => self.add(subject, Severity::Good, text),
            false => self.add(subject, otherwise, format!("{text}\n         hint: {hint}")),
        }
    }
}

fn severity_of(error: &Error) -> Severity {
    match error {
        Error::Lost(_) | Error::Unreachable { .. } => Severity::Unreachable,
        Error::Refused(failure) => match failure.code.as_deref() {
            Some(code) if code.starts_with("28") || code == "42501" => Severity::Denied,
            _ => Severity::Wrong,
        },
    }
}

fn postgres(config: &checked::Config, findings: &mut Findings) {
    let mut session = match Session::open(&config.postgres, "check") {
        Ok(session) => session,
        Err(error) => return findings.add("PostgreSQL", severity_of(&error), error.to_string()),
    };
    if let Err(error) = postgres_settings(&mut session, findings) {
        return findings.add("PostgreSQL", severity_of(&error), error.to_string());
    }
    match postgres_schema(config, &mut session, findings) {
        Ok(()) => {}
        Err(error) => findings.add("PostgreSQL schema", severity_of(&error), error.to_string()),
    }
    for consumer in &config.consumers {
        let checked::Handler::Sql(sql) = &consumer.handler else {
            continue;
        };
        let subject = format!("handler of {}", consumer.name);
        match SqlHandler::new(sql) {
            Err(error) => findings.add(&subject, Severity::Wrong, error.to_string()),
            Ok(mut handler) => match handler.check(&mut session) {
                Ok(()) => {
                    let (statements, how) = handler.plan();
                    let text = format!("{statements} statement(s), which run {how}");
                    findings.add(&subject, Severity::Good, text);
                }
                Err(refused) => {
                    let (script, error) = *refused;
                    findings.add(&subject, severity_of(&error), script.to_string());
                }
            },
        }
    }
}

fn postgres_settings(session: &mut Session, findings: &mut Findings) -> Result<(), Error> {
    let row = session.run(async |connection| {
        sqlx::query(
            "SELECT pg_catalog.current_setting('server_version_num')::pg_catalog.int4, pg_catalog.current_setting('server_encoding'), \
             pg_catalog.pg_is_in_recovery()",
        )
        .fetch_one(connection)
        .await
    })?;
    let version: i32 = row.get(0);
    let encoding: String = row.get(1);
    let in_recovery: bool = row.get(2);
    findings.require(
        "PostgreSQL version",
        u32::try_from(version).is_ok_and(|version| version >= POSTGRES_MIN),
        Severity::Wrong,
        &format!("{}.{}", version / 10_000, version % 10_000),
        "PostgreSQL 14 or newer is needed",
    );
    findings.require(
        "PostgreSQL encoding",
        encoding == "UTF8",
        Severity::Wrong,
        &encoding,
        "message ids and bodies are UTF-8: create the database with ENCODING 'UTF8'",
    );
    match session.risks()?.as_slice() {
        [] => findings.add(
            "PostgreSQL durability",
            Severity::Good,
            "commits survive a crash",
        ),
        risks => {
            for risk in risks {
                findings.add("PostgreSQL durability", Severity::Warning, *risk);
            }
        }
    }
    findings.require(
        "PostgreSQL role in replication",
        !in_recovery,
        Severity::Wrong,
        if in_recovery {
            "standby, read-only"
        } else {
            "primary"
        },
        "let the URL lead to the primary",
    );
    Ok(())
}

/// Warns of schemas that the handler's names are looked up in, and that others
/// may put something of the same name into.
fn postgres_path(session: &mut Session, findings: &mut Findings) -> Result<(), Error> {
    let open: Vec<String> = session.run(async |connection| {
        sqlx::query_scalar(
            "SELECT space.nspname::pg_catalog.text \
             FROM pg_catalog.unnest(pg_catalog.current_schemas(false)) AS way (name) \
             JOIN pg_catalog.pg_namespace AS space ON space.nspname = way.name \
             WHERE EXISTS (SELECT FROM pg_catalog.aclexplode(space.nspacl) AS granted \
             WHERE granted.privilege_type = 'CREATE' AND granted.grantee <> space.nspowner \
             AND granted.grantee <> (SELECT oid FROM pg_catalog.pg_roles \
             WHERE rolname = current_user))",
        )
        .fetch_all(connection)
        .await
    })?;
    if !open.is_empty() {
        findings.add(
            "PostgreSQL search path",
            Severity::Warning,
            format!(
                "others may create functions and operators in {}, which the handler's statements \
                 would call with the daemon's rights\n         hint: REVOKE CREATE ON SCHEMA … FROM \
                 PUBLIC, or set the role's search_path",
                open.join(", ")
            ),
        );
    }
    Ok(())
}

fn postgres_schema(
    config: &checked::Config,
    session: &mut Session,
    findings: &mut Findings,
) -> Result<(), Error> {
    postgres_path(session, findings)?;
    let subject = "PostgreSQL schema";
    match ledger::schema(session)? {
        Schema::Current => findings.add(subject, Severity::Good, "up to date"),
        Schema::Behind(count) if config.postgres.auto_migrate => {
            let may: bool = session.run(async |connection| {
                sqlx::query_scalar("SELECT pg_catalog.has_database_privilege(pg_catalog.current_database(), 'CREATE')")
                    .fetch_one(connection)
                    .await
            })?;
            findings.require(
                subject,
                may,
                Severity::Denied,
                &format!("{count} migration(s) behind: `ackonce run` applies them"),
                "the role may not create a schema: run `ackonce migrate` with one that may",
            );
            return Ok(());
        }
        Schema::Behind(count) => {
            findings.add(
                subject,
                Severity::Wrong,
                format!("{count} migration(s) behind\n         hint: run `ackonce migrate`"),
            );
            return Ok(());
        }
    }
    let lacking: Vec<String> = session.run(async |connection| {
        sqlx::query_scalar(
            "SELECT relation || ' (' || privilege || ')' FROM (VALUES \
             ('ackonce.ledger', 'SELECT'), ('ackonce.ledger', 'INSERT'), \
             ('ackonce.ledger', 'DELETE'), ('ackonce.failure', 'SELECT'), \
             ('ackonce.failure', 'INSERT'), ('ackonce.failure', 'DELETE'), \
             ('ackonce.suspect', 'SELECT'), ('ackonce.suspect', 'INSERT'), \
             ('ackonce.suspect', 'UPDATE'), ('ackonce.suspect', 'DELETE'), \
             ('ackonce.claim', 'SELECT'), ('ackonce.claim', 'INSERT'), \
             ('ackonce.claim', 'UPDATE'), ('ackonce.claim', 'DELETE'), \
             ('ackonce.sweep', 'SELECT'), ('ackonce.sweep', 'INSERT'), \
             ('ackonce.sweep', 'UPDATE'), ('ackonce.instance', 'SELECT'), ('ackonce.secret', 'SELECT'), \
             ('ackonce.consumer', 'SELECT'), ('ackonce.consumer', 'INSERT'), \
             ('ackonce.migration', 'SELECT')) AS needed (relation, privilege) \
             WHERE NOT pg_catalog.has_table_privilege(relation, privilege)",
        )
        .fetch_all(connection)
        .await
    })?;
    findings.require(
        "PostgreSQL rights",
        lacking.is_empty(),
        Severity::Denied,
        &if lacking.is_empty() {
            "ledger and journal can be written and pruned".to_owned()
        } else {
            format!("missing: {}", lacking.join(", "))
        },
        "grant them to the daemon's role",
    );
    let retention = config.ledger.retention;
    for letters in ledger::prune::uncovered(session, retention)? {
        let subject = format!("dead letters of {}", letters.consumer);
        let text = prune::warning(&letters, retention);
        findings.add(&subject, Severity::Warning, text);
    }
    Ok(())
}

fn redis(config: &checked::Config, findings: &mut Findings) {
    let Some(redis) = &config.redis else {
        return findings.add(
            "Redis",
            Severity::Good,
            "not used: the ledger alone decides",
        );
    };
    if let Err(error) = trust::check_files(&redis.tls) {
        return findings.add("Redis", Severity::Wrong, error.to_string());
    }
    let info = match claim::inspect(redis) {
        Ok(info) => info,
        Err(error) => {
            let text = error.to_string();
            // Redis's own words, the last ones about a command in a script.
            let denied = [
                "NOPERM",
                "NOAUTH",
                "WRONGPASS",
                "AuthenticationFailed",
                "can't run this command",
            ];
            let severity = match denied.iter().any(|words| text.contains(words)) {
                true => Severity::Denied,
                false => Severity::Unreachable,
            };
            return findings.add("Redis", severity, text);
        }
    };
    let major = info.version.split('.').next().and_then(|n| n.parse().ok());
    findings.require(
        "Redis version",
        major.is_none_or(|major: u32| major >= REDIS_MIN),
        Severity::Wrong,
        &info.version,
        "Redis 7.0 or newer (or Valkey) is needed for SET with NX and GET",
    );
    if let Some(policy) = &info.eviction {
        findings.require(
            "Redis eviction policy",
            policy == "noeviction",
            Severity::Warning,
            policy,
            "evicted claims and marks cost speed, never correctness; noeviction keeps them",
        );
    }
}

fn broker(config: &checked::Config, findings: &mut Findings) {
    let Some(mut link) = broker_servers(&config.broker, findings) else {
        return;
    };
    for consumer in &config.consumers {
        let subject = format!("topology of {}", consumer.name);
        match topology::inspect(&mut link, consumer, CALL_WITHIN) {
            Ok(found) => {
                let text = match found.missing.as_slice() {
                    [] if consumer.topology.mode == checked::TopologyMode::None => {
                        "what is used is there".to_owned()
                    }
                    [] => "exists as configured".to_owned(),
                    missing => format!("`ackonce run` will declare {}", missing.join(", ")),
                };
                findings.add(&subject, Severity::Good, text);
                for unproved in found.unproved {
                    findings.add(&subject, Severity::Good, format!("not proved: {unproved}"));
                }
                for weak in found.weak {
                    findings.add(&subject, Severity::Warning, weak);
                }
            }
            Err(error) => findings.add(&subject, topology_severity(&error), error.to_string()),
        }
    }
}

/// Tries each URL by itself. The first connection that stands, if any does.
fn broker_servers(broker: &checked::Broker, findings: &mut Findings) -> Option<Link> {
    let mut links = Vec::new();
    let mut failures = Vec::new();
    for url in &broker.urls {
        let alone = checked::Broker {
            urls: vec![url.clone()],
            ..broker.clone()
        };
        match Dial::new(&alone, "check").open() {
            Ok(link) => links.push(link),
            Err(error) => failures.push(error),
        }
    }
    for link in &links {
        let version = link.server_version();
        let text = match broker.urls.as_slice() {
            [_] => format!("version {version}"),
            _ => format!("version {version} at {}", link.address()),
        };
        findings.add("RabbitMQ", Severity::Good, text);
    }
    for error in failures {
        // One node of several that is down is what the others are for.
        let severity = match broker_severity(&error) {
            Severity::Unreachable if !links.is_empty() => Severity::Warning,
            severity => severity,
        };
        findings.add("RabbitMQ", severity, error.to_string());
    }
    let mut clusters: Vec<&str> = links.iter().map(Link::cluster_name).collect();
    clusters.dedup();
    if clusters.len() > 1 {
        let text = format!(
            "the URLs lead to different clusters: {}\n         hint: name nodes of one cluster; \
             a queue of the same name elsewhere is another queue",
            clusters.join(", ")
        );
        findings.add("RabbitMQ", Severity::Warning, text);
    }
    links.into_iter().next()
}

fn topology_severity(error: &TopologyError) -> Severity {
    match error {
        TopologyError::Mismatch { .. }
        | TopologyError::Missing { .. }
        | TopologyError::Nowhere { .. }
        | TopologyError::NoWayBack { .. }
        | TopologyError::Unsafe { .. }
        | TopologyError::Limit { .. } => Severity::Wrong,
        TopologyError::Denied { .. } => Severity::Denied,
        TopologyError::Lost { .. } => Severity::Unreachable,
    }
}

fn broker_severity(error: &crate::broker::error::ConnectError) -> Severity {
    use crate::broker::error::{ConnectError, LIMIT_REACHED};
    match error {
        ConnectError::Vhost { text, .. } if text.contains(LIMIT_REACHED) => Severity::Unreachable,
        ConnectError::LoginRefused { .. } | ConnectError::Vhost { .. } => Severity::Denied,
        ConnectError::Address(_) | ConnectError::Trust(_) => Severity::Wrong,
        _ => Severity::Unreachable,
    }
}
