//! What has run, by skeleton: how often, where, and how long it took.
//!
//! One table for each worker, so that workers never wait for each other here; the least recently run goes when it is
//! full. No literal is ever kept: a text is turned into its skeleton before it is stored.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use lru::LruCache;

use crate::classify::{Lexing, StatementClass, skeleton_text};

/// Bytes of a skeleton that are kept.
const TEXT_BYTES: usize = 500;

/// Workers whose tables are kept apart; further ones share them.
const TABLES: usize = 64;

/// What has run under one skeleton.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The text without its literals.
    pub text: Arc<str>,
    /// The database.
    pub database: Arc<str>,
    /// The class when it was seen first.
    pub class: StatementClass,
    /// How often it ran on the primary.
    pub on_primary: u64,
    /// How often it ran on replicas.
    pub on_replicas: u64,
    /// How long it took, all together.
    pub total: Duration,
    /// The longest.
    pub longest: Duration,
}

impl Entry {
    fn ran(&mut self, on_replica: bool, took: Duration) {
        if on_replica {
            self.on_replicas += 1;
        } else {
            self.on_primary += 1;
        }
        self.total += took;
        self.longest = self.longest.max(took);
    }
}

/// What a new entry is made of.
pub struct Seen<'a> {
    /// The text as the client sent it.
    pub text: &'a [u8],
    /// How it is to be read.
    pub lexing: Lexing,
    /// Where.
    pub database: &'a Arc<str>,
    /// What it was found to be.
    pub class: StatementClass,
}

type Table = LruCache<u64, Entry>;

/// What has run.
pub struct Ledger {
    /// Entries of a worker's table; `None`: nothing is kept.
    size: Option<NonZeroUsize>,
    tables: Box<[OnceLock<Mutex<Table>>]>,
    displaced: AtomicU64,
}

impl Ledger {
    /// Of `entries` skeletons for each worker (`limits.statement_stats`); 0: none.
    pub fn new(entries: usize, workers: usize) -> Ledger {
        let tables = workers.clamp(1, TABLES);
        Ledger {
            size: NonZeroUsize::new(entries),
            tables: (0..tables).map(|_| OnceLock::new()).collect(),
            displaced: AtomicU64::new(0),
        }
    }

    /// Whether anything is kept.
    pub fn is_kept(&self) -> bool {
        self.size.is_some()
    }

    fn table(&self, worker: usize) -> Option<MutexGuard<'_, Table>> {
        let size = self.size?;
        let table = self.tables[worker % self.tables.len()].get_or_init(|| Mutex::new(LruCache::new(size)));
        Some(table.lock().unwrap_or_else(|p| p.into_inner()))
    }

    /// Keeps a place for a statement whose text is at hand now, but not when it has run.
    pub fn expect(&self, worker: usize, key: u64, seen: &Seen<'_>) {
        let Some(mut table) = self.table(worker) else { return };
        if table.peek(&key).is_none() {
            self.insert(&mut table, key, seen);
        }
    }

    fn insert(&self, table: &mut Table, key: u64, seen: &Seen<'_>) {
        let text = match seen.lexing {
            // Where a literal ends cannot be told, and so none of it can be shown.
            Lexing::Unsafe => "(not readable: client_encoding or standard_conforming_strings)".to_owned(),
            _ => skeleton_text(seen.text, TEXT_BYTES),
        };
        let entry = Entry {
            text: text.into(),
            database: seen.database.clone(),
            class: seen.class,
            on_primary: 0,
            on_replicas: 0,
            total: Duration::ZERO,
            longest: Duration::ZERO,
        };
        if table.push(key, entry).is_some_and(|(gone, _)| gone != key) {
            self.displaced.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A statement has run; `seen`, should it not be known any more.
    pub fn ran(&self, worker: usize, key: u64, on_replica: bool, took: Duration, seen: Option<Seen<'_>>) {
        let Some(mut table) = self.table(worker) else { return };
        if let Some(entry) = table.get_mut(&key) {
            return entry.ran(on_replica, took);
        }
        if let Some(seen) = seen {
            self.insert(&mut table, key, &seen);
            if let Some(entry) = table.get_mut(&key) {
                entry.ran(on_replica, took);
            }
        }
    }

    /// Entries that had to go, so far.
    pub fn displaced(&self) -> u64 {
        self.displaced.load(Ordering::Relaxed)
    }

    /// All that is kept, of all workers; those that ran most of the time first.
    pub fn entries(&self) -> Vec<Entry> {
        // What was judged in another way, for example before the catalog facts were there, stays apart.
        let mut all: HashMap<(Arc<str>, Arc<str>, StatementClass), Entry> = HashMap::new();
        for table in self.tables.iter().filter_map(OnceLock::get) {
            let copied: Vec<Entry> =
                table.lock().unwrap_or_else(|p| p.into_inner()).iter().map(|(_, e)| e.clone()).collect();
            for entry in copied.into_iter().filter(|entry| entry.on_primary + entry.on_replicas > 0) {
                match all.entry((entry.database.clone(), entry.text.clone(), entry.class)) {
                    std::collections::hash_map::Entry::Vacant(place) => _ = place.insert(entry),
                    std::collections::hash_map::Entry::Occupied(mut place) => {
                        let sum = place.get_mut();
                        sum.on_primary += entry.on_primary;
                        sum.on_replicas += entry.on_replicas;
                        sum.total += entry.total;
                        sum.longest = sum.longest.max(entry.longest);
                    }
                }
            }
        }
        let mut all: Vec<Entry> = all.into_values().collect();
        all.sort_by(|a, b| b.total.cmp(&a.total).then_with(|| a.text.cmp(&b.text)));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::{ClassReason, Kind, Leaves};

    fn seen<'a>(text: &'a [u8], database: &'a Arc<str>) -> Seen<'a> {
        let class = StatementClass {
            kind: Kind::Read,
            reason: ClassReason::Read,
            leaves: Leaves::NOTHING,
            settings: false,
            hints: Default::default(),
        };
        Seen { text, lexing: Lexing::Utf8, database, class }
    }

    #[test]
    fn workers_are_summed_and_the_least_recent_goes() {
        let (ledger, d) = (Ledger::new(2, 2), Arc::from("d"));
        let took = Duration::from_millis(2);
        ledger.expect(0, 1, &seen(b"select 1", &d));
        ledger.ran(0, 1, true, took, None);
        ledger.ran(1, 7, false, took * 2, Some(seen(b"select 'secret'", &d)));
        let entries = ledger.entries();
        assert_eq!(entries.len(), 1, "{entries:?}");
        assert_eq!((&*entries[0].text, entries[0].on_primary, entries[0].on_replicas), ("select ?", 1, 1));
        assert_eq!((entries[0].total, entries[0].longest), (took * 3, took * 2));
        for key in 10..13 {
            ledger.ran(0, key, true, took, Some(seen(format!("select a{key}").as_bytes(), &d)));
        }
        assert_eq!((ledger.entries().len(), ledger.displaced()), (3, 2));
        // What went and has no text at hand is not counted under another's name.
        ledger.ran(0, 1, true, took, None);
        assert_eq!(ledger.entries().len(), 3);
        let off = Ledger::new(0, 2);
        off.ran(0, 1, true, took, Some(seen(b"select 1", &d)));
        assert!(off.entries().is_empty() && !off.is_kept());
        let unsafe_text = Seen { lexing: Lexing::Unsafe, ..seen(b"select 'a\\'b'", &d) };
        ledger.ran(0, 9, true, took, Some(unsafe_text));
        assert!(ledger.entries().iter().any(|entry| entry.text.starts_with("(not readable")));
    }
}
