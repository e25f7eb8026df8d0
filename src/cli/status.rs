//! `ackonce status`: what a running daemon is doing.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use ureq::Agent;

use super::terminal::{self, Table};
use super::{ConfigArgument, Exit, output};
use crate::config::{format_duration, read_duration};
use crate::observe::status::{Consumer, Status};
use crate::stop::Stop;
use crate::why::printable;

/// Longest wait for the daemon's answer.
const WITHIN: Duration = Duration::from_secs(5);

/// Longest answer, in bytes: some thousands of consumers.
const ANSWER_MAX: u64 = 4 << 20;

/// Shortest and longest time between two looks.
const EVERY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3600));

/// Clears a terminal and goes to its first line.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// Arguments of `ackonce status`.
#[derive(Debug, Args)]
#[command(after_help = "\
The daemon is asked at [admin] listen of its configuration, or at --address. Messages are counted \
since it was started; with --watch, PER SECOND is what was settled between two looks.

--json prints one object: version, pid, uptime_seconds, consumers. Each of consumers has consumer, \
state (starting, connecting, consuming, paused, stopping), in_flight, parked, messages (by outcome: \
applied, duplicate, retried, dead-lettered, returned, lost), servers (rabbitmq, redis, postgresql: whether \
the last thing heard of them was good), and where they apply cause, why it does not consume, and \
stalled, why it counts as dead. With --watch one object a line.

Exit status: 0 every consumer consumes, 1 some do not, 2 bad arguments, 69 no daemon answers, 78 bad \
configuration, or [admin] is switched off. With --watch: 0 when it was told to stop.")]
pub struct Arguments {
    /// Ask here instead of at [admin] listen
    #[arg(long, value_name = "HOST:PORT")]
    address: Option<SocketAddr>,

    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Look again and again, each time after so long
    #[arg(
        short,
        long,
        value_name = "EVERY",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "2s",
        value_parser = interval
    )]
    watch: Option<Duration>,

    #[command(flatten)]
    config: ConfigArgument,
}

fn interval(text: &str) -> Result<Duration, String> {
    let every = read_duration(text)?;
    match every < EVERY.0 || every > EVERY.1 {
        true => Err("must be from 200ms to 1h".to_owned()),
        false => Ok(every),
    }
}

/// Prints it.
///
/// # Errors
///
/// The exit status.
pub fn run(arguments: &Arguments) -> Result<Exit, Exit> {
    let daemon = Daemon::new(address(arguments)?);
    let json = arguments.json;
    let Some(every) = arguments.watch else {
        let status = daemon.ask().map_err(|cause| {
            eprintln!("ackonce: {}", daemon.no_answer(&cause));
            Exit::Unreachable
        })?;
        output(&text(&status, json, None));
        return match status.is_ready() {
            true => Ok(Exit::Success),
            false => Err(Exit::Partial),
        };
    };
    terminal::interruptible(move |stop| Ok(watch(stop, &daemon, every, json)))
}

fn address(arguments: &Arguments) -> Result<SocketAddr, Exit> {
    if let Some(address) = arguments.address {
        return Ok(address);
    }
    let path: &PathBuf = &arguments.config.config;
    let refuse = |what: &str, hint: &str| {
        eprintln!("ackonce: {what} in {}\n  hint: {hint}", path.display());
        Exit::Config
    };
    let Some(admin) = arguments.config.load()?.admin else {
        let hint = "set enabled = true in [admin], and restart the daemon";
        return Err(refuse("[admin] is switched off", hint));
    };
    match admin.listen.port() {
        0 => Err(refuse(
            "[admin] listen has port 0, which the system replaced by one of its choice",
            "the daemon's log has the address: give it as --address",
        )),
        _ => Ok(reachable(admin.listen)),
    }
}

/// Who listens on all addresses listens on this one.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        });
    }
    address
}

/// A daemon that may be running.
struct Daemon {
    address: SocketAddr,
    agent: Agent,
}

impl Daemon {
    fn new(address: SocketAddr) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(WITHIN))
            .proxy(None)
            .max_redirects(0);
        Self {
            address,
            agent: config.build().into(),
        }
    }

    fn ask(&self) -> Result<Status, String> {
        let url = format!("http://{}/status", self.address);
        let mut response = self.agent.get(url).call().map_err(|e| e.to_string())?;
        let body = response.body_mut().with_config().limit(ANSWER_MAX);
        let text = body.read_to_string().map_err(|e| e.to_string())?;
        serde_json::from_str(&text).map_err(|error| format!("this is not a daemon's: {error}"))
    }

    fn no_answer(&self, cause: &str) -> String {
        format!(
            "no daemon answers at {}: {}\n  hint: is it running, and with this [admin] listen?",
            self.address,
            printable(cause)
        )
    }
}

/// Looks until it is told to stop.
fn watch(stop: &Stop, daemon: &Daemon, every: Duration, json: bool) -> Exit {
    let redraws = !json && std::io::stdout().is_terminal();
    let mut last: Option<(Instant, Status)> = None;
    loop {
        let asked = Instant::now();
        match daemon.ask() {
            Ok(status) => {
                let text = text(&status, json, last.as_ref());
                let clear = if redraws { CLEAR } else { "" };
                output(&format!("{clear}{text}"));
                last = Some((asked, status));
            }
            Err(cause) => {
                eprintln!("ackonce: {}", daemon.no_answer(&cause));
                last = None;
            }
        }
        if stop.wait(every.saturating_sub(asked.elapsed())) {
            return Exit::Success;
        }
    }
}

fn text(status: &Status, json: bool, last: Option<&(Instant, Status)>) -> String {
    if json {
        let line = serde_json::to_string(status);
        return line.map(|line| line + "\n").unwrap_or_default();
    }
    let mut text = format!(
        "ackonce {}, process {}, up {}\n",
        printable(&status.version),
        status.pid,
        format_duration(Duration::from_secs(status.uptime_seconds))
    );
    let mut headings = vec![
        "CONSUMER",
        "STATE",
        "IN FLIGHT",
        "PARKED",
        "APPLIED",
        "DUPLICATE",
        "RETRIED",
        "DEAD",
        "RETURNED",
        "LOST",
    ];
    if last.is_some() {
        headings.push("PER SECOND");
    }
    let mut table = Table::new(&headings);
    for consumer in &status.consumers {
        let count = |outcome: &str| {
            let count = consumer.messages.get(outcome);
            count.copied().unwrap_or_default().to_string()
        };
        let mut row = vec![
            consumer.report.consumer.clone(),
            consumer.report.state.clone(),
            consumer.report.in_flight.to_string(),
            consumer.parked.to_string(),
            count("applied"),
            count("duplicate"),
            count("retried"),
            count("dead-lettered"),
            count("returned"),
            count("lost"),
        ];
        if let Some((at, last)) = last {
            row.push(rate(consumer, last, at.elapsed()));
        }
        table.row(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
    text += &table.text();
    for consumer in &status.consumers {
        explain(consumer, &mut text);
    }
    text
}

/// Settled in a second since the last look. Nothing when it was restarted.
fn rate(consumer: &Consumer, last: &Status, passed: Duration) -> String {
    let settled = |messages: &BTreeMap<String, u64>| messages.values().sum::<u64>();
    let name = &consumer.report.consumer;
    let before = last.consumers.iter().find(|c| c.report.consumer == *name);
    let more = before.and_then(|b| settled(&consumer.messages).checked_sub(settled(&b.messages)));
    let millis = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX).max(1);
    more.map_or_else(String::new, |more| {
        (more.saturating_mul(1000) / millis).to_string()
    })
}

/// What is not as it should be.
fn explain(consumer: &Consumer, text: &mut String) {
    let name = printable(&consumer.report.consumer);
    for why in consumer.report.cause.iter().chain(&consumer.report.stalled) {
        *text += &format!("{name}: {}\n", printable(why));
    }
    for (server, _) in consumer.servers.iter().filter(|(_, up)| !**up) {
        *text += &format!("{name}: no good news of {}\n", printable(server));
    }
}
