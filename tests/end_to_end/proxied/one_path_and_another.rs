//! What one way of using a backend leaves on it, every other way knows of: settings, names, pins, cancels and what
//! Highwater itself puts ahead of a statement, in combinations.

use crate::fixture::*;

const ONE_BACKEND: &str = "pool: { size: 1 }";

async fn start(replicas: usize, overrides: &str) -> (Cluster, Proxy) {
    let cluster = Cluster::start(replicas).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    (cluster, proxy)
}

fn code(messages: &[Message]) -> Option<String> {
    messages.iter().find(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
}

async fn cell(client: &mut RawClient, sql: &str) -> Option<String> {
    let answer = client.ask(&query(sql)).await;
    let row = answer.iter().find(|message| message.tag == b'D');
    row.unwrap_or_else(|| panic!("{sql}: {answer:?}")).columns()[0].clone()
}

async fn succeed(client: &mut RawClient, sql: &str) {
    let answer = client.ask(&query(sql)).await;
    assert_eq!(code(&answer), None, "{sql}: {answer:?}");
}

/// Until the catalog facts have been read, there are no reads, and no statement counts as up to date.
async fn reads_are_known(proxy: &Proxy) {
    eventually("a read runs on the replica", || async {
        let mut client = proxy.raw_login().await;
        cell(&mut client, "SELECT count(*) FROM t").await;
        proxy.metrics().await.sum("highwater_statements_total", &[("node", "b")]) > 0.0
    })
    .await;
}

#[tokio::test]
async fn a_discard_all_that_is_bound_and_never_executed_has_discarded_nothing() {
    let (_cluster, proxy) = start(0, ONE_BACKEND).await;
    let (mut one, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    let bound = [parse("", "DISCARD ALL"), bind("", &[]), sync()].concat();
    succeed(&mut one, "SET app.tenant = 'one'; SET work_mem = '7MB'").await;
    assert_eq!(tags(&one.ask(&bound).await), "12Z");
    assert_eq!(cell(&mut other, "SHOW work_mem").await.as_deref(), Some("4MB"));
    assert_ne!(cell(&mut other, "SELECT current_setting('app.tenant', true)").await.as_deref(), Some("one"));
    assert_eq!(cell(&mut one, "SHOW work_mem").await.as_deref(), Some("7MB"));
    // What keeps its backend keeps it.
    succeed(&mut one, "CREATE TEMP TABLE mine AS SELECT 42 AS x").await;
    assert_eq!(tags(&one.ask(&bound).await), "12Z");
    assert_eq!(proxy.metrics().await.sum("highwater_pinned_sessions", &[]), 1.0);
    assert_eq!(cell(&mut one, "SELECT x FROM mine").await.as_deref(), Some("42"));
    // And once it is executed, all is gone.
    assert_eq!(tags(&one.ask(&[&bound[..bound.len() - 5], &execute(), &sync()].concat()).await), "12CZ");
    assert_eq!(cell(&mut other, "SELECT to_regclass('mine')").await, None);
    assert_eq!(cell(&mut one, "SHOW work_mem").await.as_deref(), Some("4MB"));
}

#[tokio::test]
async fn a_name_that_hidden_sql_has_taken_stands_for_the_newer_statement_on_every_backend() {
    let (_cluster, proxy) = start(1, ONE_BACKEND).await;
    let on_replica = async || proxy.metrics().await.sum("highwater_statements_total", &[("node", "b")]);
    reads_are_known(&proxy).await;
    let mut client = proxy.raw_login().await;
    for word in ["older", "newer"] {
        succeed(&mut client, &format!("PREPARE p AS SELECT '{word}', count(*) FROM t")).await;
        let before = on_replica().await;
        let deadline = std::time::Instant::now() + PATIENCE;
        while on_replica().await == before {
            assert!(std::time::Instant::now() < deadline, "no EXECUTE runs on the replica");
            assert_eq!(cell(&mut client, "EXECUTE p").await.as_deref(), Some(word));
        }
        succeed(&mut client, "DO $$ BEGIN EXECUTE 'DEALLOCATE p'; END $$").await;
        assert_eq!(code(&client.ask(&query("EXECUTE p")).await).as_deref(), Some("26000"));
    }
}

#[tokio::test]
async fn in_a_failed_transaction_nothing_but_its_end_is_prepared() {
    let (_cluster, proxy) = start(1, ONE_BACKEND).await;
    reads_are_known(&proxy).await;
    let mut client = proxy.raw_login().await;
    for sql in ["DELETE FROM t", "ROLLBACK", ""] {
        assert_eq!(
            tags(&client.ask(&[parse("known", sql), close_statement("known"), sync()].concat()).await),
            "13Z"
        );
    }
    assert_eq!(tags(&client.ask(&query("BEGIN; SELECT 1/0")).await), "CEZ");
    for (sql, expected) in
        [("DELETE FROM t", Some("25P02")), ("SELECT 2", Some("25P02")), ("ROLLBACK", None), ("", None)]
    {
        let answer = client.ask(&[parse("s", sql), close_statement("s"), sync()].concat()).await;
        assert_eq!(code(&answer).as_deref(), expected, "{sql}: {answer:?}");
        assert_eq!(answer.last().unwrap().body, b"E", "{sql}");
    }
    succeed(&mut client, "ROLLBACK").await;
    // What was refused there is prepared here.
    assert_eq!(
        tags(&client.ask(&[parse("s", "DELETE FROM t"), bind("s", &[]), execute(), sync()].concat()).await),
        "12CZ"
    );
}

/// The text of an EXECUTE does not say what is set.
#[tokio::test]
async fn what_sql_executes_of_the_protocols_statements_sets_for_its_own_session_alone() {
    let (_cluster, proxy) = start(0, ONE_BACKEND).await;
    let (mut one, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    let tenant = "SELECT coalesce(current_setting('app.tenant', true), '') || current_setting('role')";
    for (sql, arguments, expected) in [
        ("SET app.tenant = 'one'", "", "onenone"),
        ("SELECT set_config('app.tenant', 'one', false)", "", "onenone"),
        ("SELECT set_config($1, 'one', false)", "('app.tenant')", "onenone"),
        ("SELECT $1::text", "(set_config('app.tenant', 'one', false))", "onenone"),
        ("SET ROLE app", "", "app"),
    ] {
        assert_eq!(tags(&one.ask(&[parse("sets", sql), sync()].concat()).await), "1Z", "{sql}");
        succeed(&mut one, &format!("EXECUTE sets{arguments}")).await;
        assert_eq!(cell(&mut one, tenant).await.as_deref(), Some(expected), "{sql}");
        succeed(&mut one, "INSERT INTO t VALUES (1)").await;
        assert_eq!(cell(&mut one, tenant).await.as_deref(), Some(expected), "{sql}");
        succeed(&mut one, "DISCARD ALL").await;
        assert_eq!(cell(&mut other, tenant).await.as_deref(), Some("none"), "{sql}");
        assert_eq!(cell(&mut one, tenant).await.as_deref(), Some("none"), "{sql}");
    }
}

/// Names that are taken are so too for what is parsed where the transaction has failed: nothing at all, or what ends it. And
/// behind its end in the same pipeline there is no failed transaction any more.
#[tokio::test]
async fn what_a_pipeline_has_behind_the_end_of_a_failed_transaction_is_as_outside_one() {
    let table = "CREATE TABLE t (x int)";
    let (_cluster, proxy, direct) = super::protocol::beside("{ pool: { size: 1 } }", table).await;
    let run = |sql: &str| [parse("", sql), bind("", &[]), execute()].concat();
    let named = [bind("by_sql", &[]), execute(), bind("named", &[]), execute(), sync()].concat();
    for last in [
        [parse("named", ""), sync()].concat(),
        [parse("named", "-- nothing"), sync()].concat(),
        [parse("by_sql", "ROLLBACK"), sync()].concat(),
        [parse("named", "SELECT 2"), sync()].concat(),
        [run("ROLLBACK"), parse("named", "SELECT 2"), sync()].concat(),
        [run("COMMIT AND CHAIN"), parse("by_sql", ""), sync()].concat(),
        [run("ROLLBACK TO a"), named.clone()].concat(),
        [run("COMMIT"), named.clone()].concat(),
        [run(""), named].concat(),
    ] {
        let (mut proxied, mut one_server) = (proxy.raw_login().await, direct.raw_login().await);
        let prepared = [parse("named", "INSERT INTO t VALUES (1)"), sync()].concat();
        for (number, unit) in
            [query("PREPARE by_sql AS SELECT 7"), prepared, query("BEGIN; SAVEPOINT a; SELECT 1/0"), last]
                .iter()
                .enumerate()
        {
            if number == 2 {
                // The only server process is given names that are none of the session's.
                let mut other = proxy.raw_login().await;
                assert_eq!(tags(&other.ask(&query("PREPARE of_another AS SELECT 1")).await), "CZ");
            }
            let expected = super::protocol::answers("one server", &mut one_server, unit).await;
            let got = super::protocol::answers("the proxy", &mut proxied, unit).await;
            assert_eq!(got, expected, "unit {number}: {}", unit.escape_ascii());
        }
    }
}

/// Of an EXECUTE that failed the backend does not keep the name, and in a failed transaction it cannot be given one.
#[tokio::test]
async fn a_failed_execute_is_refused_when_it_is_bound_in_a_failed_transaction() {
    let (_cluster, proxy) = start(0, ONE_BACKEND).await;
    let mut client = proxy.raw_login().await;
    let run = [parse("s", "EXECUTE missing(5)"), bind("s", &[]), execute(), sync()].concat();
    assert_eq!(code(&client.ask(&run).await).as_deref(), Some("26000"));
    assert_eq!(tags(&client.ask(&query("BEGIN; SELECT 1/0")).await), "CEZ");
    let again = [bind("s", &[]), execute(), sync()].concat();
    let answer = tokio::time::timeout(PATIENCE, client.ask(&again)).await.expect("an answer");
    assert_eq!(code(&answer).as_deref(), Some("25P02"), "{answer:?}");
    assert_eq!(answer.last().unwrap().body, b"E");
    succeed(&mut client, "ROLLBACK").await;
    assert_eq!(code(&client.ask(&again).await).as_deref(), Some("26000"));
}

fn close_statement(name: &str) -> Vec<u8> {
    message(b'C', &[b"S", name.as_bytes(), b"\0"].concat())
}

/// The statement waits behind what gives its backend the session's settings, and that for a lock.
#[tokio::test]
async fn a_cancel_while_settings_are_given_stops_the_statement_and_costs_no_backend() {
    for sql in
        ["INSERT INTO t SELECT 1 FROM pg_sleep(3600)", "INSERT INTO t SELECT 1 FROM pg_sleep(3600); COMMIT"]
    {
        let (cluster, proxy) = start(0, "pool: { size: 2 }").await;
        let (mut client, mut holder) = (proxy.raw_login().await, proxy.raw_login().await);
        succeed(&mut client, "SET default_text_search_config = 'pg_catalog.simple'").await;
        // The backend on which that was set is taken; another has to look the configuration up.
        succeed(&mut holder, "BEGIN; INSERT INTO t VALUES (0)").await;
        let superuser = cluster.primary().connect("app", &cluster.roles().superuser).await.unwrap();
        let lock = "BEGIN; LOCK TABLE pg_catalog.pg_ts_config IN ACCESS EXCLUSIVE MODE";
        superuser.batch_execute(lock).await.unwrap();
        client.send(&query(sql)).await;
        eventually("its settings wait for the lock", || async {
            let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
                           AND query LIKE 'BEGIN; %default_text_search_config%'";
            cluster.primary().query_text(waiting).await.unwrap() == "1"
        })
        .await;
        client.cancel().await;
        eventually("the session knows of the cancel", || async {
            let metrics = proxy.metrics().await;
            metrics.sum("highwater_cancels_total", &[("outcome", "while_waiting")]) == 1.0
        })
        .await;
        superuser.batch_execute("COMMIT").await.unwrap();
        assert_eq!(code(&client.read_ready().await).as_deref(), Some("57014"), "{sql}");
        let closed = |metrics: &Metrics| metrics.sum("highwater_backends_closed_total", &[]);
        assert_eq!(closed(&proxy.metrics().await), 0.0, "{sql}");
        assert_eq!(cell(&mut client, "SELECT count(*) FROM t").await.as_deref(), Some("0"), "{sql}");
        assert_eq!(
            cell(&mut client, "SHOW default_text_search_config").await.as_deref(),
            Some("pg_catalog.simple")
        );
        succeed(&mut holder, "COMMIT").await;
    }
}

#[tokio::test]
async fn what_was_shown_of_a_session_in_its_transaction_no_other_session_sees() {
    let (_cluster, proxy) = start(0, ONE_BACKEND).await;
    let (mut one, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    succeed(&mut one, "SET highwater.session = 'one'").await;
    for sql in ["BEGIN", "SHOW highwater.session", "SET app.x = '1'", "COMMIT"] {
        succeed(&mut one, sql).await;
    }
    let hidden = "SELECT current_setting('high' || 'water.session', true)";
    assert_ne!(cell(&mut other, hidden).await.as_deref(), Some("one"));
    // It is no query: the transaction may still be given its isolation level.
    for sql in ["BEGIN", "SHOW highwater.session", "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "COMMIT"] {
        succeed(&mut one, sql).await;
    }
}

/// What a session has set is read back from its backend, which does not answer in time.
#[tokio::test]
async fn an_answer_to_highwater_that_comes_too_late_is_not_the_next_sessions() {
    let (cluster, proxy) = start(0, ONE_BACKEND).await;
    let (mut client, mut next) = (proxy.raw_login().await, proxy.raw_login().await);
    // Nothing has to be given to the backend between them.
    for client in [&mut client, &mut next] {
        succeed(client, "SET app.x = '1'").await;
    }
    let superuser = cluster.primary().connect("app", &cluster.roles().superuser).await.unwrap();
    // It looks functions up, anew when they have been altered.
    superuser.batch_execute("ALTER FUNCTION pg_catalog.current_setting(text, boolean) COST 1").await.unwrap();
    superuser.batch_execute("BEGIN; LOCK TABLE pg_catalog.pg_proc IN ACCESS EXCLUSIVE MODE").await.unwrap();
    assert_eq!(tags(&client.ask(&query("SET app.x = $$not yours$$")).await), "CZ");
    let end = client.read_to_end().await;
    assert_eq!(code(&end).as_deref(), Some("57P01"), "{end:?}");
    next.send(&query("SELECT 'mine'")).await;
    superuser.batch_execute("COMMIT").await.unwrap();
    let answer = next.read_ready().await;
    assert_eq!(tags(&answer), "TDCZ", "{answer:?}");
    assert_eq!(answer[1].columns(), [Some("mine".to_owned())]);
}

#[tokio::test]
async fn a_changed_statement_fails_once_and_for_all_under_other_settings_too() {
    let (_cluster, proxy) = start(1, ONE_BACKEND).await;
    reads_are_known(&proxy).await;
    let mut client = proxy.raw_login().await;
    let prepared = [parse("s", "SELECT * FROM t"), describe(b'S', "s"), sync()].concat();
    assert_eq!(tags(&client.ask(&prepared).await), "1tTZ");
    // A backend that lacks it parses it under other settings from now on.
    succeed(&mut client, "SET TimeZone TO 'Asia/Tokyo'").await;
    succeed(&mut client, "ALTER TABLE t ADD COLUMN y int").await;
    let run = [bind("s", &[]), describe(b'P', ""), execute(), sync()].concat();
    for (before, after) in [("SELECT 1", "SELECT 1"), ("BEGIN", "ROLLBACK"), ("SELECT 1", "SELECT 1")] {
        succeed(&mut client, before).await;
        let answer = tokio::time::timeout(PATIENCE, client.ask(&run)).await.expect("it is answered");
        assert_eq!(code(&answer).as_deref(), Some("0A000"), "{answer:?}");
        succeed(&mut client, after).await;
    }
}

/// SQL's statements go along to another server process, all of them, when one is explained there: one whose table has
/// other columns by now must not take the session with it. As PostgreSQL's `rowsecurity` test does it.
#[tokio::test]
async fn statements_of_sqls_that_are_out_of_date_harm_nobody_else() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t1 (a int, b text); CREATE TABLE t2 (a int)").await;
    let proxy = Proxy::start_with(
        &cluster,
        ProxyOptions { overrides: "pool: { size: 2 }", ..ProxyOptions::default() },
    )
    .await;
    let (client, other) = (proxy.connect().await, proxy.connect().await);
    for sql in [
        "PREPARE p1(int) AS SELECT * FROM t1 WHERE a <= $1",
        "EXECUTE p1(2)",
        "DROP TABLE t1",
        "CREATE TABLE t1 (a int)",
        "PREPARE p2 AS SELECT * FROM t2",
    ] {
        client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    // The process that has them is busy with another's transaction.
    other.simple_query("BEGIN").await.unwrap();
    for sql in ["EXPLAIN (COSTS OFF) EXECUTE p2", "EXECUTE p2"] {
        client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    other.simple_query("ROLLBACK").await.unwrap();
}
