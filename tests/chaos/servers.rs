//! Servers of this run's own, because the nemesis kills and freezes them.
//! `script/services` starts them, and starts again what was killed, with the
//! same ports and data.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::disk::Disk;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// One of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Server {
    RabbitMq,
    Redis,
    Postgres,
}

impl Server {
    pub const ALL: [Self; 3] = [Self::RabbitMq, Self::Redis, Self::Postgres];

    pub fn name(self) -> &'static str {
        match self {
            Self::RabbitMq => "rabbitmq",
            Self::Redis => "redis",
            Self::Postgres => "postgres",
        }
    }

    fn port_name(self) -> &'static str {
        match self {
            Self::RabbitMq => "amqp",
            other => other.name(),
        }
    }
}

/// How long a server may take to end, and to answer again.
const PATIENCE: Duration = Duration::from_secs(90);

/// The servers. Dropping this ends them and removes what they wrote.
#[derive(Debug)]
pub struct Servers {
    folder: PathBuf,
    script: PathBuf,
    /// Held while `script/services` works.
    starting: Mutex<()>,
    disk: Option<Disk>,
}

impl Servers {
    /// Starts all three, in a folder that bears this process's id, by which
    /// `script/test` finds what a run left behind that was killed.
    ///
    /// With a small disk for the ledger, if that is wanted and can be made.
    pub fn start(small_disk: bool) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = match std::env::var_os("ACKONCE_CHAOS_DIR") {
            Some(folder) => PathBuf::from(folder),
            None => root.join(format!(".services/chaos-{}", std::process::id())),
        };
        std::fs::create_dir_all(&folder).expect("a folder for the servers");
        let mut servers = Self {
            folder,
            script: root.join("script/services"),
            starting: Mutex::new(()),
            disk: None,
        };
        assert!(servers.up(), "the private servers do not start");
        if small_disk {
            servers.disk = Disk::mount(servers.folder.join("disk"));
        }
        servers
    }

    /// Starts what does not run, and waits until it answers. Whether it does.
    pub fn up(&self) -> bool {
        let _turn = self.starting.lock().expect("the turn");
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.with_extension("log"));
        let output = log.map_or_else(|_| Stdio::null(), Stdio::from);
        self.services("up")
            .stderr(output)
            .status()
            .is_ok_and(|status| status.success())
    }

    fn services(&self, command: &str) -> Command {
        let mut services = Command::new(&self.script);
        services
            .arg(command)
            .env("ACKONCE_SERVICES_DIR", &self.folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        services
    }

    /// What `script/services` remembers of `kind` and `name`.
    fn recall(&self, kind: &str, name: &str) -> String {
        let state = std::fs::read_to_string(self.folder.join("state")).expect("the state file");
        let stem = format!("{kind} {name} ");
        let last = state
            .lines()
            .rev()
            .find_map(|line| line.strip_prefix(&stem));
        let last = last.unwrap_or_else(|| panic!("{kind} of {name} in the state file"));
        last.to_owned()
    }

    /// The small disk, if there is one.
    pub fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref()
    }

    /// Its process.
    pub fn pid(&self, server: Server) -> i32 {
        let process = self.recall("process", server.name());
        let pid = process.split(' ').next().and_then(|pid| pid.parse().ok());
        pid.expect("a process id")
    }

    pub fn address(&self, server: Server) -> SocketAddr {
        let port = self.recall("port", server.port_name());
        SocketAddr::from(([127, 0, 0, 1], port.parse().expect("a port")))
    }

    /// The management API of RabbitMQ.
    pub fn management_url(&self) -> String {
        let port = self.recall("port", "management");
        format!("http://guest:guest@127.0.0.1:{port}")
    }

    /// URL of `name` (vhost or database) at `address`, which may be a proxy's.
    pub fn url(server: Server, address: SocketAddr, name: &str) -> String {
        match server {
            Server::RabbitMq => format!("amqp://guest:guest@{address}/{name}"),
            Server::Redis => format!("redis://{address}/0"),
            Server::Postgres => format!("postgres://ackonce@{address}/{name}"),
        }
    }

    /// When the node raises its memory alarm, by its configuration.
    pub fn memory_limit(&self) -> String {
        let home = self.recall("home", "rabbitmq");
        let config = std::fs::read_to_string(format!("{home}/rabbitmq.conf"));
        let config = config.expect("the broker's configuration");
        let mut lines = config.lines();
        let limit =
            lines.find_map(|line| line.strip_prefix("vm_memory_high_watermark.absolute = "));
        limit.expect("a memory limit").to_owned()
    }

    /// Runs `rabbitmqctl`; whether it succeeded.
    pub fn rabbitmqctl(&self, arguments: &[&str]) -> bool {
        Command::new(self.folder.join("rabbitmqctl"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    }

    /// Sends `signal` and waits until the process is gone. Whether it is.
    pub fn end(&self, server: Server, signal: Signal) -> bool {
        let pid = self.pid(server);
        kill(Pid::from_raw(pid), signal).is_ok() && wait_until(PATIENCE, || state_of(pid) == 'Z')
    }

    /// Starts it again. When it answered, and `None` if it did not.
    pub fn start_again(&self, server: Server) -> Option<Instant> {
        let address = self.address(server);
        std::thread::scope(|scope| {
            let up = scope.spawn(|| self.up());
            let mut back = None;
            wait_until(PATIENCE, || {
                if greets(server, address) {
                    back = Some(Instant::now());
                }
                back.is_some() || up.is_finished()
            });
            let up = up.join().expect("the starting thread");
            back.filter(|_| up)
        })
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let down = self.services("down").stderr(Stdio::null()).status();
        if !down.is_ok_and(|status| status.success()) {
            eprintln!("failed to end the servers in {}", self.folder.display());
        }
        drop(std::fs::remove_file(self.folder.with_extension("log")));
        // Nobody works on it any more.
        self.disk = None;
        drop(std::fs::remove_dir(&self.folder));
    }
}

/// Whether a client would be let in.
fn greets(server: Server, address: SocketAddr) -> bool {
    let (hello, answer): (&[u8], u8) = match server {
        Server::RabbitMq => (b"AMQP\0\0\x09\x01", 1),
        Server::Redis => (b"PING\r\n", b'+'),
        // The startup message of user and database `ackonce`; authentication.
        Server::Postgres => (
            b"\0\0\0\x27\0\x03\0\0user\0ackonce\0database\0ackonce\0\0",
            b'R',
        ),
    };
    let exchange = || -> std::io::Result<u8> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(hello)?;
        let mut first = [0];
        stream.read_exact(&mut first)?;
        Ok(first[0])
    };
    exchange().is_ok_and(|first| first == answer)
}

/// State of a process as the kernel tells it: `T` is stopped. `Z` when it is a
/// zombie or gone.
pub fn state_of(pid: i32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat
        .rsplit(") ")
        .next()
        .and_then(|rest| rest.chars().next());
    state.unwrap_or('Z')
}

/// Stops processes for a while. How many were seen to stand still.
pub fn freeze(pids: &[i32], length: Duration) -> u64 {
    let send = |signal| {
        for pid in pids {
            // Fails when it is gone, which is as good.
            kill(Pid::from_raw(*pid), signal).ok();
        }
    };
    send(Signal::SIGSTOP);
    let frozen = |pid: &&i32| wait_until(Duration::from_secs(1), || "TZ".contains(state_of(**pid)));
    let stopped: Vec<&i32> = pids.iter().filter(frozen).collect();
    let stopped = stopped.iter().filter(|pid| state_of(***pid) == 'T').count();
    std::thread::sleep(length);
    send(Signal::SIGCONT);
    stopped as u64
}

/// Polls `condition` until it holds or `within` has passed; whether it held.
pub fn wait_until(within: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + within;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
