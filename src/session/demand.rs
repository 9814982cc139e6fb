//! What a unit asks for: may it run on a replica, and what may it leave behind? A unit is held back
//! only while everything in it is a read.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Buf;

use super::exchange::Again;
use super::messages::{self, Parse, Target};
use super::prepared::{Found, Statement};
use super::{End, Session};
use crate::classify::{self, Kind, Leaves, Lookup, StatementClass};
use crate::route::{ClassLabel, RouteReason};
use crate::wire::{self, ErrorReport, HEADER, TransactionStatus};

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
            Demand::Read { .. } => Demand::Primary {
                reason: RouteReason::Read,
                label: ClassLabel::Read,
                leaves: Leaves::Nothing,
                ddl: false,
            },
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
            Demand::Ours | Demand::Read { .. } => Leaves::Nothing,
        }
    }

    /// Whether a Query in it is data definition.
    pub fn is_ddl(&self) -> bool {
        matches!(self, Demand::Primary { ddl: true, .. })
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
            // A node that went away is replaced by any other that may serve.
            *redone |= again != Again::NodeLost;
        }
    }

    fn of_query(class: StatementClass) -> Demand {
        Demand::Primary {
            reason: RouteReason::NotARead,
            label: ClassLabel::of(class.kind),
            leaves: class.leaves,
            ddl: class.kind == Kind::Ddl,
        }
    }

    fn not_a_read(label: ClassLabel) -> Demand {
        Demand::Primary { reason: RouteReason::NotARead, label, leaves: Leaves::Nothing, ddl: false }
    }
}

/// A text longer than may be held: nothing of it is known.
fn too_long() -> Demand {
    Demand::Primary {
        reason: RouteReason::TooLong,
        label: ClassLabel::Unit,
        leaves: Leaves::Unproven,
        ddl: true,
    }
}

impl Session {
    /// What the unit at the start of the client's input asks for. The session holds no backend.
    pub(super) async fn demand(&mut self) -> Result<Demand, End> {
        {
            let topology = self.shared.topology.load_full();
            self.bring_mark_forward(&topology);
        }
        if let Some(fork) = self.lost.take() {
            let report =
                ErrorReport::error("HW001", "what this session has written or seen was lost in a failover")
                    .detail(fork.to_string())
                    .hint("Read again what later work depends on; the session is usable.");
            self.fail_unit(report)?;
            return Ok(Demand::Ours);
        }
        let mut needs_backend = false;
        // Names made (or closed) by the messages looked at so far.
        let mut names: HashMap<Vec<u8>, Option<Arc<Statement>>> = HashMap::new();
        let mut at = 0;
        loop {
            let Some(header) = wire::header(&self.client.input[at..]).map_err(End::length)? else {
                self.fill_client().await?;
                continue;
            };
            if at + header.len > self.shared.config.limits.unit_hold {
                return Ok(too_long());
            }
            if at + header.len > self.client.input.len() {
                self.fill_client().await?;
                continue;
            }
            match header.tag {
                b'Q' => return self.demand_query(at, header.len).await,
                b'F' => return Ok(Demand::not_a_read(ClassLabel::Unit)),
                b'P' if header.len > self.shared.config.limits.statement_text => return Ok(too_long()),
                b'P' => {
                    needs_backend = true;
                    let body = &self.client.input[at + HEADER..at + header.len];
                    let parse = Parse::read(body).ok_or_else(|| End::protocol("invalid message format"))?;
                    let statement = self.shared.names.statement(&parse);
                    names.insert(parse.name.to_vec(), Some(statement.clone()));
                    let class = self.class_of(&statement).await;
                    if !matches!(class.kind, Kind::Read | Kind::Empty) {
                        return Ok(Demand::not_a_read(ClassLabel::of(class.kind)));
                    }
                }
                b'B' => {
                    needs_backend = true;
                    let body = &self.client.input[at + HEADER..at + header.len];
                    let (_, name, _) =
                        messages::bind_names(body).ok_or_else(|| End::protocol("invalid message format"))?;
                    let found = match names.get(name) {
                        Some(found) => found.clone(),
                        None => match self.statements.find(name) {
                            Found::Statement(statement) => Some(statement),
                            Found::OnBackend => return Ok(Demand::not_a_read(ClassLabel::Unit)),
                            Found::Nothing => None,
                        },
                    };
                    // A name that stands for nothing: the server says so, any server.
                    if let Some(statement) = found {
                        let class = self.class_of(&statement).await;
                        if !matches!(class.kind, Kind::Read | Kind::Empty) {
                            return Ok(Demand::not_a_read(ClassLabel::of(class.kind)));
                        }
                    }
                }
                b'C' => {
                    let body = &self.client.input[at + HEADER..at + header.len];
                    match messages::target(body).ok_or_else(|| End::protocol("invalid message format"))? {
                        Target::Statement(name) => {
                            names.insert(name.to_vec(), None);
                        }
                        Target::Portal(_) => {}
                    }
                }
                b'S' | b'H' => {
                    at += header.len;
                    break;
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

    async fn demand_query(&mut self, at: usize, len: usize) -> Result<Demand, End> {
        let text = query_text(&self.client.input[at + HEADER..at + len])
            .ok_or_else(|| End::protocol("invalid message format"))?
            .to_vec();
        let class = self.classify(&text, &[]).await;
        if at == 0 && self.deallocated(&text, class, len) {
            return Ok(Demand::Ours);
        }
        if at == 0 && matches!(class.kind, Kind::Read | Kind::Empty) {
            return Ok(Demand::Read { vetted: len, redone: false });
        }
        // In the middle of an open unit even a read goes where the rest of it goes.
        Ok(Demand::of_query(class))
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
        let text = query_text(&self.client.input[HEADER..header.len])?.to_vec();
        let class = match self.lookup(&text, &[]) {
            Lookup::Known(class, _) => class,
            // Only what may be a read is worth a second opinion, and a read leaves nothing.
            Lookup::Ask(_) => return Some(Demand::Read { vetted: 0, redone: false }),
        };
        if self.deallocated(&text, class, header.len) {
            return Some(Demand::Ours);
        }
        if matches!(class.kind, Kind::Read | Kind::Empty) {
            return Some(Demand::Read { vetted: 0, redone: false });
        }
        Some(Demand::of_query(class))
    }

    /// DEALLOCATE of a name that was prepared through the protocol: on an unpinned session only we
    /// know the name.
    fn deallocated(&mut self, text: &[u8], class: StatementClass, len: usize) -> bool {
        if class.kind != Kind::Session
            || self.pin.is_some()
            || self.statements.is_empty()
            || self.status == TransactionStatus::Failed
        {
            return false;
        }
        let Some(name) = classify::deallocate_target(text) else { return false };
        if !self.statements.remove(&name) {
            return false;
        }
        self.statements.drop_unnamed();
        self.client.input.advance(len);
        let mut out = Vec::new();
        wire::put(&mut out, b'C', |out| wire::put_cstr(out, b"DEALLOCATE"));
        bytes::BufMut::put_slice(&mut self.client.output, &out);
        self.put_ready();
        true
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
        match self.lookup(text, types) {
            Lookup::Known(class, _) => class,
            Lookup::Ask(question) => self.shared.classifier.ask(question).await,
        }
    }

    /// The class of a prepared statement under the current catalog facts.
    async fn class_of(&self, statement: &Statement) -> StatementClass {
        let generation = self.catalog.current().identity();
        if let Some(class) = statement.class(generation) {
            return class;
        }
        let class = self.classify(statement.text(), &statement.types()).await;
        statement.set_class(generation, class);
        class
    }

    /// The class of a prepared statement as far as it is known without a second opinion.
    pub(super) fn known_class(&self, statement: &Statement) -> Option<StatementClass> {
        let generation = self.catalog.current().identity();
        if let Some(class) = statement.class(generation) {
            return Some(class);
        }
        match self.lookup(statement.text(), &statement.types()) {
            Lookup::Known(class, _) => {
                statement.set_class(generation, class);
                Some(class)
            }
            Lookup::Ask(_) => None,
        }
    }

    /// A replica has refused what was taken for a read: it is remembered.
    pub(super) fn learn(&self) {
        let Ok(Some(header)) = wire::header(&self.client.input) else { return };
        if header.tag == b'Q'
            && let Some(text) = self.client.input.get(HEADER..header.len).and_then(query_text)
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
                b'P' => Parse::read(body).map(|parse| self.shared.names.statement(&parse)),
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

fn query_text(body: &[u8]) -> Option<&[u8]> {
    let (text, rest) = wire::cstr(body)?;
    rest.is_empty().then_some(text)
}
