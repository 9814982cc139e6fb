//! `routing.transactions: split`: transactions that begin without a backend.
//!
//! A BEGIN that asks for no more than READ COMMITTED is answered here. While nothing but reads comes, each runs in a
//! transaction of its own on a replica, under a snapshot of its own, as a statement at READ COMMITTED has anyway; so no
//! replica has an idle transaction to hold up its replay. What those reads are shown is at or past a position of the
//! primary sampled after BEGIN had come: without that, transactions that do not even overlap would lose updates.
//!
//! The first statement that is anything else moves the transaction to the primary: BEGIN goes ahead of it in the same
//! write, and from then on it is an ordinary transaction there. So does what would show that the reads are apart: the
//! transaction's time, cursors and portals that outlive their unit, savepoints, settings. After an error all but COMMIT
//! and ROLLBACK moves to a transaction that is made to fail there, too, so that what is answered is the server's.

use bytes::{Buf, BufMut};

use super::demand::Demand;
use super::exchange::{Purpose, Unit};
use super::mark::Freshness;
use super::messages::{self, Parse, Target};
use super::prepared::{Found, Statement};
use super::{End, Role, Session};
use crate::backend::{Backend, SharedName};
use crate::classify::{
    self, Isolation, Kind, Lexing, TransactionCommand, depends_on_transaction, parameters_name_the_clock,
};
use crate::config::Transactions;
use crate::consistency::Level;
use crate::wire::{self, HEADER, TransactionStatus};

use std::sync::Arc;

/// Which of a session's transactions may begin without a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Splits {
    None,
    /// Those that are READ ONLY.
    ReadOnly,
    All,
}

/// A transaction that the client has begun and no node knows of.
#[derive(Debug)]
pub(super) struct Lazy {
    /// BEGIN, as the client has sent it.
    begin: Box<[u8]>,
    /// What its reads must be shown.
    pub(super) freshness: Freshness,
    /// It has had a query: the server then refuses another isolation level.
    queried: bool,
}

/// A message that is longer is no transaction command.
const LONGEST_COMMAND: usize = 1024;

/// Makes a transaction fail, and does nothing else.
const FAIL: &[u8] = b"ROLLBACK TO SAVEPOINT highwater_failed";

/// What the client's input begins with.
enum Start {
    /// Not a command that may be answered here.
    Other,
    /// It cannot be told before there is more of it.
    Incomplete,
    /// A Query of so many bytes.
    Query(TransactionCommand, Box<[u8]>, usize),
    /// Messages of the extended protocol up to an Execute.
    Execute(Box<Executed>),
}

/// A command by the extended protocol.
struct Executed {
    command: TransactionCommand,
    text: Box<[u8]>,
    /// Bytes of it.
    len: usize,
    /// What its Parse makes.
    parsed: Option<(Vec<u8>, Arc<Statement>)>,
    /// The answers to all but the Execute.
    answers: Vec<u8>,
}

/// Whether the messages of a unit may run apart from their transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Apart {
    /// They may: so many bytes.
    Yes(usize),
    No,
    /// It cannot be told before there is more of the unit.
    Incomplete,
}

impl Session {
    /// Which of this session's transactions may begin without a backend. `default_isolation`: what the server takes
    /// where BEGIN says nothing.
    pub(super) fn splits_transactions(&self, default_isolation: &[u8]) -> Splits {
        let routing = &self.config.routing;
        let possible = routing.split
            && !self.read_only
            && !self.keeps_backend
            && matches!(default_isolation, b"read committed" | b"read uncommitted");
        match routing.transactions {
            _ if !possible => Splits::None,
            Transactions::Split => Splits::All,
            Transactions::Primary if routing.read_only_on_replicas => Splits::ReadOnly,
            Transactions::Primary => Splits::None,
        }
    }

    /// The level that counts for the next statement: within a transaction no read goes back behind another.
    pub(super) fn level(&self) -> Level {
        match self.asked_for.level {
            Level::Eventual | Level::ReadYourWrites if self.lazy.is_some() => Level::Session,
            level => level,
        }
    }

    /// Answers the transaction commands at the start of the input that need no server. Whether a unit has been
    /// answered with that.
    pub(super) async fn answer_transaction_commands(&mut self) -> Result<bool, End> {
        loop {
            match self.command_at_start()? {
                Start::Other => return Ok(false),
                Start::Incomplete => self.fill_client().await?,
                Start::Query(command, text, len) => {
                    if !self.answer_command(command, text, &[]) {
                        return Ok(false);
                    }
                    self.client.input.advance(len);
                    self.statements.drop_unnamed();
                    self.put_ready();
                    return Ok(true);
                }
                Start::Execute(executed) => {
                    let Executed { command, text, len, parsed, answers } = *executed;
                    if !self.answer_command(command, text, &answers) {
                        return Ok(false);
                    }
                    self.client.input.advance(len);
                    if let Some((name, statement)) = parsed {
                        self.statements.sent(&name, Found::Statement(statement));
                        self.statements.succeeded();
                    }
                }
            }
        }
    }

    /// Begins or ends a transaction without a backend. Whether that could be done.
    fn answer_command(&mut self, command: TransactionCommand, text: Box<[u8]>, answers: &[u8]) -> bool {
        let tag: &[u8] = match command {
            TransactionCommand::Begin { isolation, tag, .. } => {
                if !self.begin_lazily(isolation, text) {
                    return false;
                }
                tag.as_bytes()
            }
            TransactionCommand::Commit | TransactionCommand::Rollback => {
                if self.lazy.take().is_none() {
                    return false;
                }
                let failed = self.status == TransactionStatus::Failed;
                self.status = TransactionStatus::Idle;
                if command == TransactionCommand::Commit && !failed { b"COMMIT" } else { b"ROLLBACK" }
            }
        };
        let mut out = answers.to_vec();
        wire::put(&mut out, b'C', |out| wire::put_cstr(out, tag));
        self.client.output.put_slice(&out);
        true
    }

    fn begin_lazily(&mut self, isolation: Isolation, text: Box<[u8]>) -> bool {
        let default_is_set = || self.settings.names().any(|name| name == "default_transaction_isolation");
        let possible = self.status == TransactionStatus::Idle
            && self.lazy.is_none()
            && self.lexing != Lexing::Unsafe
            && !self.settings.keeps_on_primary()
            && match isolation {
                Isolation::ReadCommitted => true,
                Isolation::Default => !default_is_set(),
                Isolation::Other => false,
            };
        if !possible {
            return false;
        }
        let topology = self.shared.topology.load();
        let Some(freshness) = Freshness::of_now(&*self.shared.positions, &topology) else { return false };
        // The sample is on its way while the client sends its first statement.
        if let Some(primary) = freshness.awaits() {
            self.shared.positions.node(primary).want();
        }
        drop(topology);
        self.timeouts.unit_runs(self.status);
        self.status = TransactionStatus::InTransaction;
        self.lazy = Some(Lazy { begin: text, freshness, queried: false });
        self.shared.metrics.split_transactions.inc();
        true
    }

    fn command_at_start(&self) -> Result<Start, End> {
        let input = &self.client.input[..];
        let Some(header) = wire::header(input).map_err(End::length)? else { return Ok(Start::Incomplete) };
        if header.len > LONGEST_COMMAND || !matches!(header.tag, b'Q' | b'P' | b'B' | b'D') {
            return Ok(Start::Other);
        }
        if matches!(header.tag, b'B' | b'D') && self.lazy.is_none() && !self.statements.any_begins() {
            return Ok(Start::Other);
        }
        let Some(body) = input.get(HEADER..header.len) else { return Ok(Start::Incomplete) };
        if header.tag != b'Q' {
            return Ok(self.executed_at_start(input));
        }
        let text = match wire::cstr(body) {
            Some((text, [])) => text,
            _ => return Ok(Start::Other),
        };
        Ok(match self.own_command(text) {
            Some(command) => Start::Query(command, text.into(), header.len),
            None => Start::Other,
        })
    }

    /// The command, if it may be one for us.
    fn own_command(&self, text: &[u8]) -> Option<TransactionCommand> {
        let command = TransactionCommand::read(text)?;
        let is_ours = match command {
            TransactionCommand::Begin { read_only, .. } => {
                self.lazy.is_none() && (read_only || self.splits == Splits::All)
            }
            TransactionCommand::Commit | TransactionCommand::Rollback => self.lazy.is_some(),
        };
        is_ours.then_some(command)
    }

    /// Parse (unless the client has prepared it before), Bind, Describe of either, Execute, all of one command.
    fn executed_at_start(&self, input: &[u8]) -> Start {
        let mut at = 0;
        let mut parsed: Option<(Vec<u8>, Arc<Statement>)> = None;
        let mut bound: Option<(TransactionCommand, Box<[u8]>)> = None;
        let mut answers = Vec::new();
        loop {
            let header = match wire::header(&input[at..]) {
                Ok(Some(header)) if header.len <= LONGEST_COMMAND && at <= 4 * LONGEST_COMMAND => header,
                _ if at > 4 * LONGEST_COMMAND => return Start::Other,
                Ok(None) => return Start::Incomplete,
                _ => return Start::Other,
            };
            let Some(body) = input.get(at + HEADER..at + header.len) else { return Start::Incomplete };
            at += header.len;
            let answered = match (header.tag, &bound) {
                (b'P', None) if parsed.is_none() => self.command_parsed(body).map(|made| {
                    parsed = Some(made);
                    wire::put(&mut answers, b'1', |_| {});
                }),
                (b'B', None) => self.command_bound(body, parsed.as_ref()).map(|command| {
                    bound = Some(command);
                    wire::put(&mut answers, b'2', |_| {});
                }),
                (b'D', bound) => match messages::target(body) {
                    Some(Target::Statement(name))
                        if self.command_of(name, parsed.as_ref()).is_some() && bound.is_none() =>
                    {
                        wire::put(&mut answers, b't', |out| out.extend_from_slice(&[0, 0]));
                        wire::put(&mut answers, b'n', |_| {});
                        Some(())
                    }
                    Some(Target::Portal(b"")) if bound.is_some() => {
                        wire::put(&mut answers, b'n', |_| {});
                        Some(())
                    }
                    _ => None,
                },
                (b'E', Some((command, text))) if matches!(messages::execute(body), Some((b"", _))) => {
                    let (command, text) = (*command, text.clone());
                    return Start::Execute(Box::new(Executed { command, text, len: at, parsed, answers }));
                }
                _ => None,
            };
            if answered.is_none() {
                return Start::Other;
            }
        }
    }

    fn command_parsed(&self, body: &[u8]) -> Option<(Vec<u8>, Arc<Statement>)> {
        let parse = Parse::read(body)?;
        self.own_command(parse.text)?;
        let is_new = parse.name.is_empty()
            || !SharedName::is_like(parse.name)
                && matches!(self.statements.find(parse.name), Found::Nothing)
                && self.statements.len() < self.config.limits.statements_per_session;
        (is_new && parse.types().next().is_none()).then(|| {
            let settings = self.settings.parse_fingerprint();
            (parse.name.to_vec(), self.shared.names.statement(&parse, settings))
        })
    }

    fn command_of(
        &self,
        name: &[u8],
        parsed: Option<&(Vec<u8>, Arc<Statement>)>,
    ) -> Option<(TransactionCommand, Box<[u8]>)> {
        let statement = match parsed {
            Some((of, statement)) if of == name => statement.clone(),
            _ => match self.statements.find(name) {
                Found::Statement(statement) if !statement.is_sql() && !statement.has_changed() => statement,
                _ => return None,
            },
        };
        if !statement.types().is_empty() {
            return None;
        }
        self.own_command(statement.text()).map(|command| (command, statement.text().into()))
    }

    fn command_bound(
        &self,
        body: &[u8],
        parsed: Option<&(Vec<u8>, Arc<Statement>)>,
    ) -> Option<(TransactionCommand, Box<[u8]>)> {
        let (portal, name, names) = messages::bind_names(body)?;
        (portal.is_empty() && messages::binds_nothing(&body[names..]))
            .then(|| self.command_of(name, parsed))?
    }

    /// What a unit of a transaction without a backend asks for: a read stays a read if it may run apart.
    pub(super) fn demand_apart(&self, demand: Demand) -> Demand {
        match demand {
            Demand::Ours => Demand::Ours,
            Demand::Read { vetted, .. }
                if self.status == TransactionStatus::InTransaction
                    && self.sql.is_none()
                    && matches!(self.runs_apart(&self.client.input[..vetted], false), Apart::Yes(_)) =>
            {
                demand
            }
            demand => demand.in_transaction(),
        }
    }

    /// Whether a unit, or what is left of it, may run apart from its transaction. `judge`: its statements have not
    /// been judged yet.
    pub(super) fn runs_apart(&self, unit: &[u8], judge: bool) -> Apart {
        let catalog = self.catalog.current();
        let apart = |text: &[u8]| !depends_on_transaction(text, &catalog);
        // A portal that is not executed to its end would be found by the next unit.
        let (mut at, mut bound, mut any_bound) = (0, false, false);
        loop {
            if at > self.config.limits.unit_hold {
                return Apart::No;
            }
            let header = match wire::header(&unit[at..]) {
                Ok(Some(header)) => header,
                Ok(None) => return Apart::Incomplete,
                Err(_) => return Apart::No,
            };
            let Some(body) = unit.get(at + HEADER..at + header.len) else { return Apart::Incomplete };
            at += header.len;
            let is_apart = match header.tag {
                b'P' if header.len > self.config.limits.statement_text => false,
                b'Q' if judge => false,
                b'Q' => {
                    return match wire::cstr(body) {
                        Some((text, _)) if apart(text) => Apart::Yes(at),
                        _ => Apart::No,
                    };
                }
                b'P' => Parse::read(body).is_some_and(|parse| {
                    let types: Vec<u32> = if judge { parse.types().collect() } else { Vec::new() };
                    apart(parse.text) && (!judge || self.is_known_read(parse.text, &types))
                }),
                b'B' => {
                    any_bound = true;
                    bound = true;
                    messages::bind_names(body).is_some_and(|(portal, name, names)| {
                        let of_statement = match self.statements.find(name) {
                            Found::Statement(statement) => {
                                apart(statement.text())
                                    && !statement.is_sql()
                                    && (!judge || self.is_known_read(statement.text(), &statement.types()))
                            }
                            // Parsed by this unit, or unknown to the server, too.
                            Found::Nothing => true,
                            Found::OnBackend => false,
                        };
                        portal.is_empty() && of_statement && !parameters_name_the_clock(&body[names..])
                    })
                }
                b'E' => std::mem::take(&mut bound) && messages::execute(body) == Some((b"", 0)),
                b'D' | b'C' => messages::target(body).is_some(),
                b'H' => return if any_bound { Apart::No } else { Apart::Yes(at) },
                b'S' => return if bound { Apart::No } else { Apart::Yes(at) },
                _ => false,
            };
            if !is_apart {
                return Apart::No;
            }
        }
    }

    fn is_known_read(&self, text: &[u8], types: &[u32]) -> bool {
        matches!(self.lookup(text, types), classify::Lookup::Known(class, _) if matches!(class.kind, Kind::Read | Kind::Empty))
    }

    /// The transaction moves to the backend that was found on the primary.
    pub(super) fn open_transaction(&self, unit: &mut Unit, backend: &mut Backend) {
        let Some(lazy) = &self.lazy else { return };
        // Behind a new line: there may be a comment.
        let queried: &[u8] = if lazy.queried { b"\n;SELECT" } else { b"" };
        unit.put_ahead(backend, &[&lazy.begin, queried].concat(), Purpose::Begin);
        if self.status == TransactionStatus::Failed {
            unit.put_ahead(backend, FAIL, Purpose::Fail);
        }
    }

    /// A read of it has run apart. Nothing but empty queries: they count for none.
    pub(super) fn has_queried(&mut self, unit: &Unit) {
        if unit.commands > 0 || unit.completed == 0 {
            self.has_run_a_query();
        }
    }

    /// On one server it would have its snapshot now.
    pub(super) fn has_run_a_query(&mut self) {
        if let Some(lazy) = &mut self.lazy {
            lazy.queried = true;
        }
    }

    /// It is open there.
    pub(super) fn transaction_opened(&mut self) {
        self.lazy = None;
        self.shared.metrics.moved_transactions.inc();
    }

    /// Whether the leased backend runs reads apart from the session's transaction.
    pub(super) fn is_apart(&self) -> bool {
        self.lazy.is_some() && self.role == Role::Replica
    }
}
