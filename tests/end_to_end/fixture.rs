//! What the tests stand on: a private cluster behind cuttable links, the real `highwater` process
//! over it, and clients of several kinds. Nothing here waits a fixed time: each wait looks for what
//! it waits for, up to [`PATIENCE`].

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use highwater::demo::cluster::{self, ClusterOptions, Login, PrivateCluster};
use highwater::demo::port::ReservedPort;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// How long anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Looks until `what` holds; panics with its description after [`PATIENCE`].
pub async fn eventually<F: Future<Output = bool>>(description: &str, mut what: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !what().await {
        assert!(Instant::now() < deadline, "never came true: {description}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs `read`, which is marked with the word `loaded`, until a replica of a cluster that logs statements has run it:
/// from then on the proxy knows the database's facts.
pub async fn reads_reach_replicas(cluster: &Cluster, client: &tokio_postgres::Client, read: &str) {
    assert!(read.contains("loaded"), "{read} is not marked");
    eventually("plain reads reach a replica", || async {
        client.simple_query(read).await.unwrap();
        cluster.ran("loaded")[1..].iter().any(|runs| *runs > 0)
    })
    .await;
}

/// A runtime of its own for the links: a test that blocks its thread must not hold up the traffic.
fn background() -> &'static tokio::runtime::Handle {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
        })
        .handle()
}

// ---------------------------------------------------------------------------------------------
// The cluster and the network before it.

/// What a link does with the bytes between proxy and node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passage {
    /// Both ways.
    Open,
    /// Connections are closed and new ones refused: the machine is up, nobody listens.
    Cut,
    /// Connections stay and are accepted, nothing passes: a dead network.
    Silent,
}

/// A TCP forwarder before one node, through which the proxy sees it.
pub struct Link {
    port: ReservedPort,
    passage: watch::Sender<Passage>,
    task: tokio::task::JoinHandle<()>,
}

impl Link {
    pub async fn to(node: u16) -> Link {
        let port = ReservedPort::claim().unwrap();
        let (passage, watched) = watch::channel(Passage::Open);
        let first = Link::listen(port.number()).unwrap();
        let task = background().spawn(Link::run(port.number(), node, watched, first));
        Link { port, passage, task }
    }

    fn listen(port: u16) -> std::io::Result<TcpListener> {
        let _inside = background().enter();
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    }

    /// A child process that some other test is just starting holds the socket that was closed, too, until it runs its
    /// own program: only then the port is free again.
    async fn listen_again(port: u16) -> TcpListener {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Link::listen(port) {
                Ok(listener) => return listener,
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Err(error) => panic!("a link cannot be healed: {error}"),
            }
        }
    }

    async fn run(port: u16, node: u16, mut passage: watch::Receiver<Passage>, first: TcpListener) {
        let mut listener = Some(first);
        loop {
            if *passage.borrow_and_update() == Passage::Cut {
                listener = None;
                if passage.changed().await.is_err() {
                    return;
                }
                continue;
            }
            let listener = match &mut listener {
                Some(listener) => listener,
                none => none.insert(Link::listen_again(port).await),
            };
            tokio::select! {
                accepted = listener.accept() => {
                    if let Ok((client, _)) = accepted {
                        tokio::spawn(Link::forward(client, node, passage.clone()));
                    }
                }
                changed = passage.changed() => if changed.is_err() { return },
            }
        }
    }

    async fn forward(client: TcpStream, node: u16, passage: watch::Receiver<Passage>) {
        let mut waiting = passage.clone();
        if waiting.wait_for(|now| *now != Passage::Silent).await.is_err() {
            return;
        }
        let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, node)).await else { return };
        for socket in [&client, &server] {
            socket.set_nodelay(true).unwrap();
        }
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        let mut cut = passage.clone();
        tokio::select! {
            _ = Link::pump(from_client, to_server, passage.clone()) => {}
            _ = Link::pump(from_server, to_client, passage) => {}
            _ = cut.wait_for(|now| *now == Passage::Cut) => {}
        }
    }

    async fn pump(
        mut from: tokio::net::tcp::OwnedReadHalf,
        mut to: tokio::net::tcp::OwnedWriteHalf,
        mut passage: watch::Receiver<Passage>,
    ) -> std::io::Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let got = from.read(&mut buffer).await?;
            // Not even the end of a connection passes a dead network.
            if passage.wait_for(|now| *now != Passage::Silent).await.is_err() || got == 0 {
                return Ok(());
            }
            to.write_all(&buffer[..got]).await?;
        }
    }

    /// Where the node is reached through this link.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Closes all connections and refuses new ones.
    pub fn cut(&self) {
        self.passage.send_replace(Passage::Cut);
    }

    /// Lets nothing through, and nobody know.
    pub fn silence(&self) {
        self.passage.send_replace(Passage::Silent);
    }

    /// Back to normal; what a silent link holds back goes on.
    pub fn heal(&self) {
        self.passage.send_replace(Passage::Open);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A private cluster, and a link before each node.
pub struct Cluster {
    inner: PrivateCluster,
    links: Vec<Link>,
}

impl std::ops::Deref for Cluster {
    type Target = PrivateCluster;
    fn deref(&self) -> &PrivateCluster {
        &self.inner
    }
}

impl Cluster {
    /// A primary and `replicas` replicas.
    pub async fn start(replicas: usize) -> Cluster {
        Cluster::start_with(ClusterOptions { replicas, ..ClusterOptions::default() }).await
    }

    /// The same, with every statement in the nodes' logs, for [`ran`](Self::ran).
    pub async fn start_logging(replicas: usize) -> Cluster {
        let settings = vec![("log_statement".to_owned(), "all".to_owned())];
        Cluster::start_with(ClusterOptions { replicas, settings, ..ClusterOptions::default() }).await
    }

    pub async fn start_with(options: ClusterOptions) -> Cluster {
        let inner = match PrivateCluster::start(&options, &mut |_| {}).await {
            Ok(inner) => inner,
            Err(error) => panic!("{error}"),
        };
        let mut links = Vec::new();
        for node in inner.nodes() {
            links.push(Link::to(node.port()).await);
        }
        Cluster { inner, links }
    }

    /// The link before node `index`.
    pub fn link(&self, index: usize) -> &Link {
        &self.links[index]
    }

    /// How many statements with `marker` in their text (or a parameter of theirs) each node has run.
    /// Needs [`start_logging`](Self::start_logging). Exact at once: the line is written before the statement runs.
    pub fn ran(&self, marker: &str) -> Vec<usize> {
        let is_run = |line: &&str| {
            line.contains(marker) && (line.contains(" LOG:  statement: ") || line.contains(" LOG:  execute "))
        };
        self.nodes().iter().map(|node| node.log().lines().filter(is_run).count()).collect()
    }

    /// Transactions each node has finished in the database `app`. Sessions report at their end, or
    /// some seconds late: ask when the proxy has stopped.
    pub async fn transactions(&self) -> Vec<i64> {
        let sql = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = 'app'";
        let mut counts = Vec::new();
        for node in self.nodes() {
            let client = node.admin().await.unwrap();
            counts.push(client.query_one(sql, &[]).await.unwrap().get(0));
        }
        counts
    }

    /// Runs `sql` as `app` on the primary and waits until all replicas have it.
    pub async fn set_up(&self, sql: &str) {
        let client = self.primary().connect("app", &self.roles().app).await.unwrap();
        client.batch_execute(sql).await.unwrap();
        self.wait_caught_up(0).await.unwrap();
    }

    /// As [`set_up`](Self::set_up), by the superuser.
    pub async fn set_up_as_superuser(&self, sql: &str) {
        let client = self.primary().connect("app", &self.roles().superuser).await.unwrap();
        client.batch_execute(sql).await.unwrap();
        self.wait_caught_up(0).await.unwrap();
    }

    /// Runs a program of PostgreSQL's as `app` against `port`.
    pub async fn run_program(&self, name: &str, port: u16, arguments: &[&str], stdin: &str) -> Output {
        let mut command = self.program_command(name, port);
        command.args(arguments);
        run(command, stdin).await
    }

    /// The same, not yet started.
    pub fn program_command(&self, name: &str, port: u16) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(self.program(name));
        for (variable, _) in std::env::vars().filter(|(variable, _)| variable.starts_with("PG")) {
            command.env_remove(variable);
        }
        let app = &self.roles().app;
        command
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", port.to_string())
            .env("PGUSER", &app.user)
            .env("PGDATABASE", "app")
            .env("PGPASSWORD", &app.password)
            .env("PGCONNECT_TIMEOUT", "10")
            .env("PGSSLMODE", "disable")
            .env("HOME", "/nonexistent")
            .env("PSQLRC", "/nonexistent")
            .env("LC_ALL", "C")
            .kill_on_drop(true);
        command
    }
}

/// Runs a command to its end, within four times [`PATIENCE`].
pub async fn run(mut command: tokio::process::Command, stdin: &str) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut pipe = child.stdin.take().unwrap();
    let stdin = stdin.to_owned();
    let feeder = tokio::spawn(async move {
        // A program may end before it has read all.
        let _ = pipe.write_all(stdin.as_bytes()).await;
    });
    let output = tokio::time::timeout(PATIENCE * 4, child.wait_with_output()).await;
    feeder.abort();
    output.expect("the program did not end").unwrap()
}

/// The output as text, after checking that the program succeeded.
pub fn success(output: &Output) -> String {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    stdout
}

// ---------------------------------------------------------------------------------------------
// The proxy.

/// How a [`Proxy`] is started.
#[derive(Default)]
pub struct ProxyOptions<'a> {
    /// YAML that is laid over the fixture's configuration, key by key; lists are replaced.
    pub overrides: &'a str,
    /// Whether to wait until /readyz says yes.
    pub start: Start,
    /// Where a debug build kills itself (`HIGHWATER_FAILPOINT`); empty: nowhere. Only until [`Proxy::revive`].
    pub failpoint: &'a str,
}

/// What [`Proxy::start_with`] waits for.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Ready for clients, and every replica in use.
    #[default]
    Complete,
    /// Ready for clients.
    Ready,
    /// That it listens.
    Listening,
}

/// The real `highwater run` process over a cluster, by way of its links.
pub struct Proxy {
    port: ReservedPort,
    http: ReservedPort,
    process: Mutex<Child>,
    /// Kills the process and removes the files should the test process be killed.
    watcher: Mutex<Child>,
    directory: tempfile::TempDir,
    app: Login,
    /// What must never be in its log.
    secrets: Vec<String>,
    settled: bool,
}

impl Proxy {
    pub async fn start(cluster: &Cluster) -> Proxy {
        Proxy::start_with(cluster, ProxyOptions::default()).await
    }

    pub async fn start_with(cluster: &Cluster, options: ProxyOptions<'_>) -> Proxy {
        let (port, http) = (ReservedPort::claim().unwrap(), ReservedPort::claim().unwrap());
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config.yaml");
        std::fs::write(&config, config_text(cluster, port.number(), http.number(), &options)).unwrap();

        let (process, watcher) = run_proxy(directory.path(), options.failpoint);
        let app = cluster.roles().app.clone();
        let (process, watcher) = (Mutex::new(process), Mutex::new(watcher));
        let roles = cluster.roles();
        let secrets = [&roles.superuser, &roles.control, &roles.app, &roles.replicator]
            .map(|login| login.password.clone())
            .into();
        let proxy = Proxy { port, http, process, watcher, directory, app, secrets, settled: false };
        proxy.wait_started(options.start, cluster.nodes().len()).await;
        proxy
    }

    /// Writes another configuration file; it takes effect at the next [`reload`](Self::reload).
    pub fn configure(&self, cluster: &Cluster, overrides: &str) {
        let options = ProxyOptions { overrides, ..ProxyOptions::default() };
        self.write_config(&config_text(cluster, self.port.number(), self.http.number(), &options));
    }

    /// The same with this text, whatever it is.
    pub fn write_config(&self, text: &str) {
        // In one step, as the process may read it at any time.
        let half = self.directory.path().join("config.yaml.half");
        std::fs::write(&half, text).unwrap();
        std::fs::rename(half, self.directory.path().join("config.yaml")).unwrap();
    }

    /// SIGHUP, and waits until the proxy has done with it. Whether it has applied the file.
    pub async fn reload(&self) -> bool {
        let count =
            async |outcome| self.metrics().await.sum("highwater_reloads_total", &[("outcome", outcome)]);
        let (applied, refused) = (count("applied").await, count("refused").await);
        self.signal(nix::sys::signal::Signal::SIGHUP);
        eventually("the proxy has reloaded its configuration", || async {
            count("applied").await + count("refused").await > applied + refused
        })
        .await;
        count("applied").await > applied
    }

    /// Ends it by SIGTERM, and runs it again with the same configuration, on the same ports, until it is ready.
    pub async fn restart(&self) {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let status = wait_ended(&self.process).await;
        assert!(status.success(), "the proxy did not exit cleanly on SIGTERM: {status}");
        self.run_again();
        self.wait_started(Start::Ready, 0).await;
    }

    fn run_again(&self) {
        // Before its process id can be another's.
        let mut watcher = self.watcher.lock().unwrap();
        watcher.kill().unwrap();
        watcher.wait().unwrap();
        let (process, next) = run_proxy(self.directory.path(), "");
        (*self.process.lock().unwrap(), *watcher) = (process, next);
    }

    /// Whether it has been stopped (SIGSTOP), by its failpoint or a test.
    pub fn is_stopped(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
    }

    /// Waits until it has been killed, by its failpoint or a test, and runs it again until it listens.
    pub async fn revive(&self) {
        let status = wait_ended(&self.process).await;
        assert!(!status.success(), "the proxy ended by itself: {status}");
        self.run_again();
        self.wait_started(Start::Listening, 0).await;
    }

    async fn wait_started(&self, start: Start, nodes: usize) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ended = self.process.lock().unwrap().try_wait().unwrap();
            if let Some(status) = ended {
                panic!("the proxy ended as it started: {status}");
            }
            let enough = match start {
                Start::Listening => TcpStream::connect((Ipv4Addr::LOCALHOST, self.port())).await.is_ok(),
                Start::Ready => self.get("/readyz").await.is_some_and(|(status, _)| status == 200),
                Start::Complete => {
                    self.get("/readyz").await.is_some_and(|(status, _)| status == 200)
                        && self.usable_nodes().await == nodes
                }
            };
            if enough {
                return;
            }
            assert!(Instant::now() < deadline, "the proxy did not become ready");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// How many nodes serve, by the proxy's own account: they answer its probes and are not excluded.
    pub async fn usable_nodes(&self) -> usize {
        let metrics = self.metrics().await;
        let serves = |node: &str| {
            let role = |role| metrics.sum("highwater_node_role", &[("node", node), ("role", role)]);
            metrics.sum("highwater_node_up", &[("node", node)]) == 1.0
                && role("primary") + role("replica") == 1.0
        };
        metrics.values_of("highwater_node_up", "node").filter(|node| serves(node)).count()
    }

    /// Its port for clients.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Its port for HTTP.
    pub fn http_port(&self) -> u16 {
        self.http.number()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.lock().unwrap().id()
    }

    /// Where its configuration, state and log are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// How `app` logs in.
    pub fn app(&self) -> &Login {
        &self.app
    }

    /// The role `app`, in its database.
    pub async fn connect(&self) -> tokio_postgres::Client {
        cluster::connect(self.port(), "app", &self.app).await.unwrap()
    }

    pub async fn connect_as(
        &self,
        database: &str,
        login: &Login,
    ) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        cluster::connect(self.port(), database, login).await
    }

    /// A raw connection, nothing sent yet.
    pub async fn raw(&self) -> RawClient {
        RawClient::connect(self.port()).await
    }

    /// A raw connection, logged in as `app`.
    pub async fn raw_login(&self) -> RawClient {
        let mut client = self.raw().await;
        client.login("app", &self.app).await.unwrap();
        client
    }

    /// GET of its HTTP port: status and body; `None` when it does not answer.
    pub async fn get(&self, path: &str) -> Option<(u16, String)> {
        self.get_with(path, "").await
    }

    /// The same with header lines of the test's own, each with its line end.
    pub async fn get_with(&self, path: &str, headers: &str) -> Option<(u16, String)> {
        let ask = async {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.http.number())).await.ok()?;
            let request =
                format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n");
            stream.write_all(request.as_bytes()).await.ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.ok()?;
            let (head, body) = answer.split_once("\r\n\r\n")?;
            let status = head.split(' ').nth(1)?.parse().ok()?;
            Some((status, body.to_owned()))
        };
        tokio::time::timeout(Duration::from_secs(5), ask).await.ok().flatten()
    }

    /// Its metrics now; empty while the HTTP port does not answer.
    pub async fn metrics(&self) -> Metrics {
        let body = self.get("/metrics").await.map(|(_, body)| body).unwrap_or_default();
        Metrics::parse(&body)
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.get_mut().unwrap().try_wait(), Ok(None))
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// SIGTERM, and how it ended.
    pub async fn stop(self) -> ExitStatus {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        self.ended().await
    }

    /// How it has ended, after a signal.
    pub async fn ended(mut self) -> ExitStatus {
        let status = wait_ended(&self.process).await;
        self.settled = true;
        status
    }
}

async fn wait_ended(process: &Mutex<Child>) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let ended = process.lock().unwrap().try_wait().unwrap();
        if let Some(status) = ended {
            return status;
        }
        assert!(Instant::now() < deadline, "the proxy did not end on its signal");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Runs the program in a directory that holds its configuration, and what kills it should we be killed.
fn run_proxy(directory: &Path, failpoint: &str) -> (Child, Child) {
    let log = std::fs::File::options().create(true).append(true).open(directory.join("log")).unwrap();
    let program = std::env::var("HIGHWATER_BINARY");
    let process = Command::new(program.as_deref().unwrap_or(env!("CARGO_BIN_EXE_highwater")))
        .args(["run", "-c"])
        .arg(directory.join("config.yaml"))
        .env("HIGHWATER_FAILPOINT", failpoint)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let watcher = watch_over(&process, directory);
    (process, watcher)
}

/// Kills the process and removes its directory should we be killed.
pub fn watch_over(process: &Child, directory: &Path) -> Child {
    Command::new("/bin/sh")
        .args(["-c", "trap '' INT TERM HUP; read -r _; kill -KILL $1; rm -rf \"$2\"", "watcher"])
        .arg(process.id().to_string())
        .arg(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut complaint = None;
        let mut process = self.process.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut watcher = self.watcher.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !self.settled {
            match process.try_wait() {
                Ok(None) => {
                    let pid = nix::unistd::Pid::from_raw(i32::try_from(process.id()).unwrap());
                    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
                    let deadline = Instant::now() + PATIENCE;
                    loop {
                        match process.try_wait() {
                            Ok(Some(status)) if status.success() => break,
                            Ok(None) if Instant::now() < deadline => {
                                std::thread::sleep(Duration::from_millis(5))
                            }
                            how => {
                                complaint =
                                    Some(format!("the proxy did not exit cleanly on SIGTERM: {how:?}"));
                                break;
                            }
                        }
                    }
                }
                how => complaint = Some(format!("the proxy had ended on its own: {how:?}")),
            }
        }
        let log = self.log();
        if complaint.is_none() && log.contains("panicked at") {
            complaint = Some("the proxy panicked".to_owned());
        }
        if complaint.is_none() && self.secrets.iter().any(|secret| log.contains(secret)) {
            complaint = Some("the proxy's log shows a password".to_owned());
        }
        let _ = process.kill();
        let _ = process.wait();
        // Only now: its job would be to kill a process id that is no longer ours.
        let _ = watcher.kill();
        let _ = watcher.wait();
        if std::thread::panicking() || complaint.is_some() {
            println!("--- log of the proxy on port {} ---\n{log}---", self.port.number());
        }
        if let Some(complaint) = complaint
            && !std::thread::panicking()
        {
            panic!("{complaint}");
        }
    }
}

pub fn config_text(cluster: &Cluster, port: u16, http: u16, options: &ProxyOptions<'_>) -> String {
    let control = &cluster.roles().control;
    let nodes: String = cluster
        .nodes()
        .iter()
        .zip(&cluster.links)
        .map(|(node, link)| {
            format!(
                "  - {{ name: {}, host: 127.0.0.1, port: {}, replication_port: {}, delayed_ok: true }}\n",
                node.name(),
                link.port(),
                node.port()
            )
        })
        .collect();
    let base = format!(
        "listen: 127.0.0.1:{port}\n\
         http: 127.0.0.1:{http}\n\
         workers: 2\n\
         nodes:\n{nodes}\
         control: {{ user: {user}, password: '{password}', database: postgres }}\n\
         auth: {{ source: query, admins: [ {user} ] }}\n\
         node_tls: {{ mode: disable }}\n\
         failover: {{ mode: follow }}\n",
        user = control.user,
        password = control.password,
    );
    let mut config: serde_yaml::Value = serde_yaml::from_str(&base).unwrap();
    if !options.overrides.is_empty() {
        lay_over(&mut config, serde_yaml::from_str(options.overrides).unwrap());
    }
    serde_yaml::to_string(&config).unwrap()
}

fn lay_over(under: &mut serde_yaml::Value, over: serde_yaml::Value) {
    match (under, over) {
        (serde_yaml::Value::Mapping(under), serde_yaml::Value::Mapping(over)) => {
            for (key, value) in over {
                lay_over(under.entry(key).or_insert(serde_yaml::Value::Null), value);
            }
        }
        (under, over) => *under = over,
    }
}

/// A scrape of /metrics.
#[derive(Debug, Default)]
pub struct Metrics {
    samples: Vec<(String, BTreeMap<String, String>, f64)>,
}

impl Metrics {
    /// Reads Prometheus' text format, as far as it is used: no escapes in label values.
    pub fn parse(text: &str) -> Metrics {
        let sample = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let labels = labels
                .trim_end_matches('}')
                .split("\",")
                .filter_map(|pair| pair.split_once("=\""))
                .map(|(label, value)| (label.trim().to_owned(), value.trim_end_matches('"').to_owned()))
                .collect();
            Some((name.to_owned(), labels, value.parse().ok()?))
        };
        Metrics { samples: text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect() }
    }

    /// What stands in `label` of the samples of `name`.
    pub fn values_of<'a>(&'a self, name: &'a str, label: &'a str) -> impl Iterator<Item = &'a str> {
        let of_name = self.samples.iter().filter(move |(its, ..)| its == name);
        of_name.filter_map(move |(_, labels, _)| labels.get(label).map(String::as_str))
    }

    /// The sum of the samples of `name` that carry all of `labels`; 0 when there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.samples
            .iter()
            .filter(|(its, carried, _)| {
                its == name
                    && labels.iter().all(|(label, value)| carried.get(*label).is_some_and(|its| its == value))
            })
            .map(|(.., value)| value)
            .sum()
    }
}

// ---------------------------------------------------------------------------------------------
// A client that speaks the protocol by hand.

/// One message from the other side.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    pub tag: u8,
    pub body: Vec<u8>,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", char::from(self.tag), self.body.escape_ascii())
    }
}

impl Message {
    /// One field of an ErrorResponse or NoticeResponse: `b'C'` SQLSTATE, `b'M'` message...
    pub fn field(&self, code: u8) -> Option<String> {
        assert!(matches!(self.tag, b'E' | b'N'), "not an error or notice: {self:?}");
        let mut fields = self.body.split(|byte| *byte == 0);
        fields
            .find(|field| field.first() == Some(&code))
            .map(|field| String::from_utf8_lossy(&field[1..]).into_owned())
    }

    /// The columns of a DataRow as text.
    pub fn columns(&self) -> Vec<Option<String>> {
        assert_eq!(self.tag, b'D', "not a row: {self:?}");
        let mut rest = &self.body[2..];
        let mut columns = Vec::new();
        while let Some((length, tail)) = rest.split_first_chunk::<4>() {
            let length = i32::from_be_bytes(*length);
            let taken = usize::try_from(length).unwrap_or(0);
            columns.push((length >= 0).then(|| String::from_utf8_lossy(&tail[..taken]).into_owned()));
            rest = &tail[taken..];
        }
        columns
    }
}

/// The tags of messages, as text: `"TDCZ"`.
pub fn tags(messages: &[Message]) -> String {
    messages.iter().map(|message| char::from(message.tag)).collect()
}

/// A whole message from this side.
pub fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
    out.extend_from_slice(body);
    out
}

pub fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &[sql.as_bytes(), b"\0"].concat())
}

pub fn parse(name: &str, sql: &str) -> Vec<u8> {
    message(b'P', &[name.as_bytes(), b"\0", sql.as_bytes(), b"\0\0\0"].concat())
}

/// Bind to the unnamed portal, parameters and results as text.
pub fn bind(statement: &str, parameters: &[&str]) -> Vec<u8> {
    let mut body = [b"\0", statement.as_bytes(), b"\0\0\0"].concat();
    body.extend_from_slice(&u16::try_from(parameters.len()).unwrap().to_be_bytes());
    for parameter in parameters {
        body.extend_from_slice(&u32::try_from(parameter.len()).unwrap().to_be_bytes());
        body.extend_from_slice(parameter.as_bytes());
    }
    body.extend_from_slice(&[0, 0]);
    message(b'B', &body)
}

pub fn describe(what: u8, name: &str) -> Vec<u8> {
    message(b'D', &[&[what], name.as_bytes(), b"\0"].concat())
}

/// Execute of the unnamed portal, all rows.
pub fn execute() -> Vec<u8> {
    message(b'E', b"\0\0\0\0\0")
}

pub fn sync() -> Vec<u8> {
    message(b'S', b"")
}

pub fn flush() -> Vec<u8> {
    message(b'H', b"")
}

pub fn startup(parameters: &[(&str, &str)]) -> Vec<u8> {
    startup_of(3 << 16, parameters)
}

/// A startup packet of this protocol version.
pub fn startup_of(version: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    for (name, value) in parameters {
        body.extend_from_slice(&[name.as_bytes(), b"\0", value.as_bytes(), b"\0"].concat());
    }
    body.push(0);
    [&u32::try_from(body.len() + 4).unwrap().to_be_bytes()[..], &body].concat()
}

/// A connection on which a test sends what it likes.
pub struct RawClient {
    stream: TcpStream,
    port: u16,
    /// From BackendKeyData: process id and secret, as sent.
    pub key: Vec<u8>,
    /// From ParameterStatus.
    pub parameters: BTreeMap<String, String>,
    /// NegotiateProtocolVersion, if it came.
    pub negotiated: Option<Message>,
}

impl RawClient {
    pub async fn connect(port: u16) -> RawClient {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        RawClient { stream, port, key: Vec::new(), parameters: BTreeMap::new(), negotiated: None }
    }

    /// Logs in by SCRAM-SHA-256, up to the first ReadyForQuery; the ErrorResponse when refused.
    pub async fn login(&mut self, database: &str, login: &Login) -> Result<(), Message> {
        self.login_with(&[("user", &login.user), ("database", database)], &login.password).await
    }

    pub async fn login_with(&mut self, parameters: &[(&str, &str)], password: &str) -> Result<(), Message> {
        self.login_by(&startup(parameters), password).await
    }

    /// The same with a startup packet as it is.
    pub async fn login_by(&mut self, packet: &[u8], password: &str) -> Result<(), Message> {
        use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
        self.send(packet).await;
        let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
        loop {
            let got = self.read().await.expect("closed during login");
            let code = || u32::from_be_bytes(*got.body.first_chunk().unwrap());
            match got.tag {
                b'E' => return Err(got),
                b'R' if code() == 10 => {
                    let first = scram.message();
                    let length = u32::try_from(first.len()).unwrap().to_be_bytes();
                    let body = [SCRAM_SHA_256.as_bytes(), b"\0", &length, first].concat();
                    self.send(&message(b'p', &body)).await;
                }
                b'R' if code() == 11 => {
                    scram.update(&got.body[4..]).unwrap();
                    self.send(&message(b'p', scram.message())).await;
                }
                b'R' if code() == 12 => scram.finish(&got.body[4..]).unwrap(),
                b'R' => assert_eq!(code(), 0, "another method than SCRAM: {got:?}"),
                b'S' => {
                    let mut texts = got.body.split(|byte| *byte == 0);
                    let mut text = || String::from_utf8_lossy(texts.next().unwrap()).into_owned();
                    self.parameters.insert(text(), text());
                }
                b'K' => self.key = got.body,
                b'Z' => return Ok(()),
                b'N' => {}
                b'v' => self.negotiated = Some(got),
                _ => panic!("unexpected during login: {got:?}"),
            }
        }
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// Sends what may meet a closed connection.
    pub async fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// The next message; `None` when the connection has ended.
    pub async fn read(&mut self) -> Option<Message> {
        let read = async {
            let mut head = [0; 5];
            self.stream.read_exact(&mut head).await.ok()?;
            let length = u32::from_be_bytes(*head.last_chunk().unwrap()) as usize;
            let mut body = vec![0; length.checked_sub(4).expect("a length below 4")];
            self.stream.read_exact(&mut body).await.ok()?;
            Some(Message { tag: head[0], body })
        };
        tokio::time::timeout(PATIENCE, read).await.expect("no message came")
    }

    /// A single byte, such as the answer to SSLRequest.
    pub async fn read_byte(&mut self) -> Option<u8> {
        tokio::time::timeout(PATIENCE, self.stream.read_u8()).await.expect("no byte came").ok()
    }

    /// Everything up to and with ReadyForQuery; or up to the end of the connection.
    pub async fn read_ready(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Some(message) = self.read().await {
            let last = message.tag == b'Z';
            messages.push(message);
            if last {
                break;
            }
        }
        messages
    }

    /// Sends, and reads up to ReadyForQuery.
    pub async fn ask(&mut self, bytes: &[u8]) -> Vec<Message> {
        self.send(bytes).await;
        self.read_ready().await
    }

    /// Sends `bytes` and reads at the same time, as long as `each` wants more: for what is too much for
    /// the buffers on the way.
    pub async fn send_and_read(&mut self, bytes: &[u8], mut each: impl FnMut(Message) -> bool) {
        let (reader, mut writer) = self.stream.split();
        let mut reader = tokio::io::BufReader::with_capacity(64 * 1024, reader);
        let reading = async {
            loop {
                let mut head = [0; 5];
                reader.read_exact(&mut head).await.unwrap();
                let length = u32::from_be_bytes(*head.last_chunk().unwrap()) as usize;
                let mut body = vec![0; length.checked_sub(4).expect("a length below 4")];
                reader.read_exact(&mut body).await.unwrap();
                if !each(Message { tag: head[0], body }) {
                    break;
                }
            }
        };
        let ((), sent) = tokio::join!(reading, writer.write_all(bytes));
        sent.unwrap();
    }

    /// The rest until the connection ends; panics if it stays open.
    pub async fn read_to_end(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Some(message) = self.read().await {
            messages.push(message);
        }
        messages
    }

    /// Whether something has come within `time`.
    pub async fn silent_for(&mut self, time: Duration) -> bool {
        let mut byte = [0];
        tokio::time::timeout(time, self.stream.peek(&mut byte)).await.is_err()
    }

    /// Sends a CancelRequest with this connection's key, and waits until it was taken.
    pub async fn cancel(&self) {
        cancel(self.port, &self.key).await;
    }
}

/// A CancelRequest with `key`, on a connection of its own.
pub async fn cancel(port: u16, key: &[u8]) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
    let length = u32::try_from(key.len() + 8).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], &80_877_102_u32.to_be_bytes(), key].concat()).await.unwrap();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
}
