//! What a transaction that stands open on the primary costs other sessions, and itself: nothing.
//!
//! What it has written is in the log and may stay unflushed, so that no replica gets so far; here replay is stopped
//! besides, so that it never does.

use std::time::Duration;

use highwater::demo::cluster::ClusterOptions;

use crate::fixture::*;

const STRONG: &str = "consistency: { level: strong, catch_up_wait: 50ms }";

async fn started(replicas: usize, overrides: &str) -> (Cluster, Proxy) {
    let settings = [("log_statement", "all"), ("max_prepared_transactions", "10")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let options = ClusterOptions { replicas, settings: settings.to_vec(), ..ClusterOptions::default() };
    let cluster = Cluster::start_with(options).await;
    cluster
        .set_up("CREATE TABLE counter (id int PRIMARY KEY, n int); INSERT INTO counter VALUES (1, 0), (2, 0)")
        .await;
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    (cluster, proxy)
}

async fn stop_replay(cluster: &Cluster) {
    for replica in &cluster.nodes()[1..] {
        replica.pause_replay().await.unwrap();
    }
}

async fn count(client: &tokio_postgres::Client, id: i32) -> i32 {
    let sql = format!("SELECT n FROM counter WHERE id = {id}");
    client.query_one(&sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_strong_transaction_waits_for_nothing_once_it_has_begun() {
    for transactions in ["primary", "split"] {
        let overrides = format!("{STRONG}\nrouting: {{ transactions: {transactions} }}");
        let (cluster, proxy) = started(1, &overrides).await;
        let client = proxy.connect().await;
        stop_replay(&cluster).await;
        client.batch_execute("BEGIN").await.unwrap();
        client.batch_execute("UPDATE counter SET n = 1 WHERE id = 1").await.unwrap();
        let waits = async || proxy.metrics().await.sum("highwater_wait_seconds_count", &[("for", "floor")]);
        let before = waits().await;
        // By the simple protocol as well as by the extended one, with and without a comment.
        for sql in [
            "SAVEPOINT s",
            "UPDATE counter SET n = n + 1 WHERE id = 2",
            "ROLLBACK TO s",
            "UPDATE counter SET n = n + 1 WHERE id = 1 /* highwater.consistency=strong */",
            "SELECT n FROM counter /* highwater.consistency=strong */",
        ] {
            client.simple_query(sql).await.unwrap();
        }
        client.execute("UPDATE counter SET n = n + 1 WHERE id = 1", &[]).await.unwrap();
        client.batch_execute("COMMIT").await.unwrap();
        assert_eq!(waits().await, before, "{transactions}");
        assert_eq!((count(&client, 1).await, count(&client, 2).await), (3, 0), "{transactions}");
    }
}

/// Beside one that rests in savepoints, of which one was released, and another that waits for its lock.
#[tokio::test]
async fn transactions_that_stand_open_hold_up_no_strong_statement() {
    for replicas in [0, 1] {
        let (cluster, proxy) = started(replicas, STRONG).await;
        let (resting, waiting, client) =
            (proxy.connect().await, proxy.connect().await, proxy.connect().await);
        stop_replay(&cluster).await;
        resting.batch_execute("BEGIN; UPDATE counter SET n = 10 WHERE id = 1; SAVEPOINT s").await.unwrap();
        resting.batch_execute("UPDATE counter SET n = 11 WHERE id = 1; RELEASE s").await.unwrap();
        resting
            .batch_execute("SAVEPOINT s; UPDATE counter SET n = 11 WHERE id = 1; SAVEPOINT s")
            .await
            .unwrap();
        let waits =
            tokio::spawn(
                async move { waiting.execute("UPDATE counter SET n = n + 1 WHERE id = 1", &[]).await },
            );
        let lock = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        cluster.primary().wait_for(lock, "1").await.unwrap();
        assert_eq!((count(&client, 1).await, count(&client, 2).await), (0, 0));
        for n in 1..4 {
            client.execute("UPDATE counter SET n = n + 1 WHERE id = 2", &[]).await.unwrap();
            assert_eq!((count(&client, 1).await, count(&client, 2).await), (0, n));
        }
        assert!(!waits.is_finished());
        resting.batch_execute("COMMIT").await.unwrap();
        assert_eq!(waits.await.unwrap().unwrap(), 1);
        assert_eq!((count(&client, 1).await, count(&client, 2).await), (12, 3));
    }
}

/// What holds the primary's floor might be that transaction: its promise is of when it began.
#[tokio::test]
async fn a_transaction_waits_for_nothing_that_another_connection_of_its_named_session_was_shown() {
    // The primary could not show it, however long a read waited there.
    let (cluster, proxy) = started(1, "consistency: { catch_up_wait: 5s }").await;
    let (within, reader) = (proxy.connect().await, proxy.connect().await);
    for connection in [&within, &reader] {
        connection.batch_execute("SET highwater.session = 'one'").await.unwrap();
    }
    reads_reach_replicas(&cluster, &reader, "SELECT n AS loaded FROM counter WHERE id = 1").await;
    within.batch_execute("BEGIN; SELECT n FROM counter").await.unwrap();
    // Nobody has that name.
    cluster.primary().set("synchronous_standby_names", "nobody").await.unwrap();
    let writer = cluster.primary().connect("app", &cluster.roles().app).await.unwrap();
    let commits =
        tokio::spawn(async move { writer.execute("UPDATE counter SET n = 1 WHERE id = 1", &[]).await });
    cluster.node(1).wait_for("SELECT n FROM counter WHERE id = 1", "1").await.unwrap();
    eventually("the replica has shown it", async || count(&reader, 1).await == 1).await;
    assert_eq!(count(&within, 1).await, 0, "the primary hides it");
    within.batch_execute("COMMIT").await.unwrap();
    assert_eq!(count(&within, 1).await, 1, "outside, no read goes back");
    cluster.primary().set("synchronous_standby_names", "").await.unwrap();
    commits.await.unwrap().unwrap();
}

/// `reader` was shown by a replica what the primary hides until the wait of `commits` is over: so long its read there waits,
/// although the primary is asked what its transactions do.
async fn primary_shows_it_when_it_is_committed<T>(
    cluster: &Cluster,
    reader: tokio_postgres::Client,
    commits: tokio::task::JoinHandle<Result<T, tokio_postgres::Error>>,
) {
    let asked = cluster.ran("pg_stat_get_activity(NULL")[0];
    let read = tokio::spawn(async move {
        let sql = "SELECT n FROM counter WHERE id = 1 /* highwater.route=primary */";
        reader.query_one(sql, &[]).await.unwrap().get::<_, i32>(0)
    });
    eventually("the primary is asked what its transactions do", async || {
        cluster.ran("pg_stat_get_activity(NULL")[0] > asked + 2
    })
    .await;
    assert!(!read.is_finished(), "the primary hides it");
    cluster.primary().set("synchronous_standby_names", "").await.unwrap();
    commits.await.unwrap().unwrap();
    assert_eq!(tokio::time::timeout(Duration::from_secs(60), read).await.unwrap().unwrap(), 1);
}

/// A commit that replicas show and the primary does not yet is no open transaction, however long it takes.
#[tokio::test]
async fn a_commit_that_waits_for_a_standby_is_not_taken_for_an_open_transaction() {
    let (cluster, proxy) = started(1, "").await;
    let (reader, resting) = (proxy.connect().await, proxy.connect().await);
    reads_reach_replicas(&cluster, &reader, "SELECT n AS loaded FROM counter WHERE id = 1").await;
    resting.batch_execute("BEGIN; UPDATE counter SET n = 10 WHERE id = 2").await.unwrap();
    // Nobody has that name.
    cluster.primary().set("synchronous_standby_names", "nobody").await.unwrap();
    let writer = cluster.primary().connect("app", &cluster.roles().app).await.unwrap();
    let commits =
        tokio::spawn(async move { writer.execute("UPDATE counter SET n = 1 WHERE id = 1", &[]).await });
    cluster.node(1).wait_for("SELECT n FROM counter WHERE id = 1", "1").await.unwrap();
    eventually("the replica has shown it", async || count(&reader, 1).await == 1).await;
    stop_replay(&cluster).await;
    // Both hold the floor now: the one that rests, and the one that is at its commit.
    primary_shows_it_when_it_is_committed(&cluster, reader, commits).await;
    resting.batch_execute("ROLLBACK").await.unwrap();
}

/// With savepoints, whose ids are held by nobody either; beside clients that rest, and one that is at something else.
#[tokio::test]
async fn transactions_that_stand_prepared_hold_up_no_strong_statement() {
    for replicas in [0, 1] {
        let (cluster, proxy) = started(replicas, STRONG).await;
        let (preparing, busy, client) = (proxy.connect().await, proxy.connect().await, proxy.connect().await);
        let busy = tokio::spawn(async move { busy.batch_execute("SELECT pg_sleep(100)").await });
        stop_replay(&cluster).await;
        preparing.batch_execute("BEGIN; UPDATE counter SET n = 10 WHERE id = 1; SAVEPOINT s").await.unwrap();
        preparing.batch_execute("UPDATE counter SET n = 11 WHERE id = 1").await.unwrap();
        preparing.batch_execute("PREPARE TRANSACTION 'standing'").await.unwrap();
        for n in 1..4 {
            client.execute("UPDATE counter SET n = n + 1 WHERE id = 2", &[]).await.unwrap();
            assert_eq!((count(&client, 1).await, count(&client, 2).await), (0, n));
        }
        // Also after a restart, which is when nobody remembers who has prepared it.
        drop(busy);
        cluster.primary().restart().await.unwrap();
        let client = proxy.connect().await;
        client.execute("UPDATE counter SET n = n + 1 WHERE id = 2", &[]).await.unwrap();
        assert_eq!((count(&client, 1).await, count(&client, 2).await), (0, 4));
        client.batch_execute("COMMIT PREPARED 'standing'").await.unwrap();
        assert_eq!((count(&client, 1).await, count(&client, 2).await), (11, 4));
    }
}

/// Replicas show it as soon as it is in the log; the primary when its wait is over.
#[tokio::test]
async fn a_commit_prepared_that_waits_for_a_standby_is_not_taken_for_one_that_stands() {
    let (cluster, proxy) = started(1, "").await;
    let reader = proxy.connect().await;
    reads_reach_replicas(&cluster, &reader, "SELECT n AS loaded FROM counter WHERE id = 1").await;
    let writer = cluster.primary().connect("app", &cluster.roles().app).await.unwrap();
    for (id, name) in [(2, "stays"), (1, "comes")] {
        writer.batch_execute("BEGIN").await.unwrap();
        writer.batch_execute(&format!("UPDATE counter SET n = 1 WHERE id = {id}")).await.unwrap();
        writer.batch_execute(&format!("PREPARE TRANSACTION '{name}'")).await.unwrap();
    }
    // Nobody has that name.
    cluster.primary().set("synchronous_standby_names", "nobody").await.unwrap();
    let commits =
        tokio::spawn(async move { writer.batch_execute("/* now */ Commit /* it */ Prepared 'comes'").await });
    cluster.node(1).wait_for("SELECT n FROM counter WHERE id = 1", "1").await.unwrap();
    eventually("the replica has shown it", async || count(&reader, 1).await == 1).await;
    stop_replay(&cluster).await;
    primary_shows_it_when_it_is_committed(&cluster, reader, commits).await;
    cluster.primary().execute("ROLLBACK PREPARED 'stays'").await.unwrap();
}
