//! The status page: values in, HTML out. Pure.
//!
//! Promises: every text that comes from outside (names, errors) is escaped; the tables say all that the
//! drawings show, without JavaScript; nothing is fetched from anywhere but the proxy itself. The style and
//! the script are within the page, and its policy lets no others run ([`policy`]). Deliberately has no
//! buttons: it changes nothing.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;

use super::chart;
use super::history::{History, NodePoint, Point, Role, Weight, add};
use super::words::{ago, bytes, clock_time, percent, rate, seconds};
use super::{Readiness, readiness};
use crate::metrics::{FailoverFigures, PoolFigure};
use crate::topology::{NodeId, NodeView, Standing, Topology};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");
/// Where no script runs, the browser reloads the page.
const RELOAD: &str = "<noscript><meta http-equiv=\"refresh\" content=\"5\"></noscript>";
const ICON: &str = "<link rel=\"icon\" href=\"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' \
    viewBox='0 0 16 16'%3E%3Cpath fill='%2317806f' d='M1 9q3.5-4 7 0t7 0v6H1zM1 4h14v1.5H1z'/%3E%3C/svg%3E\">";

/// What figures "now" are of: long enough to be calm, short enough to follow what happens.
const NOW: Duration = Duration::from_secs(10);
const MINUTE: Duration = Duration::from_secs(60);
/// Points of a drawing, about.
const DRAWN: usize = 300;
/// Events shown.
const EVENTS: usize = 30;

/// What the page is made of.
pub struct View<'a> {
    /// The topology now.
    pub topology: &'a Topology,
    /// Where failover stands.
    pub failover: &'a FailoverFigures,
    /// The last minutes.
    pub history: &'a History,
    /// How much of them is kept.
    pub keep: Duration,
    /// The proxy drains.
    pub draining: bool,
    /// The pools' backends.
    pub pools: &'a [PoolFigure],
    /// Client connections.
    pub clients: i64,
    /// Of these: bound to one backend.
    pub pinned: i64,
    /// Statements that wait while the primary is being changed.
    pub waiting: i64,
    /// By the machine's clock, since 1970.
    pub clock: Duration,
    /// Since the start.
    pub uptime: Duration,
}

/// The `Content-Security-Policy` of the page: its own style and script, by their hashes, and nothing else.
pub fn policy() -> String {
    let hash = |text: &str| {
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        base64::engine::general_purpose::STANDARD.encode(digest)
    };
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(STYLE),
        hash(SCRIPT)
    )
}

/// `text` as HTML shows it, in an element or in a quoted attribute.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// The whole page.
pub fn page(view: &View<'_>) -> String {
    let primary = primary(view.topology);
    let title = match primary {
        Some(node) => format!("{} is the primary · Highwater", escape(&node.name)),
        None => "no primary · Highwater".to_owned(),
    };
    let sections = [
        header(view),
        "<main>".to_owned(),
        tiles(view),
        nodes(view),
        roles(view),
        lag(view),
        statements(view),
        kept_reads(view),
        failover(view),
        events(view),
        "</main>".to_owned(),
        footer(view),
    ]
    .concat();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">{RELOAD}{ICON}\
         <title>{title}</title><style>{STYLE}</style></head>\n<body>\
         <p id=\"stale\" role=\"alert\">The proxy does not answer: what is shown is old.</p>\
         <div id=\"page\">{sections}</div><script>{SCRIPT}</script></body></html>\n"
    )
}

fn primary(topology: &Topology) -> Option<&NodeView> {
    topology.nodes.get(topology.primary?.index())
}

fn header(view: &View<'_>) -> String {
    let readiness = readiness(view.topology, view.draining);
    let class = match readiness {
        Readiness::Ready => "pill",
        Readiness::ReadOnly => "pill warn",
        Readiness::NoNode | Readiness::Draining => "pill bad",
    };
    // What is being done about the primary is the first thing to know while it is done.
    let failover = match view.failover.state {
        "healthy" => String::new(),
        "blocked" => "<p class=\"pill bad\">failover: blocked</p>".to_owned(),
        state => format!("<p class=\"pill warn\">failover: {}</p>", escape(state)),
    };
    format!(
        "<header><h1>Highwater</h1><p class=\"{class}\">{}</p>{failover}<p class=\"soft\">version {}, up {}</p>\
         <p class=\"soft clock\">{} UTC</p></header>",
        escape(readiness.text()),
        env!("CARGO_PKG_VERSION"),
        ago(view.uptime),
        clock_time(view.clock),
    )
}

fn tile(name: &str, figure: &str, more: &str) -> String {
    format!("<div><dt>{name}</dt><dd>{figure}<small>{more}</small></dd></div>")
}

fn tiles(view: &View<'_>) -> String {
    let writes = match primary(view.topology) {
        Some(node) if node.standing == (Standing::Primary { reachable: true }) => {
            let waiting = match view.waiting {
                ..=0 => String::new(),
                1 => "; 1 statement waits".to_owned(),
                many => format!("; {many} statements wait"),
            };
            (escape(&node.name), format!("the primary{waiting}"))
        }
        Some(node) => ("nowhere".to_owned(), format!("{} does not answer", escape(&node.name))),
        None => ("nowhere".to_owned(), "no primary has been found".to_owned()),
    };
    let (mut reads, mut kept, mut all) = (0u64, 0u64, 0u64);
    for point in view.history.last(MINUTE) {
        kept += point.kept_reads.iter().map(|(_, count)| u64::from(*count)).sum::<u64>();
        for node in &point.nodes {
            reads += u64::from(node.reads);
            all += u64::from(node.reads) + u64::from(node.others);
        }
    }
    let share = if reads == 0 { "–".to_owned() } else { percent(reads.saturating_sub(kept), reads) };
    let served = view.topology.serving_replicas().count();
    let replicas =
        if served == 1 { "1 replica serves".to_owned() } else { format!("{served} replicas serve") };
    let per_second = all as f32 / seconds_of(view, MINUTE);
    format!(
        "<section class=\"wide bare\"><dl class=\"tiles\">{}{}{}{}</dl></section>",
        tile("Writes go to", &writes.0, &writes.1),
        tile("Reads on replicas", &share, &format!("in the last minute; {replicas}")),
        tile("Statements a second", &rate(per_second), "in the last minute"),
        tile("Clients", &view.clients.to_string(), &format!("{} bound to one backend", view.pinned)),
    )
}

/// How many seconds of `time` have been recorded: one at least.
fn seconds_of(view: &View<'_>, time: Duration) -> f32 {
    // The first point of all counts nothing.
    let recorded = view.history.last(time).count().min(view.history.points().len().saturating_sub(1));
    recorded.max(1) as f32
}

fn nodes(view: &View<'_>) -> String {
    let rows: String = view.topology.members().map(|node| node_row(view, node)).collect();
    format!(
        "<section class=\"wide\"><h2>Nodes</h2><table class=\"cards\"><thead><tr><th>Node</th><th>Role</th>\
         <th class=\"n\">Behind</th><th class=\"n\">Reads/s</th><th class=\"n\">Other statements/s</th>\
         <th class=\"n\">Backends in use</th></tr></thead><tbody>{rows}</tbody></table></section>"
    )
}

fn node_row(view: &View<'_>, node: &NodeView) -> String {
    let (mut reads, mut others) = (0u64, 0u64);
    for point in view.history.last(NOW).filter_map(|point| point.nodes.get(node.id.index())) {
        reads += u64::from(point.reads);
        others += u64::from(point.others);
    }
    let role = Role::of(&node.standing);
    let why = match &node.standing {
        Standing::Excluded(why) => why.to_string(),
        Standing::Primary { reachable: false } => "it does not answer; no other node takes writes".to_owned(),
        Standing::Replica if node.weight == 0 => "weight 0: it gets no reads".to_owned(),
        _ => String::new(),
    };
    let why = if why.is_empty() { String::new() } else { format!("<small>{}</small>", escape(&why)) };
    let behind = match (node.replay_lag, node.replay_lag_bytes) {
        (Some(lag), Some(size)) => format!("{}<small>{}</small>", seconds(lag.as_secs_f32()), bytes(size)),
        (None, Some(size)) => bytes(size),
        _ => "–".to_owned(),
    };
    let of_state = |state: &str| -> u64 {
        view.pools.iter().filter(|p| p.node == node.id && p.state == state).map(|p| p.backends).sum()
    };
    let (active, idle, waiting) = (of_state("active"), of_state("idle"), of_state("waiting"));
    let waiting = if waiting == 0 { String::new() } else { format!(", {waiting} waiting") };
    let per_second = |count: u64| rate(count as f32 / seconds_of(view, NOW));
    format!(
        "<tr><td class=\"name\">{}</td><td><span class=\"role {}\">{}</span>{why}</td>\
         <td class=\"n\" data-label=\"behind\">{behind}</td><td class=\"n\" data-label=\"reads/s\">{}</td>\
         <td class=\"n\" data-label=\"other/s\">{}</td>\
         <td class=\"n\" data-label=\"backends\">{active}<small>{idle} idle{waiting}</small></td></tr>",
        escape(&node.name),
        role_class(role),
        role.label(),
        per_second(reads),
        per_second(others),
    )
}

fn role_class(role: Role) -> &'static str {
    match role {
        Role::Primary => "primary",
        Role::Replica => "replica",
        Role::Excluded => "excluded",
        Role::PrimaryLost | Role::Down => "down",
    }
}

/// The points to draw in groups: as many as a screen can show apart, however many there are. A group is of the
/// same seconds each time it is drawn, so that the drawing moves and does not flicker.
fn groups<'a>(view: &View<'a>) -> Vec<(f32, &'a [Arc<Point>])> {
    let points = view.history.points();
    let step = (points.len() / DRAWN).max(1) as u64;
    let begun = |p: &Arc<Point>| p.at.as_secs() / step;
    points
        .chunk_by(|a, b| begun(a) == begun(b))
        .map(|group| (place(view, group[group.len() - 1].at), group))
        .filter(|(x, _)| *x >= 0.0)
        .collect()
}

/// How much is drawn: all that is kept, or less while there is less.
fn window(view: &View<'_>) -> Duration {
    let points = view.history.points();
    let recorded = points
        .last()
        .map_or(Duration::ZERO, |p| p.at)
        .saturating_sub(points.first().map_or(Duration::ZERO, |p| p.at));
    [2, 4, 6, 10, 20, 30]
        .map(|minutes| MINUTE * minutes)
        .into_iter()
        .find(|w| *w > recorded)
        .map_or(view.keep, |w| w.min(view.keep))
}

/// Where in the window a point lies: 0 at its beginning, 1 now.
fn place(view: &View<'_>, at: Duration) -> f32 {
    let newest = view.history.points().last().map_or(Duration::ZERO, |p| p.at);
    1.0 - newest.saturating_sub(at).as_secs_f32() / window(view).as_secs_f32().max(1.0)
}

fn time_axis(view: &View<'_>) -> String {
    format!(
        "<div class=\"x\"><span>{} ago</span><span>{} ago</span><span>now</span></div>",
        ago(window(view)),
        ago(window(view) / 2)
    )
}

fn roles(view: &View<'_>) -> String {
    let mut strips = String::new();
    for node in view.topology.members() {
        let role = |p: &Arc<Point>| Some((place(view, p.at), p.nodes.get(node.id.index())?.role));
        let roles: Vec<(f32, Role)> =
            view.history.points().iter().filter_map(role).filter(|(x, _)| *x >= 0.0).collect();
        let what = format!("{}: now {}", node.name, Role::of(&node.standing).label());
        let _ = write!(
            strips,
            "<span class=\"name\">{}</span>{}",
            escape(&node.name),
            chart::strip(&what, &roles)
        );
    }
    let legend: String = [Role::Primary, Role::Replica, Role::Excluded, Role::Down]
        .map(|role| format!("<li class=\"role {}\">{}</li>", role_class(role), role.label()))
        .concat();
    format!(
        "<section class=\"wide\"><h2>Roles</h2><div class=\"strips\">{strips}<span></span>{}</div>\
         <ul class=\"legend\">{legend}</ul></section>",
        time_axis(view)
    )
}

fn y_axis(end: f32, show: fn(f32) -> String) -> String {
    format!("<div class=\"y\"><span>{}</span><span>{}</span><span>0</span></div>", show(end), show(end / 2.0))
}

fn chart_of(view: &View<'_>, y: &str, drawing: &str, legend: &str) -> String {
    format!(
        "<div class=\"chart\">{y}<div class=\"plot\">{drawing}</div>{}</div><ul class=\"legend\">{legend}</ul>",
        time_axis(view)
    )
}

fn swatch(class: &str, index: usize) -> String {
    let shape = match class {
        "line" => "d=\"M0 6h24\"",
        _ => "d=\"M6 0h12v10H6Z\"",
    };
    format!(
        "<svg viewBox=\"0 0 24 10\" aria-hidden=\"true\"><path class=\"{class} s{}\" {shape}/></svg>",
        index % 6
    )
}

fn lag(view: &View<'_>) -> String {
    // A primary has no lag; one that has been a replica a moment ago has, in the window.
    let lag_of = |node: &NodeView, p: &Point| p.nodes.get(node.id.index()).and_then(|n| n.lag_seconds);
    let lagging = |node: &&NodeView| view.history.points().iter().any(|p| lag_of(node, p).is_some());
    let drawn: Vec<&NodeView> = view.topology.members().filter(lagging).collect();
    let groups = groups(view);
    let mut curves: Vec<chart::Curve> = Vec::new();
    let mut legend = String::new();
    let mut greatest = 0f32;
    for (index, node) in drawn.iter().enumerate() {
        // The greatest of a group: a peak is what one looks for.
        let of_group = |group: &[Arc<Point>]| group.iter().filter_map(|p| lag_of(node, p)).reduce(f32::max);
        let curve: chart::Curve = groups.iter().map(|(x, group)| (*x, of_group(group))).collect();
        greatest = curve.iter().filter_map(|(_, lag)| *lag).fold(greatest, f32::max);
        let now = node.replay_lag.map_or_else(|| "not known".to_owned(), |lag| seconds(lag.as_secs_f32()));
        let _ = write!(legend, "<li>{}{} <b>{now}</b></li>", swatch("line", index), escape(&node.name));
        curves.push(curve);
    }
    let body = if drawn.is_empty() {
        "<p class=\"soft\">No replica's lag is known.</p>".to_owned()
    } else {
        let end = chart::axis_end(greatest, 0.001);
        let what = format!("replay lag of {} replicas, up to {}", drawn.len(), seconds(greatest));
        chart_of(view, &y_axis(end, seconds), &chart::curves(&what, &curves, end), &legend)
    };
    format!(
        "<section><h2>Replay lag</h2><p class=\"note\">How long ago the primary was where a replica is now.</p>{body}\
         </section>"
    )
}

fn statements(view: &View<'_>) -> String {
    let mut points: Vec<(f32, Vec<f32>)> = Vec::new();
    for (x, group) in groups(view) {
        let sum = |of: fn(&NodePoint) -> u32| group.iter().flat_map(|p| &p.nodes).map(of).sum::<u32>() as f32;
        let kept = group.iter().flat_map(|p| &p.kept_reads).map(|(_, count)| *count).sum::<u32>() as f32;
        let mean = |sum: f32| sum / group.len() as f32;
        points.push((x, vec![mean((sum(|n| n.reads) - kept).max(0.0)), mean(kept), mean(sum(|n| n.others))]));
    }
    let greatest = points.iter().map(|(_, values)| values.iter().sum::<f32>()).fold(0.0, f32::max);
    let newest = points.last().map_or_else(|| vec![0.0; 3], |(_, values)| values.clone());
    let legend: String = ["reads on replicas", "reads on the primary", "all other statements"]
        .iter()
        .zip(&newest)
        .enumerate()
        .map(|(index, (name, now))| format!("<li>{}{name} <b>{}</b></li>", swatch("area", index), rate(*now)))
        .collect();
    let end = chart::axis_end(greatest, 1.0);
    let what = format!("statements a second, up to {}", rate(greatest));
    let body = chart_of(view, &y_axis(end, rate), &chart::areas(&what, &points, end), &legend);
    format!(
        "<section><h2>Statements a second</h2><p class=\"note\">A transaction's statements count among the others, but \
         for reads that ran apart from it.</p>{body}</section>"
    )
}

/// Why a read ran on the primary, in words; the reasons are `route`'s, and a test holds that none is missing.
pub const KEPT_READ_WORDS: &[(&str, &str)] = &[
    ("not_a_read", "It went along with a statement that is not a read."),
    ("in_transaction", "Its session was inside a transaction on the primary."),
    ("pinned", "Its session is bound to one backend by something it has left there."),
    ("split_off", "routing.split is off."),
    ("no_replica", "No replica was in service."),
    ("behind", "No replica had reached what its session has seen, within consistency.catch_up_wait."),
    ("too_long", "It was longer than limits.unit_hold."),
    ("redone", "A replica refused it, or went away before it had answered."),
    ("settings", "Its session has settings that replicas do not take."),
    ("clock", "It asks for the time, and the replicas' clocks were behind the primary's."),
    ("asked", "Its session asked for the primary (highwater.route)."),
    ("shadow", "routing.shadow is on."),
];

fn kept_reads(view: &View<'_>) -> String {
    let mut lately: Vec<(&'static str, u64)> = Vec::new();
    for point in view.history.last(MINUTE) {
        for (reason, count) in &point.kept_reads {
            add(&mut lately, reason, u64::from(*count));
        }
    }
    let mut rows = view.history.kept_reads_so_far();
    rows.retain(|(_, count)| *count > 0);
    rows.sort_by_key(|(reason, count)| (std::cmp::Reverse(*count), *reason));
    let body = if rows.is_empty() {
        "<p class=\"soft\">None has.</p>".to_owned()
    } else {
        let rows: String = rows
            .iter()
            .map(|(reason, total)| {
                let minute = lately.iter().find(|(r, _)| r == reason).map_or(0, |(_, count)| *count);
                let words = KEPT_READ_WORDS.iter().find(|(r, _)| r == reason).map_or("", |(_, words)| words);
                format!(
                    "<tr class=\"head\"><td>{}</td><td class=\"n\">{minute}</td><td class=\"n\">{total}</td></tr>\
                     <tr class=\"means\"><td colspan=\"3\"><small>{words}</small></td></tr>",
                    escape(reason)
                )
            })
            .collect();
        format!(
            "<table class=\"whys\"><thead><tr><th>Reason</th><th class=\"n\">Last minute</th><th class=\"n\">Since the start</th></tr>\
             </thead><tbody>{rows}</tbody></table>"
        )
    };
    format!(
        "<section><h2>Why reads ran on the primary</h2><p class=\"note\">The names are those of \
         <code>highwater_statements_total</code>.</p>{body}</section>"
    )
}

fn failover(view: &View<'_>) -> String {
    let topology = view.topology;
    let fact = |name: &str, what: String| format!("<div><dt>{name}</dt><dd>{what}</dd></div>");
    let unknown = || "not known".to_owned();
    let name_of = |id: NodeId| topology.nodes.get(id.index()).map_or_else(unknown, |n| escape(&n.name));
    let figures = view.failover;
    let mut facts = vec![fact("state", escape(figures.state))];
    if let Some(reason) = figures.blocked {
        facts.push(fact("blocked", format!("<span class=\"bad\">{}</span>", escape(reason))));
    }
    if view.waiting > 0 {
        facts.push(fact("statements waiting", view.waiting.to_string()));
    }
    if let Some(covered) = figures.sync {
        let words = if covered { "survive the primary" } else { "<span class=\"bad\">not covered</span>" };
        facts.push(fact("acknowledged writes", words.to_owned()));
    }
    if let Some(lost) = figures.lost_acked_bytes_min.filter(|lost| *lost > 0) {
        facts.push(fact("lost in the last failover", format!("{} at least", bytes(lost))));
    }
    facts.extend([
        fact("epoch", topology.epoch.0.to_string()),
        fact("primary", topology.primary.map_or_else(|| "none".to_owned(), name_of)),
        fact("timeline", topology.timeline.map_or_else(unknown, |t| t.0.to_string())),
        fact("system identifier", topology.system_identifier.map_or_else(unknown, |s| s.to_string())),
    ]);
    let facts = facts.concat();
    let mut rows = String::new();
    for (index, switch) in topology.switches.iter().enumerate().rev() {
        let next = topology.switches.get(index + 1).map(|s| s.old_primary).or(topology.primary);
        let began =
            view.history.events().iter().find(|e| e.epoch.is_some_and(|epoch| epoch.0 == switch.from.0 + 1));
        // The last position that was sampled lies past the fork: so much was seen that is gone.
        let past = match (switch.fork, switch.last_sample) {
            _ if switch.kept => "none: all was kept".to_owned(),
            (Some(fork), Some((_, last))) if last > fork => {
                format!("{} at least", bytes(last.bytes_since(fork)))
            }
            (Some(_), Some(_)) => "none seen".to_owned(),
            _ => unknown(),
        };
        let _ = write!(
            rows,
            "<tr><td data-label=\"at\">{}</td><td data-label=\"epoch\">{}&nbsp;→&nbsp;{}</td>\
             <td data-label=\"primary\">{} → {}</td><td data-label=\"fork\">{}</td>\
             <td data-label=\"WAL past it\">{past}</td></tr>",
            began.map_or_else(|| "–".to_owned(), |event| clock_time(event.clock)),
            switch.from.0,
            switch.from.0 + 1,
            name_of(switch.old_primary),
            next.map_or_else(unknown, name_of),
            switch.fork.map_or_else(unknown, |fork| fork.to_string()),
        );
    }
    let history = if rows.is_empty() {
        "<p class=\"soft\">No change of the primary since the proxy's start.</p>".to_owned()
    } else {
        format!(
            "<table class=\"cards\"><thead><tr><th>At</th><th>Epoch</th><th>Primary</th><th>The log forked at</th>\
             <th>WAL past the fork</th></tr></thead><tbody>{rows}</tbody></table>"
        )
    };
    format!("<section><h2>Failover</h2><dl class=\"facts\">{facts}</dl>{history}</section>")
}

fn events(view: &View<'_>) -> String {
    let items: String = view
        .history
        .events()
        .iter()
        .rev()
        .take(EVENTS)
        .map(|event| {
            let class = match event.weight {
                Weight::Bad => " class=\"bad\"",
                Weight::Good | Weight::Plain => "",
            };
            let node = event.node.as_deref().map_or_else(String::new, |n| format!("<b>{}</b> ", escape(n)));
            format!(
                "<li><time>{}</time><span{class}>{node}{}</span></li>",
                clock_time(event.clock),
                escape(&event.text)
            )
        })
        .collect();
    let body = if items.is_empty() {
        "<p class=\"soft\">Nothing since the proxy's start.</p>".to_owned()
    } else {
        format!("<ul class=\"events\">{items}</ul>")
    };
    format!("<section class=\"wide\"><h2>What has happened</h2>{body}</section>")
}

fn footer(view: &View<'_>) -> String {
    format!(
        "<footer><span>One point a second, {} kept in memory (<code>http_history</code>).</span>\
         <a href=\"metrics\">metrics</a><a href=\"topology\">topology</a><a href=\"readyz\">readyz</a></footer>",
        ago(view.keep)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::topology;
    use crate::route::RouteReason;
    use crate::topology::{Epoch, Exclusion, Switch};
    use crate::wal::{Lsn, TimelineId};

    static HEALTHY: FailoverFigures = FailoverFigures {
        state: "healthy",
        blocked: None,
        quarantined: Vec::new(),
        coordination: None,
        lost_acked_bytes_min: None,
        sync: None,
        slots_held: 0,
    };

    fn view<'a>(topology: &'a Topology, history: &'a History) -> View<'a> {
        View {
            topology,
            failover: &HEALTHY,
            history,
            keep: Duration::from_secs(600),
            draining: false,
            pools: &[],
            clients: 3,
            pinned: 1,
            waiting: 0,
            clock: Duration::from_secs(1_700_000_000),
            uptime: Duration::from_secs(125),
        }
    }

    #[test]
    fn names_and_errors_from_outside_are_text_and_never_markup() {
        let hostile = "<img src=x onerror=alert(1)>\"'&";
        let mut now = topology(vec![
            Standing::Primary { reachable: true },
            Standing::Excluded(Exclusion::Unreachable(hostile.to_owned())),
        ]);
        for node in &mut now.nodes {
            node.name = format!("{hostile}{}", node.id.0).into();
            node.replay_lag = Some(Duration::from_millis(3));
        }
        let mut history = History::new(Duration::from_secs(60));
        let before = topology(vec![Standing::Excluded(Exclusion::NotProbed), Standing::Replica]);
        history.observe(&Arc::new(before), Duration::ZERO);
        history.observe(&Arc::new(now.clone()), Duration::ZERO);
        history.record(Duration::ZERO, &now, vec![(NodeId(0), "read", "behind", 1)]);
        let page = page(&view(&now, &history));
        assert!(!page.contains("<img"), "{page}");
        assert!(!page.contains("x onerror=alert(1)>\""), "{page}");
        assert!(page.matches("&lt;img src=x onerror=alert(1)&gt;&quot;&#39;&amp;").count() >= 8, "{page}");
    }

    #[test]
    fn what_is_being_done_about_the_primary_stands_at_the_top() {
        let now = topology(vec![Standing::Primary { reachable: true }]);
        let history = History::new(Duration::from_secs(60));
        let top = |state: &'static str, waiting: i64| {
            let failover = FailoverFigures { state, ..HEALTHY.clone() };
            let page = page(&View { failover: &failover, waiting, ..view(&now, &history) });
            page.split_once("Reads on replicas").unwrap().0.to_owned()
        };
        assert!(!top("healthy", 0).contains("failover:"));
        assert!(top("healthy", 0).contains("<small>the primary</small>"));
        let draining = top("draining", 4);
        assert!(draining.contains("<p class=\"pill warn\">failover: draining</p>"), "{draining}");
        assert!(draining.contains("<small>the primary; 4 statements wait</small>"), "{draining}");
        assert!(top("blocked", 1).contains("pill bad\">failover: blocked"), "{draining}");
    }

    #[test]
    fn the_policy_names_the_style_and_the_script_that_the_page_has_and_no_others() {
        let now = topology(vec![Standing::Primary { reachable: true }]);
        let page = page(&view(&now, &History::new(Duration::from_secs(60))));
        let policy = policy();
        for (begin, end, directive) in
            [("<style>", "</style>", "style-src"), ("<script>", "</script>", "script-src")]
        {
            assert_eq!(page.matches(begin).count(), 1);
            let text = page.split_once(begin).unwrap().1.split_once(end).unwrap().0;
            let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
            let hash = base64::engine::general_purpose::STANDARD.encode(digest);
            assert!(policy.contains(&format!("{directive} 'sha256-{hash}'")), "{policy}");
        }
        assert!(!policy.contains("unsafe"));
        // What the policy would refuse is not there to begin with.
        assert!(!page.contains(" style=\"") && !page.contains(" onclick"), "{page}");
        assert_eq!(
            page.matches("http").count()
                - page.matches("http-equiv").count()
                - page.matches("http_history").count(),
            1
        );
    }

    #[test]
    fn a_full_memory_of_many_nodes_makes_a_page_of_bounded_size() {
        let mut standings = vec![Standing::Replica; 64];
        standings[0] = Standing::Primary { reachable: true };
        let now = topology(standings);
        let mut history = History::new(Duration::from_secs(3600));
        for at in 0..4000u64 {
            let counts = (0..64).map(|node| (NodeId(node), "read", "read", at * u64::from(node))).collect();
            history.record(Duration::from_secs(at), &now, counts);
        }
        let mut view = view(&now, &history);
        view.keep = Duration::from_secs(3600);
        let begun = std::time::Instant::now();
        let length = page(&view).len();
        println!("64 nodes, an hour: {length} bytes in {:?}", begun.elapsed());
        assert!((100_000..600_000).contains(&length), "{length}");
    }

    #[test]
    fn every_reason_that_keeps_a_read_on_the_primary_has_its_words() {
        let reasons: Vec<&str> = RouteReason::LABELS.into_iter().filter(|reason| *reason != "read").collect();
        let words: Vec<&str> = KEPT_READ_WORDS.iter().map(|(reason, _)| *reason).collect();
        let missing: Vec<_> = reasons.iter().filter(|reason| !words.contains(reason)).collect();
        assert!(missing.is_empty(), "{missing:?}");
        assert!(words.iter().all(|word| reasons.contains(word)));
    }

    #[test]
    fn the_tables_say_who_is_who_what_runs_where_and_how_epochs_ended() {
        let mut now = topology(vec![
            Standing::Excluded(Exclusion::OtherTimeline),
            Standing::Primary { reachable: true },
            Standing::Replica,
        ]);
        now.switches.push(Switch {
            from: Epoch(1),
            old_primary: NodeId(0),
            old_timeline: TimelineId(1),
            fork: Some(Lsn(0x300_0100)),
            gone_from: None,
            last_sample: Some((9, Lsn(0x300_0900))),
            kept: false,
        });
        let mut history = History::new(Duration::from_secs(60));
        let cells = |ran| {
            vec![
                (NodeId(1), "write", "not_a_read", ran),
                (NodeId(1), "read", "behind", ran * 2),
                (NodeId(2), "read", "read", ran * 6),
            ]
        };
        history.record(Duration::from_secs(1), &now, cells(0));
        history.record(Duration::from_secs(2), &now, cells(10));
        let page = page(&view(&now, &history));
        for text in [
            "<dt>Writes go to</dt><dd>n1<small>the primary",
            "<dt>Reads on replicas</dt><dd>75.0 %",
            "<dt>Statements a second</dt><dd>90",
            "it replays another timeline than the primary&#39;s",
            "data-label=\"behind\">250 ms<small>4.0 KiB</small>",
            "<td>behind</td><td class=\"n\">20</td><td class=\"n\">20</td>",
            "<small>No replica had reached",
            "<td data-label=\"primary\">n0 → n1</td>",
            "0/3000100",
            "2.0 KiB at least",
            "2023-11-14 22:13:20 UTC",
        ] {
            assert!(page.contains(text), "{text} is missing in {page}");
        }
    }
}
