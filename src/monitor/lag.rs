//! How far a replica is behind, in bytes and in time. Pure.
//!
//! Time comes from the proxy's own history of the primary's positions: one clock, no heartbeat table,
//! and right on an idle primary, where `now() - pg_last_xact_replay_timestamp()` grows without end.
//!
//! Promises: [`LagTime::AtMost`] is never below the true lag, as far as the primary has been sampled;
//! memory is bounded, and thinning makes old lags coarser, never smaller. Deliberately does not know
//! timelines: whoever feeds it clears it when the epoch changes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::wal::Lsn;

/// Entries of the history at most.
const MAX_ENTRIES: usize = 512;

/// How long ago the primary was where a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LagTime {
    /// This, or less: limited by how often the primary is sampled.
    AtMost(Duration),
    /// More than this: the replica is behind the oldest position still remembered.
    MoreThan(Duration),
}

impl LagTime {
    /// The figure by itself, for display.
    pub fn duration(self) -> Duration {
        match self {
            LagTime::AtMost(time) | LagTime::MoreThan(time) => time,
        }
    }
}

/// A replica's distance from the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayLag {
    /// WAL bytes from the replica's replay position to the primary's newest known insert position.
    pub bytes: u64,
    /// The same in time.
    pub time: LagTime,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    lsn: Lsn,
    first_seen: Instant,
    last_seen: Instant,
}

/// Where the primary was, and when.
#[derive(Debug)]
pub struct PrimaryHistory {
    entries: VecDeque<Entry>,
    keep: Duration,
}

impl PrimaryHistory {
    /// Remembers positions for `keep`, at least.
    pub fn new(keep: Duration) -> PrimaryHistory {
        PrimaryHistory { entries: VecDeque::new(), keep }
    }

    /// Remembers positions for `keep` from now on.
    pub fn keep(&mut self, keep: Duration) {
        self.keep = keep;
    }

    /// Forgets all: the positions to come belong to another history.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// The newest position known.
    pub fn newest(&self) -> Option<Lsn> {
        self.entries.back().map(|e| e.lsn)
    }

    /// The primary's insert position was `lsn` at `at`. Call it in order of `at`, with a time taken
    /// *before* the question was sent. A position below the newest one is left out: an answer that was
    /// overtaken.
    pub fn record(&mut self, lsn: Lsn, at: Instant) {
        match self.entries.back_mut() {
            Some(newest) if newest.lsn == lsn => newest.last_seen = newest.last_seen.max(at),
            Some(newest) if newest.lsn > lsn || newest.last_seen > at => return,
            _ => self.entries.push_back(Entry { lsn, first_seen: at, last_seen: at }),
        }
        // The entry before the oldest one kept still answers for what lies between the two.
        while self
            .entries
            .get(1)
            .is_some_and(|second| at.saturating_duration_since(second.last_seen) > self.keep)
        {
            self.entries.pop_front();
        }
        if self.entries.len() > MAX_ENTRIES {
            self.thin();
        }
    }

    /// The primary's connection was broken and answers again, at `lsn`: a crash may have taken the end of
    /// the log with it, so what was seen above is void.
    pub fn resume(&mut self, lsn: Lsn, at: Instant) {
        while self.entries.back().is_some_and(|newest| newest.lsn > lsn) {
            self.entries.pop_back();
        }
        self.record(lsn, at);
    }

    /// The lag at `now` of a replica that has replayed up to `replay`; `None`: nothing is known of the primary.
    pub fn lag(&self, replay: Lsn, now: Instant) -> Option<ReplayLag> {
        let newest = self.entries.back()?;
        let oldest = self.entries.front()?;
        let bytes = newest.lsn.bytes_since(replay);
        let time = if bytes == 0 {
            LagTime::AtMost(Duration::ZERO)
        } else {
            match self
                .entries
                .partition_point(|e| e.lsn <= replay)
                .checked_sub(1)
                .and_then(|i| self.entries.get(i))
            {
                // The primary was at or before the replica's position when this entry was last seen.
                Some(passed) => LagTime::AtMost(now.saturating_duration_since(passed.last_seen)),
                None => LagTime::MoreThan(now.saturating_duration_since(oldest.last_seen)),
            }
        };
        Some(ReplayLag { bytes, time })
    }

    /// How long at `now` the primary has at least been past `replay`: zero if it is not known to be. Where
    /// [`lag`](Self::lag) is the most that a replica can be late, this is the least. The two are far apart
    /// right after a pause: the first write behind it has just been made, and the sample before it is old.
    pub fn past_for(&self, replay: Lsn, now: Instant) -> Duration {
        let next = self.entries.partition_point(|e| e.lsn <= replay);
        self.entries.get(next).map_or(Duration::ZERO, |e| now.saturating_duration_since(e.first_seen))
    }

    // Every second entry of the older half goes: a lag that falls into a gap is taken from the entry
    // before it, hence larger than it was.
    fn thin(&mut self) {
        let half = self.entries.len() / 2;
        let mut index = 0;
        self.entries.retain(|_| {
            let keep = index >= half || index % 2 == 0;
            index += 1;
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_replica_that_has_all_is_not_behind_however_long_the_primary_idles() {
        let start = Instant::now();
        let mut history = PrimaryHistory::new(ms(1000));
        assert_eq!(history.lag(Lsn(5), start), None);
        history.record(Lsn(100), start);
        let lag = history.lag(Lsn(100), start + ms(3_600_000)).unwrap();
        assert_eq!(lag, ReplayLag { bytes: 0, time: LagTime::AtMost(Duration::ZERO) });
    }

    #[test]
    fn the_lag_runs_from_when_the_primary_left_the_position() {
        let start = Instant::now();
        let mut history = PrimaryHistory::new(ms(60_000));
        history.record(Lsn(100), start);
        history.record(Lsn(100), start + ms(500));
        history.record(Lsn(200), start + ms(600));
        let check = |replay, time| {
            let lag = history.lag(Lsn(replay), start + ms(1000)).unwrap();
            assert_eq!(lag, ReplayLag { bytes: 200 - replay, time }, "{replay}");
        };
        check(150, LagTime::AtMost(ms(500)));
        check(100, LagTime::AtMost(ms(500)));
        check(99, LagTime::MoreThan(ms(500)));
        check(200, LagTime::AtMost(ms(0)));
    }

    #[test]
    fn the_first_write_after_a_pause_makes_no_replica_late() {
        let start = Instant::now();
        let mut history = PrimaryHistory::new(ms(60_000));
        assert_eq!(history.past_for(Lsn(1), start), ms(0));
        history.record(Lsn(100), start);
        history.record(Lsn(200), start + ms(500));
        history.record(Lsn(200), start + ms(501));
        let now = start + ms(502);
        assert_eq!(history.lag(Lsn(100), now).map(|l| l.time), Some(LagTime::AtMost(ms(502))));
        assert_eq!(history.past_for(Lsn(100), now), ms(2));
        assert_eq!(history.past_for(Lsn(99), now), ms(502));
        assert_eq!(history.past_for(Lsn(200), now), ms(0));
    }

    #[test]
    fn a_crash_that_takes_the_end_of_the_log_does_not_leave_replicas_behind_for_ever() {
        let start = Instant::now();
        let mut history = PrimaryHistory::new(ms(60_000));
        history.record(Lsn(100), start);
        history.record(Lsn(300), start + ms(10));
        history.record(Lsn(200), start + ms(20));
        assert_eq!(history.newest(), Some(Lsn(300)), "an answer that was overtaken");
        history.resume(Lsn(200), start + ms(500));
        assert_eq!(history.lag(Lsn(200), start + ms(9000)).map(|l| l.bytes), Some(0));
        assert_eq!(history.lag(Lsn(150), start + ms(600)).map(|l| l.time), Some(LagTime::AtMost(ms(600))));
    }

    proptest! {
        // The primary writes `step` bytes each millisecond; samples come at random moments.
        #[test]
        fn a_lag_is_never_reported_smaller_than_it_is(
            gaps in prop::collection::vec(1u64..40, 1..1500),
            step in 0u64..5,
            behind in 0u64..3000,
            keep in 1u64..5000,
        ) {
            let start = Instant::now();
            let mut history = PrimaryHistory::new(ms(keep));
            let mut at = 0;
            for gap in gaps {
                at += gap;
                history.record(Lsn(at * step), start + ms(at));
                prop_assert!(history.entries.len() <= MAX_ENTRIES);
            }
            // A replica that shows what the primary was at `then`.
            let then = at.saturating_sub(behind);
            let lag = history.lag(Lsn(then * step), start + ms(at)).unwrap();
            prop_assert_eq!(lag.bytes, (at - then) * step);
            match lag.time {
                LagTime::AtMost(time) => prop_assert!(step == 0 || time >= ms(at - then)),
                LagTime::MoreThan(time) => prop_assert!(time <= ms(at - then)),
            }
            prop_assert!(history.past_for(Lsn(then * step), start + ms(at)) <= ms(at - then));
        }

        #[test]
        fn the_lag_of_a_recent_position_is_sharp(gap in 1u64..20, behind in 1u64..200) {
            let start = Instant::now();
            let mut history = PrimaryHistory::new(ms(100_000));
            for i in 0..2000 {
                history.record(Lsn(i * gap), start + ms(i * gap));
            }
            let now = 1999 * gap;
            let then = now.saturating_sub(behind);
            let lag = history.lag(Lsn(then), start + ms(now)).unwrap();
            prop_assert!(matches!(lag.time, LagTime::AtMost(time) if time <= ms(now - then + gap)));
        }
    }
}
