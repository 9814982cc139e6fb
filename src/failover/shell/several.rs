//! The shell of a proxy that is one of several: it leads in terms, and follows what is recorded between them.
//!
//! Promises: a term begins with the record that etcd had when it began, as a restart does, and with hands of its own;
//! what an earlier term has set going is not heard of any more. Without a term no order is given, commands are refused
//! with the leader's name, and the gate is as the record says ([`lease::wanted`]), each word of the leader's to close
//! followed and acknowledged.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::{Answer, Outcome, Shell, now, settings};
use crate::failover::coordination::{Coordination, Seen, Term};
use crate::failover::decide::Machine;
use crate::failover::event::State;
use crate::failover::lease::{self, Kept, Wanted};
use crate::failover::orders::{Hands, Limits};
use crate::failover::record::{Record, Stage};
use crate::failover::slot_keeper::Rounds;
use crate::failover::store::{Upstreams, failpoint, order_identity};
use crate::failover::text;
use crate::gate::Posture;
use crate::topology::{Epoch, NodeId};

/// How it stands with the other proxies, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coordinated {
    /// What this proxy is called.
    pub name: String,
    /// Who leads.
    pub leader: Option<String>,
    /// Whether this one does.
    pub leads: bool,
    /// Whether etcd has answered last.
    pub up: bool,
    /// Whether this proxy may use the primary.
    pub valid: bool,
    /// Who is there, as `NAME/LEASE`.
    pub proxies: Vec<String>,
}

/// What the shell keeps of the others.
pub(super) struct Several {
    coordination: Coordination,
    seen: Arc<Seen>,
    /// The term that is on.
    pub(super) term: Option<Arc<Term>>,
    /// The attempt of the record's intent, while this one leads.
    attempt: Option<String>,
    attempts: u64,
    /// The record as it was read last, and which that was; as it is, not as a machine would begin with it.
    record: Record,
    read: Option<u64>,
    /// It cannot be used: nothing is opened.
    damaged: bool,
    /// Whether a promotion that has been recorded keeps all that was acknowledged, and its epoch.
    covered: Option<(Epoch, bool)>,
    obeyed: Option<Wanted>,
    obeying: Option<AbortHandle>,
    /// Whether any node answers this proxy, as the others were told.
    reaches: bool,
}

impl Several {
    pub(super) fn new(coordination: Coordination) -> Several {
        Several {
            coordination,
            seen: Arc::default(),
            term: None,
            attempt: None,
            attempts: 0,
            record: Record::default(),
            read: None,
            damaged: false,
            covered: None,
            obeyed: None,
            obeying: None,
            reaches: true,
        }
    }

    /// The record, on etcd when this returns; else the term is over.
    pub(super) fn write(&mut self, record: &Record, text: &str) -> Result<(), String> {
        let Some(term) = self.term.clone() else {
            return Err("this proxy does not lead any more".to_owned());
        };
        match &record.intent {
            None => self.attempt = None,
            Some(_) => _ = self.attempt(&term),
        }
        self.coordination.write(term.number, self.attempt.as_deref(), text)?;
        if record.intent.as_ref().is_some_and(|intent| matches!(intent.stage, Stage::Promote(_))) {
            failpoint("promote_recorded");
        }
        Ok(())
    }

    fn attempt(&mut self, term: &Term) -> String {
        if self.attempt.is_none() {
            self.attempts += 1;
            self.attempt = Some(format!("{}.{}", term.token, self.attempts));
        }
        self.attempt.clone().unwrap_or_default()
    }

    /// Resolves to `Ok` when all other proxies have closed their connections to the old primary; `Err`: the term is over.
    pub(super) fn closed(&mut self) -> impl Future<Output = Result<(), ()>> + Send + use<> {
        let asked = self.term.clone().map(|term| {
            let attempt = self.attempt(&term);
            self.coordination.close(term.number, attempt)
        });
        async move { asked.ok_or(())?.await }
    }

    /// The same for transactions that are to end.
    pub(super) fn drained(&mut self) -> impl Future<Output = Result<(), ()>> + Send + use<> {
        let asked = self.term.clone().map(|term| {
            let attempt = self.attempt(&term);
            self.coordination.drained(term.number, attempt)
        });
        async move { asked.ok_or(())?.await }
    }

    fn read(&mut self, kept: &Kept, names: &[String]) -> bool {
        self.read = Some(kept.revision);
        let read = text::read(&kept.text, names);
        self.damaged = read.is_err();
        match read {
            Ok(record) => {
                if let Some(intent) = &record.intent {
                    self.covered = Some((intent.epoch, intent.planned || intent.covered));
                }
                self.record = record;
            }
            Err(error) => tracing::error!(
                %error,
                "the record in etcd cannot be used: it was not written for these nodes, or not by this version"
            ),
        }
        !self.damaged
    }

    /// The nodes have changed: what was not understood may be.
    pub(super) fn read_again(&mut self) {
        self.read = None;
    }

    /// Whether the write target of the record is known to have all that was acknowledged.
    fn kept(&self) -> bool {
        let last = self.record.history.last().filter(|entry| entry.epoch == self.record.epoch);
        last.is_some_and(|entry| entry.planned)
            || self.covered.is_some_and(|(epoch, kept)| kept && epoch == self.record.epoch)
    }

    /// For people.
    pub(super) fn status(&self) -> Coordinated {
        Coordinated {
            name: self.coordination.name().to_owned(),
            leader: self.seen.leader.clone(),
            leads: self.term.is_some(),
            up: self.seen.up,
            valid: self.seen.valid && !self.damaged,
            proxies: self.seen.proxies.clone(),
        }
    }
}

/// The next news of the others; never, where there are none.
pub async fn news(seen: &mut Option<watch::Receiver<Arc<Seen>>>) -> Arc<Seen> {
    if let Some(seen) = seen
        && seen.changed().await.is_ok()
    {
        return Arc::clone(&seen.borrow_and_update());
    }
    std::future::pending().await
}

impl Shell {
    /// Takes the news. When what it says has been done, [`resume`](Self::resume) is to follow. `primary`: the one
    /// that is believed in.
    pub fn take_seen(&mut self, seen: &Arc<Seen>, primary: Option<NodeId>) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let Some(several) = &mut self.several else { return outcomes };
        several.seen = Arc::clone(seen);
        if several.term != seen.term {
            self.end_term();
            if let Some(term) = &seen.term {
                self.begin_term(term, &mut outcomes);
            }
        }
        if !self.leads() {
            self.follow_record(seen, primary, &mut outcomes);
        }
        self.publish_status();
        outcomes
    }

    /// What was seen last has been acted on: what is wanted of the gate counts.
    pub fn resume(&self) {
        if let Some(several) = self.several.as_ref().filter(|several| !several.damaged) {
            several.coordination.resume(&several.seen);
        }
    }

    /// Whether any node answers this proxy: one whom none answers is not to lead while others are there.
    pub fn reaches(&mut self, any: bool) {
        if let Some(several) = self.several.as_mut().filter(|several| several.reaches != any) {
            several.reaches = any;
            several.coordination.speaker().reaches(any);
        }
    }

    /// Whether it is another proxy's to say who the primary is.
    pub fn follows(&self) -> bool {
        !self.leads()
    }

    /// Whether this proxy decides; one that is alone does.
    pub(super) fn leads(&self) -> bool {
        self.several.as_ref().is_none_or(|several| several.term.is_some())
    }

    /// Why a command is not for this proxy.
    pub(super) fn not_leading(&self) -> Answer {
        let leader = self.several.as_ref().and_then(|several| several.seen.leader.clone());
        Err(match leader {
            Some(leader) => format!("this proxy does not lead: \"{leader}\" does"),
            None => "this proxy does not lead, and none is known to".to_owned(),
        })
    }

    fn end_term(&mut self) {
        let Some(several) = self.several.as_mut().filter(|several| several.term.is_some()) else { return };
        several.term = None;
        several.attempt = None;
        // It is read anew: what this one wrote last, or the next leader.
        several.read = None;
        several.obeyed = None;
        self.hands = None;
        self.keeper = None;
        self.events.term = 0;
        if let Some(drain) = self.drain.take() {
            drain.abort();
        }
        for (_, reply) in self.replies.drain() {
            let lost = "this proxy has lost the leadership: what was begun goes on, or is undone, by the next leader";
            self.answered.push((reply, Err(lost.to_owned())));
        }
        let record = self.machine.record().clone();
        self.machine = self.passive(record);
        self.change_label(State::Following.label());
    }

    /// As a start of the process with the record that there is.
    fn begin_term(&mut self, term: &Arc<Term>, outcomes: &mut Vec<Outcome>) {
        let Some(several) = &mut self.several else { return };
        let leave = several.coordination.leave(term.number);
        let usable = match &term.record {
            Some(kept) => several.read(kept, &self.names),
            None => true,
        };
        let upstreams = Upstreams::of_term(leave.clone(), &term.upstreams);
        let upstreams = upstreams.map_err(|error| tracing::error!(%error, "this proxy cannot lead"));
        let (true, Ok(upstreams)) = (usable, upstreams) else {
            several.damaged = true;
            several.coordination.withdraw(term.number);
            return;
        };
        if term.record.is_none() {
            several.record = Record::default();
        }
        several.term = Some(Arc::clone(term));
        several.attempt = term.record.as_ref().and_then(|kept| kept.attempt.clone());
        several.obeyed = None;
        if let Some(obeying) = several.obeying.take() {
            obeying.abort();
        }
        let record = several.record.clone();
        outcomes.push(Outcome::Known { record: Box::new(record.clone()), kept: several.kept() });
        let limits = Limits { sever: self.config.failover.sever_timeout, ..Limits::default() };
        let identity = order_identity(&self.config).unwrap_or_default();
        let upstreams = Arc::new(upstreams);
        let hands = Hands::new(&self.live, &self.nodes, &upstreams, &identity, limits, Some(&leave));
        self.hands = Some(Arc::new(hands));
        self.events.term = term.number;
        self.prepared = false;
        self.examine_at = None;
        // The end of a round of before is not heard of.
        self.slots = Rounds::default();
        self.machine = self.passive(record);
        self.change_label(self.machine.state().label());
        let wanted = self.machine.wanted_gate();
        self.set_gate(wanted);
    }

    /// A machine that goes on from `record`, if it is ever stepped.
    fn passive(&self, record: Record) -> Machine {
        let gone = |node: NodeId| self.config.nodes.get(node.index()).is_none_or(|node| node.removed);
        let removed = (0u16..).map(NodeId).take(self.config.nodes.len()).filter(|node| gone(*node)).collect();
        Machine::new(settings(&self.config, true), record.without(gone), now()).without(removed)
    }

    fn follow_record(&mut self, seen: &Seen, primary: Option<NodeId>, outcomes: &mut Vec<Outcome>) {
        let Some(several) = &mut self.several else { return };
        let Some(kept) = &seen.record else {
            several.record = Record::default();
            return self.obey(Wanted::Open, primary);
        };
        if several.read != Some(kept.revision) && several.read(kept, &self.names) {
            let record = several.record.clone();
            outcomes.push(Outcome::Known { record: Box::new(record.clone()), kept: several.kept() });
            self.machine = self.passive(record);
        }
        let Some(several) = &self.several else { return };
        self.obey(
            match several.damaged {
                false => lease::wanted(&several.record, kept.attempt.as_deref(), seen.close.as_ref()),
                // Whatever it says: nothing is done, and nobody waits for this one.
                true => Wanted::Away(kept.attempt.clone(), seen.close.as_ref().map(|close| close.revision)),
            },
            primary,
        );
    }

    /// Once for each thing that is wanted.
    fn obey(&mut self, wanted: Wanted, primary: Option<NodeId>) {
        let Some(several) = &mut self.several else { return };
        if several.obeyed.as_ref() == Some(&wanted) {
            return;
        }
        if let Some(obeying) = several.obeying.take() {
            obeying.abort();
        }
        several.obeyed = Some(wanted.clone());
        let (gate, speaker) = (Arc::clone(&self.gate), several.coordination.speaker());
        let obeying = match wanted {
            Wanted::Open => {
                gate.set(Posture::Open);
                None
            }
            Wanted::Draining(attempt) => {
                gate.set(Posture::Draining);
                Some(self.tasks.spawn(async move {
                    gate.drained().await;
                    speaker.drained(attempt);
                }))
            }
            Wanted::Closed(closed) => self.close(None, closed, primary),
            Wanted::Away(attempt, closed) => self.close(attempt, closed, primary),
        };
        if let Some(several) = &mut self.several {
            several.obeying = obeying;
        }
    }

    /// Closes what leads to the primary, and then acknowledges what the leader has asked for.
    fn close(
        &mut self,
        attempt: Option<String>,
        closed: Option<u64>,
        primary: Option<NodeId>,
    ) -> Option<AbortHandle> {
        let several = self.several.as_ref()?;
        let (gate, speaker) = (Arc::clone(&self.gate), several.coordination.speaker());
        // The one of the record, and the one that sessions here go to, should that be another.
        let nodes = [several.record.primary, primary];
        gate.set(Posture::Closed);
        nodes.into_iter().flatten().for_each(|node| gate.close_sockets(node));
        Some(self.tasks.spawn(async move {
            for node in nodes.into_iter().flatten() {
                gate.sockets_closed(node).await;
            }
            if let Some(attempt) = attempt {
                speaker.drained(attempt);
            }
            if let Some(revision) = closed {
                speaker.closed(revision);
            }
        }))
    }
}
