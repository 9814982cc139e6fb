//! `make bench`: Highwater beside a direct connection, a bare byte relay and PgBouncer, on a private
//! primary and two replicas, in interleaved rounds. docs/PERFORMANCE.md says how to read the result.
//!
//! Promises: starts its own servers and contenders, all of which work in the cluster's directory, so
//! that the cluster's janitor ends them however this process ends; uses nothing that was running
//! before. Medians over rounds, with the lowest and the highest.
//!
//! Does not pin processors or wait for a quiet machine: it prints the load instead.

mod process;
mod relay;
mod wire;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use highwater::demo::cluster::{ClusterOptions, Login, PrivateCluster};
use highwater::demo::port::ReservedPort;
use serde_json::json;

use self::wire::Wire;

/// Compare Highwater with a direct connection, a bare relay and PgBouncer.
#[derive(Parser)]
struct Arguments {
    /// 5 rounds of 10 seconds, 64 clients too: about an hour.
    #[arg(long)]
    long: bool,
    /// Rounds; default 3, with --long 5.
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds per contender, workload and round; default 1, with --long 10.
    #[arg(long)]
    seconds: Option<u32>,
    /// pgbench's scale.
    #[arg(long, default_value_t = 10)]
    scale: u32,
    /// Only workloads whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Where results.md and results.json go.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Be the bare relay: internal.
    #[arg(long, hide = true, num_args = 2, value_names = ["LISTEN", "PRIMARY"])]
    relay: Option<Vec<u16>>,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A workload of pgbench's.
struct Workload {
    name: String,
    clients: u32,
    arguments: Vec<String>,
}

/// What stands between pgbench and the nodes.
struct Contender {
    name: &'static str,
    port: u16,
    /// `None`: direct, no process of its own.
    process: Option<Child>,
    /// Where to go for prepared statements, when it is another: PgBouncer's transaction mode has none
    /// before 1.21.
    prepared: Option<(u16, Child)>,
    _ports: Vec<ReservedPort>,
}

impl Contender {
    /// Port and process for a workload.
    fn for_workload(&self, workload: &str) -> (u16, Option<u32>) {
        match &self.prepared {
            Some((port, process)) if workload.contains("prepared") => (*port, Some(process.id())),
            _ => (self.port, self.process.as_ref().map(Child::id)),
        }
    }
}

/// One run of pgbench.
struct Run {
    tps: f64,
    p50_us: f64,
    p99_us: f64,
    proxy_us: Option<f64>,
    primary_us: f64,
}

/// What the measuring thread needs of the cluster: plain values, so that the cluster itself can be
/// dropped, and all be ended, while it measures.
struct Lab {
    directory: PathBuf,
    pgbench: PathBuf,
    app: Login,
    primary_port: u16,
    primary_pid: u32,
    contenders: Vec<Contender>,
}

/// Values per contender, workload and metric, in the order measured.
type Results = BTreeMap<(String, &'static str, &'static str), Vec<f64>>;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some([listen, primary]) = arguments.relay.as_deref() {
        return match relay::run(*listen, *primary) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        };
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let code = runtime.block_on(async {
        tokio::select! {
            result = play(arguments) => match result {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&*error),
            },
            () = stopped() => ExitCode::from(130),
        }
    });
    // The measuring thread may wait for a pgbench that has just lost its server.
    runtime.shutdown_background();
    code
}

/// Ctrl-C or SIGTERM.
async fn stopped() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => {
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        }
        // Then the signal itself ends the process, and the janitor the rest.
        _ => std::future::pending().await,
    }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("side_by_side: {error}");
    ExitCode::from(1)
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn play(arguments: Arguments) -> Result<(), Failure> {
    let options = ClusterOptions {
        settings: vec![
            ("max_connections".into(), "400".into()),
            ("shared_buffers".into(), "256MB".into()),
            ("max_wal_size".into(), "2GB".into()),
        ],
        ..ClusterOptions::default()
    };
    let cluster = PrivateCluster::start(&options, &mut |step| eprintln!("{step}")).await?;
    let primary = cluster.primary();
    let mut lab = Lab {
        directory: cluster.directory().to_owned(),
        pgbench: cluster.program("pgbench"),
        app: cluster.roles().app.clone(),
        primary_port: primary.port(),
        primary_pid: primary.pid().ok_or("the primary has no process")?,
        contenders: Vec::new(),
    };
    let fill = ["-i", "-q", "-s", &arguments.scale.to_string()].map(str::to_owned);
    lab.pgbench(lab.primary_port, &fill)?;
    lab.sql(lab.primary_port, "CREATE UNLOGGED TABLE sink (line text)")?;
    cluster.wait_caught_up(0).await?;

    let ports: Vec<u16> = cluster.nodes().iter().map(|node| node.port()).collect();
    lab.start_contenders(&ports, &cluster.roles().control)?;
    // The measuring blocks; here signals are waited for, and the cluster is dropped at the first.
    tokio::task::spawn_blocking(move || measure(&arguments, lab)).await??;
    Ok(())
}

impl Lab {
    /// A command that works in the cluster's directory as its owner, so that the janitor ends it.
    fn command(&self, program: &Path) -> io::Result<Command> {
        let owner = fs::metadata(&self.directory)?;
        let mut command = Command::new(program);
        command.current_dir(&self.directory).stdin(Stdio::null()).process_group(0);
        if nix::unistd::Uid::effective().is_root() {
            command.uid(owner.uid()).gid(owner.gid());
        }
        Ok(command)
    }

    /// Gives a file to the servers' user.
    fn give(&self, path: &Path, mode: u32) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        let owner = fs::metadata(&self.directory)?;
        if nix::unistd::Uid::effective().is_root() {
            chown(path, Some(owner.uid()), Some(owner.gid()))?;
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> io::Result<PathBuf> {
        let path = self.directory.join(name);
        fs::write(&path, text)?;
        self.give(&path, 0o600)?;
        Ok(path)
    }

    /// A copy of a program where the servers' user can run it, whatever the rights of target/ are.
    fn copy_program(&self, from: &Path, name: &str) -> io::Result<PathBuf> {
        let path = self.directory.join(name);
        fs::copy(from, &path)?;
        self.give(&path, 0o700)?;
        Ok(path)
    }

    fn start(&self, name: &str, command: &mut Command, port: u16) -> Result<Child, Failure> {
        let log = self.directory.join(format!("{name}.log"));
        let file = fs::File::create(&log)?;
        let mut child = command.stdout(file.try_clone()?).stderr(file).spawn()?;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let tried = Wire::connect(port, &self.app).and_then(|mut wire| wire.query("SELECT 1"));
            match tried {
                Ok(_) => return Ok(child),
                Err(error) => {
                    if Instant::now() > deadline || child.try_wait()?.is_some() {
                        let log = fs::read_to_string(&log).unwrap_or_default();
                        return Err(format!("{name} does not serve: {error}\n{log}").into());
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    fn start_contenders(&mut self, nodes: &[u16], control: &Login) -> Result<(), Failure> {
        let primary = self.primary_port;
        self.contenders.push(Contender {
            name: "direct",
            port: primary,
            process: None,
            prepared: None,
            _ports: Vec::new(),
        });

        let port = ReservedPort::claim()?;
        let program = self.copy_program(&std::env::current_exe()?, "relay")?;
        let mut command = self.command(&program)?;
        command.arg("--relay").arg(port.number().to_string()).arg(primary.to_string());
        let process = self.start("relay", &mut command, port.number())?;
        self.contenders.push(Contender {
            name: "relay",
            port: port.number(),
            process: Some(process),
            prepared: None,
            _ports: vec![port],
        });

        match find_program("pgbouncer") {
            None => eprintln!("PgBouncer is not installed (package pgbouncer): left out"),
            Some(program) => {
                let (port, session) = (ReservedPort::claim()?, ReservedPort::claim()?);
                let process = self.start_pgbouncer(&program, "transaction", port.number())?;
                let prepared = self.start_pgbouncer(&program, "session", session.number())?;
                self.contenders.push(Contender {
                    name: "pgbouncer",
                    port: port.number(),
                    process: Some(process),
                    prepared: Some((session.number(), prepared)),
                    _ports: vec![port, session],
                });
            }
        }

        let program = self.copy_program(Path::new(env!("CARGO_BIN_EXE_highwater")), "highwater")?;
        for (name, split) in [("highwater", true), ("highwater-nosplit", false)] {
            let port = ReservedPort::claim()?;
            let config =
                self.write(&format!("{name}.yaml"), &highwater(port.number(), nodes, control, split))?;
            let mut command = self.command(&program)?;
            command.arg("run").arg("-c").arg(config);
            let process = self.start(name, &mut command, port.number())?;
            self.contenders.push(Contender {
                name,
                port: port.number(),
                process: Some(process),
                prepared: None,
                _ports: vec![port],
            });
        }
        Ok(())
    }

    fn start_pgbouncer(&self, program: &Path, mode: &str, port: u16) -> Result<Child, Failure> {
        let users = format!("\"{}\" \"{}\"\n", self.app.user, self.app.password);
        let users = self.write("pgbouncer.users", &users)?;
        // 1000 idle clients in the memory test; in session mode each of 64 clients holds a backend.
        let text = format!(
            "[databases]\napp = host=127.0.0.1 port={} dbname=app\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = scram-sha-256\nauth_file = {}\n\
             pool_mode = {mode}\ndefault_pool_size = {}\nmax_client_conn = 3000\nlog_connections = 0\n\
             log_disconnections = 0\n",
            self.primary_port,
            users.display(),
            if mode == "session" { 80 } else { 20 },
        );
        let name = format!("pgbouncer-{mode}");
        let config = self.write(&format!("{name}.ini"), &text)?;
        self.start(&name, self.command(program)?.arg(config), port)
    }

    fn sql(&self, port: u16, sql: &str) -> io::Result<u64> {
        Wire::connect(port, &self.app)?.query(sql)
    }

    /// Runs pgbench to its end and returns what it printed.
    fn pgbench(&self, port: u16, arguments: &[String]) -> Result<String, Failure> {
        let mut command = self.command(&self.pgbench)?;
        command.env("PGPASSWORD", &self.app.password).env("PGSSLMODE", "disable");
        command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", &self.app.user]);
        let output = command.args(arguments).arg("app").output()?;
        let (said, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        match output.status.success() {
            true => Ok(said.into_owned()),
            false => Err(format!("pgbench: {}", errors.lines().next().unwrap_or("no word")).into()),
        }
    }

    fn run(&self, contender: &Contender, workload: &Workload, seconds: u32) -> Result<Run, Failure> {
        let (port, pid) = contender.for_workload(&workload.name);
        let mut arguments = workload.arguments.clone();
        arguments.extend(
            ["-n", "-T", &seconds.to_string(), "-c", &workload.clients.to_string()].map(str::to_owned),
        );
        // A tenth of the latencies is plenty, and pgbench's own work stays small.
        arguments.extend(["-l", "--log-prefix=latency", "--sampling-rate=0.1"].map(str::to_owned));
        let spent = |pid: Option<u32>| pid.map(process::cpu_us).transpose();
        let (before, primary_before) = (spent(pid)?, process::server_cpu_us(self.primary_pid)?);
        let said = self.pgbench(port, &arguments)?;
        let (after, primary_after) = (spent(pid)?, process::server_cpu_us(self.primary_pid)?);
        let done =
            number_after(&said, "actually processed: ").ok_or("no count in pgbench's report")?.max(1.0);
        let mut latencies = self.take_latencies()?;
        latencies.sort_by(f64::total_cmp);
        Ok(Run {
            tps: number_after(&said, "tps = ").ok_or("no tps in pgbench's report")?,
            p50_us: quantile(&latencies, 0.5),
            p99_us: quantile(&latencies, 0.99),
            proxy_us: after.zip(before).map(|(after, before)| (after - before) / done),
            primary_us: (primary_after - primary_before) / done,
        })
    }

    /// Reads and removes pgbench's logs: the third field of a line is a latency.
    fn take_latencies(&self) -> io::Result<Vec<f64>> {
        let mut latencies = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with("latency.") {
                let text = fs::read_to_string(entry.path())?;
                let third = |line: &str| line.split(' ').nth(2)?.parse::<f64>().ok();
                latencies.extend(text.lines().filter_map(third));
                fs::remove_file(entry.path())?;
            }
        }
        Ok(latencies)
    }
}

/// Highwater's configuration: the defaults but for the room for 1000 idle clients.
fn highwater(port: u16, nodes: &[u16], control: &Login, split: bool) -> String {
    let mut text = format!("listen: 127.0.0.1:{port}\nhttp: null\nmax_clients: 3000\nnodes:\n");
    for (name, port) in ["a", "b", "c"].iter().zip(nodes) {
        let _ = writeln!(text, "  - {{ name: {name}, host: 127.0.0.1, port: {port} }}");
    }
    let _ = write!(
        text,
        "control:\n  user: {}\n  password: \"{}\"\n  database: postgres\nnode_tls:\n  mode: disable\n\
         routing:\n  split: {split}\nlog:\n  level: warn\n",
        control.user, control.password,
    );
    text
}

fn find_program(name: &str) -> Option<PathBuf> {
    // Not every user's PATH has sbin, where Debian puts PgBouncer.
    let path = std::env::var("PATH").unwrap_or_default();
    let places = path.split(':').chain(["/usr/sbin", "/usr/local/sbin"]);
    places.map(|place| Path::new(place).join(name)).find(|program| program.is_file())
}

fn number_after(text: &str, mark: &str) -> Option<f64> {
    let (_, rest) = text.split_once(mark)?;
    rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?.parse().ok()
}

/// Of sorted values; 0 of none.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * part).round() as usize).copied().unwrap_or(0.0)
}

fn workloads(lab: &Lab, long: bool) -> io::Result<Vec<Workload>> {
    let scale_free = "\\set aid random(1, 100000 * :scale)\n";
    let read = format!("{scale_free}SELECT abalance FROM pgbench_accounts WHERE aid = :aid;\n");
    let write =
        format!("{scale_free}UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = :aid;\n");
    lab.write("read.sql", &read)?;
    lab.write("write.sql", &write)?;
    let mut list = Vec::new();
    let mut add = |name: &str, clients: u32, arguments: &[&str]| {
        list.push(Workload {
            name: format!("{name} x{clients}"),
            clients,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        });
    };
    let counts: &[u32] = if long { &[1, 16, 64] } else { &[1, 16] };
    for mode in ["simple", "extended", "prepared"] {
        for &clients in counts {
            add(&format!("select {mode}"), clients, &["-S", "-M", mode]);
        }
    }
    let mix = ["-M", "extended", "-f", "read.sql@9", "-f", "write.sql@1"];
    add("90/10 autocommit extended", 16, &mix);
    add("tpcb-like simple", 16, &[]);
    add("connect per transaction", 16, &["-S", "-C"]);
    Ok(list)
}

fn measure(arguments: &Arguments, lab: Lab) -> Result<(), Failure> {
    let rounds = arguments.rounds.unwrap_or(if arguments.long { 5 } else { 3 }).max(1);
    let seconds = arguments.seconds.unwrap_or(if arguments.long { 10 } else { 1 }).max(1);
    let mut results = Results::new();
    let mut failures = Vec::new();
    let mut loads = vec![load()];
    let workloads = workloads(&lab, arguments.long)?;
    let wanted = |name: &str| arguments.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    for round in 0..rounds {
        for workload in workloads.iter().filter(|workload| wanted(&workload.name)) {
            eprintln!("round {}/{rounds}: {}", round + 1, workload.name);
            // Each round starts with another one, so that nobody always follows the same neighbour.
            for turn in 0..lab.contenders.len() {
                let contender = &lab.contenders[(turn + round) % lab.contenders.len()];
                match lab.run(contender, workload, seconds) {
                    Ok(run) => note(&mut results, &workload.name, contender.name, &run),
                    Err(error) => failures.push(format!("{}, {}: {error}", contender.name, workload.name)),
                }
            }
        }
        bulk(&lab, arguments.long, &wanted, &mut results, &mut failures);
        loads.push(load());
    }
    system_calls(&lab, &wanted, &mut results, &mut failures);
    idle_memory(&lab, &wanted, &mut results, &mut failures);
    let about = About::collect(rounds, seconds, arguments.scale, &loads);
    let names: Vec<&'static str> = lab.contenders.iter().map(|contender| contender.name).collect();
    let table = markdown(&about, &results, &names, &failures);
    fs::create_dir_all(&arguments.out)?;
    fs::write(arguments.out.join("results.md"), &table)?;
    let json = serde_json::to_string_pretty(&json_of(&about, &results, &failures))?;
    fs::write(arguments.out.join("results.json"), json)?;
    println!("{table}");
    Ok(())
}

fn note(results: &mut Results, workload: &str, contender: &'static str, run: &Run) {
    let mut add = |metric: &'static str, value: f64| {
        results.entry((workload.to_owned(), contender, metric)).or_default().push(value);
    };
    add("tps", run.tps);
    add("p50 us", run.p50_us);
    add("p99 us", run.p99_us);
    add("primary CPU us/tx", run.primary_us);
    if let Some(us) = run.proxy_us {
        add("proxy CPU us/tx", us);
    }
}

/// A large result and COPY in: MiB a second, and the proxy's milliseconds of processor time per MiB.
fn bulk(
    lab: &Lab,
    long: bool,
    wanted: &dyn Fn(&str) -> bool,
    results: &mut Results,
    failures: &mut Vec<String>,
) {
    let megabytes: u64 = if long { 512 } else { 64 };
    let rows = megabytes * 1024;
    let select = format!("SELECT repeat('x', 1011) FROM generate_series(1, {rows})");
    let line = format!("{}\n", "y".repeat(1023));
    for name in ["large result", "COPY in"] {
        if !wanted(name) {
            continue;
        }
        for contender in &lab.contenders {
            let mut once = || -> io::Result<()> {
                if name == "COPY in" {
                    lab.sql(lab.primary_port, "TRUNCATE sink")?;
                }
                let mut wire = Wire::connect(contender.port, &lab.app)?;
                let pid = contender.process.as_ref().map(Child::id);
                let spent = || pid.map(process::cpu_us).transpose();
                let (before, start) = (spent()?, Instant::now());
                let bytes = match name {
                    "COPY in" => wire.copy_in("COPY sink FROM STDIN", &line, megabytes)?,
                    _ => wire.query(&select)?,
                };
                let (after, took) = (spent()?, start.elapsed());
                let size = bytes as f64 / f64::from(1 << 20);
                let mut add = |metric: &'static str, value: f64| {
                    results.entry((name.to_owned(), contender.name, metric)).or_default().push(value);
                };
                add("MiB/s", size / took.as_secs_f64());
                if let Some((after, before)) = after.zip(before) {
                    add("proxy CPU ms/MiB", (after - before) / 1000.0 / size);
                }
                Ok(())
            };
            if let Err(error) = once() {
                failures.push(format!("{}, {name}: {error}", contender.name));
            }
        }
    }
}

/// Statements counted under strace: enough that logging in does not show.
const TRACED: u32 = 2000;

fn system_calls(lab: &Lab, wanted: &dyn Fn(&str) -> bool, results: &mut Results, failures: &mut Vec<String>) {
    if !wanted("system calls") {
        return;
    }
    if find_program("strace").is_none() {
        failures.push("strace is not installed: no system calls counted".to_owned());
        return;
    }
    for (mode, metric) in [("simple", "simple"), ("extended", "extended"), ("prepared", "prepared")] {
        eprintln!("system calls: {mode}");
        for contender in &lab.contenders {
            let (port, Some(pid)) = contender.for_workload(mode) else { continue };
            let work = || {
                let arguments = ["-n", "-S", "-M", mode, "-c", "1", "-t", &TRACED.to_string()];
                lab.pgbench(port, &arguments.map(str::to_owned)).map(drop).map_err(io::Error::other)
            };
            match process::system_calls(pid, &lab.directory.join("strace.txt"), work) {
                Ok(calls) => results
                    .entry(("system calls per statement, 1 client".to_owned(), contender.name, metric))
                    .or_default()
                    .push(calls / f64::from(TRACED)),
                Err(error) => failures.push(format!("{}, system calls {mode}: {error}", contender.name)),
            }
        }
    }
}

/// Clients of the memory measurement.
const IDLE: usize = 1000;

fn idle_memory(lab: &Lab, wanted: &dyn Fn(&str) -> bool, results: &mut Results, failures: &mut Vec<String>) {
    // Direct and through the relay a thousand clients are a thousand backends: nothing to compare.
    for contender in lab.contenders.iter().filter(|_| wanted("idle memory")) {
        let Some(pid) = contender.process.as_ref().map(Child::id) else { continue };
        if contender.name == "relay" {
            continue;
        }
        eprintln!("idle memory: {}", contender.name);
        let hold = || -> io::Result<f64> {
            let before = process::resident_kib(pid)?;
            let clients: Vec<Wire> =
                (0..IDLE).map(|_| Wire::connect(contender.port, &lab.app)).collect::<io::Result<_>>()?;
            let after = process::resident_kib(pid)?;
            drop(clients);
            Ok(after - before)
        };
        match hold() {
            Ok(kib) => results
                .entry(("1000 idle clients".to_owned(), contender.name, "KiB each"))
                .or_default()
                .push(kib / IDLE as f64),
            Err(error) => failures.push(format!("{}, idle memory: {error}", contender.name)),
        }
    }
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

/// What a reader must know to believe the figures.
struct About {
    unix_time: u64,
    date: String,
    machine: String,
    commit: String,
    versions: String,
    how: String,
    load: String,
}

impl About {
    fn collect(rounds: usize, seconds: u32, scale: u32, loads: &[String]) -> About {
        let output = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
            output.map_or("unknown".to_owned(), |output| {
                String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("unknown").to_owned()
            })
        };
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        let bouncer = find_program("pgbouncer").unwrap_or_else(|| "pgbouncer".into());
        About {
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            date: output("date", &["-u", "+%F %H:%M UTC"]),
            machine: format!("{cores} cores, {}", model.map_or("unknown", |(_, name)| name)),
            commit: output("git", &["describe", "--always", "--dirty"]),
            versions: format!(
                "{}; {}",
                output("pgbench", &["--version"]),
                output(&bouncer.to_string_lossy(), &["--version"])
            ),
            how: format!("{rounds} rounds of {seconds} s, scale {scale}"),
            load: loads.join(", "),
        }
    }
}

/// Median, lowest, highest.
fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (quantile(&sorted, 0.5), quantile(&sorted, 0.0), quantile(&sorted, 1.0))
}

fn markdown(about: &About, results: &Results, contenders: &[&'static str], failures: &[String]) -> String {
    let mut text = format!(
        "Date: {}. Machine: {}. Commit: {}. {}.\n{}. Load average before and after each round: {}.\n\n\
         Median (lowest-highest).\n",
        about.date, about.machine, about.commit, about.versions, about.how, about.load
    );
    let mut rows: BTreeMap<&str, Vec<&'static str>> = BTreeMap::new();
    for (workload, _, metric) in results.keys() {
        let metrics = rows.entry(workload).or_default();
        if !metrics.contains(metric) {
            metrics.push(metric);
        }
    }
    let _ = writeln!(text, "\n| workload | metric | {} |", contenders.join(" | "));
    let _ = writeln!(text, "|---|---|{}", "---:|".repeat(contenders.len()));
    for (workload, metrics) in &rows {
        for metric in metrics {
            let _ = write!(text, "| {workload} | {metric} |");
            for contender in contenders {
                match results.get(&((*workload).to_owned(), *contender, *metric)) {
                    Some(values) => {
                        let (median, low, high) = spread(values);
                        let digits = if median >= 100.0 { 0 } else { 2 };
                        let _ = write!(text, " {median:.digits$} ({low:.digits$}-{high:.digits$}) |");
                    }
                    None => text.push_str(" - |"),
                }
            }
            text.push('\n');
        }
    }
    if !failures.is_empty() {
        text.push_str("\nFailed:\n\n");
        for failure in failures {
            let _ = writeln!(text, "- {failure}");
        }
    }
    text
}

fn json_of(about: &About, results: &Results, failures: &[String]) -> serde_json::Value {
    let rows: Vec<_> = results
        .iter()
        .map(|((workload, contender, metric), values)| {
            let (median, low, high) = spread(values);
            json!({
                "workload": workload, "contender": contender, "metric": metric,
                "median": median, "lowest": low, "highest": high, "rounds": values,
            })
        })
        .collect();
    json!({
        "unix_time": about.unix_time, "date": about.date, "machine": about.machine, "commit": about.commit,
        "versions": about.versions, "how": about.how, "load": about.load,
        "results": rows, "failures": failures,
    })
}
