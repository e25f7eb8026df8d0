//! `/metrics` and its page of the documentation say the same, nothing that a
//! message carries shows there, and Prometheus understands it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use crate::common::admin::read_reply;
use crate::common::{Admin, Consumer, Msg, ORDERS, World, eventually, numbered};

/// What docs/metrics.md says: type and labels of each metric.
fn documented() -> BTreeMap<String, (String, BTreeSet<String>)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let text = std::fs::read_to_string(path).unwrap();
    let ticked = |cell: &str| -> BTreeSet<String> {
        let parts = cell.split('`').enumerate();
        let ticked = parts.filter(|(number, _)| number % 2 == 1);
        ticked.map(|(_, name)| name.to_owned()).collect()
    };
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let described = rows.filter_map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let kind = cells[2];
        let known = ["counter", "gauge", "histogram"].contains(&kind);
        let name = cells[1].trim_matches('`').to_owned();
        known.then(|| (name, (kind.to_owned(), ticked(cells[3]))))
    });
    described.collect()
}

/// What `/metrics` has: type and labels of each metric.
fn shown(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
    let mut found = BTreeMap::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            found.insert(name.to_owned(), (kind.to_owned(), BTreeSet::new()));
        } else if !line.starts_with('#') {
            let (name, labels) = line.split_once('{').unwrap_or((line, ""));
            let family = |name: &str| -> String {
                let suffixes = ["_bucket", "_sum", "_count"];
                let stem = suffixes.iter().find_map(|end| name.strip_suffix(end));
                stem.unwrap_or(name).to_owned()
            };
            let name = name.split(' ').next().unwrap();
            let entry = match found.contains_key(name) {
                true => found.get_mut(name),
                false => found.get_mut(&family(name)),
            };
            let (_, names) = entry.unwrap_or_else(|| panic!("no type: {line}"));
            let labels = labels
                .split(&['{', ','][..])
                .filter_map(|l| l.split_once('='));
            let labels = labels.map(|(label, _)| label.to_owned());
            names.extend(labels.filter(|label| label != "le"));
        }
    }
    found
}

#[test]
fn the_page_and_the_daemon_have_the_same_metrics_before_the_first_message() {
    let world = World::new();
    let (daemon, admin) = world.watch(&world.orders());
    let text = admin.text();
    assert_eq!(documented(), shown(&text));
    // Every value of a label is explained.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let page = std::fs::read_to_string(path).unwrap();
    for series in admin.metrics().names() {
        let labels = series.split_once('{').map_or("", |(_, labels)| labels);
        for (name, value) in labels.split(',').filter_map(|label| label.split_once('=')) {
            let value = value.trim_end_matches('}').trim_matches('"');
            let free = ["consumer", "queue", "le", "version", "handler"].contains(&name);
            let explained = free || page.contains(&format!("`{value}`"));
            assert!(
                explained,
                "{series}: {value} does not stand in docs/metrics.md"
            );
        }
    }
    daemon.stop();
    // One that goes without Redis says nothing of it.
    let daemon = world.run(&world.orders().set("redis.enabled", false));
    let text = Admin::of(&daemon).text();
    assert!(
        !text.contains(r#"server_up{consumer="orders",server="redis"}"#),
        "{text}"
    );
    daemon.stop();
}

#[test]
fn nothing_that_a_message_carries_makes_a_series() {
    let world = World::new();
    let consumer = Consumer::orders().bind("events", "topic", "#");
    let (daemon, admin) = world.watch(&world.config().consumer(consumer));
    let names = |admin: &Admin| -> Vec<String> {
        let series = admin.metrics();
        series.names().into_iter().map(str::to_owned).collect()
    };
    let before = names(&admin);
    for number in 0..30 {
        let hostile = format!("a\"}} {number}\\\n# TYPE x counter");
        let message = Msg::new(&hostile).properties(|p| {
            p.with_app_id("évil".to_owned())
                .with_type_(format!("t{number}"))
        });
        world
            .broker
            .publish("events", &format!("key.\"{{{number}}}\""), [message]);
    }
    world.broker.send(ORDERS, [Msg::anonymous()]);
    admin.wait_for(&[
        ("messages_total applied", 30.0),
        ("messages_total dead-lettered", 1.0),
    ]);
    assert_eq!(names(&admin), before);
    promtool_check(&admin.text());
    daemon.stop();
}

/// Has Prometheus's own tool read `text`, and complain about names and types.
fn promtool_check(text: &str) {
    let mut child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed: run script/services install --for-tests");
    let mut input = child.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(
        output.stdout.is_empty() && output.stderr.is_empty(),
        "{output:?}"
    );
}

/// A Prometheus of its own, which scrapes one daemon every second and evaluates
/// the project's rules. Dropping it ends it.
struct Prometheus {
    process: Child,
    address: SocketAddr,
}

impl Prometheus {
    fn start(world: &World, admin: &Admin) -> Self {
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("ops/alerts.yml");
        let config = serde_json::json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [rules],
            "scrape_configs": [{
                "job_name": "ackonce",
                "static_configs": [{"targets": [admin.address().to_string()]}],
            }],
        });
        // YAML is a superset of JSON.
        let file = world.write("prometheus.yml", &config.to_string());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                world.path("tsdb").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(world.path("prometheus.log")).unwrap())
            .spawn()
            .expect("Prometheus is installed: run script/services install --for-tests");
        Self { process, address }
    }

    /// An answer of its API, once it gives any.
    fn get(&self, path: &str) -> Option<serde_json::Value> {
        let mut stream = TcpStream::connect(self.address).ok()?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: prometheus\r\n\r\n");
        stream.write_all(request.as_bytes()).ok()?;
        serde_json::from_str(&read_reply(&mut stream).body).ok()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[test]
fn a_real_prometheus_reads_them_and_has_the_rules() {
    let world = World::new();
    let (daemon, admin) = world.watch(&world.orders());
    promtool_check(&admin.text());
    world.broker.send(ORDERS, numbered("m", 7));
    admin.wait_for(&[("messages_total applied", 7.0)]);
    let prometheus = Prometheus::start(&world, &admin);
    let value = || {
        let query = "sum by (job) (ackonce_messages_total{outcome=\"applied\"})";
        let query = utf8_percent_encode(query, NON_ALPHANUMERIC);
        let reply = prometheus.get(&format!("/api/v1/query?query={query}"))?;
        let value = reply["data"]["result"][0]["value"][1].as_str()?;
        value.parse::<f64>().ok()
    };
    eventually("Prometheus has the value", || value() == Some(7.0));
    // What it does not understand of the rules, it says here.
    eventually("every rule was evaluated", || {
        let Some(reply) = prometheus.get("/api/v1/rules") else {
            return false;
        };
        let groups = reply["data"]["groups"].as_array().cloned();
        let rules: Vec<_> = groups
            .into_iter()
            .flatten()
            .flat_map(|group| group["rules"].as_array().cloned().unwrap_or_default())
            .collect();
        !rules.is_empty() && rules.iter().all(|rule| rule["health"] == "ok")
    });
    drop(prometheus);
    daemon.stop();
}
