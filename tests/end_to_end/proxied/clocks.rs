//! A replica whose clock is behind must not hide from a session what it has just written with `now()`.

use std::path::PathBuf;

use crate::fixture::*;

/// So many rounds; `HIGHWATER_CLOCK_ROUNDS=10000` for a longer look.
fn rounds() -> usize {
    std::env::var("HIGHWATER_CLOCK_ROUNDS").map_or(200, |rounds| rounds.parse().unwrap())
}

/// The library that shifts a server's clock, if this machine has it.
fn libfaketime() -> Option<PathBuf> {
    let multiarch = std::fs::read_dir("/usr/lib").ok()?;
    let found = multiarch.flatten().map(|entry| entry.path().join("faketime/libfaketime.so.1"));
    let found = found.chain([PathBuf::from("/usr/lib/faketime/libfaketime.so.1")]).find(|path| path.exists());
    if found.is_none() {
        println!("SKIPPED: no libfaketime on this machine (Debian: apt-get install faketime)");
    }
    found
}

const TABLES: &str = "
    CREATE TABLE jobs (id serial PRIMARY KEY, run_at timestamptz NOT NULL DEFAULT now());
    CREATE VIEW due AS SELECT id FROM jobs WHERE run_at <= now();
    CREATE VIEW due_by_the_clock AS SELECT id FROM jobs WHERE run_at <= clock_timestamp();
    CREATE FUNCTION is_due(timestamptz) RETURNS boolean STABLE LANGUAGE sql AS 'SELECT $1 <= clock_timestamp()';";

/// A primary, a replica `b` whose clock is 250 ms behind, and as many others as asked for.
async fn with_a_late_clock(others: usize, overrides: &str) -> Option<(Cluster, Proxy)> {
    let library = libfaketime()?;
    let cluster = Cluster::start_logging(1 + others).await;
    cluster.set_up(TABLES).await;
    let late = cluster.node(1);
    late.set_environment(&[
        ("LD_PRELOAD", library.to_str().unwrap()),
        ("FAKETIME", "-0.25s"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("FAKETIME_DONT_RESET", "1"),
    ]);
    late.restart().await.unwrap();
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    eventually("the offset of its clock is known", async || {
        let offset = proxy.metrics().await.sum("highwater_node_clock_offset_seconds", &[("node", "b")]);
        (-0.3..-0.2).contains(&offset)
    })
    .await;
    let client = proxy.connect().await;
    eventually("reads run on replicas", async || {
        client.simple_query("SELECT count(*) FROM jobs").await.unwrap();
        proxy.metrics().await.sum("highwater_statements_total", &[("reason", "read")]) > 0.0
    })
    .await;
    Some((cluster, proxy))
}

/// How many of its own rows a session does not find among those that are due.
async fn hidden(proxy: &Proxy, rounds: usize) -> usize {
    let client = proxy.connect().await;
    let prepared =
        client.prepare("SELECT count(*) FROM jobs WHERE id = $1 AND run_at <= now()").await.unwrap();
    let by_parameter = "SELECT count(*) FROM jobs WHERE id = $1 AND run_at <= $2::text::timestamptz";
    let by_parameter = client.prepare(by_parameter).await.unwrap();
    let mut hidden = 0;
    for round in 0..rounds {
        let row = client.query_one("INSERT INTO jobs DEFAULT VALUES RETURNING id", &[]).await.unwrap();
        let id: i32 = row.get(0);
        let found: i64 = match round % 7 {
            0 => client.query_one(&prepared, &[&id]).await.unwrap().get(0),
            1 => client.query_one(&by_parameter, &[&id, &"now"]).await.unwrap().get(0),
            form => {
                let text = match form {
                    2 => format!("SELECT count(*) FROM due WHERE id = {id}"),
                    5 => format!("SELECT count(*) FROM due_by_the_clock WHERE id = {id}"),
                    3 => format!("SELECT count(*) FROM jobs WHERE id = {id} AND is_due(run_at)"),
                    4 => format!("SELECT count(*) FROM jobs WHERE id = {id} AND run_at <= 'now'"),
                    _ => format!("SELECT count(*) FROM jobs WHERE id = {id} AND run_at <= CURRENT_TIMESTAMP"),
                };
                client.query_one(&text, &[]).await.unwrap().get(0)
            }
        };
        hidden += usize::from(found == 0);
    }
    hidden
}

#[tokio::test]
async fn no_row_of_a_sessions_own_is_hidden_by_a_clock_that_is_behind() {
    let Some((_cluster, proxy)) = with_a_late_clock(0, "").await else { return };
    assert_eq!(hidden(&proxy, rounds()).await, 0, "of {} rows", rounds());
    let metrics = proxy.metrics().await;
    let kept_off = metrics.sum("highwater_statements_total", &[("reason", "clock")]);
    assert!(kept_off >= rounds() as f64 * 0.9, "{kept_off} of {} reads", rounds());
    // What does not ask for the time goes on as ever.
    let client = proxy.connect().await;
    let before = metrics.sum("highwater_statements_total", &[("reason", "read")]);
    eventually("other reads run on the replica", async || {
        client.simple_query("SELECT count(*) FROM jobs").await.unwrap();
        proxy.metrics().await.sum("highwater_statements_total", &[("reason", "read")]) > before
    })
    .await;
}

#[tokio::test]
async fn without_the_rule_a_clock_that_is_behind_hides_rows() {
    let overrides = "consistency: { clock_tolerance: 1h, catch_up_wait: 2s }";
    let Some((_cluster, proxy)) = with_a_late_clock(0, overrides).await else { return };
    let hidden = hidden(&proxy, 30).await;
    assert!(hidden > 0, "the tests above would not notice");
}

#[tokio::test]
async fn a_replica_whose_clock_is_right_serves_what_the_late_one_must_not() {
    let Some((cluster, proxy)) = with_a_late_clock(1, "consistency: { catch_up_wait: 2s }").await else {
        return;
    };
    let client = proxy.connect().await;
    for _ in 0..40 {
        client.simple_query("SELECT count(*) /* due */ FROM jobs WHERE run_at <= now()").await.unwrap();
    }
    let ran = cluster.ran("/* due */");
    assert_eq!(ran[1], 0, "{ran:?}");
    assert!(ran[2] > 0, "{ran:?}");
    // A pipeline that has begun on the late one without a word of the time, and then asks for it.
    let mut raw = proxy.raw_login().await;
    raw.send(&[parse("", "SELECT count(*) /* later */ FROM jobs WHERE run_at <= $1"), flush()].concat())
        .await;
    assert_eq!(raw.read().await.unwrap().tag, b'1');
    let answer = raw.ask(&[bind("", &["now"]), execute(), sync()].concat()).await;
    assert_eq!(tags(&answer), "2DCZ");
    assert_eq!(cluster.ran("/* later */")[1], 0);
    // Who asks for nothing gets what there is.
    let eventual = proxy.connect().await;
    eventual.batch_execute("SET highwater.consistency = 'eventual'").await.unwrap();
    eventually("a read at level eventual asks the late clock", async || {
        eventual.simple_query("SELECT now() /* eventual */").await.unwrap();
        cluster.ran("/* eventual */")[1] > 0
    })
    .await;
}
