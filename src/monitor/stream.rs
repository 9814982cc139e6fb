//! Whose log a replica replays. A primary that crashes goes on with the same timeline where its recovery ended,
//! so a replica's position alone does not tell whether it is still of the log that sessions' marks are of: a mark
//! in the part that the crash took is passed by what is written after it.
//!
//! Only the walreceiver tells: a crash of the primary ends its walsenders, so what one walreceiver has received
//! is of one start of the primary. After it come doubts, until the primary, asked later, is shown to be of the
//! start that the topology knows. (A cascaded replica's walreceiver outlives a crash of the primary: of those
//! nothing is known here.)

use std::time::{Duration, Instant};

use crate::topology::Epoch;
use crate::wal::Lsn;

/// A server that crashes has recovered and taken writes, and may have crashed again, after this at the earliest.
pub const ONE_CRASH: Duration = Duration::from_millis(30);

/// The last sample of a primary.
#[derive(Clone, Copy, Debug)]
pub struct Alive {
    /// It was alive after this.
    pub asked_at: Instant,
    /// What it had flushed by then.
    pub flush: Lsn,
    /// It has said since that it shuts down, which leaves all on disk.
    pub in_order: bool,
}

impl Alive {
    /// Up to where what it wrote is still there, in the start of it that `began` then and whose log ended at
    /// `end` when it recovered. If there may have been a start between the two, that has written, too, and `end`
    /// may be past what the first crash took.
    pub fn survived(&self, end: Lsn, began: Instant) -> Lsn {
        let one = self.in_order || began.saturating_duration_since(self.asked_at) < ONE_CRASH;
        if one { end } else { end.min(self.flush) }
    }
}

/// What a replica said of its stream, in one answer, the positions read first.
#[derive(Clone, Copy, Debug)]
pub struct Streamed {
    /// The process of its walreceiver; `None`: none runs.
    pub receiver: Option<u32>,
    /// The last position that any walreceiver has received.
    pub receive: Option<Lsn>,
    /// The last position replayed.
    pub replay: Lsn,
}

/// What is known of the primary at that time.
#[derive(Clone, Copy, Debug)]
pub struct PrimarySeen {
    /// The topology's epoch.
    pub epoch: Epoch,
    /// The last sample answered in this epoch, by the start of the server that began it.
    pub answered: Option<u64>,
    /// The last sample sent.
    pub sent: u64,
}

/// The stream of one replica, over all connections of its sampler.
#[derive(Debug, Default)]
pub struct Stream {
    /// Whether anything has been observed.
    begun: bool,
    /// The last walreceiver known to receive from the primary as the topology knows it.
    receiver: Option<u32>,
    /// Up to here the log is of that.
    reached: Lsn,
    doubt: Option<Doubt>,
}

#[derive(Clone, Copy, Debug)]
struct Doubt {
    receiver: u32,
    epoch: Epoch,
    /// A later sample than this one settles it.
    sent: u64,
}

impl Stream {
    /// Whether the position is of the log that marks of this epoch are of. `primary`: `None` if there is none, or its
    /// starts cannot be told apart; then everything is believed.
    pub fn observe(&mut self, now: Streamed, primary: Option<PrimarySeen>) -> bool {
        let first = !std::mem::replace(&mut self.begun, true);
        let Some(primary) = primary else {
            self.doubt = None;
            self.receiver = now.receiver;
            self.believe(now);
            return true;
        };
        match now.receiver {
            // Nothing new comes; all that was streamed came before the last one ended. What came from an archive
            // lies beyond that.
            None if first || now.receive.is_some_and(|receive| now.replay <= receive) => self.believe(now),
            None => {}
            Some(receiver) => {
                let settled = self.doubt.is_some_and(|doubt| doubt.is_settled(receiver, &primary));
                let known = self.receiver == Some(receiver) && self.doubt.is_none();
                if settled || known {
                    self.doubt = None;
                    self.receiver = Some(receiver);
                    self.believe(now);
                } else if self.doubt.is_none_or(|doubt| doubt.is_of_another(receiver, &primary)) {
                    self.doubt = Some(Doubt { receiver, epoch: primary.epoch, sent: primary.sent });
                }
            }
        }
        now.replay <= self.reached
    }

    /// Whether a sample of the primary would settle something.
    pub fn is_in_doubt(&self) -> bool {
        self.doubt.is_some()
    }

    fn believe(&mut self, now: Streamed) {
        self.reached = self.reached.max(now.replay).max(now.receive.unwrap_or(Lsn::ZERO));
    }
}

impl Doubt {
    fn is_settled(&self, receiver: u32, primary: &PrimarySeen) -> bool {
        !self.is_of_another(receiver, primary) && primary.answered.is_some_and(|number| number > self.sent)
    }

    fn is_of_another(&self, receiver: u32, primary: &PrimarySeen) -> bool {
        self.receiver != receiver || self.epoch != primary.epoch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(receiver: Option<u32>, receive: u64, replay: u64) -> Streamed {
        Streamed { receiver, receive: Some(Lsn(receive)), replay: Lsn(replay) }
    }

    fn seen(epoch: u64, answered: u64, sent: u64) -> Option<PrimarySeen> {
        Some(PrimarySeen { epoch: Epoch(epoch), answered: Some(answered), sent })
    }

    /// A stream that is known up to 100, received by process 7.
    fn known() -> Stream {
        let mut stream = Stream::default();
        assert!(!stream.observe(at(Some(7), 100, 90), seen(1, 4, 5)));
        assert!(stream.is_in_doubt());
        assert!(!stream.observe(at(Some(7), 100, 90), seen(1, 5, 5)), "the answer was asked for before");
        assert!(stream.observe(at(Some(7), 100, 90), seen(1, 6, 6)));
        assert!(!stream.is_in_doubt());
        stream
    }

    #[test]
    fn one_walreceiver_is_believed_without_asking_again() {
        let mut stream = known();
        assert!(stream.observe(at(Some(7), 900, 800), seen(1, 6, 6)));
        assert!(stream.observe(at(Some(7), 900, 900), seen(1, 6, 9)));
    }

    #[test]
    fn what_another_receives_counts_once_the_primary_has_answered_after_it_was_seen() {
        let mut stream = known();
        assert!(stream.observe(at(Some(8), 120, 100), seen(1, 6, 6)), "that much is of the old stream");
        assert!(!stream.observe(at(Some(8), 120, 101), seen(1, 6, 7)));
        assert!(stream.observe(at(Some(8), 120, 110), seen(1, 7, 7)));
        // A third one while the second is in doubt.
        assert!(!stream.observe(at(Some(9), 130, 121), seen(1, 7, 7)));
        assert!(!stream.observe(at(Some(10), 130, 121), seen(1, 8, 8)));
        assert!(stream.observe(at(Some(10), 130, 121), seen(1, 9, 9)));
    }

    #[test]
    fn a_new_epoch_settles_only_by_its_own_answers() {
        let mut stream = known();
        assert!(!stream.observe(at(Some(8), 120, 110), seen(1, 6, 6)));
        assert!(!stream.observe(at(Some(8), 120, 110), seen(2, 8, 8)));
        assert!(stream.observe(at(Some(8), 120, 110), seen(2, 9, 9)));
    }

    #[test]
    fn without_a_walreceiver_what_was_streamed_is_believed_and_an_archive_is_not() {
        let mut stream = known();
        assert!(stream.observe(at(None, 105, 105), seen(1, 6, 6)));
        assert!(!stream.observe(at(None, 105, 106), seen(1, 6, 6)));
        assert!(!stream.observe(at(Some(8), 120, 120), seen(1, 6, 6)), "not the one from before");
        let mut restarted = Stream::default();
        assert!(
            restarted.observe(Streamed { receiver: None, receive: None, replay: Lsn(50) }, seen(1, 6, 6))
        );
    }

    #[test]
    fn where_starts_cannot_be_told_apart_all_is_believed() {
        let mut stream = known();
        assert!(stream.observe(at(Some(8), 500, 500), None));
        assert!(stream.observe(at(Some(9), 600, 600), None));
    }
}
