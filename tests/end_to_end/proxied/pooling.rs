//! `pool.mode: session`: everything stays, as on one server, and nothing of it is left to the next.

use crate::fixture::*;

async fn cell(client: &mut RawClient, sql: &str) -> Option<String> {
    let answer = client.ask(&query(sql)).await;
    let row = answer.iter().find(|message| message.tag == b'D');
    row.unwrap_or_else(|| panic!("{sql}: {answer:?}")).columns()[0].clone()
}

const SESSION: &str = "pool: { size: 2, users: [ { name: app, mode: session } ] }";

#[tokio::test]
async fn a_session_keeps_one_backend_of_the_primary_whatever_it_does() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides: SESSION, ..Default::default() }).await;
    let app = proxy.app().clone();
    let parameters = [("user", app.user.as_str()), ("database", "app"), ("application_name", "books")];
    let mut client = proxy.raw().await;
    client.login_with(&parameters, &app.password).await.unwrap();
    assert_eq!(tags(&client.ask(&query("SELECT x FROM t")).await), "TCZ");
    let pid = cell(&mut client, "SELECT pg_backend_pid()").await;
    // Nothing here is a reason to be pinned in the other mode; DISCARD ALL would even end a pin.
    for sql in
        ["SELECT x FROM t", "BEGIN; INSERT INTO t VALUES (1); COMMIT", "DISCARD ALL", "SELECT x FROM t"]
    {
        client.ask(&query(sql)).await;
        assert_eq!(cell(&mut client, "SELECT pg_backend_pid()").await, pid, "{sql}");
    }
    assert_eq!(cell(&mut client, "SHOW application_name").await.as_deref(), Some("books"));
    client
        .ask(&query("SET work_mem = '7MB'; CREATE TEMP TABLE mine AS SELECT 42 AS x; PREPARE p AS SELECT 7"))
        .await;
    let parsed = [parse("q", "SELECT 8"), sync()].concat();
    assert_eq!(tags(&client.ask(&parsed).await), "1Z");
    let ran = [bind("q", &[]), execute(), sync()].concat();
    assert_eq!(tags(&client.ask(&ran).await), "2DCZ");
    for (sql, expected) in [("SHOW work_mem", "7MB"), ("SELECT x FROM mine", "42"), ("EXECUTE p", "7")] {
        assert_eq!(cell(&mut client, sql).await.as_deref(), Some(expected), "{sql}");
    }
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_statements_total", &[("node", "b")]), 0.0);
    assert_eq!(metrics.sum("highwater_pins_total", &[("reason", "session_pooling")]), 1.0);
    assert_eq!(metrics.sum("highwater_pinned_sessions", &[]), 1.0);
    // The next one gets the same backend, and nothing of what was left on it.
    client.send(&message(b'X', b"")).await;
    client.read_to_end().await;
    let mut next = proxy.raw_login().await;
    eventually("its backend comes back", || async {
        let figures = proxy.metrics().await;
        figures.sum("highwater_pool_backends", &[("node", "a"), ("state", "idle"), ("user", "app")]) >= 1.0
    })
    .await;
    assert_eq!(cell(&mut next, "SELECT pg_backend_pid()").await, pid);
    assert_eq!(cell(&mut next, "SHOW work_mem").await.as_deref(), Some("4MB"));
    assert_eq!(cell(&mut next, "SELECT to_regclass('mine')").await, None);
    assert_eq!(cell(&mut next, "SELECT count(*) FROM pg_prepared_statements").await.as_deref(), Some("0"));
    // A cancel finds the backend that it has.
    next.send(&query("SELECT pg_sleep(3600)")).await;
    let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    cluster.primary().wait_for(sleeping, "1").await.unwrap();
    next.cancel().await;
    let answer = next.read_ready().await;
    assert_eq!(answer.iter().find(|m| m.tag == b'E').unwrap().field(b'C').as_deref(), Some("57014"));
}

#[tokio::test]
async fn a_session_that_keeps_its_backend_makes_the_others_wait_in_line() {
    let cluster = Cluster::start(0).await;
    let overrides = "pool: { mode: session, size: 1, query_wait_timeout: 300ms }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..Default::default() }).await;
    let (mut first, mut second) = (proxy.raw_login().await, proxy.raw_login().await);
    assert_eq!(tags(&first.ask(&query("SELECT 1")).await), "TDCZ");
    let answer = second.ask(&query("SELECT 1")).await;
    assert_eq!(answer[0].field(b'C').as_deref(), Some("53300"));
    first.send(&message(b'X', b"")).await;
    first.read_to_end().await;
    // The first is seen to be gone when its connection ends; its backend is cleaned after that.
    let deadline = std::time::Instant::now() + PATIENCE;
    while tags(&second.ask(&query("SELECT 1")).await) != "TDCZ" {
        assert!(std::time::Instant::now() < deadline, "the second never had its turn");
    }
}

#[tokio::test]
async fn without_a_word_about_it_a_session_gives_its_backend_back() {
    let cluster = Cluster::start(0).await;
    let overrides = "pool: { size: 1, users: [ { name: somebody_else, mode: session } ] }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..Default::default() }).await;
    let (mut first, mut second) = (proxy.raw_login().await, proxy.raw_login().await);
    for _ in 0..2 {
        assert_eq!(tags(&first.ask(&query("SELECT 1")).await), "TDCZ");
        assert_eq!(tags(&second.ask(&query("SELECT 1")).await), "TDCZ");
    }
}

/// Reads until one has run on the replica.
async fn warm(proxy: &Proxy, client: &mut RawClient) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while proxy.metrics().await.sum("highwater_statements_total", &[("node", "b"), ("reason", "read")]) == 0.0
    {
        assert!(std::time::Instant::now() < deadline, "no read ran on a replica");
        client.ask(&query("SELECT x FROM t")).await;
    }
}

/// Whoever waits for a backend may be lent one that comes back before the new one is open: that one is for the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_push_at_the_same_time_hold_no_more_backends_than_they_are() {
    const SESSIONS: usize = 6;
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1)").await;
    let proxy = Proxy::start(&cluster).await;
    let mut clients = Vec::new();
    for _ in 0..SESSIONS {
        clients.push(proxy.raw_login().await);
    }
    warm(&proxy, &mut clients[0]).await;
    let work = clients.into_iter().map(|mut client| async move {
        for at in 0..60 {
            client.ask(&query(if at % 3 == 0 { "UPDATE t SET x = x + 1" } else { "SELECT x FROM t" })).await;
        }
        client
    });
    let clients = futures_util::future::join_all(work).await;
    let metrics = proxy.metrics().await;
    for node in ["a", "b"] {
        let opened = metrics.sum("highwater_backends_opened_total", &[("node", node)]);
        assert!((1.0..=SESSIONS as f64).contains(&opened), "{node}: {opened}");
    }
    drop(clients);
}

#[tokio::test]
async fn sessions_one_after_another_share_one_backend_of_each_node() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1)").await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    warm(&proxy, &mut client).await;
    for _ in 0..10 {
        client.send(&message(b'X', b"")).await;
        client.read_to_end().await;
        client = proxy.raw_login().await;
        client.ask(&query("SELECT x FROM t")).await;
        client.ask(&query("UPDATE t SET x = x + 1")).await;
        client.ask(&query("SELECT x FROM t")).await;
    }
    let metrics = proxy.metrics().await;
    for node in ["a", "b"] {
        assert_eq!(metrics.sum("highwater_backends_opened_total", &[("node", node)]), 1.0, "{node}");
    }
}
