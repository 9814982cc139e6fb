//! What a session is promised, and what follows from it: whose mark it shares, what counts for it, and how
//! many of its reads may burden the primary.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::mark::{Freshness, Mark};
use super::shared_mark::Refused;
use super::{Role, Session};
use crate::consistency::Level;
use crate::topology::{Epoch, NodeId};

impl Session {
    /// Takes the mark that the session's level asks for.
    pub(super) fn share_mark(&mut self) {
        if self.promise.level == Level::Global {
            let topology = self.shared.topology.load_full();
            let positions = self.shared.positions.clone();
            let global = self.shared.global_mark.join(|| Mark::new(&*positions, &topology));
            self.bring_mark_forward(&topology);
            global.join(&self.mark, &*positions, &topology);
            self.shared_mark = Some(global);
            self.bring_mark_forward(&topology);
        }
    }

    /// Shares the mark of all connections of this user that use `name`.
    #[allow(dead_code, reason = "SET highwater.session comes with the next commits")]
    pub(super) fn join_named(&mut self, user: &Arc<str>, name: &[u8]) -> Result<(), Refused> {
        let topology = self.shared.topology.load_full();
        let positions = self.shared.positions.clone();
        let mut names = self.shared.named_marks.lock().unwrap_or_else(PoisonError::into_inner);
        let named = names.join(user, name, Instant::now(), || Mark::new(&*positions, &topology))?;
        drop(names);
        self.bring_mark_forward(&topology);
        named.join(&self.mark, &*positions, &topology);
        self.shared_mark = Some(named);
        self.bring_mark_forward(&topology);
        Ok(())
    }

    /// From now on the mark is the session's own, at or past the one it shared.
    #[allow(dead_code, reason = "as above")]
    pub(super) fn leave_shared_mark(&mut self) {
        self.shared_mark = None;
        self.share_mark();
    }

    /// Sets the notes on `node` that concern others, too. Whether the session's own mark is among them.
    pub(super) fn note_for_others(&mut self, node: NodeId, epoch: Epoch, writes: bool) -> bool {
        let global = self.shared.global_mark.current();
        let beside = match (&self.shared_mark, &global) {
            (Some(own), Some(global)) => writes && !Arc::ptr_eq(own, global),
            (None, Some(_)) => writes,
            (_, None) => false,
        };
        if self.shared_mark.is_none() && !beside {
            return false;
        }
        let topology = self.shared.topology.load_full();
        let positions = self.shared.positions.clone();
        let note = positions.note(node, epoch);
        if beside && let Some(global) = &global {
            global.primary_showed(note, &*positions, &topology);
        }
        let Some(own) = &self.shared_mark else { return false };
        match self.role {
            Role::Primary => own.primary_showed(note, &*positions, &topology),
            Role::Replica => own.replica_showed(note, self.incarnation, &*positions, &topology),
        }
        self.mark = own.bring_forward(&*positions, &topology);
        true
    }

    /// Bytes of an answer are about to go to the client, who may tell others of them: marks that others share
    /// have their note before that.
    pub(super) fn note_before_bytes(&mut self, node: NodeId, epoch: Epoch, writes: bool) {
        if self.shared_mark.is_none() && !writes {
            return;
        }
        if writes || self.promise.level.notes_reads() {
            self.note_for_others(node, epoch, writes);
        }
    }

    /// What the next statement must be shown, if the level is `strong`.
    pub(super) fn ask_freshness(&mut self) {
        if self.promise.level == Level::Strong {
            let topology = self.shared.topology.load();
            self.freshness = Freshness::of_now(&*self.shared.positions, &topology);
        } else {
            self.freshness = None;
        }
    }
}

/// How many reads went to the primary because no replica was fresh enough, out of how many: shared by all
/// sessions, counted in windows so that the past fades.
#[derive(Debug, Default)]
pub struct PrimaryReads {
    /// All reads (high half) and those on the primary (low half) of this window.
    window: AtomicU64,
}

/// Reads after which both counts are halved.
const WINDOW: u32 = 4096;
/// Reads below which a share says nothing.
const LEAST: u32 = 64;

impl PrimaryReads {
    /// A read was placed; `stale`: on the primary, because no replica was fresh enough.
    pub fn count(&self, stale: bool) {
        let step = |packed: u64| {
            let (all, stale) = ((packed >> 32) + 1, (packed & 0xFFFF_FFFF) + u64::from(stale));
            if all >= u64::from(WINDOW) { ((all / 2) << 32) | (stale / 2) } else { (all << 32) | stale }
        };
        // Ordering among the counts of one word is all that is needed.
        let _ = self.window.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |packed| Some(step(packed)));
    }

    /// Whether one more stale read keeps within `cap` percent of all.
    pub fn allows(&self, cap: u32) -> bool {
        let packed = self.window.load(Ordering::Relaxed);
        let (all, stale) = (packed >> 32, packed & 0xFFFF_FFFF);
        if cap >= 100 {
            return true;
        }
        // With few reads yet, the share of one would be much: a few are let through, none at a cap of 0.
        let of = all.max(u64::from(LEAST));
        (stale + 1) * 100 <= of * u64::from(cap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_stale_reads_is_kept_below_the_cap() {
        for cap in [0, 1, 10, 50, 99, 100] {
            let reads = PrimaryReads::default();
            let (mut all, mut stale) = (0u32, 0u32);
            for _ in 0..50_000 {
                let to_primary = reads.allows(cap);
                reads.count(to_primary);
                all += 1;
                stale += u32::from(to_primary);
            }
            assert!(stale * 100 <= all * cap + 100 * LEAST, "{cap}: {stale} of {all}");
            assert!(stale * 110 >= all * cap.saturating_sub(2), "{cap}: {stale} of {all}");
        }
    }
}
