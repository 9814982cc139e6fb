//! The machine's shell: carries out what it decides, in its order, and tells it how that went.
//!
//! Promises: a record is on disk before anything behind it begins; each order, socket closing and drain is answered;
//! a command is answered once. Deliberately does not decide anything, and does not publish the topology: that is
//! `control`'s, which takes [`Outcome`]s.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};

use crate::config::live::LiveConfig;
use crate::config::{Config, DurabilityMode, FailoverMode};
use crate::failover::coordination::{Coordination, Seen};
use crate::failover::decide::{Durability, Machine, Mode, NodeRule, Settings};
use crate::failover::event::{
    Action, Alarm, BlockReason, Command, CommandId, Event, Gate as Wanted, Loss, Now, Order, OrderId, State,
    Target,
};
use crate::failover::keeper::{self, Keeper};
use crate::failover::orders::{Hands, Limits};
use crate::failover::preconditions::{self, Needs};
use crate::failover::record::{Entry, Record, SyncState};
use crate::failover::slot_keeper::{self, Rounds};
use crate::failover::store::{Store, identity, order_identity};
use crate::failover::sync::{Look, Quorum, SyncAction, SyncEvent};
use crate::failover::text;
use crate::gate::{Gate, Posture};
use crate::node::Nodes;
use crate::topology::{Epoch, NodeId, Quarantine};

pub mod several;

use self::several::{Coordinated, Several};

/// Results that wait to be taken: at most one order per node, the sockets and the drain.
const QUEUE: usize = 256;
/// Commands that wait to be taken.
const COMMANDS: usize = 16;
/// Nodes that were not prepared, or did not answer, are examined again after this.
const EXAMINE_AGAIN: Duration = Duration::from_secs(30);
/// The least time between two log lines about the same order on the same node.
const QUIET: Duration = Duration::from_secs(5);

/// What a command is answered.
pub type Answer = Result<String, String>;

/// For operators' tools: sends commands to the machine and shows where it stands. Cheap to clone.
#[derive(Clone)]
pub struct Commands {
    queue: mpsc::Sender<(Command, oneshot::Sender<Answer>)>,
    status: Arc<ArcSwap<Status>>,
}

impl Commands {
    /// Gives a command; its answer, which for a failover comes when it is over.
    pub async fn give(&self, command: Command) -> Answer {
        let (sender, receiver) = oneshot::channel();
        let gone = || "the control loop has ended".to_owned();
        self.queue.send((command, sender)).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())?
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<NodeId> {
        let index = self.status().names.iter().position(|known| known == name)?;
        u16::try_from(index).ok().map(NodeId)
    }

    /// Where failover stands.
    pub fn status(&self) -> Arc<Status> {
        self.status.load_full()
    }
}

/// Where failover stands, for people.
#[derive(Clone, Debug)]
pub struct Status {
    /// `off`, `follow`, `manual` or `auto`.
    pub mode: &'static str,
    /// `async` or `quorum`.
    pub durability: &'static str,
    /// What these promise.
    pub promises: String,
    /// One word (`State::LABELS`).
    pub state: &'static str,
    /// Since when.
    pub since: SystemTime,
    /// The node that the state is about.
    pub node: Option<String>,
    /// Why it is blocked: one word, and a sentence.
    pub blocked: Option<(&'static str, String)>,
    /// PAUSE FAILOVER.
    pub paused: bool,
    /// There was a failover less than `min_failover_interval` ago.
    pub cooling: bool,
    /// The epoch.
    pub epoch: Epoch,
    /// The nodes that are kept out.
    pub quarantined: Vec<(String, Quarantine)>,
    /// Synchronous replication as it is recorded.
    pub sync: SyncState,
    /// Whether acknowledged writes would survive the primary now, as far as that is recorded.
    pub covered: bool,
    /// Failovers so far, oldest first.
    pub history: Vec<Entry>,
    /// What the last one is known to have lost.
    pub loss: Option<Loss>,
    /// With `slots.manage`: the most WAL that one of the slots held when they were looked at last.
    pub slots_held: u64,
    /// The configured names, for the ids in the history.
    pub names: Arc<[String]>,
    /// How it stands with the other proxies; `None`: this one is alone.
    pub coordination: Option<Coordinated>,
}

/// What the control loop has to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// A new write target.
    Publish(Target),
    /// Of several proxies: what is recorded, and whether its write target is known to have all that was acknowledged.
    Known {
        /// The record.
        record: Box<Record>,
        /// See there.
        kept: bool,
    },
    /// Probe this node at once.
    Probe(NodeId),
    /// The state before was left after this long.
    Left(&'static str, Duration),
    /// It is blocked, by this.
    Blocked(&'static str),
    /// A failover has begun, so long after the first sign.
    Begun(Duration),
    /// One that had begun is over, a switchover if it was planned; it was done in that time, or given up.
    Ended {
        /// Whether it was a switchover.
        planned: bool,
        /// How long nothing could be written, if it was done.
        took: Option<Duration>,
    },
}

/// The machine with its hands. One per proxy.
pub struct Shell {
    machine: Machine,
    names: Arc<[String]>,
    mode: FailoverMode,
    store: Option<Store>,
    hands: Option<Arc<Hands>>,
    /// `None`: this proxy is alone.
    several: Option<Several>,
    gate: Arc<Gate>,
    events: Reports,
    live: Arc<LiveConfig>,
    config: Arc<Config>,
    nodes: Arc<Nodes>,
    keeper: Option<Keeper>,
    slots: Rounds,
    prepared: bool,
    examine_at: Option<Instant>,
    tasks: JoinSet<()>,
    drain: Option<AbortHandle>,
    replies: HashMap<CommandId, oneshot::Sender<Answer>>,
    answered: Vec<(oneshot::Sender<Answer>, Answer)>,
    next_command: u64,
    label: &'static str,
    entered: Instant,
    since: SystemTime,
    quiet: HashMap<(NodeId, &'static str), Instant>,
    loss: Option<Loss>,
    status: Arc<ArcSwap<Status>>,
}

/// The nodes were examined.
#[derive(Debug)]
pub struct Examined {
    /// What `auto` would stumble over.
    refusals: Vec<String>,
    /// None of them was silent.
    all_answered: bool,
}

/// What comes back to the shell.
#[derive(Debug)]
pub enum Heard {
    /// For the machine.
    Machine(Event),
    /// A look at synchronous replication, in this epoch; `None`: the primary did not answer.
    Looked(Epoch, Option<Look>),
    /// A statement of it has ended.
    Sync(Epoch, SyncEvent),
    /// The nodes were examined.
    Examined(Examined),
    /// A round over the replication slots has ended: the most WAL that one of them holds.
    Slots(u64),
}

/// Where results go: said in a later term than the one it was asked in, nothing is heard.
#[derive(Clone)]
struct Reports {
    term: u64,
    queue: mpsc::Sender<(u64, Heard)>,
}

impl Reports {
    async fn send(&self, heard: Heard) -> Result<(), mpsc::error::SendError<(u64, Heard)>> {
        self.queue.send((self.term, heard)).await
    }
}

/// What the control loop listens to.
pub struct Ears {
    /// Results, for [`Shell::hear`].
    pub events: mpsc::Receiver<(u64, Heard)>,
    /// Of the other proxies, for [`Shell::take_seen`].
    pub seen: Option<watch::Receiver<Arc<Seen>>>,
    /// Commands, for [`Shell::command`].
    pub commands: mpsc::Receiver<(Command, oneshot::Sender<Answer>)>,
}

/// `failover.state_dir` cannot be used.
#[derive(Debug)]
pub struct StateError(String);

impl std::fmt::Display for StateError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StateError {}

impl Shell {
    /// Opens the store and makes the machine from what it holds. `Err`: the directory cannot be used, or was not written
    /// for these nodes.
    pub fn open(
        live: &Arc<LiveConfig>,
        nodes: &Arc<Nodes>,
        gate: &Arc<Gate>,
    ) -> Result<(Shell, Ears, Commands), StateError> {
        let config = &live.load_full();
        let names: Arc<[String]> = config.nodes.iter().map(|node| node.name.clone()).collect();
        let acts = matches!(config.failover.mode, FailoverMode::Manual | FailoverMode::Auto);
        let (several, seen) = match &config.failover.coordination {
            None => (None, None),
            Some(config) => {
                let (coordination, seen) = Coordination::start(config, gate, acts).map_err(StateError)?;
                (Some(Several::new(coordination)), Some(seen))
            }
        };
        let directory = config.failover.state_dir.as_ref().filter(|_| acts && several.is_none());
        let (store, record) = match directory {
            None => (None, Record::default()),
            Some(directory) => {
                let (store, text) = Store::open(directory).map_err(|error| StateError(error.to_string()))?;
                let record = match text {
                    None => Record::default(),
                    Some(text) => text::read(&text, &names)
                        .map_err(|error| StateError(format!("{}: {error}", directory.display())))?,
                };
                (Some(store), record)
            }
        };
        let hands = store.as_ref().zip(directory).map(|(store, directory)| {
            let limits = Limits { sever: config.failover.sever_timeout, ..Limits::default() };
            Arc::new(Hands::new(live, nodes, &store.upstreams(), &identity(directory), limits, None))
        });
        let machine = Machine::new(settings(config, hands.is_some() || several.is_some()), record, now());
        tracing::info!(mode = mode_label(config.failover.mode), "{}", machine.promises());
        let (queue_results, results) = mpsc::channel(QUEUE);
        let events = Reports { term: 0, queue: queue_results };
        let (queue, commands) = mpsc::channel(COMMANDS);
        let status = Arc::new(ArcSwap::from_pointee(status(
            &machine,
            config.failover.mode,
            &names,
            SystemTime::now(),
            None,
        )));
        // Before there are any sessions.
        let wanted = machine.wanted_gate();
        let mut shell = Shell {
            machine,
            names: Arc::clone(&names),
            mode: config.failover.mode,
            store,
            hands,
            several,
            gate: Arc::clone(gate),
            events,
            live: Arc::clone(live),
            config: Arc::clone(config),
            nodes: Arc::clone(nodes),
            keeper: None,
            slots: Rounds::default(),
            prepared: false,
            examine_at: None,
            tasks: JoinSet::new(),
            drain: None,
            replies: HashMap::new(),
            answered: Vec::new(),
            next_command: 0,
            label: State::Starting.label(),
            entered: Instant::now(),
            since: SystemTime::now(),
            quiet: HashMap::new(),
            loss: None,
            status: Arc::clone(&status),
        };
        if wanted != Wanted::Open {
            shell.set_gate(wanted);
        }
        if shell.several.is_some() {
            shell.label = State::Following.label();
            shell.publish_status();
        }
        Ok((shell, Ears { events: results, seen, commands }, Commands { queue, status }))
    }

    /// Why the machine cannot go by another configuration now.
    pub fn is_busy(&self) -> Option<String> {
        let state = self.machine.state();
        let keeps = self.keeper.as_ref().is_some_and(|keeper| keeper.sync.is_busy());
        let idle = matches!(state, State::Healthy | State::Starting) && self.machine.is_idle() && !keeps;
        (self.acts() && !idle).then(|| {
            format!(
                "failover is at work ({}): nodes and failover's settings stay until that is over",
                state.label()
            )
        })
    }

    /// The machine goes by `config` from now on: as after a start of the process, with the record that it has. Only
    /// while it is not [busy](Self::is_busy).
    pub fn follow(&mut self, config: &Arc<Config>) {
        self.config = Arc::clone(config);
        // It begins anew with what is recorded.
        self.keeper = None;
        if let Some(several) = &mut self.several {
            several.read_again();
        }
        self.names = config.nodes.iter().map(|node| node.name.clone()).collect();
        self.gate.bound(config.failover.max_paused);
        if let Some(hands) = &self.hands {
            hands.release_idle();
        }
        if self.acts() {
            let gone = |node: NodeId| config.nodes.get(node.index()).is_none_or(|node| node.removed);
            let record = self.machine.record().without(gone);
            let removed = (0u16..).map(NodeId).take(config.nodes.len()).filter(|node| gone(*node)).collect();
            self.machine =
                Machine::new(settings(config, self.hands.is_some()), record, now()).without(removed);
        }
        self.publish_status();
    }

    fn publish_status(&self) {
        let mut status = status(&self.machine, self.mode, &self.names, self.since, self.loss);
        status.slots_held = self.slots.most_held;
        if let Some(several) = &self.several {
            status.coordination = Some(several.status());
            if !self.leads() {
                (status.state, status.node, status.blocked) = (State::Following.label(), None, None);
            }
        }
        self.status.store(Arc::new(status));
    }

    /// Whether the machine takes part at all; else the modes `off` and `follow` go by what others do, and of several
    /// proxies those that do not lead by what the leader records.
    pub fn acts(&self) -> bool {
        matches!(self.mode, FailoverMode::Manual | FailoverMode::Auto) && self.leads()
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Whether nothing is under way or wrong: time alone changes little then.
    pub fn is_calm(&self) -> bool {
        !self.acts() || matches!(self.machine.state(), State::Healthy | State::Starting)
    }

    /// Tells the machine, and does what it says.
    pub fn step(&mut self, event: Event) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        if self.acts() {
            let before = self.under_way();
            let actions = self.machine.step(event, now());
            self.carry_out(actions, &mut outcomes);
            self.tell_of_ends(before, &mut outcomes);
        }
        while self.tasks.try_join_next().is_some() {}
        self.look();
        self.keep_slots();
        self.examine();
        outcomes
    }

    /// Whether the primary is being replaced, and if so, whether as planned.
    fn under_way(&self) -> Option<bool> {
        self.machine.record().intent.as_ref().map(|intent| intent.planned)
    }

    /// What has begun and what is over, by what was under way before.
    fn tell_of_ends(&self, before: Option<bool>, outcomes: &mut Vec<Outcome>) {
        let published = outcomes.iter().any(|outcome| matches!(outcome, Outcome::Publish(_)));
        match (before, self.under_way()) {
            (None, Some(false)) => {
                outcomes.extend(self.machine.suspected_for(Instant::now()).map(Outcome::Begun));
            }
            (Some(planned), None) if !published => outcomes.push(Outcome::Ended { planned, took: None }),
            (Some(planned), _) if published => {
                let took = self.machine.record().history.last().map(|entry| entry.took_ms);
                outcomes.push(Outcome::Ended { planned, took: took.map(Duration::from_millis) });
            }
            _ => {}
        }
    }

    /// Takes what has come back.
    pub fn hear(&mut self, (term, heard): (u64, Heard)) -> Vec<Outcome> {
        if term != self.events.term {
            return Vec::new();
        }
        let (epoch, event) = match heard {
            Heard::Machine(event) => return self.step(event),
            Heard::Looked(epoch, look) => {
                let Some(keeper) = self.keeper.as_mut().filter(|keeper| keeper.epoch == epoch) else {
                    return Vec::new();
                };
                keeper.looking = false;
                match look {
                    Some(look) if *self.machine.state() == State::Healthy => (epoch, SyncEvent::Look(look)),
                    _ => return Vec::new(),
                }
            }
            Heard::Sync(epoch, event) => (epoch, event),
            Heard::Slots(most_held) => {
                self.slots.ended(most_held);
                self.publish_status();
                return Vec::new();
            }
            Heard::Examined(Examined { refusals, all_answered }) => {
                self.prepared = refusals.is_empty() && all_answered;
                let what = (!refusals.is_empty()).then(|| refusals.join("; "));
                return self.step(Event::Prepared(what));
            }
        };
        let Some(keeper) = self.keeper.as_mut().filter(|keeper| keeper.epoch == epoch) else {
            return Vec::new();
        };
        let actions = keeper.sync.step(event, Instant::now());
        self.keep(actions)
    }

    /// What is to be done about synchronous replication, in its order: nothing behind a record that is not on disk.
    fn keep(&mut self, actions: Vec<SyncAction>) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for action in actions {
            let Some(keeper) = &self.keeper else { break };
            let (primary, epoch) = (keeper.primary, keeper.epoch);
            if let SyncAction::Record(rule, why) = &action {
                let rule = rule.to_record();
                let members: Vec<&str> = rule.members.iter().map(|node| self.name(*node)).collect();
                tracing::warn!(
                    num = rule.num,
                    ?members,
                    reason = why.label(),
                    "synchronous replication recorded"
                );
                outcomes.extend(self.step(Event::Sync(rule.clone())));
                if self.machine.record().sync != rule {
                    // It could not be written: begin anew with what is.
                    self.keeper = None;
                }
                continue;
            }
            let Some(hands) = self.hands.clone() else { break };
            let (events, names) = (self.events.clone(), Arc::clone(&self.names));
            self.tasks.spawn(async move {
                let event = keeper::carry_out(&hands, primary, &action, &names).await;
                let _ = events.send(Heard::Sync(epoch, event)).await;
            });
        }
        outcomes
    }

    /// `mode: auto`: whether the nodes grant what a failover needs; once they are well, and again while they do not.
    fn examine(&mut self) {
        let auto = self.mode == FailoverMode::Auto && self.hands.is_some();
        let due = self.examine_at.is_none_or(|at| !self.prepared && Instant::now() >= at);
        if !auto || !due || *self.machine.state() != State::Healthy {
            return;
        }
        self.examine_at = Some(Instant::now() + EXAMINE_AGAIN);
        let (config, nodes, events) =
            (Arc::clone(&self.config), Arc::clone(&self.nodes), self.events.clone());
        self.tasks.spawn(async move {
            let found = examine(&config, &nodes).await;
            let _ = events.send(Heard::Examined(found)).await;
        });
    }

    /// `slots.manage`: looks after the slots from time to time while all is well.
    fn keep_slots(&mut self) {
        let manages = self.config.failover.slots.manage && self.hands.is_some();
        let interval = self.config.failover.check_interval;
        let well = *self.machine.state() == State::Healthy;
        if !manages || !well || !self.slots.begin(interval, Instant::now()) {
            return;
        }
        let (record, standbys) = (self.machine.record(), self.machine.standbys());
        let (primary, timeline) = (record.primary, record.timeline);
        let (config, nodes, events) =
            (Arc::clone(&self.config), Arc::clone(&self.nodes), self.events.clone());
        self.tasks.spawn(async move {
            let most_held = match primary {
                Some(primary) => slot_keeper::round(config, nodes, primary, timeline, standbys).await,
                None => 0,
            };
            let _ = events.send(Heard::Slots(most_held)).await;
        });
    }

    /// `durability: quorum`: looks at the nodes from time to time while all is well.
    fn look(&mut self) {
        let quorum = self.config.failover.durability == DurabilityMode::Quorum;
        if !quorum || self.hands.is_none() || *self.machine.state() != State::Healthy {
            return;
        }
        let record = self.machine.record();
        let Some(primary) = record.primary else { return };
        let (epoch, interval) = (record.epoch, self.config.failover.check_interval);
        let same = |keeper: &&mut Keeper| keeper.primary == primary && keeper.epoch == epoch;
        if self.keeper.as_mut().filter(same).is_none() {
            let recorded = Quorum::from_record(&record.sync);
            self.keeper = Some(Keeper::new(&self.config, primary, epoch, recorded));
        }
        let Some(keeper) = self.keeper.as_mut() else { return };
        if keeper.looking || Instant::now() < keeper.look_at {
            return;
        }
        keeper.looking = true;
        keeper.look_at = Instant::now() + interval;
        let (nodes, events) = (Arc::clone(&self.nodes), self.events.clone());
        let others = keeper::others(&self.config, primary);
        let deadline = self.config.failover.check_timeout;
        self.tasks.spawn(async move {
            let look = keeper::look(nodes, primary, others, deadline).await;
            let _ = events.send(Heard::Looked(epoch, look)).await;
        });
    }

    /// Gives the machine a command; it is answered through `reply`.
    pub fn command(&mut self, command: Command, reply: oneshot::Sender<Answer>) -> Vec<Outcome> {
        if !self.leads() {
            let _ = reply.send(self.not_leading());
            return Vec::new();
        }
        if !self.acts() {
            let _ = reply.send(Err(format!(
                "failover.mode is {}: somebody else replaces primaries",
                mode_label(self.mode)
            )));
            return Vec::new();
        }
        tracing::info!(?command, "command");
        self.next_command += 1;
        let id = CommandId(self.next_command);
        self.replies.insert(id, reply);
        self.step(Event::Command { id, command })
    }

    fn carry_out(&mut self, actions: Vec<Action>, outcomes: &mut Vec<Outcome>) {
        // Whether commits are covered changes by what probes alone have shown, too.
        if actions.is_empty() && self.machine.covered() == self.status.load().covered {
            return;
        }
        let mut failed: Option<String> = None;
        for action in actions {
            match (&failed, action) {
                (Some(cause), Action::Reply { id, .. }) => {
                    self.answer(id, Err(format!("the record could not be written: {cause}")));
                }
                (Some(_), _) => {}
                (None, Action::Record(record)) => failed = self.write(&record).err(),
                (None, action) => self.act(action, outcomes),
            }
        }
        if let Some(cause) = failed {
            let actions = self.machine.step(Event::RecordFailed(cause), now());
            for action in actions {
                self.act(action, outcomes);
            }
        }
        self.publish_status();
    }

    fn write(&mut self, record: &Record) -> Result<(), String> {
        match (&self.store, &mut self.several) {
            // A few milliseconds on the thread of the control loop: what is behind it must wait anyway.
            (Some(store), _) => {
                store.write(&text::write(record, &self.names)).map_err(|error| error.to_string())
            }
            // The same, as long as etcd answers; else the leadership is over.
            (None, Some(several)) => several.write(record, &text::write(record, &self.names)),
            (None, None) => Ok(()),
        }
    }

    fn act(&mut self, action: Action, outcomes: &mut Vec<Outcome>) {
        match action {
            // Written by `carry_out`; after a failure there is none.
            Action::Record(_) => {}
            Action::Gate(wanted) => self.set_gate(wanted),
            Action::CloseSockets { epoch } => self.close_sockets(epoch),
            Action::Order { id, node, order } => self.order(id, node, order),
            Action::Probe(node) => outcomes.push(Outcome::Probe(node)),
            Action::Publish(target) => {
                self.loss = Some(target.loss);
                outcomes.push(Outcome::Publish(target));
            }
            Action::Enter(state) => {
                let time = self.entered.elapsed();
                outcomes.push(Outcome::Left(self.label, time));
                self.change_label(state.label());
                self.log_state(&state, time);
                self.warm(&state);
                if let State::Blocked(why) = &state {
                    outcomes.push(Outcome::Blocked(why.label()));
                }
            }
            Action::Reply { id, answer } => self.answer(id, answer),
            Action::Alarm(alarm) => self.log_alarm(&alarm),
        }
    }

    fn change_label(&mut self, label: &'static str) {
        self.label = label;
        self.entered = Instant::now();
        self.since = SystemTime::now();
    }

    /// Orders are likely: their sessions are opened while something else is waited for.
    fn warm(&mut self, state: &State) {
        let Some(hands) = &self.hands else { return };
        let planned = match state {
            State::Suspect | State::Confirming if self.mode == FailoverMode::Auto => false,
            State::Draining(_) => true,
            _ => return,
        };
        let lost = self.machine.record().primary.filter(|_| !planned);
        for (index, node) in self.config.nodes.iter().enumerate() {
            let id = NodeId(index as u16);
            if node.removed || lost == Some(id) || self.machine.quarantine(id).is_some() {
                continue;
            }
            let hands = Arc::clone(hands);
            self.tasks.spawn(async move { hands.warm(id).await });
        }
    }

    fn answer(&mut self, id: CommandId, answer: Answer) {
        match &answer {
            Ok(text) => tracing::info!(answer = text, "command done"),
            Err(text) => tracing::warn!(answer = text, "command refused"),
        }
        if let Some(reply) = self.replies.remove(&id) {
            self.answered.push((reply, answer));
        }
    }

    /// Sends the answers to commands. Only once what they tell of can be seen, by whoever looks next.
    pub fn send_answers(&mut self) {
        for (reply, answer) in self.answered.drain(..) {
            // Who asked may have gone.
            let _ = reply.send(answer);
        }
    }

    fn set_gate(&mut self, wanted: Wanted) {
        if let Some(drain) = self.drain.take() {
            drain.abort();
        }
        self.gate.set(match wanted {
            Wanted::Open => Posture::Open,
            Wanted::Paused => Posture::Paused,
            Wanted::Draining => Posture::Draining,
            Wanted::Closed => Posture::Closed,
        });
        if wanted == Wanted::Draining {
            let (gate, events) = (Arc::clone(&self.gate), self.events.clone());
            let others = self.several.as_mut().map(Several::drained);
            self.drain = Some(self.tasks.spawn(async move {
                gate.drained().await;
                if let Some(others) = others
                    && others.await.is_err()
                {
                    // The term is over.
                    return;
                }
                let _ = events.send(Heard::Machine(Event::Drained)).await;
            }));
        }
    }

    fn close_sockets(&mut self, epoch: Epoch) {
        let (gate, events) = (Arc::clone(&self.gate), self.events.clone());
        // Until it publishes another one, the primary of the record is that of the epoch that ends.
        let node = self.machine.record().primary;
        if let Some(node) = node {
            gate.close_sockets(node);
        }
        let others = self.several.as_mut().map(Several::closed);
        self.tasks.spawn(async move {
            let own = async {
                if let Some(node) = node {
                    gate.sockets_closed(node).await;
                }
            };
            let others = async {
                match others {
                    Some(others) => others.await,
                    None => Ok(()),
                }
            };
            if let ((), Err(())) = tokio::join!(own, others) {
                // The term is over.
                return;
            }
            let _ = events.send(Heard::Machine(Event::SocketsClosed { epoch })).await;
        });
    }

    fn order(&mut self, id: OrderId, node: NodeId, order: Order) {
        let Some(hands) = self.hands.clone() else { return };
        let events = self.events.clone();
        tracing::info!(node = self.name(node), order = order.label(), "order");
        self.tasks.spawn(async move {
            let result = hands.carry_out(node, &order).await;
            tracing::debug!(?order, ?result, "order done");
            let _ = events.send(Heard::Machine(Event::OrderDone { id, result })).await;
        });
    }

    fn name(&self, node: NodeId) -> &str {
        self.names.get(node.index()).map_or("?", String::as_str)
    }

    fn log_state(&self, state: &State, before: Duration) {
        let epoch = self.machine.record().epoch.0;
        let node = about(state).map(|node| self.name(node)).unwrap_or_default();
        let after_ms = u64::try_from(before.as_millis()).unwrap_or(u64::MAX);
        let state_label = state.label();
        match state {
            State::Healthy => tracing::info!(state = state_label, epoch, after_ms, "failover"),
            State::Blocked(why) => {
                tracing::error!(
                    state = state_label,
                    epoch,
                    after_ms,
                    reason = why.label(),
                    node,
                    "failover: {}",
                    self.machine.explain(why)
                );
            }
            _ => tracing::warn!(state = state_label, epoch, after_ms, node, "failover"),
        }
    }

    fn log_alarm(&mut self, alarm: &Alarm) {
        match alarm {
            Alarm::OnlyWeAreCutOff => {
                tracing::error!(
                    "the primary cannot be reached from here, but standbys stream from it: no failover"
                );
            }
            Alarm::PrimaryRefusesUs(cause) => {
                tracing::error!(cause, "the primary lives and does not serve us: no failover");
            }
            Alarm::Isolated => {
                tracing::error!(
                    "neither the primary nor a standby that knows of it can be reached: no failover"
                );
            }
            Alarm::OldPrimaryBack(node) => {
                let node = self.name(*node);
                tracing::error!(node, "an old primary takes writes: it is fenced, and not used");
            }
            Alarm::LossKnown(loss) => {
                self.loss = Some(Loss { exact_bytes: loss.exact_bytes, ..self.loss.unwrap_or_default() });
                tracing::error!(exact_bytes = loss.exact_bytes, "the end of the old primary's log is known");
            }
            Alarm::Quarantined(node, why) => {
                tracing::error!(node = self.name(*node), reason = why.label(), "node in quarantine");
            }
            Alarm::OrderFailed { node, order, why } => {
                let last = self.quiet.get(&(*node, *order));
                if last.is_none_or(|at| at.elapsed() >= QUIET) {
                    self.quiet.insert((*node, *order), Instant::now());
                    tracing::warn!(node = self.name(*node), order, why, "an order failed");
                }
            }
        }
    }
}

/// What `auto` must not begin with.
async fn examine(config: &Config, nodes: &Nodes) -> Examined {
    let quorum = config.failover.durability == DurabilityMode::Quorum;
    let slots = config.slots_kept();
    let needs = Needs { quorum, manage_sync: quorum && config.failover.sync.manage, slots };
    let identity = order_identity(config);
    let mut examined = Examined { refusals: Vec::new(), all_answered: true };
    for (id, node) in (0u16..).map(NodeId).zip(&config.nodes) {
        let deadline = config.pool.connect_timeout;
        let found = preconditions::examine(config, nodes, id, needs, identity.as_deref(), deadline).await;
        // One that does not answer says nothing for or against, and is asked again.
        examined.all_answered &= found.is_ok();
        for finding in found.unwrap_or_default().into_iter().filter(|finding| finding.refuses) {
            tracing::error!(
                node = node.name,
                "failover by itself waits until this is mended: {}",
                finding.what
            );
            examined.refusals.push(format!("{}: {}", node.name, finding.what));
        }
    }
    examined
}

/// The node that a state is about.
fn about(state: &State) -> Option<NodeId> {
    match state {
        State::Electing(node)
        | State::Promoting(node)
        | State::Repointing(node)
        | State::Draining(node)
        | State::AtBarrier(node)
        | State::Blocked(
            BlockReason::SeverTimeout { node }
            | BlockReason::LeftBehind { node }
            | BlockReason::OtherZone { node }
            | BlockReason::CandidateRefused { node, .. }
            | BlockReason::CandidateUnreachable { node },
        ) => Some(*node),
        _ => None,
    }
}

fn status(
    machine: &Machine,
    mode: FailoverMode,
    names: &Arc<[String]>,
    since: SystemTime,
    loss: Option<Loss>,
) -> Status {
    let record = machine.record();
    let name = |node: NodeId| names.get(node.index()).cloned().unwrap_or_default();
    Status {
        mode: mode_label(mode),
        durability: machine.durability_label(),
        promises: machine.promises(),
        state: machine.state().label(),
        since,
        node: about(machine.state()).map(name),
        blocked: match machine.state() {
            State::Blocked(why) => Some((why.label(), machine.explain(why))),
            _ => None,
        },
        paused: record.paused,
        cooling: record.cooling,
        epoch: record.epoch,
        quarantined: record.quarantined.iter().map(|(node, why)| (name(*node), *why)).collect(),
        sync: record.sync.clone(),
        covered: machine.covered(),
        history: record.history.clone(),
        loss,
        slots_held: 0,
        names: Arc::clone(names),
        coordination: None,
    }
}

fn mode_label(mode: FailoverMode) -> &'static str {
    match mode {
        FailoverMode::Off => "off",
        FailoverMode::Follow => "follow",
        FailoverMode::Manual => "manual",
        FailoverMode::Auto => "auto",
    }
}

fn now() -> Now {
    // A clock before 1970 is only written down wrongly.
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now { at: Instant::now(), unix_ms: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX) }
}

fn settings(config: &Config, hands: bool) -> Settings {
    let failover = &config.failover;
    let rule = |node: &crate::config::NodeConfig| {
        let priority = failover.priority_of(&node.name);
        NodeRule { name: node.name.clone(), priority, zone: node.zone.clone() }
    };
    Settings {
        mode: match failover.mode {
            FailoverMode::Auto => Mode::Auto,
            _ => Mode::Manual,
        },
        durability: match failover.durability {
            DurabilityMode::Async => Durability::Async,
            DurabilityMode::Quorum => Durability::Quorum,
        },
        nodes: config.nodes.iter().map(rule).collect(),
        same_zone_only: failover.same_zone_only,
        failure_threshold: failover.failure_threshold,
        kick_timeout: failover.kick_timeout,
        restart_grace: failover.restart_grace,
        crash_loop_restarts: failover.crash_loop_restarts,
        crash_loop_window: failover.crash_loop_window,
        startup_grace: failover.startup_grace,
        sever_timeout: failover.sever_timeout,
        promote_timeout: failover.promote_timeout,
        max_lost_bytes: failover.max_lost_bytes,
        min_failover_interval: failover.min_failover_interval,
        pause_timeout: failover.pause_timeout,
        allow_minority: failover.allow_minority,
        fence_sql: failover.fence_sql,
        sync_num: failover.sync.num,
        sync_strict: failover.sync.strict,
        hands,
        close_wait: failover.coordination.as_ref().map_or(Duration::ZERO, |several| several.ttl),
    }
}
