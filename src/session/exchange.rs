//! Moving one unit's messages to a backend and its answers to the client.
//!
//! A *unit* is what the server answers as a whole: a Query, a FunctionCall, or all messages up to a
//! Sync. Bytes are looked at by header and forwarded as they are; only names of prepared statements
//! are replaced, and messages that the client did not ask for (or the server need not be asked for)
//! are taken out or put in, in their turn.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll};

use bytes::{BufMut, BytesMut};

use super::{End, Session};
use crate::backend::{SharedName, poll_drain, poll_fill};
use crate::classify::Leaves;
use crate::wire::ErrorReport;

/// Bytes waiting for a socket above which no more are taken from the other side.
pub(super) const HIGH_WATER: usize = 256 * 1024;

/// PostgreSQL's limit for messages that hold no data of the user (`PQ_SMALL_MESSAGE_LIMIT`).
pub(super) const SMALL_MESSAGE: usize = 10_000;

/// Messages of the node that are looked at whole may be this long.
pub(super) const WHOLE_MESSAGE: usize = 4 << 20;

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
pub(super) enum Intake {
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
    pub(super) expects: VecDeque<Expect>,
    pub(super) intake: Intake,
    /// Bytes of a client's message still to be passed on unseen.
    pub(super) client_rest: usize,
    /// Bytes of a node's message still to be passed on unseen.
    pub(super) node_rest: usize,
    /// Bytes of the client's input that were taken but are kept, while the unit can be run again.
    pub(super) taken: usize,
    /// Bytes at its start that were looked at when it was routed: all reads, if it is on a replica.
    pub(super) vetted: usize,
    /// Whether the unit can be run again: nothing of its answer has left for the client.
    pub(super) redoable: bool,
    /// An Execute was sent.
    pub(super) executed: bool,
    /// A Bind was sent.
    pub(super) bound: bool,
    /// After an error of ours: client messages are dropped up to Sync.
    pub(super) skip_to_sync: bool,
    /// The server has said ErrorResponse in this unit.
    pub(super) failed: bool,
    /// Answer discarded up to ReadyForQuery, then run again.
    pub(super) discard: Option<Again>,
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
    /// One word for a metric label.
    pub fn label(self) -> &'static str {
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
pub(super) enum Step {
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
}

/// Appends an error of ours.
pub(super) fn put_report(out: &mut BytesMut, report: &ErrorReport) {
    let mut message = Vec::new();
    report.put(&mut message);
    out.put_slice(&message);
}
