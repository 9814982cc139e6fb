//! `make bench-levels`: what each level of consistency costs, and how many reads stay on replicas, on a private
//! primary and two replicas. docs/CONSISTENCY.md has the figures.
//!
//! Three tables: the share of SELECTs that replicas served and the latencies, for 16 clients in a closed loop, by
//! level and share of writes; a write right after a read on a replica, by level, pause and kind of replication; samples
//! per second by how many sessions there are. Starts its own servers and its own proxy (the release binary), which
//! work in the cluster's directory, so that the cluster's janitor ends them however this process ends.
//!
//! Does not wait for a quiet machine: it prints the load instead.

use std::error::Error;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use highwater::demo::cluster::{ClusterOptions, Login, PrivateCluster};
use highwater::demo::port::ReservedPort;
use tokio_postgres::{Client, NoTls};

const LEVELS: [&str; 5] = ["eventual", "read_your_writes", "session", "global", "strong"];
const ROWS: i32 = 10_000;

/// What each level of consistency costs.
#[derive(Parser)]
struct Arguments {
    /// Seconds per cell.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Clients of the first table.
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// Shares of writes, in percent.
    #[arg(long, value_delimiter = ',', default_value = "1,5,10,25,50")]
    writes: Vec<u32>,
    /// Idle sessions of the third table.
    #[arg(long, default_value_t = 1000)]
    idle: usize,
    /// Only the tables whose name contains this: offload, after-read, samples.
    #[arg(long, default_value = "")]
    only: String,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    runtime.block_on(async {
        tokio::select! {
            result = run(&arguments) => match result {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&*error),
            },
            _ = tokio::signal::ctrl_c() => ExitCode::from(130),
        }
    })
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("levels: {error}");
    ExitCode::from(1)
}

/// The proxy over the cluster: HIGHWATER_BINARY, or the one built beside this.
struct Proxy {
    port: ReservedPort,
    http: ReservedPort,
    process: Child,
    app: Login,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Proxy {
    async fn start(cluster: &PrivateCluster) -> Result<Proxy, Failure> {
        let (port, http) = (ReservedPort::claim()?, ReservedPort::claim()?);
        let nodes: String = cluster
            .nodes()
            .iter()
            .map(|node| format!("  - {{ name: {}, host: 127.0.0.1, port: {} }}\n", node.name(), node.port()))
            .collect();
        let Login { user, password } = &cluster.roles().control;
        let config = cluster.directory().join("levels.yaml");
        let text = format!(
            "listen: 127.0.0.1:{}\nhttp: 127.0.0.1:{}\nworkers: 2\nmax_clients: 20000\nnodes:\n{nodes}\
             control: {{ user: {user}, password: '{password}', database: postgres }}\n\
             auth: {{ source: query, admins: [ {user} ] }}\nnode_tls: {{ mode: disable }}\n",
            port.number(),
            http.number()
        );
        fs::write(&config, text)?;
        let log = fs::File::create(cluster.directory().join("levels.log"))?;
        let program = std::env::var("HIGHWATER_BINARY");
        let process = Command::new(program.as_deref().unwrap_or(env!("CARGO_BIN_EXE_highwater")))
            .args(["run", "-c"])
            .arg(&config)
            .current_dir(cluster.directory())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let proxy = Proxy { port, http, process, app: cluster.roles().app.clone() };
        let deadline = Instant::now() + Duration::from_secs(30);
        let replicas = cluster.nodes().len() as f64 - 1.0;
        while proxy.figure("highwater_node_role", "role=\"replica\"").unwrap_or(0.0) < replicas {
            if Instant::now() > deadline {
                let log = fs::read_to_string(cluster.directory().join("levels.log")).unwrap_or_default();
                return Err(format!("the proxy does not serve\n{log}").into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(proxy)
    }

    /// The sum of a metric's samples whose labels contain `label`.
    fn figure(&self, name: &str, label: &str) -> Result<f64, Failure> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.http.number()))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let of_it = answer.lines().filter(|line| line.starts_with(name) && line.contains(label));
        Ok(of_it.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum())
    }

    async fn connect(&self, level: &str) -> Result<Client, Failure> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port.number()).dbname("app");
        config.user(&self.app.user).password(&self.app.password);
        config.options(format!("-c highwater.consistency={level}"));
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Seconds of processor time so far.
    fn processor(&self) -> Result<f64, Failure> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        let ticks = |at: usize| fields.get(at).and_then(|n| n.parse::<f64>().ok()).unwrap_or(0.0);
        Ok((ticks(11) + ticks(12)) / 100.0)
    }
}

/// Latencies in microseconds.
#[derive(Default)]
struct Latencies(Vec<u32>);

impl Latencies {
    fn took(&mut self, begun: Instant) {
        self.0.push(u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX));
    }

    fn add(&mut self, other: Latencies) {
        self.0.extend(other.0);
    }

    fn at(&mut self, share: f64) -> u32 {
        self.0.sort_unstable();
        let index = (self.0.len() as f64 * share) as usize;
        self.0.get(index.min(self.0.len().saturating_sub(1))).copied().unwrap_or(0)
    }

    fn shown(&mut self) -> String {
        format!("{} / {}", self.at(0.5), self.at(0.99))
    }
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

async fn run(arguments: &Arguments) -> Result<(), Failure> {
    let options = ClusterOptions {
        settings: vec![("max_connections".into(), "200".into()), ("max_wal_size".into(), "2GB".into())],
        ..ClusterOptions::default()
    };
    let cluster = PrivateCluster::start(&options, &mut |step| eprintln!("{step}")).await?;
    let direct = cluster.primary().connect("app", &cluster.roles().app).await?;
    direct
        .batch_execute(&format!(
            "CREATE TABLE t (id int PRIMARY KEY, v int NOT NULL) WITH (fillfactor = 50);
             INSERT INTO t SELECT i, 0 FROM generate_series(1, {ROWS}) i"
        ))
        .await?;
    cluster.wait_caught_up(0).await?;
    let proxy = Proxy::start(&cluster).await?;
    // Catalog facts, and a backend on each node.
    let client = proxy.connect("session").await?;
    let begun = Instant::now();
    while proxy.figure("highwater_statements_total", "class=\"read\",node=\"b\",reason=\"read\"")? < 1.0
        && begun.elapsed() < Duration::from_secs(20)
    {
        client.query("SELECT v FROM t WHERE id = 1", &[]).await?;
    }
    if "offload".contains(&arguments.only) {
        offload(arguments, &proxy).await?;
    }
    if "after-read".contains(&arguments.only) {
        for standbys in ["", "ANY 1 (*)"] {
            cluster.primary().set("synchronous_standby_names", standbys).await?;
            after_read(arguments, &proxy, if standbys.is_empty() { "async" } else { "synchronous" }).await?;
        }
        cluster.primary().set("synchronous_standby_names", "").await?;
    }
    if "samples".contains(&arguments.only) {
        samples(arguments, &proxy).await?;
    }
    Ok(())
}

async fn offload(arguments: &Arguments, proxy: &Proxy) -> Result<(), Failure> {
    println!(
        "\n{} clients, closed loop, {} s a cell; load {}\n",
        arguments.clients,
        arguments.seconds,
        load()
    );
    println!(
        "| level | writes % | SELECTs on replicas % | SELECT p50 / p99 us | UPDATE p50 / p99 us | statements/s | proxy CPU us/statement |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|");
    for writes in &arguments.writes {
        for level in LEVELS {
            let before = on_replicas(proxy)?;
            let (processor, begun) = (proxy.processor()?, Instant::now());
            let (mut reads, mut updates) = mix(arguments, proxy, level, *writes).await?;
            let seconds = begun.elapsed().as_secs_f64();
            let share = (on_replicas(proxy)? - before) * 100.0 / reads.0.len().max(1) as f64;
            let all = (reads.0.len() + updates.0.len()) as f64;
            let processor = (proxy.processor()? - processor) * 1e6 / all;
            println!(
                "| {level} | {writes} | {share:.1} | {} | {} | {:.0} | {processor:.0} |",
                reads.shown(),
                updates.shown(),
                all / seconds
            );
        }
    }
    Ok(())
}

fn on_replicas(proxy: &Proxy) -> Result<f64, Failure> {
    proxy.figure("highwater_statements_total", "class=\"read\",node=\"b\",reason=\"read\"").and_then(|b| {
        Ok(b + proxy.figure("highwater_statements_total", "class=\"read\",node=\"c\",reason=\"read\"")?)
    })
}

/// Latencies of reads and of writes of `clients` in a closed loop.
async fn mix(
    arguments: &Arguments,
    proxy: &Proxy,
    level: &str,
    writes: u32,
) -> Result<(Latencies, Latencies), Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for _ in 0..arguments.clients {
        let (client, stop) = (proxy.connect(level).await?, stop.clone());
        tasks.push(tokio::spawn(async move {
            let select = client.prepare("SELECT v FROM t WHERE id = $1").await?;
            let update = client.prepare("UPDATE t SET v = v + 1 WHERE id = $1").await?;
            let (mut reads, mut updates) = (Latencies::default(), Latencies::default());
            while !stop.load(Ordering::Relaxed) {
                let id = 1 + i32::from(rand::random::<u16>()) % ROWS;
                let is_write = rand::random::<u32>() % 100 < writes;
                let begun = Instant::now();
                if is_write {
                    client.execute(&update, &[&id]).await?;
                    updates.took(begun);
                } else {
                    client.query_one(&select, &[&id]).await?;
                    reads.took(begun);
                }
            }
            Ok::<_, tokio_postgres::Error>((reads, updates))
        }));
    }
    tokio::time::sleep(Duration::from_secs_f64(arguments.seconds)).await;
    stop.store(true, Ordering::Relaxed);
    let (mut reads, mut updates) = (Latencies::default(), Latencies::default());
    for task in tasks {
        let (its_reads, its_updates) = task.await??;
        reads.add(its_reads);
        updates.add(its_updates);
    }
    Ok((reads, updates))
}

/// One client that reads, mostly on a replica, and then writes.
async fn after_read(arguments: &Arguments, proxy: &Proxy, replication: &str) -> Result<(), Failure> {
    println!("\nA write after a read on a replica, one client, {replication} replication; load {}\n", load());
    println!(
        "| level | pause between statements | on replicas % | SELECT p50 / p99 us | UPDATE p50 / p99 us |"
    );
    println!("|---|---|---:|---:|---:|");
    for pause in [Duration::ZERO, Duration::from_millis(5)] {
        for level in ["eventual", "read_your_writes", "session", "strong"] {
            let client = proxy.connect(level).await?;
            let select = client.prepare("SELECT v FROM t WHERE id = $1").await?;
            let update = client.prepare("UPDATE t SET v = v + 1 WHERE id = $1").await?;
            let before = on_replicas(proxy)?;
            let (mut reads, mut updates) = (Latencies::default(), Latencies::default());
            let begun = Instant::now();
            while begun.elapsed().as_secs_f64() < arguments.seconds {
                let id = 1 + i32::from(rand::random::<u16>()) % ROWS;
                let at = Instant::now();
                client.query_one(&select, &[&id]).await?;
                reads.took(at);
                rest(pause).await;
                let at = Instant::now();
                client.execute(&update, &[&id]).await?;
                updates.took(at);
                rest(pause).await;
            }
            let share = (on_replicas(proxy)? - before) * 100.0 / reads.0.len().max(1) as f64;
            println!("| {level} | {pause:?} | {share:.1} | {} | {} |", reads.shown(), updates.shown());
        }
    }
    Ok(())
}

async fn rest(pause: Duration) {
    if !pause.is_zero() {
        tokio::time::sleep(pause).await;
    }
}

/// Samples per second, by what sessions do.
async fn samples(arguments: &Arguments, proxy: &Proxy) -> Result<(), Failure> {
    println!("\nSamples per second, of all nodes; load {}\n", load());
    println!("| sessions | samples/s | statements/s |");
    println!("|---|---:|---:|");
    let seconds = Duration::from_secs_f64(arguments.seconds.max(2.0));
    let taken = |from: f64, to: f64, time: Duration| (to - from) / time.as_secs_f64();
    let count = || proxy.figure("highwater_samples_total", "");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (from, begun) = (count()?, Instant::now());
    tokio::time::sleep(seconds).await;
    println!("| none at work | {:.1} | 0 |", taken(from, count()?, begun.elapsed()));
    let mut idle = Vec::new();
    for _ in 0..2 {
        let (from, begun) = (count()?, Instant::now());
        let (reads, updates) = mix(arguments, proxy, "session", 10).await?;
        let rate = taken(from, count()?, begun.elapsed());
        let statements = (reads.0.len() + updates.0.len()) as f64 / begun.elapsed().as_secs_f64();
        println!("| {} busy, {} idle | {rate:.1} | {statements:.0} |", arguments.clients, idle.len());
        if idle.is_empty() {
            for _ in 0..arguments.idle {
                idle.push(proxy.connect("session").await?);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            let (from, begun) = (count()?, Instant::now());
            tokio::time::sleep(seconds).await;
            println!("| {} idle | {:.1} | 0 |", idle.len(), taken(from, count()?, begun.elapsed()));
        }
    }
    Ok(())
}
