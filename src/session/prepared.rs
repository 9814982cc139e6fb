//! A session's prepared statements: which texts its names stand for. Pure.
//!
//! A statement is known to the client by its own name, and to a backend by a name that all sessions
//! share ([`SharedName`]: a keyed hash of text and parameter types), so that whichever backend serves
//! next has it or is given it. While a session is pinned its backend knows the client's own names, so
//! that SQL's EXECUTE and DEALLOCATE see the same names as the protocol.

use std::collections::{HashSet, VecDeque};
use std::hash::Hasher;
use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use hashbrown::HashMap;
use siphasher::sip128::{Hasher128, SipHasher13};

use super::messages::Parse;
use crate::backend::{Shape, SharedName};
use crate::classify::{self, SqlPrepare, StatementClass};

/// Of a PREPARE: where its text has the statement proper, and a query about the parameters' types.
type OfSql = (Range<usize>, Option<Vec<u8>>);

/// A prepared statement of a client.
#[derive(Debug)]
pub struct Statement {
    /// Its name on unpinned backends.
    pub shared: SharedName,
    /// Text, zero byte, number of types, type OIDs: as Parse has them behind the name.
    pub tail: Bytes,
    /// Where the text ends.
    text_end: usize,
    /// A number that no other Parse of the process has.
    pub serial: u64,
    /// What its name says of the settings under which it was parsed.
    pub settings: Box<[u8]>,
    /// It was prepared by SQL: where its text has the statement proper, and a query that tells whether the
    /// parameters' types are harmless.
    sql: Option<Box<OfSql>>,
    class: Mutex<Option<(u64, StatementClass)>>,
    /// What it is entered in the ledger under, with the class it had then.
    entry: OnceLock<(u64, StatementClass)>,
    /// The shape that the client was given; 0: none yet.
    shape: AtomicU64,
    /// The unit in which it was given: until that has succeeded it can be taken back.
    given_in: AtomicU64,
    changed: AtomicBool,
    /// It is the client's unnamed statement, and stands under its shared name where that is allowed.
    stands_in: AtomicBool,
    /// The client's statement, for which this one stands on backends that parse it under other settings.
    stands_for: Option<Arc<Statement>>,
    /// Of an EXECUTE: the server's answer to a Describe, which is decided when it is parsed.
    description: OnceLock<Box<[u8]>>,
    /// It is used where it was parsed again.
    again: AtomicBool,
}

/// Bytes that a description may have to be kept.
const LONGEST_DESCRIPTION: usize = 16 * 1024;

impl Statement {
    /// What the client goes by: its description of the statement, or what its rows looked like.
    pub fn shape(&self) -> Option<Shape> {
        NonZeroU64::new(self.shape.load(Ordering::Relaxed)).map(Shape)
    }

    /// The client is being given this shape, in the unit of that number.
    pub fn give_shape(&self, shape: Shape, unit: u64) {
        self.shape.store(shape.0.get(), Ordering::Relaxed);
        self.given_in.store(unit, Ordering::Relaxed);
    }

    /// The answer of that unit never came: if the shape was given in it, the client has not seen it.
    /// Whether the client goes by no shape now.
    pub fn take_shape_back(&self, unit: u64) -> bool {
        if self.given_in.load(Ordering::Relaxed) == unit {
            self.shape.store(0, Ordering::Relaxed);
        }
        self.shape().is_none()
    }

    /// Prepared anew it had another shape than the client goes by: it fails until the client prepares
    /// it anew, too, as it would on one server.
    pub fn has_changed(&self) -> bool {
        self.changed.load(Ordering::Relaxed)
    }

    /// It was prepared anew and has this shape.
    pub fn compare_shape(&self, anew: Shape) -> bool {
        let same =
            self.shape().is_none_or(|shape| shape == anew) || classify::shows_rows_of_another(self.text());
        if !same {
            self.changed.store(true, Ordering::Relaxed);
            if let Some(clients) = &self.stands_for {
                clients.changed.store(true, Ordering::Relaxed);
            }
        }
        same
    }

    /// The server has described it so (a RowDescription, or NoData). Kept of what shows the rows of another statement: what
    /// that is when the client prepares this one decides how it is described from then on.
    pub fn keep_description(&self, answer: &[u8]) {
        if answer.len() <= LONGEST_DESCRIPTION && classify::shows_rows_of_another(self.text()) {
            self.description.get_or_init(|| answer.into());
        }
    }

    /// A Parse of ours is sent, or stood there already.
    pub fn parse_again(&self) {
        self.again.store(true, Ordering::Relaxed);
    }

    /// How it was described when the client had it parsed, if the server may describe it otherwise since a Parse of ours.
    pub fn description(&self) -> Option<&[u8]> {
        let may_differ = self.again.load(Ordering::Relaxed);
        self.description.get().filter(|_| may_differ).map(|answer| &answer[..])
    }

    /// Whether a Parse, under the settings that `settings` stands for, makes the same statement again.
    pub fn is_made_by(&self, parse: &Parse<'_>, settings: &[u8]) -> bool {
        !self.is_sql() && self.tail == parse.tail && *self.settings == *settings
    }

    /// The text; of one that was prepared by SQL, the statement proper.
    pub fn text(&self) -> &[u8] {
        let text = &self.tail[..self.text_end];
        match &self.sql {
            Some(sql) => text.get(sql.0.clone()).unwrap_or_default(),
            None => text,
        }
    }

    /// Whether it may begin a transaction, as far as its first letters tell.
    fn may_begin(&self) -> bool {
        let text = self.text().trim_ascii_start();
        let starts = |word: &[u8]| text.get(..word.len()).is_some_and(|w| w.eq_ignore_ascii_case(word));
        starts(b"begin") || starts(b"start") || starts(b"/*") || starts(b"--")
    }

    /// It is an unnamed statement that is given to backends under its shared name.
    pub fn share_unnamed(&self) {
        self.stands_in.store(true, Ordering::Relaxed);
    }

    /// Whether it is one.
    pub fn is_shared_unnamed(&self) -> bool {
        self.stands_in.load(Ordering::Relaxed)
    }

    /// Whether it was prepared by SQL: then what `tail` has is a PREPARE.
    pub fn is_sql(&self) -> bool {
        self.sql.is_some()
    }

    /// A query that must be a read, too, for the statement to be one.
    pub fn types_query(&self) -> Option<&[u8]> {
        self.sql.as_deref()?.1.as_deref()
    }

    /// The parameter types that the client stated.
    pub fn types(&self) -> Vec<u32> {
        self.tail
            .get(self.text_end + 3..)
            .unwrap_or_default()
            .chunks_exact(4)
            .map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    }

    /// Its class as found under the catalog facts of `generation`.
    pub fn class(&self, generation: u64) -> Option<StatementClass> {
        let class = self.class.lock().unwrap_or_else(|p| p.into_inner());
        class.filter(|(found, _)| *found == generation).map(|(_, class)| class)
    }

    /// Its class must be asked for again.
    pub fn forget_class(&self) {
        *self.class.lock().unwrap_or_else(|p| p.into_inner()) = None;
    }

    /// What it is entered in the ledger under, and what it was found to be; `None`: it has not been judged yet.
    pub fn entry(&self) -> Option<(u64, StatementClass)> {
        self.entry.get().copied()
    }

    /// Remembers its skeleton.
    pub fn enter(&self, skeleton: u64, class: StatementClass) {
        self.entry.get_or_init(|| (skeleton, class));
    }

    /// Remembers its class.
    pub fn set_class(&self, generation: u64, class: StatementClass) {
        *self.class.lock().unwrap_or_else(|p| p.into_inner()) = Some((generation, class));
    }
}

/// Makes [`Statement`]s. One per process: its key must be the same for all sessions.
#[derive(Debug)]
pub struct Names {
    key: [u8; 16],
    next: AtomicU64,
    /// Unnamed statements seen lately, by a part of their names: a place each, which the next one that falls there
    /// takes. Made when it is needed.
    seen: OnceLock<Box<[AtomicU64]>>,
}

/// Places for unnamed statements seen lately: 64 KiB.
const SEEN: usize = 8192;

impl Names {
    /// `key` must be random: nobody may craft two texts with one name.
    pub fn new(key: [u8; 16]) -> Names {
        Names { key, next: AtomicU64::new(1), seen: OnceLock::new() }
    }

    /// A statement for a Parse under the settings that `settings` stands for: what a literal means is
    /// decided when it is parsed.
    pub fn statement(&self, parse: &Parse<'_>, settings: &[u8]) -> Arc<Statement> {
        let serial = self.number();
        let mut hasher = SipHasher13::new_with_key(&self.key);
        hasher.write(parse.tail);
        hasher.write(settings);
        if has_moment_literal(parse.text) {
            // 'now' is turned into a time at Parse: sharing would freeze the first client's time for all.
            hasher.write_u64(serial);
        }
        let tail = Bytes::copy_from_slice(parse.tail);
        Names::made(hasher.finish128().as_u128(), tail, serial, settings, None)
    }

    /// A statement that SQL has prepared. Backends have it under the client's own name alone.
    pub fn sql_statement(&self, text: &[u8], prepare: SqlPrepare) -> Arc<Statement> {
        let serial = self.number();
        let tail = Bytes::from([text, &[0, 0, 0]].concat());
        Names::made(u128::from(serial), tail, serial, &[], Some((prepare.statement, prepare.types)))
    }

    /// Whether this unnamed statement has been seen lately; from now on it has.
    pub fn see_unnamed(&self, name: SharedName) -> bool {
        let seen = self.seen.get_or_init(|| (0..SEEN).map(|_| AtomicU64::new(0)).collect());
        // Of a keyed hash any bits do. Zero is what empty places hold.
        let [place, mark] = [name.0 as usize, (name.0 >> 64) as usize];
        let mark = mark as u64 | 1;
        seen[place % SEEN].swap(mark, Ordering::Relaxed) == mark
    }

    /// A number that nothing else of the process has.
    pub fn number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn made(hash: u128, tail: Bytes, serial: u64, settings: &[u8], sql: Option<OfSql>) -> Arc<Statement> {
        let text_end = crate::wire::cstr(&tail).map_or(0, |(text, _)| text.len());
        Arc::new(Statement {
            shared: SharedName(hash),
            tail,
            text_end,
            serial,
            settings: settings.into(),
            sql: sql.map(Box::new),
            class: Mutex::new(None),
            entry: OnceLock::new(),
            shape: AtomicU64::new(0),
            given_in: AtomicU64::new(0),
            changed: AtomicBool::new(false),
            stands_in: AtomicBool::new(false),
            stands_for: None,
            description: OnceLock::new(),
            again: AtomicBool::new(false),
        })
    }
}

impl Names {
    /// The same text under other settings, for a backend that lacks it and can only parse it under these.
    pub fn under(&self, statement: &Arc<Statement>, settings: &[u8]) -> Option<Arc<Statement>> {
        let body = [b"\0", &statement.tail[..]].concat();
        let mut here = Parse::read(&body).map(|parse| self.statement(&parse, settings))?;
        Arc::get_mut(&mut here)?.stands_for = Some(statement.clone());
        Some(here)
    }
}

/// Whether the text may hold a literal that stands for a moment. Finding one too many only costs sharing.
fn has_moment_literal(text: &[u8]) -> bool {
    const WORDS: [&[u8]; 4] = [b"now", b"today", b"tomorrow", b"yesterday"];
    memchr::memchr2_iter(b'\'', b'$', text).any(|at| {
        let after = text[at + 1..].trim_ascii_start();
        WORDS.iter().any(|w| after.len() >= w.len() && after[..w.len()].eq_ignore_ascii_case(w))
    })
}

/// Bytes of a name that count: the server keeps no more of it (`NAMEDATALEN`), so that two names which begin with the same
/// are one.
const NAME: usize = 63;

/// The part of a statement's name by which the server, and we, know it.
pub fn key(name: &[u8]) -> &[u8] {
    &name[..name.len().min(NAME)]
}

/// What a name stands for, seen from within a unit whose answers have not all arrived.
#[derive(Clone, Debug)]
pub enum Found {
    /// A statement.
    Statement(Arc<Statement>),
    /// A statement whose text was too long to be kept: the session's backend alone has it.
    OnBackend,
    /// Nothing: the server will say so.
    Nothing,
}

/// A session's names.
///
/// The server answers Parse and Close in order, so what they do to the names waits in line until its
/// answer comes. An error empties the line. A unit that is taken back to be run again must find the
/// names as they were when it began: while one can be, what answers have changed is kept aside.
#[derive(Debug, Default)]
pub struct Statements {
    named: HashMap<Vec<u8>, Found>,
    unnamed: Option<Found>,
    /// Names made or closed (`Nothing`) by messages of the running unit that the server has not
    /// answered yet; the latest last.
    unanswered: VecDeque<(Vec<u8>, Found)>,
    /// For each name in `unanswered`: how often it is there, and what it was made last. A unit of ten
    /// thousand statements looks up each of them; while there are few (`FEW`), it is empty.
    latest: HashMap<Vec<u8>, (usize, Found)>,
    /// How many of `unanswered` make a name.
    making: usize,
    /// What answered messages of the running unit have changed, as it was before; the latest last.
    /// `None`: the unit will not be taken back.
    before: Option<Vec<(Vec<u8>, Found)>>,
    /// Units so far.
    units: u64,
    /// The session's number among all, and how often a name was taken away: what a backend was given under
    /// the client's own names is good for this alone.
    version: (u64, u64),
    /// There may be some that SQL has prepared.
    of_sql: bool,
    /// There may be some that begin a transaction.
    begins: bool,
}

impl Statements {
    /// None yet. `session`: a number that no other session of the process has.
    pub fn new(session: u64) -> Statements {
        Statements { version: (session, 0), ..Statements::default() }
    }

    /// Names the set of names: another one when a name may stand for something else than before.
    pub fn version(&self) -> (u64, u64) {
        self.version
    }

    /// Whether SQL has prepared statements (some of which may be gone).
    pub fn any_of_sql(&self) -> bool {
        self.of_sql
    }

    /// SQL has prepared a statement.
    pub fn add(&mut self, name: Vec<u8>, statement: Arc<Statement>) {
        self.of_sql = true;
        self.put(name, Found::Statement(statement));
    }

    /// A unit begins; its number. `redoable`: it may be taken back.
    pub fn begin(&mut self, redoable: bool) -> u64 {
        self.before = redoable.then(Vec::new);
        self.units += 1;
        self.units
    }

    /// The running unit will not be taken back any more.
    pub fn commit(&mut self) {
        self.before = None;
    }

    /// The unit is taken back, to be run again elsewhere: names are as they were when it began.
    pub fn take_back(&mut self) {
        self.forget_unanswered();
        self.version.1 += 1;
        while let Some((name, found)) = self.before.as_mut().and_then(Vec::pop) {
            self.put(name, found);
        }
    }

    /// What `name` (empty: unnamed) stands for.
    pub fn find(&self, name: &[u8]) -> Found {
        let name = key(name);
        match self.sent_last(name) {
            Some(found) => found.clone(),
            None => self.answered(name),
        }
    }

    /// The statements that a text may name, and those that these may name in their turn. `None`: it may be any.
    pub fn reached_by(&self, text: &[u8]) -> Option<HashSet<Vec<u8>>> {
        let mut reached = classify::statements_named(text)?;
        let mut unread: Vec<Vec<u8>> = reached.iter().cloned().collect();
        while let Some(name) = unread.pop() {
            let Found::Statement(statement) = self.find(&name) else { continue };
            if !classify::may_name_statements(statement.text()) {
                continue;
            }
            let further = classify::statements_named(statement.text())?;
            unread.extend(further.difference(&reached).cloned());
            reached.extend(further);
        }
        Some(reached)
    }

    /// What unanswered messages have made of a name.
    fn sent_last(&self, name: &[u8]) -> Option<&Found> {
        if self.latest.is_empty() {
            return self.unanswered.iter().rev().find(|(sent, _)| sent == name).map(|(_, found)| found);
        }
        self.latest.get(name).map(|(_, found)| found)
    }

    /// What `name` stands for as far as the server has answered.
    pub fn answered(&self, name: &[u8]) -> Found {
        let name = key(name);
        let found = if name.is_empty() { self.unnamed.as_ref() } else { self.named.get(name) };
        found.cloned().unwrap_or(Found::Nothing)
    }

    fn put(&mut self, name: Vec<u8>, found: Found) {
        match found {
            found if name.is_empty() => self.unnamed = Some(found),
            Found::Nothing => {
                self.remove(&name);
            }
            found => {
                self.named.insert(name, found);
            }
        }
    }

    /// Named statements now, those that wait for their answer included.
    pub fn len(&self) -> usize {
        self.named.len() + self.making
    }

    /// Whether there is no named statement.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The named statements whose text is known, as the messages sent so far leave them.
    pub fn named(&self) -> impl Iterator<Item = (&Vec<u8>, &Arc<Statement>)> {
        let answered = self.named.iter().filter(|(name, _)| self.sent_last(name).is_none());
        let last =
            |name: &[u8], found: &Found| self.sent_last(name).is_some_and(|last| std::ptr::eq(last, found));
        let few =
            self.unanswered.iter().filter(move |(name, found)| self.latest.is_empty() && last(name, found));
        let many = self.latest.iter().map(|(name, (_, found))| (name, found));
        let sent = few.map(|(name, found)| (name, found)).chain(many).filter(|(name, _)| !name.is_empty());
        answered.chain(sent).filter_map(|(name, found)| match found {
            Found::Statement(statement) => Some((name, statement)),
            Found::OnBackend | Found::Nothing => None,
        })
    }

    /// Whether there is a statement whose text was too long to be kept.
    pub fn any_on_backend(&self) -> bool {
        self.named.values().chain(&self.unnamed).any(|found| matches!(found, Found::OnBackend))
    }

    /// Forgets those named statements that the backend does not have any more: SQL's DEALLOCATE took them.
    /// `had`: those it was given; `has`: of these it has still.
    pub fn keep_only(&mut self, had: &HashSet<Vec<u8>>, has: &HashSet<Vec<u8>>) {
        let before = self.named.len();
        self.named.retain(|name, _| !had.contains(name) || has.contains(name));
        self.version.1 += u64::from(self.named.len() < before);
    }

    /// A name of the client's for a shared statement.
    pub fn name_of(&self, shared: SharedName) -> Option<Vec<u8>> {
        let stands_for =
            |found: &Found| matches!(found, Found::Statement(statement) if statement.shared == shared);
        let unanswered = self.unanswered.iter().filter(|(name, _)| !name.is_empty());
        let known = unanswered.map(|(name, found)| (name, found)).chain(&self.named);
        known.into_iter().find(|(_, found)| stands_for(found)).map(|(name, _)| name.clone())
    }

    /// Whether there may be one that begins a transaction.
    pub fn any_begins(&self) -> bool {
        self.begins
    }

    /// A Parse or Close (`Nothing`) was sent (or will be answered by us in its turn).
    pub fn sent(&mut self, name: &[u8], found: Found) {
        let name = key(name);
        self.begins |= matches!(&found, Found::Statement(statement) if statement.may_begin());
        self.making += usize::from(makes_a_name(name, &found));
        self.unanswered.push_back((name.to_vec(), found));
        if !self.latest.is_empty() {
            let newest = self.unanswered.back();
            newest.into_iter().for_each(|(name, found)| add_latest(&mut self.latest, name, found));
        } else if self.unanswered.len() > FEW {
            self.unanswered.iter().for_each(|(name, found)| add_latest(&mut self.latest, name, found));
        }
    }

    /// Whether the oldest unanswered message is about the unnamed statement.
    pub fn awaits_unnamed(&self) -> bool {
        self.unanswered.front().is_some_and(|(name, _)| name.is_empty())
    }

    /// The oldest unanswered Parse or Close has succeeded.
    pub fn succeeded(&mut self) {
        let Some((name, found)) = self.unanswered.pop_front() else { return };
        self.making -= usize::from(makes_a_name(&name, &found));
        if let Some((times, _)) = self.latest.get_mut(&name) {
            *times -= 1;
            if *times == 0 {
                self.latest.remove(&name);
            }
            if self.latest.is_empty() {
                // Most units have few: a session that waits keeps no room for many.
                self.latest = HashMap::new();
            }
        }
        if self.before.is_some() {
            let was = self.answered(&name);
            if let Some(before) = &mut self.before {
                before.push((name.clone(), was));
            }
        }
        self.put(name, found);
    }

    /// An error: what was not answered yet never will be. `parsing_unnamed`: it was a Parse of the
    /// unnamed statement that failed, which has dropped the old one before.
    pub fn failed(&mut self, parsing_unnamed: bool) {
        if parsing_unnamed {
            self.unnamed = None;
        }
        self.forget_unanswered();
    }

    fn forget_unanswered(&mut self) {
        self.unanswered.clear();
        self.latest.clear();
        self.making = 0;
    }

    /// A simple Query: the unnamed statement is gone.
    pub fn drop_unnamed(&mut self) {
        self.unnamed = None;
    }

    /// Removes a name (DEALLOCATE); whether it was there.
    pub fn remove(&mut self, name: &[u8]) -> bool {
        let was_there = self.named.remove(key(name)).is_some();
        self.version.1 += u64::from(was_there);
        was_there
    }

    /// DEALLOCATE ALL, DISCARD ALL: the unnamed statement outlives them.
    pub fn clear(&mut self) {
        self.of_sql = false;
        self.named.clear();
        self.version.1 += 1;
    }
}

/// A Query that is about one name.
#[derive(Clone, Debug)]
pub enum SqlCommand {
    /// PREPARE
    Prepare(Vec<u8>, Arc<Statement>),
    /// EXECUTE
    Execute(Vec<u8>),
    /// DEALLOCATE
    Deallocate(Vec<u8>),
}

impl SqlCommand {
    /// The name.
    pub fn name(&self) -> &[u8] {
        match self {
            SqlCommand::Prepare(name, _) | SqlCommand::Execute(name) | SqlCommand::Deallocate(name) => name,
        }
    }
}

/// Unanswered messages up to which they are searched rather than kept by name.
const FEW: usize = 8;

fn add_latest(latest: &mut HashMap<Vec<u8>, (usize, Found)>, name: &[u8], found: &Found) {
    match latest.get_mut(name) {
        Some((times, latest)) => {
            *times += 1;
            *latest = found.clone();
        }
        None => _ = latest.insert(name.to_vec(), (1, found.clone())),
    }
}

fn makes_a_name(name: &[u8], found: &Found) -> bool {
    !name.is_empty() && !matches!(found, Found::Nothing)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse<'a>(body: &'a [u8]) -> Parse<'a> {
        Parse::read(body).unwrap()
    }

    #[test]
    fn names_that_begin_with_the_same_63_bytes_are_one() {
        let (names, mut statements) = (Names::new([7; 16]), Statements::new(1));
        let long = [b'n'; 70];
        let statement = names.statement(&parse(b"\0select 1\0\0\0"), b"");
        statements.sent(&long, Found::Statement(statement));
        assert!(matches!(statements.find(&long[..63]), Found::Statement(_)), "unanswered");
        statements.succeeded();
        let another = [&long[..63], b"x"].concat();
        assert!(matches!(statements.find(&another), Found::Statement(_)));
        assert!(matches!(statements.find(&long[..62]), Found::Nothing));
        assert!(statements.remove(&another) && statements.is_empty());
    }

    #[test]
    fn same_text_and_types_share_a_name() {
        let names = Names::new([7; 16]);
        let a = names.statement(&parse(b"a\0select $1\0\0\x01\0\0\0\x17"), b"");
        let b = names.statement(&parse(b"b\0select $1\0\0\x01\0\0\0\x17"), b"");
        let c = names.statement(&parse(b"b\0select $1\0\0\x01\0\0\0\x19"), b"");
        assert_eq!(a.shared, b.shared);
        assert_ne!(a.shared, c.shared);
        assert_eq!(a.types(), [23]);
        assert_eq!(a.text(), b"select $1");
    }

    #[test]
    fn texts_with_a_moment_literal_are_not_shared() {
        let names = Names::new([7; 16]);
        for body in [
            &b"\0select timestamptz 'now'\0\0\0"[..],
            b"\0select date ' Today '\0\0\0",
            b"\0select timestamptz $$yesterday$$\0\0\0",
        ] {
            assert_ne!(names.statement(&parse(body), b"").shared, names.statement(&parse(body), b"").shared);
        }
    }

    #[test]
    fn a_name_is_usable_within_its_unit_and_gone_with_an_error() {
        let names = Names::new([7; 16]);
        let mut statements = Statements::default();
        statements.sent(b"s", Found::Statement(names.statement(&parse(b"s\0select 1\0\0\0"), b"")));
        assert!(matches!(statements.find(b"s"), Found::Statement(_)));
        statements.failed(false);
        assert!(matches!(statements.find(b"s"), Found::Nothing));
    }

    #[test]
    fn a_name_can_be_closed_and_made_again_in_one_unit() {
        let names = Names::new([7; 16]);
        let mut statements = Statements::default();
        let old = names.statement(&parse(b"s\0select 1\0\0\0"), b"");
        let new = names.statement(&parse(b"s\0select 2\0\0\0"), b"");
        statements.sent(b"s", Found::Statement(old));
        statements.succeeded();
        statements.sent(b"s", Found::Nothing);
        assert!(matches!(statements.find(b"s"), Found::Nothing));
        statements.sent(b"s", Found::Statement(new.clone()));
        statements.succeeded();
        statements.succeeded();
        match statements.find(b"s") {
            Found::Statement(found) => assert_eq!(found.serial, new.serial),
            other => panic!("s is {other:?}"),
        }
    }

    #[test]
    fn a_failed_parse_of_the_unnamed_statement_leaves_none() {
        let names = Names::new([7; 16]);
        let mut statements = Statements::default();
        statements.sent(b"", Found::Statement(names.statement(&parse(b"\0select 1\0\0\0"), b"")));
        statements.succeeded();
        statements.sent(b"", Found::Statement(names.statement(&parse(b"\0selec\0\0\0"), b"")));
        statements.failed(true);
        assert!(matches!(statements.find(b""), Found::Nothing));
    }

    #[test]
    fn a_unit_that_is_taken_back_leaves_the_names_as_they_were() {
        let names = Names::new([7; 16]);
        let mut statements = Statements::default();
        let old = names.statement(&parse(b"kept\0select 1\0\0\0"), b"");
        statements.begin(false);
        statements.sent(b"kept", Found::Statement(old.clone()));
        statements.succeeded();
        statements.begin(true);
        // Answered before the unit failed: a new name, a closed one, and one closed and made again.
        statements.sent(b"new", Found::Statement(names.statement(&parse(b"new\0select 2\0\0\0"), b"")));
        statements.sent(b"kept", Found::Nothing);
        statements.sent(b"kept", Found::Statement(names.statement(&parse(b"kept\0select 3\0\0\0"), b"")));
        for _ in 0..3 {
            statements.succeeded();
        }
        // And one that is not answered yet.
        statements.sent(b"later", Found::Statement(names.statement(&parse(b"later\0select 4\0\0\0"), b"")));
        statements.take_back();
        assert!(matches!(statements.find(b"new"), Found::Nothing));
        assert!(matches!(statements.find(b"later"), Found::Nothing));
        assert!(matches!(statements.find(b"kept"), Found::Statement(s) if s.serial == old.serial));
    }

    #[test]
    fn an_unnamed_text_is_known_when_it_is_seen_again_unless_it_asks_for_a_moment() {
        let names = Names::new([7; 16]);
        let see = |body: &[u8]| names.see_unnamed(names.statement(&parse(body), b"").shared);
        assert!(!see(b"\0select 1\0\0\0"));
        assert!(see(b"\0select 1\0\0\0"));
        assert!(!see(b"\0select 2\0\0\0"));
        assert!(!see(b"\0select 1\0\0\x01\0\0\0\x17"));
        assert!(!see(b"\0select date 'now'\0\0\0") && !see(b"\0select date 'now'\0\0\0"));
    }

    #[test]
    fn names_are_the_same_however_many_messages_are_unanswered() {
        let names = Names::new([7; 16]);
        for count in [2, FEW, FEW + 1, 4 * FEW] {
            let mut statements = Statements::default();
            let mut last = 0;
            for n in 0..count {
                let statement = names.statement(&parse(format!("s\0select {n}\0\0\0").as_bytes()), b"");
                last = statement.serial;
                statements.sent(b"s", Found::Statement(statement));
                statements.sent(format!("t{n}").as_bytes(), Found::Nothing);
            }
            let found = |statements: &Statements| match statements.find(b"s") {
                Found::Statement(statement) => statement.serial,
                other => panic!("s is {other:?}"),
            };
            assert_eq!(found(&statements), last);
            let listed: Vec<u64> = statements.named().map(|(_, statement)| statement.serial).collect();
            assert_eq!(listed, [last]);
            for _ in 0..2 * count - 3 {
                statements.succeeded();
                assert_eq!(found(&statements), last);
            }
            (0..3).for_each(|_| statements.succeeded());
            assert_eq!((found(&statements), statements.latest.capacity()), (last, 0));
        }
    }

    #[test]
    fn an_error_before_the_unnamed_parse_leaves_the_old_one() {
        let names = Names::new([7; 16]);
        let mut statements = Statements::default();
        statements.sent(b"", Found::Statement(names.statement(&parse(b"\0select 1\0\0\0"), b"")));
        statements.succeeded();
        // The server skips the second Parse: the first has failed.
        statements.sent(b"x", Found::Statement(names.statement(&parse(b"x\0selec\0\0\0"), b"")));
        statements.sent(b"", Found::Statement(names.statement(&parse(b"\0select 2\0\0\0"), b"")));
        statements.failed(false);
        assert!(matches!(statements.find(b""), Found::Statement(_)));
    }
}
