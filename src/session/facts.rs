//! What a session shows of itself to an operator, and what it has done so far.
//!
//! Only the session writes here, with plain stores to memory that no other session writes; whoever asks reads each
//! figure as it stands, so that two of them may be of different moments. Nothing rests on it but what people are shown,
//! with one exception: `PAUSE` waits for [`State::Idle`] (see `session::pause` for why that is sound).

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use crate::metrics::WaitFor;
use crate::route::{ClassLabel, RouteReason};
use crate::topology::NodeId;
use crate::wal::Lsn;
use crate::wire::TransactionStatus;

/// Who is at the other end.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Role.
    pub user: Arc<str>,
    /// Database.
    pub database: Arc<str>,
    /// Its address; `None`: it had gone when it was asked for.
    pub peer: Option<SocketAddr>,
    /// What kind of session it is.
    pub kind: Kind,
}

/// Kinds of sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A client of the nodes.
    Client,
    /// The same, by the port that only reads.
    ReadOnly,
    /// It speaks the replication protocol.
    Replication,
    /// An administrator on the console.
    Console,
}

impl Kind {
    /// One word.
    pub fn label(self) -> &'static str {
        match self {
            Kind::Client => "client",
            Kind::ReadOnly => "read_only",
            Kind::Replication => "replication",
            Kind::Console => "console",
        }
    }
}

/// What a session is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It logs in.
    LoggingIn,
    /// Outside a transaction, nothing runs.
    Idle,
    /// A statement runs, or waits.
    Active,
    /// Inside a transaction, nothing runs.
    InTransaction,
    /// The same in one that has failed.
    Failed,
}

impl State {
    const ALL: [State; 5] =
        [State::LoggingIn, State::Idle, State::Active, State::InTransaction, State::Failed];

    /// PostgreSQL's words of pg_stat_activity, where it has them.
    pub fn label(self) -> &'static str {
        match self {
            State::LoggingIn => "logging in",
            State::Idle => "idle",
            State::Active => "active",
            State::InTransaction => "idle in transaction",
            State::Failed => "idle in transaction (aborted)",
        }
    }
}

/// What a statement waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Something that is measured.
    For(WaitFor),
    /// `RESUME`.
    Paused,
}

impl Wait {
    /// All, in the order of their numbers.
    pub const ALL: [Wait; 6] = [
        Wait::For(WaitFor::Mark),
        Wait::For(WaitFor::Floor),
        Wait::For(WaitFor::Backend),
        Wait::For(WaitFor::Primary),
        Wait::For(WaitFor::Gate),
        Wait::Paused,
    ];

    /// One word.
    pub fn label(self) -> &'static str {
        match self {
            Wait::For(WaitFor::Mark) => "mark",
            Wait::For(WaitFor::Floor) => "floor",
            Wait::For(WaitFor::Backend) => "backend",
            Wait::For(WaitFor::Primary) => "primary",
            Wait::For(WaitFor::Gate) => "gate",
            Wait::Paused => "paused",
        }
    }

    fn index(self) -> usize {
        match self {
            Wait::For(what) => what as usize,
            Wait::Paused => Wait::ALL.len() - 1,
        }
    }
}

const NO_NODE: u16 = u16::MAX;
const NO_WAIT: u8 = u8::MAX;

/// A figure with one writer.
#[derive(Debug, Default)]
struct Figure(AtomicU64);

impl Figure {
    fn add(&self, more: u64) {
        self.0.store(self.get().wrapping_add(more), Ordering::Relaxed);
    }

    fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

const REASONS: usize = RouteReason::LABELS.len();
const WAITS: usize = Wait::ALL.len();

/// What sessions have done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Sessions that these are the sums of.
    pub sessions: u64,
    /// Units that ran.
    pub statements: u64,
    /// Of them: reads on replicas.
    pub reads_on_replicas: u64,
    /// Reads on the primary, by the reason of the route.
    pub reads_on_primary: [u64; REASONS],
    /// Bytes that clients sent.
    pub received: u64,
    /// Bytes that they were sent.
    pub sent: u64,
    /// Waits that were needed, by what for.
    pub waits: [u64; WAITS],
    /// How long they took, in microseconds.
    pub waited: [u64; WAITS],
}

impl Sums {
    /// Adds what others have done.
    pub fn add(&mut self, other: &Sums) {
        self.sessions += other.sessions;
        self.statements += other.statements;
        self.reads_on_replicas += other.reads_on_replicas;
        self.received += other.received;
        self.sent += other.sent;
        let pairs = [
            (&mut self.reads_on_primary[..], &other.reads_on_primary[..]),
            (&mut self.waits[..], &other.waits[..]),
            (&mut self.waited[..], &other.waited[..]),
        ];
        for (mine, theirs) in pairs {
            for (mine, theirs) in mine.iter_mut().zip(theirs) {
                *mine += theirs;
            }
        }
    }
}

/// What a session shows of itself.
#[derive(Debug)]
pub struct Facts {
    /// Who is at the other end.
    pub identity: Identity,
    /// When it logged in.
    pub connected: SystemTime,
    /// `since` counts from here.
    born: Instant,
    application_name: Mutex<Arc<[u8]>>,
    state: AtomicU8,
    since: Figure,
    node: AtomicU16,
    wait: AtomicU8,
    mark: Figure,
    awaits: AtomicU16,
    statements: Figure,
    reads_on_replicas: Figure,
    reads_on_primary: [Figure; REASONS],
    received: Figure,
    sent: Figure,
    waits: [Figure; WAITS],
    waited: [Figure; WAITS],
}

/// The session's side.
impl Facts {
    /// Of a session that logs in now.
    pub fn new(identity: Identity) -> Facts {
        Facts {
            identity,
            connected: SystemTime::now(),
            born: Instant::now(),
            application_name: Mutex::default(),
            state: AtomicU8::new(State::LoggingIn as u8),
            since: Figure::default(),
            node: AtomicU16::new(NO_NODE),
            wait: AtomicU8::new(NO_WAIT),
            mark: Figure::default(),
            awaits: AtomicU16::new(NO_NODE),
            statements: Figure::default(),
            reads_on_replicas: Figure::default(),
            reads_on_primary: Default::default(),
            received: Figure::default(),
            sent: Figure::default(),
            waits: Default::default(),
            waited: Default::default(),
        }
    }

    /// Its application has this name from now on.
    pub fn call_application(&self, name: &[u8]) {
        *self.application_name.lock().unwrap_or_else(|p| p.into_inner()) = name.into();
    }

    fn since(&self, when: Instant) {
        let micros = when.saturating_duration_since(self.born).as_micros();
        self.since.set(u64::try_from(micros).unwrap_or(u64::MAX));
    }

    /// A unit begins.
    pub fn begins(&self, when: Instant) {
        self.state.store(State::Active as u8, Ordering::Relaxed);
        self.since(when);
    }

    /// The unit runs on this node.
    pub fn runs_on(&self, node: NodeId) {
        self.wait.store(NO_WAIT, Ordering::Relaxed);
        self.node.store(node.0, Ordering::Relaxed);
    }

    /// A unit has run: what it is counted as, where it ran, and when it was over.
    pub fn ran(&self, class: ClassLabel, reason: RouteReason, on_replica: bool, over: Instant) {
        self.statements.add(1);
        if on_replica {
            self.reads_on_replicas.add(1);
        } else if class == ClassLabel::Read {
            self.reads_on_primary[reason as usize].add(1);
        }
        self.since(over);
    }

    /// A unit is over, or the login is. `node`: whose backend the session keeps.
    pub fn rests(&self, status: TransactionStatus, node: Option<NodeId>) {
        let state = match status {
            TransactionStatus::Idle => State::Idle,
            TransactionStatus::InTransaction => State::InTransaction,
            TransactionStatus::Failed => State::Failed,
        };
        self.wait.store(NO_WAIT, Ordering::Relaxed);
        self.node.store(node.map_or(NO_NODE, |node| node.0), Ordering::Relaxed);
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// The session's mark, and the node whose sample would raise it.
    pub fn marks(&self, position: Lsn, awaits: Option<NodeId>) {
        self.mark.set(position.0);
        self.awaits.store(awaits.map_or(NO_NODE, |node| node.0), Ordering::Relaxed);
    }

    /// All that has passed between the client and us, so far.
    pub fn moved(&self, received: u64, sent: u64) {
        self.received.set(received);
        self.sent.set(sent);
    }

    /// It begins to wait.
    pub fn waits_for(&self, what: Wait) {
        self.wait.store(what.index() as u8, Ordering::Relaxed);
    }

    /// It has waited.
    pub fn waited(&self, what: Wait, time: Duration) {
        self.wait.store(NO_WAIT, Ordering::Relaxed);
        self.waits[what.index()].add(1);
        self.waited[what.index()].add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }
}

/// The reader's side.
impl Facts {
    /// What it is doing.
    pub fn state(&self) -> State {
        State::ALL[usize::from(self.state.load(Ordering::Relaxed)).min(State::ALL.len() - 1)]
    }

    /// For how long it has been doing that.
    pub fn state_for(&self) -> Duration {
        self.born.elapsed().saturating_sub(Duration::from_micros(self.since.get()))
    }

    /// The name of its application.
    pub fn application_name(&self) -> Arc<[u8]> {
        self.application_name.lock().unwrap_or_else(|p| p.into_inner()).clone()
    }

    /// The node of the backend that it has now.
    pub fn node(&self) -> Option<NodeId> {
        Some(self.node.load(Ordering::Relaxed)).filter(|node| *node != NO_NODE).map(NodeId)
    }

    /// What it waits for.
    pub fn wait(&self) -> Option<Wait> {
        Wait::ALL.get(usize::from(self.wait.load(Ordering::Relaxed))).copied()
    }

    /// Its mark after its last unit; `None`: it has none yet.
    pub fn mark(&self) -> Option<Lsn> {
        Some(Lsn(self.mark.get())).filter(|mark| *mark != Lsn::ZERO)
    }

    /// The node whose next sample would raise it.
    pub fn awaits(&self) -> Option<NodeId> {
        Some(self.awaits.load(Ordering::Relaxed)).filter(|node| *node != NO_NODE).map(NodeId)
    }

    /// What it has done so far.
    pub fn sums(&self) -> Sums {
        Sums {
            sessions: 1,
            statements: self.statements.get(),
            reads_on_replicas: self.reads_on_replicas.get(),
            reads_on_primary: std::array::from_fn(|i| self.reads_on_primary[i].get()),
            received: self.received.get(),
            sent: self.sent.get(),
            waits: std::array::from_fn(|i| self.waits[i].get()),
            waited: std::array::from_fn(|i| self.waited[i].get()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_what_was_done() {
        let identity = Identity { user: "u".into(), database: "d".into(), peer: None, kind: Kind::Client };
        let facts = Facts::new(identity);
        assert_eq!(
            (facts.state(), facts.node(), facts.wait(), facts.mark()),
            (State::LoggingIn, None, None, None)
        );
        facts.begins(Instant::now());
        facts.waits_for(Wait::Paused);
        assert_eq!((facts.state(), facts.wait()), (State::Active, Some(Wait::Paused)));
        facts.waited(Wait::Paused, Duration::from_millis(3));
        facts.runs_on(NodeId(2));
        assert_eq!((facts.node(), facts.wait()), (Some(NodeId(2)), None));
        facts.ran(ClassLabel::Read, RouteReason::Read, true, Instant::now());
        facts.ran(ClassLabel::Read, RouteReason::Behind, false, Instant::now());
        facts.ran(ClassLabel::Write, RouteReason::NotARead, false, Instant::now());
        facts.marks(Lsn(7), Some(NodeId(1)));
        facts.rests(TransactionStatus::InTransaction, None);
        assert_eq!(
            (facts.state(), facts.node(), facts.awaits()),
            (State::InTransaction, None, Some(NodeId(1)))
        );
        let mut sums = facts.sums();
        sums.add(&facts.sums());
        assert_eq!((sums.sessions, sums.statements, sums.reads_on_replicas), (2, 6, 2));
        assert_eq!(sums.reads_on_primary.iter().sum::<u64>(), 2);
        let paused = Wait::Paused.index();
        assert_eq!((sums.waits[paused], sums.waited[paused]), (2, 6000));
        assert!(Wait::ALL.iter().enumerate().all(|(at, wait)| wait.index() == at));
    }
}
