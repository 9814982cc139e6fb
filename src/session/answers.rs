//! From the node to the client: what each answer is to, and which of them the client is to see.

use std::sync::Arc;

use bytes::{Buf, BufMut, BytesMut};

use super::exchange::{Again, Expect, Intake, NameOnServer, Outcome, Step, WHOLE_MESSAGE, put_report};
use super::{End, Role, Session};
use crate::backend::{Dirt, parameter_status};
use crate::classify::refusal::{self, Refusal};
use crate::wire::{self, HEADER, TransactionStatus};

impl Session {
    /// Looks at what the node has sent and puts what is the client's into its output.
    pub(super) fn digest(&mut self) -> Result<Step, End> {
        let mut moved = false;
        loop {
            let lease = self.lease.as_mut().expect("an exchange has a backend");
            if self.unit.node_rest > 0 {
                let n = self.unit.node_rest.min(lease.input.len());
                if n == 0 {
                    break;
                }
                if self.unit.discard.is_none() {
                    self.client.output.put_slice(&lease.input[..n]);
                }
                lease.input.advance(n);
                self.unit.node_rest -= n;
                moved = true;
                continue;
            }
            let run = self.forward_run();
            moved |= run;
            match self.digest_message()? {
                Step::On => moved = true,
                Step::Wait => break,
                over => return Ok(over),
            }
        }
        // What a client waits for after Flush must not be held back.
        if self.unit.redoable && self.unit.expects.is_empty() && self.unit.intake == Intake::Open && moved {
            self.commit();
        }
        Ok(if moved { Step::On } else { Step::Wait })
    }

    /// The hot loop: rows and copy data go on in one piece, by their headers alone.
    fn forward_run(&mut self) -> bool {
        if self.unit.discard.is_some() {
            return false;
        }
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        let mut end = 0;
        while let Ok(Some(header)) = wire::header(&lease.input[end..]) {
            if !matches!(header.tag, b'D' | b'd') {
                break;
            }
            end += header.len;
            if end > lease.input.len() {
                break;
            }
        }
        if end == 0 {
            return false;
        }
        let there = end.min(lease.input.len());
        self.client.output.put_slice(&lease.input[..there]);
        lease.input.advance(there);
        self.unit.node_rest = end - there;
        self.commit();
        true
    }

    fn digest_message(&mut self) -> Result<Step, End> {
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        let header = match wire::header(&lease.input) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(Step::Wait),
            Err(_) => return Err(End::NodeLost { node: lease.node }),
        };
        let whole = lease.input.len() >= header.len;
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
            _ if !whole && header.len > WHOLE_MESSAGE => Err(End::NodeLost { node: lease.node }),
            _ if !whole => Ok(Step::Wait),
            b'Z' => self.ready(header.len),
            b'E' => self.error(header.len),
            b'S' => {
                let message = lease.input.split_to(header.len);
                let lease = self.lease.as_mut().expect("an exchange has a backend");
                lease.report(&message[HEADER..]);
                self.tell_parameter(&message[HEADER..]);
                Ok(Step::On)
            }
            b'A' => {
                self.commit();
                self.notification(header.len);
                Ok(Step::On)
            }
            b'N' => {
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
                if !matches!(tag, b'1' | b'2' | b'3' | b't' | b'T' | b'n') {
                    self.commit();
                }
                if self.answered(tag)? {
                    self.forward(header.len);
                } else {
                    let lease = self.lease.as_mut().expect("an exchange has a backend");
                    lease.input.advance(header.len);
                }
                self.answer_ourselves();
                Ok(Step::On)
            }
        }
    }

    /// Passes the message at the start of the backend's input (or what of it is there) on.
    fn forward(&mut self, len: usize) {
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        let there = len.min(lease.input.len());
        self.client.output.put_slice(&lease.input[..there]);
        lease.input.advance(there);
        self.unit.node_rest = len - there;
    }

    /// An answer came: what was it to? Whether it is the client's.
    fn answered(&mut self, tag: u8) -> Result<bool, End> {
        let for_client = match (tag, self.unit.expects.front()) {
            (b'1', Some(Expect::Parse(_))) => {
                self.statements.succeeded();
                true
            }
            (b'1', Some(Expect::InjectedParse(_))) | (b'3', Some(Expect::InjectedClose(_))) => false,
            (b'2', Some(Expect::Bind)) => true,
            (b'3', Some(Expect::Close)) => {
                self.statements.succeeded();
                true
            }
            (b'T' | b'n', Some(Expect::Describe)) => true,
            (b'C' | b'I' | b's', Some(Expect::Execute)) => true,
            // Answers that leave what is awaited as it is.
            (b't', Some(Expect::Describe))
            | (b'T' | b'C' | b'I', Some(Expect::Query))
            | (b'c', Some(Expect::Query | Expect::Execute))
            | (b'V', Some(Expect::FunctionCall)) => return Ok(true),
            _ => {
                let lease = self.lease.as_ref().expect("an exchange has a backend");
                tracing::error!(
                    node = lease.node.0,
                    tag = %char::from(tag),
                    awaited = ?self.unit.expects.front(),
                    "a node sent a message that nothing asked for; its connection is closed"
                );
                return Err(End::NodeLost { node: lease.node });
            }
        };
        if let Some(Expect::Parse(NameOnServer::Shared(s)) | Expect::InjectedParse(NameOnServer::Shared(s))) =
            self.unit.expects.pop_front()
        {
            let lease = self.lease.as_mut().expect("an exchange has a backend");
            lease.prepared.put(s, ());
        }
        Ok(for_client)
    }

    /// Gives the answers that are ours and whose turn it is.
    pub(super) fn answer_ourselves(&mut self) {
        loop {
            match self.unit.expects.front() {
                Some(Expect::OwnParseComplete) => {
                    self.client.output.put_slice(&[b'1', 0, 0, 0, 4]);
                    self.statements.succeeded();
                }
                Some(Expect::OwnCloseComplete) => {
                    self.client.output.put_slice(&[b'3', 0, 0, 0, 4]);
                    self.statements.succeeded();
                }
                Some(Expect::OwnError(_)) => {
                    self.commit();
                    if let Some(Expect::OwnError(report)) = self.unit.expects.pop_front() {
                        put_report(&mut self.client.output, &report);
                    }
                    self.unit.failed = true;
                    self.skip_expected();
                    continue;
                }
                _ => return,
            }
            self.unit.expects.pop_front();
        }
    }

    /// After an error nothing up to the next Sync is answered.
    fn skip_expected(&mut self) {
        self.statements.failed();
        while let Some(front) = self.unit.expects.front() {
            if matches!(front, Expect::Sync | Expect::Query | Expect::FunctionCall | Expect::InjectedSync) {
                break;
            }
            // What a Parse or Close would have done to the backend has not happened.
            let skipped = self.unit.expects.pop_front();
            let lease = self.lease.as_mut().expect("an exchange has a backend");
            match skipped {
                Some(Expect::Parse(name) | Expect::InjectedParse(name)) => match name {
                    NameOnServer::Unnamed => lease.unnamed = None,
                    NameOnServer::Own(name) => {
                        lease.own_names.remove(&name);
                    }
                    NameOnServer::Shared(_) | NameOnServer::Refused => {}
                },
                Some(Expect::InjectedClose(name)) => {
                    lease.prepared.put(name, ());
                }
                _ => {}
            }
        }
    }

    fn error(&mut self, len: usize) -> Result<Step, End> {
        if self.is_ours() {
            let lease = self.lease.as_mut().expect("an exchange has a backend");
            lease.input.advance(len);
            self.skip_expected();
            return Ok(Step::On);
        }
        let lease = self.lease.as_ref().expect("an exchange has a backend");
        let fields = wire::error_fields(&lease.input[HEADER..len]);
        let fatal = matches!(fields.severity, b"FATAL" | b"PANIC");
        let again = match refusal::of(&fields) {
            _ if !self.unit.redoable || self.role == Role::Primary => None,
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
        // PostgreSQL leaves COPY mode; what the client still sends of it is dropped.
        if self.unit.intake == Intake::CopyIn {
            let simple = matches!(self.unit.expects.front(), Some(Expect::Query));
            self.unit.intake = if simple { Intake::Closed } else { Intake::Open };
        }
        self.unit.failed = true;
        let of_query = matches!(self.unit.expects.front(), Some(Expect::Query | Expect::FunctionCall));
        self.forward(len);
        self.skip_expected();
        if fatal {
            return Err(End::NodeSaidFatal);
        }
        if !of_query {
            self.skip_as_the_server_does();
        }
        Ok(Step::On)
    }

    /// After an error in the extended protocol the server reads and drops all up to Sync, even a
    /// Query, whether it is on its way or still to come.
    fn skip_as_the_server_does(&mut self) {
        if matches!(self.unit.expects.front(), Some(Expect::Query | Expect::FunctionCall)) {
            self.unit.expects.pop_front();
            self.unit.intake = Intake::Open;
        }
        if self.unit.intake == Intake::Open {
            self.unit.skip_to_sync = true;
        }
    }

    /// The answer so far is not shown: the unit runs again elsewhere once the backend is ready for others.
    fn discard(&mut self, again: Again, fatal: bool) -> Step {
        self.client.output.truncate(self.output_before);
        self.statements.take_back();
        self.unit.discard = Some(again);
        if fatal || self.unit.intake != Intake::Closed {
            // It is closing, or no ReadyForQuery is on its way: the backend is not worth keeping.
            return Step::Over(Outcome::Again(again));
        }
        Step::On
    }

    fn discard_message(&mut self, header: wire::Header, whole: bool) -> Result<Step, End> {
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        let node = lease.node;
        if !whole {
            if header.len > WHOLE_MESSAGE {
                return Err(End::NodeLost { node });
            }
            return Ok(Step::Wait);
        }
        let message = lease.input.split_to(header.len);
        match header.tag {
            b'S' => {
                let lease = self.lease.as_mut().expect("an exchange has a backend");
                lease.report(&message[HEADER..]);
            }
            b'Z' => {
                let lease = self.lease.as_mut().expect("an exchange has a backend");
                // Which of the injected statements exist is not known: forget them all, and clean.
                lease.dirt = lease.dirt.max(Dirt::State);
                lease.unnamed = None;
                let again = self.unit.discard.unwrap_or(Again::NodeLost);
                return Ok(Step::Over(Outcome::Again(again)));
            }
            _ => {}
        }
        Ok(Step::On)
    }

    fn ready(&mut self, len: usize) -> Result<Step, End> {
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        let node = lease.node;
        let status = lease.input.get(HEADER).copied().and_then(TransactionStatus::from_byte);
        let (Some(status), true) = (status, len == HEADER + 1) else { return Err(End::NodeLost { node }) };
        match self.unit.expects.pop_front() {
            Some(Expect::InjectedSync) => {
                lease.input.advance(len);
                return Ok(Step::On);
            }
            Some(Expect::Sync | Expect::Query | Expect::FunctionCall) => {}
            other => {
                tracing::error!(node = node.0, awaited = ?other, "a node sent ReadyForQuery out of turn");
                return Err(End::NodeLost { node });
            }
        }
        // Never a late answer of an earlier epoch's primary.
        if self.role == Role::Primary && lease.epoch != self.shared.topology.load().epoch {
            return Err(End::NodeLost { node });
        }
        self.commit();
        self.forward(len);
        self.status = status;
        if !self.unit.expects.is_empty() {
            let lease = self.lease.as_mut().expect("an exchange has a backend");
            tracing::error!(node = node.0, left = ?self.unit.expects.front(), "answers are missing");
            lease.dirt = Dirt::Unknown;
        }
        Ok(Step::Over(Outcome::Done))
    }

    /// The server asks for COPY data. It ignores the Sync that a client has sent along with Execute.
    fn copy_in_begins(&mut self) {
        if !matches!(self.unit.expects.front(), Some(Expect::Query)) {
            while matches!(self.unit.expects.get(1), Some(Expect::Sync)) {
                self.unit.expects.remove(1);
            }
        }
        self.unit.intake = Intake::CopyIn;
    }

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
    pub(super) fn tell_differences(&mut self) {
        let lease = self.lease.as_ref().expect("an exchange has a backend");
        if Arc::ptr_eq(&lease.parameters, &self.reported) {
            return;
        }
        let theirs = lease.parameters.clone();
        let differing: Vec<(Vec<u8>, Vec<u8>)> = theirs
            .iter()
            .filter(|(name, value)| *name != b"in_hot_standby" && self.reported.get(*name) != Some(value))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        for (name, value) in differing {
            put_parameter(&mut self.client.output, &name, &value);
            Arc::make_mut(&mut self.reported).insert(name, value);
            self.lexing_changed();
        }
    }

    /// A notification: its sender's process id is the client's own if it is the session's backend.
    pub(super) fn notification(&mut self, len: usize) {
        let lease = self.lease.as_mut().expect("an exchange has a backend");
        let own = lease.cancel.pid.to_be_bytes();
        let mut message = lease.input.split_to(len);
        if let Some(pid) = message.get_mut(HEADER..HEADER + 4)
            && *pid == own
        {
            pid.copy_from_slice(&self.handle.pid.to_be_bytes());
        }
        self.client.output.put_slice(&message);
    }
}

fn put_parameter(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    put_length(out, b'S', name.len() + value.len() + 2);
    put_cstr(out, name);
    put_cstr(out, value);
}

fn put_cstr(out: &mut BytesMut, text: &[u8]) {
    out.put_slice(text);
    out.put_u8(0);
}

fn put_length(out: &mut BytesMut, tag: u8, body: usize) {
    out.put_u8(tag);
    out.put_u32(u32::try_from(body + 4).unwrap_or(u32::MAX));
}
