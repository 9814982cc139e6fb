//! From the node to the client: what each answer is to, and which of them the client is to see.

use std::sync::Arc;

use bytes::{Buf, BufMut, BytesMut};

use super::exchange::{
    Again, Exchange, Expect, HELD_BACK, Intake, MOST_AWAITED, NameOnServer, Outcome, Step, WHOLE_MESSAGE,
    put_report,
};
use super::translate::{put_cstr, put_length};
use super::{End, Role, Session};
use crate::backend::{Backend, Dirt, Parameters, SharedName, parameter_status};
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

    /// The hot loop: rows and copy data go on in one piece, by their headers alone.
    fn forward_run(&mut self) -> bool {
        if self.unit.discard.is_some() || self.unit.node_rest > 0 {
            return false;
        }
        let mut end = 0;
        while let Ok(Some(header)) = wire::header(&self.backend.input[end..]) {
            if !matches!(header.tag, b'D' | b'd') {
                break;
            }
            end += header.len;
            if end > self.backend.input.len() {
                break;
            }
        }
        if end == 0 {
            return false;
        }
        self.commit();
        self.forward(end);
        true
    }

    fn digest_message(&mut self) -> Result<Step, End> {
        let node = self.backend.node;
        let header = match wire::header(&self.backend.input) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(Step::Wait),
            Err(_) => return Err(End::NodeLost { node }),
        };
        let whole = self.backend.input.len() >= header.len;
        if self.unit.discard.is_some() {
            return self.discard_message(header, whole);
        }
        match header.tag {
            // Long ones are passed on as they come.
            b'D' | b'd' => Ok(Step::Wait),
            b'T' | b't' | b'V' if !whole && header.len > WHOLE_MESSAGE / 4 => {
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
                self.session.notification(self.backend, header.len);
                Ok(Step::On)
            }
            b'N' => {
                let fields = wire::error_fields(&self.backend.input[HEADER..header.len]);
                if self.unit.redoable && fields.routine == b"quickdie" {
                    // The server is being restarted after a crash, or stopped at once: this is all that
                    // the backend will say.
                    return Ok(self.discard(Again::NodeLost, true));
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
                if tag == b'C' {
                    self.completed(header.len);
                }
                if !matches!(tag, b'1' | b'2' | b'3' | b't' | b'T' | b'n') {
                    self.commit();
                }
                if self.answered(tag)? {
                    self.forward(header.len);
                } else {
                    self.backend.input.advance(header.len);
                }
                self.answer_ourselves();
                Ok(Step::On)
            }
        }
    }

    /// Passes the message at the start of the backend's input (or what of it is there) on.
    fn forward(&mut self, len: usize) {
        let there = len.min(self.backend.input.len());
        self.session.client.output.put_slice(&self.backend.input[..there]);
        self.backend.input.advance(there);
        self.unit.node_rest = len - there;
    }

    /// An answer came: what was it to? Whether it is the client's.
    fn answered(&mut self, tag: u8) -> Result<bool, End> {
        let for_client = match (tag, self.unit.expects.front()) {
            (b'1', Some(Expect::Parse(_))) | (b'3', Some(Expect::Close(_))) => {
                self.session.statements.succeeded();
                true
            }
            (b'1', Some(Expect::InjectedParse(_))) | (b'3', Some(Expect::InjectedClose(_))) => false,
            (b'2', Some(Expect::Bind(_)))
            | (b'3', Some(Expect::ClosePortal))
            | (b'T' | b'n', Some(Expect::Describe))
            | (b'C' | b'I' | b's', Some(Expect::Execute)) => true,
            // Answers that leave what is awaited as it is.
            (b't', Some(Expect::Describe))
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
        match self.unit.expects.pop_front() {
            Some(Expect::Parse(name) | Expect::InjectedParse(name)) => self.parsed(name),
            Some(Expect::Close(name)) => self.closed(&name),
            _ => {}
        }
        if self.unit.expects.len() < MOST_AWAITED / 2 {
            self.unit.urged = false;
        }
        Ok(for_client)
    }

    /// A command has run. Two of them take all named statements from the server at this very moment,
    /// whatever becomes of the rest of the unit.
    fn completed(&mut self, len: usize) {
        if matches!(&self.backend.input[HEADER..len], b"DEALLOCATE ALL\0" | b"DISCARD ALL\0") {
            self.session.statements.clear();
            self.backend.forget_statements();
            // What is parsed behind it comes after it.
            for expect in &self.unit.expects {
                if let Expect::Parse(NameOnServer::Own(name))
                | Expect::InjectedParse(NameOnServer::Own(name)) = expect
                {
                    self.backend.own_names.insert(name.clone());
                }
            }
        }
    }

    fn parsed(&mut self, name: NameOnServer) {
        match name {
            NameOnServer::Shared(name) => {
                self.unit.underway.remove(&name);
                self.backend.prepared.put(name, ());
            }
            NameOnServer::Refused(name) => {
                self.backend.own_names.insert(name);
            }
            NameOnServer::Own(_) | NameOnServer::Unnamed | NameOnServer::Unknown => {}
        }
    }

    fn closed(&mut self, name: &NameOnServer) {
        if let NameOnServer::Unnamed = name {
            self.backend.unnamed = None;
        }
    }

    /// Gives the answers that are ours and whose turn it is; never into the middle of a message.
    pub(super) fn answer_ourselves(&mut self) {
        while self.unit.node_rest == 0 {
            let tag = match self.unit.expects.front() {
                Some(Expect::OwnParseComplete) => b'1',
                Some(Expect::OwnCloseComplete) => b'3',
                Some(Expect::CopyEnd) => {
                    self.unit.expects.pop_front();
                    continue;
                }
                _ => return,
            };
            self.session.client.output.put_slice(&[tag, 0, 0, 0, 4]);
            self.session.statements.succeeded();
            self.unit.expects.pop_front();
        }
    }

    /// After an error in the extended protocol nothing up to the next Sync is answered, not even a Query:
    /// what Parse and Close would have done to the backend has not happened. Undone from the last to the
    /// first.
    fn skip_expected(&mut self) {
        let parsing_unnamed = matches!(self.unit.expects.front(), Some(Expect::Parse(NameOnServer::Unnamed)));
        self.session.statements.failed(parsing_unnamed);
        if matches!(self.unit.expects.front(), Some(Expect::Query | Expect::FunctionCall)) {
            return;
        }
        let is_sync = |e: &Expect| matches!(e, Expect::Sync | Expect::InjectedSync);
        let skipped = self.unit.expects.iter().position(is_sync).unwrap_or(self.unit.expects.len());
        let skipped: Vec<Expect> = self.unit.expects.drain(..skipped).collect();
        if self.unit.expects.is_empty() {
            // The Sync is still to come, even if a Query seemed to be the unit's end.
            self.unit.intake = Intake::Open;
            self.unit.skip_to_sync = true;
        }
        for expect in skipped.into_iter().rev() {
            match expect {
                Expect::Parse(name) | Expect::InjectedParse(name) => self.not_parsed(name),
                Expect::Close(name) | Expect::InjectedClose(name) => self.not_closed(name),
                _ => {}
            }
        }
    }

    fn not_parsed(&mut self, name: NameOnServer) {
        match name {
            NameOnServer::Unnamed => self.backend.unnamed = None,
            NameOnServer::Own(name) => {
                self.backend.own_names.remove(&name);
            }
            NameOnServer::Shared(name) => {
                self.unit.underway.remove(&name);
            }
            NameOnServer::Refused(_) | NameOnServer::Unknown => {}
        }
    }

    fn not_closed(&mut self, name: NameOnServer) {
        match name {
            NameOnServer::Shared(name) => {
                self.backend.prepared.put(name, ());
            }
            NameOnServer::Own(name) => {
                self.backend.own_names.insert(name);
            }
            NameOnServer::Unnamed | NameOnServer::Refused(_) | NameOnServer::Unknown => {}
        }
    }

    fn error(&mut self, len: usize) -> Result<Step, End> {
        if self.is_ours() {
            self.backend.input.advance(len);
            self.skip_expected();
            return Ok(Step::On);
        }
        let fields = wire::error_fields(&self.backend.input[HEADER..len]);
        let fatal = matches!(fields.severity, b"FATAL" | b"PANIC");
        // A client that has cancelled wants no second try; and of the primary's errors only its end
        // leaves a read to be run elsewhere.
        let final_word = !self.unit.redoable || self.backend.cancel.was_sent();
        let again = match refusal::of(&fields) {
            _ if final_word => None,
            Refusal::Shutdown if fatal => Some(Again::NodeLost),
            _ if self.session.role == Role::Primary => None,
            Refusal::NotAReadAfterAll => Some(Again::NotARead),
            Refusal::LateReplica => Some(Again::LateReplica),
            Refusal::RecoveryConflict => Some(Again::Conflict),
            Refusal::Shutdown => Some(Again::NodeLost),
            Refusal::None => None,
        };
        if let Some(again) = again {
            return Ok(self.discard(again, fatal));
        }
        self.commit();
        if matches!(self.unit.expects.front(), Some(Expect::Query)) {
            // It leaves COPY; what the client still sends of it is dropped.
            self.unit.intake = Intake::Closed;
        }
        self.unit.failed = true;
        match self.unit.expects.front() {
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

    fn ready(&mut self, len: usize) -> Result<Step, End> {
        let node = self.backend.node;
        let status = self.backend.input.get(HEADER).copied().and_then(TransactionStatus::from_byte);
        let (Some(status), true) = (status, len == HEADER + 1) else { return Err(End::NodeLost { node }) };
        match self.unit.expects.pop_front() {
            Some(Expect::InjectedSync) => {
                self.backend.input.advance(len);
                return Ok(Step::On);
            }
            Some(Expect::Sync | Expect::FunctionCall) => {}
            // One that an error made the server skip leaves the unnamed statement alone.
            Some(Expect::Query) => self.session.statements.drop_unnamed(),
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
        self.forward(len);
        self.session.status = status;
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
        // One server that takes writes is what the client sees.
        if name == b"in_hot_standby" || self.reported.get(name).is_some_and(|v| v == value) {
            return;
        }
        Arc::make_mut(&mut self.reported).insert(name.to_vec(), value.to_vec());
        put_parameter(&mut self.client.output, name, value);
        self.lexing_changed();
    }

    /// Tells the client where a newly leased backend's parameters differ from what it was told.
    pub(super) fn tell_differences(&mut self, theirs: &Arc<Parameters>) {
        if Arc::ptr_eq(theirs, &self.reported) {
            return;
        }
        let differing: Vec<(&Vec<u8>, &Vec<u8>)> = theirs
            .iter()
            .filter(|(name, value)| *name != b"in_hot_standby" && self.reported.get(*name) != Some(value))
            .collect();
        for (name, value) in differing {
            put_parameter(&mut self.client.output, name, value);
            Arc::make_mut(&mut self.reported).insert(name.clone(), value.clone());
            self.lexing_changed();
        }
    }

    /// A notification: its sender's process id is the client's own if it is the session's backend.
    pub(super) fn notification(&mut self, backend: &mut Backend, len: usize) {
        let own = backend.cancel.pid.to_be_bytes();
        let mut message = backend.input.split_to(len);
        if let Some(pid) = message.get_mut(HEADER..HEADER + 4)
            && *pid == own
        {
            pid.copy_from_slice(&self.handle.pid.to_be_bytes());
        }
        self.client.output.put_slice(&message);
    }

    /// Whether statements have the client's own names on the leased backend.
    pub(super) fn uses_own_names(&self) -> bool {
        self.pin.is_some()
    }
}

fn put_parameter(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    put_length(out, b'S', name.len() + value.len() + 2);
    put_cstr(out, name);
    put_cstr(out, value);
}
