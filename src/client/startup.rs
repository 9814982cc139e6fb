//! From accept to the startup packet: encryption requests, direct TLS, cancel requests, protocol
//! versions and startup parameters, as PostgreSQL's `ProcessStartupPacket` treats them.
//!
//! Promises: never reads past the packet that is being read, so nothing that was sent in clear text can
//! be taken for something that was encrypted (CVE-2021-23214); each encryption request is answered
//! once; a packet is at most 10,004 bytes; garbage ends the connection without an answer where
//! PostgreSQL gives none; all of it is over at the deadline.
//!
//! Deliberately not here: authentication, and what a parameter means. Names are text in UTF-8: other
//! bytes are refused (22021), because they could not be told apart in a log or a pool.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::sync::Arc;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::config::ClientTlsMode;
use crate::net::{self, ClientTls, Stream};
use crate::wire::{self, ErrorReport};

/// Bytes of a startup packet after its length word, at least and at most; PostgreSQL's numbers.
const PACKET: std::ops::RangeInclusive<usize> = 4..=10_000;
/// Bytes of a cancel key: four in protocol 3.0, up to 256 in 3.2.
const CANCEL_KEY: std::ops::RangeInclusive<usize> = 4..=256;
/// Bytes of a name in PostgreSQL (NAMEDATALEN - 1); longer ones are cut.
const NAME: usize = 63;
/// First byte of a TLS handshake, on a connection that skips SSLRequest.
const TLS_HANDSHAKE: u8 = 0x16;

const CANCEL_REQUEST: u32 = 1234 << 16 | 5678;
const SSL_REQUEST: u32 = 1234 << 16 | 5679;
const GSSENC_REQUEST: u32 = 1234 << 16 | 5680;
const MAJOR: u32 = 3;
/// The newest minor version spoken here.
const NEWEST_MINOR: u16 = 2;

/// What the first packets of a connection turned out to be.
#[derive(Debug)]
pub enum Greeting {
    /// A client that wants to log in.
    Login(Box<ClientConnection>),
    /// A CancelRequest; no answer is due, the connection is to be closed.
    Cancel {
        /// As in BackendKeyData.
        pid: i32,
        /// 4 to 256 bytes.
        key: Vec<u8>,
        /// To be closed once the request has been carried out: a client takes the end of it for the word
        /// that no later statement of its session can be hit.
        connection: Stream,
    },
    /// The client left, or said nothing that deserves an answer (a port scan, a health check).
    Gone,
}

/// A client before its login. Reads so far were exact: no byte of it waits in a buffer of ours.
#[derive(Debug)]
pub struct ClientConnection {
    /// The connection, encrypted or not.
    pub stream: Stream,
    /// What its startup packet said.
    pub startup: Startup,
    /// The client's address.
    pub peer: Option<SocketAddr>,
    /// Whether TLS is asked of clients.
    pub tls_mode: ClientTlsMode,
    /// The hash that SCRAM-SHA-256-PLUS binds to; `None`: no TLS, or a certificate without one.
    pub channel_binding: Option<Arc<[u8]>>,
}

/// A startup packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Startup {
    /// Protocol 3.minor as agreed on: 0, 1 or 2. Cancel keys are longer than four bytes from 2 on.
    pub minor: u16,
    /// The role; never empty, at most 63 bytes.
    pub user: String,
    /// The database; the role's name when none was given, at most 63 bytes.
    pub database: String,
    /// The other parameters in the order they came (`options` and `application_name` among them).
    pub parameters: Vec<(String, String)>,
    /// The value of `replication` when it asks for the replication protocol (`true`, `database`...).
    pub replication: Option<String>,
}

/// Why a connection ended before its login. Where PostgreSQL answers, the answer has been sent.
#[derive(Debug)]
pub enum GreetError {
    /// The deadline passed; PostgreSQL says nothing here either.
    Timeout,
    /// The connection broke in the middle of a packet.
    Io(io::Error),
    /// The TLS handshake failed.
    Tls(io::Error),
    /// Not the protocol, in a way that gets no answer; the text says how.
    Nonsense(&'static str),
    /// Refused with this report.
    Refused(ErrorReport),
}

impl fmt::Display for GreetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GreetError::Timeout => f.write_str("no startup packet before the deadline"),
            GreetError::Io(error) => write!(f, "connection lost before the startup packet: {error}"),
            GreetError::Tls(error) => write!(f, "could not accept TLS connection: {error}"),
            GreetError::Nonsense(how) => f.write_str(how),
            GreetError::Refused(report) => write!(f, "{report}"),
        }
    }
}

impl std::error::Error for GreetError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            GreetError::Io(error) | GreetError::Tls(error) => Some(error),
            _ => None,
        }
    }
}

/// Reads a new connection up to its startup packet, or to whatever ends it before.
pub async fn greet(tcp: TcpStream, tls: &ClientTls, deadline: Instant) -> Result<Greeting, GreetError> {
    match tokio::time::timeout_at(deadline, greet_unbounded(tcp, tls)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(GreetError::Timeout),
    }
}

async fn greet_unbounded(tcp: TcpStream, tls: &ClientTls) -> Result<Greeting, GreetError> {
    let peer = tcp.peer_addr().ok();
    let mut first = [0];
    // Looked at, not taken: a TLS handshake needs its first byte.
    match tcp.peek(&mut first).await {
        Ok(1) => {}
        Ok(_) | Err(_) => return Ok(Greeting::Gone),
    }
    let mut stream = if first[0] == TLS_HANDSHAKE { direct_tls(tcp, tls).await? } else { Stream::Plain(tcp) };
    let (mut ssl_asked, mut gss_asked) = (stream.is_tls(), stream.is_tls());
    // Three rounds at most: one for each kind of encryption, one for the packet itself.
    loop {
        let Some((code, body)) = packet(&mut stream).await? else { return Ok(Greeting::Gone) };
        match code {
            SSL_REQUEST if !ssl_asked && body.is_empty() => {
                ssl_asked = true;
                stream = answer_ssl(stream, tls).await?;
                gss_asked |= stream.is_tls();
            }
            GSSENC_REQUEST if !gss_asked && body.is_empty() => {
                gss_asked = true;
                let early = spoke_ahead(&stream, "GSSAPI encryption");
                stream.write_all(b"N").await.map_err(GreetError::Io)?;
                if let Some(report) = early {
                    return Err(refuse(&mut stream, report).await);
                }
            }
            CANCEL_REQUEST => {
                let (pid, key) = cancel(&body)?;
                return Ok(Greeting::Cancel { pid, key, connection: stream });
            }
            _ => return login(stream, peer, tls, code, &body).await,
        }
    }
}

/// A connection whose first byte is TLS (PostgreSQL 17's `sslnegotiation=direct`).
async fn direct_tls(tcp: TcpStream, tls: &ClientTls) -> Result<Stream, GreetError> {
    let Some(acceptor) = tls.acceptor() else {
        return Err(GreetError::Nonsense("direct TLS connection, but TLS is not offered"));
    };
    let tls = acceptor.accept(tcp).await.map_err(GreetError::Tls)?;
    // Without the name, the handshake could be one that somebody meant for another service here.
    if tls.get_ref().1.alpn_protocol() != Some(net::ALPN) {
        return Err(GreetError::Nonsense("direct TLS connection without ALPN protocol \"postgresql\""));
    }
    Ok(Stream::TlsServer(Box::new(tls)))
}

/// Reads one length-prefixed packet: its code, and what follows. `None`: closed before its first byte.
async fn packet(stream: &mut Stream) -> Result<Option<(u32, Vec<u8>)>, GreetError> {
    let mut head = [0; 8];
    if stream.read(&mut head[..1]).await.map_err(GreetError::Io)? == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut head[1..4]).await.map_err(GreetError::Io)?;
    let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
    // Checked before the next read: a wrong protocol (HTTP, say) must not make us wait for its body.
    if length < 4 || !PACKET.contains(&(length - 4)) {
        return Err(GreetError::Nonsense("invalid length of startup packet"));
    }
    stream.read_exact(&mut head[4..]).await.map_err(GreetError::Io)?;
    let mut body = vec![0; length - 8];
    stream.read_exact(&mut body).await.map_err(GreetError::Io)?;
    Ok(Some((u32::from_be_bytes([head[4], head[5], head[6], head[7]]), body)))
}

async fn answer_ssl(mut stream: Stream, tls: &ClientTls) -> Result<Stream, GreetError> {
    let early = spoke_ahead(&stream, "SSL");
    let Some(acceptor) = tls.acceptor() else {
        stream.write_all(b"N").await.map_err(GreetError::Io)?;
        return match early {
            Some(report) => Err(refuse(&mut stream, report).await),
            None => Ok(stream),
        };
    };
    if let Some(report) = early {
        return Err(refuse(&mut stream, report).await);
    }
    stream.write_all(b"S").await.map_err(GreetError::Io)?;
    match stream {
        Stream::Plain(tcp) => {
            let tls = acceptor.accept(tcp).await.map_err(GreetError::Tls)?;
            Ok(Stream::TlsServer(Box::new(tls)))
        }
        encrypted => Ok(encrypted),
    }
}

/// Nobody may speak before an encryption request is answered. Reads are exact, so bytes sent ahead could only break
/// the handshake; but a client that sends them is told so, as PostgreSQL does, and whatever the answer is.
fn spoke_ahead(stream: &Stream, request: &str) -> Option<ErrorReport> {
    let mut ahead = [MaybeUninit::uninit()];
    let spoke = matches!(SockRef::from(stream.tcp()).peek(&mut ahead), Ok(1..));
    spoke.then(|| {
        ErrorReport::fatal("08P01", format!("received unencrypted data after {request} request")).detail(
            "This could be either a client-software bug or evidence of an attempted man-in-the-middle attack.",
        )
    })
}

/// The process id and key of a CancelRequest.
fn cancel(body: &[u8]) -> Result<(i32, Vec<u8>), GreetError> {
    match body.split_first_chunk::<4>() {
        Some((pid, key)) if CANCEL_KEY.contains(&key.len()) => Ok((i32::from_be_bytes(*pid), key.to_vec())),
        _ => Err(GreetError::Nonsense("invalid length of cancel request")),
    }
}

async fn login(
    mut stream: Stream,
    peer: Option<SocketAddr>,
    tls: &ClientTls,
    code: u32,
    body: &[u8],
) -> Result<Greeting, GreetError> {
    let (startup, negotiation) = match parse(code, body) {
        Ok(parsed) => parsed,
        Err(report) => return Err(refuse(&mut stream, report).await),
    };
    if !negotiation.is_empty() {
        stream.write_all(&negotiation).await.map_err(GreetError::Io)?;
        stream.flush().await.map_err(GreetError::Io)?;
    }
    let channel_binding = if stream.is_tls() { tls.certificate_hash().cloned() } else { None };
    let tls_mode = tls.mode();
    Ok(Greeting::Login(Box::new(ClientConnection { stream, startup, peer, tls_mode, channel_binding })))
}

/// Tells the client, as far as it still listens.
async fn refuse(stream: &mut Stream, report: ErrorReport) -> GreetError {
    let mut out = Vec::new();
    report.put(&mut out);
    // The client may be gone already; the report is the outcome either way.
    let _ = stream.say_last(&out).await;
    GreetError::Refused(report)
}

/// Reads a startup packet: `code` is its version word, `body` what follows. Gives, besides, the
/// NegotiateProtocolVersion message to send first (empty: none is needed).
pub fn parse(code: u32, body: &[u8]) -> Result<(Startup, Vec<u8>), ErrorReport> {
    let (major, minor) = (code >> 16, (code & 0xffff) as u16);
    if major != MAJOR {
        return Err(ErrorReport::fatal(
            "0A000",
            format!("unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.{NEWEST_MINOR}"),
        ));
    }
    let agreed = minor.min(NEWEST_MINOR);
    let mut fields = Fields::default();
    for (name, value) in pairs(body)? {
        fields.take(name, value)?;
    }
    if fields.user.is_empty() {
        return Err(ErrorReport::fatal("28000", "no PostgreSQL user name specified in startup packet"));
    }
    let negotiation = if minor > NEWEST_MINOR || !fields.unknown_options.is_empty() {
        negotiate(agreed, &fields.unknown_options)
    } else {
        Vec::new()
    };
    let database = if fields.database.is_empty() { fields.user.clone() } else { fields.database };
    let startup = Startup {
        minor: agreed,
        user: cut(fields.user),
        database: cut(database),
        parameters: fields.parameters,
        replication: fields.replication,
    };
    Ok((startup, negotiation))
}

/// Name and value.
type Pair<'a> = (&'a [u8], &'a [u8]);

/// Splits `name\0value\0...\0` the way the server does: it must end with exactly one empty name.
fn pairs(mut body: &[u8]) -> Result<Vec<Pair<'_>>, ErrorReport> {
    let wrong =
        || ErrorReport::fatal("08P01", "invalid startup packet layout: expected terminator as last byte");
    let mut found = Vec::new();
    while body.first() != Some(&0) {
        let (name, rest) = wire::cstr(body).ok_or_else(wrong)?;
        let (value, rest) = wire::cstr(rest).ok_or_else(wrong)?;
        found.push((name, value));
        body = rest;
    }
    if body.len() == 1 { Ok(found) } else { Err(wrong()) }
}

/// What the pairs said so far.
#[derive(Default)]
struct Fields<'a> {
    user: String,
    database: String,
    parameters: Vec<(String, String)>,
    replication: Option<String>,
    unknown_options: Vec<&'a [u8]>,
}

impl<'a> Fields<'a> {
    /// A later pair overrides an earlier one of the same name for those that are looked at here.
    fn take(&mut self, name: &'a [u8], value: &[u8]) -> Result<(), ErrorReport> {
        match name {
            b"user" => self.user = text(value)?,
            b"database" => self.database = text(value)?,
            b"replication" => self.replication = replication(text(value)?)?,
            _ if name.starts_with(b"_pq_.") => self.unknown_options.push(name),
            _ => self.parameters.push((text(name)?, text(value)?)),
        }
        Ok(())
    }
}

fn text(bytes: &[u8]) -> Result<String, ErrorReport> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(error) => {
            let byte = bytes.get(error.valid_up_to()).copied().unwrap_or_default();
            Err(ErrorReport::fatal(
                "22021",
                format!("invalid byte sequence for encoding \"UTF8\": 0x{byte:02x}"),
            )
            .detail("Names and values in the startup packet must be UTF-8."))
        }
    }
}

/// `replication` is a boolean or `database`; `None` when it is false.
fn replication(value: String) -> Result<Option<String>, ErrorReport> {
    if value == "database" {
        return Ok(Some(value));
    }
    match boolean(&value) {
        Some(true) => Ok(Some(value)),
        Some(false) => Ok(None),
        None => Err(ErrorReport::fatal(
            "22023",
            format!("invalid value for parameter \"replication\": \"{value}\""),
        )
        .hint("Valid values are: \"false\", 0, \"true\", 1, \"database\".")),
    }
}

/// PostgreSQL's reading of a boolean: a prefix of true, false, yes, no; on, off with two letters; 1, 0.
fn boolean(value: &str) -> Option<bool> {
    let value = value.to_ascii_lowercase();
    let prefix = |word: &str, least: usize| value.len() >= least && word.starts_with(&value);
    if prefix("true", 1) || prefix("yes", 1) || value == "on" || value == "1" {
        Some(true)
    } else if prefix("false", 1) || prefix("no", 1) || prefix("off", 2) || value == "0" {
        Some(false)
    } else {
        None
    }
}

/// Cuts a name to what PostgreSQL keeps of it, at a character's end: the role or database it was
/// created as was cut there too.
fn cut(mut name: String) -> String {
    if name.len() > NAME {
        let mut end = NAME;
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        name.truncate(end);
    }
    name
}

/// NegotiateProtocolVersion: what we speak, and the options we do not know. The server writes the whole
/// version word, not just the minor one, and libpq reads it so.
fn negotiate(minor: u16, unknown_options: &[&[u8]]) -> Vec<u8> {
    let mut out = Vec::new();
    wire::put(&mut out, b'v', |out| {
        out.extend_from_slice(&(MAJOR << 16 | u32::from(minor)).to_be_bytes());
        let count = u32::try_from(unknown_options.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&count.to_be_bytes());
        for name in unknown_options {
            wire::put_cstr(out, name);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ClientTlsConfig;
    use proptest::prelude::*;
    use std::time::Duration;
    use tokio::net::TcpListener;

    const V3: u32 = 3 << 16;

    fn body(pairs: &[(&str, &str)]) -> Vec<u8> {
        let mut out = Vec::new();
        for (name, value) in pairs {
            wire::put_cstr(&mut out, name.as_bytes());
            wire::put_cstr(&mut out, value.as_bytes());
        }
        out.push(0);
        out
    }

    fn packet_of(code: u32, body: &[u8]) -> Vec<u8> {
        let mut out = (8 + body.len() as u32).to_be_bytes().to_vec();
        out.extend_from_slice(&code.to_be_bytes());
        out.extend_from_slice(body);
        out
    }

    #[test]
    fn a_startup_packet_is_read() {
        let pairs = [("user", "app"), ("application_name", "x"), ("database", "shop"), ("options", "-c a=b")];
        let (startup, negotiation) = parse(V3, &body(&pairs)).unwrap();
        assert_eq!((startup.user.as_str(), startup.database.as_str(), startup.minor), ("app", "shop", 0));
        assert_eq!(
            startup.parameters,
            [("application_name", "x"), ("options", "-c a=b")].map(|(a, b)| (a.to_owned(), b.to_owned()))
        );
        assert_eq!(startup.replication, None);
        assert!(negotiation.is_empty());
        let (startup, _) = parse(V3, &body(&[("user", "app"), ("database", "")])).unwrap();
        assert_eq!(startup.database, "app");
        let long = "ä".repeat(40);
        assert_eq!(parse(V3, &body(&[("user", &long)])).unwrap().0.user, "ä".repeat(31));
    }

    #[test]
    fn refusals_have_postgresqls_words() {
        let check = |code: u32, body: &[u8], sqlstate: &str, words: &str| {
            let report = parse(code, body).unwrap_err();
            assert_eq!((report.sqlstate, report.message.as_str()), (sqlstate, words));
        };
        let layout = "invalid startup packet layout: expected terminator as last byte";
        check(2 << 16, &[], "0A000", "unsupported frontend protocol 2.0: server supports 3.0 to 3.2");
        check(
            SSL_REQUEST,
            &[],
            "0A000",
            "unsupported frontend protocol 1234.5679: server supports 3.0 to 3.2",
        );
        check(V3, b"", "08P01", layout);
        check(V3, b"user\0app\0", "08P01", layout);
        check(V3, b"user\0app\0\0\0", "08P01", layout);
        check(V3, b"user\0app", "08P01", layout);
        check(V3, b"user\0", "08P01", layout);
        check(V3, b"\0", "28000", "no PostgreSQL user name specified in startup packet");
        check(V3, b"user\0\xff\0\0", "22021", "invalid byte sequence for encoding \"UTF8\": 0xff");
        check(
            V3,
            &body(&[("user", "a"), ("replication", "maybe")]),
            "22023",
            "invalid value for parameter \"replication\": \"maybe\"",
        );
    }

    #[test]
    fn replication_is_a_boolean_or_a_database() {
        for (value, expected) in
            [("true", true), ("on", true), ("1", true), ("database", true), ("off", false), ("f", false)]
        {
            let (startup, _) = parse(V3, &body(&[("user", "a"), ("replication", value)])).unwrap();
            assert_eq!(startup.replication.is_some(), expected, "{value}");
        }
    }

    #[test]
    fn versions_and_options_are_negotiated_as_postgresql_18_does() {
        let check = |code: u32, pairs: &[(&str, &str)], minor: u16, expected: Option<&[u8]>| {
            let (startup, negotiation) = parse(code, &body(pairs)).unwrap();
            assert_eq!(startup.minor, minor);
            assert_eq!(negotiation, expected.unwrap_or_default());
        };
        let user = ("user", "a");
        check(V3 | 1, &[user], 1, None);
        check(V3 | 2, &[user], 2, None);
        check(V3 | 9999, &[user], 2, Some(b"v\0\0\0\x0c\0\x03\0\x02\0\0\0\0"));
        check(V3, &[user, ("_pq_.x", "1")], 0, Some(b"v\0\0\0\x13\0\x03\0\0\0\0\0\x01_pq_.x\0"));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(code in any::<u32>(), body in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = parse(code, &body);
            let _ = parse(V3, &body);
            let _ = cancel(&body);
        }

        #[test]
        fn what_was_written_is_read(pairs in proptest::collection::vec(("[a-z]{1,8}\\.[a-z]{1,4}", "[^\0]{0,12}"), 0..6)) {
            let mut all = vec![("user".to_owned(), "app".to_owned())];
            all.extend(pairs.iter().cloned());
            let refs: Vec<_> = all.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
            let (startup, _) = parse(V3, &body(&refs)).unwrap();
            prop_assert_eq!(startup.parameters, pairs);
        }
    }

    fn no_tls() -> ClientTls {
        let config = ClientTlsConfig { mode: ClientTlsMode::Disable, cert: None, key: None, ca: None };
        ClientTls::new(&config).unwrap()
    }

    /// Sends `chunks` to a greeter, each but the first after an answer of one byte; gives the outcome
    /// and what was answered in all.
    async fn play(chunks: &[&[u8]]) -> (Result<Greeting, GreetError>, Vec<u8>) {
        let tls = no_tls();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let talk = async {
            let mut answers = Vec::new();
            for (index, chunk) in chunks.iter().enumerate() {
                if index > 0 {
                    let mut answer = [0];
                    client.read_exact(&mut answer).await.unwrap();
                    answers.push(answer[0]);
                }
                client.write_all(chunk).await.unwrap();
            }
            client.shutdown().await.unwrap();
            let mut rest = Vec::new();
            let _ = client.read_to_end(&mut rest).await;
            answers.extend(rest);
            answers
        };
        let greeting = async {
            let outcome = greet(server, &tls, Instant::now() + Duration::from_secs(20)).await;
            // The connection must close for the client to see the end.
            match outcome {
                Ok(Greeting::Login(mut login)) => {
                    let _ = login.stream.shutdown().await;
                    Ok(Greeting::Login(login))
                }
                other => other,
            }
        };
        tokio::join!(greeting, talk)
    }

    #[tokio::test]
    async fn encryption_requests_are_answered_once_each() {
        let login = packet_of(V3, &body(&[("user", "app")]));
        let (ssl, gss) = (packet_of(SSL_REQUEST, &[]), packet_of(GSSENC_REQUEST, &[]));
        let (outcome, answers) = play(&[&gss, &ssl, &login]).await;
        assert!(matches!(outcome, Ok(Greeting::Login(_))), "{outcome:?}");
        assert_eq!(answers, b"NN");
        let (outcome, answers) = play(&[&ssl, &ssl]).await;
        assert!(matches!(outcome, Err(GreetError::Refused(_))), "{outcome:?}");
        assert!(answers.starts_with(b"NE"));
    }

    #[tokio::test]
    async fn cancel_requests_carry_keys_of_both_lengths() {
        for length in [4, 32, 256] {
            let mut body = 77i32.to_be_bytes().to_vec();
            body.extend(vec![5; length]);
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (server, _) = listener.accept().await.unwrap();
            client.write_all(&packet_of(CANCEL_REQUEST, &body)).await.unwrap();
            let deadline = Instant::now() + std::time::Duration::from_secs(10);
            let outcome = greet(server, &no_tls(), deadline).await;
            let Ok(Greeting::Cancel { pid: 77, key, connection }) = outcome else { panic!("{outcome:?}") };
            assert_eq!(key, vec![5; length]);
            // The client learns of the end only when we let go of its connection.
            assert!(client.try_read(&mut [0]).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock));
            drop(connection);
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
        }
    }

    #[tokio::test]
    async fn nonsense_ends_without_an_answer() {
        let (outcome, _) = play(&[b""]).await;
        assert!(matches!(outcome, Ok(Greeting::Gone)), "{outcome:?}");
        for bytes in [
            &b"GET / HTTP/1.0\r\n\r\n"[..],
            &[0, 0, 0, 7, 0, 3, 0],
            &[0, 0, 0x27, 0x15, 0, 3, 0, 0],
            b"\x16\x03\x01",
        ] {
            let (outcome, answers) = play(&[bytes]).await;
            assert!(matches!(outcome, Err(GreetError::Nonsense(_))), "{outcome:?}");
            assert_eq!(answers, b"");
        }
        let (outcome, _) = play(&[&[0, 0, 0, 20, 0, 3]]).await;
        assert!(matches!(outcome, Err(GreetError::Io(_))), "{outcome:?}");
    }
}
