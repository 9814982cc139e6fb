//! Each metric's name, labels, unit and help text, once.
//!
//! Promises: a registry of its own, no globals; label values that clients could invent never become
//! labels unbounded; on the way of a statement no name is looked up: a count is an array index and one
//! relaxed atomic addition, shared by all workers. Figures that others hold (topology, pools, caches) are
//! read when somebody scrapes. Deliberately does not serve HTTP (`admin` does) or keep history.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Encoder as _, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::config::MAX_NODES;
use crate::route::RouteReason;
use crate::topology::{NodeId, Quarantine, Standing, Topology};

/// The (database, user) pairs that get labels of their own; further ones are summed as `other`.
pub const MAX_POOL_LABELS: usize = 100;
const SECONDS: [f64; 16] =
    [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// What a statement waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitFor {
    /// A replica reaching the session's mark.
    Mark,
    /// The primary's visible floor reaching what replicas have shown.
    Floor,
    /// A backend of the pool.
    Backend,
    /// A primary being found.
    Primary,
    /// Being let to the primary, while it is changed.
    Gate,
}

/// The backends of one pool in one state, for a scrape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolFigure {
    /// Which node.
    pub node: NodeId,
    /// The pool's database.
    pub database: String,
    /// The pool's user.
    pub user: String,
    /// What the backends do: `idle`, `active`, `connecting`...
    pub state: &'static str,
    /// How many.
    pub backends: u64,
}

/// The classification cache's figures since the start, for a scrape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassCacheFigures {
    /// Look-ups that found their statement.
    pub hits: u64,
    /// Look-ups that did not.
    pub misses: u64,
    /// Threads of the second parser that hung and were replaced.
    pub replaced_parsers: u64,
}

/// Everything a scrape reads from elsewhere.
pub struct Scrape<'a> {
    /// The current topology.
    pub topology: &'a Topology,
    /// The pools' backends.
    pub pools: &'a [PoolFigure],
    /// The classification cache.
    pub class_cache: ClassCacheFigures,
    /// Samples sent to each node since the start, in the configuration's order.
    pub samples: &'a [u64],
    /// How far each node's clock is from the primary's, in seconds, likewise.
    pub clock_offsets: &'a [Option<f64>],
    /// Changes of the topology since the start.
    pub topology_changes: u64,
    /// How long ago each node's WAL position was last seen, in the configuration's order.
    pub sample_ages: &'a [Option<Duration>],
    /// Where failover stands.
    pub failover: FailoverFigures,
}

/// Where failover stands.
#[derive(Clone, Debug, Default)]
pub struct FailoverFigures {
    /// Its state, out of `Labels::failover_states`.
    pub state: &'static str,
    /// Why it is blocked, out of `Labels::failover_blocks`.
    pub blocked: Option<&'static str>,
    /// Why nodes are kept out: one entry for each node.
    pub quarantined: Vec<&'static str>,
    /// Bytes with acknowledged writes that the last failover is known to have lost.
    pub lost_acked_bytes_min: Option<u64>,
    /// With `durability: quorum`: whether acknowledged writes are covered now.
    pub sync: Option<bool>,
    /// Where several proxies share the cluster: how it stands with them.
    pub coordination: Option<CoordinationFigures>,
    /// With `slots.manage`: the most WAL, in bytes, that one of the slots holds.
    pub slots_held: u64,
}

/// How it stands with several proxies over one cluster.
#[derive(Clone, Copy, Debug)]
pub struct CoordinationFigures {
    /// Whether etcd has answered last.
    pub up: bool,
    /// Whether this proxy leads.
    pub leads: bool,
    /// Whether it may use the primary.
    pub valid: bool,
    /// How many proxies there are.
    pub proxies: usize,
}

/// Every value of the labels that are known beforehand, so that each series is there from the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Labels {
    /// Statement classes.
    pub classes: &'static [&'static str],
    /// Reasons of routes.
    pub reasons: &'static [&'static str],
    /// Why statements are run again.
    pub redone: &'static [&'static str],
    /// What becomes of unnamed Parses.
    pub unnamed: &'static [&'static str],
    /// Why sessions are pinned.
    pub pins: &'static [&'static str],
    /// Why connections are refused before a login.
    pub client_refused: &'static [&'static str],
    /// Why logins fail.
    pub login_failures: &'static [&'static str],
    /// What becomes of cancel requests.
    pub cancels: &'static [&'static str],
    /// Why statements are not let to the primary.
    pub gate_refused: &'static [&'static str],
    /// What sessions have that ends with their primary.
    pub sessions_ended: &'static [&'static str],
    /// What takes too long.
    pub timeouts: &'static [&'static str],
    /// Why backends are closed.
    pub backends_closed: &'static [&'static str],
    /// States of failover.
    pub failover_states: &'static [&'static str],
    /// Why failovers are blocked.
    pub failover_blocks: &'static [&'static str],
}

/// Why a primary is replaced: it is lost, or somebody asked.
const FAILOVER_REASONS: [&str; 2] = ["failover", "switchover"];
/// How that ends.
const FAILOVER_RESULTS: [&str; 2] = ["done", "given_up"];

/// Counters by a reason, looked up at each use; for events that are not on the way of every statement.
pub struct ReasonCounter(IntCounterVec);

impl ReasonCounter {
    /// Counts one. Costs a look-up by hash under a shared lock.
    pub fn inc(&self, reason: &'static str) {
        self.0.with_label_values(&[reason]).inc();
    }

    /// The count of `reason`.
    pub fn get(&self, reason: &'static str) -> u64 {
        self.0.with_label_values(&[reason]).get()
    }
}

/// Gauges by a reason, for what changes seldom.
pub struct ReasonGauge(IntGaugeVec);

impl ReasonGauge {
    /// One more.
    pub fn inc(&self, reason: &'static str) {
        self.0.with_label_values(&[reason]).inc();
    }

    /// One less.
    pub fn dec(&self, reason: &'static str) {
        self.0.with_label_values(&[reason]).dec();
    }
}

/// All metrics. Made once, shared by `Arc`.
pub struct Metrics {
    registry: Registry,
    /// By node; those that a reload adds come later.
    nodes: Box<[OnceLock<NodeSeries>]>,
    per_node: PerNode,
    labels: Labels,
    failover_phases: HistogramVec,
    failovers: IntCounterVec,
    detection: Histogram,
    write_unavailable: HistogramVec,
    /// Failovers that could not go on, by why.
    pub failover_blocks: ReasonCounter,
    waits: [Histogram; 5],
    /// Statements run again elsewhere, by why.
    pub redone: ReasonCounter,
    /// With `routing.shadow`: reads on the primary, by where they would have gone.
    pub shadow_reads: ReasonCounter,
    /// Pins set, by why.
    pub pins: ReasonCounter,
    /// Sessions bound to one backend now.
    pub pinned_sessions: IntGauge,
    /// Transactions that began without a backend.
    pub split_transactions: IntCounter,
    /// Of them: those that moved to the primary.
    pub moved_transactions: IntCounter,
    /// Backends that were given other settings for their next session.
    pub settings_replays: IntCounter,
    /// With `pool.share_unnamed`: unnamed Parses, by what became of them.
    pub unnamed_parses: ReasonCounter,
    /// Queries of ours ahead of a unit that a node refused.
    pub injected_failures: IntCounter,
    /// The same by why; a session may have several reasons.
    pub pinned_by: ReasonGauge,
    /// Client connections now.
    pub clients: IntGauge,
    /// Client connections accepted.
    pub clients_total: IntCounter,
    /// Client connections refused before a login, by why.
    pub client_refused: ReasonCounter,
    /// Logins that failed, by why.
    pub login_failures: ReasonCounter,
    /// Cancel requests, by what came of them.
    pub cancels: ReasonCounter,
    /// Clients ended for taking too long, by what for.
    pub timeouts: ReasonCounter,
    /// Connections that speak the replication protocol now.
    pub replication_connections: IntGauge,
    /// Connections to the admin console now.
    pub console_connections: IntGauge,
    /// Client connections ended for breaking the protocol.
    pub protocol_errors: IntCounter,
    /// Statements whose outcome could not be learned.
    pub unknown_outcomes: IntCounter,
    /// Statements that wait to be let to the primary.
    pub gate_waiting: IntGauge,
    /// Those that were not let there, by why.
    pub gate_refused: ReasonCounter,
    /// Sessions ended with their primary, by what they had there.
    pub sessions_ended: ReasonCounter,
    /// Sessions that were made to listen again on another backend.
    pub listens_resumed: IntCounter,
    /// Commits that the server says may not have been replicated.
    pub unreplicated_commits: IntCounter,
    /// Sessions told that an acknowledged write may have been lost in a failover.
    pub lost_write: IntCounter,
    /// Reads that waited because the primary had its share of reads that no replica could serve.
    pub primary_reads_queued: IntCounter,
    /// Of those, the ones that failed in the end.
    pub primary_reads_refused: IntCounter,
    /// Reloads of the configuration, by how they ended.
    pub reloads: ReasonCounter,
    /// Lines about single statements that were not logged, because there were too many.
    pub log_suppressed: IntCounter,
}

/// The families with a series for each node.
struct PerNode {
    statements: IntCounterVec,
    seconds: HistogramVec,
    opened: IntCounterVec,
    closed: IntCounterVec,
    full: IntCounterVec,
}

/// One node's series.
struct NodeSeries {
    name: String,
    /// `[class][reason]`, flattened.
    statements: Box<[IntCounter]>,
    seconds: Histogram,
    opened: IntCounter,
    full: IntCounter,
}

/// How reloads of the configuration end, as the metric labels it.
pub const RELOAD_LABELS: [&str; 2] = ["applied", "refused"];

fn register<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    let collector = made.expect("names and labels are constants that the tests have seen work");
    registry.register(Box::new(collector.clone())).expect("each name is registered once, as the tests show");
    collector
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    register(registry, IntCounter::new(name, help))
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(name, help), labels))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::new(name, help))
}

fn reason_gauge(registry: &Registry, name: &str, help: &str, values: &[&str]) -> ReasonGauge {
    let gauges = register(registry, IntGaugeVec::new(Opts::new(name, help), &["reason"]));
    for value in values {
        gauges.with_label_values(&[value]);
    }
    ReasonGauge(gauges)
}

fn histograms(registry: &Registry, name: &str, help: &str, label: &str) -> HistogramVec {
    let options = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
    register(registry, HistogramVec::new(options, &[label]))
}

impl Metrics {
    /// The nodes in the configuration's order, and all label values; [`statement`](Self::statement)
    /// takes indexes into `labels.classes` and `labels.reasons`.
    pub fn new(node_names: &[String], labels: &Labels) -> Metrics {
        let registry = Registry::new();
        let r = &registry;
        let statements = counters(
            r,
            "highwater_statements_total",
            "Statements that ran, by node, class and the reason of the route.",
            &["node", "class", "reason"],
        );
        let seconds = histograms(
            r,
            "highwater_statement_seconds",
            "Time from a statement's arrival to its end.",
            "node",
        );
        let wait = histograms(r, "highwater_wait_seconds", "Time statements waited, by what for.", "for");
        let opened =
            counters(r, "highwater_backends_opened_total", "Connections opened to a node.", &["node"]);
        let by_reason = |name: &str, help: &str, label: &str, values: &[&str]| {
            let counters = counters(r, name, help, &[label]);
            // A series that appears with its first event has no rate for that event: start at 0.
            for value in values {
                counters.with_label_values(&[value]);
            }
            ReasonCounter(counters)
        };
        let closed = counters(
            r,
            "highwater_backends_closed_total",
            "Connections to a node closed, by why.",
            &["node", "reason"],
        );
        let full = counters(
            r,
            "highwater_node_full_total",
            "Times a pool had to wait for a place on a full node (pool.max_backends_per_node).",
            &["node"],
        );
        let failover_phases = histograms(
            r,
            "highwater_failover_phase_seconds",
            "Time spent in a state of failover that has been left.",
            "phase",
        );
        for phase in labels.failover_states.iter().filter(|state| is_phase(state)) {
            failover_phases.with_label_values(&[phase]);
        }
        let failovers = counters(
            r,
            "highwater_failovers_total",
            "Replacements of the primary that were begun, by how they ended.",
            &["reason", "result"],
        );
        for reason in FAILOVER_REASONS {
            for result in FAILOVER_RESULTS {
                failovers.with_label_values(&[reason, result]);
            }
        }
        let detection = histograms(
            r,
            "highwater_detection_seconds",
            "From the first sign that the primary is gone to the start of its replacement.",
            "reason",
        );
        let detection = detection.with_label_values(&[FAILOVER_REASONS[0]]);
        let write_unavailable = histograms(
            r,
            "highwater_write_unavailable_seconds",
            "From the first sign, or the command, to a primary that takes writes.",
            "reason",
        );
        for reason in FAILOVER_REASONS {
            write_unavailable.with_label_values(&[reason]);
        }
        let build =
            register(r, IntGaugeVec::new(Opts::new("highwater_build_info", "Always 1."), &["version"]));
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let metrics = Metrics {
            nodes: (0..MAX_NODES).map(|_| OnceLock::new()).collect(),
            per_node: PerNode { statements, seconds, opened, closed, full },
            labels: *labels,
            waits: ["mark", "floor", "backend", "primary", "gate"].map(|w| wait.with_label_values(&[w])),
            redone: by_reason(
                "highwater_redone_total",
                "Statements run again on another node.",
                "reason",
                labels.redone,
            ),
            shadow_reads: by_reason(
                "highwater_shadow_reads_total",
                "With routing.shadow, reads that ran on the primary, by the reason of the route they would have had.",
                "reason",
                &[RouteReason::Read, RouteReason::Behind, RouteReason::NoReplica].map(RouteReason::label),
            ),
            pins: by_reason(
                "highwater_pins_total",
                "Sessions bound to one backend, by why.",
                "reason",
                labels.pins,
            ),
            pinned_sessions: gauge(r, "highwater_pinned_sessions", "Sessions bound to one backend now."),
            split_transactions: counter(
                r,
                "highwater_split_transactions_total",
                "Transactions that began without a backend (routing.transactions: split).",
            ),
            moved_transactions: counter(
                r,
                "highwater_moved_transactions_total",
                "Of these, those that moved to the primary.",
            ),
            settings_replays: counter(
                r,
                "highwater_settings_replays_total",
                "Backends that were given other settings for the session that used them next.",
            ),
            unnamed_parses: by_reason(
                "highwater_unnamed_parses_total",
                "With pool.share_unnamed: Parses of the unnamed statement, by what became of them.",
                "outcome",
                labels.unnamed,
            ),
            injected_failures: counter(
                r,
                "highwater_injected_failures_total",
                "Queries of the proxy's own ahead of a client's unit that a node refused.",
            ),
            pinned_by: reason_gauge(
                r,
                "highwater_pin_reasons",
                "Sessions bound to one backend now, by why; one may have several reasons.",
                labels.pins,
            ),
            clients: gauge(r, "highwater_clients", "Client connections now."),
            clients_total: counter(r, "highwater_clients_total", "Client connections accepted."),
            client_refused: by_reason(
                "highwater_client_refused_total",
                "Connections refused.",
                "reason",
                labels.client_refused,
            ),
            login_failures: by_reason(
                "highwater_login_failures_total",
                "Logins that failed.",
                "reason",
                labels.login_failures,
            ),
            cancels: by_reason(
                "highwater_cancels_total",
                "Cancel requests, by outcome.",
                "outcome",
                labels.cancels,
            ),
            timeouts: by_reason(
                "highwater_timeouts_total",
                "Clients ended for taking too long.",
                "reason",
                labels.timeouts,
            ),
            console_connections: gauge(
                r,
                "highwater_console_connections",
                "Connections to the admin console now.",
            ),
            replication_connections: gauge(
                r,
                "highwater_replication_connections",
                "Connections that speak the replication protocol now.",
            ),
            protocol_errors: counter(
                r,
                "highwater_protocol_errors_total",
                "Connections ended for breaking the protocol.",
            ),
            unknown_outcomes: counter(
                r,
                "highwater_unknown_outcomes_total",
                "Statements whose outcome is unknown.",
            ),
            gate_waiting: gauge(
                r,
                "highwater_gate_waiting",
                "Statements that wait to be let to the primary while it is being changed.",
            ),
            gate_refused: by_reason(
                "highwater_gate_refused_total",
                "Statements that were not let to the primary while it was being changed, by why.",
                "reason",
                labels.gate_refused,
            ),
            sessions_ended: by_reason(
                "highwater_sessions_ended_total",
                "Sessions ended because their primary was lost or left, by what they had there.",
                "reason",
                labels.sessions_ended,
            ),
            listens_resumed: counter(
                r,
                "highwater_listens_resumed_total",
                "Sessions that were made to listen again after their backend was lost.",
            ),
            unreplicated_commits: counter(
                r,
                "highwater_unreplicated_commits_total",
                "Commits whose wait for a synchronous replica was cancelled; told to the client as 08007.",
            ),
            lost_write: counter(r, "highwater_lost_write_total", "Sessions told of a possibly lost write."),
            primary_reads_queued: counter(
                r,
                "highwater_primary_reads_queued_total",
                "Reads above consistency.primary_read_cap that had to wait.",
            ),
            primary_reads_refused: counter(
                r,
                "highwater_primary_reads_refused_total",
                "Reads above consistency.primary_read_cap that failed.",
            ),
            reloads: by_reason(
                "highwater_reloads_total",
                "Reloads of the configuration.",
                "outcome",
                &RELOAD_LABELS,
            ),
            log_suppressed: counter(
                r,
                "highwater_log_suppressed_total",
                "Log lines about single statements above log.slow_per_second.",
            ),
            failovers,
            detection,
            write_unavailable,
            failover_blocks: by_reason(
                "highwater_failover_blocks_total",
                "Failovers that could not go on.",
                "reason",
                labels.failover_blocks,
            ),
            failover_phases,
            registry,
        };
        for (index, name) in node_names.iter().enumerate() {
            metrics.name_node(index, name);
        }
        metrics
    }

    /// The node at `index` has this name, for good: from now on it is counted.
    pub fn name_node(&self, index: usize, name: &str) {
        let Some(place) = self.nodes.get(index) else { return };
        place.get_or_init(|| {
            let pairs = self
                .labels
                .classes
                .iter()
                .flat_map(|class| self.labels.reasons.iter().map(move |reason| (*class, *reason)));
            let statements = pairs
                .map(|(class, reason)| self.per_node.statements.with_label_values(&[name, class, reason]));
            for reason in self.labels.backends_closed {
                self.per_node.closed.with_label_values(&[name, reason]);
            }
            NodeSeries {
                name: name.to_owned(),
                statements: statements.collect(),
                seconds: self.per_node.seconds.with_label_values(&[name]),
                opened: self.per_node.opened.with_label_values(&[name]),
                full: self.per_node.full.with_label_values(&[name]),
            }
        });
    }

    fn node(&self, node: NodeId) -> Option<&NodeSeries> {
        self.nodes.get(node.index())?.get()
    }

    /// Counts a statement; indexes into the lists given to [`new`](Self::new). Out of range: not counted.
    pub fn statement(&self, node: NodeId, class: usize, reason: usize) {
        let reasons = self.labels.reasons.len();
        if reason < reasons
            && let Some(counter) =
                self.node(node).and_then(|series| series.statements.get(class * reasons + reason))
        {
            counter.inc();
        }
    }

    /// Every count of [`statement`](Self::statement) so far, as (node, class, reason, count).
    pub fn statements_so_far(&self) -> impl Iterator<Item = (NodeId, &'static str, &'static str, u64)> {
        let (classes, reasons) = (self.labels.classes, self.labels.reasons);
        let pairs = classes.iter().flat_map(move |class| reasons.iter().map(move |reason| (*class, *reason)));
        (0u16..)
            .map(NodeId)
            .zip(&self.nodes)
            .filter_map(|(node, series)| Some((node, series.get()?)))
            .flat_map(move |(node, series)| {
                let counted = pairs.clone().zip(&series.statements);
                counted.map(move |((class, reason), counter)| (node, class, reason, counter.get()))
            })
    }

    /// Observes a statement's time on `node`.
    pub fn statement_took(&self, node: NodeId, time: Duration) {
        if let Some(series) = self.node(node) {
            series.seconds.observe(time.as_secs_f64());
        }
    }

    /// Observes a wait.
    pub fn waited(&self, what: WaitFor, time: Duration) {
        self.waits[what as usize].observe(time.as_secs_f64());
    }

    /// Counts a connection opened to `node`.
    pub fn backend_opened(&self, node: NodeId) {
        if let Some(series) = self.node(node) {
            series.opened.inc();
        }
    }

    /// Counts a connection to `node` closed.
    pub fn backend_closed(&self, node: NodeId, reason: &'static str) {
        if let Some(series) = self.node(node) {
            self.per_node.closed.with_label_values(&[series.name.as_str(), reason]).inc();
        }
    }

    /// A lost primary is being replaced, so long after the first sign.
    pub fn failover_begun(&self, detected_after: Duration) {
        self.detection.observe(detected_after.as_secs_f64());
    }

    /// A replacement of the primary is over; `took`: it was done, and nothing could be written for so long.
    pub fn failover_ended(&self, planned: bool, took: Option<Duration>) {
        let reason = FAILOVER_REASONS[usize::from(planned)];
        let result = FAILOVER_RESULTS[usize::from(took.is_none())];
        self.failovers.with_label_values(&[reason, result]).inc();
        if let Some(took) = took {
            self.write_unavailable.with_label_values(&[reason]).observe(took.as_secs_f64());
        }
    }

    /// Counts a pool that found its node full.
    pub fn node_full(&self, node: NodeId) {
        if let Some(series) = self.node(node) {
            series.full.inc();
        }
    }

    /// Observes how long a state of failover has lasted.
    pub fn failover_phase(&self, phase: &'static str, time: Duration) {
        if is_phase(phase) {
            self.failover_phases.with_label_values(&[phase]).observe(time.as_secs_f64());
        }
    }

    /// All metrics in Prometheus's text format. Metrics that nothing has touched yet are left out.
    pub fn render(&self, scrape: &Scrape<'_>) -> String {
        let now = Registry::new();
        topology_metrics(&now, scrape.topology);
        self.failover_metrics(&now, &scrape.failover);
        let names = |node: NodeId| self.node(node).map(|series| series.name.as_str());
        pool_metrics(&now, &names, scrape.pools);
        let cache = scrape.class_cache;
        counter(&now, "highwater_class_cache_hits_total", "Look-ups that found their statement.")
            .inc_by(cache.hits);
        counter(&now, "highwater_class_cache_misses_total", "Look-ups that did not.").inc_by(cache.misses);
        counter(&now, "highwater_parsers_replaced_total", "Threads of the second parser that hung.")
            .inc_by(cache.replaced_parsers);
        let samples =
            counters(&now, "highwater_samples_total", "Samples of a node's WAL position.", &["node"]);
        for (node, count) in self.nodes.iter().map_while(OnceLock::get).zip(scrape.samples) {
            samples.with_label_values(&[node.name.as_str()]).inc_by(*count);
        }
        let clocks = register(
            &now,
            GaugeVec::new(
                Opts::new("highwater_node_clock_offset_seconds", "The node's clock less the primary's."),
                &["node"],
            ),
        );
        for (node, offset) in self.nodes.iter().map_while(OnceLock::get).zip(scrape.clock_offsets) {
            if let Some(offset) = offset {
                clocks.with_label_values(&[node.name.as_str()]).set(*offset);
            }
        }
        counter(&now, "highwater_topology_changes_total", "Changes of the topology.")
            .inc_by(scrape.topology_changes);
        let primary = scrape.topology.primary.and_then(|id| *scrape.sample_ages.get(id.index())?);
        if let Some(age) = primary {
            let name = "highwater_primary_lsn_sample_age_seconds";
            let made: Gauge =
                register(&now, Gauge::new(name, "How long ago the primary's position was seen."));
            made.set(age.as_secs_f64());
        }
        let mut families = self.registry.gather();
        families.extend(now.gather());
        // A family without a sample is an error to the encoder.
        families.retain(|family| !family.get_metric().is_empty());
        // Most of the table of statements is never used: a reader is not made to carry the zeros.
        for family in &mut families {
            if family.name() == "highwater_statements_total" {
                let mut used = family.take_metric();
                used.retain(|m| m.get_counter().get_value() > 0.0);
                family.set_metric(used);
            }
        }
        families.retain(|family| !family.get_metric().is_empty());
        let mut text = Vec::new();
        match TextEncoder::new().encode(&families, &mut text) {
            Ok(()) => String::from_utf8_lossy(&text).into_owned(),
            Err(e) => format!("# metrics could not be written: {}\n", e.to_string().replace('\n', " ")),
        }
    }
}

impl Metrics {
    fn failover_metrics(&self, now: &Registry, figures: &FailoverFigures) {
        let gauges = |name: &str, help: &str, label: &str| -> IntGaugeVec {
            register(now, IntGaugeVec::new(Opts::new(name, help), &[label]))
        };
        let states = gauges("highwater_failover_state", "1 at the state that failover is in.", "state");
        for state in self.labels.failover_states {
            states.with_label_values(&[state]).set(i64::from(*state == figures.state));
        }
        let blocked = gauges("highwater_failover_blocked", "1 at what a failover waits for.", "reason");
        for reason in self.labels.failover_blocks {
            blocked.with_label_values(&[reason]).set(i64::from(Some(*reason) == figures.blocked));
        }
        let kept_out = gauges("highwater_quarantined_nodes", "Nodes that must be repaired.", "reason");
        for reason in [Quarantine::OldPrimary, Quarantine::Diverged].map(Quarantine::label) {
            let count = figures.quarantined.iter().filter(|why| **why == reason).count();
            kept_out.with_label_values(&[reason]).set(as_gauge(count as u64));
        }
        gauge(now, "highwater_lost_acked_bytes_min", "WAL of acknowledged writes lost, at least.")
            .set(as_gauge(figures.lost_acked_bytes_min.unwrap_or(0)));
        gauge(now, "highwater_sync_state", "1: acknowledged writes survive the primary; 0: they may not.")
            .set(i64::from(figures.sync == Some(true)));
        if let Some(figures) = &figures.coordination {
            for (name, help, value) in [
                ("highwater_dcs_up", "1: etcd has answered when it was asked last.", figures.up),
                ("highwater_dcs_leader", "1: this proxy leads: it decides on failovers.", figures.leads),
                (
                    "highwater_dcs_lease",
                    "1: its lease holds; 0: it sends nothing to the primary.",
                    figures.valid,
                ),
            ] {
                gauge(now, name, help).set(i64::from(value));
            }
            gauge(now, "highwater_dcs_proxies", "Proxies that share the cluster and are there.")
                .set(as_gauge(figures.proxies as u64));
        }
        gauge(
            now,
            "highwater_slot_wal_bytes",
            "The most WAL that one of Highwater's replication slots holds.",
        )
        .set(as_gauge(figures.slots_held));
    }
}

/// How long it was well is no figure of a failover.
fn is_phase(state: &str) -> bool {
    !matches!(state, "healthy" | "starting" | "following")
}

fn as_gauge(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn topology_metrics(now: &Registry, topology: &Topology) {
    let gauges = |name: &str, help: &str, labels: &[&str]| -> GaugeVec {
        register(now, GaugeVec::new(Opts::new(name, help), labels))
    };
    let up = gauges("highwater_node_up", "1: the node answers its probes.", &["node"]);
    let role = gauges("highwater_node_role", "1 at the role the node has.", &["node", "role"]);
    let bytes = gauges("highwater_replica_replay_lag_bytes", "WAL not yet replayed.", &["node"]);
    let seconds = gauges("highwater_replica_replay_lag_seconds", "Age of what is replayed.", &["node"]);
    let rate =
        gauges("highwater_replica_replay_bytes_per_second", "Pace of replay with a backlog.", &["node"]);
    let catch_up = gauges("highwater_replica_catch_up_seconds", "Time to the primary's position.", &["node"]);
    let paused = gauges("highwater_replica_replay_paused", "1: replay is paused.", &["node"]);
    let delay = gauges("highwater_replica_apply_delay_seconds", "recovery_min_apply_delay.", &["node"]);
    let conflicts = gauges(
        "highwater_replica_conflicts",
        "Queries that replay has cancelled, as the node counts them.",
        &["node"],
    );
    for node in topology.members() {
        let name: &str = &node.name;
        if let Some(recovery) = node.recovery {
            paused.with_label_values(&[name]).set(f64::from(u8::from(recovery.paused)));
            delay.with_label_values(&[name]).set(recovery.apply_delay.as_secs_f64());
            conflicts.with_label_values(&[name]).set(recovery.conflicts as f64);
        }
        up.with_label_values(&[name]).set(f64::from(u8::from(is_up(&node.standing))));
        let now_is = role_label(&node.standing);
        for word in ["primary", "replica", "excluded"] {
            role.with_label_values(&[name, word]).set(f64::from(u8::from(word == now_is)));
        }
        if let Some(lag) = node.replay_lag_bytes {
            bytes.with_label_values(&[name]).set(lag as f64);
        }
        if let Some(lag) = node.replay_lag {
            seconds.with_label_values(&[name]).set(lag.as_secs_f64());
        }
        if let Some(bytes) = node.replay_rate {
            rate.with_label_values(&[name]).set(bytes as f64);
        }
        if let Some(time) = node.catch_up {
            catch_up.with_label_values(&[name]).set(time.as_secs_f64());
        }
    }
    let second = |node: &&crate::topology::NodeView| {
        node.standing == Standing::Excluded(crate::topology::Exclusion::SecondPrimary)
    };
    gauge(now, "highwater_split_brain", "Nodes that take writes and are not the primary.")
        .set(as_gauge(topology.nodes.iter().filter(second).count() as u64));
    gauge(now, "highwater_epoch", "Write targets this proxy has had.").set(as_gauge(topology.epoch.0));
    if let Some(timeline) = topology.timeline {
        let made: Gauge = register(now, Gauge::new("highwater_timeline", "The primary's timeline."));
        made.set(f64::from(timeline.0));
    }
}

fn pool_metrics<'n>(now: &Registry, names: &dyn Fn(NodeId) -> Option<&'n str>, pools: &'n [PoolFigure]) {
    let mut named: Vec<(&str, &str)> = pools.iter().map(|p| (p.database.as_str(), p.user.as_str())).collect();
    named.sort_unstable();
    named.dedup();
    named.truncate(MAX_POOL_LABELS);
    let mut sums: BTreeMap<[&str; 4], u64> = BTreeMap::new();
    for pool in pools {
        let Some(node) = names(pool.node) else { continue };
        let pair = (pool.database.as_str(), pool.user.as_str());
        let (database, user) = if named.binary_search(&pair).is_ok() { pair } else { ("other", "other") };
        let sum = sums.entry([node, database, user, pool.state]).or_default();
        *sum = sum.saturating_add(pool.backends);
    }
    let options = Opts::new("highwater_pool_backends", "Backends of the pools, by state.");
    let vec = register(now, IntGaugeVec::new(options, &["node", "database", "user", "state"]));
    for (labels, sum) in sums {
        vec.with_label_values(&labels).set(as_gauge(sum));
    }
}

/// Whether a node in this standing answered its last probe.
pub fn is_up(standing: &Standing) -> bool {
    use crate::topology::Exclusion::{Ejected, NotProbed, Unreachable};
    match standing {
        Standing::Primary { reachable } => *reachable,
        Standing::Replica => true,
        Standing::Excluded(NotProbed | Unreachable(_) | Ejected(_)) => false,
        Standing::Excluded(_) => true,
    }
}

/// `primary`, `replica` or `excluded`.
pub fn role_label(standing: &Standing) -> &'static str {
    match standing {
        Standing::Primary { .. } => "primary",
        Standing::Replica => "replica",
        Standing::Excluded(_) => "excluded",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::topology::{Epoch, Exclusion, NodeView};
    use crate::wal::TimelineId;

    pub(crate) fn topology(standings: Vec<Standing>) -> Topology {
        let primary = standings.iter().position(|s| matches!(s, Standing::Primary { .. }));
        let view = |(i, standing): (usize, Standing)| NodeView {
            id: NodeId(i as u16),
            name: format!("n{i}").into(),
            weight: 1,
            zone: None,
            replay_lag_bytes: (standing == Standing::Replica).then_some(4096),
            replay_lag: (standing == Standing::Replica).then_some(Duration::from_millis(250)),
            standing,
            timeline: Some(TimelineId(3)),
            server_major: Some(15),
            recovery: None,
            replay_rate: None,
            catch_up: None,
        };
        Topology {
            epoch: Epoch(2),
            system_identifier: Some(7),
            primary: primary.map(|i| NodeId(i as u16)),
            timeline: primary.map(|_| TimelineId(3)),
            nodes: standings.into_iter().enumerate().map(view).collect(),
            start: None,
            history: None,
            switches: Vec::new(),
        }
    }

    #[test]
    fn a_scrape_shows_counts_topology_and_pools() {
        let names = ["n0".to_owned(), "n1".to_owned(), "n2".to_owned()];
        let labels = Labels {
            classes: &["read", "write"],
            reasons: &["mark_reached", "write", "unclear"],
            redone: &["read_only", "conflict"],
            ..Labels::default()
        };
        let metrics = Metrics::new(&names, &labels);
        metrics.statement(NodeId(1), 1, 2);
        metrics.statement(NodeId(1), 1, 2);
        metrics.statement(NodeId(1), 0, 3);
        metrics.statement(NodeId(9), 0, 0);
        metrics.statement_took(NodeId(1), Duration::from_micros(200));
        metrics.waited(WaitFor::Primary, Duration::from_secs(1));
        metrics.redone.inc("read_only");
        metrics.backend_opened(NodeId(0));
        metrics.backend_closed(NodeId(0), "idle");
        let topology = topology(vec![
            Standing::Primary { reachable: true },
            Standing::Replica,
            Standing::Excluded(Exclusion::Unreachable("refused".to_owned())),
        ]);
        let pools: Vec<PoolFigure> = (0..150)
            .map(|i| PoolFigure {
                node: NodeId(0),
                database: format!("d{i:03}"),
                user: "u".to_owned(),
                state: "idle",
                backends: 2,
            })
            .collect();
        let class_cache = ClassCacheFigures { hits: 5, misses: 1, replaced_parsers: 0 };
        let samples = [4, 5, 6];
        let text = metrics.render(&Scrape {
            topology: &topology,
            pools: &pools,
            class_cache,
            samples: &samples,
            clock_offsets: &[Some(0.0), Some(-0.25), None],
            topology_changes: 3,
            sample_ages: &[Some(Duration::from_millis(1500)), None, None],
            failover: FailoverFigures {
                state: "healthy",
                quarantined: vec!["diverged"],
                ..FailoverFigures::default()
            },
        });
        for line in [
            "highwater_statements_total{class=\"write\",node=\"n1\",reason=\"unclear\"} 2",
            "highwater_statement_seconds_bucket{node=\"n1\",le=\"0.00025\"} 1",
            "highwater_wait_seconds_count{for=\"primary\"} 1",
            "highwater_redone_total{reason=\"read_only\"} 1",
            "highwater_redone_total{reason=\"conflict\"} 0",
            "highwater_backends_closed_total{node=\"n0\",reason=\"idle\"} 1",
            "highwater_samples_total{node=\"n2\"} 6",
            "highwater_topology_changes_total 3",
            "highwater_node_clock_offset_seconds{node=\"n1\"} -0.25",
            "highwater_primary_lsn_sample_age_seconds 1.5",
            "highwater_node_up{node=\"n2\"} 0",
            "highwater_node_role{node=\"n0\",role=\"primary\"} 1",
            "highwater_replica_replay_lag_bytes{node=\"n1\"} 4096",
            "highwater_replica_replay_lag_seconds{node=\"n1\"} 0.25",
            "highwater_quarantined_nodes{reason=\"diverged\"} 1",
            "highwater_split_brain 0",
            "highwater_epoch 2",
            "highwater_timeline 3",
            "highwater_pool_backends{database=\"other\",node=\"n0\",state=\"idle\",user=\"other\"} 100",
            "highwater_class_cache_hits_total 5",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
        assert_eq!(text.matches("highwater_statements_total{").count(), 1);
        assert_eq!(text.matches("highwater_pool_backends{").count(), MAX_POOL_LABELS + 1);
    }
}
