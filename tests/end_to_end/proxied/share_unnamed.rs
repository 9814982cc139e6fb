//! `pool.share_unnamed`: unnamed statements of a text seen before are prepared once for all sessions, and no client can
//! tell. (Random sequences against one server: `protocol`.)

use crate::fixture::*;

const OUTCOMES: &str = "highwater_unnamed_parses_total";

async fn start(replicas: usize, overrides: &str) -> (Cluster, Proxy) {
    let cluster = Cluster::start(replicas).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1), (2)").await;
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    (cluster, proxy)
}

/// As a driver's call with parameters: prepared without a name, described, run.
fn unit(sql: &str, parameters: &[&str]) -> Vec<u8> {
    [parse("", sql), bind("", parameters), describe(b'P', ""), execute(), sync()].concat()
}

fn code(messages: &[Message]) -> Option<String> {
    messages.iter().find(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
}

/// The first row.
fn row(messages: &[Message]) -> Vec<Option<String>> {
    messages.iter().find(|message| message.tag == b'D').map(Message::columns).unwrap_or_default()
}

/// How many Parses were served by what a backend had.
async fn shared(proxy: &Proxy) -> f64 {
    proxy.metrics().await.sum(OUTCOMES, &[("outcome", "shared")])
}

/// Until the catalog facts are there no statement is shown to be a read.
async fn warm(proxy: &Proxy, client: &mut RawClient, sql: &str, parameters: &[&str]) {
    let before = shared(proxy).await;
    let (client, proxy) = (tokio::sync::Mutex::new(client), &proxy);
    eventually("the statement is shared", || async {
        client.lock().await.ask(&unit(sql, parameters)).await;
        shared(proxy).await >= before + 2.0
    })
    .await;
}

#[tokio::test]
async fn a_text_seen_before_is_parsed_once_for_all_sessions_of_a_backend() {
    let (_cluster, proxy) = start(0, "pool: { size: 1, share_unnamed: true }").await;
    let sql = "SELECT x + $1 FROM t ORDER BY x";
    let mut one = proxy.raw_login().await;
    warm(&proxy, &mut one, sql, &["1"]).await;
    let before = proxy.metrics().await;
    let mut other = proxy.raw_login().await;
    for n in 0..10 {
        let client = if n % 2 == 0 { &mut one } else { &mut other };
        let answer = client.ask(&unit(sql, &[&n.to_string()])).await;
        assert_eq!(tags(&answer), "12TDDCZ");
        assert_eq!(row(&answer), [Some((n + 1).to_string())]);
    }
    // The statement itself is described as one server would.
    let described = one.ask(&[parse("", sql), describe(b'S', ""), sync()].concat()).await;
    assert_eq!(tags(&described), "1tTZ");
    let metrics = proxy.metrics().await;
    let grown = |outcome| {
        metrics.sum(OUTCOMES, &[("outcome", outcome)]) - before.sum(OUTCOMES, &[("outcome", outcome)])
    };
    // The catalog facts may have been read anew meanwhile: then what was parsed before is parsed again, once.
    let (all, prepared) = (grown("shared") + grown("prepared"), grown("prepared"));
    assert_eq!((all, grown("passed")), (11.0, 0.0));
    assert!(prepared <= 2.0, "{prepared} of {all} were parsed");
    // Texts that come once do not take the place of others.
    for n in 0..20 {
        one.ask(&unit(&format!("SELECT {n}"), &[])).await;
    }
    let metrics = proxy.metrics().await;
    let all = |outcome| metrics.sum(OUTCOMES, &[("outcome", outcome)]);
    assert_eq!(all("passed") - before.sum(OUTCOMES, &[("outcome", "passed")]), 20.0);
}

#[tokio::test]
async fn unnamed_statements_are_the_clients_alone_unless_sharing_is_asked_for() {
    let (_cluster, proxy) = start(0, "pool: { size: 1 }").await;
    let mut client = proxy.raw_login().await;
    for _ in 0..20 {
        assert_eq!(tags(&client.ask(&unit("SELECT x FROM t WHERE x = $1", &["1"])).await), "12TDCZ");
    }
    assert_eq!(proxy.metrics().await.sum(OUTCOMES, &[]), 0.0);
}

#[tokio::test]
async fn data_definition_past_the_proxy_is_never_met_by_an_older_statement() {
    for (replicas, overrides) in [
        (0, "pool: { size: 1, share_unnamed: true }"),
        (0, "{ pool: { size: 3, share_unnamed: true }, routing: { split: false } }"),
        (1, "pool: { size: 2, share_unnamed: true }"),
    ] {
        let (cluster, proxy) = start(replicas, overrides).await;
        let mut client = proxy.raw_login().await;
        let (all, one) = ("SELECT * FROM t WHERE x = 1", "SELECT x FROM t WHERE x = $1");
        warm(&proxy, &mut client, all, &[]).await;
        warm(&proxy, &mut client, one, &["1"]).await;
        let primary = cluster.primary().connect("app", &cluster.roles().superuser).await.unwrap();
        for number in 1..4 {
            // At once, so that the proxy's catalog facts are of before.
            primary.batch_execute(&format!("ALTER TABLE t ADD COLUMN c{number} int")).await.unwrap();
            cluster.wait_caught_up(0).await.unwrap();
            let answer = client.ask(&unit(all, &[])).await;
            assert_eq!((tags(&answer).as_str(), row(&answer).len()), ("12TDCZ", number + 1), "{overrides}");
            client.ask(&unit(all, &[])).await;
        }
        // The parameter has another type by now, and this value is none of the old one.
        primary.batch_execute("ALTER TABLE t ALTER x TYPE text").await.unwrap();
        cluster.wait_caught_up(0).await.unwrap();
        let answer = client.ask(&unit(one, &["abc"])).await;
        assert_eq!(tags(&answer), "12TCZ", "{overrides}: {answer:?}");
        primary.batch_execute("DROP TABLE t").await.unwrap();
        cluster.wait_caught_up(0).await.unwrap();
        let answer = client.ask(&unit(one, &["abc"])).await;
        // At Parse, as by one server.
        assert_eq!((tags(&answer).as_str(), code(&answer).as_deref()), ("EZ", Some("42P01")), "{overrides}");
    }
}

#[tokio::test]
async fn a_shared_unnamed_statement_ends_when_one_servers_would() {
    let (_cluster, proxy) = start(0, "pool: { size: 1, share_unnamed: true }").await;
    let mut client = proxy.raw_login().await;
    let sql = "SELECT x FROM t ORDER BY x LIMIT 1";
    warm(&proxy, &mut client, sql, &[]).await;
    let run = || [bind("", &[]), execute(), sync()].concat();
    let gone = |answer: &[Message]| {
        let said = answer.first().and_then(|error| error.field(b'M'));
        assert_eq!((tags(answer).as_str(), code(answer).as_deref()), ("EZ", Some("26000")), "{answer:?}");
        assert_eq!(said.as_deref(), Some("unnamed prepared statement does not exist"));
    };
    // It outlives its unit, and what takes the named ones.
    client.ask(&[parse("", sql), sync()].concat()).await;
    for sql in ["DEALLOCATE ALL", "DISCARD ALL"] {
        let deallocate = [parse("d", sql), message(b'B', b"\0d\0\0\0\0\0\0\0"), execute(), sync()].concat();
        client.ask(&deallocate).await;
        assert_eq!(tags(&client.ask(&run()).await), "2DCZ", "after {sql}");
    }
    // A simple Query ends it.
    client.ask(&[parse("", sql), sync()].concat()).await;
    client.ask(&query("SELECT 1")).await;
    gone(&client.ask(&run()).await);
    // So does a Close, and the next Parse, even one that fails, and has failed before.
    client.ask(&[parse("", sql), sync()].concat()).await;
    assert_eq!(tags(&client.ask(&[message(b'C', b"S\0"), sync()].concat()).await), "3Z");
    gone(&client.ask(&run()).await);
    for _ in 0..3 {
        client.ask(&[parse("", sql), sync()].concat()).await;
        let failed = client.ask(&[parse("", "SELECT nothing FROM t"), sync()].concat()).await;
        assert_eq!(code(&failed).as_deref(), Some("42703"));
        gone(&client.ask(&run()).await);
    }
    // In a transaction, where nothing can be run again, the client's own is used.
    client.ask(&query("BEGIN")).await;
    assert_eq!(tags(&client.ask(&unit(sql, &[])).await), "12TDCZ");
    client.ask(&query("SELECT 1/0")).await;
    let failed = client.ask(&unit(sql, &[])).await;
    assert_eq!(code(&failed).as_deref(), Some("25P02"));
    client.ask(&query("ROLLBACK")).await;
}

#[tokio::test]
async fn one_text_under_two_search_paths_means_two_things() {
    let (cluster, proxy) = start(1, "pool: { size: 1, share_unnamed: true }").await;
    let schemas = "CREATE SCHEMA a; CREATE TABLE a.t AS SELECT 'a' AS x; CREATE SCHEMA b; CREATE TABLE b.t AS SELECT 'b' AS x; \
                   GRANT USAGE ON SCHEMA a, b TO PUBLIC; GRANT SELECT ON a.t, b.t TO PUBLIC";
    let primary = cluster.primary().connect("app", &cluster.roles().superuser).await.unwrap();
    primary.batch_execute(schemas).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    let (mut a, mut b) = (proxy.raw_login().await, proxy.raw_login().await);
    a.ask(&query("SET search_path = a")).await;
    b.ask(&query("SET search_path = b")).await;
    let sql = "SELECT x FROM t";
    warm(&proxy, &mut a, sql, &[]).await;
    for _ in 0..10 {
        assert_eq!(row(&a.ask(&unit(sql, &[])).await), [Some("a".to_owned())]);
        assert_eq!(row(&b.ask(&unit(sql, &[])).await), [Some("b".to_owned())]);
    }
    assert!(shared(&proxy).await >= 10.0);
}
