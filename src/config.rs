//! The configuration: YAML in, a [`Config`] out that cannot be wrong once it is built.
//!
//! Promises: every mistake is reported with file, line, column, path and what is allowed, all of one file
//! at once; a key that nothing reads is refused; secrets are never shown; size, depth and count of
//! values are bounded. Deliberately does not: open certificates or talk to nodes (`check` does), or guess.

use std::cell::Cell;
use std::fmt;
use std::io::Read as _;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::{self, DeserializeSeed as _};

use crate::consistency::{Durability, LagLimit, Level, OnStale, Override, Promise, Route};

pub mod coordination;
pub mod given;
pub mod live;
pub mod near;

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
    /// Address and port for clients that only read, on replicas; `None`: no such port.
    pub listen_read_only: Option<String>,
    /// Address and port for /metrics, /healthz and /readyz; `None`: no HTTP.
    pub http: Option<String>,
    /// What HTTP asks for, but for /healthz and /readyz; `None`: nothing.
    pub http_token: Option<Secret>,
    /// How much the status page remembers, at one point a second.
    pub http_history: Duration,
    /// I/O threads.
    pub workers: usize,
    /// Client connections at most.
    pub max_clients: usize,
    /// Of these, places that only `auth.admins` may take.
    pub reserved_clients: usize,
    /// The nodes, without roles.
    pub nodes: Vec<NodeConfig>,
    /// How the proxy itself logs in to the nodes.
    pub control: ControlConfig,
    /// Who may log in.
    pub auth: AuthConfig,
    /// TLS towards clients.
    pub client_tls: ClientTlsConfig,
    /// Sockets of clients.
    pub client_tcp: ClientTcpConfig,
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
    /// When clients that do nothing, or too much, are ended.
    pub timeouts: TimeoutsConfig,
    /// Connections that speak the replication protocol.
    pub replication: ReplicationConfig,
    /// How nodes are watched and a lost primary is replaced.
    pub failover: FailoverConfig,
    /// Where commits must be.
    pub durability: DurabilityConfig,
    /// Log lines.
    pub log: LogConfig,
    /// How long SIGTERM lets transactions finish.
    pub drain_timeout: Duration,
    /// What is accepted and has no effect, one line each as `file:line:column: path: what`; for the log.
    pub warnings: Vec<String>,
    /// What the file says, key by key, for people.
    pub given: given::Given,
    /// The file it was read from, to be read again; `None`: from a text.
    pub file: Option<PathBuf>,
}

/// One PostgreSQL server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeConfig {
    /// Its name in metrics, logs and commands.
    pub name: String,
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Its share of the reads as a replica.
    pub weight: u32,
    /// Whether it serves reads though it is told to apply what it receives late.
    pub delayed_ok: bool,
    /// Where the other nodes reach it for replication, which need not be where the proxy does.
    pub replication: ReplicationAddress,
    /// The zone or region that it is in; `None`: that is not told.
    pub zone: Option<String>,
    /// It was taken out of the file while the proxy ran: it keeps its number, and is not used. Never read from a file.
    pub removed: bool,
}

/// Where replicas of a node connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicationAddress {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// The proxy's own login.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Who may take the reserved places.
    pub admins: Vec<String>,
    /// Source `query`: the SQL that answers one row for user `$1` and database `$2`:
    /// (verifier text, may log in boolean, valid until timestamptz, may connect boolean).
    pub query: String,
    /// From accept to the first ReadyForQuery.
    pub login_timeout: Duration,
}

/// A listed user.
#[derive(Clone, Debug, PartialEq, Eq)]
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

/// Sockets of clients, in the words of PostgreSQL's `tcp_keepalives_*` and `tcp_user_timeout`.
#[derive(Clone, Debug)]
pub struct ClientTcpConfig {
    /// An idle connection is probed after this.
    pub keepalives_idle: Duration,
    /// And again each time after this.
    pub keepalives_interval: Duration,
    /// So many probes without an answer end it.
    pub keepalives_count: u32,
    /// Unacknowledged data ends it after this; zero: the system's default.
    pub user_timeout: Duration,
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

/// For how long a session keeps a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMode {
    /// For a transaction, or while it has left something on it.
    Transaction,
    /// From its first statement to its end, on the primary.
    Session,
}

/// What is set apart for one user or database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolOverride {
    /// The user's or database's name.
    pub name: String,
    /// In place of `pool.mode`.
    pub mode: Option<PoolMode>,
    /// In place of `pool.size`.
    pub size: Option<usize>,
    /// Sessions at most.
    pub max_clients: Option<usize>,
}

/// Backends.
#[derive(Clone, Debug)]
pub struct PoolConfig {
    /// For how long a session keeps a backend.
    pub mode: PoolMode,
    /// Backends at most per (node, database, user).
    pub size: usize,
    /// Backends at most per node, of all pools together; zero: no bound.
    pub max_backends_per_node: usize,
    /// What is set apart for users; it goes before what is for databases.
    pub users: Vec<PoolOverride>,
    /// What is set apart for databases.
    pub databases: Vec<PoolOverride>,
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
    /// Unnamed statements whose text was seen before are served by those that sessions share.
    pub share_unnamed: bool,
}

impl PoolConfig {
    /// What is said of this user, then of this database.
    fn overrides(&self, database: &str, user: &str) -> impl Iterator<Item = &PoolOverride> {
        let of = |list: &'_ [PoolOverride], name: &str| list.iter().position(|o| o.name == name);
        let users = of(&self.users, user).map(|at| &self.users[at]);
        let databases = of(&self.databases, database).map(|at| &self.databases[at]);
        users.into_iter().chain(databases)
    }

    /// The mode of `user`'s sessions in `database`.
    pub fn mode_of(&self, database: &str, user: &str) -> PoolMode {
        self.overrides(database, user).find_map(|o| o.mode).unwrap_or(self.mode)
    }

    /// The size of `user`'s pools in `database`.
    pub fn size_of(&self, database: &str, user: &str) -> usize {
        self.overrides(database, user).find_map(|o| o.size).unwrap_or(self.size)
    }
}

/// When clients are ended that do nothing, or hold a transaction too long; zero: never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeoutsConfig {
    /// Outside a transaction without a statement for so long (57P05).
    pub idle_session: Duration,
    /// Inside a transaction without a statement for so long (25P03).
    pub idle_in_transaction: Duration,
    /// A transaction open for so long (25P04).
    pub transaction: Duration,
}

/// Connections that speak the replication protocol.
#[derive(Clone, Copy, Debug)]
pub struct ReplicationConfig {
    /// At most; 0: none.
    pub max_connections: usize,
}

/// Whose sessions a rule is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whom {
    /// The user; `None`: any.
    pub user: Option<String>,
    /// The database; `None`: any.
    pub database: Option<String>,
}

impl Whom {
    /// The rules for a session of `user` in `database`, from the least to the most telling: the last word counts.
    /// Those that name both come behind those that name one, the user's behind the database's; of equals the first
    /// in the file comes last.
    fn telling<'r, R>(rules: &'r [R], whom: impl Fn(&R) -> &Whom, user: &str, database: &str) -> Vec<&'r R> {
        let applies = |rule: &&R| {
            let Whom { user: of, database: in_ } = whom(rule);
            of.as_deref().is_none_or(|of| of == user) && in_.as_deref().is_none_or(|in_| in_ == database)
        };
        let mut rules: Vec<&R> = rules.iter().rev().filter(applies).collect();
        rules.sort_by_key(|rule| (whom(rule).user.is_some(), whom(rule).database.is_some()));
        rules
    }
}

/// What the sessions of a user, of a database, or of a user in a database are promised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsistencyRule {
    /// For whom.
    pub whom: Whom,
    /// What is said for them in place of the rest of the section.
    pub says: Override,
}

/// How durable writes to a table must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableRule {
    /// Its schema; `None`: any.
    pub schema: Option<String>,
    /// Its name.
    pub table: String,
    /// How durable.
    pub durability: Durability,
}

impl TableRule {
    /// Whether it is about a table that a statement names so. A rule that names a schema is about no table that
    /// is named without one: which that is depends on the search path.
    pub fn is_about(&self, schema: &Option<Vec<u8>>, table: &[u8]) -> bool {
        self.table.as_bytes() == table
            && self.schema.as_ref().is_none_or(|of| schema.as_deref() == Some(of.as_bytes()))
    }
}

/// How durable the writes of a user, in a database, or to a table must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DurabilityRule {
    /// For whom.
    pub whom: Whom,
    /// Of which table: schema and name; `None`: any.
    pub table: Option<(Option<String>, String)>,
    /// How durable.
    pub durability: Durability,
}

/// Where commits must be before they are acknowledged.
#[derive(Clone, Debug, Default)]
pub struct DurabilityConfig {
    /// What holds unless a rule or the session says otherwise; `None`: what the server does by itself.
    pub default: Option<Durability>,
    /// What is said for single users, databases and tables.
    pub rules: Vec<DurabilityRule>,
}

impl DurabilityConfig {
    /// What holds for the sessions of `user` in `database`, and for single tables there: the first that is about a
    /// table counts.
    pub fn for_session(&self, user: &str, database: &str) -> (Option<Durability>, Vec<TableRule>) {
        let mut base = self.default;
        let mut tables = Vec::new();
        for rule in Whom::telling(&self.rules, |rule| &rule.whom, user, database) {
            match &rule.table {
                None => base = Some(rule.durability),
                Some((schema, table)) => tables.push(TableRule {
                    schema: schema.clone(),
                    table: table.clone(),
                    durability: rule.durability,
                }),
            }
        }
        tables.reverse();
        (base, tables)
    }
}

/// Replicas of which some have applied each commit before it is acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuorumReads {
    /// Their indexes among the nodes.
    pub replicas: Vec<u16>,
    /// How many of them have it.
    pub applied_by: usize,
}

/// What sessions are promised.
#[derive(Clone, Debug)]
pub struct ConsistencyConfig {
    /// What holds unless a rule or the session says otherwise.
    pub promise: Promise,
    /// What is said for single users and databases.
    pub rules: Vec<ConsistencyRule>,
    /// Who may say, in the primary's place, what a read at level `strong` must show.
    pub quorum_reads: Option<QuorumReads>,
    /// No read is older than this.
    pub max_lag: Duration,
    /// How long a read waits for a replica to reach the mark.
    pub catch_up_wait: Duration,
    /// The share of all reads, in percent, that may go to the primary because no replica was fresh enough.
    pub primary_read_cap: u32,
    /// How long a read above that share waits before it fails.
    pub primary_read_wait: Duration,
    /// Named sessions at most.
    pub named_sessions: usize,
    /// A named session that nobody has joined for so long may be forgotten.
    pub named_session_idle: Duration,
    /// How often a node's position is sampled while sessions lean on it.
    pub sample_interval: Duration,
    /// The least time between two samples of a node when somebody waits.
    pub sample_gap: Duration,
    /// A replica whose clock is known to be behind the primary's by more serves no reads that ask for the time.
    pub clock_tolerance: Duration,
}

/// Where statements go.
#[derive(Clone, Debug)]
pub struct RoutingConfig {
    /// `false`: everything runs on the primary.
    pub split: bool,
    /// Everything runs on the primary, and what would have run on replicas is counted.
    pub shadow: bool,
    /// What is said for single users and databases.
    pub rules: Vec<RoutingRule>,
    /// Where explicit transactions run.
    pub transactions: Transactions,
    /// Whether those that are READ ONLY, at READ COMMITTED, read on replicas all the same.
    pub read_only_on_replicas: bool,
    /// What the operator knows of functions.
    pub functions: FunctionOverrides,
    /// The zone that this proxy is in: replicas of it come first.
    pub zone: Option<String>,
}

/// Where the statements of a user, of a database, or of a user in a database go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutingRule {
    /// For whom.
    pub whom: Whom,
    /// In place of [`RoutingConfig::split`].
    pub split: Option<bool>,
    /// Where reads run unless the session says otherwise.
    pub route: Option<Route>,
}

/// Where explicit transactions run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transactions {
    /// On the primary, whole.
    Primary,
    /// At READ COMMITTED on replicas, until the first statement that is not a read.
    Split,
}

/// What the operator says of functions, as `schema.name` or `name`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FunctionOverrides {
    /// Users' functions that do nothing but read, whatever they look like.
    pub safe: Vec<String>,
    /// Functions that belong on the primary; built-in ones too.
    pub primary: Vec<String>,
    /// Extensions whose compiled functions do what they are declared to do, by name.
    pub extensions: Vec<String>,
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
    /// Bytes of a session's settings that are kept to give them to other backends; more keep it on one.
    pub session_settings: usize,
    /// Entries of the classification cache.
    pub class_cache: usize,
    /// Databases whose catalog facts are kept; statements of further ones run on the primary.
    pub databases: usize,
    /// Bytes of statement text that the second parser reads; longer: primary.
    pub parser_text: usize,
    /// How long the second parser may take; longer: primary.
    pub parser_deadline: Duration,
    /// Connections to the admin console at most, beside `max_clients`; 0: there is no console.
    pub admin_connections: usize,
    /// Skeletons of statements, for each worker, of which the console shows what has run; 0: none.
    pub statement_stats: usize,
    /// Names of nodes at most, over the life of the process; at least as many as it starts with.
    pub nodes: usize,
}

/// What is done about a lost primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailoverMode {
    /// The first primary found is kept for good.
    Off,
    /// Somebody else promotes; the proxy finds the new primary.
    Follow,
    /// As `follow`; and with a `state_dir` a lost primary is replaced when an operator says so.
    Manual,
    /// A lost primary is replaced.
    Auto,
}

/// How a session is told that a write of its own is known to be lost in a failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostWrite {
    /// Its next statement fails.
    Error,
    /// A notice goes ahead of the answer to it.
    Notice,
}

/// What an acknowledged commit is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DurabilityMode {
    /// It may be lost with the primary.
    Async,
    /// It is on as many standbys as `failover.sync.num` says, and survives.
    Quorum,
}

impl FailoverConfig {
    /// The priority of the node of this name among those who may be promoted; 0: it never is.
    pub fn priority_of(&self, node: &str) -> u32 {
        let listed = self.candidates.iter().find(|candidate| candidate.node == node);
        match (listed, self.candidates.is_empty()) {
            (Some(candidate), _) => candidate.priority,
            (None, true) => 100,
            (None, false) => 0,
        }
    }
}

/// Who may be promoted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CandidateConfig {
    /// The node's name.
    pub node: String,
    /// Breaks ties between equal positions; 0: never.
    pub priority: u32,
}

/// `synchronous_standby_names`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncConfig {
    /// Whether Highwater sets it; else what is found is gone by.
    pub manage: bool,
    /// How many standbys confirm a commit.
    pub num: u32,
    /// A standby that has been away or late for so long is no longer waited for.
    pub degrade_after: Duration,
    /// Never fewer than `num`: commits wait instead.
    pub strict: bool,
}

/// Replication slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotsConfig {
    /// Whether Highwater makes, moves and drops slots for the standbys.
    pub manage: bool,
    /// How their names begin; slots of other names are nobody's business.
    pub prefix: String,
    /// One that holds as much WAL is warned of.
    pub warn_above: u64,
}

impl SlotsConfig {
    /// The slot of the node of this name, in the letters that slots may have.
    pub fn slot_of(&self, node: &str) -> String {
        let fit = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
        self.prefix.chars().chain(node.chars().map(fit)).collect()
    }
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
    /// How long a statement for the primary waits for one to be found, or to be let there.
    pub pause_timeout: Duration,
    /// Sessions that may wait to be let to the primary.
    pub max_paused: usize,
    /// What an acknowledged commit is worth.
    pub durability: DurabilityMode,
    /// Where what must survive a crash of the proxy is kept; without it nothing is promoted.
    pub state_dir: Option<PathBuf>,
    /// How long a walreceiver that was made to connect anew may take to stream.
    pub kick_timeout: Duration,
    /// A server that says it is starting is waited for so long.
    pub restart_grace: Duration,
    /// Restarts within `crash_loop_window` beyond which it is not waited for.
    pub crash_loop_restarts: u32,
    /// See there.
    pub crash_loop_window: Duration,
    /// A primary that has not answered since the proxy's start is given so long.
    pub startup_grace: Duration,
    /// A standby that answers and cannot be cut off within this blocks the failover.
    pub sever_timeout: Duration,
    /// A promotion without an outcome is reported after this.
    pub promote_timeout: Duration,
    /// `async`: the most that the best standby may lack.
    pub max_lost_bytes: u64,
    /// No second failover by itself within this.
    pub min_failover_interval: Duration,
    /// `async`: go on also when most nodes cannot be reached.
    pub allow_minority: bool,
    /// How a session is told of a write of its own that is lost.
    pub lost_write: LostWrite,
    /// Who may be promoted; empty: all, alike.
    pub candidates: Vec<CandidateConfig>,
    /// Only a standby of the primary's zone takes over, unless a command names another.
    pub same_zone_only: bool,
    /// Whether an old primary that comes back is made read-only.
    pub fence_sql: bool,
    /// Synchronous replication.
    pub sync: SyncConfig,
    /// How several proxies over the cluster agree; `None`: there is one.
    pub coordination: Option<coordination::CoordinationConfig>,
    /// Replication slots.
    pub slots: SlotsConfig,
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
    /// Statements that took so long are logged; zero: none.
    pub slow_statement: Duration,
    /// Lines about single statements at most in a second.
    pub slow_per_second: u32,
    /// Whether each client's coming and going is logged.
    pub connections: bool,
}

/// SQL of `auth.query` unless the file gives another. The last column is NULL when the database does
/// not exist and false when the user may not connect to it, because PostgreSQL answers the two with
/// different SQLSTATEs (3D000 and 42501). No row: no such user.
pub const DEFAULT_AUTH_QUERY: &str = "SELECT r.rolpassword, r.rolcanlogin, r.rolvaliduntil, \
     (SELECT has_database_privilege(r.oid, d.oid, 'CONNECT') FROM pg_catalog.pg_database d WHERE d.datname = $2) \
     FROM pg_catalog.pg_authid r WHERE r.rolname = $1";

/// Every section of the file and the keys allowed in it; "" is the top. The reader refuses what is
/// not here, and tests hold `config.yaml` and `docs/CONFIGURATION.md` against it.
pub const SECTIONS: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "listen",
            "listen_read_only",
            "http",
            "http_token",
            "http_token_env",
            "http_token_file",
            "http_history",
            "workers",
            "max_clients",
            "reserved_clients",
            "nodes",
            "control",
            "auth",
            "client_tls",
            "client_tcp",
            "node_tls",
            "pool",
            "consistency",
            "durability",
            "routing",
            "limits",
            "timeouts",
            "replication",
            "failover",
            "log",
            "drain_timeout",
        ],
    ),
    (
        "nodes[]",
        &["name", "host", "port", "weight", "delayed_ok", "replication_host", "replication_port", "zone"],
    ),
    ("control", &["user", "password", "password_env", "password_file", "database"]),
    ("auth", &["source", "users", "admins", "query", "login_timeout"]),
    ("auth.users[]", &["name", "password", "password_env", "password_file"]),
    ("client_tls", &["mode", "cert", "key", "ca"]),
    ("client_tcp", &["keepalives_idle", "keepalives_interval", "keepalives_count", "user_timeout"]),
    ("node_tls", &["mode", "ca"]),
    (
        "pool",
        &[
            "mode",
            "size",
            "max_backends_per_node",
            "query_wait_timeout",
            "connect_timeout",
            "server_idle_timeout",
            "server_lifetime",
            "max_prepared",
            "share_unnamed",
            "users",
            "databases",
        ],
    ),
    ("pool.users[]", &["name", "mode", "size", "max_clients"]),
    ("pool.databases[]", &["name", "mode", "size", "max_clients"]),
    (
        "consistency",
        &[
            "level",
            "max_lag",
            "catch_up_wait",
            "on_stale",
            "rules",
            "primary_read_cap",
            "primary_read_wait",
            "named_sessions",
            "named_session_idle",
            "sample_interval",
            "sample_gap",
            "clock_tolerance",
            "quorum_reads",
        ],
    ),
    ("consistency.quorum_reads", &["replicas", "applied_by"]),
    ("consistency.rules[]", &["user", "database", "level", "max_lag", "on_stale"]),
    ("durability", &["default", "rules"]),
    ("durability.rules[]", &["user", "database", "table", "durability"]),
    ("routing", &["split", "shadow", "transactions", "read_only_transactions", "functions", "rules", "zone"]),
    ("routing.rules[]", &["user", "database", "split", "route"]),
    ("routing.functions", &["safe", "primary", "extensions"]),
    (
        "limits",
        &[
            "unit_hold",
            "statement_text",
            "statements_per_session",
            "session_settings",
            "class_cache",
            "databases",
            "parser_text",
            "parser_deadline",
            "admin_connections",
            "statement_stats",
            "nodes",
        ],
    ),
    ("timeouts", &["idle_session", "idle_in_transaction", "transaction"]),
    ("replication", &["max_connections"]),
    (
        "failover",
        &[
            "mode",
            "durability",
            "check_interval",
            "check_timeout",
            "failure_threshold",
            "eject_time",
            "tcp_user_timeout",
            "pause_timeout",
            "max_paused",
            "state_dir",
            "kick_timeout",
            "restart_grace",
            "crash_loop_restarts",
            "crash_loop_window",
            "startup_grace",
            "sever_timeout",
            "promote_timeout",
            "max_lost_bytes",
            "min_failover_interval",
            "allow_minority",
            "lost_write",
            "candidates",
            "same_zone_only",
            "fence",
            "sync",
            "coordination",
            "slots",
        ],
    ),
    ("failover.candidates[]", &["node", "priority"]),
    ("failover.fence", &["sql"]),
    ("failover.sync", &["manage", "num", "degrade_after", "strict"]),
    (
        "failover.coordination",
        &[
            "kind",
            "endpoints",
            "prefix",
            "name",
            "ttl",
            "timeout",
            "interval",
            "user",
            "password",
            "password_env",
            "password_file",
            "ca",
        ],
    ),
    ("failover.slots", &["manage", "prefix", "warn_above"]),
    ("log", &["format", "level", "slow_statement", "slow_per_second", "connections"]),
];

const POOL_MODES: [(&str, PoolMode); 2] =
    [("transaction", PoolMode::Transaction), ("session", PoolMode::Session)];

const MAX_FILE: u64 = 1 << 20;
/// Values in a file at most, aliases expanded: bounds what a YAML bomb can cost.
const MAX_VALUES: usize = 50_000;
const MAX_DEPTH: usize = 16;
const MAX_PROBLEMS: usize = 20;
/// Nodes at most.
pub const MAX_NODES: usize = 64;
const MAX_TIME: Duration = Duration::from_secs(365 * 86_400);
/// What the status page may remember: one point a second, so at most 3600.
const HTTP_HISTORY: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(3600);

/// One thing wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1; 0: the problem has no place in the text.
    pub line: usize,
    /// Column, from 1.
    pub column: usize,
    /// Where in the structure, as `nodes[1].port`; empty: the file as a whole.
    pub path: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

/// The file cannot be used. Shown as one line per problem, `file:line:column: path: what`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file's name as given.
    pub file: String,
    /// What is wrong, in the order of the text; never empty, at most 20.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, p) in self.problems.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            f.write_str(&self.file)?;
            if p.line > 0 {
                write!(f, ":{}:{}", p.line, p.column)?;
            }
            if !p.path.is_empty() {
                write!(f, ": {}", p.path)?;
            }
            write!(f, ": {}", p.message)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

impl RoutingConfig {
    /// Whether reads of `user` in `database` may run on replicas, and where they go at first. Of the rules the most
    /// telling has the last word, as in [`ConsistencyConfig::promise_for`].
    pub fn for_session(&self, user: &str, database: &str) -> (bool, Route) {
        let rules = Whom::telling(&self.rules, |rule| &rule.whom, user, database);
        rules.into_iter().fold((self.split, Route::default()), |(split, route), rule| {
            (rule.split.unwrap_or(split), rule.route.unwrap_or(route))
        })
    }
}

impl ConsistencyConfig {
    /// What a session of `user` in `database` is promised at first. Rules that name both count before those
    /// that name one, the user's before the database's; among equals the first that says something.
    pub fn promise_for(&self, user: &str, database: &str) -> Promise {
        let rules = Whom::telling(&self.rules, |rule| &rule.whom, user, database);
        rules.into_iter().fold(self.promise, |promise, rule| rule.says.over(promise))
    }
}

impl Config {
    /// Reads and checks the file at `path`; secrets come from it, the process's environment, or files.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let file = path.display().to_string();
        let fail = |message: String| ConfigError {
            file: file.clone(),
            problems: vec![Problem { line: 0, column: 0, path: String::new(), message }],
        };
        let bytes = read_capped(path, MAX_FILE).map_err(fail)?;
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => {
                let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
                let line = good.iter().filter(|&&b| b == b'\n').count() + 1;
                let last = good.rsplit(|&b| b == b'\n').next().unwrap_or_default();
                let column = String::from_utf8_lossy(last).chars().count() + 1;
                let message = "not UTF-8 text".to_owned();
                return Err(ConfigError {
                    file,
                    problems: vec![Problem { line, column, path: String::new(), message }],
                });
            }
        };
        let config = Config::parse(&text, &file, &|name| std::env::var(name).ok())?;
        Ok(Config { file: Some(path.to_owned()), ..config })
    }

    /// Checks `text`. `file_name` is only shown; `env` answers `password_env`. Reads the files that
    /// `password_file` names, and nothing else.
    pub fn parse(
        text: &str,
        file_name: &str,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Config, ConfigError> {
        let fail = |problems| ConfigError { file: file_name.to_owned(), problems };
        if text.len() as u64 > MAX_FILE {
            let message = format!("larger than {MAX_FILE} bytes");
            return Err(fail(vec![Problem { line: 0, column: 0, path: String::new(), message }]));
        }
        let tree = match walk(text, None) {
            Ok(tree) => tree,
            Err(e) => {
                let (line, column) = e.location().map_or((0, 0), |l| (l.line(), l.column()));
                let mut message = bare_message(&e);
                if text.lines().nth(line.saturating_sub(1)).is_some_and(|line| line.contains('\t')) {
                    message += " (there is a tab in this line; YAML indents with spaces)";
                }
                return Err(fail(vec![Problem { line, column, path: String::new(), message }]));
            }
        };
        let mut reader = Reader { env, found: Vec::new(), ignored: Vec::new() };
        let config = reader.config(&tree);
        match config {
            Some(mut config) if reader.found.is_empty() => {
                config.given = given::Given::of(&tree);
                config.warnings = reader
                    .ignored
                    .into_iter()
                    .map(|(trail, message)| {
                        let (line, column) = locate(text, &trail.steps);
                        format!("{file_name}:{line}:{column}: {}: {message}", trail.shown)
                    })
                    .collect();
                Ok(config)
            }
            _ => {
                let mut problems: Vec<Problem> = reader
                    .found
                    .into_iter()
                    .take(MAX_PROBLEMS)
                    .map(|(trail, message)| {
                        let (line, column) = locate(text, &trail.steps);
                        Problem { line, column, path: trail.shown, message }
                    })
                    .collect();
                problems.sort_by_key(|p| (p.line, p.column));
                Err(fail(problems))
            }
        }
    }
}

/// Whether only this machine reaches it; a name other than localhost may be anything.
fn is_loopback(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn read_capped(path: &Path, cap: u64) -> Result<Vec<u8>, String> {
    let file = std::fs::File::open(path).map_err(|e| format!("cannot be opened: {e}"))?;
    let mut bytes = Vec::new();
    file.take(cap + 1).read_to_end(&mut bytes).map_err(|e| format!("cannot be read: {e}"))?;
    if bytes.len() as u64 > cap {
        return Err(format!("larger than {cap} bytes"));
    }
    Ok(bytes)
}

/// The parser's message without the place that it appends: we print the place in front.
fn bare_message(e: &serde_yaml::Error) -> String {
    let text = e.to_string();
    match text.rfind(" at line ") {
        Some(at) if text[at..].contains("column") => text[..at].to_owned(),
        _ => text,
    }
}

// ---- text -> tree ----------------------------------------------------------------------------
// serde hands no positions to its visitors, but an error raised inside a visitor is given the place of
// the value being visited. So the tree is read without positions, and the few places that are to be
// reported are found by walking the text again and failing on purpose at that value.

enum Tree {
    Null,
    Bool(bool),
    Int(i128),
    Float,
    Text(String),
    List(Vec<Tree>),
    Map(Vec<(String, Tree)>),
}

impl Tree {
    /// What it is, in words that never hold what it says: it may be a secret under a wrong key, and line
    /// and column point at it anyway.
    fn kind(&self) -> String {
        match self {
            Tree::Null => "nothing".to_owned(),
            Tree::Bool(b) => b.to_string(),
            Tree::Int(_) | Tree::Float => "this number".to_owned(),
            Tree::Text(_) => "this text".to_owned(),
            Tree::List(_) => "a list".to_owned(),
            Tree::Map(_) => "a mapping".to_owned(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Item(usize),
    Key(usize),
    Value(usize),
}

#[derive(Clone, Default)]
struct Trail {
    steps: Vec<Step>,
    shown: String,
}

impl Trail {
    fn key(&self, index: usize, name: &str, step: fn(usize) -> Step) -> Trail {
        let mut next = self.clone();
        next.steps.push(step(index));
        if !next.shown.is_empty() {
            next.shown.push('.');
        }
        next.shown.push_str(name);
        next
    }

    fn item(&self, index: usize) -> Trail {
        let mut next = self.clone();
        next.steps.push(Step::Item(index));
        next.shown.push_str(&format!("[{index}]"));
        next
    }
}

const FOUND: &str = "highwater: the place looked for";

fn walk(text: &str, target: Option<&[Step]>) -> Result<Tree, serde_yaml::Error> {
    let left = Cell::new(MAX_VALUES);
    Walk { left: &left, depth: 0, target }.deserialize(serde_yaml::Deserializer::from_str(text))
}

fn locate(text: &str, steps: &[Step]) -> (usize, usize) {
    match walk(text, Some(steps)) {
        Err(e) => e.location().map_or((1, 1), |l| (l.line(), l.column())),
        Ok(_) => (1, 1),
    }
}

/// Reads one value; `target`: the steps still to go to the value to fail at.
#[derive(Clone, Copy)]
struct Walk<'a> {
    left: &'a Cell<usize>,
    depth: usize,
    target: Option<&'a [Step]>,
}

impl<'a> Walk<'a> {
    fn into(self, step: Step) -> Walk<'a> {
        let target = match self.target {
            Some([first, rest @ ..]) if *first == step => Some(rest),
            _ => None,
        };
        Walk { left: self.left, depth: self.depth + 1, target }
    }

    fn arrive<E: de::Error>(&self) -> Result<(), E> {
        if self.target.is_some_and(<[Step]>::is_empty) {
            return Err(E::custom(FOUND));
        }
        if self.depth > MAX_DEPTH {
            return Err(E::custom("nested too deeply"));
        }
        match self.left.get().checked_sub(1) {
            Some(left) => self.left.set(left),
            None => return Err(E::custom(format!("more than {MAX_VALUES} values"))),
        }
        Ok(())
    }
}

impl<'de> de::DeserializeSeed<'de> for Walk<'_> {
    type Value = Tree;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> de::Visitor<'de> for Walk<'_> {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a plain value, list or mapping")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Tree, E> {
        self.arrive().map(|()| Tree::Null)
    }

    /// How a document without any value arrives.
    fn visit_none<E: de::Error>(self) -> Result<Tree, E> {
        self.visit_unit()
    }

    fn visit_bool<E: de::Error>(self, v: bool) -> Result<Tree, E> {
        self.arrive().map(|()| Tree::Bool(v))
    }

    fn visit_i64<E: de::Error>(self, v: i64) -> Result<Tree, E> {
        self.arrive().map(|()| Tree::Int(v.into()))
    }

    fn visit_u64<E: de::Error>(self, v: u64) -> Result<Tree, E> {
        self.arrive().map(|()| Tree::Int(v.into()))
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Tree, E> {
        self.arrive().map(|()| Tree::Float)
    }

    fn visit_str<E: de::Error>(self, v: &str) -> Result<Tree, E> {
        self.arrive().map(|()| Tree::Text(v.to_owned()))
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Tree, A::Error> {
        self.arrive()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self.into(Step::Item(list.len())))? {
            list.push(item);
        }
        Ok(Tree::List(list))
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut entries: A) -> Result<Tree, A::Error> {
        self.arrive()?;
        let mut map = Vec::new();
        while let Some(key) = entries.next_key_seed(self.into(Step::Key(map.len())))? {
            let key = match key {
                Tree::Text(text) => text,
                Tree::Int(i) => i.to_string(),
                other => other.kind(),
            };
            let value = entries.next_value_seed(self.into(Step::Value(map.len())))?;
            map.push((key, value));
        }
        Ok(Tree::Map(map))
    }
}

// ---- tree -> Config --------------------------------------------------------------------------

struct Reader<'e> {
    env: &'e dyn Fn(&str) -> Option<String>,
    found: Vec<(Trail, String)>,
    /// What is good but has no effect.
    ignored: Vec<(Trail, String)>,
}

/// One mapping of the file: its entries, and where it is.
struct Section<'t> {
    trail: Trail,
    entries: &'t [(String, Tree)],
}

impl<'t> Section<'t> {
    fn get(&self, key: &str) -> Option<(&'t Tree, Trail)> {
        let index = self.entries.iter().position(|(k, _)| k == key)?;
        Some((&self.entries[index].1, self.trail.key(index, key, Step::Value)))
    }

    fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|(k, _)| k == key)
    }
}

/// The key that was probably meant. One that is allowed tells nothing of what was written in its place.
fn perhaps(key: &str, allowed: &[&str]) -> String {
    near::nearest(key, allowed.iter().copied()).map_or(String::new(), |word| format!("perhaps {word}; "))
}

impl Reader<'_> {
    fn wrong(&mut self, trail: &Trail, message: impl Into<String>) {
        self.found.push((trail.clone(), message.into()));
    }

    fn section<'t>(&mut self, name: &str, tree: &'t Tree, trail: Trail) -> Section<'t> {
        let entries: &[_] = match tree {
            Tree::Map(entries) => entries,
            other => {
                self.wrong(&trail, format!("expected a mapping, not {}", other.kind()));
                &[]
            }
        };
        let allowed = SECTIONS.iter().find(|(n, _)| *n == name).map_or(&[][..], |(_, keys)| keys);
        for (i, (key, _)) in entries.iter().enumerate() {
            let at = trail.key(i, key, Step::Key);
            if !allowed.contains(&key.as_str()) {
                let meant = perhaps(key, allowed);
                let allowed_here = format!("{meant}allowed here: {}", allowed.join(", "));
                if allowed.contains(&"password") {
                    // `{ password: abc,def }` makes a key of half a secret: it is not shown.
                    let at = Trail { shown: trail.shown.clone(), ..at };
                    let hint = "a secret that holds any of , : # { } must be quoted";
                    self.wrong(&at, format!("unknown key ({hint}); {allowed_here}"));
                } else {
                    self.wrong(&at, format!("unknown key; {allowed_here}"));
                }
            } else if entries[..i].iter().any(|(k, _)| k == key) {
                self.wrong(&at, "given twice");
            }
        }
        Section { trail, entries }
    }

    /// A section below `parent`; when left out, an empty one, so that defaults apply.
    fn child<'t>(&mut self, parent: &Section<'t>, key: &str) -> Section<'t> {
        match parent.get(key) {
            Some((tree, trail)) => self.section(key, tree, trail),
            None => Section { trail: parent.trail.clone(), entries: &[] },
        }
    }

    /// A section of a section; `name` is its full one.
    fn nested<'t>(&mut self, parent: &Section<'t>, key: &str, name: &str) -> Section<'t> {
        match parent.get(key) {
            Some((tree, trail)) => self.section(name, tree, trail),
            None => Section { trail: parent.trail.clone(), entries: &[] },
        }
    }

    fn list<'t>(&mut self, section: &Section<'t>, key: &str) -> Vec<(&'t Tree, Trail)> {
        match section.get(key) {
            None => Vec::new(),
            Some((Tree::List(items), trail)) => {
                items.iter().enumerate().map(|(i, item)| (item, trail.item(i))).collect()
            }
            Some((other, trail)) => {
                self.wrong(&trail, format!("expected a list, not {}", other.kind()));
                Vec::new()
            }
        }
    }

    fn text_of(&mut self, tree: &Tree, trail: &Trail) -> Option<String> {
        match tree {
            Tree::Text(text) if text.is_empty() => self.wrong(trail, "may not be empty"),
            Tree::Text(text) if text.contains('\0') => self.wrong(trail, "may not contain a zero byte"),
            Tree::Text(text) => return Some(text.clone()),
            other => self.wrong(trail, format!("expected text, not {}; quote it", other.kind())),
        }
        None
    }

    fn text(&mut self, section: &Section<'_>, key: &str) -> Option<String> {
        let (tree, trail) = section.get(key)?;
        self.text_of(tree, &trail)
    }

    /// Text that has no default.
    fn needed(&mut self, section: &Section<'_>, key: &str) -> Option<String> {
        if !section.has(key) {
            self.wrong(&section.trail, format!("`{key}` is missing"));
        }
        self.text(section, key)
    }

    fn number(
        &mut self,
        section: &Section<'_>,
        key: &str,
        allowed: RangeInclusive<u64>,
        default: u64,
    ) -> u64 {
        let Some((tree, trail)) = section.get(key) else { return default };
        if let Tree::Int(i) = tree
            && let Ok(n) = u64::try_from(*i)
            && allowed.contains(&n)
        {
            return n;
        }
        self.wrong(
            &trail,
            format!(
                "expected a whole number from {} to {}, not {}",
                allowed.start(),
                allowed.end(),
                tree.kind()
            ),
        );
        default
    }

    fn flag(&mut self, section: &Section<'_>, key: &str, default: bool) -> bool {
        match section.get(key) {
            None => default,
            Some((Tree::Bool(b), _)) => *b,
            Some((other, trail)) => {
                self.wrong(&trail, format!("expected true or false, not {}", other.kind()));
                default
            }
        }
    }

    fn time(&mut self, section: &Section<'_>, key: &str, default: Duration, least: Duration) -> Duration {
        self.time_within(section, key, default, least..=MAX_TIME)
    }

    fn time_within(
        &mut self,
        section: &Section<'_>,
        key: &str,
        default: Duration,
        allowed: RangeInclusive<Duration>,
    ) -> Duration {
        let Some((tree, trail)) = section.get(key) else { return default };
        let parsed = match tree {
            Tree::Text(text) => parse_duration(text),
            _ => None,
        };
        match parsed {
            Some(time) if allowed.contains(&time) => time,
            Some(_) => {
                let (least, most) = (allowed.start(), allowed.end());
                let least = if least.is_zero() { "0s".to_owned() } else { format!("{least:?}") };
                let most = if *most == MAX_TIME { "365d".to_owned() } else { format!("{most:?}") };
                self.wrong(&trail, format!("expected a time from {least} to {most}, not {}", tree.kind()));
                default
            }
            None => {
                let message =
                    "expected a time: a whole number and one of us, ms, s, m, h, d, for example 10s or 20ms";
                self.wrong(&trail, format!("{message}, not {}", tree.kind()));
                default
            }
        }
    }

    fn size(
        &mut self,
        section: &Section<'_>,
        key: &str,
        default: usize,
        allowed: RangeInclusive<usize>,
    ) -> usize {
        let Some((tree, trail)) = section.get(key) else { return default };
        let parsed = match tree {
            Tree::Int(i) => usize::try_from(*i).ok(),
            Tree::Text(text) => parse_size(text),
            _ => None,
        };
        match parsed {
            Some(size) if allowed.contains(&size) => size,
            _ => {
                let (low, high) = (allowed.start(), allowed.end());
                let message =
                    format!("expected a size from {low} to {high} bytes, for example 64KiB or 1MiB");
                self.wrong(&trail, format!("{message}, not {}", tree.kind()));
                default
            }
        }
    }

    /// One word of `words`; the first is the default. `later`: words of the design that this version
    /// does not have.
    fn choice<T: Copy>(
        &mut self,
        section: &Section<'_>,
        key: &str,
        words: &[(&str, T)],
        later: &[&str],
        default: T,
    ) -> T {
        let Some((tree, trail)) = section.get(key) else { return default };
        let given = match tree {
            Tree::Text(text) => text.as_str(),
            // YAML 1.1 readers take a bare `off` for false; both spellings mean the word.
            Tree::Bool(false) if words.iter().any(|(w, _)| *w == "off") => "off",
            _ => "",
        };
        if let Some((_, value)) = words.iter().find(|(word, _)| *word == given) {
            return *value;
        }
        let allowed = words.iter().map(|(w, _)| *w).collect::<Vec<_>>().join(", ");
        if later.contains(&given) {
            self.wrong(
                &trail,
                format!("`{given}` is not available in this version; allowed here: {allowed}"),
            );
        } else {
            let meant = near::nearest(given, words.iter().map(|(word, _)| *word));
            let meant = meant.map_or(String::new(), |word| format!("; perhaps {word}"));
            self.wrong(&trail, format!("expected one of {allowed}, not {}{meant}", tree.kind()));
        }
        default
    }

    fn address(&mut self, section: &Section<'_>, key: &str, default: &str) -> String {
        let Some((tree, trail)) = section.get(key) else { return default.to_owned() };
        let Some(text) = self.text_of(tree, &trail) else { return default.to_owned() };
        let good = text.rsplit_once(':').is_some_and(|(host, port)| {
            let bracketed = host.starts_with('[') && host.ends_with(']');
            !host.is_empty()
                && (bracketed || !host.contains(':'))
                && !host.contains(char::is_whitespace)
                && port.bytes().all(|b| b.is_ascii_digit())
                && port.parse::<u16>().is_ok()
        });
        if !good {
            let message = "expected host:port, for example 127.0.0.1:6432 or [::1]:6432";
            self.wrong(&trail, format!("{message}, not {}", tree.kind()));
        }
        text
    }

    /// The secret of `password`, `password_env` or `password_file` (or of another `what` than password), of
    /// which one at most may be given.
    fn secret(&mut self, section: &Section<'_>, what: &str) -> Option<Secret> {
        let [env, file] = ["env", "file"].map(|from| format!("{what}_{from}"));
        let given: Vec<_> = [what, &env, &file]
            .into_iter()
            .filter_map(|key| section.get(key).map(|(tree, trail)| (key, tree, trail)))
            .collect();
        if let [_, (_, _, second), ..] = given.as_slice() {
            self.wrong(second, format!("give only one of {what}, {env} and {file}"));
            return None;
        }
        let (key, tree, trail) = given.into_iter().next()?;
        if key == what {
            return match tree {
                Tree::Text(text) if !text.is_empty() && !text.contains('\0') => Some(Secret(text.clone())),
                // Not through `text_of`, which shows the value.
                _ => {
                    self.wrong(&trail, "expected text that is not empty; quote it if it looks like a number");
                    None
                }
            };
        }
        let name = self.text_of(tree, &trail)?;
        let answer = if key == env {
            // The name is not shown: it may be the password itself, under the wrong key.
            (self.env)(&name).ok_or_else(|| "the environment variable named here is not set".to_owned())
        } else {
            read_capped(Path::new(&name), 64 * 1024)
                .and_then(|bytes| String::from_utf8(bytes).map_err(|_| "is not UTF-8 text".to_owned()))
                .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
                .map_err(|e| format!("the file named here {e}"))
        };
        match answer {
            Ok(secret) if !secret.is_empty() && !secret.contains('\0') => Some(Secret(secret)),
            Ok(_) => {
                self.wrong(
                    &trail,
                    format!("what is named here holds no usable {what}: empty, or with a zero byte"),
                );
                None
            }
            Err(message) => {
                self.wrong(&trail, message);
                None
            }
        }
    }

    fn config(&mut self, tree: &Tree) -> Option<Config> {
        let top = self.section("", tree, Trail::default());
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let nodes = self.nodes(&top);
        let consistency = self.consistency(&top, &nodes);
        let control = self.control(&top);
        let auth = self.auth(&top);
        let listen = self.address(&top, "listen", "127.0.0.1:6432");
        let http = match top.get("http") {
            Some((Tree::Null, _)) => None,
            _ => Some(self.address(&top, "http", "127.0.0.1:9632")),
        };
        let listen_read_only = match top.get("listen_read_only") {
            None | Some((Tree::Null, _)) => None,
            Some(_) => Some(self.address(&top, "listen_read_only", "")),
        };
        if let Some((_, trail)) = top.get("listen_read_only")
            && listen_read_only.is_some()
            && (listen_read_only.as_ref() == Some(&listen) || listen_read_only == http)
            && !listen_read_only.as_ref().is_some_and(|address| address.ends_with(":0"))
        {
            self.wrong(&trail, "the same address as `listen` or `http`");
        }
        let max_clients = self.number(&top, "max_clients", 1..=1_000_000, 1000) as usize;
        let reserved_clients = self.number(&top, "reserved_clients", 0..=1_000_000, 0) as usize;
        if let Some((_, trail)) = top.get("reserved_clients") {
            if reserved_clients >= max_clients {
                self.wrong(&trail, "must be less than max_clients");
            } else if reserved_clients > 0 && auth.as_ref().is_some_and(|auth| auth.admins.is_empty()) {
                self.wrong(&trail, "reserved for nobody: `auth.admins` is empty");
            }
        }
        let http_token = self.secret(&top, "http_token");
        if let (Some(address), None, Some((_, trail))) = (&http, &http_token, top.get("http"))
            && !is_loopback(address)
        {
            let message =
                "anybody who reaches this address can read it: set http_token, or bind it to 127.0.0.1";
            self.ignored.push((trail, message.to_owned()));
        }
        if let Some((_, trail)) = top.get("http")
            && http.as_ref() == Some(&listen)
            && !listen.ends_with(":0")
        {
            self.wrong(&trail, "the same address as `listen`");
        }
        let failover = self.failover(&top, &nodes);
        let routing = self.routing(&top, &nodes);
        Some(Config {
            listen,
            listen_read_only,
            http,
            http_token,
            http_history: self.time_within(&top, "http_history", Duration::from_secs(600), HTTP_HISTORY),
            workers: self.number(&top, "workers", 1..=1024, cores as u64) as usize,
            max_clients,
            reserved_clients,
            nodes,
            client_tls: self.client_tls(&top),
            client_tcp: self.client_tcp(&top),
            node_tls: self.node_tls(&top),
            pool: self.pool(&top),
            consistency,
            routing,
            limits: self.limits(&top),
            timeouts: self.timeouts(&top),
            replication: self.replication(&top),
            failover,
            durability: self.durability(&top),
            log: self.log(&top),
            drain_timeout: self.time(&top, "drain_timeout", Duration::from_secs(30), Duration::ZERO),
            warnings: Vec::new(),
            given: given::Given::default(),
            file: None,
            control: control?,
            auth: auth?,
        })
    }

    fn nodes(&mut self, top: &Section<'_>) -> Vec<NodeConfig> {
        let items = self.list(top, "nodes");
        match top.get("nodes") {
            None => self.wrong(&top.trail, "`nodes` is missing: a list of { name, host, port }"),
            Some((Tree::List(list), trail)) if list.is_empty() => {
                self.wrong(&trail, "expected at least one node")
            }
            Some((Tree::List(list), trail)) if list.len() > MAX_NODES => {
                self.wrong(&trail, format!("expected at most {MAX_NODES} nodes"))
            }
            Some(_) => {}
        }
        let mut nodes: Vec<NodeConfig> = Vec::new();
        for (tree, trail) in items.into_iter().take(MAX_NODES) {
            let section = self.section("nodes[]", tree, trail);
            let name = self.needed(&section, "name").unwrap_or_default();
            let host = self.needed(&section, "host").unwrap_or_default();
            let port = self.number(&section, "port", 1..=65_535, 5432) as u16;
            let weight = self.number(&section, "weight", 0..=1000, 1) as u32;
            let delayed_ok = self.flag(&section, "delayed_ok", false);
            let replication = ReplicationAddress {
                host: self.text(&section, "replication_host").unwrap_or_else(|| host.clone()),
                port: self.number(&section, "replication_port", 1..=65_535, u64::from(port)) as u16,
            };
            if !name.is_empty() && nodes.iter().any(|n| n.name == name) {
                let at = section.get("name").map_or(section.trail.clone(), |(_, t)| t);
                self.wrong(&at, format!("another node is already named `{name}`"));
            }
            if name.len() > 63 || name.chars().any(|c| !(c.is_ascii_alphanumeric() || "_-.".contains(c))) {
                let at = section.get("name").map_or(section.trail.clone(), |(_, t)| t);
                self.wrong(&at, "expected at most 63 letters, digits, and the signs - _ .");
            }
            if !host.is_empty()
                && let Some(other) =
                    nodes.iter().find(|n| n.host.eq_ignore_ascii_case(&host) && n.port == port)
            {
                let message = format!("node `{}` already has this host and port", other.name);
                let at =
                    section.get("port").or(section.get("host")).map_or(section.trail.clone(), |(_, t)| t);
                self.wrong(&at, message);
            }
            let zone = self.zone(&section);
            nodes.push(NodeConfig {
                name,
                host,
                port,
                weight,
                delayed_ok,
                replication,
                zone,
                removed: false,
            });
        }
        nodes
    }

    /// The name of a zone. It is shown in answers and logs, and compared letter by letter.
    fn zone(&mut self, section: &Section<'_>) -> Option<String> {
        if let Some((Tree::Null, _)) = section.get("zone") {
            return None;
        }
        let zone = self.text(section, "zone")?;
        let odd = |c: char| !(c.is_ascii_alphanumeric() || "_-.".contains(c));
        if zone.is_empty() || zone.len() > 63 || zone.chars().any(odd) {
            let at = section.get("zone").map_or(section.trail.clone(), |(_, trail)| trail);
            self.wrong(&at, "expected 1 to 63 letters, digits, and the signs - _ .");
        }
        Some(zone)
    }

    /// Where the proxy itself is. One that no node is in is no mistake by itself, but has no effect.
    fn own_zone(&mut self, routing: &Section<'_>, nodes: &[NodeConfig]) -> Option<String> {
        let zone = self.zone(routing)?;
        if !nodes.iter().any(|node| node.zone.as_ref() == Some(&zone)) {
            let at = routing.get("zone").map_or(routing.trail.clone(), |(_, trail)| trail);
            self.ignored.push((at, "no node is in this zone: reads go to all replicas alike".to_owned()));
        }
        Some(zone)
    }

    fn control(&mut self, top: &Section<'_>) -> Option<ControlConfig> {
        if !top.has("control") {
            self.wrong(&top.trail, "`control` is missing: how the proxy logs in, { user, password }");
            return None;
        }
        let section = self.child(top, "control");
        let user = self.needed(&section, "user");
        let password = self.secret(&section, "password");
        let database = if section.has("database") {
            self.text(&section, "database")
        } else {
            Some("postgres".to_owned())
        };
        Some(ControlConfig { user: user?, password, database: database? })
    }

    fn auth(&mut self, top: &Section<'_>) -> Option<AuthConfig> {
        let section = self.child(top, "auth");
        let words = [("query", AuthSource::Query), ("list", AuthSource::List)];
        let source = self.choice(&section, "source", &words, &[], AuthSource::Query);
        let mut users: Vec<UserConfig> = Vec::new();
        for (tree, trail) in self.list(&section, "users") {
            let user = self.section("auth.users[]", tree, trail);
            let name = self.needed(&user, "name");
            let before = self.found.len();
            let password = self.secret(&user, "password");
            if password.is_none() && self.found.len() == before {
                self.wrong(&user.trail, "a password is missing: password, password_env or password_file");
            }
            let (Some(name), Some(password)) = (name, password) else { continue };
            if users.iter().any(|u| u.name == name) {
                let at = user.get("name").map_or(user.trail.clone(), |(_, t)| t);
                self.wrong(&at, "this user is listed twice");
            }
            users.push(UserConfig { name, password });
        }
        let listed = matches!(section.get("users"), Some((Tree::List(items), _)) if !items.is_empty());
        if source == AuthSource::List && !listed {
            let at = section.get("source").map_or(section.trail.clone(), |(_, t)| t);
            self.wrong(&at, "source `list` needs at least one entry in auth.users");
        }
        if source == AuthSource::Query && listed {
            let at = section.get("users").map_or(section.trail.clone(), |(_, t)| t);
            let message = "not used: with `source: query` the primary says who may log in";
            self.ignored.push((at, message.to_owned()));
        }
        let mut admins = Vec::new();
        for (tree, trail) in self.list(&section, "admins") {
            admins.extend(self.text_of(tree, &trail));
        }
        let query = if section.has("query") {
            self.text(&section, "query")
        } else {
            Some(DEFAULT_AUTH_QUERY.to_owned())
        };
        let login_timeout =
            self.time(&section, "login_timeout", Duration::from_secs(15), Duration::from_millis(100));
        Some(AuthConfig { source, users, admins, query: query?, login_timeout })
    }

    fn path(&mut self, section: &Section<'_>, key: &str) -> Option<PathBuf> {
        match section.get(key) {
            Some((Tree::Null, _)) => None,
            _ => self.text(section, key).map(PathBuf::from),
        }
    }

    fn client_tls(&mut self, top: &Section<'_>) -> ClientTlsConfig {
        let section = self.child(top, "client_tls");
        let words = [
            ("disable", ClientTlsMode::Disable),
            ("prefer", ClientTlsMode::Prefer),
            ("require", ClientTlsMode::Require),
        ];
        let mode = self.choice(&section, "mode", &words, &[], ClientTlsMode::Disable);
        let tls = ClientTlsConfig {
            mode,
            cert: self.path(&section, "cert"),
            key: self.path(&section, "key"),
            ca: self.path(&section, "ca"),
        };
        let at = |key: &str| section.get(key).map_or(section.trail.clone(), |(_, t)| t);
        match (&tls.cert, &tls.key) {
            (Some(_), None) => self.wrong(&at("cert"), "a certificate needs its `key`"),
            (None, Some(_)) => self.wrong(&at("key"), "a key needs its `cert`"),
            (None, None) if mode != ClientTlsMode::Disable => {
                self.wrong(&at("mode"), "TLS towards clients needs `cert` and `key`")
            }
            _ => {}
        }
        tls
    }

    fn client_tcp(&mut self, top: &Section<'_>) -> ClientTcpConfig {
        let section = self.child(top, "client_tcp");
        let second = Duration::from_secs(1);
        ClientTcpConfig {
            keepalives_idle: self.time(&section, "keepalives_idle", Duration::from_secs(30), second),
            keepalives_interval: self.time(&section, "keepalives_interval", Duration::from_secs(10), second),
            keepalives_count: self.number(&section, "keepalives_count", 1..=127, 3) as u32,
            user_timeout: self.time(&section, "user_timeout", Duration::ZERO, Duration::ZERO),
        }
    }

    fn node_tls(&mut self, top: &Section<'_>) -> NodeTlsConfig {
        let section = self.child(top, "node_tls");
        let words = [
            ("disable", NodeTlsMode::Disable),
            ("allow", NodeTlsMode::Allow),
            ("prefer", NodeTlsMode::Prefer),
            ("require", NodeTlsMode::Require),
            ("verify-ca", NodeTlsMode::VerifyCa),
            ("verify-full", NodeTlsMode::VerifyFull),
        ];
        NodeTlsConfig {
            mode: self.choice(&section, "mode", &words, &[], NodeTlsMode::Prefer),
            ca: self.path(&section, "ca"),
        }
    }

    fn pool(&mut self, top: &Section<'_>) -> PoolConfig {
        let section = self.child(top, "pool");
        let least = Duration::from_millis(1);
        PoolConfig {
            mode: self.choice(&section, "mode", &POOL_MODES, &[], PoolMode::Transaction),
            size: self.number(&section, "size", 1..=100_000, 20) as usize,
            max_backends_per_node: self.number(&section, "max_backends_per_node", 0..=100_000, 0) as usize,
            query_wait_timeout: self.time(&section, "query_wait_timeout", Duration::from_secs(30), least),
            connect_timeout: self.time(&section, "connect_timeout", Duration::from_secs(5), least),
            server_idle_timeout: self.time(&section, "server_idle_timeout", Duration::from_secs(600), least),
            server_lifetime: self.time(&section, "server_lifetime", Duration::from_secs(3600), least),
            max_prepared: self.number(&section, "max_prepared", 1..=100_000, 200) as usize,
            share_unnamed: self.flag(&section, "share_unnamed", false),
            users: self.pool_overrides(&section, "users", "pool.users[]"),
            databases: self.pool_overrides(&section, "databases", "pool.databases[]"),
        }
    }

    fn pool_overrides(&mut self, pool: &Section<'_>, key: &str, name: &str) -> Vec<PoolOverride> {
        let mut found: Vec<PoolOverride> = Vec::new();
        for (tree, trail) in self.list(pool, key) {
            let section = self.section(name, tree, trail);
            let Some(name) = self.needed(&section, "name") else { continue };
            if found.iter().any(|other| other.name == name) {
                let at = section.get("name").map_or(section.trail.clone(), |(_, t)| t);
                self.wrong(&at, "listed twice");
            }
            let mut number =
                |key: &str| section.has(key).then(|| self.number(&section, key, 1..=1_000_000, 1) as usize);
            let (size, max_clients) = (number("size"), number("max_clients"));
            let mode = section
                .has("mode")
                .then(|| self.choice(&section, "mode", &POOL_MODES, &[], PoolMode::Transaction));
            found.push(PoolOverride { name, mode, size, max_clients });
        }
        found
    }

    fn timeouts(&mut self, top: &Section<'_>) -> TimeoutsConfig {
        let section = self.child(top, "timeouts");
        let mut time = |key| self.time(&section, key, Duration::ZERO, Duration::ZERO);
        TimeoutsConfig {
            idle_session: time("idle_session"),
            idle_in_transaction: time("idle_in_transaction"),
            transaction: time("transaction"),
        }
    }

    fn replication(&mut self, top: &Section<'_>) -> ReplicationConfig {
        let section = self.child(top, "replication");
        ReplicationConfig {
            max_connections: self.number(&section, "max_connections", 0..=100_000, 10) as usize,
        }
    }

    fn quorum_reads(&mut self, consistency: &Section<'_>, nodes: &[NodeConfig]) -> Option<QuorumReads> {
        let (tree, trail) =
            consistency.get("quorum_reads").filter(|(tree, _)| !matches!(tree, Tree::Null))?;
        let section = self.section("consistency.quorum_reads", tree, trail);
        let mut replicas = Vec::new();
        for name in self.names(&section, "replicas") {
            match nodes.iter().position(|node| node.name == name).and_then(|at| u16::try_from(at).ok()) {
                Some(at) if !replicas.contains(&at) => replicas.push(at),
                Some(_) => self.wrong(&section.trail, "a node is named twice"),
                None => self.wrong(&section.trail, "a name is none of the nodes'"),
            }
        }
        let most = replicas.len().max(1) as u64;
        let applied_by = self.number(&section, "applied_by", 1..=most, 1) as usize;
        (!replicas.is_empty()).then_some(QuorumReads { replicas, applied_by })
    }

    fn consistency(&mut self, top: &Section<'_>, nodes: &[NodeConfig]) -> ConsistencyConfig {
        let section = self.child(top, "consistency");
        let says = self.promise_words(&section);
        let least = Duration::from_micros(100);
        let config = ConsistencyConfig {
            promise: says.over(Promise::default()),
            rules: self.consistency_rules(&section),
            quorum_reads: self.quorum_reads(&section, nodes),
            primary_read_cap: self.number(&section, "primary_read_cap", 0..=100, 100) as u32,
            primary_read_wait: self.time(
                &section,
                "primary_read_wait",
                Duration::from_secs(1),
                Duration::ZERO,
            ),
            named_sessions: self.number(&section, "named_sessions", 1..=10_000_000, 100_000) as usize,
            named_session_idle: self.time(
                &section,
                "named_session_idle",
                Duration::from_secs(3600),
                Duration::from_secs(1),
            ),
            max_lag: self.time(&section, "max_lag", Duration::from_secs(10), least),
            catch_up_wait: self.time(&section, "catch_up_wait", Duration::from_millis(20), Duration::ZERO),
            sample_interval: self.time(&section, "sample_interval", Duration::from_millis(20), least),
            sample_gap: self.time(&section, "sample_gap", Duration::from_millis(1), least),
            clock_tolerance: self.time(&section, "clock_tolerance", Duration::from_millis(1), Duration::ZERO),
        };
        if config.sample_gap > config.sample_interval {
            let at = section.get("sample_gap").or(section.get("sample_interval"));
            let at = at.map_or(section.trail.clone(), |(_, t)| t);
            self.wrong(&at, "sample_gap may not be longer than sample_interval");
        }
        config
    }

    /// `level` and `on_stale`.
    fn promise_words(&mut self, section: &Section<'_>) -> Override {
        let levels: Vec<(&str, Option<Level>)> =
            Level::WORDS.iter().zip(Level::ALL).map(|(word, level)| (*word, Some(level))).collect();
        let stale: Vec<(&str, Option<OnStale>)> =
            OnStale::WORDS.iter().zip(OnStale::ALL).map(|(word, value)| (*word, Some(value))).collect();
        Override {
            level: self.choice(section, "level", &levels, &[], None),
            on_stale: self.choice(section, "on_stale", &stale, &[], None),
            max_lag: None,
            route: None,
            quorum_read: None,
        }
    }

    fn routing_rules(&mut self, section: &Section<'_>) -> Vec<RoutingRule> {
        let routes: Vec<(&str, Option<Route>)> =
            Route::WORDS.iter().zip(Route::ALL).map(|(word, route)| (*word, Some(route))).collect();
        let mut rules = Vec::new();
        for (tree, trail) in self.list(section, "rules") {
            let rule = self.section("routing.rules[]", tree, trail);
            let whom = self.whom(&rule);
            let split = rule.get("split").is_some().then(|| self.flag(&rule, "split", true));
            let route = self.choice(&rule, "route", &routes, &[], None);
            if split.is_none() && route.is_none() {
                self.wrong(&rule.trail, "the rule says nothing: give `split` or `route`");
            }
            rules.push(RoutingRule { whom, split, route });
        }
        rules
    }

    /// Whose sessions a rule is about.
    fn whom(&mut self, rule: &Section<'_>) -> Whom {
        let whom = Whom { user: self.text(rule, "user"), database: self.text(rule, "database") };
        if whom.user.is_none() && whom.database.is_none() {
            self.wrong(&rule.trail, "a rule is for a `user`, a `database`, or both");
        }
        whom
    }

    fn consistency_rules(&mut self, section: &Section<'_>) -> Vec<ConsistencyRule> {
        let mut rules = Vec::new();
        for (tree, trail) in self.list(section, "rules") {
            let rule = self.section("consistency.rules[]", tree, trail);
            let whom = self.whom(&rule);
            let mut says = self.promise_words(&rule);
            if let Some((tree, trail)) = rule.get("max_lag") {
                says.max_lag = match tree {
                    Tree::Text(text) => LagLimit::parse(text),
                    _ => None,
                };
                if says.max_lag.is_none() {
                    let message = "expected a time or a size, for example 250ms or 16MB";
                    self.wrong(&trail, format!("{message}, not {}", tree.kind()));
                }
            }
            if says == Override::default() {
                self.wrong(&rule.trail, "the rule says nothing: give `level`, `max_lag` or `on_stale`");
            }
            rules.push(ConsistencyRule { whom, says });
        }
        rules
    }

    fn durability(&mut self, top: &Section<'_>) -> DurabilityConfig {
        let section = self.child(top, "durability");
        let words: Vec<(&str, Option<Durability>)> =
            Durability::WORDS.iter().zip(Durability::ALL).map(|(word, value)| (*word, Some(value))).collect();
        let mut rules = Vec::new();
        for (tree, trail) in self.list(&section, "rules") {
            let rule = self.section("durability.rules[]", tree, trail);
            let whom = Whom { user: self.text(&rule, "user"), database: self.text(&rule, "database") };
            let table = self.text(&rule, "table").map(|name| match name.split_once('.') {
                Some((schema, table)) => (Some(schema.to_owned()), table.to_owned()),
                None => (None, name),
            });
            if whom.user.is_none() && whom.database.is_none() && table.is_none() {
                self.wrong(
                    &rule.trail,
                    "a rule is for a `user`, a `database`, a `table`, or several of them",
                );
            }
            match self.choice(&rule, "durability", &words, &[], None) {
                Some(durability) => rules.push(DurabilityRule { whom, table, durability }),
                None => self.wrong(&rule.trail, "the rule says nothing: give `durability`"),
            }
        }
        let words: Vec<_> = std::iter::once(("server", None)).chain(words).collect();
        DurabilityConfig { default: self.choice(&section, "default", &words, &[], None), rules }
    }

    fn routing(&mut self, top: &Section<'_>, nodes: &[NodeConfig]) -> RoutingConfig {
        let section = self.child(top, "routing");
        let words = [("primary", Transactions::Primary), ("split", Transactions::Split)];
        let transactions = self.choice(&section, "transactions", &words, &[], Transactions::Primary);
        let places = [("replica", true), ("primary", false)];
        let read_only_on_replicas = self.choice(&section, "read_only_transactions", &places, &[], true);
        let functions = match section.get("functions") {
            Some((tree, trail)) => self.section("routing.functions", tree, trail),
            None => Section { trail: section.trail.clone(), entries: &[] },
        };
        let functions = FunctionOverrides {
            safe: self.names(&functions, "safe"),
            primary: self.names(&functions, "primary"),
            extensions: self.names(&functions, "extensions"),
        };
        if let Some(both) = functions.safe.iter().find(|name| functions.primary.contains(name)) {
            let message = format!("{both} is safe and belongs on the primary");
            self.found.push((section.trail.clone(), message));
        }
        RoutingConfig {
            split: self.flag(&section, "split", true),
            transactions,
            read_only_on_replicas,
            shadow: self.flag(&section, "shadow", false),
            rules: self.routing_rules(&section),
            functions,
            zone: self.own_zone(&section, nodes),
        }
    }

    /// A list of texts.
    fn names(&mut self, section: &Section<'_>, key: &str) -> Vec<String> {
        let items = self.list(section, key);
        items.into_iter().filter_map(|(tree, trail)| self.text_of(tree, &trail)).collect()
    }

    fn limits(&mut self, top: &Section<'_>) -> LimitsConfig {
        let section = self.child(top, "limits");
        let (kib, mib) = (1024, 1024 * 1024);
        LimitsConfig {
            unit_hold: self.size(&section, "unit_hold", 256 * kib, kib..=64 * mib),
            statement_text: self.size(&section, "statement_text", mib, kib..=256 * mib),
            statements_per_session: self.number(&section, "statements_per_session", 1..=1_000_000, 5000)
                as usize,
            session_settings: self.size(&section, "session_settings", 16 * kib, 1..=mib),
            class_cache: self.number(&section, "class_cache", 1..=10_000_000, 10_000) as usize,
            databases: self.number(&section, "databases", 1..=100_000, 256) as usize,
            // The second parser's stack holds for 16 KiB of the worst text known; more would let a
            // client end the process by stack overflow.
            parser_text: self.size(&section, "parser_text", 16 * kib, 1..=16 * kib),
            parser_deadline: self.time(
                &section,
                "parser_deadline",
                Duration::from_millis(250),
                Duration::from_millis(1),
            ),
            admin_connections: self.number(&section, "admin_connections", 0..=1000, 3) as usize,
            statement_stats: self.number(&section, "statement_stats", 0..=100_000, 1000) as usize,
            nodes: self.number(&section, "nodes", 1..=MAX_NODES as u64, 16) as usize,
        }
    }

    fn failover(&mut self, top: &Section<'_>, nodes: &[NodeConfig]) -> FailoverConfig {
        let section = self.child(top, "failover");
        let words = [
            ("manual", FailoverMode::Manual),
            ("follow", FailoverMode::Follow),
            ("off", FailoverMode::Off),
            ("auto", FailoverMode::Auto),
        ];
        let mode = self.choice(&section, "mode", &words, &[], FailoverMode::Manual);
        let levels = [("async", DurabilityMode::Async), ("quorum", DurabilityMode::Quorum)];
        let durability = self.choice(&section, "durability", &levels, &[], DurabilityMode::Async);
        let told = [("error", LostWrite::Error), ("notice", LostWrite::Notice)];
        let state_dir = self.path(&section, "state_dir");
        let found_wrong = self.found.len();
        let coordination = self.coordination(&section, mode, state_dir.is_some());
        let at = section.get("mode").map_or(section.trail.clone(), |(_, trail)| trail);
        let alone = coordination.is_none() && self.found.len() == found_wrong;
        if mode == FailoverMode::Auto && state_dir.is_none() && alone {
            self.wrong(&at, "`auto` keeps what it does on disk: failover.state_dir is missing");
        }
        let fence = self.nested(&section, "fence", "failover.fence");
        let least = Duration::from_millis(1);
        let seconds = Duration::from_secs;
        FailoverConfig {
            mode,
            durability,
            state_dir,
            check_interval: self.time(&section, "check_interval", Duration::from_millis(500), least),
            check_timeout: self.time(&section, "check_timeout", seconds(1), least),
            failure_threshold: self.number(&section, "failure_threshold", 1..=1000, 3) as u32,
            eject_time: self.time(&section, "eject_time", seconds(1), least),
            tcp_user_timeout: self.time(&section, "tcp_user_timeout", seconds(5), least),
            pause_timeout: self.time(&section, "pause_timeout", seconds(10), Duration::ZERO),
            max_paused: self.number(&section, "max_paused", 1..=1_000_000, 1000) as usize,
            kick_timeout: self.time(&section, "kick_timeout", seconds(2), least),
            restart_grace: self.time(&section, "restart_grace", seconds(10), Duration::ZERO),
            crash_loop_restarts: self.number(&section, "crash_loop_restarts", 1..=1000, 3) as u32,
            crash_loop_window: self.time(&section, "crash_loop_window", seconds(60), least),
            startup_grace: self.time(&section, "startup_grace", seconds(10), Duration::ZERO),
            sever_timeout: self.time(&section, "sever_timeout", seconds(3), least),
            promote_timeout: self.time(&section, "promote_timeout", seconds(60), least),
            max_lost_bytes: self.size(&section, "max_lost_bytes", 1 << 20, 0..=usize::MAX) as u64,
            min_failover_interval: self.time(&section, "min_failover_interval", seconds(300), Duration::ZERO),
            allow_minority: self.flag(&section, "allow_minority", false),
            lost_write: self.choice(&section, "lost_write", &told, &[], LostWrite::Error),
            candidates: self.candidates(&section, nodes),
            same_zone_only: self.flag(&section, "same_zone_only", true),
            fence_sql: self.flag(&fence, "sql", true),
            sync: self.sync(&section, nodes),
            coordination,
            slots: self.slots(&section, nodes),
        }
    }

    fn slots(&mut self, failover: &Section<'_>, nodes: &[NodeConfig]) -> SlotsConfig {
        let section = self.nested(failover, "slots", "failover.slots");
        let slots = SlotsConfig {
            manage: self.flag(&section, "manage", false),
            prefix: self.text(&section, "prefix").unwrap_or_else(|| "hw_".to_owned()),
            warn_above: self.size(&section, "warn_above", 1 << 30, 1..=usize::MAX) as u64,
        };
        let at = section.get("prefix").map_or(section.trail.clone(), |(_, trail)| trail);
        let odd = |c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if slots.prefix.is_empty() || slots.prefix.len() > 32 || slots.prefix.chars().any(odd) {
            self.wrong(&at, "expected 1 to 32 lower-case letters, digits and underscores");
        }
        for (index, node) in nodes.iter().enumerate().filter(|_| slots.manage) {
            let slot = slots.slot_of(&node.name);
            if slot.len() > 63 {
                self.wrong(
                    &at,
                    format!("the slot of `{}` would have a name of more than 63 letters", node.name),
                );
            }
            if let Some(other) = nodes[..index].iter().find(|other| slots.slot_of(&other.name) == slot) {
                let message = format!("`{}` and `{}` would both have the slot {slot}", other.name, node.name);
                self.wrong(&at, message);
            }
        }
        slots
    }

    fn candidates(&mut self, failover: &Section<'_>, nodes: &[NodeConfig]) -> Vec<CandidateConfig> {
        let mut candidates: Vec<CandidateConfig> = Vec::new();
        for (tree, trail) in self.list(failover, "candidates").into_iter().take(MAX_NODES) {
            let section = self.section("failover.candidates[]", tree, trail);
            let node = self.needed(&section, "node").unwrap_or_default();
            let priority = self.number(&section, "priority", 0..=1_000_000, 100) as u32;
            let at = section.get("node").map_or(section.trail.clone(), |(_, trail)| trail);
            if !node.is_empty() && !nodes.iter().any(|known| known.name == node) {
                self.wrong(&at, "no node has this name");
            }
            if candidates.iter().any(|other| other.node == node) {
                self.wrong(&at, format!("`{node}` is here twice"));
            }
            candidates.push(CandidateConfig { node, priority });
        }
        candidates
    }

    fn sync(&mut self, failover: &Section<'_>, nodes: &[NodeConfig]) -> SyncConfig {
        let section = self.nested(failover, "sync", "failover.sync");
        let num = self.number(&section, "num", 1..=100, 1) as u32;
        if section.has("num") && num as usize >= nodes.len().max(1) {
            let at = section.get("num").map_or(section.trail.clone(), |(_, trail)| trail);
            self.wrong(&at, "there are not so many standbys");
        }
        SyncConfig {
            manage: self.flag(&section, "manage", false),
            num,
            degrade_after: self.time(
                &section,
                "degrade_after",
                Duration::from_secs(5),
                Duration::from_millis(1),
            ),
            strict: self.flag(&section, "strict", false),
        }
    }

    fn log(&mut self, top: &Section<'_>) -> LogConfig {
        let section = self.child(top, "log");
        let words = [("text", LogFormat::Text), ("json", LogFormat::Json)];
        let format = self.choice(&section, "format", &words, &[], LogFormat::Text);
        let level = self.text(&section, "level").unwrap_or_else(|| "info".to_owned());
        if tracing_subscriber::EnvFilter::try_new(&level).is_err() {
            let at = section.get("level").map_or(section.trail.clone(), |(_, t)| t);
            self.wrong(
                &at,
                "expected error, warn, info, debug, trace, or a list as info,highwater::monitor=debug",
            );
        }
        LogConfig {
            format,
            level,
            slow_statement: self.time(&section, "slow_statement", Duration::ZERO, Duration::ZERO),
            slow_per_second: self.number(&section, "slow_per_second", 1..=100_000, 10) as u32,
            connections: self.flag(&section, "connections", false),
        }
    }
}

/// Reads a duration as the file writes it: `20ms`, `10s`, `5m`, `1h`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let count: u64 = text[..split].parse().ok()?;
    let micros = match &text[split..] {
        "us" => 1,
        "ms" => 1000,
        "s" => 1_000_000,
        "m" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return None,
    };
    count.checked_mul(micros).map(Duration::from_micros)
}

fn parse_size(text: &str) -> Option<usize> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let count: usize = text[..split].parse().ok()?;
    let unit: usize = match &text[split..] {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    count.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MINIMAL: &str = "nodes: [ { name: a, host: h } ]\ncontrol: { user: u }\n";
    const EXAMPLE: &str = include_str!("../config.yaml");

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, "f.yaml", &|name| (name == "PW").then(|| "hidden".to_owned()))
    }

    #[track_caller]
    fn check(extra: &str, expected: &str) {
        let error = parse(&format!("{MINIMAL}{extra}")).unwrap_err().to_string();
        assert!(error.lines().any(|line| line.starts_with(expected)), "{error}");
    }

    #[test]
    fn every_mistake_is_placed_exactly() {
        check(
            "pool: { sise: 3 }",
            "f.yaml:3:9: pool.sise: unknown key; perhaps size; allowed here: mode, size, ",
        );
        check("pool:\n  size: 0", "f.yaml:4:9: pool.size: expected a whole number from 1 to 100000");
        check("pool:\n  size: many", "f.yaml:4:9: pool.size: expected a whole number");
        check("pool: 3", "f.yaml:3:7: pool: expected a mapping, not this number");
        check("max_clients: 5\nmax_clients: 6", "f.yaml:4:1: max_clients: given twice");
        check(
            "pool: { query_wait_timeout: 0s }",
            "f.yaml:3:29: pool.query_wait_timeout: expected a time from",
        );
        check("pool: { query_wait_timeout: 10 }", "f.yaml:3:29: pool.query_wait_timeout: expected a time: ");
        check("limits: { unit_hold: 0 }", "f.yaml:3:22: limits.unit_hold: expected a size");
        check("auth: { source: list }", "f.yaml:3:17: auth.source: source `list` needs");
        check("client_tls: { cert: x }", "f.yaml:3:21: client_tls.cert: a certificate needs");
        check("client_tls: { mode: require }", "f.yaml:3:21: client_tls.mode: TLS towards");
        check("poll: { size: 3 }", "f.yaml:3:1: poll: unknown key; perhaps pool; allowed here:");
        check(
            "auth: { source: querry }",
            "f.yaml:3:17: auth.source: expected one of query, list, not this text; perhaps query",
        );
        check("listen: nowhere", "f.yaml:3:9: listen: expected host:port");
        check("http: 127.0.0.1:6432", "f.yaml:3:7: http: the same address");
        check("log: { level: 'a=b=c' }", "f.yaml:3:15: log.level: expected error");
        check("pool: { mode: statement }", "f.yaml:3:15: pool.mode: expected one of transaction, session");
        check("pool: { users: [ { size: 3 } ] }", "f.yaml:3:18: pool.users[0]: `name` is missing");
        check(
            "pool: { databases: [ { name: x }, { name: x, size: 1 } ] }",
            "f.yaml:3:43: pool.databases[1].name: listed twice",
        );
        check("consistency: { level: best }", "f.yaml:3:23: consistency.level: expected one of eventual,");
        check("consistency: { on_stale: fail }", "f.yaml:3:26: consistency.on_stale: expected one of wait,");
        check(
            "pool: { users: [ { name: x, max_clients: 0 } ] }",
            "f.yaml:3:42: pool.users[0].max_clients: exp",
        );
        check("reserved_clients: 1000", "f.yaml:3:19: reserved_clients: must be less than max_clients");
        check("reserved_clients: 1", "f.yaml:3:19: reserved_clients: reserved for nobody");
        check("listen_read_only: 127.0.0.1:6432", "f.yaml:3:19: listen_read_only: the same address");
        check("timeouts: { idle: 1s }", "f.yaml:3:13: timeouts.idle: unknown key");
        check(
            "consistency: { rules: [ { level: strong } ] }",
            "f.yaml:3:25: consistency.rules[0]: a rule is for",
        );
        check("consistency: { rules: [ { user: a } ] }", "f.yaml:3:25: consistency.rules[0]: the rule says");
        check(
            "consistency: { rules: [ { user: a, max_lag: 5 } ] }",
            "f.yaml:3:45: consistency.rules[0].max_lag: expected a time or a size",
        );
        check("routing: { rules: [ { split: false } ] }", "f.yaml:3:21: routing.rules[0]: a rule is for");
        check("routing: { rules: [ { user: a } ] }", "f.yaml:3:21: routing.rules[0]: the rule says");
        check(
            "routing: { rules: [ { user: a, route: near } ] }",
            "f.yaml:3:39: routing.rules[0].route: expected one of auto,",
        );
        check("routing: { transactions: both }", "f.yaml:3:26: routing.transactions: expected one of");
        check("failover: { mode: auto }", "f.yaml:3:19: failover.mode: `auto` keeps what it does on disk");
        check("failover: { durability: none }", "f.yaml:3:25: failover.durability: expected one of async");
        check("failover: { sync: { num: 7 } }", "f.yaml:3:26: failover.sync.num: there are not so many");
        check(
            "failover: { candidates: [ { node: z } ] }",
            "f.yaml:3:35: failover.candidates[0].node: no node has this name",
        );
        check("consistency: { sample_gap: 1s }", "f.yaml:3:28: consistency.sample_gap: sample_gap may not");
        check(
            "auth: { source: list, users: [ { name: x } ] }",
            "f.yaml:3:32: auth.users[0]: a password is missing",
        );
        check(
            "auth: { source: list, users: [ { name: x, password_env: NOPE } ] }",
            "f.yaml:3:57: auth.users[0].password_env: the environment variable named here is not set",
        );
        check(
            "auth: { source: list, users: [ { name: x, password: a, password_env: PW } ] }",
            "f.yaml:3:70: auth.users[0].password_env: give only one",
        );
    }

    #[test]
    fn what_is_said_of_a_user_goes_before_what_is_said_of_a_database() {
        let text = "pool: { size: 7, users: [ { name: etl, mode: session }, { name: app, size: 3 } ], \
                    databases: [ { name: shop, mode: transaction, size: 5, max_clients: 9 } ] }";
        let pool = parse(&format!("{MINIMAL}{text}")).unwrap().pool;
        assert_eq!((pool.mode_of("shop", "etl"), pool.size_of("shop", "etl")), (PoolMode::Session, 5));
        assert_eq!((pool.mode_of("shop", "app"), pool.size_of("shop", "app")), (PoolMode::Transaction, 3));
        assert_eq!((pool.mode_of("else", "who"), pool.size_of("else", "who")), (PoolMode::Transaction, 7));
        assert_eq!(pool.databases[0].max_clients, Some(9));
    }

    #[test]
    fn nodes_are_checked() {
        let all =
            |nodes: &str| parse(&format!("control: {{ user: u }}\nnodes:\n{nodes}")).unwrap_err().to_string();
        assert!(all("  - { name: a, host: h, port: 0 }").starts_with("f.yaml:3:31: nodes[0].port: expected"));
        assert!(all("  - { name: a, host: h, weight: -1 }").starts_with("f.yaml:3:33: nodes[0].weight: "));
        let twice = all("  - { name: a, host: h }\n  - { name: a, host: h }");
        assert!(twice.contains("f.yaml:4:13: nodes[1].name: another node"), "{twice}");
        assert!(twice.contains("f.yaml:4:22: nodes[1].host: node `a` already"), "{twice}");
        assert!(all("  []").starts_with("f.yaml:3:3: nodes: expected at least one node"));
        assert!(all("  - { name: a }").contains("nodes[0]: `host` is missing"));
        let empty = parse("# nothing\n").unwrap_err().to_string();
        assert!(parse("").unwrap_err().to_string().contains("expected a mapping"));
        assert!(empty.contains("expected a mapping, not nothing"), "{empty}");
    }

    #[test]
    fn all_problems_are_reported_at_once_in_order() {
        let error = parse("workers: 0\nbogus: 1\nlisten: 4\n").unwrap_err();
        let lines: Vec<_> = error.problems.iter().map(|p| p.line).collect();
        assert!(lines.is_sorted() && lines.len() == 5, "{error}");
    }

    #[test]
    fn secrets_come_from_the_environment_or_a_file_and_are_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pw");
        std::fs::write(&file, "from file\n").unwrap();
        let text = format!(
            "nodes: [ {{ name: a, host: h }} ]\ncontrol: {{ user: u, password_env: PW }}\n\
             auth: {{ source: list, users: [ {{ name: x, password_file: '{}' }} ] }}",
            file.display()
        );
        let config = parse(&text).unwrap();
        assert_eq!(config.control.password, Some(Secret("hidden".to_owned())));
        assert_eq!(config.auth.users[0].password, Secret("from file".to_owned()));
        assert!(!format!("{config:?}").contains("hidden"));
        let error = parse("control: { user: u, password: 12345 }").unwrap_err().to_string();
        assert!(error.contains("control.password: expected text") && !error.contains("12345"), "{error}");
    }

    #[test]
    fn http_that_others_reach_without_a_token_is_warned_of() {
        let with = |text: &str| parse(&format!("{text}\n{MINIMAL}")).unwrap();
        for quiet in ["http: 127.0.0.1:1", "http: '[::1]:1'", "http: localhost:1", "http: null"] {
            assert!(with(quiet).warnings.is_empty(), "{quiet}");
        }
        for open in ["http: 0.0.0.0:1", "http: '[::]:1'", "http: example.net:1"] {
            assert!(with(open).warnings[0].contains("set http_token"), "{open}");
            assert!(with(&format!("{open}\nhttp_token_env: PW")).warnings.is_empty(), "{open}");
        }
        assert_eq!(with("http_token: abc").http_token, Some(Secret("abc".to_owned())));
        let error = parse(&format!("http_history: 2h\n{MINIMAL}")).unwrap_err().to_string();
        assert!(error.contains("http_history: expected a time from 60s to 3600s"), "{error}");
    }

    #[test]
    fn a_secret_under_a_wrong_key_is_not_shown() {
        const SECRET: &str = "hunter2x";
        let texts = SECTIONS.iter().flat_map(|(section, keys)| {
            keys.iter().flat_map(move |key| {
                let name = section.trim_end_matches("[]");
                [format!("{key}: {SECRET}"), format!("{key}: [ {SECRET} ]"), format!("{key}: {{ {SECRET} }}")]
                    .map(|entry| match *section {
                        "" => entry,
                        "auth.users[]" => format!("auth: {{ source: list, users: [ {{ {entry} }} ] }}"),
                        "nodes[]" => format!("nodes: [ {{ {entry} }} ]"),
                        "consistency.rules[]" => format!("consistency: {{ rules: [ {{ {entry} }} ] }}"),
                        "routing.rules[]" => format!("routing: {{ rules: [ {{ {entry} }} ] }}"),
                        "failover.candidates[]" => format!("failover: {{ candidates: [ {{ {entry} }} ] }}"),
                        "failover.fence" => format!("failover: {{ fence: {{ {entry} }} }}"),
                        "failover.sync" => format!("failover: {{ sync: {{ {entry} }} }}"),
                        "failover.coordination" => format!("failover: {{ coordination: {{ {entry} }} }}"),
                        "durability.rules[]" => format!("durability: {{ rules: [ {{ {entry} }} ] }}"),
                        "consistency.quorum_reads" => {
                            format!("consistency: {{ quorum_reads: {{ {entry} }} }}")
                        }
                        _ => format!("{name}: {{ {entry} }}"),
                    })
            })
        });
        let more = [
            format!("control: {{ user: u, password: abc,{SECRET} }}"),
            format!("control: {{ user: u, password: abc: {SECRET} }}"),
            format!("control: {{ user: u, password: !{SECRET} }}"),
            format!("control: {{ user: u, password: *{SECRET} }}"),
            format!("control: {{ user: u, password: &{SECRET} }}"),
            format!("control: {{ user: u, password: \"\\{SECRET}\" }}"),
            format!("control: {{ user: u, password: '{SECRET} }}"),
            format!("control: {SECRET}"),
            format!("control: {{ user: u, password: [ {SECRET} ] }}"),
        ];
        let mut refused = 0;
        for text in texts.chain(more) {
            // Without another problem beside it, so that an accepted text is no error at all.
            let has = |key: &str| text.starts_with(key);
            let rest: Vec<&str> = MINIMAL.lines().filter(|l| !has(&l[..5])).collect();
            if let Err(error) = parse(&format!("{text}\n{}", rest.join("\n"))) {
                refused += 1;
                let shown = error.to_string();
                // A key of a section without secrets is shown: that is how a misspelt one is found.
                let shown = shown.replace(&format!(".{SECRET}: unknown key; allowed"), "");
                assert!(!shown.contains(SECRET), "{text}: {shown}");
            }
        }
        assert!(refused > 100, "{refused}");
    }

    #[test]
    fn the_most_telling_rule_has_the_last_word() {
        let config = parse(&format!(
            "consistency:\n  level: read_your_writes\n  rules:\n  \
               - {{ database: d, level: eventual, max_lag: 16MB }}\n  \
               - {{ user: u, level: strong }}\n  \
               - {{ user: u, level: global }}\n  \
               - {{ user: u, database: e, on_stale: error }}\n{MINIMAL}"
        ))
        .unwrap();
        let level = |user, database| config.consistency.promise_for(user, database).level;
        assert_eq!(level("x", "y"), Level::ReadYourWrites);
        assert_eq!(level("x", "d"), Level::Eventual);
        assert_eq!(level("u", "d"), Level::Strong);
        let both = config.consistency.promise_for("u", "e");
        assert_eq!((both.level, both.on_stale), (Level::Strong, OnStale::Error));
        assert_eq!(config.consistency.promise_for("u", "d").max_lag, Some(LagLimit::Bytes(16 << 20)));
    }

    #[test]
    fn routing_rules_are_as_telling() {
        let config = parse(&format!(
            "routing:\n  rules:\n  - {{ database: d, split: false, route: replica }}\n  - {{ user: u, split: true }}\n  \
               - {{ user: u, route: primary, database: e }}\n{MINIMAL}"
        ))
        .unwrap();
        let of = |user, database| config.routing.for_session(user, database);
        assert_eq!(of("x", "y"), (true, Route::Auto));
        assert_eq!(of("x", "d"), (false, Route::Replica));
        assert_eq!(of("u", "d"), (true, Route::Replica));
        assert_eq!(of("u", "e"), (true, Route::Primary));
    }

    #[test]
    fn what_has_no_effect_yet_is_accepted_with_a_warning() {
        let design = "listen: 127.0.0.1:6432\n\
            http: 127.0.0.1:9632             # /metrics /healthz /readyz /topology\n\
            workers: 2                       # I/O threads; default: one per core\n\
            max_clients: 1000\n\
            nodes:                           # roles are discovered\n  \
              - { name: a, host: 127.0.0.1, port: 5432 }\n  \
              - { name: b, host: 127.0.0.1, port: 5433 }\n\
            control: { user: highwater, password: secret, database: postgres }\n\
            auth:\n  \
              source: query                  # query: verifiers from the primary | list: the users below\n  \
              users: [ { name: app, password: secret } ]\n  \
              admins: [ highwater ]\n\
            client_tls: { mode: disable }    # disable | prefer | require; cert, key, ca\n\
            node_tls: { mode: prefer }       # libpq's sslmode words; ca\n\
            pool: { mode: transaction, size: 20 }      # backends per (node, database, user)\n\
            consistency: { level: session, max_lag: 10s, catch_up_wait: 20ms, on_stale: wait }\n\
            routing: { split: true, transactions: primary }   # transactions: primary | split\n\
            failover: { mode: manual, durability: async, state_dir: ./state }\n";
        let config = parse(design).unwrap();
        assert_eq!(config.warnings.len(), 1, "{:?}", config.warnings);
        assert!(
            config.warnings[0].starts_with("f.yaml:11:10: auth.users: not used"),
            "{:?}",
            config.warnings
        );
        assert_eq!(config.auth.users.len(), 1);
        assert!(parse(EXAMPLE).unwrap().warnings.is_empty());
    }

    #[test]
    fn bombs_and_depth_and_garbage_end_in_an_error() {
        let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for i in 1..9 {
            let prior = format!("*a{},", i - 1).repeat(10);
            bomb.push_str(&format!("a{i}: &a{i} [{prior}]\n"));
        }
        assert!(parse(&bomb).is_err());
        assert!(parse(&"[".repeat(5000)).is_err());
        assert!(parse(&"#".repeat(MAX_FILE as usize + 1)).is_err());
        let error = parse("a: [1,\nb: {").unwrap_err();
        assert!(error.problems[0].line > 0, "{error}");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.yaml");
        std::fs::write(&file, b"listen: x\nhttp: \xff").unwrap();
        let error = Config::load(&file).unwrap_err();
        assert_eq!((error.problems[0].line, error.problems[0].column), (2, 7));
    }

    #[test]
    fn zones_are_names_and_the_proxys_own_is_one_of_the_nodes() {
        let file = |zone: &str, own: &str| {
            let text = format!(
                "nodes: [ {{ name: a, host: h, zone: {zone} }}, {{ name: b, host: i }} ]\n\
                 control: {{ user: u, password: p }}\nrouting: {{ zone: {own} }}"
            );
            parse(&text)
        };
        let good = file("eu-1", "eu-1").unwrap();
        assert_eq!((good.nodes[0].zone.as_deref(), good.nodes[1].zone.as_deref()), (Some("eu-1"), None));
        assert_eq!([0, 1, 2].map(|index| good.is_near(index)), [true, false, false]);
        assert!(good.failover.same_zone_only && good.warnings.is_empty());
        let untold = file("eu-1", "null").unwrap();
        assert!(!untold.is_near(0) && !untold.is_near(1), "nobody is near to nowhere");
        let elsewhere = file("eu-1", "eu-2").unwrap();
        assert!(elsewhere.warnings[0].contains("routing.zone: no node is in this zone"), "{elsewhere:?}");
        let error = file("'eu 1'", "'ü'").unwrap_err().to_string();
        assert!(
            error.contains("nodes[0].zone: expected 1 to 63") && error.contains("routing.zone: "),
            "{error}"
        );
    }

    #[test]
    fn each_node_has_a_slot_of_its_own() {
        let file = |other: &str, slots: &str| {
            let text = format!(
                "nodes: [ {{ name: Db-1, host: h }}, {{ name: {other}, host: i }} ]\n\
                 control: {{ user: u, password: p }}\nfailover: {{ slots: {{ manage: true{slots} }} }}"
            );
            parse(&text)
        };
        let slots = file("b", "").unwrap().failover.slots;
        assert_eq!([slots.slot_of("Db-1"), slots.slot_of("b")], ["hw_db_1", "hw_b"]);
        for (other, given, why) in [
            ("db.1", "", "would both have the slot hw_db_1"),
            ("b", ", prefix: Hw", "lower-case letters"),
            ("b", ", prefix: \"hw'\"", "lower-case letters"),
        ] {
            let error = file(other, given).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn the_example_names_every_key_and_states_the_defaults() {
        let example = parse(EXAMPLE).unwrap();
        let minimal: String = EXAMPLE
            .lines()
            .skip_while(|l| !l.starts_with("nodes:"))
            .take_while(|l| !l.starts_with("auth:"))
            .collect::<Vec<_>>()
            .join("\n");
        assert_eq!(format!("{:#?}", parse(&minimal).unwrap()), format!("{example:#?}"));
        for (section, keys) in SECTIONS {
            for key in *keys {
                assert!(EXAMPLE.contains(&format!("{key}:")), "config.yaml lacks {section}.{key}");
            }
        }
    }

    #[test]
    fn the_least_configuration_of_the_readme_loads() {
        let readme = include_str!("../README.md");
        let text = readme.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        let env = |name: &str| (name == "HIGHWATER_PASSWORD").then(|| "x".to_owned());
        assert_eq!(Config::parse(text, "README.md", &env).unwrap().nodes.len(), 2);
    }

    #[test]
    fn the_configurations_of_the_migration_page_load() {
        let page = include_str!("../docs/MIGRATION.md");
        let env = |name: &str| (name == "HIGHWATER_PASSWORD").then(|| "x".to_owned());
        let blocks: Vec<&str> =
            page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        assert_eq!(blocks.len(), 3);
        for block in blocks {
            let config = Config::parse(block, "MIGRATION.md", &env).unwrap_or_else(|e| panic!("{e}"));
            assert!(config.nodes.len() >= 2 && config.warnings.is_empty(), "{:?}", config.warnings);
        }
    }

    #[test]
    fn the_reference_page_describes_every_key() {
        let page = include_str!("../docs/CONFIGURATION.md");
        let mut described: Vec<&str> =
            page.lines().filter_map(|l| l.strip_prefix("| `")?.split('`').next()).collect();
        let mut keys = Vec::new();
        for (section, names) in SECTIONS {
            let dot = if section.is_empty() { "" } else { "." };
            keys.extend(names.iter().map(|name| format!("{section}{dot}{name}")));
        }
        described.sort_unstable();
        keys.sort_unstable();
        assert_eq!(described, keys);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[ -~\n]{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn durations_are_exact(count in 0u64..1_000_000) {
            prop_assert_eq!(parse_duration(&format!("{count}ms")), Some(Duration::from_millis(count)));
            prop_assert_eq!(parse_duration(&format!("{count}")), None);
        }

        #[test]
        fn a_bad_node_port_is_placed_on_its_line(good in 0usize..20, pad in 1usize..8) {
            let mut text = "control: { user: u }\nnodes:\n".to_owned();
            for i in 0..good {
                text.push_str(&format!("  - {{ name: n{i}, host: h{i} }}\n"));
            }
            text.push_str(&format!("  - name: bad\n    host: bad\n    port:{}70000\n", " ".repeat(pad)));
            let error = parse(&text).unwrap_err();
            prop_assert_eq!((error.problems[0].line, error.problems[0].column), (good + 5, 10 + pad));
        }
    }
}
