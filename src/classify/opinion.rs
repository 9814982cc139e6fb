//! The second opinion: `sqlparser` must agree that a text is one read-only query.
//!
//! It recurses, and a hostile text can exhaust a stack, which would abort the process. So it runs on a
//! thread with a stack that no text within `limits.parser_text` can exhaust; the scan has sorted out
//! texts that pile up what the parser recurses over. Answers have a deadline and the queue a bound;
//! beyond either, the statement is not a read this time.
//!
//! What it refuses although the scan was sure goes to the primary.

use std::ops::ControlFlow;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlparser::ast::{CopySource, CopyTarget, Query, SetExpr, Statement};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::Parser;
use tokio::sync::oneshot;

use super::cache::Cache;
use super::{ClassReason, Question, StatementClass};

/// The parser's stack; reserved, and used only as far as texts need it.
const STACK_BYTES: usize = 32 * 1024 * 1024;

/// Questions that may wait. At the usual tens of microseconds each, far more than a deadline lets through.
const QUEUE: usize = 256;

struct Job {
    question: Question,
    reply: oneshot::Sender<StatementClass>,
}

/// The parser's thread, started on first need and again should it ever end.
#[derive(Debug)]
pub(super) struct Opinion {
    cache: Arc<Cache>,
    deadline: Duration,
    jobs: Mutex<Option<SyncSender<Job>>>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.question.fmt(f)
    }
}

impl Opinion {
    pub(super) fn new(cache: Arc<Cache>, deadline: Duration) -> Opinion {
        Opinion { cache, deadline, jobs: Mutex::new(None) }
    }

    /// The verdict, or "not a read" when it does not come in time.
    pub(super) async fn ask(&self, question: Question) -> StatementClass {
        let (reply, answer) = oneshot::channel();
        if self.send(Job { question, reply })
            && let Ok(Ok(class)) = tokio::time::timeout(self.deadline, answer).await
        {
            return class;
        }
        StatementClass::write(ClassReason::SecondOpinion)
    }

    /// Whether the job was taken: not when the queue is full or no thread can be had.
    fn send(&self, job: Job) -> bool {
        let mut jobs = self.jobs.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let job = match jobs.as_ref() {
            None => job,
            Some(sender) => match sender.try_send(job) {
                Ok(()) => return true,
                Err(TrySendError::Full(_)) => return false,
                Err(TrySendError::Disconnected(job)) => job,
            },
        };
        self.start(&mut jobs).is_some_and(|sender| sender.try_send(job).is_ok())
    }

    fn start<'a>(&self, jobs: &'a mut Option<SyncSender<Job>>) -> Option<&'a SyncSender<Job>> {
        let (sender, receiver) = sync_channel::<Job>(QUEUE);
        let cache = Arc::clone(&self.cache);
        let thread = std::thread::Builder::new().name("second-opinion".into()).stack_size(STACK_BYTES);
        let started = thread.spawn(move || {
            // Ends when the sender is dropped, with the classifier.
            while let Ok(job) = receiver.recv() {
                if let ControlFlow::Break(()) = answer(job, &cache) {
                    return;
                }
            }
        });
        *jobs = started.is_ok().then_some(sender);
        jobs.as_ref()
    }
}

fn answer(job: Job, cache: &Cache) -> ControlFlow<()> {
    let Job { question, reply } = job;
    // A panic of the parser is a refusal like any other.
    let agreed = std::panic::catch_unwind(|| is_one_read(&question.text)).unwrap_or(false);
    let class = if agreed { StatementClass::READ } else { StatementClass::write(ClassReason::SecondOpinion) };
    // What a replica has refused meanwhile stays refused.
    if cache.skeleton(question.key.skeleton).is_none() {
        cache.put_skeleton(question.key.skeleton, class);
        cache.put_whole(question.key, class);
    }
    let _ = reply.send(class);
    ControlFlow::Continue(())
}

/// Whether the second parser takes the text for one query that does nothing but read.
pub(super) fn is_one_read(text: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let text = as_it_reads(text);
    match Parser::parse_sql(&PostgreSqlDialect {}, &text) {
        Ok(statements) => matches!(&statements[..], [statement] if statement_reads(statement)),
        Err(_) => false,
    }
}

/// The text without forms that the parser does not know, and that the scan has accounted for: `OPERATOR(pg_catalog.~)`
/// becomes the operator, and `COLLATE pg_catalog.default` goes, both being how psql writes its queries; an
/// operator that is not among the usual ones becomes `+`, which stands wherever an operator may; SYMMETRIC goes
/// behind BETWEEN, VARIADIC before an argument, NAME in XMLELEMENT and XMLPI; SUBSTRING's SIMILAR and ESCAPE become
/// commas; a leading TABLE becomes what it stands for. Found by tokens, so not inside strings or comments.
fn as_it_reads(text: &str) -> std::borrow::Cow<'_, str> {
    use super::lexer::{Lexer, Token};
    let mut lexer = Lexer::new(text.as_bytes());
    let leading_table = lexer.next_token() == Token::Word && lexer.name() == b"table";
    let mut out = String::with_capacity(text.len() + text.len() / 4);
    let mut changed = leading_table;
    if leading_table {
        out.push_str("SELECT * FROM ");
    } else {
        lexer = Lexer::new(text.as_bytes());
    }
    // The depth of the parentheses, that of the innermost SUBSTRING's, and the last two tokens.
    let (mut depth, mut substring) = (0u32, None);
    let (mut before, mut before_that) = (Before::Other, Before::Other);
    loop {
        let token = lexer.next_token();
        let mut part = lexer.raw();
        let name = if token == Token::Word { lexer.name() } else { b"" };
        let mut this = Before::Other;
        match (token, name) {
            (Token::End, _) => return if changed { out.into() } else { text.into() },
            (Token::Unclear, _) => return text.into(),
            (Token::Punctuation(b'('), _) => {
                depth += 1;
                this = Before::Open;
                if before == Before::Substring {
                    substring = Some(depth);
                }
            }
            (Token::Punctuation(b')'), _) => {
                if substring == Some(depth) {
                    substring = None;
                }
                depth = depth.saturating_sub(1);
            }
            (Token::Punctuation(b','), _) => this = Before::Comma,
            (Token::Operator, _) if !USUAL_OPERATORS.contains(&part) => part = b"+",
            (_, b"symmetric" | b"asymmetric") if before == Before::Between => part = b"",
            (_, b"variadic") if matches!(before, Before::Open | Before::Comma) => part = b"",
            (_, b"name") if before == Before::Open && before_that == Before::Xml => part = b"",
            (_, b"similar" | b"escape") if substring == Some(depth) => part = b",",
            (_, b"between") => this = Before::Between,
            (_, b"substring") => this = Before::Substring,
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
                let mut next = |expected: Token, raw: &[u8]| {
                    ahead.next_token() == expected && (raw.is_empty() || ahead.raw() == raw)
                };
                if next(Token::Word, b"pg_catalog")
                    && next(Token::Punctuation(b'.'), b"")
                    && next(Token::Word, b"default")
                {
                    lexer = ahead;
                    part = b"";
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

/// What the token before was, as far as it matters to [`as_it_reads`].
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Open,
    Comma,
    Between,
    Substring,
    Xml,
    Other,
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
