//! The nodes' side of the wire: connections to PostgreSQL servers, pooled and lent to sessions.
//!
//! A [`Backend`] knows what it has been left with (prepared statements, dirt), so that its next
//! borrower either finds it as new or does not get it. It does not know what a statement means.

mod applied;
pub mod cancel;
pub mod clean;
pub mod defaults;
mod parameters;
pub mod places;
pub mod pool;
pub mod senders;

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Buf, BytesMut};
use lru::LruCache;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::gate::Socket;
use crate::net::Stream;
use crate::topology::{Epoch, NodeId};

pub use crate::login;
pub use applied::{Applied, Setting};
pub use cancel::CancelTarget;
pub use parameters::Parameters;

/// The name under which backends of all sessions share a prepared statement: a keyed hash of text and types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SharedName(pub u128);

const HEX_DIGITS: [u8; 16] = *b"0123456789abcdef";

impl SharedName {
    /// The name as the server sees it.
    pub fn server_name(self) -> [u8; SharedName::LENGTH] {
        let mut name = [0; SharedName::LENGTH];
        let (prefix, digits) = name.split_at_mut(SharedName::PREFIX.len());
        prefix.copy_from_slice(SharedName::PREFIX.as_bytes());
        for (two, byte) in digits.chunks_exact_mut(2).zip(self.0.to_be_bytes()) {
            two[0] = HEX_DIGITS[usize::from(byte >> 4)];
            two[1] = HEX_DIGITS[usize::from(byte & 15)];
        }
        name
    }

    const PREFIX: &str = "__hw_";

    /// Bytes of a name as the server sees it.
    pub const LENGTH: usize = SharedName::PREFIX.len() + 32;

    /// Where a text has such a name, and which.
    pub fn find_in(text: &[u8]) -> Option<(usize, SharedName)> {
        let at = memchr::memmem::find(text, SharedName::PREFIX.as_bytes())?;
        let digits = text.get(at + SharedName::PREFIX.len()..at + SharedName::LENGTH)?;
        let number = u128::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        Some((at, SharedName(number)))
    }

    /// Whether a client's name could be taken for one that sessions share. They are no secret
    /// (`pg_prepared_statements` shows them), so a client must not reach them by naming them.
    pub fn is_like(name: &[u8]) -> bool {
        name.starts_with(SharedName::PREFIX.as_bytes())
    }
}

/// A hash of what a server says of a prepared statement: its parameters' types, and its result's
/// columns as far as PostgreSQL holds them to be its result type. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape(pub std::num::NonZeroU64);

/// A shared statement on a backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prepared {
    /// What the server has said of it; none before its answer.
    pub shape: Option<Shape>,
    /// The catalog facts' identity when it was parsed: under newer ones a client that prepares the text
    /// gets it parsed anew. Zero: it is not known to be up to date.
    pub catalog: u64,
    /// The server has found it out of date: it is to be prepared anew before its next use.
    pub stale: bool,
}

/// What a session may have left on a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dirt {
    /// Nothing.
    Clean,
    /// Code that is not understood ran, and nothing of it shows: its session may go on with the backend as it is;
    /// for anybody else it is cleaned.
    Hidden,
    /// Session state: it is cleaned (DISCARD ALL, verified) before anybody else gets it.
    State,
    /// It cannot be told what: it is closed.
    Unknown,
}

/// A connection to a node, logged in as some user to some database.
pub struct Backend {
    /// The node.
    pub node: NodeId,
    /// The socket.
    pub stream: Stream,
    /// Bytes read from the node and not yet used.
    pub input: BytesMut,
    /// Bytes for the node that are not yet written.
    pub output: BytesMut,
    /// Where a cancel request for it goes.
    pub cancel: Arc<CancelTarget>,
    /// Notifications that came during round trips of ours, each a whole message: its session's, before anything else.
    pub heard: Vec<BytesMut>,
    /// What it has reported.
    pub parameters: Arc<Parameters>,
    /// The startup parameters it was opened with: it serves sessions that ask for the same.
    pub startup: Arc<StartupParameters>,
    /// The node's sample counter right after the login: only later samples speak for this backend.
    pub connected_at: u64,
    /// Of the primary: a sample sent later has shown that it belongs to the start of the server that is known.
    pub vouched_for: bool,
    /// The epoch in which it was opened.
    pub epoch: Epoch,
    /// Changes of what logins give when it was opened; none: it may have been given what was valid before.
    pub login_settings: Option<u64>,
    /// Of a replica: what the primary gives to a login like its own, as far as it was known when it was opened.
    pub defaults: Option<Arc<defaults::LoginValues>>,
    /// Which way to its node it was opened by: after a reload has changed the way, it serves no further unit.
    pub way: u64,
    /// When it was opened.
    pub opened: Instant,
    /// When it was last given back.
    pub idle_since: Instant,
    /// The shared statements it has, least recently used last. Its limit (`pool.max_prepared`) is kept by
    /// whoever adds to it: what leaves here must be closed on the server, too.
    pub prepared: LruCache<SharedName, Prepared>,
    /// Whose unnamed statement it holds: a number that one session gave to one Parse.
    pub unnamed: Option<u64>,
    /// The statements it has under a client's own names: see `names_of`.
    pub own_names: HashSet<Vec<u8>>,
    /// Whose names those are: a session's number, and the version of its names. For any other they are closed
    /// before it uses the backend.
    pub names_of: (u64, u64),
    /// What sessions may have left on it.
    pub dirt: Dirt,
    /// The settings that it has been given; all others are as at its login.
    pub applied: Arc<Applied>,
    /// What it reported at its login.
    pub login_parameters: Arc<Parameters>,
    /// The session (by the process id it shows) that last ran on it what is not a read: what it may have
    /// drawn from sequences is what `currval` and `lastval` speak of. None: nobody.
    pub last_writer: Option<u32>,
    /// The session that used it last, by a number that no other has; 0: nobody.
    pub last_user: u64,
    /// The worker on whose reactor its socket is registered.
    pub worker: usize,
    /// Its place among the node's (`pool.max_backends_per_node`).
    pub place: Option<places::Place>,
    /// Its place in the count of connections; the last to be dropped.
    pub socket: Socket,
}

/// The startup parameters of a client that its backends must share, in a canonical order: all but
/// user, database, replication and protocol options.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct StartupParameters(pub Vec<(String, String)>);

impl StartupParameters {
    /// Takes `application_name` out, so that clients which differ only in that share backends: many
    /// put a process id or a job's name there. Each backend is given it with the session's settings.
    ///
    /// A value that the server would not keep as it is (too long, not printable ASCII) stays in, as
    /// does one whose quoting depends on `standard_conforming_strings`.
    pub fn take_application_name(&mut self) -> Option<Arc<str>> {
        // Of several, the last counts.
        let at = self.0.iter().rposition(|(name, _)| name == "application_name")?;
        let value = &self.0[at].1;
        if value.len() >= 64 || !value.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'\\') {
            return None;
        }
        let value = Arc::from(value.as_str());
        self.0.retain(|(name, _)| name != "application_name");
        Some(value)
    }
}

/// The startup parameters with which a pooled connection is opened for a session that asks for `startup`.
///
/// `idle_session_timeout` (of a role, a database or the server) is meant for clients. Between two of its
/// sessions a pooled connection idles without anybody's fault, and one that the server ends just as a
/// statement is sent would cost a client that statement. The proxy applies the timeout itself.
pub fn exempt(startup: &StartupParameters) -> Vec<(String, String)> {
    let mut parameters = startup.0.clone();
    parameters.retain(|(name, _)| name != "idle_session_timeout");
    // Behind `options`, of which the server thinks first.
    parameters.push(("idle_session_timeout".to_owned(), "0".to_owned()));
    parameters
}

/// Bytes a read may take at once when results are large.
const BULK_READ: usize = 64 * 1024;
/// Bytes a read may take at first.
const FIRST_READ: usize = 8 * 1024;

/// Reads what is there into `input`, at most one read. `Ready(Ok(0))`: the peer has closed.
pub fn poll_fill(
    stream: &mut Stream,
    input: &mut BytesMut,
    cx: &mut Context<'_>,
) -> Poll<std::io::Result<usize>> {
    if input.capacity() - input.len() < FIRST_READ / 2 {
        if input.len() < FIRST_READ {
            return poll_fill_small(stream, input, cx);
        }
        input.reserve(BULK_READ);
    }
    tokio_util::io::poll_read_buf(Pin::new(stream), cx, input)
}

/// Most connections wait most of the time: no buffer is kept for what they may say, only for what they have said.
fn poll_fill_small(
    stream: &mut Stream,
    input: &mut BytesMut,
    cx: &mut Context<'_>,
) -> Poll<std::io::Result<usize>> {
    let mut space = [std::mem::MaybeUninit::uninit(); FIRST_READ];
    let mut read = ReadBuf::uninit(&mut space);
    match Pin::new(stream).poll_read(cx, &mut read) {
        Poll::Ready(Ok(())) => {}
        Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
        Poll::Pending => return Poll::Pending,
    }
    let came = read.filled();
    if came.len() == FIRST_READ {
        // A read that was filled to its end is likely to be filled again: the next goes into the buffer itself.
        input.reserve(FIRST_READ + BULK_READ);
    }
    input.extend_from_slice(came);
    Poll::Ready(Ok(came.len()))
}

/// Writes what `output` holds, as far as the socket takes it. `Ready(Ok(()))`: all of it.
pub fn poll_drain(
    stream: &mut Stream,
    output: &mut BytesMut,
    cx: &mut Context<'_>,
) -> Poll<std::io::Result<()>> {
    let mut wrote = false;
    while !output.is_empty() {
        match Pin::new(&mut *stream).poll_write(cx, output) {
            Poll::Ready(Ok(0)) => return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into())),
            Poll::Ready(Ok(n)) => {
                output.advance(n);
                wrote = true;
            }
            Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
            Poll::Pending => return Poll::Pending,
        }
    }
    if wrote && let Stream::Plain(_) = stream {
        return Poll::Ready(Ok(()));
    }
    // A TLS stream may hold encrypted bytes back.
    Pin::new(stream).poll_flush(cx)
}

impl Backend {
    /// Wraps a fresh login.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        node: NodeId,
        login: login::LoggedIn,
        startup: Arc<StartupParameters>,
        cancel: Arc<CancelTarget>,
        connected_at: u64,
        epoch: Epoch,
        worker: usize,
        now: Instant,
        socket: Socket,
    ) -> Backend {
        let parameters: Arc<Parameters> = Arc::new(login.parameters.into_iter().collect());
        Backend {
            node,
            stream: login.stream,
            input: BytesMut::from(&login.leftover[..]),
            output: BytesMut::new(),
            cancel,
            login_parameters: parameters.clone(),
            parameters,
            startup,
            connected_at,
            vouched_for: false,
            epoch,
            login_settings: None,
            defaults: None,
            way: 0,
            opened: now,
            idle_since: now,
            // Unbounded: what goes over `pool.max_prepared` must be closed on the server as well, which a
            // cache that drops it by itself would not do.
            prepared: LruCache::unbounded(),
            unnamed: None,
            own_names: HashSet::new(),
            names_of: (0, 0),
            dirt: Dirt::Clean,
            applied: Arc::default(),
            last_writer: None,
            heard: Vec::new(),
            last_user: 0,
            worker,
            place: None,
            socket,
        }
    }

    /// Whether an idle backend is still good, without a system call: an idle PostgreSQL backend says
    /// nothing unless it is going away (or a setting was reloaded, which is then read here).
    pub fn is_alive(&mut self) -> bool {
        loop {
            let read = match &mut self.stream {
                // The same as below, but without a waker that nobody would be woken by.
                Stream::Plain(tcp) => {
                    let mut said = [0; 128];
                    let read = tcp.try_read(&mut said);
                    if let Ok(n) = read {
                        self.input.extend_from_slice(&said[..n]);
                    }
                    match read {
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Poll::Pending,
                        read => Poll::Ready(read),
                    }
                }
                stream => {
                    let mut cx = Context::from_waker(std::task::Waker::noop());
                    poll_fill(stream, &mut self.input, &mut cx)
                }
            };
            match read {
                Poll::Pending => break,
                Poll::Ready(Ok(n)) if n > 0 => continue,
                Poll::Ready(_) => return false,
            }
        }
        self.take_idle_messages()
    }

    /// Uses up what an idle backend may say: ParameterStatus and notices. Anything else ends it.
    fn take_idle_messages(&mut self) -> bool {
        while let Ok(Some(header)) = crate::wire::header(&self.input) {
            if self.input.len() < header.len {
                return false;
            }
            let message = self.input.split_to(header.len);
            match header.tag {
                b'S' => self.report(&message[crate::wire::HEADER..]),
                b'N' => {}
                _ => return false,
            }
        }
        self.input.is_empty()
    }

    /// Takes a ParameterStatus body into account; the name and value it states.
    pub fn report(&mut self, body: &[u8]) {
        if let Some((name, value)) = parameter_status(body)
            && self.parameters.get(name) != Some(value)
        {
            Arc::make_mut(&mut self.parameters).insert(name, value);
        }
    }

    /// Whether nothing is on its way in either direction, and it is known what it was left with.
    pub fn is_between_units(&self) -> bool {
        self.input.is_empty() && self.output.is_empty() && self.dirt < Dirt::Unknown
    }

    /// Forgets what DISCARD ALL or DEALLOCATE ALL has taken from the server.
    pub fn forget_statements(&mut self) {
        self.prepared.clear();
        self.own_names.clear();
    }
}

/// Name and value of a ParameterStatus body.
pub fn parameter_status(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (name, rest) = crate::wire::cstr(body)?;
    let (value, _) = crate::wire::cstr(rest)?;
    Some((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_name_is_found_where_the_server_says_it() {
        let name = SharedName(0x1234_5678_9abc_def0_0000_0000_0000_0001);
        assert_eq!(name.server_name(), *b"__hw_123456789abcdef00000000000000001");
        let text = [b"prepared statement \"", &name.server_name()[..], b"\" requires 1"].concat();
        assert_eq!(SharedName::find_in(&text), Some((20, name)));
        assert_eq!(SharedName::find_in(b"__hw_ and nothing"), None);
        assert_eq!(SharedName::find_in(b"at its end __hw_00"), None);
    }
}
