//! The shell around the real machine, as `control` is one: feeds it, and does what it says in that order.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use highwater::failover::decide::{Machine, NodeRule, Settings};
use highwater::failover::event::{
    Action, Command, CommandId, Event, Fact, Gate, Order, Role, Seen, State, Walreceiver,
};
use highwater::failover::record::{Record, SyncState};
use highwater::failover::sync::{Look, Quorum, Sender, Standby, Sync, SyncAction, SyncEvent, SyncSettings};
use highwater::topology::{Epoch, NodeId};
use highwater::wal::TimelineId;

use crate::hands::{Job, Task};
use crate::nodes::{Ms, Writer, lsn};
use crate::plan::Plan;
use crate::world::{What, Without, World};

/// What waits to be handled, in this order.
enum In {
    Event(Event),
    SyncTask { rule: Quorum, prove: bool, epoch: Epoch, primary: usize },
}

pub struct Proxy {
    pub run: u64,
    pub machine: Machine,
    /// Of which epoch it is.
    sync: Option<(Epoch, Sync)>,
    gate: Gate,
    /// Write target and its epoch.
    pub target: Option<(usize, u64)>,
    /// How often all sockets to the primary have been closed.
    pub closings: u64,
    /// Some have been opened since.
    pub sockets_open: bool,
    inbox: VecDeque<In>,
    outbox: VecDeque<Action>,
    /// A record is being written.
    writing: Option<(Record, Ms)>,
    pub jobs: BTreeMap<u64, Job>,
    /// To each node: the one under way, and who waits.
    pub job_of: Vec<Option<u64>>,
    pub line: Vec<VecDeque<Job>>,
    numbers: u64,
    /// The control session of each node; 0: none.
    pub sessions: Vec<u64>,
    commands: u64,
    looked: Ms,
    /// The start of the write target's server.
    start: Option<std::sync::Arc<str>>,
    /// A write target of which the machine is to hear.
    adopted: Option<(Epoch, TimelineId)>,
    /// A record that waits for its statement, where the rule is left out.
    held: Option<Quorum>,
}

impl Proxy {
    /// A record of which it does not know whether it is written.
    pub fn unanswered_record(&self) -> Option<Record> {
        self.writing.as_ref().map(|(record, _)| record.clone())
    }

    /// Where writes go now, and as whose.
    pub fn writes_to(&self) -> Option<(usize, Writer)> {
        let (node, epoch) = self.target?;
        let writer = Writer::Proxy { run: self.run, epoch, sockets: self.closings };
        (self.gate == Gate::Open).then_some((node, writer))
    }
}

pub fn settings(plan: &Plan) -> Settings {
    let rule = |at: usize| NodeRule { name: format!("n{at}"), priority: 100 - at as u32, zone: None };
    Settings {
        mode: plan.mode,
        durability: plan.durability,
        kick_timeout: Duration::from_millis(500),
        restart_grace: Duration::from_secs(2),
        crash_loop_window: Duration::from_secs(20),
        startup_grace: Duration::from_millis(500),
        promote_timeout: Duration::from_secs(2),
        min_failover_interval: Duration::from_secs(3),
        pause_timeout: Duration::from_secs(3),
        allow_minority: true,
        sync_num: plan.num as u32,
        sync_strict: plan.strict,
        ..Settings::of_nodes((0..plan.nodes).map(rule).collect())
    }
}

impl World {
    pub fn start_proxy(&mut self) {
        self.runs += 1;
        let nodes = self.nodes.len();
        let (record, settings, now) = (self.disk.clone(), settings(&self.plan), self.clock());
        let target = record.primary.map(|node| (node.index(), record.epoch.0));
        self.log(|| format!("the proxy starts: {record:?}"));
        let machine = Machine::new(settings, record, now);
        self.proxy = Some(Proxy {
            run: self.runs,
            gate: machine.wanted_gate(),
            machine,
            sync: None,
            target,
            closings: 0,
            sockets_open: false,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            writing: None,
            jobs: BTreeMap::new(),
            job_of: vec![None; nodes],
            line: (0..nodes).map(|_| VecDeque::new()).collect(),
            numbers: 0,
            sessions: vec![0; nodes],
            commands: 0,
            looked: 0,
            start: None,
            adopted: None,
            held: None,
        });
    }

    pub fn tell(&mut self, event: Event) {
        let run = self.runs;
        if let Some(proxy) = &mut self.proxy {
            proxy.inbox.push_back(In::Event(event));
            self.after(0, What::Pump { run });
        }
    }

    pub fn command(&mut self, command: Command) {
        if let Some(proxy) = &mut self.proxy {
            proxy.commands += 1;
            let id = CommandId(proxy.commands);
            self.tell(Event::Command { id, command });
        }
    }

    pub fn sockets_closed(&mut self, run: u64, epoch: u64) {
        if let Some(proxy) = self.proxy.as_mut().filter(|proxy| proxy.run == run) {
            if self.without != Without::ClosedSockets {
                proxy.closings += 1;
                proxy.sockets_open = false;
            }
            self.tell(Event::SocketsClosed { epoch: Epoch(epoch) });
        }
    }

    pub fn drained(&mut self, run: u64) {
        if self.proxy.as_ref().is_some_and(|proxy| proxy.run == run && proxy.gate == Gate::Draining) {
            self.tell(Event::Drained);
        }
    }

    pub fn tick_proxy(&mut self) {
        let Some(proxy) = &mut self.proxy else {
            return;
        };
        let due = self.now >= proxy.looked + self.plan.check_interval;
        if due {
            proxy.looked = self.now;
        }
        self.tell_of_primary();
        self.tell(Event::Tick);
        if due && self.is_quorum() {
            self.look();
        }
    }

    // Probes.

    pub fn probe(&mut self, node: usize) {
        let run = self.runs;
        let fact = self.fact_of(node);
        let wait = if fact == Fact::Silent { 400 } else { self.chance.between(1, 10) };
        self.after(wait, What::Probed { run, node, fact });
    }

    pub fn fact_of(&self, at: usize) -> Fact {
        let node = &self.nodes[at];
        if !self.linked(at, self.us()) || node.frozen {
            return Fact::Silent;
        }
        if !node.up {
            return Fact::Refused;
        }
        if self.now < node.starting_until {
            return Fact::Starting;
        }
        let role = if node.recovery {
            let walreceiver = node.receiver.map(|receiver| Walreceiver {
                pid: receiver.pid,
                streaming: receiver.streaming,
                timeline: TimelineId(node.timeline),
                from: Some(NodeId(receiver.from as u16)),
            });
            Role::Standby {
                timeline: Some(TimelineId(node.timeline)),
                receive: node.receiver.map(|_| node.end()),
                replay: Some(lsn(node.replayed)),
                walreceiver,
            }
        } else {
            let known = self.proxy.as_ref().and_then(|proxy| proxy.machine.record().timeline);
            let fork = known.and_then(|timeline| node.fork_of(timeline.0)).map(lsn);
            Role::Primary { timeline: TimelineId(node.timeline), insert: node.end(), fork }
        };
        Fact::Answered(Seen { system_identifier: 7, start: Some(node.start.to_string().into()), role })
    }

    pub fn probed(&mut self, run: u64, node: usize, fact: Fact) {
        let Some(proxy) = self.proxy.as_mut().filter(|proxy| proxy.run == run) else {
            return;
        };
        // As `control` does: the first primary that is found is believed, and the same one again after a crash.
        let record = proxy.machine.record();
        if let Fact::Answered(Seen { start, role: Role::Primary { timeline, .. }, .. }) = &fact
            && proxy.machine.may_adopt()
            && proxy.target.is_none_or(|(target, _)| target == node)
            && record.timeline.is_none_or(|known| known == *timeline)
        {
            let crashed = proxy.start.is_some() && proxy.start != *start;
            let first = record.primary.is_none();
            proxy.start.clone_from(start);
            if first || crashed {
                let epoch = record.epoch.0 + 1;
                proxy.target = Some((node, epoch));
                proxy.adopted = Some((Epoch(epoch), *timeline));
                self.published(node, epoch);
                self.tell_of_primary();
            }
        }
        self.tell(Event::Observed { node: NodeId(node as u16), fact });
    }

    /// Again until it is recorded.
    fn tell_of_primary(&mut self) {
        let proxy = self.proxy.as_mut().unwrap();
        let Some(((node, _), (epoch, timeline))) = proxy.target.zip(proxy.adopted) else {
            return;
        };
        if proxy.machine.record().epoch >= epoch {
            proxy.adopted = None;
        } else if proxy.machine.may_adopt() {
            let primary = NodeId(node as u16);
            self.tell(Event::Adopted { primary, timeline, epoch, system_identifier: 7, forked: None });
        }
    }

    // Synchronous standbys.

    fn look(&mut self) {
        let proxy = self.proxy.as_mut().unwrap();
        let record = proxy.machine.record();
        let healthy = *proxy.machine.state() == State::Healthy && record.intent.is_none();
        // The record's, as its epoch is: what is published follows once that is on disk.
        let Some(primary) = record
            .primary
            .map(NodeId::index)
            .filter(|_| healthy || self.without == Without::NoSyncDuringFailover)
        else {
            return;
        };
        let epoch = record.epoch;
        if proxy.sync.as_ref().is_none_or(|(of, _)| *of != epoch) {
            let candidates = (0..self.nodes.len() as u16).map(NodeId).filter(|node| node.index() != primary);
            let names = (0..self.nodes.len()).map(|at| format!("n{at}")).collect();
            let recorded = Quorum::from_record(&record.sync);
            let sync = Sync::new(sync_settings(&self.plan), names, candidates, recorded);
            proxy.sync = Some((epoch, sync));
        }
        if !self.linked(primary, self.us()) || !self.nodes[primary].works(self.now) {
            return;
        }
        let names: Vec<String> = (0..self.nodes.len()).map(|at| format!("n{at}")).collect();
        let streams = |at: usize| {
            self.nodes[at].receiver.is_some_and(|receiver| receiver.streaming && receiver.from == primary)
        };
        let senders = (0..self.nodes.len()).filter(|at| streams(*at));
        let senders = senders.map(|at| Sender { name: format!("n{at}"), counts: true }).collect();
        let standbys = (0..self.nodes.len()).filter(|at| *at != primary).filter_map(|at| {
            let node = &self.nodes[at];
            let answers = self.linked(at, self.us()) && node.works(self.now);
            let streams = streams(at) && node.timeline == self.nodes[primary].timeline;
            answers.then(|| Standby {
                node: NodeId(at as u16),
                streaming: streams,
                flushed: Some(node.end()),
            })
        });
        let look = Look {
            asked_at: self.instant(self.now),
            setting: self.nodes[primary].names.setting(&names),
            at: self.nodes[primary].end(),
            senders,
            standbys: standbys.collect(),
        };
        self.sync_step(SyncEvent::Look(look));
    }

    fn sync_step(&mut self, event: SyncEvent) {
        let now = self.instant(self.now);
        let Some((_, sync)) = self.proxy.as_mut().and_then(|proxy| proxy.sync.as_mut()) else {
            return;
        };
        let mut actions = sync.step(event, now);
        if self.without == Without::LoosenRecordFirst && actions.len() > 1 {
            let SyncAction::Record(rule, _) = actions.remove(0) else { unreachable!("the record is first") };
            self.proxy.as_mut().unwrap().held = Some(rule);
        }
        for action in actions {
            match action {
                SyncAction::Record(rule, why) => {
                    self.log(|| {
                        format!("   sync: record {}/{:?} {}", rule.confirm, rule.members, why.label())
                    });
                    self.record_sync(&rule);
                }
                SyncAction::Set(rule) => self.sync_task(rule, false),
                SyncAction::Prove(rule) => self.sync_task(rule, true),
            }
        }
    }

    fn record_sync(&mut self, rule: &Quorum) {
        self.happened.proven += usize::from(!rule.is_none());
        self.happened.degraded += usize::from(rule.is_none());
        let mut state: SyncState = rule.to_record();
        if self.without == Without::QuorumCount && !state.degraded {
            state.num = state.members.len() as u32;
        }
        if self.without == Without::Degraded && state.degraded {
            return;
        }
        self.tell(Event::Sync(state));
    }

    /// For the primary of its time, whoever is primary when it is carried out.
    fn sync_task(&mut self, rule: Quorum, prove: bool) {
        let proxy = self.proxy.as_mut().unwrap();
        let (Some((epoch, _)), Some(primary)) = (&proxy.sync, proxy.machine.record().primary) else { return };
        let (epoch, primary) = (*epoch, primary.index());
        proxy.inbox.push_back(In::SyncTask { rule, prove, epoch, primary });
        let run = self.runs;
        self.after(0, What::Pump { run });
    }

    pub fn sync_done(&mut self, event: SyncEvent, rule: Quorum, epoch: Epoch) {
        if self.proxy.as_ref().and_then(|proxy| proxy.sync.as_ref()).is_none_or(|(of, _)| *of != epoch) {
            return;
        }
        let in_effect = matches!(event, SyncEvent::InEffect(_));
        self.sync_step(event);
        if let Some(held) = self.proxy.as_mut().and_then(|proxy| proxy.held.take()) {
            self.record_sync(&held);
        }
        if self.without == Without::Barrier && in_effect {
            self.record_sync(&rule);
        }
    }

    // The machine.

    pub fn pump(&mut self, run: u64) {
        loop {
            let now = self.now;
            let Some(proxy) = self.proxy.as_mut().filter(|proxy| proxy.run == run) else {
                return;
            };
            match proxy.writing.take_if(|(_, done)| now >= *done) {
                Some((record, _)) => self.disk = record,
                None if proxy.writing.is_some() => return,
                None => {}
            }
            let proxy = self.proxy.as_mut().unwrap();
            if let Some(action) = proxy.outbox.pop_front() {
                self.act(action);
                continue;
            }
            match proxy.inbox.pop_front() {
                Some(In::Event(event)) => self.machine_step(event),
                Some(In::SyncTask { rule, prove, epoch, primary }) => {
                    self.start_job(primary, Task::Sync { rule, prove, epoch });
                }
                None => return,
            }
        }
    }

    fn machine_step(&mut self, event: Event) {
        let now = self.clock();
        if self.trace.is_some() && !matches!(event, Event::Tick) {
            let text = told(&event);
            self.log(|| text);
        }
        let proxy = self.proxy.as_mut().unwrap();
        let actions = proxy.machine.step(event, now);
        proxy.outbox.extend(actions);
    }

    fn act(&mut self, action: Action) {
        let run = self.runs;
        if self.trace.is_some() {
            let text = done(&action);
            self.log(|| text);
        }
        match action {
            Action::Record(record) => self.write_record(*record),
            Action::Gate(gate) => {
                self.proxy.as_mut().unwrap().gate = gate;
                if gate == Gate::Draining {
                    let wait = self.chance.between(1, 300);
                    self.after(wait, What::Drained { run });
                }
            }
            Action::CloseSockets { epoch } => {
                let wait = self.chance.between(1, 30);
                self.after(wait, What::SocketsClosed { run, epoch: epoch.0 });
            }
            Action::Order { id, node, order } => {
                if let Order::Promote { epoch, .. } = &order {
                    self.promote_is_ordered(node.index(), *epoch);
                }
                self.start_job(node.index(), Task::Order(id, order));
            }
            Action::Probe(node) => self.probe(node.index()),
            Action::Publish(target) => {
                let (node, epoch) = (target.primary.index(), target.epoch.0);
                self.published(node, epoch);
                let proxy = self.proxy.as_mut().unwrap();
                proxy.target = Some((node, epoch));
                proxy.start = None;
                if self.without == Without::NewEpochDegraded {
                    let out = |of: NodeId| proxy.machine.quarantine(of).is_some() || of == target.primary;
                    let all = (0..self.nodes.len() as u16).map(NodeId);
                    let rule = Quorum::any(self.plan.num, all.filter(|of| !out(*of)));
                    self.tell(Event::Sync(rule.to_record()));
                }
                if target.planned {
                    self.happened.switchovers += 1;
                }
            }
            Action::Enter(_) | Action::Reply { .. } | Action::Alarm(_) => {}
        }
    }

    fn write_record(&mut self, record: Record) {
        let run = self.runs;
        // What an earlier epoch left behind is not to go back to its old primary.
        if record.severed.iter().any(|node| record.repoint.contains(node)) {
            let (severed, repoint) = (&record.severed, &record.repoint);
            self.violate(format!("led_back: {severed:?} are to follow again, {repoint:?} somebody else"));
        }
        if self.record_fails {
            // Now and then it is on disk all the same: only its name could not be flushed.
            if self.now.is_multiple_of(2) {
                self.disk = record;
            }
            let proxy = self.proxy.as_mut().unwrap();
            proxy.outbox.clear();
            // What `sync` believes to be recorded is not; what waits behind it must not be done.
            proxy.inbox.retain(|waits| matches!(waits, In::Event(_)));
            proxy.sync = None;
            proxy.inbox.push_front(In::Event(Event::RecordFailed("no space left on device".to_owned())));
            return;
        }
        if self.without == Without::RecordFirst {
            // It gets to the disk some time, if nothing happens until then.
            if self.chance.one_in(4) {
                self.disk = record;
            }
            return;
        }
        let wait = self.chance.between(1, 8);
        let proxy = self.proxy.as_mut().unwrap();
        proxy.writing = Some((record, self.now + wait));
        self.after(wait, What::Pump { run });
    }

    fn start_job(&mut self, node: usize, task: Task) {
        let proxy = self.proxy.as_mut().unwrap();
        proxy.numbers += 1;
        let job = Job::new(proxy.numbers, node, task);
        proxy.line[node].push_back(job);
        self.next_job(node);
    }
}

pub fn sync_settings(plan: &Plan) -> SyncSettings {
    SyncSettings {
        manage: true,
        num: plan.num,
        degrade_after: Duration::from_millis(1500),
        strict: plan.strict,
    }
}

fn told(event: &Event) -> String {
    match event {
        Event::Observed { node, fact: Fact::Answered(Seen { role, .. }) } => {
            format!("n{} answers: {role:?}", node.0)
        }
        Event::Observed { node, fact } => format!("n{}: {fact:?}", node.0),
        event => format!("{event:?}"),
    }
}

fn done(action: &Action) -> String {
    match action {
        Action::Record(record) => format!(
            "   > record epoch {} primary {:?} intent {:?} severed {:?} fenced {:?} out {:?} sync {:?}",
            record.epoch.0,
            record.primary,
            record.intent,
            record.severed,
            record.fenced,
            record.quarantined,
            record.sync
        ),
        action => format!("   > {action:?}"),
    }
}
