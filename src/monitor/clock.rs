//! How far the nodes' clocks are from each other's. Pure.
//!
//! A server's clock is read between two moments of ours, so its distance from ours is known to lie between two
//! bounds. What earlier readings say still holds, but for a little drift: bounds are narrowed by each reading, so that
//! one slow answer blurs nothing. A reading that contradicts them shows that a clock was set, and begins anew.
//! Ours is the monotonic clock: whoever sets this machine's clock changes nothing.

use std::time::{Duration, Instant};

use crate::positions::ClockOffset;

/// What a server said its clock showed, in microseconds since some moment that is the same for all servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockReading {
    /// That.
    pub server_micros: i64,
    /// When it was asked.
    pub sent: Instant,
    /// When the answer was there.
    pub came: Instant,
}

/// Two clocks that nobody corrects drift apart by so many parts in a million at most.
const DRIFT_PPM: i128 = 200;

/// The distance of a server's clock from ours, in nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    low: i128,
    high: i128,
    at: Instant,
}

impl Bounds {
    /// As far as they hold later.
    fn widened(self, now: Instant) -> Bounds {
        let age = now.saturating_duration_since(self.at).as_nanos() as i128;
        let drift = age * DRIFT_PPM / 1_000_000;
        Bounds { low: self.low - drift, high: self.high + drift, at: now }
    }
}

/// The clocks of all nodes.
#[derive(Debug)]
pub struct Clocks {
    /// Where ours begins.
    origin: Instant,
    nodes: Vec<Option<Bounds>>,
}

impl Clocks {
    /// Of nodes `0..count`; none has been read. `origin`: any moment.
    pub fn new(count: usize, origin: Instant) -> Clocks {
        Clocks { origin, nodes: vec![None; count] }
    }

    /// A node's clock was read.
    pub fn observe(&mut self, node: usize, reading: ClockReading) {
        let ours = |moment: Instant| moment.saturating_duration_since(self.origin).as_nanos() as i128;
        let server = i128::from(reading.server_micros) * 1000;
        // It stood at `server` somewhere between the two, and is cut to whole microseconds.
        let (low, high) = (server - ours(reading.came), server + 1000 - ours(reading.sent));
        let Some(slot) = self.nodes.get_mut(node) else { return };
        let before = slot.map(|bounds| bounds.widened(reading.came));
        let narrowed = before.map(|b| (b.low.max(low), b.high.min(high))).filter(|(low, high)| low <= high);
        let (low, high) = narrowed.unwrap_or((low, high));
        *slot = Some(Bounds { low, high, at: reading.came });
    }

    /// How far `node`'s clock is from `primary`'s; `None`: one of them has not been read.
    pub fn offset(&self, node: usize, primary: usize, now: Instant) -> Option<ClockOffset> {
        if node == primary {
            return Some(ClockOffset { low: 0, high: 0 });
        }
        let bounds = |of: usize| (*self.nodes.get(of)?).map(|bounds| bounds.widened(now));
        let (node, primary) = (bounds(node)?, bounds(primary)?);
        let nanos = |n: i128| i64::try_from(n).unwrap_or(if n < 0 { i64::MIN } else { i64::MAX });
        Some(ClockOffset { low: nanos(node.low - primary.high), high: nanos(node.high - primary.low) })
    }
}

/// Whether a replica's clock is known to be behind the primary's by more than is tolerated, or is not known at all:
/// then what a session has just written may lie in its future.
pub fn is_late(offset: Option<ClockOffset>, tolerance: Duration) -> bool {
    let tolerance = i64::try_from(tolerance.as_nanos()).unwrap_or(i64::MAX);
    offset.is_none_or(|offset| offset.high < -tolerance)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: i64 = 1_000_000;

    /// Reads a clock that is `offset` nanoseconds from ours; the question takes `there`, the answer `back` nanoseconds.
    fn reading(origin: Instant, at: u64, offset: i64, there: u64, back: u64) -> ClockReading {
        let sent = origin + Duration::from_nanos(at);
        let read = at + there;
        ClockReading {
            server_micros: (i64::try_from(read).unwrap() + offset).div_euclid(1000),
            sent,
            came: origin + Duration::from_nanos(read + back),
        }
    }

    #[test]
    fn a_quarter_of_a_second_is_seen_and_a_round_trip_is_not_mistaken_for_it() {
        let origin = Instant::now();
        let mut clocks = Clocks::new(3, origin);
        assert_eq!(clocks.offset(1, 0, origin), None);
        assert!(is_late(None, Duration::from_secs(1)));
        clocks.observe(0, reading(origin, 1000, 7_000 * MS, 200_000, 200_000));
        clocks.observe(1, reading(origin, 1000, 6_750 * MS, 200_000, 200_000));
        // As slow one way as the other is fast: it may be up to half a second behind, or not at all.
        clocks.observe(2, reading(origin, 1000, 7_000 * MS, 10_000, 500_000_000));
        let now = origin + Duration::from_secs(1);
        let tolerance = Duration::from_millis(1);
        assert_eq!(clocks.offset(0, 0, now), Some(ClockOffset { low: 0, high: 0 }));
        let behind = clocks.offset(1, 0, now).unwrap();
        assert!(behind.low < -250 * MS && behind.high > -250 * MS && behind.high < -249 * MS, "{behind:?}");
        assert!(is_late(Some(behind), tolerance));
        assert!(!is_late(Some(behind), Duration::from_millis(251)));
        assert!(!is_late(clocks.offset(2, 0, now), tolerance));
        // Seen from there, the other one is ahead, which hides nothing.
        assert!(!is_late(clocks.offset(0, 1, now), tolerance));
    }

    #[test]
    fn a_clock_that_is_set_is_believed_at_once() {
        let origin = Instant::now();
        let mut clocks = Clocks::new(2, origin);
        for at in 0..10 {
            clocks.observe(0, reading(origin, at * 500_000_000, 0, 50_000, 50_000));
            clocks.observe(1, reading(origin, at * 500_000_000, 0, 50_000, 50_000));
        }
        let now = origin + Duration::from_secs(5);
        assert!(!is_late(clocks.offset(1, 0, now), Duration::ZERO));
        clocks.observe(1, reading(origin, 5_000_000_000, -3 * MS, 50_000, 50_000));
        assert!(is_late(clocks.offset(1, 0, now), Duration::from_millis(1)));
    }

    proptest! {
        #[test]
        fn the_true_offset_always_lies_within_the_bounds(
            offset in -10_000 * MS..10_000 * MS,
            drift in -100i64..100,
            trips in prop::collection::vec((0u64..2_000_000_000, 0u64..20_000_000, 0u64..20_000_000), 1..50),
        ) {
            let origin = Instant::now();
            let mut clocks = Clocks::new(2, origin);
            clocks.observe(0, reading(origin, 0, 0, 0, 0));
            let mut at = 0;
            for (pause, there, back) in trips {
                at += pause;
                // In parts of a million.
                let true_offset = |at: u64| offset + i64::try_from(at).unwrap() / 1_000_000 * drift;
                clocks.observe(1, reading(origin, at, true_offset(at + there), there, back));
                at += there + back;
                let seen = clocks.offset(1, 0, origin + Duration::from_nanos(at)).unwrap();
                let truly = true_offset(at);
                prop_assert!(seen.low <= truly && truly <= seen.high, "{truly} is not in {seen:?}");
            }
        }
    }
}
