//! A RabbitMQ of a test's own, one node or a cluster: for what would disturb
//! every other test on a shared one.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::eventually;
use super::world::{random, server};

/// Nodes that are private to one test. Dropping it ends them, unless other
/// tests have them in turn.
#[derive(Debug)]
pub struct PrivateBroker {
    folder: PathBuf,
    nodes: usize,
    /// Locked, while it is this test's turn.
    turn: Option<File>,
}

impl PrivateBroker {
    /// Starts so many nodes, at most 3, which form a cluster. They run from
    /// the same place as the shared one.
    pub fn start(nodes: usize) -> Self {
        let beside = PathBuf::from(server("ACKONCE_SERVICES_DIR"));
        let name = format!("private-{}-{:08x}", std::process::id(), random() as u32);
        let broker = Self {
            folder: beside.join(name),
            nodes,
            turn: None,
        };
        broker.services(&["up", "--nodes", &nodes.to_string(), "rabbitmq"], &beside);
        broker
    }

    /// The one that tests have in turn, for what ends with the test: an alarm, a
    /// limit. The first of them starts it, and `script/services down` ends it.
    pub fn in_turn() -> Self {
        let beside = PathBuf::from(server("ACKONCE_SERVICES_DIR"));
        // Any file would do that is there as long as the servers are.
        let turn = File::open(beside.join("state")).expect("script/services up");
        turn.lock().expect("the lock");
        let broker = Self {
            folder: beside.join("private-in-turn"),
            nodes: 1,
            turn: Some(turn),
        };
        broker.services(&["up", "rabbitmq"], &beside);
        broker
    }

    fn services(&self, arguments: &[&str], beside: &Path) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("script/services");
        let mut command = Command::new(script);
        command
            .args(arguments)
            .env("ACKONCE_SERVICES_DIR", &self.folder)
            .env_remove("ACKONCE_RABBITMQ_ROOT");
        if let Some(root) = recall(beside, "root rabbitmq") {
            command.env("ACKONCE_RABBITMQ_ROOT", root);
        }
        let output = command.output().expect("script/services starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "script/services: {said}");
    }

    /// URL of the vhost `/` on a node, counted from 0.
    pub fn amqp_url(&self, node: usize) -> String {
        format!(
            "amqp://guest:guest@127.0.0.1:{}/%2f",
            self.port("amqp", node)
        )
    }

    /// URL of a node's management API.
    pub fn management_url(&self, node: usize) -> String {
        format!(
            "http://guest:guest@127.0.0.1:{}",
            self.port("management", node)
        )
    }

    /// A node's name, as RabbitMQ has it.
    pub fn name(&self, node: usize) -> String {
        format!("ackonce-{}@localhost", self.port("amqp", node))
    }

    /// A node's process.
    pub fn pid(&self, node: usize) -> Pid {
        let process = self.recall("process rabbitmq", node);
        let pid = process.split(' ').next().expect("a pid");
        Pid::from_raw(pid.parse().expect("a pid"))
    }

    fn port(&self, kind: &str, node: usize) -> String {
        self.recall(&format!("port {kind}"), node)
    }

    fn recall(&self, what: &str, node: usize) -> String {
        let suffix = suffix(node);
        let found = recall(&self.folder, &format!("{what}{suffix}"));
        found.unwrap_or_else(|| panic!("no {what}{suffix} in {}", self.folder.display()))
    }

    /// Runs rabbitmqctl on a node and returns what it says.
    pub fn ctl(&self, node: usize, arguments: &[&str]) -> String {
        let program = self.folder.join(format!("rabbitmqctl{}", suffix(node)));
        let output = Command::new(program)
            .args(arguments)
            .output()
            .expect("rabbitmqctl starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "rabbitmqctl {arguments:?}: {said}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Runs Erlang code in the first node, and returns what it says.
    pub fn evaluate(&self, code: &str) -> String {
        self.ctl(0, &["eval", code])
    }

    /// Stops a node where it stands, until [`Self::thaw`].
    pub fn freeze(&self, node: usize) {
        let pid = self.pid(node);
        kill(pid, Signal::SIGSTOP).expect("the node takes a signal");
        eventually("the node is frozen", || state_of(pid) == Some('T'));
    }

    /// Lets a frozen node go on.
    pub fn thaw(&self, node: usize) {
        kill(self.pid(node), Signal::SIGCONT).expect("the node takes a signal");
    }

    /// Kills a node, and waits until it is gone.
    pub fn kill(&self, node: usize) {
        let pid = self.pid(node);
        kill(pid, Signal::SIGKILL).expect("the node takes a signal");
        eventually("the node is gone", || {
            state_of(pid).is_none_or(|state| state == 'Z')
        });
    }

    /// Starts the nodes that were killed, with the data they had.
    pub fn revive(&self) {
        let beside = self.folder.parent().expect("a folder");
        let nodes = self.nodes.to_string();
        self.services(&["up", "--nodes", &nodes, "rabbitmq"], beside);
    }
}

impl Drop for PrivateBroker {
    fn drop(&mut self) {
        if self.turn.is_some() {
            return;
        }
        let beside = self.folder.parent().expect("a folder");
        let ended = std::panic::AssertUnwindSafe(|| self.services(&["down"], beside));
        if std::panic::catch_unwind(ended).is_err() {
            eprintln!("failed to end the servers in {}", self.folder.display());
        }
    }
}

fn suffix(node: usize) -> String {
    match node {
        0 => String::new(),
        other => (other + 1).to_string(),
    }
}

/// What script/services remembers, the last entry of its kind.
fn recall(folder: &Path, what: &str) -> Option<String> {
    let state = std::fs::read_to_string(folder.join("state")).ok()?;
    let entry = |line: &str| {
        line.strip_prefix(what)?
            .strip_prefix(' ')
            .map(str::to_owned)
    };
    state.lines().rev().find_map(entry)
}

fn state_of(pid: Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}
