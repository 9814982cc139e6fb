//! What the log says of single statements and clients, and what it never says.

use serde_json::Value;

use crate::fixture::*;

const PARENT: &str = "00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01";

async fn json_log(cluster: &Cluster, more: &str) -> Proxy {
    let overrides = format!("log: {{ format: json, slow_statement: 100ms{more} }}");
    Proxy::start_with(cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await
}

/// The lines of the log with this message.
fn lines(proxy: &Proxy, message: &str) -> Vec<Value> {
    let log = proxy.log();
    let all = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    all.filter(|line| line["message"] == message).collect()
}

#[tokio::test]
async fn a_slow_statement_is_one_line_without_its_literals() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x text)").await;
    let proxy = json_log(&cluster, "").await;
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(proxy.port()).dbname("app").application_name("shop \"1\"");
    let (client, connection) = config
        .user(&proxy.app().user)
        .password(&proxy.app().password)
        .connect(tokio_postgres::NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    // It may be slow on a busy machine: it waits for a backend to be opened.
    client.simple_query("SELECT 'first secret', 1").await.unwrap();
    client.simple_query("SELECT 'quick secret'").await.unwrap();
    let sql = format!(
        "INSERT INTO t SELECT 'simple secret' FROM pg_sleep(0.15) /* secret,application='x',traceparent='{PARENT}'*/;"
    );
    client.simple_query(&sql).await.unwrap();
    let prepared = format!(
        "/*traceparent='{PARENT}'*/ SELECT x, $1::text FROM t, pg_sleep(0.15) WHERE x <> 'other secret'"
    );
    client.query(&prepared, &[&"bound secret"]).await.unwrap();
    client.batch_execute("BEGIN; SELECT pg_sleep(0.15); COMMIT").await.unwrap();
    let slow = || {
        let all = lines(&proxy, "slow statement");
        all.into_iter().filter(|line| line["statement"] != "SELECT ?, ?").collect::<Vec<_>>()
    };
    eventually("three lines", || async { slow().len() == 3 }).await;
    let slow = slow();
    assert_eq!(slow[0]["statement"], "INSERT INTO t SELECT ? FROM pg_sleep(?) ;");
    assert_eq!(slow[1]["statement"], "SELECT x, ?::text FROM t, pg_sleep(?) WHERE x <> ?");
    for line in &slow[..2] {
        assert_eq!(line["traceparent"], PARENT, "{line}");
    }
    assert_eq!(slow[2].get("traceparent"), None);
    for (line, write) in slow.iter().zip([true, false, true]) {
        let on_primary = line["node"] == "a";
        assert_eq!(line["route"], if on_primary { "primary" } else { "replica" }, "{line}");
        assert!(on_primary || !write, "{line}");
        // The other one is a read, once the catalog facts are there.
        assert!(line["reason"] == "not_a_read" || !write, "{line}");
        assert_eq!((&line["user"], &line["database"]), (&"app".into(), &"app".into()), "{line}");
        assert_eq!(line["application_name"], "shop \"1\"");
        assert!(line["duration_ms"].as_f64().unwrap() >= 150.0, "{line}");
        assert!(line["wait_ms"].as_f64().unwrap() < line["duration_ms"].as_f64().unwrap(), "{line}");
        assert!(line["pid"].as_u64().unwrap() >= 1 << 30, "{line}");
    }
    assert!(!proxy.log().contains("secret"), "{}", proxy.log());
}

#[tokio::test]
async fn a_wait_is_part_of_a_slow_statement_and_named() {
    let cluster = Cluster::start(0).await;
    let overrides = "pool: { size: 1 }\nlog: { format: json, slow_statement: 100ms }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let (holds, waits) = (proxy.connect().await, proxy.connect().await);
    holds.simple_query("BEGIN; SELECT 1").await.unwrap();
    let waiting = tokio::spawn(async move { waits.simple_query("CREATE TABLE t ()").await.map(drop) });
    eventually("somebody waits", || async {
        proxy.metrics().await.sum("highwater_pool_backends", &[("state", "waiting")]) == 1.0
    })
    .await;
    holds.simple_query("SELECT pg_sleep(0.2); COMMIT").await.unwrap();
    waiting.await.unwrap().unwrap();
    eventually("both lines", || async { lines(&proxy, "slow statement").len() == 2 }).await;
    let slow = lines(&proxy, "slow statement");
    let of =
        |text: &str| slow.iter().find(|line| line["statement"].as_str().unwrap().starts_with(text)).unwrap();
    assert!(of("CREATE TABLE")["wait_ms"].as_f64().unwrap() >= 150.0, "{slow:?}");
    assert!(of("SELECT pg_sleep")["wait_ms"].as_f64().unwrap() < 100.0, "{slow:?}");
}

#[tokio::test]
async fn lines_are_bounded_and_what_is_left_out_is_counted() {
    let cluster = Cluster::start(0).await;
    let overrides = "log: { format: json, slow_statement: 1us, slow_per_second: 2 }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = proxy.connect().await;
    let begun = std::time::Instant::now();
    for _ in 0..100 {
        client.simple_query("SELECT 1").await.unwrap();
    }
    // The seconds are the proxy's own: one more may have begun, and one may have ended.
    let seconds = usize::try_from(begun.elapsed().as_secs()).unwrap() + 2;
    let logged = lines(&proxy, "slow statement").len();
    assert!((1..=2 * seconds).contains(&logged), "{logged} lines in {seconds} seconds");
    let suppressed = proxy.metrics().await.sum("highwater_log_suppressed_total", &[]);
    assert_eq!(suppressed as usize + logged, 100);
}

#[tokio::test]
async fn a_text_whose_literals_cannot_be_told_is_not_shown() {
    let cluster = Cluster::start(0).await;
    let proxy = json_log(&cluster, "").await;
    let client = proxy.connect().await;
    client.simple_query("SET standard_conforming_strings = off").await.unwrap();
    client.simple_query("SELECT pg_sleep(0.15), 'a\\' secret'").await.unwrap();
    eventually("a line", || async { lines(&proxy, "slow statement").len() == 1 }).await;
    assert_eq!(lines(&proxy, "slow statement")[0]["statement"], "SELECT …");
    assert!(!proxy.log().contains("secret"));
}

#[tokio::test]
async fn a_long_statements_trace_is_found_at_its_end() {
    let cluster = Cluster::start(0).await;
    let proxy = json_log(&cluster, "").await;
    let client = proxy.connect().await;
    let long = "secret ".repeat(10_000);
    let sql = format!("SELECT pg_sleep(0.15), length('{long}') /*traceparent='{PARENT}'*/");
    client.simple_query(&sql).await.unwrap();
    eventually("a line", || async { lines(&proxy, "slow statement").len() == 1 }).await;
    let line = &lines(&proxy, "slow statement")[0];
    assert_eq!(line["traceparent"], PARENT);
    assert_eq!(line["statement"], "SELECT pg_sleep(?), length( …");
    assert!(!proxy.log().contains("secret"));
}

#[tokio::test]
async fn what_the_proxy_fails_is_logged_and_what_clients_do_wrong_is_not() {
    let cluster = Cluster::start(0).await;
    let overrides = "pool: { size: 1, query_wait_timeout: 2s }\nlog: { format: json }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let (holds, fails) = (proxy.connect().await, proxy.connect().await);
    assert!(holds.simple_query("SELECT 1/0").await.is_err());
    assert!(holds.simple_query("SELECT 1 /* highwater.consistency=nonsense */").await.is_err());
    holds.simple_query("BEGIN; SELECT 1").await.unwrap();
    let sql = format!("INSERT INTO t VALUES ('secret') /*traceparent='{PARENT}'*/");
    let error = fails.simple_query(&sql).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "53300");
    let failed = lines(&proxy, "statement failed");
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!((&failed[0]["sqlstate"], &failed[0]["traceparent"]), (&"53300".into(), &PARENT.into()));
    assert_eq!(failed[0]["statement"], "INSERT INTO t VALUES (?)");
    assert!(!proxy.log().contains("secret"));
    holds.simple_query("COMMIT").await.unwrap();
}

#[tokio::test]
async fn clients_that_come_and_go_are_logged_if_asked_for() {
    let cluster = Cluster::start(0).await;
    let proxy = json_log(&cluster, ", connections: false").await;
    drop(proxy.connect().await);
    proxy.configure(&cluster, "log: { format: json, connections: true }");
    assert!(proxy.reload().await);
    assert_eq!(lines(&proxy, "client connected").len(), 0);
    let client = proxy.connect().await;
    client.simple_query("SELECT 1").await.unwrap();
    drop(client);
    eventually("it is said that it has gone", || async { lines(&proxy, "client disconnected").len() == 1 })
        .await;
    let come = &lines(&proxy, "client connected")[0];
    assert_eq!((&come["user"], &come["database"]), (&"app".into(), &"app".into()));
    assert!(come["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{come}");
}
