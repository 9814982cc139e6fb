//! The failover machine: the states, and the order of steps. Pure.
//!
//! A step takes in one event and then asks what is wanted now, given all that is known: so each state can be entered
//! from a record after a crash as well as from the state before, and a result that comes late or twice does no harm.
//! Where there is no intent, the primary is watched (`watch_primary`) and what earlier failovers left is put in order
//! (`mend`); where there is one, it is driven on (`drive`). What is to be durable is compared at the end of each step
//! and goes out before everything else of it: no order can overtake the record that it leans on (I1).

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::time::{Duration, Instant};

use crate::failover::candidate::{self, Cut, Election};
use crate::failover::detect::{self, Patience, Testimony, Verdict, Watch, Witness};
use crate::failover::event::{
    Action, Alarm, BlockReason, CommandId, Event, Fact, Gate, Kick, Loss, Now, Order, OrderId, OrderResult,
    Quarantine, Role, Seen, State, Target,
};
use crate::failover::record::{Entry, Forked, Intent, MAX_FORKS, MAX_HISTORY, Record, Stage, SyncState};
use crate::failover::sync;
use crate::topology::{Epoch, NodeId};
use crate::wal::{Lsn, TimelineId};

/// An order that failed is given again after this.
const RETRY: Duration = Duration::from_millis(100);
/// The same, for what nobody waits for.
const MEND_RETRY: Duration = Duration::from_secs(2);
/// A block that can pass by itself is looked at anew after this.
const BLOCK_RETRY: Duration = Duration::from_secs(2);
/// A standby that streams after a kick vouches for the primary for so many times `kick_timeout`: each further kick
/// interrupts a stream that is well.
const VOUCHED: u32 = 5;
/// No standby is made to connect anew before so many failures in a row.
const FAILURES_FOR_A_KICK: u32 = 2;

/// Who begins a failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// An operator.
    Manual,
    /// The machine, too.
    Auto,
}

/// What an acknowledged commit is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// It may be lost with the primary.
    Async,
    /// It is on as many standbys as were configured, and survives.
    Quorum,
}

/// One node, as the configuration has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRule {
    /// Its name.
    pub name: String,
    /// Breaks ties between equal positions, the greater first; 0: never promoted.
    pub priority: u32,
    /// Where it is; those that are nowhere are so together.
    pub zone: Option<String>,
}

/// The part of the configuration that the machine goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Who begins a failover.
    pub mode: Mode,
    /// What a commit is worth.
    pub durability: Durability,
    /// The nodes, by [`NodeId`].
    pub nodes: Vec<NodeRule>,
    /// Only a standby of the primary's zone takes over, unless a command names another.
    pub same_zone_only: bool,
    /// Soft failures in a row before a node counts as gone.
    pub failure_threshold: u32,
    /// How long a walreceiver that was made to connect anew may take to stream.
    pub kick_timeout: Duration,
    /// A server that says it is starting is waited for so long.
    pub restart_grace: Duration,
    /// More restarts than this within `crash_loop_window` are no longer waited for.
    pub crash_loop_restarts: u32,
    /// See there.
    pub crash_loop_window: Duration,
    /// No failover by itself so soon after the proxy's start.
    pub startup_grace: Duration,
    /// A reachable standby that cannot be cut off within this blocks.
    pub sever_timeout: Duration,
    /// After this a promotion whose outcome is unknown is reported as blocked (and still waited for).
    pub promote_timeout: Duration,
    /// `Async`: the most that a candidate may lack of what the primary was seen to have.
    pub max_lost_bytes: u64,
    /// No second failover by itself within this.
    pub min_failover_interval: Duration,
    /// How long a switchover may hold clients up.
    pub pause_timeout: Duration,
    /// `Async`: go on also when most nodes cannot be reached.
    pub allow_minority: bool,
    /// Fence an old primary in SQL when it can be reached.
    pub fence_sql: bool,
    /// `Quorum`: how many standbys are to confirm a commit.
    pub sync_num: u32,
    /// `Quorum`: with fewer at hand commits wait, instead of being confirmed by fewer.
    pub sync_strict: bool,
    /// Whether orders may be given at all: they take a durable record (`state_dir`).
    pub hands: bool,
    /// So much longer than `sever_timeout` connections may take to close: another proxy that is gone is waited out.
    pub close_wait: Duration,
}

impl Settings {
    /// The configuration's defaults for these nodes, with `mode: auto` and a record to lean on.
    pub fn of_nodes(nodes: Vec<NodeRule>) -> Settings {
        Settings {
            mode: Mode::Auto,
            durability: Durability::Async,
            nodes,
            same_zone_only: true,
            failure_threshold: 3,
            kick_timeout: Duration::from_secs(2),
            restart_grace: Duration::from_secs(10),
            crash_loop_restarts: 3,
            crash_loop_window: Duration::from_secs(60),
            startup_grace: Duration::from_secs(10),
            sever_timeout: Duration::from_secs(3),
            promote_timeout: Duration::from_secs(60),
            max_lost_bytes: 1 << 20,
            min_failover_interval: Duration::from_secs(300),
            pause_timeout: Duration::from_secs(10),
            allow_minority: false,
            fence_sql: true,
            sync_num: 1,
            sync_strict: false,
            hands: true,
            close_wait: Duration::ZERO,
        }
    }
}

/// What is known of one node in this process.
#[derive(Clone, Debug, Default)]
struct Known {
    fact: Option<Fact>,
    /// The last answer, whatever came after.
    seen: Option<Seen>,
    failures: u32,
    /// The timeline that it replayed or wrote when that could be known last.
    timeline: Option<TimelineId>,
    /// The start of the server that has been fenced.
    fenced_start: Option<Option<std::sync::Arc<str>>>,
    /// No further order to it before this.
    retry_at: Option<Instant>,
    /// No further order to it before this that nobody waits for.
    mend_at: Option<Instant>,
    /// When it was last made to follow again: it may be connecting since.
    unsevered: Option<Instant>,
}

/// Since when, and what was learned since.
#[derive(Clone, Debug)]
struct Suspicion {
    since: Instant,
    /// When the evidence sufficed.
    gone_since: Option<Instant>,
    /// The standbys have said so once: that they were cut off after that takes nothing from it.
    confirmed: bool,
    /// Since when they have said neither that it is gone nor that it lives.
    undecided: Option<Instant>,
    heard: Vec<bool>,
    kicked: BTreeMap<NodeId, (Kick, Instant)>,
    /// Kicks that ended without a result: the standby may still be connecting anew, which says nothing.
    unsettled: BTreeMap<NodeId, Instant>,
    alarmed: Option<Alarm>,
}

/// What a running failover or switchover knows; made anew after a crash.
#[derive(Clone, Debug)]
pub(super) struct Attempt {
    /// When the outage began, as far as is known.
    pub(super) since: Instant,
    pub(super) to: Option<NodeId>,
    pub(super) allow_data_loss: bool,
    pub(super) command: Option<CommandId>,
    /// A switchover gives up at this time.
    pub(super) deadline: Option<Instant>,
    pub(super) drained: bool,
    closing_since: Option<Instant>,
    sockets_closed: bool,
    fenced: bool,
    barrier: Option<Lsn>,
    reached: bool,
    severing_since: Option<Instant>,
    cuts: BTreeMap<NodeId, Cut>,
    /// The candidate has this in effect.
    sync: Option<(NodeId, SyncState)>,
    promoting_since: Option<Instant>,
    /// A promotion of unknown outcome has been sent, perhaps by an earlier process.
    uncertain: bool,
}

impl Attempt {
    pub(super) fn new(since: Instant) -> Attempt {
        Attempt {
            since,
            to: None,
            allow_data_loss: false,
            command: None,
            deadline: None,
            drained: false,
            closing_since: None,
            sockets_closed: false,
            fenced: false,
            barrier: None,
            reached: false,
            severing_since: None,
            cuts: BTreeMap::new(),
            sync: None,
            promoting_since: None,
            uncertain: false,
        }
    }
}

#[derive(Clone, Debug)]
struct Blocked {
    reason: BlockReason,
    retry_at: Instant,
    reachable: Vec<NodeId>,
}

#[derive(Clone, Debug)]
pub(super) struct Pending {
    pub(super) node: NodeId,
    pub(super) order: Order,
    pub(super) command: Option<CommandId>,
}

/// The machine. One per proxy, made from its record; [`step`](Self::step) is its only way to change.
#[derive(Clone, Debug)]
pub struct Machine {
    pub(super) settings: Settings,
    pub(super) record: Record,
    /// The record that is on disk; `None`: one could not be written, and may be there all the same (its name in the
    /// directory could not be flushed). Nothing leans on either before one has been written again.
    written: Option<Record>,
    state: State,
    started: Instant,
    known: Vec<Known>,
    /// Nodes that are none any more: they keep their numbers.
    removed: BTreeSet<NodeId>,
    pub(super) watch: Watch,
    seen_well: bool,
    /// By the last look the primary is gone, as far as this proxy can see.
    gone: bool,
    /// When standbys were made to connect anew on slight evidence.
    kicked_early: Option<Instant>,
    suspicion: Option<Suspicion>,
    pub(super) attempt: Option<Attempt>,
    pub(super) orders: BTreeMap<OrderId, Pending>,
    next_order: u64,
    gate: Option<Gate>,
    cool_until: Option<Instant>,
    blocked: Option<Blocked>,
    /// Nothing that needs the disk before this: it failed.
    hold_until: Option<Instant>,
    repointing_since: Option<Instant>,
    last_sample: Option<(Lsn, Instant)>,
    acknowledged: Option<Lsn>,
    /// What a failover by itself would stumble over.
    unprepared: Option<String>,
    /// The machine before the last step that had a record.
    undo: Option<Box<Machine>>,
    pub(super) out: Vec<Action>,
    /// By the wall clock, for the history.
    unix_ms: u64,
}

impl Machine {
    /// Goes on from `record` (an empty one for a new cluster). The first [`step`](Self::step) begins.
    pub fn new(settings: Settings, record: Record, now: Now) -> Machine {
        let count = settings.nodes.len();
        let mut machine = Machine {
            written: Some(record.clone()),
            state: State::Starting,
            started: now.at,
            known: vec![Known::default(); count],
            removed: BTreeSet::new(),
            watch: Watch::default(),
            seen_well: false,
            gone: false,
            kicked_early: None,
            suspicion: None,
            attempt: None,
            orders: BTreeMap::new(),
            next_order: 0,
            gate: None,
            // The clock on the wall may have jumped: the interval begins anew.
            cool_until: record.cooling.then(|| now.at + settings.min_failover_interval),
            blocked: None,
            hold_until: None,
            repointing_since: None,
            last_sample: None,
            acknowledged: None,
            unprepared: None,
            undo: None,
            out: Vec::new(),
            unix_ms: now.unix_ms,
            settings,
            record,
        };
        match &machine.record.intent {
            // It may have been promoted, or be about to be: that one and no other (I6).
            Some(Intent { stage: Stage::Promote(candidate), .. }) => {
                machine.state = State::Promoting(*candidate);
                machine.attempt = Some(Attempt { uncertain: true, ..Attempt::new(now.at) });
            }
            // Nothing that cannot be undone: undo it, and judge anew (I12).
            Some(_) => machine.record.intent = None,
            None => {}
        }
        machine
    }

    /// The same without these nodes: nobody asks them, waits for them, or counts them.
    #[must_use]
    pub fn without(self, removed: BTreeSet<NodeId>) -> Machine {
        Machine { removed, ..self }
    }

    /// Whether nothing is under way: another machine could take over from the record at once.
    pub fn is_idle(&self) -> bool {
        self.record.intent.is_none() && self.attempt.is_none() && self.orders.is_empty()
    }

    /// Takes one event; what is to be done about it, in this order. The same machine, event and time give the same
    /// actions.
    pub fn step(&mut self, event: Event, now: Now) -> Vec<Action> {
        debug_assert!(self.out.is_empty());
        self.unix_ms = now.unix_ms;
        if let Event::RecordFailed(cause) = event {
            self.record_failed(cause, now.at);
            return mem::take(&mut self.out);
        }
        self.undo = None;
        let mut before = Box::new(self.clone());
        before.keep_of(&event);
        let tick = event == Event::Tick;
        self.take(event, now);
        if self.hold_until.is_none_or(|until| now.at >= until) {
            self.hold_until = None;
            self.cool_down(now.at);
            match self.record.intent.clone() {
                None => self.watch_primary(tick, now),
                Some(intent) => self.drive(&intent, now),
            }
            self.mend(now);
        }
        self.settle_gate();
        let mut actions = mem::take(&mut self.out);
        let waits = self.written.is_none() && self.hold_until.is_some() && actions.is_empty();
        if self.written.as_ref() != Some(&self.record) && !waits {
            self.written = Some(self.record.clone());
            actions.insert(0, Action::Record(Box::new(self.record.clone())));
            self.undo = Some(before);
        }
        actions
    }

    /// Where it stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What it would want to find after a crash now.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Whether a write target that the machine has not made may be adopted: not while it makes one.
    pub fn may_adopt(&self) -> bool {
        self.record.intent.is_none()
    }

    /// Why this node must not be used, whatever it says (I5, I8).
    pub fn quarantine(&self, node: NodeId) -> Option<Quarantine> {
        self.record.quarantined.iter().find(|(of, _)| *of == node).map(|(_, why)| *why)
    }

    pub(super) fn name(&self, node: NodeId) -> &str {
        self.settings.nodes.get(node.index()).map_or("?", |rule| &rule.name)
    }

    /// What of an event must not be lost with the step that it began, should the record fail.
    fn keep_of(&mut self, event: &Event) {
        match event {
            Event::OrderDone { id, .. } => {
                self.orders.remove(id);
            }
            Event::SocketsClosed { epoch } => self.sockets_closed(*epoch),
            Event::Drained => self.drained(),
            _ => {}
        }
    }

    fn take(&mut self, event: Event, now: Now) {
        match event {
            Event::Tick => {}
            Event::Observed { node, fact } => self.observed(node, fact, now.at),
            Event::Adopted { primary, timeline, epoch, system_identifier, forked } => {
                self.adopted(primary, timeline, epoch, system_identifier, forked);
            }
            Event::OrderDone { id, result } => self.order_done(id, result, now),
            // Taken by `step`: what it undoes is the step before.
            Event::RecordFailed(_) => {}
            Event::SocketsClosed { epoch } => self.sockets_closed(epoch),
            Event::Drained => self.drained(),
            Event::Acknowledged(lsn) => {
                self.acknowledged = Some(self.acknowledged.map_or(lsn, |before| before.max(lsn)));
            }
            Event::Prepared(what) => self.unprepared = what,
            Event::Sync(sync) => self.record.sync = sync,
            Event::Command { id, command } => self.command(id, command, now),
        }
    }

    fn sockets_closed(&mut self, epoch: Epoch) {
        if epoch >= self.record.epoch
            && let Some(attempt) = &mut self.attempt
        {
            attempt.sockets_closed = true;
        }
    }

    fn drained(&mut self) {
        if let Some(attempt) = &mut self.attempt {
            attempt.drained = true;
        }
    }

    /// As if the step that wanted the record had not been: its actions were dropped. Tried again a little later. Yet
    /// a crash may find that record, and what the one before allows might make it untrue.
    fn record_failed(&mut self, cause: String, now: Instant) {
        if let Some(before) = self.undo.take() {
            *self = *before;
        }
        self.written = None;
        // What is undone here was perhaps the news that the candidate has been promoted: should it not be reached from now
        // on, that is no refusal.
        let promoting =
            matches!(&self.record.intent, Some(intent) if matches!(intent.stage, Stage::Promote(_)));
        if let Some(attempt) = self.attempt.as_mut().filter(|_| promoting) {
            attempt.uncertain = true;
        }
        self.hold_until = Some(now + BLOCK_RETRY);
        self.enter(State::Blocked(BlockReason::NotDurable(cause)));
    }

    fn cool_down(&mut self, now: Instant) {
        // While it blocks a failover, only the operator ends it.
        let blocks = matches!(&self.blocked, Some(Blocked { reason: BlockReason::TooSoon, .. }));
        if self.cool_until.is_some_and(|until| now >= until) && !blocks {
            self.cool_until = None;
            self.record.cooling = false;
        }
    }

    pub(super) fn enter(&mut self, state: State) {
        if self.state != state {
            self.out.push(Action::Enter(state.clone()));
            self.state = state;
        }
    }

    pub(super) fn alarm(&mut self, alarm: Alarm) {
        self.out.push(Action::Alarm(alarm));
    }

    pub(super) fn reply(&mut self, id: CommandId, answer: Result<String, String>) {
        self.out.push(Action::Reply { id, answer });
    }

    pub(super) fn give(&mut self, node: NodeId, order: Order, command: Option<CommandId>) {
        self.next_order += 1;
        let id = OrderId(self.next_order);
        self.orders.insert(id, Pending { node, order: order.clone(), command });
        self.out.push(Action::Order { id, node, order });
    }

    /// Whether `node` may be given an order: one at a time, and not at once after a failure. A statement of unknown
    /// outcome is over by then: the next order begins by taking the node's lock anew (I10).
    pub(super) fn is_free(&self, node: NodeId, now: Instant) -> bool {
        self.settings.hands
            && !self.orders.values().any(|pending| pending.node == node)
            && self.known.get(node.index()).is_some_and(|known| known.retry_at.is_none_or(|at| now >= at))
    }

    /// The same for an order that nobody waits for.
    fn is_free_to_mend(&self, node: NodeId, now: Instant) -> bool {
        let rested = |known: &Known| known.mend_at.is_none_or(|at| now >= at);
        self.is_free(node, now) && self.known.get(node.index()).is_some_and(rested)
    }

    /// The same for cutting it off. An order to follow a primary does not hold that up: it waits for long where that
    /// primary is lost, too, and gives way to what comes behind it.
    fn is_free_to_sever(&self, node: NodeId, now: Instant) -> bool {
        let follows = |pending: &Pending| matches!(pending.order, Order::Repoint { .. });
        self.settings.hands
            && !self.orders.values().any(|pending| pending.node == node && !follows(pending))
            && self.known.get(node.index()).is_some_and(|known| known.retry_at.is_none_or(|at| now >= at))
    }

    fn retry_after(&mut self, node: NodeId, now: Instant) {
        if let Some(known) = self.known.get_mut(node.index()) {
            known.retry_at = Some(now + RETRY);
        }
    }

    fn mend_after(&mut self, node: NodeId, now: Instant) {
        if let Some(known) = self.known.get_mut(node.index()) {
            known.mend_at = Some(now + MEND_RETRY);
        }
    }

    fn seen(&self, node: NodeId) -> Option<&Seen> {
        match self.known.get(node.index())?.fact.as_ref()? {
            Fact::Answered(seen) => Some(seen),
            _ => None,
        }
    }

    pub(super) fn role(&self, node: NodeId) -> Option<&Role> {
        self.seen(node).map(|seen| &seen.role)
    }

    pub(super) fn primary_position(&self) -> Option<Lsn> {
        self.last_sample.map(|(lsn, _)| lsn)
    }

    fn ours(&self, seen: &Seen) -> bool {
        self.record.system_identifier.is_none_or(|cluster| cluster == seen.system_identifier)
    }

    /// The timeline of this cluster that `node` writes, while it answers.
    fn writes(&self, node: NodeId) -> Option<TimelineId> {
        match self.seen(node).filter(|seen| self.ours(seen))?.role {
            Role::Primary { timeline, .. } => Some(timeline),
            Role::Standby { .. } => None,
        }
    }

    /// The standbys that can be reached: a single missed probe does not put one out of reach (I3).
    pub fn standbys(&self) -> Vec<NodeId> {
        let threshold = self.settings.failure_threshold.max(1);
        let reachable = |known: &Known| match (&known.fact, &known.seen) {
            (Some(Fact::Answered(_)), Some(_)) => true,
            (Some(Fact::Silent | Fact::Broken), Some(_)) => known.failures < threshold,
            _ => false,
        };
        (0u16..)
            .map(NodeId)
            .zip(&self.known)
            .filter(|(node, known)| {
                let standby = known
                    .seen
                    .as_ref()
                    .is_some_and(|seen| matches!(seen.role, Role::Standby { .. }) && self.ours(seen));
                Some(*node) != self.record.primary
                    && standby
                    && reachable(known)
                    && self.quarantine(*node).is_none()
            })
            .map(|(node, _)| node)
            .collect()
    }

    pub(super) fn priority(&self, node: NodeId) -> u32 {
        self.settings.nodes.get(node.index()).map_or(0, |rule| rule.priority)
    }

    /// It is in another zone than the primary, so that nobody but a command that names it may choose it.
    pub(super) fn is_elsewhere(&self, node: NodeId) -> bool {
        let Some(primary) = self.record.primary else { return false };
        self.settings.same_zone_only && self.zone(node) != self.zone(primary)
    }

    fn zone(&self, node: NodeId) -> Option<&str> {
        self.settings.nodes.get(node.index())?.zone.as_deref()
    }

    /// A reason in a sentence, with the names that it is about.
    pub fn explain(&self, reason: &BlockReason) -> String {
        let BlockReason::OtherZone { node } = reason else { return reason.to_string() };
        let of = |node| self.zone(node).map_or("no zone".to_owned(), |zone| format!("zone {zone}"));
        let (name, there) = (self.name(*node), of(*node));
        let here = self.record.primary.map_or(String::new(), of);
        format!(
            "{name} could take over, but is in {there}, and the lost primary in {here} (same_zone_only); \
             FAILOVER TO {name} promotes it all the same"
        )
    }

    pub(super) fn verdict(&self, now: Instant) -> Verdict {
        self.watch.verdict(&self.patience(), now)
    }

    fn patience(&self) -> Patience {
        Patience {
            failure_threshold: self.settings.failure_threshold,
            restart_grace: self.settings.restart_grace,
            crash_loop_restarts: self.settings.crash_loop_restarts,
            crash_loop_window: self.settings.crash_loop_window,
        }
    }

    /// How long the outage has lasted and what is known of it, for `SHOW FAILOVER`.
    pub fn suspected_for(&self, now: Instant) -> Option<Duration> {
        let since = self.suspicion.as_ref().map(|s| s.since).or(self.attempt.as_ref().map(|a| a.since))?;
        Some(now.saturating_duration_since(since))
    }

    // What comes in.

    fn observed(&mut self, node: NodeId, fact: Fact, now: Instant) {
        let patience = self.patience();
        let Some(known) = self.known.get_mut(node.index()) else { return };
        match &fact {
            Fact::Answered(seen) => {
                known.failures = 0;
                let timeline = match &seen.role {
                    Role::Primary { timeline, .. } => Some(*timeline),
                    Role::Standby { timeline, .. } => *timeline,
                };
                known.timeline = timeline.or(known.timeline);
                known.seen = Some(seen.clone());
            }
            _ => known.failures = known.failures.saturating_add(1),
        }
        known.fact = Some(fact.clone());
        if let Some(heard) = self.suspicion.as_mut().and_then(|s| s.heard.get_mut(node.index())) {
            *heard = true;
        }
        if self.record.primary == Some(node) {
            self.watch.observe(&fact, self.record.timeline, &patience, now);
            self.sample(&fact, now);
        }
        if let Fact::Answered(seen) = fact
            && self.ours(&seen)
        {
            match seen.role {
                Role::Primary { timeline, insert, fork } => {
                    self.saw_primary(node, timeline, insert, fork, now)
                }
                Role::Standby { timeline, walreceiver, .. } => {
                    let receiver = walreceiver.map(|receiver| (receiver.streaming, receiver.timeline));
                    self.saw_standby(node, timeline, receiver);
                }
            }
        }
    }

    fn sample(&mut self, fact: &Fact, now: Instant) {
        if let Fact::Answered(Seen { role: Role::Primary { timeline, insert, .. }, .. }) = fact
            && Some(*timeline) == self.record.timeline
        {
            self.last_sample = Some((*insert, now));
        }
    }

    fn saw_primary(
        &mut self,
        node: NodeId,
        timeline: TimelineId,
        insert: Lsn,
        fork: Option<Lsn>,
        now: Instant,
    ) {
        let Some(known) = self.record.timeline else { return };
        if Some(node) == self.record.primary {
            return;
        }
        if timeline > known {
            match self.record.intent.as_ref().map(|intent| intent.stage) {
                // Its answer to the order was lost, or comes later.
                Some(Stage::Promote(candidate)) if candidate == node => {
                    if let Some(fork) = fork {
                        self.pending_over(node);
                        self.promoted(node, timeline, fork, now);
                    }
                }
                // Somebody promoted it by hand: theirs counts, nothing of ours has begun.
                Some(Stage::Prepare) => {
                    let why = format!("{} was promoted by somebody else", self.name(node));
                    self.roll_back(Err(why));
                }
                _ => {}
            }
        } else if timeline < known {
            self.old_primary_back(node, timeline, insert);
        }
    }

    /// I8: never used, whatever it says; fenced by `mend`.
    fn old_primary_back(&mut self, node: NodeId, timeline: TimelineId, insert: Lsn) {
        if self.quarantine(node) != Some(Quarantine::OldPrimary) {
            self.record.quarantined.retain(|(of, _)| *of != node);
            self.record.quarantined.push((node, Quarantine::OldPrimary));
        }
        let known = &mut self.known[node.index()];
        let start = known.seen.as_ref().and_then(|seen| seen.start.clone());
        if known.fenced_start.is_none() {
            // Told once; the fence itself is tried until it holds.
            let fork = self.record.forks.iter().find(|f| f.old_primary == node && f.old_timeline == timeline);
            let exact = fork.map(|f| insert.bytes_since(f.fork));
            self.known[node.index()].fenced_start = Some(None);
            self.alarm(Alarm::OldPrimaryBack(node));
            if let Some(exact) = exact {
                self.alarm(Alarm::LossKnown(Loss { exact_bytes: Some(exact), ..Loss::default() }));
            }
        } else if known.fenced_start.as_ref().is_some_and(|fenced| fenced.is_some() && *fenced != start) {
            known.fenced_start = Some(None);
        }
    }

    fn saw_standby(
        &mut self,
        node: NodeId,
        timeline: Option<TimelineId>,
        receiver: Option<(bool, TimelineId)>,
    ) {
        // Cut off, and yet it receives: somebody else made it. It is cut off again before it counts (I3).
        if receiver.is_some()
            && let Some(attempt) = &mut self.attempt
        {
            attempt.cuts.remove(&node);
        }
        if let (Some(suspicion), Some((true, _))) = (&mut self.suspicion, receiver)
            && matches!(suspicion.kicked.get(&node), Some((Kick::Gone, _)))
        {
            suspicion.kicked.remove(&node);
        }
        // The one sign that it was repaired: a diverged node never streams the new timeline (I5).
        if timeline.is_some()
            && timeline == self.record.timeline
            && receiver.map(|r| r.0) == Some(true)
            && receiver.map(|r| Some(r.1)) == Some(self.record.timeline)
        {
            self.record.quarantined.retain(|(of, _)| *of != node);
            self.record.repoint.retain(|of| *of != node);
            self.known[node.index()].fenced_start = None;
        }
    }

    fn adopted(
        &mut self,
        primary: NodeId,
        timeline: TimelineId,
        epoch: Epoch,
        system_identifier: u64,
        forked: Option<Forked>,
    ) {
        if self.record.intent.is_some()
            || (self.record.primary == Some(primary) && epoch <= self.record.epoch)
        {
            return;
        }
        let record = &mut self.record;
        if record.primary != Some(primary) {
            // The setting is each node's own: nothing is known of this one's (I11).
            record.sync.degraded = true;
            // Those that were cut off from the one before are to follow this one.
            let severed = mem::take(&mut record.severed);
            record.repoint.extend(severed.into_iter().filter(|node| *node != primary));
            self.watch = Watch::default();
            self.last_sample = None;
            self.suspicion = None;
            self.blocked = None;
        }
        record.repoint.retain(|node| *node != primary);
        record.quarantined.retain(|(of, _)| *of != primary);
        record.primary = Some(primary);
        record.timeline = Some(timeline);
        record.epoch = record.epoch.max(epoch);
        record.system_identifier = Some(system_identifier);
        if let Some(forked) = forked {
            push_bounded(&mut record.forks, forked, MAX_FORKS);
        }
    }

    // The primary is watched.

    fn watch_primary(&mut self, tick: bool, now: Now) {
        let Some(primary) = self.record.primary else { return };
        let verdict = self.verdict(now.at);
        self.gone = verdict == Verdict::Gone;
        match verdict {
            Verdict::Unknown => return,
            Verdict::Well => {
                self.seen_well = true;
                self.suspicion = None;
                self.blocked = None;
                self.finish_repointing(primary, now.at);
                return;
            }
            _ => {}
        }
        self.repointing_since = None;
        if self.suspicion.is_none() {
            self.suspicion = Some(Suspicion {
                since: now.at,
                gone_since: None,
                confirmed: false,
                undecided: None,
                heard: vec![false; self.known.len()],
                kicked: BTreeMap::new(),
                unsettled: BTreeMap::new(),
                alarmed: None,
            });
            self.probe_standbys(primary);
        }
        match verdict {
            Verdict::Gone => self.confirm(primary, tick, now),
            Verdict::Refuses(cause) => {
                self.blocked = None;
                self.enter(State::Suspect);
                self.alarm_once(Alarm::PrimaryRefusesUs(cause));
            }
            _ => {
                self.blocked = None;
                self.enter(State::Suspect);
                if verdict == Verdict::Doubtful {
                    self.kick_early(primary, now.at);
                }
            }
        }
    }

    /// One failure short of being gone: whether the standbys still reach the primary takes up to `kick_timeout` to learn, and
    /// may be known by the time it counts. A stream that is well is interrupted by it for a moment, so not often.
    fn kick_early(&mut self, primary: NodeId, now: Instant) {
        let failures = self.watch.failures();
        let ripe = failures >= FAILURES_FOR_A_KICK && failures + 1 >= self.settings.failure_threshold;
        let pause = self.settings.kick_timeout * VOUCHED;
        let lately = self.kicked_early.is_some_and(|at| now.saturating_duration_since(at) < pause);
        let acts = self.settings.mode == Mode::Auto && !self.record.paused && self.unprepared.is_none();
        if !ripe || lately || !acts {
            return;
        }
        let Some(since) = self.suspicion.as_ref().map(|suspicion| suspicion.since) else { return };
        if let Testimony::Kick(nodes) = self.testimony(primary, since, now) {
            self.kicked_early = Some(now);
            self.kick(nodes, now);
        }
    }

    fn kick(&mut self, nodes: Vec<NodeId>, now: Instant) {
        for node in nodes {
            if self.is_free(node, now) {
                self.give(node, Order::Kick { wait: self.settings.kick_timeout }, None);
            }
        }
    }

    fn probe_standbys(&mut self, primary: NodeId) {
        let all = (0u16..).map(NodeId).take(self.known.len());
        let others = all.filter(|node| *node != primary && !self.removed.contains(node));
        self.out.extend(others.map(Action::Probe));
    }

    fn alarm_once(&mut self, alarm: Alarm) {
        if let Some(suspicion) = &mut self.suspicion
            && suspicion.alarmed.as_ref() != Some(&alarm)
        {
            suspicion.alarmed = Some(alarm.clone());
            self.alarm(alarm);
        }
    }

    fn confirm(&mut self, primary: NodeId, tick: bool, now: Now) {
        let Some(suspicion) = &mut self.suspicion else { return };
        let gone_since = *suspicion.gone_since.get_or_insert(now.at);
        let testimony = self.testimony(primary, gone_since, now.at);
        let undecided = self.stays_undecided(&testimony, now.at);
        match testimony {
            Testimony::Gone => {
                self.suspicion.iter_mut().for_each(|suspicion| suspicion.confirmed = true);
                self.begin_or_block(now);
            }
            Testimony::Alive => {
                self.blocked = None;
                self.enter(State::Suspect);
                self.alarm_once(Alarm::OnlyWeAreCutOff);
            }
            Testimony::NobodyKnows if undecided => {}
            Testimony::NobodyKnows => {
                self.blocked = None;
                self.enter(State::Suspect);
                self.alarm_once(Alarm::Isolated);
            }
            Testimony::Wait => self.keep_confirming(primary, tick),
            Testimony::Kick(nodes) => {
                self.keep_confirming(primary, tick);
                self.kick(nodes, now.at);
            }
        }
    }

    /// Standbys answer, and for so long none of them could say whether the primary is gone: it is not to be hoped that one
    /// will. That is told as what it is (I12), and passes as soon as one can.
    fn stays_undecided(&mut self, testimony: &Testimony, now: Instant) -> bool {
        let decided = matches!(testimony, Testimony::Gone | Testimony::Alive);
        let Some(suspicion) = &mut self.suspicion else { return false };
        if decided {
            suspicion.undecided = None;
            return false;
        }
        let since = *suspicion.undecided.get_or_insert(now);
        let standbys = self.standbys();
        let patience = self.settings.kick_timeout * VOUCHED;
        if standbys.is_empty() || now.saturating_duration_since(since) < patience {
            return false;
        }
        let reason = match standbys.iter().all(|node| self.is_left_behind(*node)) {
            true => BlockReason::LeftBehind { node: standbys[0] },
            false => BlockReason::NoWitness,
        };
        self.blocked = Some(Blocked { reason: reason.clone(), retry_at: now, reachable: standbys });
        self.enter(State::Blocked(reason));
        true
    }

    fn keep_confirming(&mut self, primary: NodeId, tick: bool) {
        if self.blocked.is_none() {
            self.enter(State::Confirming);
        }
        if tick {
            self.probe_standbys(primary);
        }
    }

    /// What the standbys say together of a primary that has been suspected since then.
    fn testimony(&mut self, primary: NodeId, since: Instant, now: Instant) -> Testimony {
        let vouched = self.settings.kick_timeout * VOUCHED;
        let Some(suspicion) = &mut self.suspicion else { return Testimony::Wait };
        suspicion.kicked.retain(|_, (kick, at)| {
            let valid = if *kick == Kick::Streams { vouched } else { vouched / 2 };
            now.saturating_duration_since(*at) < valid
        });
        let settles = self.settings.kick_timeout;
        suspicion.unsettled.retain(|_, at| now.saturating_duration_since(*at) < settles);
        let Some(suspicion) = &self.suspicion else { return Testimony::Wait };
        let witnesses: Vec<(NodeId, Witness, Option<Kick>)> = (0u16..)
            .map(NodeId)
            .zip(&self.known)
            .filter(|(node, _)| *node != primary && !self.removed.contains(node))
            .filter(|(node, _)| self.quarantine(*node).is_none())
            .map(|(node, known)| {
                let kicking =
                    self.orders.values().any(|p| p.node == node && matches!(p.order, Order::Kick { .. }));
                // One that connects anew just now is alone for a moment, which says nothing.
                let heard = !kicking && suspicion.heard.get(node.index()).copied().unwrap_or(false);
                let unsevered = known.unsevered.is_some_and(|at| now.saturating_duration_since(at) < settles);
                let unsettled = unsevered || suspicion.unsettled.contains_key(&node);
                let fact = known.fact.as_ref().filter(|fact| heard && !(is_alone(fact) && unsettled));
                let kicked = suspicion.kicked.get(&node).map(|(kick, _)| *kick);
                let witness = match detect::witness(fact, primary, self.record.system_identifier) {
                    // That it is alone is our own doing, and no news of the primary.
                    Witness::Alone if self.is_left_behind(node) => Witness::Elsewhere,
                    Witness::Alone if self.record.severed.contains(&node) && !suspicion.confirmed => {
                        Witness::CutOff
                    }
                    witness => witness,
                };
                (node, witness, kicked)
            })
            .collect();
        detect::testimony(&witnesses, now.saturating_duration_since(since))
    }

    /// The primary is gone for everybody: whether it may be replaced without being asked.
    fn begin_or_block(&mut self, now: Now) {
        if !self.seen_well && now.at < self.started + self.settings.startup_grace {
            self.enter(State::Confirming);
            return;
        }
        let reachable = self.standbys();
        if let Some(blocked) = &self.blocked {
            let changed = blocked.reachable != reachable;
            let due = match blocked.reason {
                // What was compared has shown this: as long as the same nodes are there, it stays so.
                BlockReason::DataLoss { .. } | BlockReason::Behind { .. } | BlockReason::OtherZone { .. } => {
                    changed
                }
                _ => changed || now.at >= blocked.retry_at,
            };
            if !due {
                return;
            }
        }
        match self.why_not_begin(&reachable, None, None) {
            Some(reason) => self.stay_blocked(reason, now.at),
            None => {
                let since = self.suspicion.as_ref().map_or(now.at, |s| s.since);
                self.begin(Attempt::new(since), false, now.at);
            }
        }
    }

    /// What speaks against a failover, to this node or to whichever is best, before anything has been touched.
    /// `operator` is `Some` for one: whether he gives up what may be lost.
    pub(super) fn why_not_begin(
        &self,
        reachable: &[NodeId],
        to: Option<NodeId>,
        operator: Option<bool>,
    ) -> Option<BlockReason> {
        if operator.is_none() {
            match self.settings.mode {
                _ if self.record.paused => return Some(BlockReason::Paused),
                Mode::Manual => return Some(BlockReason::Manual),
                Mode::Auto if self.record.cooling => return Some(BlockReason::TooSoon),
                Mode::Auto => {}
            }
            if let Some(what) = &self.unprepared {
                return Some(BlockReason::Unprepared(what.clone()));
            }
            let (have, all) = (reachable.len(), self.settings.nodes.len() - self.removed.len());
            // Of two nodes the proxy is the third voice.
            let need = if all == 2 { 1 } else { all / 2 + 1 };
            let minority = self.settings.durability == Durability::Async && !self.settings.allow_minority;
            if minority && have < need {
                return Some(BlockReason::Minority { have, need });
            }
        }
        let fit = reachable.iter().copied().filter(|node| self.priority(*node) > 0);
        let Some(best) = fit.max_by_key(|node| {
            let here = Some(*node) == to || !self.is_elsewhere(*node);
            (here, self.priority(*node), std::cmp::Reverse(*node))
        }) else {
            return Some(BlockReason::NoCandidate);
        };
        if to.is_none() && self.is_elsewhere(best) {
            return Some(BlockReason::OtherZone { node: best });
        }
        if self.settings.durability == Durability::Quorum && operator != Some(true) {
            return candidate::covers(&self.record.sync, |member| reachable.contains(&member)).err();
        }
        None
    }

    fn stay_blocked(&mut self, reason: BlockReason, now: Instant) {
        let reachable = self.standbys();
        self.blocked = Some(Blocked { reason: reason.clone(), retry_at: now + BLOCK_RETRY, reachable });
        self.enter(State::Blocked(reason));
    }

    pub(super) fn begin(&mut self, attempt: Attempt, planned: bool, now: Instant) {
        let Some(from) = self.record.primary else { return };
        let epoch = Epoch(self.record.epoch.0 + 1);
        let intent = Intent { from, planned, epoch, stage: Stage::Prepare, covered: false };
        self.blocked = None;
        self.repointing_since = None;
        self.attempt = Some(attempt);
        self.record.intent = Some(intent.clone());
        if planned {
            add(&mut self.record.fenced, from);
        } else {
            self.enter(State::Fencing);
        }
        self.drive_at(&intent, now);
    }

    // An intent is driven on.

    fn drive(&mut self, intent: &Intent, now: Now) {
        match intent.stage {
            Stage::Promote(candidate) => self.promoting(candidate, intent, now.at),
            Stage::Prepare => self.drive_at(intent, now.at),
        }
    }

    fn drive_at(&mut self, intent: &Intent, now: Instant) {
        let well = self.verdict(now) == Verdict::Well;
        if !intent.planned && well {
            // I12, I6: undone; the epoch goes on.
            return self.roll_back(Err("the primary is back".to_owned()));
        }
        if intent.planned {
            let late = self.attempt.as_ref().is_some_and(|a| a.deadline.is_some_and(|at| now >= at));
            if late {
                return self.roll_back(Err("not done in time: the old primary goes on".to_owned()));
            }
            if matches!(self.verdict(now), Verdict::Gone) {
                return self.roll_back(Err("the old primary was lost meanwhile".to_owned()));
            }
            if !self.quieten(intent, now) {
                return;
            }
        }
        self.close_sockets(now);
        self.sever(intent, now);
    }

    /// A switchover's way to an old primary at rest: drained, its sockets closed, fenced, and the new one at its end.
    fn quieten(&mut self, intent: &Intent, now: Instant) -> bool {
        let Some(attempt) = &self.attempt else { return false };
        let Some(to) = attempt.to else { return false };
        if !attempt.drained {
            self.enter(State::Draining(to));
            return false;
        }
        let (closed, fenced, barrier, reached) =
            (attempt.sockets_closed, attempt.fenced, attempt.barrier, attempt.reached);
        let left =
            attempt.deadline.map_or(self.settings.pause_timeout, |at| at.saturating_duration_since(now));
        self.enter(State::AtBarrier(to));
        self.close_sockets(now);
        if closed && !fenced && self.is_free(intent.from, now) {
            // Again: that a switchover before this one was undone may have taken it off the list since this one began.
            add(&mut self.record.fenced, intent.from);
            self.give(intent.from, Order::Fence, None);
        }
        if let (true, Some(lsn), false) = (fenced, barrier, reached)
            && self.is_free(to, now)
        {
            self.give(to, Order::Barrier { lsn, wait: left }, None);
        }
        reached
    }

    /// I2: asked for once; the answer is waited for before a promotion.
    fn close_sockets(&mut self, now: Instant) {
        if let Some(attempt) = &mut self.attempt
            && attempt.closing_since.is_none()
        {
            attempt.closing_since = Some(now);
            self.out.push(Action::Gate(Gate::Closed));
            self.gate = Some(Gate::Closed);
            self.out.push(Action::CloseSockets { epoch: self.record.epoch });
        }
    }

    /// I3: every standby that can be reached is cut off before positions are compared.
    fn sever(&mut self, intent: &Intent, now: Instant) {
        let targets = self.standbys();
        let Some(attempt) = &mut self.attempt else { return };
        let since = *attempt.severing_since.get_or_insert(now);
        let open: Vec<NodeId> = targets.iter().copied().filter(|n| !attempt.cuts.contains_key(n)).collect();
        let closed = attempt.sockets_closed;
        let severing = now.saturating_duration_since(since);
        let late = severing >= self.settings.sever_timeout;
        if !matches!(self.state, State::Electing(_)) || !open.is_empty() {
            self.enter(State::Severing);
        }
        for node in &open {
            // Whoever an earlier epoch left behind does not go back to where it was: that is an old primary, which would
            // take its confirmation for commits (I4, I8).
            let ours = self.replaced_by_us() || self.record.repoint.contains(node);
            match self.is_left_behind(*node) && ours {
                true => add(&mut self.record.repoint, *node),
                false => self.follows_again(*node),
            }
            if self.is_free_to_sever(*node, now) {
                self.give(*node, Order::Sever, None);
            }
        }
        match open.first() {
            Some(node) if late => self.block(BlockReason::SeverTimeout { node: *node }, now),
            Some(_) => {}
            None if !closed && severing >= self.settings.sever_timeout + self.settings.close_wait => {
                self.block(BlockReason::SocketsOpen, now);
            }
            None => self.elect(intent, closed, late, now),
        }
    }

    /// An earlier epoch has left it behind, and it has never followed this primary; or it was away then.
    fn is_left_behind(&self, node: NodeId) -> bool {
        let timeline = self.known.get(node.index()).and_then(|known| known.timeline);
        let older = timeline.is_some() && timeline < self.record.timeline;
        older || (self.record.repoint.contains(&node) && timeline != self.record.timeline)
    }

    /// Not by its epoch: a crash of the new primary begins another one.
    fn replaced_by_us(&self) -> bool {
        self.record.history.last().is_some_and(|entry| Some(entry.to) == self.record.primary)
    }

    /// It was cut off from this primary, and is to follow it again should nobody else be promoted.
    fn follows_again(&mut self, node: NodeId) {
        self.record.repoint.retain(|of| *of != node);
        add(&mut self.record.severed, node);
    }

    fn elect(&mut self, intent: &Intent, closed: bool, late: bool, now: Instant) {
        let Some(attempt) = &self.attempt else { return };
        let cuts: Vec<Cut> = attempt.cuts.values().copied().collect();
        let election = Election {
            durability: self.settings.durability,
            sync: &self.record.sync,
            timeline: self.record.timeline,
            last_seen: self.last_sample.map(|(lsn, _)| lsn),
            max_lost_bytes: self.settings.max_lost_bytes,
            to: attempt.to,
            allow_data_loss: attempt.allow_data_loss,
            barrier: attempt.barrier,
        };
        let chosen = match candidate::elect(&cuts, &election) {
            Ok(chosen) => chosen,
            Err(reason) => return self.block(reason, now),
        };
        let wants_sync = self.settings.durability == Durability::Quorum;
        let ready = !wants_sync || attempt.sync.as_ref().is_some_and(|(of, _)| *of == chosen);
        let covered = candidate::elect(&cuts, &Election { allow_data_loss: false, ..election }).is_ok()
            && self.settings.durability == Durability::Quorum;
        self.enter(State::Electing(chosen));
        if !ready {
            if late {
                let why = "its synchronous_standby_names could not be set".to_owned();
                return self.block(BlockReason::CandidateRefused { node: chosen, why }, now);
            }
            if self.is_free(chosen, now) {
                let sync = self.next_sync(chosen);
                self.give(chosen, Order::SetSync { members: sync.members, num: sync.num }, None);
            }
            return;
        }
        if !closed {
            return;
        }
        // I6: nobody else may take writes on this timeline; a planned one's old primary is fenced and cut off.
        let writer = (0u16..).map(NodeId).take(self.known.len()).find(|node| {
            *node != chosen
                && self.writes(*node).is_some_and(|timeline| Some(timeline) == self.record.timeline)
                && !(intent.planned && *node == intent.from)
        });
        match writer {
            // It does not go away: nobody stays cut off for it.
            Some(node) if late => return self.block(BlockReason::SecondWriter { node }, now),
            None if self.is_free(chosen, now) => {}
            _ => return,
        }
        if let Some(attempt) = &mut self.attempt {
            attempt.promoting_since = Some(now);
            if let Some((_, sync)) = attempt.sync.take() {
                self.record.sync = sync;
            }
        }
        // I1: this and its epoch are on disk before the order behind it is given.
        self.record.intent = Some(Intent { stage: Stage::Promote(chosen), covered, ..intent.clone() });
        self.enter(State::Promoting(chosen));
        self.order_promotion(chosen, intent.epoch);
    }

    /// Whose confirmation commits on `chosen` wait for from its first one on (I11). Nothing is promised until that is
    /// shown to be in effect.
    fn next_sync(&self, chosen: NodeId) -> SyncState {
        let cuts = self.attempt.iter().flat_map(|attempt| attempt.cuts.keys().copied());
        let mut standbys: Vec<NodeId> = cuts.filter(|node| *node != chosen).collect();
        let others: Vec<NodeId> = (0u16..)
            .map(NodeId)
            .take(self.known.len())
            .filter(|node| *node != chosen && !self.removed.contains(node) && !standbys.contains(node))
            .collect();
        let num = usize::try_from(self.settings.sync_num).unwrap_or(usize::MAX);
        if standbys.len() < num && !self.settings.sync_strict {
            // I11: nobody's, until it is known who is well.
            standbys.clear();
        }
        let rule = sync::for_new_primary(num, self.settings.sync_strict, &standbys, &others);
        SyncState { degraded: true, ..rule.to_record() }
    }

    fn order_promotion(&mut self, node: NodeId, epoch: Epoch) {
        let Some(timeline) = self.record.timeline else { return };
        self.give(node, Order::Promote { epoch, timeline, wait: self.settings.promote_timeout }, None);
    }

    /// I6: this one and no other, until it is known what became of it.
    fn promoting(&mut self, candidate: NodeId, intent: &Intent, now: Instant) {
        self.close_sockets(now);
        let Some(attempt) = &mut self.attempt else { return };
        let since = *attempt.promoting_since.get_or_insert(now);
        let (closed, fenced) = (attempt.sockets_closed, attempt.fenced);
        if now.saturating_duration_since(since) >= self.settings.promote_timeout {
            self.enter(State::Blocked(BlockReason::CandidateUnreachable { node: candidate }));
        } else {
            self.enter(State::Promoting(candidate));
        }
        // From here on the old one is an old one. Should it take writes, it is fenced before anything is sent again.
        let back = self.writes(intent.from).is_some() && !fenced;
        if back && self.settings.fence_sql {
            add(&mut self.record.fenced, intent.from);
            if self.is_free(intent.from, now) {
                self.give(intent.from, Order::Fence, None);
            }
            return;
        }
        if closed && self.is_free(candidate, now) {
            self.order_promotion(candidate, intent.epoch);
        }
    }

    fn promoted(&mut self, node: NodeId, timeline: TimelineId, fork: Lsn, now: Instant) {
        let Some(intent) = self.record.intent.take() else { return };
        let Some(attempt) = self.attempt.take() else { return };
        let Some(old_timeline) = self.record.timeline else { return };
        let since = self.suspicion.take().map_or(attempt.since, |suspicion| suspicion.since);
        let loss = self.loss(fork, since, intent.planned);
        self.sort_survivors(node, fork, &attempt);
        let record = &mut self.record;
        push_bounded(&mut record.forks, Forked { old_primary: intent.from, old_timeline, fork }, MAX_FORKS);
        record.quarantined.retain(|(of, _)| *of != node && *of != intent.from);
        record.quarantined.push((intent.from, Quarantine::OldPrimary));
        record.epoch = intent.epoch;
        record.primary = Some(node);
        record.timeline = Some(timeline);
        let entry = Entry {
            unix_ms: self.unix_ms,
            epoch: intent.epoch,
            from: intent.from,
            to: node,
            planned: intent.planned,
            fork,
            lost_acked_bytes_min: loss.acked_bytes_min,
            took_ms: u64::try_from(now.saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX),
        };
        push_bounded(&mut record.history, entry, MAX_HISTORY);
        if !intent.planned {
            record.cooling = true;
            self.cool_until = Some(now + self.settings.min_failover_interval);
        }
        self.known[intent.from.index()].fenced_start = None;
        self.watch = Watch::promoted();
        self.seen_well = true;
        self.last_sample = None;
        self.acknowledged = None;
        self.repointing_since = Some(now);
        self.out.push(Action::Publish(Target {
            primary: node,
            epoch: intent.epoch,
            timeline,
            fork,
            old_primary: intent.from,
            planned: intent.planned,
            kept: intent.planned || intent.covered,
            loss,
        }));
        self.enter(State::Repointing(node));
        self.give(node, Order::EpochRow { epoch: intent.epoch, timeline, fork }, None);
        if let Some(command) = attempt.command {
            let text = format!("{} is the primary of epoch {}", self.name(node), intent.epoch.0);
            self.reply(command, Ok(text));
        }
    }

    /// I5: what is ahead of the new primary must not follow it. Of two that were cut off on one timeline the one that
    /// ends earlier has a prefix of the other's log, whatever is left of the last record.
    fn sort_survivors(&mut self, primary: NodeId, fork: Lsn, attempt: &Attempt) {
        let own = attempt.cuts.get(&primary).map_or(fork, |cut| cut.end.max(fork));
        let record = &mut self.record;
        for node in mem::take(&mut record.severed) {
            if node != primary {
                add(&mut record.repoint, node);
            }
        }
        record.repoint.retain(|node| *node != primary);
        let ahead: Vec<NodeId> =
            attempt.cuts.values().filter(|cut| cut.end > own).map(|cut| cut.node).collect();
        for node in ahead {
            self.put_in_quarantine(node, Quarantine::Diverged);
        }
    }

    fn put_in_quarantine(&mut self, node: NodeId, why: Quarantine) {
        let record = &mut self.record;
        record.repoint.retain(|of| *of != node);
        record.severed.retain(|of| *of != node);
        if !record.quarantined.contains(&(node, why)) {
            record.quarantined.retain(|(of, _)| *of != node);
            record.quarantined.push((node, why));
            self.alarm(Alarm::Quarantined(node, why));
        }
    }

    /// From lower bounds only: never says that nothing was lost.
    fn loss(&self, fork: Lsn, since: Instant, planned: bool) -> Loss {
        if planned {
            return Loss { exact_bytes: Some(0), ..Loss::default() };
        }
        Loss {
            acked_bytes_min: self.acknowledged.map_or(0, |acknowledged| acknowledged.bytes_since(fork)),
            unsampled_ms: self.last_sample.map(|(_, at)| {
                u64::try_from(since.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX)
            }),
            exact_bytes: None,
        }
    }

    /// I12: what was prepared is undone by `mend`; the old epoch goes on.
    fn roll_back(&mut self, answer: Result<String, String>) {
        self.give_up(answer);
        self.enter(State::Suspect);
    }

    fn give_up(&mut self, answer: Result<String, String>) {
        self.record.intent = None;
        if let Some(command) = self.attempt.take().and_then(|attempt| attempt.command) {
            self.reply(command, answer);
        }
    }

    fn block(&mut self, reason: BlockReason, now: Instant) {
        let planned = self.record.intent.as_ref().is_some_and(|intent| intent.planned);
        self.give_up(Err(self.explain(&reason)));
        match planned {
            true => self.enter(State::Suspect),
            false => self.stay_blocked(reason, now),
        }
    }

    // Orders end.

    fn pending_over(&mut self, node: NodeId) {
        self.orders.retain(|_, p| p.node != node || !matches!(p.order, Order::Promote { .. }));
    }

    fn order_done(&mut self, id: OrderId, result: OrderResult, now: Now) {
        let Some(Pending { node, order, command }) = self.orders.remove(&id) else { return };
        if let OrderResult::Failed(why) | OrderResult::Unknown(why) = &result {
            let quick = matches!(
                order,
                Order::Sever | Order::SetSync { .. } | Order::Promote { .. } | Order::Kick { .. }
            );
            self.retry_after(node, now.at);
            if !quick {
                self.mend_after(node, now.at);
            }
            if let (Order::Kick { .. }, Some(suspicion)) = (&order, &mut self.suspicion) {
                suspicion.unsettled.insert(node, now.at);
            }
            self.alarm(Alarm::OrderFailed { node, order: order.label(), why: why.clone() });
        }
        if let Some(command) = command {
            let answer = match &result {
                OrderResult::Failed(why) | OrderResult::Unknown(why) => Err(why.clone()),
                _ => Ok(format!("{} {}", order.label(), self.name(node))),
            };
            self.reply(command, answer);
        }
        if matches!(order, Order::Kick { .. }) && !matches!(result, OrderResult::Kicked(Kick::Gone)) {
            self.ask_again(node);
        }
        match (order, result) {
            (Order::Kick { .. }, OrderResult::Kicked(kick)) => self.kicked(node, kick, now.at),
            (Order::Sever, OrderResult::Severed { end, timeline }) => self.severed(node, end, timeline),
            (Order::Fence, OrderResult::Fenced { end }) => self.fenced(node, end),
            (Order::Fence, OrderResult::Failed(why) | OrderResult::Unknown(why)) => {
                let planned =
                    self.record.intent.as_ref().is_some_and(|i| i.planned && i.stage == Stage::Prepare);
                if planned {
                    self.roll_back(Err(format!("the old primary could not be fenced: {why}")));
                }
            }
            (Order::Unfence, OrderResult::Done) => self.record.fenced.retain(|of| *of != node),
            (Order::Unsever, OrderResult::Done) => {
                self.record.severed.retain(|of| *of != node);
                self.known[node.index()].unsevered = Some(now.at);
            }
            (Order::Repoint { .. }, OrderResult::Done) => {
                self.record.repoint.retain(|of| *of != node);
                // Until probes have seen it follow.
                self.mend_after(node, now.at);
            }
            (Order::Repoint { .. }, OrderResult::Diverged { .. }) => {
                self.put_in_quarantine(node, Quarantine::Diverged);
            }
            (Order::Barrier { lsn, .. }, result) => self.barrier_done(lsn, result),
            (Order::SetSync { .. }, OrderResult::Done) => {
                let sync = self.next_sync(node);
                if let Some(attempt) = &mut self.attempt {
                    attempt.sync = Some((node, sync));
                }
            }
            (Order::Promote { .. }, OrderResult::Promoted { timeline, fork })
                if self.record.intent.as_ref().is_some_and(|i| i.stage == Stage::Promote(node)) =>
            {
                self.promoted(node, timeline, fork, now.at);
            }
            (Order::Promote { .. }, OrderResult::Unknown(_)) => {
                if let Some(attempt) = &mut self.attempt {
                    attempt.uncertain = true;
                }
            }
            (Order::Promote { .. }, OrderResult::Failed(why)) => self.promotion_refused(node, why, now.at),
            _ => {}
        }
    }

    fn kicked(&mut self, node: NodeId, kick: Kick, now: Instant) {
        if let Some(suspicion) = &mut self.suspicion {
            suspicion.unsettled.remove(&node);
            suspicion.kicked.insert(node, (kick, now));
        }
    }

    /// What was seen while a kick was at work does not count.
    fn ask_again(&mut self, node: NodeId) {
        if let Some(heard) = self.suspicion.as_mut().and_then(|s| s.heard.get_mut(node.index())) {
            *heard = false;
            self.out.push(Action::Probe(node));
        }
    }

    fn severed(&mut self, node: NodeId, end: Lsn, timeline: Option<TimelineId>) {
        let (priority, elsewhere) = (self.priority(node), self.is_elsewhere(node));
        let timeline = timeline.or(self.known.get(node.index()).and_then(|known| known.timeline));
        if timeline.is_some() && timeline == self.record.timeline && self.record.repoint.contains(&node) {
            self.follows_again(node);
        }
        let kept_out = self.quarantine(node).is_some();
        if let Some(attempt) = self.attempt.as_mut().filter(|_| !kept_out) {
            attempt.cuts.insert(node, Cut { node, end, timeline, priority, elsewhere });
        }
    }

    fn fenced(&mut self, node: NodeId, end: Lsn) {
        add(&mut self.record.fenced, node);
        if let Some(known) = self.known.get_mut(node.index())
            && self.record.primary != Some(node)
        {
            known.fenced_start = Some(known.seen.as_ref().and_then(|seen| seen.start.clone()));
        }
        if self.record.intent.as_ref().is_some_and(|intent| intent.from == node)
            && let Some(attempt) = &mut self.attempt
        {
            attempt.fenced = true;
            attempt.barrier = Some(end);
        }
    }

    fn barrier_done(&mut self, lsn: Lsn, result: OrderResult) {
        match result {
            OrderResult::Reached(at) if at >= lsn => {
                if let Some(attempt) = &mut self.attempt {
                    attempt.reached = true;
                }
            }
            OrderResult::Failed(why) | OrderResult::Unknown(why)
                if self.record.intent.as_ref().is_some_and(|i| i.planned && i.stage == Stage::Prepare) =>
            {
                self.roll_back(Err(format!("the new primary did not catch up: {why}; the old one goes on")));
            }
            _ => {}
        }
    }

    /// It says that it was not promoted and will not be: another may be tried, unless an order before this one may
    /// still work (I6).
    fn promotion_refused(&mut self, node: NodeId, why: String, now: Instant) {
        let certain = self.attempt.as_ref().is_some_and(|attempt| !attempt.uncertain);
        let Some(intent) = self.record.intent.as_mut().filter(|i| i.stage == Stage::Promote(node)) else {
            return;
        };
        if certain {
            intent.stage = Stage::Prepare;
            self.block(BlockReason::CandidateRefused { node, why }, now);
        }
    }

    // What earlier failovers left is put in order.

    fn mend(&mut self, now: Now) {
        if !self.settings.hands || self.record.intent.is_some() {
            return;
        }
        let well = self.verdict(now.at) == Verdict::Well;
        let standbys = self.standbys();
        // I12: a cut-off standby follows again, also while the primary is away.
        for node in self.record.severed.clone() {
            if standbys.contains(&node) && self.is_free_to_mend(node, now.at) {
                self.give(node, Order::Unsever, None);
            }
        }
        if let (true, Some(to), Some(timeline)) = (well, self.record.primary, self.record.timeline) {
            self.find_strays(&standbys, now.at);
            for node in self.record.repoint.clone() {
                let fork = self.fork_for(node);
                if standbys.contains(&node) && self.is_free_to_mend(node, now.at) {
                    self.give(node, Order::Repoint { to, timeline, fork }, None);
                }
            }
            if self.record.fenced.contains(&to) && self.is_free_to_mend(to, now.at) {
                self.give(to, Order::Unfence, None);
            }
        }
        self.fence_old_primaries(now.at);
    }

    /// Where the log of `node` left the primary's. Whoever carries the order out compares with the primary's own history.
    fn fork_for(&self, node: NodeId) -> Lsn {
        let timeline = self.known.get(node.index()).and_then(|known| known.timeline);
        let of = |timeline| self.record.forks.iter().rev().find(|fork| Some(fork.old_timeline) == timeline);
        of(timeline).or(self.record.forks.last()).map_or(Lsn::ZERO, |fork| fork.fork)
    }

    /// Standbys that could not be reached when the primary was replaced by us still look for the old one.
    fn find_strays(&mut self, standbys: &[NodeId], now: Instant) {
        let settled =
            self.repointing_since.is_none_or(|since| now.saturating_duration_since(since) >= MEND_RETRY);
        if !self.replaced_by_us() || !settled {
            return;
        }
        for node in standbys {
            let Some(Role::Standby { timeline, walreceiver, .. }) = self.seen(*node).map(|seen| &seen.role)
            else {
                continue;
            };
            let behind = self.known[node.index()].timeline.is_some_and(|t| Some(t) < self.record.timeline);
            let follows =
                walreceiver.is_some_and(|r| r.streaming && Some(r.timeline) == self.record.timeline);
            if behind && !follows && timeline.is_none_or(|t| Some(t) < self.record.timeline) {
                add(&mut self.record.repoint, *node);
                self.record.severed.retain(|of| of != node);
            }
        }
    }

    fn fence_old_primaries(&mut self, now: Instant) {
        if !self.settings.fence_sql {
            return;
        }
        for (node, why) in self.record.quarantined.clone() {
            let open = self.known.get(node.index()).is_some_and(|known| known.fenced_start == Some(None));
            let older = self.writes(node).is_some_and(|timeline| Some(timeline) < self.record.timeline);
            if why == Quarantine::OldPrimary && open && older && self.is_free_to_mend(node, now) {
                add(&mut self.record.fenced, node);
                self.give(node, Order::Fence, None);
            }
        }
    }

    fn finish_repointing(&mut self, primary: NodeId, now: Instant) {
        if let Some(since) = self.repointing_since {
            let standbys = self.standbys();
            let open = self.record.repoint.iter().any(|node| standbys.contains(node));
            if open && now.saturating_duration_since(since) < self.settings.sever_timeout {
                return self.enter(State::Repointing(primary));
            }
            self.repointing_since = None;
        }
        self.enter(State::Healthy);
    }

    /// Whether new work may go to the primary. Also right after [`new`](Self::new), before anything has happened: an
    /// earlier process may have had the primary replaced, and not have heard of it.
    pub fn wanted_gate(&self) -> Gate {
        let fenced =
            self.settings.hands && self.record.primary.is_some_and(|p| self.record.fenced.contains(&p));
        match (&self.record.intent, &self.attempt) {
            (Some(intent), Some(attempt)) if intent.planned && !attempt.drained => Gate::Draining,
            (Some(_), _) => Gate::Closed,
            // Not before the primary takes writes again: clients would be told that it is read-only.
            (None, _) if fenced => Gate::Closed,
            // What is sent to a primary that does not answer has an unknown outcome; what waits has not.
            (None, _) if self.gone => Gate::Paused,
            (None, _) => Gate::Open,
        }
    }

    fn settle_gate(&mut self) {
        let wanted = self.wanted_gate();
        if self.gate != Some(wanted) {
            self.gate = Some(wanted);
            self.out.push(Action::Gate(wanted));
        }
    }

    /// An operator accepts a failover so soon after the last.
    pub(super) fn acknowledge(&mut self) {
        self.record.cooling = false;
        self.cool_until = None;
        self.blocked = None;
    }

    /// An operator vouches that the candidate is gone for good: it counts as not promoted (I6).
    pub(super) fn forget(&mut self, node: NodeId) {
        let promoting = match &mut self.record.intent {
            Some(intent) if intent.stage == Stage::Promote(node) => {
                intent.stage = Stage::Prepare;
                // It may have been that epoch's write target: nobody else is (I1).
                intent.epoch = Epoch(intent.epoch.0 + 1);
                true
            }
            _ => false,
        };
        for list in [&mut self.record.severed, &mut self.record.repoint, &mut self.record.fenced] {
            list.retain(|of| *of != node);
        }
        if promoting {
            self.pending_over(node);
            self.put_in_quarantine(node, Quarantine::Diverged);
            if let Some(attempt) = &mut self.attempt {
                attempt.cuts.remove(&node);
                attempt.uncertain = false;
                attempt.promoting_since = None;
                attempt.severing_since = None;
            }
        }
    }
}

fn is_alone(fact: &Fact) -> bool {
    matches!(fact, Fact::Answered(Seen { role: Role::Standby { walreceiver: None, .. }, .. }))
}

pub(super) fn add(list: &mut Vec<NodeId>, node: NodeId) {
    if !list.contains(&node) {
        list.push(node);
    }
}

fn push_bounded<T>(list: &mut Vec<T>, item: T, most: usize) {
    list.push(item);
    let excess = list.len().saturating_sub(most);
    list.drain(..excess);
}
