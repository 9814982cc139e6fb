//! What was measured, as tables and as JSON: medians with their spread, ratios within the rounds, and how they stand to
//! the bars that the project has set itself.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::growth::Curve;

/// Values per workload, contender and metric, in the order measured.
pub type Results = BTreeMap<(String, &'static str, &'static str), Vec<f64>>;

/// All that was found out.
#[derive(Default)]
pub struct Findings {
    pub results: Results,
    pub curves: Vec<Curve>,
    /// What could not be measured, and why.
    pub failures: Vec<String>,
}

impl Findings {
    /// Notes a value.
    pub fn add(&mut self, workload: &str, contender: &'static str, metric: &'static str, value: f64) {
        self.results.entry((workload.to_owned(), contender, metric)).or_default().push(value);
    }

    fn values(&self, workload: &str, contender: &'static str, metric: &'static str) -> Option<&[f64]> {
        self.results.get(&(workload.to_owned(), contender, metric)).map(Vec::as_slice)
    }

    /// One contender's values by another's, round by round; none where one of them missed a round.
    fn ratios(&self, workload: &str, metric: &'static str, of: &'static str, to: &'static str) -> Vec<f64> {
        let (of, to) = (self.values(workload, of, metric), self.values(workload, to, metric));
        match of.zip(to) {
            Some((of, to)) if of.len() == to.len() => {
                of.iter().zip(to).filter(|(_, to)| **to > 0.0).map(|(of, to)| of / to).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// What a reader must know to believe the figures.
pub struct About {
    unix_time: u64,
    date: String,
    machine: String,
    commit: String,
    versions: String,
    /// Rounds and their length.
    pub how: String,
    /// Load average, before and after each round.
    pub loads: Vec<String>,
}

impl About {
    /// Of this moment.
    pub fn collect(pgbouncer: &Path) -> About {
        let output = |program: &str, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
            output.map_or("unknown".to_owned(), |output| {
                String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("unknown").to_owned()
            })
        };
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let cores = std::thread::available_parallelism().map_or(0, usize::from);
        About {
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            date: output("date", &["-u", "+%F %H:%M UTC"]),
            machine: format!("{cores} cores, {}", model.map_or("unknown", |(_, name)| name)),
            commit: output("git", &["describe", "--always", "--dirty"]),
            versions: format!(
                "{}; {}",
                output("pgbench", &["--version"]),
                output(&pgbouncer.to_string_lossy(), &["--version"])
            ),
            how: String::new(),
            loads: vec![load()],
        }
    }
}

/// The load average of the last minute.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

/// Of sorted values; 0 of none.
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * part).round() as usize).copied().unwrap_or(0.0)
}

/// Median, lowest, highest.
pub fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    (quantile(&sorted, 0.5), quantile(&sorted, 0.0), quantile(&sorted, 1.0))
}

fn show(values: &[f64]) -> String {
    let (median, low, high) = spread(values);
    let digits = if median >= 100.0 { 0 } else { 2 };
    match values.len() {
        0 => "-".to_owned(),
        1 => format!("{median:.digits$}"),
        _ => format!("{median:.digits$} ({low:.digits$}-{high:.digits$})"),
    }
}

/// Writes results.md and results.json, and returns the former.
pub fn write(out: &Path, about: &About, findings: &Findings, names: &[&'static str]) -> io::Result<String> {
    let table = markdown(about, findings, names);
    fs::create_dir_all(out)?;
    fs::write(out.join("results.md"), &table)?;
    let json = serde_json::to_string_pretty(&json_of(about, findings)).map_err(io::Error::other)?;
    fs::write(out.join("results.json"), json)?;
    Ok(table)
}

fn markdown(about: &About, findings: &Findings, names: &[&'static str]) -> String {
    let mut text = format!(
        "Date: {}. Machine: {}. Commit: {}. {}.\n{}. Load average before and after each round: {}.\n\n\
         Median (lowest-highest) over the rounds.\n",
        about.date,
        about.machine,
        about.commit,
        about.versions,
        about.how,
        about.loads.join(", ")
    );
    figures(&mut text, findings, names);
    ratio_table(&mut text, findings);
    curve_table(&mut text, &findings.curves);
    bar_table(&mut text, &bars(findings));
    if !findings.failures.is_empty() {
        text.push_str("\nFailed:\n\n");
        for failure in &findings.failures {
            let _ = writeln!(text, "- {failure}");
        }
    }
    text
}

/// Workloads with their metrics, in order.
fn rows(results: &Results) -> Vec<(&str, &'static str)> {
    let mut rows: Vec<(&str, &'static str)> =
        results.keys().map(|(workload, _, metric)| (workload.as_str(), *metric)).collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

fn figures(text: &mut String, findings: &Findings, names: &[&'static str]) {
    if findings.results.is_empty() {
        return;
    }
    let _ = writeln!(text, "\n| workload | metric | {} |", names.join(" | "));
    let _ = writeln!(text, "|---|---|{}", "---:|".repeat(names.len()));
    for (workload, metric) in rows(&findings.results) {
        let _ = write!(text, "| {workload} | {metric} |");
        for name in names {
            let _ = write!(text, " {} |", show(findings.values(workload, name, metric).unwrap_or_default()));
        }
        text.push('\n');
    }
}

/// Who is set against whom.
const PAIRS: [(&str, &str); 4] = [
    ("highwater", "relay"),
    ("highwater", "pgbouncer"),
    ("highwater-nosplit", "relay"),
    ("highwater-nosplit", "pgbouncer"),
];

fn ratio_table(text: &mut String, findings: &Findings) {
    let mut lines = String::new();
    for (workload, metric) in rows(&findings.results) {
        let ratios: Vec<_> = PAIRS.iter().map(|(of, to)| findings.ratios(workload, metric, of, to)).collect();
        if ratios.iter().any(|ratios| !ratios.is_empty()) {
            let shown: Vec<_> = ratios.iter().map(|ratios| show(ratios)).collect();
            let _ = writeln!(lines, "| {workload} | {metric} | {} |", shown.join(" | "));
        }
    }
    if !lines.is_empty() {
        let heads = PAIRS.map(|(of, to)| format!("{of} / {to}")).join(" | ");
        let _ = writeln!(text, "\nRatios, each within its round.\n\n| workload | metric | {heads} |");
        let _ = writeln!(text, "|---|---|{}\n{lines}", "---:|".repeat(PAIRS.len()));
    }
}

fn curve_table(text: &mut String, curves: &[Curve]) {
    if curves.is_empty() {
        return;
    }
    text.push_str(
        "\nGrowth: processor time of the proxy per statement as something grows that must not matter.\n\n",
    );
    text.push_str(
        "| what grows | to | proxy CPU us/statement | by that of the first point | statements/s |\n",
    );
    text.push_str("|---|---:|---:|---:|---:|\n");
    for curve in curves {
        for point in &curve.points {
            let ratios = curve.ratios(point);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} |",
                curve.name,
                point.label,
                show(&point.cpu_us),
                show(&ratios),
                show(&point.rate)
            );
        }
    }
}

/// A bar, and what was measured against it.
struct Bar {
    what: String,
    /// The values of the rounds.
    measured: Vec<f64>,
    bar: f64,
    /// Whether the bar is the most or the least.
    at_most: bool,
}

impl Bar {
    fn words(&self) -> String {
        format!("{} {}", if self.at_most { "at most" } else { "at least" }, self.bar)
    }

    /// `None`: not measured.
    fn is_met(&self) -> Option<bool> {
        let (median, _, _) = spread(&self.measured);
        let met = if self.at_most { median <= self.bar } else { median >= self.bar };
        (!self.measured.is_empty()).then_some(met)
    }
}

fn bars(findings: &Findings) -> Vec<Bar> {
    const CPU: &str = "proxy CPU us/tx";
    let mut bars = Vec::new();
    let mut add = |what: String, measured: Vec<f64>, at_most: bool, bar: f64| {
        bars.push(Bar { what, measured, bar, at_most });
    };
    let own = |workload: &str, metric| findings.values(workload, "highwater", metric).unwrap_or_default();
    let by = |workload: &str, metric, to| findings.ratios(workload, metric, "highwater", to);
    for workload in ["select prepared x16", "select simple x16", "90/10 autocommit extended x16"] {
        add(format!("{workload}: proxy CPU / relay's"), by(workload, CPU, "relay"), true, 1.25);
        add(format!("{workload}: proxy CPU / PgBouncer's"), by(workload, CPU, "pgbouncer"), true, 1.0);
        add(format!("{workload}: TPS / PgBouncer's"), by(workload, "tps", "pgbouncer"), false, 1.0);
    }
    let literals = "select simple, all literals different x16";
    add(format!("{literals}: proxy CPU / relay's"), by(literals, CPU, "relay"), true, 1.5);
    let mixed = "90/10 autocommit extended x16";
    let primary = by(mixed, "primary CPU us/tx", "direct");
    add(format!("{mixed}: primary CPU / direct's"), primary, true, 0.4);
    add("one client, select prepared: added p50 / relay's".to_owned(), added_latency(findings), true, 1.2);
    for workload in ["large result", "COPY in"] {
        add(format!("{workload}: MiB/s / relay's"), by(workload, "MiB/s", "relay"), false, 0.9);
        let ms = own(workload, "proxy CPU ms/MiB").to_vec();
        add(format!("{workload}: proxy CPU ms per MiB"), ms, true, 1.0);
    }
    for mode in ["simple", "extended", "prepared"] {
        let calls = own("system calls per statement, 1 client", mode).to_vec();
        add(format!("system calls per statement, {mode}"), calls, true, 6.0);
    }
    let idle = own("idle clients", "10000, have run a statement: KiB each").to_vec();
    add("idle client of 10000: KiB".to_owned(), idle, true, 6.0);
    let connect = own("connect per transaction x16", CPU).to_vec();
    add("connect per transaction, SCRAM: proxy CPU us each".to_owned(), connect, true, 100.0);
    for curve in &findings.curves {
        let all = curve.points.iter().map(|point| curve.ratios(point));
        let worst = all.max_by(|a, b| spread(a).0.total_cmp(&spread(b).0)).unwrap_or_default();
        add(format!("growth of {}: highest / first", curve.name), worst, true, 1.1);
    }
    bars
}

/// What Highwater adds to the median latency of one client, by what the relay adds.
fn added_latency(findings: &Findings) -> Vec<f64> {
    let of = |name| findings.values("select prepared x1", name, "p50 us").unwrap_or_default();
    let (direct, relay, own) = (of("direct"), of("relay"), of("highwater"));
    if direct.len() != relay.len() || relay.len() != own.len() {
        return Vec::new();
    }
    let rounds = direct.iter().zip(relay).zip(own);
    rounds
        .filter(|((direct, relay), _)| relay > direct)
        .map(|((direct, relay), own)| (own - direct) / (relay - direct))
        .collect()
}

fn bar_table(text: &mut String, bars: &[Bar]) {
    if bars.iter().all(|bar| bar.measured.is_empty()) {
        return;
    }
    text.push_str("\n| bar | measured | must be | met |\n|---|---:|---:|---|\n");
    for bar in bars.iter().filter(|bar| !bar.measured.is_empty()) {
        let met = if bar.is_met() == Some(true) { "yes" } else { "**no**" };
        let _ = writeln!(text, "| {} | {} | {} | {met} |", bar.what, show(&bar.measured), bar.words());
    }
}

fn json_of(about: &About, findings: &Findings) -> serde_json::Value {
    let row = |values: &[f64]| {
        let (median, low, high) = spread(values);
        json!({ "median": median, "lowest": low, "highest": high, "rounds": values })
    };
    let results: Vec<_> = findings
        .results
        .iter()
        .map(|((workload, contender, metric), values)| {
            let by = |to| {
                let ratios = findings.ratios(workload, metric, contender, to);
                (!ratios.is_empty()).then(|| row(&ratios))
            };
            json!({
                "workload": workload, "contender": contender, "metric": metric, "value": row(values),
                "by_relay": by("relay"), "by_pgbouncer": by("pgbouncer"),
            })
        })
        .collect();
    let curves: Vec<_> = findings
        .curves
        .iter()
        .flat_map(|curve| {
            curve.points.iter().map(move |point| {
                json!({
                    "grows": curve.name, "to": point.label, "cpu_us": row(&point.cpu_us),
                    "by_first": row(&curve.ratios(point)), "rate": row(&point.rate),
                })
            })
        })
        .collect();
    let bars: Vec<_> = bars(findings)
        .iter()
        .map(|bar| {
            json!({
                "bar": bar.what, "measured": row(&bar.measured), "must_be": bar.words(), "met": bar.is_met(),
            })
        })
        .collect();
    json!({
        "unix_time": about.unix_time, "date": about.date, "machine": about.machine, "commit": about.commit,
        "versions": about.versions, "how": about.how, "load": about.loads,
        "results": results, "growth": curves, "bars": bars, "failures": findings.failures,
    })
}
