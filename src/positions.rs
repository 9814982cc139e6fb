//! The samples of each node's WAL position, shared by all sessions: one sampler per node writes them
//! (`monitor`), sessions read them to resolve notes and to find who may serve (`session::mark`).
//!
//! Order is by counting, not by clocks: a sampler raises its node's counter *before* it sends a
//! sample, so a session that reads the counter after a ReadyForQuery knows that every sample with a
//! greater number was asked after that ReadyForQuery.

mod bells;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use self::bells::Bells;
use crate::topology::{Epoch, NodeId};
use crate::wal::{Lsn, TimelineId};

/// One unbroken connection of a node's sampler. When it breaks, what was known of the node's position
/// is void: a crash-restart goes back in time without changing the postmaster's start time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

/// What one sample said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampleBody {
    /// The node was not in recovery.
    Primary {
        /// Its insert position, rounded down over page and segment headers.
        insert: Lsn,
        /// The visible floor: everything that commits up to here is visible on the primary.
        floor: Lsn,
    },
    /// The node was in recovery.
    Replica {
        /// The last position received and synced, if a walreceiver has run.
        receive: Option<Lsn>,
        /// The last position replayed.
        replay: Lsn,
        /// How late it was.
        late: Late,
    },
}

impl SampleBody {
    /// How long it will take, as far as can be told, until a replica has replayed up to `target`. What it has received
    /// takes as long as its pace says; what it has not, and a backlog that is too short to tell a pace by, as long as
    /// it is late.
    pub fn catch_up(&self, target: Lsn) -> Duration {
        let SampleBody::Replica { receive, replay, late } = *self else { return Duration::ZERO };
        let (Some(receive), Some(rate)) = (receive, late.rate) else { return late.by };
        if target <= replay || receive.bytes_since(replay) < BACKLOG {
            return late.by;
        }
        let bytes = target.min(receive).bytes_since(replay);
        let time = Duration::try_from_secs_f64(bytes as f64 / rate as f64).unwrap_or(Duration::MAX);
        if target <= receive { time } else { time.max(late.by) }
    }
}

/// Bytes received and not replayed from which on a replica is at work as fast as it can be.
pub const BACKLOG: u64 = 64 * 1024;

/// How late a replica was: what a wait for it is judged by. Never part of the rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Late {
    /// So long at least the primary had been past the replay position.
    pub by: Duration,
    /// Bytes per second that it replays while there is something to replay; `None`: there was nothing yet.
    pub rate: Option<u64>,
    /// When this was asked.
    pub asked_at: Instant,
}

/// A position of a node, read by its sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The node's counter when this sample was sent.
    pub number: u64,
    /// The sampler connection that read it.
    pub incarnation: Incarnation,
    /// The epoch of the topology when it was sent.
    pub epoch: Epoch,
    /// The timeline that the node writes or replays.
    pub timeline: TimelineId,
    /// Role and positions.
    pub body: SampleBody,
}

impl Sample {
    /// Whether it shows that the node was the primary of `epoch` after what was counted as `number`. (One that has come
    /// back as a standby answers, too, before the topology says so.)
    pub fn is_of_primary_since(&self, number: u64, epoch: Epoch) -> bool {
        self.number > number && self.epoch == epoch && matches!(self.body, SampleBody::Primary { .. })
    }
}

/// What a session remembers of a node at a ReadyForQuery: turned into a position by a later sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// The node that showed the session something.
    pub node: NodeId,
    /// The node's sampler connection then.
    pub incarnation: Incarnation,
    /// The epoch then.
    pub epoch: Epoch,
    /// The node's sample counter, read after the ReadyForQuery: a sample with a greater number covers it.
    pub counter: u64,
}

/// How far a node's clock is from the primary's, in nanoseconds: between these two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockOffset {
    /// At least (negative: it is behind).
    pub low: i64,
    /// At most.
    pub high: i64,
}

impl ClockOffset {
    /// What lies between, in seconds.
    pub fn seconds(self) -> f64 {
        (self.low as f64 / 2.0 + self.high as f64 / 2.0) / 1e9
    }
}

/// The samples of one node.
#[derive(Default)]
pub struct NodePositions {
    counter: AtomicU64,
    incarnation: AtomicU64,
    latest: Mutex<Option<Sample>>,
    /// When the last sample that was answered had been sent; for display only.
    seen_at: Mutex<Option<Instant>>,
    wanted: AtomicBool,
    /// Who has begun to wait for a sample that has not been sent yet.
    waiting: AtomicU32,
    wake_sampler: Notify,
    noted: AtomicBool,
    idle: AtomicBool,
    late_clock: AtomicBool,
    clock: Mutex<Option<ClockOffset>>,
    acknowledged: AtomicU64,
}

impl NodePositions {
    /// As primary it has acknowledged a write that was sent when its log had reached `past`: the write lies behind that.
    pub fn acknowledge(&self, past: Lsn) {
        self.acknowledged.fetch_max(past.0, Ordering::Relaxed);
    }

    /// The greatest [`acknowledge`](Self::acknowledge) since this was last asked; none: there was none.
    pub fn take_acknowledged(&self) -> Option<Lsn> {
        Some(Lsn(self.acknowledged.swap(0, Ordering::Relaxed))).filter(|lsn| *lsn > Lsn::ZERO)
    }

    /// The counter of the last sample sent. Read it *after* the event that a later sample shall cover.
    pub fn counter(&self) -> u64 {
        self.counter.load(Ordering::SeqCst)
    }

    /// The sampler's current connection.
    pub fn incarnation(&self) -> Incarnation {
        Incarnation(self.incarnation.load(Ordering::SeqCst))
    }

    /// The last sample answered on the current connection; or the last one of a node that was primary:
    /// what it said, that all commits acknowledged before it lie below its insert position and that those
    /// below its floor are visible, a crash does not undo for any commit that has survived it. So
    /// sessions that wrote before the primary went away can read on replicas while it is away.
    pub fn latest(&self) -> Option<Sample> {
        *self.lock()
    }

    /// When this node's position was last seen: when the last sample or probe that was answered had been sent.
    pub fn seen_at(&self) -> Option<Instant> {
        *self.seen_at.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Asks the sampler for a sample at once. The flag stays set until a sample is *sent*, so no request is lost
    /// while one is in flight.
    pub fn want(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.want_another();
    }

    /// As [`want`](Self::want), by one who has had a sample, which did not do: the next comes after the least gap.
    pub fn want_another(&self) {
        if !self.wanted.swap(true, Ordering::SeqCst) {
            self.wake_sampler.notify_one();
        }
    }

    /// Tells the sampler that a session leans on this node, and has been shown what only a sample to come can
    /// place: it takes one soon, so that the session's next statement need not wait. Only an idle sampler is woken.
    pub fn mark_active(&self) {
        if !self.noted.load(Ordering::SeqCst) {
            self.noted.store(true, Ordering::SeqCst);
            if self.idle.load(Ordering::SeqCst) && self.idle.swap(false, Ordering::SeqCst) {
                self.wake_sampler.notify_one();
            }
        }
    }

    /// Whether the node's clock is too far behind the primary's for reads that ask for the time.
    pub fn has_late_clock(&self) -> bool {
        self.late_clock.load(Ordering::Relaxed)
    }

    /// How far its clock is from the primary's, as far as that is known.
    pub fn clock(&self) -> Option<ClockOffset> {
        *self.clock.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What is known of its clock now.
    pub fn set_clock(&self, offset: Option<ClockOffset>, late: bool) {
        *self.clock.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = offset;
        self.late_clock.store(late, Ordering::Relaxed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Sample>> {
        self.latest.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The sampler's side.
impl NodePositions {
    /// A sampler connected: a new incarnation, of whose replay position nothing is known yet.
    pub fn connected(&self) -> Incarnation {
        let mut latest = self.lock();
        *latest = latest.take_if(|last| matches!(last.body, SampleBody::Primary { .. }));
        Incarnation(self.incarnation.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// The sampler's connection broke: no replay position is known until it has a new one.
    pub fn lost(&self) {
        self.connected();
    }

    /// A sample, or a probe, sent at `at` has shown a position.
    pub fn seen(&self, at: Instant) {
        let mut seen_at = self.seen_at.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *seen_at = (*seen_at).max(Some(at));
    }

    /// Counts a sample that is about to be sent; its number.
    pub fn begin(&self) -> u64 {
        self.wanted.store(false, Ordering::SeqCst);
        self.waiting.store(0, Ordering::SeqCst);
        self.counter.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Whether somebody waits for a sample that has not been sent yet.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// How many have begun to wait since the last sample was sent.
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Whether a session has leaned on this node since the last call.
    pub fn take_active(&self) -> bool {
        self.noted.load(Ordering::SeqCst) && self.noted.swap(false, Ordering::SeqCst)
    }

    /// The sampler is about to sleep for long (`true`): the next [`mark_active`](Self::mark_active) wakes it. Look
    /// at [`take_active`](Self::take_active) once more after this.
    pub fn set_idle(&self, idle: bool) {
        self.idle.store(idle, Ordering::SeqCst);
    }

    /// Resolves when somebody calls [`want`](Self::want), or [`mark_active`](Self::mark_active) while idle.
    pub fn wanted(&self) -> tokio::sync::futures::Notified<'_> {
        self.wake_sampler.notified()
    }
}

/// The samples of all nodes.
pub struct Positions {
    nodes: Box<[NodePositions]>,
    bells: Bells,
}

impl Positions {
    /// For nodes `0..count`.
    pub fn new(count: usize) -> Positions {
        Positions::for_workers(count, 0)
    }

    /// For nodes `0..count`, and sessions on so many workers.
    pub fn for_workers(count: usize, workers: usize) -> Positions {
        let nodes = (0..count).map(|_| NodePositions::default()).collect();
        Positions { nodes, bells: Bells::new(workers) }
    }

    /// One node's samples.
    pub fn node(&self, id: NodeId) -> &NodePositions {
        &self.nodes[id.index()]
    }

    /// A note on `node` as of now, in `epoch`.
    pub fn note(&self, node: NodeId, epoch: Epoch) -> Note {
        let positions = self.node(node);
        positions.mark_active();
        Note { node, incarnation: positions.incarnation(), epoch, counter: positions.counter() }
    }

    /// Publishes a sample, unless the node's connection has changed meanwhile, and wakes all waiters.
    pub fn publish(&self, node: NodeId, sample: Sample) {
        let positions = self.node(node);
        {
            let mut latest = positions.lock();
            if positions.incarnation() != sample.incarnation {
                return;
            }
            *latest = Some(sample);
        }
        self.bells.ring();
    }

    /// Resolves at the next change of any node's samples after the future was created: it need not have been polled,
    /// and takes no lock unless it is.
    pub fn changed(&self) -> impl Future<Output = ()> + '_ {
        self.bells.next(None)
    }

    /// The same, for a task of this worker's.
    pub fn changed_on(&self, worker: usize) -> impl Future<Output = ()> + '_ {
        self.bells.next(Some(worker))
    }

    /// Wakes the tasks of a worker's thread that wait for a change; runs on that thread, for ever.
    pub async fn wake_on(&self, worker: usize) {
        self.bells.pass_on(worker).await;
    }

    /// Wakes all waiters: something that decides over a wait has changed (a node was lost).
    pub fn wake_all(&self) {
        self.bells.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catch_up_is_foretold_by_the_pace_where_there_is_a_backlog_and_by_lateness_elsewhere() {
        let ms = Duration::from_millis;
        let check = |receive: u64, rate: Option<u64>, target: u64, expected: Duration| {
            let late = Late { by: ms(30), rate, asked_at: Instant::now() };
            let body = SampleBody::Replica { receive: Some(Lsn(receive)), replay: Lsn(1000), late };
            assert_eq!(body.catch_up(Lsn(target)), expected, "{receive} {rate:?} {target}");
        };
        let (backlog, fast) = (1000 + 10 * BACKLOG, Some(1000 * BACKLOG));
        check(backlog, fast, 1000 + BACKLOG, ms(1));
        check(backlog, fast, backlog, ms(10));
        check(backlog, fast, backlog + 1, ms(30));
        check(backlog, Some(BACKLOG), backlog + 1, ms(10_000));
        check(backlog, Some(0), 1001, Duration::MAX);
        // Nothing is known of its pace, or its pace is not what holds it up.
        check(backlog, None, backlog, ms(30));
        check(1000, fast, 5000, ms(30));
        check(1000 + BACKLOG - 1, Some(0), 1100, ms(30));
        check(backlog, fast, 900, ms(30));
    }

    #[test]
    fn a_node_that_answers_as_a_standby_is_not_shown_to_be_the_primary() {
        let late = Late { by: Duration::ZERO, rate: None, asked_at: Instant::now() };
        let writes = SampleBody::Primary { insert: Lsn(100), floor: Lsn(100) };
        let replays = SampleBody::Replica { receive: Some(Lsn(100)), replay: Lsn(100), late };
        let sample = |body| Sample {
            number: 5,
            incarnation: Incarnation(1),
            epoch: Epoch(2),
            timeline: TimelineId(1),
            body,
        };
        assert!(sample(writes).is_of_primary_since(4, Epoch(2)));
        assert!(!sample(writes).is_of_primary_since(5, Epoch(2)));
        assert!(!sample(writes).is_of_primary_since(4, Epoch(3)));
        assert!(!sample(replays).is_of_primary_since(4, Epoch(2)));
    }

    #[test]
    fn who_waits_is_counted_until_a_sample_is_sent() {
        let positions = NodePositions::default();
        positions.want();
        positions.want_another();
        positions.want();
        assert!(positions.is_wanted());
        assert_eq!(positions.waiting(), 2);
        positions.begin();
        assert!(!positions.is_wanted());
        positions.want_another();
        assert!(positions.is_wanted());
        assert_eq!(positions.waiting(), 0);
    }
}
