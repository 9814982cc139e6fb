//! A session's settings: what it has set, so that whichever backend serves next is given it. Pure.
//!
//! What a statement sets counts from its CommandComplete, is pending until its transaction has ended, and
//! is dropped if that was rolled back. Where the outcome does not show (ROLLBACK TO SAVEPOINT, a value that
//! was computed, a procedure that commits), the names are read back from the backend at the end of the
//! transaction: nothing is guessed.
//!
//! A backend remembers what it was given ([`Applied`]); [`replay`] says what it takes to make one fit for
//! another session. A setting of an application's own (`app.tenant`) that is reset does not vanish on one
//! server, it becomes the empty text: so it stays here, without a value.

use std::sync::Arc;

use crate::backend::{Applied, Setting};
use crate::classify::setting::{self, Change};
use crate::wire::TransactionStatus;

/// What a session has set, pending and for good.
#[derive(Debug, Default)]
pub struct Settings {
    /// `application_name` as the client gave it at login, as SQL: RESET brings it back.
    login_name: Option<Arc<str>>,
    wanted: Arc<Applied>,
    /// Completed in a transaction that is not over.
    pending: Vec<Change>,
    /// Something has completed since it was last said what a backend is left with.
    unsaid: bool,
    /// What is pending cannot be told from the outcome.
    uncertain: bool,
    /// ROLLBACKs in the running unit, and commands since something was pending.
    rollbacks: u32,
    commands: u32,
    /// The backend has another `application_name` than the session: RESET gave it the server's.
    name_lost: bool,
}

/// What is to be done at the end of a unit.
#[derive(Debug, PartialEq, Eq)]
pub enum AtReady {
    /// Nothing.
    Settled,
    /// The values of these have to be read back from the backend.
    ReadBack(Vec<String>),
    /// What the session has set is not known, or too much: it must stay on its backend.
    Untracked,
}

/// Changes that one transaction may make before they are no longer tracked.
pub const MOST_PENDING: usize = 1000;

const APPLICATION_NAME: &str = "application_name";

impl Settings {
    /// Of a session whose backends are to be called `application_name`.
    pub fn new(application_name: Option<&str>) -> Settings {
        let mut settings = Settings::default();
        // A name that cannot be restated is a startup parameter of the backends (`take_application_name`).
        let value = application_name.and_then(|name| setting::literal(name.as_bytes(), false));
        if let Some(value) = value {
            settings.login_name = Some(format!("SET SESSION application_name TO {value}").into());
            let mut wanted = Applied::default();
            settings.reset(&mut wanted, APPLICATION_NAME);
            settings.wanted = Arc::new(wanted);
        }
        settings
    }

    /// What a backend must have been given to serve this session.
    pub fn wanted(&self) -> &Arc<Applied> {
        &self.wanted
    }

    /// What a backend has been given once this session's unit has run on it.
    pub fn left_behind(&mut self) -> Arc<Applied> {
        self.unsaid = false;
        if !std::mem::take(&mut self.name_lost) {
            return self.wanted.clone();
        }
        let mut applied = Applied::clone(&self.wanted);
        applied.remove(APPLICATION_NAME);
        Arc::new(applied)
    }

    /// What makes a difference to how the texts of Parse are understood.
    pub fn parse_fingerprint(&self) -> &[u8] {
        self.wanted.parse_fingerprint()
    }

    /// Whether reads must run on the primary, too.
    pub fn keeps_on_primary(&self) -> bool {
        self.wanted.keeps_on_primary()
    }

    /// The names of what RESET ALL would change.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.wanted.entries().iter().map(|entry| &*entry.name)
    }

    /// Whether a command's tag matters now.
    pub fn is_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether the backend has other settings than it is known to have. A COMMIT leaves nothing pending, and yet a
    /// backend that nobody knows to have what was committed.
    pub fn in_flux(&self) -> bool {
        self.unsaid
    }

    /// A statement has completed.
    pub fn completed(&mut self, changes: Vec<Change>) {
        self.unsaid |= !changes.is_empty();
        self.pending.extend(changes);
        if self.pending.len() > MOST_PENDING {
            // More than is worth keeping: if the transaction commits, the session stays where it is.
            self.pending = vec![Change::Untracked];
        }
    }

    /// It cannot be told which of these have happened.
    pub fn perhaps(&mut self, changes: Vec<Change>) {
        self.uncertain |= !changes.is_empty();
        self.completed(changes);
    }

    /// Code that is not understood has run: what the session has set may have other values, and is to be read back. A
    /// setting that it had not set is found by a look at the backend; `application_name` is left out, because the server
    /// reports it whenever it changes.
    pub fn doubt(&mut self) {
        let own = self.names().filter(|name| *name != APPLICATION_NAME);
        let touched = own.map(|name| Change::Touched(name.to_owned())).collect();
        self.completed(touched);
    }

    /// A command has completed while something is pending.
    pub fn command(&mut self, tag: &[u8]) {
        self.commands += 1;
        match tag {
            // By itself, or at the end of a transaction: it counts from here on, whatever becomes of the unit.
            b"COMMIT" | b"PREPARE TRANSACTION" if !self.uncertain && self.rollbacks == 0 => self.commit(),
            b"COMMIT" | b"PREPARE TRANSACTION" => self.uncertain = true,
            b"ROLLBACK" => self.rollbacks += 1,
            b"CALL" | b"DO" => self.uncertain = true,
            _ => {}
        }
    }

    /// ReadyForQuery. `failed`: an error came in the unit; `opaque`: it ran code that is not understood, and
    /// that may have committed.
    pub fn ready(&mut self, status: TransactionStatus, failed: bool, opaque: bool) -> AtReady {
        let rollbacks = std::mem::take(&mut self.rollbacks);
        let commands = std::mem::take(&mut self.commands);
        if self.pending.is_empty() {
            return AtReady::Settled;
        }
        if status != TransactionStatus::Idle {
            // ROLLBACK TO SAVEPOINT, or AND CHAIN.
            self.uncertain |= rollbacks > 0;
            return AtReady::Settled;
        }
        let clear_rollback = rollbacks == 1 && commands == 1;
        let uncertain = self.uncertain || (rollbacks > 0 && !clear_rollback) || (failed && opaque);
        let dropped = failed || rollbacks > 0;
        let hidden = self.pending.iter().any(|change| matches!(change, Change::Touched(_)));
        if uncertain || (hidden && !dropped) {
            return self.ask();
        }
        if dropped {
            // A setting of an application's own that was set stays, without a value.
            let pending = std::mem::take(&mut self.pending);
            let mut wanted = Applied::clone(&self.wanted);
            for change in pending {
                if let Change::Set { name, .. }
                | Change::Local(name)
                | Change::LocalOwn { name, .. }
                | Change::Touched(name) = change
                {
                    define(&mut wanted, &name);
                }
            }
            self.put(wanted);
            return AtReady::Settled;
        }
        if self.pending.contains(&Change::Untracked) {
            self.pending.clear();
            return AtReady::Untracked;
        }
        self.commit();
        AtReady::Settled
    }

    fn ask(&mut self) -> AtReady {
        self.uncertain = false;
        let mut names: Vec<String> = Vec::new();
        let mut untracked = false;
        for change in std::mem::take(&mut self.pending) {
            match change {
                Change::Set { name, .. }
                | Change::Reset(name)
                | Change::Local(name)
                | Change::LocalOwn { name, .. }
                | Change::Touched(name) => names.push(name),
                Change::ResetAll | Change::DiscardAll => {
                    names.extend(self.wanted.entries().iter().map(|entry| entry.name.to_string()));
                }
                Change::Untracked => untracked = true,
            }
        }
        if untracked {
            return AtReady::Untracked;
        }
        if names.iter().any(|name| name == "session_authorization") {
            // It takes the role along.
            names.push("role".to_owned());
        }
        // The role last: as the login role the others may be set.
        names.sort_by_key(|name| match name.as_str() {
            "session_authorization" => (1, String::new()),
            "role" => (2, String::new()),
            name => (0, name.to_owned()),
        });
        names.dedup();
        AtReady::ReadBack(names)
    }

    /// What was read back: a value, or none where the name is not known to the server.
    pub fn read_back(&mut self, values: &[(String, Option<Vec<u8>>)], utf8: bool) -> AtReady {
        let mut wanted = Applied::clone(&self.wanted);
        for (name, value) in values {
            match value {
                Some(value) => {
                    let Some(sql) = setting::restate(name, value, utf8) else { return AtReady::Untracked };
                    wanted.put(name, Some(sql.into()));
                }
                None => wanted.remove(name),
            }
        }
        self.put(wanted);
        AtReady::Settled
    }

    /// What is pending has happened.
    fn commit(&mut self) {
        if self.pending.iter().any(|change| matches!(change, Change::Touched(_) | Change::Untracked)) {
            // For the end of the unit.
            self.uncertain = true;
            return;
        }
        let mut wanted = Applied::clone(&self.wanted);
        for change in std::mem::take(&mut self.pending) {
            match change {
                Change::Set { name, sql } => wanted.put(&name, Some(sql.into())),
                Change::Reset(name) => {
                    self.name_lost |= name == APPLICATION_NAME && self.login_name.is_some();
                    self.reset(&mut wanted, &name);
                }
                Change::Local(name) | Change::LocalOwn { name, .. } => define(&mut wanted, &name),
                Change::ResetAll => self.reset_all(&mut wanted, false),
                Change::DiscardAll => self.reset_all(&mut wanted, true),
                Change::Touched(_) | Change::Untracked => {}
            }
        }
        self.put(wanted);
    }

    /// These are reset, and no backend has done it: the next one is given what is left.
    pub fn reset_without_backend(&mut self, which: impl Fn(&str) -> bool) {
        let mut wanted = Applied::clone(&self.wanted);
        self.reset_those(&mut wanted, which);
        self.put(wanted);
    }

    /// The backend has run RESET ALL, or DISCARD ALL (`roles`, too).
    fn reset_all(&mut self, wanted: &mut Applied, roles: bool) {
        self.reset_those(wanted, |name| roles || !matches!(name, "role" | "session_authorization"));
        self.name_lost |= self.login_name.is_some();
    }

    fn reset_those(&self, wanted: &mut Applied, which: impl Fn(&str) -> bool) {
        let names: Vec<Box<str>> = wanted.entries().iter().map(|entry| entry.name.clone()).collect();
        for name in names.iter().filter(|name| which(name)) {
            self.reset(wanted, name);
        }
        if which(APPLICATION_NAME) {
            self.reset(wanted, APPLICATION_NAME);
        }
    }

    fn reset(&self, wanted: &mut Applied, name: &str) {
        match &self.login_name {
            Some(sql) if name == APPLICATION_NAME => wanted.put(name, Some(sql.clone())),
            _ if name.contains('.') => wanted.put(name, None),
            _ => wanted.remove(name),
        }
    }

    fn put(&mut self, wanted: Applied) {
        if wanted != *self.wanted {
            self.wanted = Arc::new(wanted);
        }
    }

    /// The backend on which something was pending is gone, and the transaction with it.
    pub fn forget_pending(&mut self) {
        self.pending.clear();
        (self.unsaid, self.uncertain, self.rollbacks, self.commands) = (false, false, 0, 0);
    }
}

/// An application's own setting was set for a while: from then on the server knows its name.
fn define(wanted: &mut Applied, name: &str) {
    if name.contains('.') && !wanted.entries().iter().any(|entry| *entry.name == *name) {
        wanted.put(name, None);
    }
}

/// What makes a backend that has been given `has` fit for a session that wants `wants`: one transaction. `None`:
/// nothing is needed.
pub fn replay(has: &Applied, wants: &Applied) -> Option<String> {
    if has == wants {
        return None;
    }
    // Role and session authorization decide who may set the rest: they are taken back first, and those
    // that are wanted are set in the order in which the session has set them.
    let is_role = |entry: &&Setting| matches!(&*entry.name, "role" | "session_authorization");
    let mut statements: Vec<&str> = Vec::new();
    let resets: Vec<String> = has
        .entries()
        .iter()
        .filter(|entry| match wants.entry(&entry.name) {
            _ if is_role(entry) => true,
            Some(wanted) => wanted.sql.is_none() && entry.sql.is_some(),
            None => entry.sql.is_some(),
        })
        .map(|entry| match &*entry.name {
            "session_authorization" => "RESET SESSION AUTHORIZATION".to_owned(),
            name => reset_statement(name),
        })
        .collect();
    if has.entry("role").is_some() {
        statements.push("RESET ROLE");
    }
    statements.extend(resets.iter().filter(|sql| *sql == "RESET SESSION AUTHORIZATION").map(String::as_str));
    let rest = |sql: &&String| **sql != "RESET SESSION AUTHORIZATION" && **sql != "RESET \"role\"";
    statements.extend(resets.iter().filter(rest).map(String::as_str));
    let defined: Vec<String> = wants
        .entries()
        .iter()
        .filter(|entry| entry.sql.is_none() && has.entry(&entry.name).is_none())
        .map(|entry| reset_statement(&entry.name))
        .collect();
    statements.extend(defined.iter().map(String::as_str));
    for entry in wants.entries() {
        let Some(sql) = &entry.sql else { continue };
        let there = has.entry(&entry.name).is_some_and(|its| its.sql == entry.sql);
        if !there || is_role(&entry) {
            statements.push(sql);
        }
    }
    if statements.is_empty() {
        return None;
    }
    Some(format!("BEGIN; {}; COMMIT", statements.join("; ")))
}

fn reset_statement(name: &str) -> String {
    let parts: Vec<String> =
        name.split('.').map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect();
    format!("RESET {}", parts.join("."))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(name: &str, value: &str) -> Vec<Change> {
        vec![Change::Set { name: name.to_owned(), sql: format!("SET {name} TO {value}") }]
    }

    fn shown(settings: &Settings) -> Vec<String> {
        let entries = settings.wanted().entries().iter();
        entries
            .map(|entry| entry.sql.as_deref().map_or(format!("{} known", entry.name), str::to_owned))
            .collect()
    }

    const IDLE: TransactionStatus = TransactionStatus::Idle;

    /// One statement in a unit of its own.
    fn run(settings: &mut Settings, changes: Vec<Change>, tag: &str, status: TransactionStatus) -> AtReady {
        settings.completed(changes);
        if settings.is_pending() {
            settings.command(tag.as_bytes());
        }
        settings.ready(status, false, false)
    }

    #[test]
    fn what_is_set_outside_a_transaction_counts_at_once() {
        let mut settings = Settings::default();
        assert_eq!(run(&mut settings, set("a", "1"), "SET", IDLE), AtReady::Settled);
        run(&mut settings, set("b", "1"), "SET", IDLE);
        run(&mut settings, set("a", "2"), "SET", IDLE);
        assert_eq!(shown(&settings), ["SET b TO 1", "SET a TO 2"]);
        run(&mut settings, vec![Change::Reset("b".to_owned())], "RESET", IDLE);
        assert_eq!(shown(&settings), ["SET a TO 2"]);
        run(&mut settings, vec![Change::ResetAll], "RESET", IDLE);
        assert_eq!(shown(&settings), [""; 0]);
    }

    #[test]
    fn what_fails_in_an_implicit_transaction_is_dropped() {
        let mut settings = Settings::default();
        settings.completed(set("a", "1"));
        settings.command(b"SET");
        assert_eq!(settings.ready(IDLE, true, false), AtReady::Settled);
        assert_eq!(shown(&settings), [""; 0]);
        // But not if a COMMIT came in between.
        settings.completed(set("a", "1"));
        settings.command(b"SET");
        settings.command(b"COMMIT");
        settings.completed(set("b", "1"));
        settings.command(b"SET");
        assert_eq!(settings.ready(IDLE, true, false), AtReady::Settled);
        assert_eq!(shown(&settings), ["SET a TO 1"]);
    }

    #[test]
    fn what_a_savepoint_took_back_is_asked_for() {
        let mut settings = Settings::default();
        let in_transaction = TransactionStatus::InTransaction;
        run(&mut settings, set("a", "1"), "SET", in_transaction);
        assert_eq!(run(&mut settings, vec![], "ROLLBACK", in_transaction), AtReady::Settled);
        let asked = run(&mut settings, vec![], "COMMIT", IDLE);
        assert_eq!(asked, AtReady::ReadBack(vec!["a".to_owned()]));
        settings.read_back(&[("a".to_owned(), Some(b"7".to_vec()))], true);
        assert_eq!(shown(&settings), ["SELECT pg_catalog.set_config(E'a', E'7', false)"]);
    }

    #[test]
    fn a_transaction_that_sets_without_end_is_not_tracked() {
        let mut settings = Settings::default();
        for _ in 0..3 * MOST_PENDING {
            run(&mut settings, set("a", "1"), "SET", TransactionStatus::InTransaction);
            assert!(settings.pending.len() <= MOST_PENDING);
        }
        assert_eq!(run(&mut settings, vec![], "COMMIT", IDLE), AtReady::Untracked);
        assert!(!settings.is_pending());
    }

    #[test]
    fn a_procedure_that_may_commit_is_not_guessed_about() {
        let mut settings = Settings::default();
        settings.completed(set("a", "1"));
        settings.command(b"SET");
        settings.command(b"CALL");
        assert!(matches!(settings.ready(IDLE, false, true), AtReady::ReadBack(_)));
        settings.completed(set("a", "1"));
        settings.command(b"SET");
        assert!(matches!(settings.ready(IDLE, true, true), AtReady::ReadBack(_)));
    }

    #[test]
    fn an_applications_own_setting_stays_known() {
        let mut settings = Settings::default();
        run(&mut settings, set("app.x", "1"), "SET", IDLE);
        run(&mut settings, vec![Change::Reset("app.x".to_owned())], "RESET", IDLE);
        run(&mut settings, vec![Change::Local("app.y".to_owned())], "SET", IDLE);
        assert_eq!(shown(&settings), ["app.x known", "app.y known"]);
    }

    #[test]
    fn reset_brings_the_logins_application_name_back() {
        let mut settings = Settings::new(Some("it's"));
        assert_eq!(shown(&settings), ["SET SESSION application_name TO E'it''s'"]);
        run(&mut settings, set(APPLICATION_NAME, "x"), "SET", IDLE);
        run(&mut settings, vec![Change::ResetAll], "RESET", IDLE);
        assert_eq!(shown(&settings), ["SET SESSION application_name TO E'it''s'"]);
        // The backend has the server's own by then.
        assert!(settings.left_behind().entries().is_empty());
        assert_eq!(settings.left_behind().entries().len(), 1);
    }

    fn applied(entries: &[(&str, Option<&str>)]) -> Applied {
        let mut applied = Applied::default();
        for (name, sql) in entries {
            applied.put(name, sql.map(Arc::from));
        }
        applied
    }

    #[test]
    fn a_backend_is_given_only_what_differs() {
        let a = applied(&[("a", Some("SET a TO 1")), ("b", Some("SET b TO 1"))]);
        let b = applied(&[("b", Some("SET b TO 1")), ("c.d", Some("SET c.d TO 1"))]);
        assert_eq!(replay(&a, &a), None);
        assert_eq!(replay(&a, &b).unwrap(), "BEGIN; RESET \"a\"; SET c.d TO 1; COMMIT");
        assert_eq!(replay(&b, &Applied::default()).unwrap(), "BEGIN; RESET \"b\"; RESET \"c\".\"d\"; COMMIT");
        let known = applied(&[("c.d", None)]);
        assert_eq!(replay(&b, &known).unwrap(), "BEGIN; RESET \"b\"; RESET \"c\".\"d\"; COMMIT");
        assert_eq!(replay(&known, &Applied::default()), None);
        assert_eq!(replay(&Applied::default(), &known).unwrap(), "BEGIN; RESET \"c\".\"d\"; COMMIT");
    }

    #[test]
    fn roles_are_left_before_anything_else_and_taken_in_turn() {
        let role =
            applied(&[("a", Some("SET a TO 1")), ("role", Some("SET ROLE x")), ("b", Some("SET b TO 1"))]);
        assert_eq!(
            replay(&role, &applied(&[("role", Some("SET ROLE y"))])).unwrap(),
            "BEGIN; RESET ROLE; RESET \"a\"; RESET \"b\"; SET ROLE y; COMMIT"
        );
        assert_eq!(
            replay(&Applied::default(), &role).unwrap(),
            "BEGIN; SET a TO 1; SET ROLE x; SET b TO 1; COMMIT"
        );
    }

    /// What a client may do, each in a unit of its own.
    #[derive(Clone, Debug)]
    enum Act {
        Set(u8, u8),
        SetLocal,
        Reset(u8),
        ResetAll,
        Begin,
        Commit,
        Rollback,
        Savepoint,
        RollbackTo,
        Error,
    }

    fn acts() -> impl Strategy<Value = Vec<Act>> {
        let act = prop_oneof![
            4 => (0..3_u8, 0..3_u8).prop_map(|(name, value)| Act::Set(name, value)),
            1 => Just(Act::SetLocal),
            2 => (0..3_u8).prop_map(Act::Reset),
            1 => Just(Act::ResetAll),
            2 => Just(Act::Begin),
            2 => Just(Act::Commit),
            1 => Just(Act::Rollback),
            1 => Just(Act::Savepoint),
            1 => Just(Act::RollbackTo),
            1 => Just(Act::Error),
        ];
        prop::collection::vec(act, 0..40)
    }

    type Values = [Option<u8>; 3];

    /// A server, as far as settings go: session values, and a stack of what to go back to.
    #[derive(Default)]
    struct Server {
        session: Values,
        /// In a transaction: values at its start, and at its savepoint.
        start: Option<Values>,
        savepoint: Option<Values>,
        failed: bool,
    }

    impl Server {
        fn status(&self) -> TransactionStatus {
            match self.start {
                None => IDLE,
                Some(_) if self.failed => TransactionStatus::Failed,
                Some(_) => TransactionStatus::InTransaction,
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_tracked_is_what_a_server_has(acts in acts()) {
            let names = ["a", "b", "c"];
            let mut server = Server::default();
            let mut settings = Settings::default();
            let mut left = Arc::<Applied>::default();
            for act in acts {
                let (mut changes, mut tag, mut error) = (Vec::new(), "SET", false);
                let aborted = server.failed;
                match act {
                    Act::Set(name, value) if !aborted => {
                        server.session[usize::from(name)] = Some(value);
                        changes = set(names[usize::from(name)], &value.to_string());
                    }
                    // Of no consequence once the transaction is over; `effects` does not even mention it.
                    Act::SetLocal if !aborted => {}
                    Act::Reset(name) if !aborted => {
                        server.session[usize::from(name)] = None;
                        (changes, tag) = (vec![Change::Reset(names[usize::from(name)].to_owned())], "RESET");
                    }
                    Act::ResetAll if !aborted => {
                        server.session = [None; 3];
                        (changes, tag) = (vec![Change::ResetAll], "RESET");
                    }
                    Act::Begin if !aborted => {
                        server.start.get_or_insert(server.session);
                        tag = "BEGIN";
                    }
                    Act::Commit | Act::Rollback => {
                        let rolls_back = aborted || matches!(act, Act::Rollback);
                        if let Some(start) = server.start.take().filter(|_| rolls_back) {
                            server.session = start;
                        }
                        (server.savepoint, server.failed) = (None, false);
                        tag = if rolls_back { "ROLLBACK" } else { "COMMIT" };
                    }
                    Act::Savepoint if server.start.is_some() && !aborted => {
                        server.savepoint = Some(server.session);
                        tag = "SAVEPOINT";
                    }
                    Act::RollbackTo if server.savepoint.is_some() => {
                        server.session = server.savepoint.unwrap();
                        server.failed = false;
                        tag = "ROLLBACK";
                    }
                    _ => error = true,
                }
                if error {
                    server.failed = server.start.is_some();
                } else {
                    settings.completed(changes);
                    if settings.is_pending() {
                        settings.command(tag.as_bytes());
                    }
                }
                match settings.ready(server.status(), error, false) {
                    AtReady::Settled => {}
                    AtReady::ReadBack(asked) => {
                        let value = |name: &String| {
                            let at = names.iter().position(|its| its == name).unwrap();
                            Some(server.session[at].map_or("default".to_owned(), |v| v.to_string()).into_bytes())
                        };
                        let values: Vec<_> = asked.iter().map(|name| (name.clone(), value(name))).collect();
                        prop_assert_eq!(settings.read_back(&values, true), AtReady::Settled);
                    }
                    AtReady::Untracked => prop_assert!(false, "nothing here is untracked"),
                }
                if server.status() == IDLE {
                    if settings.in_flux() {
                        left = settings.left_behind();
                    }
                    prop_assert_eq!(&left, settings.wanted(), "the backend has what nobody knows of");
                    for (at, name) in names.iter().enumerate() {
                        let tracked = settings.wanted().entry(name).and_then(|entry| entry.sql.clone());
                        let value = tracked.map(|sql| {
                            let digit = sql.trim_end_matches(", false)").trim_end_matches('\'').chars().last();
                            digit.unwrap()
                        });
                        let expected = server.session[at].map(|value| char::from(b'0' + value));
                        // A default that was read back is as good as none.
                        prop_assert_eq!(value.filter(|v| *v != 't'), expected, "{}", name);
                    }
                }
            }
        }
    }
}
