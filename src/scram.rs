//! SCRAM-SHA-256 and SCRAM-SHA-256-PLUS (RFC 5802, RFC 7677) on both sides of the proxy. Pure: nonces
//! and secrets come in as arguments, messages go out as bytes.
//!
//! Promises: the checks, their order and their words are PostgreSQL's; a comparison of secrets takes the
//! same time whatever the difference is; no message, however malformed, panics; nothing here prints a key.
//!
//! Two facts carry the proxy. A server that knows only a verifier learns the ClientKey from a proof
//! that holds (`ClientProof XOR HMAC(StoredKey, AuthMessage)`), and the ClientKey is all that a client
//! needs to log in to any server that has the same verifier. So no password is stored.
//!
//! Why not pgwire's `ScramServerAuth`: it does not give the ClientKey away, compares keys with `==`,
//! and does not hold the chosen mechanism against the channel-binding flag (SCRAM-SHA-256-PLUS with an
//! `n` header passes as if it had been bound).
//!
//! Deliberately not here: sockets, the choice of verifiers, and where the costly PBKDF2 runs. Only
//! `salted_password` and what is documented to call it is slow (about 1 ms per 4096 iterations).

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use lru::LruCache;
use ring::{digest, hmac, pbkdf2};

use crate::config::Secret;

/// The mechanism without channel binding.
pub const SCRAM_SHA_256: &str = "SCRAM-SHA-256";
/// The mechanism with channel binding.
pub const SCRAM_SHA_256_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// PostgreSQL's iteration count for new verifiers, and so that of mock ones.
pub const DEFAULT_ITERATIONS: u32 = 4096;
/// Iterations above this are refused on the way to a node: a thread would be busy for seconds.
pub const MAX_ITERATIONS: u32 = 10_000_000;

/// Bytes of a SHA-256 key.
pub const KEY: usize = 32;
/// Random bytes of a nonce, PostgreSQL's number.
pub const NONCE: usize = 18;
/// Bytes of a salt of ours, PostgreSQL's number.
const SALT: usize = 16;
/// Salts for which one password keeps derived keys: one per node is the usual case.
const DERIVED: usize = 16;

/// One SHA-256 output.
type Key = [u8; KEY];

/// HMAC-SHA-256.
fn mac(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    for part in parts {
        context.update(part);
    }
    let mut out = [0; KEY];
    out.copy_from_slice(context.sign().as_ref());
    out
}

/// SHA-256.
fn hash(bytes: &[u8]) -> Key {
    let mut out = [0; KEY];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

fn xor(a: &Key, b: &Key) -> Key {
    std::array::from_fn(|i| a[i] ^ b[i])
}

/// Whether two keys are equal, in a time that does not tell where they differ.
fn same(a: &Key, b: &Key) -> bool {
    let difference = a.iter().zip(b).fold(0, |sum, (x, y)| sum | (x ^ y));
    std::hint::black_box(difference) == 0
}

/// The password as PostgreSQL hashes it: SASLprep, or the bytes as they are when it does not apply
/// (prohibited characters, or nothing left).
fn prepared(password: &str) -> std::borrow::Cow<'_, str> {
    match stringprep::saslprep(password) {
        Ok(prepared) if !prepared.is_empty() => prepared,
        _ => password.into(),
    }
}

/// PBKDF2-HMAC-SHA-256 of the prepared password. Slow on purpose; not for I/O threads.
fn salted_password(password: &str, salt: &[u8], iterations: u32) -> Key {
    let rounds = std::num::NonZeroU32::new(iterations).unwrap_or(std::num::NonZeroU32::MIN);
    let mut out = [0; KEY];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, salt, prepared(password).as_bytes(), &mut out);
    out
}

/// What a server keeps of a password: `pg_authid.rolpassword`.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    salt: Vec<u8>,
    iterations: u32,
    stored_key: Key,
    server_key: Key,
    /// A verifier that nobody can satisfy, whatever the proof: an exchange that must only look real.
    mock: bool,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("iterations", &self.iterations).finish_non_exhaustive()
    }
}

impl Verifier {
    /// Reads `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`; `None` for anything else (an md5
    /// hash, a garbled text).
    pub fn parse(text: &str) -> Option<Verifier> {
        let (iterations, rest) = text.strip_prefix("SCRAM-SHA-256$")?.split_once(':')?;
        let (salt, rest) = rest.split_once('$')?;
        let (stored_key, server_key) = rest.split_once(':')?;
        let iterations = iterations.parse().ok().filter(|&count| count > 0)?;
        let key = |text: &str| BASE64.decode(text).ok().and_then(|bytes| Key::try_from(bytes).ok());
        Some(Verifier {
            salt: BASE64.decode(salt).ok()?,
            iterations,
            stored_key: key(stored_key)?,
            server_key: key(server_key)?,
            mock: false,
        })
    }

    /// The verifier for a user who cannot log in: an exchange with it looks like any other and always
    /// fails. The salt depends on `user` and `secret` only, so that asking twice shows nothing.
    pub fn mock(user: &str, secret: &[u8; 32]) -> Verifier {
        Verifier {
            salt: salt_of(user, secret),
            iterations: DEFAULT_ITERATIONS,
            stored_key: mac(secret, &[b"stored", user.as_bytes()]),
            server_key: mac(secret, &[b"server", user.as_bytes()]),
            mock: true,
        }
    }

    /// The verifier of a known password, with the salt that [`mock`](Self::mock) would show for this
    /// user: whether a user is listed cannot be told by the salt. Runs PBKDF2.
    pub fn from_password(password: &str, user: &str, secret: &[u8; 32]) -> Verifier {
        Verifier::derive(password, salt_of(user, secret), DEFAULT_ITERATIONS)
    }

    /// The verifier of a known password under a given salt and iteration count. Runs PBKDF2.
    pub fn derive(password: &str, salt: Vec<u8>, iterations: u32) -> Verifier {
        let salted = salted_password(password, &salt, iterations);
        Verifier {
            salt,
            iterations,
            stored_key: hash(&mac(&salted, &[b"Client Key"])),
            server_key: mac(&salted, &[b"Server Key"]),
            mock: false,
        }
    }

    /// Whether no proof satisfies it.
    pub fn is_mock(&self) -> bool {
        self.mock
    }
}

fn salt_of(user: &str, secret: &[u8; 32]) -> Vec<u8> {
    mac(secret, &[b"salt", user.as_bytes()])[..SALT].to_vec()
}

/// What logs in to any node that has the same verifier (salt, iterations and keys) as the one the
/// client proved itself against.
#[derive(Clone)]
pub struct ClientKeys {
    salt: Vec<u8>,
    iterations: u32,
    client_key: Key,
    server_key: Key,
}

/// By (salt, iterations): (ClientKey, ServerKey).
type Derived = LruCache<(Vec<u8>, u32), (Key, Key)>;

/// A password, and the keys derived from it for the salts met so far (at most 16).
pub struct PasswordKeys {
    password: Secret,
    derived: Mutex<Derived>,
}

/// What the proxy logs in to the nodes with in a client's place. Cheap to clone, prints no secret.
#[derive(Clone)]
pub enum LoginKeys {
    /// The ClientKey of an exchange, and the ServerKey by which the node proves itself in return.
    Keys(Arc<ClientKeys>),
    /// A password from the configuration.
    Password(Arc<PasswordKeys>),
}

impl fmt::Debug for LoginKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LoginKeys::Keys(_) => "LoginKeys::Keys(<secret>)",
            LoginKeys::Password(_) => "LoginKeys::Password(<secret>)",
        })
    }
}

impl PartialEq for LoginKeys {
    /// Whether both open the same doors.
    fn eq(&self, other: &LoginKeys) -> bool {
        match (self, other) {
            (LoginKeys::Keys(a), LoginKeys::Keys(b)) => {
                a.salt == b.salt && a.iterations == b.iterations && same(&a.client_key, &b.client_key)
            }
            (LoginKeys::Password(a), LoginKeys::Password(b)) => {
                same(&hash(a.password.0.as_bytes()), &hash(b.password.0.as_bytes()))
            }
            _ => false,
        }
    }
}

impl Eq for LoginKeys {}

impl LoginKeys {
    /// Keys from a known password.
    pub fn password(password: Secret) -> LoginKeys {
        let bound = std::num::NonZeroUsize::new(DERIVED).unwrap_or(std::num::NonZeroUsize::MIN);
        LoginKeys::Password(Arc::new(PasswordKeys { password, derived: Mutex::new(LruCache::new(bound)) }))
    }

    /// The password, when it is known: what md5 and cleartext methods of a node need.
    pub fn known_password(&self) -> Option<&str> {
        match self {
            LoginKeys::Keys(_) => None,
            LoginKeys::Password(known) => Some(&known.password.0),
        }
    }

    /// Whether [`ScramClient::prove`] would have to run PBKDF2 for this message of a node.
    pub fn must_derive(&self, challenge: &Challenge) -> bool {
        match self {
            LoginKeys::Keys(_) => false,
            LoginKeys::Password(known) => !known.derived().contains(&challenge.derivation()),
        }
    }

    /// (ClientKey, ServerKey) for a node's salt and iterations.
    fn for_challenge(&self, challenge: &Challenge) -> Result<(Key, Key), ScramClientError> {
        match self {
            LoginKeys::Keys(keys) => {
                if keys.salt != challenge.salt || keys.iterations != challenge.iterations {
                    return Err(ScramClientError::OtherVerifier);
                }
                Ok((keys.client_key, keys.server_key))
            }
            LoginKeys::Password(known) => {
                if let Some(found) = known.derived().get(&challenge.derivation()) {
                    return Ok(*found);
                }
                // The lock is not held meanwhile: two sessions may derive the same keys once each.
                let salted = salted_password(&known.password.0, &challenge.salt, challenge.iterations);
                let keys = (mac(&salted, &[b"Client Key"]), mac(&salted, &[b"Server Key"]));
                known.derived().put(challenge.derivation(), keys);
                Ok(keys)
            }
        }
    }
}

impl PasswordKeys {
    fn derived(&self) -> std::sync::MutexGuard<'_, Derived> {
        // A cache is whole at every moment, so a panic elsewhere under the lock does no harm.
        self.derived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the server side may bind a login to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerBinding<'a> {
    /// SCRAM-SHA-256-PLUS was not offered.
    NotOffered,
    /// It was, with this hash of the server's certificate (`tls-server-end-point`).
    Offered(&'a [u8]),
}

/// The mechanism a client chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// SCRAM-SHA-256
    Plain,
    /// SCRAM-SHA-256-PLUS
    Plus,
}

/// Why an exchange with a client failed. `Display` is PostgreSQL's message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScramError {
    /// The client broke the protocol; the detail is a sentence.
    Malformed(String),
    /// Another violation that PostgreSQL has a message of its own for: SQLSTATE, message, detail.
    Violation(&'static str, String, Option<&'static str>),
    /// The proof does not hold, or nothing could have satisfied the verifier.
    WrongProof,
}

impl ScramError {
    /// The five characters a client is shown.
    pub fn sqlstate(&self) -> &'static str {
        match self {
            ScramError::Malformed(_) => "08P01",
            ScramError::Violation(sqlstate, ..) => sqlstate,
            ScramError::WrongProof => "28P01",
        }
    }

    /// The detail a client is shown.
    pub fn detail(&self) -> Option<&str> {
        match self {
            ScramError::Malformed(detail) => Some(detail),
            ScramError::Violation(_, _, detail) => *detail,
            ScramError::WrongProof => None,
        }
    }
}

impl fmt::Display for ScramError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ScramError::Malformed(_) => f.write_str("malformed SCRAM message"),
            ScramError::Violation(_, message, _) => f.write_str(message),
            ScramError::WrongProof => f.write_str("password authentication failed"),
        }
    }
}

impl std::error::Error for ScramError {}

fn malformed(detail: impl Into<String>) -> ScramError {
    ScramError::Malformed(detail.into())
}

/// A character of a hostile message as PostgreSQL shows it; the end is the zero byte of its C string.
fn shown(rest: &str) -> String {
    match rest.bytes().next().unwrap_or(0) {
        byte if byte.is_ascii_graphic() => format!("'{}'", char::from(byte)),
        byte => format!("0x{byte:02x}"),
    }
}

/// Takes `name=value` up to the next comma (or the end) off the front of `rest`.
fn attribute<'a>(rest: &mut &'a str, name: char) -> Result<&'a str, ScramError> {
    if !rest.starts_with(name) {
        return Err(malformed(format!("Expected attribute \"{name}\" but found \"{}\".", shown(rest))));
    }
    any_attribute(rest).map(|(_, value)| value)
}

/// Takes whatever attribute stands at the front of `rest`.
fn any_attribute<'a>(rest: &mut &'a str) -> Result<(char, &'a str), ScramError> {
    let Some(name) = rest.chars().next() else {
        return Err(malformed("Attribute expected, but found end of string."));
    };
    if !name.is_ascii_alphabetic() {
        let found = shown(rest);
        return Err(malformed(format!("Attribute expected, but found invalid character \"{found}\".")));
    }
    let Some(after) = rest[1..].strip_prefix('=') else {
        return Err(malformed(format!("Expected character \"=\" for attribute \"{name}\".")));
    };
    let (value, next) = after.split_once(',').unwrap_or((after, ""));
    *rest = next;
    Ok((name, value))
}

/// A message as text: not empty, no zero byte (PostgreSQL reads C strings), UTF-8.
fn text_of(message: &[u8]) -> Result<&str, ScramError> {
    if message.is_empty() {
        return Err(malformed("The message is empty."));
    }
    if message.contains(&0) {
        return Err(malformed("Message length does not match input length."));
    }
    std::str::from_utf8(message).map_err(|_| malformed("The message is not valid UTF-8."))
}

/// The server's side after its first message: what the client's final message is held against.
pub struct ServerExchange {
    verifier: Verifier,
    /// What `c=` must decode to: the gs2 header, and the certificate's hash when bound.
    binding: Vec<u8>,
    client_first_bare: String,
    server_first: String,
    nonce: String,
}

/// An exchange that succeeded.
pub struct Proved {
    /// The server's final message, by which it proves itself to the client.
    pub server_final: Vec<u8>,
    /// What logs in to nodes with the same verifier.
    pub keys: LoginKeys,
}

impl ServerExchange {
    /// Reads the client's first message and makes the server's: `(exchange, server-first-message)`.
    pub fn begin(
        client_first: &[u8],
        mechanism: Mechanism,
        binding: ServerBinding<'_>,
        verifier: Verifier,
        nonce: [u8; NONCE],
    ) -> Result<(ServerExchange, Vec<u8>), ScramError> {
        let message = text_of(client_first)?;
        let (header, bare) = gs2_header(message, mechanism, binding)?;
        let client_nonce = client_first_bare(bare)?;
        let nonce = format!("{client_nonce}{}", BASE64.encode(nonce));
        let server_first = format!("r={nonce},s={},i={}", BASE64.encode(&verifier.salt), verifier.iterations);
        let mut expected = header.as_bytes().to_vec();
        if let (Mechanism::Plus, ServerBinding::Offered(hash)) = (mechanism, binding) {
            expected.extend_from_slice(hash);
        }
        let answer = server_first.clone().into_bytes();
        let exchange = ServerExchange {
            verifier,
            binding: expected,
            client_first_bare: bare.to_owned(),
            server_first,
            nonce,
        };
        Ok((exchange, answer))
    }

    /// Reads the client's final message and checks its proof.
    pub fn finish(self, client_final: &[u8]) -> Result<Proved, ScramError> {
        let message = text_of(client_final)?;
        let mut rest = message;
        if attribute(&mut rest, 'c')? != BASE64.encode(&self.binding) {
            return Err(self.wrong_binding());
        }
        let nonce = attribute(&mut rest, 'r')?;
        let (unproved, proof) = loop {
            let unproved = &message[..message.len() - rest.len()];
            let ('p', proof) = any_attribute(&mut rest)? else { continue };
            // The comma before the proof is not part of what is signed.
            break (unproved.strip_suffix(',').unwrap_or(unproved), proof);
        };
        let proof = BASE64.decode(proof).ok().and_then(|bytes| Key::try_from(bytes).ok());
        let Some(proof) = proof else {
            return Err(malformed("Malformed proof in client-final-message."));
        };
        if !rest.is_empty() {
            return Err(malformed("Garbage found at the end of client-final-message."));
        }
        if nonce != self.nonce {
            return Err(ScramError::Violation(
                "08P01",
                "invalid SCRAM response".to_owned(),
                Some("Nonce does not match."),
            ));
        }
        self.check_proof(unproved, &proof)
    }

    fn wrong_binding(&self) -> ScramError {
        match self.binding.first() {
            Some(b'p') => {
                ScramError::Violation("28000", "SCRAM channel binding check failed".to_owned(), None)
            }
            _ => ScramError::Violation(
                "08P01",
                "unexpected SCRAM channel-binding attribute in client-final-message".to_owned(),
                None,
            ),
        }
    }

    fn check_proof(self, unproved: &str, proof: &Key) -> Result<Proved, ScramError> {
        let said = [self.client_first_bare.as_str(), self.server_first.as_str(), unproved].join(",");
        let verifier = self.verifier;
        let client_key = xor(proof, &mac(&verifier.stored_key, &[said.as_bytes()]));
        // Both questions are answered before either is looked at: a mock exchange does the same work.
        let holds = same(&hash(&client_key), &verifier.stored_key);
        let signature = mac(&verifier.server_key, &[said.as_bytes()]);
        if verifier.mock || !holds {
            return Err(ScramError::WrongProof);
        }
        let keys = ClientKeys {
            salt: verifier.salt,
            iterations: verifier.iterations,
            client_key,
            server_key: verifier.server_key,
        };
        Ok(Proved {
            server_final: format!("v={}", BASE64.encode(signature)).into_bytes(),
            keys: LoginKeys::Keys(Arc::new(keys)),
        })
    }
}

/// Checks the gs2 header against the mechanism; gives it (with both its commas) and what follows.
fn gs2_header<'a>(
    message: &'a str,
    mechanism: Mechanism,
    binding: ServerBinding<'_>,
) -> Result<(&'a str, &'a str), ScramError> {
    const NO_BINDING_DATA: &str = "The client selected SCRAM-SHA-256-PLUS, but the SCRAM message does not include channel binding data.";
    let mut rest = match message.as_bytes()[0] {
        b'n' | b'y' if mechanism == Mechanism::Plus => return Err(malformed(NO_BINDING_DATA)),
        // `y`: the client could bind but believes that we cannot. We offered it: somebody between
        // us took the offer out.
        b'y' if binding != ServerBinding::NotOffered => {
            return Err(ScramError::Violation(
                "28000",
                "SCRAM channel binding negotiation error".to_owned(),
                Some(
                    "The client supports SCRAM channel binding but thinks the server does not.  \
                     However, this server does support channel binding.",
                ),
            ));
        }
        b'n' | b'y' => &message[1..],
        b'p' if mechanism == Mechanism::Plain => {
            return Err(malformed(
                "The client selected SCRAM-SHA-256 without channel binding, but the SCRAM message \
                 includes channel binding data.",
            ));
        }
        b'p' => {
            let mut rest = message;
            let kind = attribute(&mut rest, 'p')?;
            if kind != "tls-server-end-point" {
                let kind: String = kind.chars().take(32).filter(|c| !c.is_control()).collect();
                return Err(ScramError::Violation(
                    "08P01",
                    format!("unsupported SCRAM channel-binding type \"{kind}\""),
                    None,
                ));
            }
            // `attribute` took the comma with it; the check below wants to see it.
            &message["p=tls-server-end-point".len()..]
        }
        _ => {
            let found = shown(message);
            return Err(malformed(format!("Unexpected channel-binding flag \"{found}\".")));
        }
    };
    for part in 0..2 {
        if part == 1 && rest.starts_with('a') {
            return Err(ScramError::Violation(
                "0A000",
                "client uses authorization identity, but it is not supported".to_owned(),
                None,
            ));
        }
        let Some(next) = rest.strip_prefix(',') else {
            return Err(malformed(match part {
                0 => format!("Comma expected, but found character \"{}\".", shown(rest)),
                _ => format!("Unexpected attribute \"{}\" in client-first-message.", shown(rest)),
            }));
        };
        rest = next;
    }
    Ok(message.split_at(message.len() - rest.len()))
}

/// Reads `n=...,r=...` and gives the client's nonce. The name is ignored, as in PostgreSQL: the one in
/// the startup packet counts.
fn client_first_bare(bare: &str) -> Result<&str, ScramError> {
    let mut rest = bare;
    if rest.starts_with('m') {
        return Err(ScramError::Violation(
            "0A000",
            "client requires an unsupported SCRAM extension".to_owned(),
            None,
        ));
    }
    attribute(&mut rest, 'n')?;
    let nonce = attribute(&mut rest, 'r')?;
    if !nonce.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ScramError::Violation(
            "08P01",
            "non-printable characters in SCRAM nonce".to_owned(),
            None,
        ));
    }
    while !rest.is_empty() {
        any_attribute(&mut rest)?;
    }
    Ok(nonce)
}

/// Why an exchange with a node failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScramClientError {
    /// The node's message is not what RFC 5802 says; the text says which part.
    Malformed(&'static str),
    /// The node's verifier has another salt or iteration count than the one our key belongs to: the
    /// password was changed (or set on each node apart), and this node is not where the key is from.
    OtherVerifier,
    /// The node asks for more than [`MAX_ITERATIONS`].
    TooManyIterations(u32),
    /// The node could not show that it has the verifier: not the server it claims to be.
    WrongServerSignature,
    /// The node ended the exchange with `e=`.
    Error,
}

impl fmt::Display for ScramClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ScramClientError::Malformed(part) => write!(f, "malformed SCRAM message of the node ({part})"),
            ScramClientError::OtherVerifier => {
                f.write_str("the node's password verifier is not the one the client logged in with")
            }
            ScramClientError::TooManyIterations(count) => {
                write!(f, "the node asks for {count} SCRAM iterations, more than {MAX_ITERATIONS}")
            }
            ScramClientError::WrongServerSignature => f.write_str("the node could not prove its identity"),
            ScramClientError::Error => f.write_str("the node ended the SCRAM exchange with an error"),
        }
    }
}

impl std::error::Error for ScramClientError {}

/// What our side may bind a login to a node to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientBinding {
    /// No TLS, or a certificate that has no `tls-server-end-point` hash.
    Impossible,
    /// Possible, but the node does not offer SCRAM-SHA-256-PLUS.
    NotOffered,
    /// Bound to this hash of the node's certificate.
    Bound(Vec<u8>),
}

/// Our side of an exchange with a node, before the node's first message.
pub struct ScramClient {
    header: &'static str,
    binding: ClientBinding,
    bare: String,
    nonce: String,
}

/// A node's first message, read.
#[derive(Clone, Debug)]
pub struct Challenge {
    text: String,
    nonce: String,
    salt: Vec<u8>,
    iterations: u32,
}

impl Challenge {
    /// Reads the node's server-first-message.
    pub fn parse(message: &[u8]) -> Result<Challenge, ScramClientError> {
        let wrong = ScramClientError::Malformed;
        let text = text_of(message).map_err(|_| wrong("text"))?;
        let mut rest = text;
        let nonce = attribute(&mut rest, 'r').map_err(|_| wrong("nonce"))?;
        let salt = attribute(&mut rest, 's').map_err(|_| wrong("salt"))?;
        let salt = BASE64.decode(salt).map_err(|_| wrong("salt"))?;
        let iterations = attribute(&mut rest, 'i').map_err(|_| wrong("iterations"))?;
        let iterations: u32 = iterations.parse().map_err(|_| wrong("iterations"))?;
        match iterations {
            0 => Err(wrong("iterations")),
            1..=MAX_ITERATIONS => {
                Ok(Challenge { text: text.to_owned(), nonce: nonce.to_owned(), salt, iterations })
            }
            more => Err(ScramClientError::TooManyIterations(more)),
        }
    }

    fn derivation(&self) -> (Vec<u8>, u32) {
        (self.salt.clone(), self.iterations)
    }
}

impl ScramClient {
    /// Starts an exchange. The name is left empty, as libpq does: the startup packet has it.
    pub fn new(binding: ClientBinding, nonce: [u8; NONCE]) -> ScramClient {
        let header = match &binding {
            ClientBinding::Impossible => "n,,",
            ClientBinding::NotOffered => "y,,",
            ClientBinding::Bound(_) => "p=tls-server-end-point,,",
        };
        let nonce = BASE64.encode(nonce);
        ScramClient { header, binding, bare: format!("n=,r={nonce}"), nonce }
    }

    /// The mechanism to name in SASLInitialResponse.
    pub fn mechanism(&self) -> &'static str {
        match self.binding {
            ClientBinding::Bound(_) => SCRAM_SHA_256_PLUS,
            _ => SCRAM_SHA_256,
        }
    }

    /// The client-first-message.
    pub fn first(&self) -> Vec<u8> {
        format!("{}{}", self.header, self.bare).into_bytes()
    }

    /// Answers the challenge: the client-final-message, and what the node's answer is held against.
    /// Runs PBKDF2 when [`LoginKeys::must_derive`] says so.
    pub fn prove(
        self,
        challenge: &Challenge,
        keys: &LoginKeys,
    ) -> Result<(Vec<u8>, ServerProof), ScramClientError> {
        // A nonce that does not carry ours forward is a replay.
        if !challenge.nonce.starts_with(&self.nonce) || challenge.nonce.len() == self.nonce.len() {
            return Err(ScramClientError::Malformed("nonce"));
        }
        let (client_key, server_key) = keys.for_challenge(challenge)?;
        let mut bound = self.header.as_bytes().to_vec();
        if let ClientBinding::Bound(hash) = &self.binding {
            bound.extend_from_slice(hash);
        }
        let unproved = format!("c={},r={}", BASE64.encode(bound), challenge.nonce);
        let said = format!("{},{},{unproved}", self.bare, challenge.text);
        let proof = xor(&client_key, &mac(&hash(&client_key), &[said.as_bytes()]));
        let message = format!("{unproved},p={}", BASE64.encode(proof)).into_bytes();
        Ok((message, ServerProof(mac(&server_key, &[said.as_bytes()]))))
    }
}

/// The signature that a node with the right verifier must show.
pub struct ServerProof(Key);

impl ServerProof {
    /// Checks the node's server-final-message.
    pub fn check(&self, message: &[u8]) -> Result<(), ScramClientError> {
        let text = text_of(message).map_err(|_| ScramClientError::Malformed("text"))?;
        if text.starts_with("e=") {
            return Err(ScramClientError::Error);
        }
        let mut rest = text;
        let signature = attribute(&mut rest, 'v').map_err(|_| ScramClientError::Malformed("signature"))?;
        let signature = BASE64.decode(signature).ok().and_then(|bytes| Key::try_from(bytes).ok());
        let signature = signature.ok_or(ScramClientError::Malformed("signature"))?;
        if same(&signature, &self.0) { Ok(()) } else { Err(ScramClientError::WrongServerSignature) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECRET: [u8; 32] = [7; 32];

    fn nonce(seed: u8) -> [u8; NONCE] {
        [seed; NONCE]
    }

    /// The exchange of RFC 7677, section 3.
    #[test]
    fn rfc_7677_example_is_reproduced_on_both_sides() {
        let salt = BASE64.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let server_first =
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let keys = LoginKeys::password(Secret("pencil".to_owned()));
        let client = ScramClient {
            header: "n,,",
            binding: ClientBinding::Impossible,
            bare: "n=user,r=rOprNGfwEbeRWgbNEkqO".to_owned(),
            nonce: "rOprNGfwEbeRWgbNEkqO".to_owned(),
        };
        let challenge = Challenge::parse(server_first.as_bytes()).unwrap();
        assert!(keys.must_derive(&challenge));
        let (last, proof) = client.prove(&challenge, &keys).unwrap();
        assert!(!keys.must_derive(&challenge), "kept for the next login");
        assert_eq!(
            String::from_utf8(last.clone()).unwrap(),
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
             p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        proof.check(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=").unwrap();
        assert_eq!(
            proof.check(b"v=7rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="),
            Err(ScramClientError::WrongServerSignature)
        );
        let server = ServerExchange {
            verifier: Verifier::derive("pencil", salt, 4096),
            binding: b"n,,".to_vec(),
            client_first_bare: "n=user,r=rOprNGfwEbeRWgbNEkqO".to_owned(),
            server_first: server_first.to_owned(),
            nonce: "rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0".to_owned(),
        };
        let proved = server.finish(&last).unwrap();
        assert_eq!(proved.server_final, b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
    }

    /// Plays a whole exchange; gives the keys the server learnt.
    fn play(
        keys: &LoginKeys,
        verifier: Verifier,
        client: ClientBinding,
        server: ServerBinding<'_>,
    ) -> Result<LoginKeys, ScramError> {
        let client = ScramClient::new(client, nonce(1));
        let mechanism =
            if client.mechanism() == SCRAM_SHA_256_PLUS { Mechanism::Plus } else { Mechanism::Plain };
        let (server, first) = ServerExchange::begin(&client.first(), mechanism, server, verifier, nonce(2))?;
        let (last, proof) = client.prove(&Challenge::parse(&first).unwrap(), keys).unwrap();
        let proved = server.finish(&last)?;
        proof.check(&proved.server_final).unwrap();
        Ok(proved.keys)
    }

    fn weak(password: &str) -> Verifier {
        Verifier::derive(password, vec![9; 16], 2)
    }

    #[test]
    fn keys_of_one_exchange_open_the_next_server_with_the_same_verifier() {
        let password = LoginKeys::password(Secret("geheim".to_owned()));
        let learnt =
            play(&password, weak("geheim"), ClientBinding::Impossible, ServerBinding::NotOffered).unwrap();
        let again =
            play(&learnt, weak("geheim"), ClientBinding::Impossible, ServerBinding::NotOffered).unwrap();
        assert!(learnt == again);
        assert_eq!(
            format!("{learnt:?} {password:?}"),
            "LoginKeys::Keys(<secret>) LoginKeys::Password(<secret>)"
        );
        // Another salt: said before any proof is sent.
        let other = Verifier::derive("geheim", vec![8; 16], 2);
        let client = ScramClient::new(ClientBinding::Impossible, nonce(1));
        let (_, first) = ServerExchange::begin(
            &client.first(),
            Mechanism::Plain,
            ServerBinding::NotOffered,
            other,
            nonce(2),
        )
        .unwrap();
        let answer = client.prove(&Challenge::parse(&first).unwrap(), &learnt);
        assert_eq!(answer.err(), Some(ScramClientError::OtherVerifier));
    }

    #[test]
    fn a_wrong_password_and_a_mock_fail_alike() {
        let wrong = LoginKeys::password(Secret("falsch".to_owned()));
        for verifier in [weak("geheim"), Verifier::mock("nobody", &SECRET)] {
            let failed = play(&wrong, verifier, ClientBinding::Impossible, ServerBinding::NotOffered);
            assert_eq!(failed.err(), Some(ScramError::WrongProof));
        }
        let a = Verifier::mock("nobody", &SECRET);
        assert!(a == Verifier::mock("nobody", &SECRET) && a.is_mock());
        assert!(a.salt != Verifier::mock("noone", &SECRET).salt);
        assert!(a.salt != Verifier::mock("nobody", &[8; 32]).salt);
        assert_eq!(a.salt, Verifier::from_password("x", "nobody", &SECRET).salt);
    }

    #[test]
    fn channel_binding_holds_both_sides_to_one_certificate() {
        let keys = LoginKeys::password(Secret("geheim".to_owned()));
        let bound = ClientBinding::Bound(vec![1, 2, 3]);
        let offered = ServerBinding::Offered(&[1, 2, 3]);
        play(&keys, weak("geheim"), bound.clone(), offered).unwrap();
        play(&keys, weak("geheim"), ClientBinding::Impossible, offered).unwrap();
        play(&keys, weak("geheim"), ClientBinding::NotOffered, ServerBinding::NotOffered).unwrap();
        let other = play(&keys, weak("geheim"), bound, ServerBinding::Offered(&[1, 2, 4]));
        assert_eq!(other.err().unwrap().to_string(), "SCRAM channel binding check failed");
        let downgraded = play(&keys, weak("geheim"), ClientBinding::NotOffered, offered).err().unwrap();
        assert_eq!(downgraded.sqlstate(), "28000");
        assert_eq!(downgraded.to_string(), "SCRAM channel binding negotiation error");
    }

    #[test]
    fn malformed_first_messages_get_postgresqls_words() {
        let check = |message: &str, mechanism, sqlstate: &str, words: &str| {
            let offered = ServerBinding::Offered(b"h");
            let failed = ServerExchange::begin(message.as_bytes(), mechanism, offered, weak("x"), nonce(2))
                .err()
                .unwrap();
            let text = format!("{failed}: {}", failed.detail().unwrap_or_default());
            assert!(text.contains(words), "{message:?}: {text}");
            assert_eq!(failed.sqlstate(), sqlstate, "{message:?}");
        };
        use Mechanism::{Plain, Plus};
        check("", Plain, "08P01", "The message is empty.");
        check("n,,n=,r=a\0", Plain, "08P01", "Message length does not match");
        check("n,,n=,r=a", Plus, "08P01", "does not include channel binding data");
        check("p=tls-server-end-point,,n=,r=a", Plain, "08P01", "includes channel binding data");
        check("p=tls-unique,,n=,r=a", Plus, "08P01", "unsupported SCRAM channel-binding type \"tls-unique\"");
        check("x,,n=,r=a", Plain, "08P01", "Unexpected channel-binding flag \"'x'\"");
        check("n", Plain, "08P01", "Comma expected, but found character \"0x00\".");
        check("n,a=bob,n=,r=a", Plain, "0A000", "authorization identity");
        check("n,b,n=,r=a", Plain, "08P01", "Unexpected attribute \"'b'\"");
        check("n,,m=1,n=,r=a", Plain, "0A000", "unsupported SCRAM extension");
        check("n,,r=a", Plain, "08P01", "Expected attribute \"n\" but found \"'r'\"");
        check("n,,n=,r=a b", Plain, "08P01", "non-printable characters");
    }

    #[test]
    fn malformed_final_messages_are_refused() {
        let check = |message: &str, words: &str| {
            let (server, _) = ServerExchange::begin(
                b"n,,n=,r=abc",
                Mechanism::Plain,
                ServerBinding::NotOffered,
                weak("x"),
                nonce(2),
            )
            .unwrap();
            let message = message.replace("NONCE", &server.nonce);
            let failed = server.finish(message.as_bytes()).err().unwrap();
            let text = format!("{failed}: {}", failed.detail().unwrap_or_default());
            assert!(text.contains(words), "{message:?}: {text}");
        };
        let proof = BASE64.encode([1; 32]);
        check("c=biws", "Expected attribute \"r\"");
        check("c=eSws,r=NONCE", "unexpected SCRAM channel-binding attribute");
        check("c=biws,r=NONCE", "found end of string");
        check("c=biws,r=NONCE,p=AAAA", "Malformed proof");
        check(&format!("c=biws,r=NONCE,p={proof},x=1"), "Garbage found");
        check(&format!("c=biws,r=NONCExx,p={proof}"), "Nonce does not match.");
        check(&format!("c=biws,r=NONCE,x=1,p={proof}"), "password authentication failed");
    }

    #[test]
    fn verifiers_are_read_as_postgresql_writes_them() {
        let good = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
        assert!(
            Verifier::parse(good).unwrap()
                == Verifier::derive("pencil", BASE64.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap(), 4096)
        );
        for bad in [
            "md5f0f2b8ce4b6d4ffd9ba3bfbcd6e2d2b5",
            "",
            "SCRAM-SHA-256$0:AA==$AA==:AA==",
            "SCRAM-SHA-256$4096:AA==$AA==:AA==",
            &good[..good.len() - 1],
        ] {
            assert!(Verifier::parse(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn passwords_are_prepared_as_postgresql_does() {
        assert_eq!(prepared("I\u{ad}X"), "IX");
        assert_eq!(prepared("\u{2168}"), "IX");
        assert_eq!(prepared("a\u{7}"), "a\u{7}", "prohibited: as it is");
        assert_eq!(prepared("\u{ad}"), "\u{ad}", "nothing would be left: as it is");
    }

    proptest! {
        #[test]
        fn garbage_never_panics(first in ".{0,80}", last in ".{0,80}", raw in proptest::collection::vec(any::<u8>(), 0..80)) {
            for message in [first.as_bytes(), last.as_bytes(), &raw] {
                for mechanism in [Mechanism::Plain, Mechanism::Plus] {
                    let _ = ServerExchange::begin(message, mechanism, ServerBinding::Offered(b"h"), weak("x"), nonce(2));
                }
                let (server, _) = ServerExchange::begin(b"n,,n=,r=abc", Mechanism::Plain, ServerBinding::NotOffered, weak("x"), nonce(2)).unwrap();
                prop_assert!(server.finish(message).is_err());
                let _ = Challenge::parse(message);
                prop_assert!(ServerProof([0; 32]).check(message).is_err());
            }
            let _ = Verifier::parse(&first);
        }

        /// Texts made of the protocol's own pieces reach deeper than noise.
        #[test]
        fn shuffled_pieces_never_panic(pieces in proptest::collection::vec(prop_oneof![
            Just("n,,"), Just("y,,"), Just("p=tls-server-end-point"), Just(","), Just("="), Just("n="), Just("r="),
            Just("c=biws"), Just("p="), Just("s="), Just("i="), Just("v="), Just("AAAA"), Just("ä"), Just("4096"),
        ], 0..12)) {
            let message = pieces.concat();
            for mechanism in [Mechanism::Plain, Mechanism::Plus] {
                let _ = ServerExchange::begin(message.as_bytes(), mechanism, ServerBinding::Offered(b"h"), weak("x"), nonce(2));
            }
            let (server, _) = ServerExchange::begin(b"n,,n=,r=abc", Mechanism::Plain, ServerBinding::NotOffered, weak("x"), nonce(2)).unwrap();
            prop_assert!(server.finish(message.as_bytes()).is_err());
            let _ = Challenge::parse(message.as_bytes());
        }

        #[test]
        fn any_password_logs_in_and_no_other_does(password in ".{1,20}", other in ".{1,20}") {
            let keys = LoginKeys::password(Secret(password.clone()));
            prop_assert!(play(&keys, weak(&password), ClientBinding::Impossible, ServerBinding::NotOffered).is_ok());
            if prepared(&password) != prepared(&other) {
                let refused = play(&keys, weak(&other), ClientBinding::Impossible, ServerBinding::NotOffered);
                prop_assert_eq!(refused.err(), Some(ScramError::WrongProof));
            }
        }
    }
}
