//! What each level of consistency promises, and that the lower ones do not.

use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::fixture::*;

const READERS: usize = 8;

async fn with_counter(replicas: usize) -> Cluster {
    let cluster = Cluster::start(replicas).await;
    cluster.set_up("CREATE TABLE counter (n bigint); INSERT INTO counter VALUES (0)").await;
    cluster
}

async fn start(cluster: &Cluster, consistency: &str) -> Proxy {
    let overrides = format!("consistency: {{ {consistency} }}");
    Proxy::start_with(cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await
}

/// A register that one session raises and others read. Whatever anybody has been shown, a statement that
/// arrives afterwards must be shown, too: how many of `reads` were not.
async fn stale_reads(proxy: &Proxy, reads: usize) -> usize {
    let (shown, stale, done) = (AtomicI64::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let mut clients = Vec::new();
    for _ in 0..=READERS {
        clients.push(proxy.connect().await);
    }
    let writer = clients.pop().unwrap();
    let write = async {
        while done.load(Ordering::SeqCst) < READERS {
            let row = writer.query_one("UPDATE counter SET n = n + 1 RETURNING n", &[]).await.unwrap();
            shown.fetch_max(row.get(0), Ordering::SeqCst);
        }
    };
    let read = |client: tokio_postgres::Client| {
        let (shown, stale, done) = (&shown, &stale, &done);
        async move {
            for _ in 0..reads.div_ceil(READERS) {
                let must = shown.load(Ordering::SeqCst);
                let n: i64 = client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0);
                stale.fetch_add(usize::from(n < must), Ordering::SeqCst);
                shown.fetch_max(n, Ordering::SeqCst);
            }
            done.fetch_add(1, Ordering::SeqCst);
        }
    };
    let reading: Vec<_> = clients.into_iter().map(read).collect();
    futures_util::future::join(write, futures_util::future::join_all(reading)).await;
    stale.into_inner()
}

/// A standby that must confirm commits: the primary hides them for longer than the replicas do.
async fn with_late_primary() -> Cluster {
    let cluster = with_counter(2).await;
    cluster.primary().set("synchronous_standby_names", "ANY 1 (*)").await.unwrap();
    let waits = "SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')";
    cluster.primary().wait_for(waits, "t").await.unwrap();
    cluster
}

async fn reads_on_replicas(proxy: &Proxy) -> f64 {
    let metrics = proxy.metrics().await;
    metrics.sum("highwater_statements_total", &[("class", "read"), ("reason", "read")])
}

/// Reads until one has run on a replica: the catalog facts are loaded, a replica has a backend.
async fn warm(proxy: &Proxy, client: &tokio_postgres::Client) {
    eventually("a read runs on a replica", async || {
        if let Err(error) = client.simple_query("SELECT n FROM counter").await {
            // Where that was asked for instead of the primary.
            assert_eq!(error.code().map(|code| code.code()), Some("HW002"), "{error}");
        }
        reads_on_replicas(proxy).await > 0.0
    })
    .await;
}

#[tokio::test]
async fn a_strong_read_sees_what_anybody_was_shown_before_it() {
    let cluster = with_late_primary().await;
    let proxy = start(&cluster, "level: strong, catch_up_wait: 200ms").await;
    assert_eq!(stale_reads(&proxy, 4_000).await, 0);
    // And not by asking the primary.
    assert!(reads_on_replicas(&proxy).await > 2_000.0);
}

#[tokio::test]
async fn at_level_global_all_sessions_read_as_one() {
    let cluster = with_late_primary().await;
    let proxy = start(&cluster, "level: global, catch_up_wait: 200ms").await;
    assert_eq!(stale_reads(&proxy, 4_000).await, 0);
    assert!(reads_on_replicas(&proxy).await > 1_000.0);
}

#[tokio::test]
async fn what_others_were_shown_is_promised_at_no_lower_level() {
    let cluster = with_counter(1).await;
    cluster.node(1).set_apply_delay(Duration::from_millis(50)).await.unwrap();
    for level in ["session", "read_your_writes", "eventual"] {
        let proxy = start(&cluster, &format!("level: {level}, catch_up_wait: 500ms")).await;
        // This shows that the tests of the levels above can fail.
        assert!(stale_reads(&proxy, 400).await > 0, "{level}");
    }
}

#[tokio::test]
async fn levels_promise_what_they_say_while_replay_stands_still() {
    let cluster = with_counter(1).await;
    let proxy = start(
        &cluster,
        "rules: [ { user: app, level: eventual }, { user: writes, level: read_your_writes } ]",
    )
    .await;
    cluster.primary().execute("CREATE ROLE writes LOGIN PASSWORD 'w'").await.unwrap();
    cluster.set_up("GRANT ALL ON counter TO writes").await;
    let login = highwater::demo::cluster::Login { user: "writes".to_owned(), password: "w".to_owned() };
    let eventual = proxy.connect().await;
    let writes = proxy.connect_as("app", &login).await.unwrap();
    warm(&proxy, &eventual).await;
    cluster.wait_caught_up(0).await.unwrap();
    cluster.node(1).pause_replay().await.unwrap();

    let read = async |client: &tokio_postgres::Client| -> i64 {
        client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0)
    };
    eventual.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    assert_eq!(read(&eventual).await, 0, "eventual reads from the replica, whatever was written");
    writes.execute("UPDATE counter SET n = 2", &[]).await.unwrap();
    assert_eq!(read(&writes).await, 2, "its own write");
    cluster.node(1).resume_replay().await.unwrap();
    eventually("the replica has caught up", async || read(&eventual).await == 2).await;
}

#[tokio::test]
async fn a_read_that_no_replica_can_serve_fails_if_that_was_asked_for() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "on_stale: error, catch_up_wait: 30ms").await;
    let client = proxy.connect().await;
    warm(&proxy, &client).await;
    cluster.node(1).pause_replay().await.unwrap();
    client.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    let error = client.query_one("SELECT n FROM counter", &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "HW002", "{error}");
    cluster.node(1).resume_replay().await.unwrap();
    eventually("reads work again", async || client.query_one("SELECT n FROM counter", &[]).await.is_ok())
        .await;
}

#[tokio::test]
async fn the_primary_gets_no_more_stale_reads_than_its_share() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "primary_read_cap: 10, primary_read_wait: 20ms, catch_up_wait: 1ms").await;
    let client = proxy.connect().await;
    warm(&proxy, &client).await;
    cluster.node(1).pause_replay().await.unwrap();
    client.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    let (mut served, mut refused) = (0, 0);
    for _ in 0..80 {
        match client.simple_query("SELECT n FROM counter").await {
            Ok(_) => served += 1,
            Err(error) => {
                assert_eq!(error.code().unwrap().code(), "HW002", "{error}");
                refused += 1;
            }
        }
    }
    // The first few are let through before a share means anything: a tenth of 64.
    assert!((1..=8).contains(&served), "{served} served, {refused} refused");
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_primary_reads_queued_total", &[]), f64::from(refused));
    assert_eq!(metrics.sum("highwater_primary_reads_refused_total", &[]), f64::from(refused));
    cluster.node(1).resume_replay().await.unwrap();
}

#[tokio::test]
async fn a_limit_of_staleness_holds_at_every_level() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "rules: [ { user: app, level: eventual, max_lag: 300ms } ]").await;
    let client = proxy.connect().await;
    let read = async || -> i64 { client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0) };
    assert_eq!(read().await, 0);
    cluster.node(1).pause_replay().await.unwrap();
    let direct = cluster.primary().connect("app", proxy.app()).await.unwrap();
    direct.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    // Not at once; but soon it may not be that old any more.
    eventually("the replica is too far behind", async || read().await == 1).await;
    cluster.node(1).resume_replay().await.unwrap();
}

async fn shown(client: &tokio_postgres::Client, name: &str) -> String {
    client.query_one(&format!("SHOW highwater.{name}"), &[]).await.unwrap().get(0)
}

fn code(error: &tokio_postgres::Error) -> &str {
    error.as_db_error().unwrap().code().code()
}

#[tokio::test]
async fn a_session_sets_its_own_level_as_any_other_setting() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "level: read_your_writes").await;
    let client = proxy.connect().await;
    assert_eq!(shown(&client, "consistency").await, "read_your_writes");
    client.batch_execute("SET highwater.consistency = 'strong'").await.unwrap();
    assert_eq!(shown(&client, "consistency").await, "strong");
    // In one message, in a transaction that is rolled back, by set_config, by the simple protocol.
    client.batch_execute("BEGIN; SET highwater.consistency = eventual; ROLLBACK").await.unwrap();
    assert_eq!(shown(&client, "consistency").await, "strong");
    client.query("SELECT set_config('highwater.consistency', $1, false)", &[&"global"]).await.unwrap();
    assert_eq!(shown(&client, "consistency").await, "global");
    client.batch_execute("BEGIN").await.unwrap();
    client.batch_execute("SET highwater.max_lag = '250ms'").await.unwrap();
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(shown(&client, "max_lag").await, "250ms");
    client.batch_execute("RESET highwater.consistency").await.unwrap();
    assert_eq!(shown(&client, "consistency").await, "read_your_writes");
    client.batch_execute("DISCARD ALL").await.unwrap();
    assert_eq!(shown(&client, "max_lag").await, "");
    // Nobody else has it.
    client.batch_execute("SET highwater.consistency = 'strong'").await.unwrap();
    let other = proxy.connect().await;
    assert_eq!(shown(&other, "consistency").await, "read_your_writes");
}

#[tokio::test]
async fn an_invalid_value_is_refused_as_postgres_refuses_its_own() {
    let cluster = with_counter(1).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    let error = client.batch_execute("SET highwater.consistency = 'best'").await.unwrap_err();
    let report = error.as_db_error().unwrap();
    assert_eq!(report.code().code(), "22023");
    assert_eq!(report.message(), "invalid value for parameter \"highwater.consistency\": \"best\"");
    assert_eq!(report.hint(), Some("Available values: eventual, read_your_writes, session, global, strong."));
    let error =
        client.query("SELECT set_config('highwater.max_lag', $1, false)", &[&"soon"]).await.unwrap_err();
    assert_eq!(code(&error), "22023");
    assert_eq!(code(&client.batch_execute("SET highwater.levle = 'x'").await.unwrap_err()), "42602");
    assert_eq!(shown(&client, "consistency").await, "session");
    // In a transaction it fails that, as any error does.
    client.batch_execute("BEGIN").await.unwrap();
    let error = client.batch_execute("SET highwater.on_stale = 'cry'").await.unwrap_err();
    assert_eq!(code(&error), "22023");
    assert_eq!(code(&client.batch_execute("SELECT 1").await.unwrap_err()), "25P02");
    client.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(shown(&client, "on_stale").await, "wait");
}

#[tokio::test]
async fn own_settings_can_be_given_at_startup() {
    let cluster = with_counter(1).await;
    let proxy = Proxy::start(&cluster).await;
    let connect = async |parameters: &[(&str, &str)]| {
        let mut client = proxy.raw().await;
        let all = [&[("user", "app"), ("database", "app")], parameters].concat();
        client.login_with(&all, &proxy.app().password).await.map(|()| client)
    };
    let show = async |client: &mut RawClient| {
        let answer = client.ask(&query("SHOW highwater.consistency")).await;
        answer.iter().find(|m| m.tag == b'D').unwrap().columns()[0].clone().unwrap()
    };
    let mut client =
        connect(&[("options", "-c highwater.consistency=strong -c work_mem=1MB")]).await.unwrap();
    assert_eq!(show(&mut client).await, "strong");
    let mut client = connect(&[("highwater.consistency", "global")]).await.unwrap();
    assert_eq!(show(&mut client).await, "global");
    let refused = connect(&[("options", "-c highwater.consistency=best")]).await.err().unwrap();
    assert_eq!(refused.field(b'C').as_deref(), Some("22023"));
    assert_eq!(refused.field(b'S').as_deref(), Some("FATAL"));
}

/// A token makes a session at its level see what another had seen, while the replica is late.
#[tokio::test]
async fn a_token_carries_what_one_session_has_seen_to_another() {
    let cluster = with_counter(1).await;
    let proxy = Proxy::start(&cluster).await;
    let (writer, reader) = (proxy.connect().await, proxy.connect().await);
    let read = async || -> i64 { reader.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0) };
    warm(&proxy, &reader).await;
    assert_eq!(read().await, 0);
    cluster.node(1).pause_replay().await.unwrap();
    writer.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    assert_eq!(read().await, 0, "the replica is late, and nothing was said of the write");
    let token = shown(&writer, "token").await;
    reader.batch_execute(&format!("SET highwater.token = '{token}'")).await.unwrap();
    assert_eq!(read().await, 1);
    // By the extended protocol, from a new connection whose own past is older, and at startup.
    writer.execute("UPDATE counter SET n = 2", &[]).await.unwrap();
    let token = shown(&writer, "token").await;
    reader.query("SELECT set_config('highwater.token', $1, false)", &[&token]).await.unwrap();
    assert_eq!(read().await, 2);
    cluster.node(1).resume_replay().await.unwrap();
    // Of another proxy over the same nodes it is worth the same.
    let second = Proxy::start(&cluster).await;
    let there = second.connect().await;
    there.batch_execute(&format!("SET highwater.token = '{token}'")).await.unwrap();
    assert_eq!(there.query_one("SELECT n FROM counter", &[]).await.unwrap().get::<_, i64>(0), 2);
}

#[tokio::test]
async fn tokens_that_stand_for_nothing_here_are_refused() {
    let cluster = with_counter(1).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    let token = shown(&client, "token").await;
    let (cluster_id, rest) = token.split_once(':').unwrap();
    let set = async |token: &str| client.batch_execute(&format!("SET highwater.token = '{token}'")).await;
    set(&token).await.unwrap();
    for wrong in [
        "x".to_owned(),
        format!("{}:{rest}", cluster_id.parse::<u64>().unwrap() + 1),
        format!("{cluster_id}:1/FFFF/FFFFFFFF"),
        format!("{cluster_id}:9/0/1"),
    ] {
        let error = set(&wrong).await.unwrap_err();
        assert_eq!(code(&error), "22023", "{wrong}: {error}");
    }
    // It is usable as before.
    client.query_one("SELECT n FROM counter", &[]).await.unwrap();
}

#[tokio::test]
async fn a_token_from_before_a_failover_is_kept_or_said_to_be_lost() {
    let cluster = with_counter(1).await;
    let overrides =
        "failover: { mode: follow, check_interval: 100ms, check_timeout: 500ms, failure_threshold: 2 }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = proxy.connect().await;
    client.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    let kept = shown(&client, "token").await;
    cluster.wait_caught_up(0).await.unwrap();
    cluster.link(1).cut();
    cluster.node(1).pause_replay().await.unwrap();
    cluster.node(1).stop_fast().await.unwrap();
    client.execute("UPDATE counter SET n = 2", &[]).await.unwrap();
    let lost = shown(&client, "token").await;
    cluster.primary().crash().await.unwrap();
    cluster.node(1).start().await.unwrap();
    cluster.node(1).promote().await.unwrap();
    cluster.link(1).heal();
    eventually("the new primary is followed", || async {
        let labels = [("node", cluster.node(1).name()), ("role", "primary")];
        proxy.metrics().await.sum("highwater_node_role", &labels) == 1.0
    })
    .await;
    // A proxy that has seen nothing of the old timeline knows its history from the new primary.
    let second = Proxy::start_with(
        &cluster,
        ProxyOptions { overrides, start: Start::Ready, ..ProxyOptions::default() },
    )
    .await;
    for proxy in [&proxy, &second] {
        let client = proxy.connect().await;
        client.batch_execute(&format!("SET highwater.token = '{kept}'")).await.unwrap();
        assert_eq!(client.query_one("SELECT n FROM counter", &[]).await.unwrap().get::<_, i64>(0), 1);
        let error = client.batch_execute(&format!("SET highwater.token = '{lost}'")).await.unwrap_err();
        assert_eq!(code(&error), "HW001", "{error}");
    }
}

#[tokio::test]
async fn connections_that_name_one_session_read_what_any_of_them_has_written() {
    let cluster = with_counter(1).await;
    cluster.primary().execute("CREATE ROLE other LOGIN PASSWORD 'o'").await.unwrap();
    cluster.set_up("GRANT ALL ON counter TO other").await;
    let proxy = Proxy::start(&cluster).await;
    let (first, second) = (proxy.connect().await, proxy.connect().await);
    let login = highwater::demo::cluster::Login { user: "other".to_owned(), password: "o".to_owned() };
    let stranger = proxy.connect_as("app", &login).await.unwrap();
    let read = async |client: &tokio_postgres::Client| -> i64 {
        client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0)
    };
    for client in [&first, &second, &stranger] {
        client.batch_execute("SET highwater.session = 'user-42'").await.unwrap();
        warm(&proxy, client).await;
        read(client).await;
    }
    cluster.node(1).pause_replay().await.unwrap();
    first.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    assert_eq!(read(&second).await, 1, "the same user's");
    assert_eq!(read(&stranger).await, 0, "another user's session of that name is another");
    second.batch_execute("RESET highwater.session").await.unwrap();
    first.execute("UPDATE counter SET n = 2", &[]).await.unwrap();
    cluster.node(1).resume_replay().await.unwrap();
    assert_eq!(shown(&first, "session").await, "user-42");
}

#[tokio::test]
async fn a_named_session_is_left_by_nothing_but_another_name() {
    let cluster = with_counter(1).await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw().await;
    let startup = [
        ("user", "app"),
        ("database", "app"),
        ("application_name", "books"),
        ("options", "-c highwater.session=startup"),
    ];
    client.login_with(&startup, &proxy.app().password).await.unwrap();
    let mut check = async |sql: &str, expected: &str| {
        client.ask(&query(sql)).await;
        let answer = client.ask(&query("SHOW highwater.session")).await;
        let row = answer.iter().find(|m| m.tag == b'D').unwrap();
        assert_eq!(row.columns()[0].as_deref(), Some(expected), "after {sql}");
    };
    check("SELECT 1", "startup").await;
    check("SET work_mem = '1MB'", "startup").await;
    check("SET highwater.consistency = 'global'", "startup").await;
    check("SET highwater.session = 'one'", "one").await;
    check("BEGIN; SET highwater.session = 'two'; ROLLBACK", "one").await;
    check("SET highwater.session = 'two'; SELECT 1/0", "one").await;
    check("BEGIN", "one").await;
    check("SET highwater.session = 'two'", "two").await;
    check("ROLLBACK", "one").await;
    check("RESET ALL", "startup").await;
    check("SET highwater.session = ''", "").await;
    check("RESET highwater.session", "startup").await;
    check("DISCARD ALL", "startup").await;
}

/// What a `SET` that was rolled back has joined must not be where the session's writes are remembered.
#[tokio::test]
async fn writes_after_a_rolled_back_name_are_seen_by_the_name_that_stayed() {
    let cluster = with_counter(1).await;
    let proxy = Proxy::start(&cluster).await;
    let (first, second) = (proxy.connect().await, proxy.connect().await);
    for client in [&first, &second] {
        client.batch_execute("SET highwater.session = 'stays'").await.unwrap();
        warm(&proxy, client).await;
    }
    for sql in ["BEGIN", "SET highwater.session = 'goes'", "ROLLBACK"] {
        first.batch_execute(sql).await.unwrap();
    }
    cluster.wait_caught_up(0).await.unwrap();
    cluster.node(1).pause_replay().await.unwrap();
    // Nothing else keeps it from the replica.
    let before = reads_on_replicas(&proxy).await;
    eventually("the second reads from the replica", || async {
        second.query_one("SELECT n FROM counter", &[]).await.unwrap();
        reads_on_replicas(&proxy).await > before
    })
    .await;
    first.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    let n: i64 = second.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0);
    cluster.node(1).resume_replay().await.unwrap();
    assert_eq!(n, 1);
}

#[tokio::test]
async fn at_level_global_a_named_session_reads_what_all_have_written_and_its_own_too() {
    let cluster = with_counter(1).await;
    let proxy = Proxy::start(&cluster).await;
    let (named, stranger, global) = (proxy.connect().await, proxy.connect().await, proxy.connect().await);
    named.batch_execute("SET highwater.consistency = 'global'").await.unwrap();
    named.batch_execute("SET highwater.session = 'one'").await.unwrap();
    global.batch_execute("SET highwater.consistency = 'global'").await.unwrap();
    for client in [&named, &stranger, &global] {
        warm(&proxy, client).await;
    }
    cluster.wait_caught_up(0).await.unwrap();
    cluster.node(1).pause_replay().await.unwrap();
    let read = async |client: &tokio_postgres::Client| -> i64 {
        client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0)
    };
    stranger.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    assert_eq!(read(&named).await, 1, "another session's write");
    named.execute("UPDATE counter SET n = 2", &[]).await.unwrap();
    assert_eq!(read(&global).await, 2, "the named session's write");
    cluster.node(1).resume_replay().await.unwrap();
}

#[tokio::test]
async fn a_comment_gives_its_statement_a_level_of_its_own() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "catch_up_wait: 1ms").await;
    let client = proxy.connect().await;
    warm(&proxy, &client).await;
    cluster.wait_caught_up(0).await.unwrap();
    cluster.node(1).pause_replay().await.unwrap();
    client.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    let read = async |text: &str| -> i64 { client.query_one(text, &[]).await.unwrap().get(0) };
    for _ in 0..2 {
        assert_eq!(read("SELECT n FROM counter").await, 1, "its own write");
        assert_eq!(read("SELECT n FROM counter /* highwater.consistency=eventual */").await, 0);
        let simple = "/* highwater.consistency = 'eventual' */ SELECT n FROM counter";
        let messages = client.simple_query(simple).await.unwrap();
        assert!(messages.iter().any(|message| matches!(message,
            tokio_postgres::SimpleQueryMessage::Row(row) if row.get(0) == Some("0"))));
    }
    // The other way round: one strong read in a session that asks for little. And what others wrote is shown.
    let lax = proxy.connect().await;
    lax.batch_execute("SET highwater.consistency = 'eventual'").await.unwrap();
    let read = async |text: &str| -> i64 { lax.query_one(text, &[]).await.unwrap().get(0) };
    assert_eq!(read("SELECT n FROM counter").await, 0);
    assert_eq!(read("SELECT n FROM counter /* highwater.consistency=strong */").await, 1);
    assert_eq!(read("SELECT n FROM counter").await, 0);
    cluster.node(1).resume_replay().await.unwrap();
}

#[tokio::test]
async fn a_comment_with_a_value_that_is_none_fails_its_statement_only() {
    let cluster = with_counter(1).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    let text = "UPDATE counter SET n = 7 /* highwater.consistency=best */";
    let error = client.simple_query(text).await.unwrap_err();
    let report = error.as_db_error().unwrap();
    assert_eq!(report.code().code(), "22023");
    assert_eq!(report.message(), "invalid value for parameter \"highwater.consistency\": \"best\"");
    let hint = "Available values in a comment: eventual, read_your_writes, session, strong.";
    assert_eq!(report.hint(), Some(hint));
    let error = client.query("SELECT 1 /* highwater.route=nearest */", &[]).await.unwrap_err();
    assert_eq!(code(&error), "22023");
    let n: i64 = client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0);
    assert_eq!(n, 0, "it was not run");
}

#[tokio::test]
async fn a_comment_counts_in_transactions_and_on_held_backends_too() {
    let cluster = with_counter(1).await;
    let proxy = Proxy::start(&cluster).await;
    let bad_units = |name: &str| {
        let bad = &format!("SELECT n AS {name} /* highwater.consistency=best */ FROM counter");
        [
            crate::fixture::query(bad),
            [
                crate::fixture::parse("", bad),
                crate::fixture::bind("", &[]),
                crate::fixture::execute(),
                crate::fixture::sync(),
            ]
            .concat(),
        ]
    };
    // In a transaction it fails that, on the server as well; on a pinned session its statement only. And so it does
    // whether or not the text has been seen before: each session has a text of its own.
    for (begin, status, end) in [("BEGIN", b"E", "ROLLBACK"), ("LISTEN here", b"I", "UNLISTEN here")] {
        for unit in bad_units(end.split(' ').next().unwrap()) {
            let mut client = proxy.raw_login().await;
            client.ask(&crate::fixture::query(begin)).await;
            client.ask(&crate::fixture::query("UPDATE counter SET n = n + 1")).await;
            let answer = client.ask(&unit).await;
            assert_eq!(crate::fixture::tags(&answer), "EZ", "{begin}: {answer:?}");
            assert_eq!(answer[0].field(b'C').as_deref(), Some("22023"), "{begin}");
            assert_eq!(answer[1].body, status, "{begin}");
            let next = client.ask(&crate::fixture::query("SELECT 1")).await;
            let code = next[0].tag == b'E';
            assert_eq!(code, begin == "BEGIN", "{begin}: {next:?}");
            assert_eq!(client.ask(&crate::fixture::query(end)).await.last().unwrap().body, b"I");
        }
    }
    let client = proxy.connect().await;
    let n: i64 = client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0);
    assert_eq!(n, 2, "what the pinned sessions wrote, and nothing of the transactions");
    // A level that is one does no harm there.
    let strong = "SELECT n /* highwater.consistency=strong */ FROM counter";
    client.batch_execute("BEGIN").await.unwrap();
    assert_eq!(client.query_one(strong, &[]).await.unwrap().get::<_, i64>(0), 2);
    client.simple_query(strong).await.unwrap();
    client.batch_execute("COMMIT; LISTEN here").await.unwrap();
    client.simple_query(strong).await.unwrap();
    assert_eq!(client.query_one(strong, &[]).await.unwrap().get::<_, i64>(0), 2);
}

#[tokio::test]
async fn who_asks_for_a_replica_waits_longer_for_one() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "catch_up_wait: 1ms, on_stale: primary, primary_read_wait: 20s").await;
    let client = proxy.connect().await;
    warm(&proxy, &client).await;
    cluster.node(1).pause_replay().await.unwrap();
    client.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    let on_replicas = reads_on_replicas(&proxy).await;
    client.simple_query("SELECT n FROM counter").await.unwrap();
    assert_eq!(reads_on_replicas(&proxy).await, on_replicas, "the primary at once");
    let (read, ()) = futures_util::future::join(
        client.simple_query("SELECT n FROM counter /* highwater.route=replica */"),
        async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            cluster.node(1).resume_replay().await.unwrap();
        },
    )
    .await;
    let fresh = read.unwrap().iter().any(
        |message| matches!(message, tokio_postgres::SimpleQueryMessage::Row(row) if row.get(0) == Some("1")),
    );
    assert!(fresh, "fresh all the same");
    assert_eq!(reads_on_replicas(&proxy).await, on_replicas + 1.0);
    // It makes no read of what is none.
    client.simple_query("UPDATE counter SET n = 2 /* highwater.route=replica */").await.unwrap();
    assert_eq!(cluster.primary().query_text("SELECT n FROM counter").await.unwrap(), "2");
}

#[tokio::test]
async fn a_session_says_where_its_reads_run() {
    let cluster = with_counter(1).await;
    let options = ProxyOptions {
        overrides: "routing: { rules: [ { user: kept, split: false }, { user: asks, route: primary } ] }",
        ..ProxyOptions::default()
    };
    let proxy = Proxy::start_with(&cluster, options).await;
    let client = proxy.connect().await;
    warm(&proxy, &client).await;
    let count = async |reason: &str| {
        let metrics = proxy.metrics().await;
        metrics.sum("highwater_statements_total", &[("class", "read"), ("reason", reason)])
    };
    client.batch_execute("SET highwater.route = 'primary'").await.unwrap();
    let before = count("read").await;
    for _ in 0..5 {
        client.simple_query("SELECT n FROM counter").await.unwrap();
    }
    assert_eq!((count("read").await, count("asked").await), (before, 5.0));
    // A comment says it of one statement.
    client.simple_query("SELECT n FROM counter /* highwater.route=auto */").await.unwrap();
    assert_eq!(count("asked").await, 5.0);
    assert_eq!(shown(&client, "route").await, "primary");
    client.batch_execute("RESET highwater.route").await.unwrap();
    client.simple_query("SELECT n FROM counter").await.unwrap();
    assert_eq!(count("asked").await, 5.0);
    assert_eq!(code(&client.batch_execute("SET highwater.route = 'near'").await.unwrap_err()), "22023");

    for user in ["kept", "asks"] {
        cluster.primary().execute(&format!("CREATE ROLE {user} LOGIN PASSWORD 'w'")).await.unwrap();
        cluster.set_up(&format!("GRANT ALL ON counter TO {user}")).await;
    }
    cluster.wait_caught_up(0).await.unwrap();
    for (user, own, after_set) in [("kept", "split_off", "split_off"), ("asks", "asked", "read")] {
        let login = highwater::demo::cluster::Login { user: user.to_owned(), password: "w".to_owned() };
        let client = proxy.connect_as("app", &login).await.unwrap();
        let before = count(own).await;
        client.simple_query("SELECT n FROM counter").await.unwrap();
        assert_eq!(count(own).await, before + 1.0, "{user}");
        client.batch_execute("SET highwater.route = 'replica'").await.unwrap();
        let before = count(after_set).await;
        client.simple_query("SELECT n FROM counter").await.unwrap();
        assert_eq!(count(after_set).await, before + 1.0, "{user}");
    }
}

#[tokio::test]
async fn in_shadow_all_runs_on_the_primary_and_what_replicas_would_get_is_counted() {
    let cluster = with_counter(1).await;
    let options = ProxyOptions { overrides: "routing: { shadow: true }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let client = proxy.connect().await;
    let would_go =
        async |reason: &str| proxy.metrics().await.sum("highwater_shadow_reads_total", &[("reason", reason)]);
    eventually("a read would have gone to the replica", async || {
        client.simple_query("SELECT n FROM counter").await.unwrap();
        would_go("read").await > 0.0
    })
    .await;
    client.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    cluster.node(1).pause_replay().await.unwrap();
    client.execute("UPDATE counter SET n = 2", &[]).await.unwrap();
    let before = would_go("behind").await;
    client.simple_query("SELECT n FROM counter").await.unwrap();
    assert_eq!(would_go("behind").await, before + 1.0);
    assert_eq!(reads_on_replicas(&proxy).await, 0.0);
    cluster.node(1).resume_replay().await.unwrap();
}

async fn samples(proxy: &Proxy, node: &str) -> f64 {
    proxy.metrics().await.sum("highwater_samples_total", &[("node", node)])
}

async fn waits(proxy: &Proxy) -> f64 {
    let metrics = proxy.metrics().await;
    let count = |what| metrics.sum("highwater_wait_seconds_count", &[("for", what)]);
    count("mark") + count("floor")
}

#[tokio::test]
async fn strong_reads_that_wait_at_the_same_time_share_a_sample_of_the_primary() {
    const TOGETHER: usize = 16;
    const READS: usize = 40;
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "level: strong, catch_up_wait: 5s").await;
    let mut clients = Vec::new();
    for _ in 0..TOGETHER {
        clients.push(proxy.connect().await);
    }
    warm(&proxy, &clients[0]).await;
    let read = async |client: &tokio_postgres::Client| {
        for _ in 0..READS {
            client.simple_query("SELECT n FROM counter").await.unwrap();
        }
    };
    let before = samples(&proxy, "a").await;
    read(&clients[0]).await;
    let alone = (samples(&proxy, "a").await - before) / READS as f64;
    let before = samples(&proxy, "a").await;
    futures_util::future::join_all(clients.iter().map(read)).await;
    let together = (samples(&proxy, "a").await - before) / (TOGETHER * READS) as f64;
    println!("samples of the primary per read: {alone} alone, {together} of {TOGETHER} together");
    assert!(alone >= 1.0, "each needs one that is sent after it came: {alone}");
    assert!(together < alone / 2.0, "{together} together, {alone} alone");
}

/// What a session was shown last is placed while it rests, though nobody asks for it.
#[tokio::test]
async fn a_session_that_rests_between_statements_waits_for_no_sample() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "catch_up_wait: 5s").await;
    let client = proxy.connect().await;
    warm(&proxy, &client).await;
    let rest = async || {
        let (a, b) = (samples(&proxy, "a").await, samples(&proxy, "b").await);
        // The one that is under way does not count; and replay may have to be seen to be over.
        eventually("both have been sampled", async || {
            samples(&proxy, "a").await > a + 2.0 && samples(&proxy, "b").await > b + 2.0
        })
        .await;
    };
    let before = waits(&proxy).await;
    for _ in 0..10 {
        client.execute("UPDATE counter SET n = n + 1", &[]).await.unwrap();
        cluster.wait_caught_up(0).await.unwrap();
        rest().await;
        client.query_one("SELECT n FROM counter", &[]).await.unwrap();
        rest().await;
    }
    let after = waits(&proxy).await;
    // The first has a past, and now and then a server writes something of its own between two samples. If nothing were
    // placed while the session rests, it would wait for each.
    assert!(after - before <= 4.0, "{} waits in 20 statements", after - before);
    assert!(reads_on_replicas(&proxy).await >= 10.0);
}

/// Where the primary is, is asked while the client proves who it is.
#[tokio::test]
async fn a_new_session_seldom_waits_with_its_first_read() {
    const SESSIONS: usize = 20;
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "catch_up_wait: 5s").await;
    warm(&proxy, &proxy.connect().await).await;
    cluster.wait_caught_up(0).await.unwrap();
    let before = waits(&proxy).await;
    for _ in 0..SESSIONS {
        proxy.connect().await.query_one("SELECT n FROM counter", &[]).await.unwrap();
    }
    let waited = waits(&proxy).await - before;
    println!("{waited} of {SESSIONS} first reads waited");
    assert!(waited <= SESSIONS as f64 / 2.0, "{waited} of {SESSIONS} waited");
    assert!(reads_on_replicas(&proxy).await >= SESSIONS as f64);
}

/// The primary is gone for the proxy alone: once its server has died too, no walreceiver is left to say of which timeline
/// it is what a standby has received.
#[tokio::test]
async fn what_a_paused_replica_has_shown_is_placed_by_what_it_has_received_without_the_primary() {
    let cluster = with_counter(2).await;
    let overrides = &super::quorum::quorum("5s");
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    cluster.primary().set("synchronous_commit", "remote_apply").await.unwrap();
    cluster.primary().set("synchronous_standby_names", "ANY 1 (b, c)").await.unwrap();
    let (writer, reader) = (proxy.connect().await, proxy.connect().await);
    warm(&proxy, &reader).await;
    let read = async || -> i64 {
        // Never on the primary, also where a sample is late.
        let sql = "SELECT n FROM counter /* highwater.consistency=session highwater.route=replica */";
        reader.query_one(sql, &[]).await.unwrap().get(0)
    };
    // It reads from the one whose replay then stops with a write received, and goes on to.
    let console = proxy.connect_as("highwater", &cluster.roles().control).await.unwrap();
    console.batch_execute("DRAIN b").await.unwrap();
    let on_c = async || {
        let metrics = proxy.metrics().await;
        metrics.sum("highwater_statements_total", &[("node", "c"), ("reason", "read")])
    };
    let before = on_c().await;
    eventually("it reads from c", async || {
        read().await;
        on_c().await > before
    })
    .await;
    cluster.node(2).pause_replay().await.unwrap();
    writer.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    let received = "SELECT pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn()";
    cluster.node(2).wait_for(received, "t").await.unwrap();
    assert_eq!(read().await, 0, "the replica that stands still has shown something last");
    console.batch_execute("UNDRAIN b").await.unwrap();
    cluster.link(0).cut();
    eventually("it is gone", async || {
        proxy.metrics().await.sum("highwater_node_up", &[("node", "a")]) == 0.0
    })
    .await;
    let read = reader.query_one("SELECT n FROM counter", &[]).await;
    assert_eq!(read.unwrap().get::<_, i64>(0), 1);
}

/// How fast a replica replays is measured while it has much to replay, and shown.
#[tokio::test]
async fn the_pace_of_a_replica_that_has_fallen_behind_is_measured_and_shown() {
    let cluster = with_counter(1).await;
    let proxy = start(&cluster, "max_lag: 1h").await;
    let client = proxy.connect().await;
    warm(&proxy, &client).await;
    let rate =
        async || proxy.metrics().await.sum("highwater_replica_replay_bytes_per_second", &[("node", "b")]);
    let direct = cluster.primary().connect("app", proxy.app()).await.unwrap();
    direct.batch_execute("CREATE TABLE much (x text)").await.unwrap();
    eventually("a pace is measured", async || {
        cluster.node(1).pause_replay().await.unwrap();
        direct
            .batch_execute("INSERT INTO much SELECT repeat('x', 1000) FROM generate_series(1, 10000)")
            .await
            .unwrap();
        cluster.node(1).resume_replay().await.unwrap();
        for _ in 0..20 {
            client.execute("UPDATE counter SET n = n + 1", &[]).await.unwrap();
            client.query_one("SELECT n FROM counter", &[]).await.unwrap();
        }
        rate().await > 0.0
    })
    .await;
    // Both by one answer: between two, a server may write something of its own.
    eventually("it has caught up, and says so", async || {
        let metrics = proxy.metrics().await;
        let of_b = |name| metrics.sum(name, &[("node", "b")]);
        of_b("highwater_replica_replay_lag_bytes") == 0.0 && of_b("highwater_replica_catch_up_seconds") == 0.0
    })
    .await;
    assert!(rate().await > 0.0, "a pace outlives the backlog");
}

/// Questions per second to a node that nobody uses.
#[tokio::test]
async fn an_idle_cluster_is_asked_no_more_than_twice_a_second() {
    let cluster = with_counter(1).await;
    let _proxy = Proxy::start(&cluster).await;
    // What the servers count of it: each question is a transaction in the database of the control connections.
    let sql = "SELECT coalesce(sum(xact_commit + xact_rollback), 0) FROM pg_stat_database WHERE datname = 'postgres'";
    let count = async |node: usize| -> f64 {
        cluster.node(node).query_text(sql).await.unwrap().parse::<f64>().unwrap()
    };
    // The start asks more, and sessions of other tests' clusters are no concern here.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let begun = std::time::Instant::now();
    let before = [count(0).await, count(1).await];
    tokio::time::sleep(Duration::from_secs(8)).await;
    let after = [count(0).await, count(1).await];
    let seconds = begun.elapsed().as_secs_f64();
    for (before, after) in before.into_iter().zip(after) {
        // Two probes a second and a sample every five. Servers count up to a second late; the test's own connections and
        // questions are transactions, too.
        let most = 2.2 * (seconds + 1.5) + 6.0;
        println!("{} questions in {seconds:.1} s", after - before);
        assert!(after - before <= most, "{} questions in {seconds} s", after - before);
    }
}
