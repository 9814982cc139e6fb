//! Making a used backend as good as new, verified, or else closing it.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};

use super::{Backend, Dirt, poll_drain, poll_fill};
use crate::wire::{self, TransactionStatus};

/// How long a round trip of our own on a backend may take.
const ROUND_TRIP: Duration = Duration::from_secs(10);

/// The answer to a statement of our own: its rows' columns in text form, and the commands' tags.
#[derive(Debug, Default)]
pub struct Answer {
    /// The rows.
    pub rows: Vec<Vec<Option<Vec<u8>>>>,
    /// One tag per statement.
    pub tags: Vec<Vec<u8>>,
}

/// The backend cannot be used any more.
#[derive(Debug)]
pub struct Broken;

/// Runs a statement of our own on a backend that is idle, by the simple protocol. An error, a broken
/// connection, a transaction left open or a late answer make the backend unusable.
pub async fn ask(backend: &mut Backend, sql: &str) -> Result<Answer, Broken> {
    let mut message = Vec::with_capacity(sql.len() + 6);
    wire::put(&mut message, b'Q', |out| wire::put_cstr(out, sql.as_bytes()));
    round_trip(backend, &message).await
}

/// A Sync: the round trip after which an earlier cancel request can no longer take effect.
pub async fn sync(backend: &mut Backend) -> Result<(), Broken> {
    round_trip(backend, &[b'S', 0, 0, 0, 4]).await.map(|_| ())
}

async fn round_trip(backend: &mut Backend, message: &[u8]) -> Result<Answer, Broken> {
    backend.output.put_slice(message);
    // The unnamed statement dies with a Query, and nobody's may outlive this.
    backend.unnamed = None;
    match tokio::time::timeout(ROUND_TRIP, answer(backend)).await {
        Ok(result) => result,
        Err(_late) => Err(Broken),
    }
}

async fn answer(backend: &mut Backend) -> Result<Answer, Broken> {
    poll_fn(|cx| poll_drain(&mut backend.stream, &mut backend.output, cx)).await.map_err(|_| Broken)?;
    let mut answer = Answer::default();
    loop {
        while let Some(message) = next_message(&mut backend.input)? {
            let body = &message[wire::HEADER..];
            match message[0] {
                b'Z' => {
                    let idle = body.first().copied().and_then(TransactionStatus::from_byte)
                        == Some(TransactionStatus::Idle);
                    return if idle { Ok(answer) } else { Err(Broken) };
                }
                b'D' => answer.rows.push(columns(body).ok_or(Broken)?),
                b'C' => answer.tags.push(wire::cstr(body).ok_or(Broken)?.0.to_vec()),
                b'S' => backend.report(body),
                b'T' | b'N' | b'A' => {}
                _ => return Err(Broken),
            }
        }
        let read =
            poll_fn(|cx| poll_fill(&mut backend.stream, &mut backend.input, cx)).await.map_err(|_| Broken)?;
        if read == 0 {
            return Err(Broken);
        }
    }
}

fn next_message(input: &mut BytesMut) -> Result<Option<BytesMut>, Broken> {
    match wire::header(input) {
        Ok(Some(header)) if input.len() >= header.len => Ok(Some(input.split_to(header.len))),
        Ok(Some(header)) if header.len > 1 << 20 => Err(Broken),
        Ok(_) => Ok(None),
        Err(_) => Err(Broken),
    }
}

fn columns(body: &[u8]) -> Option<Vec<Option<Vec<u8>>>> {
    let (count, mut rest) = body.split_first_chunk::<2>()?;
    let mut columns = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        match usize::try_from(i32::from_be_bytes(*length)) {
            Err(_negative) => {
                columns.push(None);
                rest = tail;
            }
            Ok(length) => {
                columns.push(Some(tail.get(..length)?.to_vec()));
                rest = &tail[length..];
            }
        }
    }
    Some(columns)
}

/// Lets the cancel requests pass that were sent to an idle backend, which PostgreSQL ignores then.
/// `Err`: one may still arrive.
async fn fence(backend: &mut Backend) -> Result<(), Broken> {
    if !backend.cancel.was_sent() {
        return Ok(());
    }
    backend.cancel.settled().await;
    if backend.cancel.is_astray() {
        return Err(Broken);
    }
    sync(backend).await?;
    backend.cancel.fenced();
    Ok(())
}

/// Makes a backend that is idle (or was sent a cancel) fit for anybody. `Err`: close it.
pub async fn clean(backend: &mut Backend) -> Result<(), Broken> {
    fence(backend).await?;
    match backend.dirt {
        Dirt::Clean => Ok(()),
        Dirt::Unknown => Err(Broken),
        Dirt::State => {
            let answer = ask(backend, "DISCARD ALL").await?;
            if answer.tags != [b"DISCARD ALL".to_vec()] {
                return Err(Broken);
            }
            backend.forget_statements();
            backend.application_name = None;
            backend.dirt = Dirt::Clean;
            Ok(())
        }
    }
}

/// Gives a backend that is idle the `application_name` of the session that is to use it.
pub async fn name(backend: &mut Backend, application_name: Option<&Arc<str>>) -> Result<(), Broken> {
    if backend.application_name.as_ref() == application_name {
        return Ok(());
    }
    let answer = match application_name {
        Some(name) => ask(backend, &format!("SET application_name = {}", literal(name))).await?,
        None => ask(backend, "RESET application_name").await?,
    };
    if !matches!(answer.tags.as_slice(), [tag] if tag == b"SET" || tag == b"RESET") {
        return Err(Broken);
    }
    backend.application_name = application_name.cloned();
    Ok(())
}

/// Makes the backend forget what was drawn from sequences on it, unless `session` was the last to write there:
/// `currval` and `lastval` are then an error, as for a session that has drawn nothing, and never another's value.
pub async fn forget_sequences(backend: &mut Backend, session: u32) -> Result<(), Broken> {
    if backend.last_writer.is_none_or(|writer| writer == session) {
        return Ok(());
    }
    let answer = ask(backend, "DISCARD SEQUENCES").await?;
    if !matches!(answer.tags.as_slice(), [tag] if tag == b"DISCARD SEQUENCES") {
        return Err(Broken);
    }
    backend.last_writer = None;
    Ok(())
}

/// `text` as a literal that means the same whatever `standard_conforming_strings` is.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// What a statement that is not understood has left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Nothing that the server's views show.
    Nothing,
    /// Session state.
    State,
}

/// Looks for session state on an idle backend: temporary relations, channels listened to, statements
/// prepared by SQL, cursors WITH HOLD, session-level advisory locks, changed settings.
///
/// Custom settings (`app.tenant`) set by a function do not show here on PostgreSQL 15, so whoever
/// asks must still have the backend cleaned before another session gets it.
pub async fn look(backend: &mut Backend) -> Result<Left, Broken> {
    const QUESTION: &str = "SELECT EXISTS (SELECT FROM pg_catalog.pg_class WHERE relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()) \
         OR EXISTS (SELECT FROM pg_catalog.pg_listening_channels()) \
         OR EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql) \
         OR EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable) \
         OR EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'advisory' AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()) \
         OR EXISTS (SELECT FROM pg_catalog.pg_settings WHERE source OPERATOR(pg_catalog.=) 'session'";
    // The name that we have set ourselves is not the session's doing.
    let named = match &backend.application_name {
        Some(name) => format!(
            " AND (name OPERATOR(pg_catalog.<>) 'application_name' OR setting OPERATOR(pg_catalog.<>) {})",
            literal(name)
        ),
        // RESET leaves it with the source it had at login.
        None => String::new(),
    };
    // A cancel that is still on its way must not hit the question.
    fence(backend).await?;
    let answer = ask(backend, &format!("{QUESTION}{named})")).await?;
    match answer.rows.as_slice() {
        [row] => match row.first() {
            Some(Some(value)) if value == b"f" => Ok(Left::Nothing),
            Some(Some(value)) if value == b"t" => Ok(Left::State),
            _ => Err(Broken),
        },
        _ => Err(Broken),
    }
}
