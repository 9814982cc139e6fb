//! Logging in to a node, in a client's place or as the control user, and cancelling there.
//!
//! Promises: over within `connect_timeout`, whatever the node does; messages and their number are
//! bounded; a node that asks for SCRAM must prove that it has the verifier; a cleartext password is sent
//! over TLS only, but for the control user's own; the node's own ErrorResponse is handed on byte by byte.
//!
//! Encryption is libpq's: `allow` starts plain and tries TLS when the node refuses that; `prefer` the
//! other way round. In both cases only a refusal before any authentication (pg_hba.conf) is a reason to
//! try again, so that a wrong password counts once, and never a failed handshake or certificate.
//!
//! Deliberately not here: pools, retries, and what a refusal means for the node's standing.

use std::fmt;
use std::io;
use std::time::Duration;

use ring::rand::{SecureRandom, SystemRandom};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::config::NodeTlsMode;
use crate::net::{self, NodeTls, Stream};
use crate::scram::{self, Challenge, ClientBinding, LoginKeys, ScramClient, ScramClientError, ServerProof};
use crate::wire;

/// Bytes of one message before ReadyForQuery; PostgreSQL's own are far below, errors included.
const LARGEST: usize = 256 * 1024;
/// Messages before ReadyForQuery: parameters, notices of login triggers.
const MOST: usize = 4096;
/// Bytes of our startup packet after its length word, PostgreSQL's limit.
const STARTUP: usize = 10_000;
/// Bytes of a cancel key a node may give.
const CANCEL_KEY: usize = 256;

/// Where and how to connect.
#[derive(Clone, Copy)]
pub struct LoginTarget<'a> {
    /// Host name or address.
    pub host: &'a str,
    /// TCP port.
    pub port: u16,
    /// TLS as configured.
    pub tls: &'a NodeTls,
    /// For all of it: connection, handshake and login.
    pub connect_timeout: Duration,
    /// Unacknowledged data closes the connection after this; zero: the system's default.
    pub tcp_user_timeout: Duration,
}

impl fmt::Display for LoginTarget<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// A connection that has reached its first ReadyForQuery.
#[derive(Debug)]
pub struct LoggedIn {
    /// The connection.
    pub stream: Stream,
    /// ParameterStatus messages in the order they came.
    pub parameters: Vec<(String, String)>,
    /// The backend's process id.
    pub pid: i32,
    /// Its cancel key.
    pub key: Vec<u8>,
    /// Bytes that came after ReadyForQuery; usually none.
    pub leftover: Vec<u8>,
}

/// Why a login failed. The first four say nothing about whether the node is well.
#[derive(Debug)]
pub enum LoginError {
    /// The node answered with an error.
    Refused {
        /// The whole ErrorResponse, header included, as it came.
        message: Vec<u8>,
        /// Its SQLSTATE.
        sqlstate: [u8; 5],
        /// Whether it came before the node asked for any authentication: what pg_hba.conf, the limits
        /// on connections and a server that starts or stops have in common.
        before_authentication: bool,
    },
    /// The node's verifier is not the one that our keys belong to: see [`ScramClientError::OtherVerifier`].
    /// As a refusal with 28P01.
    StaleKeys {
        /// host:port
        node: String,
    },
    /// The node asks for a method that our keys cannot serve.
    Unsupported {
        /// host:port
        node: String,
        /// The method's name.
        method: String,
    },
    /// User, database and parameters do not fit into a startup packet, or hold a zero byte.
    UnsendableStartup,
    /// The node failed to prove its identity, or said something that is not SCRAM.
    Scram {
        /// host:port
        node: String,
        /// How.
        cause: ScramClientError,
    },
    /// Not connected and logged in within `connect_timeout`.
    Timeout {
        /// host:port
        node: String,
    },
    /// No connection, or it broke.
    Io {
        /// host:port
        node: String,
        /// How.
        cause: io::Error,
    },
    /// TLS is required and not offered, or the handshake failed.
    Tls {
        /// host:port
        node: String,
        /// How.
        cause: io::Error,
    },
    /// The node broke the protocol.
    Protocol {
        /// host:port
        node: String,
        /// How.
        what: &'static str,
    },
}

impl fmt::Display for LoginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LoginError::Refused { message, sqlstate, .. } => {
                let fields = wire::error_fields(message.get(wire::HEADER..).unwrap_or_default());
                let state = String::from_utf8_lossy(sqlstate);
                write!(f, "the node refused the login: {state}: {}", String::from_utf8_lossy(fields.message))
            }
            LoginError::StaleKeys { node } => {
                write!(f, "node {node} has another password verifier than the one the client logged in with")
            }
            LoginError::Unsupported { node, method } => {
                write!(f, "node {node} asks for authentication method {method}, which the proxy cannot serve")
            }
            LoginError::UnsendableStartup => {
                f.write_str("startup parameters do not fit into a startup packet")
            }
            LoginError::Scram { node, cause } => write!(f, "login to node {node} failed: {cause}"),
            LoginError::Timeout { node } => write!(f, "login to node {node} timed out"),
            LoginError::Io { node, cause } => write!(f, "connection to node {node} failed: {cause}"),
            LoginError::Tls { node, cause } => write!(f, "TLS to node {node} failed: {cause}"),
            LoginError::Protocol { node, what } => write!(f, "node {node} broke the protocol: {what}"),
        }
    }
}

impl std::error::Error for LoginError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            LoginError::Io { cause, .. } | LoginError::Tls { cause, .. } => Some(cause),
            LoginError::Scram { cause, .. } => Some(cause),
            _ => None,
        }
    }
}

/// Who logs in.
#[derive(Clone, Copy)]
pub enum Who<'a> {
    /// A client, with the keys that it has logged in to us with.
    Client(&'a LoginKeys),
    /// The control user, whose password the operator has written down for these nodes: where one asks for it in
    /// clear text, it gets it, as from libpq. `None`: there is none.
    Control(Option<&'a LoginKeys>),
}

/// How one attempt encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encryption {
    Never,
    IfOffered,
    Always,
}

/// Connects to `target` and logs in as `user` to `database` in protocol 3.0. `parameters` go into the
/// startup packet as they are.
pub async fn log_in(
    target: &LoginTarget<'_>,
    user: &str,
    database: &str,
    parameters: &[(String, String)],
    keys: &LoginKeys,
) -> Result<LoggedIn, LoginError> {
    log_in_as(target, Who::Client(keys), user, database, parameters).await
}

/// The same, whoever it is.
pub async fn log_in_as(
    target: &LoginTarget<'_>,
    who: Who<'_>,
    user: &str,
    database: &str,
    parameters: &[(String, String)],
) -> Result<LoggedIn, LoginError> {
    let packet = startup_packet(user, database, parameters).ok_or(LoginError::UnsendableStartup)?;
    let login = Login { target, user, packet: &packet, who };
    match tokio::time::timeout(target.connect_timeout, login.run()).await {
        Ok(outcome) => outcome,
        Err(_) => Err(LoginError::Timeout { node: target.to_string() }),
    }
}

/// Asks `target` to cancel what backend `pid` is doing. Returns when the node has closed the
/// connection, which it does after the signal was sent; or after `connect_timeout` with `TimedOut`.
pub async fn cancel(target: &LoginTarget<'_>, pid: i32, key: &[u8]) -> io::Result<()> {
    let attempt = async {
        let encryption = match target.tls.mode() {
            NodeTlsMode::Disable | NodeTlsMode::Allow => Encryption::Never,
            NodeTlsMode::Prefer => Encryption::IfOffered,
            _ => Encryption::Always,
        };
        let mut stream = connect(target, encryption).await.map_err(io::Error::other)?;
        let mut packet = Vec::with_capacity(12 + key.len());
        let length = u32::try_from(12 + key.len()).map_err(io::Error::other)?;
        packet.extend_from_slice(&length.to_be_bytes());
        packet.extend_from_slice(&(1234u32 << 16 | 5678).to_be_bytes());
        packet.extend_from_slice(&pid.to_be_bytes());
        packet.extend_from_slice(key);
        stream.write_all(&packet).await?;
        stream.flush().await?;
        // The node answers nothing. Whatever ends the connection ends the wait: a reset, or TLS that
        // stops without its goodbye, comes after the signal just as a clean end does.
        let mut sink = [0; 64];
        while matches!(stream.read(&mut sink).await, Ok(1..)) {}
        Ok(())
    };
    tokio::time::timeout(target.connect_timeout, attempt)
        .await
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "cancel request timed out")))
}

/// `None`: too long, or a zero byte in a text.
fn startup_packet(user: &str, database: &str, parameters: &[(String, String)]) -> Option<Vec<u8>> {
    let mut packet = vec![0; 4];
    packet.extend_from_slice(&(3u32 << 16).to_be_bytes());
    let own = [("user", user), ("database", database)];
    for (name, value) in own.into_iter().chain(parameters.iter().map(|(a, b)| (a.as_str(), b.as_str()))) {
        if name.is_empty() || name.contains('\0') || value.contains('\0') {
            return None;
        }
        wire::put_cstr(&mut packet, name.as_bytes());
        wire::put_cstr(&mut packet, value.as_bytes());
    }
    packet.push(0);
    if packet.len() - 4 > STARTUP {
        return None;
    }
    let length = u32::try_from(packet.len()).ok()?;
    packet[..4].copy_from_slice(&length.to_be_bytes());
    Some(packet)
}

/// Connects, and encrypts as asked.
async fn connect(target: &LoginTarget<'_>, encryption: Encryption) -> Result<Stream, LoginError> {
    let node = || target.to_string();
    let lost = |cause| LoginError::Io { node: node(), cause };
    let mut tcp = net::dial(target.host, target.port, target.connect_timeout, target.tcp_user_timeout)
        .await
        .map_err(lost)?;
    if encryption == Encryption::Never {
        return Ok(Stream::Plain(tcp));
    }
    let mut request = 8u32.to_be_bytes().to_vec();
    request.extend_from_slice(&(1234u32 << 16 | 5679).to_be_bytes());
    tcp.write_all(&request).await.map_err(lost)?;
    // One byte and no more: what else came with it would be clear text inside TLS (CVE-2021-23222).
    match (tcp.read_u8().await.map_err(lost)?, encryption) {
        (b'S', _) => target
            .tls
            .connect(target.host, tcp)
            .await
            .map_err(|cause| LoginError::Tls { node: node(), cause }),
        (b'N', Encryption::IfOffered) => Ok(Stream::Plain(tcp)),
        (b'N', _) => {
            let cause = io::Error::new(io::ErrorKind::Unsupported, "the node does not offer TLS");
            Err(LoginError::Tls { node: node(), cause })
        }
        // An error from before the node knew about TLS would not be authenticated: it is not shown.
        _ => Err(LoginError::Protocol { node: node(), what: "neither S nor N after SSLRequest" }),
    }
}

/// One login, with what all its steps need.
struct Login<'a> {
    target: &'a LoginTarget<'a>,
    user: &'a str,
    packet: &'a [u8],
    who: Who<'a>,
}

impl Login<'_> {
    async fn run(&self) -> Result<LoggedIn, LoginError> {
        let (first, second) = match self.target.tls.mode() {
            NodeTlsMode::Disable => (Encryption::Never, None),
            NodeTlsMode::Allow => (Encryption::Never, Some(Encryption::Always)),
            NodeTlsMode::Prefer => (Encryption::IfOffered, Some(Encryption::Never)),
            NodeTlsMode::Require | NodeTlsMode::VerifyCa | NodeTlsMode::VerifyFull => {
                (Encryption::Always, None)
            }
        };
        let (outcome, was_tls) = self.attempt(first).await;
        let refused = matches!(
            &outcome,
            Err(LoginError::Refused { before_authentication: true, sqlstate, .. }) if sqlstate == b"28000"
        );
        match second {
            // A plain refusal under `prefer` means that the node offers no TLS: nothing else to try.
            Some(second) if refused && was_tls != (second == Encryption::Always) => {
                match self.attempt(second).await.0 {
                    // The first answer explains more than "TLS is not offered".
                    Err(LoginError::Tls { .. }) => outcome,
                    other => other,
                }
            }
            _ => outcome,
        }
    }

    /// One attempt, and whether it was encrypted.
    async fn attempt(&self, encryption: Encryption) -> (Result<LoggedIn, LoginError>, bool) {
        let stream = match connect(self.target, encryption).await {
            Ok(stream) => stream,
            Err(error) => return (Err(error), false),
        };
        let was_tls = stream.is_tls();
        (self.converse(Conversation { stream, buffer: Vec::new(), messages: 0 }).await, was_tls)
    }

    async fn converse(&self, mut node: Conversation) -> Result<LoggedIn, LoginError> {
        self.send(&mut node, self.packet).await?;
        let mut authenticated = false;
        let mut asked = false;
        let mut parameters = Vec::new();
        let (mut pid, mut key) = (0, Vec::new());
        loop {
            let message = self.receive(&mut node).await?;
            let body = &message[wire::HEADER..];
            match message[0] {
                b'E' => return Err(refused(message, !asked)),
                b'R' if !authenticated => {
                    authenticated =
                        self.authenticate(&mut node, body).await.map_err(|error| match error {
                            // Within an exchange, a method has been asked for.
                            LoginError::Refused { message, sqlstate, .. } => {
                                LoginError::Refused { message, sqlstate, before_authentication: false }
                            }
                            other => other,
                        })?;
                    asked = true;
                }
                b'N' => {}
                b'S' if authenticated => parameters.push(self.parameter(body)?),
                b'K' if authenticated => (pid, key) = self.backend_key(body)?,
                b'Z' if authenticated => {
                    let Conversation { stream, buffer, .. } = node;
                    return Ok(LoggedIn { stream, parameters, pid, key, leftover: buffer });
                }
                _ => return Err(self.protocol("unexpected message during login")),
            }
        }
    }

    /// Serves one authentication request; `true` when the node is satisfied.
    async fn authenticate(&self, node: &mut Conversation, body: &[u8]) -> Result<bool, LoginError> {
        let Some((method, rest)) = body.split_first_chunk::<4>() else {
            return Err(self.protocol("authentication request without a method"));
        };
        match u32::from_be_bytes(*method) {
            0 => Ok(true),
            3 => self.cleartext(node).await.map(|()| false),
            5 => self.md5(node, rest).await.map(|()| false),
            10 => self.scram(node, rest).await.map(|()| false),
            other => Err(self.unsupported(match other {
                2 => "kerberos".to_owned(),
                6 => "scm".to_owned(),
                7 | 8 => "gss".to_owned(),
                9 => "sspi".to_owned(),
                11 | 12 => return Err(self.protocol("SASL message outside of an exchange")),
                number => format!("number {number}"),
            })),
        }
    }

    async fn cleartext(&self, node: &mut Conversation) -> Result<(), LoginError> {
        let anywhere = matches!(self.who, Who::Control(_));
        match self.keys("password")?.known_password() {
            Some(password) if anywhere || node.stream.is_tls() => {
                self.send_password(node, password.as_bytes()).await
            }
            Some(_) => {
                Err(self.unsupported("password (cleartext, and the connection is not encrypted)".to_owned()))
            }
            None => Err(self.unsupported("password".to_owned())),
        }
    }

    async fn md5(&self, node: &mut Conversation, salt: &[u8]) -> Result<(), LoginError> {
        let Some(password) = self.keys("md5")?.known_password() else {
            return Err(self.unsupported("md5".to_owned()));
        };
        if salt.len() != 4 {
            return Err(self.protocol("md5 salt of a wrong length"));
        }
        let answer = pgwire::api::auth::md5pass::hash_md5_password(self.user, password, salt);
        self.send_password(node, answer.as_bytes()).await
    }

    async fn send_password(&self, node: &mut Conversation, password: &[u8]) -> Result<(), LoginError> {
        if password.contains(&0) {
            return Err(LoginError::UnsendableStartup);
        }
        let mut out = Vec::new();
        wire::put(&mut out, b'p', |out| wire::put_cstr(out, password));
        self.send(node, &out).await
    }

    async fn scram(&self, node: &mut Conversation, mechanisms: &[u8]) -> Result<(), LoginError> {
        let client = ScramClient::new(self.binding(node, mechanisms)?, random()?);
        let mut out = Vec::new();
        let first = client.first();
        wire::put(&mut out, b'p', |out| {
            wire::put_cstr(out, client.mechanism().as_bytes());
            let length = u32::try_from(first.len()).expect("a message of ours is far below 4 GiB");
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&first);
        });
        self.send(node, &out).await?;
        let challenge = self.sasl(node, 11).await?;
        let challenge = Challenge::parse(&challenge).map_err(|cause| self.scram_error(cause))?;
        let (last, proof) = self.prove(client, challenge).await?;
        out.clear();
        wire::put(&mut out, b'p', |out| out.extend_from_slice(&last));
        self.send(node, &out).await?;
        let signature = self.sasl(node, 12).await?;
        proof.check(&signature).map_err(|cause| self.scram_error(cause))
    }

    /// What to bind to, given the node's list of mechanisms.
    fn binding(&self, node: &Conversation, mechanisms: &[u8]) -> Result<ClientBinding, LoginError> {
        let offers = |name: &str| mechanisms.split(|&byte| byte == 0).any(|offer| offer == name.as_bytes());
        let hash = node.stream.node_certificate_hash();
        match hash {
            Some(hash) if offers(scram::SCRAM_SHA_256_PLUS) => Ok(ClientBinding::Bound(hash)),
            _ if !offers(scram::SCRAM_SHA_256) => {
                let list =
                    String::from_utf8_lossy(mechanisms.get(..64.min(mechanisms.len())).unwrap_or_default());
                Err(self.unsupported(format!("SASL ({})", list.replace('\0', " ").trim())))
            }
            Some(_) => Ok(ClientBinding::NotOffered),
            None => Ok(ClientBinding::Impossible),
        }
    }

    async fn prove(
        &self,
        client: ScramClient,
        challenge: Challenge,
    ) -> Result<(Vec<u8>, ServerProof), LoginError> {
        let keys = self.keys("SCRAM")?;
        let outcome = if keys.must_derive(&challenge) {
            let keys = keys.clone();
            // PBKDF2 takes about a millisecond: too long for a thread that serves other sessions.
            tokio::task::spawn_blocking(move || client.prove(&challenge, &keys))
                .await
                .map_err(|_| self.lost(io::Error::other("the key derivation was cut off")))?
        } else {
            client.prove(&challenge, keys)
        };
        outcome.map_err(|cause| self.scram_error(cause))
    }

    /// Waits for AuthenticationSASLContinue (11) or AuthenticationSASLFinal (12).
    async fn sasl(&self, node: &mut Conversation, wanted: u32) -> Result<Vec<u8>, LoginError> {
        loop {
            let message = self.receive(node).await?;
            match message[0] {
                b'E' => return Err(refused(message, false)),
                b'N' => {}
                b'R' if message[wire::HEADER..].starts_with(&wanted.to_be_bytes()) => {
                    return Ok(message[wire::HEADER + 4..].to_vec());
                }
                // AuthenticationOk in place of the signature would be a node that cannot prove itself.
                _ => return Err(self.protocol("unexpected message within a SCRAM exchange")),
            }
        }
    }

    fn parameter(&self, body: &[u8]) -> Result<(String, String), LoginError> {
        let pair = wire::cstr(body).and_then(|(name, rest)| {
            let (value, rest) = wire::cstr(rest)?;
            rest.is_empty().then(|| {
                (String::from_utf8_lossy(name).into_owned(), String::from_utf8_lossy(value).into_owned())
            })
        });
        pair.ok_or_else(|| self.protocol("malformed ParameterStatus"))
    }

    fn backend_key(&self, body: &[u8]) -> Result<(i32, Vec<u8>), LoginError> {
        match body.split_first_chunk::<4>() {
            Some((pid, key)) if (4..=CANCEL_KEY).contains(&key.len()) => {
                Ok((i32::from_be_bytes(*pid), key.to_vec()))
            }
            _ => Err(self.protocol("malformed BackendKeyData")),
        }
    }

    /// What the node's question for it is answered by.
    fn keys(&self, method: &str) -> Result<&LoginKeys, LoginError> {
        match self.who {
            Who::Client(keys) | Who::Control(Some(keys)) => Ok(keys),
            Who::Control(None) => Err(self.unsupported(format!("{method} (and no password is configured)"))),
        }
    }

    async fn send(&self, node: &mut Conversation, bytes: &[u8]) -> Result<(), LoginError> {
        node.stream.write_all(bytes).await.map_err(|cause| self.lost(cause))?;
        node.stream.flush().await.map_err(|cause| self.lost(cause))
    }

    /// The next message, header included.
    async fn receive(&self, node: &mut Conversation) -> Result<Vec<u8>, LoginError> {
        node.messages += 1;
        if node.messages > MOST {
            return Err(self.protocol("too many messages during login"));
        }
        loop {
            let header = wire::header(&node.buffer).map_err(|_| self.protocol("invalid message length"))?;
            if let Some(header) = header {
                if header.len > LARGEST {
                    return Err(self.protocol("message too long during login"));
                }
                if node.buffer.len() >= header.len {
                    let rest = node.buffer.split_off(header.len);
                    return Ok(std::mem::replace(&mut node.buffer, rest));
                }
            }
            node.buffer.reserve(4096);
            if node.stream.read_buf(&mut node.buffer).await.map_err(|cause| self.lost(cause))? == 0 {
                return Err(self.lost(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    fn lost(&self, cause: io::Error) -> LoginError {
        LoginError::Io { node: self.target.to_string(), cause }
    }

    fn protocol(&self, what: &'static str) -> LoginError {
        LoginError::Protocol { node: self.target.to_string(), what }
    }

    fn unsupported(&self, method: String) -> LoginError {
        LoginError::Unsupported { node: self.target.to_string(), method }
    }

    fn scram_error(&self, cause: ScramClientError) -> LoginError {
        let node = self.target.to_string();
        match cause {
            ScramClientError::OtherVerifier => LoginError::StaleKeys { node },
            cause => LoginError::Scram { node, cause },
        }
    }
}

/// A connection with what has been read of it and not looked at yet.
struct Conversation {
    stream: Stream,
    buffer: Vec<u8>,
    messages: usize,
}

fn refused(message: Vec<u8>, before_authentication: bool) -> LoginError {
    let fields = wire::error_fields(&message[wire::HEADER..]);
    let sqlstate = <[u8; 5]>::try_from(fields.sqlstate).unwrap_or(*b"XX000");
    LoginError::Refused { message, sqlstate, before_authentication }
}

fn random() -> Result<[u8; scram::NONCE], LoginError> {
    let mut bytes = [0; scram::NONCE];
    SystemRandom::new().fill(&mut bytes).map_err(|_| LoginError::Io {
        node: "(none)".to_owned(),
        cause: io::Error::other("no random bytes from the system"),
    })?;
    Ok(bytes)
}
