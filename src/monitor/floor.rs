//! The primary's visible floor: up to where its commits are visible on the primary itself. Pure.
//!
//! A commit's record is in the log, may be replayed and shown by replicas, and yet the primary hides it
//! until its wait for synchronous standbys and its removal from the list of running transactions are
//! over. A session that has seen it on a replica must not be sent to the primary before that.
//!
//! The rule: whatever commits below the insert position P of a sample was, when P was read, completed,
//! or listed as running (`xip`), or not below the snapshot's `xmax` but below the next id. Those that
//! are not completed are the sample's *suspects*. Once later samples have shown each of them completed,
//! everything up to P is visible. A transaction that simply runs long must not hold the floor: a
//! replica at position R that does not call it committed shows that no commit record of it lies below
//! R, and clears it up to R. So does the primary itself, where it says that the transaction's backend
//! stood idle or waited for a lock after its log had reached R. (Replicas alone would not do. What a
//! transaction has written need not be flushed before somebody commits, so that no replica gets as far
//! as P while it stands open; and there may be no replica.)
//!
//! Promises: the floor never falls, and is never above what is visible; memory is bounded. Holds for one
//! unbroken sampler connection to one primary: a new connection or epoch takes a new [`Floor`].

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::node::PrimarySample;
use crate::wal::Lsn;

/// Samples whose suspects are waited for at the same time.
const MAX_CANDIDATES: usize = 16;
/// Suspects whose age and clearance are remembered, lowest ids first. Beyond, a transaction is waited
/// for and cannot be cleared.
const MAX_TRACKED: usize = 1024;

/// What is known of visibility on one primary.
#[derive(Debug, Default)]
pub struct Floor {
    floor: Lsn,
    candidates: VecDeque<Candidate>,
    tracked: BTreeMap<u64, Suspect>,
}

/// A sample some of whose suspects have not been seen completed.
#[derive(Debug)]
struct Candidate {
    position: Lsn,
    /// When it was observed.
    at: Instant,
    /// Listed as running; ascending.
    running: Vec<u64>,
    /// Given out, or about to be, but not listed: at or past the snapshots' `xmax` so far.
    unlisted: Range<u64>,
}

#[derive(Debug)]
struct Suspect {
    since: Instant,
    /// It has no commit record below this.
    cleared: Lsn,
}

impl Floor {
    /// The floor now.
    pub fn position(&self) -> Lsn {
        self.floor
    }

    /// Takes a sample; the floor after it.
    pub fn observe(&mut self, sample: &PrimarySample, now: Instant) -> Lsn {
        for candidate in &mut self.candidates {
            candidate.settle(sample);
        }
        let next = sample.next_xid.max(sample.snapshot.xmax);
        let newest = Candidate {
            position: sample.insert,
            at: now,
            running: sample.snapshot.xip.clone(),
            unlisted: sample.snapshot.xmax..next,
        };
        self.track(&newest, now);
        // Under constant load each sample has suspects of its own: several are followed at once, so that
        // the floor rises as often as samples come. When too many wait, for the same few long
        // transactions, every second one can go: the next that is cleared takes the floor as far.
        if self.candidates.len() >= MAX_CANDIDATES {
            let mut index = 0;
            self.candidates.retain(|_| {
                index += 1;
                index % 2 == 1
            });
        }
        self.candidates.push_back(newest);
        self.advance();
        self.floor
    }

    /// None of `xids` has a commit record below `up_to`: a replica that had replayed so far, on this primary's timeline,
    /// said after that that they had not committed; or the primary, that they had not begun to. The floor after it.
    pub fn clear(&mut self, xids: &[u64], up_to: Lsn) -> Lsn {
        for xid in xids {
            if let Some(suspect) = self.tracked.get_mut(xid) {
                suspect.cleared = suspect.cleared.max(up_to);
            }
        }
        self.advance();
        self.floor
    }

    /// The suspects that have been waited for longer than `older_than` and hold the floor, those first that are cleared
    /// least far, at most `limit`: those to ask about.
    pub fn overdue(&self, now: Instant, older_than: Duration, limit: usize) -> Vec<u64> {
        let Some(newest) = self.candidates.back() else {
            return Vec::new();
        };
        let mut overdue: Vec<(Lsn, u64)> = self
            .tracked
            .iter()
            .filter(|(xid, suspect)| {
                newest.suspects(**xid) && now.saturating_duration_since(suspect.since) >= older_than
            })
            .map(|(xid, suspect)| (suspect.cleared, *xid))
            .collect();
        overdue.sort_unstable();
        overdue.into_iter().map(|(_, xid)| xid).take(limit).collect()
    }

    /// For how long the floor has been kept from where the primary was.
    pub fn held_for(&self, now: Instant) -> Duration {
        self.candidates.front().map_or(Duration::ZERO, |oldest| now.saturating_duration_since(oldest.at))
    }

    fn track(&mut self, newest: &Candidate, now: Instant) {
        // A suspect of an older candidate that still runs is one of the newest sample's too.
        self.tracked.retain(|xid, _| newest.suspects(*xid));
        for xid in newest.running.iter().copied().chain(newest.unlisted.clone()).take(MAX_TRACKED) {
            if self.tracked.len() >= MAX_TRACKED {
                break;
            }
            self.tracked.entry(xid).or_insert(Suspect { since: now, cleared: Lsn::ZERO });
        }
    }

    fn advance(&mut self) {
        let tracked = &self.tracked;
        let cleared = |xid: u64| tracked.get(&xid).map_or(Lsn::ZERO, |suspect| suspect.cleared);
        let mut floor = self.floor;
        self.candidates.retain(|candidate| {
            let visible = candidate.visible(cleared);
            floor = floor.max(visible);
            visible < candidate.position
        });
        self.floor = floor;
    }
}

impl Candidate {
    fn suspects(&self, xid: u64) -> bool {
        self.unlisted.contains(&xid) || self.running.binary_search(&xid).is_ok()
    }

    /// Drops the suspects that `later` shows completed.
    fn settle(&mut self, later: &PrimarySample) {
        let snapshot = &later.snapshot;
        self.running.retain(|xid| *xid >= snapshot.xmax || snapshot.xip.binary_search(xid).is_ok());
        let listed = self.unlisted.start..self.unlisted.end.min(snapshot.xmax);
        if !listed.is_empty() {
            let from = snapshot.xip.partition_point(|xid| *xid < listed.start);
            // All of them are above those that were listed before: the order holds.
            self.running.extend(snapshot.xip[from..].iter().take_while(|xid| **xid < listed.end));
            self.unlisted.start = listed.end;
        }
    }

    /// Up to where everything that commits is visible, as far as this sample shows it.
    fn visible(&self, cleared: impl Fn(u64) -> Lsn) -> Lsn {
        let unlisted = self.unlisted.clone();
        if unlisted.end.saturating_sub(unlisted.start) > MAX_TRACKED as u64 {
            return Lsn::ZERO;
        }
        let mut visible = self.position;
        for xid in self.running.iter().copied().chain(unlisted) {
            visible = visible.min(cleared(xid));
            if visible == Lsn::ZERO {
                break;
            }
        }
        visible
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Snapshot;
    use crate::wal::TimelineId;
    use proptest::prelude::*;

    fn sample(xmax: u64, xip: &[u64], insert: u64, next_xid: u64) -> PrimarySample {
        PrimarySample {
            snapshot: Snapshot { xmax, xip: xip.to_vec() },
            insert: Lsn(insert),
            flush: Lsn(insert),
            next_xid,
            timeline: TimelineId(1),
        }
    }

    #[test]
    fn an_idle_primary_shows_all_of_its_log_at_once() {
        assert_eq!(Floor::default().observe(&sample(10, &[], 500, 10), Instant::now()), Lsn(500));
    }

    #[test]
    fn the_floor_waits_for_every_suspect() {
        let (mut floor, now) = (Floor::default(), Instant::now());
        assert_eq!(floor.observe(&sample(10, &[7], 500, 12), now), Lsn(0), "7, 10 and 11 may have committed");
        assert_eq!(floor.observe(&sample(12, &[10], 600, 12), now), Lsn(0), "10 still runs");
        assert_eq!(floor.observe(&sample(13, &[], 700, 13), now), Lsn(700));
    }

    #[test]
    fn the_floor_rises_under_load_that_never_pauses() {
        let (mut floor, now) = (Floor::default(), Instant::now());
        let mut risen = 0;
        let mut before = Lsn::ZERO;
        for i in 10u64..1000 {
            // Each transaction spans two samples.
            let at = floor.observe(&sample(i, &[i - 1], i * 100, i + 1), now);
            risen += u64::from(at > before);
            before = at;
        }
        assert!(risen > 900, "{risen}");
    }

    #[test]
    fn a_long_transaction_is_cleared_up_to_where_a_replica_has_not_seen_it_commit() {
        let (mut floor, now) = (Floor::default(), Instant::now());
        let late = Duration::from_millis(20);
        for i in 0..200 {
            floor.observe(&sample(10, &[7], 500 + i, 10), now);
        }
        assert_eq!(floor.position(), Lsn(0));
        assert_eq!(floor.overdue(now, late, 10), Vec::<u64>::new());
        assert_eq!(floor.overdue(now + late, late, 10), vec![7]);
        assert_eq!(floor.clear(&[7], Lsn(400)), Lsn(400), "the replica is behind the sample");
        assert_eq!(floor.clear(&[7], Lsn(9000)), Lsn(699), "never above the newest sample");
        assert_eq!(floor.observe(&sample(10, &[7], 800, 10), now), Lsn(800), "cleared beyond");
        assert_eq!(floor.observe(&sample(10, &[7], 9100, 10), now), Lsn(9000));
        assert_eq!(floor.observe(&sample(11, &[], 9200, 11), now), Lsn(9200));
        assert_eq!(floor.overdue(now + late, late, 10), Vec::<u64>::new());
    }

    #[test]
    fn what_holds_the_floor_is_known_with_its_age_and_who_is_cleared_least_is_asked_about_first() {
        let (mut floor, now) = (Floor::default(), Instant::now());
        let ms = Duration::from_millis;
        assert_eq!(floor.held_for(now), Duration::ZERO);
        floor.observe(&sample(10, &[], 500, 10), now);
        assert_eq!(floor.held_for(now + ms(9)), Duration::ZERO, "nothing holds it");
        // A transaction with savepoints, none of whose ids is listed yet.
        floor.observe(&sample(10, &[], 600, 14), now);
        assert_eq!(floor.held_for(now + ms(9)), ms(9));
        floor.observe(&sample(10, &[], 600, 14), now + ms(5));
        assert_eq!(floor.held_for(now + ms(9)), ms(9), "of the oldest");
        for (asked, floor_then) in [(vec![10, 11], 500), (vec![12, 13], 600)] {
            assert_eq!(floor.overdue(now + ms(9), ms(9), 2), asked);
            assert_eq!(floor.clear(&asked, Lsn(650)), Lsn(floor_then));
        }
        assert_eq!(floor.held_for(now + ms(9)), Duration::ZERO);
        assert_eq!(floor.observe(&sample(10, &[], 650, 14), now + ms(9)), Lsn(650));
        assert_eq!(
            floor.observe(&sample(10, &[], 700, 14), now + ms(9)),
            Lsn(650),
            "it may have ended since"
        );
    }

    #[test]
    fn a_burst_of_subtransactions_keeps_within_bounds() {
        let (mut floor, now) = (Floor::default(), Instant::now());
        assert_eq!(floor.observe(&sample(10, &[], 500, 5_000_000), now), Lsn(0));
        assert!(floor.tracked.len() <= MAX_TRACKED);
        assert_eq!(floor.clear(&(10..5000).collect::<Vec<_>>(), Lsn(400)), Lsn(0));
        assert_eq!(floor.observe(&sample(5_000_000, &[], 600, 5_000_000), now), Lsn(600));
    }

    /// A primary and one replica, small enough to be played at random.
    #[derive(Default)]
    struct Model {
        next_xid: u64,
        insert: u64,
        latest_completed: u64,
        running: Vec<u64>,
        /// Commit records: id, where the record ends.
        committed: Vec<(u64, u64)>,
        replayed: u64,
    }

    impl Model {
        fn snapshot(&self) -> Snapshot {
            let xmax = self.latest_completed + 1;
            let mut xip: Vec<u64> = self.running.iter().copied().filter(|x| *x < xmax).collect();
            xip.sort_unstable();
            Snapshot { xmax, xip }
        }

        fn step(&mut self, what: u8, which: usize) {
            match what % 5 {
                0 if self.running.len() < 8 => {
                    self.running.push(self.next_xid);
                    self.next_xid += 1;
                }
                1 => {
                    let open: Vec<u64> = self
                        .running
                        .iter()
                        .copied()
                        .filter(|x| self.committed.iter().all(|c| c.0 != *x))
                        .collect();
                    if !open.is_empty() {
                        self.insert += 10;
                        self.committed.push((open[which % open.len()], self.insert));
                    }
                }
                2 => {
                    // Leaves the list of running transactions: after its commit record, or aborted.
                    if !self.running.is_empty() {
                        let xid = self.running.remove(which % self.running.len());
                        self.latest_completed = self.latest_completed.max(xid);
                    }
                }
                3 => self.insert += 7,
                _ => self.replayed += (self.insert - self.replayed).min(which as u64 % 40),
            }
        }

        /// Everything that commits below the answer is visible on the primary.
        fn visible(&self) -> u64 {
            self.committed
                .iter()
                .filter(|(xid, _)| self.running.contains(xid))
                .map(|(_, end)| end - 1)
                .min()
                .unwrap_or(u64::MAX)
        }
    }

    proptest! {
        #[test]
        fn the_floor_is_never_above_what_the_primary_shows(
            steps in prop::collection::vec((0u8..11, 0usize..1000), 1..400),
        ) {
            let mut model = Model { next_xid: 3, latest_completed: 2, ..Model::default() };
            let (mut floor, now) = (Floor::default(), Instant::now());
            let mut last = Lsn::ZERO;
            let mut rest = steps.iter().copied();
            while let Some((what, which)) = rest.next() {
                match what {
                    // A sample reads its three parts one after another while the others go on.
                    5..=8 => {
                        let snapshot = model.snapshot();
                        let mut between = |model: &mut Model| {
                            for (what, which) in rest.by_ref().take(which % 4) {
                                model.step(what, which);
                            }
                        };
                        between(&mut model);
                        let insert = Lsn(model.insert);
                        between(&mut model);
                        let next_xid = model.next_xid;
                        floor.observe(&PrimarySample { snapshot, insert, flush: insert, next_xid, timeline: TimelineId(1) }, now);
                    }
                    // A replica is asked: its position first, the states later.
                    9 | 10 => {
                        let asked = floor.overdue(now, Duration::ZERO, 100);
                        let replay = Lsn(model.replayed);
                        for (what, which) in rest.by_ref().take(which % 4) {
                            model.step(what, which);
                        }
                        let replayed = model.replayed;
                        let open: Vec<u64> = asked
                            .into_iter()
                            .filter(|x| model.committed.iter().all(|(xid, end)| xid != x || *end > replayed))
                            .collect();
                        floor.clear(&open, replay);
                    }
                    _ => model.step(what, which),
                }
                prop_assert!(floor.position() >= last);
                last = floor.position();
                prop_assert!(last.0 <= model.visible(), "floor {} above {}", last.0, model.visible());
                prop_assert!(floor.candidates.len() <= MAX_CANDIDATES);
            }
            // When all have left, one sample shows all.
            while !model.running.is_empty() {
                model.step(2, 0);
            }
            model.latest_completed = model.next_xid - 1;
            let end = PrimarySample {
                snapshot: model.snapshot(), insert: Lsn(model.insert), flush: Lsn(model.insert),
                next_xid: model.next_xid, timeline: TimelineId(1),
            };
            prop_assert_eq!(floor.observe(&end, now), Lsn(model.insert));
        }
    }
}
