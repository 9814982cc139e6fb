//! What the system says of a process: its processor time, its memory, its system calls.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, SysconfVar, sysconf};

/// Microseconds of user and system time of all threads of a process.
pub fn cpu_us(pid: u32) -> io::Result<f64> {
    Ok(stat(pid)?.own_us)
}

/// The same with its living children and those it has reaped: a PostgreSQL server with its backends.
pub fn server_cpu_us(pid: u32) -> io::Result<f64> {
    let server = stat(pid)?;
    let mut total = server.own_us + server.reaped_us;
    for entry in fs::read_dir("/proc")?.flatten() {
        // A child that ends while we look is counted as reaped the next time.
        if let Some(child) = entry.file_name().to_str().and_then(|name| name.parse().ok())
            && let Ok(child) = stat(child)
            && child.parent == pid
        {
            total += child.own_us;
        }
    }
    Ok(total)
}

struct Stat {
    parent: u32,
    own_us: f64,
    reaped_us: f64,
}

/// /proc/PID/stat. The name in parentheses may hold anything, so fields are counted after it.
fn stat(pid: u32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    let per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100);
    let us = |ticks: u64| ticks as f64 * 1e6 / per_second as f64;
    Ok(Stat {
        parent: u32::try_from(number(1)).unwrap_or(0),
        own_us: us(number(11) + number(12)),
        reaped_us: us(number(13) + number(14)),
    })
}

/// Resident memory in KiB.
pub fn resident_kib(pid: u32) -> io::Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().strip_suffix(" kB"))
        .and_then(|number| number.trim().parse().ok())
        .ok_or_else(|| io::Error::other(format!("no VmRSS of process {pid}")))
}

/// What counts system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// The kernel's trace points, which slow nothing down.
    Perf,
    /// Each call is stopped twice: whatever goes by time weighs more than in life.
    Strace,
}

impl Counter {
    /// The better of those that work here.
    pub fn find() -> Option<Counter> {
        let counts = |text: &[u8]| first_field(&String::from_utf8_lossy(text)).is_some();
        let tried = Command::new("perf").args(PERF).arg("true").stdin(Stdio::null()).output();
        if tried.is_ok_and(|tried| counts(&tried.stderr)) {
            return Some(Counter::Perf);
        }
        let strace = Command::new("strace").arg("-V").stdin(Stdio::null()).output();
        strace.is_ok().then_some(Counter::Strace)
    }

    /// How many system calls the process makes while `work` runs. `report`: a file that may be written.
    pub fn count(self, pid: u32, report: &Path, work: impl FnOnce() -> io::Result<()>) -> io::Result<f64> {
        match self {
            Counter::Perf => by_perf(pid, report, work),
            Counter::Strace => by_strace(pid, report, work),
        }
    }
}

const PERF: [&str; 4] = ["stat", "-x,", "-e", "raw_syscalls:sys_enter"];

/// `12345,,raw_syscalls:sys_enter,...`
fn first_field(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.contains(PERF[3]))?;
    line.split(',').next()?.parse().ok()
}

fn by_perf(pid: u32, report: &Path, work: impl FnOnce() -> io::Result<()>) -> io::Result<f64> {
    // It counts from when its command starts until that ends; `cat` says that it has started.
    let mut perf = Command::new("perf")
        .args(PERF)
        .args(["-p", &pid.to_string(), "-o"])
        .arg(report)
        .args(["--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let (mut to, from) =
        perf.stdin.take().zip(perf.stdout.take()).ok_or_else(|| io::Error::other("no pipe"))?;
    to.write_all(b"started\n")?;
    let started = BufReader::new(from).read_line(&mut String::new())? > 0;
    let worked = if started { work() } else { Err(io::Error::other("perf could not attach")) };
    drop(to);
    perf.wait()?;
    worked?;
    first_field(&fs::read_to_string(report)?)
        .ok_or_else(|| io::Error::other("no count in the report of perf"))
}

fn by_strace(pid: u32, report: &Path, work: impl FnOnce() -> io::Result<()>) -> io::Result<f64> {
    let mut strace = Command::new("strace")
        .args(["-c", "-f", "-p", &pid.to_string(), "-o"])
        .arg(report)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let said = strace.stderr.take().ok_or_else(|| io::Error::other("no pipe from strace"))?;
    let mut said = BufReader::new(said);
    let mut line = String::new();
    while said.read_line(&mut line)? > 0 && !line.contains("attached") {}
    let worked = if line.contains("attached") {
        work()
    } else {
        Err(io::Error::other(format!("strace could not attach: {line}")))
    };
    // Its own pid: not reaped yet, so nobody else's.
    if let Ok(pid) = i32::try_from(strace.id()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGINT);
    }
    // It says a line per thread it leaves; a full pipe must not hold it.
    let _ = io::copy(&mut said, &mut io::sink());
    strace.wait()?;
    worked?;
    let text = fs::read_to_string(report)?;
    // `100.00    0.012345           1     12345       678 total`
    let total = text.lines().find(|line| line.trim_end().ends_with(" total"));
    total
        .and_then(|line| line.split_whitespace().nth(3))
        .and_then(|calls| calls.parse().ok())
        .ok_or_else(|| io::Error::other("no total in the report of strace"))
}
