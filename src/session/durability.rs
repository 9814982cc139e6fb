//! How durable a session's commits must be: what the configuration, its settings, the tables it writes to and comments
//! in its statements say of it, given to the backend as `synchronous_commit`.
//!
//! Promises: it is there before the transaction commits, and costs no round trip, for it goes ahead of a unit in the same
//! write; of several writes in one transaction the one that asks for most counts; where nobody says anything, the
//! server's own setting holds, and the session's, if it has set `synchronous_commit` itself.
//!
//! What says most about a write, first: a comment in it, `highwater.durability` (SET before the startup option), a rule
//! about its table, a rule about its user or database. What SET, or SET LOCAL, says in a transaction holds for all of it.

use std::sync::Arc;

use super::exchange::{Purpose, Unit};
use super::messages::{self, Parse};
use super::prepared::Found;
use super::{Role, Session};
use crate::backend::{Applied, Backend};
use crate::classify::{self, Kind, Lookup};
use crate::config::TableRule;
use crate::consistency::Durability;
use crate::wire::{self, HEADER, TransactionStatus};

/// The setting of PostgreSQL's that it comes to.
pub(super) const SETTING: &str = "synchronous_commit";

/// How our own statement begins that sets it; one of a client's names the setting in quotes.
const OURS: &str = "SET synchronous_commit TO ";

/// What is known of a session's durability. Most sessions have none that is said: they keep no such value.
#[derive(Debug, Default)]
pub(super) struct Durable {
    /// By rules for its user and database.
    base: Option<Durability>,
    /// By rules about tables.
    tables: Vec<TableRule>,
    /// Said at its startup.
    login: Option<Durability>,
    /// By its settings now, its login's included.
    said: Option<Durability>,
    /// Said by SET or SET LOCAL in the running unit, for the transaction if that goes on.
    saying: Option<Durability>,
    /// A statement of the running unit has a comment about it.
    hinted: bool,
    transaction: OfTransaction,
    /// What a backend is given for the settings in the first, to be as durable as the second.
    given: Option<(Arc<Applied>, Durability, Arc<Applied>)>,
}

/// What holds for the transaction that is open on the primary.
#[derive(Clone, Copy, Debug, Default)]
struct OfTransaction {
    /// Said in it.
    said: Option<Durability>,
    /// What its writes ask for, if there were any.
    writes: Option<Option<Durability>>,
    /// What the backend was given; `None`: it is not known.
    given: Option<Option<Durability>>,
}

impl OfTransaction {
    /// A unit writes as `asks` asks, in a transaction whose backend has `session` otherwise. What it must be given.
    fn wants(&mut self, asks: Option<Option<Durability>>, session: Option<Durability>) -> Option<Durability> {
        if let Some(asks) = asks {
            self.writes = Some(self.writes.map_or(asks, |before| Durability::stronger(before, asks)));
        }
        self.said.or(self.writes.unwrap_or(session))
    }

    /// Something in it was rolled back, and with it perhaps what was said or given.
    fn rolled_back(&mut self) {
        (self.said, self.given) = (None, None);
    }
}

impl Durable {
    /// `None`: nothing is said about such sessions.
    pub(super) fn new(base: Option<Durability>, tables: Vec<TableRule>) -> Option<Box<Durable>> {
        (base.is_some() || !tables.is_empty())
            .then(|| Box::new(Durable { base, tables, ..Durable::default() }))
    }

    /// What holds for a write of which nothing else is said. `own`: the session has set `synchronous_commit` itself.
    fn of_session(&self, own: bool) -> Option<Durability> {
        self.said.or(self.base.filter(|_| !own))
    }

    /// What a write asks for.
    fn of_write(&self, text: &[u8], hint: Option<Durability>, own: bool) -> Option<Durability> {
        let by_table = || {
            let target = classify::target(text).filter(|_| !own && !self.tables.is_empty())?;
            self.tables
                .iter()
                .find(|rule| rule.is_about(&target.schema, &target.table))
                .map(|rule| rule.durability)
        };
        hint.or(self.said).or_else(by_table).or(self.of_session(own))
    }

    /// What makes a backend whose session wants `wanted` so durable.
    fn applied(&mut self, wanted: &Arc<Applied>, durability: Durability) -> Arc<Applied> {
        match &self.given {
            Some((of, as_, applied)) if Arc::ptr_eq(of, wanted) && *as_ == durability => applied.clone(),
            _ => {
                let mut applied = Applied::clone(wanted);
                applied.put(SETTING, Some(format!("{OURS}{}", durability.synchronous_commit()).into()));
                let applied = Arc::new(applied);
                self.given = Some((wanted.clone(), durability, applied.clone()));
                applied
            }
        }
    }
}

/// Whether a backend was given the setting by us, and not by a session's own statement.
pub(super) fn is_ours(applied: &Applied) -> bool {
    let sql = applied.entry(SETTING).and_then(|entry| entry.sql.as_deref());
    sql.is_some_and(|sql| sql.is_empty() || sql.starts_with(OURS))
}

impl Session {
    /// The session has said so at its startup, or by SET: `None` takes it back.
    pub(super) fn take_durability(&mut self, said: Option<Durability>, at_login: bool) {
        if said.is_none() && self.durable.is_none() {
            return;
        }
        let durable = self.durable.get_or_insert_default();
        if at_login {
            durable.login = said;
        }
        durable.said = said.or(durable.login);
    }

    /// A statement that is about to run sets it.
    pub(super) fn sets_durability(&mut self, said: Option<Durability>) {
        self.durable.get_or_insert_default().saying = said;
    }

    /// A comment in a statement of the unit that begins is about it.
    pub(super) fn hints_durability(&mut self) {
        self.durable.get_or_insert_default().hinted = true;
    }

    /// What holds for the session, to be shown.
    pub(super) fn durability(&self) -> Option<Durability> {
        let durable = self.durable.as_ref()?;
        durable.transaction.said.or(durable.of_session(self.has_own_setting()))
    }

    fn has_own_setting(&self) -> bool {
        self.settings.wanted().entry(SETTING).is_some()
    }

    /// What the running unit's writes ask for, as far as its statements are there: `None`: it has none.
    fn durability_of_unit(&self, durable: &Durable) -> Option<Option<Durability>> {
        let own = self.has_own_setting();
        let mut asked: Option<Option<Durability>> = None;
        let mut count = |text: &[u8]| {
            let class = match self.lookup(text, &[]) {
                Lookup::Known(class, _) => class,
                // It may be a read, and nothing else.
                Lookup::Ask(_) => return,
            };
            if matches!(class.kind, Kind::Read | Kind::Empty | Kind::Session | Kind::TransactionControl) {
                return;
            }
            let asks = durable.of_write(text, class.hints.durability, own);
            asked = Some(asked.map_or(asks, |before| Durability::stronger(before, asks)));
        };
        // What names stand for that the unit gives itself.
        let mut parsed: Vec<&[u8]> = Vec::new();
        let mut rest = &self.client.input[..];
        while let Ok(Some(header)) = wire::header(rest) {
            let Some(body) = rest.get(HEADER..header.len) else { break };
            match header.tag {
                b'Q' => {
                    if let Some((text, _)) = wire::cstr(body) {
                        count(text);
                    }
                    break;
                }
                b'P' => {
                    if let Some(parse) = Parse::read(body) {
                        count(parse.text);
                        parsed.push(parse.name);
                    }
                }
                b'B' => {
                    if let Some((_, name, _)) = messages::bind_names(body)
                        && !parsed.contains(&name)
                        && let Found::Statement(statement) = self.statements.find(name)
                    {
                        count(statement.text());
                    }
                }
                b'S' => break,
                _ => {}
            }
            rest = &rest[header.len..];
        }
        asked
    }

    /// What the backend must have been given for a unit that begins outside a transaction.
    pub(super) fn wanted_for_unit(&mut self) -> Option<Arc<Applied>> {
        if self.role != Role::Primary {
            return None;
        }
        let mut durable = self.durable.take()?;
        let session = durable.of_session(self.has_own_setting());
        let looks = durable.hinted || !durable.tables.is_empty();
        let writes = if looks { self.durability_of_unit(&durable) } else { None };
        let asks = writes.unwrap_or(session);
        durable.transaction = OfTransaction { said: None, writes, given: Some(asks) };
        let applied = asks.map(|durability| durable.applied(self.settings.wanted(), durability));
        self.durable = Some(durable);
        applied
    }

    /// A unit of an open transaction begins: what it asks for goes ahead of it.
    pub(super) fn give_durability(&mut self, unit: &mut Unit, backend: &mut Backend) {
        if self.role != Role::Primary || self.status != TransactionStatus::InTransaction {
            return;
        }
        let Some(mut durable) = self.durable.take() else { return };
        let session = durable.of_session(self.has_own_setting());
        let looks = durable.hinted || !durable.tables.is_empty() || durable.transaction.writes.is_some();
        if looks && self.wrote && durable.transaction.writes.is_none() {
            // Nobody has looked at what it wrote before: that asks for what the session does.
            durable.transaction.writes = Some(session);
        }
        let asks = if looks { self.durability_of_unit(&durable) } else { None };
        let wants = durable.transaction.wants(asks, session);
        if durable.transaction.given != Some(wants) {
            let value = wants.map_or("DEFAULT", Durability::synchronous_commit);
            unit.put_ahead(
                backend,
                format!("SET LOCAL {SETTING} TO {value}").as_bytes(),
                Purpose::Durability,
            );
            durable.transaction.given = Some(wants);
        }
        self.durable = Some(durable);
    }

    /// A unit is over.
    pub(super) fn settle_durability(&mut self) {
        let failed = self.unit.failed();
        let begins = self.unit.before == TransactionStatus::Idle && self.unit.commands <= 1;
        self.wrote =
            self.status == TransactionStatus::InTransaction && (self.wrote || self.unit.writes && !begins);
        let Some(durable) = &mut self.durable else { return };
        durable.hinted = false;
        let saying = durable.saying.take();
        if self.status != TransactionStatus::InTransaction {
            durable.transaction = OfTransaction::default();
            return;
        }
        if self.unit.rollback {
            durable.transaction.rolled_back();
        }
        if !failed && saying.is_some() {
            durable.transaction.said = saying;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Durability::{Applied as A, Async, Sync};

    #[test]
    fn of_a_transactions_writes_the_one_that_asks_for_most_counts() {
        let check = |session, asks: &[Option<Durability>], expected| {
            let mut transaction = OfTransaction::default();
            let mut wants = transaction.wants(None, session);
            for asks in asks {
                wants = transaction.wants(Some(*asks), session);
            }
            assert_eq!(wants, expected, "{session:?} {asks:?}");
        };
        check(None, &[], None);
        check(Some(Sync), &[], Some(Sync));
        check(Some(Sync), &[Some(Async)], Some(Async));
        check(Some(Sync), &[Some(Async), Some(Sync)], Some(Sync));
        check(None, &[Some(Async), None], None);
        check(None, &[None, Some(Async)], None);
        check(None, &[Some(Async), None, Some(Sync)], Some(Sync));
        check(None, &[Some(Sync), Some(A), Some(Async)], Some(A));
    }

    #[test]
    fn what_is_said_in_a_transaction_holds_until_something_of_it_is_rolled_back() {
        let mut transaction =
            OfTransaction { said: Some(Async), given: Some(Some(Async)), ..Default::default() };
        assert_eq!(transaction.wants(Some(Some(Sync)), None), Some(Async));
        transaction.rolled_back();
        assert_eq!((transaction.wants(None, None), transaction.given), (Some(Sync), None));
    }

    #[test]
    fn what_says_most_about_a_write_counts() {
        let tables = vec![TableRule { schema: None, table: "views".into(), durability: Async }];
        let mut durable = Durable { base: Some(Sync), tables, ..Durable::default() };
        let of = |durable: &Durable, hint, own| durable.of_write(b"INSERT INTO views VALUES (1)", hint, own);
        assert_eq!(of(&durable, None, false), Some(Async));
        assert_eq!(durable.of_write(b"INSERT INTO t VALUES (1)", None, false), Some(Sync));
        assert_eq!(of(&durable, None, true), None, "it has set synchronous_commit itself");
        durable.said = Some(A);
        assert_eq!(of(&durable, None, true), Some(A));
        assert_eq!(of(&durable, Some(Async), false), Some(Async));
    }
}
