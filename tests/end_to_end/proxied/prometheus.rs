//! What Prometheus makes of us: the metrics, the alert rules and the dashboard, with its own programs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use highwater::demo::port::ReservedPort;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::fixture::*;

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn text(path: &str) -> String {
    std::fs::read_to_string(file(path)).unwrap()
}

/// One of Prometheus's programs, from the directory that HIGHWATER_PROMETHEUS names or from the machine; without
/// it the test says so and is over. `make metrics-check` fetches and names them.
fn program(name: &str) -> Option<PathBuf> {
    let named = std::env::var_os("HIGHWATER_PROMETHEUS");
    let path = named.as_ref().map_or_else(|| PathBuf::from("/usr/bin"), PathBuf::from).join(name);
    if path.exists() {
        return Some(path);
    }
    assert!(named.is_none(), "HIGHWATER_PROMETHEUS: there is no {}", path.display());
    eprintln!("SKIPPED: no {name} on this machine (`make metrics-check` fetches it)");
    None
}

/// Every word that begins with `highwater_`, without what a histogram appends.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !word(c))
        .filter(|w| w.starts_with("highwater_"))
        .map(|w| {
            ["_bucket", "_sum", "_count"].iter().find_map(|end| w.strip_suffix(end)).unwrap_or(w).to_owned()
        })
        .collect()
}

/// A metric is one that src/metrics.rs names; that docs/METRICS.md describes the same ones is another test's.
fn assert_known(used: &BTreeSet<String>, whose: &str) {
    let source = text("src/metrics.rs");
    for name in used {
        assert!(source.contains(&format!("\"{name}\"")), "{whose}: {name} is no metric");
    }
}

#[test]
fn each_alert_has_a_unit_test_a_section_of_the_runbook_and_metrics_that_exist() {
    let rules = text("docs/prometheus/highwater.rules.yml");
    assert_known(&metrics_in(&rules), "highwater.rules.yml");
    let tests = text("docs/prometheus/highwater.test.yml");
    let runbook = text("docs/RUNBOOK.md");
    let alerts: Vec<&str> = rules.lines().filter_map(|l| l.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 15);
    for alert in &alerts {
        assert!(tests.contains(&format!("- name: {alert} fires")), "{alert} has no test that fires it");
        assert!(
            tests.contains(&format!("- name: {alert} is quiet")),
            "{alert} has no test that keeps it quiet"
        );
        assert!(runbook.contains(&format!("\n## {alert}\n")), "{alert} has no section of docs/RUNBOOK.md");
        let link = format!("runbook: docs/RUNBOOK.md#{}", alert.to_lowercase());
        assert!(rules.contains(&link), "{alert} does not point at its section");
    }
    for section in runbook.lines().filter_map(|l| l.strip_prefix("## Highwater")) {
        let name = format!("Highwater{section}");
        assert!(alerts.contains(&name.as_str()), "{name} is in docs/RUNBOOK.md and no alert");
    }
}

#[test]
fn the_dashboard_is_whole_and_asks_for_metrics_that_exist() {
    let dashboard: Value = serde_json::from_str(&text("docs/grafana/highwater.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    let mut places = BTreeSet::new();
    let mut drawn = 0;
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}: its id is taken");
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(x < 24 && places.insert((x, y)), "{}: it lies on another", panel["title"]);
            }
        }
        let Some(targets) = panel["targets"].as_array() else { continue };
        assert!(!panel["description"].as_str().unwrap().is_empty());
        for target in targets {
            let expr = target["expr"].as_str().unwrap();
            let used = metrics_in(expr);
            assert!(!used.is_empty(), "{expr}");
            assert_known(&used, "highwater.json");
            drawn += 1;
        }
    }
    assert!(drawn >= 20, "{drawn}");
}

#[tokio::test]
async fn promtool_finds_no_fault_with_metrics_rules_and_the_dashboards_questions() {
    let Some(promtool) = program("promtool") else { return };
    let run = |arguments: &[&str], input: &str| {
        use std::io::Write as _;
        let mut child = Command::new(&promtool)
            .args(arguments)
            .current_dir(file("docs/prometheus"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), said)
    };
    for arguments in [["check", "rules", "highwater.rules.yml"], ["test", "rules", "highwater.test.yml"]] {
        let (good, said) = run(&arguments, "");
        assert!(good, "{arguments:?}: {said}");
    }
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    proxy.connect().await.simple_query("SELECT 1").await.unwrap();
    let (_, metrics) = proxy.get("/metrics").await.unwrap();
    let (good, said) = run(&["check", "metrics"], &metrics);
    assert!(good && said.is_empty(), "promtool check metrics: {said}");
    let mut rules = "groups: [ { name: dashboard, rules: [\n".to_owned();
    for (index, expr) in dashboards_questions().into_iter().enumerate() {
        rules += &format!("{{ record: 'q{index}', expr: {} }},\n", Value::from(expr));
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dashboard.yml");
    std::fs::write(&path, rules + "] } ]\n").unwrap();
    let (good, said) = run(&["check", "rules", path.to_str().unwrap()], "");
    assert!(good, "{said}");
}

/// The dashboard's questions, with values in place of its variables.
fn dashboards_questions() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&text("docs/grafana/highwater.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.filter_map(|panel| panel["targets"].as_array()).flatten();
    targets
        .map(|target| target["expr"].as_str().unwrap().replace("$job", ".*").replace("$instance", ".*"))
        .collect()
}

/// A real Prometheus on a port of its own.
struct Prometheus {
    _process: tokio::process::Child,
    port: ReservedPort,
    _files: tempfile::TempDir,
}

impl Prometheus {
    /// Scrapes `http` each 200 ms, with the rules as they are shipped, but that they wait for nothing: their
    /// patience is what the unit tests show.
    async fn start(program: &Path, http: u16, token: &str) -> Prometheus {
        let files = tempfile::tempdir().unwrap();
        let rules = text("docs/prometheus/highwater.rules.yml");
        let hasty: Vec<&str> = rules.lines().filter(|line| !line.trim().starts_with("for: ")).collect();
        std::fs::write(files.path().join("rules.yml"), hasty.join("\n")).unwrap();
        let config = format!(
            "global: {{ scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms }}\n\
             rule_files: [ rules.yml ]\n\
             scrape_configs:\n\
             - job_name: highwater\n  authorization: {{ credentials: {token} }}\n  \
             static_configs: [ {{ targets: [ '127.0.0.1:{http}' ] }} ]\n"
        );
        std::fs::write(files.path().join("prometheus.yml"), config).unwrap();
        let port = ReservedPort::claim().unwrap();
        let process = tokio::process::Command::new(program)
            .arg(format!("--config.file={}", files.path().join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", files.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{}", port.number()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(files.path().join("log")).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Prometheus { _process: process, port, _files: files }
    }

    /// An answer of its API; null while it does not answer.
    async fn ask(&self, path: &str) -> Value {
        let asked = async {
            let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port.number())).await.ok()?;
            // HTTP/1.0: an answer in one piece.
            stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").as_bytes()).await.ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.ok()?;
            serde_json::from_str::<Value>(answer.split_once("\r\n\r\n")?.1).ok()
        };
        asked.await.unwrap_or(Value::Null)
    }

    /// The names of the alerts that fire, each with its node.
    async fn firing(&self) -> BTreeSet<(String, String)> {
        let answer = self.ask("/api/v1/alerts").await;
        let label = |alert: &Value, name: &str| alert["labels"][name].as_str().unwrap_or("").to_owned();
        let alerts = answer["data"]["alerts"].as_array().cloned().unwrap_or_default();
        alerts
            .iter()
            .filter(|alert| alert["state"] == "firing")
            .map(|alert| (label(alert, "alertname"), label(alert, "node")))
            .collect()
    }
}

#[tokio::test]
async fn a_real_prometheus_scrapes_the_proxy_and_tells_of_a_replica_that_is_gone_and_of_a_lost_primary() {
    let Some(program) = program("prometheus") else { return };
    let cluster = Cluster::start(2).await;
    let overrides = "http_token: scrape-me";
    let proxy = Proxy::start_with(
        &cluster,
        ProxyOptions { overrides, start: Start::Ready, ..ProxyOptions::default() },
    )
    .await;
    let client = proxy.connect().await;
    client.simple_query("CREATE TABLE t (x int)").await.unwrap();
    // Where reads run, and why some do not run there, is asked of statements that have run; right after DDL there
    // are no reads.
    eventually("reads have run on a replica and on the primary", || async {
        let asked = "SET highwater.route = 'primary'";
        for statement in ["SELECT x FROM t", asked, "SELECT x FROM t", "RESET highwater.route"] {
            client.simple_query(statement).await.unwrap();
        }
        let (_, metrics) = proxy.get_with("/metrics", "Authorization: Bearer scrape-me\r\n").await.unwrap();
        let metrics = Metrics::parse(&metrics);
        ["read", "asked"].iter().all(|reason| {
            let labels = [("class", "read"), ("reason", *reason)];
            metrics.sum("highwater_statements_total", &labels) > 0.0
        })
    })
    .await;
    let prometheus = Prometheus::start(&program, proxy.http_port(), "scrape-me").await;
    let prometheus = &prometheus;
    eventually("the target is up", || async {
        let targets = prometheus.ask("/api/v1/targets").await;
        targets["data"]["activeTargets"][0]["health"] == "up"
    })
    .await;
    eventually("the rules have been looked at", || async {
        let answer = prometheus.ask("/api/v1/rules").await;
        let rules = answer["data"]["groups"][0]["rules"].as_array().cloned().unwrap_or_default();
        rules.len() >= 15 && rules.iter().all(|rule| rule["health"] == "ok")
    })
    .await;
    eventually("all is quiet", || async { prometheus.firing().await.is_empty() }).await;
    // What Grafana would ask it, it answers; the variables' questions too. Rates take two scrapes.
    eventually("every question of the dashboard has an answer", || async {
        let mut lacking = Vec::new();
        for expr in dashboards_questions().into_iter().chain(["highwater_build_info".to_owned()]) {
            // Some show only what is not nothing: that it is known is what counts.
            let shown = expr.strip_suffix(" > 0").unwrap_or(&expr);
            let encoded: String = shown.bytes().map(|byte| format!("%{byte:02X}")).collect();
            let answer = prometheus.ask(&format!("/api/v1/query?query={encoded}")).await;
            assert_eq!(answer["status"], "success", "{expr}: {answer}");
            if answer["data"]["result"].as_array().is_none_or(Vec::is_empty) {
                lacking.push(expr);
            }
        }
        if !lacking.is_empty() {
            eprintln!("no answer yet: {lacking:#?}");
        }
        lacking.is_empty()
    })
    .await;
    let fires = |alert: &'static str, node: &'static str| async move {
        prometheus.firing().await.contains(&(alert.to_owned(), node.to_owned()))
    };
    cluster.link(2).cut();
    eventually("the lost replica is told of", || fires("HighwaterNodeNotUsed", "c")).await;
    assert!(!fires("HighwaterNoReplica", "").await && !fires("HighwaterNodeNotUsed", "b").await);
    cluster.link(0).cut();
    eventually("the lost primary is told of", || fires("HighwaterPrimaryUnreachable", "")).await;
    cluster.link(0).heal();
    cluster.link(2).heal();
    eventually("all is quiet again", || async { prometheus.firing().await.is_empty() }).await;
    assert!(proxy.stop().await.success());
    eventually("the proxy's own end is told of", || fires("HighwaterDown", "")).await;
}

#[tokio::test]
async fn a_real_prometheus_tells_of_a_failover_that_waits_for_somebody_of_the_new_primary_and_of_the_old_one()
{
    let Some(program) = program("prometheus") else { return };
    let cluster = Cluster::start(2).await;
    let directory = tempfile::tempdir().unwrap();
    let overrides = format!(
        "failover: {{ mode: manual, state_dir: '{}', startup_grace: 1s }}",
        directory.path().join("state").display()
    );
    let proxy =
        Proxy::start_with(&cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await;
    let prometheus = Prometheus::start(&program, proxy.http_port(), "none").await;
    let prometheus = &prometheus;
    let fires =
        |alert: &'static str| async move { prometheus.firing().await.iter().any(|(name, _)| name == alert) };
    eventually("the epoch has been scraped", || async {
        let answer = prometheus.ask("/api/v1/query?query=highwater_epoch").await;
        answer["data"]["result"][0]["value"][1] == "1"
    })
    .await;
    for alert in ["HighwaterFailoverBlocked", "HighwaterNewPrimary", "HighwaterQuarantinedNode"] {
        assert!(!fires(alert).await, "{alert}");
    }
    cluster.node(0).crash().await.unwrap();
    eventually("that somebody must decide is told", || fires("HighwaterFailoverBlocked")).await;
    super::console::console(&cluster, &proxy).await.batch_execute("FAILOVER TO c").await.unwrap();
    eventually("the new primary is told of", || fires("HighwaterNewPrimary")).await;
    eventually("nothing is left to decide", || async { !fires("HighwaterFailoverBlocked").await }).await;
    // The old one comes back with what it was.
    cluster.node(0).start().await.unwrap();
    eventually("that it must not be used is told", || fires("HighwaterQuarantinedNode")).await;
    eventually("it is no second primary once it is read-only", || async {
        cluster.node(0).query_text("SHOW default_transaction_read_only").await.unwrap() == "on"
            && !fires("HighwaterSplitBrain").await
    })
    .await;
}
