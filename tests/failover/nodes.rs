//! PostgreSQL servers as far as failover can tell: logs, timelines, walreceivers, waiting commits.

use std::collections::BTreeMap;

use highwater::failover::sync::Quorum;
use highwater::topology::NodeId;
use highwater::wal::Lsn;

/// Milliseconds since the model began.
pub type Ms = u64;

/// The position behind so many records.
pub fn lsn(records: usize) -> Lsn {
    Lsn(1000 + 10 * records as u64)
}

/// How many records end at or before this position.
pub fn records(at: Lsn) -> usize {
    usize::try_from(at.0.saturating_sub(1000) / 10).unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receiver {
    pub from: usize,
    pub pid: u32,
    /// The sender's process: a restart of the sender ends it.
    pub sender_start: u64,
    /// Since when nothing has been heard.
    pub heard: Ms,
    pub streaming: bool,
}

/// Who waits for a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writer {
    Direct,
    /// Through this run of the proxy, in this epoch, by sockets opened after so many closings.
    Proxy {
        run: u64,
        epoch: u64,
        sockets: u64,
    },
}

#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// The number of the record, from 0.
    pub at: usize,
    pub write: u64,
    pub writer: Writer,
}

/// What a statement of the proxy's does.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    Sever,
    Unsever,
    /// What [`Effect::Unsever`] is when it is sent, and [`Effect::Repoint`].
    Follow(usize),
    Kick,
    Unblock,
    SetSync(Quorum),
    Promote,
    Fence,
    Unfence,
}

/// A statement that has been sent and has not taken effect.
#[derive(Clone, Debug)]
pub struct Stuck {
    pub session: u64,
    pub effect: Effect,
}

#[derive(Clone, Debug)]
pub struct Node {
    pub up: bool,
    pub frozen: bool,
    /// It will not come back.
    pub destroyed: bool,
    /// Counts its starts.
    pub start: u64,
    pub starting_until: Ms,
    pub recovery: bool,
    pub timeline: u32,
    /// Timelines before, and how many records each had when it was left.
    pub history: Vec<(u32, usize)>,
    /// Each record by its number, unique in the world.
    pub wal: Vec<u64>,
    pub replayed: usize,
    /// Replay is paused, delayed or blocked by a reader.
    pub blocked: bool,
    /// It has restarted, and not yet read its own log to the end.
    pub reading: bool,
    /// The host in primary_conninfo.
    pub upstream: Option<usize>,
    /// What it was before it was severed.
    pub saved: Option<usize>,
    pub receiver: Option<Receiver>,
    pub pids: u32,
    /// synchronous_standby_names, as shown, and as commits go by it from then on.
    pub names: Quorum,
    pub effective: Quorum,
    pub effective_at: Ms,
    pub fenced: bool,
    /// The session that holds the control lock.
    pub lock: u64,
    pub stuck: Vec<Stuck>,
    /// What each standby has confirmed.
    pub confirmed: BTreeMap<usize, usize>,
    pub waiting: Vec<Waiting>,
}

impl Node {
    pub fn new(at: usize) -> Node {
        Node {
            up: true,
            frozen: false,
            destroyed: false,
            start: 1,
            starting_until: 0,
            recovery: at > 0,
            timeline: 1,
            history: Vec::new(),
            wal: Vec::new(),
            replayed: 0,
            blocked: false,
            reading: false,
            upstream: (at > 0).then_some(0),
            saved: None,
            receiver: None,
            pids: 100 * at as u32,
            names: Quorum::none(),
            effective: Quorum::none(),
            effective_at: 0,
            fenced: false,
            lock: 0,
            stuck: Vec::new(),
            confirmed: BTreeMap::new(),
            waiting: Vec::new(),
        }
    }

    pub fn works(&self, now: Ms) -> bool {
        self.up && !self.frozen && now >= self.starting_until
    }

    pub fn end(&self) -> Lsn {
        lsn(self.wal.len())
    }

    /// Where `timeline` was left for a later one.
    pub fn fork_of(&self, timeline: u32) -> Option<usize> {
        self.history.iter().find(|(of, _)| *of == timeline).map(|(_, at)| *at)
    }

    /// What a standby has is the beginning of what this one has.
    pub fn extends(&self, standby: &Node) -> bool {
        // A record is written once: whoever has it at the same place has the same before it.
        let upto = standby.wal.len();
        let same = upto == 0 || self.wal.get(upto - 1) == standby.wal.last();
        self.timeline >= standby.timeline && same
    }

    pub fn kill(&mut self) {
        self.up = false;
        self.frozen = false;
        self.receiver = None;
        self.waiting.clear();
        self.confirmed.clear();
        self.stuck.clear();
        self.lock = 0;
    }

    pub fn restart(&mut self, now: Ms, takes: Ms) {
        self.up = true;
        self.start += 1;
        self.starting_until = now + takes;
        self.reading = self.recovery;
        // A restarted standby replays from its last restartpoint: what it had shown is behind it.
        self.replayed = if self.recovery { self.replayed / 2 } else { self.wal.len() };
        self.effective = self.names.clone();
    }

    /// The statement takes effect.
    pub fn apply(&mut self, effect: &Effect, now: Ms, in_effect_after: Ms) {
        match effect {
            Effect::Sever => {
                if self.upstream.is_some() {
                    self.saved = self.upstream.take();
                }
            }
            Effect::Unsever => {}
            Effect::Follow(to) => {
                self.upstream = Some(*to);
                self.saved = None;
            }
            // The startup process, which would end it, waits with replay.
            Effect::Kick if self.blocked => {}
            Effect::Kick => self.receiver = None,
            Effect::Unblock => self.blocked = false,
            Effect::SetSync(names) => {
                self.names = names.clone();
                self.effective_at = now + in_effect_after;
            }
            Effect::Promote => self.promote(),
            Effect::Fence => {
                self.fenced = true;
                // Its clients' sessions are ended: what they wait for they never hear.
                self.waiting.clear();
            }
            Effect::Unfence => self.fenced = false,
        }
    }

    fn promote(&mut self) {
        if !self.recovery {
            return;
        }
        self.blocked = false;
        self.reading = false;
        self.recovery = false;
        self.receiver = None;
        self.replayed = self.wal.len();
        self.history.push((self.timeline, self.wal.len()));
        self.timeline += 1;
        self.effective = self.names.clone();
        self.confirmed.clear();
    }

    /// Takes as much as it gets of what the sender has.
    pub fn receive(&mut self, sender_wal: &[u64], upto: usize) {
        let upto = upto.min(sender_wal.len());
        if upto > self.wal.len() {
            self.wal.extend_from_slice(&sender_wal[self.wal.len()..upto]);
        }
    }

    /// The commits that enough standbys have confirmed.
    pub fn release(&mut self, now: Ms) -> Vec<Waiting> {
        if now >= self.effective_at {
            self.effective = self.names.clone();
        }
        let (rule, confirmed) = (&self.effective, &self.confirmed);
        let has = |member: &NodeId, at: usize| confirmed.get(&member.index()).is_some_and(|upto| *upto > at);
        let covered = |waiting: &Waiting| {
            rule.members.iter().filter(|member| has(member, waiting.at)).count() >= rule.confirm
        };
        let (done, left) = std::mem::take(&mut self.waiting).into_iter().partition(covered);
        self.waiting = left;
        done
    }
}
