//! `routing.transactions: split`: what explicit transactions are promised when their reads run on replicas.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::fixture::*;

const ROWS: &str = "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL); INSERT INTO t SELECT i, 0 FROM generate_series(1, 9) i";

const OTHER: &str = "CREATE TABLE other (LIKE t INCLUDING ALL); INSERT INTO other TABLE t";

async fn start(cluster: &Cluster) -> Proxy {
    start_with(cluster, "level: session", "").await
}

async fn start_with(cluster: &Cluster, consistency: &str, more: &str) -> Proxy {
    let overrides = format!(
        "routing: {{ transactions: split }}\nconsistency: {{ catch_up_wait: 2s, {consistency} }}\n{more}"
    );
    let proxy =
        Proxy::start_with(cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await;
    let client = proxy.connect().await;
    eventually("a read runs on a replica", async || {
        client.simple_query("SELECT n FROM t").await.unwrap();
        reads_on_replicas(&proxy).await > 0.0
    })
    .await;
    proxy
}

async fn reads_on_replicas(proxy: &Proxy) -> f64 {
    let metrics = proxy.metrics().await;
    metrics.sum("highwater_statements_total", &[("class", "read"), ("reason", "read")])
}

/// A client of the proxy, and one of the primary itself.
async fn beside(cluster: &Cluster, proxy: &Proxy) -> (RawClient, RawClient) {
    let mut direct = RawClient::connect(cluster.primary().port()).await;
    direct.login("app", proxy.app()).await.unwrap();
    (proxy.raw_login().await, direct)
}

/// What a client makes of an answer: rows, tags, errors and statuses, in their order.
fn seen(messages: &[Message]) -> Vec<String> {
    messages
        .iter()
        .filter(|message| message.tag != b'S')
        .map(|message| match message.tag {
            b'E' | b'N' => {
                format!("{}:{:?} {:?}", char::from(message.tag), message.field(b'C'), message.field(b'M'))
            }
            // Not the table's identifier.
            b'T' => "T".to_owned(),
            _ => format!("{message:?}"),
        })
        .collect()
}

/// The same of both, each with a table of its own.
async fn ask_both(
    proxied: &mut RawClient,
    direct: &mut RawClient,
    unit: &dyn Fn(&str) -> Vec<u8>,
    what: &str,
) {
    let one_name =
        |lines: Vec<String>| -> Vec<String> { lines.iter().map(|line| line.replace("other", "t")).collect() };
    let ours = one_name(seen(&proxied.ask(&unit("t")).await));
    let theirs = one_name(seen(&direct.ask(&unit("other")).await));
    assert_eq!(ours, theirs, "{what}");
}

fn executed(sql: &str) -> Vec<u8> {
    [parse("", sql), bind("", &[]), describe(b'P', ""), execute()].concat()
}

#[tokio::test]
async fn reads_of_a_transaction_run_on_a_replica_until_it_does_something_else() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up(ROWS).await;
    let proxy = start(&cluster).await;
    let mut client = proxy.raw_login().await;
    assert_eq!(tags(&client.ask(&query("BEGIN")).await), "CZ");
    for _ in 0..3 {
        let answer = client.ask(&query("SELECT n /* first */ FROM t WHERE id = 1")).await;
        assert_eq!(tags(&answer), "TDCZ");
        assert_eq!(answer.last().unwrap().body, b"T");
    }
    client.ask(&query("UPDATE t SET n = n + 1 /* change */ WHERE id = 1")).await;
    client.ask(&query("SELECT n /* after */ FROM t WHERE id = 1")).await;
    assert_eq!(client.ask(&query("COMMIT")).await.last().unwrap().body, b"I");
    assert_eq!(cluster.ran("/* first */"), [0, 3]);
    assert_eq!(cluster.ran("/* change */"), [1, 0]);
    assert_eq!(cluster.ran("/* after */"), [1, 0]);
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_split_transactions_total", &[]), 1.0);
    assert_eq!(metrics.sum("highwater_moved_transactions_total", &[]), 1.0);
}

#[tokio::test]
async fn explicit_transactions_stay_on_the_primary_if_nobody_asks_for_it() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up(ROWS).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    client.batch_execute("BEGIN").await.unwrap();
    client.simple_query("SELECT n /* whole */ FROM t").await.unwrap();
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(cluster.ran("/* whole */"), [1, 0]);
}

#[tokio::test]
async fn read_only_transactions_read_on_replicas_whatever_is_said_of_others() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up(ROWS).await;
    let overrides = "consistency: { catch_up_wait: 2s }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let probe = proxy.connect().await;
    eventually("a read runs on a replica", async || {
        probe.simple_query("SELECT n FROM t").await.unwrap();
        reads_on_replicas(&proxy).await > 0.0
    })
    .await;
    let (mut client, mut direct) = beside(&cluster, &proxy).await;
    let simple = [
        "BEGIN READ ONLY",
        "SELECT n /* one */ FROM t WHERE id = 1",
        "SELECT n /* one */ FROM t WHERE id = 2",
        "COMMIT",
    ];
    let mut extended: Vec<Vec<u8>> =
        simple.map(|sql| [executed(&sql.replace("one", "two")), sync()].concat()).to_vec();
    // As drivers do that prepare all they send.
    for (name, sql) in [
        ("b", "START TRANSACTION READ ONLY"),
        ("r", "SELECT n /* two */ FROM t WHERE id = 3"),
        ("c", "COMMIT"),
    ] {
        extended.push([parse(name, sql), sync()].concat());
        extended.push([bind(name, &[]), execute(), sync()].concat());
    }
    extended.extend(["b", "r", "c"].map(|name| [bind(name, &[]), execute(), sync()].concat()));
    let units = simple.map(query).into_iter().chain(extended);
    for (number, unit) in units.enumerate() {
        let (ours, theirs) = (client.ask(&unit).await, direct.ask(&unit).await);
        assert_eq!(seen(&ours), seen(&theirs), "unit {number}");
    }
    // The direct session has run as many on the primary.
    assert_eq!(cluster.ran("/* one */"), [2, 2]);
    assert_eq!(cluster.ran("/* two */"), [4, 4]);
    // What is not a read fails, in the server's words; so does what comes behind it.
    for unit in
        ["BEGIN READ ONLY", "SELECT n FROM t WHERE id = 1", "UPDATE t SET n = 9", "SELECT 1", "COMMIT"]
            .map(query)
    {
        let (ours, theirs) = (client.ask(&unit).await, direct.ask(&unit).await);
        assert_eq!(seen(&ours), seen(&theirs));
    }
    for unit in ["BEGIN READ ONLY", "SHOW transaction_read_only", "SELECT n FROM t WHERE id = 1", "ROLLBACK"]
        .map(query)
    {
        let (ours, theirs) = (client.ask(&unit).await, direct.ask(&unit).await);
        assert_eq!(seen(&ours), seen(&theirs));
    }
    // One that may write stays where it was, and so does one that sees one snapshot.
    for begin in ["BEGIN", "BEGIN READ WRITE", "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"] {
        for sql in [begin, "SELECT n /* three */ FROM t WHERE id = 1", "COMMIT"] {
            client.ask(&query(sql)).await;
        }
    }
    assert_eq!(cluster.ran("/* three */"), [3, 0]);
}

#[tokio::test]
async fn a_read_only_transaction_shows_all_that_was_committed_before_it_began() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up(ROWS).await;
    let overrides = "consistency: { level: eventual, catch_up_wait: 1ms }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let (writer, mut reader) =
        (cluster.primary().connect("app", proxy.app()).await.unwrap(), proxy.raw_login().await);
    cluster.node(1).pause_replay().await.unwrap();
    for n in 1..=5 {
        writer.batch_execute(&format!("UPDATE t SET n = {n} WHERE id = 1")).await.unwrap();
        reader.ask(&query("BEGIN READ ONLY")).await;
        let answer = reader.ask(&query("SELECT n FROM t WHERE id = 1")).await;
        assert_eq!(answer[1].columns(), [Some(n.to_string())]);
        reader.ask(&query("COMMIT")).await;
    }
    cluster.node(1).resume_replay().await.unwrap();
}

#[tokio::test]
async fn read_only_transactions_stay_on_the_primary_if_that_is_asked_for() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up(ROWS).await;
    let overrides = "routing: { read_only_transactions: primary }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = proxy.connect().await;
    for sql in ["BEGIN READ ONLY", "SELECT n /* whole */ FROM t", "COMMIT"] {
        client.batch_execute(sql).await.unwrap();
    }
    assert_eq!(cluster.ran("/* whole */"), [1, 0]);
}

#[tokio::test]
async fn what_binds_a_transaction_together_runs_on_the_primary() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up(ROWS).await;
    cluster
        .set_up(
            "CREATE VIEW recent AS SELECT n FROM t WHERE now() > '2000-01-01'; \
             CREATE VIEW hidden AS SELECT n FROM recent; \
             CREATE VIEW keyword AS SELECT n FROM t WHERE current_date > '2000-01-01'; \
             CREATE VIEW text_of_time AS SELECT n FROM t WHERE 'now'::text::timestamptz > '2000-01-01'; \
             CREATE VIEW plain AS SELECT n FROM t WHERE current_user <> ''; \
             CREATE FUNCTION born() RETURNS timestamptz STABLE LANGUAGE sql AS 'SELECT now()'; \
             CREATE FUNCTION older() RETURNS timestamptz STABLE LANGUAGE plpgsql AS 'BEGIN RETURN born(); END'; \
             CREATE FUNCTION doubled(int) RETURNS int STABLE LANGUAGE sql AS 'SELECT $1 * 2'",
        )
        .await;
    let proxy = start(&cluster).await;
    let mut client = proxy.raw_login().await;
    let asking = proxy.connect().await;
    eventually("the functions are known", async || {
        let sql = "SELECT doubled(1) /* known */, born(), older() FROM hidden, keyword, plain, text_of_time";
        asking.simple_query(sql).await.unwrap();
        cluster.ran("/* known */")[1] > 0
    })
    .await;
    for (at, (begin, sql, replica)) in [
        ("BEGIN", "SELECT 1 FROM t", true),
        ("BEGIN", "SELECT 1 FROM plain", true),
        ("BEGIN", "SELECT doubled(n) FROM t", true),
        ("BEGIN", "COPY t TO STDOUT", true),
        ("BEGIN", "TABLE t", true),
        ("BEGIN READ ONLY", "SELECT 1 FROM t", true),
        ("START TRANSACTION ISOLATION LEVEL READ COMMITTED READ WRITE", "SELECT 1 FROM t", true),
        ("BEGIN ISOLATION LEVEL REPEATABLE READ", "SELECT 1 FROM t", false),
        ("BEGIN ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE", "SELECT 1 FROM t", false),
        ("BEGIN", "SELECT now()", false),
        ("BEGIN", "SELECT CURRENT_TIMESTAMP", false),
        ("BEGIN", "SELECT timestamptz 'now'", false),
        ("BEGIN", "SELECT n FROM recent", false),
        ("BEGIN", "SELECT n FROM hidden", false),
        ("BEGIN", "SELECT n FROM keyword", false),
        ("BEGIN", "SELECT n FROM text_of_time", false),
        ("BEGIN", "SELECT born()", false),
        ("BEGIN", "SELECT older()", false),
        ("BEGIN", "SELECT n FROM t FOR UPDATE", false),
        ("BEGIN", "DECLARE c CURSOR FOR SELECT n FROM t", false),
        ("BEGIN", "SHOW transaction_isolation", false),
        ("BEGIN", "SELECT 1; SELECT 2", false),
    ]
    .into_iter()
    .enumerate()
    {
        let marker = format!("/* case {at} */");
        client.ask(&query(begin)).await;
        let answer = client.ask(&query(&format!("{sql} {marker}"))).await;
        assert_eq!(answer.last().unwrap().body, b"T", "{sql}: {answer:?}");
        client.ask(&query("ROLLBACK")).await;
        assert_eq!(cluster.ran(&marker), if replica { [0, 1] } else { [1, 0] }, "{begin}: {sql}");
    }
    // By the extended protocol: portals that outlive their unit.
    let bind_to_p = || message(b'B', b"p\0\0\0\0\0\0\0\0");
    let execute_p = || message(b'E', b"p\0\0\0\0\x01");
    let some = || message(b'E', b"\0\0\0\0\x01");
    for (at, (units, replica)) in [
        ([[bind("", &[]), execute(), sync()].concat(), sync()], true),
        ([[bind("", &[]), describe(b'P', ""), execute(), sync()].concat(), sync()], true),
        ([[bind("", &[]), some(), sync()].concat(), [execute(), sync()].concat()], false),
        ([[bind("", &[]), sync()].concat(), [execute(), sync()].concat()], false),
        ([[bind_to_p(), sync()].concat(), [execute_p(), sync()].concat()], false),
        ([[bind("", &[]), bind_to_p(), execute_p(), sync()].concat(), [execute_p(), sync()].concat()], false),
    ]
    .into_iter()
    .enumerate()
    {
        let marker = format!("/* unit {at} */");
        client.ask(&query("BEGIN")).await;
        let first = [parse("", &format!("SELECT n FROM t {marker}")), units[0].clone()].concat();
        for unit in [&first, &units[1]] {
            assert!(!tags(&client.ask(unit).await).contains('E'), "{at}");
        }
        client.ask(&query("ROLLBACK")).await;
        let ran = cluster.ran(&marker);
        assert_eq!((ran[0] > 0, ran[1] > 0), (!replica, replica), "{at}");
    }
    for (value, replica) in [("now", false), ("2020-01-01", true)] {
        let marker = format!("/* bound {value} */");
        client.ask(&query("BEGIN")).await;
        let sql = format!("SELECT $1::text::timestamptz, n FROM t {marker}");
        client.ask(&[parse("", &sql), bind("", &[value]), execute(), sync()].concat()).await;
        client.ask(&query("ROLLBACK")).await;
        assert_eq!(cluster.ran(&marker), if replica { [0, 1] } else { [1, 0] }, "{value}");
    }
}

#[tokio::test]
async fn answers_statuses_and_errors_are_those_of_one_server() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ROWS).await;
    cluster.set_up(OTHER).await;
    let proxy = start(&cluster).await;
    let (mut proxied, mut direct) = beside(&cluster, &proxy).await;
    for script in [
        &["BEGIN", "COMMIT"][..],
        &["START TRANSACTION", "ROLLBACK"],
        &["BEGIN", "END", "ABORT", "COMMIT"],
        &["BEGIN", "SELECT n FROM % WHERE id = 1", "COMMIT"],
        &["BEGIN", "BEGIN", "SELECT 1", "COMMIT"],
        &["BEGIN", "SELECT 1", "BEGIN", "COMMIT"],
        &["COMMIT", "ROLLBACK", "BEGIN", "COMMIT AND CHAIN", "SELECT 1", "ROLLBACK AND CHAIN", "COMMIT"],
        &["BEGIN READ ONLY", "SELECT n FROM % WHERE id = 1", "UPDATE % SET n = 1", "SELECT 1", "COMMIT"],
        &["BEGIN READ ONLY", "SHOW transaction_read_only", "COMMIT"],
        &["BEGIN", "SELECT 1/0", "SELECT 1", "COMMIT", "SELECT 1"],
        &["BEGIN", "SELECT 1/0", "ROLLBACK"],
        &[
            "BEGIN",
            "SELECT 1/0",
            "SELEC",
            "",
            "SAVEPOINT a",
            "ROLLBACK TO a",
            "BEGIN",
            "COMMIT AND CHAIN",
            "COMMIT",
        ],
        &["BEGIN", "SELECT 1/0", "UPDATE % SET n = 7", "ROLLBACK; SELECT 1"],
        &["BEGIN", "SELECT nothing FROM %", "COMMIT PREPARED 'x'", "ROLLBACK"],
        &["BEGIN", "SELEC 1", "SELECT 1", "ROLLBACK"],
        &["BEGIN", "", "SELECT 1", "", "COMMIT"],
        &[
            "BEGIN",
            "SELECT n FROM % WHERE id = 2",
            "SAVEPOINT a",
            "UPDATE % SET n = 5 WHERE id = 2",
            "ROLLBACK TO a",
            "SELECT n FROM % WHERE id = 2",
            "COMMIT",
        ],
        &[
            "BEGIN",
            "SELECT 1",
            "SET LOCAL search_path TO nowhere",
            "SELECT n FROM %",
            "ROLLBACK",
            "SELECT n FROM % WHERE id = 1",
        ],
        &["BEGIN", "SET LOCAL work_mem TO 'nonsense'", "COMMIT"],
        &[
            "BEGIN",
            "SELECT 1",
            "DECLARE c CURSOR FOR SELECT id FROM % ORDER BY id",
            "FETCH 2 FROM c",
            "SELECT 2",
            "FETCH 1 FROM c",
            "COMMIT",
            "FETCH 1 FROM c",
        ],
        &["BEGIN", "SELECT count(DISTINCT now()) FROM %", "SHOW transaction_isolation", "COMMIT"],
        &["BEGIN", "SELECT 1", "DISCARD ALL", "COMMIT"],
        &["BEGIN", "SELECT 1", "RESET ALL", "SELECT 1", "COMMIT"],
        &[
            "BEGIN",
            "PREPARE p AS SELECT n FROM % WHERE id = 1",
            "EXECUTE p",
            "COMMIT",
            "EXECUTE p",
            "BEGIN",
            "EXECUTE p",
            "DEALLOCATE p",
            "EXECUTE p",
            "ROLLBACK",
        ],
        &["BEGIN; SELECT 1", "SELECT 2", "COMMIT"],
        &["BEGIN", "SELECT 1; COMMIT", "SELECT 1"],
        &["BEGIN", "COPY % TO STDOUT", "COMMIT"],
        &["BEGIN", "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE", "SELECT 1", "COMMIT"],
        &["BEGIN", "SELECT 1", "SET TRANSACTION READ ONLY", "UPDATE % SET n = 1", "COMMIT"],
        &["BEGIN", "SELECT 1", "LOCK TABLE %", "COMMIT"],
        &["BEGIN", "CREATE TABLE gone_% (a int)", "SELECT * FROM gone_%", "ROLLBACK", "SELECT * FROM gone_%"],
        &[
            "SET default_transaction_isolation TO serializable",
            "BEGIN",
            "SHOW transaction_isolation",
            "COMMIT",
            "RESET default_transaction_isolation",
            "BEGIN",
            "SHOW transaction_isolation",
            "COMMIT",
        ],
        &[
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ",
            "BEGIN",
            "SHOW transaction_isolation",
            "COMMIT",
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED",
        ],
    ] {
        for sql in script {
            ask_both(
                &mut proxied,
                &mut direct,
                &|table| query(&sql.replace('%', table)),
                &format!("{sql} of {script:?}"),
            )
            .await;
        }
        for sql in script {
            let unit = |table: &str| [executed(&sql.replace('%', table)), sync()].concat();
            if !sql.contains(';') {
                ask_both(&mut proxied, &mut direct, &unit, &format!("extended {sql} of {script:?}")).await;
            }
        }
    }
}

#[tokio::test]
async fn a_pipeline_may_begin_and_end_transactions() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ROWS).await;
    let proxy = start(&cluster).await;
    let (mut proxied, mut direct) = beside(&cluster, &proxy).await;
    let begin = || executed("BEGIN");
    let prepared = [parse("b", "BEGIN"), describe(b'S', "b"), bind("b", &[]), execute()].concat();
    let again = [bind("b", &[]), execute()].concat();
    for (what, unit) in [
        ("begin and read", [begin(), executed("SELECT n FROM t WHERE id = 1"), sync()].concat()),
        ("commit", [executed("COMMIT"), sync()].concat()),
        ("all of it", [begin(), executed("SELECT 1"), executed("COMMIT"), sync()].concat()),
        ("two", [begin(), executed("COMMIT"), begin(), executed("SELECT 1"), sync()].concat()),
        ("end", [executed("ROLLBACK"), executed("SELECT 2"), sync()].concat()),
        ("failing", [begin(), executed("SELECT 1/0"), executed("SELECT 1"), sync()].concat()),
        ("failed", [executed("SELECT 1"), sync()].concat()),
        ("failed still", [executed("COMMIT"), executed("SELECT 1"), sync()].concat()),
        ("prepared", [prepared, sync()].concat()),
        ("prepared twice", [parse("b", "BEGIN"), sync()].concat()),
        ("out of it", [executed("ROLLBACK"), sync()].concat()),
        ("prepared again", [again.clone(), executed("SELECT 1"), sync()].concat()),
        ("inside", [again, executed("COMMIT"), sync()].concat()),
        ("begin behind a read", [executed("SELECT 1"), begin(), sync()].concat()),
        ("its end", query("COMMIT")),
        ("with a parameter", [parse("", "BEGIN"), bind("", &["x"]), execute(), sync()].concat()),
        ("none begun", query("COMMIT")),
        ("a write behind", [begin(), executed("UPDATE t SET n = 0"), executed("COMMIT"), sync()].concat()),
        ("by name", query("EXECUTE b")),
        ("its end, too", query("COMMIT")),
    ] {
        ask_both(&mut proxied, &mut direct, &|_| unit.clone(), what).await;
    }
}

#[tokio::test]
async fn a_driver_that_asks_for_a_description_first_reads_on_a_replica() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up(ROWS).await;
    let proxy = start(&cluster).await;
    let (mut proxied, mut direct) = beside(&cluster, &proxy).await;
    let flow = async |client: &mut RawClient, at: usize, rest: &[u8]| {
        let mut all = client.ask(&query("BEGIN")).await;
        let sql = format!("SELECT n /* flow {at} */ FROM t WHERE id = 1");
        client.send(&[parse("s", &sql), describe(b'S', "s"), flush()].concat()).await;
        for _ in 0..3 {
            all.push(client.read().await.unwrap());
        }
        all.extend(client.ask(rest).await);
        all.extend(client.ask(&query("COMMIT")).await);
        all.extend(client.ask(&query("DEALLOCATE s")).await);
        seen(&all)
    };
    let named = message(b'B', b"p\0s\0\0\0\0\0\0\0");
    for (at, (rest, replica)) in [
        ([bind("s", &[]), execute(), sync()].concat(), Some(true)),
        ([bind("s", &[]), message(b'E', b"\0\0\0\0\x01"), sync()].concat(), Some(false)),
        ([named, message(b'E', b"p\0\0\0\0\x01"), sync()].concat(), Some(false)),
        ([bind("s", &[]), execute(), executed("UPDATE t SET n = 0"), sync()].concat(), Some(false)),
        (sync(), None),
        (query("SELECT 1"), None),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(flow(&mut proxied, at, &rest).await, flow(&mut direct, at + 100, &rest).await, "{at}");
        if let Some(replica) = replica {
            let ran = cluster.ran(&format!("/* flow {at} */"));
            assert_eq!(ran, if replica { [0, 1] } else { [1, 0] }, "{at}");
        }
    }
}

/// Transactions that do not overlap: each begins when the one before it has been answered its COMMIT.
async fn lost_updates(proxy: &Proxy, transactions: i64) -> i64 {
    let clients = [proxy.connect().await, proxy.connect().await, proxy.connect().await];
    clients[0].execute("UPDATE t SET n = 0 WHERE id = 1", &[]).await.unwrap();
    for at in 0..transactions {
        let client = &clients[at as usize % clients.len()];
        client.batch_execute("BEGIN").await.unwrap();
        let n: i32 = client.query_one("SELECT n FROM t WHERE id = 1", &[]).await.unwrap().get(0);
        client.execute("UPDATE t SET n = $1 WHERE id = 1", &[&(n + 1)]).await.unwrap();
        client.batch_execute("COMMIT").await.unwrap();
    }
    let last = "UPDATE t SET n = n WHERE id = 1 RETURNING n";
    let n: i32 = clients[0].query_one(last, &[]).await.unwrap().get(0);
    transactions - i64::from(n)
}

#[tokio::test]
async fn transactions_that_do_not_overlap_lose_no_update() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(ROWS).await;
    cluster.node(1).set_apply_delay(Duration::from_millis(20)).await.unwrap();
    // Even who takes any age for a read of its own must not lose its writes by it.
    let many = std::env::var("SPLIT_TRANSACTIONS").ok().and_then(|many| many.parse().ok());
    for (level, transactions) in
        [("session", many.unwrap_or(400)), ("read_your_writes", 100), ("eventual", 100)]
    {
        let proxy = start_with(&cluster, &format!("level: {level}"), "").await;
        let before = reads_on_replicas(&proxy).await;
        assert_eq!(lost_updates(&proxy, transactions).await, 0, "{level}");
        let share = (reads_on_replicas(&proxy).await - before) / transactions as f64;
        assert!(share > 0.8, "{level}: {share} of the reads on replicas");
    }
}

#[tokio::test]
async fn within_a_transaction_reads_never_go_back() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(ROWS).await;
    cluster.node(2).set_apply_delay(Duration::from_millis(15)).await.unwrap();
    let proxy = start_with(&cluster, "level: eventual", "").await;
    let (writer, reader) = (proxy.connect().await, proxy.connect().await);
    let writing = async {
        for n in 1..=500 {
            writer.execute("UPDATE t SET n = $1 WHERE id = 2", &[&n]).await.unwrap();
        }
    };
    let reading = async {
        let mut back = 0;
        for _ in 0..60 {
            reader.batch_execute("BEGIN").await.unwrap();
            let mut last = 0;
            for _ in 0..5 {
                let n: i32 = reader.query_one("SELECT n FROM t WHERE id = 2", &[]).await.unwrap().get(0);
                back += usize::from(n < last);
                last = n;
            }
            reader.batch_execute("COMMIT").await.unwrap();
        }
        back
    };
    let ((), back) = futures_util::future::join(writing, reading).await;
    assert_eq!(back, 0);
}

#[tokio::test]
async fn the_time_is_the_same_throughout_a_transaction() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ROWS).await;
    let proxy = start(&cluster).await;
    let client = proxy.connect().await;
    client.batch_execute("BEGIN").await.unwrap();
    client.query_one("SELECT n FROM t WHERE id = 1", &[]).await.unwrap();
    let time = async |sql: &str| -> String { client.query_one(sql, &[]).await.unwrap().get(0) };
    let first = time("SELECT now()::text").await;
    client.query_one("SELECT n FROM t WHERE id = 1", &[]).await.unwrap();
    assert_eq!(time("SELECT transaction_timestamp()::text").await, first);
    client.execute("UPDATE t SET n = n WHERE id = 1", &[]).await.unwrap();
    assert_eq!(time("SELECT current_timestamp::text").await, first);
    client.batch_execute("COMMIT").await.unwrap();
}

#[tokio::test]
async fn a_default_isolation_level_of_the_role_is_kept_to() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up(ROWS).await;
    cluster
        .primary()
        .execute("ALTER ROLE app SET default_transaction_isolation TO 'repeatable read'")
        .await
        .unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    let proxy = start(&cluster).await;
    let client = proxy.connect().await;
    client.batch_execute("BEGIN").await.unwrap();
    let rows = client.query("SELECT n /* snapshot */ FROM t WHERE id = 1", &[]).await.unwrap();
    proxy.connect().await.execute("UPDATE t SET n = n + 1", &[]).await.unwrap();
    let again = client.query("SELECT n /* snapshot */ FROM t WHERE id = 1", &[]).await.unwrap();
    assert_eq!(rows[0].get::<_, i32>(0), again[0].get::<_, i32>(0));
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(cluster.ran("/* snapshot */")[1], 0);
}

#[tokio::test]
async fn a_transaction_survives_the_loss_of_a_replica() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ROWS).await;
    let proxy = start(&cluster).await;
    let client = proxy.connect().await;
    client.batch_execute("BEGIN").await.unwrap();
    let read = async || client.query_one("SELECT n FROM t WHERE id = 1", &[]).await.unwrap().get::<_, i32>(0);
    assert_eq!(read().await, 0);
    cluster.link(1).cut();
    assert_eq!(read().await, 0);
    client.execute("UPDATE t SET n = 1 WHERE id = 1", &[]).await.unwrap();
    assert_eq!(read().await, 1);
    client.batch_execute("ROLLBACK").await.unwrap();
    cluster.link(1).heal();
    assert_eq!(read().await, 0);
}

#[tokio::test]
async fn a_transaction_that_cannot_begin_on_the_primary_has_failed() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ROWS).await;
    cluster.primary().execute("CREATE ROLE guest; GRANT guest TO app").await.unwrap();
    let proxy = start(&cluster).await;
    let (mut client, other) = (proxy.raw_login().await, proxy.connect().await);
    client.ask(&query("SET ROLE guest")).await;
    // Its backend is taken by another session, so that the next one has to be given the role, which is gone.
    other.batch_execute("BEGIN; UPDATE t SET n = 0 WHERE id = 9").await.unwrap();
    cluster.primary().execute("DROP ROLE guest").await.unwrap();
    client.ask(&query("BEGIN")).await;
    let refused = client.ask(&query("UPDATE t SET n = 1")).await;
    assert_eq!((tags(&refused).as_str(), &*refused.last().unwrap().body), ("EZ", &b"E"[..]), "{refused:?}");
    let ended = client.ask(&query("COMMIT")).await;
    assert_eq!(seen(&ended), ["C:ROLLBACK\\x00", "Z:I"]);
    other.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(other.query_one("SELECT sum(n) FROM t", &[]).await.unwrap().get::<_, i64>(0), 0);
}

#[tokio::test]
async fn an_idle_transaction_without_a_backend_is_ended_in_time() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ROWS).await;
    let proxy = start_with(&cluster, "level: session", "timeouts: { idle_in_transaction: 300ms }").await;
    let mut client = proxy.raw_login().await;
    client.ask(&query("BEGIN")).await;
    let last = client.read_to_end().await;
    assert_eq!(last.last().unwrap().field(b'C').as_deref(), Some("25P03"));
}

#[tokio::test]
async fn what_takes_the_snapshot_on_one_server_takes_it_whoever_answers_it() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ROWS).await;
    let unsplit = Proxy::start(&cluster).await;
    for proxy in [start(&cluster).await, unsplit] {
        let (mut proxied, mut direct) = beside(&cluster, &proxy).await;
        let close = |name: &str| message(b'C', &[b"S", name.as_bytes(), b"\0"].concat());
        // Its name is only in the proxy; and the first of these is on the backend already.
        let named = [parse("named", "SELECT 1"), parse("other", "SELECT 2"), sync()].concat();
        for first in [
            query("DEALLOCATE named"),
            query("DEALLOCATE PREPARE other"),
            query("DEALLOCATE q"),
            query("DEALLOCATE ALL"),
            query("DEALLOCATE missing"),
            query("PREPARE z AS SELECT 1"),
            query("EXECUTE q"),
            query("DISCARD PLANS"),
            query("SHOW work_mem"),
            query("SET work_mem = '5MB'"),
            query("RESET work_mem"),
            query("SAVEPOINT a"),
            query("LISTEN somewhere"),
            query(""),
            [parse("fresh", "SELECT 1"), sync()].concat(),
            [parse("fresh", "SELECT 1"), close("fresh"), sync()].concat(),
            [parse("", "SELECT 1"), sync()].concat(),
            [parse("fresh", "SHOW work_mem"), sync()].concat(),
            [close("named"), sync()].concat(),
            sync(),
        ] {
            let units = [
                named.clone(),
                query("PREPARE q AS SELECT 1"),
                query("BEGIN"),
                first.clone(),
                query("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"),
                query("SHOW transaction_isolation"),
                query("ROLLBACK"),
                query("DISCARD ALL"),
            ];
            for unit in units {
                let what = format!("{}: {}", first.escape_ascii(), unit.escape_ascii());
                assert_eq!(seen(&proxied.ask(&unit).await), seen(&direct.ask(&unit).await), "{what}");
            }
        }
    }
}

#[tokio::test]
async fn random_transactions_are_answered_as_by_one_server() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ROWS).await;
    cluster.set_up(OTHER).await;
    cluster.node(1).set_apply_delay(Duration::from_millis(5)).await.unwrap();
    let proxy = start(&cluster).await;
    let (mut proxied, mut direct) = beside(&cluster, &proxy).await;
    let seed: u64 =
        std::env::var("SPLIT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("SPLIT_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let statements = [
        "BEGIN",
        "BEGIN READ ONLY",
        "START TRANSACTION ISOLATION LEVEL READ COMMITTED",
        "BEGIN ISOLATION LEVEL REPEATABLE READ",
        "COMMIT",
        "COMMIT",
        "ROLLBACK",
        "END",
        "COMMIT AND CHAIN",
        "SAVEPOINT a",
        "ROLLBACK TO a",
        "RELEASE a",
        "SELECT id, n FROM % ORDER BY id",
        "SELECT id, n FROM % ORDER BY id",
        "SELECT sum(n) FROM %",
        "SELECT sum(n) FROM %",
        "SELECT count(*) FROM % WHERE now() > '2000-01-01'",
        "SELECT 1/0 FROM %",
        "SELECT missing FROM %",
        "SELEC",
        "",
        "SELECT n FROM % WHERE id = 1 FOR UPDATE",
        "UPDATE % SET n = n + 1 WHERE id = 1 + #",
        "UPDATE % SET n = n + 1 WHERE id = 1 + # RETURNING n",
        "DELETE FROM % WHERE id = # + 20",
        "INSERT INTO % VALUES (# + 20, 1)",
        "SET LOCAL enable_seqscan TO off",
        "SHOW enable_seqscan",
        "SHOW transaction_read_only",
        "SET application_name TO 'x'",
        "SHOW application_name",
        "DECLARE c CURSOR FOR SELECT id FROM % ORDER BY id",
        "FETCH 1 FROM c",
        "PREPARE p AS SELECT n FROM % WHERE id = 1",
        "EXECUTE p",
        "DEALLOCATE p",
        "DEALLOCATE ALL",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    ];
    let mut reads = 0;
    for step in 0..if std::env::var("SPLIT_STEPS").is_ok() { 20_000 } else { 1_500 } {
        let sql =
            statements.choose(&mut random).unwrap().replace('#', &random.random_range(0..9).to_string());
        reads += usize::from(sql.starts_with("SELECT sum"));
        // The same statement for tables that only the one, or the other, changes.
        let unit = |table: &str, shape: u32| {
            let sql = sql.replace('%', table);
            match shape {
                0 => [parse("", &sql), bind("", &[]), execute(), sync()].concat(),
                1 => [executed(&sql), executed(&"SELECT sum(n) FROM %".replace('%', table)), sync()].concat(),
                2 => [executed(&sql), executed("COMMIT"), sync()].concat(),
                _ => query(&sql),
            }
        };
        let shape = random.random_range(0..8);
        let what = format!("step {step}, shape {shape}: {sql}");
        ask_both(&mut proxied, &mut direct, &|table| unit(table, shape), &what).await;
    }
    assert!(reads > 0);
    let metrics = proxy.metrics().await;
    assert!(metrics.sum("highwater_split_transactions_total", &[]) > 0.0);
}
