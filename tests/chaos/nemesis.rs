//! What breaks things: two threads, one for processes and servers, one for the
//! wires between them, so that faults of both sorts meet. Each fault is counted
//! when it was seen to happen, not when it was asked for.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::Management;
use crate::link::{Link, Trap};
use crate::plan::Dice;
use crate::servers::{Server, freeze, wait_until};
use crate::session::try_rows;
use crate::stage::Stage;

/// Longest wait for a trap to strike.
const TRAP_WITHIN: Duration = Duration::from_secs(4);

/// A clock that is off by an hour.
const HOUR: i64 = 3_600;

macro_rules! kinds {
    ($($kind:ident = $name:literal,)*) => {
        /// A kind of fault.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Kind { $($kind,)* }

        impl Kind {
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            pub fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }
        }
    };
}

kinds! {
    DaemonKill = "daemon-kill",
    DaemonFreeze = "daemon-freeze",
    DaemonStop = "daemon-stop",
    DaemonClock = "daemon-clock",
    BrokerKill = "broker-kill",
    BrokerFreeze = "broker-freeze",
    BrokerAlarm = "broker-alarm",
    BrokerClose = "broker-close",
    RedisKill = "redis-kill",
    RedisFreeze = "redis-freeze",
    RedisFlush = "redis-flush",
    RedisFull = "redis-full",
    RedisReadOnly = "redis-read-only",
    PostgresKill = "postgres-kill",
    PostgresRestart = "postgres-restart",
    PostgresFreeze = "postgres-freeze",
    PostgresTerminate = "postgres-terminate",
    PostgresDiskFull = "postgres-disk-full",
    Cut = "cut",
    CommitCut = "commit-cut",
    CommitKill = "commit-kill",
    AckCut = "ack-cut",
    Flap = "flap",
    Latency = "latency",
    Loss = "loss",
}

impl Kind {
    /// Whether it cuts a connection at a chosen message, and does no more.
    pub fn is_a_cut_in_the_middle(self) -> bool {
        matches!(self, Self::CommitCut | Self::AckCut)
    }

    /// Whether it is one of the wires', which may meet one of the servers'.
    fn is_of_the_wires(self) -> bool {
        matches!(
            self,
            Self::Cut
                | Self::CommitCut
                | Self::CommitKill
                | Self::AckCut
                | Self::Flap
                | Self::Latency
                | Self::Loss
                | Self::RedisFlush
                | Self::PostgresTerminate
                | Self::BrokerClose
                | Self::DaemonKill
        )
    }
}

/// What one thread breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Processes and servers, one at a time.
    Servers,
    /// What is between them, one thing at a time.
    Wires,
    /// Nothing but the connections of this daemon, cut in the middle.
    Cuts(usize),
}

impl Lane {
    /// Those of a run.
    pub fn of(stage: &Stage<'_>) -> Vec<Self> {
        let kinds = &stage.plan.kinds;
        let mut cuts = kinds.iter().map(|kind| kind.is_a_cut_in_the_middle());
        match !kinds.is_empty() && cuts.all(|cut| cut) {
            true => (0..stage.fleet.len()).map(Self::Cuts).collect(),
            false => {
                let mut lanes = vec![Self::Servers, Self::Wires];
                lanes.retain(|lane| !lane.kinds(stage).is_empty());
                lanes
            }
        }
    }

    fn kinds(self, stage: &Stage<'_>) -> Vec<Kind> {
        let wires = self != Self::Servers;
        let all = stage.plan.kinds.iter().copied();
        all.filter(|kind| kind.is_of_the_wires() == wires).collect()
    }
}

/// Breaks things until the stage's time is over.
pub fn work(stage: &Stage<'_>, lane: Lane) {
    let (stream, own) = match lane {
        Lane::Servers => (2, None),
        Lane::Wires => (3, None),
        Lane::Cuts(daemon) => (4 + daemon as u64, Some(daemon)),
    };
    let wires = lane != Lane::Servers;
    let kinds = lane.kinds(stage);
    let mut dice = Dice::new(stage.plan.seed, stream);
    // Each kind once before any comes again.
    let mut hat = Vec::new();
    while !stage.over.load(SeqCst) {
        let rest = dice.millis(0, stage.plan.rest.as_millis() as u64);
        wait_until(rest, || stage.over.load(SeqCst));
        wait_until(Duration::from_secs(30), || {
            !(wires && stage.quiet.load(SeqCst))
        });
        if stage.over.load(SeqCst) {
            return;
        }
        if hat.is_empty() {
            hat.clone_from(&kinds);
        }
        let kind = hat.swap_remove(dice.below(hat.len() as u64) as usize);
        strike(stage, kind, own, &mut dice);
    }
}

fn strike(stage: &Stage<'_>, kind: Kind, own: Option<usize>, dice: &mut Dice) {
    let happened = match kind {
        Kind::DaemonKill => end(stage, dice, Signal::SIGKILL),
        Kind::DaemonStop => end(stage, dice, Signal::SIGTERM),
        Kind::DaemonFreeze => {
            let pid = stage.fleet.pid(any_daemon(stage, dice));
            // Longer than its lease.
            freeze(
                &pid.into_iter().collect::<Vec<_>>(),
                dice.millis(2_500, 5_000),
            )
        }
        Kind::DaemonClock => set_clock(stage, dice),
        Kind::BrokerKill => restart(stage, Server::RabbitMq, Signal::SIGKILL, dice),
        Kind::RedisKill => restart(stage, Server::Redis, Signal::SIGKILL, dice),
        Kind::PostgresKill => restart(stage, Server::Postgres, Signal::SIGKILL, dice),
        // What `pg_ctl restart -m immediate` sends.
        Kind::PostgresRestart => restart(stage, Server::Postgres, Signal::SIGQUIT, dice),
        Kind::BrokerFreeze => freeze_server(stage, Server::RabbitMq, dice.millis(1_000, 8_000)),
        Kind::RedisFreeze => freeze_server(stage, Server::Redis, dice.millis(500, 4_000)),
        Kind::PostgresFreeze => freeze_sessions(stage, dice.millis(500, 4_000)),
        Kind::BrokerAlarm => raise_alarm(stage, dice.millis(1_000, 4_000)),
        Kind::BrokerClose => close_connections(stage),
        Kind::RedisFlush => u64::from(redis(stage, &["FLUSHALL"]).is_ok()),
        Kind::RedisFull => spoil_redis(
            stage,
            [
                &["CONFIG", "SET", "maxmemory", "1"],
                &["CONFIG", "SET", "maxmemory", "0"],
            ],
            dice.millis(500, 3_000),
        ),
        Kind::RedisReadOnly => spoil_redis(
            stage,
            [
                &["REPLICAOF", "127.0.0.1", "1"],
                &["REPLICAOF", "NO", "ONE"],
            ],
            dice.millis(500, 3_000),
        ),
        Kind::PostgresTerminate => terminate_sessions(stage),
        Kind::PostgresDiskFull => crate::disk::fill(stage, dice.millis(1_000, 3_000)),
        Kind::Cut => cut(stage, dice),
        Kind::CommitCut => return cut_at_commit(stage, own, dice),
        Kind::CommitKill => return kill_at_commit(stage, dice),
        Kind::AckCut => {
            let daemon = own.unwrap_or_else(|| any_daemon(stage, dice));
            let link = stage.link(daemon, Server::RabbitMq);
            spring(stage, link, Trap::AckUnsent)
        }
        Kind::Flap => flap(stage, dice),
        Kind::Latency => disturb(
            stage,
            dice,
            |link, on| {
                link.delay(Duration::from_millis(if on { 150 } else { 0 }));
            },
            |link| link.counters().delayed.load(SeqCst),
        ),
        Kind::Loss => disturb(
            stage,
            dice,
            |link, on| {
                link.swallow(on);
                if !on {
                    link.cut();
                }
            },
            |link| link.counters().swallowed.load(SeqCst),
        ),
    };
    stage.note(kind.name(), happened);
}

/// Any daemon.
fn any_daemon(stage: &Stage<'_>, dice: &mut Dice) -> usize {
    dice.below(stage.fleet.len() as u64) as usize
}

/// A daemon that may end. Where there are several, the first lives on, so that
/// its memory can be watched over the whole run.
fn mortal(stage: &Stage<'_>, dice: &mut Dice) -> usize {
    match stage.fleet.len() {
        1 => 0,
        all => 1 + dice.below(all as u64 - 1) as usize,
    }
}

fn end(stage: &Stage<'_>, dice: &mut Dice, signal: Signal) -> u64 {
    u64::from(stage.fleet.end(mortal(stage, dice), signal))
}

/// Ends a daemon and has it come back with its clock off by an hour; the clocks
/// of its lives after that are right again. It happened if its log says so.
fn set_clock(stage: &Stage<'_>, dice: &mut Dice) -> u64 {
    if crate::fleet::faketime().is_none() {
        return 0;
    }
    let daemon = mortal(stage, dice);
    let seconds = if dice.percent(50) { HOUR } else { -HOUR };
    stage.fleet.set_clock(daemon, seconds);
    let before = stage.fleet.log_length(daemon);
    let ended = stage.fleet.end(daemon, Signal::SIGKILL);
    let restarted = ended && stage.fleet.pid(daemon).is_some();
    let off = restarted
        && wait_until(Duration::from_secs(3), || {
            let log = stage.fleet.log_since(daemon, before);
            log.lines().any(|line| is_off_by_an_hour(line, seconds))
        });
    stage.fleet.set_clock(daemon, 0);
    u64::from(off)
}

/// Whether a line of the log has a time that is an hour off from now.
fn is_off_by_an_hour(line: &str, seconds: i64) -> bool {
    let Some(minutes) = line.split_once('T').and_then(|(_, time)| {
        let (hours, minutes) = time.get(..5)?.split_once(':')?;
        Some(hours.parse::<i64>().ok()? * 60 + minutes.parse::<i64>().ok()?)
    }) else {
        return false;
    };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.expect("a time after 1970").as_secs().cast_signed() / 60;
    let off = (minutes - now - seconds / 60).rem_euclid(24 * 60);
    !(5..=24 * 60 - 5).contains(&off)
}

/// Ends a server and starts it again, at once or when the daemons have tried in
/// vain for a while, and measures how they come back.
fn restart(stage: &Stage<'_>, server: Server, signal: Signal, dice: &mut Dice) -> u64 {
    stage.say(&format!("{} gets {signal}", server.name()));
    let ended = stage.servers.end(server, signal);
    if dice.percent(50) {
        std::thread::sleep(dice.millis(1_000, 8_000));
    }
    stage.quiet.store(true, SeqCst);
    let back = stage.servers.start_again(server);
    let back = back.unwrap_or_else(|| panic!("{} does not start again", server.name()));
    stage.measure_recovery(server, back);
    stage.quiet.store(false, SeqCst);
    u64::from(ended)
}

fn freeze_server(stage: &Stage<'_>, server: Server, length: Duration) -> u64 {
    freeze(&[stage.servers.pid(server)], length)
}

/// The backends of the daemons' sessions.
fn sessions(stage: &Stage<'_>) -> Vec<i32> {
    let query = "select pid::text from pg_stat_activity \
         where datname = current_database() and application_name like 'ackonce %'";
    let pids = try_rows(&stage.url(Server::Postgres), query).unwrap_or_default();
    pids.iter().filter_map(|pid| pid.parse().ok()).collect()
}

fn freeze_sessions(stage: &Stage<'_>, length: Duration) -> u64 {
    freeze(&sessions(stage), length).min(1)
}

fn terminate_sessions(stage: &Stage<'_>) -> u64 {
    let query = "select pg_terminate_backend(pid)::text from pg_stat_activity \
         where datname = current_database() and application_name like 'ackonce %'";
    let ended = try_rows(&stage.url(Server::Postgres), query).unwrap_or_default();
    u64::from(ended.iter().any(|ended| ended == "true"))
}

/// Raises the memory alarm, which blocks whoever publishes. It happened if the
/// node says so.
fn raise_alarm(stage: &Stage<'_>, length: Duration) -> u64 {
    let set = |limit: &[&str]| {
        stage
            .servers
            .rabbitmqctl(&[&["set_vm_memory_high_watermark"], limit].concat())
    };
    set(&["0.00001"]);
    let management = Management::new(&stage.servers.management_url());
    // That check fails while there is an alarm; the other one does not.
    let raised = wait_until(Duration::from_secs(5), || {
        management.try_get("/api/health/checks/alarms").is_none()
            && management.try_get("/api/overview").is_some()
    });
    std::thread::sleep(length);
    let limit = stage.servers.memory_limit();
    let lowered = wait_until(Duration::from_secs(60), || set(&["absolute", &limit]));
    assert!(lowered, "the memory alarm cannot be ended");
    u64::from(raised)
}

/// Closes every connection of the vhost, as an operator does.
fn close_connections(stage: &Stage<'_>) -> u64 {
    let management = Management::new(&stage.servers.management_url());
    let path = format!("/api/vhosts/{}/connections", stage.name());
    let connections = management.try_get(&path).unwrap_or_default();
    let names = connections.as_array().into_iter().flatten();
    let closed = names
        .filter_map(|connection| connection["name"].as_str())
        .filter(|name| management.close_connection(name))
        .count();
    u64::from(closed > 0)
}

fn redis(stage: &Stage<'_>, command: &[&str]) -> redis::RedisResult<redis::Value> {
    let client = redis::Client::open(stage.url(Server::Redis))?;
    let within = Duration::from_secs(2);
    let mut connection = client.get_connection_with_timeout(within)?;
    connection.set_read_timeout(Some(within))?;
    redis::cmd(command[0])
        .arg(&command[1..])
        .query(&mut connection)
}

/// Has Redis refuse to write for a while. It happened if it refuses us.
fn spoil_redis(stage: &Stage<'_>, [spoil, mend]: [&[&str]; 2], length: Duration) -> u64 {
    let spoilt = redis(stage, spoil).is_ok() && redis(stage, &["SET", "chaos", "1"]).is_err();
    std::thread::sleep(length);
    let mended = wait_until(Duration::from_secs(60), || {
        redis(stage, mend).is_ok() && redis(stage, &["SET", "chaos", "1"]).is_ok()
    });
    assert!(mended, "Redis cannot be mended");
    u64::from(spoilt)
}

/// Cuts the connections of a daemon, or of all with the publisher, to one
/// server.
fn cut(stage: &Stage<'_>, dice: &mut Dice) -> u64 {
    let server = dice.pick(&Server::ALL);
    let cut = match dice.percent(40) {
        true => {
            let all = 0..stage.fleet.len();
            let cut: u64 = all.map(|daemon| stage.link(daemon, server).cut()).sum();
            cut + stage.publisher_link.cut()
        }
        false => stage.link(any_daemon(stage, dice), server).cut(),
    };
    u64::from(cut > 0)
}

/// Sets a trap, and waits until it has struck.
fn spring(stage: &Stage<'_>, link: &Link, trap: Trap) -> u64 {
    let struck = || link.counters().struck.load(SeqCst);
    let before = struck();
    link.set(trap);
    wait_until(TRAP_WITHIN, || struck() > before || stage.over.load(SeqCst));
    link.unset();
    // It may strike between the last look and here.
    struck() - before
}

fn cut_at_commit(stage: &Stage<'_>, own: Option<usize>, dice: &mut Dice) {
    let daemon = own.unwrap_or_else(|| any_daemon(stage, dice));
    let link = stage.link(daemon, Server::Postgres);
    let (trap, name) = match dice.percent(50) {
        true => (Trap::CommitUnsent, "commit-cut, not sent"),
        false => (Trap::CommitUnanswered, "commit-cut, not answered"),
    };
    stage.note(name, spring(stage, link, trap));
}

fn kill_at_commit(stage: &Stage<'_>, dice: &mut Dice) {
    let daemon = mortal(stage, dice);
    let Some(pid) = stage.fleet.pid(daemon) else {
        return stage.note("commit-kill, not sent", 0);
    };
    let (trap, name) = match dice.percent(50) {
        true => (Trap::KillBeforeCommit(pid), "commit-kill, not sent"),
        false => (Trap::KillAfterCommit(pid), "commit-kill, not answered"),
    };
    let before = stage.fleet.ends_of(daemon);
    let struck = spring(stage, stage.link(daemon, Server::Postgres), trap);
    if struck > 0 {
        wait_until(TRAP_WITHIN, || stage.fleet.ends_of(daemon) > before);
    }
    stage.note(name, struck);
}

/// Cuts a daemon's connection to the broker as soon as it gets messages, again
/// and again, while its commits are slow, and then kills it: what it decided
/// over one connection comes to the next one, whose tags are the same.
fn flap(stage: &Stage<'_>, dice: &mut Dice) -> u64 {
    let daemon = mortal(stage, dice);
    let link = stage.link(daemon, Server::RabbitMq);
    let deliveries = || link.counters().deliveries.load(SeqCst);
    stage
        .link(daemon, Server::Postgres)
        .delay(Duration::from_millis(120));
    let mut cuts = 0;
    for _ in 0..3 {
        cuts += link.cut();
        let before = deliveries();
        wait_until(TRAP_WITHIN, || deliveries() > before);
        std::thread::sleep(dice.millis(50, 250));
    }
    // Nothing of this connection can be committed that soon, so an ack that
    // comes first is one too many; what it acks dies with the daemon.
    let acks = || link.counters().acks.load(SeqCst);
    let before = acks();
    wait_until(Duration::from_millis(1_200), || acks() > before);
    let killed = stage.fleet.end(daemon, Signal::SIGKILL);
    stage.link(daemon, Server::Postgres).delay(Duration::ZERO);
    u64::from(killed && cuts > 0)
}

/// Makes a daemon's way to one server, or to all of them, worse for a while.
/// It happened if something that went there was affected.
fn disturb(
    stage: &Stage<'_>,
    dice: &mut Dice,
    switch: impl Fn(&Link, bool),
    affected: impl Fn(&Link) -> u64,
) -> u64 {
    let daemon = any_daemon(stage, dice);
    let links: Vec<&Link> = match dice.percent(30) {
        true => stage.links[daemon].iter().collect(),
        false => vec![stage.link(daemon, dice.pick(&Server::ALL))],
    };
    let count = || links.iter().map(|link| affected(link)).sum::<u64>();
    let before = count();
    links.iter().for_each(|link| switch(link, true));
    std::thread::sleep(dice.millis(500, 3_000));
    links.iter().for_each(|link| switch(link, false));
    u64::from(count() > before)
}
