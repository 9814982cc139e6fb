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

/// The text without forms that the parser does not know, and that the scan has accounted for:
/// `OPERATOR(pg_catalog.~)` becomes the operator, and `COLLATE pg_catalog.default` goes, both being how psql
/// writes its queries; SYMMETRIC goes behind BETWEEN; a leading TABLE becomes what it stands for. Found by
/// tokens, so not inside strings or comments.
fn as_it_reads(text: &str) -> std::borrow::Cow<'_, str> {
    use super::lexer::{Lexer, Token};
    let mut lexer = Lexer::new(text.as_bytes());
    let leading_table = lexer.next_token() == Token::Word && lexer.name() == b"table";
    if !leading_table
        && !text.contains("OPERATOR(pg_catalog.")
        && !text.contains("COLLATE pg_catalog.default")
        && !text.contains("SYMMETRIC")
        && !text.contains("symmetric")
    {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    if leading_table {
        out.push_str("SELECT * FROM ");
    } else {
        lexer = Lexer::new(text.as_bytes());
    }
    let mut behind_between = false;
    loop {
        let token = lexer.next_token();
        let is_word = token == Token::Word;
        if is_word && behind_between && matches!(lexer.name(), b"symmetric" | b"asymmetric") {
            continue;
        }
        behind_between = is_word && lexer.name() == b"between";
        match token {
            Token::End | Token::Unclear => return out.into(),
            Token::Word if lexer.raw() == b"OPERATOR" || lexer.raw() == b"COLLATE" => {
                let collate = lexer.raw() == b"COLLATE";
                let mut ahead = lexer.clone();
                let mut next = |expected: Token, raw: &[u8]| {
                    ahead.next_token() == expected && (raw.is_empty() || ahead.raw() == raw)
                };
                if collate {
                    if next(Token::Word, b"pg_catalog")
                        && next(Token::Punctuation(b'.'), b"")
                        && next(Token::Word, b"default")
                    {
                        lexer = ahead;
                        continue;
                    }
                } else if next(Token::Punctuation(b'('), b"")
                    && next(Token::Word, b"pg_catalog")
                    && next(Token::Punctuation(b'.'), b"")
                    && next(Token::Operator, b"")
                {
                    let operator = ahead.raw();
                    if ahead.next_token() == Token::Punctuation(b')') {
                        out.push_str(&String::from_utf8_lossy(operator));
                        out.push(' ');
                        lexer = ahead;
                        continue;
                    }
                }
                out.push_str(&String::from_utf8_lossy(lexer.raw()));
            }
            _ => out.push_str(&String::from_utf8_lossy(lexer.raw())),
        }
        out.push(' ');
    }
}

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
