//! Marks that several sessions share: named sessions, and level `global`.
//!
//! A web application's requests come by whichever connection of its pool is free: what one has written the
//! next may not see yet. Connections that name the same session (`SET highwater.session = 'user-42'`) share one
//! mark, and so do all sessions at level `global`. Whoever is shown something sets its note *before* a byte of
//! it goes on to its client: nobody can be told of it, and ask through another connection, before that.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::mark::{self, Mark, Samples, Survival};
use crate::positions::{Incarnation, Note};
use crate::topology::{Epoch, Topology};

/// A mark that several sessions share.
#[derive(Debug)]
pub struct SharedMark(Mutex<Shared>);

#[derive(Debug)]
struct Shared {
    mark: Mark,
    /// What changes of the primary have meant for it, if not that all is kept: each of those who share it is told.
    changes: VecDeque<(Epoch, Survival)>,
    /// Of changes up to here somebody has been told, and has gone on since.
    told: Epoch,
}

/// Changes that are remembered; who has not been heard of for longer is told of a loss.
const CHANGES: usize = 16;

impl Shared {
    fn follow(&mut self, samples: &impl Samples, topology: &Topology) {
        let survival = self.mark.follow(samples, topology);
        if survival != Survival::Kept {
            self.changes.push_back((topology.epoch, survival));
            let excess = self.changes.len().saturating_sub(CHANGES);
            self.changes.drain(..excess);
        }
    }

    /// The worst that the changes after `epoch` have meant.
    fn since(&self, epoch: Epoch) -> Survival {
        let since = self.changes.iter().filter(|(at, _)| *at > epoch);
        since.fold(Survival::Kept, |worst, (_, survival)| mark::worse(worst, survival.clone()))
    }
}

impl SharedMark {
    /// With the mark of a new session: it begins where the primary is now.
    pub fn new(mark: Mark) -> SharedMark {
        let told = mark.epoch();
        SharedMark(Mutex::new(Shared { mark, changes: VecDeque::new(), told }))
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mark, brought up to the topology and the samples.
    pub fn bring_forward(&self, samples: &impl Samples, topology: &Topology) -> Mark {
        let mut shared = self.lock();
        shared.follow(samples, topology);
        if shared.mark.epoch() == topology.epoch {
            shared.mark.absorb(samples, topology);
        }
        shared.mark.clone()
    }

    /// The worst that the changes of the primary since `epoch` have meant for those who share the mark: what
    /// one of them wrote or saw, all of them count on.
    pub fn survival_since(&self, epoch: Epoch, samples: &impl Samples, topology: &Topology) -> Survival {
        let mut shared = self.lock();
        shared.follow(samples, topology);
        shared.since(epoch)
    }

    /// The same of changes that nobody is known to have heard of, because all who shared the mark had ended before, or
    /// have yet to go on after what they were told: for one who joins them.
    pub fn survival_untold(&self, samples: &impl Samples, topology: &Topology) -> Survival {
        let mut shared = self.lock();
        shared.follow(samples, topology);
        shared.since(shared.told)
    }

    /// One who shares the mark was told of the changes up to `epoch`, and has asked for something else since. Before
    /// that nobody knows whether it has heard: its connection may have broken first.
    pub fn heard(&self, epoch: Epoch) {
        let mut shared = self.lock();
        shared.told = shared.told.max(epoch);
    }

    /// All that `other` stands for is in it from now on.
    pub fn join(&self, other: &Mark, samples: &impl Samples, topology: &Topology) {
        let mut shared = self.lock();
        shared.follow(samples, topology);
        let mark = &mut shared.mark;
        if mark.epoch() == other.epoch() {
            mark.join(other, samples, topology);
        }
    }

    /// The primary has shown something to one of the sessions, or is about to.
    pub fn primary_showed(&self, note: Note, samples: &impl Samples, topology: &Topology) {
        let mut shared = self.lock();
        shared.follow(samples, topology);
        let mark = &mut shared.mark;
        if mark.epoch() == note.epoch {
            // What is known of the earlier note need not be merged with this one.
            if mark.epoch() == topology.epoch {
                mark.absorb(samples, topology);
            }
            mark.primary_showed_one(note, samples, topology);
        }
    }

    /// A replica has shown something to one of the sessions, or is about to.
    pub fn replica_showed(
        &self,
        note: Note,
        incarnation: Incarnation,
        beside: Option<u64>,
        samples: &impl Samples,
        topology: &Topology,
    ) {
        let mut shared = self.lock();
        shared.follow(samples, topology);
        let mark = &mut shared.mark;
        if mark.epoch() == note.epoch {
            // What is known of the earlier note need not be merged with this one.
            if mark.epoch() == topology.epoch {
                mark.absorb(samples, topology);
            }
            mark.replica_showed_one(note, incarnation, beside, samples, topology);
        }
    }

    /// As [`Mark::leave_stalled`].
    pub fn leave_stalled(&self, samples: &impl Samples, topology: &Topology) -> bool {
        self.lock().mark.leave_stalled(samples, topology)
    }

    /// As [`Mark::raise`].
    pub fn raise(&self, position: crate::wal::Lsn) {
        self.lock().mark.raise(position);
    }
}

/// The mark of level `global`. It costs nothing until a session first asks for that level.
#[derive(Debug)]
pub struct GlobalMark {
    in_use: AtomicBool,
    mark: Mutex<Option<Arc<SharedMark>>>,
}

impl GlobalMark {
    /// Not in use.
    pub fn unused() -> GlobalMark {
        GlobalMark { in_use: AtomicBool::new(false), mark: Mutex::new(None) }
    }

    /// The mark, if any session has ever asked for the level.
    pub fn current(&self) -> Option<Arc<SharedMark>> {
        if !self.in_use.load(Ordering::Acquire) {
            return None;
        }
        self.mark.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The mark, for a session at level `global`. The first begins where the primary is then: all that
    /// was acknowledged to anybody before is covered.
    pub fn join(&self, begin: impl FnOnce() -> Mark) -> Arc<SharedMark> {
        let mut mark = self.mark.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = mark.get_or_insert_with(|| {
            // Set before the mark begins: whoever writes from here on sets its note, or has been
            // acknowledged before the note that the mark begins with.
            self.in_use.store(true, Ordering::Release);
            Arc::new(SharedMark::new(begin()))
        });
        Arc::clone(shared)
    }
}

/// Why a session cannot join a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The table is full of names that are in use.
    Full,
    /// The name is empty or longer than [`NamedMarks::NAME_BYTES`].
    Name,
}

/// The named sessions: a bounded table of marks by user and name, so that nobody can slow (or follow) another
/// user's. An unused name may be forgotten at any time: who names it next begins where the primary is then,
/// which is at or past all that it stood for.
#[derive(Debug)]
pub struct NamedMarks {
    limit: usize,
    idle: Duration,
    marks: HashMap<(Arc<str>, Box<[u8]>), Named>,
}

#[derive(Debug)]
struct Named {
    mark: Arc<SharedMark>,
    joined: Instant,
}

impl NamedMarks {
    /// Bytes of a name at most.
    pub const NAME_BYTES: usize = 256;

    /// At most `limit` names; one that nobody uses is forgotten `idle` after it was last joined.
    pub fn new(limit: usize, idle: Duration) -> NamedMarks {
        NamedMarks { limit, idle, marks: HashMap::new() }
    }

    /// Other bounds, from now on. Names above the limit stay until they make room.
    pub fn bound(&mut self, limit: usize, idle: Duration) {
        (self.limit, self.idle) = (limit, idle);
    }

    /// Names now.
    pub fn len(&self) -> usize {
        self.marks.len()
    }

    /// Whether there is no name.
    pub fn is_empty(&self) -> bool {
        self.marks.is_empty()
    }

    /// The mark of `user`'s session `name`; a name never seen, or forgotten, starts with `begin`.
    pub fn join(
        &mut self,
        user: &Arc<str>,
        name: &[u8],
        now: Instant,
        begin: impl FnOnce() -> Mark,
    ) -> Result<Arc<SharedMark>, Refused> {
        if name.is_empty() || name.len() > NamedMarks::NAME_BYTES {
            return Err(Refused::Name);
        }
        let key = (Arc::clone(user), Box::from(name));
        if let Some(named) = self.marks.get_mut(&key) {
            named.joined = now;
            return Ok(Arc::clone(&named.mark));
        }
        if self.marks.len() >= self.limit {
            self.forget(now);
        }
        if self.marks.len() >= self.limit {
            return Err(Refused::Full);
        }
        let mark = Arc::new(SharedMark::new(begin()));
        self.marks.insert(key, Named { mark: Arc::clone(&mark), joined: now });
        Ok(mark)
    }

    /// Makes room: names that have been idle for long, or else the tenth of the unused that was joined longest
    /// ago, so that a full table is not searched for each new name.
    fn forget(&mut self, now: Instant) {
        let unused = |named: &Named| Arc::strong_count(&named.mark) == 1;
        let idle = self.idle;
        self.marks.retain(|_, named| !unused(named) || now.saturating_duration_since(named.joined) < idle);
        if self.marks.len() < self.limit {
            return;
        }
        let mut joined: Vec<Instant> = self.marks.values().filter(|n| unused(n)).map(|n| n.joined).collect();
        if joined.is_empty() {
            return;
        }
        let at = joined.len() / 10;
        let (_, last, _) = joined.select_nth_unstable(at);
        let last = *last;
        self.marks.retain(|_, named| !unused(named) || named.joined > last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::positions::Positions;
    use crate::topology::Topology;

    fn mark() -> Mark {
        let topology = Topology {
            epoch: Epoch(1),
            system_identifier: Some(1),
            primary: None,
            timeline: None,
            nodes: Vec::new(),
            start: None,
            history: None,
            switches: Vec::new(),
        };
        Mark::new(&Positions::new(1), &topology)
    }

    #[test]
    fn a_name_is_one_users_own() {
        let mut table = NamedMarks::new(10, Duration::from_secs(60));
        let (ann, bob): (Arc<str>, Arc<str>) = (Arc::from("ann"), Arc::from("bob"));
        let now = Instant::now();
        let first = table.join(&ann, b"s", now, mark).unwrap();
        assert!(Arc::ptr_eq(&first, &table.join(&ann, b"s", now, mark).unwrap()));
        assert!(!Arc::ptr_eq(&first, &table.join(&bob, b"s", now, mark).unwrap()));
        assert!(!Arc::ptr_eq(&first, &table.join(&ann, b"t", now, mark).unwrap()));
        assert_eq!(table.join(&ann, b"", now, mark).unwrap_err(), Refused::Name);
        assert_eq!(table.join(&ann, &[b'x'; 257], now, mark).unwrap_err(), Refused::Name);
    }

    #[test]
    fn a_full_table_forgets_what_nobody_uses_and_never_what_somebody_does() {
        let mut table = NamedMarks::new(3, Duration::from_secs(60));
        let user: Arc<str> = Arc::from("u");
        let now = Instant::now();
        let used = table.join(&user, b"used", now, mark).unwrap();
        for name in 0..100u8 {
            table.join(&user, &[name, 1], now + Duration::from_millis(u64::from(name)), mark).unwrap();
            assert!(table.len() <= 3);
        }
        assert!(Arc::ptr_eq(&used, &table.join(&user, b"used", now, mark).unwrap()));
        let _held = [
            table.join(&user, &[99, 1], now, mark).unwrap(),
            table.join(&user, b"third", now, mark).unwrap(),
        ];
        assert_eq!(table.join(&user, b"fourth", now, mark).unwrap_err(), Refused::Full);
    }
}
