//! Prepared statements are the client's, whichever backends they run on: what one server would answer
//! before and after data definition, under pressure, and by SQL.

use crate::fixture::*;

fn named_bind(portal: &str, statement: &str) -> Vec<u8> {
    message(b'B', &[portal.as_bytes(), b"\0", statement.as_bytes(), b"\0\0\0\0\0\0\0"].concat())
}

fn close(name: &str) -> Vec<u8> {
    message(b'C', &[b"S", name.as_bytes(), b"\0"].concat())
}

fn run(name: &str) -> Vec<u8> {
    [bind(name, &[]), execute(), sync()].concat()
}

fn code(messages: &[Message]) -> Option<String> {
    messages.iter().find(|message| message.tag == b'E').and_then(|error| error.field(b'C'))
}

/// The first row.
fn row(messages: &[Message]) -> Vec<Option<String>> {
    messages.iter().find(|message| message.tag == b'D').map(Message::columns).unwrap_or_default()
}

/// What one server says to a client whose statement has another result type by now.
fn assert_changed(answer: &[Message], context: &str) {
    assert_eq!(tags(answer), "EZ", "{context}: {answer:?}");
    let error = &answer[0];
    assert_eq!(error.field(b'C').as_deref(), Some("0A000"), "{context}");
    assert_eq!(error.field(b'M').as_deref(), Some("cached plan must not change result type"), "{context}");
    assert_eq!(error.field(b'R').as_deref(), Some("RevalidateCachedQuery"), "{context}");
    assert_eq!(error.field(b'S').as_deref(), Some("ERROR"), "{context}");
}

/// The ways in which drivers come to know what a statement gives, each up to its first use.
#[derive(Clone, Copy, Debug)]
enum Driver {
    /// Parse, Describe, Flush, and later Bind, Execute, Sync.
    Asyncpg,
    /// Parse, Bind, Describe of the portal, Execute, Sync.
    Pgjdbc,
    /// Parse, Sync; then Bind, Describe of the portal, Execute, Sync.
    Libpq,
}

impl Driver {
    async fn prepare_and_run(self, client: &mut RawClient, name: &str, sql: &str) -> Vec<Message> {
        let portal = [bind(name, &[]), describe(b'P', ""), execute(), sync()].concat();
        match self {
            Driver::Asyncpg => {
                client.send(&[parse(name, sql), describe(b'S', name), flush()].concat()).await;
                let mut got = Vec::new();
                while got.last().is_none_or(|message: &Message| !matches!(message.tag, b'T' | b'E')) {
                    got.push(client.read().await.unwrap());
                }
                got.extend(client.ask(&run(name)).await);
                got
            }
            Driver::Pgjdbc => client.ask(&[parse(name, sql), portal].concat()).await,
            Driver::Libpq => {
                let mut got = client.ask(&[parse(name, sql), sync()].concat()).await;
                got.extend(client.ask(&portal).await);
                got
            }
        }
    }
}

const DRIVERS: [Driver; 3] = [Driver::Asyncpg, Driver::Pgjdbc, Driver::Libpq];

async fn start(replicas: usize, overrides: &str) -> (Cluster, Proxy) {
    let cluster = Cluster::start(replicas).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1); CREATE TABLE other (x int)").await;
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    (cluster, proxy)
}

/// Makes the session see all that was committed so far, wherever it reads.
async fn catch_up(client: &mut RawClient) {
    assert_eq!(tags(&client.ask(&query("INSERT INTO other VALUES (1)")).await), "CZ");
}

#[tokio::test]
async fn data_definition_fails_older_statements_and_shows_newer_ones_the_new_columns() {
    for (replicas, overrides) in [
        (0, "pool: { size: 1 }"),
        (0, "pool: { size: 3 }"),
        (1, "pool: { size: 1 }"),
        (2, "pool: { size: 2 }"),
    ] {
        let (_cluster, proxy) = start(replicas, overrides).await;
        for (number, driver) in DRIVERS.into_iter().enumerate() {
            let context = format!("{driver:?} with {overrides} and {replicas} replicas");
            let (mut before, mut after) = (proxy.raw_login().await, proxy.raw_login().await);
            let sql = "SELECT * FROM t";
            let shown = driver.prepare_and_run(&mut before, "s", sql).await;
            assert_eq!(row(&shown).len(), number + 1, "{context}: {shown:?}");
            let ddl = format!("ALTER TABLE t ADD COLUMN c{number} int");
            assert_eq!(tags(&after.ask(&query(&ddl)).await), "CZ", "{context}");
            let shown = driver.prepare_and_run(&mut after, "s", sql).await;
            assert_eq!(code(&shown), None, "{context}: {shown:?}");
            assert_eq!(row(&shown).len(), number + 2, "{context}");
            catch_up(&mut before).await;
            for _ in 0..3 {
                assert_changed(&before.ask(&run("s")).await, &context);
                let shown = after.ask(&run("s")).await;
                assert_eq!(row(&shown).len(), number + 2, "{context}: {shown:?}");
            }
            assert_eq!(tags(&before.ask(&[close("s"), sync()].concat()).await), "3Z");
            let shown = driver.prepare_and_run(&mut before, "s", sql).await;
            assert_eq!(row(&shown).len(), number + 2, "{context}: {shown:?}");
            assert_eq!(row(&after.ask(&run("s")).await).len(), number + 2, "{context}");
        }
    }
}

#[tokio::test]
async fn a_changed_statement_is_not_run_on_a_backend_that_never_had_it() {
    let (cluster, proxy) = start(0, "pool: { size: 3 }").await;
    for (number, in_transaction) in [false, true].into_iter().enumerate() {
        let mut client = proxy.raw_login().await;
        let insert = "INSERT INTO t (x) VALUES (100) RETURNING *";
        let unit = [parse("i", insert), describe(b'S', "i"), sync()].concat();
        assert_eq!(tags(&client.ask(&unit).await), "1tTZ");
        // Also known by an unnamed statement that is used in a later unit.
        let unnamed = [parse("", "SELECT * FROM t"), describe(b'S', ""), sync()].concat();
        assert_eq!(tags(&client.ask(&unnamed).await), "1tTZ");
        // The backends used so far are taken.
        let (mut one, mut two) = (proxy.raw_login().await, proxy.raw_login().await);
        assert_eq!(tags(&one.ask(&query("BEGIN")).await), "CZ");
        let mut other = proxy.raw_login().await;
        let ddl = format!("ALTER TABLE t ADD COLUMN n{number} int");
        assert_eq!(tags(&other.ask(&query(&ddl)).await), "CZ");
        if in_transaction {
            assert_eq!(tags(&client.ask(&query("BEGIN")).await), "CZ");
        } else {
            assert_eq!(tags(&two.ask(&query("BEGIN")).await), "CZ");
        }
        let answer = client.ask(&run("i")).await;
        assert_changed(&answer, "an insert");
        let status = if in_transaction { b"E" } else { b"I" };
        assert_eq!(answer[1].body, status);
        if in_transaction {
            assert_eq!(code(&client.ask(&run("i")).await).as_deref(), Some("25P02"));
            assert_eq!(tags(&client.ask(&query("ROLLBACK")).await), "CZ");
        } else {
            assert_changed(&client.ask(&run("")).await, "an unnamed statement");
        }
        assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t WHERE x = 100").await.unwrap(), "0");
        // What is prepared anew runs, and what stands before it in a pipeline, too.
        let unit = [close("i"), parse("i", insert), bind("i", &[]), execute(), sync()].concat();
        assert_eq!(tags(&client.ask(&unit).await), "312DCZ");
        assert_eq!(tags(&client.ask(&query("DELETE FROM t WHERE x = 100")).await), "CZ");
    }
}

#[tokio::test]
async fn parameters_of_another_type_are_not_bound_to() {
    let (_cluster, proxy) = start(0, "pool: { size: 3 }").await;
    let mut client = proxy.raw_login().await;
    let sql = "SELECT 1 FROM t WHERE x = $1";
    assert_eq!(tags(&client.ask(&[parse("s", sql), describe(b'S', "s"), sync()].concat()).await), "1tTZ");
    let (mut one, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    assert_eq!(tags(&one.ask(&query("BEGIN")).await), "CZ");
    assert_eq!(tags(&other.ask(&query("ALTER TABLE t ALTER x TYPE text")).await), "CZ");
    assert_eq!(
        code(&client.ask(&[bind("s", &["1"]), execute(), sync()].concat()).await).as_deref(),
        Some("0A000")
    );
}

#[tokio::test]
async fn data_definition_past_the_proxy_is_no_error_for_who_prepares_after_it() {
    for replicas in [0, 1] {
        let (cluster, proxy) = start(replicas, "pool: { size: 1 }").await;
        let mut older = proxy.raw_login().await;
        for number in 1..6 {
            let unit = [parse("s", "SELECT * FROM t"), run("s")].concat();
            let mut newer = proxy.raw_login().await;
            catch_up(&mut newer).await;
            assert_eq!(row(&older.ask(&unit).await).len(), number);
            let ddl = format!("ALTER TABLE t ADD COLUMN c{number} int");
            cluster.primary().execute(&ddl).await.unwrap();
            // The proxy cannot know of it yet; the server does.
            catch_up(&mut newer).await;
            let answer = newer.ask(&unit).await;
            assert_eq!(code(&answer), None, "{answer:?}");
            assert_eq!(row(&answer).len(), number + 1);
            catch_up(&mut older).await;
            assert_changed(&older.ask(&run("s")).await, "older");
            assert_eq!(tags(&older.ask(&[close("s"), sync()].concat()).await), "3Z");
        }
    }
}

#[tokio::test]
async fn thousands_of_statements_stay_within_max_prepared_at_every_moment() {
    let (_cluster, proxy) =
        start(0, "{ pool: { size: 1, max_prepared: 20 }, limits: { statements_per_session: 10000 } }").await;
    let mut client = proxy.raw_login().await;
    let count = "SELECT count(*) FROM pg_prepared_statement()";
    for round in 0..3 {
        let mut bytes = Vec::new();
        for number in 0..3_000 {
            let name = format!("s{round}_{number}");
            bytes.extend_from_slice(&parse(&name, &format!("SELECT {round}, {number}")));
            bytes.extend_from_slice(&[bind(&name, &[]), execute()].concat());
            if number % 100 == 99 {
                bytes.extend_from_slice(&[parse("", count), bind("", &[]), execute()].concat());
            }
        }
        bytes.extend_from_slice(&sync());
        client.send(&bytes).await;
        let answer = client.read_ready().await;
        assert_eq!(code(&answer), None);
        let rows: Vec<_> =
            answer.iter().filter(|message| message.tag == b'D').map(Message::columns).collect();
        assert_eq!(rows.len(), 3_030);
        for counted in rows.iter().filter(|columns| columns.len() == 1) {
            let there: usize = counted[0].as_deref().unwrap().parse().unwrap();
            assert!(there <= 21, "{there} statements");
        }
    }
    // All of them still are the client's.
    for (round, number) in [(0, 0), (1, 1_500), (2, 2_999), (0, 1)] {
        let answer = client.ask(&run(&format!("s{round}_{number}"))).await;
        assert_eq!(row(&answer), [Some(round.to_string()), Some(number.to_string())]);
    }
}

#[tokio::test]
async fn an_error_in_a_pipeline_leaves_no_wrong_idea_of_what_is_prepared() {
    let (_cluster, proxy) = start(1, "pool: { size: 1, max_prepared: 4 }").await;
    let mut client = proxy.raw_login().await;
    for round in 0..40 {
        let mut bytes = Vec::new();
        for number in 0..9 {
            let name = format!("n{}", (round * 7 + number) % 13);
            bytes.extend_from_slice(&close(&name));
            bytes.extend_from_slice(&parse(&name, &format!("SELECT {}", (round * 7 + number) % 13)));
            if number == round % 9 {
                bytes.extend_from_slice(&[parse("", "SELECT 1/0"), bind("", &[]), execute()].concat());
            }
            bytes.extend_from_slice(&[named_bind("", &name), execute()].concat());
        }
        bytes.extend_from_slice(&sync());
        assert_eq!(code(&client.ask(&bytes).await).as_deref(), Some("22012"));
        for number in 0..13 {
            let name = format!("p{number}");
            let unit = [close(&name), parse(&name, &format!("SELECT {number}")), run(&name)].concat();
            let answer = client.ask(&unit).await;
            assert_eq!(row(&answer), [Some(number.to_string())], "round {round}: {answer:?}");
        }
    }
}

#[tokio::test]
async fn sql_prepared_reads_run_on_replicas_and_pin_nobody() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up("CREATE TABLE t (x int); INSERT INTO t VALUES (1), (2)").await;
    let proxy = Proxy::start(&cluster).await;
    let mut client = proxy.raw_login().await;
    for sql in [
        "PREPARE get(int) AS SELECT x FROM t WHERE x = $1",
        "PREPARE put AS INSERT INTO t VALUES ($1)",
        "PREPARE \"Next One\" (int, text) AS SELECT $1, $2, count(*) FROM t; ",
    ] {
        assert_eq!(tags(&client.ask(&query(sql)).await), "CZ", "{sql}");
    }
    eventually("a read by EXECUTE runs on the replica", || async {
        let mut client = proxy.raw_login().await;
        client.ask(&query("PREPARE get(int) AS SELECT x FROM t WHERE x = $1")).await;
        client.ask(&query("EXECUTE get(1 /* on a replica */)")).await;
        cluster.ran("/* on a replica */")[1] > 0
    })
    .await;
    for number in 3..8 {
        assert_eq!(tags(&client.ask(&query(&format!("EXECUTE put({number})"))).await), "CZ");
        let answer = client.ask(&query(&format!("EXECUTE get({number})"))).await;
        assert_eq!(row(&answer), [Some(number.to_string())]);
        let answer = client.ask(&query(&format!("EXECUTE \"Next One\"({number}, 'x'); "))).await;
        let expected = [number.to_string(), "x".to_owned(), number.to_string()].map(Some);
        assert_eq!(row(&answer), expected);
        // An argument is an expression.
        let answer =
            client.ask(&query("EXECUTE get(pg_catalog.txid_current()::text::int - 1000000000)")).await;
        assert_eq!(code(&answer), None);
    }
    assert_eq!(cluster.ran("EXECUTE put")[1], 0, "a write was sent to the replica");
    assert_eq!(cluster.ran("txid_current")[1], 0, "a write in an argument was sent to the replica");
    assert_eq!(proxy.metrics().await.sum("highwater_pinned_sessions", &[]), 0.0);
}

#[tokio::test]
async fn names_of_sql_and_protocol_are_one_and_each_session_has_its_own() {
    let (_cluster, proxy) = start(1, "pool: { size: 1 }").await;
    let (mut one, mut other) = (proxy.raw_login().await, proxy.raw_login().await);
    for round in 0..3 {
        assert_eq!(tags(&one.ask(&query("PREPARE s AS SELECT 'one'")).await), "CZ");
        assert_eq!(code(&other.ask(&query("EXECUTE s")).await).as_deref(), Some("26000"));
        assert_eq!(code(&other.ask(&run("s")).await).as_deref(), Some("26000"));
        assert_eq!(code(&other.ask(&query("DEALLOCATE s")).await).as_deref(), Some("26000"));
        assert_eq!(tags(&other.ask(&query("PREPARE s AS SELECT 'other', 2")).await), "CZ");
        for _ in 0..2 {
            assert_eq!(row(&one.ask(&query("EXECUTE s")).await), [Some("one".to_owned())]);
            assert_eq!(row(&one.ask(&run("s")).await), [Some("one".to_owned())]);
            assert_eq!(row(&other.ask(&run("s")).await).len(), 2);
            assert_eq!(row(&other.ask(&query("EXECUTE s")).await).len(), 2);
        }
        for taken in [query("PREPARE s AS SELECT 3"), [parse("s", "SELECT 3"), sync()].concat()] {
            assert_eq!(code(&one.ask(&taken).await).as_deref(), Some("42P05"));
        }
        // A statement of the protocol, used and dropped by SQL; and one of SQL, dropped by the protocol.
        assert_eq!(tags(&one.ask(&[parse("p", "SELECT 4"), sync()].concat()).await), "1Z");
        assert_eq!(row(&one.ask(&query("EXECUTE p")).await), [Some("4".to_owned())]);
        assert_eq!(tags(&one.ask(&query("DEALLOCATE p")).await), "CZ");
        assert_eq!(code(&one.ask(&query("EXECUTE p")).await).as_deref(), Some("26000"));
        assert_eq!(tags(&one.ask(&[close("s"), sync()].concat()).await), "3Z");
        assert_eq!(code(&one.ask(&query("EXECUTE s")).await).as_deref(), Some("26000"));
        assert_eq!(row(&other.ask(&query("EXECUTE s")).await).len(), 2, "round {round}");
        let gone = if round == 0 { "DEALLOCATE ALL" } else { "DEALLOCATE s" };
        assert_eq!(tags(&other.ask(&query(gone)).await), "CZ");
        assert_eq!(code(&other.ask(&query("EXECUTE s")).await).as_deref(), Some("26000"), "{gone}");
    }
    assert_eq!(proxy.metrics().await.sum("highwater_pinned_sessions", &[]), 0.0);
}

#[tokio::test]
async fn sql_prepared_statements_outlive_rollback_and_follow_their_session() {
    let (cluster, proxy) = start(0, "pool: { size: 3 }").await;
    let mut client = proxy.raw_login().await;
    for sql in ["BEGIN", "PREPARE s AS SELECT * FROM t", "PREPARE i AS INSERT INTO t VALUES (9) RETURNING *"]
    {
        assert_eq!(tags(&client.ask(&query(sql)).await), "CZ");
    }
    assert_eq!(row(&client.ask(&query("EXECUTE s")).await), [Some("1".to_owned())]);
    assert_eq!(tags(&client.ask(&query("ROLLBACK")).await), "CZ");
    let mut holders = Vec::new();
    for _ in 0..2 {
        // On the next backend, one after the other.
        assert_eq!(row(&client.ask(&query("EXECUTE s")).await), [Some("1".to_owned())]);
        assert_eq!(row(&client.ask(&query("EXECUTE i")).await), [Some("9".to_owned())]);
        let mut holder = proxy.raw_login().await;
        assert_eq!(tags(&holder.ask(&query("BEGIN")).await), "CZ");
        holders.push(holder);
    }
    assert_eq!(row(&client.ask(&query("EXECUTE s")).await), [Some("1".to_owned())]);
    // A table that is gone is an error of the statement, as on one server.
    assert_eq!(tags(&client.ask(&query("PREPARE o AS SELECT * FROM other")).await), "CZ");
    assert_eq!(tags(&client.ask(&query("DROP TABLE other")).await), "CZ");
    drop(holders.pop());
    for _ in 0..2 {
        assert_eq!(code(&client.ask(&query("EXECUTE o")).await).as_deref(), Some("42P01"));
        assert_eq!(tags(&client.ask(&query("BEGIN")).await), "CZ");
        let answer = client.ask(&query("EXECUTE o")).await;
        assert_eq!((code(&answer).as_deref(), &answer[1].body[..]), (Some("42P01"), &b"E"[..]));
        assert_eq!(tags(&client.ask(&query("ROLLBACK")).await), "CZ");
    }
    // Where it was run before, and where it never was.
    assert_eq!(tags(&client.ask(&query("ALTER TABLE t ADD COLUMN y int")).await), "CZ");
    let before = cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap();
    for _ in 0..2 {
        assert_changed(&client.ask(&query("EXECUTE i")).await, "EXECUTE of a write");
        assert_changed(&client.ask(&query("EXECUTE s")).await, "EXECUTE of a read");
        let mut holder = proxy.raw_login().await;
        if holders.len() < 2 {
            assert_eq!(tags(&holder.ask(&query("BEGIN")).await), "CZ");
            holders.push(holder);
        }
    }
    assert_eq!(cluster.primary().query_text("SELECT count(*) FROM t").await.unwrap(), before);
}

#[tokio::test]
async fn statements_that_contain_execute_find_the_names() {
    let (_cluster, proxy) = start(1, "pool: { size: 2 }").await;
    let mut client = proxy.raw_login().await;
    assert_eq!(tags(&client.ask(&query("PREPARE s AS SELECT x FROM t")).await), "CZ");
    assert_eq!(tags(&client.ask(&[parse("p", "SELECT 5 AS five"), sync()].concat()).await), "1Z");
    assert_eq!(row(&client.ask(&query("EXECUTE s")).await), [Some("1".to_owned())]);
    for sql in ["EXPLAIN EXECUTE s", "EXPLAIN (COSTS off) EXECUTE p"] {
        assert_eq!(code(&client.ask(&query(sql)).await), None, "{sql}");
    }
    assert_eq!(code(&client.ask(&query("CREATE TABLE made AS EXECUTE p")).await), None);
    assert_eq!(row(&client.ask(&query("SELECT five FROM made")).await), [Some("5".to_owned())]);
    let unit = [parse("", "EXECUTE s"), bind("", &[]), execute(), sync()].concat();
    assert_eq!(row(&client.ask(&unit).await), [Some("1".to_owned())]);
    let shown =
        client.ask(&query("SELECT statement, from_sql FROM pg_prepared_statements WHERE name = 's'")).await;
    assert_eq!(row(&shown), ["PREPARE s AS SELECT x FROM t", "t"].map(|s| Some(s.to_owned())));
}

#[tokio::test]
async fn a_statement_that_cannot_be_prepared_any_more_keeps_no_other_away() {
    let (_cluster, proxy) = start(0, "pool: { size: 3 }").await;
    let mut client = proxy.raw_login().await;
    client.ask(&query("CREATE TABLE stays AS SELECT 1 AS x")).await;
    for n in 0..8 {
        client.ask(&query(&format!("CREATE TABLE goes_{n} (x int)"))).await;
        client.ask(&query(&format!("PREPARE of_goes_{n} AS SELECT x FROM goes_{n}"))).await;
        client.ask(&query(&format!("DROP TABLE goes_{n}"))).await;
    }
    client.ask(&query("PREPARE of_stays AS SELECT x FROM stays")).await;
    let explain = query("EXPLAIN (COSTS off) EXECUTE of_stays");
    for round in 0..10 {
        // The server process that it used last has other work now: it gets one that has none of its statements.
        let mut other = proxy.raw_login().await;
        other.ask(&query("CREATE TEMP TABLE mine ()")).await;
        let answer = client.ask(&explain).await;
        assert_eq!(tags(&answer), "TDCZ", "{round}: {answer:?}");
        // In a transaction what cannot be prepared must not end it.
        client.ask(&query("BEGIN")).await;
        let answer = client.ask(&explain).await;
        assert_eq!(tags(&answer), "TDCZ", "{round}: {answer:?}");
        assert_eq!(tags(&client.ask(&query("COMMIT")).await), "CZ");
        let gone = client.ask(&query("EXPLAIN EXECUTE of_goes_0")).await;
        assert!(tags(&gone).contains('E'), "{gone:?}");
        other.ask(&query("DISCARD ALL")).await;
    }
}

#[tokio::test]
async fn what_the_extended_protocol_says_of_one_prepared_statement_meets_no_other_that_is_broken() {
    let (_cluster, proxy, direct) = super::protocol::beside("{ pool: { size: 3 } }", "SELECT").await;
    let unnamed = |sql: &str| [parse("", sql), bind("", &[]), describe(b'P', ""), execute(), sync()].concat();
    let named = |sql: &str| [parse("x", sql), bind("x", &[]), execute(), close("x"), sync()].concat();
    let apart = |sql: &str| [parse("y", sql), sync(), bind("y", &[]), execute(), close("y"), sync()].concat();
    let of_one = [
        "PREPARE other AS SELECT 'a' AS a",
        "EXECUTE whole",
        "EXECUTE told('x')",
        "EXPLAIN (COSTS off) EXECUTE whole",
        "CREATE TEMP TABLE made AS EXECUTE whole",
        "DEALLOCATE whole",
    ];
    for (number, sql) in of_one.into_iter().enumerate() {
        let table = format!("goes_{number}");
        let before = [
            query(&format!("CREATE TABLE {table} AS SELECT 1 AS x")),
            [parse("of_protocol", &format!("SELECT x FROM {table}")), sync()].concat(),
            [bind("of_protocol", &[]), execute(), sync()].concat(),
            query(&format!("PREPARE of_sql AS SELECT x FROM {table}")),
            query("PREPARE whole AS SELECT 5 AS five"),
            query("PREPARE told(text) AS SELECT $1 AS told"),
            query(&format!("DROP TABLE {table}")),
        ];
        for (way, unit) in [unnamed(sql), named(sql), apart(sql)].into_iter().enumerate() {
            for begin in ["SELECT 1", "BEGIN"] {
                let (mut proxied, mut direct) = (proxy.raw_login().await, direct.raw_login().await);
                let units = before.iter().cloned().chain([query(begin), unit.clone(), query("COMMIT")]);
                for part in units {
                    let expected = super::protocol::answers("one server", &mut direct, &part).await;
                    let got = super::protocol::answers("the proxy", &mut proxied, &part).await;
                    assert_eq!(got, expected, "{begin}; {sql}, way {way}: {}", part.escape_ascii());
                }
            }
        }
    }
}

#[tokio::test]
async fn an_execute_that_outlives_what_it_names_is_described_as_by_one_server() {
    let (_cluster, proxy, direct) = super::protocol::beside("{ pool: { size: 1 } }", "SELECT").await;
    let extended = |sql: &str| [parse("run", sql), run("run"), close("run"), sync()].concat();
    let (one, two) = ("PREPARE b AS SELECT 8 AS eight, 'b' AS b", "PREPARE b AS SELECT 1.5 AS other");
    let prepared = [parse("x", "EXECUTE b"), parse("", "EXECUTE b"), sync()].concat();
    // What the name stands for when it is prepared, and what after that: Queries take the unnamed statement away.
    for (before, after) in [
        (vec![query(one)], vec![extended("DEALLOCATE b")]),
        (vec![query(one)], vec![query("DEALLOCATE b")]),
        (vec![query(one)], vec![extended("DEALLOCATE b"), extended(two)]),
        (vec![query(one)], vec![query("DEALLOCATE b"), query(two)]),
        (vec![], vec![extended(one)]),
        (vec![], vec![query(one)]),
        (vec![query(one)], vec![]),
        (vec![query("PREPARE b AS DELETE FROM missing")], vec![query("DEALLOCATE b")]),
        (vec![query("PREPARE b AS SET work_mem = '5MB'")], vec![query("DEALLOCATE b")]),
    ] {
        let (mut proxied, mut direct) = (proxy.raw_login().await, direct.raw_login().await);
        let uses = [
            [describe(b'S', ""), sync()].concat(),
            [describe(b'S', "x"), sync()].concat(),
            [bind("x", &[]), describe(b'P', ""), execute(), sync()].concat(),
            [describe(b'S', "x"), bind("x", &[]), execute(), sync()].concat(),
            [bind("", &[]), execute(), sync()].concat(),
        ];
        let what = format!("{before:?} {after:?}").replace(", ", " ");
        let units = before.into_iter().chain([prepared.clone()]).chain(after).chain(uses);
        for (number, unit) in units.enumerate() {
            let expected = super::protocol::answers("one server", &mut direct, &unit).await;
            let got = super::protocol::answers("the proxy", &mut proxied, &unit).await;
            assert_eq!(got, expected, "{what}: unit {number}, {}", unit.escape_ascii());
            let pinned = proxy.metrics().await.sum("highwater_pinned_sessions", &[]);
            if pinned == 0.0 {
                // Nothing of it stays on the only backend.
                let mut other = proxy.raw_login().await;
                assert_eq!(tags(&other.ask(&[parse("x", "SELECT 1"), run("x")].concat()).await), "12DCZ");
            }
        }
        drop(proxied);
        eventually("the session has ended", || async {
            proxy.metrics().await.sum("highwater_pinned_sessions", &[]) == 0.0
        })
        .await;
    }
}
