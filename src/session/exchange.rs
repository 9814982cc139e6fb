//! Moving one unit's messages to a backend and its answers to the client.
//!
//! A *unit* is what the server answers as a whole: a Query, a FunctionCall, or all messages up to a
//! Sync. Bytes are looked at by header and forwarded as they are; only names of prepared statements
//! are replaced, and messages that the client did not ask for (or the server need not be asked for)
//! are taken out or put in, in their turn.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, BytesMut};

use super::messages::{self, Parse, Target};
use super::prepared::{Found, Statement};
use super::{End, Role, Session};
use crate::backend::{Dirt, SharedName, parameter_status, poll_drain, poll_fill};
use crate::classify::refusal::{self, Refusal};
use crate::classify::{Leaves, PinReason};
use crate::wire::{self, ErrorReport, HEADER, TransactionStatus};

/// Bytes waiting for a socket above which no more are taken from the other side.
const HIGH_WATER: usize = 256 * 1024;

/// PostgreSQL's limit for messages that hold no data of the user (`PQ_SMALL_MESSAGE_LIMIT`).
const SMALL_MESSAGE: usize = 10_000;

/// Messages of the node that are looked at whole may be this long.
const WHOLE_MESSAGE: usize = 4 << 20;

/// What the server (or we in its place) will answer next.
#[derive(Debug)]
pub enum Expect {
    /// ParseComplete, for the client.
    Parse(NameOnServer),
    /// ParseComplete for a Parse of ours.
    InjectedParse(NameOnServer),
    /// CloseComplete for a Close of ours.
    InjectedClose(SharedName),
    /// ReadyForQuery for a Sync of ours.
    InjectedSync,
    /// ParseComplete that we give: the backend has the statement already.
    OwnParseComplete,
    /// CloseComplete that we give: the name is ours alone.
    OwnCloseComplete,
    /// An error that we give, in its turn; all up to the next Sync is skipped.
    OwnError(Box<ErrorReport>),
    /// BindComplete.
    Bind,
    /// RowDescription or NoData, perhaps after ParameterDescription.
    Describe,
    /// Rows up to CommandComplete, EmptyQueryResponse or PortalSuspended; or COPY.
    Execute,
    /// CloseComplete.
    Close,
    /// ReadyForQuery, after any number of results.
    Query,
    /// ReadyForQuery, after FunctionCallResponse.
    FunctionCall,
    /// ReadyForQuery.
    Sync,
}

/// Under which name a statement is prepared on the backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NameOnServer {
    /// None.
    Unnamed,
    /// The name that all sessions share.
    Shared(SharedName),
    /// The client's own, on a pinned backend.
    Own(Vec<u8>),
    /// The server is expected to refuse it.
    Refused,
}

/// How much of the unit has come from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Intake {
    /// More messages may come.
    Open,
    /// Its Query, FunctionCall or Sync has been taken: only the answer is awaited.
    Closed,
    /// COPY FROM STDIN: the client sends data.
    CopyIn,
}

/// A unit on its way.
#[derive(Debug)]
pub struct Unit {
    expects: VecDeque<Expect>,
    intake: Intake,
    /// Bytes of a client's message still to be passed on unseen.
    client_rest: usize,
    /// Bytes of a node's message still to be passed on unseen.
    node_rest: usize,
    /// Bytes of the client's input that were taken but are kept, while the unit can be run again.
    taken: usize,
    /// Bytes at its start that were looked at when it was routed: all reads, if it is on a replica.
    vetted: usize,
    /// Whether the unit can be run again: nothing of its answer has left for the client.
    redoable: bool,
    /// An Execute was sent.
    executed: bool,
    /// A Bind was sent.
    bound: bool,
    /// After an error of ours: client messages are dropped up to Sync.
    skip_to_sync: bool,
    /// The server has said ErrorResponse in this unit.
    failed: bool,
    /// Answer discarded up to ReadyForQuery, then run again.
    discard: Option<Again>,
    /// The strongest of what its statements may leave behind.
    pub leaves: Leaves,
    /// It contains data definition.
    pub ddl: bool,
    /// It has statements that are not reads.
    pub writes: bool,
}

/// Why a unit is to be run again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// A replica says that it is not a read after all.
    NotARead,
    /// A replica fails it only because it is late.
    LateReplica,
    /// It conflicted with recovery.
    Conflict,
    /// The node is going away, or its connection broke before any answer.
    NodeLost,
}

impl Again {
    /// All labels.
    pub const LABELS: [&'static str; 4] = [
        Again::NotARead.label(),
        Again::LateReplica.label(),
        Again::Conflict.label(),
        Again::NodeLost.label(),
    ];

    /// One word for a metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Again::NotARead => "not_a_read",
            Again::LateReplica => "late_replica",
            Again::Conflict => "conflict",
            Again::NodeLost => "node_lost",
        }
    }
}

/// How an exchange ended.
#[derive(Debug)]
pub enum Outcome {
    /// ReadyForQuery came.
    Done,
    /// Nothing has reached the client: run the unit again elsewhere.
    Again(Again),
    /// All so far is answered, and what comes next must not run on this replica: route it anew.
    Move,
}

impl Unit {
    /// A unit of which nothing was sent. `redoable`: it is all there and can be run again.
    pub fn new(redoable: bool, vetted: usize) -> Unit {
        Unit {
            expects: VecDeque::new(),
            intake: Intake::Open,
            client_rest: 0,
            node_rest: 0,
            taken: 0,
            vetted,
            redoable,
            executed: false,
            bound: false,
            skip_to_sync: false,
            failed: false,
            discard: None,
            leaves: Leaves::Nothing,
            ddl: false,
            writes: false,
        }
    }

    /// Whether the server reported an error in it.
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Whether an open unit has been taken whole: only the answer is awaited.
    pub fn is_closed(&self) -> bool {
        self.intake == Intake::Closed
    }
}

/// What to do after looking at a message.
enum Step {
    /// Go on.
    On,
    /// More bytes are needed.
    Wait,
    /// The exchange is over.
    Over(Outcome),
}

impl Session {
    /// Runs the unit at the start of the client's input on the leased backend, up to its end.
    pub(super) async fn exchange(&mut self) -> Result<Outcome, End> {
        poll_fn(|cx| self.poll_exchange(cx)).await
    }

    fn poll_exchange(&mut self, cx: &mut Context<'_>) -> Poll<Result<Outcome, End>> {
        if self.handle.poll_ending(cx) == super::handle::Ending::Now {
            return Poll::Ready(Err(End::shutdown()));
        }
        loop {
            let mut moved = false;
            match self.translate() {
                Ok(Step::Over(outcome)) => return Poll::Ready(Ok(outcome)),
                Ok(Step::On) => moved = true,
                Ok(Step::Wait) => {}
                Err(end) => return Poll::Ready(Err(end)),
            }
            let lease = self.lease.as_mut().expect("an exchange has a backend");
            if !lease.output.is_empty() {
                let backend = &mut **lease;
                match poll_drain(&mut backend.stream, &mut backend.output, cx) {
                    // There is room again for what the client sends.
                    Poll::Ready(Ok(())) => moved = true,
                    // The node may have said why before it closed: read on; the end of input decides.
                    Poll::Ready(Err(_)) => backend.output.clear(),
                    Poll::Pending => {}
                }
            }
            if self.client.output.len() < HIGH_WATER {
                let backend = &mut **lease;
                match poll_fill(&mut backend.stream, &mut backend.input, cx) {
                    Poll::Ready(Ok(n)) if n > 0 => moved = true,
                    Poll::Ready(_) => {
                        // What it had said before it closed counts first.
                        return match self.digest() {
                            Ok(Step::Over(outcome)) => Poll::Ready(Ok(outcome)),
                            Ok(_) => Poll::Ready(self.node_lost()),
                            Err(end) => Poll::Ready(Err(end)),
                        };
                    }
                    Poll::Pending => {}
                }
            }
            match self.digest() {
                Ok(Step::Over(outcome)) => return Poll::Ready(Ok(outcome)),
                Ok(Step::On) => moved = true,
                Ok(Step::Wait) => {}
                Err(end) => return Poll::Ready(Err(end)),
            }
            if !self.unit.redoable && !self.client.output.is_empty() {
                match poll_drain(&mut self.client.stream, &mut self.client.output, cx) {
                    // There is room again for what the node sends.
                    Poll::Ready(Ok(())) => moved = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(Err(End::ClientGone)),
                    Poll::Pending => {}
                }
            }
            if self.client.input.len() < HIGH_WATER && !self.client.at_end {
                match poll_fill(&mut self.client.stream, &mut self.client.input, cx) {
                    Poll::Ready(Ok(n)) if n > 0 => moved = true,
                    // A unit that was sent whole runs to its end, as on a server; one that was not
                    // must not (a Sync sent in the client's place would commit it).
                    Poll::Ready(Ok(_)) if self.unit.intake == Intake::Closed => self.client.at_end = true,
                    Poll::Ready(_) => return Poll::Ready(Err(End::ClientGone)),
                    Poll::Pending => {}
                }
            }
            if !moved {
                return Poll::Pending;
            }
        }
    }

    /// The backend's connection ended before ReadyForQuery.
    fn node_lost(&mut self) -> Result<Outcome, End> {
        if self.unit.redoable {
            return Ok(Outcome::Again(Again::NodeLost));
        }
        let lease = self.lease.as_ref().expect("an exchange has a backend");
        Err(End::NodeLost { node: lease.node })
    }

    // ---- from the client to the node

    /// Takes what the client has sent and puts it into the backend's output, as far as both allow.
    fn translate(&mut self) -> Result<Step, End> {
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
    fn commit(&mut self) {
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
        if let Some(refused) = self.refuse_on_replica(false) {
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
    fn is_ours(&self) -> bool {
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

    // ---- from the node to the client

    /// Looks at what the node has sent and puts what is the client's into its output.
    fn digest(&mut self) -> Result<Step, End> {
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
    fn answer_ourselves(&mut self) {
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
        self.forward(len);
        self.skip_expected();
        if fatal {
            return Err(End::NodeSaidFatal);
        }
        Ok(Step::On)
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

fn put_parameter(out: &mut BytesMut, name: &[u8], value: &[u8]) {
    put_length(out, b'S', name.len() + value.len() + 2);
    put_cstr(out, name);
    put_cstr(out, value);
}

/// Appends an error of ours.
pub(super) fn put_report(out: &mut BytesMut, report: &ErrorReport) {
    let mut message = Vec::new();
    report.put(&mut message);
    out.put_slice(&message);
}

impl Session {
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
