//! The control loop: the only writer of the topology.
//!
//! Samplers and probes run beside it and report; after each report it decides anew what to believe of
//! the cluster, by a pure function, and publishes what has changed. One log line for each event that an
//! operator acts on.
//!
//! Promises: one primary per epoch at most; another one is believed only if it belongs to the same
//! cluster and writes a later timeline, or is the one that `failover` has just promoted; a primary that
//! cannot be reached stays the only write target until then; an old one that comes back is never used.
//! Whether to promote, and how, is decided in `failover`: it hears here what is observed, and while it
//! is at work nothing else is believed in.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep_until};

use crate::config::live::LiveConfig;
use crate::config::{Config, FailoverMode, NodeConfig};
use crate::failover::coordination::Seen as Others;
use crate::failover::event::{Event as Happening, Fact, Loss, Role, Seen as FactSeen, Target, Walreceiver};
use crate::failover::record::{Forked, Record};
use crate::failover::shell::several::news;
use crate::failover::shell::{Ears, Outcome, Shell, StateError};
use crate::gate::Gate;
use crate::metrics::Metrics;
use crate::monitor::clock::{self, Clocks};
use crate::monitor::health::{Answering, Health, HealthSettings};
use crate::monitor::lag::{LagTime, ReplayLag};
use crate::monitor::probe::{Observation, Seen};
use crate::monitor::sample::PrimaryTrack;
use crate::monitor::stream::Alive;
use crate::monitor::watch::{Givens, Watch};
use crate::node::{NodeError, NodeFailure, Nodes, ProbedRole, Receiver};
use crate::positions::{Positions, SampleBody};
use crate::topology::{
    Epoch, Exclusion, NodeId, NodeView, Quarantine, Standing, Switch, Topology, TopologyHandle,
};
use crate::wal::{Lsn, TimelineId};

pub mod members;

use self::members::Members;

pub use crate::failover::event::Command;
pub use crate::failover::shell::{Answer, Commands, Status};

/// How often failover looks at the time while something is under way.
const FAILOVER_TICK: Duration = Duration::from_millis(50);
/// How many ends of epochs a topology remembers.
const MAX_SWITCHES: usize = 16;
/// Reports of sessions that wait to be taken; more say nothing new.
const REPORT_QUEUE: usize = 64;
/// The least time between two reports of sessions on one node.
const REPORT_GAP_MS: u64 = 20;
/// Pooled control connections that nobody has used for so long are closed.
const POOL_IDLE: Duration = Duration::from_secs(60);

/// The running control loop. Dropping it stops the loop, its samplers and its probes.
pub struct Control {
    reports: Reports,
    members: Members,
    commands: Commands,
    _tasks: JoinSet<()>,
}

impl Control {
    /// For sessions: where to tell of a node that failed them.
    pub fn reports(&self) -> Reports {
        self.reports.clone()
    }

    /// For reloads: where another configuration is put in force.
    pub fn members(&self) -> Members {
        self.members.clone()
    }

    /// For operators' tools: where to give commands.
    pub fn commands(&self) -> Commands {
        self.commands.clone()
    }
}

/// Where sessions tell that a node failed them. Cheap to clone and to call; never waits.
#[derive(Clone)]
pub struct Reports {
    queue: mpsc::Sender<Report>,
    started: Instant,
    last_ms: Arc<[AtomicU64]>,
}

struct Report {
    node: NodeId,
    kind: NodeFailure,
}

impl Reports {
    /// A session's connection to `node` was refused or broke. The node is probed at once; a refused
    /// connection ejects it by itself. Reports on one node that come closer together than 20 ms, or find
    /// the queue full, are left out: a probe is on its way already.
    pub fn report_failure(&self, node: NodeId, kind: NodeFailure) {
        let Some(last) = self.last_ms.get(node.index()) else {
            return;
        };
        let now = u64::try_from(self.started.elapsed().as_millis())
            .unwrap_or(u64::MAX)
            .saturating_add(REPORT_GAP_MS);
        let before = last.load(Ordering::Relaxed);
        let due = now >= before.saturating_add(REPORT_GAP_MS);
        if due && last.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            let _ = self.queue.try_send(Report { node, kind });
        }
    }
}

/// Starts samplers, probes and the loop on the current tokio runtime.
///
/// `topology` must hold [`Topology::initial`] of the same configuration, and `positions` as many nodes. Fails when
/// `failover.state_dir` cannot be used.
pub fn start(
    config: Arc<LiveConfig>,
    nodes: Arc<Nodes>,
    topology: Arc<TopologyHandle>,
    positions: Arc<Positions>,
    gate: Arc<Gate>,
    metrics: Arc<Metrics>,
) -> Result<Control, StateError> {
    let now = config.load_full();
    let (shell, ears, commands) = Shell::open(&config, &nodes, &gate)?;
    let remembered = remember(&topology.load(), shell.machine().record());
    if let Some(remembered) = remembered {
        topology.publish(remembered);
    }
    let places = now.places();
    let track = Arc::new(PrimaryTrack::new(members::keep_positions(&now)));
    // A remembered epoch has begun already: lags count from now, without waiting for the next one.
    track.begin(topology.load().epoch);
    let (send_observation, observations) = mpsc::channel(places * 2);
    let (send_report, reports) = mpsc::channel(REPORT_QUEUE);
    let (members, changes) = Members::new();
    let mut watch = Watch::new(Givens {
        config: Arc::clone(&config),
        nodes: Arc::clone(&nodes),
        topology: Arc::clone(&topology),
        positions: Arc::clone(&positions),
        track: Arc::clone(&track),
        observations: send_observation,
    });
    let count = topology.load().nodes.len();
    (0u16..).map(NodeId).take(count).for_each(|id| watch.start(id));
    let facts = now.nodes.iter().take(count).map(NodeFacts::of).collect();
    let clocks = Clocks::new(places, Instant::now());
    let state =
        Loop { config, shell, metrics, gate, facts, clocks, nodes, topology, positions, track, watch };
    let mut tasks = JoinSet::new();
    tasks.spawn(state.run(observations, reports, changes, ears));
    let last_ms = (0..places).map(|_| AtomicU64::new(0)).collect();
    let reports = Reports { queue: send_report, started: Instant::now(), last_ms };
    Ok(Control { reports, members, commands, _tasks: tasks })
}

/// What an earlier process knew: its write target stays the only one, whoever comes back first.
fn remember(initial: &Topology, record: &Record) -> Option<Topology> {
    let primary = record.primary.filter(|primary| primary.index() < initial.nodes.len())?;
    let mut next = initial.clone();
    next.epoch = record.epoch;
    next.primary = Some(primary);
    next.timeline = record.timeline;
    next.system_identifier = record.system_identifier;
    next.nodes[primary.index()].standing = Standing::Primary { reachable: false };
    Some(next)
}

struct Loop {
    config: Arc<LiveConfig>,
    shell: Shell,
    metrics: Arc<Metrics>,
    gate: Arc<Gate>,
    facts: Vec<NodeFacts>,
    clocks: Clocks,
    nodes: Arc<Nodes>,
    topology: Arc<TopologyHandle>,
    positions: Arc<Positions>,
    track: Arc<PrimaryTrack>,
    watch: Watch,
}

impl Loop {
    async fn run(
        mut self,
        mut observations: mpsc::Receiver<Observation>,
        mut reports: mpsc::Receiver<Report>,
        mut changes: mpsc::Receiver<members::Change>,
        mut ears: Ears,
    ) {
        let mut looks = interval(FAILOVER_TICK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut swept = Instant::now();
        let mut ticked = tokio::time::Instant::now();
        loop {
            tokio::select! {
                Some(observation) = observations.recv() => self.take_observation(observation),
                Some(report) = reports.recv() => self.take_report(&report),
                Some(change) = changes.recv() => self.take_change(change, &mut observations),
                Some(heard) = ears.events.recv() => {
                    let outcomes = self.shell.hear(heard);
                    self.take_outcomes(outcomes);
                }
                seen = news(&mut ears.seen) => self.take_news(&seen),
                Some((command, reply)) = ears.commands.recv() => {
                    let outcomes = self.shell.command(command, reply);
                    self.take_outcomes(outcomes);
                }
                _ = looks.tick() => if !self.shell.is_calm() { self.look() },
                // Time alone changes things too: ejections end, lags grow.
                () = sleep_until(ticked + self.tick()) => {
                    ticked = tokio::time::Instant::now();
                    self.look();
                }
            }
            self.decide();
            if swept.elapsed() >= POOL_IDLE {
                self.nodes.close_idle(POOL_IDLE);
                swept = Instant::now();
            }
        }
    }

    fn tick(&self) -> Duration {
        self.config.load().failover.check_interval.max(Duration::from_millis(10))
    }

    fn take_observation(&mut self, observation: Observation) {
        let now = Instant::now();
        let health = HealthSettings::of(&self.config.load());
        if self.facts.get(observation.node.index()).is_none_or(|facts| facts.removed) {
            return;
        }
        if self.facts.get(observation.node.index()).is_some() {
            let fact = self.fact(&observation.result);
            self.tell(Happening::Observed { node: observation.node, fact });
        }
        let Some(facts) = self.facts.get_mut(observation.node.index()) else {
            return;
        };
        if let Some(reading) = observation.clock {
            self.clocks.observe(observation.node.index(), reading);
        }
        match observation.result {
            // Asked before it was promoted: it speaks of another time.
            _ if facts.promoted.is_some_and(|at| observation.asked_at < at) => {}
            // One session was ended, so far: the next probe tells.
            Err(error) if error.kind == NodeFailure::ShuttingDown => {}
            Ok(seen) => {
                facts.promoted = None;
                facts.health.answered(health, now);
                if let ProbedRole::Primary { insert, timeline, .. } = seen.answer.role {
                    let topology = self.topology.load();
                    if topology.primary == Some(observation.node) && topology.timeline == Some(timeline) {
                        self.track.record(topology.epoch, insert, observation.asked_at);
                        self.positions.node(observation.node).seen(observation.asked_at);
                    }
                }
                facts.seen = Some(seen);
            }
            Err(error) => {
                facts.promoted = None;
                tracing::debug!(%error, kind = error.kind.label(), "probe failed");
                facts.health.failed(&error, health, now);
            }
        }
    }

    /// A probe's result, as failover has it.
    fn fact(&self, result: &Result<Seen, NodeError>) -> Fact {
        let seen = match result {
            Ok(seen) => seen,
            Err(error) => {
                return match error.kind {
                    NodeFailure::Refused => Fact::Refused,
                    NodeFailure::Timeout => Fact::Silent,
                    NodeFailure::Starting => Fact::Starting,
                    NodeFailure::ShuttingDown => Fact::ShuttingDown,
                    NodeFailure::Broken => Fact::Broken,
                    NodeFailure::Answered => Fact::Alive(error.cause.clone()),
                };
            }
        };
        let known = self.topology.load().timeline;
        let role = match &seen.answer.role {
            ProbedRole::Primary { insert, timeline, .. } => Role::Primary {
                timeline: *timeline,
                insert: *insert,
                fork: known.and_then(|known| seen.history.as_ref()?.fork_of(known)),
            },
            ProbedRole::Replica { positions, walreceiver, receiver, .. } => Role::Standby {
                timeline: seen.timeline,
                receive: positions.receive,
                replay: positions.replay,
                walreceiver: receiver.as_ref().map(|receiver| Walreceiver {
                    pid: receiver.pid,
                    streaming: walreceiver.as_deref() == Some("streaming"),
                    timeline: positions.received_timeline.unwrap_or(TimelineId(0)),
                    from: sender(&self.config.load().nodes, receiver),
                }),
            },
        };
        let start = seen.start.as_ref().map(|start| Arc::clone(&start.id));
        Fact::Answered(FactSeen { system_identifier: seen.answer.system_identifier, start, role })
    }

    /// Of several proxies: what the others say, and whether this one leads.
    fn take_news(&mut self, seen: &Arc<Others>) {
        let primary = self.topology.load().primary;
        let led = self.shell.acts();
        let outcomes = self.shell.take_seen(seen, primary);
        self.take_outcomes(outcomes);
        self.shell.resume();
        if self.shell.acts() && !led {
            // Who leads from now on has seen nothing yet.
            self.watch.probe_all();
        }
    }

    /// Another proxy, or this one in another life, has recorded this.
    fn take_known(&mut self, record: &Record, kept: bool) {
        let before = self.topology.load_full();
        let next = match before.primary {
            None => remember(&before, record),
            Some(_) => successor(&before, record, kept, self.track.last_sample()),
        };
        let successor = next.as_ref().filter(|_| before.primary.is_some()).and_then(|next| next.primary);
        if let Some(facts) = successor.and_then(|primary| self.facts.get_mut(primary.index())) {
            facts.promoted = Some(Instant::now());
        }
        if let Some(next) = next {
            self.publish(&before, next);
        }
    }

    /// Failover hears it, and what it wants of this loop is done.
    fn tell(&mut self, happening: Happening) {
        let outcomes = self.shell.step(happening);
        self.take_outcomes(outcomes);
    }

    /// Time has passed; and perhaps writes were acknowledged, which a failover must not forget.
    fn look(&mut self) {
        let primary = self.topology.load().primary;
        if let Some(past) = primary.and_then(|primary| self.positions.node(primary).take_acknowledged()) {
            self.tell(Happening::Acknowledged(past));
        }
        self.tell(Happening::Tick);
    }

    fn take_outcomes(&mut self, outcomes: Vec<Outcome>) {
        for outcome in outcomes {
            match outcome {
                Outcome::Probe(node) => self.watch.probe(node),
                Outcome::Known { record, kept } => self.take_known(&record, kept),
                Outcome::Left(state, time) => self.metrics.failover_phase(state, time),
                Outcome::Blocked(reason) => self.metrics.failover_blocks.inc(reason),
                Outcome::Begun(after) => self.metrics.failover_begun(after),
                Outcome::Ended { planned, took } => self.metrics.failover_ended(planned, took),
                Outcome::Publish(target) => {
                    let before = self.topology.load_full();
                    let mut next = (*before).clone();
                    take_target(&mut next, &target, self.track.last_sample());
                    if let Some(facts) = self.facts.get_mut(target.primary.index()) {
                        facts.promoted = Some(Instant::now());
                    }
                    self.publish(&before, next);
                }
            }
        }
        self.shell.send_answers();
    }

    /// Failover hears of a write target that it has not made.
    fn tell_of_primary(&mut self) {
        let topology = self.topology.load_full();
        let record = self.shell.machine().record();
        let (Some(primary), Some(timeline), Some(system_identifier)) =
            (topology.primary, topology.timeline, topology.system_identifier)
        else {
            return;
        };
        let known = record.primary == Some(primary) && record.epoch >= topology.epoch;
        if !self.shell.acts() || known || !self.shell.machine().may_adopt() {
            return;
        }
        let last = topology.switches.last().filter(|s| s.old_primary != primary);
        let forked = last.and_then(|s| {
            Some(Forked { old_primary: s.old_primary, old_timeline: s.old_timeline, fork: s.fork? })
        });
        let epoch = topology.epoch;
        self.tell(Happening::Adopted { primary, timeline, epoch, system_identifier, forked });
    }

    fn take_report(&mut self, report: &Report) {
        let index = report.node.index();
        if report.kind == NodeFailure::Refused
            && let Some(facts) = self.facts.get_mut(index)
        {
            let error = NodeError {
                node: self.nodes.name(report.node),
                cause: "it refused a session's connection".to_owned(),
                kind: report.kind,
            };
            facts.health.failed(&error, HealthSettings::of(&self.config.load()), Instant::now());
        }
        self.watch.probe(report.node);
    }

    fn decide(&mut self) {
        let now = Instant::now();
        let before = self.topology.load_full();
        for (id, facts) in (0u16..).map(NodeId).zip(&mut self.facts) {
            let sample = self.positions.node(id).latest().filter(|s| s.epoch == before.epoch);
            let sampled = match sample.map(|s| s.body) {
                Some(SampleBody::Replica { replay, .. }) => Some(replay),
                _ => None,
            };
            let primary = self.track.last_sample().map(|(_, insert)| insert);
            facts.pace = sample.zip(primary).and_then(|(sample, insert)| pace(&sample.body, insert));
            // An idle sampler asks more seldom than the probe.
            facts.replay = sampled.max(facts.seen.as_ref().and_then(probed_replay));
            facts.lag = facts.replay.and_then(|replay| self.track.lag(replay, now));
            facts.alive = self.track.alive().filter(|_| before.primary == Some(id));
            facts.quarantine = self.shell.machine().quarantine(id);
        }
        self.shell.reaches(any_answers(&self.facts));
        let hold = self.shell.acts() && !self.shell.machine().may_adopt();
        let policy = Policy { hold, follows: self.shell.follows(), ..Policy::of(&self.config.load()) };
        let next = decide(&before, &self.facts, &policy, self.track.last_sample(), now);
        self.compare_clocks(next.primary, now);
        if has_reachable_primary(&next) {
            // A replica that only waits to be measured need not wait for the next round of probes.
            for view in next.nodes.iter().filter(|v| v.standing == Standing::Excluded(Exclusion::LagUnknown))
            {
                self.watch.probe(view.id);
            }
        }
        if next != *before {
            self.publish(&before, next);
        }
        self.tell_of_primary();
    }

    fn publish(&mut self, before: &Topology, next: Topology) {
        for event in events(before, &next) {
            event.log();
        }
        let (epoch, primary) = (next.epoch, next.primary);
        let new_epoch = epoch != before.epoch;
        if new_epoch {
            self.track.begin(epoch);
            for view in &next.nodes {
                // Of an earlier time as primary, on another timeline.
                self.positions.node(view.id).take_acknowledged();
            }
        }
        if new_epoch && let Some(old) = before.primary {
            // Before anybody can act on the new one: whatever the old one still says is not passed on.
            self.gate.close_sockets(old);
        }
        self.gate.leads_to(primary);
        self.topology.publish(next);
        if new_epoch {
            // Samples carry the epoch, and lags start anew: both are needed at once.
            if let Some(primary) = primary {
                self.positions.node(primary).want();
            }
            self.watch.probe_all();
        }
        // Whoever waits for a position decides anew whether to.
        self.positions.wake_all();
    }
}

impl Loop {
    /// Tells sessions whose clock reads must not go by.
    fn compare_clocks(&self, primary: Option<NodeId>, now: Instant) {
        let tolerance = self.config.load().consistency.clock_tolerance;
        for id in (0u16..).map(NodeId).take(self.facts.len()) {
            let offset = primary.and_then(|primary| self.clocks.offset(id.index(), primary.index(), now));
            let late = clock::is_late(offset, tolerance);
            self.positions.node(id).set_clock(offset, late);
        }
    }
}

fn has_reachable_primary(topology: &Topology) -> bool {
    topology.nodes.iter().any(|view| view.standing == Standing::Primary { reachable: true })
}

/// How fast a replica replays, and how long it will take to where the primary was.
fn pace(body: &SampleBody, primary: Lsn) -> Option<Pace> {
    let SampleBody::Replica { replay, late, .. } = body else { return None };
    let catch_up = if *replay >= primary { Duration::ZERO } else { body.catch_up(primary) };
    Some(Pace { rate: late.rate, catch_up: (catch_up < Duration::MAX).then_some(catch_up) })
}

fn probed_replay(seen: &Seen) -> Option<Lsn> {
    match &seen.answer.role {
        ProbedRole::Replica { positions, .. } => positions.replay,
        ProbedRole::Primary { .. } => None,
    }
}

/// The part of the configuration that the decision goes by.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Whether another primary may be believed.
    pub mode: FailoverMode,
    /// A replica further behind serves nothing.
    pub max_lag: Duration,
    /// Failover is at work: until it publishes, nobody else is believed to be the primary.
    pub hold: bool,
    /// Another proxy leads: it says who the primary is, once there is one.
    pub follows: bool,
}

impl Policy {
    /// What the configuration says.
    pub fn of(config: &Config) -> Policy {
        Policy {
            mode: config.failover.mode,
            max_lag: config.consistency.max_lag,
            hold: false,
            follows: false,
        }
    }
}

/// What is known of one node.
#[derive(Clone, Debug, Default)]
pub struct NodeFacts {
    /// How its probes went.
    pub health: Health,
    /// What the last answered probe saw.
    pub seen: Option<Seen>,
    /// A replica's replay position, the newest known.
    pub replay: Option<Lsn>,
    /// How far behind that is.
    pub lag: Option<ReplayLag>,
    /// How fast it replays, as far as that is known.
    pub pace: Option<Pace>,
    /// Of the primary: its last sample.
    pub alive: Option<Alive>,
    /// Whether it may serve with a `recovery_min_apply_delay`.
    pub delayed_ok: bool,
    /// A reload has taken it out: nothing is heard of it, and nobody waits for it.
    pub removed: bool,
    /// Whether failover keeps it out.
    pub quarantine: Option<Quarantine>,
    /// Since when it has been the primary by failover's word, until a probe of after that is answered.
    pub promoted: Option<Instant>,
}

/// How fast a replica replays; see [`NodeView`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Pace {
    /// Bytes per second.
    pub rate: Option<u64>,
    /// Until it is where the primary was last seen.
    pub catch_up: Option<Duration>,
}

impl NodeFacts {
    /// What it says now; `None` while it does not answer.
    fn current(&self) -> Option<&Seen> {
        self.seen.as_ref().filter(|_| *self.health.answering() == Answering::Yes)
    }

    /// The timeline it writes now.
    fn writes(&self) -> Option<TimelineId> {
        match self.current()?.answer.role {
            ProbedRole::Primary { timeline, .. } => Some(timeline),
            ProbedRole::Replica { .. } => None,
        }
    }
}

/// What to believe, given what was believed and what is known now. `last_sample` is the last one of the
/// epoch's primary.
pub fn decide(
    before: &Topology,
    facts: &[NodeFacts],
    policy: &Policy,
    last_sample: Option<(u64, Lsn)>,
    now: Instant,
) -> Topology {
    let mut next = before.clone();
    let told = policy.hold || (policy.follows && before.primary.is_some());
    let choice = if told { Choice::Keep } else { choose_primary(before, facts, policy) };
    if let Choice::Take(chosen) = choice {
        take_primary(&mut next, chosen, facts, last_sample);
    }
    if !policy.hold {
        follow_restart(&mut next, facts, last_sample);
    }
    take_history(&mut next, facts);
    for (index, known) in facts.iter().enumerate() {
        let view = view(before, &next, choice, index, known, policy, now);
        if let (Some(slot), Some(view)) = (next.nodes.get_mut(index), view) {
            *slot = view;
        }
    }
    next
}

/// Whether there is a node that has not been found to be out of reach.
fn any_answers(facts: &[NodeFacts]) -> bool {
    facts.iter().any(|known| !known.removed && !matches!(known.health.answering(), Answering::No(_)))
}

/// What to do about the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    /// Believe in this one from now on.
    Take(NodeId),
    /// Nothing has shown itself to be the successor of what was believed.
    Keep,
    /// There is none yet, and not all nodes have been heard: the first to answer may be an old primary
    /// that has come back.
    Waits,
}

fn choose_primary(before: &Topology, facts: &[NodeFacts], policy: &Policy) -> Choice {
    let Some(current) = before.primary else {
        if !facts.iter().all(|known| known.health.asked() || known.removed) {
            return Choice::Waits;
        }
        return latest_writer(facts, |_, _| true).map_or(Choice::Keep, Choice::Take);
    };
    let newer = |id: NodeId, known: &NodeFacts| {
        let Some(seen) = known.current() else { return false };
        let same_cluster = Some(seen.answer.system_identifier) == before.system_identifier;
        let allowed = id == current || policy.mode != FailoverMode::Off;
        // A history that is known and lacks the current timeline is another branch.
        let branch = before.timeline.zip(seen.history.as_ref()).is_some_and(|(t, h)| h.fork_of(t).is_none());
        same_cluster && allowed && seen.timeline > before.timeline && !branch
    };
    latest_writer(facts, newer).map_or(Choice::Keep, Choice::Take)
}

/// Of the nodes that take writes and that `eligible` admits, the one whose timeline descends from all
/// the others'; `None` when there is none, or it cannot be shown.
fn latest_writer(facts: &[NodeFacts], eligible: impl Fn(NodeId, &NodeFacts) -> bool) -> Option<NodeId> {
    let writers: Vec<(TimelineId, NodeId, &Seen)> = (0u16..)
        .map(NodeId)
        .zip(facts)
        .filter(|(id, known)| eligible(*id, known))
        .filter_map(|(id, known)| Some((known.writes()?, id, known.current()?)))
        .collect();
    let (timeline, id, seen) = writers.iter().max_by_key(|(timeline, ..)| *timeline)?;
    let descends = writers.iter().filter(|(_, other, _)| other != id).all(|(theirs, _, other)| {
        other.answer.system_identifier == seen.answer.system_identifier
            && theirs < timeline
            && seen.history.as_ref().is_some_and(|history| history.fork_of(*theirs).is_some())
    });
    descends.then_some(*id)
}

fn take_primary(next: &mut Topology, chosen: NodeId, facts: &[NodeFacts], last_sample: Option<(u64, Lsn)>) {
    let Some(seen) = facts.get(chosen.index()).and_then(NodeFacts::current) else {
        return;
    };
    if let (Some(old_primary), Some(old_timeline)) = (next.primary, next.timeline) {
        let fork = seen.history.as_ref().and_then(|history| history.fork_of(old_timeline));
        push_switch(
            next,
            Switch {
                from: next.epoch,
                old_primary,
                old_timeline,
                fork,
                gone_from: fork,
                last_sample,
                kept: false,
            },
        );
    }
    next.epoch = Epoch(next.epoch.0 + 1);
    next.primary = Some(chosen);
    next.timeline = seen.timeline;
    next.start = seen.start.as_ref().map(|start| Arc::clone(&start.id));
    next.history = None;
    next.system_identifier = Some(seen.answer.system_identifier);
}

/// A primary that crashed and is back, on the same timeline: a fork at the end of what it recovered. What had
/// been acknowledged without waiting for the disk may be gone.
fn follow_restart(next: &mut Topology, facts: &[NodeFacts], last_sample: Option<(u64, Lsn)>) {
    let Some((primary, timeline)) = next.primary.zip(next.timeline) else { return };
    let Some(known) = facts.get(primary.index()).filter(|known| is_reachable_primary(next, known)) else {
        return;
    };
    let Some(start) = known.seen.as_ref().and_then(|seen| seen.start.as_ref()) else { return };
    if next.start.as_ref() == Some(&start.id) {
        return;
    }
    let before = next.start.replace(Arc::clone(&start.id));
    if before.is_none() || start.clean {
        return;
    }
    let fork = start.whole.map(|whole| known.alive.map_or(whole, |alive| alive.survived(whole, start.began)));
    let end = Switch {
        from: next.epoch,
        old_primary: primary,
        old_timeline: timeline,
        fork,
        gone_from: start.end,
        last_sample,
        kept: false,
    };
    push_switch(next, end);
    next.epoch = Epoch(next.epoch.0 + 1);
}

/// With the write target of `record`, if it comes after the one that is believed in.
fn successor(
    before: &Topology,
    record: &Record,
    kept: bool,
    last_sample: Option<(u64, Lsn)>,
) -> Option<Topology> {
    let (old_primary, primary, timeline) = (before.primary?, record.primary?, record.timeline?);
    let is_later = primary != old_primary && Some(timeline) > before.timeline;
    if !is_later || primary.index() >= before.nodes.len() {
        return None;
    }
    let fork = record.forks.iter().rev().find(|fork| Some(fork.old_timeline) == before.timeline);
    // Where there was another one in between, what that one kept is not known here.
    let directly = record.forks.last() == fork;
    let target = Target {
        primary,
        epoch: record.epoch.max(Epoch(before.epoch.0 + 1)),
        timeline,
        fork: fork.map_or(Lsn::ZERO, |fork| fork.fork),
        old_primary,
        planned: false,
        kept: kept && directly && fork.is_some(),
        loss: Loss::default(),
    };
    let mut next = before.clone();
    take_target(&mut next, &target, last_sample);
    if fork.is_none()
        && let Some(switch) = next.switches.last_mut()
    {
        (switch.fork, switch.gone_from) = (None, None);
    }
    Some(next)
}

/// Failover has made another write target.
fn take_target(next: &mut Topology, target: &Target, last_sample: Option<(u64, Lsn)>) {
    if let Some(old_timeline) = next.timeline {
        let switch = Switch {
            from: next.epoch,
            old_primary: target.old_primary,
            old_timeline,
            fork: Some(target.fork),
            gone_from: Some(target.fork),
            last_sample,
            kept: target.kept,
        };
        push_switch(next, switch);
    }
    next.epoch = target.epoch;
    next.primary = Some(target.primary);
    next.timeline = Some(target.timeline);
    next.start = None;
    next.history = None;
    // What is known of the nodes is of before: the next probes tell who follows it.
    for view in &mut next.nodes {
        if view.id == target.primary {
            view.standing = Standing::Primary { reachable: true };
            view.timeline = Some(target.timeline);
        } else if !matches!(view.standing, Standing::Excluded(_)) {
            view.standing = Standing::Excluded(Exclusion::OtherTimeline);
        }
    }
}

/// Which node a walreceiver receives from; `None`: its address is none of the configuration's.
fn sender(nodes: &[NodeConfig], receiver: &Receiver) -> Option<NodeId> {
    let (host, port) = (receiver.host.as_deref()?, receiver.port?);
    let same = |node: &NodeConfig| {
        (node.replication.host == host && node.replication.port == port)
            || (node.host == host && node.port == port)
    };
    let index = nodes.iter().position(|node| same(node) && !node.removed)?;
    u16::try_from(index).ok().map(NodeId)
}

fn push_switch(next: &mut Topology, switch: Switch) {
    next.switches.push(switch);
    let excess = next.switches.len().saturating_sub(MAX_SWITCHES);
    next.switches.drain(..excess);
}

/// Where the primary's timeline comes from, as soon as that could be read.
fn take_history(next: &mut Topology, facts: &[NodeFacts]) {
    if next.history.is_none()
        && let Some(seen) = next.primary.and_then(|p| facts.get(p.index())).and_then(NodeFacts::current)
        && seen.timeline == next.timeline
    {
        next.history = seen.history.clone().map(Arc::new);
    }
}

fn view(
    before: &Topology,
    next: &Topology,
    choice: Choice,
    index: usize,
    known: &NodeFacts,
    policy: &Policy,
    now: Instant,
) -> Option<NodeView> {
    let old = before.nodes.get(index)?;
    if known.removed {
        return Some(members::removed(old));
    }
    let seen = known.seen.as_ref();
    let standing = if next.primary == Some(old.id) {
        Standing::Primary { reachable: is_reachable_primary(next, known) }
    } else {
        let served = before.epoch == next.epoch && old.standing == Standing::Replica;
        match replica_exclusion(next, choice, known, served, policy, now) {
            None => Standing::Replica,
            Some(exclusion) => Standing::Excluded(exclusion),
        }
    };
    let is_replica = seen.is_some_and(|s| matches!(s.answer.role, ProbedRole::Replica { .. }));
    // A lag is a distance from the primary of this epoch, on its timeline.
    let lag = known.lag.filter(|_| {
        is_replica
            && before.epoch == next.epoch
            && next.timeline.is_some()
            && seen.and_then(|s| s.timeline) == next.timeline
    });
    Some(NodeView {
        id: old.id,
        name: Arc::clone(&old.name),
        weight: old.weight,
        zone: old.zone.clone(),
        standing,
        timeline: seen.and_then(|s| s.timeline),
        replay_lag_bytes: lag.map(|l| l.bytes),
        replay_lag: lag.map(|l| l.time.duration()),
        server_major: seen.map(|s| s.answer.server_major),
        replay_rate: known.pace.filter(|_| lag.is_some()).and_then(|pace| pace.rate),
        catch_up: known.pace.filter(|_| lag.is_some() && !is_paused(seen)).and_then(|pace| pace.catch_up),
        recovery: seen.and_then(|s| match s.answer.role {
            ProbedRole::Replica { recovery, .. } => Some(recovery),
            ProbedRole::Primary { .. } => None,
        }),
    })
}

fn is_paused(seen: Option<&Seen>) -> bool {
    let role = seen.map(|seen| &seen.answer.role);
    matches!(role, Some(ProbedRole::Replica { recovery, .. }) if recovery.paused)
}

fn is_reachable_primary(next: &Topology, known: &NodeFacts) -> bool {
    if known.promoted.is_some() {
        return true;
    }
    known.current().is_some_and(|seen| Some(seen.answer.system_identifier) == next.system_identifier)
        && known.writes().is_some()
        && known.writes() == next.timeline
}

/// Why a node that is not the primary does not serve reads; `None`: it does. `served` says whether it did
/// until now, in this epoch.
fn replica_exclusion(
    next: &Topology,
    choice: Choice,
    known: &NodeFacts,
    served: bool,
    policy: &Policy,
    now: Instant,
) -> Option<Exclusion> {
    match known.health.answering() {
        Answering::Unknown => return Some(Exclusion::NotProbed),
        Answering::No(cause) => return Some(Exclusion::Unreachable(cause.clone())),
        Answering::Starting => return Some(Exclusion::Starting),
        Answering::Yes => {}
    }
    let Some(seen) = &known.seen else {
        return Some(Exclusion::NotProbed);
    };
    if next.system_identifier.is_some_and(|cluster| cluster != seen.answer.system_identifier) {
        return Some(Exclusion::ForeignCluster);
    }
    let (walreceiver, recovery) = match &seen.answer.role {
        ProbedRole::Replica { walreceiver, recovery, .. } => (walreceiver, recovery),
        ProbedRole::Primary { .. } if choice == Choice::Waits => return Some(Exclusion::NoPrimary),
        ProbedRole::Primary { read_only, .. } => {
            // After a switchover, or once it is back from the dead: it waits to be rewound, and is no second primary.
            let fenced = known.quarantine.filter(|why| *read_only && *why == Quarantine::OldPrimary);
            return Some(fenced.map_or(Exclusion::SecondPrimary, Exclusion::Quarantined));
        }
    };
    if let Some(why) = known.quarantine {
        return Some(Exclusion::Quarantined(why));
    }
    if next.timeline.is_none() {
        return Some(Exclusion::NoPrimary);
    }
    if !recovery.apply_delay.is_zero() && !known.delayed_ok {
        return Some(Exclusion::Delayed);
    }
    if let Some(cause) = known.health.ejected(now) {
        return Some(Exclusion::Ejected(cause.to_owned()));
    }
    if seen.timeline.is_some() && seen.timeline != next.timeline {
        return Some(Exclusion::OtherTimeline);
    }
    // One that serves goes on while the primary is away: its lag says when it must stop. A new one, or one
    // that comes back, must be seen streaming: a diverged standby answers and waits.
    let streaming = walreceiver.as_deref() == Some("streaming");
    if seen.timeline.is_none() || !(streaming || served) {
        return Some(Exclusion::NotStreaming);
    }
    match known.lag {
        None => Some(Exclusion::LagUnknown),
        Some(ReplayLag { time: LagTime::AtMost(time), .. }) if time <= policy.max_lag => None,
        // Behind all that has been seen of the primary, which is not much yet.
        Some(ReplayLag { time: LagTime::MoreThan(time), .. }) if time <= policy.max_lag => {
            Some(Exclusion::LagUnknown)
        }
        Some(_) => Some(Exclusion::TooFarBehind),
    }
}

/// What an operator may have to act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// There is a primary where there was none.
    PrimaryFound {
        /// Its name.
        node: Arc<str>,
        /// Its timeline.
        timeline: Option<TimelineId>,
    },
    /// Another primary, or another timeline of the same one.
    NewPrimary {
        /// Its name.
        node: Arc<str>,
        /// Its timeline.
        timeline: Option<TimelineId>,
        /// How the epoch before ended.
        switch: Option<Switch>,
    },
    /// The primary stopped answering as one.
    PrimaryLost {
        /// Its name.
        node: Arc<str>,
    },
    /// It answers again.
    PrimaryBack {
        /// Its name.
        node: Arc<str>,
    },
    /// A node takes writes that is not the primary.
    SecondPrimary {
        /// Its name.
        node: Arc<str>,
    },
    /// Several nodes accept writes, and there is no primary yet.
    NoneOfSeveral {
        /// Their names.
        nodes: Vec<Arc<str>>,
    },
    /// A replica serves reads.
    ReplicaInUse {
        /// Its name.
        node: Arc<str>,
    },
    /// A replica stopped serving reads.
    ReplicaOut {
        /// Its name.
        node: Arc<str>,
        /// Why.
        why: Exclusion,
    },
    /// A node that was not in use is kept out for another reason.
    StillOut {
        /// Its name.
        node: Arc<str>,
        /// Why.
        why: Exclusion,
    },
}

/// What changed between two topologies, lag figures apart.
pub fn events(before: &Topology, next: &Topology) -> Vec<Event> {
    let (mut events, mut undecided) = (Vec::new(), false);
    if before.epoch != next.epoch
        && let Some(view) = next.primary.and_then(|id| next.nodes.get(id.index()))
    {
        let (node, timeline) = (Arc::clone(&view.name), next.timeline);
        events.push(match before.primary {
            None => Event::PrimaryFound { node, timeline },
            Some(_) => Event::NewPrimary { node, timeline, switch: next.switches.last().cloned() },
        });
    }
    for (old, new) in before.nodes.iter().zip(&next.nodes) {
        let node = Arc::clone(&new.name);
        match (&old.standing, &new.standing) {
            (Standing::Primary { reachable: true }, Standing::Primary { reachable: false }) => {
                events.push(Event::PrimaryLost { node });
            }
            (Standing::Primary { reachable: false }, Standing::Primary { reachable: true }) => {
                events.push(Event::PrimaryBack { node });
            }
            (Standing::Replica, Standing::Replica) | (_, Standing::Primary { .. }) => {}
            (_, Standing::Replica) => events.push(Event::ReplicaInUse { node }),
            (Standing::Excluded(was), Standing::Excluded(why)) if was.label() == why.label() => {}
            (_, Standing::Excluded(Exclusion::SecondPrimary)) if next.primary.is_none() => undecided = true,
            (_, Standing::Excluded(Exclusion::SecondPrimary)) => events.push(Event::SecondPrimary { node }),
            (Standing::Excluded(_), Standing::Excluded(why)) => {
                events.push(Event::StillOut { node, why: why.clone() });
            }
            (Standing::Primary { .. }, Standing::Excluded(why)) => {
                events.push(Event::StillOut { node, why: why.clone() });
            }
            (_, Standing::Excluded(why)) => events.push(Event::ReplicaOut { node, why: why.clone() }),
        }
    }
    if undecided {
        let writes = |view: &&NodeView| view.standing == Standing::Excluded(Exclusion::SecondPrimary);
        let nodes = next.nodes.iter().filter(writes).map(|view| Arc::clone(&view.name)).collect();
        events.push(Event::NoneOfSeveral { nodes });
    }
    events
}

/// A value, or a dash for none.
struct Known<T>(Option<T>);

impl<T: fmt::Display> fmt::Display for Known<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("unknown"),
        }
    }
}

impl Event {
    fn log(&self) {
        match self {
            Event::PrimaryFound { node, timeline } => {
                tracing::info!(%node, timeline = %Known(*timeline), "primary found");
            }
            Event::NewPrimary { node, timeline, switch } => {
                let fork = Known(switch.as_ref().and_then(|s| s.fork));
                tracing::warn!(%node, timeline = %Known(*timeline), %fork, "new primary");
            }
            Event::PrimaryLost { node } => {
                tracing::error!(%node, "primary lost: writes wait or fail until it is back")
            }
            Event::PrimaryBack { node } => tracing::info!(%node, "primary answers again"),
            Event::SecondPrimary { node } => {
                tracing::error!(%node, "second primary: it accepts writes, and is not used");
            }
            Event::NoneOfSeveral { nodes } => {
                let nodes = nodes.join(", ");
                tracing::error!(
                    nodes,
                    "several nodes accept writes, and nothing shows which is the primary: none is used until one is left (`highwater check` names their clusters and timelines)"
                );
            }
            Event::ReplicaInUse { node } => tracing::info!(%node, "replica in use"),
            Event::ReplicaOut { node, why } => {
                tracing::warn!(%node, reason = why.label(), "replica out of use: {why}");
            }
            Event::StillOut { node, why } => match why {
                // On the way in: each node passes these.
                Exclusion::NotProbed
                | Exclusion::Removed
                | Exclusion::NoPrimary
                | Exclusion::LagUnknown
                | Exclusion::Ejected(_) => {
                    tracing::debug!(%node, reason = why.label(), "node not in use: {why}");
                }
                _ => tracing::warn!(%node, reason = why.label(), "node not in use: {why}"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::{ProbeAnswer, ReplicaSample};
    use crate::topology::Recovery;
    use crate::wal::TimelineHistory;
    use proptest::prelude::*;

    const HEALTH: HealthSettings =
        HealthSettings { failure_threshold: 3, eject_time: Duration::from_secs(1) };
    const FOLLOW: Policy =
        Policy { mode: FailoverMode::Follow, max_lag: Duration::from_secs(10), hold: false, follows: false };

    fn nodes(count: u16) -> Topology {
        let view = |id| NodeView {
            id: NodeId(id),
            name: Arc::from(format!("n{id}")),
            weight: 1,
            zone: None,
            standing: Standing::Excluded(Exclusion::NotProbed),
            timeline: None,
            replay_lag_bytes: None,
            replay_lag: None,
            server_major: None,
            recovery: None,
            replay_rate: None,
            catch_up: None,
        };
        Topology {
            epoch: Epoch(0),
            system_identifier: None,
            primary: None,
            timeline: None,
            start: None,
            nodes: (0..count).map(view).collect(),
            history: None,
            switches: Vec::new(),
        }
    }

    fn answering(now: Instant, timeline: Option<u32>, history: Option<&str>, role: ProbedRole) -> NodeFacts {
        let mut health = Health::default();
        health.answered(HEALTH, now);
        let seen = Seen {
            answer: ProbeAnswer { system_identifier: 42, server_major: 15, role },
            timeline: timeline.map(TimelineId),
            history: history.map(|text| TimelineHistory::parse(text).unwrap()),
            start: None,
        };
        NodeFacts { health, seen: Some(seen), ..NodeFacts::default() }
    }

    fn writer(now: Instant, timeline: u32, history: Option<&str>) -> NodeFacts {
        let role =
            ProbedRole::Primary { insert: Lsn(1000), timeline: TimelineId(timeline), read_only: false };
        answering(now, Some(timeline), history, role)
    }

    fn replica(
        now: Instant,
        timeline: Option<u32>,
        walreceiver: Option<&str>,
        lag: Option<u64>,
    ) -> NodeFacts {
        let positions = ReplicaSample {
            receive: Some(Lsn(900)),
            replay: Some(Lsn(900)),
            received_timeline: timeline.map(TimelineId),
            archive: false,
            newest_history: None,
            receiver: None,
        };
        let walreceiver = walreceiver.map(str::to_owned);
        let recovery = Recovery::default();
        let role = ProbedRole::Replica { positions, walreceiver, receiver: None, recovery };
        let mut facts = answering(now, timeline, None, role);
        facts.lag = lag.map(|s| ReplayLag { bytes: 100, time: LagTime::AtMost(Duration::from_secs(s)) });
        facts
    }

    fn streaming(now: Instant, timeline: u32) -> NodeFacts {
        replica(now, Some(timeline), Some("streaming"), Some(0))
    }

    fn fail(mut facts: NodeFacts, kind: NodeFailure, now: Instant) -> NodeFacts {
        facts.health.failed(&NodeError { node: String::new(), cause: "gone".to_owned(), kind }, HEALTH, now);
        facts
    }

    fn settled(now: Instant) -> Topology {
        let facts = [writer(now, 1, Some("")), streaming(now, 1), streaming(now, 1)];
        let found = decide(&nodes(3), &facts, &FOLLOW, None, now);
        decide(&found, &facts, &FOLLOW, None, now)
    }

    fn labels(topology: &Topology) -> Vec<&'static str> {
        let label = |view: &NodeView| match &view.standing {
            Standing::Primary { reachable: true } => "primary",
            Standing::Primary { reachable: false } => "primary away",
            Standing::Replica => "replica",
            Standing::Excluded(why) => why.label(),
        };
        topology.nodes.iter().map(label).collect()
    }

    #[test]
    fn roles_are_discovered() {
        let now = Instant::now();
        let topology = settled(now);
        assert_eq!(labels(&topology), ["primary", "replica", "replica"]);
        assert_eq!((topology.epoch, topology.timeline), (Epoch(1), Some(TimelineId(1))));
        assert!(topology.switches.is_empty());
        assert_eq!(
            topology,
            decide(
                &topology,
                &[writer(now, 1, Some("")), streaming(now, 1), streaming(now, 1)],
                &FOLLOW,
                None,
                now
            )
        );
    }

    #[test]
    fn it_starts_with_nodes_missing_but_not_before_all_were_asked() {
        let now = Instant::now();
        let unasked = [writer(now, 1, Some("")), NodeFacts::default()];
        assert_eq!(labels(&decide(&nodes(2), &unasked, &FOLLOW, None, now)), ["no_primary", "not_probed"]);
        let missing = [writer(now, 1, Some("")), fail(NodeFacts::default(), NodeFailure::Refused, now)];
        assert_eq!(labels(&decide(&nodes(2), &missing, &FOLLOW, None, now)), ["primary", "unreachable"]);
        let headless = [streaming(now, 1), fail(NodeFacts::default(), NodeFailure::Refused, now)];
        assert_eq!(labels(&decide(&nodes(2), &headless, &FOLLOW, None, now)), ["no_primary", "unreachable"]);
    }

    #[test]
    fn two_primaries_at_the_start_take_a_history_to_tell_apart() {
        let now = Instant::now();
        for (second, expected) in [
            (writer(now, 2, Some("1 0/500 x")), Some(NodeId(1))),
            (writer(now, 3, Some("1 0/500 x\n2 0/600 x")), Some(NodeId(1))),
            (writer(now, 3, Some("2 0/600 x")), None),
            (writer(now, 2, None), None),
            (writer(now, 1, Some("")), None),
        ] {
            let next = decide(&nodes(2), &[writer(now, 1, Some("")), second], &FOLLOW, None, now);
            assert_eq!(next.primary, expected, "{next:?}");
        }
    }

    #[test]
    fn a_promotion_outside_begins_an_epoch_and_says_how_the_last_one_ended() {
        let now = Instant::now();
        let before = settled(now);
        let facts = [
            fail(writer(now, 1, Some("")), NodeFailure::Refused, now),
            writer(now, 2, Some("1 0/500 x")),
            streaming(now, 1),
        ];
        let next = decide(&before, &facts, &FOLLOW, Some((7, Lsn(0x510))), now);
        assert_eq!(labels(&next), ["unreachable", "primary", "other_timeline"]);
        let switch = Switch {
            from: Epoch(1),
            old_primary: NodeId(0),
            old_timeline: TimelineId(1),
            fork: Some(Lsn(0x500)),
            gone_from: Some(Lsn(0x500)),
            last_sample: Some((7, Lsn(0x510))),
            kept: false,
        };
        assert_eq!(
            (next.epoch, next.timeline, &next.switches),
            (Epoch(2), Some(TimelineId(2)), &vec![switch])
        );
        // The old one comes back, still on its timeline: never used. The other replica follows.
        let facts = [writer(now, 1, Some("")), writer(now, 2, Some("1 0/500 x")), streaming(now, 2)];
        let next = decide(&next, &facts, &FOLLOW, None, now);
        assert_eq!(labels(&next), ["second_primary", "primary", "replica"]);
        assert_eq!(next.epoch, Epoch(2));
    }

    #[test]
    fn a_crash_of_the_primary_is_a_fork_and_an_orderly_restart_is_none() {
        let now = Instant::now();
        let started = |id: &str, end: Option<u64>, clean: bool| {
            let mut facts = writer(now, 1, Some(""));
            let (end, whole) = (end.map(Lsn), end.map(|end| Lsn(end - 8)));
            let start = crate::node::Start { id: Arc::from(id), end, whole, clean, began: now };
            facts.seen.as_mut().unwrap().start = Some(start);
            [facts, streaming(now, 1), streaming(now, 1)]
        };
        let first = decide(&nodes(3), &started("1", Some(50), true), &FOLLOW, None, now);
        assert_eq!(first.epoch, Epoch(1));
        let same = decide(&first, &started("1", None, false), &FOLLOW, Some((7, Lsn(110))), now);
        assert_eq!((same.epoch, same.switches.len()), (Epoch(1), 0));
        let clean = decide(&first, &started("2", Some(120), true), &FOLLOW, Some((7, Lsn(110))), now);
        assert_eq!((clean.epoch, clean.start.as_deref()), (Epoch(1), Some("2")));
        for end in [Some(100), None] {
            let next = decide(&first, &started("2", end, false), &FOLLOW, Some((7, Lsn(110))), now);
            let switch = Switch {
                from: Epoch(1),
                old_primary: NodeId(0),
                old_timeline: TimelineId(1),
                fork: end.map(|end| Lsn(end - 8)),
                gone_from: end.map(Lsn),
                last_sample: Some((7, Lsn(110))),
                kept: false,
            };
            assert_eq!(
                (next.epoch, next.primary, &next.switches),
                (Epoch(2), Some(NodeId(0)), &vec![switch])
            );
        }
    }

    #[test]
    fn where_a_second_crash_may_have_been_missed_only_what_was_seen_flushed_is_kept() {
        let begun = Instant::now();
        let began = begun + Duration::from_secs(3);
        let crashed = |alive: Option<Alive>| {
            let mut facts = writer(began, 1, Some(""));
            let end = Some(Lsn(500));
            let start = crate::node::Start { id: Arc::from("2"), end, whole: end, clean: false, began };
            facts.seen.as_mut().unwrap().start = Some(start);
            facts.alive = alive;
            let mut before = nodes(1);
            (before.primary, before.timeline, before.epoch) =
                (Some(NodeId(0)), Some(TimelineId(1)), Epoch(1));
            (before.start, before.system_identifier) = (Some(Arc::from("1")), Some(42));
            let next = decide(&before, &[facts], &FOLLOW, Some((7, Lsn(110))), began);
            let switch = next.switches.first().unwrap();
            (switch.fork, switch.gone_from)
        };
        let alive = |ago: Duration, flush: u64| {
            Some(Alive { asked_at: began - ago, flush: Lsn(flush), in_order: false })
        };
        let end = Some(Lsn(500));
        assert_eq!(crashed(None), (end, end));
        assert_eq!(
            crashed(alive(crate::monitor::stream::ONE_CRASH - Duration::from_millis(1), 110)),
            (end, end)
        );
        assert_eq!(crashed(alive(crate::monitor::stream::ONE_CRASH, 110)), (Some(Lsn(110)), end));
        assert_eq!(crashed(alive(Duration::from_secs(3), 900)), (end, end));
        // It had said that it shuts down.
        let orderly = alive(Duration::from_secs(3), 110).map(|alive| Alive { in_order: true, ..alive });
        assert_eq!(crashed(orderly), (end, end));
    }

    #[test]
    fn what_is_not_shown_to_be_the_successor_is_not_believed() {
        let now = Instant::now();
        let gone = fail(writer(now, 1, Some("")), NodeFailure::Refused, now);
        let mut foreign = writer(now, 2, Some("1 0/500 x"));
        foreign.seen.as_mut().unwrap().answer.system_identifier = 43;
        let off = Policy { mode: FailoverMode::Off, ..FOLLOW };
        for (policy, challenger, label) in [
            (FOLLOW, foreign, "foreign_cluster"),
            (FOLLOW, writer(now, 1, Some("")), "second_primary"),
            (FOLLOW, writer(now, 3, Some("2 0/500 x")), "second_primary"),
            (off, writer(now, 2, Some("1 0/500 x")), "second_primary"),
        ] {
            let next =
                decide(&settled(now), &[gone.clone(), challenger, streaming(now, 1)], &policy, None, now);
            assert_eq!(labels(&next), ["primary away", label, "replica"]);
            assert_eq!(next.epoch, Epoch(1));
        }
        // Twins: the same timeline, the same history, and yet two clusters.
        let twin = writer(now, 2, Some("1 0/500 x"));
        let next = decide(&settled(now), &[gone.clone(), twin.clone(), twin], &FOLLOW, None, now);
        assert_eq!(labels(&next), ["primary away", "second_primary", "second_primary"]);
        // Without permission to read the history the timeline alone decides; nothing is said of the fork.
        let next =
            decide(&settled(now), &[gone, writer(now, 2, None), streaming(now, 1)], &FOLLOW, None, now);
        assert_eq!((next.primary, next.switches[0].fork), (Some(NodeId(1)), None));
    }

    #[test]
    fn a_primary_away_stays_the_primary_and_replicas_go_on() {
        let now = Instant::now();
        let before = settled(now);
        let without_walreceiver = replica(now, Some(1), None, Some(0));
        for gone in [
            fail(writer(now, 1, Some("")), NodeFailure::Refused, now),
            fail(writer(now, 1, Some("")), NodeFailure::Starting, now),
            replica(now, Some(1), None, Some(0)),
        ] {
            let facts = [gone, without_walreceiver.clone(), without_walreceiver.clone()];
            let away = decide(&before, &facts, &FOLLOW, None, now);
            assert_eq!(labels(&away), ["primary away", "replica", "replica"]);
            let facts = [writer(now, 1, Some("")), streaming(now, 1), streaming(now, 1)];
            let back = decide(&away, &facts, &FOLLOW, None, now);
            assert_eq!((labels(&back), back.epoch), (vec!["primary", "replica", "replica"], Epoch(1)));
        }
    }

    #[test]
    fn a_replica_serves_only_while_it_is_well() {
        let now = Instant::now();
        let mut beyond = streaming(now, 1);
        beyond.lag = Some(ReplayLag { bytes: 1, time: LagTime::MoreThan(Duration::ZERO) });
        let mut delayed = streaming(now, 1);
        if let Some(Seen { answer: ProbeAnswer { role: ProbedRole::Replica { recovery, .. }, .. }, .. }) =
            &mut delayed.seen
        {
            recovery.apply_delay = Duration::from_secs(1);
        }
        let mut flapped = fail(streaming(now, 1), NodeFailure::Refused, now);
        flapped.health.answered(HEALTH, now);
        for (facts, first, serving) in [
            (streaming(now, 1), "replica", "replica"),
            (replica(now, Some(1), Some("waiting"), Some(0)), "not_streaming", "replica"),
            (replica(now, Some(1), None, Some(0)), "not_streaming", "replica"),
            (replica(now, None, None, Some(0)), "not_streaming", "not_streaming"),
            (replica(now, Some(2), Some("streaming"), Some(0)), "other_timeline", "other_timeline"),
            (replica(now, Some(1), Some("streaming"), Some(11)), "too_far_behind", "too_far_behind"),
            (replica(now, Some(1), Some("streaming"), None), "lag_unknown", "lag_unknown"),
            (beyond, "lag_unknown", "lag_unknown"),
            (flapped, "ejected", "ejected"),
            (delayed.clone(), "delayed", "delayed"),
            (NodeFacts { delayed_ok: true, ..delayed }, "replica", "replica"),
            (fail(streaming(now, 1), NodeFailure::Refused, now), "unreachable", "unreachable"),
            (fail(streaming(now, 1), NodeFailure::Starting, now), "starting", "starting"),
            (fail(streaming(now, 1), NodeFailure::Timeout, now), "replica", "replica"),
        ] {
            let all = [writer(now, 1, Some("")), facts, streaming(now, 1)];
            assert_eq!(labels(&decide(&settled(now), &all, &FOLLOW, None, now))[1], serving, "{all:?}");
            let mut fresh = settled(now);
            fresh.nodes[1].standing = Standing::Excluded(Exclusion::NotProbed);
            assert_eq!(labels(&decide(&fresh, &all, &FOLLOW, None, now))[1], first, "{all:?}");
        }
    }

    #[test]
    fn an_old_primary_is_a_second_one_until_it_is_seen_to_be_read_only() {
        let now = Instant::now();
        let old = |read_only, quarantine| {
            let role = ProbedRole::Primary { insert: Lsn(1000), timeline: TimelineId(1), read_only };
            NodeFacts { quarantine, ..answering(now, Some(1), Some(""), role) }
        };
        for (read_only, quarantine, expected) in [
            (false, None, "second_primary"),
            (false, Some(Quarantine::OldPrimary), "second_primary"),
            (true, None, "second_primary"),
            (true, Some(Quarantine::Diverged), "second_primary"),
            (true, Some(Quarantine::OldPrimary), "quarantined"),
        ] {
            let facts = [writer(now, 1, Some("")), old(read_only, quarantine), streaming(now, 1)];
            let next = decide(&settled(now), &facts, &FOLLOW, None, now);
            assert_eq!(labels(&next)[1], expected, "{read_only} {quarantine:?}");
        }
    }

    #[test]
    fn a_proxy_that_follows_believes_in_another_primary_only_by_the_record() {
        let now = Instant::now();
        let before = settled(now);
        let facts = [writer(now, 1, Some("")), writer(now, 2, Some("1 0/500 x")), streaming(now, 1)];
        let follows = Policy { follows: true, ..FOLLOW };
        assert_eq!(decide(&before, &facts, &FOLLOW, None, now).primary, Some(NodeId(1)));
        let next = decide(&before, &facts, &follows, None, now);
        assert_eq!((next.primary, next.epoch), (Some(NodeId(0)), Epoch(1)));
        // Where nothing is known yet, it finds the first one by itself.
        let found = decide(&nodes(3), &facts, &follows, None, now);
        assert_eq!(found.primary, Some(NodeId(1)));
        let forked = |old| Forked { old_primary: NodeId(0), old_timeline: TimelineId(old), fork: Lsn(0x500) };
        let mut record = Record {
            epoch: Epoch(7),
            primary: Some(NodeId(1)),
            timeline: Some(TimelineId(2)),
            forks: vec![forked(1)],
            ..Record::default()
        };
        let taken = successor(&before, &record, true, None).unwrap();
        assert_eq!((taken.primary, taken.epoch), (Some(NodeId(1)), Epoch(7)));
        assert_eq!(taken.switches.last().map(|s| (s.fork, s.kept)), Some((Some(Lsn(0x500)), true)));
        // What is recorded of where it began is of another timeline.
        record.forks = vec![forked(9)];
        let taken = successor(&before, &record, true, None).unwrap();
        assert_eq!(taken.switches.last().map(|s| (s.fork, s.kept)), Some((None, false)));
        record.timeline = Some(TimelineId(1));
        assert!(successor(&before, &record, true, None).is_none(), "it does not come after");
    }

    #[test]
    fn several_that_write_where_none_was_known_are_told_of_together() {
        let now = Instant::now();
        let mut foreign = writer(now, 1, Some(""));
        foreign.seen.as_mut().unwrap().answer.system_identifier = 43;
        let facts = [writer(now, 1, Some("")), streaming(now, 1), foreign];
        let before = nodes(3);
        let next = decide(&before, &facts, &FOLLOW, None, now);
        assert_eq!(next.primary, None);
        let told: Vec<_> = events(&before, &next)
            .into_iter()
            .filter(|event| !matches!(event, Event::StillOut { .. }))
            .collect();
        assert_eq!(told, vec![Event::NoneOfSeveral { nodes: vec![Arc::from("n0"), Arc::from("n2")] }]);
        assert_eq!(events(&next, &decide(&next, &facts, &FOLLOW, None, now)), vec![]);
        // The wrong one is taken away.
        let facts = [facts[0].clone(), facts[1].clone(), fail(facts[2].clone(), NodeFailure::Refused, now)];
        let found = decide(&next, &facts, &FOLLOW, None, now);
        assert_eq!(found.primary, Some(NodeId(0)));
    }

    #[test]
    fn each_change_is_told_once() {
        let now = Instant::now();
        let before = settled(now);
        let facts = [
            fail(writer(now, 1, Some("")), NodeFailure::Refused, now),
            fail(streaming(now, 1), NodeFailure::Refused, now),
            streaming(now, 1),
        ];
        let next = decide(&before, &facts, &FOLLOW, None, now);
        let name = |n: &str| Arc::<str>::from(n);
        let why = Exclusion::Unreachable("gone".to_owned());
        assert_eq!(
            events(&before, &next),
            vec![Event::PrimaryLost { node: name("n0") }, Event::ReplicaOut { node: name("n1"), why }]
        );
        assert_eq!(events(&next, &decide(&next, &facts, &FOLLOW, None, now)), vec![]);
    }

    fn any_facts() -> impl Strategy<Value = NodeFacts> {
        let role = (0u8..2, 1u32..4, 0u8..3, 0u8..5, any::<bool>());
        role.prop_map(|(role, timeline, history, health, foreign)| {
            let now = Instant::now();
            let history = [None, Some("1 0/500 x"), Some("1 0/500 x\n2 0/600 x")][usize::from(history)];
            let mut facts = match role {
                0 => writer(now, timeline, history),
                _ => streaming(now, timeline),
            };
            if let (Some(seen), true) = (facts.seen.as_mut(), foreign) {
                seen.answer.system_identifier = 43;
            }
            match health {
                0 => NodeFacts::default(),
                1 => fail(facts, NodeFailure::Refused, now),
                _ => facts,
            }
        })
    }

    proptest! {
        #[test]
        fn one_primary_per_epoch_and_neither_moves_back(
            rounds in prop::collection::vec(prop::collection::vec(any_facts(), 3), 1..40),
        ) {
            let now = Instant::now();
            let mut topology = nodes(3);
            for facts in rounds {
                let next = decide(&topology, &facts, &FOLLOW, None, now);
                prop_assert!(next.epoch >= topology.epoch && next.timeline >= topology.timeline);
                if next.epoch == topology.epoch {
                    prop_assert_eq!((next.primary, next.timeline), (topology.primary, topology.timeline));
                }
                if topology.system_identifier.is_some() {
                    prop_assert_eq!(next.system_identifier, topology.system_identifier);
                }
                for view in &next.nodes {
                    let primary = matches!(view.standing, Standing::Primary { .. });
                    prop_assert_eq!(primary, next.primary == Some(view.id));
                    prop_assert!(view.standing != Standing::Replica || view.timeline == next.timeline);
                }
                prop_assert!(next.switches.len() <= MAX_SWITCHES);
                topology = next;
            }
        }
    }
}
