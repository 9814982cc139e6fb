//! With `mode: auto` a primary that is gone is replaced.

use std::time::{Duration, Instant};

use crate::fixture::*;

const AUTO: &str = "failover: { mode: auto, state_dir: STATE, startup_grace: 1s }";

/// Options with a state directory of their own.
fn auto(directory: &tempfile::TempDir, more: &str) -> String {
    let state = directory.path().join("state");
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    AUTO.replace("STATE", &state.display().to_string()).replace(" }", &format!("{more} }}"))
}

async fn primary(proxy: &Proxy) -> Option<String> {
    let (_, text) = proxy.get("/topology").await?;
    let topology: serde_json::Value = serde_json::from_str(&text).ok()?;
    topology["primary"].as_str().map(str::to_owned)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_killed_in_mode_auto_is_replaced_and_the_other_standby_follows() {
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let directory = tempfile::tempdir().unwrap();
    let overrides = auto(&directory, "");
    let options = ProxyOptions { overrides: &overrides, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let client = proxy.connect().await;
    client.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    eventually("all nodes serve", || async { proxy.usable_nodes().await == 3 }).await;
    // What no standby has received by then is lost: nobody has waited for it.
    for standby in [1, 2] {
        cluster.node(standby).wait_for("SELECT count(*) FROM t", "1").await.unwrap();
    }

    let killed = Instant::now();
    cluster.node(0).crash().await.unwrap();
    // The write waits for the new primary; one that was sent before the death was noticed is in doubt (08007). If no position
    // was sampled since the session's last write, it is told once that this may be lost (HW001).
    for _ in 0..3 {
        match client.execute("INSERT INTO t VALUES (2)", &[]).await {
            Ok(_) => break,
            Err(error) => {
                let code = error.code().map(|code| code.code().to_owned());
                assert!(matches!(code.as_deref(), Some("HW001" | "08007")), "{error}");
            }
        }
    }
    println!("first write {:?} after the kill", killed.elapsed());
    assert_ne!(primary(&proxy).await.as_deref(), Some("a"));
    eventually("the other standby follows", || async { proxy.usable_nodes().await == 2 }).await;
    let rows = client.query_one("SELECT count(*) FROM t", &[]).await.unwrap();
    assert_eq!(rows.get::<_, i64>(0), 2);

    // The old one comes back by itself: it is fenced, and never used.
    cluster.node(0).start().await.unwrap();
    cluster.node(0).wait_for("SHOW default_transaction_read_only", "on").await.unwrap();
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_quarantined_nodes", &[("reason", "old_primary")]), 1.0);
    assert_eq!(metrics.sum("highwater_failovers_total", &[("reason", "failover"), ("result", "done")]), 1.0);
    assert!(killed.elapsed() < Duration::from_secs(60));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_only_the_proxy_cannot_reach_is_not_replaced() {
    let cluster = Cluster::start(2).await;
    let directory = tempfile::tempdir().unwrap();
    let overrides = auto(&directory, "check_interval: 100ms, check_timeout: 300ms, kick_timeout: 1s");
    let options = ProxyOptions { overrides: &overrides, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    eventually("all nodes serve", || async { proxy.usable_nodes().await == 3 }).await;
    for silent in [true, false] {
        match silent {
            true => cluster.link(0).silence(),
            false => cluster.link(0).cut(),
        }
        let told = "standbys stream from it: no failover";
        let before = proxy.log().matches(told).count();
        eventually("it is found to live", || async { proxy.log().matches(told).count() > before }).await;
        assert_eq!(primary(&proxy).await.as_deref(), Some("a"));
        cluster.link(0).heal();
        eventually("it is well again", || async {
            proxy.metrics().await.sum("highwater_failover_state", &[("state", "healthy")]) == 1.0
        })
        .await;
    }
    assert_eq!(proxy.metrics().await.sum("highwater_failovers_total", &[]), 0.0);
    let what = "proxy alone cut off from a primary that standbys stream from: nobody promoted";
    super::failover::Line::new(6, what, 0, "").shown(2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_quorum_every_acknowledged_row_survives_a_killed_primary() {
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (writer int, x int)").await;
    let directory = tempfile::tempdir().unwrap();
    let overrides = auto(&directory, "durability: quorum, sync: { manage: true }");
    let options = ProxyOptions { overrides: &overrides, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    eventually("acknowledged writes are covered", || async {
        proxy.metrics().await.sum("highwater_sync_state", &[]) == 1.0
    })
    .await;
    let mut writers = Vec::new();
    for writer in 0..4 {
        let client = proxy.connect().await;
        writers.push(tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for x in 0..400 {
                match client.execute("INSERT INTO t VALUES ($1, $2)", &[&writer, &x]).await {
                    Ok(_) => acknowledged.push(x),
                    // In doubt: it may be there or not.
                    Err(error) => assert_eq!(error.code().map(|code| code.code()), Some("08007"), "{error}"),
                }
            }
            acknowledged
        }));
    }
    let watcher = proxy.connect().await;
    eventually("rows are written", || async {
        watcher.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0) > 100
    })
    .await;
    cluster.node(0).crash().await.unwrap();
    let mut acknowledged = Vec::new();
    for rows in writers {
        acknowledged.push(rows.await.unwrap());
    }
    // On the new primary itself: another session's read through the proxy may lie before a writer's last row.
    let new = match primary(&proxy).await.as_deref() {
        Some("b") => 1,
        Some("c") => 2,
        other => panic!("the primary is {other:?}"),
    };
    let client = cluster.node(new).connect("app", &cluster.roles().superuser).await.unwrap();
    for (writer, acknowledged) in acknowledged.into_iter().enumerate() {
        let found = client.query("SELECT x FROM t WHERE writer = $1", &[&(writer as i32)]).await.unwrap();
        let found: std::collections::HashSet<i32> = found.iter().map(|row| row.get(0)).collect();
        let lost: Vec<&i32> = acknowledged.iter().filter(|x| !found.contains(x)).collect();
        assert!(lost.is_empty() && !acknowledged.is_empty(), "writer {writer} lost {lost:?}");
    }
}
