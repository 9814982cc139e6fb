//! SQL text + catalog facts -> what a statement may do. Fail closed: what is not understood is not a read.
//!
//! The stages: a token scan of the text (`scan`, over `lexer`), built-in functions by allow-list
//! (`builtin`), the database's unsafe names and proven functions (`catalog`, with `tree` for stored expressions, `body`
//! for functions' texts and `extension` for compiled code), a second reader: of texts as mappers write them a small one of
//! our own (`plain`), of all others `sqlparser` on a thread of its own (`opinion`), and a cache of verdicts (`cache`): by the whole text, by its bytes without its values (`shape`), and by the
//! scan's skeleton.
//! `refusal` reads what a replica's error says about all of that.
//!
//! Promised: a text that is not accounted for word by word is not a read; the verdict depends on nothing
//! but the text, the parameters' types, the lexing and the catalog; no call blocks but `ask`, which ends
//! at its deadline.
//!
//! Not covered, and so stated in the manual: `nextval`, after which `currval` and `lastval` are right within the same
//! transaction or once the session is pinned (their first use pins it).

pub mod advice;
mod body;
mod builtin;
mod cache;
pub mod catalog;
mod extension;
#[cfg(test)]
mod fuzz;
pub mod hint;
mod leaves;
mod lexer;
mod named;
mod opinion;
mod plain;
pub mod refusal;
mod scan;
pub mod setting;
mod shape;
mod skeleton;
mod target;
mod trace;
mod transaction;
pub mod tree;

use std::hash::Hasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use siphasher::sip128::{Hasher128, SipHasher13};

pub use catalog::Catalog;
pub use leaves::{Leaves, PinReason, PinSet};
pub use lexer::{Lexer as Words, Token};
pub use named::{
    SqlExecute, SqlPrepare, may_execute, may_name_statements, sql_execute, sql_prepare, statements_named,
};
pub use skeleton::skeleton_text;
pub use target::{Target, is_code, keeps_uncommitted, listen_target, target};
pub use trace::traceparent;
pub use transaction::{
    Isolation, TransactionCommand, asks_for_time, depends_on_transaction, parameters_name_the_clock,
};

use crate::config::LimitsConfig;
use builtin::Vocabulary;
use cache::Cache;
use hint::Hints;
use lexer::Lexer;
use opinion::Opinion;

/// The names that the catalog queries take as their first parameter: safe built-in functions.
pub fn safe_function_names() -> Vec<&'static str> {
    builtin::safe_functions().collect()
}

/// The names that the catalog queries take as their second parameter: safe system relations and types.
pub fn safe_system_names() -> Vec<&'static str> {
    builtin::safe_system_names().collect()
}

/// Texts above this are not looked up as a whole: hashing one twice would cost more than it saves.
const WHOLE_TEXT_BYTES: usize = 16 * 1024;

/// The settings of a session that decide how its texts are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lexing {
    /// Client and server both use UTF-8, and standard_conforming_strings is on.
    Utf8,
    /// ASCII means ASCII in the client's encoding, but other characters may be another in the server's:
    /// a text with a non-ASCII name is not a read.
    AsciiNames,
    /// Trail bytes may look like ASCII (SJIS, BIG5, GBK, UHC, GB18030, JOHAB), or
    /// standard_conforming_strings is off: nothing is a read, and nothing is known of what is left.
    Unsafe,
}

/// A statement to classify.
#[derive(Clone, Copy, Debug)]
pub struct Statement<'a> {
    /// The text of a Query or Parse, without its terminator.
    pub text: &'a [u8],
    /// The parameter types that a Parse gives; 0 is "not given".
    pub parameter_types: &'a [u32],
    /// What is known of the session's database.
    pub catalog: &'a Catalog,
    /// How the text is to be read.
    pub lexing: Lexing,
}

/// A part of a text that keeps it from being a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspect {
    /// The name (decoded and folded) or operator.
    pub what: Box<[u8]>,
    /// What is wrong with it.
    pub why: &'static str,
}

/// Names a verdict in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClassKey {
    whole: u128,
    skeleton: u128,
}

impl ClassKey {
    /// The hash of the text with its harmless literals folded, short: for what may be mistaken once in a lifetime.
    pub fn short_skeleton(self) -> u64 {
        self.skeleton as u64
    }
}

/// What [`Classifier::lookup`] found.
#[derive(Debug)]
pub enum Lookup {
    /// The class, and the key to teach it another by.
    Known(StatementClass, ClassKey),
    /// A read candidate that needs [`Classifier::ask`].
    Ask(Question),
}

/// A read candidate that the second parser has not seen.
#[derive(Debug)]
pub struct Question {
    text: Box<[u8]>,
    key: ClassKey,
    hints: Hints,
}

impl Question {
    /// The key of the class to come.
    pub fn key(&self) -> ClassKey {
        self.key
    }

    /// What comments in the text ask for, whatever it turns out to be.
    pub fn hints(&self) -> Hints {
        self.hints
    }
}

/// Classifies statements; shared by all sessions.
#[derive(Debug)]
pub struct Classifier {
    vocabulary: Vocabulary,
    key: [u8; 16],
    cache: Arc<Cache>,
    opinion: Opinion,
    parser_text: usize,
    hits: AtomicU64,
    misses: AtomicU64,
}

impl StatementClass {
    /// What it is to those who watch: a read that a comment keeps on the primary is a read to them.
    pub fn shown(&self) -> Kind {
        if self.reason == ClassReason::Hint { Kind::Read } else { self.kind }
    }

    const READ: StatementClass = StatementClass {
        kind: Kind::Read,
        reason: ClassReason::Read,
        leaves: Leaves::NOTHING,
        settings: false,
        hints: Hints { level: None, route: None, durability: None, invalid: false },
    };

    /// Whether it is a read and nothing else: it sets nothing and leaves nothing.
    pub fn is_mere_read(self) -> bool {
        matches!(self.kind, Kind::Read | Kind::Empty) && !self.settings && self.leaves == Leaves::NOTHING
    }

    /// Whether it may run on a replica.
    pub fn is_read(self) -> bool {
        matches!(self.kind, Kind::Read | Kind::Empty)
    }

    /// Whether `text`, which is of this class, may commit a transaction that was open before: COMMIT and kin, and what may
    /// have one in it.
    pub fn may_commit(self, text: &[u8]) -> bool {
        self.kind == Kind::TransactionControl && !keeps_uncommitted(text)
            || matches!(self.reason, ClassReason::Several | ClassReason::Unclear | ClassReason::Lexing)
    }

    fn write(reason: ClassReason) -> StatementClass {
        StatementClass { kind: Kind::Write, reason, ..StatementClass::READ }
    }
}

impl Classifier {
    /// With an empty cache; the second parser's thread starts when it is first needed.
    pub fn new(limits: &LimitsConfig) -> Classifier {
        let cache = Arc::new(Cache::new(limits.class_cache));
        Classifier {
            vocabulary: Vocabulary::new(),
            // Random, so that nobody can make two texts meet in one entry.
            key: rand::random(),
            opinion: Opinion::new(Arc::clone(&cache), limits.parser_deadline),
            cache,
            parser_text: limits.parser_text,
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }
    }

    /// Look-ups so far that found their statement in the cache, and that did not.
    pub fn hits_and_misses(&self) -> (u64, u64) {
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed))
    }

    /// Threads of the second parser that hung over a text and were replaced, so far.
    pub fn replaced_parsers(&self) -> u64 {
        self.opinion.replaced()
    }

    /// Each name, call and operator of a text that by itself keeps it from being a read, once, in the order of
    /// the text. For people; the class does not rest on it.
    pub fn suspects(&self, statement: &Statement<'_>) -> Vec<Suspect> {
        let mut found: Vec<Suspect> = Vec::new();
        let mut lexer = Lexer::new(statement.text);
        // The schema that the last name may be, and whether a dot follows it.
        let (mut schema, mut dotted) = (0, false);
        loop {
            let token = lexer.next_token();
            let within = if dotted { schema } else { 0 };
            dotted = token == Token::Punctuation(b'.');
            if let Token::Word | Token::Quoted = token {
                schema = if within == 0 { statement.catalog.name(lexer.name()).schema } else { 0 };
            } else if !dotted {
                schema = 0;
            }
            let suspect = match token {
                Token::End | Token::Unclear => return found,
                Token::Operator if statement.catalog.operator_is_unsafe(lexer.raw()) => Suspect {
                    what: lexer.raw().into(),
                    why: "an operator that may run code which is not known",
                },
                Token::Word | Token::Quoted => {
                    let flags = statement.catalog.name(lexer.name());
                    let word = self.vocabulary.get(lexer.name()).copied().unwrap_or_default();
                    let called = lexer.clone().next_token() == Token::Punctuation(b'(');
                    let why = if flags.elsewhere {
                        "its rows are not those of the primary (sequence, unlogged or foreign table)"
                    } else if flags.code {
                        "it runs code that is not known"
                    } else if called && statement.catalog.is_harmless_within(within, lexer.name()) {
                        continue;
                    } else if called && flags.called {
                        "a function whose body is not shown to do nothing but read"
                    } else if called && word.special.is_some() {
                        "a built-in function that reads or changes the state of a server or session"
                    } else if called
                        && statement.catalog.is_loaded()
                        && !(word.safe_function || flags.proven || word.before_paren && token == Token::Word)
                    {
                        "a function that is not known (or only an alias)"
                    } else {
                        continue;
                    };
                    Suspect { what: lexer.name().into(), why }
                }
                _ => continue,
            };
            if !found.contains(&suspect) {
                found.push(suspect);
            }
        }
    }

    /// The class, if it is known or can be told without the second parser. Never blocks; a hit in the
    /// cache allocates nothing.
    pub fn lookup(&self, statement: &Statement<'_>) -> Lookup {
        let prefix = self.prefix(statement);
        let whole = if statement.text.len() <= WHOLE_TEXT_BYTES {
            let mut hash = prefix;
            hash.write(b"T");
            hash.write(statement.text);
            u128::from(hash.finish128())
        } else {
            0
        };
        if whole != 0
            && let Some((class, skeleton)) = self.cache.whole(whole)
        {
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Lookup::Known(class, ClassKey { whole, skeleton });
        }
        let shape = self.shape(statement, prefix);
        if let Some(shape) = shape
            && let Some((class, skeleton)) = self.cache.shape(shape.hash)
        {
            self.hits.fetch_add(1, Ordering::Relaxed);
            let key = ClassKey { whole, skeleton };
            // With values in it, it is not likely to come again as it is.
            if !shape.folded {
                self.cache.put_whole(key, class);
            }
            return Lookup::Known(class, key);
        }
        let scanned = self.scan(statement, prefix);
        let key = ClassKey { whole, skeleton: scanned.skeleton };
        let hints = scanned.class.hints;
        let class = StatementClass { hints, ..self.with_facts(statement, scanned.class) };
        let shape = shape.filter(|_| !scanned.by_value && !class.settings);
        let remember = |class| {
            self.cache.put_whole(key, class);
            if let Some(shape) = shape {
                self.cache.put_shape(shape.hash, class, key.skeleton);
            }
        };
        if class.kind != Kind::Read {
            self.misses.fetch_add(1, Ordering::Relaxed);
            remember(class);
            return Lookup::Known(class, key);
        }
        if let Some(class) = self.cache.skeleton(key.skeleton) {
            self.hits.fetch_add(1, Ordering::Relaxed);
            remember(class);
            return Lookup::Known(class, key);
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        if statement.text.len() > self.parser_text {
            let class = StatementClass { hints, ..StatementClass::write(ClassReason::SecondOpinion) };
            return Lookup::Known(class, key);
        }
        if plain::read(statement.text, statement.catalog.server_major()).is_some() {
            let class = StatementClass { hints, ..StatementClass::READ };
            self.cache.put_skeleton(key.skeleton, class);
            remember(class);
            return Lookup::Known(class, key);
        }
        Lookup::Ask(Question { text: statement.text.into(), key, hints })
    }

    /// The second opinion. Ends at the parser's deadline at the latest: then the statement is not a read this
    /// time, and the verdict is cached when it comes.
    pub async fn ask(&self, question: Question) -> StatementClass {
        self.opinion.ask(question).await
    }

    /// A replica refused it: from now on it goes to the primary, until the catalog changes or the entry
    /// is displaced.
    pub fn learn(&self, key: ClassKey) {
        let class = StatementClass::write(ClassReason::Learned);
        self.cache.put_skeleton(key.skeleton, class);
        self.cache.put_whole(key, class);
    }

    fn scan(&self, statement: &Statement<'_>, mut prefix: SipHasher13) -> scan::Scanned {
        prefix.write(b"K");
        let ascii_names = statement.lexing != Lexing::Utf8;
        scan::scan(statement.text, prefix, &self.vocabulary, statement.catalog, ascii_names)
    }

    /// The text's shape, where its values do not matter.
    fn shape(&self, statement: &Statement<'_>, mut prefix: SipHasher13) -> Option<shape::Shape> {
        // Where a string ends is known, then.
        if statement.lexing == Lexing::Unsafe {
            return None;
        }
        prefix.write(b"F");
        shape::shape(statement.text, prefix)
    }

    /// A hasher fed with all that the class depends on beside the text.
    fn prefix(&self, statement: &Statement<'_>) -> SipHasher13 {
        let mut hash = SipHasher13::new_with_key(&self.key);
        hash.write_u64(statement.catalog.identity());
        hash.write_u8(statement.lexing as u8);
        hash.write_u32(statement.parameter_types.len() as u32);
        for oid in statement.parameter_types {
            hash.write_u32(*oid);
        }
        hash
    }

    /// What lexing, catalog and parameters make of the scan's class.
    fn with_facts(&self, statement: &Statement<'_>, class: StatementClass) -> StatementClass {
        if statement.lexing == Lexing::Unsafe
            && class.kind != Kind::Empty
            && !(class.settings && setting::reset_batch(statement.text).is_some())
        {
            return StatementClass {
                kind: if class.kind == Kind::Ddl { Kind::Ddl } else { Kind::Write },
                reason: ClassReason::Lexing,
                // What is set, and to what, cannot be told.
                leaves: class.leaves
                    | if class.settings { Leaves::pin(PinReason::Setting) } else { Leaves::UNPROVEN },
                ..class
            };
        }
        if class.kind != Kind::Read {
            return class;
        }
        if !statement.catalog.is_loaded() {
            // A name that looks like a built-in may be a user's.
            return StatementClass {
                leaves: Leaves::UNPROVEN,
                ..StatementClass::write(ClassReason::CatalogUnknown)
            };
        }
        if statement.catalog.unsafe_anywhere() {
            return StatementClass {
                leaves: Leaves::UNPROVEN,
                ..StatementClass::write(ClassReason::UnsafeName)
            };
        }
        if !statement.parameter_types.iter().all(|oid| statement.catalog.type_is_safe(*oid)) {
            return StatementClass {
                leaves: Leaves::UNPROVEN,
                ..StatementClass::write(ClassReason::ParameterType)
            };
        }
        class
    }
}

/// The statement that exactly `DEALLOCATE [PREPARE] name` names, decoded; `None` for any other text,
/// `DEALLOCATE ALL` included.
pub fn deallocate_target(text: &[u8]) -> Option<Vec<u8>> {
    let mut lexer = Lexer::new(text);
    if lexer.next_token() != Token::Word || lexer.name() != b"deallocate" {
        return None;
    }
    let mut token = lexer.next_token();
    if token == Token::Word && lexer.name() == b"prepare" {
        // A statement may itself be called prepare: then nothing follows.
        let mut ahead = lexer.clone();
        if let next @ (Token::Word | Token::Quoted) = ahead.next_token() {
            token = next;
            lexer = ahead;
        }
    }
    let name = match token {
        Token::Word if lexer.name() == b"all" => return None,
        Token::Word | Token::Quoted => lexer.name().to_vec(),
        _ => return None,
    };
    match lexer.next_token() {
        Token::End => Some(name),
        Token::Punctuation(b';') if lexer.next_token() == Token::End => Some(name),
        _ => None,
    }
}

/// Whether a statement's rows are those of another (EXECUTE, FETCH): what that is may change without the statement's
/// being out of date.
pub fn shows_rows_of_another(text: &[u8]) -> bool {
    let mut lexer = Lexer::new(text);
    lexer.next_token() == Token::Word && matches!(lexer.name(), b"execute" | b"fetch")
}

/// Whether a text is a command that ends a transaction, be it whole or what has failed of it (ROLLBACK TO): where it has
/// succeeded, the transaction that had failed is over, or goes on as if nothing had.
pub fn ends_failure(text: &[u8]) -> bool {
    let mut lexer = Lexer::new(text);
    lexer.next_token() == Token::Word && matches!(lexer.name(), b"commit" | b"rollback" | b"abort" | b"end")
}

/// Whether a text is parsed and run in a transaction that has failed as in any other, since there is nothing in it.
pub fn is_empty(text: &[u8]) -> bool {
    Lexer::new(text).next_token() == Token::End
}

/// Whether a text is one statement that does not end a transaction, so that in an aborted one it fails
/// whatever it is, unless it is empty. What is not understood is not.
pub fn stays_in_transaction(text: &[u8]) -> bool {
    let mut lexer = Lexer::new(text);
    match lexer.next_token() {
        Token::Word => {}
        Token::End => return true,
        // A parenthesis begins a query.
        Token::Punctuation(b'(') => {}
        _ => return false,
    }
    let word = lexer.name();
    if matches!(word, b"commit" | b"rollback" | b"abort" | b"end") {
        return false;
    }
    let prepares = word == b"prepare";
    let mut token = lexer.next_token();
    // PREPARE TRANSACTION, or a statement of that name.
    if prepares && token == Token::Word && lexer.name() == b"transaction" {
        return false;
    }
    loop {
        match token {
            Token::End => return true,
            Token::Unclear => return false,
            Token::Punctuation(b';') => return lexer.next_token() == Token::End,
            _ => token = lexer.next_token(),
        }
    }
}

/// Whether a text has a statement that may change what a login gives: ALTER ROLE, USER, GROUP or DATABASE.
/// Finding one too many costs only that backends are opened again.
pub fn alters_login(text: &[u8]) -> bool {
    let mut lexer = Lexer::new(text);
    let mut after_alter = false;
    loop {
        match lexer.next_token() {
            Token::End | Token::Unclear => return false,
            Token::Word => {
                if after_alter && matches!(lexer.name(), b"role" | b"user" | b"group" | b"database") {
                    return true;
                }
                after_alter = lexer.name() == b"alter";
            }
            _ => after_alter = false,
        }
    }
}

/// Whether a statement creates, alters or drops a database: PostgreSQL refuses that while anybody is
/// connected to the database (or to the template), be it only a pool.
pub fn is_database_command(text: &[u8]) -> bool {
    let mut lexer = Lexer::new(text);
    let verb = lexer.next_token() == Token::Word && matches!(lexer.name(), b"create" | b"alter" | b"drop");
    verb && lexer.next_token() == Token::Word && lexer.name() == b"database"
}

/// What a statement may do, and so where it may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StatementClass {
    /// What it is.
    pub kind: Kind,
    /// Why it is not a read (or that it is one).
    pub reason: ClassReason,
    /// What it may leave behind on the backend that ran it.
    pub leaves: Leaves,
    /// It may change settings: [`setting::effects`] says which.
    pub settings: bool,
    /// What comments in it ask for.
    pub hints: Hints,
}

/// What a statement (or a message of several) is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Changes nothing and answers the same on a replica that has reached the session's mark.
    Read,
    /// Writes, locks, or is not shown to do neither.
    Write,
    /// Data definition: a write after which the catalog facts must be read again.
    Ddl,
    /// BEGIN, COMMIT, SAVEPOINT and kin.
    TransactionControl,
    /// SET, SHOW, RESET, DISCARD, PREPARE, EXECUTE, DEALLOCATE, DECLARE, FETCH, LISTEN and kin: about the session.
    Session,
    /// Nothing but white space and comments.
    Empty,
}

/// Why a statement is classified as it is. The same value is a metric's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClassReason {
    /// It is a read.
    Read,
    /// Its leading words say that it writes, locks or defines.
    Command,
    /// FOR UPDATE/SHARE, INTO, a data-modifying WITH.
    WriteClause,
    /// Several statements in one message.
    Several,
    /// It is about the session or a transaction.
    Session,
    /// It calls a built-in function that is not on the allow-list.
    UnsafeFunction,
    /// It names something that the catalog facts call unsafe.
    UnsafeName,
    /// The catalog facts of this database are not loaded (yet).
    CatalogUnknown,
    /// The token scan could not make sense of it.
    Unclear,
    /// The second parser refused it, disagreed, or was not asked (length, deadline).
    SecondOpinion,
    /// Client encoding or standard_conforming_strings make the text unsafe to scan.
    Lexing,
    /// A parameter's type is user-defined.
    ParameterType,
    /// A replica refused it before.
    Learned,
    /// A comment in it asks for the primary. For that alone it is not a read.
    Hint,
    /// Nothing but white space and comments.
    Empty,
}

impl ClassReason {
    /// What it means, and which stage found it.
    pub const fn explained(self) -> (&'static str, &'static str) {
        match self {
            ClassReason::Read => {
                ("nothing in it does more than read", "the token scan and a second reader, which agree")
            }
            ClassReason::Command => ("it is a command that writes, locks or defines", "the token scan"),
            ClassReason::WriteClause => {
                ("it locks rows, selects INTO a table or has a data-modifying WITH", "the token scan")
            }
            ClassReason::Several => ("it is several statements in one message", "the token scan"),
            ClassReason::Session => ("it is about the session or a transaction", "the token scan"),
            ClassReason::UnsafeFunction => {
                ("it calls a function that is not on the allow-list", "the allow-list of built-in functions")
            }
            ClassReason::UnsafeName => ("it names something unsafe", "the catalog facts"),
            ClassReason::CatalogUnknown => {
                ("the catalog facts of the database are not loaded", "the catalog facts")
            }
            ClassReason::Unclear => ("it is not understood", "the token scan"),
            ClassReason::SecondOpinion => {
                ("the second parser does not agree that it is a read, or was not asked", "the second parser")
            }
            ClassReason::Lexing => {
                ("client_encoding or standard_conforming_strings make it unsafe to read", "the token scan")
            }
            ClassReason::ParameterType => ("a parameter's type is not known to be safe", "the catalog facts"),
            ClassReason::Learned => ("a replica has refused it before", "the cache"),
            ClassReason::Hint => ("a comment in it asks for the primary", "the token scan"),
            ClassReason::Empty => ("it is empty", "the token scan"),
        }
    }
}

#[cfg(test)]
mod tests;
