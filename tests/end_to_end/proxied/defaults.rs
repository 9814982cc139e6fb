//! What a server's own configuration gives a session that sets nothing: replicas give what the primary does.

use std::time::Instant;

use crate::fixture::*;

/// What a replica's configuration says: none of it may be seen.
const OF_ITS_OWN: [(&str, &str); 6] = [
    ("timezone", "Asia/Tokyo"),
    ("datestyle", "German, DMY"),
    ("intervalstyle", "sql_standard"),
    ("search_path", "other"),
    ("extra_float_digits", "-5"),
    ("bytea_output", "escape"),
];

/// A row in which each of them shows: under another `search_path`, `t` is another table.
const SHOWN: &str = "('2020-03-01 00:00:00+00'::timestamptz)::text, ('2020-02-01'::date)::text, \
    ('02/03/2020'::date - '2020-01-01'::date)::text, ('1 day 2 hours'::interval)::text, \
    (1.23456789012345::float8)::text, ('\\x61'::bytea)::text, which FROM t";

fn rows(messages: &[Message]) -> Vec<Vec<Option<String>>> {
    messages.iter().filter(|message| message.tag == b'D').map(Message::columns).collect()
}

fn simple(marker: &str) -> Vec<u8> {
    query(&format!("SELECT '{marker}', {SHOWN}"))
}

fn extended(marker: &str) -> Vec<u8> {
    [parse("", &format!("SELECT '{marker}', {SHOWN}")), bind("", &[]), execute(), sync()].concat()
}

/// Asks both ways until the replica has answered three of each; what comes from wherever is what `one_server` says.
async fn answers_as(one_server: &mut RawClient, cluster: &Cluster, client: &mut RawClient, marker: &str) {
    for (way, unit) in [("simple", simple as fn(&str) -> Vec<u8>), ("extended", extended)] {
        let marker = format!("{marker} {way}.");
        let expected = rows(&one_server.ask(&unit(&marker)).await);
        assert_eq!(expected.len(), 1);
        let begun = Instant::now();
        while cluster.ran(&marker)[1] < 3 {
            let answer = client.ask(&unit(&marker)).await;
            assert_eq!(rows(&answer), expected, "{marker} {}", tags(&answer));
            assert!(begun.elapsed() < PATIENCE, "{marker} never ran on the replica");
        }
    }
}

async fn another_replica() -> Cluster {
    let cluster = Cluster::start_logging(1).await;
    cluster
        .set_up_as_superuser(
            "CREATE SCHEMA other; GRANT USAGE ON SCHEMA other TO PUBLIC; \
             CREATE TABLE t (which text); INSERT INTO t VALUES ('public'); \
             CREATE TABLE other.t (which text); INSERT INTO other.t VALUES ('other'); \
             GRANT SELECT ON t, other.t TO PUBLIC",
        )
        .await;
    for (name, value) in OF_ITS_OWN {
        cluster.node(1).set(name, value).await.unwrap();
    }
    cluster
}

async fn directly(cluster: &Cluster, parameters: &[(&str, &str)]) -> RawClient {
    let mut client = RawClient::connect(cluster.node(0).port()).await;
    let app = &cluster.roles().app;
    let all = [&[("user", app.user.as_str()), ("database", "app")], parameters].concat();
    client.login_with(&all, &app.password).await.unwrap();
    client
}

async fn through(proxy: &Proxy, parameters: &[(&str, &str)]) -> RawClient {
    let mut client = proxy.raw().await;
    let app = proxy.app();
    let all = [&[("user", app.user.as_str()), ("database", "app")], parameters].concat();
    client.login_with(&all, &app.password).await.unwrap();
    client
}

#[tokio::test]
async fn a_replica_answers_by_the_primarys_configuration_and_not_by_its_own() {
    let cluster = another_replica().await;
    let proxy = Proxy::start(&cluster).await;
    let mut one_server = directly(&cluster, &[]).await;
    let mut client = through(&proxy, &[]).await;
    answers_as(&mut one_server, &cluster, &mut client, "fresh").await;

    for reset in ["RESET ALL", "DISCARD ALL", "RESET timezone; RESET search_path; RESET datestyle"] {
        for sql in ["SET timezone = 'Europe/Paris'; SET datestyle = 'SQL'; SET search_path = other", reset] {
            for server in [&mut one_server, &mut client] {
                for statement in sql.split("; ") {
                    assert_eq!(
                        tags(&server.ask(&query(statement)).await).replace('S', ""),
                        "CZ",
                        "{statement}"
                    );
                }
            }
            answers_as(&mut one_server, &cluster, &mut client, &format!("after {sql}").replace('\'', ""))
                .await;
        }
    }

    // What the client brings goes before, in `options`, too; and what roles and databases have.
    let own = [("options", "-c datestyle=SQL,DMY -c search_path=other"), ("timezone", "Europe/Paris")];
    let (mut one_server, mut client) = (directly(&cluster, &own).await, through(&proxy, &own).await);
    answers_as(&mut one_server, &cluster, &mut client, "brought").await;
    let app = &cluster.roles().app.user;
    cluster.set_up_as_superuser(&format!("ALTER ROLE {app} SET intervalstyle = 'iso_8601'")).await;
    eventually("logins have what the role was given", || async {
        let mut client = through(&proxy, &[]).await;
        let interval = client.ask(&query("SELECT ('1 day 2 hours'::interval)::text FROM t")).await;
        rows(&interval) == [[Some("P1DT2H".to_owned())]]
    })
    .await;
    let (mut one_server, mut client) = (directly(&cluster, &[]).await, through(&proxy, &[]).await);
    answers_as(&mut one_server, &cluster, &mut client, "of the role").await;

    // A reload of the replica changes nothing.
    cluster.node(1).set("timezone", "Asia/Kathmandu").await.unwrap();
    cluster.node(1).set("xmlbinary", "hex").await.unwrap();
    answers_as(&mut one_server, &cluster, &mut client, "reloaded").await;
}

#[tokio::test]
async fn what_the_primarys_configuration_gives_from_now_on_replicas_give_soon() {
    let cluster = another_replica().await;
    let proxy = Proxy::start(&cluster).await;
    let mut one_server = directly(&cluster, &[]).await;
    let mut client = through(&proxy, &[]).await;
    answers_as(&mut one_server, &cluster, &mut client, "before").await;
    cluster.node(0).set("timezone", "America/New_York").await.unwrap();
    cluster.node(0).execute("ALTER SYSTEM SET search_path TO other, public").await.unwrap();
    cluster.node(0).set("extra_float_digits", "-3").await.unwrap();
    let expected = rows(&one_server.ask(&simple("after")).await);
    let mut in_turn = 0;
    let begun = Instant::now();
    while in_turn < 5 {
        assert!(begun.elapsed() < PATIENCE, "the replica never gives what the primary does by now");
        let before = cluster.ran("'after'")[1];
        let same = rows(&client.ask(&simple("after")).await) == expected;
        if cluster.ran("'after'")[1] > before {
            in_turn = if same { in_turn + 1 } else { 0 };
        }
    }
    let (mut one_server, mut newcomer) = (directly(&cluster, &[]).await, through(&proxy, &[]).await);
    answers_as(&mut one_server, &cluster, &mut newcomer, "since").await;
    answers_as(&mut one_server, &cluster, &mut client, "at last").await;
}

#[tokio::test]
async fn a_replica_that_cannot_have_what_the_primary_gives_serves_no_reads() {
    let cluster = another_replica().await;
    // Which a configuration file may name where it is not known; a startup packet may not.
    let postgres = cluster.node(0).admin().await.unwrap();
    postgres
        .batch_execute("CREATE TEXT SEARCH CONFIGURATION public.elsewhere (COPY = simple)")
        .await
        .unwrap();
    cluster.node(0).set("default_text_search_config", "public.elsewhere").await.unwrap();
    let proxy = Proxy::start(&cluster).await;
    let mut one_server = directly(&cluster, &[]).await;
    let mut client = through(&proxy, &[]).await;
    let expected = rows(&one_server.ask(&simple("kept")).await);
    let begun = Instant::now();
    while !proxy.log().contains("a replica refuses a setting that the primary's configuration gives") {
        assert_eq!(rows(&client.ask(&simple("kept")).await), expected);
        assert!(begun.elapsed() < PATIENCE, "the replica has never refused a login");
    }
    for _ in 0..20 {
        assert_eq!(rows(&client.ask(&simple("kept")).await), expected);
    }
    assert_eq!(cluster.ran("'kept'")[1], 0);
    // It is asked again, not with every read.
    cluster.node(0).set("default_text_search_config", "pg_catalog.simple").await.unwrap();
    answers_as(&mut one_server, &cluster, &mut client, "mended").await;
}
