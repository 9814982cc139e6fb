//! Connections that speak the replication protocol: `pg_basebackup`, `pg_receivewal`, logical
//! subscriptions.
//!
//! Each has a connection to the primary of its own, logged in as the client; from then on bytes are passed
//! on both ways as they come. What they ask (slots, WAL positions, a backup) is about one server: nothing
//! of it is pooled, moved or run again. Promises: at most `replication.max_connections`; at most
//! `HIGH_WATER` bytes wait for either side; it ends with the epoch of its primary, and when the proxy is
//! asked to stop, between two messages wherever that comes in time.
//!
//! Deliberately not here: what the messages mean.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};

use super::exchange::{HIGH_WATER, put_report};
use super::handle::{Ending, SessionHandle};
use super::{Arrival, End, Registered, Shared};
use crate::backend::login::LoggedIn;
use crate::backend::pool::AcquireError;
use crate::backend::{CancelTarget, poll_drain, poll_fill};
use crate::gate::{Posture, Socket};
use crate::net::Stream;
use crate::topology::{Epoch, NodeId};
use crate::wire::{self, ErrorReport, Severity, TransactionStatus};

/// How long last words may take, to either side.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How often a primary that cannot be connected to is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// Serves a client that has asked for the replication protocol, from its login to its end. `mode` is what
/// it asked for: `database`, or a boolean.
pub async fn run(shared: Arc<Shared>, arrival: Arrival, mode: String) {
    let handle = shared.sessions.register(if arrival.minor >= 2 { 32 } else { 4 });
    let _registered = Registered { sessions: shared.sessions.clone(), pid: handle.pid };
    let mut out = BytesMut::new();
    let mut client = arrival.stream;
    let mut parameters = arrival.startup.0;
    parameters.push(("replication".to_owned(), mode));
    let keys = arrival.keys;
    let log_in = |node: NodeId| {
        let (shared, keys) = (shared.clone(), keys.clone());
        let (user, database, parameters) =
            (arrival.user.clone(), arrival.database.clone(), parameters.clone());
        async move { shared.pools.context.log_in_apart(node, &user, &database, &parameters, &keys).await }
    };
    let end = match find_primary(&shared, &handle, log_in).await {
        Ok((node, epoch, logged_in, socket)) => {
            let target = Arc::new(CancelTarget::new(node, logged_in.pid, logged_in.key.clone()));
            put_welcome(&mut out, &logged_in, &handle);
            handle.begin();
            // Whether it is idle, the server knows: it ignores a cancel then. None can have come yet, for
            // nobody has the key.
            let _ = handle.running(&target);
            let mut relay = Relay::new(client, logged_in, socket, out);
            let end = relay.run(&shared, &handle, epoch).await;
            handle.idle();
            return relay.close(end).await;
        }
        Err(Refusal::Ours(end)) => end,
        Err(Refusal::Node(message)) => {
            out.put_slice(&message);
            End::NodeSaidFatal
        }
    };
    if let End::Fatal(report) = &end {
        put_report(&mut out, report);
    }
    say_last(&mut client, &mut out).await;
}

/// Why there is no connection to the primary.
enum Refusal {
    Ours(End),
    /// In the server's own words.
    Node(Arc<[u8]>),
}

/// A connection to the primary, waited for as a statement would be.
async fn find_primary<Fut>(
    shared: &Arc<Shared>,
    handle: &SessionHandle,
    log_in: impl Fn(NodeId) -> Fut,
) -> Result<(NodeId, Epoch, LoggedIn, Socket), Refusal>
where
    Fut: Future<Output = Result<(LoggedIn, Socket), AcquireError>>,
{
    let pause = shared.config.load().failover.pause_timeout;
    let until = Instant::now() + pause;
    loop {
        let (primary, epoch) = {
            let topology = shared.topology.load();
            (topology.primary, topology.epoch)
        };
        if let Some(node) = primary.filter(|_| shared.gate.posture() != Posture::Closed) {
            let outcome = tokio::select! {
                biased;
                () = handle.interrupted() => return Err(Refusal::Ours(End::shutdown())),
                outcome = log_in(node) => outcome,
            };
            match outcome {
                Ok((logged_in, socket)) if shared.topology.load().epoch == epoch => {
                    return Ok((node, epoch, logged_in, socket));
                }
                Ok(_) => continue,
                Err(AcquireError::Refused { message, sqlstate }) if sqlstate != *b"57P03" => {
                    return Err(Refusal::Node(message));
                }
                Err(AcquireError::Unfit(why)) => {
                    let mut report = super::place::unfit(&why);
                    report.severity = Severity::Fatal;
                    return Err(Refusal::Ours(End::fatal(report)));
                }
                Err(AcquireError::Unreachable { failure, .. }) => {
                    shared.reports.report_failure(node, failure)
                }
                Err(AcquireError::Refused { .. } | AcquireError::Timeout | AcquireError::Left) => {}
            }
        }
        if Instant::now() >= until {
            let mut report = super::place::no_primary(pause);
            report.severity = Severity::Fatal;
            return Err(Refusal::Ours(End::fatal(report)));
        }
        tokio::select! {
            biased;
            () = handle.interrupted() => return Err(Refusal::Ours(End::shutdown())),
            _ = tokio::time::timeout_at(until.min(Instant::now() + RETRY).into(), shared.topology.changed()) => {}
        }
    }
}

/// What the server reported, under our own key.
fn put_welcome(out: &mut BytesMut, logged_in: &LoggedIn, handle: &SessionHandle) {
    let mut welcome = Vec::with_capacity(512);
    for (name, value) in &logged_in.parameters {
        wire::put(&mut welcome, b'S', |out| {
            wire::put_cstr(out, name.as_bytes());
            wire::put_cstr(out, value.as_bytes());
        });
    }
    wire::put(&mut welcome, b'K', |out| {
        out.extend_from_slice(&handle.pid.to_be_bytes());
        out.extend_from_slice(&handle.key);
    });
    wire::put(&mut welcome, b'Z', |out| out.push(TransactionStatus::Idle.byte()));
    out.put_slice(&welcome);
}

/// Both connections, and what is on its way between them.
struct Relay {
    client: Stream,
    node: Stream,
    to_client: BytesMut,
    to_node: BytesMut,
    frames: Frames,
    socket: Socket,
}

impl Relay {
    fn new(client: Stream, logged_in: LoggedIn, socket: Socket, mut to_client: BytesMut) -> Relay {
        let mut frames = Frames::default();
        frames.pass(&logged_in.leftover);
        to_client.put_slice(&logged_in.leftover);
        Relay { client, node: logged_in.stream, to_client, to_node: BytesMut::new(), frames, socket }
    }

    async fn run(&mut self, shared: &Shared, handle: &SessionHandle, epoch: Epoch) -> End {
        loop {
            let changed = shared.topology.changed();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let left = self.socket.closed();
            if shared.topology.load().epoch != epoch || self.socket.is_closed() {
                let report =
                    ErrorReport::fatal("57P01", "terminating connection because the primary changed")
                        .hint("Reconnect; slots and positions may differ on the new primary.");
                return End::fatal(report);
            }
            tokio::select! {
                biased;
                () = left => {}
                end = poll_fn(|cx| self.poll(handle, cx)) => return end,
                () = changed => {}
            }
        }
    }

    fn poll(&mut self, handle: &SessionHandle, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            match handle.poll_ending(cx) {
                Ending::Now => return Poll::Ready(End::shutdown()),
                // WAL has no end to wait for.
                Ending::WhenIdle if self.frames.at_boundary() => return Poll::Ready(End::shutdown()),
                Ending::No | Ending::WhenIdle => {}
            }
            let mut moved = false;
            if self.to_client.len() < HIGH_WATER {
                let before = self.to_client.len();
                match poll_fill(&mut self.node, &mut self.to_client, cx) {
                    Poll::Ready(Ok(n)) if n > 0 => {
                        self.frames.pass(&self.to_client[before..]);
                        moved = true;
                    }
                    Poll::Ready(_) => return Poll::Ready(End::NodeSaidFatal),
                    Poll::Pending => {}
                }
            }
            if !self.to_client.is_empty() {
                match poll_drain(&mut self.client, &mut self.to_client, cx) {
                    Poll::Ready(Ok(())) => moved = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(End::ClientGone),
                    Poll::Pending => {}
                }
            }
            if self.to_node.len() < HIGH_WATER {
                match poll_fill(&mut self.client, &mut self.to_node, cx) {
                    Poll::Ready(Ok(n)) if n > 0 => moved = true,
                    Poll::Ready(_) => return Poll::Ready(End::ClientGone),
                    Poll::Pending => {}
                }
            }
            if !self.to_node.is_empty() {
                match poll_drain(&mut self.node, &mut self.to_node, cx) {
                    Poll::Ready(Ok(())) => moved = true,
                    // It may have said why before it closed: the end of what it says decides.
                    Poll::Ready(Err(_)) => self.to_node.clear(),
                    Poll::Pending => {}
                }
            }
            if !moved {
                return Poll::Pending;
            }
        }
    }

    /// Last words to whom they are due. The connection to the node is closed: the server ends what it did
    /// for this client.
    async fn close(mut self, end: End) {
        match end {
            End::ClientGone => {
                // What it has sent counts: its goodbye, or the position it has stored.
                let rest = poll_fn(|cx| poll_drain(&mut self.node, &mut self.to_node, cx));
                let _ = tokio::time::timeout(LAST_WORDS, rest).await;
            }
            End::Fatal(report) => {
                // Whoever waits for it to be closed need not wait for the client.
                drop(self.node);
                drop(self.socket);
                if self.frames.at_boundary() {
                    put_report(&mut self.to_client, &report);
                }
                say_last(&mut self.client, &mut self.to_client).await;
            }
            _ => say_last(&mut self.client, &mut self.to_client).await,
        }
    }
}

/// Writes what is left, and says that nothing follows; as long as the client reads.
async fn say_last(client: &mut Stream, out: &mut BytesMut) {
    let said = async {
        let _ = poll_fn(|cx| poll_drain(client, out, cx)).await;
        let _ = tokio::io::AsyncWriteExt::shutdown(client).await;
    };
    let _ = tokio::time::timeout(LAST_WORDS, said).await;
}

/// Where messages begin and end in bytes that pass.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; wire::HEADER],
    have: usize,
    /// Bytes of the message's body that are still to come.
    rest: usize,
}

impl Frames {
    fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.rest > 0 {
                let n = self.rest.min(bytes.len());
                self.rest -= n;
                bytes = &bytes[n..];
                continue;
            }
            let n = (wire::HEADER - self.have).min(bytes.len());
            self.header[self.have..self.have + n].copy_from_slice(&bytes[..n]);
            self.have += n;
            bytes = &bytes[n..];
            if self.have == wire::HEADER {
                let [_, length @ ..] = self.header;
                self.have = 0;
                self.rest = (u32::from_be_bytes(length) as usize).saturating_sub(4);
            }
        }
    }

    fn at_boundary(&self) -> bool {
        self.have == 0 && self.rest == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn boundaries_are_found_however_the_bytes_are_cut(
            sizes in proptest::collection::vec(0usize..40, 1..8),
            cuts in proptest::collection::vec(1usize..9, 1..80),
        ) {
            let mut bytes = Vec::new();
            let mut ends = vec![0];
            for size in sizes {
                wire::put(&mut bytes, b'd', |out| out.resize(out.len() + size, b'x'));
                ends.push(bytes.len());
            }
            let mut frames = Frames::default();
            let mut at = 0;
            for cut in cuts.iter().cycle() {
                prop_assert_eq!(frames.at_boundary(), ends.contains(&at), "{}", at);
                let to = (at + cut).min(bytes.len());
                if to == at {
                    break;
                }
                frames.pass(&bytes[at..to]);
                at = to;
            }
        }
    }
}
