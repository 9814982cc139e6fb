//! Who is promoted, or why nobody is. Pure.
//!
//! The greatest final position wins; priorities break ties only. With `durability: quorum` enough of the synchronous
//! standbys must be among those compared (I4): each acknowledged commit is on `num` of them, so of any
//! `members - num + 1` at least one has it, and the greatest position of those covers it.

use crate::failover::decide::Durability;
use crate::failover::event::BlockReason;
use crate::failover::record::SyncState;
use crate::topology::NodeId;
use crate::wal::{Lsn, TimelineId};

/// A standby that has been cut off, with its final position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Which.
    pub node: NodeId,
    /// The end of what it has.
    pub end: Lsn,
    /// On which timeline; `None`: cannot be known.
    pub timeline: Option<TimelineId>,
    /// 0: never promoted.
    pub priority: u32,
    /// In another zone: promoted only if it is named.
    pub elsewhere: bool,
}

/// What the choice goes by.
#[derive(Clone, Copy, Debug)]
pub struct Election<'a> {
    /// What a commit is worth.
    pub durability: Durability,
    /// Synchronous replication as recorded.
    pub sync: &'a SyncState,
    /// The timeline of the epoch that ends.
    pub timeline: Option<TimelineId>,
    /// The primary's position as it was sampled last.
    pub last_seen: Option<Lsn>,
    /// How much of that may be given up without asking.
    pub max_lost_bytes: u64,
    /// Only this one.
    pub to: Option<NodeId>,
    /// An operator has given up what may be lost.
    pub allow_data_loss: bool,
    /// A switchover: the old primary's end, which must be had.
    pub barrier: Option<Lsn>,
}

/// Whether, by what is recorded, all acknowledged commits are among `cut` (I4).
pub fn covers(sync: &SyncState, cut: impl Fn(NodeId) -> bool) -> Result<(), BlockReason> {
    // Nothing recorded of synchronous replication: nothing is known of what was acknowledged.
    if sync.degraded || sync.num == 0 {
        return Err(BlockReason::Degraded);
    }
    let have = sync.members.iter().filter(|member| cut(**member)).count();
    let need = sync.needed();
    if have >= need { Ok(()) } else { Err(BlockReason::TooFewSynchronous { have, need }) }
}

/// The one to be promoted.
pub fn elect(all: &[Cut], election: &Election<'_>) -> Result<NodeId, BlockReason> {
    // A position on another timeline, or on an unknown one, compares with nothing.
    let cuts: Vec<&Cut> =
        all.iter().filter(|cut| cut.timeline.is_some() && cut.timeline == election.timeline).collect();
    let strict = !election.allow_data_loss;
    // In a switchover the barrier shows that nothing is missing. Yet a member that is not cut off may follow the old
    // primary again, and confirm commits of clients that insist on writing there.
    let degraded = election.sync.degraded || election.sync.num == 0;
    if strict && election.durability == Durability::Quorum && (election.barrier.is_none() || !degraded) {
        covers(election.sync, |member| cuts.iter().any(|cut| cut.node == member))?;
    }
    let chosen = cuts
        .iter()
        .filter(|cut| cut.priority > 0 && election.to.map_or(!cut.elsewhere, |to| to == cut.node))
        .max_by_key(|cut| (cut.end, cut.priority, std::cmp::Reverse(cut.node)))
        .ok_or_else(|| nobody(all, election))?;
    if let Some(ahead) = cuts.iter().filter(|cut| cut.end > chosen.end).max_by_key(|cut| cut.end) {
        let bytes = ahead.end.bytes_since(chosen.end);
        // Nobody chose the one behind: it is only that the one ahead may not be promoted, and `async` allows for some.
        let allowed = election.durability == Durability::Async
            && election.to.is_none()
            && bytes <= election.max_lost_bytes
            && election.barrier.is_none();
        if strict && !allowed && election.to.is_none() && ahead.elsewhere && ahead.priority > 0 {
            return Err(BlockReason::OtherZone { node: ahead.node });
        }
        if strict && !allowed {
            return Err(BlockReason::Behind { ahead: ahead.node, bytes });
        }
    }
    if let Some(barrier) = election.barrier
        && chosen.end < barrier
    {
        return Err(BlockReason::DataLoss { bytes: barrier.bytes_since(chosen.end) });
    }
    let lost = election.last_seen.map_or(0, |seen| seen.bytes_since(chosen.end));
    if strict && election.durability == Durability::Async && lost > election.max_lost_bytes {
        return Err(BlockReason::DataLoss { bytes: lost });
    }
    Ok(chosen.node)
}

fn nobody(all: &[Cut], election: &Election<'_>) -> BlockReason {
    let elsewhere = |cut: &&Cut| {
        cut.elsewhere && cut.priority > 0 && cut.timeline.is_some() && cut.timeline == election.timeline
    };
    if election.to.is_none()
        && let Some(cut) = all.iter().filter(elsewhere).max_by_key(|cut| (cut.end, cut.priority))
    {
        return BlockReason::OtherZone { node: cut.node };
    }
    let behind = |cut: &&Cut| cut.priority > 0 && cut.timeline.is_some() && cut.timeline < election.timeline;
    all.iter().find(behind).map_or(BlockReason::NoCandidate, |cut| BlockReason::LeftBehind { node: cut.node })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const T: Option<TimelineId> = Some(TimelineId(1));

    fn cut(node: u16, end: u64, priority: u32) -> Cut {
        Cut { node: NodeId(node), end: Lsn(end), timeline: T, priority, elsewhere: false }
    }

    fn elsewhere(node: u16, end: u64, priority: u32) -> Cut {
        Cut { elsewhere: true, ..cut(node, end, priority) }
    }

    #[test]
    fn nobody_of_another_zone_is_chosen_unless_named() {
        let other = |node| Err(BlockReason::OtherZone { node: NodeId(node) });
        let none = SyncState::default();
        let of_async = election(Durability::Async, &none);
        for (cuts, expected) in [
            // Ahead, and of a higher priority.
            (vec![cut(1, 950, 1), elsewhere(2, 990, 9)], Ok(NodeId(1))),
            (vec![elsewhere(1, 950, 1), elsewhere(2, 990, 1)], other(2)),
            // More than may be lost without asking; the one that has it is named, unless it may not be promoted.
            (vec![cut(1, 850, 1), elsewhere(2, 990, 1)], other(2)),
            (
                vec![cut(1, 850, 1), elsewhere(2, 990, 0)],
                Err(BlockReason::Behind { ahead: NodeId(2), bytes: 140 }),
            ),
            (vec![cut(1, 950, 0), elsewhere(2, 990, 0)], Err(BlockReason::NoCandidate)),
            (
                vec![Cut { timeline: Some(TimelineId(0)), ..elsewhere(1, 950, 1) }],
                Err(BlockReason::LeftBehind { node: NodeId(1) }),
            ),
        ] {
            assert_eq!(elect(&cuts, &of_async), expected, "{cuts:?}");
        }
        // What a quorum has confirmed counts wherever it is.
        let both = two_of(1);
        let quorum = election(Durability::Quorum, &both);
        assert_eq!(elect(&[cut(1, 950, 1), elsewhere(2, 950, 9)], &quorum), Ok(NodeId(1)));
        assert_eq!(elect(&[cut(1, 950, 1), elsewhere(2, 951, 1)], &quorum), other(2));
        let named = Election { to: Some(NodeId(2)), ..quorum };
        assert_eq!(elect(&[cut(1, 950, 1), elsewhere(2, 951, 1)], &named), Ok(NodeId(2)));
        let lossy = Election { allow_data_loss: true, ..quorum };
        assert_eq!(elect(&[cut(1, 950, 1), elsewhere(2, 951, 1)], &lossy), Ok(NodeId(1)));
    }

    fn two_of(num: u32) -> SyncState {
        SyncState { members: vec![NodeId(1), NodeId(2)], num, degraded: false }
    }

    fn election(durability: Durability, sync: &SyncState) -> Election<'_> {
        Election {
            durability,
            sync,
            timeline: T,
            last_seen: Some(Lsn(1000)),
            max_lost_bytes: 100,
            to: None,
            allow_data_loss: false,
            barrier: None,
        }
    }

    #[test]
    fn the_furthest_wins_and_priority_breaks_ties() {
        let sync = SyncState::default();
        let rules = election(Durability::Async, &sync);
        for (cuts, expected) in [
            (vec![cut(1, 950, 1), cut(2, 951, 1)], Ok(NodeId(2))),
            (vec![cut(1, 950, 1), cut(2, 951, 1), cut(3, 951, 5)], Ok(NodeId(3))),
            (vec![cut(1, 950, 9), cut(2, 951, 1)], Ok(NodeId(2))),
            (vec![cut(1, 950, 1), cut(2, 950, 1)], Ok(NodeId(1))),
            (vec![cut(1, 950, 1), cut(2, 951, 0)], Ok(NodeId(1))),
            (vec![cut(1, 800, 1)], Err(BlockReason::DataLoss { bytes: 200 })),
            (vec![cut(1, 950, 0)], Err(BlockReason::NoCandidate)),
            (vec![], Err(BlockReason::NoCandidate)),
            (vec![Cut { timeline: Some(TimelineId(2)), ..cut(1, 950, 1) }], Err(BlockReason::NoCandidate)),
            (vec![Cut { timeline: None, ..cut(1, 950, 1) }], Err(BlockReason::NoCandidate)),
            (
                vec![Cut { timeline: Some(TimelineId(0)), ..cut(1, 950, 1) }],
                Err(BlockReason::LeftBehind { node: NodeId(1) }),
            ),
        ] {
            assert_eq!(elect(&cuts, &rules), expected, "{cuts:?}");
        }
    }

    #[test]
    fn a_quorum_must_be_compared() {
        let cuts = [cut(1, 950, 1), cut(2, 900, 1)];
        for (sync, cuts, expected) in [
            (two_of(1), &cuts[..], Ok(NodeId(1))),
            (two_of(1), &cuts[..1], Err(BlockReason::TooFewSynchronous { have: 1, need: 2 })),
            (two_of(2), &cuts[1..], Ok(NodeId(2))),
            (SyncState { degraded: true, ..two_of(1) }, &cuts[..], Err(BlockReason::Degraded)),
            (SyncState::default(), &cuts[..], Err(BlockReason::Degraded)),
            (SyncState { members: vec![NodeId(1)], num: 1, degraded: false }, &cuts[..1], Ok(NodeId(1))),
        ] {
            assert_eq!(elect(cuts, &election(Durability::Quorum, &sync)), expected, "{sync:?} {cuts:?}");
            let forced = Election { allow_data_loss: true, ..election(Durability::Quorum, &sync) };
            assert!(elect(cuts, &forced).is_ok());
        }
    }

    #[test]
    fn a_switchover_cuts_off_the_quorum_too_unless_there_is_none() {
        let cuts = [cut(1, 950, 1)];
        for (sync, expected) in [
            (two_of(1), Err(BlockReason::TooFewSynchronous { have: 1, need: 2 })),
            (two_of(2), Ok(NodeId(1))),
            (SyncState { degraded: true, ..two_of(1) }, Ok(NodeId(1))),
            (SyncState::default(), Ok(NodeId(1))),
        ] {
            let barrier = Election { barrier: Some(Lsn(950)), ..election(Durability::Quorum, &sync) };
            assert_eq!(elect(&cuts, &barrier), expected, "{sync:?}");
        }
    }

    #[test]
    fn a_forced_choice_must_say_that_it_loses() {
        let sync = two_of(1);
        let cuts = [cut(1, 950, 1), cut(2, 990, 1)];
        for durability in [Durability::Async, Durability::Quorum] {
            let to = Election { to: Some(NodeId(1)), ..election(durability, &sync) };
            assert_eq!(elect(&cuts, &to), Err(BlockReason::Behind { ahead: NodeId(2), bytes: 40 }));
            assert_eq!(elect(&cuts, &Election { allow_data_loss: true, ..to }), Ok(NodeId(1)));
        }
        let barrier = Election { barrier: Some(Lsn(960)), ..election(Durability::Async, &sync) };
        assert_eq!(elect(&cuts, &barrier), Ok(NodeId(2)));
        let short = Election { barrier: Some(Lsn(1000)), allow_data_loss: true, ..barrier };
        assert_eq!(elect(&cuts, &short), Err(BlockReason::DataLoss { bytes: 10 }));
    }

    proptest! {
        /// I4 itself: commits are on `num` members each; whoever is elected has all of them.
        #[test]
        fn no_acknowledged_commit_is_left_behind(
            ends in prop::collection::vec(0u64..50, 1..6),
            num in 1u32..4,
            reached in prop::collection::vec(any::<bool>(), 6),
        ) {
            let members: Vec<NodeId> = (1..).take(ends.len()).map(NodeId).collect();
            let num = num.min(u32::try_from(members.len()).unwrap());
            let sync = SyncState { members: members.clone(), num, degraded: false };
            let mut sorted = ends.clone();
            sorted.sort_unstable_by(|a, b| b.cmp(a));
            // The greatest position that `num` members have.
            let acknowledged = sorted[usize::try_from(num).unwrap() - 1];
            let cuts: Vec<Cut> = members.iter().zip(&ends).zip(&reached)
                .filter(|(_, reached)| **reached)
                .map(|((node, end), _)| cut(node.0, *end, 1))
                .collect();
            if let Ok(chosen) = elect(&cuts, &election(Durability::Quorum, &sync)) {
                let end = cuts.iter().find(|cut| cut.node == chosen).unwrap().end;
                prop_assert!(end.0 >= acknowledged);
            }
        }
    }
}
