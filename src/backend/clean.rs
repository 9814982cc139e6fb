//! Making a used backend as good as new, verified, or else closing it.

use std::collections::HashSet;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, BytesMut};

use super::{Backend, Dirt, poll_drain, poll_fill};
use crate::classify::setting;
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
    /// The server has reported an error.
    failed: bool,
}

/// Bytes of notifications that may come during one round trip of ours. Only a session that has just begun
/// to listen, or has stopped listening to one of several channels, has a round trip while it listens.
const MOST_HEARD: usize = 4 << 20;

/// The backend cannot be used any more.
#[derive(Debug)]
pub struct Broken;

/// Runs a statement of our own on a backend that is idle, by the simple protocol. An error, a broken
/// connection, a transaction left open or a late answer make the backend unusable.
pub async fn ask(backend: &mut Backend, sql: &str) -> Result<Answer, Broken> {
    match ask_even_in_vain(backend, sql).await? {
        answer if answer.failed => Err(Broken),
        answer => Ok(answer),
    }
}

/// A command of our own.
pub async fn command(backend: &mut Backend, sql: &str) -> Result<(), Broken> {
    fence(backend).await?;
    ask(backend, sql).await.map(|_| ())
}

/// The same, but that an error is an answer.
async fn ask_even_in_vain(backend: &mut Backend, sql: &str) -> Result<Answer, Broken> {
    let mut message = Vec::with_capacity(sql.len() + 6);
    wire::put(&mut message, b'Q', |out| wire::put_cstr(out, sql.as_bytes()));
    round_trip(backend, &message).await
}

/// A Sync: the round trip after which an earlier cancel request can no longer take effect.
pub async fn sync(backend: &mut Backend) -> Result<(), Broken> {
    match round_trip(backend, &[b'S', 0, 0, 0, 4]).await? {
        answer if answer.failed => Err(Broken),
        _ => Ok(()),
    }
}

async fn round_trip(backend: &mut Backend, message: &[u8]) -> Result<Answer, Broken> {
    backend.output.put_slice(message);
    // The unnamed statement dies with a Query, and nobody's may outlive this.
    backend.unnamed = None;
    let left = backend.socket.closed();
    let answer = tokio::select! {
        biased;
        () = left => Err(Broken),
        answer = tokio::time::timeout(ROUND_TRIP, answer(backend)) => answer.unwrap_or(Err(Broken)),
    };
    if answer.is_err() {
        // Its answer may still come: nobody must take that for the answer to something else.
        backend.dirt = Dirt::Unknown;
    }
    answer
}

async fn answer(backend: &mut Backend) -> Result<Answer, Broken> {
    poll_fn(|cx| poll_drain(&mut backend.stream, &mut backend.output, cx)).await.map_err(|_| Broken)?;
    let mut answer = Answer::default();
    let mut heard = 0;
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
                b'A' => {
                    heard += message.len();
                    if heard > MOST_HEARD {
                        return Err(Broken);
                    }
                    backend.heard.push(message);
                }
                // A fatal one is followed by the end of the connection.
                b'E' => answer.failed = true,
                b'T' | b'N' => {}
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
pub async fn fence(backend: &mut Backend) -> Result<(), Broken> {
    if !backend.cancel.was_sent() {
        return Ok(());
    }
    tokio::select! {
        biased;
        () = backend.socket.closed() => return Err(Broken),
        () = backend.cancel.settled() => {}
    }
    if backend.cancel.is_astray() {
        return Err(Broken);
    }
    sync(backend).await?;
    backend.cancel.fenced();
    Ok(())
}

/// Makes a backend that is idle (or was sent a cancel) fit for anybody. `Err`: close it.
pub async fn clean(backend: &mut Backend) -> Result<(), Broken> {
    let cleaned = clean_state(backend).await;
    // Whoever listened is gone.
    backend.heard = Vec::new();
    cleaned
}

async fn clean_state(backend: &mut Backend) -> Result<(), Broken> {
    fence(backend).await?;
    match backend.dirt {
        Dirt::Clean => Ok(()),
        Dirt::Unknown => Err(Broken),
        Dirt::Hidden | Dirt::State => {
            let answer = ask(backend, "DISCARD ALL").await?;
            if answer.tags != [b"DISCARD ALL".to_vec()] {
                return Err(Broken);
            }
            backend.forget_statements();
            backend.applied = Arc::default();
            backend.dirt = Dirt::Clean;
            Ok(())
        }
    }
}

/// The session state that the server's views show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// Something in the session's temporary schema.
    pub temporary: bool,
    /// A channel that is listened to.
    pub listening: bool,
    /// A statement prepared by SQL.
    pub prepared: bool,
    /// A cursor WITH HOLD.
    pub hold_cursor: bool,
    /// A session-level advisory lock.
    pub advisory_lock: bool,
    /// A changed setting.
    pub setting: bool,
}

/// The `idle_session_timeout` that the server would apply to a session like this one, if our connections
/// to it were not exempt ([`super::exempt`]): what the role, the database or the client has set.
pub async fn idle_session_timeout(backend: &mut Backend) -> Result<Duration, Broken> {
    const NAME: &str = "idle_session_timeout";
    let asked = backend.startup.0.iter().rfind(|(name, _)| name == NAME);
    let value = match asked {
        Some((_, value)) => setting::literal(value.as_bytes(), false).ok_or(Broken)?,
        // In the order in which the server looks.
        None => "(SELECT pg_catalog.substr(s, 22) FROM pg_catalog.pg_db_role_setting, pg_catalog.unnest(setconfig) AS s \
             WHERE pg_catalog.starts_with(s, 'idle_session_timeout=') \
             AND setrole OPERATOR(pg_catalog.=) ANY (ARRAY[0, (SELECT oid FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) SESSION_USER)]::oid[]) \
             AND setdatabase OPERATOR(pg_catalog.=) ANY (ARRAY[0, (SELECT oid FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) pg_catalog.current_database())]::oid[]) \
             ORDER BY setrole OPERATOR(pg_catalog.=) 0::oid, setdatabase OPERATOR(pg_catalog.=) 0::oid LIMIT 1)"
            .to_owned(),
    };
    // The server reads its own units. The setting lasts to the end of the message: one transaction.
    let question = format!(
        "SELECT pg_catalog.set_config('{NAME}', {value}, true); \
         SELECT setting FROM pg_catalog.pg_settings WHERE name OPERATOR(pg_catalog.=) '{NAME}'"
    );
    let answer = ask(backend, &question).await?;
    let millis = answer.rows.last().and_then(|row| row.first()?.as_deref());
    // No row: a server older than the setting.
    let Some(millis) = millis else { return Ok(Duration::ZERO) };
    let millis = std::str::from_utf8(millis).ok().and_then(|text| text.parse().ok());
    Ok(Duration::from_millis(millis.unwrap_or(0)))
}

/// The isolation level of a transaction that asks for none.
pub async fn default_isolation(backend: &mut Backend) -> Result<std::sync::Arc<[u8]>, Broken> {
    let answer = ask(backend, "SELECT pg_catalog.current_setting('default_transaction_isolation')").await?;
    let value = answer.rows.into_iter().next().and_then(|row| row.into_iter().next().flatten());
    Ok(value.unwrap_or_default().into())
}

/// What a look at a backend gives.
#[derive(Debug)]
pub struct Look {
    /// What is there. None: the server has answered with an error, which a setting of the session's may
    /// have caused (`statement_timeout`).
    pub shown: Option<Shown>,
    /// What makes another backend listen to the same channels.
    pub listens: Option<Vec<u8>>,
}

/// A condition that `what` is none of `literals`, to stand behind another one; no text if there are none.
fn none_of(what: &str, literals: impl Iterator<Item = String>) -> String {
    let list: Vec<String> = literals.collect();
    if list.is_empty() {
        return String::new();
    }
    format!(" AND {what} OPERATOR(pg_catalog.<>) ALL (ARRAY[{}])", list.join(", "))
}

/// Looks for session state on an idle backend.
///
/// Custom settings (`app.tenant`) and roles set by a function do not show here on PostgreSQL 15, so
/// whoever asks must still have the backend cleaned before another session gets it.
pub async fn look(backend: &mut Backend) -> Result<Look, Broken> {
    // All that is in a schema depends on it, by an index: that is how the server itself finds what to drop.
    const QUESTION: &str = "SELECT EXISTS (SELECT FROM pg_catalog.pg_depend \
            WHERE refclassid OPERATOR(pg_catalog.=) 2615 AND refobjid OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()), \
         EXISTS (SELECT FROM pg_catalog.pg_listening_channels()), \
         EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable), \
         EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'advisory' AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()), \
         EXISTS (SELECT FROM pg_catalog.pg_settings WHERE source OPERATOR(pg_catalog.=) 'session'";
    // What the session has set itself is no news, nor are statements of the session's that it may be given elsewhere.
    let applied = backend.applied.entries().iter().map(|entry| &*entry.name);
    // These are a transaction's own, whoever has set them.
    let of_transactions = ["transaction_isolation", "transaction_read_only", "transaction_deferrable"];
    let no_news = applied.chain(of_transactions);
    let named = none_of(
        "pg_catalog.lower(name)",
        no_news.filter_map(|name| setting::literal(name.as_bytes(), false)),
    );
    let own_names = backend.own_names.iter();
    let unknown = none_of("name", own_names.filter_map(|name| setting::literal(name, true)));
    let prepared = format!("EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql{unknown})");
    let listens = "(SELECT pg_catalog.string_agg('LISTEN ' OPERATOR(pg_catalog.||) pg_catalog.quote_ident(c), '; ') \
         FROM pg_catalog.pg_listening_channels() AS c)";
    // A cancel that is still on its way must not hit the question.
    fence(backend).await?;
    let question = format!("{QUESTION}{named}), {prepared}, {listens}");
    let mut answer = ask_even_in_vain(backend, &question).await?;
    let shown = if answer.failed { None } else { Some(shown(&answer.rows).ok_or(Broken)?) };
    let listens = answer.rows.pop().and_then(|mut row| row.pop().flatten());
    Ok(Look { shown, listens })
}

fn shown(rows: &[Vec<Option<Vec<u8>>>]) -> Option<Shown> {
    let [row] = rows else { return None };
    let mut columns = row.iter().map(|value| match value.as_deref() {
        Some(b"t") => Some(true),
        Some(b"f") => Some(false),
        _ => None,
    });
    let mut next = || columns.next().flatten();
    Some(Shown {
        temporary: next()?,
        listening: next()?,
        hold_cursor: next()?,
        advisory_lock: next()?,
        setting: next()?,
        prepared: next()?,
    })
}

/// The names of the statements that an idle backend has. None: the server has answered with an error.
pub async fn statement_names(backend: &mut Backend) -> Result<Option<HashSet<Vec<u8>>>, Broken> {
    let answer = ask_even_in_vain(backend, "SELECT name FROM pg_catalog.pg_prepared_statements").await?;
    let names = answer.rows.into_iter().filter_map(|mut row| row.pop().flatten()).collect();
    Ok((!answer.failed).then_some(names))
}

/// The values of settings on an idle backend, in the order of `names`; none where it knows no such setting.
pub async fn read_settings(backend: &mut Backend, names: &[String]) -> Result<Vec<Option<Vec<u8>>>, Broken> {
    let mut columns = Vec::with_capacity(names.len());
    for name in names {
        let name = setting::literal(name.as_bytes(), false).ok_or(Broken)?;
        columns.push(format!("pg_catalog.current_setting({name}, true)"));
    }
    fence(backend).await?;
    let mut answer = ask(backend, &format!("SELECT {}", columns.join(", "))).await?;
    match answer.rows.pop() {
        Some(row) if answer.rows.is_empty() && row.len() == names.len() => Ok(row),
        _ => Err(Broken),
    }
}
