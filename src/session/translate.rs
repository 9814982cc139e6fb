//! From the client to the node: each message of a unit as the backend is to see it.

use std::sync::Arc;

use bytes::{Buf, BufMut, BytesMut};

use super::exchange::{Expect, HIGH_WATER, Intake, NameOnServer, Outcome, SMALL_MESSAGE, Step};
use super::messages::{self, Parse, Target};
use super::prepared::{Found, Statement};
use super::{End, Role, Session};
use crate::backend::Dirt;
use crate::classify::{Leaves, PinReason};
use crate::wire::{self, ErrorReport, HEADER};

impl Session {
    /// Takes what the client has sent and puts it into the backend's output, as far as both allow.
    pub(super) fn translate(&mut self) -> Result<Step, End> {
        let mut moved = false;
        loop {
            let lease = self.lease.as_mut().expect("an exchange has a backend");
            if lease.output.len() >= HIGH_WATER {
                break;
            }
            if self.unit.client_rest > 0 {
                let n = self.unit.client_rest.min(self.client.input.len() - self.unit.taken);
                if n == 0 {
                    break;
                }
                lease.output.put_slice(&self.client.input[self.unit.taken..self.unit.taken + n]);
                self.unit.client_rest -= n;
                self.take(n);
                moved = true;
                continue;
            }
            if self.unit.intake == Intake::Closed || self.unit.discard.is_some() {
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

    /// `n` bytes of the client's input are used.
    fn take(&mut self, n: usize) {
        self.unit.vetted = self.unit.vetted.saturating_sub(n);
        if self.unit.redoable {
            self.unit.taken += n;
        } else {
            self.client.input.advance(n);
        }
    }

    /// From here on the unit cannot be run again.
    pub(super) fn commit(&mut self) {
        if self.unit.redoable {
            self.unit.redoable = false;
            self.client.input.advance(self.unit.taken);
            self.unit.taken = 0;
        }
    }

    fn translate_message(&mut self) -> Result<Step, End> {
        let input = &self.client.input[self.unit.taken..];
        let Some(header) = wire::header(input).map_err(End::length)? else { return Ok(Step::Wait) };
        let whole = input.len() >= header.len;
        if matches!(header.tag, b'C' | b'D' | b'E' | b'H' | b'S' | b'X' | b'c' | b'f')
            && header.len > SMALL_MESSAGE
        {
            return Err(End::protocol("invalid message length"));
        }
        if self.unit.intake == Intake::CopyIn {
            return self.translate_copy(header, whole);
        }
        if self.unit.skip_to_sync && header.tag != b'S' && header.tag != b'X' {
            let n = header.len.min(input.len());
            self.drop_rest = header.len - n;
            self.take(n);
            return Ok(if self.drop_rest > 0 { Step::Wait } else { Step::On });
        }
        match header.tag {
            b'Q' => self.translate_query(header.len),
            b'F' => self.translate_function_call(header.len),
            b'P' => self.translate_parse(header.len),
            b'B' => self.translate_bind(header.len),
            b'D' | b'C' | b'E' | b'S' | b'H' if !whole => Ok(Step::Wait),
            b'D' => self.translate_describe(header.len),
            b'C' => self.translate_close(header.len),
            b'E' => self.translate_execute(header.len),
            b'S' => {
                self.pass(header.len);
                self.unit.expects.push_back(Expect::Sync);
                self.unit.intake = Intake::Closed;
                self.unit.skip_to_sync = false;
                Ok(Step::On)
            }
            b'H' => {
                self.pass(header.len);
                Ok(Step::On)
            }
            // Left over from a COPY that has failed: the server ignores them, too.
            b'd' | b'c' | b'f' => {
                let n = header.len.min(self.client.input.len() - self.unit.taken);
                self.drop_rest = header.len - n;
                self.take(n);
                Ok(if self.drop_rest > 0 { Step::Wait } else { Step::On })
            }
            b'X' => Err(End::ClientGone),
            tag => Err(End::protocol(format!("invalid frontend message type {tag}"))),
        }
    }

    /// Passes the message (or what of it is there) on as it is.
    fn pass(&mut self, len: usize) {
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        let there = len.min(self.client.input.len() - self.unit.taken);
        lease.output.put_slice(&self.client.input[self.unit.taken..self.unit.taken + there]);
        self.unit.client_rest = len - there;
        self.take(there);
    }

    fn translate_copy(&mut self, header: wire::Header, whole: bool) -> Result<Step, End> {
        match header.tag {
            b'd' => self.pass(header.len),
            b'X' => return Err(End::ClientGone),
            _ if !whole && header.len <= SMALL_MESSAGE => return Ok(Step::Wait),
            b'c' | b'f' => {
                self.pass(header.len);
                // A Query's COPY ends with its answer; in the extended protocol a Sync is still to come.
                let simple = matches!(self.unit.expects.front(), Some(Expect::Query));
                self.unit.intake = if simple { Intake::Closed } else { Intake::Open };
            }
            // The server ignores Sync and Flush here, and fails the COPY at anything else.
            _ => self.pass(header.len),
        }
        Ok(Step::On)
    }

    fn translate_query(&mut self, len: usize) -> Result<Step, End> {
        // A Query that comes behind a Flush was not looked at when the unit was routed (asyncpg sends
        // BEGIN so, after Parse, Describe and Flush): it is routed by itself.
        if let Some(refused) = self.refuse_on_replica(true) {
            return Ok(refused);
        }
        self.statements.drop_unnamed();
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        lease.unnamed = None;
        if self.unit.leaves != Leaves::Nothing {
            lease.dirt = lease.dirt.max(Dirt::State);
        }
        let earlier = self.unit.expects.len();
        self.materialize();
        if self.unit.expects.len() > earlier {
            // An error in what was put in must not take the Query with it.
            let lease = self.lease.as_mut().expect("an exchange has a backend");
            lease.output.put_slice(&[b'S', 0, 0, 0, 4]);
            self.unit.expects.push_back(Expect::InjectedSync);
        }
        self.pass(len);
        self.unit.executed = true;
        self.unit.expects.push_back(Expect::Query);
        self.unit.intake = Intake::Closed;
        Ok(Step::On)
    }

    fn translate_function_call(&mut self, len: usize) -> Result<Step, End> {
        if let Some(refused) = self.refuse_on_replica(true) {
            return Ok(refused);
        }
        self.leave(Leaves::Unproven);
        self.unit.writes = true;
        self.pass(len);
        self.unit.executed = true;
        self.unit.expects.push_back(Expect::FunctionCall);
        self.unit.intake = Intake::Closed;
        Ok(Step::On)
    }

    /// Counts in what a statement may leave on the backend.
    fn leave(&mut self, leaves: Leaves) {
        if leaves == Leaves::Nothing {
            return;
        }
        self.unit.leaves = stronger(self.unit.leaves, leaves);
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        lease.dirt = lease.dirt.max(Dirt::State);
        self.materialize();
    }

    /// A unit that began on a replica, with reads, meets what is not a read. If all so far has been
    /// answered and nothing was bound, it moves; else it fails: it must not run on the replica.
    fn refuse_on_replica(&mut self, not_a_read: bool) -> Option<Step> {
        if !not_a_read || self.role != Role::Replica || self.unit.vetted > 0 {
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

    /// An error of ours in its turn among the answers; what follows up to Sync is skipped.
    fn own_error(&mut self, report: ErrorReport) {
        self.unit.expects.push_back(Expect::OwnError(Box::new(report)));
        self.unit.skip_to_sync = true;
        self.answer_ourselves();
    }

    fn translate_parse(&mut self, len: usize) -> Result<Step, End> {
        let there = self.client.input.len() - self.unit.taken;
        if there < len {
            return self.translate_long_parse(len, there);
        }
        let message = self.client.input[self.unit.taken..self.unit.taken + len].to_vec();
        let parse = Parse::read(&message[HEADER..]).ok_or_else(|| End::protocol("invalid message format"))?;
        let statement = self.shared.names.statement(&parse);
        // Units are classified before they are placed; what is parsed later in an open unit is
        // classified here, without asking for a second opinion: unknown is not a read.
        let class = self.known_class(&statement);
        if let Some(refused) =
            self.refuse_on_replica(!class.is_some_and(|c| c.kind == crate::classify::Kind::Read))
        {
            return Ok(refused);
        }
        if len > self.shared.config.limits.statement_text {
            self.leave(Leaves::Pins(PinReason::LargeStatement));
        }
        if parse.name.is_empty() {
            let lease = self.lease.as_mut().expect("an exchange has a backend");
            lease.unnamed = Some(statement.serial);
            self.statements.sent(b"", Some(statement));
            self.pass(len);
            self.unit.expects.push_back(Expect::Parse(NameOnServer::Unnamed));
            return Ok(Step::On);
        }
        self.evict_surplus();
        if self.statements.len() >= self.shared.config.limits.statements_per_session {
            let limit = self.shared.config.limits.statements_per_session;
            self.take(len);
            self.own_error(
                ErrorReport::error("53400", format!("too many prepared statements in one session ({limit})"))
                    .hint("Close some, or raise limits.statements_per_session."),
            );
            return Ok(Step::On);
        }
        if let Found::Statement(first) = self.statements.find(parse.name) {
            self.parse_twice(&message, parse.name, &first);
            self.take(len);
            return Ok(Step::On);
        }
        let own_names = self.uses_own_names();
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        self.statements.sent(parse.name, Some(statement.clone()));
        if own_names {
            lease.own_names.insert(parse.name.to_vec());
            self.unit.expects.push_back(Expect::Parse(NameOnServer::Own(parse.name.to_vec())));
            self.pass(len);
        } else if lease.prepared.get(&statement.shared).is_some() {
            self.take(len);
            self.unit.expects.push_back(Expect::OwnParseComplete);
            self.answer_ourselves();
        } else {
            put_parse(&mut lease.output, statement.shared.server_name().as_bytes(), &statement.tail);
            self.take(len);
            self.unit.expects.push_back(Expect::Parse(NameOnServer::Shared(statement.shared)));
        }
        Ok(Step::On)
    }

    /// A text too long to be kept: it is streamed under the client's own name, and so the session stays
    /// on this backend.
    fn translate_long_parse(&mut self, len: usize, there: usize) -> Result<Step, End> {
        if len <= self.shared.config.limits.statement_text {
            return Ok(Step::Wait);
        }
        if let Some(refused) = self.refuse_on_replica(true) {
            return Ok(refused);
        }
        let head = &self.client.input[self.unit.taken + HEADER..self.unit.taken + there];
        let Some((name, _)) = wire::cstr(head) else {
            return if there > SMALL_MESSAGE {
                Err(End::protocol("invalid message format"))
            } else {
                Ok(Step::Wait)
            };
        };
        let name = name.to_vec();
        self.leave(Leaves::Pins(PinReason::LargeStatement));
        self.pin_now(PinReason::LargeStatement);
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        if name.is_empty() {
            lease.unnamed = None;
        }
        self.unit.writes = true;
        self.statements.sent(&name, None);
        self.pass(len);
        self.unit.expects.push_back(Expect::Parse(NameOnServer::Own(name)));
        Ok(Step::On)
    }

    /// The client prepares a name that it has already. The server is made to say so itself, with the
    /// client's name: it is given the first statement under that name, so the second Parse fails.
    fn parse_twice(&mut self, message: &[u8], name: &[u8], first: &Arc<Statement>) {
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        lease.dirt = lease.dirt.max(Dirt::State);
        self.give(name, first);
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        lease.output.put_slice(message);
        self.statements.sent(b"\0", None);
        self.unit.expects.push_back(Expect::Parse(NameOnServer::Refused));
    }

    fn translate_bind(&mut self, len: usize) -> Result<Step, End> {
        let there = len.min(self.client.input.len() - self.unit.taken);
        let head = &self.client.input[self.unit.taken + HEADER..self.unit.taken + there];
        let Some((portal, name, names_len)) = messages::bind_names(head) else {
            return if there == len || there > 2 * SMALL_MESSAGE {
                Err(End::protocol("invalid message format"))
            } else {
                Ok(Step::Wait)
            };
        };
        let (portal, name) = (portal.to_vec(), name.to_vec());
        self.evict_surplus();
        let Some(on_server) = self.resolve(&name) else { return Ok(Step::Over(Outcome::Move)) };
        if self.unit.skip_to_sync {
            return Ok(Step::On);
        }
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        if on_server == name {
            self.pass(len);
        } else {
            let rest = len - HEADER - names_len;
            let body = portal.len() + 1 + on_server.len() + 1 + rest;
            lease.output.put_u8(b'B');
            lease.output.put_u32(u32::try_from(body + 4).unwrap_or(u32::MAX));
            put_cstr(&mut lease.output, &portal);
            put_cstr(&mut lease.output, &on_server);
            let from = self.unit.taken + HEADER + names_len;
            lease.output.put_slice(&self.client.input[from..self.unit.taken + there]);
            self.unit.client_rest = len - there;
            self.take(there);
        }
        self.unit.bound = true;
        self.unit.expects.push_back(Expect::Bind);
        Ok(Step::On)
    }

    /// The name under which the backend knows the client's statement, which it is given first if it
    /// lacks it. `None`: the statement must not run here, and the unit can move.
    fn resolve(&mut self, name: &[u8]) -> Option<Vec<u8>> {
        let Found::Statement(statement) = self.statements.find(name) else { return Some(name.to_vec()) };
        let class = self.known_class(&statement);
        let is_read = class.is_some_and(|c| c.kind == crate::classify::Kind::Read);
        match self.refuse_on_replica(!is_read) {
            Some(Step::Over(_)) => return None,
            Some(_) => return Some(Vec::new()),
            None => {}
        }
        if let Some(class) = class {
            self.count_in(class);
        } else {
            self.unit.writes = true;
        }
        let own_names = self.uses_own_names();
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        if name.is_empty() {
            if lease.unnamed != Some(statement.serial) {
                put_parse(&mut lease.output, b"", &statement.tail);
                lease.unnamed = Some(statement.serial);
                self.unit.expects.push_back(Expect::InjectedParse(NameOnServer::Unnamed));
            }
            return Some(Vec::new());
        }
        if own_names {
            self.give(name, &statement);
            return Some(name.to_vec());
        }
        let server_name = statement.shared.server_name().into_bytes();
        let shared = NameOnServer::Shared(statement.shared);
        let underway = |e: &Expect| matches!(e, Expect::Parse(n) | Expect::InjectedParse(n) if *n == shared);
        if lease.prepared.get(&statement.shared).is_none() && !self.unit.expects.iter().any(underway) {
            put_parse(&mut lease.output, &server_name, &statement.tail);
            self.unit.expects.push_back(Expect::InjectedParse(shared));
        }
        Some(server_name)
    }

    /// Gives a pinned backend one of the client's statements under the client's name.
    fn give(&mut self, name: &[u8], statement: &Arc<Statement>) {
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        if lease.own_names.insert(name.to_vec()) {
            put_parse(&mut lease.output, name, &statement.tail);
            self.unit.expects.push_back(Expect::InjectedParse(NameOnServer::Own(name.to_vec())));
        }
    }

    /// SQL's EXECUTE and DEALLOCATE see the protocol's names: before such a statement the backend is
    /// given all of the session's. In a Query this is done ahead, closed by a Sync of its own.
    fn materialize(&mut self) {
        if self.unit.leaves != Leaves::Pins(PinReason::SqlPrepare) || self.role != Role::Primary {
            return;
        }
        let missing: Vec<(Vec<u8>, Arc<Statement>)> = {
            let lease = self.lease.as_ref().expect("an exchange has a backend");
            self.statements
                .named()
                .filter(|(name, _)| !lease.own_names.contains(*name))
                .map(|(name, statement)| (name.clone(), statement.clone()))
                .collect()
        };
        self.pin_now(PinReason::SqlPrepare);
        for (name, statement) in missing {
            self.give(&name, &statement);
        }
    }

    /// Whether an error belongs to what we have put in ahead of a Query, closed by a Sync of ours.
    pub(super) fn is_ours(&self) -> bool {
        let ours = |e: &&Expect| !matches!(e, Expect::InjectedParse(_));
        matches!(self.unit.expects.iter().find(ours), Some(Expect::InjectedSync))
    }

    /// Closes the shared statements that the backend has above its limit, those used longest ago.
    fn evict_surplus(&mut self) {
        let limit = self.shared.config.pool.max_prepared;
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        while lease.prepared.len() > limit {
            let Some((oldest, ())) = lease.prepared.pop_lru() else { return };
            put_target(&mut lease.output, b'C', oldest.server_name().as_bytes());
            self.unit.expects.push_back(Expect::InjectedClose(oldest));
        }
    }

    fn translate_describe(&mut self, len: usize) -> Result<Step, End> {
        let body = self.client.input[self.unit.taken + HEADER..self.unit.taken + len].to_vec();
        match messages::target(&body).ok_or_else(|| End::protocol("invalid message format"))? {
            Target::Portal(_) => self.pass(len),
            Target::Statement(name) => {
                let Some(on_server) = self.resolve(name) else { return Ok(Step::Over(Outcome::Move)) };
                if self.unit.skip_to_sync {
                    return Ok(Step::On);
                }
                let lease = self.lease.as_mut().expect("an exchange has a backend");
                put_target(&mut lease.output, b'D', &on_server);
                self.take(len);
            }
        }
        self.unit.expects.push_back(Expect::Describe);
        Ok(Step::On)
    }

    fn translate_close(&mut self, len: usize) -> Result<Step, End> {
        let body = self.client.input[self.unit.taken + HEADER..self.unit.taken + len].to_vec();
        let own_names = self.uses_own_names();
        match messages::target(&body).ok_or_else(|| End::protocol("invalid message format"))? {
            Target::Statement(name) if !name.is_empty() => {
                self.statements.sent(name, None);
                let lease = self.lease.as_mut().expect("an exchange has a backend");
                if own_names && lease.own_names.remove(name) {
                    self.pass(len);
                    self.unit.expects.push_back(Expect::Close);
                } else {
                    self.take(len);
                    self.unit.expects.push_back(Expect::OwnCloseComplete);
                    self.answer_ourselves();
                }
            }
            target => {
                if let Target::Statement(_) = target {
                    let lease = self.lease.as_mut().expect("an exchange has a backend");
                    lease.unnamed = None;
                    self.statements.sent(b"", None);
                } else {
                    self.statements.sent(b"\0", None);
                }
                self.pass(len);
                self.unit.expects.push_back(Expect::Close);
            }
        }
        Ok(Step::On)
    }

    fn translate_execute(&mut self, len: usize) -> Result<Step, End> {
        let body = &self.client.input[self.unit.taken + HEADER..self.unit.taken + len];
        messages::execute(body).ok_or_else(|| End::protocol("invalid message format"))?;
        self.pass(len);
        self.unit.executed = true;
        self.unit.expects.push_back(Expect::Execute);
        Ok(Step::On)
    }

    /// Counts in what a statement of the unit does, as it is bound.
    pub(super) fn count_in(&mut self, class: crate::classify::StatementClass) {
        use crate::classify::Kind;
        self.unit.ddl |= class.kind == Kind::Ddl;
        self.unit.writes |= !matches!(class.kind, Kind::Read | Kind::Empty);
        self.leave(class.leaves);
    }
    /// Whether statements have the client's own names on the leased backend.
    fn uses_own_names(&self) -> bool {
        self.pin.is_some()
    }

    /// The leased backend is the session's from now on.
    pub(super) fn pin_now(&mut self, reason: PinReason) {
        if self.pin.is_none() {
            self.pin = Some(reason);
            self.shared.metrics.pins.inc(reason.label());
            self.shared.metrics.pinned_sessions.inc();
        }
    }
}

/// The one of two that asks for more.
pub(super) fn stronger(a: Leaves, b: Leaves) -> Leaves {
    let rank = |l: Leaves| match l {
        Leaves::Nothing => 0,
        Leaves::DeallocatesAll => 1,
        Leaves::DiscardsAll => 2,
        Leaves::Unproven => 3,
        Leaves::Pins(_) => 4,
    };
    if rank(b) > rank(a) { b } else { a }
}

fn put_cstr(out: &mut BytesMut, text: &[u8]) {
    out.put_slice(text);
    out.put_u8(0);
}

fn put_length(out: &mut BytesMut, tag: u8, body: usize) {
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
