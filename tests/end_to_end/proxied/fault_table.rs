//! Faults of docs/FAILOVER_DRILL.md's table that no other file has: a backend that outlives its server, a slow primary, a
//! stranger at a known address, a promotion by hand, a silent primary with statements on it.

use std::time::Duration;

use highwater::demo::cluster::{ClusterOptions, Identity};

use super::failover::{QUORUM, TABLE, Writers, auto, covered, is_in, only_primary, primary, started};
use crate::fixture::*;

async fn succeed(client: &mut RawClient, sql: &str) {
    let answer = client.ask(&query(sql)).await;
    assert!(!tags(&answer).contains('E'), "{sql}: {answer:?}");
}

fn code(messages: &[Message]) -> Option<String> {
    messages.iter().find(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backend_that_outlives_its_server_acknowledges_nothing_and_holds_nothing_up() {
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (x bigint)").await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = started(&cluster, &directory, "").await;
    let mut client = proxy.raw_login().await;
    let busy = "DO $$ BEGIN FOR i IN 1..1000000000 LOOP INSERT INTO t VALUES (i); COMMIT; END LOOP; END $$";
    client.send(&query(busy)).await;
    cluster.node(0).wait_for("SELECT count(*) > 100 FROM t", "t").await.unwrap();
    let backend = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'DO $$%'";
    let backend = cluster.node(0).query_text(backend).await.unwrap();
    cluster.node(0).crash_postmaster().await.unwrap();
    // It goes on writing, to nobody's use: its client is told that nobody knows.
    let answer = client.read_ready().await;
    assert_eq!(code(&answer).as_deref(), Some("08007"), "{answer:?}");
    let alive = std::path::Path::new("/proc").join(&backend);
    assert!(alive.exists(), "backend {backend} has ended, and shows nothing");
    eventually("another one takes over", || async {
        is_in(&proxy, "healthy").await && primary(&proxy).await.is_some_and(|name| name != "a")
    })
    .await;
    // The session may be told once that something it saw may be gone.
    let answer = client.ask(&query("INSERT INTO t VALUES (-1)")).await;
    if code(&answer).as_deref() == Some("HW001") {
        succeed(&mut client, "INSERT INTO t VALUES (-1)").await;
    }
    let new = only_primary(&cluster).await;
    assert_eq!(cluster.node(new).query_text("SELECT count(*) FROM t WHERE x = -1").await.unwrap(), "1");
    assert!(alive.exists(), "backend {backend} has ended, and shows nothing");
    cluster.node(0).crash().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_stalls_again_and_again_is_slow_and_not_dead() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = started(&cluster, &directory, "").await;
    let writers = Writers::start(proxy.port(), &cluster, 4).await;
    for _ in 0..6 {
        writers.more(50).await;
        cluster.node(0).freeze().unwrap();
        // The fault itself: longer than a probe is waited for, shorter than three of them.
        tokio::time::sleep(Duration::from_millis(1200)).await;
        cluster.node(0).thaw().unwrap();
    }
    writers.more(50).await;
    let written = writers.finish().await;
    assert!(written.errors.is_empty(), "{:?}", written.errors);
    assert_eq!(only_primary(&cluster).await, 0);
    assert_eq!(written.lost(&cluster, 0).await, 0);
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_failovers_total", &[]), 0.0);
    assert_eq!(metrics.sum("highwater_epoch", &[]), 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_somebody_promotes_by_hand_is_followed_and_the_old_primary_fenced() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = started(&cluster, &directory, "").await;
    let client = proxy.connect().await;
    client.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    cluster.node(1).promote().await.unwrap();
    eventually("it is followed", || async { primary(&proxy).await.as_deref() == Some("b") }).await;
    cluster.node(0).wait_for("SHOW default_transaction_read_only", "on").await.unwrap();
    eventually("the old one is kept out", || async {
        proxy.metrics().await.sum("highwater_quarantined_nodes", &[("reason", "old_primary")]) == 1.0
    })
    .await;
    // Told once, at most, that something may be gone.
    if let Err(error) = client.execute("INSERT INTO t VALUES (2)", &[]).await {
        assert_eq!(error.code().map(|code| code.code()), Some("HW001"), "{error}");
        client.execute("INSERT INTO t VALUES (2)", &[]).await.unwrap();
    }
    assert_eq!(cluster.node(1).query_text("SELECT count(*) FROM t WHERE x = 2").await.unwrap(), "1");
    assert_eq!(cluster.node(0).query_text("SELECT count(*) FROM t WHERE x = 2").await.unwrap(), "0");
    // It was no failover of ours, and is none now.
    assert_eq!(proxy.metrics().await.sum("highwater_failovers_total", &[]), 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_cluster_at_a_known_address_is_neither_used_nor_touched() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(TABLE).await;
    let foreign = ClusterOptions { replicas: 0, identity: Identity::Own, ..ClusterOptions::default() };
    let foreign = Cluster::start_with(foreign).await;
    let control = &cluster.roles().control;
    let same = format!("ALTER ROLE {} PASSWORD '{}'", control.user, control.password);
    foreign.set_up_as_superuser(&same).await;
    let directory = tempfile::tempdir().unwrap();
    let nodes = format!(
        "nodes: [ {{ name: a, host: 127.0.0.1, port: {}, replication_port: {} }}, \
           {{ name: b, host: 127.0.0.1, port: {}, replication_port: {} }}, \
           {{ name: c, host: 127.0.0.1, port: {} }} ]",
        cluster.link(0).port(),
        cluster.node(0).port(),
        cluster.link(1).port(),
        cluster.node(1).port(),
        foreign.link(0).port(),
    );
    let overrides = format!("{}\n{nodes}", auto(&directory, "allow_minority: true"));
    // Of two that write at the start neither would be believed.
    foreign.link(0).cut();
    let options = ProxyOptions { overrides: &overrides, start: Start::Ready, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    foreign.link(0).heal();
    eventually("the stranger is known for what it is", || async {
        proxy.get("/topology").await.is_some_and(|(_, text)| text.contains("foreign_cluster"))
            && proxy.usable_nodes().await == 2
    })
    .await;
    cluster.node(0).crash().await.unwrap();
    eventually("b takes over", || async { primary(&proxy).await.as_deref() == Some("b") }).await;
    let (_, topology) = proxy.get("/topology").await.unwrap();
    assert!(topology.contains("foreign_cluster"), "{topology}");
    for (question, expected) in
        [("SHOW default_transaction_read_only", "off"), ("SELECT pg_is_in_recovery()", "f")]
    {
        assert_eq!(foreign.node(0).query_text(question).await.unwrap(), expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_to_a_silent_primary_is_in_doubt_and_what_comes_later_waits_for_the_next() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    // As long as a loaded machine needs.
    let patient = format!("{QUORUM}, pause_timeout: 30s");
    let manual = auto(&directory, &patient).replace("mode: auto", "mode: manual");
    let options = ProxyOptions { overrides: &manual, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    covered(&proxy, &cluster).await;
    let console = proxy.connect_as("highwater", &cluster.roles().control).await.unwrap();
    let (mut early, mut late) = (proxy.raw_login().await, proxy.raw_login().await);
    // In a transaction at once: each has a backend of its own, which the pool keeps.
    for (client, row) in [(&mut early, -1), (&mut late, -2)] {
        succeed(client, "BEGIN").await;
        succeed(client, &format!("INSERT INTO t VALUES ({row})")).await;
    }
    succeed(&mut early, "COMMIT").await;
    succeed(&mut late, "COMMIT").await;
    cluster.node(0).freeze().unwrap();
    early.send(&query("INSERT INTO t VALUES (1)")).await;
    eventually("it is found gone", || async { is_in(&proxy, "blocked").await }).await;
    // There is an idle backend to the silent node; nothing is sent there.
    late.send(&query("INSERT INTO t VALUES (2)")).await;
    eventually("it waits", || async { proxy.metrics().await.sum("highwater_gate_waiting", &[]) == 1.0 })
        .await;
    console.simple_query("FAILOVER").await.unwrap();
    let answer = early.read_ready().await;
    assert_eq!(code(&answer).as_deref(), Some("08007"), "{answer:?}");
    let answer = late.read_ready().await;
    assert_eq!(tags(&answer), "CZ", "{answer:?}");
    let new = match primary(&proxy).await.as_deref() {
        Some("b") => 1,
        Some("c") => 2,
        other => panic!("the primary is {other:?}"),
    };
    assert_eq!(cluster.node(new).query_text("SELECT count(*) FROM t WHERE x = 2").await.unwrap(), "1");
}

/// As docs/FAILOVER.md says for `left_behind`: promote one by hand, stop the proxy, move its state away, start it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_only_standbys_are_left_that_never_followed_the_lost_primary_an_operator_promotes_one() {
    let cluster = Cluster::start(3).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let more = "allow_minority: true, min_failover_interval: 0s, kick_timeout: 500ms";
    let proxy = started(&cluster, &directory, more).await;
    let client = proxy.connect().await;
    client.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    for away in [2, 3] {
        cluster.node(away).stop_fast().await.unwrap();
    }
    cluster.node(0).crash().await.unwrap();
    eventually("b takes over", || async {
        is_in(&proxy, "healthy").await && primary(&proxy).await.as_deref() == Some("b")
    })
    .await;
    cluster.node(1).execute("INSERT INTO t VALUES (2)").await.unwrap();
    cluster.node(1).crash().await.unwrap();
    for back in [2, 3] {
        cluster.node(back).start().await.unwrap();
    }
    eventually("it says that nobody can take over", || async {
        proxy.metrics().await.sum("highwater_failover_blocked", &[("reason", "left_behind")]) == 1.0
    })
    .await;
    let refused = super::console::psql(&cluster, &proxy, "FAILOVER TO c ALLOW DATA LOSS;").await;
    let refused = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.contains("never followed the lost primary"), "{refused}");
    eventually("it is blocked again", || async {
        proxy.metrics().await.sum("highwater_failover_blocked", &[("reason", "left_behind")]) == 1.0
    })
    .await;

    cluster.node(2).execute("SELECT pg_promote()").await.unwrap();
    assert_eq!(only_primary(&cluster).await, 2);
    // By its timeline it cannot be told from the one that is gone: it is not followed by itself.
    assert_eq!(primary(&proxy).await.as_deref(), Some("b"));
    assert!(proxy.stop().await.success());
    let state = directory.path().join("state");
    std::fs::rename(&state, directory.path().join("state.before")).unwrap();
    let overrides = auto(&directory, more);
    let options = ProxyOptions { overrides: &overrides, start: Start::Ready, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    assert_eq!(primary(&proxy).await.as_deref(), Some("c"));
    let client = proxy.connect().await;
    client.execute("INSERT INTO t VALUES (3)", &[]).await.unwrap();
    // The other standbys are pointed at it by hand, those of the lost time are made anew.
    cluster.node(3).follow(cluster.node(2)).await.unwrap();
    cluster.node(1).rebuild_from(cluster.node(2)).await.unwrap();
    eventually("both serve", || async { is_in(&proxy, "healthy").await && proxy.usable_nodes().await == 3 })
        .await;
    for node in [1, 3] {
        cluster
            .node(node)
            .wait_for("SELECT string_agg(x::text, ',' ORDER BY x) FROM t", "1,3")
            .await
            .unwrap();
    }
    // And the next failover is one as any other.
    cluster.node(2).crash().await.unwrap();
    eventually("another one takes over", || async {
        is_in(&proxy, "healthy").await && primary(&proxy).await.is_some_and(|name| name != "c")
    })
    .await;
}
