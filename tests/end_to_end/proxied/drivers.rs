//! What real drivers and PostgreSQL's own test-suite do that nothing else here does. Each was found
//! by running their suites (`make drivers`, `make regress`).

use std::time::Duration;

use crate::fixture::*;

#[tokio::test]
async fn messages_that_follow_an_error_up_to_sync_are_skipped() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    // The error is there before the rest of the unit comes, as in a pipeline.
    client.send(&[parse("", "SELECT nothing_like_it"), flush()].concat()).await;
    assert_eq!(client.read().await.unwrap().tag, b'E');
    let rest =
        client.ask(&[parse("later", "SELECT 1"), bind("later", &[]), execute(), sync()].concat()).await;
    assert_eq!(tags(&rest), "Z", "an answer to what the server has skipped");
    let unknown = client.ask(&[bind("later", &[]), execute(), sync()].concat()).await;
    assert_eq!(unknown[0].field(b'C').as_deref(), Some("26000"));
    // A Query is skipped like all else.
    let failed = client.ask(&[parse("", "SELECT nothing"), query("SELECT 1"), sync()].concat()).await;
    assert_eq!(tags(&failed), "EZ");
    assert_eq!(tags(&client.ask(&query("SELECT 1")).await), "TDCZ");
}

#[tokio::test]
async fn a_query_behind_a_flush_is_routed_by_itself() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    // asyncpg: a statement is described, by a replica perhaps, and without a Sync BEGIN follows.
    for _ in 0..10 {
        client.send(&[parse("", "SELECT 1"), describe(b'S', ""), flush()].concat()).await;
        for tag in *b"1tT" {
            assert_eq!(client.read().await.unwrap().tag, tag);
        }
        assert_eq!(tags(&client.ask(&query("BEGIN")).await), "CZ");
        assert_eq!(tags(&client.ask(&query("INSERT INTO t VALUES (1)")).await), "CZ");
        assert_eq!(tags(&client.ask(&query("COMMIT")).await), "CZ");
    }
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), "10");
}

#[tokio::test]
async fn more_statements_than_a_backend_may_keep_can_be_used_in_turn() {
    let cluster = Cluster::start(0).await;
    let options = ProxyOptions { overrides: "pool: { size: 1, max_prepared: 3 }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let client = proxy.connect().await;
    for _ in 0..2 {
        for number in 0..10 {
            let statement = client.prepare(&format!("SELECT {number}")).await.unwrap();
            let row = client.query_one(&statement, &[]).await.unwrap();
            assert_eq!(row.get::<_, i32>(0), number);
        }
    }
}

#[tokio::test]
async fn clients_with_application_names_of_their_own_share_a_small_pool() {
    let cluster = Cluster::start(0).await;
    let options = ProxyOptions { overrides: "pool: { size: 2 }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let clients: Vec<_> = (0..12)
        .map(|number| {
            let mut command = cluster.program_command("psql", proxy.port());
            let sql = "SHOW application_name; SELECT 'it''s so'";
            command.env("PGAPPNAME", format!("worker's {number}")).args(["-X", "-A", "-t"]);
            for _ in 0..5 {
                command.args(["-c", sql]);
            }
            tokio::spawn(run(command, ""))
        })
        .collect();
    for (number, client) in clients.into_iter().enumerate() {
        let output = tokio::time::timeout(Duration::from_secs(60), client).await.unwrap().unwrap();
        assert_eq!(success(&output), format!("worker's {number}\nit's so\n").repeat(5));
    }
    let opened = proxy.metrics().await.sum("highwater_backends_opened_total", &[]);
    assert!(opened <= 4.0, "{opened} backends for a pool of two");
}

#[tokio::test]
async fn clients_with_different_startup_settings_take_turns_in_a_small_pool() {
    let cluster = Cluster::start(0).await;
    let options = ProxyOptions { overrides: "pool: { size: 2 }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let clients: Vec<_> = (1..=12)
        .map(|number| {
            let mut command = cluster.program_command("psql", proxy.port());
            command.env("PGOPTIONS", format!("-c work_mem={number}MB")).args(["-X", "-A", "-t"]);
            for _ in 0..5 {
                command.args(["-c", "SHOW work_mem"]);
            }
            tokio::spawn(run(command, ""))
        })
        .collect();
    for (number, client) in (1..).zip(clients) {
        let output = tokio::time::timeout(Duration::from_secs(60), client).await.unwrap().unwrap();
        assert_eq!(success(&output), format!("{number}MB\n").repeat(5));
    }
}

/// A test runner's way: make a database, use it, leave it, drop it. What the proxy keeps in reserve for
/// that database must not hold the drop off.
#[tokio::test]
async fn a_database_that_sessions_have_left_can_be_dropped() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    cluster.primary().execute("ALTER ROLE app CREATEDB").await.unwrap();
    let app = proxy.app();
    let client = proxy.connect().await;
    for round in 0..3 {
        client.batch_execute("CREATE DATABASE passing").await.unwrap();
        {
            let passing = proxy.connect_as("passing", app).await.unwrap();
            passing.batch_execute("CREATE TABLE t (x int); INSERT INTO t VALUES (1)").await.unwrap();
            passing.query("SELECT x FROM t", &[]).await.unwrap();
        }
        let dropped = client.batch_execute("DROP DATABASE passing").await;
        assert!(dropped.is_ok(), "round {round}: {dropped:?}");
    }
}
