//! The tools that speak the replication protocol work through the proxy's port.

use std::path::Path;

use highwater::demo::cluster::{ClusterOptions, Identity, Login};

use crate::fixture::*;

async fn logical() -> Cluster {
    let settings = vec![("wal_level".to_owned(), "logical".to_owned())];
    Cluster::start_with(ClusterOptions { replicas: 0, settings, ..ClusterOptions::default() }).await
}

/// A tool, logged in as the replicator through `port`.
fn tool(cluster: &Cluster, name: &str, port: u16, login: &Login) -> tokio::process::Command {
    let mut command = cluster.program_command(name, port);
    command.env("PGUSER", &login.user).env("PGPASSWORD", &login.password);
    command
}

async fn replicating(proxy: &Proxy) -> f64 {
    proxy.metrics().await.sum("highwater_replication_connections", &[])
}

#[tokio::test]
async fn pg_basebackup_makes_a_backup_that_verifies() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t AS SELECT generate_series(1, 100000) AS x").await;
    let proxy = Proxy::start(&cluster).await;
    let scratch = tempfile::tempdir().unwrap();
    let target = scratch.path().join("backup");
    let mut command = tool(&cluster, "pg_basebackup", proxy.port(), &cluster.roles().replicator);
    command.args(["-X", "stream", "-c", "fast", "-D"]).arg(&target);
    success(&run(command, "").await);
    let mut verify = tokio::process::Command::new(cluster.program("pg_verifybackup"));
    verify.arg(&target);
    assert!(success(&run(verify, "").await).contains("backup successfully verified"));
    eventually("its connections are gone", || async { replicating(&proxy).await == 0.0 }).await;
}

#[tokio::test]
async fn pg_receivewal_receives_what_was_written_while_it_ran() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let scratch = tempfile::tempdir().unwrap();
    let replicator = &cluster.roles().replicator;
    let mut create = tool(&cluster, "pg_receivewal", proxy.port(), replicator);
    create.args(["-S", "s", "--create-slot"]);
    success(&run(create, "").await);
    let mut receive = tool(&cluster, "pg_receivewal", proxy.port(), replicator);
    receive.args(["-S", "s", "--synchronous", "--no-loop", "-D"]).arg(scratch.path());
    let mut receiving = receive.stdin(std::process::Stdio::null()).spawn().unwrap();
    cluster.primary().wait_for("SELECT active FROM pg_replication_slots", "t").await.unwrap();
    assert_eq!(replicating(&proxy).await, 1.0);
    proxy.connect().await.simple_query("INSERT INTO t SELECT generate_series(1, 10000)").await.unwrap();
    // Its answers reach the server, too: the slot moves.
    let target = cluster.primary().query_text("SELECT pg_current_wal_flush_lsn()").await.unwrap();
    let stored = format!("SELECT flush_lsn >= '{target}' FROM pg_stat_replication");
    cluster.primary().wait_for(&stored, "t").await.unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(receiving.id().unwrap()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(tokio::time::timeout(PATIENCE, receiving.wait()).await.unwrap().unwrap().success());
    let files = |path: &Path| std::fs::read_dir(path).unwrap().count();
    assert!(files(scratch.path()) > 0);
    cluster.primary().wait_for("SELECT active FROM pg_replication_slots", "f").await.unwrap();
}

#[tokio::test]
async fn a_subscription_copies_and_follows() {
    let publisher = logical().await;
    publisher
        .set_up("CREATE TABLE t (x int PRIMARY KEY); INSERT INTO t SELECT generate_series(1, 1000)")
        .await;
    let proxy = Proxy::start(&publisher).await;
    let replicator = &publisher.roles().replicator;
    let admin = publisher.primary().connect("app", &publisher.roles().superuser).await.unwrap();
    let grant = format!("CREATE PUBLICATION p FOR ALL TABLES; GRANT SELECT ON t TO {}", replicator.user);
    admin.batch_execute(&grant).await.unwrap();
    let subscriber = Cluster::start_with(ClusterOptions {
        replicas: 0,
        identity: Identity::Own,
        ..ClusterOptions::default()
    })
    .await;
    subscriber.set_up("CREATE TABLE t (x int PRIMARY KEY)").await;
    let operator = subscriber.primary().connect("app", &subscriber.roles().superuser).await.unwrap();
    let subscribe = format!(
        "CREATE SUBSCRIPTION s CONNECTION 'host=127.0.0.1 port={} dbname=app user={} password={}' PUBLICATION p",
        proxy.port(),
        replicator.user,
        replicator.password
    );
    operator.batch_execute(&subscribe).await.unwrap();
    let rows = |expected: i64| {
        let operator = &operator;
        eventually("the subscriber has the rows", move || async move {
            operator.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get::<_, i64>(0) == expected
        })
    };
    rows(1000).await;
    proxy.connect().await.simple_query("INSERT INTO t VALUES (2000)").await.unwrap();
    rows(1001).await;
    // It is on its way for good; when the proxy stops, it is told so, and nothing holds that up.
    assert!(replicating(&proxy).await >= 1.0);
    assert!(proxy.stop().await.success());
    operator
        .batch_execute(
            "ALTER SUBSCRIPTION s DISABLE; ALTER SUBSCRIPTION s SET (slot_name = NONE); DROP SUBSCRIPTION s",
        )
        .await
        .unwrap();
}

#[tokio::test]
async fn pg_recvlogical_prints_what_was_written() {
    let cluster = logical().await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let replicator = &cluster.roles().replicator;
    let mut create = tool(&cluster, "pg_recvlogical", proxy.port(), replicator);
    create.args(["-d", "app", "-S", "s", "-P", "pgoutput", "--create-slot"]);
    success(&run(create, "").await);
    let admin = cluster.primary().connect("app", &cluster.roles().superuser).await.unwrap();
    admin.batch_execute("CREATE PUBLICATION p FOR ALL TABLES").await.unwrap();
    proxy.connect().await.simple_query("INSERT INTO t VALUES (12345)").await.unwrap();
    let end = cluster.primary().query_text("SELECT pg_current_wal_lsn()").await.unwrap();
    let mut start = tool(&cluster, "pg_recvlogical", proxy.port(), replicator);
    start.args(["-d", "app", "-S", "s", "--start", "-o", "proto_version=1", "-o", "publication_names=p"]);
    start.args(["--no-loop", "-f", "-", "--endpos", &end]);
    let output = run(start, "").await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout.windows(5).any(|bytes| bytes == b"12345"), "{}", output.stdout.escape_ascii());
}

#[tokio::test]
async fn who_may_not_replicate_hears_it_from_the_server_and_one_too_many_from_the_proxy() {
    let cluster = Cluster::start(0).await;
    let overrides = "replication: { max_connections: 1 }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..Default::default() }).await;
    let app = proxy.app().clone();
    let replicator = cluster.roles().replicator.clone();
    let mut said = Vec::new();
    for port in [cluster.primary().port(), proxy.port()] {
        for (value, database) in [("true", "app"), ("database", "app"), ("1", "no_such_database")] {
            let mut client = RawClient::connect(port).await;
            let parameters = [("user", app.user.as_str()), ("database", database), ("replication", value)];
            let told = client.login_with(&parameters, &app.password).await.unwrap_err();
            said.push((told.field(b'C'), told.field(b'M')));
        }
    }
    assert_eq!(said[..3], said[3..]);
    assert_eq!(said[0].0.as_deref(), Some("42501"));
    let parameters = [("user", replicator.user.as_str()), ("database", "app"), ("replication", "database")];
    let mut first = proxy.raw().await;
    first.login_with(&parameters, &replicator.password).await.unwrap();
    assert!(u32::from_be_bytes(*first.key.first_chunk().unwrap()) >= 1 << 30, "the key is not ours");
    assert_eq!(tags(&first.ask(&query("IDENTIFY_SYSTEM")).await), "TDCZ");
    let told = proxy.raw().await.login_with(&parameters, &replicator.password).await.unwrap_err();
    assert_eq!(told.field(b'C').as_deref(), Some("53300"));
    // Its SQL can be cancelled with the key it was given.
    first.send(&query("SELECT pg_sleep(3600)")).await;
    let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    cluster.primary().wait_for(sleeping, "1").await.unwrap();
    first.cancel().await;
    let answer = first.read_ready().await;
    assert_eq!(answer.iter().find(|m| m.tag == b'E').unwrap().field(b'C').as_deref(), Some("57014"));
    // A drain ends it, with a word.
    let stopping = tokio::spawn(proxy.stop());
    let told = first.read_to_end().await;
    assert_eq!(told[0].field(b'C').as_deref(), Some("57P01"));
    assert!(stopping.await.unwrap().success());
}

#[tokio::test]
async fn a_new_primary_ends_what_came_from_the_old_one() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let replicator = cluster.roles().replicator.clone();
    let parameters = [("user", replicator.user.as_str()), ("database", "app"), ("replication", "database")];
    let mut client = proxy.raw().await;
    client.login_with(&parameters, &replicator.password).await.unwrap();
    cluster.link(0).silence();
    cluster.node(1).promote().await.unwrap();
    let told = client.read_to_end().await;
    assert_eq!(told[0].field(b'C').as_deref(), Some("57P01"), "{told:?}");
    let mut again = proxy.raw().await;
    again.login_with(&parameters, &replicator.password).await.unwrap();
    let answer = again.ask(&query("IDENTIFY_SYSTEM")).await;
    assert_eq!(answer[1].columns()[1].as_deref(), Some("2"), "{answer:?}");
}
