//! The clock, the network, the clients and the checks. Everything happens in one order that the seed and
//! the plan decide.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use highwater::failover::decide::Durability;
use highwater::failover::event::{BlockReason, Command, Now, State};
use highwater::failover::record::{Intent, Record};
use highwater::topology::{Epoch, NodeId};

use crate::nodes::{Ms, Node, Receiver, Waiting, Writer, lsn};
use crate::plan::{Fault, Plan};
use crate::proxy::Proxy;

/// A part of the rule that is left out, around the machine or by the hands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Without {
    Nothing,
    /// Whoever takes the control lock does not end the statements of who had it before (I10).
    Lock,
    /// Actions do not wait for the record before them (I1).
    RecordFirst,
    /// Sockets of the old epoch are said to be closed, and are not (I2).
    ClosedSockets,
    /// A standby counts as cut off once it was told to be (I3).
    SeverProof,
    /// Standbys are not cut off at all before the election (I3).
    Severing,
    /// The position of a standby that restarted is what it has replayed so far (trap 1).
    FinalPosition,
    /// One synchronous standby is enough to elect, however many could have confirmed (I4).
    QuorumCount,
    /// A degraded record counts as a whole one (I9).
    Degraded,
    /// A new epoch begins with the record of the one before (I11).
    NewEpochDegraded,
    /// A tightened setting is recorded before all members have the barrier (I9).
    Barrier,
    /// A loosened setting is recorded only once it is in effect (I9).
    LoosenRecordFirst,
    /// The setting counts once it is shown (I9).
    InEffect,
    /// Synchronous standbys are managed during a failover, too.
    NoSyncDuringFailover,
    /// A promotion of unknown outcome counts as not begun (I6).
    SameNode,
}

#[derive(Clone, Debug)]
pub enum What {
    Tick,
    Write,
    Replicate,
    Probe(usize),
    Probed {
        run: u64,
        node: usize,
        fact: highwater::failover::event::Fact,
    },
    Pump {
        run: u64,
    },
    Step {
        run: u64,
        job: u64,
    },
    SocketsClosed {
        run: u64,
        epoch: u64,
    },
    Drained {
        run: u64,
    },
    /// This start of the node sends an answer.
    Ack {
        node: usize,
        start: u64,
        waiting: Waiting,
    },
    Fault(usize),
    Settle,
}

pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        let mut chance = Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        (0..8).for_each(|_| _ = chance.below(2));
        chance
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 11) % n as u64).unwrap()
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn between(&mut self, from: Ms, to: Ms) -> Ms {
        from + self.below(usize::try_from(to - from + 1).unwrap()) as u64
    }
}

/// How it stands in the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rest {
    /// Commits are acknowledged.
    Healthy,
    /// There is a primary, whose commits wait for more standbys (`strict`).
    Waits,
    /// There is none, and there will be none without an operator.
    NeedsHelp,
}

/// How much of what matters has happened.
#[derive(Clone, Copy, Default, Debug)]
pub struct Happened {
    pub acked: usize,
    pub acked_direct: usize,
    pub promotions: usize,
    pub switchovers: usize,
    pub blocked: usize,
    pub unknown_orders: usize,
    pub late_effects: usize,
    pub proxy_crashes: usize,
    pub proven: usize,
    pub degraded: usize,
    pub settled_healthy: usize,
    pub violations: usize,
}

pub struct World {
    pub now: Ms,
    base: Instant,
    pub chance: Chance,
    pub without: Without,
    pub plan: Plan,
    queue: BTreeMap<(Ms, u64), What>,
    queued: u64,
    pub nodes: Vec<Node>,
    /// Who cannot reach whom; the proxy is the last.
    pub cut: BTreeSet<(usize, usize)>,
    pub proxy: Option<Proxy>,
    pub runs: u64,
    pub sessions: u64,
    /// What the proxy finds after a crash.
    pub disk: Record,
    pub record_fails: bool,
    writes: u64,
    acked: BTreeSet<u64>,
    last_ack: Ms,
    /// The node whose promotion was the last.
    pub latest: usize,
    latest_epoch: u64,
    /// Which node left this timeline for the next.
    forks: BTreeMap<u32, usize>,
    targets: BTreeMap<u64, usize>,
    promote_sent: BTreeMap<u64, usize>,
    pub loss_allowed: bool,
    /// A switchover has left an old primary that waits for nobody: who goes there, past the fence, gets what is
    /// promised nowhere.
    left_uncovered: bool,
    /// State and primary by the plan's end, before anybody helped.
    pub ended: Option<(State, usize)>,
    pub happened: Happened,
    pub violations: Vec<String>,
    pub trace: Option<Vec<String>>,
}

impl World {
    pub fn new(plan: Plan, without: Without, traced: bool) -> World {
        let mut world = World {
            now: 0,
            base: Instant::now(),
            chance: Chance::new(plan.seed),
            without,
            queue: BTreeMap::new(),
            queued: 0,
            nodes: (0..plan.nodes).map(Node::new).collect(),
            cut: BTreeSet::new(),
            proxy: None,
            runs: 0,
            sessions: 0,
            disk: Record::default(),
            record_fails: false,
            writes: 0,
            acked: BTreeSet::new(),
            last_ack: 0,
            latest: 0,
            latest_epoch: 1,
            forks: BTreeMap::new(),
            targets: BTreeMap::new(),
            promote_sent: BTreeMap::new(),
            loss_allowed: false,
            left_uncovered: false,
            ended: None,
            happened: Happened::default(),
            violations: Vec::new(),
            trace: traced.then(Vec::new),
            plan,
        };
        world.start_proxy();
        for what in [What::Tick, What::Write, What::Replicate] {
            world.after(1, what);
        }
        for node in 0..world.nodes.len() {
            world.after(1 + node as u64, What::Probe(node));
        }
        for (at, (when, _)) in world.plan.faults.clone().iter().enumerate() {
            world.at(*when, What::Fault(at));
        }
        world.at(world.plan.faults_end, What::Settle);
        world
    }

    pub fn instant(&self, at: Ms) -> Instant {
        self.base + Duration::from_millis(at)
    }

    pub fn clock(&self) -> Now {
        Now { at: self.instant(self.now), unix_ms: 1_700_000_000_000 + self.now }
    }

    pub fn at(&mut self, when: Ms, what: What) {
        self.queued += 1;
        self.queue.insert((when, self.queued), what);
    }

    pub fn after(&mut self, wait: Ms, what: What) {
        self.at(self.now + wait, what);
    }

    pub fn log(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>6} {}", self.now, line()));
        }
    }

    pub fn violate(&mut self, what: String) {
        self.log(|| format!("VIOLATION {what}"));
        self.violations.push(what);
    }

    /// The proxy's place in the network.
    pub fn us(&self) -> usize {
        self.nodes.len()
    }

    pub fn linked(&self, a: usize, b: usize) -> bool {
        !self.cut.contains(&(a.min(b), a.max(b)))
    }

    pub fn is_quorum(&self) -> bool {
        self.plan.durability == Durability::Quorum
    }

    /// To the end, or to the first violation.
    pub fn run(mut self) -> World {
        self.go_on_until(self.plan.end);
        self.ended = self.proxy.as_ref().map(|proxy| (proxy.machine.state().clone(), self.primary()));
        if self.violations.is_empty() {
            let rests = self.check_settled();
            self.happened.settled_healthy += usize::from(rests == Rest::Healthy);
            self.happened.blocked += usize::from(rests != Rest::Healthy);
            if rests == Rest::NeedsHelp && self.violations.is_empty() {
                self.help();
            }
        }
        self.happened.violations = self.violations.len();
        self
    }

    fn go_on_until(&mut self, end: Ms) {
        while let Some(next) = self.queue.first_entry() {
            if next.key().0 > end || !self.violations.is_empty() {
                break;
            }
            let ((when, _), what) = next.remove_entry();
            self.now = when;
            self.happen(what);
        }
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Tick => {
                self.tick_proxy();
                self.after(100, What::Tick);
            }
            What::Write => {
                self.write();
                let wait = self.chance.between(20, 80);
                self.after(wait, What::Write);
            }
            What::Replicate => {
                self.replicate();
                self.after(10, What::Replicate);
            }
            What::Probe(node) => {
                self.probe(node);
                self.after(self.plan.check_interval, What::Probe(node));
            }
            What::Probed { run, node, fact } => self.probed(run, node, fact),
            What::Pump { run } => self.pump(run),
            What::Step { run, job } => self.step(run, job),
            What::SocketsClosed { run, epoch } => self.sockets_closed(run, epoch),
            What::Drained { run } => self.drained(run),
            What::Ack { node, start, waiting } => self.told_by_proxy(node, start, waiting),
            What::Fault(at) => {
                let fault = self.plan.faults[at].1.clone();
                self.log(|| format!("-- {fault:?}"));
                self.fault(&fault);
            }
            What::Settle => self.heal_all(),
        }
    }

    // Faults.

    fn fault(&mut self, fault: &Fault) {
        match fault {
            Fault::Kill(node) => {
                self.nodes[*node].kill();
                // A held connection breaks at once.
                if self.linked(*node, self.us()) {
                    let run = self.runs;
                    let soon = self.chance.between(2, 15);
                    self.after(soon, What::Probed { run, node: *node, fact: self.fact_of(*node) });
                }
            }
            Fault::Restart(node) => {
                if !self.nodes[*node].up && !self.nodes[*node].destroyed {
                    let takes = self.chance.between(50, 1500);
                    self.nodes[*node].restart(self.now, takes);
                }
            }
            Fault::Freeze(node) => self.nodes[*node].frozen = self.nodes[*node].up,
            Fault::Thaw(node) => self.nodes[*node].frozen = false,
            Fault::Cut(a, b) => {
                self.cut.insert((*a.min(b), *a.max(b)));
            }
            Fault::Heal(a, b) => {
                self.cut.remove(&(*a.min(b), *a.max(b)));
            }
            Fault::Block(node) => self.nodes[*node].blocked = self.nodes[*node].recovery,
            Fault::CrashProxy => {
                if self.proxy.take().is_some() {
                    self.happened.proxy_crashes += 1;
                    // What could not be recorded of a primary that was found is gone with those who were told.
                    let durable = self.disk.epoch.0;
                    self.targets.retain(|epoch, _| *epoch <= durable);
                }
            }
            Fault::StartProxy => {
                if self.proxy.is_none() {
                    self.start_proxy();
                }
            }
            Fault::Depose => self.depose(),
            Fault::Destroy(node) => {
                // Only what is certain not to come back may be forgotten, and an operator forgets no living primary.
                self.nodes[*node].kill();
                self.nodes[*node].destroyed = true;
                self.forks.retain(|_, by| by != node);
                self.loss_allowed = true;
                // A promotion that it may have begun counts as not begun.
                if self.disk.primary != Some(NodeId(*node as u16)) {
                    self.promote_sent.retain(|_, to| to != node);
                    if self.latest == *node {
                        self.latest = self.disk.primary.map_or(0, NodeId::index);
                        self.latest_epoch = self.disk.epoch.0;
                    }
                }
                self.command(Command::Forget(NodeId(*node as u16)));
            }
            Fault::Command(command) => {
                if matches!(command, Command::Failover { allow_data_loss: true, .. }) {
                    self.loss_allowed = true;
                }
                self.command(command.clone());
            }
            Fault::RecordFails(fails) => self.record_fails = *fails,
            Fault::Rejoin(node) => self.rejoin(*node),
        }
    }

    /// Who takes over reads what etcd has; the other's lease is over by then, at which each statement looks: one that it
    /// was just sending may still leave it. Its record cannot be written any more.
    fn depose(&mut self) {
        let Some(old) = self.proxy.take() else { return };
        self.happened.proxy_crashes += 1;
        if let Some(record) = old.unanswered_record()
            && self.chance.one_in(2)
        {
            self.disk = record;
        }
        let durable = self.disk.epoch.0;
        self.targets.retain(|epoch, _| *epoch <= durable);
        for mut job in old.jobs.into_values() {
            let session = old.sessions[job.node];
            let holds = job.locked && session != 0 && self.nodes[job.node].lock == session;
            if holds && self.chance.one_in(2) {
                self.sends_late(&mut job, session);
            }
        }
        self.start_proxy();
    }

    /// An operator makes a node that is out a fresh standby.
    fn rejoin(&mut self, node: usize) {
        let (latest, joins) = (&self.nodes[self.latest], &self.nodes[node]);
        let follows = joins.recovery && latest.extends(joins);
        if node == self.latest || !latest.works(self.now) || joins.destroyed || follows {
            return;
        }
        let mut fresh = Node::new(node);
        fresh.start = joins.start + 1;
        fresh.recovery = true;
        fresh.upstream = Some(self.latest);
        (fresh.wal, fresh.timeline) = (latest.wal.clone(), latest.timeline);
        fresh.history.clone_from(&latest.history);
        fresh.starting_until = self.now + 500;
        fresh.pids = joins.pids + 1;
        self.nodes[node] = fresh;
    }

    fn heal_all(&mut self) {
        self.log(|| "-- all is well again".to_owned());
        self.cut.clear();
        self.record_fails = false;
        for node in &mut self.nodes {
            (node.frozen, node.blocked) = (false, false);
        }
        if !self.plan.stay_dead {
            self.restart_all();
        }
        if self.proxy.is_none() {
            self.start_proxy();
        }
    }

    fn restart_all(&mut self) {
        for node in self.nodes.iter_mut().filter(|node| !node.up && !node.destroyed) {
            node.restart(self.now, 300);
        }
    }

    // Replication.

    fn replicate(&mut self) {
        for at in 0..self.nodes.len() {
            if self.nodes[at].works(self.now) {
                self.land_late(at);
                if self.nodes[at].recovery {
                    self.standby(at);
                }
            }
        }
        for at in 0..self.nodes.len() {
            self.confirm(at);
        }
    }

    /// Statements that were under way when the node froze or could not be reached.
    fn land_late(&mut self, at: usize) {
        let soon = if self.without == Without::Lock { 200 } else { 20 };
        if self.nodes[at].stuck.is_empty() || !self.linked(at, self.us()) || !self.chance.one_in(soon) {
            return;
        }
        let stuck = self.nodes[at].stuck.remove(0);
        if self.nodes[at].lock == stuck.session || self.without == Without::Lock {
            self.happened.late_effects += 1;
            self.log(|| format!("n{at}: {:?} lands late", stuck.effect));
            self.apply(at, &stuck.effect);
        }
    }

    pub fn apply(&mut self, at: usize, effect: &crate::nodes::Effect) {
        let was_standby = self.nodes[at].recovery;
        let in_effect_after = self.chance.between(0, 250);
        self.nodes[at].apply(effect, self.now, in_effect_after);
        if was_standby && !self.nodes[at].recovery {
            self.promoted(at);
        }
    }

    fn standby(&mut self, at: usize) {
        let busy = if self.nodes[at].reading { !self.chance.one_in(30) } else { self.chance.one_in(4) };
        let node = &mut self.nodes[at];
        if !node.blocked && !busy {
            node.replayed = node.wal.len();
            node.reading = false;
            // Only the startup process ends a walreceiver, or begins one.
            if node.receiver.is_some_and(|receiver| Some(receiver.from) != node.upstream) {
                node.receiver = None;
            }
            if node.receiver.is_none() {
                self.connect(at);
            }
        }
        self.receive(at);
    }

    fn connect(&mut self, at: usize) {
        let Some(from) = self.nodes[at].upstream else {
            return;
        };
        if !self.linked(at, from) || !self.nodes[from].works(self.now) || self.chance.one_in(3) {
            return;
        }
        let (sender_start, streaming) = (self.nodes[from].start, self.nodes[from].extends(&self.nodes[at]));
        let node = &mut self.nodes[at];
        node.pids += 1;
        node.receiver = Some(Receiver { from, pid: node.pids, sender_start, heard: self.now, streaming });
    }

    fn receive(&mut self, at: usize) {
        let Some(mut receiver) = self.nodes[at].receiver else {
            return;
        };
        let from = receiver.from;
        let linked = self.linked(at, from);
        let gone = linked
            && !self.nodes[from].frozen
            && (!self.nodes[from].up || self.nodes[from].start != receiver.sender_start);
        if gone || self.now > receiver.heard + self.plan.receiver_timeout {
            self.nodes[at].receiver = None;
            return;
        }
        if !linked || !self.nodes[from].works(self.now) {
            return;
        }
        receiver.heard = self.now;
        receiver.streaming = self.nodes[from].extends(&self.nodes[at]);
        if receiver.streaming && !self.chance.one_in(4) {
            let sender_wal = std::mem::take(&mut self.nodes[from].wal);
            let upto = if self.chance.one_in(3) {
                (self.nodes[at].wal.len() + sender_wal.len()).div_ceil(2)
            } else {
                sender_wal.len()
            };
            self.nodes[at].receive(&sender_wal, upto);
            self.nodes[from].wal = sender_wal;
            let (timeline, history) = (self.nodes[from].timeline, self.nodes[from].history.clone());
            (self.nodes[at].timeline, self.nodes[at].history) = (timeline, history);
        }
        self.nodes[at].receiver = Some(receiver);
    }

    /// What standbys have told this node that they have, and the commits which that releases.
    fn confirm(&mut self, at: usize) {
        if self.nodes[at].recovery || !self.nodes[at].works(self.now) {
            return;
        }
        for from in 0..self.nodes.len() {
            let standby = &self.nodes[from];
            let streams = standby.works(self.now)
                && standby.receiver.is_some_and(|receiver| {
                    receiver.from == at && receiver.streaming && receiver.sender_start == self.nodes[at].start
                });
            let has = standby.wal.len();
            if !streams {
                self.nodes[at].confirmed.remove(&from);
            } else if self.linked(at, from) && !self.chance.one_in(3) {
                self.nodes[at].confirmed.insert(from, has);
            }
        }
        self.release(at);
    }

    fn release(&mut self, at: usize) {
        let now = self.now;
        for waiting in self.nodes[at].release(now) {
            match waiting.writer {
                Writer::Direct => {
                    self.happened.acked_direct += 1;
                    self.acknowledged_to_direct(at, waiting.write);
                }
                Writer::Proxy { .. } => {
                    let wait = self.chance.between(1, 12);
                    self.after(wait, What::Ack { node: at, start: self.nodes[at].start, waiting });
                }
            }
        }
    }

    // Clients.

    fn write(&mut self) {
        for _ in 0..2 {
            if self.chance.one_in(3) {
                self.write_direct();
            } else {
                self.write_by_proxy();
            }
        }
    }

    fn write_direct(&mut self) {
        // They know one address: the first primary's, or now and then another's.
        let at = if self.chance.one_in(4) { self.latest } else { self.plan.direct_to };
        // Half of them set default_transaction_read_only themselves.
        let refused = self.nodes[at].fenced && self.chance.one_in(2);
        if !refused {
            self.append(at, Writer::Direct);
        }
    }

    fn write_by_proxy(&mut self) {
        let Some((target, writer)) = self.proxy.as_ref().and_then(Proxy::writes_to) else {
            return;
        };
        if self.linked(target, self.us()) && !self.nodes[target].fenced {
            self.proxy.as_mut().unwrap().sockets_open = true;
            self.append(target, writer);
        }
    }

    fn append(&mut self, at: usize, writer: Writer) {
        let node = &mut self.nodes[at];
        if node.recovery || !node.works(self.now) {
            return;
        }
        self.writes += 1;
        node.wal.push(self.writes);
        node.replayed = node.wal.len();
        node.waiting.push(Waiting { at: node.wal.len() - 1, write: self.writes, writer });
        self.release(at);
    }

    fn told_by_proxy(&mut self, at: usize, start: u64, waiting: Waiting) {
        let Writer::Proxy { run, epoch, sockets } = waiting.writer else {
            return;
        };
        let closed = self.proxy.as_ref().is_none_or(|proxy| proxy.run != run || proxy.closings > sockets);
        if closed {
            return;
        }
        if !self.linked(at, self.us()) || self.nodes[at].frozen {
            // The network sends it again, if the server lives to do so.
            if self.nodes[at].up && self.nodes[at].start == start {
                self.after(50, What::Ack { node: at, start, waiting });
            }
            return;
        }
        self.happened.acked += 1;
        self.last_ack = self.now;
        if epoch < self.latest_epoch {
            self.violate(format!("no_ack_old_side: n{at} acknowledged through the proxy in epoch {epoch}"));
        }
        self.acknowledged(at, waiting.write, "a client of the proxy");
    }

    // What must hold.

    fn acknowledged_to_direct(&mut self, at: usize, write: u64) {
        if !self.on_their_own(at) {
            self.acknowledged(at, write, "a direct client");
        }
    }

    fn acknowledged(&mut self, at: usize, write: u64, whom: &str) {
        if !self.is_quorum() {
            return;
        }
        self.acked.insert(write);
        if at != self.latest && !self.loss_allowed {
            self.violate(format!(
                "no_ack_old_side: n{at} acknowledged {write} to {whom}, after n{}",
                self.latest
            ));
        }
    }

    fn promoted(&mut self, at: usize) {
        self.happened.promotions += 1;
        let (left, fork) = *self.nodes[at].history.last().unwrap();
        self.log(|| format!("n{at} is promoted: timeline {} from {}", left + 1, lsn(fork)));
        if let Some(other) = self.forks.insert(left, at)
            && other != at
        {
            self.violate(format!("no_second_candidate: n{other} and n{at} both left timeline {left}"));
        }
        let wal: BTreeSet<u64> = self.nodes[at].wal.iter().copied().collect();
        let lost: Vec<u64> = self.acked.difference(&wal).copied().collect();
        if !lost.is_empty() && self.is_quorum() && !self.loss_allowed {
            self.violate(format!("acked_in_primary: n{at} lacks {lost:?}"));
        }
        self.acked.retain(|write| wal.contains(write));
        self.latest = at;
        self.latest_epoch =
            self.promote_sent.iter().filter(|(_, to)| **to == at).map(|(epoch, _)| *epoch).max().unwrap_or(0);
    }

    /// An order to promote is given.
    pub fn promote_is_ordered(&mut self, node: usize, epoch: Epoch) {
        use highwater::failover::record::Stage;
        let to = NodeId(node as u16);
        let durable = self.disk.intent.clone();
        if !durable.as_ref().is_some_and(|intent| intent.epoch == epoch && intent.stage == Stage::Promote(to))
        {
            self.violate(format!(
                "one_target_per_epoch: a promotion of n{node} is sent before its intent is durable"
            ));
        }
        self.left_uncovered |= durable.is_some_and(|intent| {
            intent.planned && (self.disk.sync.degraded || self.nodes[intent.from.index()].names.is_none())
        });
        let open = self.proxy.as_ref().is_some_and(|proxy| proxy.sockets_open);
        if open && self.without != Without::ClosedSockets {
            self.violate(format!("sockets to the old primary are open when n{node} is to be promoted"));
        }
    }

    /// The order leaves: from here on that node may be promoted. (One that refused the connection was not asked.)
    pub fn promote_is_sent(&mut self, node: usize, epoch: Epoch) {
        if self.promote_sent.insert(epoch.0, node).is_some_and(|other| other != node) {
            self.violate(format!("one_target_per_epoch: a second candidate, n{node}, of epoch {}", epoch.0));
        }
    }

    /// While replication is degraded a switchover asks nobody about clients that go past the proxy and make themselves
    /// read-write on the old primary: they are on their own.
    fn on_their_own(&self, at: usize) -> bool {
        let leaves = |intent: &Intent| intent.planned && intent.from.index() == at;
        (self.disk.sync.degraded && self.disk.intent.as_ref().is_some_and(leaves))
            || (self.left_uncovered && at != self.latest)
    }

    pub fn published(&mut self, node: usize, epoch: u64) {
        if self.targets.insert(epoch, node).is_some_and(|other| other != node) {
            self.violate(format!("one_target_per_epoch: epoch {epoch} has a second target, n{node}"));
        }
    }

    fn check_settled(&mut self) -> Rest {
        let Some(proxy) = &self.proxy else {
            self.violate("settles: there is no proxy".to_owned());
            return Rest::Waits;
        };
        let (state, primary) = (proxy.machine.state().clone(), self.primary());
        let lives = self.nodes[primary].works(self.now) && !self.nodes[primary].recovery;
        let rests = match &state {
            State::Healthy if lives && self.now < self.last_ack + 3000 => Rest::Healthy,
            // With `strict` commits wait for as many as there should be.
            State::Healthy if lives && self.plan.strict && self.streaming_from(primary) < self.plan.num => {
                Rest::Waits
            }
            State::Healthy if lives => {
                self.violate(format!("settles: n{primary} acknowledges nothing"));
                Rest::Waits
            }
            // It may have been promoted, and only an operator can say that it never will be.
            State::Blocked(BlockReason::CandidateUnreachable { node })
                if !self.nodes[node.index()].works(self.now) =>
            {
                Rest::NeedsHelp
            }
            State::Blocked(_) if !lives => Rest::NeedsHelp,
            // Nobody is left who could say anything.
            State::Suspect if !lives && !self.is_answered(primary) => Rest::NeedsHelp,
            state => {
                self.violate(format!("settles: {state:?}, primary n{primary} lives: {lives}"));
                Rest::Waits
            }
        };
        match rests {
            Rest::NeedsHelp => self.check_not_severed(primary),
            Rest::Healthy | Rest::Waits => self.check_all_follow(primary),
        }
        self.check_diverged(primary);
        rests
    }

    /// By a standby that is not kept out.
    fn is_answered(&self, primary: usize) -> bool {
        let out = |at: usize| {
            self.proxy.as_ref().and_then(|proxy| proxy.machine.quarantine(NodeId(at as u16))).is_some()
        };
        let answers = |at: usize| self.nodes[at].works(self.now) && self.nodes[at].recovery;
        (0..self.nodes.len()).any(|at| at != primary && answers(at) && !out(at))
    }

    /// By the record.
    fn primary(&self) -> usize {
        let primary = self.proxy.as_ref().and_then(|proxy| proxy.machine.record().primary);
        primary.map_or(0, NodeId::index)
    }

    /// What stands still is not lost: the primary that comes back is followed by all again; and what an operator gives
    /// up is left behind by those that can take over.
    fn help(&mut self) {
        let primary = self.primary();
        let gives_up = self.plan.seed.is_multiple_of(2) || self.nodes[primary].destroyed;
        // Not all at once, and not only once: as an operator would.
        for _ in 0..3 {
            for node in (0..self.nodes.len()).filter(|node| self.nodes[*node].destroyed).collect::<Vec<_>>() {
                self.command(Command::Forget(NodeId(node as u16)));
            }
            if gives_up {
                self.log(|| "-- the operator gives up what may be lost".to_owned());
                self.loss_allowed = true;
                self.command(Command::Failover { to: None, allow_data_loss: true });
            } else {
                self.log(|| "-- who is away comes back".to_owned());
                self.restart_all();
            }
            self.go_on_until(self.now + 6000);
        }
        if self.violations.is_empty() {
            self.check_helped(gives_up);
        }
    }

    fn check_helped(&mut self, gave_up: bool) {
        let primary = self.primary();
        let Some(proxy) = &self.proxy else { return };
        let lives = self.nodes[primary].works(self.now) && !self.nodes[primary].recovery;
        match proxy.machine.state().clone() {
            State::Healthy if lives => self.check_all_follow(primary),
            // Nobody has what it takes; or the one that may have been promoted is not to be seen.
            _ if gave_up && (!self.has_successor(primary) || proxy.machine.record().intent.is_some()) => {
                self.check_not_severed(primary);
            }
            state => self.violate(format!("helped: {state:?}, primary n{primary} lives: {lives}")),
        }
        self.check_diverged(primary);
    }

    fn streaming_from(&self, primary: usize) -> usize {
        let streams = |node: &&Node| node.receiver.is_some_and(|it| it.from == primary && it.streaming);
        self.nodes.iter().filter(streams).count()
    }

    fn has_successor(&self, primary: usize) -> bool {
        let out = |at: usize| {
            self.proxy.as_ref().and_then(|proxy| proxy.machine.quarantine(NodeId(at as u16))).is_some()
        };
        let fits = |node: &Node| node.works(self.now) && node.timeline == self.nodes[primary].timeline;
        (0..self.nodes.len()).any(|at| at != primary && fits(&self.nodes[at]) && !out(at))
    }

    /// I12: whoever was cut off from a primary that was not replaced looks for that one again. One that an earlier
    /// epoch left behind cannot follow a primary that is gone: whether it may is to be asked of that primary's own
    /// history (I5). It is recorded, and follows once there is a primary (`check_all_follow`).
    fn check_not_severed(&mut self, primary: usize) {
        use highwater::failover::record::Stage;
        let Some(proxy) = &self.proxy else { return };
        let record = proxy.machine.record().clone();
        let may_be_promoted = record.intent.as_ref().is_some_and(|intent| intent.stage != Stage::Prepare);
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            let left_behind =
                record.repoint.contains(&NodeId(at as u16)) && node.timeline < self.nodes[primary].timeline;
            let alone = node.works(self.now) && node.recovery && node.upstream.is_none();
            if alone && !may_be_promoted && !left_behind {
                self.violate(format!("blocked_not_severed: n{at} does not follow n{primary} any more"));
            }
        }
    }

    /// Nobody is forgotten: whoever is not kept out follows the primary, or another standby that does.
    fn check_all_follow(&mut self, primary: usize) {
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            let out = self.proxy.as_ref().and_then(|proxy| proxy.machine.quarantine(NodeId(at as u16)));
            let mut upstream = node.upstream;
            for _ in 0..self.nodes.len() {
                let further = upstream.filter(|of| *of != primary).map(|of| self.nodes[of].upstream);
                upstream = further.unwrap_or(upstream);
            }
            let follows = upstream == Some(primary);
            if at != primary && node.works(self.now) && node.recovery && out.is_none() && !follows {
                self.violate(format!("left_alone: n{at} does not follow n{primary}"));
            }
        }
    }

    /// Who has what the primary has not is kept out.
    fn check_diverged(&mut self, primary: usize) {
        for at in 0..self.nodes.len() {
            let (node, target) = (&self.nodes[at], &self.nodes[primary]);
            let streams =
                node.receiver.is_some_and(|receiver| receiver.streaming && receiver.from == primary);
            if at == primary
                || !node.works(self.now)
                || !target.works(self.now)
                || target.extends(node)
                || streams
            {
                continue;
            }
            let out = self.proxy.as_ref().and_then(|proxy| proxy.machine.quarantine(NodeId(at as u16)));
            if out.is_none() {
                self.violate(format!("n{at} has diverged from n{primary} and is not kept out"));
            }
        }
    }
}
