//! What a session is promised, and what follows from it: whose mark it shares, what counts for it, and how
//! many of its reads may burden the primary.

use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::mark::{Freshness, Mark, Quorum};
use super::own::{self, Own};
use super::shared_mark::{Refused, SharedMark};
use super::{End, Role, Session};
use crate::backend::{Applied, StartupParameters};
use crate::classify::hint::Hints;
use crate::classify::setting::{self, Change};
use crate::classify::{ClassReason, Kind, Lookup, StatementClass};
use crate::consistency::{Durability, Level, Override, Promise, QuorumRead, Token};
use crate::topology::{Epoch, NodeId, Standing, Topology};
use crate::wal::{Lsn, WalPosition};
use crate::wire::{self, ErrorReport, Severity, TransactionStatus};

/// What a session knows of its own `highwater.*` settings.
pub(super) struct OwnState {
    /// The role that logged in: names of sessions are a user's own.
    user: Arc<str>,
    /// What was said at startup, if anything was.
    said: Option<Box<Override>>,
    /// What holds by the configuration, and what was said at startup.
    base: Promise,
    /// The settings that the promise was last made of.
    seen: Arc<Applied>,
    /// The token that was taken last, and the name of the session that is shared.
    token: Option<Token>,
    name: Option<Box<str>>,
    /// The name that was given at startup: RESET brings it back.
    login_name: Option<Box<str>>,
    /// `name` was taken by a SET that may still be rolled back.
    early: bool,
    /// Said at startup, and not yet taken.
    at_login: Vec<Own>,
    /// The running unit has to do with a token: a sample of the primary was awaited for it.
    asked: bool,
    /// The running unit shows some of them: the backend is given what they are.
    shows: bool,
}

impl OwnState {
    pub(super) fn new(user: Arc<str>, base: Promise, at_login: Vec<Own>) -> OwnState {
        let said = own::said(&at_login);
        OwnState {
            user,
            said: (said != Override::default()).then(|| Box::new(said)),
            base: said.over(base),
            seen: Arc::default(),
            token: None,
            name: None,
            login_name: None,
            early: false,
            at_login,
            asked: false,
            shows: false,
        }
    }

    /// The configuration says something else from now on; [`Session::follow_own`] brings the session up to it.
    pub(super) fn rebase(&mut self, base: Promise) {
        let base = self.said.as_ref().map_or(base, |said| said.over(base));
        if base != self.base {
            self.base = base;
            // As if the settings had changed: what they say is laid over it again.
            self.seen = Arc::new(Applied::default());
        }
    }

    /// The role that logged in.
    pub(super) fn user(&self) -> &str {
        &self.user
    }

    /// What the session is promised at first.
    pub(super) fn promise(&self) -> Promise {
        self.base
    }
}

/// Takes Highwater's own settings out of what a client gave at startup, as parameters of their own and in
/// `options`: they are the session's, and clients that differ only in them share backends. `Err`: one has an invalid value.
pub fn take_own(startup: &mut StartupParameters) -> Result<Vec<Own>, ErrorReport> {
    let mut found = Vec::new();
    let mut failed = None;
    let mut read = |name: &str, value: &str| match Own::read(name, value) {
        None => false,
        Some(Ok(own)) => {
            found.push(own);
            true
        }
        Some(Err(report)) => {
            failed.get_or_insert(report);
            true
        }
    };
    startup.0.retain(|(name, value)| !read(name, value));
    for (name, value) in &mut startup.0 {
        if name == "options" {
            *value = without_own(value, &mut read);
        }
    }
    startup.0.retain(|(name, value)| name != "options" || !value.is_empty());
    match failed {
        Some(report) => Err(report),
        None => Ok(found),
    }
}

/// The words of `options`, as the server splits them (a backslash keeps the next character), without those that
/// `read` has taken: `-c name=value` in one word or two, and `--name=value`. The rest stays as it was written.
fn without_own(options: &str, read: &mut impl FnMut(&str, &str) -> bool) -> String {
    let mut words: Vec<(String, &str)> = Vec::new();
    let mut rest = options;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace());
        if rest.is_empty() {
            break;
        }
        let (mut word, mut end, mut escaped) = (String::new(), rest.len(), false);
        for (at, character) in rest.char_indices() {
            match character {
                '\\' if !escaped => {
                    escaped = true;
                    continue;
                }
                c if c.is_ascii_whitespace() && !escaped => {
                    end = at;
                    break;
                }
                c => word.push(c),
            }
            escaped = false;
        }
        words.push((word, &rest[..end]));
        rest = &rest[end..];
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut at = 0;
    while at < words.len() {
        let (word, raw) = &words[at];
        let next = words.get(at + 1);
        let (setting, used) = match (word.as_str(), next) {
            ("-c", Some((setting, _))) => (Some(setting.as_str()), 2),
            _ => (word.strip_prefix("--").or_else(|| word.strip_prefix("-c")), 1),
        };
        let taken = setting
            .and_then(|setting| setting.split_once('='))
            .is_some_and(|(name, value)| read(&name.replace('-', "_"), value));
        if !taken {
            kept.push(raw);
            kept.extend((used == 2).then(|| words[at + 1].1));
        }
        at += used;
    }
    if kept.len() == words.len() { options.to_owned() } else { kept.join(" ") }
}

impl Session {
    /// What was said at startup. A token is waited for; it may be refused.
    pub(super) async fn take_startup_settings(&mut self) -> Result<(), End> {
        let fatal = |mut report: ErrorReport| {
            report.severity = Severity::Fatal;
            End::fatal(report)
        };
        for own in std::mem::take(&mut self.own.at_login) {
            match own {
                Own::Token(token) => {
                    self.await_primary_sample().await?;
                    let topology = self.shared.topology.load_full();
                    match self.place_token(&token, &topology) {
                        own::Placed::At(lsn) => self.take_token(token, lsn),
                        own::Placed::Refused(report) => return Err(fatal(*report)),
                        own::Placed::Unsampled => return Err(fatal(unsampled())),
                    }
                }
                Own::Session(name) => {
                    self.own.login_name = name.clone();
                    self.take_name(name).map_err(fatal)?;
                }
                Own::Durability(said) => self.take_durability(said, true),
                Own::Level(_) | Own::MaxLag(_) | Own::OnStale(_) | Own::Route(_) | Own::QuorumRead(_) => {}
            }
        }
        self.own.asked = false;
        Ok(())
    }

    /// The text of a statement of the unit that begins: does it show Highwater's own settings, or set a token?
    /// What that needs is waited for here, before anything is sent.
    pub(super) async fn look_for_own(&mut self, text: &[u8], class: StatementClass) -> Result<(), End> {
        let about_settings = class.settings
            || class.kind == Kind::Session
            || class.reason == ClassReason::UnsafeFunction
            || class.reason == ClassReason::Several;
        if !about_settings || !mentions(text, own::PREFIX.as_bytes()) {
            return Ok(());
        }
        self.own.shows = true;
        if mentions(text, b"highwater.token") {
            self.await_primary_sample().await?;
            self.resolve_mark().await?;
        }
        Ok(())
    }

    /// The statement at the start of a unit on a held backend, if it may have to do with Highwater's own settings.
    pub(super) fn first_text(&self) -> Option<(Vec<u8>, StatementClass)> {
        let header = wire::header(&self.client.input).ok()??;
        let body = self.client.input.get(wire::HEADER..header.len)?;
        if !matches!(header.tag, b'Q' | b'P') || !mentions(body, own::PREFIX.as_bytes()) {
            return None;
        }
        let text = if header.tag == b'P' { wire::cstr(body)?.1 } else { body };
        let text = wire::cstr(text)?.0;
        match self.lookup(text, &[]) {
            Lookup::Known(class, _) => Some((text.to_vec(), class)),
            Lookup::Ask(_) => None,
        }
    }

    /// A unit begins: nothing is known of it.
    pub(super) fn forget_own(&mut self) {
        (self.own.asked, self.own.shows) = (false, false);
    }

    /// Waits for a sample of the primary that is sent from now on; not for ever.
    async fn await_primary_sample(&mut self) -> Result<(), End> {
        let until = Instant::now() + own::TOKEN_WAIT;
        let shared = self.shared.clone();
        let Some(primary) = shared.topology.load().primary else { return Ok(()) };
        let before = shared.positions.node(primary).counter();
        loop {
            let changed = pin!(shared.positions.changed_on(self.worker));
            if shared.positions.node(primary).latest().is_some_and(|sample| sample.number > before) {
                self.own.asked = true;
                return Ok(());
            }
            shared.positions.node(primary).want();
            if Instant::now() >= until || !self.wait(changed, until).await? {
                return Ok(());
            }
        }
    }

    /// Waits until all that the session has seen is known as a position; not for ever.
    async fn resolve_mark(&mut self) -> Result<(), End> {
        let until = Instant::now() + own::TOKEN_WAIT;
        let shared = self.shared.clone();
        loop {
            let changed = pin!(shared.positions.changed_on(self.worker));
            let topology = shared.topology.load_full();
            self.bring_mark_forward(&topology);
            if self.mark.is_resolved() {
                return Ok(());
            }
            if self.leave_stalled(&topology) {
                continue;
            }
            if let Some(node) = self.mark.awaits() {
                shared.positions.node(node).want();
            }
            drop(topology);
            if Instant::now() >= until || !self.wait(changed, until).await? {
                return Ok(());
            }
        }
    }

    fn place_token(&self, token: &Token, topology: &Topology) -> own::Placed {
        let sample = topology.primary.and_then(|primary| self.shared.positions.node(primary).latest());
        own::place(token, topology, sample.as_ref(), self.own.asked)
    }

    fn take_token(&mut self, token: Token, lsn: Lsn) {
        self.own.token = Some(token);
        self.mark.raise(lsn);
        if let Some(shared) = &self.shared_mark {
            shared.raise(lsn);
        }
    }

    fn take_name(&mut self, name: Option<Box<str>>) -> Result<(), ErrorReport> {
        if name == self.own.name {
            return Ok(());
        }
        self.own.name = name.clone();
        let Some(name) = name else {
            self.leave_shared_mark();
            return Ok(());
        };
        let user = self.own.user.clone();
        self.join_named(&user, name.as_bytes()).map_err(|refused| {
            self.own.name = None;
            match refused {
                Refused::Full => ErrorReport::error("53400", "too many named sessions")
                    .hint("Raise consistency.named_sessions."),
                Refused::Name => {
                    ErrorReport::error("22023", "invalid value for parameter \"highwater.session\"")
                }
            }
        })
    }

    /// Why a statement that would change settings in this way must not run: a value of Highwater's own is invalid.
    pub(super) fn refused_own<'a>(
        &mut self,
        changes: impl IntoIterator<Item = &'a Change>,
    ) -> Option<ErrorReport> {
        for change in changes {
            let (name, sql, local) = match change {
                Change::Set { name, sql } => (name, sql, false),
                Change::LocalOwn { name, sql } => (name, sql, true),
                _ => continue,
            };
            if !name.starts_with(own::PREFIX) {
                continue;
            }
            let value = setting::value_of(sql).unwrap_or_default();
            match Own::read(name, &value) {
                None
                | Some(Ok(
                    Own::Level(_) | Own::MaxLag(_) | Own::OnStale(_) | Own::Route(_) | Own::QuorumRead(_),
                )) => {}
                Some(Err(report)) => return Some(report),
                Some(Ok(Own::Durability(said))) => self.sets_durability(said),
                Some(Ok(Own::Session(_) | Own::Token(_))) if local => {}
                Some(Ok(Own::Session(name))) => {
                    // Joined early: if the SET is rolled back, it is left when the transaction is over.
                    self.own.early = true;
                    if let Err(report) = self.take_name(name) {
                        return Some(report);
                    }
                }
                Some(Ok(Own::Token(token))) => {
                    let topology = self.shared.topology.load_full();
                    match self.place_token(&token, &topology) {
                        own::Placed::At(_) => {}
                        own::Placed::Refused(report) => return Some(*report),
                        own::Placed::Unsampled => return Some(unsampled()),
                    }
                }
            }
        }
        None
    }

    /// Follows the session's settings, if they have changed.
    pub(super) fn follow_own(&mut self) {
        let early = self.status == TransactionStatus::Idle && std::mem::take(&mut self.own.early);
        if !early && Arc::ptr_eq(self.settings.wanted(), &self.own.seen) {
            return;
        }
        self.own.seen = self.settings.wanted().clone();
        let mut said = Vec::new();
        let (mut name, mut token, mut durability) = (None, None, None);
        for entry in self.own.seen.entries() {
            let value = entry.sql.as_deref().and_then(setting::value_of);
            match value.and_then(|value| Own::read(&entry.name, &value)) {
                Some(Ok(Own::Session(of))) => name = Some(of),
                Some(Ok(Own::Token(of))) => token = Some(of),
                Some(Ok(Own::Durability(of))) => durability = of,
                Some(Ok(own)) => said.push(own),
                Some(Err(_)) | None => {}
            }
        }
        self.take_durability(durability, false);
        let before = self.promise.level;
        self.promise = own::said(&said).over(self.own.base);
        if self.promise.level != before {
            self.own.name = None;
            self.leave_shared_mark();
        }
        // Refused when it was set, if at all.
        let _ = self.take_name(name.unwrap_or_else(|| self.own.login_name.clone()));
        if let Some(token) = token.filter(|token| self.own.token != Some(*token)) {
            let topology = self.shared.topology.load_full();
            if let own::Placed::At(lsn) = self.place_token(&token, &topology) {
                self.take_token(token, lsn);
            }
        }
    }

    /// A statement of the unit that begins says in its comments what it asks for. `Some`: why it does not run.
    pub(super) fn take_hints(&mut self, text: &[u8], hints: Hints) -> Option<ErrorReport> {
        if hints.invalid {
            return own::refused_hint(text);
        }
        if hints.durability.is_some() {
            self.hints_durability();
        }
        let asked = hints.says().over(self.promise);
        self.asked_for = if self.hinted { self.asked_for.and(asked) } else { asked };
        self.hinted = true;
        None
    }

    /// What the backend is to be given so that the running unit can show Highwater's own settings; `None`:
    /// it does not.
    pub(super) fn own_to_show(&self) -> Option<String> {
        if !self.own.shows {
            return None;
        }
        let topology = self.shared.topology.load();
        let token = match (topology.system_identifier, topology.timeline) {
            (Some(system_identifier), Some(timeline)) if self.mark.is_resolved() => {
                let position = WalPosition { timeline, lsn: self.mark.position() };
                Token { system_identifier, position }.to_string()
            }
            _ => String::new(),
        };
        let max_lag = self.promise.max_lag.map(|limit| limit.to_string()).unwrap_or_default();
        let values = [
            ("highwater.consistency", self.promise.level.word()),
            ("highwater.durability", self.durability().map(Durability::word).unwrap_or_default()),
            ("highwater.max_lag", &max_lag),
            ("highwater.on_stale", self.promise.on_stale.word()),
            ("highwater.quorum_read", self.promise.quorum_read.word()),
            ("highwater.route", self.promise.route.word()),
            ("highwater.session", self.own.name.as_deref().unwrap_or_default()),
            ("highwater.token", &token),
        ];
        let calls: Vec<String> = values
            .iter()
            .filter_map(|(name, value)| {
                Some(format!("SET {name} TO {}", setting::literal(value.as_bytes(), true)?))
            })
            .collect();
        // No SELECT: in a transaction it would take the snapshot before the client's first statement does.
        Some(calls.join("; "))
    }

    /// Takes the mark that the session's level asks for.
    pub(super) fn share_mark(&mut self) {
        if self.promise.level == Level::Global {
            let topology = self.shared.topology.load_full();
            let positions = self.shared.positions.clone();
            let global = self.shared.global_mark.join(|| Mark::new(&*positions, &topology));
            self.bring_mark_forward(&topology);
            global.join(&self.mark, &*positions, &topology);
            self.shared_mark = Some(global);
            self.take_shared_mark(&topology);
        }
    }

    /// Shares the mark of all connections of this user that use `name`.
    fn join_named(&mut self, user: &Arc<str>, name: &[u8]) -> Result<(), Refused> {
        let topology = self.shared.topology.load_full();
        let positions = self.shared.positions.clone();
        let mut names = self.shared.named_marks.lock().unwrap_or_else(PoisonError::into_inner);
        let named = names.join(user, name, Instant::now(), || Mark::new(&*positions, &topology))?;
        drop(names);
        self.bring_mark_forward(&topology);
        self.tell_of(named.survival_untold(&*positions, &topology));
        self.tells = topology.epoch;
        named.join(&self.mark, &*positions, &topology);
        self.shared_mark = Some(named);
        self.take_shared_mark(&topology);
        Ok(())
    }

    /// A statement has arrived: what it must be shown is what the shared mark stands for now, if there is one. What others are
    /// shown while it waits need not be there; were it asked for, who waits among many that read would wait for ever.
    pub(super) fn take_shared_mark(&mut self, topology: &Topology) {
        if let Some(shared) = &self.shared_mark {
            self.join_global(shared, topology);
            let theirs = shared.bring_forward(&*self.shared.positions, topology);
            // Others may have followed into an epoch of which this session has not been told yet.
            if theirs.epoch() == self.mark.epoch() {
                self.mark = theirs;
            }
        }
    }

    /// The client has been sent all that it asked for, and goes on: it has heard what it was told of changes of the primary,
    /// unless that is an error that is still to come. A goodbye says nothing of the kind.
    #[cold]
    pub(super) fn has_heard(&mut self) {
        if self.lost.is_none() && self.client.input.first() != Some(&b'X') {
            let told = std::mem::replace(&mut self.tells, Epoch(0));
            if let Some(shared) = &self.shared_mark {
                shared.heard(told);
            }
        }
    }

    /// At level `global` a named session's mark has all that the mark of all has.
    pub(super) fn join_global(&self, named: &Arc<SharedMark>, topology: &Topology) {
        if self.promise.level == Level::Global
            && let Some(global) = self.shared.global_mark.current()
            && !Arc::ptr_eq(&global, named)
        {
            let positions = &*self.shared.positions;
            named.join(&global.bring_forward(positions, topology), positions, topology);
        }
    }

    /// From now on the mark is the session's own, at or past the one it shared.
    fn leave_shared_mark(&mut self) {
        self.shared_mark = None;
        self.tells = Epoch(0);
        self.share_mark();
    }

    /// Sets the notes on `node` that concern others, too. Whether the session's own mark is among them.
    pub(super) fn note_for_others(&mut self, node: NodeId, epoch: Epoch, writes: bool) -> bool {
        let global = self.shared.global_mark.current();
        // A named session at level `global` shares two.
        let concerns_all = writes || self.promise.level == Level::Global;
        let beside = global.filter(|global| {
            concerns_all && self.shared_mark.as_ref().is_none_or(|own| !Arc::ptr_eq(own, global))
        });
        if self.shared_mark.is_none() && beside.is_none() {
            return false;
        }
        let topology = self.shared.topology.load_full();
        let positions = self.shared.positions.clone();
        let note = positions.note(node, epoch);
        let noted_beside = self.beside(epoch);
        for mark in beside.iter().chain(&self.shared_mark) {
            match self.role {
                Role::Primary => mark.primary_showed(note, &*positions, &topology),
                Role::Replica | Role::Standby => {
                    mark.replica_showed(note, self.incarnation, noted_beside, &*positions, &topology)
                }
            }
        }
        let Some(own) = &self.shared_mark else { return false };
        let theirs = own.bring_forward(&*positions, &topology);
        // Else there is an epoch of which this session has not been told yet: it follows before its next statement.
        if theirs.epoch() == self.mark.epoch() {
            self.mark = theirs;
        }
        true
    }

    /// The primary's sample counter, for a note on a replica that is taken now.
    pub(super) fn beside(&self, epoch: Epoch) -> Option<u64> {
        let topology = self.shared.topology.load();
        let primary = topology.primary.filter(|_| topology.epoch == epoch)?;
        Some(self.shared.positions.node(primary).counter())
    }

    /// Bytes of an answer are about to go to the client, who may tell others of them: marks that others share
    /// have their note before that.
    pub(super) fn note_before_bytes(&mut self, node: NodeId, epoch: Epoch, writes: bool) {
        if self.shared_mark.is_none() && !writes {
            return;
        }
        if writes || self.level().notes_reads() {
            self.note_for_others(node, epoch, writes);
        }
    }

    /// What the next statement must be shown, if the level is `strong`.
    pub(super) fn ask_freshness(&mut self) {
        (self.freshness, self.quorum) = (None, None);
        if self.asked_for.level != Level::Strong {
            return;
        }
        let topology = self.shared.topology.load();
        let positions = &*self.shared.positions;
        self.freshness = Freshness::of_now(positions, &topology);
        if let Some(quorum) = &self.config.consistency.quorum_reads
            && self.asks_a_quorum(&topology)
        {
            let replicas = quorum.replicas.iter().copied().map(NodeId);
            self.quorum = Quorum::of_now(positions, &topology, replicas, quorum.applied_by).map(Box::new);
        }
    }

    /// Whether replicas are to say what a strong read must show.
    fn asks_a_quorum(&self, topology: &Topology) -> bool {
        match self.asked_for.quorum_read {
            QuorumRead::On => true,
            QuorumRead::Off => false,
            QuorumRead::Auto => !topology
                .primary
                .is_some_and(|node| topology.node(node).standing == Standing::Primary { reachable: true }),
        }
    }
}

/// What a backend was given: `applied`, and what it was given `before` so that Highwater's own settings could be shown.
pub(super) fn with_shown(applied: Arc<Applied>, before: &Applied) -> Arc<Applied> {
    let is_shown = |name: &&str| before.entry(name).is_some_and(|entry| entry.sql.as_deref() == Some(""));
    let mut shown = own::NAMES.into_iter().filter(is_shown).peekable();
    let durable = super::durability::is_ours(before);
    if shown.peek().is_none() && !durable {
        return applied;
    }
    let mut applied = Applied::clone(&applied);
    if durable {
        // Whether that is still so: whoever comes next is given it anew, or has it reset.
        applied.put(super::durability::SETTING, Some(Arc::from("")));
    }
    shown.for_each(|name| applied.put(name, Some(Arc::from(""))));
    Arc::new(applied)
}

/// Whether a text has these letters, all small or all capital.
fn mentions(text: &[u8], what: &[u8]) -> bool {
    memchr::memmem::find(text, what).is_some()
        || memchr::memmem::find(text, &what.to_ascii_uppercase()).is_some()
}

fn unsampled() -> ErrorReport {
    ErrorReport::error("57P03", "the primary's position is not known now")
        .detail("A token is held against it before it is taken.")
}

/// How many reads went to the primary because no replica was fresh enough, out of how many: shared by all
/// sessions, counted in windows so that the past fades.
#[derive(Debug, Default)]
pub struct PrimaryReads {
    /// All reads (high half) and those on the primary (low half) of this window.
    window: AtomicU64,
}

/// Reads after which both counts are halved.
const WINDOW: u32 = 4096;
/// Reads below which a share says nothing.
const LEAST: u32 = 64;

impl PrimaryReads {
    /// A read was placed; `stale`: on the primary, because no replica was fresh enough.
    pub fn count(&self, stale: bool) {
        let step = |packed: u64| {
            let (all, stale) = ((packed >> 32) + 1, (packed & 0xFFFF_FFFF) + u64::from(stale));
            if all >= u64::from(WINDOW) { ((all / 2) << 32) | (stale / 2) } else { (all << 32) | stale }
        };
        // Ordering among the counts of one word is all that is needed.
        let _ = self.window.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |packed| Some(step(packed)));
    }

    /// Whether one more stale read keeps within `cap` percent of all.
    pub fn allows(&self, cap: u32) -> bool {
        let packed = self.window.load(Ordering::Relaxed);
        let (all, stale) = (packed >> 32, packed & 0xFFFF_FFFF);
        if cap >= 100 {
            return true;
        }
        // With few reads yet, the share of one would be much: a few are let through, none at a cap of 0.
        let of = all.max(u64::from(LEAST));
        (stale + 1) * 100 <= of * u64::from(cap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_settings_are_taken_out_of_what_a_client_starts_with() {
        let check = |options: &str, rest: &str, expected: &[Own]| {
            let mut startup = StartupParameters(vec![("options".to_owned(), options.to_owned())]);
            assert_eq!(take_own(&mut startup).unwrap(), expected, "{options}");
            let left: Vec<&str> = startup.0.iter().map(|(_, value)| value.as_str()).collect();
            assert_eq!(left, if rest.is_empty() { vec![] } else { vec![rest] }, "{options}");
        };
        let strong = Own::Level(Level::Strong);
        check("-c highwater.consistency=strong", "", std::slice::from_ref(&strong));
        check("-chighwater.consistency=strong -c a=b", "-c a=b", std::slice::from_ref(&strong));
        check(
            "-c a=b\\ c --highwater.consistency=strong  -d 1",
            "-c a=b\\ c -d 1",
            std::slice::from_ref(&strong),
        );
        check("-c search_path=a,b  --x-y=1", "-c search_path=a,b  --x-y=1", &[]);
        check("--highwater.max-lag=5s", "", &[Own::MaxLag(crate::consistency::LagLimit::parse("5s"))]);
        check("-c highwater.session=a\\ b", "", &[Own::Session(Some("a b".into()))]);
        let mut startup = StartupParameters(vec![
            ("highwater.consistency".to_owned(), "strong".to_owned()),
            ("application_name".to_owned(), "x".to_owned()),
        ]);
        assert_eq!(take_own(&mut startup).unwrap(), [strong]);
        assert_eq!(startup.0.len(), 1);
        let mut startup = StartupParameters(vec![("highwater.consistency".to_owned(), "best".to_owned())]);
        assert_eq!(take_own(&mut startup).unwrap_err().sqlstate, "22023");
    }

    #[test]
    fn the_share_of_stale_reads_is_kept_below_the_cap() {
        for cap in [0, 1, 10, 50, 99, 100] {
            let reads = PrimaryReads::default();
            let (mut all, mut stale) = (0u32, 0u32);
            for _ in 0..50_000 {
                let to_primary = reads.allows(cap);
                reads.count(to_primary);
                all += 1;
                stale += u32::from(to_primary);
            }
            assert!(stale * 100 <= all * cap + 100 * LEAST, "{cap}: {stale} of {all}");
            assert!(stale * 110 >= all * cap.saturating_sub(2), "{cap}: {stale} of {all}");
        }
    }
}
