//! Plays tests/scenarios/mark.txt.

use std::time::{Duration, Instant};

use highwater::positions::{Incarnation, Late, Note, Positions, Sample, SampleBody};
use highwater::session::mark::{Mark, PrimaryVerdict, Quorum, ReplicaVerdict, Survival};
use highwater::topology::{Epoch, Exclusion, NodeId, Standing, Switch, Topology};
use highwater::wal::{Lsn, TimelineId};

use crate::healthy::topology;

struct Story {
    positions: Positions,
    topology: Topology,
    mark: Option<Mark>,
    last_sample: Option<(u64, Lsn)>,
    /// Where the session was let, and what it was told then.
    let_to: Option<(NodeId, Incarnation)>,
}

fn node(word: &str) -> Option<NodeId> {
    ["a", "b", "c"].iter().position(|name| *name == word).map(|at| NodeId(at as u16))
}

impl Story {
    fn new() -> Story {
        let positions = Positions::new(3);
        for id in 0..3 {
            positions.node(NodeId(id)).connected();
        }
        let topology = topology(&["a", "b", "c"]);
        Story { positions, topology, mark: None, last_sample: None, let_to: None }
    }

    fn mark(&mut self) -> &mut Mark {
        self.mark.as_mut().expect("the story has a session")
    }

    /// As before each statement.
    fn absorb(&mut self) {
        let mark = self.mark.as_mut().expect("the story has a session");
        mark.absorb(&self.positions, &self.topology);
    }

    fn sample(&mut self, at: NodeId, upto: u64, word: Option<&str>, other: Option<u64>) {
        let positions = self.positions.node(at);
        let (number, incarnation) = (positions.begin(), positions.incarnation());
        let body = if self.topology.primary == Some(at) {
            assert!(word.is_none_or(|word| word == "floor"));
            self.last_sample = Some((number, Lsn(upto)));
            SampleBody::Primary { insert: Lsn(upto), floor: Lsn(other.unwrap_or(upto)) }
        } else {
            assert!(word.is_none_or(|word| word == "received"));
            let late = Late { by: Duration::ZERO, rate: None, asked_at: Instant::now() };
            SampleBody::Replica { receive: Some(Lsn(other.unwrap_or(upto))), replay: Lsn(upto), late }
        };
        let timeline = self.topology.node(at).timeline.unwrap();
        let sample = Sample { number, incarnation, epoch: self.topology.epoch, timeline, body };
        self.positions.publish(at, sample);
    }

    fn promote(&mut self, chosen: NodeId, fork: Option<Lsn>) {
        let old_primary = self.topology.primary.unwrap();
        let old_timeline = self.topology.timeline.unwrap();
        let (from, last_sample) = (self.topology.epoch, self.last_sample.take());
        self.topology.switches.push(Switch {
            from,
            old_primary,
            old_timeline,
            fork,
            gone_from: fork,
            last_sample,
            kept: false,
        });
        let timeline = TimelineId(old_timeline.0 + 1);
        self.topology.epoch = Epoch(from.0 + 1);
        self.topology.timeline = Some(timeline);
        self.topology.primary = Some(chosen);
        for view in &mut self.topology.nodes {
            view.standing = Standing::Excluded(Exclusion::OtherTimeline);
        }
        let view = &mut self.topology.nodes[chosen.index()];
        view.standing = Standing::Primary { reachable: true };
        view.timeline = Some(timeline);
    }

    fn line(&mut self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.get(1).and_then(|word| node(word));
        let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok());
        match (words[0], at) {
            ("session", _) => self.mark = Some(Mark::new(&self.positions, &self.topology)),
            ("absorb", _) => self.absorb(),
            ("sample", Some(at)) => self.sample(at, number(2).unwrap(), words.get(3).copied(), number(4)),
            ("shown", Some(at)) => {
                self.absorb();
                self.let_to = Some((at, self.positions.node(at).incarnation()));
                self.shows(at);
            }
            ("wrote", Some(at)) => {
                self.absorb();
                self.mark().wrote();
                self.let_to = Some((at, self.positions.node(at).incarnation()));
                self.shows(at);
            }
            ("let", Some(at)) => {
                self.absorb();
                self.let_to = Some((at, self.positions.node(at).incarnation()));
            }
            ("shows", Some(at)) => self.shows(at),
            ("restart", Some(at)) => {
                self.positions.node(at).lost();
                self.positions.node(at).connected();
            }
            ("lost", Some(at)) => self.positions.node(at).lost(),
            ("eject", Some(at)) => {
                let why = Exclusion::Ejected("it failed".to_owned());
                self.topology.nodes[at.index()].standing = Standing::Excluded(why);
            }
            ("admit", Some(at)) => self.topology.nodes[at.index()].standing = Standing::Replica,
            ("promote", Some(at)) => self.promote(at, number(3).map(Lsn)),
            ("follow", Some(at)) => {
                let timeline = self.topology.timeline;
                let view = &mut self.topology.nodes[at.index()];
                (view.standing, view.timeline) = (Standing::Replica, timeline);
            }
            ("crosses", _) => {
                let mark = self.mark.as_mut().unwrap();
                let told = match mark.follow(&self.positions, &self.topology) {
                    Survival::Kept => "kept",
                    Survival::Unknown(_) => "unknown",
                    Survival::Lost(_) => "lost",
                };
                return expect(words[1], told);
            }
            ("leaves", _) => {
                self.absorb();
                let mark = self.mark.as_mut().unwrap();
                let leaves = mark.leave_stalled(&self.positions, &self.topology);
                return expect(words[1], if leaves { "yes" } else { "no" });
            }
            ("primary", _) => {
                self.absorb();
                let mark = self.mark.as_ref().unwrap();
                let said = match mark.primary(&self.positions, &self.topology) {
                    PrimaryVerdict::Serves => "serves".to_owned(),
                    PrimaryVerdict::BelowFloor => "floor".to_owned(),
                    PrimaryVerdict::Unresolved(node) => {
                        format!("unresolved {}", self.topology.node(node).name)
                    }
                };
                return expect(&words[1..].join(" "), &said);
            }
            (name, _) => {
                let node = node(name).ok_or("no such word")?;
                self.absorb();
                let mark = self.mark.as_ref().unwrap();
                let said = match mark.replica(&self.positions, &self.topology, node) {
                    ReplicaVerdict::Serves { .. } => "serves",
                    ReplicaVerdict::Behind => "behind",
                    ReplicaVerdict::Unresolved => "unresolved",
                    ReplicaVerdict::Unknown => "unknown",
                };
                return expect(words[1], said);
            }
        }
        Ok(())
    }

    fn shows(&mut self, at: NodeId) {
        let (let_to, incarnation) = self.let_to.take().unwrap();
        assert_eq!(let_to, at);
        let note: Note = self.positions.note(at, self.topology.epoch);
        if self.topology.primary == Some(at) {
            self.mark().primary_showed(note);
        } else {
            let beside = self.topology.primary.map(|primary| self.positions.node(primary).counter());
            self.mark().replica_showed(note, incarnation, beside);
        }
    }
}

fn expect(wanted: &str, said: &str) -> Result<(), String> {
    if wanted == said { Ok(()) } else { Err(format!("it is: {said}")) }
}

#[test]
fn the_stories_go_as_they_are_told() {
    let text = include_str!("../scenarios/mark.txt");
    let (mut failures, mut stories) = (Vec::new(), 0);
    let (mut story, mut title, mut failed) = (Story::new(), "", false);
    for (number, line) in text.lines().enumerate() {
        if let Some(next) = line.strip_prefix("== ") {
            (story, title, failed) = (Story::new(), next, false);
            stories += 1;
        } else if !failed
            && !line.trim().is_empty()
            && !line.starts_with('#')
            && let Err(why) = story.line(line)
        {
            failed = true;
            failures.push(format!("mark.txt:{}: {title}: `{line}`: {why}", number + 1));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(stories > 25, "{stories}");
}

/// Of three replicas two have applied each commit before it is acknowledged: any two that answer know of it.
#[test]
fn replicas_answer_for_the_primary_once_enough_of_them_have_been_asked() {
    let mut story = Story::new();
    story.positions = Positions::new(4);
    (0..4).for_each(|id| _ = story.positions.node(NodeId(id)).connected());
    let sample = |story: &Story, id: u16, receive: Option<u64>, replay: u64, timeline: u32, epoch: u64| {
        let node = story.positions.node(NodeId(id));
        let late = Late { by: Duration::ZERO, rate: None, asked_at: Instant::now() };
        let body = SampleBody::Replica { receive: receive.map(Lsn), replay: Lsn(replay), late };
        let number = node.begin();
        let (incarnation, epoch) = (node.incarnation(), Epoch(epoch));
        let sample = Sample { number, incarnation, epoch, timeline: TimelineId(timeline), body };
        story.positions.publish(NodeId(id), sample);
    };
    let replicas = || (1..4).map(NodeId);
    // What was sampled before the statement came says nothing.
    sample(&story, 1, Some(900), 900, 1, 1);
    sample(&story, 2, Some(900), 900, 1, 1);
    let mut mark = Mark::new(&story.positions, &story.topology);
    let mut quorum = Quorum::of_now(&story.positions, &story.topology, replicas(), 2).unwrap();
    let reached = |quorum: &mut Quorum, story: &Story| {
        quorum.absorb(&story.positions, &story.topology);
        quorum.reached()
    };
    assert_eq!(reached(&mut quorum, &story), None);
    assert_eq!(quorum.awaits().count(), 3);
    sample(&story, 1, Some(1000), 1000, 1, 1);
    assert_eq!(reached(&mut quorum, &story), None, "one is not enough");
    // Neither a server that has begun anew, nor one of another history, nor of another epoch.
    sample(&story, 2, None, 2000, 1, 1);
    assert_eq!(reached(&mut quorum, &story), None);
    sample(&story, 2, Some(2000), 2000, 2, 1);
    assert_eq!(reached(&mut quorum, &story), None);
    sample(&story, 2, Some(2000), 2000, 1, 2);
    assert_eq!(reached(&mut quorum, &story), None);
    sample(&story, 3, Some(1200), 1100, 1, 1);
    assert_eq!(reached(&mut quorum, &story), Some(Lsn(1100)));
    assert_eq!(quorum.awaits().count(), 0);
    // The furthest of them serves, and the note on the primary is as good as resolved.
    assert!(!quorum.replica(&story.positions, NodeId(1)) && quorum.replica(&story.positions, NodeId(3)));
    assert_eq!(mark.replica(&story.positions, &story.topology, NodeId(1)), ReplicaVerdict::Unresolved);
    mark.covered_by(Lsn(1100));
    assert_eq!(mark.position(), Lsn(1100));
    assert!(mark.awaits().is_none());
    // What a replica has shown is not: it may have been more than was acknowledged.
    let note = story.positions.note(NodeId(1), Epoch(1));
    mark.replica_showed(note, note.incarnation, None);
    mark.covered_by(Lsn(5000));
    assert_eq!((mark.position(), mark.awaits()), (Lsn(1100), Some(NodeId(1))));
    // In a new epoch they answer for nobody.
    let mut late = Quorum::of_now(&story.positions, &story.topology, replicas(), 2).unwrap();
    story.topology.epoch = Epoch(2);
    (1..4).for_each(|id| sample(&story, id, Some(3000), 3000, 1, 2));
    assert_eq!(reached(&mut late, &story), None);
    // As many as have applied it need not be asked, but for one.
    for (applied_by, needed) in [(0, None), (1, Some(3)), (3, Some(1)), (4, None)] {
        let quorum = Quorum::of_now(&story.positions, &story.topology, replicas(), applied_by);
        let Some(mut quorum) = quorum else {
            assert_eq!(needed, None, "{applied_by}");
            continue;
        };
        let mut answers = 0;
        while reached(&mut quorum, &story).is_none() {
            answers += 1;
            sample(&story, answers, Some(3000), 3000, 1, 2);
        }
        assert_eq!(Some(answers), needed, "{applied_by}");
    }
}
