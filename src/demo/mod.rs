//! `highwater demo`: a private primary and two replicas in a temporary directory, the proxy over
//! them, a little live traffic, and one line a second that says what ran where and why.
//!
//! Promises: needs nothing but PostgreSQL's programs on the machine; uses ports and files of its own
//! only, and leaves none behind, on Ctrl-C, SIGTERM and SIGKILL alike. Everything it shows of the
//! routing comes from the proxy's own /metrics, so that what is printed is what was counted. The primary
//! can be exchanged on the admin console, or killed and replaced: the traffic goes on, and the old one comes back.
//!
//! Does not measure: the traffic is paced for reading along, not for load.

pub mod cluster;
mod comeback;
pub mod port;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io::{self, IsTerminal as _, Write};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::cluster::{ClusterError, ClusterOptions, Identity, Login, PrivateCluster, connect};
use self::comeback::Hosts;
use self::port::ReservedPort;
use crate::progress::Progress;

/// The metric of statements answered, with labels for the node and for why it was that one.
const STATEMENTS: &str = "highwater_statements_total";

/// 1 for the role that a node has.
const ROLE: &str = "highwater_node_role";

/// 1 for the state that failover is in.
const STATE: &str = "highwater_failover_state";

/// A replica's distance behind the primary.
const LAG_BYTES: &str = "highwater_replica_replay_lag_bytes";

/// The same as time.
const LAG_SECONDS: &str = "highwater_replica_replay_lag_seconds";

/// How long the proxy may take to find the cluster.
const READY_DEADLINE: Duration = Duration::from_secs(30);

/// Sessions that write and read back what they wrote.
const WRITERS: i32 = 3;

/// Sessions that only read.
const READERS: i32 = 5;

/// Between two statements of a writer.
const WRITE_PACE: Duration = Duration::from_millis(50);

/// Before a session whose connection broke connects again.
const RECONNECT_PACE: Duration = Duration::from_millis(200);

/// Between two statements of a reader.
const READ_PACE: Duration = Duration::from_millis(20);

/// What the demo is asked for.
#[derive(Clone, Debug, Default)]
pub struct DemoOptions {
    /// When to end by itself, counted from the first line of traffic; `None`: at Ctrl-C or SIGTERM.
    pub exit_after: Option<Duration>,
}

/// The demo could not start or go on.
#[derive(Debug)]
pub enum DemoError {
    /// The private cluster.
    Cluster(ClusterError),
    /// The proxy did not start; its own words.
    Proxy(String),
    /// The proxy started but was not ready in time.
    NotReady,
    /// A statement of the demo's own failed: the statement and the error.
    Statement(String, tokio_postgres::Error),
    /// A system call: what was tried, and the answer.
    System(&'static str, io::Error),
}

impl fmt::Display for DemoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DemoError::Cluster(error) => error.fmt(f),
            DemoError::Proxy(said) => write!(f, "the proxy did not start: {said}"),
            DemoError::NotReady => write!(f, "the proxy was not ready within {READY_DEADLINE:?}"),
            DemoError::Statement(sql, error) => match error.as_db_error() {
                Some(error) => write!(f, "{sql}: {} ({})", error.message(), error.code().code()),
                None => write!(f, "{sql}: {error}"),
            },
            DemoError::System(what, error) => write!(f, "{what}: {error}"),
        }
    }
}

impl std::error::Error for DemoError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            DemoError::Cluster(error) => Some(error),
            DemoError::Statement(_, error) => Some(error),
            DemoError::System(_, error) => Some(error),
            DemoError::Proxy(_) | DemoError::NotReady => None,
        }
    }
}

impl From<ClusterError> for DemoError {
    fn from(error: ClusterError) -> DemoError {
        DemoError::Cluster(error)
    }
}

/// Runs the demo to its end. `start_proxy` is given the path of a configuration file, starts a proxy
/// by it in this process and returns what stops it when dropped. It is called on a blocking thread.
pub fn run<P, F>(options: &DemoOptions, start_proxy: F) -> Result<(), DemoError>
where
    P: Send + 'static,
    F: FnOnce(&Path) -> Result<P, String> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| DemoError::System("cannot start a runtime", error))?;
    let result = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(signal_error)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(signal_error)?;
        tokio::select! {
            result = play(options, start_proxy) => result,
            _ = interrupt.recv() => Ok(()),
            _ = terminate.recv() => Ok(()),
        }
    });
    match result {
        // Whoever read along has seen enough: `highwater demo | head`.
        Err(DemoError::System(_, error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Ok(()) => {
            // The servers and files are gone by now: they ended with the future above.
            let _ = say("stopped; servers and files are gone");
            Ok(())
        }
        result => result,
    }
}

fn signal_error(error: io::Error) -> DemoError {
    DemoError::System("cannot wait for signals", error)
}

/// One line on standard output.
fn say(line: &str) -> Result<(), DemoError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|error| DemoError::System("cannot print", error))
}

async fn play<P, F>(options: &DemoOptions, start_proxy: F) -> Result<(), DemoError>
where
    P: Send + 'static,
    F: FnOnce(&Path) -> Result<P, String> + Send + 'static,
{
    // pg_rewind asks for it where it reads from.
    let settings = vec![("full_page_writes".to_owned(), "on".to_owned())];
    // An identity of its own, so that the template goes as soon as it has been copied.
    let cluster_options =
        ClusterOptions { replicas: 2, identity: Identity::Own, settings, ..ClusterOptions::default() };
    // A data directory, three servers, the proxy.
    let mut progress = Progress::new(io::stdout(), io::stdout().is_terminal(), 5);
    let cluster = PrivateCluster::start(&cluster_options, &mut |step| drop(progress.step(step))).await?;
    let admin = cluster.make_role("admin").await?;
    let claim = || ReservedPort::claim().map_err(|error| DemoError::System("no free port", error));
    let (port, http) = (claim()?, claim()?);
    let proxy = Proxy { port: port.number(), http: http.number() };

    progress
        .step(&format!("starting the proxy on 127.0.0.1:{}", proxy.port))
        .map_err(|error| DemoError::System("cannot print", error))?;
    let config = cluster.directory().join("config.yaml");
    let text = config_text(&cluster, &proxy, &admin, &cluster.private_directory("state")?);
    std::fs::write(&config, text)
        .map_err(|error| DemoError::System("cannot write the configuration", error))?;
    let hosts = Hosts::new(cluster.nodes(), cluster.program(""), config.clone());
    // Dropped before the cluster, at whichever point this future ends.
    let _running = tokio::task::spawn_blocking(move || start_proxy(&config))
        .await
        .unwrap_or_else(|error| Err(error.to_string()))
        .map_err(DemoError::Proxy)?;
    proxy.wait_ready().await?;
    drop(progress);

    introduce(&cluster, &proxy, &admin)?;
    let app = cluster.roles().app.clone();
    show_samples(&proxy, &app).await?;
    show_traffic(&proxy, &app, hosts, options.exit_after).await
}

fn config_text(cluster: &PrivateCluster, proxy: &Proxy, admin: &Login, state: &Path) -> String {
    let Login { user, password } = &cluster.roles().control;
    let mut text =
        format!("listen: 127.0.0.1:{}\nhttp: 127.0.0.1:{}\nworkers: 2\nnodes:\n", proxy.port, proxy.http);
    for node in cluster.nodes() {
        text += &format!("  - {{ name: {}, host: 127.0.0.1, port: {} }}\n", node.name(), node.port());
    }
    text += &format!(
        "control: {{ user: {user}, password: '{password}', database: postgres }}\n\
         auth: {{ source: query, admins: [ {admin} ] }}\n\
         node_tls: {{ mode: disable }}\n\
         failover: {{ mode: manual, state_dir: '{state}', sever_timeout: 30s, pause_timeout: 30s }}\n\
         log: {{ level: warn }}\n",
        admin = admin.user,
        state = state.display(),
    );
    text
}

fn introduce(cluster: &PrivateCluster, proxy: &Proxy, admin: &Login) -> Result<(), DemoError> {
    say(&format!("directory: {}", cluster.directory().display()))?;
    for (index, node) in cluster.nodes().iter().enumerate() {
        let role = if index == 0 { "primary" } else { "replica" };
        let pid = node.pid().map(|pid| format!(", pid {pid}")).unwrap_or_default();
        say(&format!("node {}: {role}, 127.0.0.1:{}{pid}", node.name(), node.port()))?;
    }
    let Login { user, password } = &cluster.roles().app;
    say("")?;
    say("try it yourself, from another terminal:")?;
    say(&format!("  psql 'postgresql://{user}:{password}@127.0.0.1:{}/app'", proxy.port))?;
    let Login { user, password } = admin;
    say(&format!("  psql 'postgresql://{user}:{password}@127.0.0.1:{}/highwater'", proxy.port))?;
    say("    the admin console: HELP, SHOW NODES, SWITCHOVER; or kill -9 the primary, then FAILOVER")?;
    say(&format!("  curl -s http://127.0.0.1:{}/metrics | grep ^highwater_", proxy.http))?;
    say(&format!("or look at http://127.0.0.1:{}/ in a browser", proxy.http))
}

/// Where the proxy listens.
struct Proxy {
    port: u16,
    http: u16,
}

impl Proxy {
    async fn get(&self, path: &str) -> io::Result<(u16, String)> {
        let ask = async {
            let mut stream = TcpStream::connect(("127.0.0.1", self.http)).await?;
            let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
            let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
            Ok((status.ok_or(io::ErrorKind::InvalidData)?, body.to_owned()))
        };
        tokio::time::timeout(Duration::from_secs(5), ask).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
    }

    async fn wait_ready(&self) -> Result<(), DemoError> {
        let deadline = Instant::now() + READY_DEADLINE;
        loop {
            if matches!(self.get("/readyz").await, Ok((200, _))) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(DemoError::NotReady);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn scrape(&self) -> Result<Scrape, DemoError> {
        let (_, text) =
            self.get("/metrics").await.map_err(|error| DemoError::System("cannot read /metrics", error))?;
        Ok(Scrape::parse(&text))
    }
}

/// Why statements went where they went: (node, class, reason), as the metric labels them.
type Why = (String, String, String);

/// What the demo reads from /metrics.
#[derive(Debug, Default, PartialEq)]
struct Scrape {
    statements: BTreeMap<Why, f64>,
    /// By node: bytes, seconds.
    lag: BTreeMap<String, (f64, f64)>,
    /// By node: `primary`, `replica` or `excluded`.
    roles: BTreeMap<String, String>,
    /// What failover is doing, in a word.
    state: String,
}

impl Scrape {
    /// Prometheus' text format; lines of other metrics are skipped.
    fn parse(text: &str) -> Scrape {
        let mut scrape = Scrape::default();
        for line in text.lines() {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let Some((name, labels)) = series.trim_end_matches('}').split_once('{') else { continue };
            let Ok(value) = value.parse::<f64>() else { continue };
            let label = |wanted: &str| {
                let mut pairs = labels.split("\",").filter_map(|pair| pair.split_once("=\""));
                let found = pairs.find(|(label, _)| label.trim() == wanted);
                found.map(|(_, text)| text.trim_end_matches('"').to_owned()).unwrap_or_default()
            };
            match name {
                STATEMENTS => {
                    let why = (label("node"), label("class"), label("reason"));
                    *scrape.statements.entry(why).or_default() += value;
                }
                ROLE if value == 1.0 => {
                    scrape.roles.insert(label("node"), label("role"));
                }
                STATE if value == 1.0 => scrape.state = label("state"),
                LAG_BYTES => scrape.lag.entry(label("node")).or_default().0 = value,
                LAG_SECONDS => scrape.lag.entry(label("node")).or_default().1 = value,
                _ => {}
            }
        }
        scrape
    }

    /// The primary, unless it is just being replaced.
    fn settled_primary(&self) -> Option<&str> {
        let mut primaries = self.roles.iter().filter(|(_, role)| *role == "primary");
        primaries.next().map(|(node, _)| node.as_str()).filter(|_| self.state == "healthy")
    }

    fn role(&self, node: &str) -> &str {
        self.roles.get(node).map_or("unknown", String::as_str)
    }

    /// What was counted since `earlier`.
    fn since(&self, earlier: &Scrape) -> BTreeMap<Why, u64> {
        let grown = self.statements.iter().filter_map(|(why, now)| {
            let before = earlier.statements.get(why).copied().unwrap_or_default();
            // Counts are whole; a negative difference (a restarted proxy) saturates to 0.
            let count = (now - before).round() as u64;
            (count > 0).then(|| (why.clone(), count))
        });
        grown.collect()
    }
}

/// What the samples and the traffic need.
const SET_UP: &[&str] = &[
    "CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL)",
    "INSERT INTO account SELECT i, 100 FROM generate_series(1, 1000) i",
];

/// Statements that each show one rule, one after the other on one session.
const SAMPLES: &[&str] = &[
    "SELECT balance FROM account WHERE id = 7",
    "SELECT count(*) FROM account",
    "SELECT * FROM account WHERE id = 7 FOR UPDATE",
    "UPDATE account SET balance = balance + 1 WHERE id = 7",
    "WITH m AS (DELETE FROM account WHERE id = 999 RETURNING *) SELECT * FROM m",
    "SELECT 1; DELETE FROM account WHERE id = 1000",
    "BEGIN; SELECT count(*) FROM account; COMMIT",
];

async fn show_samples(proxy: &Proxy, app: &Login) -> Result<(), DemoError> {
    let failed = |sql: &str| {
        let sql = sql.to_owned();
        move |error| DemoError::Statement(sql, error)
    };
    let client = connect(proxy.port, "app", app).await.map_err(failed("connecting through the proxy"))?;
    say("")?;
    say("where statements go (node, its role, the statement; class and reason as /metrics counts them):")?;
    for sql in SET_UP {
        show_sample(proxy, &client, sql).await?;
    }
    await_reads(proxy, &client).await?;
    for sql in SAMPLES {
        show_sample(proxy, &client, sql).await?;
    }
    Ok(())
}

async fn show_sample(proxy: &Proxy, client: &tokio_postgres::Client, sql: &str) -> Result<(), DemoError> {
    let before = proxy.scrape().await?;
    client.batch_execute(sql).await.map_err(|error| DemoError::Statement(sql.to_owned(), error))?;
    let ran = counted_since(proxy, &before).await?;
    for (node, class, reason) in ran.keys() {
        let role = before.role(node);
        say(&format!("  {node} {role}  {sql:<76}  {class}: {reason}"))?;
    }
    Ok(())
}

/// Until the proxy has read the new table's catalog facts, which takes it a moment, no statement of this
/// database counts as a read; and the replicas must have replayed it. The demo shows the usual case.
async fn await_reads(proxy: &Proxy, client: &tokio_postgres::Client) -> Result<(), DemoError> {
    const READ: &str = "SELECT count(*) FROM account";
    let deadline = Instant::now() + READY_DEADLINE;
    loop {
        let before = proxy.scrape().await?;
        client.batch_execute(READ).await.map_err(|error| DemoError::Statement(READ.into(), error))?;
        let ran = counted_since(proxy, &before).await?;
        if ran.keys().any(|(_, _, reason)| reason == "read") {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(DemoError::NotReady);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The difference once there is one: a statement is counted when its answer has been passed on, and
/// we may ask before that.
async fn counted_since(proxy: &Proxy, before: &Scrape) -> Result<BTreeMap<Why, u64>, DemoError> {
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        let ran = proxy.scrape().await?.since(before);
        if !ran.is_empty() || Instant::now() >= deadline {
            return Ok(ran);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What the traffic has seen.
#[derive(Debug, Default)]
struct Seen {
    /// Rows read back by the session that wrote them.
    own: AtomicU64,
    /// Of those, older than what was written: 0, or the product is broken.
    stale: AtomicU64,
    /// What sessions were told when a statement failed, by SQLSTATE: none, until the primary is killed.
    failed: Mutex<BTreeMap<String, u64>>,
}

impl Seen {
    fn fail(&self, error: &tokio_postgres::Error) {
        let code = error.code().map_or("no answer", |code| code.code()).to_owned();
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner).entry(code).or_default() += 1;
    }
}

type Work = Pin<Box<dyn Future<Output = Result<(), DemoError>>>>;

/// The end of what is under way, if anything is.
async fn end_of(work: &mut Option<Work>) -> Result<(), DemoError> {
    match work {
        Some(future) => {
            let result = future.await;
            *work = None;
            result
        }
        None => std::future::pending().await,
    }
}

async fn show_traffic(
    proxy: &Proxy,
    app: &Login,
    mut hosts: Hosts,
    exit_after: Option<Duration>,
) -> Result<(), DemoError> {
    say("")?;
    say(&format!(
        "live traffic: {WRITERS} sessions write and read their own rows back, {READERS} only read; \
         statements per second and node:"
    ))?;
    let seen = Arc::new(Seen::default());
    // Its tasks end with it.
    let mut sessions = JoinSet::new();
    for id in 1..=WRITERS {
        sessions.spawn(goes_on(seen.clone(), proxy.port, app.clone(), move |client, seen| {
            writer(client, id, seen)
        }));
    }
    for id in 1..=READERS {
        sessions.spawn(goes_on(seen.clone(), proxy.port, app.clone(), move |client, _| reader(client, id)));
    }
    let end = exit_after.map(|after| Instant::now() + after);
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    tick.tick().await;
    let mut earlier = proxy.scrape().await?;
    let mut comeback: Option<Work> = None;
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = async { tokio::time::sleep_until(end.unwrap_or_else(Instant::now)).await }, if end.is_some() => return Ok(()),
            result = end_of(&mut comeback), if comeback.is_some() => {
                result?;
                continue;
            }
        }
        let now = proxy.scrape().await?;
        say(&traffic_line(&now, &earlier, &seen))?;
        if comeback.is_none()
            && let Some(old) = now.settled_primary().and_then(|primary| hosts.replaced_by(primary))
        {
            comeback = Some(Box::pin(old.carry_out()));
        }
        earlier = now;
    }
}

/// `a primary 61: write 60, read (behind) 1 | b replica 180: read 180, 168 B and 0.4 ms behind | ...`
fn traffic_line(now: &Scrape, earlier: &Scrape, seen: &Seen) -> String {
    let ran = now.since(earlier);
    let mut parts = Vec::new();
    for (node, role) in &now.roles {
        let here = ran.iter().filter(|((at, ..), _)| at == node);
        let total: u64 = here.clone().map(|(_, count)| count).sum();
        let kinds: Vec<String> =
            here.map(|((_, class, reason), count)| format!("{} {count}", kind(class, reason))).collect();
        let mut part = format!("{node} {role} {total}");
        if !kinds.is_empty() {
            part += &format!(": {}", kinds.join(", "));
        }
        if let Some((bytes, seconds)) = now.lag.get(node) {
            part += &format!(", {bytes} B and {:.1} ms behind", seconds * 1000.0);
        }
        parts.push(part);
    }
    let (own, stale) = (seen.own.load(Ordering::Relaxed), seen.stale.load(Ordering::Relaxed));
    parts.push(format!("own rows read back {own}, stale {stale}"));
    let failed = seen.failed.lock().unwrap_or_else(PoisonError::into_inner);
    if !failed.is_empty() {
        let codes: Vec<String> = failed.iter().map(|(code, count)| format!("{code} {count}")).collect();
        parts.push(format!("failed: {}", codes.join(", ")));
    }
    parts.join(" | ")
}

/// The class; the reason too where it is not the usual one of that class.
fn kind(class: &str, reason: &str) -> String {
    match (class, reason) {
        ("read", "read") => class.to_owned(),
        (class, "not_a_read") if class != "read" => class.to_owned(),
        _ => format!("{class} ({reason})"),
    }
}

/// A session that does its work for ever, on a new connection where the one before broke.
async fn goes_on<F>(
    seen: Arc<Seen>,
    port: u16,
    app: Login,
    work: impl Fn(tokio_postgres::Client, Arc<Seen>) -> F,
) where
    F: Future<Output = Result<(), tokio_postgres::Error>>,
{
    loop {
        let ended = match connect(port, "app", &app).await {
            Ok(client) => work(client, seen.clone()).await,
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            seen.fail(&error);
        }
        tokio::time::sleep(RECONNECT_PACE).await;
    }
}

/// Raises its own row's balance and reads it back, until something fails.
async fn writer(
    client: tokio_postgres::Client,
    id: i32,
    seen: Arc<Seen>,
) -> Result<(), tokio_postgres::Error> {
    let write =
        client.prepare("UPDATE account SET balance = balance + 1 WHERE id = $1 RETURNING balance").await?;
    let read = client.prepare("SELECT balance FROM account WHERE id = $1").await?;
    loop {
        let wrote: i64 = client.query_one(&write, &[&id]).await?.get(0);
        let found: i64 = client.query_one(&read, &[&id]).await?.get(0);
        seen.own.fetch_add(1, Ordering::Relaxed);
        if found < wrote {
            seen.stale.fetch_add(1, Ordering::Relaxed);
        }
        tokio::time::sleep(WRITE_PACE).await;
    }
}

/// Reads a sum over all rows or one row, in turns, until something fails.
async fn reader(client: tokio_postgres::Client, id: i32) -> Result<(), tokio_postgres::Error> {
    let one = format!("SELECT balance FROM account WHERE id = {}", id + 100);
    loop {
        for sql in ["SELECT sum(balance) FROM account", one.as_str()] {
            client.simple_query(sql).await?;
            tokio::time::sleep(READ_PACE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(node: &str, class: &str, reason: &str) -> Why {
        (node.into(), class.into(), reason.into())
    }

    #[test]
    fn a_scrape_holds_what_is_shown_and_skips_the_rest() {
        let text = "# HELP x y\n\
             highwater_statements_total{class=\"read\",node=\"b\",reason=\"read\"} 3\n\
             highwater_statements_total{class=\"read\",node=\"b\",reason=\"read\",protocol=\"simple\"} 2\n\
             highwater_replica_replay_lag_bytes{node=\"b\"} 168\n\
             highwater_replica_replay_lag_seconds{node=\"b\"} 0.004\n\
             highwater_clients 4\nnot a sample\n";
        let scrape = Scrape::parse(text);
        assert_eq!(scrape.statements, BTreeMap::from([(why("b", "read", "read"), 5.0)]));
        assert_eq!(scrape.lag, BTreeMap::from([("b".to_owned(), (168.0, 0.004))]));
    }

    #[test]
    fn a_line_says_where_why_and_how_far_behind() {
        let before = Scrape::parse(
            "highwater_statements_total{node=\"a\",class=\"write\",reason=\"not_a_read\"} 10\n",
        );
        let now = Scrape::parse(
            "highwater_statements_total{node=\"a\",class=\"write\",reason=\"not_a_read\"} 70\n\
             highwater_statements_total{node=\"a\",class=\"read\",reason=\"behind\"} 2\n\
             highwater_statements_total{node=\"b\",class=\"read\",reason=\"read\"} 5\n\
             highwater_node_role{node=\"a\",role=\"primary\"} 1\nhighwater_node_role{node=\"a\",role=\"replica\"} 0\n\
             highwater_node_role{node=\"b\",role=\"replica\"} 1\nhighwater_node_role{node=\"c\",role=\"excluded\"} 1\n\
             highwater_replica_replay_lag_bytes{node=\"b\"} 168\nhighwater_replica_replay_lag_seconds{node=\"b\"} 0.0004\n",
        );
        assert_eq!(
            now.since(&before),
            BTreeMap::from([
                (why("a", "write", "not_a_read"), 60),
                (why("a", "read", "behind"), 2),
                (why("b", "read", "read"), 5)
            ])
        );
        assert_eq!(
            traffic_line(&now, &before, &Seen::default()),
            "a primary 62: read (behind) 2, write 60 | b replica 5: read 5, 168 B and 0.4 ms behind | \
             c excluded 0 | own rows read back 0, stale 0"
        );
        assert!(before.since(&now).is_empty());
    }
}
