//! `make bench`: Highwater beside a direct connection, a bare byte relay and PgBouncer, on a private
//! primary and two replicas, in interleaved rounds; and the curves of `growth`, on a cluster of their own.
//! docs/PERFORMANCE.md says how to read the result.
//!
//! Promises: starts its own servers and contenders, all of which work in the cluster's directory, so
//! that the cluster's janitor ends them however this process ends; uses nothing that was running
//! before, and no fixed port. Medians over rounds, with the lowest and the highest. What could not be measured is named
//! at the end, and then the exit code is 1; what was is written after each round.
//!
//! Does not pin processors or wait for a quiet machine: it prints the load instead.

mod growth;
mod lab;
mod process;
mod relay;
mod report;
mod wire;

use std::io;
use std::path::PathBuf;
use std::process::{Child, ExitCode};
use std::time::{Duration, Instant};

use clap::Parser;
use highwater::demo::cluster::{ClusterOptions, PrivateCluster};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use self::lab::{Contender, Failure, Lab, Run, Workload, find_program};
use self::process::Counter;
use self::report::{About, Findings};
use self::wire::Wire;

/// Compare Highwater with a direct connection, a bare relay and PgBouncer.
#[derive(Parser)]
struct Arguments {
    /// 5 rounds of 10 seconds, 64 clients too: about an hour.
    #[arg(long)]
    long: bool,
    /// All of it, the curves and 64 clients too, in about so many minutes: 5 rounds, as long as fit (20 or more).
    #[arg(long, conflicts_with = "long", value_parser = clap::value_parser!(u64).range(1..=600))]
    minutes: Option<u64>,
    /// Rounds; default 3, with --long and --minutes 5.
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds per contender, workload and round; default 1, with --long 10, with --minutes what fits.
    #[arg(long)]
    seconds: Option<u32>,
    /// pgbench's scale.
    #[arg(long, default_value_t = 10)]
    scale: u32,
    /// Only workloads whose name contains this; `growth`: only the curves.
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

impl Arguments {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only.as_str()))
    }

    /// The curves are not part of the quick run.
    fn wants_growth(&self) -> bool {
        self.wants("growth") && (self.only.is_some() || self.long || self.minutes.is_some())
    }

    /// 64 clients, and 10 000 idle ones.
    fn is_whole(&self) -> bool {
        self.long || self.minutes.is_some()
    }

    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.is_whole() { 5 } else { 3 }).max(1)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some([listen, primary]) = arguments.relay.as_deref() {
        return match relay::run(*listen, *primary) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error),
        };
    }
    // 10 000 clients here, and as many in the contenders, which inherit it.
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let code = runtime.block_on(async {
        tokio::select! {
            result = play(arguments) => match result {
                Ok(0) => ExitCode::SUCCESS,
                Ok(failed) => fail(&format!("{failed} measurements failed; the report names them")),
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

/// How many measurements failed.
async fn play(arguments: Arguments) -> Result<usize, Failure> {
    let end = arguments.minutes.map(|minutes| Instant::now() + Duration::from_secs(60 * minutes));
    let mut findings = Findings::default();
    let pgbouncer = find_program("pgbouncer").unwrap_or_else(|| "pgbouncer".into());
    let mut about = About::collect(&pgbouncer);
    if arguments.wants_growth() {
        let cluster = start(growth::REPLICAS, 1).await?;
        let ports: Vec<u16> = cluster.nodes().iter().map(|node| node.port()).collect();
        let lab = Lab::of(&cluster)?;
        let rounds = arguments.rounds();
        // The whole is short for the curves, where the processor's time is all that counts.
        let seconds = if arguments.long { 5 } else { arguments.seconds.unwrap_or(1).max(1) };
        // The measuring blocks; here signals are waited for, and the cluster is dropped at the first.
        (findings.curves, findings.failures) = tokio::task::spawn_blocking(move || {
            let mut failures = Vec::new();
            let curves = growth::measure(&lab, &ports, rounds, seconds, &mut failures);
            (curves, failures)
        })
        .await?;
        about.how = format!("Growth: {rounds} rounds of {seconds} s, scale 1, {} replicas", growth::REPLICAS);
        about.loads.push(report::load());
        let table = report::write(&arguments.out, &about, &findings, &[])?;
        if arguments.only.as_deref() == Some("growth") {
            println!("{table}");
            return Ok(findings.failures.len());
        }
    }
    let cluster = start(2, arguments.scale).await?;
    let mut lab = Lab::of(&cluster)?;
    let ports: Vec<u16> = cluster.nodes().iter().map(|node| node.port()).collect();
    lab.start_contenders(&ports)?;
    tokio::task::spawn_blocking(move || measure(&arguments, lab, end, about, findings)).await?
}

/// A primary with pgbench's tables, and replicas that have them, too.
async fn start(replicas: usize, scale: u32) -> Result<PrivateCluster, Failure> {
    let options = ClusterOptions {
        replicas,
        settings: vec![
            ("max_connections".into(), "400".into()),
            ("shared_buffers".into(), "256MB".into()),
            ("max_wal_size".into(), "2GB".into()),
            ("max_wal_senders".into(), "16".into()),
        ],
        ..ClusterOptions::default()
    };
    let cluster = PrivateCluster::start(&options, &mut |step| eprintln!("{step}")).await?;
    Lab::of(&cluster)?.fill(scale)?;
    cluster.wait_caught_up(0).await?;
    Ok(cluster)
}

fn workloads(lab: &Lab, whole: bool) -> io::Result<Vec<Workload>> {
    let aid = "\\set aid random(1, 100000 * :scale)\n";
    let read = format!("{aid}SELECT abalance FROM pgbench_accounts WHERE aid = :aid;\n");
    let write = format!("{aid}UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = :aid;\n");
    // Three literals, of which no two statements have the same.
    let literals = format!(
        "{aid}\\set a random(1, 2000000000)\n\\set b random(1, 2000000000)\n\
         SELECT abalance, :a AS a FROM pgbench_accounts WHERE aid = :aid AND abalance < :b + 2000000000.0;\n"
    );
    lab.write("read.sql", &read)?;
    lab.write("write.sql", &write)?;
    lab.write("literals.sql", &literals)?;
    let mut list = Vec::new();
    let mut add = |name: &str, clients: u32, arguments: &[&str]| {
        list.push(Workload {
            name: format!("{name} x{clients}"),
            clients,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        });
    };
    let counts: &[u32] = if whole { &[1, 16, 64] } else { &[1, 16] };
    for mode in ["simple", "extended", "prepared"] {
        for &clients in counts {
            add(&format!("select {mode}"), clients, &["-S", "-M", mode]);
        }
    }
    add("select simple, all literals different", 16, &["-f", "literals.sql"]);
    let mix = ["-M", "extended", "-f", "read.sql@9", "-f", "write.sql@1"];
    add("90/10 autocommit extended", 16, &mix);
    add("tpcb-like simple", 16, &[]);
    add("connect per transaction", 16, &["-S", "-C"]);
    Ok(list)
}

/// What a run of pgbench costs beyond its seconds: logging in, reading its logs.
const PER_RUN: f64 = 0.5;

/// Seconds a run may take so that all rounds fit until `end`.
fn fitting(end: Instant, rounds: usize, runs: usize, bulk: bool) -> u32 {
    let left = end.saturating_duration_since(Instant::now()).as_secs_f64();
    let of_a_round = left / rounds as f64 - if bulk { 10.0 } else { 0.0 };
    // From 1 to 10: `as` cuts off.
    (of_a_round / runs.max(1) as f64 - PER_RUN).clamp(1.0, 10.0) as u32
}

fn measure(
    arguments: &Arguments,
    lab: Lab,
    end: Option<Instant>,
    mut about: About,
    mut findings: Findings,
) -> Result<usize, Failure> {
    let names: Vec<&'static str> = lab.contenders.iter().map(|contender| contender.name).collect();
    // While the contenders are new: one that has been busy has memory to give away.
    idle_memory(&lab, arguments, &mut findings);
    system_calls(&lab, arguments, &mut findings);
    let mut workloads = workloads(&lab, arguments.is_whole())?;
    workloads.retain(|workload| arguments.wants(&workload.name));
    let (rounds, runs) = (arguments.rounds(), workloads.len() * lab.contenders.len());
    let bulk_too = BULK.iter().any(|name| arguments.wants(name));
    let seconds = match (arguments.seconds, end) {
        (Some(seconds), _) => seconds.max(1),
        (None, Some(end)) => fitting(end, rounds, runs, bulk_too),
        (None, None) => {
            if arguments.long {
                10
            } else {
                1
            }
        }
    };
    let before = std::mem::take(&mut about.how);
    let mut table = String::new();
    for round in 0..rounds {
        let began = Instant::now();
        for workload in &workloads {
            eprintln!("round {}/{rounds} of {seconds} s: {}", round + 1, workload.name);
            for contender in in_turn(&lab, round) {
                match lab.run(contender, workload, seconds) {
                    Ok(run) => note(&mut findings, &workload.name, contender.name, &run),
                    Err(error) => {
                        findings.failures.push(format!("{}, {}: {error}", contender.name, workload.name));
                    }
                }
            }
        }
        bulk(&lab, arguments, round, &mut findings);
        about.loads.push(report::load());
        about.how = format!("{} rounds of {seconds} s, scale {}", round + 1, arguments.scale);
        if !before.is_empty() {
            about.how = format!("{}. {before}", about.how);
        }
        table = report::write(&arguments.out, &about, &findings, &names)?;
        if end.is_some_and(|end| Instant::now() + began.elapsed().mul_f64(0.5) > end) {
            eprintln!("the time is over after {} rounds", round + 1);
            break;
        }
    }
    println!("{table}");
    Ok(findings.failures.len())
}

/// Each round starts with another one, so that nobody always follows the same neighbour.
fn in_turn(lab: &Lab, round: usize) -> impl Iterator<Item = &Contender> {
    let all = lab.contenders.iter();
    all.cycle().skip(round % lab.contenders.len().max(1)).take(lab.contenders.len())
}

fn note(findings: &mut Findings, workload: &str, contender: &'static str, run: &Run) {
    let mut add = |metric, value| findings.add(workload, contender, metric, value);
    add("tps", run.tps);
    add("p50 us", run.p50_us);
    add("p99 us", run.p99_us);
    add("primary CPU us/tx", run.primary_us);
    if let Some(us) = run.proxy_us {
        add("proxy CPU us/tx", us);
    }
}

const BULK: [&str; 2] = ["large result", "COPY in"];

/// A large result and COPY in: MiB a second, and the proxy's milliseconds of processor time per MiB.
fn bulk(lab: &Lab, arguments: &Arguments, round: usize, findings: &mut Findings) {
    let megabytes: u64 = if arguments.long { 512 } else { 64 };
    for name in BULK.into_iter().filter(|name| arguments.wants(name)) {
        for contender in in_turn(lab, round) {
            match bulk_once(lab, contender, name, megabytes) {
                Ok((rate, cost)) => {
                    findings.add(name, contender.name, "MiB/s", rate);
                    if let Some(cost) = cost {
                        findings.add(name, contender.name, "proxy CPU ms/MiB", cost);
                    }
                }
                Err(error) => findings.failures.push(format!("{}, {name}: {error}", contender.name)),
            }
        }
    }
}

fn bulk_once(lab: &Lab, contender: &Contender, name: &str, megabytes: u64) -> io::Result<(f64, Option<f64>)> {
    let rows = megabytes * 1024;
    if name == "COPY in" {
        lab.sql(lab.primary_port, "TRUNCATE sink")?;
    }
    let mut wire = Wire::connect(contender.port, &lab.app)?;
    let pid = contender.process.as_ref().map(Child::id);
    let spent = || pid.map(process::cpu_us).transpose();
    let (before, start) = (spent()?, Instant::now());
    let bytes = match name {
        "COPY in" => {
            let line = format!("{}\n", "y".repeat(1023));
            wire.copy_in("COPY sink FROM STDIN", &line, megabytes)?
        }
        _ => wire.query(&format!("SELECT repeat('x', 1011) FROM generate_series(1, {rows})"))?,
    };
    let (after, took) = (spent()?, start.elapsed());
    let size = bytes as f64 / f64::from(1 << 20);
    let cost = after.zip(before).map(|(after, before)| (after - before) / 1000.0 / size);
    Ok((size / took.as_secs_f64(), cost))
}

/// Statements whose system calls are counted: enough that logging in does not show.
const TRACED: u32 = 2000;

fn system_calls(lab: &Lab, arguments: &Arguments, findings: &mut Findings) {
    if !arguments.wants("system calls") {
        return;
    }
    let Some(counter) = Counter::find() else {
        let failure = "neither perf nor strace works here: no system calls counted";
        findings.failures.push(failure.to_owned());
        return;
    };
    for mode in ["simple", "extended", "prepared"] {
        eprintln!("system calls ({counter:?}): {mode}");
        for contender in &lab.contenders {
            let (port, Some(pid)) = contender.for_workload(mode) else { continue };
            let work = || {
                let arguments = ["-n", "-S", "-M", mode, "-c", "1", "-t", &TRACED.to_string()];
                lab.pgbench(port, &arguments.map(str::to_owned), 120).map(drop).map_err(io::Error::other)
            };
            match counter.count(pid, &lab.directory.join("calls.txt"), work) {
                Ok(calls) => {
                    let each = calls / f64::from(TRACED);
                    findings.add("system calls per statement, 1 client", contender.name, mode, each);
                }
                Err(error) => {
                    findings.failures.push(format!("{}, system calls {mode}: {error}", contender.name));
                }
            }
        }
    }
}

/// Clients of the memory measurement: at first, and in the end where the whole is measured.
const IDLE: (usize, usize) = (1_000, 10_000);

fn idle_memory(lab: &Lab, arguments: &Arguments, findings: &mut Findings) {
    if !arguments.wants("idle clients") && !arguments.wants("idle memory") {
        return;
    }
    for contender in &lab.contenders {
        // Direct and through the relay a thousand clients are a thousand backends: nothing to compare.
        let Some(pid) = contender.process.as_ref().map(Child::id).filter(|_| contender.name != "relay")
        else {
            continue;
        };
        eprintln!("idle memory: {}", contender.name);
        // One proxy with ten thousand tells what there is to tell of both.
        let many = arguments.is_whole() && contender.name != "highwater-nosplit";
        let mut add = |metric, kib, clients| {
            findings.add("idle clients", contender.name, metric, kib / clients as f64);
        };
        let mut hold = || -> io::Result<()> {
            // The first client pays for what all have in common.
            lab.idle_clients(contender.port, 1, true)?;
            let before = process::resident_kib(pid)?;
            let (few, all) = IDLE;
            let worked = lab.idle_clients(contender.port, few, true)?;
            let after = process::resident_kib(pid)?;
            add("1000, have run a statement: KiB each", after - before, few);
            let silent = lab.idle_clients(contender.port, few, false)?;
            let of_silent = process::resident_kib(pid)? - after;
            add("1000, sent nothing: KiB each", of_silent, few);
            if many {
                let _rest = lab.idle_clients(contender.port, all - few, true)?;
                let grown = process::resident_kib(pid)? - before - of_silent;
                add("10000, have run a statement: KiB each", grown, all);
            }
            drop((worked, silent));
            Ok(())
        };
        if let Err(error) = hold() {
            findings.failures.push(format!("{}, idle memory: {error}", contender.name));
        }
    }
}
