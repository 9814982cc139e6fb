//! Who takes too long, or is one too many, is told so in PostgreSQL's words; nobody else is.

use std::time::Duration;

use highwater::demo::cluster::Login;
use nix::sys::signal::Signal;

use crate::fixture::*;

async fn proxy_with(cluster: &Cluster, overrides: &str) -> Proxy {
    Proxy::start_with(cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await
}

fn code(messages: &[Message]) -> Option<String> {
    messages.iter().rfind(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
}

/// The SQLSTATE and text of a refused login.
async fn refused(proxy: &Proxy, database: &str, login: &Login) -> Option<(String, String)> {
    let told = proxy.raw().await.login(database, login).await.err()?;
    Some((told.field(b'C').unwrap(), told.field(b'M').unwrap()))
}

async fn leave(mut client: RawClient) {
    client.send(&message(b'X', b"")).await;
    client.read_to_end().await;
}

async fn timed_out(proxy: &Proxy, reason: &str) -> f64 {
    proxy.metrics().await.sum("highwater_timeouts_total", &[("reason", reason)])
}

#[tokio::test]
async fn a_client_that_says_nothing_is_ended_and_one_that_works_or_is_in_a_transaction_is_not() {
    let cluster = Cluster::start(0).await;
    let proxy = proxy_with(&cluster, "timeouts: { idle_session: 1s }").await;
    let (mut idle, mut busy, mut open) =
        (proxy.raw_login().await, proxy.raw_login().await, proxy.raw_login().await);
    open.ask(&query("BEGIN")).await;
    assert_eq!(tags(&idle.ask(&query("SELECT 1")).await), "TDCZ");
    let told = tokio::spawn(async move { idle.read_to_end().await });
    while !told.is_finished() {
        assert_eq!(tags(&busy.ask(&query("SELECT pg_sleep(0.05)")).await), "TDCZ");
    }
    assert_eq!(code(&told.await.unwrap()).as_deref(), Some("57P05"));
    assert_eq!(tags(&open.ask(&query("COMMIT")).await), "CZ");
    assert_eq!(timed_out(&proxy, "idle_session").await, 1.0);
}

#[tokio::test]
async fn who_leaves_a_transaction_open_is_ended_and_its_locks_are_free() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = proxy_with(&cluster, "timeouts: { idle_in_transaction: 300ms }").await;
    let (mut idle, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    idle.ask(&query("BEGIN; INSERT INTO t VALUES (1); LOCK TABLE t")).await;
    other.send(&query("SELECT count(*) FROM t")).await;
    assert_eq!(code(&idle.read_to_end().await).as_deref(), Some("25P03"));
    let answer = other.read_ready().await;
    assert_eq!(answer[1].columns(), [Some("0".to_owned())]);
    // Outside a transaction nobody is ended by it.
    assert_eq!(timed_out(&proxy, "idle_in_transaction").await, 1.0);
    let mut failed = proxy.raw_login().await;
    failed.ask(&query("BEGIN; SELECT 1/0")).await;
    assert_eq!(code(&failed.read_to_end().await).as_deref(), Some("25P03"));
    assert_eq!(tags(&other.ask(&query("SELECT 1")).await), "TDCZ");
}

#[tokio::test]
async fn a_transaction_that_takes_too_long_is_stopped_wherever_it_is() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = proxy_with(&cluster, "timeouts: { transaction: 1s }").await;
    // In a statement, alone or in a transaction; between two; and busy all the time.
    for begun in ["SELECT pg_sleep(3600)", "BEGIN; INSERT INTO t VALUES (1); SELECT pg_sleep(3600)"] {
        let mut client = proxy.raw_login().await;
        client.send(&query(begun)).await;
        let told = client.read_to_end().await;
        let codes: Vec<_> = told.iter().filter(|m| m.tag == b'E').map(|m| m.field(b'C').unwrap()).collect();
        assert_eq!(codes, ["57014", "25P04"], "{begun}");
    }
    let mut waiting = proxy.raw_login().await;
    waiting.ask(&query("BEGIN; INSERT INTO t VALUES (2)")).await;
    assert_eq!(code(&waiting.read_to_end().await).as_deref(), Some("25P04"));
    let mut busy = proxy.raw_login().await;
    busy.ask(&query("BEGIN; INSERT INTO t VALUES (3)")).await;
    let ended = loop {
        let answer = busy.ask(&query("SELECT pg_sleep(0.01)")).await;
        if code(&answer).is_some() {
            break answer;
        }
    };
    let rest = busy.read_to_end().await;
    assert_eq!(code(&[ended, rest].concat()).as_deref(), Some("25P04"));
    // In the middle of a batch the server waits for its client, and ignores a cancel.
    let mut half = proxy.raw_login().await;
    half.ask(&query("BEGIN")).await;
    half.send(&[parse("", "INSERT INTO t VALUES (4)"), bind("", &[]), execute(), flush()].concat()).await;
    assert_eq!(code(&half.read_to_end().await).as_deref(), Some("25P04"));
    // Many short ones one after the other are not one long one.
    let mut short = proxy.raw_login().await;
    let begin = std::time::Instant::now();
    while begin.elapsed() < std::time::Duration::from_millis(2500) {
        assert_eq!(tags(&short.ask(&query("BEGIN; SELECT pg_sleep(0.02); COMMIT")).await), "CTDCCZ");
    }
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), "0");
    assert_eq!(timed_out(&proxy, "transaction").await, 5.0);
}

#[tokio::test]
async fn the_idle_session_timeout_of_a_role_ends_its_idle_clients_and_no_pooled_backend() {
    let cluster = Cluster::start(0).await;
    for sql in [
        "ALTER ROLE app SET idle_session_timeout = '1d'",
        "ALTER ROLE app IN DATABASE app SET idle_session_timeout = '400ms'",
    ] {
        cluster.primary().execute(sql).await.unwrap();
    }
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    let mut pinned = proxy.raw_login().await;
    // First, or it would take the backend that the other one has just given back.
    pinned.ask(&query("SET idle_session_timeout = 0; SELECT pg_backend_pid()")).await;
    client.ask(&query("SELECT 1")).await;
    assert_eq!(code(&client.read_to_end().await).as_deref(), Some("57P05"));
    // The backend that served it idles for longer than that by now, and is there.
    let idle = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND state = 'idle' \
                AND state_change < now() - interval '400ms'";
    cluster.primary().wait_for(idle, "2").await.unwrap();
    assert!(!cluster.primary().log().contains("idle-session timeout"), "a server has ended a backend");
    // Another database: the role's own setting.
    let mut elsewhere = proxy.raw().await;
    elsewhere.login("postgres", proxy.app()).await.unwrap();
    assert_eq!(tags(&elsewhere.ask(&query("SELECT 1")).await), "TDCZ");
}

#[tokio::test]
async fn what_a_role_or_session_has_set_for_idle_transactions_the_server_sees_to() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let mut own = proxy.raw_login().await;
    own.ask(&query("BEGIN; SET LOCAL idle_in_transaction_session_timeout = '200ms'")).await;
    assert_eq!(code(&own.read_to_end().await).as_deref(), Some("25P03"));
    cluster
        .primary()
        .execute("ALTER ROLE app SET idle_in_transaction_session_timeout = '200ms'")
        .await
        .unwrap();
    let fresh = Proxy::start(&cluster).await;
    let mut client = fresh.raw_login().await;
    client.ask(&query("BEGIN")).await;
    assert_eq!(code(&client.read_to_end().await).as_deref(), Some("25P03"));
    // And whoever comes next is not told of it.
    let mut next = fresh.raw_login().await;
    assert_eq!(tags(&next.ask(&query("SELECT 1")).await), "TDCZ");
}

#[tokio::test]
async fn one_session_too_many_of_a_user_or_in_a_database_is_told_so() {
    let cluster = Cluster::start(0).await;
    cluster.primary().execute("CREATE ROLE other LOGIN PASSWORD 'x'").await.unwrap();
    let overrides = "pool: { users: [ { name: app, max_clients: 2 } ], \
                             databases: [ { name: postgres, max_clients: 1 } ] }";
    let proxy = proxy_with(&cluster, overrides).await;
    let app = proxy.app().clone();
    let other = Login { user: "other".into(), password: "x".into() };
    let first = proxy.raw_login().await;
    let _second = proxy.raw_login().await;
    let too_many = |words: &str| Some(("53300".to_owned(), words.to_owned()));
    let of_role = too_many("too many connections for role \"app\"");
    assert_eq!(refused(&proxy, "app", &app).await, of_role);
    // A wrong password says nothing of it, and takes no place.
    let wrong = Login { password: "wrong".into(), ..app.clone() };
    assert_eq!(refused(&proxy, "app", &wrong).await.unwrap().0, "28P01");
    let mut inside = proxy.raw().await;
    inside.login("postgres", &other).await.unwrap();
    let of_database = too_many("too many connections for database \"postgres\"");
    assert_eq!(refused(&proxy, "postgres", &other).await, of_database);
    assert!(refused(&proxy, "app", &other).await.is_none());
    leave(first).await;
    eventually("the place is free", || async { refused(&proxy, "app", &app).await.is_none() }).await;
    let metrics = proxy.metrics().await;
    for reason in ["too_many_of_user", "too_many_in_database"] {
        assert!(metrics.sum("highwater_client_refused_total", &[("reason", reason)]) >= 1.0, "{reason}");
    }
}

#[tokio::test]
async fn reserved_places_are_for_admins() {
    let cluster = Cluster::start(0).await;
    let proxy = proxy_with(&cluster, "max_clients: 3\nreserved_clients: 1\nauth: { admins: [ app ] }").await;
    cluster.primary().execute("CREATE ROLE other LOGIN PASSWORD 'x'").await.unwrap();
    let other = Login { user: "other".into(), password: "x".into() };
    let mut inside = Vec::new();
    for _ in 0..2 {
        let mut client = proxy.raw().await;
        client.login("app", &other).await.unwrap();
        inside.push(client);
    }
    let told = refused(&proxy, "app", &other).await.unwrap();
    assert_eq!(told.0, "53300");
    assert!(told.1.starts_with("remaining connection slots are reserved for "), "{}", told.1);
    let _admin = proxy.raw_login().await;
    let full = refused(&proxy, "app", proxy.app()).await.unwrap();
    assert_eq!(full, ("53300".to_owned(), "sorry, too many clients already".to_owned()));
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_no_drain_beyond_its_time() {
    let cluster = Cluster::start(0).await;
    let proxy = proxy_with(&cluster, "drain_timeout: 1s").await;
    let mut deaf = proxy.raw_login().await;
    deaf.send(&query("SELECT repeat('x', 1000) FROM generate_series(1, 1000000)")).await;
    let sending =
        "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app' AND wait_event = 'ClientWrite'";
    cluster.primary().wait_for(sending, "1").await.unwrap();
    let begin = std::time::Instant::now();
    assert!(proxy.stop().await.success());
    assert!(begin.elapsed() < std::time::Duration::from_secs(10), "{:?}", begin.elapsed());
    cluster.primary().wait_for(sending, "0").await.unwrap();
}

#[tokio::test]
async fn sigint_and_a_second_sigterm_wait_for_nobody() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    for signals in [&[Signal::SIGINT][..], &[Signal::SIGTERM, Signal::SIGTERM]] {
        // Longer than a test waits: only the signal can end it.
        let mut proxy = proxy_with(&cluster, "drain_timeout: 1h").await;
        let (mut open, mut running) = (proxy.raw_login().await, proxy.raw_login().await);
        open.ask(&query("BEGIN; INSERT INTO t VALUES (1)")).await;
        running.send(&query("SELECT pg_sleep(3600)")).await;
        let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        cluster.primary().wait_for(sleeping, "1").await.unwrap();
        for (n, signal) in signals.iter().enumerate() {
            proxy.signal(*signal);
            if n == 0 && signals.len() > 1 {
                eventually("it drains", || async { proxy.log().contains("SIGTERM: draining") }).await;
                assert!(proxy.is_running());
            }
        }
        for client in [&mut open, &mut running] {
            assert_eq!(code(&client.read_to_end().await).as_deref(), Some("57P01"));
        }
        // It has ended well already, or ends now.
        drop(open);
        drop(running);
        proxy.ended().await;
        cluster.primary().wait_for(sleeping, "0").await.unwrap();
        assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), "0");
    }
}

/// How many connections the users have to the first node, and in how many databases.
const CONNECTED: &str = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";

/// Databases `d0` and so on, as many pools.
async fn databases(cluster: &Cluster, count: usize) -> Vec<String> {
    let names: Vec<String> = (0..count).map(|n| format!("d{n}")).collect();
    for name in &names {
        cluster.primary().execute(&format!("CREATE DATABASE {name}")).await.unwrap();
    }
    names
}

#[tokio::test]
async fn all_pools_of_a_node_together_keep_within_its_cap_and_each_has_its_turn() {
    let cluster = Cluster::start(0).await;
    let names = databases(&cluster, 5).await;
    let proxy =
        proxy_with(&cluster, "pool: { size: 4, max_backends_per_node: 3, query_wait_timeout: 60s }").await;
    let app = cluster.roles().app.clone();
    let sessions = names.iter().flat_map(|name| std::iter::repeat_n(name, 4)).map(|name| {
        let (port, app) = (proxy.port(), app.clone());
        async move {
            let mut client = RawClient::connect(port).await;
            client.login(name, &app).await.unwrap();
            for _ in 0..8 {
                assert_eq!(
                    tags(&client.ask(&query("BEGIN; SELECT pg_sleep(0.005); COMMIT")).await),
                    "CTDCCZ"
                );
            }
        }
    });
    let mut all = std::pin::pin!(futures_util::future::join_all(sessions));
    let mut most = 0;
    let admin = cluster.primary().admin().await.unwrap();
    loop {
        tokio::select! {
            _ = &mut all => break,
            row = admin.query_one(CONNECTED, &[]) => most = most.max(row.unwrap().get::<_, i64>(0)),
        }
    }
    // A server process that was told to go may still be seen beside the one in its place.
    assert!((1..=6).contains(&most), "{most} at once");
    let metrics = proxy.metrics().await;
    assert!(metrics.sum("highwater_node_full_total", &[("node", "a")]) > 0.0);
    assert!(metrics.sum("highwater_backends_closed_total", &[("reason", "node_full")]) > 0.0);
    let open: f64 = ["idle", "active", "connecting"]
        .iter()
        .map(|state| metrics.sum("highwater_pool_backends", &[("state", state)]))
        .sum();
    assert!(open <= 3.0, "{open} are open");
}

#[tokio::test]
async fn a_full_node_gives_what_is_idle_to_who_waits_and_who_waits_too_long_is_told() {
    let cluster = Cluster::start(0).await;
    let names = databases(&cluster, 3).await;
    let overrides = "pool: { max_backends_per_node: 2, query_wait_timeout: 5s }";
    let proxy = proxy_with(&cluster, overrides).await;
    let app = cluster.roles().app.clone();
    let mut clients = Vec::new();
    for name in &names {
        // The third login needs a backend, too: one of the idle ones goes.
        let mut client = proxy.raw().await;
        client.login(name, &app).await.unwrap();
        assert_eq!(tags(&client.ask(&query("SELECT 1")).await), "TDCZ");
        clients.push(client);
    }
    cluster.primary().wait_for(CONNECTED, "2").await.unwrap();
    let [first, second, third] = &mut clients[..] else { unreachable!() };
    first.ask(&query("BEGIN")).await;
    second.ask(&query("BEGIN")).await;
    assert_eq!(code(&third.ask(&query("SELECT 1")).await).as_deref(), Some("53300"));
    third.send(&query("SELECT 1")).await;
    second.ask(&query("COMMIT")).await;
    assert_eq!(tags(&third.read_ready().await), "TDCZ");
    assert_eq!(tags(&first.ask(&query("COMMIT")).await), "CZ");

    // More, by a reload; and fewer.
    proxy.configure(&cluster, "pool: { max_backends_per_node: 3, query_wait_timeout: 5s }");
    assert!(proxy.reload().await);
    for client in &mut clients {
        assert_eq!(tags(&client.ask(&query("BEGIN; SELECT 1")).await), "CTDCZ");
    }
    proxy.configure(&cluster, "pool: { max_backends_per_node: 1, query_wait_timeout: 5s }");
    assert!(proxy.reload().await);
    for client in &mut clients {
        assert_eq!(tags(&client.ask(&query("COMMIT")).await), "CZ");
    }
    cluster.primary().wait_for(CONNECTED, "1").await.unwrap();
}

#[tokio::test]
async fn the_time_in_line_for_a_backend_is_no_wait_for_a_primary() {
    let cluster = Cluster::start(0).await;
    let proxy = proxy_with(&cluster, "{ pool: { size: 1 }, failover: { pause_timeout: 1s } }").await;
    let (mut holds, mut waits) = (proxy.raw_login().await, proxy.raw_login().await);
    // The server process of such a session ends with it: who waits gets one that has just been connected.
    holds.ask(&query("SELECT setseed(0.5)")).await;
    waits.send(&query("CREATE TABLE t ()")).await;
    assert!(waits.silent_for(Duration::from_millis(1500)).await, "for longer than pause_timeout");
    leave(holds).await;
    let answer = waits.read_ready().await;
    assert_eq!(tags(&answer), "CZ", "{answer:?}");
}

#[tokio::test]
async fn a_health_check_is_answered_however_many_requests_stand_half_sent() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start(&cluster).await;
    let begun = std::time::Instant::now();
    let mut half_sent = Vec::new();
    // More than there is room for: those that nobody takes in would wait before the check.
    for _ in 0..100 {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", proxy.http_port())).await.unwrap();
        // The first ones are closed meanwhile.
        let _ =
            tokio::io::AsyncWriteExt::write_all(&mut stream, b"GET /healthz HTTP/1.1\r\nHost: x\r\n").await;
        half_sent.push(stream);
    }
    assert_eq!(proxy.get("/healthz").await, Some((200, "alive\n".to_owned())));
    // They are given up one by one after five seconds, at the earliest.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    drop(half_sent);
}
