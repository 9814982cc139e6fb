//! What the orders do to the nodes, statement by statement: each may be late, be lost, or lose its answer.

use highwater::failover::event::{Event, Kick, Order, OrderId, OrderResult};
use highwater::failover::sync::{Quorum, SyncEvent};
use highwater::topology::Epoch;
use highwater::wal::TimelineId;

use crate::nodes::{Effect, Ms, lsn, records};
use crate::world::{What, Without, World};

#[derive(Clone, Debug)]
pub enum Task {
    Order(OrderId, Order),
    /// Of `failover::sync`, on the primary.
    Sync {
        rule: Quorum,
        prove: bool,
        /// Of which it is.
        epoch: Epoch,
    },
}

/// A task on its way: orders to one node come one after the other.
#[derive(Clone, Debug)]
pub struct Job {
    pub number: u64,
    pub node: usize,
    pub task: Task,
    pub begun: bool,
    pub deadline: Ms,
    /// The lock is held, and these effects are still to be sent.
    pub locked: bool,
    pub effects: Vec<Effect>,
    /// A statement that changes something was sent.
    pub sent: bool,
    /// No answer will come to it.
    pub hangs: bool,
    /// The walreceiver before a kick.
    pub pid: Option<u32>,
}

pub enum Outcome {
    Order(OrderResult),
    Sync(SyncEvent),
}

impl Job {
    pub fn new(number: u64, node: usize, task: Task) -> Job {
        let effects = match &task {
            Task::Order(_, order) => match order {
                Order::Kick { .. } => vec![Effect::Kick],
                Order::Fence => vec![Effect::Fence],
                Order::Unfence => vec![Effect::Unfence],
                Order::Sever => vec![Effect::Sever],
                Order::Unsever => vec![Effect::Unsever],
                Order::Barrier { .. } | Order::EpochRow { .. } => Vec::new(),
                Order::SetSync { members, num } => {
                    vec![Effect::SetSync(Quorum::any(*num as usize, members.iter().copied()))]
                }
                Order::Promote { .. } => vec![Effect::Unblock, Effect::Promote],
                Order::Repoint { to, .. } => vec![Effect::Follow(to.index())],
            },
            Task::Sync { prove: true, .. } => Vec::new(),
            Task::Sync { rule, .. } => vec![Effect::SetSync(rule.clone())],
        };
        Job {
            number,
            node,
            task,
            begun: false,
            deadline: 0,
            locked: false,
            effects,
            sent: false,
            hangs: false,
            pid: None,
        }
    }

    /// How long it may take.
    pub fn time(&self) -> Ms {
        match &self.task {
            Task::Order(
                _,
                Order::Kick { wait } | Order::Barrier { wait, .. } | Order::Promote { wait, .. },
            ) => u64::try_from(wait.as_millis()).unwrap() + 200,
            Task::Order(_, Order::Sever) => 1500,
            Task::Order(..) | Task::Sync { .. } => 1000,
        }
    }

    fn unknown(&self) -> Outcome {
        match &self.task {
            Task::Order(_, Order::Kick { .. }) => {
                // What it showed until then.
                Outcome::Order(OrderResult::Kicked(Kick::SameProcess))
            }
            Task::Order(..) if self.sent => Outcome::Order(OrderResult::Unknown("no answer".to_owned())),
            Task::Order(..) => Outcome::Order(OrderResult::Failed("cannot be reached".to_owned())),
            Task::Sync { .. } => Outcome::Sync(SyncEvent::Unclear),
        }
    }
}

impl World {
    /// One round trip of a job.
    pub fn step(&mut self, run: u64, number: u64) {
        let Some(proxy) = self.proxy.as_mut().filter(|proxy| proxy.run == run) else {
            return;
        };
        let Some(mut job) = proxy.jobs.remove(&number) else {
            return;
        };
        if !job.begun {
            job.begun = true;
            job.deadline = self.now + job.time();
        }
        if let Some(outcome) = self.round_trip(&mut job) {
            self.finish(&job, outcome);
        } else {
            let wait =
                if job.hangs { job.deadline.max(self.now) - self.now } else { self.chance.between(1, 20) };
            self.proxy.as_mut().unwrap().jobs.insert(number, job);
            self.after(wait.max(1), What::Step { run, job: number });
        }
    }

    fn round_trip(&mut self, job: &mut Job) -> Option<Outcome> {
        let node = job.node;
        if self.now >= job.deadline {
            return Some(self.at_deadline(job));
        }
        if job.hangs {
            return None;
        }
        let reached = self.linked(node, self.us()) && self.nodes[node].works(self.now);
        if !reached {
            return self.not_reached(job);
        }
        let session = self.proxy.as_ref().unwrap().sessions[node];
        if job.locked && self.nodes[node].lock != session {
            // It has restarted, or somebody else has taken the lock.
            self.proxy.as_mut().unwrap().sessions[node] = 0;
            return Some(job.unknown());
        }
        if !job.locked {
            self.take_lock(node, session);
            job.locked = true;
            job.pid = self.nodes[node].receiver.map(|receiver| receiver.pid);
            return self.refuses(job);
        }
        if let Some(effect) = (!job.effects.is_empty()).then(|| job.effects.remove(0)) {
            // It is found promoted already.
            let moot = effect == Effect::Promote && !self.nodes[node].recovery;
            let effect = match (effect, self.nodes[node].saved) {
                (Effect::Unsever, Some(to)) => Effect::Follow(to),
                (effect, _) => effect,
            };
            return if moot { None } else { self.send(job, &effect) };
        }
        self.poll(job)
    }

    /// The session is kept while it answers; a new one ends whoever holds the lock, and with them what they
    /// have sent.
    fn take_lock(&mut self, node: usize, session: u64) {
        if session == 0 || self.nodes[node].lock != session {
            self.sessions += 1;
            let (session, keep) = (self.sessions, self.without == Without::Lock);
            self.proxy.as_mut().unwrap().sessions[node] = session;
            self.nodes[node].lock = session;
            self.nodes[node].stuck.retain(|_| keep);
        }
    }

    fn not_reached(&mut self, job: &mut Job) -> Option<Outcome> {
        let (node, us) = (job.node, self.us());
        let refused = self.linked(node, us) && !self.nodes[node].frozen && job.locked;
        if refused || (self.linked(node, us) && !self.nodes[node].up) {
            self.proxy.as_mut().unwrap().sessions[node] = 0;
            return Some(job.unknown());
        }
        // A held session's statement goes into the kernel's buffers, and may come out of them later.
        let session = self.proxy.as_ref().unwrap().sessions[node];
        let held = session != 0 && self.nodes[node].lock == session;
        if held && let Some(effect) = (!job.effects.is_empty()).then(|| job.effects.remove(0)) {
            self.leaves(job);
            if self.chance.one_in(2) {
                self.nodes[node].stuck.push(crate::nodes::Stuck { session, effect });
            }
        }
        job.hangs = true;
        None
    }

    /// What is not as the order expects.
    fn refuses(&mut self, job: &Job) -> Option<Outcome> {
        let Task::Order(_, order) = &job.task else {
            return None;
        };
        let node = &self.nodes[job.node];
        let for_standby = matches!(
            order,
            Order::Sever
                | Order::Unsever
                | Order::Kick { .. }
                | Order::Repoint { .. }
                | Order::Barrier { .. }
        );
        if for_standby && !node.recovery {
            return Some(Outcome::Order(OrderResult::Failed("it is not in recovery".to_owned())));
        }
        if let Order::Promote { timeline, .. } = order
            && node.recovery
            && node.timeline != timeline.0
        {
            // It was made a standby of another primary meanwhile.
            return Some(Outcome::Order(OrderResult::Failed("it is on another timeline".to_owned())));
        }
        if let Order::Repoint { to, fork, timeline } = order {
            let behind = self.nodes[to.index()].fork_of(node.timeline).map_or(*fork, lsn);
            if node.timeline != timeline.0 && node.end() > behind.min(*fork) {
                return Some(Outcome::Order(OrderResult::Diverged { at: node.end() }));
            }
        }
        None
    }

    /// A statement that changes something is on its way.
    fn leaves(&mut self, job: &mut Job) {
        job.sent = true;
        if let Task::Order(_, Order::Promote { epoch, .. }) = &job.task {
            self.promote_is_sent(job.node, *epoch);
        }
    }

    /// The next statement of a job leaves a proxy that was stopped before it could.
    pub fn sends_late(&mut self, job: &mut Job, session: u64) {
        let node = job.node;
        let Some(effect) = (!job.effects.is_empty()).then(|| job.effects.remove(0)) else { return };
        if effect == Effect::Promote {
            self.leaves(job);
        }
        let effect = match (effect, self.nodes[node].saved) {
            (Effect::Unsever, Some(to)) => Effect::Follow(to),
            (effect, _) => effect,
        };
        self.nodes[node].stuck.push(crate::nodes::Stuck { session, effect });
    }

    fn send(&mut self, job: &mut Job, effect: &Effect) -> Option<Outcome> {
        let node = job.node;
        self.leaves(job);
        if self.without == Without::Severing && *effect == Effect::Sever {
            return None;
        }
        let often = if self.without == Without::Lock { 4 } else { 24 };
        match self.chance.below(often) {
            0 => {
                // It is done, and nobody hears of it.
                self.apply(node, effect);
                self.proxy.as_mut().unwrap().sessions[node] = 0;
                job.hangs = true;
                None
            }
            1 => {
                let session = self.nodes[node].lock;
                self.nodes[node].stuck.push(crate::nodes::Stuck { session, effect: effect.clone() });
                self.proxy.as_mut().unwrap().sessions[node] = 0;
                job.hangs = true;
                None
            }
            _ => {
                self.apply(node, effect);
                None
            }
        }
    }

    fn poll(&mut self, job: &Job) -> Option<Outcome> {
        let node = &self.nodes[job.node];
        let done = |result| Some(Outcome::Order(result));
        let order = match &job.task {
            Task::Sync { rule, prove, .. } => {
                let shown = node.names == *rule;
                let in_effect = self.now >= node.effective_at || self.without == Without::InEffect;
                return match (shown, in_effect) {
                    (true, true) => Some(Outcome::Sync(SyncEvent::InEffect(node.end()))),
                    (false, _) if *prove => Some(Outcome::Sync(SyncEvent::Unclear)),
                    _ => None,
                };
            }
            Task::Order(_, order) => order,
        };
        match order {
            Order::Kick { .. } => {
                let new =
                    node.receiver.filter(|receiver| receiver.streaming && Some(receiver.pid) != job.pid);
                new.and_then(|_| done(OrderResult::Kicked(Kick::Streams)))
            }
            Order::Fence => done(OrderResult::Fenced { end: node.end() }),
            Order::Unfence | Order::Unsever | Order::Repoint { .. } | Order::EpochRow { .. } => {
                done(OrderResult::Done)
            }
            Order::Sever => self.severed(job.node),
            Order::Barrier { lsn: upto, .. } => {
                let has = node.replayed;
                (has >= records(*upto)).then_some(Outcome::Order(OrderResult::Reached(lsn(has))))
            }
            Order::SetSync { members, num } => {
                let rule = Quorum::any(*num as usize, members.iter().copied());
                (node.names == rule).then_some(Outcome::Order(OrderResult::Done))
            }
            Order::Promote { timeline, .. } => {
                node.fork_of(timeline.0).filter(|_| !node.recovery).map(|fork| {
                    let timeline = TimelineId(node.timeline);
                    Outcome::Order(OrderResult::Promoted { timeline, fork: lsn(fork) })
                })
            }
        }
    }

    fn severed(&mut self, at: usize) -> Option<Outcome> {
        // What blocks replay is cleared at every look: readers come back.
        self.nodes[at].blocked &= self.without == Without::SeverProof;
        let node = &self.nodes[at];
        let believed = matches!(self.without, Without::SeverProof | Without::Severing);
        let cut_off = (node.upstream.is_none() && node.receiver.is_none()) || believed;
        let end = match self.without {
            Without::FinalPosition => lsn(node.replayed),
            _ if node.reading => return None,
            _ => node.end(),
        };
        let timeline = Some(TimelineId(node.timeline));
        cut_off.then_some(Outcome::Order(OrderResult::Severed { end, timeline }))
    }

    fn at_deadline(&mut self, job: &Job) -> Outcome {
        let node = &self.nodes[job.node];
        match &job.task {
            Task::Order(_, Order::Kick { .. }) if !job.hangs => {
                let kick = match node.receiver {
                    None => Kick::Gone,
                    Some(receiver) if Some(receiver.pid) == job.pid => Kick::SameProcess,
                    Some(receiver) if receiver.streaming => Kick::Streams,
                    Some(_) => Kick::Gone,
                };
                return Outcome::Order(OrderResult::Kicked(kick));
            }
            Task::Order(_, Order::Barrier { .. }) if !job.hangs => {
                return Outcome::Order(OrderResult::Failed("it has not got there".to_owned()));
            }
            _ => {}
        }
        if job.sent {
            self.proxy.as_mut().unwrap().sessions[job.node] = 0;
        }
        job.unknown()
    }

    fn finish(&mut self, job: &Job, outcome: Outcome) {
        let run = self.runs;
        let proxy = self.proxy.as_mut().unwrap();
        proxy.job_of[job.node] = None;
        match (&job.task, outcome) {
            (Task::Order(id, order), Outcome::Order(mut result)) => {
                if matches!(result, OrderResult::Unknown(_)) {
                    self.happened.unknown_orders += 1;
                    if self.without == Without::SameNode && matches!(order, Order::Promote { .. }) {
                        result = OrderResult::Failed("no answer".to_owned());
                    }
                }
                let (id, node, label) = (*id, job.node, order.label());
                self.log(|| format!("   {label} n{node}: {result:?}"));
                self.tell(Event::OrderDone { id, result });
            }
            (Task::Sync { rule, epoch, .. }, Outcome::Sync(event)) => {
                let (rule, epoch, at) = (rule.clone(), *epoch, job.node);
                self.log(|| format!("   sync n{at} {}/{:?}: {event:?}", rule.confirm, rule.members));
                self.sync_done(event, rule, epoch);
            }
            _ => unreachable!("a task has an outcome of its kind"),
        }
        self.next_job(job.node);
        self.after(0, What::Pump { run });
    }

    /// The next order to this node begins.
    pub fn next_job(&mut self, node: usize) {
        let run = self.runs;
        let wait = self.chance.between(1, 10);
        let proxy = self.proxy.as_mut().unwrap();
        if proxy.job_of[node].is_some() {
            return;
        }
        if let Some(job) = proxy.line[node].pop_front() {
            let number = job.number;
            proxy.job_of[node] = Some(number);
            proxy.jobs.insert(number, job);
            self.after(wait, What::Step { run, job: number });
        }
    }
}
