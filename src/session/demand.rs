//! What a unit asks for: may it run on a replica, and what may it leave behind? A unit is held back
//! only while everything in it is a read.

use std::sync::Arc;

use bytes::Buf;
use hashbrown::HashMap;

use super::exchange::Again;
use super::messages::{self, Parse, Target};
use super::prepared::{self, Found, SqlCommand, Statement};
use super::transaction::Splits;
use super::{End, Session};
use crate::backend::SharedName;
use crate::classify::hint::Hints;
use crate::classify::setting::{self, ResetBatch};
use crate::classify::{self, ClassKey, ClassReason, Kind, Leaves, Lexing, Lookup, PinReason, StatementClass};
use crate::route::{ClassLabel, RouteReason};
use crate::wire::{self, HEADER, TransactionStatus};

/// What a unit asks for.
#[derive(Clone, Copy, Debug)]
pub enum Demand {
    /// We have answered it ourselves.
    Ours,
    /// All of it is reads, and all of it is there.
    Read {
        /// Its bytes.
        vetted: usize,
        /// It has failed on a replica: the primary.
        redone: bool,
    },
    /// It must run on the primary.
    Primary {
        /// Why.
        reason: RouteReason,
        /// What kind of statement decided so.
        label: ClassLabel,
        /// What a Query in it may leave behind (statements of the extended protocol are counted as they are bound).
        leaves: Leaves,
        /// A Query in it is data definition.
        ddl: bool,
        /// A Query in it may change settings.
        settings: bool,
        /// A Query in it may end a transaction.
        may_commit: bool,
    },
}

impl Demand {
    /// Whether all of it is reads.
    pub fn is_read(&self) -> bool {
        matches!(self, Demand::Read { .. })
    }

    /// The same for a session that has only replicas to go to: it is sent where it is sent, without a
    /// second try elsewhere.
    pub fn unvetted(self) -> Demand {
        match self {
            Demand::Read { .. } => Demand::plain(RouteReason::Read, ClassLabel::Read, false),
            other => other,
        }
    }

    /// The same as part of a transaction on the primary.
    pub fn in_transaction(self) -> Demand {
        match self.unvetted() {
            Demand::Primary { reason: RouteReason::Read, label, leaves, ddl, settings, may_commit } => {
                Demand::Primary {
                    reason: RouteReason::InTransaction,
                    label,
                    leaves,
                    ddl,
                    settings,
                    may_commit,
                }
            }
            other => other,
        }
    }

    /// Bytes that were looked at, if all of it is reads.
    pub fn vetted(&self) -> usize {
        match self {
            Demand::Read { vetted, .. } => *vetted,
            Demand::Ours | Demand::Primary { .. } => 0,
        }
    }

    /// What a Query in it may leave behind.
    pub fn leaves(&self) -> Leaves {
        match self {
            Demand::Primary { leaves, .. } => *leaves,
            Demand::Ours | Demand::Read { .. } => Leaves::NOTHING,
        }
    }

    /// Whether a Query in it is data definition.
    pub fn is_ddl(&self) -> bool {
        matches!(self, Demand::Primary { ddl: true, .. })
    }

    /// Whether a Query in it may change settings.
    pub fn sets(&self) -> bool {
        matches!(self, Demand::Primary { settings: true, .. })
    }

    /// Whether a Query in it may end a transaction.
    pub fn may_commit(&self) -> bool {
        matches!(self, Demand::Primary { may_commit: true, .. })
    }

    /// Its class, for metrics.
    pub fn label(&self) -> ClassLabel {
        match self {
            Demand::Primary { label, .. } => *label,
            Demand::Ours | Demand::Read { .. } => ClassLabel::Read,
        }
    }

    /// It failed where it was, and is to run again.
    pub fn redo(&mut self, again: Again) {
        if let Demand::Read { redone, .. } = self {
            // A node that went away is replaced by any other that may serve; a statement is prepared anew on any.
            *redone |= !matches!(again, Again::NodeLost | Again::StaleStatement);
        }
    }

    fn of_query(class: StatementClass, text: &[u8]) -> Demand {
        Demand::Primary {
            reason: reason_of(class),
            label: ClassLabel::of(class.shown()),
            leaves: class.leaves,
            ddl: class.kind == Kind::Ddl,
            settings: class.settings,
            may_commit: class.may_commit(text),
        }
    }

    fn of_statement(class: StatementClass) -> Demand {
        let may_commit = class.kind == Kind::TransactionControl;
        Demand::plain(reason_of(class), ClassLabel::of(class.shown()), may_commit)
    }

    /// Also of a message that only a server can answer: with the error that it is none.
    fn not_a_read() -> Demand {
        Demand::plain(RouteReason::NotARead, ClassLabel::Unit, false)
    }

    /// Of that for which no Query says what it leaves or changes.
    fn plain(reason: RouteReason, label: ClassLabel, may_commit: bool) -> Demand {
        Demand::Primary { reason, label, leaves: Leaves::NOTHING, ddl: false, settings: false, may_commit }
    }
}

/// Why a statement that is not a read goes to the primary.
fn reason_of(class: StatementClass) -> RouteReason {
    if class.reason == ClassReason::Hint { RouteReason::Asked } else { RouteReason::NotARead }
}

/// A text longer than may be held: nothing of it is known.
fn too_long() -> Demand {
    Demand::Primary {
        reason: RouteReason::TooLong,
        label: ClassLabel::Unit,
        leaves: Leaves::UNPROVEN,
        ddl: true,
        settings: false,
        may_commit: true,
    }
}

impl Session {
    /// What the unit at the start of the client's input asks for. The session holds no backend.
    pub(super) async fn demand(&mut self) -> Result<Demand, End> {
        {
            // An epoch that was lost is to be told of before anything is answered. What samples say is looked at where
            // the unit is placed.
            let topology = self.shared.topology.load();
            if topology.epoch != self.mark.epoch() {
                self.bring_mark_forward(&topology);
            }
            self.take_shared_mark(&topology);
        }
        if let Some(fork) = self.lost.take() {
            self.fail_unit(super::place::lost(&fork))?;
            return Ok(Demand::Ours);
        }
        (self.asked_for, self.hinted) = (self.promise, false);
        if self.splits != Splits::None && self.answer_transaction_commands().await? {
            return Ok(Demand::Ours);
        }
        let demand = self.demand_of_unit().await?;
        Ok(if self.lazy.is_some() { self.demand_apart(demand) } else { demand })
    }

    async fn demand_of_unit(&mut self) -> Result<Demand, End> {
        let mut needs_backend = false;
        // Names made (or closed) by the messages looked at so far.
        let mut names: HashMap<Vec<u8>, Option<Arc<Statement>>> = HashMap::new();
        let mut at = 0;
        loop {
            let Some(header) = wire::header(&self.client.input[at..]).map_err(End::length)? else {
                self.fill_client().await?;
                continue;
            };
            if at + header.len > self.config.limits.unit_hold {
                return Ok(too_long());
            }
            if at + header.len > self.client.input.len() {
                self.fill_client().await?;
                continue;
            }
            match header.tag {
                b'Q' => return self.demand_query(at, header.len).await,
                b'F' => return Ok(Demand::not_a_read()),
                b'P' if header.len > self.config.limits.statement_text => return Ok(too_long()),
                b'P' => {
                    needs_backend = true;
                    let body = &self.client.input[at + HEADER..at + header.len];
                    let Some(parse) = Parse::read(body) else { return Ok(Demand::not_a_read()) };
                    let statement = self.shared.names.statement(&parse, self.settings.parse_fingerprint());
                    names.insert(prepared::key(parse.name).to_vec(), Some(statement.clone()));
                    self.judged.get_or_insert_with(|| statement.clone());
                    let class = self.class_of(&statement).await;
                    if let Some(report) = self.take_hints(statement.text(), class.hints) {
                        self.fail_unit(report)?;
                        return Ok(Demand::Ours);
                    }
                    if !matches!(class.kind, Kind::Read | Kind::Empty) {
                        self.ask_for_own(class);
                        self.look_for_own(statement.text(), class).await?;
                        return Ok(Demand::of_statement(class));
                    }
                }
                b'B' => {
                    needs_backend = true;
                    let body = &self.client.input[at + HEADER..at + header.len];
                    let Some((_, name, _)) = messages::bind_names(body) else {
                        return Ok(Demand::not_a_read());
                    };
                    let found = match names.get(prepared::key(name)) {
                        Some(found) => found.clone(),
                        None => match self.statements.find(name) {
                            Found::Statement(statement) => Some(statement),
                            Found::OnBackend => return Ok(Demand::not_a_read()),
                            Found::Nothing => None,
                        },
                    };
                    // A name that stands for nothing: the server says so, any server.
                    if let Some(statement) = found {
                        let class = self.class_of(&statement).await;
                        if let Some(report) = self.take_hints(statement.text(), class.hints) {
                            self.fail_unit(report)?;
                            return Ok(Demand::Ours);
                        }
                        if !matches!(class.kind, Kind::Read | Kind::Empty) {
                            self.ask_for_own(class);
                            self.look_for_own(statement.text(), class).await?;
                            return Ok(Demand::of_statement(class));
                        }
                    }
                }
                b'C' => {
                    let body = &self.client.input[at + HEADER..at + header.len];
                    match messages::target(body) {
                        Some(Target::Statement(name)) => {
                            names.insert(prepared::key(name).to_vec(), None);
                        }
                        Some(Target::Portal(_)) => {}
                        None => return Ok(Demand::not_a_read()),
                    }
                }
                b'S' | b'H' if header.len > HEADER => return Ok(Demand::not_a_read()),
                b'S' | b'H' => {
                    at += header.len;
                    break;
                }
                b'D' if self.describes_another(&self.client.input[at + HEADER..at + header.len]) => {
                    return Ok(Demand::not_a_read());
                }
                b'D' | b'E' => needs_backend = true,
                b'X' => return Err(End::ClientGone),
                b'd' | b'c' | b'f' => {}
                tag => return Err(End::protocol(format!("invalid frontend message type {tag}"))),
            }
            at += header.len;
        }
        if !needs_backend {
            self.answer_without_backend(at);
            return Ok(Demand::Ours);
        }
        Ok(Demand::Read { vetted: at, redone: false })
    }

    /// Whether a Describe is of what shows the rows of another statement: that must be there, too.
    fn describes_another(&self, body: &[u8]) -> bool {
        let Some(Target::Statement(name)) = messages::target(body) else { return false };
        matches!(self.statements.find(name), Found::Statement(statement)
            if classify::shows_rows_of_another(statement.text()))
    }

    /// What a statement asks for may depend on what the session did before on its backend.
    fn ask_for_own(&mut self, class: StatementClass) {
        self.asks_sequences |= class.leaves.pins().has(PinReason::Other);
        self.asks_process |= class.leaves.has(Leaves::UNPROVEN);
    }

    async fn demand_query(&mut self, at: usize, len: usize) -> Result<Demand, End> {
        let Some(text) = messages::query(&self.client.input[at + HEADER..at + len]) else {
            return Ok(Demand::not_a_read());
        };
        let (class, key) = self.classify_keyed(text, &[]).await;
        if class.hints.invalid
            && let Some(report) = super::own::refused_hint(text)
        {
            self.fail_unit(report)?;
            return Ok(Demand::Ours);
        }
        let entered = self.enter_query(text, class, key);
        if at == 0 && class.is_mere_read() {
            self.entered = entered;
            self.take_hints(&[], class.hints);
            return Ok(Demand::Read { vetted: len, redone: false });
        }
        let text = text.to_vec();
        if at == 0 {
            self.entered = entered;
        }
        self.take_hints(&text, class.hints);
        if at == 0 && (self.deallocated(&text, class, len) || self.reset(&text, class, len)) {
            return Ok(Demand::Ours);
        }
        if at == 0 && class.leaves.pins().has(PinReason::SqlPrepare) {
            self.ask_about_execute(&text).await;
            if let Some(demand) = self.demand_by_name(&text, class, len) {
                return Ok(demand);
            }
        }
        if at == 0 && matches!(class.kind, Kind::Read | Kind::Empty) {
            return Ok(Demand::Read { vetted: len, redone: false });
        }
        self.ask_for_own(class);
        self.look_for_own(&text, class).await?;
        // In the middle of an open unit even a read goes where the rest of it goes.
        Ok(Demand::of_query(class, &text))
    }

    /// What a Query at the start of the input asks of the backend that the session holds. `None`: it
    /// is another message, whose statements are counted as they are bound.
    pub(super) fn demand_held(&mut self) -> Option<Demand> {
        let Ok(Some(header)) = wire::header(&self.client.input) else { return None };
        if header.tag != b'Q' {
            return None;
        }
        if header.len > self.client.input.len() {
            // It is passed on as it comes, so nothing of it is known.
            return Some(too_long());
        }
        let text = messages::query(&self.client.input[HEADER..header.len])?;
        let class = match self.lookup(text, &[]) {
            Lookup::Known(class, key) => {
                self.entered = self.enter_query(text, class, key);
                if class.is_mere_read() && class.hints == Hints::default() {
                    return Some(Demand::Read { vetted: 0, redone: false });
                }
                class
            }
            // Only what may be a read is worth a second opinion, and a read leaves nothing; but nobody has said
            // that it is one.
            Lookup::Ask(question) => {
                if question.hints() != Hints::default() {
                    let text = text.to_vec();
                    self.bad_hint = self.take_hints(&text, question.hints()).map(Box::new);
                }
                return Some(Demand::not_a_read());
            }
        };
        let text = text.to_vec();
        self.bad_hint = self.take_hints(&text, class.hints).map(Box::new);
        if self.deallocated(&text, class, header.len) {
            return Some(Demand::Ours);
        }
        if class.leaves.pins().has(PinReason::SqlPrepare)
            && let Some(demand) = self.demand_by_name(&text, class, 0)
        {
            return Some(demand);
        }
        if matches!(class.kind, Kind::Read | Kind::Empty) {
            return Some(Demand::Read { vetted: 0, redone: false });
        }
        Some(Demand::of_query(class, &text))
    }

    /// What SQL's PREPARE, EXECUTE or DEALLOCATE of one name asks for: the name is kept track of, and so
    /// an EXECUTE may run wherever its statement may. `None`: it cannot be, and pins.
    fn demand_by_name(&mut self, text: &[u8], class: StatementClass, vetted: usize) -> Option<Demand> {
        // It leaves nothing but the name, which is taken from the backend before another session's use.
        let leaves_a_name = Demand::of_query(StatementClass { leaves: Leaves::NOTHING, ..class }, text);
        if let Some(prepare) = classify::sql_prepare(text) {
            let limits = &self.config.limits;
            if SharedName::is_like(&prepare.name)
                || text.len() > limits.statement_text
                || self.statements.len() >= limits.statements_per_session
                || matches!(self.statements.find(&prepare.name), Found::OnBackend)
            {
                return None;
            }
            let name = prepare.name.clone();
            let statement = self.shared.names.sql_statement(text, prepare);
            self.sql = Some(SqlCommand::Prepare(name, statement));
            return Some(leaves_a_name);
        }
        if let Some(name) = classify::deallocate_target(text) {
            if SharedName::is_like(&name) || matches!(self.statements.find(&name), Found::OnBackend) {
                return None;
            }
            self.sql = Some(SqlCommand::Deallocate(name));
            return Some(leaves_a_name);
        }
        let execute = classify::sql_execute(text)?;
        if SharedName::is_like(&execute.name) {
            return None;
        }
        let statement = match self.statements.find(&execute.name) {
            Found::Statement(statement) => statement,
            Found::OnBackend => return None,
            // The server says so.
            Found::Nothing => return Some(leaves_a_name),
        };
        let mut class = self.known_class(&statement);
        if let (Some(of_statement), Some(arguments)) = (class, &execute.arguments) {
            class = match self.lookup(arguments, &[]) {
                Lookup::Known(of_arguments, _) if of_arguments.kind == Kind::Read => class,
                Lookup::Known(of_arguments, _) => {
                    let leaves = of_statement.leaves | of_arguments.leaves;
                    Some(StatementClass { leaves, ..of_arguments })
                }
                Lookup::Ask(_) => None,
            };
        }
        if let Some(class) = &mut class
            && std::mem::take(&mut class.settings)
        {
            // The text of the EXECUTE does not show what is set.
            class.leaves |= Leaves::pin(PinReason::Setting);
        }
        self.sql = Some(SqlCommand::Execute(execute.name));
        Some(match class {
            Some(StatementClass { kind: Kind::Read | Kind::Empty, .. }) => {
                Demand::Read { vetted, redone: false }
            }
            Some(class) => Demand::of_query(class, text),
            // It may be a read, and so leaves nothing; but nobody has said that it is one.
            None => leaves_a_name,
        })
    }

    /// Has all classified that an EXECUTE would run.
    async fn ask_about_execute(&self, text: &[u8]) {
        let Some(execute) = classify::sql_execute(text) else { return };
        if let Found::Statement(statement) = self.statements.find(&execute.name) {
            self.class_of(&statement).await;
        }
        if let Some(arguments) = &execute.arguments {
            self.classify(arguments, &[]).await;
        }
    }

    /// DEALLOCATE of a name that was prepared through the protocol: on an unpinned session only we
    /// know the name. In a transaction that a server knows of it is a query, for which that takes its snapshot.
    fn deallocated(&mut self, text: &[u8], class: StatementClass, len: usize) -> bool {
        if class.kind != Kind::Session
            || self.pins.hold()
            || self.statements.is_empty()
            || self.status == TransactionStatus::Failed
            || self.status == TransactionStatus::InTransaction && self.lazy.is_none()
        {
            return false;
        }
        let Some(name) = classify::deallocate_target(text) else { return false };
        if !self.statements.remove(&name) {
            return false;
        }
        self.has_run_a_query();
        self.statements.drop_unnamed();
        self.client.input.advance(len);
        let mut out = Vec::new();
        wire::put(&mut out, b'C', |out| wire::put_cstr(out, b"DEALLOCATE"));
        bytes::BufMut::put_slice(&mut self.client.output, &out);
        self.put_ready();
        true
    }

    /// A batch by which a pool makes a session as new: nothing of an idle, unpinned session is on a backend, so
    /// it is answered here, as PostgreSQL answers it.
    fn reset(&mut self, text: &[u8], class: StatementClass, len: usize) -> bool {
        if !class.settings && !class.leaves.has(Leaves::DEALLOCATES_ALL) || self.lexing == Lexing::Unsafe {
            return false;
        }
        if self.lazy.is_some() {
            // It may be refused there, or be rolled back.
            return false;
        }
        let Some(batch) = setting::reset_batch(text) else { return false };
        if batch == ResetBatch::ResetRole && self.settings.names().any(|name| name == "session_authorization")
        {
            // What else it reports then, only a server knows.
            return false;
        }
        let mut out = Vec::new();
        let mut tag = |tag: &[u8]| wire::put(&mut out, b'C', |out| wire::put_cstr(out, tag));
        match batch {
            ResetBatch::DiscardAll => tag(b"DISCARD ALL"),
            ResetBatch::ResetAll | ResetBatch::ResetRole | ResetBatch::ResetName => tag(b"RESET"),
            ResetBatch::DeallocateAll => tag(b"DEALLOCATE ALL"),
            ResetBatch::Asyncpg => {
                wire::put(&mut out, b'T', |out| {
                    out.extend_from_slice(&1_u16.to_be_bytes());
                    wire::put_cstr(out, b"pg_advisory_unlock_all");
                    // No table, type void, of four bytes, as text.
                    out.extend_from_slice(&[0, 0, 0, 0, 0, 0]);
                    out.extend_from_slice(&2278_u32.to_be_bytes());
                    out.extend_from_slice(&4_u16.to_be_bytes());
                    out.extend_from_slice(&(-1_i32).to_be_bytes());
                    out.extend_from_slice(&[0, 0]);
                });
                wire::put(&mut out, b'D', |out| out.extend_from_slice(&[0, 1, 0, 0, 0, 0]));
                for text in [&b"SELECT 1"[..], b"CLOSE CURSOR ALL", b"UNLISTEN", b"RESET"] {
                    wire::put(&mut out, b'C', |out| wire::put_cstr(out, text));
                }
            }
        }
        bytes::BufMut::put_slice(&mut self.client.output, &out);
        self.client.input.advance(len);
        self.statements.drop_unnamed();
        self.affinity = self.shared.names.number();
        if matches!(batch, ResetBatch::DiscardAll | ResetBatch::DeallocateAll) {
            self.statements.clear();
        }
        if matches!(batch, ResetBatch::DiscardAll | ResetBatch::Asyncpg) {
            self.listening.forget();
        }
        match batch {
            ResetBatch::DeallocateAll => {}
            ResetBatch::ResetAll | ResetBatch::Asyncpg => {
                self.reset_settings(|name| !matches!(name, "role" | "session_authorization"))
            }
            ResetBatch::DiscardAll => self.reset_settings(|_| true),
            ResetBatch::ResetRole => self.reset_settings(|name| name == "role"),
            ResetBatch::ResetName => self.reset_settings(|name| name == "application_name"),
        }
        self.put_ready();
        true
    }

    /// Settings have the values again that they had at login; the client is told of those it was told of.
    fn reset_settings(&mut self, which: impl Fn(&str) -> bool) {
        let login = self.told_at_login.clone();
        let mut told: Vec<_> = login.iter().collect();
        // In the server's order.
        told.sort_by_key(|(name, _)| name.to_ascii_lowercase());
        for (name, value) in told {
            let key = String::from_utf8_lossy(name).to_ascii_lowercase();
            // Whether it is a superuser follows from the role.
            let key = if key == "is_superuser" { "role" } else { &key };
            if which(key)
                && self
                    .settings
                    .names()
                    .any(|set| set == key || (key == "role" && set == "session_authorization"))
            {
                self.tell(name, value);
            }
        }
        self.settings.reset_without_backend(which);
    }

    /// Close, Flush and Sync need no server when there is nothing of them there.
    fn answer_without_backend(&mut self, until: usize) {
        let mut left = until;
        while left > 0 {
            let Ok(Some(header)) = wire::header(&self.client.input) else { return };
            let message = self.client.input.split_to(header.len.min(left));
            left -= message.len();
            match header.tag {
                b'C' => {
                    if let Some(Target::Statement(name)) = messages::target(&message[HEADER..]) {
                        if name.is_empty() {
                            self.statements.drop_unnamed();
                        } else {
                            self.statements.remove(name);
                        }
                    }
                    bytes::BufMut::put_slice(&mut self.client.output, &[b'3', 0, 0, 0, 4]);
                }
                b'S' => self.put_ready(),
                _ => {}
            }
        }
    }

    pub(super) fn lookup(&self, text: &[u8], types: &[u32]) -> Lookup {
        let catalog = self.catalog.current();
        let found = self.shared.classifier.lookup(&classify::Statement {
            text,
            parameter_types: types,
            catalog: &catalog,
            lexing: self.lexing,
        });
        if let Lookup::Known(StatementClass { kind: Kind::Ddl, .. }, _) = &found
            && classify::is_database_command(text)
        {
            self.shared.make_room_for_database_command(&self.database);
        }
        found
    }

    async fn classify(&self, text: &[u8], types: &[u32]) -> StatementClass {
        self.classify_keyed(text, types).await.0
    }

    async fn classify_keyed(&self, text: &[u8], types: &[u32]) -> (StatementClass, ClassKey) {
        match self.lookup(text, types) {
            Lookup::Known(class, key) => (class, key),
            Lookup::Ask(question) => {
                let key = question.key();
                (self.shared.classifier.ask(question).await, key)
            }
        }
    }

    /// Names the catalog facts; 0: they are not known, and so nor is whether they change.
    pub(super) fn catalog_identity(&self) -> u64 {
        let catalog = self.catalog.current();
        if catalog.is_loaded() { catalog.identity() } else { 0 }
    }

    /// The class of a prepared statement under the current catalog facts.
    async fn class_of(&self, statement: &Statement) -> StatementClass {
        let generation = self.catalog.current().identity();
        if let Some(class) = statement.class(generation) {
            return class;
        }
        let (mut class, key) = self.classify_keyed(statement.text(), &statement.types()).await;
        statement.enter(key.short_skeleton(), class);
        if let Some(types) = statement.types_query().filter(|_| class.kind == Kind::Read) {
            class = StatementClass { hints: class.hints, ..self.classify(types, &[]).await };
        }
        statement.set_class(generation, class);
        class
    }

    /// The class of a prepared statement as far as it is known without a second opinion.
    pub(super) fn known_class(&self, statement: &Statement) -> Option<StatementClass> {
        let generation = self.catalog.current().identity();
        if let Some(class) = statement.class(generation) {
            return Some(class);
        }
        let Lookup::Known(mut class, key) = self.lookup(statement.text(), &statement.types()) else {
            return None;
        };
        statement.enter(key.short_skeleton(), class);
        if let Some(types) = statement.types_query().filter(|_| class.kind == Kind::Read) {
            let Lookup::Known(of_types, _) = self.lookup(types, &[]) else { return None };
            class = StatementClass { hints: class.hints, ..of_types };
        }
        statement.set_class(generation, class);
        Some(class)
    }

    /// A replica has refused what was taken for a read: it is remembered.
    pub(super) fn learn(&self) {
        let Ok(Some(header)) = wire::header(&self.client.input) else { return };
        if header.tag == b'Q'
            && let Some(text) = self.client.input.get(HEADER..header.len).and_then(messages::query)
            && let Lookup::Known(_, key) = self.lookup(text, &[])
        {
            self.shared.classifier.learn(key);
            return;
        }
        // In the extended protocol: the unit's statements, each of them (which one it was is not said).
        let mut at = 0;
        while let Ok(Some(header)) = wire::header(&self.client.input[at..]) {
            let Some(body) = self.client.input.get(at + HEADER..at + header.len) else { return };
            let statement = match header.tag {
                b'P' => Parse::read(body)
                    .map(|parse| self.shared.names.statement(&parse, self.settings.parse_fingerprint())),
                b'B' => {
                    messages::bind_names(body).and_then(|(_, name, _)| match self.statements.find(name) {
                        Found::Statement(statement) => Some(statement),
                        Found::OnBackend | Found::Nothing => None,
                    })
                }
                b'S' => return,
                _ => None,
            };
            if let Some(statement) = statement
                && let Lookup::Known(_, key) = self.lookup(statement.text(), &statement.types())
            {
                self.shared.classifier.learn(key);
                statement.forget_class();
            }
            at += header.len;
        }
    }
}
