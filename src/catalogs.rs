//! Keeps each database's [`Catalog`] up to date: one loader task per database that reads the facts from the
//! primary, asks once a second whether any catalog changed, and reads them again if so. No policy: what
//! the facts mean is decided in `classify`.
//!
//! Until the first load, after [`DatabaseCatalog::invalidate`], and while the primary cannot be asked, the
//! catalog is unknown, and so no statement of that database is a read.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::TryStreamExt as _;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::classify::catalog::{self, Catalog, CatalogRows, FunctionRow, Mark, Object, OperatorRow, TypeRow};
use crate::classify::tree::Use;
use crate::classify::{safe_function_names, safe_system_names};
use crate::node::Nodes;
use crate::topology::{Epoch, NodeId, TopologyHandle};
use crate::wal::{Lsn, round_down_page_header};

/// Time between two looks at the change counters.
const POLL: Duration = Duration::from_secs(1);

/// How long one look or one load may take before the catalog counts as unknown.
const QUESTION: Duration = Duration::from_secs(20);

/// Up to where the primary's log goes, asked after the facts were read: it holds all that they rest on.
const POSITION_SQL: &str = "\
SELECT pg_catalog.pg_current_wal_insert_lsn()::text, pg_catalog.current_setting('wal_block_size')::pg_catalog.int8, \
       pg_catalog.pg_size_bytes(pg_catalog.current_setting('wal_segment_size'))";

/// For `query_raw`, which wants a type for no parameters.
const NO_PARAMETERS: [&(dyn tokio_postgres::types::ToSql + Sync); 0] = [];

/// The catalogs of all databases.
pub struct Catalogs {
    nodes: Arc<Nodes>,
    topology: Arc<TopologyHandle>,
    runtime: tokio::runtime::Handle,
    identities: Arc<AtomicU64>,
    /// Each costs a task and a question a second; sessions of databases beyond run on the primary.
    limit: AtomicUsize,
    /// A database beyond the limit was asked for, and that has been said.
    full: AtomicBool,
    databases: Mutex<HashMap<Box<str>, Arc<DatabaseCatalog>>>,
    never_loaded: Arc<DatabaseCatalog>,
}

/// One database's catalog.
pub struct DatabaseCatalog {
    current: ArcSwap<Catalog>,
    /// The last facts that were known.
    last: Mutex<Option<Arc<Catalog>>>,
    /// A replica that has not replayed up to here still has something unsafe where the facts say safe.
    safe_from: AtomicU64,
    identities: Arc<AtomicU64>,
    /// Raised by each invalidation: a load that began before the last one is thrown away.
    generation: Mutex<u64>,
    wanted: Notify,
    /// No session uses it: its loader ends.
    released: AtomicBool,
    /// Changes of the catalog are not counted, and that has been said.
    uncounted: AtomicBool,
}

impl Catalogs {
    /// Loaders run on `runtime`, for the first `limit` databases asked for (`limits.databases`).
    pub fn new(
        nodes: Arc<Nodes>,
        topology: Arc<TopologyHandle>,
        runtime: tokio::runtime::Handle,
        limit: usize,
    ) -> Arc<Catalogs> {
        let identities = Arc::new(AtomicU64::new(0));
        let never_loaded = DatabaseCatalog::new(&identities);
        Arc::new(Catalogs {
            nodes,
            topology,
            runtime,
            identities,
            limit: AtomicUsize::new(limit),
            full: AtomicBool::new(false),
            databases: Mutex::default(),
            never_loaded,
        })
    }

    /// The catalog of a database that exists (the caller has logged in to it); its loader starts at the first call.
    pub fn database(&self, name: &str) -> Arc<DatabaseCatalog> {
        let mut databases = self.databases.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(known) = databases.get(name) {
            return Arc::clone(known);
        }
        let limit = self.limit.load(Ordering::Relaxed);
        if databases.len() >= limit {
            Catalogs::release(&mut databases, None);
        }
        if databases.len() >= limit {
            if !self.full.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    database = name,
                    limit,
                    "limits.databases is reached: statements of this and further databases run on the primary"
                );
            }
            return Arc::clone(&self.never_loaded);
        }
        let database = DatabaseCatalog::new(&self.identities);
        databases.insert(name.into(), Arc::clone(&database));
        self.runtime.spawn(keep(
            Arc::clone(&self.nodes),
            Arc::clone(&self.topology),
            name.to_owned(),
            Arc::clone(&database),
        ));
        database
    }

    /// Another limit from now on. Databases beyond it stay as long as sessions use them.
    pub fn bound(&self, limit: usize) {
        if self.limit.swap(limit, Ordering::Relaxed) != limit {
            self.full.store(false, Ordering::Relaxed);
        }
    }

    /// What the operator says of functions has changed: nothing is known of any database until it has been read again.
    pub fn invalidate_all(&self) {
        let databases = self.databases.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        databases.values().for_each(|database| database.invalidate());
    }

    /// Forgets the databases that no session uses, but for `except`, and ends their loaders: nothing of ours
    /// stays connected to them once the loaders' connections are closed, too ([`Nodes::close_databases`]).
    pub fn release_unused(&self, except: &str) {
        let mut databases = self.databases.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Catalogs::release(&mut databases, Some(except));
    }

    /// Forgets this database if no session uses it: somebody has asked about it who is not connected to it, and it may
    /// not even exist.
    pub fn release_if_unused(&self, name: &str) {
        let mut databases = self.databases.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(database) = databases.get(name)
            && Arc::strong_count(database) <= 2
        {
            database.released.store(true, Ordering::SeqCst);
            database.wanted.notify_one();
            databases.remove(name);
        }
    }

    fn release(databases: &mut HashMap<Box<str>, Arc<DatabaseCatalog>>, except: Option<&str>) {
        databases.retain(|name, database| {
            // The table and the loader hold one each; sessions get theirs under this lock.
            let used = Arc::strong_count(database) > 2 || Some(&**name) == except;
            if !used {
                database.released.store(true, Ordering::SeqCst);
                database.wanted.notify_one();
            }
            used
        });
    }
}

impl DatabaseCatalog {
    fn new(identities: &Arc<AtomicU64>) -> Arc<DatabaseCatalog> {
        let identity = identities.fetch_add(1, Ordering::Relaxed);
        Arc::new(DatabaseCatalog {
            current: ArcSwap::from_pointee(Catalog::unknown(identity)),
            last: Mutex::new(None),
            safe_from: AtomicU64::new(0),
            identities: Arc::clone(identities),
            generation: Mutex::new(0),
            wanted: Notify::new(),
            released: AtomicBool::new(false),
            uncounted: AtomicBool::new(false),
        })
    }

    /// The facts as they stand.
    pub fn current(&self) -> Arc<Catalog> {
        self.current.load_full()
    }

    /// Data definition ran (or committed) in a session of ours: nothing is known until the facts have been read
    /// again. Call it when the statement was sent and again when its transaction has ended.
    pub fn invalidate(&self) {
        {
            let mut generation = self.generation();
            *generation += 1;
            self.forget();
        }
        self.wanted.notify_one();
    }

    fn generation(&self) -> std::sync::MutexGuard<'_, u64> {
        self.generation.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn next_identity(&self) -> u64 {
        self.identities.fetch_add(1, Ordering::Relaxed)
    }

    fn forget(&self) {
        if self.current.load().is_loaded() {
            self.current.store(Arc::new(Catalog::unknown(self.next_identity())));
        }
    }

    /// The position that a replica must have replayed to be what the facts say. Moves only when something that was
    /// unsafe has become safe: a function whose body took a lock is not asked of a replica that has that body still.
    pub fn safe_from(&self) -> Lsn {
        Lsn(self.safe_from.load(Ordering::Acquire))
    }

    /// Publishes what was read, unless it was invalidated since `started`. `position`: it had all been written up to
    /// there.
    fn publish(&self, started: u64, rows: CatalogRows, position: Lsn) -> bool {
        let catalog = Arc::new(Catalog::from_rows(self.next_identity(), rows));
        let generation = self.generation();
        let fresh = *generation == started;
        if fresh {
            let mut last = self.last.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            // Before the facts: who sees them sees this.
            // A new primary's log may be shorter: it has all that its facts rest on at its end.
            let of_another = position < self.safe_from();
            if of_another || last.as_ref().is_some_and(|last| catalog.allows_more_than(last)) {
                self.safe_from.store(position.0, Ordering::Release);
            }
            *last = Some(Arc::clone(&catalog));
            self.current.store(catalog);
        }
        fresh
    }
}

/// What the published facts rest on: another value of any of these means to read them again.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Basis {
    primary: NodeId,
    epoch: Epoch,
    changes: i64,
    generation: u64,
}

/// When a primary had read its configuration, in its seconds. Its processes read it one after the other, and one of two may
/// answer: what counts is the latest.
#[derive(Clone, Copy)]
struct Configured {
    primary: NodeId,
    epoch: Epoch,
    read_at: f64,
}

/// The loader's loop; lives until the database is released.
async fn keep(
    nodes: Arc<Nodes>,
    topology: Arc<TopologyHandle>,
    name: String,
    database: Arc<DatabaseCatalog>,
) {
    let mut basis: Option<Basis> = None;
    let mut looked: Option<Configured> = None;
    while !database.released.load(Ordering::SeqCst) {
        let mut configured = None;
        let step =
            timeout(QUESTION, refresh(&nodes, &topology, &name, &database, basis, &mut configured)).await;
        match step {
            Ok(Ok(next)) => basis = next,
            Ok(Err(cause)) => {
                tracing::debug!(database = name, cause, "catalog facts could not be read");
                basis = None;
                database.forget();
            }
            Err(_elapsed) => {
                tracing::debug!(database = name, "catalog facts could not be read in time");
                basis = None;
                database.forget();
            }
        }
        if let Some(now) = configured
            && looked.is_none_or(|last| last.epoch != now.epoch || last.read_at < now.read_at)
        {
            // Not what the facts rest on: it fails by itself, and is tried again. No connection of ours stands in the
            // database meanwhile: if that is being dropped, this one waits for it, and it would wait for ours.
            match nodes.look_at_defaults(now.primary, now.epoch, &name, POLL).await {
                Ok(()) => looked = Some(now),
                Err(error) => tracing::debug!(
                    database = name,
                    cause = error.cause,
                    "the primary's defaults could not be read"
                ),
            }
        }
        let stale = basis.is_none_or(|basis| basis.generation != *database.generation());
        // Not at once after a failure, or it would spin.
        if basis.is_none() || !stale {
            let _ = timeout(POLL, database.wanted.notified()).await;
        }
    }
}

/// One look at the counters, and a load if they moved.
async fn refresh(
    nodes: &Nodes,
    topology: &TopologyHandle,
    name: &str,
    database: &DatabaseCatalog,
    basis: Option<Basis>,
    configured: &mut Option<Configured>,
) -> Result<Option<Basis>, String> {
    let (primary, epoch) = {
        let view = topology.load();
        (view.primary.ok_or("there is no primary")?, view.epoch)
    };
    let generation = *database.generation();
    let mut client = nodes.client(primary, name).await.map_err(|error| error.cause)?;
    let counters = client.query_one(catalog::CHANGES_SQL, &[]).await.map_err(|error| error.to_string())?;
    let changes: Option<i64> = counters.try_get(0).map_err(|error| error.to_string())?;
    if !database.uncounted.swap(changes.is_none(), Ordering::Relaxed) && changes.is_none() {
        tracing::warn!(
            database = name,
            "track_counts is off: statements of this database run on the primary"
        );
    }
    let changes = changes.ok_or("changes of the catalog are not counted")?;
    let version: i32 = counters.try_get(1).map_err(|error| error.to_string())?;
    nodes.login_settings.read(counters.try_get(2).map_err(|error| error.to_string())?);
    let read_at: f64 = counters.try_get(3).map_err(|error| error.to_string())?;
    *configured = Some(Configured { primary, epoch, read_at });
    let next = Basis { primary, epoch, changes, generation };
    if basis == Some(next) && database.current.load().is_loaded() {
        return Ok(basis);
    }
    let major = u16::try_from(version / 10_000).unwrap_or_default();
    let mut rows = load(&mut client, major).await.map_err(|error| error.to_string())?;
    rows.overrides = nodes.functions();
    let position = position(&client).await?;
    Ok(database.publish(generation, rows, position).then_some(next))
}

async fn position(client: &tokio_postgres::Client) -> Result<Lsn, String> {
    let row = client.query_one(POSITION_SQL, &[]).await.map_err(|error| error.to_string())?;
    let text: &str = row.try_get(0).map_err(|error| error.to_string())?;
    let size = |column| {
        row.try_get::<_, i64>(column).map(|size| size.max(0) as u64).map_err(|error| error.to_string())
    };
    let insert: Lsn = text.parse().map_err(|_| format!("no position: {text}"))?;
    Ok(round_down_page_header(insert, size(1)?, size(2)?))
}

/// Reads the facts in one snapshot.
pub async fn load(
    client: &mut tokio_postgres::Client,
    server_major: u16,
) -> Result<CatalogRows, tokio_postgres::Error> {
    let transaction = client
        .build_transaction()
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await?;
    let (functions, names) = (safe_function_names(), safe_system_names());
    let encoding = transaction.query_one(catalog::ENCODING_SQL, &[]).await?;
    let mut rows = CatalogRows { server_major, utf8: encoding.try_get(0)?, ..CatalogRows::default() };
    for row in transaction.query(catalog::SETTERS_SQL, &[]).await? {
        rows.setters.push(row.try_get(0)?);
    }
    if !rows.setters.is_empty() {
        for row in transaction.query(catalog::FIRING_SQL, &[]).await? {
            rows.firing.push(row.try_get(0)?);
        }
    }
    for row in transaction.query(catalog::LEAVING_SQL, &[]).await? {
        rows.leaving.push(row.try_get(0)?);
    }
    for row in transaction.query(catalog::SAFE_FUNCTIONS_SQL, &[&functions]).await? {
        rows.safe_functions.insert(row.try_get(0)?);
    }
    for row in transaction.query(catalog::TEXT_SEARCH_SQL, &[]).await? {
        if let Some(object) = Object::from_columns(row.try_get(1)?, row.try_get(2)?) {
            rows.text_search(row.try_get(0)?, object, row.try_get(3)?);
        }
    }
    for row in transaction.query(catalog::UNSAFE_RELATIONS_SQL, &[&names]).await? {
        rows.unsafe_relations.insert(row.try_get(0)?);
    }
    for row in transaction.query(catalog::ATTRIBUTES_SQL, &[&functions]).await? {
        rows.attributes.push(row.try_get(0)?);
    }
    read_objects(&transaction, &mut rows, &functions).await?;
    let mut found = pin!(transaction.query_raw(catalog::EDGES_SQL, NO_PARAMETERS).await?);
    while let Some(row) = found.try_next().await? {
        let from = Object::from_columns(row.try_get(0)?, row.try_get(1)?);
        let to = Object::from_columns(row.try_get(2)?, row.try_get(3)?);
        if let Some((from, to)) = from.zip(to) {
            rows.edge(from, to);
        }
    }
    // One at a time: views can be large, and many.
    let mut found = pin!(transaction.query_raw(catalog::TREES_SQL, NO_PARAMETERS).await?);
    while let Some(row) = found.try_next().await? {
        let used = if row.try_get(3)? { Use::Folded } else { Use::Evaluated };
        if let Some(owner) = Object::from_columns(row.try_get(0)?, row.try_get(1)?) {
            rows.tree(owner, row.try_get(2)?, used);
        }
    }
    let types = rows.mentioned_types();
    for row in transaction.query(catalog::ALIASES_SQL, &[&types]).await? {
        if let Some(object) = Object::from_columns(row.try_get(1)?, row.try_get(2)?) {
            rows.aliases.insert(row.try_get(0)?, object);
        }
    }
    let relations = rows.unsafe_relations();
    for row in transaction.query(catalog::NAMES_SQL, &[&relations]).await? {
        rows.relations.push((row.try_get(0)?, row.try_get(1)?));
    }
    transaction.commit().await?;
    Ok(rows)
}

/// What users made, but for relations.
async fn read_objects(
    transaction: &tokio_postgres::Transaction<'_>,
    rows: &mut CatalogRows,
    functions: &[&str],
) -> Result<(), tokio_postgres::Error> {
    for row in transaction.query(catalog::FUNCTIONS_SQL, &[&functions]).await? {
        let function = FunctionRow {
            oid: row.try_get(0)?,
            name: row.try_get(1)?,
            language: row.try_get(2)?,
            kind: row.try_get(3)?,
            volatile: row.try_get(4)?,
            one_argument: row.try_get(5)?,
            settings: row.try_get(6)?,
            source: row.try_get(7)?,
            library: row.try_get(8)?,
            extension: row.try_get(9)?,
            stored: row.try_get(10)?,
            internal: row.try_get(11)?,
            shadows: row.try_get(12)?,
            schema: row.try_get(15)?,
            takes_internal: row.try_get(16)?,
        };
        for column in [13, 14] {
            if let Some(tree) = row.try_get::<_, Option<&str>>(column)? {
                rows.tree(Object::Function(function.oid), tree, Use::Evaluated);
            }
        }
        if function.language == "sql" {
            rows.in_sql.insert(function.oid);
        }
        rows.functions.push(function);
    }
    for row in transaction.query(catalog::OPERATORS_SQL, &[]).await? {
        rows.operators.push(OperatorRow {
            oid: row.try_get(0)?,
            token: row.try_get(1)?,
            operands: [row.try_get(2)?, row.try_get(3)?],
            outdone: row.try_get::<_, Option<bool>>(4)?.unwrap_or(false),
        });
    }
    for row in transaction.query(catalog::TYPES_SQL, &[]).await? {
        rows.types.push(TypeRow { oid: row.try_get(0)?, name: row.try_get(1)? });
    }
    for row in transaction.query(catalog::CASTS_SQL, &[]).await? {
        rows.cast(row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
    }
    for row in transaction.query(catalog::MARKS_SQL, &[]).await? {
        if let Some(object) = Object::from_columns(row.try_get(0)?, row.try_get(1)?) {
            rows.marks.push((object, Mark::from_letter(row.try_get(2)?)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_that_data_definition_overtook_is_thrown_away() {
        let database = DatabaseCatalog::new(&Arc::new(AtomicU64::new(0)));
        let started = *database.generation();
        database.invalidate();
        assert!(!database.publish(started, CatalogRows::default(), Lsn(1)));
        assert!(!database.current().is_loaded());
        let started = *database.generation();
        assert!(database.publish(started, CatalogRows::default(), Lsn(2)));
        let loaded = database.current();
        assert!(loaded.is_loaded());
        database.invalidate();
        assert!(!database.current().is_loaded());
        assert_ne!(database.current().identity(), loaded.identity());
    }

    #[test]
    fn what_has_become_safe_is_so_from_where_the_log_stood() {
        let database = DatabaseCatalog::new(&Arc::new(AtomicU64::new(0)));
        let facts = |harmless: &str| CatalogRows {
            functions: vec![FunctionRow {
                name: "f".into(),
                language: "sql".into(),
                kind: "f".into(),
                source: harmless.into(),
                ..FunctionRow::default()
            }],
            ..CatalogRows::default()
        };
        let mut at = 0;
        let publish_at = |at: u64, body: &str| {
            database.invalidate();
            let started = *database.generation();
            assert!(database.publish(started, facts(body), Lsn(at)));
            database.safe_from()
        };
        let mut publish = |body: &str| {
            at += 10;
            publish_at(at, body)
        };
        assert_eq!(publish("select pg_advisory_lock(1)"), Lsn::ZERO);
        assert_eq!(publish("select pg_advisory_lock(2)"), Lsn::ZERO);
        assert_eq!(publish("select 1"), Lsn(30));
        assert_eq!(publish("select 2"), Lsn(30));
        assert_eq!(publish("select pg_advisory_lock(1)"), Lsn(30));
        assert_eq!(publish("select 1"), Lsn(60));
        // A primary that begins behind that.
        assert_eq!(publish_at(35, "select 1"), Lsn(35));
    }
}
