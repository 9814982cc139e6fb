//! Moving one unit's messages to a backend and its answers to the client.
//!
//! A *unit* is what the server answers as a whole: a Query, a FunctionCall, or all messages up to a
//! Sync. Bytes are looked at by header and forwarded as they are; only names of prepared statements
//! are replaced, and messages that the client did not ask for (or the server need not be asked for)
//! are taken out or put in, in their turn.
//!
//! Here is the loop: four streams, each read and written only as far as the other side keeps up.
//! `translate` is the way to the node, `answers` the way back.
//!
//! **A client that goes away.** Inside a unit that it has not sent whole, its backend is closed: a Sync
//! in the client's place would commit. A unit that it has sent whole has [`PARTING`] to be answered (a
//! client that has only closed its sending side still reads). Then its backend is closed, so that a vanished
//! client's query does not hold one for hours: a read is cancelled; what may write runs to its end
//! on the node, just as if that had lost its client. Unless more units are waiting: they are to run.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::messages::ShapeReader;
use super::pins::PinSet;
use super::prepared::Statement;
use super::timeouts::Measure;
use super::{End, Session};
use crate::backend::{Applied, Backend, Prepared, SharedName, poll_drain, poll_fill};
use crate::classify::setting::{Change, Effects};
use crate::classify::{self, Leaves, PinReason};
use crate::wire::{ErrorReport, TransactionStatus};

/// Bytes waiting for a socket above which no more are taken from the other side.
pub(super) const HIGH_WATER: usize = 256 * 1024;

/// Messages of the node that are looked at whole may be this long.
pub(super) const WHOLE_MESSAGE: usize = 4 << 20;

/// Answers that may be awaited at once; no more of the client's messages are taken above.
pub(super) const MOST_AWAITED: usize = 16 * 1024;

/// Bytes of answer that are held back at most so that a read can be run again.
pub(super) const HELD_BACK: usize = 64 * 1024;

/// How long a unit may still take when the client has closed its side.
const PARTING: Duration = Duration::from_secs(1);

/// What the server (or we in its place) will answer next.
#[derive(Debug)]
pub enum Expect {
    /// ParseComplete, for the client.
    Parse(NameOnServer),
    /// ParseComplete for a Parse of ours.
    InjectedParse(NameOnServer),
    /// CloseComplete for a Close of ours; what is known of the statement, should it stay after all.
    InjectedClose(NameOnServer, Prepared),
    /// The description of a statement, which we have asked for ourselves.
    InjectedDescribe(Box<Asked>),
    /// BindComplete for a Bind of ours.
    InjectedBind,
    /// CommandComplete for a PREPARE of this name, which we have given to the backend.
    InjectedExecute(Vec<u8>),
    /// ReadyForQuery for a Sync of ours.
    InjectedSync,
    /// ReadyForQuery for a Query of ours ahead of the unit: see [`Exchange::injected_answer`].
    InjectedQuery(Purpose),
    /// ParseComplete that we give: the backend has the statement already.
    OwnParseComplete,
    /// CloseComplete that we give: the name is ours alone.
    OwnCloseComplete,
    /// An error that we give, in its turn; all up to the next Sync is skipped.
    OwnError(Box<ErrorReport>),
    /// An error that the server gives: the message's body is not laid out as the protocol says.
    Malformed,
    /// BindComplete. The client's name of the statement, for an error that names it.
    Bind(Vec<u8>),
    /// RowDescription or NoData, after ParameterDescription if it is of a statement: what the client is told
    /// is remembered with it.
    Describe(Option<Box<Asked>>),
    /// Rows up to CommandComplete, EmptyQueryResponse or PortalSuspended; or COPY.
    Execute,
    /// CloseComplete for a portal.
    ClosePortal,
    /// CloseComplete for a statement.
    Close(NameOnServer),
    /// Nothing: the place where CopyDone or CopyFail was sent before it was known whether there is a COPY.
    CopyEnd,
    /// ReadyForQuery, after any number of results.
    Query,
    /// ReadyForQuery, after FunctionCallResponse.
    FunctionCall,
    /// ReadyForQuery.
    Sync,
}

/// A Describe of a statement.
#[derive(Debug)]
pub struct Asked {
    pub(super) statement: Arc<Statement>,
    pub(super) on: NameOnServer,
    /// What the client goes by must be what is answered.
    pub(super) compare: bool,
    /// What the client is told in place of the last answer.
    pub(super) told: Option<Box<[u8]>>,
    pub(super) reader: ShapeReader,
}

/// What a Query of ours ahead of a unit is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The backend gets the session's settings.
    Settings,
    /// The backend gets what Highwater's own settings are for the session, to be shown.
    Own,
    /// The backend forgets what another session has drawn from sequences.
    Sequences,
    /// The backend listens to what another did that was lost.
    Listen,
    /// The transaction will be as durable as is asked for.
    Durability,
    /// The session's transaction begins there.
    Begin,
    /// It is made to fail there, as it has before: an error is what is asked for.
    Fail,
}

/// A Query of ours has failed: what is to be said to the client in place of the unit's answer.
#[derive(Debug)]
pub struct Refused {
    /// Bytes that the client's output held before.
    pub(super) output: usize,
    /// The server's ErrorResponse.
    pub(super) message: Vec<u8>,
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
    /// The client's own, which the server is expected to refuse because it has it already.
    Refused(Vec<u8>),
    /// The client's own, of which only the server may know.
    Unknown,
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
    /// A message of it was taken.
    pub(super) begun: bool,
    /// Its ReadyForQuery has come.
    pub(super) over: bool,
    /// Bytes of a client's message still to be passed on unseen.
    pub(super) client_rest: usize,
    /// Bytes of a client's message still to be dropped.
    pub(super) client_drop: usize,
    /// Bytes that the client's next message must have before it can be looked at.
    pub(super) wants: usize,
    /// Bytes of a node's message still to be passed on unseen.
    pub(super) node_rest: usize,
    /// Bytes of the client's input that were taken but are kept, while the unit can be run again.
    pub(super) taken: usize,
    /// Bytes at its start that were looked at when it was routed: all reads, if it is on a replica.
    pub(super) vetted: usize,
    /// Whether the unit can be run again: nothing of its answer has left for the client.
    pub(super) redoable: bool,
    /// A Bind was sent.
    pub(super) bound: bool,
    /// After an error: the server skips (or, if it was ours, would skip) all up to Sync.
    pub(super) skip_to_sync: bool,
    /// The server has said ErrorResponse in this unit.
    pub(super) failed: bool,
    /// A Sync was taken back because COPY FROM STDIN would ignore it.
    pub(super) ignored_sync: bool,
    /// How many of the awaited answers the server was asked to send at once.
    pub(super) urged: usize,
    /// Its number among the session's units.
    pub(super) number: u64,
    /// It runs again because a shared statement was out of date: none of before is used.
    pub(super) anew: bool,
    /// The backend's unnamed statement as far as the server has answered: what it has after an error.
    pub(super) unnamed: Option<u64>,
    /// It takes all names away: what follows is looked at when that has happened.
    pub(super) clears_names: bool,
    /// Nothing is sent until all so far is answered.
    pub(super) awaits_all: bool,
    /// What its backend has to know ahead of a Query was sent.
    pub(super) given: bool,
    /// All that its session has prepared was given to the backend ahead of it, as far as that could be.
    pub(super) given_all: bool,
    /// The server's error about that: it is the Query's, which fails for lack of it.
    pub(super) not_given: Option<Vec<u8>>,
    /// A statement was prepared anew, and nothing is to be sent before its shape is known.
    pub(super) awaits_shape: bool,
    /// Answer discarded up to ReadyForQuery, then run again.
    pub(super) discard: Option<Again>,
    /// Queries of ours ahead of it that are not answered yet.
    pub(super) ahead: u32,
    /// One of them has failed: nothing of the unit is to run, and this is its answer.
    pub(super) refused: Option<Refused>,
    /// What its commands do to settings, by which of them it is.
    pub(super) settings: VecDeque<(u32, Vec<Change>)>,
    /// Executes that were passed on, and commands that have completed.
    pub(super) executes: u32,
    pub(super) completed: u32,
    /// Binds that were passed on, and how many of them are of statements that show nothing.
    pub(super) binds: u32,
    pub(super) quiet_binds: u32,
    /// Its Query shows nothing of the database.
    pub(super) quiet_query: bool,
    /// The statement that is being bound, if it may change settings.
    pub(super) binding: Option<Arc<Statement>>,
    /// All that its statements may leave behind.
    pub leaves: Leaves,
    /// Code runs in it that is not understood.
    pub unproven: bool,
    /// Code runs in it that sets something and may commit that, whatever becomes of the rest.
    pub commits_settings: bool,
    /// What its commands may have ended.
    pub ends: PinSet,
    /// Commands that were completed.
    pub commands: u32,
    /// The last of them was ROLLBACK.
    pub rollback: bool,
    /// One of them was DISCARD ALL.
    pub discarded: bool,
    /// The transaction status before it.
    pub before: TransactionStatus,
    /// It contains data definition.
    pub ddl: bool,
    /// Its Query begins or ends a transaction, and does nothing else.
    pub control: bool,
    /// It may change what logins give.
    pub login_settings: bool,
    /// It has statements that are not reads.
    pub writes: bool,
    /// The settings that its backend will have been given, where they are not just the session's.
    pub(super) applies: Option<Arc<Applied>>,
    /// In a transaction it may have committed that, or something behind it.
    pub may_commit: bool,
    /// A ROLLBACK of its transaction is bound in it: what is behind that is none of it.
    pub(super) leaves_transaction: bool,
    /// The transaction had failed before it: the portal of a command that ends that.
    pub(super) recovers: Option<Vec<u8>>,
    /// Such a portal was executed: what comes behind finds a transaction that has not failed, or is skipped.
    pub(super) recovered: bool,
    /// A wait for a synchronous replica was cancelled in it: what it has committed may be lost with the primary.
    pub unreplicated: bool,
    /// A CommandComplete that is held back for that reason.
    pub(super) held_back: Option<Box<[u8]>>,
}

/// Why a unit is to be run again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// A replica says that it is not a read after all.
    NotARead,
    /// A replica fails it only because it is late.
    LateReplica,
    /// A replica's installation lacks what it takes.
    Installation,
    /// A replica cannot read its own files.
    Damage,
    /// It conflicted with recovery.
    Conflict,
    /// The node is going away, or its connection broke before any answer.
    NodeLost,
    /// Its definition has changed since a shared statement was prepared, which is prepared anew.
    StaleStatement,
}

impl Again {
    /// All labels.
    pub const LABELS: [&'static str; 7] = [
        Again::NotARead.label(),
        Again::LateReplica.label(),
        Again::Installation.label(),
        Again::Damage.label(),
        Again::Conflict.label(),
        Again::NodeLost.label(),
        Again::StaleStatement.label(),
    ];

    /// One word for a metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Again::NotARead => "not_a_read",
            Again::LateReplica => "late_replica",
            Again::Installation => "installation",
            Again::Damage => "damage",
            Again::Conflict => "conflict",
            Again::NodeLost => "node_lost",
            Again::StaleStatement => "stale_statement",
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
    /// A Query of ours ahead of the unit has failed, and nothing of the unit was sent: this error is its answer.
    Refused(Vec<u8>),
    /// The client has cancelled the unit before anything of it was sent.
    Cancelled,
}

/// Room for awaited answers that units of this thread have left, for the next ones.
struct Spare;

thread_local! {
    static SPARE: RefCell<Vec<VecDeque<Expect>>> = const { RefCell::new(Vec::new()) };
}

impl Spare {
    /// So many are kept a thread...
    const MOST: usize = 64;
    /// ...each for so many answers at most.
    const ANSWERS: usize = 32;

    fn take() -> VecDeque<Expect> {
        SPARE.with_borrow_mut(Vec::pop).unwrap_or_default()
    }

    fn keep(room: VecDeque<Expect>) {
        if room.is_empty() && (1..=Spare::ANSWERS).contains(&room.capacity()) {
            SPARE.with_borrow_mut(|spare| {
                if spare.len() < Spare::MOST {
                    spare.push(room);
                }
            });
        }
    }
}

impl Unit {
    /// The next unit of its session. Where it keeps what is awaited, another of its thread has done so before: most
    /// statements then need no allocation for that, and a session that waits holds none.
    pub fn begins(redoable: bool, vetted: usize) -> Unit {
        Unit { expects: Spare::take(), ..Unit::new(redoable, vetted) }
    }

    /// It is over, and its session waits for the client.
    pub fn rests(&mut self) {
        if self.over {
            Spare::keep(std::mem::take(&mut self.expects));
        }
    }

    /// A unit of which nothing was sent. `redoable`: it is all there and can be run again.
    pub fn new(redoable: bool, vetted: usize) -> Unit {
        Unit {
            expects: VecDeque::new(),
            intake: Intake::Open,
            begun: false,
            over: false,
            client_rest: 0,
            client_drop: 0,
            wants: 0,
            node_rest: 0,
            taken: 0,
            vetted,
            redoable,
            bound: false,
            skip_to_sync: false,
            failed: false,
            ignored_sync: false,
            urged: 0,
            number: 0,
            anew: false,
            unnamed: None,
            clears_names: false,
            awaits_all: false,
            given: false,
            given_all: false,
            not_given: None,
            awaits_shape: false,
            discard: None,
            ahead: 0,
            refused: None,
            settings: VecDeque::new(),
            executes: 0,
            completed: 0,
            binds: 0,
            quiet_binds: 0,
            quiet_query: false,
            binding: None,
            leaves: Leaves::NOTHING,
            unproven: false,
            commits_settings: false,
            ends: PinSet::NONE,
            commands: 0,
            rollback: false,
            discarded: false,
            before: TransactionStatus::Idle,
            ddl: false,
            control: false,
            login_settings: false,
            writes: false,
            applies: None,
            may_commit: false,
            leaves_transaction: false,
            recovers: None,
            recovered: false,
            unreplicated: false,
            held_back: None,
        }
    }

    /// Counts in what a statement of it may leave behind.
    pub fn leave(&mut self, leaves: Leaves) {
        self.leaves |= leaves;
        // Code that sets something keeps the backend until DISCARD ALL, or until its transaction is surely undone, which is
        // followed by a look: nothing is to be learned before.
        self.unproven |= leaves.has(Leaves::UNPROVEN) && !leaves.pins().has(PinReason::Setting);
    }

    /// `text`, which may leave `leaves`, is to run in it.
    pub fn count_code(&mut self, leaves: Leaves, text: Option<&[u8]>) {
        self.commits_settings |= leaves.pins().has(PinReason::Setting) && text.is_none_or(classify::is_code);
    }

    /// A unit that is over: what a session has between two.
    pub fn none() -> Unit {
        Unit { over: true, intake: Intake::Closed, ..Unit::new(false, 0) }
    }

    /// Puts a Query of ours ahead of what is yet to be sent of it. What comes behind is sent in the same
    /// write where that is safe: the Query must be one transaction, so that an error in it either leaves
    /// an aborted transaction, in which nothing else runs, or makes a replica's answer be thrown away.
    pub(super) fn put_ahead(&mut self, backend: &mut Backend, sql: &[u8], purpose: Purpose) {
        super::translate::put_length(&mut backend.output, b'Q', sql.len() + 1);
        super::translate::put_cstr(&mut backend.output, sql);
        // The unnamed statement dies with a Query.
        backend.unnamed = None;
        self.expects.push_back(Expect::InjectedQuery(purpose));
        self.ahead += 1;
    }

    /// Whether it has shown nothing of the database: SET and the like.
    pub fn is_quiet(&self) -> bool {
        !self.failed && (self.quiet_query || (self.binds > 0 && self.binds == self.quiet_binds))
    }

    /// Whether a Query of ours ahead of it has failed, so that it did not run and the backend is of no more use. In a
    /// transaction of the client's it is that which has failed, as by any other error.
    pub fn was_refused(&self) -> bool {
        self.refused.is_some() && self.before == TransactionStatus::Idle
    }

    /// Counts in what the statements of a Query do to settings.
    pub(super) fn count_settings(&mut self, effects: &Effects) {
        self.quiet_query = effects.quiet && self.executes == 0;
        for (at, changes) in (self.executes..).zip(effects.bind(&[])) {
            if !changes.is_empty() {
                self.settings.push_back((at, changes));
            }
        }
    }

    /// Whether the server reported an error in it.
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// Whether its ReadyForQuery has come: the backend is between two units.
    pub fn is_over(&self) -> bool {
        self.over && self.client_rest == 0
    }

    /// Whether the client has sent it to its last byte: only the answer is awaited.
    pub fn was_sent_whole(&self) -> bool {
        self.intake == Intake::Closed && self.client_rest == 0
    }

    /// Whether the client has been given the beginning of a message and not its end.
    pub fn is_inside_answer(&self) -> bool {
        self.node_rest > 0
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

/// A unit, its session and the backend on which it runs.
pub(super) struct Exchange<'a> {
    pub(super) session: &'a mut Session,
    pub(super) unit: &'a mut Unit,
    pub(super) backend: &'a mut Backend,
}

impl Session {
    /// Runs `self.unit`, which is at the start of the client's input, on the leased backend, up to its end.
    pub(super) async fn exchange(&mut self) -> Result<Outcome, End> {
        let Some(mut lease) = self.lease.take() else {
            return Err(End::fatal(ErrorReport::fatal("XX000", "a unit has no backend to run on")));
        };
        let mut unit = std::mem::replace(&mut self.unit, Unit::none());
        unit.number = self.statements.begin(unit.redoable);
        unit.unnamed = lease.unnamed;
        self.client.patience = None;
        self.timeouts.unit_runs(self.status);
        let outcome =
            poll_fn(|cx| Exchange { session: &mut *self, unit: &mut unit, backend: &mut lease }.poll(cx))
                .await;
        self.unit = unit;
        self.lease = Some(lease);
        outcome
    }
}

impl Session {
    /// Has the node cancel what runs there, as a client would. Its answer decides what became of it.
    pub(super) fn stop_statement(&self, target: &std::sync::Arc<crate::backend::CancelTarget>) {
        // Before the session can give the backend back.
        target.announce();
        let (target, context) = (target.clone(), self.shared.pools.context.clone());
        tokio::spawn(async move { context.stop(&target).await });
    }
}

impl Exchange<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Outcome, End>> {
        if self.session.handle.poll_ending(cx) == super::handle::Ending::Now {
            return Poll::Ready(Err(End::shutdown()));
        }
        if self.backend.socket.is_closed() {
            return Poll::Ready(self.told_to_close());
        }
        loop {
            // Whether something has happened that lets an earlier step go on: bytes that came, answers that were awaited,
            // room where there was none. What only goes through ends here, so that no stream is asked twice in vain.
            let mut again = match self.translate() {
                Ok(Step::Over(outcome)) => return Poll::Ready(Ok(outcome)),
                Ok(Step::On | Step::Wait) => false,
                Err(end) => return Poll::Ready(Err(end)),
            };
            let full = self.backend.output.len() >= HIGH_WATER;
            again |= self.write_to_node(cx) && full;
            match self.read_from_node(cx) {
                // It may have been said while this process was stopped, and the node be left since.
                Poll::Ready(true) if self.backend.socket.is_closed() => {
                    return Poll::Ready(self.told_to_close());
                }
                Poll::Ready(true) => again = true,
                Poll::Ready(false) => return Poll::Ready(self.node_closed()),
                Poll::Pending => {}
            }
            match self.digest() {
                Ok(Step::Over(outcome)) => return Poll::Ready(Ok(outcome)),
                Ok(Step::On) => again = true,
                Ok(Step::Wait) => {}
                Err(end) => return Poll::Ready(Err(end)),
            }
            if self.unit.is_over() && self.backend.output.is_empty() {
                return Poll::Ready(Ok(Outcome::Done));
            }
            let full = self.session.client.output.len() >= HIGH_WATER;
            match self.write_to_client(cx) {
                Ok(wrote) => again |= wrote && full,
                Err(end) => return Poll::Ready(Err(end)),
            }
            match self.read_from_client(cx) {
                Ok(came) => again |= came,
                Err(end) => return Poll::Ready(Err(end)),
            }
            if !again {
                match self.session.timeouts.poll_running(cx) {
                    Poll::Ready(Measure::Stop) => self.session.stop_statement(&self.backend.cancel),
                    Poll::Ready(Measure::End) => return Poll::Ready(Err(self.session.overdue())),
                    Poll::Pending => return Poll::Pending,
                }
            }
        }
    }

    /// Whether there is room again for what the client sends.
    fn write_to_node(&mut self, cx: &mut Context<'_>) -> bool {
        if self.backend.output.is_empty() {
            return false;
        }
        match poll_drain(&mut self.backend.stream, &mut self.backend.output, cx) {
            Poll::Ready(Ok(())) => true,
            // The node may have said why before it closed: read on; the end of input decides.
            Poll::Ready(Err(_)) => {
                self.backend.output.clear();
                false
            }
            Poll::Pending => false,
        }
    }

    /// `Ready(false)`: the node has closed the connection.
    fn read_from_node(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        if self.session.client.output.len() >= HIGH_WATER {
            return Poll::Pending;
        }
        poll_fill(&mut self.backend.stream, &mut self.backend.input, cx).map(|read| matches!(read, Ok(1..)))
    }

    /// Whether there is room again for what the node sends.
    fn write_to_client(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let kept = self.unit.redoable || self.unit.refused.is_some();
        if kept || self.session.client.output.is_empty() {
            return Ok(false);
        }
        self.session.note_before_bytes(self.backend.node, self.backend.epoch, self.unit.writes);
        let client = &mut self.session.client;
        match client.poll_drain(cx) {
            Poll::Ready(Ok(())) => Ok(true),
            Poll::Ready(Err(_)) => Err(End::ClientGone),
            Poll::Pending => Ok(false),
        }
    }

    /// Whether the client has sent more.
    fn read_from_client(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let client = &mut self.session.client;
        if client.at_end {
            return self.wait_without_client(cx);
        }
        if client.input.len() - self.unit.taken >= HIGH_WATER.max(self.unit.wants) {
            return Ok(false);
        }
        match client.poll_fill(cx) {
            Poll::Ready(Ok(n)) if n > 0 => Ok(true),
            Poll::Ready(Ok(_)) if self.unit.was_sent_whole() => {
                client.at_end = true;
                self.wait_without_client(cx)
            }
            Poll::Ready(_) => Err(End::ClientGone),
            Poll::Pending => Ok(false),
        }
    }

    /// The client has closed its side after a whole unit: see the head of this file.
    fn wait_without_client(&mut self, cx: &mut Context<'_>) -> Result<bool, End> {
        let next = self.session.client.input.get(self.unit.taken);
        if self.unit.writes && next.is_some_and(|tag| *tag != b'X') {
            return Ok(false);
        }
        let patience = &mut self.session.client.patience;
        let parting = patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(PARTING)));
        match Pin::as_mut(parting).poll(cx) {
            Poll::Ready(()) => Err(End::ClientGone),
            Poll::Pending => Ok(false),
        }
    }

    /// The node is being left. What it says from now on does not count, and neither does what has not been read.
    fn told_to_close(&mut self) -> Result<Outcome, End> {
        if self.unit.redoable {
            return Ok(Outcome::Again(self.unit.discard.unwrap_or(Again::NodeLost)));
        }
        Err(End::NodeLost { node: self.backend.node })
    }

    /// The node has closed the connection. What it had said before counts first.
    fn node_closed(&mut self) -> Result<Outcome, End> {
        match self.digest()? {
            Step::Over(outcome) => Ok(outcome),
            // Its last word was ReadyForQuery: the unit is done, and the backend is not given back.
            _ if self.unit.over && self.unit.client_rest == 0 => {
                self.backend.dirt = crate::backend::Dirt::Unknown;
                Ok(Outcome::Done)
            }
            _ if self.unit.redoable => Ok(Outcome::Again(self.unit.discard.unwrap_or(Again::NodeLost))),
            _ => Err(End::NodeLost { node: self.backend.node }),
        }
    }
}

/// Appends an error of ours.
pub(super) fn put_report(out: &mut bytes::BytesMut, report: &ErrorReport) {
    let mut message = Vec::new();
    report.put(&mut message);
    bytes::BufMut::put_slice(out, &message);
}
