//! No session sees an older state than it has seen before, whatever happens to the nodes.
//!
//! `make soak-consistency` runs these at length; HIGHWATER_SOAK_READS sets the size.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use crate::fixture::*;

const SESSIONS: usize = 32;
/// Reads per round: one of the session's own row, the rest of the counter.
const READS: usize = 5;

/// What went wrong, counted.
#[derive(Default)]
struct Counts {
    reads: AtomicUsize,
    stale: AtomicUsize,
    backward: AtomicUsize,
    future: AtomicUsize,
    errors: AtomicUsize,
}

/// Whether statements may fail: only where the primary is taken away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Errors {
    Never,
    /// Counted; a session whose connection was ended goes on in a new one.
    Allowed,
}

/// One of those who play.
struct Player<'a> {
    proxy: &'a Proxy,
    client: tokio_postgres::Client,
    errors: Errors,
    counts: &'a Counts,
    /// Connections it has had: each is a session, with a past of its own.
    sessions: usize,
}

impl<'a> Player<'a> {
    async fn new(proxy: &'a Proxy, errors: Errors, counts: &'a Counts) -> Player<'a> {
        Player { proxy, client: Player::session(proxy, errors).await, errors, counts, sessions: 1 }
    }

    /// A login may meet the trouble as any statement may.
    async fn session(proxy: &Proxy, errors: Errors) -> tokio_postgres::Client {
        if errors == Errors::Never {
            return proxy.connect().await;
        }
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            match proxy.connect_as("app", proxy.app()).await {
                Ok(client) => return client,
                Err(error) => assert!(std::time::Instant::now() < deadline, "nobody is let in: {error}"),
            }
        }
    }

    /// Whether it may go on after `error`.
    async fn survives(&mut self, error: tokio_postgres::Error) {
        if self.errors == Errors::Never {
            panic!("{error} {:?}", error.as_db_error());
        }
        self.counts.errors.fetch_add(1, Ordering::Relaxed);
        if self.client.is_closed() || error.as_db_error().is_none() {
            self.client = Player::session(self.proxy, self.errors).await;
            self.sessions += 1;
        }
    }

    async fn write(&mut self, sql: &str, parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)]) -> bool {
        match self.client.execute(sql, parameters).await {
            Ok(rows) => {
                assert_eq!(rows, 1, "the row was not there: {sql}");
                true
            }
            Err(error) => {
                self.survives(error).await;
                false
            }
        }
    }

    async fn read(
        &mut self,
        sql: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Option<i64> {
        match self.client.query_one(sql, parameters).await {
            Ok(row) => Some(row.get(0)),
            Err(error) => {
                self.survives(error).await;
                None
            }
        }
    }

    /// Writes a row of its own and reads it back, and watches the counter that one more session raises.
    async fn play(mut self, id: i32, rounds: i64, raised: &AtomicI64) {
        let counts = self.counts;
        let (mut last, mut acknowledged, mut sessions) = (0, 0, self.sessions);
        for round in 1..=rounds {
            if self.write("UPDATE own SET n = $1 WHERE id = $2", &[&round, &id]).await {
                acknowledged = round;
            }
            if let Some(n) = self.read("SELECT n FROM own WHERE id = $1", &[&id]).await {
                // Also in a new session: it begins at what the primary holds.
                counts.stale.fetch_add(usize::from(n < acknowledged), Ordering::Relaxed);
                counts.future.fetch_add(usize::from(n > round), Ordering::Relaxed);
                counts.reads.fetch_add(1, Ordering::Relaxed);
            }
            for _ in 1..READS {
                let Some(n) = self.read("SELECT n FROM counter", &[]).await else { continue };
                if std::mem::replace(&mut sessions, self.sessions) != self.sessions {
                    last = 0;
                }
                counts.backward.fetch_add(usize::from(n < last), Ordering::Relaxed);
                counts.future.fetch_add(usize::from(n > raised.load(Ordering::SeqCst)), Ordering::Relaxed);
                counts.reads.fetch_add(1, Ordering::Relaxed);
                last = n.max(last);
            }
        }
    }

    async fn raise(mut self, raised: &AtomicI64, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            // Announced first: whoever sees a number has seen one that was announced.
            let next = raised.fetch_add(1, Ordering::SeqCst) + 1;
            self.write("UPDATE counter SET n = $1", &[&next]).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// 32 sessions and the one that raises the counter; at least `reads` reads in all.
async fn play(proxy: &Proxy, reads: usize, errors: Errors) -> Counts {
    let reads = std::env::var("HIGHWATER_SOAK_READS").map_or(reads, |reads| reads.parse().unwrap());
    let rounds = i64::try_from(reads.div_ceil(SESSIONS * READS)).unwrap();
    let (counts, raised, stop) = (Counts::default(), AtomicI64::new(0), AtomicBool::new(false));
    let raiser = Player::new(proxy, errors, &counts).await.raise(&raised, &stop);
    let sessions = async {
        let mut sessions = Vec::new();
        for id in 0..SESSIONS {
            let player = Player::new(proxy, errors, &counts).await;
            sessions.push(player.play(i32::try_from(id).unwrap(), rounds, &raised));
        }
        futures_util::future::join_all(sessions).await;
        stop.store(true, Ordering::Relaxed);
    };
    tokio::join!(raiser, sessions);
    counts
}

/// What the counts must be; `least`: reads.
fn check(story: &str, counts: &Counts, errors: Errors, least: usize) {
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    let Counts { reads, stale, backward, future, errors: failed } = counts;
    let (reads, failed) = (count(reads), count(failed));
    let (stale, backward, future) = (count(stale), count(backward), count(future));
    println!(
        "{story}: {reads} reads, {stale} stale, {backward} backward, {future} from the future, {failed} errors"
    );
    assert!(reads >= least, "{reads} reads");
    assert_eq!((stale, backward, future), (0, 0, 0));
    assert!(errors == Errors::Allowed || failed == 0);
}

/// What is done to the nodes while sessions play: again and again, until they have finished.
pub struct Trouble {
    stop: tokio::sync::watch::Sender<bool>,
    task: tokio::task::JoinHandle<usize>,
}

impl Trouble {
    pub fn begin<F: Future<Output = ()> + Send>(mut make: impl FnMut() -> F + Send + 'static) -> Trouble {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let task = tokio::spawn(async move {
            let mut times = 0;
            while !*stopped.borrow() {
                make().await;
                times += 1;
            }
            times
        });
        Trouble { stop, task }
    }

    pub async fn end(self) {
        self.stop.send(true).unwrap();
        let times = self.task.await.unwrap();
        println!("trouble: {times} times");
        assert!(times > 0);
    }
}

/// Some time, by no rule.
pub async fn a_while(up_to_ms: u64) {
    tokio::time::sleep(Duration::from_millis(rand::random::<u64>() % up_to_ms)).await;
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

/// Commits are acknowledged when one of `standbys` has them: the primary hides them for longer.
pub async fn synchronous(cluster: &Cluster, standbys: &str) {
    cluster.primary().set("synchronous_standby_names", standbys).await.unwrap();
    let waits = "SELECT count(*) > 0 FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')";
    cluster.primary().wait_for(waits, "t").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_a_replica_two_seconds_behind_no_read_is_stale_or_backward() {
    let cluster = with_tables(2).await;
    cluster.node(2).set_apply_delay(Duration::from_secs(2)).await.unwrap();
    let proxy = Proxy::start(&cluster).await;
    check("delayed", &play(&proxy, 4_800, Errors::Never).await, Errors::Never, 4_800);
    // The promise is not kept by using no replica at all.
    assert!(proxy.stop().await.success());
    let transactions = cluster.transactions().await;
    println!("transactions by node: {transactions:?}");
    assert!(transactions[1] > 500, "{transactions:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_synchronous_standby_no_read_is_stale_or_backward() {
    let cluster = with_tables(2).await;
    cluster.node(2).set_apply_delay(Duration::from_secs(2)).await.unwrap();
    synchronous(&cluster, "ANY 1 (*)").await;
    let proxy = Proxy::start(&cluster).await;
    check("synchronous", &play(&proxy, 3_200, Errors::Never).await, Errors::Never, 3_200);
    assert!(proxy.stop().await.success());
    let transactions = cluster.transactions().await;
    println!("transactions by node: {transactions:?}");
    assert!(transactions[1] > 300, "{transactions:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_replay_stops_and_goes_no_read_is_stale_or_backward() {
    let cluster = with_tables(2).await;
    let proxy = Proxy::start(&cluster).await;
    let nodes = [cluster.node(1).clone(), cluster.node(2).clone()];
    let trouble = Trouble::begin(move || {
        let node = nodes[usize::from(rand::random::<bool>())].clone();
        async move {
            node.pause_replay().await.unwrap();
            a_while(150).await;
            node.resume_replay().await.unwrap();
            a_while(50).await;
        }
    });
    let counts = play(&proxy, 3_200, Errors::Never).await;
    trouble.end().await;
    check("paused", &counts, Errors::Never, 3_200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_replica_backends_crash_no_read_is_stale_or_backward() {
    let cluster = with_tables(2).await;
    let proxy = Proxy::start(&cluster).await;
    let node = cluster.node(1).clone();
    let trouble = Trouble::begin(move || {
        let node = node.clone();
        async move {
            // The whole server restarts in place and answers from an older state for a while.
            node.crash_backend().await.unwrap();
            a_while(100).await;
        }
    });
    let counts = play(&proxy, 3_200, Errors::Never).await;
    trouble.end().await;
    check("crashing", &counts, Errors::Never, 3_200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_replica_is_killed_and_started_no_read_is_stale_or_backward() {
    let cluster = with_tables(2).await;
    let proxy = Proxy::start(&cluster).await;
    let node = cluster.node(1).clone();
    let trouble = Trouble::begin(move || {
        let node = node.clone();
        async move {
            node.crash().await.unwrap();
            a_while(200).await;
            node.start().await.unwrap();
            a_while(1000).await;
        }
    });
    let counts = play(&proxy, 3_200, Errors::Never).await;
    trouble.end().await;
    check("killed", &counts, Errors::Never, 3_200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_primary_restarts_no_read_is_stale_or_backward() {
    let cluster = with_tables(2).await;
    let overrides = "failover: { check_interval: 100ms, check_timeout: 500ms, failure_threshold: 2 }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let node = cluster.primary().clone();
    let trouble = Trouble::begin(move || {
        let node = node.clone();
        async move {
            if rand::random() {
                node.crash().await.unwrap();
                node.start().await.unwrap();
            } else {
                node.crash_backend().await.unwrap();
            }
            a_while(1500).await;
        }
    });
    let counts = play(&proxy, 3_200, Errors::Allowed).await;
    trouble.end().await;
    check("primary restarts", &counts, Errors::Allowed, 2_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_after_a_read_of_a_replica_whose_replay_stands_still_does_not_wait_for_it() {
    let cluster = with_tables(1).await;
    let proxy = Proxy::start(&cluster).await;
    let client = proxy.connect().await;
    let other = proxy.connect().await;
    // The session is let to the replica, whose replay stops with something left to apply.
    eventually("reads run on the replica", || async {
        client.query_one("SELECT n FROM counter", &[]).await.unwrap();
        proxy.metrics().await.sum("highwater_statements_total", &[("reason", "read")]) > 0.0
    })
    .await;
    cluster.node(1).pause_replay().await.unwrap();
    other.execute("UPDATE counter SET n = 1", &[]).await.unwrap();
    cluster
        .node(1)
        .wait_for("SELECT pg_last_wal_receive_lsn() > pg_last_wal_replay_lsn()", "t")
        .await
        .unwrap();
    let read = client.query_one("SELECT n FROM counter", &[]).await.unwrap();
    assert_eq!(read.get::<_, i64>(0), 0, "the test needs a read that the paused replica has served");
    let write = client.execute("UPDATE counter SET n = 2", &[]);
    let written = tokio::time::timeout(Duration::from_secs(5), write).await;
    assert_eq!(written.expect("the write waits for a replay that stands still").unwrap(), 1);
    assert_eq!(client.query_one("SELECT n FROM counter", &[]).await.unwrap().get::<_, i64>(0), 2);
    cluster.node(1).resume_replay().await.unwrap();
}

/// Sessions read and write while another node is promoted; the old primary lives on, and must not be
/// written to once the promotion is known.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_outside_under_load_takes_the_sessions_along() {
    let cluster = with_tables(2).await;
    // What is acknowledged is on the node that will be promoted.
    synchronous(&cluster, &format!("FIRST 1 (\"{}\")", cluster.node(1).name())).await;
    let overrides =
        "failover: { mode: follow, check_interval: 100ms, check_timeout: 500ms, failure_threshold: 2 }";
    let proxy =
        Arc::new(Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await);
    let stop = Arc::new(AtomicBool::new(false));
    let promoted = Arc::new(AtomicBool::new(false));
    let mut sessions = Vec::new();
    for id in 0..8i32 {
        let mut client = proxy.connect().await;
        let (proxy, stop, promoted) = (proxy.clone(), stop.clone(), promoted.clone());
        sessions.push(tokio::spawn(async move {
            let (mut last, mut after, mut refused, mut ended) = (0i64, 0, 0, 0);
            let mut round = 0i64;
            while !stop.load(Ordering::Relaxed) || after < 20 {
                round += 1;
                let is_promoted = promoted.load(Ordering::SeqCst);
                let written = client.execute("UPDATE own SET n = $1 WHERE id = $2", &[&round, &id]).await;
                match written {
                    Ok(rows) => {
                        assert_eq!(rows, 1);
                        last = round;
                    }
                    Err(_) => refused += 1,
                }
                match client.query_one("SELECT n FROM own WHERE id = $1", &[&id]).await {
                    Ok(row) => {
                        let n: i64 = row.get(0);
                        assert!(n >= last && n <= round, "read {n} after {last} was acknowledged");
                        after += usize::from(is_promoted);
                    }
                    Err(_) => refused += 1,
                }
                while client.is_closed() {
                    ended += 1;
                    match proxy.connect_as("app", proxy.app()).await {
                        Ok(again) => client = again,
                        Err(_) => a_while(20).await,
                    }
                }
            }
            (last, refused, ended)
        }));
    }
    eventually("all are at work", || async {
        let least = "SELECT min(n) > 10 FROM own WHERE id < 8";
        cluster.primary().query_text(least).await.unwrap() == "t"
    })
    .await;
    cluster.primary().crash().await.unwrap();
    cluster.node(1).promote().await.unwrap();
    cluster.node(2).follow(cluster.node(1)).await.unwrap();
    eventually("the new primary is followed", || async {
        proxy
            .metrics()
            .await
            .sum("highwater_node_role", &[("node", cluster.node(1).name()), ("role", "primary")])
            == 1.0
    })
    .await;
    promoted.store(true, Ordering::SeqCst);
    // The old one comes back as it was: a second primary.
    cluster.primary().start().await.unwrap();
    let before =
        cluster.primary().query_text("SELECT string_agg(n::text, ',' ORDER BY id) FROM own").await.unwrap();
    stop.store(true, Ordering::Relaxed);
    for (id, session) in sessions.into_iter().enumerate() {
        let (last, refused, ended) = session.await.unwrap();
        println!("session {id}: {last} acknowledged, {refused} refused, {ended} times ended");
        let held = cluster.node(1).query_text(&format!("SELECT n FROM own WHERE id = {id}")).await.unwrap();
        assert!(held.parse::<i64>().unwrap() >= last);
    }
    let after =
        cluster.primary().query_text("SELECT string_agg(n::text, ',' ORDER BY id) FROM own").await.unwrap();
    assert_eq!(before, after, "the old primary was written to");
}

/// A session that holds a backend of the old primary does not commit there once another is followed.
#[tokio::test]
async fn a_transaction_open_on_a_replaced_primary_is_not_committed_there() {
    let cluster = with_tables(1).await;
    let overrides =
        "failover: { mode: follow, check_interval: 100ms, check_timeout: 500ms, failure_threshold: 2 }";
    let proxy = Proxy::start_with(&cluster, ProxyOptions { overrides, ..ProxyOptions::default() }).await;
    let client = proxy.connect().await;
    client.batch_execute("BEGIN; UPDATE own SET n = 77 WHERE id = 1").await.unwrap();
    // The old primary is alive all the time.
    cluster.node(1).promote().await.unwrap();
    eventually("the new primary is followed", || async {
        proxy
            .metrics()
            .await
            .sum("highwater_node_role", &[("node", cluster.node(1).name()), ("role", "primary")])
            == 1.0
    })
    .await;
    assert!(client.batch_execute("COMMIT").await.is_err());
    let active = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'app' AND state LIKE 'idle in%'";
    cluster.primary().wait_for(active, "0").await.unwrap();
    assert_eq!(cluster.primary().query_text("SELECT n FROM own WHERE id = 1").await.unwrap(), "0");
}
