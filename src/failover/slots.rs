//! Which replication slots nodes should have (`failover.slots`), and up to where they may be moved. Pure.
//!
//! Each node keeps a slot for every other one, so that a standby that was away finds what it lacks on whichever node is
//! the primary by then. Only the server that a standby streams from moves its slot by itself: all others stand still,
//! and would hold WAL for ever; they are moved to what their standby is known to have. A standby that does not answer
//! is what slots are for: its slots stay, and hold WAL until it is back, or `max_slot_wal_keep_size` gives it up.

use crate::topology::NodeId;
use crate::wal::Lsn;

/// A physical slot of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its name.
    pub name: String,
    /// Somebody streams by it.
    pub active: bool,
    /// From where on it holds WAL; `None`: it holds none, and never will again (the server has given it up).
    pub start: Option<Lsn>,
    /// So much of it.
    pub held: u64,
}

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// It takes writes.
    Primary,
    /// It streams the primary's timeline, and has it up to here on disk.
    Follows(Lsn),
    /// A standby of which that is not known now.
    Standby,
}

/// A node that answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keeper {
    /// Which.
    pub node: NodeId,
    /// What it is.
    pub part: Part,
    /// Its slots with our prefix.
    pub slots: Vec<Slot>,
    /// The size of its segments of WAL.
    pub segment: u64,
}

/// What is to be done on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Make this slot; it holds WAL from then on.
    Create(String),
    /// It needs nothing before this.
    Advance(String, Lsn),
    /// Take it away.
    Drop(String),
}

/// What is to be done so that each of `keepers` has the slots that it should have. `slots`: the slot's name for each node of
/// the configuration; `None`: the node is none any more.
pub fn changes(slots: &[Option<String>], keepers: &[Keeper]) -> Vec<(NodeId, Change)> {
    let primary = keepers.iter().find(|keeper| keeper.part == Part::Primary).map(|keeper| keeper.node);
    let mut changes = Vec::new();
    for keeper in keepers {
        let mine = |change| (keeper.node, change);
        for other in keepers.iter().filter(|other| other.node != keeper.node) {
            let Some(Some(name)) = slots.get(other.node.index()) else { continue };
            let Part::Follows(has) = other.part else { continue };
            let there = keeper.slots.iter().find(|slot| slot.name == *name);
            changes.extend(tend(there, name, has, keeper.segment).map(mine));
        }
        let wanted = |slot: &Slot| {
            let of = slots.iter().position(|name| name.as_ref() == Some(&slot.name));
            let of = of.and_then(|index| u16::try_from(index).ok()).map(NodeId);
            of.is_some() && of != Some(keeper.node) && of != primary
        };
        // On the primary nothing is dropped that holds WAL: who does not answer may need it.
        let unused = keeper.slots.iter().filter(|slot| !slot.active && !wanted(slot));
        let dropped = unused.filter(|_| keeper.part != Part::Primary && primary.is_some());
        changes.extend(dropped.map(|slot| mine(Change::Drop(slot.name.clone()))));
    }
    changes
}

/// The slot of a standby that has so much.
fn tend(there: Option<&Slot>, name: &str, has: Lsn, segment: u64) -> Option<Change> {
    let name = name.to_owned();
    match there {
        None => Some(Change::Create(name)),
        Some(slot) if slot.active => None,
        Some(Slot { start: None, .. }) => Some(Change::Drop(name)),
        Some(Slot { start: Some(start), .. }) => {
            // A standby that starts again asks from the beginning of the segment in which its last record begins.
            let needs = Lsn(has.0.saturating_sub(segment));
            (needs.bytes_since(*start) >= segment).then_some(Change::Advance(name, needs))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 100;

    fn slot(name: &str, start: u64) -> Slot {
        Slot { name: name.to_owned(), active: false, start: Some(Lsn(start)), held: 0 }
    }

    fn keeper(node: u16, part: Part, slots: &[Slot]) -> Keeper {
        Keeper { node: NodeId(node), part, slots: slots.to_vec(), segment: SEGMENT }
    }

    fn planned(keepers: &[Keeper]) -> Vec<String> {
        let names = ["hw_a", "hw_b", "hw_c"].map(|name| Some(name.to_owned()));
        let told = |(node, change): (NodeId, Change)| match change {
            Change::Create(name) => format!("{} + {name}", node.0),
            Change::Advance(name, to) => format!("{} {name} to {}", node.0, to.0),
            Change::Drop(name) => format!("{} - {name}", node.0),
        };
        changes(&names, keepers).into_iter().map(told).collect()
    }

    #[test]
    fn each_node_keeps_a_slot_for_each_standby_and_none_for_the_primary() {
        let (a, b) = (keeper(0, Part::Primary, &[]), keeper(1, Part::Follows(Lsn(500)), &[]));
        let c = keeper(2, Part::Follows(Lsn(480)), &[]);
        assert_eq!(planned(&[a, b, c]), ["0 + hw_b", "0 + hw_c", "1 + hw_c", "2 + hw_b"]);
    }

    #[test]
    fn what_stands_still_is_moved_behind_its_standby_and_what_streams_moves_itself() {
        let active = Slot { active: true, ..slot("hw_c", 100) };
        let a = keeper(0, Part::Primary, &[slot("hw_b", 100), active]);
        // A segment behind, and by no less than one at a time.
        let b = keeper(1, Part::Follows(Lsn(500)), &[slot("hw_c", 300)]);
        let c = keeper(2, Part::Follows(Lsn(480)), &[slot("hw_b", 301)]);
        assert_eq!(planned(&[a, b, c]), ["0 hw_b to 400"]);
    }

    #[test]
    fn who_does_not_answer_or_does_not_follow_keeps_its_slots_where_they_are() {
        let a = keeper(0, Part::Primary, &[slot("hw_b", 100), slot("hw_c", 100)]);
        let b = keeper(1, Part::Standby, &[slot("hw_c", 100)]);
        assert_eq!(planned(&[a, b]), Vec::<String>::new());
    }

    #[test]
    fn only_what_nobody_uses_is_dropped_and_only_where_no_primary_is() {
        let strange = [slot("hw_gone", 1), slot("hw_a", 1), slot("hw_b", 1)];
        let a = keeper(0, Part::Primary, &[slot("hw_gone", 1), slot("hw_a", 1)]);
        let b = keeper(1, Part::Standby, &strange);
        assert_eq!(planned(&[a, b]), ["1 - hw_gone", "1 - hw_a", "1 - hw_b"]);
        let used = Slot { active: true, ..slot("hw_gone", 1) };
        assert!(planned(&[keeper(0, Part::Primary, &[]), keeper(1, Part::Standby, &[used])]).is_empty());
        assert!(
            planned(&[keeper(1, Part::Standby, &strange)]).is_empty(),
            "without a primary nothing is known"
        );
        // What the server has given up protects nobody: it is made anew.
        let lost = Slot { start: None, ..slot("hw_b", 0) };
        let b = keeper(1, Part::Follows(Lsn(500)), &[]);
        assert_eq!(planned(&[keeper(0, Part::Primary, &[lost]), b]), ["0 - hw_b"]);
    }
}
