//! Samples a node's WAL positions for all sessions: one task and one connection per node.
//!
//! Promises: a sample counts before it is sent, and one is in flight at most; `consistency.sample_interval`
//! apart while sessions lean on the node, an eighth of that once one has been shown something that only a
//! sample can place (so that a session which rests for a few milliseconds between statements finds it done; on a replica
//! only where sessions have waited for that lately: those that only read do not), at once when one begins to wait, with the least gap where many do or the last sample did not do, rarely when idle;
//! a question that is not answered in time, or a connection that breaks, voids what was known of the node
//! before anything else happens. The cost does not grow with sessions or statements.
//!
//! Deliberately does not decide whom a sample serves: role, timeline and epoch go in as they were, and
//! sessions compare them with the topology's. A replica whose timeline cannot be known is sampled with
//! [`UNKNOWN_TIMELINE`].

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot};
use tokio::time::{sleep, sleep_until};

use crate::config::Config;
use crate::config::live::LiveConfig;
use crate::monitor::ReceivedTimeline;
use crate::monitor::floor::Floor;
use crate::monitor::gap::Gap;
use crate::monitor::lag::{PrimaryHistory, ReplayLag};
use crate::monitor::replay::ReplayRate;
use crate::monitor::stream::{Alive, PrimarySeen, Stream, Streamed};
use crate::node::{NodeError, Nodes, NotCommitted, PrimarySample, SampleAnswer, SampleClient};
use crate::positions::{Incarnation, Late, NodePositions, Positions, Sample, SampleBody};
use crate::topology::{Epoch, NodeId, Standing, Topology, TopologyHandle};
use crate::wal::{Lsn, TimelineId};

/// The timeline of a sample whose real one cannot be known. PostgreSQL's begin at 1, so it equals none.
pub const UNKNOWN_TIMELINE: TimelineId = TimelineId(0);

/// Time between samples while no session leans on the node. Probes see where it is more often than that; and the first
/// session that leans on it again wakes the sampler.
const IDLE_INTERVAL: Duration = Duration::from_secs(5);
/// Notes are resolved this many times as often as samples are taken without any.
const BRISK: u32 = 8;
/// How long notes on a replica are resolved so often after somebody has had to wait for it: one statement in that time may
/// wait, where otherwise a replica that is only read from would be asked hundreds of times a second for nobody. On the
/// primary, always: what is known of it when it dies decides whether a loss can be told.
const STAYS_BRISK: Duration = Duration::from_secs(1);
/// How long a node stays busy after a session has leaned on it.
const STAYS_ACTIVE: Duration = Duration::from_millis(250);
/// The longest pause between attempts to connect; the first comes at once, then 50 ms, doubling.
const MAX_BACKOFF: Duration = Duration::from_millis(500);
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const TIMER_GRAIN: Duration = Duration::from_millis(1);
/// So many that begin to wait are given their sample at once. More would have the sampler do nothing else: they share
/// one, after the least gap. (A session alone in a closed loop begins to wait once or twice for each sample.)
const FEW: u32 = 4;
/// A suspect of the floor that is older is looked for on a replica.
const SUSPECT_AGE: Duration = Duration::from_millis(20);
/// Where replicas have not cleared the suspects for so long, the primary itself is asked what they do; as often at most.
/// (It looks at all locks for that: more than a busy server should do with each sample.)
const HELD: Duration = Duration::from_millis(100);
/// Transaction ids per such question, at most.
const MAX_SUSPECTS: usize = 256;

/// How samples are taken.
#[derive(Clone, Copy, Debug)]
pub struct SampleSettings {
    /// Time between samples while sessions lean on the node.
    pub interval: Duration,
    /// The least time between two samples.
    pub gap: Duration,
    /// How long connecting, and then an answer, may take.
    pub deadline: Duration,
}

impl SampleSettings {
    /// What the configuration says.
    pub fn of(config: &Config) -> SampleSettings {
        SampleSettings {
            interval: config.consistency.sample_interval,
            gap: config.consistency.sample_gap,
            deadline: config.failover.check_timeout,
        }
    }
}

/// What has been seen of the epoch's primary: shared by its sampler, which writes, and the control
/// loop, which measures lag by it and tells sessions how an epoch ended.
#[derive(Debug)]
pub struct PrimaryTrack {
    state: Mutex<Track>,
}

#[derive(Debug)]
struct Track {
    epoch: Epoch,
    history: PrimaryHistory,
    last: Option<Last>,
}

/// The epoch's last sample of its primary.
#[derive(Clone, Copy, Debug)]
struct Last {
    number: u64,
    insert: Lsn,
    alive: Alive,
}

/// Whether a sample is the first of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstSample {
    /// It is: the server may have lost the end of its log since the connection before.
    OfConnection,
    /// It is not.
    No,
}

impl PrimaryTrack {
    /// Remembers the primary's positions for `keep`.
    pub fn new(keep: Duration) -> PrimaryTrack {
        let track = Track { epoch: Epoch(0), history: PrimaryHistory::new(keep), last: None };
        PrimaryTrack { state: Mutex::new(track) }
    }

    /// The primary of `epoch` was at `insert` when asked at `asked_at`. Ignored for another epoch than
    /// the current one.
    pub fn record(&self, epoch: Epoch, insert: Lsn, asked_at: Instant) {
        let mut track = self.lock();
        if track.epoch == epoch {
            track.history.record(insert, asked_at);
        }
    }

    /// As [`record`](Self::record), for a sample with its number. `first`: of its connection, so that
    /// positions seen earlier may be void.
    pub fn record_sample(
        &self,
        epoch: Epoch,
        number: u64,
        sample: &PrimarySample,
        asked_at: Instant,
        first: FirstSample,
    ) {
        let insert = sample.insert;
        let mut track = self.lock();
        if track.epoch == epoch {
            match first {
                FirstSample::OfConnection => track.history.resume(insert, asked_at),
                FirstSample::No => track.history.record(insert, asked_at),
            }
            let alive = Alive { asked_at, flush: sample.flush, in_order: false };
            track.last = Some(Last { number, insert, alive });
        }
    }

    /// The number and insert position of the epoch's last sample. It outlives the connection it came by.
    pub fn last_sample(&self) -> Option<(u64, Lsn)> {
        self.lock().last.map(|last| (last.number, last.insert))
    }

    /// The same sample: when it was asked for, and what was flushed.
    pub fn alive(&self) -> Option<Alive> {
        self.lock().last.map(|last| last.alive)
    }

    /// The primary has said that it shuts down.
    pub fn shuts_down(&self) {
        if let Some(last) = &mut self.lock().last {
            last.alive.in_order = true;
        }
    }

    /// A new epoch begins: positions of the old one are of another history.
    pub fn begin(&self, epoch: Epoch) {
        let mut track = self.lock();
        if track.epoch != epoch {
            track.epoch = epoch;
            track.history.clear();
            track.last = None;
        }
    }

    /// How far behind a replica is that has replayed up to `replay`; `None`: nothing is known of the primary.
    pub fn lag(&self, replay: Lsn, now: Instant) -> Option<ReplayLag> {
        self.lock().history.lag(replay, now)
    }

    /// How long the primary has at least been past `replay`.
    pub fn past_for(&self, replay: Lsn, now: Instant) -> Duration {
        self.lock().history.past_for(replay, now)
    }

    /// Positions are remembered for `keep` from now on.
    pub fn keep(&self, keep: Duration) {
        self.lock().history.keep(keep);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Track> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// One node's sampler.
pub struct Sampler {
    /// The node.
    pub node: NodeId,
    /// The control connections.
    pub nodes: Arc<Nodes>,
    /// Who is primary, in which epoch.
    pub topology: Arc<TopologyHandle>,
    /// Where samples go.
    pub positions: Arc<Positions>,
    /// Where the primary's positions go.
    pub track: Arc<PrimaryTrack>,
    /// How.
    pub config: Arc<LiveConfig>,
    /// Asked for whenever the connection was lost: tells what became of the node.
    pub probe: Arc<Notify>,
}

impl Sampler {
    /// Samples for ever.
    pub async fn run(self) {
        let mut backoff = Duration::ZERO;
        let mut stream = Stream::default();
        loop {
            sleep(backoff).await;
            match self.nodes.open_sampler(self.node, self.settings().deadline).await {
                Ok(mut client) => {
                    let (samples, error) = self.sample_on(&mut client, &mut stream).await;
                    if client.was_told_to_end() && self.topology.load().primary == Some(self.node) {
                        self.track.shuts_down();
                    }
                    // One that accepts connections but answers nothing must not be hammered.
                    backoff = if samples > 0 { Duration::ZERO } else { next_backoff(backoff) };
                    let positions = self.positions.node(self.node);
                    positions.lost();
                    self.positions.wake_all();
                    self.probe.notify_one();
                    tracing::debug!(node = %self.nodes.name(self.node), %error, "sampler connection lost");
                }
                Err(error) => {
                    backoff = next_backoff(backoff);
                    tracing::debug!(%error, "sampler cannot connect");
                }
            }
        }
    }

    fn settings(&self) -> SampleSettings {
        SampleSettings::of(&self.config.load())
    }

    /// One incarnation: how many samples were answered, and what ended it.
    async fn sample_on(&self, client: &mut SampleClient, stream: &mut Stream) -> (u64, String) {
        let mut answered = 0;
        let positions = self.positions.node(self.node);
        let start = client.start().cloned();
        let mut state = Known::new(positions.connected(), start, stream);
        let mut pace = Pace::new(Instant::now());
        loop {
            let settings = self.settings();
            client.answer_within(settings.deadline);
            pace.replays = matches!(state.role, Some(Role::Replays(_)));
            if let Turn::Ended = pace.wait(positions, client, &settings).await {
                return (answered, "the connection ended".to_owned());
            }
            let waited_for = positions.is_wanted();
            let leaned_on = waited_for || pace.is_active(Instant::now());
            let epoch = self.topology.load().epoch;
            let asked_at = Instant::now();
            pace.sent = Some(asked_at);
            let number = positions.begin();
            match client.sample().await {
                Ok(answer) => {
                    answered += 1;
                    if let Some(sample) = self.read(&mut state, answer, number, epoch, asked_at) {
                        self.positions.publish(self.node, sample);
                        positions.seen(asked_at);
                    }
                }
                // Even an error as answer: whatever it means, nothing is known of the position.
                Err(error) => return (answered, error.cause),
            }
            if leaned_on {
                self.clear_suspects(&mut state, epoch);
            }
            if waited_for && let Err(error) = self.clear_by_primary(&mut state, client).await {
                return (answered, error.cause);
            }
        }
    }

    fn read(
        &self,
        state: &mut Known<'_>,
        answer: SampleAnswer,
        number: u64,
        epoch: Epoch,
        asked_at: Instant,
    ) -> Option<Sample> {
        let incarnation = state.incarnation;
        let (timeline, body) = match answer {
            SampleAnswer::Primary(primary) => {
                self.notice(state, Role::Writes(primary.timeline));
                let topology = self.topology.load();
                if topology.primary == Some(self.node) && topology.timeline == Some(primary.timeline) {
                    let other_start = state.start.is_some() && state.start != topology.start;
                    if other_start || topology.epoch != epoch {
                        // A server that has crashed says nothing of what it had shown before, until the control
                        // loop has seen where its log ended; what was asked before that, neither.
                        self.probe_start(state, other_start);
                        return None;
                    }
                    let first = if state.tracked { FirstSample::No } else { FirstSample::OfConnection };
                    state.tracked = true;
                    self.track.record_sample(epoch, number, &primary, asked_at, first);
                }
                let floor = state.raise_floor(&primary, epoch, asked_at);
                (primary.timeline, SampleBody::Primary { insert: primary.insert, floor })
            }
            SampleAnswer::Replica(replica) => {
                let timeline = state.received.observe(&replica).unwrap_or(UNKNOWN_TIMELINE);
                self.notice(state, Role::Replays(timeline));
                // A node that has replayed nothing yet has no position.
                let (receive, replay) = (replica.receive, replica.replay?);
                let streamed = Streamed { receiver: replica.receiver, receive, replay };
                if !self.is_of_this_log(state.stream, streamed) {
                    return None;
                }
                let rate = state.rate.observe(receive, replay, asked_at);
                let late = Late { by: self.track.past_for(replay, asked_at), rate, asked_at };
                (timeline, SampleBody::Replica { receive, replay, late })
            }
        };
        Some(Sample { number, incarnation, epoch, timeline, body })
    }

    /// Whether what a replica has replayed is of the log that the epoch's marks are of.
    fn is_of_this_log(&self, stream: &mut Stream, streamed: Streamed) -> bool {
        let topology = self.topology.load();
        let primary = topology.primary.filter(|_| topology.start.is_some()).map(|id| self.positions.node(id));
        let seen = primary.map(|primary| PrimarySeen {
            epoch: topology.epoch,
            answered: primary.latest().filter(|last| last.epoch == topology.epoch).map(|last| last.number),
            sent: primary.counter(),
        });
        let is = stream.observe(streamed, seen);
        if stream.is_in_doubt()
            && let Some(primary) = primary
        {
            primary.want();
        }
        is
    }

    /// Asks the control loop, once, to look at a start that it does not know; then samples go on.
    fn probe_start(&self, state: &mut Known<'_>, other: bool) {
        if other && !std::mem::replace(&mut state.start_told, true) {
            self.probe.notify_one();
        } else if !other {
            self.positions.node(self.node).want();
        }
    }

    /// A promotion or another timeline does not break a connection: the control loop shall hear of it now.
    fn notice(&self, state: &mut Known<'_>, role: Role) {
        if state.role.replace(role).is_some_and(|before| before != role) {
            self.probe.notify_one();
        }
    }

    /// Asks the freshest replica about transactions that have held the floor for long, one question at
    /// a time; its answer is taken with the next sample, which it asks for.
    fn clear_suspects(&self, state: &mut Known<'_>, epoch: Epoch) {
        let topology = self.topology.load();
        if state.clearing.is_some() || topology.primary != Some(self.node) || topology.epoch != epoch {
            return;
        }
        let xids = state.floor.overdue(Instant::now(), SUSPECT_AGE, MAX_SUSPECTS);
        let Some(replica) = (!xids.is_empty()).then(|| self.freshest_replica(&topology)).flatten() else {
            return;
        };
        let (tell, answer) = oneshot::channel();
        state.clearing = Some(Clearing { epoch, answer });
        let (nodes, deadline) = (Arc::clone(&self.nodes), self.settings().deadline);
        let (positions, primary) = (Arc::clone(&self.positions), self.node);
        tokio::spawn(async move {
            let answer = nodes.not_committed(replica, &xids, deadline).await;
            // Without a receiver the sampler has lost its connection, and the floor with it.
            if tell.send(answer).is_ok() {
                positions.node(primary).want();
            }
        });
    }

    /// Asks the primary about transactions that have held the floor although replicas were asked: they may not have got
    /// so far. On the sampler's own connection: it is of the server that the floor is of. Somebody waits for the answer.
    async fn clear_by_primary(
        &self,
        state: &mut Known<'_>,
        client: &mut SampleClient,
    ) -> Result<(), NodeError> {
        let now = Instant::now();
        let asked_lately = state.asked_primary.is_some_and(|at| now.saturating_duration_since(at) < HELD);
        if state.floor.held_for(now) < HELD || asked_lately {
            return Ok(());
        }
        let xids = state.floor.overdue(now, HELD, MAX_SUSPECTS);
        if xids.is_empty() {
            return Ok(());
        }
        state.asked_primary = Some(now);
        if let Some((position, standing)) = client.not_committing(&xids).await? {
            let before = state.floor.position();
            let floor = state.floor.clear(&standing, position);
            tracing::debug!(
                node = %self.nodes.name(self.node), asked = xids.len(), standing = standing.len(), %before, %floor,
                "open transactions hold the visible floor"
            );
            if floor > before {
                self.positions.node(self.node).want_another();
            }
        }
        Ok(())
    }

    fn freshest_replica(&self, topology: &Topology) -> Option<NodeId> {
        topology
            .nodes
            .iter()
            .filter(|view| view.standing == Standing::Replica)
            .filter_map(|view| match self.positions.node(view.id).latest()?.body {
                SampleBody::Replica { replay, .. } => Some((replay, view.id)),
                SampleBody::Primary { .. } => None,
            })
            .max()
            .map(|(_, id)| id)
    }
}

fn next_backoff(last: Duration) -> Duration {
    (last * 2).clamp(FIRST_BACKOFF, MAX_BACKOFF)
}

/// What one incarnation has learned.
struct Known<'a> {
    incarnation: Incarnation,
    /// The server's start that the connection is to.
    start: Option<Arc<str>>,
    start_told: bool,
    epoch: Option<Epoch>,
    timeline: Option<TimelineId>,
    role: Option<Role>,
    /// Whether the lag's history has had a sample of this connection.
    tracked: bool,
    floor: Floor,
    received: ReceivedTimeline,
    rate: ReplayRate,
    stream: &'a mut Stream,
    clearing: Option<Clearing>,
    /// When the primary was last asked what its transactions do.
    asked_primary: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Writes(TimelineId),
    Replays(TimelineId),
}

struct Clearing {
    epoch: Epoch,
    answer: oneshot::Receiver<Result<NotCommitted, NodeError>>,
}

impl<'a> Known<'a> {
    fn new(incarnation: Incarnation, start: Option<Arc<str>>, stream: &'a mut Stream) -> Known<'a> {
        Known {
            incarnation,
            start,
            start_told: false,
            epoch: None,
            timeline: None,
            role: None,
            tracked: false,
            floor: Floor::default(),
            received: ReceivedTimeline::default(),
            rate: ReplayRate::default(),
            stream,
            clearing: None,
            asked_primary: None,
        }
    }

    fn raise_floor(&mut self, primary: &PrimarySample, epoch: Epoch, now: Instant) -> Lsn {
        if self.epoch != Some(epoch) || self.timeline != Some(primary.timeline) {
            self.epoch = Some(epoch);
            self.timeline = Some(primary.timeline);
            self.floor = Floor::default();
            self.clearing = None;
        }
        let floor = self.floor.observe(primary, now);
        self.cleared(primary.timeline).unwrap_or(floor)
    }

    /// Takes a replica's answer if one has come.
    fn cleared(&mut self, timeline: TimelineId) -> Option<Lsn> {
        use oneshot::error::TryRecvError;
        let clearing = self.clearing.as_mut()?;
        let answer = match clearing.answer.try_recv() {
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Closed) => None,
            Ok(answer) => answer.ok(),
        };
        let asked_in = clearing.epoch;
        self.clearing = None;
        let answer = answer.filter(|a| a.timeline == Some(timeline) && Some(asked_in) == self.epoch)?;
        Some(self.floor.clear(&answer.xids, answer.replay))
    }
}

enum Turn {
    Send,
    Ended,
}

/// When the next sample is due.
struct Pace {
    sent: Option<Instant>,
    active_until: Instant,
    /// Until then a replica's notes are resolved soon.
    brisk_until: Instant,
    /// It is a replica.
    replays: bool,
    gap: Gap,
}

impl Pace {
    fn new(now: Instant) -> Pace {
        Pace { sent: None, active_until: now, brisk_until: now, replays: false, gap: Gap::default() }
    }

    /// How long after a sample what has been shown since is placed by another, though nobody waits for that.
    fn resolves_after(&self, now: Instant, settings: &SampleSettings) -> Duration {
        let brisk = !self.replays || now < self.brisk_until;
        if brisk { settings.interval / BRISK } else { settings.interval }
    }

    fn is_active(&self, now: Instant) -> bool {
        now < self.active_until
    }

    /// When the next sample is due if nobody waits for one, and whether the sampler idles until then.
    fn due(&self, sent: Instant, now: Instant, noted: bool, settings: &SampleSettings) -> (Instant, bool) {
        let (interval, idle) = match (noted, self.is_active(now)) {
            (true, _) => (self.resolves_after(now, settings), false),
            (false, true) => (settings.interval, false),
            (false, false) => (IDLE_INTERVAL, true),
        };
        (sent + interval.max(settings.gap), idle)
    }

    async fn wait(
        &mut self,
        positions: &NodePositions,
        client: &mut SampleClient,
        settings: &SampleSettings,
    ) -> Turn {
        let mut noted = false;
        // A wake-up may be left over from a request that the last sample has served.
        while !positions.is_wanted() {
            noted |= positions.take_active();
            let now = Instant::now();
            if noted {
                self.active_until = now + STAYS_ACTIVE;
            }
            let Some(sent) = self.sent else { return Turn::Send };
            let (due, idle) = self.due(sent, now, noted, settings);
            if now >= due {
                break;
            }
            // While sessions are active their notes are looked for by time: to be woken would cost them a
            // system call.
            let soon = self.resolves_after(now, settings).max(TIMER_GRAIN);
            let look = if idle { due } else { due.min(now + soon) };
            positions.set_idle(idle);
            if idle && positions.take_active() {
                noted = true;
                positions.set_idle(false);
                continue;
            }
            tokio::select! {
                () = client.ended() => return Turn::Ended,
                () = positions.wanted() => {}
                () = sleep_until(look.into()) => {}
            }
        }
        positions.set_idle(false);
        let Some(sent) = self.sent else { return Turn::Send };
        if positions.is_wanted() {
            let now = Instant::now();
            (self.active_until, self.brisk_until) = (now + STAYS_ACTIVE, now + STAYS_BRISK);
        }
        if !(1..=FEW).contains(&positions.waiting()) {
            self.gap.until(sent + settings.gap).await;
        }
        Turn::Send
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn samples_come_soon_after_a_note_and_seldom_without_sessions() {
        let ms = Duration::from_millis;
        let settings = SampleSettings { interval: ms(20), gap: ms(1), deadline: ms(500) };
        let sent = Instant::now();
        let mut pace = Pace { sent: Some(sent), active_until: sent + STAYS_ACTIVE, ..Pace::new(sent) };
        let later = sent + STAYS_ACTIVE;
        assert_eq!(pace.due(sent, sent, true, &settings), (sent + ms(20) / BRISK, false));
        assert_eq!(pace.due(sent, sent, false, &settings), (sent + ms(20), false));
        assert_eq!(pace.due(sent, later, false, &settings), (sent + IDLE_INTERVAL, true));
        assert_eq!(pace.due(sent, later, true, &settings), (sent + ms(20) / BRISK, false));
        let slow = SampleSettings { gap: ms(5), ..settings };
        assert_eq!(pace.due(sent, sent, true, &slow), (sent + ms(5), false));
        // A replica for which nobody waits.
        pace.replays = true;
        assert_eq!(pace.due(sent, sent, true, &settings), (sent + ms(20), false));
        assert_eq!(pace.due(sent, later, true, &settings), (sent + ms(20), false));
        pace.brisk_until = later;
        assert_eq!(pace.due(sent, sent, true, &settings), (sent + ms(20) / BRISK, false));
        assert_eq!(pace.due(sent, later, true, &settings), (sent + ms(20), false));
    }

    fn at(insert: u64) -> PrimarySample {
        let (insert, flush) = (Lsn(insert), Lsn(insert - 10));
        PrimarySample { snapshot: Default::default(), insert, flush, next_xid: 3, timeline: TimelineId(1) }
    }

    #[test]
    fn the_last_sample_of_a_primary_outlives_all_but_its_epoch() {
        let track = PrimaryTrack::new(Duration::from_secs(60));
        let now = Instant::now();
        track.begin(Epoch(1));
        track.record_sample(Epoch(1), 7, &at(100), now, FirstSample::OfConnection);
        track.record_sample(Epoch(0), 8, &at(200), now, FirstSample::No);
        assert_eq!(track.last_sample(), Some((7, Lsn(100))));
        track.begin(Epoch(1));
        assert_eq!(track.last_sample(), Some((7, Lsn(100))));
        assert_eq!(track.alive().map(|alive| alive.flush), Some(Lsn(90)));
        assert_eq!(track.lag(Lsn(90), now).map(|l| l.bytes), Some(10));
        track.begin(Epoch(2));
        assert_eq!((track.last_sample(), track.lag(Lsn(90), now)), (None, None));
        assert!(track.alive().is_none());
    }
}
