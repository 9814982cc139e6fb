//! Plays tests/scenarios/failover_schedules.txt: faults at fixed times, all else by chance.

use highwater::failover::decide::Durability;
use highwater::failover::event::{Command, State};
use highwater::topology::NodeId;

use crate::plan::{Fault, Plan};
use crate::world::{Without, World};

/// How many orders of delays each schedule is played with.
const SEEDS: u64 = 8;

fn place(word: &str, nodes: usize) -> Option<usize> {
    if word == "us" { Some(nodes) } else { ["a", "b", "c", "d"].iter().position(|name| *name == word) }
}

fn fault(words: &[&str], nodes: usize) -> Option<Fault> {
    let at = |index: usize| words.get(index).and_then(|word| place(word, nodes));
    Some(match words[0] {
        "kill" => Fault::Kill(at(1)?),
        "restart" => Fault::Restart(at(1)?),
        "freeze" => Fault::Freeze(at(1)?),
        "thaw" => Fault::Thaw(at(1)?),
        "cut" => Fault::Cut(at(1)?, at(2)?),
        "heal" => Fault::Heal(at(1)?, at(2)?),
        "block" => Fault::Block(at(1)?),
        "rejoin" => Fault::Rejoin(at(1)?),
        "crash" => Fault::CrashProxy,
        "start" => Fault::StartProxy,
        "record" => Fault::RecordFails(words[1] == "fails"),
        "ack" => Fault::Command(Command::AckRecovery),
        "loss" => Fault::Command(Command::Failover { to: None, allow_data_loss: true }),
        "switchover" => {
            let to = at(1).map(|node| NodeId(node as u16));
            Fault::Command(Command::Switchover { to, dry_run: false, timeout: None })
        }
        _ => return None,
    })
}

#[derive(Default)]
struct Schedule<'a> {
    title: &'a str,
    plan: Option<Plan>,
    ends: &'a str,
    never_promoted: bool,
}

impl Schedule<'_> {
    fn play(&self, failures: &mut Vec<String>) {
        let Some(plan) = &self.plan else { return };
        for seed in 1..=SEEDS {
            let world = World::new(Plan { seed, ..plan.clone() }, Without::Nothing, false).run();
            let is = end(&world);
            let fits = match self.ends.split_once(' ') {
                Some((state, nodes)) => nodes.split(" or ").any(|node| is == format!("{state} {node}")),
                None => is.starts_with(self.ends),
            };
            let promoted = self.never_promoted && world.happened.promotions > 0;
            if !fits || promoted || !world.violations.is_empty() {
                let broken = world.violations.first().cloned().unwrap_or_default();
                let times = world.happened.promotions;
                failures
                    .push(format!("{} (seed {seed}): it ends {is}, {times} promotions {broken}", self.title));
            }
        }
    }
}

fn end(world: &World) -> String {
    let Some((state, primary)) = &world.ended else { return "without a proxy".to_owned() };
    let primary = ["a", "b", "c", "d"][*primary];
    match state {
        State::Healthy if world.happened.settled_healthy > 0 => format!("healthy {primary}"),
        State::Healthy => format!("waiting {primary}"),
        // Nobody is left to say anything, or to be promoted.
        State::Blocked(_) | State::Suspect => format!("blocked {primary}"),
        state => format!("{} {primary}", state.label()),
    }
}

#[test]
fn each_schedule_ends_as_it_is_told() {
    let text = include_str!("../scenarios/failover_schedules.txt");
    let (mut failures, mut schedules) = (Vec::new(), 0);
    let mut schedule = Schedule::default();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[0] {
            "==" => {
                schedule.play(&mut failures);
                schedule = Schedule { title: &line[3..], ..Schedule::default() };
                schedules += 1;
            }
            "nodes" => {
                let durability =
                    if words.contains(&"quorum") { Durability::Quorum } else { Durability::Async };
                let mut plan = Plan::quiet(0, words[1].parse().unwrap(), durability);
                plan.strict = words.contains(&"strict");
                plan.num = if words.contains(&"num") { 2 } else { 1 };
                schedule.plan = Some(plan);
            }
            "stay" => schedule.plan.as_mut().unwrap().stay_dead = true,
            "ends" => schedule.ends = line.trim_start_matches("ends "),
            "never" => schedule.never_promoted = true,
            time => {
                let plan = schedule.plan.as_mut().unwrap();
                let fault = fault(&words[1..], plan.nodes).unwrap_or_else(|| panic!("`{line}`"));
                plan.faults.push((time.parse().unwrap(), fault));
            }
        }
    }
    schedule.play(&mut failures);
    assert!(failures.is_empty(), "\n{}\n", failures.join("\n"));
    assert!(schedules > 25, "{schedules}");
}
