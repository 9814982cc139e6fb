//! How fast a replica replays. Pure.
//!
//! A pace is measured only while the replica has more to replay than it can at once ([`BACKLOG`]): one that has
//! replayed all it was given replays no faster than the primary writes, which says nothing of what it could do.
//!
//! Deliberately does not say how long something will take: `SampleBody::catch_up` does.

use std::time::{Duration, Instant};

use crate::positions::BACKLOG;
use crate::wal::Lsn;

/// What was measured so long ago counts for a third.
const FADES: Duration = Duration::from_millis(250);
/// No progress for so long, with a backlog: replay stands still.
const STALLED: Duration = Duration::from_millis(50);

/// The pace of one replica, over one unbroken connection to it.
#[derive(Debug, Default)]
pub struct ReplayRate {
    last: Option<Seen>,
    /// Since when it has stood where it is.
    moved: Option<Instant>,
    rate: Option<f64>,
}

#[derive(Debug)]
struct Seen {
    backlog: u64,
    replay: Lsn,
    at: Instant,
}

impl ReplayRate {
    /// Takes a sample that was asked for at `at`; the pace after it, in bytes per second.
    pub fn observe(&mut self, receive: Option<Lsn>, replay: Lsn, at: Instant) -> Option<u64> {
        let backlog = receive.map_or(0, |receive| receive.bytes_since(replay));
        let last = self.last.replace(Seen { backlog, replay, at });
        if let Some(last) = last {
            self.measure(&last, backlog, replay, at);
        }
        self.rate.map(|rate| rate as u64)
    }

    fn measure(&mut self, last: &Seen, backlog: u64, replay: Lsn, at: Instant) {
        let bytes = replay.bytes_since(last.replay);
        let time = at.saturating_duration_since(last.at);
        if bytes > 0 || last.backlog < BACKLOG {
            self.moved = Some(at);
        }
        if last.backlog < BACKLOG || time.is_zero() {
            return;
        }
        let now = bytes as f64 / time.as_secs_f64();
        let moved = *self.moved.get_or_insert(last.at);
        let stalled = at.saturating_duration_since(moved) >= STALLED;
        self.rate = Some(match self.rate {
            _ if stalled => 0.0,
            None => now,
            Some(0.0) => now,
            // It was through before the time was over: the pace was that, or more.
            Some(rate) if backlog < BACKLOG => rate.max(now),
            Some(rate) => rate + (now - rate) * (1.0 - (-time.as_secs_f64() / FADES.as_secs_f64()).exp()),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEGA: u64 = 1_000_000;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_replica_that_keeps_up_has_no_pace() {
        let (mut rate, start) = (ReplayRate::default(), Instant::now());
        for i in 0..1000 {
            let at = Lsn(i * 50_000);
            assert_eq!(rate.observe(Some(at), at, start + ms(i)), None);
        }
        assert_eq!(rate.observe(None, Lsn(MEGA * 1000), start + ms(5000)), None, "it receives nothing");
    }

    #[test]
    fn the_pace_is_that_of_the_time_with_a_backlog() {
        let (mut rate, start) = (ReplayRate::default(), Instant::now());
        let end = Lsn(500 * MEGA);
        // It idles, is given 500 MB, and replays 100 MB a second.
        rate.observe(Some(Lsn(0)), Lsn(0), start);
        let mut pace = None;
        for i in 0..200 {
            pace = rate.observe(Some(end), Lsn(i * MEGA), start + ms(60_000 + i * 10));
        }
        assert_eq!(pace, Some(100 * MEGA));
        // Being through, and idling again, changes nothing.
        pace = rate.observe(Some(end), end, start + ms(90_000));
        assert_eq!(pace, Some(100 * MEGA));
        assert_eq!(rate.observe(Some(end), end, start + ms(190_000)), Some(100 * MEGA));
    }

    #[test]
    fn a_pace_follows_what_it_becomes() {
        let (mut rate, start) = (ReplayRate::default(), Instant::now());
        let end = Some(Lsn(5000 * MEGA));
        let (mut at, mut replay, mut pace) = (start, 0, 0);
        for step in [MEGA, MEGA / 4] {
            for _ in 0..200 {
                at += ms(10);
                replay += step;
                pace = rate.observe(end, Lsn(replay), at).unwrap_or(0);
            }
            assert!(pace.abs_diff(step * 100) < step, "{pace}, not {}", step * 100);
        }
    }

    #[test]
    fn replay_that_stands_still_has_the_pace_nothing_until_it_moves() {
        let (mut rate, start) = (ReplayRate::default(), Instant::now());
        let end = Some(Lsn(500 * MEGA));
        rate.observe(end, Lsn(0), start);
        assert_eq!(rate.observe(end, Lsn(MEGA), start + ms(10)), Some(100 * MEGA));
        assert!(rate.observe(end, Lsn(MEGA), start + ms(30)).unwrap() > 50 * MEGA, "not yet");
        assert_eq!(rate.observe(end, Lsn(MEGA), start + ms(60)), Some(0));
        assert_eq!(rate.observe(end, Lsn(MEGA), start + ms(600)), Some(0));
        assert_eq!(rate.observe(end, Lsn(3 * MEGA), start + ms(610)), Some(200 * MEGA));
    }
}
