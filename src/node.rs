//! Our own questions and orders to a node, in SQL, over `tokio-postgres` and `deadpool-postgres`; but where a node is, which
//! is asked thousands of times a second, over connections that speak the protocol themselves ([`SampleClient`]).
//!
//! Promises: every connection and every answer has a deadline; connections are bounded (two per node
//! and database in the pools, and a bounded number of pools); a failure says what kind it is, because a
//! refused connection, a frozen server and one that is starting mean different things.
//!
//! Deliberately does not: decide anything, retry, or carry statements of clients.

// What a replica says of its positions and its history, in this order, of an ARRAY.
macro_rules! replica {
    () => {
        "'replica', \
  pg_last_wal_receive_lsn()::text, pg_last_wal_replay_lsn()::text, \
  (SELECT received_tli::text FROM pg_stat_get_wal_receiver()), \
  (current_setting('restore_command') <> '')::text, \
  CASE WHEN NOT EXISTS (SELECT FROM pg_stat_get_wal_receiver() WHERE received_tli > 0) \
         AND has_function_privilege('pg_ls_waldir()', 'execute') \
       THEN (SELECT coalesce(max(left(name, 8)), '00000001') FROM pg_ls_waldir() \
             WHERE name ~ '^[0-9A-F]{8}[.]history$') END"
    };
}

mod answer;
mod defaults;
mod sampling;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use deadpool_postgres::{
    Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime, TimeoutType,
};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::{Client, Row, SimpleQueryMessage, Statement};

use crate::config::FunctionOverrides;
use crate::config::live::LiveConfig;
use crate::net::{Keepalive, NodeTls};
use crate::topology::{NodeId, Recovery};
use crate::wal::{Lsn, TimelineHistory, TimelineId, round_down_page_header, whole_until};

pub use defaults::RESULT_SETTINGS;
pub use sampling::SampleClient;

/// Connections at most per (node, database) of the shared pools.
const POOL_CONNECTIONS: usize = 2;
/// Pools at most; beyond, the one not used for longest is closed.
const MAX_POOLS: usize = 128;
/// Settings that a role's or database's defaults must not change under our questions: names resolve
/// to the server's own, and a standby refuses every statement under `serializable`.
const SETTINGS: &str = "-c search_path=pg_catalog -c default_transaction_isolation=read\\ committed -c idle_session_timeout=0 -c jit=off";

/// The name of our connections.
const APPLICATION: &str = "highwater";
/// An idle connection to a node that has vanished is noticed sooner than those of sessions are.
const KEEPALIVE: Keepalive =
    Keepalive { idle: Duration::from_secs(10), interval: Duration::from_secs(5), probes: 3 };

/// What kind of failure a node gave: health weighs them differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeFailure {
    /// Nobody listens there: hard evidence that no server runs.
    Refused,
    /// No answer before the deadline, or the network lost it: frozen, overloaded or cut off.
    Timeout,
    /// The server says that it is starting up, shutting down or recovering (57P03): not dead.
    Starting,
    /// An idle connection was ended at an administrator's word: shut down, or restarted, or only that session.
    ShuttingDown,
    /// The connection broke.
    Broken,
    /// The server answered, with an error: it lives, but does not let us look.
    Answered,
}

impl NodeFailure {
    /// What the server's error with this SQLSTATE shows.
    fn of_answer(sqlstate: &[u8]) -> NodeFailure {
        match sqlstate {
            b"57P03" => NodeFailure::Starting,
            b"57P01" | b"57P02" => NodeFailure::Broken,
            _ => NodeFailure::Answered,
        }
    }

    /// What the failure of a socket shows.
    fn of_io(error: &std::io::Error) -> NodeFailure {
        match error.kind() {
            std::io::ErrorKind::ConnectionRefused => NodeFailure::Refused,
            std::io::ErrorKind::TimedOut => NodeFailure::Timeout,
            _ => NodeFailure::Broken,
        }
    }

    /// One word for a metric label or a log field.
    pub fn label(self) -> &'static str {
        match self {
            NodeFailure::Refused => "refused",
            NodeFailure::Timeout => "timeout",
            NodeFailure::Starting => "starting",
            NodeFailure::ShuttingDown => "shutting_down",
            NodeFailure::Broken => "broken",
            NodeFailure::Answered => "answered",
        }
    }
}

/// A question to a node failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeError {
    /// The node's name.
    pub node: String,
    /// What went wrong.
    pub cause: String,
    /// Of what kind it is.
    pub kind: NodeFailure,
}

impl fmt::Display for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}: {}", self.node, self.cause)
    }
}

impl std::error::Error for NodeError {}

/// What a primary said of its positions, in the order in which it was read: a transaction whose commit
/// record lies below `insert` is out of the snapshot's way, in `snapshot.xip`, or in
/// `snapshot.xmax..next_xid`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrimarySample {
    /// Who was running, read first.
    pub snapshot: Snapshot,
    /// The insert position, rounded down over page and segment headers.
    pub insert: Lsn,
    /// The flush position.
    pub flush: Lsn,
    /// The next transaction id to be given, widened to 64 bits, read last.
    pub next_xid: u64,
    /// The timeline it writes.
    pub timeline: TimelineId,
}

/// PostgreSQL's `pg_snapshot`, without its `xmin`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The first transaction id that had not completed, nor any after it.
    pub xmax: u64,
    /// The transactions below `xmax` that were running, ascending.
    pub xip: Vec<u64>,
}

impl Snapshot {
    /// Reads `xmin:xmax:xip,xip,...`; `None`: it is not that.
    pub fn parse(text: &str) -> Option<Snapshot> {
        let mut parts = text.splitn(3, ':');
        let _xmin: u64 = parts.next()?.parse().ok()?;
        let xmax = parts.next()?.parse().ok()?;
        let list = parts.next()?;
        let mut xip = Vec::new();
        for xid in list.split(',').filter(|x| !x.is_empty()) {
            xip.push(xid.parse().ok()?);
        }
        xip.sort_unstable();
        Some(Snapshot { xmax, xip })
    }
}

/// A 32-bit transaction id that is at or after `reference`, in 64 bits.
pub fn widen_xid(next: u32, reference: u64) -> u64 {
    let same_epoch = (reference & !0xFFFF_FFFF) | u64::from(next);
    if same_epoch < reference { same_epoch.saturating_add(1 << 32) } else { same_epoch }
}

/// What a replica said of its positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaSample {
    /// The last position received and synced, if a walreceiver has run.
    pub receive: Option<Lsn>,
    /// The last position replayed; `None` while recovery has not replayed anything.
    pub replay: Option<Lsn>,
    /// The timeline that its walreceiver receives; `None` while none runs.
    pub received_timeline: Option<TimelineId>,
    /// Whether WAL may also come from an archive (`restore_command`), on whatever timeline.
    pub archive: bool,
    /// Only while no walreceiver runs: the latest timeline whose history file is in `pg_wal`, 1 for none.
    /// `None` also when the control user may not list that directory (`pg_monitor` may).
    pub newest_history: Option<TimelineId>,
    /// The process of its walreceiver, read last; `None` while none runs.
    pub receiver: Option<u32>,
}

/// One answer to a sampler's question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SampleAnswer {
    /// The node was not in recovery.
    Primary(PrimarySample),
    /// The node was in recovery.
    Replica(ReplicaSample),
}

/// One start of a server, crash-restarts included, and what it found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Tells it from every other start of this server.
    pub id: Arc<str>,
    /// Where recovery ended, or the shutdown before: what lay beyond is gone. `None`: there has been another
    /// checkpoint since, so that it cannot be known.
    pub end: Option<Lsn>,
    /// Up to here all that had been logged is there; at `end` or a little before it ([`whole_until`]).
    pub whole: Option<Lsn>,
    /// The server had been shut down in order: nothing that it ever acknowledged is gone.
    pub clean: bool,
    /// When it began; not earlier than this by more than a round trip.
    pub began: Instant,
}

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeAnswer {
    /// The identity of the cluster that the node's data belongs to.
    pub system_identifier: u64,
    /// The server's major version, for example 15.
    pub server_major: u16,
    /// What it was doing.
    pub role: ProbedRole,
}

/// What a probed node was doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbedRole {
    /// It takes writes.
    Primary {
        /// The insert position, rounded.
        insert: Lsn,
        /// The timeline it writes.
        timeline: TimelineId,
        /// Whether it is read-only to sessions that do not insist: fenced.
        read_only: bool,
    },
    /// It replays.
    Replica {
        /// Its positions and its walreceiver's timeline.
        positions: ReplicaSample,
        /// The walreceiver's status (`streaming`, `waiting`, ...); `None`: none runs.
        walreceiver: Option<String>,
        /// That walreceiver, as far as it can be told from others.
        receiver: Option<Receiver>,
        /// What holds its replay up.
        recovery: Recovery,
    },
}

/// A walreceiver and whom it receives from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receiver {
    /// Its process.
    pub pid: u32,
    /// The sender's host, as the walreceiver was told it.
    pub host: Option<String>,
    /// The sender's port.
    pub port: Option<u16>,
}

/// What a replica said of transactions that a primary still lists as running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotCommitted {
    /// Its replay position, read before the transactions' states were.
    pub replay: Lsn,
    /// Its walreceiver's timeline; `None`: it is not known which history `replay` belongs to.
    pub timeline: Option<TimelineId>,
    /// Those of the transactions asked for that had not committed at `replay`.
    pub xids: Vec<u64>,
}

const PROBE: &str = concat!(
    "\
SELECT (SELECT system_identifier FROM pg_control_system()), \
  current_setting('server_version_num')::int4, \
  CASE WHEN pg_is_in_recovery() THEN ARRAY[",
    replica!(),
    ", \
    (SELECT status FROM pg_stat_get_wal_receiver()), \
    (extract(epoch FROM current_setting('recovery_min_apply_delay')::interval) * 1000)::bigint::text, \
    pg_is_wal_replay_paused()::text, \
    (SELECT sum(confl_tablespace + confl_lock + confl_snapshot + confl_bufferpin + confl_deadlock)::text \
     FROM pg_stat_database_conflicts), \
    (SELECT pid::text FROM pg_stat_get_wal_receiver()), \
    (SELECT sender_host FROM pg_stat_get_wal_receiver()), \
    (SELECT sender_port::text FROM pg_stat_get_wal_receiver())] \
  ELSE ARRAY['primary', pg_current_wal_insert_lsn()::text, \
    left(pg_walfile_name(pg_current_wal_insert_lsn()), 8), \
    (current_setting('default_transaction_read_only') = 'on')::text] END, \
  (extract(epoch FROM clock_timestamp()) * 1000000)::int8"
);

// A crash of any backend restarts all processes but the postmaster, whose start time stays: the checkpointer's
// tells of it. The checkpoint at the end of recovery, or of a shutdown, has its redo position at itself; any
// other one has WAL between the two. Its time is in whole seconds: one before the postmaster started is that of
// a clean shutdown.
const START: &str = "\
SELECT extract(epoch FROM pg_postmaster_start_time())::text || ' ' || \
    (SELECT extract(epoch FROM backend_start)::text FROM pg_stat_activity \
     WHERE backend_type = 'checkpointer'), \
  CASE WHEN c.checkpoint_lsn = c.redo_lsn THEN c.redo_lsn::text END, \
  c.checkpoint_lsn = c.redo_lsn AND c.checkpoint_time < date_trunc('second', pg_postmaster_start_time()), \
  (SELECT extract(epoch FROM clock_timestamp() - backend_start)::float8 FROM pg_stat_activity \
   WHERE backend_type = 'checkpointer') \
FROM pg_control_checkpoint() AS c";

// Sizes of a WAL page and segment in bytes.
const WAL_SIZES: &str = "\
SELECT current_setting('wal_block_size')::int8, pg_size_bytes(current_setting('wal_segment_size'))";

const HISTORY: &str = "SELECT pg_read_file($1, 0, 1048576, true)";

// Each step depends on the one before it, so the order is position, next id, states. `age` shows the next
// id that replay has heard of; it is widened by the snapshot's, which is older and hence not above it.
// `pg_xact_status` raises for an id at or past it: that one has not committed there.
const NOT_COMMITTED: &str = "\
SELECT r.lsn::text, pg_is_in_recovery(), \
  (SELECT array_agg(x.xid) FROM unnest($1::int8[]) AS x (xid) WHERE r.lsn IS NOT NULL AND \
    CASE WHEN x.xid >= r.xmax + ((r.next - r.xmax) & 4294967295) THEN true \
         ELSE pg_xact_status(x.xid::text::xid8) <> 'committed' END), \
  (SELECT received_tli FROM pg_stat_get_wal_receiver()) \
FROM (SELECT p.lsn, pg_snapshot_xmax(pg_current_snapshot())::text::int8 AS xmax, \
        (age(CASE WHEN p.lsn IS NOT NULL THEN '3'::xid END)::int8 & 4294967295) + 3 AS next \
      FROM (SELECT pg_last_wal_replay_lsn() AS lsn OFFSET 0) AS p OFFSET 0) AS r";

/// Counts the changes of what a login gives a session (ALTER ROLE/DATABASE .. SET, ALTER SYSTEM): a backend of an earlier
/// count has other defaults than a client that logs in now would find.
#[derive(Debug, Default)]
pub struct LoginSettings {
    generation: AtomicU64,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// A hash of `pg_db_role_setting` as it was read last.
    content: Option<i64>,
    configured: defaults::Contents,
    changed_at: Option<Instant>,
}

impl LoginSettings {
    /// How many changes there have been.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// A session of ours has changed them.
    pub fn changed(&self) {
        self.seen().changed_at = Some(Instant::now());
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// `content` was read on the primary; databases take turns, and the first to see a change counts it.
    pub fn read(&self, content: i64) {
        let before = self.seen().content.replace(content);
        if before.is_some_and(|before| before != content) {
            self.changed();
        }
    }

    /// Whether a replica that is `late` may still give what was valid before the last change.
    pub fn changed_within(&self, late: Duration) -> bool {
        self.seen().changed_at.is_some_and(|at| at.elapsed() <= late)
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The control user's connections to the nodes.
pub struct Nodes {
    /// What logins give.
    pub login_settings: Arc<LoginSettings>,
    config: Arc<LiveConfig>,
    dialer: ArcSwap<Dialer>,
    pools: Mutex<HashMap<(NodeId, String), PoolEntry>>,
}

struct PoolEntry {
    pool: Pool,
    used: Instant,
}

impl Nodes {
    /// No connection is made yet.
    pub fn new(config: Arc<LiveConfig>, tls: &NodeTls) -> Arc<Nodes> {
        let dialer = ArcSwap::from_pointee(Dialer::new(tls));
        Arc::new(Nodes { login_settings: Arc::default(), config, dialer, pools: Mutex::new(HashMap::new()) })
    }

    /// Connections are made by this TLS, as the role and to the addresses that are in force, from now on. Pooled ones of
    /// before are closed as they come back: whoever waits for one gets it, so that no login fails of it.
    pub fn reconnect(&self, tls: &NodeTls) {
        self.dialer.store(Arc::new(Dialer::new(tls)));
        self.lock_pools().clear();
    }

    /// What the configuration says of functions, for those who read the databases' catalogs.
    pub fn functions(&self) -> FunctionOverrides {
        self.config.load().routing.functions.clone()
    }

    /// A connection of its own to `database` on `node` as the control user. Its task is spawned on the
    /// current runtime; `Client::is_closed` says when it has ended.
    ///
    /// Fails after `pool.connect_timeout` at the latest, login included.
    pub async fn connect(&self, node: NodeId, database: &str) -> Result<Client, NodeError> {
        let limit = self.config.load().pool.connect_timeout;
        Ok(self.dial_within(node, database, limit).await?.0)
    }

    /// A connection of its own to the control database of `node`, with our questions as prepared
    /// statements (probes). `deadline` bounds the connection with its login, and then each
    /// question.
    pub async fn open(&self, node: NodeId, deadline: Duration) -> Result<NodeClient, NodeError> {
        let settings = self.settings(node, &self.control_database())?;
        let told_to_end = Arc::new(AtomicBool::new(false));
        let (client, task) = self.dial(node, &settings, deadline, Some(&told_to_end)).await?;
        let connection = NodeClient {
            client,
            told_to_end,
            task: EndWithOwner(task),
            name: self.name(node),
            deadline,
            probe: None,
            start: None,
            wal_sizes: (0, 0),
        };
        connection.prepared().await
    }

    /// A connection of its own to the control database of `node`, for orders, under `application` as its name.
    pub async fn session(
        &self,
        node: NodeId,
        application: &str,
        deadline: Duration,
    ) -> Result<ControlSession, NodeError> {
        let mut settings = self.settings(node, &self.control_database())?;
        settings.application_name(application);
        let (client, task) = self.dial(node, &settings, deadline, None).await?;
        Ok(ControlSession { client, _task: EndWithOwner(task), name: self.name(node) })
    }

    /// A shared connection out of a small bounded pool per (node, database): auth query, catalog facts,
    /// the floor's question. It resolves unqualified names in `pg_catalog` only.
    ///
    /// Fails when none becomes free, or a new one cannot be made, within `pool.connect_timeout`.
    pub async fn client(&self, node: NodeId, database: &str) -> Result<Object, NodeError> {
        let pool = self.pool(node, database)?;
        pool.get().await.map_err(|error| match error {
            PoolError::Backend(error) => self.error(node, &error),
            PoolError::Timeout(TimeoutType::Wait) => {
                self.failure(node, NodeFailure::Answered, "all control connections are in use".to_owned())
            }
            PoolError::Timeout(_) => {
                self.failure(node, NodeFailure::Timeout, "connection timed out".to_owned())
            }
            other => self.failure(node, NodeFailure::Broken, other.to_string()),
        })
    }

    /// Closes pooled connections that nobody has used for `idle`, and forgets pools without any.
    pub fn close_idle(&self, idle: Duration) {
        self.lock_pools().retain(|_, entry| {
            entry.pool.retain(|_, metrics| metrics.last_used() < idle);
            entry.pool.status().size > 0 || entry.used.elapsed() < idle
        });
    }

    /// Closes the pooled connections to all databases but `except` and the control database.
    pub fn close_databases(&self, except: &str) {
        let control = self.control_database();
        self.lock_pools().retain(|(_, database), entry| {
            let keep = database == except || *database == control;
            if !keep {
                entry.pool.close();
            }
            keep
        });
    }

    /// Asks `node`, a replica, which of `xids` had not committed at its replay position, over a pooled
    /// connection. An answer of a node that is not in recovery is none.
    pub async fn not_committed(
        &self,
        node: NodeId,
        xids: &[u64],
        deadline: Duration,
    ) -> Result<NotCommitted, NodeError> {
        let asked: Vec<i64> = xids.iter().filter_map(|x| i64::try_from(*x).ok()).collect();
        let question = async {
            let client = self.client(node, &self.control_database()).await?;
            let statement = client.prepare_cached(NOT_COMMITTED).await.map_err(|e| self.error(node, &e))?;
            client.query_one(&statement, &[&asked]).await.map_err(|e| self.error(node, &e))
        };
        let row = timeout(deadline, question).await.map_err(|_| self.late(node))??;
        read_not_committed(&row).ok_or_else(|| {
            self.failure(node, NodeFailure::Answered, "not a replica that has replayed".to_owned())
        })
    }

    /// The node's name in the configuration.
    pub fn name(&self, node: NodeId) -> String {
        self.config.load().nodes.get(node.index()).map_or_else(|| format!("#{}", node.0), |n| n.name.clone())
    }

    /// The database for probes, samples and the auth query.
    pub fn control_database(&self) -> String {
        self.config.load().control.database.clone()
    }

    fn pool(&self, node: NodeId, database: &str) -> Result<Pool, NodeError> {
        let settings = self.settings(node, database)?;
        let mut pools = self.lock_pools();
        let key = (node, database.to_owned());
        if let Some(entry) = pools.get_mut(&key) {
            entry.used = Instant::now();
            return Ok(entry.pool.clone());
        }
        if pools.len() >= MAX_POOLS {
            let oldest = pools.iter().min_by_key(|(_, entry)| entry.used).map(|(key, _)| key.clone());
            if let Some(evicted) = oldest.and_then(|key| pools.remove(&key)) {
                evicted.pool.close();
            }
        }
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let limit = Some(self.config.load().pool.connect_timeout);
        let pool =
            Pool::builder(Manager::from_connect(settings, Dialer::clone(&self.dialer.load()), recycling))
                .max_size(POOL_CONNECTIONS)
                .runtime(Runtime::Tokio1)
                .wait_timeout(limit)
                .create_timeout(limit)
                .recycle_timeout(limit)
                .build()
                .map_err(|e| self.failure(node, NodeFailure::Broken, e.to_string()))?;
        pools.insert(key, PoolEntry { pool: pool.clone(), used: Instant::now() });
        Ok(pool)
    }

    fn settings(&self, node: NodeId, database: &str) -> Result<tokio_postgres::Config, NodeError> {
        let config = self.config.load();
        let Some(address) = config.nodes.get(node.index()) else {
            return Err(self.failure(
                node,
                NodeFailure::Refused,
                "no such node in the configuration".to_owned(),
            ));
        };
        let mut settings = tokio_postgres::Config::new();
        settings
            .host(&address.host)
            .port(address.port)
            .user(&config.control.user)
            .dbname(database)
            .application_name(APPLICATION)
            .options(SETTINGS)
            .connect_timeout(config.pool.connect_timeout)
            .keepalives_idle(KEEPALIVE.idle)
            .keepalives_interval(KEEPALIVE.interval)
            .keepalives_retries(KEEPALIVE.probes)
            .tcp_user_timeout(config.failover.tcp_user_timeout);
        if let Some(password) = &config.control.password {
            settings.password(&password.0);
        }
        Ok(settings)
    }

    async fn dial_within(
        &self,
        node: NodeId,
        database: &str,
        deadline: Duration,
    ) -> Result<(Client, JoinHandle<()>), NodeError> {
        let settings = self.settings(node, database)?;
        self.dial(node, &settings, deadline, None).await
    }

    async fn dial(
        &self,
        node: NodeId,
        settings: &tokio_postgres::Config,
        deadline: Duration,
        told_to_end: Option<&Arc<AtomicBool>>,
    ) -> Result<(Client, JoinHandle<()>), NodeError> {
        // A frozen server still accepts TCP: the deadline must span the login as well.
        let dialer = self.dialer.load_full();
        match timeout(deadline, dialer.dial(settings, told_to_end)).await {
            Ok(connected) => connected.map_err(|error| self.error(node, &error)),
            Err(_) => Err(self.failure(node, NodeFailure::Timeout, "connection timed out".to_owned())),
        }
    }

    fn error(&self, node: NodeId, error: &tokio_postgres::Error) -> NodeError {
        describe(self.name(node), error)
    }

    fn late(&self, node: NodeId) -> NodeError {
        self.failure(node, NodeFailure::Timeout, "no answer in time".to_owned())
    }

    fn failure(&self, node: NodeId, kind: NodeFailure, cause: String) -> NodeError {
        NodeError { node: self.name(node), cause, kind }
    }

    fn lock_pools(&self) -> std::sync::MutexGuard<'_, HashMap<(NodeId, String), PoolEntry>> {
        self.pools.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// One connection with our questions prepared on it. Dropping it closes the connection at once, also
/// towards a server that does not answer.
pub struct NodeClient {
    client: Client,
    told_to_end: Arc<AtomicBool>,
    task: EndWithOwner,
    name: String,
    deadline: Duration,
    probe: Option<Statement>,
    wal_sizes: (u64, u64),
    start: Option<Start>,
}

struct EndWithOwner(JoinHandle<()>);

impl Drop for EndWithOwner {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl NodeClient {
    /// Each question to come may take so long.
    pub fn answer_within(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// The server's start that this connection belongs to. `None`: the control user may not see it (it takes
    /// `pg_read_all_stats`, which `pg_monitor` has).
    pub fn start(&self) -> Option<&Start> {
        self.start.as_ref()
    }

    /// What the node is, and what its clock shows, in microseconds since 1970. One round trip.
    pub async fn probe(&self) -> Result<(ProbeAnswer, Option<i64>), NodeError> {
        let row = self.ask(self.probe.as_ref()).await?;
        let answer = read_probe(&row, self.wal_sizes).ok_or_else(|| self.unreadable())?;
        Ok((answer, row.try_get(3).ok()))
    }

    /// The history of `timeline`, as the node's `pg_wal` has it. `Ok(None)`: there is no such file, or
    /// the control user may not read it (`pg_read_file` takes a superuser or a grant).
    pub async fn timeline_history(&self, timeline: TimelineId) -> Result<Option<TimelineHistory>, NodeError> {
        if timeline.0 <= 1 {
            return Ok(Some(TimelineHistory::default()));
        }
        let path = format!("pg_wal/{:08X}.history", timeline.0);
        match timeout(self.deadline, self.client.query_one(HISTORY, &[&path])).await {
            Err(_) => Err(self.late()),
            Ok(Err(error)) if error.as_db_error().is_some() => Ok(None),
            Ok(Err(error)) => Err(describe(self.name.clone(), &error)),
            Ok(Ok(row)) => {
                let text: Option<String> = row.try_get(0).ok().flatten();
                Ok(text.and_then(|text| TimelineHistory::parse(&text).ok()))
            }
        }
    }

    /// Resolves when the connection has ended, for whatever reason; whether the server did so at an administrator's
    /// word, as it does when it is shut down in order.
    pub async fn ended(&mut self) -> bool {
        // The task is never awaited again once it has ended: the owner then drops the connection.
        let _ = (&mut self.task.0).await;
        self.was_told_to_end()
    }

    /// Whether the server has ended it at an administrator's word, as it does when it is shut down in order.
    pub fn was_told_to_end(&self) -> bool {
        self.told_to_end.load(Ordering::SeqCst)
    }

    async fn prepared(mut self) -> Result<NodeClient, NodeError> {
        let preparing = async {
            // Sent together.
            tokio::try_join!(
                self.client.query_one(WAL_SIZES, &[]),
                self.client.query_one(START, &[]),
                self.client.prepare(PROBE)
            )
        };
        let (sizes, start, probe) = timeout(self.deadline, preparing)
            .await
            .map_err(|_| self.late())?
            .map_err(|error| describe(self.name.clone(), &error))?;
        let size = |column: usize| sizes.try_get::<_, i64>(column).ok().and_then(|n| u64::try_from(n).ok());
        let (Some(block), Some(segment)) = (size(0), size(1)) else {
            return Err(self.unreadable());
        };
        self.wal_sizes = (block, segment);
        self.start = read_start(&start, block, Instant::now());
        self.probe = Some(probe);
        Ok(self)
    }

    async fn ask(&self, statement: Option<&Statement>) -> Result<Row, NodeError> {
        let statement = statement.ok_or_else(|| self.unreadable())?;
        let answer = timeout(self.deadline, self.client.query_one(statement, &[])).await;
        answer.map_err(|_| self.late())?.map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &tokio_postgres::Error) -> NodeError {
        // What the server says to an idle connection answers the question that has just come.
        if error.as_db_error().is_some_and(is_shutdown) {
            self.told_to_end.store(true, Ordering::SeqCst);
        }
        describe(self.name.clone(), error)
    }

    fn late(&self) -> NodeError {
        NodeError {
            node: self.name.clone(),
            cause: "no answer in time".to_owned(),
            kind: NodeFailure::Timeout,
        }
    }

    fn unreadable(&self) -> NodeError {
        NodeError {
            node: self.name.clone(),
            cause: "its answer cannot be read".to_owned(),
            kind: NodeFailure::Answered,
        }
    }
}

/// A connection that gives orders, each a statement of its own: `ALTER SYSTEM` takes no company. Dropping it
/// closes it at once; what was sent and not answered may still be carried out.
pub struct ControlSession {
    client: Client,
    _task: EndWithOwner,
    name: String,
}

impl ControlSession {
    /// Runs one statement; its rows, as text.
    pub async fn ask(&self, sql: &str, deadline: Duration) -> Result<Vec<Vec<Option<String>>>, NodeError> {
        let messages = timeout(deadline, self.client.simple_query(sql))
            .await
            .map_err(|_| NodeError {
                node: self.name.clone(),
                cause: "no answer in time".to_owned(),
                kind: NodeFailure::Timeout,
            })?
            .map_err(|error| describe(self.name.clone(), &error))?;
        let columns = |row: &tokio_postgres::SimpleQueryRow| {
            (0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect()
        };
        let rows = messages.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(columns(row)),
            _ => None,
        });
        Ok(rows.collect())
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }
}

/// Makes control connections, with the TLS that all connections to nodes have.
#[derive(Clone)]
struct Dialer {
    connector: tokio_postgres_rustls::MakeRustlsConnect,
    mode: tokio_postgres::config::SslMode,
    /// The same, for connections that are not made by `tokio-postgres`.
    tls: NodeTls,
}

impl Dialer {
    fn new(tls: &NodeTls) -> Dialer {
        let (connector, mode) = tls.postgres_connector();
        Dialer { connector, mode, tls: tls.without_allow() }
    }

    /// The one place where a control connection is made; its task runs until the connection ends.
    /// `told_to_end` is set when the server ends it at an administrator's word.
    async fn dial(
        &self,
        settings: &tokio_postgres::Config,
        told_to_end: Option<&Arc<AtomicBool>>,
    ) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
        let mut settings = settings.clone();
        settings.ssl_mode(self.mode);
        let (client, connection) = settings.connect(self.connector.clone()).await?;
        let told_to_end = told_to_end.map(Arc::clone);
        let task = tokio::spawn(async move {
            // Whoever asks over the connection gets its error; an idle one's says whether it is a shutdown.
            let ended = connection.await;
            let ordered = ended.is_err_and(|error| error.as_db_error().is_some_and(is_shutdown));
            if let Some(told_to_end) = told_to_end {
                told_to_end.fetch_or(ordered, Ordering::SeqCst);
            }
        });
        Ok((client, task))
    }
}

impl deadpool_postgres::Connect for Dialer {
    fn connect(
        &self,
        settings: &tokio_postgres::Config,
    ) -> std::pin::Pin<
        Box<dyn Future<Output = Result<(Client, JoinHandle<()>), tokio_postgres::Error>> + Send + '_>,
    > {
        let settings = settings.clone();
        Box::pin(async move { self.dial(&settings, None).await })
    }
}

fn is_shutdown(error: &tokio_postgres::error::DbError) -> bool {
    orders_shutdown(error.code().code().as_bytes(), error.routine().unwrap_or_default().as_bytes())
}

/// 57P01 by an administrator: a backend whose postmaster was killed says the same, from another routine.
fn orders_shutdown(sqlstate: &[u8], routine: &[u8]) -> bool {
    sqlstate == b"57P01" && routine == b"ProcessInterrupts"
}

fn describe(node: String, error: &tokio_postgres::Error) -> NodeError {
    let (kind, cause) = match error.as_db_error() {
        Some(answer) => {
            let kind = NodeFailure::of_answer(answer.code().code().as_bytes());
            (kind, format!("{} ({})", answer.message(), answer.code().code()))
        }
        None => {
            let source = std::error::Error::source(error);
            let cause = source.and_then(|s| s.downcast_ref::<std::io::Error>());
            let kind = cause.map_or(NodeFailure::Broken, NodeFailure::of_io);
            (kind, source.map_or_else(|| error.to_string(), |source| format!("{error}: {source}")))
        }
    };
    NodeError { node, cause, kind }
}

type Fields = Vec<Option<String>>;

fn field<T: std::str::FromStr>(fields: &Fields, index: usize) -> Option<T> {
    fields.get(index)?.as_deref()?.parse().ok()
}

fn timeline_of_file(fields: &Fields, index: usize) -> Option<TimelineId> {
    u32::from_str_radix(fields.get(index)?.as_deref()?, 16).ok().map(TimelineId)
}

/// All but its walreceiver's process.
fn replica_positions(fields: &Fields) -> ReplicaSample {
    ReplicaSample {
        receiver: None,
        receive: field(fields, 1),
        replay: field(fields, 2),
        // A walreceiver that has not begun shows 0.
        received_timeline: field(fields, 3).filter(|t| *t > 0).map(TimelineId),
        archive: field(fields, 4).unwrap_or(true),
        newest_history: timeline_of_file(fields, 5),
    }
}

fn read_start(row: &Row, block: u64, now: Instant) -> Option<Start> {
    let id: String = row.try_get::<_, Option<String>>(0).ok()??;
    let end: Option<String> = row.try_get(1).ok()?;
    let clean: bool = row.try_get(2).ok()?;
    let age: f64 = row.try_get::<_, Option<f64>>(3).ok()??;
    let began = now.checked_sub(Duration::try_from_secs_f64(age.max(0.0)).ok()?)?;
    let end: Option<Lsn> = end.and_then(|lsn| lsn.parse().ok());
    Some(Start { id: id.into(), end, whole: end.map(|end| whole_until(end, block)), clean, began })
}

fn read_probe(row: &Row, (block, segment): (u64, u64)) -> Option<ProbeAnswer> {
    let version: i32 = row.try_get(1).ok()?;
    let fields: Fields = row.try_get(2).ok()?;
    let role = match fields.first()?.as_deref()? {
        "replica" => ProbedRole::Replica {
            positions: replica_positions(&fields),
            walreceiver: fields.get(6).cloned().flatten(),
            receiver: field(&fields, 10).map(|pid| Receiver {
                pid,
                host: fields.get(11).cloned().flatten(),
                port: field(&fields, 12),
            }),
            recovery: Recovery {
                apply_delay: Duration::from_millis(field(&fields, 7).unwrap_or(0)),
                paused: field(&fields, 8).unwrap_or(false),
                conflicts: field(&fields, 9).unwrap_or(0),
            },
        },
        "primary" => ProbedRole::Primary {
            insert: round_down_page_header(field(&fields, 1)?, block, segment),
            timeline: timeline_of_file(&fields, 2)?,
            read_only: field(&fields, 3).unwrap_or(false),
        },
        _ => return None,
    };
    Some(ProbeAnswer {
        system_identifier: row.try_get::<_, i64>(0).ok()?.cast_unsigned(),
        server_major: u16::try_from(version / 10_000).ok()?,
        role,
    })
}

fn read_not_committed(row: &Row) -> Option<NotCommitted> {
    if !row.try_get::<_, bool>(1).ok()? {
        return None;
    }
    let xids: Option<Vec<i64>> = row.try_get(2).ok()?;
    let timeline: Option<i32> = row.try_get(3).ok()?;
    Some(NotCommitted {
        replay: row.try_get::<_, Option<String>>(0).ok()??.parse().ok()?,
        timeline: timeline.and_then(|t| u32::try_from(t).ok()).filter(|t| *t > 0).map(TimelineId),
        xids: xids.unwrap_or_default().into_iter().filter_map(|x| u64::try_from(x).ok()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_read_as_the_server_writes_it() {
        assert_eq!(Snapshot::parse("10:10:"), Some(Snapshot { xmax: 10, xip: vec![] }));
        assert_eq!(Snapshot::parse("10:20:10,14,15"), Some(Snapshot { xmax: 20, xip: vec![10, 14, 15] }));
        for bad in ["", "10", "10:20", "a:b:", "10:20:x", "10:20:1,,x", "-1:2:"] {
            assert_eq!(Snapshot::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_narrow_xid_is_widened_past_its_reference() {
        assert_eq!(widen_xid(800, 790), 800);
        assert_eq!(widen_xid(790, 790), 790);
        assert_eq!(widen_xid(5, 0xFFFF_FFF0), 0x1_0000_0005);
        assert_eq!(widen_xid(5, 0x7_0000_0003), 0x7_0000_0005);
        assert_eq!(widen_xid(3, 0x7_FFFF_FFFF), 0x8_0000_0003);
    }
}
