//! Semi-synchronous management: what `synchronous_standby_names` shall be, and what may be promised
//! meanwhile. Pure: looks at the cluster and the outcome of statements go in, things to do come out.
//!
//! The record and the setting say the same thing in two places: `ANY k (members)`, that each
//! acknowledged commit is on disk on k of the members. An election leans on the *record* ([`Quorum`]),
//! the server goes by the *setting*. Promise: whatever the setting is, or may be once a statement of
//! unknown outcome lands, it holds at least what the record says. Hence the order of things (I9):
//!
//! - **loosening** (degrade, lower k, add a member): the record first, then the statement;
//! - **tightening** (restore, raise k, remove a member): the statement, seen to be in effect, then a
//!   position of the primary after that (the barrier), and once all members have it on disk the record;
//! - a change that is neither goes by way of a record that both sides hold ([`Quorum::meet`]).
//!
//! One statement is under way at a time. One of unknown outcome is followed by another that first takes
//! the node's control lock again (I10): only then is it known that the first will never land. Whatever
//! has changed the setting behind our back voids the record.
//!
//! Deliberately does not decide whether to promote, and knows no epochs: with a new primary begins a
//! new [`Sync`], recorded as nothing at all (I11). It must be shown nothing while a failover is under way: a
//! degrade would let the old primary acknowledge again.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use crate::failover::record::SyncState;
use crate::topology::NodeId;
use crate::wal::Lsn;

/// Of each acknowledged commit: it is on disk on `confirm` of the `members`, besides the primary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Quorum {
    /// How many; at most as many as there are members. 0: nothing is promised (degraded).
    pub confirm: usize,
    /// Out of which.
    pub members: BTreeSet<NodeId>,
}

impl Quorum {
    /// Commits wait for nobody; nothing is promised.
    pub fn none() -> Quorum {
        Quorum::default()
    }

    /// `ANY confirm (members)`; as many as there are if that is less.
    pub fn any(confirm: usize, members: impl IntoIterator<Item = NodeId>) -> Quorum {
        let members: BTreeSet<NodeId> = members.into_iter().collect();
        match confirm.min(members.len()) {
            0 => Quorum::none(),
            confirm => Quorum { confirm, members },
        }
    }

    /// Whether nothing is promised: no promotion by itself in safety level `quorum`.
    pub fn is_none(&self) -> bool {
        self.confirm == 0
    }

    /// Whether commits acknowledged by this rule are all that `other` promises: of any `confirm`
    /// members at least as many as `other` asks for are members of `other`.
    pub fn implies(&self, other: &Quorum) -> bool {
        let outside = self.members.difference(&other.members).count();
        other.is_none() || self.confirm >= other.confirm + outside
    }

    /// A promise that commits of either rule keep.
    #[must_use]
    pub fn meet(&self, other: &Quorum) -> Quorum {
        if self.implies(other) {
            return other.clone();
        }
        if other.implies(self) {
            return self.clone();
        }
        Quorum::any(self.confirm.min(other.confirm), self.members.union(&other.members).copied())
    }

    /// How many members must be severed before an election (I4): any acknowledged commit is then on one
    /// of them, and the rest are too few to acknowledge another. `None`: no number is enough.
    pub fn must_sever(&self) -> Option<usize> {
        (!self.is_none()).then(|| self.members.len() + 1 - self.confirm)
    }

    /// As it is recorded.
    pub fn to_record(&self) -> SyncState {
        SyncState {
            members: self.members.iter().copied().collect(),
            num: u32::try_from(self.confirm).unwrap_or(u32::MAX),
            degraded: self.is_none(),
        }
    }

    /// From what is recorded; nothing is promised while that is degraded.
    pub fn from_record(state: &SyncState) -> Quorum {
        let confirm = usize::try_from(state.num).unwrap_or(usize::MAX);
        if state.degraded { Quorum::none() } else { Quorum::any(confirm, state.members.iter().copied()) }
    }

    /// The value of `synchronous_standby_names`; `names` are the nodes', by [`NodeId`].
    pub fn setting(&self, names: &[impl AsRef<str>]) -> String {
        if self.is_none() {
            return String::new();
        }
        let quoted = |node: &NodeId| {
            let name = names.get(node.index()).map_or("", AsRef::as_ref);
            format!("\"{}\"", name.replace('"', "\"\""))
        };
        let members: Vec<String> = self.members.iter().map(quoted).collect();
        format!("ANY {} ({})", self.confirm, members.join(", "))
    }
}

/// Why a setting, or the names it is built of, cannot be leaned on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadNames {
    /// The server would not take this text either.
    Syntax,
    /// `*`: anybody who streams may acknowledge.
    Anybody,
    /// Two nodes, two entries, or two connections to the primary go by this name.
    Twice(String),
    /// No node has this name.
    Unknown(String),
    /// A name that a standby cannot carry as its `application_name`, or that standbys have by default.
    Unfit(String),
}

impl fmt::Display for BadNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadNames::Syntax => f.write_str("synchronous_standby_names cannot be read"),
            BadNames::Anybody => f.write_str("synchronous_standby_names has `*`: anybody may acknowledge"),
            BadNames::Twice(name) => write!(f, "more than one goes by the name `{name}`"),
            BadNames::Unknown(name) => write!(f, "no node has the name `{name}`"),
            BadNames::Unfit(name) => {
                write!(f, "`{name}` cannot be told apart as an application_name")
            }
        }
    }
}

/// The default `application_name` of a standby's walreceiver.
const DEFAULT_NAME: &str = "walreceiver";
/// Longer names are cut off by the server.
const LONGEST_NAME: usize = 63;

/// Whether the nodes' names can stand for them in `synchronous_standby_names`: the server compares
/// without case, cuts off at 63 bytes and writes `?` for what is not printable ASCII.
pub fn check_names(names: &[impl AsRef<str>]) -> Result<(), BadNames> {
    for (at, name) in names.iter().map(AsRef::as_ref).enumerate() {
        let printable = name.bytes().all(|byte| (32..127).contains(&byte));
        let fits = !name.is_empty() && name.len() <= LONGEST_NAME && printable;
        if name == "*" {
            return Err(BadNames::Anybody);
        }
        if !fits || name.eq_ignore_ascii_case(DEFAULT_NAME) {
            return Err(BadNames::Unfit(name.to_owned()));
        }
        if names[..at].iter().any(|other| other.as_ref().eq_ignore_ascii_case(name)) {
            return Err(BadNames::Twice(name.to_owned()));
        }
    }
    Ok(())
}

/// What a value of `synchronous_standby_names` promises. `FIRST` promises at least what `ANY` of as
/// many out of the same list does.
pub fn parse_setting(text: &str, names: &[impl AsRef<str>]) -> Result<Quorum, BadNames> {
    let mut rest = Words { rest: text };
    let mut words = Vec::new();
    while let Some(word) = rest.next()? {
        words.push(word);
    }
    let (confirm, list) = match words.as_slice() {
        [] => return Ok(Quorum::none()),
        [Word::Plain(method), Word::Number(confirm), Word::Open, list @ .., Word::Close]
            if method.eq_ignore_ascii_case("any") || method.eq_ignore_ascii_case("first") =>
        {
            (*confirm, list)
        }
        [Word::Number(confirm), Word::Open, list @ .., Word::Close] => (*confirm, list),
        list => (1, list),
    };
    let mut members = BTreeSet::new();
    for pair in list.chunks(2) {
        let last = pair.len() == 1;
        if !last && pair[1] != Word::Comma {
            return Err(BadNames::Syntax);
        }
        let name = pair[0].as_name().ok_or(BadNames::Syntax)?;
        let node = node_of(&name, names)?;
        if !members.insert(node) {
            return Err(BadNames::Twice(name));
        }
    }
    let complete = list.len() % 2 == 1;
    // More than the list has: nothing is ever acknowledged; and nothing that a record could promise.
    if complete && confirm > 0 && confirm <= members.len() {
        Ok(Quorum { confirm, members })
    } else {
        Err(BadNames::Syntax)
    }
}

fn node_of(name: &str, names: &[impl AsRef<str>]) -> Result<NodeId, BadNames> {
    if name == "*" {
        return Err(BadNames::Anybody);
    }
    let mut found = names.iter().zip(0u16..).filter(|(node, _)| node.as_ref().eq_ignore_ascii_case(name));
    match (found.next(), found.next()) {
        (Some((_, id)), None) => Ok(NodeId(id)),
        (None, _) => Err(BadNames::Unknown(name.to_owned())),
        (Some(_), Some(_)) => Err(BadNames::Twice(name.to_owned())),
    }
}

/// A word of the setting, as the server's own scanner cuts it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Word {
    Plain(String),
    Quoted(String),
    Number(usize),
    Open,
    Close,
    Comma,
}

impl Word {
    fn as_name(&self) -> Option<String> {
        match self {
            // The keywords are names only in quotes.
            Word::Plain(word) if ["any", "first"].contains(&word.to_ascii_lowercase().as_str()) => None,
            Word::Plain(name) | Word::Quoted(name) => Some(name.clone()),
            Word::Number(number) => Some(number.to_string()),
            Word::Open | Word::Close | Word::Comma => None,
        }
    }
}

struct Words<'a> {
    rest: &'a str,
}

impl Words<'_> {
    fn next(&mut self) -> Result<Option<Word>, BadNames> {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r', '\u{c}', '\u{b}']);
        let Some(first) = self.rest.chars().next() else {
            return Ok(None);
        };
        let word = match first {
            '(' => Word::Open,
            ')' => Word::Close,
            ',' => Word::Comma,
            '*' => Word::Plain("*".to_owned()),
            '"' => return self.quoted().map(Some),
            '0'..='9' => {
                let digits = self.take(|c| c.is_ascii_digit());
                return digits.parse().map(|number| Some(Word::Number(number))).map_err(|_| BadNames::Syntax);
            }
            c if c.is_ascii_alphabetic() || c == '_' || !c.is_ascii() => {
                let name = self.take(|c| c.is_ascii_alphanumeric() || "_$".contains(c) || !c.is_ascii());
                return Ok(Some(Word::Plain(name)));
            }
            _ => return Err(BadNames::Syntax),
        };
        self.rest = &self.rest[1..];
        Ok(Some(word))
    }

    fn take(&mut self, of_it: impl Fn(char) -> bool) -> String {
        let end = self.rest.find(|c| !of_it(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word.to_owned()
    }

    fn quoted(&mut self) -> Result<Word, BadNames> {
        let mut name = String::new();
        loop {
            let after_quote = &self.rest[1..];
            let end = after_quote.find('"').ok_or(BadNames::Syntax)?;
            name.push_str(&after_quote[..end]);
            self.rest = &after_quote[end + 1..];
            if !self.rest.starts_with('"') {
                return Ok(Word::Quoted(name));
            }
            name.push('"');
        }
    }
}

/// What the operator wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyncSettings {
    /// Whether Highwater sets the names. If not, what is found there is proven, and recorded.
    pub manage: bool,
    /// How many standbys shall confirm a commit.
    pub num: usize,
    /// How long a standby may be away, or late, before commits no longer wait for it; and how long it
    /// must have been well before they do again.
    pub degrade_after: Duration,
    /// Never fewer than `num`: commits wait instead.
    pub strict: bool,
}

/// The rule for the next primary, set before it is promoted (I11): `num` are to confirm. `standbys` are those that
/// shall follow it, `others` the rest of the nodes, which count only where `strict` leaves no choice.
pub fn for_new_primary(num: usize, strict: bool, standbys: &[NodeId], others: &[NodeId]) -> Quorum {
    let short = standbys.len() < num;
    let fill = others.iter().filter(|_| strict && short);
    Quorum::any(num, standbys.iter().chain(fill).copied())
}

/// A connection that the primary streams to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sender {
    /// Its `application_name`.
    pub name: String,
    /// Whether commits may count on it: `sync_state` is not `async`.
    pub counts: bool,
}

/// A standby, in its own words: what the primary says of a name may be anybody's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standby {
    /// Which.
    pub node: NodeId,
    /// It answers, and its walreceiver streams the primary's timeline.
    pub streaming: bool,
    /// What it has on disk of that timeline.
    pub flushed: Option<Lsn>,
}

/// One look at the primary and at all candidates for being its standby, the primary asked first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// When the question was sent to the primary.
    pub asked_at: Instant,
    /// `synchronous_standby_names`, as a fresh session is shown it.
    pub setting: String,
    /// The primary's insert position.
    pub at: Lsn,
    /// Whom it streams to. A candidate that is not among them, by its name, cannot confirm anything.
    pub senders: Vec<Sender>,
    /// One for each candidate; one that is left out did not answer.
    pub standbys: Vec<Standby>,
}

/// What happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyncEvent {
    /// The healthy primary was looked at. Nothing is decided without.
    Look(Look),
    /// The statement that was asked for is done, in effect, and this is the primary's insert position
    /// after that.
    InEffect(Lsn),
    /// It failed, or its outcome is not known.
    Unclear,
}

/// Why the record changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncReason {
    /// Members are gone, late, or more than are wanted.
    Loosen,
    /// All members have the barrier.
    Proven,
    /// Somebody else has changed the setting, or acknowledges under a member's name.
    Foreign,
}

impl SyncReason {
    /// One word for a log field.
    pub fn label(self) -> &'static str {
        match self {
            SyncReason::Loosen => "loosen",
            SyncReason::Proven => "proven",
            SyncReason::Foreign => "foreign",
        }
    }
}

/// What shall be done, in this order: nothing behind a record before that is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyncAction {
    /// Make durable what elections may lean on from now on.
    Record(Quorum, SyncReason),
    /// Take the primary's control lock anew if a statement's outcome is open, make this the setting (a
    /// statement only if it is another), see that it is in effect, and answer with a position after that.
    Set(Quorum),
    /// The same, but change nothing: fail if it is not the setting.
    Prove(Quorum),
}

/// How well commits are covered, for metric and display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// Nothing is promised.
    Degraded,
    /// Fewer than wanted confirm.
    Reduced,
    /// As many as wanted.
    Full,
}

/// A candidate as the looks have shown it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Health {
    /// Whether commits may wait for it.
    standing: HealthStanding,
    /// It has not streamed since.
    away_since: Option<Instant>,
    /// A position that the primary had then and that it does not have yet.
    owes: Option<(Lsn, Instant)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HealthStanding {
    /// Not seen well yet: needs no probation, it has not failed.
    New,
    In,
    /// It was away or late for too long; well again since.
    Lost(Option<Instant>),
}

impl Health {
    fn bad_for(&self, now: Instant) -> Duration {
        let since = |at: Instant| now.saturating_duration_since(at);
        let away = self.away_since.map_or(Duration::ZERO, since);
        away.max(self.owes.map_or(Duration::ZERO, |(_, at)| since(at)))
    }

    fn see(&mut self, standby: Option<&Standby>, at: Lsn, now: Instant) {
        let streaming = standby.is_some_and(|standby| standby.streaming);
        let flushed = standby.and_then(|standby| standby.flushed).unwrap_or(Lsn::ZERO);
        self.away_since = (!streaming).then(|| self.away_since.unwrap_or(now));
        self.owes = match self.owes {
            Some(debt) if flushed < debt.0 => Some(debt),
            _ if flushed < at => Some((at, now)),
            _ => None,
        };
    }

    fn judge(&mut self, settings: &SyncSettings, now: Instant) {
        let (bad_for, limit) = (self.bad_for(now), settings.degrade_after);
        let streams = self.away_since.is_none();
        self.standing = match self.standing {
            HealthStanding::New if streams => HealthStanding::In,
            HealthStanding::New | HealthStanding::In if bad_for >= limit => HealthStanding::Lost(None),
            HealthStanding::Lost(_) if !streams || bad_for >= limit / 2 => HealthStanding::Lost(None),
            HealthStanding::Lost(well) => {
                let well = well.unwrap_or(now);
                let long_enough = now.saturating_duration_since(well) >= limit;
                if long_enough { HealthStanding::In } else { HealthStanding::Lost(Some(well)) }
            }
            standing => standing,
        };
    }
}

/// What is known of the setting.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Setting {
    /// It may be anything that implies the record.
    Unclear,
    /// A statement is under way.
    Asked(Quorum),
    /// In effect, no later than at this position; looks from after that time must show it.
    InEffect { rule: Quorum, barrier: Lsn, since: Instant },
}

/// The management of one primary's synchronous standbys.
#[derive(Clone, Debug)]
pub struct Sync {
    settings: SyncSettings,
    names: Vec<String>,
    recorded: Quorum,
    setting: Setting,
    /// What the last look showed; `None` also if it promises nothing that can be leaned on.
    shown: Option<Quorum>,
    /// Somebody who is no member may have acknowledged since the barrier.
    disturbed: bool,
    health: Vec<(NodeId, Health)>,
    looked_at: Option<Instant>,
}

impl Sync {
    /// With what was last recorded for this primary, [`Quorum::none`] for a new one. `names` are all
    /// nodes', by [`NodeId`]; `candidates` those that may be its synchronous standbys.
    pub fn new(
        settings: SyncSettings,
        names: Vec<String>,
        candidates: impl IntoIterator<Item = NodeId>,
        recorded: Quorum,
    ) -> Sync {
        let new = Health { standing: HealthStanding::New, away_since: None, owes: None };
        let health = candidates
            .into_iter()
            .map(|node| {
                // A member has been well before, as far as is known.
                let member = recorded.members.contains(&node);
                let standing = if member { HealthStanding::In } else { HealthStanding::New };
                (node, Health { standing, ..new })
            })
            .collect();
        Sync {
            settings,
            names,
            recorded,
            setting: Setting::Unclear,
            shown: None,
            disturbed: false,
            health,
            looked_at: None,
        }
    }

    /// What elections may lean on.
    pub fn recorded(&self) -> &Quorum {
        &self.recorded
    }

    /// Whether a statement is under way: its outcome must be known, or the lock taken anew, before the
    /// primary's setting is counted on in any other way.
    pub fn is_busy(&self) -> bool {
        matches!(self.setting, Setting::Asked(_))
    }

    /// How well commits are covered, by the record.
    pub fn coverage(&self) -> Coverage {
        match self.recorded.confirm {
            0 => Coverage::Degraded,
            confirm if confirm < self.settings.num => Coverage::Reduced,
            _ => Coverage::Full,
        }
    }

    /// Takes in what has happened, and says what to do now.
    pub fn step(&mut self, event: SyncEvent, now: Instant) -> Vec<SyncAction> {
        match event {
            SyncEvent::Look(look) => self.look(&look, now),
            SyncEvent::InEffect(barrier) => {
                if let Setting::Asked(rule) = &self.setting {
                    self.setting = Setting::InEffect { rule: rule.clone(), barrier, since: now };
                }
                Vec::new()
            }
            SyncEvent::Unclear => {
                self.setting = Setting::Unclear;
                Vec::new()
            }
        }
    }

    fn look(&mut self, look: &Look, now: Instant) -> Vec<SyncAction> {
        let mut actions = Vec::new();
        self.see_health(look, now);
        self.shown = parse_setting(&look.setting, &self.names).ok();
        let (changed, stranger) = (self.is_changed(look), self.has_stranger(look));
        if changed || stranger {
            self.record(Quorum::none(), SyncReason::Foreign, &mut actions);
        }
        self.disturbed |= stranger;
        if !self.is_busy() {
            // Once the stranger is gone, a barrier is needed that is behind all that it has confirmed.
            if changed || (self.disturbed && !stranger) {
                self.setting = Setting::Unclear;
                self.disturbed = false;
            }
            self.go_on(look, &mut actions);
        }
        actions
    }

    fn see_health(&mut self, look: &Look, now: Instant) {
        // Nobody has looked for as long as a standby may be away: it has not been seen to be.
        let blind =
            self.looked_at.is_some_and(|at| now.saturating_duration_since(at) >= self.settings.degrade_after);
        self.looked_at = Some(now);
        for (node, health) in &mut self.health {
            if blind {
                (health.away_since, health.owes) = (None, None);
            }
            let name = self.names.get(node.index()).map_or("", String::as_str);
            let named = named(&look.senders, name);
            // One that streams under another name, or from another standby, never confirms a commit.
            let standby = look.standbys.iter().find(|standby| standby.node == *node && named > 0);
            health.see(standby, look.at, now);
            health.judge(&self.settings, now);
            if named > 1 {
                health.standing = HealthStanding::Lost(None);
            }
        }
    }

    /// Whether somebody who is no member, or not known to be one, may confirm commits.
    fn has_stranger(&self, look: &Look) -> bool {
        look.senders.iter().filter(|sender| sender.counts).any(|sender| {
            node_of(&sender.name, &self.names).is_err() || named(&look.senders, &sender.name) > 1
        })
    }

    /// Whether somebody else has changed the setting.
    fn is_changed(&self, look: &Look) -> bool {
        match &self.setting {
            // It shows the one or the other.
            Setting::Asked(_) => false,
            Setting::InEffect { rule, since, .. } => {
                look.asked_at > *since && self.shown.as_ref() != Some(rule)
            }
            Setting::Unclear => !self.shown.as_ref().is_some_and(|shown| shown.implies(&self.recorded)),
        }
    }

    /// What the setting should be, as things stand.
    fn wanted(&self) -> Quorum {
        if !self.settings.manage {
            return self.shown.clone().unwrap_or_default();
        }
        let well: BTreeSet<NodeId> = self
            .health
            .iter()
            .filter(|(_, health)| health.standing == HealthStanding::In)
            .map(|(node, _)| *node)
            .collect();
        if well.len() >= self.settings.num || !self.settings.strict {
            return Quorum::any(self.settings.num, well);
        }
        // Commits wait for whoever comes back first.
        let mut members: BTreeSet<NodeId> = well.union(&self.recorded.members).copied().collect();
        if members.len() < self.settings.num {
            members.extend(self.health.iter().map(|(node, _)| *node));
        }
        Quorum::any(self.settings.num, members)
    }

    fn go_on(&mut self, look: &Look, actions: &mut Vec<SyncAction>) {
        let wanted = self.wanted();
        if !wanted.implies(&self.recorded) {
            // Who watches only has come too late: commits may have been acknowledged by the looser rule.
            let held = if self.settings.manage { self.recorded.meet(&wanted) } else { Quorum::none() };
            self.record(held, SyncReason::Loosen, actions);
        }
        match &self.setting {
            Setting::InEffect { rule, barrier, .. } if *rule == wanted => {
                if self.recorded != wanted && !self.disturbed && self.all_have(&wanted, *barrier, look) {
                    self.record(wanted, SyncReason::Proven, actions);
                }
            }
            _ => {
                self.setting = Setting::Asked(wanted.clone());
                debug_assert!(wanted.implies(&self.recorded), "{wanted:?} under {:?}", self.recorded);
                let manage = self.settings.manage;
                actions.push(if manage { SyncAction::Set(wanted) } else { SyncAction::Prove(wanted) });
            }
        }
    }

    fn all_have(&self, rule: &Quorum, barrier: Lsn, look: &Look) -> bool {
        rule.members.iter().all(|member| {
            look.standbys.iter().any(|standby| {
                standby.node == *member && standby.streaming && standby.flushed >= Some(barrier)
            })
        })
    }

    fn record(&mut self, quorum: Quorum, why: SyncReason, actions: &mut Vec<SyncAction>) {
        if self.recorded != quorum {
            self.recorded = quorum.clone();
            actions.push(SyncAction::Record(quorum, why));
        }
    }
}

fn named(senders: &[Sender], name: &str) -> usize {
    senders.iter().filter(|sender| sender.name.eq_ignore_ascii_case(name)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] = ["a", "b", "c", "d"];
    const A: NodeId = NodeId(0);
    const B: NodeId = NodeId(1);
    const C: NodeId = NodeId(2);
    const D: NodeId = NodeId(3);

    fn any(confirm: usize, members: &[NodeId]) -> Quorum {
        Quorum::any(confirm, members.iter().copied())
    }

    #[test]
    fn a_setting_is_read_as_the_server_reads_it() {
        let good = |text: &str, quorum: Quorum| assert_eq!(parse_setting(text, &NAMES), Ok(quorum), "{text}");
        good("", Quorum::none());
        good("  ", Quorum::none());
        good("b", any(1, &[B]));
        good("b, c", any(1, &[B, C]));
        good("2 (b, C)", any(2, &[B, C]));
        good("first 1 (b,c)", any(1, &[B, C]));
        good("ANY 2(\"b\" , c,\td)", any(2, &[B, C, D]));
        let bad = |text: &str, why: BadNames| assert_eq!(parse_setting(text, &NAMES), Err(why), "{text}");
        bad("*", BadNames::Anybody);
        bad("ANY 1 (*)", BadNames::Anybody);
        bad("ANY 1 (b, \"*\")", BadNames::Anybody);
        bad("ANY 1 (b, e)", BadNames::Unknown("e".to_owned()));
        bad("2 (b, B)", BadNames::Twice("B".to_owned()));
        bad("any", BadNames::Syntax);
        for text in [
            "ANY (b)",
            "ANY 0 (b)",
            "ANY 2 (b)",
            "ANY 1 (b,)",
            "b c",
            ",b",
            "(b)",
            "b,",
            "\"b",
            "b;",
            "ANY 1 b",
        ] {
            bad(text, BadNames::Syntax);
        }
        let twice = ["b", "B"];
        assert_eq!(parse_setting("b", &twice), Err(BadNames::Twice("b".to_owned())));
        let odd = ["x", "say \"b\"", "7"];
        for quorum in [any(1, &[B]), any(2, &[B, C]), any(3, &[A, B, C]), Quorum::none()] {
            assert_eq!(parse_setting(&quorum.setting(&odd), &odd), Ok(quorum));
        }
    }

    #[test]
    fn names_that_cannot_stand_for_their_nodes_are_told() {
        assert_eq!(check_names(&NAMES), Ok(()));
        assert_eq!(check_names(&["a", "A"]), Err(BadNames::Twice("A".to_owned())));
        assert_eq!(check_names(&["a", "*"]), Err(BadNames::Anybody));
        for name in ["", "walreceiver", "WALReceiver", "n\u{f6}rd", "x\n", &"x".repeat(64)] {
            assert_eq!(check_names(&["a", name]), Err(BadNames::Unfit(name.to_owned())));
        }
        assert_eq!(check_names(&["x".repeat(63)]), Ok(()));
    }

    /// All rules over four nodes, and all sets of nodes that a commit may be on.
    fn rules() -> Vec<Quorum> {
        let sets = (0..16u16).map(|bits| (0..4).filter(move |n| bits & 1 << n != 0).map(NodeId));
        let mut rules: Vec<Quorum> =
            sets.flat_map(|set| (0..5).map(move |confirm| Quorum::any(confirm, set.clone()))).collect();
        rules.dedup();
        rules
    }

    fn holds(rule: &Quorum, on: u16) -> bool {
        rule.members.iter().filter(|node| on & 1 << node.0 != 0).count() >= rule.confirm
    }

    #[test]
    fn a_rule_is_recorded_and_read_back() {
        for rule in rules() {
            assert_eq!(Quorum::from_record(&rule.to_record()), rule);
        }
        let degraded = SyncState { members: vec![B], num: 1, degraded: true };
        assert!(Quorum::from_record(&degraded).is_none());
    }

    #[test]
    fn one_rule_implies_another_if_every_commit_it_acknowledges_keeps_it() {
        for left in rules() {
            for right in rules() {
                let truth = (0..16).all(|on| !holds(&left, on) || holds(&right, on));
                assert_eq!(left.implies(&right), truth, "{left:?} {right:?}");
                let meet = left.meet(&right);
                assert!(left.implies(&meet) && right.implies(&meet), "{left:?} {right:?} {meet:?}");
            }
        }
    }

    #[test]
    fn so_many_severed_hold_every_commit_and_leave_too_few_to_acknowledge_another() {
        for rule in rules() {
            let Some(must) = rule.must_sever() else {
                assert!(rule.is_none());
                continue;
            };
            for severed in 0..16u16 {
                let left = (0..4).fold(0, |on, n| on | (u16::from(rule.members.contains(&NodeId(n))) << n))
                    & !severed;
                let enough = rule.members.iter().filter(|node| severed & 1 << node.0 != 0).count() >= must;
                let all_known = (0..16).filter(|on| holds(&rule, *on)).all(|on| on & severed != 0);
                assert_eq!(enough, all_known && !holds(&rule, left), "{rule:?} {severed:b}");
            }
        }
    }

    /// A primary and its standbys, as told: time goes by in looks, 100 ms apart.
    struct Story {
        sync: Sync,
        now: Instant,
        setting: String,
        at: u64,
        /// What each has on disk; `None`: away.
        standbys: Vec<(NodeId, Option<u64>)>,
        keep_up: BTreeSet<NodeId>,
        /// Others that the primary streams to.
        strangers: Vec<Sender>,
        /// Streams under another name.
        misnamed: Option<NodeId>,
    }

    const SETTINGS: SyncSettings =
        SyncSettings { manage: true, num: 1, degrade_after: Duration::from_secs(5), strict: false };

    impl Story {
        fn new(settings: SyncSettings, candidates: &[NodeId], recorded: Quorum) -> Story {
            let names = NAMES.map(str::to_owned).to_vec();
            Story {
                setting: recorded.setting(&NAMES),
                sync: Sync::new(settings, names, candidates.iter().copied(), recorded),
                now: Instant::now(),
                at: 100,
                standbys: candidates.iter().map(|node| (*node, Some(100))).collect(),
                keep_up: candidates.iter().copied().collect(),
                strangers: Vec::new(),
                misnamed: None,
            }
        }

        fn look(&mut self) -> Vec<String> {
            self.look_as_asked_at(self.now)
        }

        fn look_as_asked_at(&mut self, asked_at: Instant) -> Vec<String> {
            self.now += Duration::from_millis(100);
            self.at += 10;
            for (node, flushed) in &mut self.standbys {
                if self.keep_up.contains(node) && flushed.is_some() {
                    *flushed = Some(self.at);
                }
            }
            let standbys = self.standbys.iter().map(|(node, flushed)| Standby {
                node: *node,
                streaming: flushed.is_some(),
                flushed: flushed.map(Lsn),
            });
            let named =
                self.standbys.iter().filter(|(node, at)| at.is_some() && self.misnamed != Some(*node));
            let own = named.map(|(node, _)| sender(NAMES[node.index()], true));
            let look = Look {
                asked_at: asked_at + Duration::from_millis(1),
                setting: self.setting.clone(),
                at: Lsn(self.at),
                senders: own.chain(self.strangers.iter().cloned()).collect(),
                standbys: standbys.collect(),
            };
            self.told(SyncEvent::Look(look))
        }

        fn told(&mut self, event: SyncEvent) -> Vec<String> {
            let actions = self.sync.step(event, self.now);
            actions
                .into_iter()
                .map(|action| match action {
                    SyncAction::Record(quorum, why) => {
                        format!("record {} {}", quorum.setting(&NAMES), why.label())
                    }
                    SyncAction::Set(quorum) => format!("set {}", quorum.setting(&NAMES)),
                    SyncAction::Prove(quorum) => format!("prove {}", quorum.setting(&NAMES)),
                })
                .collect()
        }

        fn in_effect(&mut self) {
            let Setting::Asked(rule) = &self.sync.setting else { panic!("nothing is under way") };
            self.setting = rule.setting(&NAMES);
            let at = Lsn(self.at);
            assert!(self.told(SyncEvent::InEffect(at)).is_empty());
        }

        /// Looks for so long; what came of it, each with the look that it came at.
        fn looks(&mut self, count: usize) -> Vec<(usize, String)> {
            (1..=count).flat_map(|at| self.look().into_iter().map(move |action| (at, action))).collect()
        }

        fn settled(settings: SyncSettings, candidates: &[NodeId]) -> Story {
            let recorded = Quorum::any(settings.num, candidates.iter().copied());
            let mut story = Story::new(settings, candidates, recorded.clone());
            assert_eq!(story.look(), [format!("set {}", recorded.setting(&NAMES))]);
            story.in_effect();
            assert_eq!(story.looks(80), []);
            story
        }

        fn away(&mut self, node: NodeId) {
            self.standbys.iter_mut().filter(|(of, _)| *of == node).for_each(|(_, flushed)| *flushed = None);
        }

        fn back(&mut self, node: NodeId, flushed: u64) {
            self.standbys.iter_mut().filter(|(of, _)| *of == node).for_each(|(_, at)| *at = Some(flushed));
        }
    }

    fn sender(name: &str, counts: bool) -> Sender {
        Sender { name: name.to_owned(), counts }
    }

    fn at(look: usize, what: &str) -> (usize, String) {
        (look, what.to_owned())
    }

    const BOTH: &str = "ANY 1 (\"b\", \"c\")";

    #[test]
    fn a_new_primary_is_recorded_only_once_all_members_have_the_barrier() {
        let mut story = Story::new(SETTINGS, &[B, C], Quorum::none());
        story.keep_up.remove(&C);
        assert_eq!(story.look(), [format!("set {BOTH}")]);
        assert_eq!(story.look(), Vec::<String>::new(), "one statement at a time");
        story.in_effect();
        assert_eq!(story.looks(3), [], "c does not have it yet");
        assert_eq!(story.sync.coverage(), Coverage::Degraded);
        story.keep_up.insert(C);
        assert_eq!(story.look(), [format!("record {BOTH} proven")]);
        assert_eq!(story.sync.coverage(), Coverage::Full);
        assert_eq!(story.looks(100), []);
    }

    #[test]
    fn the_last_standby_dies_and_commits_are_released_after_degrade_after_recorded_first() {
        let mut story = Story::settled(SETTINGS, &[B]);
        story.away(B);
        assert_eq!(story.looks(50), []);
        assert_eq!(story.look(), ["record  loosen", "set "]);
        story.in_effect();
        assert_eq!(story.looks(100), []);
        story.back(B, story.at);
        let restored = story.looks(60);
        assert_eq!(restored, [at(51, "set ANY 1 (\"b\")")], "only after it was well for as long");
        story.in_effect();
        assert_eq!(story.look(), ["record ANY 1 (\"b\") proven"]);
    }

    #[test]
    fn with_strict_commits_wait_instead() {
        let mut story = Story::settled(SyncSettings { strict: true, ..SETTINGS }, &[B, C]);
        story.away(B);
        assert_eq!(story.looks(60), [at(51, "set ANY 1 (\"c\")")]);
        story.in_effect();
        assert_eq!(story.looks(2), [at(1, "record ANY 1 (\"c\") proven")]);
        story.away(C);
        assert_eq!(story.looks(100), []);
    }

    #[test]
    fn a_dead_member_of_two_is_taken_out_and_the_record_follows_the_barrier() {
        let mut story = Story::settled(SETTINGS, &[B, C]);
        story.away(C);
        assert_eq!(story.looks(51), [at(51, "set ANY 1 (\"b\")")]);
        assert_eq!(story.sync.recorded().must_sever(), Some(2), "not before it is in effect");
        story.in_effect();
        assert_eq!(story.look(), ["record ANY 1 (\"b\") proven"]);
        assert_eq!(story.sync.recorded().must_sever(), Some(1));
        // Back again: one more may confirm, so the record must know before.
        story.back(C, story.at);
        assert_eq!(
            story.looks(51),
            [at(51, &format!("record {BOTH} loosen")), at(51, &format!("set {BOTH}"))]
        );
    }

    #[test]
    fn with_two_to_confirm_one_is_enough_when_there_is_only_one_left() {
        let mut story = Story::settled(SyncSettings { num: 2, ..SETTINGS }, &[B, C, D]);
        story.away(D);
        assert_eq!(story.looks(51), [at(51, "set ANY 2 (\"b\", \"c\")")]);
        story.in_effect();
        assert_eq!(story.look(), ["record ANY 2 (\"b\", \"c\") proven"]);
        story.away(C);
        // All that both have confirmed is on b.
        assert_eq!(story.looks(51), [at(51, "record ANY 1 (\"b\") loosen"), at(51, "set ANY 1 (\"b\")")]);
        story.in_effect();
        assert_eq!(story.looks(100), []);
        assert_eq!(story.sync.coverage(), Coverage::Reduced);
    }

    #[test]
    fn a_late_standby_is_replaced_by_another() {
        let settings = SyncSettings { strict: true, ..SETTINGS };
        let mut story = Story::settled(settings, &[B, D]);
        // Streaming, and ever further behind.
        story.keep_up.remove(&B);
        assert_eq!(story.looks(60), [at(51, "set ANY 1 (\"d\")")]);
        story.in_effect();
        assert_eq!(story.look(), ["record ANY 1 (\"d\") proven"]);
        assert_eq!(story.looks(100), [], "still late");
        story.keep_up.insert(B);
        let back = story.looks(60);
        assert_eq!(back.first(), Some(&at(51, "record ANY 1 (\"b\", \"d\") loosen")), "{back:?}");
    }

    #[test]
    fn both_exchanged_at_once_go_by_a_record_that_either_side_keeps() {
        let mut story = Story::settled(SETTINGS, &[B, C]);
        let now = story.now;
        for (node, health) in &mut story.sync.health {
            health.standing = if *node == B { HealthStanding::Lost(None) } else { HealthStanding::In };
        }
        story.sync.health.push((D, Health { standing: HealthStanding::In, away_since: None, owes: None }));
        story.standbys.push((D, Some(100)));
        story.away(B);
        let joint = "ANY 1 (\"b\", \"c\", \"d\")";
        assert_eq!(story.look(), [format!("record {joint} loosen"), "set ANY 1 (\"c\", \"d\")".to_owned()]);
        assert!(story.now > now);
        story.in_effect();
        assert_eq!(story.look(), Vec::<String>::new(), "d lacks the barrier");
        story.keep_up.insert(D);
        assert_eq!(story.look(), ["record ANY 1 (\"c\", \"d\") proven"]);
    }

    #[test]
    fn a_member_that_dies_during_the_restore_takes_it_back() {
        let mut story = Story::new(SETTINGS, &[B], Quorum::none());
        assert_eq!(story.look(), ["set ANY 1 (\"b\")"]);
        story.away(B);
        story.in_effect();
        // Commits hang, and the record promises nothing yet: no record is needed to let them go.
        assert_eq!(story.looks(60), [at(51, "set ")]);
    }

    #[test]
    fn a_restore_that_looks_done_is_ordered_while_a_degrade_may_still_land() {
        let mut story = Story::settled(SETTINGS, &[B]);
        story.away(B);
        assert_eq!(story.looks(51).len(), 2);
        assert!(story.told(SyncEvent::Unclear).is_empty());
        story.back(B, story.at);
        // The degrade is tried again as long as b has not been well for long enough; its outcome stays open.
        for _ in 0..50 {
            assert_eq!(story.look(), ["set "]);
            story.told(SyncEvent::Unclear);
        }
        assert_eq!(story.setting, "ANY 1 (\"b\")", "as if it had never been changed");
        assert_eq!(story.look(), ["set ANY 1 (\"b\")"]);
        assert_eq!(story.looks(3), [], "what it shows is no proof");
        story.in_effect();
        assert_eq!(story.look(), ["record ANY 1 (\"b\") proven"]);
    }

    #[test]
    fn what_somebody_else_has_set_voids_the_record_and_is_set_right() {
        let mut story = Story::settled(SETTINGS, &[B, C]);
        story.setting = "ANY 1 (b)".to_owned();
        assert_eq!(story.look(), ["record  foreign".to_owned(), format!("set {BOTH}")]);
        story.in_effect();
        assert_eq!(story.look(), [format!("record {BOTH} proven")]);
        // An answer from before our own statement is none of somebody else.
        let long_ago = story.now - Duration::from_secs(1);
        story.told(SyncEvent::Unclear);
        assert_eq!(story.look(), [format!("set {BOTH}")]);
        story.in_effect();
        story.setting = "ANY 1 (b)".to_owned();
        assert_eq!(story.look_as_asked_at(long_ago), Vec::<String>::new());
    }

    #[test]
    fn a_setting_found_at_the_start_must_keep_what_is_recorded() {
        for (setting, kept) in [
            (BOTH, true),
            ("b", true),
            ("ANY 2 (b, c)", true),
            ("", false),
            ("*", false),
            ("ANY 1 (b,c,d)", false),
        ] {
            let mut story = Story::new(SETTINGS, &[B, C], any(1, &[B, C]));
            story.setting = setting.to_owned();
            let said = story.look();
            assert_eq!(said.len(), if kept { 1 } else { 2 }, "{setting}: {said:?}");
            assert_eq!(said.last(), Some(&format!("set {BOTH}")));
        }
    }

    #[test]
    fn a_stranger_who_acknowledges_voids_the_record_for_as_long_as_it_is_there() {
        let mut story = Story::settled(SETTINGS, &[B, C]);
        story.strangers = vec![sender("pg_receivewal", false)];
        assert_eq!(story.look(), Vec::<String>::new(), "nobody waits for it");
        story.strangers = vec![sender("C", true)];
        assert_eq!(story.look(), ["record  foreign", "set ANY 1 (\"b\")"]);
        story.in_effect();
        assert_eq!(story.looks(100), [], "nothing is proven beside it");
        story.strangers.clear();
        let back = story.looks(10);
        assert!(back[0].1.starts_with("set ANY 1 (\"b\")"), "{back:?}");
        story.in_effect();
        assert_eq!(story.look(), ["record ANY 1 (\"b\") proven"]);
    }

    #[test]
    fn a_standby_that_streams_under_another_name_is_not_waited_for() {
        let mut story = Story::new(SETTINGS, &[B, C], Quorum::none());
        story.misnamed = Some(C);
        assert_eq!(story.looks(60), [at(1, "set ANY 1 (\"b\")")]);
        story.in_effect();
        assert_eq!(story.look(), ["record ANY 1 (\"b\") proven"]);
    }

    #[test]
    fn after_a_time_in_which_nobody_looked_nobody_counts_as_away_for_long() {
        let mut story = Story::settled(SETTINGS, &[B]);
        story.away(B);
        story.look();
        story.now += Duration::from_secs(60);
        assert_eq!(story.looks(50), []);
        assert_eq!(story.look().len(), 2);
    }

    #[test]
    fn without_managing_what_is_found_is_proven_and_recorded() {
        let mut story = Story::new(SyncSettings { manage: false, ..SETTINGS }, &[B, C], Quorum::none());
        story.setting = "FIRST 1 (b, c)".to_owned();
        assert_eq!(story.look(), [format!("prove {BOTH}")]);
        assert!(story.told(SyncEvent::InEffect(Lsn(1))).is_empty());
        assert_eq!(story.look(), [format!("record {BOTH} proven")]);
        story.setting = "b".to_owned();
        assert_eq!(story.look(), ["record  foreign", "prove ANY 1 (\"b\")"]);
        assert!(story.told(SyncEvent::InEffect(Lsn(1))).is_empty());
        assert_eq!(story.look(), ["record ANY 1 (\"b\") proven"]);
        story.setting = "*".to_owned();
        assert_eq!(story.look(), ["record  foreign", "prove "]);
    }

    #[test]
    fn the_next_primary_waits_for_those_who_shall_follow_it() {
        for (num, strict, standbys, others, rule) in [
            (1, false, &[C][..], &[A][..], any(1, &[C])),
            (1, false, &[], &[A], Quorum::none()),
            (2, false, &[C], &[A, D], any(1, &[C])),
            (2, true, &[C], &[A, D], any(2, &[A, C, D])),
            (1, true, &[], &[A], any(1, &[A])),
            (1, true, &[C], &[A], any(1, &[C])),
        ] {
            assert_eq!(for_new_primary(num, strict, standbys, others), rule);
        }
    }
}
