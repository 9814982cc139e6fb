//! Which of the replicas that may serve. Pure: chance comes in as a number.

use crate::topology::NodeId;

/// A replica that may serve the statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which node.
    pub node: NodeId,
    /// Its configured share, above 0.
    pub weight: u32,
    /// Statements of ours that it is working on.
    pub outstanding: u32,
    /// It is in the proxy's own zone.
    pub near: bool,
}

/// The near ones first: the others count only where none is near, however much the near ones have to do. Among
/// those, power of two choices: of two drawn by weight, the one with fewer outstanding statements
/// per weight; the first on a tie. It follows load as well as a full scan does, without the herd that
/// runs to the one least loaded node (Mitzenmacher 2001). `None` when there is no candidate.
pub fn pick(candidates: &[Candidate], chance: u64) -> Option<NodeId> {
    if let [only] = candidates {
        return Some(only.node);
    }
    let near = candidates.iter().any(|c| c.near);
    let meant = || candidates.iter().filter(|c| c.near == near);
    let total: u64 = meant().map(|c| u64::from(c.weight)).sum();
    if total == 0 {
        return meant().next().map(|c| c.node);
    }
    let first = draw(meant(), (chance & 0xFFFF_FFFF) % total)?;
    let second = draw(meant(), (chance >> 32) % total)?;
    Some(if lighter(second, first) { second.node } else { first.node })
}

fn draw<'c>(mut candidates: impl Iterator<Item = &'c Candidate>, mut at: u64) -> Option<&'c Candidate> {
    candidates.find(|candidate| match at.checked_sub(u64::from(candidate.weight)) {
        Some(rest) => {
            at = rest;
            false
        }
        None => true,
    })
}

fn lighter(a: &Candidate, b: &Candidate) -> bool {
    // outstanding / weight, compared without division
    u64::from(a.outstanding) * u64::from(b.weight) < u64::from(b.outstanding) * u64::from(a.weight)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(node: u16, weight: u32, outstanding: u32) -> Candidate {
        Candidate { node: NodeId(node), weight, outstanding, near: false }
    }

    fn near(node: u16, weight: u32, outstanding: u32) -> Candidate {
        Candidate { near: true, ..candidate(node, weight, outstanding) }
    }

    #[test]
    fn those_of_the_own_zone_come_first_and_the_others_when_there_is_none() {
        let own_and_others = [candidate(0, 9, 0), near(1, 1, 50), candidate(2, 9, 0)];
        let two_near = [candidate(0, 1, 0), near(1, 1, 5), near(2, 1, 7), near(3, 0, 0)];
        for chance in [0, 1, 3 << 32, u64::MAX, 0x9E37_79B9_7F4A_7C15] {
            assert_eq!(pick(&own_and_others, chance), Some(NodeId(1)), "busy, and yet near");
            let others = [own_and_others[0], own_and_others[2]];
            assert!(pick(&others, chance).is_some());
        }
        // Among themselves the near ones are chosen from as all are.
        assert_eq!(pick(&two_near, 1 << 32), Some(NodeId(1)));
        assert_eq!(pick(&two_near, 1 | 1 << 32), Some(NodeId(2)));
    }

    #[test]
    fn nobody_is_picked_from_nobody() {
        assert_eq!(pick(&[], 7), None);
    }

    #[test]
    fn of_two_drawn_the_less_loaded_wins() {
        let both = [candidate(0, 1, 9), candidate(1, 1, 2)];
        // low half draws index 0, high half index 1, and the other way round
        assert_eq!(pick(&both, 1 << 32), Some(NodeId(1)));
        assert_eq!(pick(&both, 1), Some(NodeId(1)));
    }

    #[test]
    fn load_counts_per_weight() {
        let both = [candidate(0, 10, 9), candidate(1, 1, 2)];
        assert_eq!(pick(&both, 10 << 32), Some(NodeId(0)));
    }

    proptest! {
        #[test]
        fn a_pick_is_one_of_the_candidates(
            weights in proptest::collection::vec((1u32..100, 0u32..1000, any::<bool>()), 1..8),
            chance: u64,
        ) {
            let all: Vec<_> = weights.iter().enumerate()
                .map(|(i, &(w, o, near))| Candidate { near, ..candidate(i as u16, w, o) }).collect();
            let picked = pick(&all, chance).unwrap();
            let picked = all.iter().find(|c| c.node == picked).unwrap();
            prop_assert!(picked.near || all.iter().all(|c| !c.near));
        }
    }

    #[test]
    fn equal_replicas_share_evenly() {
        let three = [candidate(0, 1, 0), candidate(1, 1, 0), candidate(2, 1, 0)];
        let mut counts = [0u32; 3];
        let mut chance = 0x9E37_79B9_7F4A_7C15u64;
        for _ in 0..30_000 {
            chance = chance.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            counts[pick(&three, chance ^ (chance >> 29)).unwrap().index()] += 1;
        }
        for count in counts {
            assert!((9_000..11_000).contains(&count), "uneven: {counts:?}");
        }
    }
}
