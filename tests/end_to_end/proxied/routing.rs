//! Statements reach the right node.

use crate::fixture::*;

/// Three nodes, statements logged, one table of one row on all of them.
async fn three_nodes() -> (Cluster, Proxy) {
    let cluster = Cluster::start_logging(2).await;
    cluster.set_up("CREATE TABLE t (id int PRIMARY KEY, x int); INSERT INTO t VALUES (1, 0)").await;
    let proxy = Proxy::start(&cluster).await;
    (cluster, proxy)
}

#[tokio::test]
async fn reads_run_on_replicas_and_both_replicas_serve() {
    let (cluster, proxy) = three_nodes().await;
    let client = proxy.connect().await;
    // Until the catalog is known nothing is a read.
    eventually("a read runs on a replica", async || {
        client.simple_query("SELECT x FROM t").await.unwrap();
        proxy.metrics().await.sum("highwater_statements_total", &[("reason", "read")]) > 0.0
    })
    .await;
    cluster.wait_caught_up(0).await.unwrap();
    for _ in 0..50 {
        client.query("SELECT x FROM t WHERE id = $1 /* marker */", &[&1]).await.unwrap();
    }
    let mut others = Vec::new();
    for _ in 0..50 {
        let other = proxy.connect().await;
        other.simple_query("SELECT x AS marker FROM t").await.unwrap();
        others.push(other);
    }
    let ran = cluster.ran("marker");
    assert_eq!(ran.iter().sum::<usize>(), 100, "{ran:?}");
    assert!(ran[1] > 0 && ran[2] > 0, "{ran:?}");
    assert!(ran[0] <= 20, "at least 80 of 100 reads on replicas: {ran:?}");
}

#[tokio::test]
async fn whatever_is_not_shown_to_be_a_read_runs_on_the_primary() {
    let (cluster, proxy) = three_nodes().await;
    cluster
        .set_up(
            "CREATE SEQUENCE s;
             CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES (99, 0) RETURNING 1';
             CREATE FUNCTION dynamic() RETURNS int LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'SELECT 1'; RETURN 1; END $$",
        )
        .await;
    let client = proxy.connect().await;
    let statements = [
        "INSERT INTO t VALUES (2, 0)",
        "UPDATE t SET x = x + 1 WHERE id = 2",
        "DELETE FROM t WHERE id = 2",
        "WITH gone AS (DELETE FROM t WHERE id = 3 RETURNING 1) SELECT * FROM gone",
        "SELECT * FROM t FOR UPDATE",
        "SELECT * FROM t FOR SHARE",
        "SELECT nextval('s')",
        "SELECT last_value FROM s",
        "SELECT writes()",
        "SELECT dynamic()",
        "SELECT pg_try_advisory_xact_lock(1)",
        "SELECT pg_is_in_recovery()",
        "SELECT count(*) FROM pg_stat_activity",
        "SELECT txid_current()",
        "SELECT x INTO t2 FROM t",
        "CREATE TABLE t3 AS SELECT 1",
        "EXPLAIN ANALYZE INSERT INTO t VALUES (4, 0)",
        "SELECT 1; INSERT INTO t VALUES (5, 0)",
        "DO $$ BEGIN PERFORM 1; END $$",
        "LOCK TABLE t IN ACCESS SHARE MODE; SELECT 1",
        "TRUNCATE t3",
        "VACUUM t",
        "SHOW transaction_read_only",
        "SELECT 'unterminated /* comment */; SELECT ' || lo_create(0)",
    ];
    for (number, statement) in statements.iter().enumerate() {
        let marked = format!("/* marker{number}. */ {statement}");
        // An error would be the same on one server; what counts is where it ran.
        let _ = client.simple_query(&marked).await;
        let ran = cluster.ran(&format!("marker{number}."));
        assert!(ran[0] >= 1 && ran[1] + ran[2] == 0, "{statement}: {ran:?}");
    }
}

#[tokio::test]
async fn a_replica_that_refuses_a_statement_is_not_the_clients_concern() {
    // Hidden behind an operator: nothing in the text says that it writes.
    let (cluster, proxy) = three_nodes().await;
    cluster
        .set_up(
            "CREATE FUNCTION count_up(int, int) RETURNS int LANGUAGE sql AS
                 'UPDATE t SET x = x + 1 WHERE id = $1 RETURNING x';
             CREATE OPERATOR @#@ (LEFTARG = int, RIGHTARG = int, FUNCTION = count_up)",
        )
        .await;
    let client = proxy.connect().await;
    for expected in 1..=5 {
        let row = client.query_one("SELECT 1 @#@ 1", &[]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), expected);
    }
    assert_eq!(cluster.primary().query_text("SELECT x FROM t").await.unwrap(), "5");
}

#[tokio::test]
async fn with_split_off_everything_runs_on_the_primary() {
    let cluster = Cluster::start_logging(1).await;
    let options = ProxyOptions { overrides: "routing: { split: false }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let client = proxy.connect().await;
    for _ in 0..20 {
        client.simple_query("SELECT 1 AS marker").await.unwrap();
    }
    assert_eq!(cluster.ran("marker"), [20, 0]);
}

#[tokio::test]
async fn a_transaction_stays_on_one_server() {
    let (cluster, proxy) = three_nodes().await;
    let mut client = proxy.connect().await;
    let transaction = client.transaction().await.unwrap();
    let x: i32 = transaction.query_one("SELECT x AS marker FROM t WHERE id = 1", &[]).await.unwrap().get(0);
    transaction.execute("UPDATE t SET x = $1 /* marker */ WHERE id = 1", &[&(x + 1)]).await.unwrap();
    let seen: i32 =
        transaction.query_one("SELECT x AS marker FROM t WHERE id = 1", &[]).await.unwrap().get(0);
    assert_eq!(seen, x + 1);
    transaction.rollback().await.unwrap();
    let seen: i32 = client.query_one("SELECT x FROM t WHERE id = 1", &[]).await.unwrap().get(0);
    assert_eq!(seen, x);
    assert_eq!(cluster.ran("marker"), [3, 0, 0]);
}

#[tokio::test]
async fn what_leaves_state_on_a_server_keeps_its_session_there_and_reaches_nobody_else() {
    let (_cluster, proxy) = three_nodes().await;
    // (makes the state, shows it, what the owner must see)
    let cases = [
        ("SET work_mem = '7MB'", "SHOW work_mem", "7MB"),
        (
            "SELECT set_config('highwater_test.x', 'mine', false)",
            "SELECT current_setting('highwater_test.x', true)",
            "mine",
        ),
        ("CREATE TEMP TABLE t AS SELECT 42 AS x", "SELECT x FROM t", "42"),
        ("PREPARE p AS SELECT 5", "EXECUTE p", "5"),
        ("SELECT pg_advisory_lock(77)", "SELECT pg_advisory_unlock(77)", "t"),
        ("BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT 6; COMMIT", "FETCH c", "6"),
        ("SET ROLE pg_monitor", "SELECT current_user", "pg_monitor"),
    ];
    for (make, show, expected) in cases {
        let first_value = |messages: &[Message]| {
            messages.iter().find(|message| message.tag == b'D').and_then(|row| row.columns()[0].clone())
        };
        // The backends in the pool: as many others as there can be, before and after.
        let mut owner = proxy.raw_login().await;
        if make.starts_with("SET ROLE") {
            // Only a member may.
            _cluster.primary().execute("GRANT pg_monitor TO app").await.unwrap();
        }
        let made = owner.ask(&query(make)).await;
        assert!(!tags(&made).contains('E'), "{make}: {made:?}");
        for _ in 0..5 {
            let mut other = proxy.raw_login().await;
            let shown = other.ask(&query(show)).await;
            assert_ne!(first_value(&shown).as_deref(), Some(expected), "another session sees: {make}");
        }
        let shown = owner.ask(&query(show)).await;
        assert_eq!(first_value(&shown).as_deref(), Some(expected), "{make}: {shown:?}");
        owner.try_send(&message(b'X', b"")).await.unwrap();
        owner.read_to_end().await;
        for _ in 0..5 {
            let mut other = proxy.raw_login().await;
            let shown = other.ask(&query(show)).await;
            assert_ne!(first_value(&shown).as_deref(), Some(expected), "left behind for the next: {make}");
        }
    }
}

#[tokio::test]
async fn a_listener_hears_what_another_session_notifies() {
    let (_cluster, proxy) = three_nodes().await;
    let mut listener = proxy.raw_login().await;
    assert_eq!(tags(&listener.ask(&query("LISTEN news")).await), "CZ");
    let other = proxy.connect().await;
    other.batch_execute("NOTIFY news, 'hello'").await.unwrap();
    let heard = listener.read().await.unwrap();
    assert_eq!(heard.tag, b'A');
    assert!(heard.body.ends_with(b"news\0hello\0"), "{heard:?}");
    // The sender's process id is one that the proxy gave out, or at least not the listener's own.
    assert_ne!(heard.body[..4], listener.key[..4]);
}

#[tokio::test]
async fn what_only_a_replicas_installation_lacks_is_no_error_of_a_read() {
    let cluster = Cluster::start_logging(1).await;
    // By its bare name, the library is looked for where the server's configuration says.
    cluster
        .set_up_as_superuser(
            "CREATE FUNCTION distance(text, text) RETURNS int AS 'fuzzystrmatch', 'levenshtein' LANGUAGE C IMMUTABLE STRICT; \
             CREATE TABLE words (w text); INSERT INTO words VALUES ('kitten'); GRANT SELECT ON words TO PUBLIC",
        )
        .await;
    cluster.node(1).set("dynamic_library_path", "/nonexistent").await.unwrap();
    let overrides = "routing: { functions: { safe: [public.distance] } }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = proxy.connect().await;
    reads_reach_replicas(&cluster, &client, "SELECT w AS loaded FROM words").await;
    for round in 0..20 {
        let read = client.query_one("SELECT distance(w, 'sitting') FROM words", &[]).await;
        assert_eq!(read.unwrap().get::<_, i32>(0), 3, "{round}");
        client.simple_query("SELECT w AS loaded FROM words").await.unwrap();
    }
    // It went there once, and that is remembered.
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_redone_total", &[("reason", "installation")]), 1.0);
    // At most: where it fails as it is bound, nothing of it is logged.
    assert!(cluster.ran("distance(w")[1] <= 1);
}
