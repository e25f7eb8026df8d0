//! What stands in `ops/`: alert rules, dashboard and manifests, checked by
//! Prometheus's own tool and against what the daemon really has. That the table
//! in docs/metrics.md is what the daemon has, tests/it/metrics.rs holds.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::common::run_ackonce;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The documents of a YAML file.
fn yaml(path: &str) -> Vec<Value> {
    let program = "import json, sys, yaml; \
                   print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    let mut said = String::new();
    // The system's has what script/services installs; the first may be another.
    for python in ["python3", "/usr/bin/python3"] {
        let output = Command::new(python)
            .args(["-c", program])
            .arg(root().join(path))
            .output()
            .expect("Python is installed");
        if output.status.success() {
            return serde_json::from_slice(&output.stdout).unwrap();
        }
        said += &String::from_utf8_lossy(&output.stderr);
    }
    panic!("{path}: {said}\nwithout PyYAML, run script/services install --for-tests");
}

fn promtool(arguments: &[&str], path: &Path) -> String {
    let output = Command::new("promtool")
        .args(arguments)
        .arg(path)
        .output()
        .expect("promtool is installed: run script/services install --for-tests");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}"))
}

/// The alert rules.
fn alerts() -> Vec<Value> {
    let file = yaml("ops/alerts.yml").remove(0);
    let groups = file["groups"].as_array().unwrap();
    let rules = groups.iter().flat_map(|g| g["rules"].as_array().unwrap());
    let rules: Vec<Value> = rules.cloned().collect();
    assert!(rules.len() >= 7, "{rules:?}");
    rules
}

/// Names of all metrics by docs/metrics.md, as they are asked for.
fn metrics() -> BTreeSet<String> {
    let page = read("docs/metrics.md");
    let mut names = BTreeSet::new();
    for row in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let name = cells[1].trim_matches('`');
        match cells[2] {
            "counter" | "gauge" => {
                names.insert(name.to_owned());
            }
            "histogram" => {
                names.extend(["_bucket", "_sum", "_count"].map(|end| format!("{name}{end}")))
            }
            _ => {}
        }
    }
    assert!(names.len() > 25, "the table was not found");
    names
}

/// What looks like a metric of ours in a query.
fn asked_for(query: &str) -> Vec<&str> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words
        .filter(|word| word.starts_with("ackonce_") || word.starts_with("process_"))
        .collect()
}

#[test]
fn the_rules_and_their_unit_tests_pass() {
    let rules = root().join("ops/alerts.yml");
    let count = alerts().len();
    let said = promtool(&["check", "rules"], &rules);
    assert!(said.contains(&format!("{count} rules found")), "{said}");
    let said = promtool(&["test", "rules"], &root().join("ops/alerts_test.yml"));
    assert!(said.contains("SUCCESS"), "{said}");
}

#[test]
fn each_alert_is_tested_firing_and_silent_and_has_its_section_in_the_runbook() {
    let tests = yaml("ops/alerts_test.yml").remove(0);
    let cases: Vec<&Value> = tests["tests"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|test| test["alert_rule_test"].as_array().unwrap())
        .collect();
    let expects = |name: &str, firing: bool| {
        cases.iter().any(|case| {
            let alerts = case["exp_alerts"].as_array().unwrap();
            case["alertname"] == name && alerts.is_empty() != firing
        })
    };
    let page = read("docs/runbook.md");
    let mut sections: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("## "))
        .filter(|title| title.starts_with("Ackonce"))
        .collect();
    for alert in alerts() {
        let name = text(&alert["alert"]);
        assert!(expects(name, true), "{name}: no test has it fire");
        assert!(expects(name, false), "{name}: no test has it silent");
        let severity = text(&alert["labels"]["severity"]);
        assert!(
            ["critical", "warning", "info"].contains(&severity),
            "{name}: {severity}"
        );
        for annotation in ["summary", "description"] {
            assert!(text(&alert["annotations"][annotation]).len() > 20, "{name}");
        }
        let url = format!("docs/runbook.md#{}", name.to_lowercase());
        assert_eq!(text(&alert["annotations"]["runbook_url"]), url);
        assert!(
            sections.remove(name),
            "{name} has no section in docs/runbook.md"
        );
    }
    assert_eq!(sections, BTreeSet::new(), "sections of no alert");
}

#[test]
fn the_rules_ask_for_metrics_that_there_are() {
    let known = metrics();
    let mut count = 0;
    for alert in alerts() {
        for name in asked_for(text(&alert["expr"])) {
            assert!(known.contains(name), "{}: {name}", alert["alert"]);
            count += 1;
        }
    }
    assert!(count > 10, "{count}");
}

#[test]
fn the_dashboard_is_well_formed_and_asks_for_metrics_that_there_are() {
    let dashboard: Value = serde_json::from_str(&read("ops/dashboard.json")).unwrap();
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let source = variables
        .iter()
        .find(|v| v["name"] == "datasource")
        .unwrap();
    assert_eq!(
        (text(&source["type"]), text(&source["query"])),
        ("datasource", "prometheus")
    );
    let known = metrics();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    let mut taken = BTreeMap::new();
    let mut asked = BTreeSet::new();
    let mut rules = Vec::new();
    for panel in panels {
        let title = text(&panel["title"]);
        assert!(
            ids.insert(panel["id"].as_u64().unwrap()),
            "{title}: its id is taken"
        );
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        let place = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{title}");
        for x in place("x")..place("x") + place("w") {
            for y in place("y")..place("y") + place("h") {
                let other = taken.insert((x, y), title);
                assert_eq!(other, None, "{title} covers another panel");
            }
        }
        let mut refs = BTreeSet::new();
        for target in panel["targets"].as_array().unwrap() {
            assert!(refs.insert(text(&target["refId"])), "{title}");
            let query = text(&target["expr"]);
            for name in asked_for(query) {
                assert!(known.contains(name), "{title}: {name}");
                asked.insert(name.to_owned());
            }
            let query = query.replace("$__rate_interval", "5m");
            rules.push(serde_json::json!({"record": format!("r:{}", rules.len()), "expr": query}));
        }
    }
    // What the daemon has and nobody looks at.
    let family = |name: &str| {
        let stem = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end));
        stem.unwrap_or(name).to_owned()
    };
    let shown: BTreeSet<String> = asked.iter().map(|name| family(name)).collect();
    let unseen: Vec<String> = known
        .iter()
        .map(|name| family(name))
        .filter(|name| name.starts_with("ackonce_") && !shown.contains(name))
        .collect();
    let elsewhere = [
        "ackonce_build_info",
        "ackonce_deliveries_total",
        "ackonce_pauses_total",
    ];
    assert_eq!(unseen, elsewhere, "counted and on no panel");
    // Prometheus understands each query.
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("queries.yml");
    let groups = serde_json::json!({"groups": [{"name": "dashboard", "rules": rules}]});
    std::fs::write(&file, groups.to_string()).unwrap();
    promtool(&["check", "rules"], &file);
}

/// A manifest of a kind, among those of a file.
fn manifest<'a>(documents: &'a [Value], kind: &str) -> &'a Value {
    let found: Vec<&Value> = documents.iter().filter(|d| d["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "{kind}");
    found[0]
}

/// Seconds of a duration that is written with `s`.
fn seconds(duration: &str) -> u64 {
    duration.strip_suffix('s').unwrap().parse().unwrap()
}

#[test]
fn the_manifests_fit_together_and_the_configuration_in_them_is_valid() {
    let documents = yaml("ops/kubernetes/ackonce.yaml");
    let secret = &manifest(&documents, "Secret")["stringData"];
    let config = text(&manifest(&documents, "ConfigMap")["data"]["config.toml"]);
    let folder = TempDir::new().unwrap();
    for (name, value) in secret.as_object().unwrap() {
        std::fs::write(folder.path().join(name), text(value)).unwrap();
    }
    // The secrets are where the pod has them, save for the folder.
    let mounted = "/run/secrets/ackonce";
    let here = folder.path().to_string_lossy().into_owned();
    assert_eq!(config.matches(mounted).count(), 3);
    let path = folder.path().join("config.toml");
    std::fs::write(&path, config.replace(mounted, &here)).unwrap();
    let output = run_ackonce(&["check", "--offline", "--config", &path.to_string_lossy()]);
    assert!(output.status.success(), "{output:?}");
    let config: toml::Table = config.parse().unwrap();

    let pod = &manifest(&documents, "Deployment")["spec"]["template"];
    let spec = &pod["spec"];
    let container = &spec["containers"][0];
    let port = container["ports"][0]["containerPort"].as_u64().unwrap();
    let listen = config["admin"]["listen"].as_str().unwrap();
    assert_eq!(listen, format!("0.0.0.0:{port}"));
    for (probe, path) in [
        ("startupProbe", "/livez"),
        ("livenessProbe", "/livez"),
        ("readinessProbe", "/readyz"),
    ] {
        assert_eq!(container[probe]["httpGet"]["path"], path);
        assert_eq!(
            container[probe]["httpGet"]["port"],
            container["ports"][0]["name"]
        );
    }
    let grace = spec["terminationGracePeriodSeconds"].as_u64().unwrap();
    let drain = seconds(config["daemon"]["shutdown_timeout"].as_str().unwrap());
    assert!(grace >= drain + 10, "{grace} s for a drain of {drain} s");
    let places: Vec<&str> = container["volumeMounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mount| text(&mount["mountPath"]))
        .collect();
    assert_eq!(places, ["/etc/ackonce", mounted]);
    assert_eq!(container["args"][2], "/etc/ackonce/config.toml");
    assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
    assert_eq!(
        spec["securityContext"]["seccompProfile"]["type"],
        "RuntimeDefault"
    );
    assert_eq!(spec["automountServiceAccountToken"], false);
    let own = &container["securityContext"];
    assert_eq!(own["allowPrivilegeEscalation"], false);
    assert_eq!(own["readOnlyRootFilesystem"], true);
    assert_eq!(own["capabilities"]["drop"][0], "ALL");

    let labels = &pod["metadata"]["labels"];
    let selectors = [
        &manifest(&documents, "Deployment")["spec"]["selector"]["matchLabels"],
        &manifest(&documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        &manifest(&documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        &manifest(&yaml("ops/kubernetes/podmonitor.yaml"), "PodMonitor")["spec"]["selector"]["matchLabels"].clone(),
    ];
    for selector in selectors {
        assert_eq!(selector, labels);
    }
}

#[test]
fn the_monitor_and_the_scaler_point_at_what_there_is() {
    let documents = yaml("ops/kubernetes/ackonce.yaml");
    let deployment = manifest(&documents, "Deployment");
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    let monitors = yaml("ops/kubernetes/podmonitor.yaml");
    let endpoint = &manifest(&monitors, "PodMonitor")["spec"]["podMetricsEndpoints"][0];
    assert_eq!(endpoint["port"], container["ports"][0]["name"]);
    assert_eq!(endpoint["path"], "/metrics");

    let scaling = yaml("ops/kubernetes/keda.yaml");
    let scaler = &manifest(&scaling, "ScaledObject")["spec"];
    assert_eq!(
        scaler["scaleTargetRef"]["name"],
        deployment["metadata"]["name"]
    );
    assert!(
        scaler["minReplicaCount"].as_u64().unwrap() >= 1,
        "somebody prunes"
    );
    let trigger = &scaler["triggers"][0];
    assert_eq!(
        (text(&trigger["type"]), text(&trigger["metadata"]["mode"])),
        ("rabbitmq", "QueueLength")
    );
    // KEDA takes strings alone here.
    for (key, value) in trigger["metadata"].as_object().unwrap() {
        assert!(value.is_string(), "{key}: {value}");
    }
    let config = text(&manifest(&documents, "ConfigMap")["data"]["config.toml"]);
    let config: toml::Table = config.parse().unwrap();
    let queue = config["consumer"][0]["topology"]["queue"].as_str().unwrap();
    assert_eq!(trigger["metadata"]["queueName"], queue);
    let access = manifest(&scaling, "TriggerAuthentication");
    assert_eq!(
        trigger["authenticationRef"]["name"],
        access["metadata"]["name"]
    );
    let reference = &access["spec"]["secretTargetRef"][0];
    let secret = manifest(&documents, "Secret");
    assert_eq!(reference["parameter"], "host");
    assert_eq!(reference["name"], secret["metadata"]["name"]);
    assert!(secret["stringData"][text(&reference["key"])].is_string());
}
