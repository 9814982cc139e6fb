//! Faults in random order on real servers, under writers, with `auto` and `quorum`: whatever comes, no acknowledged row is
//! lost, there is one write target at a time, and the cluster comes to rest.
//!
//! HIGHWATER_SCHEDULES says how many are played (`make schedules`), HIGHWATER_SCHEDULE_SEED which one is the first. A seed
//! gives the same order of faults again, not the same moments.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use highwater::demo::cluster::Login;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_postgres::{AsyncMessage, NoTls};

use super::failover::TABLE;
use crate::fixture::*;

const NODES: usize = 3;
/// Stands for whichever node is the primary then.
const PRIMARY: usize = NODES;
const STEPS: usize = 12;
const WRITERS: usize = 4;
/// Schedules in the suite.
const USUALLY: usize = 2;
/// How many are played at once.
const AT_ONCE: usize = 3;
/// How long a cluster with nothing wrong any more may take to rest.
const REST: Duration = Duration::from_secs(60);
/// A direct client gives up on a statement after this: its server is frozen.
const DIRECT: Duration = Duration::from_secs(3);

/// What happens; a number is a node's, or [`PRIMARY`].
#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill(usize),
    /// One backend, and the server restarts in place.
    KillBackend(usize),
    Start(usize),
    /// A replica, in order.
    Restart(usize),
    Freeze(usize),
    Thaw(usize),
    /// Between the proxy and this node.
    Cut(usize),
    Silence(usize),
    Heal(usize),
    PauseReplay(usize),
    ResumeReplay(usize),
    /// One that is out of use is copied anew.
    Rebuild(usize),
    KillProxy,
    Switchover(usize),
    Failover,
    FailoverTo(usize),
    AckRecovery,
}

impl Fault {
    fn draw(chance: &mut StdRng, direct: bool) -> Fault {
        let node = chance.random_range(0..=PRIMARY);
        loop {
            let fault = match chance.random_range(0..24) {
                0..4 => Fault::Kill(node),
                4 => Fault::KillBackend(node),
                5..8 => Fault::Start(node),
                8 => Fault::Restart(node),
                9..11 => Fault::Freeze(node),
                11 => Fault::Thaw(node),
                12 => Fault::Cut(node),
                13 => Fault::Silence(node),
                14 => Fault::Heal(node),
                15 => Fault::PauseReplay(node),
                16 => Fault::ResumeReplay(node),
                17..19 => Fault::Rebuild(node),
                19 => Fault::KillProxy,
                20 | 21 => Fault::Switchover(node),
                22 => Fault::Failover,
                23 if chance.random() => Fault::FailoverTo(node),
                _ => Fault::AckRecovery,
            };
            let fault = match fault {
                Fault::Switchover(PRIMARY) | Fault::FailoverTo(PRIMARY) => continue,
                other => other,
            };
            // While replication is degraded a switchover asks nobody about clients that go past the proxy.
            if !(direct && matches!(fault, Fault::Switchover(_))) {
                return fault;
            }
        }
    }
}

/// What the clients did.
#[derive(Default)]
struct Ledger {
    stop: AtomicBool,
    next: AtomicI64,
    acknowledged: Mutex<Vec<i64>>,
    /// The same of clients that go past the proxy, and of which node.
    direct: Mutex<Vec<(i64, usize)>>,
    errors: Mutex<BTreeMap<String, usize>>,
    wrong: Mutex<Vec<String>>,
}

impl Ledger {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn id(&self) -> i64 {
        self.next.fetch_add(1, Ordering::SeqCst)
    }

    fn count(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    fn failed(&self, error: &tokio_postgres::Error) {
        let code = error.code().map_or("closed".to_owned(), |code| code.code().to_owned());
        *self.errors.lock().unwrap().entry(code).or_default() += 1;
    }

    fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }
}

/// A client, and whether it has been warned since that was last asked.
async fn connect(
    port: u16,
    login: &Login,
) -> Result<(tokio_postgres::Client, Arc<AtomicBool>), tokio_postgres::Error> {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(port).dbname("app").user(&login.user).password(&login.password);
    config.connect_timeout(DIRECT);
    let (client, mut connection) = config.connect(NoTls).await?;
    let warned = Arc::new(AtomicBool::new(false));
    let warn = warned.clone();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if matches!(&message, AsyncMessage::Notice(notice) if notice.severity() == "WARNING") {
                warn.store(true, Ordering::SeqCst);
            }
        }
    });
    Ok((client, warned))
}

/// Writes rows through the proxy, one statement each, and reads the last ones back.
async fn write(port: u16, login: Login, ledger: Arc<Ledger>) {
    let mut own: Vec<i64> = Vec::new();
    while !ledger.stopped() {
        let Ok((client, _)) = connect(port, &login).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        while !ledger.stopped() && !client.is_closed() {
            let id = ledger.id();
            match client.execute("INSERT INTO t VALUES ($1)", &[&id]).await {
                Ok(_) => {
                    ledger.acknowledged.lock().unwrap().push(id);
                    own.push(id);
                }
                Err(error) => ledger.failed(&error),
            }
            // Nothing that was acknowledged is ever lost, so a new session is owed it, too.
            let last = &own[own.len().saturating_sub(5)..];
            match client.query("SELECT x FROM t WHERE x = ANY($1)", &[&last]).await {
                Ok(rows) if rows.len() < last.len() => {
                    let seen: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
                    ledger.wrong(format!("acknowledged: {last:?}, read back: {seen:?}"));
                }
                Ok(_) => {}
                Err(error) => ledger.failed(&error),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Writes to one server past the proxy, whenever that is a primary. What it acknowledges may not be lost, either.
async fn write_past(node: usize, port: u16, login: Login, ledger: Arc<Ledger>) {
    while !ledger.stopped() {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let Ok((client, warned)) = connect(port, &login).await else { continue };
        loop {
            let id = -1 - ledger.id();
            let insert = async { client.execute("INSERT INTO t VALUES ($1)", &[&id]).await };
            match tokio::time::timeout(DIRECT, insert).await {
                // With a warning: committed, and its wait for the standbys was ended.
                Ok(Ok(_)) if !warned.swap(false, Ordering::SeqCst) => {
                    ledger.direct.lock().unwrap().push((id, node));
                }
                _ => break,
            }
            if ledger.stopped() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// What the proxy says of itself.
#[derive(Clone, Debug, Default)]
struct Said {
    epoch: u64,
    primary: Option<usize>,
    reachable: bool,
    state: String,
    blocked: String,
}

async fn ask(proxy: &Proxy) -> Option<Said> {
    let (_, text) = proxy.get("/topology").await?;
    let topology: serde_json::Value = serde_json::from_str(&text).ok()?;
    let primary =
        topology["primary"].as_str().and_then(|name| ["a", "b", "c"].iter().position(|n| *n == name));
    Some(Said {
        epoch: topology["epoch"].as_u64().unwrap_or_default(),
        primary,
        reachable: topology["nodes"]
            .as_array()
            .is_some_and(|nodes| nodes.iter().any(|node| node["role"] == "primary" && node["up"] == true)),
        state: topology["failover"]["state"].as_str().unwrap_or_default().to_owned(),
        blocked: topology["failover"]["blocked"].to_string(),
    })
}

/// Each epoch has one write target.
async fn watch(proxy: Arc<Proxy>, ledger: Arc<Ledger>) {
    let mut targets: BTreeMap<u64, usize> = BTreeMap::new();
    while !ledger.stopped() {
        if let Some(Said { epoch, primary: Some(primary), .. }) = ask(&proxy).await {
            let known = *targets.entry(epoch).or_insert(primary);
            if known != primary {
                ledger.wrong(format!("epoch {epoch} has had the primaries {known} and {primary}"));
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// One cluster, what is wrong with it, and what was done to it.
struct Stage {
    cluster: Cluster,
    proxy: Arc<Proxy>,
    frozen: [bool; NODES],
    /// A copy of it has failed half way.
    wrecked: [bool; NODES],
    began: Instant,
    story: Mutex<Vec<String>>,
    _state: tempfile::TempDir,
}

impl Stage {
    async fn set() -> Stage {
        let cluster = Cluster::start(NODES - 1).await;
        cluster.set_up(TABLE).await;
        let state = tempfile::tempdir().unwrap();
        let overrides = format!(
            "failover: {{ mode: auto, durability: quorum, state_dir: '{}', sync: {{ manage: true, degrade_after: 2s }}, \
             startup_grace: 1s, restart_grace: 3s, sever_timeout: 5s, min_failover_interval: 1s, pause_timeout: 5s, \
             check_interval: 200ms, check_timeout: 600ms, kick_timeout: 1s }}",
            state.path().join("state").display()
        );
        let options = ProxyOptions { overrides: &overrides, ..ProxyOptions::default() };
        let proxy = Proxy::start_with(&cluster, options).await;
        super::failover::covered(&proxy, &cluster).await;
        Stage {
            cluster,
            proxy: Arc::new(proxy),
            frozen: [false; NODES],
            wrecked: [false; NODES],
            began: Instant::now(),
            story: Mutex::default(),
            _state: state,
        }
    }

    fn tell(&self, what: impl fmt::Display) {
        let line = format!("{:6} ms  {what}", self.began.elapsed().as_millis());
        self.story.lock().unwrap().push(line);
    }

    fn answers(&self, node: usize) -> bool {
        self.cluster.node(node).is_running() && !self.frozen[node]
    }

    async fn is_standby(&self, node: usize) -> bool {
        let asked = self.cluster.node(node).query_text("SELECT pg_is_in_recovery()").await;
        asked.is_ok_and(|answer| answer == "t")
    }

    async fn start(&mut self, node: usize) {
        self.frozen[node] = false;
        match self.cluster.node(node).start().await {
            Ok(()) => self.tell(format_args!("{node} has started")),
            // A standby that has not got all it needs serves nobody yet.
            Err(error) => self.tell(format_args!("{node} does not start: {error}")),
        }
    }

    /// A node that is kept out is made a replica of the primary again.
    async fn rebuild(&mut self, node: usize) {
        let Some(Said { primary: Some(primary), reachable: true, .. }) = ask(&self.proxy).await else {
            return;
        };
        if primary == node || !self.answers(primary) {
            return;
        }
        self.tell(format_args!("{node} is copied from {primary}"));
        self.cluster.node(node).crash().await.unwrap();
        self.frozen[node] = false;
        let copied = self.cluster.node(node).rebuild_from(self.cluster.node(primary)).await;
        self.wrecked[node] = copied.is_err();
        if let Err(error) = copied {
            let text = error.to_string();
            self.tell(format_args!("the copy failed: {}", text.lines().last().unwrap_or_default()));
        }
    }

    async fn console(&self, order: &str) {
        let control = &self.cluster.roles().control;
        let Ok(console) = self.proxy.connect_as("highwater", control).await else { return };
        match tokio::time::timeout(Duration::from_secs(20), console.simple_query(order)).await {
            Ok(Ok(_)) => self.tell(format_args!("{order}: done")),
            Ok(Err(error)) => {
                let text = error.as_db_error().map_or_else(|| error.to_string(), |e| e.message().to_owned());
                self.tell(format_args!("{order}: {text}"));
            }
            Err(_) => self.tell(format_args!("{order}: no answer in 20 s")),
        }
    }

    /// The fault at a node that is known by number.
    async fn at(&self, fault: Fault) -> Fault {
        let primary = ask(&self.proxy).await.and_then(|said| said.primary).unwrap_or_default();
        let node = |n: usize| if n == PRIMARY { primary } else { n };
        match fault {
            Fault::Kill(n) => Fault::Kill(node(n)),
            Fault::KillBackend(n) => Fault::KillBackend(node(n)),
            Fault::Start(n) => Fault::Start(node(n)),
            Fault::Restart(n) => Fault::Restart(node(n)),
            Fault::Freeze(n) => Fault::Freeze(node(n)),
            Fault::Thaw(n) => Fault::Thaw(node(n)),
            Fault::Cut(n) => Fault::Cut(node(n)),
            Fault::Silence(n) => Fault::Silence(node(n)),
            Fault::Heal(n) => Fault::Heal(node(n)),
            Fault::PauseReplay(n) => Fault::PauseReplay(node(n)),
            Fault::ResumeReplay(n) => Fault::ResumeReplay(node(n)),
            Fault::Rebuild(n) => Fault::Rebuild(node(n)),
            other => other,
        }
    }

    /// Whether it was possible as things were.
    async fn carry_out(&mut self, fault: Fault) -> bool {
        let name = |node: usize| ["a", "b", "c"][node];
        let fault = self.at(fault).await;
        match fault {
            Fault::Kill(n) if self.cluster.node(n).is_running() => {
                self.cluster.node(n).crash().await.unwrap();
                self.frozen[n] = false;
            }
            Fault::KillBackend(n) if self.answers(n) => {
                if let Err(error) = self.cluster.node(n).crash_backend().await {
                    self.tell(format_args!("{fault:?}: {error}"));
                }
            }
            Fault::Start(n) if !self.cluster.node(n).is_running() && !self.wrecked[n] => self.start(n).await,
            Fault::Restart(n) if self.answers(n) && self.is_standby(n).await => {
                self.cluster.node(n).stop_fast().await.unwrap();
                self.start(n).await;
            }
            Fault::Freeze(n) if self.answers(n) => {
                self.cluster.node(n).freeze().unwrap();
                self.frozen[n] = true;
            }
            Fault::Thaw(n) if self.frozen[n] => {
                self.cluster.node(n).thaw().unwrap();
                self.frozen[n] = false;
            }
            Fault::Cut(n) => self.cluster.link(n).cut(),
            Fault::Silence(n) => self.cluster.link(n).silence(),
            Fault::Heal(n) => self.cluster.link(n).heal(),
            Fault::PauseReplay(n) if self.answers(n) && self.is_standby(n).await => {
                self.cluster.node(n).execute("SELECT pg_wal_replay_pause()").await.unwrap_or_default();
            }
            Fault::ResumeReplay(n) if self.answers(n) && self.is_standby(n).await => {
                self.cluster.node(n).resume_replay().await.unwrap_or_default();
            }
            Fault::Rebuild(n) if self.wrecked[n] || (self.answers(n) && !self.is_standby(n).await) => {
                self.rebuild(n).await;
            }
            Fault::KillProxy => {
                self.proxy.signal(nix::sys::signal::Signal::SIGKILL);
                self.proxy.revive().await;
            }
            Fault::Switchover(n) => self.console(&format!("SWITCHOVER TO {} TIMEOUT 3s", name(n))).await,
            Fault::Failover => self.console("FAILOVER").await,
            Fault::FailoverTo(n) => self.console(&format!("FAILOVER TO {}", name(n))).await,
            Fault::AckRecovery => self.console("ACK RECOVERY").await,
            _ => return false,
        }
        self.tell(format_args!("{fault:?}"));
        true
    }

    /// All that can be mended is.
    async fn mend(&mut self) {
        self.tell("all is mended");
        for node in 0..NODES {
            self.cluster.link(node).heal();
            if self.frozen[node] {
                self.cluster.node(node).thaw().unwrap();
                self.frozen[node] = false;
            }
            if !self.cluster.node(node).is_running() && !self.wrecked[node] {
                self.start(node).await;
            }
            if self.answers(node) && self.is_standby(node).await {
                self.cluster.node(node).resume_replay().await.unwrap_or_default();
            }
        }
    }

    /// Waits until writes are acknowledged again, with an operator's help if need be. The reason if it stays blocked.
    async fn rest(&self, ledger: &Ledger) -> Option<String> {
        let before = ledger.count();
        let deadline = Instant::now() + REST;
        let mut last = Said::default();
        let mut helped = Instant::now();
        while Instant::now() < deadline {
            if let Some(said) = ask(&self.proxy).await {
                if said.state == "healthy" && ledger.count() > before + 20 {
                    self.tell(format_args!("at rest: {said:?}"));
                    return None;
                }
                if said.state == "blocked" && helped.elapsed() > Duration::from_secs(5) {
                    helped = Instant::now();
                    self.tell(format_args!("an operator helps: {said:?}"));
                    self.console("ACK RECOVERY").await;
                    self.console("FAILOVER").await;
                }
                last = said;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.tell(format_args!("not writing: {last:?}"));
        if last.state != "blocked" || last.blocked.len() < 10 {
            ledger.wrong(format!("no rest: {last:?}, {} writes", ledger.count() - before));
        }
        Some(last.blocked)
    }

    async fn rows(&self, node: usize) -> HashSet<i64> {
        let client = self.cluster.node(node).connect("app", &self.cluster.roles().superuser).await.unwrap();
        client.query("SELECT x FROM t", &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    }

    /// What must hold at the end: nothing is lost, and one server takes writes.
    async fn judge(&self, ledger: &Ledger, rested: bool) {
        let primary = ask(&self.proxy).await.and_then(|said| said.primary);
        // At rest the primary has it all; if it is blocked, at least one server.
        let of: Vec<usize> = match primary.filter(|_| rested) {
            Some(primary) => vec![primary],
            None => (0..NODES).filter(|node| self.answers(*node)).collect(),
        };
        let mut best: Option<Missing> = None;
        for node in of {
            let rows = self.rows(node).await;
            let acknowledged = ledger.acknowledged.lock().unwrap();
            let lost: Vec<i64> = acknowledged.iter().copied().filter(|id| !rows.contains(id)).collect();
            let direct = ledger.direct.lock().unwrap();
            let past: Vec<_> = direct.iter().copied().filter(|(id, _)| !rows.contains(id)).collect();
            if best.as_ref().is_none_or(|(l, p)| lost.len() + past.len() < l.len() + p.len()) {
                best = Some((lost, past));
            }
        }
        match best {
            Some((lost, past)) if lost.is_empty() && past.is_empty() => {}
            other => ledger.wrong(format!("lost, of those through the proxy and past it: {other:?}")),
        }
        if !rested {
            return;
        }
        let deadline = Instant::now() + REST;
        for node in (0..NODES).filter(|node| Some(*node) != primary && self.answers(*node)) {
            let closed =
                "SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool";
            while self.cluster.node(node).query_text(closed).await.is_ok_and(|answer| answer != "t") {
                if Instant::now() > deadline {
                    ledger.wrong(format!("{node} takes writes beside the primary {primary:?}"));
                    break;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Acknowledged rows that a server lacks: through the proxy, and past it, with the node that acknowledged them.
type Missing = (Vec<i64>, Vec<(i64, usize)>);

/// How one ended.
struct Ended {
    seed: u64,
    acknowledged: usize,
    direct: usize,
    epochs: u64,
    errors: BTreeMap<String, usize>,
    blocked: Option<String>,
    wrong: Vec<String>,
}

async fn play(seed: u64) -> Ended {
    let mut chance = StdRng::seed_from_u64(seed);
    let direct = seed.is_multiple_of(2);
    let mut stage = Stage::set().await;
    let ledger = Arc::new(Ledger::default());
    let app = &stage.cluster.roles().app;
    let mut tasks = Vec::new();
    for _ in 0..WRITERS {
        tasks.push(tokio::spawn(write(stage.proxy.port(), app.clone(), ledger.clone())));
    }
    for node in (0..NODES).filter(|_| direct) {
        let port = stage.cluster.node(node).port();
        tasks.push(tokio::spawn(write_past(node, port, app.clone(), ledger.clone())));
    }
    tasks.push(tokio::spawn(watch(stage.proxy.clone(), ledger.clone())));
    let blocked = {
        for _ in 0..STEPS {
            let mut tries = 0;
            while !stage.carry_out(Fault::draw(&mut chance, direct)).await && tries < 20 {
                tries += 1;
            }
            let (writes, wait) =
                (chance.random_range(0..60), Duration::from_millis(chance.random_range(0..2500)));
            let target = ledger.count() + writes;
            let until = Instant::now() + wait;
            while ledger.count() < target && Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        stage.mend().await;
        stage.rest(&ledger).await
    };
    ledger.stop.store(true, Ordering::SeqCst);
    for task in tasks {
        if tokio::time::timeout(PATIENCE, task).await.is_err() {
            ledger.wrong("a client is still waiting".to_owned());
        }
    }
    stage.judge(&ledger, blocked.is_none()).await;
    let wrong = std::mem::take(&mut *ledger.wrong.lock().unwrap());
    if !wrong.is_empty() || std::env::var_os("HIGHWATER_SCHEDULE_SEED").is_some() {
        println!("--- HIGHWATER_SCHEDULE_SEED={seed}: {wrong:#?}");
        for line in stage.story.lock().unwrap().iter() {
            println!("    {line}");
        }
        if !wrong.is_empty() {
            println!("--- the proxy's log of seed {seed}:\n{}", stage.proxy.log());
        }
    }
    let epochs = ask(&stage.proxy).await.map_or(0, |said| said.epoch);
    Ended {
        seed,
        acknowledged: ledger.count(),
        direct: ledger.direct.lock().unwrap().len(),
        epochs,
        errors: std::mem::take(&mut *ledger.errors.lock().unwrap()),
        blocked,
        wrong,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_order_of_faults_loses_an_acknowledged_row_or_leaves_two_write_targets() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let first = number("HIGHWATER_SCHEDULE_SEED");
    let count = number("HIGHWATER_SCHEDULES").unwrap_or(if first.is_some() { 1 } else { USUALLY as u64 });
    let first = first.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let (mut ended, mut at) = (Vec::new(), first);
    while at < first + count {
        let together = (at..first + count).take(AT_ONCE).map(play);
        for one in futures_util::future::join_all(together).await {
            println!(
                "seed {}: {} rows acknowledged, {} past the proxy, {} epochs, errors {:?}, blocked {:?}, wrong {:?}",
                one.seed, one.acknowledged, one.direct, one.epochs, one.errors, one.blocked, one.wrong
            );
            ended.push(one);
        }
        at += AT_ONCE as u64;
    }
    let sum = |of: fn(&Ended) -> usize| ended.iter().map(of).sum::<usize>();
    println!(
        "{} schedules from seed {first}: {} rows acknowledged, {} past the proxy, {} changes of the primary, {} ended blocked",
        ended.len(),
        sum(|e| e.acknowledged),
        sum(|e| e.direct),
        ended.iter().map(|e| e.epochs.saturating_sub(1)).sum::<u64>(),
        sum(|e| usize::from(e.blocked.is_some()))
    );
    let wrong: Vec<u64> = ended.iter().filter(|one| !one.wrong.is_empty()).map(|one| one.seed).collect();
    assert!(wrong.is_empty(), "HIGHWATER_SCHEDULE_SEED of those that failed: {wrong:?}");
}
