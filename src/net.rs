//! Sockets and TLS of both sides of the proxy: how a connection is made, bounded and encrypted.
//!
//! Promises: a plain connection costs nothing over a `TcpStream`; a peer that vanished is noticed by
//! keepalive and, towards nodes, by unacknowledged data; libpq's sslmode words mean what they mean in
//! libpq, or something stricter that is named here; handshake signatures are always verified.
//!
//! Deliberately not here: the protocol that is spoken inside. Certificate revocation lists are not
//! read, and a name in a certificate counts only as subjectAltName, not as common name.

use std::fmt;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::config::{ClientTcpConfig, ClientTlsConfig, ClientTlsMode, NodeTlsConfig, NodeTlsMode};

mod certificate;

pub use certificate::end_point_hash;

/// The ALPN name of the PostgreSQL protocol.
pub const ALPN: &[u8] = b"postgresql";

/// How it is noticed that the peer of an idle connection has vanished.
#[derive(Clone, Copy, Debug)]
pub struct Keepalive {
    /// It is probed after this...
    pub idle: Duration,
    /// ...each time after this...
    pub interval: Duration,
    /// ...and given up after so many probes without an answer.
    pub probes: u32,
}

/// That of connections to nodes, unless another is set.
const KEEPALIVE: Keepalive =
    Keepalive { idle: Duration::from_secs(30), interval: Duration::from_secs(10), probes: 3 };

impl Keepalive {
    /// Has `tcp` probed so.
    pub fn set(self, tcp: &TcpStream) -> io::Result<()> {
        let keepalive =
            TcpKeepalive::new().with_time(self.idle).with_interval(self.interval).with_retries(self.probes);
        SockRef::from(tcp).set_tcp_keepalive(&keepalive)
    }
}

/// A connection to a client or to a node, encrypted or not.
#[derive(Debug)]
pub enum Stream {
    /// As it came from the socket.
    Plain(TcpStream),
    /// TLS, we are the server (a client's connection).
    TlsServer(Box<tokio_rustls::server::TlsStream<TcpStream>>),
    /// TLS, we are the client (a connection to a node).
    TlsClient(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Stream {
    /// The socket below.
    pub fn tcp(&self) -> &TcpStream {
        match self {
            Stream::Plain(tcp) => tcp,
            Stream::TlsServer(tls) => tls.get_ref().0,
            Stream::TlsClient(tls) => tls.get_ref().0,
        }
    }

    /// Whether it is encrypted.
    pub fn is_tls(&self) -> bool {
        !matches!(self, Stream::Plain(_))
    }

    /// Writes `bytes`, says that nothing follows, and discards what has arrived meanwhile (at most 64
    /// KiB): closing a socket with unread bytes resets it, and a reset can overtake the last message.
    pub async fn say_last(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes).await?;
        self.shutdown().await?;
        let mut sink = [0; 4096];
        for _ in 0..16 {
            if !matches!(self.tcp().try_read(&mut sink), Ok(1..)) {
                break;
            }
        }
        Ok(())
    }

    /// The `tls-server-end-point` hash of the node's certificate, where we are the client.
    pub fn node_certificate_hash(&self) -> Option<Vec<u8>> {
        let Stream::TlsClient(tls) = self else { return None };
        end_point_hash(tls.get_ref().1.peer_certificates()?.first()?)
    }
}

/// One arm for each kind of stream.
macro_rules! each {
    ($stream:expr, $inner:ident => $what:expr) => {
        match $stream {
            Stream::Plain($inner) => $what,
            Stream::TlsServer($inner) => $what,
            Stream::TlsClient($inner) => $what,
        }
    };
}

impl AsyncRead for Stream {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), inner => Pin::new(inner).poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), inner => Pin::new(inner).poll_write(cx, bytes))
    }

    #[inline]
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), inner => Pin::new(inner).poll_write_vectored(cx, slices))
    }

    #[inline]
    fn is_write_vectored(&self) -> bool {
        each!(self, inner => inner.is_write_vectored())
    }

    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), inner => Pin::new(inner).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), inner => Pin::new(inner).poll_shutdown(cx))
    }
}

/// What a client's socket gets: no delay for small messages, and keepalive as configured.
pub fn set_client_options(tcp: &TcpStream, config: &ClientTcpConfig) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let keepalive = Keepalive {
        idle: config.keepalives_idle,
        interval: config.keepalives_interval,
        probes: config.keepalives_count,
    };
    keepalive.set(tcp)?;
    set_user_timeout(tcp, config.user_timeout)
}

fn set_user_timeout(tcp: &TcpStream, timeout: Duration) -> io::Result<()> {
    match timeout.is_zero() {
        true => Ok(()),
        false => SockRef::from(tcp).set_tcp_user_timeout(Some(timeout)),
    }
}

/// Connects to a node. Names are resolved now, and each address is tried in turn; `connect_timeout`
/// bounds all of it. Data that stays unacknowledged for `tcp_user_timeout` closes the connection (zero:
/// the system's default). The error is that of the last address, or of kind `TimedOut`.
pub async fn dial(
    host: &str,
    port: u16,
    connect_timeout: Duration,
    tcp_user_timeout: Duration,
) -> io::Result<TcpStream> {
    let attempt = async {
        let mut last = None;
        for address in tokio::net::lookup_host((host, port)).await? {
            match TcpStream::connect(address).await {
                Ok(tcp) => return Ok(tcp),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the host name has no address")))
    };
    let tcp = tokio::time::timeout(connect_timeout, attempt)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "connection attempt timed out"))??;
    tcp.set_nodelay(true)?;
    KEEPALIVE.set(&tcp)?;
    set_user_timeout(&tcp, tcp_user_timeout)?;
    Ok(tcp)
}

/// TLS cannot be set up as configured.
#[derive(Debug)]
pub struct TlsError {
    /// What was being done, with which file.
    pub doing: String,
    /// Why it failed.
    pub cause: Box<dyn std::error::Error + Send + Sync>,
}

impl TlsError {
    fn new(doing: impl Into<String>, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> TlsError {
        TlsError { doing: doing.into(), cause: cause.into() }
    }
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.doing, self.cause)
    }
}

impl std::error::Error for TlsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.cause)
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let doing = || format!("reading certificates from {}", file.display());
    let found: Vec<_> = CertificateDer::pem_file_iter(file)
        .and_then(|items| items.collect())
        .map_err(|error| TlsError::new(doing(), error))?;
    if found.is_empty() {
        Err(TlsError::new(doing(), "the file holds no PEM certificate"))
    } else {
        Ok(found)
    }
}

fn roots(file: &Path) -> Result<(RootCertStore, Vec<CertificateDer<'static>>), TlsError> {
    let found = certificates(file)?;
    let mut store = RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(found.iter().cloned());
    if added == 0 {
        return Err(TlsError::new(
            format!("reading root certificates from {}", file.display()),
            "none of its certificates is understood",
        ));
    }
    Ok((store, found))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// TLS towards clients. Cheap to clone.
#[derive(Clone)]
pub struct ClientTls {
    mode: ClientTlsMode,
    acceptor: Option<TlsAcceptor>,
    certificate_hash: Option<Arc<[u8]>>,
}

impl ClientTls {
    /// Reads the files that the configuration names. With `ca`, a client that uses TLS must show a
    /// certificate that descends from it.
    pub fn new(config: &ClientTlsConfig) -> Result<ClientTls, TlsError> {
        if config.mode == ClientTlsMode::Disable {
            return Ok(ClientTls { mode: config.mode, acceptor: None, certificate_hash: None });
        }
        let file = |file: &Option<std::path::PathBuf>, key: &str| {
            file.clone().ok_or_else(|| TlsError::new("setting up client_tls", format!("{key} is missing")))
        };
        let (cert, key) = (file(&config.cert, "cert")?, file(&config.key, "key")?);
        let chain = certificates(&cert)?;
        let certificate_hash = chain.first().and_then(|own| end_point_hash(own)).map(Arc::from);
        let private = PrivateKeyDer::from_pem_file(&key).map_err(|error| {
            TlsError::new(format!("reading the private key from {}", key.display()), error)
        })?;
        let doing = || format!("setting up client_tls with {} and {}", cert.display(), key.display());
        let builder = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::new(doing(), error))?;
        let builder = match &config.ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let (roots, _) = roots(ca)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                    .build()
                    .map_err(|error| {
                        TlsError::new(format!("setting up client_tls with {}", ca.display()), error)
                    })?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut tls =
            builder.with_single_cert(chain, private).map_err(|error| TlsError::new(doing(), error))?;
        // A client that names protocols must name ours; one that names none is let in, except on a
        // direct connection (`greet` looks).
        tls.alpn_protocols = vec![ALPN.to_vec()];
        // No resumption, as in PostgreSQL: connections are long, and tickets are state to guard.
        tls.session_storage = Arc::new(NoServerSessionStorage {});
        tls.send_tls13_tickets = 0;
        Ok(ClientTls {
            mode: config.mode,
            acceptor: Some(TlsAcceptor::from(Arc::new(tls))),
            certificate_hash,
        })
    }

    /// The configured mode.
    pub fn mode(&self) -> ClientTlsMode {
        self.mode
    }

    /// What handshakes; `None`: TLS is not offered.
    pub fn acceptor(&self) -> Option<&TlsAcceptor> {
        self.acceptor.as_ref()
    }

    /// Our certificate's `tls-server-end-point` hash; `None`: SCRAM-SHA-256-PLUS cannot be offered.
    pub fn certificate_hash(&self) -> Option<&Arc<[u8]>> {
        self.certificate_hash.as_ref()
    }
}

/// TLS towards nodes. Cheap to clone.
///
/// `require` verifies the chain when `ca` is given, as libpq does, and so do `prefer` and `allow`; none
/// of the three verifies without. verify-ca and verify-full use the system's roots without `ca`. A
/// certificate that is itself in the `ca` file is trusted while it is valid: self-signed server
/// certificates are common, and the path builder below would refuse them.
#[derive(Clone)]
pub struct NodeTls {
    mode: NodeTlsMode,
    config: Arc<rustls::ClientConfig>,
}

impl NodeTls {
    /// Reads the root certificates that the configuration needs.
    pub fn new(config: &NodeTlsConfig) -> Result<NodeTls, TlsError> {
        let trust = match (config.mode, &config.ca) {
            (NodeTlsMode::Disable, _) => Trust::Anyone,
            (mode, Some(ca)) => {
                let (roots, listed) = roots(ca)?;
                Trust::Descent { roots, listed, name: mode == NodeTlsMode::VerifyFull }
            }
            (mode @ (NodeTlsMode::VerifyCa | NodeTlsMode::VerifyFull), None) => Trust::Descent {
                roots: system_roots()?,
                listed: vec![],
                name: mode == NodeTlsMode::VerifyFull,
            },
            _ => Trust::Anyone,
        };
        let provider = provider();
        let verifier = NodeVerifier { trust, algorithms: provider.signature_verification_algorithms };
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| TlsError::new("setting up node_tls", error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        tls.resumption = rustls::client::Resumption::disabled();
        Ok(NodeTls { mode: config.mode, config: Arc::new(tls) })
    }

    /// The configured mode.
    pub fn mode(&self) -> NodeTlsMode {
        self.mode
    }

    /// The same, but for `allow`, which becomes `prefer`: encrypted where the node offers it, the stricter of the two.
    pub fn without_allow(&self) -> NodeTls {
        let mode = if self.mode == NodeTlsMode::Allow { NodeTlsMode::Prefer } else { self.mode };
        NodeTls { mode, config: Arc::clone(&self.config) }
    }

    /// Handshakes with a node that has answered `S`. A host that cannot stand in a certificate (it may
    /// have been resolved by other means than DNS) is sent no server name, and fails under verify-full.
    pub async fn connect(&self, host: &str, tcp: TcpStream) -> io::Result<Stream> {
        let name = match ServerName::try_from(host.to_owned()) {
            Ok(name) => name,
            Err(error) if self.mode == NodeTlsMode::VerifyFull => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
            }
            Err(_) => ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()),
        };
        let tls = TlsConnector::from(Arc::clone(&self.config)).connect(name, tcp).await?;
        Ok(Stream::TlsClient(Box::new(tls)))
    }

    /// The same TLS for connections by `tokio-postgres`, and the mode to give it. It has no `allow` and
    /// no verify-*: `allow` becomes `Prefer` (encrypted when the node offers it: the stricter of the
    /// two), and what verify-* verify is in the connector already, so that they become `Require`.
    pub fn postgres_connector(
        &self,
    ) -> (tokio_postgres_rustls::MakeRustlsConnect, tokio_postgres::config::SslMode) {
        use tokio_postgres::config::SslMode;
        let mode = match self.mode {
            NodeTlsMode::Disable => SslMode::Disable,
            NodeTlsMode::Allow | NodeTlsMode::Prefer => SslMode::Prefer,
            NodeTlsMode::Require | NodeTlsMode::VerifyCa | NodeTlsMode::VerifyFull => SslMode::Require,
        };
        (tokio_postgres_rustls::MakeRustlsConnect::new((*self.config).clone()), mode)
    }
}

impl NodeTls {
    /// The same TLS for HTTP.
    pub fn https(&self) -> HttpsConnector {
        let mut config = (*self.config).clone();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        HttpsConnector(TlsConnector::from(Arc::new(config)))
    }
}

/// Makes TLS connections that speak HTTP.
pub struct HttpsConnector(TlsConnector);

impl HttpsConnector {
    /// Handshakes; the certificate must be `host`'s.
    pub async fn connect(
        &self,
        host: &str,
        tcp: TcpStream,
    ) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.0.connect(name, tcp).await
    }
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    store.add_parsable_certificates(found.certs);
    if store.is_empty() {
        return Err(TlsError::new("reading the system's root certificates", "none found: set node_tls.ca"));
    }
    Ok(store)
}

/// Whom we take a node's certificate from.
#[derive(Debug)]
enum Trust {
    /// Encryption only: whoever answers.
    Anyone,
    /// A chain to one of the roots, or a listed certificate itself; and the name, when asked for.
    Descent { roots: RootCertStore, listed: Vec<CertificateDer<'static>>, name: bool },
}

/// Verifies nodes as [`Trust`] says. That the node owns the certificate's key is verified always.
#[derive(Debug)]
struct NodeVerifier {
    trust: Trust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        host: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Trust::Descent { roots, listed, name } = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        let parsed = ParsedCertificate::try_from(own)?;
        if listed.contains(own) {
            still_valid(own, now)?;
        } else {
            verify_server_cert_signed_by_trust_anchor(
                &parsed,
                roots,
                intermediates,
                now,
                self.algorithms.all,
            )?;
        }
        if *name {
            verify_server_name(&parsed, host)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, own, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, own, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn still_valid(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), rustls::Error> {
    let (from, to) = certificate::validity(certificate).ok_or(CertificateError::BadEncoding)?;
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if now < from {
        return Err(CertificateError::NotValidYet.into());
    }
    if now > to {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_clients_socket_gets_what_is_configured() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let second = Duration::from_secs(1);
        let config = |user_timeout| ClientTcpConfig {
            keepalives_idle: 7 * second,
            keepalives_interval: 5 * second,
            keepalives_count: 9,
            user_timeout,
        };
        let socket = SockRef::from(&tcp);
        set_client_options(&tcp, &config(Duration::ZERO)).unwrap();
        assert_eq!(socket.tcp_user_timeout().unwrap(), None);
        set_client_options(&tcp, &config(11 * second)).unwrap();
        assert!(socket.keepalive().unwrap() && tcp.nodelay().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), 7 * second);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), 5 * second);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 9);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(11 * second));
    }
}
