//! The second opinion: `sqlparser` must agree that a text is one read-only query.
//!
//! It recurses, and a hostile text can exhaust a stack, which would abort the process. So it runs on a
//! thread with a stack that no text within `limits.parser_text` can exhaust; the scan has sorted out
//! texts that pile up what the parser recurses over. Answers have a deadline and the queue a bound;
//! beyond either, the statement is not a read this time. A thread that answers nobody for a whole deadline is left to
//! its text and replaced, a bounded number of times.
//!
//! What it refuses although the scan was sure goes to the primary.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlparser::ast::{CopySource, CopyTarget, Query, SetExpr, Statement};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;
use tokio::sync::oneshot;

use super::cache::Cache;
use super::lexer::{Lexer, TextKind, Token};
use super::{ClassReason, Question, StatementClass};

/// The parser's stack; reserved, and used only as far as texts need it.
const STACK_BYTES: usize = 32 * 1024 * 1024;

/// Questions that may wait. At the usual tens of microseconds each, far more than a deadline lets through.
const QUEUE: usize = 256;

struct Job {
    question: Question,
    reply: oneshot::Sender<StatementClass>,
}

/// Threads that hang over a text and have been left to it. With so many, the parser is given up until one ends.
const MAX_ABANDONED: usize = 4;

/// What a parser says of a text.
type Judge = fn(&[u8]) -> bool;

/// The parser's thread: started on first need, and another in its place should it end, or finish nothing within
/// a deadline.
#[derive(Debug)]
pub(super) struct Opinion {
    cache: Arc<Cache>,
    deadline: Duration,
    judge: Judge,
    worker: Mutex<Option<Worker>>,
    abandoned: Arc<AtomicUsize>,
    replaced: AtomicU64,
}

/// A thread, as those who ask see it. Dropping it lets the thread end once it has answered what is queued.
#[derive(Debug)]
struct Worker {
    jobs: SyncSender<Job>,
    state: Arc<WorkerState>,
}

#[derive(Debug, Default)]
struct WorkerState {
    /// Answers so far.
    done: AtomicU64,
    /// Another has taken its place.
    abandoned: AtomicBool,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.question.fmt(f)
    }
}

impl Opinion {
    pub(super) fn new(cache: Arc<Cache>, deadline: Duration) -> Opinion {
        Opinion::with_judge(cache, deadline, is_one_read)
    }

    fn with_judge(cache: Arc<Cache>, deadline: Duration, judge: Judge) -> Opinion {
        Opinion {
            cache,
            deadline,
            judge,
            worker: Mutex::new(None),
            abandoned: Arc::default(),
            replaced: AtomicU64::new(0),
        }
    }

    /// Threads that were replaced so far.
    pub(super) fn replaced(&self) -> u64 {
        self.replaced.load(Ordering::Relaxed)
    }

    /// The verdict, or "not a read" when it does not come in time.
    pub(super) async fn ask(&self, question: Question) -> StatementClass {
        let hints = question.hints;
        let (reply, answer) = oneshot::channel();
        if let Some((state, done)) = self.send(Job { question, reply }) {
            match tokio::time::timeout(self.deadline, answer).await {
                Ok(Ok(class)) => return class,
                Ok(Err(_gone)) => {}
                Err(_elapsed) => self.replace_if_stuck(&state, done),
            }
        }
        StatementClass { hints, ..StatementClass::write(ClassReason::SecondOpinion) }
    }

    fn worker(&self) -> std::sync::MutexGuard<'_, Option<Worker>> {
        self.worker.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// To whom the job was given and how much that one had done; nothing when the queue is full or no thread
    /// can be had.
    fn send(&self, job: Job) -> Option<(Arc<WorkerState>, u64)> {
        let mut worker = self.worker();
        let job = match worker.as_ref() {
            None => job,
            Some(found) => {
                let (state, done) = (Arc::clone(&found.state), found.state.done.load(Ordering::Relaxed));
                match found.jobs.try_send(job) {
                    Ok(()) => return Some((state, done)),
                    Err(TrySendError::Full(_)) => return None,
                    Err(TrySendError::Disconnected(job)) => job,
                }
            }
        };
        if self.abandoned.load(Ordering::SeqCst) >= MAX_ABANDONED {
            return None;
        }
        let started = self.start()?;
        let sent = started.jobs.try_send(job).is_ok().then(|| (Arc::clone(&started.state), 0));
        *worker = Some(started);
        sent
    }

    /// Leaves a thread to the text it hangs over: it has answered nobody since `done`, a whole deadline ago.
    fn replace_if_stuck(&self, state: &Arc<WorkerState>, done: u64) {
        let mut worker = self.worker();
        let is_current = worker.as_ref().is_some_and(|current| Arc::ptr_eq(&current.state, state));
        if is_current && state.done.load(Ordering::Relaxed) == done {
            state.abandoned.store(true, Ordering::SeqCst);
            self.abandoned.fetch_add(1, Ordering::SeqCst);
            self.replaced.fetch_add(1, Ordering::Relaxed);
            // The next question starts another.
            *worker = None;
        }
    }

    fn start(&self) -> Option<Worker> {
        let (jobs, receiver) = sync_channel::<Job>(QUEUE);
        let state = Arc::new(WorkerState::default());
        let (cache, judge) = (Arc::clone(&self.cache), self.judge);
        let (abandoned, own) = (Arc::clone(&self.abandoned), Arc::clone(&state));
        let thread = std::thread::Builder::new().name("second-opinion".into()).stack_size(STACK_BYTES);
        let started = thread.spawn(move || {
            // Ends when the sender is dropped: with the classifier, or when it has been replaced.
            while let Ok(job) = receiver.recv() {
                let Job { question, reply } = job;
                let class = answer(question, judge, &cache);
                // Before the reply: who has it and asks again must not take that for a sign of life.
                own.done.fetch_add(1, Ordering::Relaxed);
                let _ = reply.send(class);
            }
            if own.abandoned.load(Ordering::SeqCst) {
                abandoned.fetch_sub(1, Ordering::SeqCst);
            }
        });
        started.is_ok().then_some(Worker { jobs, state })
    }
}

fn answer(question: Question, judge: Judge, cache: &Cache) -> StatementClass {
    // A panic of the parser is a refusal like any other.
    let agreed = std::panic::catch_unwind(|| judge(&question.text)).unwrap_or(false);
    let class = if agreed { StatementClass::READ } else { StatementClass::write(ClassReason::SecondOpinion) };
    let class = StatementClass { hints: question.hints, ..class };
    // What a replica has refused meanwhile stays refused.
    if cache.skeleton(question.key.skeleton).is_none() {
        cache.put_skeleton(question.key.skeleton, class);
        cache.put_whole(question.key, class);
    }
    class
}

/// Whether the second parser takes the text for one query that does nothing but read.
pub(super) fn is_one_read(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let parse = |text: &str| Parser::parse_sql(&PostgreSqlDialect {}, text).ok();
    // Few have a form that the parser does not know.
    let statements = parse(text).or_else(|| match as_it_reads(text) {
        std::borrow::Cow::Borrowed(_) => None,
        std::borrow::Cow::Owned(text) => parse(&text),
    });
    statements.is_some_and(|all| matches!(&all[..], [statement] if statement_reads(statement)))
}

/// Whether the second parser understands the text and takes it for anything but one query that reads.
#[cfg(test)]
pub(super) fn is_surely_none(text: &[u8]) -> bool {
    let parsed =
        std::str::from_utf8(text).ok().and_then(|text| Parser::parse_sql(&PostgreSqlDialect {}, text).ok());
    parsed.is_some_and(|all| !matches!(&all[..], [statement] if statement_reads(statement)))
}

/// The text without forms that the parser does not know, and that the scan has accounted for: `OPERATOR(pg_catalog.~)`
/// becomes the operator, and COLLATE goes with its name; an operator that is not among the usual ones becomes `+`, which
/// stands wherever an operator may; SYMMETRIC goes behind BETWEEN, VARIADIC before an argument, a FROM with nothing to
/// trim before it, the star behind a parent table, LATERAL before XMLTABLE; SUBSTRING's SIMILAR and ESCAPE become
/// commas; ISNULL is spelled out; a string in several pieces, and names and strings in U&, become short ones; a leading
/// TABLE becomes what it stands for. Of XML: NAME goes in XMLELEMENT and XMLPI and before a string, XMLROOT's and XMLEXISTS'
/// own words become arguments, XMLSERIALIZE a cast, IS DOCUMENT IS NULL. Found by tokens, so not inside strings or
/// comments; what is left out names nothing and calls nothing, and the scan has seen it.
fn as_it_reads(text: &str) -> std::borrow::Cow<'_, str> {
    let mut lexer = Lexer::new(text.as_bytes());
    let leading_table = lexer.next_token() == Token::Word && lexer.name() == b"table";
    let mut out = String::with_capacity(text.len() + text.len() / 4);
    let mut changed = leading_table;
    if leading_table {
        out.push_str("SELECT * FROM ");
    } else {
        lexer = Lexer::new(text.as_bytes());
    }
    // The depth of the parentheses, the calls with a grammar of their own that are open, the last two tokens.
    let (mut depth, mut open) = (0u32, Vec::<(u32, Before)>::new());
    let (mut before, mut before_that) = (Before::Other, Before::Other);
    loop {
        let token = lexer.next_token();
        let mut part = lexer.raw();
        let name = if token == Token::Word { lexer.name() } else { b"" };
        let inside = open.last().filter(|(at, _)| *at == depth).map_or(Before::Other, |(_, of)| *of);
        let mut this = Before::Other;
        match (token, name) {
            (Token::End, _) => return if changed { out.into() } else { text.into() },
            (Token::Unclear, _) => return text.into(),
            (Token::Punctuation(b'('), _) => {
                depth += 1;
                this = Before::Open;
                if before.has_its_own_grammar() {
                    open.push((depth, before));
                }
            }
            (Token::Punctuation(b')'), _) => {
                open.pop_if(|(at, _)| *at == depth);
                depth = depth.saturating_sub(1);
            }
            (Token::Punctuation(b','), _) => this = Before::Comma,
            (Token::Text(_), _) if before == Before::Uescape => part = b"",
            (Token::Text(TextKind::Unicode), _) => part = b"'u'",
            (Token::Text(TextKind::Plain), _) if is_in_pieces(part) => part = b"'c'",
            (Token::Quoted, _) if matches!(part.first(), Some(b'u' | b'U')) => part = b"\"u\"",
            (Token::Operator, _) if !USUAL_OPERATORS.contains(&part) => part = b"+",
            (_, b"uescape") => (this, part) = (Before::Uescape, b""),
            (_, b"symmetric" | b"asymmetric") if before == Before::Between => part = b"",
            (_, b"variadic") if matches!(before, Before::Open | Before::Comma) => part = b"",
            (_, b"name") if before == Before::Open && before_that == Before::Xml => part = b"",
            (_, b"similar" | b"escape") if inside == Before::Substring => part = b",",
            (_, b"version" | b"standalone") if inside == Before::XmlRoot && before == Before::Comma => {
                (this, part) = (Before::RootWord, b"");
            }
            (_, b"yes" | b"no") if before == Before::RootWord => (this, part) = (Before::RootNo, b"null"),
            (_, b"value") if before == Before::RootNo => part = b"",
            (_, b"passing") if inside == Before::XmlExists => part = b",",
            (_, b"by") if inside == Before::XmlExists => (this, part) = (Before::By, b""),
            (_, b"ref" | b"value") if before == Before::By => part = b"",
            (_, b"content" | b"document") if inside == Before::XmlSerialize && before == Before::Open => {
                part = b"";
            }
            (_, b"document") if matches!(before, Before::Is | Before::Not) => part = b"null",
            (_, b"isnull" | b"notnull") if lexer.clone().next_token() != Token::Punctuation(b'(') => {
                part = if name == b"isnull" { b"is null" } else { b"is not null" };
            }
            (_, b"lateral") if next_is(&lexer, b"xmltable") => part = b"",
            (_, b"from") if before == Before::TrimSide => part = b"",
            // `FROM parent *`: with its children, as without the star.
            (Token::Operator, _) if before == Before::Relation && part == b"*" => part = b"",
            // `name 'x'`
            (_, b"name") if matches!(lexer.clone().next_token(), Token::Text(_)) => part = b"",
            (_, b"is") => this = Before::Is,
            (_, b"not") => this = Before::Not,
            (_, b"between") => this = Before::Between,
            (_, b"leading" | b"trailing" | b"both") => this = Before::TrimSide,
            (_, b"from") => this = Before::From,
            (Token::Word | Token::Quoted, _) if before == Before::From => this = Before::Relation,
            (_, b"substring") => this = Before::Substring,
            (_, b"xmlroot") => this = Before::XmlRoot,
            (_, b"xmlexists") => this = Before::XmlExists,
            (_, b"xmlserialize") => (this, part) = (Before::XmlSerialize, b"cast"),
            (_, b"xmlelement" | b"xmlpi") => this = Before::Xml,
            (_, b"operator") => {
                let mut ahead = lexer.clone();
                let mut next = |expected: Token, raw: &[u8]| {
                    ahead.next_token() == expected && (raw.is_empty() || ahead.raw() == raw)
                };
                if next(Token::Punctuation(b'('), b"")
                    && next(Token::Word, b"pg_catalog")
                    && next(Token::Punctuation(b'.'), b"")
                    && next(Token::Operator, b"")
                {
                    let operator = ahead.raw();
                    if ahead.next_token() == Token::Punctuation(b')') {
                        lexer = ahead;
                        part = if USUAL_OPERATORS.contains(&operator) { operator } else { b"+" };
                    }
                }
            }
            (_, b"collate") => {
                let mut ahead = lexer.clone();
                if matches!(ahead.next_token(), Token::Word | Token::Quoted) {
                    part = b"";
                    lexer = ahead.clone();
                    if ahead.next_token() == Token::Punctuation(b'.')
                        && matches!(ahead.next_token(), Token::Word | Token::Quoted)
                    {
                        lexer = ahead;
                    }
                }
            }
            _ => {}
        }
        changed |= part != lexer.raw();
        out.push_str(&String::from_utf8_lossy(part));
        out.push(' ');
        (before_that, before) = (before, this);
    }
}

fn next_is(lexer: &Lexer<'_>, word: &[u8]) -> bool {
    let mut ahead = lexer.clone();
    ahead.next_token() == Token::Word && ahead.name() == word
}

/// Whether a string goes on on a later line: `'a'`, a line's end, `'b'`.
fn is_in_pieces(raw: &[u8]) -> bool {
    let inner = raw.strip_suffix(b"'").unwrap_or(raw);
    let start = inner.iter().position(|byte| *byte == b'\'').map_or(0, |quote| quote + 1);
    let mut inner = &inner[start..];
    while let Some(quote) = memchr::memchr(b'\'', inner) {
        match inner.get(quote + 1) {
            Some(b'\'') => inner = &inner[quote + 2..],
            _ => return true,
        }
    }
    false
}

/// What the token before was, as far as it matters to [`as_it_reads`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Open,
    Comma,
    Between,
    Substring,
    Xml,
    XmlRoot,
    XmlExists,
    XmlSerialize,
    RootWord,
    RootNo,
    By,
    Is,
    Not,
    TrimSide,
    From,
    Relation,
    Uescape,
    Other,
}

impl Before {
    /// The name of a call whose arguments are more than expressions with commas between them.
    fn has_its_own_grammar(self) -> bool {
        matches!(self, Before::Substring | Before::XmlRoot | Before::XmlExists | Before::XmlSerialize)
    }
}

/// What the parser knows, and where its knowing more than a `+` is wanted: `*` and `=` are more than operators.
const USUAL_OPERATORS: &[&[u8]] = &[
    b"=", b"<>", b"!=", b"<", b">", b"<=", b">=", b"+", b"-", b"*", b"/", b"%", b"||", b"~", b"!~", b"->",
    b"->>", b"=>",
];

fn statement_reads(statement: &Statement) -> bool {
    match statement {
        Statement::Query(query) => query_reads(query),
        Statement::Explain { statement, .. } => {
            matches!(&**statement, Statement::Query(query) if query_reads(query))
        }
        Statement::Copy { source, to: true, target: CopyTarget::Stdout, .. } => match source {
            CopySource::Query(query) => query_reads(query),
            CopySource::Table { .. } => true,
        },
        _ => false,
    }
}

/// Queries and what they are made of, without recursion. Sub-queries in expressions are left to the scan,
/// which looks for the same words at every depth.
fn query_reads(query: &Query) -> bool {
    let mut queries = vec![query];
    while let Some(query) = queries.pop() {
        if !query.locks.is_empty() {
            return false;
        }
        queries.extend(query.with.iter().flat_map(|with| &with.cte_tables).map(|cte| &*cte.query));
        let mut bodies = vec![&*query.body];
        while let Some(body) = bodies.pop() {
            match body {
                SetExpr::Select(select) if select.into.is_none() => {}
                SetExpr::Query(inner) => queries.push(inner),
                SetExpr::SetOperation { left, right, .. } => bodies.extend([&**left, &**right]),
                SetExpr::Values(_) | SetExpr::Table(_) => {}
                _ => return false,
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::{ClassKey, Hints};

    /// Held while a text that hangs shall hang.
    static GATE: Mutex<()> = Mutex::new(());

    fn hangs(text: &[u8]) -> bool {
        if text.starts_with(b"hang") {
            let _open = GATE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        true
    }

    #[test]
    fn a_thread_that_hangs_is_replaced_a_bounded_number_of_times() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let opinion = Opinion::with_judge(Arc::new(Cache::new(16)), Duration::from_millis(300), hangs);
        let mut key = 0;
        let mut ask = |text: &[u8]| {
            key += 1;
            let key = ClassKey { whole: key, skeleton: key };
            runtime.block_on(opinion.ask(Question { text: text.into(), key, hints: Hints::default() }))
                == StatementClass::READ
        };
        assert!(ask(b"fine"));
        let closed = GATE.lock().unwrap();
        for replaced in 1..=MAX_ABANDONED {
            assert!(!ask(b"hang"));
            assert_eq!(opinion.replaced(), replaced as u64);
            assert_eq!(ask(b"fine"), replaced < MAX_ABANDONED, "{replaced}");
        }
        // Given up; once those that hung have ended, not any more.
        assert!(!ask(b"fine"));
        drop(closed);
        while opinion.abandoned.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        assert!(ask(b"fine"));
    }

    #[test]
    fn forms_that_the_parser_does_not_know() {
        for (text, read_as) in [
            ("select a #>> b", "select a + b "),
            ("select @ a", "select + a "),
            ("select a operator(pg_catalog.~) b", "select a ~ b "),
            ("select f(variadic a)", "select f (  a ) "),
            ("select 'a #>> b' from c", "select 'a #>> b' from c"),
            ("select substring(a similar b escape c)", "select substring ( a , b , c ) "),
            ("select a similar to b", "select a similar to b"),
            ("select a between symmetric b and c", "select a between  b and c "),
            ("table t", "SELECT * FROM t "),
            ("select a * b from t * x", "select a * b from t  x "),
            ("select trim(leading from a)", "select trim ( leading  a ) "),
            ("select name 'x'", "select  'x' "),
            ("select xmlelement(name a, name)", "select xmlelement (  a , name ) "),
            ("select a collate pg_catalog.default", "select a  "),
            ("select a::text collate \"x\" = b", "select a :: text  = b "),
            (
                "select substring(upper(a) similar substring(b similar c escape d) escape e)",
                "select substring ( upper ( a ) , substring ( b , c , d ) , e ) ",
            ),
            ("select a isnull, b notnull", "select a is null , b is not null "),
            ("select 'a'\n 'b'", "select 'c' "),
            ("select 'a''b'\n, 'c' from t *", "select 'a''b' , 'c' from t  "),
            ("select U&'d!0061' UESCAPE '!' AS U&\"d\\0061\"", "select 'u'   AS \"u\" "),
            (
                "select xmlroot(xmlroot(a, version '1.0'), version no value, standalone yes)",
                "select xmlroot ( xmlroot ( a ,  '1.0' ) ,  null  ,  null ) ",
            ),
            (
                "select xmlserialize(content a as text), xmlserialize(document b as text)",
                "select cast (  a as text ) , cast (  b as text ) ",
            ),
            ("select a is document, b is not document", "select a is null , b is not null "),
            (
                "select 1 from t where xmlexists('/a' passing by ref a by value)",
                "select 1 from t where xmlexists ( '/a' ,   a   ) ",
            ),
            (
                "select * from t, lateral xmltable('/a' passing b columns c int path '@c', d for ordinality)",
                "select * from t ,  xmltable ( '/a' passing b columns c int path '@c' , d for ordinality ) ",
            ),
        ] {
            assert_eq!(as_it_reads(text), read_as);
            assert!(is_one_read(text.as_bytes()), "{text}");
        }
    }
}
