//! Which timeline a replica's replay position belongs to. Pure.
//!
//! Only its walreceiver says it (`received_tli`), and only while it runs; the control file's timelines
//! lag behind by a checkpoint. When the primary dies all walreceivers end, and the replicas must go on
//! serving. A standby without an archive enters a new timeline only after its walreceiver has put that
//! timeline's history file into `pg_wal`: while there is none later than the timeline that this
//! connection has seen received, it is still on it. Where the directory may not be listed, what was
//! seen received on a timeline keeps it. With an archive (`restore_command`), or on a connection that
//! has not seen a walreceiver, the timeline is unknown.

use crate::node::ReplicaSample;
use crate::wal::{Lsn, TimelineId};

/// What one unbroken connection to a replica has seen of its walreceiver.
#[derive(Debug, Default)]
pub struct ReceivedTimeline {
    seen: Option<(TimelineId, Lsn)>,
}

impl ReceivedTimeline {
    /// Takes an answer; the timeline of its replay position, if it can be known.
    pub fn observe(&mut self, answer: &ReplicaSample) -> Option<TimelineId> {
        if let Some(timeline) = answer.received_timeline {
            let received = answer.receive.unwrap_or(Lsn::ZERO);
            self.seen = match self.seen {
                // A walreceiver that starts again begins at a segment's start: behind what it had.
                Some((same, upto)) if same == timeline => Some((timeline, upto.max(received))),
                _ => Some((timeline, received)),
            };
            return Some(timeline);
        }
        let replay = answer.replay?;
        self.seen = self.seen.filter(|(timeline, upto)| {
            let same = answer.newest_history.map_or(replay <= *upto, |newest| newest <= *timeline);
            !answer.archive && same
        });
        self.seen.map(|(timeline, _)| timeline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(timeline: Option<u32>, receive: u64, replay: u64, archive: bool) -> ReplicaSample {
        ReplicaSample {
            receive: Some(Lsn(receive)),
            replay: Some(Lsn(replay)),
            received_timeline: timeline.map(TimelineId),
            archive,
            newest_history: None,
            receiver: None,
        }
    }

    #[test]
    fn the_history_files_tell_whether_a_new_timeline_was_entered() {
        for (newest, timeline) in [(1, Some(TimelineId(1))), (2, None)] {
            let mut received = ReceivedTimeline::default();
            received.observe(&answer(Some(1), 100, 90, false));
            // More was received and replayed before the walreceiver ended, unseen.
            let stopped =
                ReplicaSample { newest_history: Some(TimelineId(newest)), ..answer(None, 130, 120, false) };
            assert_eq!(received.observe(&stopped), timeline);
            assert_eq!(received.observe(&stopped), timeline);
        }
    }

    #[test]
    fn what_was_received_keeps_its_timeline_when_the_walreceiver_ends() {
        let mut received = ReceivedTimeline::default();
        assert_eq!(received.observe(&answer(None, 100, 90, false)), None, "never seen");
        assert_eq!(received.observe(&answer(Some(1), 100, 90, false)), Some(TimelineId(1)));
        assert_eq!(received.observe(&answer(Some(1), 64, 100, false)), Some(TimelineId(1)));
        assert_eq!(received.observe(&answer(None, 64, 100, false)), Some(TimelineId(1)));
        assert_eq!(received.observe(&answer(None, 64, 101, false)), None, "from somewhere else");
        assert_eq!(received.observe(&answer(None, 64, 100, false)), None, "and it stays unknown");
    }

    #[test]
    fn an_archive_may_bring_another_timeline() {
        let mut received = ReceivedTimeline::default();
        assert_eq!(received.observe(&answer(Some(1), 100, 90, true)), Some(TimelineId(1)));
        assert_eq!(received.observe(&answer(None, 100, 90, true)), None);
    }

    #[test]
    fn a_new_timeline_does_not_inherit_what_the_old_one_received() {
        let mut received = ReceivedTimeline::default();
        received.observe(&answer(Some(1), 100, 90, false));
        assert_eq!(received.observe(&answer(Some(2), 64, 90, false)), Some(TimelineId(2)));
        assert_eq!(received.observe(&answer(None, 64, 90, false)), None);
    }
}
