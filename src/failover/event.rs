//! What goes into the failover machine and what comes out of it. Pure.

use std::fmt;
use std::time::{Duration, Instant};

use crate::failover::record::{Forked, Record};
pub use crate::topology::Quarantine;
use crate::topology::{Epoch, NodeId};
use crate::wal::{Lsn, TimelineId};

/// The time of a step: `at` decides, `unix_ms` is only written down (history), for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// By the monotonic clock.
    pub at: Instant,
    /// By the wall clock, in milliseconds since 1970.
    pub unix_ms: u64,
}

/// What a probe found of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact {
    /// It answered.
    Answered(Seen),
    /// 57P03: it starts up, recovers or shuts down. Not dead.
    Starting,
    /// 57P01, by an administrator: it is being shut down or restarted in order.
    ShuttingDown,
    /// Any other error as answer: it lives, and does not let us look.
    Alive(String),
    /// Nobody listens there. Hard evidence.
    Refused,
    /// The connection broke, and a new one did not come about either.
    Broken,
    /// No answer before the deadline.
    Silent,
}

/// A node's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The cluster it belongs to.
    pub system_identifier: u64,
    /// Tells this start of the server (crash-restarts included) from others, where it can be known.
    pub start: Option<std::sync::Arc<str>>,
    /// What it was doing.
    pub role: Role,
}

/// What an answering node was doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It takes writes.
    Primary {
        /// The timeline it writes.
        timeline: TimelineId,
        /// Its insert position.
        insert: Lsn,
        /// Where `timeline` left the timeline of the epoch that the machine knows, if its history says so.
        fork: Option<Lsn>,
    },
    /// It is in recovery.
    Standby {
        /// The timeline it replays; `None`: cannot be known now.
        timeline: Option<TimelineId>,
        /// What it has received. Goes backwards when a walreceiver restarts: never a final position.
        receive: Option<Lsn>,
        /// What it has replayed.
        replay: Option<Lsn>,
        /// Its walreceiver; `None`: there is none, or it is just connecting.
        walreceiver: Option<Walreceiver>,
    },
}

/// A standby's walreceiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walreceiver {
    /// Its process.
    pub pid: u32,
    /// Whether its status is `streaming`.
    pub streaming: bool,
    /// The timeline it receives.
    pub timeline: TimelineId,
    /// The node that sends to it; `None`: its address is none of the configuration's.
    pub from: Option<NodeId>,
}

/// Tells one order from all others of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OrderId(pub u64);

/// Something to be done on one node, in the one control session that holds its lock (I10). Each is idempotent, and
/// ends by itself within a time of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// A standby: make its walreceiver connect anew, and see whether it streams again within `wait`.
    Kick {
        /// How long to wait for it.
        wait: Duration,
    },
    /// The old primary: no more writes by sessions that do not insist (`default_transaction_read_only`), and no more
    /// sessions of clients.
    Fence,
    /// Undoes [`Order::Fence`].
    Unfence,
    /// A standby: cut it off from its primary and read its final position (I3). What it changes it keeps somewhere
    /// durable first, for [`Order::Unsever`].
    Sever,
    /// Undoes [`Order::Sever`].
    Unsever,
    /// A standby: wait until it has replayed `lsn`.
    Barrier {
        /// The position.
        lsn: Lsn,
        /// How long to wait.
        wait: Duration,
    },
    /// A standby that is about to be promoted: whose confirmation its commits wait for (I11). No members: nobody's.
    SetSync {
        /// The members.
        members: Vec<NodeId>,
        /// How many of them.
        num: u32,
    },
    /// Promote it, or find it promoted: polls until it is not in recovery. Clears what may block its replay first.
    Promote {
        /// The epoch that this begins.
        epoch: Epoch,
        /// The timeline that ends.
        timeline: TimelineId,
        /// How long to wait.
        wait: Duration,
    },
    /// A standby: follow `to` from now on, unless it holds WAL beyond `fork` (I5). Undoes what `Sever` changed, the
    /// address apart.
    Repoint {
        /// The new primary.
        to: NodeId,
        /// Its timeline.
        timeline: TimelineId,
        /// The old timeline's end on it.
        fork: Lsn,
    },
    /// The new primary: write the epoch's row, where that table exists.
    EpochRow {
        /// The epoch.
        epoch: Epoch,
        /// Its timeline.
        timeline: TimelineId,
        /// Where that began.
        fork: Lsn,
    },
}

impl Order {
    /// One word for a metric label or a log field.
    pub fn label(&self) -> &'static str {
        match self {
            Order::Kick { .. } => "kick",
            Order::Fence => "fence",
            Order::Unfence => "unfence",
            Order::Sever => "sever",
            Order::Unsever => "unsever",
            Order::Barrier { .. } => "barrier",
            Order::SetSync { .. } => "set_sync",
            Order::Promote { .. } => "promote",
            Order::Repoint { .. } => "repoint",
            Order::EpochRow { .. } => "epoch_row",
        }
    }
}

/// How an order ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrderResult {
    /// Unsever, Unfence, SetSync (in effect, by a fresh session), Repoint, EpochRow: done, and seen to be.
    Done,
    /// Sever: cut off, with a final position.
    Severed {
        /// The end of the WAL that it has and will replay.
        end: Lsn,
        /// Its timeline; `None`: as it was observed last.
        timeline: Option<TimelineId>,
    },
    /// Kick.
    Kicked(Kick),
    /// Fence: read-only, without clients; nothing was written beyond `end` after that by those who do not insist.
    Fenced {
        /// Its flush position.
        end: Lsn,
    },
    /// Barrier: replayed up to here, at least what was asked.
    Reached(Lsn),
    /// Promote: it takes writes.
    Promoted {
        /// Its timeline.
        timeline: TimelineId,
        /// Where that left the old one.
        fork: Lsn,
    },
    /// Repoint: it holds WAL beyond the fork; nothing was changed.
    Diverged {
        /// Its position.
        at: Lsn,
    },
    /// It was refused, or cannot be done there: nothing has changed and nothing will. The text says why.
    Failed(String),
    /// No answer in time, or the session was lost: it may have taken effect, or will.
    Unknown(String),
}

/// What became of a walreceiver that was made to connect anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kick {
    /// A new process streams: the primary lives.
    Streams,
    /// The old process has ended and no new one streams: this standby cannot reach it either.
    Gone,
    /// The old process is still there (replay is blocked): says nothing.
    SameProcess,
}

/// What happens to the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has passed.
    Tick,
    /// A probe has ended.
    Observed {
        /// Of which node.
        node: NodeId,
        /// What it found.
        fact: Fact,
    },
    /// The topology has a write target that the machine did not make: the first one, one that somebody else promoted,
    /// or the same one after a crash.
    Adopted {
        /// The node.
        primary: NodeId,
        /// Its timeline.
        timeline: TimelineId,
        /// The epoch that began.
        epoch: Epoch,
        /// The cluster.
        system_identifier: u64,
        /// How the timeline before ended, where another one has begun and that could be learned.
        forked: Option<Forked>,
    },
    /// An order has ended.
    OrderDone {
        /// Which.
        id: OrderId,
        /// How.
        result: OrderResult,
    },
    /// A record could not be made durable; the actions behind it were dropped.
    RecordFailed(String),
    /// All sockets of that epoch and earlier ones are closed (I2).
    SocketsClosed {
        /// The epoch.
        epoch: Epoch,
    },
    /// Nobody is in a transaction on the primary any more (answers `Gate::Draining`).
    Drained,
    /// A write whose lower bound is this position (the last one sampled before it was sent) was acknowledged.
    Acknowledged(Lsn),
    /// What nodes must grant and be set to was looked at: what a failover would stumble over, if anything.
    Prepared(Option<String>),
    /// `synchronous_standby_names` and what is recorded of it has changed (by `failover::sync`).
    Sync(crate::failover::record::SyncState),
    /// An operator asks for something.
    Command {
        /// Tells its answer from others.
        id: CommandId,
        /// What.
        command: Command,
    },
}

/// Tells one command from all others of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommandId(pub u64);

/// What an operator may ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Exchange a living primary for a standby, without loss.
    Switchover {
        /// For whom; `None`: the best one.
        to: Option<NodeId>,
        /// Only say whether it could be done now, and for whom.
        dry_run: bool,
        /// How long clients may wait for it; `None`: `failover.pause_timeout`.
        timeout: Option<Duration>,
    },
    /// Replace a dead primary.
    Failover {
        /// By whom; `None`: the best one.
        to: Option<NodeId>,
        /// Also when something acknowledged may be, or is, left behind.
        allow_data_loss: bool,
    },
    /// No failover by itself until resumed. Survives restarts.
    PauseFailover,
    /// Undoes that.
    ResumeFailover,
    /// Fence a node that is not the primary, in SQL.
    Fence(NodeId),
    /// Undoes that.
    Unfence(NodeId),
    /// The operator vouches that this node is gone for good and will not come back by itself: a promotion that it may
    /// have begun counts as not begun (I6).
    Forget(NodeId),
    /// A failover so soon after the last one is wanted; a quarantine or block that waits for an operator ends.
    AckRecovery,
}

/// Whether statements for the primary may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Yes.
    Open,
    /// New ones wait.
    Paused,
    /// New ones wait; transactions in progress may end by themselves.
    Draining,
    /// New ones wait; nothing of the old epoch is forwarded any more.
    Closed,
}

/// What the shell is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make this durable before doing anything behind it. At most one in a step, and then the first action. When that
    /// fails, drop the step's other actions (commands answered in it failed) and say [`Event::RecordFailed`].
    Record(Box<Record>),
    /// For statements that want the primary.
    Gate(Gate),
    /// Close all sockets to the primary of this epoch and earlier ones; answered by [`Event::SocketsClosed`].
    CloseSockets {
        /// The epoch.
        epoch: Epoch,
    },
    /// Do this on a node; answered by [`Event::OrderDone`].
    Order {
        /// To be named in the answer.
        id: OrderId,
        /// The node.
        node: NodeId,
        /// What.
        order: Order,
    },
    /// Probe this node at once.
    Probe(NodeId),
    /// The new write target.
    Publish(Target),
    /// The state is another now: one log line, one count.
    Enter(State),
    /// Answers a command. A command is answered once.
    Reply {
        /// Which.
        id: CommandId,
        /// `Err`: it was not done, and why.
        answer: Result<String, String>,
    },
    /// Something that an operator should know; one log line.
    Alarm(Alarm),
}

/// A write target that failover made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The node.
    pub primary: NodeId,
    /// Its epoch.
    pub epoch: Epoch,
    /// Its timeline.
    pub timeline: TimelineId,
    /// Where the old timeline ended on it.
    pub fork: Lsn,
    /// The primary before.
    pub old_primary: NodeId,
    /// Whether it was asked for: drained, and caught up.
    pub planned: bool,
    /// Whether all that was acknowledged is on it: planned, or a quorum was compared (I4).
    pub kept: bool,
    /// What is known of the loss.
    pub loss: Loss,
}

/// What a failover is known to have lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    /// Bytes of WAL with acknowledged writes that are gone, at least. Never "none": 0 says that none is known.
    pub acked_bytes_min: u64,
    /// For so long before the end the old primary's position was not sampled.
    pub unsampled_ms: Option<u64>,
    /// Bytes between the fork and the old primary's end, once that could be read.
    pub exact_bytes: Option<u64>,
}

/// What an operator should know, beside changes of the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Alarm {
    /// The standbys stream from the primary, but this proxy cannot reach it.
    OnlyWeAreCutOff,
    /// The primary answers, with an error.
    PrimaryRefusesUs(String),
    /// No standby can be reached either: this proxy is the isolated one.
    Isolated,
    /// A node takes writes of an epoch that is over: it is being fenced, and never used.
    OldPrimaryBack(NodeId),
    /// That node's log ended here: what the failover lost is known now.
    LossKnown(Loss),
    /// A node is kept out.
    Quarantined(NodeId, Quarantine),
    /// An order failed; it is tried again where that makes sense.
    OrderFailed {
        /// Where.
        node: NodeId,
        /// Which.
        order: &'static str,
        /// Why.
        why: String,
    },
}

/// Where the machine stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// No primary has been seen yet.
    Starting,
    /// The primary answers.
    Healthy,
    /// It does not; it is not yet clear what that means.
    Suspect,
    /// The standbys are asked, and made to ask, whether it lives.
    Confirming,
    /// It is gone; what leads to it is being closed.
    Fencing,
    /// Standbys are being cut off from it.
    Severing,
    /// Their final positions are known: one is being chosen and prepared.
    Electing(NodeId),
    /// This one is being promoted.
    Promoting(NodeId),
    /// It takes writes; the others are being made to follow it.
    Repointing(NodeId),
    /// Not without an operator, or not before something changes.
    Blocked(BlockReason),
    /// A switchover: transactions are ending.
    Draining(NodeId),
    /// A switchover: the old primary takes no more writes, the new one catches up.
    AtBarrier(NodeId),
    /// Another proxy leads, and decides: not a state of the machine's.
    Following,
}

impl State {
    /// All labels, for the metric.
    pub const LABELS: [&'static str; 13] = [
        "starting",
        "healthy",
        "suspect",
        "confirming",
        "fencing",
        "severing",
        "electing",
        "promoting",
        "repointing",
        "blocked",
        "draining",
        "barrier",
        "following",
    ];

    /// One word for a metric label or a log field.
    pub fn label(&self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Healthy => "healthy",
            State::Suspect => "suspect",
            State::Confirming => "confirming",
            State::Fencing => "fencing",
            State::Severing => "severing",
            State::Electing(_) => "electing",
            State::Promoting(_) => "promoting",
            State::Repointing(_) => "repointing",
            State::Blocked(_) => "blocked",
            State::Draining(_) => "draining",
            State::AtBarrier(_) => "barrier",
            State::Following => "following",
        }
    }
}

/// Why a failover does not go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockReason {
    /// `mode: manual`: the primary is gone, and FAILOVER is waited for.
    Manual,
    /// PAUSE FAILOVER.
    Paused,
    /// A node does not grant, or is not set to, what a failover needs there.
    Unprepared(String),
    /// There was one less than `min_failover_interval` ago.
    TooSoon,
    /// Fewer synchronous standbys were cut off than it takes to know every acknowledged commit (I4).
    TooFewSynchronous {
        /// Cut off.
        have: usize,
        /// Needed.
        need: usize,
    },
    /// Synchronous replication was recorded as degraded: commits were acknowledged that no standby confirmed.
    Degraded,
    /// The best standby lacks more than `max_lost_bytes` of what the primary was seen to have.
    DataLoss {
        /// Bytes.
        bytes: u64,
    },
    /// The node asked for is behind another one.
    Behind {
        /// The one ahead.
        ahead: NodeId,
        /// Bytes.
        bytes: u64,
    },
    /// Too few nodes can be reached (`allow_minority`).
    Minority {
        /// Standbys reached.
        have: usize,
        /// Needed.
        need: usize,
    },
    /// The standbys that can be reached do not say whether the primary is gone: none follows it directly, or replay
    /// stands still on those that do.
    NoWitness,
    /// A reachable standby could not be cut off within `sever_timeout`.
    SeverTimeout {
        /// Which.
        node: NodeId,
    },
    /// No standby may be promoted.
    NoCandidate,
    /// Who could take over is in another zone than the primary.
    OtherZone {
        /// The best of them.
        node: NodeId,
    },
    /// The standbys at hand never followed the lost primary: what it wrote since it took over is on none of them.
    LeftBehind {
        /// One of them.
        node: NodeId,
    },
    /// The candidate could not be given its `synchronous_standby_names`, or refused to be promoted.
    CandidateRefused {
        /// Which.
        node: NodeId,
        /// Its answer.
        why: String,
    },
    /// A promotion was sent to this node and its outcome cannot be learned; nobody else may be promoted (I6).
    CandidateUnreachable {
        /// Which.
        node: NodeId,
    },
    /// Another node takes writes on the same timeline: promoted by somebody, or a copy of the primary.
    SecondWriter {
        /// Which.
        node: NodeId,
    },
    /// The sessions' sockets could not be closed.
    SocketsOpen,
    /// The record could not be written.
    NotDurable(String),
}

impl BlockReason {
    /// All labels, for the metric.
    pub const LABELS: [&'static str; 19] = [
        "manual",
        "paused",
        "unprepared",
        "too_soon",
        "too_few_synchronous",
        "degraded",
        "data_loss",
        "behind",
        "minority",
        "no_witness",
        "sever_timeout",
        "no_candidate",
        "other_zone",
        "left_behind",
        "candidate_refused",
        "candidate_unreachable",
        "second_writer",
        "sockets_open",
        "not_durable",
    ];

    /// One word for a metric label or a log field.
    pub fn label(&self) -> &'static str {
        match self {
            BlockReason::Manual => "manual",
            BlockReason::Paused => "paused",
            BlockReason::Unprepared(_) => "unprepared",
            BlockReason::TooSoon => "too_soon",
            BlockReason::TooFewSynchronous { .. } => "too_few_synchronous",
            BlockReason::Degraded => "degraded",
            BlockReason::DataLoss { .. } => "data_loss",
            BlockReason::Behind { .. } => "behind",
            BlockReason::Minority { .. } => "minority",
            BlockReason::NoWitness => "no_witness",
            BlockReason::SeverTimeout { .. } => "sever_timeout",
            BlockReason::NoCandidate => "no_candidate",
            BlockReason::OtherZone { .. } => "other_zone",
            BlockReason::LeftBehind { .. } => "left_behind",
            BlockReason::CandidateRefused { .. } => "candidate_refused",
            BlockReason::CandidateUnreachable { .. } => "candidate_unreachable",
            BlockReason::SecondWriter { .. } => "second_writer",
            BlockReason::SocketsOpen => "sockets_open",
            BlockReason::NotDurable(_) => "not_durable",
        }
    }
}

impl fmt::Display for BlockReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BlockReason::Manual => f.write_str("the primary is gone; FAILOVER replaces it (mode: manual)"),
            BlockReason::Paused => f.write_str("failover is paused; RESUME FAILOVER lets it go on"),
            BlockReason::Unprepared(what) => write!(f, "{what}; FAILOVER tries all the same"),
            BlockReason::TooSoon => f.write_str(
                "the last failover was less than min_failover_interval ago; ACK RECOVERY allows another",
            ),
            BlockReason::TooFewSynchronous { have, need } => write!(
                f,
                "{have} synchronous standbys could be cut off and it takes {need} to know every acknowledged commit; \
                 FAILOVER .. ALLOW DATA LOSS goes on without"
            ),
            BlockReason::Degraded => f.write_str(
                "synchronous replication was degraded: acknowledged commits may be on no standby; \
                 FAILOVER .. ALLOW DATA LOSS goes on without them",
            ),
            BlockReason::DataLoss { bytes } => write!(
                f,
                "the best standby lacks {bytes} bytes, more than max_lost_bytes; FAILOVER .. ALLOW DATA LOSS gives them up"
            ),
            BlockReason::Behind { bytes, .. } => {
                write!(f, "another standby is {bytes} bytes ahead; ALLOW DATA LOSS gives them up")
            }
            BlockReason::Minority { have, need } => {
                write!(f, "{have} standbys can be reached and it takes {need} (allow_minority does without)")
            }
            BlockReason::NoWitness => f.write_str(
                "no standby that can be reached says whether the primary is gone, as none follows it directly or replay stands \
                 still there; FAILOVER replaces it, if you know that it is gone",
            ),
            BlockReason::SeverTimeout { .. } => {
                f.write_str("a standby that answers could not be cut off within sever_timeout")
            }
            BlockReason::NoCandidate => f.write_str("no standby may be promoted"),
            BlockReason::OtherZone { .. } => f.write_str(
                "who could take over is in another zone than the lost primary (same_zone_only); \
                 FAILOVER TO it promotes it all the same",
            ),
            BlockReason::LeftBehind { .. } => f.write_str(
                "the standbys that can be reached never followed the lost primary and have nothing of what it wrote; \
                 bring it back, or a standby that followed it",
            ),
            BlockReason::CandidateRefused { why, .. } => write!(f, "the candidate refused: {why}"),
            BlockReason::CandidateUnreachable { .. } => f.write_str(
                "the node that was told to promote does not answer, and no other may be promoted; \
                 if it is gone for good, FORGET it",
            ),
            BlockReason::SecondWriter { .. } => f.write_str(
                "another node takes writes on the primary's own timeline; end one of the two, which have diverged",
            ),
            BlockReason::SocketsOpen => f.write_str("connections to the old primary could not be closed"),
            BlockReason::NotDurable(cause) => write!(f, "the record could not be written: {cause}"),
        }
    }
}
