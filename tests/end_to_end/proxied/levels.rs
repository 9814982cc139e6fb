//! What each level of consistency promises, and that the lower ones do not.

use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::fixture::*;

const READERS: usize = 8;

async fn with_counter(replicas: usize) -> Cluster {
    let cluster = Cluster::start(replicas).await;
    cluster.set_up("CREATE TABLE counter (n bigint); INSERT INTO counter VALUES (0)").await;
    cluster
}

async fn start(cluster: &Cluster, consistency: &str) -> Proxy {
    let overrides = format!("consistency: {{ {consistency} }}");
    Proxy::start_with(cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await
}

/// A register that one session raises and others read. Whatever anybody has been shown, a statement that
/// arrives afterwards must be shown, too: how many of `reads` were not.
async fn stale_reads(proxy: &Proxy, reads: usize) -> usize {
    let (shown, stale, done) = (AtomicI64::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let mut clients = Vec::new();
    for _ in 0..=READERS {
        clients.push(proxy.connect().await);
    }
    let writer = clients.pop().unwrap();
    let write = async {
        while done.load(Ordering::SeqCst) < READERS {
            let row = writer.query_one("UPDATE counter SET n = n + 1 RETURNING n", &[]).await.unwrap();
            shown.fetch_max(row.get(0), Ordering::SeqCst);
        }
    };
    let read = |client: tokio_postgres::Client| {
        let (shown, stale, done) = (&shown, &stale, &done);
        async move {
            for _ in 0..reads.div_ceil(READERS) {
                let must = shown.load(Ordering::SeqCst);
                let n: i64 = client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0);
                stale.fetch_add(usize::from(n < must), Ordering::SeqCst);
                shown.fetch_max(n, Ordering::SeqCst);
            }
            done.fetch_add(1, Ordering::SeqCst);
        }
    };
    let reading: Vec<_> = clients.into_iter().map(read).collect();
    futures_util::future::join(write, futures_util::future::join_all(reading)).await;
    stale.into_inner()
}

/// A standby that must confirm commits: the primary hides them for longer than the replicas do.
async fn with_late_primary() -> Cluster {
    let cluster = with_counter(2).await;
    cluster.primary().set("synchronous_standby_names", "ANY 1 (*)").await.unwrap();
    let waits = "SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')";
    cluster.primary().wait_for(waits, "t").await.unwrap();
    cluster
}

async fn reads_on_replicas(proxy: &Proxy) -> f64 {
    let metrics = proxy.metrics().await;
    metrics.sum("highwater_statements_total", &[("class", "read"), ("reason", "read")])
}

/// Reads until one has run on a replica: the catalog facts are loaded, a replica has a backend.
async fn warm(proxy: &Proxy, client: &tokio_postgres::Client) {
    eventually("a read runs on a replica", async || {
        client.simple_query("SELECT n FROM counter").await.unwrap();
        reads_on_replicas(proxy).await > 0.0
    })
    .await;
}

#[tokio::test]
async fn a_strong_read_sees_what_anybody_was_shown_before_it() {
    let cluster = with_late_primary().await;
    let proxy = start(&cluster, "level: strong, catch_up_wait: 200ms").await;
    assert_eq!(stale_reads(&proxy, 4_000).await, 0);
    // And not by asking the primary.
    assert!(reads_on_replicas(&proxy).await > 2_000.0);
}

#[tokio::test]
async fn at_level_global_all_sessions_read_as_one() {
    let cluster = with_late_primary().await;
    let proxy = start(&cluster, "level: global, catch_up_wait: 200ms").await;
    assert_eq!(stale_reads(&proxy, 4_000).await, 0);
    assert!(reads_on_replicas(&proxy).await > 1_000.0);
}

#[tokio::test]
async fn what_others_were_shown_is_promised_at_no_lower_level() {
    let cluster = with_counter(1).await;
    cluster.node(1).set_apply_delay(Duration::from_millis(50)).await.unwrap();
    for level in ["session", "read_your_writes", "eventual"] {
        let proxy = start(&cluster, &format!("level: {level}, catch_up_wait: 500ms")).await;
        // This shows that the tests of the levels above can fail.
        assert!(stale_reads(&proxy, 400).await > 0, "{level}");
    }
}

#[tokio::test]
async fn levels_promise_what_they_say_while_replay_stands_still() {
    let cluster = with_counter(1).await;
    let proxy = start(
        &cluster,
        "rules: [ { user: app, level: eventual }, { user: writes, level: read_your_writes } ]",
    )
    .await;
    cluster.primary().execute("CREATE ROLE writes LOGIN PASSWORD 'w'").await.unwrap();
    cluster.set_up("GRANT ALL ON counter TO writes").await;
    let login = highwater::demo::cluster::Login { user: "writes".to_owned(), password: "w".to_owned() };
    let eventual = proxy.connect().await;
    let writes = proxy.connect_as("app", &login).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    cluster.node(1).pause_replay().await.unwrap();

    let read = async |client: &tokio_postgres::Client| -> i64 {
        client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0)
    };
    eventual.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    assert_eq!(read(&eventual).await, 0, "eventual reads from the replica, whatever was written");
    // A new session knows what the primary held when it came; it has written nothing since.
    assert_eq!(read(&writes).await, 1);
    writes.execute("UPDATE counter SET n = 2", &[]).await.unwrap();
    assert_eq!(read(&writes).await, 2, "its own write");
    cluster.node(1).resume_replay().await.unwrap();
    eventually("the replica has caught up", async || read(&eventual).await == 2).await;
}

#[tokio::test]
async fn a_read_that_no_replica_can_serve_fails_if_that_was_asked_for() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "on_stale: error, catch_up_wait: 30ms").await;
    let client = proxy.connect().await;
    warm(&proxy, &client).await;
    cluster.node(1).pause_replay().await.unwrap();
    client.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    let error = client.query_one("SELECT n FROM counter", &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "HW002", "{error}");
    cluster.node(1).resume_replay().await.unwrap();
    eventually("reads work again", async || client.query_one("SELECT n FROM counter", &[]).await.is_ok())
        .await;
}

#[tokio::test]
async fn the_primary_gets_no_more_stale_reads_than_its_share() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "primary_read_cap: 10, primary_read_wait: 20ms, catch_up_wait: 1ms").await;
    let client = proxy.connect().await;
    warm(&proxy, &client).await;
    cluster.node(1).pause_replay().await.unwrap();
    client.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    let (mut served, mut refused) = (0, 0);
    for _ in 0..80 {
        match client.simple_query("SELECT n FROM counter").await {
            Ok(_) => served += 1,
            Err(error) => {
                assert_eq!(error.code().unwrap().code(), "HW002", "{error}");
                refused += 1;
            }
        }
    }
    // The first few are let through before a share means anything: a tenth of 64.
    assert!((1..=8).contains(&served), "{served} served, {refused} refused");
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_primary_reads_queued_total", &[]), f64::from(refused));
    assert_eq!(metrics.sum("highwater_primary_reads_refused_total", &[]), f64::from(refused));
    cluster.node(1).resume_replay().await.unwrap();
}

#[tokio::test]
async fn a_limit_of_staleness_holds_at_every_level() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "rules: [ { user: app, level: eventual, max_lag: 300ms } ]").await;
    let client = proxy.connect().await;
    let read = async || -> i64 { client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0) };
    assert_eq!(read().await, 0);
    cluster.node(1).pause_replay().await.unwrap();
    let direct = cluster.primary().connect("app", proxy.app()).await.unwrap();
    direct.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    // Not at once; but soon it may not be that old any more.
    eventually("the replica is too far behind", async || read().await == 1).await;
    cluster.node(1).resume_replay().await.unwrap();
}
