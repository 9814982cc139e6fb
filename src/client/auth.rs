//! A client's login: SCRAM-SHA-256 in PostgreSQL's order, with PostgreSQL's words.
//!
//! Promises: unknown user, wrong password, expired password and a password that is not SCRAM are
//! answered after the same messages with the same error; what the client may not do (log in, use the
//! database) is said only after it has proved who it is; nothing longer than 65,535 bytes is read; all
//! of it is over at the deadline.
//!
//! Deliberately not here: any other method (a client's cleartext or md5 password would show the proxy
//! more than it needs), and the messages after AuthenticationOk.

use std::fmt;
use std::io;
use std::time::Duration;

use ring::rand::{SecureRandom, SystemRandom};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use super::startup::ClientConnection;
use super::verifiers::{Account, DatabaseAccess, VerifierError, Verifiers};
use crate::config::ClientTlsMode;
use crate::scram::{self, LoginKeys, Mechanism, ScramError, ServerBinding, ServerExchange};
use crate::wire::{self, ErrorReport};

/// Bytes of one message before the login is over, its length word included (PG_MAX_AUTH_TOKEN_LENGTH).
const LARGEST: usize = 65_535;
/// How long a last word may take to leave when the deadline has passed.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Why a client did not get in. Where PostgreSQL answers, the answer has been sent and the connection
/// shut down.
#[derive(Debug)]
pub enum AuthFailure {
    /// Refused with this report.
    Refused(ErrorReport),
    /// The password of this user is wrong; why none could have been right, which the client is not told.
    Password(String, Option<&'static str>),
    /// Nobody could say who may log in; the client was told 57P03.
    NoVerifier(VerifierError),
    /// The deadline passed.
    Timeout,
    /// The client closed the connection, as psql does to ask its user for a password.
    Gone,
    /// The connection broke.
    Io(io::Error),
}

impl fmt::Display for AuthFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AuthFailure::Refused(report) => write!(f, "{report}"),
            AuthFailure::Password(user, why) => {
                write!(f, "{}", wrong_password(user))?;
                why.map_or(Ok(()), |why| write!(f, ": {why}"))
            }
            AuthFailure::NoVerifier(error) => write!(f, "{error}"),
            AuthFailure::Timeout => f.write_str("not logged in before the deadline"),
            AuthFailure::Gone => f.write_str("the client left during the login"),
            AuthFailure::Io(error) => write!(f, "connection lost during the login: {error}"),
        }
    }
}

impl AuthFailure {
    /// All that [`label`](Self::label) may answer.
    pub const LABELS: [&'static str; 8] = [
        "password",
        "not_permitted",
        "no_database",
        "no_connect_privilege",
        "protocol",
        "no_verifier",
        "timeout",
        "gone",
    ];

    /// One word for a metric label.
    pub fn label(&self) -> &'static str {
        match self {
            AuthFailure::Password(..) => "password",
            AuthFailure::Refused(report) if report.sqlstate == "28P01" => "password",
            AuthFailure::Refused(report) if report.sqlstate == "28000" => "not_permitted",
            AuthFailure::Refused(report) if report.sqlstate == "3D000" => "no_database",
            AuthFailure::Refused(report) if report.sqlstate == "42501" => "no_connect_privilege",
            AuthFailure::Refused(_) => "protocol",
            AuthFailure::NoVerifier(_) => "no_verifier",
            AuthFailure::Timeout => "timeout",
            AuthFailure::Gone | AuthFailure::Io(_) => "gone",
        }
    }
}

impl std::error::Error for AuthFailure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            AuthFailure::NoVerifier(error) => Some(error),
            AuthFailure::Io(error) => Some(error),
            _ => None,
        }
    }
}

impl From<ScramError> for AuthFailure {
    fn from(error: ScramError) -> AuthFailure {
        let report = ErrorReport::fatal(error.sqlstate(), error.to_string());
        AuthFailure::Refused(match error.detail() {
            Some(detail) => report.detail(detail),
            None => report,
        })
    }
}

/// What a client logs in to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose<'a> {
    /// The nodes.
    Nodes,
    /// The admin console, which is for these users.
    Console {
        /// `auth.admins`.
        admins: &'a [String],
        /// A database that is there, for the question who may log in.
        database: &'a str,
    },
}

/// Runs the login of a client that has been greeted. On success AuthenticationOk has been sent, the
/// client waits for ParameterStatus, and the keys log in to the nodes in its place. On failure the client
/// has been told, and the connection is of no more use.
pub async fn authenticate(
    client: &mut ClientConnection,
    verifiers: &Verifiers,
    purpose: Purpose<'_>,
    deadline: Instant,
) -> Result<LoginKeys, AuthFailure> {
    let outcome = tokio::time::timeout_at(deadline, log_in(client, verifiers, purpose, deadline)).await;
    let failure = match outcome {
        Ok(Ok(keys)) => return Ok(keys),
        Ok(Err(failure)) => failure,
        Err(_) => AuthFailure::Timeout,
    };
    if let Some(report) = last_word(&failure) {
        let mut out = Vec::new();
        report.put(&mut out);
        // The client may be gone or not reading; the failure is the outcome either way.
        let _ = tokio::time::timeout(LAST_WORD, client.stream.say_last(&out)).await;
    }
    Err(failure)
}

/// What the client is told.
fn last_word(failure: &AuthFailure) -> Option<ErrorReport> {
    match failure {
        AuthFailure::Refused(report) => Some(report.clone()),
        AuthFailure::Password(user, _) => Some(wrong_password(user)),
        AuthFailure::NoVerifier(_) => Some(
            ErrorReport::fatal("57P03", "cannot look up who may log in")
                .detail("No node can be asked for password verifiers now."),
        ),
        AuthFailure::Timeout => Some(ErrorReport::fatal("57014", "canceling authentication due to timeout")),
        AuthFailure::Gone | AuthFailure::Io(_) => None,
    }
}

fn wrong_password(user: &str) -> ErrorReport {
    ErrorReport::fatal("28P01", format!("password authentication failed for user \"{user}\""))
}

async fn log_in(
    client: &mut ClientConnection,
    verifiers: &Verifiers,
    purpose: Purpose<'_>,
    deadline: Instant,
) -> Result<LoginKeys, AuthFailure> {
    check_encryption(client)?;
    let (user, database) = (client.startup.user.clone(), client.startup.database.clone());
    let account = match purpose {
        Purpose::Console { admins, database } if admins.contains(&user) => {
            verifiers.look_up_admin(&user, database).await
        }
        Purpose::Console { database, .. } => verifiers.look_up(&user, database).await,
        Purpose::Nodes => verifiers.look_up_in_time(&user, &database, deadline).await,
    };
    let account = account.map_err(AuthFailure::NoVerifier)?;
    let proved = match exchange(client, &account).await {
        Err(AuthFailure::Refused(report)) if report.sqlstate == "28P01" => {
            return Err(AuthFailure::Password(user, account.unusable));
        }
        outcome => outcome?,
    };
    let mut out = Vec::new();
    wire::put(&mut out, b'R', |out| {
        out.extend_from_slice(&12u32.to_be_bytes());
        out.extend_from_slice(&proved.server_final);
    });
    wire::put(&mut out, b'R', |out| out.extend_from_slice(&0u32.to_be_bytes()));
    // As in PostgreSQL: AuthenticationOk means that the client is who it says, and a refusal of what it
    // asked for comes after it.
    send(client, &out).await?;
    // A physical replication connection is to no database.
    let physical = client.startup.replication.as_ref().is_some_and(|value| value != "database");
    if let Purpose::Console { admins, .. } = purpose {
        check_rights(&account, &user, None)?;
        check_admin(admins, &user, &database)?;
        return Ok(account.known_keys.unwrap_or(proved.keys));
    }
    check_rights(&account, &user, (!physical).then_some(database.as_str()))?;
    Ok(account.known_keys.unwrap_or(proved.keys))
}

/// `client_tls.mode: require` is what a `hostssl` line alone is in pg_hba.conf.
fn check_encryption(client: &ClientConnection) -> Result<(), AuthFailure> {
    if client.tls_mode != ClientTlsMode::Require || client.stream.is_tls() {
        return Ok(());
    }
    let host = client.peer.map_or_else(|| "???".to_owned(), |peer| peer.ip().to_canonical().to_string());
    let (user, database) = (&client.startup.user, &client.startup.database);
    Err(AuthFailure::Refused(ErrorReport::fatal(
        "28000",
        format!(
            "no pg_hba.conf entry for host \"{host}\", user \"{user}\", database \"{database}\", no encryption"
        ),
    )))
}

fn check_admin(admins: &[String], user: &String, database: &str) -> Result<(), AuthFailure> {
    if admins.contains(user) {
        return Ok(());
    }
    Err(AuthFailure::Refused(
        ErrorReport::fatal("42501", format!("permission denied for database \"{database}\""))
            .detail("The admin console is for the users of auth.admins."),
    ))
}

fn check_rights(account: &Account, user: &str, database: Option<&str>) -> Result<(), AuthFailure> {
    let refuse = |report| Err(AuthFailure::Refused(report));
    if !account.may_log_in {
        return refuse(ErrorReport::fatal("28000", format!("role \"{user}\" is not permitted to log in")));
    }
    let Some(database) = database else { return Ok(()) };
    match account.database {
        DatabaseAccess::Granted => Ok(()),
        DatabaseAccess::Unknown => {
            refuse(ErrorReport::fatal("3D000", format!("database \"{database}\" does not exist")))
        }
        DatabaseAccess::Denied => refuse(
            ErrorReport::fatal("42501", format!("permission denied for database \"{database}\""))
                .detail("User does not have CONNECT privilege."),
        ),
    }
}

/// The SASL exchange up to the proof.
async fn exchange(client: &mut ClientConnection, account: &Account) -> Result<scram::Proved, AuthFailure> {
    let hash = client.channel_binding.clone();
    let binding = match &hash {
        Some(hash) => ServerBinding::Offered(hash),
        None => ServerBinding::NotOffered,
    };
    let mut out = Vec::new();
    wire::put(&mut out, b'R', |out| {
        out.extend_from_slice(&10u32.to_be_bytes());
        if binding != ServerBinding::NotOffered {
            wire::put_cstr(out, scram::SCRAM_SHA_256_PLUS.as_bytes());
        }
        wire::put_cstr(out, scram::SCRAM_SHA_256.as_bytes());
        out.push(0);
    });
    send(client, &out).await?;

    let initial = receive(client).await?;
    let (mechanism, first) = initial_response(&initial, binding).map_err(AuthFailure::Refused)?;
    let first = match first {
        Some(first) => first.to_vec(),
        // A mechanism without a first message asks for an empty challenge and sends it then.
        None => {
            send(client, &challenge(&[])).await?;
            receive(client).await?
        }
    };
    let mut nonce = [0; scram::NONCE];
    SystemRandom::new()
        .fill(&mut nonce)
        .map_err(|_| AuthFailure::Refused(ErrorReport::fatal("XX000", "could not generate random nonce")))?;
    let (server, answer) =
        ServerExchange::begin(&first, mechanism, binding, account.verifier.clone(), nonce)?;
    send(client, &challenge(&answer)).await?;
    let last = receive(client).await?;
    Ok(server.finish(&last)?)
}

fn challenge(answer: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    wire::put(&mut out, b'R', |out| {
        out.extend_from_slice(&11u32.to_be_bytes());
        out.extend_from_slice(answer);
    });
    out
}

/// Reads SASLInitialResponse: the mechanism, and the first message if it is there.
fn initial_response<'a>(
    body: &'a [u8],
    binding: ServerBinding<'_>,
) -> Result<(Mechanism, Option<&'a [u8]>), ErrorReport> {
    let violation = |words: &str| ErrorReport::fatal("08P01", words);
    let (name, rest) = wire::cstr(body).ok_or_else(|| violation("invalid string in message"))?;
    let mechanism = if name == scram::SCRAM_SHA_256.as_bytes() {
        Mechanism::Plain
    } else if name == scram::SCRAM_SHA_256_PLUS.as_bytes() && binding != ServerBinding::NotOffered {
        Mechanism::Plus
    } else {
        return Err(violation("client selected an invalid SASL authentication mechanism"));
    };
    let (length, rest) =
        rest.split_first_chunk::<4>().ok_or_else(|| violation("insufficient data left in message"))?;
    let first = match i32::from_be_bytes(*length) {
        -1 if rest.is_empty() => None,
        -1 => return Err(violation("invalid message format")),
        length => match usize::try_from(length).map(|length| rest.split_at_checked(length)) {
            Ok(Some((first, []))) => Some(first),
            Ok(Some(_)) => return Err(violation("invalid message format")),
            _ => return Err(violation("insufficient data left in message")),
        },
    };
    Ok((mechanism, first))
}

async fn send(client: &mut ClientConnection, bytes: &[u8]) -> Result<(), AuthFailure> {
    client.stream.write_all(bytes).await.map_err(AuthFailure::Io)?;
    client.stream.flush().await.map_err(AuthFailure::Io)
}

/// Reads one SASL response; its body. Exactly: what the client sends after its login stays unread.
async fn receive(client: &mut ClientConnection) -> Result<Vec<u8>, AuthFailure> {
    let mut head = [0; wire::HEADER];
    match client.stream.read(&mut head[..1]).await {
        Ok(0) => return Err(AuthFailure::Gone),
        Ok(_) => {}
        // TLS that ends without its goodbye is a client that left all the same.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(AuthFailure::Gone),
        Err(error) => return Err(AuthFailure::Io(error)),
    }
    if head[0] != b'p' {
        return Err(AuthFailure::Refused(ErrorReport::fatal(
            "08P01",
            format!("expected SASL response, got message type {}", head[0]),
        )));
    }
    client.stream.read_exact(&mut head[1..]).await.map_err(AuthFailure::Io)?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if !(4..=LARGEST).contains(&length) {
        // PostgreSQL logs the length and then says no more than that the login failed.
        return Err(AuthFailure::Refused(ErrorReport::fatal("28P01", "invalid message length")));
    }
    let mut body = vec![0; length - 4];
    client.stream.read_exact(&mut body).await.map_err(AuthFailure::Io)?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::login as backend;
    use crate::client::startup::{Greeting, greet};
    use crate::config::{ClientTlsConfig, NodeTlsConfig, NodeTlsMode, Secret};
    use crate::net::{ClientTls, NodeTls};
    use proptest::prelude::*;

    #[test]
    fn initial_responses_are_read_as_postgresql_reads_them() {
        let offered = ServerBinding::Offered(b"h");
        let check = |body: &[u8], binding, expected: Result<(Mechanism, Option<&[u8]>), &str>| {
            let found = initial_response(body, binding);
            let found = found.as_ref().map(|&found| found).map_err(|report| report.message.as_str());
            assert_eq!(found, expected, "{body:?}");
        };
        let none = ServerBinding::NotOffered;
        check(b"SCRAM-SHA-256\0\0\0\0\x03n,,", none, Ok((Mechanism::Plain, Some(b"n,,"))));
        check(b"SCRAM-SHA-256-PLUS\0\0\0\0\x01p", offered, Ok((Mechanism::Plus, Some(b"p"))));
        check(b"SCRAM-SHA-256\0\xff\xff\xff\xff", none, Ok((Mechanism::Plain, None)));
        let invalid = "client selected an invalid SASL authentication mechanism";
        check(b"SCRAM-SHA-256-PLUS\0\0\0\0\x01p", none, Err(invalid));
        check(b"PLAIN\0\0\0\0\0", none, Err(invalid));
        check(b"SCRAM-SHA-256", none, Err("invalid string in message"));
        check(b"SCRAM-SHA-256\0\0\0", none, Err("insufficient data left in message"));
        check(b"SCRAM-SHA-256\0\0\0\0\x04n,,", none, Err("insufficient data left in message"));
        check(b"SCRAM-SHA-256\0\xff\xff\xff\xfe", none, Err("insufficient data left in message"));
        check(b"SCRAM-SHA-256\0\0\0\0\x02n,,", none, Err("invalid message format"));
    }

    /// Our own login to a node, played against our own login of a client: both ends of the protocol at
    /// once, over a real socket. Gives what each side made of it.
    async fn play(
        client_mode: ClientTlsMode,
        node_mode: NodeTlsMode,
        user: &str,
        password: &str,
    ) -> (Result<backend::LoggedIn, backend::LoginError>, bool) {
        let folder = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let own =
            rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&key).unwrap();
        let (cert_file, key_file) = (folder.path().join("cert"), folder.path().join("key"));
        std::fs::write(&cert_file, own.pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        let client_tls = ClientTls::new(&ClientTlsConfig {
            mode: client_mode,
            cert: Some(cert_file.clone()),
            key: Some(key_file),
            ca: None,
        })
        .unwrap();
        let verifying = matches!(node_mode, NodeTlsMode::VerifyCa | NodeTlsMode::VerifyFull);
        let ca = verifying.then_some(cert_file);
        let node_tls = NodeTls::new(&NodeTlsConfig { mode: node_mode, ca }).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let deadline = Instant::now() + Duration::from_secs(30);
        let serve = tokio::spawn(async move {
            let verifiers = Verifiers::of_one("app", "geheim");
            let mut bound = false;
            // `prefer` and `allow` may come twice; the task ends with the test.
            while let Ok((tcp, _)) = listener.accept().await {
                let Ok(Greeting::Login(mut client)) = greet(tcp, &client_tls, deadline).await else {
                    continue;
                };
                bound = client.channel_binding.is_some();
                if authenticate(&mut client, &verifiers, Purpose::Nodes, deadline).await.is_ok() {
                    send(&mut client, b"K\0\0\0\x0c\0\0\0\x07abcdZ\0\0\0\x05I").await.unwrap();
                    break;
                }
            }
            bound
        });
        let target = backend::LoginTarget {
            host: "127.0.0.1",
            port,
            tls: &node_tls,
            connect_timeout: Duration::from_secs(30),
            tcp_user_timeout: Duration::ZERO,
        };
        let keys = LoginKeys::password(Secret(password.to_owned()));
        let outcome = backend::log_in(&target, user, "shop", &[], &keys).await;
        let bound = if outcome.is_ok() { serve.await.unwrap() } else { false };
        (outcome, bound)
    }

    #[tokio::test]
    async fn both_ends_log_in_with_and_without_tls() {
        use ClientTlsMode::{Disable, Prefer, Require};
        for (client, node, tls) in [
            (Disable, NodeTlsMode::Disable, false),
            (Disable, NodeTlsMode::Prefer, false),
            (Prefer, NodeTlsMode::Prefer, true),
            (Prefer, NodeTlsMode::Allow, false),
            (Require, NodeTlsMode::Allow, true),
            (Require, NodeTlsMode::Require, true),
            (Require, NodeTlsMode::VerifyCa, true),
            (Require, NodeTlsMode::VerifyFull, true),
        ] {
            let (outcome, bound) = play(client, node, "app", "geheim").await;
            let logged_in = outcome.unwrap();
            assert_eq!((logged_in.stream.is_tls(), bound), (tls, tls), "{client:?} {node:?}");
            assert_eq!((logged_in.pid, logged_in.key.as_slice()), (7, &b"abcd"[..]));
        }
    }

    #[tokio::test]
    async fn whoever_is_not_let_in_is_told_the_same() {
        for (user, password) in [("app", "falsch"), ("nobody", "geheim")] {
            let (outcome, _) = play(ClientTlsMode::Disable, NodeTlsMode::Disable, user, password).await;
            let Err(backend::LoginError::Refused { message, sqlstate, before_authentication }) = outcome
            else {
                panic!("{outcome:?}")
            };
            assert_eq!((&sqlstate, before_authentication), (b"28P01", false));
            let words = format!("password authentication failed for user \"{user}\"");
            assert_eq!(wire::error_fields(&message[wire::HEADER..]).message, words.as_bytes());
        }
        let (outcome, _) = play(ClientTlsMode::Require, NodeTlsMode::Disable, "app", "geheim").await;
        let Err(backend::LoginError::Refused { sqlstate, before_authentication, .. }) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!((&sqlstate, before_authentication), (b"28000", true));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(body in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = initial_response(&body, ServerBinding::NotOffered);
            let mut named = b"SCRAM-SHA-256\0".to_vec();
            named.extend(body);
            let _ = initial_response(&named, ServerBinding::NotOffered);
        }
    }
}
