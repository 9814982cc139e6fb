//! The yardstick: a byte relay that does nothing but what no proxy can leave out, that is, one
//! receive, one send and a share of a wake-up for each direction. One thread, one epoll, one buffer.
//!
//! It does not read the protocol, pool or split: a client has a connection to the primary of its own.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

/// The token of the listener; a connection's two sockets have `2 * slot + 1` and `2 * slot + 2`.
const LISTENER: Token = Token(0);

/// What one receive takes at most. The same as PgBouncer's default is 4 KiB, Highwater's more; large
/// results gain from it, single statements do not notice.
const BUFFER: usize = 64 * 1024;

/// A socket and what could not be written to it yet.
struct Side {
    socket: TcpStream,
    pending: Vec<u8>,
    /// It may have more to read than was taken: reading stopped for the other side's sake.
    unread: bool,
}

struct Pair([Side; 2]);

/// Relays 127.0.0.1:`listen` to 127.0.0.1:`primary`, for ever.
pub fn run(listen: u16, primary: u16) -> io::Result<()> {
    let mut poll = Poll::new()?;
    let mut listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, listen)))?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut events = Events::with_capacity(256);
    let mut pairs: Vec<Option<Pair>> = Vec::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            if event.token() == LISTENER {
                accept(&listener, &poll, primary, &mut pairs)?;
                continue;
            }
            let (slot, side) = ((event.token().0 - 1) / 2, (event.token().0 - 1) % 2);
            let Some(Some(pair)) = pairs.get_mut(slot) else { continue };
            // After the peer's end nothing wakes us again, so then everything is read to the end.
            let to_the_end = event.is_read_closed() || event.is_error();
            let mut step = || {
                if event.is_writable() && !pair.0[side].pending.is_empty() {
                    flush(&mut pair.0[side])?;
                    if pair.0[side].pending.is_empty() && pair.0[1 - side].unread {
                        copy(pair, 1 - side, &mut buffer, true)?;
                    }
                }
                if event.is_readable() || to_the_end {
                    copy(pair, side, &mut buffer, to_the_end)?;
                }
                Ok::<(), io::Error>(())
            };
            if step().is_err() {
                // Dropping the sockets takes them out of the epoll and ends the other side too.
                pairs[slot] = None;
            }
        }
    }
}

fn accept(
    listener: &TcpListener,
    poll: &Poll,
    primary: u16,
    pairs: &mut Vec<Option<Pair>>,
) -> io::Result<()> {
    loop {
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        // Blocking, as on 127.0.0.1 it is over at once.
        let Ok(server) = std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, primary)) else { continue };
        server.set_nonblocking(true)?;
        let mut sockets = [client, TcpStream::from_std(server)];
        let slot = pairs.iter().position(Option::is_none).unwrap_or(pairs.len());
        for (side, socket) in sockets.iter_mut().enumerate() {
            socket.set_nodelay(true)?;
            let interest = Interest::READABLE | Interest::WRITABLE;
            poll.registry().register(socket, Token(2 * slot + side + 1), interest)?;
        }
        let pair = Pair(sockets.map(|socket| Side { socket, pending: Vec::new(), unread: false }));
        match pairs.get_mut(slot) {
            Some(free) => *free = Some(pair),
            None => pairs.push(Some(pair)),
        }
    }
}

/// Copies what `from` has to the other side. A short receive has emptied the socket (epoll(7),
/// "edge-triggered"), which spares the receive that says so.
fn copy(pair: &mut Pair, from: usize, buffer: &mut [u8], to_the_end: bool) -> io::Result<()> {
    loop {
        if !pair.0[1 - from].pending.is_empty() {
            pair.0[from].unread = true;
            return Ok(());
        }
        pair.0[from].unread = false;
        let count = match pair.0[from].socket.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let to = &mut pair.0[1 - from];
        let written = match to.socket.write(&buffer[..count]) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        if written < count {
            to.pending.extend_from_slice(&buffer[written..count]);
            // A short write is not a refused one: only a refusal makes epoll say when there is room.
            flush(to)?;
        }
        if count < buffer.len() && !to_the_end {
            return Ok(());
        }
    }
}

fn flush(side: &mut Side) -> io::Result<()> {
    while !side.pending.is_empty() {
        match side.socket.write(&side.pending) {
            Ok(written) => drop(side.pending.drain(..written)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
