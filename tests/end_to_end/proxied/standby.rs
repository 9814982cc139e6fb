//! `../standby.txt`, the table of what standbys do with statements that are not plain reads: each fact has a test, here or
//! elsewhere, and each statement in it runs where it must.

use std::collections::BTreeSet;
use std::path::Path;

use crate::fixture::*;

const TABLE: &str = include_str!("../standby.txt");

/// What a line of the table says of its statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    SetsUp,
    OnPrimary,
    OnPrimarySimple,
    OnReplica,
    ReadOnly,
}

struct Fact {
    text: &'static str,
    tests: Vec<&'static str>,
    lines: Vec<(Says, String)>,
}

fn facts() -> Vec<Fact> {
    let mut facts: Vec<Fact> = Vec::new();
    for line in TABLE.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(fact) = line.strip_prefix("- ") {
            let (text, tests) = fact.split_once(" | ").unwrap_or_else(|| panic!("no test: {line}"));
            facts.push(Fact { text, tests: tests.split(", ").collect(), lines: Vec::new() });
            continue;
        }
        let (mark, sql) = line.trim_start().split_once(' ').unwrap_or_else(|| panic!("what is {line}"));
        let says = match mark {
            "." => Says::SetsUp,
            ">" => Says::OnPrimary,
            ">>" => Says::OnPrimarySimple,
            "<" => Says::OnReplica,
            "r" => Says::ReadOnly,
            _ => panic!("what is {line}"),
        };
        facts.last_mut().unwrap().lines.push((says, sql.replace("{CR}", "\r")));
    }
    facts
}

#[test]
fn every_fact_has_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut facts_seen = BTreeSet::new();
    for fact in facts() {
        assert!(facts_seen.insert(fact.text), "twice: {}", fact.text);
        assert_eq!(fact.tests.contains(&"here"), !fact.lines.is_empty(), "{}", fact.text);
        for test in fact.tests.into_iter().filter(|test| *test != "here") {
            let (module, name) = test.rsplit_once("::").unwrap();
            let places = [
                format!("tests/end_to_end/proxied/{module}.rs"),
                format!("tests/end_to_end/{module}.rs"),
                format!("src/{module}.rs"),
            ];
            let source = places.iter().find_map(|place| std::fs::read_to_string(root.join(place)).ok());
            let source = source.unwrap_or_else(|| panic!("{test}: no such file"));
            let found =
                source.split(&format!("fn {name}(")).next().filter(|before| before.len() < source.len());
            let attribute = found.and_then(|before| before.trim_end().rsplit('\n').next().map(str::to_owned));
            let is_test = found.is_some_and(|before| {
                before
                    .rsplit("#[")
                    .next()
                    .is_some_and(|a| a.starts_with("test]") || a.starts_with("tokio::test"))
            });
            assert!(is_test, "{test}: no such test ({attribute:?})");
        }
    }
}

const OBJECTS: &str = "
    CREATE TABLE t (x int, y int);
    INSERT INTO t VALUES (1), (2);
    CREATE INDEX t_x ON t (x);
    CREATE SEQUENCE s;
    CREATE UNLOGGED TABLE unlogged (x int);
    CREATE MATERIALIZED VIEW m AS SELECT 1 AS one;
    CREATE FOREIGN TABLE far (x int) SERVER nowhere;
    CREATE FUNCTION immutable_lock() RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT pg_try_advisory_xact_lock(1)';
    CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES (80) RETURNING x';
    CREATE VIEW over_writer AS SELECT writes() AS x;
    CREATE FUNCTION writes(int, int) RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES (81) RETURNING x';
    CREATE OPERATOR #*# (LEFTARG = int, RIGHTARG = int, FUNCTION = writes);
    CREATE TYPE casting AS (x int);
    CREATE FUNCTION cast_it(text) RETURNS casting LANGUAGE sql
        AS 'INSERT INTO t VALUES (82); SELECT ROW(1)::casting';
    CREATE CAST (text AS casting) WITH FUNCTION cast_it(text);
    CREATE PROCEDURE nothing() LANGUAGE sql AS 'SELECT 1';
    CREATE PROCEDURE writing() LANGUAGE sql AS 'INSERT INTO t VALUES (83)';
    CREATE DOMAIN checked AS int CHECK (pg_try_advisory_xact_lock(2) OR VALUE > 0);
    CREATE FUNCTION of_domain(checked) RETURNS int LANGUAGE plpgsql STABLE AS 'BEGIN RETURN 1; END';
    CREATE FUNCTION a_function_whose_name_has_sixty_three_bytes_and_takes_a_lock_xx() RETURNS boolean
        LANGUAGE sql STABLE AS 'SELECT pg_try_advisory_xact_lock(3)';
    CREATE FUNCTION of_row(t) RETURNS boolean LANGUAGE sql STABLE AS 'SELECT pg_try_advisory_xact_lock(4)';
";

const BY_SUPERUSER: &str = "
    CREATE EXTENSION postgres_fdw;
    CREATE EXTENSION dblink;
    CREATE EXTENSION tablefunc;
    CREATE SERVER nowhere FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '127.0.0.1', port '1');
    CREATE USER MAPPING FOR app SERVER nowhere OPTIONS (user 'app', password 'x');
    GRANT USAGE ON FOREIGN SERVER nowhere TO app;
";

async fn started(overrides: &str) -> (Cluster, Proxy) {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up_as_superuser(BY_SUPERUSER).await;
    cluster.set_up(OBJECTS).await;
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = proxy.connect().await;
    reads_reach_replicas(&cluster, &client, "SELECT x AS loaded FROM t").await;
    (cluster, proxy)
}

fn executed(sql: &str) -> Vec<u8> {
    [parse("", sql), bind("", &[]), execute(), sync()].concat()
}

/// Lines of each node's log with this marker: what ran there, and what has failed there.
fn logged(logs: &[String], marker: &str) -> Vec<usize> {
    logs.iter().map(|log| log.lines().filter(|line| line.contains(marker)).count()).collect()
}

#[tokio::test]
async fn what_a_standby_would_do_wrongly_or_refuse_runs_on_the_primary() {
    let (cluster, proxy) = started("consistency: { catch_up_wait: 2s }").await;
    let mut sent = Vec::new();
    for (number, fact) in facts().into_iter().enumerate() {
        for extended in [false, true] {
            let mut client = proxy.raw_login().await;
            for (line, (says, sql)) in fact.lines.iter().enumerate() {
                let marker = format!("/* {number}.{line}.{extended}. */");
                let text = format!("{marker} {sql}");
                let unit = if extended { executed(&text) } else { query(&text) };
                match says {
                    Says::ReadOnly => continue,
                    Says::SetsUp => {
                        let answer = client.ask(&query(sql)).await;
                        assert!(answer.iter().all(|message| message.tag != b'E'), "{sql}: {answer:?}");
                        continue;
                    }
                    Says::OnPrimarySimple if extended => continue,
                    // Named statements of SQL's by the extended protocol keep their session on the primary.
                    Says::OnReplica if extended && sql.starts_with("EXECUTE") => continue,
                    Says::OnPrimary | Says::OnPrimarySimple | Says::OnReplica => {}
                }
                if *says == Says::OnReplica {
                    // Right after data definition the catalog facts are read again: until then, the primary.
                    let deadline = std::time::Instant::now() + PATIENCE;
                    while cluster.ran(&marker)[1] == 0 {
                        if std::time::Instant::now() >= deadline {
                            let metrics = proxy.get("/metrics").await.unwrap_or_default().1;
                            let counts = metrics
                                .lines()
                                .filter(|line| !line.ends_with(" 0") && !line.contains("_seconds"));
                            let counts: Vec<&str> = counts.filter(|line| !line.starts_with('#')).collect();
                            panic!("{}: no replica runs {sql}:\n{}", fact.text, counts.join("\n"));
                        }
                        client.ask(&unit).await;
                    }
                    continue;
                }
                // An error would be the same on one server; what counts is where it came from.
                client.ask(&unit).await;
                sent.push((marker, sql.clone(), fact.text));
            }
        }
    }
    let logs: Vec<String> = cluster.nodes().iter().map(|node| node.log()).collect();
    for (marker, sql, fact) in &sent {
        let found = logged(&logs, marker);
        assert!(found[0] > 0 && found[1] == 0, "{fact}: {sql} {marker}: {found:?}");
    }
    assert!(sent.len() > 300, "only {} statements were sent", sent.len());
}

#[tokio::test]
async fn what_read_only_transactions_may_do_on_the_primary_they_may_do_here() {
    let (cluster, proxy) = started("consistency: { catch_up_wait: 2s }").await;
    let outcome = |messages: &[Message]| -> Vec<String> {
        let shown = |message: &Message| match message.tag {
            b'E' => format!("E {:?}", message.field(b'C')),
            b'N' => format!("N {:?}", message.field(b'C')),
            b'T' => "T".to_owned(),
            _ => format!("{message:?}"),
        };
        messages.iter().filter(|message| message.tag != b'S').map(shown).collect()
    };
    let mut tried = 0;
    for (_, sql) in
        facts().into_iter().flat_map(|fact| fact.lines).filter(|(says, _)| *says == Says::ReadOnly)
    {
        for before in [None, Some("SELECT y FROM t WHERE x = 1")] {
            let mut direct = RawClient::connect(cluster.primary().port()).await;
            direct.login("app", proxy.app()).await.unwrap();
            let mut client = proxy.raw_login().await;
            let statements = [Some("BEGIN READ ONLY"), before, Some(sql.as_str()), Some("ROLLBACK")];
            let statements: Vec<&str> = statements.into_iter().flatten().collect();
            // One after the other: some lock what the other asks for.
            let mut theirs = Vec::new();
            for statement in &statements {
                theirs.push(outcome(&direct.ask(&query(statement)).await));
            }
            let mut ours = Vec::new();
            for statement in &statements {
                ours.push(outcome(&client.ask(&query(statement)).await));
            }
            assert_eq!(ours, theirs, "{statements:?}");
            tried += 1;
        }
    }
    assert!(tried > 30, "only {tried}");
}

#[tokio::test]
async fn what_dblink_has_written_is_the_sessions_own_write() {
    let (cluster, proxy) = started("").await;
    let client = proxy.connect().await;
    let app = proxy.app();
    let target = format!(
        "host=127.0.0.1 port={} dbname=app user={} password={}",
        cluster.primary().port(),
        app.user,
        app.password
    );
    for n in 1_000..1_030 {
        let write = format!("SELECT dblink_exec('{target}', 'INSERT INTO t VALUES ({n})')");
        client.simple_query(&write).await.unwrap();
        let found: i64 =
            client.query_one(&format!("SELECT count(*) FROM t WHERE x = {n}"), &[]).await.unwrap().get(0);
        assert_eq!(found, 1);
    }
}

#[tokio::test]
async fn a_pipeline_with_a_write_anywhere_runs_on_the_primary() {
    let (cluster, proxy) = started("consistency: { catch_up_wait: 2s }").await;
    for at in 0..3 {
        let mut unit = Vec::new();
        for step in 0..3 {
            let sql = if step == at { "INSERT INTO t VALUES (90)" } else { "SELECT x FROM t" };
            unit.extend_from_slice(
                &[parse("", &format!("/* pipeline{at}. */ {sql}")), bind("", &[]), execute()].concat(),
            );
        }
        unit.extend_from_slice(&sync());
        let answer = proxy.raw_login().await.ask(&unit).await;
        assert!(answer.iter().all(|message| message.tag != b'E'), "{answer:?}");
        assert_eq!(cluster.ran(&format!("/* pipeline{at}. */")), [3, 0]);
    }
}

/// A replica whose replay stands still, and a session that is promised nothing: what it asks there for lack of which the
/// replica fails, the primary knows.
#[tokio::test]
async fn what_a_late_replica_does_not_know_yet_is_asked_of_the_primary() {
    let (cluster, proxy) = started("consistency: { level: eventual }").await;
    cluster.set_up_as_superuser("CREATE TYPE mood AS ENUM ('sad'); CREATE TABLE secret (x int)").await;
    cluster.set_up("CREATE TYPE plain AS (x int)").await;
    cluster.node(1).pause_replay().await.unwrap();
    cluster
        .primary()
        .connect("app", &cluster.roles().superuser)
        .await
        .unwrap()
        .batch_execute(
            "CREATE TABLE made (x int); GRANT SELECT ON made TO app; ALTER TABLE t ADD COLUMN later int;
             ALTER TYPE mood ADD VALUE 'happy'; GRANT SELECT ON secret TO app; CREATE SCHEMA made_schema;
             CREATE TYPE made_type AS ENUM ('a'); CREATE FUNCTION made_function() RETURNS int LANGUAGE sql AS 'SELECT 1';
             CREATE ROLE made_role; GRANT made_role TO app;
             CREATE ROLE made_login LOGIN PASSWORD 'made'",
        )
        .await
        .unwrap();
    let client = proxy.connect().await;
    for sql in [
        "SELECT count(*) FROM made",
        "SELECT later FROM t LIMIT 1",
        "SELECT 'happy'::mood::text",
        "SELECT count(*) FROM secret",
        "SELECT 'made_schema'::regnamespace::text",
        "SELECT 'made_type'::regtype::text",
        "SELECT 'made_function'::regproc::text",
        "SELECT 'made_role'::regrole::text",
        "SELECT has_table_privilege('made_role', 'made', 'select')",
    ] {
        let before = proxy.metrics().await.sum("highwater_redone_total", &[("reason", "late_replica")]);
        client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"));
        let after = proxy.metrics().await.sum("highwater_redone_total", &[("reason", "late_replica")]);
        assert!(after > before, "{sql}: the replica was not asked, so this shows nothing");
    }
    // A setting that the replica cannot take yet, and a login that it does not know.
    client.batch_execute("SET ROLE made_role").await.unwrap();
    let row = client.query_one("SELECT current_user::text FROM pg_class LIMIT 1", &[]).await;
    assert_eq!(row.unwrap().get::<_, String>(0), "made_role");
    let mut new = RawClient::connect(proxy.port()).await;
    new.login_with(&[("user", "made_login"), ("database", "app")], "made").await.unwrap();
    let answer = new.ask(&query("SELECT 1")).await;
    assert_eq!(tags(&answer), "TDCZ", "{answer:?}");
    cluster.node(1).resume_replay().await.unwrap();
}

/// A function of which the operator has said that it only reads, and that writes after all: what was shown stays shown,
/// and nothing of it is done a second time elsewhere.
#[tokio::test]
async fn what_was_shown_in_part_is_not_run_again() {
    let (cluster, proxy) = started(
        "{ consistency: { catch_up_wait: 2s }, routing: { functions: { safe: [late_writer, warns] } } }",
    )
    .await;
    cluster
        .set_up(
            "CREATE FUNCTION late_writer(n int) RETURNS int LANGUAGE plpgsql AS
                 $$ BEGIN IF n = 20000 THEN INSERT INTO t VALUES (91); END IF; RETURN n; END $$;
             CREATE FUNCTION warns() RETURNS int LANGUAGE plpgsql AS
                 $$ BEGIN RAISE NOTICE 'so far'; INSERT INTO t VALUES (92); RETURN 1; END $$",
        )
        .await;
    let mut client = proxy.raw_login().await;
    for (marker, sql) in [
        ("/* rows */", "SELECT late_writer(i) FROM generate_series(1, 20000) AS i"),
        ("/* notice */", "SELECT warns()"),
    ] {
        eventually("the replica runs it", || async {
            proxy.raw_login().await.ask(&query(&format!("{marker} {sql}"))).await;
            cluster.ran(marker)[1] > 0
        })
        .await;
        let before = cluster.ran(marker);
        let answer = client.ask(&query(&format!("{marker} {sql}"))).await;
        let error =
            answer.iter().find(|message| message.tag == b'E').unwrap_or_else(|| panic!("{sql} succeeded"));
        assert_eq!(error.field(b'C').as_deref(), Some("25006"), "{sql}");
        assert!(
            answer.iter().any(|message| matches!(message.tag, b'D' | b'N')),
            "{sql}: nothing came before it"
        );
        let after = cluster.ran(marker);
        assert_eq!([after[0] - before[0], after[1] - before[1]], [0, 1], "{sql}");
    }
}

#[tokio::test]
async fn a_read_of_an_open_transaction_holds_up_neither_replay_nor_definitions() {
    let (cluster, proxy) =
        started("{ consistency: { catch_up_wait: 2s }, routing: { transactions: split } }").await;
    for begin in ["BEGIN", "BEGIN READ ONLY"] {
        let mut client = proxy.raw_login().await;
        client.ask(&query(begin)).await;
        assert_eq!(
            tags(&client.ask(&query(&format!("SELECT x /* {begin} */ FROM t"))).await).chars().next(),
            Some('T')
        );
        assert_eq!(cluster.ran(&format!("/* {begin} */")), [0, 1]);
        let owner = cluster.primary().connect("app", proxy.app()).await.unwrap();
        owner
            .batch_execute("SET lock_timeout = '20s'; ALTER TABLE t ALTER COLUMN y SET DEFAULT 1")
            .await
            .unwrap();
        // The replica replays it, though the transaction is open still, and goes on.
        cluster.wait_caught_up(0).await.unwrap();
        let answer = client.ask(&query("SELECT x FROM t WHERE x = 1")).await;
        assert_eq!(tags(&answer), "TDCZ", "{begin}: {answer:?}");
        assert_eq!(client.ask(&query("COMMIT")).await.last().unwrap().body, b"I");
    }
}
