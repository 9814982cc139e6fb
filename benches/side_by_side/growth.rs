//! The four curves along which a statement's cost must stay flat: idle sessions, nodes, prepared statements of a session,
//! and distinct statements. Each point is a proxy of its own, so that the points take turns and none is measured on a
//! machine that has changed since its neighbour was.

use std::io;
use std::process::Child;
use std::time::{Duration, Instant};

use highwater::demo::cluster::Login;

use crate::lab::{Contender, Failure, Lab, Workload};
use crate::process;
use crate::report::spread;
use crate::wire::Wire;

/// Replicas that the curve of nodes needs: real ones, on the same machine.
pub const REPLICAS: usize = 7;

/// Clients that drive a curve which pgbench cannot.
const DRIVERS: usize = 4;

/// What grows, and what a statement costs meanwhile.
pub struct Curve {
    pub name: &'static str,
    pub points: Vec<Point>,
}

impl Curve {
    /// A point's costs by those of the first point, round by round.
    pub fn ratios(&self, point: &Point) -> Vec<f64> {
        let first = self.points.first().map(|first| &first.cpu_us[..]).unwrap_or_default();
        if first.len() != point.cpu_us.len() {
            return Vec::new();
        }
        let pairs = point.cpu_us.iter().zip(first).filter(|(_, first)| **first > 0.0);
        pairs.map(|(here, first)| here / first).collect()
    }
}

/// Of a curve.
#[derive(Default)]
pub struct Point {
    /// How much there is of what grows.
    pub label: usize,
    /// Processor time of the proxy per statement.
    pub cpu_us: Vec<f64>,
    /// Statements a second.
    pub rate: Vec<f64>,
}

/// What is done to a proxy while its time is taken.
enum Load {
    Pgbench(Workload),
    /// Each client has prepared so many statements, and runs them in turn.
    Prepared(Vec<Wire>, usize),
    /// Simple queries, of so many texts, at random.
    Distinct(Vec<Wire>, usize),
}

/// A proxy on which a point is measured.
struct Stand {
    contender: Contender,
    load: Load,
    /// Clients that only wait.
    _idle: Vec<Wire>,
}

/// Measures all four.
pub fn measure(
    lab: &Lab,
    nodes: &[u16],
    rounds: usize,
    seconds: u32,
    failures: &mut Vec<String>,
) -> Vec<Curve> {
    type Build = fn(&Lab, &[u16], usize) -> Result<Stand, Failure>;
    let curves: [(&'static str, &[usize], Build); 4] = [
        ("idle sessions", &[0, 1_000, 10_000], idle_sessions),
        ("nodes", &[1, 2, 4, 8], some_nodes),
        ("prepared statements of a session", &[1, 10, 100, 1_000], prepared),
        ("distinct statements", &[10, 100, 1_000, 10_000, 100_000], distinct),
    ];
    let mut done = Vec::new();
    for (name, sizes, build) in curves {
        eprintln!("growth: {name}");
        let (mut points, mut stands): (Vec<Point>, Vec<Stand>) = (Vec::new(), Vec::new());
        for &size in sizes {
            match build(lab, nodes, size) {
                Ok(stand) => {
                    points.push(Point { label: size, ..Point::default() });
                    stands.push(stand);
                }
                Err(error) => failures.push(format!("growth of {name}, {size}: {error}")),
            }
        }
        // The first time around does not count: it opens the backends.
        for round in 0..=rounds {
            for turn in 0..stands.len() {
                let at = (turn + round) % stands.len();
                match run(lab, &mut stands[at], seconds) {
                    Ok(_) if round == 0 => {}
                    Ok((cpu_us, rate)) => {
                        points[at].cpu_us.push(cpu_us);
                        points[at].rate.push(rate);
                    }
                    Err(error) => {
                        eprintln!("  {}: {error}", points[at].label);
                        failures.push(format!("growth of {name}, {}: {error}", points[at].label));
                    }
                }
            }
        }
        for point in &points {
            let ((us, ..), (rate, ..)) = (spread(&point.cpu_us), spread(&point.rate));
            eprintln!("  {}: {us:.1} us of the proxy's per statement, {rate:.0} statements/s", point.label);
        }
        done.push(Curve { name, points });
    }
    done
}

/// Processor time per statement in microseconds, and statements a second.
fn run(lab: &Lab, stand: &mut Stand, seconds: u32) -> Result<(f64, f64), Failure> {
    match &mut stand.load {
        Load::Pgbench(workload) => {
            let run = lab.run(&stand.contender, workload, seconds)?;
            Ok((run.proxy_us.ok_or("no process")?, run.tps))
        }
        Load::Prepared(wires, size) => {
            let size = *size as u64;
            driven(&stand.contender, wires, seconds, &|wire, turn| wire.run_prepared(&name_of(turn % size)))
        }
        Load::Distinct(wires, size) => {
            let size = *size as u64;
            driven(&stand.contender, wires, seconds, &|wire, turn| {
                wire.query(&text_of(scattered(turn) % size)).map(drop)
            })
        }
    }
}

fn driven(
    contender: &Contender,
    wires: &mut [Wire],
    seconds: u32,
    work: &(dyn Fn(&mut Wire, u64) -> io::Result<()> + Sync),
) -> Result<(f64, f64), Failure> {
    let pid = contender.process.as_ref().map(Child::id).ok_or("no process")?;
    let (before, start) = (process::cpu_us(pid)?, Instant::now());
    let end = start + Duration::from_secs(u64::from(seconds));
    let done = on_each(wires, &|wire, nth| {
        let mut turn = nth << 40;
        while Instant::now() < end {
            work(wire, turn)?;
            turn += 1;
        }
        Ok(turn - (nth << 40))
    })?;
    let (spent, took) = (process::cpu_us(pid)? - before, start.elapsed());
    let done = (done as f64).max(1.0);
    Ok((spent / done, done / took.as_secs_f64()))
}

/// Does it on each connection, in a thread of its own, and adds up what comes of it.
fn on_each(wires: &mut [Wire], work: &(dyn Fn(&mut Wire, u64) -> io::Result<u64> + Sync)) -> io::Result<u64> {
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..).zip(wires.iter_mut()).map(|(nth, wire)| scope.spawn(move || work(wire, nth))).collect();
        threads.into_iter().try_fold(0, |sum, thread| {
            let done =
                thread.join().unwrap_or_else(|_| Err(io::Error::other("a client's thread panicked")))?;
            Ok(sum + done)
        })
    })
}

fn prepared_select() -> Workload {
    Workload {
        name: "select prepared".to_owned(),
        clients: 16,
        arguments: ["-S", "-M", "prepared"].map(str::to_owned).to_vec(),
    }
}

fn idle_sessions(lab: &Lab, nodes: &[u16], size: usize) -> Result<Stand, Failure> {
    let contender = lab.highwater(&format!("idle-{size}"), "highwater", &nodes[..3], true)?;
    let idle = lab.idle_clients(contender.port, size, true)?;
    Ok(Stand { contender, load: Load::Pgbench(prepared_select()), _idle: idle })
}

fn some_nodes(lab: &Lab, nodes: &[u16], size: usize) -> Result<Stand, Failure> {
    let nodes = nodes.get(..size).ok_or("there are fewer nodes")?;
    let contender = lab.highwater(&format!("nodes-{size}"), "highwater", nodes, true)?;
    Ok(Stand { contender, load: Load::Pgbench(prepared_select()), _idle: Vec::new() })
}

fn connect_drivers(port: u16, app: &Login) -> io::Result<Vec<Wire>> {
    (0..DRIVERS).map(|_| Wire::connect(port, app)).collect()
}

fn prepared(lab: &Lab, nodes: &[u16], size: usize) -> Result<Stand, Failure> {
    let contender = lab.highwater(&format!("prepared-{size}"), "highwater", &nodes[..3], true)?;
    let mut wires = connect_drivers(contender.port, &lab.app)?;
    on_each(&mut wires, &|wire, _| {
        for n in 0..size as u64 {
            wire.prepare(&name_of(n), &text_of(n))?;
        }
        Ok(0)
    })?;
    Ok(Stand { contender, load: Load::Prepared(wires, size), _idle: Vec::new() })
}

fn distinct(lab: &Lab, nodes: &[u16], size: usize) -> Result<Stand, Failure> {
    let contender = lab.highwater(&format!("distinct-{size}"), "highwater", &nodes[..3], true)?;
    let mut wires = connect_drivers(contender.port, &lab.app)?;
    // Each text once, as by an application that has been running for a while.
    on_each(&mut wires, &|wire, nth| {
        for n in (nth..size as u64).step_by(DRIVERS) {
            wire.query(&text_of(n))?;
        }
        Ok(0)
    })?;
    Ok(Stand { contender, load: Load::Distinct(wires, size), _idle: Vec::new() })
}

fn name_of(n: u64) -> String {
    format!("s{n}")
}

/// Texts that differ in more than their literals.
fn text_of(n: u64) -> String {
    format!("SELECT abalance AS a{n} FROM pgbench_accounts WHERE aid = {}", n % 100_000 + 1)
}

/// Spreads numbers over all 64 bits (splitmix64).
fn scattered(n: u64) -> u64 {
    let mut x = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
