//! A cancel stops the statement it was meant for, and no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::fixture::*;

fn code(messages: &[Message]) -> Option<String> {
    messages.iter().find(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
}

#[tokio::test]
async fn a_cancel_stops_the_statement_on_the_primary_and_on_a_replica() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    for (statement, nodes) in [
        ("SELECT pg_sleep(3600) FROM (VALUES (1)) AS v", 0..2),
        ("INSERT INTO t SELECT 1 FROM pg_sleep(3600)", 0..1),
    ] {
        let mut client = proxy.raw_login().await;
        client.send(&query(statement)).await;
        eventually("it runs somewhere", || async {
            let sql = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%sleep(3600)%' AND pid <> pg_backend_pid()";
            for node in &cluster.nodes()[nodes.clone()] {
                if node.query_text(sql).await.unwrap() == "1" {
                    return true;
                }
            }
            false
        })
        .await;
        client.cancel().await;
        assert_eq!(code(&client.read_ready().await).as_deref(), Some("57014"), "{statement}");
        assert_eq!(tags(&client.ask(&query("SELECT 1")).await), "TDCZ");
    }
}

#[tokio::test]
async fn a_cancel_with_a_wrong_key_or_for_an_idle_session_does_nothing() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    client.cancel().await;
    let answer = client.ask(&query("SELECT 1")).await;
    assert_eq!(tags(&answer), "TDCZ", "{answer:?}");
    let mut wrong = client.key.clone();
    *wrong.last_mut().unwrap() ^= 1;
    client.send(&query("SELECT pg_sleep(0.3)")).await;
    cancel(proxy.port(), &wrong).await;
    cancel(proxy.port(), &[0; 8]).await;
    assert_eq!(tags(&client.read_ready().await), "TDCZ");
}

#[tokio::test]
async fn a_cancel_reaches_a_session_that_waits_and_nobody_else() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let overrides = "pool: { size: 1, query_wait_timeout: 1h }\n\
        consistency: { catch_up_wait: 1h, max_lag: 1h }\nfailover: { pause_timeout: 1h }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let (mut holder, mut client) = (proxy.raw_login().await, proxy.raw_login().await);
    let cancelled = |outcome: &'static str| {
        let proxy = &proxy;
        async move { proxy.metrics().await.sum("highwater_cancels_total", &[("outcome", outcome)]) }
    };
    // For a backend.
    holder.ask(&query("BEGIN; INSERT INTO t VALUES (1)")).await;
    client.send(&query("INSERT INTO t VALUES (2)")).await;
    eventually("it waits for a backend", || async {
        let figures = proxy.metrics().await;
        figures.sum("highwater_pool_backends", &[("state", "waiting")]) == 1.0
    })
    .await;
    client.cancel().await;
    assert_eq!(code(&client.read_ready().await).as_deref(), Some("57014"));
    assert_eq!(tags(&holder.ask(&query("COMMIT")).await), "CZ");
    // For a replica. (Until the catalog facts have been read, there are no reads.)
    let deadline = std::time::Instant::now() + PATIENCE;
    while proxy.metrics().await.sum("highwater_statements_total", &[("node", "b")]) == 0.0 {
        assert!(std::time::Instant::now() < deadline, "no read reaches the replica");
        assert_eq!(tags(&client.ask(&query("SELECT x FROM t")).await), "TDCZ");
    }
    cluster.node(1).pause_replay().await.unwrap();
    assert_eq!(tags(&client.ask(&query("INSERT INTO t VALUES (3)")).await), "CZ");
    client.send(&query("SELECT x FROM t")).await;
    assert!(client.silent_for(std::time::Duration::from_millis(200)).await);
    client.cancel().await;
    assert_eq!(code(&client.read_ready().await).as_deref(), Some("57014"));
    cluster.node(1).resume_replay().await.unwrap();
    // For a primary.
    cluster.link(0).cut();
    eventually("its loss is seen", || async { proxy.log().contains("primary lost") }).await;
    client.send(&query("INSERT INTO t VALUES (4)")).await;
    assert!(client.silent_for(std::time::Duration::from_millis(200)).await);
    client.cancel().await;
    assert_eq!(code(&client.read_ready().await).as_deref(), Some("57014"));
    assert_eq!(cancelled("while_waiting").await, 3.0);
    assert_eq!(cancelled("forwarded").await, 0.0);
    cluster.link(0).heal();
    assert_eq!(tags(&client.ask(&query("INSERT INTO t VALUES (5)")).await), "CZ");
    assert_eq!(
        cluster.primary().query_text("SELECT string_agg(x::text, ' ' ORDER BY x) FROM t").await.unwrap(),
        "1 3 5"
    );
}

#[tokio::test]
async fn a_cancel_between_two_statements_or_for_a_session_that_has_ended_does_nothing() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let (mut open, mut pinned, mut ended) =
        (proxy.raw_login().await, proxy.raw_login().await, proxy.raw_login().await);
    let key = ended.key.clone();
    ended.send(&message(b'X', b"")).await;
    ended.read_to_end().await;
    open.ask(&query("BEGIN")).await;
    pinned.ask(&query("CREATE TEMP TABLE mine (x int)")).await;
    for _ in 0..100 {
        cancel(proxy.port(), &key).await;
        open.cancel().await;
        pinned.cancel().await;
        assert_eq!(tags(&open.ask(&query("SELECT 1")).await), "TDCZ");
        assert_eq!(tags(&pinned.ask(&query("TABLE mine")).await), "TCZ");
    }
}

#[tokio::test]
async fn of_300_cancels_that_race_with_the_end_of_their_statement_none_hits_another_session() {
    let cluster = Cluster::start(1).await;
    // One backend a node: whoever comes next gets the one that was just cancelled.
    let options = ProxyOptions { overrides: "pool: { size: 1 }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let hit = Arc::new(AtomicUsize::new(0));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut bystanders = Vec::new();
    for _ in 0..4 {
        let mut client = proxy.raw_login().await;
        let (hit, stopped) = (hit.clone(), stopped.clone());
        bystanders.push(tokio::spawn(async move {
            let mut ran = 0;
            while !*stopped.borrow() {
                let answer = client.ask(&query("SELECT pg_sleep(0.001)")).await;
                if code(&answer).is_some() {
                    hit.fetch_add(1, Ordering::Relaxed);
                }
                ran += 1;
            }
            ran
        }));
    }
    let mut client = proxy.raw_login().await;
    for round in 0..300_u64 {
        client.send(&query("SELECT pg_sleep(0.002)")).await;
        let key = client.key.clone();
        let port = proxy.port();
        // Spread over the statement's life and past its end.
        let canceller = tokio::spawn(async move {
            tokio::time::sleep(std::time::Duration::from_micros(round * 37 % 5000)).await;
            cancel(port, &key).await;
        });
        let answer = client.read_ready().await;
        assert!(matches!(code(&answer).as_deref(), None | Some("57014")), "{answer:?}");
        canceller.await.unwrap();
    }
    stop.send(true).unwrap();
    for bystander in bystanders {
        assert!(bystander.await.unwrap() > 0);
    }
    assert_eq!(hit.load(Ordering::Relaxed), 0);
}
