//! How many connections the pools may have to one node together, and which of them opens the next.
//!
//! Promises: with `pool.max_backends_per_node` no more are open or being opened (after a reload has lowered it, as soon
//! as they are given back). Pools that find the node full stand in line and are given one place a turn, so none of them
//! waits for ever. A place is free again when its connection is dropped, however that comes about.
//!
//! Deliberately not here: which idle connection makes room ([`super::pool`]), connections of our own and replication.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use tokio::sync::Notify;

/// The places on one node. `P`: what stands in line for them, the pools.
pub struct Places<P> {
    /// Zero: as many as are asked for.
    most: AtomicUsize,
    /// Changed under the lock of `line` only.
    taken: AtomicUsize,
    /// The length of `line`, for a look without the lock.
    waiting: AtomicUsize,
    line: Mutex<VecDeque<Weak<P>>>,
    /// Somebody in line may be helped now.
    help: Arc<Notify>,
}

/// One connection's place on its node, free again when dropped.
pub struct Place(Arc<dyn Taken>);

trait Taken: Send + Sync {
    fn free(&self);
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.free();
    }
}

impl<P: Send + Sync + 'static> Taken for Places<P> {
    fn free(&self) {
        let line = self.lock();
        self.taken.fetch_sub(1, Ordering::Relaxed);
        if !line.is_empty() {
            self.help.notify_one();
        }
    }
}

/// What becomes of the first in line.
pub enum Next<P> {
    /// It has a place.
    Placed(Arc<P>, Place),
    /// Every place is taken.
    Full,
    /// Nobody waits.
    Nobody,
}

impl<P: Send + Sync + 'static> Places<P> {
    /// All are free; none is bounded yet. `help` is told when somebody in line may be helped.
    pub fn new(help: Arc<Notify>) -> Arc<Places<P>> {
        Arc::new(Places {
            most: AtomicUsize::new(0),
            taken: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            line: Mutex::default(),
            help,
        })
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Weak<P>>> {
        self.line.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// From now on so many; zero: no bound.
    pub fn bound(&self, most: usize) {
        self.most.store(most, Ordering::Relaxed);
        self.help.notify_one();
    }

    fn is_full(&self) -> bool {
        let most = self.most.load(Ordering::Relaxed);
        most > 0 && self.taken.load(Ordering::Relaxed) >= most
    }

    /// More are taken than there may be.
    pub fn is_over(&self) -> bool {
        let most = self.most.load(Ordering::Relaxed);
        most > 0 && self.taken.load(Ordering::Relaxed) > most
    }

    /// Somebody stands in line.
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    fn place(self: &Arc<Self>) -> Place {
        self.taken.fetch_add(1, Ordering::Relaxed);
        Place(self.clone())
    }

    /// A place, if one is free and nobody stands in line for it.
    pub fn take(self: &Arc<Self>) -> Option<Place> {
        let line = self.lock();
        (line.is_empty() && !self.is_full()).then(|| self.place())
    }

    /// `pool` stands in line, once. Whether it does only now.
    pub fn line_up(&self, pool: &Arc<P>) -> bool {
        let mut line = self.lock();
        if line.iter().any(|other| std::ptr::eq(other.as_ptr(), Arc::as_ptr(pool))) {
            return false;
        }
        line.push_back(Arc::downgrade(pool));
        self.waiting.store(line.len(), Ordering::Relaxed);
        // Something may have become free, or somebody may have something to spare.
        self.help.notify_one();
        true
    }

    /// The first in line, who stays there.
    pub fn first(&self) -> Option<Arc<P>> {
        self.lock().iter().find_map(Weak::upgrade)
    }

    /// Gives the first in line a place, if there is one.
    pub fn next(self: &Arc<Self>) -> Next<P> {
        let mut line = self.lock();
        loop {
            if line.is_empty() {
                return Next::Nobody;
            }
            if self.is_full() {
                return Next::Full;
            }
            let first = line.pop_front().and_then(|pool| pool.upgrade());
            self.waiting.store(line.len(), Ordering::Relaxed);
            if let Some(pool) = first {
                return Next::Placed(pool, self.place());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(most: usize) -> Arc<Places<u8>> {
        let places = Places::new(Arc::default());
        places.bound(most);
        places
    }

    fn next(places: &Arc<Places<u8>>) -> Result<(u8, Place), &'static str> {
        match places.next() {
            Next::Placed(pool, place) => Ok((*pool, place)),
            Next::Full => Err("full"),
            Next::Nobody => Err("nobody"),
        }
    }

    #[test]
    fn no_more_are_taken_than_there_are_and_a_dropped_one_is_free() {
        let two = places(2);
        let (first, second) = (two.take(), two.take());
        assert!(first.is_some() && second.is_some() && two.take().is_none());
        drop(first);
        assert!(two.take().is_some(), "and dropped at once");
        two.bound(1);
        let third = two.take();
        assert!(third.is_none() && !two.is_over());
        two.bound(0);
        let many: Vec<_> = (0..100).map_while(|_| two.take()).collect();
        assert_eq!(many.len(), 100);
        two.bound(50);
        assert!(two.is_over() && two.take().is_none());
    }

    #[test]
    fn who_stands_in_line_is_served_in_turn_and_nobody_overtakes() {
        let one = places(1);
        let held = one.take().unwrap();
        let (a, b) = (Arc::new(1), Arc::new(2));
        assert!(one.line_up(&a) && one.line_up(&b) && !one.line_up(&a) && one.is_wanted());
        assert_eq!(next(&one).err(), Some("full"));
        drop(held);
        assert!(one.take().is_none(), "free, but not for who has just come");
        let (pool, place) = next(&one).unwrap();
        assert_eq!(pool, 1);
        assert!(one.line_up(&a), "behind the other");
        drop(place);
        assert_eq!(next(&one).unwrap().0, 2);
        drop(a);
        assert_eq!(next(&one).err(), Some("nobody"), "who is gone wants nothing");
        assert!(!one.is_wanted() && one.take().is_some());
    }
}
