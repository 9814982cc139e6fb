//! Stories of the machine: what comes in, and what it does about it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::failover::decide::{Durability, Machine, Mode, NodeRule, Settings};
use crate::failover::event::*;
use crate::failover::record::{Intent, Record, Stage, SyncState};
use crate::topology::{Epoch, NodeId};
use crate::wal::{Lsn, TimelineId};

const A: NodeId = NodeId(0);
const B: NodeId = NodeId(1);
const C: NodeId = NodeId(2);
const T1: TimelineId = TimelineId(1);
const T2: TimelineId = TimelineId(2);

fn settings() -> Settings {
    let rule = |name: &str| NodeRule { name: name.to_owned(), priority: 100, zone: None };
    Settings { max_lost_bytes: 1000, ..Settings::of_nodes(["a", "b", "c"].map(rule).to_vec()) }
}

fn standby(timeline: TimelineId, from: Option<NodeId>, at: u64) -> Fact {
    let walreceiver = from.map(|from| Walreceiver { pid: 7, streaming: true, timeline, from: Some(from) });
    Fact::Answered(Seen {
        system_identifier: 42,
        start: None,
        role: Role::Standby {
            timeline: Some(timeline),
            receive: Some(Lsn(at)),
            replay: Some(Lsn(at)),
            walreceiver,
        },
    })
}

fn writer(timeline: TimelineId, at: u64) -> Fact {
    Fact::Answered(Seen {
        system_identifier: 42,
        start: Some(Arc::from("1")),
        role: Role::Primary { timeline, insert: Lsn(at), fork: (timeline > T1).then_some(Lsn(100)) },
    })
}

/// A machine, its clock, and what it wants done.
struct Play {
    machine: Machine,
    now: Now,
    orders: VecDeque<(OrderId, NodeId, Order)>,
    actions: Vec<Action>,
}

impl Play {
    fn begin(settings: Settings, record: Record) -> Play {
        let now = Now { at: Instant::now(), unix_ms: 0 };
        let machine = Machine::new(settings, record, now);
        Play { machine, now, orders: VecDeque::new(), actions: Vec::new() }
    }

    /// Three nodes that are well.
    fn well(settings: Settings) -> Play {
        let mut play = Play::begin(settings, Record::default());
        let adopted =
            Event::Adopted { primary: A, timeline: T1, epoch: Epoch(1), system_identifier: 42, forked: None };
        play.tell(adopted);
        play.sees(A, writer(T1, 100));
        play.sees(B, standby(T1, Some(A), 100));
        play.sees(C, standby(T1, Some(A), 100));
        assert_eq!(play.machine.state(), &State::Healthy);
        assert!(play.orders.is_empty());
        play
    }

    fn tell(&mut self, event: Event) {
        let actions = self.machine.step(event, self.now);
        let records = actions.iter().filter(|action| matches!(action, Action::Record(_))).count();
        assert!(records == 0 || (records == 1 && matches!(actions[0], Action::Record(_))), "{actions:?}");
        for action in &actions {
            if let Action::Order { id, node, order } = action {
                self.orders.push_back((*id, *node, order.clone()));
            }
        }
        self.actions.extend(actions);
    }

    fn sees(&mut self, node: NodeId, fact: Fact) {
        self.tell(Event::Observed { node, fact });
    }

    fn after(&mut self, time: Duration) {
        self.now.at += time;
        self.tell(Event::Tick);
    }

    fn closed(&mut self) {
        let epoch = self.machine.record().epoch;
        self.tell(Event::SocketsClosed { epoch });
    }

    /// The order with this label on this node ends so.
    fn ends(&mut self, label: &str, node: NodeId, result: OrderResult) {
        let at = self.orders.iter().position(|(_, of, order)| *of == node && order.label() == label);
        let at = at.unwrap_or_else(|| panic!("no {label} on {node:?} in {:?}", self.orders));
        let (id, ..) = self.orders.remove(at).unwrap();
        self.tell(Event::OrderDone { id, result });
    }

    fn open(&self) -> Vec<(&'static str, NodeId)> {
        self.orders.iter().map(|(_, node, order)| (order.label(), *node)).collect()
    }

    fn cut(&mut self, node: NodeId, end: u64) {
        self.ends("sever", node, OrderResult::Severed { end: Lsn(end), timeline: Some(T1) });
    }

    /// The primary dies of kill -9, and the standbys notice.
    fn dies(&mut self) {
        self.sees(A, Fact::Refused);
        self.sees(B, standby(T1, None, 100));
        self.sees(C, standby(T1, None, 100));
    }

    /// The primary dies, the standbys are found to end there, and nothing of the old epoch is left open.
    fn falls_to(&mut self, b: u64, c: u64) {
        self.dies();
        self.cut(B, b);
        self.cut(C, c);
        self.closed();
    }

    fn published(&self) -> Option<Target> {
        self.actions.iter().find_map(|action| match action {
            Action::Publish(target) => Some(*target),
            _ => None,
        })
    }

    fn replies(&self) -> Vec<&Result<String, String>> {
        self.actions
            .iter()
            .filter_map(|action| match action {
                Action::Reply { answer, .. } => Some(answer),
                _ => None,
            })
            .collect()
    }

    fn blocked(&self) -> Option<&'static str> {
        match self.machine.state() {
            State::Blocked(why) => Some(why.label()),
            _ => None,
        }
    }

    fn command(&mut self, command: Command) {
        self.tell(Event::Command { id: CommandId(1), command });
    }
}

#[test]
fn a_killed_primary_is_replaced_by_the_furthest_standby() {
    let mut play = Play::well(settings());
    play.dies();
    assert_eq!(play.machine.state(), &State::Severing);
    assert_eq!(play.open(), [("sever", B), ("sever", C)]);
    play.cut(B, 90);
    assert_eq!(play.open(), [("sever", C)], "not before every standby is cut off");
    play.cut(C, 95);
    assert!(play.open().is_empty(), "not before all sockets are closed");
    assert!(play.machine.record().intent.as_ref().is_some_and(|i| i.stage == Stage::Prepare));
    play.closed();
    assert_eq!(play.open(), [("promote", C)]);
    assert_eq!(play.machine.record().intent.as_ref().map(|i| i.stage), Some(Stage::Promote(C)));
    assert_eq!(play.published(), None);
    play.ends("promote", C, OrderResult::Promoted { timeline: T2, fork: Lsn(95) });
    let target = play.published().unwrap();
    assert_eq!((target.primary, target.epoch, target.fork, target.planned), (C, Epoch(2), Lsn(95), false));
    assert_eq!(play.open(), [("epoch_row", C), ("repoint", B)]);
    assert_eq!(play.machine.quarantine(A), Some(Quarantine::OldPrimary));
    play.ends("repoint", B, OrderResult::Done);
    play.tell(Event::Tick);
    assert_eq!(play.machine.state(), &State::Healthy);
    assert!(play.machine.record().cooling && play.machine.record().intent.is_none());
}

#[test]
fn a_frozen_primary_is_replaced_once_the_standbys_cannot_connect_anew() {
    let mut play = Play::well(settings());
    for _ in 0..3 {
        play.sees(A, Fact::Silent);
    }
    play.sees(B, standby(T1, Some(A), 100));
    play.sees(C, standby(T1, Some(A), 100));
    play.after(Duration::from_millis(301));
    assert_eq!(play.open(), [("kick", B), ("kick", C)]);
    play.ends("kick", B, OrderResult::Kicked(Kick::Gone));
    // Alone for a moment, as any that connects anew.
    play.sees(C, standby(T1, None, 100));
    assert_eq!(play.machine.state(), &State::Confirming);
    play.ends("kick", C, OrderResult::Kicked(Kick::SameProcess));
    play.sees(C, standby(T1, Some(A), 100));
    assert_eq!(play.machine.state(), &State::Severing);
}

#[test]
fn a_primary_that_a_standby_still_streams_from_is_not_replaced() {
    let mut play = Play::well(settings());
    play.sees(A, Fact::Refused);
    play.sees(B, standby(T1, Some(A), 100));
    play.sees(C, standby(T1, None, 100));
    assert!(play.open().is_empty(), "hard evidence: they are given a moment to notice");
    play.after(Duration::from_millis(301));
    assert_eq!(play.open(), [("kick", B)]);
    play.sees(B, standby(T1, None, 100));
    assert_eq!(play.machine.state(), &State::Confirming);
    play.ends("kick", B, OrderResult::Kicked(Kick::Streams));
    // A probe that was on its way says that it is alone: the kick has shown better.
    play.sees(B, standby(T1, None, 100));
    assert_eq!(play.machine.state(), &State::Suspect);
    assert!(play.actions.contains(&Action::Alarm(Alarm::OnlyWeAreCutOff)));
    play.sees(A, writer(T1, 120));
    assert_eq!(play.machine.state(), &State::Healthy);
}

#[test]
fn an_isolated_proxy_replaces_nobody() {
    let mut play = Play::well(settings());
    for node in [A, B, C] {
        for _ in 0..4 {
            play.sees(node, Fact::Silent);
        }
    }
    play.after(Duration::from_secs(100));
    assert_eq!(play.machine.state(), &State::Suspect);
    assert!(play.actions.contains(&Action::Alarm(Alarm::Isolated)) && play.open().is_empty());
}

#[test]
fn a_promotion_without_an_answer_is_given_to_the_same_node_again() {
    let mut play = Play::well(settings());
    play.falls_to(95, 90);
    play.ends("promote", B, OrderResult::Unknown("lost".to_owned()));
    play.sees(B, Fact::Refused);
    for _ in 0..100 {
        play.after(Duration::from_secs(1));
        while let Some((id, node, order)) = play.orders.pop_front() {
            assert_eq!((node, order.label()), (B, "promote"), "no second candidate");
            play.tell(Event::OrderDone { id, result: OrderResult::Unknown("away".to_owned()) });
        }
    }
    assert_eq!(play.blocked(), Some("candidate_unreachable"));
    // Its own probe says it, if the order's answer never comes.
    play.sees(B, writer(T2, 120));
    assert_eq!(play.published().map(|target| target.primary), Some(B));
}

#[test]
fn a_candidate_is_replaced_once_the_operator_forgets_it() {
    let mut play = Play::well(settings());
    play.falls_to(95, 90);
    play.ends("promote", B, OrderResult::Unknown("lost".to_owned()));
    play.sees(B, Fact::Refused);
    play.command(Command::Forget(B));
    play.after(Duration::from_millis(200));
    assert_eq!(play.open(), [("promote", C)]);
    assert_eq!(play.machine.quarantine(B), Some(Quarantine::Diverged));
}

#[test]
fn a_crash_while_promoting_goes_on_with_the_same_node() {
    let record = Record {
        system_identifier: Some(42),
        epoch: Epoch(1),
        primary: Some(A),
        timeline: Some(T1),
        intent: Some(Intent {
            from: A,
            planned: false,
            epoch: Epoch(2),
            stage: Stage::Promote(C),
            covered: false,
        }),
        severed: vec![B, C],
        ..Record::default()
    };
    let mut play = Play::begin(settings(), record);
    play.tell(Event::Tick);
    assert!(play.actions.contains(&Action::Gate(Gate::Closed)));
    play.closed();
    assert_eq!(play.open(), [("promote", C)]);
    // The old one comes back meanwhile: fenced before anything is sent again.
    play.sees(A, writer(T1, 130));
    play.ends("promote", C, OrderResult::Unknown("lost".to_owned()));
    play.after(Duration::from_millis(200));
    assert_eq!(play.open(), [("fence", A)]);
    play.ends("fence", A, OrderResult::Fenced { end: Lsn(130) });
    assert_eq!(play.open(), [("promote", C)]);
    play.ends("promote", C, OrderResult::Promoted { timeline: T2, fork: Lsn(95) });
    assert_eq!(play.published().map(|target| (target.primary, target.epoch)), Some((C, Epoch(2))));
}

#[test]
fn a_crash_while_preparing_undoes_it() {
    let record = Record {
        system_identifier: Some(42),
        epoch: Epoch(1),
        primary: Some(A),
        timeline: Some(T1),
        intent: Some(Intent {
            from: A,
            planned: true,
            epoch: Epoch(2),
            stage: Stage::Prepare,
            covered: false,
        }),
        severed: vec![B],
        fenced: vec![A],
        ..Record::default()
    };
    let mut play = Play::begin(settings(), record);
    play.sees(B, standby(T1, None, 100));
    play.sees(A, writer(T1, 100));
    assert!(play.actions.contains(&Action::Gate(Gate::Closed)), "the primary is still read-only");
    assert_eq!(play.open(), [("unsever", B), ("unfence", A)]);
    play.ends("unfence", A, OrderResult::Done);
    play.ends("unsever", B, OrderResult::Done);
    assert!(play.actions.contains(&Action::Gate(Gate::Open)));
    assert_eq!(play.machine.state(), &State::Healthy);
    assert_eq!((play.machine.record().severed.len(), play.machine.record().fenced.len()), (0, 0));
}

#[test]
fn a_primary_that_comes_back_before_the_promotion_goes_on() {
    let mut play = Play::well(settings());
    play.dies();
    play.cut(B, 95);
    play.sees(A, writer(T1, 120));
    assert!(play.machine.record().intent.is_none());
    assert_eq!(play.open(), [("sever", C), ("unsever", B)]);
    play.cut(C, 95);
    play.ends("unsever", B, OrderResult::Done);
    play.ends("unsever", C, OrderResult::Done);
    assert_eq!(play.machine.state(), &State::Healthy);
    assert_eq!(play.published(), None);
}

#[test]
fn a_second_failover_so_soon_waits_for_the_operator() {
    let mut play = Play::well(settings());
    play.falls_to(90, 95);
    play.ends("promote", C, OrderResult::Promoted { timeline: T2, fork: Lsn(95) });
    play.ends("repoint", B, OrderResult::Done);
    play.sees(B, standby(T2, Some(C), 100));
    play.sees(A, Fact::Refused);
    play.sees(C, Fact::Refused);
    play.sees(B, standby(T2, None, 100));
    assert_eq!(play.blocked(), Some("too_soon"));
    play.after(Duration::from_secs(1000));
    assert_eq!(play.blocked(), Some("too_soon"), "time alone does not end it");
    play.command(Command::AckRecovery);
    // Of three nodes one is left.
    assert_eq!(play.blocked(), Some("minority"));
    play.command(Command::Failover { to: None, allow_data_loss: false });
    assert_eq!(play.machine.state(), &State::Severing);
}

#[test]
fn in_manual_mode_the_operator_begins() {
    let mut play = Play::well(Settings { mode: Mode::Manual, ..settings() });
    play.command(Command::Failover { to: Some(B), allow_data_loss: false });
    assert!(play.replies()[0].is_err(), "it answers");
    play.dies();
    assert_eq!((play.blocked(), play.open().len()), (Some("manual"), 0));
    play.command(Command::Failover { to: Some(B), allow_data_loss: false });
    play.cut(B, 90);
    play.cut(C, 95);
    assert_eq!(play.blocked(), Some("behind"), "{:?}", play.machine.state());
    assert!(play.replies()[1].as_ref().unwrap_err().contains("5 bytes ahead"), "{:?}", play.replies());
    assert_eq!(play.open(), [("unsever", B), ("unsever", C)], "blocked is not cut off");
    play.ends("unsever", B, OrderResult::Done);
    play.ends("unsever", C, OrderResult::Done);
    play.command(Command::Failover { to: Some(B), allow_data_loss: true });
    play.cut(B, 90);
    play.cut(C, 95);
    play.closed();
    play.ends("promote", B, OrderResult::Promoted { timeline: T2, fork: Lsn(90) });
    assert_eq!(play.machine.quarantine(C), Some(Quarantine::Diverged));
    assert!(!play.open().contains(&("repoint", C)), "what is ahead must not follow");
}

#[test]
fn quorum_asks_for_enough_synchronous_standbys() {
    let quorum = Settings { durability: Durability::Quorum, ..settings() };
    let sync = SyncState { members: vec![B, C], num: 1, degraded: false };
    for (sync, c_answers, blocked) in [
        (sync.clone(), true, None),
        (sync.clone(), false, Some("too_few_synchronous")),
        (SyncState { members: vec![B], ..sync.clone() }, false, None),
        (SyncState { degraded: true, ..sync }, true, Some("degraded")),
        (SyncState::default(), true, Some("degraded")),
    ] {
        let mut play = Play::well(quorum.clone());
        play.tell(Event::Sync(sync.clone()));
        play.sees(A, Fact::Refused);
        play.sees(C, if c_answers { standby(T1, None, 100) } else { Fact::Refused });
        play.sees(B, standby(T1, None, 100));
        assert_eq!(play.blocked(), blocked, "{sync:?} {c_answers}");
        if blocked.is_some() {
            play.command(Command::Failover { to: None, allow_data_loss: false });
            assert!(play.replies()[0].is_err());
            play.command(Command::Failover { to: None, allow_data_loss: true });
            assert_eq!(play.machine.state(), &State::Severing);
            continue;
        }
        play.cut(B, 100);
        if c_answers {
            play.cut(C, 90);
        }
        play.closed();
        // I11: the rule of the new epoch first.
        assert_eq!(play.open(), [("set_sync", B)]);
        play.ends("set_sync", B, OrderResult::Done);
        assert_eq!(play.open(), [("promote", B)]);
        assert!(play.machine.record().sync.degraded);
    }
}

#[test]
fn a_switchover_drains_waits_and_promotes() {
    let mut play = Play::well(settings());
    play.command(Command::Switchover { to: Some(B), dry_run: true, timeout: None });
    assert!(play.replies()[0].is_ok() && play.open().is_empty());
    play.command(Command::Switchover { to: Some(B), dry_run: false, timeout: None });
    assert_eq!(play.machine.state(), &State::Draining(B));
    assert!(play.actions.contains(&Action::Gate(Gate::Draining)));
    play.tell(Event::Drained);
    assert_eq!(play.machine.state(), &State::AtBarrier(B));
    assert!(play.open().is_empty());
    play.closed();
    play.ends("fence", A, OrderResult::Fenced { end: Lsn(110) });
    play.ends("barrier", B, OrderResult::Reached(Lsn(110)));
    play.cut(B, 110);
    play.cut(C, 110);
    play.ends("promote", B, OrderResult::Promoted { timeline: T2, fork: Lsn(110) });
    let target = play.published().unwrap();
    assert!(target.planned && target.primary == B);
    assert_eq!(play.replies().len(), 2);
    assert!(play.replies()[1].is_ok());
    assert!(!play.machine.record().cooling);
}

#[test]
fn a_switchover_that_cannot_catch_up_leaves_the_old_primary_at_work() {
    let mut play = Play::well(settings());
    play.command(Command::Switchover { to: None, dry_run: false, timeout: Some(Duration::from_secs(1)) });
    play.tell(Event::Drained);
    play.closed();
    play.ends("fence", A, OrderResult::Fenced { end: Lsn(110) });
    play.after(Duration::from_millis(1001));
    assert!(play.replies()[0].is_err());
    assert!(play.open().contains(&("unfence", A)));
    let gate = |play: &Play| {
        play.actions.iter().rev().find_map(|action| match action {
            Action::Gate(gate) => Some(*gate),
            _ => None,
        })
    };
    assert_eq!(gate(&play), Some(Gate::Closed), "not while it is read-only");
    play.ends("unfence", A, OrderResult::Done);
    assert_eq!(gate(&play), Some(Gate::Open));
    assert_eq!((play.published(), play.machine.state()), (None, &State::Healthy));
}

#[test]
fn what_cannot_be_recorded_is_not_done() {
    let mut play = Play::well(settings());
    play.sees(A, Fact::Refused);
    play.sees(B, standby(T1, None, 100));
    let before = play.machine.record().clone();
    let actions = play.machine.step(Event::Observed { node: C, fact: standby(T1, None, 100) }, play.now);
    assert!(matches!(actions[0], Action::Record(_)));
    play.tell(Event::RecordFailed("disk full".to_owned()));
    assert_eq!((play.machine.record(), play.blocked()), (&before, Some("not_durable")));
    assert!(play.open().is_empty());
    play.after(Duration::from_secs(3));
    play.sees(C, standby(T1, None, 100));
    assert_eq!(play.open(), [("sever", B), ("sever", C)]);
    // Also a promotion that is done: it is asked for again, and is done.
    play.cut(B, 100);
    play.cut(C, 100);
    play.closed();
    let (id, ..) = play.orders.pop_front().unwrap();
    let result = OrderResult::Promoted { timeline: T2, fork: Lsn(100) };
    play.machine.step(Event::OrderDone { id, result: result.clone() }, play.now);
    play.tell(Event::RecordFailed("disk full".to_owned()));
    assert_eq!(play.published(), None);
    play.after(Duration::from_secs(3));
    play.ends("promote", B, result);
    assert_eq!(play.published().map(|target| target.primary), Some(B));
}

#[test]
fn an_old_primary_that_comes_back_is_fenced_and_its_loss_known() {
    let mut play = Play::well(settings());
    play.falls_to(100, 100);
    play.ends("promote", B, OrderResult::Promoted { timeline: T2, fork: Lsn(100) });
    play.sees(A, writer(T1, 130));
    assert!(play.actions.contains(&Action::Alarm(Alarm::OldPrimaryBack(A))));
    let loss = Loss { exact_bytes: Some(30), ..Loss::default() };
    assert!(play.actions.contains(&Action::Alarm(Alarm::LossKnown(loss))));
    play.ends("fence", A, OrderResult::Fenced { end: Lsn(131) });
    play.sees(A, writer(T1, 131));
    assert!(!play.open().contains(&("fence", A)), "once");
    // Rewound, it streams the new timeline: a replica like any other.
    play.sees(A, standby(T2, Some(B), 140));
    assert_eq!(play.machine.quarantine(A), None);
}
