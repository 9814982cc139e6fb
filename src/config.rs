//! The configuration: YAML in, a [`Config`] out that cannot be wrong once it is built.

use std::path::PathBuf;
use std::time::Duration;

/// A secret text: never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("<secret>")
    }
}

/// The whole configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address and port for clients.
    pub listen: String,
    /// Address and port for /metrics, /healthz and /readyz; `None`: no HTTP.
    pub http: Option<String>,
    /// I/O threads.
    pub workers: usize,
    /// Client connections at most.
    pub max_clients: usize,
    /// The nodes, without roles.
    pub nodes: Vec<NodeConfig>,
    /// How the proxy itself logs in to the nodes.
    pub control: ControlConfig,
    /// Who may log in.
    pub auth: AuthConfig,
    /// TLS towards clients.
    pub client_tls: ClientTlsConfig,
    /// TLS towards nodes.
    pub node_tls: NodeTlsConfig,
    /// Backends.
    pub pool: PoolConfig,
    /// What sessions are promised.
    pub consistency: ConsistencyConfig,
    /// Where statements go.
    pub routing: RoutingConfig,
    /// Bounds of memory and time per session.
    pub limits: LimitsConfig,
    /// How nodes are watched and a lost primary is replaced.
    pub failover: FailoverConfig,
    /// Log lines.
    pub log: LogConfig,
    /// How long SIGTERM lets transactions finish.
    pub drain_timeout: Duration,
}

/// One PostgreSQL server.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Its name in metrics, logs and commands.
    pub name: String,
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Its share of the reads as a replica.
    pub weight: u32,
}

/// The proxy's own login.
#[derive(Clone, Debug)]
pub struct ControlConfig {
    /// Role.
    pub user: String,
    /// Its password.
    pub password: Option<Secret>,
    /// The database for probes and samples.
    pub database: String,
}

/// Where client verifiers come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthSource {
    /// Verifiers are fetched from the primary.
    Query,
    /// Only the listed users.
    List,
}

/// Who may log in.
#[derive(Clone, Debug)]
pub struct AuthConfig {
    /// Where client verifiers come from.
    pub source: AuthSource,
    /// The users of source `list`.
    pub users: Vec<UserConfig>,
    /// Who may use the admin console.
    pub admins: Vec<String>,
    /// Source `query`: the SQL that answers one row for user `$1` and database `$2`:
    /// (verifier text, may log in boolean, valid until timestamptz, may connect boolean).
    pub query: String,
    /// From accept to the first ReadyForQuery.
    pub login_timeout: Duration,
}

/// A listed user.
#[derive(Clone, Debug)]
pub struct UserConfig {
    /// Role name.
    pub name: String,
    /// Its password, the same as on the nodes.
    pub password: Secret,
}

/// TLS towards clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientTlsMode {
    /// SSLRequest is answered N.
    Disable,
    /// Offered.
    Prefer,
    /// A client without it is refused (28000).
    Require,
}

/// TLS towards clients.
#[derive(Clone, Debug)]
pub struct ClientTlsConfig {
    /// Whether.
    pub mode: ClientTlsMode,
    /// PEM certificate chain.
    pub cert: Option<PathBuf>,
    /// PEM private key.
    pub key: Option<PathBuf>,
    /// PEM certificates that client certificates must descend from; `None`: none is asked for.
    pub ca: Option<PathBuf>,
}

/// libpq's sslmode words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeTlsMode {
    /// Never.
    Disable,
    /// Only when the node refuses a plain connection.
    Allow,
    /// When the node offers it.
    Prefer,
    /// Always; the certificate is not verified unless `ca` is given.
    Require,
    /// Always; the certificate must descend from `ca`.
    VerifyCa,
    /// As verify-ca, and the host name must match.
    VerifyFull,
}

/// TLS towards nodes.
#[derive(Clone, Debug)]
pub struct NodeTlsConfig {
    /// When.
    pub mode: NodeTlsMode,
    /// PEM root certificates; `None`: the system's.
    pub ca: Option<PathBuf>,
}

/// Backends.
#[derive(Clone, Debug)]
pub struct PoolConfig {
    /// Backends at most per (node, database, user).
    pub size: usize,
    /// How long a statement waits for a backend before it fails.
    pub query_wait_timeout: Duration,
    /// How long a connection attempt to a node may take.
    pub connect_timeout: Duration,
    /// A backend idle for longer is closed.
    pub server_idle_timeout: Duration,
    /// A backend older than this is closed when it becomes idle.
    pub server_lifetime: Duration,
    /// Prepared statements at most per backend; the least recently used is closed.
    pub max_prepared: usize,
}

/// What sessions are promised. The level is `session`; others come with a later version.
#[derive(Clone, Debug)]
pub struct ConsistencyConfig {
    /// No read is older than this.
    pub max_lag: Duration,
    /// How long a read waits for a replica to reach the mark before it goes to the primary.
    pub catch_up_wait: Duration,
    /// How often a node's position is sampled while sessions lean on it.
    pub sample_interval: Duration,
    /// The least time between two samples of a node when somebody waits.
    pub sample_gap: Duration,
}

/// Where statements go.
#[derive(Clone, Debug)]
pub struct RoutingConfig {
    /// `false`: everything runs on the primary.
    pub split: bool,
}

/// Bounds of memory and time per session.
#[derive(Clone, Debug)]
pub struct LimitsConfig {
    /// Bytes of a unit that may be held back to decide its route; beyond: primary.
    pub unit_hold: usize,
    /// Bytes of statement text that are kept to prepare it again on another backend; a longer one
    /// keeps its session on one backend.
    pub statement_text: usize,
    /// Prepared statements at most per session.
    pub statements_per_session: usize,
    /// Entries of the classification cache.
    pub class_cache: usize,
    /// Bytes of statement text that the second parser reads; longer: primary.
    pub parser_text: usize,
    /// How long the second parser may take; longer: primary.
    pub parser_deadline: Duration,
}

/// What is done about a lost primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailoverMode {
    /// The first primary found is kept for good.
    Off,
    /// Somebody else promotes; the proxy finds the new primary.
    Follow,
    /// As `follow`, until failover by command comes with a later version.
    Manual,
}

/// How nodes are watched.
#[derive(Clone, Debug)]
pub struct FailoverConfig {
    /// What is done about a lost primary.
    pub mode: FailoverMode,
    /// Time between two probes of a node.
    pub check_interval: Duration,
    /// How long a probe may take.
    pub check_timeout: Duration,
    /// Failed probes in a row before a node counts as down.
    pub failure_threshold: u32,
    /// The least time a failed replica stays ejected; doubles up to 16 times of it while it flaps.
    pub eject_time: Duration,
    /// Unacknowledged data on a connection to a node closes it after this.
    pub tcp_user_timeout: Duration,
    /// How long a statement for the primary waits for one to be found.
    pub pause_timeout: Duration,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Log lines.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// How they look.
    pub format: LogFormat,
    /// `tracing` filter, for example `info` or `info,highwater::monitor=debug`.
    pub level: String,
}
