//! The primary dies, freezes, is cut off or exchanged while clients write; and so does the proxy.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use highwater::config::Config;
use highwater::control::Command;
use highwater::demo::port::ReservedPort;
use highwater::server::ServerHandle;
use highwater::topology::NodeId;

use crate::fixture::*;

pub(super) const TABLE: &str = "CREATE TABLE t (x bigint PRIMARY KEY)";

/// The bars, in milliseconds: a killed primary, a frozen one, a switchover.
const KILLED: u128 = 1500;
const FROZEN: u128 = 7000;
const EXCHANGED: u128 = 500;

/// What a writer may be told as its primary goes: that nobody knows the outcome, or, where nothing was begun (a
/// statement was being prepared), that the session ends.
const ALLOWED: &[&str] = &["08007", "57P01", "closed"];

/// The fixture's configuration with failover by itself, and its state in `directory`.
pub(super) fn auto(directory: &tempfile::TempDir, more: &str) -> String {
    let state = directory.path().join("state");
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    // However loaded the machine is, no order is to be given up for that.
    let patient = "startup_grace: 1s, sever_timeout: 20s";
    format!("failover: {{ mode: auto, state_dir: '{}', {patient}{more} }}", state.display())
}

pub(super) async fn started(cluster: &Cluster, directory: &tempfile::TempDir, more: &str) -> Proxy {
    started_with(cluster, directory, more, "").await
}

pub(super) async fn started_with(
    cluster: &Cluster,
    directory: &tempfile::TempDir,
    more: &str,
    failpoint: &str,
) -> Proxy {
    let overrides = auto(directory, more);
    let options = ProxyOptions { overrides: &overrides, failpoint, ..ProxyOptions::default() };
    Proxy::start_with(cluster, options).await
}

pub(super) async fn primary(proxy: &Proxy) -> Option<String> {
    let (_, text) = proxy.get("/topology").await?;
    let topology: serde_json::Value = serde_json::from_str(&text).ok()?;
    topology["primary"].as_str().map(str::to_owned)
}

pub(super) async fn is_in(proxy: &Proxy, state: &str) -> bool {
    proxy.metrics().await.sum("highwater_failover_state", &[("state", state)]) == 1.0
}

/// Who writes single rows through a proxy, one statement each, and what became of them.
pub(super) struct Writers {
    stop: Arc<AtomicBool>,
    next: Arc<AtomicI64>,
    acknowledged: Arc<Mutex<Vec<(Instant, i64)>>>,
    errors: Arc<Mutex<BTreeMap<String, usize>>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Writers {
    pub(super) async fn start(port: u16, cluster: &Cluster, clients: usize) -> Writers {
        Writers::start_from(port, cluster, clients, 0).await
    }

    /// With rows from `first` on.
    pub(super) async fn start_from(port: u16, cluster: &Cluster, clients: usize, first: i64) -> Writers {
        let writers = Writers {
            stop: Arc::default(),
            next: Arc::new(AtomicI64::new(first)),
            acknowledged: Arc::default(),
            errors: Arc::default(),
            tasks: Vec::new(),
        };
        let mut tasks = Vec::new();
        for _ in 0..clients {
            let (stop, next) = (writers.stop.clone(), writers.next.clone());
            let (acknowledged, errors) = (writers.acknowledged.clone(), writers.errors.clone());
            let login = cluster.roles().app.clone();
            let connect = move || {
                let login = login.clone();
                async move { highwater::demo::cluster::connect(port, "app", &login).await }
            };
            let mut client = connect().await.unwrap();
            tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let id = next.fetch_add(1, Ordering::Relaxed);
                    match client.execute("INSERT INTO t VALUES ($1)", &[&id]).await {
                        Ok(_) => acknowledged.lock().unwrap().push((Instant::now(), id)),
                        Err(error) => {
                            let code =
                                error.code().map_or("closed".to_owned(), |code| code.code().to_owned());
                            *errors.lock().unwrap().entry(code).or_default() += 1;
                        }
                    }
                    while client.is_closed() && !stop.load(Ordering::Relaxed) {
                        match connect().await {
                            Ok(new) => client = new,
                            // The proxy may be away, too.
                            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                        }
                    }
                }
            }));
        }
        Writers { tasks, ..writers }
    }

    fn acknowledged(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits until this many more have been acknowledged.
    pub(super) async fn more(&self, writes: usize) {
        let target = self.acknowledged() + writes;
        eventually("writes go on", || async { self.acknowledged() >= target }).await;
    }

    /// Stops them all; a statement that waits is waited for.
    pub(super) async fn finish(self) -> Written {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        let acknowledged = std::mem::take(&mut *self.acknowledged.lock().unwrap());
        let errors = std::mem::take(&mut *self.errors.lock().unwrap());
        Written { acknowledged, errors }
    }
}

pub(super) struct Written {
    acknowledged: Vec<(Instant, i64)>,
    pub(super) errors: BTreeMap<String, usize>,
}

impl Written {
    /// How long after `at` the first write was acknowledged by the next primary: the end of the longest time without.
    pub(super) fn first_after(&self, at: Instant) -> Duration {
        let mut times: Vec<Instant> = self.acknowledged.iter().map(|(when, _)| *when).collect();
        times.sort();
        let longest = times.windows(2).filter(|pair| pair[1] > at).max_by_key(|pair| pair[1] - pair[0]);
        longest.expect("nothing was written afterwards")[1].duration_since(at)
    }

    /// The longest time between two acknowledgements.
    fn gap(&self) -> Duration {
        let mut times: Vec<Instant> = self.acknowledged.iter().map(|(when, _)| *when).collect();
        times.sort();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    /// How many acknowledged rows `node` does not have.
    pub(super) async fn lost(&self, cluster: &Cluster, node: usize) -> usize {
        self.lost_at(cluster, node).await.len()
    }

    /// When each row was acknowledged that `node` does not have.
    async fn lost_at(&self, cluster: &Cluster, node: usize) -> Vec<Instant> {
        let client = cluster.node(node).connect("app", &cluster.roles().superuser).await.unwrap();
        let rows = client.query("SELECT x FROM t", &[]).await.unwrap();
        let there: std::collections::HashSet<i64> = rows.iter().map(|row| row.get(0)).collect();
        self.acknowledged.iter().filter(|(_, id)| !there.contains(id)).map(|(at, _)| *at).collect()
    }
}

/// The index of the one node that is not in recovery, among those that run.
pub(super) async fn only_primary(cluster: &Cluster) -> usize {
    let mut found = Vec::new();
    for (index, node) in cluster.nodes().iter().enumerate() {
        if node.is_running() && node.query_text("SELECT pg_is_in_recovery()").await.unwrap() == "f" {
            found.push(index);
        }
    }
    assert_eq!(found.len(), 1, "primaries: {found:?}");
    found[0]
}

/// A proxy in this process, to give commands to.
struct Inside {
    server: Option<ServerHandle>,
    port: u16,
    _ports: (ReservedPort, ReservedPort),
}

impl Inside {
    async fn start(cluster: &Cluster, overrides: &str) -> Inside {
        let ports = (ReservedPort::claim().unwrap(), ReservedPort::claim().unwrap());
        let options = ProxyOptions { overrides, ..ProxyOptions::default() };
        let text = config_text(cluster, ports.0.number(), ports.1.number(), &options);
        let config = Config::parse(&text, "test", &|_| None).unwrap();
        let server = tokio::task::spawn_blocking(move || highwater::server::start(config)).await.unwrap();
        let inside = Inside {
            server: Some(server.unwrap_or_else(|e| panic!("{e}"))),
            port: ports.0.number(),
            _ports: ports,
        };
        let nodes = cluster.nodes().len();
        eventually("all nodes serve", || async {
            let topology = inside.server().topology.load_full();
            topology.primary.is_some() && topology.serving_replicas().count() == nodes - 1
        })
        .await;
        inside
    }

    fn server(&self) -> &ServerHandle {
        self.server.as_ref().unwrap()
    }

    async fn give(&self, command: Command) -> Result<String, String> {
        let answer = self.server().commands.give(command);
        tokio::time::timeout(PATIENCE * 2, answer).await.expect("the command was not answered")
    }

    fn state(&self) -> &'static str {
        self.server().commands.status().state
    }

    async fn until(&self, state: &str) {
        eventually(state, || async { self.state() == state }).await;
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // It joins its threads, which must not stop this one's runtime.
        let server = self.server.take();
        let _ = std::thread::spawn(move || drop(server)).join();
    }
}

/// How often the heavy ones run; `make failover` sets it.
fn runs() -> usize {
    std::env::var("HIGHWATER_FAILOVER_RUNS").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// A line of the table of `make failover`: what was shown, in how many runs, and in what time.
pub(super) struct Line {
    /// Its place among the items of the list.
    place: u8,
    what: &'static str,
    /// In milliseconds; 0: it has none.
    bar: u128,
    lost: String,
}

impl Line {
    pub(super) fn new(place: u8, what: &'static str, bar: u128, lost: impl Into<String>) -> Line {
        Line { place, what, bar, lost: lost.into() }
    }

    /// With the time that each run took.
    pub(super) fn timed(self, values: &[Duration]) {
        let mut ms: Vec<u128> = values.iter().map(Duration::as_millis).collect();
        ms.sort_unstable();
        let (Some(least), Some(most)) = (ms.first(), ms.last()) else { return };
        let (bar, over) = (self.bar, ms.iter().filter(|ms| **ms > self.bar).count());
        let over = if over == 0 { String::new() } else { format!(", {over} above") };
        self.put(&format!("{} | {least} | {} | {most} | {bar}{over}", ms.len(), ms[ms.len() / 2]));
    }

    /// Without a time that counts.
    pub(super) fn shown(self, runs: usize) {
        self.put(&format!("{runs} | | | | "));
    }

    fn put(&self, figures: &str) {
        let line = format!("| {} | {figures} | {} |", self.what, self.lost);
        println!("{line}");
        if let Ok(path) = std::env::var("HIGHWATER_FAILOVER_TABLE") {
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
            writeln!(file, "{:02}{line}", self.place).unwrap();
        }
    }
}

/// Of a run that took long: what failover did when.
fn explain(proxy: &Proxy, took: Duration, bar: u128) {
    if took.as_millis() * 4 > bar * 3 {
        println!("a run took {took:?}:");
        for line in proxy.log().lines().filter(|line| line.contains("failover") || line.contains("order")) {
            println!("    {line}");
        }
    }
}

/// Runs that mostly wait, some of them at once.
async fn side_by_side<F: Future<Output = Duration>>(runs: usize, run: impl Fn() -> F) -> Vec<Duration> {
    let mut took = Vec::new();
    while took.len() < runs {
        let together = (took.len()..runs).take(4).map(|_| run());
        took.extend(futures_util::future::join_all(together).await);
    }
    took
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_killed_under_writers_is_replaced_and_the_loss_is_never_overstated() {
    let mut firsts = Vec::new();
    let mut told = Vec::new();
    for _ in 0..runs() {
        let cluster = Cluster::start(2).await;
        cluster.set_up(TABLE).await;
        let directory = tempfile::tempdir().unwrap();
        let proxy = started(&cluster, &directory, "").await;
        let writers = Writers::start(proxy.port(), &cluster, 16).await;
        writers.more(500).await;
        let before = cluster.node(0).query_text("SELECT pg_current_wal_insert_lsn()").await.unwrap();
        let killed = Instant::now();
        cluster.node(0).crash().await.unwrap();
        writers.more(500).await;
        let written = writers.finish().await;
        let new = only_primary(&cluster).await;
        firsts.push(written.first_after(killed));
        let lost = written.lost(&cluster, new).await;
        let reported = proxy.metrics().await.sum("highwater_lost_acked_bytes_min", &[]);
        if lost == 0 {
            assert_eq!(reported, 0.0, "a loss was reported, and there was none; the log was at {before}");
        }
        // The end of what the old one recovers, beyond the fork: what was lost in truth.
        cluster.node(0).start().await.unwrap();
        let recovered = "SELECT pg_wal_lsn_diff(redo_lsn, '0/0') FROM pg_control_checkpoint()";
        let recovered: f64 = cluster.node(0).query_text(recovered).await.unwrap().parse().unwrap();
        let truth = (recovered - fork(&cluster, new).await).max(0.0);
        assert!(reported <= truth, "{reported} bytes were reported, {truth} lost");
        told.push((lost, reported, truth));
        explain(&proxy, written.first_after(killed), KILLED);
        // Only those whose outcome nobody knows are told so; nothing else fails.
        let unexpected: Vec<_> = written
            .errors
            .keys()
            .filter(|code| !ALLOWED.contains(&code.as_str()) && *code != "HW001")
            .collect();
        assert!(unexpected.is_empty(), "{:?}", written.errors);
    }
    let rows = told.iter().map(|(lost, ..)| *lost).max().unwrap_or_default();
    let lost = format!("0 to {rows} rows; never more bytes reported than lost");
    Line::new(2, "kill -9 of the primary under 16 writers, `async`: first write", KILLED, lost)
        .timed(&firsts);
    println!("rows lost, bytes reported at least, bytes lost: {told:?}");
}

/// Where timeline 2 began on `node`.
async fn fork(cluster: &Cluster, node: usize) -> f64 {
    let fork = "SELECT pg_wal_lsn_diff(split_part(pg_read_file('pg_wal/00000002.history'), E'\\t', 2)::pg_lsn, '0/0')";
    cluster.node(node).query_text(fork).await.unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loss_that_is_known_is_reported_and_no_more_than_was_lost() {
    let cluster = Cluster::start(1).await;
    cluster.set_up(TABLE).await;
    cluster.wait_caught_up(0).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let proxy = started(&cluster, &directory, "allow_minority: true").await;
    let client = proxy.connect().await;
    // From here on the standby gets nothing more.
    cluster.node(1).set("primary_conninfo", "").await.unwrap();
    cluster.node(0).wait_for("SELECT count(*) FROM pg_stat_replication", "0").await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    // Where the log was after the first is known, so that the second is known to lie behind that.
    let token: String = client.query_one("SHOW highwater.token", &[]).await.unwrap().get(0);
    assert!(!token.is_empty());
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    let end = "SELECT pg_current_wal_insert_lsn() - '0/0'";
    let end: f64 = cluster.node(0).query_text(end).await.unwrap().parse().unwrap();
    cluster.node(0).crash().await.unwrap();
    eventually("b takes over", || async { primary(&proxy).await.as_deref() == Some("b") }).await;
    let reported = proxy.metrics().await.sum("highwater_lost_acked_bytes_min", &[]);
    let rows = cluster.node(1).query_text("SELECT count(*) FROM t").await;
    let fork = fork(&cluster, 1).await;
    assert_eq!(rows.unwrap(), "0");
    assert!(reported > 0.0 && reported <= end - fork, "{reported} bytes; lost were {}", end - fork);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_primary_is_replaced_and_acknowledges_nothing_when_it_thaws() {
    let firsts = side_by_side(runs(), frozen_and_thawed).await;
    let lost = "0; nothing acknowledged by the old one";
    Line::new(3, "frozen primary, `async`: first write", FROZEN, lost).timed(&firsts);
}

async fn frozen_and_thawed() -> Duration {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = started(&cluster, &directory, "").await;
    let writers = Writers::start(proxy.port(), &cluster, 8).await;
    writers.more(200).await;
    let frozen = Instant::now();
    cluster.node(0).freeze().unwrap();
    // Its processes are stopped one by one, the walsenders before the writers' backends.
    let stopped = Instant::now();
    writers.more(200).await;
    cluster.node(0).thaw().unwrap();
    cluster.node(0).wait_for("SHOW default_transaction_read_only", "on").await.unwrap();
    writers.more(200).await;
    let written = writers.finish().await;
    let first = written.first_after(frozen);
    explain(&proxy, first, FROZEN);
    let new = match primary(&proxy).await.as_deref() {
        Some("b") => 1,
        Some("c") => 2,
        other => panic!("the primary is {other:?}"),
    };
    // What was written since the freeze is all on the new one: the old one has acknowledged none of it. What it had
    // said before was on its way.
    let later = stopped + Duration::from_millis(100);
    assert!(written.acknowledged.iter().filter(|(at, _)| *at > later).count() >= 300);
    let lost: Vec<_> = written.lost_at(&cluster, new).await.into_iter().map(|at| at - frozen).collect();
    let stopped = stopped - frozen;
    assert!(
        lost.iter().all(|at| *at <= stopped + Duration::from_millis(100)),
        "stopped after {stopped:?}, and acknowledged what was lost after {lost:?}"
    );
    let metrics = proxy.metrics().await;
    assert_eq!(metrics.sum("highwater_quarantined_nodes", &[("reason", "old_primary")]), 1.0);
    first
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_is_cut_off_from_all_nodes_promotes_none() {
    let cluster = Cluster::start(2).await;
    let directory = tempfile::tempdir().unwrap();
    let quick = "check_interval: 100ms, check_timeout: 300ms, kick_timeout: 500ms, failure_threshold: 2";
    let proxy = started(&cluster, &directory, quick).await;
    for silent in [true, false] {
        let told = "neither the primary nor a standby that knows of it can be reached";
        let before = proxy.log().matches(told).count();
        for index in 0..3 {
            match silent {
                true => cluster.link(index).silence(),
                false => cluster.link(index).cut(),
            }
        }
        eventually("it says that it is isolated", || async { proxy.log().matches(told).count() > before })
            .await;
        for index in 0..3 {
            cluster.link(index).heal();
        }
        eventually("all is well again", || async {
            is_in(&proxy, "healthy").await && proxy.usable_nodes().await == 3
        })
        .await;
    }
    assert_eq!(only_primary(&cluster).await, 0);
    assert_eq!(proxy.metrics().await.sum("highwater_failovers_total", &[]), 0.0);
    Line::new(7, "proxy cut off from all nodes: nobody promoted", 0, "").shown(2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_that_restarts_by_itself_is_waited_for() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = started(&cluster, &directory, "").await;
    let writers = Writers::start(proxy.port(), &cluster, 4).await;
    writers.more(100).await;
    // The server restarts in place as a backend is killed.
    cluster.node(0).crash_backend().await.unwrap();
    writers.more(100).await;
    // And in order.
    cluster.node(0).restart().await.unwrap();
    writers.more(100).await;
    writers.finish().await;
    assert_eq!(only_primary(&cluster).await, 0);
    eventually("all is well", || async { is_in(&proxy, "healthy").await }).await;
    let timeline = "SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)";
    assert_eq!(cluster.node(0).query_text(timeline).await.unwrap(), "00000001");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_death_soon_after_the_first_waits_for_an_operator() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let inside = Inside::start(&cluster, &auto(&directory, "allow_minority: true")).await;
    let client = highwater::demo::cluster::connect(inside.port, "app", &cluster.roles().app).await.unwrap();
    cluster.node(0).crash().await.unwrap();
    client.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    let second = only_primary(&cluster).await;
    eventually("the other one follows", || async {
        inside.state() == "healthy" && inside.server().topology.load_full().serving_replicas().count() == 1
    })
    .await;
    cluster.node(second).crash().await.unwrap();
    inside.until("blocked").await;
    assert_eq!(inside.server().commands.status().blocked.as_ref().unwrap().0, "too_soon");
    let last = 3 - second;
    assert_eq!(cluster.node(last).query_text("SELECT pg_is_in_recovery()").await.unwrap(), "t");
    inside.give(Command::AckRecovery).await.unwrap();
    cluster.node(last).wait_for("SELECT pg_is_in_recovery()", "f").await.unwrap();
    inside.until("healthy").await;
    client.execute("INSERT INTO t VALUES (2)", &[]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switchover_under_load_loses_nothing_and_fails_no_statement() {
    let mut gaps = Vec::new();
    for _ in 0..runs() {
        let cluster = Cluster::start(2).await;
        cluster.set_up(TABLE).await;
        let directory = tempfile::tempdir().unwrap();
        let proxy = started(&cluster, &directory, "").await;
        let console = proxy.connect_as("highwater", &cluster.roles().control).await.unwrap();
        let writers = Writers::start(proxy.port(), &cluster, 16).await;
        writers.more(500).await;
        console.simple_query("SWITCHOVER TO c").await.unwrap();
        writers.more(500).await;
        let written = writers.finish().await;
        assert_eq!(written.errors, BTreeMap::new());
        assert_eq!(written.lost(&cluster, 2).await, 0);
        assert_eq!(primary(&proxy).await.as_deref(), Some("c"));
        explain(&proxy, written.gap(), EXCHANGED);
        gaps.push(written.gap());
        // The other standby follows the new one.
        cluster.node(2).wait_for("SELECT count(*) FROM pg_stat_replication", "1").await.unwrap();
        cluster.node(0).wait_for("SHOW default_transaction_read_only", "on").await.unwrap();
    }
    let lost = "0 rows, and no errors";
    Line::new(5, "switchover under 16 writers: longest gap", EXCHANGED, lost).timed(&gaps);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_switchover_whose_candidate_cannot_catch_up_is_given_up_and_the_primary_goes_on() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let inside = Inside::start(&cluster, &auto(&directory, "")).await;
    let client = highwater::demo::cluster::connect(inside.port, "app", &cluster.roles().app).await.unwrap();
    client.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    let dry_run = Command::Switchover { to: Some(NodeId(2)), dry_run: true, timeout: None };
    assert!(inside.give(dry_run).await.unwrap().contains("would replace a by c"));
    cluster.node(1).freeze().unwrap();
    let timeout = Some(Duration::from_secs(1));
    let answer = inside.give(Command::Switchover { to: Some(NodeId(1)), dry_run: false, timeout }).await;
    assert!(answer.is_err(), "{answer:?}");
    client.execute("INSERT INTO t VALUES (2)", &[]).await.unwrap();
    cluster.node(1).thaw().unwrap();
    assert_eq!(only_primary(&cluster).await, 0);
    inside.until("healthy").await;
    cluster.node(0).wait_for("SHOW default_transaction_read_only", "off").await.unwrap();
    cluster.node(0).wait_for("SELECT count(*) FROM pg_stat_replication", "2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_ahead_of_the_one_an_operator_chose_is_not_read_from() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let manual = auto(&directory, "").replace("mode: auto", "mode: manual");
    let inside = Inside::start(&cluster, &manual).await;
    // Only c gets these.
    cluster.node(1).set("primary_conninfo", "").await.unwrap();
    cluster.node(0).wait_for("SELECT count(*) FROM pg_stat_replication", "1").await.unwrap();
    cluster.node(0).execute("INSERT INTO t SELECT generate_series(1, 100)").await.unwrap();
    cluster.node(2).wait_for("SELECT count(*) FROM t", "100").await.unwrap();
    cluster.node(0).crash().await.unwrap();
    inside.until("blocked").await;
    let to_b = |allow_data_loss| Command::Failover { to: Some(NodeId(1)), allow_data_loss };
    let refused = inside.give(to_b(false)).await.unwrap_err();
    assert!(refused.contains("ahead"), "{refused}");
    inside.give(to_b(true)).await.unwrap();
    assert_eq!(cluster.node(1).query_text("SELECT count(*) FROM t").await.unwrap(), "0");
    eventually("c is in quarantine", || async {
        inside.server().commands.status().quarantined.iter().any(|(name, _)| name == "c")
    })
    .await;
    let client = highwater::demo::cluster::connect(inside.port, "app", &cluster.roles().app).await.unwrap();
    for _ in 0..50 {
        let row = client.query_one("SELECT count(*) FROM t", &[]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), 0, "a read of rows that the primary does not have");
    }
    Line::new(11, "standby ahead of the promoted one: quarantined, no read from it", 0, "").shown(1);
}

/// Kills the proxy at each place in turn while it replaces a dead primary; the next start finishes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_killed_at_any_step_of_a_failover_finishes_it_when_it_is_back() {
    let places = [
        "record_before",
        "record_written",
        "record_after",
        "sever",
        "promote_sent",
        "promote",
        "record_after#3",
        "repoint",
        "epoch_row",
    ];
    for place in places {
        let cluster = Cluster::start(2).await;
        cluster.set_up(TABLE).await;
        let directory = tempfile::tempdir().unwrap();
        let overrides = auto(&directory, "allow_minority: true");
        // What is recorded at the start is none of the failover's.
        let first =
            Proxy::start_with(&cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() })
                .await;
        eventually("it is well", || async { is_in(&first, "healthy").await }).await;
        drop(first);
        let options = ProxyOptions { overrides: &overrides, failpoint: place, ..ProxyOptions::default() };
        let proxy = Proxy::start_with(&cluster, options).await;
        cluster.node(0).crash().await.unwrap();
        proxy.revive().await;
        eventually(&format!("finished after a kill at {place}"), || async {
            is_in(&proxy, "healthy").await && primary(&proxy).await.is_some_and(|name| name != "a")
        })
        .await;
        let new = only_primary(&cluster).await;
        let client = proxy.connect().await;
        client.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
        let follows = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
        cluster.node(new).wait_for(follows, "1").await.unwrap();
        let timeline = "SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)";
        assert_eq!(cluster.node(new).query_text(timeline).await.unwrap(), "00000002", "{place}");
    }
    let what = "proxy killed at each of nine places of a failover (debug build): finished by the next start";
    Line::new(12, what, 0, "one primary, timeline 2").shown(places.len());
}

pub(super) const QUORUM: &str = "durability: quorum, sync: { manage: true }";

/// Every acknowledged commit is on a standby, and recorded to be.
/// The same, and either of the two standbys may be the one: it is recorded before the setting is changed.
pub(super) async fn covered(proxy: &Proxy, cluster: &Cluster) {
    eventually("acknowledged writes are covered", || async {
        proxy.metrics().await.sum("highwater_sync_state", &[]) == 1.0
    })
    .await;
    by_either(cluster).await;
}

async fn covered_inside(inside: &Inside, cluster: &Cluster) {
    eventually("acknowledged writes are covered", || async { inside.server().commands.status().covered })
        .await;
    by_either(cluster).await;
}

async fn by_either(cluster: &Cluster) {
    // It begins with the standby that is found well first.
    let names = "SHOW synchronous_standby_names";
    cluster.node(0).wait_for(names, "ANY 1 (\"b\", \"c\")").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_quorum_a_primary_killed_under_writers_takes_no_acknowledged_row_with_it() {
    let mut firsts = Vec::new();
    for _ in 0..runs() {
        let cluster = Cluster::start(2).await;
        cluster.set_up(TABLE).await;
        let directory = tempfile::tempdir().unwrap();
        let proxy = started(&cluster, &directory, QUORUM).await;
        covered(&proxy, &cluster).await;
        let writers = Writers::start(proxy.port(), &cluster, 16).await;
        writers.more(500).await;
        let killed = Instant::now();
        cluster.node(0).crash().await.unwrap();
        writers.more(500).await;
        let written = writers.finish().await;
        let new = only_primary(&cluster).await;
        assert_eq!(written.lost(&cluster, new).await, 0);
        firsts.push(written.first_after(killed));
        explain(&proxy, written.first_after(killed), KILLED);
        let unexpected: Vec<_> =
            written.errors.keys().filter(|code| !ALLOWED.contains(&code.as_str())).collect();
        assert!(unexpected.is_empty(), "{:?}", written.errors);
    }
    let lost = "0 acknowledged rows";
    Line::new(1, "kill -9 of the primary under 16 writers, `quorum`: first write", KILLED, lost)
        .timed(&firsts);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_quorum_nothing_is_lost_whatever_holds_up_replay_on_the_best_standby() {
    for obstacle in ["paused", "delayed", "reader", "restarted"] {
        let cluster = Cluster::start(2).await;
        cluster.set_up(TABLE).await;
        let directory = tempfile::tempdir().unwrap();
        let proxy = started(&cluster, &directory, QUORUM).await;
        covered(&proxy, &cluster).await;
        let best = cluster.node(1);
        best.set("max_standby_streaming_delay", "-1").await.unwrap();
        let mut reader = best.connect("app", &cluster.roles().app).await.unwrap();
        let reading = reader.transaction().await.unwrap();
        let writers = Writers::start(proxy.port(), &cluster, 8).await;
        writers.more(100).await;
        match obstacle {
            "paused" => best.pause_replay().await.unwrap(),
            "delayed" => best.set_apply_delay(Duration::from_secs(2)).await.unwrap(),
            "reader" => {
                reading.query("SELECT * FROM t", &[]).await.unwrap();
                cluster.node(0).execute("ALTER TABLE t ADD y int").await.unwrap();
            }
            _ => {}
        }
        // Only the best one confirms these.
        cluster.node(2).set("primary_conninfo", "").await.unwrap();
        writers.more(300).await;
        cluster.node(0).crash().await.unwrap();
        if obstacle == "restarted" {
            best.restart().await.unwrap();
        }
        writers.more(200).await;
        drop(reading);
        let written = writers.finish().await;
        let new = only_primary(&cluster).await;
        assert_eq!(written.lost(&cluster, new).await, 0, "{obstacle}");
        assert_eq!(new, 1, "{obstacle}: the other one was elected");
    }
    let what = "replay paused, delayed by 2 s, held up by a reader, standby restarted; the other standby behind; `quorum`";
    Line::new(10, what, 0, "0 acknowledged rows, the right one elected").shown(4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_quorum_a_synchronous_standby_that_dies_with_the_primary_blocks_until_loss_is_allowed() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let inside = Inside::start(&cluster, &auto(&directory, QUORUM)).await;
    covered_inside(&inside, &cluster).await;
    let client = highwater::demo::cluster::connect(inside.port, "app", &cluster.roles().app).await.unwrap();
    client.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    cluster.node(2).crash().await.unwrap();
    cluster.node(0).crash().await.unwrap();
    inside.until("blocked").await;
    let (label, text) = inside.server().commands.status().blocked.clone().unwrap();
    assert_eq!(label, "too_few_synchronous", "{text}");
    assert!(text.contains("ALLOW DATA LOSS"), "{text}");
    assert_eq!(cluster.node(1).query_text("SELECT pg_is_in_recovery()").await.unwrap(), "t");
    let refused = inside.give(Command::Failover { to: None, allow_data_loss: false }).await;
    assert!(refused.is_err(), "{refused:?}");
    inside.give(Command::Failover { to: None, allow_data_loss: true }).await.unwrap();
    client.execute("INSERT INTO t VALUES (2)", &[]).await.unwrap();
    assert_eq!(only_primary(&cluster).await, 1);
    let what = "one of two quorum standbys dies with the primary: BLOCKED until ALLOW DATA LOSS";
    Line::new(8, what, 0, "").shown(1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_quorum_a_standby_that_died_before_does_not_stand_in_the_way() {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let more = "durability: quorum, sync: { manage: true, degrade_after: 3s }";
    let proxy = started(&cluster, &directory, more).await;
    covered(&proxy, &cluster).await;
    let writers = Writers::start(proxy.port(), &cluster, 4).await;
    writers.more(100).await;
    let recorded = "synchronous replication recorded num=1 members=[\"b\"]";
    let before = proxy.log().matches(recorded).count();
    cluster.node(2).crash().await.unwrap();
    let names = "SHOW synchronous_standby_names";
    cluster.node(0).wait_for(names, "ANY 1 (\"b\")").await.unwrap();
    // In effect first, and recorded after that: only then does one standby suffice.
    eventually("that is recorded", || async { proxy.log().matches(recorded).count() > before }).await;
    writers.more(100).await;
    cluster.node(0).crash().await.unwrap();
    writers.more(100).await;
    let written = writers.finish().await;
    assert_eq!(only_primary(&cluster).await, 1);
    assert_eq!(written.lost(&cluster, 1).await, 0);
    let what = "one of two quorum standbys died before the primary: replaced by itself";
    Line::new(9, what, 0, "0 acknowledged rows").shown(1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_quorum_a_frozen_primary_acknowledges_nothing_to_direct_clients_when_it_thaws() {
    let firsts = side_by_side(runs(), frozen_with_a_direct_client).await;
    let lost = "0; nothing acknowledged by the old one, to direct clients either";
    Line::new(4, "frozen primary, `quorum`: first write", FROZEN, lost).timed(&firsts);
}

async fn frozen_with_a_direct_client() -> Duration {
    let cluster = Cluster::start(2).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = started(&cluster, &directory, QUORUM).await;
    covered(&proxy, &cluster).await;
    let direct = cluster.node(0).connect("app", &cluster.roles().app).await.unwrap();
    direct.execute("INSERT INTO t VALUES (-1)", &[]).await.unwrap();
    let writers = Writers::start(proxy.port(), &cluster, 8).await;
    writers.more(100).await;
    let frozen = Instant::now();
    cluster.node(0).freeze().unwrap();
    // It lies in the frozen server's socket, and is taken up before anything that fences it.
    let late = tokio::spawn(async move { direct.execute("INSERT INTO t VALUES (-2)", &[]).await });
    writers.more(100).await;
    cluster.node(0).thaw().unwrap();
    let late = tokio::time::timeout(PATIENCE, late).await.expect("it is neither refused nor ended").unwrap();
    assert!(late.is_err(), "an old primary acknowledged a write: {late:?}");
    let written = writers.finish().await;
    let first = written.first_after(frozen);
    explain(&proxy, first, FROZEN);
    let new = match primary(&proxy).await.as_deref() {
        Some("b") => 1,
        Some("c") => 2,
        other => panic!("the primary is {other:?}"),
    };
    assert_eq!(written.lost(&cluster, new).await, 0);
    first
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_primary_that_rejoins_serves_reads_again() {
    let settings = vec![("full_page_writes".to_owned(), "on".to_owned())];
    let options = highwater::demo::cluster::ClusterOptions { replicas: 1, settings, ..Default::default() };
    let cluster = Cluster::start_with(options).await;
    cluster.set_up(TABLE).await;
    let directory = tempfile::tempdir().unwrap();
    let proxy = started(&cluster, &directory, "allow_minority: true").await;
    let client = proxy.connect().await;
    client.execute("INSERT INTO t VALUES (1)", &[]).await.unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    cluster.node(0).crash().await.unwrap();
    // A session that cannot be shown to have lost nothing is told so once; one whose statement was on its way, that
    // nobody knows what became of it.
    if let Err(error) = client.execute("INSERT INTO t VALUES (2)", &[]).await {
        let code = error.code().map(|code| code.code());
        assert!(matches!(code, Some("HW001" | "08007")), "{error}");
        client.execute("INSERT INTO t VALUES (2) ON CONFLICT DO NOTHING", &[]).await.unwrap();
    }
    cluster.node(0).start().await.unwrap();
    cluster.node(0).wait_for("SHOW default_transaction_read_only", "on").await.unwrap();
    cluster.node(0).stop_fast().await.unwrap();
    let output = crate::rejoin::rejoin(&cluster, cluster.node(0), &["--start"]).await;
    success(&output);
    eventually("it serves", || async { proxy.usable_nodes().await == 2 }).await;
    client.execute("INSERT INTO t VALUES (3)", &[]).await.unwrap();
    cluster.node(0).wait_for("SELECT count(*) FROM t", "3").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_grant_that_it_needs_a_proxy_says_which_and_promotes_nobody_by_itself() {
    let cluster = Cluster::start(2).await;
    let directory = tempfile::tempdir().unwrap();
    // In the control database, whose functions count.
    let admin = cluster.node(0).admin().await.unwrap();
    admin
        .batch_execute("REVOKE EXECUTE ON FUNCTION pg_promote(boolean, integer) FROM highwater")
        .await
        .unwrap();
    cluster.wait_caught_up(0).await.unwrap();
    let proxy = started(&cluster, &directory, "").await;
    let grant = "GRANT EXECUTE ON FUNCTION pg_catalog.pg_promote(boolean, integer) TO highwater";
    // On each node: only once all were asked it goes by that.
    eventually("it names the grant", || async { proxy.log().matches(grant).count() >= 3 }).await;
    cluster.node(0).crash().await.unwrap();
    eventually("it waits for an operator", || async { is_in(&proxy, "blocked").await }).await;
    for index in [1, 2] {
        assert_eq!(cluster.node(index).query_text("SELECT pg_is_in_recovery()").await.unwrap(), "t");
    }
}
