//! Whether the primary is gone. Pure.
//!
//! Hard evidence (nobody listens) counts at once; soft evidence (silence, a broken connection) after some failures in
//! a row. A server that says it is starting or shutting down is waited for, later refusals included, unless it does
//! so again and again. One that answers with an error lives. None of it suffices: what a proxy cannot reach may be
//! well, so the standbys are witnesses ([`testimony`]): none of them may stream from the primary, at least one must say
//! so, and one that says it streams is made to connect anew first, because a frozen or cut-off primary looks like
//! streaming for a minute.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::failover::event::{Fact, Kick, Role, Seen};
use crate::topology::NodeId;
use crate::wal::TimelineId;

/// A walreceiver that still shows as streaming is given so long to notice by itself (measured: 0.3 s after a kill)
/// before it is made to connect anew, which takes longer where the primary is gone.
pub const NOTICES_BY_ITSELF: Duration = Duration::from_millis(300);

/// The part of the settings that this goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Soft failures in a row.
    pub failure_threshold: u32,
    /// For a server that says it is starting.
    pub restart_grace: Duration,
    /// Restarts within `crash_loop_window` beyond which it is no longer waited for.
    pub crash_loop_restarts: u32,
    /// See there.
    pub crash_loop_window: Duration,
}

/// What the probes say of the primary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has not been heard of in this process.
    Unknown,
    /// It takes writes.
    Well,
    /// It has failed, not often enough to mean anything.
    Doubtful,
    /// It says that it is coming back.
    Restarting,
    /// It lives and does not serve us.
    Refuses(String),
    /// As far as this proxy can see.
    Gone,
}

/// What is remembered of the primary's probes.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    heard: bool,
    failures: u32,
    hard: bool,
    restarting: Option<Instant>,
    refuses: Option<String>,
    well: bool,
    start: Option<Arc<str>>,
    restarts: VecDeque<Instant>,
}

impl Watch {
    /// A primary that has just said itself that it takes writes.
    pub fn promoted() -> Watch {
        Watch { heard: true, well: true, ..Watch::default() }
    }

    /// Takes a probe's result. `timeline` is the one of the epoch.
    pub fn observe(&mut self, fact: &Fact, timeline: Option<TimelineId>, patience: &Patience, now: Instant) {
        self.heard = true;
        self.refuses = None;
        match fact {
            Fact::Answered(seen) => self.answered(seen, timeline, patience, now),
            Fact::Starting | Fact::ShuttingDown => {
                self.well = false;
                self.hard = false;
                self.restarting.get_or_insert(now);
            }
            Fact::Alive(cause) => {
                self.well = false;
                self.failures = 0;
                self.refuses = Some(cause.clone());
            }
            Fact::Refused | Fact::Broken | Fact::Silent => {
                self.well = false;
                self.failures = self.failures.saturating_add(1);
                self.hard = *fact == Fact::Refused;
            }
        }
    }

    fn answered(&mut self, seen: &Seen, timeline: Option<TimelineId>, patience: &Patience, now: Instant) {
        self.failures = 0;
        self.hard = false;
        let Role::Primary { timeline: writes, .. } = seen.role else {
            self.well = false;
            self.refuses = Some("it is in recovery".to_owned());
            return;
        };
        self.restarting = None;
        self.well = timeline.is_none_or(|timeline| timeline == writes);
        if !self.well {
            self.refuses = Some(format!("it writes timeline {writes}"));
        }
        if seen.start.is_some() && self.start != seen.start {
            if self.start.is_some() {
                self.restarts.push_back(now);
            }
            self.start.clone_from(&seen.start);
        }
        let window = patience.crash_loop_window;
        while self.restarts.front().is_some_and(|at| now.saturating_duration_since(*at) > window) {
            self.restarts.pop_front();
        }
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// What to make of it at `now`.
    pub fn verdict(&self, patience: &Patience, now: Instant) -> Verdict {
        if self.well {
            return Verdict::Well;
        }
        if let Some(cause) = &self.refuses {
            return Verdict::Refuses(cause.clone());
        }
        if !self.heard {
            return Verdict::Unknown;
        }
        if let Some(since) = self.restarting {
            let looping =
                u32::try_from(self.restarts.len()).unwrap_or(u32::MAX) >= patience.crash_loop_restarts.max(1);
            if !looping && now.saturating_duration_since(since) < patience.restart_grace {
                return Verdict::Restarting;
            }
            return Verdict::Gone;
        }
        match self.hard || self.failures >= patience.failure_threshold.max(1) {
            true => Verdict::Gone,
            false => Verdict::Doubtful,
        }
    }
}

/// What a standby says of the primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Witness {
    /// It has not been asked since the suspicion began.
    NotAsked,
    /// It cannot be reached.
    Unreachable,
    /// It receives from somebody else, or was never made to follow this primary: it knows nothing of it.
    Elsewhere,
    /// We have cut it off ourselves: it may know once it follows again.
    CutOff,
    /// Its walreceiver is gone.
    Alone,
    /// Its walreceiver shows as connected, which may be old news.
    Connected,
}

/// What to ask of `node`, by what it said last; `None` stands for "not since the suspicion began".
pub fn witness(fact: Option<&Fact>, primary: NodeId, system_identifier: Option<u64>) -> Witness {
    let seen = match fact {
        None => return Witness::NotAsked,
        Some(Fact::Answered(seen)) => seen,
        Some(_) => return Witness::Unreachable,
    };
    let ours = system_identifier.is_none_or(|cluster| cluster == seen.system_identifier);
    match &seen.role {
        Role::Standby { walreceiver, .. } if ours => match walreceiver {
            None => Witness::Alone,
            Some(receiver) if receiver.from.is_some_and(|from| from != primary) => Witness::Elsewhere,
            Some(_) => Witness::Connected,
        },
        _ => Witness::Elsewhere,
    }
}

/// What all of them together say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Testimony {
    /// Somebody is still to be heard.
    Wait,
    /// These are to connect anew.
    Kick(Vec<NodeId>),
    /// A standby streams from it: only our path to it is broken.
    Alive,
    /// Nobody can be reached, or nobody knows: we may be the isolated ones.
    NobodyKnows,
    /// It is gone for them, too.
    Gone,
}

/// `kicked` has the results of kicks since the suspicion began.
pub fn testimony(witnesses: &[(NodeId, Witness, Option<Kick>)], suspected_for: Duration) -> Testimony {
    let mut kick = Vec::new();
    let (mut alone, mut wait, mut cut_off) = (0usize, false, false);
    for (node, witness, kicked) in witnesses {
        match (witness, kicked) {
            (Witness::NotAsked, _) => wait = true,
            (Witness::CutOff, _) => cut_off = true,
            (Witness::Unreachable | Witness::Elsewhere, _) => {}
            (_, Some(Kick::Streams)) => return Testimony::Alive,
            // A kicked one that shows as connected again is not alone after all.
            (Witness::Alone, _) | (Witness::Connected, Some(Kick::Gone)) => alone += 1,
            // The same process says nothing; another standby may.
            (Witness::Connected, Some(Kick::SameProcess)) => {}
            (Witness::Connected, None) if suspected_for < NOTICES_BY_ITSELF => wait = true,
            (Witness::Connected, None) => kick.push(*node),
        }
    }
    if !kick.is_empty() {
        Testimony::Kick(kick)
    } else if wait {
        Testimony::Wait
    } else if alone > 0 {
        Testimony::Gone
    } else if cut_off {
        Testimony::Wait
    } else {
        Testimony::NobodyKnows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failover::event::Walreceiver;
    use crate::wal::Lsn;

    const PATIENCE: Patience = Patience {
        failure_threshold: 3,
        restart_grace: Duration::from_secs(10),
        crash_loop_restarts: 3,
        crash_loop_window: Duration::from_secs(60),
    };

    fn primary(start: &str) -> Fact {
        Fact::Answered(Seen {
            system_identifier: 1,
            start: Some(Arc::from(start)),
            role: Role::Primary { timeline: TimelineId(1), insert: Lsn(1), fork: None },
        })
    }

    fn verdict_after(facts: &[(u64, Fact)]) -> Verdict {
        let start = Instant::now();
        let (mut watch, mut now) = (Watch::default(), start);
        for (ms, fact) in facts {
            now = start + Duration::from_millis(*ms);
            watch.observe(fact, Some(TimelineId(1)), &PATIENCE, now);
        }
        watch.verdict(&PATIENCE, now)
    }

    #[test]
    fn evidence_is_weighed() {
        let well = primary("1");
        let cases = [
            (vec![(0, well.clone())], Verdict::Well),
            (vec![(0, well.clone()), (5, Fact::Refused)], Verdict::Gone),
            (vec![(0, well.clone()), (5, Fact::Silent)], Verdict::Doubtful),
            (vec![(0, well.clone()), (5, Fact::Silent), (6, Fact::Broken), (7, Fact::Silent)], Verdict::Gone),
            // Slow is not dead: an answer in between starts the count anew.
            (
                vec![
                    (0, Fact::Silent),
                    (1, Fact::Silent),
                    (2, well.clone()),
                    (3, Fact::Silent),
                    (4, Fact::Silent),
                ],
                Verdict::Doubtful,
            ),
            // A planned restart: refused between two 57P03.
            (vec![(0, Fact::Starting), (50, Fact::Refused)], Verdict::Restarting),
            (vec![(0, Fact::ShuttingDown), (50, Fact::Refused), (150, Fact::Starting)], Verdict::Restarting),
            (vec![(0, Fact::Starting), (10_001, Fact::Starting)], Verdict::Gone),
            (vec![(0, Fact::Starting), (10_001, Fact::Refused)], Verdict::Gone),
            (vec![(0, Fact::Alive("53300".into()))], Verdict::Refuses("53300".into())),
            (vec![], Verdict::Unknown),
        ];
        for (facts, expected) in cases {
            assert_eq!(verdict_after(&facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn a_crash_loop_is_not_waited_for() {
        let mut facts = vec![(0, primary("0"))];
        for n in 1..=3u64 {
            facts.push((n * 1000, Fact::Starting));
            assert_eq!(verdict_after(&facts), Verdict::Restarting, "{n}");
            facts.push((n * 1000 + 100, primary(&n.to_string())));
            assert_eq!(verdict_after(&facts), Verdict::Well);
        }
        facts.push((4000, Fact::Starting));
        assert_eq!(verdict_after(&facts), Verdict::Gone);
        facts.push((70_000, primary("4")));
        facts.push((70_001, Fact::Starting));
        assert_eq!(verdict_after(&facts), Verdict::Restarting, "long ago");
    }

    #[test]
    fn standbys_are_heard() {
        use Testimony::{Alive, Gone, NobodyKnows, Wait};
        use Witness::{Alone, Connected, CutOff, Elsewhere, NotAsked, Unreachable};
        let (b, c) = (NodeId(1), NodeId(2));
        let long = Duration::from_secs(1);
        let check = |one, one_kicked, other, other_kicked, since, expected| {
            let heard = [(b, one, one_kicked), (c, other, other_kicked)];
            assert_eq!(testimony(&heard, since), expected, "{heard:?} {since:?}");
        };
        check(Alone, None, Alone, None, Duration::ZERO, Gone);
        check(Alone, None, Unreachable, None, Duration::ZERO, Gone);
        check(Alone, None, NotAsked, None, Duration::ZERO, Wait);
        check(Alone, None, Connected, None, Duration::ZERO, Wait);
        check(Alone, None, Connected, None, long, Testimony::Kick(vec![c]));
        check(Connected, None, Connected, None, Duration::ZERO, Wait);
        check(Connected, None, Connected, None, long, Testimony::Kick(vec![b, c]));
        check(Connected, Some(Kick::Gone), Connected, Some(Kick::Gone), long, Gone);
        check(Connected, Some(Kick::Gone), Connected, Some(Kick::Streams), long, Alive);
        check(Connected, Some(Kick::Gone), Connected, Some(Kick::SameProcess), long, Gone);
        check(Connected, Some(Kick::SameProcess), Unreachable, None, long, NobodyKnows);
        check(Unreachable, None, Unreachable, None, long, NobodyKnows);
        check(Elsewhere, None, Unreachable, None, long, NobodyKnows);
        check(Elsewhere, Some(Kick::Streams), Alone, None, long, Gone);
        check(Elsewhere, None, Elsewhere, None, long, NobodyKnows);
        check(CutOff, None, Unreachable, None, long, Wait);
        check(CutOff, None, Connected, Some(Kick::SameProcess), long, Wait);
        check(CutOff, None, Connected, Some(Kick::Streams), long, Alive);
        check(CutOff, None, Alone, None, long, Gone);
    }

    #[test]
    fn a_cascaded_standby_is_no_witness() {
        let standby = |from| {
            Fact::Answered(Seen {
                system_identifier: 1,
                start: None,
                role: Role::Standby {
                    timeline: Some(TimelineId(1)),
                    receive: None,
                    replay: None,
                    walreceiver: Some(Walreceiver { pid: 1, streaming: true, timeline: TimelineId(1), from }),
                },
            })
        };
        for (from, expected) in [
            (Some(NodeId(0)), Witness::Connected),
            (None, Witness::Connected),
            (Some(NodeId(2)), Witness::Elsewhere),
        ] {
            assert_eq!(witness(Some(&standby(from)), NodeId(0), Some(1)), expected);
        }
        assert_eq!(witness(Some(&standby(None)), NodeId(0), Some(2)), Witness::Elsewhere, "another cluster");
        assert_eq!(witness(Some(&Fact::Silent), NodeId(0), Some(1)), Witness::Unreachable);
    }
}
