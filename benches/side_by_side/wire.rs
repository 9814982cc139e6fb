//! A client that costs next to nothing, so that what is measured is the proxy: logs in by SCRAM,
//! sends a simple query, counts the bytes of the answer, copies in. Blocking, one connection.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use highwater::demo::cluster::Login;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};

/// No answer for so long fails the measurement instead of hanging it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A logged-in connection.
pub struct Wire {
    socket: TcpStream,
    buffer: Vec<u8>,
}

impl Wire {
    /// Connects to the database `app` on 127.0.0.1:`port`.
    pub fn connect(port: u16, login: &Login) -> io::Result<Wire> {
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let mut wire = Wire { socket, buffer: Vec::new() };
        let mut startup = vec![0, 3, 0, 0];
        for word in ["user", &login.user, "database", "app", ""] {
            startup.extend_from_slice(word.as_bytes());
            startup.push(0);
        }
        let mut frame = length(startup.len())?.to_vec();
        frame.append(&mut startup);
        wire.socket.write_all(&frame)?;
        wire.log_in(login)?;
        Ok(wire)
    }

    fn log_in(&mut self, login: &Login) -> io::Result<()> {
        let mut scram = ScramSha256::new(login.password.as_bytes(), ChannelBinding::unsupported());
        loop {
            let (tag, body) = self.message()?;
            match (tag, body.get(..4)) {
                (b'Z', _) => return Ok(()),
                (b'R', Some([0, 0, 0, 10])) => {
                    let mut answer = SCRAM_SHA_256.as_bytes().to_vec();
                    answer.push(0);
                    answer
                        .extend_from_slice(&u32::try_from(scram.message().len()).unwrap_or(0).to_be_bytes());
                    answer.extend_from_slice(scram.message());
                    self.send(b'p', &answer)?;
                }
                (b'R', Some([0, 0, 0, 11])) => {
                    scram.update(&body[4..])?;
                    let answer = scram.message().to_vec();
                    self.send(b'p', &answer)?;
                }
                (b'R', Some([0, 0, 0, 12])) => scram.finish(&body[4..])?,
                _ => {}
            }
        }
    }

    /// Runs it and returns how many bytes the answer had.
    pub fn query(&mut self, sql: &str) -> io::Result<u64> {
        self.send(b'Q', &[sql.as_bytes(), b"\0"].concat())?;
        self.drain()
    }

    /// Prepares a statement under a name.
    pub fn prepare(&mut self, name: &str, sql: &str) -> io::Result<()> {
        self.send(b'P', &[name.as_bytes(), b"\0", sql.as_bytes(), b"\0\0\0"].concat())?;
        self.send(b'S', b"")?;
        self.read_to_ready()
    }

    /// Runs a prepared statement without parameters, in one write.
    pub fn run_prepared(&mut self, name: &str) -> io::Result<()> {
        let mut unit = Vec::with_capacity(64);
        put(&mut unit, b'B', &[b"\0", name.as_bytes(), &[0; 7]].concat())?;
        put(&mut unit, b'E', &[0; 5])?;
        put(&mut unit, b'S', b"")?;
        self.socket.write_all(&unit)?;
        self.read_to_ready()
    }

    fn read_to_ready(&mut self) -> io::Result<()> {
        while self.message()?.0 != b'Z' {}
        Ok(())
    }

    /// `COPY ... FROM STDIN` of `megabytes` MiB in chunks of 32 KiB made of `line`; returns the bytes sent.
    pub fn copy_in(&mut self, sql: &str, line: &str, megabytes: u64) -> io::Result<u64> {
        self.send(b'Q', &[sql.as_bytes(), b"\0"].concat())?;
        while self.message()?.0 != b'G' {}
        let chunk = line.repeat((32 << 10) / line.len().max(1)).into_bytes();
        let mut sent = 0;
        while sent < megabytes << 20 {
            self.send(b'd', &chunk)?;
            sent += chunk.len() as u64;
        }
        self.send(b'c', b"")?;
        self.drain()?;
        Ok(sent)
    }

    /// Reads to ReadyForQuery. Whole buffers at a time: frames are stepped over, not copied.
    fn drain(&mut self) -> io::Result<u64> {
        // Most answers fit the first; a large result is read in large pieces.
        let mut chunk = vec![0; 4 << 10];
        let mut rest = std::mem::take(&mut self.buffer);
        let mut total = 0;
        loop {
            let mut at = 0;
            while let Some((tag, end)) = frame(&rest, at) {
                match tag {
                    b'E' => return Err(said(&rest[at + 5..end])),
                    b'Z' => return Ok(total + (end as u64)),
                    _ => at = end,
                }
            }
            total += at as u64;
            rest.drain(..at);
            let count = self.socket.read(&mut chunk)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            rest.extend_from_slice(&chunk[..count]);
            if count == chunk.len() && count < 256 << 10 {
                chunk = vec![0; 256 << 10];
            }
        }
    }

    fn message(&mut self) -> io::Result<(u8, Vec<u8>)> {
        loop {
            if let Some((tag, end)) = frame(&self.buffer, 0) {
                let body = self.buffer[5..end].to_vec();
                self.buffer.drain(..end);
                return if tag == b'E' { Err(said(&body)) } else { Ok((tag, body)) };
            }
            let mut chunk = [0; 4096];
            match self.socket.read(&mut chunk)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.buffer.extend_from_slice(&chunk[..count]),
            }
        }
    }

    fn send(&mut self, tag: u8, body: &[u8]) -> io::Result<()> {
        let mut message = Vec::with_capacity(body.len() + 5);
        put(&mut message, tag, body)?;
        self.socket.write_all(&message)
    }
}

/// Appends a message.
fn put(out: &mut Vec<u8>, tag: u8, body: &[u8]) -> io::Result<()> {
    out.push(tag);
    out.extend_from_slice(&length(body.len())?);
    out.extend_from_slice(body);
    Ok(())
}

/// The length word of a body.
fn length(body: usize) -> io::Result<[u8; 4]> {
    u32::try_from(body + 4).map(u32::to_be_bytes).map_err(io::Error::other)
}

/// The tag and the end of the whole frame at `at`, if all of it is there.
fn frame(bytes: &[u8], at: usize) -> Option<(u8, usize)> {
    let head: [u8; 5] = bytes.get(at..at + 5)?.try_into().ok()?;
    let [tag, length @ ..] = head;
    let end = at + 1 + usize::try_from(u32::from_be_bytes(length)).ok()?;
    (end >= at + 5 && end <= bytes.len()).then_some((tag, end))
}

/// An ErrorResponse as an error: its fields, readable enough.
fn said(body: &[u8]) -> io::Error {
    io::Error::other(String::from_utf8_lossy(body).replace('\0', " "))
}
