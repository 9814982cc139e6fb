//! No session sees an older state than it has seen before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::fixture::*;

const SESSIONS: usize = 32;

/// What went wrong, counted.
#[derive(Default)]
struct Counts {
    reads: AtomicUsize,
    stale: AtomicUsize,
    backward: AtomicUsize,
    future: AtomicUsize,
}

/// 32 sessions, each writing a row of its own and reading it back by autocommit statements, and
/// watching a counter that one more session raises; `rounds` of it each.
async fn play(proxy: &Proxy, rounds: i64) -> Counts {
    let counts = Arc::new(Counts::default());
    let raised = Arc::new(AtomicI64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let raiser = {
        let client = proxy.connect().await;
        let (stop, raised) = (stop.clone(), raised.clone());
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                // Announced first: whoever sees a number has seen one that was announced.
                let next = raised.fetch_add(1, Ordering::SeqCst) + 1;
                client.execute("UPDATE counter SET n = $1", &[&next]).await.unwrap();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
    };
    let mut sessions = Vec::new();
    for session in 0..SESSIONS {
        let client = proxy.connect().await;
        let (counts, raised) = (counts.clone(), raised.clone());
        sessions.push(tokio::spawn(async move {
            let id = i32::try_from(session).unwrap();
            let mut last = 0;
            for round in 1..=rounds {
                client.execute("UPDATE own SET n = $1 WHERE id = $2", &[&round, &id]).await.unwrap();
                let n: i64 =
                    client.query_one("SELECT n FROM own WHERE id = $1", &[&id]).await.unwrap().get(0);
                if n != round {
                    counts.stale.fetch_add(1, Ordering::Relaxed);
                }
                for _ in 0..4 {
                    let n: i64 = client.query_one("SELECT n FROM counter", &[]).await.unwrap().get(0);
                    if n < last {
                        counts.backward.fetch_add(1, Ordering::Relaxed);
                    }
                    if n > raised.load(Ordering::SeqCst) {
                        counts.future.fetch_add(1, Ordering::Relaxed);
                    }
                    last = n.max(last);
                }
                counts.reads.fetch_add(5, Ordering::Relaxed);
            }
        }));
    }
    for session in sessions {
        session.await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    raiser.await.unwrap();
    Arc::into_inner(counts).unwrap()
}

fn check(counts: &Counts, least: usize) {
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    let Counts { reads, stale, backward, future } = counts;
    let (reads, stale, backward, future) = (count(reads), count(stale), count(backward), count(future));
    println!("{reads} reads: {stale} stale, {backward} backward, {future} from the future");
    assert!(reads >= least);
    assert_eq!((stale, backward, future), (0, 0, 0));
}

async fn with_tables(replicas: usize) -> Cluster {
    let cluster = Cluster::start(replicas).await;
    cluster
        .set_up(
            "CREATE TABLE own (id int PRIMARY KEY, n bigint);
             INSERT INTO own SELECT i, 0 FROM generate_series(0, 31) i;
             CREATE TABLE counter (n bigint); INSERT INTO counter VALUES (0)",
        )
        .await;
    cluster
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_a_replica_two_seconds_behind_no_read_is_stale_or_backward() {
    let cluster = with_tables(2).await;
    cluster.node(2).set_apply_delay(Duration::from_secs(2)).await.unwrap();
    let proxy = Proxy::start(&cluster).await;
    check(&play(&proxy, 30).await, 4_800);
    // The promise is not kept by using no replica at all.
    assert!(proxy.stop().await.success());
    let transactions = cluster.transactions().await;
    assert!(transactions[1] > 500, "{transactions:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_replay_stops_and_goes_no_read_is_stale_or_backward() {
    let cluster = with_tables(2).await;
    let proxy = Proxy::start(&cluster).await;
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let nodes = [cluster.node(1).clone(), cluster.node(2).clone()];
    let trouble = tokio::spawn(async move {
        while !*stopped.borrow_and_update() {
            for node in &nodes {
                node.pause_replay().await.unwrap();
                let _ = tokio::time::timeout(Duration::from_millis(150), stopped.changed()).await;
                node.resume_replay().await.unwrap();
            }
        }
    });
    let counts = play(&proxy, 20).await;
    stop.send(true).unwrap();
    trouble.await.unwrap();
    check(&counts, 3_200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_replica_backends_crash_no_read_is_stale_or_backward() {
    let cluster = with_tables(2).await;
    let proxy = Proxy::start(&cluster).await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let node = cluster.node(1).clone();
    let trouble = tokio::spawn(async move {
        let mut crashes = 0;
        while !*stopped.borrow() {
            // The whole server restarts in place and answers from an older state for a while.
            node.crash_backend().await.unwrap();
            crashes += 1;
        }
        crashes
    });
    let counts = play(&proxy, 20).await;
    stop.send(true).unwrap();
    assert!(trouble.await.unwrap() > 0);
    check(&counts, 3_200);
}
