//! A session is bound to one backend as long as there is a reason for it, and not longer; and what it had
//! there is nobody else's afterwards.

use crate::fixture::*;

/// Why a session is pinned, what makes it so, what shows that the state is there (`t`), and what ends it.
struct Reason {
    label: &'static str,
    make: &'static str,
    shows: &'static str,
    end: &'static str,
}

const REASONS: &[Reason] = &[
    Reason {
        label: "temporary_table",
        make: "CREATE TEMP TABLE mine AS SELECT 1 AS x",
        shows: "SELECT to_regclass('pg_temp.mine') IS NOT NULL",
        end: "DROP TABLE mine",
    },
    Reason {
        label: "temporary_table",
        make: "SELECT 1 AS x INTO TEMP mine",
        shows: "SELECT to_regclass('pg_temp.mine') IS NOT NULL",
        end: "DISCARD TEMP",
    },
    Reason {
        label: "temporary_table",
        make: "CREATE TABLE pg_temp.mine (x int)",
        shows: "SELECT to_regclass('pg_temp.mine') IS NOT NULL",
        end: "DO $$ BEGIN DROP TABLE mine; END $$",
    },
    Reason {
        label: "temporary_table",
        make: "CREATE TEMP VIEW mine AS SELECT 1",
        shows: "SELECT to_regclass('pg_temp.mine') IS NOT NULL",
        end: "DROP VIEW mine",
    },
    Reason {
        label: "temporary_table",
        make: "CREATE TEMP SEQUENCE mine",
        shows: "SELECT to_regclass('pg_temp.mine') IS NOT NULL",
        end: "BEGIN; DROP SEQUENCE mine; COMMIT",
    },
    Reason {
        label: "temporary_table",
        make: "CREATE FUNCTION pg_temp.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        shows: "SELECT to_regproc('pg_temp.mine') IS NOT NULL",
        end: "DROP FUNCTION pg_temp.mine()",
    },
    Reason {
        label: "temporary_table",
        make: "DO $$ BEGIN CREATE TEMP TABLE mine (x int); END $$",
        shows: "SELECT to_regclass('pg_temp.mine') IS NOT NULL",
        end: "DISCARD ALL",
    },
    Reason {
        label: "listen",
        make: "LISTEN news",
        shows: "SELECT count(*) = 1 FROM pg_listening_channels()",
        end: "UNLISTEN news",
    },
    Reason {
        label: "listen",
        make: "BEGIN; LISTEN news; COMMIT",
        shows: "SELECT count(*) = 1 FROM pg_listening_channels()",
        end: "UNLISTEN *",
    },
    Reason {
        label: "hold_cursor",
        make: "DECLARE held CURSOR WITH HOLD FOR SELECT generate_series(1, 9)",
        shows: "SELECT count(*) = 1 FROM pg_cursors WHERE name = 'held'",
        end: "CLOSE held",
    },
    Reason {
        label: "hold_cursor",
        make: "BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT 1; COMMIT",
        shows: "SELECT count(*) = 1 FROM pg_cursors WHERE name = 'held'",
        end: "CLOSE ALL",
    },
    Reason {
        label: "advisory_lock",
        make: "SELECT pg_advisory_lock(7)",
        shows: "SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid_of_mine()",
        end: "SELECT pg_advisory_unlock(7)",
    },
    Reason {
        label: "advisory_lock",
        make: "SELECT pg_try_advisory_lock_shared(7), pg_advisory_lock(8)",
        shows: "SELECT count(*) = 2 FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid_of_mine()",
        end: "SELECT pg_advisory_unlock_all()",
    },
];

/// Two backends a node, and a look at `pg_backend_pid()` that does not pin.
async fn small_pool() -> (Cluster, Proxy) {
    let cluster = Cluster::start(1).await;
    cluster
        .set_up(
            "CREATE FUNCTION pg_backend_pid_of_mine() RETURNS int LANGUAGE sql AS 'SELECT pg_backend_pid()'",
        )
        .await;
    let options = ProxyOptions { overrides: "pool: { size: 2 }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    (cluster, proxy)
}

fn first_value(answer: &[Message]) -> Option<String> {
    answer.iter().find(|message| message.tag == b'D').and_then(|row| row.columns()[0].clone())
}

async fn value(client: &mut RawClient, sql: &str) -> Option<String> {
    first_value(&client.ask(&query(sql)).await)
}

async fn succeed(client: &mut RawClient, sql: &str) {
    let answer = client.ask(&query(sql)).await;
    assert!(!tags(&answer).contains('E'), "{sql}: {answer:?}");
}

/// How many sessions are pinned, all in all and for one reason.
async fn pinned(proxy: &Proxy, reason: &str) -> (f64, f64) {
    let metrics = proxy.metrics().await;
    (
        metrics.sum("highwater_pinned_sessions", &[]),
        metrics.sum("highwater_pin_reasons", &[("reason", reason)]),
    )
}

async fn never_pinned(proxy: &Proxy, why: &str) {
    eventually(why, || async { pinned(proxy, "any").await.0 == 0.0 }).await;
}

#[tokio::test]
async fn a_pin_lasts_as_long_as_its_reason_and_leaves_nothing() {
    let (_cluster, proxy) = small_pool().await;
    for reason in REASONS {
        let mut owner = proxy.raw_login().await;
        succeed(&mut owner, reason.make).await;
        for _ in 0..3 {
            assert_eq!(value(&mut owner, reason.shows).await.as_deref(), Some("t"), "{}", reason.make);
            let mut other = proxy.raw_login().await;
            assert_eq!(value(&mut other, reason.shows).await.as_deref(), Some("f"), "{}", reason.make);
        }
        eventually(reason.make, || async { pinned(&proxy, reason.label).await == (1.0, 1.0) }).await;
        succeed(&mut owner, reason.end).await;
        never_pinned(&proxy, reason.end).await;
        eventually(reason.end, || async { pinned(&proxy, reason.label).await == (0.0, 0.0) }).await;
        // Whoever gets one of the two backends now finds nothing, and both are to be had at once.
        let (mut one, mut two) = (proxy.raw_login().await, proxy.raw_login().await);
        succeed(&mut one, "BEGIN").await;
        succeed(&mut two, "BEGIN").await;
        for client in [&mut one, &mut two] {
            assert_eq!(value(client, reason.shows).await.as_deref(), Some("f"), "after {}", reason.end);
        }
    }
}

#[tokio::test]
async fn what_was_rolled_back_or_has_failed_does_not_pin() {
    let (_cluster, proxy) = small_pool().await;
    let mut client = proxy.raw_login().await;
    for sql in [
        "BEGIN; CREATE TEMP TABLE mine (x int); ROLLBACK",
        "BEGIN; LISTEN news; ROLLBACK",
        "BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT 1; ROLLBACK",
        "BEGIN; CREATE TEMP TABLE mine (x int) ON COMMIT DROP; COMMIT",
        "CREATE TEMP TABLE mine (x int) ON COMMIT DROP",
        "LISTEN news; UNLISTEN news",
        "SELECT pg_advisory_lock(1), pg_advisory_unlock(1)",
        "SELECT pg_advisory_unlock(1)",
        "CREATE TEMP TABLE mine (x int, x int)",
        "CREATE TEMP TABLE mine AS SELECT 1/0",
        "LISTEN",
        "LISTEN a; SELECT 1/0",
        "DECLARE held CURSOR WITH HOLD FOR SELECT 1/0",
        "EXECUTE nobody_prepared_this",
        "DEALLOCATE nobody_prepared_this",
        "SET no_such_setting = 1",
        "SELECT pg_export_snapshot()",
        "SET CONSTRAINTS ALL DEFERRED",
    ] {
        // As one message, and as an application sends it.
        client.ask(&query(sql)).await;
        never_pinned(&proxy, sql).await;
        // (There the failure would not take the LISTEN with it.)
        for part in sql.split("; ").filter(|_| !sql.starts_with("LISTEN a;")) {
            client.ask(&query(part)).await;
        }
        never_pinned(&proxy, sql).await;
        assert_eq!(pinned(&proxy, "any").await.0, 0.0, "{sql}");
    }
    // A setting, with its transaction.
    for sql in ["BEGIN", "SET work_mem = '9MB'", "ROLLBACK"] {
        succeed(&mut client, sql).await;
    }
    never_pinned(&proxy, "SET was rolled back").await;
    // A lock that somebody else has: in vain.
    let mut owner = proxy.raw_login().await;
    succeed(&mut owner, "SELECT pg_advisory_lock(1)").await;
    assert_eq!(value(&mut client, "SELECT pg_try_advisory_lock(1)").await.as_deref(), Some("f"));
    eventually("only the owner is pinned", || async { pinned(&proxy, "advisory_lock").await == (1.0, 1.0) })
        .await;
}

#[tokio::test]
async fn locks_nest_and_survive_a_rollback() {
    let (_cluster, proxy) = small_pool().await;
    let (mut owner, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    for sql in [
        "SELECT pg_advisory_lock(5)",
        "BEGIN",
        "SELECT pg_advisory_lock(5)",
        "ROLLBACK",
        "SELECT pg_advisory_unlock(5)",
    ] {
        succeed(&mut owner, sql).await;
        assert_eq!(
            value(&mut other, "SELECT pg_try_advisory_xact_lock(5)").await.as_deref(),
            Some("f"),
            "{sql}"
        );
    }
    succeed(&mut owner, "SELECT pg_advisory_unlock(5)").await;
    assert_eq!(value(&mut other, "SELECT pg_try_advisory_xact_lock(5)").await.as_deref(), Some("t"));
    never_pinned(&proxy, "the lock is let go of").await;
    // One that a client which leaves had is free, too.
    succeed(&mut owner, "SELECT pg_advisory_lock(5)").await;
    owner.try_send(&message(b'X', b"")).await.unwrap();
    owner.read_to_end().await;
    eventually("the lock of a client that left is free", || async {
        let mut next = proxy.raw_login().await;
        value(&mut next, "SELECT pg_try_advisory_xact_lock(5)").await.as_deref() == Some("t")
    })
    .await;
}

#[tokio::test]
async fn two_reasons_end_one_by_one() {
    let (_cluster, proxy) = small_pool().await;
    let mut client = proxy.raw_login().await;
    succeed(&mut client, "CREATE TEMP TABLE mine (x int); LISTEN news").await;
    eventually("both are known", || async {
        pinned(&proxy, "listen").await == (1.0, 1.0) && pinned(&proxy, "temporary_table").await.1 == 1.0
    })
    .await;
    succeed(&mut client, "UNLISTEN *").await;
    eventually("one is left", || async {
        pinned(&proxy, "listen").await == (1.0, 0.0) && pinned(&proxy, "temporary_table").await.1 == 1.0
    })
    .await;
    succeed(&mut client, "DROP TABLE mine").await;
    never_pinned(&proxy, "none is left").await;
}

#[tokio::test]
async fn what_one_statement_leaves_ends_each_in_its_time() {
    let (cluster, proxy) = small_pool().await;
    cluster
        .set_up(
            "CREATE FUNCTION sets() RETURNS int LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM set_config('app.x', 'y', false); RETURN 1; END $$;
             CREATE FUNCTION locks() RETURNS int LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_advisory_lock(9); RETURN 1; END $$",
        )
        .await;
    let free = "SELECT pg_try_advisory_xact_lock(9)";
    for (make, end) in [
        ("CREATE TEMP TABLE mine AS SELECT pg_advisory_lock(9)::text", "DROP TABLE mine"),
        ("CREATE TEMP TABLE mine AS SELECT locks()", "DROP TABLE mine"),
        ("DECLARE held CURSOR WITH HOLD FOR SELECT locks()", "CLOSE held"),
        ("LISTEN news; SELECT pg_advisory_lock(9)", "UNLISTEN news"),
    ] {
        let (mut owner, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
        succeed(&mut owner, make).await;
        succeed(&mut owner, end).await;
        eventually(make, || async { pinned(&proxy, "advisory_lock").await == (1.0, 1.0) }).await;
        assert_eq!(value(&mut other, free).await.as_deref(), Some("f"), "{make}");
        succeed(&mut owner, "SELECT pg_advisory_unlock(9)").await;
        never_pinned(&proxy, make).await;
        assert_eq!(value(&mut other, free).await.as_deref(), Some("t"), "{make}");
    }
    // What was set is undone; the process of which the client knows the id is its own still.
    eventually("the function is known to set", || async {
        let mut client = proxy.raw_login().await;
        succeed(&mut client, "SELECT sets()").await;
        let known = pinned(&proxy, "setting").await.1 == 1.0;
        succeed(&mut client, "DISCARD ALL").await;
        known
    })
    .await;
    let (mut owner, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    succeed(&mut owner, "BEGIN").await;
    let pid = value(&mut owner, "SELECT pg_backend_pid() + 0 * sets()").await;
    succeed(&mut owner, "ROLLBACK").await;
    for _ in 0..3 {
        assert_ne!(value(&mut other, "SELECT pg_backend_pid()").await, pid);
        assert_eq!(value(&mut owner, "SELECT pg_backend_pid()").await, pid);
    }
}

#[tokio::test]
async fn what_the_code_of_a_table_leaves_is_its_sessions_and_gone_with_it() {
    let cluster = Cluster::start_logging(1).await;
    cluster
        .set_up(
            "CREATE FUNCTION locks(int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
                 $$ BEGIN PERFORM pg_advisory_lock(9); RETURN $1; END $$;
             CREATE FUNCTION locks() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM locks(1); RETURN NEW; END $$;
             CREATE FUNCTION makes() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN CREATE TEMP TABLE made (x int); RETURN NEW; END $$;
             CREATE TABLE triggered (a int);
             CREATE TRIGGER locks AFTER INSERT ON triggered FOR EACH ROW EXECUTE FUNCTION locks();
             CREATE TABLE deferred (a int);
             CREATE CONSTRAINT TRIGGER locks AFTER INSERT ON deferred DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION locks();
             CREATE TABLE made_by (a int);
             CREATE TRIGGER makes AFTER INSERT ON made_by FOR EACH ROW EXECUTE FUNCTION makes();
             CREATE TABLE defaulted (a int DEFAULT locks(1));
             CREATE TABLE checked (a int CHECK (locks(a) > 0));
             CREATE TABLE generated (a int, b int GENERATED ALWAYS AS (locks(a)) STORED);
             CREATE TABLE indexed (a int); CREATE INDEX ON indexed (locks(a));
             CREATE TABLE ruled (a int); CREATE RULE also AS ON INSERT TO ruled DO ALSO SELECT locks(1);
             CREATE TABLE ruled_by (a int);
             CREATE RULE also AS ON INSERT TO ruled_by DO ALSO SELECT pg_advisory_lock(9);
             CREATE VIEW over AS SELECT a FROM triggered;
             CREATE TABLE plain (x int)",
        )
        .await;
    let options = ProxyOptions { overrides: "pool: { size: 2 }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let reader = proxy.connect().await;
    reads_reach_replicas(&cluster, &reader, "SELECT x AS loaded FROM plain").await;
    let locked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    let run = |sql: &'static str| (query(sql), sql);
    let bound = |sql: &'static str| ([parse("", sql), bind("", &[]), execute(), sync()].concat(), sql);
    for ((unit, sql), label) in [
        (run("INSERT INTO triggered VALUES (1)"), "advisory_lock"),
        (bound("INSERT INTO triggered VALUES (1)"), "advisory_lock"),
        (run("INSERT INTO over VALUES (1)"), "advisory_lock"),
        (run("BEGIN; INSERT INTO deferred VALUES (1); COMMIT"), "advisory_lock"),
        (run("INSERT INTO made_by VALUES (1)"), "temporary_table"),
        (run("INSERT INTO defaulted DEFAULT VALUES"), "advisory_lock"),
        (run("INSERT INTO checked VALUES (1)"), "advisory_lock"),
        (run("INSERT INTO generated VALUES (1)"), "advisory_lock"),
        (run("INSERT INTO indexed VALUES (1)"), "advisory_lock"),
        (run("INSERT INTO ruled VALUES (1)"), "advisory_lock"),
        (run("INSERT INTO ruled_by VALUES (1)"), "advisory_lock"),
    ] {
        let mut owner = proxy.raw_login().await;
        let answer = owner.ask(&unit).await;
        assert!(!tags(&answer).contains('E'), "{sql}: {answer:?}");
        eventually(sql, || async { pinned(&proxy, label).await == (1.0, 1.0) }).await;
        let mut other = proxy.raw_login().await;
        let theirs = value(&mut other, "SELECT to_regclass('pg_temp.made') IS NULL").await;
        assert_eq!(theirs.as_deref(), Some("t"), "{sql}");
        // It ends with its session, on whatever backend nobody asks for.
        owner.try_send(&message(b'X', b"")).await.unwrap();
        owner.read_to_end().await;
        cluster.primary().wait_for(locked, "0").await.unwrap();
        never_pinned(&proxy, sql).await;
    }
}

#[tokio::test]
async fn what_code_leaves_ends_with_its_session_though_nobody_wants_its_backend() {
    let (cluster, proxy) = small_pool().await;
    cluster.set_up("CREATE PROCEDURE locks() LANGUAGE sql AS 'SELECT pg_advisory_lock(9)'").await;
    let locked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    for sql in ["CALL locks()", "DO $$ BEGIN PERFORM pg_advisory_lock(9); END $$"] {
        let mut owner = proxy.raw_login().await;
        succeed(&mut owner, sql).await;
        assert_eq!(cluster.primary().query_text(locked).await.unwrap(), "1", "{sql}");
        owner.try_send(&message(b'X', b"")).await.unwrap();
        owner.read_to_end().await;
        cluster.primary().wait_for(locked, "0").await.unwrap();
    }
}

#[tokio::test]
async fn a_temporary_name_shadows_a_permanent_one_while_it_is_there() {
    let (cluster, proxy) = small_pool().await;
    cluster.set_up("CREATE TABLE t AS SELECT 'permanent' AS x").await;
    let (mut owner, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    assert_eq!(value(&mut owner, "SELECT x FROM t").await.as_deref(), Some("permanent"));
    succeed(&mut owner, "CREATE TEMP TABLE t AS SELECT 'temporary' AS x").await;
    for _ in 0..5 {
        assert_eq!(value(&mut owner, "SELECT x FROM t").await.as_deref(), Some("temporary"));
        assert_eq!(value(&mut other, "SELECT x FROM t").await.as_deref(), Some("permanent"));
    }
    succeed(&mut owner, "DROP TABLE t").await;
    never_pinned(&proxy, "the temporary table is gone").await;
    assert_eq!(value(&mut owner, "SELECT x FROM t").await.as_deref(), Some("permanent"));

    succeed(&mut owner, "CREATE TEMP TABLE kept (x int) ON COMMIT DELETE ROWS").await;
    succeed(&mut owner, "BEGIN").await;
    succeed(&mut owner, "INSERT INTO kept VALUES (1)").await;
    assert_eq!(value(&mut owner, "SELECT count(*) FROM kept").await.as_deref(), Some("1"));
    succeed(&mut owner, "COMMIT").await;
    assert_eq!(value(&mut owner, "SELECT count(*) FROM kept").await.as_deref(), Some("0"));
}

#[tokio::test]
async fn what_no_command_takes_from_a_process_ends_with_it() {
    let (cluster, proxy) = small_pool().await;
    // Loading what it likes, and connecting where it likes, is a superuser's.
    let superuser = cluster.roles().superuser.clone();
    let to_itself = format!(
        "SELECT dblink_connect('mine', 'host=127.0.0.1 port={} dbname=app user={} password={}')",
        cluster.primary().port(),
        superuser.user,
        superuser.password
    );
    let slot = "SELECT pg_create_physical_replication_slot('its_own', true, true)";
    let mut all = vec!["SELECT setseed(0.5)", "LOAD 'plpgsql'", slot];
    let available = "SELECT count(*) FROM pg_available_extensions WHERE name = 'dblink'";
    if cluster.primary().query_text(available).await.unwrap() == "1" {
        cluster.primary().execute("CREATE EXTENSION dblink").await.unwrap();
        all.push(&to_itself);
    } else {
        println!("skipped for want of dblink: its named connections");
    }
    let available = "SELECT count(*) FROM pg_available_extensions WHERE name = 'isn'";
    if cluster.primary().query_text(available).await.unwrap() == "1" {
        cluster.primary().execute("CREATE EXTENSION isn").await.unwrap();
        all.push("SELECT isn_weak(true)");
    } else {
        println!("skipped for want of isn: its weak mode");
    }
    for make in all {
        let mut owner = proxy.raw().await;
        owner.login("app", &superuser).await.unwrap();
        succeed(&mut owner, make).await;
        eventually(make, || async { pinned(&proxy, "process").await == (1.0, 1.0) }).await;
        let pid = value(&mut owner, "SELECT pg_backend_pid()").await.unwrap();
        // One server keeps it, too.
        succeed(&mut owner, "DISCARD ALL").await;
        assert_eq!(
            value(&mut owner, "SELECT pg_backend_pid()").await.as_deref(),
            Some(pid.as_str()),
            "{make}"
        );
        owner.try_send(&message(b'X', b"")).await.unwrap();
        owner.read_to_end().await;
        let alive = format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}");
        cluster.primary().wait_for(&alive, "0").await.unwrap();
        never_pinned(&proxy, make).await;
    }
}

#[tokio::test]
async fn a_seed_gives_the_same_numbers_as_on_one_server() {
    let (cluster, proxy) = small_pool().await;
    let mut direct = RawClient::connect(cluster.primary().port()).await;
    direct.login("app", proxy.app()).await.unwrap();
    let mut client = proxy.raw_login().await;
    for sql in ["SELECT setseed(0.25)", "SELECT random()", "SELECT random()", "SELECT random()"] {
        assert_eq!(value(&mut client, sql).await, value(&mut direct, sql).await, "{sql}");
    }
}

#[tokio::test]
async fn statements_outlive_a_pin_and_deallocated_ones_do_not() {
    let (_cluster, proxy) = small_pool().await;
    let mut client = proxy.raw_login().await;
    let prepare = |name: &str, sql: &str| [parse(name, sql), sync()].concat();
    let run = |name: &str| [bind(name, &[]), execute(), sync()].concat();
    assert_eq!(tags(&client.ask(&prepare("before", "SELECT 1")).await), "1Z");
    succeed(&mut client, "CREATE TEMP TABLE mine (x int)").await;
    assert_eq!(tags(&client.ask(&prepare("during", "SELECT 2")).await), "1Z");
    assert_eq!(tags(&client.ask(&prepare("gone", "SELECT 3")).await), "1Z");
    assert_eq!(tags(&client.ask(&run("before")).await), "2DCZ");
    assert_eq!(tags(&client.ask(&run("gone")).await), "2DCZ");
    succeed(&mut client, "DEALLOCATE gone").await;
    succeed(&mut client, "DROP TABLE mine").await;
    never_pinned(&proxy, "the table is dropped").await;
    for name in ["before", "during"] {
        assert_eq!(tags(&client.ask(&run(name)).await), "2DCZ", "{name}");
    }
    assert_eq!(client.ask(&run("gone")).await[0].field(b'C').as_deref(), Some("26000"));
    assert_eq!(tags(&client.ask(&prepare("gone", "SELECT 4")).await), "1Z");
    assert_eq!(first_value(&client.ask(&run("gone")).await).as_deref(), Some("4"));
    // SQL's PREPARE, and what takes it away.
    succeed(&mut client, "PREPARE sql AS SELECT 5").await;
    assert_eq!(value(&mut client, "EXECUTE sql").await.as_deref(), Some("5"));
    succeed(&mut client, "DEALLOCATE sql").await;
    never_pinned(&proxy, "the prepared statement is deallocated").await;
    for name in ["before", "during", "gone"] {
        assert_eq!(tags(&client.ask(&run(name)).await), "2DCZ", "{name}");
    }
}

#[tokio::test]
async fn a_look_that_fails_keeps_the_session_as_it_is() {
    let (cluster, proxy) = small_pool().await;
    let mut client = proxy.raw_login().await;
    succeed(&mut client, "SET lock_timeout = '50ms'").await;
    succeed(&mut client, "DECLARE held CURSOR WITH HOLD FOR SELECT 1").await;
    // The look needs this; CLOSE does not.
    let superuser = cluster.primary().connect("app", &cluster.roles().superuser).await.unwrap();
    superuser.batch_execute("BEGIN; LOCK TABLE pg_catalog.pg_depend").await.unwrap();
    succeed(&mut client, "CLOSE held").await;
    // Comes after the look, which has run into the session's own timeout.
    succeed(&mut client, "SHOW lock_timeout").await;
    assert_eq!(pinned(&proxy, "hold_cursor").await, (1.0, 1.0));
    superuser.batch_execute("ROLLBACK").await.unwrap();
    succeed(&mut client, "DISCARD ALL").await;
    never_pinned(&proxy, "all is discarded").await;
}

#[tokio::test]
async fn what_belongs_to_a_transaction_or_to_all_needs_no_pin() {
    let (cluster, proxy) = small_pool().await;
    cluster.set_up("CREATE TABLE t (x int PRIMARY KEY DEFERRABLE)").await;
    let (mut one, mut two) = (proxy.raw_login().await, proxy.raw_login().await);
    // A snapshot is imported by another session while its transaction lasts.
    succeed(&mut one, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    let snapshot = value(&mut one, "SELECT pg_export_snapshot()").await.unwrap();
    succeed(&mut two, "BEGIN ISOLATION LEVEL REPEATABLE READ").await;
    succeed(&mut two, &format!("SET TRANSACTION SNAPSHOT '{snapshot}'")).await;
    succeed(&mut two, "COMMIT").await;
    succeed(&mut one, "COMMIT").await;
    // A large object's descriptor.
    succeed(&mut one, "BEGIN").await;
    let oid = value(&mut one, "SELECT lo_create(0)").await.unwrap();
    let descriptor = value(&mut one, &format!("SELECT lo_open({oid}, 131072)")).await.unwrap();
    succeed(&mut one, &format!("SELECT lowrite({descriptor}, 'large')")).await;
    succeed(&mut one, "COMMIT").await;
    assert_eq!(
        value(&mut two, &format!("SELECT convert_from(lo_get({oid}), 'UTF8')")).await.as_deref(),
        Some("large")
    );
    // Deferred constraints.
    succeed(&mut one, "BEGIN").await;
    succeed(&mut one, "SET CONSTRAINTS ALL DEFERRED").await;
    succeed(&mut one, "INSERT INTO t VALUES (1)").await;
    succeed(&mut one, "INSERT INTO t VALUES (1)").await;
    let answer = one.ask(&query("COMMIT")).await;
    assert_eq!(answer[0].field(b'C').as_deref(), Some("23505"), "{answer:?}");
    // A prepared transaction is anybody's.
    let max: i32 =
        cluster.primary().query_text("SHOW max_prepared_transactions").await.unwrap().parse().unwrap();
    if max > 0 {
        succeed(&mut one, "BEGIN").await;
        succeed(&mut one, "INSERT INTO t VALUES (2)").await;
        succeed(&mut one, "PREPARE TRANSACTION 'both'").await;
        succeed(&mut two, "COMMIT PREPARED 'both'").await;
        assert_eq!(value(&mut one, "SELECT count(*) FROM t").await.as_deref(), Some("1"));
    }
    never_pinned(&proxy, "nothing of this pins").await;
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_pins_total", &[]), 0.0);
}

#[tokio::test]
async fn a_pool_held_by_pinned_sessions_is_said_to_be_full_in_time() {
    let cluster = Cluster::start(0).await;
    let options =
        ProxyOptions { overrides: "pool: { size: 2, query_wait_timeout: 300ms }", ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let (mut one, mut two) = (proxy.raw_login().await, proxy.raw_login().await);
    let mut three = proxy.raw_login().await;
    succeed(&mut one, "LISTEN a").await;
    succeed(&mut two, "LISTEN b").await;
    let answer = three.ask(&query("CREATE TABLE t (x int)")).await;
    assert_eq!(answer[0].field(b'C').as_deref(), Some("53300"), "{answer:?}");
    assert_eq!(tags(&answer), "EZ");
    succeed(&mut two, "UNLISTEN *").await;
    // It waits in line until the look is over.
    succeed(&mut three, "CREATE TABLE t (x int)").await;
}

#[tokio::test]
async fn what_code_has_done_for_good_before_it_failed_is_still_there() {
    let cluster = Cluster::start(0).await;
    cluster
        .set_up(
            "CREATE FUNCTION lock_and_fail() RETURNS void LANGUAGE plpgsql AS $$ BEGIN \
                PERFORM set_config('work_mem', '9MB', false); PERFORM pg_advisory_lock(77); RAISE 'no'; END $$; \
             CREATE PROCEDURE set_and_fail() LANGUAGE plpgsql AS $$ BEGIN \
                PERFORM set_config('work_mem', '7MB', false); COMMIT; \
                PERFORM set_config('work_mem', '8MB', false); RAISE 'no'; END $$",
        )
        .await;
    let proxy = Proxy::start(&cluster).await;
    let code = |messages: &[Message]| messages.iter().find(|m| m.tag == b'E').and_then(|m| m.field(b'C'));
    let of = |messages: &[Message]| {
        messages.iter().find(|m| m.tag == b'D').map(|m| m.columns()[0].clone().unwrap())
    };
    let work_mem = query("SHOW work_mem");
    let block = "DO $$ BEGIN PERFORM set_config('work_mem', '6MB', false); COMMIT; RAISE 'no'; END $$";
    for (does, expected) in [(block, "6MB"), ("CALL set_and_fail()", "7MB")] {
        // By Query, and by Parse.
        for bytes in [query(does), [parse("", does), bind("", &[]), execute(), sync()].concat()] {
            let mut client = proxy.raw_login().await;
            assert_eq!(code(&client.ask(&bytes).await).as_deref(), Some("P0001"), "{does}");
            assert_eq!(of(&client.ask(&work_mem).await).as_deref(), Some(expected), "{does}");
            // Not somebody else's.
            assert_eq!(of(&proxy.raw_login().await.ask(&work_mem).await).as_deref(), Some("4MB"), "{does}");
        }
    }
    let mut client = proxy.raw_login().await;
    let failed = client.ask(&query("SELECT lock_and_fail()")).await;
    assert_eq!(code(&failed).as_deref(), Some("P0001"));
    assert_eq!(of(&client.ask(&work_mem).await).as_deref(), Some("4MB"), "the setting was undone");
    let unlocked = client.ask(&query("SELECT pg_advisory_unlock(77)")).await;
    assert_eq!(of(&unlocked).as_deref(), Some("t"), "a session's lock is not: {unlocked:?}");
}

#[tokio::test]
async fn what_code_that_is_not_understood_makes_of_a_sessions_own_setting_stays_with_the_session() {
    let cluster = Cluster::start(0).await;
    cluster
        .set_up(
            "CREATE FUNCTION put_it(value text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN \
                EXECUTE 'SET work' || '_mem = ' || quote_literal(value); END $$",
        )
        .await;
    let proxy = Proxy::start(&cluster).await;
    let shown = |messages: &[Message]| {
        messages.iter().find(|m| m.tag == b'D').map(|m| m.columns()[0].clone().unwrap())
    };
    let (mut client, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    client.ask(&query("SET work_mem = '7MB'")).await;
    for (does, expected) in [
        ("SELECT put_it('5MB')", "5MB"),
        ("BEGIN; SELECT put_it('6MB'); COMMIT", "6MB"),
        ("BEGIN; SELECT put_it('9MB'); ROLLBACK", "6MB"),
    ] {
        client.ask(&query(does)).await;
        // The next backend is another one.
        other.ask(&query("BEGIN; SELECT 1")).await;
        assert_eq!(shown(&client.ask(&query("SHOW work_mem")).await).as_deref(), Some(expected), "{does}");
        assert_eq!(shown(&other.ask(&query("SHOW work_mem")).await).as_deref(), Some("4MB"), "{does}");
        other.ask(&query("COMMIT")).await;
    }
}
