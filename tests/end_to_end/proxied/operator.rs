//! What somebody who runs the proxy sees and does.

use std::process::{Command, Stdio};

use crate::fixture::*;

#[tokio::test]
async fn metrics_say_what_ran_where() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    for _ in 0..10 {
        client.simple_query("INSERT INTO t VALUES (1)").await.unwrap();
    }
    cluster.wait_caught_up(0).await.unwrap();
    eventually("reads reach the replica", || async {
        client.simple_query("SELECT x FROM t").await.unwrap();
        proxy.metrics().await.sum("highwater_statements_total", &[("node", "b")]) >= 10.0
    })
    .await;
    let metrics = proxy.metrics().await;
    assert!(metrics.sum("highwater_statements_total", &[("node", "a")]) >= 10.0);
    assert_eq!(metrics.sum("highwater_clients", &[]), 1.0);
    let (_, text) = proxy.get("/metrics").await.unwrap();
    for sample in text.lines().filter(|line| !line.starts_with('#')) {
        let name = sample.split(['{', ' ']).next().unwrap();
        let base =
            ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(
            text.contains(&format!("# HELP {base} ")) || text.contains(&format!("# HELP {name} ")),
            "{name}"
        );
    }
}

#[tokio::test]
async fn sigterm_lets_a_transaction_finish_and_turns_new_clients_away() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let mut busy = proxy.raw_login().await;
    let mut idle = proxy.raw_login().await;
    busy.ask(&query("BEGIN; INSERT INTO t VALUES (1)")).await;
    idle.ask(&query("SELECT 1")).await;
    let (port, app) = (proxy.port(), cluster.roles().app.clone());
    let stopping = tokio::spawn(proxy.stop());
    let told = idle.read_to_end().await;
    assert_eq!(told[0].field(b'C').as_deref(), Some("57P01"));
    if let Ok(stream) = tokio::net::TcpStream::connect(("127.0.0.1", port)).await {
        drop(stream);
        let refused = RawClient::connect(port).await.login("app", &app).await.unwrap_err();
        assert_eq!(refused.field(b'C').as_deref(), Some("57P03"));
    }
    assert_eq!(tags(&busy.ask(&query("COMMIT")).await), "CZ");
    busy.read_to_end().await;
    assert!(stopping.await.unwrap().success());
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), "1");
}

/// Runs the binary on a configuration: exit code and what it said.
fn with_config(command: &str, text: &str) -> (Option<i32>, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.yaml");
    std::fs::write(&file, text).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_highwater"))
        .args([command, "-c"])
        .arg(&file)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout),
    )
}

#[test]
fn a_bad_configuration_is_named_by_line_and_key_and_starts_nothing() {
    let good = "listen: 127.0.0.1:1\nnodes:\n  - { name: a, host: 127.0.0.1, port: 1 }\ncontrol: { user: u, password: p, database: d }\n";
    for (bad, names) in [
        ("max_clents: 5\n", "max_clents"),
        ("max_clients: many\n", "max_clients"),
        ("max_clients: 0\n", "max_clients"),
        ("consistency: { level: sometimes }\n", "consistency.level"),
        ("drain_timeout: 5 parsecs\n", "drain_timeout"),
    ] {
        let (code, said) = with_config("run", &format!("{good}{bad}"));
        assert_eq!(code, Some(2), "{bad}: {said}");
        assert!(said.contains(names) && said.contains("config.yaml:5:"), "{bad}: {said}");
    }
    let twice = good.replace("control", "  - { name: a, host: 127.0.0.1, port: 2 }\ncontrol");
    assert_eq!(with_config("run", &twice).0, Some(2));
    let (code, said) = with_config("run", "");
    assert_eq!(code, Some(2), "{said}");
}

#[tokio::test]
async fn check_tries_the_nodes_and_prints_what_it_found() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let config = std::fs::read_to_string(proxy.directory().join("config.yaml")).unwrap();
    let (code, said) = with_config("check", &config);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("primary") && said.contains("replica"), "{said}");
}
