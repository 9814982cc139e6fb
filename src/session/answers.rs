//! From the node to the client: what each answer is to, and which of them the client is to see.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Buf, BufMut, BytesMut};

use super::exchange::{
    Again, Exchange, Expect, HELD_BACK, Intake, NameOnServer, Outcome, Purpose, Refused, Step, WHOLE_MESSAGE,
    put_report,
};
use super::pins::{self, PinSet};
use super::prepared::{Found, SqlCommand};
use super::translate::{put_cstr, put_length};
use super::{End, Role, Session};
use crate::backend::{Applied, Backend, Dirt, Parameters, SharedName, parameter_status};
use crate::classify::PinReason;
use crate::classify::refusal::{self, Refusal};
use crate::wire::{self, HEADER, TransactionStatus};

impl Exchange<'_> {
    /// Looks at what the node has sent and puts what is the client's into its output.
    pub(super) fn digest(&mut self) -> Result<Step, End> {
        let mut moved = false;
        while !self.unit.over {
            if self.unit.node_rest > 0 {
                if !self.forward_rest() {
                    break;
                }
                moved = true;
                continue;
            }
            moved |= self.forward_run();
            match self.digest_message()? {
                Step::On => moved = true,
                Step::Wait => break,
                over => return Ok(over),
            }
        }
        if self.unit.redoable && !self.may_be_held_back() {
            self.commit();
            moved = true;
        }
        Ok(if moved { Step::On } else { Step::Wait })
    }

    /// Whether what was answered so far may still wait for what comes: not if it is all that the
    /// client has asked for (it waits after a Flush), and not if it is much.
    fn may_be_held_back(&self) -> bool {
        let answered = self.unit.vetted == 0
            && self.unit.expects.is_empty()
            && self.unit.intake == Intake::Open
            && self.unit.discard.is_none();
        let held = self.session.client.output.len() - self.session.output_before;
        !answered && held <= HELD_BACK
    }

    /// Passes on what has come of a long message; whether there was something.
    fn forward_rest(&mut self) -> bool {
        let n = self.unit.node_rest.min(self.backend.input.len());
        self.session.client.output.put_slice(&self.backend.input[..n]);
        self.backend.input.advance(n);
        self.unit.node_rest -= n;
        if self.unit.node_rest == 0 {
            self.answer_ourselves();
        }
        n > 0
    }

    /// The hot loop: rows, copy data and the answers around them go on in one piece, by their headers alone.
    fn forward_run(&mut self) -> bool {
        if self.unit.discard.is_some() || self.unit.node_rest > 0 || self.unit.ahead > 0 {
            return false;
        }
        let mut end = 0;
        while let Ok(Some(header)) = wire::header(&self.backend.input[end..]) {
            let behind = end + header.len;
            if matches!(header.tag, b'D' | b'd') {
                self.commit();
            } else if behind > self.backend.input.len() || !self.passes(header.tag, end, header.len) {
                break;
            }
            end = behind;
            if end > self.backend.input.len() || self.is_our_turn() {
                break;
            }
        }
        if end == 0 {
            return false;
        }
        self.forward(end);
        self.answer_ourselves();
        true
    }

    /// Whether the message of `len` bytes that begins at `at` of the node's input is the client's, and all that is to be
    /// done about it is to pass it on: an answer to what the client itself has asked. Anything else is looked at by
    /// itself ([`digest_message`](Self::digest_message)).
    fn passes(&mut self, tag: u8, at: usize, len: usize) -> bool {
        if self.unit.unreplicated || self.unit.held_back.is_some() {
            return false;
        }
        match (tag, self.unit.expects.front()) {
            (b'T', Some(Expect::Query)) => {}
            (b'2', Some(Expect::Bind(_))) | (b'T' | b'n', Some(Expect::Describe(None))) => _ = self.settle(),
            (b'C', Some(Expect::Query | Expect::Execute)) if !self.backend.socket.is_closed() => {
                let executed = matches!(self.unit.expects.front(), Some(Expect::Execute));
                self.completed(tag, at, len);
                self.commit();
                if executed {
                    self.settle();
                }
            }
            _ => return false,
        }
        true
    }

    /// Whether what is awaited next is an answer of ours.
    fn is_our_turn(&self) -> bool {
        matches!(
            self.unit.expects.front(),
            Some(Expect::OwnParseComplete | Expect::OwnCloseComplete | Expect::CopyEnd)
        )
    }

    fn digest_message(&mut self) -> Result<Step, End> {
        let node = self.backend.node;
        let header = match wire::header(&self.backend.input) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(Step::Wait),
            Err(_) => return Err(End::NodeLost { node }),
        };
        let whole = self.backend.input.len() >= header.len;
        if matches!(header.tag, b'C' | b's' | b'I' | b'V' | b'Z') && self.backend.socket.is_closed() {
            // A node that is being left has completed something: that must not be passed on as done.
            return Err(End::NodeLost { node });
        }
        if whole && header.tag != b'Z' && header.tag != b'N' {
            self.not_the_last();
        }
        if self.unit.discard.is_some() {
            return self.discard_message(header, whole);
        }
        if self.unit.ahead > 0 && header.tag != b'A' {
            return self.injected_answer(header, whole);
        }
        match header.tag {
            // Long ones are passed on as they come.
            b'D' | b'd' => Ok(Step::Wait),
            b'T' | b't' | b'V'
                if !whole
                    && header.len > WHOLE_MESSAGE / 4
                    && !matches!(self.unit.expects.front(), Some(Expect::InjectedDescribe(_))) =>
            {
                self.commit();
                self.answered(header.tag)?;
                self.forward(header.len);
                Ok(Step::On)
            }
            b'E' if !whole && header.len > WHOLE_MESSAGE && !self.is_ours() => self.long_error(header.len),
            b'N' if !whole && header.len > WHOLE_MESSAGE => {
                self.commit();
                self.forward(header.len);
                Ok(Step::On)
            }
            _ if !whole && header.len > WHOLE_MESSAGE => Err(End::NodeLost { node }),
            _ if !whole => Ok(Step::Wait),
            b'Z' => self.ready(header.len),
            b'E' => self.error(header.len),
            b'S' => {
                let message = self.backend.input.split_to(header.len);
                self.backend.report(&message[HEADER..]);
                self.session.tell_parameter(&message[HEADER..]);
                Ok(Step::On)
            }
            b'A' => {
                self.commit();
                let message = self.backend.input.split_to(header.len);
                self.session.notification(self.backend, message);
                Ok(Step::On)
            }
            b'N' => {
                let fields = wire::error_fields(&self.backend.input[HEADER..header.len]);
                if self.unit.redoable && fields.routine == b"quickdie" {
                    // The server is being restarted after a crash, or stopped at once: this is all that
                    // the backend will say.
                    return Ok(self.discard(Again::NodeLost, true));
                }
                if fields.routine == b"SyncRepWaitForLSN" {
                    return Ok(self.not_replicated(header.len));
                }
                self.commit();
                self.forward(header.len);
                Ok(Step::On)
            }
            b'G' | b'H' | b'W' => {
                self.commit();
                self.forward(header.len);
                if header.tag == b'G' {
                    self.copy_in_begins();
                }
                Ok(Step::On)
            }
            tag => {
                let ours = matches!(self.unit.expects.front(), Some(Expect::InjectedExecute(_)));
                if matches!(tag, b'C' | b'I' | b's') && !ours {
                    self.completed(tag, 0, header.len);
                }
                if !matches!(tag, b'1' | b'2' | b'3' | b't' | b'T' | b'n') && !ours {
                    self.commit();
                }
                if self.unit.discard.is_none()
                    && matches!(
                        self.unit.expects.front(),
                        Some(Expect::InjectedDescribe(_) | Expect::Describe(Some(_)))
                    )
                    && let Some(step) = self.described(tag, header.len)?
                {
                    return Ok(step);
                }
                let holds = tag == b'C'
                    && self.unit.unreplicated
                    && matches!(self.unit.expects.front(), Some(Expect::Query));
                if self.answered(tag)? {
                    if holds {
                        self.unit.held_back = Some(self.backend.input.split_to(header.len)[..].into());
                    } else {
                        self.forward(header.len);
                    }
                } else {
                    self.backend.input.advance(header.len);
                }
                self.answer_ourselves();
                Ok(Step::On)
            }
        }
    }

    /// The server has stopped waiting for a synchronous replica to have a commit, and goes on as if it had one. Its
    /// notice says so in words of its language, which few clients look for; the unit's answer ends in an error instead.
    fn not_replicated(&mut self, len: usize) -> Step {
        self.commit();
        self.backend.input.advance(len);
        self.unit.unreplicated = true;
        Step::On
    }

    /// A message comes behind a CommandComplete that was held back because it might have been the last.
    fn not_the_last(&mut self) {
        if let Some(message) = self.unit.held_back.take() {
            self.session.client.output.put_slice(&message);
        }
    }

    /// Passes the message at the start of the backend's input (or what of it is there) on.
    fn forward(&mut self, len: usize) {
        let there = len.min(self.backend.input.len());
        self.session.client.output.put_slice(&self.backend.input[..there]);
        self.backend.input.advance(there);
        self.unit.node_rest = len - there;
    }

    /// An answer to a Describe of a statement whose shape is to be known. `Some`: what becomes of the unit.
    fn described(&mut self, tag: u8, len: usize) -> Result<Option<Step>, End> {
        let body = &self.backend.input[HEADER..len];
        let (Some(Expect::InjectedDescribe(asked)) | Some(Expect::Describe(Some(asked)))) =
            self.unit.expects.front_mut()
        else {
            return Ok(None);
        };
        let reader = match tag {
            b't' => {
                asked.reader.parameters(body);
                return Ok(None);
            }
            b'T' | b'n' => std::mem::take(&mut asked.reader),
            _ => return Ok(None),
        };
        let node = self.backend.node;
        let shape = reader.row((tag == b'T').then_some(body)).ok_or(End::NodeLost { node })?;
        if let NameOnServer::Shared(name) = asked.on
            && let Some(there) = self.backend.prepared.peek_mut(&name)
        {
            there.shape = Some(shape);
        }
        if let Some(told) = asked.told.take() {
            self.session.client.output.put_slice(&told);
            self.backend.input.advance(len);
            self.settle();
            self.answer_ourselves();
            return Ok(Some(Step::On));
        }
        if !asked.compare {
            asked.statement.give_shape(shape, self.unit.number);
            asked.statement.keep_description(&self.backend.input[..len]);
            return Ok(None);
        }
        if asked.statement.compare_shape(shape) || std::mem::take(&mut self.unit.awaits_shape) {
            self.unit.awaits_shape = false;
            return Ok(None);
        }
        // What was sent behind it goes by another shape. Run again, it fails before it is sent.
        if self.unit.redoable {
            return Ok(Some(self.discard(Again::StaleStatement, false)));
        }
        if let NameOnServer::Own(_) = asked.on {
            // One of those that the backend was given all at once, for SQL that may name any of them. It fails
            // when it is bound; what runs now shows its own columns.
            return Ok(None);
        }
        Err(End::NodeLost { node })
    }

    /// An answer came: what was it to? Whether it is the client's.
    fn answered(&mut self, tag: u8) -> Result<bool, End> {
        let for_client = match (tag, self.unit.expects.front()) {
            (b'1', Some(Expect::Parse(_))) | (b'3', Some(Expect::Close(_))) => {
                self.session.statements.succeeded();
                true
            }
            (b'1', Some(Expect::InjectedParse(_)))
            | (b'3', Some(Expect::InjectedClose(..)))
            | (b'T' | b'n', Some(Expect::InjectedDescribe(_)))
            | (b'2', Some(Expect::InjectedBind))
            | (b'C', Some(Expect::InjectedExecute(_))) => false,
            (b'2', Some(Expect::Bind(_)))
            | (b'3', Some(Expect::ClosePortal))
            | (b'T' | b'n', Some(Expect::Describe(_)))
            | (b'C' | b'I' | b's', Some(Expect::Execute)) => true,
            // Answers that leave what is awaited as it is.
            (b't', Some(Expect::InjectedDescribe(_))) => return Ok(false),
            (b't', Some(Expect::Describe(_)))
            | (b'T' | b'C' | b'I', Some(Expect::Query))
            | (b'c', Some(Expect::Query | Expect::Execute))
            | (b'V', Some(Expect::FunctionCall)) => return Ok(true),
            _ => {
                tracing::error!(
                    node = self.backend.node.0,
                    tag = %char::from(tag),
                    awaited = ?self.unit.expects.front(),
                    "a node sent a message that nothing asked for; its connection is closed"
                );
                return Err(End::NodeLost { node: self.backend.node });
            }
        };
        match self.settle() {
            Some(Expect::Parse(name) | Expect::InjectedParse(name)) => self.parsed(name),
            Some(Expect::Close(NameOnServer::Unnamed) | Expect::InjectedClose(NameOnServer::Unnamed, _)) => {
                self.unit.unnamed = None
            }
            // A cursor WITH HOLD is a portal, too.
            Some(Expect::ClosePortal) => self.unit.ends |= PinSet::of(PinReason::HoldCursor),
            _ => {}
        }
        Ok(for_client)
    }

    /// A command has run. Two of them take all named statements from the server at this very moment,
    /// whatever becomes of the rest of the unit.
    fn completed(&mut self, tag: u8, at: usize, len: usize) {
        let body = at + HEADER..at + len;
        let number = self.unit.completed;
        self.unit.completed += 1;
        if let Some((_, changes)) = self.unit.settings.pop_front_if(|(command, _)| *command <= number) {
            if tag == b'C' {
                self.session.settings.completed(changes);
            } else {
                // Rows are still to come, and with them perhaps more calls.
                self.session.settings.perhaps(changes);
            }
        }
        if tag == b'C' && self.session.settings.is_pending() {
            self.session.settings.command(&self.backend.input[body.start..body.end - 1]);
        }
        if tag == b'C' {
            let tag = &self.backend.input[body.clone()];
            self.unit.commands += 1;
            self.unit.rollback = tag == b"ROLLBACK\0";
            if self.session.pins.hold() {
                self.unit.ends |= pins::ended_by(tag, self.unit.writes);
            }
            if self.session.sql.is_some() {
                self.completed_by_name(body.clone());
            }
        }
        let tag = &self.backend.input[body];
        self.unit.discarded |= tag == b"DISCARD ALL\0";
        if matches!(tag, b"DEALLOCATE ALL\0" | b"DISCARD ALL\0") {
            self.session.statements.clear();
            self.backend.forget_statements();
            // What is parsed behind it comes after it.
            for expect in &self.unit.expects {
                if let Expect::Parse(NameOnServer::Own(name))
                | Expect::InjectedParse(NameOnServer::Own(name))
                | Expect::InjectedExecute(name) = expect
                {
                    self.backend.own_names.insert(name.clone());
                }
            }
        }
    }

    /// A Query that is about one name has run: from now on the name is there, or gone, whatever becomes of
    /// the transaction.
    fn completed_by_name(&mut self, tag: Range<usize>) {
        match (&self.backend.input[tag], self.session.sql.take()) {
            (b"PREPARE\0", Some(SqlCommand::Prepare(name, statement))) => {
                self.backend.own_names.insert(name.clone());
                self.session.statements.add(name, statement);
            }
            (b"DEALLOCATE\0", Some(SqlCommand::Deallocate(name))) => {
                self.backend.own_names.remove(&name);
                self.session.statements.remove(&name);
                // This backend has followed.
                self.backend.names_of = self.session.statements.version();
            }
            _ => {}
        }
    }

    /// What was awaited first has come.
    fn settle(&mut self) -> Option<Expect> {
        self.unit.urged = self.unit.urged.saturating_sub(1);
        self.unit.expects.pop_front()
    }

    fn parsed(&mut self, name: NameOnServer) {
        match name {
            NameOnServer::Refused(name) => {
                self.backend.own_names.insert(name);
            }
            NameOnServer::Unnamed => {
                // Whoever has sent it: it is the one that the client's stands for by now.
                self.unit.unnamed = match self.session.statements.answered(b"") {
                    Found::Statement(statement) => Some(statement.serial),
                    Found::OnBackend | Found::Nothing => None,
                };
            }
            NameOnServer::Shared(_) | NameOnServer::Own(_) | NameOnServer::Unknown => {}
        }
    }

    /// Gives the answers that are ours and whose turn it is; never into the middle of a message.
    pub(super) fn answer_ourselves(&mut self) {
        while self.unit.node_rest == 0 {
            let tag = match self.unit.expects.front() {
                Some(Expect::OwnParseComplete) => b'1',
                Some(Expect::OwnCloseComplete) => b'3',
                Some(Expect::CopyEnd) => {
                    self.settle();
                    continue;
                }
                _ => return,
            };
            self.session.client.output.put_slice(&[tag, 0, 0, 0, 4]);
            self.session.statements.succeeded();
            self.settle();
        }
    }

    /// After an error in the extended protocol nothing up to the next Sync is answered, not even a Query:
    /// what Parse and Close would have done to the backend has not happened. Undone from the last to the
    /// first.
    fn skip_expected(&mut self) {
        let parsing_unnamed = match self.unit.expects.front() {
            Some(Expect::Parse(NameOnServer::Unnamed)) => true,
            // It may be what stands for the unnamed one.
            Some(Expect::Parse(NameOnServer::Shared(_))) => self.session.statements.awaits_unnamed(),
            _ => false,
        };
        // What was sent behind a Sync of ours is not skipped with what was put in ahead of it.
        if !self.is_ours() {
            self.session.statements.failed(parsing_unnamed);
        }
        if matches!(self.unit.expects.front(), Some(Expect::Query | Expect::FunctionCall)) {
            return;
        }
        if matches!(
            self.unit.expects.front(),
            Some(Expect::Parse(NameOnServer::Unnamed) | Expect::InjectedParse(NameOnServer::Unnamed))
        ) {
            // The server drops the old one first.
            self.unit.unnamed = None;
        }
        let is_sync = |e: &Expect| matches!(e, Expect::Sync | Expect::InjectedSync);
        let skipped = self.unit.expects.iter().position(is_sync).unwrap_or(self.unit.expects.len());
        let skipped: Vec<Expect> = self.unit.expects.drain(..skipped).collect();
        (self.unit.awaits_shape, self.unit.awaits_all, self.unit.urged) = (false, false, 0);
        // A Query that is still to run takes it.
        let query = self.unit.expects.iter().any(|e| matches!(e, Expect::Query));
        self.backend.unnamed = self.unit.unnamed.filter(|_| !query);
        if self.unit.expects.is_empty() {
            // The Sync is still to come, even if a Query seemed to be the unit's end.
            self.unit.intake = Intake::Open;
            self.unit.skip_to_sync = true;
        }
        for expect in skipped.into_iter().rev() {
            match expect {
                Expect::Parse(name) | Expect::InjectedParse(name) => self.not_parsed(name),
                Expect::InjectedExecute(name) => {
                    self.backend.own_names.remove(&name);
                }
                Expect::InjectedClose(NameOnServer::Shared(name), was) => {
                    self.backend.prepared.put(name, was);
                }
                Expect::Close(name) | Expect::InjectedClose(name, _) => self.not_closed(name),
                _ => {}
            }
        }
    }

    fn not_parsed(&mut self, name: NameOnServer) {
        match name {
            NameOnServer::Own(name) => {
                self.backend.own_names.remove(&name);
            }
            NameOnServer::Shared(name) => {
                self.backend.prepared.pop(&name);
            }
            NameOnServer::Unnamed | NameOnServer::Refused(_) | NameOnServer::Unknown => {}
        }
    }

    fn not_closed(&mut self, name: NameOnServer) {
        match name {
            NameOnServer::Own(name) => {
                self.backend.own_names.insert(name);
            }
            NameOnServer::Shared(_)
            | NameOnServer::Unnamed
            | NameOnServer::Refused(_)
            | NameOnServer::Unknown => {}
        }
    }

    fn error(&mut self, len: usize) -> Result<Step, End> {
        if self.is_ours() {
            return Ok(self.not_given(len));
        }
        let fields = wire::error_fields(&self.backend.input[HEADER..len]);
        let fatal = matches!(fields.severity, b"FATAL" | b"PANIC");
        // A client that has cancelled wants no second try; and of the primary's errors only its end
        // leaves a read to be run elsewhere.
        let final_word = !self.unit.redoable || self.backend.cancel.was_sent();
        let stale = self.is_stale_statement(len);
        let fields = wire::error_fields(&self.backend.input[HEADER..len]);
        let again = match refusal::of(&fields) {
            _ if final_word => None,
            _ if stale => Some(Again::StaleStatement),
            Refusal::Shutdown if fatal => Some(Again::NodeLost),
            _ if self.session.role != Role::Replica => None,
            Refusal::NotAReadAfterAll => Some(Again::NotARead),
            Refusal::LateReplica => Some(Again::LateReplica),
            Refusal::Installation => Some(Again::Installation),
            Refusal::Damage => Some(Again::Damage),
            Refusal::RecoveryConflict => Some(Again::Conflict),
            Refusal::Shutdown => Some(Again::NodeLost),
            Refusal::None => None,
        };
        if let Some(again) = again {
            return Ok(self.discard(again, fatal));
        }
        if self.unit.writes && fatal && refusal::is_postmaster_gone(&fields) {
            return Err(End::NodeLost { node: self.backend.node });
        }
        self.commit();
        if matches!(self.unit.expects.front(), Some(Expect::Query)) {
            // It leaves COPY; what the client still sends of it is dropped.
            self.unit.intake = Intake::Closed;
        }
        self.unit.failed = true;
        match self.unit.expects.front() {
            Some(Expect::Query) if !fatal && self.unit.not_given.is_some() => {
                let message = self.unit.not_given.take().unwrap_or_default();
                self.session.client.output.put_slice(&message);
                self.backend.input.advance(len);
            }
            Some(Expect::OwnError(report)) if !fatal => {
                put_report(&mut self.session.client.output, report);
                self.backend.input.advance(len);
            }
            _ => self.forward_error(len),
        }
        self.skip_expected();
        if fatal {
            return Err(End::NodeSaidFatal);
        }
        Ok(Step::On)
    }

    /// What a Query needs the backend to know could not be given. The Query itself fails now, for lack of it.
    fn not_given(&mut self, len: usize) -> Step {
        if self.unit.redoable && self.session.role == Role::Replica {
            // It may be late.
            return self.discard(Again::LateReplica, false);
        }
        let message = self.backend.input.split_to(len).to_vec();
        if self.session.sql.is_some() {
            self.unit.not_given = Some(message);
        }
        self.skip_expected();
        Step::On
    }

    /// Whether an error says that a shared statement, which is older than the client's Parse of the text, is out
    /// of date. Whoever has gone by its shape before is to be told so, as by one server; nobody else.
    fn is_stale_statement(&mut self, len: usize) -> bool {
        let statement = match self.unit.expects.front() {
            // All that was sent before it is answered: the name stands for what it did then.
            Some(Expect::Bind(name)) => match self.session.statements.answered(name) {
                Found::Statement(statement) if !name.is_empty() || statement.is_shared_unnamed() => statement,
                Found::Statement(_) | Found::OnBackend | Found::Nothing => return false,
            },
            Some(Expect::Describe(Some(asked))) if asked.on != NameOnServer::Unnamed => {
                asked.statement.clone()
            }
            _ => return false,
        };
        let unseen = statement.take_shape_back(self.unit.number);
        if self.session.uses_own_names() {
            return false;
        }
        let fields = wire::error_fields(&self.backend.input[HEADER..len]);
        if statement.is_shared_unnamed()
            && matches!(fields.sqlstate.get(..2), Some(b"0A" | b"22" | b"26" | b"42"))
        {
            // The client has had it parsed just now, and knows nothing of an older one: if this comes of what has
            // changed since that was parsed, a statement parsed anew does better; if not, it fails alike.
            return unseen && !self.unit.anew;
        }
        match (fields.sqlstate, fields.routine) {
            (b"0A000", b"RevalidateCachedQuery") => {
                if let Some(there) = self.backend.prepared.peek_mut(&statement.shared) {
                    there.stale = true;
                }
                unseen && !self.unit.anew
            }
            // SQL that is hidden from us has taken it from the server.
            (b"26000", b"FetchPreparedStatement") => {
                self.backend.prepared.pop(&statement.shared);
                !self.unit.anew
            }
            _ => false,
        }
    }

    /// An error that is too long to be looked at whole is passed on as it comes: it is none of the refusals
    /// after which a unit runs again, nor one that names a statement, for those are short.
    fn long_error(&mut self, len: usize) -> Result<Step, End> {
        // Severity and SQLSTATE come first.
        let fatal = matches!(wire::error_fields(&self.backend.input[HEADER..]).severity, b"FATAL" | b"PANIC");
        if fatal {
            return Err(End::NodeLost { node: self.backend.node });
        }
        self.commit();
        if matches!(self.unit.expects.front(), Some(Expect::Query)) {
            self.unit.intake = Intake::Closed;
        }
        self.unit.failed = true;
        self.forward(len);
        self.skip_expected();
        Ok(Step::On)
    }

    /// Passes an error on as it is; but a statement's name that only we and the server know is the
    /// client's own.
    fn forward_error(&mut self, len: usize) {
        let body = &self.backend.input[HEADER..len];
        let Some((at, shared)) = SharedName::find_in(body) else { return self.forward(len) };
        let own = match self.unit.expects.front() {
            Some(Expect::Bind(name)) => name.clone(),
            _ => self.session.statements.name_of(shared).unwrap_or_default(),
        };
        let body = [&body[..at], &own, &body[at + SharedName::LENGTH..]].concat();
        put_length(&mut self.session.client.output, b'E', body.len());
        self.session.client.output.put_slice(&body);
        self.backend.input.advance(len);
    }

    /// The answer so far is not shown: the unit runs again elsewhere once the backend is ready for others.
    fn discard(&mut self, again: Again, fatal: bool) -> Step {
        self.session.client.output.truncate(self.session.output_before);
        self.unit.discard = Some(again);
        if fatal || self.unit.intake != Intake::Closed {
            // It is closing, or no ReadyForQuery is on its way: the backend is not worth keeping.
            return Step::Over(Outcome::Again(again));
        }
        Step::On
    }

    fn discard_message(&mut self, header: wire::Header, whole: bool) -> Result<Step, End> {
        if !whole {
            if header.len > WHOLE_MESSAGE {
                return Err(End::NodeLost { node: self.backend.node });
            }
            return Ok(Step::Wait);
        }
        let message = self.backend.input.split_to(header.len);
        match header.tag {
            b'S' => self.backend.report(&message[HEADER..]),
            // Of a Query of ours ahead of the unit: the unit's own is still to come.
            b'Z' if self.unit.ahead > 0 => {
                self.unit.ahead -= 1;
                self.unit.expects.pop_front();
            }
            // Of a Sync of ours ahead of a Query, whose own is still to come.
            b'Z' if self.is_ours() => {
                let sync = self.unit.expects.iter().position(|e| matches!(e, Expect::InjectedSync));
                self.unit.expects.drain(..=sync.unwrap_or(0));
            }
            b'Z' => {
                // Which of the injected statements exist is not known: forget them all, and clean.
                self.backend.dirt = self.backend.dirt.max(Dirt::State);
                self.backend.unnamed = None;
                self.unit.over = true;
                let again = self.unit.discard.unwrap_or(Again::NodeLost);
                return Ok(Step::Over(Outcome::Again(again)));
            }
            _ => {}
        }
        Ok(Step::On)
    }

    /// The answer to a Query of ours ahead of the unit. Nothing of it is the client's but notifications, and
    /// an error that only one server would have given: the unit then counts as failed by it.
    fn injected_answer(&mut self, header: wire::Header, whole: bool) -> Result<Step, End> {
        let node = self.backend.node;
        if !whole {
            return if header.len > WHOLE_MESSAGE { Err(End::NodeLost { node }) } else { Ok(Step::Wait) };
        }
        match header.tag {
            b'E' => self.injected_error(header.len),
            b'Z' => self.injected_ready(header.len),
            b'S' => {
                let message = self.backend.input.split_to(header.len);
                // The client is told of what differs in the end, once all of it is answered.
                self.backend.report(&message[HEADER..]);
                Ok(Step::On)
            }
            b'T' | b'D' | b'C' | b'N' => {
                self.backend.input.advance(header.len);
                Ok(Step::On)
            }
            _ => Err(End::NodeLost { node }),
        }
    }

    fn injected_error(&mut self, len: usize) -> Result<Step, End> {
        let fields = wire::error_fields(&self.backend.input[HEADER..len]);
        let fatal = matches!(fields.severity, b"FATAL" | b"PANIC");
        if !fatal
            && self.unit.refused.is_none()
            && matches!(self.unit.expects.front(), Some(Expect::InjectedQuery(Purpose::Fail)))
        {
            self.backend.input.advance(len);
            return Ok(Step::On);
        }
        self.session.shared.metrics.injected_failures.inc();
        if self.unit.redoable && (fatal || self.session.role == Role::Replica) {
            // A replica may not know yet what the session leans on (a role, a schema).
            let again = if fatal { Again::NodeLost } else { Again::LateReplica };
            // It is left in an aborted transaction.
            self.backend.dirt = Dirt::Unknown;
            return Ok(self.discard(again, fatal));
        }
        self.commit();
        if self.unit.before == TransactionStatus::Idle {
            // Whatever it was left with: nobody gets it any more.
            self.backend.dirt = Dirt::Unknown;
        }
        if fatal {
            self.forward(len);
            return Err(End::NodeSaidFatal);
        }
        let message = self.backend.input.split_to(len).to_vec();
        let output = self.session.client.output.len();
        self.unit.refused.get_or_insert(Refused { output, message });
        Ok(Step::On)
    }

    fn injected_ready(&mut self, len: usize) -> Result<Step, End> {
        let node = self.backend.node;
        let status = self.backend.input.get(HEADER).copied().and_then(TransactionStatus::from_byte);
        let Some(status) = status else { return Err(End::NodeLost { node }) };
        self.backend.input.advance(len);
        self.unit.ahead -= 1;
        self.unit.unnamed = None;
        let purpose = match self.unit.expects.pop_front() {
            Some(Expect::InjectedQuery(purpose)) => purpose,
            _ => return Err(End::NodeLost { node }),
        };
        if let Some(refused) = &mut self.unit.refused {
            if self.unit.begun && self.unit.writes && status == TransactionStatus::Idle {
                // It has failed before (or without) a transaction of its own, which so does not keep what was sent
                // behind it from running: nobody knows what becomes of that.
                return Err(End::NodeLost { node });
            }
            if self.unit.ahead > 0 || self.unit.begun {
                return Ok(Step::On);
            }
            if self.unit.before != TransactionStatus::Idle {
                self.session.status = status;
            }
            return Ok(Step::Over(Outcome::Refused(std::mem::take(&mut refused.message))));
        }
        match purpose {
            Purpose::Settings => {
                let wanted = || self.session.settings.wanted().clone();
                self.backend.applied = self.unit.applies.take().unwrap_or_else(wanted);
                let parameters = self.backend.parameters.clone();
                self.session.tell_differences(&parameters);
            }
            Purpose::Sequences | Purpose::Durability => {}
            Purpose::Listen => {
                self.backend.dirt = self.backend.dirt.max(Dirt::State);
                self.session.listens_again();
                self.session.show_pins();
            }
            Purpose::Begin if status == TransactionStatus::InTransaction => {
                self.session.transaction_opened();
            }
            Purpose::Fail if status == TransactionStatus::Failed => {}
            Purpose::Begin | Purpose::Fail => return Err(End::NodeLost { node: self.backend.node }),
            Purpose::Own => {
                let mut applied = Applied::clone(&self.backend.applied);
                for name in super::own::NAMES {
                    // Whoever comes next has it reset.
                    applied.put(name, Some(Arc::from("")));
                }
                self.backend.applied = Arc::new(applied);
            }
        }
        if self.unit.ahead == 0 && !self.session.handle.running(&self.backend.cancel) {
            // A cancel has come meanwhile: it was meant for the unit.
            if !self.unit.begun && self.unit.expects.is_empty() && self.unit.before == TransactionStatus::Idle
            {
                return Ok(Step::Over(Outcome::Cancelled));
            }
            self.session.handle.begin();
            let _ = self.session.handle.running(&self.backend.cancel);
            if self.unit.begun {
                self.session.stop_statement(&self.backend.cancel);
            }
        }
        self.answer_ourselves();
        Ok(Step::On)
    }

    fn ready(&mut self, len: usize) -> Result<Step, End> {
        let node = self.backend.node;
        let status = self.backend.input.get(HEADER).copied().and_then(TransactionStatus::from_byte);
        let (Some(status), true) = (status, len == HEADER + 1) else { return Err(End::NodeLost { node }) };
        match self.settle() {
            Some(Expect::InjectedSync) => {
                self.backend.input.advance(len);
                return Ok(Step::On);
            }
            Some(Expect::Sync | Expect::FunctionCall) => {}
            // One that an error made the server skip leaves the unnamed statement alone.
            Some(Expect::Query) => {
                self.session.statements.drop_unnamed();
                self.backend.unnamed = None;
            }
            // COPY failed before it had read the Sync, which so was none to be ignored.
            None if self.unit.ignored_sync && self.unit.failed => {}
            other => {
                tracing::error!(node = node.0, awaited = ?other, "a node sent ReadyForQuery out of turn");
                return Err(End::NodeLost { node });
            }
        }
        // Never a late answer of an earlier epoch's primary.
        if self.session.role == Role::Primary
            && self.backend.epoch != self.session.shared.topology.load().epoch
        {
            return Err(End::NodeLost { node });
        }
        self.commit();
        if let Some(refused) = &self.unit.refused {
            // The unit has failed in the transaction that a Query of ours had left aborted.
            self.backend.input.advance(len);
            self.session.client.output.truncate(refused.output);
            self.session.client.output.put_slice(&refused.message);
            self.session.status = match (&self.session.lazy, self.unit.before) {
                (Some(_), _) => TransactionStatus::Failed,
                (None, TransactionStatus::Idle) => TransactionStatus::Idle,
                (None, _) => status,
            };
            self.session.put_ready();
        } else if self.session.is_apart() {
            // A transaction of the read's own is over, the session's is not.
            if status != TransactionStatus::Idle {
                return Err(End::NodeLost { node });
            }
            self.backend.input.advance(len);
            self.session.has_queried(self.unit);
            if self.unit.failed {
                self.session.status = TransactionStatus::Failed;
            }
            self.session.put_ready();
        } else {
            if std::mem::take(&mut self.unit.unreplicated) {
                // In place of what says that it was done.
                self.unit.held_back = None;
                self.session.shared.metrics.unreplicated_commits.inc();
                put_report(&mut self.session.client.output, &super::loss::unreplicated());
            }
            self.forward(len);
            self.session.status = status;
        }
        self.unit.intake = Intake::Closed;
        self.unit.over = true;
        if !self.unit.expects.is_empty() {
            tracing::error!(node = node.0, left = ?self.unit.expects.front(), "answers are missing");
            self.backend.dirt = Dirt::Unknown;
        }
        Ok(Step::On)
    }

    /// The server asks for COPY data. It ignores a Sync that the client has sent along with Execute; and
    /// the client may have sent all of the data already.
    fn copy_in_begins(&mut self) {
        if !matches!(self.unit.expects.front(), Some(Expect::Query)) {
            if matches!(self.unit.expects.get(1), Some(Expect::Sync)) {
                self.unit.expects.remove(1);
                self.unit.urged = self.unit.urged.saturating_sub(1);
                self.unit.ignored_sync = true;
            }
            if matches!(self.unit.expects.get(1), Some(Expect::CopyEnd)) {
                return;
            }
        }
        self.unit.intake = Intake::CopyIn;
    }
}

impl Session {
    /// A ParameterStatus of the backend: the client is told if it differs from what it was told last.
    pub(super) fn tell_parameter(&mut self, body: &[u8]) {
        let Some((name, value)) = parameter_status(body) else { return };
        self.tell(name, value);
    }

    /// A parameter has this value now: the client is told if it was told another.
    pub(super) fn tell(&mut self, name: &[u8], value: &[u8]) {
        // One server that takes writes is what the client sees.
        if name == b"in_hot_standby" || self.reported.get(name) == Some(value) {
            return;
        }
        if name == b"application_name" {
            self.handle.facts.call_application(value);
        }
        Arc::make_mut(&mut self.reported).insert(name, value);
        put_parameter(&mut self.client.output, name, value);
        self.lexing_changed();
    }

    /// Tells the client where a newly leased backend's parameters differ from what it was told.
    pub(super) fn tell_differences(&mut self, theirs: &Arc<Parameters>) {
        if theirs.shows_the_same(&self.reported) {
            return;
        }
        for (name, value) in theirs.shown() {
            self.tell(name, value);
        }
    }

    /// A notification: its sender's process id becomes the one that the sending session was given, if it is
    /// known which that is; but to a session that has asked for the server's own (`pg_backend_pid()`), and keeps that process
    /// since, its own notifications say what it was answered. (The listener is on the primary, and its next statement runs after this: it
    /// sees what the sender has committed.)
    pub(super) fn notification(&mut self, backend: &Backend, mut message: BytesMut) {
        if let Some(pid) = message[HEADER..].first_chunk::<4>() {
            let pid = i32::from_be_bytes(*pid);
            let sender = if pid == backend.cancel.pid {
                (!self.pins.now().has(PinReason::BackendPid)).then_some(self.handle.pid)
            } else {
                let deaf_since = self.deaf_since.unwrap_or_else(Instant::now);
                self.shared.sessions.senders.sender(backend.node, pid, deaf_since, self.listens_since)
            };
            if let Some(sender) = sender {
                message[HEADER..HEADER + 4].copy_from_slice(&sender.to_be_bytes());
            }
        }
        self.client.output.put_slice(&message);
    }

    /// Whether statements have the client's own names on the leased backend.
    pub(super) fn uses_own_names(&self) -> bool {
        self.pins.hold()
    }
}

fn put_parameter(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    put_length(out, b'S', name.len() + value.len() + 2);
    put_cstr(out, name);
    put_cstr(out, value);
}
