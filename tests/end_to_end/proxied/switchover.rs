//! The primary is exchanged, and a dead one replaced, by an administrator with psql.

use std::collections::BTreeMap;

use highwater::demo::cluster::ClusterOptions;

use super::console::{cell, console, psql, rows};
use super::failover::{TABLE, Writers};
use crate::fixture::*;

/// A proxy that replaces the primary when it is told to.
async fn proxy(cluster: &Cluster, directory: &tempfile::TempDir) -> Proxy {
    let state = directory.path().join("state");
    let overrides = format!(
        "failover: {{ mode: manual, state_dir: '{}', startup_grace: 1s, pause_timeout: 60s }}",
        state.display()
    );
    Proxy::start_with(cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await
}

/// What psql said of commands that went well, notices included.
async fn ordered(cluster: &Cluster, proxy: &Proxy, script: &str) -> String {
    let output = psql(cluster, proxy, script).await;
    success(&output) + &String::from_utf8_lossy(&output.stderr)
}

/// What psql said of a command that was refused.
async fn refused(cluster: &Cluster, proxy: &Proxy, script: &str) -> String {
    let output = psql(cluster, proxy, script).await;
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn item(client: &tokio_postgres::Client, item: &str) -> String {
    cell(client, "failover", ("item", item), "value").await.unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_administrator_exchanges_the_primary_with_psql_and_back_while_clients_write() {
    // pg_rewind asks for it where it reads from.
    let settings = vec![("full_page_writes".to_owned(), "on".to_owned())];
    let cluster = Cluster::start_with(ClusterOptions { settings, ..ClusterOptions::default() }).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = proxy(&cluster, &directory).await;
    let client = console(&cluster, &proxy).await;
    let writers = Writers::start(proxy.port(), &cluster, 4).await;
    writers.more(100).await;

    let said = refused(&cluster, &proxy, "FAILOVER;").await;
    assert!(said.contains("the primary answers: SWITCHOVER replaces a living one"), "{said}");
    let said = refused(&cluster, &proxy, "SWITCHOVER TO a;").await;
    assert!(said.contains("ERROR:  a is the primary"), "{said}");
    let said = ordered(&cluster, &proxy, "SWITCHOVER TO c DRY RUN;").await;
    assert!(said.contains("NOTICE:  would replace a by c; then cut off and re-point: b"), "{said}");
    assert_eq!((item(&client, "epoch").await.as_str(), item(&client, "primary").await.as_str()), ("1", "a"));

    let said = ordered(&cluster, &proxy, "switchover to c;\nSHOW TOPOLOGY;\nSHOW HISTORY;").await;
    assert!(said.contains("NOTICE:  c is the primary of epoch 2"), "{said}");
    // Who has the answer sees what it tells of.
    let topology: Vec<&str> = said.lines().filter(|line| line.starts_with(" primary  ")).collect();
    assert!(topology.len() == 1 && topology[0].trim_end().ends_with("| c"), "{said}");
    assert!(said.contains("(1 row)"), "{said}");
    assert!(said.lines().any(|line| line == "SWITCHOVER"), "{said}");
    writers.more(100).await;
    // The answer comes with the new primary; the other replica is re-pointed meanwhile.
    eventually("all is done", || async { item(&client, "state").await == "healthy" }).await;
    let shown = ordered(&cluster, &proxy, "SHOW FAILOVER;\nSHOW HISTORY;\nSHOW NODES;").await;
    println!("{shown}");
    assert_eq!((item(&client, "epoch").await.as_str(), item(&client, "primary").await.as_str()), ("2", "c"));
    assert!(item(&client, "quarantined").await.starts_with("a ("), "{shown}");
    let history = rows(&client, "SHOW HISTORY").await;
    let first = |column| history[0].get(column).unwrap_or_default();
    assert_eq!(history.len(), 1);
    assert_eq!(["epoch", "old_primary", "new_primary", "planned"].map(first), ["1", "a", "c", "t"]);
    assert!(first("took_seconds").parse::<f64>().unwrap() > 0.0, "{history:?}");
    assert!(!first("ended").is_empty() && !first("fork_lsn").is_empty(), "{history:?}");
    // It waits to be rewound, and is no second primary.
    let split = async || proxy.metrics().await.sum("highwater_split_brain", &[]);
    eventually("the old one is seen to be read-only", || async { split().await == 0.0 }).await;
    eventually("and is kept out as that", || async {
        cell(&client, "nodes", ("name", "a"), "standing").await.as_deref() == Some("quarantined")
    })
    .await;
    assert_eq!(cell(&client, "nodes", ("name", "c"), "role").await.as_deref(), Some("primary"));
    assert!(proxy.log().contains("ordered on the admin console"), "{}", proxy.log());

    // On its host the old one is made a replica, and may be the primary again.
    let said = refused(&cluster, &proxy, "SWITCHOVER TO a;").await;
    assert!(said.contains("a is in quarantine"), "{said}");
    cluster.node(0).stop_fast().await.unwrap();
    success(&crate::rejoin::rejoin(&cluster, cluster.node(0), &["--start"]).await);
    eventually("it serves", || async { proxy.usable_nodes().await == 3 }).await;
    let said = ordered(&cluster, &proxy, "SWITCHOVER TO a TIMEOUT 30s;").await;
    assert!(said.contains("NOTICE:  a is the primary of epoch 3"), "{said}");
    writers.more(100).await;
    let written = writers.finish().await;
    assert_eq!(written.errors, BTreeMap::new());
    assert_eq!(written.lost(&cluster, 0).await, 0);
    assert_eq!(rows(&client, "SHOW HISTORY").await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_administrator_replaces_a_dead_primary_with_psql() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = proxy(&cluster, &directory).await;
    let client = console(&cluster, &proxy).await;
    let app = proxy.connect().await;
    cluster.node(0).crash().await.unwrap();
    eventually("it waits for an operator", || async {
        item(&client, "blocked").await == "manual: the primary is gone; FAILOVER replaces it (mode: manual)"
    })
    .await;
    assert_eq!(item(&client, "primary_reachable").await, "no");
    let said = refused(&cluster, &proxy, "SWITCHOVER;").await;
    assert!(said.contains("the primary does not answer: FAILOVER replaces a dead one"), "{said}");
    // A client that wants to write meanwhile waits.
    let waiting = tokio::spawn(async move { app.batch_execute("INSERT INTO t VALUES (1)").await });
    eventually("the write waits", || async { item(&client, "statements_waiting").await == "1" }).await;

    let said = ordered(&cluster, &proxy, "FAILOVER TO b;").await;
    assert!(said.contains("NOTICE:  b is the primary of epoch 2"), "{said}");
    match waiting.await.unwrap() {
        Ok(()) => {}
        // The session was open when the primary died: it is told once if something may be lost.
        Err(error) => assert_eq!(error.code().map(|code| code.code()), Some("HW001"), "{error}"),
    }
    let shown = ordered(&cluster, &proxy, "SHOW FAILOVER;\nSHOW HISTORY;").await;
    println!("{shown}");
    let history = rows(&client, "SHOW HISTORY").await;
    let first = |column| history[0].get(column).unwrap_or_default();
    assert_eq!(["epoch", "old_primary", "new_primary", "planned"].map(first), ["1", "a", "b", "f"]);
    assert_eq!(item(&client, "blocked").await, "");
    assert_eq!(item(&client, "primary").await, "b");
    // The old one comes back: it is kept out, and read-only.
    cluster.node(0).start().await.unwrap();
    cluster.node(0).wait_for("SHOW default_transaction_read_only", "on").await.unwrap();
    assert_ne!(cell(&client, "nodes", ("name", "a"), "standing").await.as_deref(), Some("serving"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switchover_waits_for_transactions_goes_on_without_who_ordered_it_and_is_undone_in_time() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = proxy(&cluster, &directory).await;
    let client = console(&cluster, &proxy).await;
    let mut busy = proxy.raw_login().await;
    busy.ask(&query("BEGIN; INSERT INTO t VALUES (1)")).await;

    // A transaction that does not end: the old primary goes on, and so does the transaction.
    let said = refused(&cluster, &proxy, "SWITCHOVER TO b TIMEOUT 300ms;").await;
    println!("{said}");
    eventually("all is as before", || async { item(&client, "state").await == "healthy" }).await;
    assert_eq!((item(&client, "epoch").await.as_str(), item(&client, "primary").await.as_str()), ("1", "a"));
    assert_eq!(tags(&busy.ask(&query("INSERT INTO t VALUES (2)")).await), "CZ");

    let mut ordering = proxy.raw().await;
    ordering.login("highwater", &cluster.roles().control).await.unwrap();
    ordering.send(&query("SWITCHOVER TO b TIMEOUT 60s")).await;
    eventually("it waits for the transaction", || async { item(&client, "state").await == "draining" }).await;
    let said = refused(&cluster, &proxy, "SWITCHOVER TO c;").await;
    assert!(said.contains("busy: draining"), "{said}");
    ordering.cancel().await;
    let said = ordering.read_ready().await;
    assert_eq!(said[0].field(b'C').as_deref(), Some("57014"));
    assert_eq!(said[0].field(b'D').as_deref(), Some("What was ordered goes on."));
    assert_eq!(tags(&busy.ask(&query("COMMIT")).await), "CZ");
    eventually("the primary is another one", || async { item(&client, "primary").await == "b" }).await;
    assert_eq!(tags(&busy.ask(&query("INSERT INTO t VALUES (3)")).await), "CZ");
    assert_eq!(cluster.node(1).query_text("SELECT count(*) FROM t").await.unwrap(), "3");
}
