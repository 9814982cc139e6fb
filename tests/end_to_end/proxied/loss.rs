//! What a session keeps, and what it is told, when its primary is lost.

use crate::fixture::*;

const QUICK: &str =
    "failover: { check_interval: 100ms, check_timeout: 500ms, failure_threshold: 2, eject_time: 200ms }";

async fn quick(cluster: &Cluster) -> Proxy {
    Proxy::start_with(cluster, ProxyOptions { overrides: QUICK, ..ProxyOptions::default() }).await
}

fn code(messages: &[Message]) -> Option<String> {
    messages.iter().find(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
}

async fn succeed(client: &mut RawClient, sql: &str) -> Vec<Message> {
    let answer = client.ask(&query(sql)).await;
    assert!(!tags(&answer).contains('E'), "{sql}: {answer:?}");
    answer
}

/// How often what was said is that something was lost.
fn losses(said: &[Message]) -> usize {
    let words = said.iter().filter(|message| matches!(message.tag, b'E' | b'N'));
    words.filter(|message| message.field(b'C').as_deref() == Some("HW001")).count()
}

const NAME: &str = "SET highwater.session = 'user-42'";

/// A primary that flushes nothing by itself, and a connection of a named session that has written there without waiting for it.
async fn a_named_session_that_has_written() -> (Cluster, Proxy, RawClient) {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    cluster.primary().set("wal_writer_delay", "10s").await.unwrap();
    let proxy = quick(&cluster).await;
    let mut client = proxy.raw_login().await;
    succeed(&mut client, NAME).await;
    succeed(&mut client, "SET synchronous_commit = off").await;
    succeed(&mut client, "INSERT INTO t VALUES (1)").await;
    (cluster, proxy, client)
}

async fn crash_is_seen(proxy: &Proxy) {
    eventually("the crash has been seen", || async {
        proxy.metrics().await.sum("highwater_epoch", &[]) > 1.0
    })
    .await;
}

/// The next that is not a parameter's new value.
async fn heard(client: &mut RawClient) -> Message {
    loop {
        let message = client.read().await.expect("the session lives");
        if message.tag != b'S' {
            return message;
        }
    }
}

async fn written(proxy: &Proxy, sql: &str) {
    eventually("there is a primary", || async {
        match proxy.connect_as("app", proxy.app()).await {
            Ok(client) => client.batch_execute(sql).await.is_ok(),
            Err(_) => false,
        }
    })
    .await;
}

#[tokio::test]
async fn an_idle_session_listens_and_has_its_statements_and_settings_on_the_next_primary() {
    let cluster = Cluster::start(2).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = quick(&cluster).await;
    let mut client = proxy.raw_login().await;
    succeed(&mut client, "LISTEN a; LISTEN \"B \"\"b\"").await;
    succeed(&mut client, "SET TimeZone TO 'Asia/Tokyo'").await;
    let insert = "INSERT INTO t VALUES ($1) RETURNING x, current_setting('TimeZone')";
    let prepared = client.ask(&[parse("s", insert), sync()].concat()).await;
    assert_eq!(tags(&prepared), "1Z", "{prepared:?}");
    cluster.wait_caught_up(0).await.unwrap();
    cluster.primary().crash().await.unwrap();
    cluster.node(1).promote().await.unwrap();
    cluster.node(2).follow(cluster.node(1)).await.unwrap();
    // It says nothing, and yet hears what is sent there.
    let warning = heard(&mut client).await;
    assert_eq!((warning.tag, warning.field(b'C').as_deref()), (b'N', Some("HW003")), "{warning:?}");
    written(&proxy, "NOTIFY a, 'one'").await;
    assert_eq!(heard(&mut client).await.tag, b'A');
    written(&proxy, "NOTIFY \"B \"\"b\", 'two'").await;
    assert_eq!(heard(&mut client).await.tag, b'A');
    let run = || [bind("s", &["42"]), execute(), sync()].concat();
    let mut answer = client.ask(&run()).await;
    if code(&answer).as_deref() == Some("HW001") {
        // What it had seen cannot be shown to be kept: said once.
        answer = client.ask(&run()).await;
    }
    let row = answer.iter().find(|message| message.tag == b'D').unwrap_or_else(|| panic!("{answer:?}"));
    assert_eq!(row.columns(), [Some("42".to_owned()), Some("Asia/Tokyo".to_owned())]);
    assert_eq!(cluster.node(1).query_text("SELECT x FROM t").await.unwrap(), "42");
    // It is still the session's own to stop.
    succeed(&mut client, "UNLISTEN *").await;
    written(&proxy, "NOTIFY a, 'three'").await;
    assert!(!tags(&succeed(&mut client, "SELECT 1").await).contains('A'));
}

#[tokio::test]
async fn a_listener_whose_server_restarts_listens_again_also_by_its_next_statement() {
    let cluster = Cluster::start(0).await;
    let proxy = quick(&cluster).await;
    let (mut idle, mut busy) = (proxy.raw_login().await, proxy.raw_login().await);
    succeed(&mut idle, "LISTEN a").await;
    for round in 0..3 {
        succeed(&mut busy, "LISTEN a").await;
        cluster.primary().stop_fast().await.unwrap();
        eventually("both are let go", || async {
            proxy.metrics().await.sum("highwater_pinned_sessions", &[]) == 0.0
        })
        .await;
        busy.send(&query(&format!("SELECT pg_notify('a', '{round}')"))).await;
        cluster.primary().start().await.unwrap();
        let mut answer = busy.read_ready().await;
        if code(&answer).as_deref() == Some("HW001") {
            // The server has begun anew: what was acknowledged cannot be shown to be there.
            answer = busy.ask(&query(&format!("SELECT pg_notify('a', '{round}')"))).await;
        }
        // It has listened before it notified.
        assert_eq!((code(&answer), tags(&answer).matches('A').count()), (None, 1), "{answer:?}");
        let mut warning = heard(&mut idle).await;
        if warning.field(b'C').as_deref() == Some("HW001") {
            // A restart within a second cannot be told from a crash.
            warning = heard(&mut idle).await;
        }
        assert_eq!((warning.tag, warning.field(b'C').as_deref()), (b'N', Some("HW003")), "{warning:?}");
        // From then on it misses nothing.
        succeed(&mut busy, "NOTIFY a, 'last'").await;
        while !heard(&mut idle).await.body.ends_with(b"last\0") {}
    }
    succeed(&mut idle, "UNLISTEN *").await;
}

#[tokio::test]
async fn a_transaction_or_state_that_is_lost_with_its_server_ends_the_session() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = quick(&cluster).await;
    for state in [
        "BEGIN; INSERT INTO t VALUES (1)",
        "CREATE TEMP TABLE mine (x int)",
        "LISTEN a; PREPARE p AS SELECT 1; SELECT pg_advisory_lock(1)",
    ] {
        let mut client = proxy.raw_login().await;
        succeed(&mut client, state).await;
        cluster.link(0).cut();
        let words = client.read_to_end().await;
        assert_eq!(code(&words).as_deref(), Some("57P01"), "{state}: {words:?}");
        cluster.link(0).heal();
        written(&proxy, "INSERT INTO t VALUES (2)").await;
    }
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_said_to_be_unknown() {
    let cluster = Cluster::start(0).await;
    cluster
        .set_up(
            "CREATE TABLE t (x int);
             CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql
                 AS $$ BEGIN PERFORM pg_sleep(3600); RETURN NULL; END $$;
             CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION wait()",
        )
        .await;
    let proxy = quick(&cluster).await;
    let extended = [parse("", "END"), bind("", &[]), execute(), sync()].concat();
    // Behind a ROLLBACK in the same pipeline a write is a transaction of its own.
    let run = |sql: &str| [parse("", sql), bind("", &[]), execute()].concat();
    let behind = [run("ROLLBACK"), run("INSERT INTO t VALUES (2)"), sync()].concat();
    let several = query("SELECT 1; COMMIT");
    for commit in [query("COMMIT"), several, query("PREPARE TRANSACTION 'x'"), extended, behind] {
        let mut client = proxy.raw_login().await;
        succeed(&mut client, "BEGIN").await;
        succeed(&mut client, "INSERT INTO t VALUES (1)").await;
        client.send(&commit).await;
        let sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        cluster.primary().wait_for(sleeps, "1").await.unwrap();
        cluster.link(0).cut();
        let answer = client.read_ready().await;
        assert_eq!(code(&answer).as_deref(), Some("08007"), "{answer:?}");
        cluster.link(0).heal();
        let end =
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        cluster.primary().query_text(end).await.unwrap();
        written(&proxy, "SELECT 1").await;
        // The session has gone on, outside the transaction.
        assert_eq!(answer.last().unwrap().body, b"I");
        let answer = succeed(&mut client, "SHOW transaction_read_only").await;
        assert_eq!(answer.last().unwrap().body, b"I");
    }
}

#[tokio::test]
async fn a_commit_that_no_synchronous_replica_has_is_no_success() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = quick(&cluster).await;
    let mut client = proxy.raw_login().await;
    succeed(&mut client, "INSERT INTO t VALUES (0)").await;
    cluster.primary().set("synchronous_standby_names", "nobody").await.unwrap();
    let extended = |sql: &str| [parse("", sql), bind("", &[]), execute(), sync()].concat();
    let units = [
        (vec![], query("INSERT INTO t VALUES (1)"), "EZ"),
        (vec!["BEGIN", "INSERT INTO t VALUES (1)"], query("COMMIT"), "EZ"),
        (vec![], extended("INSERT INTO t VALUES (1)"), "12CEZ"),
        (vec!["BEGIN", "INSERT INTO t VALUES (1)"], extended("COMMIT"), "12EZ"),
        (vec![], query("INSERT INTO t VALUES (1); INSERT INTO t VALUES (1)"), "CEZ"),
    ];
    for (before, unit, expected) in units {
        for sql in before {
            succeed(&mut client, sql).await;
        }
        client.send(&unit).await;
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        cluster.primary().wait_for(waits, "1").await.unwrap();
        let cancel =
            "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        cluster.primary().query_text(cancel).await.unwrap();
        let answer = client.read_ready().await;
        let error = answer.iter().find(|message| message.tag == b'E');
        assert_eq!(error.and_then(|e| e.field(b'C')).as_deref(), Some("08007"), "{answer:?}");
        // By the extended protocol the command was done before the commit.
        assert!(tags(&answer) == expected || tags(&answer) == expected.replace("2E", "2CE"), "{answer:?}");
        assert_eq!(answer.last().unwrap().body, b"I");
    }
    cluster.primary().set("synchronous_standby_names", "").await.unwrap();
    // The session goes on, and sees what it did.
    let answer = succeed(&mut client, "SELECT count(*) FROM t").await;
    assert_eq!(answer[1].columns()[0].as_deref(), Some("7"));
}

/// What a session is told of a commit that a crash took (nobody had waited for the disk), when the proxy could not
/// look at the primary between that crash and `crashes - 1` more, and others have written past its place meanwhile.
async fn told_of_a_crash_unseen(crashes: usize) {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let primary = cluster.primary();
    primary.set("wal_writer_delay", "10s").await.unwrap();
    let overrides = &format!("{QUICK}\nconsistency: {{ on_stale: error, catch_up_wait: 50ms }}");
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let mut client = proxy.raw_login().await;
    succeed(&mut client, "SET synchronous_commit = off").await;
    let observer = proxy.connect().await;
    eventually("reads reach the replica", || async {
        observer.batch_execute("SELECT count(*) FROM t WHERE x = 1").await.unwrap();
        let labels = [("node", cluster.node(1).name()), ("class", "read")];
        proxy.metrics().await.sum("highwater_statements_total", &labels) > 0.0
    })
    .await;
    let control = &cluster.roles().control.user;
    primary.execute(&format!("ALTER ROLE {control} NOLOGIN")).await.unwrap();
    succeed(&mut client, "INSERT INTO t VALUES (1)").await;
    // Its place is known now, and is part of what the session asks for.
    succeed(&mut client, "SHOW highwater.token").await;
    for _ in 0..crashes {
        primary.crash().await.unwrap();
        primary.start().await.unwrap();
        primary.execute("INSERT INTO t SELECT generate_series(2, 1000)").await.unwrap();
    }
    assert_eq!(
        primary.query_text("SELECT count(*) FROM t WHERE x = 1").await.unwrap(),
        "0",
        "it was not lost"
    );
    cluster.wait_caught_up(0).await.unwrap();
    let read = "SELECT count(*) FROM t WHERE x = 1";
    if crashes == 1 {
        // The replica is past that place, in another log.
        let replica = [("node", cluster.node(1).name()), ("role", "replica")];
        eventually("the replica is in use", || async {
            proxy.metrics().await.sum("highwater_node_role", &replica) == 1.0
        })
        .await;
        let answer = client.ask(&query(read)).await;
        assert!(code(&answer).is_some(), "{answer:?}");
    }
    primary.execute(&format!("ALTER ROLE {control} LOGIN")).await.unwrap();
    crash_is_seen(&proxy).await;
    let answer = client.ask(&query(read)).await;
    assert!(losses(&answer) > 0, "{answer:?}");
}

#[tokio::test]
async fn a_replica_that_follows_a_crashed_primary_shows_no_session_less_than_it_wrote_untold() {
    told_of_a_crash_unseen(1).await;
}

#[tokio::test]
async fn what_a_crash_took_is_told_also_if_another_crash_came_before_anybody_looked() {
    told_of_a_crash_unseen(2).await;
}

/// Its connections have ended before they could be told; whoever takes the name up again is.
#[tokio::test]
async fn what_a_named_session_has_lost_is_told_to_the_next_connection_that_names_it_and_to_one_only() {
    let (cluster, proxy, client) = a_named_session_that_has_written().await;
    drop(client);
    cluster.primary().crash().await.unwrap();
    cluster.primary().start().await.unwrap();
    crash_is_seen(&proxy).await;

    // No message but the two answers, of which one may be an error: whether the write is known to be lost, or only may be,
    // depends on whether it had a place by then.
    for told in [true, false] {
        let mut next = proxy.raw_login().await;
        let mut heard = next.ask(&query(NAME)).await;
        heard.extend(next.ask(&query("SELECT count(*) FROM t")).await);
        assert_eq!(losses(&heard), usize::from(told), "{heard:?}");
        let answer = succeed(&mut next, "SELECT count(*) FROM t").await;
        assert_eq!(answer[1].columns()[0].as_deref(), Some("0"), "it was not lost");
    }
}

/// That one of them was sent a word says nothing until it goes on: its connection may have broken first.
#[tokio::test]
async fn who_joins_a_named_session_is_told_what_it_lost_until_another_of_it_has_gone_on_after_being_told() {
    let (cluster, proxy, mut first) = a_named_session_that_has_written().await;
    cluster.primary().crash().await.unwrap();
    cluster.primary().start().await.unwrap();
    crash_is_seen(&proxy).await;

    let read = query("SELECT count(*) FROM t");
    assert_eq!(losses(&first.ask(&read).await), 1);
    // What became of the first nobody knows.
    let mut second = proxy.raw_login().await;
    let mut heard = second.ask(&query(NAME)).await;
    heard.extend(second.ask(&read).await);
    assert_eq!(losses(&heard), 1, "{heard:?}");
    // Now somebody has heard of it.
    assert_eq!(losses(&first.ask(&read).await), 0);
    let mut third = proxy.raw_login().await;
    heard = third.ask(&query(NAME)).await;
    heard.extend(third.ask(&read).await);
    assert_eq!(losses(&heard), 0, "{heard:?}");
}

/// WAL is written in pages, so a crash tears the record that runs into one that was not. Recovery goes on at that page's
/// start, and its checkpoint comes to lie behind where the torn record had ended.
#[tokio::test]
async fn a_commit_that_a_crash_tears_at_the_end_of_a_page_is_told_as_lost() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let primary = cluster.primary();
    primary.set("wal_writer_delay", "10s").await.unwrap();
    primary.set("autovacuum", "off").await.unwrap();
    let proxy = quick(&cluster).await;
    let mut client = proxy.raw_login().await;
    succeed(&mut client, "SET synchronous_commit = off").await;
    let page = Page { admin: primary.admin().await.unwrap() };
    for _ in 0..10 {
        // What both write is measured here; the first change of a table's page writes that whole.
        succeed(&mut client, "INSERT INTO t VALUES (0)").await;
        let filler = page.grows_by(page.fill(1000)).await;
        let insert = page.grows_by(succeed(&mut client, "INSERT INTO t VALUES (0)")).await;
        let (Some(filler), Some(insert)) = (filler, insert) else { continue };
        // A commit takes 34 bytes, and so begins 40 before the end: 16 of them are to be in the page.
        let aim = PAGE - 16 - (insert - 40);
        while page.at().await != aim {
            match aim - page.at().await - (filler - 1000) {
                bytes @ 300.. => page.fill(bytes).await,
                _ => page.fill(3000).await,
            }
        }
        succeed(&mut client, "INSERT INTO t VALUES (1)").await;
        // Something else may have been written between.
        if !(25..=72).contains(&page.at().await) {
            continue;
        }
        // Its place is known from now on.
        succeed(&mut client, "SHOW highwater.token").await;
        // Where the primary was not asked for anything shortly before, its log's end is not what decides.
        let asking = proxy.connect_as("app", proxy.app()).await.unwrap();
        asking.batch_execute("SET highwater.consistency = 'strong'").await.unwrap();
        let asks = async {
            while asking.batch_execute("SELECT 1").await.is_ok() {}
            std::future::pending::<()>().await;
        };
        tokio::select! {
            crashed = primary.crash_backend() => crashed.unwrap(),
            () = asks => {}
        }
        crash_is_seen(&proxy).await;
        let answer = client.ask(&query("SELECT count(*) FROM t WHERE x = 1")).await;
        let told = losses(&answer) > 0;
        let left = primary.query_text("SELECT count(*) FROM t WHERE x = 1").await.unwrap();
        assert_eq!((left.as_str(), told), ("0", true), "{answer:?}");
        return;
    }
    panic!("no record came to lie across the end of a page");
}

const PAGE: i64 = 8192;

/// The page of WAL that is written to.
struct Page {
    admin: tokio_postgres::Client,
}

impl Page {
    /// Where in it the next record begins.
    async fn at(&self) -> i64 {
        let sql = "SELECT mod(pg_current_wal_insert_lsn() - '0/0', 8192)::int8";
        self.admin.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Writes a record of a little more than `bytes`, which nobody reads.
    async fn fill(&self, bytes: i64) {
        let sql = format!("SELECT pg_logical_emit_message(false, '', repeat('x', {bytes}))");
        self.admin.batch_execute(&sql).await.unwrap();
    }

    /// By how much `write` fills it; `None`: it went on to the next.
    async fn grows_by<T>(&self, write: impl Future<Output = T>) -> Option<i64> {
        let before = self.at().await;
        write.await;
        Some(self.at().await - before).filter(|grown| *grown > 0)
    }
}

#[tokio::test]
async fn a_write_whose_backend_loses_its_server_in_the_middle_of_it_is_in_doubt() {
    let cluster = Cluster::start(0).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = quick(&cluster).await;
    let mut client = proxy.raw_login().await;
    succeed(&mut client, "BEGIN").await;
    succeed(&mut client, "INSERT INTO t VALUES (1)").await;
    // The backend waits for what comes behind the commit: it notices at once that its postmaster is dead, and says 57P01.
    client.send(&[parse("", "COMMIT"), bind("", &[]), execute(), flush()].concat()).await;
    for tag in *b"12C" {
        assert_eq!(heard(&mut client).await.tag, tag);
    }
    cluster.primary().crash_postmaster().await.unwrap();
    let error = heard(&mut client).await;
    assert_eq!((error.tag, error.field(b'C').as_deref()), (b'E', Some("08007")), "{error:?}");
}
