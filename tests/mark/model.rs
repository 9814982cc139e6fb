//! A primary and two replicas, step by step in random order, with all that makes positions lie:
//! commits that replicas show before the primary does, replicas that show before they publish, crashes
//! of a replica that go back in time and that its sampler hears of late, samples in flight. Sessions
//! read and write wherever [`Mark`] lets them. No session may ever be shown less than it was shown before.
//!
//! The model must also be able to fail: with any part of the rule left out, it does.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use highwater::monitor::floor::Floor;
use highwater::node::{PrimarySample, Snapshot};
use highwater::positions::{Incarnation, Late, Note, Positions, Sample, SampleBody};
use highwater::session::mark::{Freshness, Mark, PrimaryVerdict, ReplicaVerdict, Samples};
use highwater::topology::{Epoch, Exclusion, NodeId, Standing, Topology};
use highwater::wal::{Lsn, TimelineId};

use crate::healthy::topology;

/// A part of the rule that is left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Without {
    Nothing,
    /// The primary serves whether or not its floor has reached what replicas have shown.
    Floor,
    /// The floor is the insert position: suspects are not waited for.
    Suspects,
    /// The primary serves while a replica's note is unresolved.
    ReplicaNotes,
    /// A replica that restarted keeps its incarnation and its last sample.
    Incarnation,
    /// A replica's note is of the sampler connection when it was taken, not when the statement was let there.
    IncarnationOfVerdict,
    /// A replica's position is taken as it was published, whatever is being replayed.
    Publication,
    /// A replica serves by its position alone, whatever is pending.
    Sticky,
    /// A backend may lean on samples sent before it was connected.
    FreshBackend,
    /// A note counts from when the statement was sent.
    NoteAfterReady,
    /// A sample covers a note if it was answered after it, whenever it was sent.
    CountedBeforeSent,
    /// Of sessions that share a mark, the later note replaces the earlier, whichever nodes they are on.
    Merging,
    /// Of sessions that share a mark, one is told what it asked before its note is set.
    NoteBeforeBytes,
    /// A strong read takes any sample of the primary for a fresh one.
    AskedAfterArrival,
    /// A strong read on the primary does not wait for its floor.
    StrongFloor,
}

/// What the sessions are promised.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Promised {
    /// Each by itself: level `session`.
    Own,
    /// All together: one named session, or level `global`.
    Shared,
    /// All that was acknowledged to anybody: level `strong`.
    Strong,
}

const NODES: usize = 3;
const PRIMARY: NodeId = NodeId(0);
/// Transactions per run: what a node shows is a set of bits.
const MAX_XIDS: u64 = 120;

/// The position behind so many records.
fn lsn(records: usize) -> Lsn {
    Lsn(1000 + 10 * records as u64)
}

/// Which transactions are visible.
type Shown = u128;

struct Chance(u64);

impl Chance {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 11) % n as u64).unwrap()
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

#[derive(Default)]
struct Primary {
    next_xid: u64,
    /// Not yet out of the list of running transactions.
    running: BTreeSet<u64>,
    /// Of those, the ones whose commit record is in the log.
    logged: BTreeSet<u64>,
    /// One past the highest completed.
    xmax: u64,
    /// The commit records, in order.
    log: Vec<u64>,
}

impl Primary {
    fn insert(&self) -> Lsn {
        lsn(self.log.len())
    }

    fn begin(&mut self) -> Option<u64> {
        (self.next_xid < MAX_XIDS).then(|| {
            let xid = self.next_xid;
            self.next_xid += 1;
            self.running.insert(xid);
            xid
        })
    }

    fn log_commit(&mut self, xid: u64) {
        self.log.push(xid);
        self.logged.insert(xid);
    }

    fn complete(&mut self, xid: u64) {
        self.running.remove(&xid);
        self.logged.remove(&xid);
        self.xmax = self.xmax.max(xid + 1);
    }

    fn shows(&self) -> Shown {
        self.log.iter().filter(|xid| !self.running.contains(xid)).fold(0, |all, xid| all | 1 << xid)
    }
}

#[derive(Default)]
struct Replica {
    /// On disk: a crash does not take it.
    received: usize,
    /// What the walreceiver of this run says.
    receive: Option<usize>,
    /// Records visible; at most one more than published.
    visible: usize,
    published: usize,
    boot: u64,
    /// Its sampler has not noticed the restart yet.
    sampler_dead: bool,
    /// A pooled backend: the run of the server it belongs to, and the counter when it was connected.
    backend: Option<(u64, u64)>,
}

/// A sample under way.
enum Flight {
    None,
    Sent { number: u64 },
    Snapshot { number: u64, snapshot: Snapshot },
    Insert { number: u64, snapshot: Snapshot, insert: Lsn },
    Answered { number: u64, answer: Answer },
}

enum Answer {
    Primary(PrimarySample),
    Replica { receive: Option<Lsn>, replay: Lsn },
}

/// Where a statement was sent.
#[derive(Clone, Copy)]
struct Place {
    node: NodeId,
    incarnation: Incarnation,
    boot: u64,
}

impl Place {
    fn primary() -> Place {
        Place { node: PRIMARY, incarnation: Incarnation(0), boot: 0 }
    }
}

enum Doing {
    Nothing,
    /// `must`: what it has to show at least.
    Reading {
        at: Place,
        must: Shown,
        shown: Option<Shown>,
        early: Note,
    },
    Writing {
        xid: u64,
        early: Note,
    },
}

struct Client {
    mark: Mark,
    seen: Shown,
    /// The next statement has arrived: what it must be shown.
    arrived: Option<(Option<Freshness>, Shown)>,
    /// The next statement: a read on the node of this index, or a write when there is no such node. It
    /// is kept until it may run, or now and then given up.
    wants: usize,
    doing: Doing,
}

/// What the sessions see of the samples.
struct Published<'a> {
    positions: &'a Positions,
    without: Without,
}

impl Samples for Published<'_> {
    fn latest(&self, node: NodeId) -> Option<Sample> {
        let mut sample = self.positions.node(node).latest()?;
        match &mut sample.body {
            SampleBody::Replica { receive, replay, .. } if self.without == Without::Publication => {
                *receive = Some(*replay);
            }
            SampleBody::Primary { insert, floor } if self.without == Without::Suspects => *floor = *insert,
            _ => {}
        }
        Some(sample)
    }

    fn incarnation(&self, node: NodeId) -> Incarnation {
        self.positions.node(node).incarnation()
    }

    fn note(&self, node: NodeId, epoch: Epoch) -> Note {
        let mut note = Positions::note(self.positions, node, epoch);
        if self.without == Without::CountedBeforeSent {
            // As if the counter were raised when the answer comes.
            note.counter = self.positions.node(node).latest().map_or(0, |sample| sample.number);
        }
        note
    }
}

/// How much of what matters has happened.
#[derive(Default, Debug)]
struct Happened {
    replica_reads: usize,
    primary_reads: usize,
    writes: usize,
    crashes: usize,
    below_floor: usize,
    stalled: usize,
    placed: usize,
    violations: usize,
}

struct World {
    chance: Chance,
    without: Without,
    primary: Primary,
    replicas: [Replica; NODES],
    positions: Arc<Positions>,
    flights: [Flight; NODES],
    floor: Floor,
    now: Instant,
    topology: Topology,
    clients: Vec<Client>,
    promised: Promised,
    /// The mark that all share, if they do.
    shared: Mark,
    /// What anybody was shown.
    acknowledged: Shown,
    happened: Happened,
}

impl World {
    fn new(seed: u64, promised: Promised, without: Without) -> World {
        let positions = Arc::new(Positions::new(NODES));
        for id in 0..NODES as u16 {
            positions.node(NodeId(id)).connected();
        }
        let topology = topology(&["n0", "n1", "n2"]);
        let mark = Mark::new(&*positions, &topology);
        World {
            chance: Chance(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1),
            without,
            primary: Primary::default(),
            replicas: Default::default(),
            positions,
            flights: [Flight::None, Flight::None, Flight::None],
            floor: Floor::default(),
            now: Instant::now(),
            topology,
            clients: (0..3)
                .map(|_| Client {
                    mark: mark.clone(),
                    seen: 0,
                    arrived: None,
                    wants: 1,
                    doing: Doing::Nothing,
                })
                .collect(),
            promised,
            shared: mark,
            acknowledged: 0,
            happened: Happened::default(),
        }
    }

    fn run(mut self, steps: usize) -> Happened {
        for _ in 0..steps {
            match self.chance.below(16) {
                0 => self.primary_begins(),
                1 => self.primary_logs(),
                2 => self.primary_completes(),
                3..=5 => self.replica_moves(),
                6 => self.trouble(),
                7..=11 => self.sampler(),
                _ => self.client(),
            }
        }
        self.happened
    }

    fn primary_begins(&mut self) {
        // Slowly, so that a run is not over at once.
        if self.chance.one_in(6) {
            self.primary.begin();
        }
    }

    fn primary_logs(&mut self) {
        let all: Vec<u64> = self.primary.running.difference(&self.primary.logged).copied().collect();
        if !all.is_empty() {
            let xid = all[self.chance.below(all.len())];
            self.primary.log_commit(xid);
        }
    }

    /// Out of order, and some time after the record: waits for standbys, or just the scheduler.
    fn primary_completes(&mut self) {
        if self.chance.one_in(2) {
            return;
        }
        let all: Vec<u64> = self.primary.logged.iter().copied().collect();
        if !all.is_empty() {
            let xid = all[self.chance.below(all.len())];
            self.primary.complete(xid);
        }
    }

    fn some_replica(&mut self) -> usize {
        1 + self.chance.below(NODES - 1)
    }

    fn replica_moves(&mut self) {
        let index = self.some_replica();
        // The second is slower than the first.
        if index == 2 && self.chance.one_in(2) {
            return;
        }
        let what = self.chance.below(3);
        let replica = &mut self.replicas[index];
        match what {
            0 => {
                replica.received = (replica.received + 1).min(self.primary.log.len());
                replica.receive = Some(replica.received);
            }
            1 if replica.visible == replica.published && replica.visible < replica.received => {
                replica.visible += 1;
            }
            _ => replica.published = replica.visible,
        }
    }

    /// Crashes, lost samplers, ejections: each now and then.
    fn trouble(&mut self) {
        if !self.chance.one_in(12) {
            return;
        }
        let index = self.some_replica();
        let node = NodeId(index as u16);
        match self.chance.below(4) {
            0 => {
                let back_to = self.chance.below(self.replicas[index].published + 1);
                let replica = &mut self.replicas[index];
                replica.boot += 1;
                replica.receive = None;
                (replica.visible, replica.published) = (back_to, back_to);
                replica.sampler_dead = true;
                self.flights[index] = match std::mem::replace(&mut self.flights[index], Flight::None) {
                    // It is on the wire, or in our socket's buffer.
                    answered @ Flight::Answered { .. } => answered,
                    _ => Flight::None,
                };
                self.happened.crashes += 1;
            }
            1 => {
                // Without the server having crashed.
                self.reconnect_sampler(index);
            }
            2 => {
                self.reconnect_sampler(0);
                self.floor = Floor::default();
            }
            _ => {
                let standing = &mut self.topology.nodes[node.index()].standing;
                *standing = match standing {
                    Standing::Replica => Standing::Excluded(Exclusion::Ejected(String::new())),
                    _ => Standing::Replica,
                };
            }
        }
    }

    fn reconnect_sampler(&mut self, index: usize) {
        self.flights[index] = Flight::None;
        self.replicas[index].sampler_dead = false;
        if self.without != Without::Incarnation {
            let positions = self.positions.node(NodeId(index as u16));
            positions.lost();
            positions.connected();
        }
    }

    fn sampler(&mut self) {
        let index = self.chance.below(NODES);
        let node = NodeId(index as u16);
        let flight = std::mem::replace(&mut self.flights[index], Flight::None);
        self.flights[index] = match flight {
            Flight::None if self.replicas[index].sampler_dead => {
                // Its connection is broken; it takes a while to be heard.
                if self.chance.one_in(4) {
                    self.reconnect_sampler(index);
                }
                Flight::None
            }
            Flight::None => Flight::Sent { number: self.positions.node(node).begin() },
            Flight::Sent { number } if index == 0 => Flight::Snapshot { number, snapshot: self.snapshot() },
            Flight::Sent { number } => {
                let replica = &self.replicas[index];
                let answer =
                    Answer::Replica { receive: replica.receive.map(lsn), replay: lsn(replica.published) };
                Flight::Answered { number, answer }
            }
            Flight::Snapshot { number, snapshot } => {
                Flight::Insert { number, snapshot, insert: self.primary.insert() }
            }
            Flight::Insert { number, snapshot, insert } => {
                let (next_xid, timeline) = (self.primary.next_xid, TimelineId(1));
                let sample = PrimarySample { snapshot, insert, flush: insert, next_xid, timeline };
                Flight::Answered { number, answer: Answer::Primary(sample) }
            }
            Flight::Answered { number, answer } => {
                self.publish(node, number, answer);
                Flight::None
            }
        };
    }

    fn snapshot(&self) -> Snapshot {
        let xmax = self.primary.xmax;
        Snapshot { xmax, xip: self.primary.running.range(..xmax).copied().collect() }
    }

    fn publish(&mut self, node: NodeId, number: u64, answer: Answer) {
        let body = match answer {
            Answer::Primary(sample) => {
                let floor = self.floor.observe(&sample, self.now);
                SampleBody::Primary { insert: sample.insert, floor }
            }
            Answer::Replica { receive, replay } => {
                let late = Late { by: Duration::ZERO, rate: None, asked_at: self.now };
                SampleBody::Replica { receive, replay, late }
            }
        };
        let incarnation = self.positions.node(node).incarnation();
        let sample = Sample { number, incarnation, epoch: Epoch(1), timeline: TimelineId(1), body };
        self.positions.publish(node, sample);
    }

    fn client(&mut self) {
        let who = self.chance.below(self.clients.len());
        match std::mem::replace(&mut self.clients[who].doing, Doing::Nothing) {
            Doing::Nothing => self.next_statement(who),
            Doing::Reading { at, must, shown: None, early } => self.look(who, at, must, early),
            Doing::Reading { at, shown: Some(shown), early, .. } => self.ready(who, at, shown, early),
            Doing::Writing { xid, early } => {
                if self.primary.running.contains(&xid) {
                    self.clients[who].doing = Doing::Writing { xid, early };
                } else {
                    self.happened.writes += 1;
                    self.ready(who, Place::primary(), 1 << xid, early);
                }
            }
        }
    }

    fn next_statement(&mut self, who: usize) {
        let positions = Arc::clone(&self.positions);
        let samples = Published { positions: &positions, without: self.without };
        if self.chance.one_in(40) {
            self.clients[who].wants = self.choose();
            self.clients[who].arrived = None;
        }
        if self.promised == Promised::Shared && self.clients[who].arrived.is_none() {
            // What others are shown while the statement waits is not waited for.
            self.shared.absorb(&samples, &self.topology);
            self.clients[who].mark = self.shared.clone();
        }
        self.clients[who].mark.absorb(&samples, &self.topology);
        let must = self.must(who);
        let arriving = || match (self.promised, self.without) {
            // As if the newest sample there is had been asked for now.
            (Promised::Strong, Without::AskedAfterArrival) => {
                Freshness::of_now(&Published { positions: &Positions::new(NODES), ..samples }, &self.topology)
            }
            (Promised::Strong, _) => Freshness::of_now(&samples, &self.topology),
            _ => None,
        };
        let (freshness, _) = self.clients[who].arrived.get_or_insert_with(|| (arriving(), must));
        if let Some(freshness) = freshness {
            freshness.absorb(&samples, &self.topology);
        }
        let index = self.clients[who].wants;
        if (1..NODES).contains(&index) {
            return self.read_on_replica(who, index, &samples);
        }
        // Index NODES: a write.
        let mark = &mut self.clients[who].mark;
        let mut verdict = mark.primary(&samples, &self.topology);
        if let PrimaryVerdict::Unresolved(_) = verdict
            && mark.leave_stalled(&samples, &self.topology)
        {
            self.happened.stalled += 1;
            verdict = mark.primary(&samples, &self.topology);
            self.shared.leave_stalled(&samples, &self.topology);
        }
        if let (PrimaryVerdict::Serves, Some((Some(fresh), _))) = (verdict, self.clients[who].arrived)
            && self.without != Without::StrongFloor
            && !fresh.primary(&samples, &self.topology)
        {
            verdict = PrimaryVerdict::BelowFloor;
        }
        let may = match verdict {
            PrimaryVerdict::Serves => true,
            PrimaryVerdict::Unresolved(_) => self.without == Without::ReplicaNotes,
            PrimaryVerdict::BelowFloor => {
                self.happened.below_floor += 1;
                self.without == Without::Floor
            }
        };
        let early = samples.note(PRIMARY, Epoch(1));
        if !may {
            return;
        }
        let must = self.sent(who);
        if index == NODES {
            self.show(must, self.primary.shows());
            if let Some(xid) = self.primary.begin() {
                self.clients[who].doing = Doing::Writing { xid, early };
            }
        } else {
            self.happened.primary_reads += 1;
            self.clients[who].doing = Doing::Reading { at: Place::primary(), must, shown: None, early };
        }
    }

    /// What the next statement of a session must be shown.
    fn must(&self, who: usize) -> Shown {
        match self.promised {
            Promised::Own => self.clients[who].seen,
            Promised::Shared | Promised::Strong => self.acknowledged,
        }
    }

    /// The statement is on its way; what it must be shown. The next one is chosen.
    fn sent(&mut self, who: usize) -> Shown {
        self.clients[who].wants = self.choose();
        // What others were shown while it waited need not be there.
        self.clients[who].arrived.take().map_or(0, |(_, must)| must)
    }

    fn choose(&mut self) -> usize {
        // Mostly reads, on any node; writes seldom, or the run is over soon.
        if self.chance.one_in(10) { NODES } else { self.chance.below(NODES) }
    }

    fn read_on_replica(&mut self, who: usize, index: usize, samples: &Published<'_>) {
        let node = NodeId(index as u16);
        if self.topology.node(node).standing != Standing::Replica {
            return;
        }
        let mark = &mut self.clients[who].mark;
        let mut verdict = mark.replica(samples, &self.topology, node);
        if verdict == ReplicaVerdict::Unresolved && mark.place_stalled(samples, &self.topology) {
            self.happened.placed += 1;
            verdict = mark.replica(samples, &self.topology, node);
        }
        if verdict == ReplicaVerdict::Unresolved
            && self.without == Without::Sticky
            && let Some(sample) = samples.latest(node)
            && matches!(sample.body, SampleBody::Replica { replay, .. } if replay >= mark.position())
        {
            verdict = ReplicaVerdict::Serves { sample: sample.number, incarnation: sample.incarnation };
        }
        let ReplicaVerdict::Serves { sample, incarnation } = verdict else { return };
        if let Some((Some(fresh), _)) = self.clients[who].arrived
            && !fresh.replica(samples, node)
        {
            return;
        }
        let replica = &mut self.replicas[index];
        let connected = (replica.boot, self.positions.node(node).counter());
        let (boot, connected_at) = *replica.backend.get_or_insert(connected);
        if boot != replica.boot {
            // The statement was sent into a dead connection; the next one gets a new one.
            replica.backend = None;
            self.note(who, Place { node, incarnation, boot }, None);
        } else if sample > connected_at || self.without == Without::FreshBackend {
            let early = samples.note(node, Epoch(1));
            self.happened.replica_reads += 1;
            let must = self.sent(who);
            self.clients[who].doing =
                Doing::Reading { at: Place { node, incarnation, boot }, must, shown: None, early };
        }
    }

    /// The statement takes its snapshot.
    fn look(&mut self, who: usize, at: Place, must: Shown, early: Note) {
        let node = at.node;
        let shown = match node {
            PRIMARY => self.primary.shows(),
            // The connection is lost, which counts as having shown something.
            _ if self.replicas[node.index()].boot != at.boot => return self.note(who, at, None),
            _ => {
                let visible = &self.primary.log[..self.replicas[node.index()].visible];
                visible.iter().fold(0, |all, xid| all | 1 << xid)
            }
        };
        self.show(must, shown);
        if self.without == Without::NoteBeforeBytes {
            self.acknowledged |= shown;
        }
        self.clients[who].doing = Doing::Reading { at, must, shown: Some(shown), early };
    }

    fn show(&mut self, must: Shown, shown: Shown) {
        self.happened.violations += usize::from(must & !shown != 0);
    }

    /// ReadyForQuery has arrived.
    fn ready(&mut self, who: usize, at: Place, shown: Shown, early: Note) {
        self.clients[who].seen |= shown;
        self.acknowledged |= shown;
        self.note(who, at, (self.without == Without::NoteAfterReady).then_some(early));
    }

    fn note(&mut self, who: usize, at: Place, early: Option<Note>) {
        let samples = Published { positions: &self.positions, without: self.without };
        let note = early.unwrap_or_else(|| samples.note(at.node, Epoch(1)));
        let beside = Some(samples.note(PRIMARY, Epoch(1)).counter);
        if self.promised == Promised::Shared {
            let other = self.shared.awaits().is_some_and(|other| other != at.node);
            return match at.node {
                _ if other && self.without == Without::Merging => {}
                PRIMARY => self.shared.primary_showed_one(note, &samples, &self.topology),
                _ => self.shared.replica_showed_one(note, at.incarnation, beside, &samples, &self.topology),
            };
        }
        let mark = &mut self.clients[who].mark;
        match (at.node, self.without) {
            (PRIMARY, _) => mark.primary_showed(note),
            // The mark insists on what the rule says.
            (node, Without::Sticky) if mark.awaits().is_some_and(|other| other != node) => {}
            (_, Without::IncarnationOfVerdict) => mark.replica_showed(note, note.incarnation, beside),
            _ => mark.replica_showed(note, at.incarnation, beside),
        }
    }
}

fn runs(promised: Promised, without: Without, seeds: std::ops::Range<u64>) -> Happened {
    let mut total = Happened::default();
    for seed in seeds {
        let run = World::new(seed, promised, without).run(10_000);
        total.replica_reads += run.replica_reads;
        total.primary_reads += run.primary_reads;
        total.writes += run.writes;
        total.crashes += run.crashes;
        total.below_floor += run.below_floor;
        total.stalled += run.stalled;
        total.placed += run.placed;
        if run.violations > 0 && without == Without::Nothing {
            println!("{promised:?}, seed {seed}: {run:?}");
        }
        total.violations += run.violations;
    }
    total
}

/// HIGHWATER_MODEL_RUNS: more, for a soak.
fn runs_wanted(usually: u64) -> u64 {
    std::env::var("HIGHWATER_MODEL_RUNS").map_or(usually, |n| n.parse().unwrap())
}

#[test]
fn no_session_sees_an_older_state() {
    let runs_wanted = runs_wanted(600);
    let happened = runs(Promised::Own, Without::Nothing, 1..runs_wanted);
    println!("{happened:?}");
    assert_eq!(happened.violations, 0, "{happened:?}");
    // And all of it has been tried.
    let each = runs_wanted as usize;
    assert!(happened.replica_reads > 20 * each && happened.primary_reads > 20 * each, "{happened:?}");
    assert!(happened.writes > 5 * each && happened.crashes > each, "{happened:?}");
    assert!(happened.below_floor > each && happened.stalled > each / 10, "{happened:?}");
    assert!(happened.placed > each / 10, "{happened:?}");
}

#[test]
fn sessions_that_share_a_mark_see_what_any_of_them_has_seen() {
    let runs_wanted = runs_wanted(300);
    let happened = runs(Promised::Shared, Without::Nothing, 1..runs_wanted);
    println!("{happened:?}");
    assert_eq!(happened.violations, 0, "{happened:?}");
    let each = runs_wanted as usize;
    assert!(happened.replica_reads > 5 * each && happened.primary_reads > 5 * each, "{happened:?}");
    assert!(happened.writes > 2 * each, "{happened:?}");
}

#[test]
fn a_strong_read_sees_what_anybody_was_shown_before_it_arrived() {
    let runs_wanted = runs_wanted(300);
    let happened = runs(Promised::Strong, Without::Nothing, 1..runs_wanted);
    println!("{happened:?}");
    assert_eq!(happened.violations, 0, "{happened:?}");
    let each = runs_wanted as usize;
    assert!(happened.replica_reads > 5 * each && happened.primary_reads > 5 * each, "{happened:?}");
    assert!(happened.writes > 2 * each, "{happened:?}");
}

#[test]
fn with_any_part_of_the_rule_left_out_some_session_does() {
    for (promised, without) in [
        (Promised::Own, Without::Floor),
        (Promised::Own, Without::Suspects),
        (Promised::Own, Without::ReplicaNotes),
        (Promised::Own, Without::Incarnation),
        (Promised::Own, Without::IncarnationOfVerdict),
        (Promised::Own, Without::Publication),
        (Promised::Own, Without::Sticky),
        (Promised::Own, Without::FreshBackend),
        (Promised::Own, Without::NoteAfterReady),
        (Promised::Own, Without::CountedBeforeSent),
        (Promised::Shared, Without::Merging),
        (Promised::Shared, Without::NoteBeforeBytes),
        (Promised::Strong, Without::AskedAfterArrival),
        (Promised::Strong, Without::StrongFloor),
    ] {
        let happened = runs(promised, without, 1..300);
        println!("without {without:?}: {} violations", happened.violations);
        assert!(happened.violations > 0, "the model does not miss {without:?}: {happened:?}");
    }
}
