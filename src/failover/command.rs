//! What operators ask of the failover machine, and what they are told. Pure.

use std::fmt::Write as _;
use std::time::Duration;

use crate::failover::candidate;
use crate::failover::decide::{Attempt, Durability, Machine, Mode, add};
use crate::failover::detect::Verdict;
use crate::failover::event::{Command, CommandId, Now, Order, Role};
use crate::topology::NodeId;
use crate::wal::Lsn;

/// How far behind a switchover's candidate may be to begin with: what it lacks is replayed while clients wait.
const SWITCHOVER_LAG: u64 = 64 << 20;

impl Machine {
    pub(super) fn command(&mut self, id: CommandId, command: Command, now: Now) {
        let answer = match command {
            Command::Switchover { to, dry_run, timeout } => self.switchover(id, to, dry_run, timeout, now),
            Command::Failover { to, allow_data_loss } => self.failover(id, to, allow_data_loss, now),
            Command::PauseFailover => {
                self.record.paused = true;
                Some(Ok("failover is paused".to_owned()))
            }
            Command::ResumeFailover => {
                self.record.paused = false;
                Some(Ok("failover is resumed".to_owned()))
            }
            Command::Fence(node) => self.fence(id, node, now),
            Command::Unfence(node) => self.unfence(id, node, now),
            Command::Forget(node) => {
                self.forget(node);
                Some(Ok(format!("{} is forgotten", self.name(node))))
            }
            Command::AckRecovery => {
                self.acknowledge();
                Some(Ok("recovery is acknowledged".to_owned()))
            }
        };
        if let Some(answer) = answer {
            self.reply(id, answer);
        }
    }

    fn may_act(&self) -> Result<(), String> {
        if !self.settings.hands {
            return Err(
                "failover.state_dir is not set: nothing may be begun that a restart could not finish"
                    .to_owned(),
            );
        }
        if self.record.intent.is_some() {
            return Err(format!("busy: {}", self.state().label()));
        }
        Ok(())
    }

    fn switchover(
        &mut self,
        id: CommandId,
        to: Option<NodeId>,
        dry_run: bool,
        timeout: Option<Duration>,
        now: Now,
    ) -> Option<Result<String, String>> {
        let chosen = match self.may_act().and_then(|()| self.switchover_candidate(to, now)) {
            Ok(chosen) => chosen,
            Err(why) => return Some(Err(why)),
        };
        if dry_run {
            let from = self.record.primary.map_or("?", |node| self.name(node)).to_owned();
            let mut text = format!("would replace {from} by {}", self.name(chosen));
            let others: Vec<&str> =
                self.standbys().into_iter().filter(|n| *n != chosen).map(|n| self.name(n)).collect();
            if !others.is_empty() {
                let _ = write!(text, "; then cut off and re-point: {}", others.join(", "));
            }
            return Some(Ok(text));
        }
        let mut attempt = Attempt::new(now.at);
        attempt.to = Some(chosen);
        attempt.command = Some(id);
        attempt.deadline = Some(now.at + timeout.unwrap_or(self.settings.pause_timeout));
        self.begin(attempt, true, now.at);
        None
    }

    /// Who takes over from a primary that is well; the least behind, unless one is named.
    fn switchover_candidate(&self, to: Option<NodeId>, now: Now) -> Result<NodeId, String> {
        if self.verdict(now.at) != Verdict::Well {
            return Err("the primary does not answer: FAILOVER replaces a dead one".to_owned());
        }
        if let Some(to) = to {
            self.why_not_switch_to(to)?;
            return Ok(to);
        }
        let fit = || self.standbys().into_iter().filter(|node| self.why_not_switch_to(*node).is_ok());
        let replay = |node: &NodeId| self.replayed(*node).unwrap_or(Lsn::ZERO);
        let here = fit().filter(|node| !self.is_elsewhere(*node));
        here.max_by_key(|node| (self.priority(*node), replay(node), std::cmp::Reverse(*node))).ok_or_else(
            || match fit().next() {
                Some(other) => format!(
                    "no standby of the primary's zone may take over (same_zone_only); SWITCHOVER TO {} would",
                    self.name(other)
                ),
                None => "no standby streams from the primary and may be promoted".to_owned(),
            },
        )
    }

    fn why_not_switch_to(&self, node: NodeId) -> Result<(), String> {
        let name = self.name(node);
        if self.record.primary == Some(node) {
            return Err(format!("{name} is the primary"));
        }
        if let Some(why) = self.quarantine(node) {
            return Err(format!("{name} is in quarantine: {}", why.label()));
        }
        if self.priority(node) == 0 {
            return Err(format!("{name} is never promoted (failover.candidates)"));
        }
        if !self.standbys().contains(&node) {
            return Err(format!("{name} cannot be reached, or is no standby of this cluster"));
        }
        if !self.streams(node) {
            return Err(format!("{name} does not stream from the primary"));
        }
        let behind = match (self.primary_position(), self.replayed(node)) {
            (Some(primary), Some(replayed)) => primary.bytes_since(replayed),
            _ => 0,
        };
        if behind > SWITCHOVER_LAG {
            return Err(format!("{name} is {behind} bytes behind: clients would wait for it"));
        }
        Ok(())
    }

    fn streams(&self, node: NodeId) -> bool {
        self.role(node).is_some_and(|role| match role {
            Role::Standby { walreceiver: Some(receiver), .. } => {
                receiver.streaming && Some(receiver.timeline) == self.record.timeline
            }
            _ => false,
        })
    }

    fn replayed(&self, node: NodeId) -> Option<Lsn> {
        match self.role(node)? {
            Role::Standby { replay, .. } => *replay,
            Role::Primary { .. } => None,
        }
    }

    fn failover(
        &mut self,
        id: CommandId,
        to: Option<NodeId>,
        allow_data_loss: bool,
        now: Now,
    ) -> Option<Result<String, String>> {
        if let Err(why) = self.may_act() {
            return Some(Err(why));
        }
        match self.verdict(now.at) {
            Verdict::Well => {
                return Some(Err("the primary answers: SWITCHOVER replaces a living one".to_owned()));
            }
            Verdict::Unknown => return Some(Err("no primary is known yet".to_owned())),
            _ => {}
        }
        let reachable = self.standbys();
        if let Some(to) = to.filter(|to| !reachable.contains(to)) {
            return Some(Err(format!(
                "{} cannot be reached, or is no standby of this cluster",
                self.name(to)
            )));
        }
        if let Some(reason) = self.why_not_begin(&reachable, to, Some(allow_data_loss)) {
            return Some(Err(self.explain(&reason)));
        }
        let mut attempt = Attempt::new(now.at);
        attempt.to = to;
        attempt.allow_data_loss = allow_data_loss;
        attempt.command = Some(id);
        self.begin(attempt, false, now.at);
        None
    }

    fn fence(&mut self, id: CommandId, node: NodeId, now: Now) -> Option<Result<String, String>> {
        if let Err(why) = self.may_act() {
            return Some(Err(why));
        }
        if self.record.primary == Some(node) {
            return Some(Err(format!("{} is the primary: SWITCHOVER first", self.name(node))));
        }
        if !self.is_free(node, now.at) {
            return Some(Err(format!("{} is busy with another order", self.name(node))));
        }
        add(&mut self.record.fenced, node);
        self.give(node, Order::Fence, Some(id));
        None
    }

    fn unfence(&mut self, id: CommandId, node: NodeId, now: Now) -> Option<Result<String, String>> {
        if let Err(why) = self.may_act() {
            return Some(Err(why));
        }
        if !self.is_free(node, now.at) {
            return Some(Err(format!("{} is busy with another order", self.name(node))));
        }
        self.give(node, Order::Unfence, Some(id));
        None
    }

    /// What `mode` and `durability` promise, for the log at start and for `SHOW FAILOVER`.
    pub fn promises(&self) -> String {
        let mode = match (self.settings.mode, self.settings.hands) {
            (_, false) => {
                "manual, without state_dir: a primary that somebody promotes is found, nothing is promoted"
            }
            (Mode::Manual, true) => "manual: a lost primary is reported, and replaced when FAILOVER says so",
            (Mode::Auto, true) if self.has_zones() => {
                "auto: a lost primary is replaced by a standby of its own zone"
            }
            (Mode::Auto, true) => "auto: a lost primary is replaced",
        };
        let level = match self.settings.durability {
            Durability::Async => {
                "async: an acknowledged write may be lost with the primary (at most about max_lost_bytes by itself); \
                 an old primary that is cut off from here still takes writes of clients that go to it directly"
            }
            Durability::Quorum => {
                "quorum: a write acknowledged with synchronous_commit on or higher survives, and an old primary that is \
                 cut off acknowledges no more; what commits with synchronous_commit local or off is not covered"
            }
        };
        format!("failover {mode}; durability {level}")
    }

    fn has_zones(&self) -> bool {
        let nodes = &self.settings.nodes;
        self.settings.same_zone_only && nodes.iter().any(|node| node.zone != nodes[0].zone)
    }

    /// `async` or `quorum`.
    pub fn durability_label(&self) -> &'static str {
        match self.settings.durability {
            Durability::Async => "async",
            Durability::Quorum => "quorum",
        }
    }

    /// Whether the acknowledged commits would survive now, as far as the record knows (`durability: quorum`).
    pub fn covered(&self) -> bool {
        let standbys = self.standbys();
        self.settings.durability == Durability::Quorum
            && candidate::covers(&self.record.sync, |member| standbys.contains(&member)).is_ok()
    }
}
