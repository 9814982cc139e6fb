//! `PAUSE`: statements are held before they begin, in one database or in all.
//!
//! Why `PAUSE` misses nobody: a session shows itself active and takes the lock of its handle *before* it looks here;
//! `PAUSE` is set *before* each session's lock is taken and its state is read. Whichever comes second sees the first.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;

/// Databases that may be paused one by one; more: all of them.
pub const MOST: usize = 1000;

/// Who is paused.
#[derive(Default)]
pub struct Pauses {
    any: AtomicBool,
    held: Mutex<Held>,
    resumed: Notify,
}

#[derive(Default)]
struct Held {
    all: bool,
    databases: BTreeSet<Box<str>>,
}

impl Pauses {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Whether statements in `database` are held. One load where nothing is paused.
    pub fn holds(&self, database: &str) -> bool {
        if !self.any.load(Ordering::Relaxed) {
            return false;
        }
        let held = self.lock();
        held.all || held.databases.contains(database)
    }

    /// Holds what begins from now on in `database`, or anywhere. Whether it was not held already; `None`: too many are.
    pub fn pause(&self, database: Option<&str>) -> Option<bool> {
        let mut held = self.lock();
        let new = match database {
            None => !std::mem::replace(&mut held.all, true),
            Some(name) if held.databases.len() >= MOST && !held.databases.contains(name) => return None,
            Some(name) => held.databases.insert(name.into()),
        };
        self.any.store(true, Ordering::SeqCst);
        Some(new)
    }

    /// Lets `database`, or all, go on. Whether anything was held.
    pub fn resume(&self, database: Option<&str>) -> bool {
        let others = match database {
            None => !std::mem::take(&mut self.lock().databases).is_empty(),
            Some(_) => false,
        };
        self.take_back(database) | others
    }

    /// Undoes one [`pause`](Self::pause). Whether it was there.
    pub fn take_back(&self, database: Option<&str>) -> bool {
        let mut held = self.lock();
        let was = match database {
            None => std::mem::take(&mut held.all),
            Some(name) => held.databases.remove(name),
        };
        self.any.store(held.all || !held.databases.is_empty(), Ordering::SeqCst);
        drop(held);
        self.resumed.notify_waiters();
        was
    }

    /// Resolves at the next [`resume`](Self::resume) after the future was created.
    pub fn resumed(&self) -> tokio::sync::futures::Notified<'_> {
        self.resumed.notified()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_database_or_all() {
        let pauses = Pauses::default();
        assert!(!pauses.holds("a"));
        assert_eq!((pauses.pause(Some("a")), pauses.pause(Some("a"))), (Some(true), Some(false)));
        assert!(pauses.holds("a") && !pauses.holds("b"));
        assert_eq!(pauses.pause(None), Some(true));
        assert!(pauses.holds("b"));
        assert!(pauses.take_back(None) && pauses.holds("a") && !pauses.holds("b"));
        assert_eq!(pauses.pause(None), Some(true));
        assert!(pauses.resume(None) && !pauses.resume(None));
        assert!(!pauses.holds("a"));
        assert!(!pauses.resume(Some("a")));
    }
}
