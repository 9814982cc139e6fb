//! What goes wrong, and when.

use highwater::failover::decide::{Durability, Mode};
use highwater::failover::event::Command;
use highwater::topology::NodeId;

use crate::nodes::Ms;
use crate::world::{Chance, Without};

#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    Kill(usize),
    Restart(usize),
    Freeze(usize),
    Thaw(usize),
    Cut(usize, usize),
    Heal(usize, usize),
    /// Replay stands still: paused, delayed, or behind a reader.
    Block(usize),
    CrashProxy,
    StartProxy,
    /// The proxy that leads is stopped, and another one takes over from the record. What the first was about to send it sends
    /// when it goes on.
    Depose,
    /// The machine is gone for good, and the operator says so.
    Destroy(usize),
    Command(Command),
    RecordFails(bool),
    /// An operator makes this one a standby again.
    Rejoin(usize),
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub nodes: usize,
    pub mode: Mode,
    pub durability: Durability,
    pub num: usize,
    pub strict: bool,
    pub check_interval: Ms,
    /// How long a walreceiver believes in a sender that it hears nothing of.
    pub receiver_timeout: Ms,
    /// The address that clients know who do not use the proxy.
    pub direct_to: usize,
    /// Nodes that were killed are not started again in the end.
    pub stay_dead: bool,
    pub faults: Vec<(Ms, Fault)>,
    pub faults_end: Ms,
    pub end: Ms,
}

impl Plan {
    pub fn quiet(seed: u64, nodes: usize, durability: Durability) -> Plan {
        Plan {
            seed,
            nodes,
            mode: Mode::Auto,
            durability,
            num: 1,
            strict: false,
            check_interval: 250,
            receiver_timeout: 60_000,
            direct_to: 0,
            stay_dead: false,
            faults: Vec::new(),
            faults_end: 14_000,
            end: 30_000,
        }
    }

    pub fn random(seed: u64, durability: Durability) -> Plan {
        let mut chance = Chance::new(seed ^ 0x5eed);
        let nodes = 2 + chance.below(3);
        let mut plan = Plan::quiet(seed, nodes, durability);
        if nodes > 3 && chance.one_in(2) {
            plan.num = 2;
        }
        plan.strict = chance.one_in(4);
        plan.receiver_timeout = if chance.one_in(3) { 3000 } else { 60_000 };
        plan.stay_dead = chance.one_in(3);
        let bursts = 1 + chance.below(3);
        for _ in 0..bursts {
            // Before the standbys are recorded, or after.
            let start = chance.between(200, 10_000);
            let faults = 1 + chance.below(4);
            for _ in 0..faults {
                let within = if chance.one_in(3) { 5000 } else { 900 };
                let at = start + chance.between(0, within);
                plan.fault(at, &mut chance);
            }
        }
        plan.faults.retain(|(at, _)| *at < plan.faults_end);
        plan.faults.sort_by_key(|(at, _)| *at);
        plan
    }

    /// The same, with leaders that are stopped while much is under way.
    pub fn deposing(seed: u64, durability: Durability) -> Plan {
        let mut plan = Plan::random(seed, durability);
        let mut chance = Chance::new(seed ^ 0xdeb0);
        for at in plan.faults.iter().map(|(at, _)| *at).collect::<Vec<_>>() {
            let times = chance.below(3);
            for _ in 0..times {
                plan.faults.push((at + chance.between(0, 1500), Fault::Depose));
            }
        }
        plan.faults.retain(|(at, _)| *at < plan.faults_end);
        plan.faults.sort_by_key(|(at, _)| *at);
        plan
    }

    /// Schedules that come near to what the part of the rule is there for.
    pub fn around(without: Without, seed: u64) -> Plan {
        let mut chance = Chance::new(seed ^ 0xa40d);
        let start = chance.between(2500, 6000);
        let again = chance.between(20, 700);
        let (cut_early, kill_early) = (chance.between(200, 700), chance.between(500, 1200));
        let mut soon = |from: Ms, to: Ms| start + chance.between(from, to);
        let durability =
            if without == Without::ClosedSockets { Durability::Async } else { Durability::Quorum };
        let (nodes, faults) = match without {
            // Its answer is on its way when the primary is cut off.
            Without::ClosedSockets => {
                let (cut, heal) = (soon(0, 50), soon(4000, 6000));
                let links = [(0, 1), (0, 2), (0, 3)];
                let cuts = links.map(|(a, b)| (cut, Fault::Cut(a, b)));
                (3, [cuts.to_vec(), links.map(|(a, b)| (heal, Fault::Heal(a, b))).to_vec()].concat())
            }
            // One standby's replay stands still, so that it goes on receiving once the primary is back.
            Without::SeverProof => {
                let faults = vec![
                    (soon(0, 100), Fault::Block(2)),
                    (soon(110, 200), Fault::Freeze(0)),
                    (soon(2000, 5000), Fault::Thaw(0)),
                ];
                (3, faults)
            }
            // The one that is ahead restarts while it is asked.
            Without::FinalPosition => {
                let faults = vec![
                    (soon(0, 300), Fault::Cut(0, 2)),
                    (soon(600, 900), Fault::Kill(1)),
                    (soon(910, 950), Fault::Restart(1)),
                    (soon(600, 950), Fault::Kill(0)),
                ];
                (3, faults)
            }
            // Commits that nobody else has when the standbys are first waited for.
            Without::Barrier | Without::InEffect => {
                let kill = cut_early.max(kill_early);
                (2, vec![(cut_early, Fault::Cut(0, 1)), (kill, Fault::Kill(0))])
            }
            // The proxy dies between the statement and the record.
            Without::LoosenRecordFirst => {
                let crash = soon(1450, 1800);
                let faults = vec![
                    (start, Fault::Cut(0, 1)),
                    (crash, Fault::CrashProxy),
                    (crash + 20, Fault::StartProxy),
                    (soon(2000, 2600), Fault::Kill(0)),
                ];
                (2, faults)
            }
            // The primary comes back while standbys are cut off from it, and goes again.
            Without::Lock => {
                let thaw = soon(1200, 2600);
                let faults = vec![
                    (start, Fault::Freeze(0)),
                    (thaw, Fault::Thaw(0)),
                    (thaw + again, Fault::Freeze(0)),
                    (soon(5000, 8000), Fault::Thaw(0)),
                ];
                (3, faults)
            }
            // The candidate freezes with the order to promote in its hands.
            Without::SameNode => {
                let faults = vec![
                    (start, Fault::Kill(0)),
                    (soon(20, 300), Fault::Freeze(1)),
                    (soon(5000, 7000), Fault::Thaw(1)),
                ];
                (4, faults)
            }
            // Too few are at hand for the new primary to wait for; the one that is is not told all, and asked next.
            Without::NewEpochDegraded => {
                let late = soon(2150, 2900);
                let faults = vec![
                    (start, Fault::Kill(3)),
                    (soon(2000, 2100), Fault::Kill(0)),
                    (late, Fault::Cut(1, 2)),
                    (late + 10, Fault::Command(Command::AckRecovery)),
                    (late + 20 + again / 5, Fault::Kill(1)),
                ];
                (4, faults)
            }
            _ => return Plan::random(seed, durability),
        };
        let mut plan = Plan::quiet(seed, nodes, durability);
        plan.num = if nodes > 3 { 2 } else { 1 };
        plan.faults = faults;
        plan.faults.sort_by_key(|(at, _)| *at);
        plan
    }

    fn fault(&mut self, at: Ms, chance: &mut Chance) {
        // The first primary more often than others.
        let node = if chance.one_in(2) { 0 } else { chance.below(self.nodes) };
        let other = (node + 1 + chance.below(self.nodes)) % (self.nodes + 1);
        let later =
            at + if chance.one_in(2) { chance.between(100, 3000) } else { chance.between(2000, 9000) };
        let undone = !chance.one_in(3);
        let (fault, undo) = match chance.below(22) {
            0..=4 => (Fault::Kill(node), Some(Fault::Restart(node))),
            5..=7 => (Fault::Freeze(node), Some(Fault::Thaw(node))),
            8..=9 => (Fault::Cut(node, other), Some(Fault::Heal(node, other))),
            10 => {
                // From everybody.
                for to in (0..=self.nodes).filter(|to| *to != node) {
                    self.faults.push((at, Fault::Cut(node, to)));
                    if undone {
                        self.faults.push((later, Fault::Heal(node, to)));
                    }
                }
                return;
            }
            11..=12 => (Fault::Block(node), None),
            13..=15 => (Fault::CrashProxy, Some(Fault::StartProxy)),
            16 => (Fault::RecordFails(true), Some(Fault::RecordFails(false))),
            17 => (Fault::Rejoin(node), None),
            18..=20 => (Fault::Command(self.command(chance)), None),
            _ if chance.one_in(4) => (Fault::Destroy(node), None),
            _ => (Fault::Command(self.command(chance)), None),
        };
        self.faults.push((at, fault));
        if let Some(undo) = undo.filter(|_| undone) {
            self.faults.push((later, undo));
        }
    }

    fn command(&self, chance: &mut Chance) -> Command {
        let node = NodeId(chance.below(self.nodes) as u16);
        let to = chance.one_in(2).then_some(node);
        match chance.below(8) {
            0..=3 => Command::Switchover { to, dry_run: chance.one_in(6), timeout: None },
            4 => Command::Failover { to, allow_data_loss: false },
            5 => Command::AckRecovery,
            6 => Command::PauseFailover,
            _ => Command::ResumeFailover,
        }
    }
}
