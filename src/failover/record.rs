//! What must survive a crash of the proxy: written before the step that it is about. Pure; `store` keeps it, with
//! nodes by their names.

use crate::failover::event::Quarantine;
use crate::topology::{Epoch, NodeId};
use crate::wal::{Lsn, TimelineId};

/// How many failovers are remembered.
pub const MAX_HISTORY: usize = 64;

/// How many ends of timelines are remembered.
pub const MAX_FORKS: usize = 16;

/// All that is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The cluster.
    pub system_identifier: Option<u64>,
    /// The greatest epoch begun.
    pub epoch: Epoch,
    /// Its write target.
    pub primary: Option<NodeId>,
    /// That one's timeline.
    pub timeline: Option<TimelineId>,
    /// How earlier timelines ended, oldest first; bounded.
    pub forks: Vec<Forked>,
    /// What is under way.
    pub intent: Option<Intent>,
    /// Standbys of this epoch that have been told to cut themselves off (or may yet be, by a late statement): they are
    /// to follow its primary again, unless it is replaced.
    pub severed: Vec<NodeId>,
    /// Standbys that an earlier epoch left behind: they are to follow the new primary.
    pub repoint: Vec<NodeId>,
    /// Nodes whose sessions were made read-only, and may be allowed to write again.
    pub fenced: Vec<NodeId>,
    /// Nodes that are kept out until repaired.
    pub quarantined: Vec<(NodeId, Quarantine)>,
    /// What is known of synchronous replication (I9).
    pub sync: SyncState,
    /// There was a failover less than `min_failover_interval` ago. No time is kept with it: a clock may jump, so after a
    /// restart the interval begins anew.
    pub cooling: bool,
    /// PAUSE FAILOVER.
    pub paused: bool,
    /// Failovers so far, oldest first; bounded.
    pub history: Vec<Entry>,
}

impl Record {
    /// The same, where the nodes of which `gone` holds are none any more: nothing is left to be done with them.
    #[must_use]
    pub fn without(&self, gone: impl Fn(NodeId) -> bool) -> Record {
        let mut record = self.clone();
        for list in [&mut record.severed, &mut record.repoint, &mut record.fenced] {
            list.retain(|node| !gone(*node));
        }
        record.quarantined.retain(|(node, _)| !gone(*node));
        record
    }
}

/// The end of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forked {
    /// Its primary.
    pub old_primary: NodeId,
    /// The timeline.
    pub old_timeline: TimelineId,
    /// Its end on the new primary.
    pub fork: Lsn,
}

/// A failover or switchover that has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intent {
    /// What it replaces.
    pub from: NodeId,
    /// Whether the old primary was alive and somebody asked.
    pub planned: bool,
    /// The epoch that it makes.
    pub epoch: Epoch,
    /// How far it may have come.
    pub stage: Stage,
    /// All acknowledged commits are known to be on the one that is being promoted (I4).
    pub covered: bool,
}

/// How far an intent may have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Fences and cut-off standbys, which can be undone.
    Prepare,
    /// This node may have been told to promote: it and no other (I6).
    Promote(NodeId),
}

/// Synchronous replication as it is recorded (I9): commits wait for `num` of `members`, unless degraded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncState {
    /// The nodes named in `synchronous_standby_names`.
    pub members: Vec<NodeId>,
    /// How many of them confirm a commit.
    pub num: u32,
    /// Commits may have been acknowledged with fewer, or may be.
    pub degraded: bool,
}

impl SyncState {
    /// How many members must be cut off, and compared, before all acknowledged commits are known to be among them, and
    /// before the old primary can acknowledge no more (I4).
    pub fn needed(&self) -> usize {
        let num = usize::try_from(self.num).unwrap_or(usize::MAX);
        (self.members.len() + 1).saturating_sub(num)
    }
}

/// A line of the history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When it ended, by the wall clock, for people.
    pub unix_ms: u64,
    /// The epoch it made.
    pub epoch: Epoch,
    /// The old primary.
    pub from: NodeId,
    /// The new one.
    pub to: NodeId,
    /// Whether it was a switchover.
    pub planned: bool,
    /// Where the new timeline began.
    pub fork: Lsn,
    /// Bytes of acknowledged writes that were lost, at least.
    pub lost_acked_bytes_min: u64,
    /// From the first sign to the first write possible.
    pub took_ms: u64,
}
