//! What others may do to a session: cancel its statement, ask it to end. And the registry by which a
//! cancel request finds its session.
//!
//! The key that a client was given names its session, never a backend: at each moment it maps to the
//! backend that runs the session's statement *now*, or to none.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

use super::facts::{Facts, Identity, State, Sums, Wait};
use super::pins::PinSet;
use crate::backend::CancelTarget;
use crate::backend::senders::Senders;
use crate::gate::Gate;

/// Process ids that we give out are at least this: PostgreSQL's own are far below, so a client that
/// passes one to `pg_terminate_backend` can never hit a real process.
const FIRST_PID: u32 = 1 << 30;

/// Pairs of database and user whose sums outlive their sessions; further ones are summed as `other`.
const MOST_SUMS: usize = 1000;

/// What a session is doing, as far as a cancel is concerned.
enum Activity {
    /// Nothing that could be cancelled.
    Idle,
    /// It has a statement that no backend has yet.
    Waiting,
    /// This backend runs its statement, or holds its transaction.
    Running(Arc<CancelTarget>),
}

/// A session as others see it.
pub struct SessionHandle {
    /// The process id that the client was told.
    pub pid: u32,
    /// The secret that the client was told.
    pub key: Vec<u8>,
    /// What it shows of itself.
    pub facts: Facts,
    activity: Mutex<Activity>,
    cancelled: AtomicBool,
    pins: AtomicU16,
    ending: AtomicU8,
    /// Another configuration is in force than the session goes by.
    reloaded: AtomicBool,
    waker: AtomicWaker,
}

/// How a session is asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Not at all.
    No,
    /// When it is idle and outside a transaction.
    WhenIdle,
    /// Now.
    Now,
}

impl Ending {
    fn rank(self) -> u8 {
        match self {
            Ending::No => 0,
            Ending::WhenIdle => 1,
            Ending::Now => 2,
        }
    }
}

/// What became of a cancel request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelOutcome {
    /// No session has this key, or it has nothing to cancel.
    Nothing,
    /// The session was waiting; it answers by itself.
    WhileWaiting,
    /// It was sent on to the backend.
    Forwarded,
    /// The node could not be reached.
    Failed,
}

impl SessionHandle {
    fn activity(&self) -> MutexGuard<'_, Activity> {
        self.activity.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// A unit begins: cancels that came for earlier ones are forgotten, and no backend has it yet.
    pub fn begin(&self) {
        let mut activity = self.activity();
        self.cancelled.store(false, Ordering::SeqCst);
        *activity = Activity::Waiting;
    }

    /// The unit that is underway has no backend any more, and will have another.
    pub fn waiting(&self) {
        *self.activity() = Activity::Waiting;
    }

    /// `target` runs the session's statement from now on; unless a cancel came first (`false`).
    #[must_use]
    pub fn running(&self, target: &Arc<CancelTarget>) -> bool {
        let mut activity = self.activity();
        if self.is_cancelled() {
            return false;
        }
        *activity = Activity::Running(target.clone());
        true
    }

    /// Nothing is left to cancel. After this returns no new request goes to the backend.
    pub fn idle(&self) {
        *self.activity() = Activity::Idle;
    }

    /// Why the session is bound to its backend.
    pub fn pins(&self) -> PinSet {
        PinSet::from_bits(self.pins.load(Ordering::Relaxed))
    }

    /// Shows why the session is bound to its backend from now on.
    pub fn show_pins(&self, pins: PinSet) {
        self.pins.store(pins.bits(), Ordering::Relaxed);
    }

    /// Whether a cancel arrived while the session was waiting.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Resolves when a cancel arrives while the session is waiting, or when it is asked to end now.
    pub async fn interrupted(&self) {
        std::future::poll_fn(|cx| {
            self.waker.register(cx.waker());
            if self.is_cancelled() || self.ending() == Ending::Now { Poll::Ready(()) } else { Poll::Pending }
        })
        .await
    }

    /// How the session is asked to end. Registers `cx` to be woken when that changes.
    pub fn poll_ending(&self, cx: &mut Context<'_>) -> Ending {
        self.waker.register(cx.waker());
        self.ending()
    }

    /// How the session is asked to end.
    pub fn ending(&self) -> Ending {
        match self.ending.load(Ordering::SeqCst) {
            0 => Ending::No,
            1 => Ending::WhenIdle,
            _ => Ending::Now,
        }
    }

    /// Whether the session is outside a transaction and does nothing. Takes its lock first, so that a session
    /// that is not seen to begin here sees what was done before this call.
    pub fn is_outside_transactions(&self) -> bool {
        let activity = self.activity();
        let state = self.facts.state();
        drop(activity);
        matches!(state, State::Idle | State::LoggingIn) || self.facts.wait() == Some(Wait::Paused)
    }

    /// Whether another configuration has been put in force since the session last took one over.
    #[inline]
    pub fn is_reloaded(&self) -> bool {
        self.reloaded.load(Ordering::Relaxed)
    }

    /// The session takes over the configuration that is in force: look for it after this.
    pub fn takes_over(&self) {
        self.reloaded.store(false, Ordering::SeqCst);
    }

    /// Asks the session to end.
    pub fn end(&self, how: Ending) {
        self.ending.fetch_max(how.rank(), Ordering::SeqCst);
        self.waker.wake();
    }
}

/// A database and a user.
pub type DatabaseAndUser = (Arc<str>, Arc<str>);

/// All sessions, by the process id that their client was told.
#[derive(Default)]
pub struct Sessions {
    by_pid: Mutex<HashMap<u32, Arc<SessionHandle>>>,
    next: AtomicU32,
    /// What sessions have done that have ended, by database and user; bounded.
    ended: Mutex<HashMap<DatabaseAndUser, Sums>>,
    /// Whose notifications those are that sessions hear.
    pub senders: Senders,
    /// What all sessions are asked to do, those that are yet to come included.
    ending: AtomicU8,
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<SessionHandle>>> {
        self.by_pid.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Registers a session under a fresh process id and a random key of `key_length` bytes.
    pub fn register(&self, key_length: usize, identity: Identity) -> Arc<SessionHandle> {
        let key = (0..key_length).map(|_| rand::random::<u8>()).collect::<Vec<u8>>();
        let mut all = self.lock();
        let pid = loop {
            // 2^30 .. 2^31 - 1: positive as the protocol's Int32.
            let pid = FIRST_PID | (self.next.fetch_add(1, Ordering::Relaxed) & (FIRST_PID - 1));
            if !all.contains_key(&pid) {
                break pid;
            }
        };
        let handle = Arc::new(SessionHandle {
            pid,
            key,
            facts: Facts::new(identity),
            activity: Mutex::new(Activity::Idle),
            cancelled: AtomicBool::new(false),
            pins: AtomicU16::new(0),
            ending: AtomicU8::new(self.ending.load(Ordering::SeqCst)),
            reloaded: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        all.insert(pid, handle.clone());
        handle
    }

    /// Forgets a session that has ended.
    pub fn unregister(&self, pid: u32) {
        let mut all = self.lock();
        let Some(handle) = all.remove(&pid) else { return };
        let identity = &handle.facts.identity;
        let mut ended = self.ended.lock().unwrap_or_else(|p| p.into_inner());
        let mut key = (identity.database.clone(), identity.user.clone());
        if ended.len() >= MOST_SUMS && !ended.contains_key(&key) {
            key = (Arc::from("other"), Arc::from("other"));
        }
        let sums = Sums { sessions: 0, ..handle.facts.sums() };
        ended.entry(key).or_default().add(&sums);
    }

    /// The session with this process id.
    pub fn get(&self, pid: u32) -> Option<Arc<SessionHandle>> {
        self.lock().get(&pid).cloned()
    }

    /// All sessions, in the order of their process ids.
    pub fn all(&self) -> Vec<Arc<SessionHandle>> {
        let mut all: Vec<_> = self.lock().values().cloned().collect();
        all.sort_by_key(|handle| handle.pid);
        all
    }

    /// What sessions have done, those that have ended included, by database and user.
    pub fn sums(&self) -> BTreeMap<DatabaseAndUser, Sums> {
        // Under the lock of the registry: nobody ends between the two looks.
        let all = self.lock();
        let mut sums: BTreeMap<_, Sums> = {
            let ended = self.ended.lock().unwrap_or_else(|p| p.into_inner());
            ended.iter().map(|(key, sums)| (key.clone(), sums.clone())).collect()
        };
        for handle in all.values() {
            let identity = &handle.facts.identity;
            let key = (identity.database.clone(), identity.user.clone());
            sums.entry(key).or_default().add(&handle.facts.sums());
        }
        sums
    }

    /// Asks all sessions to end.
    pub fn end_all(&self, how: Ending) {
        let all: Vec<_> = {
            let all = self.lock();
            // Under the lock of the registry: who registers later sees it.
            self.ending.fetch_max(how.rank(), Ordering::SeqCst);
            all.values().cloned().collect()
        };
        for handle in all {
            handle.end(how);
        }
    }

    /// Tells all sessions that another configuration is in force: those that wait take it over now, the others before
    /// their next statement. One that registers later finds it by itself.
    pub fn reloaded(&self) {
        let all: Vec<_> = self.lock().values().cloned().collect();
        for handle in all {
            handle.reloaded.store(true, Ordering::SeqCst);
            handle.waker.wake();
        }
    }

    /// Wakes all sessions whenever connections are told to close, so that those that have one of them let go of it;
    /// for ever.
    pub async fn wake_at(&self, gate: &Gate) {
        let mut seen = 0;
        loop {
            gate.closing(&mut seen).await;
            let all: Vec<_> = self.lock().values().cloned().collect();
            all.iter().for_each(|handle| handle.waker.wake());
        }
    }

    /// Sessions now.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// Carries out a cancel request. `send` delivers it to a backend.
    pub async fn cancel<F, Fut>(&self, pid: i32, key: &[u8], send: F) -> CancelOutcome
    where
        F: FnOnce(Arc<CancelTarget>) -> Fut,
        Fut: Future<Output = std::io::Result<()>>,
    {
        let Some(handle) = u32::try_from(pid).ok().and_then(|pid| self.lock().get(&pid).cloned()) else {
            return CancelOutcome::Nothing;
        };
        if !same(&handle.key, key) {
            return CancelOutcome::Nothing;
        }
        let target = {
            let activity = handle.activity();
            match &*activity {
                Activity::Idle => return CancelOutcome::Nothing,
                Activity::Waiting => {
                    handle.cancelled.store(true, Ordering::SeqCst);
                    handle.waker.wake();
                    return CancelOutcome::WhileWaiting;
                }
                // Counted while the session cannot give the backend back: the fence is up before it can.
                Activity::Running(target) => {
                    target.announce();
                    target.clone()
                }
            }
        };
        let underway = target.underway();
        let result = send(target.clone()).await;
        match result {
            Ok(()) => {
                underway.arrived();
                CancelOutcome::Forwarded
            }
            Err(_) => CancelOutcome::Failed,
        }
    }
}

/// Comparison whose time does not tell where two keys differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |diff, (x, y)| diff | (x ^ y)) == 0
}
