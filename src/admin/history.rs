//! What the status page remembers of the last minutes: one point a second, and what has happened. Pure:
//! times and counts come as arguments.
//!
//! Promises: memory is bounded by `keep` points and [`MAX_EVENTS`] events, whatever happens. Deliberately
//! not a store of metrics: it is gone with the process; Prometheus keeps the rest.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::metrics::is_up;
use crate::topology::{Epoch, Exclusion, NodeId, Standing, Topology};

/// Events that are kept; of older ones, the log tells.
pub const MAX_EVENTS: usize = 100;

/// What a node was, at one point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The primary, and it answers.
    Primary,
    /// The primary, and it does not answer.
    PrimaryLost,
    /// A replica that may serve reads.
    Replica,
    /// It answers and is not used.
    Excluded,
    /// It does not answer.
    Down,
}

impl Role {
    /// The role of a node in this standing.
    pub fn of(standing: &Standing) -> Role {
        match standing {
            Standing::Primary { reachable: true } => Role::Primary,
            Standing::Primary { reachable: false } => Role::PrimaryLost,
            Standing::Replica => Role::Replica,
            // Not yet asked is not yet down.
            Standing::Excluded(Exclusion::NotProbed) => Role::Excluded,
            excluded if is_up(excluded) => Role::Excluded,
            Standing::Excluded(_) => Role::Down,
        }
    }

    /// In words.
    pub fn label(self) -> &'static str {
        match self {
            Role::Primary => "primary",
            Role::PrimaryLost => "primary, lost",
            Role::Replica => "replica",
            Role::Excluded => "not used",
            Role::Down => "down",
        }
    }
}

/// One node at one point: what it was, and what ran on it since the point before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NodePoint {
    /// What it was.
    pub role: Role,
    /// Of a replica: how far it was behind, where that was known.
    pub lag_seconds: Option<f32>,
    /// Reads.
    pub reads: u32,
    /// All other statements.
    pub others: u32,
}

/// All nodes at one point.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Since the proxy's start.
    pub at: Duration,
    /// In the configuration's order.
    pub nodes: Vec<NodePoint>,
    /// Reads that ran on the primary since the point before, by the reason of their route.
    pub kept_reads: Vec<(&'static str, u32)>,
}

/// One cell of the table of statements: where, as what, why, and how many since the start.
pub type StatementCount = (NodeId, &'static str, &'static str, u64);

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Back in order.
    Good,
    /// To be known.
    Plain,
    /// Something is not as it should be.
    Bad,
}

/// Something that happened to a node, or to the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// By the machine's clock, since 1970.
    pub clock: Duration,
    /// The node; `None`: it concerns the cluster.
    pub node: Option<Arc<str>>,
    /// What happened, for people.
    pub text: String,
    /// How much it matters.
    pub weight: Weight,
    /// The epoch that began with it, if one did.
    pub epoch: Option<Epoch>,
}

/// The last minutes. A clone is cheap: it shares the points.
#[derive(Clone, Debug)]
pub struct History {
    keep: usize,
    points: VecDeque<Arc<Point>>,
    events: VecDeque<Event>,
    /// The table of statements at the newest point.
    counts: Vec<StatementCount>,
    known: Option<Arc<Topology>>,
}

impl History {
    /// Remembers `keep`, at one point a second.
    pub fn new(keep: Duration) -> History {
        let keep = usize::try_from(keep.as_secs()).unwrap_or(usize::MAX).max(2);
        History { keep, points: VecDeque::new(), events: VecDeque::new(), counts: Vec::new(), known: None }
    }

    /// The points, oldest first.
    pub fn points(&self) -> &[Arc<Point>] {
        // One piece at all times: `record` makes it so.
        self.points.as_slices().0
    }

    /// The events, oldest first.
    pub fn events(&self) -> &VecDeque<Event> {
        &self.events
    }

    /// The points of the last `time`, oldest first.
    pub fn last(&self, time: Duration) -> impl Iterator<Item = &Point> {
        let newest = self.points().last().map_or(Duration::ZERO, |p| p.at);
        self.points().iter().map(Arc::as_ref).filter(move |p| newest.saturating_sub(p.at) < time)
    }

    /// Reads on the primary since the start, by the reason of their route.
    pub fn kept_reads_so_far(&self) -> Vec<(&'static str, u64)> {
        let mut sums: Vec<(&'static str, u64)> = Vec::new();
        for (_, class, reason, count) in &self.counts {
            if is_kept_read(class, reason) {
                add(&mut sums, reason, *count);
            }
        }
        sums
    }

    /// Takes note of what has changed since the topology before; call it at each change, so that what does
    /// not last a second is seen, too.
    pub fn observe(&mut self, topology: &Arc<Topology>, clock: Duration) {
        let Some(known) = self.known.replace(Arc::clone(topology)) else {
            return;
        };
        if known.epoch != topology.epoch {
            self.push(new_primary(topology, clock));
        }
        for (before, after) in known.nodes.iter().zip(&topology.nodes) {
            let same = match (&before.standing, &after.standing) {
                // What the last error said is no event.
                (Standing::Excluded(a), Standing::Excluded(b)) => a.label() == b.label(),
                (a, b) => a == b,
            };
            if !same {
                let (text, weight) = standing_words(&after.standing);
                self.push(Event { clock, node: Some(after.name.clone()), text, weight, epoch: None });
            }
        }
    }

    fn push(&mut self, event: Event) {
        self.events.push_back(event);
        if self.events.len() > MAX_EVENTS {
            self.events.pop_front();
        }
    }

    /// The point of this second.
    pub fn record(&mut self, at: Duration, topology: &Topology, counts: Vec<StatementCount>) {
        let first = self.counts.is_empty();
        let mut nodes: Vec<NodePoint> = topology
            .nodes
            .iter()
            .map(|node| NodePoint {
                role: Role::of(&node.standing),
                lag_seconds: node.replay_lag.map(|lag| lag.as_secs_f32()),
                reads: 0,
                others: 0,
            })
            .collect();
        let mut kept_reads = Vec::new();
        for (index, (node, class, reason, count)) in counts.iter().enumerate() {
            let before = self.counts.get(index).map_or(0, |(.., before)| *before);
            let ran = u32::try_from(count.saturating_sub(before)).unwrap_or(u32::MAX);
            if first || ran == 0 {
                continue;
            }
            if let Some(point) = nodes.get_mut(node.index()) {
                let sum = if *class == "read" { &mut point.reads } else { &mut point.others };
                *sum = sum.saturating_add(ran);
            }
            if is_kept_read(class, reason) {
                add(&mut kept_reads, reason, ran);
            }
        }
        self.counts = counts;
        self.points.push_back(Arc::new(Point { at, nodes, kept_reads }));
        while self.points.len() > self.keep {
            self.points.pop_front();
        }
        self.points.make_contiguous();
    }
}

/// A read whose route has another reason than that a replica serves it: it ran on the primary.
fn is_kept_read(class: &str, reason: &str) -> bool {
    class == "read" && reason != "read"
}

/// Adds to the sum of `reason`.
pub fn add<N: std::ops::AddAssign>(sums: &mut Vec<(&'static str, N)>, reason: &'static str, count: N) {
    match sums.iter_mut().find(|(known, _)| *known == reason) {
        Some((_, sum)) => *sum += count,
        None => sums.push((reason, count)),
    }
}

fn new_primary(topology: &Topology, clock: Duration) -> Event {
    let node = topology.primary.and_then(|id| topology.nodes.get(id.index())).map(|n| n.name.clone());
    let timeline =
        topology.timeline.map_or_else(|| "an unknown timeline".to_owned(), |t| format!("timeline {}", t.0));
    let text = format!("takes writes from now on: epoch {}, {timeline}", topology.epoch.0);
    Event { clock, node, text, weight: Weight::Plain, epoch: Some(topology.epoch) }
}

fn standing_words(standing: &Standing) -> (String, Weight) {
    use Exclusion::{LagUnknown, NoPrimary, NotProbed, Starting};
    match standing {
        Standing::Primary { reachable: true } => ("is the primary and answers".to_owned(), Weight::Good),
        Standing::Primary { reachable: false } => ("the primary does not answer".to_owned(), Weight::Bad),
        Standing::Replica => ("serves reads".to_owned(), Weight::Good),
        // As every node begins.
        Standing::Excluded(why @ (NotProbed | Starting | NoPrimary | LagUnknown)) => {
            (format!("is not used yet: {why}"), Weight::Plain)
        }
        Standing::Excluded(Exclusion::Removed) => {
            ("was taken out of the configuration".to_owned(), Weight::Plain)
        }
        Standing::Excluded(why) => (format!("is not used: {why}"), Weight::Bad),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::tests::topology;

    const UP: Standing = Standing::Primary { reachable: true };

    fn counts(figures: [u64; 4]) -> Vec<StatementCount> {
        let cells = [
            (0, "write", "not_a_read"),
            (0, "read", "behind"),
            (1, "read", "read"),
            (1, "unit", "in_transaction"),
        ];
        cells
            .iter()
            .zip(figures)
            .map(|((n, class, reason), count)| (NodeId(*n), *class, *reason, count))
            .collect()
    }

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn a_point_holds_what_ran_since_the_one_before() {
        let mut history = History::new(seconds(60));
        let now = topology(vec![UP, Standing::Replica]);
        history.record(seconds(1), &now, counts([100, 100, 100, 100]));
        history.record(seconds(2), &now, counts([110, 103, 150, 101]));
        let points: Vec<_> = history.points().iter().collect();
        // What had run before the page's memory began is not of its first second.
        assert_eq!(points[0].nodes[0].reads + points[0].nodes[0].others, 0);
        assert_eq!((points[1].nodes[0].reads, points[1].nodes[0].others), (3, 10));
        assert_eq!((points[1].nodes[1].reads, points[1].nodes[1].others), (50, 1));
        assert_eq!(points[1].nodes[1].lag_seconds, Some(0.25));
        assert_eq!(points[1].nodes[0].role, Role::Primary);
        assert_eq!(points[1].kept_reads, [("behind", 3)]);
        assert_eq!(history.kept_reads_so_far(), [("behind", 103)]);
    }

    #[test]
    fn memory_is_bounded_in_points_and_in_events() {
        let mut history = History::new(seconds(60));
        for at in 0..500 {
            let standing =
                if at % 2 == 0 { Standing::Replica } else { Standing::Excluded(Exclusion::Starting) };
            let now = Arc::new(topology(vec![UP, standing]));
            history.observe(&now, seconds(at));
            history.record(seconds(at), &now, counts([at; 4]));
        }
        assert_eq!((history.points().len(), history.events().len()), (60, MAX_EVENTS));
        assert_eq!(history.points()[0].at, seconds(440));
        assert_eq!(history.events().back().unwrap().clock, seconds(499));
        assert_eq!(history.last(seconds(10)).count(), 10);
    }

    #[test]
    fn changes_of_role_and_epoch_are_events_and_other_words_of_an_error_are_not() {
        let mut history = History::new(seconds(60));
        let refused = |said: &str| Standing::Excluded(Exclusion::Unreachable(said.to_owned()));
        for standings in [
            vec![UP, refused("a")],
            vec![UP, refused("b")],
            vec![UP, Standing::Replica],
            vec![Standing::Primary { reachable: false }, Standing::Replica],
        ] {
            history.observe(&Arc::new(topology(standings)), seconds(1));
        }
        let mut promoted = topology(vec![refused("c"), UP]);
        promoted.epoch = Epoch(3);
        history.observe(&Arc::new(promoted), seconds(2));
        let said: Vec<String> = history
            .events()
            .iter()
            .map(|e| format!("{} {}", e.node.as_deref().unwrap_or("-"), e.text))
            .collect();
        assert_eq!(
            said,
            [
                "n1 serves reads",
                "n0 the primary does not answer",
                "n1 takes writes from now on: epoch 3, timeline 3",
                "n0 is not used: it cannot be reached: c",
                "n1 is the primary and answers",
            ]
        );
        assert_eq!(history.events()[2].epoch, Some(Epoch(3)));
    }
}
