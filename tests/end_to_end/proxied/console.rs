//! What administrators are promised of the console.

use std::process::Output;
use std::time::{Instant, SystemTime};

use highwater::demo::cluster::Login;
use tokio_postgres::SimpleQueryMessage;

use crate::fixture::*;

const TABLES: [&str; 12] = [
    "nodes",
    "lag",
    "pools",
    "sessions",
    "stats",
    "statements",
    "config",
    "failover",
    "history",
    "topology",
    "version",
    "help",
];

pub(super) async fn console(cluster: &Cluster, proxy: &Proxy) -> tokio_postgres::Client {
    proxy.connect_as("highwater", &cluster.roles().control).await.unwrap()
}

/// The rows of a simple query, by column.
pub(super) async fn rows(client: &tokio_postgres::Client, sql: &str) -> Vec<tokio_postgres::SimpleQueryRow> {
    let said = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    said.into_iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        })
        .collect()
}

/// One column of the row whose other column has this value.
pub(super) async fn cell(
    client: &tokio_postgres::Client,
    table: &str,
    by: (&str, &str),
    column: &str,
) -> Option<String> {
    let all = rows(client, &format!("SHOW {table}")).await;
    let row = all.iter().find(|row| row.get(by.0) == Some(by.1))?;
    row.get(column).map(str::to_owned)
}

fn code(error: &tokio_postgres::Error) -> String {
    error.as_db_error().unwrap_or_else(|| panic!("{error:?}")).code().code().to_owned()
}

pub(super) async fn psql(cluster: &Cluster, proxy: &Proxy, script: &str) -> Output {
    let login = &cluster.roles().control;
    let mut command = cluster.program_command("psql", proxy.port());
    command.env("PGUSER", &login.user).env("PGPASSWORD", &login.password).env("PGDATABASE", "highwater");
    command.args(["-X", "-v", "ON_ERROR_STOP=1"]);
    run(command, script).await
}

#[tokio::test]
async fn every_table_is_shown_to_psql_and_to_drivers_with_the_same_columns() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let app = proxy.connect().await;
    app.batch_execute("SELECT 1").await.unwrap();
    let client = console(&cluster, &proxy).await;
    for table in TABLES {
        let prepared = client.prepare(&format!("SHOW {table}")).await.unwrap();
        let names: Vec<String> = prepared.columns().iter().map(|c| c.name().to_owned()).collect();
        // Binary, as this driver asks for it.
        let binary = client.query(&prepared, &[]).await.unwrap_or_else(|error| panic!("{table}: {error:?}"));
        let text = rows(&client, &format!("SELECT * FROM {table}")).await;
        if !matches!(table, "sessions" | "stats") {
            assert_eq!(binary.len(), text.len(), "{table}");
        }
        if let Some(row) = text.first() {
            let shown: Vec<&str> = row.columns().iter().map(|c| c.name()).collect();
            assert_eq!(names, shown, "{table}");
        }
        let shown = success(&psql(&cluster, &proxy, &format!("show {table};")).await);
        assert!(names.iter().all(|name| shown.contains(name.as_str())), "{table}: {shown}");
    }
    // The types are PostgreSQL's own.
    let node =
        client.query_one("SELECT name, port, drained, lag_seconds FROM nodes LIMIT 1", &[]).await.unwrap();
    assert_eq!(node.get::<_, &str>(0), "a");
    assert_eq!(node.get::<_, i64>(1), i64::from(cluster.link(0).port()));
    assert!(!node.get::<_, bool>(2));
    assert_eq!(node.get::<_, Option<f64>>(3), None);
    let session = client.query("SELECT pid, connected, user FROM sessions", &[]).await.unwrap();
    let of_app = session.iter().find(|row| row.get::<_, &str>(2) == "app").unwrap();
    let age = SystemTime::now().duration_since(of_app.get(1)).unwrap_or_default();
    assert!(age < PATIENCE && of_app.get::<_, i64>(0) >= 1 << 30, "{age:?}");
    let config = client.query("SHOW CONFIG", &[]).await.unwrap();
    let shown = format!("{:?}", config.iter().map(|r| r.get::<_, Option<&str>>(1)).collect::<Vec<_>>());
    assert!(!shown.contains(&cluster.roles().control.password), "a secret is shown");
    assert_eq!(
        cell(&client, "config", ("key", "control.password"), "value").await.as_deref(),
        Some("********")
    );
    assert_eq!(cell(&client, "config", ("key", "workers"), "source").await.as_deref(), Some("file"));
    assert_eq!(cell(&client, "config", ("key", "workers"), "applies").await.as_deref(), Some("restart"));
    assert_eq!(cell(&client, "topology", ("item", "primary"), "value").await.as_deref(), Some("a"));
    assert_eq!(
        cell(&client, "failover", ("item", "primary_reachable"), "value").await.as_deref(),
        Some("yes")
    );
}

async fn major(cluster: &Cluster) -> String {
    let sql = "SELECT current_setting('server_version_num')::int / 10000";
    cluster.primary().query_text(sql).await.unwrap()
}

#[tokio::test]
async fn what_tools_and_drivers_say_by_themselves_is_understood() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let script = "\\conninfo\n\\encoding\nBEGIN;\nSHOW VERSION;\nCOMMIT;\nSELECT version();\n\
        SHOW server_version; SET client_encoding TO 'UTF8'; SHOW transaction_isolation;\nSELECT 1 AS one;\n";
    let shown = success(&psql(&cluster, &proxy, script).await);
    // psql 18 shows the connection as a table.
    assert!(
        shown.contains("connected to database \"highwater\"") || shown.contains("| highwater"),
        "{shown}"
    );
    let major = major(&cluster).await;
    let postgres = format!("PostgreSQL {major}");
    for part in ["UTF8", "Highwater", &postgres, "read committed", "one"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let client = console(&cluster, &proxy).await;
    let version: i64 = client
        .query_one("SELECT current_setting('server_version_num')::int/100 as version", &[])
        .await
        .unwrap()
        .get("version");
    assert_eq!(version.to_string(), format!("{major}00"));
    // A failed transaction is one, as on a server.
    client.batch_execute("BEGIN").await.unwrap();
    assert_eq!(code(&client.batch_execute("SHOW NOTHING").await.unwrap_err()), "42601");
    assert_eq!(code(&client.batch_execute("SHOW LAG").await.unwrap_err()), "25P02");
    client.batch_execute("ROLLBACK").await.unwrap();
    client.batch_execute("SHOW LAG").await.unwrap();
    // Parameters, and several commands in one message.
    assert_eq!(rows(&client, "SHOW VERSION; SHOW VERSION; SELECT 1").await.len(), 3);
    assert_eq!(code(&client.execute("KILL $1", &[&7_i64]).await.unwrap_err()), "42704");
    assert_eq!(code(&client.execute("DRAIN $1", &[&"nowhere"]).await.unwrap_err()), "42704");
    // Mistakes have a place and a hint.
    let error = client.simple_query("/* é */ SHOW NODE").await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.position(), Some(&tokio_postgres::error::ErrorPosition::Original(14)));
    assert!(error.hint().unwrap().contains("SHOW NODES"), "{error:?}");
    assert_eq!(code(&client.simple_query("SELECT nothing FROM nodes").await.unwrap_err()), "42703");
    assert_eq!(code(&client.simple_query("SELECT * FROM pg_class").await.unwrap_err()), "42P01");
}

#[tokio::test]
async fn the_extended_protocol_holds_at_its_edges() {
    let cluster = Cluster::start(0).await;
    let overrides = "limits: { statements_per_session: 5, statement_text: 4KiB }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let mut client = proxy.raw().await;
    client.login("highwater", &cluster.roles().control).await.unwrap();
    assert_eq!(client.parameters["server_encoding"], "UTF8");
    let version = format!("{}.0 (Highwater", major(&cluster).await);
    assert!(client.parameters["server_version"].starts_with(&version), "{:?}", client.parameters);
    let said = client.ask(&[parse("", "SHOW VERSION"), describe(b'S', ""), sync()].concat()).await;
    assert_eq!(tags(&said), "1tTZ");
    let said = client.ask(&[bind("", &[]), describe(b'P', ""), execute(), sync()].concat()).await;
    assert_eq!(tags(&said), "2TDCZ");
    // After an error all is skipped up to Sync; more formats than columns are an error, not a crash.
    let bad = message(b'B', b"\0\0\0\0\0\0\0\x02\0\x01\0\x01");
    let said = client.ask(&[bad, execute(), sync()].concat()).await;
    assert_eq!((tags(&said).as_str(), said[0].field(b'C').as_deref()), ("EZ", Some("08P01")));
    let said = client.ask(&[bind("unknown", &[]), sync()].concat()).await;
    assert_eq!(said[0].field(b'C').as_deref(), Some("26000"));
    let said = client.ask(&[parse("", "SHOW LAG; SHOW LAG"), sync()].concat()).await;
    assert_eq!(said[0].field(b'C').as_deref(), Some("42601"));
    // Names are bounded.
    let mut refused = None;
    for number in 0..10 {
        let said = client.ask(&[parse(&format!("s{number}"), "SHOW LAG"), sync()].concat()).await;
        refused = refused.or_else(|| (said[0].tag == b'E').then(|| said[0].field(b'C').unwrap()));
    }
    assert_eq!(refused.as_deref(), Some("53400"));
    assert_eq!(tags(&client.ask(&query("")).await), "IZ");
    assert_eq!(tags(&client.ask(&query("-- nothing")).await), "IZ");
    // A message that is too long ends the connection, in words.
    client.send(&query(&" ".repeat(5000))).await;
    let last = client.read_to_end().await;
    assert_eq!(last[0].field(b'C').as_deref(), Some("08P01"));
    // As does one that is none.
    let mut client = proxy.raw().await;
    client.login("highwater", &cluster.roles().control).await.unwrap();
    client.send(&message(b'!', b"x")).await;
    assert_eq!(client.read_to_end().await[0].field(b'C').as_deref(), Some("08P01"));
}

#[tokio::test]
async fn only_administrators_get_in_and_they_do_when_all_other_places_are_taken() {
    let cluster = Cluster::start(0).await;
    let overrides = "{ max_clients: 2, limits: { admin_connections: 1 } }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let refused = proxy.connect_as("highwater", &cluster.roles().app).await.unwrap_err();
    assert_eq!(code(&refused), "42501");
    let wrong = Login { user: cluster.roles().control.user.clone(), password: "wrong".to_owned() };
    assert_eq!(code(&proxy.connect_as("highwater", &wrong).await.unwrap_err()), "28P01");
    let _full = [proxy.connect().await, proxy.connect().await];
    assert_eq!(code(&proxy.connect_as("app", &cluster.roles().app).await.unwrap_err()), "53300");
    let client = console(&cluster, &proxy).await;
    assert_eq!(rows(&client, "SHOW SESSIONS").await.len(), 3);
    assert_eq!(proxy.metrics().await.sum("highwater_console_connections", &[]), 1.0);
    let second = proxy.connect_as("highwater", &cluster.roles().control).await.unwrap_err();
    assert_eq!(code(&second), "53300");
    // Its place is no client's.
    assert_eq!(code(&proxy.connect_as("highwater", &cluster.roles().app).await.unwrap_err()), "53300");
    let mut walsender = proxy.raw().await;
    let login = &cluster.roles().control;
    let parameters = [("user", login.user.as_str()), ("database", "highwater"), ("replication", "database")];
    let refused = walsender.login_with(&parameters, &login.password).await.unwrap_err();
    assert_eq!(refused.field(b'C').as_deref(), Some("0A000"));
}

#[tokio::test]
async fn without_a_console_the_name_is_a_database_as_any_other() {
    let cluster = Cluster::start(0).await;
    let overrides = "limits: { admin_connections: 0 }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let error = proxy.connect_as("highwater", &cluster.roles().control).await.unwrap_err();
    assert_eq!(code(&error), "3D000");
}

#[tokio::test]
async fn the_console_answers_while_no_node_does() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    for node in 0..2 {
        cluster.link(node).cut();
    }
    let client = console(&cluster, &proxy).await;
    eventually("the nodes are seen to be gone", || async {
        let all = rows(&client, "SHOW NODES").await;
        all.iter().all(|row| row.get("standing") != Some("serving"))
    })
    .await;
    for table in TABLES {
        rows(&client, &format!("SHOW {table}")).await;
    }
    let route = rows(&client, "EXPLAIN ROUTE SELECT 1").await;
    assert!(route.iter().any(|row| row.get(1).is_some_and(|v| v.contains("cannot be reached"))), "{route:?}");
    assert_eq!(
        cell(&client, "failover", ("item", "primary_reachable"), "value").await.as_deref(),
        Some("no")
    );
    // And it lets its administrators in, by the password; none of them has logged in before.
    let wrong = Login { user: cluster.roles().control.user.clone(), password: "wrong".to_owned() };
    assert_eq!(code(&proxy.connect_as("highwater", &wrong).await.unwrap_err()), "28P01");
    // Even where no node has been seen since the start.
    let blind =
        Proxy::start_with(&cluster, ProxyOptions { start: Start::Listening, ..Default::default() }).await;
    let client = console(&cluster, &blind).await;
    assert_eq!(cell(&client, "nodes", ("name", "a"), "role").await.as_deref(), Some("excluded"));
}

#[tokio::test]
async fn sessions_are_shown_as_they_are_and_can_be_cancelled_and_ended() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1)").await;
    let proxy = Proxy::start(&cluster).await;
    let client = console(&cluster, &proxy).await;
    let mut app = proxy.raw().await;
    let login = proxy.app().clone();
    let parameters = [("user", login.user.as_str()), ("database", "app"), ("application_name", "the shop")];
    app.login_with(&parameters, &login.password).await.unwrap();
    let pid = u32::from_be_bytes(*app.key.first_chunk().unwrap()).to_string();
    let see = |column: &'static str| {
        let (client, pid) = (&client, &pid);
        async move { cell(client, "sessions", ("pid", pid), column).await.unwrap_or_default() }
    };
    // The client may have its answer a moment before the session is at rest.
    let shows = async |column: &'static str, value: &'static str| {
        eventually(value, || async { see(column).await == value }).await
    };
    shows("application_name", "the shop").await;
    shows("state", "idle").await;
    app.ask(&query("SET application_name = 'another'")).await;
    shows("application_name", "another").await;
    app.ask(&query("BEGIN; INSERT INTO t VALUES (2)")).await;
    shows("state", "idle in transaction").await;
    assert_eq!(see("node").await, "a");
    app.ask(&query("nonsense")).await;
    shows("state", "idle in transaction (aborted)").await;
    app.ask(&query("ROLLBACK")).await;
    shows("state", "idle").await;
    assert_eq!(see("node").await, "");
    app.ask(&query("CREATE TEMP TABLE mine (x int)")).await;
    shows("pins", "temporary_table").await;
    assert_eq!(see("node").await, "a");
    app.ask(&query("DROP TABLE mine")).await;
    shows("pins", "").await;
    // What the session has seen becomes a mark as soon as a sample comes.
    let deadline = Instant::now() + PATIENCE;
    while see("mark").await.is_empty() {
        assert!(Instant::now() < deadline, "the session has no mark");
        app.ask(&query("SELECT x FROM t")).await;
    }
    assert!(see("statements").await.parse::<u64>().unwrap() >= 6);
    assert!(see("received_bytes").await.parse::<u64>().unwrap() > 100);
    assert!(see("sent_bytes").await.parse::<u64>().unwrap() > 100);

    app.send(&query("SELECT pg_sleep(1000)")).await;
    eventually("the statement runs", || async {
        see("state").await == "active" && !see("node").await.is_empty()
    })
    .await;
    client.batch_execute(&format!("CANCEL {pid}")).await.unwrap();
    let said = app.read_ready().await;
    assert!(said.iter().any(|m| m.tag == b'E' && m.field(b'C').as_deref() == Some("57014")), "{said:?}");
    client.batch_execute(&format!("KILL {pid}")).await.unwrap();
    let last = app.read_to_end().await;
    assert_eq!(last[0].field(b'C').as_deref(), Some("57P01"));
    eventually("it is gone", || async { see("state").await.is_empty() }).await;
    assert_eq!(code(&client.batch_execute(&format!("KILL {pid}")).await.unwrap_err()), "42704");
    assert_eq!(code(&client.batch_execute("KILL everybody").await.unwrap_err()), "22P02");
}

#[tokio::test]
async fn figures_are_kept_by_user_and_by_statement_and_no_literal_is_shown() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int, s text)").await;
    let proxy = Proxy::start(&cluster).await;
    let client = console(&cluster, &proxy).await;
    let app = proxy.connect().await;
    for number in 0..3 {
        app.batch_execute(&format!("INSERT INTO t VALUES ({number}, 'hunter2x')")).await.unwrap();
        app.execute("INSERT INTO t VALUES ($1, 'hunter2x')", &[&number]).await.unwrap();
    }
    app.batch_execute("BEGIN; UPDATE t SET s = 'hunter2x'; COMMIT").await.unwrap();
    app.batch_execute("BEGIN").await.unwrap();
    app.execute("DELETE FROM t WHERE s = 'hunter2x' AND x > $1", &[&100]).await.unwrap();
    app.batch_execute("COMMIT").await.unwrap();
    app.batch_execute("SET app.secret = 'hunter2x'").await.unwrap();
    eventually("reads reach the replica", || async {
        app.batch_execute("SELECT x FROM t WHERE s = 'hunter2x'").await.unwrap();
        cell(&client, "stats", ("user", "app"), "reads_on_replicas").await.is_some_and(|n| n != "0")
    })
    .await;
    let all = rows(&client, "SHOW STATEMENTS").await;
    // A read that came before the catalog facts has a row of its own: it was not known to be one.
    let of = |text: &str, class: &str, column: &str| {
        let is_it = |row: &&tokio_postgres::SimpleQueryRow| {
            row.get("statement") == Some(text) && row.get("class") == Some(class)
        };
        let row = all.iter().find(is_it);
        let row = row.unwrap_or_else(|| panic!("{text} is not in {all:?}"));
        row.get(column).unwrap_or_default().to_owned()
    };
    assert_eq!(of("INSERT INTO t VALUES (?)", "write", "on_primary"), "6");
    assert_eq!(of("DELETE FROM t WHERE s = ? AND x > ?", "write", "on_primary"), "1");
    let read = "SELECT x FROM t WHERE s = ?";
    assert_ne!(of(read, "read", "on_replicas"), "0");
    let (mean, most) = (of(read, "read", "mean_seconds"), of(read, "read", "max_seconds"));
    assert!(mean.parse::<f64>().unwrap() <= most.parse::<f64>().unwrap(), "{mean} {most}");
    for row in &all {
        assert!(!row.get("statement").unwrap().contains("hunter2x"), "{row:?}");
    }
    // A session's end takes nothing away.
    let before: u64 = cell(&client, "stats", ("user", "app"), "statements").await.unwrap().parse().unwrap();
    drop(app);
    eventually("the session has ended", || async {
        cell(&client, "stats", ("user", "app"), "sessions").await.as_deref() == Some("0")
    })
    .await;
    let after: u64 = cell(&client, "stats", ("user", "app"), "statements").await.unwrap().parse().unwrap();
    assert_eq!(before, after);
    assert_eq!(cell(&client, "pools", ("user", "app"), "size").await.as_deref(), Some("20"));
}

#[tokio::test]
async fn a_pause_waits_for_transactions_and_holds_statements_until_it_is_over() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let overrides = "pool: { query_wait_timeout: 20s }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = console(&cluster, &proxy).await;
    let (mut busy, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    busy.ask(&query("BEGIN; INSERT INTO t VALUES (1)")).await;
    let pausing = console(&cluster, &proxy).await;
    let paused = tokio::spawn(async move { pausing.batch_execute("PAUSE app").await });
    eventually("the pool is paused", || async {
        cell(&client, "pools", ("database", "app"), "paused").await.as_deref() == Some("t")
    })
    .await;
    // What is new waits; what is in a transaction goes on.
    other.send(&query("INSERT INTO t VALUES (2)")).await;
    eventually("it waits", || async {
        rows(&client, "SHOW SESSIONS").await.iter().any(|row| row.get("wait") == Some("paused"))
    })
    .await;
    assert!(!paused.is_finished(), "PAUSE did not wait for a transaction");
    assert_eq!(tags(&busy.ask(&query("INSERT INTO t VALUES (3)")).await), "CZ");
    assert_eq!(tags(&busy.ask(&query("COMMIT")).await), "CZ");
    paused.await.unwrap().unwrap();
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), "2");
    eventually("no backend is left to the node", || async {
        cell(&client, "pools", ("database", "app"), "idle").await.is_none_or(|idle| idle == "0")
    })
    .await;
    client.batch_execute("RESUME app").await.unwrap();
    assert_eq!(tags(&other.read_ready().await), "CZ");
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), "3");
    assert_eq!(code(&client.batch_execute("RESUME app").await.unwrap_err()), "55000");

    // Who waits can cancel; and a PAUSE that is cancelled has held nobody.
    client.batch_execute("PAUSE").await.unwrap();
    other.send(&query("SELECT 1")).await;
    eventually("it waits", || async {
        rows(&client, "SHOW SESSIONS").await.iter().any(|row| row.get("wait") == Some("paused"))
    })
    .await;
    other.cancel().await;
    assert_eq!(other.read_ready().await[0].field(b'C').as_deref(), Some("57014"));
    client.batch_execute("RESUME").await.unwrap();
    busy.ask(&query("BEGIN; SELECT 1")).await;
    let mut pausing = proxy.raw().await;
    pausing.login("highwater", &cluster.roles().control).await.unwrap();
    pausing.send(&query("PAUSE")).await;
    eventually("the pool is paused", || async {
        cell(&client, "pools", ("database", "app"), "paused").await.as_deref() == Some("t")
    })
    .await;
    pausing.cancel().await;
    assert_eq!(pausing.read_ready().await[0].field(b'C').as_deref(), Some("57014"));
    assert_eq!(tags(&other.ask(&query("INSERT INTO t VALUES (4)")).await), "CZ");
}

#[tokio::test]
async fn what_is_paused_too_long_fails_and_was_not_run() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let overrides = "pool: { query_wait_timeout: 200ms }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = console(&cluster, &proxy).await;
    let mut app = proxy.raw_login().await;
    client.batch_execute("PAUSE").await.unwrap();
    let said = app.ask(&query("INSERT INTO t VALUES (1)")).await;
    assert_eq!(said[0].field(b'C').as_deref(), Some("57P03"));
    let batch = [parse("", "INSERT INTO t VALUES (1)"), bind("", &[]), execute(), sync()].concat();
    let said = app.ask(&batch).await;
    assert_eq!((tags(&said).as_str(), said[0].field(b'C').as_deref()), ("EZ", Some("57P03")));
    client.batch_execute("RESUME").await.unwrap();
    assert_eq!(tags(&app.ask(&query("INSERT INTO t VALUES (2)")).await), "CZ");
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), "1");
    // A transaction that does not end keeps a pause from coming about.
    app.ask(&query("BEGIN; SELECT 1")).await;
    let error = client.batch_execute("PAUSE").await.unwrap_err();
    assert_eq!(code(&error), "55006");
    let mut other = proxy.raw_login().await;
    assert_eq!(tags(&other.ask(&query("SELECT 1")).await), "TDCZ");
}

#[tokio::test]
async fn a_drained_replica_gets_no_new_reads_and_keeps_no_backend() {
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let client = console(&cluster, &proxy).await;
    let app = proxy.connect().await;
    let reads = |node: &'static str| {
        let proxy = &proxy;
        async move {
            proxy.metrics().await.sum("highwater_statements_total", &[("node", node), ("reason", "read")])
        }
    };
    eventually("both replicas are read from", || async {
        app.batch_execute("SELECT x FROM t").await.unwrap();
        reads("b").await > 0.0 && reads("c").await > 0.0
    })
    .await;
    client.batch_execute("DRAIN b").await.unwrap();
    assert_eq!(cell(&client, "nodes", ("name", "b"), "drained").await.as_deref(), Some("t"));
    let before = (reads("b").await, reads("c").await);
    for _ in 0..20 {
        app.batch_execute("SELECT x FROM t").await.unwrap();
    }
    assert_eq!(reads("b").await, before.0);
    assert!(reads("c").await > before.1);
    eventually("its backends are closed", || async {
        cell(&client, "nodes", ("name", "b"), "backends").await.as_deref() == Some("0")
    })
    .await;
    assert!(
        proxy.metrics().await.sum("highwater_backends_closed_total", &[("node", "b"), ("reason", "drained")])
            >= 1.0
    );
    // With none left, reads run on the primary.
    client.batch_execute("DRAIN c").await.unwrap();
    let on_primary = proxy.metrics().await.sum("highwater_statements_total", &[("reason", "no_replica")]);
    app.batch_execute("SELECT x FROM t").await.unwrap();
    let now = proxy.metrics().await.sum("highwater_statements_total", &[("reason", "no_replica")]);
    assert_eq!(now, on_primary + 1.0);
    let error = client.batch_execute("DRAIN a").await.unwrap_err();
    assert!(error.as_db_error().unwrap().hint().unwrap().contains("SWITCHOVER"), "{error:?}");
    client.batch_execute("UNDRAIN b").await.unwrap();
    eventually("it is read from again", || async {
        app.batch_execute("SELECT x FROM t").await.unwrap();
        reads("b").await > before.0
    })
    .await;
    assert_eq!(code(&client.batch_execute("UNDRAIN b").await.unwrap_err()), "55000");
}

#[tokio::test]
async fn a_reload_says_what_has_changed_and_a_mistake_changes_nothing() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let client = console(&cluster, &proxy).await;
    let file = proxy.directory().join("config.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{text}\npool: {{ size: 7 }}\nlog: {{ format: json }}\n")).unwrap();
    let mut raw = proxy.raw().await;
    raw.login("highwater", &cluster.roles().control).await.unwrap();
    let said = raw.ask(&query("RELOAD")).await;
    assert_eq!(tags(&said), "NNCZ");
    let notice = said[0].field(b'M').unwrap();
    assert!(notice.contains("live: pool.size") && notice.contains("restart: log.format"), "{notice}");
    assert_eq!(cell(&client, "config", ("key", "pool.size"), "value").await.as_deref(), Some("7"));
    assert_eq!(cell(&client, "config", ("key", "log.format"), "value").await.as_deref(), Some("text"));
    std::fs::write(&file, format!("{text}\npool: {{ size: 0 }}\n")).unwrap();
    let error = client.batch_execute("RELOAD").await.unwrap_err();
    assert_eq!(code(&error), "F0000");
    assert!(error.as_db_error().unwrap().detail().unwrap().contains("pool.size"), "{error:?}");
    assert_eq!(cell(&client, "config", ("key", "pool.size"), "value").await.as_deref(), Some("7"));
}

/// A table, and a function that writes into it.
const WRITING_FUNCTION: &str = "CREATE TABLE t (x int); CREATE FUNCTION f() RETURNS int LANGUAGE plpgsql AS \
     $$ BEGIN INSERT INTO t VALUES (1); RETURN 1; END $$";

/// What an explanation says about something.
fn about<'a>(explained: &'a [tokio_postgres::SimpleQueryRow], item: &str) -> &'a str {
    let row = explained.iter().find(|row| row.get(0) == Some(item));
    row.unwrap_or_else(|| panic!("{item} is not in {explained:?}")).get(1).unwrap()
}

#[tokio::test]
async fn a_route_is_explained_as_it_would_be_taken() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(WRITING_FUNCTION).await;
    let overrides = "routing: { rules: [ { user: reports, split: false }, { database: app, route: auto } ] }\n\
                     consistency: { rules: [ { user: app, level: strong } ] }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = console(&cluster, &proxy).await;
    let explain = |sql: &str| {
        let sql = format!("EXPLAIN ROUTE (DATABASE app, USER app) {sql}");
        let client = &client;
        async move { rows(client, &sql).await }
    };
    // Facts are kept while somebody is connected. Where they cannot be read in time, nothing is a read.
    let _app = proxy.connect().await;
    eventually("the facts are read", || {
        let explaining = explain("SELECT x FROM t");
        async { about(&explaining.await, "class") == "read" }
    })
    .await;
    let mut read = explain("SELECT x FROM t").await;
    assert_eq!((about(&read, "class"), about(&read, "database")), ("read", "app"));
    assert!(about(&read, "runs on").starts_with("a replica"), "{read:?}");
    assert!(about(&read, "promised").contains("level strong"), "{read:?}");
    assert!(about(&read, "mark").contains('/'), "{read:?}");
    assert_eq!(about(&read, "a"), "yes, where no replica may");
    eventually("the replica may serve", || {
        let explaining = explain("SELECT x FROM t");
        async { about(&explaining.await, "b").starts_with("yes: it has replayed ") }
    })
    .await;
    let calls = explain("SELECT f()").await;
    assert_eq!(
        (about(&calls, "class"), about(&calls, "runs on"), about(&calls, "b")),
        ("write", "the primary", "no: a replica")
    );
    assert!(calls.iter().any(|row| row.get(1).is_some_and(|v| v.starts_with("f: "))), "{calls:?}");
    assert_eq!(about(&calls, "decided by"), "the catalog facts");
    let hinted = explain("SELECT x FROM t /* highwater.consistency=eventual */").await;
    assert!(about(&hinted, "promised").contains("level eventual"), "{hinted:?}");
    let hinted = explain("/* highwater.route=primary */ SELECT x FROM t").await;
    assert_eq!(
        (about(&hinted, "runs on"), about(&hinted, "because")),
        ("the primary", "a comment in it asks for the primary")
    );
    let hinted = explain("SELECT x FROM t /* highwater.route=nearest */").await;
    assert!(about(&hinted, "runs on").starts_with("nowhere"), "{hinted:?}");
    let ruled = rows(&client, "EXPLAIN ROUTE (USER reports, DATABASE app) SELECT x FROM t").await;
    assert!(about(&ruled, "runs on").contains("routing.split is off"), "{ruled:?}");
    assert_eq!(about(&ruled, "b"), "no: a replica");
    // A database that there is not has no facts, and nothing of ours goes on asking for it.
    let unknown = rows(&client, "EXPLAIN ROUTE (DATABASE nowhere) SELECT 1").await;
    assert_eq!(about(&unknown, "because"), "the catalog facts of the database are not loaded");
    client.batch_execute("DRAIN b").await.unwrap();
    read = explain("SELECT x FROM t").await;
    assert_eq!(about(&read, "b"), "no: it is drained");
    // Nothing of it has run.
    let app = cluster.primary().connect("app", &cluster.roles().app).await.unwrap();
    assert_eq!(app.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0), 0);
}

#[tokio::test]
async fn the_command_line_explains_routes_with_a_live_databases_facts() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(WRITING_FUNCTION).await;
    let overrides = "routing: { rules: [ { user: reports, split: false } ] }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let text = std::fs::read_to_string(proxy.directory().join("config.yaml")).unwrap();
    let explain = |text: &str, arguments: &[&str], sql: &str| {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.yaml");
        std::fs::write(&file, text).unwrap();
        let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_highwater"));
        command.args(["route", "-d", "app", "-c"]).arg(&file).args(arguments).arg(sql);
        async move {
            let output = run(command, "").await;
            drop(directory);
            success(&output)
        }
    };
    let says = |said: &str, line: &str| assert!(said.lines().any(|l| l.contains(line)), "{line}: {said}");
    let read = explain(&text, &[], "SELECT x FROM t").await;
    says(&read, "class       read");
    says(&read, "runs on     a replica");
    says(&read, "a           yes, where no replica may");
    says(&read, "b           yes, once it has reached the session's mark");
    let calls = explain(&text, &[], "SELECT f()").await;
    says(&calls, "class       write");
    says(&calls, "f: a function whose body");
    says(&calls, "b           no: a standby");
    says(&explain(&text, &["-U", "reports"], "SELECT x FROM t").await, "routing.split is off");
    says(&explain(&text, &[], "/* highwater.route=replica */ SELECT x FROM t").await, "waits longer for one");
    let level = explain(&text, &[], "SELECT x FROM t /* highwater.consistency=strong */").await;
    says(&level, "promised    level strong");
    let shadowed = text.replacen("routing:\n", "routing:\n  shadow: true\n", 1);
    assert_ne!(shadowed, text);
    says(&explain(&shadowed, &[], "SELECT x FROM t").await, "routing.shadow is on");
    // A node that does not answer is said so; with no primary, nothing is a read.
    cluster.link(1).cut();
    let without_replica = explain(&text, &[], "SELECT x FROM t").await;
    says(&without_replica, "b           no: ");
    cluster.link(0).cut();
    says(&explain(&text, &[], "SELECT x FROM t").await, "the catalog facts of the database are not loaded");
}

#[tokio::test]
async fn the_console_ends_with_the_proxy() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw().await;
    client.login("highwater", &cluster.roles().control).await.unwrap();
    let stopping = tokio::spawn(proxy.stop());
    let last = client.read_to_end().await;
    assert_eq!(last[0].field(b'C').as_deref(), Some("57P01"));
    assert!(stopping.await.unwrap().success());
}

#[tokio::test]
async fn orders_about_the_primary_reach_the_machine_and_are_answered() {
    let cluster = Cluster::start(1).await;
    let overrides = "failover: { mode: manual }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = console(&cluster, &proxy).await;
    let said = |item: &'static str| {
        let client = &client;
        async move { cell(client, "failover", ("item", item), "value").await }
    };
    assert_eq!(said("mode").await.as_deref(), Some("manual"));
    assert_eq!((said("primary").await.as_deref(), said("paused").await.as_deref()), (Some("a"), Some("no")));
    // Without a state_dir it may not begin what a restart could not finish, and says so.
    let error = client.batch_execute("SWITCHOVER TO b DRY RUN").await.unwrap_err();
    assert_eq!(code(&error), "55000");
    assert!(error.as_db_error().unwrap().message().contains("state_dir"), "{error:?}");
    assert_eq!(code(&client.batch_execute("SWITCHOVER TO nowhere").await.unwrap_err()), "42704");
    assert_eq!(code(&client.batch_execute("SWITCHOVER TIMEOUT 'soon'").await.unwrap_err()), "22007");
    let mut raw = proxy.raw().await;
    raw.login("highwater", &cluster.roles().control).await.unwrap();
    assert_eq!(tags(&raw.ask(&query("PAUSE FAILOVER")).await), "NCZ");
    eventually("it is paused", || async { said("paused").await.as_deref() == Some("yes") }).await;
    assert_eq!(tags(&raw.ask(&query("RESUME FAILOVER")).await), "NCZ");
    eventually("it is resumed", || async { said("paused").await.as_deref() == Some("no") }).await;
}
