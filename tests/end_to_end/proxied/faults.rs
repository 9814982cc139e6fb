//! Nodes die, freeze, are cut off and come back; sessions go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::fixture::*;

const ONE_ROW: &str = "CREATE TABLE t (x int); INSERT INTO t VALUES (1)";

/// Failover settings that notice trouble soon, so that tests are short.
const QUICK: &str =
    "failover: { check_interval: 100ms, check_timeout: 500ms, failure_threshold: 2, eject_time: 200ms }";

fn quick() -> ProxyOptions<'static> {
    ProxyOptions { overrides: QUICK, ..ProxyOptions::default() }
}

/// Autocommit reads by `clients` sessions until told to stop; an error of any of them is a panic.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    async fn start(proxy: &Proxy, clients: usize) -> Load {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = Vec::new();
        for number in 0..clients {
            let client = proxy.connect().await;
            let (stop, done) = (stop.clone(), done.clone());
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    // Half of them by the simple protocol.
                    let answer = match number % 2 {
                        0 => client.query("SELECT x FROM t", &[]).await.map(drop),
                        _ => client.simple_query("SELECT x FROM t").await.map(drop),
                    };
                    answer.unwrap_or_else(|error| panic!("a read failed: {error} {:?}", error.as_db_error()));
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        Load { stop, done, tasks }
    }

    /// Waits until this many more reads have been answered.
    async fn more(&self, reads: usize) {
        let target = self.done.load(Ordering::Relaxed) + reads;
        eventually("reads go on", || async {
            let broken = self.tasks.iter().any(tokio::task::JoinHandle::is_finished);
            broken || self.done.load(Ordering::Relaxed) >= target
        })
        .await;
    }

    async fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_killed_under_load_costs_no_read_and_serves_again_after_its_restart() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(ONE_ROW).await;
    let proxy = Proxy::start_with(&cluster, quick()).await;
    let load = Load::start(&proxy, 16).await;
    load.more(500).await;
    cluster.node(1).crash().await.unwrap();
    load.more(500).await;
    eventually("the dead replica is out", || async { proxy.usable_nodes().await == 2 }).await;
    cluster.node(1).start().await.unwrap();
    eventually("the replica is back", || async { proxy.usable_nodes().await == 3 }).await;
    let scans = "SELECT coalesce(sum(seq_scan), 0) > 0 FROM pg_stat_user_tables WHERE relname = 't'";
    cluster.node(1).wait_for(scans, "t").await.unwrap();
    load.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_or_cut_off_replica_is_left_and_used_again_when_it_answers() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(ONE_ROW).await;
    let proxy = Proxy::start_with(&cluster, quick()).await;
    for fault in ["cut", "silence", "freeze"] {
        // New sessions each time: one that waits on a dead network has its own deadline.
        match fault {
            "cut" => cluster.link(1).cut(),
            "silence" => cluster.link(1).silence(),
            _ => cluster.node(1).freeze().unwrap(),
        }
        eventually("the replica is out", || async { proxy.usable_nodes().await == 2 }).await;
        let load = Load::start(&proxy, 4).await;
        load.more(100).await;
        load.finish().await;
        match fault {
            "freeze" => cluster.node(1).thaw().unwrap(),
            _ => cluster.link(1).heal(),
        }
        eventually("the replica is back", || async { proxy.usable_nodes().await == 3 }).await;
    }
}

#[tokio::test]
async fn without_any_replica_reads_run_on_the_primary() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ONE_ROW).await;
    let proxy = Proxy::start_with(&cluster, quick()).await;
    let client = proxy.connect().await;
    cluster.node(1).crash().await.unwrap();
    for _ in 0..20 {
        client.query_one("SELECT x FROM t", &[]).await.unwrap();
    }
    client.execute("UPDATE t SET x = 2", &[]).await.unwrap();
    assert_eq!(client.query_one("SELECT x FROM t", &[]).await.unwrap().get::<_, i32>(0), 2);
}

#[tokio::test]
async fn a_replica_too_far_behind_serves_no_reads_until_it_has_caught_up() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ONE_ROW).await;
    let overrides = format!("{QUICK}\nconsistency: {{ max_lag: 500ms }}");
    let proxy =
        Proxy::start_with(&cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await;
    cluster.node(1).pause_replay().await.unwrap();
    let writer = proxy.connect().await;
    eventually("the late replica is out", || async {
        writer.execute("UPDATE t SET x = x + 1", &[]).await.unwrap();
        proxy.usable_nodes().await == 1
    })
    .await;
    cluster.node(1).resume_replay().await.unwrap();
    eventually("it is back", || async { proxy.usable_nodes().await == 2 }).await;
}

#[tokio::test]
async fn a_delayed_replica_serves_no_reads_unless_it_is_allowed_to() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ONE_ROW).await;
    cluster.node(1).set_apply_delay(Duration::from_millis(1)).await.unwrap();
    let (a, b) = (cluster.link(0).port(), cluster.link(1).port());
    for (delayed_ok, role) in [(false, "excluded"), (true, "replica")] {
        let overrides = format!(
            "{QUICK}\nnodes: [ {{ name: a, host: 127.0.0.1, port: {a} }}, \
             {{ name: b, host: 127.0.0.1, port: {b}, delayed_ok: {delayed_ok} }} ]"
        );
        let options = ProxyOptions { overrides: &overrides, start: Start::Ready, ..ProxyOptions::default() };
        let proxy = Proxy::start_with(&cluster, options).await;
        eventually("its role is known", || async {
            let labels = [("node", "b"), ("role", role)];
            let metrics = proxy.metrics().await;
            metrics.sum("highwater_node_role", &labels) == 1.0
                && metrics.sum("highwater_replica_apply_delay_seconds", &[("node", "b")]) == 0.001
        })
        .await;
        let topology = proxy.get("/topology").await.unwrap().1;
        assert_eq!(topology.contains("\"excluded\": \"delayed\""), !delayed_ok, "{topology}");
    }
}

#[tokio::test]
async fn a_pause_of_replay_and_the_lag_that_it_makes_are_shown() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ONE_ROW).await;
    let proxy = Proxy::start_with(&cluster, quick()).await;
    let client = proxy.connect().await;
    let node = [("node", cluster.node(1).name())];
    cluster.node(1).pause_replay().await.unwrap();
    client.execute("UPDATE t SET x = 2", &[]).await.unwrap();
    eventually("the pause and the lag are shown", || async {
        let metrics = proxy.metrics().await;
        metrics.sum("highwater_replica_replay_paused", &node) == 1.0
            && metrics.sum("highwater_replica_replay_lag_bytes", &node) > 0.0
            && metrics.sum("highwater_replica_replay_lag_seconds", &node) > 0.5
    })
    .await;
    cluster.node(1).resume_replay().await.unwrap();
    eventually("it has caught up", || async {
        let metrics = proxy.metrics().await;
        metrics.sum("highwater_replica_replay_paused", &node) == 0.0
            && metrics.sum("highwater_replica_replay_lag_bytes", &node) == 0.0
    })
    .await;
}

#[tokio::test]
async fn an_idle_node_is_asked_for_its_position_at_most_twice_a_second() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(ONE_ROW).await;
    let proxy = Proxy::start(&cluster).await;
    let sessions = [proxy.connect().await, proxy.connect().await];
    sessions[0].query_one("SELECT x FROM t", &[]).await.unwrap();
    let samples = async || proxy.metrics().await.sum("highwater_samples_total", &[]);
    let (mut last, mut since) = (samples().await, std::time::Instant::now());
    let mut rates = Vec::new();
    while rates.len() < 4 {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        let (now, at) = (samples().await, std::time::Instant::now());
        // Of two nodes; one more may fall into any stretch of time.
        rates.push((now - last - 2.0) / 2.0 / at.duration_since(since).as_secs_f64());
        (last, since) = (now, at);
    }
    // In the first stretch what the session was shown is still followed.
    assert!(rates[1..].iter().all(|rate| *rate <= 2.0), "{rates:?}");
}

#[tokio::test]
async fn a_promotion_by_somebody_else_is_followed() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(ONE_ROW).await;
    let proxy = Proxy::start_with(&cluster, quick()).await;
    let client = proxy.connect().await;
    client.execute("UPDATE t SET x = 2", &[]).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    cluster.primary().crash().await.unwrap();
    cluster.node(1).promote().await.unwrap();
    cluster.node(2).follow(cluster.node(1)).await.unwrap();
    eventually("writes reach the new primary", || async {
        let Ok(client) = proxy.connect_as("app", &cluster.roles().app).await else { return false };
        client.execute("UPDATE t SET x = 3", &[]).await.is_ok()
    })
    .await;
    assert_eq!(cluster.node(1).query_text("SELECT x FROM t").await.unwrap(), "3");
    // Whatever else happened to it, the old session goes on or has been ended: it never lies.
    if let Ok(row) = client.query_one("SELECT x FROM t", &[]).await {
        assert_eq!(row.get::<_, i32>(0), 3);
    }
    cluster.primary().rebuild_from(cluster.node(1)).await.unwrap();
    eventually("all three serve", || async { proxy.usable_nodes().await == 3 }).await;
}

#[tokio::test]
async fn an_old_primary_that_comes_back_takes_no_writes() {
    let cluster = Cluster::start_logging(1).await;
    cluster.set_up(ONE_ROW).await;
    let proxy = Proxy::start_with(&cluster, quick()).await;
    cluster.primary().crash().await.unwrap();
    cluster.node(1).promote().await.unwrap();
    let app = cluster.roles().app.clone();
    let write = async |sql: &str| match proxy.connect_as("app", &app).await {
        Ok(client) => client.batch_execute(sql).await.is_ok(),
        Err(_) => false,
    };
    eventually("writes reach the new primary", || async { write("UPDATE t SET x = 3").await }).await;
    cluster.primary().start().await.unwrap();
    for _ in 0..50 {
        assert!(write("UPDATE t SET x = x + 1 /* late */").await);
        assert!(write("SELECT x AS late FROM t").await);
    }
    assert_eq!(cluster.ran("late")[0], 0, "the returned primary was used");
    assert_eq!(cluster.node(1).query_text("SELECT x FROM t").await.unwrap(), "53");
}

#[tokio::test]
async fn the_proxy_starts_with_nodes_missing_and_takes_them_in_as_they_come() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(ONE_ROW).await;
    cluster.node(1).crash().await.unwrap();
    cluster.link(2).silence();
    let options = ProxyOptions { overrides: QUICK, start: Start::Ready, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    let client = proxy.connect().await;
    client.execute("UPDATE t SET x = 2", &[]).await.unwrap();
    cluster.node(1).start().await.unwrap();
    cluster.link(2).heal();
    eventually("all three serve", || async { proxy.usable_nodes().await == 3 }).await;
}

#[tokio::test]
async fn a_proxy_without_a_primary_is_not_ready_and_becomes_so_when_one_appears() {
    let cluster = Cluster::start(1).await;
    cluster.primary().crash().await.unwrap();
    let options = ProxyOptions { overrides: QUICK, start: Start::Listening, ..ProxyOptions::default() };
    let proxy = Proxy::start_with(&cluster, options).await;
    eventually("it says that it is not ready", || async {
        proxy.get("/readyz").await.is_some_and(|(status, _)| status == 503)
    })
    .await;
    assert_eq!(proxy.get("/healthz").await.unwrap().0, 200);
    cluster.primary().start().await.unwrap();
    eventually("it is ready", || async {
        proxy.get("/readyz").await.is_some_and(|(status, _)| status == 200)
    })
    .await;
    proxy.connect().await.batch_execute("CREATE TABLE t ()").await.unwrap();
}

#[tokio::test]
async fn a_write_whose_connection_breaks_is_not_run_twice() {
    let cluster = Cluster::start(1).await;
    cluster.set_up("CREATE TABLE t (x int)").await;
    let proxy = Proxy::start_with(&cluster, quick()).await;
    let holder = cluster.primary().connect("app", &cluster.roles().app).await.unwrap();
    for round in 0..5 {
        let mut client = proxy.raw_login().await;
        // It waits for the lock: it is underway for certain when its connection breaks.
        holder.batch_execute("BEGIN; LOCK TABLE t").await.unwrap();
        client.send(&query(&format!("INSERT INTO t VALUES ({round})"))).await;
        let active =
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'INSERT INTO t%'";
        cluster.primary().wait_for(active, "1").await.unwrap();
        cluster.link(0).cut();
        let answer = client.read_ready().await;
        let error = answer.iter().find(|message| message.tag == b'E');
        let code = error.and_then(|error| error.field(b'C')).unwrap_or_default();
        assert!(code.starts_with("08"), "the outcome is not known, and that is what is said: {answer:?}");
        cluster.link(0).heal();
        holder.batch_execute("ROLLBACK").await.unwrap();
        cluster.primary().wait_for(active, "0").await.unwrap();
        eventually("the primary is back", || async {
            match proxy.connect_as("app", &cluster.roles().app).await {
                Ok(client) => client.batch_execute("UPDATE t SET x = x").await.is_ok(),
                Err(_) => false,
            }
        })
        .await;
        let times =
            cluster.primary().query_text(&format!("SELECT count(*) FROM t WHERE x = {round}")).await.unwrap();
        assert!(times == "0" || times == "1", "run {times} times");
    }
}

#[tokio::test]
async fn a_long_silence_of_the_network_ends_in_an_error_and_not_in_a_hang() {
    let cluster = Cluster::start(0).await;
    let proxy = Proxy::start_with(&cluster, quick()).await;
    proxy.raw_login().await.ask(&query("SELECT 1")).await;
    cluster.link(0).silence();
    // What is on its way already waits as long as TCP does (`tcp_user_timeout`), and this link acknowledges all; what
    // comes later waits for a sign of life of the primary, and no longer than it may.
    let mut client = proxy.raw().await;
    let answer = async {
        match client.login("app", proxy.app()).await {
            Ok(()) => tags(&client.ask(&query("CREATE TABLE t ()")).await).contains('E'),
            Err(refused) => refused.tag == b'E',
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(25), answer).await.expect("no answer"));
    cluster.link(0).heal();
}
