//! The mark: the position in the write-ahead log that a session may not fall behind. Pure.
//!
//! One rule gives read-your-writes, monotonic reads, monotonic writes and writes-follow-reads:
//! *whatever a node has shown a session, the session may not see an older state.* At each
//! ReadyForQuery the session takes a [`Note`] of the node that served it; a sample of that node sent
//! later turns the note into a position. Until then only that very node may serve.
//!
//! Two things make this more than "compare with the primary's position after a write":
//! - A replica shows a commit *before* the primary does (the primary takes a transaction out of its
//!   list of running ones, and ends its wait for synchronous standbys, only after the commit record
//!   has left). So the primary, too, has a condition: its *visible floor* must have reached what
//!   replicas have shown this session.
//! - A replica shows a commit before it publishes its replay position. So a replica's note is
//!   resolved only by a sample that shows nothing in progress, or by one that has moved on from an
//!   earlier one.

use std::fmt;

use crate::positions::{Incarnation, Note, Sample, SampleBody};
use crate::topology::{Epoch, NodeId, Standing, Switch, Topology};
use crate::wal::Lsn;

/// Where the samples are read from: `positions`, or a table in a test.
pub trait Samples {
    /// The last sample answered on the node's current sampler connection.
    fn latest(&self, node: NodeId) -> Option<Sample>;
    /// The node's current sampler connection.
    fn incarnation(&self, node: NodeId) -> Incarnation;
    /// A note on `node` as of now.
    fn note(&self, node: NodeId, epoch: Epoch) -> Note;
}

impl Samples for crate::positions::Positions {
    fn latest(&self, node: NodeId) -> Option<Sample> {
        self.node(node).latest()
    }

    fn incarnation(&self, node: NodeId) -> Incarnation {
        self.node(node).incarnation()
    }

    fn note(&self, node: NodeId, epoch: Epoch) -> Note {
        crate::positions::Positions::note(self, node, epoch)
    }
}

/// A note that no sample has resolved yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pending {
    note: Note,
    kind: PendingKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PendingKind {
    /// The session is new: nothing was shown to it, but whoever opened it may know of commits.
    Inherited,
    /// The primary showed something. `replica_part`: it stands for something that a replica showed.
    Primary { replica_part: bool },
    /// A replica showed something. `first`: what the first sample that covers the note said, if that did
    /// not resolve it. `beside`: the primary's sample counter when the note was taken; the primary held all that the
    /// replica had shown, so a later sample of it covers the note, too.
    Replica { first: Option<FirstCovering>, beside: Option<u64> },
}

/// The first sample sent after a replica's note, in which something was being replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FirstCovering {
    number: u64,
    replay: Lsn,
    /// A later sample has found the replica where it was.
    stalled: bool,
}

/// The position a session may not fall behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    epoch: Epoch,
    position: Lsn,
    seen: Lsn,
    /// A position that was known before the last write of this session was sent: its commit lies past it.
    wrote: Lsn,
    pending: Option<Pending>,
}

/// May this replica serve the session's next statement?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplicaVerdict {
    /// Yes: what it shows is at or past the mark, by this sample.
    Serves {
        /// Its number. A backend must have been connected before it was sent.
        sample: u64,
        /// Its sampler connection: the note on what the node is about to show must be of this one.
        incarnation: Incarnation,
    },
    /// It is known to be behind the mark.
    Behind,
    /// A note on another node has not been resolved.
    Unresolved,
    /// There is no sample of it in this epoch and on this timeline.
    Unknown,
}

/// May the primary serve the session's next statement?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrimaryVerdict {
    /// Yes.
    Serves,
    /// A replica's note must be resolved first: by a sample of this node.
    Unresolved(NodeId),
    /// Its visible floor has not reached what replicas have shown this session.
    BelowFloor,
}

/// What a change of the primary means for a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Survival {
    /// All it has seen or written is on the new timeline.
    Kept,
    /// Its position is past the fork, or no sample can place what it was shown last: that may or may not be gone.
    Unknown(Fork),
    /// It has written past the fork: that is gone.
    Lost(Fork),
}

/// Where the new timeline began, beside what a session had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fork {
    /// The epoch that ended.
    pub epoch: Epoch,
    /// The fork, if it could be learned.
    pub fork: Option<Lsn>,
    /// The session's mark at the time.
    pub mark: Lsn,
    /// It had been shown something after that, of which no position is known.
    pub open: bool,
}

impl fmt::Display for Fork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "The session's mark in epoch {} was {}{}; the new timeline began at ",
            self.epoch.0,
            if self.open { "not known, and at least " } else { "" },
            self.mark
        )?;
        match self.fork {
            Some(lsn) => write!(f, "{lsn}."),
            None => f.write_str("a position that could not be learned."),
        }
    }
}

impl Mark {
    /// A new session's mark: it must not fall behind what the primary holds now, because whoever opens
    /// it may have written through another connection (`psql -c insert; psql -c select`).
    pub fn new(samples: &impl Samples, topology: &Topology) -> Mark {
        let mut mark = Mark {
            epoch: topology.epoch,
            position: Lsn::ZERO,
            seen: Lsn::ZERO,
            wrote: Lsn::ZERO,
            pending: None,
        };
        mark.inherit(samples, topology);
        mark
    }

    /// The position known so far; a pending note may raise it.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The epoch it is valid in.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The node whose sample would resolve the pending note.
    pub fn awaits(&self) -> Option<NodeId> {
        self.pending.map(|p| p.note.node)
    }

    fn inherit(&mut self, samples: &impl Samples, topology: &Topology) {
        self.pending = topology.primary.map(|primary| Pending {
            note: samples.note(primary, topology.epoch),
            kind: PendingKind::Inherited,
        });
    }

    /// Without a primary a new session has no note to take; it takes one as soon as there is one.
    fn inherit_late(&mut self, samples: &impl Samples, topology: &Topology) {
        if self.pending.is_none() && self.position == Lsn::ZERO {
            self.inherit(samples, topology);
        }
    }

    /// The primary has shown something: call it after the ReadyForQuery was received, with a note taken then.
    pub fn primary_showed(&mut self, note: Note) {
        // The statement was sent only after any replica's note had been resolved, so what is replaced
        // here is an earlier note of the same primary, or an inherited one, which this covers.
        let replica_part =
            matches!(self.pending, Some(Pending { kind: PendingKind::Primary { replica_part: true }, .. }));
        self.pending = Some(Pending { note, kind: PendingKind::Primary { replica_part } });
        // It was sent only once the floor had reached `seen`, and a primary's visible state only grows.
        self.seen = Lsn::ZERO;
    }

    /// The primary has acknowledged a write: call it before anything that was sampled since that was sent is absorbed.
    pub fn wrote(&mut self) {
        self.wrote = self.position;
    }

    /// A replica has shown something: call it after the ReadyForQuery was received, with a note taken then,
    /// and with the incarnation of the verdict that let the statement go there. The one at the time of the
    /// note may be a later one: of a server that has crashed since, and gone back behind what it showed.
    /// `beside`: the sample counter of the primary of the note's epoch, read when the note was taken.
    pub fn replica_showed(&mut self, note: Note, incarnation: Incarnation, beside: Option<u64>) {
        debug_assert!(
            self.pending.is_none_or(|p| p.note.node == note.node),
            "a replica serves only when nothing is pending elsewhere"
        );
        let note = Note { incarnation, ..note };
        self.pending = Some(Pending { note, kind: PendingKind::Replica { first: None, beside } });
    }

    /// As [`primary_showed`](Self::primary_showed), for a mark that several sessions share: meanwhile another
    /// of them may have been shown something.
    pub fn primary_showed_one(&mut self, note: Note, samples: &impl Samples, topology: &Topology) {
        // `seen` stays: another session may have raised it since this statement was sent.
        let pending = Pending { note, kind: PendingKind::Primary { replica_part: false } };
        self.add(pending, samples, topology);
    }

    /// As [`replica_showed`](Self::replica_showed), for a mark that several sessions share.
    pub fn replica_showed_one(
        &mut self,
        note: Note,
        incarnation: Incarnation,
        beside: Option<u64>,
        samples: &impl Samples,
        topology: &Topology,
    ) {
        let note = Note { incarnation, ..note };
        let kind = PendingKind::Replica { first: None, beside };
        self.add(Pending { note, kind }, samples, topology);
    }

    /// Takes in all that another mark of the same epoch stands for: a session joins those that share this one.
    pub fn join(&mut self, other: &Mark, samples: &impl Samples, topology: &Topology) {
        debug_assert_eq!(self.epoch, other.epoch, "both have followed the topology");
        self.position = self.position.max(other.position);
        self.seen = self.seen.max(other.seen);
        if let Some(pending) = other.pending {
            self.add(pending, samples, topology);
        }
    }

    /// A second note beside the pending one. Of one node, the later covers the earlier. Two nodes have no
    /// common order but the primary's: it holds all that either ever showed, so a note on the primary as of
    /// now covers both.
    fn add(&mut self, new: Pending, samples: &impl Samples, topology: &Topology) {
        use PendingKind::{Inherited, Primary, Replica};
        let Some(old) = self.pending else {
            self.pending = Some(new);
            return;
        };
        let later = if new.note.counter >= old.note.counter { new.note } else { old.note };
        let part = |kind| matches!(kind, Primary { replica_part: true });
        self.pending = match (old.kind, new.kind) {
            (Inherited, Inherited) if old.note.node == new.note.node => Some(Pending { note: later, ..old }),
            (Inherited | Primary { .. }, Inherited | Primary { .. }) if old.note.node == new.note.node => {
                let replica_part = part(old.kind) || part(new.kind);
                Some(Pending { note: later, kind: Primary { replica_part } })
            }
            (Replica { .. }, Replica { .. })
                if old.note.node == new.note.node && old.note.incarnation == new.note.incarnation =>
            {
                // What the first covering sample of the earlier note said does not cover the later.
                let kind = if later.counter == old.note.counter { old.kind } else { new.kind };
                Some(Pending { note: later, kind })
            }
            _ => match topology.primary {
                Some(primary) => Some(Pending {
                    note: samples.note(primary, topology.epoch),
                    kind: Primary { replica_part: true },
                }),
                // A note that no sample resolves, to be handed over once there is a primary.
                None => Some(Pending {
                    note: Note { incarnation: Incarnation(u64::MAX), ..new.note },
                    kind: Replica { first: None, beside: None },
                }),
            },
        };
    }

    /// Raises the mark to a position of this epoch's timeline that somebody else has seen, on whatever node.
    pub fn raise(&mut self, position: Lsn) {
        self.position = self.position.max(position);
        // It may have been a replica that showed it, before the primary did.
        self.seen = self.seen.max(position);
    }

    /// Replicas that answer for the primary have reached `reached`, asked after the pending note was taken: so far at
    /// least goes what the primary had shown. What a replica has shown is another matter.
    pub fn covered_by(&mut self, reached: Lsn) {
        let covered = matches!(
            self.pending.map(|pending| pending.kind),
            Some(PendingKind::Inherited | PendingKind::Primary { replica_part: false })
        );
        if covered {
            self.position = self.position.max(reached);
            self.pending = None;
        }
    }

    /// Whether all that the session has seen is known as a position.
    pub fn is_resolved(&self) -> bool {
        self.pending.is_none() && self.position != Lsn::ZERO
    }

    /// Resolves the pending note if a sample allows it, and follows a restart or ejection of its node.
    pub fn absorb(&mut self, samples: &impl Samples, topology: &Topology) {
        debug_assert_eq!(self.epoch, topology.epoch, "follow() comes first");
        self.inherit_late(samples, topology);
        let Some(pending) = self.pending else { return };
        match pending.kind {
            PendingKind::Inherited => self.absorb_primary(samples, pending.note, false),
            PendingKind::Primary { replica_part } => self.absorb_primary(samples, pending.note, replica_part),
            PendingKind::Replica { first, beside } => {
                self.absorb_replica(samples, topology, pending.note, first, beside);
            }
        }
    }

    fn absorb_primary(&mut self, samples: &impl Samples, note: Note, replica_part: bool) {
        let Some(sample) = samples.latest(note.node) else { return };
        let SampleBody::Primary { insert, .. } = sample.body else { return };
        if sample.number <= note.counter || sample.epoch != self.epoch {
            return;
        }
        self.position = self.position.max(insert);
        if replica_part {
            self.seen = self.seen.max(insert);
        }
        self.pending = None;
    }

    fn absorb_replica(
        &mut self,
        samples: &impl Samples,
        topology: &Topology,
        note: Note,
        first: Option<FirstCovering>,
        beside: Option<u64>,
    ) {
        let gone = samples.incarnation(note.node) != note.incarnation
            || topology.node(note.node).standing != Standing::Replica;
        if gone {
            return self.hand_over(samples, topology, beside.filter(|_| note.epoch == topology.epoch));
        }
        let Some(sample) = samples.latest(note.node) else { return };
        let SampleBody::Replica { receive, replay, .. } = sample.body else { return };
        if sample.number <= note.counter || sample.incarnation != note.incarnation {
            return;
        }
        if receive == Some(replay) || first.is_some_and(|first| replay > first.replay) {
            self.position = self.position.max(replay);
            self.seen = self.seen.max(replay);
            self.pending = None;
            return;
        }
        let first = match first {
            None => FirstCovering { number: sample.number, replay, stalled: false },
            Some(first) => FirstCovering { stalled: sample.number > first.number, ..first },
        };
        self.pending = Some(Pending { note, kind: PendingKind::Replica { first: Some(first), beside } });
    }

    /// A replica whose replay stands still (paused, delayed, held up by a long query) would resolve its
    /// note only when it moves on, and no statement could run elsewhere until then. Whoever wants the
    /// primary places such a note by what the replica has received, or else turns it into one on the primary.
    /// Whether it was one.
    pub fn leave_stalled(&mut self, samples: &impl Samples, topology: &Topology) -> bool {
        if self.place_stalled(samples, topology) {
            return true;
        }
        let Some((note, beside)) = self.stalled().filter(|_| topology.primary.is_some()) else {
            return false;
        };
        self.hand_over(samples, topology, beside.filter(|_| note.epoch == topology.epoch));
        true
    }

    /// As [`leave_stalled`](Self::leave_stalled), without the primary: a replica shows nothing that it had not
    /// received, and had on disk, before. A position past what it showed is as good as the very one. Whether the
    /// note was placed so.
    pub fn place_stalled(&mut self, samples: &impl Samples, topology: &Topology) -> bool {
        let placed = self.stalled().and_then(|(note, _)| self.received_by(samples, topology, note));
        if let Some(received) = placed {
            self.position = self.position.max(received);
            self.seen = self.seen.max(received);
            self.pending = None;
        }
        placed.is_some()
    }

    /// The pending note, if it is of a replica that stands where it was.
    fn stalled(&self) -> Option<(Note, Option<u64>)> {
        match self.pending {
            Some(Pending {
                note,
                kind: PendingKind::Replica { first: Some(FirstCovering { stalled: true, .. }), beside },
            }) => Some((note, beside)),
            _ => None,
        }
    }

    /// What the node of a replica's note has received, by a sample that covers the note. It says something only
    /// while the replica is fed by its walreceiver: what it takes from an archive it has not received. (Then the
    /// timeline of the sample is not known.) Nor does it after a start: then the walreceiver begins anew behind what
    /// was replayed.
    fn received_by(&self, samples: &impl Samples, topology: &Topology, note: Note) -> Option<Lsn> {
        let sample = samples.latest(note.node)?;
        let covers = sample.number > note.counter
            && sample.incarnation == note.incarnation
            && sample.epoch == self.epoch
            && Some(sample.timeline) == topology.timeline;
        match sample.body {
            SampleBody::Replica { receive: Some(receive), replay, .. } if covers && receive >= replay => {
                Some(receive)
            }
            _ => None,
        }
    }

    /// The node of a replica's note cannot be asked any more. The primary holds all that a replica
    /// ever showed, so a note on the primary as of then (its counter was `beside`), or as of now, covers it.
    fn hand_over(&mut self, samples: &impl Samples, topology: &Topology, beside: Option<u64>) {
        if let Some(primary) = topology.primary {
            let now = samples.note(primary, topology.epoch);
            let note = Note { counter: beside.map_or(now.counter, |then| then.min(now.counter)), ..now };
            self.pending = Some(Pending { note, kind: PendingKind::Primary { replica_part: true } });
            self.absorb_primary(samples, note, true);
        }
    }

    /// May `node` serve the next statement? Call [`absorb`](Self::absorb) first.
    pub fn replica(&self, samples: &impl Samples, topology: &Topology, node: NodeId) -> ReplicaVerdict {
        match self.pending {
            None => {}
            Some(p)
                if matches!(p.kind, PendingKind::Replica { .. })
                    && p.note.node == node
                    && p.note.incarnation == samples.incarnation(node) => {}
            Some(_) => return ReplicaVerdict::Unresolved,
        }
        let Some((sample, replay)) = known_replica(samples, topology, node) else {
            return ReplicaVerdict::Unknown;
        };
        // A session without any mark (no primary was ever known to it) has nothing to compare with.
        if self.pending.is_none() && self.position == Lsn::ZERO {
            return ReplicaVerdict::Unresolved;
        }
        if replay < self.position {
            return ReplicaVerdict::Behind;
        }
        ReplicaVerdict::Serves { sample: sample.number, incarnation: sample.incarnation }
    }

    /// May the primary serve the next statement? Call [`absorb`](Self::absorb) first.
    pub fn primary(&self, samples: &impl Samples, topology: &Topology) -> PrimaryVerdict {
        if let Some(Pending { note, kind: PendingKind::Replica { .. } }) = self.pending {
            return PrimaryVerdict::Unresolved(note.node);
        }
        if let Some(Pending { note, kind: PendingKind::Primary { replica_part: true } }) = self.pending {
            return PrimaryVerdict::Unresolved(note.node);
        }
        if self.seen == Lsn::ZERO {
            return PrimaryVerdict::Serves;
        }
        let floor = topology.primary.and_then(|p| samples.latest(p)).and_then(|s| match s.body {
            SampleBody::Primary { floor, .. } if s.epoch == topology.epoch => Some(floor),
            _ => None,
        });
        match floor {
            Some(floor) if floor >= self.seen => PrimaryVerdict::Serves,
            _ => PrimaryVerdict::BelowFloor,
        }
    }

    /// Follows the topology into its epoch: what of the session's past is on the new timeline?
    pub fn follow(&mut self, samples: &impl Samples, topology: &Topology) -> Survival {
        let mut verdict = Survival::Kept;
        while self.epoch < topology.epoch {
            let next = match topology.switches.iter().find(|s| s.from >= self.epoch) {
                Some(switch) => self.cross(samples, topology, switch),
                // The switch is older than what is remembered: nothing of it can be shown kept.
                None => {
                    let open = self.pending.is_some();
                    let fork = Fork { epoch: self.epoch, fork: None, mark: self.position, open };
                    self.epoch = topology.epoch;
                    self.restart_at(samples, topology, None);
                    Survival::Unknown(fork)
                }
            };
            verdict = worse(verdict, next);
        }
        verdict
    }

    fn cross(&mut self, samples: &impl Samples, topology: &Topology, switch: &Switch) -> Survival {
        if switch.kept && self.pending.is_none_or(|p| p.note.epoch <= switch.from) {
            // Whatever it was shown lies before the fork, also where no sample has told.
            self.epoch = Epoch(switch.from.0 + 1);
            self.pending = None;
            self.restart_at(samples, topology, switch.fork);
            return Survival::Kept;
        }
        let resolved = match self.pending {
            None => true,
            // Taken on the primary of now, when an earlier switch was crossed: it holds across this one.
            Some(p) if p.note.epoch > switch.from => {
                self.epoch = Epoch(switch.from.0 + 1);
                return self.cross_position(samples, topology, switch);
            }
            Some(p) => match p.kind {
                PendingKind::Inherited => {
                    // Nothing was shown to this session: it begins anew on the new primary.
                    self.epoch = Epoch(switch.from.0 + 1);
                    self.inherit(samples, topology);
                    return self.cross_position(samples, topology, switch);
                }
                PendingKind::Primary { replica_part } => match switch.last_sample {
                    Some((number, insert))
                        if number > p.note.counter && switch.old_primary == p.note.node =>
                    {
                        self.position = self.position.max(insert);
                        if replica_part {
                            self.seen = self.seen.max(insert);
                        }
                        true
                    }
                    _ => false,
                },
                // What the promoted node showed as a replica is in its own history. The same holds for
                // a replica that, on one unbroken sampler connection, now follows the new timeline.
                PendingKind::Replica { first, beside } => {
                    promoted_after(topology, switch) == Some(p.note.node)
                        || self.follows(samples, topology, p.note)
                        || self.resolves_behind(samples, switch, p.note, first)
                        || self.covered_beside(switch, p.note, beside)
                }
            },
        };
        let verdict = self.past(switch, !resolved);
        let replica_note = self.pending.filter(|p| matches!(p.kind, PendingKind::Replica { .. }));
        self.epoch = Epoch(switch.from.0 + 1);
        self.pending = None;
        if !resolved {
            self.restart_at(samples, topology, switch.fork);
            return verdict;
        }
        if replica_note.is_some() {
            // Without a primary the caller would not be here: there is none only before the first epoch.
            self.hand_over(samples, topology, None);
        }
        self.cross_position(samples, topology, switch)
    }

    /// Whether the old primary was sampled after a replica's note on its epoch was taken: all that the replica had
    /// shown lies before that.
    fn covered_beside(&mut self, switch: &Switch, note: Note, beside: Option<u64>) -> bool {
        let (Some((number, insert)), Some(beside)) = (switch.last_sample, beside) else { return false };
        let covered = note.epoch == switch.from && number > beside;
        if covered {
            self.position = self.position.max(insert);
        }
        covered
    }

    fn follows(&self, samples: &impl Samples, topology: &Topology, note: Note) -> bool {
        samples.incarnation(note.node) == note.incarnation
            && samples.latest(note.node).is_some_and(|s| {
                Some(s.timeline) == topology.timeline && matches!(s.body, SampleBody::Replica { .. })
            })
    }

    /// Whether all that a replica had shown is at or before the fork, by a sample that covers the note and
    /// was answered on the old timeline: the replica has not followed yet.
    fn resolves_behind(
        &self,
        samples: &impl Samples,
        switch: &Switch,
        note: Note,
        first: Option<FirstCovering>,
    ) -> bool {
        let Some(sample) = samples.latest(note.node) else { return false };
        let SampleBody::Replica { receive, replay, .. } = sample.body else { return false };
        let covers = sample.number > note.counter && sample.incarnation == note.incarnation;
        let published = receive == Some(replay) || first.is_some_and(|first| replay > first.replay);
        covers
            && published
            && sample.timeline == switch.old_timeline
            && switch.fork.is_some_and(|fork| replay <= fork)
    }

    /// The position itself: kept up to the fork, in doubt past it.
    fn cross_position(&mut self, samples: &impl Samples, topology: &Topology, switch: &Switch) -> Survival {
        let mark = self.position;
        if mark == Lsn::ZERO || switch.fork.is_some_and(|fork| mark <= fork) {
            return Survival::Kept;
        }
        let verdict = self.past(switch, false);
        self.restart_at(samples, topology, switch.fork);
        if switch.kept { Survival::Kept } else { verdict }
    }

    /// It cannot be shown that all is kept. Only a write that was sent when the log was past the fork already is known to
    /// be gone: a mark, and what was shown after it, may stand for no more than others' work that never came to an end.
    fn past(&self, switch: &Switch, open: bool) -> Survival {
        let fork = Fork { epoch: switch.from, fork: switch.fork, mark: self.position, open };
        let gone = self.wrote != Lsn::ZERO && switch.gone_from.is_some_and(|from| self.wrote >= from);
        if gone { Survival::Lost(fork) } else { Survival::Unknown(fork) }
    }

    /// After a loss has been found: the session goes on from what the new primary holds.
    fn restart_at(&mut self, samples: &impl Samples, topology: &Topology, fork: Option<Lsn>) {
        self.position = fork.unwrap_or(Lsn::ZERO);
        (self.seen, self.wrote) = (Lsn::ZERO, Lsn::ZERO);
        self.inherit(samples, topology);
    }
}

/// May a replica serve whoever asks for nothing but that its position be known? (Level `eventual` with a limit
/// of staleness.)
pub fn known(samples: &impl Samples, topology: &Topology, node: NodeId) -> ReplicaVerdict {
    match known_replica(samples, topology, node) {
        Some((sample, _)) => {
            ReplicaVerdict::Serves { sample: sample.number, incarnation: sample.incarnation }
        }
        None => ReplicaVerdict::Unknown,
    }
}

/// The last sample of a replica, with its replay position, if it is of this epoch, timeline and connection.
fn known_replica(samples: &impl Samples, topology: &Topology, node: NodeId) -> Option<(Sample, Lsn)> {
    let sample = samples.latest(node)?;
    let SampleBody::Replica { replay, .. } = sample.body else { return None };
    let current = sample.epoch == topology.epoch
        && Some(sample.timeline) == topology.timeline
        && sample.incarnation == samples.incarnation(node);
    current.then_some((sample, replay))
}

/// What a statement at level `strong` must be shown: all that was committed, by anybody, before it
/// arrived. A sample of the primary that is sent afterwards says up to where that is; all statements that
/// wait share it. (The read index of Raft, Ongaro 2014, section 6.4, with a sample in the place of the
/// round of heartbeats: that the primary is still the one is what the epoch says.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freshness {
    note: Note,
    reached: Option<Lsn>,
}

impl Freshness {
    /// For a statement that has just arrived. `None`: there is no primary to ask.
    pub fn of_now(samples: &impl Samples, topology: &Topology) -> Option<Freshness> {
        let primary = topology.primary?;
        Some(Freshness { note: samples.note(primary, topology.epoch), reached: None })
    }

    /// Looks at the samples; in a new epoch it begins anew.
    pub fn absorb(&mut self, samples: &impl Samples, topology: &Topology) {
        if self.note.epoch != topology.epoch {
            match Freshness::of_now(samples, topology) {
                Some(anew) => *self = anew,
                None => self.reached = None,
            }
            return;
        }
        if self.reached.is_some() {
            return;
        }
        if let Some(Sample { number, epoch, body: SampleBody::Primary { insert, .. }, .. }) =
            samples.latest(self.note.node)
            && number > self.note.counter
            && epoch == self.note.epoch
        {
            self.reached = Some(insert);
        }
    }

    /// The position, once it is known.
    pub fn reached(&self) -> Option<Lsn> {
        self.reached
    }

    /// The node whose sample is awaited.
    pub fn awaits(&self) -> Option<NodeId> {
        self.reached.is_none().then_some(self.note.node)
    }

    /// Whether a replica that may serve by the session's mark is fresh enough, too.
    pub fn replica(&self, samples: &impl Samples, node: NodeId) -> bool {
        let (Some(reached), Some(sample)) = (self.reached, samples.latest(node)) else { return false };
        matches!(sample.body, SampleBody::Replica { replay, .. } if replay >= reached)
    }

    /// Whether the primary is fresh enough. It, too, may still hide what a replica has shown to somebody.
    pub fn primary(&self, samples: &impl Samples, topology: &Topology) -> bool {
        let (Some(reached), Some(primary)) = (self.reached, topology.primary) else { return false };
        samples.latest(primary).is_some_and(|sample| {
            sample.epoch == topology.epoch
                && matches!(sample.body, SampleBody::Primary { floor, .. } if floor >= reached)
        })
    }
}

/// What a statement at level `strong` must be shown, where replicas say so in the primary's place. Of N replicas
/// each commit was applied by W before it was acknowledged (`ANY W (..)`, `remote_apply`); so among any R of them with
/// W + R > N there is one that has applied it, and what the furthest of them has applied holds all that was
/// acknowledged before they were asked. It may hold more: what was not acknowledged yet, and which another R need not
/// show (that would take a round of writing back, as Attiya, Bar-Noy and Dolev have it).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quorum {
    /// Notes on them as of the statement's arrival.
    asked: Box<[Note]>,
    /// R.
    needed: usize,
    reached: Option<Lsn>,
}

impl Quorum {
    /// For a statement that has just arrived. `None`: `applied_by` of them are none, or more than there are.
    pub fn of_now(
        samples: &impl Samples,
        topology: &Topology,
        replicas: impl Iterator<Item = NodeId>,
        applied_by: usize,
    ) -> Option<Quorum> {
        let asked: Box<[Note]> = replicas.map(|node| samples.note(node, topology.epoch)).collect();
        let needed = (asked.len() + 1).checked_sub(applied_by).filter(|_| applied_by > 0)?;
        (needed > 0).then_some(Quorum { asked, needed, reached: None })
    }

    /// Looks at the samples. In a new epoch nobody answers for the primary of the old one: it waits for nothing more.
    pub fn absorb(&mut self, samples: &impl Samples, topology: &Topology) {
        if self.reached.is_some() {
            return;
        }
        let applied = || self.asked.iter().filter_map(|note| answer(note, samples, topology));
        if applied().count() >= self.needed {
            self.reached = applied().max();
        }
    }

    /// The position, once enough have answered.
    pub fn reached(&self) -> Option<Lsn> {
        self.reached
    }

    /// The nodes whose samples are awaited.
    pub fn awaits(&self) -> impl Iterator<Item = NodeId> {
        let open = self.reached.is_none();
        self.asked.iter().filter(move |_| open).map(|note| note.node)
    }

    /// Whether a replica is fresh enough.
    pub fn replica(&self, samples: &impl Samples, node: NodeId) -> bool {
        let (Some(reached), Some(sample)) = (self.reached, samples.latest(node)) else { return false };
        matches!(sample.body, SampleBody::Replica { replay, .. } if replay >= reached)
    }
}

/// What a replica has applied, if that counts: asked after the note, on the timeline of the same epoch, and not by a
/// server that has begun anew and not received since, which may not yet have applied again what it had.
fn answer(note: &Note, samples: &impl Samples, topology: &Topology) -> Option<Lsn> {
    let sample = samples.latest(note.node)?;
    let counts = sample.number > note.counter
        && sample.epoch == note.epoch
        && note.epoch == topology.epoch
        && Some(sample.timeline) == topology.timeline;
    match sample.body {
        SampleBody::Replica { receive: Some(_), replay, .. } if counts => Some(replay),
        _ => None,
    }
}

/// The primary of the epoch that began with `switch`.
fn promoted_after(topology: &Topology, switch: &Switch) -> Option<NodeId> {
    let next = topology.switches.iter().find(|s| s.from > switch.from);
    next.map(|s| s.old_primary).or(topology.primary)
}

/// The worse of the two.
pub fn worse(a: Survival, b: Survival) -> Survival {
    let rank = |s: &Survival| match s {
        Survival::Kept => 0,
        Survival::Unknown(_) => 1,
        Survival::Lost(_) => 2,
    };
    if rank(&b) > rank(&a) { b } else { a }
}
