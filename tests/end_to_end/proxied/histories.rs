//! Sessions of all levels on real servers, under faults: their histories break no promise.
//!
//! `make consistency` runs these at length; HIGHWATER_HISTORY_OPERATIONS sets the size of each.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use highwater::demo::cluster::{Login, PrivateNode};

use super::consistency::{Trouble, a_while, synchronous};
use crate::fixture::*;
use crate::history::{self, Level, Operation, Outcome, Shown, What};

/// Sessions of each level.
const OF_EACH: usize = 4;
/// Lists that are in use at a time, and operations until the next ones are.
const HOT: usize = 6;
const WHILE_HOT: usize = 1_500;

fn wanted(usually: usize) -> usize {
    std::env::var("HIGHWATER_HISTORY_OPERATIONS").map_or(usually, |n| n.parse().unwrap())
}

/// A cluster with a role per level, and the lists.
async fn with_lists(replicas: usize, operations: usize) -> Cluster {
    let cluster = Cluster::start(replicas).await;
    for level in Level::ALL {
        let role = format!("CREATE ROLE {} LOGIN PASSWORD 'level'", level.word());
        cluster.primary().execute(&role).await.unwrap();
    }
    let lists = (operations / WHILE_HOT + 2) * HOT;
    cluster
        .set_up(&format!(
            "CREATE TABLE lists (k int PRIMARY KEY, v int[] NOT NULL);
             INSERT INTO lists SELECT i, '{{}}' FROM generate_series(0, {lists}) i;
             GRANT SELECT, UPDATE ON lists TO PUBLIC"
        ))
        .await;
    cluster
}

async fn start(cluster: &Cluster) -> Proxy {
    let rules: Vec<String> =
        Level::ALL.iter().map(|l| format!("{{ user: {0}, level: {0} }}", l.word())).collect();
    let overrides = format!(
        "consistency: {{ catch_up_wait: 100ms, rules: [ {} ] }}\n\
         failover: {{ mode: follow, check_interval: 100ms, check_timeout: 500ms, failure_threshold: 2 }}",
        rules.join(", ")
    );
    Proxy::start_with(cluster, ProxyOptions { overrides: &overrides, ..ProxyOptions::default() }).await
}

/// All that is shared by the sessions of one run.
struct Run<'a> {
    proxy: &'a Proxy,
    operations: usize,
    begun: AtomicUsize,
    clock: AtomicU64,
    values: AtomicU32,
    sessions: AtomicUsize,
    history: Mutex<Vec<Operation>>,
}

impl<'a> Run<'a> {
    fn new(proxy: &'a Proxy, operations: usize) -> Run<'a> {
        Run {
            proxy,
            operations,
            begun: AtomicUsize::new(0),
            clock: AtomicU64::new(0),
            values: AtomicU32::new(1),
            sessions: AtomicUsize::new(0),
            history: Mutex::new(Vec::new()),
        }
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    async fn connect(&self, level: Level) -> (usize, tokio_postgres::Client) {
        let login = Login { user: level.word().to_owned(), password: "level".to_owned() };
        loop {
            match self.proxy.connect_as("app", &login).await {
                Ok(client) => return (self.sessions.fetch_add(1, Ordering::SeqCst), client),
                // While there is no node to ask: only in the runs that take the primary away.
                Err(_) => a_while(50).await,
            }
        }
    }

    /// One client: it works until all operations are begun, in a new session whenever its last has ended.
    async fn play(&self, level: Level) {
        let (mut session, mut client) = self.connect(level).await;
        loop {
            let number = self.begun.fetch_add(1, Ordering::SeqCst);
            if number >= self.operations {
                return;
            }
            let key = number / WHILE_HOT * HOT + usize::from(rand::random::<u8>()) % HOT;
            let sent = self.now();
            let (what, outcome) = if rand::random::<u8>() < 64 {
                self.append(&client, key).await
            } else {
                self.read(&client, key).await
            };
            let answered = self.now();
            if let Some(what) = what {
                let operation = Operation {
                    session,
                    level,
                    what,
                    sent,
                    answered,
                    outcome: outcome.unwrap_or(Outcome::Unknown),
                };
                self.history.lock().unwrap().push(operation);
            }
            // After an error nothing is promised about what came before: 08007, HW001, the session's end.
            if outcome.is_none() {
                (session, client) = self.connect(level).await;
            }
        }
    }

    async fn append(&self, client: &tokio_postgres::Client, key: usize) -> (Option<What>, Option<Outcome>) {
        let value = self.values.fetch_add(1, Ordering::SeqCst);
        let sql = "UPDATE lists SET v = v || $1::int WHERE k = $2";
        let (element, list) = (i32::try_from(value).unwrap(), i32::try_from(key).unwrap());
        let done = client.execute(sql, &[&element, &list]).await;
        let outcome = done.map(|rows| assert_eq!(rows, 1)).is_ok().then_some(Outcome::Done);
        (Some(What::Append { key, value }), outcome)
    }

    async fn read(&self, client: &tokio_postgres::Client, key: usize) -> (Option<What>, Option<Outcome>) {
        let row = client.query_one("SELECT v FROM lists WHERE k = $1", &[&i32::try_from(key).unwrap()]).await;
        match row {
            Ok(row) => {
                let list: Vec<i32> = row.get(0);
                let list = list.into_iter().map(|v| u32::try_from(v).unwrap()).collect();
                (Some(What::Read { key, list }), Some(Outcome::Done))
            }
            Err(_) => (None, None),
        }
    }

    async fn all(&self) {
        let sessions = Level::ALL.iter().flat_map(|level| (0..OF_EACH).map(|_| self.play(*level)));
        futures_util::future::join_all(sessions).await;
    }
}

async fn finals(node: &PrivateNode, login: &Login) -> BTreeMap<usize, Vec<u32>> {
    let client = node.connect("app", login).await.unwrap();
    let rows = client.query("SELECT k, v FROM lists", &[]).await.unwrap();
    rows.iter()
        .map(|row| {
            let list: Vec<i32> = row.get(1);
            let key: i32 = row.get(0);
            let list = list.into_iter().map(|v| u32::try_from(v).unwrap()).collect();
            (usize::try_from(key).unwrap(), list)
        })
        .collect()
}

/// Whether statements may fail: only where the primary is taken away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Errors {
    Never,
    Allowed,
}

/// Plays a history; no promise may be broken.
async fn play(
    name: &str,
    cluster: &Cluster,
    proxy: &Proxy,
    operations: usize,
    errors: Errors,
) -> Vec<Operation> {
    let run = Run::new(proxy, operations);
    run.all().await;
    let finals = finals(cluster.primary(), proxy.app()).await;
    let history = run.history.into_inner().unwrap();
    let found = history::check(&history, &finals);
    let sessions: BTreeSet<usize> = history.iter().map(|o| o.session).collect();
    let unknown = history.iter().filter(|o| o.outcome == Outcome::Unknown).count();
    println!(
        "{name}: {} operations in {} sessions, {unknown} of unknown outcome, {} promises broken",
        history.len(),
        sessions.len(),
        found.len()
    );
    for violation in found.iter().take(5) {
        println!("{}", Shown(violation, &history));
    }
    assert!(found.is_empty(), "{name}: {} promises broken", found.len());
    assert!(history.len() > operations / 2, "{name}: {} operations", history.len());
    if errors == Errors::Never {
        assert_eq!((sessions.len(), unknown), (Level::ALL.len() * OF_EACH, 0), "{name}: statements failed");
    }
    history
}

/// How many violations the same history has if all of it is called `level`: lower levels break its promises,
/// or the checker (or the trouble) would not bite.
fn broken_if_all_were(level: Level, history: &[Operation], finals: &BTreeMap<usize, Vec<u32>>) -> usize {
    let claimed: Vec<Operation> = history.iter().map(|o| Operation { level, ..o.clone() }).collect();
    history::check(&claimed, finals).len()
}

fn nodes(cluster: &Cluster) -> [std::sync::Arc<PrivateNode>; 2] {
    [cluster.node(1).clone(), cluster.node(2).clone()]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_while_replay_stops_and_goes_beside_a_synchronous_standby() {
    let operations = wanted(6_000);
    let cluster = with_lists(2, operations).await;
    // A replica shows commits before the primary does.
    synchronous(&cluster, "ANY 1 (*)").await;
    let proxy = start(&cluster).await;
    let nodes = nodes(&cluster);
    let trouble = Trouble::begin(move || {
        let node = nodes[usize::from(rand::random::<bool>())].clone();
        async move {
            node.pause_replay().await.unwrap();
            a_while(120).await;
            node.resume_replay().await.unwrap();
            a_while(60).await;
        }
    });
    let history = play("replay stops", &cluster, &proxy, operations, Errors::Never).await;
    trouble.end().await;
    let finals = finals(cluster.primary(), proxy.app()).await;
    for level in [Level::ReadYourWrites, Level::Session, Level::Strong] {
        let broken = broken_if_all_were(level, &history, &finals);
        println!("if all were {}: {broken} promises broken", level.word());
        assert!(broken > 0, "{level:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_beside_a_replica_two_seconds_behind() {
    let operations = wanted(3_000);
    let cluster = with_lists(2, operations).await;
    cluster.node(2).set_apply_delay(Duration::from_secs(2)).await.unwrap();
    let proxy = start(&cluster).await;
    play("delayed", &cluster, &proxy, operations, Errors::Never).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_while_replicas_crash() {
    let operations = wanted(3_000);
    let cluster = with_lists(2, operations).await;
    let proxy = start(&cluster).await;
    let nodes = nodes(&cluster);
    let trouble = Trouble::begin(move || {
        let node = nodes[usize::from(rand::random::<bool>())].clone();
        async move {
            if rand::random() {
                node.crash_backend().await.unwrap();
            } else {
                node.crash().await.unwrap();
                a_while(100).await;
                node.start().await.unwrap();
            }
            a_while(400).await;
        }
    });
    // A read part of whose answer had left cannot be run again.
    play("replicas crash", &cluster, &proxy, operations, Errors::Allowed).await;
    trouble.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_level_breaks_its_promise_while_the_primary_restarts() {
    let operations = wanted(3_000);
    let cluster = with_lists(2, operations).await;
    let proxy = start(&cluster).await;
    let node = cluster.primary().clone();
    let trouble = Trouble::begin(move || {
        let node = node.clone();
        async move {
            a_while(800).await;
            if rand::random() {
                node.crash().await.unwrap();
                node.start().await.unwrap();
            } else {
                node.crash_backend().await.unwrap();
            }
            a_while(800).await;
        }
    });
    play("the primary restarts", &cluster, &proxy, operations, Errors::Allowed).await;
    trouble.end().await;
}
