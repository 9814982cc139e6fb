//! Nodes in zones: whose replicas are read from first, and who takes over.

use super::console::{cell, console, psql, rows};
use super::failover::{TABLE, auto, is_in, only_primary, primary};
use super::operator::with_config;
use crate::fixture::*;

/// The cluster's nodes, each in one of these zones.
fn nodes(cluster: &Cluster, zones: &[&str]) -> String {
    let node = |(at, zone): (usize, &&str)| {
        let (name, link) = (cluster.node(at).name(), cluster.link(at).port());
        let direct = cluster.node(at).port();
        format!("{{ name: {name}, host: 127.0.0.1, port: {link}, replication_port: {direct}, zone: {zone} }}")
    };
    format!("nodes: [ {} ]\n", zones.iter().enumerate().map(node).collect::<Vec<_>>().join(", "))
}

/// Each node's zone as /topology shows it.
async fn shown(proxy: &Proxy) -> Vec<String> {
    let (_, text) = proxy.get("/topology").await.unwrap();
    let topology: serde_json::Value = serde_json::from_str(&text).unwrap();
    let nodes = topology["nodes"].as_array().unwrap().iter();
    nodes.map(|node| node.get("zone").unwrap().as_str().unwrap_or("none").to_owned()).collect()
}

async fn reads(proxy: &Proxy, node: &str) -> f64 {
    proxy.metrics().await.sum("highwater_statements_total", &[("node", node), ("reason", "read")])
}

/// Reads until one has run on `node`, then some more; how many of those ran on which node.
async fn reads_settle_on(proxy: &Proxy, app: &tokio_postgres::Client, node: &str) -> (f64, f64) {
    let begun = reads(proxy, node).await;
    eventually("it is read from", || async {
        app.batch_execute("SELECT x FROM t").await.unwrap();
        reads(proxy, node).await > begun
    })
    .await;
    let before = (reads(proxy, "b").await, reads(proxy, "c").await);
    for _ in 0..30 {
        app.batch_execute("SELECT x FROM t").await.unwrap();
    }
    (reads(proxy, "b").await - before.0, reads(proxy, "c").await - before.1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_go_to_the_proxys_own_zone_while_a_replica_there_may_serve() {
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let in_zones = nodes;
    let nodes = in_zones(&cluster, &["near", "near", "far"]);
    // However loaded the machine is, a replica is waited for.
    let patient = "consistency: { catch_up_wait: 30s }\n";
    let here = format!("{nodes}{patient}routing: {{ zone: near }}");
    let options = ProxyOptions { overrides: &here, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let client = console(&cluster, &proxy).await;
    let app = proxy.connect().await;
    let (near, far) = reads_settle_on(&proxy, &app, "b").await;
    assert!(near > 0.0 && far == 0.0, "near {near}, far {far}");
    assert_eq!(shown(&proxy).await, ["near", "near", "far"]);
    assert_eq!(cell(&client, "nodes", ("name", "c"), "zone").await.as_deref(), Some("far"));
    let said = |node: &'static str, what: &'static str| {
        let client = &client;
        async move {
            let lines = rows(client, "EXPLAIN ROUTE (DATABASE app, USER app) SELECT x FROM t").await;
            let line = lines.iter().find(|row| row.get(0) == Some(node)).unwrap();
            let line = line.get(1).unwrap();
            line.starts_with("yes: it has replayed ") && line.ends_with(what)
        }
    };
    eventually("it is explained", || async {
        said("b", "; it is in this proxy's zone near").await
            && said("c", "; in zone far: only while no replica of zone near may").await
    })
    .await;
    // None there may: the others serve, and no longer than that.
    client.batch_execute("DRAIN b").await.unwrap();
    let (near, far) = reads_settle_on(&proxy, &app, "c").await;
    assert!(near == 0.0 && far > 0.0, "near {near}, far {far}");
    client.batch_execute("UNDRAIN b").await.unwrap();
    let (near, far) = reads_settle_on(&proxy, &app, "b").await;
    assert!(near > 0.0 && far == 0.0, "near {near}, far {far}");
    // Told that it is elsewhere it goes by that from the next statement on.
    proxy.configure(&cluster, &format!("{nodes}{patient}routing: {{ zone: far }}"));
    assert!(proxy.reload().await);
    let (near, far) = reads_settle_on(&proxy, &app, "c").await;
    assert!(near == 0.0 && far > 0.0, "near {near}, far {far}");
    // And so of nodes.
    let moved = in_zones(&cluster, &["near", "far", "null"]);
    proxy.configure(&cluster, &format!("{moved}{patient}routing: {{ zone: far }}"));
    assert!(proxy.reload().await);
    let (b, c) = reads_settle_on(&proxy, &app, "b").await;
    assert!(b > 0.0 && c == 0.0, "b {b}, c {c}");
    eventually("/topology shows it", || async { shown(&proxy).await == ["near", "far", "none"] }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_of_another_zone_takes_over_before_an_operator_names_it() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let overrides = format!("{}{}", nodes(&cluster, &["here", "there", "there"]), auto(&directory, ""));
    let options = ProxyOptions { overrides: &overrides, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let client = console(&cluster, &proxy).await;
    let file = std::fs::read_to_string(proxy.directory().join("config.yaml")).unwrap();
    let foretold = "node a: it is in zone here, and none of those who may be promoted is";
    let (_, said) = with_config("check", &file);
    assert!(said.contains(foretold), "{said}");
    let (_, said) = with_config("check", &file.replace("zone: there", "zone: here"));
    assert!(!said.contains(foretold), "{said}");
    cluster.node(0).crash().await.unwrap();
    let why = "other_zone: b could take over, but is in zone there, and the lost primary in zone here";
    eventually("it waits for an operator, and says for whom", || async {
        let blocked = cell(&client, "failover", ("item", "blocked"), "value").await;
        blocked.is_some_and(|text| text.starts_with(why))
    })
    .await;
    assert_eq!(proxy.metrics().await.sum("highwater_failover_blocked", &[("reason", "other_zone")]), 1.0);
    // Nobody was cut off for it.
    for node in [1, 2] {
        assert_ne!(cluster.node(node).query_text("SHOW primary_conninfo").await.unwrap(), "");
    }
    let refused = psql(&cluster, &proxy, "FAILOVER;").await;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("FAILOVER TO b promotes it"), "{refused:?}");
    success(&psql(&cluster, &proxy, "FAILOVER TO c;").await);
    assert_eq!(primary(&proxy).await.as_deref(), Some("c"));
    assert_eq!(only_primary(&cluster).await, 2);
    eventually("b follows", || async { is_in(&proxy, "healthy").await && proxy.usable_nodes().await == 2 })
        .await;
    // From there on c's zone is the one that counts.
    success(&psql(&cluster, &proxy, "ACK RECOVERY;").await);
    cluster.node(2).crash().await.unwrap();
    eventually("b, of the same zone, is not let in without the majority", || async {
        let blocked = cell(&client, "failover", ("item", "blocked"), "value").await;
        blocked.is_some_and(|text| text.starts_with("minority"))
    })
    .await;
}
