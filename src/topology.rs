//! What is believed of the nodes: an immutable value, made by `control`, read by everybody. Pure,
//! but for [`TopologyHandle`], the place where the current value is published.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use tokio::sync::Notify;

use crate::config::{Config, NodeConfig};
use crate::wal::{Lsn, TimelineHistory, TimelineId};

/// Which node: its index in the configuration's `nodes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u16);

impl NodeId {
    /// The index into per-node tables.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Counts the write targets this proxy has had: raised whenever another node becomes the primary, or
/// the same one on another timeline, or after a crash, which may have taken the end of its log. What was known of positions in an earlier epoch is void.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

/// Why a node is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exclusion {
    /// No probe has been answered yet.
    NotProbed,
    /// Probes fail; the text says how the last one did.
    Unreachable(String),
    /// The server says that it is starting up, shutting down or recovering.
    Starting,
    /// A replica that failed and must first show itself well again.
    Ejected(String),
    /// Its lag is above `consistency.max_lag`.
    TooFarBehind,
    /// It is told to apply what it receives late (`recovery_min_apply_delay`), and not allowed to serve so.
    Delayed,
    /// How far behind it is cannot be known yet: the primary's position has not been seen.
    LagUnknown,
    /// No primary has been found yet, so it is not known what this replica should follow.
    NoPrimary,
    /// Its walreceiver does not stream, and it has not served since; or its timeline cannot be known.
    NotStreaming,
    /// It replays another timeline than the primary's.
    OtherTimeline,
    /// Its system identifier is not the cluster's: not a copy of this primary.
    ForeignCluster,
    /// It accepts writes, but is not the primary of this epoch.
    SecondPrimary,
    /// A reload has taken it out of the configuration.
    Removed,
    /// It must be repaired first, whatever it says.
    Quarantined(Quarantine),
}

/// Why a node is kept out until somebody repairs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quarantine {
    /// It was the primary of an epoch that is over.
    OldPrimary,
    /// It holds WAL that the primary does not have.
    Diverged,
}

impl Quarantine {
    /// One word for a metric label or a log field.
    pub fn label(self) -> &'static str {
        match self {
            Quarantine::OldPrimary => "old_primary",
            Quarantine::Diverged => "diverged",
        }
    }
}

impl Exclusion {
    /// One word for a metric label or a log field.
    pub fn label(&self) -> &'static str {
        match self {
            Exclusion::NotProbed => "not_probed",
            Exclusion::Unreachable(_) => "unreachable",
            Exclusion::Ejected(_) => "ejected",
            Exclusion::Starting => "starting",
            Exclusion::TooFarBehind => "too_far_behind",
            Exclusion::Delayed => "delayed",
            Exclusion::LagUnknown => "lag_unknown",
            Exclusion::NoPrimary => "no_primary",
            Exclusion::NotStreaming => "not_streaming",
            Exclusion::OtherTimeline => "other_timeline",
            Exclusion::ForeignCluster => "foreign_cluster",
            Exclusion::SecondPrimary => "second_primary",
            Exclusion::Removed => "removed",
            Exclusion::Quarantined(_) => "quarantined",
        }
    }
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exclusion::NotProbed => f.write_str("no probe has been answered yet"),
            Exclusion::Unreachable(cause) => write!(f, "it cannot be reached: {cause}"),
            Exclusion::Starting => f.write_str("it is starting up or shutting down"),
            Exclusion::Ejected(cause) => write!(f, "it failed a moment ago: {cause}"),
            Exclusion::TooFarBehind => f.write_str("its lag is above max_lag"),
            Exclusion::Delayed => f.write_str("it has a recovery_min_apply_delay (delayed_ok lets it serve)"),
            Exclusion::LagUnknown => f.write_str("its lag is not known yet"),
            Exclusion::NoPrimary => f.write_str("no primary has been found yet"),
            Exclusion::NotStreaming => f.write_str("it does not stream from the primary"),
            Exclusion::OtherTimeline => f.write_str("it replays another timeline than the primary's"),
            Exclusion::ForeignCluster => f.write_str("its system identifier is not the cluster's"),
            Exclusion::SecondPrimary => f.write_str("it accepts writes, but is not the primary"),
            Exclusion::Removed => f.write_str("it is no longer in the configuration"),
            Exclusion::Quarantined(Quarantine::OldPrimary) => {
                f.write_str("it was the primary of an epoch that is over: it needs pg_rewind or a new copy")
            }
            Exclusion::Quarantined(Quarantine::Diverged) => f.write_str(
                "it holds changes that the primary does not have: it needs pg_rewind or a new copy",
            ),
        }
    }
}

/// What a node is, and whether sessions may use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The primary of the epoch. `reachable` is false while probes fail: it stays the only write target.
    Primary {
        /// Whether the last probes were answered.
        reachable: bool,
    },
    /// A replica that may serve reads at or past a session's mark.
    Replica,
    /// Not to be used now, and why.
    Excluded(Exclusion),
}

impl Standing {
    /// The same role, reachability and reason, whatever the last error said.
    fn is_like(&self, other: &Standing) -> bool {
        match (self, other) {
            (Standing::Excluded(a), Standing::Excluded(b)) => a.label() == b.label(),
            (a, b) => a == b,
        }
    }
}

/// What may hold a replica's replay up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Its `recovery_min_apply_delay`.
    pub apply_delay: Duration,
    /// Replay has been paused (`pg_wal_replay_pause()`), or pauses soon.
    pub paused: bool,
    /// Queries that it has cancelled because replay had to go on, since its statistics were reset.
    pub conflicts: u64,
}

/// One node as the last probes showed it.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    /// Which node.
    pub id: NodeId,
    /// Its name in the configuration.
    pub name: Arc<str>,
    /// Its share of the reads relative to the other replicas' weights; 0: none.
    pub weight: u32,
    /// The zone that the configuration says it is in.
    pub zone: Option<Arc<str>>,
    /// What it is and whether it may be used.
    pub standing: Standing,
    /// The timeline it writes or replays.
    pub timeline: Option<TimelineId>,
    /// WAL bytes between the primary's position and this replica's replay position.
    pub replay_lag_bytes: Option<u64>,
    /// How long ago the primary was where this replica is now.
    pub replay_lag: Option<Duration>,
    /// The server's major version, for example 15.
    pub server_major: Option<u16>,
    /// Of a replica: what holds its replay up.
    pub recovery: Option<Recovery>,
    /// Of a replica: bytes per second that it replays while it has a backlog; `None`: it has had none yet.
    pub replay_rate: Option<u64>,
    /// Of a replica: how long it will take to where the primary was last seen; `None`: not known, or for ever.
    pub catch_up: Option<Duration>,
}

impl NodeView {
    /// A node that nothing is known of.
    pub fn unknown(id: NodeId, node: &NodeConfig) -> NodeView {
        NodeView {
            id,
            name: Arc::from(node.name.as_str()),
            weight: node.weight,
            zone: node.zone.as_deref().map(Arc::from),
            standing: Standing::Excluded(if node.removed {
                Exclusion::Removed
            } else {
                Exclusion::NotProbed
            }),
            timeline: None,
            replay_lag_bytes: None,
            replay_lag: None,
            server_major: None,
            recovery: None,
            replay_rate: None,
            catch_up: None,
        }
    }
}

/// How one epoch ended, for sessions that carry a mark or a note of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Switch {
    /// The epoch that ended.
    pub from: Epoch,
    /// Its primary.
    pub old_primary: NodeId,
    /// Its timeline.
    pub old_timeline: TimelineId,
    /// Where the new timeline left it, or where the log ended after a crash; `None`: could not be learned, so nothing of it can be shown kept.
    pub fork: Option<Lsn>,
    /// What was written past this is gone for certain; it lies beyond the fork only where it cannot be told whether
    /// the primary crashed once or twice.
    pub gone_from: Option<Lsn>,
    /// The last sample taken of the old primary: its counter and insert position.
    pub last_sample: Option<(u64, Lsn)>,
    /// All that was acknowledged before is on the new timeline: the switch was planned, or each commit had been
    /// confirmed by enough standbys (`durability: quorum`).
    pub kept: bool,
}

/// What is believed of the cluster. A new value replaces it whole.
#[derive(Clone, Debug, PartialEq)]
pub struct Topology {
    /// The epoch of `primary`.
    pub epoch: Epoch,
    /// The cluster's identity, once a primary has been seen.
    pub system_identifier: Option<u64>,
    /// The node that takes writes.
    pub primary: Option<NodeId>,
    /// The primary's timeline.
    pub timeline: Option<TimelineId>,
    /// The primary's start, crash-restarts included; `None`: it is not known.
    pub start: Option<Arc<str>>,
    /// The timelines that it descends from; `None`: that could not be learned.
    pub history: Option<Arc<TimelineHistory>>,
    /// All nodes, in the configuration's order.
    pub nodes: Vec<NodeView>,
    /// How the latest epochs ended, oldest first; bounded.
    pub switches: Vec<Switch>,
}

impl Topology {
    /// Before anything has been probed: the configured nodes, none of them usable.
    pub fn initial(config: &Config) -> Topology {
        // More nodes than a NodeId can count cannot be told apart, hence are left out.
        let view = |(index, node)| NodeView::unknown(NodeId(index as u16), node);
        Topology {
            epoch: Epoch(0),
            system_identifier: None,
            primary: None,
            timeline: None,
            start: None,
            history: None,
            nodes: config.nodes.iter().take(usize::from(u16::MAX)).enumerate().map(view).collect(),
            switches: Vec::new(),
        }
    }

    /// The view of one node.
    pub fn node(&self, id: NodeId) -> &NodeView {
        &self.nodes[id.index()]
    }

    /// The nodes of the cluster: those that a reload has removed keep their place in `nodes`, and are none.
    pub fn members(&self) -> impl Iterator<Item = &NodeView> {
        self.nodes.iter().filter(|n| n.standing != Standing::Excluded(Exclusion::Removed))
    }

    /// The replicas that may serve reads, apart from what a session's mark asks.
    pub fn serving_replicas(&self) -> impl Iterator<Item = &NodeView> {
        self.nodes.iter().filter(|n| n.standing == Standing::Replica && n.weight > 0)
    }
}

/// Where the current topology is published. `control` is the only writer.
pub struct TopologyHandle {
    current: ArcSwap<Topology>,
    changed: Notify,
    changes: AtomicU64,
    /// The nodes that an operator has drained, a bit each.
    drained: AtomicU64,
}

impl TopologyHandle {
    /// Starts with `initial`.
    pub fn new(initial: Topology) -> TopologyHandle {
        TopologyHandle {
            current: ArcSwap::from_pointee(initial),
            changed: Notify::new(),
            changes: AtomicU64::new(0),
            drained: AtomicU64::new(0),
        }
    }

    /// Sends no new read to this node (`true`), or sends it reads again. Whether that changed anything.
    pub fn drain(&self, node: NodeId, drained: bool) -> bool {
        let bit = Self::bit(node);
        let before = if drained {
            self.drained.fetch_or(bit, Ordering::SeqCst)
        } else {
            self.drained.fetch_and(!bit, Ordering::SeqCst)
        };
        let changed = (before & bit != 0) != drained;
        if changed {
            self.changed.notify_waiters();
        }
        changed
    }

    /// Whether an operator has drained this node: it gets no new reads. What is believed of it is another matter.
    pub fn is_drained(&self, node: NodeId) -> bool {
        self.drained.load(Ordering::Relaxed) & Self::bit(node) != 0
    }

    /// The configuration has at most 64 nodes.
    fn bit(node: NodeId) -> u64 {
        1u64.checked_shl(u32::from(node.0)).unwrap_or(0)
    }

    /// The current value, without a lock.
    pub fn load(&self) -> Guard<Arc<Topology>> {
        self.current.load()
    }

    /// The current value, to be held across a wait.
    pub fn load_full(&self) -> Arc<Topology> {
        self.current.load_full()
    }

    /// Replaces the value and wakes whoever waits for a change.
    pub fn publish(&self, next: Topology) {
        let next = Arc::new(next);
        let before = self.current.swap(Arc::clone(&next));
        if before.epoch != next.epoch
            || before.nodes.len() != next.nodes.len()
            || before.nodes.iter().zip(&next.nodes).any(|(old, new)| !old.standing.is_like(&new.standing))
        {
            self.changes.fetch_add(1, Ordering::Relaxed);
        }
        self.changed.notify_waiters();
    }

    /// How often a node's standing or the epoch has changed; lags, which change all the time, apart.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Resolves at the next [`publish`](Self::publish) after the future was created.
    pub fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }
}
