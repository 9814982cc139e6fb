//! The verdicts, by the hash of the whole text, of its shape and of its skeleton: tables of fixed size
//! in which a hit costs one short lock and nothing is ever allocated.
//!
//! Set-associative: a hash names one small set, whose entries displace each other in turn. What is
//! displaced is classified again, so a flood of texts costs time, never memory and never a wrong verdict.

use std::sync::Mutex;

use super::{ClassKey, StatementClass};

/// Entries that share a set, and so its lock.
const WAYS: usize = 4;

#[derive(Debug)]
pub(super) struct Cache {
    whole: Table<(StatementClass, u128)>,
    shapes: Table<(StatementClass, u128)>,
    skeletons: Table<StatementClass>,
}

impl Cache {
    /// Of at least `entries` entries in each table.
    pub(super) fn new(entries: usize) -> Cache {
        Cache { whole: Table::new(entries), shapes: Table::new(entries), skeletons: Table::new(entries) }
    }

    /// The class and the skeleton of a whole text.
    pub(super) fn whole(&self, key: u128) -> Option<(StatementClass, u128)> {
        self.whole.get(key)
    }

    /// The class and the skeleton of a shape's texts. A read is one as long as its skeleton's is: a replica may have
    /// refused it since.
    pub(super) fn shape(&self, key: u128) -> Option<(StatementClass, u128)> {
        let (class, skeleton) = self.shapes.get(key)?;
        if class.is_read() {
            Some((self.skeletons.get(skeleton)?, skeleton))
        } else {
            Some((class, skeleton))
        }
    }

    pub(super) fn put_shape(&self, key: u128, class: StatementClass, skeleton: u128) {
        self.shapes.put(key, (class, skeleton));
    }

    pub(super) fn skeleton(&self, key: u128) -> Option<StatementClass> {
        self.skeletons.get(key)
    }

    /// Remembers a text's class; one that is too long to be looked up is passed over.
    pub(super) fn put_whole(&self, key: ClassKey, class: StatementClass) {
        if key.whole != 0 {
            self.whole.put(key.whole, (class, key.skeleton));
        }
    }

    pub(super) fn put_skeleton(&self, key: u128, class: StatementClass) {
        self.skeletons.put(key, class);
    }
}

#[derive(Debug)]
struct Table<T> {
    sets: Box<[Mutex<Set<T>>]>,
}

#[derive(Debug)]
struct Set<T> {
    entries: [Option<(u128, T)>; WAYS],
    next: usize,
}

impl<T: Copy> Table<T> {
    fn new(entries: usize) -> Table<T> {
        let sets = entries.div_ceil(WAYS).clamp(1, 1 << 24).next_power_of_two();
        Table { sets: (0..sets).map(|_| Mutex::new(Set { entries: [None; WAYS], next: 0 })).collect() }
    }

    fn set(&self, key: u128) -> std::sync::MutexGuard<'_, Set<T>> {
        let index = key as usize & (self.sets.len() - 1);
        self.sets[index].lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn get(&self, key: u128) -> Option<T> {
        self.set(key).entries.iter().flatten().find(|(held, _)| *held == key).map(|(_, value)| *value)
    }

    fn put(&self, key: u128, value: T) {
        let mut set = self.set(key);
        if let Some(entry) = set.entries.iter_mut().flatten().find(|(held, _)| *held == key) {
            entry.1 = value;
            return;
        }
        let next = set.next;
        set.entries[next] = Some((key, value));
        set.next = (next + 1) % WAYS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_its_latest() {
        let table = Table::new(1);
        for key in 0..10u128 {
            table.put(key, key);
        }
        assert_eq!((0..10).filter(|key| table.get(*key) == Some(*key)).collect::<Vec<_>>(), [6, 7, 8, 9]);
        table.put(8, 80);
        assert_eq!(table.get(8), Some(80));
    }
}
