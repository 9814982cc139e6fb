//! Messages pass as on one server.

use std::time::Duration;

use crate::fixture::*;

#[tokio::test]
async fn a_client_that_leaves_before_sync_has_inserted_nothing() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    // Flush, and the answer is awaited: the row is in the open transaction of the unit.
    client.send(&[parse("", "INSERT INTO t VALUES (1)"), bind("", &[]), execute(), flush()].concat()).await;
    let mut got = Vec::new();
    while got.last().is_none_or(|message: &Message| message.tag != b'C') {
        got.push(client.read().await.unwrap());
    }
    assert_eq!(tags(&got), "12C");
    drop(client);
    let open = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'INSERT INTO t%' AND state <> 'idle'";
    cluster.primary().wait_for(open, "0").await.unwrap();
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), "0");
    // And whoever comes next finds no half-open unit.
    let client = proxy.connect().await;
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    assert_eq!(cluster.primary().query_text("SELECT sum(x) FROM t").await.unwrap(), "2");
}

#[tokio::test]
async fn flush_is_answered_before_sync() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    // asyncpg's way: Parse and Describe, Flush, and only then Bind.
    client.send(&[parse("s", "SELECT $1::int + 1"), describe(b'S', "s"), flush()].concat()).await;
    let mut got = Vec::new();
    while got.last().is_none_or(|message: &Message| message.tag != b'T') {
        got.push(client.read().await.unwrap());
    }
    assert_eq!(tags(&got), "1tT");
    let answer = client.ask(&[bind("s", &["41"]), execute(), sync()].concat()).await;
    assert_eq!(tags(&answer), "2DCZ");
    assert_eq!(answer[1].columns(), [Some("42".to_owned())]);
    // A write that is flushed in the middle of a unit.
    client.send(&[parse("", "SELECT 1"), bind("", &[]), execute(), flush()].concat()).await;
    let mut got = Vec::new();
    while got.last().is_none_or(|message: &Message| message.tag != b'C') {
        got.push(client.read().await.unwrap());
    }
    assert_eq!(tags(&got), "12DC");
    assert_eq!(tags(&client.ask(&sync()).await), "Z");
}

#[tokio::test]
async fn prepared_statements_outlive_the_server_connection_they_were_prepared_on() {
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (id int, x text); INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 100) i").await;
    let options = ProxyOptions { overrides: "pool: { size: 2 }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let mut clients = Vec::new();
    for number in 0..8 {
        let client = proxy.connect().await;
        let sql = format!("SELECT x || ' for {number}' FROM t WHERE id = $1");
        let statement = client.prepare(&sql).await.unwrap();
        clients.push((number, client, statement));
    }
    // More clients than backends, in turns: each finds its own statement wherever it lands.
    let mut tasks = Vec::new();
    for (number, client, statement) in clients {
        tasks.push(tokio::spawn(async move {
            for id in 1..=50 {
                let row = client.query_one(&statement, &[&id]).await.unwrap();
                assert_eq!(row.get::<_, String>(0), format!("row {id} for {number}"));
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn errors_and_notices_arrive_as_the_server_sent_them() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let app = &cluster.roles().app;
    let mut direct = RawClient::connect(cluster.primary().port()).await;
    direct.login("app", app).await.unwrap();
    let mut proxied = proxy.raw_login().await;
    for sql in [
        "SELECT 1/0",
        "SELEC 1",
        "SELECT * FROM missing",
        "",
        "SELECT 1; SELECT 2",
        "DO $$ BEGIN RAISE WARNING 'warned' USING DETAIL = 'd', HINT = 'h'; END $$",
        "DO $$ BEGIN RAISE EXCEPTION 'own' USING ERRCODE = '25006'; END $$",
        "BEGIN; SELECT 1/0",
        "SELECT 1",
        "ROLLBACK",
        "COMMIT",
        "SELECT 'x'::int",
        "DROP TABLE IF EXISTS missing",
        "SELECT repeat('x', 100000)",
    ] {
        assert_eq!(proxied.ask(&query(sql)).await, direct.ask(&query(sql)).await, "{sql}");
    }
    // After an error the rest of a unit is skipped, and one ReadyForQuery answers the Sync.
    let unit = [
        parse("", "SELECT 1/0"),
        bind("", &[]),
        execute(),
        parse("", "SELECT 1"),
        bind("", &[]),
        execute(),
        sync(),
    ]
    .concat();
    assert_eq!(proxied.ask(&unit).await, direct.ask(&unit).await);
    let unit = [bind("nobody made this", &[]), execute(), sync()].concat();
    assert_eq!(proxied.ask(&unit).await, direct.ask(&unit).await);
}

#[tokio::test]
async fn driver_start_up_parameters_are_reported_as_by_the_primary() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut direct = RawClient::connect(cluster.primary().port()).await;
    let app = &cluster.roles().app;
    let parameters = [
        ("user", app.user.as_str()),
        ("database", "app"),
        ("application_name", "mine"),
        ("client_encoding", "UTF8"),
    ];
    direct.login_with(&parameters, &app.password).await.unwrap();
    let mut proxied = proxy.raw().await;
    proxied.login_with(&parameters, &app.password).await.unwrap();
    assert_eq!(proxied.parameters, direct.parameters);
    assert_eq!(proxied.parameters["in_hot_standby"], "off");
}

#[tokio::test]
async fn a_unit_of_many_statements_is_answered_in_order() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    let mut bytes = Vec::new();
    for number in 0..500 {
        bytes.extend_from_slice(&parse("", "SELECT $1::text"));
        bytes.extend_from_slice(&bind("", &[&number.to_string()]));
        bytes.extend_from_slice(&execute());
        if number % 50 == 49 {
            bytes.extend_from_slice(&sync());
        }
    }
    client.send(&bytes).await;
    for round in 0..10 {
        let answer = client.read_ready().await;
        let rows: Vec<_> = answer
            .iter()
            .filter(|message| message.tag == b'D')
            .map(|row| row.columns()[0].clone().unwrap())
            .collect();
        let expected: Vec<_> = (round * 50..round * 50 + 50).map(|number| number.to_string()).collect();
        assert_eq!(rows, expected);
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_itself_alone() {
    let cluster = Cluster::start(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut lazy = proxy.raw_login().await;
    lazy.send(&query("SELECT repeat('x', 1000) FROM generate_series(1, 200000)")).await;
    let other = proxy.connect().await;
    for _ in 0..20 {
        tokio::time::timeout(PATIENCE, other.simple_query("SELECT 1")).await.unwrap().unwrap();
    }
    let resident = resident_mib(proxy.pid());
    assert!(resident < 150, "{resident} MiB: the 200 MB result is held in memory");
    let answer = lazy.read_ready().await;
    assert_eq!(answer.iter().filter(|message| message.tag == b'D').count(), 200_000);
}

fn resident_mib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test]
async fn a_client_that_goes_away_gives_its_server_connection_back() {
    let cluster = Cluster::start(0).await;
    let options = ProxyOptions { overrides: "pool: { size: 1 }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    for how in ["terminate", "vanish", "vanish in a transaction", "vanish in a query"] {
        let mut client = proxy.raw_login().await;
        match how {
            "terminate" => {
                client.ask(&query("SELECT 1")).await;
                client.send(&message(b'X', b"")).await;
            }
            "vanish" => drop(client.ask(&query("SELECT 1")).await),
            "vanish in a transaction" => drop(client.ask(&query("BEGIN; SELECT 1")).await),
            _ => client.send(&query("SELECT pg_sleep(3600)")).await,
        }
        drop(client);
        let next = proxy.connect().await;
        let answer = tokio::time::timeout(Duration::from_secs(20), next.simple_query("SELECT 1")).await;
        answer.unwrap_or_else(|_| panic!("the only backend is lost: {how}")).unwrap();
    }
}

#[tokio::test]
async fn copy_runs_both_ways_and_its_failure_is_the_servers() {
    use futures_util::{SinkExt, StreamExt};
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    let sink = client.copy_in::<_, bytes::Bytes>("COPY t FROM STDIN").await.unwrap();
    let mut sink = std::pin::pin!(sink);
    for chunk in 0..100 {
        let lines: String = (0..100).map(|line| format!("{}\n", chunk * 100 + line)).collect();
        sink.send(lines.into()).await.unwrap();
    }
    assert_eq!(sink.finish().await.unwrap(), 10_000);
    let out = client.copy_out("COPY t TO STDOUT").await.unwrap();
    let mut out = std::pin::pin!(out);
    let mut bytes = 0;
    while let Some(chunk) = out.next().await {
        bytes += chunk.unwrap().len();
    }
    assert_eq!(bytes, (0..10_000).map(|number: u32| number.to_string().len() + 1).sum::<usize>());

    let mut raw = proxy.raw_login().await;
    raw.send(&query("COPY t FROM STDIN")).await;
    assert_eq!(raw.read().await.unwrap().tag, b'G');
    let answer = raw.ask(&[message(b'd', b"not a number\n"), message(b'c', b"")].concat()).await;
    assert_eq!(tags(&answer), "EZ");
    assert_eq!(answer[0].field(b'C').as_deref(), Some("22P02"));
    // What a client still sends after the failure is dropped, as on one server.
    assert_eq!(
        tags(&raw.ask(&[message(b'd', b"1\n"), message(b'c', b""), query("SELECT 1")].concat()).await),
        "TDCZ"
    );
    raw.send(&query("COPY t FROM STDIN")).await;
    assert_eq!(raw.read().await.unwrap().tag, b'G');
    let answer = raw.ask(&message(b'f', b"changed my mind\0")).await;
    assert_eq!(answer[0].field(b'C').as_deref(), Some("57014"));
}
