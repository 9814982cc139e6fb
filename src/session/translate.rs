//! From the client to the node: each message of a unit as the backend is to see it.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::{Buf, BufMut, BytesMut};

use super::exchange::{
    Asked, Exchange, Expect, HIGH_WATER, Intake, MOST_AWAITED, NameOnServer, Outcome, Step,
};
use super::messages::{self, Parse, SMALL_MESSAGE, ShapeReader, Target};
use super::prepared::{self, Found, SqlCommand, Statement};
use super::transaction::Apart;
use super::{End, Role};
use crate::backend::{Dirt, Prepared, SharedName};
use crate::classify::setting::{self, Change};
use crate::classify::{self, Kind, Leaves, Lexing, Lookup, PinReason, StatementClass, TransactionCommand};
use crate::wire::{self, ErrorReport, HEADER, TransactionStatus};

const SQL_PREPARE: Leaves = Leaves::pin(PinReason::SqlPrepare);

/// A portal that no client has: an Execute of it fails.
const NO_PORTAL: &[u8] = b"__hw_refused";

/// A statement, and a portal, that no client has: by it a client's PREPARE is repeated.
const NO_STATEMENT: &[u8] = b"__hw_prepare";

/// What becomes of unnamed Parses where they may be shared, as the metric labels it.
pub const UNNAMED_LABELS: [&str; 3] = [UNNAMED_SHARED, UNNAMED_PREPARED, UNNAMED_PASSED];

/// The backend has it under its shared name.
const UNNAMED_SHARED: &str = "shared";
/// The backend is given it under its shared name.
const UNNAMED_PREPARED: &str = "prepared";
/// It goes on as it is.
const UNNAMED_PASSED: &str = "passed";

/// What a statement's name is wanted for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Run,
    Describe,
}

/// What became of a client's name for a statement.
enum Resolved {
    /// The backend knows it under this name, or will have said that it knows none.
    Name(Vec<u8>),
    /// It knows it under the name that all sessions share.
    Shared(SharedName),
    /// The message does not go on.
    Stopped(Step),
}

impl Exchange<'_> {
    /// Takes what the client has sent and puts it into the backend's output, as far as both allow.
    pub(super) fn translate(&mut self) -> Result<Step, End> {
        let mut moved = false;
        // Answers of ours need no backend: whoever asks for them and does not read is stopped, too.
        while self.backend.output.len() < HIGH_WATER && self.session.client.output.len() < HIGH_WATER {
            if self.unit.client_rest + self.unit.client_drop > 0 {
                if !self.take_rest() {
                    break;
                }
                moved = true;
                continue;
            }
            if self.unit.intake == Intake::Closed || self.unit.discard.is_some() {
                break;
            }
            self.unit.awaits_all &= !self.unit.expects.is_empty();
            if self.unit.awaits_all || self.unit.awaits_shape || self.unit.ahead > 0 && !self.may_follow() {
                break;
            }
            if self.unit.expects.len() >= MOST_AWAITED {
                moved |= self.urge();
                break;
            }
            match self.translate_message()? {
                Step::On => moved = true,
                Step::Wait => break,
                over => return Ok(over),
            }
        }
        Ok(if moved { Step::On } else { Step::Wait })
    }

    /// Whether the next message may be sent behind a Query of ours that is not answered yet. Should that
    /// fail, the message meets an aborted transaction (on a replica its answer is thrown away): harmless
    /// unless it would end that transaction and go on.
    fn may_follow(&self) -> bool {
        if self.unit.refused.is_some() {
            // It has failed: what has not been sent yet need not be, unless it ends what was.
            return self.unit.begun;
        }
        if self.session.role == Role::Replica {
            return self.unit.vetted > 0;
        }
        let input = &self.session.client.input[self.unit.taken..];
        let Ok(Some(header)) = wire::header(input) else { return true };
        if self.session.lexing == Lexing::Unsafe {
            return false;
        }
        let Some(body) = input.get(HEADER..header.len) else { return false };
        match header.tag {
            b'Q' => wire::cstr(body).is_some_and(|(text, _)| classify::stays_in_transaction(text)),
            b'P' => Parse::read(body).is_some_and(|parse| classify::stays_in_transaction(parse.text)),
            b'B' => messages::bind_names(body).is_some_and(|(_, name, _)| {
                match self.session.statements.find(name) {
                    Found::Statement(statement) => classify::stays_in_transaction(statement.text()),
                    Found::OnBackend => false,
                    Found::Nothing => true,
                }
            }),
            _ => true,
        }
    }

    /// Passes on (or drops) what has come of a message that is longer. Whether there was something.
    fn take_rest(&mut self) -> bool {
        let there = self.there();
        let n = there.min(self.unit.client_rest + self.unit.client_drop);
        if self.unit.client_rest > 0 {
            let from = self.unit.taken;
            self.backend.output.put_slice(&self.session.client.input[from..from + n]);
            self.unit.client_rest -= n;
        } else {
            self.unit.client_drop -= n;
        }
        self.take(n);
        n > 0
    }

    /// The server may keep its answers until it is asked, while the client sends more than we are
    /// ready to await. Whether it had to be asked.
    fn urge(&mut self) -> bool {
        if self.unit.urged > 0 {
            return false;
        }
        self.unit.urged = self.unit.expects.len();
        self.backend.output.put_slice(&[b'H', 0, 0, 0, 4]);
        true
    }

    /// Bytes of the client's that are not taken yet.
    fn there(&self) -> usize {
        self.session.client.input.len() - self.unit.taken
    }

    /// The body of the message at the start, which must be there whole.
    fn peek(&self, len: usize) -> &[u8] {
        &self.session.client.input[self.unit.taken + HEADER..self.unit.taken + len]
    }

    /// A copy of it.
    fn body(&self, len: usize) -> Vec<u8> {
        self.peek(len).to_vec()
    }

    /// `n` bytes of the client's input are used.
    fn take(&mut self, n: usize) {
        self.unit.begun = true;
        self.unit.vetted = self.unit.vetted.saturating_sub(n);
        if self.unit.redoable {
            self.unit.taken += n;
        } else {
            self.session.client.input.advance(n);
        }
    }

    /// From here on the unit cannot be run again.
    pub(super) fn commit(&mut self) {
        if self.unit.redoable {
            self.unit.redoable = false;
            self.session.client.input.advance(self.unit.taken);
            self.unit.taken = 0;
            self.session.statements.commit();
        }
    }

    /// Nothing can be done before the client has sent `len` bytes.
    fn wait_for(&mut self, len: usize) -> Result<Step, End> {
        self.unit.wants = len;
        Ok(Step::Wait)
    }

    /// Of a message of `len` bytes the names at its start have not come: they are expected within `first`, else within
    /// the whole of it, and that within what may be held.
    fn wait_for_names(&mut self, len: usize, first: usize) -> Result<Step, End> {
        if self.there() <= first {
            return self.wait_for(len.min(first + SMALL_MESSAGE));
        }
        if len > self.session.config.limits.unit_hold {
            return Err(End::protocol("invalid message format"));
        }
        self.wait_for(len)
    }

    fn translate_message(&mut self) -> Result<Step, End> {
        let input = &self.session.client.input[self.unit.taken..];
        let Some(header) = wire::header(input).map_err(End::length)? else { return Ok(Step::Wait) };
        let whole = input.len() >= header.len;
        if self.unit.vetted == 0 {
            // What was not looked at before it was routed is not kept to be run again.
            self.commit();
        }
        if messages::is_too_long(header) {
            return Err(End::protocol("invalid message length"));
        }
        if self.unit.intake == Intake::CopyIn {
            return self.translate_copy(header, whole);
        }
        if self.unit.skip_to_sync && header.tag != b'S' && header.tag != b'X' {
            return self.drop_message(header.len);
        }
        if self.unit.vetted == 0
            && self.session.is_apart()
            && let Some(stopped) = self.vet_rest()?
        {
            return Ok(stopped);
        }
        if !self.unit.begun {
            self.claim_names(matches!(header.tag, b'Q' | b'F'));
        }
        match header.tag {
            b'Q' => self.translate_query(header.len),
            b'F' => self.translate_function_call(header.len),
            b'P' => self.translate_parse(header.len),
            b'B' => self.translate_bind(header.len),
            b'D' | b'C' | b'E' | b'S' | b'H' if !whole => self.wait_for(header.len),
            b'D' => self.translate_describe(header.len),
            b'C' => self.translate_close(header.len),
            b'E' => self.translate_execute(header.len),
            b'S' => {
                self.pass(header.len);
                self.unit.expects.push_back(Expect::Sync);
                self.unit.intake = Intake::Closed;
                Ok(Step::On)
            }
            b'H' if header.len > HEADER => self.translate_malformed(header.len),
            b'H' => {
                self.pass(header.len);
                Ok(Step::On)
            }
            b'c' | b'f' if !whole => self.wait_for(header.len),
            // Of a COPY whose beginning the client did not wait for; or left over from one that has failed,
            // which the server ignores.
            b'd' => {
                self.pass(header.len);
                Ok(Step::On)
            }
            b'c' | b'f' => {
                self.pass(header.len);
                self.unit.expects.push_back(Expect::CopyEnd);
                self.answer_ourselves();
                Ok(Step::On)
            }
            b'X' => Err(End::ClientGone),
            tag => Err(End::protocol(format!("invalid frontend message type {tag}"))),
        }
    }

    /// Passes the message (or what of it is there) on as it is.
    fn pass(&mut self, len: usize) {
        self.unit.client_rest = len;
        self.take_rest();
    }

    fn drop_message(&mut self, len: usize) -> Result<Step, End> {
        self.unit.client_drop = len;
        self.take_rest();
        Ok(Step::On)
    }

    /// A message of the extended protocol whose body nobody can read. The server reads bodies as strictly, and before it
    /// does anything: it fails, and skips all up to Sync.
    fn translate_malformed(&mut self, len: usize) -> Result<Step, End> {
        self.pass(len);
        self.unit.expects.push_back(Expect::Malformed);
        self.unit.skip_to_sync = true;
        Ok(Step::On)
    }

    fn translate_copy(&mut self, header: wire::Header, whole: bool) -> Result<Step, End> {
        match header.tag {
            b'd' => self.pass(header.len),
            b'X' => return Err(End::ClientGone),
            _ if !whole && header.len <= SMALL_MESSAGE => return self.wait_for(header.len),
            b'c' | b'f' => {
                self.pass(header.len);
                // A Query's COPY ends with its answer; in the extended protocol a Sync is still to come.
                let simple = matches!(self.unit.expects.front(), Some(Expect::Query));
                self.unit.intake = if simple { Intake::Closed } else { Intake::Open };
            }
            // The server ignores these while it copies. Should it have failed meanwhile, it would answer
            // the Sync; but the client has to send another one after its CopyDone anyway.
            b'S' | b'H' => return self.drop_message(header.len),
            // The server ends the connection: whatever this is, it cannot be told from data any more.
            _ => self.pass(header.len),
        }
        Ok(Step::On)
    }

    fn translate_query(&mut self, len: usize) -> Result<Step, End> {
        if self.there() >= len && messages::query(self.peek(len)).is_none() {
            self.pass(len);
            // It fails before it is one: the unnamed statement outlives it, as it does a function call.
            self.unit.expects.push_back(Expect::FunctionCall);
            self.unit.intake = Intake::Closed;
            return Ok(Step::On);
        }
        // The first message of a unit was looked at when the unit was routed.
        if self.unit.begun
            && let Some(stopped) = self.count_query(len)?
        {
            return Ok(stopped);
        }
        let bad_hint = self.session.bad_hint.take().map(|report| *report);
        if let Some(report) = bad_hint
            .or_else(|| self.session.refused_own(self.unit.settings.iter().flat_map(|(_, changes)| changes)))
        {
            self.unit.settings.clear();
            self.own_error(report);
            // A Query ends its unit, failed or not.
            self.drop_message(len)?;
            self.backend.output.put_slice(&[b'S', 0, 0, 0, 4]);
            self.unit.expects.push_back(Expect::Sync);
            self.unit.intake = Intake::Closed;
            return Ok(Step::On);
        }
        if !self.unit.begun
            && let Some(stopped) = self.give_ahead(len)?
        {
            return Ok(stopped);
        }
        self.backend.unnamed = None;
        self.backend.dirt = self.backend.dirt.max(dirt_of(self.unit.leaves));
        let earlier = self.unit.expects.len();
        // Behind other messages `count_query` has seen to that: a Sync here would end what the client has not ended.
        if !self.unit.begun {
            if self.there() >= len && self.may_name_statements(self.unit.leaves, self.peek(len)) {
                self.unit.leave(SQL_PREPARE);
            }
            if self.unit.leaves.has(SQL_PREPARE) {
                let text = (self.there() >= len).then(|| self.body(len));
                let text = text.as_deref().map(|body| body.strip_suffix(b"\0").unwrap_or_default());
                self.materialize(SQL_PREPARE, text);
            }
            self.give_what_may_be_named();
        }
        if self.unit.expects.len() > earlier {
            // An error in what was put in must not take the Query with it.
            self.inject_sync();
        }
        self.pass(len);
        self.unit.expects.push_back(Expect::Query);
        self.unit.intake = Intake::Closed;
        Ok(Step::On)
    }

    /// What a Query that is about one name needs the backend to know. `Some`: the Query waits, or has failed.
    fn give_ahead(&mut self, len: usize) -> Result<Option<Step>, End> {
        let Some(command) = &self.session.sql else { return Ok(None) };
        let name = command.name().to_vec();
        let executes = matches!(command, SqlCommand::Execute(_));
        let deallocates = matches!(command, SqlCommand::Deallocate(_));
        if let Found::Statement(statement) = self.session.statements.find(&name)
            && !self.has_failed()
        {
            if executes && statement.has_changed() {
                self.own_error(changed_result_type());
                self.drop_message(len)?;
                self.backend.output.put_slice(&[b'S', 0, 0, 0, 4]);
                self.unit.expects.push_back(Expect::Sync);
                self.unit.intake = Intake::Closed;
                return Ok(Some(Step::On));
            }
            if !std::mem::replace(&mut self.unit.given, true) && !self.backend.own_names.contains(&name) {
                if deallocates {
                    self.give_nothing(&name);
                } else {
                    self.give(&name, &statement);
                }
                // An error in it must not take the Query with it.
                self.inject_sync();
            }
        }
        Ok(self.unit.awaits_shape.then_some(Step::Wait))
    }

    fn inject_sync(&mut self) {
        self.backend.output.put_slice(&[b'S', 0, 0, 0, 4]);
        self.unit.expects.push_back(Expect::InjectedSync);
    }

    /// The backend may have statements under names of another session, or of this one when they stood for
    /// something else: they are closed in the write that carries the unit.
    fn claim_names(&mut self, ahead_of_query: bool) {
        let version = self.session.statements.version();
        if self.backend.names_of == version {
            return;
        }
        self.backend.names_of = version;
        // While it is pinned, a session's backend has followed it.
        if self.session.uses_own_names() || self.backend.own_names.is_empty() {
            return;
        }
        for name in std::mem::take(&mut self.backend.own_names) {
            put_target(&mut self.backend.output, b'C', &name);
            self.unit.expects.push_back(Expect::InjectedClose(NameOnServer::Own(name), Prepared::default()));
        }
        if ahead_of_query {
            self.inject_sync();
        }
    }

    /// A Query within an open unit: what it does is counted in, and on a replica it must be a read.
    fn count_query(&mut self, len: usize) -> Result<Option<Step>, End> {
        if self.there() < len && len <= self.session.config.limits.unit_hold {
            return self.wait_for(len).map(Some);
        }
        let class = (self.there() >= len).then(|| self.body(len)).map(|body| {
            let text = body.strip_suffix(b"\0").unwrap_or_default();
            self.session.lookup(text, &[])
        });
        let is_read = matches!(class, Some(Lookup::Known(class, _)) if is_read(class));
        if let Some(stopped) = self.refuse_on_replica(!is_read) {
            if let Step::On = stopped {
                // A Query ends its unit, failed or not.
                self.drop_message(len)?;
                self.backend.output.put_slice(&[b'S', 0, 0, 0, 4]);
                self.unit.expects.push_back(Expect::Sync);
                self.unit.intake = Intake::Closed;
            }
            return Ok(Some(stopped));
        }
        match class {
            Some(Lookup::Known(class, _)) => {
                if class.settings {
                    let body = self.body(len);
                    let text = body.strip_suffix(b"\0").unwrap_or_default();
                    self.unit.count_settings(&setting::effects(text, self.session.lexing));
                }
                let body = self.body(len);
                let text = body.strip_suffix(b"\0").unwrap_or_default();
                self.unit.may_commit |= class.may_commit(text);
                self.unit.count_code(class.leaves, Some(text));
                self.count_in(class, text);
                if self.may_name_statements(class.leaves, text) {
                    self.leave(SQL_PREPARE, Some(text));
                }
            }
            // Only what may be a read is worth a second opinion, and a read leaves nothing.
            Some(Lookup::Ask(_)) => self.unit.writes = true,
            None => {
                self.unit.writes = true;
                self.unit.may_commit = true;
                self.unit.ddl = true;
                self.leave(Leaves::UNPROVEN, None);
            }
        }
        Ok(None)
    }

    fn translate_function_call(&mut self, len: usize) -> Result<Step, End> {
        if let Some(refused) = self.refuse_on_replica(true) {
            if let Step::On = refused {
                self.drop_message(len)?;
                self.backend.output.put_slice(&[b'S', 0, 0, 0, 4]);
                self.unit.expects.push_back(Expect::Sync);
                self.unit.intake = Intake::Closed;
            }
            return Ok(refused);
        }
        self.leave(Leaves::UNPROVEN, None);
        self.unit.writes = true;
        self.pass(len);
        self.unit.expects.push_back(Expect::FunctionCall);
        self.unit.intake = Intake::Closed;
        Ok(Step::On)
    }

    /// Counts in what a statement may leave on the backend; `text` is the statement's, if it is there whole.
    fn leave(&mut self, leaves: Leaves, text: Option<&[u8]>) {
        if leaves == Leaves::NOTHING {
            return;
        }
        self.unit.leave(leaves);
        self.backend.dirt = self.backend.dirt.max(dirt_of(leaves));
        self.materialize(leaves, text);
    }

    /// Counts in what a statement of the unit does, as it is bound.
    fn count_in(&mut self, class: StatementClass, text: &[u8]) {
        self.unit.ddl |= class.kind == Kind::Ddl;
        let taken = [Leaves::DISCARDS_ALL, Leaves::DEALLOCATES_ALL];
        self.unit.clears_names |= taken.into_iter().any(|names| class.leaves.has(names));
        self.unit.writes |= !is_read(class);
        // Behind the end of the transaction it is one of its own, which the Sync commits.
        self.unit.may_commit |= self.unit.leaves_transaction && !is_read(class);
        self.leave(class.leaves, Some(text));
    }

    /// A unit that began on a replica, with reads, meets what is not a read. If all so far has been
    /// answered and nothing was bound, it moves; else it fails: it must not run on the replica.
    fn refuse_on_replica(&mut self, not_a_read: bool) -> Option<Step> {
        if !not_a_read || self.session.role != Role::Replica || self.unit.vetted > 0 {
            return None;
        }
        if !self.unit.bound && self.unit.expects.is_empty() {
            return Some(Step::Over(Outcome::Move));
        }
        let report = ErrorReport::error(
            "0A000",
            "cannot run a statement that is not a read in a pipeline whose reads already run on a replica",
        )
        .hint("Send Sync before it, or start the pipeline with it.");
        self.own_error(report);
        Some(Step::On)
    }

    /// An error of ours in its turn among the answers; what follows up to Sync is skipped. The server
    /// is made to fail, too: it must not commit at the Sync what it has done in this unit before.
    fn own_error(&mut self, report: ErrorReport) {
        put_length(&mut self.backend.output, b'E', NO_PORTAL.len() + 1 + 4);
        put_cstr(&mut self.backend.output, NO_PORTAL);
        self.backend.output.put_u32(0);
        self.unit.expects.push_back(Expect::OwnError(Box::new(report)));
        self.unit.skip_to_sync = true;
    }

    /// A unit that runs apart from its transaction goes on after a Flush: what follows, up to the next, is looked
    /// at as a whole before any of it is sent.
    fn vet_rest(&mut self) -> Result<Option<Step>, End> {
        match self.session.runs_apart(&self.session.client.input[self.unit.taken..], true) {
            Apart::Yes(len) => {
                self.unit.vetted = len;
                Ok(None)
            }
            Apart::Incomplete => self.wait_for(self.there() + 1).map(Some),
            // What was asked with the Flush is answered soon: then the rest moves.
            Apart::No if !self.unit.bound && !self.unit.expects.is_empty() => Ok(Some(Step::Wait)),
            Apart::No => Ok(self.refuse_on_replica(true)),
        }
    }

    fn translate_parse(&mut self, len: usize) -> Result<Step, End> {
        if len > self.session.config.limits.statement_text {
            return self.translate_long_parse(len);
        }
        if self.there() < len {
            return self.wait_for(len);
        }
        let body = self.body(len);
        let Some(parse) = Parse::read(&body) else { return self.translate_malformed(len) };
        let name = prepared::key(parse.name);
        let settings = self.session.settings.parse_fingerprint();
        let statement = match self.session.judged.take() {
            Some(judged) if judged.is_made_by(&parse, settings) => judged,
            _ => self.session.shared.names.statement(&parse, settings),
        };
        // Units are classified before they are placed; what is parsed later in an open unit is
        // classified here, without asking for a second opinion: unknown is not a read.
        let class = self.session.known_class(&statement);
        let off = self.session.is_kept_off_by_clock(self.backend.node, statement.text());
        if let Some(refused) = self.refuse_on_replica(off || !class.is_some_and(is_read)) {
            return Ok(refused);
        }
        if class.is_none_or(|class| class.hints.invalid)
            && let Some(report) = super::own::refused_hint(statement.text())
        {
            self.own_error(report);
            return self.drop_message(len);
        }
        if let Some(class) = class {
            self.prepare_for(class.leaves, statement.text());
        }
        if name.is_empty() {
            if self.shares_unnamed(&statement, class) {
                self.prepare(b"", statement, class, len);
                return Ok(Step::On);
            }
            self.backend.unnamed = Some(statement.serial);
            self.session.statements.sent(b"", Found::Statement(statement.clone()));
            self.pass(len);
            self.unit.expects.push_back(Expect::Parse(NameOnServer::Unnamed));
            if class.is_none_or(leaves_names) && classify::shows_rows_of_another(parse.text) {
                self.ask_shape(NameOnServer::Unnamed, statement, false);
            }
            return Ok(Step::On);
        }
        match self.session.statements.find(name) {
            Found::Statement(first) => {
                if !self.has_failed() {
                    self.give(name, &first);
                } else if !self.backend.own_names.contains(name) && !is_refused_in_failed(parse.text) {
                    // It cannot be given there; and all but what ends the transaction, or is empty, fails anyway.
                    let name = String::from_utf8_lossy(name);
                    let message = format!("prepared statement \"{name}\" already exists");
                    self.own_error(ErrorReport::error("42P05", message).routine("StorePreparedStatement"));
                    return self.drop_message(len);
                }
                return Ok(self.parse_twice(name, Found::Statement(statement), len));
            }
            Found::OnBackend => return Ok(self.parse_twice(name, Found::Statement(statement), len)),
            Found::Nothing => {}
        }
        let limit = self.session.config.limits.statements_per_session;
        if self.session.statements.len() >= limit {
            self.own_error(
                ErrorReport::error("53400", format!("too many prepared statements in one session ({limit})"))
                    .hint("Close some, or raise limits.statements_per_session."),
            );
            return Ok(Step::On);
        }
        self.prepare(name, statement, class, len);
        Ok(Step::On)
    }

    /// Whether an unnamed Parse is to be served by the statement that sessions share (`pool.share_unnamed`): of a text
    /// seen before, in a unit of reads that can be run again. Should what is shared be out of date, that is done with a
    /// statement that is parsed anew, and the client sees nothing of it (see `is_stale_statement`).
    fn shares_unnamed(&mut self, statement: &Statement, class: Option<StatementClass>) -> bool {
        if !self.session.config.pool.share_unnamed {
            return false;
        }
        let may = self.may_share_unnamed(class) && !self.is_refused_here(statement);
        let shares = may && self.session.shared.names.see_unnamed(statement.shared);
        if shares {
            statement.share_unnamed();
        }
        let how = match shares {
            true if self.is_up_to_date(statement.shared) => UNNAMED_SHARED,
            true => UNNAMED_PREPARED,
            false => UNNAMED_PASSED,
        };
        self.session.shared.metrics.unnamed_parses.inc(how);
        shares
    }

    /// Whether an unnamed statement may stand under its shared name in this unit and on this backend.
    fn may_share_unnamed(&self, class: Option<StatementClass>) -> bool {
        self.session.config.pool.share_unnamed
            && self.unit.redoable
            && !self.session.uses_own_names()
            && class.is_some_and(|class| is_read(class) && class.leaves == Leaves::NOTHING)
    }

    /// A Parse of a new name.
    fn prepare(&mut self, name: &[u8], statement: Arc<Statement>, class: Option<StatementClass>, len: usize) {
        self.session.statements.sent(name, Found::Statement(statement.clone()));
        let expect =
            if self.session.uses_own_names() || class.is_some_and(|class| self.shows_statements(class)) {
                self.backend.own_names.insert(name.to_vec());
                self.pass(len);
                self.unit.expects.push_back(Expect::Parse(NameOnServer::Own(name.to_vec())));
                return self.ask_shape(NameOnServer::Own(name.to_vec()), statement, false);
            } else if self.is_up_to_date(statement.shared)
                && !self.is_refused_here(&statement)
                && !self.takes_snapshot()
            {
                self.take(len);
                Expect::OwnParseComplete
            } else {
                self.put_shared(&statement);
                self.take(len);
                self.unit.expects.push_back(Expect::Parse(NameOnServer::Shared(statement.shared)));
                return self.ask_shape(NameOnServer::Shared(statement.shared), statement, false);
            };
        self.unit.expects.push_back(expect);
        self.answer_ourselves();
    }

    /// Whether the transaction has failed, as far as the server will know when it comes to the next message.
    fn has_failed(&self) -> bool {
        self.session.status == TransactionStatus::Failed && !self.unit.recovered
    }

    /// Whether the server refuses to parse the statement because the transaction has failed.
    fn is_refused_here(&self, statement: &Statement) -> bool {
        self.has_failed() && is_refused_in_failed(statement.text())
    }

    /// Whether a Parse may be the first statement of a transaction: on the server it takes the snapshot, behind which
    /// nothing may be said of the isolation level any more.
    fn takes_snapshot(&self) -> bool {
        self.session.status == TransactionStatus::InTransaction
            && !self.session.queried
            && !self.session.is_apart()
            && !self.unit.bound
    }

    /// Whether a client that prepares the text now may be given the shared statement that is there (or
    /// will be, if nothing fails before): not if there was data definition since it was parsed.
    fn is_up_to_date(&mut self, name: SharedName) -> bool {
        let catalog = self.session.catalog_identity();
        self.backend
            .prepared
            .get(&name)
            .is_some_and(|there| !there.stale && there.catalog == catalog && catalog != 0)
    }

    /// Sends the Parse of a shared statement, in place of an older one of its name, or of the one used
    /// longest ago. It counts as there from now on: what is sent later comes later.
    fn put_shared(&mut self, statement: &Statement) {
        if let Some(older) = self.backend.prepared.pop(&statement.shared) {
            self.close_shared(statement.shared, older);
        }
        self.evict_surplus();
        put_parse(&mut self.backend.output, &statement.shared.server_name(), &statement.tail);
        let catalog = self.session.catalog_identity();
        self.backend.prepared.put(statement.shared, Prepared { catalog, ..Prepared::default() });
    }

    /// Closes the shared statements that the backend has above its limit, those used longest ago.
    fn evict_surplus(&mut self) {
        let limit = self.session.config.pool.max_prepared;
        while self.backend.prepared.len() >= limit {
            let Some((oldest, there)) = self.backend.prepared.pop_lru() else { return };
            self.close_shared(oldest, there);
        }
    }

    fn close_shared(&mut self, name: SharedName, was: Prepared) {
        put_target(&mut self.backend.output, b'C', &name.server_name());
        self.unit.expects.push_back(Expect::InjectedClose(NameOnServer::Shared(name), was));
    }

    /// Asks the server what it has just parsed. `compare`: the statement was prepared before, and what
    /// the client goes by must still hold, or else what it sends next must not run.
    ///
    /// The answer comes before that of anything behind it. So a unit that can be run again need not
    /// wait for it; any other waits, once for each statement and backend.
    fn ask_shape(&mut self, on: NameOnServer, statement: Arc<Statement>, compare: bool) {
        let name = match &on {
            NameOnServer::Shared(shared) => shared.server_name().to_vec(),
            NameOnServer::Own(name) | NameOnServer::Refused(name) => name.clone(),
            NameOnServer::Unnamed | NameOnServer::Unknown => Vec::new(),
        };
        put_target(&mut self.backend.output, b'D', &name);
        if compare && (!self.unit.redoable || self.unit.bound) {
            self.backend.output.put_slice(&[b'H', 0, 0, 0, 4]);
            self.unit.awaits_shape = true;
        }
        let asked = Asked { statement, on, compare, told: None, reader: ShapeReader::default() };
        self.unit.expects.push_back(Expect::InjectedDescribe(Box::new(asked)));
    }

    /// A text too long to be kept: it is streamed under the client's own name, and so the session stays
    /// on this backend.
    fn translate_long_parse(&mut self, len: usize) -> Result<Step, End> {
        if let Some(refused) = self.refuse_on_replica(true) {
            return Ok(refused);
        }
        let there = self.there().min(len);
        let head = &self.session.client.input[self.unit.taken + HEADER..self.unit.taken + there];
        let Some((name, _)) = wire::cstr(head) else {
            return if there == len {
                self.translate_malformed(len)
            } else {
                self.wait_for_names(len, SMALL_MESSAGE)
            };
        };
        let name = prepared::key(name).to_vec();
        self.leave(Leaves::pin(PinReason::LargeStatement), None);
        self.session.pin_now(PinReason::LargeStatement);
        (self.unit.writes, self.unit.may_commit) = (true, true);
        if name.is_empty() {
            self.backend.unnamed = None;
            self.session.statements.sent(b"", Found::OnBackend);
            self.pass(len);
            self.unit.expects.push_back(Expect::Parse(NameOnServer::Unnamed));
            return Ok(Step::On);
        }
        match self.session.statements.find(&name) {
            Found::Statement(first) => {
                self.give(&name, &first);
                return Ok(self.parse_twice(&name, Found::OnBackend, len));
            }
            Found::OnBackend => return Ok(self.parse_twice(&name, Found::OnBackend, len)),
            Found::Nothing => {}
        }
        self.session.statements.sent(&name, Found::OnBackend);
        self.backend.own_names.insert(name.clone());
        self.pass(len);
        self.unit.expects.push_back(Expect::Parse(NameOnServer::Own(name)));
        Ok(Step::On)
    }

    /// The client prepares a name that it has already. The server is made to say so itself, with the
    /// client's name, under which it has the first statement by now: so the second Parse fails. (If not,
    /// because SQL's DEALLOCATE has taken the first, the name stands for the second.)
    fn parse_twice(&mut self, name: &[u8], second: Found, len: usize) -> Step {
        self.backend.dirt = self.backend.dirt.max(Dirt::State);
        self.pass(len);
        self.session.statements.sent(name, second);
        self.unit.expects.push_back(Expect::Parse(NameOnServer::Refused(name.to_vec())));
        Step::On
    }

    fn translate_bind(&mut self, len: usize) -> Result<Step, End> {
        let there = len.min(self.there());
        let head = &self.session.client.input[self.unit.taken + HEADER..self.unit.taken + there];
        let Some((portal, name, names_len)) = messages::bind_names(head) else {
            return if there == len {
                self.translate_malformed(len)
            } else {
                self.wait_for_names(len, 2 * SMALL_MESSAGE)
            };
        };
        let (portal, name) = (portal.to_vec(), name.to_vec());
        let off = self.session.are_kept_off_by_clock(self.backend.node, &head[names_len..]);
        if let Some(refused) = self.refuse_on_replica(off) {
            return Ok(refused);
        }
        let (own, shared);
        let on_server: &[u8] = match self.resolve(&name, Use::Run) {
            Resolved::Name(on_server) => {
                own = on_server;
                &own
            }
            Resolved::Shared(on_server) => {
                shared = on_server.server_name();
                &shared
            }
            Resolved::Stopped(step) => return Ok(step),
        };
        if let Some(statement) = self.unit.binding.take() {
            if there < len && len <= self.session.config.limits.unit_hold {
                return self.wait_for(len);
            }
            let changes = self.bound_changes(&statement, (there == len).then_some(len));
            if let Some(report) = self.session.refused_own(&changes) {
                self.own_error(report);
                return Ok(Step::On);
            }
            self.session.keep_portal(&portal, changes);
        } else {
            self.session.keep_portal(&portal, Vec::new());
        }
        self.unit.binds += 1;
        if on_server == name {
            self.pass(len);
        } else {
            let rest = len - HEADER - names_len;
            put_length(&mut self.backend.output, b'B', portal.len() + 1 + on_server.len() + 1 + rest);
            put_cstr(&mut self.backend.output, &portal);
            put_cstr(&mut self.backend.output, on_server);
            self.take(HEADER + names_len);
            self.unit.client_rest = rest;
            self.take_rest();
        }
        self.unit.bound = true;
        self.note_end(portal, &name);
        self.unit.expects.push_back(Expect::Bind(name));
        Ok(Step::On)
    }

    /// A portal is bound to what `name` stands for: a command that ends the transaction, perhaps.
    fn note_end(&mut self, portal: Vec<u8>, name: &[u8]) {
        if self.session.status == TransactionStatus::Idle {
            return;
        }
        let statement = match self.session.statements.find(prepared::key(name)) {
            Found::Statement(statement) => Some(statement),
            Found::OnBackend | Found::Nothing => None,
        };
        let text = statement.as_ref().map_or(&b""[..], |statement| statement.text());
        self.unit.leaves_transaction |= TransactionCommand::read(text) == Some(TransactionCommand::Rollback);
        if classify::ends_failure(text) {
            self.unit.recovers = Some(portal);
        } else if self.unit.recovers.as_ref() == Some(&portal) {
            self.unit.recovers = None;
        }
    }

    /// What a statement does to settings with the parameters that the Bind at the start (if it is there
    /// whole) gives it.
    fn bound_changes(&mut self, statement: &Statement, len: Option<usize>) -> Vec<Change> {
        let effects = setting::effects(statement.text(), self.session.lexing);
        self.unit.quiet_binds += u32::from(effects.quiet);
        let values = len.and_then(|len| messages::bind_texts(self.peek(len), &statement.types()));
        effects.bind(&values.unwrap_or_default()).into_iter().flatten().collect()
    }

    /// The name under which the backend knows the client's statement, which it is given first if it
    /// lacks it.
    fn resolve(&mut self, name: &[u8], to: Use) -> Resolved {
        let (given, name) = (name, prepared::key(name));
        let statement = match self.session.statements.find(name) {
            Found::Statement(statement) => statement,
            Found::OnBackend => {
                (self.unit.writes, self.unit.may_commit) = (true, true);
                return Resolved::Name(name.to_vec());
            }
            Found::Nothing => return Resolved::Name(self.unknown_name(given)),
        };
        let class = self.session.known_class(&statement);
        if to == Use::Run {
            self.session.enter_statement(&statement);
        }
        let off = self.session.is_kept_off_by_clock(self.backend.node, statement.text());
        if let Some(refused) = self.refuse_on_replica(off || !class.is_some_and(is_read)) {
            return Resolved::Stopped(refused);
        }
        let shows = class.is_some_and(|class| self.shows_statements(class));
        match class {
            Some(class) => {
                self.prepare_for(class.leaves, statement.text());
                self.unit.binding = class.settings.then(|| statement.clone());
                self.unit.login_settings |=
                    class.kind == Kind::Ddl && classify::alters_login(statement.text());
                self.unit.may_commit |= class.may_commit(statement.text());
                self.unit.count_code(class.leaves, Some(statement.text()));
                self.count_in(class, statement.text());
            }
            None => (self.unit.writes, self.unit.may_commit) = (true, true),
        }
        if statement.has_changed() && !self.has_failed() {
            self.own_error(changed_result_type());
            return Resolved::Stopped(Step::On);
        }
        let by_shared_name = statement.is_shared_unnamed() && self.may_share_unnamed(class);
        let on_server = if name.is_empty() && !by_shared_name {
            if self.backend.unnamed != Some(statement.serial) {
                put_parse(&mut self.backend.output, b"", &statement.tail);
                self.backend.unnamed = Some(statement.serial);
                self.prepared_again(NameOnServer::Unnamed, &statement);
            }
            Vec::new()
        } else if !by_shared_name && (self.session.uses_own_names() || statement.is_sql() || shows) {
            if self.is_refused_here(&statement) && !self.backend.own_names.contains(name) {
                // It cannot be given there: the server would refuse that, and the client wait for its shape for ever.
                self.own_error(aborted_transaction(to));
                return Resolved::Stopped(Step::On);
            }
            self.give(name, &statement);
            name.to_vec()
        } else {
            let statement = self.as_parsed_here(statement);
            self.have_shared(&statement);
            return self.once_shape_is_known(Resolved::Shared(statement.shared));
        };
        self.once_shape_is_known(Resolved::Name(on_server))
    }

    /// The message is looked at again when the shape is known.
    fn once_shape_is_known(&self, resolved: Resolved) -> Resolved {
        if self.unit.awaits_shape { Resolved::Stopped(Step::Wait) } else { resolved }
    }

    /// A statement that was parsed under other settings and that the backend lacks: parsed here and now it may
    /// mean something else, so it must not get the name of what it meant.
    fn as_parsed_here(&self, statement: Arc<Statement>) -> Arc<Statement> {
        let settings = self.session.settings.parse_fingerprint();
        if *statement.settings == *settings || self.backend.prepared.contains(&statement.shared) {
            return statement;
        }
        let Some(here) = self.session.shared.names.under(&statement, settings) else { return statement };
        if let Some(shape) = statement.shape() {
            here.give_shape(shape, self.unit.number);
        }
        here
    }

    /// Sees to it that the backend has a shared statement, of the shape that the client goes by.
    fn have_shared(&mut self, statement: &Arc<Statement>) {
        let there = self.backend.prepared.get(&statement.shared).copied();
        match (there.filter(|there| !there.stale), statement.shape()) {
            (Some(Prepared { shape: Some(there), .. }), Some(shape)) if there == shape => {}
            // However often it were parsed anew, it would have the shape of what it shows now.
            (Some(Prepared { shape: Some(_), .. }), Some(_))
                if classify::shows_rows_of_another(statement.text()) =>
            {
                statement.parse_again();
            }
            (Some(Prepared { shape: Some(there), .. }), None) => {
                statement.give_shape(there, self.unit.number);
            }
            // Parsed in this unit, and not answered yet.
            (Some(Prepared { shape: None, .. }), _) => {
                let asked = self.unit.expects.iter_mut().rev().find_map(|expect| match expect {
                    Expect::InjectedDescribe(asked) if asked.statement.shared == statement.shared => {
                        Some(asked)
                    }
                    _ => None,
                });
                let same = asked.is_some_and(|asked| {
                    Arc::ptr_eq(&asked.statement, statement)
                        || statement.shape().is_none()
                        || asked.compare && asked.statement.shape() == statement.shape()
                });
                if !same {
                    self.put_shared(statement);
                    self.unit
                        .expects
                        .push_back(Expect::InjectedParse(NameOnServer::Shared(statement.shared)));
                    self.ask_shape(NameOnServer::Shared(statement.shared), statement.clone(), true);
                }
            }
            (Some(Prepared { shape: Some(_), .. }), Some(_)) | (None, _) => {
                self.put_shared(statement);
                self.prepared_again(NameOnServer::Shared(statement.shared), statement);
            }
        }
    }

    /// A Parse of ours was sent.
    fn prepared_again(&mut self, on: NameOnServer, statement: &Arc<Statement>) {
        statement.parse_again();
        self.unit.expects.push_back(Expect::InjectedParse(on.clone()));
        // Of a statement that is prepared and executed once only the client itself asks for the shape.
        if on != NameOnServer::Unnamed || statement.shape().is_some() {
            let compare = statement.shape().is_some() && !statement.has_changed();
            self.ask_shape(on, statement.clone(), compare);
        }
    }

    /// A name that stands for nothing here, as it is sent on, so that the server says so (or knows it, when SQL
    /// has prepared it on a pinned backend). What other sessions have left under it must not be met.
    fn unknown_name(&mut self, name: &[u8]) -> Vec<u8> {
        if name.is_empty() {
            self.backend.unnamed = None;
            put_target(&mut self.backend.output, b'C', b"");
            self.unit.expects.push_back(Expect::InjectedClose(NameOnServer::Unnamed, Prepared::default()));
        }
        let mut on_server = name.to_vec();
        if SharedName::is_like(name) {
            on_server.push(b'?');
        }
        on_server
    }

    /// Gives a backend one of the client's statements under the client's name.
    fn give(&mut self, name: &[u8], statement: &Arc<Statement>) {
        if !self.backend.own_names.insert(name.to_vec()) {
            return;
        }
        if !statement.is_sql() {
            put_parse(&mut self.backend.output, name, &statement.tail);
            return self.prepared_again(NameOnServer::Own(name.to_vec()), statement);
        }
        // The client's PREPARE, by names that no client has: an open unit, its unnamed statement and its
        // unnamed portal are left as they are.
        let nobody = || Expect::InjectedClose(NameOnServer::Unknown, Prepared::default());
        let output = &mut self.backend.output;
        put_target(output, b'C', NO_STATEMENT);
        put_parse(output, NO_STATEMENT, &statement.tail);
        put_length(output, b'B', 2 * (NO_STATEMENT.len() + 1) + 6);
        put_cstr(output, NO_STATEMENT);
        put_cstr(output, NO_STATEMENT);
        output.put_slice(&[0; 6]);
        put_length(output, b'E', NO_STATEMENT.len() + 1 + 4);
        put_cstr(output, NO_STATEMENT);
        output.put_u32(0);
        put_target(output, b'C', NO_STATEMENT);
        put_length(output, b'C', NO_STATEMENT.len() + 2);
        output.put_u8(b'P');
        put_cstr(output, NO_STATEMENT);
        self.unit.expects.extend([
            nobody(),
            Expect::InjectedParse(NameOnServer::Unknown),
            Expect::InjectedBind,
            Expect::InjectedExecute(name.to_vec()),
            nobody(),
            nobody(),
        ]);
        let compare = statement.shape().is_some() && !statement.has_changed();
        self.ask_shape(NameOnServer::Own(name.to_vec()), statement.clone(), compare);
    }

    /// Gives a backend a name that is to be deallocated at once, of which so only the name counts: what it stands for might
    /// not be prepared any more, and a transaction end with that.
    fn give_nothing(&mut self, name: &[u8]) {
        put_parse(&mut self.backend.output, name, &[0; 3]);
        self.backend.own_names.insert(name.to_vec());
        self.unit.expects.push_back(Expect::InjectedParse(NameOnServer::Own(name.to_vec())));
    }

    /// SQL's EXECUTE and DEALLOCATE see the protocol's names: before such a statement the backend is
    /// given all of the session's. Ahead of a unit this is closed by a Sync of its own, and done once: what could not be
    /// given then cannot be given now. In a transaction or a unit that has begun, which one that cannot be given would
    /// end, it is given those that the statement names, and what these name.
    fn materialize(&mut self, leaves: Leaves, text: Option<&[u8]>) {
        if !leaves.has(SQL_PREPARE) || self.session.role == Role::Replica {
            return;
        }
        self.session.pin_now(PinReason::SqlPrepare);
        let named = text.and_then(|text| self.session.statements.reached_by(text));
        if text.is_none_or(classify::may_execute) {
            self.count_named(named.as_ref());
        }
        let ahead = !self.unit.begun && self.session.status != TransactionStatus::InTransaction;
        if ahead && !std::mem::replace(&mut self.unit.given_all, true) {
            return self.give_all(|_, _| true);
        }
        match named {
            Some(named) => self.give_all(|name, _| named.contains(name)),
            None if self.unit.given_all => {}
            None => self.give_all(|_, _| true),
        }
    }

    /// Counts in what the session's statements of these names (none: of all) would leave. They keep the session on its backend
    /// longer than their names do: a setting does not show when the backend is looked at.
    fn count_named(&mut self, named: Option<&HashSet<Vec<u8>>>) {
        let mut leaves = Leaves::NOTHING;
        for (name, statement) in self.session.statements.named() {
            if named.is_some_and(|named| !named.contains(name)) {
                continue;
            }
            // What is not known yet may be a read, and so leaves nothing.
            let Some(class) = self.session.known_class(statement) else { continue };
            leaves |= class.leaves;
            if class.settings {
                leaves |= Leaves::pin(PinReason::Setting);
            }
            self.unit.ddl |= class.kind == Kind::Ddl;
        }
        self.unit.leave(leaves);
        self.backend.dirt = self.backend.dirt.max(dirt_of(leaves));
    }

    /// Whether a text that keeps the backend for another reason may be about prepared statements, too, although its class does
    /// not say so.
    fn may_name_statements(&self, leaves: Leaves, text: &[u8]) -> bool {
        !leaves.pins().is_empty()
            && !leaves.has(SQL_PREPARE)
            && !self.session.statements.is_empty()
            && classify::may_name_statements(text.strip_suffix(b"\0").unwrap_or(text))
    }

    /// Gives the backend those of the session's statements that it lacks, each for itself: one that cannot be prepared
    /// any more, as what it is about was dropped, keeps no other away.
    fn give_all(&mut self, which: impl Fn(&[u8], &Statement) -> bool) {
        if self.has_failed() {
            // Nothing can be given there, and all but what ends the transaction fails anyway.
            return;
        }
        let missing: Vec<(Vec<u8>, Arc<Statement>)> = self
            .session
            .statements
            .named()
            .filter(|(name, statement)| !self.backend.own_names.contains(*name) && which(name, statement))
            .map(|(name, statement)| (name.clone(), statement.clone()))
            .collect();
        for (at, (name, statement)) in missing.iter().enumerate() {
            if at > 0 && !self.unit.begun {
                self.inject_sync();
            }
            self.give(name, statement);
        }
    }

    /// Code that is not understood may EXECUTE what SQL has prepared, and so may any code of the transaction
    /// that begins here. What fails ahead of a Query outside a transaction harms nobody.
    fn give_what_may_be_named(&mut self) {
        if self.session.role != Role::Primary || self.session.status != TransactionStatus::Idle {
            return;
        }
        if self.unit.leaves.has(Leaves::SHOWS_STATEMENTS) {
            self.show_statements();
        } else if (self.unit.leaves.has(Leaves::UNPROVEN) || self.unit.control)
            && self.session.statements.any_of_sql()
        {
            self.give_all(|_, statement| statement.is_sql());
        }
    }

    /// The same ahead of a unit of the extended protocol; and what is prepared there of EXECUTE is described by
    /// what it names when it is parsed.
    fn prepare_for(&mut self, leaves: Leaves, text: &[u8]) {
        let (earlier, given) = (self.unit.expects.len(), self.unit.given_all);
        if leaves.has(SQL_PREPARE) || self.may_name_statements(leaves, text) {
            self.leave(SQL_PREPARE, Some(text));
        } else if leaves.has(Leaves::SHOWS_STATEMENTS)
            && !self.unit.begun
            && !given
            && self.session.role == Role::Primary
            && self.session.status == TransactionStatus::Idle
        {
            self.unit.given_all = true;
            self.show_statements();
        }
        if self.unit.given_all && !given && self.unit.expects.len() > earlier {
            // An error in it must not take the unit with it.
            self.inject_sync();
        }
    }

    /// The backend is to show the session's statements under the session's names, and nobody else's.
    fn show_statements(&mut self) {
        while let Some((name, there)) = self.backend.prepared.pop_lru() {
            self.close_shared(name, there);
        }
        self.give_all(|_, _| true);
    }

    /// Whether a statement shows what is prepared, and so is to be found there under its own name.
    fn shows_statements(&self, class: StatementClass) -> bool {
        class.leaves.has(Leaves::SHOWS_STATEMENTS) && self.session.role == Role::Primary
    }

    /// Whether an error belongs to what we have put in ahead of a Query, closed by a Sync of ours.
    pub(super) fn is_ours(&self) -> bool {
        let ours = |e: &&Expect| {
            !matches!(
                e,
                Expect::InjectedParse(_)
                    | Expect::InjectedDescribe(_)
                    | Expect::InjectedBind
                    | Expect::InjectedExecute(_)
                    | Expect::InjectedClose(..)
            )
        };
        matches!(self.unit.expects.iter().find(ours), Some(Expect::InjectedSync))
    }

    fn translate_describe(&mut self, len: usize) -> Result<Step, End> {
        let mut asked = None;
        let Some(target) = messages::target(self.peek(len)) else { return self.translate_malformed(len) };
        match target {
            Target::Portal(_) => self.pass(len),
            Target::Statement(name) => {
                let name = &name.to_vec()[..];
                let resolved = self.resolve(name, Use::Describe);
                self.unit.binding = None;
                let (on_server, shared) = match resolved {
                    Resolved::Name(on_server) => (on_server, false),
                    Resolved::Shared(on_server) => (on_server.server_name().to_vec(), true),
                    Resolved::Stopped(step) => return Ok(step),
                };
                put_target(&mut self.backend.output, b'D', &on_server);
                self.take(len);
                if let Found::Statement(statement) = self.session.statements.find(name) {
                    let on = if name.is_empty() && !shared {
                        NameOnServer::Unnamed
                    } else if self.session.uses_own_names() {
                        NameOnServer::Own(prepared::key(name).to_vec())
                    } else {
                        NameOnServer::Shared(statement.shared)
                    };
                    let reader = ShapeReader::default();
                    let told = statement.description().map(Box::from);
                    asked = Some(Box::new(Asked { statement, on, compare: false, told, reader }));
                }
            }
        }
        let named = asked.as_mut().and_then(|asked| rows_of_another(asked));
        self.unit.expects.push_back(Expect::Describe(asked));
        if let Some((name, asked)) = named {
            put_target(&mut self.backend.output, b'D', &name);
            self.unit.expects.push_back(Expect::InjectedDescribe(Box::new(asked)));
        }
        Ok(Step::On)
    }

    fn translate_close(&mut self, len: usize) -> Result<Step, End> {
        let body = self.body(len);
        let Some(target) = messages::target(&body) else { return self.translate_malformed(len) };
        let expect = match target {
            Target::Portal(_) => {
                self.pass(len);
                Expect::ClosePortal
            }
            Target::Statement(b"") => {
                self.backend.unnamed = None;
                self.session.statements.sent(b"", Found::Nothing);
                self.pass(len);
                Expect::Close(NameOnServer::Unnamed)
            }
            Target::Statement(name) => {
                let name = prepared::key(name);
                self.session.statements.sent(name, Found::Nothing);
                // A pinned backend may know it from SQL's PREPARE, too.
                let has_it = self.session.uses_own_names() || self.backend.own_names.contains(name);
                if has_it && !SharedName::is_like(name) {
                    self.pass(len);
                    let was_there = self.backend.own_names.remove(name);
                    Expect::Close(if was_there {
                        NameOnServer::Own(name.to_vec())
                    } else {
                        NameOnServer::Unknown
                    })
                } else {
                    self.take(len);
                    Expect::OwnCloseComplete
                }
            }
        };
        self.unit.expects.push_back(expect);
        self.answer_ourselves();
        Ok(Step::On)
    }

    fn translate_execute(&mut self, len: usize) -> Result<Step, End> {
        let Some((portal, _)) = messages::execute(self.peek(len)) else {
            return self.translate_malformed(len);
        };
        // Should it fail, all up to Sync is skipped.
        let recovers = self.unit.recovers.as_deref() == Some(portal);
        if let Some(changes) = self.session.portal_changes(portal) {
            self.unit.settings.push_back((self.unit.executes, changes));
        }
        self.unit.recovered |= recovers;
        self.unit.executes += 1;
        self.pass(len);
        self.unit.expects.push_back(Expect::Execute);
        if self.unit.clears_names {
            // DISCARD ALL or DEALLOCATE ALL: only when it has run is it known what the names stand for.
            self.backend.output.put_slice(&[b'H', 0, 0, 0, 4]);
            self.unit.awaits_all = true;
        }
        Ok(Step::On)
    }
}

/// An EXECUTE that had rows when the client prepared it has the same description as long as there is what it names, and else
/// fails after its parameters are described. Where it was parsed since, it may have another or none: then the server is
/// asked for what it names, and that decides.
fn rows_of_another(asked: &mut Asked) -> Option<(Vec<u8>, Asked)> {
    asked.told.as_ref().filter(|told| told.first() == Some(&b'T'))?;
    let name = classify::sql_execute(asked.statement.text())?.name;
    let told = asked.told.replace(Box::default());
    let (statement, reader) = (asked.statement.clone(), ShapeReader::default());
    Some((name, Asked { statement, on: NameOnServer::Unknown, compare: false, told, reader }))
}

/// Whether a statement is refused by the server in a transaction that has failed, before anything else is found wrong with it.
fn is_refused_in_failed(text: &[u8]) -> bool {
    classify::stays_in_transaction(text) && !classify::is_empty(text)
}

/// What a server says to a Bind or a Describe in a transaction that has failed.
fn aborted_transaction(to: Use) -> ErrorReport {
    let words = "current transaction is aborted, commands ignored until end of transaction block";
    let routine = match to {
        Use::Run => "exec_bind_message",
        Use::Describe => "exec_describe_statement_message",
    };
    ErrorReport::error("25P02", words).routine(routine)
}

/// The server's own words. Drivers prepare anew when they see this code together with this routine.
fn changed_result_type() -> ErrorReport {
    ErrorReport::error("0A000", "cached plan must not change result type").routine("RevalidateCachedQuery")
}

/// What a backend is to be taken for that has run a statement which leaves this.
fn dirt_of(leaves: Leaves) -> Dirt {
    if leaves.is_nothing() {
        Dirt::Clean
    } else if (leaves | Leaves::SHOWS_STATEMENTS) == Leaves::UNPROVEN | Leaves::SHOWS_STATEMENTS {
        Dirt::Hidden
    } else {
        Dirt::State
    }
}

/// Whether it is SQL about prepared statements.
fn leaves_names(class: StatementClass) -> bool {
    class.leaves.has(SQL_PREPARE)
}

fn is_read(class: StatementClass) -> bool {
    matches!(class.kind, Kind::Read | Kind::Empty)
}

pub(super) fn put_cstr(out: &mut BytesMut, text: &[u8]) {
    out.put_slice(text);
    out.put_u8(0);
}

pub(super) fn put_length(out: &mut BytesMut, tag: u8, body: usize) {
    out.put_u8(tag);
    out.put_u32(u32::try_from(body + 4).unwrap_or(u32::MAX));
}

fn put_parse(out: &mut BytesMut, name: &[u8], tail: &[u8]) {
    put_length(out, b'P', name.len() + 1 + tail.len());
    put_cstr(out, name);
    out.put_slice(tail);
}

fn put_target(out: &mut BytesMut, tag: u8, name: &[u8]) {
    put_length(out, tag, name.len() + 2);
    out.put_u8(b'S');
    put_cstr(out, name);
}
